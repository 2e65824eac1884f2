"""Bad input, as an outsider meets it: which error, what it names, and what is left after it.

docs/errors.md says the same in its table of what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue, exceptions

SOON = 5.0


@pytest.fixture
def connection() -> Iterator[Connection]:
    from greenkombu.transport import memory

    memory.broker.clear()
    with Connection("memory://user:sesame@here//") as made:
        yield made
    memory.broker.clear()


@pytest.fixture
def channel(connection: Connection) -> Any:
    return connection.channel()


@pytest.fixture
def queue(channel: Any) -> Any:
    made = Queue("tasks", Exchange("tasks"), "tasks")(channel)
    made.declare()
    return made


def ready(queue: Any) -> int:
    count: int = queue.queue_declare(passive=True).message_count
    return count


@pytest.mark.parametrize(
    ("url", "error", "names"),
    [
        ("nope://user:sesame@host//", exceptions.TransportNotFound, "nope"),
        ("memry://user:sesame@host//", exceptions.TransportNotFound, "Did you mean memory"),
        ("os.path://user:sesame@host//", exceptions.InvalidURL, "os.path"),
        ("memory://user:sesame@host:port//", exceptions.InvalidURL, "memory"),
        ("memory://user:sesame@[::1//", exceptions.InvalidURL, "memory"),
        ("memory://user:sesame@a;nope://user:sesame@b", exceptions.TransportNotFound, "nope"),
        ("memory:/user:sesame@host", exceptions.InvalidURL, "did you mean memory://"),
        ("broker/user:sesame@host", exceptions.InvalidURL, "transport://"),
        ("memory:sesame", exceptions.InvalidURL, "did you mean memory://sesame"),
        ("://user:sesame@host", exceptions.InvalidURL, "no transport"),
        ("memory:", exceptions.InvalidURL, "did you mean memory://"),
        ("memory://a;redis:localhost", exceptions.InvalidURL, "did you mean redis://localhost"),
        ("host:sesame@port", exceptions.InvalidURL, "transport://"),
        ("host:port", exceptions.InvalidURL, "host:port"),
    ],
)
def test_wrong_url(url: str, error: type[Exception], names: str) -> None:
    with pytest.raises(error) as caught:
        Connection(url).connect()
    assert isinstance(caught.value, exceptions.KombuError)
    assert names in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "nope://user:sesame@host",
        "memory://user:sesame@host:port//",
        "memory:sesame@host",
        "memory:/user:sesame@host",
        "user:sesame@host",
        "user:sesame@host?x",
    ],
)
def test_errors_of_urls_do_not_tell_the_password(url: str) -> None:
    with pytest.raises(exceptions.KombuError) as caught:
        Connection(url).connect()
    assert "sesame" not in f"{caught.value} {caught.value!r}"


CIRCULAR: list[Any] = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("body", "options", "error", "names"),
    [
        (object(), {}, exceptions.EncodeError, "json"),
        ({"a": {1, 2}.__iter__()}, {}, exceptions.EncodeError, "json"),
        (lambda: 1, {"serializer": "pickle"}, exceptions.EncodeError, "pickle"),
        (object(), {"serializer": "yaml"}, exceptions.EncodeError, "yaml"),
        (object(), {"serializer": "msgpack"}, exceptions.EncodeError, "msgpack"),
        (5, {"serializer": "raw"}, exceptions.EncodeError, "raw"),
        ("\ud800", {}, exceptions.EncodeError, "UTF-8"),
        (CIRCULAR, {}, exceptions.NestingTooDeep, "json"),
        ([1], {"content_type": "text/plain"}, exceptions.EncodeError, "text/plain"),
        ("x", {"serializer": "jsn"}, exceptions.UnknownSerializer, "jsn"),
    ],
)
def test_body_that_cannot_be_sent_leaves_everything_as_it_was(
    channel: Any, queue: Any, body: Any, options: Any, error: type[Exception], names: str
) -> None:
    producer = Producer(channel, queue.exchange, "tasks")
    with pytest.raises(error, match=names):
        producer.publish(body, **options)
    assert ready(queue) == 0
    producer.publish("fine")
    assert queue.get(no_ack=True).payload == "fine"


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"headers": {"a": "\ud800"}}, "header 'a'"),
        ({"headers": {"a": [{"b": "\ud800"}]}}, "header 'b'"),
        ({"headers": {"\ud800": 1}}, "name of a header"),
        ({"message_id": "\ud800"}, "message_id"),
        ({"routing_key": "\ud800"}, "routing_key"),
    ],
)
def test_text_that_has_no_bytes_is_refused(
    channel: Any, queue: Any, options: dict[str, Any], names: str
) -> None:
    with pytest.raises(exceptions.ArgumentError, match=f"{names}.* cannot be sent as UTF-8"):
        Producer(channel, queue.exchange, "tasks").publish("x", **options)
    assert ready(queue) == 0


@pytest.mark.parametrize("name", ["\ud800", b"\xff"])
def test_names_are_utf8(channel: Any, name: Any) -> None:
    for declare in (channel.queue_declare, channel.exchange_declare):
        with pytest.raises(exceptions.ArgumentError, match="cannot be sent as UTF-8"):
            declare(name)


UNDECODABLE: dict[str, tuple[bytes, dict[str, Any], type[Exception]]] = {
    "not JSON": (b"{", {"content_type": "application/json"}, exceptions.DecodeError),
    "nested": (b"[" * 100_000, {"content_type": "application/json"}, exceptions.DecodeError),
    "refused": (b"", {"content_type": "application/x-yaml"}, exceptions.ContentDisallowed),
    "not packed": (
        b"x",
        {"content_type": "text/plain", "headers": {"compression": "application/x-gzip"}},
        exceptions.DecodeError,
    ),
    "unknown packing": (
        b"x",
        {"content_type": "text/plain", "headers": {"compression": "rar"}},
        exceptions.CompressorNotInstalled,
    ),
}


@pytest.mark.parametrize("kind", UNDECODABLE)
@pytest.mark.parametrize("hook", [True, False], ids=["on_decode_error", "no hook"])
def test_message_that_cannot_be_decoded_is_not_lost(
    connection: Connection, channel: Any, queue: Any, kind: str, hook: bool
) -> None:
    body, options, error = UNDECODABLE[kind]
    Producer(channel, queue.exchange, "tasks").publish(body, **options)
    told: list[Any] = []
    got: list[Any] = []
    consumer = Consumer(
        channel,
        queue,
        callbacks=[lambda body, message: got.append(body)],
        on_decode_error=(lambda message, exc: told.append((message, exc))) if hook else None,
    )
    consumer.consume()
    if hook:
        connection.drain_events(timeout=SOON)
        [(message, exc)] = told
        assert isinstance(exc, error)
        assert (message.acknowledged, bytes(message.body)) == (False, body)
    else:
        with pytest.raises(error):
            connection.drain_events(timeout=SOON)
    # Unsettled: it is neither gone nor delivered again before somebody decides.
    assert (got, channel.unsettled) == ([], 1)
    # The connection goes on with the next message.
    Producer(channel, queue.exchange, "tasks").publish("fine")
    connection.drain_events(timeout=SOON)
    assert got == ["fine"]
    channel.close()
    again = queue(connection.default_channel)
    assert ready(again) == 2
    assert again.get().delivery_info["redelivered"]


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (lambda: Queue("tasks", durable=False), "queue 'tasks'.*durable is True and not False"),
        (lambda: Queue("tasks", max_length=5), "queue 'tasks'.*arguments"),
        (lambda: Queue("tasks", exclusive=True), "queue 'tasks'.*exclusive"),
        (lambda: Exchange("tasks", "topic"), "exchange 'tasks'.*'direct' and not 'topic'"),
        (lambda: Exchange("tasks", durable=False), "exchange 'tasks'.*durable"),
    ],
    ids=["durable", "argument", "exclusive", "type", "exchange durable"],
)
def test_declaring_again_with_other_settings_changes_nothing(
    channel: Any, queue: Any, other: Callable[[], Any], names: str
) -> None:
    Producer(channel, queue.exchange, "tasks").publish("waiting")
    with pytest.raises(exceptions.NotEquivalentError, match=names):
        other()(channel).declare()
    assert not channel.closed
    queue.declare()
    assert queue.get(no_ack=True).payload == "waiting"


@pytest.mark.parametrize(
    "operation",
    [
        lambda: Queue("tasks").declare(),
        lambda: Queue("tasks").get(),
        lambda: Queue("tasks").purge(),
        lambda: Queue("tasks").delete(),
        lambda: Queue("tasks").consume("tag"),
        lambda: Queue("tasks").cancel("tag"),
        lambda: Queue("tasks").bind_to("tasks"),
        lambda: Queue("tasks").unbind_from("tasks"),
        lambda: Exchange("tasks").declare(),
        lambda: Exchange("tasks").publish("x"),
        lambda: Exchange("tasks").Message("x"),
        lambda: Exchange("tasks").bind_to("other"),
        lambda: Exchange("tasks").delete(),
        lambda: Producer(None, Exchange("tasks")).publish("x"),
        lambda: Consumer(None, Queue("tasks")).consume(),
    ],
)
def test_operation_on_an_unbound_entity(operation: Callable[[], object]) -> None:
    with pytest.raises(exceptions.NotBoundError, match=r"not bound to a channel.*(bind|give) it"):
        operation()


@pytest.mark.parametrize("what", ["channel", "connection"])
@pytest.mark.parametrize(
    "operation",
    [
        lambda channel, queue: queue.declare(),
        lambda channel, queue: queue.get(),
        lambda channel, queue: queue.purge(),
        lambda channel, queue: queue.delete(),
        lambda channel, queue: queue.bind_to("tasks"),
        lambda channel, queue: queue.exchange.declare(),
        lambda channel, queue: Producer(channel, queue.exchange, "tasks").publish("x"),
        lambda channel, queue: Consumer(channel, queue, auto_declare=False).consume(),
        lambda channel, queue: channel.basic_qos(0, 1, False),
    ],
    ids=["declare", "get", "purge", "delete", "bind_to", "exchange", "publish", "consume", "qos"],
)
def test_closed_channel_or_connection(
    connection: Connection,
    queue: Any,
    what: str,
    operation: Callable[[Any, Any], object],
) -> None:
    channel = connection.channel()
    bound = queue(channel)
    Producer(channel, queue.exchange, "tasks").publish("held")
    message = bound.get()
    if what == "channel":
        channel.close()
        error: type[Exception] = exceptions.ChannelClosedError
        settling: type[Exception] = exceptions.ChannelClosedError
    else:
        connection.connection.close()
        error, settling = exceptions.ConnectionClosedError, exceptions.StaleDeliveryError
    with pytest.raises(error, match="closed") as caught:
        operation(channel, bound)
    assert "sesame" not in str(caught.value)
    with pytest.raises(settling):
        message.ack()
    # The held message went back, and nothing else has happened to its queue.
    with Connection("memory://here//") as other:
        assert ready(queue(other.default_channel)) == 1
