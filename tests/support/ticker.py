"""Notice when something stops the other tasks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub.environment import Environment, Task

__all__ = ["Ticker"]


class Ticker:
    """A task that ticks at a short interval and remembers the longest pause between two ticks.

    Args:
        environment: where the task runs.
        interval: seconds between two ticks.
    """

    def __init__(self, environment: Environment, interval: float = 0.005) -> None:
        self.interval = interval
        self.ticks = 0
        self._environment = environment
        #: Seconds of thread time of the longest pause. Where tasks share a thread, that is what the
        #: others used, and a machine that stands still adds nothing; elsewhere it means nothing.
        self.largest_slice = 0.0
        self._last = 0.0
        self._used = 0.0
        self._largest = 0.0
        self._stopped = False
        self._task: Task | None = None

    def start(self) -> None:
        """Start to tick; returns after the first tick."""
        first = self._environment.waiter()
        self._task = self._environment.spawn(self._run, first.wake)
        assert first.wait(10.0), "the ticker's task did not start"

    def stop(self) -> None:
        """Stop and wait for the task; idempotent."""
        self._stopped = True
        if self._task is not None:
            assert self._task.join(10.0), "the ticker's task did not end"

    def reset(self) -> None:
        """Forget the pauses up to now."""
        self.ticks = 0
        self._largest = self.largest_slice = 0.0
        self._last, self._used = time.monotonic(), time.thread_time()

    @property
    def largest_gap(self) -> float:
        """Seconds of the longest pause between two ticks, the one that lasts now included."""
        return max(self._largest, 0.0 if self._stopped else time.monotonic() - self._last)

    def _run(self, started: object) -> None:
        assert callable(started)
        self._last, self._used = time.monotonic(), time.thread_time()
        started()
        while not self._stopped:
            self._environment.sleep(self.interval)
            now, used = time.monotonic(), time.thread_time()
            self._largest = max(self._largest, now - self._last)
            self.largest_slice = max(self.largest_slice, used - self._used)
            self._last, self._used = now, used
            self.ticks += 1

    def __repr__(self) -> str:
        return f"<Ticker ticks={self.ticks} largest_gap={self.largest_gap:.4f} s>"
