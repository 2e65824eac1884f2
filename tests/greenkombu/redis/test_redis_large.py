"""Messages that are large, or many: a server drops subscribers for whom too much waits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from greenkombu import Connection
from greenkombu.transport.redis import _replies, _restore
from tests.greenkombu.redis.support import Database, consume, drain_until, publish

#: Bytes that the server lets wait for a subscriber, and that are asked for at a time.
LIMIT = 1_000_000
BUDGET = 200_000
LARGE = "large" * 300_000


@pytest.fixture(autouse=True)
def limited(database: Database, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A server that bears little, and a transport that knows it."""
    sizes = {"BUDGET": BUDGET, "PART_BYTES": BUDGET, "MOST": 50_000, "LEAST": 20_000}
    for name, size in sizes.items():
        monkeypatch.setattr(_replies, name, size)
    monkeypatch.setattr(_restore, "PART_BYTES", BUDGET)
    name = "client-output-buffer-limit"
    before = database.command("CONFIG", "GET", name)[1]
    database.command("CONFIG", "SET", name, f"pubsub {LIMIT} 0 0")
    yield
    database.command("CONFIG", "SET", name, before)


def hear(connection: Connection) -> None:
    """Make a connection one that hears wakes, and so a subscriber."""
    got = consume(connection, "other")
    publish(connection, "other", 1)
    drain_until(connection, lambda: got)


def test_a_consumer_gets_what_is_larger_than_may_wait_for_a_subscriber(database: Database) -> None:
    connection = database.connect()
    got = consume(connection, "q")
    publish(connection, "q", "first", LARGE, "last")
    drain_until(connection, lambda: len(got) == 3)
    assert got == ["first", LARGE, "last"]
    assert not database.command("KEYS", "unacked:copy:*")


def test_so_does_a_task_that_waits_for_one_message(database: Database) -> None:
    connection = database.connect()
    hear(connection)
    publish(connection, "q", LARGE)
    message = connection.default_channel.basic_get("q")
    assert message.payload == LARGE
    message.ack()
    connection.close()
    assert not database.keys()


def test_many_queues_together_ask_for_no_more_than_may_wait(database: Database) -> None:
    body, queues = "x" * 15_000, [f"q{number}" for number in range(200)]
    connection = database.connect()
    for queue in queues:
        publish(connection, queue, *[body] * 3)
    got = consume(connection, *queues)
    drain_until(connection, lambda: len(got) == 600)
    connection.close()
    assert not database.keys()


def test_large_messages_of_a_dead_client_come_back(database: Database) -> None:
    worker = database.connect()
    publish(worker, "q", LARGE, *["x" * 100_000] * 10)
    channel = worker.channel()
    for _ in range(11):
        channel.basic_get("q")
    # As if it were gone for long.
    for token in database.command("HKEYS", "unacked"):
        database.command("ZADD", "unacked_index", 1, token)
    connection = database.connect()
    hear(connection)
    channel = connection.channel()
    for _ in range(2):
        channel.restore_visible()
    assert database.command("LLEN", "q") == 11
    assert channel.basic_get("q").payload == LARGE
    assert not database.command("KEYS", "unacked:copy:*")
