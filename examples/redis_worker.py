"""Two workers on Redis: urgent work first, and nothing lost when one of them is gone.

    python examples/redis_worker.py [URL]

    python examples/redis_worker.py redis://localhost/0

The first worker takes a task and leaves without having done it; the second one gets it again.
"""

from __future__ import annotations

import sys
import uuid

from greenkombu import Connection, Consumer, Producer, Queue

OPTIONS = {
    # Seconds after which the work of a killed worker goes to another one. Living workers renew
    # what they hold, so tasks may take longer than that.
    "visibility_timeout": 60,
    # The highest number first, as in AMQP. Kombu on Redis has it the other way round.
    "priority_order": "amqp",
}


def connect(url: str) -> Connection:
    return Connection(url, transport_options=OPTIONS)


def main(url: str = "memory://") -> None:
    tasks = Queue(f"example-tasks-{uuid.uuid4().hex[:8]}", max_priority=9)
    done: list[str] = []

    with connect(url) as connection:
        tasks(connection.default_channel).declare()
        producer = Producer(connection)
        with producer.batch():  # one write, one wait, where the transport can do that
            for name, priority in {"sweep": 0, "mail": 5, "alarm": 9}.items():
                producer.publish(name, routing_key=tasks.name, priority=priority)

    def take(body: str, message) -> None:
        done.append(body)
        message.ack()

    # A prefetch of one: it takes the most urgent task, and leaves the rest to others.
    first = connect(url)
    held = []
    consumer = Consumer(first, [tasks], on_message=held.append)
    consumer.qos(prefetch_count=1)
    consumer.consume()
    while not held:
        first.drain_events(timeout=10)
    assert held[0].payload == "alarm"
    first.close()  # it does not acknowledge: the task goes back to where it was

    with connect(url) as connection:
        consumer = Consumer(connection, [tasks], callbacks=[take])
        consumer.qos(prefetch_count=1)
        with consumer:
            while len(done) < 3:
                connection.drain_events(timeout=10)
        tasks(connection.default_channel).delete()
    assert done == ["alarm", "mail", "sweep"], done
    print("done:", ", ".join(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
