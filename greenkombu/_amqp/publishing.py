"""Publishing on a channel: plain, with confirms, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenkombu._amqp.confirms import (
    ConfirmTracker,
    PublishResult,
    await_confirm,
    return_error,
    tell_return,
)
from greenkombu._amqp.frames import Encoded, Publisher, body_bytes, encode_method, property_bytes
from greenkombu._amqp.message import Outgoing
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.protocol import Confirmation, MethodEvent
from greenkombu._amqp.refusals import check_supported
from greenkombu._amqp.requests import NO_SLOTS, Call, Requests
from hub.errors import StreamError

__all__ = ["Publishing"]

_CONFIRM_SELECT = BY_NAME["Confirm.select"]


class Publishing(Requests):
    """The publishes of one channel; see `Channel` for the attributes."""

    __slots__ = NO_SLOTS

    _confirms: ConfirmTracker | None
    _published: int
    _publisher: Publisher | None
    _selected: bool

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
    ) -> Outgoing:
        """Make a message for `basic_publish`."""
        return Outgoing(body, priority, content_type, content_encoding, headers, properties)

    def basic_publish(
        self,
        msg: Any,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        argsig: str = "Bssbb",
    ) -> None:
        """Publish a message.

        Without `confirm_publish` this appends the message to the out-buffer and returns; it waits
        only while the broker has blocked publishers or takes no more data.

        Args:
            msg: from `prepare_message`, or an `amqp.Message`.
            mandatory: it comes back if no queue is bound for it (`events["basic_return"]`, or
                UnroutableError with confirms).
            timeout: seconds for everything; None leaves it to the bounds of the connection.
            confirm_timeout: seconds for the confirm; None takes the connection's.

        Raises:
            ArgumentError: a property, exchange or routing key does not fit; nothing was sent.
            UnsupportedOperation: `immediate`, on RabbitMQ; nothing was sent.
            ConnectionBlocked, WriteTimeoutError: the broker takes nothing; nothing was sent.
            ConfirmTimeoutError, DeliveryError, UnroutableError: see `PublishResult.result`.
        """
        del argsig
        if self._selected or self.connection.confirm_publish:
            awaited = self.connection.confirm_publish
            result = self._publish_confirmed(
                msg, exchange, routing_key, mandatory, immediate, timeout, awaited
            )
            if awaited:
                await_confirm(self.connection, result, timeout, confirm_timeout)
            return
        data, _ = self._encode(msg, exchange, routing_key, mandatory, immediate)
        connection = self.connection
        if connection.blocked is not None or self._stream.above_high_water:
            if self.closed or self.is_closing:
                raise self._dead()
            connection.wait_for_room(timeout)
        # The first branch is what `_send` would do, without the calls (3 % of a publish).
        if self._writers is None and not self.closed and not self.is_closing:
            try:
                self._stream.write(data)
            except StreamError as exc:
                raise connection.lost(exc) from exc
        else:
            self._send(data)

    # amqp's Connection(confirm_publish=True) replaces one by the other; here one method decides.
    _basic_publish = basic_publish

    def basic_publish_confirm(
        self,
        msg: Any,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
    ) -> None:
        """Publish a message and wait until the broker has taken it; see `basic_publish`."""
        result = self._publish_confirmed(
            msg, exchange, routing_key, mandatory, immediate, timeout, awaited=True
        )
        await_confirm(self.connection, result, timeout, confirm_timeout)

    def basic_publish_async(
        self,
        msg: Any,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
    ) -> PublishResult:
        """Publish a message with a confirm, and leave it to the caller when to wait for that.

        Args:
            timeout: seconds to wait for a place among the unconfirmed publishes, and for room in
                the out-buffer.

        Returns:
            The publish, whose `result(timeout)` waits for the broker's word.
        """
        return self._publish_confirmed(msg, exchange, routing_key, mandatory, immediate, timeout)

    def confirm_select(self, nowait: bool = False) -> None:
        """Switch confirms on for this channel; publishes do not wait for theirs on their own.

        Switching them on twice is the same as once.
        """
        del nowait  # the order on the wire is enough
        if self.closed or self.is_closing:
            raise self._dead()
        self._tracker()
        self.connection.exclusive(self._select)

    def _encode(
        self, msg: Any, exchange: str, routing_key: str, mandatory: bool, immediate: bool
    ) -> tuple[Encoded, bytes]:
        """Return the frames of the whole message, and its body."""
        if immediate:
            check_supported(self.connection, "publish(immediate=True)")
        publisher = self._publisher
        if publisher is None:
            publisher = self._publisher = Publisher(self.channel_id, self.connection.frame_max)
        body = msg.body
        if type(body) is not bytes:
            body = body_bytes(body, msg.properties)
        if type(msg) is Outgoing:
            properties = msg.property_bytes()
        else:
            properties = property_bytes(msg.properties)
        data = publisher.encode(properties, body, exchange, routing_key, mandatory, immediate)
        return data, body

    def _tracker(self) -> ConfirmTracker:
        tracker = self._confirms
        if tracker is None:
            made = ConfirmTracker(self.connection.options.confirm_window)
            # Two threads may come here at once; the instance's dict lets one of them win.
            tracker = self.__dict__.setdefault("_tracker_", made)
            self._confirms = tracker
            if self.error is not None:
                tracker.fail(self.error)
            self.connection.sweep_confirms()
        return tracker

    def _publish_confirmed(
        self,
        msg: Any,
        exchange: str,
        routing_key: str,
        mandatory: bool,
        immediate: bool,
        timeout: float | None,
        awaited: bool = False,
    ) -> PublishResult:
        data, body = self._encode(msg, exchange, routing_key, mandatory, immediate)
        if self.closed:
            raise self._dead()
        connection = self.connection
        tracker = self._confirms or self._tracker()
        if not tracker.has_room():
            connection.wait_for_window(tracker, timeout)
        if connection.blocked is not None or self._stream.above_high_water:
            connection.wait_for_room(timeout)
        properties = msg.properties if type(msg) is not Outgoing else msg._extra
        result = PublishResult(
            self,
            exchange,
            routing_key,
            body if mandatory else None,
            properties.get("message_id") if properties else None,
        )
        if awaited and mandatory:
            result.calls = []
        result.deadline = connection.confirm_deadline()
        connection.exclusive(self._enter_publish, tracker, result, data, asks=awaited)
        return result

    def _select(self) -> bytes:
        """Switch confirms on; run exclusively."""
        if self._selected or self.closed or self.is_closing:
            return b""
        self._selected = True
        return encode_method(self.channel_id, _CONFIRM_SELECT, (True,))

    def _enter_publish(
        self, tracker: ConfirmTracker, result: PublishResult, data: Encoded
    ) -> Encoded:
        """Number a publish; run exclusively, the bytes go out next."""
        if self.is_closing:
            # Anything behind Channel.close ends the whole connection (504).
            result.decide(self._dead())
            return b""
        if not self._selected:
            select = self._select()
            data = [select, *data] if isinstance(data, list) else select + data
        self._published += 1
        tracker.register(result, self._published)
        return b"" if result.done else data

    # -- what comes back, in the hub

    def _on_return(self, event: MethodEvent) -> None:
        """A mandatory message comes back."""
        code, text, exchange, routing_key = event.arguments
        content = event.content
        assert content is not None
        error = return_error(code, text, exchange, routing_key)
        tracker = self._confirms
        result = tracker.returned(exchange, routing_key, content.body) if tracker else None
        handlers = self._events.get("basic_return") if self._events else None
        calls: list[Callable[[], object]] = []
        if handlers:
            message = self.connection.Message(
                self.channel_id, "", 0, False, exchange, routing_key, content.header, content.body
            )
            message.channel = self
            calls += [Call(each, error, exchange, routing_key, message) for each in list(handlers)]
        tell_return(self.connection, result, error, calls)

    def confirmed(self, event: Confirmation) -> None:
        """Take a confirm of the broker; called in the hub."""
        tracker = self._confirms
        if tracker is not None:
            tracker.confirm(event)
        if self._events:
            handlers = self._events.get("basic_ack" if event.positive else "basic_nack")
            for handler in list(handlers or ()):
                self.connection.inbox.append(Call(handler, event.delivery_tag, event.multiple))
