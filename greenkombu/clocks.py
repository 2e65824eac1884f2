"""Logical clocks: which event came first, without trusting wall clocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from operator import itemgetter
from typing import Any

from hub import primitives

__all__ = ["LamportClock", "timetuple"]


class timetuple(tuple[Any, ...]):
    """When and where an event happened; orders events in a heap.

    Two events that both have a clock are ordered by it, and by id where it is equal; otherwise by
    time.

    Args:
        clock: value of the sender's logical clock; None or 0 if it has none.
        timestamp: Unix time, in seconds.
        id: of the sender, such as ``"host:pid"``.
        obj: anything that belongs to the event.
    """

    __slots__ = ()

    def __new__(cls, clock: int | None, timestamp: float, id: str, obj: Any = None) -> timetuple:
        return tuple.__new__(cls, (clock, timestamp, id, obj))

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    def __lt__(self, other: Any) -> bool:
        if self[0] and other[0]:
            return bool((self[0], self[2]) < (other[0], other[2]))
        return bool(self[1] < other[1])

    def __gt__(self, other: Any) -> bool:
        return bool(other < self)

    def __le__(self, other: Any) -> bool:
        return not other < self

    def __ge__(self, other: Any) -> bool:
        return not self < other

    def __repr__(self) -> str:
        clock, timestamp, id, obj = self
        return f"<timetuple: clock={clock}, timestamp={timestamp}, id={id} {obj!r}>"

    clock = property(itemgetter(0))
    timestamp = property(itemgetter(1))
    id = property(itemgetter(2))
    obj = property(itemgetter(3))


class LamportClock:
    """Lamport's logical clock: a counter that never runs behind what was received.

    Call `forward` when sending and put its result into the message; call `adjust` with the number
    in each message that is received.  Then the number of an event is larger than that of every
    event that can have caused it (L. Lamport, "Time, clocks, and the ordering of events in a
    distributed system", 1978).

    Args:
        initial_value: where to begin.
        Lock: makes the lock that guards the counter; by default that of the hub, with which green
            threads and native threads may share a clock.
    """

    #: The clock's current value.
    value = 0

    def __init__(
        self,
        initial_value: int = 0,
        Lock: Callable[[], AbstractContextManager[Any]] = primitives.Lock,
    ) -> None:
        self.value = initial_value
        self.mutex = Lock()

    def adjust(self, other: int) -> int:
        """Note that a message with the value other was received.

        Returns:
            The new value: one more than the larger of the two.
        """
        with self.mutex:
            value = self.value = max(self.value, other) + 1
        return value

    def forward(self) -> int:
        """Note that a message is sent.

        Returns:
            The new value, for the message.
        """
        with self.mutex:
            self.value += 1
            return self.value

    def sort_heap(self, h: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return the first event of a sorted list.

        Args:
            h: tuples that begin with (clock value, id of the process), sorted by clock value.

        Returns:
            The event with the lowest clock value; of several, the one with the lowest id.

        Raises:
            IndexError: h is empty.
        """
        lowest = h[0][0]
        return min((event for event in h if event[0] == lowest), key=itemgetter(1))

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return f"<LamportClock: {self.value}>"
