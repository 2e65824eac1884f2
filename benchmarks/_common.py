"""What the benchmarks share: measuring in turns, medians with spread, processes, tables, documents.

Wall time on a shared machine moves by half, CPU time much less, and the ratio of two things that
were measured in turns least.  So every sample holds both times, contenders and sizes take turns in
rounds, and what is reported is the median with the smallest and the largest sample beside it.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = [
    "ENVIRONMENTS",
    "FOLDER",
    "Sample",
    "Summary",
    "machine",
    "markdown_table",
    "measure",
    "patch",
    "resident_bytes",
    "run_child",
    "summarize",
    "take_turns",
    "text_table",
    "update_section",
    "write_results",
]

FOLDER = Path(__file__).resolve().parent
ENVIRONMENTS = ("default", "gevent", "eventlet")

# Environment -> the module and the function that patches.
_PATCHES = {"gevent": ("gevent.monkey", "patch_all"), "eventlet": ("eventlet", "monkey_patch")}


@dataclass(frozen=True)
class Sample:
    """Times of one operation, in microseconds, as the mean over `count` of them."""

    cpu_us: float
    wall_us: float
    count: int


@dataclass(frozen=True)
class Summary:
    """The median of several samples, with the smallest and the largest, in microseconds."""

    cpu_us: float
    cpu_low_us: float
    cpu_high_us: float
    wall_us: float
    samples: int

    def __str__(self) -> str:
        return f"{number(self.cpu_us)} ({number(self.cpu_low_us)}-{number(self.cpu_high_us)})"


def number(value: float) -> str:
    """Write a positive number with two or three digits that mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def measure(
    work: Callable[[int], object], seconds: float = 0.1, *, least: int = 5, most: int = 50_000
) -> Sample:
    """Run `work(count)`, which does one thing `count` times, for about `seconds`.

    Args:
        work: does what is measured.
        seconds: how long, once.
        least, most: bounds of `count`; a slow thing is done `least` times at any rate.
    """
    started = time.perf_counter()
    work(least)
    each = max((time.perf_counter() - started) / least, 1e-7)
    count = int(min(max(seconds / each, least), most))
    cpu, wall = time.process_time(), time.perf_counter()
    work(count)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Sample(cpu / count * 1e6, wall / count * 1e6, count)


def take_turns(cases: Mapping[Any, Callable[[], Sample]], rounds: int) -> dict[Any, list[Sample]]:
    """Measure every case once per round, forwards and backwards in turn."""
    taken: dict[Any, list[Sample]] = {name: [] for name in cases}
    order = list(cases)
    for index in range(rounds):
        for name in order if index % 2 == 0 else reversed(order):
            taken[name].append(cases[name]())
    return taken


def summarize(samples: Sequence[Sample]) -> Summary:
    """Return the median and the spread of the samples of one case."""
    cpu = [sample.cpu_us for sample in samples]
    wall = [sample.wall_us for sample in samples]
    return Summary(statistics.median(cpu), min(cpu), max(cpu), statistics.median(wall), len(cpu))


# -- processes ---------------------------------------------------------------------------------


def patch(environment: str) -> None:
    """Patch this process for the environment; call it before anything else is imported."""
    if environment in _PATCHES:
        module, function = _PATCHES[environment]
        with warnings.catch_warnings():
            # eventlet announces its own retirement when it is imported, in a category of its own.
            warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
            getattr(importlib.import_module(module), function)()


def run_child(script: str, *arguments: str, timeout: float = 120.0, **variables: str) -> Any:
    """Run a benchmark's script in a process of its own and return the JSON that it prints.

    Args:
        script: its path.
        *arguments: its command line.
        timeout: seconds after which it is killed.
        **variables: environment variables to set.

    Raises:
        SystemExit: it failed; its own message was printed before.
    """
    done = subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{Path(script).name} {' '.join(arguments)} failed: {done.returncode}")
    return json.loads(done.stdout)


def resident_bytes() -> int:
    """Return the resident memory of this process; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


# -- reports -----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what a reader needs in order to judge the numbers; nothing that names the machine."""
    versions = {}
    for package in ("gevent", "eventlet", "greenlet", "amqp"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def _cells(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    return [
        ["-" if cell is None else number(cell) if isinstance(cell, float) else str(cell)
         for cell in row]
        for row in rows
    ]  # fmt: skip


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table for a terminal: the first column left, the others right."""
    cells = _cells([header, *rows])
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the same table in Markdown."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [*_cells([header]), rule, *_cells(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(value: Any) -> Any:
    if isinstance(value, Sample | Summary):
        return {name: round(item, 3) for name, item in asdict(value).items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    path = FOLDER / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(_plain({"machine": machine(), **results}), indent=2) + "\n")
    return path


def update_section(document: Path, name: str, text: str) -> None:
    """Replace what stands between the markers of `name` in a document, or append both.

    Args:
        document: a Markdown file; made if it does not exist.
        name: the markers' name; a benchmark's own.
        text: what goes between them.
    """
    begin, end = f"<!-- {name}: begin, written by the benchmark -->", f"<!-- {name}: end -->"
    old = document.read_text() if document.exists() else "# Performance\n"
    block = f"{begin}\n\n{text.strip()}\n\n{end}"
    head, found, rest = old.partition(begin)
    if found:
        _, _, tail = rest.partition(end)
        new = f"{head}{block}{tail}"
    else:
        new = f"{old.rstrip()}\n\n{block}\n"
    document.write_text(new)
