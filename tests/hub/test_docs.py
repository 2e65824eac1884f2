"""The manual of the hub is a program that runs."""

from __future__ import annotations

import re

import pytest

import hub
from tests.support.patched import ROOT, complaints, run_patched

MANUAL = (ROOT / "docs" / "hub.md").read_text()


@pytest.mark.green_matrix
def test_the_python_of_the_manual_runs_in_this_environment() -> None:
    blocks = re.findall(r"```python\n(.*?)```", MANUAL, re.DOTALL)
    assert len(blocks) >= 9
    done = run_patched(["-c", "\n".join(blocks)])
    assert done.returncode == 0, done.stderr
    assert complaints(done.stderr) == ""


def test_the_manual_names_every_error() -> None:
    errors = [
        name
        for name in hub.__all__
        if isinstance(getattr(hub, name), type) and issubclass(getattr(hub, name), Exception)
    ]
    bases = {"HubError", "PoolError", "StreamError", "BufferFullError", "PollerClosedError"}
    missing = [name for name in errors if name not in MANUAL and name not in bases]
    assert missing == []


def test_the_manual_names_what_the_package_exports() -> None:
    unnamed = [
        name for name in hub.__all__ if name[0].islower() and not re.search(rf"\b{name}\b", MANUAL)
    ]
    assert set(unnamed) <= {"create_poller", "detect_environment"}
