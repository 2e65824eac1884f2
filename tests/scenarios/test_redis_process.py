"""Redis and the process around it: descriptors, the collector, exits, fairness, idling, signals."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hub
from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.scenarios.broker import frames_below, pool_of, took
from tests.scenarios.slices import leave_others_their_turn
from tests.scenarios.store import Store, text_of
from tests.support.fault_proxy import FaultProxy
from tests.support.patched import ROOT, complaints, run_patched
from tests.support.sockets import numbers_used_again
from tests.support.tasks import LONG, until

PROGRAMS = Path(__file__).with_name("programs")


def test_s11_put_and_get_with_1100_descriptors_open(
    env: Environment, store: Store, many_descriptors: Callable[[int], list[int]]
) -> None:
    many_descriptors(1100)
    with Connection(store.url) as connection:
        simple = connection.SimpleQueue(Queue(store.queue(), no_declare=True))
        assert connection.connection.wire.stream.sock.fileno() > 1023
        for number in range(20):
            simple.put({"number": number})
        for number in range(20):
            message = simple.get(timeout=LONG)
            assert message.payload == {"number": number}
            message.ack()
        simple.close()


# -- S13


@pytest.mark.parametrize("no_ack", [False, True], ids=["acked", "no_ack"])
def test_s13_thousands_of_ready_messages_leave_the_other_tasks_their_turn(
    env: Environment, store: Store, no_ack: bool
) -> None:
    def fill() -> tuple[str, str]:
        queue = store.queue()
        store.put(queue, [f"{number}" for number in range(5000)])
        return store.url, queue

    leave_others_their_turn(env, fill, no_ack)


# -- S14


@pytest.mark.parametrize("how", ["close", "collect", "transport"])
@pytest.mark.parametrize("timeout", [None, 30], ids=["for ever", "with a timeout"])
def test_s14_close_ends_a_drain_in_another_task(
    env: Environment, store: Store, how: str, timeout: float | None
) -> None:
    connection = Connection(store.url)
    consumer = Consumer(
        connection.channel(), [Queue(store.queue(), no_declare=True)], on_message=pytest.fail
    )
    consumer.consume()
    raised: list[BaseException] = []

    def drain() -> None:
        try:
            connection.drain_events(timeout=timeout)
        except BaseException as error:
            raised.append(error)

    drainer = env.spawn(drain)
    until(env, lambda: connection.connection.inbox.watched)
    with took() as closing:
        if how == "close":
            connection.close()
        elif how == "collect":
            connection.collect()
        else:
            connection.connection.close()
    assert closing.seconds < 5.0
    assert drainer.join(5.0), "the drain goes on"
    assert isinstance(raised[0], exceptions.ConnectionClosedError)
    assert isinstance(raised[0], connection.connection_errors)
    connection.close()


# -- S19


@pytest.mark.parametrize("where", ["task", "hub callback", "other thread's collector"])
def test_s19_cycles_that_are_collected_leave_nothing_and_raise_nothing(
    env: Environment, store: Store, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, held_queue = store.queue(), store.queue()
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_value))
    store.put(held_queue, [f"{number}" for number in range(30)])

    def make() -> None:
        connection = Connection(store.url)
        got: list[Any] = []
        channel = connection.channel()
        channel.basic_qos(0, 4, False)
        consumer = Consumer(channel, [Queue(held_queue, no_declare=True)], on_message=got.append)
        consumer.consume()
        connection.drain_events(timeout=LONG)
        pool = Connection(store.url).Pool(3)
        held = pool.acquire()
        producer = Producer(held.default_channel)
        producer.publish("x", routing_key=queue)
        # A cycle of everything.
        cycle = [connection, consumer, pool, held, channel, producer, got]
        cycle.append(cycle)
        for each in (connection, held):
            each.cycle_of_the_test = cycle  # type: ignore[attr-defined]

    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    gc.disable()
    try:
        for _ in range(5):
            make()
        assert len(os.listdir("/proc/self/fd")) >= before + 10
        assert store.registered() == (20, 20)
        if where == "task":
            gc.collect()
        elif where == "hub callback":
            done = env.waiter()

            def collect() -> None:
                gc.collect()
                done.wake()

            hub.get_hub().call_soon_threadsafe(collect)
            assert done.wait(LONG)
        else:
            ended: list[int] = []
            env.original("_thread", "start_new_thread")(lambda: ended.append(gc.collect()), ())
            until(env, lambda: ended)
    finally:
        gc.enable()
    until(env, lambda: len(os.listdir("/proc/self/fd")) <= before, collecting=True)
    assert unraisable == []
    assert store.waiting(queue) == ["x"] * 5
    # What they held is registered, or went back.
    kept = [*store.unacked(), *store.waiting(held_queue)]
    assert {f"{number}" for number in range(30)} <= set(kept)


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("globals", marks=pytest.mark.slow),
        pytest.param("cycles", marks=pytest.mark.slow),
        pytest.param("builtins", marks=pytest.mark.slow),
        pytest.param("channels before connections", marks=pytest.mark.slow),
        pytest.param("tasks", marks=pytest.mark.slow),
        "finalizers that close",
        pytest.param("dropped behind our atexit", marks=pytest.mark.slow),
    ],
)
def test_s19_a_program_that_ends_with_everything_open_ends_quietly(
    store: Store, where: str
) -> None:
    queue = store.queue()
    with took() as time_of:
        result = run_patched([str(PROGRAMS / "leaves_open.py"), store.url, queue, where])
    assert result.returncode == 0, result.stdout + result.stderr
    assert complaints(result.stderr) == ""
    assert time_of.seconds < 20
    assert store.waiting(queue) == ["last words"]


# -- S24


@pytest.mark.parametrize(
    ("seconds", "share"), [(0.5, 0.15), pytest.param(10.0, 0.01, marks=pytest.mark.slow)]
)
def test_s24_idle_connections_cost_next_to_nothing(
    env: Environment, store: Store, store_proxy: FaultProxy, seconds: float, share: float
) -> None:
    connections = [Connection(store_proxy.url(store.url)) for _ in range(100)]
    queue = store.queue()
    try:

        def consume(connection: Connection) -> None:
            Consumer(
                connection.channel(), [Queue(queue, no_declare=True)], on_message=pytest.fail
            ).consume()
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=0.01)

        for task in [env.spawn(consume, connection) for connection in connections]:
            task.result(LONG)
        # Twenty of them are closed by the server meanwhile.
        store_proxy.finish(range(1, 21))
        until(env, lambda: sum(connection.connected for connection in connections) == 80)
        env.sleep(0.3)
        before = time.process_time()
        env.sleep(seconds)
        used = time.process_time() - before
        assert used < share * seconds, f"{used:.3f} s of {seconds:g} s"
        assert sum(connection.connected for connection in connections) == 80
    finally:
        for connection in connections:
            connection.collect()


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_s24_an_idle_connection_that_the_server_closed_is_opened_again(
    env: Environment, store: Store, store_proxy: FaultProxy, how: str
) -> None:
    queue = store.queue()
    with pool_of(Connection(store_proxy.url(store.url)), 5) as pool:
        held = [pool.acquire() for _ in range(5)]
        for connection in held:
            connection.default_channel.queue_declare(queue)
        numbers = {connection.connection.wire.stream.sock.fileno() for connection in held}
        for connection in held:
            connection.release()
        if how == "fin":
            store_proxy.finish()
        else:
            store_proxy.reset()
        until(env, lambda: not any(connection.connected for connection in held))
        # The numbers go to somebody else, whose descriptors must not be touched.
        with numbers_used_again(env, numbers):
            held = [pool.acquire() for _ in range(5)]
            for number, connection in enumerate(held):
                Producer(connection).publish(f"{number}", routing_key=queue)
            for connection in held:
                connection.release()
    assert store.waiting(queue) == [f"{number}" for number in range(5)]


# -- S25


def test_s25_sigterm_with_100_in_flight_loses_nothing_and_ends_in_time(store: Store) -> None:
    queue = store.queue()
    store.put(queue, [f"{number}" for number in range(300)])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    command = [sys.executable, "-m", "tests.support.patched", name]
    process = subprocess.Popen(
        [*command, str(PROGRAMS / "terminated.py"), store.url, queue],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"100 in flight"
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        output, errors = process.communicate(timeout=LONG)
        assert time.monotonic() - started < 10
    finally:
        with contextlib.suppress(OSError):
            process.kill()
        process.wait()
    assert process.returncode == 0, errors.decode()
    assert output.split() == [b"acked", b"100"]
    assert store.registered() == (0, 0)
    assert store.waiting(queue) == [f"{number}" for number in range(100, 300)]


# -- S29


def test_s29_callbacks_that_publish_on_their_own_connection_keep_the_stack_flat(
    env: Environment, store: Store
) -> None:
    source, target = store.queue(), store.queue()
    store.put(source, [f"{number}" for number in range(1000)])
    depths: set[int] = set()
    done: list[str] = []
    with Connection(store.url) as connection:
        producer = Producer(connection, routing_key=target)

        def forward(message: Any) -> None:
            depths.add(frames_below())
            producer.publish(text_of(message))
            message.ack()
            done.append(text_of(message))

        consumer = Consumer(
            connection.channel(), [Queue(source, no_declare=True)], on_message=forward
        )
        consumer.consume()
        while len(done) < 1000:
            connection.drain_events(timeout=LONG)
        consumer.cancel()
    assert max(depths) - min(depths) < 5
    assert store.waiting(target) == done == [f"{number}" for number in range(1000)]
    assert store.registered() == (0, 0)


# -- S27


def test_s27_what_is_no_message_goes_to_on_decode_error_and_stops_nobody(
    env: Environment, store: Store
) -> None:
    queue, connection = store.queue(), Connection(store.url)
    strange = [b"no json", b"[1, 2]", b"5", b"\xff\x00", b'{"body": "x"}', b"[" * 100_000, b""]
    store.put(queue, ["first"])
    store.server.commands([("LPUSH", queue, payload) for payload in strange])
    store.put(queue, ["last"])
    got: list[Any] = []
    refused: list[tuple[Any, BaseException]] = []
    with connection:
        consumer = Consumer(
            connection.channel(),
            [Queue(queue, no_declare=True)],
            callbacks=[lambda body, message: got.append((body, message))],
            on_decode_error=lambda message, error: refused.append((message, error)),
            accept=["text/plain"],
        )
        consumer.consume()
        while "last" not in [body for body, _ in got]:
            connection.drain_events(timeout=LONG)
        assert len(got) + len(refused) == len(strange) + 2
        assert len(refused) >= len(strange) - 1, got
        # None of it is lost: who wants to keep it can.
        assert store.registered() == (9, 9)
        for message, _ in refused:
            message.requeue()
        for _, message in got:
            message.ack()
        consumer.cancel()
        until(env, lambda: store.registered() == (0, 0))
    left = store.server.command("LRANGE", queue, 0, -1)
    assert len(left) == len(refused)
    # Byte by byte, unless it is an object, which is marked as redelivered.
    assert {payload for payload in strange if not payload.startswith(b"{")} <= set(left)
