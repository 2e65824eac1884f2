"""What Kombu's documents say of Redis, by the numbers of `tests.behaviours`."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu.exceptions import InconsistencyError, NotFoundError, OperationalError
from greenkombu.transport import get_transport_cls
from greenkombu.transport.redis import Transport
from hub.environment import Environment
from tests.greenkombu.redis.support import (
    Database,
    consume,
    drain_until,
    nothing_comes,
    publish,
)
from tests.support.ports import free_port
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix

UNACKED = ["unacked", "unacked_index"]


def test_b015_the_virtual_host_is_the_number_of_the_database(database: Database) -> None:
    server = database.server
    parts = {"hostname": "127.0.0.1", "port": server.port, "transport": "redis"}
    with Connection(**parts, virtual_host=str(database.number)) as connection:
        publish(connection, "by-parts", 1)
    with Connection(f"redis://127.0.0.1:{server.port}/{database.number}") as connection:
        publish(connection, "by-url", 1)
    assert database.keys() == ["by-parts", "by-url"]


def test_b022_ghettoqs_name_means_this_transport() -> None:
    assert get_transport_cls("ghettoq.taproot.Redis") is Transport


def test_b166_unacked_messages_are_in_a_hash_and_a_sorted_set(database: Database) -> None:
    connection = database.connect()
    publish(connection, "q", "kept")
    message = Queue("q")(connection.channel()).get()
    assert database.keys() == UNACKED
    [(tag, score)] = pairs(database.command("ZRANGE", "unacked_index", 0, -1, "WITHSCORES"))
    assert abs(float(score) - time.time()) < 60
    kept = json.loads(database.command("HGET", "unacked", tag))
    assert kept[1:] == ["", "q"]
    assert kept[0]["properties"]["delivery_info"]["routing_key"] == "q"
    message.ack()


def test_b166_options_name_the_keys(database: Database) -> None:
    connection = database.connect(unacked_key="u", unacked_index_key="i")
    publish(connection, "q", "kept")
    message = Queue("q")(connection.channel()).get()
    assert database.keys() == ["i", "u"]
    message.requeue()
    connection.close()
    assert database.keys() == ["q"]


def test_b167_a_message_comes_back_after_the_visibility_timeout(database: Database) -> None:
    leave_unacked(database, "q", "lost")
    connection = database.connect(visibility_timeout=0.2)
    got = consume(connection, "q")
    drain_until(connection, lambda: got and database.keys() == [])
    assert set(got) == {"lost"}  # once more if it stood still before it could acknowledge it


def test_b167_a_program_may_look_itself(database: Database) -> None:
    for number in range(3):
        leave_unacked(database, "q", number)
    qos = database.connect(visibility_timeout=60).channel().qos
    assert qos.visibility_timeout == 60
    qos.restore_visible(start=0, num=2, interval=10)
    assert database.command("LLEN", "q") == 2
    assert database.command("HLEN", "unacked") == 1
    qos.restore_visible()
    assert database.command("LLEN", "q") == 3
    assert database.keys() == ["q"]


@pytest.mark.parametrize("how", ["ack", "reject", "requeue"])
def test_b168_settling_removes_a_message_from_both_keys(
    env: Environment, database: Database, how: str
) -> None:
    connection = database.connect()
    publish(connection, "q", 1)
    message = Queue("q")(connection.channel()).get()
    assert database.keys() == UNACKED
    getattr(message, how)()
    until(env, lambda: database.keys() == (["q"] if how == "requeue" else []))


def test_b169_priorities_are_lists_and_0_is_served_first(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    assert channel.priority_steps == [0, 3, 6, 9]
    steps = [channel.priority(number) for number in (-1, 0, 2, 3, 5, 6, 8, 9, 12, None)]
    assert steps == [0, 0, 0, 3, 3, 6, 6, 9, 9, 0]
    for number in (9, 5, 7, 0):
        publish(connection, "q", number, priority=number)
    assert database.keys() == ["q", "q\x06\x163", "q\x06\x166", "q\x06\x169"]
    got = consume(connection, "q", prefetch=1)
    drain_until(connection, lambda: len(got) == 4)
    assert got == [0, 5, 7, 9]


def test_b170_bindings_are_members_of_a_set(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    Queue("q", Exchange("direct"), routing_key="key")(channel).declare()
    Queue("q", Exchange("topic", "topic"), routing_key="a.#")(channel).declare()
    [direct] = database.command("SMEMBERS", "_kombu.binding.direct")
    [topic] = database.command("SMEMBERS", "_kombu.binding.topic")
    assert direct == b"key\x06\x16\x06\x16q"
    assert topic.startswith(b"a.#\x06\x16^a")
    assert topic.endswith(b"\x06\x16q")
    # From this set Kombu 5.7 knows that the bindings of the other are not to expire.
    assert database.command("SMEMBERS", "_kombu.binding_permanent.direct") == [direct]
    assert channel.get_table("direct") == [("key", "", "q")]
    assert channel.get_table("never-declared") == []


def test_b170_bindings_that_have_vanished_are_an_error(database: Database) -> None:
    channel = database.connect().channel()
    Queue("q", Exchange("e"), routing_key="key")(channel).declare()
    database.command("DEL", "_kombu.binding.e")
    with pytest.raises(InconsistencyError, match=r"'e'.*_kombu\.binding\.e"):
        channel.get_table("e")
    assert channel.get_bindings() == []
    Queue("q", Exchange("e"), routing_key="key")(channel).declare()
    assert channel.get_table("e") == [("key", "", "q")]
    database.command("DEL", "_kombu.binding.e")
    channel.exchange_delete("e")


def test_b171_a_fanout_reaches_who_is_there_and_nobody_later(database: Database) -> None:
    news = Exchange("news", "fanout")
    connections = [database.connect() for _ in range(3)]
    got = [
        consume(connection, Queue(f"reader-{number}", news))
        for number, connection in enumerate(connections)
    ]
    Producer(database.connect(), exchange=news).publish("now")
    for connection, one in zip(connections, got, strict=True):
        drain_until(connection, lambda one=one: one)
    late = database.connect()
    got.append(consume(late, Queue("late", news)))
    nothing_comes(late)
    assert got == [["now"], ["now"], ["now"], []]


def test_b172_auto_delete_queues_go_with_their_last_consumer(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    queue = Queue("q", Exchange("e"), routing_key="key", auto_delete=True)(channel)
    consumers = [Consumer(channel, [queue], auto_declare=True) for _ in range(2)]
    for consumer in consumers:
        consumer.consume()
    channel.basic_qos(0, 1, False)
    consumers[0].cancel()
    publish(connection, "q", 1, 2, 3)
    assert queue.queue_declare(passive=True).queue == "q"
    consumers[1].cancel()
    with pytest.raises(NotFoundError):
        queue.queue_declare(passive=True)
    assert not {"q", "_kombu.binding.e", "_kombu.binding_permanent.e"} & {*database.keys()}


def test_b173_a_channel_that_waits_for_messages_does_other_things(
    env: Environment, database: Database
) -> None:
    connection = database.connect()
    channel = connection.channel()
    got: list[Any] = []
    queues = [Queue(f"q{number}")(channel) for number in range(3)]
    for queue in queues:
        queue.declare()
    first = Consumer(channel, queues[:1], no_ack=True, callbacks=[lambda body, _: got.append(body)])
    first.consume()
    ended: list[None] = []

    def drain() -> None:
        while not ended:
            try:
                connection.drain_events(timeout=0.05)
            except TimeoutError:
                continue

    draining = env.spawn(drain)
    producer = Producer(channel)
    for index, queue in enumerate(queues):
        if index:
            first.add_queue(queue)
            first.consume()
        producer.publish(index, routing_key=queue.name)
        until(env, lambda index=index: index in got)
    assert queues[0].queue_declare(passive=True).message_count == 0
    first.cancel_by_queue("q1")
    producer.publish("nobody", routing_key="q1")
    producer.publish("last", routing_key="q2")
    until(env, lambda: "last" in got)
    ended.append(None)
    draining.result(LONG)
    assert got == [0, 1, 2, "last"]
    assert database.command("LLEN", "q1") == 1


def test_b174_connecting_finds_out_that_nobody_is_there() -> None:
    connection = Connection(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(connection.connection_errors):
        connection.connect()
    with pytest.raises(OperationalError):
        connection.ensure_connection(max_retries=1, interval_start=0.01, interval_step=0)
    assert not connection.connected


def test_b175_a_lost_connection_does_not_leave_a_consumer_hanging(
    env: Environment, make_private_redis: Any
) -> None:
    server = make_private_redis()
    database = Database(server)
    connection = database.connect()
    got: list[Any] = []

    def consume_again() -> None:
        Consumer(
            connection.default_channel,
            [Queue("q")],
            no_ack=True,
            callbacks=[lambda body, _: got.append(body)],
        ).consume()

    consume_again()
    lost: list[BaseException] = []

    def drain() -> None:
        while not got:
            try:
                connection.drain_events(timeout=0.1)
            except TimeoutError:
                continue
            except connection.connection_errors as exc:
                lost.append(exc)
                connection.ensure_connection(interval_start=0.01, max_retries=50)
                consume_again()

    draining = env.spawn(drain)
    server.kick()
    until(env, lambda: lost)
    publish(database.connect(), "q", "after")
    draining.result(LONG)
    assert got == ["after"]
    database.close()


def test_b176_large_messages_arrive_as_they_are(database: Database) -> None:
    connection = database.connect()
    body = os.urandom(10 * 1024 * 1024)
    publish(connection, "q", body)
    got = consume(connection, "q")
    drain_until(connection, lambda: got)
    assert got[0] == body


def test_b177_tasks_consume_from_connections_of_their_own(
    env: Environment, database: Database
) -> None:
    count = 5
    connections = [database.connect() for _ in range(count)]
    got = [consume(connection, "q", prefetch=1) for connection in connections]

    def drain(number: int) -> None:
        while sum(map(len, got)) < 50:
            try:
                connections[number].drain_events(timeout=0.1)
            except TimeoutError:
                continue

    tasks = [env.spawn(drain, number) for number in range(count)]
    publish(database.connect(), "q", *range(50))
    for task in tasks:
        task.result(LONG)
    assert sorted(body for one in got for body in one) == list(range(50))


def test_b178_a_timeout_is_in_seconds(database: Database) -> None:
    connection = database.connect()
    consume(connection, "q")
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    assert 0.29 <= time.monotonic() - started < LONG


def pairs(flat: list[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def leave_unacked(database: Database, queue: str, body: Any) -> None:
    """Leave a message as a client does that was killed an hour and more ago."""
    with Connection(database.url) as connection:
        publish(connection, queue, body)
    raw = database.command("RPOP", queue)
    tag = json.loads(raw)["properties"]["delivery_tag"]
    database.command("HSET", "unacked", tag, b'[%b, "", "%b"]' % (raw, queue.encode()))
    database.command("ZADD", "unacked_index", time.time() - 7200, tag)
