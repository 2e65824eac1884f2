"""The same programs on Kombu's memory transport and on ours, with the same results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.differential.memory_programs import PROGRAMS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: Where ours differs from Kombu 5.7, and on purpose: (program, path) -> why.
DIFFERENT = {
    ("requeued", "/order"): "ours return to their place, as behaviour 154 and AMQP have it",
    ("requeued", "/redelivered"): "ours say so, as behaviours 117 and 154 have it",
}


def run(python: str, package: str) -> dict[str, Any]:
    variables = {**os.environ, "PYTHONPATH": str(ROOT) if package == "greenkombu" else ""}
    done = subprocess.run(
        [python, str(HERE / "memory_programs.py"), package],
        env=variables,
        cwd=HERE,
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


@pytest.fixture(scope="module")
def both() -> tuple[dict[str, Any], dict[str, Any]]:
    kombu = os.environ.get("GREENKOMBU_KOMBU_PYTHON")
    if not kombu:
        pytest.skip("GREENKOMBU_KOMBU_PYTHON does not name an interpreter that has Kombu 5.7")
    return run(kombu, "kombu"), run(sys.executable, "greenkombu")


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Return where two results differ, with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = []
        for name in sorted({*theirs, *ours}):
            inner = f"{path}/{name}"
            found += differences(theirs.get(name, "<absent>"), ours.get(name, "<absent>"), inner)
        return found
    if isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        return [
            each
            for index, pair in enumerate(zip(theirs, ours, strict=True))
            for each in differences(*pair, f"{path}/{index}")
        ]
    return [] if theirs == ours else [f"{path}: kombu {theirs!r}, greenkombu {ours!r}"]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_same_program_sees_the_same(
    both: tuple[dict[str, Any], dict[str, Any]], name: str
) -> None:
    theirs, ours = both
    found = [
        each
        for each in differences(theirs[name], ours[name])
        if not any(
            each.startswith((f"{path}/", f"{path}:"))
            for program, path in DIFFERENT
            if program == name
        )
    ]
    assert not found, "\n".join(found)
