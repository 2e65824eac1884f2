"""What the hub costs, in each environment and with each poller, beside what the libraries offer.

Usage: python benchmarks/bench_hub.py [--rounds N] [--seconds S] [--sizes 10,1000,10000] [--write]

* wake-up: a task writes a byte to one of N descriptors and parks; whoever waits for the descriptors
  reads the byte and wakes the task.  With the hub that is a reader's callback; with the libraries
  it is a task in a loop around select(), poll() or a selector, as Kombu has it.
* queued calls and timers, beside the event loop's own;
* the round trip of two tasks that wake each other;
* memory per registered descriptor.

Every environment and contender has a process of its own, on one core.  CPU time of the whole
process in microseconds: median (smallest-largest).  Exits with 1 when a wake-up by epoll with the
largest N costs more than 1.3 times that with the smallest, also at a second look.

--write also writes benchmarks/results/hub.json and the section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import _common
from _common import Sample, summarize

#: How much more a wake-up may cost with the largest number of descriptors.
FLAT = 1.3

POLLERS = ("epoll", "poll", "select")

#: (environment, contender) of the wake-up; a contender of ours is the poller's name.
WAKE_UPS = [
    *[(environment, poller) for environment in _common.ENVIRONMENTS for poller in POLLERS],
    ("default", "selectors"),
    ("gevent", "select.select"),
    ("gevent", "select.poll"),
    ("gevent", "selectors"),
    ("eventlet", "select.select"),
]


# -- in the parent -------------------------------------------------------------------------------


def run(environment: str, kind: str, options: dict[str, Any], **variables: str) -> Any:
    script = str(_common.FOLDER / "_hub_work.py")
    return _common.run_child(script, environment, kind, json.dumps(options), **variables)


def samples_of(listed: list[dict[str, Any]]) -> list[Sample]:
    return [Sample(**each) for each in listed]


def measure_wake_up(
    environment: str, contender: str, rounds: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Return the summaries by size, the ratio of the largest to the smallest, and what failed."""
    sizes = options.sizes
    answer = run(
        environment,
        "wake_up",
        {
            "contender": contender,
            "sizes": sizes,
            "rounds": rounds,
            "seconds": options.seconds,
            "descriptors": max(sizes),
        },
        HUB_POLLER=contender if contender in POLLERS else "",
    )
    found = {int(size): summarize(samples_of(listed)) for size, listed in answer["sizes"].items()}
    ratio = None
    if sizes[0] in found and sizes[-1] in found:
        ratio = found[sizes[-1]].cpu_us / found[sizes[0]].cpu_us
    return {"sizes": found, "ratio": ratio, "refused": answer["refused"]}


def bench_wake_up(options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    """Return the table's rows and what is kept."""
    rows: list[list[Any]] = []
    kept: dict[str, Any] = {}
    for environment, contender in WAKE_UPS:
        measured = measure_wake_up(environment, contender, options.rounds, options)
        if contender == "epoll" and measured["ratio"] > FLAT:
            # Another program may have come in between: a second look, with more samples.
            measured = measure_wake_up(environment, contender, options.rounds * 3, options)
        found, ratio = measured["sizes"], measured["ratio"]
        name = f"hub, {contender}" if contender in POLLERS else contender
        rows.append(
            [environment, name]
            + [str(found[size]) if size in found else "refused" for size in options.sizes]
            + [f"{ratio:.2f}" if ratio is not None else None]
        )
        kept[f"{environment}/{name}"] = measured
    return rows, kept


def bench_calls(options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    kept: dict[str, Any] = {}
    for environment in _common.ENVIRONMENTS:
        answer = run(
            environment, "calls", {"rounds": options.rounds, "seconds": options.seconds / 2}
        )
        kept[environment] = {name: summarize(samples_of(listed)) for name, listed in answer.items()}
    names = list(dict.fromkeys(name for found in kept.values() for name in found))
    names.sort(key=lambda name: name.partition(",")[0])
    rows = [
        [name, *[str(found[name]) if name in found else None for found in kept.values()]]
        for name in names
    ]
    return rows, kept


def bench_memory(options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    kept = {
        f"{environment}/{poller}": run(
            environment,
            "memory",
            {"count": max(options.sizes), "descriptors": max(options.sizes)},
            HUB_POLLER=poller,
        )["bytes"]
        for environment in _common.ENVIRONMENTS
        for poller in ("epoll", "poll")
    }
    rows = [
        [environment, *[kept[f"{environment}/{poller}"] for poller in ("epoll", "poll")]]
        for environment in _common.ENVIRONMENTS
    ]
    return rows, kept


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.08, help="for each sample")
    parser.add_argument(
        "--sizes",
        type=lambda text: sorted(int(size) for size in text.split(",")),
        default=[10, 1000, 10000],
    )
    parser.add_argument("--write", action="store_true", help="write the results and the document")
    options = parser.parse_args()

    header = [*[f"N={size}" for size in options.sizes], "ratio"]
    wake_rows, wake_ups = bench_wake_up(options)
    wake_header = ["", "waits with", *header]
    print("wake-up, µs of CPU: median (smallest-largest)")
    print(_common.text_table(wake_header, wake_rows), end="\n\n")

    call_rows, calls = bench_calls(options)
    call_header = ["", *_common.ENVIRONMENTS]
    print("calls, timers, round trips, µs of CPU")
    print(_common.text_table(call_header, call_rows), end="\n\n")

    memory_rows, memory = bench_memory(options)
    memory_header = ["", "epoll", "poll"]
    print("bytes of Python objects per registered descriptor")
    print(_common.text_table(memory_header, memory_rows), end="\n\n")

    steep = [
        f"{name}: {found['ratio']:.2f}"
        for name, found in wake_ups.items()
        if name.endswith("hub, epoll") and (found["ratio"] or 0) > FLAT
    ]
    print(f"flat within {FLAT}: {'no: ' + '; '.join(steep) if steep else 'yes'}")

    if options.write:
        _common.write_results(
            "hub", {"wake_up": wake_ups, "calls": calls, "bytes_per_descriptor": memory}
        )
        _common.update_section(
            _common.FOLDER.parent / "docs" / "performance.md",
            "bench_hub",
            document(
                _common.markdown_table(wake_header, wake_rows),
                _common.markdown_table(call_header, call_rows),
                _common.markdown_table(memory_header, memory_rows),
            ),
        )
    return 1 if steep else 0


def document(wake_ups: str, calls: str, memory: str) -> str:
    """Return the section of docs/performance.md."""
    facts = _common.machine()
    versions = ", ".join(
        f"{name} {facts[name]}" for name in ("gevent", "eventlet") if name in facts
    )
    return f"""\
## The hub

`python benchmarks/bench_hub.py --write` has measured this on {facts["cores"]} shared cores,
{facts["system"]}, Python {facts["python"]}, {versions}. Each process
was kept on one core. Numbers are its CPU time in µs: median (smallest-largest) of samples that were
taken in turns.

A wake-up: a task writes a byte to one of N descriptors and parks; whoever waits for all N reads the
byte and wakes the task. The last column is the largest N against the smallest. Refused means that
it cannot wait for so many: select(2) takes no descriptor above 1023.

{wake_ups}

Queued calls, timers, and two tasks that wake each other in turn:

{calls}

Bytes of Python objects for each descriptor that has a reader (what the kernel holds is not in it):

{memory}
"""


if __name__ == "__main__":
    sys.exit(main())
