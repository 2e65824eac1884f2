"""The side of `test_delayed_delivery` that runs on Kombu, or on greenkombu.

Run: ``python -m tests.differential.delayed_delivery PACKAGE URL QUEUE_TYPE PREFIX`` in the root of
the project.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

__all__ = ["declare"]


def _queues(kombu: Any) -> list[Any]:
    """Return queues on exchanges of all types, by one binding and by several."""
    Exchange, Queue, binding = kombu.Exchange, kombu.Queue, kombu.binding
    several = [
        binding(Exchange("x-b1", "topic"), routing_key="b1", arguments={"z": 1}),
        binding(Exchange("x-b2", "topic"), routing_key="b2.#"),
        binding(Exchange("x-b3", "direct"), routing_key="b3"),
    ]
    return [
        Queue("q-topic", Exchange("x-topic", "topic"), routing_key="a.b"),
        Queue("q-no-key", Exchange("x-no-key", "topic")),
        Queue("q-direct", Exchange("x-direct", "direct"), routing_key="d"),
        Queue("q-fanout", Exchange("x-fanout", "fanout"), routing_key="f"),
        Queue("q-headers", Exchange("x-headers", "headers"), binding_arguments={"a": 1}),
        Queue("q-bindings", several),
        Queue("q-both", Exchange("x-own", "topic"), routing_key="own", bindings=several[1:]),
        Queue("q-no-exchange"),
    ]


def declare(kombu: Any, delayed: Any, url: str, queue_type: str, prefix: str) -> None:
    """Declare the topology, and bind queues to it.

    Args:
        kombu: the package.
        delayed: its module `transport.native_delayed_delivery`.
    """
    with kombu.Connection(url) as connection:
        delayed.declare_native_delayed_delivery_exchanges_and_queues(
            connection, queue_type, prefix or None
        )
        channel = connection.channel()
        for queue in _queues(kombu):
            for each in queue.bindings:
                each.exchange(channel).declare()
            queue(channel).declare()
            delayed.bind_queue_to_native_delayed_delivery_exchange(connection, queue, prefix)


if __name__ == "__main__":
    name, *arguments = sys.argv[1:]
    declare(
        importlib.import_module(name),
        importlib.import_module(f"{name}.transport.native_delayed_delivery"),
        *arguments,
    )
