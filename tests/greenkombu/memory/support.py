"""What the tests of the memory transport share."""

from __future__ import annotations

import time
from typing import Any

from hub.environment import Environment

__all__ = ["bodies", "declare", "put", "wait_for"]


def declare(channel: Any, name: str = "q", **arguments: Any) -> None:
    prepared = {f"x-{key.replace('_', '-')}": value for key, value in arguments.items()}
    channel.queue_declare(name, arguments=prepared)


def put(channel: Any, body: Any = b"body", queue: str = "q", exchange: str = "", **kw: Any) -> None:
    channel.basic_publish(channel.prepare_message(body, **kw), exchange, queue)


def bodies(channel: Any, queue: str = "q") -> list[bytes]:
    found = []
    while (message := channel.basic_get(queue, no_ack=True)) is not None:
        found.append(message.body)
    return found


def wait_for(condition: Any, env: Environment, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        env.sleep(0.005)
