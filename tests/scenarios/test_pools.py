"""What goes wrong with pools and locks of others, in every environment.

S19 (pool part): resources dropped in cycles, collected wherever the collector runs.
S21: replace with a waiter, double release, kill at each step, nested acquire.
S25 (lock part): a loop that takes a lock again does not starve who waits for it.
S30: many tasks on a small pool are all served, and evenly.

Each interruption point of S21 is enumerated in tests/contract/test_pool_faults.py.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

import hub
from hub import LifoPool
from hub.environment import Environment
from hub.errors import PoolReleaseError, PoolTimeoutError
from hub.primitives import Event, Lock
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix


@pytest.fixture
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was raised where nobody could catch it; must be nothing."""
    caught: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: caught.append(repr(args)))
    yield caught
    assert caught == []


class Connection:
    """A resource with a descriptor, closed by the pool or by its own finalizer."""

    def __init__(self, left: float | None = None) -> None:
        self.reader, self.writer = os.pipe()
        self.me = self  # a cycle: only the collector can find it
        self.finalizer = hub.Finalizer(self, _reap_both, self.reader, self.writer)

    def close(self) -> None:
        if self.finalizer.detach():
            os.close(self.reader)
            os.close(self.writer)


def _reap_both(reader: int, writer: int) -> None:
    from hub.finalize import reap

    reap(reader)
    reap(writer)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- S19 ------------------------------------------------------------------------------------
def make_garbage(count: int = 20) -> None:
    """Drop pools, leases and resources in cycles, held, idle and connecting no more."""
    for _ in range(count):
        pool = LifoPool(Connection, limit=4, close=Connection.close)
        held, idle = pool.acquire(), pool.acquire()
        idle.release()
        cycle: list[Any] = [pool, held]
        cycle.append(cycle)


@pytest.mark.parametrize("where", ["here", "hub callback", "under a lock", "another task"])
def test_s19_cycles_are_collected_anywhere(
    env: Environment, unraisable: list[str], where: str
) -> None:
    gc.collect()
    before = descriptors()
    shared: LifoPool[Connection] = LifoPool(Connection, limit=2, close=Connection.close)
    lock = Lock()

    def collect() -> None:
        with lock:
            gc.collect()

    gc.disable()
    try:
        make_garbage()
        lost: list[Any] = [shared.acquire(), shared.acquire()]
        lost.append(lost)
        del lost
        waiting = env.spawn(lambda: shared.acquire(timeout=LONG).discard())
        until(env, lambda: shared.stats().waiting == 1)
        assert descriptors() == before + 2 * (2 * 20 + 2)
        if where == "here":
            gc.collect()
        elif where == "hub callback":
            hub.get_hub().run_threadsafe(gc.collect, timeout=LONG)
        elif where == "under a lock":
            collect()
        else:
            env.spawn(gc.collect).result(LONG)
        waiting.result(LONG)
        until(env, lambda: descriptors() == before)
    finally:
        gc.enable()
    until(env, lambda: shared.stats().lost_total == 2)
    assert shared.stats()[1:5] == (0, 0, 0, 0)


def test_s19_a_collection_does_not_switch(env: Environment, unraisable: list[str]) -> None:
    """Not one other task runs between the drop and the end of the collection."""
    if not env.green:
        pytest.skip("native threads switch anywhere")
    turns: list[int] = []
    stop = Event()

    def tick() -> None:
        while not stop.is_set():
            turns.append(1)
            env.sleep(0)

    task = env.spawn(tick)
    env.sleep(0.002)
    gc.disable()
    try:
        make_garbage()
        before = len(turns)
        gc.collect()
        assert len(turns) == before
    finally:
        gc.enable()
    stop.set()
    task.result(LONG)


def test_s19_at_exit(env: Environment) -> None:
    """What is alive when the program ends is neither reported nor waited for."""
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    script = f"""
import os, sys
sys.unraisablehook = lambda args: os.write(1, b"unraisable " + repr(args).encode() + b"\\n")
from tests.run import ENVIRONMENTS
ENVIRONMENTS[{name!r}]()
import hub
from tests.scenarios.test_pools import *
pool = LifoPool(Connection, limit=4, close=Connection.close)
held, idle = pool.acquire(), pool.acquire()
idle.release()
lost = [pool.acquire(), pool]
lost.append(lost)
del lost
make_garbage(3)
hub.get_environment().sleep(0.01)
os.write(1, b"end\\n")
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stdout.splitlines()[-1:], "unraisable" in run.stdout) == (
        0,
        ["end"],
        False,
    ), run.stderr
    assert "Traceback" not in run.stderr


# -- S21 ------------------------------------------------------------------------------------
def test_s21_replace_serves_who_waits(env: Environment) -> None:
    numbers = iter(range(10))
    pool: LifoPool[int] = LifoPool(lambda left: next(numbers), limit=1)
    lease = pool.acquire()
    task = env.spawn(pool.acquire, LONG)
    until(env, lambda: pool.stats().waiting == 1)
    lease.replace()
    fresh = task.result(LONG)
    assert fresh.resource == 1
    with pytest.raises(PoolReleaseError):
        lease.release()
    assert pool.stats().held == 1
    fresh.release()


def test_s21_one_resource_is_never_in_two_hands(env: Environment) -> None:
    pool: LifoPool[object] = LifoPool(lambda left: object(), limit=3)
    in_use: set[int] = set()
    twice: list[int] = []

    def work(index: int) -> None:
        for turn in range(20):
            lease = pool.acquire(timeout=LONG)
            key = id(lease.resource)
            if key in in_use:
                twice.append(key)
            in_use.add(key)
            env.sleep(0)
            in_use.discard(key)
            if (index + turn) % 7 == 0:
                lease.replace()
            else:
                lease.release()
            with pytest.raises(PoolReleaseError):
                lease.release()

    for task in [env.spawn(work, index) for index in range(12)]:
        task.result(LONG)
    assert twice == []
    assert pool.stats().held == 0


def test_s21_nested_acquire_ends_at_the_deadline_and_names_the_holders(env: Environment) -> None:
    pool: LifoPool[object] = LifoPool(lambda left: object(), limit=4, name="producers")
    inside: list[int] = []
    errors: list[str] = []

    def nest() -> None:
        with pool.acquire(timeout=LONG):
            inside.append(1)
            until(env, lambda: len(inside) == 4)
            started = time.monotonic()
            try:
                with pool.acquire(timeout=0.2):
                    pass
            except PoolTimeoutError as error:
                errors.append(str(error))
                assert time.monotonic() - started < LONG / 2

    for task in [env.spawn(nest) for _ in range(4)]:
        task.result(LONG)
    assert errors
    assert "pool 'producers' is full" in errors[0]
    assert "held by the very task that asks" in errors[0]
    assert pool.stats()[1:5] == (0, pool.stats().idle, 0, 0)


# -- S25 ------------------------------------------------------------------------------------
def test_s25_a_loop_on_a_lock_serves_the_waiter_next(env: Environment) -> None:
    lock = Lock()
    turns = 0
    waited_through: list[int] = []
    stop = Event()

    def loop() -> None:
        nonlocal turns
        while not stop.is_set():
            with lock:
                turns += 1
                env.sleep(0)

    def ask() -> None:
        before = turns
        assert lock.acquire(timeout=LONG)
        waited_through.append(turns - before)
        lock.release()

    looping = env.spawn(loop)
    until(env, lambda: turns > 3)
    for _ in range(20):
        env.spawn(ask).result(LONG)
    stop.set()
    looping.result(LONG)
    # A native thread may be preempted between its look at `turns` and its place in the queue.
    assert sorted(waited_through)[10] <= 2
    if env.green:
        assert max(waited_through) <= 1


# -- S30 ------------------------------------------------------------------------------------
def test_s30_every_task_is_served_and_evenly(env: Environment) -> None:
    """1 000 greenlets, or 100 native threads, take turns on 10 resources for about a second."""
    # A native thread needs 8 MiB of address space and a core's attention; 100 of them show the
    # same as 1 000 greenlets.
    count = 1000 if env.green else 100
    pool: LifoPool[object] = LifoPool(lambda left: object(), limit=10)
    served = [0] * count
    ready: list[int] = []
    start = Event()
    end = 0.0

    def work(index: int) -> None:
        ready.append(index)
        assert start.wait(LONG)
        # At least 20 turns, so that a slow machine does not make 1 or 2 of them look uneven.
        while time.monotonic() < end or min(served) < 20:
            with pool.acquire(timeout=LONG):
                env.sleep(0)
            served[index] += 1

    tasks = [env.spawn(work, index) for index in range(count)]
    until(env, lambda: len(ready) == count)
    end = time.monotonic() + 1.0
    start.set()
    for task in tasks:
        task.result(4 * LONG)
    assert min(served) >= 20
    # When a native thread comes back for its next turn is up to the system, which on a busy
    # machine lets some of them wait.
    assert max(served) / min(served) <= (1.2 if env.green else 4.0), (min(served), max(served))
    assert pool.stats().created_total == 10
    assert pool.stats()[1:5] == (0, 10, 0, 0)
