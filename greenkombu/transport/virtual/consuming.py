"""The consuming half of a virtual channel: consumers, deliveries, and what becomes of them.

A message is fetched by the task that drains (`ConsumingChannel._fetch`), one for each event, and
is noted as unsettled before any code of the user's runs.  From the fetch to that note there is no
place where another task could run or a kill could land.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from queue import Empty
from typing import Any

from greenkombu import exceptions
from greenkombu._arguments import message_count
from greenkombu._forks import generation
from greenkombu.transport._connection import Failure
from greenkombu.transport.virtual.abstract import AbstractChannel
from greenkombu.transport.virtual.consumers import Consumer, Registry
from greenkombu.transport.virtual.message import Message, new_delivery_tag
from greenkombu.transport.virtual.qos import QoS
from greenkombu.utils.scheduling import FairCycle
from hub.environment import get_environment
from hub.finalize import Finalizer, Home, defer
from hub.shared import get_hub

__all__ = ["ConsumingChannel"]

# Inside the class its attributes hide these names from annotations.
_Message = Message
_QoS = QoS


def _ignore(message: Any) -> None:
    del message


class ConsumingChannel(AbstractChannel):
    """Consumers, prefetch, acknowledgements."""

    #: Message class.
    Message: type[_Message] = Message
    #: Class of `qos`.
    QoS: type[_QoS] = QoS
    #: Put unsettled messages back when the channel closes, is dropped, or the process exits.
    do_restore = True

    no_ack_consumers: set[str] | None

    def _init_consuming(self) -> None:
        self._no_ack_tags: set[str] = set()
        self.no_ack_consumers = self._no_ack_tags
        # The watches that this channel's consumers are in.
        self._registry: Registry = self.connection.registry
        self._consumers: dict[str, Consumer] = {}
        # Consumers that wait for the prefetch limit, the longest first.
        self._blocked: OrderedDict[Consumer, None] = OrderedDict()
        self._qos: _QoS | None = None
        self._cycle: FairCycle[str] | None = None
        self._finalizer: Finalizer | None = None

    def _check_delivery(self, delivery_tag: Any) -> None:
        if not self.closed:
            return
        if self.connection.connected:
            raise exceptions.ChannelClosedError(
                f"cannot settle delivery {delivery_tag}: its channel {self.channel_id} is closed, "
                "and closing put it back on its queue"
            )
        raise exceptions.StaleDeliveryError(
            f"cannot settle delivery {delivery_tag}: it came over a connection that is closed; "
            "the message will be delivered again"
        )

    # -- prefetch

    @property
    def qos(self) -> _QoS:
        """The prefetch limit, and the unsettled deliveries."""
        qos = self._qos
        if qos is None:
            qos = self._qos = self.QoS(self)  # type: ignore[arg-type]
        return qos

    @property
    def unsettled(self) -> int:
        """How many deliveries are not settled yet."""
        return 0 if self._qos is None else len(self._qos._delivered)

    def basic_qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> None:
        """Bound the unsettled deliveries of this channel.

        Args:
            prefetch_size: not supported; bytes.
            prefetch_count: how many deliveries may be unsettled; 0 is no limit.
            apply_global: the limit is always one for the whole channel.
        """
        del prefetch_size, apply_global
        self._check_open("set the prefetch")
        self.qos.prefetch_count = message_count("prefetch_count", prefetch_count)
        self._unblock()

    def _unblock(self) -> None:
        """Make the consumer that waits longest for the prefetch limit ready.

        One is enough: when it was served or found nothing, `_fetch` sees to the next.
        """
        blocked = self._blocked
        while blocked and self.qos.can_consume():
            try:
                consumer, _ = blocked.popitem(last=False)
            except KeyError:
                return
            if not consumer.cancelled:
                self.connection._make_ready(consumer)
                return

    # -- consumers

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[[Any], object] | None = None,
        consumer_tag: str | None = None,
        **kwargs: Any,  # noqa: ARG002  nowait, arguments: nothing to do with them here
    ) -> str:
        """Start a consumer.

        Args:
            queue: its name.
            no_ack: deliveries need no acknowledgement.
            callback: called with each message, by the task that drains.
            consumer_tag: its name on this channel; None or '' makes one.

        Returns:
            The consumer tag.

        Raises:
            ChannelError: (530) the tag is in use on this channel.
        """
        self._check_open(f"consume from queue {queue!r}")
        tag = consumer_tag or f"amq.ctag-{new_delivery_tag()}"
        if tag in self._consumers:
            raise exceptions.ChannelError(
                f"NOT_ALLOWED - the consumer tag {tag!r} is in use on channel {self.channel_id}; "
                "cancel that consumer, or choose another tag",
                (60, 20),
                "Channel.basic_consume",
                "530",
            )
        registry = self._registry
        while True:
            consumer = Consumer(
                self, queue, bool(no_ack), callback or _ignore, tag, registry.watch(queue)
            )
            if consumer.watch.add(consumer):
                break
        self._consumers[tag] = consumer
        if no_ack:
            self._no_ack_tags.add(tag)
        self._reset_cycle()
        self.connection._make_ready(consumer)
        return tag

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop a consumer; an unknown tag is ignored. What was delivered stays delivered."""
        self._cancel(consumer_tag)

    def _cancel(self, consumer_tag: str) -> None:
        consumer = self._consumers.pop(consumer_tag, None)
        if consumer is None:
            return
        consumer.cancelled = True
        self._no_ack_tags.discard(consumer_tag)
        self._blocked.pop(consumer, None)
        self._reset_cycle()
        self.connection._forget_ready(consumer)
        consumer.watch.remove(consumer)
        self._registry.drop_unused(consumer.queue)

    # -- deliveries

    def _take(self, queue: str) -> tuple[Any, Any]:
        """Take the next message off a queue.

        Returns:
            Its dict, and what the store needs to find it again.

        Raises:
            queue.Empty: there is none.
        """
        return self._get(queue), None

    def _take_for(self, consumer: Consumer) -> tuple[Any, Any]:
        """Take the next message for a consumer; see `_take`."""
        return self._take(consumer.queue)

    def _make_message(self, raw: Any, queue: str | None, token: Any) -> _Message:
        message = self.Message(raw, channel=self)  # type: ignore[arg-type]
        message.queue = queue
        message._token = token
        return message

    def _serve(self, consumer: Consumer) -> bool | Failure:
        """Deliver one message to a consumer that was ready.

        Returns:
            False if there was none, or it may not have one; the consumer waits then.  Or a
            failure of the store.
        """
        try:
            message = self._fetch(consumer)
        except self._store_errors as exc:
            return Failure(exc)
        if message is None:
            return False
        consumer.callback(message)
        return True

    @property
    def _store_errors(self) -> tuple[type[BaseException], ...]:
        transport = self.connection.transport
        return (*transport.connection_errors, *transport.channel_errors)

    def _fetch(self, consumer: Consumer) -> _Message | None:
        """Take a message for a consumer that was ready, and note it as unsettled.

        Returns:
            None if there was none, or it may not have one; the consumer waits then.
        """
        watch = consumer.watch
        qos: _QoS | None = None
        if consumer.cancelled:  # whoever cancelled it has told the next
            return None
        if not consumer.no_ack:
            qos = self._qos or self.qos
            if not qos.can_consume():
                self._block(consumer, qos)
                return None
        queue = consumer.queue
        ready = self.connection._ready
        try:
            raw, token = self._take_for(consumer)
        except Empty:
            if watch.park(consumer):
                self.connection._parked()
            else:
                ready.append(consumer)
            if self._blocked:
                self._unblock()
            return None
        except BaseException:
            # The store failed, not the consumer: it goes on when the program drains again.
            ready.append(consumer)
            raise
        try:
            message = self._make_message(raw, queue, token)
            if qos is not None:
                qos.append(message, message.delivery_tag)
        except BaseException:
            ready.append(consumer)
            self._requeue(queue, raw, token)
            raise
        if qos is not None and qos.exceeded():
            # Another thread drains this channel too, and both had looked before one of them took.
            self._blocked[consumer] = None
            qos.reject(message.delivery_tag, requeue=True)
            return None
        # In its place before the callback runs, which may raise, cancel, or drain.
        source = watch.source
        if source is None or source or not watch.park(consumer):
            ready.append(consumer)
        if self._blocked:
            self._unblock()
        return message

    def _block(self, consumer: Consumer, qos: _QoS) -> None:
        self._blocked[consumer] = None
        # An acknowledgement may have come in between, in another thread.
        if qos.can_consume():
            self._unblock()
        consumer.watch.hand_over()

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:  # noqa: ARG002
        """Take one message off a queue.

        Returns:
            A message; None if there is none.
        """
        self._check_open(f"get from queue {queue!r}")
        try:
            raw, token = self._take(queue)
        except Empty:
            return None
        try:
            message = self._make_message(raw, queue, token)
            if not no_ack:
                self.qos.append(message, message.delivery_tag)
        except BaseException:
            self._requeue(queue, raw, token)
            raise
        return message

    def basic_ack(self, delivery_tag: Any, multiple: bool = False) -> None:
        """Acknowledge a delivery; an unknown tag is ignored.

        Args:
            delivery_tag: of the message.
            multiple: also every unsettled delivery of this channel before it.

        Raises:
            StaleDeliveryError: its connection is closed; the message is delivered again.
            ChannelClosedError: its channel is closed; the message went back to its queue.
        """
        if self.closed:
            self._check_delivery(delivery_tag)
        if multiple:
            self.qos.ack_up_to(delivery_tag)
        else:
            self.qos.ack(delivery_tag)

    def basic_reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Refuse a delivery; an unknown tag is ignored.

        Args:
            delivery_tag: of the message.
            requeue: put it back; otherwise its queue dead-letters or drops it.

        Raises:
            StaleDeliveryError, ChannelClosedError: see `basic_ack`.
        """
        if self.closed:
            self._check_delivery(delivery_tag)
        self.qos.reject(delivery_tag, requeue=requeue)

    def basic_recover(self, requeue: bool = False) -> list[tuple[BaseException, dict[str, Any]]]:
        """Put every unsettled delivery of this channel back on its queue.

        Args:
            requeue: must be true.

        Returns:
            The messages that could not be put back, each with the reason; they stay unsettled.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) requeue is false.
        """
        self._check_open("recover")
        if not requeue:
            raise exceptions.UnsupportedOperation(
                "virtual channels do not support recover(requeue=False); use requeue=True"
            )
        return self.qos.restore_unacked()

    # -- putting back

    @property
    def _restores_unacked(self) -> bool:
        return self.do_restore

    def _requeue(self, queue: str | None, raw: Any, token: Any) -> None:
        """Put a message back on its queue, at the head where the store can do that."""
        if isinstance(raw, dict) and "properties" in raw:
            properties = {**raw["properties"], "delivery_tag": self._next_delivery_tag()}
            raw = {**raw, "properties": properties, "redelivered": True}
        self._restore_at_beginning(self._make_message(raw, queue, token))

    def _restore_at_beginning(self, message: _Message) -> Any:
        """Put a message back at the head of its queue; here it goes where `_restore` puts it."""
        return self._restore(message)

    def _restore(self, message: _Message) -> Any:  # noqa: ARG002
        """Put a message back on its queue, or on all of its routing if the queue is not known."""
        raise self._missing("_restore")

    def _discard(self, queue: str | None, raw: Any, token: Any) -> None:
        """Get rid of a message that a consumer refused."""

    def _next_delivery_tag(self) -> Any:
        raise self._missing("_next_delivery_tag")

    def _guard_deliveries(self, delivered: dict[Any, Any]) -> None:
        """See to it that deliveries go back when the channel is dropped without being closed."""
        restorer = self._make_restorer()
        if restorer is not None:
            self._finalizer = Finalizer(self, restorer, delivered)
            # At exit the channel still lives, and `QoS` asks it.
            self._finalizer.atexit = False

    def _make_restorer(self) -> Callable[[dict[Any, Any]], object] | None:
        """Return a function that puts deliveries back when this channel is gone.

        It must not refer to the channel, and runs in the garbage collector: nothing may wait there.
        The one returned here leaves the work to a task with a connection of its own.
        """
        client = self.connection.client
        if client is None:
            return None
        params = client.clone()
        made_in = generation()
        get_hub()  # the hub that the work is left to; a finalizer cannot make one
        home = Home()

        def restore_later(delivered: dict[Any, Any]) -> None:
            # A child of a fork that inherited the deliveries has not received them.
            if delivered and generation() == made_in:
                defer(_spawn_restore, params, delivered, home=home)

        return restore_later

    # -- one channel alone

    @property
    def cycle(self) -> FairCycle[str]:
        """The queues of this channel's consumers, fairly in turn."""
        cycle = self._cycle
        if cycle is None:
            queues = list(dict.fromkeys(each.queue for each in self._consumers.values()))
            cycle = self._cycle = FairCycle(self._get_and_deliver, queues, Empty)
        return cycle

    def _reset_cycle(self) -> None:
        self._cycle = None

    def drain_events(
        self, timeout: float | None = None, callback: Callable[..., object] | None = None
    ) -> Any:
        """Deliver one message of this channel alone, without waiting.

        Args:
            timeout: seconds that the store may take for the fetch, where it can wait.
            callback: called as (message dict, queue) instead of the queue's consumer.

        Raises:
            queue.Empty: there is none, or the prefetch limit is reached.
        """
        self._check_open("drain")
        if not self._consumers or not self.qos.can_consume():
            raise Empty()
        return self._poll(self.cycle, callback or self._dispatch, timeout=timeout)

    def _poll(
        self,
        cycle: FairCycle[str],
        callback: Callable[..., object],
        timeout: float | None = None,  # noqa: ARG002
    ) -> Any:
        return cycle.get(callback)

    def _get_and_deliver(self, queue: str, callback: Callable[..., object]) -> None:
        raw, _ = self._take(queue)
        callback(raw, queue)

    def _dispatch(self, raw: Any, queue: str) -> None:
        for consumer in list(self._consumers.values()):
            if consumer.queue == queue:
                message = self._make_message(raw, queue, None)
                if not consumer.no_ack:
                    self.qos.append(message, message.delivery_tag)
                consumer.callback(message)
                return
        self._requeue(queue, raw, None)

    # -- closing

    def _close_consuming(self) -> None:
        """Cancel the consumers and give the unsettled deliveries back."""
        for tag in list(self._consumers):
            self.basic_cancel(tag)
        qos = self._qos
        if qos is not None:
            qos.restore_unacked_once()
        self._release()

    def _abandon(self) -> None:
        """Stop, without asking the store, because the connection is dead."""
        self.closed = True
        for tag in list(self._consumers):
            self._cancel(tag)
        self._release()

    def _release(self) -> None:
        finalizer, self._finalizer = self._finalizer, None
        if finalizer is not None:
            finalizer.detach()
        # Nothing of the closed channel refers to it.
        self._qos = None
        self._cycle = None


def _spawn_restore(params: Any, delivered: dict[Any, Any]) -> None:
    get_environment().spawn(_restore_through, params, delivered)


def _restore_through(params: Any, delivered: dict[Any, Any]) -> None:
    with params, contextlib.closing(params.channel()) as channel:
        for delivery in reversed(list(delivered.values())):
            channel._requeue(*delivery)
