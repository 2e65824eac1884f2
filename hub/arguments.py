"""Checks of what callers give: seconds, functions, bytes.

nan is worse than a wrong type: it compares as neither more nor less than anything, so it passes
every bound, and what a green library makes of it is anything from no wait to a frozen process.
"""

from __future__ import annotations

import math

from hub.errors import BadArgumentError

__all__ = ["as_bytes", "check_callable", "check_seconds", "has_time"]


def check_seconds(value: object, what: str) -> None:
    """Raise BadArgumentError unless `value` is a number that a clock can count, and not nan."""
    try:
        if isinstance(value, (int, float)) and not math.isnan(value):
            return
    except OverflowError:  # an int beyond all floats
        raise BadArgumentError(
            f"{what} needs a number of seconds, not one of {len(hex(value)) - 2} hexadecimal "  # type: ignore[arg-type]
            "digits; math.inf stands for ever"
        ) from None
    raise BadArgumentError(f"{what} needs a number of seconds, not {value!r}")


def has_time(timeout: float) -> bool:
    """Tell whether a wait of `timeout` seconds is one at all: False for zero and less.

    Raises:
        BadArgumentError: nan, or no number.
    """
    try:
        if timeout > 0:
            return True
    except TypeError:
        pass
    check_seconds(timeout, "a wait")
    return False


def check_callable(value: object, what: str, optional: bool = False) -> None:
    """Raise BadArgumentError unless `value` can be called, or is None and `optional`."""
    if not (callable(value) or (optional and value is None)):
        raise BadArgumentError(f"{what}={value!r} cannot be called: give a function")


def as_bytes(data: object) -> bytes:
    """Return a copy of what a buffer contains now, or raise BadArgumentError for anything else."""
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]  # bytes(5) would be five zeros
    except TypeError:
        raise BadArgumentError(
            f"a stream sends bytes, not {type(data).__name__}: encode text before, "
            "for instance by .encode()"
        ) from None
