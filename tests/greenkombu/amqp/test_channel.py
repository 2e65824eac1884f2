"""Channels and their consumers, against a scripted broker.

The file is long because the module under test is one state machine: opening, consuming and closing
are tried against each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import amqp
import pytest
from amqp.exceptions import ChannelError

from greenkombu._amqp import errors
from greenkombu._amqp.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ConnectionBlocked,
    NotFoundError,
    StaleDeliveryError,
)
from hub.environment import Environment
from tests.support.tasks import until

from .broker import QUICK, Peer, connected, scripted, serve

# -- channels


def test_channel_error_closes_that_channel_only() -> None:
    def declare(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        if values[1] == "missing":
            peer.method(channel_id, "Channel.close", 404, "NOT_FOUND - no queue 'missing'", 50, 10)
        else:
            peer.method(channel_id, "Queue.declare_ok", values[1], 0, 0)

    with connected(lambda peer: peer.serve(Queue_declare=declare)) as connection:
        bad, good = connection.channel(), connection.channel()
        with pytest.raises(amqp.exceptions.NotFound, match="no queue 'missing'") as caught:
            bad.queue_declare("missing", passive=True)
        assert isinstance(caught.value, NotFoundError)
        assert bad.closed
        assert not bad.is_open
        with pytest.raises(amqp.exceptions.RecoverableChannelError, match="closed by the broker"):
            bad.queue_declare("other")
        assert good.queue_declare("other").queue == "other"
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
        bad.close()


def test_channel_error_reaches_the_draining_task_when_it_had_consumers() -> None:
    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Basic.qos")
        _, values = peer.expect("Basic.consume")
        peer.method(channel_id, "Basic.qos_ok")
        peer.method(channel_id, "Basic.consume_ok", values[2])
        peer.method(channel_id, "Channel.close", 406, "PRECONDITION_FAILED - timeout", 0, 0)
        peer.expect("Channel.close_ok")
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        channel.basic_consume("queue", callback=print)
        with pytest.raises(amqp.exceptions.PreconditionFailed):
            connection.drain_events(timeout=5)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)


def test_consumer_that_cannot_be_started_concerns_only_the_task_that_starts_it() -> None:
    def consume(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        peer.method(channel_id, "Channel.close", 404, "NOT_FOUND - no queue", 60, 20)

    with connected(lambda peer: peer.serve(Basic_consume=consume)) as connection:
        channel = connection.channel()
        with pytest.raises(NotFoundError):
            channel.basic_consume("missing", callback=print)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)


def test_number_of_a_channel_comes_back_only_when_the_broker_agrees(env: Environment) -> None:
    let_go = []

    def close(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        while not let_go:
            env.sleep(0.005)
        peer.method(channel_id, "Channel.close_ok")

    def script(peer: Peer) -> None:
        peer.serve(Channel_close=close)

    with connected(script, close_timeout=0.1) as connection:
        first = connection.channel()
        assert first.channel_id == 1
        first.close()  # the broker does not answer in time
        assert first.closed
        let_go.append(True)
        second = connection.channel()
        third = connection.channel()
        assert sorted({second.channel_id, third.channel_id}) in ([1, 2], [2, 3])
        until(env, lambda: len(connection.table) == 2)
        second.close()
        assert connection.channel().channel_id in (1, 2, 3)


def channel_methods(peer: Peer) -> list[str]:
    """Channel.open and Channel.close as they came, with their channel."""
    return [
        f"{name.partition('.')[2]} {channel_id}"
        for channel_id, name, _ in peer.received
        if name in ("Channel.open", "Channel.close")
    ]


@contextlib.contextmanager
def occupied(env: Environment, connection: Connection) -> Iterator[None]:
    """Keep another native thread inside an exclusive step: those of the block have to wait."""
    hold = env.original("_thread", "allocate_lock")()
    hold.acquire()
    entered: list[bool] = []

    def step() -> bytes:
        entered.append(True)
        hold.acquire()
        return b""

    env.original("_thread", "start_new_thread")(connection.exclusive, (step,))
    try:
        until(env, lambda: entered)
        yield
    finally:
        hold.release()


def test_channel_given_up_before_its_open_went_out_is_not_closed_at_the_broker(
    env: Environment,
) -> None:
    seen: list[str] = []

    def script(peer: Peer) -> None:
        peer.serve()
        seen.extend(channel_methods(peer))

    with connected(script) as connection:
        with (
            occupied(env, connection),
            Deadline(0.02),
            pytest.raises(errors.RPCTimeoutError),
        ):
            connection.channel()
        good = connection.channel()
        until(env, lambda: len(connection.table) == 1)
        good.close()
    assert seen in (["open 1", "close 1"], ["open 2", "close 2"])


def test_close_that_was_given_up_before_it_went_out_still_goes_out(env: Environment) -> None:
    seen: list[str] = []

    def script(peer: Peer) -> None:
        peer.serve()
        seen.extend(channel_methods(peer))

    with connected(script) as connection:
        channel = connection.channel()
        with occupied(env, connection), Deadline(0.02):
            channel.close()
        assert channel.closed
        other = connection.channel()
        until(env, lambda: len(connection.table) == 1)
        assert other.is_open
    assert seen == ["open 1", "close 1", "open 2"]


@pytest.mark.parametrize("ours_first", [False, True])
def test_both_sides_close_a_channel_at_once(env: Environment, ours_first: bool) -> None:
    """Ours must not arrive behind our answer to theirs: the broker would not know the channel."""
    seen: list[str] = []
    go: list[bool] = []

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        until(env, lambda: go)
        peer.method(channel_id, "Channel.close", 404, "NOT_FOUND", 50, 10)
        peer.serve()
        seen.extend(f"{name.partition('.')[2]} {number}" for number, name, _ in peer.received)

    with connected(script) as connection:
        channel = connection.channel()
        with occupied(env, connection):
            if not ours_first:
                go.append(True)
                until(env, lambda: len(connection._steps) == 1)
            closer = env.spawn(channel.close)
            until(env, lambda: len(connection._steps) == 2 - ours_first)
            if ours_first:
                go.append(True)
                until(env, lambda: len(connection._steps) == 2)
        again = connection.channel()
        closer.result(5)
        assert again.is_open
        until(env, lambda: len(connection.table) == 1)
    if ours_first:
        assert seen[4:7] == ["close 1", "close_ok 1", "open 2"]
    else:
        assert seen[4:6] == ["close_ok 1", "open 2"]
        assert "close 1" not in seen


def test_channels_of_dead_tasks_come_back(env: Environment) -> None:
    def script(peer: Peer) -> None:
        peer.handshake(channel_max=8)
        peer.serve()

    with scripted(script) as host:
        connection = Connection(host, channel_timeout=5, **QUICK)
        connection.connect()

        def work() -> int:
            number: int = connection.channel().channel_id
            return number

        numbers = [env.spawn(work).result(5) for _ in range(60)]
        assert max(numbers) <= 8
        until(env, lambda: len(connection.table) == 0)
        connection.close()


def test_all_channels_in_use_is_a_bounded_wait_and_a_typed_error() -> None:
    def script(peer: Peer) -> None:
        peer.handshake(channel_max=3)
        peer.serve()

    with scripted(script) as host:
        connection = Connection(host, channel_timeout=0.1, **QUICK)
        connection.connect()
        kept = [connection.channel() for _ in range(3)]
        with pytest.raises(errors.ChannelLimitError, match="all 3 channels"):
            connection.channel()
        kept.pop().close()
        assert connection.channel().channel_id == 3
        connection.close()


def full_connection(host: str, **options: Any) -> tuple[Connection, list[Any]]:
    """A connection whose two channels are in use, and these."""
    connection = Connection(host, **{"channel_timeout": 5, **QUICK, **options})
    connection.connect()
    return connection, [connection.channel(), connection.channel()]


def two_channels(peer: Peer) -> None:
    peer.handshake(channel_max=2)
    peer.serve()


def test_numbers_that_come_back_go_to_those_who_wait_in_their_order(env: Environment) -> None:
    with scripted(two_channels) as host:
        connection, held = full_connection(host)
        order: list[int] = []

        def work(name: int) -> None:
            channel = connection.channel()
            order.append(name)
            held.append(channel)

        tasks = []
        for name in range(6):
            tasks.append(env.spawn(work, name))
            until(env, lambda name=name: len(connection.table._tickets) == name + 1)
        for done in range(6):
            held.pop(0).close()
            # Who comes now is behind them, also when a number is just on its way.
            with Deadline(0), pytest.raises(errors.ChannelLimitError):
                connection.channel()
            tasks[done].result(5)
            assert order == list(range(done + 1))
        for channel in held:
            channel.close()
        assert len(connection.table) == 0
        assert not connection.table._tickets
        connection.close()


@pytest.mark.parametrize("given", [False, True], ids=["before", "when it was given the number"])
def test_number_of_a_waiter_that_is_killed_goes_to_the_next(env: Environment, given: bool) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    with scripted(two_channels) as host:
        connection, held = full_connection(host)
        table = connection.table
        first = env.spawn(connection.channel)
        until(env, lambda: len(table._tickets) == 1)
        second = env.spawn(connection.channel)
        until(env, lambda: len(table._tickets) == 2)
        if given:
            # As the hub does when Channel.close_ok comes; the first has not run since.
            number = held[0].channel_id
            held.pop(0).close()
            assert list(table._tickets) == list(table._tickets)[-1:]
            first.kill()
            assert second.result(5).channel_id == number
        else:
            first.kill()
            assert first.join(5)
            assert len(table._tickets) == 1
            number = held[0].channel_id
            held.pop(0).close()
            assert second.result(5).channel_id == number
        held.append(second.result(5))
        held[0].close()
        assert connection.channel().is_open
        assert not table._tickets
        connection.close()


def test_who_waits_for_a_number_hears_that_the_connection_is_lost(env: Environment) -> None:
    with scripted(two_channels) as host:
        connection, held = full_connection(host)
        waiting = [env.spawn(connection.channel) for _ in range(3)]
        until(env, lambda: len(connection.table._tickets) == 3)
        connection.abort(errors.ConnectionLostError("lost"))
        for task in waiting:
            with pytest.raises(errors.ConnectionLostError):
                task.result(5)
        assert not connection.table._tickets
        assert all(channel.closed for channel in held)


@pytest.mark.parametrize("confirmed", [False, True])
@pytest.mark.parametrize("how", ["close", "broker"])
def test_publish_that_waited_for_room_on_a_channel_that_was_closed_sends_nothing(
    env: Environment, how: str, confirmed: bool
) -> None:
    go = env.Event()
    after: list[str] = []

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        other = peer.open_channel()
        peer.method(0, "Connection.blocked", "low on memory")
        if how == "broker":
            go.wait(10)
            peer.method(channel_id, "Channel.close", 404, "NOT_FOUND", 50, 10)
            peer.expect("Channel.close_ok")
        else:
            peer.expect("Channel.close")
            peer.method(channel_id, "Channel.close_ok")
        peer.method(0, "Connection.unblocked")
        while "Queue.declare" not in after:
            after.append(peer.next_method()[1])
        peer.method(other, "Queue.declare_ok", "q", 0, 0)
        peer.serve()

    with connected(script) as connection:
        channel, other = connection.channel(), connection.channel()
        until(env, lambda: connection.blocked)
        publish = channel.basic_publish_confirm if confirmed else channel.basic_publish
        task = env.spawn(publish, channel.prepare_message(b"x"), "", "q")
        until(env, lambda: len(connection.gate))
        if how == "close":
            channel.close()
        go.set()
        with pytest.raises(ChannelError):
            task.result(5)
        other.queue_declare("q")
        assert after == ["Queue.declare"], "nothing may follow on a closed channel"
        assert connection.connected


def test_channel_by_number() -> None:
    with connected(serve) as connection:
        seven = connection.channel(7)
        assert seven.channel_id == 7
        assert connection.channel(7) is seven
        others = [connection.channel() for _ in range(8)]
        assert sorted(channel.channel_id for channel in others) == [1, 2, 3, 4, 5, 6, 8, 9]
        assert set(connection.channels) == set(range(1, 10))


# -- consuming


def consuming(peer: Peer, *bodies: bytes) -> int:
    """Open a channel, start its consumer, deliver."""
    channel_id = peer.open_channel()
    tag = ""
    while not tag:
        _, name, values = peer.next_method()
        if name == "Basic.qos":
            peer.method(channel_id, "Basic.qos_ok")
        else:
            assert name == "Basic.consume"
            tag = values[2]
    # Answer and deliveries in one segment: nothing may come between for the client.
    data = peer.encode(channel_id, "Basic.consume_ok", tag)
    for number, body in enumerate(bodies, 1):
        data += peer.encode_delivery(channel_id, tag, number, body)
    peer.send(data)
    return channel_id


def test_first_delivery_right_behind_the_answer_is_not_lost() -> None:
    def script(peer: Peer) -> None:
        consuming(peer, b"one", b"two", b"three")
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        got: list[bytes] = []
        channel.basic_consume("queue", callback=lambda each: got.append(each.body))
        for _ in range(3):
            connection.drain_events(timeout=5)
        assert got == [b"one", b"two", b"three"]


def test_consumers_that_ack_get_a_default_prefetch_unless_one_was_set() -> None:
    asked: list[Any] = []

    def script(peer: Peer) -> None:
        def qos(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
            asked.append((channel_id, values))
            peer.method(channel_id, "Basic.qos_ok")

        peer.serve(Basic_qos=qos)

    with connected(script, default_prefetch=77) as connection:
        connection.channel().basic_consume("queue", callback=print)
        connection.channel().basic_consume("queue", callback=print, no_ack=True)
        third = connection.channel()
        third.basic_qos(0, 5, False)
        third.basic_consume("queue", callback=print)
        third.basic_consume("queue", callback=print)
        fourth = connection.channel()
        with pytest.raises(errors.ArgumentError):
            fourth.basic_qos(0, 70_000, False)
        fourth.basic_consume("queue", callback=print)
    assert asked == [(1, (0, 77, False)), (3, (0, 5, False)), (4, (0, 77, False))]


def test_acks_go_out_and_bad_tags_are_refused() -> None:
    settled: list[Any] = []

    def script(peer: Peer) -> None:
        consuming(peer, b"one")
        for _ in range(4):
            settled.append(peer.next_method()[1:])
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        channel.basic_consume("queue", callback=lambda each: channel.basic_ack(each.delivery_tag))
        connection.drain_events(timeout=5)
        channel.basic_ack(9, multiple=True)
        channel.basic_reject(10, requeue=True)
        channel.basic_nack(11, multiple=True, requeue=True)
        with pytest.raises(errors.ArgumentError):
            channel.basic_ack("one")
        connection.channel()  # a round trip: everything before it has arrived
    assert settled == [
        ("Basic.ack", (1, False)),
        ("Basic.ack", (9, True)),
        ("Basic.reject", (10, True)),
        ("Basic.nack", (11, True, True)),
    ]


def test_ack_after_the_connection_was_lost_is_a_stale_delivery() -> None:
    def script(peer: Peer) -> None:
        consuming(peer, b"one")

    with connected(script) as connection:
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume("queue", callback=got.append)
        with contextlib.suppress(errors.ConnectionLostError):
            while True:
                connection.drain_events(timeout=5)
        tag = got[0].delivery_tag if got else 1
        for settle in (channel.basic_ack, channel.basic_reject, channel.basic_nack):
            with pytest.raises(StaleDeliveryError, match="delivers the message again") as caught:
                settle(tag)
        assert isinstance(caught.value, amqp.exceptions.RecoverableConnectionError)


def test_cancelled_consumer_gives_waiting_messages_back() -> None:
    settled: list[Any] = []

    def script(peer: Peer) -> None:
        consuming(peer, b"one", b"two")
        peer.serve(
            Basic_reject=lambda peer, channel_id, values: settled.append(values),
        )

    with connected(script) as connection:
        channel = connection.channel()
        got: list[bytes] = []
        tag = channel.basic_consume("queue", callback=lambda each: got.append(each.body))
        connection.drain_events(timeout=5)
        channel.basic_cancel(tag)
        channel.basic_cancel(tag)
        channel.basic_cancel("unknown")
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.1)
        connection.channel()
    assert got == [b"one"]
    assert settled == [(2, True)]


def test_cancelled_no_ack_consumer_still_gets_what_exists_nowhere_else() -> None:
    def script(peer: Peer) -> None:
        consuming(peer, b"one", b"two")
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        got: list[bytes] = []
        tag = channel.basic_consume(
            "queue", callback=lambda each: got.append(each.body), no_ack=True
        )
        connection.drain_events(timeout=5)
        channel.basic_cancel(tag)
        connection.drain_events(timeout=5)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.05)
        assert got == [b"one", b"two"]
        assert not channel._retired


@pytest.mark.parametrize("with_callback", [False, True])
def test_consumer_that_the_broker_cancels_is_told_behind_its_last_message(
    with_callback: bool,
) -> None:
    def script(peer: Peer) -> None:
        channel_id = consuming(peer, b"last")
        peer.method(channel_id, "Basic.cancel", "tag", True)
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume(
            "queue",
            "tag",
            callback=lambda each: got.append(each.body),
            on_cancel=got.append if with_callback else None,
        )
        connection.drain_events(timeout=5)
        if with_callback:
            connection.drain_events(timeout=5)
            assert got == [b"last", "tag"]
        else:
            with pytest.raises(amqp.exceptions.ConsumerCancelled, match="'tag'"):
                connection.drain_events(timeout=5)
            assert got == [b"last"]
        assert "tag" not in channel.callbacks


def test_tag_in_use_and_missing_callback_are_refused_before_anything_is_sent() -> None:
    with connected(serve) as connection:
        channel = connection.channel()
        channel.basic_consume("queue", "tag", callback=print)
        with pytest.raises(errors.ArgumentError, match="'tag' is in use"):
            channel.basic_consume("queue", "tag", callback=print)
        with pytest.raises(errors.ArgumentError, match="needs a callback"):
            channel.basic_consume("queue", "other")
        assert channel.queue_declare("q").queue == "q"


def test_callback_that_publishes_on_its_own_connection_does_not_recurse() -> None:
    published: list[bytes] = []
    bodies = [b"%d" % number for number in range(500)]

    def script(peer: Peer) -> None:
        consuming(peer, *bodies)
        peer.serve()
        published.extend(body for _, body in peer.bodies)

    with connected(script) as connection:
        channel = connection.channel()

        def forward(each: Any) -> None:
            channel.basic_publish(amqp.Message(each.body), "", "other")
            channel.queue_declare("other")

        channel.basic_consume("queue", callback=forward, no_ack=True)
        for _ in bodies:
            connection.drain_events(timeout=5)
    assert published == bodies


def test_flow_holds_messages_back_and_hands_them_over(env: Environment) -> None:
    go: list[bool] = []

    def script(peer: Peer) -> None:
        channel_id = consuming(peer)
        peer.expect("Queue.declare")
        peer.method(channel_id, "Queue.declare_ok", "q", 0, 0)
        until(env, lambda: go)  # nothing is held back while an answer is awaited
        for number in range(1, 101):
            peer.deliver(channel_id, "tag", number, b"x" * 1000)
        peer.serve()

    with connected(script, inbox_messages=20) as connection:
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume("queue", "tag", callback=got.append, no_ack=True)
        assert channel.flow(False) is False
        assert channel.flow(False) is False
        channel.queue_declare("q")
        go.append(True)
        until(env, lambda: connection.intake.paused)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.1)
        assert connection.intake.paused
        assert got == []
        assert channel.flow(True) is True
        while len(got) < 100:
            connection.drain_events(timeout=5)
        assert [each.delivery_tag for each in got] == list(range(1, 101))


def test_socket_is_not_read_while_too_much_waits_but_for_an_answer_it_is(
    env: Environment,
) -> None:
    def script(peer: Peer) -> None:
        channel_id = consuming(peer, *[b"x"] * 100)
        for number in range(101, 2101):
            peer.deliver(channel_id, "tag", number, b"x" * 500)
        peer.serve()

    with connected(script, inbox_messages=50, inbox_hard_factor=100) as connection:
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume("queue", "tag", callback=got.append, no_ack=True)
        until(env, lambda: connection.intake.paused)
        assert len(connection.inbox) < 2100
        # The answer is behind everything that was sent.
        other = connection.channel()
        assert other.is_open
        while len(got) < 2100:
            connection.drain_events(timeout=5)
        assert [each.delivery_tag for each in got] == list(range(1, 2101))


@pytest.mark.parametrize("unblocked", [True, False])
def test_publish_of_a_callback_hears_of_unblocked_behind_a_full_inbox(
    env: Environment, unblocked: bool
) -> None:
    """The task that should drain is the one that waits; its socket is read up to a bound."""
    count = 100
    many = [b"%d" % number for number in range(count)]
    started, go = env.Event(), env.Event()

    def script(peer: Peer) -> None:
        channel_id = consuming(peer)
        started.wait(10)
        peer.method(0, "Connection.blocked", "low on memory")
        for number, body in enumerate(many[:8], 1):
            peer.deliver(channel_id, "tag", number, body)
        go.wait(10)
        if unblocked:
            peer.method(0, "Connection.unblocked")
        for number, body in enumerate(many[8:], 9):
            peer.deliver(channel_id, "tag", number, body)
        peer.serve()
        assert [body for _, body in peer.bodies] == [b"answer"] * unblocked

    patience = 10 if unblocked else 0.5
    options = {"inbox_messages": 4, "inbox_hard_factor": 4, "blocked_timeout": patience}
    with connected(script, **options) as connection:
        channel = connection.channel()
        answered: list[bool] = []

        def answer(message: Any) -> None:
            if not answered:
                answered.append(True)
                channel.basic_publish(channel.prepare_message(b"answer"), "", "replies")

        channel.basic_consume("queue", "tag", no_ack=True, callback=answer)
        started.set()
        until(env, lambda: connection.blocked and connection.intake.paused)
        go.set()
        with contextlib.nullcontext() if unblocked else pytest.raises(ConnectionBlocked):
            connection.drain_events(timeout=5)
        assert connection.connected
        for _ in range(count - 1):
            connection.drain_events(timeout=5)
        connection.close()


def test_inbox_beyond_its_hard_bound_ends_the_connection_with_a_typed_error() -> None:
    def script(peer: Peer) -> None:
        channel_id = consuming(peer)
        peer.expect("Queue.declare")
        with contextlib.suppress(OSError):
            for number in range(1, 100000):
                peer.deliver(channel_id, "tag", number, b"x" * 100)

    with connected(script, inbox_messages=10, inbox_hard_factor=2) as connection:
        channel = connection.channel()
        channel.basic_consume("queue", "tag", callback=print, no_ack=True)
        with pytest.raises(errors.InboxOverflowError, match="basic_qos"):
            channel.queue_declare("queue")


def test_too_large_message_is_handed_over_with_its_error() -> None:
    def script(peer: Peer) -> None:
        consuming(peer, b"x" * 100, b"ok")
        peer.serve()

    with connected(script, max_message_size=50) as connection:
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume("queue", callback=got.append)
        connection.drain_events(timeout=5)
        connection.drain_events(timeout=5)
        assert got[0].body is None
        assert isinstance(got[0].fault, errors.MessageTooLarge)
        assert got[1].body == b"ok"
