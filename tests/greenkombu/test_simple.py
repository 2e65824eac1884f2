"""greenkombu.simple: behaviours 108-115."""

from __future__ import annotations

import queue as stdlib_queue
import time
from collections.abc import Iterator

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.simple import SimpleBuffer, SimpleQueue
from hub.environment import Environment


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.node.name
    with Connection("memory://") as cleaner:
        cleaner.default_channel.queue_delete(request.node.name)


def test_b108_one_name_for_queue_exchange_and_routing_key(
    connection: Connection, name: str
) -> None:
    with connection.SimpleQueue(name) as simple:
        assert (simple.queue.name, simple.queue.exchange.name, simple.queue.routing_key) == (
            name,
            name,
            name,
        )
        simple.put({"a": 1})
        assert simple.get(timeout=10).payload == {"a": 1}


def test_b108_a_queue_in_place_of_the_name(connection: Connection, name: str) -> None:
    with connection.SimpleQueue(Queue(name, Exchange(name, "topic"), "a.*")) as simple:
        assert simple.producer.exchange.type == "topic"
        simple.put(1, routing_key="a.b")
        assert simple.get(timeout=10).payload == 1


def test_b108_a_queue_on_the_default_exchange(connection: Connection, name: str) -> None:
    with connection.SimpleQueue(Queue(name)) as simple:
        simple.put(1)
        assert simple.get(timeout=10).payload == 1


def test_b109_empty_like_the_standard_library(connection: Connection, name: str) -> None:
    with connection.SimpleQueue(name) as simple:
        assert simple.Empty is stdlib_queue.Empty
        for call in (simple.get_nowait, lambda: simple.get(block=False)):
            with pytest.raises(stdlib_queue.Empty):
                call()
        started = time.monotonic()
        with pytest.raises(stdlib_queue.Empty):
            simple.get(timeout=0.2)
        assert 0.15 < time.monotonic() - started < 10
        with pytest.raises(stdlib_queue.Empty):
            simple.get(timeout=0)
        simple.put(1)
        assert simple.get_nowait().payload == 1, "also when a consumer is running"


def test_b109_get_waits_for_a_message(connection: Connection, name: str, env: Environment) -> None:
    with connection.SimpleQueue(name) as simple:

        def put_later() -> None:
            env.sleep(0.05)
            with Connection("memory://") as other, other.SimpleQueue(name) as theirs:
                theirs.put("late")

        task = env.spawn(put_later)
        assert simple.get(timeout=10).payload == "late"
        assert task.join(10)


def test_b110_put_takes_headers_serializer_compression(connection: Connection, name: str) -> None:
    with connection.SimpleQueue(name) as simple:
        simple.put("text", serializer="json", headers={"h": 1}, compression="zlib", priority=3)
        message = simple.get(timeout=10)
        assert message.content_type == "application/json"
        assert message.headers["h"] == 1
        assert "compression" in message.headers
        assert message.payload == "text"
        message.ack()


def test_b111_sizes_and_clear(connection: Connection, name: str) -> None:
    with connection.SimpleQueue(name) as simple:
        assert (simple.qsize(), len(simple), bool(simple)) == (0, 0, True)
        for number in range(3):
            simple.put(number)
        assert (simple.qsize(), len(simple)) == (3, 3)
        assert simple.clear() == 3
        assert simple.clear() == 0


def test_b112_a_buffer_keeps_nothing(connection: Connection, name: str) -> None:
    with connection.SimpleBuffer(name) as simple:
        declared, exchange = simple.queue, simple.producer.exchange
        assert (declared.durable, declared.auto_delete, declared.exclusive) == (False, True, True)
        assert (exchange.durable, exchange.auto_delete, exchange.delivery_mode) == (False, True, 1)
        assert simple.no_ack is True
        simple.put("x")
        message = simple.get(timeout=10)
        message.ack()
        assert message.payload == "x"
    assert SimpleQueue.no_ack is False
    assert issubclass(SimpleBuffer, SimpleQueue)


def test_b113_the_context_closes_also_after_an_error(connection: Connection, name: str) -> None:
    simple = connection.SimpleQueue(name)

    def fail() -> None:
        with simple:
            simple.put(1)
            simple.get(timeout=10)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert simple.channel.closed
    with connection.SimpleQueue(name) as again:
        message = again.get(timeout=10)
        assert message.payload == 1, "what was not acknowledged is there again"
        message.ack()


def test_b114_a_given_channel_stays_open(connection: Connection, name: str) -> None:
    channel = connection.channel()
    with connection.SimpleQueue(name, channel=channel) as simple:
        assert simple.channel is channel
    assert not channel.closed
    with connection.SimpleQueue(name) as own:
        assert own.channel is not connection.default_channel
    assert own.channel.closed
    assert connection.connected


def test_b115_options_reach_the_declaration(connection: Connection, name: str) -> None:
    simple = connection.SimpleQueue(
        name,
        queue_opts={"durable": False},
        queue_args={"x-a": 1},
        exchange_opts={"type": "topic", "durable": False},
        serializer="json",
        compression="zlib",
    )
    with simple:
        assert simple.queue.durable is False
        assert simple.queue.queue_arguments == {"x-a": 1}
        assert (simple.queue.exchange.type, simple.queue.exchange.durable) == ("topic", False)
        assert (simple.producer.serializer, simple.producer.compression) == ("json", "zlib")
    assert SimpleQueue.queue_opts == {}, "the class's options are its own"


def test_accept_is_passed_on(connection: Connection, name: str) -> None:
    from greenkombu.exceptions import ContentDisallowed

    with connection.SimpleQueue(name, accept=["json"]) as simple:
        simple.put({"a": 1}, serializer="pickle")
        message = simple.get_nowait()
        with pytest.raises(ContentDisallowed):
            _ = message.payload
        message.reject()
