"""Behaviours 21, 31, 36, 37, 198, 211, 212: brokers, stalled peers, many descriptors."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from greenkombu import Connection, Exchange, Queue, pools
from greenkombu.connection import BrokerConnection
from greenkombu.pidbox import Mailbox
from greenkombu.utils import eventio
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from hub.environment import Environment

MEMORY = "memory://"


@pytest.fixture(scope="module")
def vhost(rabbitmq: PrivateRabbitMQ) -> Iterator[str]:
    """The URL of a virtual host for all tests of this module: making one takes a second."""
    name = f"behaviours-{os.urandom(4).hex()}"
    yield rabbitmq.add_vhost(name)
    rabbitmq.delete_vhost(name)


@pytest.fixture(params=["memory", "rabbitmq"])
def url(request: pytest.FixtureRequest, vhost: str) -> str:
    return MEMORY if request.param == "memory" else vhost


def test_b021_the_host_of_amqp_is_localhost(vhost: str) -> None:
    given = Connection(vhost)
    connection = BrokerConnection(
        transport="amqp", port=given.port, virtual_host=given.virtual_host
    )
    assert connection.info()["hostname"] == "localhost"
    with connection:
        connection.connect()
        assert connection.connected


def test_b031_one_drain_serves_all_channels_of_a_connection(url: str) -> None:
    seen: list[Any] = []
    with Connection(url) as connection:
        exchange = Exchange("b031", "direct")
        consumers = [
            connection.Consumer(
                Queue(f"b031-{name}", exchange, name),
                channel=connection.channel(),
                callbacks=[lambda body, _, name=name: seen.append((name, body))],
                no_ack=True,
            )
            for name in "ab"
        ]
        assert len({consumer.channel.channel_id for consumer in consumers}) == 2
        for consumer in consumers:
            consumer.consume()
        producer = connection.Producer(exchange=exchange)
        for number in range(3):
            for name in "ab":
                producer.publish(number, routing_key=name)
        for _ in range(6):
            connection.drain_events(timeout=10)
        for consumer in consumers:
            consumer.cancel()
    assert sorted(seen) == [(name, number) for name in "ab" for number in range(3)]


def test_b036_a_peer_that_has_gone_is_seen_before_use(
    rabbitmq: PrivateRabbitMQ, vhost: str, env: Environment
) -> None:
    pool = Connection(vhost).Pool(1)
    with pool.acquire(block=True) as connection:
        queue = Queue("b036")(connection.default_channel)
        queue.declare()
        lost = connection.connection
        transport = connection.transport
        assert transport.verify_connection(lost)
    name = str(Connection(vhost).virtual_host)
    rabbitmq.ctl("close_all_connections", "--vhost", name, "a test says so")
    deadline = time.monotonic() + 20
    while transport.verify_connection(lost):
        assert time.monotonic() < deadline, "the connection is taken for alive"
        env.sleep(0.01)
    with pool.acquire(block=True, timeout=20) as connection:
        connection.Producer().publish("x", routing_key="b036")
        assert connection.connection is not lost
        assert queue(connection.default_channel).get(no_ack=True) is not None
    pool.force_close_all()


@pytest.fixture
def silent_port(env: Environment) -> Iterator[int]:
    """A port whose connections are accepted by the kernel and answered by nobody."""
    server = env.original("socket", "socket")()
    server.bind(("127.0.0.1", 0))
    server.listen(5)
    yield server.getsockname()[1]
    server.close()


@pytest.mark.parametrize("ssl", [False, True])
def test_b037_a_peer_that_stalls_is_a_timeout(silent_port: int, ssl: bool) -> None:
    connection = Connection(f"amqp://127.0.0.1:{silent_port}//", ssl=ssl, connect_timeout=0.3)
    started = time.monotonic()
    with pytest.raises(TimeoutError) as caught:
        connection.connect()
    assert time.monotonic() - started < 5
    assert isinstance(caught.value, connection.connection_errors)
    connection.close()


def test_b037_a_dead_socket_is_a_connection_error(vhost: str) -> None:
    with Connection(vhost) as connection:
        channel = connection.channel()
        raw = connection.connection
        raw.abort()
        with pytest.raises(connection.connection_errors):
            channel.queue_declare("b037")
        with pytest.raises(connection.connection_errors):
            raw.channel()


def test_b198_listen_returns_a_consumer_that_can_be_cancelled(url: str) -> None:
    seen: list[Any] = []
    with Connection(url) as connection:
        mailbox = Mailbox("b198", type="fanout")(connection)
        node = mailbox.Node("host", channel=connection.default_channel)
        other = connection.channel()
        consumer = node.listen(channel=other, callback=lambda body, _: seen.append(body["method"]))
        assert consumer.channel is other
        mailbox.abcast("first")
        connection.drain_events(timeout=10)
        consumer.cancel()
        mailbox.abcast("second")
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.1)
    pools.reset()  # the mailbox publishes by a pooled producer
    assert seen == ["first"]


@pytest.mark.skipif(sys.platform != "linux", reason="epoll is Linux's")
def test_b211_epoll_stays_epoll_with_2000_descriptors(env: Environment) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4200:
        pytest.skip("2 000 pipes need 4 000 descriptors: ulimit -n 20000")
    close = env.original("os", "close")
    poller = eventio.poll()
    pipes: list[tuple[int, int]] = []
    try:
        assert poller._poller.name == "epoll"
        for _ in range(2000):
            pipes.append(os.pipe())
            poller.register(pipes[-1][0], eventio.READ)
        for index in (0, 999, 1999):
            env.original("os", "write")(pipes[index][1], b"x")
        assert {fd for fd, _ in poller.poll(10)} == {pipes[i][0] for i in (0, 999, 1999)}
    finally:
        poller.close()
        for pair in pipes:
            for fd in pair:
                close(fd)


def test_b212_a_signal_does_not_end_a_poll(env: Environment) -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rung.append(number))
    poller = eventio.poll()
    reader, writer = os.pipe()
    try:
        poller.register(reader, eventio.READ)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        started = time.monotonic()
        assert poller.poll(0.3) == []
        assert time.monotonic() - started > 0.25
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        poller.close()
        for fd in (reader, writer):
            env.original("os", "close")(fd)
