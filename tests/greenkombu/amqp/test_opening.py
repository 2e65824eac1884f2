"""The handshake against a broker that ends it in every step, or is none at all."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import amqp
import pytest
from amqp import sasl

from greenkombu._amqp import dialogue, errors
from greenkombu._amqp.connection import Connection
from greenkombu._amqp.opening import LONGEST
from greenkombu.deadline import Deadline
from greenkombu.exceptions import ConnectionClosedError
from hub.environment import Environment
from hub.errors import HubClosedError, StreamError, TLSError
from tests.support.tasks import until

from .broker import QUICK, SERVER_PROPERTIES, Closed, Peer, scripted

# -- the handshake


def test_handshake_negotiates_and_says_who_we_are() -> None:
    said: list[Any] = []

    def script(peer: Peer) -> None:
        said.append(peer.start())
        peer.method(0, "Connection.tune", 100, 8192, 60)
        said.append(peer.expect("Connection.tune_ok")[1])
        said.append(peer.expect("Connection.open")[1])
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    with scripted(script) as host:
        connection = Connection(
            host,
            userid="me",
            password="secret",
            virtual_host="/v",
            heartbeat=10,
            client_properties={"connection_name": "test"},
            **QUICK,
        )
        connection.connect()
        assert connection.connected
        assert (connection.channel_max, connection.frame_max) == (100, 8192)
        assert connection.heartbeat == 10
        assert connection.server_properties["product"] == "RabbitMQ"
        assert connection.server_capabilities["basic.nack"] is True
        assert isinstance(connection, amqp.Connection)
        assert "secret" not in repr(connection)
        connection.close()
        assert not connection.connected
    properties, mechanism, response, locale = said[0]
    assert (mechanism, response, locale) == ("PLAIN", "\0me\0secret", "en_US")
    assert properties["connection_name"] == "test"
    assert properties["product"] == "greenkombu"
    for capability in ("consumer_cancel_notify", "connection.blocked", "publisher_confirms"):
        assert properties["capabilities"][capability] is True
    assert said[1] == (100, 8192, 10)
    assert said[2][0] == "/v"


@pytest.mark.parametrize(
    ("login_method", "expected"), [("AMQPLAIN", "AMQPLAIN"), ("PLAIN", "PLAIN"), (None, "PLAIN")]
)
def test_login_method_is_the_one_asked_for(login_method: str | None, expected: str) -> None:
    used: list[str] = []

    def script(peer: Peer) -> None:
        used.append(peer.start()[1])
        peer.tune()
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    with scripted(script) as host, Connection(host, login_method=login_method, **QUICK):
        pass
    assert used == [expected]


def test_mechanism_that_is_not_offered_is_named() -> None:
    def script(peer: Peer) -> None:
        peer.start(mechanisms="PLAIN AMQPLAIN")

    with scripted(script) as host:
        connection = Connection(host, login_method="EXTERNAL", **QUICK)
        with pytest.raises(errors.MechanismError, match=r"PLAIN, AMQPLAIN.*allowed here: EXTERNAL"):
            connection.connect()
        assert not connection.connected


def test_mechanism_of_the_users_own_answers_in_the_connecting_task(env: Environment) -> None:
    answered: list[Any] = []
    said: list[Any] = []

    class Own(sasl.PLAIN):
        def start(self, connection: Any) -> Any:
            env.sleep(0.01)  # a callback of the hub could not
            answered.append(env.current())
            return super().start(connection)

    def script(peer: Peer) -> None:
        said.append(peer.start())
        peer.method(0, "Connection.tune", 100, 8192, 60)
        peer.expect("Connection.tune_ok")
        peer.expect("Connection.open")
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    # A table that is more than text: neither is it kept for the next connection.
    properties = {"site": 7, "capabilities": {"basic.nack": False, "mine": True}}
    with scripted(script) as host:
        connection = Connection(
            host, authentication=[Own("me", "secret")], client_properties=properties, **QUICK
        )
        connection.connect()
        connection.close()
    assert answered == [env.current()]
    assert said[0][0]["site"] == 7
    assert said[0][0]["capabilities"]["basic.nack"] is False
    assert said[0][0]["capabilities"]["mine"] is True
    assert said[0][0]["capabilities"]["connection.blocked"] is True


def test_unknown_login_method_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="unknown login_method 'FOO'"):
        Connection(login_method="FOO")


@pytest.mark.parametrize(
    ("code", "text", "where", "error", "parts"),
    [
        (403, "ACCESS_REFUSED - Login was refused", "login", errors.LoginRefusedError,
         ["user 'me'", "PLAIN", "Check user name and password"]),
        (530, "NOT_ALLOWED - vhost nope not found", "open", errors.VirtualHostError,
         ["virtual host 'nope'", "user 'me'", "permissions"]),
        (402, "INVALID_PATH", "open", amqp.exceptions.InvalidPath, ["virtual host 'nope'"]),
        (320, "CONNECTION_FORCED - shutdown", "open", amqp.exceptions.ConnectionForced,
         ["while opening the virtual host"]),
        (541, "INTERNAL_ERROR", "login", amqp.exceptions.InternalError, ["during the login"]),
    ],
)  # fmt: skip
def test_broker_that_ends_the_handshake_with_close_gives_its_error_and_the_remedy(
    code: int, text: str, where: str, error: type[Exception], parts: list[str]
) -> None:
    def script(peer: Peer) -> None:
        peer.start()
        if where == "open":
            peer.tune()
        peer.method(0, "Connection.close", code, text, 0, 0)

    with scripted(script) as host:
        connection = Connection(host, "me", "secret", virtual_host="nope", **QUICK)
        with pytest.raises(error) as caught:
            connection.connect()
    for part in (text, host, *parts):
        assert part in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.reply_code == code  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("step", "parts"),
    [
        ("accept", ["before the broker said anything", "is this the AMQP port"]),
        ("start", ["during the login"]),
        ("tune", ["while opening the virtual host", "'/'"]),
    ],
)
def test_broker_that_closes_the_socket_in_the_handshake(step: str, parts: list[str]) -> None:
    def script(peer: Peer) -> None:
        if step != "accept":
            peer.start()
        if step == "tune":
            peer.tune()

    with scripted(script) as host:
        connection = Connection(host, **QUICK)
        with pytest.raises(errors.ConnectionLostError) as caught:
            connection.connect()
    for part in (host, *parts):
        assert part in str(caught.value)


def test_old_broker_that_refuses_a_login_by_closing_the_socket() -> None:
    def script(peer: Peer) -> None:
        peer.start(capabilities={})

    with scripted(script) as host, pytest.raises(errors.LoginRefusedError, match="name \\('me'"):
        Connection(host, "me", "x", **QUICK).connect()


@pytest.mark.parametrize("step", ["accept", "start", "tune"])
def test_silent_broker_is_given_up_in_time(step: str) -> None:
    def script(peer: Peer) -> None:
        if step != "accept":
            peer.start()
        if step == "tune":
            peer.tune()
        with contextlib.suppress(AssertionError):
            peer.next_method()  # until the client gives up
        peer.next_method()

    with scripted(script) as host:
        connection = Connection(host, connect_timeout=0.3)
        started = time.monotonic()
        with pytest.raises(errors.RPCTimeoutError, match="kept silent") as caught:
            connection.connect()
        assert time.monotonic() - started < 10
        assert host in str(caught.value)
        assert isinstance(caught.value, TimeoutError)


def test_deadline_of_the_task_bounds_the_connect() -> None:
    def script(peer: Peer) -> None:
        peer.read(8)
        peer.next_method()

    with scripted(script) as host:
        started = time.monotonic()
        with Deadline(0.2), pytest.raises(TimeoutError):
            Connection(host, connect_timeout=30).connect()
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("said", "error", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", errors.ForeignProtocolError, "HTTP"),
        (b"\x15\x03\x01\x00\x02\x02\x46", errors.ForeignProtocolError, "TLS"),
        (b"AMQP\x03\x01\x00\x00", errors.ForeignProtocolError, "AMQP"),
        (b"220 mail.example ESMTP\r\n", errors.BadFrameError, "unknown type"),
        (Peer.encode(0, "Connection.open_ok", ""), errors.UnexpectedFrameError, "before the"),
        (Peer.encode(0, "Connection.start", 0, 8, {}, "PLAIN", "en_US"), errors.HandshakeError,
         "AMQP 0.8"),
    ],
)  # fmt: skip
def test_peer_that_is_no_broker(said: bytes, error: type[Exception], text: str) -> None:
    def script(peer: Peer) -> None:
        peer.read(8)
        peer.send(said)
        peer.next_method()

    with scripted(script) as host, pytest.raises(error, match=text) as caught:
        Connection(host, **QUICK).connect()
    assert host in str(caught.value)


def test_tls_to_a_plain_port() -> None:
    def script(peer: Peer) -> None:
        # What RabbitMQ does: it answers what is no protocol header with its own.
        peer.read(5)
        peer.send(b"AMQP\x00\x00\x09\x01")

    with scripted(script) as host, pytest.raises(TLSError) as caught:
        Connection(host, ssl=True, **QUICK).connect()
    assert host in str(caught.value)
    assert "TLS port" in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_refused_connection_names_the_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StreamError, match=f"127.0.0.1:{port}"):
        Connection(f"127.0.0.1:{port}", **QUICK).connect()


def test_interrupted_connect_leaves_nothing_behind(env: Environment) -> None:
    if not env.green:
        pytest.skip("native threads cannot be interrupted")
    gone: list[bool] = []

    def script(peer: Peer) -> None:
        try:
            peer.start()
            peer.next_method()
        finally:
            gone.append(True)

    with scripted(script) as host:
        connection = Connection(host, **QUICK)
        with pytest.raises(env.timeout_types), env.timeout(0.1):  # type: ignore[arg-type]
            connection.connect()
        until(env, lambda: gone)
        assert not connection.connected


# -- the handshake in one piece, once the same one has succeeded


def _all_at_once(peer: Peer) -> list[str]:
    """Take the client's whole part, which is there although nobody has answered it."""
    assert peer.read(8) == b"AMQP\0\0\x09\x01"
    return [peer.next_method()[1] for _ in range(3)]


def _start(**changes: Any) -> bytes:
    properties = {**SERVER_PROPERTIES, **changes}
    return Peer.encode(0, "Connection.start", 0, 9, properties, "PLAIN AMQPLAIN", "en_US")


def _greeting(version: str = "3.10.0", channel_max: int = 2047) -> bytes:
    """Return the broker's whole part."""
    tune = Peer.encode(0, "Connection.tune", channel_max, 131072, 60)
    return _start(version=version) + tune + Peer.encode(0, "Connection.open_ok", "")


def _connections(*scripts: Callable[[Peer], object]) -> Callable[[Peer], object]:
    """Make a script that is another one for each connection, the last one for all later ones."""
    waiting = list(scripts)

    def script(peer: Peer) -> None:
        (waiting.pop(0) if len(waiting) > 1 else waiting[0])(peer)

    return script


def _usual(peer: Peer) -> None:
    peer.handshake()
    peer.serve()


def test_second_handshake_with_the_same_broker_is_one_round_trip(env: Environment) -> None:
    said: list[list[str]] = []

    def script(peer: Peer) -> None:
        said.append(_all_at_once(peer))
        # In pieces, and with what may follow at once in the last one.
        greeting = _greeting()
        for start in range(0, len(greeting), 100):
            peer.send(greeting[start : start + 100])
            env.sleep(0.001)
        peer.method(0, "Connection.blocked", "disk")
        peer.serve()

    with scripted(_connections(_usual, script)) as host:
        for heartbeat in (10, 10):
            connection = Connection(host, heartbeat=heartbeat, **QUICK)
            connection.connect()
            assert (connection.channel_max, connection.frame_max) == (2047, 131072)
            assert connection.heartbeat == 10
            assert connection.server_properties["version"] == "3.10.0"
            assert connection.client_properties["capabilities"]["basic.nack"] is True
            assert connection.channel().channel_id == 1
            if said:
                until(env, lambda: connection.blocked == "disk")  # noqa: B023
            connection.close()
    assert said == [["Connection.start_ok", "Connection.tune_ok", "Connection.open"]]


@pytest.mark.parametrize(
    "options",
    [
        {"password": "other"},
        {"virtual_host": "/other"},
        {"client_properties": {"connection_name": "other"}},
        {"heartbeat": 3},
        {"quick_handshake": False},
    ],
    ids=lambda options: next(iter(options)),
)
def test_login_that_was_not_accepted_yet_is_never_sent_ahead(options: dict[str, Any]) -> None:
    ahead: list[int] = []

    def stepwise(peer: Peer) -> None:
        peer.start()
        ahead.append(len(peer._buffer))
        peer.tune()
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    known = {"password": "x", "quick_handshake": options.get("quick_handshake", True)}
    with scripted(stepwise) as host:
        for given in (known, {**known, **options}):
            connection = Connection(host, **given, **QUICK)
            connection.connect()
            connection.close()
    assert ahead == [0, 0]


def test_broker_of_another_kind_is_answered_step_by_step() -> None:
    seen: list[int] = []

    def script(peer: Peer) -> None:
        peer.start(product="Other")
        seen.append(len(peer._buffer))
        peer.tune()
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    with scripted(script) as host:
        for _ in range(2):
            connection = Connection(host, **QUICK)
            connection.connect()
            connection.close()
    assert seen == [0, 0]


def test_broker_that_has_changed_is_asked_again_step_by_step() -> None:
    said: list[list[str]] = []

    def changed(peer: Peer) -> None:
        said.append(_all_at_once(peer))
        peer.send(_greeting(version="4.10.0"))
        with contextlib.suppress(Closed):
            peer.next_method()

    def anew(peer: Peer) -> None:
        peer.start(version="4.10.0")
        peer.tune(channel_max=7)
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    def known(peer: Peer) -> None:
        said.append(_all_at_once(peer))
        peer.send(_greeting(version="4.10.0", channel_max=7))
        peer.serve()

    with scripted(_connections(_usual, changed, anew, known)) as host:
        Connection(host, **QUICK).connect()
        for _ in range(2):
            connection = Connection(host, **QUICK)
            connection.connect()
            assert connection.server_properties["version"] == "4.10.0"
            assert connection.channel_max == 7
            connection.close()
    assert len(said) == 2


def test_broker_that_changes_now_and_then_goes_on_to_be_spoken_to_ahead() -> None:
    ahead: list[str] = []

    def new_version(version: str) -> list[Callable[[Peer], object]]:
        def changed(peer: Peer) -> None:
            _all_at_once(peer)
            peer.send(_greeting(version=version))
            with contextlib.suppress(Closed):
                peer.next_method()

        def anew(peer: Peer) -> None:
            peer.start(version=version)
            peer.tune()
            peer.method(0, "Connection.open_ok", "")
            peer.serve()

        def known(peer: Peer) -> None:
            _all_at_once(peer)
            ahead.append(version)
            peer.send(_greeting(version=version))
            peer.serve()

        return [changed, anew, known]

    versions = [f"4.{number}.0" for number in range(dialogue.FAILURES + 1)]
    scripts = [script for version in versions for script in new_version(version)]
    with scripted(_connections(_usual, *scripts)) as host:
        for _ in range(1 + 2 * len(versions)):
            connection = Connection(host, **QUICK)
            connection.connect()
            connection.close()
    assert ahead == versions


@pytest.mark.parametrize("hangs_up", [True, False])
def test_login_that_is_refused_since_gets_the_error_of_the_step(hangs_up: bool) -> None:
    def refuse(peer: Peer, *, at_once: bool) -> None:
        if at_once:
            _all_at_once(peer)
            peer.send(_start())
        else:
            peer.start()
        peer.method(0, "Connection.close", 403, "ACCESS_REFUSED", 0, 0)
        if not hangs_up:
            with contextlib.suppress(Closed):
                peer.next_method()

    def ahead(peer: Peer) -> None:
        refuse(peer, at_once=True)

    def stepwise(peer: Peer) -> None:
        refuse(peer, at_once=False)

    with scripted(_connections(_usual, ahead, stepwise)) as host:
        Connection(host, "me", "secret", **QUICK).connect()
        for _ in range(2):
            with pytest.raises(errors.LoginRefusedError, match="user 'me' by PLAIN") as caught:
                Connection(host, "me", "secret", **QUICK).connect()
            assert "secret" not in str(caught.value)


def test_broker_that_drops_what_comes_ahead_is_found_out_once() -> None:
    def deaf(peer: Peer) -> None:
        _all_at_once(peer)
        peer.send(_start())
        with contextlib.suppress(Closed):
            peer.next_method()

    with scripted(_connections(_usual, deaf, _usual)) as host:
        options = {**QUICK, "connect_timeout": 0.5}
        Connection(host, **QUICK).connect()
        with pytest.raises(errors.RPCTimeoutError, match="kept silent during the login"):
            Connection(host, **options).connect()
        for _ in range(2):
            connection = Connection(host, **QUICK)
            connection.connect()
            connection.close()


def test_connection_that_is_aborted_in_a_known_handshake_raises_why(env: Environment) -> None:
    def silent(peer: Peer) -> None:
        _all_at_once(peer)
        with contextlib.suppress(Closed):
            peer.next_method()

    with scripted(_connections(_usual, silent)) as host:
        Connection(host, **QUICK).connect()
        connection = Connection(host, **QUICK)
        task = env.spawn(connection.connect)
        until(env, lambda: connection.stream is not None)
        connection.abort(errors.ProtocolError("enough"))
        with pytest.raises(errors.ProtocolError, match="enough"):
            task.result(5)


def test_fork_in_a_known_handshake_ends_the_connection(env: Environment) -> None:
    """The child must not go on with what the parent has begun."""
    asked: list[int] = []

    def silent(peer: Peer) -> None:
        _all_at_once(peer)
        with contextlib.suppress(Closed):
            peer.next_method()

    def again(peer: Peer) -> None:
        asked.append(1)
        _usual(peer)

    with scripted(_connections(_usual, silent, again)) as host:
        Connection(host, **QUICK).connect()
        connection = Connection(host, **QUICK)
        task = env.spawn(connection.connect)
        until(env, lambda: connection.stream is not None)
        stream = connection.stream
        assert stream is not None
        # What the hook of a fork does with each stream in the child.
        stream.hub.call_soon_threadsafe(stream.hub_gone, HubClosedError("forked"), True)
        with pytest.raises(ConnectionClosedError, match="belongs to the parent process"):
            task.result(5)
    assert asked == []


def test_handshake_of_any_length_is_heard_but_not_kept() -> None:
    def wordy(peer: Peer) -> None:
        peer.start(information="x" * LONGEST)
        peer.tune()
        peer.method(0, "Connection.open_ok", "")
        peer.serve()

    with scripted(wordy) as host:
        connection = Connection(host, **QUICK)
        opening = connection._opening
        assert opening is not None
        connection.connect()
        assert connection.channel().channel_id == 1
        assert dialogue.known(opening._key) is None
        connection.close()


def test_no_password_is_shown_by_what_a_handshake_is_kept_under() -> None:
    connection = Connection("localhost", "me", "secret", **QUICK)
    opening = connection._opening
    assert opening is not None
    assert "me" in repr(opening._key)
    assert "secret" not in repr(opening._key)
