"""The Redis channel as programs know it from Kombu: attributes, options, orders, clients."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import redis as redis_py

from greenkombu import Connection, Exchange, Producer, Queue
from greenkombu.exceptions import ArgumentError
from greenkombu.transport import redis as module
from greenkombu.transport import virtual
from hub.environment import Environment
from tests.greenkombu.redis.support import (
    Database,
    consume,
    drain_until,
    nothing_comes,
    publish,
)
from tests.support.tasks import LONG, until

# -- attributes, and options


def subclass(**attributes: Any) -> type[module.Transport]:
    """Return a transport as programs make it for Kombu."""
    channel = type("Channel", (module.Channel,), attributes)
    return type("Transport", (module.Transport,), {"Channel": channel})


NAMES = {
    "sep": ":",
    "unacked_key": "u",
    "unacked_index_key": "i",
    "global_keyprefix": "P.",
    "priority_steps": [0, 5],
}


@pytest.mark.parametrize("how", ["attributes", "options"])
def test_names_of_keys(env: Environment, database: Database, how: str) -> None:
    if how == "options":
        connection = database.connect(**NAMES)
    else:
        connection = database.connect(transport=subclass(**NAMES))
    channel = connection.channel()
    assert {name: getattr(channel, name) for name in NAMES} == NAMES
    Queue("q", Exchange("e"), routing_key="k")(channel).declare()
    publish(connection, "q", "five", priority=9)
    publish(connection, "q", "zero", priority=4)
    assert database.keys() == [
        "P._kombu.binding.e",
        "P._kombu.binding_permanent.e",
        "P.q",
        "P.q:5",
    ]
    assert database.command("SMEMBERS", "P._kombu.binding.e") == [b"k::q"]
    assert channel.get_table("e") == [("k", "", "q")]
    message = Queue("q")(channel).get()
    assert message.payload == "zero"
    assert {"P.u", "P.i"} <= {*database.keys()}
    message.ack()
    until(env, lambda: not database.keys("P.u"))


def test_an_option_goes_before_an_attribute(database: Database) -> None:
    transport = subclass(sep=":", unacked_key="mine", visibility_timeout=5)
    channel = database.connect(transport=transport, sep="|", unacked_key=None).channel()
    assert channel.sep == "|"
    assert channel.unacked_key == "mine"
    assert channel.qos.unacked_key == "mine"
    assert channel.qos.unacked_index_key == "unacked_index"
    assert channel.qos.unacked_mutex_key == "unacked_mutex"
    assert channel.qos.unacked_mutex_expire == 300
    assert channel.visibility_timeout == channel.qos.visibility_timeout == 5


def test_a_subclass_may_have_options_of_its_own(database: Database) -> None:
    names = (*module.Channel.from_transport_options, "mine", "other")
    transport = subclass(from_transport_options=names, other=1)
    channel = database.connect(transport=transport, mine=5).channel()
    assert (channel.mine, channel.other) == (5, 1)
    # What is not set takes no room in each of thousands of channels.
    assert "other" not in vars(channel)
    assert "sep" not in vars(channel)


def test_names_that_only_a_subclass_sets(database: Database) -> None:
    connection = database.connect(
        transport=subclass(
            keyprefix_queue="bindings-%s",
            keyprefix_binding_permanent="permanent-%s",
            keyprefix_fanout="{db}!",
        )
    )
    Queue("q", Exchange("e"), routing_key="k")(connection.channel()).declare()
    assert database.keys() == ["bindings-e", "permanent-e"]
    got = consume(connection, Queue("f", Exchange("fan", "fanout")))
    assert database.command("PUBSUB", "NUMPAT") == 2
    told = json.dumps({"body": "x", "properties": {"delivery_tag": "1"}})
    assert database.command("PUBLISH", f"{database.number}!fan", told) == 1
    drain_until(connection, lambda: got)


def test_times_of_sockets_are_those_of_the_class(database: Database) -> None:
    settings = database.connect(
        transport=subclass(socket_timeout=7, socket_connect_timeout=8, client_name="mine"),
        health_check_interval=9,
    ).connection.settings
    assert (settings.socket_timeout, settings.connect_timeout) == (7, 8)
    assert (settings.health_check_interval, settings.client_name) == (9, "mine")
    names = [client["name"] for client in database.server.clients()]
    assert "mine" in names


@pytest.mark.parametrize(
    "options",
    [
        {"visibility_timeout": "soon"},
        {"visibility_timeout": -1},
        {"unacked_mutex_expire": "x"},
        {"unacked_restore_limit": -5},
        {"priority_steps": []},
        {"priority_steps": "abc"},
        {"priority_order": "reverse"},
        {"queue_order_strategy": "some.module.Class"},
    ],
    ids=str,
)
def test_an_impossible_option_is_named(database: Database, options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(ArgumentError, match=name):
        database.connect(**options).connect()


def test_the_connection_has_the_options_too(database: Database) -> None:
    transport = database.connect(transport=subclass(visibility_timeout=5)).transport
    assert transport.transport_options["visibility_timeout"] == 5
    assert transport.transport_options["unacked_key"] == "unacked"


# -- priorities and orders


@pytest.mark.parametrize(
    ("options", "order", "steps"),
    [
        ({}, [0, 2, 3, 5, 6, 9], [0, 0, 3, 6, 9, 9]),
        ({"priority_order": "kombu"}, [0, 2, 3, 5, 6, 9], [0, 0, 3, 6, 9, 9]),
        ({"priority_order": "amqp"}, [9, 6, 3, 5, 0, 2], [0, 0, 3, 6, 9, 9]),
        ({"priority_steps": [0, 5]}, [0, 3, 2, 6, 9, 5], [0, 0, 0, 5, 5, 5]),
        ({"priority_steps": [5, 1]}, [0, 3, 2, 6, 9, 5], [1, 1, 1, 5, 5, 5]),
    ],
    ids=str,
)
def test_the_order_of_priorities(
    database: Database, options: dict[str, Any], order: list[int], steps: list[int]
) -> None:
    connection = database.connect(**options)
    channel = connection.channel()
    assert [channel.priority(number) for number in (-7, 0, 3, 7, 9, 255)] == steps
    for number in (0, 3, 6, 9, 2, 5):
        publish(connection, "q", number, priority=number)
    queue = Queue("q")(channel)
    assert [queue.get(no_ack=True).payload for _ in range(6)] == order


def test_kombu_and_greenkombu_mean_the_same_lists_of_steps_without_0(database: Database) -> None:
    connection = database.connect(priority_steps=[1, 5])
    publish(connection, "q", 0, priority=3)
    publish(connection, "q", 0, priority=5)
    assert database.keys() == ["q\x06\x161", "q\x06\x165"]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [("round_robin", "abcabcabc"), ("priority", "bbbaaaccc"), ("sorted", "aaabbbccc")],
)
def test_queue_order_strategies(
    env: Environment, database: Database, strategy: str, expected: str
) -> None:
    connection = database.connect(queue_order_strategy=strategy)
    channel = connection.channel()
    channel.basic_qos(0, 1, False)
    got = consume(channel, *"bac")
    nothing_comes(connection)
    # One that has all the room stops the others, so that all are there when it is settled.
    publish(connection, "first", "first")
    held: list[Any] = []
    Queue("first")(channel).consume(callback=held.append)
    drain_until(connection, lambda: held)
    for name in "abc":
        publish(connection, name, *[name] * 3)
        until(env, lambda name=name: name in [tap.keys.queue for tap in channel.taps.starving])
    held[0].ack()
    drain_until(connection, lambda: len(got) == 9)
    assert "".join(got) == expected


class CountedName(str):
    """The name of a queue, which counts how often names are compared."""

    compared = 0

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return str.__hash__(self)


@pytest.mark.parametrize("strategy", ["round_robin", "priority"])
def test_the_work_for_each_queue_does_not_grow_with_their_number(
    database: Database, strategy: str
) -> None:
    count = 100
    connection = database.connect(queue_order_strategy=strategy)
    for number in range(count):
        publish(connection, f"q{number}", number)
    channel = connection.channel()
    channel.basic_qos(0, 1, False)
    got: list[Any] = []

    def take(message: Any) -> None:
        got.append(message.payload)
        message.ack()

    queues = [Queue(CountedName(f"q{number}")) for number in range(count)]
    CountedName.compared = 0
    tags = [
        channel.basic_consume(queue.name, callback=take, consumer_tag=str(number))
        for number, queue in enumerate(queues)
    ]
    drain_until(connection, lambda: len(got) == count)
    for tag in tags:
        channel.basic_cancel(tag)
    # Comparing each with every other would be 5 000 for one pass over them.
    assert CountedName.compared < 20 * count


def test_acknowledgements_that_are_not_emulated(env: Environment, database: Database) -> None:
    connection = database.connect(ack_emulation=False)
    channel = connection.channel()
    publish(connection, "q", *range(5))
    message = Queue("q")(channel).get()
    message.ack()
    got: list[Any] = []
    Queue("q")(channel).consume(callback=got.append)
    drain_until(connection, lambda: len(got) == 4)
    until(env, lambda: database.keys() == [])
    connection.close()
    assert database.keys() == []


def test_bodies_as_they_are(database: Database) -> None:
    connection = database.connect(body_encoding=None)
    producer = Producer(connection)
    producer.publish({"text": "ü"}, routing_key="q")
    producer.publish(b"\x00\xff", routing_key="q", content_type="application/octet-stream")
    kept = [json.loads(raw) for raw in database.command("LRANGE", "q", 0, -1)]
    assert kept[1]["body"] == '{"text": "\\u00fc"}'
    assert kept[1]["properties"]["body_encoding"] is None
    queue = Queue("q")(database.connect().channel())
    assert queue.get(no_ack=True).payload == {"text": "ü"}
    assert queue.get(no_ack=True).body == b"\x00\xff"


# -- many


def test_a_thousand_queues_of_one_channel_use_one_socket(database: Database) -> None:
    connection = database.connect()
    before = len(database.server.clients())
    channel = connection.channel()
    queues = [f"q{number}" for number in range(1000)]
    got: list[Any] = []
    for name in queues:
        Queue(name)(channel).consume(callback=lambda message: got.append(message), no_ack=True)
    assert len(database.server.clients()) - before <= 1
    assert sorted(channel.active_queues) == sorted(queues)
    for name in queues[::100]:
        publish(connection, name, name)
    drain_until(connection, lambda: len(got) == 10)
    assert sorted(message.payload for message in got) == sorted(queues[::100])


def test_channels_of_a_connection_share_its_socket(database: Database) -> None:
    connection = database.connect()
    channels = [connection.channel() for _ in range(20)]
    got = [consume(channel, "q", prefetch=1) for channel in channels]
    own = [client for client in database.server.clients() if client["db"] == str(database.number)]
    assert len(own) == 1
    publish(connection, "q", *range(100))
    drain_until(connection, lambda: sum(map(len, got)) == 100)
    assert sorted(number for one in got for number in one) == list(range(100))


def test_a_channel_that_closes_leaves_the_others_alone(database: Database) -> None:
    connection = database.connect()
    closing, staying = connection.channel(), connection.channel()
    taken: list[Any] = []
    closing.basic_qos(0, 1, False)
    Queue("q")(closing).consume(callback=taken.append)
    publish(connection, "q", 1, 2)
    drain_until(connection, lambda: taken)
    closing.close()
    got = consume(staying, "q")
    drain_until(connection, lambda: len(got) == 2)
    assert sorted(got) == [1, 2]


# -- servers that cannot tell


@pytest.mark.parametrize("reason", ["RESP2", "a proxy without CLIENT", "a user without CLIENT"])
def test_queues_are_polled_where_the_server_does_not_tell(
    env: Environment,
    make_private_redis: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    monkeypatch.setattr(module.transport, "_told", set())
    settings = {"rename-command": 'CLIENT ""'} if reason == "a proxy without CLIENT" else {}
    server = make_private_redis(settings=settings)
    options: dict[str, Any] = {"polling_interval": 0.05}
    url = server.url
    if reason == "RESP2":
        options["protocol"] = 2
    elif reason == "a user without CLIENT":
        server.command("ACL", "SETUSER", "u", "on", ">pw", "~*", "&*", "+@all", "-client")
        url = url.replace("redis://", "redis://u:pw@")
    with caplog.at_level(logging.WARNING):
        connection = Connection(url, transport_options=options)
        channel = connection.channel()
        queue = Queue("q", Exchange("e"), routing_key="k")(channel)
        got = consume(channel, queue)
        fan = consume(connection, Queue("f", Exchange("fan", "fanout")))
        nothing_comes(connection, 0.1)
        publisher = Connection(url, transport_options=options)
        producer = Producer(publisher, Exchange("e"), routing_key="k")
        producer.publish("listed")
        Producer(publisher, Exchange("fan", "fanout")).publish("told")
        drain_until(connection, lambda: got and fan)
        Queue("late", Exchange("e"), routing_key="k")(channel).declare()
        producer.publish("again")
        assert server.command("LLEN", "late") == 1
        drain_until(connection, lambda: len(got) == 2)
    assert (got, fan) == (["listed", "again"], ["told"])
    [record] = [each for each in caplog.records if "polled every" in each.getMessage()]
    assert "0.05 seconds" in record.getMessage()
    until(env, lambda: server.command("HLEN", "unacked") == 0)
    publisher.close()
    connection.close()
    del record


# -- redis-py


def test_the_client_is_for_the_same_database(database: Database) -> None:
    connection = database.connect()
    channel = connection.channel()
    assert channel.client is channel.client
    channel.client.set("name", "value")
    assert database.command("GET", "name") == b"value"
    with channel.conn_or_acquire() as client:
        assert client is channel.client
    with channel.conn_or_acquire("given") as client:
        assert client == "given"
    with channel.pipeline() as pipeline:
        assert pipeline.set("a", 1).get("a").execute() == [True, b"1"]
    with channel.qos.pipe_or_acquire() as pipeline:
        assert pipeline.get("a").execute() == [b"1"]
    with channel.qos.pipe_or_acquire("given") as pipeline:
        assert pipeline == "given"
    assert channel.qos.client is channel.client
    assert channel.pool is channel.client.connection_pool
    assert type(channel.client) is redis_py.Redis


def test_the_client_has_the_prefix(database: Database) -> None:
    channel = database.connect(global_keyprefix="P:").channel()
    client = channel.client
    assert isinstance(client, module.PrefixedStrictRedis)
    client.lpush("list", "x", "y")
    assert client.brpop(["empty", "list"], 1) == (b"list", b"x")
    assert client.brpop(["empty"], 0.01) is None
    client.mset({"a": 1, "b": 2})
    assert client.mget(["a", "b", b"c"]) == [b"1", b"2", None]
    assert client.eval("return {KEYS[1], ARGV[1]}", 1, "key", "argument") == [b"P:key", b"argument"]
    assert client.rename("b", "c")
    assert client.zadd("z", {"m": 1}) == client.zcard("z") == 1
    assert client.lmove("list", "other") == b"y"
    assert client.ping()
    assert client.config_get("maxmemory")
    with client.pipeline() as pipeline:
        pipeline.watch("a")
        pipeline.multi()
        assert pipeline.delete("a", "nothing").exists("z").execute() == [1, 1]
    assert database.keys() == ["P:c", "P:other", "P:z"]
    subscriber = channel.subclient
    assert isinstance(subscriber, module.PrefixedRedisPubSub)
    subscriber.subscribe("channel")
    subscriber.psubscribe("pattern*")
    channels = [subscriber.get_message(timeout=LONG)["channel"] for _ in range(2)]
    assert channels == [b"channel", b"pattern*"]
    assert client.publish("channel", "x") == client.publish("pattern1", "y") == 1
    heard = [subscriber.get_message(timeout=LONG) for _ in range(2)]
    assert [(each["pattern"], each["channel"], each["data"]) for each in heard] == [
        (None, b"channel", b"x"),
        (b"pattern*", b"pattern1", b"y"),
    ]


def test_a_mutex_is_held_by_one(database: Database) -> None:
    client = database.connect().channel().client
    with module.Mutex(client, "mutex", 60):
        assert 50_000 < database.command("PTTL", "mutex") <= 60_000
        with pytest.raises(module.MutexHeld, match="mutex"), module.Mutex(client, "mutex", 60):
            pass
        assert database.command("EXISTS", "mutex") == 1
    assert database.command("EXISTS", "mutex") == 0
    with module.Mutex(client, "mutex", 60):
        database.command("SET", "mutex", "somebody else's")
    assert database.command("GET", "mutex") == b"somebody else's"


def test_the_names_of_kombus_module() -> None:
    assert (module.DEFAULT_PORT, module.DEFAULT_DB) == (6379, 0)
    assert module.PRIORITY_STEPS == module.Channel.priority_steps == [0, 3, 6, 9]
    assert module.DEFAULT_HEALTH_CHECK_INTERVAL == module.Channel.health_check_interval == 25
    errors = module.get_redis_error_classes()
    assert errors.connection_errors == module.Transport.connection_errors
    assert errors.channel_errors == module.Transport.channel_errors
    assert module.get_redis_ConnectionError() is redis_py.ConnectionError
    assert issubclass(module.Channel, virtual.Channel)


class Provider:
    """As redis-py has them."""

    asked = 0

    def get_credentials(self) -> tuple[str, str]:
        """Return a user name and a password."""
        self.asked += 1
        return "provided", "secret"


def test_credentials_are_asked_for_at_each_connecting(database: Database) -> None:
    database.command("ACL", "SETUSER", "provided", "on", ">secret", "~*", "&*", "+@all")
    try:
        provider = Provider()
        connection = database.connect(credential_provider=provider)
        publish(connection, "q", 1)
        assert connection.channel().client.llen("q") == 1
        users = [client["user"] for client in database.server.clients()]
        assert users.count("provided") == 2
        connection.close()
        again = database.connect(credential_provider=provider)
        again.connect()
        assert provider.asked == 3
        again.close()
    finally:
        database.command("ACL", "DELUSER", "provided")


# -- loops of the program's own


class Loop:
    """The least that `register_with_event_loop` needs."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], object]] = {}

    def add_reader(self, descriptor: int, callback: Callable[[], object]) -> None:
        self.readers[descriptor] = callback

    def remove_reader(self, descriptor: int) -> None:
        del self.readers[descriptor]

    register = add_reader
    unregister = remove_reader


def turn(env: Environment, descriptors: Any) -> list[int]:
    """Wait a little for descriptors; return those that are readable."""
    select = env.original("select", "select")
    readable, _, _ = select(list(descriptors), [], [], 0)
    if not readable:
        env.sleep(0.005)
    found: list[int] = readable
    return found


def test_a_foreign_loop_runs_the_events(env: Environment, database: Database) -> None:
    connection = database.connect()
    assert connection.transport.supports_ev
    loop = Loop()
    publish(connection, "q", *range(250))
    got = consume(connection, "q", prefetch=10)
    connection.register_with_event_loop(loop)
    connection.register_with_event_loop(loop)
    assert len(loop.readers) == 1

    def run_until(count: int) -> bool:
        for descriptor in turn(env, loop.readers):
            loop.readers[descriptor]()
        return len(got) == count

    until(env, lambda: run_until(250))
    publish(connection, "q", "later")
    until(env, lambda: run_until(251))
    assert got == [*range(250), "later"]
    connection.transport.unregister_from_event_loop(connection.connection, loop)
    assert not loop.readers
    connection.register_with_event_loop(loop)
    connection.close()
    assert not loop.readers


def test_an_error_in_a_callback_goes_to_the_loop_and_the_rest_still_comes(
    env: Environment, database: Database
) -> None:
    connection = database.connect()
    loop = Loop()
    got: list[Any] = []

    def take(message: Any) -> None:
        message.ack()
        got.append(message.payload)
        if len(got) == 1:
            raise ZeroDivisionError

    publish(connection, "q", 1, 2)
    Queue("q")(connection.channel()).consume(callback=take)
    connection.register_with_event_loop(loop)
    raised: list[None] = []

    def run() -> bool:
        for descriptor in turn(env, loop.readers):
            try:
                loop.readers[descriptor]()
            except ZeroDivisionError:
                raised.append(None)
        return len(got) == 2

    until(env, run)
    assert len(raised) == 1


def test_kombu_2s_hooks_for_a_loop(env: Environment, database: Database) -> None:
    connection = database.connect()
    transport = connection.transport
    publish(connection, "q", *range(5))
    got = consume(connection, "q")
    poller = Loop()
    transport.on_poll_init(poller)

    def run() -> bool:
        handlers = transport.on_poll_start()
        assert set(handlers) == set(poller.readers)
        for descriptor in turn(env, handlers):
            handlers[descriptor](descriptor, 1)
        return len(got) == 5

    until(env, run)
    transport.handle_event(10**6, 1)  # one that has gone
    connection.close()
    assert not poller.readers
