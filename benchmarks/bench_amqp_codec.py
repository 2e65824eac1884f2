"""Cost of the AMQP codec beside py-amqp's: parse a recorded delivery stream, encode publishes.

Usage: python benchmarks/bench_amqp_codec.py [--messages N] [--rounds N] [--json]

CPU time, interleaved rounds, medians and spread in microseconds for each message.  py-amqp is
driven through its own frame handler and frame writer, with its transport replaced by memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from struct import pack, unpack_from
from typing import Any

import amqp
from amqp import spec
from amqp.method_framing import frame_handler, frame_writer
from amqp.serialization import loads

from greenkombu._amqp.frames import Publisher, encode_ack
from greenkombu._amqp.message import Outgoing
from greenkombu._amqp.protocol import Parser

BODY = b"x" * 100
BLOCK = 65536
FRAME_MAX = 131072


def recorded_stream(count: int) -> bytes:
    """Return `count` deliveries as RabbitMQ sends them."""
    properties = amqp.Message(
        content_type="application/json", content_encoding="utf-8", delivery_mode=2, priority=0
    )._serialize_properties()
    frames = []
    for tag in range(1, count + 1):
        method = pack(">HHB6sQBB0sB5s", 60, 60, 6, b"None12", tag, 0, 0, b"", 5, b"bench")
        header = pack(">HHQ", 60, 0, len(BODY)) + properties
        for kind, payload in ((1, method), (2, header), (3, BODY)):
            frames.append(pack(">BHI", kind, 1, len(payload)) + payload + b"\xce")
    return b"".join(frames)


def parse_ours(stream: bytes) -> Callable[[], int]:
    blocks = [stream[at : at + BLOCK] for at in range(0, len(stream), BLOCK)]

    def run() -> int:
        parser = Parser()
        return sum(len(parser.feed(block)) for block in blocks)

    return run


def parse_theirs(stream: bytes) -> Callable[[], int]:
    class Owner:
        bytes_recv = 0

    def run() -> int:
        count = 0

        def on_method(channel_id: int, method: Any, payload: bytes, content: Any) -> None:
            nonlocal count
            loads("sLbss", payload, 4)
            count += 1

        handle = frame_handler(Owner(), on_method)
        position, end = 0, len(stream)
        while position < end:
            kind, channel_id, size = unpack_from(">BHI", stream, position)
            handle((kind, channel_id, stream[position + 7 : position + 7 + size]))
            position += size + 8
        return count

    return run


def publish_ours(count: int) -> Callable[[], int]:
    def run() -> int:
        publisher = Publisher(1, FRAME_MAX)
        size = 0
        for _ in range(count):
            message = Outgoing(BODY, 0, "application/data", "binary", {}, {"delivery_mode": 2})
            size += len(publisher.encode(message.property_bytes(), message.body, "", "bench"))
        return size

    return run


def publish_theirs(count: int) -> Callable[[], int]:
    class Memory:
        frame_max = FRAME_MAX
        bytes_sent = 0
        size = 0

        def write(self, data: Any) -> None:
            self.size += len(data)

    def run() -> int:
        owner = Memory()
        write = frame_writer(owner, owner)
        from amqp.serialization import dumps

        for _ in range(count):
            message = amqp.Message(
                BODY,
                priority=0,
                content_type="application/data",
                content_encoding="binary",
                application_headers={},
                delivery_mode=2,
            )
            arguments = dumps("Bssbb", (0, "", "bench", False, False))
            write(1, 1, spec.Basic.Publish, arguments, message)
        return owner.size

    return run


def ack_ours(count: int) -> Callable[[], int]:
    def run() -> int:
        return sum(len(encode_ack(1, tag)) for tag in range(count))

    return run


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--messages", type=int, default=20000)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    count = given.messages
    stream = recorded_stream(count)
    cases = {
        "parse delivery": (parse_ours(stream), parse_theirs(stream)),
        "encode publish": (publish_ours(count), publish_theirs(count)),
        "encode ack": (ack_ours(count), None),
    }
    assert cases["parse delivery"][0]() == count == parse_theirs(stream)()
    assert publish_ours(count)() == publish_theirs(count)()
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in cases}
    gc.freeze()
    for _ in range(given.rounds):
        for name, pair in cases.items():
            for index, run in enumerate(pair):
                if run is not None:
                    started = time.process_time()
                    run()
                    taken[name][index].append((time.process_time() - started) * 1e6 / count)
    rows = {}
    for name, (ours, theirs) in taken.items():
        row: dict[str, float] = {
            "ours_us": statistics.median(ours),
            "ours_min_us": min(ours),
            "ours_max_us": max(ours),
        }
        if theirs:
            row["py_amqp_us"] = statistics.median(theirs)
            row["ratio"] = row["py_amqp_us"] / row["ours_us"]
        rows[name] = row
    if given.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'':16}{'ours us (min..max)':>26}{'py-amqp us':>12}{'ratio':>8}")
    for name, row in rows.items():
        spread = f"{row['ours_us']:.2f} ({row['ours_min_us']:.2f}..{row['ours_max_us']:.2f})"
        theirs_text = f"{row['py_amqp_us']:.2f}" if "py_amqp_us" in row else "-"
        ratio = f"{row['ratio']:.1f}x" if "ratio" in row else "-"
        print(f"{name:16}{spread:>26}{theirs_text:>12}{ratio:>8}")


if __name__ == "__main__":
    main()
