"""The memory transport: time limits, length limits, and dead letters."""

from __future__ import annotations

from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.exceptions import (
    ChannelError,
    DeliveryError,
)
from greenkombu.messaging import Producer
from hub.environment import Environment
from tests.greenkombu.memory.support import bodies, declare, put, wait_for

# -- time limits


def test_b087_a_message_expires(channel: Any, env: Environment) -> None:
    declare(channel)
    put(channel, b"short", properties={"expiration": "30"})
    put(channel, b"long", properties={"expiration": "60000"})
    put(channel, b"endless")
    env.sleep(0.06)
    assert bodies(channel) == [b"long", b"endless"]


def test_b087_producer_expiration(connection: Connection, env: Environment) -> None:
    producer = Producer(connection)
    queue = Queue("q")(connection.default_channel)
    queue.declare()
    message = None
    while message is None:  # or it is over already
        producer.publish("x", routing_key="q", expiration=0.03)
        message = queue.get()
    assert message.properties["expiration"] == "30"
    message.requeue()
    env.sleep(0.06)
    assert queue.get() is None


@pytest.mark.parametrize("expiration", ["soon", "-5", "1.5", None])
def test_an_impossible_expiration_is_refused(channel: Any, expiration: Any) -> None:
    declare(channel)
    if expiration is None:
        put(channel, properties={"expiration": None})
        return
    with pytest.raises(ChannelError, match=f"invalid expiration '{expiration}'"):
        put(channel, properties={"expiration": expiration})
    assert bodies(channel) == []


def test_the_shorter_time_limit_counts(channel: Any, env: Environment) -> None:
    declare(channel, message_ttl=40)
    put(channel, b"queue's", properties={"expiration": "60000"})
    put(channel, b"own", properties={"expiration": "10"})
    env.sleep(0.08)
    assert bodies(channel) == []


def test_expired_messages_go_while_nobody_looks(channel: Any, env: Environment) -> None:
    declare(channel, message_ttl=30)
    for _ in range(500):
        put(channel)
    queue = channel.queues["q"]
    wait_for(lambda: not len(queue), env)


def test_expired_messages_go_behind_one_that_does_not_expire(
    channel: Any, env: Environment
) -> None:
    declare(channel, message_ttl=60_000)
    declare(channel, "other")
    put(channel, b"long", queue="other")
    put(channel, b"short", queue="other", properties={"expiration": "20"})
    queue = channel.queues["other"]
    env.sleep(0.05)
    assert channel.basic_get("other").body == b"long"
    wait_for(lambda: not len(queue), env)


def test_an_unused_queue_expires(channel: Any, env: Environment) -> None:
    def used() -> bool:
        """Whether a queue of 0.08 s that is used every 0.04 s lives for 0.16 s."""
        declare(channel, expires=80)
        channel.exchange_declare("e")
        channel.queue_bind("q", "e", "k")
        try:
            for _ in range(4):  # a get is a use
                env.sleep(0.04)
                channel.basic_get("q")
            channel.basic_consume("q", callback=print, consumer_tag="t")
        except ChannelError:
            return False
        return True

    assert any(used() for _ in range(10))  # a machine that stands still uses nothing
    env.sleep(0.15)
    assert "q" in channel.queues
    channel.basic_cancel("t")
    wait_for(lambda: "q" not in channel.queues, env)
    assert list(channel.list_bindings()) == []


# -- length limits


def test_a_full_queue_drops_its_oldest(channel: Any) -> None:
    declare(channel, max_length=2)
    for number in range(5):
        put(channel, str(number))
    assert bodies(channel) == [b"3", b"4"]


def test_a_full_queue_counts_bytes(channel: Any) -> None:
    channel.body_encoding = None
    declare(channel, max_length_bytes=10)
    for number in range(5):
        put(channel, str(number) * 4)
    assert bodies(channel) == [b"3333", b"4444"]
    put(channel, "x" * 11)
    assert bodies(channel) == []
    put(channel, "y" * 10)
    message = channel.basic_get("q")
    message.requeue()
    put(channel, "z")
    assert bodies(channel) == [b"z"]


def test_a_full_queue_can_refuse(channel: Any) -> None:
    declare(channel, max_length=1, overflow="reject-publish")
    put(channel, b"first")
    put(channel, b"second")
    channel.confirm_publish = True
    with pytest.raises(DeliveryError, match="queue 'q' is full"):
        put(channel, b"third")
    assert bodies(channel) == [b"first"]


# -- dead letters


@pytest.fixture
def dead(channel: Any) -> Any:
    channel.exchange_declare("dlx", "topic")
    declare(channel, "dead")
    channel.queue_bind("dead", "dlx", "#")
    return channel


def test_rejected_messages_are_dead_lettered(dead: Any) -> None:
    declare(dead, dead_letter_exchange="dlx")
    put(dead, b"body", headers={"h": 1}, priority=3)
    dead.basic_get("q").reject()
    message = dead.basic_get("dead")
    assert message.body == b"body"
    assert message.delivery_info == {"exchange": "dlx", "routing_key": "q"}
    assert message.headers["h"] == 1
    assert message.properties["priority"] == 3
    (death,) = message.headers["x-death"]
    assert death.pop("time").year >= 2024
    assert death == {
        "count": 1,
        "exchange": "",
        "queue": "q",
        "reason": "rejected",
        "routing-keys": ["q"],
    }
    for which in ("first", "last"):
        assert message.headers[f"x-{which}-death-queue"] == "q"
        assert message.headers[f"x-{which}-death-reason"] == "rejected"
        assert message.headers[f"x-{which}-death-exchange"] == ""


def test_without_a_dead_letter_exchange_rejected_messages_go(channel: Any) -> None:
    declare(channel)
    put(channel)
    channel.basic_get("q").reject()
    assert bodies(channel) == []


def test_a_dead_letter_routing_key(dead: Any) -> None:
    declare(dead, dead_letter_exchange="", dead_letter_routing_key="dead")
    put(dead)
    dead.basic_get("q").reject()
    assert dead.basic_get("dead").delivery_info == {"exchange": "", "routing_key": "dead"}


def test_expired_messages_are_dead_lettered_to_a_waiting_consumer(
    connection: Connection, dead: Any
) -> None:
    declare(dead, dead_letter_exchange="dlx", message_ttl=30)
    got: list[Any] = []
    dead.basic_consume("dead", True, got.append)
    put(dead, properties={"expiration": "60000"})
    connection.drain_events(timeout=10)
    (message,) = got
    (death,) = message.headers["x-death"]
    assert (death["reason"], death["original-expiration"]) == ("expired", "60000")
    assert "expiration" not in message.properties


def test_what_a_full_queue_drops_is_dead_lettered(dead: Any) -> None:
    declare(dead, dead_letter_exchange="dlx", max_length=1)
    put(dead, b"1")
    put(dead, b"2")
    message = dead.basic_get("dead")
    assert message.body == b"1"
    assert message.headers["x-death"][0]["reason"] == "maxlen"
    declare(dead, "r", dead_letter_exchange="dlx", max_length=1, overflow="reject-publish-dlx")
    put(dead, b"3", queue="r")
    put(dead, b"4", queue="r")
    assert dead.basic_get("dead").body == b"4"
    assert bodies(dead, "r") == [b"3"]


def test_deaths_are_counted(dead: Any) -> None:
    declare(dead, dead_letter_exchange="dlx")
    declare(dead, "dead2")
    dead.exchange_declare("back")
    put(dead)
    for count in (1, 2, 3):
        dead.basic_get("q").reject()
        message = dead.basic_get("dead")
        assert message.headers["x-death"][0]["count"] == count
        dead.basic_publish(dead.prepare_message(message.body, headers=message.headers), "", "q")
        message.ack()


def test_dead_letters_do_not_go_round_for_ever(channel: Any, env: Environment) -> None:
    declare(channel, "a", dead_letter_exchange="", dead_letter_routing_key="b", message_ttl=10)
    declare(channel, "b", dead_letter_exchange="", dead_letter_routing_key="a", message_ttl=10)
    put(channel, queue="a")
    wait_for(lambda: not channel.queues["a"] and not channel.queues["b"], env)
    env.sleep(0.05)
    assert bodies(channel, "a") == bodies(channel, "b") == []


def test_a_long_chain_of_full_queues_does_not_recurse(channel: Any) -> None:
    length = 600
    for number in range(length):
        arguments = {"dead_letter_exchange": "", "dead_letter_routing_key": f"q{number + 1}"}
        declare(channel, f"q{number}", max_length=0, **arguments)
    declare(channel, f"q{length}")
    put(channel, queue="q0")
    message = channel.basic_get(f"q{length}")
    assert len(message.headers["x-death"]) == length


def test_dead_letters_to_a_missing_exchange_are_dropped(channel: Any) -> None:
    declare(channel, dead_letter_exchange="none")
    put(channel)
    channel.basic_get("q").reject()
    assert bodies(channel) == []


@pytest.mark.parametrize("deaths", ["text", [5], [{"queue": "q", "count": "many"}], {"a": 1}])
def test_a_strange_x_death_header_does_no_harm(dead: Any, deaths: Any) -> None:
    declare(dead, dead_letter_exchange="dlx")
    put(dead, headers={"x-death": deaths})
    dead.basic_get("q").reject()
    assert dead.basic_get("dead").headers["x-death"][0]["reason"] == "rejected"
