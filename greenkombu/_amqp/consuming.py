"""Consumers of a channel: starting and stopping them, their deliveries, and settling these.

A delivery takes this way: the hub asks `deliverable` and puts it into the connection's inbox; the
task that drains calls it, which is `run_delivery`, which calls the consumer's callback.  In
between the consumer may have been cancelled: then its messages go back to their queue, except
those of a no_ack consumer, which exist nowhere else any more and are still delivered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from struct import error as StructError
from typing import Any
from uuid import uuid4

from amqp.exceptions import ChannelError, ConsumerCancelled

from greenkombu._amqp.errors import ArgumentError, RPCTimeoutError
from greenkombu._amqp.frames import encode_ack, encode_method, encode_nack, encode_reject
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.methods import BY_NAME, replies_to
from greenkombu._amqp.protocol import MethodEvent
from greenkombu._amqp.refusals import (
    SHARED_PREFETCH,
    check_consumer_arguments,
    check_kind,
    check_supported,
    is_stream_delivery,
)
from greenkombu._amqp.requests import NO_SLOTS, NOTHING, Requests
from greenkombu._amqp.rpc import PendingReply
from greenkombu.exceptions import StaleDeliveryError
from greenkombu.transport._connection import Failure
from hub.errors import HubError, StreamError

__all__ = ["Consuming"]

_QOS = BY_NAME["Basic.qos"]
_CONSUME = BY_NAME["Basic.consume"]
_CANCEL = BY_NAME["Basic.cancel"]
_GET = BY_NAME["Basic.get"]
_GET_OK = BY_NAME["Basic.get_ok"]
_RECOVER = BY_NAME["Basic.recover"]


class Consuming(Requests):
    """The consumers of one channel; see `Channel` for the attributes."""

    __slots__ = NO_SLOTS

    callbacks: dict[str, Callable[[Any], object]]
    cancel_callbacks: dict[str, Callable[[str], object]]
    no_ack_consumers: set[str] | frozenset[str]
    _held: list[Any] | None
    # Delivery tags that callbacks have got and that are not settled, in the order of delivery.
    _in_hand: dict[int, None] | None
    _qos_set: bool
    # Whether a prefetch holds for all consumers together; in the instance's dict, since few do.
    _shared_prefetch: bool = False
    # Consumers that have ended while messages for them wait in the inbox, and what still takes
    # these: the callback of a no_ack consumer, or nothing.
    _retired: dict[str, list[Callable[[Any], object] | None]] | None
    # Consumer tags that the broker may know although no consumer here has them (yet, or any
    # more), and who waits for each: its start is not answered, or its late start not undone.
    _taken: dict[str, Gate] | None

    # -- in the hub

    def deliverable(self, message: Any) -> bool:
        """Tell whether a delivery that just arrived is for the inbox; called in the hub.

        One without a consumer is put back on its queue: it belongs to one that was cancelled, or
        whose start was given up.
        """
        tag = message.consumer_tag
        if tag not in self.callbacks:
            if not self.closed and not self.is_closing:
                self.connection.log(
                    logging.DEBUG, "%s: requeueing a delivery for consumer %r", self.where, tag
                )
                self.connection.exclusive(self._put_back, self._give_back(message))
            return False
        message.channel = self
        if tag in self.no_ack_consumers:
            message.no_ack = True
        held = self._held
        if held is not None:
            held.append(message)
            self.connection.intake.hold(message)
            return False
        return True

    # -- deliveries, in the draining task

    def run_delivery(self, message: Any) -> object:
        """Call the consumer of a message; called by the draining task.

        Returns:
            `NOTHING` if there is none any more.
        """
        tag = message.consumer_tag
        retired = self._retired
        ended = retired.get(tag) if retired else None
        if ended is not None:
            callback = ended[0]
            if callback is not None:
                return callback(message)
        else:
            callback = self.callbacks.get(tag)
            if callback is not None:
                if not message.no_ack:
                    in_hand = self._in_hand
                    if in_hand is None:
                        in_hand = self._in_hand = {}
                    in_hand[message.delivery_tag] = None
                return callback(message)
        if not self.closed and not message.no_ack:
            # Cancelled while it waited in the inbox.
            try:
                self._send(self._give_back(message))
            except (ChannelError, *self.connection.connection_errors):
                pass  # then the broker requeues it anyway
        return NOTHING

    # -- consuming

    def basic_consume(
        self,
        queue: str = "",
        consumer_tag: str | None = "",
        no_local: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        nowait: bool = False,
        callback: Callable[[Any], object] | None = None,
        arguments: dict[str, Any] | None = None,
        on_cancel: Callable[[str], object] | None = None,
        argsig: str = "BssbbbbF",
    ) -> str:
        """Start a consumer.

        Args:
            queue: its name.
            consumer_tag: unique on this channel; empty or None makes one.  If a start with that
                tag was given up, this waits until the broker has answered it and stopped the
                consumer again, at most `rpc_timeout`.
            no_ack: messages count as processed once they are sent.
            nowait: do not wait for the broker's answer.
            callback: called with each message by the task that drains.
            on_cancel: called with the tag if the broker stops the consumer; without it the
                draining task gets ConsumerCancelled.

        Returns:
            The consumer tag.

        Raises:
            ArgumentError: no callback, the tag is in use on this channel, or x-stream-offset names
                no place in a stream.
            UnsupportedOperation: the channel has a global prefetch, which a queue of this kind does
                not know; nothing was sent.
            RPCTimeoutError: no answer in time; also when it is an earlier start that is unanswered.
            ChannelError: the broker refused; the channel is dead.
        """
        del argsig
        tag = consumer_tag or f"gk.{uuid4().hex}"
        if callback is None:
            raise ArgumentError("basic_consume needs a callback", _CONSUME.signature)
        self._wait_for_tag(tag)
        if tag in self.callbacks:
            raise ArgumentError(
                f"consumer tag {tag!r} is in use on {self.where}", _CONSUME.signature
            )
        check_consumer_arguments(arguments)
        if self._shared_prefetch:
            check_kind(self.connection, queue, SHARED_PREFETCH)
        if self.closed:
            raise self._dead()
        values = (0, queue, tag, no_local, no_ack, exclusive, nowait, arguments)
        if not no_ack and not self._qos_set:
            self._set_default_prefetch()
        # Known before the broker hears of it: a delivery may follow its answer at once.
        self.callbacks[tag] = callback
        if on_cancel is not None:
            self.cancel_callbacks[tag] = on_cancel
        if no_ack:
            if isinstance(self.no_ack_consumers, set):
                self.no_ack_consumers.add(tag)
            else:
                self.no_ack_consumers = {tag}
        self.connection.table.anchor(self.channel_id, self, True)
        try:
            if nowait:
                self._send(encode_method(self.channel_id, _CONSUME, values))
            else:
                self._request(
                    _CONSUME, values, late=self._cancel_late, key=tag, enter=self._enter_consume
                )
                self._free_tag(tag)
        except BaseException:
            self._forget(tag)
            raise
        return tag

    def _enter_consume(self, pending: PendingReply, data: bytes) -> bytes:
        data = self._enter_request(pending, data)
        if data:
            if self._taken is None:
                self._taken = {}
            self._taken[pending.key] = Gate()  # type: ignore[index]
        return data

    def _wait_for_tag(self, tag: str) -> None:
        """Wait while a start with that tag was given up that the broker may still carry out.

        A second consumer with the tag of a first would end the connection (530).
        """
        taken = self._taken
        gate = taken.get(tag) if taken and tag not in self.callbacks else None
        if taken is None or gate is None:
            return
        bound = self._bound(None)
        with self.connection.awaiting():
            free = gate.wait(lambda: self.closed or taken.get(tag) is not gate, bound)
        if not free:
            within = "" if bound is None else f" within {bound:g} s"
            raise RPCTimeoutError(
                f"consumer tag {tag!r} on {self.where} is not free: an earlier start with it was"
                f" given up, and the broker did not answer that{within}; take another tag, or"
                " another channel",
                _CONSUME.signature,
            )

    def _free_tag(self, tag: str) -> None:
        gate = self._taken.pop(tag, None) if self._taken else None
        if gate is not None:
            gate.open()

    def _set_default_prefetch(self) -> None:
        self._qos_set = True
        count = self.connection.options.default_prefetch
        if count:
            # Its answer precedes that of Basic.consume, which somebody waits for.
            pending = PendingReply(_QOS, replies_to(_QOS), None)
            data = encode_method(self.channel_id, _QOS, (0, count, False))
            self.connection.exclusive(self._enter_request, pending, data)

    def _cancel_late(self, reply: MethodEvent) -> None:
        """A consumer was started after its task gave up: stop it.

        Not before the broker has answered: RabbitMQ ends the connection (541) when Basic.cancel
        overtakes the start of its consumer.
        """
        tag = reply.arguments[0]
        self._forget(tag)
        self.connection.exclusive(self._stop_consumer, tag)

    def _stop_consumer(self, tag: str) -> bytes:
        """Cancel a consumer; an exclusive step, since nothing may follow Channel.close."""
        if self.closed or self.is_closing:
            return b""  # it ends with the channel
        # Behind the answer no delivery of this consumer comes any more.
        pending = PendingReply(
            _CANCEL, replies_to(_CANCEL), None, late=lambda _: self._free_tag(tag), key=tag
        )
        pending.abandon()
        self._replies.append(pending)
        return encode_method(self.channel_id, _CANCEL, (tag, False))

    def _forget(self, tag: str, last: Callable[[Any], object] | None = None) -> None:
        """Drop a consumer; *last* takes what waits in the inbox, else that goes back."""
        retired = self._retired
        if retired is None:
            retired = self._retired = {}
        # What is in the inbox now is told apart from what a next consumer with that tag gets.
        ended = retired[tag] = [last]
        self.callbacks.pop(tag, None)
        self.cancel_callbacks.pop(tag, None)
        if isinstance(self.no_ack_consumers, set):
            self.no_ack_consumers.discard(tag)
        if not self.callbacks:
            self.connection.table.anchor(self.channel_id, self, False)

        def gone() -> object:
            if retired.get(tag) is ended:
                del retired[tag]
            return NOTHING

        if self.connection.inbox and not self.closed:
            self.connection.inbox.append(gone)
        else:
            gone()

    def has_consumer(self, consumer_tag: str) -> bool:
        """Tell whether there is such a consumer, if only its start was sent."""
        return consumer_tag in self.callbacks

    def basic_cancel(self, consumer_tag: str, nowait: bool = False, argsig: str = "sb") -> None:
        """Stop a consumer; one that is not known, or whose channel is dead, is ignored.

        Messages that wait in the inbox go back to their queue; those of a no_ack consumer, which
        exist nowhere else, are still delivered.
        """
        del argsig
        if consumer_tag not in self.callbacks or self.closed:
            self.callbacks.pop(consumer_tag, None)
            return
        try:
            if nowait:
                self._send(encode_method(self.channel_id, _CANCEL, (consumer_tag, True)))
            else:
                self._request(_CANCEL, (consumer_tag, False), key=consumer_tag)
        finally:
            no_ack = consumer_tag in self.no_ack_consumers
            self._forget(consumer_tag, self.callbacks.get(consumer_tag) if no_ack else None)

    def basic_qos(
        self, prefetch_size: int, prefetch_count: int, a_global: bool, argsig: str = "lBb"
    ) -> None:
        """Bound the unacknowledged deliveries.

        Args:
            prefetch_size: octets; RabbitMQ knows 0 (no bound) only.
            prefetch_count: messages; 0 is no bound.
            a_global: False: for each consumer started from now on; True: for the channel, which
                quorum queues and streams do not know: no consumer of theirs can be started then.
        """
        del argsig
        if prefetch_size:
            check_supported(self.connection, "a prefetch_size")
        # Before it is sent: another task that consumes meanwhile comes behind it, and must not send
        # the default.
        before = self._qos_set, self._shared_prefetch
        self._qos_set = True
        if a_global and prefetch_count:
            self._shared_prefetch = True
        try:
            self._request(_QOS, (prefetch_size, prefetch_count, a_global))
        except ArgumentError:  # nothing was sent
            self._qos_set, self._shared_prefetch = before
            raise
        if a_global and not prefetch_count:
            self._shared_prefetch = False

    def basic_get(self, queue: str = "", no_ack: bool = False, argsig: str = "Bsb") -> Any:
        """Take one message from a queue; None if it is empty.

        Raises:
            UnsupportedOperation: it is a stream; nothing was sent.
        """
        del argsig
        check_kind(self.connection, queue, "basic_get")
        reply = self._request(_GET, (0, queue, no_ack), late=None if no_ack else self._requeue_late)
        if reply.method is not _GET_OK:
            return None
        content = reply.content
        assert content is not None
        delivery_tag, redelivered, exchange, routing_key, message_count = reply.arguments
        extra = () if content.fault is None else (content.fault,)
        message = self.connection.Message(
            self.channel_id,
            None,
            delivery_tag,
            redelivered,
            exchange,
            routing_key,
            content.header,
            content.body,
            *extra,
        )
        message.channel = self
        message.no_ack = no_ack
        message.message_count = message_count
        return message

    def _requeue_late(self, reply: MethodEvent) -> None:
        """A message was taken after its task gave up: put it back."""
        if reply.method is _GET_OK:
            data = encode_reject(self.channel_id, reply.arguments[0], True)
            self.connection.exclusive(self._put_back, data)

    def _put_back(self, data: bytes) -> bytes:
        """Requeue a delivery; an exclusive step, since nothing may follow Channel.close."""
        if self.closed or self.is_closing:
            return b""  # the broker requeues it then
        return data

    def _give_back(self, message: Any) -> bytes:
        """Encode what settles a delivery that no consumer takes.

        A stream's never left it, and RabbitMQ ends the connection (540) when one is rejected.
        """
        if is_stream_delivery(message):
            return encode_ack(self.channel_id, message.delivery_tag, False)
        return encode_reject(self.channel_id, message.delivery_tag, True)

    def flow(self, active: bool) -> bool:
        """Stop, or resume, handing messages to this channel's consumers.

        RabbitMQ does not know Channel.flow (540), and cancelling the consumers would delete their
        auto-delete queues: so what comes is held here, bounded by the prefetch and, where there is
        none, by the socket not being read.
        """
        if self.closed:
            raise self._dead()
        if not active:
            if self._held is None:
                self._held = []
        elif self._held is not None:
            try:
                self._stream.hub.call_soon_threadsafe(self._hand_over_held)
            except HubError as exc:
                raise self._dead() from exc
        return active

    def _hand_over_held(self) -> None:
        """Put what was held into the inbox; called in the hub, where deliveries come in."""
        held, self._held = self._held, None
        if held:
            self.connection.inbox.extend(held)
            self.connection.intake.release(held)

    # -- settling

    def basic_ack(self, delivery_tag: int, multiple: bool = False, argsig: str = "Lb") -> None:
        """Acknowledge a delivery, or all up to it; never waits.

        Raises:
            StaleDeliveryError: the channel, or its connection, is gone, and the broker delivers
                the message again.
        """
        del argsig
        try:
            data = encode_ack(self.channel_id, delivery_tag, multiple)
        except StructError as exc:
            raise _bad_tag(delivery_tag) from exc
        self._settle(delivery_tag, data, multiple)

    def basic_reject(self, delivery_tag: int, requeue: bool = False, argsig: str = "Lb") -> None:
        """Refuse a delivery; never waits. Raises as `basic_ack`."""
        del argsig
        try:
            data = encode_reject(self.channel_id, delivery_tag, requeue)
        except StructError as exc:
            raise _bad_tag(delivery_tag) from exc
        self._settle(delivery_tag, data)

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = False) -> None:
        """Refuse a delivery, or all up to it (RabbitMQ); never waits. Raises as `basic_ack`."""
        try:
            data = encode_nack(self.channel_id, delivery_tag, multiple, requeue)
        except StructError as exc:
            raise _bad_tag(delivery_tag) from exc
        self._settle(delivery_tag, data, multiple)

    def _settle(self, delivery_tag: int, data: bytes, multiple: bool = False) -> None:
        try:
            if self._write(data):
                in_hand = self._in_hand
                if in_hand:
                    in_hand.pop(delivery_tag, None)
                    if multiple:
                        # In the order of delivery; 0 stands for all (AMQP 0-9-1, basic.ack).
                        for tag in list(in_hand):
                            if delivery_tag and tag > delivery_tag:
                                break
                            in_hand.pop(tag, None)
                return
        except StreamError:
            pass
        raise StaleDeliveryError(
            f"delivery {delivery_tag} came over {self.where}, which is gone ({self.error}); the "
            "broker delivers the message again"
        )

    def basic_recover(self, requeue: bool = False) -> None:
        """Have all unacknowledged deliveries of this channel delivered again.

        Args:
            requeue: to any consumer; RabbitMQ has nothing else.
        """
        if not requeue:
            check_supported(self.connection, "basic_recover(requeue=False)")
        self._request(_RECOVER, (requeue,))
        self._in_hand = None

    def basic_recover_async(self, requeue: bool = False) -> None:
        """Same as `basic_recover`, without an answer; deprecated by AMQP itself."""
        if not requeue:
            check_supported(self.connection, "basic_recover(requeue=False)")
        super().basic_recover_async(requeue)  # type: ignore[misc]  # amqp's

    @property
    def unsettled(self) -> int:
        """How many deliveries consumers have got and not acknowledged or refused yet."""
        in_hand = self._in_hand
        return len(in_hand) if in_hand else 0

    def _on_cancel(self, event: MethodEvent) -> None:
        """The broker stopped a consumer: its queue was deleted, or its node failed."""
        tag = event.arguments[0]
        self.connection.inbox.append(lambda: self._cancelled_by_broker(tag))

    def _cancelled_by_broker(self, consumer_tag: str) -> object:
        """Run in the draining task, behind the last delivery of that consumer."""
        if self.closed or consumer_tag not in self.callbacks:
            return NOTHING
        on_cancel = self.cancel_callbacks.get(consumer_tag)
        self._forget(consumer_tag)
        # Its queue is gone, or another one: what is refused must not depend on what it was.
        self.connection.kinds.clear()
        if on_cancel is None:
            return Failure(
                ConsumerCancelled(
                    f"broker {self.connection.broker} cancelled consumer {consumer_tag!r}: its"
                    " queue was deleted or moved",
                    _CANCEL.signature,
                )
            )
        return on_cancel(consumer_tag)


def _bad_tag(delivery_tag: object) -> ArgumentError:
    return ArgumentError(f"{delivery_tag!r} is no delivery tag of AMQP")
