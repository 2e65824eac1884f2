"""greenkombu.messaging.Consumer: behaviours 89-107."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.deadline import Deadline
from greenkombu.entity import Exchange, Queue
from greenkombu.message import Message
from greenkombu.messaging import Consumer, Producer
from hub import Event
from hub.environment import Environment
from tests.support.recording import RecordingChannel
from tests.support.tasks import until, waiting_for

#: Seconds in which something that must come has come.
SOON = 10.0


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def make_queue(
    request: pytest.FixtureRequest, connection: Connection
) -> Iterator[Callable[..., Queue]]:
    made: list[str] = []

    def make(suffix: str = "", **options: Any) -> Queue:
        name = request.node.name + suffix
        made.append(name)
        queue = Queue(name, Exchange(name), name, **options)
        queue.declare(channel=connection.default_channel)
        return queue

    yield make
    with Connection("memory://") as cleaner:
        for name in made:
            cleaner.default_channel.queue_delete(name)


def put(connection: Connection, queue: Queue, *bodies: Any, **options: Any) -> None:
    producer = Producer(connection)
    for body in bodies:
        producer.publish(body, exchange="", routing_key=queue.name, **options)


def drain(connection: Connection, count: int) -> None:
    for _ in range(count):
        connection.drain_events(timeout=SOON)


def drained(connection: Connection) -> None:
    """Assert that nothing more comes."""
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)


# -- receiving


def test_b089_consumers_on_several_channels_drain_through_one_connection(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    got: list[tuple[str, Any]] = []
    queues = [make_queue("1"), make_queue("2")]
    consumers = [
        Consumer(
            connection.channel(),
            queue,
            no_ack=True,
            callbacks=[lambda body, _, name=queue.name: got.append((name, body))],
        )
        for queue in queues
    ]
    for consumer in consumers:
        consumer.consume()
    for queue in queues:
        put(connection, queue, "x")
    drain(connection, 2)
    assert sorted(got) == sorted((queue.name, "x") for queue in queues)


def test_b090_callbacks_run_in_order(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    calls: list[Any] = []
    queue = make_queue()
    consumer = Consumer(connection, [queue], callbacks=[lambda b, m: calls.append(("first", b))])
    consumer.register_callback(lambda b, m: (calls.append(("second", b)), m.ack()))
    with consumer:
        put(connection, queue, {"a": 1})
        drain(connection, 1)
    assert calls == [("first", {"a": 1}), ("second", {"a": 1})]


def test_b091_receive_needs_callbacks() -> None:
    consumer = Consumer(RecordingChannel(), Queue("q"))
    with pytest.raises(NotImplementedError, match="callbacks"):
        consumer.receive("body", object())


def test_b092_queues_are_declared_unless_told_otherwise() -> None:
    channel = RecordingChannel()
    Consumer(channel, Queue("q", Exchange("e"), "rk"))
    assert channel.names() == ["exchange_declare", "queue_declare", "queue_bind"]
    channel = RecordingChannel()
    consumer = Consumer(channel, Queue("q", Exchange("e"), "rk"), auto_declare=False)
    assert channel.calls == []
    consumer.declare()
    assert channel.names() == ["exchange_declare", "queue_declare", "queue_bind"]


def test_b093_one_queue_or_several() -> None:
    assert [q.name for q in Consumer(RecordingChannel(), Queue("q")).queues] == ["q"]
    several = (Queue(name) for name in "abc")
    assert [q.name for q in Consumer(RecordingChannel(), several).queues] == ["a", "b", "c"]
    assert Consumer(RecordingChannel()).queues == []


def test_b094_cancel_keeps_what_was_delivered(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    messages: list[Any] = []
    queue = make_queue()
    consumer = Consumer(connection, queue, on_message=messages.append)
    consumer.consume()
    put(connection, queue, 1)
    drain(connection, 1)
    consumer.cancel()
    put(connection, queue, 2)
    drained(connection)
    assert [m.payload for m in messages] == [1]
    messages[0].ack()
    assert queue(connection.default_channel).get(no_ack=True).payload == 2


def test_b095_cancel_by_queue(connection: Connection, make_queue: Callable[..., Queue]) -> None:
    got: list[Any] = []
    one, two = make_queue("1"), make_queue("2")
    consumer = Consumer(connection, [one, two], no_ack=True, callbacks=[lambda b, m: got.append(b)])
    consumer.consume()
    assert consumer.consuming_from(one)
    assert consumer.consuming_from(one.name)
    consumer.cancel_by_queue(one.name)
    assert not consumer.consuming_from(one)
    assert [q.name for q in consumer.queues] == [two.name]
    consumer.cancel_by_queue("unknown")
    put(connection, one, "one")
    put(connection, two, "two")
    drain(connection, 1)
    drained(connection)
    assert got == ["two"]
    consumer.cancel_by_queue(two)
    assert consumer.queues == []


def test_b097_prefetch_count_bounds_what_is_under_way(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    messages: list[Any] = []
    queue = make_queue()
    consumer = Consumer(connection, queue, on_message=messages.append, prefetch_count=2)
    consumer.consume()
    put(connection, queue, *range(5))
    drain(connection, 2)
    drained(connection)
    messages[0].ack()
    drain(connection, 1)
    assert [m.payload for m in messages] == [0, 1, 2]
    consumer.qos(prefetch_count=0)
    drain(connection, 2)
    assert len(messages) == 5
    for message in messages[1:]:
        message.ack()


def test_b098_purge_counts_over_all_queues(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    one, two = make_queue("1"), make_queue("2")
    put(connection, one, 1, 2)
    put(connection, two, 3)
    consumer = Consumer(connection, [one, two])
    assert consumer.purge() == 3
    assert consumer.purge() == 0


def test_b099_recover_delivers_again(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    messages: list[Any] = []
    queue = make_queue()
    consumer = Consumer(connection, queue, on_message=messages.append)
    consumer.consume()
    put(connection, queue, "x")
    drain(connection, 1)
    consumer.recover(requeue=True)
    drain(connection, 1)
    assert [m.payload for m in messages] == ["x", "x"]
    messages[-1].ack()


def test_b100_flow_is_passed_on() -> None:
    channel = RecordingChannel()
    consumer = Consumer(channel)
    consumer.flow(False)
    consumer.flow(True)
    consumer.qos(1, 2, True)
    consumer.recover(requeue=True)
    assert channel.calls == [
        ("flow", {0: False}),
        ("flow", {0: True}),
        ("basic_qos", {0: 1, 1: 2, 2: True}),
        ("basic_recover", {"requeue": True}),
    ]


def test_b101_no_ack_of_the_queue_and_of_the_consumer() -> None:
    queues = [Queue("plain"), Queue("quick", no_ack=True)]

    def asked(**options: Any) -> dict[str, bool]:
        channel = RecordingChannel()
        consume = options.pop("consume", None)
        Consumer(channel, queues, **options).consume(no_ack=consume)
        return {call["queue"]: call["no_ack"] for call in channel.called("basic_consume")}

    assert asked() == {"plain": False, "quick": True}
    assert asked(no_ack=True) == {"plain": True, "quick": True}
    assert asked(no_ack=False) == {"plain": False, "quick": False}
    assert asked(no_ack=True, consume=False) == {"plain": False, "quick": False}


def test_b102_the_content_type_finds_the_serializer(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    got: list[Any] = []
    queue = make_queue()
    consumer = Consumer(
        connection,
        queue,
        no_ack=True,
        accept=["json", "pickle"],
        callbacks=[lambda b, m: got.append(b)],
    )
    with consumer:
        put(connection, queue, {"from": "json"}, serializer="json")
        put(connection, queue, {"from": "pickle"}, serializer="pickle")
        drain(connection, 2)
    assert got == [{"from": "json"}, {"from": "pickle"}]


def test_b104_the_context_consumes_and_cancels() -> None:
    channel = RecordingChannel()
    with Consumer(channel, Queue("q"), auto_declare=False) as consumer:
        assert consumer.consuming_from("q")
    assert not consumer.consuming_from("q")
    assert channel.names() == ["basic_consume", "basic_cancel"]

    def fail() -> None:
        with Consumer(channel, Queue("q"), auto_declare=False):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fail()
    assert channel.names()[-1] == "basic_cancel"


def test_b104_a_broken_channel_does_not_hide_the_error(caplog: pytest.LogCaptureFixture) -> None:
    channel = RecordingChannel(basic_cancel=ConnectionResetError("gone"))

    def fail() -> None:
        with Consumer(channel, Queue("q"), auto_declare=False):
            raise KeyError("mine")

    with caplog.at_level(logging.WARNING), pytest.raises(KeyError, match="mine"):
        fail()
    assert "cannot cancel" in caplog.text


def test_b104_after_a_connection_error_nothing_is_said_to_the_broker() -> None:
    channel = RecordingChannel()
    client = SimpleNamespace(connection_errors=(OSError,))
    channel.connection = SimpleNamespace(client=client)

    def fail() -> None:
        with Consumer(channel, Queue("q"), auto_declare=False):
            raise ConnectionResetError("lost")

    with pytest.raises(ConnectionResetError):
        fail()
    assert channel.names() == ["basic_consume"]


def test_b105_the_first_argument_may_be_a_connection() -> None:
    connection = Connection("memory://")
    consumer = Consumer(connection)
    assert consumer.channel is connection.default_channel
    assert consumer.connection is connection
    connection.close()
    assert Consumer(None).connection is None


def test_b106_revive_goes_on_consuming_on_the_new_channel() -> None:
    first, second = RecordingChannel(), RecordingChannel()
    consumer = Consumer(first, [Queue("a"), Queue("b", no_ack=True)], prefetch_count=3)
    consumer.consume()
    consumer.revive(second)
    assert "basic_cancel" not in first.names()
    assert second.names() == [
        "queue_declare",
        "queue_declare",
        "basic_qos",
        "basic_consume",
        "basic_consume",
    ]
    assert [call["no_ack"] for call in second.called("basic_consume")] == [False, True]
    assert consumer.consuming_from("a")
    assert all(queue.channel is second for queue in consumer.queues)
    idle = Consumer(first, Queue("c"))
    third = RecordingChannel()
    idle.revive(third)
    assert "basic_consume" not in third.names()


def test_b106_revive_on_a_real_channel(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    got: list[Any] = []
    queue = make_queue()
    consumer = Consumer(
        connection.channel(), queue, no_ack=True, callbacks=[lambda b, m: got.append(b)]
    )
    consumer.consume()
    consumer.channel.close()
    consumer.revive(connection.channel())
    put(connection, queue, "x")
    drain(connection, 1)
    assert got == ["x"]


def test_b107_cancelling_an_unknown_tag_is_no_error(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    queue = make_queue()(connection.default_channel)
    queue.cancel("no such tag")


# -- tags and queues


def test_consume_again_starts_only_what_is_new() -> None:
    channel = RecordingChannel()
    consumer = Consumer(channel, [Queue("a"), Queue("b")], tag_prefix="worker-")
    consumer.consume()
    consumer.consume()
    consumer.add_queue(Queue("c"))
    consumer.consume()
    calls = channel.called("basic_consume")
    assert [call["queue"] for call in calls] == ["a", "b", "c"]
    assert [call["nowait"] for call in calls] == [True, False, False]
    tags = [call["consumer_tag"] for call in calls]
    assert len(set(tags)) == 3
    assert all(tag.startswith("worker-") for tag in tags)


def test_add_queue_binds_and_declares() -> None:
    channel = RecordingChannel()
    consumer = Consumer(channel)
    bound = consumer.add_queue(Queue("q", Exchange("e"), "rk"))
    assert bound.channel is channel
    assert channel.names() == ["exchange_declare", "queue_declare", "queue_bind"]
    consumer.auto_declare = False
    consumer.add_queue(Queue("r"))
    assert len(channel.called("queue_declare")) == 1
    assert not Consumer(None).add_queue(Queue("q")).is_bound


def test_several_anonymous_queues() -> None:
    names = iter(["amq.gen-a", "amq.gen-b"])

    class Naming(RecordingChannel):
        def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
            if name == "queue_declare":
                return next(names), 0, 0
            return super()._answer(name, args, kwargs)

    consumer = Consumer(Naming(), [Queue(""), Queue("")])
    consumer.consume()
    assert [queue.name for queue in consumer.queues] == ["amq.gen-a", "amq.gen-b"]
    assert consumer.consuming_from("amq.gen-b")


def test_a_refused_consume_is_not_remembered() -> None:
    channel = RecordingChannel(basic_consume=PermissionError("403"))
    consumer = Consumer(channel, Queue("q"))
    with pytest.raises(PermissionError):
        consumer.consume()
    assert not consumer.consuming_from("q")


def test_a_delivery_may_come_before_the_answer() -> None:
    class Eager(RecordingChannel):
        def _answer(self, name: str, args: Any, kwargs: Any) -> Any:
            if name == "basic_consume":
                assert consumer.consuming_from("q")
                kwargs["callback"](Message(b"x", 1, "text/plain", "utf-8", channel=self))
            return super()._answer(name, args, kwargs)

    got: list[Any] = []
    consumer = Consumer(Eager(), Queue("q"), callbacks=[lambda b, m: got.append(b)])
    consumer.consume()
    assert got == ["x"]


def test_a_subclass_may_define_its_handlers() -> None:
    class Mine(Consumer):
        no_ack = True

        def on_message(self, message: Any) -> None:  # type: ignore[override]
            got.append(message.payload)

    got: list[Any] = []
    channel = RecordingChannel()
    Mine(channel, Queue("q")).consume()
    channel.callbacks["q"](Message(b"x", 1, "text/plain", "utf-8", channel=channel))
    assert got == ["x"]
    assert channel.called("basic_consume")[0]["no_ack"] is True


# -- what cannot be decoded

BROKEN = {
    "truncated": Message(b'{"a": ', 1, "application/json", "utf-8"),
    "refused": Message(b"x", 1, "application/x-python-serialize", "binary"),
    "not compressed": Message(
        b"x", 1, "application/json", "utf-8", headers={"compression": "zlib"}
    ),
    "unknown compression": Message(b"x", 1, "text/plain", "utf-8", headers={"compression": "no"}),
    "empty": Message(b"", 1, "application/json", "utf-8"),
    "bad text": Message(b"\xff", 1, "text/plain", "utf-8"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_b096_on_decode_error_gets_the_message(kind: str) -> None:
    channel = RecordingChannel()
    seen: list[tuple[Any, Exception]] = []
    consumer = Consumer(
        channel,
        Queue("q"),
        callbacks=[lambda b, m: pytest.fail("decoded")],
        on_decode_error=lambda message, exc: seen.append((message, exc)),
        accept=["json", "text/plain"],
    )
    consumer.consume()
    channel.callbacks["q"](BROKEN[kind])
    ((message, exc),) = seen
    assert message is BROKEN[kind]
    assert isinstance(exc, Exception)
    if kind == "refused":
        assert isinstance(exc, exceptions.ContentDisallowed)
    assert not message.acknowledged


@pytest.mark.parametrize("kind", BROKEN)
def test_b096_without_a_handler_the_error_propagates(kind: str) -> None:
    channel = RecordingChannel()
    consumer = Consumer(
        channel,
        Queue("q"),
        callbacks=[lambda b, m: pytest.fail("decoded")],
        accept=["json", "text/plain"],
    )
    consumer.consume()
    with pytest.raises(Exception):  # noqa: B017, PT011  of several kinds, see above
        channel.callbacks["q"](BROKEN[kind])
    assert not BROKEN[kind].acknowledged
    assert "basic_ack" not in channel.names()


def test_b096_an_undecodable_message_is_not_lost(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    queue = make_queue()
    put(connection, queue, b"{", content_type="application/json", content_encoding="utf-8")
    channel = connection.channel()
    consumer = Consumer(channel, queue, callbacks=[lambda b, m: pytest.fail("decoded")])
    consumer.consume()
    with pytest.raises(exceptions.DecodeError):
        drain(connection, 1)
    consumer.recover(requeue=True)
    consumer.cancel()
    message = queue(connection.default_channel).get()
    assert message.body == b"{"
    message.reject()


def test_b096_errors_of_message_to_python_are_decode_errors() -> None:
    class Broken(RecordingChannel):
        def message_to_python(self, raw: Any) -> Any:
            raise ValueError("no message at all")

    channel = Broken()
    seen: list[Any] = []
    Consumer(channel, Queue("q"), on_decode_error=lambda *args: seen.append(args)).consume()
    channel.callbacks["q"]("raw")
    ((raw, exc),) = seen
    assert raw == "raw"
    assert str(exc) == "no message at all"


def test_s28_nothing_is_decoded_that_is_not_accepted(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    loaded: list[str] = []
    refused: list[Exception] = []
    queue = make_queue()

    put(connection, queue, Loud(), serializer="pickle")
    consumer = Consumer(
        connection,
        queue,
        callbacks=[lambda b, m: loaded.append(b)],
        on_decode_error=lambda m, exc: (refused.append(exc), m.reject()),
        accept=["json"],
    )
    with consumer:
        drain(connection, 1)
    assert [type(exc) for exc in refused] == [exceptions.ContentDisallowed]
    assert loaded == []
    assert not Loud.loaded


class Loud:
    """Notes that it was unpickled."""

    loaded = False

    def __setstate__(self, state: Any) -> None:
        type(self).loaded = True

    def __reduce__(self) -> Any:
        return Loud, (), {"a": 1}


def test_on_message_gets_the_message_undecoded_but_guarded() -> None:
    channel = RecordingChannel()
    got: list[Any] = []
    Consumer(channel, Queue("q"), on_message=got.append, accept=["json"]).consume()
    message = Message(b"x", 1, "application/x-python-serialize", "binary", channel=channel)
    channel.callbacks["q"](message)
    assert got == [message]
    with pytest.raises(exceptions.ContentDisallowed):
        _ = message.payload


def test_an_unknown_name_in_accept_is_an_error() -> None:
    with pytest.raises(exceptions.SerializerNotInstalled, match="nosuch"):
        Consumer(RecordingChannel(), Queue("q"), accept=["nosuch"])


# -- publishing from a callback


def test_s29_callbacks_may_publish_on_their_own_connection(
    connection: Connection, make_queue: Callable[..., Queue]
) -> None:
    source, target = make_queue("1"), make_queue("2")
    put(connection, source, *range(500))
    producer = Producer(connection, "", target.name)

    def forward(body: Any, message: Any) -> None:
        producer.publish(body)
        message.ack()

    with Consumer(connection, source, callbacks=[forward]):
        drain(connection, 500)
    channel = connection.default_channel
    assert [target(channel).get(no_ack=True).payload for _ in range(500)] == list(range(500))


# -- several tasks with one consumer


class _Abandoned(BaseException):
    """A kill, in every environment."""


class _SlowChannel(RecordingChannel):
    """Its first `basic_consume` of each queue waits for `answer`, then raises `error`."""

    def __init__(self, error: BaseException | None) -> None:
        super().__init__()
        self.error = error
        self.asked, self.answer = Event(), Event()

    def basic_consume(self, **kwargs: Any) -> None:
        self.calls.append(("basic_consume", kwargs))
        if len(self.calls_of("basic_consume")) == 1:
            self.asked.set()
            assert self.answer.wait(SOON)
            if self.error is not None:
                raise self.error

    def calls_of(self, name: str) -> list[Any]:
        return [arguments for each, arguments in self.calls if each == name]


@pytest.mark.parametrize(
    ("error", "outcomes", "asked"),
    [
        (None, ["ok", "ok"], 1),
        (_Abandoned(), ["_Abandoned", "ok"], 2),
        (exceptions.ArgumentError("refused"), ["ArgumentError", "ArgumentError"], 1),
    ],
    ids=["answered", "killed", "refused"],
)
def test_a_second_task_waits_for_the_consume_of_the_first(
    env: Environment, error: BaseException | None, outcomes: list[str], asked: int
) -> None:
    channel = _SlowChannel(error)
    consumer = Consumer(channel, [Queue("a"), Queue("q")])
    seen: dict[int, str] = {}

    def consume(number: int) -> None:
        try:
            consumer.consume()
        except (Exception, _Abandoned) as exc:
            seen[number] = type(exc).__name__
        else:
            seen[number] = "ok"

    first = env.spawn(consume, 0)
    assert channel.asked.wait(SOON)
    second = env.spawn(consume, 1)
    until(env, lambda: waiting_for(consumer.queues[0]))
    assert seen == {}, "a consumer that is being started does not consume yet"
    channel.answer.set()
    first.join(SOON)
    second.join(SOON)
    assert [seen[0], seen[1]] == outcomes
    of_a = [each for each in channel.calls_of("basic_consume") if each["queue"] == "a"]
    assert len(of_a) == asked
    assert consumer.consuming_from("a") == ("ok" in outcomes)


def test_a_consume_that_is_waited_for_has_a_bound(env: Environment) -> None:
    channel = _SlowChannel(None)
    consumer = Consumer(channel, Queue("q"))
    first = env.spawn(consumer.consume)
    assert channel.asked.wait(SOON)
    with pytest.raises(TimeoutError), Deadline(0.02):
        consumer.consume()
    channel.answer.set()
    first.join(SOON)
    assert consumer.consuming_from("q")


def test_a_consumer_that_was_cancelled_while_it_started_is_started_anew(env: Environment) -> None:
    channel = _SlowChannel(None)
    consumer = Consumer(channel, Queue("q"))
    first = env.spawn(consumer.consume)
    assert channel.asked.wait(SOON)
    second = env.spawn(consumer.consume)
    until(env, lambda: waiting_for(consumer.queues[0]))
    consumer.cancel()
    channel.answer.set()
    first.join(SOON)
    second.join(SOON)
    assert consumer.consuming_from("q")
    assert len(channel.calls_of("basic_consume")) == 2


def test_revive_does_not_wait_for_a_consume_on_the_old_channel(env: Environment) -> None:
    old, new = _SlowChannel(exceptions.ArgumentError("refused")), RecordingChannel()
    consumer = Consumer(old, Queue("q"))
    outcome: list[str] = []

    def consume() -> None:
        try:
            consumer.consume()
        except exceptions.ArgumentError:
            outcome.append("refused")

    first = env.spawn(consume)
    assert old.asked.wait(SOON)
    consumer.revive(new)
    old.answer.set()
    first.join(SOON)
    assert outcome == ["refused"]
    assert consumer.consuming_from("q")
    assert [name for name, _ in new.calls].count("basic_consume") == 1
