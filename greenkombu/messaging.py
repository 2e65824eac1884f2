"""Sending and receiving: `Producer`, and `Consumer` (see `greenkombu._consumer`).

Publishing is the hot path.  Everything that does not depend on the message is decided when the
producer gets its channel (`Producer._attach`): the default exchange is declared then, `on_return`
registered, and later calls find both done by comparing two references.  One call without retry or a
deadline is then: serialize, complete the properties, `prepare_message`, `basic_publish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from greenkombu._arguments import (
    duration,
    entities,
    message_headers,
    plain_text,
    priority_level,
    ttl_milliseconds,
)
from greenkombu._batch import Batch
from greenkombu._consumer import Consumer
from greenkombu._forks import generation
from greenkombu.abstract import MaybeChannelBound
from greenkombu.common import maybe_declare
from greenkombu.compression import compress
from greenkombu.deadline import Deadline
from greenkombu.entity import Exchange, Queue, maybe_delivery_mode
from greenkombu.exceptions import ArgumentError, EncodeError, NotBoundError
from greenkombu.serialization import dumps
from hub.environment import get_environment

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from greenkombu.connection import Connection

__all__ = ["Consumer", "Exchange", "Producer", "Queue"]

# What persistent means on the wire, and what a message gets that names no delivery mode.
_DEFAULT_DELIVERY_MODE = Exchange.PERSISTENT_DELIVERY_MODE


class _LazyChannel:
    """Stand in for the default channel of a connection until an entity needs it."""

    __slots__ = ("connection",)

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __resolve_channel__(self) -> Any:
        return self.connection.default_channel

    def __repr__(self) -> str:
        return f"<default channel of {self.connection!r}>"


class Producer:
    """Publishes messages.

    Args:
        channel: a channel, or a Connection whose default channel is taken when first needed
            (nothing is opened before).  None: give it one with `revive` later.
        exchange: default exchange, an Exchange or a name.
        routing_key: default routing key.
        serializer: name of the default serializer; None is the registry's (json), and then text
            and bytes are sent as they are.
        auto_declare: declare the default exchange before the first message of each connection.
        compression: name of the default compression; None is none.
        on_return: called as (exception, exchange, routing_key, message) for a message that a
            `mandatory` publish could not route.  It runs in the publishing task with confirms, else
            in a task that drains events.

    A producer may be shared by tasks.  After a connection error a producer made from a Connection
    opens a new channel at the next publish; one made from a channel needs `revive`.
    """

    exchange: Exchange | None = None
    routing_key: str = ""
    serializer: str | None = None
    compression: str | None = None
    auto_declare: bool = True
    on_return: Callable[[Any, str, str, Any], Any] | None = None

    __connection__: Connection | None = None

    def __init__(
        self,
        channel: Any,
        exchange: Exchange | str | None = None,
        routing_key: str | None = None,
        serializer: str | None = None,
        auto_declare: bool | None = None,
        compression: str | None = None,
        on_return: Callable[[Any, str, str, Any], Any] | None = None,
    ) -> None:
        self._channel: Any = None
        # The channel and exchange that `_attach` has dealt with, and the process it did that in.
        self._attached: Any = None
        self._attached_exchange: Exchange | None = None
        self._generation = generation()
        # Task -> batch that its publishes go to.
        self._batches: dict[object, Batch] = {}
        if exchange is None:
            exchange = self.exchange
        self.exchange = exchange if isinstance(exchange, Exchange) else Exchange(exchange or "")
        self.routing_key = self.routing_key if routing_key is None else routing_key
        self.serializer = serializer or self.serializer
        self.compression = compression or self.compression
        self.on_return = on_return or self.on_return
        if auto_declare is not None:
            self.auto_declare = auto_declare
        if channel is not None:
            self.revive(channel)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.__reduce_args__()

    def __reduce_args__(self) -> tuple[Any, ...]:
        return (
            self.__connection__,
            self.exchange,
            self.routing_key,
            self.serializer,
            self.auto_declare,
            self.compression,
        )

    def __repr__(self) -> str:
        return f"<Producer: {self._channel or self.__connection__}>"

    # -- channel and connection

    def revive(self, channel: Any) -> None:
        """Move to another channel, or to the default channel of another Connection."""
        # Not `from ... import`, which asks a module with a __getattr__ for its __path__ first.
        import greenkombu.connection as connections

        bind_to = channel
        if connections.is_connection(channel):
            self.__connection__ = channel
            self._channel = None
            bind_to = _LazyChannel(channel)
        else:
            self._channel = channel
        self._attached = None
        if self.exchange is not None:
            self.exchange = self.exchange._copy_bound_to(bind_to)

    def _get_channel(self) -> Any:
        channel = self._channel
        connection = self.__connection__
        if connection is not None and (
            channel is None or channel.closed is True or self._generation != generation()
        ):
            unheard = getattr(channel, "unheard", None)
            if unheard is not None:
                # What was published before is lost, and its publish has returned: told once, here.
                channel.unheard = None
                raise unheard
            channel = self._channel = connection.default_channel
            self._generation = generation()
        return channel

    def _set_channel(self, channel: Any) -> None:
        self._channel = channel
        self._attached = None

    channel = property(
        _get_channel, _set_channel, doc="The channel in use; opened now if it was not yet."
    )

    @property
    def connection(self) -> Connection | None:
        """The Connection that it publishes on, if it is known."""
        if self.__connection__ is not None:
            return self.__connection__
        return getattr(getattr(self._channel, "connection", None), "client", None)

    def _attach(self) -> Any:
        """Get a usable channel and do what is due once for it: on_return, declare."""
        channel = self._get_channel()
        if channel is None:
            raise NotBoundError(
                f"Can't call publish on {type(self).__name__} not bound to a channel; give it one "
                "first: producer.revive(channel or connection)"
            )
        if self.on_return is not None and channel is not self._attached:
            _listen_for_returns(channel, self.on_return)
        exchange = self.exchange
        if self.auto_declare and exchange is not None and exchange.name:
            maybe_declare(exchange, channel)
        self._attached_exchange = exchange
        self._attached = channel
        return channel

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give it back to its pool; does nothing for a producer without one."""

    def close(self) -> None:
        """Same as `release`: the channel belongs to its connection."""
        self.release()

    # -- declaring

    def declare(self) -> None:
        """Declare the default exchange, unless it has no name."""
        exchange = self.exchange
        if exchange is not None and exchange.name:
            exchange.declare(channel=self.channel)

    def maybe_declare(
        self, entity: MaybeChannelBound, retry: bool = False, **retry_policy: Any
    ) -> bool:
        """Declare *entity* unless this connection has declared it before.

        Args:
            retry: declare again after the connection was lost and established anew.
            **retry_policy: as for `Connection.ensure`.

        Returns:
            Whether it was declared now.
        """
        return maybe_declare(entity, self.channel, retry, **retry_policy)

    # -- publishing

    def publish(
        self,
        body: Any,
        routing_key: str | None = None,
        delivery_mode: int | str | None = None,
        mandatory: bool = False,
        immediate: bool = False,
        priority: int | None = 0,
        content_type: str | None = None,
        content_encoding: str | None = None,
        serializer: str | None = None,
        headers: Mapping[str, Any] | None = None,
        compression: str | None = None,
        exchange: Exchange | str | None = None,
        retry: bool = False,
        retry_policy: Mapping[str, Any] | None = None,
        declare: Iterable[MaybeChannelBound] | None = None,
        expiration: float | None = None,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **properties: Any,
    ) -> Any:
        """Publish one message.

        Args:
            body: text and bytes go as they are (unless a serializer is named), anything else
                through the serializer.
            routing_key: None takes the producer's.
            delivery_mode: 1, 2, 'transient' or 'persistent'; None takes the exchange's; with the
                name of an exchange, that of the producer's exchange.
            mandatory: return the message (`on_return`) when no queue is bound for it.
            immediate: AMQP's flag; RabbitMQ refuses it.
            priority: 0 to 9.
            content_type, content_encoding: say what *body* is and send it unserialized.
            serializer, compression: names; None takes the producer's.
            headers: application headers; the mapping is copied.
            exchange: an Exchange or a name; it must exist.  None takes the producer's.
            retry: publish again after a connection or channel error.
            retry_policy: keywords of `Connection.ensure` (max_retries, interval_start, ...).
            declare: entities to declare first, once for each connection.
            expiration: seconds after which the waiting message is dropped.
            timeout: seconds for everything together: connecting, opening the channel,
                declaring, retries with their pauses, writing and the broker's confirm.
            confirm_timeout: seconds for the confirm alone.
            **properties: AMQP properties (correlation_id, reply_to, ...); a Queue as reply_to
                stands for its name.

        Raises:
            EncodeError: the body cannot be serialized; nothing was sent.
            ArgumentError, UnknownDeliveryModeError, UnknownSerializer, CompressorNotInstalled: an
                argument is wrong; nothing was sent, and the channel is as it was.
            NotBoundError: no channel and no connection.
            A connection or channel error of the transport; after a retry that gave up,
                OperationalError.  Without confirms the message may or may not be on the broker.
            TimeoutError: *timeout* is over.
        """
        if routing_key is None:
            routing_key = self.routing_key

        if exchange is None:
            exchange = self.exchange
        if isinstance(exchange, Exchange):
            exchange_name = exchange.name
            if not delivery_mode:
                delivery_mode = exchange.delivery_mode
        else:
            # A name says nothing about the mode; the producer's own exchange does, as in Kombu.
            exchange_name = exchange or ""
            if not delivery_mode and self.exchange is not None:
                delivery_mode = self.exchange.delivery_mode
        # What is as it should be costs a comparison, which publishing can bear.
        if type(exchange_name) is not str:
            exchange_name = plain_text("exchange", exchange_name)
        if type(routing_key) is not str:
            routing_key = plain_text("routing_key", routing_key)
        if type(priority) is not int or not 0 <= priority <= 255:
            priority = priority_level(priority)
        if delivery_mode:
            properties["delivery_mode"] = maybe_delivery_mode(delivery_mode)
        else:
            properties["delivery_mode"] = _DEFAULT_DELIVERY_MODE
        if expiration is not None:
            properties["expiration"] = ttl_milliseconds(expiration)
        if "reply_to" in properties and isinstance(properties["reply_to"], Queue):
            properties["reply_to"] = properties["reply_to"].name

        if declare is not None:
            declare = entities("declare", declare)
        if confirm_timeout is not None:
            confirm_timeout = duration("confirm_timeout", confirm_timeout, past=True)

        headers = {} if headers is None else message_headers(headers)
        if content_type:
            content_encoding, body = _unserialized(body, content_type, content_encoding)
        else:
            content_type, content_encoding, body = dumps(body, serializer or self.serializer)
        compression = compression or self.compression
        if compression:
            body, headers["compression"] = compress(body, compression)

        if retry or timeout is not None:
            return self._publish_carefully(
                body, priority, content_type, content_encoding, headers, properties, routing_key,
                mandatory, immediate, exchange_name, declare, timeout, confirm_timeout, retry,
                retry_policy,
            )  # fmt: skip

        channel = self._attached
        if (
            channel is None
            or channel.closed is True
            or self._attached_exchange is not self.exchange
            or self._generation != generation()
        ):
            channel = self._attach()
        if declare is not None:
            for entity in declare:
                maybe_declare(entity, channel)
        message = channel.prepare_message(
            body, priority, content_type, content_encoding, headers, properties
        )
        if self._batches or confirm_timeout is not None:
            return self._send(
                channel,
                message,
                exchange=exchange_name,
                routing_key=routing_key,
                mandatory=mandatory,
                immediate=immediate,
                confirm_timeout=confirm_timeout,
            )
        return channel.basic_publish(
            message,
            exchange=exchange_name,
            routing_key=routing_key,
            mandatory=mandatory,
            immediate=immediate,
        )

    def _publish_carefully(
        self,
        body: Any,
        priority: int | None,
        content_type: str,
        content_encoding: str | None,
        headers: dict[str, Any],
        properties: dict[str, Any],
        routing_key: str,
        mandatory: bool,
        immediate: bool,
        exchange_name: str,
        declare: Iterable[MaybeChannelBound] | None,
        timeout: float | None,
        confirm_timeout: float | None,
        retry: bool,
        retry_policy: Mapping[str, Any] | None,
    ) -> Any:
        """Publish with retries, or with a deadline over all of it."""
        deadline = Deadline(duration("timeout", timeout, past=True))

        def publish_once() -> Any:
            channel = self._attach()
            for entity in declare or ():
                maybe_declare(entity, channel)
            # A retry needs a fresh message: a transport may complete the properties in place.
            message = channel.prepare_message(
                body, priority, content_type, content_encoding, dict(headers), dict(properties)
            )
            left = deadline.left()
            confirm_left = confirm_timeout
            if left is not None and (confirm_left is None or left < confirm_left):
                confirm_left = left
            return self._send(
                channel,
                message,
                exchange=exchange_name,
                routing_key=routing_key,
                mandatory=mandatory,
                immediate=immediate,
                timeout=left,
                confirm_timeout=confirm_left,
            )

        with deadline:
            if not retry:
                return publish_once()
            connection = self.connection
            if connection is None:
                raise NotBoundError(
                    f"Can't retry with a {type(self).__name__} that knows no connection: make it "
                    "from a Connection, or from a channel of one"
                )
            policy = retry_policy or {}
            if not isinstance(policy, Mapping):
                raise ArgumentError(f"retry_policy must be a dictionary, not {policy!r:.100}")
            return connection.ensure(self, publish_once, **policy)()

    def _send(
        self,
        channel: Any,
        message: Any,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if timeout is not None:
            kwargs["timeout"] = timeout
        if confirm_timeout is not None:
            kwargs["confirm_timeout"] = confirm_timeout
        if self._batches:
            batch = self._batches.get(get_environment().current())
            if batch is not None:
                return batch.add(channel, message, kwargs)
        return channel.basic_publish(message, **kwargs)

    # -- batches

    @property
    def supports_batch_publish(self) -> bool:
        """Whether the transport takes several messages in one operation."""
        transport = getattr(self.connection, "transport", None)
        implements = getattr(transport, "implements", None)
        return bool(getattr(implements, "batch_publish", False))

    def batch(self, max_size: int = 1000) -> Batch:
        """Return a context in which this task's publishes are handed over together.

        Args:
            max_size: hand over whenever so many have come together.

        The end of the block hands over the rest; an exception in it drops what was not handed
        over yet.  On a transport that cannot take batches each message goes at once.

        Raises:
            ValueError: *max_size* is not a positive integer.
            BatchPublishError: (at the end of the block, or at *max_size*) the broker may have
                taken some messages of the batch and not others.
        """
        return Batch(self, max_size)


def _listen_for_returns(channel: Any, callback: Callable[..., Any]) -> None:
    events = getattr(channel, "events", None)
    if events is None:
        # A transport that never returns a message has no such event.
        return
    listeners = events["basic_return"]
    if callback not in listeners:
        add = getattr(listeners, "add", None) or listeners.append
        add(callback)


def _unserialized(body: Any, content_type: str, content_encoding: str | None) -> tuple[str, bytes]:
    """Return (content_encoding, bytes) of a body whose content type the caller gave."""
    if not isinstance(content_type, str):
        raise ArgumentError(f"content_type must be a string, not {content_type!r:.100}")
    if content_encoding is not None and not isinstance(content_encoding, str):
        raise ArgumentError(f"content_encoding must be a string, not {content_encoding!r:.100}")
    if isinstance(body, bytes):
        return content_encoding or "binary", body
    if isinstance(body, str):
        encoding = content_encoding or "utf-8"
        try:
            return encoding, body.encode(encoding)
        except (LookupError, UnicodeError) as exc:
            raise EncodeError(f"the text body cannot be encoded as {encoding!r}: {exc}") from exc
    if isinstance(body, (bytearray, memoryview)):
        return content_encoding or "binary", bytes(body)
    raise EncodeError(
        f"a body of {type(body).__name__} cannot be sent as {content_type!r}: with a content type "
        "the body must be bytes or text; leave it out, or name a serializer instead"
    )
