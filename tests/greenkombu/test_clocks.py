"""greenkombu.clocks (behaviour 151)."""

from __future__ import annotations

import heapq
import pickle

import pytest

import hub
from greenkombu.clocks import LamportClock, timetuple


def test_b151_forward_and_adjust() -> None:
    clock = LamportClock(5)
    assert clock.forward() == 6
    assert clock.adjust(20) == 21
    assert clock.adjust(3) == 22
    assert clock.value == 22
    assert (str(clock), repr(clock)) == ("22", "<LamportClock: 22>")
    assert LamportClock().value == LamportClock.value == 0


def test_b151_no_value_is_given_twice_to_tasks_that_share_a_clock() -> None:
    env = hub.get_environment()
    clock = LamportClock()
    seen: list[int] = []

    def work() -> None:
        for n in range(200):
            seen.append(clock.forward())
            if n % 50 == 0:
                clock.adjust(n)
                env.sleep(0)

    tasks = [env.spawn(work) for _ in range(5)]
    for task in tasks:
        task.result(30)
    assert len(set(seen)) == len(seen) == 1000


def test_a_lock_of_the_callers_choice_is_used() -> None:
    class Lock:
        used = 0

        def __enter__(self) -> None:
            Lock.used += 1

        def __exit__(self, *exc_info: object) -> None:
            pass

    clock = LamportClock(0, Lock)
    clock.forward()
    clock.adjust(1)
    assert Lock.used == 2


def test_sort_heap_finds_the_first_event() -> None:
    clock = LamportClock()
    assert clock.sort_heap([(1, "b"), (1, "a"), (2, "0")]) == (1, "a")
    assert clock.sort_heap([(1, "b"), (2, "a")]) == (1, "b")
    assert clock.sort_heap([(1, "b", "more")]) == (1, "b", "more")
    with pytest.raises(IndexError):
        clock.sort_heap([])


def test_timetuple_is_ordered_by_clock_then_id() -> None:
    assert timetuple(1, 10.0, "a") < timetuple(2, 1.0, "a")
    assert timetuple(1, 10.0, "a") < timetuple(1, 1.0, "b")
    assert timetuple(2, 1.0, "a") > timetuple(1, 10.0, "b")
    assert timetuple(1, 1.0, "a") <= timetuple(1, 1.0, "a") >= timetuple(1, 1.0, "a")


def test_timetuple_without_clock_is_ordered_by_time() -> None:
    assert timetuple(None, 10.0, "b") < timetuple(1, 11.0, "a")
    assert timetuple(3, 4.0, "a") < timetuple(0, 5.0, "b")


def test_timetuple_in_a_heap() -> None:
    heap: list[timetuple] = []
    for clock in (3, 1, 2):
        heapq.heappush(heap, timetuple(clock, 0.0, "id", object()))
    assert [heapq.heappop(heap).clock for _ in range(3)] == [1, 2, 3]


def test_timetuple_is_a_tuple_that_pickles() -> None:
    moment = timetuple(1, 10.0, "a", {"b": 1})
    assert tuple(moment) == (1, 10.0, "a", {"b": 1})
    assert (moment.clock, moment.timestamp, moment.id, moment.obj) == tuple(moment)
    copy = pickle.loads(pickle.dumps(moment))
    assert type(copy) is timetuple
    assert copy == moment
    assert repr(moment) == "<timetuple: clock=1, timestamp=10.0, id=a {'b': 1}>"
