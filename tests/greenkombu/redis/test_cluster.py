"""What a cluster needs besides a server: slots, names, redirections."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenkombu import Connection, Producer
from greenkombu.exceptions import ArgumentError
from greenkombu.transport import get_transport_cls
from greenkombu.transport.redis import _nodes
from greenkombu.transport.redis._errors import ClusterDownError, CommandError
from greenkombu.transport.redis._keys import Keys
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._slots import SlotMap, key_of, parse_address, slot_of, with_asking
from greenkombu.transport.redis.cluster import ClusterSSLTransport, ClusterTransport
from tests.greenkombu.redis.support import GREETING, scripted
from tests.support.tasks import LONG

if TYPE_CHECKING:
    from greenkombu.utils.private_redis import PrivateRedis

ONE, TWO = ("10.0.0.1", 7001), ("10.0.0.2", 7002)


# -- slots


def test_the_slot_of_a_key_is_that_of_its_part_in_braces() -> None:
    # CLUSTER KEYSLOT says so.
    assert slot_of("foo") == slot_of(b"{foo}.bar") == slot_of("a{foo}{b}") == 12182
    assert slot_of("{}foo") != slot_of("foo")


def test_a_map_knows_the_owner_of_each_slot_and_gaps() -> None:
    found = SlotMap.parse(
        [
            [8192, 16383, [b"", 7002, b"id", []], [b"10.0.0.3", 7003, b"id", []]],
            [100, 8000, [b"10.0.0.1", 7001, b"id", []]],
        ],
        "10.0.0.2",
    )
    owners = [found.owner(slot) for slot in (0, 99, 100, 8000, 8001, 8191, 8192, 16383)]
    assert owners == [None, None, ONE, ONE, None, None, TWO, TWO]
    assert found.addresses == [ONE, TWO, ("10.0.0.3", 7003)]
    found.move(99, TWO)
    assert [found.owner(slot) for slot in (98, 99, 100)] == [None, TWO, ONE]
    assert SlotMap().owner(5) is None


def test_an_address_without_a_host_is_on_the_server_that_was_asked() -> None:
    assert parse_address("10.0.0.1:7001", "x") == ONE
    assert parse_address(":7001", "10.0.0.1") == ONE
    assert parse_address("::1:7001", "x") == ("::1", 7001)


def test_the_key_of_a_command() -> None:
    assert key_of(("LPUSH", b"key", b"value")) == b"key"
    assert key_of(("EVALSHA", "digest", 2, b"key", b"other", "arg")) == b"key"
    assert key_of(("PUBLISH", "channel", "x")) is None
    assert key_of(("CLIENT", "CACHING", "YES")) is None


@given(st.lists(st.lists(st.binary(max_size=20), min_size=1, max_size=4), min_size=1, max_size=4))
def test_asking_goes_before_each_command(commands: list[list[bytes]]) -> None:
    data = b"".join(pack(*words) for words in commands)
    expected = b"".join(pack("ASKING") + pack(*words) for words in commands)
    assert with_asking(data) == expected


# -- names


@given(st.text(max_size=8, alphabet="{}a_."), st.text(max_size=8, alphabet="{}a_."))
def test_all_of_a_queue_is_in_one_slot_whatever_its_name(one: str, other: str) -> None:
    keys = Keys({}, tagged=True)
    names = [name for queue in (one, other) for name in every_name(keys, queue)]
    half = len(names) // 2
    assert len({slot_of(name) for name in names[:half]}) == 1
    assert len(set(names)) == (half if one == other else 2 * half)
    assert slot_of(keys.binding(one)) == slot_of(keys.permanent_binding(one))


def every_name(keys: Keys, queue: str) -> list[bytes]:
    found = keys.of(queue)
    single = found.unacked, found.registered, found.mutex, found.watchers, found.parked
    return [*found.lists, *single]


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"global_keyprefix": "{}"}, "global_keyprefix"),
        ({"unacked_key": "{elsewhere}"}, "global_keyprefix"),
    ],
)
def test_names_that_scripts_could_not_reach_are_refused(options: dict[str, str], ends: str) -> None:
    with pytest.raises(ArgumentError, match=ends):
        Connection("redis+cluster://localhost", transport_options=options).connect()


def test_a_prefix_in_braces_keeps_all_on_one_server() -> None:
    keys = Keys({"global_keyprefix": "{app}"}, tagged=True)
    assert slot_of(keys.of("a").unacked) == slot_of(keys.of("b").unacked) == slot_of("app")


# -- connecting


def test_its_urls() -> None:
    connection = Connection("redis+cluster://:secret@one;redis+cluster://two:7")
    assert isinstance(connection.transport, ClusterTransport)
    assert connection.transport.candidates() == [("one", 6379), ("two", 7)]
    assert connection.transport.reaches_all_brokers
    assert connection.as_uri() == "redis+cluster://:**@one:6379//"
    assert connection.password == "secret"
    assert get_transport_cls("rediscluster") is ClusterTransport
    assert get_transport_cls("rediss+cluster") is ClusterSSLTransport
    # What has no such name is as before.
    assert Connection("redis+socket:///tmp/redis.sock").hostname == "socket:///tmp/redis.sock"


def test_there_is_one_database() -> None:
    with pytest.raises(ArgumentError, match="database 0 only, not 3"):
        Connection("redis+cluster://localhost/3").connect()


def test_a_server_without_a_cluster_is_refused(redis: PrivateRedis) -> None:
    with pytest.raises(ArgumentError, match="belongs to no cluster: use redis://"):
        Connection(f"redis+cluster://127.0.0.1:{redis.port}").connect()


# -- redirections


def node(answer: Callable[[bytes, int], bytes]) -> Callable[[socket.socket], object]:
    """Return what a server does that has all slots, and answers commands as it likes."""

    def talk(sock: socket.socket) -> None:
        host, port = sock.getsockname()[:2]
        server = b"*4\r\n$%d\r\n%s\r\n:%d\r\n$2\r\nid\r\n*0\r\n" % (len(host), host.encode(), port)
        while data := sock.recv(65536):
            reply = b""
            if b"HELLO" in data:
                reply = GREETING
            elif b"TRACKING" in data:
                reply = b"+OK\r\n"
            elif b"CLUSTER" in data:
                reply = b"*1\r\n*3\r\n:0\r\n:16383\r\n" + server
                reply += b"$0\r\n\r\n" * data.count(b"NODES")
            if b"LPUSH" in data:
                reply += answer(data, port)
            sock.sendall(reply)

    return talk


def publish_to(address: str, **options: Any) -> None:
    with Connection(f"redis+cluster://{address}", transport_options=options) as connection:
        Producer(connection.channel()).publish("x", routing_key="q", timeout=LONG)


def test_servers_that_redirect_in_circles_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nodes, "AGAIN", (0.001, 0.001))
    asked: list[bytes] = []

    def moved(data: bytes, port: int) -> bytes:
        asked.append(data)
        return b"-MOVED 1 127.0.0.1:%d\r\n" % port

    with scripted(node(moved)) as server, pytest.raises(CommandError, match="MOVED 1 "):
        publish_to(server)
    assert 2 < len(asked) <= _nodes.MOST_HOPS + 1


def test_a_key_that_has_moved_already_is_asked_for_there() -> None:
    asked: list[bytes] = []

    def ask(data: bytes, port: int) -> bytes:
        asked.append(data)
        if b"ASKING" in data:
            return b"+OK\r\n:1\r\n"
        return b"-ASK 1 127.0.0.1:%d\r\n" % port

    with scripted(node(ask)) as server:
        publish_to(server)
    assert [b"ASKING" in data for data in asked] == [False, True]


@pytest.mark.parametrize("times", [3, 1000])
def test_commands_wait_a_while_for_a_slot_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(_nodes, "AGAIN", (0.001, 0.01))
    monkeypatch.setattr(_nodes, "PATIENCE", 0.1 if times > 100 else LONG)
    asked: list[bytes] = []

    def down(data: bytes, port: int) -> bytes:
        asked.append(data)
        return b"-CLUSTERDOWN The cluster is down\r\n" if len(asked) < times else b":1\r\n"

    with scripted(node(down)) as server:
        if times > 100:
            with pytest.raises(ClusterDownError):
                publish_to(server)
        else:
            publish_to(server)
            assert len(asked) == times


def test_scripts_wait_until_a_slot_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_nodes, "AGAIN", (0.001, 0.01))
    asked: list[bytes] = []

    def later(data: bytes, port: int) -> bytes:
        asked.append(data)
        return b"-TRYAGAIN Multiple keys request\r\n" if len(asked) < 5 else b":1\r\n"

    with scripted(node(later)) as server:
        publish_to(server)
    assert len(asked) == 5
