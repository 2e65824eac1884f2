"""What callbacks must not do, and what becomes of them that do it: the hub goes on."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub.environment import Environment
from tests.support.patched import run_patched
from tests.support.sockets import native_pair
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix


class Errors(list[tuple[BaseException, object]]):
    """An on_error hook."""

    def __call__(self, error: BaseException, callback: object) -> None:
        self.append((error, callback))


@pytest.fixture(params=["shared", "own"])
def loop(
    request: pytest.FixtureRequest, env: Environment, monkeypatch: pytest.MonkeyPatch
) -> Iterator[hub.Hub]:
    """A hub that runs in the background, and one of its own that a task runs; with `Errors`."""
    if request.param == "shared":
        shared = hub.get_hub()
        monkeypatch.setattr(shared, "on_error", Errors())
        yield shared
    else:
        with hub.Hub(on_error=Errors()) as mine:
            task = env.spawn(mine.run_forever)
            yield mine
            mine.stop()
            assert task.join(LONG)


def errors_of(loop: hub.Hub) -> Errors:
    assert isinstance(loop.on_error, Errors)
    return loop.on_error


@pytest.fixture
def waits(env: Environment) -> Iterator[dict[str, Callable[[], object]]]:
    """Ways to wait through the green library, all bounded."""
    if not env.green or time.sleep.__module__ == "time":
        pytest.skip("the library's own waits are native here")
    ours, theirs = env.socketpair()
    ours.settimeout(5)
    lock = threading.Lock()
    lock.acquire()
    with ours, theirs:
        yield {
            "sleep": lambda: time.sleep(5),
            "lock": lambda: lock.acquire(timeout=5),
            "event": lambda: threading.Event().wait(5),
            "recv": lambda: ours.recv(1),
            "thread": lambda: threading.Thread(target=int).start(),
        }


@pytest.mark.parametrize("way", ["sleep", "lock", "event", "recv", "thread"])
def test_a_callback_that_waits_through_the_green_library_is_refused(
    env: Environment, loop: hub.Hub, waits: dict[str, Callable[[], object]], way: str
) -> None:
    wait = waits[way]
    ended: list[object] = []

    def callback() -> None:
        try:
            ended.append(wait())
        except BaseException as error:
            ended.append(error)
            raise

    # What is queued behind it comes to its turn.
    after = env.waiter()
    began = time.monotonic()
    loop.call_soon_threadsafe(callback)
    loop.call_soon_threadsafe(after.wake)
    assert after.wait(LONG)
    assert time.monotonic() - began < 4
    [(error, culprit)] = errors_of(loop)
    assert isinstance(error, hub.BlockingCallError)
    assert "spawn()" in str(error)
    assert culprit is callback
    assert ended == [error] or ended == [error.__cause__]
    assert loop.run_threadsafe(lambda: 42, timeout=LONG) == 42


@pytest.mark.parametrize("way", ["sleep", "waiter", "lock", "result"])
def test_a_callback_that_waits_through_this_library_is_refused(
    env: Environment, loop: hub.Hub, way: str
) -> None:
    lock = hub.Lock()
    lock.acquire()
    go_on = env.waiter()
    task = env.spawn(go_on.wait, LONG)
    ways: dict[str, Callable[[], object]] = {
        "sleep": lambda: env.sleep(0.2),
        "waiter": lambda: env.waiter().wait(0.2),
        "lock": lambda: lock.acquire(timeout=0.2),
        "result": lambda: task.result(0.2),
    }
    loop.call_soon_threadsafe(ways[way])
    loop.run_threadsafe(int, timeout=LONG)
    assert [type(error) for error, _ in errors_of(loop)] == [hub.BlockingCallError]
    go_on.wake()
    assert task.join(LONG)


def test_a_task_that_a_callback_starts_may_wait(env: Environment, loop: hub.Hub) -> None:
    def work() -> int:
        time.sleep(0.001)
        env.sleep(0.001)
        return 42

    task = loop.run_threadsafe(env.spawn, work, timeout=LONG)
    assert task.result(LONG) == 42
    assert not errors_of(loop)


def test_who_runs_a_hub_may_wait_between_the_cycles(env: Environment) -> None:
    done: list[str] = []
    with hub.Hub() as mine:
        mine.call_soon(done.append, "first")
        mine.run_once(0)
        time.sleep(0.001)
        mine.call_later(0.005, done.append, "second")
        other = env.spawn(lambda: (time.sleep(0.001), done.append("other")))
        while "second" not in done:
            mine.run_once(1)
        time.sleep(0.001)
        assert other.join(LONG)
    assert set(done) == {"first", "second", "other"}


def test_a_hub_that_a_callback_runs_may_not_wait_either(
    loop: hub.Hub, waits: dict[str, Callable[[], object]]
) -> None:
    """The inner hub leaves the outer one's refusal in force when it ends."""
    inner = Errors()

    def callback() -> None:
        with hub.Hub(on_error=inner) as mine:
            mine.call_soon(waits["sleep"])
            mine.run_once(0)
        waits["sleep"]()

    loop.call_soon_threadsafe(callback)
    loop.run_threadsafe(int, timeout=LONG)
    assert [type(error) for error, _ in inner] == [hub.BlockingCallError]
    assert [type(error) for error, _ in errors_of(loop)] == [hub.BlockingCallError]


@pytest.mark.parametrize("run", ["run_once", "run_forever"])
def test_run_inside_run_is_refused(env: Environment, loop: hub.Hub, run: str) -> None:
    loop.call_soon_threadsafe(getattr(loop, run))
    assert loop.run_threadsafe(lambda: 42, timeout=LONG) == 42
    [(error, _)] = errors_of(loop)
    assert isinstance(error, hub.HubRunningError)
    assert "call_soon" in str(error)


@pytest.mark.parametrize("kind", ["descriptor", "call", "timer"])
def test_what_is_meant_for_a_task_is_an_error_of_the_callback_that_raises_it(
    env: Environment, loop: hub.Hub, kind: str
) -> None:
    """A green loop drops the watcher whose callback raises: the hub must not be that callback."""
    kinds = (asyncio.CancelledError, GeneratorExit, *env.timeout_types)
    ours, theirs = native_pair(env)
    other, its_peer = native_pair(env)
    got: list[bytes] = []

    def register() -> None:
        loop.add_reader(other.fileno(), lambda: got.append(other.recv(1)))

    loop.run_threadsafe(register, timeout=LONG)
    for number, error in enumerate(kinds, 1):

        def leave(error: type[BaseException] = error) -> None:
            if kind == "descriptor":
                loop.remove_reader(ours.fileno())
            raise error

        def begin(leave: Callable[[], None] = leave) -> None:
            if kind == "descriptor":
                loop.add_reader(ours.fileno(), leave)
            elif kind == "call":
                loop.call_soon(leave)
            else:
                loop.call_later(0.001, leave)

        loop.run_threadsafe(begin, timeout=LONG)
        theirs.send(b"x")
        until(env, lambda number=number: len(errors_of(loop)) == number)
        its_peer.send(b"y")
        until(env, lambda number=number: len(got) == number)
    assert [type(error) for error, _ in errors_of(loop)] == list(kinds)
    loop.run_threadsafe(loop.remove, other.fileno(), timeout=LONG)
    for end in (ours, theirs, other, its_peer):
        end.close()


@pytest.mark.parametrize("how", ["raised", "of a signal handler"])
@pytest.mark.parametrize("exit_with", ["SystemExit", "KeyboardInterrupt"])
def test_the_hub_outlives_an_exit_in_a_callback_of_a_descriptor(how: str, exit_with: str) -> None:
    """A program that shuts down in good order needs it."""
    done = run_patched(["-c", EXIT_PROGRAM, how, exit_with], timeout=60)
    assert done.returncode == 0, done.stderr
    caught, served, woken = done.stdout.split()
    # The thread of `default` has no program behind it; a signal is the main thread's.
    background = os.environ["GREENKOMBU_TEST_ENVIRONMENT"] == "default" and how == "raised"
    assert caught == ("none" if background else exit_with)
    assert (served, woken) == ("True", "True")


EXIT_PROGRAM = """
import os, signal, sys
import hub
from tests.support.sockets import native_pair
from tests.support.tasks import until
how, name = sys.argv[1:]
kind = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt}[name]
def leave(*_):
    raise kind
signal.signal(signal.SIGTERM, leave)
env, loop = hub.get_environment(), hub.get_hub()
loop.on_error = lambda error, callback: None
ours, theirs = native_pair(env)
other, its_peer = native_pair(env)
got, ran = [], []
def bad():
    loop.remove_reader(ours.fileno())
    ran.append(True)
    if how == "raised":
        leave()
    os.kill(os.getpid(), signal.SIGTERM)
loop.run_threadsafe(loop.add_reader, ours.fileno(), bad, timeout=10)
loop.run_threadsafe(
    loop.add_reader, other.fileno(), lambda: got.append(other.recv(1)), timeout=10)
caught = "none"
try:
    theirs.send(b"x")
    until(env, lambda: ran)
    env.sleep(0.05)
except kind:
    caught = kind.__name__
its_peer.send(b"y")
until(env, lambda: got)
theirs.send(b"z")
print(caught, bool(got), env.wait_readable(ours.fileno(), 10))
"""


@pytest.mark.parametrize("exit_with", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_the_daemon_thread_is_an_error_like_any_other(
    env: Environment, monkeypatch: pytest.MonkeyPatch, exit_with: type[BaseException]
) -> None:
    """There is no program behind that thread that could end."""
    if env.green:
        pytest.skip("there it reaches the main greenlet")
    loop = hub.get_hub()
    monkeypatch.setattr(loop, "on_error", Errors())
    thread = loop.run_threadsafe(env.current, timeout=LONG)

    def leave(*_: Any) -> None:
        raise exit_with("from a callback")

    loop.call_soon_threadsafe(leave)
    loop.call_soon_threadsafe(loop.at_turn_end, leave)
    until(env, lambda: len(errors_of(loop)) == 2)
    assert [(type(error), what) for error, what in errors_of(loop)] == [(exit_with, leave)] * 2
    assert loop.run_threadsafe(env.current, timeout=LONG) == thread


def test_an_exit_in_a_hub_that_a_task_runs_leaves_through_run(env: Environment) -> None:
    with hub.Hub() as mine:
        mine.call_soon(sys.exit, 3)
        with pytest.raises(SystemExit):
            mine.run_once(0)
        assert mine.run_threadsafe is not None
        mine.call_soon(mine.stop)
        mine.run_forever()
