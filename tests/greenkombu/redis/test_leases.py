"""How often a client of a Redis server renews what it holds, and looks for what others left."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Producer, Queue
from greenkombu.transport.redis import _leases, _taps
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix

FLEET = "unacked_index:fleet"


def consume(connection: Connection, queue: str, got: list[Any]) -> Consumer:
    """Start a consumer that acknowledges nothing, and have it find the queue empty."""
    consumer = Consumer(connection.channel(), [Queue(queue)], on_message=got.append)
    consumer.consume()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.05)
    return consumer


def test_who_holds_nothing_renews_rarely_and_who_takes_a_message_at_once(
    env: Environment, redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_leases, "RENEW_SECONDS", 0.2)
    redis.command("DEL", FLEET, "unacked_index")
    got: list[Any] = []
    with Connection(redis.url) as connection:
        consume(connection, "leases-idle", got)
        until(env, lambda: redis.command("ZCARD", FLEET) == 1)
        [_, till] = redis.command("ZRANGE", FLEET, 0, -1, "WITHSCORES")
        # It holds for three renewals.
        assert float(till) - time.time() > 600
        Producer(connection.channel()).publish("", routing_key="leases-idle")
        connection.drain_events(timeout=LONG)
        [token, taken] = redis.command("ZRANGE", "unacked_index", 0, -1, "WITHSCORES")
        until(env, lambda: float(redis.command("ZSCORE", "unacked_index", token)) > float(taken))
        # A busy client does not shorten what an idle one has said.
        assert redis.command("ZRANGE", FLEET, 0, -1, "WITHSCORES")[1] == till
        got[0].ack()


def test_a_message_that_the_program_drops_goes_back_though_the_process_lives(
    env: Environment, redis: PrivateRedis
) -> None:
    """The task that had it was killed: nobody is left who could settle it."""
    del env
    queue = Queue("leases-dropped")
    got: list[Any] = []
    with Connection(redis.url, transport_options={"visibility_timeout": 0.5}) as connection:
        for number in range(3):
            Producer(connection).publish(number, routing_key=queue.name)
        # By a channel that is dropped with it.
        lost = queue(connection.channel()).get()
        assert lost is not None
        assert lost.payload == 0
        del lost
        with Consumer(connection, [queue], on_message=got.append, prefetch_count=2):
            for number in (1, 2):
                connection.drain_events(timeout=LONG)
                assert got[-1].payload == number
            kept = got.pop(0)
            got.clear()  # a place of the prefetch limit comes back with it
            connection.drain_events(timeout=LONG)
            got.pop().ack()
            connection.drain_events(timeout=LONG)
            got.append(kept)
        assert sorted(message.payload for message in got) in ([0, 1], [1, 2])
        assert got[0].delivery_info["redelivered"]
        for message in got:
            message.ack()  # also the first one, which was renewed meanwhile
        assert redis.command("LLEN", queue.name) == 0


def test_what_needs_no_ack_is_not_taken_for_dropped(env: Environment, redis: PrivateRedis) -> None:
    del env
    with Connection(redis.url, transport_options={"ack_emulation": False}) as connection:
        consumer = consume(connection, "leases-emulated", [])
        consumer.on_message = lambda _: None
        Producer(connection.channel()).publish("", routing_key="leases-emulated")
        connection.drain_events(timeout=LONG)
        for _ in range(2):  # when it is seen first, and later
            assert consumer.channel.qos.forgotten(1e-9) == []


def test_what_is_held_is_renewed_though_what_was_dropped_cannot_be_given_back(
    env: Environment, redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No thread can be started, or a program's own QoS does not know what was dropped."""
    monkeypatch.setattr(_leases, "RENEW_SECONDS", 0.05)
    asked: list[float] = []

    def forgotten(seconds: float) -> list[Any]:
        asked.append(seconds)
        raise RuntimeError("can't start new thread")

    with Connection(redis.url) as connection:
        consumer = consume(connection, "leases-refused", [])
        monkeypatch.setattr(consumer.channel.qos, "forgotten", forgotten)
        Producer(connection.channel()).publish("", routing_key="leases-refused")
        until(env, lambda: len(asked) > 2)


def test_the_first_of_many_parked_consumers_looks_soon_for_a_vacancy(
    env: Environment, redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if hundreds were parked at the same time, and this one drew the lowest of their numbers.
    monkeypatch.setattr(_taps, "VACANCY", 300.0)
    monkeypatch.setattr(random, "uniform", lambda least, most: least + 0.005 * (most - least))
    connections = [Connection(redis.url) for _ in range(3)]

    def parked() -> list[Any]:
        return [each.connection for each in connections if each.connection.parked]

    def delay() -> float:
        [connection] = parked()
        [tap] = connection._taps.values()
        return tap._timer.due - connection.hub.time()

    try:
        for connection in connections:
            consume(connection, "leases-vacancy", [])
        until(env, lambda: len(parked()) == 1)
        # Those who come one after the other are spread as it is.
        assert delay() > 200
        [never_busy] = parked()
        producer = Producer(connections[0].channel())
        while not never_busy.held():
            producer.publish("", routing_key="leases-vacancy")
            env.sleep(0.01)
        until(env, lambda: len(parked()) == 1)
        assert delay() < _taps.LEASE
    finally:
        for connection in connections:
            connection.release()


def test_parked_consumers_leave_looking_for_lost_messages_to_the_watchers(
    env: Environment, redis: PrivateRedis
) -> None:
    connections = [Connection(redis.url) for _ in range(3)]
    try:
        for connection in connections:
            consume(connection, "leases-parked", [])
        made = [connection.connection for connection in connections]
        until(env, lambda: sum(each.parked for each in made) == 1)
        watching, also, parked = sorted(each.leases._pause for each in made)
        assert max(watching, also) <= 30
        assert parked > 600
    finally:
        for connection in connections:
            connection.release()
