"""One connection to a real Redis server, used by many."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

import hub
from greenkombu.deadline import Deadline
from greenkombu.transport.redis._errors import (
    CommandError,
    CommandTimeoutError,
    ConnectionForkedError,
    ConnectionLostError,
    ConnectTimeoutError,
    ReplyError,
    ServerError,
    WrongTypeError,
)
from greenkombu.transport.redis._options import Settings
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._wire import Wire
from greenkombu.utils._private_server import TLSFiles
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from hub.errors import BlockingCallError
from tests.greenkombu.redis.support import Wires
from tests.support.tasks import LONG, in_child, run_natively, until

MakeRedis = Callable[..., PrivateRedis]


@pytest.fixture
def key() -> str:
    """A name that no other test uses."""
    return f"wire-{os.urandom(6).hex()}"


# -- commands and replies


def test_a_command_and_its_reply(redis: PrivateRedis, wires: Wires, key: str) -> None:
    wire = wires(redis)
    assert wire.protocol == 3
    assert wire.server["role"] == "master"
    assert wire.server["version"]
    assert wire.call("SET", key, "é") == b"OK"
    assert wire.call(b"GET", key) == "é".encode()
    assert wire.call("DEL", key) == 1
    assert wire.error is None
    assert not wire.closed


def test_several_commands_go_out_in_one_write(redis: PrivateRedis, wires: Wires, key: str) -> None:
    wire = wires(redis)
    assert wire.stream is not None
    before = wire.stream.send_calls
    replies = wire.call_many([("SET", key, n) for n in range(50)] + [("GETDEL", key)])
    assert replies == [b"OK"] * 50 + [b"49"]
    assert wire.stream.send_calls == before + 1
    assert wire.call_many([]) == []


def test_a_refusal_is_typed_and_harms_nobody(redis: PrivateRedis, wires: Wires, key: str) -> None:
    wire = wires(redis)
    commands: list[tuple[Any, ...]] = [("SET", key, 1), ("LPUSH", key, 2), ("GET", key)]
    with pytest.raises(WrongTypeError, match=f"{wire.peer}.*LPUSH"):
        wire.call_many(commands)
    with pytest.raises(WrongTypeError):
        wire.call("LPUSH", key, 2)
    first, second, third = wire.call_many(commands, raises=False)
    assert (first, third) == (b"OK", b"1")
    assert isinstance(second, ReplyError)
    assert wire.call("DEL", key) == 1


def test_a_transaction_has_a_reply_for_each_of_its_commands(
    redis: PrivateRedis, wires: Wires, key: str
) -> None:
    commands: list[tuple[Any, ...]] = [
        ("MULTI",),
        ("RPUSH", key, "a"),
        ("LRANGE", key, 0, -1),
        ("DEL", key),
        ("EXEC",),
    ]
    replies = wires(redis).call_many(commands)
    assert replies == [b"OK", b"QUEUED", b"QUEUED", b"QUEUED", [1, [b"a"], 1]]


def test_a_thousand_tasks_get_their_own_replies_in_few_writes(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    wire = wires(redis)
    assert wire.stream is not None
    before = wire.stream.send_calls
    number = 1000 if env.name != "default" else 60

    def work(mine: int) -> bool:
        return all(wire.call("ECHO", f"{mine}-{n}") == f"{mine}-{n}".encode() for n in range(3))

    tasks = [env.spawn(work, mine) for mine in range(number)]
    assert all(task.result(LONG) for task in tasks)
    if env.name != "default":
        # A few turns of the loop, each with a few writes.
        assert wire.stream.send_calls - before < number


def test_native_threads_may_send_beside_the_tasks(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    wire = wires(redis)
    threads, each = 8, 200
    got: dict[int, list[Any]] = {thread: [] for thread in range(threads + 1)}
    start = env.original("_thread", "start_new_thread")

    def work(thread: int) -> None:
        for n in range(each):
            text = b"%d-%d" % (thread, n)
            wire.send(
                pack("ECHO", text),
                1,
                lambda reply, text=text, mine=got[thread]: mine.append(reply == [text]),
            )

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in range(threads):
            start(work, (thread,))
        work(threads)
        until(env, lambda: all(len(replies) == each for replies in got.values()))
    finally:
        sys.setswitchinterval(interval)
    assert all(all(replies) for replies in got.values())


def test_a_word_that_cannot_be_sent_leaves_the_wire_as_it_was(
    redis: PrivateRedis, wires: Wires
) -> None:
    wire = wires(redis)
    with pytest.raises(ValueError, match="NoneType"):
        wire.call("ECHO", None)
    assert wire.call("ECHO", "x") == b"x"


def test_a_call_in_a_hub_callback_is_refused_before_it_is_sent(
    redis: PrivateRedis, wires: Wires, env: Environment, key: str
) -> None:
    wire = wires(redis)
    refused: list[BaseException] = []
    done = env.waiter()

    def callback() -> None:
        try:
            wire.call("SET", key, 1)
        except BlockingCallError as error:
            refused.append(error)
        done.wake()

    hub.get_hub().call_soon_threadsafe(callback)
    assert done.wait(LONG)
    assert refused
    assert wire.call("EXISTS", key) == 0


# -- giving up


def test_a_late_reply_is_not_taken_for_the_next_one(
    make_private_redis: MakeRedis, wires: Wires
) -> None:
    server = make_private_redis()
    wire = wires(server)
    server.freeze()
    try:
        with Deadline(0.2), pytest.raises(CommandTimeoutError, match="ECHO") as caught:
            wire.call("ECHO", "first")
        assert "first" not in str(caught.value)
    finally:
        server.thaw()
    assert wire.call("ECHO", "second") == b"second"
    assert not wires.lost


def test_a_killed_caller_leaves_the_replies_of_others_alone(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    if env.name == "default":
        pytest.skip("threads cannot be killed")
    wire = wires(redis)
    for n in range(20):
        victim = env.spawn(wire.call, "ECHO", f"victim-{n}")
        other = env.spawn(wire.call, "ECHO", f"other-{n}")
        if n % 2:
            env.sleep(0)  # it has sent
        victim.kill()
        assert other.result(LONG) == b"other-%d" % n
    assert wire.call("PING") == b"PONG"


def test_a_frozen_server_ends_the_wire_after_the_bound(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    wire = wires(server, socket_timeout=0.5)
    answers: list[Any] = []
    server.freeze()
    try:
        wire.send(pack("PING"), 1, answers.append)
        with pytest.raises((CommandTimeoutError, ConnectionLostError)):
            wire.call("PING")
        until(env, lambda: wires.lost)
    finally:
        server.thaw()
    [lost] = wires.lost
    assert isinstance(lost, ConnectionLostError)
    assert "answered nothing" in str(lost)
    [answer] = answers
    assert isinstance(answer, ConnectionLostError)
    with pytest.raises(ConnectionLostError):
        wire.call("PING")
    with pytest.raises(ConnectionLostError):
        wire.send(pack("PING"), 1, answers.append)
    assert len(answers) == 1


def test_a_frozen_server_is_noticed_where_nobody_waits(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    answers: list[Any] = []
    wire = wires(server, socket_timeout=0.4, health_check_interval=0)
    server.freeze()
    try:
        wire.send(pack("PING"), 1, answers.append)
        until(env, lambda: answers)
    finally:
        server.thaw()
    assert isinstance(answers[0], ConnectionLostError)
    assert wire.closed


def test_an_idle_wire_asks_for_a_sign_of_life(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    wire = wires(server, health_check_interval=0.1)
    assert wire.stream is not None
    before = wire.stream.received_bytes
    until(env, lambda: wire.stream is not None and wire.stream.received_bytes > before + 7)
    assert not wires.lost

    impatient = wires(server, health_check_interval=0.1, socket_timeout=0.3)
    server.freeze()
    try:
        until(env, lambda: impatient.closed)
    finally:
        server.thaw()


def test_a_server_that_takes_nothing_holds_up_writers_within_their_bound(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    wire = wires(server)
    assert wire.stream is not None
    stream = wire.stream
    data = pack("ECHO", b"x" * 200_000)
    answers: list[Any] = []
    wire.room(0.1)
    server.freeze()
    try:
        until(env, lambda: wire.send(data, 1, answers.append) or stream.above_high_water)
        with pytest.raises(CommandTimeoutError, match="taken no data"):
            wire.room(0.1)
        with pytest.raises(CommandTimeoutError, match="taken no data"):
            wire.call("PING", timeout=0.1)
    finally:
        server.thaw()
    wire.room(LONG)
    assert wire.call("ECHO", "x", timeout=LONG) == b"x"
    assert all(len(answer[0]) == 200_000 for answer in answers)


# -- subscriptions


def test_subscribing_beside_commands(
    redis: PrivateRedis, wires: Wires, env: Environment, key: str
) -> None:
    wire = wires(redis)
    refused: list[Any] = []
    wire.send(pack("SUBSCRIBE", key) + pack("PSUBSCRIBE", f"{key}.*"), 0, refused.append)
    assert wire.call("PUBLISH", key, "hello") == 1
    until(env, lambda: len(wires.pushes) == 3)
    assert refused == [[]]
    assert wires.pushes == [
        [b"subscribe", key.encode(), 1],
        [b"psubscribe", f"{key}.*".encode(), 2],
        [b"message", key.encode(), b"hello"],
    ]
    wire.send(pack("UNSUBSCRIBE"), 0, refused.append)
    assert wire.call("PUBLISH", key, "nobody") == 0
    assert refused == [[], []]


def test_subscribing_with_the_old_protocol(
    redis: PrivateRedis, wires: Wires, env: Environment, key: str
) -> None:
    wire = wires(redis, protocol=2, pubsub=True, client_name="old")
    assert (wire.protocol, wire.server["role"]) == (2, "master")
    refused: list[Any] = []
    wire.send(pack("SUBSCRIBE", key), 0, refused.append)
    until(env, lambda: refused)
    assert refused == [[]]
    assert redis.command("PUBLISH", key, "hello") == 1
    until(env, lambda: len(wires.pushes) == 2)
    assert wires.pushes[1] == [b"message", key.encode(), b"hello"]
    assert wire.call("PING") == [b"pong", b""]


@pytest.mark.parametrize("may_ping", [True, False], ids=["may-ping", "may-not-ping"])
def test_a_refused_subscription_is_told_to_who_asked(
    make_private_redis: MakeRedis, wires: Wires, may_ping: bool
) -> None:
    server = make_private_redis()
    rights = ["+@all"] if may_ping else ["+@all", "-ping"]
    server.command("ACL", "SETUSER", "u", "on", ">secret", "~*", "resetchannels", *rights)
    settings = Settings(("127.0.0.1", server.port), username="u", password="secret")
    wire = wires(settings)
    refused: list[Any] = []
    wire.send(pack("SUBSCRIBE", "a") + pack("SUBSCRIBE", "b"), 0, refused.append)
    assert wire.call("ECHO", "x") == b"x"
    [[first, second]] = refused
    assert first.code == second.code == "NOPERM"


def test_invalidations_come_between_replies(
    redis: PrivateRedis, wires: Wires, env: Environment, key: str
) -> None:
    wire = wires(redis)
    wire.call("CLIENT", "TRACKING", "ON")
    wire.call("EXISTS", key)
    redis.command("LPUSH", key, "x")
    until(env, lambda: wires.pushes)
    assert wires.pushes == [[b"invalidate", [key.encode()]]]
    redis.command("DEL", key)


# -- the end


def test_close_lets_the_server_take_what_was_sent(
    redis: PrivateRedis, wires: Wires, key: str
) -> None:
    wire = wires(redis)
    replies: list[Any] = []
    for _ in range(5000):
        wire.send(pack("INCR", key), 1, replies.append)
    wire.close(LONG)
    assert wire.closed
    assert len(replies) == 5000
    assert redis.command("GETDEL", key) == b"5000"
    wire.close()
    with pytest.raises(ConnectionLostError, match="was closed"):
        wire.call("PING")


def test_close_is_bounded(make_private_redis: MakeRedis, wires: Wires, env: Environment) -> None:
    server = make_private_redis()
    wire = wires(server)
    server.freeze()
    try:
        wire.send(pack("PING"), 1, lambda reply: None)
        wire.close(0.1)
    finally:
        server.thaw()
    assert wire.closed
    until(env, lambda: wires.lost)


def test_abort_tells_everybody_once(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    wire = wires(server)
    answers: list[Any] = []
    server.freeze()
    try:
        waiting = env.spawn(wire.call, "PING")
        wire.send(pack("PING"), 1, answers.append)
        wire.send(pack("PING") + pack("PING"), 2, answers.append)
        env.sleep(0.01)
        wire.abort(ConnectionLostError("enough"))
        wire.abort(ConnectionLostError("again"))
        until(env, lambda: wires.lost and len(answers) == 2)
        with pytest.raises(ConnectionLostError, match="enough"):
            waiting.result(LONG)
    finally:
        server.thaw()
    assert [str(error) for error in (*answers, *wires.lost)] == ["enough"] * 3


def test_an_end_in_the_middle_of_a_read_tells_everybody_once(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    wire = wires(redis)
    answers: list[Any] = []

    def end(reply: Any) -> None:
        answers.append(reply)
        wire.abort(ConnectionLostError("enough"))

    data = pack("ECHO", "a")

    def send() -> None:
        wire.send(data + data, 2, answers.append)
        wire.send(data, 1, end)
        for _ in range(10):
            wire.send(data, 1, answers.append)
        wire.send(data + data, 2, answers.append)

    hub.get_hub().call_soon_threadsafe(send)  # nothing is read while it runs
    until(env, lambda: wires.lost and len(answers) == 13)
    assert answers[:2] == [[b"a", b"a"], [b"a"]]
    assert {str(error) for error in answers[2:]} == {"enough"}


def test_a_wire_that_was_dropped_is_collected(
    make_private_redis: MakeRedis, env: Environment
) -> None:
    server = make_private_redis()
    wire = Wire.connect(
        Settings(("127.0.0.1", server.port)), on_push=print, on_lost=print, timeout=LONG
    )
    assert wire.call("PING") == b"PONG"
    reference = weakref.ref(wire)
    gc.disable()  # nothing of ours refers to it, not even in a circle
    try:
        del wire
        until(env, lambda: reference() is None)
    finally:
        gc.enable()
    until(env, lambda: not server.clients())


def test_a_server_that_goes_ends_the_wire(
    make_private_redis: MakeRedis, wires: Wires, env: Environment
) -> None:
    server = make_private_redis()
    first, second = wires(server), wires(server)
    server.command("CLIENT", "KILL", "TYPE", "normal")
    until(env, lambda: first.closed and second.closed)
    until(env, lambda: len(wires.lost) == 2)
    third = wires(server)
    server.kill()
    until(env, lambda: third.closed)
    assert third.peer in str(third.error)


def test_a_forked_child_leaves_the_wire_to_its_parent(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    wire = wires(redis)
    assert wire.call("PING") == b"PONG"

    def child() -> None:
        with pytest.raises(ConnectionForkedError, match="parent process"):
            wire.call("PING")
        with pytest.raises(ConnectionForkedError):
            wire.send(pack("PING"), 1, print)
        wire.close(0.1)
        wire.abort()
        own = Wire.connect(
            Settings(("127.0.0.1", redis.port)), on_push=print, on_lost=print, timeout=LONG
        )
        assert own.call("ECHO", "child") == b"child"
        own.close()

    in_child(child)
    assert wire.call("ECHO", "parent") == b"parent"
    assert not wires.lost


def test_a_wire_is_used_from_another_native_thread(
    redis: PrivateRedis, wires: Wires, env: Environment
) -> None:
    wire = wires(redis)
    replies: list[Any] = []
    run_natively(env, lambda: wire.send(pack("ECHO", "x"), 1, replies.append))
    until(env, lambda: replies)
    assert replies == [[b"x"]]
    run_natively(env, wire.abort)
    until(env, lambda: wires.lost)


def test_the_representation_tells_the_state_and_no_password(
    make_private_redis: MakeRedis, wires: Wires
) -> None:
    wire = wires(make_private_redis(password="secret"))
    assert "open" in repr(wire)
    wire.abort()
    assert "dead" in repr(wire)
    assert "secret" not in repr(wire) + repr(wire.settings)


# -- other ways to the server


def test_a_unix_socket(make_private_redis: MakeRedis, wires: Wires) -> None:
    server = make_private_redis(unix_socket=True)
    wire = wires(Settings(str(server.socket_path)))
    assert wire.peer == str(server.socket_path)
    assert wire.call("PING") == b"PONG"


def test_tls_verifies_the_server(
    make_private_redis: MakeRedis, wires: Wires, tmp_path: Path
) -> None:
    authority, other = trustme.CA(), trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    files = {}
    for name, blob in (
        ("authority", authority.cert_pem),
        ("other", other.cert_pem),
        ("certificate", certificate.cert_chain_pems[0]),
        ("key", certificate.private_key_pem),
    ):
        files[name] = tmp_path / f"{name}.pem"
        blob.write_to_path(str(files[name]))
    server = make_private_redis(
        tls=TLSFiles(files["authority"], files["certificate"], files["key"])
    )
    address = ("127.0.0.1", server.tls_port)
    wire = wires(Settings(address, ssl={"ca_certs": str(files["authority"])}))
    assert wire.call("ECHO", b"x" * 100_000) == b"x" * 100_000
    with pytest.raises(ConnectionLostError, match="certificate"):
        wires(Settings(address, ssl={"ca_certs": str(files["other"])}))
    plain = ("127.0.0.1", server.port)
    with pytest.raises(ConnectTimeoutError, match="TLS"):  # Redis waits for the end of a line
        wires(Settings(plain, ssl={"ca_certs": str(files["authority"])}), timeout=0.5)
    with pytest.raises(ServerError, match="rediss://"):
        wires(Settings(address))


def test_a_command_error_is_not_an_error_of_the_connection() -> None:
    from greenkombu.transport.redis._errors import CONNECTION_ERRORS

    assert not issubclass(CommandError, CONNECTION_ERRORS)
