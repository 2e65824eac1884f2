"""Time conversions."""

from __future__ import annotations

__all__ = ["maybe_s_to_ms"]


def maybe_s_to_ms(v: float | None) -> int | None:
    """Convert v from seconds to whole milliseconds, cut off; None stays None."""
    return None if v is None else int(float(v) * 1000.0)
