"""How long to wait between two attempts."""

from __future__ import annotations

from collections.abc import Callable

from greenkombu.deadline import remaining
from hub.environment import get_environment

__all__ = ("Intervals", "bounded_wait", "pause")

# Below this an attempt that would follow the wait has no time to succeed.
_LEAST_ATTEMPT_SECONDS = 0.05


class Intervals:
    """Give the waits start, start + step, ... and then maximum for ever.

    Args:
        start: seconds of the first wait.
        step: seconds by which each wait is longer than the one before.
        maximum: seconds of the longest wait; None sets no limit.
    """

    __slots__ = ("_maximum", "_next", "_step")

    def __init__(self, start: float, step: float, maximum: float | None) -> None:
        self._next = float(start or 0)
        self._step = float(step or 0)
        self._maximum = maximum

    def __iter__(self) -> Intervals:
        return self

    def __next__(self) -> float:
        interval = self._next
        if self._maximum is not None and interval >= self._maximum:
            return float(self._maximum)
        self._next = interval + self._step
        return interval


def bounded_wait(interval: float) -> float | None:
    """Fit a wait into the deadline of the running task.

    Args:
        interval: seconds that the wait would take without a deadline.

    Returns:
        Seconds: the interval, or half of what is left when the interval would use it up, so that
        an attempt still fits in; None when there is no time for another attempt.
    """
    left = remaining()
    if left is None or interval < left - _LEAST_ATTEMPT_SECONDS:
        return interval
    if left <= _LEAST_ATTEMPT_SECONDS:
        return None
    return left / 2


def pause(seconds: float, callback: Callable[[], object] | None = None) -> None:
    """Sleep and call back at the beginning of every second of it.

    Args:
        seconds: how long; 0 returns at once.
        callback: called without arguments; what it raises ends the sleep.
    """
    sleep = get_environment().sleep
    while seconds > 0:
        if callback is not None:
            callback()
        # Without a callback nothing needs the slices.
        part = min(seconds, 1.0) if callback is not None else seconds
        sleep(part)
        seconds -= part
