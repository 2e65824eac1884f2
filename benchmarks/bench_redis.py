"""The Redis transport on a private Redis, beside Kombu and redis-py: CPU per message, and waiting.

Usage: python benchmarks/bench_redis.py [--kombu-python PATH] [--rounds N] [--count N]
       [--consumers N] [--only WORD] [--check] [--write]

Client CPU (user and system) for each message, under gevent: each contender in a process of its
own, Kombu in an interpreter of its own; they take turns, round by round, and the table has the
medians with the smallest and the largest sample.  redis-py (with hiredis) moves the same bytes by
LPUSH and BRPOP and registers nothing, so it is what Kombu's way costs without Kombu.

Then the server's CPU while a thousand consumers, each with a connection of its own, wait for one
queue: ours, beside bare BRPOP clients in one loop, which wait for ever and keep nothing, and
others that register and acknowledge what they take by transactions as Kombu's consumers do.  A
producer that only knows LPUSH sends one message a second, then 5 000.

Without --kombu-python (or the variable GREENKOMBU_KOMBU_PYTHON) Kombu is left out.

--check exits with 1 when a ratio is below its target.
--write also writes benchmarks/results/redis.json and the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import _common
from _common import Sample, summarize
from _contenders import Contender, python_command

DOCUMENT = _common.FOLDER.parent / "docs" / "performance.md"

OURS, KOMBU, BARE = "greenkombu", "kombu 5.7", "redis-py"


@dataclass
class Row:
    """A line of the table: what is asked of all, and the least ratio against Kombu."""

    name: str
    order: dict[str, Any]
    must: float | None = None
    taken: dict[str, list[Sample]] = field(default_factory=dict)
    #: What was counted of ours, for each message: calls of send and recv, scripts.
    counts: dict[str, list[float]] = field(default_factory=dict)

    def median(self, who: str) -> float | None:
        samples = self.taken.get(who)
        return summarize(samples).cpu_us if samples else None

    def ratio(self, who: str) -> float | None:
        """Return another one's median CPU divided by ours."""
        own, other = self.median(OURS), self.median(who)
        return other / own if own and other else None

    def count(self, what: str) -> float | None:
        counted = self.counts.get(what)
        return statistics.median(counted) if counted else None


def make_rows() -> list[Row]:
    many = {"row": "publish", "tasks": 50}
    return [
        Row("publish, one by one", {"row": "publish"}, 3.5),
        Row("Producer, JSON, one by one", {"row": "publish", "producer": True}),
        Row("publish, 50 greenlets", many, 10.0),
        Row("Producer, JSON, 50 greenlets", {**many, "producer": True}),
        Row("consume, no_ack", {"row": "consume"}),
        Row("consume, ack, prefetch 100", {"row": "consume", "prefetch": 100}, 8.0),
        Row("consume, ack, prefetch 1000", {"row": "consume", "prefetch": 1000}),
    ]


#: What is counted, as tables name it.
COUNTS = {"sends": "send()", "receives": "recv()", "scripts": "EVALSHA"}


@dataclass
class Crowd:
    """Consumers that wait, and what the server and they needed while messages came.

    Attributes:
        busy: by messages a second, the server's CPU in seconds, for each round: while that went
            on, and for each message.
        latencies: by the same, seconds from LPUSH to the callback.
    """

    name: str
    package: str
    environment: str
    order: dict[str, Any]
    processes: int
    busy: dict[float, list[float]] = field(default_factory=dict)
    each: dict[float, list[float]] = field(default_factory=dict)
    latencies: dict[float, list[float]] = field(default_factory=dict)
    pops: dict[float, list[float]] = field(default_factory=dict)
    empty: dict[float, list[float]] = field(default_factory=dict)
    wakes: dict[float, list[float]] = field(default_factory=dict)


WAITING, POPPING, REGISTERING = OURS, "BRPOP", "BRPOP, registering"
#: Messages a second, and for how many seconds in each round.
RATES = {1.0: 10.0, 5000.0: 4.0}
#: The server's CPU for ours divided by that for `REGISTERING`, which does the same work, at most.
OF_BRPOP = 1.5


def make_crowds() -> list[Crowd]:
    return [
        Crowd(WAITING, "greenkombu", "gevent", {}, 2),
        Crowd(POPPING, "redis", "default", {}, 1),
        Crowd(REGISTERING, "redis", "default", {"registers": True}, 1),
    ]


# -- rows ----------------------------------------------------------------------------------------


@contextmanager
def started(name: str, command: list[str]) -> Iterator[Contender]:
    contender = Contender(name, command)
    try:
        yield contender
    finally:
        contender.close()


def command(package: str, url: str, environment: str, python: str | None = None) -> list[str]:
    return python_command(package, "_redis_work.py", url, environment, python=python)


def take_rows(rows: list[Row], server: Any, options: argparse.Namespace) -> None:
    with ExitStack() as stack:
        commands = {
            OURS: command("greenkombu", server.url, "gevent"),
            BARE: command("redis", server.url, "gevent"),
        }
        if options.kombu_python:
            commands[KOMBU] = command("kombu", server.url, "gevent", options.kombu_python)
        contenders = {name: stack.enter_context(started(name, commands[name])) for name in commands}
        filler = stack.enter_context(started("filler", commands[OURS]))
        for row in rows:
            for name in contenders:
                take(row, name, contenders[name], filler, server, 500)  # to warm up
            row.taken.clear()
            row.counts.clear()
            for index in range(options.rounds):
                for name in contenders if index % 2 else reversed(contenders):
                    take(row, name, contenders[name], filler, server, options.count)
            told = ", ".join(f"{name} {summarize(taken)}" for name, taken in row.taken.items())
            print(f"{row.name}: {told}", flush=True)


def take(
    row: Row, name: str, contender: Contender, filler: Contender, server: Any, count: int
) -> None:
    server.command("DEL", "bench")
    if row.order["row"] == "consume":
        filler.ask(row="publish", count=count, tasks=50)
    before = commands_of(server).get("evalsha", 0)
    answer = contender.ask(count=count, **row.order)
    sample = Sample(answer["cpu_us"], answer["wall_us"], answer["count"])
    row.taken.setdefault(name, []).append(sample)
    if name == OURS:
        counted = {what: answer[what] for what in ("sends", "receives")}
        counted["scripts"] = (commands_of(server).get("evalsha", 0) - before) / count
        for what, value in counted.items():
            row.counts.setdefault(what, []).append(value)


def commands_of(server: Any) -> dict[str, int]:
    """Return how often the server has carried out each command, those of scripts too."""
    return {
        name.removeprefix("cmdstat_"): int(value.partition("=")[2].partition(",")[0])
        for name, value in server.info("commandstats").items()
    }


# -- a crowd that waits --------------------------------------------------------------------------


def server_cpu(server: Any) -> float:
    """Return the CPU, in seconds, that the server's main thread has had."""
    told = server.info("cpu")
    return float(told["used_cpu_user_main_thread"]) + float(told["used_cpu_sys_main_thread"])


def wait_in_crowds(
    crowds: list[Crowd],
    consumers: int,
    rounds: int,
    make_server: Callable[[], Any],
    rates: dict[float, float],
) -> None:
    """Have each crowd wait at a server of its own, and push messages to them in turns."""
    with ExitStack() as stack:
        places = [
            (crowd, *gather(stack, crowd, consumers, stack.enter_context(make_server())))
            for crowd in crowds
        ]
        time.sleep(3.0)
        # In this order: ours renew leases for ten seconds after they were busy.
        for _ in range(rounds):
            for rate, seconds in rates.items():
                for crowd, server, contenders, producer in places:
                    feed(crowd, server, contenders, producer, rate, seconds)
        for crowd in crowds:
            told = ", ".join(
                f"{rate:g}/s {statistics.median(busy) * 100:.2f} %"
                for rate, busy in crowd.busy.items()
            )
            print(f"{crowd.name}, {consumers} consumers: server CPU at {told}", flush=True)


def gather(
    stack: ExitStack, crowd: Crowd, consumers: int, server: Any
) -> tuple[Any, list[Contender], Contender]:
    order = command(crowd.package, server.url, crowd.environment)
    contenders = []
    for _ in range(crowd.processes):
        contender = stack.enter_context(started(crowd.name, order))
        contender.ask(row="wait", consumers=consumers // crowd.processes, **crowd.order)
        contenders.append(contender)
    producer = stack.enter_context(started("producer", command("redis", server.url, "gevent")))
    return server, contenders, producer


def feed(
    crowd: Crowd,
    server: Any,
    contenders: list[Contender],
    producer: Contender,
    rate: float,
    seconds: float,
) -> None:
    """Push messages at a rate; note what the server and the consumers needed for them."""
    producer.ask(row="produce", rate=rate, seconds=min(seconds, 1.0))  # to warm up
    time.sleep(0.5)
    for contender in contenders:
        contender.ask(row="waited")
    cpu, wall = server_cpu(server), time.monotonic()
    before = commands_of(server)
    sent = producer.ask(row="produce", rate=rate, seconds=seconds)["count"]
    latencies: list[float] = []
    pops = empty = 0
    until = time.monotonic() + 30
    while len(latencies) < sent:
        if time.monotonic() > until:
            raise SystemExit(f"{crowd.name}: {len(latencies)} of {sent} messages have come")
        for contender in contenders:
            answer = contender.ask(row="waited")
            latencies += answer["latencies"]
            pops += answer["pops"]
            empty += answer["empty"]
        time.sleep(0.05)
    cpu, wall = server_cpu(server) - cpu, time.monotonic() - wall
    wakes = commands_of(server).get("publish", 0) - before.get("publish", 0)
    crowd.latencies.setdefault(rate, []).extend(latencies)
    for kept, value in (
        (crowd.busy, cpu / wall),
        (crowd.each, cpu / sent),
        (crowd.pops, pops / sent),
        (crowd.empty, empty / sent),
        (crowd.wakes, wakes / sent),
    ):
        kept.setdefault(rate, []).append(value)


# -- the report ----------------------------------------------------------------------------------


@dataclass
class Report:
    """Everything that was measured, and what fell short."""

    rows: list[Row]
    crowds: list[Crowd]
    rounds: int
    consumers: int
    missed: list[str] = field(default_factory=list)

    def judge(self) -> None:
        for row in self.rows:
            ratio = row.ratio(KOMBU)
            if row.must and ratio and ratio < row.must:
                self.missed.append(f"{row.name}: {ratio:.1f} of {row.must:g}")
        for rate in RATES:
            ratio = self.crowd_ratio(REGISTERING, rate)
            if ratio and ratio > OF_BRPOP:
                self.missed.append(
                    f"{rate:g} messages/s: {ratio:.2f} times the server CPU of BRPOP"
                )

    def crowd_ratio(self, name: str, rate: float) -> float | None:
        """Return the server's CPU for ours divided by that for another crowd."""
        busy = {crowd.name: crowd.busy.get(rate) for crowd in self.crowds}
        ours, other = busy.get(WAITING), busy.get(name)
        return statistics.median(ours) / statistics.median(other) if ours and other else None

    def table(self) -> tuple[list[str], list[list[Any]]]:
        names = [
            name for name in (OURS, KOMBU, BARE) if any(name in row.taken for row in self.rows)
        ]
        header = ["µs of CPU per message", *names, "ratio", "must", "redis-py / ours"]
        lines = []
        for row in self.rows:
            ratio, bare = row.ratio(KOMBU), row.ratio(BARE)
            lines.append(
                [
                    row.name,
                    *[str(summarize(row.taken[name])) for name in names],
                    f"{ratio:.1f}" if ratio else None,
                    f"{row.must:g}" if row.must else None,
                    f"{bare:.1f}" if bare else None,
                ]
            )
        return header, lines

    def counted(self) -> tuple[list[str], list[list[Any]]]:
        lines: list[list[Any]] = []
        for row in self.rows:
            values = [row.count(what) for what in COUNTS]
            if None not in values:
                lines.append([row.name, *[f"{value:.3f}" for value in values]])
        return ["", *COUNTS.values()], lines

    def crowded(self) -> tuple[list[str], list[list[Any]]]:
        header = ["", "server CPU %", "µs each", "ours / it", "p50 ms", "p99 ms"]
        header += ["POPs", "empty", "woken"]
        lines: list[list[Any]] = []
        for rate in RATES:
            for crowd in self.crowds:
                if rate not in crowd.busy:
                    continue
                ratio = None if crowd.name == WAITING else self.crowd_ratio(crowd.name, rate)
                waited = sorted(crowd.latencies[rate])
                counts: list[Any] = [None] * 3
                if crowd.name == WAITING:
                    counts = [
                        f"{statistics.median(kept[rate]):.2f}"
                        for kept in (crowd.pops, crowd.empty, crowd.wakes)
                    ]
                lines.append(
                    [
                        f"{rate:g}/s, {crowd.name}",
                        f"{statistics.median(crowd.busy[rate]) * 100:.2f}",
                        f"{statistics.median(crowd.each[rate]) * 1e6:.0f}",
                        f"{ratio:.2f}" if ratio else None,
                        f"{waited[len(waited) // 2] * 1e3:.2f}",
                        f"{waited[int(len(waited) * 0.99)] * 1e3:.2f}",
                        *counts,
                    ]
                )
        return header, lines

    def results(self) -> dict[str, Any]:
        return {
            "rounds": self.rounds,
            "rows": {
                row.name: {
                    "samples": {name: summarize(taken) for name, taken in row.taken.items()},
                    "ratio": row.ratio(KOMBU),
                    "must": row.must,
                    "counts": {what: row.count(what) for what in row.counts},
                }
                for row in self.rows
            },
            "consumers": self.consumers,
            "crowds": {
                crowd.name: {
                    f"{rate:g}/s": {
                        "server_cpu_percent": [value * 100 for value in crowd.busy[rate]],
                        "server_us_per_message": [value * 1e6 for value in crowd.each[rate]],
                        "p50_ms": statistics.median(crowd.latencies[rate]) * 1e3,
                    }
                    for rate in crowd.busy
                }
                for crowd in self.crowds
            },
            "missed": self.missed,
        }

    def document(self) -> str:
        facts = _common.machine()
        parts = [
            "## Redis",
            f"`make bench BENCH=redis` has measured this on {facts['cores']} shared cores with"
            f" Redis on the same machine, {facts['system']}, Python {facts['python']}, gevent"
            f" {facts.get('gevent')}: CPU (user and system) of the client in µs per message, median"
            f" (smallest-largest) of {self.rounds} samples, taken in turns. The ratio is Kombu's"
            " median divided by ours. Bodies are 100 bytes, or a small JSON task message; they go"
            " through a direct exchange to one queue, and a publish returns when the server has"
            " the message. 50 greenlets share one connection and channel of ours; Kombu's cannot"
            " be shared, so each of its greenlets has one. redis-py does the bare minimum: LPUSH"
            " of a ready payload, in pipelines of 50 where ours are 50 greenlets, and BRPOP, which"
            " registers nothing and loses what it has when it dies.",
            _common.markdown_table(*self.table()),
            "System calls of ours, and scripts, for each message:",
            _common.markdown_table(*self.counted()),
        ]
        if self.crowds:
            parts += [
                f"{self.consumers} consumers of one queue, each with a connection of its own: the"
                " CPU of the server's main thread while a plain LPUSH producer sends messages,"
                f" median of {self.rounds} rounds in turns. BRPOP are bare clients that wait for"
                " ever and keep nothing; those that register do what Kombu's consumers do, in"
                " transactions, and are what ours are to be compared with"
                f" (at most {OF_BRPOP:g} times their CPU). Of ours also: scripts that look for"
                " messages and those that find none, and parked consumers that are woken, for each"
                " message.",
                _common.markdown_table(*self.crowded()),
            ]
        if self.missed:
            parts.append("Below the target in this run: " + "; ".join(self.missed) + ".")
        else:
            parts.append("Every target was met in this run.")
        return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kombu-python", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=2000, help="messages in one sample")
    parser.add_argument("--consumers", type=int, default=1000, help="0 leaves them out")
    parser.add_argument("--only", help="rows whose name contains this, and nothing else")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()

    sys.path.insert(0, str(_common.FOLDER.parent))
    from greenkombu.utils.private_redis import PrivateRedis, RedisNotInstalledError

    rows = [row for row in make_rows() if not options.only or options.only in row.name]
    crowds = [] if options.only or not options.consumers else make_crowds()
    report = Report(rows, crowds, options.rounds, options.consumers)
    try:
        with PrivateRedis() as server:
            take_rows(rows, server, options)
        if crowds:
            wait_in_crowds(crowds, options.consumers, options.rounds, PrivateRedis, RATES)
    except RedisNotInstalledError as error:
        print(error, file=sys.stderr)
        return 1 if options.check else 0
    report.judge()
    for header, lines in (report.table(), report.counted(), report.crowded()):
        if lines:
            print(f"\n{_common.text_table(header, lines)}")
    print(f"missed: {'; '.join(report.missed) or 'nothing'}")
    if options.write:
        _common.write_results("redis", report.results())
        _common.update_section(DOCUMENT, "bench_redis", report.document())
    return 1 if options.check and report.missed else 0


if __name__ == "__main__":
    sys.exit(main())
