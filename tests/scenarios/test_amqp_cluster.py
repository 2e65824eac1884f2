"""Three RabbitMQ nodes of which one is killed, under load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import amqp
import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.exceptions import NotFoundError
from greenkombu.messaging import Consumer, Producer
from greenkombu.mixins import ConsumerMixin
from greenkombu.utils.private_rabbitmq_cluster import PrivateRabbitMQCluster
from hub.environment import Environment
from tests.scenarios.broker import QUICK
from tests.support.tasks import LONG, until

# Three nodes take 14 s of CPU time to start: `make test` shows it once, `make test-all` everywhere.
if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] != "gevent":
    pytestmark = pytest.mark.slow

#: Each after the kill of one more node that was restarted: twelve seconds each.
EVERY_NODE = [0, *(pytest.param(node, marks=pytest.mark.slow) for node in (1, 2))]


@pytest.fixture(scope="module")
def started() -> Iterator[PrivateRabbitMQCluster]:
    """The cluster of this module."""
    from tests.support.rabbitmq import make_cluster

    with make_cluster() as made:
        yield made


@pytest.fixture
def cluster(started: PrivateRabbitMQCluster) -> PrivateRabbitMQCluster:
    """The same, with all its nodes running."""
    return started.start()


def new_name(kind: str) -> str:
    """Return a name that no queue of the module's cluster has."""
    return f"{kind}-{os.urandom(6).hex()}"


class Worker(ConsumerMixin):
    """Consumes in a task of its own, on whichever node there is, until the end of a block."""

    def __init__(self, env: Environment, url: str, queue: Queue) -> None:
        self.connection = Connection(url, transport_options=QUICK, connect_timeout=2)
        self.queue = queue
        self.got: list[int] = []
        self.ports: list[int] = []
        self.should_stop = False
        self.task = env.spawn(self.run, safety_interval=0.1)

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Consumer]:
        self.ports.append(channel.connection.client.port)
        return [consumer_class([self.queue], on_message=self.take, prefetch_count=20)]

    def take(self, message: Any) -> None:
        self.got.append(message.payload)
        message.ack()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.should_stop = True
        assert self.task.join(LONG), "the worker does not stop"
        self.task.result()
        self.connection.close()


class Load:
    """Tasks that publish numbers, confirmed, over one connection, until the end of a block."""

    def __init__(self, env: Environment, url: str, queue: Queue, tasks: int) -> None:
        self.connection = Connection(
            url, transport_options={**QUICK, "confirm_publish": True}, connect_timeout=2
        )
        self.confirmed: list[int] = []
        self.should_stop = False
        self._producer = Producer(self.connection, routing_key=queue.name)
        self._tasks = [env.spawn(self._publish, first, tasks) for first in range(tasks)]

    def _publish(self, number: int, step: int) -> None:
        while not self.should_stop:
            self._producer.publish(
                number, retry=True, retry_policy={"max_retries": 10, "interval_start": 0.1}
            )
            self.confirmed.append(number)
            number += step

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        """End the tasks, and raise what one of them met."""
        self.should_stop = True
        for task in self._tasks:
            task.result(LONG)
        self.connection.close()


def test_consumers_of_a_queue_on_a_node_that_fails_are_told(
    env: Environment, cluster: PrivateRabbitMQCluster
) -> None:
    """A classic queue lives on one node; who consumes it over another one keeps the connection."""
    far, near = cluster.nodes[1:]
    queue = Queue(new_name("classic"), durable=True)
    with Connection(far.url, transport_options=QUICK) as connection:
        queue(connection.default_channel).declare()
    cancelled: list[str] = []
    told: list[str] = []
    with Connection(near.url, transport_options=QUICK) as connection:
        with_callback, without = connection.channel(), connection.channel()
        tag = with_callback.basic_consume(queue.name, callback=print, on_cancel=cancelled.append)
        Consumer(without, [queue], on_message=print).consume()
        with Worker(env, near.url, queue) as worker:
            until(env, lambda: worker.ports)
            far.stop_app()
            try:
                while not (cancelled and told):
                    try:
                        connection.drain_events(timeout=LONG)
                    except amqp.ConsumerCancelled as error:
                        told.append(str(error))
                assert cancelled == [tag]
                assert f":{near.port}" in told[0]
                with pytest.raises(NotFoundError):
                    connection.channel().queue_declare(queue.name, passive=True)
            finally:
                far.start_app()
            assert connection.connected
            # The worker has tried again until the node was back.
            Producer(connection, routing_key=queue.name).publish(1, delivery_mode=2)
            until(env, lambda: worker.got == [1], LONG)
        assert queue(connection.channel()).queue_declare(passive=True).consumer_count == 0


@pytest.mark.parametrize("victim", EVERY_NODE)
def test_a_killed_node_loses_no_confirmed_message_and_nobody_stops(
    env: Environment, cluster: PrivateRabbitMQCluster, victim: int
) -> None:
    # The victim comes first, so everybody is connected to it and it leads the queue.
    nodes = [*cluster.nodes[victim:], *cluster.nodes[:victim]]
    url = ";".join(node.url for node in nodes)
    queue = Queue(new_name("quorum"), queue_arguments={"x-queue-type": "quorum"})
    with Connection(url, transport_options=QUICK) as connection:
        queue(connection.default_channel).declare()
    with Worker(env, url, queue) as one, Worker(env, url, queue) as other:
        workers = (one, other)
        with Load(env, url, queue, tasks=8) as load:
            until(env, lambda: len(load.confirmed) > 200 and all(each.got for each in workers))
            assert load.connection.port == nodes[0].port
            nodes[0].kill()
            before = len(load.confirmed), [len(worker.got) for worker in workers]
            until(env, lambda: len(load.confirmed) > before[0] + 200, 2 * LONG)
            until(env, lambda: all(len(w.got) > n for w, n in zip(workers, before[1], strict=True)))
        survivors = {node.port for node in nodes[1:]}
        assert load.connection.port in survivors
        confirmed = set(load.confirmed)
        assert len(confirmed) == len(load.confirmed)
        until(env, lambda: confirmed <= {number for w in workers for number in w.got}, 2 * LONG)
    for worker in workers:
        assert worker.ports[0] == nodes[0].port
        assert worker.ports[-1] in survivors
