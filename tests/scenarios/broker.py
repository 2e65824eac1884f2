"""What a scenario sees of its broker without the code under test: through the amqp package."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import amqp

from hub.environment import get_environment

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ

__all__ = ["QUICK", "Broker", "frames_below", "pool_of", "took"]

#: Options of a client whose failures tests do not have to wait for.
QUICK: dict[str, Any] = {"rpc_timeout": 10, "confirm_timeout": 10, "close_timeout": 0.5}


class Broker:
    """Queues of one test on a server that others use too.

    Args:
        server: a running server.
    """

    def __init__(self, server: PrivateRabbitMQ) -> None:
        self.server = server
        self.address = ("127.0.0.1", server.port)
        self._made: list[str] = []

    @property
    def url(self) -> str:
        """The URL of the default virtual host."""
        return self.server.url

    def queue(self, *, declare: bool = True, **options: Any) -> str:
        """Return the name of a new queue, removed after the test."""
        name = f"scenario-{os.urandom(6).hex()}"
        self._made.append(name)
        if declare:
            with self._channel() as channel:
                channel.queue_declare(name, **{"auto_delete": False, **options})
        return name

    def put(self, queue: str, bodies: Iterable[bytes | str], **properties: Any) -> None:
        """Publish to a queue and wait until the queue has all of it."""
        with self._channel() as channel:
            channel.tx_select()
            for body in bodies:
                channel.basic_publish(amqp.Message(body, **properties), "", queue)
            channel.tx_commit()

    def depth(self, queue: str) -> int:
        """Return how many messages are ready in a queue."""
        with self._channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)

    def has(self, queue: str, count: int) -> bool:
        """Whether a queue comes to have so many ready messages, and keeps to it."""
        deadline = time.monotonic() + 20
        while self.depth(queue) != count and time.monotonic() < deadline:
            get_environment().sleep(0.05)
        return self.depth(queue) == count

    def consumers(self, queue: str) -> int:
        """Return how many consumers a queue has."""
        with self._channel() as channel:
            return int(channel.queue_declare(queue, passive=True).consumer_count)

    def delete(self, queue: str) -> None:
        """Delete a queue with what is in it."""
        with self._channel() as channel:
            channel.queue_delete(queue)

    def take(self, queue: str, count: int, timeout: float = 20.0) -> list[Any]:
        """Take and ack `count` messages, as they come; fewer if the time is over."""
        taken: list[Any] = []
        deadline = time.monotonic() + timeout
        with self._channel() as channel:
            while len(taken) < count and time.monotonic() < deadline:
                message = channel.basic_get(queue)
                if message is None:
                    get_environment().sleep(0.02)
                    continue
                channel.basic_ack(message.delivery_tag)
                taken.append(message)
        return taken

    def bodies(self, queue: str, count: int, timeout: float = 20.0) -> list[Any]:
        """Return the bodies of `take`."""
        return [message.body for message in self.take(queue, count, timeout)]

    def clean(self) -> None:
        """Remove the queues of the test."""
        if self._made and self.server.running:
            with self._channel() as channel:
                for name in self._made:
                    channel.queue_delete(name)
        self._made.clear()

    @contextlib.contextmanager
    def _channel(self) -> Iterator[Any]:
        connection = amqp.Connection(
            f"127.0.0.1:{self.server.port}", "guest", "guest", connect_timeout=30, read_timeout=60
        )
        connection.connect()
        try:
            yield connection.channel()
        finally:
            with contextlib.suppress(Exception):
                connection.close()


class took:
    """Measure a block: `with took() as time_of: ...`, then `time_of.seconds`."""

    seconds = 0.0

    def __enter__(self) -> took:
        self._started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._started


def frames_below() -> int:
    """Return how deep the calling task's stack is."""
    import sys

    depth = 0
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        depth += 1
    return depth


@contextlib.contextmanager
def pool_of(connection: Any, limit: int) -> Iterator[Any]:
    """Make a pool of connections, and close it at the end."""
    pool = connection.Pool(limit)
    try:
        yield pool
    finally:
        pool.force_close_all()
