"""What pika tells a channel: called by it, in the hub."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from pika import exceptions, spec

from greenkombu._amqp.requests import Call
from greenkombu.transport import pyamqp

if TYPE_CHECKING:
    from greenkombu.transport.pika._channel import Channel
    from greenkombu.transport.pika._connection import Connection

__all__ = ["Delivery", "Ear", "pieces_of"]

#: AMQP's names of the properties, by pika's.
PROPERTIES = {
    "content_type": "content_type",
    "content_encoding": "content_encoding",
    "headers": "application_headers",
    "delivery_mode": "delivery_mode",
    "priority": "priority",
    "correlation_id": "correlation_id",
    "reply_to": "reply_to",
    "expiration": "expiration",
    "message_id": "message_id",
    "timestamp": "timestamp",
    "type": "type",
    "user_id": "user_id",
    "app_id": "app_id",
    "cluster_id": "cluster_id",
}


class Delivery(pyamqp.Delivery):
    """A message, as pika has decoded it; otherwise as `pyamqp.Delivery`.

    Attributes:
        start: of the consumer that it came for; see `Consuming.wants`.
    """

    __slots__ = ("start",)

    def __init__(
        self,
        channel: Any,
        method: Any,
        properties: Any,
        body: bytes,
        consumer_tag: str | None,
    ) -> None:
        fault = getattr(properties, "fault", None)
        # A returned message has neither of the first two.
        super().__init__(
            channel.channel_id,
            consumer_tag,
            getattr(method, "delivery_tag", 0),
            getattr(method, "redelivered", False),
            method.exchange,
            method.routing_key,
            b"",
            None if fault is not None else pieces_of(properties, body),
            fault,
        )
        self.channel = channel
        self.start: object = None
        self.message_count = getattr(method, "message_count", None)
        found = {name: getattr(properties, theirs) for theirs, name in PROPERTIES.items()}
        self._properties = {name: value for name, value in found.items() if value is not None}


def pieces_of(properties: Any, body: bytes) -> bytes | list[bytes]:
    """Return the body of a message, as pieces if it is a large one; see `Protocol`."""
    pieces: list[bytes] | None = getattr(properties, "pieces", None)
    return body if pieces is None else pieces


class Ear:
    """What pika calls back, in the hub; refers weakly to a channel that its user may drop."""

    __slots__ = ("_channel", "_connection")

    def __init__(self, channel: Any) -> None:
        self._channel: weakref.ref[Channel] = weakref.ref(channel)
        self._connection: weakref.ref[Connection] = weakref.ref(channel.connection)

    def attach(self, channel: Any) -> None:
        """Listen to a channel of pika's."""
        channel.add_on_close_callback(self.closed)
        channel.add_on_return_callback(self.returned)
        channel.add_on_cancel_callback(self.cancelled)
        for method, callback in (
            (spec.Channel.Close, self.refused),
            (spec.Basic.GetEmpty, self.got_nothing),
        ):
            channel.add_callback(callback, [method], one_shot=False)

    def closed(self, channel: Any, reason: BaseException) -> None:  # noqa: ARG002  pika's
        connection, mine = self._connection(), self._channel()
        if connection is not None:
            connection.table.open -= 1
            connection.table.room.open(1)
        # Why the broker closed it is in the frame, which comes next, or came before.
        if mine is not None and not isinstance(reason, exceptions.ChannelClosedByBroker):
            mine.ended()

    def refused(self, method_frame: Any) -> None:
        channel = self._channel()
        if channel is not None:
            method = method_frame.method
            signature = (method.class_id, method.method_id)
            channel.ended_by_broker(method.reply_code, method.reply_text, signature)

    def delivered(
        self, start: object, channel: Any, method: Any, properties: Any, body: bytes
    ) -> None:
        mine = self._channel()
        if mine is not None and mine.wants(method.consumer_tag, start):
            mine.delivered(Delivery(mine, method, properties, body, method.consumer_tag), start)
        elif channel.is_open:
            # Its consumer was given up, or is gone.
            channel.basic_reject(method.delivery_tag, requeue=True)

    def got(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:
        mine = self._channel()
        if mine is not None:
            mine.got((method, properties, body))
        elif channel.is_open:
            channel.basic_reject(method.delivery_tag, requeue=True)

    def got_nothing(self, method_frame: Any) -> None:  # noqa: ARG002  pika's
        channel = self._channel()
        if channel is not None:
            channel.got(None)

    def cancelled(self, method_frame: Any) -> None:
        channel = self._channel()
        if channel is not None:
            tag = method_frame.method.consumer_tag
            channel.connection.inbox.append(Call(channel.cancelled_by_broker, tag))

    def returned(self, channel: Any, method: Any, properties: Any, body: bytes) -> None:  # noqa: ARG002
        mine = self._channel()
        if mine is not None:
            mine.returned(method, properties, body)

    def confirmed(self, method_frame: Any) -> None:
        channel = self._channel()
        if channel is not None:
            channel.confirmed(method_frame.method)
