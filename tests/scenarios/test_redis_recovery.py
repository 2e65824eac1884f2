"""Redis servers that freeze, restart and forget, and connections that break."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.scenarios.broker import took
from tests.scenarios.store import Store, text_of
from tests.scenarios.worker import Worker
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until

#: What a test allows beyond a bound, for a busy machine.
MARGIN = 5.0

#: Two waits of a ConsumerMixin before it connects again: a second, and a quarter of that at most.
TWICE_THE_BACK_OFF = 2.5


@pytest.fixture
def work(env: Environment) -> Iterator[Callable[..., Worker]]:
    """Start workers, which are stopped at the end."""
    made: list[Worker] = []

    def work(url: str, queue: str, **options: Any) -> Worker:
        connection = Connection(url, transport_options=options, connect_timeout=2)
        made.append(Worker(env, connection, queue))
        until(env, lambda: made[-1].ready or made[-1].task.done)
        return made[-1]

    yield work
    for worker in made:
        worker.should_stop = True
    for worker in made:
        worker.stop()


def bodies(worker: Worker) -> list[str]:
    return [body.decode() for body in worker.got]


def test_s07_a_frozen_server_keeps_nobody_beyond_the_own_bound(
    env: Environment, store: Store
) -> None:
    options = {"socket_timeout": 1}
    queue = store.queue()
    consuming, publishing, closing, taking = (
        Connection(store.url, transport_options=options, connect_timeout=1) for _ in range(4)
    )
    for connection in (consuming, publishing, closing, taking):
        Producer(connection).publish("warm", routing_key="elsewhere")
    for connection in (consuming, closing):
        consumer = Consumer(
            connection.channel(), [Queue(queue, no_declare=True)], on_message=pytest.fail
        )
        consumer.consume()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
    new = Connection(store.url, transport_options=options, connect_timeout=1)

    def attempt(operation: Callable[[], object]) -> tuple[float, BaseException | None]:
        raised: BaseException | None = None
        with took() as time_of:
            try:
                operation()
            except Exception as error:
                raised = error
        return time_of.seconds, raised

    operations: dict[str, Callable[[], object]] = {
        "drain": lambda: consuming.drain_events(timeout=1),
        "publish": lambda: Producer(publishing).publish("x", routing_key=queue),
        "get": lambda: taking.default_channel.basic_get(queue),
        "close": closing.close,
        "connect": new.connect,
    }
    store.server.freeze()
    try:
        tasks = {name: env.spawn(attempt, operation) for name, operation in operations.items()}
        outcomes = {name: task.result(LONG) for name, task in tasks.items()}
    finally:
        store.server.thaw()
    for name, (seconds, raised) in outcomes.items():
        assert seconds < 1 + MARGIN, name
        if name != "close":
            assert isinstance(raised, (TimeoutError, *new.connection_errors)), (name, raised)
            assert name == "drain" or str(store.server.port) in str(raised), raised
    # It goes on where it stopped: what was published in between may have arrived.
    for connection in (consuming, publishing, taking):
        connection.ensure_connection()
        Producer(connection).publish("after", routing_key="elsewhere")
        connection.close()
    assert store.waiting("elsewhere") == ["warm"] * 4 + ["after"] * 3


@pytest.mark.parametrize(
    "fault", ["rst", pytest.param("fin", marks=pytest.mark.slow), "black hole"]
)
def test_s16_a_worker_survives_the_loss_of_its_connection(
    env: Environment,
    store: Store,
    store_proxy: FaultProxy,
    work: Callable[..., Worker],
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    queue = store.queue()
    hasty: dict[str, Any] = {}
    if fault == "black hole":
        hasty = {"socket_timeout": 0.5, "health_check_interval": 0.5}
    worker = work(store_proxy.url(store.url), queue, **hasty)
    publisher = Connection(store_proxy.url(store.url), transport_options=hasty)
    producer = Producer(publisher, routing_key=queue)
    producer.publish("before", retry=True)
    until(env, lambda: bodies(worker) == ["before"])
    links = [link.number for link in store_proxy.open_links()]
    assert len(links) == 2
    if fault == "rst":
        store_proxy.reset(links)
    elif fault == "fin":
        store_proxy.finish(links)
    else:
        store_proxy.black_hole(links=links)
    # A black hole is noticed half a second after the look that follows half a second of silence.
    noticing = 1.5 if fault == "black hole" else 0
    until(env, lambda: worker.ready == 2, noticing + TWICE_THE_BACK_OFF + MARGIN)
    producer.publish("after", retry=True, retry_policy={"interval_start": 0.1, "max_retries": 3})
    until(env, lambda: bodies(worker) == ["before", "after"])
    store_proxy.reset(links)
    # The server may not have noticed yet that the old one is gone; messages go to the new one.
    for number in range(5):
        producer.publish(f"{number}")
    until(env, lambda: bodies(worker)[2:] == [f"{number}" for number in range(5)])
    assert worker.ready == 2
    assert len(store_proxy.open_links()) == 2
    until(env, lambda: store.registered() == (0, 0))
    assert len(caplog.records) < 8, [record.getMessage() for record in caplog.records]
    publisher.close()


@pytest.mark.parametrize("pause", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_s16_a_worker_survives_a_restart_of_its_server(
    env: Environment,
    durable_store: Store,
    work: Callable[..., Worker],
    pause: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = durable_store
    caplog.set_level(logging.WARNING)
    queue, other = store.queue(), store.queue()
    worker = work(store.url, queue)
    holder = Connection(store.url, transport_options={"visibility_timeout": 3600})
    held: list[Any] = []
    consumer = Consumer(holder.channel(), [Queue(other, no_declare=True)], on_message=held.append)
    consumer.consume()
    store.put(other, ["held"])
    holder.drain_events(timeout=LONG)
    store.put(queue, ["before"])
    until(env, lambda: bodies(worker) == ["before"] and store.unacked() == ["held"])
    store.server.kill()
    with took() as outage:
        env.sleep(pause)
        store.server.start()
    # A retry waits for two seconds, the next ones for two longer each, a quarter more at most.
    back_off = 2.5 * (1 + outage.seconds / 2)
    until(env, lambda: worker.ready == 2, 2 * back_off + MARGIN)
    store.put(queue, ["after"])
    until(env, lambda: bodies(worker) == ["before", "after"])
    assert len(caplog.records) < 12, [record.getMessage() for record in caplog.records]
    # What an unlucky client held is still registered, and its next connection puts it back.
    until(env, lambda: store.unacked() == ["held"])
    with pytest.raises(exceptions.StaleDeliveryError):
        held[0].ack()
    holder.ensure_connection()
    assert store.waiting(other) == ["held"]
    until(env, lambda: store.registered() == (0, 0))
    holder.close()


def test_a_server_that_has_forgotten_everything_learns_the_bindings_again(
    env: Environment, store: Store
) -> None:
    topic = Exchange("events", "topic")
    queue = Queue(store.queue(), topic, routing_key="a.#")
    options = {"interval_start": 0.05, "interval_step": 0.05, "interval_max": 0.5}
    got: list[str] = []

    def take(message: Any) -> None:
        got.append(text_of(message))
        message.ack()

    with Connection(store.url) as consuming, Connection(store.url) as publishing:
        producer = Producer(publishing, exchange=topic)
        queue(publishing.default_channel).declare()
        producer.publish("before", routing_key="a.b")

        def consume_and_drain(channel: Any) -> None:
            consumer = Consumer(channel, [Queue(queue.name, no_declare=True)], on_message=take)
            consumer.consume()
            while len(got) < 2:
                consuming.drain_events(timeout=LONG)

        worker = env.spawn(consuming.autoretry(consume_and_drain, max_retries=None, **options))
        until(env, lambda: got == ["before"])
        store.server.kill()
        store.server.start()

        producer.publish(
            "after", routing_key="a.b.c", retry=True, retry_policy={**options, "max_retries": 50}
        )
        worker.result(LONG)
    assert got == ["before", "after"]
    members = store.server.command("SMEMBERS", "_kombu.binding.events")
    assert [member.decode().rpartition("\x16")[2] for member in members] == [queue.name]


def test_the_database_is_emptied_under_waiting_consumers(
    env: Environment, store: Store, work: Callable[..., Worker]
) -> None:
    queue = store.queue()
    workers = [work(store.url, queue) for _ in range(3)]
    until(env, lambda: len(store.watchers(queue)) == 2)
    until(env, lambda: store.parked(queue) == 1)
    store.server.flush()
    for number in range(10):
        store.put(queue, [f"{number}"])
    started = time.monotonic()
    until(env, lambda: sum(len(worker.got) for worker in workers) == 10)
    assert time.monotonic() - started < MARGIN
    assert [worker.ready for worker in workers] == [1, 1, 1]
    assert sorted(body for worker in workers for body in bodies(worker)) == [
        f"{number}" for number in range(10)
    ]
