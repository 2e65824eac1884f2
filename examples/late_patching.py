"""Patch after greenkombu was imported.

    python examples/late_patching.py

Importing greenkombu imports no socket, and what runs below is chosen when it is first used. So the
order of imports does not matter, as long as the program patches before its first connection.
"""

from __future__ import annotations

import sys

import hub
from greenkombu import Connection, Consumer, Producer, Queue


def patch() -> str:
    """Patch with gevent, if it is there and nothing has patched before us."""
    if hub.detect_environment() == "default" and "eventlet" not in sys.modules:
        try:
            from gevent import monkey
        except ImportError:
            return "default"
        monkey.patch_all()
        return "gevent"
    return hub.detect_environment()


def main() -> None:
    expected = patch()
    env = hub.get_environment()
    assert env.name == expected, (env.name, expected)

    ticks = [0]
    received = []

    def tick() -> None:
        while not received:
            ticks[0] += 1
            env.sleep(0.01)

    queue = Queue("example-late")

    def on_message(body, message) -> None:
        received.append(body)
        message.ack()

    def publish_later() -> None:
        env.sleep(0.2)
        with Connection("memory://") as connection:
            Producer(connection).publish("hello", routing_key=queue.name)

    with Connection("memory://") as connection:
        with Consumer(connection, queues=[queue], callbacks=[on_message]):
            tasks = [env.spawn(tick), env.spawn(publish_later)]
            connection.drain_events(timeout=10)  # the other tasks run meanwhile
        for task in tasks:
            task.join(5)
        queue(connection.default_channel).delete()
    assert received == ["hello"]
    assert ticks[0] > 3, ticks
    print(f"environment {env.name}: another task ticked {ticks[0]} times while this one waited")


if __name__ == "__main__":
    main()
