"""AMQP and the process around it: descriptors, the collector, forks, exits, the loop's fairness."""

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
from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer, Producer
from hub.environment import Environment
from tests.scenarios.broker import QUICK, Broker, pool_of, took
from tests.scenarios.slices import leave_others_their_turn, longest_slice
from tests.support.fault_proxy import FaultProxy
from tests.support.patched import ROOT, complaints, run_patched
from tests.support.tasks import LONG, in_child, until

PROGRAMS = Path(__file__).with_name("programs")


def test_s11_put_and_get_with_1100_descriptors_open(
    env: Environment, broker: Broker, many_descriptors: Callable[[int], list[int]]
) -> None:
    queue = broker.queue()
    many_descriptors(1100)
    with Connection(broker.url, transport_options=QUICK) as connection:
        simple = connection.SimpleQueue(Queue(queue, no_declare=True))
        assert connection.connection.sock.fileno() > 1023
        for number in range(20):
            simple.put({"number": number})
        for number in range(20):
            message = simple.get(timeout=LONG)
            assert message.payload == {"number": number}
            message.ack()
        simple.close()


@pytest.mark.parametrize("count", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_s18_a_wake_up_costs_the_same_however_many_descriptors_there_are(
    env: Environment, many_descriptors: Callable[[int], list[int]], count: int
) -> None:
    shared = hub.get_hub()

    def cost() -> float:
        """Return CPU seconds of one wake-up by a descriptor."""
        ready = os.eventfd(0, os.EFD_NONBLOCK)
        ended = env.waiter()
        turns = 0
        started = 0.0
        used: list[float] = []

        def on_ready() -> None:
            nonlocal turns, started
            os.eventfd_read(ready)
            turns += 1
            if turns == 300:
                used.append(time.thread_time() - started)
                shared.remove_reader(ready)
                ended.wake()
            else:
                # Ready again at the next turn only: each of them is a wake-up of its own.
                shared.call_soon(os.eventfd_write, ready, 1)

        def begin() -> None:
            nonlocal started
            shared.add_reader(ready, on_ready)
            started = time.thread_time()
            os.eventfd_write(ready, 1)

        shared.call_soon_threadsafe(begin)
        assert ended.wait(LONG)
        env.original("os", "close")(ready)
        return used[0] / turns

    def watch(fds: list[int], add: bool) -> None:
        done = env.waiter()

        def change() -> None:
            for fd in fds:
                if add:
                    shared.add_reader(fd, int)
                else:
                    shared.remove_reader(fd)
            done.wake()

        shared.call_soon_threadsafe(change)
        assert done.wait(LONG)

    few = min(cost() for _ in range(5))
    fds = many_descriptors(count)
    watch(fds, True)
    try:
        many = min(cost() for _ in range(5))
    finally:
        watch(fds, False)
    assert many < 2.5 * few + 20e-6, f"{few * 1e6:.0f} us with few, {many * 1e6:.0f} with {count}"


# -- S13


@pytest.mark.parametrize("no_ack", [False, True], ids=["acked", "no_ack"])
def test_s13_thousands_of_ready_messages_leave_the_other_tasks_their_turn(
    env: Environment, broker: Broker, no_ack: bool
) -> None:
    def fill() -> tuple[str, str]:
        queue = broker.queue()
        broker.put(queue, (b"%d" % number for number in range(5000)))
        return broker.url, queue

    leave_others_their_turn(env, fill, no_ack, **QUICK)


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
@pytest.mark.parametrize("how", ["consumed", "taken", "returned"])
def test_s13_a_body_of_many_megabytes_leaves_the_other_tasks_their_turn(
    env: Environment, broker: Broker, how: str, scheme: str
) -> None:
    if not env.green:
        pytest.skip("a thread has no slices")
    url = broker.url.replace("amqp://", f"{scheme}://", 1)
    queue = broker.queue()
    body = bytes(range(256)) * 4096 * 48
    messages: list[Any] = []
    with Connection(url, transport_options=QUICK) as connection:
        channel = connection.channel()
        producer = Producer(channel, on_return=lambda *given: messages.append(given[3]))
        consumer = Consumer(channel, [Queue(queue, no_declare=True)], on_message=messages.append)
        with longest_slice(env) as slices:
            producer.publish(
                body,
                routing_key=queue if how != "returned" else "nobody",
                mandatory=True,
                content_type="application/data",
                content_encoding="binary",
            )
            if how == "consumed":
                consumer.consume()
            while not messages:
                if how == "taken":
                    message = channel.basic_get(queue)
                    messages += [message] if message is not None else []
                else:
                    connection.drain_events(timeout=LONG)
        # Joined here, by the task that wants it, and not before.
        assert messages[0].body == body
        if how != "returned":
            messages[0].ack()
    assert slices[0] < 0.020, f"a slice of {slices[0] * 1000:.1f} ms of thread time"


# -- S17


def test_s17_a_forked_child_leaves_the_socket_of_its_parent_alone(
    env: Environment, broker: Broker, proxy: FaultProxy
) -> None:
    queue, other = broker.queue(), broker.queue()
    with Connection(proxy.url(broker.url), transport_options=QUICK) as connection:
        producer = Producer(connection)
        producer.publish("before", routing_key=queue)
        got: list[Any] = []
        consumer = Consumer(
            connection.channel(),
            [Queue(other, no_declare=True)],
            callbacks=[lambda body, message: (got.append(body), message.ack())],
        )
        consumer.consume()
        link = proxy.links()[0]

        def child() -> None:
            Producer(connection).publish("child", routing_key=queue)
            connection.close()
            gc.collect()

        in_child(child)
        producer.publish("after", routing_key=queue)
        assert sorted(broker.bodies(queue, 3)) == ["after", "before", "child"]
        broker.put(other, ["to the parent"], content_type="text/plain", content_encoding="utf-8")
        while not got:
            connection.drain_events(timeout=LONG)
        links = proxy.links()
        assert len(links) == 2, "the child has no connection of its own"
        sent = links[0].up.methods
        # Of the parent's socket, only the parent's own methods.
        assert sent["Basic.publish"] == link.up.methods.get("Basic.publish", 0) + 1
        assert "Connection.close" not in sent
        consumer.cancel()
        connection.drain_events(timeout=0) if len(connection.connection.inbox) else None


def test_s17_twenty_children_that_close_and_exit_cost_the_parent_no_message(
    broker: Broker, proxy: FaultProxy
) -> None:
    queue = broker.queue()
    program = PROGRAMS / "forks.py"
    result = run_patched([str(program), proxy.url(broker.url), queue, "20"], timeout=100)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["200", "messages,", "20", "children"]
    assert "Exception ignored" not in result.stderr
    assert "Traceback" not in result.stderr
    assert proxy.links()[0].up.methods["Basic.ack"] == 200
    assert broker.has(queue, 0)


# -- S19


@pytest.mark.parametrize("where", ["task", "hub callback", "other thread's collector"])
def test_s19_cycles_that_are_collected_leave_nothing_and_raise_nothing(
    env: Environment, broker: Broker, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = broker.queue()
    unraisable: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: unraisable.append(args.exc_value))

    def make() -> None:
        connection = Connection(broker.url, transport_options=QUICK)
        consumer = Consumer(
            connection.channel(), [Queue(queue, no_declare=True)], callbacks=[lambda b, m: None]
        )
        consumer.consume()
        pool = Connection(broker.url, transport_options=QUICK).Pool(3)
        held = pool.acquire()
        channel = held.default_channel
        producer = Producer(channel)
        producer.publish("x", routing_key="nowhere")
        # A cycle of everything.
        cycle = [connection, consumer, pool, held, channel, producer]
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
    until(env, lambda: broker.consumers(queue) == 0)
    assert unraisable == []


@pytest.mark.parametrize(
    "where",
    [
        "globals",
        "cycles",
        "builtins",
        "channels before connections",
        "a global beside the package",
        "tasks",
        "finalizers that close",
        "dropped behind our atexit",
    ],
)
def test_s19_a_program_that_ends_with_everything_open_ends_quietly(
    broker: Broker, where: str
) -> None:
    queue = broker.queue()
    with took() as time_of:
        result = run_patched([str(PROGRAMS / "leaves_open.py"), broker.url, queue, where])
    assert result.returncode == 0, result.stdout + result.stderr
    assert complaints(result.stderr) == ""
    assert time_of.seconds < 20
    assert broker.bodies(queue, 1) == ["last words"]


# -- S25


def test_s25_sigterm_with_100_in_flight_loses_nothing_and_ends_in_time(broker: Broker) -> None:
    queue = broker.queue()
    broker.put(
        queue,
        [f"{number}" for number in range(300)],
        content_type="text/plain",
        content_encoding="utf-8",
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    command = [sys.executable, "-m", "tests.support.patched", name]
    process = subprocess.Popen(
        [*command, str(PROGRAMS / "terminated.py"), broker.url, queue],
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
    assert broker.has(queue, 200)
    rest = broker.bodies(queue, 200)
    assert sorted(map(int, rest)) == list(range(100, 300))


# -- S30


def test_s30_a_pool_of_connections_serves_everybody_alike(env: Environment, broker: Broker) -> None:
    tasks, limit = (1000 if env.green else 100), 10
    counts = [0] * tasks
    with pool_of(Connection(broker.url, transport_options=QUICK), limit) as pool:
        ready: list[int] = []
        start = env.Event()
        deadline = 0.0

        def work(number: int) -> None:
            ready.append(number)
            assert start.wait(LONG)
            while time.monotonic() < deadline or min(counts) < 1:
                with pool.acquire(block=True, timeout=LONG) as connection:
                    assert connection.default_channel.connection.connected
                    env.sleep(0)
                counts[number] += 1

        running = [env.spawn(work, number) for number in range(tasks)]
        until(env, lambda: len(ready) == tasks)
        deadline = time.monotonic() + 2.0
        start.set()
        for task in running:
            task.result(60)
        stats = pool.stats()
        assert stats.held == 0
        assert stats.created_total <= limit
    assert min(counts) >= 1, f"{counts.count(0)} tasks were never served"
    # Whoever came first has one turn more when the time is over.  When a native thread comes back
    # for its next turn is up to the system.
    factor = 1.2 if env.green else 2.0
    assert max(counts) <= factor * min(counts) + 1, (min(counts), max(counts))
