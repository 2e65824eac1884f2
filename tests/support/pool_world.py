"""A pool whose every resource is known, and the operations on it that tests disturb."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest

from hub._pool_parts import Slot
from hub.environment import get_environment
from hub.errors import PoolTimeoutError
from hub.pool import LifoPool
from tests.support.tasks import LONG, until

__all__ = ["LIMIT", "MANY", "SCENES", "WITH_WAITERS", "Resource", "Scene", "World"]

LIMIT = 2

#: More steps than any operation has; a loop that comes here does not end.
MANY = 3000


class Resource:
    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False
        self.good = True


class World:
    """A pool, and everything that was created for it.

    Args:
        step: called in each callback with its name; may switch or raise.
    """

    def __init__(self, step: Callable[[str], object] = lambda name: None, **options: Any) -> None:
        self.step = step
        self.made: list[Resource] = []
        self.pool: LifoPool[Resource] = LifoPool(
            self.create, limit=LIMIT, close=self.close, check=self.check, **options
        )
        self.most = 0

    def create(self, left: float | None) -> Resource:
        self.step("create")
        resource = Resource(len(self.made))
        self.made.append(resource)
        self.look()
        self.step("created")
        return resource

    def close(self, resource: Resource) -> None:
        assert not resource.closed, "closed twice"
        resource.closed = True
        self.step("close")
        self.step("closed")

    def check(self, resource: Resource) -> bool:
        assert not resource.closed, "a closed resource was handed out"
        self.step("check")
        return resource.good

    def look(self) -> None:
        """Never more than the limit."""
        stats = self.pool.stats()
        total = stats.held + stats.idle + stats.connecting
        assert total <= LIMIT, f"{total} places of {LIMIT}: {stats}"
        self.most = max(self.most, total)

    def verify(self, held: int = 0, leaked: int = 0) -> None:
        """Nothing is lost.

        Args:
            held: how many leases the test still has.
            leaked: resources that may have been created and never reached the pool.
        """
        self.step = lambda name: None
        self.look()
        stats = self.pool.stats()
        assert stats.held == held, stats
        assert stats.connecting == 0, stats
        assert stats.waiting == 0, stats
        leases = [self.pool.acquire(timeout=0) for _ in range(LIMIT - held)]
        with pytest.raises(PoolTimeoutError):
            self.pool.acquire(timeout=0)
        hands = [lease.resource for lease in leases]
        assert len(set(hands)) == len(hands), "one resource in two hands"
        assert not any(resource.closed for resource in hands)
        for lease in leases:
            lease.release()
        # A task of the hub's may still be at it.
        until(
            get_environment(),
            lambda: sum(not resource.closed for resource in self.made) <= LIMIT + leaked,
        )


# -- the operations -------------------------------------------------------------------------
# Each prepares a world without disturbance and returns what is to be disturbed, and a function
# that gives back what the test itself still holds.
Scene = Callable[[World], tuple[Callable[[], object], Callable[[], object]]]


def nothing() -> None:
    """There is nothing to give back."""


def fill_idle(world: World, count: int) -> None:
    leases = [world.pool.acquire() for _ in range(count)]
    for lease in leases:
        lease.release()


def acquire_new(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    def act() -> None:
        lease = world.pool.acquire()
        lease.release()

    return act, nothing


def acquire_idle(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)
    return acquire_new(world)


def acquire_stale(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)
    world.made[1].good = False
    return acquire_new(world)


def use_in_a_block(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    def act() -> None:
        with world.pool.acquire(timeout=LONG), world.pool.acquire(timeout=LONG):
            world.step("use")

    return act, nothing


def acquire_without_success(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    leases = [world.pool.acquire() for _ in range(LIMIT)]

    def act() -> None:
        try:
            world.pool.acquire(timeout=0)
        except PoolTimeoutError:
            pass

    return act, lambda: [lease.release() for lease in leases]


def release(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    box = [world.pool.acquire(), world.pool.acquire()]
    return (lambda: box.pop().release()), (lambda: [lease.release() for lease in box])


def discard(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    box = [world.pool.acquire(), world.pool.acquire()]
    return (lambda: box.pop().discard()), (lambda: [lease.release() for lease in box])


def drop(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    box = [world.pool.acquire(), world.pool.acquire()]
    return (lambda: box.pop() and None), (lambda: [lease.release() for lease in box])


#: The finalizer of a place under another name, to be called: see tests.support.injection.
finalize = types.FunctionType(
    Slot.__del__.__code__.replace(co_name="finalize"),
    Slot.__del__.__globals__,
    argdefs=Slot.__del__.__defaults__,
)


def finalize_place(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    box = [world.pool.acquire(), world.pool.acquire()]

    def act() -> None:
        places = box.pop()._held
        finalize(places[0])  # and a second time by the interpreter, when it goes

    return act, lambda: [lease.release() for lease in box]


def sweep(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)
    for place in world.pool._idle:
        place.dead = True
    lost = [place.resource for place in world.pool._idle]
    world.pool._slots.clear()
    world.pool._idle.clear()
    for resource in lost:
        world.pool._lose(resource, None)  # as finalizers do where no hub runs
    return acquire_new(world)


def evict(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)
    return (lambda: world.pool._evict_oldest(None)), nothing


def force_close(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)
    lease = world.pool.acquire()

    def end() -> None:
        lease.release()

    return world.pool.force_close_all, end


def resize(world: World) -> tuple[Callable[[], object], Callable[[], object]]:
    fill_idle(world, 2)

    def act() -> None:
        world.pool.resize(1)

    return act, lambda: world.pool.resize(LIMIT)


SCENES: dict[str, Scene] = {
    scene.__name__: scene
    for scene in (
        acquire_new,
        acquire_idle,
        acquire_stale,
        use_in_a_block,
        acquire_without_success,
        release,
        discard,
        drop,
        finalize_place,
        sweep,
        evict,
        force_close,
        resize,
    )
}

#: In these a place comes back, so a task that waits has to be served.
WITH_WAITERS = ("release", "discard", "finalize_place")
