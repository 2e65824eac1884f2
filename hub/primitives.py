"""Locks, semaphores, events, conditions and queues for every environment.

The classes have the signatures and errors of `threading` and `queue`, and three
properties that those have not:

* **First come, first served.**  Releasing hands the lock to the task that has waited
  longest.  A loop that takes a lock again right after releasing it joins the end of the
  queue, so it cannot starve the others.
* **No task is lost, no permit is lost.**  A waiting task may time out, be killed or have
  any exception thrown into it; if the permit had been handed to it at that moment, the
  permit goes on to the next one.
* **No guard lock.**  State is changed by single operations that the interpreter does
  not interrupt (`deque.append`, `dict.setdefault`, `OrderedDict.popitem`), because
  finalizers and signal handlers run between any two bytecodes of the thread that they
  interrupt, and a lock held by the interrupted code would never be released.  `release`,
  `set`, `notify` and `put` on an unbounded queue may therefore be called from there.

How that is done, and what it rests on, is told in `hub._waiting`.

A task that waits is parked on the environment's `Waiter`, looked up when it has to
wait; nothing here needs an environment before, so primitives may be made at import time
of a program that patches later.

Fork: in the child only the forking thread goes on (under gevent and eventlet with all
its greenlets).  Waiters of threads that do not exist there are passed over.  A lock that
another thread held at that moment stays locked in the child, as a `threading.Lock`
does: nobody can tell whether what it protects is in order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hub import environment as _environment
from hub._locks import BoundedSemaphore, Lock, RLock, Semaphore
from hub._waiting import WaiterQueue, wake
from hub.arguments import check_seconds, has_time

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "BoundedSemaphore",
    "Condition",
    "Event",
    "LifoQueue",
    "Lock",
    "Queue",
    "RLock",
    "Semaphore",
]

T = TypeVar("T")

_MISSING: Any = object()

# How many exceptions Condition.wait() keeps back while it takes its lock again.  A kill
# or a Timeout comes once or twice; a lock of the user's that always raises must not make an
# endless loop.
_POSTPONED = 100


def _moment(timeout: float | None) -> float | None:
    """Return when `timeout` seconds will be over; None for never."""
    if timeout is None:
        return None
    check_seconds(timeout, "the timeout")
    return time.monotonic() + timeout


class Event:
    """A flag to wait for, with the interface of `threading.Event`."""

    __slots__ = ("__weakref__", "_queue", "_set")

    def __init__(self) -> None:
        self._set = False
        self._queue = WaiterQueue()

    def is_set(self) -> bool:
        """Tell whether the flag is set."""
        return self._set

    def set(self) -> None:
        """Set the flag and wake everybody who waits; never waits, safe from anywhere."""
        self._set = True
        if self._queue.entries:
            # As many as wait now: who comes after a clear() waits for the next set().
            wake(self._queue, len(self._queue.entries))

    def clear(self) -> None:
        """Reset the flag."""
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the flag.

        Args:
            timeout: seconds; None waits for ever, zero or less does not switch.

        Returns:
            True if the flag is or was set, False if the time was over first.

        Raises:
            BlockingCallError: it would have to wait in a callback of the hub.
        """
        if self._set:
            return True
        waiter = self._queue.enter(_environment.get_environment().waiter())
        woken = False
        try:
            woken = self._set or waiter.wait(timeout)
        finally:
            woken = not self._queue.leave(waiter) or woken
        return woken

    def __repr__(self) -> str:
        state = "set" if self._set else "unset"
        return (
            f"<{type(self).__name__} {state}, {len(self._queue.entries)} waiting, at {id(self):#x}>"
        )


class Condition:
    """A condition variable, with the interface of `threading.Condition`.

    Args:
        lock: a lock to use, ours or anything with `acquire` and `release`; an RLock of
            its own by default.
    """

    __slots__ = ("__weakref__", "_lock", "_queue", "acquire", "release")

    def __init__(self, lock: Any = None) -> None:
        self._lock: Any = RLock() if lock is None else lock
        self._queue = WaiterQueue()
        self.acquire: Callable[..., bool] = self._lock.acquire
        self.release: Callable[[], None] = self._lock.release

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait to be notified, and take the lock again.

        The lock is held again whenever this returns or raises.  For that, an exception
        that arrives while the lock is being taken again is kept until it is held.

        Args:
            timeout: seconds; None waits for ever.  The time to take the lock again is
                not part of it.

        Returns:
            True if it was notified, False if the time was over first.

        Raises:
            RuntimeError: the calling task does not hold the lock.
            BlockingCallError: called in a callback of the hub; the lock stays held.
        """
        if not self._is_owned():
            raise RuntimeError("cannot wait on un-acquired lock")
        environment = _environment.get_environment()
        # Before the lock is released: taking it again would have to wait here as well.
        _environment.check_may_wait(environment.current())
        waiter = self._queue.enter(environment.waiter())
        saved: Any = _MISSING
        try:
            saved = self._release_save()
            if waiter.wait(timeout):
                return True
            return not self._queue.leave(waiter)
        except BaseException:
            if not self._queue.leave(waiter):
                wake(self._queue, 1)  # the notification was not for a dying task
            raise
        finally:
            if saved is not _MISSING:
                self._take_again(saved)

    def wait_for(self, predicate: Callable[[], T], timeout: float | None = None) -> T:
        """Wait until `predicate()` is true or `timeout` seconds have passed.

        Returns:
            The last value of the predicate.
        """
        deadline = _moment(timeout)
        result = predicate()
        while not result:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                break
            self.wait(left)
            result = predicate()
        return result

    def notify(self, n: int = 1) -> None:
        """Wake up to `n` waiting tasks, first come, first served.

        Raises:
            RuntimeError: the calling task does not hold the lock.
        """
        if not self._is_owned():
            raise RuntimeError("cannot notify on un-acquired lock")
        wake(self._queue, n)

    def notify_all(self) -> None:
        """Wake everybody who waits; raises as `notify`."""
        self.notify(len(self._queue.entries))

    def _is_owned(self) -> bool:
        owned = getattr(self._lock, "_is_owned", None)
        if owned is not None:
            return bool(owned())
        if self._lock.acquire(False):
            self._lock.release()
            return False
        return True

    def _release_save(self) -> Any:
        save = getattr(self._lock, "_release_save", None)
        return save() if save is not None else self._lock.release()

    def _take_again(self, saved: Any) -> None:
        restore = getattr(self._lock, "_acquire_restore", None)
        postponed: BaseException | None = None
        for _ in range(_POSTPONED):
            try:
                if restore is not None:
                    restore(saved)
                else:
                    self._lock.acquire()
                break
            except BaseException as error:
                postponed = error
        if postponed is not None:
            raise postponed

    def __enter__(self) -> bool:
        return bool(self._lock.__enter__())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, traceback)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self._lock!r}, {len(self._queue.entries)} waiting>"


class Queue(Generic[T]):
    """A first-in first-out queue between tasks, with the interface of `queue.Queue`.

    Args:
        maxsize: how many items fit; zero or less means any number.
    """

    __slots__ = ("__weakref__", "_items", "_joiners", "_ready", "_room", "_unfinished", "maxsize")

    def __init__(self, maxsize: int = 0) -> None:
        self.maxsize = maxsize
        self._items: deque[T] = deque()
        # One permit per item, and one per place that is free: who has a permit will find
        # the item or the place, so order of arrival and conservation are the semaphores'.
        self._ready = Semaphore(0)
        self._room = Semaphore(maxsize) if maxsize > 0 else None
        self._unfinished: deque[None] = deque()
        self._joiners = WaiterQueue()

    def put(self, item: T, block: bool = True, timeout: float | None = None) -> None:
        """Append an item, waiting for room.

        Args:
            item: what to append.
            block: False does not wait.
            timeout: seconds to wait for room; None waits for ever.

        Raises:
            queue.Full: there was no room in time.
            ValueError: a negative timeout.
        """
        if self._room is not None and not self._room.acquire(True, self._limit(block, timeout)):
            from queue import Full

            raise Full
        self._unfinished.append(None)
        self._items.append(item)
        self._ready.release()

    def get(self, block: bool = True, timeout: float | None = None) -> T:
        """Remove and return an item, waiting for one.

        Args:
            block: False does not wait.
            timeout: seconds to wait for an item; None waits for ever.

        Raises:
            queue.Empty: there was no item in time.
            ValueError: a negative timeout.
        """
        if not self._ready.acquire(True, self._limit(block, timeout)):
            from queue import Empty

            raise Empty
        item = self._remove()
        if self._room is not None:
            self._room.release()
        return item

    def put_nowait(self, item: T) -> None:
        """Append an item; `queue.Full` if there is no room."""
        self.put(item, block=False)

    def get_nowait(self) -> T:
        """Remove and return an item; `queue.Empty` if there is none."""
        return self.get(block=False)

    def qsize(self) -> int:
        """Return how many items are in the queue."""
        return len(self._items)

    def empty(self) -> bool:
        """Tell whether the queue is empty."""
        return not self._items

    def full(self) -> bool:
        """Tell whether a put would have to wait."""
        return 0 < self.maxsize <= len(self._items)

    def task_done(self) -> None:
        """Say that an item that was got has been dealt with.

        Raises:
            ValueError: called more often than items were put.
        """
        try:
            self._unfinished.pop()
        except IndexError:
            raise ValueError("task_done() called too many times") from None
        if not self._unfinished:
            wake(self._joiners, len(self._joiners.entries))

    def join(self, timeout: float | None = None) -> bool:
        """Wait until every item that was put has been dealt with.

        Args:
            timeout: seconds; None waits for ever.  (`queue.Queue` has no timeout.)

        Returns:
            True if all are dealt with, False if the time was over first.
        """
        deadline = _moment(timeout)
        while self._unfinished:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            waiter = self._joiners.enter(_environment.get_environment().waiter())
            try:
                if self._unfinished:  # pragma: no branch - another thread's task_done()
                    waiter.wait(left)
            finally:
                self._joiners.leave(waiter)
        return True

    def _remove(self) -> T:
        return self._items.popleft()

    @staticmethod
    def _limit(block: bool, timeout: float | None) -> float | None:
        if not block:
            return 0.0
        if timeout is not None and not has_time(timeout) and timeout < 0:
            raise ValueError("'timeout' must be a non-negative number")
        return timeout

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {len(self._items)} items, "
            f"{len(self._ready._waiting)} waiting to get, "
            f"{0 if self._room is None else len(self._room._waiting)} to put>"
        )


class LifoQueue(Queue[T]):
    """A last-in first-out queue between tasks, with the interface of `queue.LifoQueue`."""

    __slots__ = ()

    def _remove(self) -> T:
        return self._items.pop()
