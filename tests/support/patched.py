"""Run a script in one environment: ``python -m tests.support.patched ENV SCRIPT [arguments]``.

The counterpart of `tests.run` for programs that are no tests, such as the examples: the same
patching, then the script as ``__main__``. A script that is the text ``-c`` takes the next argument
as its source.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.run import ENVIRONMENTS

__all__ = ["ROOT", "complaints", "run_patched"]

#: The folder of the project.
ROOT = Path(__file__).resolve().parents[2]

#: The end of the hub's warning.
SLOW_CALLBACK = " s in the hub and held up every other descriptor\n"


def run_patched(
    arguments: Sequence[str], *, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, in the environment of this test run.

    Args:
        arguments: the script's path and its arguments, or ``-c`` and a source text.
        timeout: seconds after which the process is killed.

    Returns:
        The finished process with its output; its status is for the caller to judge.

    Raises:
        subprocess.TimeoutExpired: it took too long.
    """
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    return subprocess.run(
        [sys.executable, "-m", "tests.support.patched", name, *arguments],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def complaints(stderr: str) -> str:
    """Return what a program wrote to stderr, without what a machine that stood still makes of it.

    The hub measures callbacks by the wall clock, for one that blocks takes no CPU time. So it warns
    of any callback during which the machine did something else for a tenth of a second.
    """
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.endswith(SLOW_CALLBACK))


def _main(arguments: Sequence[str]) -> None:
    name, script, *rest = arguments
    ENVIRONMENTS[name]()
    if script == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [script, *rest]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    _main(sys.argv[1:])
