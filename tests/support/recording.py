"""A channel that writes down what it is asked, for tests of what is sent to a transport."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from greenkombu.message import Message

__all__ = ["RecordingChannel"]


class RecordingChannel:
    """Answers every AMQP method; `calls` has (name, arguments by name or position) in order.

    Args:
        failures: method name -> error that it raises instead of answering.
    """

    def __init__(self, **failures: BaseException) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.failures = failures
        self.closed = False
        self.channel_id = 7
        self.connection: Any = None
        self.no_ack_consumers: set[str] = set()
        self.callbacks: dict[str, Callable[[Any], Any]] = {}
        self.ready: list[Message] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("message_to_python", "events", "has_consumer"):
            raise AttributeError(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, {**dict(enumerate(args)), **kwargs}))
            if name in self.failures:
                raise self.failures[name]
            return self._answer(name, args, kwargs)

        return method

    def _answer(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "queue_declare":
            return kwargs["queue"] or "amq.gen-1", 3, 0
        if name == "queue_purge":
            return 2
        if name == "prepare_queue_arguments":
            arguments = dict(args[0])
            arguments.update({f"x-{key}": value for key, value in kwargs.items()})
            return arguments
        if name == "prepare_message":
            names = (
                "body",
                "priority",
                "content_type",
                "content_encoding",
                "headers",
                "properties",
            )
            return {**dict(zip(names, args, strict=False)), **kwargs}
        if name == "basic_consume":
            self.callbacks[kwargs["queue"]] = kwargs["callback"]
        if name == "basic_get":
            return self.ready.pop(0) if self.ready else None
        return None

    def names(self) -> list[str]:
        """The methods called, in order."""
        return [name for name, _ in self.calls]

    def called(self, name: str) -> list[dict[Any, Any]]:
        """The arguments of each call of *name*."""
        return [arguments for called, arguments in self.calls if called == name]
