"""Why a broker refuses, and what to do about it: the end of the text of its error.

RabbitMQ answers some requests that its newer kinds of queues cannot serve (quorum queues, streams)
by closing the whole connection (540, 541), which takes it away from all tasks that share it. What
can be told from the request, and from what the connection has declared, is refused here, before it
is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from greenkombu._amqp.errors import ArgumentError
from greenkombu._amqp.methods import BY_NAME
from greenkombu.exceptions import UnsupportedOperation

__all__ = [
    "SHARED_PREFETCH",
    "check_consumer_arguments",
    "check_kind",
    "check_supported",
    "is_other_declaration",
    "is_stream_delivery",
    "note_kind",
    "remedy_for",
]

_DECLARATIONS = frozenset(BY_NAME[name].signature for name in ("Exchange.declare", "Queue.declare"))

# Reply code, words of RabbitMQ's text (3.10), and what to do.  Where a broker uses other words
# its own text has to do.
_BY_WORDS = (
    (404, "is down", "; wait until its node is back; quorum queues live on several"),
    (404, "stopped by supervisor", "; wait until its node is back; quorum queues live on several"),
    (406, "invalid property", "; queues of this type are durable, shared and not auto-delete"),
    (406, "unsupported queue type", "; give x-queue-type classic, quorum or stream"),
    (406, "invalid arg", "; queues of this type do not know this argument: leave it out"),
    (
        406,
        "prefetch count is not set",
        "; a stream needs basic_qos(0, count, False) before its consumer, and no_ack=False",
    ),
    (
        540,
        "global qos",
        "; use basic_qos(0, count, False), whose count holds for each consumer: "
        "Consumer(prefetch_count=...), or qos without apply_global",
    ),
    (
        503,
        "unknown exchange type",
        "; it has direct, topic, fanout and headers, and those of its plugins: correct the type, or"
        " enable its plugin. The broker has ended the connection: reconnect",
    ),
    (540, "basic.get", "; start a consumer"),
    (540, "basic.reject", "; a stream keeps its messages: ack, and publish elsewhere what failed"),
    (540, "queue.purge", "; set x-max-age or x-max-length-bytes when you declare it, or delete it"),
)

# What RabbitMQ has never implemented, and answers by 540, the end of the connection
# (https://www.rabbitmq.com/docs/specification).
_NOT_IN_RABBITMQ = {
    "basic_recover(requeue=False)": "give requeue=True",
    "publish(immediate=True)": (
        "leave it out; expiration=0 drops a message that no consumer can take at once"
    ),
    "a prefetch_size": "give prefetch_count, and prefetch_size=0",
}

#: A consumer on a channel with a prefetch for all its consumers together; see `check_kind`.
SHARED_PREFETCH = "a consumer on a channel that has a prefetch for all its consumers together"

# What queues of these kinds do not know, and RabbitMQ 3.10 answers by 540 (seen).
_NOT_OF_KIND = {
    SHARED_PREFETCH: (
        ("quorum", "stream"),
        "use basic_qos(0, count, False), whose count holds for each consumer:"
        " Consumer(prefetch_count=...), or qos without apply_global; or a channel of its own",
    ),
    "basic_get": (("stream",), "start a consumer"),
    "queue_purge": (
        ("stream",),
        "set x-max-age or x-max-length-bytes when you declare it, or delete it",
    ),
}
_KINDS = ("quorum", "stream")

# Queues whose kind a connection keeps in mind; one more, and it begins anew.
_KNOWN_QUEUES = 4096

# As _BY_WORDS, where RabbitMQ's words do not matter.
_OF_CHANNEL = {
    403: "; check the user's permissions in this virtual host",
    404: "; declare it first, in this virtual host",
    405: "; it is exclusive to another connection",
}
_OF_CONNECTION = {
    320: "; it is being stopped, or an operator closed the connection: reconnect later",
    501: "; what we sent was torn or mixed up: please report this",
    505: "; what we sent came out of order: please report this",
    530: "; check what the last operation asked for",
}
_OTHER_DECLARATION = "; it exists with other settings: declare it with those, or delete it"


def remedy_for(code: int, text: str, signature: tuple[int, int], *, of_channel: bool) -> str:
    """Return what to do after Channel.close or Connection.close of the broker; "" if unknown.

    Args:
        code: the broker's reply code.
        text: the broker's reply text.
        signature: of the method at fault.
        of_channel: it closed the channel, not the connection.
    """
    for its_code, words, remedy in _BY_WORDS:
        if its_code == code and words in text:
            return remedy
    if of_channel and is_other_declaration(code, text, signature):
        return _OTHER_DECLARATION
    return (_OF_CHANNEL if of_channel else _OF_CONNECTION).get(code, "")


def is_other_declaration(code: int, text: str, signature: tuple[int, int]) -> bool:
    """Tell whether a declaration was refused because of the one that exists."""
    # "invalid" is one that the broker would refuse in any case.
    return code == 406 and signature in _DECLARATIONS and "invalid" not in text


def check_consumer_arguments(arguments: Mapping[str, Any] | None) -> None:
    """Refuse a place in a stream that RabbitMQ answers by 541, the end of the connection.

    Raises:
        ArgumentError: x-stream-offset is not of the types and words that there are
            (https://www.rabbitmq.com/docs/streams#consuming).
    """
    if not arguments or "x-stream-offset" not in arguments:
        return
    offset = arguments["x-stream-offset"]
    if isinstance(offset, str):
        good = offset in ("first", "last", "next") or offset[:1].isdigit()
    else:
        good = isinstance(offset, (int, datetime)) and not isinstance(offset, bool)
    if not good:
        raise ArgumentError(
            f"x-stream-offset={offset!r}: give 'first', 'last', 'next', a number, a datetime, or"
            " an interval such as '1h'",
            BY_NAME["Basic.consume"].signature,
        )


def check_supported(connection: Any, operation: str) -> None:
    """Refuse an operation of `_NOT_IN_RABBITMQ` if the broker is one.

    Raises:
        UnsupportedOperation: it is; the text says what to do instead.
    """
    if connection.server_properties.get("product") == "RabbitMQ":
        raise UnsupportedOperation(
            f"RabbitMQ does not implement {operation} and would end the connection to broker"
            f" {connection.broker} (540): {_NOT_IN_RABBITMQ[operation]}"
        )


def note_kind(kinds: dict[str, str], queue: str, arguments: Mapping[str, Any] | None) -> None:
    """Keep in mind of what kind a queue is that was declared, or is gone (no arguments)."""
    kind = arguments.get("x-queue-type") if arguments else None
    if kind not in _KINDS:
        kinds.pop(queue, None)
        return
    if len(kinds) >= _KNOWN_QUEUES:
        kinds.clear()
    kinds[queue] = kind


def check_kind(connection: Any, queue: str, operation: str) -> None:
    """Refuse an operation of `_NOT_OF_KIND` on a queue that the connection has declared as such.

    Raises:
        UnsupportedOperation: the queue does not know it; the text says what to do instead.
    """
    kind = connection.kinds.get(queue) if connection.kinds else None
    if kind is None:
        return
    kinds, remedy = _NOT_OF_KIND[operation]
    if kind in kinds:
        raise UnsupportedOperation(
            f"queue {queue!r} is a {kind} queue, and these do not know {operation};"
            f" broker {connection.broker} would end the connection (540): {remedy}"
        )


def is_stream_delivery(message: Any) -> bool:
    """Tell whether a delivery comes from a stream, which cannot be given back."""
    try:
        return "x-stream-offset" in (message.headers or ())
    except Exception:  # its header cannot be decoded; the consumer hears of that
        return False
