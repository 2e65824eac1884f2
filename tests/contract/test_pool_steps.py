"""The pool interrupted at each of its steps: runs tests/isolated/pool_steps.py, which says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "tests/isolated/pool_steps.py"


@pytest.mark.watchdog(400)
def test_the_pool_survives_an_interruption_at_every_step() -> None:
    environment = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    variables = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.run",
            environment,
            "-q",
            "-x",
            "tests/isolated/pool_steps.py",
        ],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
