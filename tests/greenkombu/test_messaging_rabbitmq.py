"""Producers, consumers and declarations on RabbitMQ: the behaviours that need a real broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import amqp
import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.drain import drain_events
from greenkombu.entity import Exchange, Queue, binding
from greenkombu.messaging import Consumer, Producer
from greenkombu.mixins import ConsumerMixin
from greenkombu.utils.limits import TokenBucket
from hub.environment import Environment
from tests.support.tasks import until

SOON = 15.0


@pytest.fixture
def connection(rabbitmq_vhost: str) -> Iterator[Connection]:
    with Connection(rabbitmq_vhost) as made:
        yield made


def get(queue: Queue, timeout: float = SOON) -> Any:
    """Take a message that is on its way."""
    from hub.environment import get_environment

    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        message = queue.get(no_ack=True)
        if message is not None:
            return message
        get_environment().sleep(0.01)
    pytest.fail(f"nothing came into {queue.name}")


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
def test_a_consumer_that_the_broker_cancelled_can_consume_again(
    rabbitmq_vhost: str, scheme: str
) -> None:
    with (
        Connection(rabbitmq_vhost.replace("amqp", scheme, 1)) as connection,
        Connection(rabbitmq_vhost) as other,
    ):
        got: list[Any] = []
        kept, deleted = Queue("kept"), Queue("deleted")
        with Consumer(connection, [kept, deleted], on_message=got.append, no_ack=True) as consumer:
            other.default_channel.queue_delete("deleted")
            with pytest.raises(amqp.exceptions.ConsumerCancelled):
                connection.drain_events(timeout=SOON)
            assert consumer.consuming_from(kept)
            assert not consumer.consuming_from(deleted)
            consumer.declare()
            consumer.consume()
            assert consumer.consuming_from(deleted)
            for name in ("kept", "deleted"):
                Producer(other).publish(name, routing_key=name)
                connection.drain_events(timeout=SOON)
        assert [message.payload for message in got] == ["kept", "deleted"]


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
@pytest.mark.parametrize("retry", [False, True])
def test_a_publish_to_no_exchange_is_told_to_the_next_one(
    env: Environment, rabbitmq_vhost: str, scheme: str, retry: bool
) -> None:
    with Connection(rabbitmq_vhost.replace("amqp", scheme, 1)) as connection:
        queue = Queue("told")(connection.default_channel)
        queue.declare()
        producer = Producer(connection)
        channel = producer.channel
        producer.publish("lost", exchange="nowhere", routing_key="told")
        until(env, lambda: channel.closed)
        with pytest.raises(exceptions.NotFoundError, match="nowhere"):
            producer.publish("not sent", routing_key="told", retry=retry)
        producer.publish("sent", routing_key="told", retry=retry)
        again = Queue("told")(connection.default_channel)
        assert get(again).payload == "sent"
        assert again.get() is None


@pytest.mark.parametrize("scheme", ["amqp", "pika"])
def test_the_next_use_of_a_channel_hears_why_the_broker_closed_it(
    env: Environment, rabbitmq_vhost: str, scheme: str
) -> None:
    """Whether the broker's word arrives before or during that use."""
    with Connection(rabbitmq_vhost.replace("amqp", scheme, 1)) as connection:
        channel = connection.channel()
        channel.basic_ack(99)
        until(env, lambda: channel.closed)
        with pytest.raises(amqp.exceptions.PreconditionFailed, match="unknown delivery tag"):
            channel.queue_declare("any")
        with pytest.raises(exceptions.ChannelClosedError, match="unknown delivery tag"):
            channel.queue_declare("any")


def test_b190_all_properties_arrive(connection: Connection) -> None:
    queue = Queue("q")(connection.default_channel)
    queue.declare()
    properties = {
        "correlation_id": "correlation",
        "reply_to": "answers",
        "message_id": "id-1",
        "timestamp": 1_700_000_000,
        "type": "greeting",
        "user_id": "guest",
        "app_id": "tests",
        "cluster_id": "cluster",
    }
    Producer(connection).publish(
        {"a": 1},
        routing_key="q",
        priority=5,
        delivery_mode=1,
        expiration=60,
        headers={"text": "\xe9", "number": 2**40, "list": [1, "a"], "table": {"x": None}},
        **properties,
    )
    message = get(queue)
    assert message.payload == {"a": 1}
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.headers == {
        "text": "\xe9",
        "number": 2**40,
        "list": [1, "a"],
        "table": {"x": None},
    }
    received = dict(message.properties)
    assert (received.pop("priority"), received.pop("delivery_mode")) == (5, 1)
    assert received.pop("expiration") == "60000"
    for name, value in properties.items():
        got = received[name]
        assert (got.timestamp() if hasattr(got, "timestamp") else got) == value, name


def test_b128_a_passive_declaration_creates_nothing(connection: Connection) -> None:
    for _ in range(2):
        with pytest.raises(connection.channel_errors) as caught:
            Queue("missing")(connection.channel()).queue_declare(passive=True)
        assert getattr(caught.value, "reply_code", 404) == 404
        assert "missing" in str(caught.value)
    assert connection.connected


def test_s27_a_declaration_with_other_settings_is_refused(connection: Connection) -> None:
    Queue("q")(connection.channel()).declare()
    with pytest.raises(exceptions.NotEquivalentError, match="q"):
        Queue("q", durable=False)(connection.channel()).declare()
    Exchange("e", "direct")(connection.channel()).declare()
    with pytest.raises(connection.channel_errors, match="e"):
        Exchange("e", "topic")(connection.channel()).declare()


def test_b131_delete_minds_its_conditions(connection: Connection) -> None:
    queue = Queue("q")(connection.default_channel)
    queue.declare()
    Producer(connection).publish("x", routing_key="q")
    consumer = Consumer(connection.channel(), Queue("used"), callbacks=[lambda b, m: None])
    consumer.consume()
    for name, condition in (("q", {"if_empty": True}), ("used", {"if_unused": True})):
        with pytest.raises(connection.channel_errors):
            Queue(name)(connection.channel()).delete(**condition)
    consumer.cancel()
    Queue("used")(connection.channel()).delete(if_unused=True)
    Queue("q")(connection.channel()).purge()
    Queue("q")(connection.channel()).delete(if_empty=True)


def test_b133_the_broker_names_anonymous_queues(connection: Connection) -> None:
    got: list[Any] = []
    consumer = Consumer(
        connection,
        [Queue("", exclusive=True), Queue("", exclusive=True)],
        no_ack=True,
        callbacks=[lambda b, m: got.append(b)],
    )
    names = [queue.name for queue in consumer.queues]
    assert all(name.startswith("amq.gen") for name in names)
    assert len(set(names)) == 2
    with consumer:
        for name in names:
            Producer(connection).publish(name, routing_key=name)
        for _ in names:
            connection.drain_events(timeout=SOON)
    assert sorted(got) == sorted(names)


def test_b126_the_headers_exchange(connection: Connection) -> None:
    exchange = Exchange("headers", "headers")
    channel = connection.default_channel
    both = Queue("both", exchange, binding_arguments={"x-match": "all", "a": 1, "b": 2})(channel)
    either = Queue("either", exchange, binding_arguments={"x-match": "any", "a": 1, "b": 2})(
        channel
    )
    both.declare()
    either.declare()
    producer = Producer(connection, exchange)
    producer.publish("one", headers={"a": 1})
    producer.publish("two", headers={"a": 1, "b": 2})
    assert get(both).payload == "two"
    assert [get(either).payload for _ in range(2)] == ["one", "two"]
    both.unbind()
    producer.publish("three", headers={"a": 1, "b": 2})
    assert get(either).payload == "three"
    assert both.get() is None


def test_b130_unbind_and_exchange_bindings(connection: Connection) -> None:
    channel = connection.default_channel
    source, target = Exchange("source", "topic")(channel), Exchange("target", "fanout")(channel)
    source.declare()
    target.declare()
    target.bind_to("source", "a.#")
    queue = Queue("q", bindings=[binding(Exchange("target", "fanout"))])(channel)
    queue.declare()
    producer = Producer(connection, exchange=Exchange("source", "topic"))
    producer.publish(1, routing_key="a.b")
    assert get(queue).payload == 1
    target.unbind_from("source", "a.#")
    producer.publish(2, routing_key="a.b")
    target.bind_to(source, "c")
    producer.publish(3, routing_key="c")
    assert get(queue).payload == 3
    queue.unbind()
    producer.publish(4, routing_key="c")
    assert queue.get() is None


def test_b082_unroutable_messages_come_back(connection: Connection) -> None:
    returned: list[Any] = []
    producer = Producer(
        connection,
        on_return=lambda exc, exchange, key, message: returned.append((exc, key, message)),
    )
    producer.publish({"a": 1}, routing_key="nowhere", mandatory=True)
    deadline = time.monotonic() + SOON
    while not returned and time.monotonic() < deadline:
        try:
            connection.drain_events(timeout=0.5)
        except TimeoutError:
            pass
    ((exc, key, message),) = returned
    assert "NO_ROUTE" in str(exc)
    assert key == "nowhere"
    assert b'"a"' in (message.body if isinstance(message.body, bytes) else message.body.encode())


@pytest.mark.parametrize("scheme", ["amqp", "pika", "memory"])
def test_an_error_of_on_return_is_not_taken_for_the_loss_of_the_connection(
    rabbitmq_vhost: str, scheme: str
) -> None:
    calls: list[Any] = []

    def on_return(*given: Any) -> None:
        calls.append(given)
        raise ConnectionRefusedError("another broker is down")

    url = "memory://" if scheme == "memory" else rabbitmq_vhost.replace("amqp", scheme, 1)
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        exchange = Exchange("e", durable=False)
        producer = Producer(connection, exchange=exchange, on_return=on_return)
        used = connection.connection
        with pytest.raises(ConnectionRefusedError, match="another broker"):
            producer.publish(
                1,
                routing_key="nowhere",
                mandatory=True,
                retry=True,
                retry_policy={"max_retries": 1, "interval_start": 0},
            )
        assert len(calls) == 1
        assert connection.connection is used
        assert connection.connected


def test_b100_flow_pauses_and_resumes(connection: Connection) -> None:
    got: list[Any] = []
    consumer = Consumer(
        connection.channel(), Queue("q"), no_ack=True, callbacks=[lambda b, m: got.append(b)]
    )
    consumer.consume()
    producer = Producer(connection)
    consumer.flow(False)
    producer.publish("while paused", routing_key="q")
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    consumer.flow(True)
    connection.drain_events(timeout=SOON)
    assert got == ["while paused"]
    consumer.cancel()


def test_b097_b099_prefetch_and_recover(connection: Connection) -> None:
    messages: list[Any] = []
    queue = Queue("q")
    consumer = Consumer(connection.channel(), queue, on_message=messages.append, prefetch_count=2)
    consumer.consume()
    producer = Producer(connection)
    for number in range(5):
        producer.publish(number, routing_key="q")
    for _ in range(2):
        connection.drain_events(timeout=SOON)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.3)
    consumer.recover(requeue=True)
    for _ in range(2):
        connection.drain_events(timeout=SOON)
    assert [m.payload for m in messages] == [0, 1, 0, 1]
    assert messages[-1].delivery_info["redelivered"]
    messages[-1].ack(multiple=True)
    for _ in range(2):
        connection.drain_events(timeout=SOON)
    assert [m.payload for m in messages[4:]] == [2, 3]
    consumer.cancel()


def test_quorum_queues_take_prefetch_and_requeue(connection: Connection) -> None:
    messages: list[Any] = []
    queue = Queue("q", queue_arguments={"x-queue-type": "quorum"}, max_length=100)
    consumer = Consumer(connection, queue, on_message=messages.append, prefetch_count=1)
    consumer.consume()
    Producer(connection).publish("x", routing_key="q")
    connection.drain_events(timeout=SOON)
    messages[0].requeue()
    connection.drain_events(timeout=SOON)
    assert messages[1].payload == "x"
    messages[1].ack()
    consumer.cancel()


def test_expiry_ttl_and_length_are_the_brokers(connection: Connection, env: Environment) -> None:
    channel = connection.default_channel
    Queue("short", expires=0.2, message_ttl=0.1, max_length=1)(channel).declare()
    ttl = Queue("ttl", message_ttl=0.05)(channel)
    ttl.declare()
    bounded = Queue("bounded", max_length=1)(channel)
    bounded.declare()
    producer = Producer(connection)
    producer.publish("old", routing_key="ttl")
    producer.publish("first", routing_key="bounded")
    producer.publish("second", routing_key="bounded")
    ttl.queue_declare(passive=True)  # answered when it has come: from then on its time runs
    env.sleep(0.5)
    assert ttl.get() is None
    assert get(bounded).payload == "second"

    def gone() -> bool:
        try:
            Queue("short")(connection.channel()).queue_declare(passive=True)
        except connection.channel_errors:
            return True
        env.sleep(0.5)  # asking is a use
        return False

    until(env, gone)


def test_b096_undecodable_messages_stay_on_the_broker(connection: Connection) -> None:
    channel = connection.channel()
    consumer = Consumer(channel, Queue("q"), callbacks=[lambda b, m: pytest.fail("decoded")])
    consumer.consume()
    Producer(connection).publish(b"{", routing_key="q", content_type="application/json")
    with pytest.raises(exceptions.DecodeError):
        connection.drain_events(timeout=SOON)
    channel.close()
    message = get(Queue("q")(connection.default_channel))
    assert message.body in (b"{", "{")
    assert message.delivery_info["redelivered"]


def test_b076_retry_survives_a_dead_connection(connection: Connection) -> None:
    queue = Queue("q", Exchange("e"), "rk")
    producer = Producer(connection, Exchange("e"), "rk")
    policy = {"max_retries": 3, "interval_start": 0.05}
    for number in range(3):
        producer.publish(number, retry=True, retry_policy=policy, declare=[queue])
        connection.connection.abort()
    producer.publish("last", declare=[queue])
    bound = queue(connection.default_channel)
    got = []
    while not got or got[-1] != "last":
        got.append(get(bound).payload)
    # What lay in the out-buffer when the connection was aborted may be gone, nothing else.
    assert set(got) <= {0, 1, 2, "last"}


def test_b077_a_new_connection_declares_again(connection: Connection) -> None:
    queue = Queue("q", auto_delete=False, durable=False)
    producer = Producer(connection)
    assert producer.maybe_declare(queue)
    assert not producer.maybe_declare(queue)
    queue(connection.default_channel).delete()
    connection.close()
    producer.publish("x", routing_key="q", declare=[queue])
    assert get(queue(connection.default_channel)).payload == "x"


class Worker(ConsumerMixin):
    """Keeps what comes."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.got: list[Any] = []
        self.used: list[Connection] = []
        self.restart_limit = TokenBucket(100)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        return [Consumer(Queue("work"), callbacks=[self.on_work], prefetch_count=10)]

    def on_consume_ready(
        self, connection: Connection, channel: Any, consumers: Any, **kwargs: Any
    ) -> None:
        self.used.append(connection)

    def on_work(self, body: Any, message: Any) -> None:
        self.got.append(body)
        message.ack()


def test_b144_a_worker_survives_the_loss_of_its_connection(
    connection: Connection, env: Environment
) -> None:
    def until(condition: Any) -> None:
        deadline = time.monotonic() + SOON
        while not condition() and time.monotonic() < deadline:
            env.sleep(0.01)
        assert condition()

    worker = Worker(connection)
    task = env.spawn(worker.run, safety_interval=0.1)
    until(lambda: worker.used)
    producer = Producer(connection)
    for round_number in range(3):
        producer.publish(round_number, routing_key="work")
        until(lambda number=round_number: number in worker.got)
        worker.used[-1].connection.abort()
        until(lambda number=round_number: len(worker.used) == number + 2)
    worker.should_stop = True
    assert task.join(SOON)
    assert worker.got == [0, 1, 2]
    assert not any(used.connected for used in worker.used)
    assert len({id(used) for used in worker.used}) == 4


def test_one_call_drains_several_amqp_connections(connection: Connection) -> None:
    seen: list[Any] = []

    def on_message(body: Any, message: Any) -> None:
        seen.append(body)
        message.ack()

    with connection.clone() as other:
        for number, each in enumerate((connection, other)):
            Consumer(each, [Queue(f"several-{number}")], callbacks=[on_message]).consume()
        producer = Producer(connection)
        producer.publish("to the second", routing_key="several-1")
        assert drain_events(connection, other, timeout=SOON) is other
        producer.publish("to the first", routing_key="several-0")
        assert drain_events(connection, other, timeout=SOON) is connection
    assert seen == ["to the second", "to the first"]


def test_a_task_takes_over_from_one_that_was_killed_while_it_began_to_consume(
    rabbitmq_vhost: str, env: Environment
) -> None:
    """Killed at every switch of the first `get`: the message reaches the second one."""
    if not env.green:
        pytest.skip("native threads cannot be killed")
    with Connection(rabbitmq_vhost) as connection:
        for switches in range(1, 7):
            simple = connection.SimpleQueue(f"taken-{switches}")
            got: list[Any] = []
            first = env.spawn(simple.get)
            second = env.spawn(
                lambda got=got, simple=simple: got.append(simple.get(timeout=SOON).payload)
            )
            for _ in range(switches):
                env.sleep(0)
            first.kill()
            simple.put(switches)
            second.join(SOON)
            assert got == [switches]
            simple.close()


def test_two_tasks_that_consume_from_a_locked_queue_both_hear_of_it(
    rabbitmq_vhost: str, env: Environment
) -> None:
    with Connection(rabbitmq_vhost) as owner, Connection(rabbitmq_vhost) as connection:
        channel = owner.channel()
        Queue("locked")(channel).declare()
        channel.basic_consume("locked", exclusive=True, callback=lambda _: None)
        consumer = Consumer(connection.channel(), Queue("locked"), callbacks=[lambda *_: None])
        outcomes: list[str] = []

        def consume() -> None:
            try:
                consumer.consume()
            except connection.channel_errors as exc:
                outcomes.append(type(exc).__name__)
            else:
                outcomes.append("ok")

        tasks = [env.spawn(consume) for _ in range(2)]
        for task in tasks:
            task.join(SOON)
        assert "ok" not in outcomes
        assert len(outcomes) == 2
        assert not consumer.consuming_from("locked")


# -- what RabbitMQ answers by ending the connection, for all who share it


@pytest.fixture(params=["amqp", "pika"])
def fragile(rabbitmq_vhost: str, request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection that is still the same one after the test."""
    pytest.importorskip(request.param)
    with Connection(rabbitmq_vhost.replace("amqp", request.param, 1)) as made:
        established = made.connect()
        yield made
        made.channel().queue_declare("proof")
        assert made.connection is established


INF = float("inf")


@pytest.mark.parametrize(
    ("refused", "names"),
    [
        (lambda channel: _send(channel, headers={"load": INF}), "load"),
        (lambda channel: _send(channel, headers={"a": [{"load": -INF}]}), "load"),
        (lambda channel: channel.queue_declare("inf", arguments={"load": INF - INF}), "load"),
        (lambda channel: channel.exchange_declare("inf", "topic", arguments={"load": INF}), "load"),
        (lambda channel: channel.queue_bind("q", "e", arguments={"load": INF}), "load"),
        (
            lambda channel: channel.basic_consume("q", callback=print, arguments={"load": INF}),
            "load",
        ),
        (lambda channel: _send(channel, headers={"a": "\ud800"}), "UTF-8|utf-8"),
        (lambda channel: _send(channel, message_id="\ud800"), "UTF-8|utf-8"),
        (lambda channel: _send(channel, routing_key="\ud800"), "UTF-8|utf-8"),
        (lambda channel: channel.queue_declare("\udcff"), "UTF-8|utf-8"),
        (lambda channel: channel.queue_declare(b"\xff\xfe"), "UTF-8|unicode"),
        (lambda channel: channel.queue_bind("q", "e", "\udcff"), "UTF-8|utf-8"),
    ],
)
def test_what_would_end_the_connection_is_refused(
    fragile: Connection, refused: Any, names: str
) -> None:
    with pytest.raises(exceptions.ArgumentError, match=names):
        refused(fragile.channel())


@pytest.mark.parametrize(
    ("refused", "remedy"),
    [
        (lambda channel: channel.basic_recover(requeue=False), "requeue=True"),
        (lambda channel: Consumer(channel).recover(), "requeue=True"),
        (lambda channel: _send(channel, immediate=True), "immediate"),
        (lambda channel: channel.basic_qos(10, 1, False), "prefetch_count"),
    ],
)
def test_what_rabbitmq_does_not_implement_is_refused(
    fragile: Connection, refused: Any, remedy: str
) -> None:
    with pytest.raises(exceptions.UnsupportedOperation, match=remedy):
        refused(fragile.channel())


def test_recover_async_is_refused_as_recover_is(connection: Connection) -> None:
    established = connection.connect()
    channel = connection.channel()
    with pytest.raises(exceptions.UnsupportedOperation, match="requeue=True"):
        channel.basic_recover_async(requeue=False)
    channel.basic_recover_async(requeue=True)
    connection.channel().queue_declare("proof")
    assert established.connected


def test_an_unknown_exchange_type_says_what_to_do(connection: Connection) -> None:
    established = connection.connect()
    with pytest.raises(connection.connection_errors, match=r"direct, topic.*reconnect"):
        connection.channel().exchange_declare("odd", "x-nosuch")
    assert not established.connected


def _send(channel: Any, routing_key: str = "nowhere", **options: Any) -> None:
    Producer(channel).publish("x", routing_key=routing_key, **options)
