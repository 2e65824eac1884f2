"""The queue of those who wait, which all primitives and the pool are built on.

Who wants to wait enters the queue *first* and looks at the state *again* afterwards, so a
release in between is not missed.  Who takes an entry out has claimed it: the giver, who
then owes the waiter what it waits for, or the waiter itself, who then gives up.  A
waiter that finds its entry gone has been served, whatever its clock says.

Every operation on the queue is one that the interpreter does not interrupt, so
finalizers, signal handlers and other native threads may use it at any moment.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from hub import _fork
from hub import environment as _environment

if TYPE_CHECKING:
    from hub.environment import Waiter

__all__ = ["WaiterQueue", "wake"]


class _Forks:
    """Counts the forks since the first waiter, and knows which thread the last one left alive."""

    __slots__ = ("__weakref__", "count", "survivor")

    def __init__(self) -> None:
        self.count = 0
        self.survivor = 0

    def before_fork(self) -> None:
        """Nothing to prepare."""

    def after_fork_in_parent(self) -> None:
        """Nothing has changed."""

    def after_fork_in_child(self) -> None:
        self.count += 1
        self.survivor = _environment.get_environment().thread_id()

    def survived(self, waiter: Waiter) -> bool:
        """Tell whether `waiter`, which was made before the last fork, is in this process."""
        return waiter.thread == self.survivor


_forks = _Forks()
_fork.join_forks(_forks)


class WaiterQueue:
    """Those who wait for one thing, in order of arrival.

    `entries` is public for one purpose: a look at whether anybody waits, without a call.
    """

    __slots__ = ("entries",)

    def __init__(self) -> None:
        #: With the number of forks before each.
        self.entries: OrderedDict[Waiter, int] = OrderedDict()

    def enter(self, waiter: Waiter) -> Waiter:
        """Put `waiter` at the end of the queue and return it."""
        self.entries[waiter] = _forks.count
        return waiter

    def leave(self, waiter: Waiter) -> bool:
        """Take `waiter` out; False if somebody has claimed it before."""
        return self.entries.pop(waiter, None) is not None

    def claim(self) -> Waiter | None:
        """Take out and return the first who is alive; None if there is none."""
        while self.entries:
            try:
                waiter, forks = self.entries.popitem(last=False)
            except KeyError:  # pragma: no cover - claimed by another thread since the look
                continue
            if forks == _forks.count or _forks.survived(waiter):
                return waiter
        return None

    def first(self) -> Waiter | None:
        """Return the first entry, alive or not, without claiming it; None if there is none."""
        while self.entries:
            try:
                return next(iter(self.entries))
            except (RuntimeError, StopIteration):  # another thread's change
                continue
        return None

    def take(self, waiter: Waiter) -> bool:
        """Claim `waiter`; False if somebody has claimed it before, or it is not alive."""
        forks = self.entries.pop(waiter, None)
        return forks == _forks.count or (forks is not None and _forks.survived(waiter))


def wake(queue: WaiterQueue, count: int) -> None:
    """Wake the first `count` waiters of `queue`."""
    for _ in range(count):
        waiter = queue.claim()
        if waiter is None:
            return
        waiter.wake()
