"""What becomes of messages that a Redis consumer has: acked, put back, too late, too many."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer
from hub.environment import Environment
from tests.scenarios.store import Store, text_of
from tests.scenarios.strikes import Strike, kinds
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until


@pytest.fixture
def connect(store: Store) -> Iterator[Callable[..., Connection]]:
    """Make connections, which are closed at the end."""
    made: list[Connection] = []

    def make(**options: Any) -> Connection:
        made.append(Connection(store.url, transport_options=options))
        return made[-1]

    yield make
    for connection in made:
        connection.close()


def consume(connection: Connection, queues: list[str], prefetch: int = 0) -> tuple[Any, list[Any]]:
    """Start a consumer of some queues; return its channel and where its messages go."""
    got: list[Any] = []
    channel = connection.channel()
    channel.basic_qos(0, prefetch, False)
    declared = [Queue(queue, no_declare=True) for queue in queues]
    Consumer(channel, declared, on_message=got.append).consume()
    return channel, got


def drain(connection: Connection, got: list[Any], count: int) -> list[str]:
    """Drain until so many messages are there; return their bodies."""
    while len(got) < count:
        connection.drain_events(timeout=LONG)
    return [text_of(message) for message in got]


def nothing_comes(connection: Connection, seconds: float = 0.1) -> bool:
    """Whether nothing comes for a while."""
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=seconds)
    return True


def numbers(count: int, start: int = 0) -> list[str]:
    return [f"{number}" for number in range(start, start + count)]


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_a_late_settling_of_a_restored_message_leaves_its_redelivery_alone(
    env: Environment, store: Store, connect: Callable[..., Connection], settle: str
) -> None:
    queue = store.queue()
    store.put(queue, ["x"])
    slow, quick = connect(), connect()
    _, held = consume(slow, [queue], 1)
    drain(slow, held, 1)
    # As if its owner had not renewed it in time.
    connection = quick.connection
    assert quick.default_channel.basic_get(queue) is None
    [keys] = connection.indexes()
    until(env, lambda: connection.leases.restore_visible(keys, 0.0) == 1)
    assert store.waiting(queue) == ["x"]
    _, again = consume(quick, [queue], 1)
    assert drain(quick, again, 1) == ["x"]
    assert again[0].delivery_info["redelivered"]
    assert again[0].delivery_tag != held[0].delivery_tag
    getattr(held[0], settle)()
    slow.default_channel.basic_get("nothing")  # it was dealt with when this is answered
    assert store.unacked() == ["x"]
    assert store.waiting(queue) == []
    again[0].ack()
    until(env, lambda: store.registered() == (0, 0))
    assert store.waiting(queue) == []


def test_what_goes_back_keeps_its_order(
    store: Store, connect: Callable[..., Connection], env: Environment
) -> None:
    queue = store.queue()
    store.put(queue, numbers(6))
    connection = connect()
    channel, got = consume(connection, [queue], 4)
    assert drain(connection, got, 4) == numbers(4)
    assert nothing_comes(connection)
    assert store.waiting(queue) == ["4", "5"]
    # Requeued: at the head, as RabbitMQ does.
    got.pop(1).requeue()
    assert drain(connection, got, 4) == ["0", "2", "3", "1"]
    assert got[3].delivery_info["redelivered"]
    # Rejected: gone, and the next one comes.
    got.pop(0).reject()
    assert drain(connection, got, 4) == ["2", "3", "1", "4"]
    # Recovered: in their order.
    got.clear()
    channel.basic_recover(requeue=True)
    assert drain(connection, got, 4) == ["2", "3", "1", "4"]
    got.pop(0).ack()
    assert drain(connection, got, 4) == ["3", "1", "4", "5"]
    channel.close()
    assert store.waiting(queue) == ["3", "1", "4", "5"]
    assert store.registered() == (0, 0)


def test_priorities_survive_what_goes_back(
    store: Store, connect: Callable[..., Connection]
) -> None:
    queue = store.queue()
    store.put(queue, ["last"], priority=9)
    store.put(queue, ["second", "third"], priority=3)
    store.put(queue, ["first"])
    order = ["first", "second", "third", "last"]
    for ending in ("recover", "requeue", "close"):
        connection = connect()
        channel, got = consume(connection, [queue])
        assert drain(connection, got, 4) == order, f"before {ending}"
        if ending == "recover":
            got.clear()
            channel.basic_recover(requeue=True)
            assert drain(connection, got, 4) == order
        elif ending == "requeue":
            Consumer(channel, []).cancel()
            for tag in list(channel._consumers):
                channel.basic_cancel(tag)
            for message in reversed(got):
                message.requeue()
        connection.close()
        assert store.waiting(queue) == order, f"after {ending}"
        assert store.registered() == (0, 0)


def test_prefetch_limits_are_kept_exactly(
    env: Environment, store: Store, connect: Callable[..., Connection]
) -> None:
    queues = [store.queue() for _ in range(3)]
    for queue in queues:
        store.put(queue, numbers(20))
    connection = connect()
    channel, got = consume(connection, queues, 10)
    _, others = consume(connection, queues[:1], 3)
    while len(got) + len(others) < 13:
        connection.drain_events(timeout=LONG)
    assert nothing_comes(connection)
    # On the server as well: what waits in a buffer counts.
    assert (len(got), len(others)) == (10, 3)
    assert store.registered() == (13, 13)
    for count in (1, 4, 10, 3):
        done = len(got)
        for message in got[done - 10 : done - 10 + count]:
            message.ack()
        drain(connection, got, done + count)
        assert nothing_comes(connection, 0.02)
        assert len(got) == done + count
        until(env, lambda: store.registered() == (13, 13))
    channel.basic_qos(0, 12, False)
    drain(connection, got, 30)
    assert nothing_comes(connection, 0.02)
    until(env, lambda: store.registered() == (15, 15))
    # Each queue had its turn.
    assert min(Counter(message.delivery_info["routing_key"] for message in got).values()) >= 4
    unacked = len(got[-12:]) + len(others)
    connection.close()
    assert store.registered() == (0, 0)
    assert sum(len(store.waiting(queue)) for queue in queues) == 60 - 18
    assert unacked == 15


def test_unacked_and_buffered_messages_return_at_close_in_order(
    env: Environment, store: Store, connect: Callable[..., Connection]
) -> None:
    queue = store.queue()
    store.put(queue, numbers(300))
    connection = connect()
    _, got = consume(connection, [queue])
    drain(connection, got, 7)
    for message in got[:3]:
        message.ack()
    assert store.registered()[0] >= 90, "there is no buffer"
    connection.close()
    assert store.registered() == (0, 0)
    assert store.waiting(queue) == numbers(297, 3)


def test_a_cancelled_consumer_keeps_what_was_delivered_and_gives_back_the_rest(
    env: Environment, store: Store, connect: Callable[..., Connection]
) -> None:
    queue = store.queue()
    store.put(queue, numbers(50))
    connection = connect()
    channel, got = consume(connection, [queue])
    drain(connection, got, 5)
    for tag in list(channel._consumers):
        channel.basic_cancel(tag)
    until(env, lambda: store.registered() == (5, 5))
    assert store.waiting(queue) == numbers(45, 5)
    assert store.unacked() == numbers(5)
    for message in got:
        message.ack()
    until(env, lambda: store.registered() == (0, 0))


def test_a_get_that_is_given_up_leaves_its_message_where_it_is_found_again(
    env: Environment, store: Store, connect: Callable[..., Connection]
) -> None:
    if not env.green:
        pytest.skip("threads cannot be interrupted")
    queue = store.queue()
    connection = connect()
    channel = connection.default_channel
    assert channel.basic_get(queue) is None
    struck = 0
    for kind in kinds(env):
        for lag in (0.0, 0.001):
            for at in range(1, 20):
                store.put(queue, ["x"])
                got: list[Any] = []

                def get(got: list[Any] = got) -> None:
                    got.append(channel.basic_get(queue))

                strike = Strike(env, get, at, kind, lag)
                strike.run(LONG)
                struck += strike.struck
                # Not after the visibility timeout of an hour: the connection lives.
                if not got:
                    until(env, lambda: store.waiting(queue) == ["x"])
                    got.append(channel.basic_get(queue))
                got[0].ack()
                until(env, lambda: store.registered() == (0, 0))
                if not strike.struck:
                    break
    assert struck
    with contextlib.suppress(TimeoutError):
        connection.drain_events(timeout=0.01)


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue", "get"])
def test_what_was_under_way_when_the_connection_broke_is_settled_by_the_next_one(
    env: Environment, store: Store, store_proxy: FaultProxy, settle: str
) -> None:
    # As when a server restarts that keeps its data, or a link breaks; with the visibility timeout
    # of an hour, within which nobody else would see to it.
    queue = store.queue()
    store.put(queue, numbers(4))
    connection = Connection(store_proxy.url(store.url))
    channel, got = consume(connection, [queue], 3)
    drain(connection, got, 3)
    if settle == "get":
        channel.close()
        channel = connection.channel()
        store_proxy.black_hole("down")
        with pytest.raises(TimeoutError), Deadline(0.1):
            channel.basic_get(queue)
        until(env, lambda: store.unacked() == ["0"])
    else:
        store_proxy.black_hole("up")
        getattr(got[1], settle)()
        env.sleep(0.05)
        assert store.registered() == (3, 3)
    store_proxy.restore()
    store_proxy.reset()
    until(env, lambda: not connection.connected)
    connection.ensure_connection()
    until(env, lambda: store.registered() == (0, 0))
    left = ["0", "2", "3"] if settle in ("ack", "reject") else numbers(4)
    assert sorted(store.waiting(queue)) == left
    connection.close()
