from __future__ import annotations

import gc
import itertools
import time
from typing import Any

import pytest

from greenkombu.deadline import Deadline, remaining
from greenkombu.exceptions import KombuError, LimitExceeded, UnsupportedOperation
from greenkombu.resource import Resource, ResourceClosedError, ResourceReleaseError
from hub import BadArgumentError, Event, PoolReleaseError, get_environment
from tests.support.tasks import until


class Thing:
    """A resource; what happens to it is in its pool's log."""

    def __init__(self, log: list[Any], number: int) -> None:
        self.log = log
        self.number = number

    def close(self) -> None:
        self.log.append(("close", self.number))


class Slotted(Thing):
    __slots__ = ()


class Things(Resource[Any]):
    def __init__(self, *args: Any, kind: Any = Thing, **kwargs: Any) -> None:
        self.log: list[Any] = []
        self.kind = kind
        self.numbers = itertools.count(1)
        self.broken: set[int] = set()
        super().__init__(*args, **kwargs)

    def new(self) -> Any:
        return self.kind(self.log, next(self.numbers))

    def check_resource(self, resource: Any) -> bool:
        return resource.number not in self.broken


def waiting(pool: Things) -> int:
    stats = pool.stats()
    assert stats is not None
    return stats.waiting


def test_b050_limit_is_kept() -> None:
    pool = Things(2)
    first, second = pool.acquire(), pool.acquire()
    with pytest.raises(LimitExceeded, match=r"2"):
        pool.acquire()
    first.release()
    assert pool.acquire() is first
    assert first is not second
    stats = pool.stats()
    assert stats is not None
    assert (stats.held, stats.idle, stats.created_total) == (2, 0, 2)
    assert "2 of 2 in use" in repr(pool)


def test_b051_block_waits_and_timeout_bounds_it() -> None:
    pool = Things(1)
    held = pool.acquire()
    started = time.monotonic()
    with pytest.raises(LimitExceeded):
        pool.acquire(block=True, timeout=0.05)
    assert 0.04 < time.monotonic() - started < 10
    environment = get_environment()
    task = environment.spawn(pool.acquire, block=True, timeout=20)
    until(environment, lambda: waiting(pool))
    held.release()
    assert task.result(5) is held
    with pytest.raises(LimitExceeded):
        pool.acquire(timeout=5)  # a timeout alone does not wait


def test_the_timeout_bounds_what_makes_and_readies_a_resource() -> None:
    left: dict[str, float | None] = {}

    class Asking(Things):
        def new(self) -> Any:
            left["new"] = remaining()
            return super().new()

    class Readying(Asking):
        def prepare(self, resource: Any) -> Any:
            left["prepare"] = remaining()
            return resource

    for pool in (Asking(1), Readying(1), Readying(None)):
        left.clear()
        pool.acquire(block=True, timeout=20).release()
        assert all(0 < (each or 0) <= 20 for each in left.values())
        with Deadline(5):
            pool.acquire(block=True, timeout=20).release()
        if "prepare" in left:
            assert 0 < (left["prepare"] or 0) <= 5
    left.clear()
    Readying(1).acquire(timeout=20)  # without block it bounds nothing
    assert left == {"new": None, "prepare": None}
    idle = Things(1)
    idle.acquire().release()
    with pytest.raises(BadArgumentError):
        idle.acquire(block=True, timeout="soon")  # type: ignore[arg-type]


def test_no_deadline_is_set_where_nothing_has_to_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs as much as all the rest of an acquire."""
    pool = Things(1)
    pool.acquire().release()
    entered: list[object] = []
    monkeypatch.setattr(Deadline, "__enter__", entered.append)
    pool.acquire(block=True, timeout=20).release()
    assert entered == []


def test_the_method_release_is_made_once() -> None:
    """A resource without such a method of its own gets it once, not at every acquire."""
    pool = Things(1)
    thing = pool.acquire()
    release = thing.release
    thing.release()
    assert pool.acquire().release is release
    release()
    with pytest.raises(ResourceReleaseError):
        thing.release()


def test_a_class_as_a_resource() -> None:
    """It has a dictionary that takes nothing."""

    class Classes(Resource[Any]):
        def new(self) -> Any:
            return type("Made", (), {"__slots__": ("release",)})

    pool = Classes(1)
    made = pool.acquire()
    pool.release(made)
    with pytest.raises(ResourceReleaseError):
        pool.release(made)
    assert pool.acquire() is made


def test_b052_last_released_is_the_next_acquired() -> None:
    pool = Things(5)
    for _ in range(20):
        pool.acquire().release()
    assert next(pool.numbers) == 2
    a, b, c = (pool.acquire() for _ in range(3))
    for thing in (a, c, b):
        thing.release()
    assert [pool.acquire() for _ in range(3)] == [b, c, a]


@pytest.mark.parametrize("limit", [None, 0])
def test_b053_without_a_limit_nothing_is_pooled(limit: int | None) -> None:
    pool = Things(limit)
    things = [pool.acquire() for _ in range(10)]
    assert [thing.number for thing in things] == list(range(1, 11))
    assert pool.log == []
    for thing in things:
        assert pool.holds(thing)
        thing.release()
        assert not pool.holds(thing)
    assert len(pool.log) == 10
    with pytest.raises(ResourceReleaseError):
        pool.release(things[0])
    thing = pool.acquire()
    pool.replace(thing)
    assert pool.log[-1] == ("close", 11)
    pool.force_close_all()
    with pytest.raises(ResourceClosedError):
        pool.acquire()
    assert pool.stats() is None
    assert repr(pool) == "<Things: closed, no limit>"


def test_b054_nothing_is_made_before_it_is_needed() -> None:
    pool = Things(3)
    assert next(pool.numbers) == 1


def test_b055_preload_makes_resources_at_once() -> None:
    established: list[int] = []

    class Eager(Things):
        def establish_resource(self, resource: Any) -> None:
            established.append(resource.number)

    pool = Eager(3, preload=2)
    assert established == [1, 2]
    stats = pool.stats()
    assert stats is not None
    assert (stats.idle, stats.held) == (2, 0)
    assert Eager(1, preload=5).limit == 1
    assert established == [1, 2, 1]


def test_release_twice_is_refused_and_capacity_stays_exact() -> None:
    pool = Things(1)
    thing = pool.acquire()
    thing.release()
    with pytest.raises(ResourceReleaseError, match="released before") as caught:
        thing.release()
    assert isinstance(caught.value, PoolReleaseError)
    assert isinstance(caught.value, KombuError)
    with pytest.raises(ResourceReleaseError):
        pool.release(thing)
    with pytest.raises(ResourceReleaseError):
        pool.replace(thing)
    assert pool.acquire() is thing
    with pytest.raises(LimitExceeded):
        pool.acquire()


def test_release_into_another_pool_is_refused() -> None:
    pool, other = Things(1), Things(1)
    thing = pool.acquire()
    with pytest.raises(ResourceReleaseError):
        other.release(thing)
    assert pool.holds(thing)
    assert not other.holds(thing)
    thing.release()


def test_s21_replace_serves_a_waiting_task() -> None:
    pool = Things(1)
    thing = pool.acquire()
    environment = get_environment()
    task = environment.spawn(pool.acquire, block=True, timeout=20)
    until(environment, lambda: waiting(pool))
    pool.replace(thing)
    assert task.result(5).number == 2
    assert pool.log == [("close", 1)]


def test_broken_resource_is_not_handed_out_again() -> None:
    pool = Things(1)
    pool.acquire().release()
    pool.broken.add(1)
    assert pool.acquire().number == 2
    assert pool.log == [("close", 1)]


def test_resources_that_take_no_attributes() -> None:
    class Bare:
        __slots__ = ("closed",)

        def __init__(self, log: Any, number: int) -> None:
            self.closed = False

        @property
        def number(self) -> int:
            return 0

        def close(self) -> None:
            self.closed = True

    pool = Things(1, kind=Bare)
    bare = pool.acquire()
    assert pool.holds(bare)
    pool.release(bare)
    with pytest.raises(ResourceReleaseError):
        pool.release(bare)
    assert pool.acquire() is bare
    pool.replace(bare)
    assert bare.closed


def test_prepare_that_fails_gives_the_place_back() -> None:
    class Picky(Things):
        fail = True

        def prepare(self, resource: Any) -> Any:
            if self.fail:
                raise OSError("no")
            return resource

    pool = Picky(1)
    for _ in range(3):
        with pytest.raises(OSError, match="no"):
            pool.acquire()
    pool.fail = False
    pool.acquire().release()
    assert pool.log == [("close", 1), ("close", 2), ("close", 3)]


def test_release_hook_that_fails_discards_the_resource() -> None:
    class Picky(Things):
        def release_resource(self, resource: Any) -> None:
            raise OSError("no")

    pool = Picky(1)
    with pytest.raises(OSError, match="no"):
        pool.acquire().release()
    assert pool.log == [("close", 1)]
    assert pool.acquire().number == 2


def test_s19_what_is_dropped_without_release_is_reclaimed() -> None:
    pool = Things(1)
    with pytest.warns(ResourceWarning, match="dropped without release"):
        reclaim(pool)
    stats = pool.stats()
    assert stats is not None
    assert (stats.held, stats.lost_total) == (0, 1)


def reclaim(pool: Things) -> None:
    pool.acquire()
    gc.collect()
    with pytest.raises(ResourceReleaseError):
        pool.release(Thing([], 1))
    again = pool.acquire(block=True, timeout=5)
    assert again.number == 2
    # It was dead: closing it now would be of what its own finalizers have closed.
    assert pool.log == []
    again.release()


def test_b071_force_close_all() -> None:
    Things(3).force_close_all()
    pool = Things(3)
    held, idle = pool.acquire(), pool.acquire()
    idle.release()
    pool.force_close_all(close_pool=False)
    assert sorted(pool.log) == [("close", 1), ("close", 2)]
    held.release()  # no effect
    kept = [pool.acquire() for _ in range(3)]  # what is dropped may be collected at any moment
    assert [thing.number for thing in kept] == [3, 4, 5]
    pool.force_close_all()
    assert pool.closed
    assert len(pool.log) == 5
    with pytest.raises(ResourceClosedError, match="Acquire on closed pool") as caught:
        pool.acquire()
    assert isinstance(caught.value, RuntimeError)
    pool.force_close_all()


def test_closing_by_force_what_is_in_use_is_told_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pool = Things(3)
    held = [pool.acquire(), pool.acquire()]
    pool.force_close_all()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Things was closed by force while 2 held by 1 task, the oldest for 0." in record.message
    for each in held:
        each.release()  # no error
    caplog.clear()
    pool.force_close_all()
    pool = Things(3)
    pool.acquire().release()
    pool.force_close_all()
    assert caplog.records == []


def test_close_wakes_who_waits() -> None:
    pool = Things(1)
    held = pool.acquire()
    environment = get_environment()

    def wait() -> str:
        try:
            pool.acquire(block=True)
        except ResourceClosedError:
            return "closed"
        return "acquired"

    task = environment.spawn(wait)
    until(environment, lambda: waiting(pool))
    pool.force_close_all()
    assert task.result(5) == "closed"
    del held


def test_resize() -> None:
    pool = Things(1)
    held = pool.acquire()
    pool.resize(2)
    second = pool.acquire()
    with pytest.raises(RuntimeError, match=r"was=2 now=1; 2 are in use"):
        pool.resize(1)
    assert pool.limit == 2
    pool.resize(1, force=True)
    assert pool.limit == 1
    second.release()
    assert pool.log == [("close", 2)]
    pool.limit = 3
    pool.resize(2, ignore_errors=True)
    pool.resize(None)
    assert pool.limit is None
    held.release()
    assert ("close", 1) in pool.log
    pool.resize(1)
    thing = pool.acquire()
    pool.resize(2, reset=True)
    assert pool.log[-1] == ("close", thing.number)


def test_resize_up_serves_a_waiting_task() -> None:
    pool = Things(1)
    held = pool.acquire()
    environment = get_environment()
    task = environment.spawn(pool.acquire, block=True, timeout=20)
    until(environment, lambda: waiting(pool))
    pool.resize(2)
    assert task.result(5).number == 2
    del held


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(UnsupportedOperation, match="Resource does not say how"):
        Resource(1).acquire()


def test_s30_every_task_is_served() -> None:
    pool = Things(10)
    environment = get_environment()
    tasks = 200 if environment.green else 50
    counts = [0] * tasks
    ready: list[int] = []
    start = Event()
    end = 0.0

    def work(number: int) -> None:
        ready.append(number)
        assert start.wait(30)
        while time.monotonic() < end or min(counts) == 0:
            thing = pool.acquire(block=True, timeout=30)
            environment.sleep(0)
            thing.release()
            counts[number] += 1

    running = [environment.spawn(work, number) for number in range(tasks)]
    until(environment, lambda: len(ready) == tasks)
    end = time.monotonic() + 0.5
    start.set()
    assert all(task.join(30) for task in running)
    assert min(counts) > 0
    if environment.green:
        assert max(counts) <= 1.2 * min(counts) + 2
