"""S12, S18, S19, S24 and fairness for the bare hub: what must hold whatever stands above it.

Times are bounded generously, since tests share machines; that a wake-up is flat in the number of
descriptors is shown by counting, and measured in benchmarks/.
"""

from __future__ import annotations

import gc
import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub.environment import Environment
from hub.streams import Stream
from tests.support.patched import ROOT, run_patched
from tests.support.sockets import native_pair

pytestmark = pytest.mark.green_matrix


def run(source: str) -> subprocess.CompletedProcess[str]:
    """Run a program that patches for itself, or does not."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


class Handler:
    """Counts what arrives and wakes whoever waits for it."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.data = bytearray()
        self.lost: list[BaseException | None] = []
        self.arrived = env.waiter()
        self.ended = env.waiter()

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.arrived.wake()

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)
        self.ended.wake()

    def write_resumed(self) -> None:
        pass


@pytest.fixture
def loop() -> hub.Hub:
    shared = hub.get_hub()
    shared.run_threadsafe(int, timeout=10)
    return shared


# -- S12: imported before patching; green but unpatched -----------------------------------

TALK = """
    import time
    from hub.streams import open_stream
    class Handler:
        def __init__(self): self.arrived = env.waiter()
        def data_received(self, data): self.arrived.wake()
        def connection_lost(self, error): pass
        def write_resumed(self): pass
    native = lambda name: env.original("socket", name)
    listener = native("socket")(); listener.bind(("127.0.0.1", 0)); listener.listen(1)
    ticks = [0]
    def tick():
        while True:
            sleep(0.005)
            ticks[0] += 1
    spawn(tick)
    handler = Handler()
    stream = open_stream(listener.getsockname(), handler, timeout=10)
    peer = listener.accept()[0]
    native_sleep = env.original("time", "sleep")
    before = ticks[0]
    def send_later():
        for _ in range(100):
            native_sleep(0.01)
            if ticks[0] - before > 10:
                break
        peer.send(b"x")
    env.original("_thread", "start_new_thread")(send_later, ())
    print(handler.arrived.wait(10), ticks[0] - before > 10)
"""
LIBRARIES = {
    "gevent": ("import gevent; from gevent import spawn, sleep", "gevent.monkey.patch_all()"),
    "eventlet": ("import eventlet; from eventlet import spawn, sleep", "eventlet.monkey_patch()"),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_s12_import_before_patching_is_cooperative(library: str) -> None:
    load, patch = LIBRARIES[library]
    extra = "import gevent.monkey" if library == "gevent" else ""
    done = run(
        f"""
        import warnings; warnings.simplefilter("ignore", DeprecationWarning)
        import hub, greenkombu
        from greenkombu import Connection, Exchange, Queue
        {load}
        {extra}
        {patch}
        env = hub.get_environment()
        """
        + textwrap.indent(TALK, "    ")
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
    assert "GreenEnvironmentWarning" not in done.stderr


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("chosen", [True, False], ids=["use", "nothing"])
def test_s12_unpatched_green_program_is_cooperative_or_warned(library: str, chosen: bool) -> None:
    load, _ = LIBRARIES[library]
    done = run(
        f"""
        import warnings; warnings.simplefilter("ignore", DeprecationWarning)
        {load}
        import hub
        env = hub.use({library!r}) if {chosen} else hub.get_environment()
        sleep(0)
        """
        + textwrap.indent(TALK, "    ")
    )
    if chosen:
        assert done.stdout.split() == ["True", "True"], done.stderr
        assert "GreenEnvironmentWarning" not in done.stderr
    else:
        assert done.stdout.split() == ["True", "False"], done.stderr
        assert done.stderr.count("GreenEnvironmentWarning") == 1
        assert f"hub.use('{library}')" in done.stderr


# -- S18: thousands of descriptors, one ready ---------------------------------------------


@pytest.fixture
def crowd(env: Environment, loop: hub.Hub) -> Iterator[Callable[[int], Any]]:
    """Registers a number of descriptors of which one is ever ready; returns both its ends."""
    pairs: list[Any] = []

    def gather(count: int) -> Any:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < count + 200:
            pytest.skip(f"the hard limit of open files is {hard}: ulimit -n {count + 200}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 200), hard))
        pairs.extend(native_pair(env) for _ in range(count // 2))

        def register() -> None:
            for pair in pairs:
                for end in pair:
                    loop.add_reader(end.fileno(), int)

        loop.run_threadsafe(register, timeout=20)
        return pairs[count // 4]

    yield gather
    fds = [end.fileno() for pair in pairs for end in pair]
    loop.run_threadsafe(lambda: [loop.remove(fd) for fd in fds], timeout=20)
    for pair in pairs:
        for end in pair:
            end.close()


def wake_ups(env: Environment, loop: hub.Hub, ours: Any, theirs: Any, count: int) -> dict[str, Any]:
    """Let one descriptor become ready `count` times; return what each time cost on average."""
    arrived: list[Any] = []

    def receive() -> None:
        ours.recv(10)
        arrived[-1].wake()

    arrived.append(env.waiter())
    loop.run_threadsafe(loop.add_reader, ours.fileno(), receive, timeout=10)
    original, polls, reported = loop.poller.poll, [0], [0]

    def poll(*args: Any, **kwargs: Any) -> Any:
        polls[0] += 1
        events = original(*args, **kwargs)
        reported[0] += len(events)
        return events

    loop.poller.poll = poll  # type: ignore[method-assign]
    before = loop.stats.cycles, loop.stats.callbacks
    began = time.process_time()
    try:
        for _ in range(count):
            arrived.append(env.waiter())
            theirs.send(b"x")
            assert arrived[-1].wait(10)
    finally:
        del loop.poller.poll
    loop.run_threadsafe(loop.add_reader, ours.fileno(), int, timeout=10)
    return {
        "polls": polls[0] / count,
        "reported": reported[0] / count,
        "cycles": (loop.stats.cycles - before[0]) / count,
        "callbacks": (loop.stats.callbacks - before[1]) / count,
        "cpu_seconds": (time.process_time() - began) / count,
    }


@pytest.mark.parametrize("descriptors", [10, 1500, 10_000])
def test_s18_work_per_wake_up_does_not_depend_on_the_descriptors(
    env: Environment, loop: hub.Hub, crowd: Callable[[int], Any], descriptors: int
) -> None:
    if loop.poller.name not in ("epoll", "kqueue"):
        pytest.skip("poll(2) and select(2) cost O(descriptors) by nature")
    ours, theirs = crowd(descriptors)
    cost = wake_ups(env, loop, ours, theirs, 200)
    # One poll that reports one event, which is one callback; whatever else happens (an audit, a
    # wake-up, the timer of a green library) happens now and then, and not per descriptor.
    assert cost["reported"] <= 1.1, cost
    assert cost["callbacks"] <= 1.1, cost
    assert cost["polls"] <= 2.2, cost
    assert cost["cycles"] <= 2.2, cost
    assert cost["cpu_seconds"] < 0.005, cost


# -- S19: dropped objects, collected anywhere ---------------------------------------------


def test_s19_collection_anywhere_leaves_nothing_and_switches_nowhere() -> None:
    done = run_patched(
        [
            "-c",
            textwrap.dedent("""
            import gc, os, sys, time
            import hub
            from hub.finalize import Finalizer
            from hub.streams import Stream
            from tests.support.sockets import native_pair

            env = hub.get_environment()
            loop = hub.get_hub()
            loop.run_threadsafe(int, timeout=10)
            unraisable = []
            sys.unraisablehook = unraisable.append
            lock, collected = env.Lock(), []

            class Owner:
                def data_received(self, data): pass
                def connection_lost(self, error): pass
                def write_resumed(self): pass

            class Connection:
                def __init__(self): self.fd = os.open(os.devnull, os.O_RDONLY)
                def close(self): os.close(self.fd)

            def fds(): return len(os.listdir("/proc/self/fd"))
            gc.disable()
            pool = hub.LifoPool(lambda _: Connection(), limit=100, close=Connection.close)
            for how in ("callback", "lock", "task"):
                kept, before = [], fds()
                for _ in range(20):
                    a, b = native_pair(env)
                    kept.append(b)
                    owner = Owner()
                    owner.stream, owner.me = Stream(loop, a, owner), owner
                    owner.stream.start()
                    owner.finalizer = Finalizer(owner, collected.append, 1)
                    owner.lease = pool.acquire(timeout=5)
                    del a, b, owner
                loop.run_threadsafe(int, timeout=10)
                if how == "callback":
                    loop.run_threadsafe(gc.collect, timeout=10)
                elif how == "lock":
                    with lock:
                        gc.collect()
                else:
                    gc.collect()
                for end in kept:
                    end.close()
                deadline = time.monotonic() + 10
                def left(): return fds() - before + pool.stats().held + len(loop.readers)
                while left() and time.monotonic() < deadline:
                    env.sleep(0.01)
                print(how, len(collected), left())
            pool.close()
            bad = [u for u in unraisable if not isinstance(u.exc_value, ResourceWarning)]
            print("unraisable", bad)
            # What is left for the end of the process: a cycle with an open stream in it.
            gc.enable()
            sys.unraisablehook = sys.__unraisablehook__
            a, b = native_pair(env)
            owner = Owner()
            owner.stream, owner.me, owner.peer = Stream(loop, a, owner), owner, b
            owner.stream.start()
            del owner, a, b
            """),
        ]
    )
    assert done.stdout.splitlines() == [
        "callback 20 0",
        "lock 40 0",
        "task 60 0",
        "unraisable []",
    ], done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0


# -- S24: idle connections ----------------------------------------------------------------


def idle_for(env: Environment, loop: hub.Hub, seconds: float) -> tuple[int, float]:
    """Return the hub's cycles and the share of a processor that the process took meanwhile."""
    cycles, began, used = loop.stats.cycles, time.monotonic(), time.process_time()
    env.sleep(seconds)
    share = (time.process_time() - used) / (time.monotonic() - began)
    return loop.stats.cycles - cycles, share


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_s24_idle_connections_cost_nothing(env: Environment, loop: hub.Hub, seconds: float) -> None:
    handlers = [Handler(env) for _ in range(100)]
    pairs = [native_pair(env) for _ in handlers]
    streams = [Stream(loop, pair[0], it) for pair, it in zip(pairs, handlers, strict=True)]
    for stream in streams:
        stream.start()
    loop.run_threadsafe(int, timeout=10)
    env.sleep(0.3)  # a new descriptor is verified once
    cycles, share = idle_for(env, loop, seconds)
    assert cycles <= 5 * seconds + 10
    assert share < 0.05
    # A peer closes an idle connection: its owner is told, and its number is used again.
    fd = streams[50].sock.fileno()
    pairs[50][1].close()
    assert handlers[50].ended.wait(10)
    assert isinstance(handlers[50].lost[0], hub.StreamClosedError)
    again = native_pair(env)
    assert fd in (again[0].fileno(), again[1].fileno())
    ours, theirs = again if again[0].fileno() == fd else again[::-1]
    handler = Handler(env)
    stream = Stream(loop, ours, handler)
    stream.start()
    theirs.send(b"x")
    assert handler.arrived.wait(10)
    assert bytes(handler.data) == b"x"
    cycles, share = idle_for(env, loop, 0.5)
    assert cycles <= 20
    assert [len(it.lost) for it in handlers].count(0) == 99, "nobody else is concerned"
    for it in [*streams, stream]:
        it.abort()
    for it in [*handlers, handler]:
        assert it.ended.wait(10)
    for pair in [*pairs, again]:
        pair[0].close()
        pair[1].close()


# -- law 8: fairness ----------------------------------------------------------------------


class Rally:
    """Both ends of a connection, which send each other what they get, for ever."""

    def __init__(self, loop: hub.Hub, pair: Any) -> None:
        self.turns = 0
        self.over = False
        self.first = Stream(loop, pair[0], self)
        self.second = Stream(loop, pair[1], self)
        for stream in (self.first, self.second):
            stream.coalesce = False
            stream.start()

    def serve(self) -> None:
        self.first.write(b"a")

    def data_received(self, data: bytes) -> None:
        self.turns += 1
        if not self.over:
            (self.first if data == b"b" else self.second).write(b"b" if data == b"a" else b"a")

    def connection_lost(self, error: BaseException | None) -> None:
        self.over = True

    def write_resumed(self) -> None:
        pass


def test_fairness_a_hub_that_is_never_idle_lets_everybody_live(
    env: Environment, loop: hub.Hub, ticker: Any
) -> None:
    """Hundreds of connections always have something: tasks, timers and calls get their turn."""
    rallies = [Rally(loop, native_pair(env)) for _ in range(200)]
    heartbeats: list[float] = []
    timer = loop.run_threadsafe(
        loop.call_repeatedly, 0.02, lambda: heartbeats.append(loop.time()), timeout=10
    )
    for rally in rallies:
        loop.call_soon_threadsafe(rally.serve)
    ticker.reset()
    calls = 0
    begun = time.monotonic()

    def served() -> bool:
        """Whether everybody had some turns; a second is enough, unless the machine stands still."""
        few = min(ticker.ticks, 2 * calls, len(heartbeats)) <= 10
        return not few and min(rally.turns for rally in rallies) > 0

    while (spent := time.monotonic() - begun) < 1 or (spent < 20 and not served()):
        loop.run_threadsafe(int, timeout=10)
        calls += 1
        env.sleep(0.001)
    in_time = served()
    timer.cancel()
    for rally in rallies:
        rally.over = True
        rally.first.abort()
        rally.second.abort()
    loop.run_threadsafe(int, timeout=10)
    turns = [rally.turns for rally in rallies]
    assert max(turns) <= 3 * min(turns) + 10, "each descriptor has its turn"
    assert in_time, (ticker.ticks, calls, len(heartbeats), min(turns))


# -- the example --------------------------------------------------------------------------


def test_echo_server_with_two_thousand_clients() -> None:
    done = run_patched([str(ROOT / "examples" / "hub_echo.py"), "default", "2000", "5"], timeout=90)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"^(\w+)/\w+: 2000 clients x 5 echoes .* ticked (\d+) times, longest gap (\d+) ms",
        done.stdout,
    )
    assert found, done.stdout
    assert found[1] == os.environ["GREENKOMBU_TEST_ENVIRONMENT"].partition("-")[0]
    assert int(found[2]) >= 5
    assert int(found[3]) < 500


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["default", "0"], "argument clients: '0' is not a whole number above 0"),
        (["default", "5", "-1"], "argument"),
        (["default", "5", "0"], "argument rounds: '0' is not"),
        (["default", "many"], "argument clients: 'many' is not"),
        (["x"], "invalid choice: 'x'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_echo_server_refuses_arguments_that_make_no_sense(arguments: list[str], told: str) -> None:
    example = str(ROOT / "examples" / "hub_echo.py")
    done = subprocess.run(
        [sys.executable, example, *arguments], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_collection_of_garbage_finds_no_cycle_of_the_hub_s_own_making(
    env: Environment, loop: hub.Hub
) -> None:
    """Streams and timers that were ended go without the collector's help."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        handler = Handler(env)
        ours, theirs = native_pair(env)
        stream = Stream(loop, ours, handler)
        stream.start()
        timer = loop.run_threadsafe(loop.call_later, 60, stream.flush, timeout=10)
        stream.write(b"x")
        timer.cancel()
        stream.abort()
        assert handler.ended.wait(10)
        loop.run_threadsafe(int, timeout=10)
        gone = weakref.ref(stream)
        del stream, timer
        for _ in range(100):
            if gone() is None:
                break
            env.sleep(0.01)
        assert gone() is None
    finally:
        gc.enable()
        theirs.close()
