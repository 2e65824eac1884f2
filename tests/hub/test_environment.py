"""Detection, choice, late patching, tasks and waiters."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import textwrap

import pytest

import hub
from hub.environment import ENVIRONMENTS, Environment
from tests.support.patched import ROOT
from tests.support.tasks import until
from tests.support.ticker import Ticker

ENVIRONMENT = os.environ.get("GREENKOMBU_TEST_ENVIRONMENT", "default")


def run(source: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program that patches for itself."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.green_matrix
def test_detected_environment_is_the_one_of_this_run(env: Environment) -> None:
    assert env.name == ENVIRONMENT.partition("-")[0]
    assert env is hub.get_environment()
    assert env.name in repr(env)
    if ENVIRONMENT in ENVIRONMENTS:
        assert hub.detect_environment() == ENVIRONMENT


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ("", "default"),
        ("import gevent", "default"),
        ("from gevent import monkey", "default"),
        ("from gevent import monkey; monkey.patch_all()", "gevent"),
        ("from gevent import monkey; monkey.patch_socket()", "gevent"),
        ("import eventlet", "default"),
        ("import eventlet; eventlet.monkey_patch()", "eventlet"),
        ("import eventlet; eventlet.monkey_patch(socket=True)", "eventlet"),
    ],
)
@pytest.mark.parametrize("order", ["before", "after"])
def test_patching_before_and_after_the_import(patch: str, expected: str, order: str) -> None:
    first, second = (patch, "import hub") if order == "before" else ("import hub", patch)
    done = run(
        f"import warnings; warnings.simplefilter('ignore')\n{first}\n{second}\n"
        "print(hub.detect_environment(), hub.get_environment().name)\n"
        "print(hub.get_hub().run_threadsafe(lambda: hub.get_hub().poller.name, timeout=10))"
    )
    assert done.stdout.split()[:2] == [expected, expected], done.stderr
    assert done.stdout.split()[2] == "epoll" or sys.platform != "linux"


def test_variable_and_use_override_the_detector() -> None:
    done = run(
        "import hub; a = hub.get_environment().name; b = hub.use('gevent').name\n"
        "c = hub.use(None).name; print(a, b, c)",
        HUB_ENVIRONMENT="default",
    )
    assert done.stdout.split() == ["default", "gevent", "default"], done.stderr


@pytest.mark.parametrize("how", ["variable", "use"])
def test_unknown_environment_is_a_typed_error_with_a_remedy(how: str) -> None:
    if how == "use":
        with pytest.raises(hub.UnknownEnvironmentError, match="did you mean 'gevent'") as caught:
            hub.use("gevnt")
        assert isinstance(caught.value, ValueError)
        return
    done = run("import hub; hub.get_environment()", HUB_ENVIRONMENT="gevnt")
    assert "UnknownEnvironmentError" in done.stderr
    assert "HUB_ENVIRONMENT" in done.stderr


def test_missing_library_is_a_typed_error_that_names_the_extra() -> None:
    done = run(
        "import sys; sys.modules['gevent'] = None\nimport hub\n"
        "try: hub.use('gevent')\n"
        "except hub.UnsupportedError as error: print(error)"
    )
    assert "greenkombu[gevent]" in done.stdout, done.stderr


def test_import_brings_in_nothing_that_patching_would_miss() -> None:
    done = run(
        "import sys; before = set(sys.modules); import hub\n"
        "print(sorted({'socket', 'ssl', 'select', 'threading', 'gevent', 'eventlet', 'queue'}"
        " & (set(sys.modules) - before)))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_green_but_unpatched_program_is_warned_once(library: str) -> None:
    done = run(
        f"""
        import warnings
        warnings.simplefilter('always')
        import {library}
        import hub
        {library}.sleep(0)                      # its loop runs in this thread now
        env = hub.get_environment()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            env.waiter().wait(0.01)
            env.waiter().wait(0.01)
        mine = [w for w in caught if issubclass(w.category, hub.GreenEnvironmentWarning)]
        print(len(mine), mine[0].message)
        """
    )
    assert done.stdout.startswith("1 "), done.stderr
    assert f"hub.use('{library}')" in done.stdout


def test_patching_after_connections_were_made_is_warned() -> None:
    done = run(
        """
        import warnings
        import hub
        hub.get_hub().run_threadsafe(int, timeout=10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            from gevent import monkey; monkey.patch_all()
            print(hub.get_environment().name)
        print([str(w.message) for w in caught
               if issubclass(w.category, hub.GreenEnvironmentWarning)])
        """
    )
    assert done.stdout.startswith("gevent"), done.stderr
    assert "before the first connection" in done.stdout


def test_choosing_after_connections_were_made_is_warned() -> None:
    done = run(
        """
        import warnings
        import hub
        hub.get_hub().run_threadsafe(int, timeout=10)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            print(hub.use('gevent').name)
        print([str(w.message) for w in caught
               if issubclass(w.category, hub.GreenEnvironmentWarning)])
        """
    )
    assert done.stdout.startswith("gevent"), done.stderr
    assert "hub.use('gevent') was called after connections" in done.stdout


def test_unpatched_gevent_is_green_through_use() -> None:
    done = run(
        """
        import gevent, hub
        env = hub.use('gevent')
        ticks = []
        def tick():
            while True:
                ticks.append(1); gevent.sleep(0.005)
        gevent.spawn(tick)
        for _ in range(10):
            if len(ticks) <= 20:
                env.waiter().wait(0.2)
        event = env.Event()
        gevent.spawn_later(0.1, event.set)
        print(event.wait(5), len(ticks) > 20)
        """
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


# -- tasks --------------------------------------------------------------------------------


@pytest.mark.green_matrix
def test_task_returns_raises_and_is_joined(env: Environment) -> None:
    assert env.spawn(lambda a, b: a + b, 1, b=2).result(10) == 3
    task = env.spawn(lambda: 1 / 0)
    assert task.join(10)
    with pytest.raises(ZeroDivisionError):
        task.result()
    event = env.Event()
    waiting = env.spawn(event.wait)
    assert not waiting.join(0.01)
    assert not waiting.done
    with pytest.raises(TimeoutError, match="has not ended"):
        waiting.result(0.01)
    event.set()
    assert waiting.result(10) is True
    assert "done" in repr(waiting)


@pytest.mark.green_matrix
def test_many_join_one_task(env: Environment) -> None:
    event = env.Event()
    task = env.spawn(event.wait)
    joiners = [env.spawn(task.join, 10) for _ in range(20)]
    env.sleep(0.01)
    event.set()
    assert all(joiner.result(10) for joiner in joiners)


@pytest.mark.green_matrix
def test_kill_ends_a_green_task_and_is_refused_for_threads(env: Environment) -> None:
    event = env.Event()
    task = env.spawn(event.wait)
    never_ran = env.spawn(event.wait)
    if not env.green:
        with pytest.raises(hub.UnsupportedError, match="native thread"):
            task.kill()
        event.set()
        assert task.join(10)
        assert never_ran.join(10)
        return
    never_ran.kill()
    assert never_ran.join(10)
    env.sleep(0)
    task.kill()
    assert task.join(10)
    task.kill()


@pytest.mark.green_matrix
def test_task_sees_the_context_of_its_spawner(env: Environment) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")
    variable.set("outer")

    def inner() -> str:
        before = variable.get()
        variable.set("inner")
        env.sleep(0.01)
        return before + variable.get()

    task = env.spawn(inner)
    assert task.result(10) == "outerinner"
    assert variable.get() == "outer"


# -- waiters ------------------------------------------------------------------------------


@pytest.mark.green_matrix
def test_wake_before_wait_is_remembered(env: Environment) -> None:
    waiter = env.waiter()
    waiter.wake()
    waiter.wake()
    assert waiter.wait() is True
    assert waiter.wait(0) is True


@pytest.mark.green_matrix
def test_wait_ends_with_its_timeout(env: Environment) -> None:
    waiter = env.waiter()
    assert waiter.wait(0) is False
    assert waiter.wait(-1) is False
    assert waiter.wait(0.02) is False
    assert not waiter.woken
    env.spawn(waiter.wake)
    assert waiter.wait(10) is True


@pytest.mark.green_matrix
def test_other_tasks_run_during_a_wait(env: Environment, ticker: Ticker) -> None:
    ticker.reset()
    for _ in range(5):  # one is enough for sixty ticks, unless the machine stands still
        assert env.waiter().wait(0.3) is False
        if ticker.ticks > 10:
            break
    assert ticker.ticks > 10


@pytest.mark.green_matrix
def test_a_wake_that_came_too_late_resumes_nothing_else(env: Environment) -> None:
    """The kill ends the wait; the wake that is still queued must not end the next one."""
    if not env.green:
        pytest.skip("native threads cannot be killed")
    first, second = env.waiter(), env.waiter()
    seen: list[object] = []

    def work() -> None:
        try:
            first.wait()
        except env.timeout_types:
            seen.append(first.woken)
            env.sleep(0)
            seen.append(second.wait())

    task = env.spawn(work)
    env.sleep(0.01)
    task.kill()
    first.wake()
    for _ in range(5):
        env.sleep(0)
    second.wake()
    assert task.join(10)
    assert seen == [True, True]


@pytest.mark.green_matrix
def test_kill_in_a_wait_leaves_the_waiter_readable(env: Environment) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    waiter = env.waiter()
    task = env.spawn(waiter.wait)
    env.sleep(0.01)
    task.kill()
    assert task.join(10)
    waiter.wake()
    env.sleep(0.01)
    assert waiter.woken


@pytest.mark.green_matrix
def test_own_timeout_interrupts_a_wait(env: Environment) -> None:
    if not env.green:
        with pytest.raises(hub.UnsupportedError, match="timeout="):
            env.timeout(1)
        return
    with pytest.raises(env.timeout_types), env.timeout(0.02):
        env.waiter().wait()


@pytest.mark.green_matrix
def test_wait_readable_and_writable(env: Environment) -> None:
    from tests.support.sockets import native_pair

    ours, theirs = native_pair(env)
    try:
        assert env.wait_writable(ours.fileno(), 10)
        assert not env.wait_readable(ours.fileno(), 0.02)
        hub.get_hub().run_threadsafe(int, timeout=10)
        assert ours.fileno() not in hub.get_hub().readers
        task = env.spawn(env.wait_readable, ours.fileno(), 10)
        until(env, lambda: ours.fileno() in hub.get_hub().readers)
        with pytest.raises(hub.BadDescriptorError, match="one owner"):
            env.wait_readable(ours.fileno(), 1)
        theirs.send(b"x")
        assert task.result(10) is True
        hub.get_hub().run_threadsafe(int, timeout=10)
        assert ours.fileno() not in hub.get_hub().readers
        with pytest.raises(hub.BadDescriptorError):
            env.wait_readable(-1, 1)
    finally:
        ours.close()
        theirs.close()


@pytest.mark.allow_leaks("the resolver of gevent keeps its native threads")
def test_sockets_of_the_environment_block_the_caller_only(env: Environment) -> None:
    listener = env.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1)
    server = env.spawn(lambda: listener.accept()[0])
    client = env.create_connection(listener.getsockname(), 10)
    peer = server.result(10)
    echo = env.spawn(peer.recv, 10)
    client.sendall(b"x")
    assert echo.result(10) == b"x"
    a, b = env.socketpair()
    for sock in (listener, client, peer, a, b):
        sock.close()
    found = env.getaddrinfo("localhost", 80, 10)
    assert found[0][4][1] == 80
