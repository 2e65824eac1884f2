"""The AMQP transport on a real RabbitMQ."""

from __future__ import annotations

import gc
import itertools
import os
import random
import socket
import ssl
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import amqp
import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue
from greenkombu._amqp import errors
from greenkombu._amqp.tls import InsecureTLSWarning
from greenkombu.deadline import Deadline
from greenkombu.exceptions import (
    ArgumentError,
    ChannelClosedError,
    ConnectionBlocked,
    ContentDisallowed,
    DeliveryError,
    NotEquivalentError,
    NotFoundError,
    StaleDeliveryError,
    UnroutableError,
    UnsupportedOperation,
)
from greenkombu.transport import pyamqp
from hub.environment import Environment
from hub.errors import StreamError, TLSError
from tests.support.rabbitmq import Certificates, make_rabbitmq
from tests.support.tasks import in_child, until

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ


@pytest.fixture
def connection(rabbitmq: PrivateRabbitMQ) -> Iterator[Connection]:
    with Connection(rabbitmq.url) as made:
        yield made


@pytest.fixture
def queue() -> Queue:
    """A queue that goes with the connection that declares it."""
    return Queue(f"test-{os.urandom(6).hex()}", durable=False, exclusive=True)


def drain(connection: Connection, got: list[Any], count: int) -> None:
    while len(got) < count:
        connection.drain_events(timeout=10)


# -- what programs see of it


def test_objects_are_amqps_and_kombus_at_once(connection: Connection) -> None:
    established = connection.connection
    channel = connection.channel()
    assert isinstance(established, amqp.Connection)
    assert isinstance(channel, amqp.Channel)
    assert channel.connection is established
    assert established.client is connection
    # As Kombu says it; a clone still leaves it to the broker.
    assert connection.login_method == "PLAIN"
    assert connection.clone().login_method is None
    sock = established.transport.sock
    assert sock.fileno() == established.sock.fileno() >= 0
    assert sock.getpeername()[1] == connection.port
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    sock.settimeout(5)  # oslo.messaging does; it must not make the hub wait
    with pytest.raises(UnsupportedOperation, match="recv"):
        sock.recv(1)
    assert established.server_properties["product"] == "RabbitMQ"
    assert established.frame_max == 131072
    assert established.channels == {channel.channel_id: channel}
    assert connection.transport.driver_type == "amqp"
    assert connection.transport.driver_version() == amqp.__version__
    assert connection.info()["transport"] == "amqp"
    assert connection.qos_semantics_matches_spec is False
    channel.close()
    assert established.channels == {}
    sock.close()
    with pytest.raises(connection.connection_errors):
        established.drain_events(timeout=5)


def test_login_that_was_accepted_before_is_sent_at_once(rabbitmq: PrivateRabbitMQ) -> None:
    with Connection(rabbitmq.url, heartbeat=10) as first:
        first.connect()
        with first.clone() as second:
            stream = second.connect().stream
            assert stream.send_calls == 1
            assert second.connection.server_properties == first.connection.server_properties
            assert second.connection.heartbeat == first.connection.heartbeat == 10
            with second.channel() as channel:
                assert channel.queue_declare("", exclusive=True)[0].startswith("amq.gen-")


def test_heartbeats_are_left_to_nobody_under_green_threads(
    rabbitmq: PrivateRabbitMQ, env: Environment
) -> None:
    with Connection(rabbitmq.url, heartbeat=5) as connection:
        connection.connect()
        assert connection.get_heartbeat_interval() == 5
        assert connection.supports_heartbeats is not env.green
        assert connection.transport.implements.heartbeats
        connection.heartbeat_check()


def test_errors_are_in_the_tuples_that_programs_catch(connection: Connection) -> None:
    for error in (
        errors.ConnectionLostError,
        errors.LoginRefusedError,
        errors.RPCTimeoutError,
        errors.BadFrameError,
        StaleDeliveryError,
        ConnectionBlocked,
        StreamError,
        TLSError,
        amqp.exceptions.ConnectionForced,
    ):
        assert issubclass(error, connection.connection_errors), error
    for error in (UnroutableError, NotFoundError, NotEquivalentError, amqp.exceptions.NotFound):
        assert issubclass(error, connection.channel_errors), error
    for error in (errors.ConnectionLostError, StreamError, errors.RPCTimeoutError):
        assert issubclass(error, connection.recoverable_connection_errors), error
    for error in (errors.LoginRefusedError, errors.VirtualHostError):
        assert not issubclass(error, connection.recoverable_connection_errors), error


@pytest.mark.parametrize("alias", ["amqp", "pyamqp", "amqplib"])
def test_aliases(rabbitmq: PrivateRabbitMQ, alias: str) -> None:
    url = rabbitmq.url.replace("amqp://", f"{alias}://", 1)
    with Connection(url) as connection:
        connection.connect()
        assert isinstance(connection.connection, pyamqp.Connection)


# -- messages


def test_message_has_kombus_attributes(connection: Connection, queue: Queue) -> None:
    got: list[Any] = []
    with Consumer(connection, [queue], on_message=got.append, accept=["json"]):
        Producer(connection).publish(
            {"a": [1, "\xe9"]},
            routing_key=queue.name,
            headers={"x": 1, "deep": {"y": [None, 2.5, True]}},
            correlation_id="c",
            reply_to="r",
            priority=3,
            expiration=60,
            message_id="m",
            timestamp=1234567890,
            type="t",
            app_id="app",
        )
        drain(connection, got, 1)
    message = got[0]
    assert message.payload == {"a": [1, "\xe9"]}
    assert isinstance(message.body, str)
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    assert message.headers == {"x": 1, "deep": {"y": [None, 2.5, True]}}
    assert message.properties == {
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "application_headers": message.headers,
        "delivery_mode": 2,
        "priority": 3,
        "correlation_id": "c",
        "reply_to": "r",
        "expiration": "60000",
        "message_id": "m",
        "timestamp": 1234567890,
        "type": "t",
        "app_id": "app",
    }
    assert message.delivery_info["routing_key"] == queue.name
    assert message.delivery_info["redelivered"] is False
    assert message.delivery_info["delivery_tag"] == message.delivery_tag == 1
    message.headers["written"] = True
    message.properties["written"] = True
    message.delivery_info["written"] = True
    assert message.headers["written"]
    assert message.properties["written"]
    assert message.delivery_info["written"]
    assert not message.acknowledged
    message.ack()
    assert message.acknowledged
    with pytest.raises(message.MessageStateError):
        message.ack()


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("text", {}),
        (b"\xff\xfe", {}),
        ({"a": 1}, {"compression": "zlib"}),
        ("text", {"compression": "bzip2"}),
        ({"a": (1, 2)}, {"serializer": "pickle"}),
        ("caf\xe9", {"content_type": "text/plain", "content_encoding": "latin-1"}),
        (b"", {"content_type": "application/data", "content_encoding": "binary"}),
        ({"large": "x" * 500_000}, {}),
    ],
)
def test_bodies_survive_the_round_trip(
    connection: Connection, queue: Queue, body: Any, options: dict[str, Any]
) -> None:
    got: list[Any] = []
    with Consumer(
        connection, [queue], on_message=got.append, accept=["json", "pickle"]
    ) as consumer:
        consumer.accept = None if "content_type" in options else consumer.accept
        Producer(connection).publish(body, routing_key=queue.name, **options)
        drain(connection, got, 1)
    got[0].accept = {
        "application/data",
        "application/json",
        "application/x-python-serialize",
        "text/plain",
    }
    assert got[0].payload == body
    got[0].ack()


def test_headers_that_are_equal_in_two_messages_are_not_shared(
    connection: Connection, queue: Queue
) -> None:
    got: list[Any] = []
    with Consumer(connection, [queue], on_message=got.append, no_ack=True):
        for _ in range(2):
            Producer(connection).publish("x", routing_key=queue.name)
        drain(connection, got, 2)
    got[0].headers["mine"] = 1
    got[0].properties["mine"] = 1
    assert got[1].headers == {}
    assert "mine" not in got[1].properties
    got[0].ack()  # nothing to say for no_ack


def test_undecodable_message_goes_to_on_decode_error_and_is_not_lost(
    connection: Connection, queue: Queue
) -> None:
    bad: list[Any] = []
    consumer = Consumer(
        connection,
        [queue],
        callbacks=[lambda *_: None],
        on_decode_error=lambda message, exc: bad.append((message, exc)),
    )
    with consumer:
        Producer(connection).publish({"a": 1}, routing_key=queue.name, serializer="pickle")
        drain(connection, bad, 1)
    message, exc = bad[0]
    assert isinstance(exc, ContentDisallowed)
    message.requeue()


def test_message_that_is_too_large_goes_to_on_decode_error(rabbitmq: PrivateRabbitMQ) -> None:
    bad: list[Any] = []
    with Connection(rabbitmq.url, transport_options={"max_message_size": 1000}) as connection:
        queue = Queue(f"test-{os.urandom(6).hex()}", durable=False, exclusive=True)
        consumer = Consumer(
            connection,
            [queue],
            callbacks=[lambda *_: None],
            on_decode_error=lambda message, exc: bad.append((message, exc)),
        )
        with consumer:
            Producer(connection).publish("x" * 200_000, routing_key=queue.name)
            drain(connection, bad, 1)
        message, exc = bad[0]
        assert isinstance(exc, errors.MessageTooLarge)
        assert message.body is None
        message.reject()
        assert connection.connected


def test_get_and_settle(connection: Connection, queue: Queue) -> None:
    bound = queue(connection.default_channel)
    bound.declare()
    assert bound.get() is None
    Producer(connection).publish({"n": 1}, routing_key=queue.name)
    message = bound.get()
    assert message.payload == {"n": 1}
    assert message.delivery_info["message_count"] == 0
    message.requeue()
    message = bound.get()
    assert message.delivery_info["redelivered"] is True
    message.ack()
    Producer(connection).publish({"n": 2}, routing_key=queue.name)
    bound.get(no_ack=True).ack()
    assert bound.get() is None


# -- declarations and their errors


def test_declare_bind_purge_delete(connection: Connection) -> None:
    channel = connection.default_channel
    exchange = Exchange(f"ex-{os.urandom(4).hex()}", "topic", durable=False, auto_delete=True)
    queue = Queue("", exchange, "a.#", durable=False, exclusive=True)(channel)
    queue.declare()
    assert queue.name.startswith("amq.gen")
    Producer(connection, exchange).publish("x", routing_key="a.b.c")
    until_count(queue, 1)
    assert queue.purge() == 1
    queue.unbind_from(exchange, "a.#")
    assert queue.delete() == 0


def until_count(queue: Any, count: int) -> None:
    deadline = time.monotonic() + 10
    while queue.queue_declare(passive=True).message_count != count:
        assert time.monotonic() < deadline


def test_channel_errors_are_typed_and_leave_the_connection_alone(connection: Connection) -> None:
    name = f"test-{os.urandom(6).hex()}"
    other = connection.channel()
    channel = connection.channel()
    with pytest.raises(NotFoundError, match="no queue"):
        channel.queue_declare(name, passive=True)
    channel = connection.channel()
    channel.queue_declare(name, exclusive=True)
    with pytest.raises(NotEquivalentError, match="inequivalent"):
        channel.queue_declare(name, exclusive=True, arguments={"x-max-length": 5})
    channel = connection.channel()
    channel.basic_ack(99)
    with pytest.raises(amqp.exceptions.PreconditionFailed, match="unknown delivery tag"):
        channel.queue_declare(name, exclusive=True)
    assert other.queue_declare(name, exclusive=True).queue == name


def test_queue_of_another_connection_is_locked(
    rabbitmq: PrivateRabbitMQ, connection: Connection, queue: Queue
) -> None:
    queue(connection.default_channel).declare()
    with Connection(rabbitmq.url) as other, pytest.raises(amqp.exceptions.ResourceLocked):
        other.default_channel.queue_declare(queue.name, passive=True)


def test_flow_pauses_and_resumes(connection: Connection, queue: Queue) -> None:
    got: list[Any] = []
    with Consumer(connection, [queue], on_message=got.append, no_ack=True) as consumer:
        consumer.flow(False)
        Producer(connection).publish("x", routing_key=queue.name)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.2)
        consumer.flow(True)
        drain(connection, got, 1)


def test_transactions_and_recover(connection: Connection, queue: Queue) -> None:
    channel = connection.channel()
    queue(channel).declare()
    channel.tx_select()
    channel.basic_publish(channel.prepare_message("rolled back"), "", queue.name)
    channel.tx_rollback()
    channel.basic_publish(channel.prepare_message("kept"), "", queue.name)
    channel.tx_commit()
    message = channel.basic_get(queue.name)
    assert message.body in ("kept", b"kept")
    channel.basic_recover(requeue=True)
    other = connection.channel()
    assert other.basic_get(queue.name).redelivered
    assert other.basic_get(queue.name) is None


# -- many tasks


def test_requests_are_answered_while_another_task_drains(
    connection: Connection, queue: Queue, env: Environment
) -> None:
    connection.connect()
    stop: list[bool] = []

    def keep_draining() -> None:
        while not stop:
            try:
                connection.drain_events(timeout=0.05)
            except TimeoutError:
                pass

    drainer = env.spawn(keep_draining)

    def declare(number: int) -> str:
        name: str = (
            connection.channel().queue_declare(f"{queue.name}-{number}", exclusive=True).queue
        )
        return name

    tasks = [env.spawn(declare, number) for number in range(5)]
    assert [task.result(10) for task in tasks] == [f"{queue.name}-{n}" for n in range(5)]
    stop.append(True)
    drainer.join(5)


@pytest.mark.parametrize("confirm", [False, True])
@pytest.mark.parametrize("shared_channel", [False, True])
def test_twenty_tasks_publish_on_one_connection(
    rabbitmq: PrivateRabbitMQ, env: Environment, confirm: bool, shared_channel: bool
) -> None:
    name = f"test-{os.urandom(6).hex()}"
    with Connection(rabbitmq.url, transport_options={"confirm_publish": confirm}) as connection:
        shared = connection.channel()
        shared.queue_declare(name, exclusive=True)

        def publish(number: int) -> None:
            channel = shared if shared_channel else connection.channel()
            for _ in range(20):
                body = bytes([65 + number]) * 20_000
                channel.basic_publish(channel.prepare_message(body), "", name)

        tasks = [env.spawn(publish, number) for number in range(20)]
        for task in tasks:
            task.result(30)
        got: list[Any] = []
        shared.basic_consume(name, callback=got.append, no_ack=True)
        drain(connection, got, 400)
        bodies = sorted(bytes(message.body) for message in got)
        assert bodies == sorted(bytes([65 + n]) * 20_000 for n in range(20) for _ in range(20))


def test_interrupted_tasks_leave_a_clean_stream(
    connection: Connection, queue: Queue, env: Environment
) -> None:
    """Timeouts thrown into requests and publishes at every moment; the rest goes on."""
    if not env.green:
        pytest.skip("native threads cannot be interrupted")
    channel = connection.channel()
    channel.queue_declare(queue.name, exclusive=True)
    interrupted = 0
    for step in range(60):
        try:
            with env.timeout(step * 0.00005):
                for _ in range(50):
                    channel.queue_declare(queue.name, exclusive=True)
                    channel.basic_publish(channel.prepare_message(b"x" * 1000), "", queue.name)
        except env.timeout_types:
            interrupted += 1
    assert interrupted > 30
    count = channel.queue_purge(queue.name)
    channel.basic_publish(channel.prepare_message("last"), "", queue.name)
    assert channel.basic_get(queue.name).body in (b"last", "last")
    assert count > 0
    assert connection.connected


def test_mixed_work_with_random_interruptions(rabbitmq: PrivateRabbitMQ, env: Environment) -> None:
    """Requests, confirmed publishes, consumers and channels, cut short at random; nothing mixes."""
    seed = random.SystemRandom().randrange(10**9)
    dice = random.Random(seed)
    name = f"test-{os.urandom(6).hex()}"
    confirmed: set[int] = set()
    seen: set[int] = set()
    wrong: list[str] = []
    numbers = itertools.count()

    def work(connection: Connection, shared: Any, mine: int) -> None:
        channel = shared
        for _ in range(60):
            if channel is None or channel.closed:
                channel = shared if not shared.closed else connection.channel()
            kind = dice.random()
            try:
                with interruption(env, dice.choice([0.0001, 0.001, 0.01, 5])):
                    if kind < 0.4:
                        queue = f"{name}-{mine}"
                        answer = channel.queue_declare(queue, exclusive=True)
                        if answer.queue != queue:
                            wrong.append(f"{answer} for {queue}")
                    elif kind < 0.8:
                        number = next(numbers)
                        body = b"%d" % number
                        channel.basic_publish(channel.prepare_message(body), "", name)
                        confirmed.add(number)
                    elif kind < 0.9:
                        channel.basic_cancel(channel.basic_consume(name, callback=take))
                    else:
                        connection.channel().close()
            except env.timeout_types:
                pass
            except (TimeoutError, ChannelClosedError):
                pass  # the deadline; or another task's consumer was cut off in the middle

    def take(message: Any) -> None:
        seen.add(int(message.body))
        message.ack()

    with Connection(rabbitmq.url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        channel.queue_declare(name, auto_delete=False, durable=False)
        shared = connection.channel()
        channel.basic_qos(0, 50, False)
        channel.basic_consume(name, callback=take)
        tasks = [env.spawn(work, connection, shared, mine) for mine in range(15)]
        deadline = time.monotonic() + 60
        while not (all(task.done for task in tasks) and confirmed <= seen):
            assert time.monotonic() < deadline, f"seed {seed}: {len(confirmed - seen)} missing"
            try:
                connection.drain_events(timeout=0.2)
            except TimeoutError:
                pass
        for task in tasks:
            task.result(1)
        assert wrong == [], f"seed {seed}"
        assert connection.connected, f"seed {seed}"
        channel.queue_delete(name)


def interruption(env: Environment, seconds: float) -> Any:
    """Cut the block short: by a Timeout where there is one, else by a deadline."""
    return env.timeout(seconds) if env.green else Deadline(seconds)


# -- confirms


def test_confirmed_publishes_of_many_tasks(rabbitmq: PrivateRabbitMQ, env: Environment) -> None:
    name = f"test-{os.urandom(6).hex()}"
    with Connection(rabbitmq.url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        channel.queue_declare(name, exclusive=True)
        tasks = [
            env.spawn(channel.basic_publish, channel.prepare_message(b"%d" % n), "", name)
            for n in range(300)
        ]
        for task in tasks:
            task.result(30)
        assert channel.queue_declare(name, exclusive=True).message_count == 300
        assert channel._confirms.unconfirmed == {}


def test_mandatory_message_without_a_queue(rabbitmq: PrivateRabbitMQ) -> None:
    with Connection(rabbitmq.url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        with pytest.raises(amqp.exceptions.ChannelError, match="NO_ROUTE"):
            channel.basic_publish(channel.prepare_message("x"), "", "no-such-queue", mandatory=True)
        returned: list[Any] = []
        producer = Producer(channel, on_return=lambda *given: returned.append(given))
        producer.publish("y", routing_key="no-such-queue", mandatory=True)
        error, exchange, routing_key, message = returned[0]
        assert isinstance(error, UnroutableError)
        assert (exchange, routing_key, message.body) == ("", "no-such-queue", "y")


def test_full_queue_that_rejects_is_a_refused_publish(rabbitmq: PrivateRabbitMQ) -> None:
    with Connection(rabbitmq.url, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        name = f"test-{os.urandom(6).hex()}"
        arguments = {"x-max-length": 1, "x-overflow": "reject-publish"}
        channel.queue_declare(name, exclusive=True, arguments=arguments)
        channel.basic_publish(channel.prepare_message("1"), "", name)
        with pytest.raises(DeliveryError, match=name) as caught:
            channel.basic_publish(channel.prepare_message("2"), "", name)
        assert isinstance(caught.value, amqp.exceptions.MessageNacked)


# -- the broker's own will


def test_consumer_of_a_deleted_queue_is_told(rabbitmq: PrivateRabbitMQ) -> None:
    name = f"test-{os.urandom(6).hex()}"
    with Connection(rabbitmq.url) as connection, Connection(rabbitmq.url) as other:
        channel = connection.channel()
        channel.queue_declare(name, durable=False, auto_delete=False)
        channel.basic_consume(name, "tag", callback=print)
        other.default_channel.queue_delete(name)
        with pytest.raises(amqp.exceptions.ConsumerCancelled):
            connection.drain_events(timeout=10)


def test_kicked_connection_gets_the_brokers_reason(rabbitmq: PrivateRabbitMQ) -> None:
    with Connection(rabbitmq.url) as connection:
        connection.connect()
        established = connection.connection
        rabbitmq.close_all_connections("for a test")
        with pytest.raises(amqp.exceptions.ConnectionForced, match="for a test"):
            established.drain_events(timeout=10)
        assert not connection.connected


def test_delivery_of_a_lost_connection_is_stale_and_comes_again(
    rabbitmq: PrivateRabbitMQ,
) -> None:
    name = f"test-{os.urandom(6).hex()}"
    with Connection(rabbitmq.url) as connection:
        channel = connection.channel()
        channel.queue_declare(name, durable=True, auto_delete=False)
        for number in range(10):
            channel.basic_publish(channel.prepare_message(b"%d" % number), "", name)
        got: list[Any] = []
        channel.basic_consume(name, callback=got.append)
        drain(connection, got, 10)
        rabbitmq.close_all_connections("for a test")
        with pytest.raises(connection.connection_errors):
            drain(connection, got, 11)
        connection.ensure_connection(max_retries=3, timeout=20)
        for message in got:
            with pytest.raises(StaleDeliveryError):
                message.ack()
        again: list[Any] = []
        channel = connection.channel()
        channel.basic_consume(name, callback=again.append)
        drain(connection, again, 10)
        assert all(message.redelivered for message in again)
        channel.queue_delete(name)


@pytest.mark.slow  # the scenario S9 shows most of it
def test_memory_alarm_blocks_publishers_only(
    make_private_rabbitmq: Callable[..., PrivateRabbitMQ], env: Environment
) -> None:
    server = make_private_rabbitmq()

    def publish_on(channel: Any) -> None:
        for _ in range(2000):
            channel.basic_publish(channel.prepare_message(bytes(100_000)), "", "q")
            env.sleep(0.001)

    with Connection(server.url, transport_options={"blocked_timeout": 0.5}) as connection:
        channel = connection.channel()
        channel.queue_declare("q", exclusive=True)
        server.block()
        with pytest.raises(ConnectionBlocked):
            publish_on(channel)
        server.unblock()
        until(env, lambda: connection.connection.blocked is None)
        channel.basic_publish(channel.prepare_message("through"), "", "q")
        assert channel.queue_declare("q", exclusive=True).message_count > 0
        server.block()
        with pytest.raises(ConnectionBlocked):
            publish_on(channel)
        started = time.monotonic()
        connection.close()
        assert time.monotonic() - started < 4


# -- logging in


def with_part(url: str, **parts: Any) -> Connection:
    plain = Connection(url)
    return plain.clone(**parts)


def test_wrong_password_is_typed_and_named_without_the_password(
    rabbitmq: PrivateRabbitMQ,
) -> None:
    connection = with_part(rabbitmq.url, password="hunter2")
    with pytest.raises(amqp.exceptions.AccessRefused) as caught:
        connection.connect()
    assert isinstance(caught.value, connection.connection_errors)
    assert "user 'guest'" in str(caught.value)
    assert connection.host in str(caught.value)
    assert "hunter2" not in str(caught.value) + repr(caught.value)


def test_wrong_virtual_host_is_typed_and_named(rabbitmq: PrivateRabbitMQ) -> None:
    connection = with_part(rabbitmq.url, virtual_host="no-such-host")
    with pytest.raises(amqp.exceptions.NotAllowed, match="'no-such-host'") as caught:
        connection.connect()
    assert connection.host in str(caught.value)


@pytest.mark.parametrize("method", ["PLAIN", "AMQPLAIN"])
def test_b018_both_login_methods(rabbitmq: PrivateRabbitMQ, method: str) -> None:
    with with_part(rabbitmq.url, login_method=method) as connection:
        connection.connect()
        assert connection.connected


def test_b018_wrong_login_method(rabbitmq: PrivateRabbitMQ) -> None:
    with pytest.raises(ValueError, match="'FOO'"):
        with_part(rabbitmq.url, login_method="FOO").connect()
    with pytest.raises(errors.MechanismError, match="allowed here: EXTERNAL"):
        with_part(rabbitmq.url, login_method="EXTERNAL").connect()


def test_connection_name_is_shown_to_operators(rabbitmq: PrivateRabbitMQ) -> None:
    with Connection(rabbitmq.url, transport_options={"connection_name": "worker-7"}) as connection:
        connection.connect()
        listed = rabbitmq.ctl("list_connections", "client_properties")
        assert "worker-7" in listed


# -- TLS


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Any]]:
    certificates = Certificates(tmp_path_factory.mktemp("tls"))
    with make_rabbitmq(tls=certificates.server_files(external=True)) as server:
        yield server, certificates


def tls_url(server: Any) -> str:
    url: str = server.vhost_url("/", tls=True)
    return url


@pytest.mark.parametrize("scheme", ["amqps", "pika"])
def test_tls_verifies_the_broker_by_default(tls_server: tuple[Any, Any], scheme: str) -> None:
    server, certificates = tls_server
    url = tls_url(server).replace("amqps://", f"{scheme}://")
    with pytest.raises(TLSError) as caught:
        Connection(url, ssl=True).connect()
    assert "certificate" in str(caught.value).lower()
    with_client = {"ca_certs": str(certificates.authority), "certfile": str(certificates.client)}
    with Connection(url, ssl=with_client) as connection:
        channel = connection.channel()
        channel.queue_declare("q", exclusive=True)
        channel.basic_publish(channel.prepare_message(bytes(1_000_000)), "", "q")
        until_message = time.monotonic() + 10
        message = None
        while message is None and time.monotonic() < until_message:
            message = channel.basic_get("q")
        assert message is not None
        assert len(message.body) == 1_000_000


def test_certificate_files_are_read_again_when_the_connection_is_opened_anew(
    tls_server: tuple[Any, Any], tmp_path: Path
) -> None:
    server, certificates = tls_server
    (tmp_path / "stranger").mkdir()
    stranger = Certificates(tmp_path / "stranger")
    trusted, shown = tmp_path / "authority.pem", tmp_path / "client.pem"
    trusted.write_bytes(certificates.authority.read_bytes())
    shown.write_bytes(certificates.client.read_bytes())
    files = {"ca_certs": str(trusted), "certfile": str(shown)}
    with Connection(tls_url(server), ssl=files) as connection:
        first = connection.connect()
        trusted.write_bytes(stranger.authority.read_bytes())
        connection.default_channel.queue_declare("", exclusive=True)  # the open one goes on
        first.abort()
        with pytest.raises(TLSError, match="certificate"):
            connection.connect()
        trusted.write_bytes(certificates.authority.read_bytes())
        shown.write_bytes(stranger.client.read_bytes())
        with pytest.raises((TLSError, *connection.connection_errors)):
            connection.connect()
        shown.write_bytes(certificates.client.read_bytes())
        connection.connect()
        connection.default_channel.queue_declare("", exclusive=True)


def test_verification_is_switched_off_only_with_a_warning(tls_server: tuple[Any, Any]) -> None:
    server, certificates = tls_server
    options = {"cert_reqs": ssl.CERT_NONE, "certfile": str(certificates.client)}
    with (
        pytest.warns(InsecureTLSWarning, match="does not verify the certificate"),
        Connection(tls_url(server), ssl=options) as connection,
    ):
        connection.connect()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        context = certificates.client_context(with_certificate=True)
        with Connection(tls_url(server), ssl=context) as connection:
            connection.connect()


@pytest.mark.parametrize("scheme", ["amqps", "pika"])
def test_external_login(tls_server: tuple[Any, Any], scheme: str) -> None:
    server, certificates = tls_server
    url = tls_url(server).replace("amqps://", f"{scheme}://")
    context = certificates.client_context(with_certificate=True)
    with Connection(url, ssl=context, login_method="EXTERNAL") as connection:
        connection.connect()
        assert "EXTERNAL" in [name.decode() for name in connection.connection.mechanisms]


def test_plain_to_a_tls_port_and_the_reverse(
    tls_server: tuple[Any, Any], rabbitmq: PrivateRabbitMQ
) -> None:
    server, _ = tls_server
    plain_to_tls = Connection(tls_url(server).replace("amqps://", "amqp://"))
    with pytest.raises(plain_to_tls.connection_errors) as caught:
        plain_to_tls.connect()
    assert "TLS" in str(caught.value)
    tls_to_plain = Connection(rabbitmq.url, ssl=True)
    with pytest.raises(TLSError) as second:
        tls_to_plain.connect()
    assert "TLS port" in str(second.value)


@pytest.mark.parametrize("transport", ["amqp", "pika"])
@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"cert_file": "x"}, "unknown ssl options cert_file"),
        ({"ca_certs": "missing"}, "ca_certs='.*missing'.*no file.*trust"),
        ({"ca_certs": "empty"}, "ca_certs='.*empty'.*no certificate.*PEM"),
        ({"capath": "missing"}, "capath='.*missing'.*folder"),
        ({"certfile": "missing"}, "certfile='.*missing'.*no file"),
        ({"certfile": "empty", "password": "sesame"}, "certfile='.*empty'.*private key"),
        ({"certfile": "client", "keyfile": "missing"}, "keyfile='.*missing'.*no file"),
        ({"keyfile": "client"}, "keyfile without certfile"),
        ({"cert_reqs": "foo"}, "cert_reqs='foo'.*CERT_REQUIRED"),
        ({"ciphers": "NOPE"}, "ciphers='NOPE'.*openssl ciphers"),
    ],
)
def test_wrong_ssl_option_is_named_and_not_tried_again(
    tls_server: tuple[Any, Any],
    tmp_path: Path,
    transport: str,
    options: dict[str, Any],
    names: str,
) -> None:
    pytest.importorskip(transport)
    server, certificates = tls_server
    files = {"missing": tmp_path / "missing", "empty": tmp_path / "empty"}
    files["empty"].write_text("nothing")
    files["client"] = certificates.client
    given = {name: str(files.get(value, value)) for name, value in options.items()}
    address = tls_url(server).replace("amqps:", f"{transport}:")
    connection = Connection(address, ssl=given)
    with pytest.raises(ArgumentError, match=names) as caught:
        connection.ensure_connection(timeout=20)
    assert not isinstance(caught.value, connection.connection_errors)
    assert "sesame" not in str(caught.value)


# -- processes and memory


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_children_that_close_and_collect_do_not_disturb_the_parent(
    rabbitmq: PrivateRabbitMQ, queue: Queue
) -> None:
    with Connection(rabbitmq.url) as connection:
        got: list[Any] = []
        channel = connection.channel()
        with Consumer(channel, [queue], on_message=got.append, no_ack=True):
            producer = Producer(connection)

            def child() -> None:
                channel.close()
                connection.close()
                gc.collect()
                with Connection(rabbitmq.url) as own:
                    own.connect()

            for number in range(5):
                producer.publish(number, routing_key=queue.name)
                in_child(child)
            drain(connection, got, 5)
            assert [message.payload for message in got] == list(range(5))


def test_idle_connection_and_channel_take_little_memory(
    rabbitmq: PrivateRabbitMQ, env: Environment
) -> None:
    import tracemalloc

    options = {"transport_options": {}}
    warm = Connection(rabbitmq.url, **options)
    warm.channel()
    transport = warm.transport
    made = []
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(50):
            connection = transport.establish_connection()
            made.append((connection, connection.channel()))
        env.sleep(0.05)
        gc.collect()
        each = (tracemalloc.get_traced_memory()[0] - before) / len(made)
    finally:
        tracemalloc.stop()
    for connection, _ in made:
        connection.close()
    warm.close()
    assert each < 12 * 1024, f"{each:.0f} octets for each connection with a channel"
