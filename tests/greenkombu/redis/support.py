"""Wires for tests, and servers that do as they are told."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from greenkombu import Connection, Consumer, Producer, Queue
from greenkombu.transport.redis._options import Settings
from greenkombu.transport.redis._wire import Wire
from greenkombu.utils.private_redis import PrivateRedis
from hub.environment import get_environment
from tests.support.tasks import LONG

__all__ = [
    "GREETING",
    "Database",
    "Wires",
    "consume",
    "drain_until",
    "nothing_comes",
    "publish",
    "scripted",
    "settings_for",
]

#: What a server answers to HELLO and PING of a login.
GREETING = b"%2\r\n$6\r\nserver\r\n$5\r\nredis\r\n$5\r\nproto\r\n:3\r\n+PONG\r\n"


def settings_for(server: PrivateRedis | str, **changed: Any) -> Settings:
    """Return settings for a private server, or for "host:port"."""
    if isinstance(server, str):
        host, _, port = server.rpartition(":")
        return Settings((host, int(port)), **changed)
    return Settings(("127.0.0.1", server.port), password=server.password, **changed)


class Wires:
    """Makes wires and ends them after the test.

    Attributes:
        pushes: what the server said unasked, of all of them.
        lost: the errors of those that ended.
    """

    def __init__(self) -> None:
        self.pushes: list[Any] = []
        self.lost: list[BaseException] = []
        self._made: list[Wire] = []

    def __call__(
        self, server: PrivateRedis | str | Settings, *, pubsub: bool = False, **changed: Any
    ) -> Wire:
        timeout = changed.pop("timeout", LONG)
        settings = server if isinstance(server, Settings) else settings_for(server, **changed)
        wire = Wire.connect(
            settings,
            on_push=self.pushes.append,
            on_lost=self.lost.append,
            timeout=timeout,
            pubsub=pubsub,
        )
        self._made.append(wire)
        return wire

    def close(self) -> None:
        for wire in self._made:
            wire.abort()


class Database:
    """A database of a server, and what a test does with it.

    Args:
        server: a running one.
        number: of the database; it is emptied now and at the end.
    """

    def __init__(self, server: PrivateRedis, number: int = 7) -> None:
        self.server = server
        self.number = number
        self._opened: list[Connection] = []
        self.command("FLUSHDB")

    @property
    def url(self) -> str:
        """The URL of the database."""
        return self.server.database_url(self.number)

    def command(self, *words: object) -> Any:
        """Send a command by another client than the one under test."""
        return self.server.command(*words, database=self.number)

    def keys(self, pattern: str = "*") -> list[str]:
        """Return the names of the keys that a program sees, in order."""
        found = [key.decode() for key in self.command("KEYS", pattern)]
        return sorted(key for key in found if "_greenkombu." not in key and ":fleet" not in key)

    def connect(self, url: str | None = None, transport: Any = None, **options: Any) -> Connection:
        """Return a connection that is closed after the test; options are transport_options."""
        made = Connection(url or self.url, transport=transport, transport_options=options)
        self._opened.append(made)
        return made

    def close(self) -> None:
        """Close the connections and empty the database."""
        for connection in self._opened:
            connection.close()
        self.command("FLUSHDB")


def publish(connection: Connection, queue: str, *bodies: Any, **properties: Any) -> None:
    """Send messages to a queue by its name."""
    producer = Producer(connection)
    for body in bodies:
        producer.publish(body, routing_key=queue, **properties)


def consume(
    connection: Connection | Any, *queues: Queue | str, prefetch: int = 0, **options: Any
) -> list[Any]:
    """Consume and acknowledge; return a list into which the bodies come, when somebody drains."""
    channel = connection.channel() if isinstance(connection, Connection) else connection
    got: list[Any] = []

    def take(body: Any, message: Any) -> None:
        got.append(body)
        message.ack()

    if prefetch:
        channel.basic_qos(0, prefetch, False)
    made = [Queue(each) if isinstance(each, str) else each for each in queues]
    Consumer(channel, made, callbacks=[take], **options).consume()
    return got


def drain_until(connection: Connection, condition: Callable[[], object]) -> None:
    """Drain until something holds; AssertionError if that takes too long."""
    deadline = monotonic() + LONG
    while not condition():
        assert monotonic() < deadline, f"{condition} did not come true in {LONG} s"
        with contextlib.suppress(TimeoutError):
            connection.drain_events(timeout=0.1)


def nothing_comes(connection: Connection, seconds: float = 0.2) -> None:
    """Make sure that no event comes for a while."""
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=seconds)


@contextlib.contextmanager
def scripted(script: Callable[[socket.socket], object]) -> Iterator[str]:
    """Run *script* for each connection that comes; yield "host:port".

    The script has the socket; when it returns, the connection ends. A client that ends it first
    is no failure; what else the script raises is raised at the end of the block.
    """
    environment = get_environment()
    listener = socket.create_server(("127.0.0.1", 0))
    tasks: list[Any] = []
    peers: list[socket.socket] = []
    stopped: list[bool] = []

    def talk(sock: socket.socket) -> None:
        try:
            script(sock)
        except OSError:
            pass  # the client has gone, or the end of the block shut the socket down under a read
        finally:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def accept() -> None:
        # In short waits: nothing wakes an accept in all three environments.
        listener.settimeout(0.05)
        while not stopped:
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            sock.settimeout(None)
            peers.append(sock)
            tasks.append(environment.spawn(talk, sock))

    acceptor = environment.spawn(accept)
    host, port = listener.getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        stopped.append(True)
        acceptor.join(LONG)
        listener.close()
        for sock in peers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for task in tasks:
            task.join(LONG)
    for task in tasks:
        task.result(LONG)
