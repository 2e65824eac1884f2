"""Unique ids."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID, uuid4

__all__ = ["uuid"]


def uuid(_uuid: Callable[[], UUID] = uuid4) -> str:
    """Return a new random id as a string of 36 characters.

    Args:
        _uuid: what makes the UUID; uuid.uuid4 reads the kernel's random source, so parent and
            child never get the same id after a fork.

    Returns:
        The usual text form (RFC 9562, section 4).
    """
    return str(_uuid())
