"""Handles and timers: what a hub has been asked to call, and when.

Timers live in a binary heap ordered by (due time, order of entry).  Cancelling only
marks a timer; marked ones are dropped when they reach the top, or all at once when they
outnumber the live ones, so that cancelling stays O(1) and the heap stays within twice the live
count.  Times are seconds on the hub's monotonic clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

from hub.errors import BadArgumentError

__all__ = ["Handle", "Timer", "TimerHeap"]

# Below this many cancelled timers a sweep costs more than it frees.
_SWEEP_FLOOR = 64


def _nothing() -> None:
    """What a cancelled handle refers to in place of its callback."""


class Handle:
    """One queued call; `cancel()` takes it back if it has not run."""

    __slots__ = ("__weakref__", "args", "callback", "cancelled")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if not callable(callback):
            raise BadArgumentError(
                f"cannot call {callback!r}: give a function, and its arguments behind it"
            )
        self.callback = callback
        self.args = args
        self.cancelled = False

    def cancel(self) -> None:
        """Do not call, and let go of the callback; idempotent, from any thread."""
        self.cancelled = True
        self.callback = _nothing
        self.args = ()

    def __repr__(self) -> str:
        name = getattr(self.callback, "__qualname__", None) or repr(self.callback)
        state = "cancelled" if self.cancelled else name
        return f"<{type(self).__name__} {state}>"


class Timer(Handle):
    """A call at a time, or at regular times (`interval` seconds apart)."""

    __slots__ = ("_heap", "due", "interval")

    def __init__(
        self,
        due: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        interval: float | None = None,
    ) -> None:
        super().__init__(callback, args)
        self.due = due
        self.interval = interval
        self._heap: TimerHeap | None = None

    def cancel(self) -> None:
        """Do not call (again); idempotent, from any thread."""
        if not self.cancelled:
            super().cancel()
            heap, self._heap = self._heap, None
            if heap is not None:
                heap.cancelled += 1


class TimerHeap:
    """Timers by due time; used from the hub's thread, but for `Timer.cancel()`."""

    __slots__ = ("_entries", "_order", "cancelled")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Timer]] = []
        self._order = 0
        #: How many of the entries are cancelled; a hint, as other threads count along.
        self.cancelled = 0

    def __len__(self) -> int:
        """Return the number of live timers; native threads that cancel may blur it."""
        return max(len(self._entries) - self.cancelled, 0)

    def __bool__(self) -> bool:
        """Tell whether there may be a live timer; never False when there is one."""
        return bool(self._entries)

    def push(self, timer: Timer) -> None:
        """Enter `timer`; timers due at the same time run in order of entry."""
        if self.cancelled > _SWEEP_FLOOR and self.cancelled * 2 > len(self._entries):
            self._sweep()
        timer._heap = self
        self._order += 1
        heapq.heappush(self._entries, (timer.due, self._order, timer))

    def next_due(self) -> float | None:
        """Return when the next live timer is due, or None if there is none."""
        entries = self._entries
        while entries:
            if not entries[0][2].cancelled:
                return entries[0][0]
            heapq.heappop(entries)
            self.cancelled -= 1
        return None

    def pop_due(self, now: float) -> Timer | None:
        """Take out the first live timer that is due at `now`, or return None."""
        due = self.next_due()
        if due is None or due > now:
            return None
        timer = heapq.heappop(self._entries)[2]
        timer._heap = None
        return timer

    def clear(self) -> None:
        """Drop all timers without calling them."""
        for _, _, timer in self._entries:
            timer._heap = None
            timer.cancel()
        self._entries.clear()
        self.cancelled = 0

    def _sweep(self) -> None:
        self._entries = [entry for entry in self._entries if not entry[2].cancelled]
        heapq.heapify(self._entries)
        self.cancelled = 0
