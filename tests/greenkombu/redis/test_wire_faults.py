"""What a wire does with peers that are no Redis, or a bad one, and with interruptions."""

from __future__ import annotations

import random
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu.transport.redis import _calls, _pipeline, _wire
from greenkombu.transport.redis._errors import (
    BusyLoadingError,
    ConnectionLostError,
    ConnectTimeoutError,
    LoginRefusedError,
    NoSuchDatabaseError,
    ProtocolError,
    ServerError,
)
from greenkombu.transport.redis._options import Settings
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._wire import Wire
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from tests.greenkombu.redis.support import GREETING, Wires, scripted, settings_for
from tests.support.fault_proxy import FaultProxy
from tests.support.injection import Injected, Injection
from tests.support.tasks import LONG, until

MakeRedis = Callable[..., PrivateRedis]


@pytest.fixture
def proxy(redis: PrivateRedis) -> Iterator[FaultProxy]:
    with FaultProxy(("127.0.0.1", redis.port)) as made:
        yield made


def through(proxy: FaultProxy) -> str:
    return f"127.0.0.1:{proxy.port}"


# -- peers that are no Redis, or do not let us in

FOREIGN = [
    (b"\x15\x03\x01\x00\x02\x02\x46", "TLS"),
    (b"AMQP\x00\x00\x09\x01", "AMQP"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "HTTP"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH"),
    (random.Random(1).randbytes(1000), "protocol"),
]


@pytest.mark.parametrize(("data", "word"), FOREIGN, ids=[word for _, word in FOREIGN])
def test_another_protocol_is_named(wires: Wires, data: bytes, word: str) -> None:
    def script(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(data)
        sock.recv(1000)

    with scripted(script) as address, pytest.raises(ProtocolError, match=word) as caught:
        wires(address)
    assert address in str(caught.value)
    assert not wires.lost


def test_a_peer_that_speaks_first(wires: Wires) -> None:
    def script(sock: socket.socket) -> None:
        sock.sendall(b"-ERR max number of clients reached\r\n")
        sock.recv(1000)

    with scripted(script) as address, pytest.raises(ServerError, match="maxclients"):
        wires(address)


def test_a_peer_that_hangs_up(wires: Wires) -> None:
    with (
        scripted(lambda sock: sock.recv(1000)) as address,
        pytest.raises(ConnectionLostError, match="closed the connection"),
    ):
        wires(address)


def test_a_silent_peer(wires: Wires) -> None:
    def script(sock: socket.socket) -> None:
        while sock.recv(1000):
            pass

    with scripted(script) as address, pytest.raises(ConnectTimeoutError, match="port of Redis"):
        wires(address, timeout=0.3)
    assert not wires.lost


def test_nobody_listens(wires: Wires) -> None:
    with pytest.raises(ConnectionLostError, match="running there"):
        wires("127.0.0.1:1")


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", BusyLoadingError),
        (b"-MASTERDOWN Link with MASTER is down\r\n", ServerError),
        (b"-DENIED Redis is running in protected mode\r\n", LoginRefusedError),
    ],
)
def test_a_server_that_is_not_ready(wires: Wires, said: bytes, kind: type[Exception]) -> None:
    def script(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GREETING.replace(b"+PONG\r\n", said))
        sock.recv(1000)

    with scripted(script) as address, pytest.raises(kind):
        wires(address)


@pytest.mark.parametrize("protocol", [3, 2])
def test_a_wrong_password_or_none(
    make_private_redis: MakeRedis, wires: Wires, protocol: int
) -> None:
    server = make_private_redis(password="right")
    for password in ("wrong", None):
        settings = Settings(("127.0.0.1", server.port), password=password, protocol=protocol)
        with pytest.raises(LoginRefusedError) as caught:
            wires(settings)
        assert "wrong" not in str(caught.value).replace("WRONGPASS", "")
        assert str(server.port) in str(caught.value)
    assert wires(settings_for(server, protocol=protocol)).call("PING") == b"PONG"
    assert not wires.lost


@pytest.mark.parametrize("protocol", [3, 2])
def test_a_database_that_is_not_there(redis: PrivateRedis, wires: Wires, protocol: int) -> None:
    with pytest.raises(NoSuchDatabaseError, match="databases"):
        wires(redis, db=1000, protocol=protocol)


def test_a_server_that_does_not_know_hello(make_private_redis: MakeRedis, wires: Wires) -> None:
    server = make_private_redis(password="secret", settings={"rename-command": 'HELLO ""'})
    wire = wires(server, db=3, client_name="old")
    assert wire.protocol == 2
    assert wire.server["version"]
    assert wire.call("CLIENT", "GETNAME") == b"old"
    with pytest.raises(LoginRefusedError) as caught:
        wires(Settings(("127.0.0.1", server.port), password="guess"))
    assert "guess" not in str(caught.value)


# -- peers that break the protocol later

LATER = [
    (b"+OK\r\nnonsense\r\n", "protocol of Redis"),
    (b"$100000000000\r\n", "closed the connection|protocol|larger"),
    (b"*3000000000\r\n", "elements"),
    (b"+OK\r\n+OK\r\n+more\r\n", "nobody had asked"),
    (b"$5\r\nab", "closed the connection"),
    (b"*2\r\n:1\r\n", "closed the connection"),
    (b"$5000\r\n" + b"x" * 5000, "max_reply_bytes"),
]


@pytest.mark.parametrize(("data", "text"), LATER, ids=[repr(data)[:20] for data, _ in LATER])
def test_a_server_that_breaks_the_protocol_ends_its_wire(
    wires: Wires, env: Environment, data: bytes, text: str
) -> None:
    def script(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GREETING)
        sock.recv(1000)
        sock.sendall(data)

    with scripted(script) as address:
        wire = wires(address, max_reply_bytes=2000)
        answers: list[Any] = []
        wire.send(pack("GET", "a") + pack("GET", "b"), 2, answers.append)
        until(env, lambda: answers and wires.lost)
        [error] = wires.lost
        assert isinstance(error, ServerError)
        with pytest.raises(ServerError):
            wire.call("PING")
    assert len(answers) == 1
    assert isinstance(wire.error, ServerError)
    assert re.search(text, str(wire.error)), wire.error


def test_random_bytes_end_a_wire_and_nothing_else(wires: Wires, env: Environment) -> None:
    chance = random.Random(2)

    def script(sock: socket.socket) -> None:
        sock.recv(1000)
        sock.sendall(GREETING)
        for _ in range(50):
            sock.sendall(chance.randbytes(chance.randrange(1, 400)))

    with scripted(script) as address:
        refused = 0
        for _ in range(10):
            try:
                wires(address)
            except ServerError:  # they came with the greeting
                refused += 1
        until(env, lambda: len(wires.lost) == 10 - refused)
    assert all(isinstance(error, ServerError) for error in wires.lost)


@pytest.mark.parametrize("how", ["reset", "finish"])
def test_a_connection_that_breaks(
    proxy: FaultProxy, wires: Wires, env: Environment, how: str
) -> None:
    wire = wires(through(proxy))
    proxy.black_hole("down")
    answers: list[Any] = []
    wire.send(pack("PING"), 1, answers.append)
    waiting = env.spawn(wire.call, "PING")
    env.sleep(0.01)
    getattr(proxy, how)()
    with pytest.raises(ConnectionLostError, match=wire.peer):
        waiting.result(LONG)
    until(env, lambda: answers and wires.lost)
    assert isinstance(answers[0], ConnectionLostError)
    assert len(answers) == len(wires.lost) == 1


@pytest.mark.parametrize("after", [0, 1, 7, 40, 200])
def test_a_login_that_is_cut_off(proxy: FaultProxy, wires: Wires, after: int) -> None:
    proxy.cut(after, "down")
    try:
        with pytest.raises(ServerError):
            wires(through(proxy)).call_many([("ECHO", b"x" * 100)] * 3)
    finally:
        proxy.restore()
    assert wires(through(proxy)).call("PING") == b"PONG"


def test_a_black_hole_is_found_without_anybody_waiting(
    proxy: FaultProxy, wires: Wires, env: Environment
) -> None:
    wire = wires(through(proxy), socket_timeout=0.3, health_check_interval=0.2)
    proxy.black_hole()
    until(env, lambda: wires.lost)
    assert wire.closed


def test_slow_replies_are_no_silence(proxy: FaultProxy, wires: Wires) -> None:
    wire = wires(through(proxy), socket_timeout=LONG)
    proxy.bandwidth(400_000, "down")
    assert wire.call("ECHO", b"x" * 100_000) == b"x" * 100_000
    assert not wire.closed


# -- interruptions


def test_an_exception_at_any_step_of_sending_gives_nobody_a_wrong_reply(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    modules = [_wire, _calls, _pipeline]
    wire = wires(server)
    broken = 0
    # The tasks of hub and environment are not traced, so what is interrupted is the caller's.
    for at in range(1, 400):
        if wire.closed:
            broken += 1
            wire = wires(server)
        with Injection(modules, at, step="signal") as injection:
            try:
                wire.call("ECHO", f"first-{at}")
            except (Injected, ServerError):
                pass
        if not injection.fired:
            break
        try:
            assert wire.call("ECHO", f"second-{at}") == b"second-%d" % at, injection.where
        except ServerError:
            assert wire.closed, injection.where
    else:
        pytest.fail("the call has too many steps")
    assert broken < at / 2


def test_an_interrupted_connect_leaves_nothing(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    from greenkombu.transport.redis import _login

    for at in range(1, 400, 3):
        made = []
        with Injection([_wire, _login, _calls], at, step="signal") as injection:
            try:
                made.append(wires(server))
            except (Injected, ServerError):
                pass
        for wire in made:
            wire.close(LONG)
        if not injection.fired:
            break
    until(env, lambda: not server.clients())


@pytest.mark.parametrize("lag", [0.0, 0.002], ids=["at-once", "later"])
def test_a_kill_or_timeout_at_each_wait(
    redis: PrivateRedis, wires: Wires, env: Environment, lag: float
) -> None:
    if env.name == "default":
        pytest.skip("threads cannot be killed")
    from tests.scenarios.strikes import Strike, kinds

    def whole() -> bytes:
        wire = Wire.connect(
            settings_for(redis),
            on_push=wires.pushes.append,
            on_lost=wires.lost.append,
            timeout=LONG,
        )
        try:
            wire.call("ECHO", "x")
            found: bytes = wire.call("ECHO", "y")
            return found
        finally:
            wire.abort()

    for kind in kinds(env):
        for at in range(1, 20):
            strike = Strike(env, whole, at, kind, lag).run(LONG)
            if not strike.struck:
                assert strike.outcome == b"y"
                break
            assert strike.outcome == b"y" or isinstance(strike.outcome, kind), strike.outcome
        else:
            pytest.fail("too many waits")
