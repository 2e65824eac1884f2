"""Serialize and compress message bodies: µs of CPU per call, beside Kombu.

Run it with an interpreter that can import greenkombu::

    python benchmarks/bench_serialization.py [--kombu PYTHON] [--json]

Kombu is measured too if this interpreter can import it, or in a subprocess of the interpreter that
is named by ``--kombu`` or the variable ``GREENKOMBU_KOMBU_PYTHON``.  The two take turns, several
times, and the median of each is shown: on a shared machine only the ratio means something.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

REPEATS = 5
#: Seconds for one measurement of one case.
SPAN = 0.05

SMALL: dict[str, Any] = {"task": "tasks.add", "id": 12345, "args": [1, 2], "retries": 0}
NESTED: dict[str, Any] = {
    "id": "5f2b1c3e-7a0d-4a55-9e5c-0d6f6c1b7f11",
    "items": [{"sku": f"A-{n}", "price": n * 1.5, "tags": ["x", "y"]} for n in range(20)],
}
TYPED: dict[str, Any] = {"when": datetime(2026, 1, 2, 3, 4, 5), "raw": b"\xff\x00\x01", "n": 1}


def cases(package: str) -> dict[str, Callable[[], Any]]:
    """Return the calls to measure, by name, for greenkombu or kombu."""
    s = importlib.import_module(f"{package}.serialization")
    c = importlib.import_module(f"{package}.compression")
    accept = {"application/json"}

    def pair(name: str, data: Any) -> dict[str, Callable[[], Any]]:
        kind, encoding, body = s.dumps(data)
        if isinstance(body, str):
            body = body.encode()
        return {
            f"dumps {name}": lambda: s.dumps(data),
            f"loads {name}": lambda: s.loads(body, kind, encoding, accept),
        }

    text = json.dumps(NESTED).encode()
    packed, method = c.compress(text, "zlib")
    return {
        **pair("small", SMALL),
        **pair("nested", NESTED),
        **pair("typed", TYPED),
        "dumps text": lambda: s.dumps("some text"),
        "loads text": lambda: s.loads(b"some text", "text/plain", "utf-8"),
        "dumps pickle": lambda: s.dumps(SMALL, serializer="pickle"),
        "compress zlib": lambda: c.compress(text, "zlib"),
        "decompress zlib": lambda: c.decompress(packed, method),
    }


def measure(package: str) -> dict[str, float]:
    """Return µs of this process's CPU per call, by case."""
    result = {}
    for name, call in cases(package).items():
        count = 0
        began = time.process_time()
        until = began + SPAN
        while (now := time.process_time()) < until:
            for _ in range(100):
                call()
            count += 100
        result[name] = (now - began) / count * 1e6
    return result


def measure_elsewhere(python: str) -> dict[str, float]:
    """Measure kombu in another interpreter."""
    command = [python, __file__, "--measure", "kombu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kombu", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON", ""))
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--measure", metavar="PACKAGE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    reference: Callable[[], dict[str, float]] | None = None
    if options.kombu:
        reference = lambda: measure_elsewhere(options.kombu)  # noqa: E731
    elif importlib.util.find_spec("kombu") is not None:
        reference = lambda: measure("kombu")  # noqa: E731
    runs: dict[str, list[dict[str, float]]] = {"greenkombu": [], "kombu": []}
    for _ in range(REPEATS):
        runs["greenkombu"].append(measure("greenkombu"))
        if reference is not None:
            runs["kombu"].append(reference())
    medians = {
        package: {case: statistics.median(run[case] for run in results) for case in results[0]}
        for package, results in runs.items()
        if results
    }
    if options.json:
        print(json.dumps(medians, indent=1))
        return 0
    print(
        f"{'µs per call, median of ' + str(REPEATS):<28}{'greenkombu':>12}{'kombu':>12}{'ratio':>8}"
    )
    for case, ours in medians["greenkombu"].items():
        theirs = medians.get("kombu", {}).get(case)
        beside = f"{theirs:12.2f}{theirs / ours:8.2f}" if theirs else f"{'-':>12}{'-':>8}"
        print(f"{case:<28}{ours:12.2f}{beside}")
    if reference is None:
        print("kombu was not found: name an interpreter that has it with --kombu")
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.exit(main())
