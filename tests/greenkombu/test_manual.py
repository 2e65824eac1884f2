"""What the manual's guide shows how to do, as tests on the memory transport.

The name of a test begins with the section of the guide.  What runs for ever there is bounded here.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

import pytest

import greenkombu
from greenkombu import Connection, Consumer, Exchange, Producer, Queue, exceptions, pools
from greenkombu.common import maybe_declare
from greenkombu.mixins import ConsumerMixin
from greenkombu.pools import connections, producers
from greenkombu.utils import kwdict, reprcall

URL = "memory://"


@pytest.fixture(autouse=True)
def empty_broker() -> Iterator[None]:
    yield
    pools.reset()
    with Connection(URL) as connection:
        for name in (
            *("small", "large", "urgent", "normal", "later"),
            *("journal", "news", "quotes", "one", "two"),
        ):
            connection.default_channel.queue_delete(name)


def test_g1_3_2_a_queue_a_producer_and_a_consumer() -> None:
    parcels = Exchange("g1_3_2_parcels", "direct", durable=True)
    small_queue = Queue("small", exchange=parcels, routing_key="small")
    seen: list[Any] = []

    def on_parcel(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with greenkombu.BrokerConnection(URL) as conn:
        small_queue(conn.channel()).declare()
        with conn.Producer(exchange=parcels, serializer="json", routing_key="small") as producer:
            producer.publish({"to": "Ms Smith", "grams": 130})
        with conn.Consumer(small_queue, callbacks=[on_parcel]):
            conn.drain_events(timeout=10)
    assert seen == [{"to": "Ms Smith", "grams": 130}]


def test_g1_3_2_several_queues_on_one_channel() -> None:
    parcels = Exchange("g1_3_2_parcels", "direct", durable=True)
    small_queue = Queue("small", exchange=parcels, key="small")
    large_queue = Queue("large", exchange=parcels, key="large")
    seen: list[Any] = []

    def on_parcel(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with (
        Connection(URL) as connection,
        connection.Consumer([small_queue, large_queue], callbacks=[on_parcel]),
    ):
        producer = connection.Producer(exchange=parcels)
        producer.publish("a ring", routing_key="small")
        producer.publish("a bed", routing_key="large")
        producer.publish("a house", routing_key="lost")
        connection.drain_events(timeout=10)
        connection.drain_events(timeout=10)
        with pytest.raises(socket.timeout):
            connection.drain_events(timeout=0.05)
    assert sorted(seen) == ["a bed", "a ring"]


def test_g1_3_2_channels_by_hand_and_without_with() -> None:
    connection = Connection(URL)
    with connection.channel() as channel:
        assert Producer(channel).channel is channel
        assert Consumer(channel).channel is channel
    assert channel.closed
    seen: list[Any] = []
    consumer = Consumer(connection, Queue("small"), no_ack=True)
    consumer.register_callback(lambda body, message: seen.append(body))
    consumer.consume()
    producer = Producer(connection)
    producer.publish("x", routing_key="small")
    connection.drain_events(timeout=10)
    consumer.cancel()
    producer.close()
    connection.close()
    assert seen == ["x"]


def test_g1_3_2_declarations_are_bound_to_a_channel() -> None:
    exchange = Exchange("tasks", "direct")
    connection = Connection(URL)
    bound_exchange = exchange(connection.channel())
    bound_exchange.declare()
    bound_exchange.delete()
    with pytest.raises(
        exceptions.NotBoundError, match="Can't call delete on Exchange not bound to a channel"
    ):
        exchange.delete()
    connection.close()


def test_g1_5_the_topic_exchange() -> None:
    with Connection(URL) as connection:
        exchange = Exchange("g1_5_stock", "topic")
        queue = Queue("quotes", exchange, routing_key="*.stock.#")(connection.default_channel)
        queue.declare()
        for routing_key in ("usd.stock", "eur.stock.db", "stock.nasdaq", "a.b.stock"):
            connection.Producer(exchange=exchange).publish(routing_key, routing_key=routing_key)
        got = [queue.get(no_ack=True) for _ in range(3)]
        assert [message and message.payload for message in got] == [
            "usd.stock",
            "eur.stock.db",
            None,
        ]
        exchange(connection.default_channel).delete()


def test_g2_2_1_life_of_a_connection() -> None:
    connection = Connection(URL)
    assert not connection.connected
    connection.connect()
    assert connection.connected
    connection.close()
    assert not connection.connected
    connection.release()
    with Connection(URL) as connection:
        connection.connect()
    assert not connection.connected


def test_g2_4_1_a_mixin_with_two_channels() -> None:
    class C(ConsumerMixin):
        channel2: Any = None

        def __init__(self, connection: Connection) -> None:
            self.connection = connection
            self.seen: list[Any] = []

        def get_consumers(self, Consumer_: Any, channel: Any) -> list[Any]:
            self.channel2 = channel.connection.client.channel()
            return [
                Consumer(channel, [Queue("one")], callbacks=[self.on_message]),
                Consumer(self.channel2, [Queue("two")], callbacks=[self.on_special_message]),
            ]

        def on_message(self, body: Any, message: Any) -> None:
            self.seen.append(("plain", body))
            message.ack()

        def on_special_message(self, body: Any, message: Any) -> None:
            self.seen.append(("special", body))
            message.ack()
            self.should_stop = len(self.seen) == 2

        def on_consume_end(self, connection: Connection, default_channel: Any) -> None:
            if self.channel2:
                self.channel2.close()

    with Connection(URL) as connection:
        for name in ("one", "two"):
            Queue(name).declare(channel=connection.default_channel)
        connection.Producer().publish(1, routing_key="one")
        program = C(connection)
        list(program.consume(limit=1))
        connection.Producer().publish(2, routing_key="two")
        program.run()
    assert program.seen == [("plain", 1), ("special", 2)]


# -- the task queue of section 2.5.1

work_exchange = Exchange("g2_5_1_work", type="direct")
work_queues = [
    Queue(name, work_exchange, routing_key=name) for name in ("urgent", "normal", "later")
]
keys = {"high": "urgent", "mid": "normal", "low": "later"}
greeted: list[str] = []


def greet(name: str = "you") -> None:
    greeted.append(f"Good morning {name}")


def stumble() -> None:
    raise ZeroDivisionError


class Worker(ConsumerMixin):
    def __init__(self, connection: Connection, tasks: int) -> None:
        self.connection = connection
        self.left = tasks

    def get_consumers(self, Consumer: Callable[..., Any], channel: Any) -> list[Any]:
        return [Consumer(queues=work_queues, accept=["pickle"], callbacks=[self.on_work])]

    def on_work(self, body: Any, message: Any) -> None:
        fun, args, kwargs = body["fun"], body["args"], body["kwargs"]
        self.info("working on %s", reprcall(fun.__name__, args, kwargs))
        try:
            fun(*args, **kwdict(kwargs))
        except Exception as exc:
            self.error("work failed: %r", exc)
        message.ack()
        self.left -= 1
        self.should_stop = not self.left


def send_later(
    connection: Connection,
    fun: Callable[..., Any],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    priority: str = "mid",
) -> None:
    payload = {"fun": fun, "args": args, "kwargs": kwargs or {}}
    with producers[connection].acquire(block=True) as producer:
        for queue in work_queues:
            maybe_declare(queue, producer.channel)
        producer.publish(
            payload,
            exchange=work_exchange,
            serializer="pickle",
            compression="bzip2",
            routing_key=keys[priority],
        )


def test_g2_5_1_a_task_queue(caplog: pytest.LogCaptureFixture) -> None:
    greeted.clear()
    with Connection(URL) as connection:
        send_later(connection, greet, args=("Ada",))
        send_later(connection, greet, kwargs={"name": "Bob"}, priority="high")
        send_later(connection, stumble, priority="low")
        worker = Worker(connection, 3)
        with caplog.at_level("INFO"):
            worker.run()
    assert sorted(greeted) == ["Good morning Ada", "Good morning Bob"]
    assert "working on greet('Ada')" in caplog.text
    assert "work failed: ZeroDivisionError()" in caplog.text


# -- the logger of section 2.6.1


class Journal:
    def __init__(
        self,
        connection: Connection,
        queue_name: str = "journal",
        serializer: str = "json",
        compression: str | None = None,
    ) -> None:
        self.queue = connection.SimpleQueue(queue_name)
        self.serializer = serializer
        self.compression = compression

    def log(self, message: str, level: str = "INFO", context: dict[str, Any] | None = None) -> None:
        self.queue.put(
            {
                "message": message,
                "level": level,
                "context": context or {},
                "hostname": socket.gethostname(),
                "timestamp": time.time(),
            },
            serializer=self.serializer,
            compression=self.compression,
        )

    def process(self, callback: Callable[[Any], Any], n: int = 1, timeout: float = 10) -> None:
        for _ in range(n):
            entry = self.queue.get(block=True, timeout=timeout)
            callback(entry.payload)
            entry.ack()

    def close(self) -> None:
        self.queue.close()


def test_g2_6_1_simple_queues_as_a_log() -> None:
    entries: list[Any] = []
    with Connection(URL) as conn, closing(Journal(conn, compression="zlib")) as journal:
        journal.log(
            "the disk is full",
            level="ERROR",
            context={"disk": "/dev/sda"},
        )
        journal.process(entries.append, n=1)
        assert len(journal.queue) == 0
    (entry,) = entries
    assert (entry["level"], entry["context"]) == ("ERROR", {"disk": "/dev/sda"})
    assert datetime.fromtimestamp(entry["timestamp"]).year >= 2024


# -- pools, section 2.7


def test_g2_7_1_one_pool_for_equal_connections() -> None:
    pool = connections[Connection(URL)]
    assert connections[Connection(URL)] is pool
    with pool.acquire(block=True) as conn:
        assert conn.as_uri().startswith("memory://")
    other = Connection("memory://elsewhere")
    with pool.acquire(block=True) as conn1, connections[other].acquire(block=True) as conn2:
        assert conn1 is not conn2


def test_g2_7_2_publishing_with_a_pooled_producer() -> None:
    newspaper = Exchange("g2_7_2_news")
    article = {"title": "Rain", "text": "It rained on Monday."}
    connection = Connection(URL)
    queue = Queue("news", newspaper, routing_key="weather")
    with producers[connection].acquire(block=True) as producer:
        maybe_declare(queue, producer.channel)
        producer.publish(
            article,
            exchange=newspaper,
            routing_key="weather",
            serializer="json",
            compression="zlib",
        )
    with connections[connection].acquire(block=True) as conn:
        message = queue(conn.default_channel).get(no_ack=True)
        assert message.payload == article
        assert message.headers["compression"] == "application/x-gzip"


def test_g2_7_3_custom_groups() -> None:
    own_connections = pools.Connections(limit=100)
    own_producers = pools.Producers(limit=own_connections.limit)
    connection = Connection(URL)
    with own_connections[connection].acquire(block=True) as conn:
        assert conn is not connection
    assert own_producers.limit == 100
    by_default = pools.Connections(limit=pools.use_default_limit)
    assert by_default[connection].limit == pools.get_limit()
    for group in (own_connections, own_producers, by_default):
        group.clear()


# -- serialization, section 2.8


def test_g2_8_1_serializers_of_producer_and_message() -> None:
    with Connection(URL) as connection:
        queue = Queue("news")(connection.default_channel)
        queue.declare()
        producer = Producer(connection, serializer="json")
        producer.publish({"a": [1, 2]}, routing_key="news")
        producer.publish({"a": (1, 2)}, routing_key="news", serializer="pickle")
        first, second = (queue.get(no_ack=True, accept=["json", "pickle"]) for _ in range(2))
        assert first.payload == {"a": [1, 2]}
        assert second.payload == {"a": (1, 2)}


def test_g2_8_2_raw_data() -> None:
    with Connection(URL) as connection:
        queue = Queue("news")(connection.default_channel)
        queue.declare()
        connection.Producer().publish(
            b"\xff\xd8\xff",
            routing_key="news",
            content_type="image/jpeg",
            content_encoding="binary",
        )
        message = queue.get(no_ack=True)
        assert (message.content_type, message.content_encoding) == ("image/jpeg", "binary")
        assert message.body == b"\xff\xd8\xff"
