"""Requests, faults, heartbeats and the end of a connection, against a scripted broker."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import amqp
import pytest

from greenkombu._amqp import errors
from greenkombu._amqp.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ChannelClosedError,
    ConnectionClosedError,
    StaleDeliveryError,
)
from hub.environment import Environment
from tests.support.tasks import in_child, until

from .broker import QUICK, Peer, connected, scripted, serve

# -- steps


def test_a_step_that_was_left_to_another_thread_comes_before_the_next_of_this_one() -> None:
    with connected(serve) as connection:
        order: list[str] = []

        def step(name: str) -> bytes:
            order.append(name)
            return b""

        # As whoever was in it leaves it for a moment: free again, and this step not done yet.
        connection._steps.append((step, ("first",)))
        connection.exclusive(step, "second")
        assert order == ["first", "second"]


# -- requests


def test_each_of_many_tasks_gets_its_own_answer(env: Environment) -> None:
    def declare(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        peer.method(channel_id, "Queue.declare_ok", values[1], int(values[1][1:]), 0)

    with connected(lambda peer: peer.serve(Queue_declare=declare)) as connection:
        channel = connection.channel()
        wrong: list[Any] = []

        def ask(number: int) -> None:
            for _ in range(20):
                answer = channel.queue_declare(f"q{number}")
                if (answer.queue, answer.message_count) != (f"q{number}", number):
                    wrong.append(answer)

        tasks = [env.spawn(ask, number) for number in range(20)]
        for task in tasks:
            task.result(20)
        assert wrong == []


def test_late_answer_of_an_abandoned_request_goes_to_nobody(env: Environment) -> None:
    given_up = env.Event()

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Queue.declare")
        given_up.wait(10)
        peer.method(channel_id, "Queue.declare_ok", "first", 1, 0)
        _, values = peer.expect("Queue.declare")
        peer.method(channel_id, "Queue.declare_ok", values[1], 2, 0)
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError) as caught:
            channel.queue_declare("first")
        given_up.set()
        assert "Queue.declare" in str(caught.value)
        assert connection.broker in str(caught.value)
        assert tuple(channel.queue_declare("second")) == ("second", 2, 0)


def test_late_consumer_is_cancelled_and_its_deliveries_go_back(env: Environment) -> None:
    seen: list[Any] = []
    given_up = env.Event()

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Basic.qos")
        _, values = peer.expect("Basic.consume")
        given_up.wait(10)
        peer.method(channel_id, "Basic.qos_ok")
        peer.method(channel_id, "Basic.consume_ok", values[2])
        peer.deliver(channel_id, values[2], 7, b"nobody's")
        seen.append(peer.next_method()[1:])
        seen.append(peer.next_method()[1:])
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError):
            channel.basic_consume("queue", "tag", callback=print)
        given_up.set()
        until(env, lambda: len(seen) == 2)
        assert seen == [("Basic.cancel", ("tag", False)), ("Basic.reject", (7, True))]
        assert channel.callbacks == {}


def test_tag_of_a_start_that_was_given_up_is_free_when_the_broker_has_undone_it(
    env: Environment,
) -> None:
    """The broker ends the connection (530) at a second consumer with the same tag."""
    go = env.Event()
    order: list[str] = []

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Basic.qos")
        peer.method(channel_id, "Basic.qos_ok")
        peer.expect("Basic.consume")
        go.wait(10)
        peer.method(channel_id, "Basic.consume_ok", "own")
        order.append(peer.next_method()[1])
        peer.deliver(channel_id, "own", 1, b"of the first")
        order.append(peer.next_method()[1])
        peer.method(channel_id, "Basic.cancel_ok", "own")
        order.append(peer.next_method()[1])
        peer.method(channel_id, "Basic.consume_ok", "own")
        peer.deliver(channel_id, "own", 2, b"of the second")
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        got: list[bytes] = []
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError):
            channel.basic_consume("queue", "own", callback=print)
        for _ in range(2):  # bounded, and the tag stays taken
            with Deadline(0.05), pytest.raises(errors.RPCTimeoutError, match=r"'own'.*another tag"):
                channel.basic_consume("queue", "own", callback=print)
        retry = env.spawn(
            channel.basic_consume, "queue", "own", callback=lambda each: got.append(each.body)
        )
        env.sleep(0.02)
        assert not retry.done
        go.set()
        assert retry.result(5) == "own"
        assert order == ["Basic.cancel", "Basic.reject", "Basic.consume"]
        connection.drain_events(timeout=5)
        assert got == [b"of the second"]
        channel.basic_cancel("own")
        assert channel.basic_consume("queue", "own", callback=print) == "own"


def test_task_that_waits_for_a_tag_hears_of_the_end_of_its_channel(env: Environment) -> None:
    def consume(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        pass  # never answered

    with connected(lambda peer: peer.serve(Basic_consume=consume)) as connection:
        channel = connection.channel()
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError):
            channel.basic_consume("queue", "own", callback=print)
        retry = env.spawn(channel.basic_consume, "queue", "own", callback=print)
        env.sleep(0.02)
        channel.close()
        with pytest.raises(ChannelClosedError):
            retry.result(10)


def test_late_message_of_an_abandoned_get_goes_back(env: Environment) -> None:
    seen: list[Any] = []
    given_up = env.Event()

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Basic.get")
        given_up.wait(10)
        head = peer.encode(channel_id, "Basic.get_ok", 5, False, "", "queue", 0)
        peer.send(head + peer.encode_content(channel_id, b"late"))
        seen.append(peer.next_method()[1:])
        peer.serve()

    with connected(script) as connection:
        channel = connection.channel()
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError):
            channel.basic_get("queue")
        given_up.set()
        until(env, lambda: seen)
        assert seen == [("Basic.reject", (5, True))]


@pytest.mark.parametrize("request_name", ["Basic.consume", "Basic.get"])
def test_nothing_is_undone_on_a_channel_that_is_being_closed(
    env: Environment, request_name: str
) -> None:
    """RabbitMQ ends the whole connection (504) when a method follows Channel.close."""
    after: list[Any] = []

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        if request_name == "Basic.consume":
            peer.expect("Basic.qos")
        _, values = peer.expect(request_name)
        peer.expect("Channel.close")
        if request_name == "Basic.consume":
            peer.method(channel_id, "Basic.qos_ok")
            peer.method(channel_id, "Basic.consume_ok", values[2])
        else:
            head = peer.encode(channel_id, "Basic.get_ok", 5, False, "", "queue", 0)
            peer.send(head + peer.encode_content(channel_id, b"late"))
        peer.method(channel_id, "Channel.close_ok")
        after.append(peer.next_method()[1])
        peer.method(0, "Connection.close_ok")

    with connected(script) as connection:
        channel = connection.channel()
        give_up = {
            "Basic.consume": lambda: channel.basic_consume("queue", "tag", callback=print),
            "Basic.get": lambda: channel.basic_get("queue"),
        }
        with Deadline(0.05), pytest.raises(errors.RPCTimeoutError):
            give_up[request_name]()
        channel.close()
        connection.close()
        until(env, lambda: after)
        assert after == ["Connection.close"]


@pytest.mark.parametrize("what", ["publish", "ack", "declare", "confirm_select"])
def test_nothing_is_sent_on_a_channel_that_is_being_closed(env: Environment, what: str) -> None:
    """Others may still use a shared channel while one task closes it: they get a typed error."""
    after: list[Any] = []
    go = env.Event()

    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.expect("Channel.close")
        go.wait(10)
        peer.method(channel_id, "Channel.close_ok")
        after.append(peer.next_method()[1])
        peer.method(0, "Connection.close_ok")

    with connected(script) as connection:
        channel = connection.channel()
        closer = env.spawn(channel.close)
        until(env, lambda: channel.is_closing)
        use = {
            "publish": lambda: channel.basic_publish(channel.prepare_message(b"x"), "", "q"),
            "ack": lambda: channel.basic_ack(1),
            "declare": lambda: channel.queue_declare("q"),
            "confirm_select": lambda: channel.confirm_select(),
        }
        with pytest.raises((ChannelClosedError, StaleDeliveryError)):
            use[what]()
        go.set()
        closer.result(10)
        connection.close()
        until(env, lambda: after)
        assert after == ["Connection.close"]


def test_answer_nobody_asked_for_ends_the_connection_with_a_typed_error(env: Environment) -> None:
    def script(peer: Peer) -> None:
        channel_id = peer.open_channel()
        peer.method(channel_id, "Queue.bind_ok")
        peer.next_method()

    with connected(script) as connection:
        channel = connection.channel()
        until(env, lambda: connection.error is not None)
        assert isinstance(connection.error, errors.UnexpectedFrameError)
        assert "Queue.bind_ok" in str(connection.error)
        with pytest.raises(errors.UnexpectedFrameError):
            channel.queue_declare("queue")


def test_thin_methods_and_send_method_with_a_later_wait() -> None:
    def bind(peer: Peer, channel_id: int, values: tuple[Any, ...]) -> None:
        peer.method(channel_id, "Queue.bind_ok")

    with connected(lambda peer: peer.serve(Queue_bind=bind)) as connection:
        channel = connection.channel()
        assert isinstance(channel, amqp.Channel)
        channel.queue_bind("queue", "exchange", "key")
        channel.send_method(
            amqp.spec.Queue.Declare, "BsbbbbbF", (0, "q", False, False, False, True, False, {})
        )
        assert channel.wait(amqp.spec.Queue.DeclareOk, returns_tuple=True) == ("q", 0, 0)


# -- garbage, and the end of connections


@pytest.mark.parametrize(
    ("garbage", "error"),
    [
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x32\x00\x15\x00", errors.BadFrameError),
        (b"\x01\x00\x01\x7f\xff\xff\xff", errors.BadFrameError),
        (b"\x01\x00\x01\x00\x00\x00\x04\x00\x63\x00\x63\xce", errors.UnknownMethodError),
        (os.urandom(16).replace(b"\x01", b"\x07").replace(b"\x08", b"\x07") + b"\x00" * 16,
         errors.ProtocolError),
    ],
)  # fmt: skip
def test_garbage_gives_a_typed_error_to_everybody_on_that_connection_alone(
    garbage: bytes, error: type[Exception], env: Environment
) -> None:
    def broken(peer: Peer) -> None:
        peer.open_channel()
        peer.expect("Queue.declare")
        peer.send(garbage)
        peer.next_method()

    with connected(serve) as other, connected(broken) as connection:
        channel = connection.channel()
        good = other.channel()
        drained: list[BaseException] = []

        def drain() -> None:
            try:
                connection.drain_events(timeout=5)
            except Exception as exc:
                drained.append(exc)

        task = env.spawn(drain)
        with pytest.raises(error) as caught:
            channel.queue_declare("queue")
        assert connection.broker in str(caught.value)
        task.join(5)
        assert isinstance(drained[0], error)
        assert not connection.connected
        assert good.queue_declare("fine").queue == "fine"


def test_connection_close_of_the_broker_reaches_everybody(env: Environment) -> None:
    answered: list[str] = []

    def script(peer: Peer) -> None:
        peer.open_channel()
        peer.expect("Queue.declare")
        peer.method(0, "Connection.close", 320, "CONNECTION_FORCED - shutdown", 0, 0)
        answered.append(peer.next_method()[1])

    with connected(script) as connection:
        channel = connection.channel()
        with pytest.raises(amqp.exceptions.ConnectionForced) as caught:
            channel.queue_declare("queue")
        assert connection.broker in str(caught.value)
        with pytest.raises(amqp.exceptions.ConnectionForced):
            connection.drain_events(timeout=1)
        with pytest.raises(amqp.exceptions.ConnectionForced):
            connection.channel()
        until(env, lambda: answered)
    assert answered == ["Connection.close_ok"]


def test_lost_connection_is_a_recoverable_error_that_names_the_broker() -> None:
    def script(peer: Peer) -> None:
        peer.open_channel()
        peer.expect("Queue.declare")

    with connected(script) as connection:
        channel = connection.channel()
        with pytest.raises(amqp.exceptions.RecoverableConnectionError) as caught:
            channel.queue_declare("queue")
        assert isinstance(caught.value, errors.ConnectionLostError)
        assert connection.broker in str(caught.value)
        with pytest.raises(errors.ConnectionLostError):
            channel.basic_publish(amqp.Message(b"body"), "", "queue")


def test_close_while_another_task_drains(env: Environment) -> None:
    with connected(serve) as connection:
        ended: list[BaseException] = []

        def drain() -> None:
            try:
                connection.drain_events()
            except Exception as exc:
                ended.append(exc)

        task = env.spawn(drain)
        until(env, lambda: "0 listening" not in repr(connection.inbox))
        started = time.monotonic()
        connection.close()
        assert task.join(10)
        assert time.monotonic() - started < 10
        assert isinstance(ended[0], ConnectionClosedError)


def test_close_of_a_connection_whose_broker_is_silent_is_bounded() -> None:
    def script(peer: Peer) -> None:
        peer.expect("Connection.close")
        with contextlib.suppress(AssertionError):
            peer.next_method()

    with connected(script, close_timeout=0.2) as connection:
        started = time.monotonic()
        connection.close()
        assert 0.1 < time.monotonic() - started < 4
        assert isinstance(connection.error, ConnectionClosedError)
        connection.close()


def test_what_a_close_leaves_unsent_is_told(
    env: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    closed: list[bool] = []

    def script(peer: Peer) -> None:
        peer.open_channel()
        until(env, lambda: closed)  # and reads nothing meanwhile

    with connected(script, close_timeout=0.1) as connection:
        channel = connection.channel()
        size = 16 * 1024 * 1024  # more than both sockets take
        channel.basic_publish(amqp.Message(bytes(size)), "", "queue")
        connection.close()
        closed.append(True)
    [record] = [each for each in caplog.records if "octets" in each.getMessage()]
    assert record.levelname == "WARNING"
    assert 0 < record.args[1] <= size + 1000
    assert "close_timeout" in record.getMessage()


def test_abort_says_nothing_to_the_broker(env: Environment) -> None:
    heard: list[Any] = []

    def script(peer: Peer) -> None:
        try:
            peer.serve()
        finally:
            heard.extend(peer.received)

    with connected(script) as connection:
        connection.abort(errors.ConnectionLostError("for a test"))
        with pytest.raises(errors.ConnectionLostError, match="for a test"):
            connection.drain_events(timeout=1)
    assert [name for _, name, _ in heard if name.startswith("Connection.close")] == []


def test_dropped_connection_gives_its_socket_back(env: Environment) -> None:
    gone: list[bool] = []

    def script(peer: Peer) -> None:
        peer.handshake()
        peer.serve()
        gone.append(True)

    with scripted(script) as host:
        connection = Connection(host, heartbeat=5, **QUICK)
        connection.connect()
        channel = connection.channel()
        del channel, connection
        until(env, lambda: gone)


# -- heartbeats


def test_heartbeats_go_out_with_nobody_draining(env: Environment) -> None:
    peers: list[Peer] = []
    over: list[bool] = []

    def script(peer: Peer) -> None:
        peer.start()
        peer.tune(heartbeat=1)
        peer.method(0, "Connection.open_ok", "")
        peers.append(peer)

        def alive() -> None:
            while not over:
                peer.send(b"\x08\0\0\0\0\0\0\xce")
                env.sleep(0.3)

        sender = env.spawn(alive)
        peer.serve()
        sender.join(5)

    with scripted(script) as host:
        connection = Connection(host, heartbeat=1, **QUICK)
        connection.connect()
        until(env, lambda: peers and peers[0].heartbeats >= 2)
        assert connection.connected
        over.append(True)
        connection.close()


def test_silent_broker_is_noticed_within_three_intervals(env: Environment) -> None:
    def script(peer: Peer) -> None:
        peer.handshake(heartbeat=1)
        with contextlib.suppress(AssertionError):
            while True:
                peer.next_method()

    with scripted(script) as host:
        connection = Connection(host, heartbeat=1, **QUICK)
        connection.connect()
        started = time.monotonic()
        with pytest.raises(errors.HeartbeatLostError, match="two heartbeat intervals") as caught:
            connection.drain_events(timeout=20)
        # And what a busy machine takes.
        assert 1.5 < time.monotonic() - started < 3.3 + 4
        assert isinstance(caught.value, amqp.exceptions.ConnectionForced)


def test_heartbeat_of_zero_stays_off_whatever_the_broker_wants() -> None:
    with connected(serve, heartbeat=0) as connection:
        assert connection.heartbeat == 0
        assert connection.server_heartbeat == 60
        connection.heartbeat_tick()


# -- forks


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_child_sends_nothing_and_gets_a_typed_error(env: Environment) -> None:
    sent: list[int] = []

    def script(peer: Peer) -> None:
        peer.serve()
        sent.append(len(peer.bodies))

    with connected(script) as connection:
        channel = connection.channel()
        channel.basic_publish(amqp.Message(b"body"), "", "queue")

        def child() -> None:
            with pytest.raises(ConnectionClosedError, match="parent process"):
                channel.basic_publish(amqp.Message(b"body"), "", "queue")
            with pytest.raises(StaleDeliveryError):
                channel.basic_ack(1)
            with pytest.raises(ConnectionClosedError):
                connection.drain_events(timeout=1)
            channel.close()
            connection.close()

        in_child(child)
        assert channel.queue_declare("q").queue == "q"
    assert sent == [1]
