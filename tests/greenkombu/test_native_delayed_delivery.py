"""Native delayed delivery on a real RabbitMQ; what it declares: `tests.differential`."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Exchange, Producer, Queue, binding
from greenkombu.exceptions import NotEquivalentError, NotFoundError
from greenkombu.transport.native_delayed_delivery import (
    MAX_LEVEL,
    bind_queue_to_native_delayed_delivery_exchange,
    calculate_routing_key,
    declare_native_delayed_delivery_exchanges_and_queues,
    level_name,
)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
def test_messages_arrive_after_their_delay(rabbitmq_vhost: str, queue_type: str) -> None:
    queue = Queue(
        "tasks",
        Exchange("tasks", "topic"),
        routing_key="task.*",
        queue_arguments={"x-queue-type": queue_type},
    )
    with Connection(rabbitmq_vhost, transport_options={"confirm_publish": True}) as connection:
        declare_native_delayed_delivery_exchanges_and_queues(connection, queue_type)
        queue(connection.default_channel).declare()
        bind_queue_to_native_delayed_delivery_exchange(connection, queue)
        arrived: dict[int, Any] = {}

        def take(message: Any) -> None:
            arrived[message.payload] = (time.monotonic(), message.delivery_info["routing_key"])
            message.ack()

        producer = Producer(connection, Exchange(level_name(MAX_LEVEL), "topic"))
        started = time.monotonic()
        keys = {delay: calculate_routing_key(delay, f"task.{delay}") for delay in (3, 1)}
        for delay, key in keys.items():
            # An unroutable one would be an error.
            producer.publish(delay, routing_key=key, mandatory=True)
        with Consumer(connection, queue, on_message=take):
            while len(arrived) < 2:
                connection.drain_events(timeout=20)
        for delay, (when, key) in arrived.items():
            assert key == keys[delay]
            assert when - started >= delay - 0.05
        assert list(arrived) == [1, 3]


def test_a_topology_with_another_queue_type_is_refused(rabbitmq_vhost: str) -> None:
    with Connection(rabbitmq_vhost) as connection:
        Queue(level_name(0), durable=True)(connection.default_channel).declare()
        with pytest.raises(NotEquivalentError, match="celery_delayed_0"):
            declare_native_delayed_delivery_exchanges_and_queues(connection, "classic")
        with pytest.raises(ValueError, match="stream"):
            declare_native_delayed_delivery_exchanges_and_queues(connection, "stream")


def test_what_cannot_get_delayed_messages_is_named(
    rabbitmq_vhost: str, caplog: pytest.LogCaptureFixture
) -> None:
    topic = Queue("topic", Exchange("topic", "topic"), routing_key="k")
    several = [binding(Exchange("direct", "direct"), "k"), binding("by-name", "k")]
    with Connection(rabbitmq_vhost) as connection:
        topic(connection.default_channel).declare()
        with pytest.raises(NotFoundError, match="celery_delayed_delivery"):
            bind_queue_to_native_delayed_delivery_exchange(connection, topic)
        with caplog.at_level(logging.WARNING):
            bind_queue_to_native_delayed_delivery_exchange(connection, Queue("q", several))
    assert sorted(record.getMessage().split("'")[3] for record in caplog.records) == [
        "by-name",
        "direct",
    ]


@pytest.mark.parametrize(
    ("countdown", "key", "text"),
    [
        (0, "k", "at least 1 s"),
        (1.5, "k", "whole seconds"),
        (2**28, "k", "268435455"),
        (1, "", "needs a routing key"),
    ],
)
def test_a_delay_that_cannot_be_kept_is_refused(countdown: Any, key: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        calculate_routing_key(countdown, key)


def test_a_delayed_key_gets_the_new_delay() -> None:
    again = calculate_routing_key(3, calculate_routing_key(12345, "1.0.k"))
    assert again == calculate_routing_key(3, "1.0.k")
    assert again.endswith(".0.1.1.1.0.k")
