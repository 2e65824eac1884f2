"""One task works, all who want the same wait for it.

Thousands of tasks may find at the same moment that their shared connection is gone. One of them
connects; the others wait and get what it got, the result or the error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from greenkombu._forks import generation
from greenkombu.deadline import remaining
from hub.environment import get_environment
from hub.primitives import Event

__all__ = ("SingleFlight", "flights")

T = TypeVar("T")
_Key = tuple[str, int, int]


class _Flight:
    """One run of the work, with those who wait for it."""

    __slots__ = ("_finished", "done", "error", "over", "owner", "result")

    def __init__(self, owner: object) -> None:
        self.owner = owner
        # Made by the first who waits: mostly nobody does.
        self._finished: dict[int, Event] = {}
        self.over = False
        self.done = False
        self.result: Any = None
        self.error: Exception | None = None

    def wait(self, timeout: float | None) -> bool:
        """Wait for the end; False if the time was over first."""
        finished = self._finished.setdefault(0, Event())
        # Either this look sees the end, or the end sees the event.
        return self.over or finished.wait(timeout)

    def end(self) -> None:
        """Wake those who wait."""
        self.over = True
        finished = self._finished.get(0)
        if finished is not None:
            finished.set()


class SingleFlight:
    """Run the same work at most once at a time.

    One object serves any number of owners, so that an idle owner costs nothing.
    """

    __slots__ = ("_flights",)

    def __init__(self) -> None:
        self._flights: dict[_Key, _Flight] = {}

    def running(self, owner: object, name: str) -> bool:
        """Tell whether a task is at this work now."""
        return (name, id(owner), generation()) in self._flights

    def run(
        self, owner: object, name: str, work: Callable[[], T], timeout: float | None = None
    ) -> T:
        """Run `work`, or wait for the task that already runs it.

        Args:
            owner: whose work it is; its identity counts.
            name: what the work is, as error messages call it.
            work: it may switch; it has to be bounded itself.
            timeout: seconds to wait for another task; None waits as long as that takes. The
                deadline of the calling task (`greenkombu.deadline`) holds as well.

        Returns:
            What the work returned, whoever ran it.

        Raises:
            TimeoutError: the other task needed longer.
            RuntimeError: the work asks for itself.
            Exception: what the work raised, whoever ran it. A kill or a Timeout of the task that
                ran it is that task's own business: one of the waiting tasks takes over.
        """
        flights = self._flights
        # A flight of the parent process never lands in a child.
        key = (name, id(owner), generation())
        me = get_environment().current()
        while True:
            mine = _Flight(me)
            flight = flights.setdefault(key, mine)
            if flight is mine:
                return self._run(key, work, mine)
            if flight.owner == me:
                raise RuntimeError(f"{name}: asked for by the very code that does it")
            if not flight.wait(remaining(timeout)):
                raise TimeoutError(f"{name}: another task is at it and did not finish in time")
            if flight.error is not None:
                raise flight.error.with_traceback(None)
            if flight.done:
                result: T = flight.result
                return result

    def _run(self, key: _Key, work: Callable[[], T], flight: _Flight) -> T:
        try:
            result = flight.result = work()
            flight.done = True
            return result
        except Exception as exc:
            flight.error = exc
            raise
        finally:
            # Only its owner takes a flight away, and does so before it wakes the others.
            del self._flights[key]
            flight.end()
            # The error's traceback holds this frame, and the flight holds the error.
            del flight


#: The one of this process.
flights = SingleFlight()
