"""Bad arguments: the same typed error on memory and AMQP, nothing sent, the channel usable."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu.entity import UnknownDeliveryModeError
from greenkombu.exceptions import (
    ArgumentError,
    CompressorNotInstalled,
    EncodeError,
    KombuError,
    UnknownSerializer,
)

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ

numbers = itertools.count(1)


@pytest.fixture(scope="module", params=["memory", "rabbitmq"])
def url(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    server: PrivateRabbitMQ = request.getfixturevalue("rabbitmq")
    return server.url


@pytest.fixture
def connection(url: str) -> Iterator[Connection]:
    with Connection(url) as made:
        made.connect()
        yield made


@pytest.fixture
def channel(connection: Connection) -> Iterator[Any]:
    made = connection.channel()
    yield made
    made.close()


@pytest.fixture
def queue(channel: Any) -> Iterator[Any]:
    made = Queue(f"arguments-{next(numbers)}")(channel)
    made.declare()
    yield made
    made.delete()


def take(queue: Any) -> Any:
    """Take a message that is on its way."""
    until = time.monotonic() + 15
    while (message := queue.get(no_ack=True)) is None:
        assert time.monotonic() < until, "nothing has come"
    return message


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"priority": "abc"}, ArgumentError, r"priority .* from 0 to 255, not 'abc'"),
    ({"priority": -1}, ArgumentError, r"priority .* not -1"),
    ({"priority": 256}, ArgumentError, r"priority .* not 256"),
    ({"priority": [1]}, ArgumentError, r"priority .* not \[1\]"),
    ({"priority": float("nan")}, ArgumentError, r"priority .* not nan"),
    ({"headers": [1]}, ArgumentError, r"headers must be a mapping .* not \[1\]"),
    ({"headers": "ab"}, ArgumentError, "headers must be a mapping"),
    ({"headers": 5}, ArgumentError, "headers must be a mapping"),
    ({"delivery_mode": "x"}, UnknownDeliveryModeError, "delivery mode 'x'; use 1, 2 or one of"),
    ({"delivery_mode": 7}, UnknownDeliveryModeError, "delivery mode 7"),
    ({"delivery_mode": -1}, UnknownDeliveryModeError, "delivery mode -1"),
    ({"delivery_mode": [1]}, UnknownDeliveryModeError, r"delivery mode \[1\]"),
    ({"expiration": "x"}, ArgumentError, "expiration must be a number of seconds.* not 'x'"),
    ({"expiration": -1}, ArgumentError, "expiration .* not -1"),
    ({"expiration": float("nan")}, ArgumentError, "expiration .* not nan"),
    ({"expiration": float("inf")}, ArgumentError, "expiration .* not inf"),
    ({"expiration": 1e12}, ArgumentError, "expiration must be at most 4294967 seconds"),
    ({"timeout": "x"}, ArgumentError, "timeout must be a number of seconds.* not 'x'"),
    ({"timeout": float("nan")}, ArgumentError, "timeout .* not nan"),
    ({"confirm_timeout": "x"}, ArgumentError, "confirm_timeout must be .* not 'x'"),
    ({"declare": ["x"]}, ArgumentError, r"declare must be a list of exchanges.* not \['x'\]"),
    ({"declare": 5}, ArgumentError, "declare must be .* not 5"),
    ({"declare": Queue("x")}, ArgumentError, "declare must be .* not <.*Queue x"),
    ({"content_type": 5}, ArgumentError, "content_type must be a string, not 5"),
    (
        {"content_type": "text/plain", "content_encoding": 5},
        ArgumentError,
        "content_encoding must be a string, not 5",
    ),
    ({"content_type": "text/plain", "content_encoding": "nope"}, EncodeError, "'nope'"),
    ({"compression": "nope"}, CompressorNotInstalled, "no compression 'nope'; there are .*gzip"),
    ({"compression": 5}, CompressorNotInstalled, "no compression 5; there are"),
    ({"serializer": "nope"}, UnknownSerializer, "'nope' is installed; there are json"),
    ({"serializer": 5}, UnknownSerializer, "no serializer 5 is installed"),
    ({"routing_key": 5}, ArgumentError, "routing_key must be a string, not 5"),
    ({"exchange": 5}, ArgumentError, "exchange must be a string, not 5"),
    ({"exchange": ["e"]}, ArgumentError, r"exchange must be a string, not \['e'\]"),
]


@pytest.mark.parametrize("retry", [False, True], ids=["once", "retry"])
@pytest.mark.parametrize(
    ("arguments", "error", "text"), BAD, ids=[str(arguments) for arguments, _, _ in BAD]
)
def test_publish_names_the_argument_and_what_it_may_be(
    channel: Any,
    queue: Any,
    arguments: dict[str, Any],
    error: type[Exception],
    text: str,
    retry: bool,
) -> None:
    producer = Producer(channel)
    with pytest.raises(error, match=text) as caught:
        producer.publish("bad", **{"routing_key": queue.name, "retry": retry, **arguments})
    assert isinstance(caught.value, KombuError)
    assert not channel.closed
    # The good one is the only one that has come, over the same channel.
    producer.publish("good", routing_key=queue.name)
    assert take(queue).payload == "good"
    assert queue.queue_declare(passive=True).message_count == 0


@pytest.mark.parametrize("arguments", [{"exchange": 5}, {"routing_key": 5}], ids=str)
def test_bad_defaults_of_a_producer(channel: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match="must be a string, not 5"):
        Producer(channel, **arguments).publish("bad")
    assert not channel.closed


@pytest.mark.parametrize("count", ["x", -1, 1.5, [1]], ids=repr)
def test_prefetch_count_is_refused_before_anything_is_declared(channel: Any, count: Any) -> None:
    name = f"arguments-{next(numbers)}"
    with pytest.raises(ArgumentError, match=r"prefetch_count must be a whole number of messages"):
        Consumer(channel, [Queue(name)], prefetch_count=count)
    with pytest.raises(channel.connection.client.channel_errors):
        channel.connection.client.channel().queue_declare(name, passive=True)
    consumer = Consumer(channel)
    with pytest.raises(ArgumentError, match="prefetch_count must be"):
        consumer.qos(prefetch_count=count)
    consumer.qos(prefetch_count=1)
    assert not channel.closed


def test_what_is_sensible_is_taken(channel: Any, queue: Any) -> None:
    producer = Producer(channel)
    producer.publish(
        "good",
        routing_key=queue.name.encode(),
        exchange=b"",
        priority="3",
        headers=[("a", 1)],
        delivery_mode="transient",
        expiration="60",
    )
    message = take(queue)
    assert message.headers == {"a": 1}
    properties = message.properties
    assert (properties["priority"], properties["delivery_mode"]) == (3, 1)
    assert properties["expiration"] == "60000"


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Queue(5), "the name of a queue must be a string, not 5"),
        (lambda: Exchange(5), "the name of an exchange must be a string, not 5"),
        (lambda: Queue("q", max_length="x"), "max_length of a Queue cannot be 'x'"),
        (lambda: Queue("q", message_ttl="soon"), "message_ttl of a Queue cannot be 'soon'"),
        (lambda: Queue("q", expires=[1]), r"expires of a Queue cannot be \[1\]"),
        (lambda: Queue("q", exchange=5), "exchange must be an Exchange, a name or bindings, not 5"),
        (lambda: Consumer(None, "q"), "a consumer takes Queue objects, not 'q'"),
        (lambda: Consumer(None, ["q"]), "a consumer takes Queue objects, not 'q'"),
        (lambda: Consumer(None, 5), "a consumer takes Queue objects, not 5"),
        (lambda: Consumer(None, callbacks=5), "callbacks must be a list of functions, not 5"),
        (lambda: Consumer(None, callbacks=[5]), r"callbacks must be .*, not \[5\]"),
        (lambda: Consumer(None).register_callback(5), r"callback must be .* not \[5\]"),
        (lambda: Consumer(None, accept=5), r"accept must be a list of content types.* not 5"),
        (lambda: Consumer(None, accept=[5]), r"accept must be .* not \[5\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_entities_and_consumers_name_what_they_cannot_take(
    make: Callable[[], object], text: str
) -> None:
    with pytest.raises(ArgumentError, match=text):
        make()


def test_names_are_text(channel: Any) -> None:
    for declare in (
        lambda: channel.queue_declare(["q"]),
        lambda: channel.exchange_declare(5, "direct"),
        lambda: channel.prepare_queue_arguments({}, max_length="x"),
    ):
        with pytest.raises(ArgumentError, match=r"must be a (string|number), not"):
            declare()
    assert not channel.closed


def test_routing_key_of_a_binding_is_text(channel: Any, queue: Any) -> None:
    exchange = Exchange(queue.name, auto_delete=True)(channel)
    exchange.declare()
    with pytest.raises(ArgumentError, match="routing_key must be a string, not"):
        queue.bind_to(exchange, 5)
    assert not channel.closed
    exchange.delete()
