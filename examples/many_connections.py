"""Consume on many connections from one task: the drain loop.

    python examples/many_connections.py [URL] [connections]

Each connection has a queue and a consumer of its own. One task runs all callbacks of all
connections; another one publishes.
"""

from __future__ import annotations

import sys

import hub
from greenkombu import Connection, Consumer, DrainLoop, Producer, Queue


def main(url: str = "memory://", number: int = 100) -> None:
    env = hub.get_environment()
    queues = [Queue(f"example-many-{index}", auto_delete=True) for index in range(number)]
    received = []
    loop = DrainLoop()

    def on_message(body, message) -> None:
        message.ack()
        received.append(body)
        if len(received) == number:
            loop.stop()

    connections = []
    for queue in queues:
        connection = Connection(url)
        Consumer(connection, queues=[queue], callbacks=[on_message]).consume()
        connections.append(connection)
        loop.join(connection)  # connections may join and leave while the loop runs

    def publish() -> None:
        with Connection(url) as connection:
            producer = Producer(connection)
            for index, queue in enumerate(queues):
                producer.publish(index, routing_key=queue.name)

    publisher = env.spawn(publish)
    for event in loop:
        # One connection has failed. The loop goes on with the others; this program does not.
        if event.error is not None:
            raise event.error
    publisher.join(10)

    loop.close(deadline=5)
    for connection in connections:
        connection.close()
    assert sorted(received) == list(range(number))
    print(f"{len(received)} messages over {number} connections, one task")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*arguments[:1], *map(int, arguments[1:]))
