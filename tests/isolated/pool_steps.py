"""Interrupt the pool's code at each line, each bytecode, and wherever CPython looks for signals.

An operation is repeated, each time with an exception one step later, until it runs through
undisturbed. After each the pool has to be as good as new, see test_pool_faults.py; a resource may
be left open only where the pool's header says so. The same steps are used once more to let
another task, a finalizer or a signal handler use the pool in between.

Steps are counted by a trace function that raises. CPython 3.11 keeps the wrong "exception being
handled" after that, and hangs if another tracer (coverage) is active. So this file is not
collected: tests/contract/test_pool_steps.py runs it in a process of its own.
"""

from __future__ import annotations

import gc
import itertools
import random
import signal
import sys
import time
from typing import Literal

import pytest

from hub import _locks, _pool_parts, _waiting, primitives
from hub import pool as pool_module
from hub._pool_parts import Slot
from hub.environment import Environment, Task
from hub.errors import PoolTimeoutError
from hub.pool import Lease
from tests.support.injection import STEPS, Injected, Injection
from tests.support.pool_world import LIMIT, MANY, SCENES, WITH_WAITERS, Resource, Scene, World
from tests.support.tasks import LONG, until

#: The code in whose middle exceptions are raised.
MODULES = (pool_module, _pool_parts, _waiting)


@pytest.fixture(params=SCENES.values(), ids=SCENES)
def scene(request: pytest.FixtureRequest) -> Scene:
    made: Scene = request.param
    return made


# -- between the lines ----------------------------------------------------------------------
#: Called by this file's own callbacks to look at the pool.
LOOKING = ("stats", "_places", "<listcomp>", "<genexpr>")


def is_kept(injection: Injection) -> bool:
    """Tell whether all must be in order while the exception lives, as it does in a handler.

    That is so where CPython looks for signals, but for the entries of what ends a lease: the lease
    lasts, known to the frames of the exception. (`finalize` gets a place from this file's frames.)
    """
    name = injection.where.partition(":")[0]
    ends = ("release", "discard", "_return", "__enter__", "__exit__", "resource")
    return (
        injection.kind == "signal"
        and name != "finalize"
        and not (injection.at_entry and name in ends)
    )


def leaks(injection: Injection) -> int:
    """How many resources may be left open, whose places have all been given back.

    Where CPython really looks for signals it is none, with the exceptions that the pool's header
    names: create() has returned, and nobody has got what it made.
    """
    return int(injection.kind != "signal" or injection.where.startswith("_fill"))


@pytest.fixture
def quiet_finalizers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what is raised in finalizers: pytest keeps it, and with it what is finalized."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("quiet_finalizers")
def test_an_exception_between_any_two_steps(
    scene: Scene, step: Literal["line", "opcode", "signal"]
) -> None:
    steps = 0
    kept: list[BaseException] = []
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = scene(world)
        with Injection(MODULES, at, step=step, skip=LOOKING) as injection:
            try:
                act()
            except Injected as error:
                if is_kept(injection):
                    kept.append(error)
        try:
            end()
            world.verify(leaked=leaks(injection))
        except BaseException as error:
            raise AssertionError(f"after step {at}, {injection.where}: {error!r}") from error
        if not injection.fired:
            break
        steps += 1
        kept.clear()
    assert steps >= 2 or scene is SCENES["drop"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", WITH_WAITERS)
@pytest.mark.usefixtures("quiet_finalizers")
def test_an_exception_between_any_two_steps_strands_no_waiter(
    env: Environment, name: str, step: Literal["line", "opcode", "signal"]
) -> None:
    """Two tasks wait; one place comes back while the step is disturbed, the other afterwards."""
    kept: list[BaseException] = []
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = SCENES[name](world)
        served: list[int] = []

        def use(world: World = world, served: list[int] = served) -> None:
            with world.pool.acquire(timeout=LONG) as resource:
                served.append(resource.number)

        tasks = []
        for count in (1, 2):
            tasks.append(env.spawn(use))
            until(env, lambda world=world, count=count: world.pool.stats().waiting == count)
        with Injection(MODULES, at, step=step, skip=LOOKING) as injection:
            try:
                act()
            except Injected as error:
                if is_kept(injection):
                    kept.append(error)
        try:
            # The place that came back serves both, one after the other: `end` is not needed.
            for task in tasks:
                task.result(2.0)
            end()
            world.verify(leaked=leaks(injection))
        except BaseException as error:
            raise AssertionError(f"after step {at}, {injection.where}: {error!r}") from error
        if not injection.fired:
            break
        kept.clear()


@pytest.mark.parametrize("step", STEPS)
def test_an_exception_while_the_pool_grows_strands_no_waiter(
    env: Environment, step: Literal["line", "opcode", "signal"]
) -> None:
    """Two tasks wait, two places are added: both are served, without a release in between."""
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        pool = world.pool
        leases = [pool.acquire() for _ in range(LIMIT)]
        tasks = []
        for count in (1, 2):
            tasks.append(env.spawn(pool.acquire, LONG))
            until(env, lambda pool=pool, count=count: pool.stats().waiting == count)
        world.look = lambda: None  # type: ignore[method-assign]
        with Injection(MODULES, at, step=step, skip=LOOKING) as injection:
            try:
                pool.resize(LIMIT + 2)
            except Injected:
                if pool._room == LIMIT:  # it had not come to it
                    pool.resize(LIMIT + 2)
        try:
            leases += [task.result(2.0) for task in tasks]
        except TimeoutError as error:
            raise AssertionError(f"after step {at}, {injection.where}") from error
        for lease in leases:
            lease.release()
        assert pool.stats().idle == LIMIT + 2
        if not injection.fired:
            break


def test_a_finalizer_that_is_hit_itself_gives_the_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hit(slot: object) -> None:
        raise Injected

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    world = World()
    lease = world.pool.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(Slot, "__del__", hit)
        del lease
    # Without these a new place might get the memory of the old one, and so its number.
    others = [Slot(world.pool) for _ in range(100)]
    world.verify(leaked=1)
    del others


# -- somebody else in between ---------------------------------------------------------------
@pytest.mark.parametrize("name", ["release", "discard", "finalize_place"])
def test_a_task_that_comes_to_wait_at_any_step_is_served(env: Environment, name: str) -> None:
    """A place comes back; at one step of that, another thread finds the pool full and queues."""
    if env.green:
        pytest.skip("greenlets come in between at switches only, and there are none")
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = SCENES[name](world)
        tasks: list[Task] = []

        def come(world: World = world, tasks: list[Task] = tasks) -> None:
            tasks.append(env.spawn(world.pool.acquire, LONG))
            # It either waits now, or it has found the place that came back.
            until(env, lambda: tasks[0].done or world.pool.stats().waiting == 1)

        with Injection(MODULES, at, step="opcode", skip=LOOKING, action=come) as injection:
            act()
        if tasks:
            try:
                tasks[0].result(2.0).release()
            except TimeoutError as error:
                raise AssertionError(f"after step {at}, {injection.where}") from error
        end()
        world.verify(leaked=LIMIT)
        if not injection.fired:
            break


@pytest.mark.parametrize("action", ["release", "discard"])
def test_a_place_that_comes_back_at_any_step_before_the_wait_is_found(action: str) -> None:
    """The pool is full; at one step of acquire(), before it waits, a finalizer releases."""
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        leases = [world.pool.acquire() for _ in range(LIMIT)]
        started = time.monotonic()
        late = False

        def give(leases: list[Lease[Resource]] = leases, started: float = started) -> None:
            nonlocal late
            late = time.monotonic() - started > 0.1
            getattr(leases.pop(), action)()

        with Injection(MODULES, at, step="opcode", skip=LOOKING, action=give) as injection:
            try:
                world.pool.acquire(timeout=0.2).release()
            except PoolTimeoutError as error:
                if not late:
                    raise AssertionError(f"not found at {at}, {injection.where}") from error
        if late:
            break
        for lease in leases:
            lease.release()
        world.verify()
    assert at > 50


@pytest.mark.parametrize("name", ["release", "discard", "finalize_place"])
def test_nobody_gets_past_a_waiting_task_at_any_step(env: Environment, name: str) -> None:
    """A place comes back to who waits; at one step of that a finalizer tries to take it."""
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = SCENES[name](world)
        task = env.spawn(world.pool.acquire, LONG)
        until(env, lambda world=world: world.pool.stats().waiting == 1)
        passed: list[Lease[Resource]] = []

        def barge(world: World = world, passed: list[Lease[Resource]] = passed) -> None:
            try:
                passed.append(world.pool.acquire(timeout=0))
            except PoolTimeoutError:
                pass

        with Injection(MODULES, at, step="opcode", skip=LOOKING, action=barge) as injection:
            act()
        assert not passed, f"at step {at}, {injection.where}"
        task.result(LONG).release()
        end()
        world.verify(leaked=LIMIT)
        if not injection.fired:
            break


@pytest.mark.parametrize("first", ["release", "discard", "acquire_new", "acquire_idle"])
@pytest.mark.parametrize("second", ["release", "discard", "acquire", "drop"])
def test_an_operation_in_the_middle_of_another_keeps_the_capacity(first: str, second: str) -> None:
    """Finalizers and signal handlers may use the pool at any step of the code they interrupt."""
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = SCENES[first](world)
        box = [world.pool.acquire()] if first.startswith("acquire") and second != "acquire" else []

        def interfere(world: World = world, box: list[Lease[Resource]] = box) -> None:
            try:
                lease = box.pop() if box else world.pool.acquire(timeout=0)
            except PoolTimeoutError:
                return
            if second == "discard":
                lease.discard()
            elif second != "drop":
                lease.release()

        with Injection(MODULES, at, step="opcode", skip=LOOKING, action=interfere) as injection:
            act()
        for lease in box:
            lease.release()
        end()
        world.verify(leaked=LIMIT)
        if not injection.fired:
            break


# -- signals -------------------------------------------------------------------------------------
def test_exceptions_of_signal_handlers_at_random_moments(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real signals, as a second net: those above are simulated."""
    if env.green:
        pytest.skip("a signal handler's exception may land in the green library's own loop")
    # logging's own locks do not survive what this test does.
    monkeypatch.setattr(pool_module._logger(), "disabled", True)
    random.seed(1)
    world = World()
    hits = 0
    armed = False

    def strike(*_: object) -> None:
        if armed:
            raise Injected

    def use() -> None:
        for turn in range(300):  # the handler's exception may have been lost in a finalizer
            with world.pool.acquire(timeout=LONG) as resource:
                resource.good = turn % 5 > 0
            lease = world.pool.acquire(timeout=LONG)
            (lease.discard if turn % 3 == 0 else lease.release)()

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    before = signal.signal(signal.SIGALRM, strike)
    end = time.monotonic() + 1.5
    try:
        while time.monotonic() < end:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.001))
                use()
            except Injected:
                armed = False
                hits += 1
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert hits > 20
    gc.collect()
    world.verify(leaked=hits)


# -- locks ----------------------------------------------------------------------------------
def test_an_exception_at_any_step_of_acquire_loses_no_lock() -> None:
    steps = 0
    while True:
        lock = primitives.Lock()
        with Injection([_locks], steps + 1, step="signal") as injection:
            try:
                lock.acquire()
            except Injected:
                pass
        if not injection.fired:
            break
        steps += 1
        assert not lock.locked(), f"lost at {injection.where}"
    assert steps >= 2
