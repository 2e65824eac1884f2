"""Consumers of a channel on pika: starting and stopping them, their deliveries, settling these."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from amqp.exceptions import ConsumerCancelled
from pika import spec

from greenkombu._amqp.errors import ArgumentError
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.refusals import SHARED_PREFETCH, check_kind, check_supported
from greenkombu._amqp.requests import NOTHING
from greenkombu._amqp.rpc import PendingReply
from greenkombu.exceptions import StaleDeliveryError
from greenkombu.transport.base import Failure
from greenkombu.transport.pika._ear import Delivery
from greenkombu.transport.pika._requests import Requests, Step, check_table, no_step

__all__ = ["Consuming"]

# What basic.get is answered with when the queue is empty.
_EMPTY = object()


class Consuming(Requests):
    """The consumers of one channel; see `greenkombu._amqp.consuming` for what holds of them.

    One difference: what is on its way to a no_ack consumer while that is being stopped is dropped
    by pika.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        # basic.get, of which pika knows one at a time: who waits for his turn, and whose it is.
        self._gets: deque[tuple[PendingReply, str, bool]] = deque()
        self._getting: PendingReply | None = None
        # Callbacks of cancelled no_ack consumers whose last messages wait in the inbox.
        self._retired: dict[str, Callable[[Any], object]] = {}
        # Tag -> what tells this start of a consumer from an earlier one with the same tag.
        self._starts: dict[str, object] = {}
        # Deliveries between flow(False) and flow(True).
        self._held: list[Delivery] | None = None
        # Delivery tags that callbacks have got and that are not settled, in the order of delivery.
        self._in_hand: dict[int, None] = {}
        self._qos_set = False
        self._shared_prefetch = False

    # -- deliveries: in the hub, then in the draining task

    def wants(self, tag: str, start: object) -> bool:
        """Tell whether a consumer is still the one that was started so."""
        return self._starts.get(tag) is start

    def delivered(self, message: Delivery, start: object) -> None:
        """Take a message for a consumer; called in the hub."""
        message.start = start
        if message.consumer_tag in self.no_ack_consumers:
            message.no_ack = True
        held = self._held
        if held is not None:
            held.append(message)
            self.connection.intake.hold(message)
        else:
            self.connection.inbox.append(message)

    def run_delivery(self, message: Delivery) -> object:
        """Call the consumer of a message; called by the draining task.

        Returns:
            `NOTHING` if there is none any more.
        """
        tag = message.consumer_tag or ""
        callback = self.callbacks.get(tag)
        if callback is not None and self.wants(tag, message.start):
            if not message.no_ack:
                self._in_hand[message.delivery_tag] = None
            return callback(message)
        if tag in self._retired:
            return self._retired[tag](message)
        if not message.no_ack:
            # Cancelled while it waited in the inbox.
            self._put_back(message.delivery_tag)
        return NOTHING

    def _put_back(self, delivery_tag: int) -> None:
        # If the channel is closed by now, the broker does it.
        self.connection.post(
            self._tell, lambda channel: channel.basic_reject(delivery_tag, requeue=True)
        )

    # -- consumers

    def basic_consume(
        self,
        queue: str = "",
        consumer_tag: str | None = "",
        no_local: bool = False,
        no_ack: bool = False,
        exclusive: bool = False,
        nowait: bool = False,
        callback: Callable[[Any], object] | None = None,
        arguments: Mapping[str, Any] | None = None,
        on_cancel: Callable[[str], object] | None = None,
        argsig: str = "BssbbbbF",
    ) -> str:
        """Start a consumer; see `greenkombu._amqp.consuming.Consuming.basic_consume`.

        Args:
            no_local: not known to pika, nor to RabbitMQ.
        """
        del argsig, no_local
        tag = consumer_tag or f"gk.{uuid4().hex}"
        if callback is None:
            raise ArgumentError("basic_consume needs a callback", (60, 20))
        if tag in self.callbacks:
            raise ArgumentError(f"consumer tag {tag!r} is in use on {self.where}", (60, 20))
        check_table(arguments, "Basic.consume: arguments")
        if self._shared_prefetch:
            check_kind(self.connection, queue, SHARED_PREFETCH)
        if self.closed:
            raise self._dead()
        default = self.connection.options.default_prefetch
        if not no_ack and not self._qos_set and default:
            self._qos_set = True
            self._ask("Basic.qos", _qos(0, default, False), nowait=True)
        # Known before the broker hears of it: a delivery may follow its answer at once.
        start = self._starts[tag] = object()
        self.callbacks[tag] = callback
        if on_cancel is not None:
            self.cancel_callbacks[tag] = on_cancel
        if no_ack:
            self.no_ack_consumers.add(tag)
        self.connection.table.anchor(self, True)

        def consume(channel: Any, done: Callable[[Any], None]) -> None:
            # Once more than needed: pika would keep the callback of a request it cannot send.
            spec.Basic.Consume(0, queue, tag, arguments=arguments).encode()
            delivered = functools.partial(ear.delivered, start)
            channel.basic_consume(queue, delivered, no_ack, exclusive, tag, arguments, done)

        ear = self._ear

        try:
            self._ask(
                "Basic.consume",
                consume,
                nowait=nowait,
            )
        except BaseException:
            self._stop(tag)
            self._forget(tag)
            raise
        return tag

    def _stop(self, tag: str) -> None:
        """Stop a consumer that is given up, if it was or will be started, before anything else."""
        cancel = PendingReply(BY_NAME["Basic.cancel"], frozenset(), None)
        self.connection.post(self._begin_next, cancel, _cancelling(tag))

    def _forget(self, tag: str) -> None:
        self.callbacks.pop(tag, None)
        self._starts.pop(tag, None)
        self.cancel_callbacks.pop(tag, None)
        self.no_ack_consumers.discard(tag)
        if not self.callbacks:
            self.connection.table.anchor(self, False)

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
            self._forget(consumer_tag)
            return
        try:
            self._ask(
                "Basic.cancel",
                _cancelling(consumer_tag),
                nowait=nowait,
            )
        except BaseException:
            self._stop(consumer_tag)
            raise
        finally:
            callback = self.callbacks.get(consumer_tag)
            inbox = self.connection.inbox
            if callback is not None and consumer_tag in self.no_ack_consumers and inbox:
                # For the messages that are in the inbox at this moment.
                self._retired[consumer_tag] = callback
                inbox.append(lambda: (self._retired.pop(consumer_tag, None) and NOTHING) or NOTHING)
            self._forget(consumer_tag)

    def _retire(self, tag: str) -> object:
        self._retired.pop(tag, None)
        return NOTHING

    def cancelled_by_broker(self, consumer_tag: str) -> object:
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
                    (60, 30),
                )
            )
        return on_cancel(consumer_tag)

    def basic_qos(
        self, prefetch_size: int, prefetch_count: int, a_global: bool, argsig: str = "lBb"
    ) -> None:
        """Bound the unacknowledged deliveries: messages, and octets (0 only on RabbitMQ).

        Args:
            a_global: False: for each consumer started from now on; True: for the channel.
        """
        del argsig
        if prefetch_size:
            check_supported(self.connection, "a prefetch_size")
        self._qos_set = True
        if a_global and prefetch_count:
            self._shared_prefetch = True
        self._ask("Basic.qos", _qos(prefetch_size, prefetch_count, a_global))
        if a_global and not prefetch_count:
            self._shared_prefetch = False

    def flow(self, active: bool) -> bool:
        """Stop, or resume, handing messages to this channel's consumers.

        RabbitMQ does not know Channel.flow (540), so what comes is held here.
        """
        if self.closed:
            raise self._dead()
        if not active:
            if self._held is None:
                self._held = []
        elif self._held is not None:
            self.connection.post(self._hand_over_held)
        return active

    def _hand_over_held(self) -> None:
        held, self._held = self._held, None
        if held:
            self.connection.inbox.extend(held)
            self.connection.intake.release(held)

    # -- one message

    def basic_get(self, queue: str = "", no_ack: bool = False, argsig: str = "Bsb") -> Any:
        """Take one message from a queue; None if it is empty."""
        del argsig
        check_kind(self.connection, queue, "basic_get")

        def begin(pending: PendingReply, step: Step) -> None:
            del step
            self._gets.append((pending, queue, no_ack))
            self._next_get()

        late = None if no_ack else self._requeue_late
        reply = self._ask("Basic.get", no_step, late=late, begin=begin)
        if reply is _EMPTY:
            return None
        method, properties, body = reply
        message = Delivery(self, method, properties, body, None)
        message.no_ack = no_ack
        return message

    def _next_get(self) -> None:
        while self._gets and self._getting is None:
            pending, queue, no_ack = self._gets.popleft()

            def get(channel: Any, _: object, queue: str = queue, no_ack: bool = no_ack) -> None:
                spec.Basic.Get(0, queue).encode()  # see basic_consume
                channel.basic_get(queue, self._ear.got, no_ack)

            self._getting = pending
            if not self._run(pending, get):
                self._getting = None

    def got(self, reply: tuple[Any, Any, bytes] | None) -> None:
        """Take the answer to the basic.get whose turn it is; called in the hub."""
        pending, self._getting = self._getting, None
        if pending is not None:
            self._waiting.pop(pending, None)
            answer: Any = _EMPTY if reply is None else reply
            pending.answer(answer)
        self._next_get()

    def _requeue_late(self, reply: Any) -> None:
        """A message was taken after its task gave up: put it back."""
        if reply is not _EMPTY:
            self._put_back(reply[0].delivery_tag)

    # -- settling

    def basic_ack(self, delivery_tag: int, multiple: bool = False, argsig: str = "Lb") -> None:
        """Acknowledge a delivery, or all up to it; never waits.

        Raises:
            StaleDeliveryError: the channel, or its connection, is gone, and the broker delivers
                the message again.
        """
        del argsig
        self._settle(
            delivery_tag, lambda channel: channel.basic_ack(delivery_tag, multiple), multiple
        )

    def basic_reject(self, delivery_tag: int, requeue: bool = False, argsig: str = "Lb") -> None:
        """Refuse a delivery; never waits. Raises as `basic_ack`."""
        del argsig
        self._settle(delivery_tag, lambda channel: channel.basic_reject(delivery_tag, requeue))

    def basic_nack(self, delivery_tag: int, multiple: bool = False, requeue: bool = False) -> None:
        """Refuse a delivery, or all up to it (RabbitMQ); never waits. Raises as `basic_ack`."""
        self._settle(
            delivery_tag,
            lambda channel: channel.basic_nack(delivery_tag, multiple, requeue),
            multiple,
        )

    def _settle(
        self, delivery_tag: int, step: Callable[[Any], object], multiple: bool = False
    ) -> None:
        if not isinstance(delivery_tag, int) or not 0 <= delivery_tag < 1 << 64:
            raise ArgumentError(f"{delivery_tag!r} is no delivery tag of AMQP")
        if self.closed or self.is_closing:
            raise StaleDeliveryError(
                f"delivery {delivery_tag} came over {self.where}, which is gone ({self.error});"
                " the broker delivers the message again"
            )
        self.connection.post(self._tell, step)
        self._in_hand.pop(delivery_tag, None)
        if multiple:
            # In the order of delivery; 0 stands for all (AMQP 0-9-1, basic.ack).
            for tag in list(self._in_hand):
                if delivery_tag and tag > delivery_tag:
                    break
                self._in_hand.pop(tag, None)

    def basic_recover(self, requeue: bool = False) -> None:
        """Have all unacknowledged deliveries of this channel delivered again.

        Args:
            requeue: to any consumer; RabbitMQ has nothing else.
        """
        if not requeue:
            check_supported(self.connection, "basic_recover(requeue=False)")
        self._ask("Basic.recover", lambda channel, done: channel.basic_recover(requeue, done))
        self._in_hand.clear()

    @property
    def unsettled(self) -> int:
        """How many deliveries consumers have got and not acknowledged or refused yet."""
        return 0 if self.closed else len(self._in_hand)


def _qos(size: int, count: int, a_global: bool) -> Step:
    return lambda channel, done: channel.basic_qos(size, count, a_global, done)


def _cancelling(tag: str) -> Step:
    def cancel(channel: Any, done: Callable[[Any], None]) -> None:
        if tag in channel.consumer_tags:
            channel.basic_cancel(tag, done)
        else:
            done(tag)  # the broker was first, or another task

    return cancel
