"""The Redis transport: Kombu's names, parameters and options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from greenkombu.transport._loop_bridge import LoopDriven
from greenkombu.transport.redis import connection as _connection
from greenkombu.transport.redis._errors import CHANNEL_ERRORS, CONNECTION_ERRORS
from greenkombu.transport.redis._options import PORT, Settings
from greenkombu.transport.redis._restore import Orphans
from greenkombu.transport.redis.channel import Channel
from greenkombu.transport.virtual import base as virtual
from greenkombu.utils import eventio

__all__ = ["SSLTransport", "Transport"]

logger = logging.getLogger(__name__)

# Inside `Transport` its attributes hide these names from annotations.
_Connection = _connection.Connection

#: Messages that are delivered in one turn of a loop of the program's own, at most.
TURN = 100

# Reasons for polling that the log has had.
_told: set[str] = set()


class _Readers:
    """A loop to `LoopBridge`: descriptors and what to call for them, for Kombu 2's hooks."""

    def __init__(self) -> None:
        self.callbacks: dict[int, Callable[[], object]] = {}
        self.poller: Any = None

    def add_reader(self, descriptor: int, callback: Callable[[], object]) -> None:
        self.callbacks[descriptor] = callback
        if self.poller is not None:
            self.poller.register(descriptor, eventio.READ)

    def remove_reader(self, descriptor: int) -> None:
        del self.callbacks[descriptor]
        if self.poller is not None:
            self.poller.unregister(descriptor)


class Transport(LoopDriven, virtual.Transport):
    """The Redis transport; see `Settings` and `Channel` for its options."""

    Channel = Channel
    Connection: type[_Connection] = _connection.Connection

    driver_type = "redis"
    driver_name = "redis"
    default_port = PORT
    # Nothing is polled, unless the server cannot tell; then the option of this name holds.
    polling_interval = None

    connection_errors = (*CONNECTION_ERRORS, *virtual.Transport.connection_errors)
    channel_errors = (*CHANNEL_ERRORS, *virtual.Transport.channel_errors)

    implements = virtual.Transport.implements.extend(
        asynchronous=True,
        batch_publish=True,
        exchange_type=frozenset({"direct", "topic", "fanout", "headers"}),
        confirms=True,
        persistence=True,
        priorities=True,
        returns=True,
    )

    #: TLS, unless the URL or the program says otherwise.
    tls = False

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        #: Queues that this transport has declared; a queue without messages is nothing on the
        #: server.
        self.declared: dict[str, None] = {}
        self._readers = _Readers()

    @property
    def transport_options(self) -> dict[str, Any]:
        """The options of the client, and attributes of the channel class where it has none."""
        return self.Channel.options(super().transport_options)

    # -- connections

    def establish_connection(self) -> _Connection:
        """Connect with the parameters of `client` within its connect_timeout.

        Raises:
            ServerError: the server cannot be reached, or does not let us in.
            ArgumentError: a parameter or option cannot be used.
        """
        settings = Settings.from_connection(self.client, self.tls, self.transport_options)
        connection = self.Connection(self, settings)
        try:
            connection.connect(settings.connect_timeout)
            self._declare_again(connection)
            Orphans.restore_all(connection)
        except BaseException:
            connection.abort()
            raise
        self._connections.add(connection)
        return connection

    def _declare_again(self, connection: _Connection) -> None:
        """Write the bindings that this transport has made: the server may have lost them."""
        bindings = []
        for queue, found in list(self.state.queue_index.items()):
            bindings += [
                (key.exchange, binding[0], binding[1], queue)
                for key, binding in list(found.items())
                if binding is not None
            ]
        connection.bindings.write(bindings)

    def polls_because(self, reason: str) -> None:
        """Say in the log, once for each reason, that queues are polled."""
        if reason not in _told:
            _told.add(reason)
            logger.warning(
                "the Redis server does not tell of new messages (%s): queues are polled every"
                " %s seconds; Redis 6 or newer without a proxy does not need that",
                reason,
                self.polling_interval or 1.0,
            )

    def close_connection(self, connection: Any) -> None:
        """Close a connection and its channels; unsettled deliveries are given back."""
        self.end_bridge(connection)
        super().close_connection(connection)

    # -- loops of the program's own

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Have `loop` run the events of `connection`; idempotent."""
        super().register_with_event_loop(connection, loop)
        connection.inbox.notify()

    def on_readable(self, connection: Any, loop: Any) -> None:
        """Deliver what there is, because a loop of the program's own saw something to read."""
        del loop
        more = True
        try:
            for _ in range(TURN):
                if not connection.deliver():
                    more = False  # or it has told so itself
                    return
        finally:
            if more:
                connection.inbox.notify()

    def on_poll_init(self, poller: Any) -> None:
        """Take part in a loop around a poller, as Kombu 2 did it.

        Args:
            poller: its `register(descriptor, events)` gets what is to be waited for, now and at
                each `on_poll_start`.
        """
        self._readers.poller = poller
        self.on_poll_start()

    def on_poll_start(self) -> dict[int, Callable[[int, int], object]]:
        """Return what to call for each descriptor that the loop waits for."""
        readers = self._readers
        for connection in list(self._connections):
            if connection.connected:
                self.register_with_event_loop(connection, readers)
        return dict.fromkeys(readers.callbacks, self.handle_event)

    def handle_event(self, fileno: int, event: int) -> None:
        """Deliver what there is.

        Args:
            fileno: a descriptor of `on_poll_start` that has become readable.
            event: what the poller said of it.
        """
        del event
        callback = self._readers.callbacks.get(fileno)
        if callback is not None:
            callback()

    # -- what it is

    def driver_version(self) -> str:
        """Return the version of redis-py."""
        import redis

        return str(redis.__version__)


class SSLTransport(Transport):
    """The same over TLS: ``rediss://``."""

    tls = True
