"""The memory transport: order, priorities, and what comes back."""

from __future__ import annotations

import gc
import pickle
import weakref
from typing import Any

import pytest

import hub
from greenkombu.connection import Connection
from greenkombu.exceptions import (
    StaleDeliveryError,
)
from greenkombu.transport import memory
from hub.environment import Environment
from tests.greenkombu.memory.support import bodies, declare, put
from tests.support.tasks import until


def test_b081_higher_priorities_come_first(channel: Any) -> None:
    declare(channel)
    for priority in (None, 0, 5, 9, 1, 5, 200, "odd"):
        put(channel, str(priority), priority=priority)
    assert bodies(channel) == [b"9", b"200", b"5", b"5", b"1", b"None", b"0", b"odd"]


def test_max_priority_of_the_queue_bounds_priorities(channel: Any) -> None:
    declare(channel, max_priority=20)
    for priority in (9, 15, 255, 20):
        put(channel, str(priority), priority=priority)
    assert bodies(channel) == [b"255", b"20", b"15", b"9"]


def test_b117_b154_requeued_messages_return_to_their_place(channel: Any) -> None:
    declare(channel)
    for number in range(5):
        put(channel, str(number))
    taken = [channel.basic_get("q") for _ in range(4)]
    # Found as over AMQP, where it is always there; and the dict is Kombu's, where it is not.
    assert [message.delivery_info["redelivered"] for message in taken] == [False] * 4
    assert not any("redelivered" in message.delivery_info for message in taken)
    with pytest.raises(KeyError, match="consumer_tag"):
        taken[0].delivery_info["consumer_tag"]
    copied = pickle.loads(pickle.dumps(taken[0].delivery_info))
    assert (type(copied), copied) == (dict, taken[0].delivery_info)
    for index in (2, 0, 3):
        taken[index].requeue()
    again = [channel.basic_get("q") for _ in range(4)]
    assert [message.body for message in again] == [b"0", b"2", b"3", b"4"]
    assert [message.delivery_info["redelivered"] for message in again] == [True, True, True, False]
    # The old handle of a message has nothing to do with its new delivery.
    channel.basic_ack(taken[0].delivery_tag)
    again[0].requeue()
    assert channel.basic_get("q").body == b"0"


def test_b099_b165_recover_redelivers_in_order(connection: Connection, channel: Any) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_consume("q", callback=got.append)
    for number in range(3):
        put(channel, str(number))
        connection.drain_events(timeout=10)
    with pytest.raises(NotImplementedError, match=r"recover\(requeue=False\)"):
        channel.basic_recover(requeue=False)
    assert channel.basic_recover(requeue=True) == []
    for _ in range(3):
        connection.drain_events(timeout=10)
    assert [message.body for message in got] == [b"0", b"1", b"2"] * 2
    assert all(message.delivery_info["redelivered"] for message in got[3:])


@pytest.mark.parametrize("how", ["channel.close", "connection.close", "connection.abort"])
def test_b153_unsettled_messages_return_when_their_consumer_goes(
    connection: Connection, channel: Any, how: str
) -> None:
    declare(channel)
    for number in range(3):
        put(channel, str(number))
    with Connection("memory://") as other:
        consuming = other.channel()
        taken = [consuming.basic_get("q") for _ in range(3)]
        taken[1].ack()
        if how == "channel.close":
            consuming.close()
        elif how == "connection.close":
            other.close()
        else:
            other.connection.abort(OSError("the network is down"))
        assert [message.body for message in map(channel.basic_get, "qq")] == [b"0", b"2"]
        if how != "channel.close":
            with pytest.raises(StaleDeliveryError):
                taken[0].ack()


def test_b153_restore_at_shutdown_false_drops_them(connection: Connection, channel: Any) -> None:
    declare(channel)
    put(channel)
    with Connection("memory://") as other:
        consuming = other.channel()
        consuming.qos.restore_at_shutdown = False
        consuming.basic_get("q")
        consuming.close()
    assert channel.basic_get("q") is None


def test_s19_unsettled_messages_of_a_dropped_connection_return(
    channel: Any, env: Environment
) -> None:
    declare(channel)
    put(channel)

    def use() -> weakref.ref[Any]:
        other = Connection("memory://")
        consuming = other.channel()
        consuming.basic_consume("q", callback=lambda message: None)
        other.drain_events(timeout=10)
        return weakref.ref(consuming)

    dropped = use()
    until(env, lambda: dropped() is None, collecting=True)
    message = channel.basic_get("q")
    assert message is not None
    assert message.delivery_info["redelivered"] is True


def test_s19_a_dropped_consumer_passes_its_message_on(connection: Connection, channel: Any) -> None:
    declare(channel)

    def consume() -> None:
        # Dropped with its connection, and not drained: it is told first, and takes nothing.
        other = Connection("memory://")
        other.cycle = other  # found by the collector only
        other.channel().basic_consume("q", callback=print)
        with pytest.raises(TimeoutError):
            other.drain_events(timeout=0)

    consume()
    got: list[Any] = []
    channel.basic_consume("q", True, got.append)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    put(channel)
    gc.collect()
    connection.drain_events(timeout=10)
    assert len(got) == 1


def test_s19_collecting_in_a_hub_callback_gives_everything_back(
    channel: Any, env: Environment
) -> None:
    declare(channel)
    for number in range(20):
        put(channel, str(number))

    def use(number: int) -> None:
        other = Connection("memory://")
        other.cycle = [other]  # found by the collector only
        consuming = other.channel()
        consuming.queue_declare(f"exclusive{number}", exclusive=True)
        consuming.queue_declare(f"auto{number}", auto_delete=True)
        consuming.basic_consume(f"auto{number}", callback=lambda message: consuming)
        consuming.basic_consume("q", callback=lambda message: consuming)
        other.drain_events(timeout=10)

    gc.disable()
    try:
        for number in range(20):
            use(number)
        assert len(channel.queues["q"]) == 0
        collected = env.waiter()

        def collect() -> None:
            gc.collect()
            collected.wake()

        hub.get_hub().call_soon_threadsafe(collect)
        assert collected.wait(10)
    finally:
        gc.enable()
    assert list(channel.queues) == ["q"]
    assert len(memory.broker.registry) == 1
    messages = [channel.basic_get("q", no_ack=True) for _ in range(20)]
    assert [message.body for message in messages] == [b"%d" % number for number in range(20)]
    assert all(message.delivery_info["redelivered"] for message in messages)
