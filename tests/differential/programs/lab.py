"""What a program gets, and how what it sees becomes JSON."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["PROGRAMS", "Lab", "program"]

Program = Callable[["Lab"], object]

#: Name -> (program, the transports it is for).
PROGRAMS: dict[str, tuple[Program, tuple[str, ...]]] = {}


def program(*transports: str) -> Callable[[Program], Program]:
    """Register a program for transports; for all of them by default."""

    def register(function: Program) -> Program:
        name = function.__name__
        assert name not in PROGRAMS, name
        PROGRAMS[name] = function, transports or ("memory", "amqp")
        return function

    return register


class Lab:
    """One program's view of the package under test and of its broker.

    Args:
        package: ``"kombu"`` or ``"greenkombu"``.
        url: of an empty broker.
        name: the program's name; part of the names of its queues, so that programs cannot meet.
    """

    def __init__(self, package: str, url: str, name: str) -> None:
        self.package = package
        self.k: Any = importlib.import_module(package)
        self.url = url
        self.name = name
        self.connection: Any = self.k.Connection(url)
        self.seen: list[Any] = []

    def module(self, name: str) -> Any:
        """Import a module of the package under test."""
        return importlib.import_module(f"{self.package}.{name}")

    def note(self, *values: object) -> None:
        """Write values into the transcript."""
        self.seen.append([plain(value) for value in values])

    def attempt(self, label: object, function: Callable[[], object]) -> None:
        """Write what a call returns, or the error that an except clause would see."""
        try:
            self.seen.append([plain(label), plain(function())])
        except Exception as exc:
            self.seen.append([plain(label), self.error(exc)])

    def error(self, exc: BaseException) -> dict[str, Any]:
        """Return all that except clauses go by, and the reply code."""
        return {
            "error": [base.__name__ for base in type(exc).__mro__],
            "is_connection_error": isinstance(exc, self.connection.connection_errors),
            "is_channel_error": isinstance(exc, self.connection.channel_errors),
            "reply_code": getattr(exc, "reply_code", None),
        }

    def queue(self, suffix: str = "", **options: Any) -> Any:
        """Make a declared queue on an exchange of its own, bound to the default channel."""
        name = f"{self.name}{suffix}"
        exchange = self.k.Exchange(f"{name}-exchange", "direct")
        queue = self.k.Queue(name, exchange, routing_key=f"{name}-key", **options)
        bound = queue(self.connection.default_channel)
        bound.declare()
        return bound

    def trip(self, body: object, accept: object = None, **options: Any) -> Any:
        """Publish to a queue, take the message from it."""
        queue = self.queue()
        with self.connection.Producer() as producer:
            producer.publish(
                body, exchange=queue.exchange, routing_key=queue.routing_key, **options
            )
        return fetch(queue, accept=accept, no_ack=True)

    @contextmanager
    def consuming(self, queue: Any, **options: Any) -> Iterator[Any]:
        """Consume on a channel of its own."""
        with (
            self.connection.channel() as channel,
            self.k.Consumer(channel, queue, **options) as consumer,
        ):
            yield consumer

    def drain(self) -> None:
        """Run one event."""
        self.connection.drain_events(timeout=5)

    def drain_until(self, seen: list[Any], count: int) -> None:
        """Run events until `seen` holds `count` values; Kombu runs some in other calls."""
        while len(seen) < count:
            self.connection.drain_events(timeout=5)


def fetch(queue: Any, **options: Any) -> Any:
    """Get a message that was published just now, which a broker may not have routed yet."""
    import time

    for _ in range(200):
        message = queue.get(**options)
        if message is not None:
            return message
        time.sleep(0.005)
    return None


# A broker routes publishes while it is asked already, so its count varies as tags do.
_VARYING = ("consumer_tag", "delivery_tag", "message_count")


def show(message: Any, payload: bool = True) -> Any:
    """Return all that a program can see of a message, except values that are random."""
    if message is None:
        return None
    shown: dict[str, Any] = {
        "body": message.body,
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": message.headers,
        "properties": {k: v for k, v in message.properties.items() if k != "delivery_tag"},
        "delivery_info": {
            key: type(value).__name__ if key in _VARYING else value
            for key, value in message.delivery_info.items()
        },
        "acknowledged": message.acknowledged,
        "tag": type(message.delivery_tag).__name__,
    }
    if payload:
        try:
            shown["payload"] = [type(message.payload).__name__, repr(message.payload)]
        except Exception as exc:
            shown["payload"] = {"error": [base.__name__ for base in type(exc).__mro__]}
    return plain(shown)


def plain(value: Any) -> Any:
    """Return a value as JSON has it; types that JSON lacks are written out."""
    if value is None or isinstance(value, (bool, int, str)):
        return value if not isinstance(value, str) else _mask(value)
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(each) for each in value)
    if isinstance(value, type):
        return f"class {value.__name__}"
    return f"object {type(value).__name__}"


def _mask(text: str) -> str:
    """Hide a text that is a random identifier."""
    try:
        uuid.UUID(text)
    except ValueError:
        return text
    return "<uuid>"
