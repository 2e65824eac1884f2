"""Publish so that the broker confirms every message.

    python examples/confirms.py [URL]

With `confirm_publish`, a publish returns when the broker has taken the message, and raises when
it has not. A message that no queue is bound for is an error too if it is `mandatory`.
"""

from __future__ import annotations

import sys

import hub
from greenkombu import Connection, Exchange, Producer, Queue
from greenkombu.exceptions import UnroutableError


def main(url: str = "memory://") -> None:
    env = hub.get_environment()
    queue = Queue("example-confirms")
    # No queue is bound to it. (The name of a missing queue would not do: Redis keeps what is sent
    # to any name.)
    nobodys = Exchange("example-confirms-nobodys", type="direct")
    with Connection(url, transport_options={"confirm_publish": True}) as connection:
        queue(connection.default_channel).declare()
        producer = Producer(connection)

        # Twenty tasks share the connection: their confirms are waited for at the same time.
        def publish(number: int) -> None:
            producer.publish({"number": number}, routing_key=queue.name, timeout=10)

        tasks = [env.spawn(publish, number) for number in range(20)]
        for task in tasks:
            task.result(10)  # raises what publish has raised

        try:
            producer.publish({}, exchange=nobodys, declare=[nobodys], mandatory=True)
        except UnroutableError as error:
            print("returned:", error)
        else:
            raise SystemExit("nobody has told us that no queue took it")

        taken = queue(connection.default_channel).purge()
        queue(connection.default_channel).delete()
        nobodys(connection.default_channel).delete()
    assert taken == 20, taken
    print(taken, "messages were on the queue when publish had returned")


if __name__ == "__main__":
    main(*sys.argv[1:])
