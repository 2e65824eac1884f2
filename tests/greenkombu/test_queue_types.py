"""Quorum queues, streams and dead letters on a real RabbitMQ, and what it refuses of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator
from typing import Any

import amqp
import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu._amqp.errors import ArgumentError
from greenkombu.exceptions import NotEquivalentError, UnsupportedOperation
from hub.environment import Environment
from tests.support.tasks import LONG, until


@pytest.fixture
def connection(rabbitmq_vhost: str) -> Iterator[Connection]:
    with Connection(rabbitmq_vhost, transport_options={"confirm_publish": True}) as made:
        yield made


def declare(connection: Connection, kind: str, name: str = "", **arguments: Any) -> Queue:
    queue = Queue(name or kind, queue_arguments={"x-queue-type": kind, **arguments})
    queue(connection.default_channel).declare()
    return queue


def fill(connection: Connection, queue: Queue, count: int) -> None:
    producer = Producer(connection, routing_key=queue.name)
    for number in range(count):
        producer.publish(number)


def drain(connection: Connection, got: list[Any], count: int) -> None:
    while len(got) < count:
        connection.drain_events(timeout=LONG)


def nothing_more(connection: Connection) -> None:
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)


def bodies(messages: list[Any]) -> list[Any]:
    return [message.payload for message in messages]


# -- quorum queues


def test_each_consumer_of_a_quorum_queue_has_its_own_prefetch(connection: Connection) -> None:
    queue = declare(connection, "quorum")
    fill(connection, queue, 10)
    got: list[Any] = []
    channel = connection.channel()
    for _ in range(2):
        Consumer(channel, queue, on_message=got.append, prefetch_count=2).consume()
    drain(connection, got, 4)
    nothing_more(connection)
    got[0].ack()
    drain(connection, got, 5)
    assert sorted(bodies(got)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["quorum", "stream"])
def test_a_global_prefetch_is_refused_with_the_remedy_before_it_ends_the_connection(
    connection: Connection, kind: str
) -> None:
    queue = declare(connection, kind)
    channel = connection.channel()
    consumer = Consumer(channel, queue, on_message=print)
    consumer.qos(prefetch_count=3, apply_global=True)
    with pytest.raises(UnsupportedOperation, match=rf"'{kind}' is a {kind}.*prefetch_count") as got:
        consumer.consume()
    assert not isinstance(got.value, connection.connection_errors), "it would be tried for ever"
    # The channel has lost nothing, and serves queues that can, or itself after the remedy.
    with Consumer(channel, declare(connection, "classic"), on_message=print):
        pass
    consumer.qos(prefetch_count=0, apply_global=True)
    consumer.qos(prefetch_count=3)
    consumer.consume()
    assert connection.connected


def test_a_queue_that_is_declared_anew_is_of_its_new_kind(connection: Connection) -> None:
    channel = connection.channel()
    declare(connection, "quorum", "q")
    channel.queue_delete("q")
    declare(connection, "classic", "q")
    channel.basic_qos(0, 3, True)
    channel.basic_consume("q", callback=print)
    other = connection.channel()
    other.queue_delete("q")
    declare(connection, "quorum", "q")
    with pytest.raises(UnsupportedOperation):
        channel.basic_consume("q", callback=print)


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
def test_nothing_is_refused_for_what_a_queue_was_before_somebody_else_deleted_it(
    connection: Connection, rabbitmq_vhost: str, scheme: str
) -> None:
    with Connection(rabbitmq_vhost.replace("amqp", scheme, 1)) as mine:
        declare(mine, "quorum", "q")
        mine.default_channel.basic_consume("q", callback=print)
        connection.default_channel.queue_delete("q")
        declare(connection, "classic", "q")
        with pytest.raises(amqp.ConsumerCancelled):
            mine.drain_events(timeout=LONG)
        channel = mine.channel()
        channel.basic_qos(0, 3, True)
        channel.basic_consume("q", callback=print)


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
def test_a_request_that_ends_the_connection_is_the_error_of_its_own_task_only(
    rabbitmq_vhost: str, env: Environment, scheme: str
) -> None:
    """A queue of an unknown kind: the broker decides, and ends the connection for all."""
    url = rabbitmq_vhost.replace("amqp://", f"{scheme}://", 1)
    with Connection(rabbitmq_vhost) as other, Connection(url) as connection:
        declare(other, "quorum")
        producer = Producer(connection.channel(), routing_key="quorum")
        channel = connection.channel()
        channel.basic_qos(0, 3, True)
        established = connection.connection

        def drain_on() -> Any:
            try:
                while True:
                    established.drain_events(timeout=LONG)
            except connection.connection_errors as error:
                return error

        drainer = env.spawn(drain_on)
        with pytest.raises(amqp.AMQPNotImplementedError, match=r"'quorum'.*prefetch_count") as got:
            channel.basic_consume("quorum", callback=print)
        assert got.value.code == 540
        error = drainer.result(LONG)
        assert isinstance(error, connection.recoverable_connection_errors), error
        assert "another task" in str(error)
        assert "'quorum'" in str(error)
        # So that whoever retries goes on.
        producer.publish("later", retry=True, retry_policy={"max_retries": 3})
        until(env, lambda: other.channel().queue_declare("quorum", passive=True)[1] == 1)


def test_poison_messages_of_a_quorum_queue_go_to_its_dead_letter_exchange(
    connection: Connection,
) -> None:
    dead = declare(connection, "classic", "dead")
    queue = declare(
        connection,
        "quorum",
        **{
            "x-delivery-limit": 1,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "dead",
        },
    )
    fill(connection, queue, 1)
    got: list[Any] = []
    with Consumer(connection, queue, on_message=got.append):
        for count in (1, 2):
            drain(connection, got, count)
            got[-1].requeue()
        with Consumer(connection, dead, on_message=got.append):
            drain(connection, got, 3)
    assert [message.headers.get("x-delivery-count", 0) for message in got[:2]] == [0, 1]
    assert got[2].headers["x-death"][0]["reason"] == "delivery_limit"
    got[2].ack()


# -- streams


@pytest.mark.parametrize(
    ("offset", "expected"),
    [
        ("first", [0, 1, 2, 3, 4]),
        (3, [3, 4]),
        (datetime.datetime(2020, 1, 1), [0, 1, 2, 3, 4]),
        ("1h", [0, 1, 2, 3, 4]),
        ("next", [5]),
    ],
    ids=["first", "number", "time", "interval", "next"],
)
def test_a_stream_is_read_from_where_the_consumer_says(
    connection: Connection, offset: Any, expected: list[int]
) -> None:
    queue = declare(connection, "stream")
    fill(connection, queue, 5)
    got: list[Any] = []
    stream = Queue("stream", no_declare=True, consumer_arguments={"x-stream-offset": offset})
    # Each ack is credit for one more message.
    with Consumer(connection, stream, on_message=got.append, prefetch_count=2):
        if offset == "next":
            Producer(connection, routing_key="stream").publish(5)
        for count in range(1, len(expected) + 1):
            drain(connection, got, count)
            got[-1].ack()
    assert bodies(got) == expected
    assert [message.headers["x-stream-offset"] for message in got] == expected


def test_every_consumer_of_a_stream_gets_every_message(connection: Connection) -> None:
    queue = declare(connection, "stream")
    fill(connection, queue, 5)
    queue.consumer_arguments = {"x-stream-offset": "first"}
    readers: list[list[Any]] = [[], []]
    # The default prefetch is enough for a stream's demand of one.
    for got in readers:
        Consumer(connection.channel(), queue, on_message=got.append).consume()
    while min(map(len, readers)) < 5:
        connection.drain_events(timeout=LONG)
    assert [bodies(got) for got in readers] == [[0, 1, 2, 3, 4]] * 2


@pytest.mark.parametrize("settle", ["reject", "requeue"])
def test_a_message_of_a_stream_cannot_be_given_back(connection: Connection, settle: str) -> None:
    queue = declare(connection, "stream")
    fill(connection, queue, 1)
    queue.consumer_arguments = {"x-stream-offset": "first"}
    got: list[Any] = []
    with Consumer(connection, queue, on_message=got.append):
        drain(connection, got, 1)
        with pytest.raises(UnsupportedOperation, match="ack"):
            getattr(got[0], settle)()
        got[0].ack()
    assert connection.connected


@pytest.mark.parametrize("waiting_in", ["inbox", "socket"])
def test_a_consumer_of_a_stream_is_cancelled_with_messages_waiting(
    connection: Connection, env: Environment, waiting_in: str
) -> None:
    queue = declare(connection, "stream")
    fill(connection, queue, 200)
    queue.consumer_arguments = {"x-stream-offset": "first"}
    got: list[Any] = []
    channel = connection.channel()
    consumer = Consumer(channel, queue, on_message=got.append, prefetch_count=100)
    consumer.consume()
    if waiting_in == "inbox":
        until(env, lambda: len(connection.connection.inbox) > 50)
    consumer.cancel()
    nothing_more(connection)
    assert got == []
    # The broker would have closed the connection before it answers this.
    assert channel.queue_declare("stream", passive=True).queue == "stream"


@pytest.mark.parametrize("offset", ["", "yesterday", "FIRST", 1.5, True, None, [1]], ids=repr)
def test_a_place_that_no_stream_has_is_refused_before_it_is_sent(
    connection: Connection, offset: Any
) -> None:
    declare(connection, "stream")
    channel = connection.channel()
    with pytest.raises(ArgumentError, match="x-stream-offset"):
        channel.basic_consume("stream", callback=print, arguments={"x-stream-offset": offset})
    assert channel.basic_consume("stream", callback=print, arguments={"x-stream-offset": 0})


@pytest.mark.parametrize(
    ("operation", "kind", "remedy"),
    [
        (
            lambda c: c.basic_consume("stream", no_ack=True, callback=print),
            amqp.PreconditionFailed,
            "basic_qos",
        ),
        (lambda c: c.basic_get("stream"), amqp.AMQPNotImplementedError, "start a consumer"),
        (lambda c: c.queue_purge("stream"), amqp.AMQPNotImplementedError, "x-max-age"),
    ],
    ids=["no_ack", "get", "purge"],
)
def test_what_streams_cannot_is_refused_with_the_remedy(
    connection: Connection,
    rabbitmq_vhost: str,
    operation: Callable[[Any], Any],
    kind: type[Exception],
    remedy: str,
) -> None:
    declare(connection, "stream")
    ended = kind is amqp.AMQPNotImplementedError
    for url in (rabbitmq_vhost, rabbitmq_vhost.replace("amqp://", "pika://", 1)):
        with Connection(url) as other:  # it does not know what it is
            with pytest.raises(kind, match=remedy):
                operation(other.channel())
            declare(other, "stream")
            with pytest.raises(UnsupportedOperation if ended else kind, match=remedy):
                operation(other.channel())
            assert other.connected


# -- declarations


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"durable": False}, "durable"),
        ({"auto_delete": True}, "not auto-delete"),
        ({"arguments": {"x-max-priority": 5}}, "leave it out"),
        ({"arguments": {"x-queue-type": "vapour"}}, "classic, quorum or stream"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["quorum", "stream"])
def test_a_queue_of_a_kind_that_has_no_such_thing(
    connection: Connection, kind: str, options: dict[str, Any], remedy: str
) -> None:
    settings = {"durable": True, "auto_delete": False, **options}
    settings["arguments"] = {"x-queue-type": kind, **options.get("arguments", {})}
    with pytest.raises(amqp.PreconditionFailed, match=remedy) as caught:
        connection.channel().queue_declare("new", **settings)
    assert not isinstance(caught.value, NotEquivalentError)


def test_a_queue_of_another_kind_is_not_equivalent(connection: Connection) -> None:
    declare(connection, "quorum", "q")
    with pytest.raises(NotEquivalentError, match="delete it"):
        declare(connection, "classic", "q")


# -- what classic queues have


@pytest.mark.parametrize(
    ("reason", "arguments", "count", "dead"),
    [
        ("expired", {"x-message-ttl": 20}, 1, [0]),
        ("maxlen", {"x-max-length": 1}, 2, [0]),
    ],
    ids=["expired", "maxlen"],
)
def test_expired_and_supernumerary_messages_are_dead_letters(
    connection: Connection, reason: str, arguments: dict[str, Any], count: int, dead: list[int]
) -> None:
    letters = Queue("letters", Exchange("dead", "fanout"))
    letters(connection.default_channel).declare()
    queue = declare(connection, "classic", **arguments, **{"x-dead-letter-exchange": "dead"})
    fill(connection, queue, count)
    got: list[Any] = []
    with Consumer(connection, letters, on_message=got.append):
        drain(connection, got, len(dead))
        got[0].ack()
    assert bodies(got) == dead
    assert got[0].headers["x-first-death-reason"] == reason


def test_the_consumer_with_the_higher_priority_comes_first(connection: Connection) -> None:
    queue = declare(connection, "classic")
    got: dict[int, list[Any]] = {0: [], 5: []}
    for priority, taken in got.items():
        Consumer(
            connection.channel(),
            Queue("classic", no_declare=True, consumer_arguments={"x-priority": priority}),
            on_message=taken.append,
            prefetch_count=2,
        ).consume()
    fill(connection, queue, 3)
    while sum(map(len, got.values())) < 3:
        connection.drain_events(timeout=LONG)
    assert (bodies(got[5]), bodies(got[0])) == ([0, 1], [2])
