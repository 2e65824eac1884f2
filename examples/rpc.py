"""Ask and answer over two queues.

    python examples/rpc.py [URL]

The server runs in a task of its own, with a connection of its own; under gevent and eventlet that
task is a greenlet.
"""

from __future__ import annotations

import sys

import hub
from greenkombu import Connection, Consumer, Producer, Queue, uuid

REQUESTS = Queue("example-rpc", auto_delete=True)


class Server:
    def __init__(self, url: str) -> None:
        self.connection = Connection(url)
        self.ready = hub.get_environment().Event()
        self.should_stop = False

    def run(self) -> None:
        with (
            self.connection as connection,
            Consumer(connection, queues=[REQUESTS], callbacks=[self.answer]),
        ):
            self.ready.set()
            while not self.should_stop:
                try:
                    connection.drain_events(timeout=0.2)
                except TimeoutError:
                    pass

    def answer(self, body, message) -> None:
        # On the channel the request came over, to the queue it names.
        Producer(message.channel).publish(
            {"result": body["number"] ** 2},
            routing_key=message.properties["reply_to"],
            correlation_id=message.properties["correlation_id"],
        )
        message.ack()


class Client:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.replies = Queue(uuid(), exclusive=True, auto_delete=True)
        self.answers: dict[str, object] = {}
        self.consumer = Consumer(
            connection, queues=[self.replies], callbacks=[self.on_reply], no_ack=True
        )
        self.consumer.consume()
        self.producer = Producer(connection)

    def on_reply(self, body, message) -> None:
        self.answers[message.properties["correlation_id"]] = body["result"]

    def call(self, number: int, timeout: float = 5) -> object:
        wanted = uuid()
        self.producer.publish(
            {"number": number},
            routing_key=REQUESTS.name,
            reply_to=self.replies.name,
            correlation_id=wanted,
            expiration=timeout,
        )
        while wanted not in self.answers:
            self.connection.drain_events(timeout=timeout)
        return self.answers.pop(wanted)


def main(url: str = "memory://") -> None:
    server = Server(url)
    task = hub.get_environment().spawn(server.run)
    if not server.ready.wait(10):
        raise SystemExit("the server did not start")
    with Connection(url) as connection:
        client = Client(connection)
        answers = [client.call(number) for number in range(5)]
    server.should_stop = True
    task.result(10)
    assert answers == [0, 1, 4, 9, 16], answers
    print("answers:", answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
