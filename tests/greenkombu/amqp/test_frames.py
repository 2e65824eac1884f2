"""What goes out: the bytes py-amqp would write, in one piece, cut by frame_max."""

from __future__ import annotations

from struct import pack
from typing import Any

import amqp
import pytest
from amqp import spec
from amqp.method_framing import frame_writer
from amqp.serialization import dumps
from hypothesis import given
from hypothesis import strategies as st

from greenkombu._amqp import errors, frames, methods
from greenkombu._amqp.message import Outgoing

from . import streams


def written_by_py_amqp(message: amqp.Message, frame_max: int, *arguments: Any) -> bytes:
    class Owner:
        bytes_sent = 0

    Owner.frame_max = frame_max  # type: ignore[attr-defined]
    out: list[bytes] = []
    Owner.write = lambda self, data: out.append(bytes(data))  # type: ignore[attr-defined]
    owner = Owner()
    encoded = dumps("Bssbb", (0, *arguments))
    frame_writer(owner, owner)(1, 5, spec.Basic.Publish, encoded, message)
    return b"".join(out)


def written(message: Any, frame_max: int, *arguments: Any) -> bytes | list[bytes]:
    publisher = frames.Publisher(5, frame_max)
    body = frames.body_bytes(message.body, message.properties)
    return publisher.encode(frames.property_bytes(message.properties), body, *arguments)


@given(
    streams.properties,
    st.binary(min_size=1, max_size=20000),
    streams.short_text,
    streams.short_text,
    st.booleans(),
)
def test_publish_has_py_amqps_bytes(
    properties: dict[str, Any], body: bytes, exchange: str, routing_key: str, mandatory: bool
) -> None:
    message = amqp.Message(body, **properties)
    arguments = (exchange, routing_key, mandatory, False)
    for frame_max in (4096, 131072):
        ours = written(message, frame_max, *arguments)
        # py-amqp writes an empty body as no frame, and so do we; a body that just fits goes out in
        # one frame either way, but its test for that counts the whole message.
        assert ours == written_by_py_amqp(message, frame_max, *arguments)


def test_a_large_body_goes_out_in_parts_that_are_no_copies() -> None:
    message = amqp.Message(bytes(range(256)) * 4097)
    parts = written(message, 131072, "ex", "key", False, False)
    assert isinstance(parts, list)
    assert b"".join(parts) == written_by_py_amqp(message, 131072, "ex", "key", False, False)
    assert sum(len(part) for part in parts if isinstance(part, bytes)) < 500
    views = [part for part in parts if isinstance(part, memoryview)]
    assert {id(view.obj) for view in views} == {id(message.body)}


def test_empty_body_is_a_header_alone() -> None:
    data = written(amqp.Message(b""), 131072, "", "queue", False, False)
    assert data.endswith(pack(">BHIHHQH", 2, 5, 14, 60, 0, 0, 0) + b"\xce")


def test_text_body_is_encoded_and_says_how() -> None:
    message = amqp.Message("h\xe9")
    assert b"h\xc3\xa9" in written(message, 131072, "", "queue", False, False)
    assert message.properties["content_encoding"] == "utf-8"
    message = amqp.Message("h\xe9", content_encoding="latin-1")
    assert b"h\xe9" in written(message, 131072, "", "queue", False, False)


@pytest.mark.parametrize(
    ("body", "encoding", "text"),
    [
        ("h\xe9", "ascii", "cannot be encoded by content_encoding 'ascii'"),
        ("x", "no-such-codec", "no-such-codec"),
        ({"a": 1}, None, "must be bytes or str, not dict"),
    ],
)
def test_body_that_cannot_be_sent_is_refused(body: Any, encoding: str, text: str) -> None:
    with pytest.raises(errors.ArgumentError, match=text):
        frames.body_bytes(body, {"content_encoding": encoding})


@pytest.mark.parametrize(
    ("given_properties", "headers"),
    [(None, None), ({"delivery_mode": 2}, {}), ({"delivery_mode": 1}, {"a": 1}), ({}, {"b": [1]})],
)
def test_prepared_message_is_encoded_alike_before_and_after_its_dict_exists(
    given_properties: dict[str, Any] | None, headers: dict[str, Any] | None
) -> None:
    arguments = (b"x", 3, "text/plain", "utf-8", headers, given_properties)
    early = Outgoing(*arguments).property_bytes()
    assert Outgoing(*arguments).property_bytes() == early  # from the cache
    late = Outgoing(*arguments)
    expected = {
        "priority": 3,
        "content_type": "text/plain",
        "content_encoding": "utf-8",
        "application_headers": headers,
        **(given_properties or {}),
    }
    assert late.properties == expected
    assert late.property_bytes() == early
    theirs = amqp.Message(**expected)
    assert theirs._serialize_properties() == early
    assert isinstance(late, amqp.Message)


def test_prepared_message_takes_changes_of_its_dict() -> None:
    message = Outgoing(b"x", None, "text/plain", None, {}, {"delivery_mode": 2})
    message.property_bytes()
    message.properties["delivery_mode"] = 1
    assert (
        message.property_bytes()
        == amqp.Message(
            content_type="text/plain", application_headers={}, delivery_mode=1
        )._serialize_properties()
    )
    assert message.delivery_mode == 1
    assert message.delivery_info is None


def test_caches_are_bounded() -> None:
    publisher = frames.Publisher(1, 131072)
    for number in range(1000):
        publisher.encode(b"\0\0", b"x", "", f"queue{number}")
        frames.property_bytes({"type": f"t{number}"})
    assert len(publisher._methods) <= frames.CACHE_ENTRIES
    assert len(frames.property_sets) <= frames.CACHE_ENTRIES


@pytest.mark.parametrize(
    ("made", "signature", "fmt", "values"),
    [
        (frames.encode_ack(7, 99, True), (60, 80), "Lb", (99, True)),
        (frames.encode_ack(7, 99), (60, 80), "Lb", (99, False)),
        (frames.encode_reject(7, 2**64 - 1, True), (60, 90), "Lb", (2**64 - 1, True)),
        (frames.encode_nack(7, 5, True, False), (60, 120), "Lbb", (5, True, False)),
        (frames.encode_nack(7, 5, False, True), (60, 120), "Lbb", (5, False, True)),
        (frames.encode_method(7, methods.BY_SIGNATURE[20, 41]), (20, 41), "", ()),
    ],
)
def test_methods_have_py_amqps_bytes(
    made: bytes, signature: tuple[int, int], fmt: str, values: tuple[Any, ...]
) -> None:
    assert made == streams.method(7, signature, fmt, *values)


def test_over_long_routing_key_is_refused() -> None:
    publisher = frames.Publisher(1, 131072)
    with pytest.raises(errors.ArgumentError, match=r"Basic.publish: routing_key is 256 octets"):
        publisher.encode(b"\0\0", b"x", "", "k" * 256)
