"""Kombu as a black box, in an interpreter of its own.

``GREENKOMBU_KOMBU_PYTHON`` names an interpreter that has Kombu 5.7 installed; without it the tests
that compare with Kombu are skipped.  It runs in a process of its own because the two must not
share one (and because it must not be patched when the tests are).  Calls and results travel as
pickles over pipes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest

__all__ = ["Raised", "call_kombu", "kombu_python", "outcome"]

VARIABLE = "GREENKOMBU_KOMBU_PYTHON"

_WORKER = r"""
import importlib, itertools, pickle, sys

def resolve(path):
    module, _, name = path.partition(":")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value

def run(path, args, kwargs):
    try:
        value = resolve(path)(*args, **kwargs)
        if hasattr(value, "__next__"):
            value = list(itertools.islice(value, 50))
        if isinstance(value, tuple):
            value = tuple(value)
        pickle.dumps(value)
        return True, value
    except Exception as exc:
        return False, ([base.__name__ for base in type(exc).__mro__], str(exc))

calls = pickle.load(sys.stdin.buffer)
results = [run(*call) for call in calls]
pickle.dump(results, sys.stdout.buffer)
"""


class Raised(NamedTuple):
    """A call that failed: the names of the error's class and its bases, and its text."""

    kinds: list[str]
    text: str


def kombu_python() -> str:
    """Return the interpreter that has Kombu, or skip the test."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no interpreter with Kombu 5.7 to compare with")
    return python


def call_kombu(calls: Sequence[tuple[str, tuple[Any, ...], dict[str, Any]]]) -> list[Any]:
    """Make calls in one Kombu process.

    Args:
        calls: (``"kombu.module:function"``, arguments, keyword arguments).

    Returns:
        What each returned, or a `Raised`.
    """
    done = subprocess.run(
        [kombu_python(), "-W", "ignore", "-c", _WORKER],
        input=pickle.dumps(list(calls)),
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [value if worked else Raised(*value) for worked, value in pickle.loads(done.stdout)]


def outcome(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a call of ours returns, or a `Raised`."""
    try:
        return function(*args, **kwargs)
    except Exception as exc:
        return Raised([base.__name__ for base in type(exc).__mro__], str(exc))
