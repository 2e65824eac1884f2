"""The queues of the memory transport, and the broker that all connections of a process share.

Every change of a queue is one operation on a deque, a heap or a dict, which no other thread, task,
signal handler or finalizer can interrupt, so there is no lock that one of them could find held.

A queue keeps a deque for each priority in use.  Messages that come back (requeue, recover, a closed
channel) go into a heap beside it, ordered by their original position: they are older than
everything in the deque.  Time limits are looked at when a message is taken; a timer of the hub
takes what expires while nobody looks.
"""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from queue import Empty
from time import monotonic
from typing import Any

from greenkombu._forks import generation
from greenkombu.transport.virtual.consumers import Registry, Watch
from greenkombu.transport.virtual.deadletter import EXPIRED, MAXLEN, is_cycle, make_dead_letter
from greenkombu.transport.virtual.message import copy_message, new_delivery_tag
from greenkombu.transport.virtual.policy import PLAIN, QueuePolicy, parse_milliseconds
from greenkombu.transport.virtual.state import BrokerState

__all__ = ["Entry", "MemoryBroker", "MemoryQueue"]

#: A message in a queue: its position, when it expires (monotonic seconds, or None), its dict, and
#: the queue itself, so that a delivery finds back to it and to no later queue of the same name.
Entry = tuple[int, "float | None", dict[str, Any], "MemoryQueue"]

#: Priorities of a queue without x-max-priority go up to this one, as Kombu's do.
MAX_PRIORITY = 9

#: How many messages one callback of the hub lets expire; the hub has other things to do.
EXPIRE_AT_ONCE = 200

#: The least seconds until the next look at what expires: messages that were published in a burst
#: expire in a burst, and need no timer each.
EXPIRY_GRAIN = 0.005


class _Level:
    """The messages of one priority."""

    __slots__ = ("ready", "returned")

    def __init__(self) -> None:
        self.ready: deque[Entry] = deque()
        self.returned: list[Entry] = []

    def __len__(self) -> int:
        return len(self.ready) + len(self.returned)

    def pop(self) -> Entry | None:
        if self.returned:
            try:
                return heapq.heappop(self.returned)
            except IndexError:
                pass
        try:
            return self.ready.popleft()
        except IndexError:
            return None

    def first(self) -> Entry | None:
        try:
            return self.returned[0] if self.returned else self.ready[0]
        except IndexError:
            return None

    def clear(self) -> int:
        count = 0
        while self.pop() is not None:
            count += 1
        return count


class MemoryQueue:
    """One queue.

    Args:
        broker: of the process.
        name: of the queue.
        settings: of its declaration: durable, exclusive, auto_delete, arguments.
        policy: what its arguments say.
        owner: of an exclusive queue, the connection.

    It is true while a message is ready.
    """

    __slots__ = (
        "__weakref__",
        "_armed",
        "_armed_in",
        "_bytes",
        "_first",
        "_levels",
        "_order",
        "_positions",
        "_timed",
        "broker",
        "deleted",
        "name",
        "owner",
        "policy",
        "settings",
        "used_at",
        "watch",
    )

    def __init__(
        self,
        broker: MemoryBroker,
        name: str,
        settings: Mapping[str, Any],
        policy: QueuePolicy,
        owner: Any = None,
    ) -> None:
        self.broker = broker
        self.name = name
        self.settings = dict(settings)
        self.policy = policy
        self.owner: weakref.ref[Any] | None = None if owner is None else weakref.ref(owner)
        self.watch: Watch = broker.registry.watch(name)
        self.deleted = False
        self.used_at = monotonic()
        self._first = _Level()
        self._levels: dict[int, _Level] = {0: self._first}
        # The highest priority first.
        self._order: tuple[_Level, ...] = (self._first,)
        self._positions = itertools.count()
        self._timed = False
        # When the timer fires, and in which process it was set.
        self._armed: float | None = None
        self._armed_in = 0
        self._bytes = 0

    # -- messages

    def put(self, raw: dict[str, Any]) -> list[dict[str, Any]]:
        """Add a message at the end of its priority, and wake a consumer.

        Returns:
            What the length limit dropped from the head.

        Raises:
            PreconditionFailed: its expiration is not a number of milliseconds; it was not added.
        """
        properties = raw["properties"]
        policy = self.policy
        if policy is PLAIN and not properties.get("priority") and "expiration" not in properties:
            self._first.ready.append((next(self._positions), None, raw, self))
            if self.watch._waiting:
                self.watch.wake()
            return _NOTHING
        deadline = self._deadline(properties)
        level = self._level(self._priority(properties))
        level.ready.append((next(self._positions), deadline, raw, self))
        if deadline is not None:
            self._timed = True
            if len(level) == 1:
                self._arm(deadline)
        dropped = _NOTHING
        if policy.max_length is not None or policy.max_bytes is not None:
            self._bytes += _size(raw)
            dropped = self._enforce()
        if self.watch._waiting and self:
            self.watch.wake()
        return dropped

    def take(self) -> Entry:
        """Take the next message off.

        Raises:
            queue.Empty: there is none.
        """
        while True:
            for level in self._order:
                entry = level.pop()
                if entry is not None:
                    break
            else:
                raise Empty()
            if self._timed:
                self._arm_for(level)
                deadline = entry[1]
                if deadline is not None and deadline <= monotonic():
                    self.broker.bury(self, [entry[2]], EXPIRED)
                    continue
            if self.policy.max_bytes is not None:
                self._bytes -= _size(entry[2])
            return entry

    def put_back(self, entry: Entry) -> None:
        """Return a message to its place, as redelivered, and wake a consumer."""
        if self.deleted:
            return
        position, deadline, raw, _ = entry
        properties = {**raw["properties"], "delivery_tag": new_delivery_tag()}
        raw = {**raw, "properties": properties, "redelivered": True}
        level = self._level(self._priority(properties))
        heapq.heappush(level.returned, (position, deadline, raw, self))
        if deadline is not None:
            self._arm(deadline)
        if self.policy.max_bytes is not None:
            self._bytes += _size(raw)
        self.watch.wake()

    def purge(self) -> int:
        """Remove what is ready; return how many messages that were."""
        self._bytes = 0
        return sum(level.clear() for level in self._order)

    @property
    def full(self) -> bool:
        """Whether a limit is reached."""
        policy = self.policy
        return (policy.max_length is not None and len(self) >= policy.max_length) or (
            policy.max_bytes is not None and self._bytes >= policy.max_bytes
        )

    def _enforce(self) -> list[dict[str, Any]]:
        policy = self.policy
        dropped: list[dict[str, Any]] = []
        while (policy.max_length is not None and len(self) > policy.max_length) or (
            policy.max_bytes is not None and self._bytes > policy.max_bytes and len(self)
        ):
            try:
                dropped.append(self.take()[2])
            except Empty:
                break
        if not len(self):
            # Threads that count at the same time may lose a count; here it is known again.
            self._bytes = 0
        return dropped

    def __len__(self) -> int:
        return sum(map(len, self._order))

    def __bool__(self) -> bool:
        first = self._first
        if first.ready or first.returned:
            return True
        return len(self._order) > 1 and len(self) > 0

    # -- as queue.Queue, for programs that look into it

    @property
    def queue(self) -> list[dict[str, Any]]:
        """The dicts of the messages that are ready, in order."""
        return [
            entry[2]
            for level in self._order
            for entry in [*sorted(level.returned), *list(level.ready)]
        ]

    def qsize(self) -> int:
        """Return the number of messages that are ready."""
        return len(self)

    def empty(self) -> bool:
        """Tell whether no message is ready."""
        return not self

    # -- priorities

    def _priority(self, properties: Mapping[str, Any]) -> int:
        highest = self.policy.max_priority
        try:
            priority = int(properties.get("priority") or 0)
        except (TypeError, ValueError):
            return 0
        return max(0, min(priority, MAX_PRIORITY if highest is None else highest))

    def _level(self, priority: int) -> _Level:
        level = self._levels.get(priority)
        if level is None:
            level = self._levels.setdefault(priority, _Level())
            # Until it has all of them: another thread may make one at the same time.
            while len(self._order) < len(self._levels):
                self._order = tuple(each for _, each in sorted(self._levels.items(), reverse=True))
        return level

    # -- time limits

    def _deadline(self, properties: Mapping[str, Any]) -> float | None:
        ttl = self.policy.ttl_ms
        expiration = properties.get("expiration")
        if expiration is not None:
            own = parse_milliseconds(expiration)
            ttl = own if ttl is None else min(ttl, own)
        return None if ttl is None else monotonic() + ttl / 1000.0

    def _arm_for(self, level: _Level) -> None:
        first = level.first()
        if first is not None and first[1] is not None:
            self._arm(first[1])

    def _arm(self, deadline: float) -> None:
        """See to it that what expires at `deadline` is taken then."""
        armed = self._armed if self._armed_in == generation() else None
        if armed is None or deadline < armed:
            self._armed, self._armed_in = deadline, generation()
            _call_at(deadline, weakref.WeakMethod(self._expire))

    def _expire(self) -> None:
        """Take what has expired; a callback of the hub."""
        self._armed = None
        if self.deleted:
            return
        now = monotonic()
        expired: list[dict[str, Any]] = []
        for level in self._order:
            while len(expired) < EXPIRE_AT_ONCE:
                first = level.first()
                if first is None or first[1] is None or first[1] > now:
                    break
                entry = level.pop()
                if entry is None:
                    break
                if entry is not first:  # another thread was faster; this one has its own time
                    level.ready.appendleft(entry)
                    break
                expired.append(entry[2])
        for level in self._order:
            self._arm_for(level)
        if expired:
            self.broker.bury(self, expired, EXPIRED)

    def touch(self) -> None:
        """Note that the queue was used: it lives for another x-expires."""
        self.used_at = monotonic()

    def watch_use(self) -> None:
        """Delete the queue when it was not used for x-expires; a callback of the hub."""
        expires_ms = self.policy.expires_ms
        if self.deleted or expires_ms is None:
            return
        if len(self.watch):
            self.used_at = monotonic()
        dies_at = self.used_at + expires_ms / 1000.0
        if dies_at <= monotonic():
            self.broker.delete(self)
        else:
            _call_at(dies_at, weakref.WeakMethod(self.watch_use))

    def unused(self) -> None:
        """Note that the last consumer has gone; may run in a finalizer."""
        self.used_at = monotonic()
        if self.settings.get("auto_delete") and not len(self.watch):
            self.broker.delete(self)

    def __repr__(self) -> str:
        state = "deleted, " if self.deleted else ""
        return f"<{type(self).__name__} {self.name!r}: {state}{len(self)} ready>"


class MemoryBroker:
    """What all memory connections of a process share.

    Attributes:
        queues: by name.
        state: exchanges and bindings.
        registry: consumers by queue.
    """

    def __init__(self) -> None:
        self.queues: dict[str, MemoryQueue] = {}
        self.state = BrokerState()
        self.registry = Registry()

    def declare(
        self, name: str, settings: Mapping[str, Any], policy: QueuePolicy, owner: Any
    ) -> MemoryQueue:
        """Return the queue of this name, a new one if there is none."""
        queue = self.queues.get(name)
        if queue is not None:
            queue.touch()
            return queue
        made = MemoryQueue(self, name, settings, policy, owner)
        queue = self.queues.setdefault(name, made)
        if queue is made:
            while not queue.watch.attach(queue):
                queue.watch = self.registry.watch(name)
            queue.watch.on_unused = _weakly(queue.unused)
            if policy.expires_ms is not None:
                queue.watch_use()
        return queue

    def delete(self, queue: MemoryQueue) -> int:
        """Delete a queue and its bindings; return how many messages it had."""
        if queue.deleted:
            return 0
        queue.deleted = True
        if self.queues.get(queue.name) is queue:
            self.queues.pop(queue.name, None)
            watch = queue.watch
            watch.source = watch.on_unused = None
            self.state.drop_queue(queue.name)
            self.registry.drop_unused(queue.name)
        return queue.purge()

    def clear(self) -> None:
        """Delete every queue and exchange; consumers stay, and wait for a queue of that name."""
        for queue in list(self.queues.values()):
            self.delete(queue)
        self.state.clear()

    def route(self, exchange: str, routing_key: str, headers: Mapping[str, Any]) -> list[str]:
        """Return the queues that a message goes to."""
        if exchange:
            return self.state.route(exchange, routing_key, headers)
        return [routing_key] if routing_key in self.queues else []

    def bury(self, queue: MemoryQueue, messages: Iterable[dict[str, Any]], reason: str) -> None:
        """Let messages leave a queue: to its dead-letter exchange, or for good.

        What they push out of other queues follows, in a loop and not by recursion.
        """
        work = deque((queue, raw, reason) for raw in messages)
        while work:
            queue, raw, reason = work.popleft()
            if queue.policy.dead_letter_exchange is None:
                continue
            message, exchange, routing_key = make_dead_letter(
                raw, queue.name, reason, queue.policy, new_delivery_tag()
            )
            for name in self.route(exchange, routing_key, message["headers"]):
                target = self.queues.get(name)
                if target is None or is_cycle(message, name):
                    continue
                dropped = target.put(copy_message(message, new_delivery_tag()))
                work.extend((target, each, MAXLEN) for each in dropped)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.queues)} queues, {self.state!r}>"


_NOTHING: list[dict[str, Any]] = []


def _size(raw: Mapping[str, Any]) -> int:
    body = raw["body"]
    return 0 if body is None else len(body)


def _weakly(method: Callable[[], object]) -> Callable[[], object]:
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


def _call_at(deadline: float, callback: weakref.WeakMethod[Any]) -> None:
    """Have the hub call a method at a monotonic time, unless its object is gone by then."""
    from hub.shared import get_hub

    hub = get_hub()
    delay = max(deadline - monotonic(), EXPIRY_GRAIN)
    hub.call_soon_threadsafe(hub.call_later, delay, _call_weak, callback)


def _call_weak(callback: weakref.WeakMethod[Any]) -> None:
    method = callback()
    if method is not None:
        method()
