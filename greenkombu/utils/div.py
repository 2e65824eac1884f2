"""Last resorts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TextIO

__all__ = ["emergency_dump_state", "say"]


def say(m: Any, *s: Any) -> None:
    """Write a line to standard error.

    Args:
        m: the line, with %-formats for s.
        *s: arguments.
    """
    sys.stderr.write(f"{str(m) % s if s else m}\n")


def emergency_dump_state(
    state: Any,
    open_file: Callable[..., Any] = open,
    dump: Callable[..., Any] | None = None,
    stderr: TextIO | None = None,
) -> str:
    """Write state to a new temporary file, to be looked at by hand.

    Used for messages that could not be given back to the broker at shutdown.

    Args:
        state: what to write; as a pickle, or pretty-printed if it cannot be pickled.
        open_file: opens the file, called with (path, mode).
        dump: writes state to the file, called with (state, file, protocol=0).
        stderr: where to say the file's name; standard error if None.

    Returns:
        The path of the file, which only this user can read.
    """
    import pickle
    from pprint import pformat
    from tempfile import mkstemp

    stream = sys.stderr if stderr is None else stderr
    descriptor, path = mkstemp(prefix="greenkombu-", suffix=".dump")
    with open(descriptor, "wb"):
        pass  # it stays, with its permissions; open_file opens it again
    stream.write(f"EMERGENCY DUMP STATE TO FILE -> {path} <-\n")
    try:
        with open_file(path, "wb") as file:
            (dump or pickle.dump)(state, file, protocol=0)
    except Exception as exc:
        stream.write(f"Cannot pickle state: {exc!r}. Fallback to pformat.\n")
        with open_file(path, "wb") as file:
            file.write(pformat(state).encode("utf-8", "backslashreplace"))
    return path
