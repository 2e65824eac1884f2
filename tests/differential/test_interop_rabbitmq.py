"""Kombu 5.7 and greenkombu on one RabbitMQ: what one publishes the other consumes, both ways."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import greenkombu
from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
from tests.differential import interop
from tests.differential.reference import kombu_python

ROOT = Path(__file__).parents[2]
Seen = dict[str, Any]

#: Kombu reads an empty body as text, whatever its type; ours gives back what was published.
KOMBUS_OWN = {"no octets"}


def kombu(what: str, url: str) -> Any:
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        [kombu_python(), "-W", "ignore", "-m", "tests.differential.interop", "kombu", what, url],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def ours(what: str, url: str) -> Any:
    with greenkombu.Connection(url) as connection:
        return getattr(interop, what)(greenkombu, connection)


@pytest.fixture(scope="module")
def seen(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """What each side says of its publishes, and who sees what of whose messages."""
    kombu_python()
    rabbitmq: PrivateRabbitMQ = request.getfixturevalue("rabbitmq")
    name = f"interop-{os.urandom(4).hex()}"
    url = rabbitmq.add_vhost(name)
    try:
        found = {}
        for publisher, publish in (("kombu", kombu), ("greenkombu", ours)):
            for consumer, consume in (("kombu", kombu), ("greenkombu", ours)):
                found[f"{publisher} publishes"] = publish("publish", url)
                found[f"{publisher} to {consumer}"] = consume("consume", url)
        yield found
    finally:
        rabbitmq.delete_vhost(name)


pytestmark = pytest.mark.allow_leaks("the fixture of the module runs processes")


def test_both_can_publish_the_same(seen: dict[str, Seen]) -> None:
    # A codec that Kombu's interpreter lacks shows as an error there.
    missing = {k for k, v in seen["kombu publishes"].items() if v != "published"}
    assert all(name.startswith("compression") for name in missing), missing
    theirs = {k: v for k, v in seen["kombu publishes"].items() if k not in missing}
    assert {k: seen["greenkombu publishes"][k] for k in theirs} == theirs


@pytest.mark.parametrize("name", interop.CASES)
@pytest.mark.parametrize("publisher", ["kombu", "greenkombu"])
def test_a_message_is_the_same_to_both(seen: dict[str, Seen], publisher: str, name: str) -> None:
    if seen[f"{publisher} publishes"][name] != "published":
        pytest.skip(f"{publisher} cannot publish this: {seen[f'{publisher} publishes'][name]}")
    if seen["kombu publishes"][name] != "published":
        pytest.skip(f"Kombu has no codec for this: {seen['kombu publishes'][name]}")
    theirs = seen[f"{publisher} to kombu"][name]
    mine = seen[f"{publisher} to greenkombu"][name]
    if name in KOMBUS_OWN:
        assert mine["payload"] == ["bytes", "b''"]
        theirs["payload"] = mine["payload"]
        theirs["body"] = mine["body"]
    assert mine == theirs


@pytest.mark.parametrize("name", interop.CASES)
def test_both_write_the_same(seen: dict[str, Seen], name: str) -> None:
    if "published" not in (seen["kombu publishes"][name],):
        pytest.skip(f"Kombu has no codec for this: {seen['kombu publishes'][name]}")
    theirs = seen["kombu to kombu"][name]
    mine = seen["greenkombu to kombu"][name]
    if "compression" in mine["headers"]:
        # The same text may be compressed to other octets; what counts is that it is read.
        assert (mine["payload"], mine["headers"]) == (theirs["payload"], theirs["headers"])
    else:
        assert mine == theirs


@pytest.mark.parametrize("publisher", ["kombu", "greenkombu"])
@pytest.mark.parametrize("consumer", ["kombu", "greenkombu"])
def test_what_was_published_is_what_is_read(
    seen: dict[str, Seen], publisher: str, consumer: str
) -> None:
    found = seen[f"{publisher} to {consumer}"]
    for name, (body, _) in interop.CASES.items():
        if seen[f"{publisher} publishes"][name] != "published" or name in KOMBUS_OWN:
            continue
        if consumer == "kombu" and seen["kombu publishes"][name] != "published":
            continue  # it has no codec for this
        assert isinstance(found[name], dict), f"{name}: {found[name]}"
        expected = repr(body)
        kind, text = found[name]["payload"]
        assert kind == type(body).__name__
        assert text == expected if isinstance(text, str) else text == len(expected)
