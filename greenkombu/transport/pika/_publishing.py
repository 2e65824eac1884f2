"""Publishing on a channel of pika: plain, with confirms, and what comes back."""

from __future__ import annotations

import calendar
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pika

from greenkombu._amqp.confirms import (
    ConfirmTracker,
    PublishResult,
    await_confirm,
    return_error,
    tell_return,
)
from greenkombu._amqp.frames import body_bytes
from greenkombu._amqp.protocol import Confirmation
from greenkombu._amqp.requests import Call
from greenkombu._amqp.rpc import PendingReply
from greenkombu.exceptions import UnsupportedOperation
from greenkombu.transport.pika._ear import PROPERTIES, Delivery, pieces_of
from greenkombu.transport.pika._requests import Requests, Step, check_table

__all__ = ["Publishing"]


class Publishing(Requests):
    """The publishes of one channel; see `greenkombu._amqp.publishing` for what holds of them."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._published = 0
        self._selected = False

    def open(self) -> None:
        """Open the channel at the broker, with confirms if the connection has `confirm_publish`."""
        super().open()
        if self.connection.confirm_publish:
            self.confirm_select()

    def die(self, error: BaseException) -> None:
        """Make the channel unusable and tell everybody who waits on it; idempotent."""
        super().die(error)
        if self._confirms is not None:
            self._confirms.fail(error)

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
        """Publish a message; see `greenkombu._amqp.publishing.Publishing.basic_publish`.

        Raises:
            UnsupportedOperation: `immediate`, which pika does not know, nor RabbitMQ.
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
        step, _ = self._step(msg, exchange, routing_key, mandatory, immediate)
        self._wait_for_room(timeout)
        self._ask(
            "Basic.publish",
            lambda channel, done: self._publish(channel, step, done),
            begin=self._now,
        )

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

        Returns:
            The publish, whose `result(timeout)` waits for the broker's word.
        """
        return self._publish_confirmed(msg, exchange, routing_key, mandatory, immediate, timeout)

    def confirm_select(self, nowait: bool = False) -> None:
        """Switch confirms on for this channel; publishes do not wait for theirs on their own."""
        del nowait
        if self._confirms is None:
            self._confirms = ConfirmTracker(self.connection.options.confirm_window)
            self.connection.sweep_confirms()
        if not self._selected:
            self._ask("Confirm.select", self._select)

    # -- in the hub

    def _select(self, channel: Any, done: Callable[[Any], None]) -> None:
        if not self._selected:
            # Sent at once, without an answer: the broker numbers every publish from now on.
            channel.confirm_delivery(self._ear.confirmed)
            self._selected = True
        done(True)

    def _now(self, pending: PendingReply, step: Step) -> None:
        """Publish; not behind the requests that wait for their turn."""
        self._run(pending, step)

    def _publish(
        self,
        channel: Any,
        step: Callable[[Any], object],
        done: Callable[[Any], None],
        result: PublishResult | None = None,
    ) -> None:
        step(channel)
        if self._selected:
            # Not before pika has taken it: what it refuses has no number.
            self._published += 1
            if result is not None and self._confirms is not None:
                self._confirms.register(result, self._published)
        done(True)

    # -- in the publishing task

    def _step(
        self, msg: Any, exchange: str, routing_key: str, mandatory: bool, immediate: bool
    ) -> tuple[Callable[[Any], object], bytes]:
        """Return what publishes a message on pika's channel, and the message's body."""
        if immediate:
            raise UnsupportedOperation("the pika transport (amqp) has no immediate publish")
        properties = msg.properties
        body = body_bytes(msg.body, properties)
        check_table(properties.get("application_headers"), "property application_headers")
        theirs = pika.BasicProperties(
            **{
                name: _seconds(value) if name == "timestamp" else value
                for name, ours in PROPERTIES.items()
                if (value := properties.get(ours)) is not None
            }
        )
        return (
            lambda channel: channel.basic_publish(exchange, routing_key, body, theirs, mandatory),
            body,
        )

    def _wait_for_room(self, timeout: float | None) -> None:
        connection = self.connection
        stream = connection.stream
        if connection.blocked is not None or (stream is not None and stream.above_high_water):
            if self.closed:
                raise self._dead()
            connection.wait_for_room(timeout)

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
        step, body = self._step(msg, exchange, routing_key, mandatory, immediate)
        self.confirm_select()
        tracker = self._confirms
        assert tracker is not None
        if not tracker.has_room():
            self.connection.wait_for_window(tracker, timeout)
        self._wait_for_room(timeout)
        result = PublishResult(
            self,
            exchange,
            routing_key,
            body if mandatory else None,
            msg.properties.get("message_id"),
        )
        if awaited and mandatory:
            result.calls = []
        result.deadline = self.connection.confirm_deadline()
        publish: Step = lambda channel, done: self._publish(channel, step, done, result)  # noqa: E731
        self._ask("Basic.publish", publish, begin=self._now)
        return result

    # -- what comes back, in the hub

    def confirmed(self, method: Any) -> None:
        """Take a confirm of the broker."""
        positive = method.NAME == "Basic.Ack"
        if self._confirms is not None:
            self._confirms.confirm(
                Confirmation(self.channel_id, method.delivery_tag, method.multiple, positive)
            )
        for handler in list(self.events.get("basic_ack" if positive else "basic_nack", ())):
            self.connection.inbox.append(Call(handler, method.delivery_tag, method.multiple))

    def returned(self, method: Any, properties: Any, body: bytes) -> None:
        """Take a mandatory message that comes back."""
        exchange, routing_key = method.exchange, method.routing_key
        error = return_error(method.reply_code, method.reply_text, exchange, routing_key)
        tracker = self._confirms
        whole = pieces_of(properties, body)
        result = tracker.returned(exchange, routing_key, whole) if tracker else None
        handlers = self.events.get("basic_return")
        calls: list[Callable[[], object]] = []
        if handlers:
            message = Delivery(self, method, properties, body, "")
            calls += [Call(each, error, exchange, routing_key, message) for each in list(handlers)]
        tell_return(self.connection, result, error, calls)


def _seconds(value: Any) -> int:
    if isinstance(value, datetime):
        return calendar.timegm(value.utctimetuple())
    return int(value)
