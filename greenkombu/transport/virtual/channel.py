"""The channel of a virtual transport: AMQP's methods on top of a store.

A transport derives from `Channel` and says how its store gets, puts and purges
(`AbstractChannel`); what it overrides besides decides what it can do more.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu import exceptions
from greenkombu._arguments import check_text
from greenkombu._callbacks import call_users
from greenkombu.transport import base
from greenkombu.transport.virtual.consuming import ConsumingChannel
from greenkombu.transport.virtual.deadletter import REJECTED, make_dead_letter
from greenkombu.transport.virtual.declaring import DeclaringChannel
from greenkombu.transport.virtual.message import (
    Base64,
    Codec,
    Message,
    copy_message,
    copy_table,
    new_delivery_tag,
)

if TYPE_CHECKING:
    from greenkombu.transport.virtual.base import Connection

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

#: The largest body that is published; RabbitMQ's own default limit (max_message_size).
MAX_MESSAGE_SIZE = 128 * 1024 * 1024


class Channel(DeclaringChannel, ConsumingChannel, base.StdChannel):
    """A virtual channel.

    Args:
        connection: what the transport's `establish_connection` returned.
    """

    #: Body encodings by name; add to it.
    codecs: ClassVar[dict[str, Codec]] = {"base64": Base64()}
    #: The body encoding of what is published; None leaves bodies alone.
    body_encoding: str | None = "base64"
    #: Raise, instead of dropping silently, what the broker did not take.
    confirm_publish = False
    #: The largest body that is published, in bytes.
    max_message_size = MAX_MESSAGE_SIZE

    default_priority = 0
    min_priority = 0
    max_priority = 9

    #: Names of attributes that `transport_options` sets.
    from_transport_options: tuple[str, ...] = (
        "body_encoding",
        "confirm_publish",
        "deadletter_queue",
        "max_message_size",
    )

    def __init__(self, connection: Connection, **kwargs: Any) -> None:  # noqa: ARG002
        self.connection = connection
        self.closed = False
        self._events: defaultdict[str, set[Callable[..., object]]] | None = None
        self._init_declaring()
        self._init_consuming()
        options = connection.transport_options
        if options:
            for name in self.from_transport_options:
                # Nothing is set for what the class says already: there may be many channels.
                if name in options and options[name] is not getattr(type(self), name, options):
                    setattr(self, name, options[name])
        self.channel_id = connection._claim_channel_id()

    @property
    def events(self) -> defaultdict[str, set[Callable[..., object]]]:
        """Callbacks by event; `basic_return` is called with returned messages."""
        if self._events is None:
            self._events = defaultdict(set)
        return self._events

    # -- publishing

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Make a message of a serialized body and its metadata."""
        prepared = {} if properties is None else dict(properties)
        prepared.setdefault("delivery_info", {})
        prepared.setdefault("priority", priority or self.default_priority)
        return {
            "body": body,
            "content-encoding": content_encoding,
            "content-type": content_type,
            "headers": headers or {},
            "properties": prepared,
        }

    def message_to_python(self, raw_message: Any) -> Message:
        """Make a Message of the dict that a store keeps; a Message stays as it is."""
        if isinstance(raw_message, Message):
            return raw_message
        return self.Message(raw_message, channel=self)

    def basic_publish(
        self,
        message: Mapping[str, Any],
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,  # noqa: ARG002  deprecated by AMQP's own authors
        timeout: float | None = None,  # noqa: ARG002  a store that waits overrides this
        confirm_timeout: float | None = None,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Publish a message made by `prepare_message`, which stays as it is.

        Args:
            message: may be published any number of times.
            exchange: '' is the nameless one.
            routing_key: of the message.
            mandatory: call `events["basic_return"]` if no queue takes it: in the task that drains,
                with `confirm_publish` in this one. If there is none, `confirm_publish` raises.
            **kwargs: passed to the store.

        Raises:
            UnroutableError: mandatory and `confirm_publish`, and no queue takes it.
            BodyTooLarge, NestingTooDeep, EncodeError, ArgumentError: the message cannot be kept;
                nothing was published.
        """
        if self.closed:
            raise self._closed_error(f"publish to exchange {exchange!r}")
        exchange = exchange or ""
        stored = self._to_store(message, exchange, routing_key)
        if self._send(stored, exchange, routing_key, **kwargs) == 0 and mandatory:
            self._return(stored, exchange, routing_key)

    def _send(self, stored: Any, exchange: str, routing_key: str, **kwargs: Any) -> int | None:
        if exchange:
            return self.typeof(exchange).deliver(stored, exchange, routing_key, **kwargs)
        return self._put_each(self._lookup("", routing_key), stored, **kwargs)

    def _to_store(
        self, message: Mapping[str, Any], exchange: str, routing_key: str
    ) -> dict[str, Any]:
        """Make the dict that the store keeps."""
        body = message["body"]
        if body is not None and len(body) > self.max_message_size:
            raise exceptions.BodyTooLarge(
                f"the body of a message to exchange {exchange!r} with routing key {routing_key!r} "
                f"has {len(body)} bytes, more than the {self.max_message_size} that "
                "transport_options['max_message_size'] allows"
            )
        encoding = self.body_encoding
        if encoding:
            body, encoding = self.encode_body(body, encoding)
        headers = message["headers"]
        properties = message["properties"].copy()
        if not exchange.isascii() or (routing_key and not routing_key.isascii()):
            check_text("exchange", exchange)
            check_text("routing_key", routing_key or "")
        for name, value in properties.items():
            if type(value) is str and not value.isascii():
                check_text(f"property {name}", value)
        info = properties["delivery_info"]
        properties["delivery_info"] = (
            {**info, "exchange": exchange, "routing_key": routing_key}
            if info
            else {"exchange": exchange, "routing_key": routing_key}
        )
        properties["body_encoding"] = encoding
        properties["delivery_tag"] = self._next_delivery_tag()
        return {
            "body": body,
            "content-encoding": message["content-encoding"],
            "content-type": message["content-type"],
            "headers": copy_table(headers) if headers else {},
            "properties": properties,
        }

    def _put_each(self, queues: Iterable[str], message: Any, **kwargs: Any) -> int:
        """Put a message, or copies of it, on some queues; return how many."""
        queues = list(queues)
        if not queues:
            return 0
        last = queues.pop()
        for queue in queues:
            self._put(queue, copy_message(message, self._next_delivery_tag()), **kwargs)
        self._put(last, message, **kwargs)
        return len(queues) + 1

    def _put_fanout(
        self, exchange: str, message: Any, routing_key: str | None = None, **kwargs: Any
    ) -> int | None:
        """Broadcast a message; called where `supports_fanout` is true."""
        return self._put_each(self._lookup(exchange, routing_key or ""), message, **kwargs)

    _next_delivery_tag = staticmethod(new_delivery_tag)

    def _return(self, stored: Any, exchange: str, routing_key: str) -> None:
        """Give a mandatory message back that no queue takes."""
        error = exceptions.UnroutableError(
            f"no queue takes a message to exchange {exchange!r} with routing key {routing_key!r}; "
            "declare and bind one first"
        )
        callbacks = list(self._events["basic_return"]) if self._events is not None else ()
        if callbacks:
            message = self.Message(stored, channel=self)

            def run() -> None:
                for callback in callbacks:
                    callback(error, exchange, routing_key, message)

            if self.confirm_publish:
                call_users((run,))
            else:
                self.connection.inbox.append(run)
        elif self.confirm_publish:
            raise error
        else:
            logger.warning("A mandatory message came back and nobody asked for it: %s", error)

    # -- putting back

    def _restore(self, message: Message) -> Any:
        raw = message._raw
        if message.queue is not None:
            return self._put(message.queue, raw)
        info = message.delivery_info
        exchange, routing_key = info.get("exchange", ""), info.get("routing_key", "")
        return self._put_each(self._lookup(exchange, routing_key, headers=message.headers), raw)

    def _discard(self, queue: str | None, raw: Any, token: Any) -> None:
        del token
        if queue is not None:
            self._dead_letter(queue, raw, REJECTED)

    def _dead_letter(self, queue: str, raw: Any, reason: str) -> None:
        """Send a message that leaves a queue to its dead-letter exchange, if it has one."""
        policy = self.state.policies.get(queue)
        if policy is not None and policy.dead_letter_exchange is not None:
            self._send(*make_dead_letter(raw, queue, reason, policy, self._next_delivery_tag()))

    # -- bodies and priorities

    def encode_body(self, body: Any, encoding: str | None = None) -> tuple[Any, str | None]:
        """Encode a body for the store; return it with the encoding that was used.

        Raises:
            EncodeError: there is no such encoding, or the body is neither bytes nor text.
        """
        if encoding:
            codec = self.codecs.get(encoding)
            if codec is None:
                raise exceptions.EncodeError(self._no_codec(encoding))
            return codec.encode(body), encoding
        return body, encoding

    def decode_body(self, body: Any, encoding: str | None = None) -> Any:
        """Decode a body that comes from the store.

        Raises:
            DecodeError: there is no such encoding, or the body does not have it.
        """
        if encoding:
            codec = self.codecs.get(encoding)
            if codec is None:
                raise exceptions.DecodeError(self._no_codec(encoding))
            return codec.decode(body)
        return body

    def _no_codec(self, encoding: str) -> str:
        return (
            f"no body encoding {encoding!r}; known are {', '.join(sorted(self.codecs))}; add it "
            f"to {type(self).__qualname__}.codecs"
        )

    def _get_message_priority(self, message: Mapping[str, Any], reverse: bool = False) -> int:
        """Return the priority of a stored message, within min_priority and max_priority.

        Args:
            message: its dict.
            reverse: for stores that serve the lowest number first.
        """
        try:
            priority = int(message["properties"]["priority"])
        except (TypeError, ValueError, KeyError):
            priority = self.default_priority
        priority = max(min(priority, self.max_priority), self.min_priority)
        return self.max_priority - priority if reverse else priority

    # -- the rest

    def flow(self, active: bool = True) -> None:
        """Pause or resume deliveries.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) always.
        """
        del active
        raise exceptions.UnsupportedOperation(
            "virtual channels do not support flow; use a prefetch limit, or cancel the consumer"
        )

    def tx_select(self) -> None:
        """Begin transactions on this channel.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) unless a transport overrides it.
        """
        transport = self.connection.transport
        transport.implements.require("transactions", transport.driver_type)

    # Without tx_select there is nothing to end.
    tx_commit = tx_rollback = tx_select

    def after_reply_message_received(self, queue: str) -> None:
        """Drop the queue of a reply that was received."""
        self.queue_delete(queue)

    def notify(self, queue: str) -> None:
        """Tell a consumer that there may be a message; for stores that learn of new ones."""
        watch = self._registry.get(queue)
        if watch is not None:
            watch.wake()

    def close(self) -> None:
        """Cancel the consumers, give unsettled deliveries back, and free the channel's number.

        May be called several times.
        """
        if self.closed:
            return
        try:
            self._close_consuming()
        finally:
            self.closed = True
            self._events = None
            self._types.clear()
            self.connection._forget_channel(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return (
            f"<{type(self).__name__} {self.channel_id}: {state}, "
            f"{len(self._consumers)} consumers, {self.unsettled} unsettled>"
        )
