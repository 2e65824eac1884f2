"""Rare paths of the hub: lacks of descriptors, hubs that close at a bad moment, floods of log."""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket
import ssl
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

import hub
from hub import _connect, _default, _fork, environment, shared
from hub._tls import TLSLayer
from hub.environment import Environment
from hub.streams import Stream, open_stream
from hub.testing import FakeClock, scripted_hub
from tests.support.sockets import native_pair
from tests.support.tasks import LONG, until


class Handler:
    def __init__(self, env: Environment) -> None:
        self.data = b""
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
def listener(env: Environment) -> Iterator[Any]:
    made = env.original("socket", "socket")()
    made.bind(("127.0.0.1", 0))
    made.listen(5)
    yield made
    made.close()


# -- connecting ---------------------------------------------------------------------------


def test_no_descriptor_left_for_a_connection(
    env: Environment, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    original = env.original

    def lacking(module: str, name: str) -> Any:
        return fail if (module, name) == ("socket", "socket") else original(module, name)

    monkeypatch.setattr(env, "original", lacking)
    with pytest.raises(hub.StreamError, match="Too many open files") as caught:
        open_stream(listener.getsockname(), Handler(env), timeout=5)
    assert caught.value.errno == errno.EMFILE


def test_option_that_the_kernel_refuses_names_the_peer(env: Environment, listener: Any) -> None:
    options = hub.streams.SocketOptions(keepalive_idle=-5)
    with pytest.raises(hub.StreamError, match=r"cannot connect to 127\.0\.0\.1"):
        open_stream(listener.getsockname(), Handler(env), timeout=5, options=options)


def test_option_of_a_wrong_type_is_told_to_who_gave_it(
    env: Environment, listener: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra: dict[tuple[int, int], Any] = {}
    options = hub.SocketOptions(extra=extra)
    extra[socket.SOL_SOCKET, socket.SO_SNDBUF] = "many"  # after it was looked at
    made: list[Any] = []
    original = env.original

    def recording(module: str, name: str) -> Any:
        found = original(module, name)
        if (module, name) != ("socket", "socket"):
            return found
        return lambda *given: made.append(found(*given)) or made[-1]

    monkeypatch.setattr(env, "original", recording)
    with pytest.raises(TypeError):
        open_stream(listener.getsockname(), Handler(env), timeout=5, options=options)
    assert [sock.fileno() for sock in made] == [-1], "it is closed"


def test_platform_without_unix_sockets(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(hub.StreamError, match="no AF_UNIX"):
        _connect._family("AF_UNIX")


def test_hub_that_closes_while_a_task_connects(env: Environment) -> None:
    silent = env.original("socket", "socket")()
    silent.bind(("127.0.0.1", 0))
    silent.listen(0)
    fillers = [env.original("socket", "socket")() for _ in range(4)]
    for filler in fillers:
        filler.setblocking(False)
        filler.connect_ex(silent.getsockname())
    loop = hub.get_hub()
    task = env.spawn(open_stream, silent.getsockname(), Handler(env), timeout=10)
    for _ in range(500):
        if loop.writers:
            break
        env.sleep(0.005)
    loop.close()
    with pytest.raises(hub.HubClosedError, match="while connecting"):
        task.result(10)
    for sock in [*fillers, silent]:
        sock.close()


def test_late_winner_is_closed(env: Environment, listener: Any) -> None:
    loop = hub.get_hub()
    target = (socket.AF_INET, listener.getsockname())
    race = _connect._Race(loop, [target], "peer", _connect.SocketOptions())

    def late() -> bool:
        race._over = True
        sock = env.original("socket", "socket")()
        sock.connect(target[1])
        race._connected(sock)
        race._next()
        return sock.fileno() == -1

    assert loop.run_threadsafe(late, timeout=10)
    with pytest.raises(hub.StreamTimeoutError):
        race.run(loop.time() + 0.01, 0.01)


# -- streams ------------------------------------------------------------------------------


def test_flush_at_exit_sends_within_its_deadline(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    loop = hub.get_hub()
    stream = Stream(loop, ours, handler)
    stream.flush_at_exit(loop.time() + 1)  # nothing to send
    stream.write(b"x" * 3_000_000)
    left = stream.buffered
    assert left
    loop.run_threadsafe(stream.flush_at_exit, loop.time() - 1, timeout=10)
    assert stream.buffered == left
    loop.run_threadsafe(stream.flush_at_exit, loop.time() + 0.05, timeout=10)
    assert stream.buffered, "nobody reads"
    assert ours.gettimeout() == 0, "it does not block afterwards"
    theirs.close()
    loop.run_threadsafe(stream.flush_at_exit, loop.time() + 1, timeout=10)
    stream.abort()
    assert handler.ended.wait(10)
    stream.flush()
    stream.flush_at_exit(loop.time() + 1)
    stream.close(1)


def test_stream_that_was_paused_before_it_started(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.pause_reading()
    stream.pause_reading()
    stream.start()
    theirs.send(b"x")
    assert "paused" in repr(stream)
    assert not handler.arrived.wait(0.05)
    stream.resume_reading()
    stream.resume_reading()
    assert handler.arrived.wait(10)
    stream.abort()
    assert handler.ended.wait(10)
    stream.pause_reading()
    theirs.close()


def test_reset_by_the_peer_is_the_cause(env: Environment, listener: Any) -> None:
    handler = Handler(env)
    stream = open_stream(listener.getsockname(), handler, timeout=10)
    peer, _ = listener.accept()
    linger = b"\1\0\0\0\0\0\0\0"
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    peer.close()
    assert handler.ended.wait(10)
    assert isinstance(handler.lost[0], hub.StreamClosedError)
    assert isinstance(handler.lost[0].__cause__, ConnectionResetError)
    assert stream.closed


def test_interrupt_in_a_handler_aborts_and_passes(env: Environment) -> None:
    class Interrupted(Handler):
        def data_received(self, data: bytes) -> None:
            raise KeyboardInterrupt

    with hub.Hub() as loop:
        ours, theirs = native_pair(env)
        handler = Interrupted(env)
        stream = Stream(loop, ours, handler)
        stream.start()
        theirs.send(b"x")
        with pytest.raises(KeyboardInterrupt):
            loop.run_forever()
        theirs.close()
    assert handler.lost == [None]


def test_buffered_bytes_are_counted_while_the_kernel_is_full(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler, high_water=10_000_000)
    stream.write(b"x" * 3_000_000)
    before = stream.buffered
    stream.write(b"y" * 1000)
    assert stream.buffered == before + 1000
    assert not stream.above_high_water
    stream.abort()
    assert handler.ended.wait(10)
    theirs.close()


# -- TLS ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


class Peer:
    """The server's side of a TLS session over memory."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def shake(self, layer: TLSLayer) -> None:
        data = layer.handshake()
        for _ in range(10):
            self.incoming.write(data)
            try:
                self.session.do_handshake()
            except ssl.SSLWantReadError:
                pass
            data = b"" if layer.established else layer.handshake(self.outgoing.read())
        assert layer.established


def test_tls_without_a_host_name_is_refused(contexts: Any) -> None:
    with pytest.raises(hub.TLSError, match="server_hostname"):
        TLSLayer(contexts[1], None, "broker:5671")
    with pytest.raises(hub.TLSError, match="cannot begin"):
        TLSLayer(contexts[1], ".dots..", "broker:5671")


def test_tls_close_notify_ends_the_session(contexts: Any) -> None:
    layer = TLSLayer(contexts[1], "localhost", "broker:5671")
    peer = Peer(contexts[0])
    peer.shake(layer)
    peer.session.write(b"bye")
    try:
        peer.session.unwrap()
    except ssl.SSLWantReadError:
        pass
    chunks, ended = layer.decrypt(peer.outgoing.read())
    assert b"".join(chunks) == b"bye"
    assert ended
    assert layer.decrypt(b"")[1]


def test_tls_record_that_was_changed_on_its_way_is_an_error(contexts: Any) -> None:
    layer = TLSLayer(contexts[1], "localhost", "broker:5671")
    peer = Peer(contexts[0])
    peer.shake(layer)
    layer.decrypt(peer.outgoing.read())  # session tickets
    peer.session.write(b"x" * 100)
    record = bytearray(peer.outgoing.read())
    record[-1] ^= 1
    with pytest.raises(hub.TLSError, match=r"broker:5671"):
        layer.decrypt(bytes(record))


def test_tls_write_to_a_broken_session_is_an_error(contexts: Any) -> None:
    layer = TLSLayer(contexts[1], "localhost", "broker:5671")
    with pytest.raises(hub.TLSError, match="TLS session with broker:5671"):
        layer.encrypt(b"before the handshake")


# -- forks --------------------------------------------------------------------------------


def test_fork_hook_that_fails_keeps_no_other_from_its_own() -> None:
    called: list[str] = []

    class Participant:
        def __init__(self, name: str) -> None:
            self.name = name

        def before_fork(self) -> None:
            called.append(self.name)
            raise RuntimeError(self.name)

        def after_fork_in_parent(self) -> None: ...

        def after_fork_in_child(self) -> None: ...

    members = [Participant("first"), Participant("second")]
    for member in members:
        _fork.join_forks(member)
    with pytest.raises(RuntimeError, match="second"):
        _fork._each("before_fork")
    _fork._each("after_fork_in_parent")
    assert called == ["first", "second"]
    del members, member
    hub.get_hub().run_threadsafe(int, timeout=10)


# -- the environment ----------------------------------------------------------------------


def test_environment_makes_its_primitives(env: Environment) -> None:
    assert env.Lock().acquire(False)
    assert env.RLock().acquire(False)
    assert env.Semaphore(2).acquire(False)
    assert not env.Event().is_set()
    with env.Condition() as condition:
        assert condition
    with env.Condition(env.Lock()):
        pass
    stack = env.LifoQueue(2)
    stack.put(1)
    assert stack.get() == 1
    assert env.thread_id() == env.original("_thread", "get_ident")()


@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_native_wait_under_a_running_green_loop_is_warned_once(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gevent", "gevent._hub_local", "eventlet", "eventlet.hubs"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    monkeypatch.setattr(_default, "_warned", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _default._warn_if_green()  # imported, but no loop of it runs in this thread
    if library == "gevent":
        module = types.ModuleType("gevent._hub_local")
        module.get_hub_if_exists = object  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "gevent._hub_local", module)
    else:
        module = types.ModuleType("eventlet.hubs")
        running = types.SimpleNamespace(hub=types.SimpleNamespace(running=True))
        module._threadlocal = running  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "eventlet.hubs", module)
    with pytest.warns(hub.GreenEnvironmentWarning, match=f"hub.use\\('{library}'\\)"):
        _default._warn_if_green()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _default._warn_if_green()


def test_use_and_the_variable_choose_in_this_order(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_ENVIRONMENT", "no-such")
    try:
        with pytest.raises(hub.UnknownEnvironmentError, match=r"no-such.*HUB_ENVIRONMENT"):
            hub.use(None)
        monkeypatch.setenv("HUB_ENVIRONMENT", env.name)
        assert hub.use(None) is env
        assert hub.use(env.name) is env
    finally:
        monkeypatch.undo()
        hub.use("gevent" if _chosen() else None)
    assert hub.get_environment() is env


def _chosen() -> bool:
    """Tell whether this run itself chose its environment."""
    return os.environ["GREENKOMBU_TEST_ENVIRONMENT"] == "gevent-unpatched"


def test_environment_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_objects", {})
    monkeypatch.setitem(sys.modules, "hub._gevent", None)
    with pytest.raises(hub.UnsupportedError, match=r"greenkombu\[gevent\]"):
        environment._load("gevent")


def test_patching_under_live_hubs_is_warned(env: Environment) -> None:
    hub.get_hub().run_threadsafe(int, timeout=10)
    with pytest.warns(hub.GreenEnvironmentWarning, match="before the first connection"):
        environment._warn_of_change(env, env, "the program was patched")


def test_unknown_name_of_a_module_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError):
        hub.streams.no_such_name  # noqa: B018
    with pytest.raises(AttributeError):
        hub.no_such_name  # noqa: B018


# -- the end ------------------------------------------------------------------------------


def test_what_is_done_at_exit_leaves_the_hub_usable(env: Environment) -> None:
    """Functions that are registered for the exit before the hub's run after it."""
    loop = hub.get_hub()
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(loop, ours, handler)
    stream.start()
    shared._at_exit()
    stream.write(b"x", flush=True)
    assert theirs.recv(10) == b"x"
    theirs.send(b"y")
    loop.run_threadsafe(int, timeout=10)
    assert handler.arrived.wait(10)
    stream.abort()
    assert handler.ended.wait(10)
    theirs.close()


def test_hubs_of_threads_that_do_not_exist_are_shut_down(env: Environment) -> None:
    if not env.green:
        pytest.skip("there is one hub for all native threads")
    stale = hub.Hub()
    stale.on_end.append(shared._forget)
    shared._shared[(env.name, 1)] = stale  # no thread has this number
    loop = hub.get_hub()
    loop.close()
    fresh = hub.get_hub()
    assert stale.closed
    assert stale.poller.closed
    assert fresh.run_threadsafe(lambda: 7, timeout=10) == 7


def test_reaping_on_a_closed_hub_closes_at_once(env: Environment) -> None:
    loop = hub.Hub()
    loop.close()
    fd = os.open(os.devnull, os.O_RDONLY)
    loop.reap(fd)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    loop.reap(fd)  # and again: nobody to tell


def test_reaped_number_is_closed_by_the_next_cycle(env: Environment) -> None:
    loop = hub.get_hub()
    fd = os.dup(0) if not os.isatty(0) else os.open(os.devnull, os.O_RDONLY)
    loop.reap(fd)
    for _ in range(500):
        try:
            os.fstat(fd)
        except OSError:
            break
        env.sleep(0.005)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)


@pytest.fixture
def blocked(env: Environment) -> Any:
    """A pair of functions: block the hub's thread in a callback, and let it go on."""
    if env.green:
        pytest.skip("a callback that blocks its native thread blocks this one as well")
    lock = env.original("_thread", "allocate_lock")()
    lock.acquire()

    def block(loop: hub.Hub) -> None:
        began = env.waiter()
        loop.call_soon_threadsafe(lambda: (began.wake(), lock.acquire()))
        assert began.wait(10)

    return block, lock.release


def gone(env: Environment, loop: hub.Hub) -> bool:
    for _ in range(1000):
        if loop.poller.closed:
            return True
        env.sleep(0.005)
    return False


def test_close_while_a_callback_blocks_the_background_owner(env: Environment, blocked: Any) -> None:
    block, go_on = blocked
    loop = hub.get_hub()
    block(loop)
    loop.close()
    assert loop.closed
    assert not loop.poller.closed, "its thread is still in there"
    assert hub.get_hub().run_threadsafe(lambda: 7, timeout=10) == 7
    go_on()
    assert gone(env, loop)


def test_close_while_a_callback_blocks_the_task_that_runs_it(
    env: Environment, blocked: Any
) -> None:
    block, go_on = blocked
    loop = hub.Hub()
    task = env.spawn(loop.run_forever)
    block(loop)
    loop.close()
    go_on()
    assert task.join(10)
    assert gone(env, loop)


def test_shared_hub_that_is_being_closed_is_not_given_out(env: Environment, blocked: Any) -> None:
    block, go_on = blocked
    loop = hub.get_hub()
    block(loop)
    task = env.spawn(loop.close)
    for _ in range(1000):
        if loop.closed:
            break
        env.sleep(0.001)
    assert not task.done
    assert hub.get_hub() is not loop
    assert hub.get_hub().run_threadsafe(lambda: 7, timeout=10) == 7
    loop.shut_down()  # a second one at the same time has nothing to do
    go_on()
    assert task.join(10)
    assert gone(env, loop)


def test_call_that_comes_while_the_hub_closes_is_refused(env: Environment) -> None:
    loop = hub.Hub()

    class Ready(type(loop._ready)):  # type: ignore[misc]
        def append(self, item: object) -> None:
            super().append(item)
            loop.closed = True

    loop._ready = Ready()
    with pytest.raises(hub.HubClosedError):
        loop.call_soon_threadsafe(int)
    loop.closed = False
    loop.close()


def test_no_thread_can_be_started(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the interpreter's end: who only wakes the hub is not told, who uses it is."""
    if env.green:
        pytest.skip("no thread is needed")

    def fail(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    loop = hub.Hub()
    loop.background, loop.thread = True, hub.Hub.NOBODY
    with monkeypatch.context() as patched:
        patched.setattr(_default, "start_native_thread", fail)
        loop.call_soon_threadsafe(int)
        with pytest.raises(RuntimeError, match="shutdown"):
            loop.driver.start()
    loop._poked = False
    assert loop.run_threadsafe(lambda: 7, timeout=10) == 7
    loop.close()


def test_hub_driven_from_outside(env: Environment) -> None:
    with hub.Hub() as loop:
        if loop.poller.name not in ("epoll", "kqueue"):
            pytest.skip("poll and select have no descriptor to look at")
        seen: list[str] = []
        loop.call_soon(seen.append, "before")
        outer = env.original("select", "poll")()
        outer.register(loop.fileno(), 1)
        assert loop.fileno() == loop.fileno()

        def turn() -> None:
            assert outer.poll(5000)
            loop.run_once(0)

        turn()
        loop.call_later(0.01, seen.append, "timer")
        turn()
        loop.call_soon(loop.call_soon, seen.append, "soon")
        turn()
        turn()
        loop.at_turn_end(lambda: seen.append("end"))
        turn()
        env.original("_thread", "start_new_thread")(
            lambda: loop.call_soon_threadsafe(seen.append, "thread"), ()
        )
        turn()
        assert seen == ["before", "timer", "soon", "end", "thread"]
        assert outer.poll(0) == []
        assert "outside" in repr(loop)
    with pytest.raises(hub.HubClosedError):
        loop.fileno()


def test_signal_handler_just_before_the_wait_is_heard(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.Hub() as loop:
        loop.run_once(0)
        delay = loop._delay

        def interrupted() -> Any:
            # What a handler would do that runs at this moment.
            monkeypatch.undo()
            loop.call_soon_threadsafe(seen.append, 1)
            return delay()

        seen: list[int] = []
        monkeypatch.setattr(loop, "_delay", interrupted)
        began = loop.time()
        loop.run_once(5)
        loop.run_once(0)
        assert seen == [1]
        assert loop.time() - began < 3


def test_timers_with_a_tolerance_fall_together() -> None:
    clock = FakeClock(1000.0)
    loop = scripted_hub(clock)
    timers = []
    for _ in range(10):
        timers.append(loop.call_repeatedly(30, int, tolerance=1.0))
        clock.advance(0.09)
    assert {timer.due for timer in timers} == {1030.0, 1031.0}
    loop.close()


def test_descriptor_closed_before_its_second_direction_is_removed(env: Environment) -> None:
    with hub.Hub() as loop:
        ours, theirs = native_pair(env)
        fd = ours.fileno()
        loop.add_reader(fd, int)
        loop.add_writer(fd, int)
        ours.close()
        assert loop.remove_writer(fd)
        assert loop.remove_reader(fd)
        theirs.close()


def test_interrupt_while_the_end_of_a_turn_is_queued(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub.Hub() as loop:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(loop, "call_soon", interrupted)
            with pytest.raises(KeyboardInterrupt):
                loop.at_turn_end(lambda: seen.append(1))
        seen: list[int] = []
        loop.at_turn_end(lambda: seen.append(2))
        loop.run_once(1)
        assert seen == [1, 2]


def test_sentry_that_is_abandoned_in_a_child_closes_its_copies(env: Environment) -> None:
    from hub._sentry import Sentry
    from hub.pollers import create_poller

    poller = create_poller("poll", env.original)
    sentry = Sentry(env, poller)
    sentry.watch()
    sentry.close()
    sentry.close()
    sentry.abandon()
    poller.close()


def test_waiter_of_a_thread_whose_hub_was_closed_is_woken_by_the_next(env: Environment) -> None:
    """eventlet goes through our hub of the waiting thread to wake it from another one."""
    waiter = env.waiter()
    task = env.spawn(waiter.wait, 10)
    env.sleep(0.01)
    hub.get_hub().close()
    assert hub.get_hub().run_threadsafe(lambda: 7, timeout=10) == 7
    _default.start_native_thread(env, waiter.wake)
    assert task.join(5)
    assert task.result() is True


@pytest.mark.parametrize("seconds", [1e5, 1e9, float("inf")])
def test_wait_for_longer_than_a_loop_can_count(env: Environment, seconds: float) -> None:
    waiter = env.waiter()
    task = env.spawn(waiter.wait, seconds)
    assert not task.join(0.02)
    waiter.wake()
    assert task.join(10)
    assert task.result() is True


@pytest.mark.green_matrix
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="nothing counts threads here")
@pytest.mark.parametrize("name", ["poll", "select"])
def test_a_hub_that_is_dropped_leaves_no_native_thread(
    env: Environment, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    # On a busy machine a warning of a slow callback would hold it, and with it the hub.
    caplog.set_level(logging.ERROR, "hub")

    def used() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    def run_one() -> None:
        loop = hub.Hub(poller=name)
        loop.call_later(0.001, loop.stop)  # until then it waits, with its thread's help
        loop.run_forever()

    hub.get_hub().run_threadsafe(int, timeout=LONG)
    before = now = used()
    for _ in range(3):
        run_one()

    def gone() -> bool:
        nonlocal now
        now = used()
        return now <= before

    until(env, gone)
