"""Interrupt each operation of the pool at each of its steps, one after the other.

Not at random: an operation is repeated, each time with an exception one step later, until it
runs through undisturbed. Two kinds of steps are counted here:

* the points where the task switches, with a kill and with the environment's Timeout (green);
* the callbacks of the user (create, close, check), which raise.

The lines and bytecodes of the pool's own code are in test_pool_steps.py. After each interruption
the pool has to be as good as new: never more resources than the limit, exactly `limit` places,
nobody waiting for a place that exists, no resource in two hands, and none that is neither closed,
idle nor held.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator

import pytest

from hub.environment import Environment, Task
from hub.errors import PoolClosedError, PoolTimeoutError
from hub.pool import Lease
from tests.support.pool_world import LIMIT, MANY, SCENES, Resource, Scene, World
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix

#: In these a finalizer takes the place back, and the hub has the resource closed.
DROPS = (SCENES["drop"], SCENES["finalize_place"])


@pytest.fixture(params=SCENES.values(), ids=SCENES)
def scene(request: pytest.FixtureRequest) -> Scene:
    made: Scene = request.param
    return made


# -- callbacks that raise ------------------------------------------------------------------------
class Boom(Exception):
    """What a callback raises."""


class Exit(BaseException):
    """What a callback lets through: like a kill, not an Exception."""


@pytest.mark.parametrize("error", [Boom, Exit])
def test_a_callback_that_raises_at_any_call(
    env: Environment, scene: Scene, error: type[BaseException]
) -> None:
    if scene in DROPS and error is Exit:
        pytest.skip("nobody but the interpreter gets what close() lets through in the hub's task")
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = scene(world)
        calls = itertools.count(1)
        fired: list[str] = []

        def step(
            name: str, calls: Iterator[int] = calls, at: int = at, fired: list[str] = fired
        ) -> None:
            if next(calls) == at:
                fired.append(name)
                raise error(name)

        world.step = step
        try:
            act()
        except (Boom, Exit):
            pass
        if scene in DROPS:
            until(env, lambda world=world: not world.pool._lost)
        world.step = lambda name: None
        end()
        # A create() that raises after it has made something has leaked it itself.
        world.verify(leaked=fired.count("created"))
        if not fired:
            break


# -- switches -----------------------------------------------------------------------------------
@pytest.fixture
def green(env: Environment) -> Environment:
    if not env.green:
        pytest.skip("native threads cannot be killed; their steps are disturbed above")
    return env


def kill(env: Environment, act: Callable[[], object], reached: Callable[[], bool]) -> Task:
    """Run `act` in a task and kill it at the switch that `reached` tells."""
    task = env.spawn(act)
    until(env, lambda: task.done or reached())
    task.kill()
    return task


def expire(env: Environment, act: Callable[[], object], reached: Callable[[], bool]) -> Task:
    """Run `act` in a task under a Timeout that fires at the switch that `reached` tells."""

    def limited() -> None:
        with env.timeout(0.002):
            act()

    task = env.spawn(limited)
    until(env, lambda: task.done or reached())
    return task


@pytest.mark.parametrize("check", [True, False], ids=["slow-check", "quick-check"])
@pytest.mark.parametrize("interrupt", [kill, expire], ids=["kill", "Timeout"])
def test_a_kill_or_timeout_at_any_switch(
    green: Environment, scene: Scene, interrupt: Callable[..., Task], check: bool
) -> None:
    for at in itertools.count(1):
        assert at < MANY
        world = World()
        act, end = scene(world)
        names: list[str] = []
        stuck = [False]
        victim: list[object] = []

        def run(act: Callable[[], object] = act, victim: list[object] = victim) -> None:
            victim.append(green.current())
            act()

        def step(
            name: str,
            names: list[str] = names,
            at: int = at,
            stuck: list[bool] = stuck,
            victim: list[object] = victim,
        ) -> None:
            if green.current() is not victim[0] or (name == "check" and not check):
                return
            names.append(name)
            if len(names) == at:
                stuck[0] = True
                green.sleep(LONG)  # here it is stopped
            elif len(names) < at:
                green.sleep(0)

        world.step = step
        task = interrupt(green, run, lambda stuck=stuck: stuck[0])
        interrupted = ""
        try:
            task.result(LONG)
        except green.timeout_types:
            interrupted = names[-1]  # a Timeout may have come a switch earlier
        world.step = lambda name: None
        end()
        del task
        gc.collect()
        world.verify(leaked=int(interrupted == "created"))
        if not stuck[0]:
            break


WAITING: dict[str, Callable[[Lease[Resource]], object]] = {
    "nothing": lambda lease: None,
    "release": lambda lease: lease.release(),
    "discard": lambda lease: lease.discard(),
}


@pytest.mark.parametrize("order", ["kill-first", "event-first"])
@pytest.mark.parametrize("event", WAITING)
@pytest.mark.parametrize("victims", [[0], [1], [0, 1], [0, 1, 2]], ids=str)
def test_kills_of_waiters_around_a_hand_over(
    green: Environment, event: str, order: str, victims: list[int]
) -> None:
    """The kill comes before the hand-over, with it, or after it in the same turn of the loop."""
    world = World()
    held = [world.pool.acquire() for _ in range(LIMIT)]
    served: list[int] = []

    def use(index: int) -> None:
        with world.pool.acquire(timeout=LONG):
            served.append(index)
            green.sleep(0)

    tasks = []
    for index in range(4):
        tasks.append(green.spawn(use, index))
        until(green, lambda index=index: world.pool.stats().waiting == index + 1)

    def strike() -> None:
        for victim in victims:
            tasks[victim].kill()

    def happen() -> None:
        WAITING[event](held[0])
        WAITING[event](held[1])

    for action in (strike, happen) if order == "kill-first" else (happen, strike):
        action()
    world.look()
    if event == "nothing":
        green.sleep(0.002)
        for lease in held:
            lease.release()
    for task in tasks:
        assert task.join(LONG)
    assert set(served) >= {0, 1, 2, 3} - set(victims)
    world.verify()


def test_a_kill_between_the_hand_over_and_the_first_step_of_the_new_holder(
    green: Environment,
) -> None:
    """The place, with its resource, goes on to the next; nothing is closed."""
    world = World()
    held = [world.pool.acquire() for _ in range(LIMIT)]
    tasks = []
    for count in (1, 2):
        tasks.append(green.spawn(world.pool.acquire, LONG))
        until(green, lambda count=count: world.pool.stats().waiting == count)
    tasks[0].kill()
    held[0].release()
    lease = tasks[1].result(LONG)
    assert lease.resource is world.made[0]
    assert [resource.closed for resource in world.made] == [False, False]
    lease.release()
    held[1].release()
    world.verify()


def test_timeouts_of_waiters_against_releases(green: Environment) -> None:
    """The wait ends in every order relative to the release: before it, after it, together."""
    for delay in range(12):
        world = World()
        held = [world.pool.acquire() for _ in range(LIMIT)]

        def use(world: World = world) -> bool:
            try:
                with world.pool.acquire(timeout=0.003):
                    return True
            except PoolTimeoutError:
                return False

        def use_with_timeout(world: World = world) -> bool:
            try:
                with green.timeout(0.003), world.pool.acquire():
                    return True
            except green.timeout_types:
                return False

        tasks = [green.spawn(function) for function in (use, use_with_timeout, use)]
        green.sleep(0.0005 * delay)
        for lease in held:
            lease.release()
        for task in tasks:
            task.result(LONG)
        world.verify()


@pytest.mark.parametrize("close_first", [True, False])
def test_kills_around_close(green: Environment, close_first: bool) -> None:
    world = World()
    held = [world.pool.acquire() for _ in range(LIMIT)]
    tasks = []
    for count in (1, 2, 3):
        tasks.append(green.spawn(world.pool.acquire, LONG))
        until(green, lambda count=count: world.pool.stats().waiting == count)
    tasks[0].kill()
    held.pop().release()  # to the first, who is dying; then on to the second
    if not close_first:
        green.sleep(0.002)
    world.pool.retire()
    for task in tasks:
        try:
            task.result(LONG).release()
        except (PoolClosedError, *green.timeout_types):
            pass
    held.pop().release()
    world.pool.close()
    assert all(resource.closed for resource in world.made)


def test_kills_at_random_moments_of_a_busy_pool(green: Environment) -> None:
    """Not enumerated: many tasks at once, as a second net."""
    world = World(lambda name: green.sleep(0))
    tasks: list[Task] = []

    def work(index: int) -> None:
        for turn in range(3):
            lease = world.pool.acquire(timeout=LONG)
            world.look()
            try:
                green.sleep(0)
                if (index + turn) % 5 == 0:
                    lease.resource.good = False
            finally:
                if (index + turn) % 3 == 0:
                    lease.discard()
                else:
                    lease.release()

    tasks = [green.spawn(work, index) for index in range(60)]
    for index, task in enumerate(tasks):
        if index % 4 == 0:
            task.kill()
            green.sleep(0)
        elif index % 4 == 1:
            green.sleep(0.0005)
            task.kill()
    for task in tasks:
        assert task.join(LONG)
    del task
    tasks.clear()
    gc.collect()
    until(green, lambda: not world.pool._lost)
    world.verify(leaked=60)
    assert world.most == LIMIT
