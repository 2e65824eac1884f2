"""The parser against py-amqp's frame handler, cut anywhere; and against every kind of garbage."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise
from struct import pack
from typing import Any

import pytest
from amqp.method_framing import frame_handler
from amqp.serialization import loads
from hypothesis import given
from hypothesis import strategies as st

from greenkombu._amqp import errors, frames, methods
from greenkombu._amqp.protocol import Confirmation, Delivery, MethodEvent, Parser, joined
from greenkombu._amqp.values import decode_properties

from . import streams


def decoded_by_py_amqp(stream: bytes) -> list[tuple[Any, ...]]:
    class Owner:
        bytes_recv = 0

    seen: list[tuple[Any, ...]] = []

    def on_method(channel_id: int, signature: Any, payload: bytes, message: Any) -> None:
        fmt = methods.BY_SIGNATURE[signature].formats
        arguments = loads(fmt, payload, 4)[0]
        if message is None:
            seen.append((channel_id, signature, *arguments))
        else:
            seen.append((channel_id, signature, *arguments, message.properties, message.body))

    handle = frame_handler(Owner(), on_method)
    position = 0
    while position < len(stream):
        kind, channel_id = stream[position], int.from_bytes(stream[position + 1 : position + 3])
        size = int.from_bytes(stream[position + 3 : position + 7])
        handle((kind, channel_id, stream[position + 7 : position + 7 + size]))
        position += size + 8
    return seen


def plain(event: Any) -> tuple[Any, ...]:
    """Write one of our events in the form of `decoded_by_py_amqp`."""
    if isinstance(event, Delivery):
        return (
            event.channel_id,
            (60, 60),
            event.consumer_tag,
            event.delivery_tag,
            event.redelivered,
            event.exchange,
            event.routing_key,
            event.properties,
            event.body or "",
        )
    if isinstance(event, Confirmation):
        signature = (60, 80) if event.positive else (60, 120)
        arguments = (event.delivery_tag, event.multiple)
        # The broker's basic.nack has a third bit that means nothing to a client.
        return (event.channel_id, signature, *arguments) + ((False,) if not event.positive else ())
    assert isinstance(event, MethodEvent)
    head = (event.channel_id, event.method.signature, *event.arguments)
    if event.content is None:
        return head
    return (*head, decode_properties(event.content.header), event.content.body or "")


def fed(blocks: list[bytes], **options: Any) -> tuple[list[Any], Parser]:
    parser = Parser(**options)
    events = [event for block in blocks for event in parser.feed(block)]
    return events, parser


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[start:stop] for start, stop in pairwise(marks)]


@given(streams.conversations(), st.lists(st.integers(0, 10**6), max_size=12))
def test_any_cut_gives_the_frames_of_py_amqp(stream: bytes, places: list[int]) -> None:
    events, parser = fed(cut(stream, places))
    assert parser.error is None
    assert [plain(event) for event in events] == decoded_by_py_amqp(stream)


@given(streams.conversations())
def test_one_octet_at_a_time_gives_the_same(stream: bytes) -> None:
    whole, _ = fed([stream])
    single, _ = fed([stream[at : at + 1] for at in range(len(stream))])
    assert [plain(event) for event in single] == [plain(event) for event in whole]


@pytest.mark.parametrize(
    ("octets", "pieces"), [(0, False), (300_000, False), (1_048_577, True)], ids=repr
)
@pytest.mark.parametrize("method", ["Basic.deliver", "Basic.get_ok"])
def test_a_large_body_is_joined_by_whoever_looks_at_it(
    octets: int, pieces: bool, method: str
) -> None:
    body = (bytes(range(256)) * (octets // 256 + 1))[:octets]
    arguments = ("tag", 1, False, "", "key") if method == "Basic.deliver" else (1, False, "", "", 0)
    stream = b"".join(
        (
            frames.encode_method(1, methods.BY_NAME[method], arguments),
            *frames.encode_content(1, b"\0\0", body, 131072),
        )
    )
    made: list[Any] = []
    (event,), _ = fed(
        [stream[at : at + 262144] for at in range(0, len(stream), 262144)],
        message=lambda *given: made.append(given[7]) or Delivery(*given),
        frame_max=131072,
    )
    given = made[0] if made else event.content.body
    assert isinstance(given, list) is pieces
    if made:
        assert event.size == octets
        assert event.body == body
        event.body = b"another"
        assert (event.body, event.size) == (b"another", 7)
    else:
        assert joined(given) == body


@given(st.binary(max_size=400), st.lists(st.integers(0, 10**6), max_size=4))
def test_random_bytes_never_raise(data: bytes, places: list[int]) -> None:
    events, parser = fed(cut(data, places))
    assert parser.error is None or isinstance(parser.error, errors.ProtocolError)
    for event in events:
        assert isinstance(event, (Delivery, Confirmation, MethodEvent))


@given(
    streams.conversations().filter(bool),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6),
    st.lists(st.integers(0, 10**6), max_size=4),
)
def test_mutated_streams_give_the_typed_error_or_events_and_the_same_for_any_cut(
    stream: bytes, changes: list[tuple[int, int]], places: list[int]
) -> None:
    data = bytearray(stream)
    for place, octet in changes:
        data[place % len(data)] = octet
    mutated = bytes(data)
    whole, first = fed([mutated])
    pieces, second = fed(cut(mutated, places))
    assert isinstance(first.error, (errors.ProtocolError, type(None)))
    assert str(first.error) == str(second.error)
    assert len(whole) == len(pieces)
    for one, other in zip(whole, pieces, strict=True):
        assert type(one) is type(other)
        for each in (one, other):
            try:
                plain(each)
            except errors.MalformedValueError:
                pass


SOUND = b"".join(streams.deliver(1, 1, b"body"))


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        (streams.frame(1, 1, b"\0\x32\0\x0b", end=0), errors.BadFrameError, "ends with octet 0x00"),
        (streams.frame(9, 4, b"abc"), errors.BadFrameError, "unknown type 9 on channel 4"),
        (pack(">BHI", 3, 7, 1 << 30), errors.BadFrameError, "1073741832 octets; the limit is"),
        (streams.method(2, (50, 99)), errors.UnknownMethodError, "method 50.99 on channel 2"),
        (streams.frame(1, 1, b"\0"), errors.BadFrameError, "only 1 octets"),
        (
            streams.frame(1, 1, b"\0\x32\0\x0b\xffq"),
            errors.MalformedValueError,
            "Queue.declare_ok: queue: a short string is cut off",
        ),
        (streams.frame(2, 1, bytes(14)), errors.UnexpectedFrameError, "without a method"),
        (streams.frame(3, 1, b"x"), errors.UnexpectedFrameError, "without a content header"),
        (
            streams.deliver(1, 2, b"b")[0] + streams.method(1, (50, 21)),
            errors.UnexpectedFrameError,
            "Queue.bind_ok on channel 1 in the middle of the content of Basic.deliver",
        ),
        (
            b"".join(streams.deliver(1, 2, b"b")[:2]) + streams.deliver(1, 2, b"b")[1],
            errors.UnexpectedFrameError,
            "second content header",
        ),
        (
            b"".join(streams.deliver(1, 2, b"b")[:2]) + streams.frame(3, 1, b"bb"),
            errors.BadFrameError,
            "longer than the 1 octets",
        ),
        (
            streams.deliver(1, 2, b"")[0] + streams.frame(2, 1, pack(">HHQH", 50, 0, 0, 0)),
            errors.UnexpectedFrameError,
            "content header of class 50",
        ),
        (
            streams.deliver(1, 2, b"")[0] + streams.frame(2, 1, b"\0\x3c"),
            errors.MalformedValueError,
            "only 2 octets",
        ),
        (
            streams.frame(1, 1, b"\0\x3c\0\x3c\x03tag" + bytes(9) + b"\x05e") + SOUND,
            errors.MalformedValueError,
            "Basic.deliver",
        ),
    ],
)
def test_fault_is_typed_named_and_final(bad: bytes, error: type[Exception], text: str) -> None:
    events, parser = fed([SOUND + bad])
    assert [event.body for event in events] == [b"body"]
    assert isinstance(parser.error, error)
    assert isinstance(parser.error, errors.ProtocolError)
    assert text in str(parser.error)
    assert parser.feed(SOUND) == []


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"\x15\x03\x03\x00\x02\x02\x28", "TLS"),
        (b"HTTP/1.1 400 Bad Request\r\n", "HTTP"),
        (b"AMQP\x00\x01\x00\x00", "AMQP version 1.0.0"),
    ],
)
def test_foreign_protocol_is_recognized_by_its_first_words(said: bytes, text: str) -> None:
    whole = str(fed([said])[1].error)
    assert text in whole
    for place in range(len(said)):
        _, parser = fed([said[:place], said[place:]])
        assert isinstance(parser.error, errors.ForeignProtocolError)
        assert str(parser.error) == whole


def test_frame_may_be_as_large_as_was_agreed_and_no_larger() -> None:
    body = b"x" * (4096 - 8)
    good = b"".join(streams.deliver(1, 1, body, chunk=4088))
    events, parser = fed([good], frame_max=4096)
    assert parser.error is None
    assert events[0].body == body
    bad = b"".join(streams.deliver(1, 1, body + b"x"))
    events, parser = fed([bad], frame_max=4096)
    assert isinstance(parser.error, errors.BadFrameError)


@pytest.mark.parametrize("chunk", [10, 131064])
def test_too_large_body_is_dropped_and_named_and_the_next_message_arrives(chunk: int) -> None:
    stream = b"".join(
        streams.deliver(1, 1, b"x" * 100, chunk=chunk) + streams.deliver(1, 2, b"small")
    )
    for blocks in ([stream], [stream[at : at + 7] for at in range(0, len(stream), 7)]):
        events, parser = fed(blocks, max_message_size=64)
        assert parser.error is None
        first, second = events
        assert first.body is None
        assert isinstance(first.fault, errors.MessageTooLarge)
        assert "100 octets; the limit is 64" in str(first.fault)
        assert (second.body, second.fault) == (b"small", None)


def test_announced_sizes_allocate_nothing() -> None:
    """A header that promises 100 MB, on many channels, costs only what was sent."""
    parser = Parser()
    tracemalloc.start()
    try:
        for channel_id in range(1, 200):
            parser.feed(streams.deliver(channel_id, 1, b"")[0])
            parser.feed(streams.frame(2, channel_id, pack(">HHQH", 60, 0, 100_000_000, 0)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert parser.error is None
    assert peak < 1_000_000


def test_unfinished_messages_together_are_bounded() -> None:
    parser = Parser(frame_max=4096, max_message_size=10_000)
    for channel_id in range(1, 1000):
        head, header, *_ = streams.deliver(channel_id, 1, b"x" * 10_000)
        parser.feed(head + header + streams.frame(3, channel_id, b"x" * 4000))
        if parser.error is not None:
            break
    assert isinstance(parser.error, errors.ProtocolError)
    assert "unfinished messages" in str(parser.error)
    assert channel_id < 20


def test_large_body_in_small_blocks_takes_linear_time() -> None:
    body = bytes(4_000_000)
    stream = b"".join(streams.deliver(1, 1, body))
    # With a buffer that is copied for each block this would be 128 KiB x 500 blocks x 30 frames.
    events, parser = fed([stream[at : at + 256] for at in range(0, len(stream), 256)])
    assert parser.error is None
    assert events[0].body == body


def test_messages_come_out_of_the_callers_factory() -> None:
    made = []
    parser = Parser(message=lambda *arguments: made.append(arguments) or "made")
    assert parser.feed(SOUND) == ["made"]
    assert made == [(1, "ctag", 1, False, "", "queue", b"\0\0", b"body")]
