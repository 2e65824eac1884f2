"""greenkombu.mixins: behaviours 144-150."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Producer
from greenkombu.mixins import ConsumerMixin, ConsumerProducerMixin
from greenkombu.transport.base import Transport
from greenkombu.utils.limits import TokenBucket
from hub.environment import Environment
from tests.support.tasks import until


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


@pytest.fixture
def queue(request: pytest.FixtureRequest, connection: Connection) -> Iterator[Queue]:
    name = request.node.name
    made = Queue(name, Exchange(name), name)
    made.declare(channel=connection.default_channel)
    yield made
    connection.default_channel.queue_delete(name)


def put(connection: Connection, queue: Queue, *bodies: Any, **options: Any) -> None:
    producer = Producer(connection)
    for body in bodies:
        producer.publish(body, exchange=queue.exchange, routing_key=queue.name, **options)


class Worker(ConsumerMixin):
    """Notes what happens; a body that is an exception's name raises it, "stop" stops."""

    errors = {"lost": ConnectionResetError, "bug": ZeroDivisionError}  # noqa: RUF012

    def __init__(self, connection: Connection, queue: Queue) -> None:
        self.connection = connection
        self.queue = queue
        self.events: list[Any] = []
        self.used: Any = None
        # A start per second is for real brokers.
        self.restart_limit = TokenBucket(100)

    def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
        self.events.append("get_consumers")
        assert channel.connection.client is not self.connection
        return [Consumer(self.queue, callbacks=[self.on_task])]

    def on_task(self, body: Any, message: Any) -> None:
        self.events.append(body)
        message.ack()
        if body in self.errors:
            raise self.errors[body](body)
        if body == "stop":
            self.should_stop = True

    @contextmanager
    def extra_context(self, connection: Connection, channel: Any) -> Iterator[None]:
        self.events.append("extra in")
        try:
            yield
        finally:
            self.events.append("extra out")

    def on_connection_revived(self) -> None:
        self.events.append("revived")

    def on_consume_ready(
        self, connection: Connection, channel: Any, consumers: Any, **kwargs: Any
    ) -> None:
        self.used = connection
        assert channel is connection.default_channel
        assert consumers[0].consuming_from(self.queue)
        self.events.append(("ready", kwargs))

    def on_consume_end(self, connection: Connection, channel: Any) -> None:
        assert connection.connected
        self.events.append("end")


def test_b145_handlers_are_called_in_order(connection: Connection, queue: Queue) -> None:
    put(connection, queue, "a", "stop")
    worker = Worker(connection, queue)
    worker.run(colour="red")
    assert worker.events == [
        "revived",
        "get_consumers",
        "extra in",
        ("ready", {"colour": "red"}),
        "a",
        "stop",
        "extra out",
        "end",
    ]
    assert not worker.used.connected, "the worker's connection is closed"
    assert connection.connected, "the one it was cloned from is not"


def test_b144_a_lost_connection_is_established_again(
    connection: Connection, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    put(connection, queue, "a", "lost", "b", "stop")
    worker = Worker(connection, queue)
    with caplog.at_level(logging.WARNING):
        worker.run()
    bodies = [event for event in worker.events if event in ("a", "b", "lost", "stop")]
    assert bodies == ["a", "lost", "b", "stop"]
    assert worker.events.count("revived") == 2
    assert worker.events.count("end") == 1, "there is no polite end of a lost connection"
    assert "Connection to broker lost" in caplog.text


def test_b144_other_errors_are_the_callers(connection: Connection, queue: Queue) -> None:
    put(connection, queue, "bug")
    worker = Worker(connection, queue)
    with pytest.raises(ZeroDivisionError):
        worker.run()
    assert worker.events[-1] == "extra out"
    assert not worker.used.connected


def test_b144_restarts_are_limited(connection: Connection, queue: Queue) -> None:
    put(connection, queue, "lost", "stop")
    worker = Worker(connection, queue)
    worker.restart_limit = TokenBucket(5)
    started = time.monotonic()
    worker.run()
    assert time.monotonic() - started > 0.1
    assert Worker(connection, queue).restart_limit is not worker.restart_limit
    assert ConsumerMixin().restart_limit.expected_time(0) == 0


class Refusing(Transport):
    """Cannot connect."""

    connection_errors = (OSError,)
    channel_errors = ()

    def establish_connection(self) -> Any:
        raise ConnectionRefusedError("nobody listens")


def test_b144_connect_max_retries_bounds_it(queue: Queue) -> None:
    worker = Worker(Connection("nowhere", transport=Refusing), queue)
    worker.connect_max_retries = 1
    seen: list[tuple[type[BaseException], float]] = []
    worker.on_connection_error = lambda exc, interval: seen.append((type(exc), interval))  # type: ignore[method-assign]
    worker.connection.transport_options = {}
    started = time.monotonic()
    with pytest.raises(exceptions.OperationalError, match="nobody listens"):
        worker.run()
    ((kind, interval),) = seen
    assert kind is ConnectionRefusedError
    assert 2.0 <= interval <= 2.5
    assert time.monotonic() - started < 20


class RefusingAsLibrary(Transport):
    """Cannot connect, and says so as AMQP and Redis do: with an error that is in its own lists."""

    connection_errors = (exceptions.OperationalError,)
    channel_errors = ()

    def establish_connection(self) -> Any:
        raise exceptions.OperationalError("nobody listens")


def test_b144_run_ends_when_an_error_of_the_connection_is_the_last_try(queue: Queue) -> None:
    worker = Worker(Connection("nowhere", transport=RefusingAsLibrary), queue)
    worker.connect_max_retries = 0
    worker.connection.transport_options = {}
    worker.warn = lambda *_args, **_kwargs: setattr(worker, "should_stop", True)  # type: ignore[method-assign]
    with pytest.raises(exceptions.OperationalError, match="nobody listens"):
        worker.run()


class LettingNobodyIn(Transport):
    """Is there, and refuses every login; no retry of a connection mends that."""

    class Refused(Exception):
        pass

    connection_errors = (Refused,)
    recoverable_connection_errors = ()
    channel_errors = ()

    def establish_connection(self) -> Any:
        raise self.Refused("check user name and password")


def test_b146_a_refused_login_is_one_line_for_each_try(
    queue: Queue, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("greenkombu.mixins.CONNECT_INTERVAL_START", 0.001)
    monkeypatch.setattr("greenkombu.mixins.CONNECT_INTERVAL_STEP", 0.001)
    worker = Worker(Connection("nowhere", transport=LettingNobodyIn), queue)
    worker.connect_max_retries = 3
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(LettingNobodyIn.Refused, match="check user name"),
    ):
        worker.run()
    lines = [line for line in caplog.text.splitlines() if line]
    assert len(lines) == len(caplog.records) == 3, caplog.text
    assert all("trying again in 0.0 seconds: Refused: check user name" in line for line in lines)


def test_a_worker_that_nobody_lets_in_can_be_stopped(queue: Queue, env: Environment) -> None:
    worker = Worker(Connection("nowhere", transport=LettingNobodyIn), queue)
    seen: list[float] = []
    worker.on_connection_error = lambda _exc, interval: seen.append(interval)  # type: ignore[method-assign]
    task = env.spawn(worker.run)
    until(env, lambda: seen)
    worker.should_stop = True
    assert task.join(20)
    assert 2 <= seen[0] <= 2.5


def test_the_loss_of_a_connection_is_one_line(
    connection: Connection, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    put(connection, queue, "lost", "stop")
    with caplog.at_level(logging.WARNING):
        Worker(connection, queue).run()
    (line,) = caplog.text.splitlines()
    assert line.endswith("trying to re-establish connection: ConnectionResetError: lost")


def test_b146_connection_errors_are_logged(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker(connection, Queue("q"))
    with caplog.at_level(logging.WARNING):
        worker.on_connection_error(ConnectionResetError("gone"), 4.0)
    assert "trying again in 4.0 seconds" in caplog.text
    assert "gone" in caplog.text


def test_b147_undecodable_messages_are_logged_and_acknowledged(
    connection: Connection, queue: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    put(connection, queue, b"{", content_type="application/json", content_encoding="utf-8")
    put(connection, queue, "stop")
    worker = Worker(connection, queue)
    with caplog.at_level(logging.ERROR):
        worker.run()
    assert "Can't decode message body" in caplog.text
    assert queue(connection.default_channel).get() is None


def test_b147_the_log_holds_no_huge_body(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    from greenkombu.message import Message

    worker = Worker(connection, Queue("q"))
    acked: list[int] = []
    message: Any = Message(b"x" * 10**6, content_type="application/json")
    message.ack = lambda: acked.append(1)
    with caplog.at_level(logging.ERROR):
        worker.on_decode_error(message, ValueError("broken"))
    assert acked == [1]
    assert len(caplog.text) < 5000


def test_b148_consume_stops_at_the_limit(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1, 2, 3)
    worker = Worker(connection, queue)
    assert list(worker.consume(limit=2)) == [None, None]
    assert worker.events[-2:] == ["extra out", "end"]
    assert [event for event in worker.events if isinstance(event, int)] == [1, 2]


def test_b148_consume_raises_at_the_timeout(connection: Connection, queue: Queue) -> None:
    put(connection, queue, 1)
    worker = Worker(connection, queue)
    started = time.monotonic()
    seen = []
    with pytest.raises(TimeoutError):
        seen.extend(worker.consume(timeout=0.2, safety_interval=5))
    assert 0.15 < time.monotonic() - started < 10
    assert worker.events.count(1) == 1


def test_b148_a_timeout_ends_run(connection: Connection, queue: Queue) -> None:
    worker = Worker(connection, queue)
    with pytest.raises(TimeoutError):
        worker.run(timeout=0.1)


def test_b149_it_runs_in_a_task_and_stops_when_told(
    connection: Connection, queue: Queue, env: Environment
) -> None:
    worker = Worker(connection, queue)
    task = env.spawn(worker.run, safety_interval=0.05)
    for number in range(20):
        put(connection, queue, number)
        env.sleep(0)
    deadline = time.monotonic() + 10
    while worker.events.count(19) == 0 and time.monotonic() < deadline:
        env.sleep(0.01)
    worker.should_stop = True
    assert task.join(10)
    assert [event for event in worker.events if isinstance(event, int)] == list(range(20))
    assert worker.events[-1] == "end"


def test_b149_iterations_are_announced(connection: Connection, queue: Queue) -> None:
    worker = Worker(connection, queue)
    seen: list[int] = []
    worker.on_iteration = lambda: seen.append(1)  # type: ignore[method-assign]
    put(connection, queue, 1, 2)
    list(worker.consume(limit=2))
    assert seen == [1, 1]


def test_b150_it_can_log(connection: Connection, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(connection, Queue("q"))
    with caplog.at_level(logging.INFO):
        worker.info("started %s", "well")
        worker.error("task raised: %r", ValueError("x"))
    assert "started well" in caplog.text
    assert "task raised" in caplog.text


def test_get_consumers_must_be_defined(connection: Connection) -> None:
    class Empty(ConsumerMixin):
        pass

    worker = Empty()
    worker.connection = connection
    with pytest.raises(NotImplementedError, match="get_consumers"):
        list(worker.consume(limit=1))


def test_maybe_conn_error_ignores_broken_connections(connection: Connection) -> None:
    worker = Worker(connection, Queue("q"))

    def fail(error: BaseException) -> None:
        raise error

    lost = connection.connection_errors[0]("gone")
    assert worker.maybe_conn_error(lambda: fail(lost)) is None
    assert worker.maybe_conn_error(lambda: 3) == 3
    with pytest.raises(KeyError):
        worker.maybe_conn_error(lambda: fail(KeyError("mine")))


def test_context_managers_of_the_parts(connection: Connection, queue: Queue) -> None:
    worker = Worker(connection, queue)
    with worker.establish_connection() as established:
        assert established.connected
        assert established is not connection
    assert not established.connected
    with worker.Consumer() as (used, channel, consumers):
        assert channel is used.default_channel
        assert len(consumers) == 1
    with worker.consumer_context(a=1) as (used, channel, consumers):
        assert ("ready", {"a": 1}) in worker.events


def test_several_channels(connection: Connection, queue: Queue) -> None:
    class Two(Worker):
        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            from greenkombu.messaging import Consumer as Plain

            self.other = channel.connection.client.channel()
            return [
                Consumer(self.queue, callbacks=[self.on_task]),
                Plain(self.other, second, callbacks=[self.on_task]),
            ]

        def on_consume_end(self, connection: Connection, channel: Any) -> None:
            self.other.close()

    second = Queue(f"{queue.name}.2", Exchange(f"{queue.name}.2"), f"{queue.name}.2")
    second.declare(channel=connection.default_channel)
    put(connection, queue, 1)
    put(connection, second, 2)
    worker = Two(connection, queue)
    list(worker.consume(limit=2, timeout=10))
    assert sorted(event for event in worker.events if isinstance(event, int)) == [1, 2]
    assert worker.other.closed
    connection.default_channel.queue_delete(second.name)


def test_the_producer_has_a_connection_of_its_own(connection: Connection, queue: Queue) -> None:
    class Answering(ConsumerProducerMixin):
        def __init__(self) -> None:
            self.connection = connection
            self.seen: list[Any] = []

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            return [Consumer(queue, callbacks=[self.on_request])]

        def on_request(self, body: Any, message: Any) -> None:
            self.producer.publish(body + 1, exchange="", routing_key=message.properties["reply_to"])
            message.ack()
            self.seen.append(self.producer_connection)

    answers = Queue(f"{queue.name}.answers")
    answers.declare(channel=connection.default_channel)
    put(connection, queue, 1, reply_to=answers.name)
    worker = Answering()
    list(worker.consume(limit=1, timeout=10))
    assert answers(connection.default_channel).get(no_ack=True).payload == 2
    (used,) = worker.seen
    assert used is not connection
    assert not used.connected, "closed when the consumers end"
    again = worker.producer_connection
    assert again is not used
    assert again.connected
    assert worker.producer is worker.producer
    again.close()
    connection.default_channel.queue_delete(answers.name)
