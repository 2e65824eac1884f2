"""The code examples of the manual's guide, on memory and on RabbitMQ.

`EXAMPLES` lists every code example of the guide chapters and the test that runs it; those that need
no broker beside memory are in `tests.greenkombu.test_manual`.  Names and data are our own, imports
are greenkombu's, loops that never end there are bounded here.  Where the manual has a mistake (a
name that does not exist, an argument that is missing) the test runs what was meant.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu import (
    BrokerConnection,
    Connection,
    Consumer,
    Exchange,
    Producer,
    Queue,
    SimpleBuffer,
    SimpleQueue,
    pools,
)
from greenkombu.common import eventloop, maybe_declare
from greenkombu.exceptions import ChannelLimitExceeded, ConnectionLimitExceeded
from greenkombu.mixins import ConsumerMixin
from greenkombu.pools import connections, producers
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ

HERE = "tests/test_manual_examples.py"
MEMORY = "tests/greenkombu/test_manual.py"

#: Section of the guide, example -> the file and the test that run it.
EXAMPLES = {
    "1.3.2 quick overview": (MEMORY, "test_g1_3_2_a_queue_a_producer_and_a_consumer"),
    "1.3.2 quick overview, on a broker": (HERE, "test_g1_3_2_the_overview"),
    "1.3.2 several queues on a channel": (MEMORY, "test_g1_3_2_several_queues_on_one_channel"),
    "1.3.2 channels by hand": (MEMORY, "test_g1_3_2_channels_by_hand_and_without_with"),
    "1.3.2 without with": (MEMORY, "test_g1_3_2_channels_by_hand_and_without_with"),
    "1.3.2 bound declarations": (MEMORY, "test_g1_3_2_declarations_are_bound_to_a_channel"),
    "1.5 topic patterns": (MEMORY, "test_g1_5_the_topic_exchange"),
    "2.2.1 creating, connecting, closing": (MEMORY, "test_g2_2_1_life_of_a_connection"),
    "2.2.1 with a broker": (HERE, "test_g2_2_1_life_of_a_connection"),
    "2.2.2 URLs": (HERE, "test_g2_2_2_urls"),
    "2.2.3 a transport by its class path": (HERE, "test_g2_2_3_a_transport_by_its_class_path"),
    "2.4.1 one consumer": (HERE, "test_g2_4_1_one_consumer"),
    "2.4.1 several consumers on channels": (HERE, "test_g2_4_1_several_consumers"),
    "2.4.1 mixin": (HERE, "test_g2_4_1_a_mixin"),
    "2.4.1 mixin with two channels": (MEMORY, "test_g2_4_1_a_mixin_with_two_channels"),
    "2.5.1 queues, worker, tasks, client": (MEMORY, "test_g2_5_1_a_task_queue"),
    "2.6 shortcut of a connection": (HERE, "test_g2_6_simple_queues"),
    "2.6 the same by hand": (HERE, "test_g2_6_simple_queues"),
    "2.6.1 a logger": (MEMORY, "test_g2_6_1_simple_queues_as_a_log"),
    "2.7.1 one pool for equal connections": (HERE, "test_g2_7_1_pools_of_two_brokers"),
    "2.7.1 acquiring and releasing": (HERE, "test_g2_7_1_pools_of_two_brokers"),
    "2.7.1 two brokers": (HERE, "test_g2_7_1_pools_of_two_brokers"),
    "2.7.2 publishing by a pooled producer": (HERE, "test_g2_7_2_a_pooled_producer"),
    "2.7.2 setting the limit": (HERE, "test_g2_7_2_setting_the_limit"),
    "2.7.3 groups of one's own": (MEMORY, "test_g2_7_3_custom_groups"),
    "2.7.3 the global limit": (MEMORY, "test_g2_7_3_custom_groups"),
    "2.8.1 serializer of a producer": (MEMORY, "test_g2_8_1_serializers_of_producer_and_message"),
    "2.8.1 serializer of a message": (MEMORY, "test_g2_8_1_serializers_of_producer_and_message"),
    "2.8.2 raw data": (MEMORY, "test_g2_8_2_raw_data"),
    "4.1.1 ensuring a publish": (HERE, "test_r4_1_1_ensuring_a_publish"),
    "4.1.1 pool of connections": (HERE, "test_r4_1_1_a_pool_of_connections"),
    "4.1.1 pool of channels": (HERE, "test_r4_1_1_a_pool_of_channels"),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_has_its_test(example: str) -> None:
    file, name = EXAMPLES[example]
    source = (Path(__file__).parents[1] / file).read_text()
    assert f"\ndef {name}(" in source


@pytest.fixture(scope="module")
def vhost(rabbitmq: PrivateRabbitMQ) -> Iterator[str]:
    """The URL of a virtual host for all tests of this module: making one takes a second."""
    name = f"examples-{os.urandom(4).hex()}"
    yield rabbitmq.add_vhost(name)
    rabbitmq.delete_vhost(name)


@pytest.fixture(params=["memory", "rabbitmq"])
def url(request: pytest.FixtureRequest, vhost: str) -> Iterator[str]:
    if request.param == "rabbitmq":
        yield vhost
    else:
        yield "memory://"
        from greenkombu.transport import memory

        memory.broker.clear()
    pools.reset()


def test_g1_3_2_the_overview(url: str) -> None:
    photos = Exchange("photos", "direct", durable=True)
    portraits = Queue("portraits", exchange=photos, key="portrait")
    landscapes = Queue("landscapes", exchange=photos, key="landscape")
    seen: list[Any] = []

    def develop(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with BrokerConnection(url) as conn:
        portraits(conn.channel()).declare()
        with conn.Producer(exchange=photos, serializer="json", routing_key="portrait") as producer:
            producer.publish({"film": 7, "frame": 12})
        with conn.Consumer([portraits, landscapes], callbacks=[develop]):
            conn.drain_events(timeout=10)
            with conn.Producer(exchange=photos) as producer:
                producer.publish({"film": 8, "frame": 1}, routing_key="landscape")
            conn.drain_events(timeout=10)
    assert seen == [{"film": 7, "frame": 12}, {"film": 8, "frame": 1}]


def test_g2_2_1_life_of_a_connection(url: str) -> None:
    connection = BrokerConnection(url)
    assert not connection.connected
    connection.connect()
    assert connection.connected
    connection.close()
    connection.release()
    with BrokerConnection(url) as connection:
        connection.connect()
    assert not connection.connected


def test_g2_2_2_urls() -> None:
    def shown(url: str | None, **kwargs: Any) -> tuple[Any, ...]:
        info = BrokerConnection(url, **kwargs).info()
        return tuple(info[name] for name in ("transport", "hostname", "port", "virtual_host"))

    assert shown("amqp://", virtual_host="v") == ("amqp", "localhost", 5672, "v")
    assert BrokerConnection("amqp://localhost//foo").virtual_host == "/foo"
    assert BrokerConnection("amqp://localhost/foo").virtual_host == "foo"
    assert BrokerConnection("amqp://localhost/myvhost?ssl=1").ssl
    long = BrokerConnection("amqp://guest:guest@localhost:5672//")
    assert BrokerConnection().info() == long.info()


def test_g2_2_3_a_transport_by_its_class_path(vhost: str) -> None:
    given = Connection(vhost)
    connection = BrokerConnection(
        hostname=given.hostname,
        userid=given.userid,
        password=given.password,
        virtual_host=given.virtual_host,
        port=given.port,
        transport="greenkombu.transport.pyamqplib.Transport",
        connect_timeout=10,
        transport_options={"confirm_publish": True},
    )
    with connection:
        queue = connection.SimpleQueue("by-path")
        queue.put("x")
        message = queue.get(timeout=10)
        assert message.payload == "x"
        message.ack()
        queue.close()


def test_g2_4_1_one_consumer(url: str) -> None:
    seen: list[Any] = []
    queue = Queue("one", Exchange("letters"), routing_key="one")

    def on_message(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with Connection(url) as connection, Consumer(connection, [queue], callbacks=[on_message]):
        Producer(connection).publish("a letter", exchange="letters", routing_key="one")
        for _ in eventloop(connection, limit=1, timeout=10):
            pass
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.05)
    assert seen == ["a letter"]


def test_g2_4_1_several_consumers(url: str) -> None:
    seen: list[Any] = []
    exchange = Exchange("letters")

    def on(name: str) -> Any:
        def take(body: Any, message: Any) -> None:
            seen.append((name, body))
            message.ack()

        return take

    with (
        Connection(url) as connection,
        connection.channel() as channel1,
        connection.channel() as channel2,
        Consumer(channel1, Queue("first", exchange, "first"), callbacks=[on("one")]),
        Consumer(channel2, Queue("second", exchange, "second"), callbacks=[on("two")]),
    ):
        for key in ("first", "second"):
            connection.Producer(exchange=exchange).publish(key, routing_key=key)
        for _ in range(2):
            connection.drain_events(timeout=10)
    assert sorted(seen) == [("one", "first"), ("two", "second")]


def test_g2_4_1_a_mixin(url: str) -> None:
    queue = Queue("mixed", Exchange("letters"), "mixed")

    class C(ConsumerMixin):
        def __init__(self, connection: Connection) -> None:
            self.connection = connection
            self.seen: list[Any] = []

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer([queue], callbacks=[self.on_message])]

        def on_message(self, body: Any, message: Any) -> None:
            self.seen.append(body)
            message.ack()
            self.should_stop = len(self.seen) == 3

    with Connection(url) as connection:
        maybe_declare(queue, connection.default_channel)
        producer = connection.Producer(exchange=queue.exchange, routing_key="mixed")
        for number in range(3):
            producer.publish(number)
        program = C(connection)
        program.run()
    assert program.seen == [0, 1, 2]


def test_g2_6_simple_queues(url: str) -> None:
    with Connection(url) as connection:
        queue = connection.SimpleQueue("shortcut")
        queue.put({"n": 1})
        message = queue.get(block=True, timeout=10)
        assert message.payload == {"n": 1}
        message.ack()
        queue.close()
        for simple, name in ((SimpleQueue, "by-hand"), (SimpleBuffer, "by-hand-too")):
            with connection.channel() as channel:
                by_hand = simple(channel, name)
                by_hand.put("x")
                got = by_hand.get(timeout=10)
                assert got.payload == "x"
                if not by_hand.no_ack:
                    got.ack()
                by_hand.close()


def test_g2_7_1_pools_of_two_brokers(url: str) -> None:
    c1, c2 = Connection(url), Connection("memory://other-parameters")
    assert connections[c1] is connections[Connection(url)]
    assert connections[c1] is not connections[c2]
    with (
        connections[c1].acquire(block=True) as conn1,
        connections[c2].acquire(block=True) as conn2,
    ):
        assert conn1.as_uri() == c1.as_uri()
        for conn in (conn1, conn2):
            conn.default_channel.queue_declare("both")
            conn.Producer().publish(conn.as_uri(), routing_key="both")
        for conn in (conn1, conn2):
            message = Queue("both")(conn.default_channel).get(no_ack=True)
            assert message is not None
            assert message.payload in (conn1.as_uri(), conn2.as_uri())
    with connections[c1].acquire(block=True) as again:
        assert again is conn1


def test_g2_7_2_a_pooled_producer(url: str) -> None:
    paper = Exchange("paper")
    queue = Queue("readers", paper, "sport")
    article = {"title": "Rain stopped play", "lines": ["It rained.", "Nobody played."]}
    connection = Connection(url)
    for _ in range(2):
        with producers[connection].acquire(block=True) as producer:
            # The manual forgets the channel, and the exchange of the publish.
            maybe_declare(queue, producer.channel)
            producer.publish(
                article, exchange=paper, routing_key="sport", serializer="json", compression="zlib"
            )
    with connections[connection].acquire(block=True) as conn:
        for _ in range(2):
            message = queue(conn.default_channel).get(no_ack=True)
            assert message is not None
            assert message.payload == article


def test_g2_7_2_setting_the_limit() -> None:
    before = pools.get_limit()
    try:
        pools.set_limit(before + 1)
        assert pools.get_limit() == before + 1
        pool = connections[Connection("memory://")]
        assert pool.limit == before + 1
        with pool.acquire(block=True), pool.acquire(block=True):
            with pytest.raises(RuntimeError):
                pools.set_limit(1)
            pools.reset()
        assert connections[Connection("memory://")] is not pool
    finally:
        pools.set_limit(before, force=True)
        pools.reset()


def test_r4_1_1_ensuring_a_publish(url: str) -> None:
    told: list[Any] = []

    def errback(exc: BaseException, interval: float) -> None:
        told.append((exc, interval))

    with Connection(url) as connection:
        queue = Queue("ensured")(connection.default_channel)
        queue.declare()
        producer = Producer(connection)
        publish = connection.ensure(producer, producer.publish, errback=errback, max_retries=3)
        publish({"hello": "world"}, routing_key="ensured")
        connection.connection.abort()
        publish({"hello": "again"}, routing_key="ensured")
        bound = Queue("ensured")(connection.default_channel)
        bodies = [bound.get(no_ack=True).payload for _ in range(2)]
    assert bodies == [{"hello": "world"}, {"hello": "again"}]


def test_r4_1_1_a_pool_of_connections(url: str) -> None:
    pool = Connection(url).Pool(2)
    c1 = pool.acquire()
    c2 = pool.acquire()
    with pytest.raises(ConnectionLimitExceeded):
        pool.acquire()
    c1.release()
    c3 = pool.acquire()
    assert c3 is c1
    for connection in (c2, c3):
        connection.release()
    pool.force_close_all()


def test_r4_1_1_a_pool_of_channels(url: str) -> None:
    with Connection(url) as connection:
        pool = connection.ChannelPool(2)
        c1, c2 = pool.acquire(), pool.acquire()
        with pytest.raises(ChannelLimitExceeded):
            pool.acquire()
        c1.release()
        assert pool.acquire() is c1
        c2.release()
        pool.force_close_all()
