"""Kombu 5.7 and greenkombu declare the same topology for native delayed delivery."""

from __future__ import annotations

import inspect
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

import greenkombu
from greenkombu.transport import native_delayed_delivery as ours
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from tests.differential import delayed_delivery
from tests.differential.reference import Raised, call_kombu, kombu_python

ROOT = Path(__file__).parents[2]
MODULE = "kombu.transport.native_delayed_delivery"

#: A key that was delayed already.
DELAYED = ours.calculate_routing_key(5, "x.y")


def topology(server: PrivateRabbitMQ, vhost: str) -> dict[str, list[Any]]:
    """Return what is declared in a virtual host."""
    wanted = {
        "exchanges": ("name", "type", "durable", "auto_delete", "internal", "arguments"),
        "queues": ("name", "durable", "auto_delete", "exclusive", "arguments"),
        "bindings": ("source", "destination", "destination_type", "routing_key", "arguments"),
    }
    found = {}
    for kind, names in wanted.items():
        listed = server.manage("GET", f"/api/{kind}/{vhost}")
        found[kind] = sorted(({name: each[name] for name in names} for each in listed), key=str)
    return found


@pytest.mark.parametrize(("queue_type", "prefix"), [("quorum", ""), ("classic", "own")])
def test_the_same_topology(rabbitmq: PrivateRabbitMQ, queue_type: str, prefix: str) -> None:
    python = kombu_python()
    vhosts = [f"delayed-{os.urandom(4).hex()}" for _ in range(2)]
    urls = [rabbitmq.add_vhost(name) for name in vhosts]
    try:
        command = [python, "-W", "ignore", "-m", "tests.differential.delayed_delivery", "kombu"]
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
        done = subprocess.run(
            [*command, urls[0], queue_type, prefix],
            cwd=ROOT,
            env=variables,
            capture_output=True,
            text=True,
            timeout=90,
        )
        # Its traceback would show lines of its source.
        assert done.returncode == 0, done.stderr.strip().rpartition("\n")[2]
        delayed_delivery.declare(greenkombu, ours, urls[1], queue_type, prefix)
        theirs, mine = (topology(rabbitmq, vhost) for vhost in vhosts)
        assert mine["exchanges"] == theirs["exchanges"]
        assert mine["queues"] == theirs["queues"]
        assert mine["bindings"] == theirs["bindings"]
        assert len(mine["queues"]) == 28 + 8
    finally:
        for vhost in vhosts:
            rabbitmq.delete_vhost(vhost)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    *(("level_name", each) for each in [(0,), (27,), (28,), (-1,), (3, "p"), (3, ""), (3, None)]),
    *(
        ("calculate_routing_key", each)
        for each in [
            *((countdown, "a.b") for countdown in (1, 2, 10, 2**27, 2**28 - 1, True)),
            *((countdown, "a.b") for countdown in (0, -1, 0.5, 1.5, "3", None)),
            *((3, key) for key in (DELAYED, "0.1.k", DELAYED[:-3], "", None)),
        ]
    ),
]


def test_the_same_results() -> None:
    theirs = call_kombu([(f"{MODULE}:{name}", arguments, {}) for name, arguments in CALLS])
    for (name, arguments), expected in zip(CALLS, theirs, strict=True):
        try:
            found: Any = getattr(ours, name)(*arguments)
        except Exception as error:
            found = type(error).__name__
        if isinstance(expected, Raised):
            expected = expected.kinds[0]
        assert found == expected, (name, arguments)


def test_the_same_names_and_signatures() -> None:
    names = list(ours.__all__)
    done = subprocess.run(
        [kombu_python(), "-W", "ignore", "-c", _DESCRIBE, *names],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [_describe(getattr(ours, name)) for name in names]


_DESCRIBE = """
import inspect, sys
import kombu.transport.native_delayed_delivery as module
for name in sys.argv[1:]:
    value = getattr(module, name)
    print(list(inspect.signature(value).parameters) if callable(value) else value)
"""


def _describe(value: Any) -> str:
    return str(list(inspect.signature(value).parameters) if callable(value) else value)
