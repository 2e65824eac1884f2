"""The rules that the arguments of a queue give it.

RabbitMQ's names and meanings (https://www.rabbitmq.com/docs/queues#optional-arguments). Arguments
that are not known here are kept with the queue and change nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

__all__ = ["OVERFLOW_MODES", "QueuePolicy", "parse_milliseconds", "precondition_failed"]

#: What a full queue does: drop its oldest message, refuse the new one, or refuse it and
#: dead-letter it.
OVERFLOW_MODES = ("drop-head", "reject-publish", "reject-publish-dlx")

#: RabbitMQ stores a priority in one byte.
HIGHEST_PRIORITY = 255


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The limits of one queue, and where what it drops goes.

    Attributes:
        ttl_ms: how long a message may wait.
        expires_ms: how long the queue may be without a consumer, a get or a declaration.
        max_length, max_bytes: bounds of what waits; bytes count bodies as they are stored.
        overflow: one of `OVERFLOW_MODES`.
        dead_letter_exchange: where dropped messages go; None drops them, "" is the nameless one.
        dead_letter_routing_key: None keeps their own.
        max_priority: higher priorities count as this one; None leaves it to the channel.

    None is no limit.
    """

    ttl_ms: int | None = None
    expires_ms: int | None = None
    max_length: int | None = None
    max_bytes: int | None = None
    overflow: str = "drop-head"
    dead_letter_exchange: str | None = None
    dead_letter_routing_key: str | None = None
    max_priority: int | None = None

    @classmethod
    def parse(cls, queue: str, arguments: Mapping[str, Any] | None) -> QueuePolicy:
        """Read the arguments of queue.declare.

        Raises:
            PreconditionFailed: (amqp's, a channel error, 406) an argument has a value that it
                cannot have; the message names queue, argument and value.
        """
        if not arguments:
            return PLAIN
        read = _Reader(queue, arguments)
        overflow = read.text("x-overflow")
        if overflow is not None and overflow not in OVERFLOW_MODES:
            read.refuse("x-overflow", f"use one of {', '.join(OVERFLOW_MODES)}")
        exchange = read.text("x-dead-letter-exchange")
        routing_key = read.text("x-dead-letter-routing-key")
        if routing_key is not None and exchange is None:
            read.refuse("x-dead-letter-routing-key", "it needs x-dead-letter-exchange")
        policy = cls(
            ttl_ms=read.number("x-message-ttl"),
            expires_ms=read.number("x-expires", least=1),
            max_length=read.number("x-max-length"),
            max_bytes=read.number("x-max-length-bytes"),
            overflow=overflow or "drop-head",
            dead_letter_exchange=exchange,
            dead_letter_routing_key=routing_key,
            max_priority=read.number("x-max-priority", most=HIGHEST_PRIORITY),
        )
        return PLAIN if policy == PLAIN else policy

    def needs(self) -> list[tuple[str, str]]:
        """Return (feature of `Transport.implements`, argument) for each rule that is set."""
        rules = (
            ("ttl", "x-message-ttl", self.ttl_ms),
            ("queue_expiry", "x-expires", self.expires_ms),
            ("max_length", "x-max-length", self.max_length),
            ("max_length", "x-max-length-bytes", self.max_bytes),
            ("dead_letter", "x-dead-letter-exchange", self.dead_letter_exchange),
            ("priorities", "x-max-priority", self.max_priority),
        )
        return [(feature, argument) for feature, argument, value in rules if value is not None]


#: A queue without rules; there is one such object.
PLAIN = QueuePolicy()


class _Reader:
    """Arguments by name, checked."""

    def __init__(self, queue: str, arguments: Mapping[str, Any]) -> None:
        self.queue = queue
        self.arguments = arguments

    def text(self, name: str) -> str | None:
        value = self.arguments.get(name)
        if value is not None and not isinstance(value, str):
            self.refuse(name, "it must be a string")
        return value

    def number(self, name: str, least: int = 0, most: int | None = None) -> int | None:
        value = self.arguments.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.refuse(name, "it must be an integer")
        if value < least or (most is not None and value > most):
            self.refuse(name, f"it must be {least} or more" + (f", up to {most}" if most else ""))
        number: int = value
        return number

    def refuse(self, name: str, reason: str) -> NoReturn:
        raise precondition_failed(
            f"invalid argument {name!r} of queue {self.queue!r}: {self.arguments[name]!r}; "
            f"{reason}",
            (50, 10),
            "Channel.queue_declare",
        )


def precondition_failed(text: str, method_sig: tuple[int, int], method_name: str) -> BaseException:
    """Make AMQP's error 406."""
    from amqp.exceptions import PreconditionFailed

    error: BaseException = PreconditionFailed(
        f"PRECONDITION_FAILED - {text}", method_sig, method_name, "406"
    )
    return error


def parse_milliseconds(value: Any) -> int:
    """Read the message property `expiration`, which is text.

    Raises:
        PreconditionFailed: (amqp's, 406) it is not a number of milliseconds, 0 or more.
    """
    try:
        milliseconds = int(value)
    except (TypeError, ValueError):
        milliseconds = -1
    if milliseconds < 0:
        raise precondition_failed(
            f"invalid expiration {value!r} of a message; it must be a whole number of milliseconds",
            (60, 40),
            "Channel.basic_publish",
        )
    return milliseconds
