"""The timer heap and timers of a hub, on a clock that stands still."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub.testing import FakeClock, scripted_hub
from hub.timers import Timer, TimerHeap


def test_timers_come_out_in_order_of_due_time_and_entry() -> None:
    heap = TimerHeap()
    timers = [Timer(due, print, ()) for due in (3.0, 1.0, 2.0, 1.0)]
    for timer in timers:
        heap.push(timer)
    assert len(heap) == 4
    out = [heap.pop_due(10.0) for _ in range(4)]
    assert out == [timers[1], timers[3], timers[2], timers[0]]
    assert heap.pop_due(10.0) is None


def test_timer_that_is_not_due_stays() -> None:
    heap = TimerHeap()
    heap.push(Timer(5.0, print, ()))
    assert heap.pop_due(4.9) is None
    assert heap.next_due() == 5.0


@given(st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=300))
def test_cancelled_timers_never_come_out_and_counts_are_exact(
    entries: list[tuple[float, bool]],
) -> None:
    heap = TimerHeap()
    alive = []
    for due, cancel in entries:
        timer = Timer(due, print, ())
        heap.push(timer)
        if cancel:
            timer.cancel()
            timer.cancel()
        else:
            alive.append(due)
        assert len(heap) == len(alive)
    out = []
    while (timer_out := heap.pop_due(1000.0)) is not None:
        out.append(timer_out.due)
    assert out == sorted(alive)
    assert len(heap) == 0


def test_cancelling_many_does_not_keep_them() -> None:
    heap = TimerHeap()
    for number in range(10_000):
        timer = Timer(float(number), print, ())
        heap.push(timer)
        timer.cancel()
    heap.push(Timer(1.0, print, ()))
    assert len(heap) == 1
    assert len(heap._entries) < 1000


def test_clear_cancels_what_is_left() -> None:
    heap = TimerHeap()
    timer = Timer(1.0, print, ())
    heap.push(timer)
    heap.clear()
    assert timer.cancelled
    assert heap.next_due() is None
    timer.cancel()
    assert len(heap) == 0


def test_hub_waits_exactly_until_the_next_timer() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[float] = []
    loop.call_later(30, lambda: seen.append(clock()))
    loop.call_at(clock() + 10, lambda: seen.append(clock()))
    began = clock()
    loop.run_once(100)
    loop.run_once(100)
    assert [moment - began for moment in seen] == [10, 30]
    loop.close()


def test_repeated_timer_does_not_drift_and_leaves_out_what_was_missed() -> None:
    clock = FakeClock(0.0)
    loop = scripted_hub(clock)
    seen: list[float] = []

    def tick() -> None:
        seen.append(clock())
        if len(seen) == 2:
            clock.advance(3.5)  # something else was slow

    timer = loop.call_repeatedly(1.0, tick)
    for _ in range(4):
        loop.run_once(100)
    assert seen == [1.0, 2.0, 6.0, 7.0]
    timer.cancel()
    assert loop.run_once(5) == 0
    assert clock() == 12.0
    loop.close()


def test_timer_cancelled_by_its_own_callback_and_by_another() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[str] = []
    second = loop.call_later(1, seen.append, "second")
    first = loop.call_at(second.due - 0.5, second.cancel)
    again = loop.call_repeatedly(2, lambda: (seen.append("once"), again.cancel()))
    for _ in range(5):
        loop.run_once(3)
    assert seen == ["once"]
    assert not first.cancelled
    loop.close()


def test_handles_and_clock_describe_themselves() -> None:
    timer = Timer(1.0, print, ())
    assert "print" in repr(timer)
    timer.cancel()
    assert "cancelled" in repr(timer)
    with pytest.raises(ValueError, match="cannot go back"):
        FakeClock().advance(-1)
