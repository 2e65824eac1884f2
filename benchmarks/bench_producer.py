"""What `Producer.publish` and `Consumer` cost by themselves, over a channel that does nothing.

Run: ``python benchmarks/bench_producer.py [--seconds N]``.

Each row is CPU time per message, in µs, the smallest of several runs: "all" is the whole call,
"channel" the two calls into the empty channel, "serializer" the encoding of the body alone, and
"ours" what is left, which is the number to watch.  Target: at most 3 µs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from greenkombu.entity import Exchange, Queue
from greenkombu.message import Message
from greenkombu.messaging import Consumer, Producer
from greenkombu.serialization import dumps

BODY = {"id": "0d9b5b6e", "task": "resize", "args": [1, 2, 3], "path": "/media/cat.jpg"}


class NullChannel:
    """Takes everything."""

    closed = False
    connection = None
    no_ack_consumers: set[str] | None = None

    def __init__(self) -> None:
        self.connection = SimpleNamespace(client=SimpleNamespace(declared_entities=set()))

    def prepare_message(
        self,
        body: Any,
        priority: Any = None,
        content_type: Any = None,
        content_encoding: Any = None,
        headers: Any = None,
        properties: Any = None,
    ) -> Any:
        return body

    def basic_publish(
        self,
        message: Any,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
    ) -> None:
        return None

    def basic_consume(self, **kwargs: Any) -> None:
        self.deliver = kwargs["callback"]

    def basic_ack(self, tag: Any, multiple: bool = False) -> None:
        return None

    def exchange_declare(self, **kwargs: Any) -> None:
        return None

    def queue_declare(self, **kwargs: Any) -> tuple[str, int, int]:
        return kwargs["queue"], 0, 0

    def queue_bind(self, **kwargs: Any) -> None:
        return None


def microseconds(work: Callable[[int], None], seconds: float) -> float:
    """Return the least CPU time of one of *work*'s rounds, in µs."""
    rounds, best = 2000, float("inf")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.process_time()
        work(rounds)
        best = min(best, (time.process_time() - started) / rounds * 1e6)
    return best


def publishing(producer: Producer, body: Any, **options: Any) -> Callable[[int], None]:
    def work(rounds: int) -> None:
        publish = producer.publish
        for _ in range(rounds):
            publish(body, **options)

    return work


def calling(channel: NullChannel) -> Callable[[int], None]:
    def work(rounds: int) -> None:
        headers: dict[str, Any] = {}
        properties: dict[str, Any] = {}
        for _ in range(rounds):
            message = channel.prepare_message(b"", 0, "text/plain", "utf-8", headers, properties)
            channel.basic_publish(
                message, exchange="e", routing_key="rk", mandatory=False, immediate=False
            )

    return work


def serializing(body: Any) -> Callable[[int], None]:
    def work(rounds: int) -> None:
        for _ in range(rounds):
            dumps(body, None)

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    seconds = parser.parse_args().seconds

    channel = NullChannel()
    empty = microseconds(calling(channel), seconds)
    producer = Producer(channel, Exchange("news"), "rk")
    queue = Queue("q", Exchange("news"), "rk")
    print(f"{'':34}{'all':>8}{'channel':>9}{'serializer':>12}{'ours':>8}   µs")
    for name, body, options in (
        ("bytes", b"x" * 100, {}),
        ("text", "x" * 100, {}),
        ("JSON", BODY, {}),
        ("JSON, exchange by name", BODY, {"exchange": "other"}),
        ("JSON, headers and properties", BODY, {"headers": {"h": 1}, "correlation_id": "c"}),
        ("JSON, declare (done before)", BODY, {"declare": [queue]}),
        ("JSON, timeout", BODY, {"timeout": 5.0}),
    ):
        whole = microseconds(publishing(producer, body, **options), seconds)
        encoding = microseconds(serializing(body), seconds)
        ours = whole - empty - encoding
        print(f"{'publish ' + name:34}{whole:8.2f}{empty:9.2f}{encoding:12.2f}{ours:8.2f}")

    consumer = Consumer(channel, Queue("q"), callbacks=[lambda body, message: message.ack()])
    consumer.consume()

    def receive(rounds: int) -> None:
        deliver = channel.deliver
        for tag in range(rounds):
            deliver(
                Message(
                    b'{"a": 1}', tag, "application/json", "utf-8", {"consumer_tag": "c"}, {}, {},
                    channel=channel,
                )
            )  # fmt: skip

    print(f"{'receive JSON and ack':34}{microseconds(receive, seconds):8.2f}")


if __name__ == "__main__":
    main()
