"""Fanout exchanges on Redis: who gets what is broadcast, and how often."""

from __future__ import annotations

import json
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu.transport.redis import _fanout
from greenkombu.transport.redis._errors import NoPermissionError
from hub.environment import Environment
from tests.greenkombu.redis.support import Database, consume, drain_until, nothing_comes
from tests.support.tasks import LONG, until

FAN = Exchange("fan", "fanout")


def send(connection: Connection, *keys: str, exchange: Exchange = FAN) -> None:
    """Publish to a fanout exchange, with the routing keys as bodies."""
    producer = Producer(connection, exchange)
    for key in keys:
        producer.publish(key, routing_key=key)


def test_each_message_comes_once_though_it_fits_two_bindings(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    queue = Queue("q", FAN, routing_key="a.*")(channel)
    queue.declare()
    queue.bind_to(FAN, "*.b")
    queue.bind_to(FAN, "a.b*")
    got = consume(channel, queue)
    send(connection, "a.b", "a.c", "x.b", "x.y", "a.b", "end.b")
    drain_until(connection, lambda: "end.b" in got)
    assert got == ["a.b", "a.c", "x.b", "a.b", "end.b"]


def test_two_queues_of_one_channel_have_a_copy_each(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    first, second = (consume(channel, Queue(name, FAN)) for name in ("q1", "q2"))
    send(connection, "x", "y")
    drain_until(connection, lambda: len(first) + len(second) == 4)
    assert first == second == ["x", "y"]


def test_two_consumers_of_one_queue_share_its_copy(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    first, second = (consume(channel, Queue("q", FAN)) for _ in range(2))
    send(connection, *"abcd")
    drain_until(connection, lambda: len(first) + len(second) == 4)
    assert sorted(first + second) == [*"abcd"]


#: fanout_patterns -> (key of a binding, what comes of "", "k", "k.1").
PATTERNS: list[tuple[Any, str, list[str]]] = [
    (None, "", ["", "k", "k.1"]),
    (None, "k", ["", "k", "k.1"]),
    (None, "k*", ["k", "k.1"]),
    (True, "", ["", "k", "k.1"]),
    (True, "k", ["k"]),
    (True, "k.*", ["k.1"]),
    (False, "", ["", "k", "k.1"]),
    (False, "k*", ["", "k", "k.1"]),
]


@pytest.mark.parametrize(("patterns", "key", "expected"), PATTERNS)
def test_what_a_binding_key_means(
    database: Database, patterns: bool | None, key: str, expected: list[str]
) -> None:
    options = {} if patterns is None else {"fanout_patterns": patterns}
    connection = database.connect(**options)
    got = consume(connection, Queue("q", FAN, routing_key=key))
    all_of_it = consume(connection, Queue("all", FAN))
    send(connection, "", "k", "k.1")
    drain_until(connection, lambda: len(all_of_it) == 3 and len(got) == len(expected))
    assert got == expected


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, ["/7.fan", "/7.fan/*"]),
        ({"fanout_prefix": True}, ["/7.fan", "/7.fan/*"]),
        ({"fanout_prefix": False}, ["fan", "fan/*"]),
        ({"fanout_prefix": "/{db}-own."}, ["/7-own.fan", "/7-own.fan/*"]),
        ({"global_keyprefix": "P:"}, ["P:/7.fan", "P:/7.fan/*"]),
        ({"fanout_patterns": False}, ["/7.fan"]),
    ],
    ids=str,
)
def test_names_of_channels(
    database: Database, options: dict[str, Any], channels: list[str]
) -> None:
    connection = database.connect(**options)
    got = consume(connection, Queue("q", FAN))
    assert connection.connection.fanout.patterns("fan", "") == [each.encode() for each in channels]
    for channel in channels:
        told = json.dumps({"body": channel, "properties": {"delivery_tag": channel}})
        assert database.command("PUBLISH", channel.replace("*", "key"), told) == 1
    send(connection, "mine")
    drain_until(connection, lambda: "mine" in got)
    assert got == [*channels, "mine"]


def test_the_name_of_an_exchange_is_no_pattern(database: Database) -> None:
    connection = database.connect()
    strange, plain = Exchange("f*[a]?\\", "fanout"), Exchange("f-a-b", "fanout")
    got = consume(connection, Queue("q", strange))
    send(connection, "not for it", exchange=plain)
    send(connection, "", "for it", exchange=strange)
    drain_until(connection, lambda: len(got) == 2)
    assert got == ["", "for it"]


def test_who_has_cancelled_gets_nothing_more(env: Environment, database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    got: list[Any] = []
    consumer = Consumer(channel, [Queue("q", FAN)], callbacks=[lambda body, _: got.append(body)])
    consumer.consume()
    other = consume(connection, Queue("other", FAN))
    consumer.cancel()
    send(connection, "x")
    drain_until(connection, lambda: other)
    assert got == []
    consumer.consume()
    send(connection, "y")
    drain_until(connection, lambda: len(other) == 2 and got)
    assert got == ["y"]
    channel.close()
    send(connection, "z")
    drain_until(connection, lambda: len(other) == 3)
    connection.close()
    until(env, lambda: database.command("PUBSUB", "NUMPAT") == 0)


def test_a_binding_that_is_made_while_the_queue_is_consumed(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    queue = Queue("q", FAN)(channel)
    got = consume(channel, queue)
    other = Exchange("fan2", "fanout")(channel)
    other.declare()
    queue.bind_to(other)
    send(connection, "x", exchange=other)
    drain_until(connection, lambda: got)


def test_basic_get_purge_and_requeue_of_what_came(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    queue = Queue("q", FAN)(channel)
    got: list[Any] = []
    consumer = Consumer(channel, [queue], on_message=got.append)
    consumer.qos(prefetch_count=1)
    consumer.consume()
    send(connection, *"abc")
    drain_until(connection, lambda: got)
    got.pop().requeue()
    drain_until(connection, lambda: got)
    assert got[0].payload == "a"
    assert queue.get().payload == "b"
    drain_until_size(connection, queue, 1)
    assert queue.purge() == 1
    got[0].ack()
    nothing_comes(connection)


def drain_until_size(connection: Connection, queue: Any, size: int) -> None:
    drain_until(connection, lambda: queue.queue_declare(passive=True).message_count == size)


def test_a_consumer_that_is_too_slow_loses_what_is_too_much(
    env: Environment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fanout, "MOST_MESSAGES", 10)
    connection = database.connect()
    got = consume(connection, Queue("q", FAN))
    send(database.connect(), *map(str, range(15)))
    [queue] = connection.connection.channels.values()
    until(env, lambda: queue._fanout_queues["q"].dropped == 5)
    drain_until(connection, lambda: len(got) == 10)
    send(connection, "next")
    drain_until(connection, lambda: len(got) == 11)
    assert got[-2:] == ["9", "next"]


def test_a_subscription_that_the_server_refuses_is_an_error(database: Database) -> None:
    database.command("ACL", "SETUSER", "deaf", "on", ">pw", "~*", "+@all", "resetchannels")
    try:
        url = database.url.replace("redis://", "redis://deaf:pw@")
        connection = database.connect(url)
        channel = connection.channel()
        queue = Queue("q", FAN)(channel)
        queue.declare()
        with pytest.raises(NoPermissionError, match="PSUBSCRIBE"):
            queue.consume(callback=print)
        Producer(connection).publish("x", routing_key="plain")
        assert Queue("plain")(channel).get(no_ack=True).payload == "x"
        connection.close()
    finally:
        database.command("ACL", "DELUSER", "deaf")


def test_tasks_that_subscribe_at_once_miss_nothing(env: Environment, database: Database) -> None:
    connection = database.connect()
    connection.connect()
    connections = [database.connect() for _ in range(2)]
    got: dict[int, list[Any]] = {}

    def subscribe(number: int) -> None:
        # Each on a channel of its own: the second finds the subscription on its way.
        got[number] = consume(connection, Queue(f"q{number}", FAN))
        send(connections[number], str(number))

    tasks = [env.spawn(subscribe, number) for number in range(2)]
    for task in tasks:
        task.result(LONG)
    drain_until(connection, lambda: all(str(number) in got[number] for number in range(2)))


def test_a_consumer_that_always_has_something_waiting_loses_nothing(
    env: Environment, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fanout, "MOST_BYTES", 2_000)
    connection, sender = database.connect(), database.connect()
    channel = connection.channel()
    consume(channel, Queue("q", FAN))
    waiting = channel._fanout_queues["q"].buffer
    send(sender, "first")
    for _ in range(30):
        send(sender, "next")
        until(env, lambda: len(waiting) == 2)
        connection.drain_events(timeout=LONG)
        assert waiting
    channel.queue_purge("q")
    send(sender, *["last"] * 3)
    until(env, lambda: len(waiting) == 3)
