"""The connection to a broker, as programs see it.

A `Connection` is a set of parameters, a transport that is made when it is needed, and the one
connection of that transport.  Making a Connection opens nothing.  What opens it: `connect`,
`connection`, `default_channel`, `channel`, `ensure_connection`.

It may be shared by any number of tasks.  Exactly one of them connects while the others wait for its
result; the wait is bounded by the attempt, and by the deadline of the waiting task.  `close` while
others work on the connection gives each of them a typed error, also those who wait in
`drain_events`.  A task that closes a connection which another one is just opening wins.

`close` says goodbye to the broker within a bound; `collect` does not: it aborts, and is what the
retries use, because a peer that has just failed answers no goodbye.

A forked child that inherits a Connection forgets the parent's connection without touching it, and
opens one of its own at the next use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from greenkombu import exceptions
from greenkombu._ensure import Retrying
from greenkombu._failover import failover_strategies
from greenkombu._flight import flights
from greenkombu._forks import generation
from greenkombu._retry import Intervals, bounded_wait, pause
from greenkombu.deadline import Deadline

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, TypeIs

    from greenkombu._connection_pools import ChannelPool, ConnectionPool
    from greenkombu.messaging import Consumer, Producer
    from greenkombu.resource import Resource
    from greenkombu.simple import SimpleBuffer, SimpleQueue


__all__ = (
    "BrokerConnection",
    "ChannelPool",
    "Connection",
    "ConnectionPool",
    "Resource",
    "failover_strategies",
    "is_connection",
    "maybe_channel",
)

_ErrorTypes = tuple[type[BaseException], ...]

logger = logging.getLogger(__name__)

_RETRY_OPTIONS = (
    "max_retries",
    "interval_start",
    "interval_step",
    "interval_max",
    "errback",
    "callback",
)


class Connection(Retrying):
    """A connection to one broker, or to the first of several that can be reached.

    Args:
        hostname: a URL ``transport://userid:password@hostname:port/virtual_host?option=value``, a
            host name, several of them (``"a;b"`` or a list), or None. Values in a URL win over the
            other arguments.
        userid: user name; None leaves it to the transport.
        password: password; None leaves it to the transport.
        virtual_host: the broker's name space; for redis the number of the database.
        port: port; None means the transport's own.
        insist: kept for Kombu's sake, not used.
        ssl: True, or a dictionary of options; certificates are verified unless these say otherwise.
        transport: an alias, a class path or a class; it wins over the scheme of the URL.
        connect_timeout: seconds for one attempt to connect; None sets no limit.
        transport_options: what only this transport understands.
        login_method: SASL mechanism; None means the transport's own.
        uri_prefix: what stands before the ``+`` of a URL.
        heartbeat: seconds between heartbeats; 0 has none.
        failover_strategy: "round-robin", "shuffle", or a function from the list of brokers to an
            iterator over them.
        alternates: more brokers, tried when the first one cannot be reached.
        credential_provider: kept for transports that ask an object for credentials.

    Raises:
        exceptions.InvalidURL: a broker's text makes no sense.
        exceptions.TransportNotFound: no transport has the name of the scheme.
    """

    _default_channel: Any = None
    _closed: bool | None = None
    # Of which process the connection is: see greenkombu._forks.
    _generation = 0
    # The pool that this connection was acquired from, and what that notes while it is on loan.
    _pool: Resource[Any] | None = None
    _lease: Any = None

    _declared: set[Any] | None = None
    # Replaced by close(): who connects compares it before and after.
    _epoch = object()

    @property
    def declared_entities(self) -> set[Any]:
        """What `maybe_declare` has declared on this very connection."""
        declared = self._declared
        if declared is None:
            declared = self._declared = set()
        return declared

    def switch(self, conn_str: str) -> None:
        """Close, and go over to the broker `conn_str`; does not connect.

        Args:
            conn_str: a URL, or a host name. Parameters that it does not say are the first
                broker's; a URL has its own transport, user and password.
        """
        self.close()
        self._go_over_to(conn_str)
        self._closed = False

    def maybe_switch_next(self) -> None:
        """Go over to the next broker if there are several."""
        if self.cycle is not None and not getattr(self.transport, "reaches_all_brokers", False):
            self.collect()
            # It may be another kind, and a transport may set parameters of its connection.
            self._do_close_transport()
            self._go_over_to(self._next_broker())

    # -- life cycle

    @property
    def connected(self) -> bool:
        """True while the connection is open, as far as can be told without asking the peer."""
        return not self._closed and self._usable() is not None

    def _usable(self) -> Any:
        """Return the transport's connection if it can be used; looks, never waits."""
        connection = self._connection
        if connection is None:
            return None
        if self._generation != generation():
            self._forget()
            return None
        return connection if self.transport.verify_connection(connection) else None

    def _forget(self) -> None:
        """Drop what belongs to the parent process, without touching it."""
        self._connection = self._default_channel = self._transport = self._declared = None

    def connect(self) -> Any:
        """Connect now, trying each broker once.

        Returns:
            The transport's connection.

        Raises:
            Exception: one of `connection_errors`, the last broker's; nothing is open then.
        """
        self._closed = False
        return self._ensure_connection(
            max_retries=self._one_round, interval_start=0, reraise_as_library_errors=False
        )

    @property
    def _one_round(self) -> int:
        return self._in_turn - 1

    @property
    def connection(self) -> Any:
        """The transport's connection, opened if need be; None after `close`."""
        if self._closed:
            return None
        connection = self._usable()
        return self.connect() if connection is None else connection

    def _open_connection(self) -> Any:
        connection = self.connection
        if connection is None:
            self._raise_closed()
        return connection

    def _raise_closed(self) -> NoReturn:
        raise exceptions.ConnectionClosedError(
            f"the connection to {self.as_uri()} was closed; call connect() to open it again"
        )

    def ensure_connection(
        self,
        errback: Callable[[BaseException, float], object] | None = None,
        max_retries: int | None = None,
        interval_start: float = 2,
        interval_step: float = 2,
        interval_max: float = 30,
        callback: Callable[[], object] | None = None,
        reraise_as_library_errors: bool = True,
        timeout: float | None = None,
    ) -> Self:
        """Connect, and try again if it fails.

        Args:
            errback: called with the error and the seconds until the next attempt, before each wait.
            max_retries: attempts after the first; 0 means no other one, None sets no limit.
            interval_start: seconds of the first wait. Among several brokers, only the wait after
                all of them have failed counts; before it there is none.
            interval_step: seconds by which each wait is longer than the one before.
            interval_max: seconds of the longest wait.
            callback: called without arguments at the beginning of every second of a wait.
            reraise_as_library_errors: wrap the last error in `exceptions.OperationalError`.
            timeout: seconds for everything, attempts and waits; None sets no limit.

        Returns:
            This connection.

        Raises:
            exceptions.OperationalError: the last attempt failed (`__cause__` says how).
            Exception: an error that no retry mends, as it is (refused credentials, for example).
        """
        self._ensure_connection(
            errback,
            max_retries,
            interval_start,
            interval_step,
            interval_max,
            callback,
            reraise_as_library_errors,
            timeout,
        )
        return self

    def _ensure_connection(
        self,
        errback: Callable[[BaseException, float], object] | None = None,
        max_retries: int | None = None,
        interval_start: float = 2,
        interval_step: float = 2,
        interval_max: float = 30,
        callback: Callable[[], object] | None = None,
        reraise_as_library_errors: bool = True,
        timeout: float | None = None,
    ) -> Any:
        connection = self._usable()
        self._closed = False
        if connection is not None:
            return connection
        intervals = Intervals(interval_start, interval_step, interval_max)
        with Deadline(timeout):
            if not reraise_as_library_errors:
                return self._connect_with_retries(errback, max_retries, intervals, callback)
            with self._reraise_as_library_errors():
                return self._connect_with_retries(errback, max_retries, intervals, callback)

    def _connect_with_retries(
        self,
        errback: Callable[[BaseException, float], object] | None,
        max_retries: int | None,
        intervals: Intervals,
        callback: Callable[[], object] | None,
    ) -> Any:
        epoch = self._epoch
        retries = 0
        while True:
            switches = self._switches
            # Of this broker's transport; the next one may have another.
            recoverable = self.recoverable_connection_errors
            catch = (*self.connection_errors, *recoverable)
            try:
                if epoch is not self._epoch:
                    self._raise_closed()  # by another task: not to be opened again by this one
                return self._connect_once()
            except catch as exc:
                if epoch is not self._epoch or (max_retries is not None and retries >= max_retries):
                    raise
                # One broker that refuses us says nothing about the others.
                if not isinstance(exc, recoverable) and retries + 1 >= self._in_turn:
                    raise
                wait = bounded_wait(next(intervals) if self.completes_cycle(retries) else 0.0)
                if wait is None:
                    raise
                if errback is not None:
                    errback(exc, wait)
            if switches == self._switches:
                # Of all the tasks that share the error, one goes over to the next broker.
                self.maybe_switch_next()
            retries += 1
            pause(wait, callback)

    def _connect_once(self) -> Any:
        connection = self._usable()
        if connection is not None:
            return connection
        return flights.run(self, "connect", self._connect)

    def _connect(self) -> Any:
        """Replace the connection; run by one task at a time."""
        connection = self._usable()
        if connection is not None:
            return connection
        while True:
            self.collect()
            epoch = self._epoch
            switches = self._switches
            connection = self._establish_connection()
            if epoch is not self._epoch:
                _abort(connection)
                self._raise_closed()
            if switches == self._switches:
                break
            # Meanwhile another task has gone over to the next broker, and its transport.
            _abort(connection)
        if getattr(connection, "client", self) is None:
            connection.client = self
        self._declared = None
        self._generation = generation()
        self._connection = connection
        self._debug("connected to %s", self)
        return connection

    def _establish_connection(self) -> Any:
        """Have the transport connect with the parameters of now."""
        self._debug("connecting to %s", self)
        return self.transport.establish_connection()

    def close(self) -> None:
        """Close the connection if it is open, politely and within a bound; may be called again.

        Whoever waits on it gets `exceptions.ConnectionClosedError`. It can be opened again.
        """
        self._close()

    def _close(self) -> None:
        self._closed = True
        self._epoch = object()
        self._do_close_self()
        self._do_close_transport()

    def _do_close_self(self) -> None:
        connection = self._connection
        self._connection = self._default_channel = self._declared = None
        if connection is None or self._generation != generation():
            return
        self._debug("closing %s", self)
        errors: _ErrorTypes = (*self.connection_errors, *self.channel_errors, OSError)
        try:
            self.transport.close_connection(connection)
        except errors as exc:
            self._debug("%s did not close well: %r", self, exc)
        finally:
            # Also after a kill in the middle of the goodbye.
            _abort(connection)

    def _do_close_transport(self) -> None:
        transport, self._transport = self._transport, None
        if transport is not None and self._generation == generation():
            transport.client = None

    def collect(self, socket_timeout: float | None = None) -> None:
        """Drop the connection at once: no goodbye, no wait. The next use connects again.

        Args:
            socket_timeout: kept for Kombu's sake, not used; nothing here waits.
        """
        del socket_timeout
        connection = self._connection
        self._connection = self._default_channel = self._declared = None
        if connection is None or self._generation != generation():
            return
        self._debug("dropping %s", self)
        if not _abort(connection):
            # A transport written for Kombu has no abort.
            errors: _ErrorTypes = (
                *self.connection_errors,
                *self.channel_errors,
                OSError,
                AttributeError,
            )
            try:
                self.transport.close_connection(connection)
            except errors as exc:
                self._debug("%s did not close well: %r", self, exc)

    def release(self) -> None:
        """Give the connection back to the pool it came from, or close it."""
        pool = self._pool
        if pool is None:
            self._close()
        else:
            pool.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        pool = self._pool
        # A body that has released its pooled connection itself has done all there is to do.
        if pool is None or self._lease is not None:
            self.release()

    # -- channels and events

    def channel(self) -> Any:
        """Open a new channel.

        Raises:
            exceptions.ConnectionClosedError: the connection was closed.
        """
        self._debug("opening a channel on %s", self)
        channel = self.transport.create_channel(self._open_connection())
        if os.environ.get("KOMBU_LOG_CHANNEL"):
            from greenkombu.utils.debug import Logwrapped

            return Logwrapped(channel, "kombu.channel", "[Kombu channel:{0.channel_id}] ")
        return channel

    @property
    def default_channel(self) -> Any:
        """The channel that everything uses which asks for none of its own.

        It is opened at first use, and opened anew when it, or the connection, has failed. How often
        connecting is tried again is up to the transport options max_retries, interval_start,
        interval_step, interval_max and connect_retries_timeout (seconds); without them each broker
        is tried once.

        Raises:
            exceptions.OperationalError: no connection.
        """
        channel = self._default_channel
        if channel is not None and self._usable() is not None and not _is_closed(channel):
            return channel
        self._ensure_connection(**self._extract_failover_opts())
        return flights.run(self, "channel", self._open_default_channel)

    def _open_default_channel(self) -> Any:
        channel = self._default_channel
        if channel is None or _is_closed(channel):
            channel = self._default_channel = self.channel()
        return channel

    def _extract_failover_opts(self) -> dict[str, Any]:
        options = self.transport_options
        found = {name: options[name] for name in _RETRY_OPTIONS if name in options}
        timeout = options.get("connect_retries_timeout")
        if timeout is not None:
            found["timeout"] = timeout
        elif "max_retries" not in found:
            found["max_retries"] = self._one_round
        return found

    def revive(self, new_channel: Any) -> None:
        """Take `new_channel` for the default channel's successor; the old one is closed."""
        old = self._default_channel
        if old is not None and old is not new_channel:
            self._default_channel = None
            self.maybe_close_channel(old)

    def maybe_close_channel(self, channel: Any) -> None:
        """Close `channel`; an error of the connection or of the channel is ignored."""
        try:
            channel.close()
        except (*self.connection_errors, *self.channel_errors) as exc:
            self._debug("a channel of %s did not close well: %r", self, exc)

    def drain_events(self, timeout: float | None = None, **kwargs: Any) -> Any:
        """Wait for one event and run its callbacks in this task.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: nothing came in time (`socket.timeout` is this class).
            Exception: one of `connection_errors`: it failed, or another task has closed it. A
                connection that has failed is not opened again here, as its consumers are gone.
        """
        connection = self._connection_to_drain()
        return self.transport.drain_events(connection, timeout=timeout, **kwargs)

    def _connection_to_drain(self) -> Any:
        """Return the connection, dead or alive; opened if there was none."""
        connection = self._connection
        if connection is None or self._closed or self._generation != generation():
            connection = self._open_connection()
        return connection

    @property
    def qos_semantics_matches_spec(self) -> bool:
        """True if a global basic_qos is shared by all channels, as AMQP 0-9-1 says."""
        return bool(self.transport.qos_semantics_matches_spec(self.connection))

    # -- heartbeats and loops

    def get_heartbeat_interval(self) -> float:
        """Return the seconds between heartbeats that the broker has agreed to; 0 means none."""
        interval: float = self.transport.get_heartbeat_interval(self.connection)
        return interval

    def heartbeat_check(self, rate: float = 2) -> None:
        """Send a heartbeat if one is due, and look whether the peer's have come.

        Nobody has to call this where `supports_heartbeats` is false: the hub does it then.

        Args:
            rate: how often this is called within one interval.

        Raises:
            Exception: one of `connection_errors`: the peer has missed two.
        """
        connection = self.connection
        if connection is not None:
            self.transport.heartbeat_check(connection, rate=rate)

    @property
    def supports_heartbeats(self) -> bool:
        """True if heartbeats are left to the program, which then calls `heartbeat_check`."""
        return bool(self.transport.supports_heartbeats)

    @property
    def is_evented(self) -> bool:
        """True if a loop of the program's own can drive the connection."""
        return bool(self.transport.supports_ev)

    requires_hub = is_evented

    def register_with_event_loop(self, loop: Any) -> None:
        """Have a loop of the program's own drive the connection; may be called again."""
        self.transport.register_with_event_loop(self.connection, loop)

    def _debug(self, message: str, *args: Any) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug(message, *args)

    # -- shortcuts

    def Pool(
        self, limit: int | None = None, preload: int | None = None, **kwargs: Any
    ) -> ConnectionPool:
        """Make a pool of connections like this one; see `ConnectionPool`."""
        from greenkombu._connection_pools import ConnectionPool

        return ConnectionPool(self, limit, preload, **kwargs)

    def ChannelPool(
        self, limit: int | None = None, preload: int | None = None, **kwargs: Any
    ) -> ChannelPool:
        """Make a pool of channels of this connection; see `ChannelPool`."""
        from greenkombu._connection_pools import ChannelPool

        return ChannelPool(self, limit, preload, **kwargs)

    def Producer(self, channel: Any = None, *args: Any, **kwargs: Any) -> Producer:
        """Make a `greenkombu.Producer` on `channel`, or on the default channel."""
        from greenkombu.messaging import Producer

        return Producer(channel or self, *args, **kwargs)

    def Consumer(
        self, queues: Any = None, channel: Any = None, *args: Any, **kwargs: Any
    ) -> Consumer:
        """Make a `greenkombu.Consumer` on `channel`, or on the default channel."""
        from greenkombu.messaging import Consumer

        return Consumer(channel or self, queues, *args, **kwargs)

    def SimpleQueue(
        self,
        name: Any,
        no_ack: bool | None = None,
        queue_opts: dict[str, Any] | None = None,
        queue_args: dict[str, Any] | None = None,
        exchange_opts: dict[str, Any] | None = None,
        channel: Any = None,
        **kwargs: Any,
    ) -> SimpleQueue:
        """Make a `greenkombu.SimpleQueue` on `channel`, or on the default channel."""
        from greenkombu.simple import SimpleQueue

        return SimpleQueue(
            channel or self, name, no_ack, queue_opts, queue_args, exchange_opts, **kwargs
        )

    def SimpleBuffer(
        self,
        name: Any,
        no_ack: bool | None = None,
        queue_opts: dict[str, Any] | None = None,
        queue_args: dict[str, Any] | None = None,
        exchange_opts: dict[str, Any] | None = None,
        channel: Any = None,
        **kwargs: Any,
    ) -> SimpleBuffer:
        """Make a `greenkombu.SimpleBuffer` on `channel`, or on the default channel."""
        from greenkombu.simple import SimpleBuffer

        return SimpleBuffer(
            channel or self, name, no_ack, queue_opts, queue_args, exchange_opts, **kwargs
        )


#: Kombu's older name; the same class.
BrokerConnection = Connection


def is_connection(obj: Any) -> TypeIs[Connection]:
    """Tell whether `obj` is a connection."""
    return isinstance(obj, Connection)


def maybe_channel(channel: Any) -> Any:
    """Return the default channel of a connection; anything else is returned as it is."""
    return channel.default_channel if is_connection(channel) else channel


def _abort(connection: Any) -> bool:
    """Abort a transport's connection; False if it does not know how to."""
    abort = getattr(connection, "abort", None)
    if abort is None:
        return False
    abort()
    return True


def _is_closed(channel: Any) -> bool:
    return bool(getattr(channel, "closed", False))


def __getattr__(name: str) -> Any:
    # The pools need this module.
    if name in ("ConnectionPool", "ChannelPool"):
        from greenkombu import _connection_pools

        return getattr(_connection_pools, name)
    if name == "Resource":
        from greenkombu.resource import Resource

        return Resource
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
