"""The side of `test_interop_rabbitmq` that runs on Kombu, or on greenkombu.

Run: ``python -m tests.differential.interop PACKAGE publish|consume URL`` in the root of the
project; writes JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from typing import Any

from tests.differential.programs.lab import show

EXCHANGE, QUEUE, KEY = "interop", "interop", "key"
ACCEPT = ["json", "pickle", "yaml", "msgpack", "text/plain", "application/data", "text/x"]

#: Name of a case -> (body, arguments of publish).
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{
        f"serializer {name}": ({"a": [1, 2.5, None, True, "é"]}, {"serializer": name})
        for name in ("json", "pickle", "yaml", "msgpack")
    },
    "raw": (b"\x00\xff", {"serializer": "raw"}),
    "text": ("tëxt", {}),
    "octets": (b"\xfe\x00", {}),
    "no octets": (b"", {}),
    "no text": ("", {}),
    "number": (3, {}),
    "null": (None, {}),
    "large text": ("x" * 300_000, {}),
    "large octets": (b"\xfe" * 300_000, {}),
    "own type": ("é", {"content_type": "text/x", "content_encoding": "utf-8"}),
    **{
        f"compression {name} {type(body).__name__}": (body, {"compression": name})
        for name in ("zlib", "gzip", "bzip2", "lzma", "brotli", "zstd")
        for body in ({"a": "x" * 100}, "x" * 100, b"\xff" * 100)
    },
    **{
        f"headers {number}": ("x", {"headers": headers})
        for number, headers in enumerate(
            (
                {"text": "é", "flag": True, "none": None, "number": 1},
                {"deep": {"list": [1, "two", {"three": 3}]}},
                {"big": 2**40, "negative": -(2**31), "float": 1.5},
                {"": "no name", "long": "y" * 300},
            )
        )
    },
    **{
        f"property {name} {value}": ("x", {name: value})
        for name, value in (
            ("correlation_id", "c"),
            ("reply_to", "r"),
            ("message_id", "m"),
            ("timestamp", 1234567890),
            ("type", "t"),
            ("app_id", "a"),
            ("user_id", "guest"),
            ("cluster_id", "k"),
            ("delivery_mode", 1),
            ("delivery_mode", "persistent"),
        )
    },
    **{f"priority {priority}": ("x", {"priority": priority}) for priority in (None, 0, 5, 9)},
    **{f"expiration {value}": ("x", {"expiration": value}) for value in (60, 100.5, 86400)},
    "everything": (
        {"a": 1},
        {
            "serializer": "pickle",
            "compression": "bzip2",
            "headers": {"h": [1]},
            "priority": 3,
            "expiration": 600,
            "correlation_id": "c",
            "reply_to": "r",
            "delivery_mode": 1,
        },
    ),
}


def declare(package: Any, connection: Any) -> Any:
    queue = package.Queue(QUEUE, package.Exchange(EXCHANGE, "topic"), KEY, max_priority=10)
    bound = queue(connection.default_channel)
    bound.declare()
    return bound


def publish(package: Any, connection: Any) -> dict[str, str]:
    """Publish each case with a header that names it; return how that went."""
    queue = declare(package, connection)
    done = {}
    with connection.Producer(exchange=queue.exchange, routing_key=KEY) as producer:
        for name, (body, options) in CASES.items():
            headers = {**options.get("headers", {}), "case": name}
            try:
                producer.publish(body, **{**options, "headers": headers})
                done[name] = "published"
            except Exception as exc:
                done[name] = f"{type(exc).__name__}"
    return done


def consume(package: Any, connection: Any) -> dict[str, Any]:
    """Take what is in the queue, by a consumer and by get; return what was seen of each."""
    queue = declare(package, connection)
    seen: dict[str, Any] = {}

    def take(message: Any) -> None:
        shown = show(message)
        if len(shown["payload"][1]) > 1000:
            shown["payload"][1] = len(shown["payload"][1])
            shown["body"] = len(message.body)
        shown["delivery_info"].pop("consumer_tag", None)
        seen[message.headers["case"]] = shown
        message.ack()

    for _ in range(5):
        message = queue.get(accept=ACCEPT)
        if message is None:
            break
        message.delivery_info.pop("message_count", None)
        take(message)
    channel = connection.channel()

    def cannot(message: Any, exc: Exception) -> None:
        seen[message.headers["case"]] = f"cannot read: {exc!r}"
        message.ack()

    with package.Consumer(
        channel,
        queue,
        on_message=take,
        on_decode_error=cannot,
        accept=ACCEPT,
        prefetch_count=10,
    ):
        deadline = time.monotonic() + 30
        quiet = 0
        while quiet < 2 and time.monotonic() < deadline:
            try:
                connection.drain_events(timeout=0.25)
            except TimeoutError:
                quiet += 1  # once may be a machine that stood still
            else:
                quiet = 0
    return seen


def main(name: str, what: str, url: str) -> None:
    package = importlib.import_module(name)
    # No line of Kombu's source in a failing test's output.
    sys.excepthook = lambda kind, exc, _: sys.stderr.write(f"{kind.__name__}: {exc}\n") and None
    with package.Connection(url) as connection:
        seen = {"publish": publish, "consume": consume}[what](package, connection)
    json.dump(seen, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
