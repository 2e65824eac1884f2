"""The memory transport: who gets a message, how many at a time, and at what cost."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Consumer, Producer
from greenkombu.transport import memory
from hub.environment import Environment
from tests.greenkombu.memory.support import bodies, declare, put, wait_for
from tests.support.tasks import no_collections
from tests.support.ticker import Ticker

# -- delivery


def test_b094_cancel_stops_new_deliveries(connection: Connection, channel: Any) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_consume("q", callback=got.append, consumer_tag="t")
    put(channel)
    put(channel)
    connection.drain_events(timeout=10)
    channel.basic_cancel("t")
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.05)
    got[0].ack()
    assert bodies(channel) == [b"body"]


def test_a_consumer_may_be_cancelled_by_its_own_callback(
    connection: Connection, channel: Any
) -> None:
    declare(channel)
    channel.basic_consume("q", True, lambda message: channel.basic_cancel("t"), "t")
    put(channel)
    put(channel)
    connection.drain_events(timeout=10)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.02)
    assert len(channel.queues["q"]) == 1


def test_an_error_of_a_callback_is_raised_where_it_drains(
    connection: Connection, channel: Any
) -> None:
    declare(channel)
    got: list[Any] = []

    def fail(message: Any) -> None:
        got.append(message)
        raise ValueError("the callback's own")

    channel.basic_consume("q", callback=fail)
    put(channel, b"1")
    put(channel, b"2")
    for _ in range(2):
        with pytest.raises(ValueError, match="the callback's own"):
            connection.drain_events(timeout=10)
    channel.close()  # neither was acknowledged
    assert len(memory.broker.queues["q"]) == 2


def test_consumers_of_a_queue_take_turns(connection: Connection, channel: Any) -> None:
    declare(channel)
    order: list[str] = []
    for tag in "abc":
        channel.basic_consume("q", True, lambda _, tag=tag: order.append(tag), tag)
    for _ in range(9):
        put(channel)
    for _ in range(9):
        connection.drain_events(timeout=10)
    assert sorted(order[:3]) == sorted(order[3:6]) == ["a", "b", "c"]


def test_s15_a_message_wakes_one_of_many_waiting_tasks(env: Environment) -> None:
    """Each message wakes one consumer, and each is delivered once."""
    got: list[int] = []
    looks: list[int] = []

    def drain(each: Connection) -> None:
        while len(got) < 100:
            try:
                each.drain_events(timeout=0.5)
            except TimeoutError:
                pass

    with contextlib.ExitStack() as stack:  # which also ends the tasks, should this fail
        connections = [stack.enter_context(Connection("memory://")) for _ in range(20)]
        channels = [each.channel() for each in connections]
        declare(channels[0])
        for number, channel in enumerate(channels):
            take = channel._take

            def counted(queue: str, take: Any = take) -> Any:
                looks.append(1)
                return take(queue)

            channel._take = counted
            channel.basic_consume("q", True, lambda _, number=number: got.append(number))

        tasks = [env.spawn(drain, each) for each in connections]
        wait_for(lambda: all(each.connection.inbox.watched for each in connections), env)
        del looks[:]
        for number in range(100):
            put(channels[0])
            wait_for(lambda number=number: len(got) > number, env)
        for task in tasks:
            task.join(10)
        assert len(got) == 100
        assert len(looks) < 100 * 5, "a message made everybody look"


def test_a_message_does_not_wait_for_a_connection_that_nobody_drains(env: Environment) -> None:
    with Connection("memory://") as asleep, Connection("memory://") as awake:
        got: list[str] = []
        for name, each in (("asleep", asleep), ("awake", awake)):
            channel = each.channel()
            declare(channel)
            channel.basic_consume("q", True, lambda _, name=name: got.append(name))
            with pytest.raises(TimeoutError):
                each.drain_events(timeout=0)
        task = env.spawn(awake.drain_events, timeout=10)
        wait_for(lambda: awake.connection.inbox.watched, env)
        put(channel)
        task.join(10)
        assert got == ["awake"]


def test_s14_close_ends_a_drain_with_a_typed_error(env: Environment) -> None:
    caught: list[BaseException] = []
    with Connection("memory://") as connection:
        channel = connection.channel()
        declare(channel)
        channel.basic_consume("q", callback=print)

        def drain() -> None:
            try:
                connection.drain_events(timeout=30)
            except BaseException as exc:
                caught.append(exc)

        task = env.spawn(drain)
        inner = connection.connection
        wait_for(lambda: inner.inbox.watched, env)
        connection.close()
        assert task.join(10)
        assert isinstance(caught[0], connection.connection_errors)


def test_s29_a_callback_that_publishes_on_its_own_connection_keeps_the_stack_flat(
    connection: Connection, channel: Any
) -> None:
    declare(channel)
    declare(channel, "out")
    for _ in range(3000):
        put(channel)
    import sys

    deepest = 0

    def forward(message: Any) -> None:
        nonlocal deepest
        depth, frame = 0, sys._getframe()
        while frame is not None:
            depth, frame = depth + 1, frame.f_back  # type: ignore[assignment]
        deepest = max(deepest, depth)
        put(channel, message.body, "out")
        message.ack()

    channel.basic_consume("q", callback=forward)
    connection.drain_events(timeout=10)
    first = deepest
    for _ in range(2999):
        connection.drain_events(timeout=10)
    assert deepest <= first + 2
    assert len(channel.queues["out"]) == 3000


def test_a_callback_may_drain(connection: Connection, channel: Any) -> None:
    declare(channel)
    got: list[bytes] = []

    def nested(message: Any) -> None:
        if message.body == b"1":
            connection.drain_events(timeout=10)
        got.append(message.body)

    channel.basic_consume("q", True, nested)
    put(channel, b"1")
    put(channel, b"2")
    connection.drain_events(timeout=10)
    assert got == [b"2", b"1"]


def test_s13_ready_messages_do_not_stop_other_tasks(
    env: Environment, ticker: Ticker, connection: Connection, channel: Any
) -> None:
    declare(channel)
    for _ in range(20_000):
        put(channel)
    channel.basic_consume("q", True, lambda message: None)
    with no_collections():
        ticker.reset()
        for _ in range(20_000):
            connection.drain_events(timeout=10)
        env.sleep(0.02)
        assert ticker.ticks > 3
        # Native threads do not keep each other from running.
        assert not env.green or ticker.largest_slice < 0.1


def test_b164_acknowledging_from_several_tasks(
    connection: Connection, channel: Any, env: Environment
) -> None:
    declare(channel)
    for _ in range(400):
        put(channel)
    taken = [channel.basic_get("q") for _ in range(400)]

    def settle(part: list[Any]) -> None:
        for message in part:
            message.ack()

    tasks = [env.spawn(settle, taken[number::4]) for number in range(4)]
    for task in tasks:
        task.join(10)
    assert not channel.qos._delivered


def test_publishing_and_consuming_from_many_tasks_at_once(env: Environment) -> None:
    """Native threads in the default environment: nothing is lost, nothing comes twice."""
    messages, got = 300, []
    connections = [Connection("memory://") for _ in range(4)]
    consumers = [Connection("memory://") for _ in range(4)]
    setup = connections[0].channel()
    declare(setup)

    def publish(number: int) -> None:
        channel = connections[number].channel()
        for each in range(messages):
            put(channel, f"{number}.{each}", priority=each % 3)
            if each % 10 == 0:
                env.sleep(0)

    def consume(number: int) -> None:
        each = consumers[number]
        channel = each.channel()
        channel.basic_qos(0, 5)

        def take(message: Any) -> None:
            if message.delivery_tag.endswith("7") and not message.delivery_info.get("redelivered"):
                message.requeue()
                return
            got.append(message.body)
            message.ack()

        channel.basic_consume("q", callback=take)
        while len(got) < 4 * messages:
            try:
                each.drain_events(timeout=0.2)
            except TimeoutError:
                pass

    tasks = [env.spawn(consume, number) for number in range(4)]
    tasks += [env.spawn(publish, number) for number in range(4)]
    for task in tasks:
        assert task.join(60)
    assert sorted(got) == sorted(
        f"{number}.{each}".encode() for number in range(4) for each in range(messages)
    )
    for each in connections + consumers:
        each.close()


# -- prefetch


def test_b097_b152_prefetch_bounds_what_is_unsettled(connection: Connection, channel: Any) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_qos(0, 2, False)
    channel.basic_consume("q", callback=got.append)
    for _ in range(5):
        put(channel)
    assert channel.qos.can_consume()
    assert channel.qos.can_consume_max_estimate() == 2
    connection.drain_events(timeout=10)
    connection.drain_events(timeout=10)
    assert not channel.qos.can_consume()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.02)
    got[0].ack()
    assert channel.qos.can_consume()
    connection.drain_events(timeout=10)
    got[1].reject()
    connection.drain_events(timeout=10)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.02)
    channel.basic_qos(0, 0)
    assert channel.qos.can_consume_max_estimate() is None
    connection.drain_events(timeout=10)
    assert len(got) == 5


def test_b097_prefetch_does_not_concern_no_ack(connection: Connection, channel: Any) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_qos(0, 1)
    channel.basic_consume("q", True, got.append)
    for _ in range(3):
        put(channel)
        connection.drain_events(timeout=10)
    assert len(got) == 3
    got[0].ack()  # harmless
    assert not channel.qos._delivered


def test_an_acknowledgement_from_another_task_wakes_the_drain(
    connection: Connection, channel: Any, env: Environment
) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_qos(0, 1)
    channel.basic_consume("q", callback=got.append)
    put(channel, b"1")
    put(channel, b"2")
    connection.drain_events(timeout=10)
    task = env.spawn(connection.drain_events, timeout=10)
    wait_for(lambda: connection.connection.inbox.watched, env)
    got[0].ack()
    assert task.join(10)
    assert [message.body for message in got] == [b"1", b"2"]


def test_b097_prefetch_holds_with_several_tasks_that_drain(
    connection: Connection, channel: Any, env: Environment
) -> None:
    """Native threads in the default environment."""
    for name in "ab":
        declare(channel, name)
        for _ in range(300):
            put(channel, queue=name)
    channel.basic_qos(0, 2)
    settled: list[Any] = []
    most = 0

    def take(message: Any) -> None:
        nonlocal most
        most = max(most, channel.unsettled)
        env.sleep(0)
        most = max(most, channel.unsettled)
        message.ack()
        settled.append(message)

    for name in "ab":
        channel.basic_consume(name, callback=take)

    def drain() -> None:
        while len(settled) < 600:
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                pass

    tasks = [env.spawn(drain) for _ in range(4)]
    for task in tasks:
        assert task.join(60)
    assert len(settled) == 600
    assert most <= 2 + len(tasks)  # a delivery that is taken back is counted for a moment


def test_a_full_channel_leaves_its_messages_to_others(env: Environment) -> None:
    with Connection("memory://") as full, Connection("memory://") as free:
        channel, other = full.channel(), free.channel()
        declare(channel)
        got: list[str] = []
        channel.basic_qos(0, 1)
        channel.basic_consume("q", callback=lambda message: got.append("full"))
        put(channel)
        full.drain_events(timeout=10)
        other.basic_consume("q", True, lambda message: got.append("free"))
        put(channel)
        with pytest.raises(TimeoutError):
            full.drain_events(timeout=0)
        free.drain_events(timeout=5)
        assert got == ["full", "free"]


def test_a_thousand_queues_behind_one_prefetch_cost_the_same_for_each_message(
    connection: Connection, channel: Any
) -> None:
    """A settled message must not make every waiting consumer look."""
    count = 300
    served: list[Any] = []
    channel.basic_qos(0, 1)
    for number in range(count):
        declare(channel, f"q{number}")
        put(channel, queue=f"q{number}")
        channel.basic_consume(f"q{number}", callback=served.append)
    looks = 0
    serve = channel._serve

    def counted(consumer: Any) -> bool:
        nonlocal looks
        looks += 1
        return bool(serve(consumer))

    channel._serve = counted
    while len(served) < count:
        connection.drain_events(timeout=10)
        served[-1].ack()
    assert looks <= 4 * count
    assert {message.queue for message in served} == {f"q{number}" for number in range(count)}


def test_b154_multiple_acknowledges_all_before(channel: Any) -> None:
    declare(channel)
    for _ in range(4):
        put(channel)
    taken = [channel.basic_get("q") for _ in range(4)]
    channel.basic_ack(taken[2].delivery_tag, multiple=True)
    channel.basic_ack("unknown", multiple=True)
    assert list(channel.qos._delivered) == [taken[3].delivery_tag]


def test_b121_unknown_tags_are_ignored(channel: Any) -> None:
    channel.basic_ack("unknown")
    channel.basic_reject("unknown")
    channel.basic_reject("unknown", requeue=True)


# -- many


@pytest.mark.watchdog(100)
def test_a_thousand_connections_cost_the_same_for_each_message(env: Environment) -> None:
    """Delivery is O(1): no put and no drain looks at more than its own consumer."""
    count = 1000
    connections = [Connection("memory://") for _ in range(count)]
    got: list[int] = []
    for number, each in enumerate(connections):
        channel = each.channel()
        declare(channel, f"q{number}")
        channel.basic_consume(f"q{number}", True, lambda _, number=number: got.append(number))
        with pytest.raises(TimeoutError):
            each.drain_events(timeout=0)
    publisher = connections[0].default_channel
    for number, each in enumerate(connections):
        put(publisher, queue=f"q{number}")
        assert len(each.connection._ready) == 1
        each.drain_events(timeout=10)
        assert not each.connection._ready
    assert got == list(range(count))
    for each in connections:
        each.close()


def test_nothing_is_polled(connection: Connection, channel: Any, env: Environment) -> None:
    connection.transport.polling_interval = 0.01
    declare(channel)
    channel.basic_consume("q", True, print)
    looks = 0
    take = channel._take

    def counted(queue: str) -> Any:
        nonlocal looks
        looks += 1
        return take(queue)

    channel._take = counted
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    assert looks == 1


def test_publishing_stays_flat_with_many_bindings(channel: Any) -> None:
    channel.exchange_declare("e")
    for number in range(3000):
        declare(channel, f"q{number}")
        channel.queue_bind(f"q{number}", "e", f"k{number}")

    def cost(rounds: int = 2000) -> float:
        with no_collections():
            started = time.process_time()
            for _ in range(rounds):
                put(channel, queue="k7", exchange="e")
            return time.process_time() - started

    cost()
    many = min(cost() for _ in range(3))
    for number in range(100, 3000):
        channel.queue_delete(f"q{number}")
    few = min(cost() for _ in range(3))
    assert many < 3 * few


# -- processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_s17_a_child_has_a_broker_of_its_own(connection: Connection, channel: Any) -> None:
    declare(channel)
    declare(channel, "timed", message_ttl=60_000)
    put(channel, b"parent's")
    taken = channel.basic_get("q")
    put(channel, queue="timed")
    # Somebody waits here while the process forks.
    channel.basic_consume("q", True, print, "parent's")
    connection.connection.inbox.subscribe(list)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eventlet warns at every fork
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with Connection("memory://") as own:
                theirs = own.channel()
                found: list[Any] = []
                theirs.basic_consume("q", True, lambda message: found.append(message.body))
                with contextlib.suppress(TimeoutError):
                    own.drain_events(timeout=0)
                put(theirs, b"child's")
                put(theirs, queue="timed", properties={"expiration": "1"})
                own.drain_events(timeout=0)
                os.write(writing, repr(found).encode())
                status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    os.close(writing)
    try:
        assert os.read(reading, 1000) == b'[b"child\'s"]'
    finally:
        os.close(reading)
    assert os.waitstatus_to_exitcode(status) == 0
    connection.connection.inbox.unsubscribe(list)
    channel.basic_cancel("parent's")
    taken.requeue()
    assert bodies(channel) == [b"parent's"]


def test_consumer_and_producer_on_top(connection: Connection) -> None:
    got: list[Any] = []
    queue = Queue("q", Exchange("e", "topic"), routing_key="a.#")

    def take(body: Any, message: Any) -> None:
        got.append((body, message.delivery_info["routing_key"]))
        message.ack()

    with Consumer(connection, queue, callbacks=[take]), Producer(connection) as producer:
        producer.publish({"n": 1}, exchange="e", routing_key="a")
        producer.publish({"n": 2}, exchange="e", routing_key="a.b.c")
        connection.drain_events(timeout=10)
        connection.drain_events(timeout=10)
    assert got == [({"n": 1}, "a"), ({"n": 2}, "a.b.c")]
