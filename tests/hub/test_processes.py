"""What can only be seen from outside: forks, exits, kills of everything, patching, foreign loops.

Each case is a program of its own in the environment of this run.
"""

from __future__ import annotations

import os
import platform
import socket
import textwrap

import pytest

from tests.support.patched import run_patched

pytestmark = pytest.mark.green_matrix
ENVIRONMENT = os.environ.get("GREENKOMBU_TEST_ENVIRONMENT", "default")
GEVENT = ENVIRONMENT.startswith("gevent")

PRELUDE = """
import gc, os, sys, time, warnings
import hub
from tests.support.sockets import native_pair
env = hub.get_environment()
loop = hub.get_hub()
ours, theirs = native_pair(env)
got = []
waiter = env.waiter()
def arrived():
    got.append(ours.recv(65536))
    waiter.wake()
def listen():
    loop.run_threadsafe(loop.add_reader, ours.fileno(), arrived, timeout=10)
native = lambda module, name: env.original(module, name)
"""


def run(source: str, *, timeout: float = 60.0) -> str:
    """Run a program; return what it printed, and fail with its errors."""
    done = run_patched(["-c", PRELUDE + textwrap.dedent(source)], timeout=timeout)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "Unraisable" not in done.stderr, done.stderr
    return done.stdout.strip()


def test_program_with_an_idle_hub_ends() -> None:
    assert run("listen(); print('end')", timeout=20) == "end"


def test_twenty_children_that_close_and_collect_disturb_nothing() -> None:
    out = run("""
    listen()
    loop.call_soon_threadsafe(loop.call_repeatedly, 0.01, int)
    fork = native("os", "fork")
    children = []
    for number in range(20):
        theirs.send(b"%02d" % number)
        child = fork()
        if not child:
            status = 1
            try:
                assert loop.closed
                try:
                    loop.call_soon_threadsafe(int)
                except hub.HubClosedError as error:
                    assert "fork" in str(error)
                    status = 0
                mine = hub.get_hub()
                assert mine is not loop
                assert mine.run_threadsafe(lambda: 42, timeout=10) == 42
                loop.close()
                ours.close(); theirs.close()
                gc.collect()
            except BaseException:
                import traceback; traceback.print_exc()
                status = 2
            os._exit(status)
        children.append(child)
    for number in range(20, 40):
        theirs.send(b"%02d" % number)
        env.sleep(0.005)
    statuses = []
    while children:
        pid, status = native("os", "waitpid")(children[0], os.WNOHANG)
        if pid:
            children.pop(0)
            statuses.append(os.waitstatus_to_exitcode(status))
        else:
            env.sleep(0.01)
    theirs.send(b"end")
    deadline = time.monotonic() + 10
    while not b"".join(got).endswith(b"end") and time.monotonic() < deadline:
        env.sleep(0.01)
    expected = b"".join(b"%02d" % number for number in range(40)) + b"end"
    print(b"".join(got) == expected, statuses == [0] * 20)
    """)
    assert out == "True True"


def test_fork_in_a_program_whose_hub_was_never_used() -> None:
    assert (
        run("""
        child = native("os", "fork")()
        if not child:
            os._exit(0 if hub.get_hub().run_threadsafe(lambda: 1, timeout=10) == 1 else 1)
        print(os.waitstatus_to_exitcode(native("os", "waitpid")(child, 0)[1]))
        """)
        == "0"
    )


def test_child_that_lives_on_has_a_hub_of_its_own() -> None:
    """As a pre-forking server does: the child's main program goes on, waits and sleeps."""
    out = run("""
    listen()
    child = os.fork()
    if not child:
        mine = hub.get_hub()
        a, b = native_pair(env)
        w = env.waiter()
        mine.run_threadsafe(mine.add_reader, a.fileno(), lambda: (a.recv(9), w.wake()), timeout=10)
        task = env.spawn(lambda: (env.sleep(0.05), b.send(b"x")))
        ok = w.wait(10) and task.join(10)
        sys.stdout.flush()
        os._exit(0 if ok else 1)
    theirs.send(b"x")
    assert waiter.wait(10)
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        env.sleep(0.01)
    print(os.waitstatus_to_exitcode(status), got)
    """)
    assert out == "0 [b'x']"


def test_two_native_threads_have_hubs_of_their_own() -> None:
    out = run("""
    outcome = []
    done = env.waiter()
    def other():
        mine = hub.get_hub()
        a, b = native_pair(env)
        w = env.waiter()
        mine.run_threadsafe(mine.add_reader, a.fileno(), lambda: (a.recv(9), w.wake()), timeout=10)
        b.send(b"x")
        outcome.append(w.wait(10))
        outcome.append(mine is not loop)
        mine.run_threadsafe(mine.remove, a.fileno(), timeout=10)
        a.close(); b.close()
        outcome.append(loop.run_threadsafe(lambda: 42, timeout=10))
        if env.green:
            mine.close()
        done.wake()
    listen()
    native("_thread", "start_new_thread")(other, ())
    assert done.wait(20)
    theirs.send(b"x")
    assert waiter.wait(10)
    print(outcome, got)
    """)
    own = "True" if ENVIRONMENT != "default" else "False"
    assert out == f"[True, {own}, 42] [b'x']"


def test_hub_nested_in_a_foreign_epoll() -> None:
    out = run("""
    mine = hub.Hub(poller="epoll")
    mine.add_reader(ours.fileno(), arrived)
    timed = []
    mine.call_later(0.05, timed.append, 1)
    outer = native("select", "epoll")()
    outer.register(mine.fileno(), 1)
    began = time.monotonic()
    assert outer.poll(0) == []
    theirs.send(b"x")
    turns = 0
    while (not got or not timed) and time.monotonic() - began < 10:
        if outer.poll(5):
            mine.run_once(0)
            turns += 1
    assert outer.poll(0) == []
    mine.call_soon(timed.append, 2)
    assert outer.poll(5)
    mine.run_once(0)
    print(got, timed, turns < 10, "outside" in repr(mine))
    outer.close(); mine.close()
    """)
    assert out == "[b'x'] [1, 2] True True"


def test_shared_hub_driven_from_outside_stands_down() -> None:
    out = run("""
    listen()
    fd = loop.fileno()
    poll = native("select", "poll")(); poll.register(fd, 1)
    theirs.send(b"x")
    ready = poll.poll(5000)
    assert ready and not got, (ready, got)
    loop.run_once(0)
    print(got, "outside" in repr(loop))
    """)
    assert out == "[b'x'] True"


@pytest.mark.skipif(not GEVENT, reason="concerns gevent's os.fork()")
def test_a_child_that_ends_at_once_is_noticed() -> None:
    out = run(
        """
    listen()
    # The parent comes to its watching for the child when it has ended.
    os.register_at_fork(
        after_in_parent=lambda: os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT))
    child = os.fork()
    if not child:
        os._exit(3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """,
        timeout=20,
    )
    assert out == "3"


def test_interrupt_reaches_the_main_program_and_the_hub_goes_on() -> None:
    out = run("""
    import signal
    # A shell's background jobs inherit "ignored".
    signal.signal(signal.SIGINT, signal.default_int_handler)
    listen()
    caught = False
    native("_thread", "start_new_thread")(
        lambda: (native("time", "sleep")(0.2), os.kill(os.getpid(), signal.SIGINT)), ())
    try:
        env.waiter().wait(10)
    except KeyboardInterrupt:
        caught = True
    theirs.send(b"x")
    print(caught, waiter.wait(10), got)
    """)
    assert out == "True True [b'x']"


def test_garbage_collection_in_a_hub_callback_closes_dropped_streams() -> None:
    out = run("""
    from hub.streams import Stream
    unraisable = []
    sys.unraisablehook = unraisable.append
    class Owner:
        def data_received(self, data): pass
        def connection_lost(self, error): pass
        def write_resumed(self): pass
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        a, b = native_pair(env)
        owner = Owner(); owner.stream = Stream(loop, a, owner); owner.stream.start(); owner.peer = b
    del a, b, owner
    loop.run_threadsafe(int, timeout=10)
    lock = env.Lock()
    with lock:
        loop.run_threadsafe(gc.collect, timeout=10)
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        env.sleep(0.01)
    unraisable = [u for u in unraisable if not isinstance(u.exc_value, ResourceWarning)]
    print(len(os.listdir("/proc/self/fd")) - before, len(loop.readers), unraisable)
    """)
    assert out == "0 0 []"


@pytest.mark.parametrize("registered", ["before the import", "after it", "by multiprocessing"])
def test_what_a_function_writes_at_exit_is_sent(registered: str) -> None:
    """The program's own exit functions, and a child that ends without any."""
    first, last, target = {
        "before the import": ("atexit.register(lambda: say(False))", "begin()", ""),
        "after it": ("", "begin()", "atexit.register(lambda: say(True))"),
        "by multiprocessing": (
            "",
            "p = multiprocessing.get_context('fork').Process(target=lambda: (begin(), say(False)));"
            "p.start(); p.join()",
            "",
        ),
    }[registered]
    source = f"""
import atexit, multiprocessing, sys
{first}
import hub
{target}
class Owner:
    def data_received(self, data):
        answered.wake()
    def connection_lost(self, error): pass
    def write_resumed(self): pass
def begin():
    global answered, owner, peer, stream, listening
    from hub.streams import Stream, open_stream
    from tests.support.sockets import native_pair
    env, owner = hub.get_environment(), Owner()
    answered = env.waiter()
    stream = open_stream(("127.0.0.1", int(sys.argv[1])), owner, timeout=10)
    ours, peer = native_pair(env)
    listening = Stream(hub.get_hub(), ours, owner)
    listening.start()
def say(waits):
    for _ in range(10):
        stream.write(b"m")
    if waits:
        peer.send(b"x")
        stream.write(b"!" if answered.wait(5) else b"?")
{last}
"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = run_patched(["-c", source, str(listener.getsockname()[1])])
        assert done.returncode == 0, done.stderr
        connection, _ = listener.accept()
        with connection:
            got = b"".join(iter(lambda: connection.recv(65536), b""))
    assert got == b"m" * 10 + (b"!" if registered == "after it" else b"")


@pytest.mark.parametrize(("method", "said"), [("forkserver", "hub"), ("spawn", "own hub")])
def test_a_child_that_imports_the_hub_with_its_function_ends_in_order(
    method: str, said: str
) -> None:
    # By name: multiprocessing may have been imported here before eventlet patched the sockets.
    if method == "forkserver" and os.environ["GREENKOMBU_TEST_ENVIRONMENT"] == "eventlet":
        pytest.skip("eventlet's sockets cannot send descriptors")
    source = """
import multiprocessing, sys
from hub._exit import run_at_exit
child = (
    "import atexit; atexit.register(print, 'own', flush=True);"
    "run_at_exit(lambda: said or said.append(print('hub', flush=True)))"
)
arguments = child, {"run_at_exit": run_at_exit, "said": []}
child = multiprocessing.get_context(sys.argv[1]).Process(target=exec, args=arguments)
child.start()
child.join()
"""
    done = run_patched(["-c", source, method])
    assert done.stdout.split() == said.split(), done.stderr


def test_an_exit_function_that_is_interrupted_keeps_no_other_from_running() -> None:
    source = """
import signal
from hub._exit import run_at_exit
run_at_exit(lambda: print("sent"))
run_at_exit(lambda: signal.default_int_handler(signal.SIGINT, None))
"""
    done = run_patched(["-c", source])
    assert done.stdout == "sent\n"
    assert "KeyboardInterrupt" in done.stderr


def test_what_was_written_is_sent_at_exit() -> None:
    out = run("""
    import subprocess
    from tests.support.patched import ROOT
    listener = native("socket", "socket")(); listener.bind(("127.0.0.1", 0)); listener.listen(5)
    source = "\\n".join([
        "import hub",
        "from hub.streams import open_stream",
        "class Owner:",
        "    def data_received(self, data): pass",
        "    def connection_lost(self, error): pass",
        "    def write_resumed(self): pass",
        "owner = Owner()",
        f"stream = open_stream({listener.getsockname()!r}, owner, timeout=10)",
        "for number in range(2000):",
        "    stream.write(b'm' * 1000)",
    ])
    child = subprocess.Popen([sys.executable, "-m", "tests.support.patched",
        os.environ["GREENKOMBU_TEST_ENVIRONMENT"], "-c", source], cwd=ROOT)
    peer, _ = listener.accept()
    total = 0
    while True:
        data = peer.recv(65536)
        if not data:
            break
        total += len(data)
    print(total, child.wait())
    """)
    assert out == "2000000 0"


def test_stream_that_was_closed_at_the_last_moment_is_not_reported_as_left_open() -> None:
    done = run_patched(
        [
            "-c",
            PRELUDE
            + textwrap.dedent("""
    from hub.streams import Stream
    class Owner:
        def data_received(self, data): pass
        def connection_lost(self, error): pass
        def write_resumed(self): pass
    owner = Owner()
    stream = Stream(loop, ours, owner); stream.start()
    loop.run_threadsafe(int, timeout=10)
    warnings.simplefilter("always")
    # The owner of the hub is busy when the program ends, and has not closed the socket yet; what
    # it has before that fills more than one cycle.
    for _ in range(4):
        loop.call_soon_threadsafe(native("time", "sleep"), 0.03)
    stream.close(1)
    theirs.close()
    print("end")
    """),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "end"
    assert "ResourceWarning" not in done.stderr, done.stderr


@pytest.mark.skipif(not GEVENT, reason="LoopExit and gevent.wait() are gevent's")
def test_reply_without_a_timer_is_waited_for() -> None:
    """Only the watcher of the hub is left to wake the waiter: the loop must not end."""
    out = run("""
    listen()
    native("_thread", "start_new_thread")(
        lambda: (native("time", "sleep")(0.3), theirs.send(b"late")), ())
    print(waiter.wait(), got)
    """)
    assert out == "True [b'late']"


@pytest.mark.skipif(not GEVENT, reason="LoopExit and gevent.wait() are gevent's")
def test_gevent_wait_returns_although_the_hub_is_armed() -> None:
    out = run("""
    import gevent
    listen()
    loop.call_soon_threadsafe(loop.call_later, 1000, int)
    env.sleep(0.01)
    began = time.monotonic()
    print(gevent.wait(timeout=20), time.monotonic() - began < 10)
    """)
    assert out == "True True"


@pytest.mark.skipif(not GEVENT, reason="gevent's own exception")
def test_deadlock_without_the_hub_is_still_a_loop_exit() -> None:
    out = run("""
    import gevent, gevent.event
    listen()
    env.sleep(0.01)
    try:
        gevent.event.Event().wait()
    except gevent.exceptions.LoopExit:
        print("LoopExit")
    """)
    assert out == "LoopExit"


@pytest.mark.skipif(ENVIRONMENT == "default", reason="native threads cannot be killed")
def test_program_that_kills_every_greenlet_it_finds() -> None:
    out = run("""
    import greenlet
    listen()
    env.sleep(0.01)
    current = greenlet.getcurrent()
    killed = 0
    for candidate in gc.get_objects():
        kill = getattr(type(candidate), "kill", None)
        if isinstance(candidate, greenlet.greenlet) and kill and candidate is not current:
            candidate.kill()
            killed += 1
    theirs.send(b"x")
    print(waiter.wait(10), got)
    """)
    assert out == "True [b'x']"


@pytest.mark.skipif(ENVIRONMENT == "default", reason="green libraries refuse it themselves")
def test_callback_that_blocks_in_the_green_library_is_refused_there() -> None:
    out = run("""
    import logging; logging.disable(logging.CRITICAL)
    errors = []
    loop.on_error = lambda error, callback: errors.append(type(error).__name__)
    sleep = env.original  # keep the prelude's names in use
    if env.name == "gevent":
        import gevent; block = lambda: gevent.sleep(5)
    else:
        import eventlet; block = lambda: eventlet.sleep(5)
    listen()
    began = time.monotonic()
    loop.call_soon_threadsafe(block)
    env.sleep(0.05)
    theirs.send(b"x")
    print(waiter.wait(10), time.monotonic() - began < 4, len(errors))
    """)
    assert out == "True True 1"


def test_waiter_without_a_timer_is_kept_alive_by_the_hub_it_waits_for() -> None:
    """Another hub in the thread, and a hub that is made later, change nothing about that."""
    out = run("""
    listen()
    other = hub.Hub()
    late = lambda: (native("time", "sleep")(0.2), theirs.send(b"late"))
    native("_thread", "start_new_thread")(late, ())
    print(waiter.wait(), got)
    other.close()
    """)
    assert out == "True [b'late']"


@pytest.mark.skipif(not GEVENT, reason="LoopExit is gevent's")
def test_waiter_that_is_older_than_the_hub_is_kept_alive() -> None:
    done = run_patched(
        [
            "-c",
            textwrap.dedent("""
            import gevent, hub
            from tests.support.sockets import native_pair
            env = hub.get_environment()
            waiter = env.waiter()
            task = env.spawn(waiter.wait)
            env.sleep(0.01)
            ours, theirs = native_pair(env)
            loop = hub.get_hub()
            loop.add_reader(ours.fileno(), waiter.wake)
            pause = env.original("time", "sleep")
            start = env.original("_thread", "start_new_thread")
            start(lambda: (pause(0.2), theirs.send(b"x")), ())
            task.join()
            print(task.result())
            """),
        ]
    )
    assert done.stdout.strip() == "True", done.stderr


def test_foreground_loop_with_nothing_but_calls_yields() -> None:
    out = run("""
    mine = hub.Hub()
    left = [2000]
    def again():
        left[0] -= 1
        if left[0]:
            mine.call_soon(again)
        else:
            mine.stop()
    mine.call_soon(again)
    mine.run_forever()
    print(left)
    mine.close()
    """)
    assert out == "[0]"


@pytest.mark.skipif(ENVIRONMENT == "default", reason="there is one hub for all native threads")
def test_hubs_of_native_threads_that_have_ended_are_given_back() -> None:
    out = run("""
    def other(done):
        mine = hub.get_hub()
        mine.run_threadsafe(int, timeout=10)
        if env.name == "gevent":
            import gevent
            if number % 2:
                gevent.get_hub().destroy(destroy_loop=True)
        done.release()
    before = None
    for number in range(12):
        done = native("_thread", "allocate_lock")()
        done.acquire()
        native("_thread", "start_new_thread")(other, (done,))
        done.acquire(True, 10)
        native("time", "sleep")(0.02)
        if number == 3:
            before = len(os.listdir("/proc/self/fd")), len(hub.shared.hubs_of(env))
    after = len(os.listdir("/proc/self/fd")), len(hub.shared.hubs_of(env))
    print(after[1] <= before[1], loop.run_threadsafe(lambda: 42, timeout=10))
    """)
    assert out == "True 42"


@pytest.mark.skipif(ENVIRONMENT == "default", reason="only the forking thread goes on there")
def test_child_forked_by_a_task_goes_on_in_a_loop_of_its_own() -> None:
    """Neither the task's end nor a waiter of before may lead into the parent's loop."""
    out = run("""
    listen()
    lock = env.Lock()
    lock.acquire()
    order = []
    waiting = env.spawn(lambda: (lock.acquire(), order.append("old waiter")))
    env.sleep(0.01)
    result = []
    def in_child():
        try:
            env.sleep(0.02)
            other = env.spawn(lambda: order.append("new task"))
            ok = other.join(5) and hub.get_hub().run_threadsafe(lambda: 1, timeout=5) == 1
            os._exit(0 if ok and order == ["task has ended", "old waiter", "new task"] else 3)
        except BaseException:
            os._exit(4)
    def forks():
        pid = os.fork()
        result.append(pid)
        if not pid:
            env.spawn(in_child)
            lock.release()
            order.append("task has ended")
    env.spawn(forks)
    while not result:
        env.sleep(0.01)
    pid = result[0]
    if not pid:
        env.sleep(60)    # gevent: the main program goes on in the child, too
    theirs.send(b"x")
    assert waiter.wait(10)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        env.sleep(0.01)
    else:
        os.kill(pid, 9)
        status = 99 << 8
    print(os.waitstatus_to_exitcode(status), got)
    """)
    assert out == "0 [b'x']"


@pytest.mark.skipif(ENVIRONMENT != "eventlet", reason="gevent's greenlets go on in a child")
def test_child_takes_no_bytes_from_the_parent_s_green_sockets() -> None:
    out = run("""
    a, b = env.socketpair()
    received = []
    def serve():
        while b"end" not in b"".join(received):
            received.append(b.recv(100))
    server = env.spawn(serve)
    env.sleep(0.01)
    children = []
    for number in range(10):
        a.sendall(b"%02d" % number)
        pid = os.fork()
        if not pid:
            env.sleep(0.05)
            os._exit(0)
        children.append(pid)
    a.sendall(b"end")
    assert server.join(10)
    for pid in children:
        while not os.waitpid(pid, os.WNOHANG)[0]:
            env.sleep(0.01)
    print(b"".join(received).decode())
    """)
    assert out == "".join(f"{number:02d}" for number in range(10)) + "end"


def test_child_of_a_fork_in_a_hub_callback_ends_with_its_callback() -> None:
    out = run("""
    listen()
    pids = []
    def fork_here():
        pid = native("os", "fork")()
        if not pid:
            os._exit(7)
        pids.append(pid)
    loop.run_threadsafe(fork_here, timeout=10)
    _, status = native("os", "waitpid")(pids[0], 0)
    theirs.send(b"x")
    print(os.waitstatus_to_exitcode(status), waiter.wait(10), got)
    """)
    assert out == "7 True [b'x']"


def test_child_can_log_from_its_hub() -> None:
    """The task that emits the parent's records does not exist in the child."""
    out = run("""
    import logging
    records = []
    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())
            if len(records) == 1:
                blocked.wake()
                go_on.wait(10)
    blocked, go_on = env.waiter(), env.waiter()
    logging.getLogger("hub").addHandler(Keep())
    logging.getLogger("hub").propagate = False
    loop.call_soon_threadsafe(lambda: 1 / 0)
    assert blocked.wait(10)          # a task is in the middle of emitting
    pid = os.fork()
    if not pid:
        del records[:]
        records.append("child")      # so that the handler does not wait
        mine = hub.get_hub()
        mine.call_soon_threadsafe(lambda: [][1])
        for _ in range(500):
            if len(records) > 1:
                break
            env.sleep(0.01)
        os._exit(0 if len(records) == 2 else 1)
    go_on.wake()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        env.sleep(0.01)
    print(os.waitstatus_to_exitcode(status), len(records))
    """)
    assert out == "0 1"


def test_records_of_the_last_moment_are_emitted_at_exit() -> None:
    done = run_patched(
        [
            "-c",
            PRELUDE
            + textwrap.dedent("""
            import logging
            logging.basicConfig(stream=sys.stdout, format="%(message)s")
            loop.run_threadsafe(loop.call_soon, lambda: 1 / 0, timeout=10)
            hits = loop.run_threadsafe(int, timeout=10)
            """),
        ]
    )
    assert done.returncode == 0, done.stderr
    assert "the hub goes on" in done.stdout
    assert "ZeroDivisionError" in done.stdout


def test_functions_of_the_exit_may_still_use_the_hub() -> None:
    """Registered before the hub was used, so run after the hub's own function."""
    done = run_patched(
        [
            "-c",
            textwrap.dedent("""
            import atexit, sys
            def last():
                import hub
                if sys.version_info < (3, 12) or env.green:
                    print(loop.run_threadsafe(lambda: 42, timeout=5))
                else:                  # no thread can be started any more
                    print(42)
            atexit.register(last)
            import hub
            env = hub.get_environment()
            loop = hub.get_hub()
            loop.run_threadsafe(int, timeout=5)
            """),
        ]
    )
    assert done.stdout.strip() == "42", done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that gives heap back")
def test_large_messages_do_not_fault_in_the_same_pages_again_and_again() -> None:
    # Bodies of 1 MiB as they come in: blocks, the pieces of the frames in them, one body.
    faults = run("""
    import resource
    buffer = loop.scratch()
    for number in range(60):
        if number == 10:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytes(buffer) for _ in range(4)]
        pieces = [block[:131_072] for block in blocks] + [block[131_072:] for block in blocks]
        body = b"".join(pieces)
        del blocks, pieces, body
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """)
    assert int(faults) < 3000  # for 50 bodies of 768 pages each
