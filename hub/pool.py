"""A pool of resources (connections, channels) that any number of tasks share.

How it works.  A pool has places (`Slot`), at most `limit`.  A place is made by the task
that first needs it, holds one resource, and is always in exactly one of these hands: the
stack of idle places, the `Lease` of a task, a task that is creating its resource, or the
`Request` of a waiting task that has been given it and has not run yet.

    acquire:  idle.pop(), else a new place, else wait in the queue
    release:  to the first who waits, else idle.append()
    discard:  the place ends; the first who waits may make a new one

* LIFO for resources: the one used last is the one least likely to have gone stale, and
  the others may age and be evicted.  FIFO for tasks: a released place goes directly to the
  one who has waited longest, and who asks while others wait joins the queue.
* Nothing in a change of state switches or blocks.  `create`, `close` and `check` run
  between the changes, in the task that acquires, releases or discards.
* The capacity is not a counter that could drift.  It is the registry of the places that
  exist (`_slots`), and nothing refers to a place but the hands named above.  If an
  exception of a signal handler arrives between two bytecodes and a place falls out of all
  hands, or if a lease is dropped without release, Python finalizes the place at
  once, its finalizer takes it out of the registry, lets the next task have it, and puts the
  resource, whose state is unknown, on a list to be closed by the next operation or
  a task that the hub starts.  Functions below do the same at once for a place that they have
  in hand when an exception passes through, because its traceback would keep it (`down` tells
  whether it is still in hand).  Two windows no Python code can close.  An exception that hits
  `release()` or `__exit__()` before their first line: the lease lasts, until it is released
  again or dropped with that exception.  And a resource that `create` returns at the very
  moment that a signal handler raises: its place is given back, but nobody knows the
  resource, which is left to its own finalizer.  (tests/contract/test_pool_steps.py tries
  every step.  It takes the place of coverage, so what only signals reach is marked.)
* No lock; see `hub._waiting` for the protocol.  Finalizers, signal handlers and native
  threads may come in between at any point.  Two threads that reach for the last place at
  once may both withdraw; both then queue, and the queue is looked at again after that.
* Forks.  In the child every place of the parent is forgotten: idle resources are
  dropped without `close`, which would say good-bye on the parent's sockets (`abandon` may
  close descriptors), leases end without effect, and the child starts with full capacity.

Lease, slot and the texts of errors are in `hub._pool_parts`.  The rest stays in one module
(of more than 600 lines): every method takes part in the same few invariants.
"""

from __future__ import annotations

import sys
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Generic, TypeVar

from hub import _fork
from hub import environment as _environment
from hub._pool_parts import NOTHING, Lease, PoolStats, Slot, caller, describe_held
from hub.arguments import check_callable, check_seconds
from hub.errors import BadArgumentError, PoolClosedError, PoolInUseError, PoolTimeoutError
from hub.finalize import Home
from hub.primitives import Event

if TYPE_CHECKING:
    import logging
    from types import TracebackType

    from hub.environment import Environment, Waiter

__all__ = ["Lease", "LifoPool", "PoolStats"]

T = TypeVar("T")

# How long a task that has been promised a place looks for it.  The giver is another native
# thread between two bytecodes; it is late only when it has been preempted there.
_PROMISE = 1.0


class LifoPool(Generic[T]):
    """At most `limit` resources, created when needed and kept for the next task.

    Args:
        create: makes a resource; called in the acquiring task with the seconds that are
            left of its timeout (None: no bound), which it has to keep to.
        limit: how many resources may exist at a time; None for any number (idle ones are
            kept and used again all the same).
        close: closes a resource, in whatever task finds that it has to be closed.  An
            error is logged.  None: resources need no closing.
        check: tells whether an idle resource is still good, each time before it is handed
            out.  It must not wait.  False or an exception discards the resource.
        max_idle: seconds after which an idle resource is closed, by the next acquire or
            `evict_idle()`.
        abandon: called in the child of a fork with each idle resource of the parent; it may
            close descriptors but must send nothing and not wait.
        name: what errors and logs call the pool.
        clock: returns monotonic seconds.
        debug: remember where each lease was taken and tell it in the error of a full pool;
            None does so in Python's development mode (`-X dev`).

    Raises:
        BadArgumentError: limit is less than 1 or no whole number, max_idle is negative or no
            number, or one of the functions cannot be called.
    """

    def __init__(
        self,
        create: Callable[[float | None], T],
        *,
        limit: int | None,
        close: Callable[[T], object] | None = None,
        check: Callable[[T], bool] | None = None,
        max_idle: float | None = None,
        abandon: Callable[[T], object] | None = None,
        name: str = "",
        clock: Callable[[], float] | None = None,
        debug: bool | None = None,
    ) -> None:
        check_callable(create, "create")
        for what, function in {"close": close, "check": check, "abandon": abandon}.items():
            check_callable(function, what, optional=True)
        check_callable(clock, "clock", optional=True)
        if max_idle is not None:
            check_seconds(max_idle, "max_idle")
            if max_idle < 0:
                raise BadArgumentError(f"max_idle is 0 seconds or more, or None, not {max_idle!r}")
        self.name = name
        self._title = f"pool {name!r}" if name else "the pool"
        self._limit, self._room = self._checked(limit)
        self._create = create
        self._close = close
        self._check = check
        self._max_idle = max_idle
        self._abandon = abandon
        self._clock = clock or time.monotonic
        self._debug = sys.flags.dev_mode if debug is None else debug
        # What has to be looked at before an idle resource is used again.
        self._picky = check is not None or max_idle is not None
        self._closed = False
        #: All places: id -> weak reference.  Its length is the capacity in use.
        self._slots: dict[int, Callable[[], Slot[T] | None]] = {}
        self._idle: deque[Slot[T]] = deque()
        #: Those who wait, in order of arrival.  Entering and claiming cost half of what they do in
        #: a `WaiterQueue`; leaving is a search, but whose time is over is near the front.
        self._waiting: deque[Waiter] = deque()
        #: Those in the queue whose native threads a fork has left in the parent; see _sweep().
        self._orphans: list[Waiter] = []
        #: Resources that still have to be closed: id -> (resource, whether its lease was
        #: dropped, where that was taken).
        self._lost: dict[int, tuple[T, bool, str]] = {}
        # Set when the next operation has something to do first, see _sweep().
        self._chores = False
        # The environment's waiter(), once it is a green one: patching cannot be undone, and with
        # hub.use() what exists keeps the environment that it was made under.
        self._new_waiter: Callable[[], Waiter] | None = None
        # Its current(), kept because asking for the environment costs more than the rest of
        # acquire(); renewed whenever something is created or waited for.
        self._current: Callable[[], object] = object
        self._empty = Event()
        self._acquired = 0
        self._created = 0
        self._discarded = 0
        self._lost_count = 0
        self._timeouts = 0
        self._wait_seconds = 0.0
        _fork.join_forks(self)

    # -- acquire ---------------------------------------------------------------------------
    def acquire(self, timeout: float | None = None, *, block: bool = True) -> Lease[T]:
        """Take a resource, creating one or waiting for one if need be.

        Args:
            timeout: seconds for waiting and creating together; None waits for ever; zero
                or less does not wait for other tasks (and tells `create` that no time
                is left).
            block: False does not wait for other tasks; `timeout` is then for creating alone.

        Returns:
            The lease; `with pool.acquire(timeout=1) as resource` releases it at the end.

        Raises:
            PoolTimeoutError: no resource became free in time; it tells who has them.
            PoolClosedError: the pool is closed, or was closed while waiting.
            BlockingCallError: it would have to wait in a callback of the hub.
            BaseException: what `create` raised, or what was thrown into the waiting task;
                the capacity is what it was.
        """
        if self._chores:
            self._sweep()
        if self._closed:
            raise self._closed_error()
        # In a local first: called as an attribute, CPython would look for a method each time.
        clock = self._clock
        waiter: Waiter | None = None
        slot: Slot[T] | None = None
        try:
            now = started = clock()
            if not self._waiting:
                try:
                    slot = self._idle.pop()
                except IndexError:
                    slot = self._new_slot()
            if slot is None:
                # There is none, or others are before us.
                new_waiter = self._new_waiter or self._bind(_environment.get_environment()).waiter
                waiter = new_waiter()
                self._waiting.append(waiter)
                # Look again: a place may have become free, or the pool closed, meanwhile.
                if self._idle or len(self._slots) < self._room:
                    self._hand_out()
                if self._closed:  # pragma: no cover - by another thread, just now
                    raise self._closed_error()
                bound = timeout if block else 0.0
                if not waiter.wait(bound):
                    if self._unqueue(waiter):
                        self._timeouts += 1
                        raise self._full_error(bound, started)
                    waiter.wait(_PROMISE)
                slot, waiter.given = waiter.given, None
                if slot is None:
                    if self._closed:
                        raise self._closed_error()
                    raise self._full_error(bound, started)
                now = clock()
                self._wait_seconds += now - started
            if slot.resource is NOTHING or (self._picky and not self._is_good(slot, now)):
                self._fill(slot, timeout, started)
                now = clock()
            slot.since = now
            current = self._current
            slot.task = hash(current())
            if self._debug:
                slot.where = caller()
            self._acquired += 1
            lease: Lease[T] = Lease()
            lease._pool = self
            lease._held = [slot]
        except BaseException:
            if waiter is not None and not self._unqueue(waiter):
                slot = slot or waiter.given
                waiter.given = None
            if slot is not None:
                # With a resource it goes to the next task; without one its place does.
                self._return([slot])
            raise
        return lease

    def _new_slot(self) -> Slot[T] | None:
        """Make a new, empty place; None if the pool is full."""
        slots = self._slots
        if len(slots) >= self._room:
            return None
        slot = Slot(self)
        try:
            # Enter first, count afterwards: there can never be too many.  Until then it is
            # no place, and nobody who looks counts it.
            slots[id(slot)] = _no_place
            if len(slots) > self._room:  # pragma: no cover - another thread was faster
                self._strike_out(slot)
                return None
            slots[id(slot)] = weakref.ref(slot, self._slot_gone)
        except BaseException:  # pragma: no cover - a signal's
            self._rescue(slot, [False])
            raise
        return slot

    def _strike_out(self, slot: Slot[T]) -> bool:
        """Make `slot` no longer one of the pool's places; False if it was none.

        Who waits is not told.
        """
        found = self._slots.pop(id(slot), None) is not None
        slot.dead = True
        return found

    def _unqueue(self, waiter: Waiter) -> bool:
        """Take `waiter` out of the queue; False if somebody has claimed it before."""
        try:
            self._waiting.remove(waiter)
        except ValueError:
            return False
        return True

    def _bind(self, environment: Environment) -> Environment:
        """Remember what is needed of the environment that holds now, and return it."""
        self._current = environment.current
        if environment.green:
            self._new_waiter = environment.waiter
        return environment

    def _fill(self, slot: Slot[T], timeout: float | None, started: float) -> None:
        """Create the resource of an empty place that the calling task has."""
        if timeout is not None:
            check_seconds(timeout, "the timeout of acquire")
        slot.home = Home()
        self._bind(slot.home.environment)
        left = None if timeout is None else max(0.0, timeout - (self._clock() - started))
        resource = self._create(left)
        if self._closed:
            self._close_resource([resource])
            raise self._closed_error()
        if slot.dead:
            self._drop_inherited(resource)
            raise PoolClosedError(
                f"{self._title} was connecting in the parent process when it forked; acquire again"
            )
        slot.resource = resource
        self._created += 1

    def _is_good(self, slot: Slot[T], now: float) -> bool:
        """Tell whether an idle resource may be used; if not, close it and empty the place."""
        closing = [slot.resource]
        slot.resource = NOTHING
        try:
            good = self._max_idle is None or now - slot.since <= self._max_idle
            if good and self._check is not None:
                try:
                    good = bool(self._check(closing[0]))
                except Exception:
                    _logger().warning("the check of %s failed", self._title, exc_info=True)
                    good = False
            if good and self._max_idle is not None:
                self.evict_idle()
            if good:
                slot.resource = closing[0]
            else:
                self._close_resource(closing)
        except BaseException:
            # Of a signal handler: who knows how far the check has come.
            if closing and slot.resource is NOTHING:
                self._lose(closing[0], slot.home)
            raise
        return good

    # -- give back -------------------------------------------------------------------------
    def _return(self, held: list[Slot[T]], discard: bool = False) -> bool:
        """Pass the place that is in `held` to the next task, or put it away.

        Args:
            held: contains the place, if it has not been returned before; emptied.
            discard: end the place instead.

        Returns:
            False if there was no place in `held`.
        """
        down = [False]
        try:
            slot = held.pop()
        except IndexError:
            return False
        try:
            if slot.dead:  # forgotten after a fork, or closed by force
                if self._chores:
                    self._sweep()
            elif (
                discard or self._closed or slot.resource is NOTHING or len(self._slots) > self._room
            ):
                self._discard(slot)
            else:
                slot.task = 0
                if self._max_idle is not None:
                    slot.since = self._clock()
                if not self._waiting or not self._grant(slot, down):
                    down[0] = True
                    self._idle.append(slot)
                    if self._waiting:
                        self._hand_out()
        except BaseException:
            self._rescue(slot, down)
            raise
        return True

    def _rescue(self, slot: Slot[T], down: list[bool]) -> None:
        """End a place that an exception has found in no hands; the caller raises it again.

        Args:
            slot: the place.
            down: one item, whether the caller has put it down. The place itself cannot say that:
                another native thread may have taken it up since.
        """
        if not down[0] and not slot.dead:
            self._slot_lost(slot)

    def _discard(self, slot: Slot[T]) -> None:
        """End a place that the caller has, let the next task go on, and close the resource."""
        closing = [slot.resource]
        try:
            if not self._strike_out(slot):
                return  # force_close_all() has ended it
            self._after_end()
            if slot.resource is not NOTHING:
                self._close_resource(closing)
        except BaseException:
            # Once more, for what it had not come to.
            self._strike_out(slot)
            if closing and slot.resource is not NOTHING:  # pragma: no cover - a signal's
                self._lose(closing[0], slot.home)
            self._after_end()
            raise

    def _after_end(self) -> None:
        """A place has ended: somebody else may make one."""
        if self._waiting:
            self._hand_out()
        if self._closed and not self._slots:
            self._empty.set()

    def _grant(self, slot: Slot[T], down: list[bool]) -> bool:
        """Hand `slot` to the task that has waited longest; False if nobody waits.

        `down` is as in `_rescue`.
        """
        waiter: Waiter | None = None
        waiting = self._waiting
        try:
            while waiting:
                try:
                    # A look first, so that the waiter is in hand when it is claimed.
                    waiter = waiting[0]
                    waiting.remove(waiter)
                except (IndexError, ValueError):
                    continue  # by another thread, or it has left, since the look
                waiter.given = slot
                down[0] = True
                waiter.wake()
                return True
            return False
        except BaseException:  # pragma: no cover - a signal's
            if waiter is not None and waiter not in self._waiting:
                # Claimed by us, unless another thread gave up at this very moment; then
                # the place is finalized with the waiter.
                if not down[0]:
                    waiter.given = slot
                    down[0] = True
                waiter.wake()
            raise

    def _hand_out(self) -> None:
        """Give what is idle, and places that may be made, to those who wait."""
        slot: Slot[T] | None = None
        down = [False]
        try:
            while self._waiting:
                try:
                    slot = self._idle.pop()
                except IndexError:
                    slot = self._new_slot()
                if slot is None:
                    if len(self._slots) >= self._room:
                        return
                elif not self._grant(slot, down):
                    # Nobody waits any more; somebody may come just now, so look again.
                    if slot.resource is NOTHING:
                        self._strike_out(slot)
                    else:
                        down[0] = True
                        self._idle.append(slot)
                slot = None
                down[0] = False
        except BaseException:  # pragma: no cover - a signal's
            if slot is not None:
                self._rescue(slot, down)
            if self._waiting:
                self._hand_out()
            raise

    # -- resources ---------------------------------------------------------------------------
    def _close_resource(self, closing: list[T]) -> None:
        """Close the resource that is in `closing`, and take it out when that begins.

        The list tells the caller whether an exception came before.
        """
        self._discarded += 1
        close = self._close
        resource = closing[0]
        if close is None:
            del closing[0]
            return
        try:
            # CPython does not look for signals from the deletion to the call.
            del closing[0]
            close(resource)
        except Exception:
            _logger().warning("closing a resource of %s failed", self._title, exc_info=True)

    def _lose(self, resource: T, home: Home | None, leased: bool = False, where: str = "") -> None:
        """Leave a resource to the next operation, or to a task that the hub at `home` starts.

        Args:
            resource: to be closed.
            home: where it was made.
            leased: whether it was lost because its lease was dropped.
            where: where that was taken, if known.
        """
        self._lost[id(resource)] = (resource, leased, where)
        self._chores = True
        if home is not None:
            home.call(self._start_sweep, home)

    def _slot_lost(self, slot: Slot[T]) -> None:
        """Take back the place of a slot that is being finalized; may be called again."""
        slot.dead = True
        self._slots.pop(id(slot), None)
        if slot.resource is not NOTHING:
            self._lose(slot.resource, slot.home, slot.task != 0, slot.where)
        self._after_end()

    def _slot_gone(self, reference: weakref.ref[Slot[T]]) -> None:
        """Take back the place of a slot whose finalizer has not come to do it.

        That is so when an exception of a signal handler has hit the finalizer itself, and
        for a moment when the garbage collector clears references before it finalizes.
        """
        try:
            for key, known in list(self._slots.items()):
                if known is reference:
                    self._slots.pop(key, None)
            self._after_end()
        except BaseException:  # pragma: no cover - a signal's
            self._after_end()
            raise

    def _start_sweep(self, home: Home) -> None:
        """Close what was lost; a callback of the hub, where closing must not be done."""
        if self._lost:
            home.environment.spawn(self._sweep)

    def _sweep(self) -> None:
        """Close the resources of lost places, and give away what a fork has set free."""
        key = -1
        closing: list[T] = []
        try:
            for waiter in self._orphans:
                self._unqueue(waiter)
            self._orphans = []
            self._chores = False
            if self._waiting:
                self._hand_out()
            for key in list(self._lost):
                entry = self._lost.get(key)
                closing = [] if entry is None else [entry[0]]
                if entry is None or self._lost.pop(key, None) is None:
                    closing = []  # another task does it as well
                    continue
                if entry[1]:
                    self._lost_count += 1
                    self._warn_of_lost_lease(entry[2])
                self._close_resource(closing)
        except BaseException:
            if closing:  # pragma: no cover - a signal's
                self._lost[key] = (closing[0], False, "")
            self._chores = True
            self._after_end()
            raise

    def _warn_of_lost_lease(self, where: str) -> None:
        message = (
            f"a lease of {self._title}{where and ' taken at ' + where} was dropped without "
            "release(): its resource is closed. Use `with pool.acquire() as resource:`"
        )
        _logger().warning(message)
        try:
            warnings.warn(message, ResourceWarning, stacklevel=2)
        except ResourceWarning:
            pass  # made an error by a filter: it would hit a task that has done nothing wrong

    # -- the pool as a whole --------------------------------------------------------------------
    @property
    def limit(self) -> int | None:
        """How many resources may exist at a time; None for any number."""
        return self._limit

    def resize(self, limit: int | None) -> None:
        """Change the limit.

        A larger one lets waiting tasks go on at once.  With a smaller one idle resources
        are closed here, the oldest first, and held ones when they are released.

        Raises:
            BadArgumentError: limit is less than 1, or no whole number; nothing has changed.
        """
        try:
            self._limit, self._room = self._checked(limit)
            if self._chores:
                self._sweep()
            self._after_end()
        except BaseException:  # pragma: no cover - a signal's
            self._after_end()
            raise
        while len(self._slots) > self._room and self._evict_oldest(None):
            pass

    def evict_idle(self) -> int:
        """Close the resources that have been idle for longer than `max_idle`; return how many."""
        evicted = 0
        if self._max_idle is not None:
            before = self._clock() - self._max_idle
            while self._evict_oldest(before):
                evicted += 1
        return evicted

    def _evict_oldest(self, before: float | None) -> bool:
        """Close what has been idle longest, if since before `before`; tell whether it was."""
        down = [False]
        try:
            slot = self._idle.popleft()
        except IndexError:
            return False
        try:
            stays = before is not None and slot.since >= before
            if not stays:
                self._discard(slot)
            else:
                down[0] = True
                self._idle.appendleft(slot)
                if self._waiting:
                    self._hand_out()
        except BaseException:
            self._rescue(slot, down)
            raise
        return not stays

    @property
    def closed(self) -> bool:
        """Tell whether the pool is closed."""
        return self._closed

    def close(self, timeout: float | None = 0.0) -> None:
        """Close the pool: nothing can be acquired any more; idempotent.

        Tasks that wait get PoolClosedError at once, and idle resources are closed here.

        Args:
            timeout: seconds to wait for those that are held; None waits for ever.

        Raises:
            PoolInUseError: resources are still held; it tells how many and since when.  The pool
                is closed all the same, and each of them will be by its release.
        """
        self.retire()
        if not self._empty.wait(timeout):
            raise PoolInUseError(
                f"{self._title} was closed while {self.describe_held()}. Nothing can be acquired "
                "any more, and what is held is closed when it is released. Release it before, "
                "give close() the time to wait for it, or call retire() if that is what you want"
            )

    def retire(self) -> None:
        """Close the pool as `close()` does, and leave what is held to its release; never waits."""
        self._closed = True
        while self._waiting:
            try:
                waiter = self._waiting.popleft()
            except IndexError:  # pragma: no cover - another thread was faster
                break
            waiter.wake()
        if self._chores:
            self._sweep()
        while self._evict_oldest(None):
            pass
        if not self._slots:
            self._empty.set()

    def describe_held(self) -> str:
        """Tell how many resources are in use, by how many tasks and since when, for a message.

        With `debug` it tells where the oldest was taken, too.
        """
        return describe_held(self._places(), self._clock())

    def force_close_all(self) -> int:
        """Close every resource, those in use included, and start anew with full capacity.

        The tasks that use them find out by the errors of their resource; releasing their
        leases does nothing.  What is being created at this moment is left alone.

        Returns:
            How many resources were closed.
        """
        closed = 0
        while self._evict_oldest(None):
            closed += 1
        for slot in self._places():
            if slot.resource is not NOTHING:
                self._discard(slot)
                closed += 1
        return closed

    def stats(self) -> PoolStats:
        """Return the numbers of this moment."""
        places = self._places()
        connecting = sum(slot.resource is NOTHING for slot in places)
        # Other native threads go on meanwhile; the sum is that of the places all the same.
        idle = min(len(self._idle), len(places) - connecting)
        return PoolStats(
            limit=self._limit,
            held=len(places) - idle - connecting,
            idle=idle,
            connecting=connecting,
            waiting=len(self._waiting),
            acquired_total=self._acquired,
            created_total=self._created,
            discarded_total=self._discarded,
            lost_total=self._lost_count,
            timeouts_total=self._timeouts,
            wait_seconds_total=self._wait_seconds,
        )

    def _places(self) -> list[Slot[T]]:
        found = (reference() for reference in list(self._slots.values()))
        return [slot for slot in found if slot is not None]

    # -- errors ----------------------------------------------------------------------------------
    @staticmethod
    def _checked(limit: int | None) -> tuple[int | None, int]:
        """Return the limit, and the number that the places are compared with."""
        if limit is None:
            return None, sys.maxsize
        if not isinstance(limit, int) or limit < 1:
            raise BadArgumentError(
                f"a pool needs a limit of at least 1, or None for none, not {limit!r}"
            )
        return limit, limit

    def _closed_error(self) -> PoolClosedError:
        return PoolClosedError(
            f"{self._title} is closed: nothing can be acquired from it any more. Make a new one, "
            "or close it after the last task that needs it"
        )

    def _full_error(self, timeout: float | None, started: float) -> PoolTimeoutError:
        now = self._clock()
        bound = "none" if timeout is None else f"{timeout:.3g} s"
        return PoolTimeoutError(
            f"{self._title} is full and nothing became free within {now - started:.3f} s "
            f"(timeout {bound}): limit {self._limit}, "
            f"{describe_held(self._places(), now, hash(self._current()))}, "
            f"{len(self._waiting)} more waiting. "
            "Release sooner, or raise the limit or the timeout"
        )

    # -- forks (hub._fork) -------------------------------------------------------------------------
    def before_fork(self) -> None:
        """Nothing to prepare."""

    def after_fork_in_parent(self) -> None:
        """Nothing has changed."""

    def after_fork_in_child(self) -> None:
        """Forget the parent's resources; see the module's header."""
        for slot in self._places():
            slot.dead = True
        inherited = [slot.resource for slot in self._idle]
        inherited += [resource for resource, _, _ in self._lost.values()]
        self._slots = {}
        self._idle = deque()
        self._lost = {}
        here = _environment.get_environment().thread_id()
        self._orphans = [waiter for waiter in self._waiting if waiter.thread != here]
        # Greenlets that waited in the parent wait here as well; they are served by the
        # next operation, because here the green library is not ready to wake them.
        self._chores = bool(self._waiting)
        for resource in inherited:
            self._drop_inherited(resource)

    def _drop_inherited(self, resource: T) -> None:
        if self._abandon is not None:
            try:
                self._abandon(resource)
            except Exception:
                _logger().warning("abandoning a resource of %s failed", self._title, exc_info=True)

    def __enter__(self) -> LifoPool[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.retire()  # the error of the block is the one to tell

    def __repr__(self) -> str:
        numbers = self.stats()
        state = "closed " if self._closed else ""
        return (
            f"<LifoPool {self.name!r} {state}limit={numbers.limit} held={numbers.held} "
            f"idle={numbers.idle} connecting={numbers.connecting} waiting={numbers.waiting}>"
        )


def _no_place() -> None:
    """Stand in the registry for what has been entered and not counted yet."""


@cache
def _logger() -> logging.Logger:
    # logging imports threading, which a program may want to patch after importing this.
    import logging

    return logging.getLogger(__name__)
