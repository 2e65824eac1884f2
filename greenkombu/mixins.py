"""Mixins for programs that consume for ever and survive the loss of their connection."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from greenkombu._retry import Intervals, bounded_wait
from greenkombu.exceptions import OperationalError
from greenkombu.log import LogMixin
from greenkombu.messaging import Consumer, Producer
from greenkombu.utils.limits import TokenBucket
from greenkombu.utils.objects import cached_property
from hub.environment import get_environment

if TYPE_CHECKING:
    from greenkombu.connection import Connection

__all__ = ["ConsumerMixin", "ConsumerProducerMixin"]

# Many workers lose the same broker at the same moment. Each waits up to so much longer than its
# turn, so that they do not come back at the same moment as well.
JITTER = 0.25

# Seconds before the second attempt to connect, what each further wait is longer by, and the most;
# Kombu's, before the jitter.
CONNECT_INTERVAL_START = 2.0
CONNECT_INTERVAL_STEP = 2.0
CONNECT_INTERVAL_MAX = 30.0


def _jittered(seconds: float) -> float:
    return seconds * (1.0 + JITTER * random.random())


def _intervals() -> tuple[float, float, float]:
    return (
        _jittered(CONNECT_INTERVAL_START),
        _jittered(CONNECT_INTERVAL_STEP),
        _jittered(CONNECT_INTERVAL_MAX),
    )


def _described(error: BaseException) -> str:
    # Not its repr: amqp's errors show four arguments there, of which one is a text.
    return f"{type(error).__name__}: {error}"


class ConsumerMixin(LogMixin):
    """Consume until told to stop, on a connection that is established again when it is lost.

    A class needs an attribute `connection` (a Connection, which is cloned and not itself used)
    and `get_consumers`::

        class Worker(ConsumerMixin):
            def __init__(self, connection):
                self.connection = connection

            def get_consumers(self, Consumer, channel):
                return [Consumer(queues, callbacks=[self.on_task])]

    `run` may be called in the main thread, in a thread of its own, or in a green thread.
    """

    #: How often to try to connect before the error is raised; None tries for ever.
    connect_max_retries: int | None = None

    #: Set to True, from anywhere, to end `run` and `consume` within `safety_interval`.
    should_stop: bool = False

    connection: Connection

    # The error of the last try to connect that `connect_max_retries` allows, on its way to `run`.
    _gave_up: BaseException | None = None

    # -- to be written by the user, or overridden

    def get_consumers(self, Consumer: Callable[..., Consumer], channel: Any) -> Sequence[Consumer]:
        """Return the consumers.

        Args:
            Consumer: `greenkombu.Consumer` with *channel* and `on_decode_error` filled in.
            channel: the default channel; `channel.connection.client.channel()` opens another.
        """
        raise NotImplementedError(f"{type(self).__name__} must define get_consumers()")

    def on_connection_revived(self) -> None:
        """Called whenever the connection is established."""

    def on_consume_ready(
        self, connection: Connection, channel: Any, consumers: Sequence[Consumer], **kwargs: Any
    ) -> None:
        """Called when messages may come; *kwargs* are those of `consume` or `run`."""

    def on_consume_end(self, connection: Connection, channel: Any) -> None:
        """Called after the consumers were cancelled."""

    def on_iteration(self) -> None:
        """Called before each wait for an event."""

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Called for a message that cannot be decoded; logs, and acknowledges it.

        Override to keep such messages: whoever does must settle them.
        """
        self.error(
            "Can't decode message body: %r (type:%r encoding:%r raw:%r')",
            exc,
            getattr(message, "content_type", None),
            getattr(message, "content_encoding", None),
            _excerpt(getattr(message, "body", message)),
        )
        ack = getattr(message, "ack", None)
        if ack is not None:
            ack()

    def on_connection_error(self, exc: BaseException, interval: float) -> None:
        """Called when connecting failed or was refused; *interval*: seconds to the next try."""
        self.warn(
            "Broker connection error, trying again in %.1f seconds: %s", interval, _described(exc)
        )

    @contextmanager
    def extra_context(self, connection: Connection, channel: Any) -> Iterator[None]:  # noqa: ARG002
        """Entered when the consumers are set up, left before they are cancelled."""
        yield

    # -- running

    def run(self, _tokens: int = 1, **kwargs: Any) -> None:
        """Consume until `should_stop`, and start over after a connection or channel error.

        Args:
            **kwargs: for `consume` (timeout, safety_interval) and `on_consume_ready`.

        Raises:
            OperationalError: `connect_max_retries` tries to connect have failed; or, if the broker
                was there and refused them, its refusal.
            TimeoutError: a *timeout* was given and nothing came.
        """
        restart_limit = self.restart_limit
        errors = (*self.connection_errors, *self.channel_errors)
        while not self.should_stop:
            try:
                if restart_limit.can_consume(_tokens):
                    for _ in self.consume(limit=None, **kwargs):
                        pass
                else:
                    pause = restart_limit.expected_time(_tokens)
                    get_environment().sleep(_jittered(pause))
            except errors as exc:
                # Connection errors as well; but these are the bounds that the caller has set.
                gave_up, self._gave_up = self._gave_up, None
                if exc is gave_up or (isinstance(exc, TimeoutError) and kwargs.get("timeout")):
                    raise
                if not self.should_stop:
                    # One line: it may come once a second, and the error says what to do.
                    self.warn(
                        "Connection to broker lost, trying to re-establish connection: %s",
                        _described(exc),
                    )
                self.debug("what ended the connection", exc_info=True)

    @contextmanager
    def consumer_context(self, **kwargs: Any) -> Iterator[tuple[Connection, Any, list[Consumer]]]:
        """Set up everything that `consume` needs; gives (connection, channel, consumers)."""
        with (
            self.Consumer() as (connection, channel, consumers),
            self.extra_context(connection, channel),
        ):
            self.on_consume_ready(connection, channel, consumers, **kwargs)
            yield connection, channel, consumers

    def consume(
        self,
        limit: int | None = None,
        timeout: float | None = None,
        safety_interval: float = 1,
        **kwargs: Any,
    ) -> Iterator[None]:
        """Consume; yield after each event.

        Args:
            limit: end after so many events; None does not.
            timeout: seconds without an event after which it ends with TimeoutError.
            safety_interval: seconds between two looks at `should_stop`.
            **kwargs: for `on_consume_ready`.

        Raises:
            TimeoutError: nothing came for *timeout* seconds.
            A connection or channel error of the transport.
        """
        with self.consumer_context(**kwargs) as (connection, _, _):
            quiet_since = time.monotonic()
            left = limit or None
            while left is None or left > 0:
                if self.should_stop:
                    break
                self.on_iteration()
                wait = safety_interval
                if timeout:
                    wait = min(wait, max(quiet_since + timeout - time.monotonic(), 0.0))
                try:
                    connection.drain_events(timeout=wait)
                except TimeoutError:
                    connection.heartbeat_check()
                    if timeout and time.monotonic() - quiet_since >= timeout:
                        raise
                except OSError:
                    # Whoever asks to stop may close the connection to be heard at once.
                    if not self.should_stop:
                        raise
                else:
                    if left is not None:
                        left -= 1
                    yield
                    quiet_since = time.monotonic()
        self.debug("consume exiting")

    def maybe_conn_error(self, fun: Callable[[], Any]) -> Any:
        """Call *fun*; return None on a connection or channel error."""
        try:
            return fun()
        except (*self.connection_errors, *self.channel_errors):
            self.debug("ignored a broken connection", exc_info=True)
            return None

    def create_connection(self) -> Connection:
        """Return a new connection, not connected yet."""
        return self.connection.clone()

    @contextmanager
    def establish_connection(self) -> Iterator[Connection]:
        """Connect, trying again as `connect_max_retries` says; released at the end."""
        with self.create_connection() as connection:
            self._connect_or_wait(connection)
            yield connection

    def _connect_or_wait(self, connection: Connection) -> None:
        """Connect, and try again as well when the broker refuses us."""
        waits = Intervals(*_intervals())
        refusals = 0
        while True:
            try:
                self._connect(connection)
                return
            except OperationalError:
                raise
            except self.connection_errors as exc:
                # It is there and does not let us in: no retry of ours mends that, but its operator
                # may, and a consumer is to be there then.
                most = self.connect_max_retries
                if most is not None and refusals >= most:
                    self._gave_up = exc
                    raise
                wait = bounded_wait(next(waits))
                if wait is None or self.should_stop:
                    raise
                self.on_connection_error(exc, wait)
            refusals += 1
            self._pause(wait)

    def _connect(self, connection: Connection) -> None:
        start, step, most = _intervals()
        try:
            connection.ensure_connection(
                self.on_connection_error,
                self.connect_max_retries,
                interval_start=start,
                interval_step=step,
                interval_max=most,
            )
        except OperationalError as exc:
            if self.connect_max_retries is not None:
                self._gave_up = exc
            raise

    def _pause(self, seconds: float) -> None:
        """Wait, but not much longer than until `should_stop`."""
        until = time.monotonic() + seconds
        sleep = get_environment().sleep
        while not self.should_stop and (left := until - time.monotonic()) > 0:
            sleep(min(left, 1.0))

    @contextmanager
    def Consumer(self) -> Iterator[tuple[Connection, Any, list[Consumer]]]:
        """Connect and start the consumers; gives (connection, channel, consumers)."""
        with self.establish_connection() as connection:
            self.on_connection_revived()
            self.info("Connected to %s", connection.as_uri())
            channel = connection.default_channel
            make = partial(Consumer, channel, on_decode_error=self.on_decode_error)
            with self._consume_from(*self.get_consumers(make, channel)) as consumers:
                yield connection, channel, consumers
            self.debug("Consumers canceled")
            self.on_consume_end(connection, channel)
        self.debug("Connection closed")

    @contextmanager
    def _consume_from(self, *consumers: Any) -> Iterator[list[Any]]:
        with ExitStack() as stack:
            yield [stack.enter_context(consumer) for consumer in consumers]

    @cached_property
    def restart_limit(self) -> TokenBucket:
        """Bounds how often `run` starts over: once a second."""
        return TokenBucket(1)

    @cached_property
    def connection_errors(self) -> tuple[type[BaseException], ...]:
        """What a lost connection raises."""
        return self.connection.connection_errors

    @cached_property
    def channel_errors(self) -> tuple[type[BaseException], ...]:
        """What a closed channel raises."""
        return self.connection.channel_errors


class ConsumerProducerMixin(ConsumerMixin):
    """A `ConsumerMixin` with a producer on a connection of its own.

    Publishing on the connection that consumes works as well; a second one is not held up by
    the broker's back-pressure on publishers, and holds up no deliveries.
    """

    _producer_connection: Connection | None = None
    _producer: Producer | None = None

    def on_consume_end(self, connection: Connection, channel: Any) -> None:  # noqa: ARG002
        """Close the producer's connection; it is opened again when needed."""
        self.__dict__.pop("_producer", None)
        opened = self.__dict__.pop("_producer_connection", None)
        if opened is not None:
            opened.close()

    @property
    def producer(self) -> Producer:
        """A producer on `producer_connection`."""
        connection = self.producer_connection
        producer = self._producer
        if producer is None or producer.connection is not connection:
            producer = self._producer = Producer(connection)
        return producer

    @property
    def producer_connection(self) -> Connection:
        """The connection for publishing; established when first asked for."""
        connection = self._producer_connection
        if connection is None:
            # Several tasks may ask at once: the first clone that is stored is everybody's, and a
            # clone that was not connected needs no closing.
            connection = self.__dict__.setdefault("_producer_connection", self.connection.clone())
            self._connect(connection)
        return connection


def _excerpt(body: Any, limit: int = 1024) -> Any:
    """Return the beginning of a body, for the log."""
    if isinstance(body, (bytes, str)) and len(body) > limit:
        return body[:limit]
    return body
