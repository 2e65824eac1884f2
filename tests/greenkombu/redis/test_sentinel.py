"""Finding the master by its sentinels: what they say, and what they may not."""

from __future__ import annotations

import pickle
import socket
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
import redis as redis_py

from greenkombu import Connection, Exchange, Producer, Queue
from greenkombu.exceptions import ArgumentError, DecodeError, KombuError
from greenkombu.transport.redis._errors import LoginRefusedError, ReadOnlyError
from greenkombu.transport.redis.sentinel import MasterNotFoundError, SentinelConnection
from tests.greenkombu.redis.support import GREETING, scripted
from tests.support.redis import make_sentinel
from tests.support.tasks import LONG

if TYPE_CHECKING:
    from greenkombu.utils.private_redis import PrivateRedis

MAIN = {"master_name": "main"}


def flat(**fields: object) -> bytes:
    """Write a list of names and values, as RESP2 has it."""
    words = [str(word).encode() for item in fields.items() for word in item]
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in words)


def saying(ip: str, port: int, flags: str = "master", others: int = 2) -> Callable[..., object]:
    """Return what a sentinel does that says this of the master."""
    about = flat(**{"ip": ip, "port": port, "flags": flags, "num-other-sentinels": others})
    address = b"*2\r\n$%d\r\n%s\r\n$%d\r\n%d\r\n" % (len(ip), ip.encode(), len(str(port)), port)

    def talk(sock: socket.socket) -> None:
        if sock.recv(4096):
            sock.sendall(GREETING)
        if sock.recv(4096):
            sock.sendall(about + address)
        sock.recv(4096)

    return talk


def connect(url: str, **options: Any) -> Any:
    """Connect, look where, and close."""
    options = {"transport_options": MAIN, "connect_timeout": LONG, **options}
    with Connection(url, **options) as connection:
        found: SentinelConnection = connection.connect()
        assert connection.default_channel.queue_declare("looked").message_count == 0
        return found.settings.address


@pytest.fixture
def main(redis: PrivateRedis) -> tuple[str, int]:
    """The address of a master."""
    return "127.0.0.1", redis.port


@pytest.fixture
def dead() -> Iterator[str]:
    """The address of nothing."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{bound.getsockname()[1]}"


# -- what is asked for


def test_k_the_name_of_the_master_has_to_be_given() -> None:
    with pytest.raises(ValueError, match="master_name") as caught:
        Connection("sentinel://localhost").connect()
    assert isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize(
    "options",
    [{"min_other_sentinels": "many"}, {"sentinel_kwargs": "password"}],
    ids=lambda options: next(iter(options)),
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Connection("sentinel://localhost", transport_options={**MAIN, **options}).connect()


def test_the_sentinels_are_all_those_of_the_urls() -> None:
    connection = Connection(
        "sentinel://one;sentinel://two:7/3;sentinel://one", transport_options=MAIN
    )
    transport = connection.transport
    assert [each.address for each in transport.sentinels] == [("one", 26379), ("two", 7)]
    assert transport.reaches_all_brokers
    assert connection.as_uri() == "sentinel://one:26379//"
    mixed = Connection("sentinel://one;memory://", transport_options=MAIN)
    assert not mixed.transport.reaches_all_brokers


def test_sentinels_have_a_login_and_tls_of_their_own() -> None:
    options = {"username": "u", "password": "p", "ssl": True, "ssl_ca_certs": "/ca.pem"}
    connection = Connection(
        "sentinel://:secret@one/3", transport_options={**MAIN, "sentinel_kwargs": options}
    )
    [settings] = connection.transport.sentinels
    assert (settings.username, settings.password, settings.db) == ("u", "p", 0)
    assert settings.ssl == {"ca_certs": "/ca.pem"}
    assert "secret" not in repr(connection)


# -- what they say


def test_the_master_is_whom_a_sentinel_names(main: tuple[str, int]) -> None:
    with scripted(saying(*main)) as sentinel:
        assert connect(f"sentinel://{sentinel}") == main


def test_the_sentinel_that_answered_is_asked_first_the_next_time(
    main: tuple[str, int], dead: str
) -> None:
    with scripted(saying(*main)) as sentinel:
        url = f"sentinel://{dead};sentinel://{sentinel}"
        with Connection(url, transport_options=MAIN, connect_timeout=LONG) as connection:
            connection.connect()
            transport = connection.transport
            assert transport.sentinels[0].peer == sentinel
            connection.collect()
            connection.connect()
            # It went over to no other broker, which would have forgotten what was declared.
            assert connection.transport is transport


def test_a_sentinel_that_hangs_costs_a_part_of_the_time(main: tuple[str, int]) -> None:
    with (
        scripted(lambda sock: sock.recv(1) and sock.recv(9999)) as mute,
        scripted(saying(*main)) as good,
    ):
        started = time.monotonic()
        url = f"sentinel://{mute};sentinel://{good}"
        # A third of it, and the sentinel does not hang up before.
        assert connect(url, connect_timeout=15) == main
        assert time.monotonic() - started < 14


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (saying("127.0.0.1", 1, "master,s_down"), "is down"),
        (saying("127.0.0.1", 1, others=0), "min_other_sentinels is 1"),
        (saying("127.0.0.1", 1), "127.0.0.1:1"),
    ],
    ids=["down", "alone", "nothing there"],
)
def test_the_next_sentinel_is_asked_if_one_does_not_help(
    main: tuple[str, int], talk: Callable[..., object], reason: str
) -> None:
    options = {**MAIN, "min_other_sentinels": 1}
    with scripted(talk) as first, scripted(saying(*main)) as second:
        both = f"sentinel://{first};sentinel://{second}"
        assert connect(both, transport_options=options) == main
        with pytest.raises(MasterNotFoundError, match=f"'main'.*{reason}") as caught:
            connect(f"sentinel://{first}", transport_options=options)
    assert isinstance(caught.value, redis_py.sentinel.MasterNotFoundError)
    assert isinstance(caught.value, KombuError)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_master_that_is_none_is_not_taken(
    main: tuple[str, int], make_private_redis: Callable[..., PrivateRedis]
) -> None:
    replica = make_private_redis(settings={"replicaof": f"127.0.0.1 {main[1]}"})
    stale = saying("127.0.0.1", replica.port)
    with scripted(stale) as first, scripted(saying(*main)) as second:
        assert connect(f"sentinel://{first};sentinel://{second}") == main
        with pytest.raises(MasterNotFoundError, match=f"{replica.port}.* is a (slave|replica)"):
            connect(f"sentinel://{first}")


def test_no_sentinel_that_lives(dead: str) -> None:
    with pytest.raises(MasterNotFoundError, match=dead) as caught:
        connect(f"sentinel://{dead}")
    connection = Connection("sentinel://", transport_options=MAIN)
    assert isinstance(caught.value, connection.recoverable_connection_errors)


def test_real_sentinels_and_a_master_with_passwords() -> None:
    with make_sentinel(
        replicas=0, sentinels=1, password="of-the-master", sentinel_password="of-the-sentinels"
    ) as servers:
        [sentinel] = servers.sentinels
        assert connect(servers.url, transport_options=servers.transport_options)
        with pytest.raises(LoginRefusedError, match="sentinel_kwargs") as caught:
            connect(servers.url)
        assert "of-the" not in str(caught.value)
        wrong = f"sentinel://:wrong@127.0.0.1:{sentinel.port}"
        with pytest.raises(LoginRefusedError, match=str(servers.master.port)) as caught:
            connect(wrong, transport_options=servers.transport_options)
        assert "wrong" not in str(caught.value).replace("wrong username", "")
        with pytest.raises(MasterNotFoundError, match=r"'other'.*No such master"):
            connect(
                servers.url, transport_options={**servers.transport_options, "master_name": "other"}
            )


# -- what follows


def test_a_server_that_has_become_a_replica_ends_the_connection(
    make_private_redis: Callable[..., PrivateRedis],
) -> None:
    server = make_private_redis()
    with Connection(server.url) as connection:
        producer = Producer(connection.channel())
        producer.publish(1, routing_key="q")
        server.command("REPLICAOF", "127.0.0.1", 1)
        with pytest.raises(ReadOnlyError, match="connect to the master"):
            producer.publish(2, routing_key="q")
        assert not connection.connected
        server.command("REPLICAOF", "NO", "ONE")
        producer.publish(3, routing_key="q", retry=True)
        assert server.command("LLEN", "q") == 2


def test_broadcasts_under_the_names_of_older_kombu_as_well(
    main: tuple[str, int], redis: PrivateRedis
) -> None:
    options = {**MAIN, "sentinel_fanout_compat": True}
    exchange = Exchange("compat", "fanout")
    got: list[Any] = []
    with (
        scripted(saying(*main)) as sentinel,
        Connection(f"sentinel://{sentinel}/2", transport_options=options) as connection,
    ):
        channel = connection.channel()
        consumer = connection.Consumer(
            [Queue("listens", exchange)], channel=channel, on_message=got.append, no_ack=True
        )
        with consumer:
            for name in ("/2.compat", "/{db}.compat"):
                assert redis.command("PUBLISH", name, f"of a stranger at {name}") == 1
                with pytest.raises(DecodeError):
                    connection.drain_events(timeout=LONG)
            for number in range(20):
                Producer(channel, exchange).publish(number, routing_key="key" * (number % 2))
            while len(got) < 20:
                connection.drain_events(timeout=LONG)
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.2)
    assert [message.payload for message in got] == list(range(20))
