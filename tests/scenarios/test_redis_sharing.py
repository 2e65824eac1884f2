"""Many tasks, consumers and processes that share Redis connections, or a queue."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from greenkombu.transport.redis import _leases, _taps
from hub.environment import Environment
from tests.scenarios.store import Store, text_of
from tests.support.fault_proxy import FaultProxy
from tests.support.patched import run_patched
from tests.support.tasks import LONG, in_child, until

PROGRAMS = Path(__file__).with_name("programs")


@pytest.fixture
def no_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent now and then: what is counted in a test is what its messages cost."""
    monkeypatch.setattr(_taps, "LEASE", 1000.0)
    monkeypatch.setattr(_leases, "LEASE", 1000.0)
    monkeypatch.setattr(_leases, "RENEW_SECONDS", 1000.0)


def test_s15_three_tasks_drain_one_connection(env: Environment, store: Store) -> None:
    queue = store.queue()
    got: list[str] = []
    bodies = [f"{number}" for number in range(50)]

    def take(message: Any) -> None:
        got.append(text_of(message))
        message.ack()

    with Connection(store.url) as connection:
        channel = connection.channel()
        with Consumer(channel, [Queue(queue, no_declare=True)], on_message=take):

            def drain() -> None:
                while len(got) < 50:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=0.2)

            drainers = [env.spawn(drain) for _ in range(3)]
            for body in bodies:
                store.put(queue, [body])
            for task in drainers:
                task.result(LONG)
    assert sorted(got, key=int) == bodies
    assert store.registered() == (0, 0)
    assert store.waiting(queue) == []


def test_s17_a_forked_child_leaves_the_socket_of_its_parent_alone(
    env: Environment, store: Store, store_proxy: FaultProxy, no_renewals: None
) -> None:
    queue, other = store.queue(), store.queue()
    options = {"health_check_interval": 0}
    with Connection(store_proxy.url(store.url), transport_options=options) as connection:
        producer = Producer(connection, routing_key=queue)
        producer.publish("before")
        got: list[str] = []

        def take(message: Any) -> None:
            got.append(text_of(message))
            message.ack()

        consumer = Consumer(connection.channel(), [Queue(other, no_declare=True)], on_message=take)
        consumer.consume()
        store.put(other, ["before"])
        connection.drain_events(timeout=LONG)
        until(env, lambda: store.registered() == (0, 0))
        until(env, lambda: len(store.watchers(other)) == 1)
        held = Consumer(connection.channel(), [Queue("held", no_declare=True)])
        store.put("held", ["by the parent"])
        kept: list[Any] = []
        held.on_message = kept.append
        held.consume()
        until(env, lambda: kept or connection.drain_events(timeout=LONG))
        for _ in range(2):
            # Its answer is behind all that the first answers have led to.
            connection.connection.call("PING")
        sent = store_proxy.links()[0].up.bytes_in

        def child() -> None:
            Producer(connection).publish("child", routing_key=queue)
            assert connection.default_channel.basic_get("nothing") is None
            connection.close()
            gc.collect()

        in_child(child)
        in_child(lambda: (connection.close(), gc.collect()))
        in_child(lambda: (connection.collect(), gc.collect()))
        links = store_proxy.links()
        assert len(links) == 2, "the child has no connection of its own"
        assert links[0].up.bytes_in == sent, "a child has sent something for its parent"
        assert store.unacked() == ["by the parent"]
        producer.publish("after")
        assert store.waiting(queue) == ["before", "child", "after"]
        store.put(other, ["to the parent"])
        until(env, lambda: len(got) == 2 or connection.drain_events(timeout=LONG))
        assert got == ["before", "to the parent"]
        kept[0].ack()
        held.cancel()
        consumer.cancel()
    assert store.registered() == (0, 0)


def test_s17_twenty_children_that_close_and_exit_cost_the_parent_no_message(
    store: Store, store_proxy: FaultProxy
) -> None:
    queue = store.queue()
    program = PROGRAMS / "forks.py"
    result = run_patched([str(program), store_proxy.url(store.url), queue, "20"], timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["200", "messages,", "20", "children"]
    assert "Exception ignored" not in result.stderr
    assert "Traceback" not in result.stderr
    # Those that published have a connection of their own.
    assert len(store_proxy.links()) == 1 + 6
    assert store.waiting("nowhere") == ["mine"] * 6
    assert store.waiting(queue) == []
    assert store.registered() == (0, 0)


@pytest.fixture
def crowd(env: Environment, store: Store) -> Iterator[Callable[..., list[Any]]]:
    """Start consumers of one queue, as many as wanted; they are closed at the end."""
    connections: list[Connection] = []

    def gather(queue: str, count: int, own: bool, prefetch: int) -> list[Any]:
        got: list[Any] = []

        def take(message: Any) -> None:
            got.append(text_of(message))
            message.ack()

        # Of the transport: a Connection that was closed would connect again.
        def drain(connection: Any) -> None:
            with contextlib.suppress(*connections[0].connection_errors):
                while True:
                    connection.drain_events()

        def start(connection: Connection) -> None:
            channel = connection.channel()
            channel.basic_qos(0, prefetch, False)
            Consumer(channel, [Queue(queue, no_declare=True)], on_message=take).consume()

        for _ in range(count if own else 1):
            connections.append(Connection(store.url))
        for index in range(count):
            start(connections[index if own else 0])
        for connection in connections:
            tasks.append(env.spawn(drain, connection.connection))
        until(env, lambda: store.parked(queue) == count - 2, 3 * LONG)
        return got

    tasks: list[Any] = []
    yield gather
    for connection in connections:
        connection.close()
    for task in tasks:
        assert task.join(LONG)


@pytest.mark.watchdog(200)
@pytest.mark.parametrize("prefetch", [1, 0], ids="prefetch {}".format)
@pytest.mark.parametrize(
    ("count", "own"),
    [
        pytest.param(1000, False, id="1000 channels"),
        pytest.param(100, True, id="100 connections"),
        pytest.param(1000, True, id="1000 connections", marks=pytest.mark.slow),
    ],
)
def test_a_message_wakes_two_however_many_are_parked(
    env: Environment,
    store: Store,
    crowd: Callable[..., list[Any]],
    no_renewals: None,
    count: int,
    own: bool,
    prefetch: int,
) -> None:
    if own and not env.green:
        count = min(count, 50)  # each has a native thread that drains
    queue = store.queue()
    got = crowd(queue, count, own, prefetch)
    before = store.calls("evalsha") + store.calls("eval")
    for number in range(20):
        store.put(queue, [f"{number}"])
        while len(got) <= number:
            env.sleep(0.001)
    until(env, lambda: store.registered() == (0, 0))
    until(env, lambda: len(store.watchers(queue)) == 2)
    assert got == [f"{number}" for number in range(20)]
    asked = store.calls("evalsha") + store.calls("eval") - before
    # Two look. With a limit of one, who gets it looks again afterwards. And a few: on a busy
    # machine somebody is told of the next one while it still asks.
    looks = 2 if prefetch == 0 else 3
    assert asked <= 20 * looks + 20, f"{asked} scripts for 20 messages"
