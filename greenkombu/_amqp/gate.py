"""A queue of tasks that wait until there is room."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from hub.environment import get_environment

if TYPE_CHECKING:
    from hub.environment import Waiter

__all__ = ["Gate"]


class Gate:
    """Let tasks through while a condition holds; the others wait in order of arrival.

    Whoever makes the condition true calls `open`, from anywhere; it never blocks.
    """

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: dict[Waiter, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def wait(self, is_open: Callable[[], object], timeout: float | None) -> bool:
        """Park until `is_open()`.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            False if it was not open in time.
        """
        if not self._waiting and is_open():
            return True
        environment = get_environment()
        deadline = None if timeout is None else monotonic() + timeout
        first = True
        while True:
            waiter = environment.waiter()
            # In the queue before the look, so that no `open` in between is missed.
            self._waiting[waiter] = None
            try:
                # A task that was let through but found the room taken again goes on waiting;
                # one that has just come does not overtake those that wait.
                if is_open() and (not first or len(self._waiting) == 1):
                    return True
                left = None if deadline is None else deadline - monotonic()
                if not waiter.wait(left):
                    return bool(is_open())
            except BaseException:
                if waiter.woken:
                    self.open(1)  # it was let through and cannot go: the next one may
                raise
            finally:
                self._waiting.pop(waiter, None)
            if is_open():
                return True
            first = False

    def open(self, count: int | None = None) -> None:
        """Let the first *count* waiting tasks look again; None means all."""
        while self._waiting and (count is None or count > 0):
            try:
                waiter = next(iter(self._waiting))
            except (StopIteration, RuntimeError):  # changed by another thread since the look
                continue
            if self._waiting.pop(waiter, waiter) is None:
                waiter.wake()
                if count is not None:
                    count -= 1
