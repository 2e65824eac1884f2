"""The LIFO pool, in every environment: hand-over, ends of places, stale resources, forks."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import hub
from hub import LifoPool
from hub.environment import Environment, Task
from hub.errors import (
    BlockingCallError,
    PoolClosedError,
    PoolError,
    PoolInUseError,
    PoolReleaseError,
    PoolTimeoutError,
)
from hub.pool import Lease, PoolStats
from hub.primitives import Event
from hub.testing import FakeClock
from tests.support.tasks import LONG, in_child, run_natively, save_coverage, until

pytestmark = pytest.mark.green_matrix


class Resource:
    """What the pools here hold."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = 0
        self.abandoned = 0
        self.good = True

    def __repr__(self) -> str:
        return f"<Resource {self.number}>"


class Factory:
    """Creates resources, and remembers what was done with them."""

    def __init__(self) -> None:
        self.made: list[Resource] = []
        self.left: list[float | None] = []

    def create(self, left: float | None) -> Resource:
        self.left.append(left)
        self.made.append(Resource(len(self.made)))
        return self.made[-1]

    def pool(self, limit: int | None = 2, **options: Any) -> LifoPool[Resource]:
        return LifoPool(self.create, limit=limit, close=close, abandon=abandon, **options)

    @property
    def open(self) -> list[int]:
        return [resource.number for resource in self.made if not resource.closed]


def close(resource: Resource) -> None:
    resource.closed += 1


def abandon(resource: Resource) -> None:
    resource.abandoned += 1


def is_good(resource: Resource) -> bool:
    return resource.good


@pytest.fixture
def factory() -> Factory:
    return Factory()


@pytest.fixture
def green(env: Environment) -> Environment:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    return env


def park(env: Environment, pool: LifoPool[Any], function: Callable[[], Any]) -> Task:
    """Start a task that waits for the pool."""
    before = pool.stats().waiting
    task = env.spawn(function)
    until(env, lambda: pool.stats().waiting == before + 1)
    return task


def check(pool: LifoPool[Any], limit: int) -> None:
    """Everything is back: the pool has exactly `limit` places, and hands them out at once."""
    stats = pool.stats()
    assert (stats.held, stats.connecting, stats.waiting) == (0, 0, 0)
    leases = [pool.acquire(timeout=0) for _ in range(limit)]
    with pytest.raises(PoolTimeoutError):
        pool.acquire(timeout=0)
    for lease in leases:
        lease.release()


# -- resources --------------------------------------------------------------------------------
def test_the_resource_used_last_is_used_next(factory: Factory) -> None:
    pool = factory.pool(3)
    leases = [pool.acquire() for _ in range(3)]
    assert [lease.resource.number for lease in leases] == [0, 1, 2]
    for index in (2, 0, 1):
        leases[index].release()
    with pool.acquire() as resource:
        assert resource.number == 1
    assert len(factory.made) == 3


def test_a_lease_is_a_context_manager_that_yields_the_resource(factory: Factory) -> None:
    pool = factory.pool(1)
    with pool.acquire(timeout=1) as resource:
        assert resource is factory.made[0]
        assert pool.stats().held == 1
    assert pool.stats().idle == 1
    with pytest.raises(ZeroDivisionError), pool.acquire():
        1 / 0  # noqa: B018
    assert pool.stats() == PoolStats(
        limit=1,
        held=0,
        idle=1,
        connecting=0,
        waiting=0,
        acquired_total=2,
        created_total=1,
        discarded_total=0,
        lost_total=0,
        timeouts_total=0,
        wait_seconds_total=0.0,
    )


def test_none_may_be_a_resource() -> None:
    pool: LifoPool[None] = LifoPool(lambda left: None, limit=1)
    with pool.acquire() as resource:
        assert resource is None
    assert pool.stats().created_total == 1


def test_without_a_limit_nobody_waits_and_idle_resources_are_kept(factory: Factory) -> None:
    pool = factory.pool(None)
    leases = [pool.acquire(timeout=0) for _ in range(50)]
    for lease in leases:
        lease.release()
    assert pool.stats().idle == 50
    with pool.acquire() as resource:
        assert resource.number == 49
    assert pool.limit is None


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(factory: Factory, limit: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        factory.pool(limit)
    pool = factory.pool(1)
    with pytest.raises(ValueError, match="at least 1"):
        pool.resize(limit)
    assert pool.limit == 1
    with pytest.raises(ValueError, match="max_idle"):
        factory.pool(1, max_idle=-1)


# -- the end of a lease -----------------------------------------------------------------------
@pytest.mark.parametrize("first", ["release", "discard", "replace"])
@pytest.mark.parametrize("second", ["release", "discard", "replace"])
def test_a_lease_ends_once(factory: Factory, first: str, second: str) -> None:
    pool = factory.pool(2, name="amqp")
    lease = pool.acquire()
    other = pool.acquire()
    assert lease.active
    getattr(lease, first)()
    assert not lease.active
    with pytest.raises(PoolReleaseError, match="'amqp'"):
        getattr(lease, second)()
    with pytest.raises(PoolReleaseError, match="acquire again"):
        _ = lease.resource
    with pytest.raises(PoolReleaseError), lease:
        pass
    assert pool.stats().held == 1
    other.release()
    assert "over" in repr(lease)
    check(pool, 2)


def test_a_second_release_does_not_take_the_resource_from_its_next_user(factory: Factory) -> None:
    pool = factory.pool(1)
    first = pool.acquire()
    first.release()
    second = pool.acquire()
    with pytest.raises(PoolReleaseError):
        first.release()
    with pytest.raises(PoolReleaseError, match=r"cannot be replaced.*acquire again"):
        first.replace()
    assert second.resource is factory.made[0]
    assert pool.stats().held == 1
    with pytest.raises(PoolTimeoutError):
        pool.acquire(timeout=0)


def test_a_lease_may_end_inside_its_block(factory: Factory) -> None:
    pool = factory.pool(1)
    with (lease := pool.acquire()):
        lease.discard()
    with (lease := pool.acquire()) as resource:
        assert "Resource 1" in repr(lease)
        lease.release()
    assert factory.made[0].closed == 1
    assert not resource.closed
    check(pool, 1)


def test_discard_lets_the_next_task_go_on_before_it_closes(
    env: Environment, factory: Factory
) -> None:
    served = Event()

    def slow_close(resource: Resource) -> None:
        assert served.wait(LONG)
        close(resource)

    pool = LifoPool(factory.create, limit=1, close=slow_close)
    lease = pool.acquire()

    def use() -> int:
        with pool.acquire(timeout=LONG) as resource:
            served.set()
            return resource.number

    task = park(env, pool, use)
    lease.discard()
    assert task.result(LONG) == 1
    assert factory.made[0].closed == 1


@pytest.mark.parametrize("end", ["discard", "replace"])
def test_who_waits_gets_the_place_of_a_replaced_resource(
    env: Environment, factory: Factory, end: str
) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    tasks = [park(env, pool, lambda: pool.acquire(timeout=LONG)) for _ in range(2)]
    getattr(lease, end)()
    fresh = tasks[0].result(LONG)
    assert fresh.resource.number == 1
    assert not tasks[1].done
    fresh.release()
    assert tasks[1].result(LONG).resource.number == 1
    tasks[1].result().release()
    check(pool, 1)


def test_an_error_in_close_is_logged_and_costs_nothing(
    factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(resource: Resource) -> None:
        raise OSError("connection reset")

    pool = LifoPool(factory.create, limit=1, close=failing, name="redis")
    pool.acquire().discard()
    assert "pool 'redis'" in caplog.text
    assert "connection reset" in caplog.text
    check(pool, 1)


# -- waiting ----------------------------------------------------------------------------------
def test_a_released_resource_goes_to_who_has_waited_longest(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(1)
    order: list[int] = []

    def use(index: int) -> None:
        with pool.acquire(timeout=LONG):
            order.append(index)

    lease = pool.acquire()
    tasks = [park(env, pool, lambda index=index: use(index)) for index in range(5)]
    lease.release()
    # Straight from hand to hand: at no moment was it idle.
    if env.green:
        assert pool.stats().idle == 0
    for task in tasks:
        task.result(LONG)
    assert order == [0, 1, 2, 3, 4]
    assert len(factory.made) == 1


def test_a_task_that_comes_back_joins_the_end_of_the_queue(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(1)
    order: list[str] = []

    def use() -> None:
        with pool.acquire(timeout=LONG):
            order.append("waiter")

    lease = pool.acquire()
    tasks = [park(env, pool, use) for _ in range(2)]
    for _ in range(3):
        lease.release()
        lease = pool.acquire(timeout=LONG)
        order.append("loop")
    lease.release()
    for task in tasks:
        task.result(LONG)
    assert order == ["waiter", "waiter", "loop", "loop", "loop"]


def test_acquire_in_the_moment_of_a_hand_over_does_not_take_it(
    green: Environment, factory: Factory
) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    task = park(green, pool, lambda: pool.acquire(timeout=LONG))
    lease.release()
    with pytest.raises(PoolTimeoutError):
        pool.acquire(timeout=0)
    task.result(LONG).release()
    check(pool, 1)


def test_the_error_of_a_full_pool_tells_who_has_it(env: Environment, factory: Factory) -> None:
    clock = FakeClock()
    pool = factory.pool(3, name="producers", clock=clock)
    end = Event()

    def hold() -> None:
        with pool.acquire(), pool.acquire():
            assert end.wait(LONG)

    task = env.spawn(hold)
    until(env, lambda: pool.stats().held == 2)
    clock.advance(7.5)
    mine = pool.acquire()
    with pytest.raises(PoolTimeoutError) as caught:
        pool.acquire(timeout=0)
    text = str(caught.value)
    assert "pool 'producers'" in text
    assert "limit 3" in text
    assert "3 held by 2 tasks" in text
    assert "the oldest for 7.500 s" in text
    assert "1 of them held by the very task that asks" in text
    assert isinstance(caught.value, (TimeoutError, PoolError))
    mine.release()
    end.set()
    task.result(LONG)
    assert pool.stats().timeouts_total == 1


def test_in_debug_mode_the_error_tells_where_the_oldest_was_taken(factory: Factory) -> None:
    pool = factory.pool(1, debug=True)
    lease = pool.acquire()
    with pytest.raises(PoolTimeoutError, match=rf"taken at {re.escape(__file__)}:\d+"):
        pool.acquire(timeout=0)
    lease.release()


def test_a_timeout_is_kept(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    with pool.acquire():
        started = hub.get_hub().time()
        with pytest.raises(PoolTimeoutError):
            pool.acquire(timeout=0.05)
        assert 0.045 < hub.get_hub().time() - started < LONG
    assert pool.stats().timeouts_total == 1
    check(pool, 1)


def test_one_deadline_covers_waiting_and_creating(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire(timeout=10)
    task = park(env, pool, lambda: pool.acquire(timeout=LONG).release())
    env.sleep(0.05)
    lease.discard()
    task.result(LONG)
    assert factory.left[0] is not None
    assert 5 < factory.left[0] <= 10
    assert factory.left[1] is not None
    assert factory.left[1] <= LONG - 0.05
    with pool.acquire():
        pass
    assert pool.stats().wait_seconds_total >= 0.05


def test_create_is_told_how_much_time_is_left(factory: Factory) -> None:
    pool = factory.pool(3)
    leases = [pool.acquire(), pool.acquire(timeout=0), pool.acquire(timeout=-1)]
    assert factory.left == [None, 0.0, 0.0]
    assert all(lease.active for lease in leases)


def test_without_block_the_timeout_is_for_creating_alone(factory: Factory) -> None:
    pool = factory.pool(2)
    leases = [pool.acquire(block=False), pool.acquire(timeout=LONG, block=False)]
    assert factory.left[0] is None
    assert 0 < (factory.left[1] or 0) <= LONG
    with pytest.raises(PoolTimeoutError, match="timeout 0 s"):
        pool.acquire(timeout=LONG, block=False)
    for lease in leases:
        lease.release()
    assert pool.stats().waiting == 0


def test_nested_acquire_of_all_holders_ends_at_the_deadline(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(5)
    ready = Event()
    entered: list[int] = []

    def nest() -> str:
        with pool.acquire(timeout=LONG):
            entered.append(1)
            assert ready.wait(LONG)
            try:
                with pool.acquire(timeout=0.1):
                    return "served"
            except PoolTimeoutError as error:
                return str(error)

    tasks = [env.spawn(nest) for _ in range(5)]
    until(env, lambda: len(entered) == 5)
    ready.set()
    answers = [task.result(LONG) for task in tasks]
    # Once the first has given up, its place may serve one of the others.
    refused = [answer for answer in answers if answer != "served"]
    assert refused
    assert re.search(r"[1-5] held by [1-5] task", refused[0])
    assert "held by the very task that asks" in refused[0]
    check(pool, 5)


def test_acquire_in_a_hub_callback_is_refused_only_if_it_has_to_wait(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(1)
    lease = hub.get_hub().run_threadsafe(pool.acquire, 1.0, timeout=LONG)
    with pytest.raises(BlockingCallError):
        hub.get_hub().run_threadsafe(pool.acquire, 1.0, timeout=LONG)
    hub.get_hub().run_threadsafe(lease.release, timeout=LONG)
    check(pool, 1)


# -- create -----------------------------------------------------------------------------------
def test_a_failed_create_gives_the_place_to_the_next_task(
    env: Environment, factory: Factory
) -> None:
    begun, go = Event(), Event()
    calls: list[int] = []

    def create(left: float | None) -> Resource:
        calls.append(1)
        if len(calls) == 1:
            begun.set()
            assert go.wait(LONG)
            raise ConnectionRefusedError("nobody listens")
        return factory.create(left)

    pool = LifoPool(create, limit=1)
    first = env.spawn(pool.acquire, LONG)
    assert begun.wait(LONG)
    assert pool.stats().connecting == 1
    with pytest.raises(PoolTimeoutError, match="1 being created"):
        pool.acquire(timeout=0)
    second = park(env, pool, lambda: pool.acquire(timeout=LONG))
    go.set()
    with pytest.raises(ConnectionRefusedError):
        first.result(LONG)
    second.result(LONG).release()
    check(pool, 1)


def test_a_killed_create_gives_the_place_to_the_next_task(
    green: Environment, factory: Factory
) -> None:
    begun = Event()

    def create(left: float | None) -> Resource:
        if not begun.is_set():
            begun.set()
            green.sleep(LONG)
        return factory.create(left)

    pool = LifoPool(create, limit=1)
    first = green.spawn(pool.acquire)
    assert begun.wait(LONG)
    second = park(green, pool, lambda: pool.acquire(timeout=LONG))
    first.kill()
    second.result(LONG).release()
    check(pool, 1)


# -- stale resources --------------------------------------------------------------------------
def test_a_failed_check_makes_a_new_resource_in_the_same_place(factory: Factory) -> None:
    pool = factory.pool(1, check=is_good)
    with pool.acquire() as first:
        pass
    with pool.acquire() as again:
        assert again is first
    first.good = False
    with pool.acquire(timeout=3) as second:
        assert second is not first
    assert first.closed == 1
    assert factory.left[-1] == pytest.approx(3, abs=0.5)
    check(pool, 1)


def test_a_check_that_raises_is_a_failed_check(
    factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(resource: Resource) -> bool:
        raise OSError("bad descriptor")

    pool = factory.pool(1, check=failing)
    pool.acquire().release()
    with pool.acquire() as resource:
        assert resource.number == 1
    assert "bad descriptor" in caplog.text
    assert factory.made[0].closed == 1


def test_what_was_idle_for_too_long_is_closed(factory: Factory) -> None:
    clock = FakeClock()
    pool = factory.pool(4, max_idle=10, clock=clock)
    leases = [pool.acquire() for _ in range(4)]
    leases[0].release()
    clock.advance(6)
    for lease in leases[1:]:
        lease.release()
    clock.advance(6)
    # 3 was idle for 6 s and is used; 0 was idle for 12 s.
    with pool.acquire() as resource:
        assert resource.number == 3
    assert factory.open == [1, 2, 3]
    clock.advance(6)
    assert pool.evict_idle() == 2
    assert factory.open == [3]
    clock.advance(60)
    with pool.acquire() as resource:
        assert resource.number == 4
    assert factory.open == [4]
    assert pool.evict_idle() == 0
    check(pool, 4)


def test_without_max_idle_nothing_is_evicted(factory: Factory) -> None:
    pool = factory.pool(1)
    pool.acquire().release()
    assert pool.evict_idle() == 0
    assert factory.open == [0]


# -- resize -----------------------------------------------------------------------------------
def test_a_larger_limit_serves_who_waits(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    tasks = [park(env, pool, lambda: pool.acquire(timeout=LONG)) for _ in range(3)]
    pool.resize(3)
    assert tasks[0].result(LONG).resource.number in (1, 2)
    assert tasks[1].result(LONG).resource.number in (1, 2)
    assert not tasks[2].done
    pool.resize(None)
    tasks[2].result(LONG).release()
    for held in (lease, tasks[0].result(), tasks[1].result()):
        held.release()
    assert pool.stats().idle == 4


def test_a_smaller_limit_closes_the_oldest_idle_and_then_what_is_released(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(5)
    leases = [pool.acquire() for _ in range(5)]
    for lease in leases[:3]:
        lease.release()
    pool.resize(3)
    assert factory.open == [2, 3, 4]
    pool.resize(1)
    assert factory.open == [3, 4]
    task = park(env, pool, lambda: pool.acquire(timeout=LONG))
    leases[3].release()
    assert factory.open == [4]
    assert not task.done
    leases[4].release()
    assert task.result(LONG).resource.number == 4
    task.result().release()
    check(pool, 1)


# -- close ------------------------------------------------------------------------------------
def test_close_closes_what_is_idle_and_release_what_is_held(factory: Factory) -> None:
    pool = factory.pool(3, name="amqp")
    held = [pool.acquire(), pool.acquire()]
    pool.acquire().release()
    pool.retire()
    assert pool.closed
    assert factory.open == [0, 1]
    with pytest.raises(PoolClosedError, match=r"'amqp' is closed.*Make a new one"):
        pool.acquire()
    assert "closed" in repr(pool)
    held[0].release()
    held[1].discard()
    assert factory.open == []
    assert [resource.closed for resource in factory.made] == [1, 1, 1]
    pool.close()


def test_close_with_holders_is_an_error_that_tells_who_they_are(
    env: Environment, factory: Factory
) -> None:
    clock = FakeClock()
    pool = factory.pool(3, name="amqp", clock=clock, debug=True)
    end = Event()

    def hold() -> None:
        with pool.acquire(), pool.acquire():
            assert end.wait(LONG)

    task = env.spawn(hold)
    until(env, lambda: pool.stats().held == 2)
    clock.advance(7.5)
    pool.acquire().release()
    with pytest.raises(PoolInUseError) as caught:
        pool.close()
    text = str(caught.value)
    assert "pool 'amqp' was closed while 2 held by 1 task, the oldest for 7.500 s" in text
    assert "test_pool.py:" in text
    assert "Release it before" in text
    assert isinstance(caught.value, PoolError)
    # Closed all the same: what was idle at once, what is held by a release that is no error.
    assert pool.closed
    assert factory.open == [0, 1]
    with pytest.raises(PoolInUseError):
        pool.close()
    end.set()
    task.result(LONG)
    assert factory.open == []
    pool.close()


def test_a_block_of_the_pool_ends_with_its_own_error_before_that_of_holders(
    factory: Factory,
) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    with pytest.raises(ZeroDivisionError), pool:
        _ = 1 / 0
    assert pool.closed
    with pytest.raises(PoolInUseError), pool:
        pass
    lease.release()
    assert factory.open == []


def test_close_tells_who_waits_at_once(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    tasks = [park(env, pool, lambda: pool.acquire(timeout=LONG)) for _ in range(3)]
    started = hub.get_hub().time()
    pool.retire()
    for task in tasks:
        with pytest.raises(PoolClosedError):
            task.result(LONG)
    assert hub.get_hub().time() - started < LONG / 2
    lease.release()
    assert factory.open == []


def test_close_waits_for_the_holders(env: Environment, factory: Factory) -> None:
    with factory.pool(2) as pool:
        lease = pool.acquire()
        with pytest.raises(PoolInUseError):
            pool.close(timeout=0.02)
        task = env.spawn(pool.close, LONG)
        env.sleep(0.01)
        assert not task.done
        lease.release()
        task.result(LONG)


def test_what_was_connecting_when_the_pool_closed_is_closed(
    env: Environment, factory: Factory
) -> None:
    begun, go = Event(), Event()

    def create(left: float | None) -> Resource:
        begun.set()
        assert go.wait(LONG)
        return factory.create(left)

    pool = LifoPool(create, limit=1, close=close)
    task = env.spawn(pool.acquire)
    assert begun.wait(LONG)
    with pytest.raises(PoolInUseError, match="1 being created"):
        pool.close()
    go.set()
    with pytest.raises(PoolClosedError):
        task.result(LONG)
    assert factory.open == []
    pool.close(LONG)


def test_a_hand_over_in_the_moment_of_close_closes_the_resource(
    green: Environment, factory: Factory
) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    task = park(green, pool, lambda: pool.acquire(timeout=LONG))
    lease.release()
    pool.retire()
    task.result(LONG).release()  # it had been handed over before
    assert factory.open == []
    pool.close()


def test_force_close_all_closes_what_is_held_as_well(env: Environment, factory: Factory) -> None:
    pool = factory.pool(3)
    held = [pool.acquire(), pool.acquire()]
    pool.acquire().release()
    third = pool.acquire()
    task = park(env, pool, lambda: pool.acquire(timeout=LONG))
    assert pool.force_close_all() == 3
    assert factory.open in ([], [3])  # the one that waited has a place for a new one
    fresh = task.result(LONG)
    assert fresh.resource.number == 3
    for lease in (*held, third):
        lease.release()
    with pytest.raises(PoolReleaseError):
        third.release()
    assert pool.stats().held == 1
    fresh.release()
    assert [resource.closed for resource in factory.made] == [1, 1, 1, 0]
    check(pool, 3)
    assert pool.force_close_all() == 3
    assert factory.open == []


def test_a_resource_that_is_closed_by_force_while_it_is_discarded_is_closed_once(
    env: Environment, factory: Factory
) -> None:
    """Another native thread may be between the decision to discard and the discard."""
    pool = factory.pool(1)
    lease = pool.acquire()
    (place,) = lease._held
    assert pool.force_close_all() == 1
    pool._discard(place)
    assert factory.made[0].closed == 1
    lease.release()
    check(pool, 1)


# -- leases that are dropped ------------------------------------------------------------------
def test_a_dropped_lease_gives_its_place_back_and_its_resource_is_never_reused(
    env: Environment, factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    pool = factory.pool(1, name="amqp", debug=True)
    lease = pool.acquire()
    task = park(env, pool, lambda: pool.acquire(timeout=LONG).resource.number)
    with caplog.at_level(logging.WARNING):
        del lease
        # Nobody has to come by: the hub has the resource closed.
        until(env, lambda: factory.made[0].closed)
        assert task.result(LONG) == 1
        until(env, lambda: pool.stats().lost_total == 2)  # the task has dropped its own as well
    assert "pool 'amqp'" in caplog.text
    assert f"taken at {__file__}" in caplog.text
    until(env, lambda: not factory.open)
    check(pool, 1)


def test_a_lease_in_a_cycle_is_reclaimed_by_the_collector(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(2)

    def make_cycle() -> None:
        cycle: list[Any] = [pool.acquire()]
        cycle.append(cycle)

    gc.disable()  # or the first is reclaimed before the second is made
    try:
        make_cycle()
        make_cycle()
        assert pool.stats().held == 2
    finally:
        gc.enable()
    gc.collect()
    assert pool.stats().held == 0
    until(env, lambda: not factory.open)
    check(pool, 2)


@pytest.mark.parametrize("taken", ["by who waited", "from the idle ones"])
def test_a_place_that_was_passed_on_is_not_taken_back_by_an_exception_behind_that(
    env: Environment, factory: Factory, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    """A signal handler raises in `release`, and another task has the resource by then."""
    pool = factory.pool(1)
    lease = pool.acquire()
    tasks: list[Task] = []

    if taken == "by who waited":
        tasks.append(park(env, pool, lambda: pool.acquire(timeout=LONG)))
        waiter = pool._waiting[0]
        wake = type(waiter).wake
        struck: list[bool] = []

        def interrupted(self: Any) -> None:
            if self is waiter and not struck:
                struck.append(True)
                raise KeyboardInterrupt
            wake(self)
            if self is waiter:
                until(env, lambda: tasks[0].done)

        monkeypatch.setattr(type(waiter), "wake", interrupted)
    else:

        class Idle(deque[Any]):
            def append(self, slot: Any) -> None:
                pool._idle = deque([slot])
                tasks.append(env.spawn(pool.acquire))
                until(env, lambda: tasks[0].done)
                raise KeyboardInterrupt

        pool._idle = Idle()
    with pytest.raises(KeyboardInterrupt):
        lease.release()
    with tasks[0].result() as resource:
        assert pool.stats().held == 1
        assert not resource.closed
    assert factory.open == [0]
    check(pool, 1)


def test_a_dropped_lease_warns(env: Environment, factory: Factory) -> None:
    if not env.green:
        pytest.skip("the warning is given in the task that closes: another native thread")
    pool = factory.pool(1)
    with pytest.warns(ResourceWarning, match="dropped without release"):
        _drop(env, pool, factory)


def _drop(env: Environment, pool: LifoPool[Any], factory: Factory) -> None:
    pool.acquire()
    until(env, lambda: not factory.open)


def test_the_next_operation_closes_what_was_dropped_where_no_hub_runs() -> None:
    """In a process of its own, because here a hub runs."""
    script = """
import warnings
from hub.pool import LifoPool
closed = []
pool = LifoPool(lambda left: object(), limit=1, close=closed.append)
def drop():
    pool.acquire()
drop()
assert pool.stats().held == 0 and not closed
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    pool.acquire(timeout=0).release()
assert len(closed) == 1
assert [one.category for one in caught] == [ResourceWarning], caught
drop()
pool.close()
assert len(closed) == 2 and pool.stats().lost_total == 2
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


def test_a_dropped_pool_closes_what_was_idle(env: Environment, factory: Factory) -> None:
    pool = factory.pool(3)
    leases = [pool.acquire() for _ in range(3)]
    for lease in leases:
        lease.release()
    gone = weakref.ref(pool)
    del pool, leases, lease
    until(env, lambda: not factory.open and gone() is None, collecting=True)


def test_a_lease_dropped_after_close_lets_close_end(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    pool.retire()
    del lease
    pool.close()
    until(env, lambda: not factory.open)


# -- threads, forks, imports ------------------------------------------------------------------
def test_native_threads_share_a_pool(env: Environment, factory: Factory) -> None:
    if env.green:
        pytest.skip("a pool belongs to the greenlets of one native thread")
    pool = factory.pool(3, check=is_good)
    using: set[int] = set()
    wrong: list[str] = []

    def work(seed: int) -> None:
        for turn in range(200):
            try:
                lease = pool.acquire(timeout=0.0005 if (turn + seed) % 5 == 0 else LONG)
            except PoolTimeoutError:
                continue
            number = lease.resource.number
            if number in using:
                wrong.append(f"{number} is in two hands")
            using.add(number)
            numbers = pool.stats()
            if numbers.held + numbers.idle + numbers.connecting > 3:
                wrong.append(repr(numbers))
            using.discard(number)
            if turn % 17 == 0:
                lease.discard()
            elif turn % 29 == 0:
                del lease
            else:
                lease.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for task in [env.spawn(work, seed) for seed in range(8)]:
            task.result(LONG)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    check(pool, 3)
    until(env, lambda: len(factory.open) <= 3)


@pytest.mark.parametrize("step", range(8))
def test_a_place_that_is_one_too_many_is_never_counted(factory: Factory, step: int) -> None:
    """At one line of making a place the other thread takes the last one; from then on all look."""
    pool = factory.pool(1)
    seen: list[PoolStats] = []
    faster: list[Lease[Resource]] = []
    lines = itertools.count()

    def look(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not LifoPool._new_slot.__code__:
            return None
        if event == "line":
            number = next(lines)
            if number == step:
                sys.settrace(None)
                faster.append(pool.acquire(timeout=0))
                sys.settrace(look)
            elif number > step:
                seen.append(pool.stats())
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        faster.append(pool.acquire(timeout=0))
    except PoolTimeoutError:
        pass
    finally:
        sys.settrace(before)
    assert [one for one in seen if one.held + one.idle + one.connecting > 1] == []
    assert next(lines) >= 3, "nothing was traced"
    for lease in faster:
        lease.release()
    check(pool, 1)


def test_release_may_come_from_another_native_thread(env: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    task = park(env, pool, lambda: pool.acquire(timeout=LONG))
    run_natively(env, lease.release)
    task.result(LONG).release()
    check(pool, 1)


def test_the_child_of_a_fork_starts_anew_and_says_no_good_bye(
    env: Environment, factory: Factory
) -> None:
    pool = factory.pool(2)
    held, idle = pool.acquire(), pool.acquire()
    idle.release()

    def child() -> None:
        assert [resource.abandoned for resource in factory.made] == [0, 1]
        assert pool.stats()[:5] == (2, 0, 0, 0, 0)
        held.release()
        with pytest.raises(PoolReleaseError):
            held.release()
        assert pool.stats().idle == 0
        check(pool, 2)
        assert [resource.closed for resource in factory.made] == [0, 0, 0, 0]
        pool.close()
        assert [resource.closed for resource in factory.made] == [0, 0, 1, 1]

    in_child(child)
    assert factory.open == [0, 1]
    held.release()
    check(pool, 2)


def test_leases_of_the_parent_are_forgotten_by_the_child_also_when_they_are_dropped(
    env: Environment, factory: Factory, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(resource: Resource) -> None:
        raise OSError("cannot be abandoned")

    pool = LifoPool(factory.create, limit=2, close=close, abandon=failing)
    leases = [pool.acquire(), pool.acquire()]
    leases.pop().release()

    def child() -> None:
        assert "cannot be abandoned" in caplog.text
        leases.clear()
        gc.collect()
        leases.append(pool.acquire(timeout=0))
        leases.pop().discard()
        assert [resource.closed for resource in factory.made] == [0, 0, 1]
        assert pool.stats().lost_total == 0

    in_child(child)
    leases.pop().release()
    check(pool, 2)


def test_waiting_threads_of_the_parent_do_not_bar_the_child(
    env: Environment, factory: Factory
) -> None:
    if env.green:
        pytest.skip("greenlets go on in the child")
    pool = factory.pool(1)
    lease = pool.acquire()
    task = park(env, pool, lambda: pool.acquire(timeout=LONG).release())

    def child() -> None:
        assert pool.stats().waiting == 1
        lease.release()
        check(pool, 1)
        pool.acquire().discard()
        pool.close()

    in_child(child)
    lease.release()
    task.result(LONG)


def test_greenlets_that_wait_go_on_in_the_child(green: Environment, factory: Factory) -> None:
    pool = factory.pool(1)
    lease = pool.acquire()
    end = Event()

    def use() -> None:
        with pool.acquire(timeout=LONG):
            pass
        end.wait(LONG)  # in eventlet's child, a greenlet that ends lands in the parent's loop

    task = park(green, pool, use)

    def child() -> None:
        lease.release()
        until(green, lambda: pool.stats().acquired_total == 2, 5.0)
        assert pool.stats().waiting == 0

    in_child(child)
    lease.release()
    end.set()
    task.result(LONG)


def test_what_was_connecting_during_a_fork_is_not_used_in_the_child(
    env: Environment, factory: Factory
) -> None:
    def create(left: float | None) -> Resource:
        resource = factory.create(left)
        if not factory.made[1:]:
            children.append(os.fork())
        return resource

    children: list[int] = []
    pool = LifoPool(create, limit=1, close=close, abandon=abandon)

    def parent_and_child() -> None:
        try:
            lease = pool.acquire()
        except PoolClosedError:
            assert children == [0]
            assert factory.made[0].abandoned == 1
            assert factory.made[0].closed == 0
            check(pool, 1)
            save_coverage()
            os._exit(0)
        _, status = os.waitpid(children[0], 0)
        assert status == 0
        assert lease.resource.number == 0

    in_child(parent_and_child)


def test_public_names_are_exact_and_errors_pickle() -> None:
    import pickle

    from hub import pool

    for name in pool.__all__:
        assert getattr(pool, name) is getattr(hub, name)
    error = pickle.loads(pickle.dumps(PoolTimeoutError("full")))
    assert isinstance(error, PoolTimeoutError)
    assert error.args == ("full",)
    with LifoPool(lambda left: 1, limit=1).acquire() as one:
        assert one == 1


def test_the_pool_imports_nothing_that_may_be_patched_later() -> None:
    script = (
        "import sys, hub.pool as p; p.LifoPool(lambda left: 1, limit=1).acquire().release(); "
        "print([m for m in ('socket', 'ssl', 'select', 'threading', 'queue') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.strip() == "[]"
