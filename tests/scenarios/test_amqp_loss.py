"""AMQP connections that break, fall silent, or end under somebody's hands."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from greenkombu.pools import ProducerPool
from hub.environment import Environment
from tests.scenarios.broker import QUICK, Broker, pool_of, took
from tests.scenarios.worker import Worker
from tests.support.fault_proxy import FaultProxy
from tests.support.sockets import numbers_used_again
from tests.support.tasks import LONG, until


@pytest.fixture
def work(env: Environment) -> Iterator[Callable[..., Worker]]:
    """Start workers, which are stopped at the end."""
    made: list[Worker] = []

    def work(url: str, queue: str, **options: Any) -> Worker:
        heartbeat = options.pop("heartbeat", 0)
        connection = Connection(
            url, heartbeat=heartbeat, transport_options={**QUICK, **options}, connect_timeout=2
        )
        made.append(Worker(env, connection, queue))
        until(env, lambda: made[-1].ready or made[-1].task.done)
        return made[-1]

    yield work
    for worker in made:
        worker.stop()


def recovers(
    env: Environment, broker: Broker, worker: Worker, seconds: float, before: int = 1
) -> None:
    """Assert that the worker consumes again, once, within so many seconds.

    Args:
        before: how often it had started to consume before the fault.
    """
    until(env, lambda: worker.ready > before or worker.task.done, seconds)
    if worker.task.done:
        worker.task.result()
    broker.put(worker.queue, [b"after"])
    until(env, lambda: b"after" in worker.got)
    until(env, lambda: broker.consumers(worker.queue) == 1)
    assert worker.got.count(b"after") == 1


@pytest.mark.parametrize(
    "heartbeat", [1, pytest.param(2, marks=pytest.mark.faults)], ids="heartbeat={}".format
)
def test_s06_a_black_hole_is_noticed_within_three_heartbeats(
    env: Environment,
    broker: Broker,
    proxy: FaultProxy,
    work: Callable[..., Worker],
    heartbeat: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    queue = broker.queue()
    worker = work(proxy.url(broker.url), queue, heartbeat=heartbeat)
    broker.put(queue, [b"before"])
    until(env, lambda: worker.got == [b"before"])
    proxy.black_hole(links=[1])
    with took() as noticing:
        until(env, lambda: worker.ready == 2, 3 * heartbeat + 10)
    # And what a busy machine takes.
    assert noticing.seconds < 3 * heartbeat + 4
    broker.put(queue, [b"after"])
    until(env, lambda: b"after" in worker.got)
    assert len(proxy.links()) == 2
    # The old connection was torn down without a word: nothing waits in the black hole.
    assert proxy.links()[0].up.methods.get("Connection.close", 0) == 0
    assert len(caplog.records) < 10


def test_s08_heartbeats_keep_a_pooled_connection_that_nobody_uses(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    queue = broker.queue()
    connection = Connection(proxy.url(broker.url), heartbeat=1, transport_options=QUICK)
    with pool_of(connection, 1) as connections:
        pool = ProducerPool(connections, 1)
        with pool.acquire(block=True) as producer:
            producer.publish("1", routing_key=queue)
        env.sleep(6)
        for body in ("2", "3"):
            with pool.acquire(block=True) as producer:
                producer.publish(body, routing_key=queue)
        assert broker.bodies(queue, 3) == ["1", "2", "3"]
        assert [link.closed for link in proxy.links()] == [""], "the connection was replaced"
        assert proxy.count("heartbeat", "up") >= 4
        pool.force_close_all()


@pytest.mark.faults
def test_s08_control_without_heartbeats_the_broker_does_close_it(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    # What is tested above needs a broker that minds: it closes a peer that sends nothing.
    with Connection(proxy.url(broker.url), heartbeat=1, transport_options=QUICK) as connection:
        connection.connect()
        proxy.drop("heartbeat", "up")
        until(env, lambda: not connection.connected, 10)


def test_s10_a_confirm_that_does_not_come_is_an_error_of_that_publish_only(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    queue = broker.queue()
    options = {**QUICK, "confirm_publish": True, "confirm_timeout": 0.6}
    patiently = {"routing_key": queue, "confirm_timeout": LONG}
    connection = Connection(proxy.url(broker.url), transport_options=options)
    with pool_of(connection, 2) as connections:
        pool = ProducerPool(connections, 2)
        with pool.acquire() as lost, pool.acquire() as other:
            for producer in (lost, other):
                producer.publish("warm", **patiently)
            suspect = lost.connection.connection
            proxy.drop("Basic.ack", "down", count=1)
            with took() as waiting, pytest.raises(exceptions.ConfirmTimeoutError) as caught:
                lost.publish("unconfirmed", routing_key=queue, message_id="the-lost-one")
            assert 0.5 < waiting.seconds < 8
            assert queue in str(caught.value)
            assert "the-lost-one" in str(caught.value)
            other.publish("confirmed", **patiently)
        # What may hide a message is not handed out again.
        with pool.acquire() as first, pool.acquire() as second:
            for producer in (first, second):
                producer.publish("later", **patiently)
                assert producer.connection.connection is not suspect
        assert not suspect.connected
        pool.force_close_all()
    bodies = broker.bodies(queue, 6)
    assert sorted(bodies) == ["confirmed", "later", "later", "unconfirmed", "warm", "warm"]


@pytest.mark.parametrize("fault", ["rst", "fin", "black hole"])
def test_s16_a_worker_survives_the_loss_of_its_connection(
    env: Environment,
    broker: Broker,
    proxy: FaultProxy,
    work: Callable[..., Worker],
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    worker = work(proxy.url(broker.url), broker.queue(), heartbeat=1)
    for number in range(1, 2 if fault == "black hole" else 3):
        open_links = [link.number for link in proxy.open_links()]
        if fault == "rst":
            proxy.reset(open_links)
        elif fault == "fin":
            proxy.finish(open_links)
        else:
            proxy.black_hole(links=open_links)
        # Twice the back-off of a first retry, and the time in which heartbeats tell.
        recovers(env, broker, worker, 8.0, number)
        worker.got.clear()
        assert worker.ready == number + 1
        if fault == "black hole":
            proxy.reset(open_links)
    assert len(caplog.records) < 12, [record.getMessage() for record in caplog.records]


@pytest.mark.faults
@pytest.mark.parametrize("pause", [1, 10])
def test_s16_a_worker_survives_a_restart_of_its_broker(
    env: Environment,
    own_broker: Broker,
    work: Callable[..., Worker],
    pause: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    queue = own_broker.queue(durable=True)
    worker = work(own_broker.url, queue, heartbeat=2)
    own_broker.server.restart(pause=pause)
    recovers(env, own_broker, worker, 25.0)
    assert len(caplog.records) < 25, [record.getMessage() for record in caplog.records]


@pytest.mark.faults
@pytest.mark.parametrize("how", ["kill", "stop_app", "close_all_connections"])
def test_s16_a_worker_survives_the_death_of_its_broker(
    env: Environment, own_broker: Broker, work: Callable[..., Worker], how: str
) -> None:
    queue = own_broker.queue(durable=True)
    worker = work(own_broker.url, queue, heartbeat=2)
    server = own_broker.server
    if how == "kill":
        server.kill()
        server.start()
    elif how == "stop_app":
        server.stop_app()
        server.start_app()
    else:
        server.close_all_connections()
    recovers(env, own_broker, worker, 25.0)


STEPS = [
    "refused",
    "no answer to the connect",
    "reset at the connect",
    "login",
    "opening the virtual host",
    "opening a channel",
    "declaring",
    "publishing",
    "reset at the declaration",
    "end at the publish",
]


def break_at(proxy: FaultProxy, step: str) -> None:
    """Make the proxy fail for ever at a step of a publish."""
    if step == "refused":
        proxy.refuse()
    elif step == "no answer to the connect":
        proxy.accept("silent")
    elif step == "reset at the connect":
        proxy.accept("rst")
    elif step == "reset at the declaration":
        proxy.end_at("Queue.declare", "up", "rst")
    elif step == "end at the publish":
        proxy.end_at("Basic.publish", "up", "fin")
    else:
        method = {
            "login": "Connection.tune",
            "opening the virtual host": "Connection.open_ok",
            "opening a channel": "Channel.open_ok",
            "declaring": "Queue.declare_ok",
            "publishing": "Basic.ack",
        }[step]
        proxy.stop_at(method, "down", count=None)


def test_s22_a_publish_ends_by_its_deadline_at_every_step(
    env: Environment, broker: Broker, make_proxy: Callable[[], FaultProxy]
) -> None:
    queue = broker.queue(declare=False)
    proxies = [make_proxy() for _ in STEPS]

    def publish(step: str, proxy: FaultProxy, retry: bool) -> tuple[str, float, BaseException]:
        connection = Connection(proxy.url(broker.url), transport_options={"confirm_publish": True})
        with took() as time_of:
            try:
                Producer(connection).publish(
                    "x",
                    routing_key=queue,
                    retry=retry,
                    retry_policy={"max_retries": 3, "interval_start": 0.1},
                    declare=[Queue(queue, durable=False)],
                    timeout=2.0,
                )
            except Exception as error:
                raised = error
        with took() as ending:
            connection.close()
        assert ending.seconds < 8, f"close after {step}"
        assert isinstance(raised, (TimeoutError, *connection.connection_errors)), repr(raised)
        return step, time_of.seconds, raised

    for step, proxy in zip(STEPS, proxies, strict=True):
        break_at(proxy, step)
    tasks = [
        env.spawn(publish, step, proxy, retry)
        for step, proxy in zip(STEPS, proxies, strict=True)
        for retry in (True, False)
    ]
    for task in tasks:
        step, seconds, raised = task.result(LONG)
        # And what a busy machine takes; the bounds of the steps are longer.
        assert seconds < 2 + 6, f"{step}: {seconds:.2f} s, {raised!r}"
        port = str(proxies[STEPS.index(step)].port)
        assert port in str(raised) or queue in str(raised), f"{step}: {raised!r} names nothing"
        assert "guest:guest" not in repr(raised)


@pytest.mark.parametrize("retries", [0, 3])
def test_s22_every_request_ends_by_its_deadline_when_the_broker_is_frozen(
    env: Environment, broker: Broker, proxy: FaultProxy, retries: int
) -> None:
    queue = broker.queue()
    with Connection(proxy.url(broker.url), transport_options={"close_timeout": 0.5}) as connection:
        channel = connection.channel()
        proxy.black_hole()
        requests: list[Callable[[], object]] = [
            lambda: channel.queue_declare(queue, passive=True),
            lambda: channel.queue_bind(queue, "amq.direct", "x"),
            lambda: channel.basic_get(queue),
            lambda: channel.basic_consume(queue, callback=print),
            lambda: channel.basic_qos(0, 1, False),
            lambda: channel.tx_select(),
            lambda: connection.channel(),
            lambda: Connection(proxy.url(broker.url)).ensure_connection(
                max_retries=retries, interval_start=0.1
            ),
        ]

        def attempt(request: Callable[[], object]) -> float:
            failures = (TimeoutError, exceptions.OperationalError)
            with took() as time_of, pytest.raises(failures), Deadline(0.6):
                request()
            return time_of.seconds

        tasks = [env.spawn(attempt, request) for request in requests]
        for task in tasks:
            assert task.result(LONG) < 8
    proxy.restore()


def test_tasks_that_share_a_lost_connection_open_one_new_one(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    queue = broker.queue()
    options = {**QUICK, "confirm_publish": True}
    with Connection(proxy.url(broker.url), transport_options=options) as connection:
        producer = Producer(connection, routing_key=queue)
        producer.publish("first")
        proxy.drop("Basic.ack", "down", links=[1])
        tasks: list[Any] = []

        def wait_for_the_others(error: BaseException, interval: float) -> None:
            """Notice the loss when the others have a new connection."""
            for task in tasks[1:]:
                assert task.join(LONG)

        for number in range(30):
            policy: dict[str, Any] = {"max_retries": 1, "interval_start": 0.05}
            if number == 0:
                policy["errback"] = wait_for_the_others
            tasks.append(env.spawn(producer.publish, f"{number}", retry=True, retry_policy=policy))
        proxy.wait_until(lambda: proxy.count("Basic.publish", "up") == 31)
        proxy.reset()
        for task in tasks:
            task.result(LONG)
        assert len(proxy.links()) == 2
    missing = {f"{number}" for number in range(30)}
    while missing:
        arrived = broker.bodies(queue, 1)
        assert arrived, f"lost: {missing}"
        missing.difference_update(arrived)


def test_refused_publishes_are_retried_on_the_same_connection(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    queue = broker.queue(arguments={"x-max-length": 1, "x-overflow": "reject-publish"})
    broker.put(queue, [b"full"])
    options = {**QUICK, "confirm_publish": True}
    with Connection(proxy.url(broker.url), transport_options=options) as connection:
        producer = Producer(connection, routing_key=queue)
        first = producer.channel
        policy = {"max_retries": 3, "interval_start": 0.1, "interval_max": 0.1}
        with took() as trying, pytest.raises(exceptions.OperationalError, match="refused") as no:
            producer.publish("x", retry=True, retry_policy=policy)
        assert isinstance(no.value.__cause__, exceptions.DeliveryError)
        assert proxy.count("Basic.nack", "down") == 4
        assert 0.3 <= trying.seconds < 10
        policy["max_retries"] = 50
        task = env.spawn(producer.publish, "x", retry=True, retry_policy=policy)
        proxy.wait_until(lambda: proxy.count("Basic.nack", "down") >= 6)
        assert broker.bodies(queue, 1) == [b"full"]
        task.result(LONG)
        assert broker.bodies(queue, 1) == ["x"]
        assert len(proxy.links()) == 1
        assert producer.channel is not first


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_s24_an_idle_connection_that_the_server_closed_is_opened_again(
    env: Environment, broker: Broker, proxy: FaultProxy, how: str
) -> None:
    queue = broker.queue()
    with pool_of(Connection(proxy.url(broker.url), transport_options=QUICK), 5) as pool:
        held = [pool.acquire() for _ in range(5)]
        for connection in held:
            connection.default_channel.queue_declare(queue, passive=True)
        numbers = {connection.connection.sock.fileno() for connection in held}
        for connection in held:
            connection.release()
        if how == "fin":
            proxy.finish()
        else:
            proxy.reset()
        until(env, lambda: pool.stats() is not None and not any(c.connected for c in held))
        # The numbers go to somebody else, whose descriptors must not be touched.
        with numbers_used_again(env, numbers):
            held = [pool.acquire() for _ in range(5)]
            for connection in held:
                assert connection.default_channel.queue_declare(queue, passive=True).queue == queue
            for connection in held:
                connection.release()


@pytest.mark.parametrize(
    ("seconds", "share"), [(2.0, 0.05), pytest.param(10.0, 0.01, marks=pytest.mark.slow)]
)
def test_s24_idle_connections_cost_next_to_nothing(
    env: Environment, broker: Broker, proxy: FaultProxy, seconds: float, share: float
) -> None:
    connections = [Connection(proxy.url(broker.url), transport_options=QUICK) for _ in range(100)]
    try:
        for task in [env.spawn(connection.connect) for connection in connections]:
            task.result(LONG)
        # Twenty of them are closed by the server meanwhile.
        proxy.finish(range(1, 21))
        until(env, lambda: sum(connection.connected for connection in connections) == 80)
        env.sleep(0.3)
        before = time.process_time()
        env.sleep(seconds)
        used = time.process_time() - before
        assert used < share * seconds, f"{used:.3f} s of {seconds:g} s"
        assert sum(connection.connected for connection in connections) == 80
    finally:
        for connection in connections:
            connection.collect()


@pytest.mark.parametrize("settle", ["ack", "reject", "requeue"])
def test_s26_a_delivery_of_a_lost_connection_cannot_be_settled_on_the_next(
    env: Environment, broker: Broker, proxy: FaultProxy, settle: str
) -> None:
    queue = broker.queue()
    broker.put(queue, [f"{number}" for number in range(10)])
    held: list[Any] = []
    with Connection(proxy.url(broker.url), transport_options=QUICK) as connection:
        consumer = Consumer(
            connection.channel(), [Queue(queue, no_declare=True)], on_message=held.append
        )
        consumer.consume()
        while len(held) < 10:
            connection.drain_events(timeout=LONG)
        proxy.reset()
        with contextlib.suppress(connection.connection_errors):
            connection.drain_events(timeout=LONG)
            pytest.fail("the loss went unnoticed")
        connection.ensure_connection()
        again: list[Any] = []
        consumer = Consumer(
            connection.channel(), [Queue(queue, no_declare=True)], on_message=again.append
        )
        consumer.consume()
        while len(again) < 10:
            connection.drain_events(timeout=LONG)
        for message in held:
            with pytest.raises(exceptions.StaleDeliveryError):
                getattr(message, settle)()
        assert [message.body for message in again] == [message.body for message in held]
        assert all(message.delivery_info["redelivered"] for message in again)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.2)
        assert proxy.count("Basic.ack", "up") == proxy.count("Basic.reject", "up") == 0
        for message in again:
            message.ack()
        consumer.cancel()
        assert connection.connected
    assert broker.has(queue, 0)
