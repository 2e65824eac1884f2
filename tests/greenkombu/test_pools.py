from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu import pools
from greenkombu.connection import ChannelPool, Connection, ConnectionPool
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ChannelLimitExceeded,
    ConnectionLimitExceeded,
    LimitExceeded,
    UnsupportedOperation,
)
from greenkombu.messaging import Producer
from greenkombu.resource import ResourceClosedError, ResourceReleaseError
from hub import get_environment
from tests.support.loopback import make_transport
from tests.support.patched import run_patched
from tests.support.tasks import until


@pytest.fixture(autouse=True)
def clean_groups() -> Iterator[None]:
    limit = pools.get_limit()
    registered = list(pools._groups)
    yield
    pools.reset()
    pools._groups[:] = registered
    pools.set_limit(limit)


def connect_to(**attributes: Any) -> tuple[Connection, Any]:
    cls = make_transport(**attributes)
    return Connection("loop", transport=cls), cls


# -- connections


def test_b027_release_gives_a_pooled_connection_back() -> None:
    connection, cls = connect_to()
    pool = connection.Pool(2)
    assert type(pool) is ConnectionPool
    first = pool.acquire()
    first.connect()
    assert first is not connection
    first.release()
    assert first.connected
    assert pool.acquire() is first
    assert "close_connection" not in cls.log
    pool.force_close_all()


def test_b028_pooled_connection_is_released_by_with_once() -> None:
    connection, _ = connect_to()
    pool = connection.Pool(1)
    with pool.acquire() as acquired:
        assert pool.holds(acquired)
    assert not pool.holds(acquired)
    with pool.acquire() as acquired:
        acquired.release()
    with pytest.raises(KeyError), pool.acquire():
        raise KeyError
    with pytest.raises(ResourceReleaseError):
        acquired.release()
    with pool.acquire():
        pass


def test_b050_connection_limit() -> None:
    connection, _ = connect_to()
    pool = connection.Pool(2)
    held = [pool.acquire(), pool.acquire()]
    with pytest.raises(ConnectionLimitExceeded):
        pool.acquire()
    held[0].release()
    assert pool.acquire() is held[0]


def test_b052_one_task_makes_one_connection() -> None:
    connection, cls = connect_to()
    pool = connection.Pool(10)
    for _ in range(20):
        with pool.acquire() as acquired:
            acquired.connect()
    assert cls.log == ["establish"]
    pool.force_close_all()


@pytest.mark.parametrize("limit", [None, 0])
def test_b053_no_limit_no_pooling(limit: int | None) -> None:
    connection, cls = connect_to()
    pool = connection.Pool(limit)
    for _ in range(3):
        with pool.acquire() as acquired:
            acquired.connect()
        assert not acquired.connected
    assert cls.log == ["establish", "close_connection"] * 3


def test_b055_preload_connects() -> None:
    connection, cls = connect_to()
    pool = connection.Pool(3, preload=2)
    assert cls.log == ["establish"] * 2
    pool.force_close_all()


def test_b055_preload_that_fails_leaves_nothing_held() -> None:
    connection, _ = connect_to(failures=1)
    with pytest.raises(OSError, match="no answer"):
        connection.Pool(2, preload=2)


def test_b056_acquire_opens_nothing() -> None:
    connection, cls = connect_to()
    pool = connection.Pool(2)
    with pool.acquire() as acquired:
        assert not acquired.connected
    assert cls.log == []


def test_b057_acquire_channel_gives_the_default_channel() -> None:
    connection, _ = connect_to()
    pool = connection.Pool(1)
    with pool.acquire_channel(block=True) as (acquired, channel):
        assert channel is acquired.default_channel
    assert not channel.closed
    with pool.acquire_channel() as (_, again):
        assert again is channel
    pool.force_close_all()


@pytest.mark.parametrize("how", ["failed", "closed"])
def test_b070_b072_lost_connection_is_opened_again(how: str) -> None:
    connection, cls = connect_to()
    pool = connection.Pool(1)
    with pool.acquire() as acquired:
        acquired.connect()
        if how == "closed":
            acquired.close()
    if how == "failed":
        cls.connections[0].abort(OSError("reset while idle"))
    with pool.acquire() as again:
        assert again.default_channel is not None
        assert again.connection is cls.connections[1]
    assert len(cls.connections) == 2
    pool.force_close_all()


def test_s21_replaced_connection_belongs_to_nobody() -> None:
    connection, _ = connect_to()
    pool = connection.Pool(1)
    acquired = pool.acquire()
    acquired.connect()
    pool.replace(acquired)
    assert not acquired.connected
    acquired.release()  # closes, as without a pool
    assert pool.acquire() is not acquired


def test_force_close_all_says_no_goodbye_and_wakes_the_users() -> None:
    connection, cls = connect_to()
    pool = connection.Pool(2)
    acquired = pool.acquire()
    acquired.connect()
    environment = get_environment()

    def drain() -> str:
        try:
            acquired.drain_events()
        except acquired.connection_errors as exc:
            return type(exc).__name__
        return "nothing"

    task = environment.spawn(drain)
    until(environment, lambda: "1 listening" in repr(cls.connections[0].inbox))
    pool.force_close_all()
    assert task.result(5) == "ConnectionClosedError"
    assert "close_connection" not in cls.log
    with pytest.raises(ResourceClosedError):
        pool.acquire()


def test_pool_shows_no_password() -> None:
    connection = Connection("loop://u:secret@h", transport=make_transport())
    pool = connection.Pool(1)
    held = pool.acquire()
    with pytest.raises(LimitExceeded) as caught:
        pool.acquire()
    held.release()
    assert "secret" not in repr(pool) + str(caught.value)


# -- channels


def test_b050_channel_limit() -> None:
    connection, cls = connect_to()
    pool = connection.ChannelPool(2)
    assert type(pool) is ChannelPool
    channels = [pool.acquire(), pool.acquire()]
    with pytest.raises(ChannelLimitExceeded):
        pool.acquire()
    channels[1].release()
    assert pool.acquire() is channels[1]
    assert cls.log == ["establish", "create_channel", "create_channel"]
    connection.close()


def test_b055_preload_opens_channels() -> None:
    connection, cls = connect_to()
    connection.ChannelPool(3, preload=2)
    assert cls.log.count("create_channel") == 2
    connection.close()


def test_closed_channel_is_replaced_also_after_a_reconnect() -> None:
    connection, cls = connect_to()
    pool = connection.ChannelPool(1)
    first = pool.acquire()
    first.release()
    first.close()
    second = pool.acquire()
    assert second is not first
    second.release()
    cls.connections[0].abort(OSError("reset"))
    third = pool.acquire()
    assert not third.closed
    assert len(cls.connections) == 2
    third.release()
    connection.close()


def test_pooled_channel_is_released_by_with() -> None:
    connection, _ = connect_to()
    pool = connection.ChannelPool(1)
    with pool.acquire() as channel:
        pass
    assert not channel.closed
    assert pool.acquire() is channel
    connection.close()


# -- groups


def test_b058_same_parameters_same_pool() -> None:
    cls = make_transport()

    def fresh(**changes: Any) -> Connection:
        return Connection("loop", **{"transport": cls, "transport_options": {"a": 1}, **changes})

    pool = pools.connections[fresh()]
    assert pools.connections[fresh()] is pool
    assert pools.producers[fresh()] is pools.producers[fresh()]
    for change in (
        {"userid": "x"},
        {"virtual_host": "x"},
        {"transport_options": {"a": 2}},
        {"heartbeat": 3},
        {"ssl": True},
    ):
        assert pools.connections[fresh(**change)] is not pool
    assert fresh() in pools.connections
    assert pools.connections.get(fresh()) is pool
    assert pool in [each for _, each in pools.connections.items()]


def test_b059_two_brokers_at_once() -> None:
    one, one_cls = connect_to()
    two, two_cls = connect_to()
    with pools.connections[one].acquire() as a, pools.connections[two].acquire() as b:
        a.connect()
        b.connect()
    assert one_cls.log == two_cls.log == ["establish"]


def test_b060_producer_takes_a_connection() -> None:
    connection, _ = connect_to()
    pools.set_limit(1)
    with pools.producers[connection].acquire() as producer:
        assert type(producer) is Producer
        assert producer.connection is not connection
        with pytest.raises(ConnectionLimitExceeded):
            pools.connections[connection].acquire()
        with pytest.raises(LimitExceeded):
            pools.producers[connection].acquire()
    with pools.connections[connection].acquire():
        with pytest.raises(LimitExceeded):
            pools.producers[connection].acquire()
        started = time.monotonic()
        with pytest.raises(LimitExceeded):
            pools.producers[connection].acquire(block=True, timeout=0.05)
        assert time.monotonic() - started < 10
    with pools.producers[connection].acquire(block=True):
        pass


def test_an_idle_producer_is_acquired_without_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To set one costs more than all the rest; the wait for the connection is bounded without."""
    pool = pools.ProducerPool(Connection("memory://").Pool(1), 1)
    pool.acquire().release()
    entered: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(Deadline, "__enter__", entered.append)
        pool.acquire(block=True, timeout=20).release()
    assert entered == []
    for timeout in (0.01, 0, -1.0):
        with pool.connections.acquire(), pytest.raises(LimitExceeded):
            pool.acquire(block=True, timeout=timeout)
    assert pool.stats() is not None
    assert pool.acquire(block=True, timeout=20).connection is not None


def test_producer_waits_for_a_connection_that_is_released() -> None:
    connection, _ = connect_to()
    pools.set_limit(1)
    held = pools.connections[connection].acquire()
    environment = get_environment()
    task = environment.spawn(pools.producers[connection].acquire, block=True, timeout=20)
    environment.sleep(0.02)
    held.release()
    assert task.result(5).connection is held
    task.result().release()


def test_b061_acquiring_again_makes_no_new_connections() -> None:
    connection, cls = connect_to()
    for _ in range(100):
        with pools.producers[connection].acquire(block=True) as producer:
            assert producer.channel is not None
    assert cls.log == ["establish", "create_channel"]


def test_b062_leaving_a_producer_releases_it() -> None:
    connection, _ = connect_to()
    pool = pools.producers[connection]
    with pool.acquire() as producer:
        channel = producer.channel
    assert not channel.closed
    stats = pool.stats()
    assert stats is not None
    assert (stats.held, stats.idle) == (0, 1)
    producer.release()  # nothing to release
    with pytest.raises(ResourceReleaseError):
        pool.release(producer)
    assert pool.acquire() is producer


def test_producer_pool_of_its_own() -> None:
    connection, _ = connect_to()

    class Mine(Producer):
        pass

    pool = pools.ProducerPool(connection.Pool(2), limit=1, Producer=Mine)
    with pool.acquire() as producer:
        assert type(producer) is Mine
    pool.replace(pool.acquire())
    stats = pool.connections.stats()
    assert stats is not None
    assert stats.held == 0
    unlimited = pools.ProducerPool(connection.Pool(1))
    unlimited.acquire().release()
    assert unlimited.limit is None


def test_b063_limit() -> None:
    assert pools.get_limit() == 200
    pools.set_limit(7)
    assert pools.get_limit() == 7
    connection, _ = connect_to()
    assert pools.connections[connection].limit == pools.producers[connection].limit == 7


def test_b064_set_limit() -> None:
    connection, _ = connect_to()
    pools.set_limit(2)
    pool = pools.connections[connection]
    first, second = pool.acquire(), pool.acquire()
    pools.set_limit(3)
    assert (pool.limit, pools.connections[connection]) == (3, pool)
    with pytest.raises(RuntimeError, match="Can't shrink pool when in use"):
        pools.set_limit(1)
    assert pools.get_limit() == pool.limit == 3
    pools.set_limit(1, force=True)
    assert pools.get_limit() == pool.limit == 1
    assert pools.connections[connection] is pool
    first.release()
    second.release()
    pools.set_limit(5, reset_after=True)
    assert pools.connections[connection] is not pool
    pools.set_limit(None)
    assert pools.get_limit() == 0


def test_b065_b066_reset() -> None:
    connection, cls = connect_to()
    acquired = pools.connections[connection].acquire()
    acquired.connect()
    idle = pools.connections[connection].acquire()
    idle.connect()
    idle.release()
    pools.reset(object(), after="fork")
    assert not pools.connections
    assert not pools.producers
    assert [each.connected for each in cls.connections] == [False, False]
    with pools.connections[connection].acquire() as fresh:
        assert fresh is not acquired


GROUPS_FORK = """
import os
from greenkombu import pools
from greenkombu.connection import Connection
from hub import get_environment
from tests.support.loopback import make_transport

fork = get_environment().original("os", "fork")
waitpid = get_environment().original("os", "waitpid")
cls = make_transport()
connection = Connection("loop", transport=cls)
own = pools.Connections(limit=3)
kept = pools.PoolGroup(close_after_fork=True)
held = pools.connections[connection].acquire()
held.connect()
with own[connection].acquire() as mine:
    mine.connect()
with pools.producers[connection].acquire() as producer:
    producer.channel
before = list(cls.connections)
pid = fork()
if pid == 0:
    status = 1
    try:
        assert not pools.connections and not pools.producers and not own
        held.release()
        with pools.connections[connection].acquire() as fresh:
            assert fresh is not held
            fresh.connect()
        with pools.producers[connection].acquire() as producer:
            producer.channel
        pools.reset()
        assert all(each.connected for each in before), before
        status = 0
    finally:
        os._exit(status)
assert waitpid(pid, 0)[1] == 0
assert all(each.connected for each in before)
held.release()
assert pools.connections[connection].acquire() is held
print("end")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_b067_child_starts_with_clean_groups() -> None:
    done = run_patched(["-c", GROUPS_FORK])
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_b068_groups_of_ones_own() -> None:
    connection, _ = connect_to()
    own = pools.Connections(limit=2)
    assert own[connection].limit == 2
    assert own[connection] is not pools.connections[connection]
    assert pools.Producers(limit=own.limit)[connection].limit == 2
    pools.set_limit(9)
    following = pools.Connections(limit=pools.use_default_limit)
    assert following[connection].limit == 9
    assert pools.Connection is pools.Connections
    assert pools.use_default_limit is pools.use_global_limit
    assert pools.Connections()[connection].limit is None
    with pytest.raises(UnsupportedOperation, match="must define"):
        pools.PoolGroup(1)[connection]


def test_b069_registered_groups_are_reached() -> None:
    connection, _ = connect_to()
    own = pools.Connections(limit=2)
    assert pools.register_group(own) is own
    pool = own[connection]
    pools.set_limit(11)
    assert pool.limit == 11
    pools.reset()
    assert not own
    assert pool.closed


def test_pool_of_two_tasks_that_ask_at_once_is_one() -> None:
    connection, _ = connect_to()
    environment = get_environment()
    tasks = [environment.spawn(lambda: pools.producers[connection.clone()]) for _ in range(20)]
    assert len({id(task.result(10)) for task in tasks}) == 1


def test_nested_acquire_ends_at_the_deadline() -> None:
    connection, _ = connect_to()
    pool = connection.Pool(5)
    environment = get_environment()
    have_one: list[str] = []

    def take_two(name: str) -> str:
        with pool.acquire(block=True, timeout=10):
            have_one.append(name)
            until(environment, lambda: len(have_one) == 5)
            try:
                with pool.acquire(block=True, timeout=0.2):
                    return "two"
            except ConnectionLimitExceeded as exc:
                return str(exc)

    tasks = [environment.spawn(take_two, str(number)) for number in range(5)]
    results = [task.result(10) for task in tasks]
    # Whoever comes first gives up before anybody gives back, so he sees all five taken.
    assert any("5" in result for result in results)
    stats = pool.stats()
    assert stats is not None
    assert stats.held == 0
