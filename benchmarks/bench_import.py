"""What importing the package costs, beside Kombu: milliseconds of CPU, modules, memory.

Usage: python benchmarks/bench_import.py [--kombu-python PATH] [--rounds N] [--check] [--write]

Every sample is a new interpreter, which takes the times around the import itself; the packages take
turns.  "names" also touches Connection, Producer, Consumer, Queue and Exchange, since both packages
load lazily.  Without --kombu-python (or GREENKOMBU_KOMBU_PYTHON) only greenkombu is measured.

--check exits with 1 when ours costs more than Kombu's.
--write also writes benchmarks/results/import.json and the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import Any

import _common

PROGRAM = """
import os, sys, time
package, names = sys.argv[1:]
before = len(sys.modules)
cpu = time.process_time()
module = __import__(package)
if names == "names":
    module.Connection, module.Producer, module.Consumer, module.Queue, module.Exchange
cpu = time.process_time() - cpu
pages = int(open("/proc/self/statm").read().split()[1]) if os.path.exists("/proc/self/statm") else 0
print(cpu * 1e3, len(sys.modules) - before, pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
"""
WHAT = ("import", "names")


def sample(python: str, package: str, what: str) -> tuple[float, float, float]:
    done = subprocess.run(
        [python, "-c", PROGRAM, package, what],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
        cwd=_common.FOLDER.parent,
    )
    cpu, modules, resident = map(float, done.stdout.split())
    return cpu, modules, resident


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kombu-python", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    pythons = {"greenkombu": sys.executable}
    if options.kombu_python:
        pythons["kombu"] = options.kombu_python

    cases = [(package, what) for what in WHAT for package in pythons]
    taken: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for case in cases:
        sample(pythons[case[0]], *case)  # compiles
    for index in range(options.rounds):
        for case in cases if index % 2 else reversed(cases):
            taken.setdefault(case, []).append(sample(pythons[case[0]], *case))

    rows: list[list[Any]] = []
    results: dict[str, Any] = {}
    missed = []
    for what in WHAT:
        medians = {}
        for package in pythons:
            samples = taken[package, what]
            times = [each[0] for each in samples]
            medians[package] = statistics.median(times)
            _, modules, resident = samples[-1]
            rows.append(
                [
                    f"{what}, {package}",
                    f"{medians[package]:.1f} ({min(times):.1f}-{max(times):.1f})",
                    f"{modules:.0f}",
                    f"{resident:.1f}",
                ]
            )
            results[f"{what}, {package}"] = {
                "cpu_ms": medians[package],
                "modules": modules,
                "resident_mib": resident,
            }
        if medians.get("kombu", medians["greenkombu"]) < medians["greenkombu"]:
            missed.append(what)
    header = ["", "ms of CPU", "modules", "resident MiB"]
    print(_common.text_table(header, rows))
    print(f"missed: {', '.join(missed) or 'nothing'}")
    if options.write:
        _common.write_results("import", results)
        _common.update_section(
            _common.FOLDER.parent / "docs" / "performance.md",
            "bench_import",
            "## Import\n\nA new interpreter each time; median (smallest-largest). `names` also"
            " touches Connection, Producer, Consumer, Queue and Exchange.\n\n"
            + _common.markdown_table(header, rows),
        )
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
