"""Pools that the whole program shares, one for each broker.

``connections[connection]`` is the pool of all connections with the parameters of `connection`,
and ``producers[connection]`` that of producers on them.  A producer takes a connection out of the
former while it is acquired, so the limit of connections bounds both.

A forked child starts with empty groups.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from greenkombu import exceptions, messaging
from greenkombu._connection_pools import ConnectionPool
from greenkombu.resource import Resource
from greenkombu.utils.collections import EqualityDict
from hub.arguments import has_time

if TYPE_CHECKING:
    import greenkombu.connection

__all__ = (
    "Connection",
    "Connections",
    "PoolGroup",
    "ProducerPool",
    "Producers",
    "connections",
    "get_limit",
    "producers",
    "register_group",
    "reset",
    "set_limit",
    "use_default_limit",
    "use_global_limit",
)

logger = logging.getLogger(__name__)

GroupT = TypeVar("GroupT", bound="PoolGroup")

#: As the limit of a group: what `set_limit` has set when the pool is made.
use_global_limit = object()
#: The manual's name for it.
use_default_limit = use_global_limit

# 200 is what the manual gives. It is an upper bound for programs that forgot to choose one: a
# connection costs memory in the broker, and a broker's own limits are above it.
_limit: list[int] = [200]

_groups: list[PoolGroup] = []
# Every group, also those that are not registered: a fork empties them all.
_all_groups: weakref.WeakValueDictionary[int, PoolGroup] = weakref.WeakValueDictionary()

# Until when the task that is acquiring a producer may wait for a connection, on the monotonic
# clock; None for ever, 0.0 not at all.  A Deadline would do the same for several times the price.
_until: ContextVar[float | None] = ContextVar("greenkombu_connection_until", default=None)


class ProducerPool(Resource[messaging.Producer]):
    """A pool of producers.

    An acquired producer has a connection of its own out of `connections` and gives it back when
    it is released.

    Args:
        connections: the pool of the connections.
        *args: limit, preload, close_after_fork of `Resource`.
        **kwargs: the same by name; `Producer`: another class of producers.
    """

    Producer: type[messaging.Producer] = messaging.Producer
    close_after_fork = True

    def __init__(self, connections: ConnectionPool, *args: Any, **kwargs: Any) -> None:
        self.connections = connections
        self.Producer = kwargs.pop("Producer", None) or self.Producer
        super().__init__(*args, **kwargs)
        self._prepares = type(self).prepare is not ProducerPool.prepare

    def acquire(self, block: bool = False, timeout: float | None = None) -> messaging.Producer:
        """Take a producer, with a connection; see `Resource.acquire`.

        Args:
            block: wait for a producer and for a connection.
            timeout: seconds for both together; None waits for ever.
        """
        until: float | None = None
        if not block:
            until = 0.0
        elif timeout is not None:
            until = monotonic() + (timeout if has_time(timeout) else 0.0)
        if until is None and _until.get() is None:
            return super().acquire(block, timeout)
        token = _until.set(until)
        try:
            return super().acquire(block, timeout)
        finally:
            _until.reset(token)

    def _acquire_connection(self) -> greenkombu.connection.Connection:
        until = _until.get()
        if until is None:
            return self.connections.acquire(block=True)
        if until == 0.0:
            return self.connections.acquire()
        return self.connections.acquire(block=True, timeout=max(until - monotonic(), 0.0))

    def create_producer(self) -> messaging.Producer:
        """Make a producer on a connection that it takes out of `connections`."""
        connection = self._acquire_connection()
        try:
            return self.Producer(connection)
        except BaseException:
            connection.release()
            raise

    def new(self) -> messaging.Producer:
        """Make a producer; see `create_producer`."""
        return self.create_producer()

    def prepare(self, p: messaging.Producer) -> messaging.Producer:
        """Give a connection to a producer that has none."""
        if p.__connection__ is None:
            connection = self._acquire_connection()
            try:
                p.revive(connection)
            except BaseException:
                connection.release()
                raise
        return p

    def release_resource(self, resource: messaging.Producer) -> None:
        """Take the connection away and give it back."""
        connection, resource.__connection__ = resource.__connection__, None
        resource.channel = None
        if connection is not None and self.connections.holds(connection):
            connection.release()

    def close_resource(self, resource: messaging.Producer) -> None:
        """Give the connection back; a producer itself needs no closing."""
        self.release_resource(resource)

    def collect_resource(self, resource: messaging.Producer) -> None:
        """Give back the connection of a producer in use; the pool of connections closes it."""
        self.release_resource(resource)


class PoolGroup(EqualityDict[Any, Any]):
    """Pools by connection; a pool is made when it is first asked for.

    Args:
        limit: of each pool. `use_global_limit` means what `set_limit` says then.
        close_after_fork: kept for Kombu's sake: a forked child always starts with no pools.
    """

    def __init__(self, limit: Any = None, close_after_fork: bool = True) -> None:
        super().__init__()
        self.limit = limit
        self.close_after_fork = close_after_fork
        _all_groups[id(self)] = self

    def create(self, resource: Any, limit: int | None) -> Any:  # noqa: ARG002
        """Make the pool for `resource`; a subclass says how."""
        raise exceptions.UnsupportedOperation("PoolGroups must define ``create``")

    def __missing__(self, resource: Any) -> Any:
        limit = self.limit
        if limit is use_global_limit:
            limit = get_limit()
        # Of two tasks that come here at once both get the same pool.
        return self.setdefault(resource, self.create(resource, limit))


class Connections(PoolGroup):
    """Pools of connections."""

    def create(self, connection: Any, limit: int | None) -> ConnectionPool:
        """Make the pool of the connections like `connection`."""
        pool: ConnectionPool = connection.Pool(limit=limit)
        return pool


class Producers(PoolGroup):
    """Pools of producers, on the connections of the group `connections`."""

    def create(self, connection: Any, limit: int | None) -> ProducerPool:
        """Make the pool of the producers on connections like `connection`."""
        return ProducerPool(connections[connection], limit=limit)


#: The manual's custom groups are called so in one place.
Connection = Connections


def register_group(group: GroupT) -> GroupT:
    """Have `reset` and `set_limit` reach `group`; returns it."""
    _groups.append(group)
    return group


connections: Connections = register_group(Connections(limit=use_global_limit))
producers: Producers = register_group(Producers(limit=use_global_limit))


def _all_pools() -> Iterator[Resource[Any]]:
    for group in list(_groups):
        yield from list(group.values())


def get_limit() -> int:
    """Return the limit of pools in groups that have none of their own."""
    return _limit[0]


def set_limit(
    limit: int | None,
    force: bool = False,
    reset_after: bool = False,
    ignore_errors: bool = False,
) -> int:
    """Set the limit of the pools in all registered groups, those that exist included.

    Args:
        limit: of each pool; None or 0 switches pooling off.
        force: shrink also pools in use; what is too many is closed when it is released.
        reset_after: close everything afterwards.
        ignore_errors: do not raise; same as force.

    Returns:
        The limit.

    Raises:
        RuntimeError: a pool that is in use would have to shrink; no limit is changed.
    """
    limit = limit or 0
    pools = list(_all_pools())
    if limit != get_limit():
        before = [(pool, pool.limit) for pool in pools]
        done: list[tuple[Resource[Any], int | None]] = []
        try:
            for pool, old in before:
                pool.resize(limit, force=force, ignore_errors=ignore_errors)
                done.append((pool, old))
        except RuntimeError:
            for pool, old in done:
                pool.resize(old, force=True)
            raise
        _limit[0] = limit
    if reset_after:
        reset()
    return limit


def reset(*args: Any, **kwargs: Any) -> None:
    """Close every pooled connection, whoever uses it, and empty all groups.

    Args:
        *args, **kwargs: ignored, so that it can be registered as a fork hook.
    """
    del args, kwargs
    pools = list(_all_pools())
    for group in list(_groups):
        group.clear()
    for pool in pools:
        try:
            pool.force_close_all()
        except Exception:
            logger.warning("closing %r failed", pool, exc_info=True)


def _after_fork_in_child() -> None:
    # Only forgotten: nothing that belongs to the parent is closed.
    for group in list(_all_groups.values()):
        group.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
