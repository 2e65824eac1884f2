"""greenkombu.deadline: one bound over everything that a call waits for."""

from __future__ import annotations

from greenkombu.deadline import Deadline, remaining
from hub.environment import Environment


def test_no_deadline_leaves_bounds_alone() -> None:
    assert remaining() is None
    assert remaining(3.0) == 3.0
    with Deadline(None):
        assert remaining() is None


def test_the_shorter_bound_wins() -> None:
    with Deadline(10.0):
        assert remaining(3.0) == 3.0
        left = remaining(60.0)
        assert left is not None
        assert 9.0 < left <= 10.0


def test_an_outer_deadline_stays_in_force() -> None:
    with Deadline(1.0):
        with Deadline(60.0):
            left = remaining()
            assert left is not None
            assert left <= 1.0
        with Deadline(0.0) as inner:
            assert remaining() == 0.0
            assert inner.expired
        assert (remaining() or 0.0) > 0.5
    assert remaining() is None


def test_a_negative_timeout_is_over_at_once() -> None:
    with Deadline(-5.0):
        assert remaining() == 0.0


def test_a_deadline_belongs_to_one_task(env: Environment) -> None:
    seen: list[float | None] = []
    with Deadline(0.5):
        task = env.spawn(lambda: seen.append(remaining()))
        assert task.join(10)
    assert seen == [None]


def test_tasks_have_deadlines_of_their_own(env: Environment) -> None:
    seen: dict[float, float | None] = {}

    def work(seconds: float) -> None:
        with Deadline(seconds):
            env.sleep(0.01)
            seen[seconds] = remaining()

    tasks = [env.spawn(work, seconds) for seconds in (5.0, 50.0, 500.0)]
    assert all(task.join(10) for task in tasks)
    for seconds, left in seen.items():
        assert left is not None
        assert seconds - 2 < left < seconds
