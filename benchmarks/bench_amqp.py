"""AMQP on a private RabbitMQ, beside Kombu, pika, AMQPStorm and a program in C: CPU per message.

Usage: python benchmarks/bench_amqp.py [--kombu-python PATH] [--rounds N] [--count N]
       [--connections N] [--only WORD] [--check] [--write]

Every contender runs in a process (and the Python ones of others in an interpreter) of its own,
under gevent.  They take turns, round by round; the table shows the median CPU (user and system) per
message in µs, with the smallest and the largest, and the ratios of the medians.  The messages
that are consumed were put into the queue by another process.  The queues are not durable.

Without --kombu-python (or the variable GREENKOMBU_KOMBU_PYTHON) the others are left out; the
program in C is built with cc when librabbitmq-dev is there.

--check exits with 1 when a ratio is below its target.
--write also writes benchmarks/results/amqp.json, the section of docs/performance.md and the plot
in docs/performance-amqp.svg.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _common
import bench_amqp_codec as codec
from _common import Sample, Summary, summarize
from _contenders import Contender, ContenderError, python_command

DOCUMENT = _common.FOLDER.parent / "docs" / "performance.md"
PLOT = DOCUMENT.with_name("performance-amqp.svg")

OURS, KOMBU, PIKA, STORM, C = "greenkombu", "kombu 5.7", "pika", "AMQPStorm", "C client"
PEERS = (PIKA, STORM)
#: Of the plot.
COLORS = {OURS: "#2a9d4a", KOMBU: "#8d99ae", PIKA: "#e9c46a", STORM: "#d98cb3", C: "#457b9d"}


@dataclass
class Row:
    """A line of the table: what is asked, of whom, and the least ratio against Kombu."""

    name: str
    order: dict[str, Any]
    must: float | None = None
    others: tuple[str, ...] = ()
    #: The row whose Kombu this one is compared with, where Kombu cannot run it.
    against: str | None = None
    #: The part of --count that is enough.
    part: float = 1.0
    #: Over TLS, with the broker's certificate verified.
    tls: bool = False
    taken: dict[str, list[Sample]] = field(default_factory=dict)
    receives: list[float] = field(default_factory=list)

    def median(self, who: str) -> float | None:
        samples = self.taken.get(who)
        return summarize(samples).cpu_us if samples else None


ALL = (PIKA, STORM, C)
QUEUE = {"queue": "bench"}
ROWS = [
    Row("publish raw, bursts of 64", {"row": "publish_raw"}, 7.0, ALL),
    Row("publish raw, each sent at once", {"row": "publish_raw", "each": True}, 3.5),
    Row("publish raw, one per loop turn", {"row": "publish_raw", "burst": 1}),
    Row("publish 4 KiB, bursts of 64", {"row": "publish_raw", "size": 4096}, 4.0, ALL),
    Row("Producer, JSON, bursts of 64", {"row": "publish_producer"}, 4.5),
    Row("Producer, JSON, each sent at once", {"row": "publish_producer", "each": True}),
    Row("Producer, bytes, bursts of 64", {"row": "publish_producer", "json": False}),
    Row("confirmed, one by one", {"row": "publish_confirmed"}, None, (PIKA, C), part=0.25),
    Row(
        "confirmed, 50 greenlets, one connection",
        {"row": "publish_confirmed", "tasks": 50},
        6.0,
        (PIKA, C),
        against="confirmed, one by one",
        part=0.5,
    ),
    Row("consume, no_ack", {"row": "consume", **QUEUE}, 6.0, ALL),
    Row("consume, ack, prefetch 100", {"row": "consume", **QUEUE, "prefetch": 100}, 6.0, ALL),
    Row("consume, ack, prefetch 1000", {"row": "consume", **QUEUE, "prefetch": 1000}, 8.0, ALL),
    Row("consume JSON, ack, prefetch 1000", {"row": "consume", **QUEUE, "prefetch": 1000}),
    Row("TLS: publish raw, bursts of 64", {"row": "publish_raw"}, others=(PIKA,), tls=True),
    Row(
        "TLS: consume, ack, prefetch 1000",
        {"row": "consume", **QUEUE, "prefetch": 1000},
        others=(PIKA,),
        tls=True,
    ),
    Row("RPC, 100 greenlets, own connections", {"row": "rpc", "shared": False}, part=0.5),
    Row("RPC, 100 greenlets, shared connection", {"row": "rpc", "shared": True}, 3.0, part=0.5),
]
OWN_RPC, SHARED_RPC = ROWS[-2].name, ROWS[-1].name
#: CPU of the better one of pika and AMQPStorm divided by ours, at least.
OF_BEST_PEER = 2.5
#: recv calls for each consumed message, at most.
RECEIVES = 0.2
#: 1 000 connections: KiB, µs a second, and how many times less set-up than Kombu.
RESIDENT_KIB, IDLE_US, SETUP_RATIO = 40.0, 18.0, 2.5


# -- contenders ----------------------------------------------------------------------------------


def build_c() -> Path | None:
    """Build the program in C; None where there is no compiler or no librabbitmq-dev."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    program = Path(tempfile.mkdtemp(prefix="greenkombu-bench-")) / "amqp_work"
    source = str(_common.FOLDER / "c" / "amqp_work.c")
    done = subprocess.run(
        [compiler, "-O2", "-Wno-deprecated-declarations", "-o", program, source, "-lrabbitmq"],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        shutil.rmtree(program.parent)
        return None
    return program


def certificates(folder: Path) -> Any:
    """Write a certificate for the broker, and its authority's, which the contenders trust."""
    import trustme

    from greenkombu.utils.private_rabbitmq import TLSFiles

    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    files = TLSFiles(folder / "authority.pem", folder / "server.pem", folder / "server-key.pem")
    authority.cert_pem.write_to_path(files.ca)
    issued.private_key_pem.write_to_path(files.key)
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(files.certificate, append=index > 0)
    os.environ["GREENKOMBU_BENCH_CA"] = str(files.ca)
    return files


def commands(server: Any, kombu_python: str | None, tls: bool = False) -> dict[str, list[str]]:
    """Return who takes part, and how each is started."""
    url = server.vhost_url("/", tls=tls)
    found = {OURS: python_command("greenkombu", "_amqp_work.py", url)}
    if kombu_python:
        found[KOMBU] = python_command("kombu", "_amqp_work.py", url, python=kombu_python)
        for name, package in ((PIKA, "pika"), (STORM, "amqpstorm")):
            probe = [kombu_python, "-c", f"import {package}"]
            if not subprocess.run(probe, capture_output=True, check=False).returncode:
                command = python_command(package, "_amqp_peers.py", url, python=kombu_python)
                found[name] = command
    program = None if tls else build_c()
    if program is not None:
        found[C] = [str(program), "127.0.0.1", str(server.port)]
    return found


@contextmanager
def started(name: str, command: list[str], timeout: float = 120.0) -> Iterator[Contender]:
    contender = Contender(name, command, timeout=timeout)
    try:
        yield contender
    finally:
        contender.close()


# -- rows ----------------------------------------------------------------------------------------


def take_rows(
    rows: list[Row],
    found: dict[str, list[str]],
    over_tls: dict[str, list[str]],
    options: argparse.Namespace,
) -> None:
    with ExitStack() as stack:
        contenders = {
            (name, tls): stack.enter_context(started(name, command))
            for tls, each in ((False, found), (True, over_tls))
            if any(row.tls == tls for row in rows)
            for name, command in each.items()
        }
        filler = stack.enter_context(started("filler", found[OURS]))
        if any(row.order["row"] == "rpc" for row in rows):
            server = stack.enter_context(started("server", found[OURS]))
            server.ask(row="serve")

        def ask(row: Row, name: str, count: int) -> None:
            order = dict(row.order)
            if order["row"] == "consume":
                filler.ask(row="fill", queue=order["queue"], count=count, json="JSON" in row.name)
            answer = contenders[name, row.tls].ask(count=count, **order)
            sample = Sample(answer["cpu_us"], answer["wall_us"], answer["count"])
            row.taken.setdefault(name, []).append(sample)
            if answer.get("recv_per_message") is not None:
                row.receives.append(answer["recv_per_message"])

        for row in rows:
            count = int(options.count * row.part)
            names = [
                name
                for name in (over_tls if row.tls else found)
                if name in (OURS, KOMBU, *row.others)
            ]
            if row.against is not None:
                names.remove(KOMBU) if KOMBU in names else None
            for name in names:
                ask(row, name, 500)  # to warm up
            row.taken.clear()
            row.receives.clear()
            for index in range(options.rounds):
                for name in names if index % 2 else reversed(names):
                    try:
                        ask(row, name, count)
                    except ContenderError as error:
                        print(error, file=sys.stderr)
                        if name in (OURS, KOMBU):
                            raise
            print(f"{row.name}: {describe(row)}", flush=True)


def describe(row: Row) -> str:
    return ", ".join(f"{name} {summarize(taken)}" for name, taken in row.taken.items())


def ratios(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Return, for each row, the others' median CPU divided by ours."""
    by_name = {row.name: row for row in rows}
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        own = row.median(OURS)
        if not own:
            continue
        reference = by_name.get(row.against, row) if row.against else row
        each = {KOMBU: reference.median(KOMBU)}
        each.update({name: row.median(name) for name in (*PEERS, C)})
        found[row.name] = {name: value / own for name, value in each.items() if value}
    return found


# -- the codec, system calls, connections, start-up ----------------------------------------------


def parse_recorded(rounds: int) -> dict[str, Summary]:
    """Parse a recorded stream of deliveries, in this process: ours and py-amqp's parser."""
    count = 20_000
    stream = codec.recorded_stream(count)
    cases = {OURS: codec.parse_ours(stream), "py-amqp": codec.parse_theirs(stream)}
    return {
        name: summarize(taken)
        for name, taken in _common.take_turns(
            {name: timed(run, count) for name, run in cases.items()}, rounds
        ).items()
    }


def timed(run: Callable[[], object], count: int) -> Callable[[], Sample]:
    def sample() -> Sample:
        taken = _common.measure(lambda _: run(), least=1, most=1)
        return Sample(taken.cpu_us / count, taken.wall_us / count, count)

    return sample


SYSTEM_CALLS: dict[str, dict[str, Any]] = {
    "publish raw, bursts of 64": {"row": "publish_raw"},
    "consume, ack, prefetch 100": {"row": "consume", **QUEUE, "prefetch": 100},
}
RECEIVING = {"recvfrom", "recvmsg", "read"}


def system_calls(found: dict[str, list[str]]) -> dict[str, dict[str, dict[str, float]]]:
    """Count system calls per message with strace: the difference of a long and a short run."""
    counted: dict[str, dict[str, dict[str, float]]] = {}
    few, many = 1000, 4000
    with started("filler", found[OURS]) as filler, tempfile.TemporaryDirectory() as folder:
        for row, order in SYSTEM_CALLS.items():
            for name in (OURS, KOMBU):
                if name not in found:
                    continue
                tables = []
                for count in (few, many):
                    if order["row"] == "consume":
                        filler.ask(row="fill", queue="bench", count=count)
                    report = Path(folder) / "strace"
                    command = ["strace", "-f", "-c", "-o", str(report), *found[name]]
                    with started(name, command) as contender:
                        contender.ask(count=count, **order)
                    tables.append(read_strace(report.read_text()))
                span = many - few
                calls = {
                    call: (tables[1][call] - tables[0].get(call, 0)) / span for call in tables[1]
                }
                counted.setdefault(row, {})[name] = {
                    "all": sum(calls.values()),
                    "receiving": sum(calls.get(call, 0) for call in RECEIVING),
                    "sending": sum(calls.get(call, 0) for call in ("sendto", "sendmsg", "write")),
                }
    return counted


def read_strace(text: str) -> dict[str, int]:
    """Return calls by name from the table of `strace -c`."""
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            found[words[-1]] = int(words[3])
    return found


def can_strace() -> bool:
    program = shutil.which("strace")
    if program is None:
        return False
    probe = subprocess.run([program, "-c", "true"], capture_output=True, check=False)
    return probe.returncode == 0


def many_connections(
    found: dict[str, list[str]], count: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Measure `count` connections in a process of their own, in turns; return the medians."""
    answers: dict[str, list[dict[str, Any]]] = {}
    for index in range(rounds):
        names = [name for name in (OURS, KOMBU) if name in found]
        for name in names if index % 2 else reversed(names):
            with started(name, found[name], timeout=180) as contender:
                answers.setdefault(name, []).append(contender.ask(row="connections", count=count))
    return {
        name: {
            key: statistics.median(answer[key] for answer in taken)
            for key in ("resident_kib", "idle_us", "setup_cpu_s", "p50_ms", "p99_ms", "lost")
        }
        for name, taken in answers.items()
    }


# -- the report ----------------------------------------------------------------------------------


@dataclass
class Report:
    """Everything that was measured, and what fell short."""

    rows: list[Row]
    found: dict[str, list[str]]
    rounds: int
    parsed: dict[str, Summary] | None = None
    calls: dict[str, dict[str, dict[str, float]]] | None = None
    connections: dict[str, dict[str, float]] | None = None
    connection_count: int = 0
    missed: list[str] = field(default_factory=list)

    def judge(self) -> None:
        for row in self.rows:
            ratio = ratios(self.rows).get(row.name, {}).get(KOMBU)
            if row.must and ratio and ratio < row.must:
                self.missed.append(f"{row.name}: {ratio:.1f} of {row.must:g}")
            peers = [each for name, each in ratios(self.rows).get(row.name, {}).items()
                     if name in PEERS]  # fmt: skip
            # One by one, everybody waits for the broker.
            if row.must and peers and min(peers) < OF_BEST_PEER:
                self.missed.append(f"{row.name}: {min(peers):.1f} of {OF_BEST_PEER:g} (best peer)")
            if row.receives and statistics.median(row.receives) > RECEIVES:
                self.missed.append(f"{row.name}: {statistics.median(row.receives):.2f} recv each")
        own = self.own_rpc_ratio()
        if own is not None and own < 4.0:
            self.missed.append(f"RPC, shared against Kombu's own connections: {own:.1f} of 4")
        if self.connections and KOMBU in self.connections:
            ours, theirs = self.connections[OURS], self.connections[KOMBU]
            setup = theirs["setup_cpu_s"] / ours["setup_cpu_s"]
            if ours["resident_kib"] > RESIDENT_KIB:
                self.missed.append(f"connections: {ours['resident_kib']:.0f} KiB each")
            if ours["idle_us"] > IDLE_US:
                self.missed.append(f"connections: idle {ours['idle_us']:.0f} µs/s")
            if setup < SETUP_RATIO:
                self.missed.append(f"connections: set-up {setup:.1f} of {SETUP_RATIO}")

    def own_rpc_ratio(self) -> float | None:
        by_name = {row.name: row for row in self.rows}
        if OWN_RPC not in by_name or SHARED_RPC not in by_name:
            return None
        ours, theirs = by_name[SHARED_RPC].median(OURS), by_name[OWN_RPC].median(KOMBU)
        return theirs / ours if ours and theirs else None

    def table(self) -> tuple[list[str], list[list[Any]]]:
        names = [name for name in (OURS, KOMBU, PIKA, STORM, C) if name in self.found]
        header = ["µs of CPU per message", *names, "ratio", "must", "best peer / ours"]
        divided = ratios(self.rows)
        lines = []
        for row in self.rows:
            cells: list[Any] = [row.name]
            for name in names:
                taken = row.taken.get(name)
                cells.append(str(summarize(taken)) if taken else None)
            ratio = divided.get(row.name, {})
            peers = [ratio[name] for name in PEERS if name in ratio]
            against = ratio.get(KOMBU)
            cells.append(f"{against:.1f}" if against else None)
            cells.append(f"{row.must:g}" if row.must else None)
            cells.append(f"{min(peers):.1f}" if peers else None)
            lines.append(cells)
        return header, lines

    def results(self) -> dict[str, Any]:
        divided = ratios(self.rows)
        return {
            "rounds": self.rounds,
            "rows": {
                row.name: {
                    "samples": {name: summarize(taken) for name, taken in row.taken.items()},
                    "ratios": divided.get(row.name),
                    "must": row.must,
                    "recv_per_message": statistics.median(row.receives) if row.receives else None,
                }
                for row in self.rows
            },
            "rpc_shared_against_kombu_own": self.own_rpc_ratio(),
            "parse": self.parsed,
            "system_calls": self.calls,
            "connections": {"count": self.connection_count, "medians": self.connections},
            "missed": self.missed,
        }

    def extra_tables(self) -> list[tuple[str, list[str], list[list[Any]]]]:
        """Return (what it is, header, lines) of the other tables."""
        tables: list[tuple[str, list[str], list[list[Any]]]] = []
        received = [row for row in self.rows if row.receives]
        if received:
            tables.append(
                (
                    f"recv() per consumed message, as our streams count (at most {RECEIVES:g}):",
                    ["", "recv"],
                    [[row.name, f"{statistics.median(row.receives):.3f}"] for row in received],
                )
            )
        if self.parsed:
            ours, theirs = self.parsed[OURS], self.parsed["py-amqp"]
            tables.append(
                (
                    "Parsing a recorded stream of deliveries, µs of CPU for each:",
                    ["", "ours", "py-amqp", "ratio"],
                    [["parse", str(ours), str(theirs), f"{theirs.cpu_us / ours.cpu_us:.1f}"]],
                )
            )
        if self.calls:
            tables.append(
                (
                    "System calls for each message, counted by strace:",
                    ["", "all", "receiving", "sending"],
                    [
                        [f"{row}, {name}", *[f"{value:.3f}" for value in counts.values()]]
                        for row, each in self.calls.items()
                        for name, counts in each.items()
                    ],
                )
            )
        if self.connections:
            tables.append(
                (
                    f"{self.connection_count} connections in one process, a consumer on each,"
                    " heartbeat 10 s; greenkombu serves them with one task, Kombu with one each:",
                    ["", "KiB each", "idle µs/s each", "set-up CPU s", "p50 ms", "p99 ms"],
                    [
                        [name, *[float(each[key]) for key in list(each)[:5]]]
                        for name, each in self.connections.items()
                    ],
                )
            )
        return tables

    def document(self) -> str:
        facts = _common.machine()
        header, lines = self.table()
        parts = [
            "## AMQP",
            f"`make bench BENCH=amqp` has measured this on {facts['cores']} shared cores with"
            f" RabbitMQ on the same machine, {facts['system']}, Python {facts['python']}, gevent"
            f" {facts.get('gevent')}: CPU (user and system) of the client in µs per message, median"
            f" (smallest-largest) of {self.rounds} samples, taken in turns. The ratio is Kombu's"
            " median divided by ours; bodies are 100 bytes unless said; JSON is a small task"
            " message; TLS verifies the broker's certificate. Published messages go to an exchange"
            " without a queue. The confirms of"
            " 50 greenlets are compared with Kombu's one by one, as its connection cannot be"
            " shared by greenlets.",
            _common.markdown_table(header, lines),
            f"![CPU per message]({PLOT.name})",
        ]
        own = self.own_rpc_ratio()
        if own is not None:
            parts.append(
                "An RPC over our shared connection against Kombu with a connection for each"
                f" greenlet: {own:.1f} times less CPU (must: 4)."
            )
        for title, head, body in self.extra_tables():
            parts += [title, _common.markdown_table(head, body)]
        if self.missed:
            parts.append("Below the target in this run: " + "; ".join(self.missed) + ".")
        else:
            parts.append("Every target was met in this run.")
        return "\n\n".join(parts)


def draw(report: Report) -> bool:
    """Draw the table as bars; tell whether matplotlib was there to do it."""
    try:
        import matplotlib

        matplotlib.use("svg")
        from matplotlib import pyplot
    except ImportError:
        return False
    # No date and no random ids: the file changes only when the numbers do.
    matplotlib.rcParams["svg.hashsalt"] = "greenkombu"
    rows = [row for row in report.rows if row.taken]
    names = [name for name in (OURS, KOMBU, PIKA, STORM, C) if name in report.found]
    figure, axes = pyplot.subplots(figsize=(9, 0.55 * len(rows) + 1.2))
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        places = [at + index * height for at, row in enumerate(rows) if name in row.taken]
        values = [summarize(row.taken[name]).cpu_us for row in rows if name in row.taken]
        axes.barh(places, values, height, label=name, color=COLORS[name])
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(rows))], [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("µs of client CPU per message (logarithmic)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=len(names), frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kombu-python", default=os.environ.get("GREENKOMBU_KOMBU_PYTHON"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--count", type=int, default=4000, help="messages in one sample")
    parser.add_argument("--connections", type=int, default=1000, help="0 leaves them out")
    parser.add_argument("--only", help="rows whose name contains this, and nothing else")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()

    sys.path.insert(0, str(_common.FOLDER.parent))
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ, RabbitMQNotInstalledError

    rows = [row for row in ROWS if not options.only or options.only in row.name]
    folder = Path(tempfile.mkdtemp(prefix="greenkombu-bench-tls-"))
    try:
        server = PrivateRabbitMQ(memory_limit="2GB", tls=certificates(folder)).start()
    except RabbitMQNotInstalledError as error:
        print(error, file=sys.stderr)
        return 1 if options.check else 0
    with server:
        found = commands(server, options.kombu_python)
        over_tls = commands(server, options.kombu_python, tls=True)
        report = Report(rows, found, options.rounds, connection_count=options.connections)
        declare(server.url)
        take_rows(rows, found, over_tls, options)
        if not options.only:
            report.parsed = parse_recorded(options.rounds)
            if can_strace():
                report.calls = system_calls(found)
            if options.connections:
                report.connections = many_connections(found, options.connections, 3)
    shutil.rmtree(folder)
    report.judge()
    header, lines = report.table()
    print(_common.text_table(header, lines))
    for title, head, body in report.extra_tables():
        print(f"\n{title}\n{_common.text_table(head, body)}")
    own = report.own_rpc_ratio()
    if own is not None:
        print(f"\nRPC, our shared connection against Kombu's own connections: {own:.1f}")
    print(f"missed: {'; '.join(report.missed) or 'nothing'}")
    if options.write:
        _common.write_results("amqp", report.results())
        _common.update_section(DOCUMENT, "bench_amqp", report.document())
        if not draw(report):
            print("matplotlib is not installed: no plot", file=sys.stderr)
    if C in found:
        shutil.rmtree(Path(found[C][0]).parent, ignore_errors=True)
    return 1 if options.check and report.missed else 0


def declare(url: str) -> None:
    """Declare what the rows publish to and consume from."""
    from greenkombu import Connection

    with Connection(url) as connection:
        channel = connection.channel()
        channel.exchange_declare("bench-nowhere", "fanout", durable=False, auto_delete=False)
        for queue in ("bench", "bench-rpc"):
            channel.queue_declare(queue, durable=False, auto_delete=False)


if __name__ == "__main__":
    sys.exit(main())
