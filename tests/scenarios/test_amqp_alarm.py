"""A broker that blocks publishers, or that is frozen."""

from __future__ import annotations

from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.exceptions import ConnectionBlocked
from greenkombu.messaging import Producer
from hub.environment import Environment
from tests.scenarios.broker import QUICK, Broker, took
from tests.support.tasks import LONG, until
from tests.support.ticker import Ticker


def test_s09_a_memory_alarm_blocks_publishers_for_a_bounded_time_only(
    env: Environment, own_broker: Broker, ticker: Ticker
) -> None:
    server = own_broker.server
    queue = own_broker.queue()
    blocked: list[Any] = []
    body = b"x" * 100_000
    options = {
        **QUICK,
        "blocked_timeout": 0.7,
        "on_blocked": lambda reason: blocked.append(reason),
        "on_unblocked": lambda: blocked.append(None),
    }
    connection = Connection(own_broker.url, transport_options=options)
    producer = Producer(connection, routing_key=queue)
    producer.publish(body)

    def publish(producer: Producer, sent: list[int]) -> float:
        """Publish until it is refused; return how long that took."""
        with pytest.raises(ConnectionBlocked, match=str(server.port)):
            publish_all(producer, sent, waiting := took())
        return waiting.seconds

    def publish_all(producer: Producer, sent: list[int], waiting: took) -> None:
        for number in range(200):
            with waiting:
                producer.publish(body)
            sent.append(number)

    server.block()
    try:
        ticker.reset()
        # The broker says that it blocks when the first publish after the alarm arrives.
        sent: list[int] = []
        assert 0.6 < publish(producer, sent) < LONG
        first = len(sent)
        others = [env.spawn(publish, producer, sent) for _ in range(5)]
        for task in others:
            assert 0.6 < task.result(2 * LONG) < LONG
        assert len(sent) == first
        assert ticker.ticks > 20
        # What is no publish works on; connections that publish nothing are not blocked.
        with Connection(own_broker.url, transport_options=QUICK) as reader:
            assert reader.channel().queue_declare(queue, passive=True).queue == queue
        with Connection(own_broker.url, transport_options=options) as another:
            assert publish(Producer(another, routing_key=queue), []) < LONG
            with took() as closing:
                another.close()
            assert closing.seconds < 10
    finally:
        server.unblock()
    until(env, lambda: connection.connection.blocked is None)
    producer.publish(b"afterwards")
    while len(blocked) < 2:
        connection.drain_events(timeout=LONG)
    assert isinstance(blocked[0], str)
    assert blocked[1] is None
    arrived: list[Any] = []
    while b"afterwards" not in arrived:
        more = own_broker.bodies(queue, 1)
        assert more, "what was published after the alarm is lost"
        arrived += more
    connection.close()


@pytest.mark.faults
def test_s09_a_publish_that_waits_goes_out_when_the_alarm_ends(
    env: Environment, own_broker: Broker
) -> None:
    server = own_broker.server
    queue = own_broker.queue()
    with Connection(
        own_broker.url, transport_options={**QUICK, "blocked_timeout": 60}
    ) as connection:
        producer = Producer(connection, routing_key=queue)
        server.block()
        try:
            producer.publish("makes the broker say so")
            until(env, lambda: connection.connection.blocked)
            waiting = env.spawn(producer.publish, "waits")
            env.sleep(0.2)
            assert not waiting.done
        finally:
            server.unblock()
        waiting.result(LONG)
        assert own_broker.bodies(queue, 2) == ["makes the broker say so", "waits"]


@pytest.mark.faults
def test_s22_every_call_on_a_frozen_broker_ends_by_its_bound(
    env: Environment, own_broker: Broker
) -> None:
    queue = own_broker.queue()
    options = {"rpc_timeout": 0.5, "confirm_timeout": 0.5, "close_timeout": 0.5}
    connection = Connection(own_broker.url, transport_options=options)
    confirmed = Connection(own_broker.url, transport_options={**options, "confirm_publish": True})
    channel = connection.channel()
    producer = Producer(confirmed, routing_key=queue)
    producer.publish("before")
    own_broker.server.freeze()
    try:
        for request in (
            lambda: channel.queue_declare(queue, passive=True),
            lambda: connection.channel(),
            lambda: connection.drain_events(timeout=0.5),
            lambda: producer.publish("never confirmed"),
            lambda: Connection(own_broker.url, connect_timeout=0.5).connect(),
        ):
            with took() as time_of, pytest.raises(TimeoutError):
                request()
            assert 0.4 < time_of.seconds < 8
        for each in (connection, confirmed):
            with took() as closing:
                each.close()
            assert closing.seconds < 8
    finally:
        own_broker.server.thaw()
