"""Receiving: `Consumer`, which programs import from `greenkombu.messaging`.

It runs in the task that drains: `Consumer._receive_callback` is what the channel calls with each
delivery.  A message that cannot be decoded or is refused goes to `on_decode_error`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu import _arguments
from greenkombu._arguments import message_count
from greenkombu._flight import flights
from greenkombu.entity import Queue
from greenkombu.exceptions import ArgumentError, ContentDisallowed
from greenkombu.serialization import prepare_accept_content

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from greenkombu.connection import Connection

__all__ = ["Consumer"]

logger = logging.getLogger(__name__)

# The work of one queue, bound to its channel, that tasks share (`greenkombu._flight`).
_START = "start of a consumer"


class Consumer:
    """Receives messages from one or several queues.

    Args:
        channel: a channel, or a Connection for its default channel.  None: `revive` it later.
        queues: a Queue or several.
        no_ack: messages need no acknowledgement, whatever the queues say; None leaves it to them.
        auto_declare: declare queues, exchanges and bindings here and in `add_queue`.
        callbacks: called in order as (body, message) for each message.
        on_decode_error: called as (message, exception) for a message that cannot be decoded,
            decompressed or is not accepted.
        on_message: called as (message) instead of decoding and *callbacks*.
        accept: content types or serializer names that may be decoded; None: those that the
            registry allows.
        prefetch_count: unacknowledged messages that may be under way at once; None leaves it.
        tag_prefix: beginning of the consumer tags.

    Without `on_decode_error` such an error leaves `drain_events`; the message is then neither
    acknowledged nor lost: the broker delivers it again after this channel is closed.
    """

    ContentDisallowed: ClassVar[type[Exception]] = ContentDisallowed

    channel: Any = None
    no_ack: bool | None = None
    auto_declare: bool = True
    callbacks: list[Callable[[Any, Any], Any]] | None = None
    on_message: Callable[[Any], Any] | None = None
    on_decode_error: Callable[[Any, Exception], Any] | None = None
    accept: Any = None
    prefetch_count: int | None = None

    # One counter for the process: tags are unique on every channel.
    _tags = itertools.count(1)

    def __init__(
        self,
        channel: Any,
        queues: Queue | Iterable[Queue] | None = None,
        no_ack: bool | None = None,
        auto_declare: bool | None = None,
        callbacks: Iterable[Callable[[Any, Any], Any]] | None = None,
        on_decode_error: Callable[[Any, Exception], Any] | None = None,
        on_message: Callable[[Any], Any] | None = None,
        accept: Iterable[str] | None = None,
        prefetch_count: int | None = None,
        tag_prefix: str | None = None,
    ) -> None:
        self.channel = channel
        # By name; a queue that the broker has not named yet is under its own identity.
        self._queues: dict[object, Queue] = {}
        for queue in _as_queues(queues):
            self._queues[queue.name or id(queue)] = queue
        # Queue name -> (consumer tag, no_ack).
        self._active: dict[str, tuple[str, bool | None]] = {}
        self.no_ack = self.no_ack if no_ack is None else no_ack
        if callbacks is not None:
            self.callbacks = _arguments.callbacks("callbacks", callbacks)
        elif self.callbacks is None:
            self.callbacks = []
        if auto_declare is not None:
            self.auto_declare = auto_declare
        if on_message is not None:
            self.on_message = on_message
        if on_decode_error is not None:
            self.on_decode_error = on_decode_error
        self.accept = prepare_accept_content(self.accept if accept is None else accept)
        if prefetch_count is not None:
            # Before anything is declared.
            self.prefetch_count = message_count("prefetch_count", prefetch_count)
        self.tag_prefix = tag_prefix
        if self.channel is not None:
            self.revive(self.channel)

    @property
    def queues(self) -> list[Queue]:
        """The queues to consume from, in order."""
        return list(self._queues.values())

    @property
    def _active_tags(self) -> dict[str, str]:
        return {name: tag for name, (tag, _) in self._active.items()}

    @property
    def connection(self) -> Connection | None:
        """The Connection that it consumes on, if it is known."""
        return getattr(getattr(self.channel, "connection", None), "client", None)

    def revive(self, channel: Any) -> None:
        """Move to another channel: bind, declare, set the prefetch, and go on consuming.

        Consumers of the old channel are forgotten, not cancelled.
        """
        # Not `from ... import`, which asks a module with a __getattr__ for its __path__ first.
        import greenkombu.connection as connections

        active, self._active = self._active, {}
        channel = self.channel = connections.maybe_channel(channel)
        bound = [queue._copy_bound_to(channel) for queue in self._queues.values()]
        self._queues = {queue.name or id(queue): queue for queue in bound}
        if self.auto_declare:
            self.declare()
        if self.prefetch_count is not None:
            self.qos(prefetch_count=self.prefetch_count)
        if active:
            self._consume_queues({name: no_ack for name, (_, no_ack) in active.items()})

    def declare(self) -> None:
        """Declare queues, exchanges and bindings."""
        declared: dict[object, Queue] = {}
        for queue in self._queues.values():
            queue.declare()
            declared[queue.name or id(queue)] = queue
        self._queues = declared

    def register_callback(self, callback: Callable[[Any, Any], Any]) -> None:
        """Append a callback; it is called as (body, message)."""
        if self.callbacks is None:
            self.callbacks = []
        self.callbacks += _arguments.callbacks("callback", [callback])

    def __enter__(self) -> Self:
        self.consume()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        channel = self.channel
        connection = self.connection
        gone = getattr(connection, "connection_errors", ())
        if channel is None or channel.closed is True or isinstance(exc_val, gone):
            # Nothing to say to a broker that does not listen; its side is gone with the channel.
            self._active.clear()
            return
        try:
            self.cancel()
        except Exception as exc:
            # The end of the block must not hide the error that ended it, and a connection
            # that fails now fails again at the next use.
            logger.warning("cannot cancel %r: %r", self, exc, exc_info=exc_val is None)

    # -- consuming

    def add_queue(self, queue: Queue) -> Queue:
        """Add a queue; call `consume` to start receiving from it.

        Returns:
            The bound copy.
        """
        if self.channel is not None:
            queue = queue.bind(self.channel)
            if self.auto_declare:
                queue.declare()
        self._queues[queue.name or id(queue)] = queue
        return queue

    def consume(self, no_ack: bool | None = None) -> None:
        """Start receiving from every queue that is not consumed from yet.

        Args:
            no_ack: None takes the consumer's setting, then the queue's.

        May be called again, after `add_queue` for example, or when the broker has cancelled some.
        What another task is just starting is waited for: its error is this task's as well, and if
        it is killed this task takes over.
        """
        no_ack = self.no_ack if no_ack is None else no_ack
        self._consume_queues(
            {
                queue.name: no_ack
                for queue in self._queues.values()
                if self._consuming(queue) is None
            }
        )

    def _consuming(self, queue: Queue) -> tuple[str, bool | None] | None:
        """Return the entry of a queue whose consumer has started; None if it is being started."""
        active = self._active.get(queue.name)
        if active is None or flights.running(queue, _START):
            return None
        if self._cancelled(active[0]):
            self._active.pop(queue.name, None)
            return None
        # With native threads, its start may have failed between the two looks.
        return active if self._active.get(queue.name) is active else None

    def _cancelled(self, tag: str) -> bool:
        """Whether the broker has stopped a consumer, and that was told: its queue was deleted."""
        # Other transports than AMQP's end no consumer but on request.
        has_consumer = getattr(self.channel, "has_consumer", None)
        return has_consumer is not None and not self.channel.closed and not has_consumer(tag)

    def _consume_queues(self, wanted: Mapping[str, bool | None]) -> None:
        queues = [queue for queue in self._queues.values() if queue.name in wanted]
        for index, queue in enumerate(queues, 1):
            # The broker answers in order: the last answer says that all are done.
            self._basic_consume(queue, no_ack=wanted[queue.name], nowait=index < len(queues))

    def _basic_consume(
        self,
        queue: Queue,
        consumer_tag: str | None = None,
        no_ack: bool | None = None,
        nowait: bool = True,
    ) -> str:
        while (active := self._consuming(queue)) is None:
            mine: list[str] = []

            def start(mine: list[str] = mine) -> str:
                mine.append(self._start(queue, consumer_tag, no_ack, nowait))
                return mine[0]

            flights.run(queue, _START, start)
            if mine:
                return mine[0]
            # Another task's. If it was cancelled meanwhile, this one still wants its own.
        return active[0]

    def _start(
        self, queue: Queue, consumer_tag: str | None, no_ack: bool | None, nowait: bool
    ) -> str:
        """Start a consumer; run by one task at a time."""
        active = self._active.get(queue.name)
        if active is not None:
            return active[0]
        tag = consumer_tag or f"{self.tag_prefix or 'ctag'}{next(self._tags)}"
        # Known before it is sent, so that a delivery that overtakes the answer finds it.
        active = self._active[queue.name] = (tag, no_ack)
        try:
            queue.consume(tag, self._receive_callback, no_ack=no_ack, nowait=nowait)
        except BaseException:
            # `revive` may have gone on without it.
            if self._active.get(queue.name) is active:
                del self._active[queue.name]
            raise
        return tag

    def consuming_from(self, queue: Queue | str) -> bool:
        """Whether messages are received from *queue* (or its name) now."""
        active = self._active.get(_queue_name(queue))
        return active is not None and not self._cancelled(active[0])

    def cancel(self) -> None:
        """Stop receiving; messages already delivered stay with the consumer."""
        while self._active:
            _, (tag, _) = self._active.popitem()
            self.channel.basic_cancel(tag)

    def close(self) -> None:
        """Same as `cancel`; the channel belongs to its connection."""
        self.cancel()

    def cancel_by_queue(self, queue: Queue | str) -> None:
        """Stop receiving from *queue* (or its name) and drop it; unknown ones are ignored."""
        name = _queue_name(queue)
        active = self._active.pop(name, None)
        self._queues.pop(name, None)
        if active is not None:
            self.channel.basic_cancel(active[0])

    def purge(self) -> int:
        """Delete the ready messages of all queues; there is no undo.

        Returns:
            How many were deleted.
        """
        return sum(queue.purge() for queue in self._queues.values())

    def flow(self, active: bool) -> None:
        """Ask the broker to pause (False) or resume deliveries on this channel.

        Raises:
            An error of the transport that cannot: RabbitMQ does not implement it, and virtual
            transports raise NotImplementedError.
        """
        self.channel.flow(active)

    def qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> Any:
        """Bound the messages that are delivered and not acknowledged yet.

        Args:
            prefetch_size: in octets; 0 is no bound (RabbitMQ has no other).
            prefetch_count: in messages; 0 is no bound.
            apply_global: for the whole channel rather than each consumer; no consumer of a quorum
                queue or stream can be started then (`UnsupportedOperation`).

        Consumers with `no_ack` are not bounded.

        Raises:
            ArgumentError: not a number, or less than 0; the bound stays as it was.
        """
        prefetch_size = message_count("prefetch_size", prefetch_size)
        prefetch_count = message_count("prefetch_count", prefetch_count)
        return self.channel.basic_qos(prefetch_size, prefetch_count, apply_global)

    def recover(self, requeue: bool = False) -> Any:
        """Have all unacknowledged messages of the channel delivered again.

        Args:
            requeue: to any consumer, rather than to the one that had them. RabbitMQ has nothing
                else.

        Raises:
            UnsupportedOperation: False, on RabbitMQ, which would end the connection.
        """
        return self.channel.basic_recover(requeue=requeue)

    # -- receiving

    def receive(self, body: Any, message: Any) -> None:
        """Pass one decoded message to the callbacks, in order.

        Raises:
            NotImplementedError: there are none.
        """
        callbacks = self.callbacks
        if not callbacks:
            raise NotImplementedError(
                f"{self!r} does not have any callbacks: register one, or set on_message"
            )
        for callback in callbacks:
            callback(body, message)

    def _receive_callback(self, message: Any) -> Any:
        on_message = self.on_message
        body = None
        try:
            to_python = getattr(self.channel, "message_to_python", None)
            if to_python is not None:
                message = to_python(message)
            if self.accept is not None:
                message.accept = self.accept
            if message.errors:
                message._reraise_error()
            if on_message is None:
                body = message.decode()
        except Exception as exc:
            if self.on_decode_error is None:
                raise
            return self.on_decode_error(message, exc)
        return self.receive(body, message) if on_message is None else on_message(message)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.queues}>"


def _as_queues(queues: Queue | Iterable[Queue] | None) -> Iterable[Queue]:
    if queues is None:
        return ()
    # A text is iterable as well, and nothing but a mistake.
    several: Any = queues
    if isinstance(queues, (Queue, str)) or not isinstance(queues, Iterable):
        several = (queues,)
    given = tuple(several)
    for each in given:
        if not isinstance(each, Queue):
            raise ArgumentError(f"a consumer takes Queue objects, not {each!r:.100}")
    return given


def _queue_name(queue: Queue | str) -> str:
    return queue.name if isinstance(queue, Queue) else queue
