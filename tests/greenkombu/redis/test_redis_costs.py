"""How many commands and system calls a message takes; `benchmarks/bench_redis.py` measures time."""

from __future__ import annotations

from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue, drain_events
from greenkombu.transport.redis import _taps
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from tests.greenkombu.redis.support import Database
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix

MESSAGES = 1000
TASKS = 50


def publish_at_once(env: Environment, connection: Connection) -> None:
    """Publish from many tasks over one channel."""
    channel = connection.default_channel
    exchange = Exchange("costs")
    Queue("costs", exchange, routing_key="key")(channel).declare()

    def publish() -> None:
        producer = Producer(channel, exchange, auto_declare=False)
        for number in range(MESSAGES // TASKS):
            producer.publish(number, routing_key="key")

    for task in [env.spawn(publish) for _ in range(TASKS)]:
        task.result(LONG)


def calls(server: PrivateRedis, *names: str) -> int:
    """Return how often the server has carried out some commands, in scripts as well."""
    told = server.info("commandstats")
    found = [told.get(f"cmdstat_{name}", "calls=0") for name in names]
    return sum(int(text.partition("calls=")[2].partition(",")[0]) for text in found)


def test_tasks_that_publish_at_a_time_share_system_calls(
    env: Environment, database: Database
) -> None:
    if not env.green:
        pytest.skip("native threads send each for itself")
    connection = database.connect()
    publish_at_once(env, connection)
    stream = connection.connection.wire.stream
    before = stream.send_calls, stream.recv_calls
    pushed = calls(database.server, "lpush")
    publish_at_once(env, connection)
    assert calls(database.server, "lpush") - pushed == MESSAGES
    assert stream.send_calls - before[0] < 0.6 * MESSAGES  # usually 0.15
    assert stream.recv_calls - before[1] < 0.6 * MESSAGES  # usually 0.02


def test_a_prefetch_limit_of_100_takes_many_messages_in_one_go(
    env: Environment, database: Database
) -> None:
    connection = database.connect()
    publish_at_once(env, connection)
    channel = connection.channel()
    channel.basic_qos(0, 100, False)
    got: list[Any] = []

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    scripts = calls(database.server, "eval", "evalsha")
    with Consumer(channel, [Queue("costs")], callbacks=[take], auto_declare=False):
        while len(got) < MESSAGES:
            connection.drain_events(timeout=LONG)
    assert calls(database.server, "eval", "evalsha") - scripts < 0.1 * MESSAGES  # usually 0.02
    until(env, lambda: database.command("HLEN", "unacked") == 0)


def test_of_two_idle_watchers_one_takes_a_message_and_the_other_only_looks(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_taps, "SECOND", 0.1)  # a busy server may read both requests at once
    queue = Queue("costs-idle", no_declare=True)
    crowd = [database.connect() for _ in range(5)]
    got: list[Any] = []

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    for connection in crowd:
        Consumer(connection.channel(), [queue], callbacks=[take]).consume()
    with pytest.raises(TimeoutError):
        drain_events(*crowd, timeout=0.1)
    producer = Producer(database.connect().channel())
    scripts = 0
    for number in range(22):
        if number == 2:  # those two have found out who is faster
            scripts = calls(database.server, "eval", "evalsha")
        producer.publish(number, routing_key="costs-idle")
        while len(got) <= number:
            drain_events(*crowd, timeout=LONG)
        for connection in crowd:
            connection.connection.acks.flush()
            connection.connection.sync()
    # Twice as many if both take; a few are renewals, and looks of those who are parked.
    assert calls(database.server, "eval", "evalsha") - scripts < 32
