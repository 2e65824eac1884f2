"""Messages as the server keeps them: JSON, as Kombu writes it."""

from __future__ import annotations

from typing import Any

from greenkombu.exceptions import EncodeError
from greenkombu.utils import json

__all__ = ["dumps", "loads"]


def dumps(message: Any) -> bytes:
    """Write a message.

    Raises:
        EncodeError: it holds what JSON cannot express.
    """
    try:
        return json.dumps(message).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        raise EncodeError(
            f"the message cannot be written as JSON, which Redis keeps: {exc}; headers and"
            " properties are text, numbers, lists and dictionaries"
        ) from exc


def loads(raw: bytes) -> Any:
    """Read a message; what is not JSON stays as it is, for `on_decode_error`."""
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw
