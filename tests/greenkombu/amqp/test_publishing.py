"""Publishes, confirms, returns and back-pressure, against a scripted broker."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import amqp
import pytest

from greenkombu._amqp import errors
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ConfirmTimeoutError,
    ConnectionBlocked,
    DeliveryError,
    UnroutableError,
)
from hub.environment import Environment
from tests.support.tasks import until

from .broker import Peer, connected, serve

# -- publishing


def confirming(peer: Peer, answer: Callable[[Peer, int, int], object]) -> None:
    """Number the publishes of a channel and let `answer(peer, channel, number)` confirm them."""
    count = 0

    def publish(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        answer(peer, channel_id, count)

    peer.serve(Basic_publish=publish)


def ack(peer: Peer, channel_id: int, number: int) -> None:
    peer.method(channel_id, "Basic.ack", number, False)


def test_publish_with_confirm_publish_waits_for_its_own_ack(env: Environment) -> None:
    held: list[int] = []

    def answer(peer: Peer, channel_id: int, number: int) -> None:
        held.append(number)
        if len(held) == 50:
            for each in sorted(held, reverse=True):
                peer.method(channel_id, "Basic.ack", each, False)

    with connected(lambda peer: confirming(peer, answer), confirm_publish=True) as connection:
        channel = connection.channel()
        tasks = [
            env.spawn(channel.basic_publish, amqp.Message(b"body"), "", "queue") for _ in range(50)
        ]
        for task in tasks:
            task.result(10)
        assert sorted(held) == list(range(1, 51))


def test_confirmed_publishes_of_many_tasks_go_out_together(env: Environment) -> None:
    if not env.green:
        pytest.skip("native threads send each for itself")
    with connected(lambda peer: confirming(peer, ack), confirm_publish=True) as connection:
        channel = connection.channel()
        channel.basic_publish(amqp.Message(b"first"), "", "queue")
        before = connection.stream.send_calls
        tasks = [
            env.spawn(channel.basic_publish, amqp.Message(b"body"), "", "queue") for _ in range(50)
        ]
        for task in tasks:
            task.result(10)
        # One at once, the others together.
        assert connection.stream.send_calls - before <= 3


def test_multiple_acks_and_nacks_are_matched_to_their_publishes() -> None:
    def answer(peer: Peer, channel_id: int, number: int) -> None:
        if number == 4:
            peer.method(channel_id, "Basic.nack", 3, False, False)
            peer.method(channel_id, "Basic.ack", 4, True)

    with connected(lambda peer: confirming(peer, answer)) as connection:
        channel = connection.channel()
        results = [
            channel.basic_publish_async(amqp.Message(b"body"), "ex", f"key{number}")
            for number in range(1, 5)
        ]
        for number, result in enumerate(results, 1):
            if number == 3:
                with pytest.raises(DeliveryError, match="'key3'") as caught:
                    result.result(5)
                assert isinstance(caught.value, amqp.exceptions.MessageNacked)
            else:
                result.result(5)
            assert result.done
            assert result.delivery_tag == number


def test_confirm_that_does_not_come_names_the_message_and_taints_the_connection() -> None:
    def answer(peer: Peer, channel_id: int, number: int) -> None:
        if number != 1:
            ack(peer, channel_id, number)

    with connected(
        lambda peer: confirming(peer, answer), confirm_publish=True, confirm_timeout=0.3
    ) as connection:
        channel = connection.channel()
        lost = channel.basic_publish_async(amqp.Message(b"1", message_id="m-1"), "ex", "key")
        # The others go on.
        channel.basic_publish(amqp.Message(b"body"), "ex", "key", confirm_timeout=10)
        with pytest.raises(ConfirmTimeoutError) as caught:
            lost.result()
        for part in ("number 1", "'ex'", "'key'", "m-1", "0.3 s"):
            assert part in str(caught.value)
        assert connection.suspect
        assert channel._confirms is not None
        assert channel._confirms.unconfirmed == {}


def test_confirm_that_a_blocked_broker_does_not_send_does_not_taint_the_connection() -> None:
    def answer(peer: Peer, channel_id: int, number: int) -> None:
        peer.method(0, "Connection.blocked", "low on memory")

    options = {"confirm_timeout": 0.3, "blocked_timeout": 0.2}
    with connected(
        lambda peer: confirming(peer, answer), confirm_publish=True, **options
    ) as connection:
        channel = connection.channel()
        with pytest.raises(ConfirmTimeoutError, match="low on memory"):
            channel.basic_publish(amqp.Message(b"body"), "ex", "key")
        assert not connection.suspect
        with pytest.raises(ConnectionBlocked):
            channel.basic_publish(amqp.Message(b"body"), "ex", "key")


def test_confirm_timeout_of_one_publish() -> None:
    with connected(
        lambda peer: confirming(peer, lambda *_: None), confirm_publish=True
    ) as connection:
        channel = connection.channel()
        started = time.monotonic()
        with pytest.raises(ConfirmTimeoutError):
            channel.basic_publish(amqp.Message(b"body"), "", "queue", confirm_timeout=0.1)
        with Deadline(0.1), pytest.raises(ConfirmTimeoutError):
            channel.basic_publish(amqp.Message(b"body"), "", "queue")
        assert time.monotonic() - started < 4


def test_lost_connection_tells_every_unconfirmed_publish() -> None:
    def script(peer: Peer) -> None:
        peer.open_channel()
        peer.expect("Confirm.select")
        for _ in range(3):
            peer.expect("Basic.publish")

    with connected(script) as connection:
        channel = connection.channel()
        results = [channel.basic_publish_async(amqp.Message(b"body"), "", "q") for _ in range(3)]
        for result in results:
            with pytest.raises(errors.ConnectionLostError):
                result.result(5)


def returning(peer: Peer, channel_id: int, number: int) -> None:
    """Return the second publish, then confirm."""
    if number == 2:
        head = peer.encode(channel_id, "Basic.return", 312, "NO_ROUTE", "ex", "key")
        peer.send(head + peer.encode_content(channel_id, b"second"))
    peer.method(channel_id, "Basic.ack", number, False)


def test_returned_message_fails_its_own_publish() -> None:
    with connected(lambda peer: confirming(peer, returning)) as connection:
        channel = connection.channel()
        results = [
            channel.basic_publish_async(amqp.Message(body), "ex", "key", mandatory=True)
            for body in (b"first", b"second", b"third")
        ]
        results[0].result(5)
        results[2].result(5)
        with pytest.raises(UnroutableError, match=r"NO_ROUTE.*'ex'.*'key'") as caught:
            results[1].result(5)
        assert isinstance(caught.value, amqp.exceptions.ChannelError)


def test_returned_message_goes_to_on_return_in_the_task_whose_publish_it_was(
    env: Environment,
) -> None:
    with connected(lambda peer: confirming(peer, returning), confirm_publish=True) as connection:
        channel = connection.channel()
        returned: list[Any] = []
        channel.events["basic_return"].add(lambda *given: returned.append((env.current(), *given)))
        channel.basic_publish(amqp.Message(b"first"), "ex", "key", mandatory=True)
        assert returned == []
        channel.basic_publish(amqp.Message(b"second"), "ex", "key", mandatory=True)
        task, error, exchange, routing_key, back = returned[0]
        assert task == env.current()
        assert isinstance(error, UnroutableError)
        assert (exchange, routing_key, back.body) == ("ex", "key", b"second")
        assert not connection.inbox  # where there are only publishers, it would fill


def test_error_of_on_return_is_raised_by_the_publish(env: Environment) -> None:
    def on_return(*given: Any) -> None:
        raise LookupError(given[2])

    with connected(lambda peer: confirming(peer, returning), confirm_publish=True) as connection:
        channel = connection.channel()
        channel.events["basic_return"].add(on_return)
        channel.basic_publish(amqp.Message(b"first"), "ex", "key", mandatory=True)
        with pytest.raises(LookupError, match="key"):
            channel.basic_publish(amqp.Message(b"second"), "ex", "key", mandatory=True)


@pytest.mark.parametrize("late", [False, True])
def test_return_of_a_publish_that_was_given_up_goes_to_the_draining_task(late: bool) -> None:
    def answer(peer: Peer, channel_id: int, number: int) -> None:
        """Return the first one, which is never confirmed, at once or behind the second."""
        if number == 1 + late:
            head = peer.encode(channel_id, "Basic.return", 312, "NO_ROUTE", "ex", "key")
            peer.send(head + peer.encode_content(channel_id, b"first"))
        if number == 2:
            peer.method(channel_id, "Basic.ack", number, False)

    with connected(lambda peer: confirming(peer, answer), confirm_publish=True) as connection:
        channel = connection.channel()
        returned: list[Any] = []
        channel.events["basic_return"].add(lambda *given: returned.append(given[3].body))
        with pytest.raises(ConfirmTimeoutError):
            channel.basic_publish(
                amqp.Message(b"first"), "ex", "key", mandatory=True, confirm_timeout=0.1
            )
        channel.basic_publish(amqp.Message(b"second"))
        assert returned == []
        connection.drain_events(timeout=5)
        assert returned == [b"first"]


def test_returned_message_goes_to_on_return_in_the_draining_task(env: Environment) -> None:
    with connected(lambda peer: confirming(peer, returning)) as connection:
        channel = connection.channel()
        returned: list[Any] = []
        channel.events["basic_return"].add(lambda *given: returned.append((env.current(), *given)))
        results = [
            channel.basic_publish_async(amqp.Message(body), "ex", "key", mandatory=True)
            for body in (b"first", b"second")
        ]
        for result in results:
            result.result(5)
        assert returned == []
        connection.drain_events(timeout=5)
        assert returned[0][0] == env.current()
        assert returned[0][4].body == b"second"


def test_window_bounds_the_unconfirmed_publishes(env: Environment) -> None:
    seen: list[int] = []

    def answer(peer: Peer, channel_id: int, number: int) -> None:
        seen.append(number)
        if number % 5 == 0:
            peer.method(channel_id, "Basic.ack", number, True)

    with connected(lambda peer: confirming(peer, answer), confirm_window=5) as connection:
        channel = connection.channel()
        results = []
        for _ in range(50):
            results.append(channel.basic_publish_async(amqp.Message(b"body"), "", "q"))
            assert channel._confirms is not None
            assert len(channel._confirms.unconfirmed) <= 5
        for result in results:
            result.result(5)


def test_full_window_is_a_bounded_wait() -> None:
    with connected(lambda peer: confirming(peer, lambda *_: None), confirm_window=2) as connection:
        channel = connection.channel()
        for _ in range(2):
            channel.basic_publish_async(amqp.Message(b"body"), "", "q")
        with pytest.raises(ConfirmTimeoutError, match="2 publishes wait"):
            channel.basic_publish_async(amqp.Message(b"body"), "", "q", timeout=0.1)


def test_blocked_connection_makes_publishes_wait_and_then_fail(env: Environment) -> None:
    unblock: list[bool] = []

    def script(peer: Peer) -> None:
        peer.open_channel()
        peer.method(0, "Connection.blocked", "low on memory")
        while not unblock:
            env.sleep(0.01)
        peer.method(0, "Connection.unblocked")
        peer.serve()

    told: list[Any] = []
    with connected(
        script,
        blocked_timeout=0.2,
        on_blocked=told.append,
        on_unblocked=lambda: told.append("again"),
    ) as connection:
        channel = connection.channel()
        until(env, lambda: connection.blocked)
        started = time.monotonic()
        with pytest.raises(ConnectionBlocked, match="low on memory"):
            channel.basic_publish(amqp.Message(b"body"), "", "queue")
        assert 0.1 < time.monotonic() - started < 10
        waiting = env.spawn(channel.basic_publish, amqp.Message(b"body"), "", "queue", timeout=5)
        env.sleep(0.05)
        assert not waiting.done
        unblock.append(True)
        waiting.result(5)
        connection.drain_events(timeout=5)
        connection.drain_events(timeout=5)
        assert told == ["low on memory", "again"]


def test_close_of_a_blocked_connection_is_quick(env: Environment) -> None:
    def script(peer: Peer) -> None:
        peer.method(0, "Connection.blocked", "low on disk")
        while True:
            peer.read(1)

    with connected(script, close_timeout=30) as connection:
        until(env, lambda: connection.blocked)
        started = time.monotonic()
        connection.close()
        assert time.monotonic() - started < 10


def test_publish_to_a_broker_that_reads_nothing_is_bounded(env: Environment) -> None:
    stop: list[bool] = []

    def script(peer: Peer) -> None:
        peer.open_channel()
        while not stop:
            env.sleep(0.02)

    with connected(script, write_timeout=0.3) as connection:
        channel = connection.channel()
        large = amqp.Message(bytes(1_000_000))

        def publish_on() -> None:
            for _ in range(100):
                channel.basic_publish(large, "", "queue")

        try:
            with pytest.raises(errors.WriteTimeoutError, match="took no data"):
                publish_on()
            assert connection.connected
        finally:
            stop.append(True)


def test_messages_of_many_tasks_on_one_channel_stay_whole(env: Environment) -> None:
    arrived: list[bytes] = []

    def script(peer: Peer) -> None:
        peer.serve()
        arrived.extend(body for _, body in peer.bodies)

    with connected(script) as connection:
        channel = connection.channel()

        def publish(number: int) -> None:
            for _ in range(20):
                channel.basic_publish(amqp.Message(b"%03d" % number * 5000), "", "queue")
                if number % 2:
                    env.sleep(0)

        tasks = [env.spawn(publish, number) for number in range(20)]
        for task in tasks:
            task.result(20)
        channel.queue_declare("q")
    assert len(arrived) == 400
    assert all(body == body[:3] * 5000 for body in arrived)


def test_argument_error_leaves_channel_and_connection_as_they_were() -> None:
    with connected(serve) as connection:
        channel = connection.channel()
        with pytest.raises(errors.ArgumentError, match="routing_key is 300 octets"):
            channel.basic_publish(amqp.Message(b"body"), "", "k" * 300)
        with pytest.raises(errors.ArgumentError, match=r"Queue\.declare: queue"):
            channel.queue_declare("q" * 256)
        with pytest.raises(errors.ArgumentError, match="application_headers"):
            channel.basic_publish(channel.prepare_message(b"", headers={"a": object()}), "", "q")
        assert channel.queue_declare("q").queue == "q"
