"""Locks and semaphores; `hub.primitives` tells what is common to them."""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

from hub import environment as _environment
from hub._waiting import WaiterQueue
from hub.arguments import has_time

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["BoundedSemaphore", "Lock", "RLock", "Semaphore"]


def _seconds(blocking: bool, timeout: float | None) -> float | None:
    """Return how long to wait, 0.0 for not at all and None for ever, by threading's rules."""
    if timeout is None or timeout == -1:
        return None if blocking else 0.0
    if not blocking:
        raise ValueError("can't specify a timeout for a non-blocking call")
    if not has_time(timeout) and timeout < 0:
        raise ValueError("timeout value must be a non-negative number of seconds, or -1")
    return timeout


class _Permits(ABC):
    """What Lock and Semaphore share: permits that are handed to the first waiter."""

    __slots__ = ("__weakref__", "_queue", "_waiting")

    def __init__(self) -> None:
        self._queue = WaiterQueue()
        self._waiting = self._queue.entries

    @abstractmethod
    def _take(self) -> bool:
        """Take one free permit, if there is one."""

    @abstractmethod
    def _put(self) -> None:
        """Make one permit free."""

    def _hand_out(self) -> None:
        """Give free permits to those who wait, first come, first served."""
        # The permit is taken before a waiter is claimed: whoever finds itself claimed
        # owns a permit.
        while self._waiting and self._take():
            waiter = self._queue.claim()
            if waiter is not None:
                waiter.wake()
            else:
                self._put()  # and look again: somebody may have come in between

    def _acquire(self, timeout: float | None) -> bool:
        """Take a permit, waiting for it in the queue; the caller has tried already."""
        if timeout is not None and not has_time(timeout):
            # A queue of nobody but dead threads (after a fork) must not bar the way.
            self._hand_out()
            return not self._waiting and self._take()
        waiter = self._queue.enter(_environment.get_environment().waiter())
        try:
            self._hand_out()
            if waiter.wait(timeout):
                return True
        except BaseException:
            if not self._queue.leave(waiter):
                self._put()
                self._hand_out()
            raise
        return not self._queue.leave(waiter)  # handed over at the last moment


class Lock(_Permits):
    """Mutual exclusion with the interface of `threading.Lock` and FIFO hand-over."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        super().__init__()
        # {} while free, {0: token} while held: setdefault() tests and sets in one step.
        self._held: dict[int, object] = {}

    def acquire(self, blocking: bool = True, timeout: float | None = -1) -> bool:
        """Take the lock.

        Args:
            blocking: False returns at once.
            timeout: seconds to wait; -1 or None waits for ever, 0 does not wait.

        Returns:
            True if the lock is held now by the caller.

        Raises:
            ValueError: a negative timeout, or one together with `blocking=False`.
            BlockingCallError: it would have to wait in a callback of the hub.
        """
        if not blocking or timeout != -1:
            seconds = _seconds(blocking, timeout)
        else:
            seconds = None
        if not self._waiting:
            token = object()
            try:
                if self._held.setdefault(0, token) is token:
                    return True
            except BaseException:  # pragma: no cover - a signal's, see test_pool_steps
                if self._held.get(0) is token:
                    self.release()
                raise
        return self._acquire(seconds)

    def release(self) -> None:
        """Unlock, or hand the lock to the task that has waited longest.

        Any task may release; never waits.

        Raises:
            RuntimeError: the lock is not locked.
        """
        if self._held.pop(0, None) is None:
            raise RuntimeError("release unlocked lock")
        if self._waiting:
            self._hand_out()

    def locked(self) -> bool:
        """Tell whether the lock is held."""
        return bool(self._held)

    def _take(self) -> bool:
        token = object()
        return self._held.setdefault(0, token) is token

    def _put(self) -> None:
        self._held.pop(0, None)

    def _at_fork_reinit(self) -> None:
        """Make the lock free, in the child of a fork (as threading's locks have it)."""
        self.__init__()  # type: ignore[misc]

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "locked" if self._held else "unlocked"
        return f"<{type(self).__name__} {state}, {len(self._waiting)} waiting, at {id(self):#x}>"


class RLock:
    """A lock that the task that holds it may take again, as `threading.RLock`.

    The owner is a task: a greenlet under gevent and eventlet, else a native thread.
    """

    __slots__ = ("__weakref__", "_count", "_lock", "_owner")

    def __init__(self) -> None:
        self._lock = Lock()
        self._owner: object = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float | None = -1) -> bool:
        """Take the lock, or count one more if the caller has it; arguments as `Lock.acquire`."""
        me = _environment.get_environment().current()
        if self._owner == me:
            _seconds(blocking, timeout)
            self._count += 1
            return True
        if not self._lock.acquire(blocking, timeout):
            return False
        self._owner = me
        self._count = 1
        return True

    def release(self) -> None:
        """Undo one acquire; the last one unlocks or hands over.

        Raises:
            RuntimeError: the calling task does not hold the lock.
        """
        if self._owner is None or self._owner != _environment.get_environment().current():
            raise RuntimeError("cannot release un-acquired lock")
        if self._count > 1:
            self._count -= 1
            return
        self._count = 0
        self._owner = None
        self._lock.release()

    def locked(self) -> bool:
        """Tell whether any task holds the lock."""
        return self._lock.locked()

    def _at_fork_reinit(self) -> None:
        """Make the lock free, in the child of a fork (as threading's locks have it)."""
        self.__init__()  # type: ignore[misc]

    # What Condition (ours and threading's) asks of its lock.
    def _is_owned(self) -> bool:
        return self._owner is not None and (self._owner == _environment.get_environment().current())

    def _release_save(self) -> tuple[int, object]:
        if not self._is_owned():
            raise RuntimeError("cannot release un-acquired lock")
        state = (self._count, self._owner)
        self._count = 0
        self._owner = None
        self._lock.release()
        return state

    def _acquire_restore(self, state: tuple[int, object]) -> None:
        self._lock.acquire()
        self._count, self._owner = state

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "locked" if self._lock.locked() else "unlocked"
        return (
            f"<{type(self).__name__} {state}, owner {self._owner!r}, count {self._count}, "
            f"{len(self._lock._waiting)} waiting, at {id(self):#x}>"
        )


class Semaphore(_Permits):
    """A number of permits, with the interface of `threading.Semaphore` and FIFO hand-over."""

    __slots__ = ("_initial", "_returned")

    def __init__(self, value: int = 1) -> None:
        if value < 0:
            raise ValueError("semaphore initial value must be >= 0")
        super().__init__()
        # Permits that were never taken, counted down by next() in one step and in no
        # memory, and permits that came back.
        self._initial = itertools.repeat(True, value)
        self._returned: deque[bool] = deque()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit.

        Args:
            blocking: False returns at once.
            timeout: seconds to wait; None waits for ever, zero or less does not wait.

        Returns:
            True if the caller has a permit now.

        Raises:
            ValueError: a timeout together with `blocking=False`.
            BlockingCallError: it would have to wait in a callback of the hub.
        """
        if not blocking and timeout is not None:
            raise ValueError("can't specify timeout for non-blocking acquire")
        if not self._waiting and self._take():
            return True
        return self._acquire(timeout if blocking else 0.0)

    def release(self, n: int = 1) -> None:
        """Give back `n` permits, to those who have waited longest first; never waits.

        Raises:
            ValueError: n is less than one.
        """
        if n < 1:
            raise ValueError("n must be one or more")
        self._returned.extend(itertools.repeat(True, n))
        if self._waiting:
            self._hand_out()

    @property
    def value(self) -> int:
        """How many permits are free now."""
        return operator.length_hint(self._initial) + len(self._returned)

    def _take(self) -> bool:
        try:
            return self._returned.popleft()
        except IndexError:
            return next(self._initial, False)

    def _put(self) -> None:
        self._returned.append(True)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.value} free, {len(self._waiting)} waiting, "
            f"at {id(self):#x}>"
        )


class BoundedSemaphore(Semaphore):
    """A semaphore that refuses more releases than there were acquires."""

    __slots__ = ("_taken",)

    def __init__(self, value: int = 1) -> None:
        super().__init__(value)
        # Room for releases: each permit that is out has left one mark here.
        self._taken: deque[bool] = deque()

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        """Take a permit; arguments as `Semaphore.acquire`."""
        taken = super().acquire(blocking, timeout)
        if taken:
            self._taken.append(True)
        return taken

    def release(self, n: int = 1) -> None:
        """Give back `n` permits.

        Raises:
            ValueError: n is less than one, or more permits than were taken; then
                nothing is given back.
        """
        if n < 1:
            raise ValueError("n must be one or more")
        for done in range(n):
            try:
                self._taken.pop()
            except IndexError:
                self._taken.extend(itertools.repeat(True, done))
                raise ValueError("Semaphore released too many times") from None
        super().release(n)
