"""A server that refuses: each error is typed and comes soon, nothing is lost, the rest goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import exceptions as redis_py

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu.exceptions import OperationalError, StdChannelError
from greenkombu.transport.redis._errors import (
    BusyLoadingError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    WrongTypeError,
)
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import Environment
from tests.greenkombu.redis.support import Database, consume, drain_until, publish
from tests.support.redis import end_loading, start_loading
from tests.support.tasks import LONG, until

#: A tap that was refused looks again after this.
OPTIONS = {"polling_interval": 0.05}


@pytest.fixture
def server(make_private_redis: Callable[..., PrivateRedis]) -> PrivateRedis:
    """A server of the test's own."""
    return make_private_redis()


@pytest.fixture
def own(server: PrivateRedis) -> Iterator[Database]:
    """A database of that server."""
    made = Database(server)
    yield made
    made.close()


def drain_until_raised(connection: Connection, kind: type[BaseException]) -> BaseException:
    """Drain until an error comes."""
    deadline = time.monotonic() + LONG
    while time.monotonic() < deadline:
        try:
            connection.drain_events(timeout=0.1)
        except kind as exc:
            return exc
        except TimeoutError:
            continue
    raise AssertionError(f"no {kind.__name__} came")


def drain_past(
    connection: Connection, kind: type[BaseException], condition: Callable[[], object]
) -> None:
    """Drain, whatever is refused meanwhile, until something holds."""
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        with contextlib.suppress(TimeoutError, kind):
            connection.drain_events(timeout=0.1)


# -- keys of another type


def test_a_queue_whose_name_is_taken(database: Database) -> None:
    database.command("SET", "taken", "by somebody")
    connection = database.connect(**OPTIONS)
    producer = Producer(connection)
    with pytest.raises(WrongTypeError, match=r"LPUSH.*another name") as caught:
        producer.publish(1, routing_key="taken")
    assert isinstance(caught.value, redis_py.ResponseError)
    assert isinstance(caught.value, StdChannelError)
    channel = connection.channel()
    with pytest.raises(WrongTypeError):
        Queue("taken")(channel).get()
    with pytest.raises(WrongTypeError, match="LLEN"):
        consume(channel, "taken")
    got = consume(channel, "taken", "free", auto_declare=False)
    assert "WRONGTYPE" in str(drain_until_raised(connection, WrongTypeError))
    producer.publish("free", routing_key="free")
    drain_past(connection, WrongTypeError, lambda: got)
    database.command("DEL", "taken")
    producer.publish("taken", routing_key="taken")
    drain_past(connection, WrongTypeError, lambda: len(got) == 2)
    assert got == ["free", "taken"]
    assert database.command("GET", "taken") is None


@pytest.mark.parametrize("key", ["unacked", "unacked_index"])
def test_messages_that_cannot_be_registered_stay(
    env: Environment, database: Database, key: str
) -> None:
    connection = database.connect(**OPTIONS)
    publish(connection, "q", *range(3))
    database.command("SET", key, "by somebody")
    got = consume(connection, "q")
    drain_until_raised(connection, WrongTypeError)
    assert got == []
    assert database.command("LLEN", "q") == 3
    database.command("DEL", key)
    drain_past(connection, WrongTypeError, lambda: len(got) == 3)
    assert got == [0, 1, 2]
    until(env, lambda: database.keys() == [])


def test_bindings_whose_key_is_taken(database: Database) -> None:
    database.command("SET", "_kombu.binding.e", "by somebody")
    connection = database.connect()
    with pytest.raises(WrongTypeError):
        Queue("q", Exchange("e"), routing_key="k")(connection.channel()).declare()
    with pytest.raises(WrongTypeError):
        Producer(connection, Exchange("e")).publish(1, routing_key="k")
    publish(connection, "other", 1)
    assert database.command("LLEN", "other") == 1


# -- no memory


def test_a_full_server_takes_nothing_and_gives_everything(
    env: Environment, server: PrivateRedis, own: Database
) -> None:
    connection = own.connect(**OPTIONS)
    publish(connection, "q", *range(5))
    held = Queue("q")(connection.channel()).get()
    server.fill()
    with pytest.raises(OutOfMemoryError, match="maxmemory") as caught:
        publish(connection, "q", "more")
    assert isinstance(caught.value, redis_py.OutOfMemoryError)
    got = consume(connection, "q")
    drain_past(connection, OutOfMemoryError, lambda: len(got) == 4)
    held.requeue()
    drain_past(connection, OutOfMemoryError, lambda: len(got) == 5)
    until(env, lambda: own.command("HLEN", "unacked") == 0)
    server.empty()
    publish(connection, "q", "more")
    drain_past(connection, OutOfMemoryError, lambda: len(got) == 6)
    assert got == [1, 2, 3, 4, 0, "more"]


# -- no master


def test_a_server_that_becomes_a_replica(
    env: Environment, server: PrivateRedis, own: Database
) -> None:
    connection, publisher = own.connect(**OPTIONS), own.connect()
    got: list[Any] = []

    def start() -> None:
        Consumer(
            connection.default_channel,
            [Queue("q")],
            callbacks=[lambda body, message: (got.append(body), message.ack())],
        ).consume()

    start()
    publish(publisher, "q", "before")
    drain_until(connection, lambda: got)
    until(env, lambda: own.command("HLEN", "unacked") == 0)
    server.demote()
    with pytest.raises(ReadOnlyError, match="master") as caught:
        publish(publisher, "q", "refused")
    assert isinstance(caught.value, OperationalError)
    assert isinstance(caught.value, redis_py.ReadOnlyError)
    assert isinstance(caught.value, tuple(publisher.connection_errors))
    assert not publisher.connected
    server.promote()
    publish(publisher, "q", "after")
    deadline = time.monotonic() + LONG
    while len(got) < 2:
        assert time.monotonic() < deadline
        try:
            connection.drain_events(timeout=0.1)
        except TimeoutError:
            continue
        except connection.connection_errors:
            connection.ensure_connection(max_retries=20, interval_start=0.05)
            start()
    assert got == ["before", "after"]


# -- no scripts


def test_a_server_that_has_forgotten_the_scripts(env: Environment, database: Database) -> None:
    connection = database.connect(**OPTIONS)
    channel = connection.channel()
    channel.basic_qos(0, 2, False)
    taken: list[Any] = []
    Queue("q")(channel).consume(callback=taken.append)
    for number in range(10):
        database.command("SCRIPT", "FLUSH")
        publish(connection, "q", number)
        drain_until(connection, lambda: taken)
        database.command("SCRIPT", "FLUSH")
        message = taken.pop()
        assert message.payload == number
        if number % 2:
            message.requeue()
            drain_until(connection, lambda: taken)
            message = taken.pop()
            assert message.delivery_info["redelivered"] is True
        message.ack()
        database.command("SCRIPT", "FLUSH")
        publish(connection, "other", number)
        assert Queue("other")(channel).get(no_ack=True).payload == number
        database.command("SCRIPT", "FLUSH")
        channel.qos.restore_visible()
    until(env, lambda: database.keys() == [])


# -- no right


def test_a_user_who_may_not_run_scripts(server: PrivateRedis, own: Database) -> None:
    server.command(*("ACL", "SETUSER", "u", "on", ">pw", "~*", "&*", "+@all", "-eval", "-evalsha"))
    connection = own.connect(own.url.replace("redis://", "redis://u:pw@"), **OPTIONS)
    publish(connection, "q", 1)
    with pytest.raises(NoPermissionError, match="ACL SETUSER") as caught:
        Queue("q")(connection.channel()).get()
    assert isinstance(caught.value, redis_py.NoPermissionError)
    assert "pw" not in str(caught.value)
    got = consume(connection, "q")
    drain_until_raised(connection, NoPermissionError)
    assert own.command("LLEN", "q") == 1
    server.command("ACL", "SETUSER", "u", "+eval", "+evalsha")
    drain_past(connection, NoPermissionError, lambda: got)
    assert got == [1]


def test_a_user_who_may_not_touch_a_queue(server: PrivateRedis, own: Database) -> None:
    server.command(
        *("ACL", "SETUSER", "u", "on", ">pw", "resetkeys", "~mine*", "~unacked*"),
        *("~_greenkombu.*", "~_kombu.*", "&*", "+@all"),
    )
    connection = own.connect(own.url.replace("redis://", "redis://u:pw@"), **OPTIONS)
    with pytest.raises(NoPermissionError):
        publish(connection, "theirs", 1)
    with pytest.raises(NoPermissionError):
        consume(connection, "theirs")
    got = consume(connection, "theirs", "mine", auto_declare=False)
    publish(connection, "mine", "mine")
    drain_past(connection, NoPermissionError, lambda: got)
    publish(own.connect(), "theirs", "theirs")
    drain_until_raised(connection, NoPermissionError)
    assert own.command("LLEN", "theirs") == 1


# -- not yet


def test_a_server_that_reads_its_data(server: PrivateRedis) -> None:
    start_loading(server)
    connection = Connection(server.url)
    with pytest.raises(BusyLoadingError, match="data set") as caught:
        connection.connect()
    assert isinstance(caught.value, redis_py.BusyLoadingError)
    assert isinstance(caught.value, tuple(connection.connection_errors))
    failures: list[BaseException] = []

    def failed(error: BaseException, interval: float) -> None:
        del interval
        if not failures:
            end_loading(server)
        failures.append(error)

    connection.ensure_connection(failed, max_retries=100, interval_start=0.05, interval_step=0)
    assert failures
    publish(connection, "q", 1)
    assert server.command("LLEN", "q") == 1
    connection.close()
