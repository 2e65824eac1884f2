"""Records that are made in a hub: queued there, emitted by a task, never lost on the way."""

from __future__ import annotations

import inspect
import logging
import os
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub import _log, shared
from hub.environment import Environment, Task, running_callbacks
from tests.support.patched import run_patched
from tests.support.tasks import LONG, in_child, run_natively, until

pytestmark = pytest.mark.green_matrix

logger = logging.getLogger("hub.test")


class Keep(logging.Handler):
    """Keeps what is emitted, and whether a hub callback was emitting it."""

    def __init__(self, env: Environment) -> None:
        super().__init__()
        self.env = env
        self.lines: list[str] = []
        self.in_callback = False
        self.when_emitting: Callable[[], object] = int

    def emit(self, record: logging.LogRecord) -> None:
        self.in_callback |= self.env.current() in running_callbacks
        self.lines.append(record.getMessage())
        self.when_emitting()


@pytest.fixture
def kept(env: Environment) -> Iterator[Keep]:
    handler = Keep(env)
    logger.addHandler(handler)
    logger.propagate = False
    yield handler
    handler.when_emitting = int
    _log.emit_all()  # what a failed test has left would be told to the next one
    logger.removeHandler(handler)
    logger.propagate = True


@pytest.fixture
def loop() -> Iterator[hub.Hub]:
    """The shared hub, which knows its thread and has begun."""
    made = hub.get_hub()
    made.run_threadsafe(int, timeout=LONG)
    yield made
    until(made.environment, lambda: made._records not in _log._waiting)


def warn(loop: hub.Hub, line: str) -> None:
    loop.log_later(logger, logging.WARNING, line)


def no_task(*_: object) -> None:
    """In place of `Environment.spawn`: what happens while the interpreter shuts down."""
    raise RuntimeError("can't start new thread")


class Spawned:
    """Spies on the tasks that an environment starts."""

    def __init__(self, env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tasks: list[Task] = []
        self._spawn = env.spawn
        monkeypatch.setattr(env, "spawn", self)

    def __call__(self, function: Any, *args: Any) -> Task:
        self.tasks.append(self._spawn(function, *args))
        return self.tasks[-1]


def test_records_are_emitted_in_order_and_not_in_a_callback(
    env: Environment, loop: hub.Hub, kept: Keep
) -> None:
    def callback() -> None:
        for number in range(3):
            loop.log_later(logger, logging.WARNING, "line %d", number)
        assert not kept.lines

    loop.run_threadsafe(callback, timeout=LONG)
    until(env, lambda: len(kept.lines) == 3)
    assert kept.lines == ["line 0", "line 1", "line 2"]
    assert not kept.in_callback


def test_an_error_in_a_callback_is_told_with_its_traceback(
    env: Environment, loop: hub.Hub, caplog: pytest.LogCaptureFixture
) -> None:
    loop.run_threadsafe(loop.call_soon, lambda: {}[1], timeout=LONG)
    until(env, lambda: "KeyError" in caplog.text)
    assert "the hub goes on" in caplog.text


def test_a_foreign_native_thread_can_log(env: Environment, loop: hub.Hub, kept: Keep) -> None:
    """No greenlet and no loop of the green library is made where none would run."""
    hubs = len(shared._shared)
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for number in range(3):
        run_natively(env, lambda number=number: warn(loop, f"foreign {number}"))  # type: ignore[misc]
    until(env, lambda: len(kept.lines) == 3)
    assert kept.lines == ["foreign 0", "foreign 1", "foreign 2"]
    assert len(shared._shared) == hubs
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
    # And whoever logs next is heard as well.
    loop.run_threadsafe(warn, loop, "ours", timeout=LONG)
    until(env, lambda: kept.lines[-1] == "ours")


def test_an_emitter_that_was_killed_before_it_began_is_replaced(
    env: Environment, loop: hub.Hub, kept: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    spawned = Spawned(env, monkeypatch)

    def callback() -> None:
        warn(loop, "first")
        # Task.kill() leaves it to a later turn; under eventlet the greenlet has begun by then.
        assert spawned.tasks[0]._kill is not None
        [victim] = inspect.getclosurevars(spawned.tasks[0]._kill).nonlocals.values()
        victim.kill(**({"block": False} if env.name == "gevent" else {}))

    loop.run_threadsafe(callback, timeout=LONG)
    until(env, lambda: spawned.tasks[0].done)
    assert not kept.lines
    loop.run_threadsafe(warn, loop, "second", timeout=LONG)
    until(env, lambda: len(kept.lines) == 2)
    assert kept.lines == ["first", "second"]


def test_an_emitter_that_was_killed_in_a_handler_is_replaced(
    env: Environment, loop: hub.Hub, kept: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    spawned = Spawned(env, monkeypatch)
    kept.when_emitting = lambda: env.waiter().wait(LONG)  # a slow handler
    warn(loop, "first")
    warn(loop, "second")
    until(env, lambda: kept.lines)
    kept.when_emitting = int
    spawned.tasks[0].kill()
    until(env, lambda: spawned.tasks[0].done)
    warn(loop, "third")
    until(env, lambda: len(kept.lines) == 3)
    assert kept.lines == ["first", "second", "third"]


def test_a_filter_that_raises_silences_nobody_else(
    env: Environment, loop: hub.Hub, kept: Keep
) -> None:
    def broken(record: logging.LogRecord) -> bool:
        if record.getMessage() == "first":
            raise ValueError("of the program")
        return True

    logger.addFilter(broken)
    try:
        loop.run_threadsafe(lambda: (warn(loop, "first"), warn(loop, "second")), timeout=LONG)
        until(env, lambda: kept.lines == ["second"])
    finally:
        logger.removeFilter(broken)


def test_a_flood_is_bounded_and_counted(
    env: Environment, kept: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.Hub() as mine:
        mine.thread = env.thread_id()
        with monkeypatch.context() as patch:
            patch.setattr(env, "spawn", no_task)
            for number in range(_log.LIMIT + 5):
                mine.log_later(logger, logging.WARNING, "record %d", number)
        assert not kept.lines
        _log.emit_all()
        assert len(kept.lines) == _log.LIMIT
        assert kept.lines[0] == "record 0 (5 earlier records were left out)"
        warn(mine, "again")
        until(env, lambda: kept.lines[-1] == "again")


def test_records_of_a_hub_that_closes_are_emitted(env: Environment, kept: Keep) -> None:
    with hub.Hub() as mine:
        mine.call_soon(warn, mine, "in a callback")
        mine.run_once(0)
        # Under green threads it is queued, and the hub never comes to it.
        run_natively(env, lambda: warn(mine, "from elsewhere"))
    until(env, lambda: len(kept.lines) == 2)
    warn(mine, "afterwards")
    until(env, lambda: len(kept.lines) == 3)
    assert kept.lines == ["in a callback", "from elsewhere", "afterwards"]


def test_a_foreign_thread_may_log_on_a_closed_hub(env: Environment, kept: Keep) -> None:
    with hub.Hub() as mine:
        mine.run_once(0)
    run_natively(env, lambda: warn(mine, "too late"))
    _log.emit_all()  # what the end of the process does
    until(env, lambda: kept.lines == ["too late"])


def test_a_child_does_not_tell_what_the_parent_has_to_tell(
    env: Environment, kept: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.Hub() as mine, monkeypatch.context() as patch:
        mine.thread = env.thread_id()
        patch.setattr(env, "spawn", no_task)
        warn(mine, "the parent's")

        def child() -> None:
            _log.emit_all()
            assert kept.lines == []
            patch.undo()
            warn(mine, "the child's")
            _log.emit_all()
            until(env, lambda: kept.lines)
            assert kept.lines == ["the child's"]

        in_child(child)
        assert kept.lines == []
        _log.emit_all()
        assert kept.lines == ["the parent's"]


def test_records_of_a_hub_of_ones_own_are_emitted_at_exit() -> None:
    done = run_patched(
        [
            "-c",
            textwrap.dedent("""
            import logging, sys
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            import hub
            mine = hub.Hub()
            mine.call_soon(lambda: 1 / 0)
            mine.run_once(0)
            del mine
            """),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "the hub goes on" in done.stdout
    assert "ZeroDivisionError" in done.stdout
