"""greenkombu.compat: behaviours 206-209."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu.compat import Consumer, ConsumerSet, Publisher, entry_to_queue
from greenkombu.connection import Connection
from greenkombu.entity import Exchange


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def name(request: pytest.FixtureRequest, connection: Connection) -> Iterator[str]:
    yield request.node.name
    for suffix in ("", ".2", ".3"):
        connection.default_channel.queue_delete(request.node.name + suffix)


def pair(connection: Connection, name: str) -> tuple[Publisher, Consumer]:
    consumer = Consumer(connection, queue=name, exchange=name, routing_key=name)
    return Publisher(connection, exchange=name, routing_key=name), consumer


def test_b206_attributes_of_the_class_can_be_overridden(connection: Connection) -> None:
    class News(Publisher):
        exchange = "b206"
        exchange_type = "fanout"
        routing_key = "all"
        durable = False
        auto_delete = True

    publisher = News(connection)
    assert publisher.exchange == Exchange("b206", "fanout", durable=False, auto_delete=True)
    assert publisher.routing_key == "all"
    assert News(connection, exchange="other", exchange_type="topic").exchange.type == "topic"

    class Reader(Consumer):
        queue = "b206"
        exchange = "b206"
        exchange_type = "fanout"
        durable = False
        auto_delete = True

    with Reader(connection) as consumer:
        (declared,) = consumer.queues
        assert declared.name == "b206"
        assert declared.exchange == Exchange("b206", "fanout", durable=False, auto_delete=True)
        assert (declared.durable, declared.auto_delete) == (False, True)
        publisher.send("x")
        assert consumer.fetch(no_ack=True).payload == "x"
    connection.default_channel.queue_delete("b206")


def test_b207_fetch(connection: Connection, name: str) -> None:
    publisher, consumer = pair(connection, name)
    got: list[Any] = []
    consumer.register_callback(lambda body, message: got.append(body))
    publisher.send({"a": 1})
    publisher.send({"a": 2})
    assert consumer.fetch(no_ack=True).payload == {"a": 1}
    assert got == []
    assert consumer.fetch(no_ack=True, enable_callbacks=True).payload == {"a": 2}
    assert got == [{"a": 2}]
    assert consumer.fetch() is None
    with pytest.raises(NotImplementedError, match="enable_callbacks"):
        consumer.process_next()
    consumer.close()


def test_b207_iterconsume_and_wait(connection: Connection, name: str) -> None:
    publisher, consumer = pair(connection, name)
    got: list[Any] = []
    consumer.register_callback(lambda body, message: (got.append(body), message.ack()))
    for number in range(3):
        publisher.send(number)
    iteration = consumer.iterconsume(limit=1)
    next(iteration)
    with pytest.raises(StopIteration):
        next(iteration)
    assert len(consumer.wait(limit=2)) == 2
    assert got == [0, 1, 2]
    consumer.close()


def test_b207_iterqueue(connection: Connection, name: str) -> None:
    publisher, consumer = pair(connection, name)
    for number in range(4):
        publisher.send(number)
    assert [m.payload for m in consumer.iterqueue(limit=2)] == [0, 1]
    assert [m.payload for m in consumer.iterqueue()] == [2, 3]
    infinite = consumer.iterqueue(infinite=True)
    assert [next(infinite), next(infinite)] == [None, None]
    publisher.send("x")
    assert next(iter(consumer)).payload == "x"
    consumer.close()


def test_b207_discard_all(connection: Connection, name: str) -> None:
    publisher, consumer = pair(connection, name)
    publisher.send(1)
    publisher.send(2)
    with pytest.raises(NotImplementedError):
        consumer.discard_all(filterfunc=lambda message: True)
    assert consumer.discard_all() == 2
    consumer.close()


def test_close_closes_the_consumers_own_channel(connection: Connection, name: str) -> None:
    _, consumer = pair(connection, name)
    assert consumer.backend is consumer.channel
    assert consumer.channel is not connection.default_channel
    consumer.close()
    assert consumer.channel.closed


def test_b208_consumer_set(connection: Connection, name: str) -> None:
    first = Consumer(connection, queue=name, exchange=name, routing_key=name)
    channel = connection.channel()
    both = ConsumerSet(
        connection,
        from_dict={f"{name}.2": {"exchange": f"{name}.2", "binding_key": "k"}},
        consumers=[first],
        channel=channel,
    )
    assert both.channel is channel
    assert [queue.name for queue in both.queues] == [name, f"{name}.2"]
    added = both.add_queue_from_dict(f"{name}.3", exchange=f"{name}.3", routing_key="k")
    assert added.channel is channel
    third = Consumer(connection, queue=f"{name}.3", exchange=f"{name}.3")
    both.add_consumer(third)
    assert len(both.queues) == 3
    for exchange, key in ((name, name), (f"{name}.2", "k"), (f"{name}.3", "k")):
        Publisher(connection, exchange=exchange, routing_key=key).send("x")
    assert both.discard_all() == 3
    got: list[Any] = []
    both.register_callback(lambda body, message: got.append(body))
    Publisher(connection, exchange=name, routing_key=name).send("y")
    next(both.iterconsume(limit=1, no_ack=True))
    assert got == ["y"]
    both.close()
    assert not channel.closed, "a given channel stays open"
    for consumer in (first, third):
        consumer.close()
    own = ConsumerSet(connection)
    own.close()
    assert own.channel.closed


def test_b209_publisher(connection: Connection, name: str) -> None:
    channel = connection.channel()
    with Publisher(connection, exchange=name, channel=channel, routing_key="rk") as publisher:
        assert publisher.channel is channel
        assert publisher.backend is channel
        assert publisher.routing_key == "rk"
    assert Publisher(connection, exchange=name).channel is connection.default_channel
    assert Publisher(connection, exchange=Exchange("e", "topic")).exchange.type == "topic"


def test_b143_entry_to_queue_is_here_as_well() -> None:
    assert entry_to_queue("q", exchange="e", binding_key="k").routing_key == "k"


def test_b207_a_consumer_as_a_context_takes_nothing_behind_the_back_of_fetch(
    connection: Connection, name: str
) -> None:
    publisher, _ = pair(connection, name)
    with Consumer(connection, queue=name, exchange=name, routing_key=name) as consumer:
        assert not consumer.consuming_from(name)
        publisher.send("x")
        assert [message.payload for message in consumer.iterqueue(limit=2)] == ["x"]
