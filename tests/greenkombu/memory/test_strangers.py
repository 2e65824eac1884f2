"""The memory transport: what cannot or must not be decoded."""

from __future__ import annotations

import os
import pickle
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.exceptions import (
    ContentDisallowed,
    DecodeError,
    DecompressionBomb,
)
from greenkombu.messaging import Consumer
from tests.greenkombu.memory.support import declare, put


@pytest.fixture
def refused(connection: Connection, channel: Any) -> Iterator[Any]:
    """Consume from "q"; yields a function that takes one message, which must be refused."""
    declare(channel)
    errors: list[tuple[Any, Exception]] = []
    consumer = Consumer(
        channel,
        Queue("q"),
        auto_declare=False,
        callbacks=[lambda body, message: pytest.fail("it was accepted")],
        on_decode_error=lambda message, exc: errors.append((message, exc)),
    )

    def take() -> tuple[Any, Exception]:
        connection.drain_events(timeout=5)
        return errors[-1]

    with consumer:
        yield take


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_s28_a_pickle_from_a_stranger_is_not_loaded(
    channel: Any, refused: Any, tmp_path: Path
) -> None:
    target = tmp_path / "loaded"
    put(channel, pickle.dumps(Bomb(str(target))), content_type="application/x-python-serialize")
    message, error = refused()
    assert isinstance(error, ContentDisallowed)
    assert not target.exists()
    message.requeue()  # it is not lost
    assert refused()[0].delivery_info["redelivered"] is True


@pytest.mark.parametrize(
    ("body", "options", "expected"),
    [
        (b"{", {"content_type": "application/json"}, DecodeError),
        (b"[" * 100_000, {"content_type": "application/json"}, DecodeError),
        (b"\xff", {"content_type": "application/json", "content_encoding": "utf-8"}, DecodeError),
        (b"x", {"headers": {"compression": "application/x-gzip"}}, Exception),
        (b"x", {"headers": {"compression": "no such thing"}}, KeyError),
    ],
    ids=["truncated", "deep", "not UTF-8", "not zlib", "compression"],
)
def test_s27_s31_what_cannot_be_decoded_is_an_error_of_that_message_alone(
    connection: Connection, channel: Any, refused: Any, body: bytes, options: Any, expected: Any
) -> None:
    put(channel, body, content_encoding=options.pop("content_encoding", "utf-8"), **options)
    message, error = refused()
    assert isinstance(error, expected)
    assert message.body is not None
    message.reject()
    assert connection.connected
    assert not channel.unsettled


def test_s31_a_compressed_body_does_not_expand_without_bound(channel: Any, refused: Any) -> None:
    packer = zlib.compressobj(9)
    zeros = bytes(1024 * 1024)
    packed = b"".join([*(packer.compress(zeros) for _ in range(200)), packer.flush()])
    put(channel, packed, headers={"compression": "application/x-gzip"})
    tracemalloc.start()
    try:
        message, error = refused()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(error, DecompressionBomb)
    assert len(message.body) == len(packed)
    assert peak < 180 * 1024 * 1024
    message.ack()
