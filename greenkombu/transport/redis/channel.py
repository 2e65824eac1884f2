"""The channel of the Redis transport: AMQP's methods on lists, sets and subscriptions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import Empty
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import Deadline
from greenkombu.exceptions import InconsistencyError
from greenkombu.transport._connection import Failure
from greenkombu.transport.redis._attributes import Attributes
from greenkombu.transport.redis._batch import Batch
from greenkombu.transport.redis._fanout import FanoutQueue
from greenkombu.transport.redis._held import Held, put_back, take
from greenkombu.transport.redis._payload import dumps, loads
from greenkombu.transport.redis._restore import redelivered
from greenkombu.transport.redis._taps import Tap, Taps
from greenkombu.transport.redis._unacked import QoS
from greenkombu.transport.virtual import base as virtual
from greenkombu.transport.virtual.consumers import Consumer, Registry
from greenkombu.transport.virtual.exchange import (
    DirectExchange,
    HeadersExchange,
    TopicExchange,
)
from greenkombu.transport.virtual.message import copy_message

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.connection import Connection
    from greenkombu.transport.virtual.exchange import ExchangeType

__all__ = ["Channel"]

# Exchange types that route by their table; others, a program's own among them, deliver themselves.
_BY_TABLE = (DirectExchange, TopicExchange, HeadersExchange)


class Channel(Attributes, virtual.Channel):
    """A channel to a Redis server; see `Attributes` for what programs may set and use.

    A transport option of the same name goes before an attribute in `from_transport_options`, for
    all channels of a connection. Attributes of a channel tell what holds; changing them there
    changes nothing.
    """

    QoS = QoS

    def __init__(self, connection: Connection, **kwargs: Any) -> None:
        self.redis = connection
        self.taps = Taps(self)
        connection.add_tokens(self.taps.tokens)
        self._fanout_queues: dict[str, FanoutQueue] = {}
        # Queues that go with their last consumer.
        self._auto_delete: set[str] = set()
        super().__init__(connection, **kwargs)
        # Of its own: the buffers of two channels are two sources, even for one queue.
        self._registry = Registry()

    # -- publishing

    def _send(self, stored: Any, exchange: str, routing_key: str, **kwargs: Any) -> int | None:
        if not exchange:
            # The nameless exchange knows every queue; one that nobody declared begins to exist.
            return self._put_each([routing_key], stored, **kwargs)
        kind = self.typeof(exchange)
        if not self._routes_by_table(kind):
            return super()._send(stored, exchange, routing_key, **kwargs)
        return self._send_by_table(stored, exchange, routing_key, set(), kind)

    @staticmethod
    def _routes_by_table(kind: ExchangeType) -> bool:
        return type(kind) in _BY_TABLE

    def _send_by_table(
        self,
        stored: Any,
        exchange: str,
        routing_key: str,
        done: set[str],
        kind: ExchangeType | None = None,
    ) -> int:
        """Send to the queues of a binding table but those in `done`, which it adds to."""
        bindings = self.redis.bindings
        make_table = (kind or self.typeof(exchange)).make_table
        sent: dict[str, tuple[tuple[Any, ...], QueueKeys]] = {}
        while True:
            table = bindings.table(exchange, make_table)
            queues = table.match(routing_key, stored["headers"])
            for queue in sent.keys() - queues:
                # It was unbound before the message came there, and this client heard it too late.
                (_, key, payload), route = sent.pop(queue)
                self.redis.call("LREM", key, 1, payload, route=route)
                done.discard(queue)
            if done:
                queues = [queue for queue in queues if queue not in done]
            if not queues and not done:
                if not bindings.still_holds(exchange, table):
                    continue
                queues = self._undeliverable(exchange, routing_key)
            done.update(queues)
            commands, routes = self._pushes(queues, stored)
            self._send_pushes(commands, routes)
            if bindings.holds(exchange, table):
                return len(done)
            sent.update(zip(queues, zip(commands, routes, strict=True), strict=True))

    def basic_publish_batch(self, messages: Sequence[tuple[Any, Mapping[str, Any]]]) -> None:
        """Publish messages in few writes, and wait for all answers; parks the task.

        Args:
            messages: (message, arguments of `basic_publish`), in order.

        Raises:
            The first error. The server may have taken any of the messages.
        """
        self._check_open("publish a batch")
        times = [
            each
            for _, given in messages
            for each in (given.get("timeout"), given.get("confirm_timeout"))
            if each is not None
        ]
        with Deadline(min(times, default=None)):
            batch = Batch(self)
            for message, given in messages:
                exchange, routing_key = given.get("exchange") or "", given.get("routing_key") or ""
                stored = self._to_store(message, exchange, routing_key)
                batch.add(stored, exchange, routing_key, bool(given.get("mandatory")))
            batch.send()

    def _put_each(self, queues: Any, message: Any, **kwargs: Any) -> int:
        del kwargs
        commands, routes = self._pushes(queues, message)
        self._send_pushes(commands, routes)
        return len(commands)

    def _send_pushes(self, commands: list[tuple[Any, ...]], routes: list[QueueKeys]) -> None:
        if len(commands) == 1:
            self.redis.call(*commands[0], route=routes[0])
        elif commands:
            self.redis.call_each(commands, routes)

    def _pushes(
        self, queues: Iterable[str], message: Any
    ) -> tuple[list[tuple[Any, ...]], list[QueueKeys]]:
        """Return commands that push a message, and copies of it, and where each goes."""
        commands: list[tuple[Any, ...]] = []
        routes = []
        for queue in queues:
            if commands:
                message = copy_message(message, self._next_delivery_tag())
            keys = self.redis.keys.of(queue)
            step = self.redis.keys.step(message["properties"].get("priority"))
            payload = dumps(message)
            commands.append(("LPUSH", keys.lists[step], payload))
            routes.append(keys)
        return commands, routes

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        self._put_each([queue], message, **kwargs)

    def _put_fanout(
        self, exchange: str, message: Any, routing_key: str | None = None, **kwargs: Any
    ) -> None:
        del kwargs
        self.redis.call_many(self._broadcasts(exchange, message, routing_key or ""))

    def _broadcasts(self, exchange: str, message: Any, routing_key: str) -> list[tuple[Any, ...]]:
        """Return commands that broadcast a message."""
        channel = self.redis.keys.fanout_channel(exchange, routing_key)
        return [("PUBLISH", channel, dumps(message))]

    # -- consuming

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[[Any], object] | None = None,
        consumer_tag: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Start a consumer; see `virtual.Channel.basic_consume`.

        Of a queue that is bound to a fanout exchange it gets what is published from now on.
        """
        self._check_open(f"consume from queue {queue!r}")
        self._subscribe(queue)
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def _subscribe(self, queue: str) -> None:
        """Subscribe to the fanout exchanges that a queue is bound to, if there are any."""
        bindings = [
            (each.exchange, each.routing_key)
            for each in self.state.queue_bindings(queue)
            if self.typeof(each.exchange).type == "fanout"
        ]
        if bindings:
            found = self._fanout_queues.get(queue)
            if found is None:
                found = self._fanout_queues.setdefault(queue, FanoutQueue(self, queue))
            self.redis.fanout.subscribe(found, bindings)

    def _unsubscribe(self, queue: str) -> None:
        found = self._fanout_queues.pop(queue, None)
        if found is not None:
            self.redis.fanout.unsubscribe(found)

    def _take_for(self, consumer: Consumer) -> tuple[Any, Any]:
        queue = consumer.queue
        fanout = self._fanout_queues.get(queue)
        if fanout is not None:
            buffer: Any = fanout.buffer
            tap = None
        else:
            tap = self.taps.by_queue.get(queue)
            if tap is None:
                tap = self.taps.open(queue, consumer.no_ack)
            elif tap.free and not consumer.no_ack:
                self.taps.must_ack(tap)
            buffer = tap.buffer
        watch = consumer.watch
        if watch.source is not buffer:
            watch.attach(buffer)
        held: Held | None = None
        try:
            if fanout is not None:
                raw = fanout.take()
            else:
                raw, held = buffer.popleft()
        except IndexError:
            raise Empty from None
        if tap is not None:
            self.taps.taken(tap)
        if held is not None and (consumer.no_ack or not self.ack_emulation):
            self.forget(held)
        return loads(raw), held

    def _make_message(self, raw: Any, queue: str | None, token: Held | None) -> Any:
        message = super()._make_message(raw, queue, token)
        if token is not None:
            # A tag of its own for each delivery: an ack that comes too late is for one that is
            # gone, and never for the next delivery of the same message.
            message.delivery_tag = token.token.decode()
        return message

    def tell(self, queue: str, count: int) -> None:
        """Tell consumers that messages have come; in the hub."""
        watch = self._registry.get(queue)
        if watch is not None:
            for _ in range(count):
                watch.wake()

    def tap_failed(self, error: BaseException) -> None:
        """Raise an error of the server in a task that drains; in the hub."""
        if self.redis.error is None:
            self.connection.inbox.append(lambda: Failure(error))

    def next_tap(self, starving: Mapping[Tap, None]) -> Tap:
        """Choose which of several queues is to have the room that has become free."""
        if self.queue_order_strategy == "sorted":
            return min(starving, key=lambda tap: tap.keys.queue)
        if self.queue_order_strategy == "priority":
            # A copy: tasks of other threads open taps, and close them, before the hub hears of it.
            for tap in list(self.taps.by_queue.values()):
                if tap in starving:
                    return tap
        return next(iter(starving))

    def forget(self, held: Held) -> None:
        """Acknowledge a message of this channel."""
        if self.taps.tokens.pop(held.token, None) is not None:
            self.redis.acks.add(held)
            self.taps.settled()

    def basic_cancel(self, consumer_tag: str) -> None:
        """Stop a consumer; an unknown tag is ignored. What was delivered stays delivered.

        Messages that were fetched for it and not delivered are in the queue again afterwards. A
        queue that was declared auto_delete goes with its last consumer.
        """
        consumer = self._consumers.get(consumer_tag)
        super().basic_cancel(consumer_tag)
        self.taps.await_closed()
        queue = "" if consumer is None else consumer.queue
        if queue in self._auto_delete and not self._is_consumed(queue):
            self._auto_delete.discard(queue)
            self.queue_delete(queue)

    def _cancel(self, consumer_tag: str) -> None:
        consumer = self._consumers.get(consumer_tag)
        super()._cancel(consumer_tag)
        if consumer is None:
            return
        queue = consumer.queue
        if not self._is_consumed(queue):
            consumer.watch.source = None
            self._registry.drop_unused(queue)
            self.taps.close_tap(queue)
            self._unsubscribe(queue)

    def _is_consumed(self, queue: str) -> bool:
        watch = self._registry.get(queue)
        return watch is not None and len(watch) > 0

    def basic_publish(
        self,
        message: Mapping[str, Any],
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Publish a message; see `virtual.Channel.basic_publish`.

        Returns when the server has it. A timeout in seconds bounds the whole.
        """
        bound = timeout if confirm_timeout is None else confirm_timeout
        if bound is None:
            super().basic_publish(message, exchange, routing_key, mandatory, immediate, **kwargs)
            return
        with Deadline(bound):
            super().basic_publish(message, exchange, routing_key, mandatory, immediate, **kwargs)

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002
        return self._take(queue)[0]

    def _take(self, queue: str) -> tuple[Any, Any]:
        """Take a message off the server; parks the task."""
        fanout = self._fanout_queues.get(queue)
        if fanout is not None:
            try:
                return loads(fanout.take()), None
            except IndexError:
                raise Empty from None
        redis = self.redis
        keys = redis.keys.of(queue)
        redis.uses(keys)
        taken = take(self.taps, keys)
        if taken is None:
            raise Empty
        raw, held = taken
        return loads(raw), held

    def basic_qos(
        self, prefetch_size: int = 0, prefetch_count: int = 0, apply_global: bool = False
    ) -> None:
        """Bound the unsettled deliveries; see `virtual.Channel.basic_qos`.

        What waits here to be drained counts as well. A lower limit holds for what is taken from
        now on.
        """
        super().basic_qos(prefetch_size, prefetch_count, apply_global)
        self.redis.hub.call_here(self.taps.look)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Take one message off a queue; see `virtual.Channel.basic_get`."""
        message = super().basic_get(queue, no_ack, **kwargs)
        held = None if message is None else message._token
        if held is not None and (no_ack or not self.ack_emulation):
            self.forget(held)
        return message

    # -- putting back

    def _requeue(self, queue: str | None, raw: Any, token: Held | None) -> None:
        if token is None:
            fanout = self._fanout_queues.get(queue or "")
            if fanout is not None:
                fanout.put_back(dumps(raw))
                self.tell(fanout.queue, 1)
            return
        self.taps.tokens.pop(token.token, None)
        put_back(self.redis, token, dumps(redelivered(raw)) if isinstance(raw, dict) else b"")
        self.taps.settled()

    def _discard(self, queue: str | None, raw: Any, token: Held | None) -> None:
        super()._discard(queue, raw, token)
        if token is not None:
            self.forget(token)

    def restore_visible(self, most: int | None = None) -> int:
        """Put back what clients left that are gone.

        Args:
            most: messages; None takes the option unacked_restore_limit.

        Returns:
            How many there were.
        """
        redis = self.redis
        indexes = redis.indexes() or [redis.keys.of("")]
        return sum(redis.leases.restore_visible(keys, None, most) for keys in indexes)

    # -- declaring

    def queue_declare(self, queue: str | None = None, passive: bool = False, **kwargs: Any) -> Any:
        """Declare a queue; see `virtual.Channel.queue_declare`.

        A queue without messages does not exist on the server: a passive declaration finds one
        that has messages, or that this connection has declared or consumes.
        """
        answer = super().queue_declare(queue, passive, **kwargs)
        if kwargs.get("auto_delete") and not passive:
            self._auto_delete.add(answer.queue)
        return answer

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        del kwargs
        self.redis.declared[queue] = None

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:
        del kwargs
        if queue in self.redis.declared:
            return True
        keys = self.redis.keys.of(queue)
        if self.redis.taps_of(keys):
            return True  # it may be empty because what it had waits here
        return bool(self.redis.call("EXISTS", *keys.lists, route=keys))

    def _size(self, queue: str) -> int:
        fanout = self._fanout_queues.get(queue)
        if fanout is not None:
            return len(fanout.buffer)
        keys = self.redis.keys.of(queue)
        count: int = sum(self.redis.call_many([("LLEN", name) for name in keys.lists], keys))
        # What waits here to be drained is in the queue, to this program.
        return count + sum(len(tap.buffer) for tap in self.redis.taps_of(keys))

    def _purge(self, queue: str) -> int:
        fanout = self._fanout_queues.get(queue)
        if fanout is not None:
            return fanout.purge()
        keys = self.redis.keys.of(queue)
        commands: list[tuple[Any, ...]] = [("MULTI",)]
        commands += [("LLEN", name) for name in keys.lists]
        commands += [("DEL", *keys.lists), ("EXEC",)]
        counts: list[int] = self.redis.call_many(commands, keys)[-1]
        return sum(counts[:-1]) + sum(tap.purge() for tap in self.redis.taps_of(keys))

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:
        del kwargs
        if args:
            exchange, *binding = args
            self.redis.bindings.remove(exchange, tuple(binding))
        self.redis.declared.pop(queue, None)
        keys = self.redis.keys.of(queue)
        self.redis.call("DEL", *keys.lists, route=keys)

    def _bind(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        arguments: Mapping[str, Any] | None,
        method: str,
    ) -> None:
        super()._bind(queue, exchange, routing_key, arguments, method)
        # Each time: the server may have lost what this process declared before.
        binding = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        self.redis.bindings.write([(exchange, *binding)])
        if queue in self._fanout_queues:
            self._subscribe(queue)

    def _unbind(
        self, queue: str, exchange: str, routing_key: str, arguments: Mapping[str, Any] | None
    ) -> None:
        super()._unbind(queue, exchange, routing_key, arguments)
        binding = self.typeof(exchange).prepare_bind(queue, exchange, routing_key, arguments)
        self.redis.bindings.remove(exchange, binding)

    def exchange_delete(self, exchange: str, if_unused: bool = False, nowait: bool = False) -> None:
        """Delete an exchange and its bindings; see `virtual.Channel.exchange_delete`."""
        try:
            super().exchange_delete(exchange, if_unused, nowait)
        except InconsistencyError:
            self.state.drop_exchange(exchange)  # somebody was faster
        self.redis.bindings.delete(exchange)

    def get_table(self, exchange: str) -> list[tuple[str, str | None, str]]:
        """Return the bindings of an exchange, as the server has them.

        Raises:
            InconsistencyError: it has none, though this transport has bound queues to it.
        """
        table = self._table_of(exchange)
        declared = self.state.exchanges.get(exchange)
        if not table and declared is not None and any(declared["table"]):
            key = self.redis.keys.binding(exchange).decode()
            raise InconsistencyError(
                f"the bindings of exchange {exchange!r} have vanished from Redis server"
                f" {self.redis.settings.peer}: the key {key!r} does not exist; declare its queues"
                " again"
            )
        return table

    def _table_of(self, exchange: str) -> list[tuple[str, str | None, str]]:
        keys = self.redis.keys
        members = self.redis.call("SMEMBERS", keys.binding(exchange))
        return [keys.parse_member(member) for member in members]

    def list_bindings(self) -> Iterator[tuple[str, str, str]]:
        """Yield (queue, exchange, binding key) for the bindings of exchanges declared here."""
        for exchange in self.get_exchanges():
            for key, _, queue in self._table_of(exchange):
                yield queue, exchange, key

    # -- the end

    def _close_consuming(self) -> None:
        super()._close_consuming()
        self.taps.close()
        self.redis.finish()

    def _abandon(self) -> None:
        super()._abandon()
        self.redis.remove_tokens(self.taps.tokens)

    def _make_restorer(self) -> None:
        """Nothing: the connection sees to what was dropped with it."""

    def close(self) -> None:
        """Cancel the consumers and give unsettled deliveries back; waits until that is done."""
        super().close()
        self.redis.remove_tokens(self.taps.tokens)
        for queue in list(self._fanout_queues):
            self._unsubscribe(queue)
        self._close_client()
