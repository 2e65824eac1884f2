"""Arguments that no transport can carry: refused before anything is sent, and alike on all.

What a transport refuses beyond that (AMQP: names of more than 255 octets) it says itself, with an
error that is an `ArgumentError` as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

from greenkombu.exceptions import ArgumentError

__all__ = [
    "callbacks",
    "check_text",
    "duration",
    "entities",
    "message_count",
    "message_headers",
    "plain_name",
    "plain_text",
    "priority_level",
    "ttl_milliseconds",
]

# AMQP 0-9-1 stores a priority in an octet.
HIGHEST_PRIORITY = 255

# RabbitMQ refuses a longer one, 49 days, and closes the channel (rabbit_basic: MAX_EXPIRY_TIMER).
_LONGEST_TTL_MS = 2**32 - 1


def plain_text(argument: str, value: Any) -> str:
    """Return *value* as text; None is ''.

    Raises:
        ArgumentError: it is not text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        # As py-amqp takes them.
        return bytes(value).decode("utf-8", "surrogateescape")
    raise ArgumentError(f"{argument} must be a string, not {value!r:.100}")


def plain_name(argument: str, value: Any) -> str:
    """Return the name of a queue or exchange as text; None is ''.

    Raises:
        ArgumentError: it is not text, or not UTF-8.
    """
    text = plain_text(argument, value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as exc:
            raise _not_utf8(argument, value) from exc
    return text


def check_text(where: str, text: str) -> None:
    """Refuse text of a message that has no bytes.

    Foreign bytes, which a received message may hold as surrogate escapes, can be sent again.

    Raises:
        ArgumentError: it has other surrogates.
    """
    if not text.isascii():
        try:
            text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError as exc:
            raise _not_utf8(where, text) from exc


def _not_utf8(where: str, value: Any) -> ArgumentError:
    return ArgumentError(f"{where} cannot be sent as UTF-8: {value!r:.100}")


def priority_level(value: Any) -> int | None:
    """Return a priority as a number.

    Raises:
        ArgumentError: it is not a whole number from 0 to 255.
    """
    if value is None:
        return None
    try:
        level = int(value)
    except (TypeError, ValueError, OverflowError):
        level = -1
    if not 0 <= level <= HIGHEST_PRIORITY:
        raise ArgumentError(
            f"priority must be a whole number from 0 to {HIGHEST_PRIORITY}, not {value!r:.100}"
        )
    return level


def message_headers(value: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return a copy of the application headers.

    Raises:
        ArgumentError: it is not a mapping.
    """
    try:
        return dict(value)
    except (TypeError, ValueError):
        raise ArgumentError(
            f"headers must be a mapping of names to values, not {value!r:.100}"
        ) from None


def ttl_milliseconds(seconds: Any) -> str:
    """Return an expiration as AMQP carries it: text, in milliseconds.

    Raises:
        ArgumentError: *seconds* is not a number, less than 0, or more than brokers take.
    """
    # RabbitMQ, "per-message TTL".
    try:
        milliseconds = int(float(seconds) * 1000)
    except (TypeError, ValueError, OverflowError):
        milliseconds = -1
    if milliseconds < 0:
        raise ArgumentError(
            f"expiration must be a number of seconds, 0 or more, not {seconds!r:.100}"
        )
    if milliseconds > _LONGEST_TTL_MS:
        raise ArgumentError(
            f"expiration must be at most {_LONGEST_TTL_MS // 1000} seconds (49 days), not"
            f" {seconds!r:.100}; leave it out for a message that does not expire"
        )
    return str(milliseconds)


def duration(argument: str, seconds: Any, past: bool = False) -> float | None:
    """Return a bound in seconds; None is none.

    Args:
        past: it may be less than 0, as what is left of a time that is over.

    Raises:
        ArgumentError: it is not a number, or less than 0.
    """
    if seconds is None:
        return None
    try:
        # As text where it comes from a configuration file.
        value = seconds if isinstance(seconds, (int, float)) else float(seconds)
        good = value >= 0 or (past and value < 0)
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ArgumentError(
            f"{argument} must be a number of seconds, 0 or more, not {seconds!r:.100}"
        )
    return value


def entities(argument: str, given: Any) -> tuple[Any, ...]:
    """Return the entities of a list.

    Raises:
        ArgumentError: it is none, or has something else in it.
    """
    several = tuple(given) if isinstance(given, Iterable) else (None,)
    if not all(hasattr(each, "declare") for each in several):
        raise ArgumentError(
            f"{argument} must be a list of exchanges and queues, not {given!r:.100}"
        )
    return several


def callbacks(argument: str, given: Any) -> list[Any]:
    """Return a list of functions.

    Raises:
        ArgumentError: it is none, or has something else in it.
    """
    several = list(given) if isinstance(given, Iterable) else [None]
    if not all(callable(each) for each in several):
        raise ArgumentError(f"{argument} must be a list of functions, not {given!r:.100}")
    return several


def message_count(argument: str, value: Any) -> int:
    """Return a number of messages; None is 0.

    Raises:
        ArgumentError: it is not a whole number, or less than 0.
    """
    try:
        count = 0 if value is None else operator.index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise ArgumentError(
            f"{argument} must be a whole number of messages, 0 (no bound) or more, not"
            f" {value!r:.100}"
        )
    return count
