"""Processes that measure one package each, and take orders so that they can take turns.

An order is a line of JSON on the contender's stdin, its answer one on its stdout.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
from _common import Sample

__all__ = ["Contender", "ContenderError", "answer_orders", "python_command"]


class ContenderError(Exception):
    """A contender has failed or was too slow; its own message was printed before."""


def python_command(
    package: str, script: str, *arguments: str, python: str | None = None
) -> list[str]:
    """Return the command that runs a script of this folder for `package`."""
    interpreter = sys.executable if package == "greenkombu" or python is None else python
    return [interpreter, str(_common.FOLDER / script), package, *arguments]


class Contender:
    """A process that measures.

    Args:
        name: for tables.
        command: what to run.
        timeout: seconds for each answer.
    """

    def __init__(self, name: str, command: Sequence[str], *, timeout: float = 120.0) -> None:
        self.name = name
        self.timeout = timeout
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(Path(_common.FOLDER).parent)}
            if "greenkombu" in command
            else None,
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        """Give an order and return the answer.

        Raises:
            ContenderError: it ended, or did not answer in time; it is dead then.
        """
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(self.timeout):
                    process.kill()
                    raise ContenderError(f"{self.name}: no answer in {self.timeout:g} s: {order}")
            line = process.stdout.readline()
        except OSError as error:
            raise ContenderError(f"{self.name} has failed: {order}") from error
        if not line:
            raise ContenderError(f"{self.name} has failed: {order}")
        answer = json.loads(line)
        assert isinstance(answer, dict)
        return answer

    def sample(self, **order: Any) -> Sample:
        """Give an order and return its times."""
        answer = self.ask(**order)
        return Sample(answer["cpu_us"], answer["wall_us"], answer["count"])

    def close(self) -> None:
        """End it: by the end of its orders, or after some seconds by force."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.close()
        except OSError:
            pass
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def answer_orders(rows: Any) -> None:
    """In a contender: call the method of `rows` that each order names; write what it returns."""
    for line in sys.stdin:
        order = json.loads(line)
        answer = getattr(rows, order.pop("row"))(**order)
        print(json.dumps(answer), flush=True)
