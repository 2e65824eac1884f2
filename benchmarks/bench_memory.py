"""Publish and consume on memory://, beside Kombu: µs of CPU per message.

Usage: python benchmarks/bench_memory.py [--kombu-python PATH] [--environment E] [--rounds N]
       [--check] [--write]

JSON bodies of about 100 bytes, through Producer and Consumer, the same program for both.  Each
package runs in a process of its own, started once; the two take turns, round by round, and the
median is shown with the smallest and the largest.  Without --kombu-python (or the variable
GREENKOMBU_KOMBU_PYTHON) only greenkombu is measured.

--check exits with 1 when a ratio is below its target: 1.25 for publish, 1.2 for consume.
--write also writes benchmarks/results/memory.json and the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _common
from _common import Sample, Summary, summarize

#: Kombu's CPU divided by ours, at least.
TARGETS = {"publish": 1.25, "consume, ack": 1.2, "consume, no_ack": 1.2}

#: Messages in one sample.
MESSAGES = 4000

BODY = {"id": "0d9b5b6e-7a0d-4a55-9e5c", "task": "resize", "args": [1, 2, 3], "path": "/media/cat"}


# -- in the child ------------------------------------------------------------------------------


class Programs:
    """What is measured, written against the API that both packages have."""

    def __init__(self, package: str) -> None:
        module = importlib.import_module(package)
        self.connection = module.Connection("memory://")
        self.channel = self.connection.channel()
        exchange = module.Exchange("bench", "direct")
        self.queue = module.Queue("bench", exchange, routing_key="bench")
        self.queue(self.channel).declare()
        self.producer = module.Producer(self.channel, exchange, "bench")
        self.consumer_class = module.Consumer

    def publish(self, count: int) -> None:
        publish = self.producer.publish
        for _ in range(count):
            publish(BODY)

    def consume(self, count: int) -> None:
        drain = self.connection.drain_events
        for _ in range(count):
            drain(timeout=1)

    def samples(self) -> dict[str, Sample]:
        """Take one sample of everything."""
        taken = {}
        taken["publish"] = timed(self.publish)
        with self.consumer(no_ack=False):
            taken["consume, ack"] = timed(self.consume)
        self.publish(MESSAGES)
        with self.consumer(no_ack=True):
            taken["consume, no_ack"] = timed(self.consume)
        return taken

    def consumer(self, no_ack: bool) -> Any:
        def take(body: Any, message: Any) -> None:
            assert body["id"]
            if not no_ack:
                message.ack()

        return self.consumer_class(self.channel, self.queue, no_ack=no_ack, callbacks=[take])


def timed(work: Callable[[int], None]) -> Sample:
    gc.collect()
    gc.disable()
    try:
        import time

        cpu, wall = time.process_time(), time.perf_counter()
        work(MESSAGES)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    finally:
        gc.enable()
    return Sample(cpu / MESSAGES * 1e6, wall / MESSAGES * 1e6, MESSAGES)


def child(package: str, environment: str) -> None:
    """Take a sample for each line on stdin; write it as JSON on stdout."""
    _common.patch(environment)
    programs = Programs(package)
    programs.samples()
    for _ in sys.stdin:
        taken = {name: (s.cpu_us, s.wall_us, s.count) for name, s in programs.samples().items()}
        print(json.dumps(taken), flush=True)


# -- in the parent -----------------------------------------------------------------------------


class Contender:
    """A process that measures one package."""

    def __init__(self, python: str, package: str, environment: str) -> None:
        self.package = package
        variables = {"PYTHONPATH": str(_common.FOLDER.parent)} if package == "greenkombu" else {}
        self.process = subprocess.Popen(
            [python, __file__, "--child", package, "--environment", environment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        self.taken: dict[str, list[Sample]] = {}

    def sample(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the benchmark of {self.package} failed")
        for name, values in json.loads(line).items():
            self.taken.setdefault(name, []).append(Sample(*values))

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kombu-python", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON"))
    parser.add_argument("--environment", default="gevent", choices=_common.ENVIRONMENTS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.environment)
        return

    contenders = [Contender(sys.executable, "greenkombu", options.environment)]
    if options.kombu_python:
        contenders.append(Contender(options.kombu_python, "kombu", options.environment))
    try:
        for index in range(options.rounds):
            for contender in contenders if index % 2 else reversed(contenders):
                contender.sample()
    finally:
        for contender in contenders:
            contender.close()

    ours, theirs = contenders[0].taken, contenders[-1].taken if contenders[1:] else {}
    results: dict[str, Any] = {"environment": options.environment, "rounds": options.rounds}
    rows, missed = [], []
    for name, target in TARGETS.items():
        own: Summary = summarize(ours[name])
        other: Summary | None = summarize(theirs[name]) if theirs else None
        ratio = other.cpu_us / own.cpu_us if other else None
        rows.append([name, str(own), str(other) if other else None, ratio, target])
        results[name] = {"greenkombu": own, "kombu": other, "ratio": ratio, "target": target}
        if ratio is not None and ratio < target:
            missed.append(name)
    header = [
        f"memory, {options.environment}: µs of CPU",
        "greenkombu",
        "kombu 5.7",
        "ratio",
        "at least",
    ]
    print(_common.text_table(header, rows))
    if options.write:
        _common.write_results("memory", results)
        document = Path(_common.FOLDER).parent / "docs" / "performance.md"
        about = (
            "## The memory transport\n\nJSON bodies of about 100 bytes through Producer and"
            f" Consumer; median (smallest-largest) of {options.rounds} samples of {MESSAGES}"
            " messages, taken in turns.\n\n"
        )
        _common.update_section(document, "memory", about + _common.markdown_table(header, rows))
    if options.check and missed:
        raise SystemExit(f"below the target: {', '.join(missed)}")


if __name__ == "__main__":
    main()
