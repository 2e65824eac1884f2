"""Who takes messages from a Redis server when, and what becomes of what nobody takes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Producer, Queue
from greenkombu.deadline import Deadline
from greenkombu.transport.redis._errors import WrongTypeError
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix


def names(tag: str, count: int) -> list[str]:
    return [f"taps-{tag}-{number}" for number in range(count)]


def unacked(redis: PrivateRedis) -> list[bytes]:
    found: list[bytes] = redis.command("HVALS", "unacked")
    return found


def drain_until(connection: Connection, condition: Any) -> None:
    for _ in range(10_000):
        if condition():
            return
        connection.drain_events(timeout=LONG)
    raise AssertionError("it did not come")


def fill(connection: Connection, queue: str, count: int) -> None:
    producer = Producer(connection.channel())
    for number in range(count):
        producer.publish(number, routing_key=queue)


def test_the_room_that_an_empty_queue_leaves_goes_to_another(redis: PrivateRedis) -> None:
    empty, full = names("room", 2)
    with Connection(redis.url) as connection:
        fill(connection, full, 3)
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        got: list[Any] = []

        def take(body: Any, message: Any) -> None:
            got.append(body)
            message.ack()

        with Consumer(channel, [Queue(empty), Queue(full)], callbacks=[take]):
            drain_until(connection, lambda: len(got) == 3)
        assert got == [0, 1, 2]


@pytest.mark.parametrize("prefetch", [0, 1, 3, 50])
def test_many_tasks_share_channels_and_queues(
    env: Environment, redis: PrivateRedis, prefetch: int
) -> None:
    queues = names(f"share{prefetch}", 3)
    total = 300
    got: Counter[int] = Counter()
    most = [0]
    with Connection(redis.url) as connection:
        channels = [connection.channel() for _ in range(2)]

        def take(body: int, message: Any) -> None:
            most[0] = max(most[0], *(channel.unsettled for channel in channels))
            if body % 10 == 0 and not message.delivery_info.get("redelivered"):
                message.requeue()
            else:
                got[body] += 1
                message.ack()

        for channel in channels:
            channel.basic_qos(0, prefetch, False)
            Consumer(channel, list(map(Queue, queues)), callbacks=[take]).consume()

        def publish(first: int) -> None:
            producer = Producer(connection.channel())
            for number in range(first, total, 4):
                producer.publish(number, routing_key=queues[number % 3], priority=number % 10)

        def drain() -> None:
            while len(got) < total:
                try:
                    connection.drain_events(timeout=0.2)
                except TimeoutError:
                    continue

        tasks = [env.spawn(publish, first) for first in range(4)]
        tasks += [env.spawn(drain) for _ in range(3)]
        for task in tasks:
            task.result(LONG)
        assert set(got.values()) == {1}
        if prefetch:
            assert most[0] <= prefetch
        until(env, lambda: not any(b"taps-share" in kept for kept in unacked(redis)))


def test_what_a_dropped_connection_held_goes_back(env: Environment, redis: PrivateRedis) -> None:
    [queue] = names("dropped", 1)
    connection = Connection(redis.url)
    fill(connection, queue, 5)
    channel = connection.channel()
    got: list[Any] = []
    consumer = Consumer(channel, [Queue(queue)], on_message=got.append)
    consumer.consume()
    connection.drain_events(timeout=LONG)
    assert redis.command("LLEN", queue) == 0  # one was delivered, four are in the buffer
    del connection, channel, consumer, got
    until(env, lambda: redis.command("LLEN", queue) == 5, collecting=True)
    redis.command("DEL", queue)


@pytest.mark.parametrize("asks", ["consumer", "get"])
def test_what_was_on_its_way_to_a_dropped_connection_goes_back(
    env: Environment, make_private_redis: Callable[..., PrivateRedis], asks: str
) -> None:
    """The server has taken messages for it, and the reply has not come."""
    server = make_private_redis()

    def lose(url: str) -> weakref.ref[Any]:
        connection = Connection(url)
        channel = connection.channel()
        queue = Queue("q", no_declare=True)
        fill(connection, "q", 3)
        proxy.black_hole("down", [link.number for link in proxy.links()])
        if asks == "consumer":
            Consumer(channel, [queue], on_message=print).consume()
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.2)
        else:
            with pytest.raises(TimeoutError), Deadline(0.2):
                queue(channel).get()
        until(env, lambda: server.command("HLEN", "unacked"))
        return weakref.ref(channel.redis)

    with FaultProxy(("127.0.0.1", server.port)) as proxy:
        lost = lose(f"redis://127.0.0.1:{proxy.port}")
        until(env, lambda: lost() is None, collecting=True)
        until(env, lambda: server.command("LLEN", "q") == 3)
    assert server.command("HLEN", "unacked") == 0
    assert server.command("LRANGE", "q", 0, -1)[-1].count(b'"MA=="') == 1


def test_a_message_that_nobody_waits_for_any_more_goes_back(
    env: Environment, redis: PrivateRedis
) -> None:
    """The task is killed, or its time ends, while the server takes the message for it."""
    if not env.green:
        pytest.skip("native threads cannot be killed")
    [queue] = names("unwanted", 1)
    with Connection(redis.url) as connection:
        fill(connection, queue, 1)
        channel = connection.channel()
        for _ in range(5):
            task = env.spawn(Queue(queue)(channel).get)
            env.sleep(0)
            task.kill()
        until(env, lambda: redis.command("LLEN", queue) == 1)
        message = Queue(queue)(channel).get()
        assert message is not None
        assert message.payload == 0
        message.ack()


def test_what_a_lost_connection_held_goes_back_when_the_process_connects_again(
    env: Environment, make_private_redis: Callable[..., PrivateRedis]
) -> None:
    """Whichever of its connections to that server is the next: a worker makes a clone."""
    server = make_private_redis()
    connection = Connection(server.url)
    fill(connection, "q", 5)
    channel = connection.channel()
    got: list[Any] = []
    Consumer(channel, [Queue("q")], on_message=got.append).consume()
    connection.drain_events(timeout=LONG)
    assert server.command("LLEN", "q") == 0
    lost = connection.connection
    server.kick()
    until(env, lambda: not lost.connected)
    with connection.clone() as another:
        another.connect()
        found = [Queue("q")(another.channel()).get() for _ in range(5)]
        assert [message.payload for message in found] == [0, 1, 2, 3, 4]
        assert server.command("HLEN", "unacked") == 5
        for message in found:
            message.ack()
    connection.release()


def test_who_dies_while_it_looks_for_lost_messages_keeps_nobody_from_it_for_long(
    env: Environment, make_private_redis: Callable[..., PrivateRedis]
) -> None:
    server = make_private_redis()
    with Connection(server.url, transport_options={"visibility_timeout": 0.1}) as connection:
        channel = connection.channel()
        Queue("q")(channel).get()
        for number in range(3):
            server.command("HSET", "unacked", f"t{number}", b'["x", "", "q"]')
            server.command("ZADD", "unacked_index", 1, f"t{number}")
        until(env, lambda: server.command("LLEN", "q") == 3)
        left = server.command("PTTL", "unacked_mutex")
        assert left <= 10_000  # milliseconds; -2 when it is gone


def test_a_list_of_the_wrong_type_keeps_no_message_of_the_others(
    make_private_redis: Callable[..., PrivateRedis],
) -> None:
    server = make_private_redis()
    with Connection(server.url) as connection:
        fill(connection, "q", 2)
        channel = connection.channel()
        got: list[Any] = []

        def take(body: Any, message: Any) -> None:
            got.append(body)
            message.ack()

        with Consumer(channel, [Queue("q")], callbacks=[take]):
            server.command("SET", "q\x06\x163", "no list")
            drain_until(connection, lambda: got == [0, 1])
            with pytest.raises(WrongTypeError, match="WRONGTYPE"):
                connection.drain_events(timeout=LONG)
            server.command("DEL", "q\x06\x163")
            Producer(channel).publish(2, routing_key="q", priority=3)
            drain_until(connection, lambda: got == [0, 1, 2])


def test_a_user_who_may_not_publish_polls_and_gets_what_was_taken(
    make_private_redis: Callable[..., PrivateRedis],
) -> None:
    server = make_private_redis()
    server.command("ACL", "SETUSER", "poor", "on", ">pw", "~*", "resetchannels", "+@all")
    url = server.url.replace("redis://", "redis://poor:pw@")
    options = {"polling_interval": 0.1}
    with Connection(server.url) as rich, Connection(url, transport_options=options) as poor:
        # Somebody waits already, whom the poor one has to wake.
        waiting = Consumer(rich.channel(), [Queue("q")], callbacks=[lambda _, message: None])
        waiting.consume()
        with pytest.raises(TimeoutError):
            rich.drain_events(timeout=0.1)
        waiting.cancel()
        fill(rich, "q", 3)
        channel = poor.channel()
        channel.basic_qos(0, 2, False)
        got: list[Any] = []

        def take(body: Any, message: Any) -> None:
            got.append(body)
            message.ack()

        with Consumer(channel, [Queue("q")], callbacks=[take]):
            drain_until(poor, lambda: got == [0, 1, 2])
            fill(rich, "q", 1)
            drain_until(poor, lambda: got == [0, 1, 2, 0])


def test_what_is_on_its_way_to_a_cancelled_consumer_is_in_the_queue_again(
    redis: PrivateRedis,
) -> None:
    [queue] = names("cancelled", 1)
    with Connection(redis.url) as connection:
        channel = connection.channel()
        channel.basic_qos(0, 1, False)
        for _ in range(10):
            fill(connection, queue, 2)
            got: list[Any] = []

            def take(body: Any, message: Any, got: list[Any] = got) -> None:
                message.ack()  # asks for the next one
                got.append(body)

            with Consumer(channel, [Queue(queue)], callbacks=[take]):
                drain_until(connection, lambda: got)  # noqa: B023
            message = Queue(queue)(channel).get()
            assert message is not None
            assert message.payload == 1
            message.ack()


def test_who_has_no_work_yet_gets_the_next_message(env: Environment, redis: PrivateRedis) -> None:
    """Also without a prefetch limit: of five consumers that keep their messages each gets some."""
    [queue] = names("fair", 1)
    connections = [Connection(redis.url) for _ in range(5)]
    got: list[list[Any]] = [[] for _ in connections]
    try:
        for connection, messages in zip(connections, got, strict=True):
            Consumer(connection.channel(), [Queue(queue)], on_message=messages.append).consume()

        def drain(connection: Connection) -> None:
            while sum(map(len, got)) < 20:
                try:
                    connection.drain_events(timeout=0.1)
                except TimeoutError:
                    continue

        tasks = [env.spawn(drain, connection) for connection in connections]
        until(env, lambda: all(each.connection.inbox.watched for each in connections))
        with Connection(redis.url) as sending:
            producer = Producer(sending.channel())
            for number in range(20):
                producer.publish(number, routing_key=queue)
                until(env, lambda: sum(map(len, got)) > number)  # noqa: B023
        for task in tasks:
            task.result(LONG)
        assert min(map(len, got)) >= 1
        assert max(map(len, got)) <= 10
        for messages in got:
            for message in messages:
                message.ack()
    finally:
        for connection in connections:
            connection.release()


def test_messages_without_ack_that_wait_here_leave_the_prefetch_limit_to_others(
    redis: PrivateRedis, env: Environment
) -> None:
    free, limited = names("free", 2)
    with Connection(redis.url) as connection:
        fill(connection, free, 50)
        fill(connection, limited, 5)
        channel = connection.channel()
        channel.basic_qos(0, 3, False)
        got: list[Any] = []
        channel.basic_consume(free, True, got.append)
        drain_until(connection, lambda: got)
        channel.basic_consume(limited, False, got.append)
        drain_until(connection, lambda: limited in channel.taps.by_queue)
        tap = channel.taps.by_queue[limited]
        # Nobody drains meanwhile.
        until(env, lambda: len(tap.buffer) + channel.unsettled == 3)
        assert len(channel.taps.by_queue[free].buffer) > 3
        channel.queue_purge(free)
        channel.queue_purge(limited)


def test_what_waits_here_is_counted_and_purged_with_its_queue(
    redis: PrivateRedis, env: Environment
) -> None:
    [name] = names("purge", 1)
    with Connection(redis.url) as connection:
        fill(connection, name, 5)
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume(name, False, got.append)
        drain_until(connection, lambda: got)
        until(env, lambda: len(channel.taps.by_queue[name].buffer) == 4)
        assert channel.queue_declare(name, passive=True).message_count == 4
        assert channel.queue_purge(name) == 4
        assert channel.queue_declare(name, passive=True).message_count == 0
        got.pop().ack()
        fill(connection, name, 1)
        drain_until(connection, lambda: got)
        assert got.pop().payload == 0
    assert redis.command("LLEN", name) == 1
    redis.command("DEL", name)
