"""Who takes messages from the server when: a tap for each queue that a channel consumes.

A tap is opened when a consumer first finds nothing, and from then on it works by itself, in the
hub: it asks for as many messages as the prefetch limit leaves room for, and what comes waits in
its buffer, registered as unacked on the server, until a task drains.  So a task that drains never
waits for a round trip while there are messages, and nothing that happens to a task can lose one.

An open tap is in exactly one of these states:

* *asking*: a `POP` is on its way;
* *waiting*: its queue was empty; it is a watcher, parked, or polls (`_scripts` tells how a new
  message finds it);
* *starving*: its buffer is empty, and the prefetch limit leaves no room;
* *filled*: it got all that it had asked for, or as much as one answer may be, so there may be more;
  it asks again when its buffer is empty, or half of the limit is free, and so for many messages
  at a time.

All of it runs in the thread of the hub.  Tasks of other threads only take from the buffer and
settle, which are single operations on a deque and a dict, and leave the rest to the hub.
"""

from __future__ import annotations

import random
import weakref
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from greenkombu.transport.redis._errors import ReplyError
from greenkombu.transport.redis._held import Held, put_back
from greenkombu.transport.redis._replies import fetch
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._scripts import LEAVE, POP
from hub.errors import HubError

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.channel import Channel
    from hub.environment import Waiter
    from hub.timers import Timer

__all__ = ["LEASE", "State", "Tap", "Taps"]

#: Messages that a queue without a prefetch limit, or whose deliveries need no ack, has here at
#: most.
BATCH = 100
#: Seconds for which a watcher need not renew; what a killed pair of watchers can delay a message.
LEASE = 10.0
#: Watchers of a queue: one may be dying while the other lives.
WATCHERS = 2
#: Seconds between two looks of the parked consumers of a queue for a vacancy, all of them together.
VACANCY = 2.0
#: Seconds for which a watcher that has work leaves a new message to one that has none.
AFTER_YOU = 0.002
#: The same for one that came too late the last time. Both are told of each message, and one of them
#: takes it; the other then only looks whether it did.
SECOND = 0.001
#: Where nothing can be tracked: seconds between two looks, which double up to `polling_interval`.
FIRST_POLL = 0.05


class State(Enum):
    """What an open tap does now."""

    ASKING = "asking"
    WAITING = "waiting"
    STARVING = "starving"
    FILLED = "filled"
    CLOSED = "closed"


class Tap:
    """What a channel takes from one queue.

    Args:
        taps: of the channel.
        keys: of the queue.
        number: of this tap; the server knows it as "client/number".
    """

    __slots__ = (
        "__weakref__",
        "_asked",
        "_counted",
        "_fresh",
        "_heavy",
        "_interval",
        "_late",
        "_looking",
        "_timer",
        "_told",
        "_woken",
        "buffer",
        "free",
        "keys",
        "number",
        "state",
        "taps",
        "watching",
    )

    def __init__(self, taps: Taps, keys: QueueKeys, number: int) -> None:
        self.taps = taps
        self.keys = keys
        self.number = number
        #: (message as the server kept it, what settles it), in order.
        self.buffer: deque[tuple[bytes, Held]] = deque()
        self.state = State.FILLED
        #: It has a watcher's lease to renew.
        self.watching = False
        #: Its deliveries need no ack: the prefetch limit is not for it.
        self.free = False
        # How many were asked for by the last POP.
        self._asked = 0
        # How many of them the prefetch limit is for.
        self._counted = 0
        # The last reply was as large as one may be: no more of them before it has been consumed.
        self._heavy = False
        # The queue has changed while a POP was on its way.
        self._told = False
        # It was woken as one of those who are parked.
        self._woken = False
        # It has been parked ever since it came.
        self._fresh = True
        # The look of a watcher was sent along with the POP.
        self._looking = False
        # It was told of a change, and found nothing: another watcher was faster.
        self._late = False
        self._timer: Timer | None = None
        self._interval = FIRST_POLL

    # -- asking

    def look(self) -> None:
        """Ask for messages if that is due and there is room."""
        taps = self.taps
        while self.state is State.FILLED or self.state is State.STARVING:
            room = taps.room(self)
            due = room > 0 and (not self.buffer or (room >= taps.bulk and not self._heavy))
            due = due and not taps.paused
            if due and taps.may_ask(self):
                taps.starving.pop(self, None)
                taps.filled.pop(self, None)
                self._ask(room)
                return
            entered = taps.filled if self.buffer else taps.starving
            if self in entered:
                return
            taps.starving.pop(self, None)
            taps.filled.pop(self, None)
            self.state = State.FILLED if self.buffer else State.STARVING
            entered[self] = None
            if due:
                taps.look()
                return
            # Another thread may have settled, or taken, just before it could see the entry.

    def changed(self) -> None:
        """The queue that it watches has changed: look, but let one go first that has no work."""
        if self.state is not State.WAITING:
            self.nudge()
        elif self.busy:
            if self._timer is None:
                self._wait_and_look(AFTER_YOU)
        elif self._late:
            if self._timer is None:
                self._call_later(SECOND, _look_again_weakly)
        else:
            self._late = True  # unless it finds something
            self.nudge()

    @property
    def busy(self) -> bool:
        """Whether there is work for its consumers already."""
        return bool(self.buffer if self.free else self.taps.tokens)

    def nudge(self, woken: bool = False) -> None:
        """Look, because there may be a message: somebody has said so, or it is time to.

        Args:
            woken: it was chosen among all who wait, so it takes what there is, busy or not.
        """
        self._woken = woken
        self._fresh = self._fresh and not woken
        if self.state is State.ASKING:
            self._told = True
        elif self.state is State.WAITING:
            self._end_wait()
            self.state = State.FILLED
            self.look()
            if self.state is not State.ASKING:
                # It cannot take what it was told of.
                self._leave()

    def _ask(self, most: int) -> None:
        taps = self.taps
        connection = taps.connection
        self.state = State.ASKING
        self._asked = most
        self._told = False
        self._counted = 0 if self.free else most
        taps.asked += self._counted
        size = connection.replies.share(connection.taps)
        connection.replies.reserve(size, lambda: self._pop(most, size))

    def _pop(self, most: int, size: int) -> None:
        """Send what asks for messages: its turn has come."""
        taps, keys = self.taps, self.keys
        connection = taps.connection
        if self.state is State.CLOSED:
            taps.asked -= self._counted
            connection.replies.release(size)
            taps.closed(self)
            return

        first = connection.ask(keys, most)

        def answered(reply: Any) -> None:
            connection.replies.release(size)
            self._answered(reply, first)

        waits = connection.tracks
        if waits:
            connection.hear_wakes(keys)
        connection.run(
            POP,
            (keys.unacked, keys.registered, keys.watchers, keys.parked, *keys.lists),
            (
                most,
                size,
                connection.token_prefix,
                first,
                keys.tail,
                self.member if waits else b"",
                LEASE,
                WATCHERS,
                connection.wake_prefix,
                int(self.busy and not self._woken),
            ),
            answered,
            keys,
        )
        self._looking = waits and self.watching
        if self._looking:
            # It will most likely be a watcher again: what it would do then, it does at once.
            self._track()

    @property
    def parked(self) -> bool:
        """Whether it waits, and others watch its queue."""
        return self.state is State.WAITING and not self.watching

    @property
    def member(self) -> bytes:
        """What the server knows it as."""
        return b"%s/%d" % (self.taps.connection.client_id, self.number)

    def _answered(self, reply: Any, first: int) -> None:
        taps = self.taps
        taps.asked -= self._counted
        taps.connection.answered(first, reply)
        if isinstance(reply, BaseException):
            self._failed(reply)
            return
        keys = self.keys
        places = 2 + len(keys.lists)
        tokens, buffer = taps.tokens, self.buffer
        prefix = taps.connection.token_prefix
        number, position = first, places
        for place in range(len(keys.lists)):
            for _ in range(reply[2 + place]):
                held = Held(b"%s%d" % (prefix, number), keys, place)
                tokens[held.token] = held
                raw = reply[position]
                if raw.__class__ is int and self.state is not State.CLOSED:
                    taps.connection.leases.took()
                    fetch(taps.connection, held, raw, partial(self._fetched, held, reply))
                    return
                buffer.append((raw, held))
                number += 1
                position += 1
        self._arrived(reply, number - first)

    def _failed(self, error: BaseException) -> None:
        """Nothing has come: look again later, if it is still wanted."""
        taps = self.taps
        if self.state is State.CLOSED:
            taps.closed(self)
        else:
            taps.failed(self, error)
        taps.settled()

    def _fetched(self, held: Held, reply: list[Any], whole: Any) -> None:
        """Take a message that is so large that it came alone, and in parts."""
        taps = self.taps
        if isinstance(whole, BaseException):
            if taps.tokens.pop(held.token, None) is not None:
                put_back(taps.connection, held)
            self._failed(whole)
            return
        if whole:
            self.buffer.append((whole, held))
        elif taps.tokens.pop(held.token, None) is not None:
            put_back(taps.connection, held)  # it took so long that others have it, or the copy went
        self._arrived(reply, 1 if whole else 0)

    def _arrived(self, reply: list[Any], came: int) -> None:
        """Go on, with what has come in the buffer."""
        taps, asked = self.taps, self._asked
        if self.watching and reply[0] != 1:
            self._unwatch()
        if self.state is State.CLOSED:
            self._give_back()
            if reply[0]:
                self._leave()
            taps.closed(self)
            return
        self.state = State.FILLED
        if came:
            self._late = self._fresh = False
            self._interval = FIRST_POLL
            taps.connection.leases.took()
            taps.arrived(self, came)
        self._heavy = came < asked and not reply[0] and taps.connection.tracks
        if came < asked and (reply[0] or not came):
            self._wait(reply[0], reply[1])
        if self._told:
            self.nudge()
        else:
            self.look()
        if came < asked:
            # It had more room than it needed: another may want that.
            taps.settled()

    # -- waiting

    def _wait(self, role: int, parked: int) -> None:
        """The queue is empty: be told of the next message, or look again."""
        connection = self.taps.connection
        self.state = State.WAITING
        if role == 1:
            self.watching = True
            self._fresh = False
            connection.watch(self)
            if not self._looking:
                self._track()
            return
        if role == 3:
            connection.no_tracking("a user who may not PUBLISH, or keys in the way")
        if role == 2:
            delay = max(LEASE, parked * VACANCY)
            if delay > LEASE and not self._fresh:
                # Many that were busy, and are parked together: the first of them is to look soon
                # all the same. Those who come one after the other have ever longer delays anyway.
                self._wait_and_look(delay, 0.0, 2.0)
                return
        else:
            delay = self._interval
            self._interval = min(2 * delay, connection.polling_interval)
        self._wait_and_look(delay)

    def _track(self) -> None:
        """Have the server tell of the next change, and look whether there has been one."""
        self.taps.connection.send(
            pack("CLIENT", "CACHING", "YES") + pack("EXISTS", *self.keys.lists),
            2,
            self._looked,
            self.keys,
        )

    def look_again(self) -> None:
        """Look whether another watcher has taken what both were told of."""
        if self.state is State.WAITING and self.watching:
            self._track()

    def _looked(self, replies: Any) -> None:
        if isinstance(replies, BaseException):
            return
        for reply in replies:
            if isinstance(reply, ReplyError):
                self.taps.connection.no_tracking(reply.message)
                self.nudge()
                return
        if replies[1]:
            self.nudge()

    def _unwatch(self) -> None:
        self.watching = False
        self.taps.connection.unwatch(self)

    def fail(self) -> None:
        """Look again later: the server has refused to give messages."""
        self.state = State.WAITING
        self._wait_and_look(self.taps.connection.polling_interval)

    def _wait_and_look(self, delay: float, least: float = 0.75, most: float = 1.25) -> None:
        # Jitter: consumers that were started together are not to look together for ever.
        self._call_later(delay * random.uniform(least, most), _nudge_weakly)

    def _call_later(self, delay: float, function: Callable[[weakref.ref[Tap]], None]) -> None:
        hub = self.taps.connection.hub
        try:
            self._timer = hub.call_later(delay, function, weakref.ref(self))
        except HubError:
            pass  # it was closed, or belongs to the parent process

    def _end_wait(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()

    def _leave(self) -> None:
        """Have the server pass on to another consumer what this one was told of, or will be."""
        connection = self.taps.connection
        if self.watching:
            self._unwatch()
        if connection.tracks:
            keys = self.keys
            connection.run(
                LEAVE,
                (keys.watchers, keys.parked, *keys.lists),
                (self.member, connection.wake_prefix),
                None,
                keys,
            )

    # -- the end

    def close(self) -> None:
        """Stop, and put back what nobody has taken; sends, and waits for nothing."""
        if self.state is State.CLOSED:
            return
        asks = self.state is State.ASKING
        waited = asks or self.state is State.WAITING or self.watching
        self._end_wait()
        self.state = State.CLOSED
        self.taps.starving.pop(self, None)
        self.taps.filled.pop(self, None)
        self._give_back()
        if waited:
            self._leave()
        if not asks:
            self.taps.closed(self)

    def purge(self) -> int:
        """Settle what nobody has taken, and return how many messages that were."""
        count = 0
        try:
            while True:
                _, held = self.buffer.popleft()
                self.taps.channel.forget(held)
                count += 1
        except IndexError:
            pass
        if count:
            self.taps.taken(self)
        return count

    def _give_back(self) -> None:
        taps = self.taps
        # Each goes to the head of its list: the last one first.
        while self.buffer:
            _, held = self.buffer.pop()
            if taps.tokens.pop(held.token, None) is not None:
                put_back(taps.connection, held)

    def __repr__(self) -> str:
        return f"<Tap of {self.keys.queue!r}: {self.state.value}, {len(self.buffer)} buffered>"


def _nudge_weakly(reference: weakref.ref[Tap]) -> None:
    tap = reference()
    if tap is not None:
        tap._timer = None
        tap.nudge()


def _look_again_weakly(reference: weakref.ref[Tap]) -> None:
    tap = reference()
    if tap is not None:
        tap._timer = None
        tap.look_again()


class Taps:
    """The taps of one channel, and what its prefetch limit leaves to them.

    Attributes:
        tokens: every unacked message of the channel by its token: those in buffers, and those that
            were delivered and are not settled.
        asked: for how many more was asked that the prefetch limit is for.
        starving: taps that have nothing and may not ask, the longest first.
        filled: taps that have something, and may ask for more when it is less.
        free: taps whose deliveries need no ack; what they have does not count.
        paused: several messages are being put back; the taps look when all of them are.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.connection = channel.redis
        self.tokens: dict[bytes, Held] = {}
        self.asked = 0
        self.starving: dict[Tap, None] = {}
        self.filled: dict[Tap, None] = {}
        self.free: dict[Tap, None] = {}
        self._closing: dict[Tap, None] = {}
        self._waiters: list[Waiter] = []
        self.by_queue: dict[str, Tap] = {}
        self.paused = False

    @property
    def _limit(self) -> int:
        qos = self.channel._qos
        return 0 if qos is None else qos.prefetch_count

    @property
    def unsettled(self) -> int:
        """How many messages count for the prefetch limit."""
        count = len(self.tokens)
        for tap in list(self.free):
            count -= len(tap.buffer)
        return max(count, 0)

    @property
    def bulk(self) -> int:
        """How much room it takes to ask for more while there is something in the buffer."""
        return max(min(self._limit or BATCH, BATCH) // 2, 1)

    def room(self, tap: Tap) -> int:
        """Return how many messages a tap may ask for."""
        limit = self._limit
        if not limit or tap.free:
            return BATCH - len(tap.buffer)
        room = limit - self.unsettled - self.asked
        if self.starving and room > 1:
            room = max(room // (len(self.starving) + (tap not in self.starving)), 1)
        return min(room, BATCH)

    def may_ask(self, tap: Tap) -> bool:
        """Tell whether a tap does not have to wait for its turn, as others starve."""
        return not self.starving or tap in self.starving or tap.free or not self._limit

    def open(self, queue: str, free: bool) -> Tap:
        """Return the tap of a queue, a new one if need be; it asks at once."""
        tap = self.by_queue.get(queue)
        if tap is None:
            connection = self.connection
            tap = Tap(self, connection.keys.of(queue), connection.claim_numbers())
            tap = self.by_queue.setdefault(queue, tap)
            if free:
                tap.free = True
                self.free[tap] = None
            connection.add_tap(tap)
            connection.in_hub(tap.look)
        elif not free:
            self.must_ack(tap)
        return tap

    def must_ack(self, tap: Tap) -> None:
        """A consumer of the queue acknowledges: the prefetch limit is for it."""
        tap.free = False
        self.free.pop(tap, None)

    def taken(self, tap: Tap) -> None:
        """A message was taken from the buffer of a tap."""
        if tap.state is State.FILLED and (
            not tap.buffer or (not self._limit and len(tap.buffer) <= BATCH // 2)
        ):
            self.connection.in_hub(tap.look)

    def settled(self) -> None:
        """There is room for another message."""
        if self.paused:
            return
        if self.starving or (self.filled and self._limit - self.unsettled >= self.bulk):
            self.connection.in_hub(self.look)

    def look(self) -> None:
        """Let the taps ask that have nothing, and then those that have less than they might."""
        starving = self.starving
        while starving:
            tap = self.channel.next_tap(starving)
            if self.room(tap) <= 0:
                return
            tap.look()
            if tap in starving:
                return
        for tap in list(self.filled):
            tap.look()

    def arrived(self, tap: Tap, count: int) -> None:
        """Messages are in the buffer of a tap: tell consumers of its queue."""
        self.channel.tell(tap.keys.queue, count)

    def failed(self, tap: Tap, error: BaseException) -> None:
        """A tap could not ask; it looks again later, and whoever drains is told."""
        tap.fail()
        self.channel.tap_failed(error)

    def close_tap(self, queue: str) -> None:
        """Close the tap of a queue without consumers."""
        tap = self.by_queue.pop(queue, None)
        if tap is not None:
            self.free.pop(tap, None)
            self.connection.remove_tap(tap)
            self._closing[tap] = None
            self.connection.in_hub(tap.close)

    def closed(self, tap: Tap) -> None:
        """Everything that a closed tap had, or had asked for, has gone back; in the hub."""
        self._closing.pop(tap, None)
        while self._waiters and not self._closing:
            self._waiters.pop().wake()

    def await_closed(self) -> None:
        """Wait until what closed taps had asked for has come and gone back; parks the task.

        What the task sends after that finds it in the queue.
        """
        if not self._closing:
            return
        waiter = self.connection.hub.environment.waiter()
        self._waiters.append(waiter)
        if not self._closing or self.connection.error is not None:
            waiter.wake()  # the hub has finished before it could see the waiter
        waiter.wait(remaining(self.connection.settings.socket_timeout))

    def close(self) -> None:
        """Close all."""
        for queue in list(self.by_queue):
            self.close_tap(queue)
