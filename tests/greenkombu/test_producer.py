"""greenkombu.messaging.Producer: behaviours 73-88."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Producer
from hub.environment import Environment
from tests.support.recording import RecordingChannel
from tests.support.tasks import in_child


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def queue(request: pytest.FixtureRequest, connection: Connection) -> Iterator[Queue]:
    """A declared, empty queue with an exchange and a routing key of its name."""
    name = request.node.name
    made = Queue(name, Exchange(name), name)(connection.default_channel)
    made.declare()
    yield made
    with Connection("memory://") as cleaner:
        cleaner.default_channel.queue_delete(name)


def published(channel: RecordingChannel) -> dict[str, Any]:
    """What the last publish sent: the arguments of basic_publish and those of prepare_message."""
    (arguments,) = channel.called("basic_publish")[-1:]
    sent = dict(arguments)
    return {**sent.pop(0), **sent}


# -- what is sent


def test_b073_json_by_default(connection: Connection, queue: Queue) -> None:
    Producer(connection).publish({"a": "\xe9"}, exchange=queue.exchange, routing_key=queue.name)
    message = queue.get(no_ack=True)
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.payload == {"a": "\xe9"}


def test_b085_text_and_bytes_are_not_serialized(connection: Connection, queue: Queue) -> None:
    producer = Producer(connection, queue.exchange, queue.name)
    producer.publish("t\xe9xt")
    producer.publish(b"\x00\xff")
    producer.publish("l\xe9tin", content_type="text/csv", content_encoding="latin-1")
    producer.publish(bytearray(b"raw"), content_type="image/x-raw")
    got = [queue.get(no_ack=True) for _ in range(4)]
    assert [(m.content_type, m.content_encoding, m.payload) for m in got[:2]] == [
        ("text/plain", "utf-8", "t\xe9xt"),
        ("application/data", "binary", b"\x00\xff"),
    ]
    assert [(m.content_type, m.content_encoding, m.body) for m in got[2:]] == [
        ("text/csv", "latin-1", b"l\xe9tin"),
        ("image/x-raw", "binary", b"raw"),
    ]


def test_b084_serializer_of_the_producer_and_of_the_message() -> None:
    channel = RecordingChannel()
    producer = Producer(channel, serializer="json")
    producer.publish("text")
    assert published(channel)["content_type"] == "application/json"
    producer.publish({"a": 1}, serializer="pickle")
    assert published(channel)["content_type"] == "application/x-python-serialize"
    assert pickle.loads(published(channel)["body"]) == {"a": 1}


@pytest.mark.parametrize("body", [{"a": ["text"] * 99}, "t\xe9xt" * 99, b"\x00\xff" * 99])
def test_b083_compression(connection: Connection, queue: Queue, body: Any) -> None:
    producer = Producer(connection, queue.exchange, queue.name, compression="zlib")
    headers = {"h": 1}
    producer.publish(body, headers=headers)
    producer.publish(body, compression="bzip2")
    first, second = queue.get(no_ack=True), queue.get(no_ack=True)
    assert first.headers == {"h": 1, "compression": "application/x-gzip"}
    assert second.headers["compression"] == "application/x-bz2"
    assert first.payload == second.payload == body
    assert headers == {"h": 1}, "the caller's headers are unchanged"


def test_b078_exchange_by_instance_or_name(connection: Connection, queue: Queue) -> None:
    producer = Producer(connection)
    assert queue.exchange is not None
    producer.publish(1, exchange=queue.exchange, routing_key=queue.name)
    producer.publish(2, exchange=queue.exchange.name, routing_key=queue.name)
    producer.publish(3, exchange="", routing_key=queue.name)
    assert [queue.get(no_ack=True).payload for _ in range(3)] == [1, 2, 3]


def test_b079_more_keywords_are_properties() -> None:
    channel = RecordingChannel()
    Producer(channel).publish(
        1, correlation_id="c", reply_to=Queue("answers"), type="t", headers={"h": 1}
    )
    sent = published(channel)
    assert sent["properties"] == {
        "correlation_id": "c",
        "reply_to": "answers",
        "type": "t",
        "delivery_mode": 2,
    }
    assert sent["headers"] == {"h": 1}


def test_b080_delivery_mode() -> None:
    channel = RecordingChannel()
    producer = Producer(channel, Exchange("e", delivery_mode="transient"), auto_declare=False)
    modes = []
    for arguments in (
        {},
        {"delivery_mode": 2},
        {"delivery_mode": "persistent"},
        {"exchange": "name"},
        {"exchange": Exchange("other", delivery_mode=1)},
        {"exchange": "name", "delivery_mode": "transient"},
    ):
        producer.publish(1, **arguments)
        modes.append(published(channel)["properties"]["delivery_mode"])
    assert modes == [1, 2, 2, 1, 1, 1]
    with pytest.raises(KeyError):
        producer.publish(1, delivery_mode="bogus")


def test_b081_priority_is_passed_on() -> None:
    channel = RecordingChannel()
    producer = Producer(channel)
    producer.publish(1)
    assert published(channel)["priority"] == 0
    producer.publish(1, priority=7)
    assert published(channel)["priority"] == 7


def test_b087_expiration_is_in_milliseconds_as_text() -> None:
    channel = RecordingChannel()
    producer = Producer(channel)
    for seconds, text in ((1.5, "1500"), (0, "0"), (60, "60000")):
        producer.publish(1, expiration=seconds)
        assert published(channel)["properties"]["expiration"] == text


def test_b087_an_expired_message_is_gone(
    connection: Connection, queue: Queue, env: Environment
) -> None:
    producer = Producer(connection, queue.exchange, queue.name)
    producer.publish("short", expiration=0.02)
    producer.publish("long", expiration=60)
    env.sleep(0.1)
    assert queue.get(no_ack=True).payload == "long"
    assert queue.get() is None


def test_flags_routing_key_and_timeouts_reach_the_channel() -> None:
    channel = RecordingChannel()
    producer = Producer(channel, Exchange("e"), routing_key="rk", auto_declare=False)
    producer.publish(1, mandatory=True, immediate=True)
    sent = published(channel)
    assert (sent["exchange"], sent["routing_key"]) == ("e", "rk")
    assert (sent["mandatory"], sent["immediate"]) == (True, True)
    assert "timeout" not in sent
    assert "confirm_timeout" not in sent
    producer.publish(1, routing_key="", timeout=3.0, confirm_timeout=2.0)
    sent = published(channel)
    assert sent["routing_key"] == ""
    assert 0 < sent["timeout"] <= 3.0
    assert sent["confirm_timeout"] == 2.0
    producer.publish(1, confirm_timeout=2.0)
    assert published(channel)["confirm_timeout"] == 2.0


# -- declaring


def test_b074_the_default_exchange_is_declared_once_before_the_first_message() -> None:
    channel = RecordingChannel()
    producer = Producer(channel, Exchange("e", "topic"))
    for number in range(3):
        producer.publish(number)
    assert channel.names()[:1] == ["exchange_declare"]
    assert len(channel.called("exchange_declare")) == 1
    channel = RecordingChannel()
    Producer(channel, Exchange("e"), auto_declare=False).publish(1)
    assert "exchange_declare" not in channel.names()
    producer.exchange = Exchange("another")
    producer.publish(1)
    assert producer.channel.called("exchange_declare")[-1]["exchange"] == "another"


def test_b077_entities_are_declared_once_for_each_connection(connection: Connection) -> None:
    seen: list[str] = []

    class Watched(Queue):
        def declare(self, nowait: bool = False, channel: Any = None) -> str:
            seen.append(self.name)
            return super().declare(nowait, channel)

    queue = Watched("b077", Exchange("b077"), "b077")
    producer = Producer(connection)
    for number in range(3):
        producer.publish(number, exchange="b077", routing_key="b077", declare=[queue])
    assert seen == ["b077"]
    bound = queue(connection.default_channel)
    assert [bound.get(no_ack=True).payload for _ in range(3)] == [0, 1, 2]
    connection.close()
    connection.connect()
    producer.publish(3, exchange="b077", routing_key="b077", declare=[queue])
    assert seen == ["b077", "b077"]
    queue(connection.default_channel).delete()


def test_b088_maybe_declare(connection: Connection) -> None:
    producer = Producer(connection)
    queue = Queue("b088", Exchange("b088"), "b088")
    assert producer.maybe_declare(queue) is True
    assert producer.maybe_declare(queue) is False
    assert producer.maybe_declare(queue, retry=True, max_retries=1) is False
    assert producer.maybe_declare(Queue("b088b"), retry=True, max_retries=1) is True
    producer.declare()
    for name in ("b088", "b088b"):
        connection.default_channel.queue_delete(name)


# -- channels and connections


def test_b075_a_connection_is_opened_at_the_first_use() -> None:
    connection = Connection("memory://")
    producer = Producer(connection, Exchange("b075"))
    assert not connection.connected
    assert producer.connection is connection
    assert producer.exchange is not None
    assert producer.exchange.is_bound
    assert not connection.connected
    producer.publish("x")
    assert connection.connected
    assert producer.channel is connection.default_channel
    assert producer.exchange.channel is connection.default_channel
    connection.close()


def test_b105_connection_of_a_producer_on_a_channel(connection: Connection) -> None:
    assert Producer(connection.channel()).connection is connection
    assert Producer(None).connection is None


def test_a_producer_without_channel_says_so() -> None:
    producer = Producer(None)
    with pytest.raises(exceptions.NotBoundError, match="publish"):
        producer.publish(1)
    channel = RecordingChannel()
    producer.revive(channel)
    producer.publish(1)
    assert channel.names() == ["prepare_message", "basic_publish"]


def test_b086_revive_moves_to_another_channel() -> None:
    first, second = RecordingChannel(), RecordingChannel()
    producer = Producer(first, Exchange("e"))
    producer.publish(1)
    producer.revive(second)
    assert producer.channel is second
    assert producer.exchange is not None
    assert producer.exchange.channel is second
    producer.publish(2)
    assert second.names() == ["exchange_declare", "prepare_message", "basic_publish"]
    assert len(first.called("basic_publish")) == 1


def test_a_new_channel_is_opened_after_the_old_one_closed(
    connection: Connection, queue: Queue
) -> None:
    producer = Producer(connection, queue.exchange, queue.name)
    producer.publish(1)
    connection.default_channel.close()
    producer.publish(2)
    connection.collect()
    producer.publish(3)
    again = queue.bind(connection)
    assert [again.get(no_ack=True).payload for _ in range(3)] == [1, 2, 3]


def test_s17_a_forked_child_opens_a_channel_of_its_own() -> None:
    connection = Connection("memory://")
    producer = Producer(connection, Exchange("s17"))
    producer.publish("in the parent")
    inherited = producer.channel

    def in_the_child() -> None:
        producer.publish("in the child")
        assert producer.channel is not inherited

    in_child(in_the_child)
    producer.publish("in the parent again")
    assert producer.channel is inherited
    connection.close()


def test_b062_the_context_releases() -> None:
    released: list[int] = []

    class Pooled(Producer):
        def release(self) -> None:
            released.append(1)

    with Pooled(RecordingChannel()) as producer:
        producer.publish(1)
    assert released == [1]
    producer.close()
    assert released == [1, 1]


def test_a_producer_pickles_with_its_connection() -> None:
    producer = Producer(
        Connection("memory://"), Exchange("e", "topic"), "rk", "json", False, "zlib"
    )
    again = pickle.loads(pickle.dumps(producer))
    assert again.connection.as_uri() == "memory://localhost//" or again.connection.as_uri()
    assert again.exchange == producer.exchange
    assert (again.routing_key, again.serializer, again.auto_declare, again.compression) == (
        "rk",
        "json",
        False,
        "zlib",
    )
    assert copy.copy(producer).exchange == producer.exchange


def test_a_subclass_gives_defaults() -> None:
    class News(Producer):
        exchange = Exchange("news", "topic")
        routing_key = "news.all"
        serializer = "json"

    channel = RecordingChannel()
    News(channel).publish("text")
    sent = published(channel)
    assert (sent["exchange"], sent["routing_key"]) == ("news", "news.all")
    assert sent["content_type"] == "application/json"


def test_b082_on_return_is_registered_on_the_channel() -> None:
    from collections import defaultdict

    def on_return(exc: Any, exchange: str, routing_key: str, message: Any) -> None: ...

    for kind in (set, list):
        channel = RecordingChannel()
        channel.events = defaultdict(kind)
        producer = Producer(channel, on_return=on_return)
        producer.publish(1, mandatory=True)
        producer.publish(2, mandatory=True)
        assert list(channel.events["basic_return"]) == [on_return]


# -- retries and deadlines


class FlakyChannel(RecordingChannel):
    """Publishes through another channel; the first *failures* publishes lose the connection."""

    def __init__(self, connection: Connection, failures: int) -> None:
        super().__init__()
        self.failures_left = failures
        self.connection = connection.connection
        self.real = connection.default_channel

    def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
        if name == "basic_publish":
            if self.failures_left:
                self.failures_left -= 1
                raise ConnectionResetError("the broker went away")
            return self.real.basic_publish(*args, **kwargs)
        return getattr(self.real, name)(*args, **kwargs)


def test_b076_retry_survives_a_lost_connection(connection: Connection, queue: Queue) -> None:
    producer = Producer(connection)
    producer.channel = FlakyChannel(connection, 1)
    seen: list[str] = []
    producer.publish(
        {"a": 1},
        exchange=queue.exchange,
        routing_key=queue.name,
        retry=True,
        retry_policy={
            "max_retries": 3,
            "interval_start": 0.01,
            "interval_step": 0,
            "errback": lambda exc, interval: seen.append(type(exc).__name__),
        },
    )
    assert seen == ["ConnectionResetError"]
    again = queue.bind(connection)
    assert again.get(no_ack=True).payload == {"a": 1}
    assert again.get() is None


def test_b076_without_retry_the_error_is_raised(connection: Connection, queue: Queue) -> None:
    producer = Producer(connection)
    producer.channel = FlakyChannel(connection, 1)
    with pytest.raises(ConnectionResetError):
        producer.publish(1, exchange=queue.exchange, routing_key=queue.name)


def test_b076_a_policy_that_ensure_does_not_know_is_an_error(connection: Connection) -> None:
    with pytest.raises(TypeError, match="bogus"):
        Producer(connection).publish(1, routing_key="x", retry=True, retry_policy={"bogus": 1})


def test_retry_without_a_connection_says_so() -> None:
    with pytest.raises(exceptions.NotBoundError, match="connection"):
        Producer(RecordingChannel()).publish(1, retry=True)


def test_s22_one_deadline_over_connecting_and_retries() -> None:
    # Nothing listens on port 9 of the loopback: each attempt fails at once, and is repeated.
    connection = Connection("redis-like-nothing", transport=RefusingTransport)
    started = time.monotonic()
    with pytest.raises(exceptions.OperationalError):
        Producer(connection).publish(
            1,
            retry=True,
            timeout=0.5,
            retry_policy={"interval_start": 0.05, "interval_step": 0.05, "interval_max": 0.2},
        )
    assert 0.3 < time.monotonic() - started < 10  # and not for ever
    assert RefusingTransport.attempts >= 2


def test_s22_the_deadline_covers_waits_inside_the_channel() -> None:
    from greenkombu.deadline import remaining

    class Slow(RecordingChannel):
        def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
            left.append((name, remaining(60.0)))
            return super()._answer(name, args, kwargs)

    left: list[tuple[str, float | None]] = []
    Producer(Slow(), Exchange("e")).publish(1, timeout=2.0, declare=[Queue("q")])
    assert [name for name, _ in left] == [
        "exchange_declare",
        "queue_declare",
        "prepare_message",
        "basic_publish",
    ]
    assert all(seconds is not None and seconds <= 2.0 for _, seconds in left)


def test_an_outer_deadline_reaches_the_channel() -> None:
    channel = RecordingChannel()
    with Deadline(1.0):
        Producer(channel).publish(1, timeout=60.0)
    assert published(channel)["timeout"] <= 1.0


def _refusing_transport() -> Any:
    from greenkombu.transport.base import Transport

    class RefusingTransport(Transport):
        connection_errors = (OSError,)
        attempts = 0

        def establish_connection(self) -> Any:
            type(self).attempts += 1
            raise ConnectionRefusedError("nobody listens")

    return RefusingTransport


RefusingTransport = _refusing_transport()


# -- bad input


def test_a_body_that_cannot_be_serialized_is_not_sent() -> None:
    channel = RecordingChannel()
    producer = Producer(channel)
    with pytest.raises(exceptions.EncodeError):
        producer.publish(object())
    with pytest.raises(exceptions.EncodeError, match="dict"):
        producer.publish({"a": 1}, content_type="application/json")
    with pytest.raises(exceptions.EncodeError, match="latin-1"):
        producer.publish("\u20ac", content_type="text/plain", content_encoding="latin-1")
    with pytest.raises(exceptions.EncodeError, match="nosuch"):
        producer.publish("x", content_type="text/plain", content_encoding="nosuch")
    with pytest.raises(exceptions.SerializerNotInstalled, match="nosuch"):
        producer.publish({}, serializer="nosuch")
    with pytest.raises(KeyError, match="nosuch"):
        producer.publish({}, compression="nosuch")
    assert "basic_publish" not in channel.names()


# -- batches


def test_batches_are_handed_over_together() -> None:
    channel = _batching_channel()
    producer = Producer(channel)
    assert producer.supports_batch_publish
    with producer.batch(max_size=3):
        for number in range(5):
            producer.publish(number, routing_key="rk")
        assert [len(batch) for batch in channel.batches] == [3]
    assert [len(batch) for batch in channel.batches] == [3, 2]
    assert channel.batches[0][0][1]["routing_key"] == "rk"
    producer.publish("after")
    assert len(channel.called("basic_publish")) == 1


def test_an_error_in_the_block_drops_what_was_not_handed_over() -> None:
    channel = _batching_channel()
    producer = Producer(channel)

    def fail() -> None:
        with producer.batch():
            producer.publish(1)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert channel.batches == []
    producer.publish(2)
    assert len(channel.called("basic_publish")) == 1


def test_a_failed_batch_says_that_the_outcome_is_uncertain() -> None:
    channel = _batching_channel()
    channel.failures["basic_publish_batch"] = ConnectionResetError("gone")
    producer = Producer(channel)
    with pytest.raises(exceptions.BatchPublishError, match="1 messages"), producer.batch():
        producer.publish(1)


def test_other_tasks_are_not_in_the_batch(env: Environment) -> None:
    channel = _batching_channel()
    producer = Producer(channel)
    with producer.batch():
        producer.publish("mine")
        task = env.spawn(producer.publish, "theirs")
        assert task.join(10)
        assert len(channel.called("basic_publish")) == 1
    assert len(channel.batches) == 1


def test_without_support_a_batch_publishes_at_once(connection: Connection, queue: Queue) -> None:
    producer = Producer(connection, queue.exchange, queue.name)
    assert not producer.supports_batch_publish
    with producer.batch():
        producer.publish(1)
        assert queue.get(no_ack=True).payload == 1


@pytest.mark.parametrize("size", [0, -1, 1.5, None, True])
def test_a_batch_needs_a_size(size: Any) -> None:
    with pytest.raises(ValueError, match="max_size"):
        Producer(RecordingChannel()).batch(size)


def _batching_channel() -> Any:
    from types import SimpleNamespace

    class Batching(RecordingChannel):
        def __init__(self) -> None:
            super().__init__()
            self.batches: list[list[Any]] = []
            transport = SimpleNamespace(implements=SimpleNamespace(batch_publish=True))
            self.connection = SimpleNamespace(
                client=SimpleNamespace(transport=transport, declared_entities=set())
            )

        def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
            if name == "basic_publish_batch":
                self.batches.append(list(args[0]))
            return super()._answer(name, args, kwargs)

    return Batching()
