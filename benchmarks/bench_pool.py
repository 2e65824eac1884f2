"""What a pool costs and whom it serves, beside Kombu's pool.

Usage: python benchmarks/bench_pool.py [--kombu-python PATH] [--rounds N] [--seconds S]
       [--check] [--write]

* alone: one task takes a resource and gives it back, in a block and by calls;
* crowd: 1 000 green tasks (100 native threads) on 10 resources, each in a loop: take one, let the
  others run, give it back.  Shown are operations per second, the CPU time of one, what that makes
  of Kombu's operations, how many tasks were never served, and what the task that was served most
  got, as a multiple of the one served least.  Kombu's ten tasks that have the resources never wait
  for one, so its operations do not contain what ours mostly are: a task that parks and is woken;
* the same crowd (green tasks only) with a timeout, by calls, on channels, and on the global pools,
  which are looked up each time, as Kombu's manual does.

Each package and environment has a process of its own, started once; they take turns, round by
round.  The resource is as cheap as it gets: an object in hub.LifoPool, and an unconnected memory://
connection in the Connection.Pool of both packages (Kombu has no other pool).  Without
--kombu-python (or the variable GREENKOMBU_KOMBU_PYTHON) only greenkombu is measured.

--check exits with 1 when a task is starved, when most/least is above 1.2, or when the crowd makes
less than 0.8 of Kombu's operations under gevent, by CPU time: what else the machine does counts in
wall time.
--write also writes benchmarks/results/pool.json and the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import _common
from _common import Sample, measure, summarize

LIMIT = 10

#: Tasks in the crowd.
TASKS = {"default": 100, "gevent": 1000, "eventlet": 1000}

#: What --check asks for.
MOST_TO_LEAST = 1.2
OF_KOMBU = 0.8


# -- in the child ------------------------------------------------------------------------------


class Tasks:
    """Start tasks and let them run, without either package."""

    def __init__(self, environment: str) -> None:
        if environment == "gevent":
            import gevent

            self.sleep: Callable[[float], Any] = gevent.sleep
            self.spawn: Callable[..., Any] = gevent.spawn
        elif environment == "eventlet":
            import eventlet

            self.sleep = eventlet.sleep
            self.spawn = eventlet.spawn
        else:
            import threading

            def spawn(function: Callable[..., Any], *args: Any) -> Any:
                thread = threading.Thread(target=function, args=args, daemon=True)
                thread.start()
                return thread

            self.sleep, self.spawn = time.sleep, spawn

    @staticmethod
    def join(task: Any) -> None:
        # An eventlet greenlet has wait() instead.
        (task.join if hasattr(task, "join") else task.wait)()


def our_pool() -> tuple[Callable[[], AbstractContextManager[Any]], Callable[[int], None]]:
    """Return what makes a block, and a loop of calls."""
    from hub.pool import LifoPool

    pool: LifoPool[object] = LifoPool(lambda left: object(), limit=LIMIT)

    def calls(count: int) -> None:
        acquire = pool.acquire
        for _ in range(count):
            acquire().release()

    return pool.acquire, calls


def connection_pool(
    package: str,
) -> tuple[Callable[[], AbstractContextManager[Any]], Callable[[int], None]]:
    """The same with the pool of connections that both packages have."""
    Connection = importlib.import_module(package).Connection
    pool = Connection("memory://").Pool(LIMIT)

    def calls(count: int) -> None:
        for _ in range(count):
            pool.acquire(block=True).release()

    return lambda: pool.acquire(block=True), calls


def shapes(package: str, sleep: Callable[[float], Any]) -> dict[str, Callable[[], None]]:
    """Return the other ways to use a pool, by name; each lets the others run in between."""
    connection = importlib.import_module(package).Connection("memory://")
    pools = importlib.import_module(f"{package}.pools")
    pools.set_limit(LIMIT)
    pool = connection.Pool(LIMIT)
    channels = connection.ChannelPool(LIMIT)

    def timeout() -> None:
        with pool.acquire(block=True, timeout=30.0):
            sleep(0)

    def calls() -> None:
        acquired = pool.acquire(block=True)
        sleep(0)
        acquired.release()

    def channel() -> None:
        acquired = channels.acquire(block=True)
        sleep(0)
        acquired.release()

    def looked_up() -> None:
        with pools.connections[connection].acquire(block=True):
            sleep(0)

    def producer() -> None:
        with pools.producers[connection].acquire(block=True):
            sleep(0)

    def producer_timeout() -> None:
        with pools.producers[connection].acquire(block=True, timeout=30.0):
            sleep(0)

    return {
        "Connection.Pool, timeout": timeout,
        "Connection.Pool, calls": calls,
        "ChannelPool, calls": channel,
        "pools.connections[connection]": looked_up,
        "pools.producers[connection]": producer,
        "pools.producers[connection], timeout": producer_timeout,
    }


def crowd(tasks: Tasks, use: Callable[[], None], count: int, seconds: float) -> dict[str, Any]:
    """Let `count` tasks use the pool for some seconds; return what they got."""
    served = [0] * count
    ready: list[int] = []
    stop = go = False

    def work(index: int) -> None:
        ready.append(index)
        while not go:
            tasks.sleep(0.001)
        while not stop:
            use()
            served[index] += 1

    running = [tasks.spawn(work, index) for index in range(count)]
    # A native thread may take long to start on a busy machine.
    while len(ready) < count:
        tasks.sleep(0.001)
    go = True
    tasks.sleep(0.1)  # everybody has come once, or will never
    before = list(served)
    cpu, wall = time.process_time(), time.perf_counter()
    tasks.sleep(seconds)
    got = [now - then for now, then in zip(served, before, strict=True)]
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    stop = True
    for task in running:
        tasks.join(task)
    return {
        "operations_per_second": sum(got) / wall,
        "cpu_us": cpu / max(sum(got), 1) * 1e6,
        "starved": sum(each == 0 for each in got),
        "most": max(got),
        "least": min(got),
    }


def child(package: str, environment: str, seconds: float) -> None:
    """Take a sample for each line on stdin; write it as JSON on stdout."""
    _common.patch(environment)
    tasks = Tasks(environment)
    block, calls = our_pool() if package == "hub" else connection_pool(package)

    def blocks(count: int) -> None:
        for _ in range(count):
            with block():
                pass

    def use() -> None:
        with block():
            tasks.sleep(0)

    others = {} if package == "hub" or environment == "default" else shapes(package, tasks.sleep)
    calls(LIMIT)
    for _ in sys.stdin:
        gc.collect()
        taken = {
            "calls": vars_of(measure(calls)),
            "block": vars_of(measure(blocks)),
            "crowd": crowd(tasks, use, TASKS[environment], seconds),
            "shapes": {
                name: crowd(tasks, other, TASKS[environment], seconds / 2)["cpu_us"]
                for name, other in others.items()
            },
        }
        print(json.dumps(taken), flush=True)


def vars_of(sample: Sample) -> list[float]:
    return [sample.cpu_us, sample.wall_us, sample.count]


# -- in the parent -----------------------------------------------------------------------------


class Contender:
    """A process that measures one package in one environment."""

    def __init__(self, python: str, package: str, environment: str, seconds: float) -> None:
        self.package, self.environment = package, environment
        variables = {} if package == "kombu" else {"PYTHONPATH": str(_common.FOLDER.parent)}
        command = [python, __file__, "--child", package, "--environment", environment]
        self.process = subprocess.Popen(
            [*command, "--seconds", str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        self.alone: dict[str, list[Sample]] = {"calls": [], "block": []}
        self.crowds: list[dict[str, Any]] = []
        self.shapes: list[dict[str, float]] = []

    def sample(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the benchmark of {self.package} in {self.environment} failed")
        taken = json.loads(line)
        self.crowds.append(taken.pop("crowd"))
        self.shapes.append(taken.pop("shapes"))
        for name, values in taken.items():
            self.alone[name].append(Sample(*values))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def median(self, name: str) -> float:
        return statistics.median(each[name] for each in self.crowds)

    def shape(self, name: str) -> float:
        """The µs of CPU for one operation of a crowd that uses the pool in that way."""
        return statistics.median(each[name] for each in self.shapes)

    @property
    def uneven(self) -> float:
        """The worst round's most/least; infinite when somebody got nothing."""
        return max(
            each["most"] / each["least"] if each["least"] else float("inf") for each in self.crowds
        )

    @property
    def starved(self) -> int:
        return max(each["starved"] for each in self.crowds)

    def results(self) -> dict[str, Any]:
        return {
            **{name: summarize(samples) for name, samples in self.alone.items()},
            "crowd_operations_per_second": self.median("operations_per_second"),
            "crowd_cpu_us": self.median("cpu_us"),
            "crowd_starved": self.starved,
            "crowd_most_to_least": None if self.starved else self.uneven,
            "shapes_cpu_us": {name: self.shape(name) for name in self.shapes[0]},
        }


HEADER = [
    "",
    "alone, calls",
    "alone, block",
    "crowd, ops/s",
    "µs of CPU",
    "of Kombu's",
    "starved",
    "most/least",
]

SHAPES_HEADER = ["", "greenkombu", "kombu", "of Kombu's"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kombu-python", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5, help="for each crowd")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--environment", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.environment, options.seconds)
        return 0

    rows: list[list[Any]] = []
    shape_rows: list[list[Any]] = []
    results: dict[str, Any] = {}
    missed: list[str] = []
    for environment in _common.ENVIRONMENTS:
        contenders = [
            Contender(sys.executable, package, environment, options.seconds)
            for package in ("hub", "greenkombu")
        ]
        if options.kombu_python:
            contenders.append(
                Contender(options.kombu_python, "kombu", environment, options.seconds)
            )
        try:
            for index in range(options.rounds):
                for contender in contenders if index % 2 else reversed(contenders):
                    contender.sample()
        finally:
            for contender in contenders:
                contender.close()
        kombu = contenders[2].median("cpu_us") if contenders[2:] else None
        for name in contenders[1].shapes[0]:
            ours = contenders[1].shape(name)
            theirs = contenders[2].shape(name) if contenders[2:] else None
            shape_rows.append([f"{environment}, {name}", ours, theirs, theirs and theirs / ours])
        for contender in contenders:
            ratio = kombu and kombu / contender.median("cpu_us")
            rows.append(
                [
                    f"{environment}, {contender.package}",
                    *[str(summarize(samples)) for samples in contender.alone.values()],
                    contender.median("operations_per_second"),
                    contender.median("cpu_us"),
                    ratio,
                    f"{contender.starved} of {TASKS[environment]}",
                    None if contender.starved else contender.uneven,
                ]
            )
            results[f"{environment}, {contender.package}"] = contender.results()
            results[f"{environment}, {contender.package}"]["of_kombu"] = ratio
            if contender.package == "kombu":
                continue
            what = f"{environment}, {contender.package}"
            if contender.starved or contender.uneven > MOST_TO_LEAST:
                missed.append(
                    f"{what}: {contender.starved} starved, most/least {contender.uneven:.2f}"
                )
            if ratio and environment == "gevent" and ratio < OF_KOMBU:
                missed.append(f"{what}: {ratio:.2f} of Kombu's operations")

    print(_common.text_table(HEADER, rows))
    print(_common.text_table(SHAPES_HEADER, shape_rows))
    print(f"missed: {'; '.join(missed) or 'nothing'}")
    if options.write:
        _common.write_results("pool", results)
        _common.update_section(
            _common.FOLDER.parent / "docs" / "performance.md",
            "bench_pool",
            document(
                _common.markdown_table(HEADER, rows),
                _common.markdown_table(SHAPES_HEADER, shape_rows),
            ),
        )
    return 1 if options.check and missed else 0


def document(table: str, shapes: str) -> str:
    """Return the section of docs/performance.md."""
    return f"""\
## Pools

`python benchmarks/bench_pool.py --kombu-python PATH --write` has measured this. Alone: µs of CPU
for taking a resource and giving it back, median (smallest-largest). Crowd: 1 000 green tasks, or
100 native threads, on {LIMIT} resources, each in a loop: take one, let the others run, give it
back. The rows `hub` are `hub.LifoPool` with plain objects, the others the `Connection.Pool` of both
packages. "Of Kombu's" is Kombu's CPU time for one operation divided by ours. Starved tasks were not
served once; most/least compares the task that was served most with the one served least, in the
worst round. Kombu's operations cost less where they starve the rest: the {LIMIT} tasks that have
the resources go on among themselves, and nobody is woken.

{table}

The same crowd where the pool is used in other ways, µs of CPU for each operation:

{shapes}
"""


if __name__ == "__main__":
    sys.exit(main())
