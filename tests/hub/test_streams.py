"""Streams over TCP, Unix sockets and TLS, against real peers."""

from __future__ import annotations

import errno
import gc
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

import hub
from hub.environment import Environment
from hub.streams import (
    EAGER_WRITES,
    SEND_CHUNK,
    SEND_TURN,
    SocketOptions,
    Stream,
    open_stream,
)
from tests.support.sockets import native_pair
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix


class Handler:
    """Keeps what arrives; waits for a number of bytes, or for the end."""

    def __init__(self, env: Environment) -> None:
        self.env = env
        self.data = bytearray()
        self.lost: list[BaseException | None] = []
        self.resumed = 0
        self._wanted = 0
        self._arrived: Any = None
        self._ended = env.Event()

    def data_received(self, data: bytes) -> None:
        self.data += data
        if self._arrived is not None and len(self.data) >= self._wanted:
            self._arrived.set()

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)
        self._ended.set()

    def write_resumed(self) -> None:
        self.resumed += 1

    def wait_for(self, count: int, timeout: float = 20) -> bool:
        self._wanted = count
        self._arrived = self.env.Event()
        if len(self.data) >= count:
            return True
        return bool(self._arrived.wait(timeout))

    def wait_for_end(self, timeout: float = 20) -> BaseException | None:
        assert self._ended.wait(timeout)
        assert len(self.lost) == 1
        return self.lost[0]


class Server:
    """Accepts connections and serves each one in a task."""

    def __init__(self, env: Environment, serve: Callable[[socket.socket], None]) -> None:
        self.env = env
        self.serve = serve
        self.listener = env.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(100)
        self.address: tuple[str, int] = self.listener.getsockname()
        self.tasks = [env.spawn(self._accept)]
        self.open: list[socket.socket] = []

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self.open.append(peer)
            self.tasks.append(self.env.spawn(self._serve, peer))

    def _serve(self, peer: socket.socket) -> None:
        try:
            self.serve(peer)
        except OSError:
            pass
        finally:
            peer.close()

    def close(self) -> None:
        for sock in [*self.open, self.listener]:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for task in self.tasks:
            if self.env.green:
                task.kill()
            assert task.join(10), task
        for sock in [*self.open, self.listener]:
            sock.close()


def echo(peer: socket.socket) -> None:
    while True:
        data = peer.recv(65536)
        if not data:
            return
        peer.sendall(data)


@pytest.fixture
def make_server(env: Environment) -> Iterator[Callable[[Callable[[Any], None]], Server]]:
    made: list[Server] = []

    def make(serve: Callable[[Any], None]) -> Server:
        made.append(Server(env, serve))
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["plain", "tls"])
def echo_stream(
    request: pytest.FixtureRequest, env: Environment, authority: trustme.CA, make_server: Any
) -> Iterator[tuple[Stream, Handler]]:
    """A stream to an echo server, plain and over TLS."""
    handler = Handler(env)
    if request.param == "plain":
        server = make_server(echo)
        stream = open_stream(server.address, handler, timeout=10)
    else:
        server = make_server(tls_server(authority))
        stream = open_stream(
            server.address,
            handler,
            timeout=10,
            tls=client_context(authority),
            server_hostname="localhost",
        )
    yield stream, handler
    stream.abort()
    handler.wait_for_end()


def tls_server(authority: trustme.CA) -> Callable[[Any], None]:
    if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] == "gevent-unpatched":
        pytest.skip("the server's own handshake would block: ssl is not patched here")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    def serve(peer: Any) -> None:
        with context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False) as secured:
            secured.do_handshake()
            echo(secured)

    return serve


def client_context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def test_bytes_go_out_and_come_back(echo_stream: tuple[Stream, Handler]) -> None:
    stream, handler = echo_stream
    stream.write(b"hello")
    assert handler.wait_for(5)
    assert bytes(handler.data) == b"hello"
    assert "open" in repr(stream)


def test_more_than_the_kernel_takes_arrives_whole(echo_stream: tuple[Stream, Handler]) -> None:
    stream, handler = echo_stream
    block = os.urandom(1_000_000)
    for _ in range(20):
        stream.write(block)
    assert handler.wait_for(20_000_000)
    assert bytes(handler.data) == block * 20
    assert stream.buffered == 0


def test_a_message_in_parts_arrives_whole_behind_what_was_written_before(
    echo_stream: tuple[Stream, Handler],
) -> None:
    stream, handler = echo_stream
    block = os.urandom(700_000)
    changing = bytearray(block)
    stream.write(b"before")
    stream.write([b"head", memoryview(block), b"", b"middle", changing, memoryview(block)[:300]])  # type: ignore[list-item]
    changing[:] = bytes(len(changing))
    stream.write(b"behind")
    expected = b"before" + b"head" + block + b"middle" + block + block[:300] + b"behind"
    assert handler.wait_for(len(expected))
    assert bytes(handler.data) == expected
    assert stream.buffered == 0
    with pytest.raises(hub.BadArgumentError):
        stream.write([b"x", "text"])  # type: ignore[list-item]
    stream.write(b"on")
    assert handler.wait_for(len(expected) + 2)
    assert handler.data[-2:] == b"on"


class Swallowing:
    """A socket that takes whatever it is given, at once; notes how much, and in which callback."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.turns: dict[tuple[bool, int], list[int]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes) -> int:
        running = hub.get_hub()
        turn = (running.in_hub_thread() and running.cycling, running.stats.callbacks)
        self.turns.setdefault(turn, []).append(len(data))
        return len(data)


@pytest.mark.parametrize("written", ["whole", "in parts", "in small messages"])
def test_a_peer_that_reads_as_fast_as_we_send_does_not_keep_the_others_waiting(
    env: Environment, written: str
) -> None:
    ours, theirs = native_pair(env)
    sock = Swallowing(ours)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), sock, handler)  # type: ignore[arg-type]
    body = bytes(8_000_000)
    if written == "whole":
        stream.write(body)
    elif written == "in parts":
        stream.write([body[:5_000_000], body[5_000_000:]])
    else:
        stream.coalesce = True
        for _ in range(8000):
            stream.write(body[:1000])
    for _ in range(1000):
        if not stream.buffered:
            break
        env.sleep(0.01)
    sends = [size for turn in sock.turns.values() for size in turn]
    assert sum(sends) == stream.sent_bytes == len(body)
    assert max(sends) <= SEND_CHUNK + 1000
    if written != "in small messages":
        assert max(map(sum, sock.turns.values())) <= SEND_TURN + SEND_CHUNK
        assert len(sock.turns) >= len(body) // (SEND_TURN + SEND_CHUNK)
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_large_message_leaves_others_running(
    echo_stream: tuple[Stream, Handler], ticker: Any
) -> None:
    stream, handler = echo_stream
    ticker.reset()
    for times in range(1, 11):  # a native thread may wait for a busy machine that long
        stream.write(b"x" * 20_000_000)
        assert handler.wait_for(times * 20_000_000)
        if ticker.ticks > 2:
            break
    assert ticker.ticks > 2


def test_many_tasks_write_whole_messages(
    echo_stream: tuple[Stream, Handler], env: Environment
) -> None:
    stream, handler = echo_stream

    def write(number: int) -> None:
        for _ in range(50):
            stream.write(b"<%02d%s>" % (number, b"x" * 2000))
            env.sleep(0)

    tasks = [env.spawn(write, number) for number in range(20)]
    for task in tasks:
        task.result(20)
    assert handler.wait_for(20 * 50 * 2004)
    messages = bytes(handler.data).split(b">")[:-1]
    assert len(messages) == 1000
    assert all(len(message) == 2003 and message[:1] == b"<" for message in messages)


def test_burst_in_one_turn_is_coalesced(env: Environment, make_server: Any) -> None:
    handler = Handler(env)
    stream = open_stream(make_server(echo).address, handler, timeout=10)
    env.sleep(0.01)
    before = stream.send_calls
    for _ in range(200):
        stream.write(b"x" * 100)
    assert handler.wait_for(20_000)
    calls = stream.send_calls - before
    assert calls <= (EAGER_WRITES + 2 if env.green else 200)
    before = stream.send_calls
    for _ in range(200):
        stream.write(b"x" * 100, eager=False)
    assert handler.wait_for(40_000)
    assert stream.send_calls - before <= (2 if env.green else 200)
    before = stream.send_calls
    stream.coalesce = False
    for _ in range(10):
        stream.write(b"x" * 100)
    assert handler.wait_for(41_000)
    assert stream.send_calls - before == 10
    stream.close()


def test_first_writes_of_a_turn_are_not_delayed(env: Environment) -> None:
    """What is written before a long computation leaves before it."""
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    env.sleep(0.01)
    for _ in range(EAGER_WRITES):
        stream.write(b"x")
    assert theirs.recv(100) == b"x" * EAGER_WRITES
    stream.write(b"y", flush=True)
    assert theirs.recv(100) == b"y"
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_high_water_mark_and_resumption(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler, high_water=100_000)
    stream.start()
    while not stream.above_high_water:
        stream.write(b"x" * 10_000)
    assert stream.buffered >= 100_000
    expected = stream.sent_bytes + stream.buffered
    total = 0
    deadline = time.monotonic() + 20
    while total < expected and time.monotonic() < deadline:
        try:
            total += len(theirs.recv(65536))
        except BlockingIOError:
            env.sleep(0.001)
    assert total == expected
    for _ in range(100):
        if handler.resumed:
            break
        env.sleep(0.01)
    assert handler.resumed == 1
    assert not stream.above_high_water
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_paused_stream_reads_nothing(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    stream.pause_reading()
    assert stream.reading_paused
    hub.get_hub().run_threadsafe(int, timeout=10)
    theirs.send(b"x")
    assert not handler.wait_for(1, 0.05)
    stream.resume_reading()
    assert handler.wait_for(1)
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_end_of_the_peer_is_a_typed_error(
    echo_stream: tuple[Stream, Handler], env: Environment
) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler, peer="broker:5672")
    stream.start()
    theirs.send(b"last words")
    theirs.close()
    error = handler.wait_for_end()
    assert isinstance(error, hub.StreamClosedError)
    assert isinstance(error, ConnectionError)
    assert "broker:5672" in str(error)
    assert bytes(handler.data) == b"last words"
    with pytest.raises(hub.StreamClosedError, match="broker:5672"):
        stream.write(b"x")
    assert stream.error is error
    assert "closed" in repr(stream)
    other, other_handler = echo_stream
    other.write(b"x")
    assert other_handler.wait_for(1), "no other stream is disturbed"


def test_last_words_are_read_when_sending_fails(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    # Not started: the words are still in the kernel when the send fails.
    theirs.send(b"540 NOT_IMPLEMENTED")
    theirs.close()
    with pytest.raises(hub.StreamClosedError):
        stream.write(b"x", flush=True)
    assert isinstance(handler.wait_for_end(), hub.StreamClosedError)
    assert bytes(handler.data) == b"540 NOT_IMPLEMENTED"


def test_handler_that_raises_ends_its_own_stream_only(
    echo_stream: tuple[Stream, Handler], env: Environment
) -> None:
    class Broken(Handler):
        def data_received(self, data: bytes) -> None:
            raise ValueError("cannot parse")

    ours, theirs = native_pair(env)
    handler = Broken(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    theirs.send(b"x")
    assert isinstance(handler.wait_for_end(), ValueError)
    with pytest.raises(hub.StreamClosedError, match="cannot parse"):
        stream.write(b"x")
    other, other_handler = echo_stream
    other.write(b"x")
    assert other_handler.wait_for(1)
    theirs.close()


def test_close_sends_what_is_buffered(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    stream.write(b"x" * 3_000_000)
    assert stream.buffered

    def drain() -> int:
        total = 0
        while True:
            try:
                data = theirs.recv(65536)
            except BlockingIOError:
                env.sleep(0.001)
                continue
            if not data:
                return total
            total += len(data)

    reader = env.spawn(drain)
    stream.close(20)
    stream.close(20)
    assert reader.result(20) == 3_000_000
    assert handler.wait_for_end() is None
    theirs.close()


def test_close_has_a_deadline(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.write(b"x" * 3_000_000)
    began = time.monotonic()
    with pytest.raises(hub.StreamTimeoutError, match="could not be sent"):
        stream.close(0.05)
    assert time.monotonic() - began < 5
    handler.wait_for_end()
    theirs.close()


def test_kill_during_close_closes_all_the_same(env: Environment) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.write(b"x" * 3_000_000)
    task = env.spawn(stream.close, 30)
    env.sleep(0.01)
    task.kill()
    assert task.join(10)
    handler.wait_for_end()
    assert stream.closed
    theirs.close()


def test_abort_is_idempotent_and_tells_once(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    cause = RuntimeError("enough")
    stream.abort(cause)
    stream.abort(ValueError("too late"))
    assert handler.wait_for_end() is cause
    for _ in range(100):
        if theirs.fileno() >= 0 and _ended(theirs):
            break
        env.sleep(0.01)
    assert _ended(theirs)
    theirs.close()


def _ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_closing_the_hub_ends_its_streams(env: Environment) -> None:
    own = hub.Hub()
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(own, ours, handler)
    own.close()
    assert isinstance(handler.wait_for_end(), hub.HubClosedError)
    assert stream.closed
    theirs.close()


def test_dropped_stream_is_closed_by_the_hub(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream: Stream | None = Stream(hub.get_hub(), ours, handler)
    assert stream is not None
    stream.start()
    hub.get_hub().run_threadsafe(int, timeout=10)
    handler.stream = stream  # type: ignore[attr-defined]  # a cycle, as every connection has
    del stream, ours, handler
    until(env, lambda: _ended(theirs), collecting=True)
    theirs.close()


def test_hub_that_closes_right_after_an_abort_tells_all_the_same(env: Environment) -> None:
    """With native threads the abort waits for the hub's thread, which never comes to it."""
    for _ in range(20):
        own = hub.get_hub()
        own.run_threadsafe(int, timeout=10)
        ours, theirs = native_pair(env)
        handler = Handler(env)
        stream = Stream(own, ours, handler)
        cause = RuntimeError("enough")
        stream.abort(cause)
        own.close()
        assert handler.wait_for_end(5) is cause
        assert ours.fileno() == -1
        theirs.close()


def test_two_tasks_may_close_one_stream(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.write(b"x" * 3_000_000)
    tasks = [env.spawn(stream.close, 20) for _ in range(3)]
    env.sleep(0.02)
    total = 0
    while True:
        try:
            data = theirs.recv(65536)
        except BlockingIOError:
            env.sleep(0.001)
            continue
        if not data:
            break
        total += len(data)
    began = time.monotonic()
    for task in tasks:
        task.result(10)
    assert time.monotonic() - began < 5
    assert total == 3_000_000
    assert handler.wait_for_end() is None
    theirs.close()


def test_writers_are_told_when_another_thread_sends_the_rest(env: Environment) -> None:
    """The buffer may be emptied by a flush that is not the WRITE callback."""
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler, high_water=100_000)
    stream.start()
    while not stream.above_high_water:
        stream.write(b"x" * 10_000)
    expected = stream.sent_bytes + stream.buffered

    def empty() -> None:
        # As if a writer's flush came between the callback's look and its own flush.
        stream.hub.remove_writer(ours.fileno())
        stream._blocked = False
        total = 0
        while total < expected:
            try:
                total += len(theirs.recv(65536))
            except BlockingIOError:
                stream._blocked = False
                stream.flush()

    stream.hub.run_threadsafe(empty, timeout=20)
    for _ in range(500):
        if handler.resumed:
            break
        env.sleep(0.01)
    assert handler.resumed >= 1
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_interrupted_write_does_not_hold_back_the_next_ones(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal handler may raise while a turn of coalesced writes begins."""
    ours, theirs = native_pair(env)
    handler = Handler(env)
    loop = hub.get_hub()
    stream = Stream(loop, ours, handler)
    stream.start()
    env.sleep(0.01)
    if env.green:

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(loop, "at_turn_end", interrupted)
            with pytest.raises(KeyboardInterrupt):
                stream.write(b"x")
    for _ in range(20):
        stream.write(b"y")
    received = b""
    for _ in range(200):
        try:
            received += theirs.recv(100)
        except BlockingIOError:
            env.sleep(0.01)
        if len(received) >= 20:
            break
    assert received.endswith(b"y" * 20)
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_interrupt_in_the_middle_of_a_send_aborts(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)

    def interrupted(_most: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_send", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stream.write(b"x")
    assert stream.closed
    assert handler.wait_for_end() is None
    theirs.close()


def test_write_while_lengths_are_added_up_does_no_harm(env: Environment) -> None:
    """A signal handler, or another thread, may write between any two instructions."""
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    more = [True]

    def interfere(frame: Any, event: str, _argument: object) -> None:
        caller = frame.f_back
        if event == "call" and caller is not None and caller.f_code.co_name == "_block" and more:
            more.pop()
            stream.write([b"more"])

    sys.setprofile(interfere)
    try:
        while not (stream._blocked and stream.buffered > SEND_CHUNK):
            stream.write([b"x" * SEND_CHUNK, b"y"])
    finally:
        sys.setprofile(None)
    assert not stream.closed
    assert not more
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_parts_that_are_views_of_other_than_octets_are_sent_whole(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    words = memoryview(b"abcdefgh").cast("I")
    stream.write([b"<", words, memoryview(b"a.b.c")[::2], b">"], flush=True)  # type: ignore[list-item]
    assert stream.buffered == 0
    assert theirs.recv(100) == b"<abcdefghabc>"
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_a_write_is_sent_though_the_thread_of_the_hub_runs_no_loop(env: Environment) -> None:
    """As that of a native pool, which waits for its next piece of work."""
    ours, theirs = native_pair(env)
    go_on, begun, ended = env.original("_thread", "allocate_lock")(), env.waiter(), env.waiter()
    go_on.acquire()
    streams: list[Stream] = []

    def work() -> None:
        streams.append(Stream(hub.get_hub(), ours, Handler(env)))
        streams[0].start()
        begun.wake()
        go_on.acquire()
        streams[0].abort()
        if env.green:
            streams[0].hub.close()
        ended.wake()

    env.original("_thread", "start_new_thread")(work, ())
    assert begun.wait(LONG)
    for _ in range(10):
        streams[0].write(b"m")
    assert theirs.recv(100) == b"m" * 10  # at once: the descriptor does not block
    go_on.release()
    assert ended.wait(LONG)
    theirs.close()


def test_write_from_a_foreign_thread(env: Environment) -> None:
    ours, theirs = native_pair(env)
    handler = Handler(env)
    stream = Stream(hub.get_hub(), ours, handler)
    stream.start()
    done = env.waiter()
    env.original("_thread", "start_new_thread")(lambda: (stream.write(b"hello"), done.wake()), ())
    assert done.wait(10)
    for _ in range(500):
        try:
            assert theirs.recv(10) == b"hello"
            break
        except BlockingIOError:
            env.sleep(0.01)
    else:
        pytest.fail("nothing arrived")
    stream.abort()
    handler.wait_for_end()
    theirs.close()


def test_abort_by_a_collected_owner_leaves_the_number_to_the_reaper(env: Environment) -> None:
    """An owner whose __del__ aborts its stream: the finalizer has fired before that."""

    class Owner(Handler):
        stream: Stream

        def __del__(self) -> None:
            self.stream.abort()

    loop = hub.get_hub()
    ours, theirs = native_pair(env)
    number = ours.fileno()
    owner = Owner(env)
    owner.stream = Stream(loop, ours, owner)
    owner.stream.start()
    loop.run_threadsafe(int, timeout=10)
    del ours, owner
    new: list[socket.socket] = []

    def collect_and_reuse() -> None:
        gc.collect()
        new.extend(native_pair(env))
        for sock in new:
            loop.add_reader(sock.fileno(), int)

    loop.run_threadsafe(collect_and_reuse, timeout=10)
    for _ in range(3):
        loop.run_threadsafe(int, timeout=10)
    assert number not in [sock.fileno() for sock in new]
    assert all(sock.fileno() in loop.readers for sock in new)
    assert number not in loop.readers
    for sock in new:
        loop.run_threadsafe(loop.remove, sock.fileno(), timeout=10)
        sock.close()
    theirs.close()


# -- connecting ---------------------------------------------------------------------------


def test_unix_socket_with_a_full_backlog_is_waited_for(env: Environment, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    native = env.original("socket", "socket")
    listener = native(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(0)
    fillers = []
    while True:
        filler = native(socket.AF_UNIX, socket.SOCK_STREAM)
        filler.setblocking(False)
        fillers.append(filler)
        if filler.connect_ex(path):
            break
    with pytest.raises(hub.StreamTimeoutError, match="did not answer"):
        open_stream(path, Handler(env), timeout=0.05)
    handler = Handler(env)
    task = env.spawn(open_stream, path, handler, timeout=10)
    env.sleep(0.03)
    peers = [listener.accept()[0] for _ in range(len(fillers) - 1)]
    stream = task.result(10)
    peers.append(listener.accept()[0])
    peers[-1].send(b"x")
    assert handler.wait_for(1)
    stream.abort()
    handler.wait_for_end()
    for sock in [*fillers, *peers, listener]:
        sock.close()


def test_unix_socket(env: Environment, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = env.original("socket", "socket")(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(1)
    handler = Handler(env)
    stream = open_stream(path, handler, timeout=10)
    peer, _ = listener.accept()
    peer.send(b"x")
    assert handler.wait_for(1)
    stream.abort()
    handler.wait_for_end()
    peer.close()
    listener.close()
    with pytest.raises(hub.StreamError, match="cannot connect"):
        open_stream(str(tmp_path / "absent"), handler, timeout=1)


def test_refused_connection_names_the_peer(env: Environment) -> None:
    with pytest.raises(hub.StreamRefusedError, match=r"127\.0\.0\.1:1: .*refused") as caught:
        open_stream(("127.0.0.1", 1), Handler(env), timeout=10)
    assert isinstance(caught.value, ConnectionRefusedError)
    assert caught.value.errno == errno.ECONNREFUSED


@pytest.mark.allow_leaks("the resolver of gevent keeps its native threads")
def test_unknown_name_is_a_typed_error(env: Environment) -> None:
    with pytest.raises(hub.StreamError, match=r"no\.such\.host\.invalid"):
        open_stream(("no.such.host.invalid", 1), Handler(env), timeout=20)


def test_second_address_is_tried_while_the_first_is_silent(
    env: Environment, make_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hub import _connect

    server = make_server(echo)
    silent = env.original("socket", "socket")()
    silent.bind(("127.0.0.1", 0))
    silent.listen(0)
    fillers = []
    for _ in range(4):  # a full backlog: further connections get no answer
        filler = env.original("socket", "socket")()
        filler.setblocking(False)
        filler.connect_ex(silent.getsockname())
        fillers.append(filler)
    targets = [
        (socket.AF_INET, silent.getsockname()),
        (socket.AF_INET, ("127.0.0.1", 1)),
        (socket.AF_INET, server.address),
    ]
    monkeypatch.setattr(_connect, "_resolve", lambda *_: list(targets))
    handler = Handler(env)
    began = time.monotonic()
    stream = open_stream(("broker", 5672), handler, timeout=20)
    assert time.monotonic() - began < 10
    assert stream.sock.getpeername() == server.address
    stream.abort()
    handler.wait_for_end()
    targets[2:] = []
    with pytest.raises(hub.StreamTimeoutError, match=r"did not answer within 0\.4 s"):
        open_stream(("broker", 5672), handler, timeout=0.4)
    for sock in [*fillers, silent]:
        sock.close()


def test_kill_while_connecting_leaves_nothing_open(env: Environment) -> None:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    silent = env.original("socket", "socket")()
    silent.bind(("127.0.0.1", 0))
    silent.listen(0)
    fillers = []
    for _ in range(4):
        filler = env.original("socket", "socket")()
        filler.setblocking(False)
        filler.connect_ex(silent.getsockname())
        fillers.append(filler)
    before = len(hub.get_hub().writers)
    task = env.spawn(open_stream, silent.getsockname(), Handler(env), timeout=20)
    until(env, lambda: len(hub.get_hub().writers) == before + 1)
    task.kill()
    assert task.join(10)
    until(env, lambda: len(hub.get_hub().writers) == before)
    for sock in [*fillers, silent]:
        sock.close()


def test_socket_options_are_set(env: Environment, make_server: Any) -> None:
    handler = Handler(env)
    options = SocketOptions(
        user_timeout=7.5,
        keepalive_idle=33,
        send_buffer_bytes=50_000,
        extra={(socket.SOL_SOCKET, socket.SO_OOBINLINE): 1},
    )
    stream = open_stream(make_server(echo).address, handler, timeout=10, options=options)
    assert stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7500
        assert stream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
        assert stream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) == 100_000
    stream.abort()
    handler.wait_for_end()


# -- TLS ----------------------------------------------------------------------------------


def test_wrong_certificate_is_refused(
    env: Environment, authority: trustme.CA, make_server: Any
) -> None:
    server = make_server(tls_server(authority))
    with pytest.raises(hub.TLSError, match="certificate was refused"):
        open_stream(
            server.address,
            Handler(env),
            timeout=10,
            tls=client_context(authority),
            server_hostname="other.example",
        )
    with pytest.raises(hub.TLSError, match="certificate was refused"):
        open_stream(
            server.address,
            Handler(env),
            timeout=10,
            tls=ssl.create_default_context(),
            server_hostname="localhost",
        )


def test_tls_to_a_plain_peer_is_a_typed_error(
    env: Environment, authority: trustme.CA, make_server: Any
) -> None:
    def plain(peer: Any) -> None:
        peer.recv(1000)
        peer.sendall(b"AMQP\x00\x00\x09\x01")

    with pytest.raises(hub.TLSError, match="does not speak TLS"):
        open_stream(
            make_server(plain).address,
            Handler(env),
            timeout=10,
            tls=client_context(authority),
            server_hostname="localhost",
        )
    with pytest.raises(hub.StreamClosedError, match="TLS handshake"):
        open_stream(
            make_server(lambda peer: peer.recv(1000) and None).address,
            Handler(env),
            timeout=10,
            tls=client_context(authority),
            server_hostname="localhost",
        )


def test_silent_peer_of_a_handshake_has_a_deadline(
    env: Environment, authority: trustme.CA, make_server: Any
) -> None:
    done = env.Event()
    server = make_server(lambda _: done.wait(20))
    with pytest.raises(hub.StreamTimeoutError, match="TLS handshake"):
        open_stream(
            server.address,
            Handler(env),
            timeout=0.2,
            tls=client_context(authority),
            server_hostname="localhost",
        )
    done.set()


def test_end_of_a_tls_session_is_noticed(
    env: Environment, authority: trustme.CA, make_server: Any
) -> None:
    tls_server(authority)  # skips where it could not work
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    def serve(peer: Any) -> None:
        with context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False) as secured:
            secured.settimeout(10)
            secured.do_handshake()
            secured.sendall(b"bye")
            secured.unwrap()

    handler = Handler(env)
    stream = open_stream(
        make_server(serve).address,
        handler,
        timeout=10,
        tls=client_context(authority),
        server_hostname="localhost",
    )
    assert isinstance(handler.wait_for_end(), hub.StreamClosedError)
    assert bytes(handler.data) == b"bye"
    assert stream.closed


def test_garbage_in_a_tls_session_is_a_typed_error(
    env: Environment, authority: trustme.CA, make_server: Any
) -> None:
    tls_server(authority)  # skips where it could not work
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    go = env.Event()

    def serve(peer: Any) -> None:
        with context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False) as secured:
            secured.do_handshake()
            go.wait(10)
            with env.original("socket", "socket")(fileno=os.dup(secured.fileno())) as raw:
                raw.send(b"this is no TLS record at all")

    handler = Handler(env)
    stream = open_stream(
        make_server(serve).address,
        handler,
        timeout=10,
        tls=client_context(authority),
        server_hostname="localhost",
    )
    go.set()
    assert isinstance(handler.wait_for_end(), hub.TLSError)
    assert stream.closed
