"""Pools with Kombu's interface.

`Resource` is the base of the pools of connections, channels and producers; it gives Kombu's
methods and errors to `hub.pool.LifoPool`, which does the work: the resource released last is the
next one acquired, and tasks are served first come first served.

A resource that is dropped without a release is not lost to the pool.  While it is on loan only its
user refers to it, and it refers to its lease and to itself: once the user has forgotten it, the
garbage collector finds both, and the place goes to the next task.  The lease knows the resource
weakly, so nothing is resurrected: what the finalizers of a dead connection have closed is not
touched again.

A pool whose limit is None or 0 pools nothing: each acquire makes a resource and each release closes
it.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from greenkombu import exceptions
from greenkombu.deadline import Deadline, remaining
from hub.arguments import has_time
from hub.errors import PoolClosedError, PoolReleaseError, PoolTimeoutError
from hub.pool import LifoPool, PoolStats

__all__ = ("Resource", "ResourceClosedError", "ResourceReleaseError")

logger = logging.getLogger(__name__)

T = TypeVar("T")


# The lease, a weak reference to its pool, the resource, and the pool's cell of it; on the resource
# itself, so that nothing but the resource keeps them.
_Loan = tuple[Any, Any, Any, Any]


class ResourceClosedError(exceptions.KombuError, RuntimeError):
    """The pool was closed."""


class ResourceReleaseError(exceptions.KombuError, PoolReleaseError):
    """The resource was released twice, or is not of this pool."""


class _Cell(Generic[T]):
    """What the pool holds in place of a resource: strongly while idle, weakly while on loan."""

    __slots__ = ("adopts", "bound", "ref", "resource")

    def __init__(self, resource: T) -> None:
        self.resource: T | None = resource
        #: Finds it while it is on loan; None if nothing can, and then it is held strongly.
        self.ref: Callable[[], T | None] | None = None
        #: Whether it knows what to do with a pool, as connections do.
        self.adopts = hasattr(type(resource), "_pool")
        #: Whether it has been given a method `release`.
        self.bound = False
        try:
            self.ref = weakref.ref(resource)
        except TypeError:
            pass

    def find(self) -> T | None:
        """Return the resource, idle or on loan; None if it is dead."""
        if self.resource is None and self.ref is not None:
            return self.ref()
        return self.resource


class _NoLease:
    """Stands for the lease where nothing is pooled: the resource is closed when it is released."""

    __slots__ = ("active",)

    def __init__(self) -> None:
        self.active = True


class Resource(Generic[T]):
    """A pool of things that are expensive to make.

    A subclass says how: `new` makes one, `close_resource` closes it, `prepare` readies it for the
    one who acquires it.

    Args:
        limit: how many may exist at a time; None or 0 switches pooling off.
        preload: how many to make at once.
        close_after_fork: kept for Kombu's sake: no child of a fork ever uses, or closes, what the
            parent has made.
    """

    LimitExceeded: type[exceptions.LimitExceeded] = exceptions.LimitExceeded

    close_after_fork: bool = False

    def __init__(
        self,
        limit: int | None = None,
        preload: int | None = None,
        close_after_fork: bool | None = None,
    ) -> None:
        self._limit = limit
        self.preload = preload or 0
        self._closed = False
        if close_after_fork is not None:
            self.close_after_fork = close_after_fork
        # Whether readying a resource may wait.
        self._prepares = type(self).prepare is not Resource.prepare
        self._pool: LifoPool[_Cell[T]] | None = self._make_pool(limit) if limit else None
        # Loans of resources that take no attribute; the others carry their own, so that a
        # resource which nobody refers to any more is garbage, lease and all.
        self._held: dict[int, _Loan] = {}
        self._collecting = 0
        self._me = weakref.ref(self)
        self.setup()

    # -- what a subclass says

    def setup(self) -> None:
        """Make the first `preload` resources."""
        if self._pool is None or not self.preload:
            return
        made: list[T] = []
        try:
            for _ in range(min(self.preload, self._limit or 0)):
                resource = self.acquire()
                made.append(resource)
                self.establish_resource(resource)
        finally:
            for resource in made:
                self.release(resource)

    def new(self) -> T:
        """Make a resource."""
        raise exceptions.UnsupportedOperation(f"{type(self).__name__} does not say how to make one")

    def prepare(self, resource: T) -> T:
        """Ready `resource` for the one who acquires it; what is returned is what they get."""
        return resource

    def establish_resource(self, resource: T) -> None:
        """Open what `new` has left closed; only for preloaded resources."""

    def close_resource(self, resource: T) -> None:
        """Close `resource` politely."""
        resource.close()  # type: ignore[attr-defined]

    def collect_resource(self, resource: T) -> None:
        """Close `resource` at once, whoever uses it."""
        self.close_resource(resource)

    def release_resource(self, resource: T) -> None:
        """Run when `resource` is released, before anybody else can have it."""

    def check_resource(self, resource: T) -> bool:
        """Tell without waiting whether an idle resource is still good; if not it is closed."""
        del resource
        return True

    # -- acquire and release

    def acquire(self, block: bool = False, timeout: float | None = None) -> T:
        """Take a resource, making one if need be.

        Args:
            block: wait for one to be released when the limit is reached.
            timeout: seconds for waiting and making together; None waits for ever.

        Returns:
            The resource. It has a method `release`; connections and producers are context managers
            that release at the end.

        Raises:
            LimitExceeded: all are in use (the message tells how many, by how many tasks and for how
                long), and block is false or the time is over.
            ResourceClosedError: the pool is closed.
        """
        if self._closed:
            raise self._closed_error()
        pool = self._pool
        if pool is None:
            with Deadline(timeout if block else None):
                return self._lend(self.new(), _NoLease(), None)
        # What creates a resource gets its deadline in _create: to set one costs as much as all the
        # rest, and mostly nothing has to be created.
        if not block:
            timeout = None
        elif timeout is not None and self._prepares:
            with Deadline(timeout):
                return Resource.acquire(self, block)
        else:
            # What is no number is refused also where nothing waits; the usual one needs no call.
            if timeout is not None and not (timeout.__class__ is float and timeout > 0.0):
                has_time(timeout)
            timeout = remaining(timeout)
        try:
            lease = pool.acquire(timeout, block=block)
        except PoolTimeoutError as exc:
            raise self.LimitExceeded(str(exc)) from exc
        except PoolClosedError as exc:
            raise self._closed_error() from exc
        cell = lease.resource
        resource = cell.resource
        assert resource is not None
        return self._lend(resource, lease, cell)

    def _lend(self, made: Any, lease: Any, cell: _Cell[T] | None) -> T:
        """Ready what has been acquired, and note on it that it is on loan."""
        resource = made
        try:
            resource = self.prepare(made)
            loan = (lease, self._me, resource, cell)
            try:
                own = resource.__dict__
                own["_lease"] = loan
            except (AttributeError, TypeError):
                own = {}
                self._held[id(resource)] = loan
            if cell is None or resource is not made:
                self._give_release(resource)
            else:
                if cell.adopts:
                    resource._pool = self
                elif not cell.bound or "release" not in own:
                    self._give_release(resource)
                    cell.bound = True
                if cell.ref is not None:
                    cell.resource = None
        except BaseException:
            self._forget(resource)
            self._end(lease, cell, made)
            raise
        return resource  # type: ignore[no-any-return]

    def _give_release(self, resource: Any) -> None:
        """Let `resource` be released by a method of its own."""
        if hasattr(type(resource), "_pool"):
            # Connections know what to do with a pool.
            resource._pool = self
            return
        try:
            resource.release = functools.partial(self.release, resource)
        except (AttributeError, TypeError):
            return

    def _end(self, lease: Any, cell: _Cell[T] | None, resource: T) -> None:
        """Close a resource instead of putting it back."""
        if cell is None:
            lease.active = False
            self.close_resource(resource)
            return
        if cell.resource is None:
            cell.resource = resource
        lease.discard()

    def _closed_error(self) -> ResourceClosedError:
        return ResourceClosedError(
            f"Acquire on closed pool: {self!r}. Make a new one, or close it after its last user"
        )

    def release(self, resource: T) -> None:
        """Give `resource` back.

        Raises:
            ResourceReleaseError: it was given back before, or is not of this pool; nothing happens.
        """
        lease, _, _, cell = self._unbind(resource)
        try:
            self.release_resource(resource)
        except BaseException:
            self._end(lease, cell, resource)
            raise
        if cell is None:
            self._end(lease, cell, resource)
        else:
            if cell.resource is None:
                cell.resource = resource
            lease.release()

    def replace(self, resource: T) -> None:
        """Close `resource`, which its user has found to be broken, and let another one be made.

        Raises:
            ResourceReleaseError: as for `release`.
        """
        lease, _, _, cell = self._unbind(resource)
        if hasattr(type(resource), "_pool"):
            resource._pool = None  # type: ignore[attr-defined]
        self._end(lease, cell, resource)

    def holds(self, resource: T) -> bool:
        """Tell whether `resource` was acquired from this pool and not given back yet."""
        loan = getattr(resource, "_lease", None)
        if loan is None or loan[1] is not self._me:
            loan = self._held.get(id(resource))
        return loan is not None and loan[0].active

    def _unbind(self, resource: Any) -> _Loan:
        loan: _Loan | None = None
        try:
            own = resource.__dict__
            loan = own.get("_lease")
        except AttributeError:
            pass
        if loan is None:
            loan = self._held.pop(id(resource), None)
        else:
            # pop() also decides which of two threads that release at once has done so.
            loan = own.pop("_lease", None) if loan[1] is self._me else None
            if loan is not None and "release" in own and hasattr(type(resource), "release"):
                # Its own method says what releasing it means without a pool.
                del own["release"]
        if loan is None:
            raise ResourceReleaseError(
                f"{resource!r} is not on loan from {self!r}: it was released before, or is not "
                "its. Release or replace what you have acquired once; acquire again to go on"
            )
        return loan

    def _forget(self, resource: Any) -> None:
        """Take back what `_lend` has noted."""
        own = getattr(resource, "__dict__", {})
        loan = own.get("_lease")
        if loan is not None and loan[1] is self._me:
            del own["_lease"]
        self._held.pop(id(resource), None)

    # -- the pool as a whole

    def _make_pool(self, limit: int) -> LifoPool[_Cell[T]]:
        return LifoPool(
            self._create,
            limit=limit,
            close=self._close_one,
            check=self._check_one if self._checks() else None,
            name=self._name(),
        )

    def _checks(self) -> bool:
        return type(self).check_resource is not Resource.check_resource

    def _name(self) -> str:
        return type(self).__name__

    def _create(self, seconds_left: float | None) -> _Cell[T]:
        with Deadline(seconds_left):
            return _Cell(self.new())

    def _check_one(self, cell: _Cell[T]) -> bool:
        resource = cell.resource
        return resource is not None and self.check_resource(resource)

    def _close_one(self, cell: _Cell[T]) -> None:
        resource = cell.find()
        if resource is None:
            return
        if self._collecting:
            self.collect_resource(resource)
        else:
            self.close_resource(resource)

    def force_close_all(self, close_pool: bool = True) -> None:
        """Close every resource, also those in use, without a goodbye.

        A warning in the log tells how many were in use, and since when; releasing them afterwards
        does nothing.

        Args:
            close_pool: nothing can be acquired any more; else the pool starts anew.
        """
        if close_pool:
            self._closed = True
        pool = self._pool
        if pool is None:
            return
        if pool.stats().held:
            # Kombu's method raises nothing.
            logger.warning(
                "%s was closed by force while %s: what they do with it fails from now on. "
                "Release before, or close when nobody uses it any more",
                self._name(),
                pool.describe_held(),
            )
        self._collecting += 1
        try:
            pool.force_close_all()
            if close_pool:
                pool.retire()
        finally:
            self._collecting -= 1

    def resize(
        self,
        limit: int | None,
        force: bool = False,
        ignore_errors: bool = False,
        reset: bool = False,
    ) -> None:
        """Change the limit.

        Args:
            limit: as for the constructor.
            force: shrink also while resources are in use; those too many are closed when they are
                released.
            ignore_errors: do not raise; same as force.
            reset: close all resources first, in use or not.

        Raises:
            RuntimeError: the new limit is lower, and resources are in use.
        """
        before = self._limit or 0
        after = limit or 0
        pool = self._pool
        if pool is not None and 0 < after < before and not (force or ignore_errors or reset):
            held = pool.stats().held
            if held:
                raise RuntimeError(
                    f"Can't shrink pool when in use: was={before} now={after}; {held} are in use"
                )
        if reset:
            self.force_close_all(close_pool=False)
        self._limit = limit
        if after == before:
            return
        if not after:
            # What is in use is closed when it is released.
            self._pool = None
            if pool is not None:
                pool.retire()
        elif pool is None:
            self._pool = self._make_pool(after)
        else:
            pool.resize(after)

    @property
    def limit(self) -> int | None:
        """How many resources may exist at a time; None or 0: each is closed when it is released."""
        return self._limit

    @limit.setter
    def limit(self, limit: int | None) -> None:
        self.resize(limit)

    @property
    def closed(self) -> bool:
        """True when nothing can be acquired any more."""
        return self._closed

    def stats(self) -> PoolStats | None:
        """Return the numbers of this moment; None without a limit, when nothing is pooled."""
        return None if self._pool is None else self._pool.stats()

    def __repr__(self) -> str:
        stats = self.stats()
        if stats is None:
            counts = "no limit"
        else:
            counts = f"{stats.held} of {stats.limit} in use, {stats.idle} idle"
            counts += f", {stats.waiting} waiting"
        return f"<{self._name()}: {'closed, ' if self._closed else ''}{counts}>"
