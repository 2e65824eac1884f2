from __future__ import annotations

import gc
import itertools
import os
import signal
import time
import weakref
from collections import Counter
from typing import Any

import pytest

from greenkombu import Connection, Consumer, DrainLoop, Exchange, Producer, Queue, drain_events
from greenkombu.deadline import Deadline
from greenkombu.drain import DrainEvent, DrainLoopClosedError
from greenkombu.exceptions import ConnectionClosedError, StdChannelError, UnsupportedOperation
from greenkombu.transport.base import Failure
from hub import BadArgumentError, Event, get_environment
from tests.support.loopback import make_transport
from tests.support.patched import run_patched
from tests.support.tasks import LONG, no_collections, until

numbers = itertools.count()


def opened(count: int) -> tuple[list[Connection], list[Any]]:
    """Return connections and the inboxes below them."""
    connections = [Connection("loop", transport=make_transport()) for _ in range(count)]
    return connections, [connection.connect().inbox for connection in connections]


def a_name() -> str:
    return f"drain-{next(numbers)}"


def consuming(connection: Connection, name: str, callback: Any) -> Consumer:
    queue = Queue(name, Exchange(name), routing_key=name)
    consumer = Consumer(connection, [queue], callbacks=[callback])
    consumer.consume()
    return consumer


# -- drain_events


def test_one_event_of_any_connection() -> None:
    (a, b), (_, inbox) = opened(2)
    seen: list[int] = []
    inbox.append(lambda: seen.append(1))
    inbox.append(lambda: seen.append(2))
    assert drain_events(a, b, timeout=5) is b
    assert seen == [1]
    assert drain_events(a, b) is b
    with pytest.raises(TimeoutError, match="timed out"):
        drain_events(a, b, timeout=0.01)
    with pytest.raises(TimeoutError):
        drain_events(a, b, timeout=0)


@pytest.mark.parametrize("timeout", [float("nan"), "1"])
def test_a_timeout_that_is_no_number_of_seconds(timeout: Any) -> None:
    [a], _ = opened(1)
    both = a.drain_events, DrainLoop(a).next_event
    for drain in (*both, lambda timeout: drain_events(a, timeout=timeout)):
        with pytest.raises(BadArgumentError, match="number of seconds, not"):
            drain(timeout=timeout)
    with pytest.raises(BadArgumentError), Deadline(timeout):
        pass


def test_a_deadline_of_the_task_bounds_a_drain() -> None:
    [a, b], _ = opened(2)
    with Deadline(0.02):
        for drain in (a.drain_events, DrainLoop(a).next_event, lambda: drain_events(a, b)):
            with pytest.raises(TimeoutError):
                drain()
        with pytest.raises(TimeoutError):
            a.drain_events(timeout=LONG)


def test_a_callback_that_always_raises_starves_no_other_connection() -> None:
    (a, b), (first, second) = opened(2)

    def fail() -> None:
        raise ZeroDivisionError

    seen: list[int] = []
    for number in range(20):
        first.append(fail)
        if number < 3:
            second.append(lambda number=number: seen.append(number))
    for _ in range(8):
        try:
            drain_events(a, b, timeout=5)
        except ZeroDivisionError:
            pass
    assert seen == [0, 1, 2]


def test_a_dead_connection_starves_no_other() -> None:
    (a, b), (_, inbox) = opened(2)
    seen: list[int] = []
    for number in range(3):
        inbox.append(lambda number=number: seen.append(number))
    a.connection.abort(ConnectionClosedError("gone"))
    for _ in range(8):
        try:
            drain_events(a, b, timeout=0.01)
        except (ConnectionClosedError, TimeoutError):
            pass
    assert seen == [0, 1, 2]


def test_late_event_wakes_at_once() -> None:
    connections, inboxes = opened(3)
    environment = get_environment()
    task = environment.spawn(drain_events, *connections, timeout=20)
    until(environment, lambda: all("1 listening" in repr(inbox) for inbox in inboxes))
    inboxes[1].append(lambda: None)
    assert task.result(10) is connections[1]
    # Nothing is left behind.
    assert all("0 listening" in repr(inbox) for inbox in inboxes)


def test_connections_have_equal_turns() -> None:
    connections, inboxes = opened(3)
    for inbox in inboxes:
        for _ in range(100):
            inbox.append(lambda: None)
    served = Counter(id(drain_events(*connections, timeout=5)) for _ in range(30))
    assert set(served.values()) == {10}


def test_drain_events_opens_what_is_not_open() -> None:
    cls = make_transport()
    connection = Connection("loop", transport=cls)
    with pytest.raises(TimeoutError):
        drain_events(connection, timeout=0)
    assert cls.log == ["establish"]


def test_drain_events_raises_what_has_failed() -> None:
    (a, b), _ = opened(2)
    b._connection.abort(OSError("reset"))
    with pytest.raises(OSError, match="reset"):
        drain_events(a, b, timeout=1)
    a.close()
    with pytest.raises(ConnectionClosedError):
        drain_events(a, timeout=1)
    with pytest.raises(ValueError, match="at least one"):
        drain_events()


def test_transport_without_an_inbox_is_refused() -> None:
    class Foreign:
        connected = True

    cls = make_transport(establish_connection=lambda self: Foreign())
    connection = Connection("loop", transport=cls)
    connection._connection = Foreign()
    with pytest.raises(UnsupportedOperation, match="no inbox"):
        drain_events(connection, timeout=1)
    with pytest.raises(UnsupportedOperation, match="no inbox"):
        DrainLoop(connection)


# -- DrainLoop


def test_events_of_all_connections_in_turn() -> None:
    connections, inboxes = opened(3)
    for inbox in inboxes:
        for _ in range(50):
            inbox.append(lambda: None)
    loop = DrainLoop(*connections)
    assert len(loop) == 3
    served = Counter(id(loop.next_event(5).connection) for _ in range(30))  # type: ignore[union-attr]
    assert set(served.values()) == {10}


def test_iteration_ends_with_stop() -> None:
    (connection,), (inbox,) = opened(1)
    loop = DrainLoop(connection)
    for _ in range(10):
        inbox.append(lambda: None)
    seen = 0
    for event in loop:
        assert event.connection is connection
        assert event.error is None
        seen += 1
        if seen == 3:
            loop.stop()
    assert seen == 3
    # It can go on.
    assert loop.next_event(1) is not None
    loop.stop()
    loop.stop()
    assert loop.next_event(1) is None
    assert len(inbox) == 6


def test_callbacks_run_in_the_task_that_runs_the_loop() -> None:
    (connection,), (inbox,) = opened(1)
    environment = get_environment()
    loop = DrainLoop(connection)
    ran: list[object] = []
    runner: list[object] = []
    done = Event()

    def event() -> None:
        ran.append(environment.current())
        done.set()

    def run() -> None:
        runner.append(environment.current())
        loop.run_forever()

    task = environment.spawn(run)
    environment.sleep(0.02)
    inbox.append(event)
    assert done.wait(5)
    loop.stop()
    assert task.join(5)
    assert ran == runner


def test_connections_join_and_leave_while_it_runs() -> None:
    environment = get_environment()
    loop = DrainLoop()
    task = environment.spawn(loop.run_forever)
    connections, inboxes = opened(3)
    seen: list[int] = []
    inboxes[0].append(lambda: seen.append(0))  # before it joins
    for connection in connections:
        loop.join(connection)
        loop.join(connection)
    assert len(loop) == 3
    assert loop.connections == connections
    for number, inbox in enumerate(inboxes):
        inbox.append(lambda number=number: seen.append(number))
    until(environment, lambda: len(seen) == 4)
    loop.leave(connections[1])
    loop.leave(connections[1])
    assert connections[1] not in loop
    inboxes[1].append(lambda: seen.append(99))
    inboxes[2].append(lambda: seen.append(2))
    until(environment, lambda: len(seen) == 5)
    environment.sleep(0.02)
    assert 99 not in seen
    assert connections[1].connected
    loop.stop()
    assert task.join(5)


def test_error_of_one_connection_is_its_own() -> None:
    told: list[Any] = []
    connections, inboxes = opened(3)
    loop = DrainLoop(
        *connections, on_error=lambda connection, error: told.append((connection, error))
    )
    error = OSError("reset")
    inboxes[1].append(lambda: None)  # had come before
    connections[1]._connection.abort(error)
    inboxes[2].append(lambda: None)
    events = [loop.next_event(5) for _ in range(3)]
    failed = [event for event in events if event is not None and event.error is not None]
    assert [(event.connection, event.error) for event in failed] == [(connections[1], error)]
    assert told == [(connections[1], error)]
    assert connections[1] not in loop
    assert len(loop) == 2
    inboxes[0].append(lambda: None)
    assert isinstance(loop.next_event(5), DrainEvent)
    assert "reset" in repr(failed[0])


def test_connection_that_is_closed_is_reported() -> None:
    (a, b), _ = opened(2)
    loop = DrainLoop(a, b)
    environment = get_environment()
    task = environment.spawn(loop.next_event, 2 * LONG)
    environment.sleep(0.02)
    a.close()
    event = task.result(LONG)
    assert event.connection is a
    assert isinstance(event.error, ConnectionClosedError)
    assert loop.connections == [b]


def test_error_of_a_channel_leaves_the_connection_in_the_loop() -> None:
    (connection,), (inbox,) = opened(1)
    loop = DrainLoop(connection)

    inbox.append(lambda: Failure(StdChannelError("queue deleted")))
    inbox.append(lambda: None)
    event = loop.next_event(5)
    assert event is not None
    assert isinstance(event.error, StdChannelError)
    assert connection in loop
    event = loop.next_event(5)
    assert event is not None
    assert event.error is None


@pytest.mark.parametrize("error", [KeyError("mine"), FileNotFoundError("mine")])
def test_error_of_a_callback_reaches_the_caller_and_the_loop_goes_on(error: Exception) -> None:
    (connection, other), (inbox, second) = opened(2)
    loop = DrainLoop(connection, other)

    def bad() -> None:
        raise error

    inbox.append(bad)
    inbox.append(lambda: None)
    second.append(lambda: None)
    with pytest.raises(type(error), match="mine"):
        for _ in loop:
            pass
    assert len(loop) == 2
    while inbox or second:
        assert loop.next_event(1) is not None


def test_connection_joins_again_after_an_error() -> None:
    connection = Connection("loop", transport=make_transport())

    def again(failed: Connection, error: BaseException) -> None:
        failed.ensure_connection()
        loop.join(failed)

    loop = DrainLoop(connection, on_error=again)
    connection._connection.abort(OSError("reset"))
    event = loop.next_event(5)
    assert event is not None
    assert event.error is not None
    assert connection in loop
    connection._connection.inbox.append(lambda: None)
    event = loop.next_event(5)
    assert event is not None
    assert event.error is None


def test_connection_opened_anew_joins_again() -> None:
    (connection,), (old,) = opened(1)
    loop = DrainLoop(connection)
    connection.collect()
    connection.connect()
    loop.join(connection)
    assert len(loop) == 1
    assert "0 listening" in repr(old)
    connection._connection.inbox.append(lambda: None)
    event = loop.next_event(5)
    assert event is not None
    assert event.error is None


def test_next_event_is_bounded() -> None:
    for loop in (DrainLoop(), DrainLoop(*opened(2)[0])):
        started = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            loop.next_event(0.05)
        with pytest.raises(TimeoutError):
            loop.next_event(0)
        assert time.monotonic() - started < LONG


def test_two_tasks_cannot_run_one_loop() -> None:
    loop = DrainLoop()
    environment = get_environment()
    task = environment.spawn(loop.run_forever)
    until(environment, lambda: "running" in repr(loop))
    with pytest.raises(DrainLoopClosedError, match="another task"):
        loop.next_event(0)
    loop.stop()
    assert task.join(5)
    assert "idle" in repr(loop)


def test_s13_other_tasks_run_while_events_never_end() -> None:
    (connection,), (inbox,) = opened(1)
    environment = get_environment()
    loop = DrainLoop(connection)

    def event() -> None:
        inbox.append(event)

    inbox.append(event)
    task = environment.spawn(loop.run_forever)
    ticks = 0
    for _ in range(10):
        environment.sleep(0.002)
        ticks += 1
    loop.stop()
    assert task.join(5)
    assert ticks == 10


@pytest.mark.parametrize("how", ["drain_events", "loop"])
def test_s13_no_slice_is_longer_than_twenty_milliseconds(how: str) -> None:
    (connection,), (inbox,) = opened(1)
    environment = get_environment()
    loop = DrainLoop(connection)
    running = True
    slices: list[float] = []

    def tick() -> None:
        last = time.thread_time()
        while running:
            environment.sleep(0.005)
            now = time.thread_time()
            slices.append(now - last)
            last = now

    ticker = environment.spawn(tick)
    until(environment, lambda: slices)
    for _ in range(5000):
        inbox.append(lambda: sum(range(1000)))
    with no_collections():
        del slices[:]
        until(environment, lambda: slices)  # what was collected was before it
        del slices[:]
        while inbox:
            if how == "loop":
                loop.next_event(5)
            else:
                connection.drain_events(timeout=5)
        until(environment, lambda: slices)
    running = False
    assert ticker.join(5)
    assert max(slices) < 0.02


def test_largest_slice_is_cpu_time_between_two_turns_of_the_others() -> None:
    (connection,), (inbox,) = opened(1)
    environment = get_environment()
    loop = DrainLoop(connection)
    assert loop.largest_slice == 0.0

    def spin(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    with no_collections():
        task = environment.spawn(loop.run_forever)
        for seconds in (0.002, 0.03, 0.002):
            inbox.append(lambda seconds=seconds: spin(seconds))
            until(environment, lambda: not inbox)
        # What other tasks do while it is parked is not its own.
        spin(0.1)
        loop.stop()
        assert task.join(5)
    assert 0.03 <= loop.largest_slice < 0.06
    loop.largest_slice = 0.0
    loop.stop()
    loop.run_forever()
    assert loop.largest_slice < 0.03


def test_cost_of_an_event_does_not_depend_on_the_number_of_connections() -> None:
    def cost(count: int) -> float:
        connections, inboxes = opened(count)
        loop = DrainLoop(*connections)
        with pytest.raises(TimeoutError):
            loop.next_event(0)
        events = 3000
        best = float("inf")
        for _ in range(3):
            for number in range(events):
                inboxes[number % 10].append(int)
            with no_collections():
                started = time.process_time()
                for _ in range(events):
                    loop.next_event(5)
                best = min(best, time.process_time() - started)
        return best / events

    assert cost(2000) < 5 * cost(10)


def test_s19_loop_that_is_dropped_leaves_nothing_behind() -> None:
    (connection,), (inbox,) = opened(1)
    loop = DrainLoop(connection)
    gone = weakref.ref(loop)
    assert "1 listening" in repr(inbox)
    del loop
    gc.collect()
    assert gone() is None
    assert "0 listening" in repr(inbox)


def test_fork_leaves_the_loop_of_the_child_empty() -> None:
    done = run_patched(
        [
            "-c",
            """
import os
from greenkombu import Connection, DrainLoop
from hub import get_environment
from tests.support.loopback import make_transport

original = get_environment().original
connection = Connection("loop", transport=make_transport())
loop = DrainLoop(connection)
pid = original("os", "fork")()
if pid == 0:
    status = 1
    try:
        try:
            loop.next_event(0)
        except TimeoutError:
            assert len(loop) == 0
            loop.join(connection)
            connection.connect().inbox.append(int)
            assert loop.next_event(5).error is None
            status = 0
    finally:
        os._exit(status)
assert original("os", "waitpid")(pid, 0)[1] == 0
assert len(loop) == 1
print("end")
""",
        ]
    )
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


def test_signal_handler_may_stop_it() -> None:
    (connection,), _ = opened(1)
    loop = DrainLoop(connection)
    environment = get_environment()
    before = signal.signal(signal.SIGUSR1, lambda *args: loop.stop())
    try:

        def send() -> None:
            environment.sleep(0.05)
            os.kill(os.getpid(), signal.SIGUSR1)

        task = environment.spawn(send)
        started = time.monotonic()
        loop.run_forever()
        assert time.monotonic() - started < 5
        assert task.join(5)
    finally:
        signal.signal(signal.SIGUSR1, before)


# -- on the memory transport


def test_messages_of_many_connections() -> None:
    got: list[Any] = []
    connections = [Connection("memory://") for _ in range(20)]
    names = [a_name() for _ in connections]
    consumers = []
    for connection, name in zip(connections, names, strict=True):

        def take(body: Any, message: Any) -> None:
            got.append(body)
            message.ack()

        consumers.append(consuming(connection, name, take))
    loop = DrainLoop(*connections)
    environment = get_environment()
    task = environment.spawn(loop.run_forever)
    with Connection("memory://") as publisher:
        producer = Producer(publisher)
        for number in range(200):
            name = names[number % len(names)]
            producer.publish(number, exchange=name, routing_key=name)
            if not number % 10:
                environment.sleep(0)
        until(environment, lambda: len(got) == 200)
    assert sorted(got) == list(range(200))
    assert loop.close(5)
    assert task.join(5)
    for connection in connections:
        connection.close()


def test_s29_callback_that_publishes_on_its_own_connection() -> None:
    connection = Connection("memory://")
    source, target = a_name(), a_name()
    depth: list[int] = []
    published = 0
    Queue(target, Exchange(target), routing_key=target)(connection.default_channel).declare()
    producer = connection.Producer()

    def forward(body: Any, message: Any) -> None:
        nonlocal published
        depth.append(len(depth) and current_depth())
        producer.publish(body, exchange=target, routing_key=target)
        published += 1
        message.ack()

    def current_depth() -> int:
        import sys

        frame = sys._getframe()
        count = 0
        while frame is not None:
            count += 1
            frame = frame.f_back  # type: ignore[assignment]
        return count

    consuming(connection, source, forward)
    for number in range(3000):
        producer.publish(number, exchange=source, routing_key=source)
    loop = DrainLoop(connection)
    while published < 3000:
        assert loop.next_event(5) is not None
    assert max(depth) - min(depth[1:]) < 5
    assert connection.default_channel.queue_declare(target, passive=True).message_count == 3000
    connection.close()


def test_close_gives_back_what_no_callback_has_taken() -> None:
    name = a_name()
    connection = Connection("memory://")
    environment = get_environment()
    held: list[Any] = []
    consuming(connection, name, lambda body, message: held.append(message))
    connection.default_channel.basic_qos(0, 3, False)
    producer = connection.Producer()
    for number in range(10):
        producer.publish(number, exchange=name, routing_key=name)
    loop = DrainLoop(connection)
    for _ in range(3):
        loop.next_event(5)
    assert len(held) == 3

    def finish() -> None:
        environment.sleep(0.05)
        for message in held:
            message.ack()

    task = environment.spawn(finish)
    assert loop.close(5) is True
    assert task.join(5)
    assert len(held) == 3
    assert len(loop) == 0
    assert loop.closed
    assert connection.connected
    assert connection.default_channel.queue_declare(name, passive=True).message_count == 7
    with pytest.raises(DrainLoopClosedError):
        loop.join(connection)
    assert loop.next_event(1) is None
    assert list(loop) == []
    assert loop.close() is True
    connection.close()


def test_callback_that_fails_while_the_loop_closes_is_logged_and_the_others_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    (connection, dead), (inbox, _) = opened(2)
    loop = DrainLoop(connection, dead)
    dead._connection.abort(OSError("reset"))
    seen: list[int] = []

    def fail() -> None:
        raise ZeroDivisionError("mine")

    for event in (fail, lambda: seen.append(1), fail, lambda: seen.append(2)):
        inbox.append(event)
    assert loop.close(5) is True
    assert seen == [1, 2]
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info] == ["mine"] * 2


def test_close_is_bounded_by_its_deadline() -> None:
    name = a_name()
    connection = Connection("memory://")
    held: list[Any] = []
    consuming(connection, name, lambda body, message: held.append(message))
    connection.Producer().publish(1, exchange=name, routing_key=name)
    loop = DrainLoop(connection)
    loop.next_event(5)
    started = time.monotonic()
    assert loop.close(0.2) is False
    assert time.monotonic() - started < LONG
    connection.close()
    with Connection("memory://") as other:
        # Closing the connection has given it back.
        assert Queue(name)(other.default_channel).get() is not None


def test_close_ends_a_run_in_another_task() -> None:
    (connection,), (inbox,) = opened(1)
    environment = get_environment()
    loop = DrainLoop(connection)
    entered, leave = Event(), Event()

    def slow() -> None:
        entered.set()
        leave.wait(10)

    inbox.append(slow)
    task = environment.spawn(loop.run_forever)
    assert entered.wait(5)
    closing = environment.spawn(loop.close, 10)
    environment.sleep(0.05)
    assert not closing.done  # the callback is let finish
    leave.set()
    assert closing.result(5) is True
    assert task.join(5)
    assert "closed" in repr(loop)


@pytest.mark.parametrize("wait", ["connection.drain_events()", "loop.run_forever()"])
def test_an_idle_broker_in_memory_is_waited_for_without_a_bound(wait: str) -> None:
    """gevent ends a wait that nothing could end, as far as it knows (LoopExit)."""
    done = run_patched(["-c", IDLE_PROGRAM.replace("WAIT", wait)], timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["late"]


IDLE_PROGRAM = """
import signal
from greenkombu import Connection, Consumer, DrainLoop, Producer, Queue
connection = Connection("memory://")
queue = Queue("idle")
loop = DrainLoop(connection)
def received(message):
    print(message.payload)
    loop.stop()
consumer = Consumer(connection, [queue], on_message=received, no_ack=True)
consumer.consume()
producer = Producer(connection.channel(), routing_key="idle")
def publish(*_):
    signal.setitimer(signal.ITIMER_REAL, 0)
    producer.publish("late")
signal.signal(signal.SIGALRM, publish)
signal.setitimer(signal.ITIMER_REAL, 0.3, 0.3)
WAIT
"""
