"""What `LifoPool` tells about itself, and what it keeps per resource and per waiting task."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from hub.errors import PoolReleaseError
from hub.finalize import Home

if TYPE_CHECKING:
    from types import TracebackType

    from hub.pool import LifoPool

__all__ = ["NOTHING", "Lease", "PoolStats", "Slot", "caller", "describe_held"]

T = TypeVar("T")

#: Stands for the resource that a slot has not got (any more); None may be a resource.
NOTHING: Any = object()


class PoolStats(NamedTuple):
    """Numbers of one pool at one moment.

    The totals are counted without a lock; under native threads they may miss a few.
    """

    limit: int | None  #: most resources at a time; None: any number
    held: int  #: resources in the hands of tasks
    idle: int  #: resources that wait to be used
    connecting: int  #: resources that are being created
    waiting: int  #: tasks that wait for a resource
    acquired_total: int
    created_total: int
    discarded_total: int  #: resources closed, for whatever reason
    lost_total: int  #: of these, the ones whose lease was dropped without release()
    timeouts_total: int
    wait_seconds_total: float  #: over all tasks, from asking for a resource to having it


class Slot(Generic[T]):
    """One place of the pool, with the resource that is in it.

    Nothing but its place in the pool's idle stack, its lease, or the frame that is moving it
    from one to the other refers to it, so when it is lost it is finalized at once, and
    gives its place back.
    """

    __slots__ = ("__weakref__", "dead", "home", "pool", "resource", "since", "task", "where")

    def __init__(self, pool: LifoPool[T]) -> None:
        self.pool = pool
        self.resource: T = NOTHING
        #: Pool time at which it was taken, or became idle (if the pool has a max_idle).
        self.since = 0.0
        #: Hash of the task that took it; 0 while idle.  Not the task: that would keep a
        #: greenlet alive which nothing else refers to.
        self.task = 0
        #: Where it was taken, in debug mode.
        self.where = ""
        #: True when it is no longer one of the pool's places.
        self.dead = False
        self.home: Home | None = None

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # Without `dead`, __init__ was interrupted before the place was one.
        if getattr(self, "dead", True) or is_finalizing():
            return
        try:
            self.pool._slot_lost(self)
        except BaseException:  # pragma: no cover - a signal's
            self.pool._slot_lost(self)
            raise


def describe_held(places: list[Slot[Any]], now: float, me: int = 0) -> str:
    """Tell how many of the places of a pool are in use, by how many tasks and since when.

    Args:
        places: all of them.
        now: pool time.
        me: hash of the task that could not get one; 0 when it is not about that.
    """
    held = [slot for slot in places if slot.task != 0]
    tasks = len({slot.task for slot in held})
    text = f"{len(held)} held by {tasks} task{'' if tasks == 1 else 's'}"
    if held:
        oldest = min(held, key=lambda slot: slot.since)
        text += f", the oldest for {now - oldest.since:.3f} s"
        if oldest.where:
            text += f" (taken at {oldest.where})"
    connecting = sum(slot.resource is NOTHING for slot in places)
    if connecting:
        text += f", {connecting} being created"
    own = sum(slot.task == me for slot in held) if me else 0
    if own:
        text += f", {own} of them held by the very task that asks (tasks that hold one and "
        text += "ask for another can wait for each other)"
    return text


def caller() -> str:
    """Return where the code outside this library is that asked for a resource."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in ("hub", "greenkombu")


class Lease(Generic[T]):
    """The right to use one resource of a pool, until it is released or discarded.

    As a context manager it yields the resource and releases it at the end, unless that was
    done inside.  A lease that is dropped without either is reclaimed: the resource, whose
    state is then unknown, is closed, and its place goes to the next task.
    """

    __slots__ = ("__weakref__", "_held", "_pool")

    # Filled by acquire(): a call of Python code in between would cost it a tenth.
    _pool: LifoPool[T]
    #: One place, or none any more. pop() tests and takes in one step, also against another native
    #: thread.
    _held: list[Slot[T]]

    @property
    def resource(self) -> T:
        """The resource.

        Raises:
            PoolReleaseError: the lease has ended.
        """
        try:
            return self._held[0].resource
        except IndexError:
            raise self._over("its resource cannot be used any more") from None

    @property
    def active(self) -> bool:
        """Tell whether the lease lasts: neither released nor discarded."""
        return bool(self._held)

    def release(self) -> None:
        """Give the resource back, straight to the task that has waited longest if one waits.

        Never waits, unless the pool has been closed or made smaller: then the resource is
        closed here.  After a fork, and after `force_close_all()`, it does nothing.

        Raises:
            PoolReleaseError: it was released or discarded before; nothing is changed.
        """
        if not self._pool._return(self._held):
            raise self._over("it cannot be released again")

    def discard(self) -> None:
        """Close the resource instead of giving it back; its place goes to the next task first.

        Raises:
            PoolReleaseError: the lease has ended; nothing is changed.
            BaseException: what the pool's `close` lets through (Timeouts and kills); the
                place has been given back.
        """
        if not self._pool._return(self._held, discard=True):
            raise self._over("it cannot be discarded")

    def replace(self) -> None:
        """Close the resource; the next task that asks gets a new one in its place.

        Kombu's name for `discard()`: the lease ends here, too.
        """
        if not self._pool._return(self._held, discard=True):
            raise self._over("its resource cannot be replaced")

    def _over(self, consequence: str) -> PoolReleaseError:
        return PoolReleaseError(
            f"this lease of {self._pool._title} was released or discarded before: {consequence}. "
            "Each acquire() is released once; acquire again to go on"
        )

    def __enter__(self) -> T:
        try:
            return self._held[0].resource
        except IndexError:
            return self.resource

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool._return(self._held)  # unless that was done inside

    def __repr__(self) -> str:
        try:
            state = repr(self._held[0].resource)
        except IndexError:
            state = "over"
        return f"<Lease of {self._pool._title}: {state}>"
