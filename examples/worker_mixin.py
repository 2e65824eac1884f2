"""A worker that consumes until it is told to stop, and survives the loss of its connection.

python examples/worker_mixin.py [URL]
"""

from __future__ import annotations

import sys

from greenkombu import Connection, Producer, Queue
from greenkombu.mixins import ConsumerMixin

TASKS = Queue("example-tasks")
DONE = []


class Worker(ConsumerMixin):
    def __init__(self, connection: Connection) -> None:
        self.connection = connection  # cloned for consuming; run() opens it again when it is lost

    def get_consumers(self, Consumer, channel):  # noqa: ARG002
        return [
            Consumer(
                queues=[TASKS],
                callbacks=[self.on_task],
                accept=["json"],
                prefetch_count=10,  # at most ten messages are under way to this worker
            )
        ]

    def on_task(self, body, message) -> None:
        try:
            DONE.append(body["text"].upper())
        except KeyError:
            message.reject()  # no other worker would succeed: dropped, or dead-lettered
        else:
            message.ack()
        if body.get("last"):
            self.should_stop = True


def main(url: str = "memory://") -> None:
    with Connection(url) as connection:
        producer = Producer(connection)
        for body in ({"text": "one"}, {"nonsense": True}, {"text": "two", "last": True}):
            producer.publish(body, routing_key=TASKS.name, declare=[TASKS], retry=True, timeout=10)

        Worker(connection).run(timeout=10)  # without `timeout` it would wait for ever

        TASKS(connection.default_channel).delete()
    assert DONE == ["ONE", "TWO"], DONE
    print("done:", DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
