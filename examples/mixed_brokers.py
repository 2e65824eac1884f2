"""Consume from brokers of several kinds in one task: RabbitMQ, Redis and memory together.

    python examples/mixed_brokers.py [URL ...]

Without URLs there is memory alone. A message that comes from one broker is answered on the next
one, and all of it runs in one drain loop.
"""

from __future__ import annotations

import sys
import uuid

import hub
from greenkombu import Connection, Consumer, DrainLoop, Producer, Queue


def main(*urls: str, messages: int = 20) -> None:
    urls = urls or ("memory://",)
    run = uuid.uuid4().hex[:8]  # other programs may use these brokers, too
    loop = DrainLoop()
    connections = [Connection(url) for url in urls]
    queues = [Queue(f"example-mixed-{run}-{index}") for index in range(len(urls))]
    received: dict[str, list[int]] = {}

    def start(index: int) -> None:
        """Pass what comes here on to the next broker, until it has been everywhere."""
        connection = connections[index]
        following = (index + 1) % len(urls)
        producer = Producer(connections[following])
        kind = f"{index}: {connection.transport.driver_type}"
        received[kind] = []

        def on_message(body: dict[str, int], message) -> None:
            received[kind].append(body["number"])
            if body["hops"] > 1:
                # A task that drains may publish, also on other connections.
                onward = {"number": body["number"], "hops": body["hops"] - 1}
                producer.publish(onward, routing_key=queues[following].name)
            message.ack()
            if all(len(numbers) == messages for numbers in received.values()):
                loop.stop()

        consumer = Consumer(connection, queues=[queues[index]], callbacks=[on_message])
        consumer.qos(prefetch_count=10)
        consumer.consume()
        loop.join(connection)

    for index in range(len(urls)):
        start(index)

    def publish() -> None:
        with Connection(urls[0]) as connection:
            producer = Producer(connection)
            for number in range(messages):
                body = {"number": number, "hops": len(urls)}
                producer.publish(body, routing_key=queues[0].name)

    publisher = hub.get_environment().spawn(publish)
    for event in loop:  # ends by loop.stop()
        if event.error is not None:
            raise event.error
    publisher.join(10)

    loop.close(deadline=5)
    for connection, queue in zip(connections, queues, strict=True):
        with connection:
            queue(connection.channel()).delete()
    for kind, numbers in received.items():
        assert sorted(numbers) == list(range(messages)), kind
        print(f"{kind}: {len(numbers)} messages")


if __name__ == "__main__":
    main(*sys.argv[1:])
