"""Finalizers and the reaper, in every environment and wherever the collector may run."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub import Finalizer, finalize
from hub.environment import Environment
from hub.finalize import Home, defer, drain_reaper, reap
from hub.primitives import Lock
from tests.support.tasks import LONG, in_child, run_natively, until

pytestmark = pytest.mark.green_matrix


@pytest.fixture(autouse=True)
def unraisable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was raised where nobody could catch it; must be nothing."""
    caught: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: caught.append(repr(args)))
    yield caught
    assert caught == []


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        if is_open(fd):
            os.close(fd)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


class Owner:
    """Has a resource, and is part of a cycle."""

    def __init__(self) -> None:
        self.me = self


def make_owner(callback: Callable[..., object], *args: Any) -> None:
    """Make an owner with a finalizer and drop it."""
    Finalizer(Owner(), callback, *args)


# -- Finalizer ----------------------------------------------------------------------------------
def test_the_callback_runs_once_when_the_owner_is_collected() -> None:
    calls: list[tuple[int, ...]] = []
    owner = Owner()
    finalizer = Finalizer(owner, lambda *args: calls.append(args), 1, 2)
    assert finalizer.alive
    assert repr(finalizer).startswith("<Finalizer of a Owner, alive:")
    gc.collect()
    assert calls == []
    del owner
    gc.collect()
    assert calls == [(1, 2)]
    assert not finalizer.alive
    assert finalizer() is None
    assert finalizer.detach() is False
    assert calls == [(1, 2)]
    assert repr(finalizer).startswith("<Finalizer of a collected object, dead:")


def test_a_finalizer_may_be_called_or_detached_before() -> None:
    calls: list[int] = []

    def note(number: int) -> int:
        calls.append(number)
        return number

    first, second = Owner(), Owner()
    called, detached = Finalizer(first, note, 1), Finalizer(second, note, 2)
    assert called() == 1
    assert detached.detach() is True
    assert not called.alive
    assert not detached.alive
    assert called() is None
    assert detached() is None
    del first, second
    gc.collect()
    assert calls == [1]


def test_a_finalizer_does_not_keep_its_owner_or_itself_alive() -> None:
    owner = Owner()
    finalizer = Finalizer(owner, print)
    gone = weakref.ref(owner)
    del owner
    finalizer.detach()
    gc.collect()
    assert gone() is None
    before = len(Finalizer._live)
    make_owner(lambda: None)
    gc.collect()
    assert len(Finalizer._live) == before


def test_a_callback_that_refers_to_its_owner_is_refused() -> None:
    class WithMethod(Owner):
        def close(self) -> None:
            pass

    owner = WithMethod()
    for arguments in ((owner.close,), (print, owner), (owner,)):
        with pytest.raises(ValueError, match="refers to its owner"):
            Finalizer(owner, *arguments)  # type: ignore[arg-type]


def test_an_owner_that_cannot_be_referred_to_weakly_is_refused() -> None:
    before = len(Finalizer._live)
    with pytest.raises(TypeError, match="weak reference"):
        Finalizer(1, print)
    assert len(Finalizer._live) == before


def test_an_error_in_a_callback_is_logged_by_the_hub(
    env: Environment, caplog: pytest.LogCaptureFixture
) -> None:
    def failing() -> None:
        raise OSError("the cable is cut")

    lines: list[str] = []
    hub.get_hub().call_soon_threadsafe(lines.append, "the hub exists")
    until(env, lambda: lines)
    make_owner(failing)
    gc.collect()
    until(env, lambda: "the cable is cut" in caplog.text)
    assert "error in the finalizer <function" in caplog.text


def test_errors_of_finalizers_and_of_left_over_work_reach_the_hook_of_the_hub(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    loop = hub.get_hub()
    monkeypatch.setattr(loop, "on_error", lambda error, what: told.append((str(error), repr(what))))
    make_owner(int, "of a finalizer")
    gc.collect()
    defer(int, "left over")
    loop.run_threadsafe(int, timeout=LONG)
    until(env, lambda: len(told) == 2)
    text = "invalid literal for int() with base 10: "
    assert (text + "'of a finalizer'", "the finalizer <class 'int'>") in told
    assert (text + "'left over'", "<class 'int'>") in told


# -- where the collector runs ---------------------------------------------------------------------
def collect_here(env: Environment) -> None:
    gc.collect()


def collect_in_a_hub_callback(env: Environment) -> None:
    hub.get_hub().run_threadsafe(gc.collect, timeout=LONG)


def collect_under_a_lock(env: Environment) -> None:
    lock = Lock()
    with lock:
        gc.collect()
        assert not lock.acquire(blocking=False)


def collect_in_a_task(env: Environment) -> None:
    env.spawn(gc.collect).result(LONG)


def collect_in_a_native_thread(env: Environment) -> None:
    run_natively(env, gc.collect)


PLACES = [
    collect_here,
    collect_in_a_hub_callback,
    collect_under_a_lock,
    collect_in_a_task,
    collect_in_a_native_thread,
]


@pytest.mark.parametrize("collect", PLACES, ids=lambda function: function.__name__)
def test_descriptors_of_garbage_are_closed_by_their_hub(
    env: Environment, collect: Callable[[Environment], None]
) -> None:
    """The hub takes them out of its poller first: a new file of that number is not disturbed."""
    loop = hub.get_hub()
    pipes = [os.pipe() for _ in range(20)]
    called: list[int] = []
    for reader, _ in pipes:
        loop.call_soon_threadsafe(loop.add_reader, reader, called.append, reader)
    until(env, lambda: all(reader in loop.readers for reader, _ in pipes))
    gc.disable()
    try:
        for ends in pipes:
            for fd in ends:
                make_owner(reap, fd, weakref.ref(loop))
        collect(env)
    finally:
        gc.enable()
    until(env, lambda: not any(is_open(fd) for ends in pipes for fd in ends))
    assert not any(reader in loop.readers for reader, _ in pipes)
    assert not any(fd in loop.poller.registered for ends in pipes for fd in ends)
    # The numbers are free again, and mean something else now.
    reader, writer = os.pipe()
    assert reader in [fd for ends in pipes for fd in ends]
    os.write(writer, b"x")
    env.sleep(0.01)
    assert called == []
    os.close(reader)
    os.close(writer)


def test_a_finalizer_in_a_hub_callback_does_not_close_what_that_cycle_may_still_report(
    env: Environment, pipe: tuple[int, int]
) -> None:
    loop = hub.get_hub()
    seen: list[bool] = []

    def collect() -> None:
        gc.collect()
        seen.append(is_open(pipe[0]))

    gc.disable()
    try:
        make_owner(reap, pipe[0], weakref.ref(loop))
        loop.run_threadsafe(collect, timeout=LONG)
    finally:
        gc.enable()
    assert seen == [True]
    until(env, lambda: not is_open(pipe[0]))


# -- reap -----------------------------------------------------------------------------------------
def test_without_a_hub_a_descriptor_is_closed_at_once(pipe: tuple[int, int]) -> None:
    reap(pipe[0])
    assert not is_open(pipe[0])
    reap(pipe[0])  # closed already: nobody is told


def test_with_a_hub_that_is_gone_or_closed_a_descriptor_is_closed_at_once(
    env: Environment, pipe: tuple[int, int]
) -> None:
    loop = hub.Hub()
    reference = weakref.ref(loop)
    loop.close()
    reap(pipe[0], reference)
    assert not is_open(pipe[0])
    del loop
    gc.collect()
    reap(pipe[1], reference)
    assert not is_open(pipe[1])


def test_the_hub_is_woken_for_a_descriptor(env: Environment, pipe: tuple[int, int]) -> None:
    loop = hub.get_hub()
    env.sleep(0.01)  # let it go to wait
    run_natively(env, lambda: reap(pipe[0], weakref.ref(loop)))
    until(env, lambda: not is_open(pipe[0]))


# -- defer ----------------------------------------------------------------------------------------
def test_deferred_work_runs_in_the_hub_of_its_home(env: Environment) -> None:
    ran: list[object] = []
    home = Home()
    hub.get_hub().run_threadsafe(int, timeout=LONG)
    run_natively(env, lambda: defer(lambda: ran.append(env.thread_id()), home=home))
    until(env, lambda: ran)
    if env.green:
        assert ran == [env.thread_id()]


def test_work_for_a_thread_without_a_hub_is_done_by_any_hub_in_its_next_cycle(
    env: Environment,
) -> None:
    ran: list[int] = []
    home = Home()
    home.thread = -1  # no hub runs there

    def leave() -> None:
        defer(ran.append, 1, home=home)
        defer(ran.append, 2)
        assert ran == []

    hub.get_hub().run_threadsafe(leave, timeout=LONG)
    hub.get_hub().run_threadsafe(int, timeout=LONG)
    assert ran == [1, 2]


def test_left_over_work_is_done_by_drain_reaper(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[int] = []

    def leave() -> int:  # in the hub, which cannot come in between there
        defer(int, "x")
        defer(ran.append, 1)
        return drain_reaper() * 10 + drain_reaper()

    assert hub.get_hub().run_threadsafe(leave, timeout=LONG) == 20
    assert ran == [1]
    until(hub.get_environment(), lambda: "error in <class 'int'>" in caplog.text)


def test_work_that_leaves_more_work_does_not_keep_the_caller() -> None:
    ran: list[int] = []

    def again() -> None:
        ran.append(1)
        defer(again)

    def leave() -> list[int]:
        defer(again)
        counts = [drain_reaper(), drain_reaper()]
        finalize._left_over.clear()
        return counts

    assert hub.get_hub().run_threadsafe(leave, timeout=LONG) == [1, 1]
    assert len(ran) == 2


def test_home_of_a_closed_hub_takes_nothing(env: Environment) -> None:
    home = Home()
    loop = hub.get_hub()
    loop.run_threadsafe(int, timeout=LONG)
    assert home.call(int) is True
    # As in the moment between the look at the list of hubs and the call.
    home_of_nobody = Home(env)
    loop.close()
    assert home_of_nobody.call(int) is False
    assert hub.get_hub().run_threadsafe(int, timeout=LONG) == 0


# -- forks and exit -------------------------------------------------------------------------------
def test_in_the_child_garbage_is_closed_at_once_and_sends_nothing(
    env: Environment, pipe: tuple[int, int]
) -> None:
    loop = hub.get_hub()
    loop.run_threadsafe(int, timeout=LONG)
    owner = Owner()
    finalizer = Finalizer(owner, reap, pipe[0], weakref.ref(loop))
    box = [owner]
    del owner

    def child() -> None:
        box.clear()
        gc.collect()
        assert not is_open(pipe[0])

    in_child(child)
    assert is_open(pipe[0])
    assert finalizer.detach()


def run_script(script: str) -> list[str]:
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    start = f"from tests.run import ENVIRONMENTS\nENVIRONMENTS[{name!r}]()\nimport os, sys, gc\n"
    start += "say = lambda text: os.write(1, (text + '\\n').encode())\n"
    start += "sys.unraisablehook = lambda args: say('unraisable ' + repr(args))\n"
    start += "import hub\nfrom hub.finalize import *\nclass Owner: pass\n"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", start + script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_at_exit_what_is_alive_is_finalized_youngest_first() -> None:
    lines = run_script(
        """
owners = [Owner() for _ in range(4)]
finalizers = [Finalizer(owner, say, f"callback {n}") for n, owner in enumerate(owners)]
finalizers[1].atexit = False
finalizers[2].detach()
defer(say, "left over")
"""
    )
    assert lines == ["left over", "callback 3", "callback 0"]


def test_at_exit_descriptors_are_closed_and_errors_are_logged() -> None:
    lines = run_script(
        """
import logging, weakref
class Handler(logging.Handler):
    def emit(self, record):
        say(record.getMessage() + ": " + str(record.exc_info[1]))
logging.getLogger("hub").addHandler(Handler())
with_hub, _ = os.pipe()
without, _ = os.pipe()
loop = hub.get_hub()
loop.run_threadsafe(loop.add_reader, with_hub, say, "called for a closed descriptor", timeout=10)
owners = [Owner(), Owner(), Owner(), Owner()]
def look():
    try:
        os.fstat(without)
    except OSError:
        say("closed")
Finalizer(owners[0], look)
Finalizer(owners[1], reap, without)
Finalizer(owners[2], reap, with_hub, weakref.ref(loop))
Finalizer(owners[3], int, "not a number")
"""
    )
    assert lines[0].startswith("error in the finalizer <class 'int'>: invalid literal")
    assert lines[1:] == ["closed"]


def test_at_exit_in_a_child_only_its_own_finalizers_run(
    pipe: tuple[int, int], caplog: pytest.LogCaptureFixture
) -> None:
    """As above, but in a child, where it can be looked at."""
    owner = Owner()
    calls: list[str] = []
    parents = Finalizer(owner, calls.append, "parent's")

    def child() -> None:
        mine = Owner()
        Finalizer(mine, calls.append, "first")
        Finalizer(mine, int, "not a number")
        Finalizer(mine, reap, pipe[0], weakref.ref(hub.Hub()))
        Finalizer(mine, calls.append, "second")
        Finalizer(mine, calls.append, "never").atexit = False
        defer(calls.append, "left over")
        finalize._at_exit()
        assert calls == ["left over", "second", "first"]
        assert "not a number" in caplog.text
        assert not is_open(pipe[0])
        assert parents.alive

    in_child(child)
    assert calls == []
    assert parents.detach()


def test_at_exit_a_hub_that_was_stopped_is_not_started_again() -> None:
    lines = run_script(
        """
import weakref
owner = Owner()
reader, writer = os.pipe()
def look():
    try:
        os.fstat(reader)
    except OSError:
        say("closed")
Finalizer(owner, look)  # registers with atexit before the hub does, and so runs after it
loop = hub.get_hub()
loop.run_threadsafe(loop.add_reader, reader, say, "called for a closed descriptor", timeout=10)
Finalizer(owner, reap, reader, weakref.ref(loop))
"""
    )
    assert lines == ["closed"]


def test_at_exit_the_child_of_a_fork_leaves_the_parents_finalizers_alone() -> None:
    lines = run_script(
        """
owner = Owner()
finalizer = Finalizer(owner, say, "parent's")
pid = os.fork()
if pid == 0:
    mine = Owner()
    Finalizer(mine, say, "child's")
else:
    os.waitpid(pid, 0)
"""
    )
    assert lines == ["child's", "parent's"]


def test_garbage_at_exit_raises_nothing() -> None:
    lines = run_script(
        """
gc.disable()
for n in range(10):
    owner = Owner()
    owner.me = owner
    Finalizer(owner, reap, os.open("/dev/null", 0))
lost = Owner()
lost.me = lost
lost.finalizer = Finalizer(lost, say, "in a cycle with its owner")
del lost, owner
hub.get_environment().sleep(0.01)
say("end")
"""
    )
    assert lines == ["end", "in a cycle with its owner"]


def test_the_call_that_makes_the_first_hub_keeps_nothing_alive() -> None:
    """Whatever its callers have, a connection for instance, goes without a collection."""
    lines = run_script(
        """
import weakref
gc.disable()
def first():
    owner = Owner()
    hub.get_hub()
    return weakref.ref(owner)
say("gone" if first()() is None else "alive")
"""
    )
    assert lines == ["gone"]


def test_it_imports_nothing_that_may_be_patched_later() -> None:
    script = (
        "import sys, hub.finalize as f\nclass O: pass\no = O(); f.Finalizer(o, int)\n"
        "print({'socket', 'ssl', 'select', 'threading', 'logging'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.strip() == "set()"
    assert sorted(finalize.__all__) == finalize.__all__


def test_finalizers_of_many_tasks(env: Environment) -> None:
    """Made and dropped by many tasks at once, collected in between."""
    calls: list[int] = []

    def work(seed: int) -> None:
        for turn in range(50):
            make_owner(calls.append, seed * 50 + turn)
            if turn % 10 == seed % 10:
                gc.collect()
            env.sleep(0)

    for task in [env.spawn(work, seed) for seed in range(8)]:
        task.result(LONG)
    gc.collect()
    assert sorted(calls) == list(range(400))
