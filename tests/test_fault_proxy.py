"""The fault proxy does what it is told, and nothing else."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from greenkombu._amqp.frames import encode_method
from greenkombu._amqp.methods import BY_NAME
from hub.environment import Environment, get_environment
from tests.support.fault_proxy import FaultProxy, FaultProxyError
from tests.support.tasks import until

if TYPE_CHECKING:
    from greenkombu.utils.private_redis import PrivateRedis

HEADER = b"AMQP\x00\x00\x09\x01"


class Ends:
    """A client and the server that the proxy connected it to."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        for end in (client, server):
            end.settimeout(10)

    def close(self) -> None:
        self.client.close()
        self.server.close()


def read(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data


def silent(sock: socket.socket, seconds: float = 0.15) -> bool:
    """Whether nothing comes, not even the end, for so long."""
    sock.settimeout(seconds)
    try:
        sock.recv(1)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(10)
    return False


def was_reset(sock: socket.socket) -> bool:
    """Whether the peer ended the connection by RST; eventlet's own sockets do not tell."""
    native = get_environment().original("socket", "socket")
    with native(fileno=os.dup(sock.fileno())) as same:
        same.settimeout(10)  # the proxy is another process: it needs nothing of this one
        try:
            same.recv(1)
        except ConnectionResetError:
            return True
    return False


def method(name: str, *values: object, channel: int = 1) -> bytes:
    return encode_method(channel, BY_NAME[name], values)


def message(body: bytes, channel: int = 1) -> list[bytes]:
    """Return the frames of a publish, its body in two parts."""
    half = len(body) // 2
    header = struct.pack(">BHIHHQH", 2, channel, 14, 60, 0, len(body), 0) + b"\xce"
    parts = [
        struct.pack(">BHI", 3, channel, len(part)) + part + b"\xce"
        for part in (body[:half], body[half:])
        if part
    ]
    return [method("Basic.publish", 0, "", "queue", False, False, channel=channel), header, *parts]


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        sock.settimeout(10)
        yield sock


@pytest.fixture
def proxy(listener: socket.socket) -> Iterator[FaultProxy]:
    with FaultProxy(listener.getsockname()) as made:
        yield made


@pytest.fixture
def connect(proxy: FaultProxy, listener: socket.socket) -> Iterator[Callable[[], Ends]]:
    made: list[Ends] = []

    def connect() -> Ends:
        client = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
        made.append(Ends(client, listener.accept()[0]))
        return made[-1]

    yield connect
    for ends in made:
        ends.close()


def test_bytes_and_ends_pass_both_ways(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    ends.client.sendall(b"to the server")
    assert read(ends.server, 13) == b"to the server"
    ends.server.sendall(b"to the client")
    assert read(ends.client, 13) == b"to the client"
    ends.client.shutdown(socket.SHUT_WR)
    assert ends.server.recv(1) == b""
    ends.server.sendall(b"last words")
    ends.server.close()
    assert read(ends.client, 99) == b"last words"
    (link,) = proxy.links()
    assert (link.up.bytes_out, link.down.bytes_out) == (13, 23)


def test_large_transfers_pass_unchanged(env: Environment, connect: Callable[[], Ends]) -> None:
    ends = connect()
    data = bytes(range(256)) * 20_000
    sender = env.spawn(ends.client.sendall, data)
    assert read(ends.server, len(data)) == data
    assert sender.join(10)


def test_a_reset_of_one_side_reaches_the_other(connect: Callable[[], Ends]) -> None:
    ends = connect()
    ends.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.client.close()
    assert was_reset(ends.server)


def test_a_target_that_is_not_there_resets_the_client(
    proxy: FaultProxy, listener: socket.socket
) -> None:
    listener.close()
    try:
        client = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    except ConnectionResetError:
        return  # it was faster than connect() could return
    with client:
        assert was_reset(client)


def test_delay(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    proxy.delay(60, "down")
    ends.client.sendall(b"x")
    assert read(ends.server, 1) == b"x"  # within its 10 seconds
    proxy.delay(0.3, "down")
    started = time.monotonic()
    ends.server.sendall(b"y")
    assert read(ends.client, 1) == b"y"
    assert 0.29 < time.monotonic() - started < 10


def test_bandwidth(env: Environment, proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    proxy.bandwidth(100_000)
    started = time.monotonic()
    sender = env.spawn(ends.client.sendall, bytes(50_000))
    assert len(read(ends.server, 50_000)) == 50_000
    assert 0.4 < time.monotonic() - started < 5
    assert sender.join(10)


def test_a_slow_link_pushes_back_on_the_sender(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    ends = connect()
    proxy.black_hole()
    ends.client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        ends.client.sendall(bytes(32 * 1024 * 1024))


def test_a_black_hole_is_for_the_chosen_links(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    swallowed, spared = connect(), connect()
    proxy.black_hole(links=[1])
    swallowed.client.sendall(b"x")
    swallowed.server.sendall(b"x")
    spared.client.sendall(b"y")
    assert read(spared.server, 1) == b"y"
    assert silent(swallowed.server)
    assert silent(swallowed.client)
    assert [link.number for link in proxy.open_links()] == [1, 2]
    proxy.restore()
    assert read(swallowed.server, 1) == b"x"
    assert read(swallowed.client, 1) == b"x"


def test_a_black_hole_for_all_includes_links_to_come(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    proxy.black_hole("up")
    ends = connect()
    ends.client.sendall(b"x")
    ends.server.sendall(b"y")
    assert read(ends.client, 1) == b"y"
    assert silent(ends.server)


def test_reset_and_finish(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    first, second, third = connect(), connect(), connect()
    assert proxy.reset([1]) == [1]
    for sock in (first.client, first.server):
        assert was_reset(sock)
    assert proxy.finish([2]) == [2]
    assert second.client.recv(1) == b""
    assert second.server.recv(1) == b""
    third.client.sendall(b"x")
    assert read(third.server, 1) == b"x"
    assert [link.number for link in proxy.open_links()] == [3]


@pytest.mark.parametrize("toward", ["up", "down"])
@pytest.mark.parametrize("how", ["rst", "fin", "stop"])
def test_cut_passes_exactly_so_many_bytes(
    proxy: FaultProxy, connect: Callable[[], Ends], toward: str, how: str
) -> None:
    ends = connect()
    source, sink = (ends.client, ends.server) if toward == "up" else (ends.server, ends.client)
    source.sendall(b"before")
    assert read(sink, 6) == b"before"
    proxy.cut(5, toward, how)  # type: ignore[arg-type]
    source.sendall(b"0123456789")
    if how == "fin":
        assert read(sink, 99) == b"01234"
    else:
        # After a reset the receiver may lose what it has not read yet.
        received = b""
        try:
            received = read(sink, 5)
            if how == "rst":
                assert sink.recv(1) == b""
        except ConnectionResetError:
            assert how == "rst"
        assert b"01234".startswith(received)
    if how == "stop":
        assert silent(sink)
        proxy.restore()
        assert read(sink, 5) == b"56789"
    link = proxy.links()[0]
    assert getattr(link, toward).bytes_out == (16 if how == "stop" else 11)


def test_cut_at_bytes_lets_what_comes_before_pass(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    ends = connect()
    proxy.cut_at(b"needle", "up", "stop", skip=1)
    ends.client.sendall(b"a needle in two nee")
    assert read(ends.server, 19) == b"a needle in two nee"
    ends.client.sendall(b"dles, needles")  # the part that has passed is not taken back
    assert silent(ends.server)
    proxy.restore()
    assert read(ends.server, 13) == b"dles, needles"
    proxy.cut_at(b"needle", "up", "fin")
    ends.client.sendall(b"no needle")
    assert read(ends.server, 99) == b"no "


def test_every_fault_of_a_link_is_one_for_redis(redis: PrivateRedis) -> None:
    key = f"test-{os.urandom(6).hex()}".encode()
    ping = b"*1\r\n$4\r\nPING\r\n"
    with FaultProxy(("127.0.0.1", redis.port)) as proxy:

        def connect() -> socket.socket:
            client = socket.create_connection(("127.0.0.1", proxy.port), timeout=30)
            client.sendall(ping)
            assert read(client, 7) == b"+PONG\r\n"
            return client

        assert proxy.url(redis.url) == f"redis://127.0.0.1:{proxy.port}/0"
        with connect() as client:
            proxy.black_hole("down")
            client.sendall(ping)
            assert silent(client)
            proxy.restore()
            assert read(client, 7) == b"+PONG\r\n"
            proxy.delay(0.1, "down")
            started = time.monotonic()
            client.sendall(ping)
            assert read(client, 7) == b"+PONG\r\n"
            assert time.monotonic() - started > 0.09
            proxy.restore()
            proxy.cut(3, "down", "fin")
            client.sendall(ping)
            assert read(client, 99) == b"+PO"
        proxy.restore()
        with connect() as client:
            proxy.reset()
            assert was_reset(client)
        with connect() as client:
            # Of two commands in one write the first is carried out, and its answer comes.
            proxy.cut_at(b"*2\r\n$3\r\nDEL", "up", "fin")
            size = b"$%d\r\n%b\r\n" % (len(key), key)
            client.sendall(b"*2\r\n$4\r\nINCR\r\n" + size + b"*2\r\n$3\r\nDEL\r\n" + size)
            redis.until("it is counted", lambda: redis.command("GET", key) == b"1")
            proxy.wait_until(lambda: not proxy.open_links())
        assert redis.command("DEL", key) == 1


def test_new_links_can_be_refused_and_ignored(
    env: Environment, proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    ends = connect()
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
    ends.client.sendall(b"x")
    assert read(ends.server, 1) == b"x"
    proxy.accept("silent")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.sendall(b"x")
        assert silent(client)
    proxy.accept("fin")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
        client.settimeout(10)
        assert client.recv(1) == b""
    proxy.accept("forward")
    ends = connect()
    ends.server.sendall(b"x")
    assert read(ends.client, 1) == b"x"


def test_retarget(proxy: FaultProxy) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.settimeout(10)
        proxy.retarget(other.getsockname())
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10):
            other.accept()[0].close()


def test_amqp_methods_are_counted(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    sent = HEADER + b"".join(message(b"a body")) + method("Basic.ack", 1, False)
    sent += b"\x08\x00\x00\x00\x00\x00\x00\xce"
    for index in range(len(sent)):  # whatever the pieces are that arrive
        ends.client.sendall(sent[index : index + 1])
    assert read(ends.server, len(sent)) == sent
    (link,) = proxy.links()
    assert link.up.methods == {"Basic.publish": 1, "Basic.ack": 1, "heartbeat": 1}
    assert link.up.frames == 6
    assert proxy.count("Basic.publish", "up") == 1


def test_drop_takes_a_method_with_its_content(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    ends = connect()
    rule = proxy.drop("Basic.publish", "up", skip=1, count=1)
    messages = [message(b"first"), message(b"second"), message(b"third", channel=2)]
    # The frames of a message on another channel stand between those that are dropped.
    between = [messages[1][0], messages[2][0], *messages[1][1:], *messages[2][1:]]
    ends.client.sendall(HEADER + b"".join(messages[0]) + b"".join(between))
    expected = HEADER + b"".join(messages[0]) + b"".join(messages[2])
    assert read(ends.server, len(expected)) == expected
    assert silent(ends.server)
    assert rule.hits == 1


def test_hold_lets_the_others_pass_and_releases_in_order(
    proxy: FaultProxy, connect: Callable[[], Ends]
) -> None:
    ends = connect()
    rule = proxy.hold(["Queue.declare_ok", "Channel.open_ok"], "down")
    held = method("Channel.open_ok", "") + method("Queue.declare_ok", "q", 0, 0)
    passed = method("Basic.qos_ok")
    ends.server.sendall(held[:3])
    ends.server.sendall(held[3:] + passed)
    assert read(ends.client, len(passed)) == passed
    rule.wait(2)
    assert silent(ends.client)
    assert rule.release() == 2
    assert read(ends.client, len(held)) == held
    ends.server.sendall(held)
    assert read(ends.client, len(held)) == held, "the rule has ended"


def test_stop_at_tears_a_frame(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    rule = proxy.stop_at("Basic.qos_ok", "down", offset=4)
    frames = method("Channel.open_ok", "") + method("Basic.qos_ok") + method("Tx.select_ok")
    ends.server.sendall(frames)
    whole = len(method("Channel.open_ok", ""))
    assert read(ends.client, whole + 4) == frames[: whole + 4]
    assert silent(ends.client)
    assert rule.hits == 1
    proxy.restore("down")
    assert read(ends.client, len(frames) - whole - 4) == frames[whole + 4 :]


def test_end_at_ends_the_link(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    proxy.end_at("Channel.open", "up", "fin")
    ends.client.sendall(HEADER + method("Channel.open", ""))
    assert read(ends.server, 99) == HEADER
    assert ends.client.recv(1) == b""


def test_what_is_not_amqp_passes_as_it_is(proxy: FaultProxy, connect: Callable[[], Ends]) -> None:
    ends = connect()
    proxy.drop("Basic.ack", "up")
    data = bytes(range(256)) * 5
    ends.client.sendall(data)
    assert read(ends.server, len(data)) == data


def test_other_tasks_run_while_an_order_is_carried_out(env: Environment, proxy: FaultProxy) -> None:
    tasks = [env.spawn(proxy.links) for _ in range(20)]
    assert [task.result(10) for task in tasks] == [[]] * 20


def test_an_order_after_the_end_is_an_error(listener: socket.socket) -> None:
    proxy = FaultProxy(listener.getsockname())
    proxy.close()
    proxy.close()
    with pytest.raises(FaultProxyError, match="has ended"):
        proxy.links()


def test_it_ends_with_its_owner(env: Environment, listener: socket.socket) -> None:
    proxy = FaultProxy(listener.getsockname())
    process = proxy._process
    proxy._orders.close()  # what the end of the owning process does
    until(env, lambda: process.poll() is not None)
    proxy._answers.close()
