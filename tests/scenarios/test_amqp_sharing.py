"""Many tasks on one AMQP connection, and tasks that give up in the middle of it."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from collections import Counter
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu._amqp.errors import ChannelLimitError, RPCTimeoutError
from greenkombu.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.scenarios.broker import QUICK, Broker, frames_below, pool_of, took
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until

MEGABYTE = 1 << 20


def gives_up(env: Environment, how: str, seconds: float) -> contextlib.AbstractContextManager[Any]:
    """What ends the block after so many seconds."""
    return env.timeout(seconds) if how == "timeout" else Deadline(seconds)


def giving_up(env: Environment) -> tuple[type[BaseException], ...]:
    return (*env.timeout_types, TimeoutError)


@pytest.mark.parametrize("how", ["timeout", "kill", "deadline"])
@pytest.mark.parametrize("where", ["frame header", "method", "body"])
def test_s01_giving_up_in_the_middle_of_a_frame_frees_the_slot_and_keeps_the_stream_clean(
    env: Environment, broker: Broker, proxy: FaultProxy, how: str, where: str
) -> None:
    if how != "deadline" and not env.green:
        pytest.skip("threads cannot be interrupted")
    queue, other = broker.queue(), broker.queue()
    large = [bytes([65 + number]) * MEGABYTE for number in range(5)]
    broker.put(queue, large)
    with pool_of(Connection(proxy.url(broker.url), transport_options=QUICK), 1) as pool:
        with pool.acquire(block=True) as connection:
            connection.default_channel.queue_declare(queue, passive=True)
        if where == "body":
            proxy.cut(MEGABYTE // 2, "down", "stop", links=[1])
        else:
            proxy.stop_at("Basic.get_ok", "down", offset=3 if where == "frame header" else 20)
        held: list[float] = []
        freed: list[float] = []
        taken: list[float] = []

        def abandon() -> None:
            try:
                with (
                    gives_up(env, how, 0.3) if how != "kill" else contextlib.nullcontext(),
                    pool.acquire(block=True) as connection,
                ):
                    held.append(time.monotonic())
                    connection.default_channel.basic_get(queue)
            finally:
                freed.append(time.monotonic())

        def take_over() -> tuple[Any, Any]:
            with pool.acquire(block=True, timeout=LONG) as connection:
                taken.append(time.monotonic())
                channel = connection.default_channel
                return channel.queue_declare(other, passive=True), channel

        first = env.spawn(abandon)
        until(env, lambda: held)
        second = env.spawn(take_over)
        if how == "kill":
            env.sleep(0.2)
            first.kill()
        assert first.join(5)
        assert freed[0] - held[0] < 8
        until(env, lambda: taken)  # while the broker's answer still hangs
        env.sleep(0.1)
        proxy.restore()
        declared, channel = second.result(LONG)
        assert tuple(declared) == (other, 0, 0)
        # What the abandoned basic_get had taken goes back to its queue.
        received: list[bytes] = []

        def get() -> bool:
            message = channel.basic_get(queue)
            if message is not None:
                received.append(message.body)
                message.ack()
            return len(received) == 5

        until(env, get)
        assert sorted(received) == large
        assert len(proxy.links()) == 1, "the connection was replaced"


@pytest.mark.parametrize("how", ["timeout", "kill", "deadline"])
def test_s02_a_publish_that_is_given_up_half_way_loses_no_later_one(
    env: Environment, broker: Broker, how: str
) -> None:
    if how != "deadline" and not env.green:
        pytest.skip("threads cannot be interrupted")
    queue = broker.queue()
    huge = b"x" * (40 * MEGABYTE)
    with Connection(broker.url, transport_options=QUICK) as connection:
        connection.connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        producer = Producer(connection, routing_key=queue)
        producer.channel.queue_declare(queue, passive=True)
        stream = connection.connection.stream

        def publish() -> None:
            with gives_up(env, how, 0.02) if how != "kill" else contextlib.nullcontext():
                producer.publish(huge)
                if how != "deadline":
                    env.sleep(LONG)

        def wait_its_turn() -> None:
            # Above the high-water mark a publish waits for room.
            with gives_up(env, how, 0.02) if how != "kill" else contextlib.nullcontext():
                producer.publish(b"third wheel")

        tasks = [env.spawn(publish)]
        until(env, lambda: stream.sent_bytes > 70_000)
        tasks.append(env.spawn(wait_its_turn))
        env.sleep(0.02)
        if how == "kill":
            for task in tasks:
                task.kill()
        elif how == "timeout":
            assert tasks[0].join(5)
        producer.publish(b"first")
        producer.publish(b"second")
        arrived: list[Any] = []
        while b"second" not in arrived:
            more = broker.bodies(queue, 1)
            assert more, "the messages are lost"
            arrived += more
        assert arrived[-2:] == [b"first", b"second"]
        # Of those that were given up, each came whole or not at all.
        assert [body for body in arrived[:-2] if body not in (huge, b"third wheel")] == []
        assert connection.connected
        if how == "deadline":
            for task in tasks:
                task.join(LONG)


@pytest.mark.parametrize("confirm", [False, True], ids=["unconfirmed", "confirmed"])
@pytest.mark.parametrize("shared", [False, True], ids=["own channels", "one channel"])
def test_s03_messages_of_many_tasks_are_never_mixed(
    env: Environment, broker: Broker, shared: bool, confirm: bool
) -> None:
    queue = broker.queue()
    options = {**QUICK, "confirm_publish": confirm}
    with Connection(broker.url, transport_options=options) as connection:
        connection.connect()
        common = connection.channel()

        def publish(number: int) -> None:
            channel = common if shared else connection.channel()
            producer = Producer(channel, routing_key=queue)
            for index in range(20):
                producer.publish(f"{number:02}-{index:02};".encode() * 3334)  # 20 KB
                env.sleep(0)
            if not shared:
                channel.close()

        with took() as all_of_it:
            for task in [env.spawn(publish, number) for number in range(20)]:
                task.result(LONG)
        common.queue_declare(queue, passive=True)  # an answer behind all of them
        assert all_of_it.seconds < LONG
    bodies = broker.bodies(queue, 400)
    seen = Counter(bytes(body[:6]) for body in bodies)
    assert seen == Counter(
        f"{number:02}-{index:02};".encode() for number in range(20) for index in range(20)
    )
    assert all(body == body[:6] * 3334 for body in bodies)


@pytest.mark.parametrize("tasks", [5, 50])
def test_s04_requests_are_answered_while_another_task_drains(
    env: Environment, broker: Broker, tasks: int
) -> None:
    consumed, names = broker.queue(), [broker.queue(declare=False) for _ in range(tasks)]
    with Connection(broker.url, transport_options=QUICK) as connection:
        got: list[Any] = []
        stopped: list[bool] = []
        consumer = Consumer(
            connection.channel(),
            [],
            callbacks=[lambda body, message: (got.append(body), message.ack())],
        )
        consumer.add_queue(_queue(consumed))
        consumer.consume()

        def drain() -> None:
            while not stopped:
                connection.drain_events(timeout=3 * LONG)

        def declare(name: str) -> tuple[float, Any]:
            with took() as answer:
                channel = connection.channel()
                declared = channel.queue_declare(name, auto_delete=False)
                bound = channel.queue_bind(name, "amq.direct", name)
                assert bound is None
            channel.close()
            return answer.seconds, declared

        drainer = env.spawn(drain)
        broker.put(consumed, [b"warm"])
        until(env, lambda: got)
        results = [task.result(LONG) for task in [env.spawn(declare, name) for name in names]]
        assert [declared.queue for _, declared in results] == names
        assert max(seconds for seconds, _ in results) < LONG
        stopped.append(True)
        broker.put(consumed, [b"after"])
        drainer.result(LONG)
        assert len(got) == 2


@pytest.mark.parametrize("how", ["close", "collect", "transport"])
@pytest.mark.parametrize("timeout", [None, 30], ids=["for ever", "with a timeout"])
def test_s14_close_ends_a_drain_in_another_task(
    env: Environment, broker: Broker, how: str, timeout: float | None
) -> None:
    queue = broker.queue()
    connection = Connection(broker.url, transport_options=QUICK)
    consumer = Consumer(connection.channel(), [_queue(queue)], callbacks=[lambda b, m: None])
    consumer.consume()
    raised: list[BaseException] = []

    def drain() -> None:
        try:
            connection.drain_events(timeout=timeout)
        except BaseException as error:
            raised.append(error)

    drainer = env.spawn(drain)
    inbox = connection.connection.inbox
    until(env, lambda: "0 listening" not in repr(inbox))
    with took() as closing:
        if how == "close":
            connection.close()
        elif how == "collect":
            connection.collect()
        else:
            connection.connection.close()
    assert closing.seconds < LONG / 2
    assert drainer.join(LONG / 2), "the drain goes on"
    assert isinstance(raised[0], exceptions.ConnectionClosedError)
    assert isinstance(raised[0], connection.connection_errors)
    connection.close()


def test_s15_three_tasks_drain_one_connection(env: Environment, broker: Broker) -> None:
    queue = broker.queue()
    got: list[Any] = []
    with Connection(broker.url, transport_options=QUICK) as connection:
        channel = connection.channel()
        with Consumer(
            channel,
            [_queue(queue)],
            callbacks=[lambda body, message: (got.append(bytes(body)), message.ack())],
            accept=None,
        ):

            def drain() -> None:
                while len(got) < 50:
                    with contextlib.suppress(TimeoutError):
                        connection.drain_events(timeout=0.2)

            drainers = [env.spawn(drain) for _ in range(3)]
            bodies = [f"{number}".encode() for number in range(50)]
            broker.put(queue, bodies, content_type="application/data", content_encoding="binary")
            for task in drainers:
                task.result(LONG)
        channel.close()
    assert sorted(got) == sorted(bodies)
    assert broker.has(queue, 0)


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "dropped"])
def test_s20_channels_of_tasks_that_are_gone_come_back(
    env: Environment, broker: Broker, closes: bool
) -> None:
    with Connection(broker.url, transport_options=QUICK) as connection:
        connection.connect()
        assert connection.connection.channel_max < 2100

        def use() -> None:
            channel = connection.channel()
            if closes:
                channel.close()

        opened = 0
        while opened < 2100:
            batch = [env.spawn(use) for _ in range(100)]
            for task in batch:
                task.result(LONG)
            opened += len(batch)
        until(env, lambda: len(connection.connection.channels) <= 1)
        assert connection.channel().queue_declare("", exclusive=True)


def test_s20_a_full_connection_makes_the_next_channel_wait_within_a_bound(
    env: Environment, broker: Broker
) -> None:
    options = {**QUICK, "channel_max": 10, "channel_timeout": 0.4}
    with Connection(broker.url, transport_options=options) as connection:
        held = [connection.channel() for _ in range(10)]
        with took() as waiting, pytest.raises(ChannelLimitError, match="10"):
            connection.channel()
        assert 0.3 < waiting.seconds < 8
    with Connection(broker.url, transport_options={**options, "channel_timeout": 60}) as connection:
        held = [connection.channel() for _ in range(10)]
        waiter = env.spawn(connection.channel)
        env.sleep(0.05)
        assert not waiter.done
        held.pop().close()
        assert waiter.result(LONG).is_open
        assert connection.connected


@pytest.mark.parametrize("how", ["deadline", "timeout", "kill"])
def test_s04_a_consumer_that_was_given_up_can_be_started_again_with_its_tag(
    env: Environment, broker: Broker, proxy: FaultProxy, how: str
) -> None:
    """RabbitMQ ends the connection (530) at a second consumer with the tag of a first."""
    if how != "deadline" and not env.green:
        pytest.skip("threads cannot be interrupted")
    first, second = broker.queue(), broker.queue()
    broker.put(first, [b"of the first queue"])
    with Connection(proxy.url(broker.url), transport_options=QUICK) as connection:
        channel = connection.channel()
        got: list[bytes] = []

        def start(queue: str) -> str:
            return channel.basic_consume(
                queue, "own", callback=lambda message: got.append(message.body)
            )

        def give_up() -> None:
            with (
                gives_up(env, how, 0.05) if how != "kill" else contextlib.nullcontext(),
                pytest.raises(BaseException),  # noqa: B017, PT011 - each kind has its own
            ):
                start(first)

        held = proxy.hold("Basic.consume_ok", "down")
        task = env.spawn(give_up)
        held.wait()
        if how == "kill":
            task.kill()
        assert task.join(5)
        with pytest.raises(RPCTimeoutError, match="'own'"), Deadline(0.3):
            start(second)
        retry = env.spawn(start, second)
        env.sleep(0.05)
        held.release()
        assert retry.result(LONG) == "own"
        broker.put(second, [b"of the second queue"])
        connection.drain_events(timeout=LONG)
        assert got == [b"of the second queue"]
        assert connection.connected
        assert len(proxy.links()) == 1
        assert broker.has(first, 1)


@pytest.mark.parametrize("use", ["publish", "ack", "bad ack"])
def test_s20_a_channel_that_is_closed_while_others_write_on_it_costs_no_connection(
    env: Environment, broker: Broker, use: str
) -> None:
    """Whatever follows Channel.close on its channel ends the connection (504)."""
    rounds = 1000
    queue = broker.queue()
    broker.put(queue, [b"kept"])
    current: list[Any] = []
    stopped: list[bool] = []
    written = Counter[str]()

    def write() -> None:
        while not stopped:
            for channel in list(current):
                try:
                    while True:
                        if use == "publish":
                            channel.basic_publish(channel.prepare_message(b"x"), "", "nobody")
                        else:
                            # 0 is all; as a single one it is unknown, and the broker closes, too.
                            channel.basic_ack(0, multiple=use == "ack")
                        written["whole"] += 1
                        env.sleep(0)
                except (exceptions.ChannelClosedError, exceptions.StaleDeliveryError):
                    written["refused"] += 1
            env.sleep(0)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with Connection(broker.url, transport_options=QUICK) as connection:
            writers = [env.spawn(write) for _ in range(3)]
            for _ in range(rounds):
                channel = connection.channel()
                current[:] = [channel]
                env.sleep(0)
                channel.close()
                assert connection.connected, connection.connection.error
            stopped.append(True)
            for writer in writers:
                writer.result(LONG)
            assert connection.channel().queue_declare(queue, passive=True).message_count == 1
    finally:
        stopped.append(True)
        sys.setswitchinterval(interval)
    assert written["whole"] > 100
    assert written["refused"]


def test_s29_callbacks_that_publish_on_their_own_connection_keep_the_stack_flat(
    env: Environment, broker: Broker
) -> None:
    source, target = broker.queue(), broker.queue()
    broker.put(source, (b"%d" % number for number in range(3000)))
    depths: set[int] = set()
    with Connection(broker.url, transport_options=QUICK) as connection:
        producer = Producer(connection, routing_key=target)
        done: list[Any] = []

        def forward(message: Any) -> None:
            depths.add(frames_below())
            producer.publish(message.body)
            message.ack()
            done.append(message.delivery_tag)

        consumer = Consumer(connection.channel(), [_queue(source)], on_message=forward)
        consumer.consume()
        while len(done) < 3000:
            connection.drain_events(timeout=LONG)
        consumer.cancel()
        producer.channel.queue_declare(target, passive=True)
    assert max(depths) - min(depths) < 5
    assert broker.has(target, 3000)
    assert broker.has(source, 0)


def _queue(name: str) -> Any:
    """A queue that exists and is not declared again."""
    from greenkombu.entity import Queue

    return Queue(name, no_declare=True)
