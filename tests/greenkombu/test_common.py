"""greenkombu.common: behaviours 137-143."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu import common, exceptions
from greenkombu.common import (
    Broadcast,
    QoS,
    collect_replies,
    drain_consumer,
    entry_to_queue,
    eventloop,
    ignore_errors,
    insured,
    ipublish,
    isend_reply,
    itermessages,
    maybe_declare,
    oid_from,
    send_reply,
)
from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.support.recording import RecordingChannel


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def queue(request: pytest.FixtureRequest, connection: Connection) -> Iterator[Queue]:
    name = request.node.name
    made = Queue(name, Exchange(name), name)
    made.declare(channel=connection.default_channel)
    yield made
    with Connection("memory://") as cleaner:
        cleaner.default_channel.queue_delete(name)


def put(connection: Connection, queue: Queue, *bodies: Any, **options: Any) -> None:
    producer = Producer(connection)
    for body in bodies:
        producer.publish(body, exchange=queue.exchange, routing_key=queue.routing_key, **options)


# -- maybe_declare


class Counted(Queue):
    """Counts its declarations."""

    declared = 0

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        type(self).declared += 1
        return super().declare(nowait, channel)


@pytest.fixture
def counted(request: pytest.FixtureRequest) -> type[Counted]:
    return type("Counted", (Counted,), {"declared": 0})


def test_b137_once_for_each_connection(connection: Connection, counted: type[Counted]) -> None:
    queue = counted("b137")
    assert maybe_declare(queue, connection.default_channel) is True
    assert maybe_declare(queue, connection.default_channel) is False
    assert maybe_declare(queue, connection.channel()) is False
    assert maybe_declare(copy.copy(queue), connection) is False
    assert maybe_declare(queue(connection.default_channel)) is False
    assert counted.declared == 1
    connection.close()
    connection.connect()
    assert maybe_declare(queue, connection.default_channel) is True
    with Connection("memory://") as other:
        assert maybe_declare(queue, other.default_channel) is True
    assert counted.declared == 3
    connection.default_channel.queue_delete("b137")


def test_b137_other_settings_are_declared(connection: Connection) -> None:
    channel = connection.default_channel
    assert maybe_declare(Exchange("b137", "topic"), channel)
    with pytest.raises(connection.channel_errors):
        maybe_declare(Exchange("b137", "fanout"), connection.channel())
    connection.channel().exchange_delete("b137")


def test_b137_fleeting_entities_are_declared_every_time(
    connection: Connection, counted: type[Counted]
) -> None:
    queue = counted("b137f", auto_delete=True)
    for _ in range(3):
        assert maybe_declare(queue, connection.default_channel)
    assert counted.declared == 3
    connection.default_channel.queue_delete("b137f")


def test_b137_needs_a_channel() -> None:
    with pytest.raises(exceptions.NotBoundError, match="Exchange e"):
        maybe_declare(Exchange("e"))


def test_b137_retry_declares_on_the_new_connection(connection: Connection) -> None:
    failures = [ConnectionResetError("gone")]

    class Failing(Queue):
        def declare(self, nowait: bool = False, channel: Any = None) -> str:
            if failures:
                raise failures.pop()
            return super().declare(nowait, channel)

    queue = Failing("b137r")
    assert maybe_declare(queue, connection.default_channel, retry=True, interval_start=0.01)
    assert connection.default_channel.queue_delete("b137r") is not None or True
    assert not failures


def test_the_cache_keeps_no_channel(connection: Connection) -> None:
    queue = Queue("cached", Exchange("cached"), "cached")
    maybe_declare(queue(connection.default_channel))
    for entity in connection.declared_entities:
        assert not entity.is_bound
        assert entity.exchange is None or not entity.exchange.is_bound
    connection.default_channel.queue_delete("cached")


# -- Broadcast


def test_b138_every_instance_receives(connection: Connection) -> None:
    got: list[str] = []
    first, second = Broadcast("b138"), Broadcast("b138")
    assert first.name != second.name
    consumers = [
        Consumer(connection, each, no_ack=True, callbacks=[lambda b, m, n=each.name: got.append(n)])
        for each in (first, second)
    ]
    for consumer in consumers:
        consumer.consume()
    Producer(connection).publish("x", exchange=first.exchange)
    for _ in range(2):
        connection.drain_events(timeout=10)
    assert sorted(got) == sorted([first.name, second.name])
    for consumer in consumers:
        consumer.cancel()


def test_b138_names_and_flags() -> None:
    broadcast = Broadcast("news")
    assert broadcast.exchange is not None
    assert (broadcast.exchange.name, broadcast.exchange.type) == ("news", "fanout")
    assert broadcast.auto_delete
    assert broadcast.alias == "news"
    assert Broadcast("news", queue="mine").name == "mine"
    unique = Broadcast("news", queue="mine", unique=True).name
    assert unique.startswith("mine.")
    assert len(unique) > 20
    assert Broadcast("news", exchange=Exchange("other", "topic")).exchange == Exchange(
        "other", "topic"
    )
    assert not Broadcast("news", auto_delete=False).auto_delete
    assert Broadcast("news", durable=False, alias="a").durable is False


def test_b138_binding_copying_and_pickling_keep_the_name() -> None:
    broadcast = Broadcast("news")
    assert broadcast(RecordingChannel()).name == broadcast.name
    assert copy.copy(broadcast).name == broadcast.name
    again = pickle.loads(pickle.dumps(broadcast))
    assert type(again) is Broadcast
    assert again == broadcast
    assert again.queue == broadcast.name


# -- receiving


def test_b139_itermessages_ends_at_the_limit(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1, 2, 3)
    channel = connection.default_channel
    got = []
    for body, message in itermessages(connection, channel, queue, limit=2, timeout=10):
        got.append(body)
        message.ack()
    assert got == [1, 2]
    assert queue(channel).get(no_ack=True).payload == 3


def test_b139_itermessages_ends_at_the_timeout(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1)
    seen: list[Any] = []
    started = time.monotonic()
    channel = connection.default_channel
    for limit in (None, 50):
        got = [
            body
            for body, _ in itermessages(
                connection,
                channel,
                queue,
                limit=limit,
                timeout=0.1,
                callbacks=[lambda b, m: seen.append(b)],
                no_ack=True,
            )
        ]
        assert got == ([1] if limit is None else [])
    assert seen == [1]
    assert time.monotonic() - started < 5.0


def test_b139_a_consumer_class_may_be_given(connection: Connection, queue: Queue) -> None:
    class Mine(Consumer):
        no_ack = True

    put(connection, queue, 1)
    channel = connection.default_channel
    messages = list(itermessages(connection, channel, queue, timeout=10, Consumer=Mine))
    assert [body for body, _ in messages] == [1]


def test_drain_consumer_cancels_when_it_is_left(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1, 2)
    consumer = Consumer(connection, queue, no_ack=True, prefetch_count=1)
    iteration = drain_consumer(consumer, limit=None, timeout=10)
    assert next(iteration)[0] == 1
    assert consumer.consuming_from(queue)
    iteration.close()  # type: ignore[attr-defined]
    assert not consumer.consuming_from(queue)


def test_b142_eventloop_yields_per_event(connection: Connection, queue: Queue) -> None:
    got: list[Any] = []
    with Consumer(connection, queue, no_ack=True, callbacks=[lambda b, m: got.append(b)]):
        put(connection, queue, 1, 2, 3)
        assert len(list(eventloop(connection, limit=2, timeout=10))) == 2
        assert got == [1, 2]
        assert len(list(eventloop(connection, limit=3, timeout=0.05, ignore_timeouts=True))) == 1
        with pytest.raises(TimeoutError):
            next(eventloop(connection, timeout=0.05))


# -- replies


def test_b140_request_and_reply(connection: Connection, queue: Queue) -> None:
    channel = connection.default_channel
    answers = Queue(f"{queue.name}.answers", queue.exchange, "answers")
    answers.declare(channel=channel)
    put(connection, queue, {"q": 1}, reply_to="answers", correlation_id="id-1")
    request = queue(channel).get(no_ack=True)
    send_reply(queue.exchange or "", request, {"a": 1}, producer=Producer(connection))
    send_reply(queue.exchange or "", request, {"a": 2}, content_type=None)
    message = answers(channel).get()
    assert message.properties["correlation_id"] == "id-1"
    assert message.content_type == request.content_type
    message.requeue()
    got = list(collect_replies(connection, channel, answers, limit=2, timeout=10))
    assert sorted(each["a"] for each in got) == [1, 2]
    put(connection, answers, 3)
    got = list(collect_replies(connection, channel, answers, limit=1, timeout=10, no_ack=False))
    assert got == [3]
    assert answers(channel).get() is None
    channel.queue_delete(answers.name)


def test_b140_a_request_without_reply_to(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1)
    request = queue(connection.default_channel).get(no_ack=True)
    with pytest.raises(KeyError, match="reply_to"):
        send_reply("", request, 1)


# -- pools


def test_b141_insured_runs_again_after_a_connection_error(connection: Connection) -> None:
    pool = connection.Pool(2)
    failures = [ConnectionResetError("gone")]
    seen: list[Any] = []
    revived: list[Any] = []

    def work(number: int, connection: Any = None, channel: Any = None) -> tuple[int, Any]:
        if failures:
            raise failures.pop()
        return number, channel

    number, channel = insured(
        pool,
        work,
        (3,),
        {},
        errback=lambda exc, interval: seen.append(exc),
        on_revive=revived.append,
        interval_start=0.01,
        timeout=30,
    )
    assert number == 3
    assert [type(exc) for exc in seen] == [ConnectionResetError]
    assert revived == [channel]
    pool.force_close_all()


def test_b141_insured_waits_for_the_pool_within_its_timeout(connection: Connection) -> None:
    pool = connection.Pool(1)
    held = pool.acquire()
    started = time.monotonic()
    with pytest.raises(exceptions.LimitExceeded):
        insured(pool, lambda **kwargs: None, (), {}, timeout=0.2)
    assert time.monotonic() - started < 5.0
    held.release()
    pool.force_close_all()


def test_b141_ipublish_and_isend_reply(connection: Connection, queue: Queue) -> None:
    from greenkombu.pools import ProducerPool

    connections = connection.Pool(2)
    pool = ProducerPool(connections, limit=2)
    failures = [ConnectionResetError("gone")]

    def publish(body: Any, producer: Any = None) -> None:
        if failures:
            raise failures.pop()
        producer.publish(body, exchange=queue.exchange, routing_key=queue.routing_key)

    ipublish(pool, publish, ("x",), interval_start=0.01, timeout=30)
    channel = connection.default_channel
    assert queue(channel).get(no_ack=True).payload == "x"
    put(connection, queue, {"q": 1}, reply_to=queue.routing_key)
    request = queue(channel).get(no_ack=True)
    isend_reply(pool, queue.exchange or "", request, {"a": 1}, {}, max_retries=3)
    assert queue(channel).get(no_ack=True).payload == {"a": 1}
    pool.force_close_all()
    connections.force_close_all()


def test_b143_entry_to_queue() -> None:
    from greenkombu import compat

    assert compat.entry_to_queue is entry_to_queue
    queue = entry_to_queue("q", exchange="e", exchange_type="topic", binding_key="a.#")
    assert queue == Queue("q", Exchange("e", "topic"), "a.#")


# -- the rest


def test_ignore_errors_both_ways(connection: Connection) -> None:
    error = connection.connection_errors[0]("gone")

    def fail(exc: BaseException) -> None:
        raise exc

    assert ignore_errors(connection, fail, error) is None
    assert ignore_errors(connection, lambda: 3) == 3
    with ignore_errors(connection):
        raise error
    with pytest.raises(KeyError):
        ignore_errors(connection, fail, KeyError("mine"))


def test_qos_counts_and_tells_once() -> None:
    told: list[int] = []
    qos = QoS(lambda prefetch_count: told.append(prefetch_count), 10)
    assert qos.prev is None
    assert qos.increment_eventually() == 11
    assert qos.increment_eventually(5) == 16
    assert told == []
    assert qos.update() == 16
    assert qos.update() == 16
    assert (told, qos.prev) == ([16], 16)
    assert qos.decrement_eventually(3) == 13
    assert qos.decrement_eventually(100) == 1
    qos.set(70000)
    assert (told[-1], qos.prev) == (0, 70000)


def test_qos_without_a_limit_stays_so() -> None:
    qos = QoS(lambda prefetch_count: None, 0)
    assert qos.increment_eventually() == 0
    assert qos.decrement_eventually() == 0
    bounded = QoS(lambda prefetch_count: None, 1, max_prefetch=3)
    assert bounded.increment_eventually(9) == 3


def test_qos_is_safe_from_several_tasks(env: Environment) -> None:
    qos = QoS(lambda prefetch_count: None, 1)

    def work() -> None:
        for _ in range(200):
            qos.increment_eventually()

    tasks = [env.spawn(work) for _ in range(4)]
    assert all(task.join(30) for task in tasks)
    assert qos.value == 801


def test_oids_belong_to_instance_and_task(env: Environment) -> None:
    thing, other = object(), object()
    assert oid_from(thing) == oid_from(thing)
    assert oid_from(thing) != oid_from(other)
    theirs: list[str] = []
    task = env.spawn(lambda: theirs.extend([oid_from(thing), oid_from(thing, threads=False)]))
    assert task.join(10)
    assert theirs[0] != oid_from(thing)
    assert theirs[1] == oid_from(thing, threads=False)
    assert common.get_node_id() == common.get_node_id()
