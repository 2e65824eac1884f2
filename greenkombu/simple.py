"""Queues for simple needs: the interface of the standard library's `queue.Queue`.

`SimpleQueue` keeps its messages (durable, persistent, acknowledged); `SimpleBuffer` does not
(transient, for this connection, gone with it, no acknowledgements).
"""

from __future__ import annotations

# Where queue.Empty comes from; `queue` itself imports threading, before a program may have patched.
from _queue import Empty
from collections import deque
from collections.abc import Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu import entity, messaging

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["SimpleBase", "SimpleBuffer", "SimpleQueue"]


class SimpleBase:
    """A queue over a producer and a consumer on one channel."""

    Empty: ClassVar[type[Exception]] = Empty

    _consuming: bool = False
    # Whether the channel was opened for this queue, and closes with it.
    _owns_channel: bool = False

    def __init__(self, channel: Any, producer: Any, consumer: Any, no_ack: bool = False) -> None:
        from greenkombu.connection import maybe_channel

        self.channel = maybe_channel(channel)
        self.producer = producer
        self.consumer = consumer
        self.no_ack = no_ack
        self.queue = self.consumer.queues[0]
        #: Messages received and not asked for yet.
        self.buffer: deque[Any] = deque()
        self.consumer.register_callback(self._receive)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take a message.

        Args:
            block: wait for one.
            timeout: seconds to wait at most; None waits for ever.

        Returns:
            The message; with acknowledgements, call its `ack` when it is processed.

        Raises:
            queue.Empty: there is none, or none came in time.
        """
        if not block:
            return self.get_nowait()
        self._consume()
        until = None if timeout is None else monotonic() + timeout
        while not self.buffer:
            self._drain(None if until is None else until - monotonic())
        return self.buffer.popleft()

    def get_nowait(self) -> Any:
        """Take a message that is there already.

        Raises:
            queue.Empty: there is none.
        """
        # Once `get` consumes, the broker sends messages here instead of keeping them in the queue.
        while self._consuming and not self.buffer:
            try:
                self._drain(0)
            except self.Empty:
                break
        if self.buffer:
            return self.buffer.popleft()
        message = self.queue.get(no_ack=self.no_ack, accept=self.consumer.accept)
        if message is None:
            raise self.Empty
        return message

    def _drain(self, timeout: float | None) -> None:
        if timeout is not None and timeout < 0:
            raise self.Empty
        try:
            self.channel.connection.client.drain_events(timeout=timeout)
        except TimeoutError:
            if not self.buffer:
                raise self.Empty from None

    def put(
        self,
        message: Any,
        serializer: str | None = None,
        headers: Mapping[str, Any] | None = None,
        compression: str | None = None,
        routing_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish *message* to the queue.

        Args:
            serializer, compression: names; None takes the queue's.
            routing_key: None takes the queue's.
            **kwargs: more arguments of `Producer.publish`.
        """
        self.producer.publish(
            message,
            serializer=serializer,
            routing_key=routing_key,
            headers=headers,
            compression=compression,
            **kwargs,
        )

    def clear(self) -> int:
        """Delete all messages that are ready; return how many."""
        count: int = self.consumer.purge()
        return count

    def qsize(self) -> int:
        """Return how many messages are ready on the broker."""
        _, size, _ = self.queue.queue_declare(passive=True)
        return int(size)

    def close(self) -> None:
        """Stop consuming; close the channel if it was opened for this queue.

        Messages taken and not acknowledged go back to the queue with the channel.
        """
        self.consumer.cancel()
        self._consuming = False
        if self._owns_channel:
            self.channel.close()

    def _receive(self, body: Any, message: Any) -> None:  # noqa: ARG002
        self.buffer.append(message)

    def _consume(self) -> None:
        if not self._consuming:
            self.consumer.consume(no_ack=self.no_ack)
            self._consuming = True

    def __len__(self) -> int:
        """Same as `qsize`."""
        return self.qsize()

    def __bool__(self) -> bool:
        """A queue is true even when it is empty."""
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.queue.name} ({len(self.buffer)} buffered)>"


class SimpleQueue(SimpleBase):
    """A persistent queue.

    Args:
        channel: a channel; or a Connection, and then a new channel of it is used, which `close`
            closes.
        name: of the queue, its exchange and its routing key; or a Queue.
        no_ack: messages need no acknowledgement; None takes the class's setting.
        queue_opts, exchange_opts: more arguments of `Queue` and `Exchange`.
        queue_args: `queue_arguments` of the Queue.
        serializer, compression: names, as for `Producer`.
        accept: as for `Consumer`.
    """

    no_ack: bool = False
    queue_opts: dict[str, Any] = {}  # noqa: RUF012  each instance has its own
    queue_args: dict[str, Any] = {}  # noqa: RUF012
    exchange_opts: dict[str, Any] = {"type": "direct"}  # noqa: RUF012

    def __init__(
        self,
        channel: Any,
        name: str | entity.Queue,
        no_ack: bool | None = None,
        queue_opts: Mapping[str, Any] | None = None,
        queue_args: Mapping[str, Any] | None = None,
        exchange_opts: Mapping[str, Any] | None = None,
        serializer: str | None = None,
        compression: str | None = None,
        accept: Iterable[str] | None = None,
    ) -> None:
        from greenkombu.connection import is_connection

        self.queue_opts = {**self.queue_opts, **(queue_opts or {})}
        self.queue_args = {**self.queue_args, **(queue_args or {})}
        self.exchange_opts = {**self.exchange_opts, **(exchange_opts or {})}
        if is_connection(channel):
            channel = channel.channel()
            self._owns_channel = True
        try:
            if isinstance(name, entity.Queue):
                queue = name
            else:
                exchange = entity.Exchange(name, **self.exchange_opts)
                options = {"queue_arguments": self.queue_args, **self.queue_opts}
                queue = entity.Queue(name, exchange, name, **options)
            consumer = messaging.Consumer(channel, queue, accept=accept)
            bound = consumer.queues[0]
            named = bound.exchange is not None and bound.exchange.name
            producer = messaging.Producer(
                channel,
                bound.exchange if named else None,
                # The default exchange routes by the name of the queue.
                routing_key=bound.routing_key if named else bound.name,
                serializer=serializer,
                compression=compression,
            )
            super().__init__(channel, producer, consumer, self.no_ack if no_ack is None else no_ack)
        except BaseException:
            if self._owns_channel:
                channel.close()
            raise


class SimpleBuffer(SimpleQueue):
    """A queue whose messages are transient, and which ends with its connection."""

    no_ack: bool = True
    queue_opts: dict[str, Any] = {"durable": False, "auto_delete": True, "exclusive": True}  # noqa: RUF012
    exchange_opts: dict[str, Any] = {  # noqa: RUF012
        "durable": False,
        "delivery_mode": "transient",
        "auto_delete": True,
    }
