"""A Redis master with sentinels: it dies, or another one takes its place, under consumers."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from greenkombu import mixins
from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.messaging import Consumer, Producer
from greenkombu.mixins import ConsumerMixin
from tests.support.tasks import LONG, until

if TYPE_CHECKING:
    from greenkombu.utils.private_redis import PrivateRedis
    from greenkombu.utils.private_redis_sentinel import PrivateSentinel
    from hub.environment import Environment

# Five seconds for each failover, with what it takes to have all in order again: `make test` shows
# it once, `make test-all` everywhere.
if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] != "gevent":
    pytestmark = pytest.mark.slow

#: For 50 s of trying: a failover on a machine under load takes some.
RETRY = {"max_retries": 100, "interval_start": 0.1, "interval_step": 0.1, "interval_max": 0.5}

#: Seconds; three servers and three sentinels have to agree before anything goes on.
FAILOVER = 3 * LONG


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers come back soon."""
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_START", 0.1)
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_STEP", 0.1)
    monkeypatch.setattr(mixins, "CONNECT_INTERVAL_MAX", 0.5)


def connection_to(servers: PrivateSentinel) -> Connection:
    options = {**servers.transport_options, "visibility_timeout": 3}
    return Connection(servers.url, transport_options=options, connect_timeout=5)


def bound_queue(name: str) -> Queue:
    return Queue(name, Exchange(name, "direct"), routing_key="key")


class Worker(ConsumerMixin):
    """Consumes in a task of its own until the end of a block, and connects again if it has to."""

    def __init__(self, env: Environment, servers: PrivateSentinel, queue: Queue) -> None:
        self.connection = connection_to(servers)
        self.queue = queue
        self.got: list[int] = []
        self.held: list[Any] = []
        self.holds = False
        self.should_stop = False
        self.task = env.spawn(self.run, safety_interval=0.1)

    def get_consumers(self, consumer_class: Any, channel: Any) -> list[Consumer]:
        return [consumer_class([self.queue], on_message=self.take, prefetch_count=10)]

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


def replicated(server: PrivateRedis) -> None:
    """Wait until the replicas have what the master has: what is not there yet may be lost."""
    # It waits for what its own connection has written, and for what was written before that.
    commands = [("SET", "written", 1), ("WAIT", 1, int(LONG * 1000))]
    assert server.commands(commands, timeout=2 * LONG)[1] == 1


def publish(producer: Producer, queue: Queue, numbers: range) -> None:
    for number in numbers:
        producer.publish(
            number, exchange=queue.exchange, routing_key="key", retry=True, retry_policy=RETRY
        )


def test_consumers_and_publishers_survive_the_death_of_the_master(
    env: Environment, redis_sentinel: PrivateSentinel
) -> None:
    """What the replica has heard of is delivered, also what a consumer held when it died."""
    queue = bound_queue("killed")
    with connection_to(redis_sentinel) as connection:
        with Worker(env, redis_sentinel, queue) as worker:
            worker.holds = True
            producer = Producer(connection)
            queue(connection.channel()).declare()
            publish(producer, queue, range(30))
            # The prefetch limit.
            until(env, lambda: len(worker.got) == 10)
            old = redis_sentinel.master
            replicated(old)
            worker.holds = False
            old.kill()
            # These wait for the new master.
            publish(producer, queue, range(30, 40))
            assert redis_sentinel.wait_failover(old) is not old
            expected = Counter([*range(40), *(message.payload for message in worker.held)])
            until(env, lambda: Counter(worker.got) >= expected, FAILOVER)
        new = redis_sentinel.master
        assert new.command("HLEN", "unacked") == new.command("ZCARD", "unacked_index") == 0
        queue(connection.channel()).delete()


def test_a_failover_while_the_old_master_lives(
    env: Environment, redis_sentinel: PrivateSentinel
) -> None:
    """Who is connected to it has to notice that it is the master no longer."""
    queue = bound_queue("replaced")
    with connection_to(redis_sentinel) as connection:
        with Worker(env, redis_sentinel, queue) as worker:
            producer = Producer(connection)
            queue(connection.channel()).declare()
            publish(producer, queue, range(5))
            until(env, lambda: len(worker.got) == 5)
            old = redis_sentinel.master
            replicated(old)
            new = redis_sentinel.failover()
            assert new is not old
            publish(producer, queue, range(5, 10))
            until(env, lambda: set(worker.got) == set(range(10)), FAILOVER)
            assert connection.connection.settings.address == ("127.0.0.1", new.port)
        queue(connection.channel()).delete()


def test_what_was_declared_is_there_on_the_new_master(
    env: Environment, redis_sentinel: PrivateSentinel
) -> None:
    """Also if the binding had not come to the replica."""
    queue = bound_queue("declared")
    with connection_to(redis_sentinel) as connection:
        queue(connection.channel()).declare()
        old = redis_sentinel.master
        replicated(old)
        old.kill()
        with pytest.raises(connection.connection_errors):
            connection.drain_events(timeout=LONG)
        # There is no master for a second. The transport that has declared the queue is kept.
        with contextlib.suppress(*connection.connection_errors):
            connection.connect()
        new = redis_sentinel.wait_failover(old)
        new.command("DEL", "_kombu.binding.declared")
        publish(Producer(connection), queue, range(1))
        assert new.command("LLEN", "declared") == 1
        queue(connection.channel()).delete()


def test_a_frozen_sentinel_delays_nobody_for_long(redis_sentinel: PrivateSentinel) -> None:
    first = redis_sentinel.sentinels[0]
    first.freeze()
    with connection_to(redis_sentinel) as connection:
        started = time.monotonic()
        connection.ensure_connection(max_retries=3, interval_start=0.1)
        assert connection.transport.sentinels[0].address[1] != first.port
        assert time.monotonic() - started < LONG
