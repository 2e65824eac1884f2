"""What every transport does, native or virtual: one suite for all (`tests.contract.transports`).

A feature that `Transport.implements` denies is not left out: the test asserts that the transport
refuses it with `UnsupportedOperation`, which names the transport.

The file is long because it is one contract, asked of each transport in the same words.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu.exceptions import UnsupportedOperation
from hub.environment import Environment
from tests.contract.transports import CASES, Broker, Server, TransportCase, find_url
from tests.support.ticker import Ticker

ROOT = Path(__file__).parents[2]

#: Seconds within which everything happens on a machine that others use too.
PATIENCE = 15.0
#: Seconds in which what must not come would have come.
SHORT = 0.3

EVERY = [pytest.param(case, id=case.name, marks=case.marks) for case in CASES]
WITH_SERVER = [
    pytest.param(case, id=case.name, marks=(*case.marks, *case.server_marks))
    for case in CASES
    if case.server_fixture
]
WITH_CREDENTIALS = [each for each, case in zip(EVERY, CASES, strict=True) if case.wrong_credentials]

BODY = {"text": "snow ❄", "number": 5, "list": [1, None, True]}


@pytest.fixture(scope="session", params=EVERY)
def served(request: pytest.FixtureRequest) -> tuple[TransportCase, str | None]:
    """A transport under test and the URL of its broker, which runs until the last test."""
    return request.param, find_url(request.param, request)


@pytest.fixture
def broker(served: tuple[TransportCase, str | None]) -> Iterator[Broker]:
    made = Broker(*served)
    yield made
    made.close()


@pytest.fixture
def connection(broker: Broker) -> Connection:
    return broker.connection()


@pytest.fixture
def queue(broker: Broker, connection: Connection) -> Iterator[Queue]:
    """A queue on a direct exchange of its own, both declared; removed after the test."""
    name = broker.name()
    bound: Queue = Queue(name, Exchange(name, "direct"), routing_key=name)(connection.channel())
    bound.declare()
    yield bound
    cleanup = broker.connection().channel()
    Queue(name)(cleanup).delete()
    Exchange(name)(cleanup).delete()


@pytest.fixture
def producer(connection: Connection, queue: Queue) -> Producer:
    return Producer(connection.channel(), queue.exchange, queue.routing_key)


def refuses(broker: Broker, feature: str, operation: Callable[[], object]) -> bool:
    """Tell whether the transport has no such feature; then it must say so when asked for it."""
    if getattr(broker.implements, feature):
        return False
    transport = broker.connection().transport
    with pytest.raises(UnsupportedOperation) as caught:
        operation()
    assert transport.driver_type in str(caught.value)
    assert isinstance(caught.value, NotImplementedError)
    return True


def get(queue: Queue, seconds: float = PATIENCE) -> Any:
    """Take a message, which may still be on its way."""
    deadline = time.monotonic() + seconds
    while True:
        message = queue.get()
        if message is not None:
            return message
        assert time.monotonic() < deadline, f"no message in {queue.name}"
        _sleep(0.01)


def get_all(queue: Queue, count: int) -> list[Any]:
    return [get(queue) for _ in range(count)]


def drain_until(
    connection: Connection, condition: Callable[[], object], seconds: float = PATIENCE
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        left = deadline - time.monotonic()
        assert left > 0, "it did not come"
        try:
            connection.drain_events(timeout=left)
        except TimeoutError:
            continue


def nothing_comes(connection: Connection) -> None:
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=SHORT)


def wait_until(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        _sleep(0.01)


def _sleep(seconds: float) -> None:
    from hub.environment import get_environment

    get_environment().sleep(seconds)


# -- what is sent is what comes


def test_a_message_round_trip_keeps_everything(producer: Producer, queue: Queue) -> None:
    producer.publish(
        BODY,
        headers={"h": "é", "n": 3},
        correlation_id="c",
        reply_to="r",
        message_id="m",
        type="t",
        app_id="a",
        priority=2,
    )
    message = get(queue)
    assert message.payload == BODY
    assert message.headers == {"h": "é", "n": 3}
    for name, value in {
        "correlation_id": "c",
        "reply_to": "r",
        "message_id": "m",
        "type": "t",
        "app_id": "a",
        "priority": 2,
        "delivery_mode": 2,
    }.items():
        assert message.properties[name] == value
    assert message.content_type == "application/json"
    assert message.content_encoding == "utf-8"
    assert message.delivery_info["exchange"] == queue.exchange.name
    assert message.delivery_info["routing_key"] == queue.routing_key
    assert not message.delivery_info.get("redelivered")
    message.ack()
    assert queue.get() is None


@pytest.mark.parametrize(
    "body",
    [b"", b"\x00\xff\xfe binary \x00", bytes(range(256)) * 4096, "", "ünïcode ❄", "x" * 1_000_000],
    ids=["empty", "binary", "1 MB", "empty text", "text", "1 MB of text"],
)
def test_bodies_of_all_kinds_and_sizes(producer: Producer, queue: Queue, body: Any) -> None:
    producer.publish(body)
    message = get(queue)
    expected = body if isinstance(body, bytes) else body.encode()
    found = message.body if isinstance(message.body, bytes) else message.body.encode()
    assert found == expected
    if body:
        assert message.payload == body
    message.ack()


def test_compressed_bodies(producer: Producer, queue: Queue) -> None:
    producer.publish(BODY, compression="zlib")
    message = get(queue)
    assert message.payload == BODY
    message.ack()


def test_unicode_names(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    name = broker.name("Schneeflöckchen ❄ /&?#")
    exchange = Exchange(name, "direct")
    queue = Queue(name, exchange, routing_key=name)(channel)
    queue.declare()
    try:
        Producer(channel, exchange, name).publish("x")
        message = get(queue)
        assert message.delivery_info["routing_key"] == name
        message.ack()
    finally:
        queue.delete()
        exchange(channel).delete()


def test_order_is_kept(producer: Producer, queue: Queue) -> None:
    for number in range(50):
        producer.publish(number)
    messages = get_all(queue, 50)
    assert [message.payload for message in messages] == list(range(50))
    for message in messages:
        message.ack()


# -- exchanges


@pytest.mark.parametrize(
    ("kind", "bindings", "keys", "expected"),
    [
        ("direct", ["a", "b"], ["a", "a.b", "c"], [["a"], []]),
        ("direct", ["a", "a"], ["a"], [["a"], ["a"]]),
        (
            "topic",
            ["*.stock.#", "#"],
            ["usd.stock", "eur.stock.db", "stock.nasdaq", "a.b.stock"],
            [
                ["eur.stock.db", "usd.stock"],
                ["a.b.stock", "eur.stock.db", "stock.nasdaq", "usd.stock"],
            ],
        ),
        ("fanout", ["a", "b"], ["c"], [["c"], ["c"]]),
    ],
    ids=["direct", "direct twice", "topic", "fanout"],
)
def test_b125_exchange_types(
    broker: Broker,
    connection: Connection,
    kind: str,
    bindings: list[str],
    keys: list[str],
    expected: list[list[str]],
) -> None:
    channel = connection.channel()
    exchange = Exchange(broker.name(), kind)
    queues = [Queue(broker.name(), exchange, routing_key=key)(channel) for key in bindings]
    for queue in queues:
        queue.declare()
    producer = Producer(channel, exchange)
    try:
        if refuses(broker, kind, lambda: producer.publish("x", routing_key="x")):
            return
        # Consumed from the beginning: not every broker keeps broadcasts for those who come later.
        found: list[list[Any]] = [[] for _ in queues]
        with contextlib.ExitStack() as stack:
            for queue, bodies in zip(queues, found, strict=True):
                consumer = Consumer(channel, [queue], no_ack=True)
                consumer.register_callback(lambda body, _, bodies=bodies: bodies.append(body))
                stack.enter_context(consumer)
            for key in keys:
                producer.publish(key, routing_key=key)
            drain_until(connection, lambda: sum(map(len, found)) >= sum(map(len, expected)))
            nothing_comes(connection)
        assert list(map(sorted, found)) == expected
    finally:
        for queue in queues:
            queue.delete()
        exchange(channel).delete()


def test_b126_headers_exchange(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    exchange = Exchange(broker.name(), "headers")

    def declare(arguments: dict[str, Any]) -> Queue:
        queue: Queue = Queue(broker.name(), exchange, binding_arguments=arguments)(channel)
        queue.declare()
        return queue

    if refuses(broker, "headers", lambda: declare({"x-match": "all", "a": 1})):
        return
    both, one = (declare({"x-match": how, "a": 1, "b": "x"}) for how in ("all", "any"))
    producer = Producer(channel, exchange)
    try:
        producer.publish("both", headers={"a": 1, "b": "x", "c": 2})
        producer.publish("one", headers={"a": 1})
        producer.publish("none", headers={"a": 2})
        assert get(both).payload == "both"
        assert [message.payload for message in get_all(one, 2)] == ["both", "one"]
        assert both.get() is None
        assert one.get() is None
    finally:
        both.delete()
        one.delete()
        exchange(channel).delete()


def test_the_nameless_exchange_knows_queues_by_name(connection: Connection, queue: Queue) -> None:
    Producer(connection.channel()).publish("x", routing_key=queue.name)
    message = get(queue)
    assert message.payload == "x"
    message.ack()


def test_exchanges_bound_to_exchanges(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    source, target = (Exchange(broker.name(), "topic")(channel) for _ in range(2))
    source.declare()
    target.declare()
    queue = Queue(broker.name(), target, routing_key="#")(channel)
    queue.declare()
    try:
        if refuses(broker, "exchange_bindings", lambda: target.bind_to(source, routing_key="a.#")):
            return
        target.bind_to(source, routing_key="a.#")
        producer = Producer(channel, source)
        producer.publish("yes", routing_key="a.b")
        producer.publish("no", routing_key="b")
        assert get(queue).payload == "yes"
        assert queue.get() is None
        target.unbind_from(source, routing_key="a.#")
    finally:
        queue.delete()
        source.delete()
        target.delete()


# -- declarations


def test_b128_declaring_twice_is_the_same(queue: Queue, producer: Producer) -> None:
    producer.publish("x")
    get(queue).requeue()
    queue.declare()
    declared = queue.queue_declare(passive=True)
    assert declared[0] == queue.name
    get(queue).ack()


def test_b128_a_passive_declaration_of_what_is_missing(
    broker: Broker, connection: Connection
) -> None:
    exchange = Exchange(broker.name(), "direct", passive=True)
    with pytest.raises(connection.channel_errors):
        exchange(connection.channel()).declare()


def test_b133_the_broker_names_anonymous_queues(connection: Connection) -> None:
    queue = Queue("", durable=False, auto_delete=True)(connection.channel())
    queue.declare()
    assert queue.name
    queue.delete()


def test_b158_declaring_an_exchange_again_with_another_type(
    broker: Broker, connection: Connection, queue: Queue
) -> None:
    with pytest.raises(connection.channel_errors, match=queue.exchange.name):
        Exchange(queue.exchange.name, "topic")(connection.channel()).declare()


def test_b130_b159_unbind_and_delete_stop_the_flow(
    broker: Broker, connection: Connection, queue: Queue
) -> None:
    channel = connection.channel()
    producer = Producer(channel, queue.exchange, queue.routing_key)
    queue.unbind()
    producer.publish("not bound")
    queue.queue_bind()
    producer.publish("bound")
    message = get(queue)
    assert message.payload == "bound"
    message.ack()
    assert queue.get() is None
    queue.delete()
    producer.publish("deleted")
    queue.declare()
    assert queue.get() is None


def test_b098_purge_returns_the_count(queue: Queue, producer: Producer) -> None:
    for number in range(3):
        producer.publish(number)
    deadline = time.monotonic() + PATIENCE
    purged = queue.purge()
    while purged < 3 and time.monotonic() < deadline:
        purged += queue.purge()
    assert purged == 3
    assert queue.purge() == 0
    assert queue.get() is None


# -- settling


def test_b116_b117_ack_reject_requeue(queue: Queue, producer: Producer) -> None:
    for text in ("acked", "rejected", "requeued"):
        producer.publish(text)
    acked, rejected, requeued = get_all(queue, 3)
    acked.ack()
    rejected.reject()
    requeued.requeue()
    again = get(queue)
    assert again.payload == "requeued"
    assert again.delivery_info.get("redelivered")
    for settled in (acked, rejected, requeued):
        for settle in (settled.ack, settled.reject, settled.requeue):
            with pytest.raises(settled.MessageStateError):
                settle()
    again.ack()
    assert queue.get() is None


def test_b099_recover_redelivers(connection: Connection, queue: Queue, producer: Producer) -> None:
    got: list[Any] = []
    with Consumer(connection.channel(), queue, on_message=got.append) as consumer:
        producer.publish("x")
        drain_until(connection, lambda: got)
        consumer.recover(requeue=True)
        drain_until(connection, lambda: len(got) == 2)
        assert got[1].payload == "x"
        assert got[1].delivery_info.get("redelivered")
        got[1].ack()


@pytest.mark.parametrize("how", ["channel", "connection"])
def test_b153_unsettled_messages_return_at_close(
    broker: Broker, queue: Queue, producer: Producer, how: str
) -> None:
    for number in range(3):
        producer.publish(number)
    other = broker.connection()
    channel = other.channel()
    theirs = queue(channel)
    taken = get_all(theirs, 3)
    taken[1].ack()
    if how == "channel":
        channel.close()
    else:
        other.close()
    messages = get_all(queue, 2)
    assert [message.payload for message in messages] == [0, 2]
    assert all(message.delivery_info.get("redelivered") for message in messages)
    for message in messages:
        message.ack()
    assert queue.get() is None


def test_dead_letters(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    dead = Queue(broker.name("dead"), Exchange(broker.name("dlx"), "direct"), routing_key="k")(
        channel
    )
    dead.declare()
    queue = Queue(
        broker.name(),
        queue_arguments={
            "x-dead-letter-exchange": dead.exchange.name,
            "x-dead-letter-routing-key": "k",
        },
    )(channel)
    try:
        if refuses(broker, "dead_letter", queue.declare):
            return
        queue.declare()
        Producer(channel).publish("x", routing_key=queue.name, headers={"h": 1})
        get(queue).reject()
        message = get(dead)
        assert message.payload == "x"
        assert message.headers["h"] == 1
        assert message.headers["x-death"][0]["queue"] == queue.name
        assert message.headers["x-death"][0]["reason"] == "rejected"
        message.ack()
    finally:
        queue.delete()
        dead.delete()
        dead.exchange.delete()


# -- limits of queues and messages


def test_priorities(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    queue = Queue(broker.name(), queue_arguments={"x-max-priority": 9})(channel)
    if refuses(broker, "priorities", queue.declare):
        return
    queue.declare()
    try:
        producer = Producer(channel)
        for priority in (0, 9, 3, 9):
            producer.publish(priority, routing_key=queue.name, priority=priority)
        wait_until(lambda: queue.queue_declare(passive=True)[1] == 4)
        found = [message.payload for message in get_all(queue, 4)]
        assert found == [9, 9, 3, 0]
    finally:
        queue.delete()


def test_messages_expire(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    queue = Queue(broker.name(), queue_arguments={"x-message-ttl": 50})(channel)
    if refuses(broker, "ttl", queue.declare):
        return
    queue.declare()
    own = Queue(broker.name())(channel)
    own.declare()
    try:
        producer = Producer(channel)
        producer.publish("queue's", routing_key=queue.name)
        producer.publish("own", routing_key=own.name, expiration=0.05)
        wait_until(lambda: queue.queue_declare(passive=True)[1] == 0)
        _sleep(0.2)
        assert queue.get() is None
        assert own.get() is None
    finally:
        queue.delete()
        own.delete()


def test_queues_expire(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    name = broker.name()
    queue = Queue(name, queue_arguments={"x-expires": 100})(channel)
    if refuses(broker, "queue_expiry", queue.declare):
        return
    queue.declare()

    def gone() -> bool:
        # The broker closes a channel that asks for what is missing.
        with broker.connection().channel() as asking:
            try:
                Queue(name)(asking).queue_declare(passive=True)
            except connection.channel_errors:
                return True
            _sleep(0.3)  # asking is a use
            return False

    wait_until(gone)


def test_full_queues_drop_their_oldest(broker: Broker, connection: Connection) -> None:
    channel = connection.channel()
    queue = Queue(broker.name(), queue_arguments={"x-max-length": 2})(channel)
    if refuses(broker, "max_length", queue.declare):
        return
    queue.declare()
    try:
        producer = Producer(channel)
        for number in range(5):
            producer.publish(number, routing_key=queue.name)
        wait_until(lambda: queue.queue_declare(passive=True)[1] == 2)
        assert [message.payload for message in get_all(queue, 2)] == [3, 4]
    finally:
        queue.delete()


def test_b082_mandatory_messages_come_back(
    broker: Broker, connection: Connection, queue: Queue
) -> None:
    if not broker.implements.returns:
        pytest.fail("say in the contract what such a transport does")
    came_back: list[Any] = []
    producer = Producer(
        connection.channel(),
        queue.exchange,
        on_return=lambda *args: came_back.append(args),
    )
    producer.publish("x", routing_key="nobody", mandatory=True)
    drain_until(connection, lambda: came_back)
    _, exchange, routing_key, message = came_back[0]
    assert (exchange, routing_key) == (queue.exchange.name, "nobody")
    assert message.body in (b"x", "x")


def test_mandatory_messages_come_back_to_the_publish_that_waits_for_its_confirm(
    broker: Broker, queue: Queue
) -> None:
    came_back: list[Any] = []
    connection = broker.connection(confirm_publish=True)
    producer = Producer(
        connection.channel(), queue.exchange, on_return=lambda *args: came_back.append(args[2])
    )
    producer.publish("x", routing_key=queue.routing_key, mandatory=True)
    assert came_back == []
    producer.publish("x", routing_key="nobody", mandatory=True)
    assert came_back == ["nobody"]


def test_a_transaction_publishes_at_its_commit(
    broker: Broker, connection: Connection, queue: Queue
) -> None:
    channel = connection.channel()
    if refuses(broker, "transactions", channel.tx_select):
        for operation in (channel.tx_commit, channel.tx_rollback):
            assert refuses(broker, "transactions", operation)
        return
    channel.tx_select()
    producer = Producer(channel, queue.exchange, queue.routing_key)
    producer.publish("dropped")
    channel.tx_rollback()
    producer.publish("kept")
    channel.tx_commit()
    assert get(queue).payload == "kept"
    assert queue.get() is None


# -- consuming


def test_b089_consumers_on_several_channels(
    broker: Broker, connection: Connection, queue: Queue, producer: Producer
) -> None:
    got: list[Any] = []
    other = Queue(broker.name(), queue.exchange, routing_key="other")

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    with (
        Consumer(connection.channel(), queue, callbacks=[take]),
        Consumer(connection.channel(), other, callbacks=[take]),
    ):
        producer.publish(1)
        producer.publish(2, routing_key="other")
        drain_until(connection, lambda: len(got) == 2)
    assert sorted(got) == [1, 2]
    other(connection.channel()).delete()


def test_b097_prefetch(
    connection: Connection, broker: Broker, queue: Queue, producer: Producer
) -> None:
    got: list[Any] = []
    assert broker.implements.prefetch
    with Consumer(connection.channel(), queue, on_message=got.append, prefetch_count=2):
        for number in range(5):
            producer.publish(number)
        drain_until(connection, lambda: len(got) == 2)
        nothing_comes(connection)
        got[0].ack()
        drain_until(connection, lambda: len(got) == 3)
        nothing_comes(connection)
        for message in got[1:]:
            message.ack()
        drain_until(connection, lambda: len(got) == 5)
        for message in got[3:]:
            message.ack()


def test_b101_no_ack_needs_none(
    broker: Broker, connection: Connection, queue: Queue, producer: Producer
) -> None:
    got: list[Any] = []
    other = broker.connection()
    with Consumer(other.channel(), queue, on_message=got.append, no_ack=True):
        for number in range(3):
            producer.publish(number)
        drain_until(other, lambda: len(got) == 3)
    other.close()
    assert queue.get() is None


def test_b094_a_cancelled_consumer_gets_nothing(
    connection: Connection, queue: Queue, producer: Producer
) -> None:
    got: list[Any] = []
    consumer = Consumer(connection.channel(), queue, on_message=got.append)
    consumer.consume()
    producer.publish(1)
    drain_until(connection, lambda: got)
    consumer.cancel()
    producer.publish(2)
    nothing_comes(connection)
    got[0].ack()
    message = get(queue)
    assert message.payload == 2
    message.ack()


def test_cancel_while_another_task_waits(
    env: Environment, broker: Broker, connection: Connection, queue: Queue, producer: Producer
) -> None:
    got: list[Any] = []
    other = Queue(broker.name())
    stays = Consumer(connection.channel(), other, no_ack=True, on_message=got.append)
    stays.consume()
    consumer = Consumer(connection.channel(), queue, on_message=got.append)
    consumer.consume()
    inbox = connection.connection.inbox
    task = env.spawn(connection.drain_events, timeout=4 * PATIENCE)
    wait_until(lambda: "0 listening" not in repr(inbox))
    started = time.monotonic()
    consumer.cancel()
    assert time.monotonic() - started < PATIENCE, "cancel waited for the drain"
    producer.publish("x")
    message = get(queue)
    assert message.payload == "x"
    message.ack()
    assert not task.done
    producer.publish("the end", exchange="", routing_key=other.name)
    task.result(PATIENCE)
    assert [each.payload for each in got] == ["the end"]
    stays.cancel()
    other(connection.channel()).delete()


def test_b030_drain_times_out(connection: Connection, queue: Queue) -> None:
    with Consumer(connection.channel(), queue, on_message=print):
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.2)
        assert 0.15 < time.monotonic() - started < PATIENCE
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0)


def test_s29_a_callback_publishes_on_its_own_connection(
    broker: Broker, connection: Connection, queue: Queue, producer: Producer
) -> None:
    count = 300
    channel = connection.channel()
    out = Queue(broker.name(), queue.exchange, routing_key="out")(channel)
    out.declare()
    for number in range(count):
        producer.publish(number)
    got: list[Any] = []

    def forward(body: Any, message: Any) -> None:
        producer.publish(body, routing_key="out")
        message.ack()
        got.append(body)

    with Consumer(channel, queue, callbacks=[forward]):
        drain_until(connection, lambda: len(got) == count, seconds=60)
    assert got == list(range(count))
    assert [message.payload for message in get_all(out, count)] == got
    out.delete()


# -- many tasks, many processes


def test_several_tasks_share_one_connection(
    env: Environment, broker: Broker, connection: Connection, queue: Queue
) -> None:
    """Three publish on channels of their own, two drain: everything comes once."""
    each = 30
    got: list[Any] = []

    def publish(number: int) -> None:
        producer = Producer(connection.channel(), queue.exchange, queue.routing_key)
        for index in range(each):
            producer.publish([number, index])
            env.sleep(0)

    def drain() -> None:
        deadline = time.monotonic() + PATIENCE
        while len(got) < 3 * each and time.monotonic() < deadline:
            try:
                connection.drain_events(timeout=0.3)
            except TimeoutError:
                pass

    def take(body: Any, message: Any) -> None:
        got.append(tuple(body))
        message.ack()

    with Consumer(connection.channel(), queue, callbacks=[take]):
        tasks = [env.spawn(drain) for _ in range(2)]
        tasks += [env.spawn(publish, number) for number in range(3)]
        for task in tasks:
            assert task.join(2 * PATIENCE)
            task.result(0)
    assert sorted(got) == [(number, index) for number in range(3) for index in range(each)]


def test_s14_close_ends_the_wait_of_another_task(
    env: Environment, broker: Broker, queue: Queue
) -> None:
    other = broker.connection()
    consumer = Consumer(other.channel(), queue, on_message=print)
    consumer.consume()
    errors: list[BaseException] = []

    def drain() -> None:
        try:
            other.drain_events(timeout=60)
        except BaseException as exc:
            errors.append(exc)

    task = env.spawn(drain)
    env.sleep(0.1)
    other.close()
    assert task.join(PATIENCE)
    assert isinstance(errors[0], other.connection_errors)


def test_other_tasks_run_during_every_call(
    env: Environment, ticker: Ticker, broker: Broker, queue: Queue, producer: Producer
) -> None:
    connection = broker.connection()
    channel = connection.channel()
    bound = queue(channel)
    bound.declare()
    got: list[Any] = []
    consumer = Consumer(channel, bound, on_message=got.append)
    consumer.consume()
    for _ in range(5):  # one is enough for sixty ticks, unless the machine stands still
        nothing_comes(connection)
        if ticker.ticks > 20:
            break
    producer.publish(b"x" * 1_000_000)
    drain_until(connection, lambda: got)
    got[0].ack()
    bound.get()
    consumer.cancel()
    connection.close()
    assert ticker.ticks > 20


_OTHER_PROCESS = textwrap.dedent(
    """
    import json, os, sys, time
    from greenkombu import Connection, Queue, Producer

    url, transport, options, name, answers, what = sys.argv[1:]
    connection = Connection(
        url or None, transport=transport or None, transport_options=json.loads(options)
    )
    channel = connection.channel()
    queue = Queue(name)(channel)
    deadline = time.monotonic() + 30
    if what == "look":
        assert queue.get() is None
        sys.exit()
    while (message := queue.get()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    if what == "die":
        print("taken", flush=True)
        os.kill(os.getpid(), 9)
    Producer(channel).publish(["answer", message.payload], routing_key=answers)
    message.ack()
    connection.close()
    """
)


def other_process(broker: Broker, queue: Queue, what: str, answers: str = "") -> Any:
    options = json.dumps(dict(broker.case.options))
    arguments = [broker.url or "", broker.transport_path, options, queue.name, answers, what]
    return subprocess.Popen(
        [sys.executable, "-c", _OTHER_PROCESS, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes(broker: Broker, connection: Connection, queue: Queue) -> None:
    Producer(connection.channel()).publish("question", routing_key=queue.name)
    if not broker.implements.shared:
        # As its `implements` says, another process has another broker.
        with other_process(broker, queue, "look") as child:
            assert child.wait(30) == 0
        get(queue).ack()
        return
    answers = Queue(broker.name())(connection.channel())
    answers.declare()
    with other_process(broker, queue, "answer", answers.name) as child:
        try:
            message = get(answers, 30)
            assert message.payload == ["answer", "question"]
            message.ack()
            assert child.wait(30) == 0
        finally:
            child.kill()
    answers.delete()


def test_s05_messages_of_a_killed_process_return(
    broker: Broker, connection: Connection, queue: Queue
) -> None:
    if not broker.implements.shared:
        return  # see test_two_processes
    Producer(connection.channel()).publish("x", routing_key=queue.name)
    with other_process(broker, queue, "die") as child:
        try:
            assert child.stdout.readline() == "taken\n"
            child.wait(30)
        finally:
            child.kill()
    message = get(queue, 60)
    assert message.payload == "x"
    assert message.delivery_info.get("redelivered")
    message.ack()


# -- servers


@pytest.mark.parametrize("case", WITH_CREDENTIALS)
def test_wrong_credentials_are_refused(request: pytest.FixtureRequest, case: TransportCase) -> None:
    url = find_url(case, request)
    assert url is not None
    assert case.wrong_credentials is not None
    broker = Broker(case, case.wrong_credentials(url))
    connection = broker.connection()
    with pytest.raises((*connection.connection_errors, *connection.channel_errors)) as caught:
        connection.connect()
    password = connection.password
    assert password
    assert password not in str(caught.value)
    broker.close()


@pytest.mark.parametrize("case", WITH_SERVER)
def test_a_restart_of_the_server_is_survived(
    request: pytest.FixtureRequest, case: TransportCase, env: Environment
) -> None:
    assert case.server_fixture is not None
    server: Server = request.getfixturevalue(case.server_fixture)()
    broker = Broker(case, case.address(server.url))
    connection = broker.connection()
    name = broker.name()
    got: list[Any] = []

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    def consume() -> Any:
        consumer = Consumer(connection.channel(), Queue(name), callbacks=[take])
        consumer.consume()
        return consumer

    consume()
    publisher = broker.connection()
    Producer(publisher).publish(1, routing_key=name, retry=True)
    drain_until(connection, lambda: got == [1])
    # The ack may still be on its way when the server stops, which then gives the message again.
    server.restart()
    with pytest.raises(connection.connection_errors):
        drain_until(connection, lambda: False, 60)
    connection.ensure_connection(max_retries=None, interval_start=0.2, interval_max=1)
    consume()
    Producer(publisher).publish(2, routing_key=name, retry=True)
    drain_until(connection, lambda: 2 in got, 60)
    assert got in ([1, 2], [1, 1, 2])
    broker.close()
