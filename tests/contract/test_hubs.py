"""One suite for the hub over every poller, in the environment of this run."""

from __future__ import annotations

import resource
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub.environment import Environment
from hub.pollers import available_pollers
from tests.support.sockets import native_pair
from tests.support.tasks import until

environment = hub.get_environment()
pytestmark = pytest.mark.green_matrix


class Runner:
    """A hub of one poller that a task of its own runs."""

    def __init__(self, poller: str) -> None:
        self.errors: list[BaseException] = []
        self.env = hub.get_environment()
        self.hub = hub.Hub(poller=poller, on_error=lambda error, _: self.errors.append(error))
        self.task = self.env.spawn(self.hub.run_forever)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.hub.run_threadsafe(function, *args, timeout=10)

    def close(self) -> None:
        self.hub.stop()
        assert self.task.join(10)
        self.hub.close()


@pytest.fixture(params=available_pollers(environment.original))
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    made = Runner(request.param)
    yield made
    made.close()


@pytest.fixture
def pair(env: Environment) -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = native_pair(env)
    yield ours, theirs
    ours.close()
    theirs.close()


class Inbox:
    """A reader callback that keeps what it reads and wakes whoever waits for `count` bytes."""

    def __init__(self, env: Environment, sock: socket.socket, count: int = 1) -> None:
        self.sock = sock
        self.data = b""
        self.count = count
        self.waiter = env.waiter()

    def __call__(self) -> None:
        self.data += self.sock.recv(65536)
        if len(self.data) >= self.count:
            self.waiter.wake()


def test_reader_is_called_when_bytes_arrive(runner: Runner, env: Environment, pair: Any) -> None:
    inbox = Inbox(env, pair[0], 5)
    runner.call(runner.hub.add_reader, pair[0].fileno(), inbox)
    pair[1].send(b"hello")
    assert inbox.waiter.wait(10)
    assert inbox.data == b"hello"


def test_writer_is_called_when_there_is_room(runner: Runner, env: Environment, pair: Any) -> None:
    waiter = env.waiter()
    fd = pair[0].fileno()

    def writable() -> None:
        runner.hub.remove_writer(fd)
        waiter.wake()

    runner.call(runner.hub.add_writer, fd, writable)
    assert waiter.wait(10)


def test_both_directions_of_one_descriptor(runner: Runner, env: Environment, pair: Any) -> None:
    fd = pair[0].fileno()
    inbox = Inbox(env, pair[0])
    writable = env.waiter()

    def write() -> None:
        runner.hub.remove_writer(fd)
        writable.wake()

    pair[1].send(b"x")
    runner.call(runner.hub.add_reader, fd, inbox)
    runner.call(runner.hub.add_writer, fd, write)
    assert inbox.waiter.wait(10)
    assert writable.wait(10)
    assert fd in runner.hub.readers
    assert fd not in runner.hub.writers


def test_add_reader_twice_replaces_the_callback(
    runner: Runner, env: Environment, pair: Any
) -> None:
    first, second = Inbox(env, pair[0]), Inbox(env, pair[0])
    runner.call(runner.hub.add_reader, pair[0].fileno(), first)
    runner.call(runner.hub.add_reader, pair[0].fileno(), second)
    pair[1].send(b"x")
    assert second.waiter.wait(10)
    assert not first.data


def test_removed_reader_is_not_called(runner: Runner, env: Environment, pair: Any) -> None:
    inbox = Inbox(env, pair[0])
    fd = pair[0].fileno()
    runner.call(runner.hub.add_reader, fd, inbox)
    assert runner.call(runner.hub.remove_reader, fd) is True
    assert runner.call(runner.hub.remove_reader, fd) is False
    assert runner.call(runner.hub.remove, fd) is False
    pair[1].send(b"x")
    assert not inbox.waiter.wait(0.05)


@pytest.mark.parametrize("peer_too", [False, True], ids=["end", "both-ends"])
@pytest.mark.parametrize("writes", [False, True], ids=["reader", "reader-writer"])
def test_handles_of_a_descriptor_closed_behind_its_back_go_at_the_next_traffic(
    runner: Runner, env: Environment, pair: Any, writes: bool, peer_too: bool
) -> None:
    """Without any traffic an idle hub may not notice: poll(2) and select(2) keep the file open."""
    loop = runner.hub
    ours, theirs = native_pair(env)
    fd = ours.fileno()
    other = Inbox(env, pair[0])
    calls: list[str] = []
    runner.call(loop.add_reader, pair[0].fileno(), other)
    runner.call(loop.add_reader, fd, lambda: (calls.append("read"), ours.recv(1)))
    if writes:
        runner.call(loop.add_writer, fd, lambda: (calls.append("write"), loop.remove_writer(fd)))
    ours.close()
    if peer_too:
        theirs.close()

    def gone() -> bool:
        pair[1].send(b"x")
        return not (fd in loop.readers or fd in loop.writers or fd in loop.poller.registered)

    until(env, gone)
    until(env, lambda: "read" in calls)  # of another thread, it may be just about to be
    assert all(isinstance(error, OSError) for error in runner.errors)
    # Nobody is called any more, the hub does not spin, and the others go on.
    before = len(calls), loop.stats.cycles
    more = Inbox(env, pair[0], 100)
    runner.call(loop.add_reader, pair[0].fileno(), more)
    pair[1].send(b"x" * 100)
    assert more.waiter.wait(10)
    env.sleep(0.02)
    assert len(calls) == before[0]
    assert loop.stats.cycles < before[1] + 20
    theirs.close()


def test_a_descriptor_closed_under_its_own_callback_tells_the_other_one(
    runner: Runner, env: Environment
) -> None:
    loop = runner.hub
    ours, theirs = native_pair(env)
    fd = ours.fileno()
    told = env.waiter()

    def writable() -> None:
        ours.close()
        loop.remove_writer(fd)

    def both() -> None:
        loop.add_reader(fd, told.wake)
        loop.add_writer(fd, writable)

    runner.call(both)
    assert told.wait(10)
    until(env, lambda: fd not in loop.readers and fd not in loop.writers)
    assert not runner.errors
    theirs.close()


@pytest.mark.parametrize("change", ["remove_writer", "add_writer"])
def test_a_change_to_a_descriptor_that_was_closed_tells_its_other_callback(
    runner: Runner, env: Environment, change: str
) -> None:
    """The poller refuses the change and drops the number: nobody else would tell the reader."""
    loop = runner.hub
    ours, theirs = native_pair(env)
    fd = ours.fileno()
    told = env.waiter()

    def closed_in_between() -> None:  # a callback: the poller cannot notice before
        loop.add_reader(fd, told.wake)
        if change == "remove_writer":
            loop.add_writer(fd, int)
        ours.close()
        if change == "remove_writer":
            assert loop.remove_writer(fd)
        else:
            with pytest.raises(hub.BadDescriptorError):
                loop.add_writer(fd, int)

    runner.call(closed_in_between)
    assert told.wait(10)
    until(env, lambda: fd not in loop.readers and fd not in loop.writers)
    assert not runner.errors
    theirs.close()


def test_descriptor_number_is_used_again(runner: Runner, env: Environment) -> None:
    ours, theirs = native_pair(env)
    fd = ours.fileno()
    runner.call(runner.hub.add_reader, fd, lambda: None)
    ours.close()  # behind the hub's back
    theirs.close()
    ours, theirs = native_pair(env)
    try:
        assert fd in (ours.fileno(), theirs.fileno())
        other = theirs if ours.fileno() == fd else ours
        mine = ours if ours.fileno() == fd else theirs
        inbox = Inbox(env, mine)
        runner.call(runner.hub.add_reader, fd, inbox)
        other.send(b"x")
        assert inbox.waiter.wait(10)
        runner.call(runner.hub.remove, fd)
    finally:
        ours.close()
        theirs.close()


def test_closed_descriptor_does_not_spin(runner: Runner, env: Environment) -> None:
    ours, theirs = native_pair(env)
    runner.call(runner.hub.add_reader, ours.fileno(), lambda: None)
    ours.close()
    theirs.close()
    runner.call(int)
    before = runner.hub.stats.cycles
    env.sleep(0.3)
    # An audit of the poller may look every 0.1 s; a spin would be tens of thousands.
    assert runner.hub.stats.cycles - before < 20


@pytest.mark.parametrize("fd", [-1, 10**9, "7", None])
def test_bad_descriptor_is_a_typed_error(
    runner: Runner, env: Environment, pair: Any, fd: Any
) -> None:
    with pytest.raises(hub.BadDescriptorError, match="descriptor"):
        runner.call(runner.hub.add_reader, fd, lambda: None)
    inbox = Inbox(env, pair[0])
    runner.call(runner.hub.add_reader, pair[0].fileno(), inbox)
    pair[1].send(b"x")
    assert inbox.waiter.wait(10), "the other descriptors go on"


def test_callback_that_raises_harms_nobody(runner: Runner, env: Environment, pair: Any) -> None:
    other = native_pair(env)

    def fail() -> None:
        other[0].recv(10)
        raise ZeroDivisionError("on purpose")

    inbox = Inbox(env, pair[0])
    runner.call(runner.hub.add_reader, other[0].fileno(), fail)
    runner.call(runner.hub.add_reader, pair[0].fileno(), inbox)
    other[1].send(b"x")
    pair[1].send(b"x")
    assert inbox.waiter.wait(10)
    other[1].send(b"x")
    for _ in range(100):
        if len(runner.errors) == 2:
            break
        env.sleep(0.01)
    assert [type(error) for error in runner.errors] == [ZeroDivisionError] * 2
    runner.call(runner.hub.remove, other[0].fileno())
    for sock in other:
        sock.close()


def test_callback_that_waits_is_refused(runner: Runner, env: Environment) -> None:
    with pytest.raises(hub.BlockingCallError, match="callback"):
        runner.call(lambda: env.waiter().wait(1))
    with pytest.raises(hub.BlockingCallError, match="callback"):
        runner.call(env.sleep, 1)
    with pytest.raises(hub.BlockingCallError, match="callback"):
        runner.call(runner.hub.run_threadsafe, int)
    assert runner.call(lambda: 7) == 7


def test_run_inside_run_is_refused(runner: Runner) -> None:
    with pytest.raises(hub.HubRunningError, match="second time"):
        runner.call(runner.hub.run_once, 0)
    with pytest.raises(hub.HubRunningError, match="second time"):
        runner.call(runner.hub.run_forever)
    assert runner.call(lambda: 7) == 7


def test_use_from_a_foreign_thread_is_refused(runner: Runner, env: Environment) -> None:
    runner.call(int)
    outcome: list[BaseException] = []
    done = env.waiter()

    def elsewhere() -> None:
        for call in (
            lambda: runner.hub.call_soon(int),
            lambda: runner.hub.call_later(1, int),
            lambda: runner.hub.add_reader(0, int),
            lambda: runner.hub.remove_reader(0),
        ):
            try:
                call()
            except BaseException as error:
                outcome.append(error)
        done.wake()

    env.original("_thread", "start_new_thread")(elsewhere, ())
    assert done.wait(10)
    assert [type(error) for error in outcome] == [hub.ForeignThreadError] * 4
    assert "call_soon_threadsafe" in str(outcome[0])


def test_wakeup_from_a_native_thread(runner: Runner, env: Environment) -> None:
    runner.call(int)
    waiter = env.waiter()
    start = env.original("_thread", "start_new_thread")
    start(lambda: runner.hub.call_soon_threadsafe(waiter.wake), ())
    assert waiter.wait(10)


def test_thousand_calls_from_threads_lose_nothing(runner: Runner, env: Environment) -> None:
    seen: list[int] = []
    done = env.waiter()
    start = env.original("_thread", "start_new_thread")

    def append(number: int) -> None:
        seen.append(number)
        if len(seen) == 1000:
            done.wake()

    def calls(first: int) -> None:
        for number in range(first, first + 250):
            runner.hub.call_soon_threadsafe(append, number)

    for first in range(0, 1000, 250):
        start(calls, (first,))
    assert done.wait(20), len(seen)
    for first in range(0, 1000, 250):
        mine = [number for number in seen if first <= number < first + 250]
        assert mine == sorted(mine), "calls of one thread run in its order"


def test_wakeup_from_a_signal_handler(runner: Runner, env: Environment) -> None:
    runner.call(int)
    waiter = env.waiter()
    old = signal.signal(signal.SIGALRM, lambda *_: runner.hub.call_soon_threadsafe(waiter.wake))
    # Again and again: CPython runs no handler for a signal that comes between its last look and the
    # system call that waits for a lock, until that ends or another signal interrupts it.
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.5)
    try:
        assert waiter.wait(10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def test_signals_do_not_end_a_wait(runner: Runner, env: Environment, pair: Any) -> None:
    hits: list[int] = []
    inbox = Inbox(env, pair[0])
    runner.call(runner.hub.add_reader, pair[0].fileno(), inbox)
    old = signal.signal(signal.SIGALRM, lambda number, _: hits.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
    try:
        for _ in range(10):  # twenty in each, unless the machine stands still
            assert not inbox.waiter.wait(0.2)
            if len(hits) > 3:
                break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert len(hits) > 3
    assert not runner.errors
    inbox.waiter = env.waiter()
    pair[1].send(b"x")
    assert inbox.waiter.wait(10)


def test_calls_run_in_the_order_of_queueing(runner: Runner) -> None:
    seen: list[int] = []

    def queue() -> None:
        for number in range(100):
            runner.hub.call_soon(seen.append, number)
        runner.hub.call_soon_threadsafe(seen.append, 100)

    runner.call(queue)
    runner.call(int)
    assert seen == list(range(101))


def test_cancelled_call_does_not_run(runner: Runner) -> None:
    seen: list[int] = []

    def queue() -> None:
        runner.hub.call_soon(seen.append, 1).cancel()
        runner.hub.call_soon(seen.append, 2)

    runner.call(queue)
    runner.call(int)
    assert seen == [2]


def test_timers_fire_in_order_and_can_be_cancelled(runner: Runner, env: Environment) -> None:
    seen: list[str] = []
    done = env.waiter()

    def queue() -> None:
        runner.hub.call_later(0.03, lambda: (seen.append("third"), done.wake()))
        runner.hub.call_later(0.01, seen.append, "first")
        cancelled = runner.hub.call_later(0.015, seen.append, "never")
        runner.hub.call_later(0.02, seen.append, "second")
        cancelled.cancel()
        cancelled.cancel()

    runner.call(queue)
    assert done.wait(10)
    assert seen == ["first", "second", "third"]


def test_repeated_timer_until_cancelled(runner: Runner, env: Environment) -> None:
    times: list[float] = []
    done = env.waiter()

    def tick() -> None:
        times.append(runner.hub.time())
        if len(times) == 5:
            timer.cancel()
            done.wake()

    timer = runner.call(runner.hub.call_repeatedly, 0.01, tick)
    assert done.wait(10)
    env.sleep(0.05)
    assert len(times) == 5
    with pytest.raises(ValueError, match="above 0"):
        runner.call(runner.hub.call_repeatedly, 0, tick)


def test_timer_from_another_task_is_noticed_while_waiting(runner: Runner, env: Environment) -> None:
    runner.call(int)
    done = env.waiter()
    env.sleep(0.02)  # the hub waits without a limit now
    runner.hub.call_soon_threadsafe(runner.hub.call_later, 0.01, done.wake)
    assert done.wait(10)


def test_flood_on_one_descriptor_starves_nobody(
    runner: Runner, env: Environment, pair: Any
) -> None:
    """A reader that never reads keeps its descriptor ready: timers, calls and tasks go on."""
    ticks = [0]
    calls = [0]
    pair[1].send(b"x")

    def busy() -> None:
        end = runner.hub.time() + 0.002
        while runner.hub.time() < end:
            pass

    def again() -> None:
        calls[0] += 1
        runner.hub.call_soon(again)

    def start() -> None:
        runner.hub.add_reader(pair[0].fileno(), busy)
        runner.hub.call_repeatedly(0.01, lambda: ticks.__setitem__(0, ticks[0] + 1))
        again()

    runner.call(start)
    cycles = runner.hub.stats.cycles
    mine = 0
    end = runner.hub.time() + 20
    # Half a second is enough for fifty, but the machine may stand still for longer.
    while min(ticks[0], calls[0], mine) < 20 and runner.hub.time() < end:
        env.sleep(0.001)
        mine += 1
    runner.call(runner.hub.remove, pair[0].fileno())
    assert min(ticks[0], calls[0], mine) >= 20
    assert runner.hub.stats.cycles >= cycles + 10, "without slices, it is a single one"


def test_ready_descriptors_take_turns(runner: Runner, env: Environment) -> None:
    """More is ready than fits into a slice: each one is served before any is served often."""
    pairs = [native_pair(env) for _ in range(40)]
    served = [0] * len(pairs)
    done = env.waiter()

    def serve(index: int) -> None:
        served[index] += 1
        end = runner.hub.time() + 0.001
        while runner.hub.time() < end:
            pass
        if min(served) >= 2:
            done.wake()

    def start() -> None:
        for index, (ours, theirs) in enumerate(pairs):
            theirs.send(b"x")
            runner.hub.add_reader(ours.fileno(), serve, index)

    runner.call(start)
    try:
        assert done.wait(20), served
        assert max(served) <= 2 * min(served) + 2
    finally:
        for ours, theirs in pairs:
            runner.call(runner.hub.remove, ours.fileno())
            ours.close()
            theirs.close()


@pytest.mark.parametrize("count", [2000, 10000])
def test_thousands_of_descriptors(runner: Runner, env: Environment, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count + 200:
        pytest.skip(f"the hard limit of open files is {hard}: ulimit -n {count + 200}")
    if runner.hub.poller.name == "select":
        pytest.skip(
            "select(2) takes no descriptor above 1023; its poller says so, see test_pollers"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
    pairs = [native_pair(env) for _ in range(count // 2)]
    try:
        fds = [end.fileno() for pair in pairs for end in pair]

        def register() -> None:
            for fd in fds:
                runner.hub.add_reader(fd, lambda: None)

        runner.call(register)
        assert len(runner.hub.readers) == count
        last = pairs[-1][0]
        for _ in range(3):
            inbox = Inbox(env, last)
            runner.call(runner.hub.add_reader, last.fileno(), inbox)
            pairs[-1][1].send(b"x")
            assert inbox.waiter.wait(10)
        runner.call(lambda: [runner.hub.remove(fd) for fd in fds])
        assert not runner.hub.readers
    finally:
        for ours, theirs in pairs:
            ours.close()
            theirs.close()


def test_stop_before_run_forever_ends_it_after_one_cycle(runner: Runner, env: Environment) -> None:
    with hub.Hub(poller=runner.hub.poller.name) as loop:
        loop.stop()
        assert env.spawn(loop.run_forever).join(10)


def test_run_once_returns_after_its_timeout(runner: Runner) -> None:
    with hub.Hub(poller=runner.hub.poller.name) as loop:
        began = loop.time()
        assert loop.run_once(0.05) == 0
        assert 0.04 <= loop.time() - began < 5
        loop.call_soon(int)
        assert loop.run_once(5) == 1


def test_closed_hub_refuses_everything(runner: Runner) -> None:
    loop = hub.Hub(poller=runner.hub.poller.name)
    loop.close()
    loop.close()
    for call in (
        lambda: loop.call_soon(int),
        lambda: loop.call_soon_threadsafe(int),
        lambda: loop.call_later(1, int),
        lambda: loop.add_reader(0, int),
        lambda: loop.run_once(0),
        loop.run_forever,
        loop.fileno,
    ):
        with pytest.raises(hub.HubClosedError, match="get_hub"):
            call()
    assert "closed" in repr(loop)


def test_killed_runner_leaves_a_hub_that_runs_again(
    runner: Runner, env: Environment, pair: Any
) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    inbox = Inbox(env, pair[0])
    runner.call(runner.hub.add_reader, pair[0].fileno(), inbox)
    runner.task.kill()
    assert runner.task.join(10)
    pair[1].send(b"x")
    assert not inbox.data
    runner.task = env.spawn(runner.hub.run_forever)
    assert inbox.waiter.wait(10)


def test_repr_shows_live_counts(runner: Runner, pair: Any) -> None:
    runner.call(runner.hub.add_reader, pair[0].fileno(), int)
    runner.call(runner.hub.call_later, 1000, int)
    text = repr(runner.hub)
    assert runner.hub.poller.name in text
    assert "1 readers, 0 writers, 1 timers" in text
