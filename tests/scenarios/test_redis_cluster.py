"""A Redis Cluster under consumers: slots move, masters are replaced or die."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from greenkombu import mixins
from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Consumer, Producer
from greenkombu.mixins import ConsumerMixin
from greenkombu.transport.redis import _leases, _nodes, _taps
from greenkombu.utils._private_server import free_ports
from tests.scenarios.broker import took
from tests.support.rabbitmq import Certificates
from tests.support.tasks import LONG, until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from greenkombu.utils.private_redis import PrivateRedis
    from greenkombu.utils.private_redis_cluster import ClusterNode, PrivateRedisCluster
    from hub.environment import Environment

# Six servers take 3 s to start, and more to be in order again after a loss: `make test` shows it
# once, `make test-all` everywhere.
if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] != "gevent":
    pytestmark = pytest.mark.slow

#: For 50 s of trying.
RETRY = {"max_retries": 100, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5}

#: Seconds; six servers have to agree before anything goes on.
FAILOVER = 3 * LONG


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers come back soon, and watchers look soon."""
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_START", 0.1)
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_STEP", 0.1)
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_MAX", 0.5)
    monkeypatch.setattr(_taps, "LEASE", 1.0)
    monkeypatch.setattr(_leases, "LEASE", 1.0)


def connection_to(cluster: PrivateRedisCluster, **options: Any) -> Connection:
    return Connection(cluster.url, transport_options=options, connect_timeout=5)


class Desk:
    """A consumer and a producer on one connection, and what has come."""

    def __init__(self, cluster: PrivateRedisCluster) -> None:
        self.name = f"desk-{os.urandom(4).hex()}"
        self.key = "{" + self.name + "}"
        self.connection = connection_to(cluster)
        self.channel = self.connection.channel()
        self.queue = Queue(self.name, Exchange(self.name, "direct"), routing_key="key")
        self.queue(self.channel).declare()
        self.producer = Producer(self.connection.channel())
        self.messages: list[Any] = []
        self.consumer = Consumer(
            self.channel, [self.queue], on_message=self.messages.append, prefetch_count=10
        )
        self.first = self.connection.connection

    @property
    def got(self) -> list[int]:
        return [message.payload for message in self.messages]

    def publish(self, *numbers: int) -> None:
        for number in numbers:
            self.producer.publish(number, exchange=self.queue.exchange, routing_key="key")

    def drain(self, count: int) -> None:
        """Take messages until there have been so many, over the first connection."""
        while len(self.messages) < count:
            self.connection.drain_events(timeout=FAILOVER)
        assert self.connection.connection is self.first, "it has connected again"

    def settle(self) -> None:
        for message in self.messages:
            if not message.acknowledged:
                message.ack()
        self.first.finish()

    def close(self) -> None:
        self.queue(self.connection.channel()).delete()
        self.connection.close()


@pytest.fixture
def desk(redis_cluster: PrivateRedisCluster) -> Iterator[Desk]:
    made = Desk(redis_cluster)
    yield made
    made.close()


def other_master(cluster: PrivateRedisCluster, key: str) -> ClusterNode:
    return next(node for node in cluster.masters if node is not cluster.master_of(key))


def unacked(cluster: PrivateRedisCluster, key: str) -> int:
    return int(cluster.command(key, "HLEN", f"unacked:{key}"))


def test_queues_of_all_masters_on_one_connection(redis_cluster: PrivateRedisCluster) -> None:
    """Some exchanges lie elsewhere than their queues; one drain serves all."""
    got: list[Any] = []
    with connection_to(redis_cluster) as connection:
        channel = connection.channel()
        names = [f"spread-{number}" for number in range(12)]
        exchange = Exchange("spread", "topic")
        queues = [Queue(name, exchange, routing_key=f"#.{name}") for name in names]
        consumer = Consumer(channel, queues, on_message=got.append)
        producer = Producer(channel)
        with producer.batch():
            for number in range(5):
                for name in names:
                    producer.publish(number, exchange=exchange, routing_key=f"x.{name}")
        # redis-py finds its way, too.
        assert channel.client.llen("{spread-0}") == channel.client.llen("{spread-1}") == 5
        owners = {redis_cluster.master_of("{" + name + "}") for name in names}
        assert len(owners) == 3
        with consumer:
            while len(got) < 60:
                connection.drain_events(timeout=LONG)
        for name in names:
            of_queue = [
                each.payload for each in got if each.delivery_info["routing_key"] == f"x.{name}"
            ]
            assert of_queue == list(range(5))
        for message in got:
            message.ack()
        for queue in queues:
            queue(channel).delete()


@pytest.mark.parametrize("protocol", [2, 3])
def test_broadcasts_and_queues_by_way_of_replicas(
    redis_cluster: PrivateRedisCluster, protocol: int
) -> None:
    """Any server will do to begin with, under another name too; broadcasts go to all of them."""
    masters = redis_cluster.masters
    one, other, *_ = [node for node in redis_cluster.nodes if node not in masters]
    name = f"replicas-{os.urandom(4).hex()}"
    options = {"protocol": protocol, "polling_interval": 0.1}
    got: list[Any] = []
    exchange = Exchange(name, "fanout")
    with (
        Connection(f"redis+cluster://localhost:{one.port}", transport_options=options) as listening,
        Connection(f"redis+cluster://127.0.0.1:{other.port}") as publishing,
    ):
        queues = [Queue(f"{name}-f", exchange), Queue(name)]
        producer = Producer(publishing.channel())
        with Consumer(listening.channel(), queues, on_message=got.append):
            producer.publish("to all", exchange=exchange, declare=[exchange])
            producer.publish("to one", routing_key=name)
            while len(got) < 2:
                listening.drain_events(timeout=LONG)
        assert sorted(message.payload for message in got) == ["to all", "to one"]
        for message in got:
            message.ack()
        for queue in queues:
            queue(listening.channel()).delete()


def test_tls_and_a_password(
    make_private_redis: Callable[..., PrivateRedis],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a cluster of one that has just begun, and is down for the first two seconds."""
    monkeypatch.setattr(_nodes, "PATIENCE", LONG)
    certificates = Certificates(tmp_path)
    (bus,) = free_ports(1)
    settings = {"cluster-enabled": "yes", "cluster-port": str(bus), "tls-cluster": "yes"}
    server = make_private_redis(
        tls=certificates.server_files(), password="of-the-cluster", settings=settings
    )
    server.command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
    credentials = ":of-the-cluster@"
    url = f"rediss+cluster://{credentials}localhost:{server.tls_port}"
    trust = {"ca_certs": str(certificates.server_files().ca)}
    with Connection(url, ssl=trust, connect_timeout=LONG) as connection:
        channel = connection.channel()
        queue = Queue("over-tls")(channel)
        queue.declare()
        Producer(channel).publish("x", routing_key="over-tls")
        message = queue.get()
        assert message.payload == "x"
        message.ack()
        # One wire: the server's own name for itself is understood.
        assert len(connection.connection.nodes.wires()) == 1
        assert server.command("HLEN", "unacked:{over-tls}") <= 1
    assert server.command("HLEN", "unacked:{over-tls}") == 0


def test_a_slot_moves_under_a_consumer_that_waits(
    redis_cluster: PrivateRedisCluster, desk: Desk
) -> None:
    desk.consumer.consume()
    desk.publish(1, 2)
    desk.drain(2)
    slot = redis_cluster.slot_of(desk.key)
    target = other_master(redis_cluster, desk.key)
    redis_cluster.move_slot(slot, target)
    # Published by somebody else, so that this connection hears nothing of the move.
    with connection_to(redis_cluster) as other:
        Producer(other).publish(3, exchange=desk.queue.exchange, routing_key="key")
    desk.drain(3)
    # What was taken before is acknowledged where it is now.
    assert unacked(redis_cluster, desk.key) == 3
    desk.settle()
    assert unacked(redis_cluster, desk.key) == 0
    assert desk.got == [1, 2, 3]


def test_a_publisher_hears_of_bindings_when_the_slot_of_the_exchange_has_moved(
    redis_cluster: PrivateRedisCluster, desk: Desk
) -> None:
    desk.publish(1)
    redis_cluster.move_slot(redis_cluster.slot_of(desk.key), other_master(redis_cluster, desk.key))
    second = Queue(f"{desk.name}-second", desk.queue.exchange, routing_key="key")
    with connection_to(redis_cluster) as other:
        second(other.channel()).declare()
    desk.publish(2)
    message = second(desk.channel).get()
    assert message.payload == 2
    message.ack()
    second(desk.channel).delete()
    assert desk.connection.connection is desk.first


def test_work_goes_on_while_a_slot_is_moved(
    env: Environment, redis_cluster: PrivateRedisCluster, desk: Desk
) -> None:
    """Scripts have to wait in the middle of it; nothing is lost, and nothing comes twice."""
    desk.consumer.consume()
    desk.publish(*range(20))
    desk.drain(10)
    slot = redis_cluster.slot_of(desk.key)
    target = other_master(redis_cluster, desk.key)
    redis_cluster.start_moving(slot, target)
    desk.publish(20, 21)
    publishing = env.spawn(desk.publish, 22, 23)
    for message in desk.messages:
        message.ack()
    redis_cluster.move_keys(slot, target)
    publishing.result(FAILOVER)
    desk.publish(24)
    redis_cluster.finish_moving(slot, target)
    while len(desk.messages) < 25:
        desk.connection.drain_events(timeout=FAILOVER)
        desk.messages[-1].ack()
    desk.first.finish()
    assert sorted(desk.got) == list(range(25))
    assert unacked(redis_cluster, desk.key) == 0
    assert desk.connection.connection is desk.first


def test_a_replica_takes_over_from_a_living_master(
    redis_cluster: PrivateRedisCluster, desk: Desk
) -> None:
    desk.consumer.consume()
    desk.publish(1, 2)
    desk.drain(2)
    redis_cluster.failover_of(desk.key)
    desk.publish(3)
    desk.drain(3)
    desk.settle()
    assert desk.got == [1, 2, 3]
    assert unacked(redis_cluster, desk.key) == 0


class Worker(ConsumerMixin):
    """Consumes in a task of its own until the end of a block, and connects again if it has to."""

    def __init__(self, env: Environment, cluster: PrivateRedisCluster, queue: Queue) -> None:
        self.connection = connection_to(cluster, visibility_timeout=3)
        self.queue = queue
        self.got: list[int] = []
        self.held: list[Any] = []
        self.holds = True
        self.connects = 0
        self.should_stop = False
        self.task = env.spawn(self.run, safety_interval=0.1)

    def on_connection_revived(self) -> None:
        self.connects += 1

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Consumer]:
        return [consumer_class([self.queue], on_message=self.take, prefetch_count=5)]

    def take(self, message: Any) -> None:
        self.got.append(message.payload)
        if self.holds:
            self.held.append(message)
        else:
            message.ack()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.should_stop = True
        assert self.task.join(LONG), "the worker does not stop"
        self.task.result()
        self.connection.close()


def test_a_master_is_killed(
    env: Environment,
    redis_cluster: PrivateRedisCluster,
    desk: Desk,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its consumers resume on the replica; who needs other servers only stays connected."""
    monkeypatch.setattr(_nodes, "PATIENCE", FAILOVER)
    with Worker(env, redis_cluster, desk.queue) as worker:
        desk.publish(*range(10))
        until(env, lambda: len(worker.got) == 5)
        old = redis_cluster.master_of(desk.key)
        # What the replica has not heard of may be lost. This waits for what was written before,
        # too.
        commands = [("SET", desk.key + "written", 1), ("WAIT", 1, int(LONG * 1000))]
        assert old.commands(commands, timeout=2 * LONG)[1] == 1
        elsewhere = next(
            name
            for name in (f"elsewhere-{number}" for number in range(1000))
            if redis_cluster.master_of("{" + name + "}") is not old
        )
        near = redis_cluster.master_of("{" + elsewhere + "}")
        with Connection(f"redis+cluster://127.0.0.1:{near.port}") as other:
            producer = Producer(other.channel())
            producer.publish(1, routing_key=elsewhere)
            there = other.connection
            worker.holds = False
            old.kill()
            with contextlib.suppress(*desk.connection.connection_errors):
                desk.connection.drain_events(timeout=1)
            redis_cluster.wait_failover(desk.key, old)
            Producer(desk.connection).publish(
                10, exchange=desk.queue.exchange, routing_key="key", retry=True, retry_policy=RETRY
            )
            expected = Counter([*range(11), *(message.payload for message in worker.held)])
            until(env, lambda: Counter(worker.got) >= expected, FAILOVER)
            assert len(worker.held) == 5
            # A script that the cluster would not run while a part of it was missing.
            producer.publish(2, routing_key=elsewhere)
            assert other.connection is there
            Queue(elsewhere)(other.channel()).delete()
    assert unacked(redis_cluster, desk.key) == 0
    assert worker.connects >= 2


def test_a_master_that_hangs_holds_up_nobody_for_long(
    redis_cluster: PrivateRedisCluster, desk: Desk
) -> None:
    """The command ends in its time, and so does the connection; its replica takes over."""
    old = redis_cluster.master_of(desk.key)
    near = next(node for node in redis_cluster.masters if node is not old)
    with Connection(
        f"redis+cluster://127.0.0.1:{near.port}", transport_options={"socket_timeout": 1}
    ) as connection:
        producer = Producer(connection.channel())
        producer.publish(1, routing_key=desk.name)
        # Only what the replica has heard of is safe.
        old.commands([("SET", desk.key + "written", 1), ("WAIT", 1, 0)], timeout=LONG)
        old.freeze()
        try:
            with took() as time_of, pytest.raises(connection.connection_errors):
                producer.publish(2, routing_key=desk.name)
            assert time_of.seconds < LONG
            Producer(connection).publish(3, routing_key=desk.name, retry=True, retry_policy=RETRY)
            queue = desk.queue(connection.channel())
            found = []
            while (message := queue.get()) is not None:
                message.ack()
                found.append(message.payload)
        finally:
            old.thaw()
        # The second one is with the one that hangs, which is no master any more.
        assert found == [1, 3]
