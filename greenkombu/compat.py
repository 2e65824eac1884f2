"""The interface of carrot, Kombu's predecessor: `Publisher`, `Consumer`, `ConsumerSet`.

Their settings are class attributes that a subclass may override.  New programs use
`greenkombu.Producer` and `greenkombu.Consumer`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from greenkombu import messaging
from greenkombu.common import entry_to_queue
from greenkombu.entity import Exchange, Queue

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from greenkombu.connection import Connection

__all__ = ["Consumer", "ConsumerSet", "Publisher", "entry_to_queue"]


def _iterconsume(
    connection: Connection, consumer: Any, no_ack: bool | None = False, limit: int | None = None
) -> Iterator[Any]:
    consumer.consume(no_ack=no_ack)
    for _ in range(limit) if limit is not None else itertools.count():
        yield connection.drain_events()


class Publisher(messaging.Producer):
    """A producer that describes its exchange by attributes.

    Args:
        connection: a Connection; its default channel is used.
        exchange, exchange_type, durable, auto_delete: of the exchange; None takes the class's.
        routing_key: default routing key; None takes the class's.
        channel: use this channel instead.
        **kwargs: as for `Producer`.
    """

    exchange: Any = ""
    exchange_type: str = "direct"
    routing_key: str = ""
    durable: bool = True
    auto_delete: bool = False

    def __init__(
        self,
        connection: Any,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        exchange_type: str | None = None,
        durable: bool | None = None,
        auto_delete: bool | None = None,
        channel: Any = None,
        **kwargs: Any,
    ) -> None:
        self.exchange_type = exchange_type or self.exchange_type
        self.durable = self.durable if durable is None else durable
        self.auto_delete = self.auto_delete if auto_delete is None else auto_delete
        exchange = exchange or self.exchange
        if not isinstance(exchange, Exchange):
            exchange = Exchange(
                exchange,
                type=self.exchange_type,
                durable=self.durable,
                auto_delete=self.auto_delete,
            )
        super().__init__(
            connection if channel is None else channel,
            exchange,
            routing_key=routing_key,
            **kwargs,
        )

    def __reduce_args__(self) -> tuple[Any, ...]:
        return (self.__connection__, self.exchange, self.routing_key)

    def send(self, *args: Any, **kwargs: Any) -> Any:
        """Same as `publish`."""
        return self.publish(*args, **kwargs)

    @property
    def backend(self) -> Any:
        """The channel."""
        return self.channel


class Consumer(messaging.Consumer):
    """A consumer of one queue, described by attributes, on a channel of its own.

    Args:
        connection: a Connection; a new channel of it is opened, which `close` closes.
        queue, exchange, routing_key, exchange_type, durable, exclusive, auto_delete: None takes
            the class's.
        **kwargs: as for `greenkombu.Consumer`.
    """

    queue: str = ""
    exchange: str = ""
    routing_key: str = ""
    exchange_type: str = "direct"
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False

    _closed: bool = False

    def __init__(
        self,
        connection: Any,
        queue: str | None = None,
        exchange: str | None = None,
        routing_key: str | None = None,
        exchange_type: str | None = None,
        durable: bool | None = None,
        exclusive: bool | None = None,
        auto_delete: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.queue = queue or self.queue
        self.exchange = exchange or self.exchange
        self.routing_key = routing_key or self.routing_key
        self.exchange_type = exchange_type or self.exchange_type
        self.durable = self.durable if durable is None else durable
        self.exclusive = self.exclusive if exclusive is None else exclusive
        self.auto_delete = self.auto_delete if auto_delete is None else auto_delete
        declared = Queue(
            self.queue,
            exchange=Exchange(
                self.exchange,
                type=self.exchange_type,
                durable=self.durable,
                auto_delete=self.auto_delete,
            ),
            routing_key=self.routing_key,
            durable=self.durable,
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
        )
        self.backend = connection.channel()
        super().__init__(self.backend, [declared], **kwargs)

    def revive(self, channel: Any) -> None:
        """Move to another channel."""
        self.backend = channel
        super().revive(channel)

    def close(self) -> None:
        """Cancel, and close the channel."""
        self.cancel()
        self.backend.close()
        self._closed = True

    def __enter__(self) -> Self:
        # Unlike messaging's: what it would be given behind the back of `fetch` would be missing.
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        return self.iterqueue(infinite=True)

    def fetch(self, no_ack: bool | None = None, enable_callbacks: bool = False) -> Any:
        """Take one message without waiting.

        Args:
            no_ack: None takes the consumer's setting.
            enable_callbacks: pass it to the callbacks as well.

        Returns:
            The message, or None.
        """
        message = self.queues[0].get(self.no_ack if no_ack is None else no_ack)
        if message is not None and enable_callbacks:
            self.receive(message.payload, message)
        return message

    def process_next(self) -> Any:
        """Not available; use ``fetch(enable_callbacks=True)``."""
        raise NotImplementedError("Use fetch(enable_callbacks=True)")

    def discard_all(self, filterfunc: Callable[[Any], bool] | None = None) -> int:
        """Delete the ready messages; return how many.

        Raises:
            NotImplementedError: *filterfunc* is given.
        """
        if filterfunc is not None:
            raise NotImplementedError("discard_all does not implement filters")
        return self.purge()

    def iterconsume(self, limit: int | None = None, no_ack: bool | None = None) -> Iterator[Any]:
        """Consume; yield after each event, *limit* times or for ever."""
        return _iterconsume(self.connection, self, no_ack, limit)  # type: ignore[arg-type]

    def wait(self, limit: int | None = None) -> list[Any]:
        """Consume until *limit* events have come."""
        return list(self.iterconsume(limit))

    def iterqueue(self, limit: int | None = None, infinite: bool = False) -> Iterator[Any]:
        """Yield the messages in the queue.

        Args:
            limit: end after so many.
            infinite: yield None when the queue is empty, rather than end.
        """
        for _ in range(limit) if limit is not None else itertools.count():
            message = self.fetch()
            if message is None and not infinite:
                return
            yield message


class ConsumerSet(messaging.Consumer):
    """A consumer of several queues.

    Args:
        connection: a Connection.
        from_dict: queue name -> options of `entry_to_queue`.
        consumers: `Consumer` objects whose queues are taken over.
        channel: use this channel; None opens a new one, which `close` closes.
        **kwargs: as for `greenkombu.Consumer`.
    """

    def __init__(
        self,
        connection: Any,
        from_dict: Mapping[str, Mapping[str, Any]] | None = None,
        consumers: Iterable[messaging.Consumer] | None = None,
        channel: Any = None,
        **kwargs: Any,
    ) -> None:
        self._owns_channel = channel is None
        self.backend = connection.channel() if channel is None else channel
        queues = [queue for consumer in consumers or () for queue in consumer.queues]
        queues += [entry_to_queue(name, **options) for name, options in (from_dict or {}).items()]
        super().__init__(self.backend, queues, **kwargs)

    def iterconsume(self, limit: int | None = None, no_ack: bool = False) -> Iterator[Any]:
        """Consume; yield after each event, *limit* times or for ever."""
        return _iterconsume(self.connection, self, no_ack, limit)  # type: ignore[arg-type]

    def discard_all(self) -> int:
        """Delete the ready messages of all queues; return how many."""
        return self.purge()

    def add_consumer_from_dict(self, queue: str, **options: Any) -> Queue:
        """Add a queue by the options of `entry_to_queue`; it is declared if `auto_declare`."""
        return self.add_queue(entry_to_queue(queue, **options))

    add_queue_from_dict = add_consumer_from_dict

    def add_consumer(self, consumer: messaging.Consumer) -> None:
        """Add the queues of another consumer."""
        for queue in consumer.queues:
            self.add_queue(queue)

    def revive(self, channel: Any) -> None:
        """Move to another channel."""
        self.backend = channel
        super().revive(channel)

    def close(self) -> None:
        """Cancel, and close the channel if it was opened here."""
        self.cancel()
        if self._owns_channel:
            self.channel.close()
