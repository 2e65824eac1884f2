"""S5: whatever happens to a Redis consumer, each message is delivered, queued, or comes back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.scenarios.store import Store, WorkerProcess, text_of
from tests.scenarios.strikes import Strike, kinds
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until

#: More switches than any operation has.
MANY = 200


def consume(
    connection: Connection, queue: str, take: Callable[[Any], object], prefetch: int = 0
) -> Consumer:
    """Start a consumer on a channel of its own."""
    channel = connection.channel()
    channel.basic_qos(0, prefetch, False)
    consumer = Consumer(channel, [Queue(queue, no_declare=True)], on_message=take)
    consumer.consume()
    return consumer


def collect(
    env: Environment, store: Store, queue: str, missing: set[str], **options: Any
) -> list[str]:
    """Consume until all that is missing has come and nothing is left; return what has come.

    Whoever holds something must be gone.
    """
    store.age()
    got: list[str] = []

    def take(message: Any) -> None:
        got.append(text_of(message))
        message.ack()

    with Connection(store.url, transport_options=options) as connection:
        consumer = consume(connection, queue, take)

        def drained() -> bool:
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.1)
            return missing <= set(got) and store.registered() == (0, 0)

        until(env, drained, 3 * LONG)
        consumer.cancel()
    return got


@pytest.mark.parametrize("how", ["kill", "collect", "close"])
@pytest.mark.parametrize("rounds", [30, pytest.param(200, marks=pytest.mark.slow)])
def test_s05_a_consumer_that_ends_at_the_moment_of_a_put_loses_nothing(
    env: Environment, store: Store, rounds: int, how: str
) -> None:
    if how == "kill" and not env.green:
        pytest.skip("threads cannot be killed")
    queue = store.queue()
    options = {"visibility_timeout": 1}
    got: list[str] = []

    def take(message: Any) -> None:
        got.append(text_of(message))
        message.ack()

    with Connection(store.url, transport_options=options) as publisher:
        producer = Producer(publisher, routing_key=queue)
        for number in range(rounds):
            connection = Connection(store.url, transport_options=options)
            consume(connection, queue, take)

            # Of the transport: a Connection that was closed would connect again.
            def drain(connection: Any = connection.connection) -> None:
                with contextlib.suppress(*publisher.connection_errors):
                    while True:
                        connection.drain_events()

            drainer = env.spawn(drain)
            if number % 3:
                until(env, lambda: store.watchers(queue))
            producer.publish(f"{number}")
            if how == "kill":
                drainer.kill()
                assert drainer.join(LONG)
                connection.close()
            elif how == "collect":
                connection.collect()
            else:
                connection.close()
            assert drainer.join(LONG)
        everything = {f"{number}" for number in range(rounds)}
        if how != "collect":
            # Who closed gave back what nobody had taken.
            assert store.unacked() == []
            assert set(got) | set(store.waiting(queue)) == everything
        collect(env, store, queue, everything - set(got), **options)
    assert store.waiting(queue) == []


def test_s05_a_task_that_is_struck_at_any_of_its_switches_loses_nothing(
    env: Environment, store: Store
) -> None:
    if not env.green:
        pytest.skip("threads cannot be interrupted")
    queue, count = store.queue(), 0
    acked: list[str] = []

    def take(message: Any) -> None:
        message.ack()
        acked.append(text_of(message))

    def work() -> None:
        with Connection(store.url, transport_options={"visibility_timeout": 1}) as connection:
            message = connection.default_channel.basic_get(queue)
            if message is not None:
                take(message)
            consumer = consume(connection, queue, take)
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.02)
            consumer.cancel()

    for kind in kinds(env):
        for at in range(1, MANY):
            count += 3
            store.put(queue, [f"{number}" for number in range(count - 3, count)])
            if not Strike(env, work, at, kind).run(LONG).struck:
                break
        else:
            pytest.fail("the operation has no end")
    everything = {f"{number}" for number in range(count)}
    assert everything == set(acked) | set(store.unacked()) | set(store.waiting(queue))
    collect(env, store, queue, everything - set(acked), visibility_timeout=1)


@pytest.mark.parametrize("processes", [2, pytest.param(15, marks=pytest.mark.slow)])
def test_s05_frozen_and_killed_processes_lose_nothing(
    env: Environment, store: Store, work_apart: Callable[..., WorkerProcess], processes: int
) -> None:
    queue = store.queue()
    transport = {"visibility_timeout": 1}
    started = [
        work_apart(store.url, queue, transport=transport, prefetch=10) for _ in range(processes)
    ]
    for worker in started:
        worker.wait("ready")
    workers = list(started)
    number = 0
    while workers:
        store.put(queue, [f"{number + index}" for index in range(30)])
        workers[0].freeze()
        store.put(queue, [f"{number + index}" for index in range(30, 40)])
        number += 40
        workers.pop(0).kill()
    # The last one lay frozen before it was killed: nobody has told the server anything.
    everything = {f"{index}" for index in range(number)}
    done = {body for worker in started for body in worker.noted("done")}
    assert everything == done | set(store.unacked()) | set(store.waiting(queue))
    collect(env, store, queue, everything - done, **transport)


def test_s05_a_frozen_waiter_does_not_keep_messages_from_others(
    env: Environment, store: Store, work_apart: Callable[..., WorkerProcess]
) -> None:
    queue = store.queue()
    frozen = work_apart(store.url, queue).wait("ready")
    until(env, lambda: len(store.watchers(queue)) == 1)
    frozen.freeze()
    store.put(queue, ["while it was alone"])
    assert collect(env, store, queue, {"while it was alone"}) == ["while it was alone"]
    with Connection(store.url) as connection:
        got: list[str] = []
        consumer = consume(
            connection, queue, lambda message: (message.ack(), got.append(text_of(message)))
        )
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.05)
        until(env, lambda: len(store.watchers(queue)) == 2)
        store.put(queue, ["while there were two"])
        connection.drain_events(timeout=LONG)
        assert got == ["while there were two"]
        consumer.cancel()
    frozen.kill()
    assert frozen.noted("got") == []


def test_s05_messages_in_an_answer_that_never_arrives_come_back(
    env: Environment, store: Store, store_proxy: FaultProxy
) -> None:
    queue = store.queue()
    everything = [f"{number}" for number in range(20)]
    options = {"visibility_timeout": 1}
    connection = Connection(store_proxy.url(store.url), transport_options=options)
    channel = connection.channel()
    channel.basic_qos(0, 10, False)
    assert channel.basic_get(queue) is None  # the server knows the script from now on
    store_proxy.black_hole("down")
    store.put(queue, everything)
    consumer = Consumer(channel, [Queue(queue, no_declare=True)], on_message=pytest.fail)
    consumer.consume()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.05)
    until(env, lambda: len(store.unacked()) == 10)
    store_proxy.reset()
    with contextlib.suppress(*connection.connection_errors):
        connection.drain_events(timeout=LONG)
        pytest.fail("the loss went unnoticed")
    assert len(store.waiting(queue)) == 10
    assert sorted(collect(env, store, queue, set(everything), **options)) == sorted(everything)
    connection.close()


def test_messages_in_the_buffer_of_a_killed_consumer_come_back(
    env: Environment, store: Store, work_apart: Callable[..., WorkerProcess]
) -> None:
    queue = store.queue()
    everything = [f"{number}" for number in range(50)]
    store.put(queue, everything)
    worker = work_apart(
        store.url, queue, transport={"visibility_timeout": 1}, prefetch=20, drains=5, seconds=None
    )
    worker.wait("got", 5)
    until(env, lambda: store.registered() == (20, 20))
    worker.kill()
    assert store.waiting(queue) == everything[20:]
    got = collect(env, store, queue, set(everything), visibility_timeout=1)
    assert sorted(got) == sorted(everything), "something came twice"
