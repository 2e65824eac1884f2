"""Compare two transcripts of `tests.differential.programs`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["differences"]

_MISSING = "<absent>"


def differences(theirs: Any, ours: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (path, Kombu's value, ours) wherever two transcripts differ.

    An error of ours may be of a class below Kombu's: whoever catches theirs catches ours.
    """
    if _is_error(theirs) and _is_error(ours):
        if theirs["error"][0] not in ours["error"]:
            yield f"{path}/error", theirs["error"], ours["error"]
        for name in theirs:
            if name != "error" and theirs[name] != ours.get(name):
                yield f"{path}/{name}", theirs[name], ours.get(name)
    elif _is_error(theirs) or _is_error(ours):
        yield path, _short(theirs), _short(ours)
    elif isinstance(theirs, dict) and isinstance(ours, dict):
        for name in sorted({*theirs, *ours}):
            yield from differences(
                theirs.get(name, _MISSING), ours.get(name, _MISSING), f"{path}/{name}"
            )
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, (left, right) in enumerate(zip(theirs, ours, strict=True)):
            yield from differences(left, right, f"{path}/{index}")
    elif theirs != ours:
        yield path, theirs, ours


def _short(value: Any) -> Any:
    return f"raises {value['error'][0]}" if _is_error(value) else value


def _is_error(value: Any) -> bool:
    return isinstance(value, dict) and "error" in value
