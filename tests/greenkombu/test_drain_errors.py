"""Whose error it is: what a callback lets out is its own, what befalls a connection is reported.

On memory and on RabbitMQ, as both must tell the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu import Connection, DrainLoop, Queue, exceptions
from hub.environment import Environment
from tests.greenkombu.virtual import store
from tests.support.tasks import until

SOON = 15.0
numbers = itertools.count(1)


@pytest.fixture(params=["memory", "rabbitmq"])
def url(request: pytest.FixtureRequest, rabbitmq: object) -> str:
    del rabbitmq  # started before the search for leaks begins
    if request.param == "memory":
        return "memory://"
    made: str = request.getfixturevalue("rabbitmq_vhost")
    return made


@pytest.fixture
def connect(url: str) -> Iterator[Callable[[], Connection]]:
    made: list[Connection] = []

    def connect() -> Connection:
        made.append(Connection(url))
        made[-1].connect()
        return made[-1]

    yield connect
    for each in made:
        each.close()


class Reports(list[Any]):
    """The on_error of a loop."""

    def __call__(self, connection: Any, error: BaseException) -> None:
        self.append((connection, error))


def publish_to_a_dead_broker(connect: Callable[[], Connection]) -> Callable[..., None]:
    """Return a callback that uses another connection, which has died."""
    other = connect()
    channel = other.channel()
    producer = other.Producer(channel)
    other.connection.abort(exceptions.ConnectionClosedError("the link to broker B is down"))

    def callback(*arguments: Any) -> None:
        del arguments
        producer.publish("x", routing_key="elsewhere")

    return callback


def a_queue(connection: Connection) -> Any:
    queue = Queue(f"errors-{next(numbers)}")(connection.default_channel)
    queue.declare()
    return queue


@pytest.mark.parametrize("kind", ["callback", "on_message", "on_decode_error"])
def test_error_of_another_connection_is_the_callbacks_own(
    env: Environment, connect: Callable[[], Connection], kind: str
) -> None:
    served, bystander = connect(), connect()
    queue, other_queue = a_queue(served), a_queue(bystander)
    raising = publish_to_a_dead_broker(connect)
    options: dict[str, Any] = {
        "callback": {"callbacks": [raising]},
        "on_message": {"on_message": raising},
        "on_decode_error": {"callbacks": [print], "on_decode_error": raising},
    }[kind]
    served.Consumer(queue, **options).consume()
    taken: list[Any] = []
    bystander.Consumer(other_queue, no_ack=True, on_message=taken.append).consume()
    reports = Reports()
    loop = DrainLoop(served, bystander, on_error=reports)
    body: Any = b"{" if kind == "on_decode_error" else b"1"
    served.Producer().publish(
        body, routing_key=queue.name, content_type="application/json", content_encoding="utf-8"
    )
    with pytest.raises(exceptions.ConnectionClosedError):
        loop.next_event(SOON)
    assert reports == []
    # The loop goes on, with everybody.
    assert len(loop) == 2
    assert served.connected
    bystander.Producer().publish("x", routing_key=other_queue.name)
    event = loop.next_event(SOON)
    assert event is not None
    assert (event.connection, event.error) == (bystander, None)
    assert len(taken) == 1
    # The message is not acknowledged: it goes back when the connection ends.
    served.close()
    again = Queue(queue.name)(bystander.default_channel)
    until(env, lambda: again.queue_declare(passive=True).message_count == 1)


def test_error_of_on_return_is_its_own(connect: Callable[[], Connection]) -> None:
    served = connect()
    producer = served.Producer(on_return=publish_to_a_dead_broker(connect))
    reports = Reports()
    loop = DrainLoop(served, on_error=reports)
    producer.publish("x", routing_key="nobody", mandatory=True)
    with pytest.raises(exceptions.ConnectionClosedError):
        loop.next_event(SOON)
    assert (reports, len(loop), served.connected) == ([], 1, True)


@pytest.mark.parametrize(
    "error",
    [
        exceptions.OperationalError("mine"),
        exceptions.ConnectionClosedError("mine"),
        exceptions.ConnectionError("mine"),
        exceptions.ChannelError("mine"),
        exceptions.NotFoundError("mine"),
        exceptions.StdChannelError("mine"),
        ConnectionResetError("mine"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_type_of_the_error_does_not_matter(
    connect: Callable[[], Connection], error: Exception
) -> None:
    served = connect()
    queue = a_queue(served)

    def fail(body: Any, message: Any) -> None:
        raise error

    served.Consumer(queue, callbacks=[fail]).consume()
    reports = Reports()
    loop = DrainLoop(served, on_error=reports)
    served.Producer().publish("x", routing_key=queue.name)
    with pytest.raises(type(error)) as caught:
        loop.next_event(SOON)
    assert caught.value is error
    assert (reports, len(loop)) == ([], 1)


def test_ack_on_a_connection_lost_meanwhile_is_the_callbacks_and_then_the_loss_is_reported(
    connect: Callable[[], Connection],
) -> None:
    served = connect()
    queue = a_queue(served)

    def lose(body: Any, message: Any) -> None:
        served.connection.abort(exceptions.ConnectionClosedError("lost"))
        message.ack()

    served.Consumer(queue, callbacks=[lose]).consume()
    reports = Reports()
    loop = DrainLoop(served, on_error=reports)
    served.Producer().publish("x", routing_key=queue.name)
    with pytest.raises(exceptions.StaleDeliveryError):
        loop.next_event(SOON)
    assert reports == []
    event = loop.next_event(SOON)
    assert event is not None
    assert isinstance(event.error, exceptions.ConnectionClosedError)
    assert "lost" in str(event.error)
    assert reports == [(served, event.error)]
    assert len(loop) == 0


def test_nested_drain_that_fails_is_the_callbacks_own(connect: Callable[[], Connection]) -> None:
    served = connect()
    queue = a_queue(served)

    def nest(body: Any, message: Any) -> None:
        served.connection.abort(exceptions.ConnectionClosedError("lost"))
        served.drain_events(timeout=SOON)

    served.Consumer(queue, callbacks=[nest]).consume()
    loop = DrainLoop(served)
    served.Producer().publish("x", routing_key=queue.name)
    with pytest.raises(exceptions.ConnectionClosedError, match="lost"):
        loop.next_event(SOON)
    event = loop.next_event(SOON)
    assert event is not None
    assert "lost" in str(event.error)


def test_failing_store_is_reported_for_its_connection() -> None:
    class Channel(store.Channel):
        def _get(self, queue: str, timeout: float | None = None) -> Any:
            raise OSError("the disk is gone")

    class Transport(store.Transport):
        pass

    Transport.Channel = Channel
    with Connection("store", transport=Transport) as served, Connection("memory://") as bystander:
        queue = a_queue(bystander)
        taken: list[Any] = []
        bystander.Consumer(queue, no_ack=True, on_message=taken.append).consume()
        served.Consumer(a_queue(served), callbacks=[print]).consume()
        loop = DrainLoop(served, bystander)
        event = loop.next_event(SOON)
        assert event is not None
        assert event.connection is served
        assert isinstance(event.error, OSError)
        assert len(loop) == 2
        bystander.Producer().publish("x", routing_key=queue.name)
        for _ in range(10):
            loop.next_event(SOON)
        assert len(taken) == 1
        with pytest.raises(OSError, match="the disk is gone"):
            served.drain_events(timeout=SOON)


def test_channel_closed_by_the_broker_is_reported_for_its_connection(rabbitmq_vhost: str) -> None:
    with Connection(rabbitmq_vhost) as served, Connection(rabbitmq_vhost) as bystander:
        served.Consumer(a_queue(served), callbacks=[print]).consume()
        loop = DrainLoop(served, bystander)
        served.Producer().publish("x", exchange="there is none", routing_key="x")
        event = loop.next_event(SOON)
        assert event is not None
        assert event.connection is served
        assert getattr(event.error, "reply_code", None) == 404
        # Only a channel is gone.
        assert len(loop) == 2
        assert served.connected


def test_consumer_cancelled_by_the_broker_is_reported_for_its_connection(
    rabbitmq_vhost: str,
) -> None:
    with Connection(rabbitmq_vhost) as served, Connection(rabbitmq_vhost) as other:
        queue = a_queue(served)
        served.Consumer(queue, callbacks=[print]).consume()
        loop = DrainLoop(served, other)
        Queue(queue.name)(other.default_channel).delete()
        event = loop.next_event(SOON)
        assert event is not None
        assert event.connection is served
        assert queue.name in str(event.error) or "cancelled consumer" in str(event.error)
        assert len(loop) == 2
        # A drain of this one connection raises it, as Kombu does.
        queue = a_queue(served)
        served.Consumer(queue, callbacks=[print]).consume()
        Queue(queue.name)(other.default_channel).delete()
        with pytest.raises(served.connection_errors + served.channel_errors, match="cancelled"):
            served.drain_events(timeout=SOON)
