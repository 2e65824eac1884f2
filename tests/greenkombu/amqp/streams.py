"""Byte streams for codec tests: frames written by hand, and strategies that make them."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from struct import pack
from typing import Any

import amqp
from amqp.serialization import dumps
from hypothesis import strategies as st

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8


def frame(kind: int, channel_id: int, payload: bytes, end: int = 0xCE) -> bytes:
    return pack(">BHI", kind, channel_id, len(payload)) + payload + bytes([end])


def method(channel_id: int, signature: tuple[int, int], fmt: str = "", *values: Any) -> bytes:
    arguments = dumps(fmt, values) if fmt else b""
    return frame(METHOD, channel_id, pack(">HH", *signature) + arguments)


def content(
    channel_id: int, body: bytes, properties: dict[str, Any], chunk: int = 131064
) -> list[bytes]:
    encoded = amqp.Message(**properties)._serialize_properties()
    frames = [frame(HEADER, channel_id, pack(">HHQ", 60, 0, len(body)) + encoded)]
    frames.extend(
        frame(BODY, channel_id, body[at : at + chunk]) for at in range(0, len(body), chunk)
    )
    return frames


def deliver(
    channel_id: int,
    delivery_tag: int,
    body: bytes,
    *,
    consumer_tag: str = "ctag",
    redelivered: bool = False,
    exchange: str = "",
    routing_key: str = "queue",
    properties: dict[str, Any] | None = None,
    chunk: int = 131064,
) -> list[bytes]:
    head = method(
        channel_id,
        (60, 60),
        "sLbss",
        consumer_tag,
        delivery_tag,
        redelivered,
        exchange,
        routing_key,
    )
    return [head, *content(channel_id, body, properties or {}, chunk)]


short_text = st.text(max_size=60).filter(lambda text: len(text.encode()) <= 255)

# NaN is not equal to itself; py-amqp rejects integers beyond 64 bits and odd decimals.
table_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | st.datetimes(min_value=datetime(1970, 1, 1), max_value=datetime(2200, 1, 1)).map(
        lambda moment: moment.replace(microsecond=0)
    )
    | st.integers(-(2**31) + 1, 2**31 - 1).map(lambda number: Decimal(number) / 100),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(short_text, inner, max_size=4),
    max_leaves=12,
)
tables = st.dictionaries(short_text, table_values, max_size=6)

properties = st.fixed_dictionaries(
    {},
    optional={
        "content_type": short_text,
        "content_encoding": short_text,
        "application_headers": tables,
        "delivery_mode": st.integers(0, 255),
        "priority": st.integers(0, 255),
        "correlation_id": short_text,
        "reply_to": short_text,
        "expiration": short_text,
        "message_id": short_text,
        "timestamp": st.integers(0, 2**64 - 1),
        "type": short_text,
        "user_id": short_text,
        "app_id": short_text,
        "cluster_id": short_text,
    },
)


@st.composite
def conversations(draw: st.DrawFn) -> bytes:
    """A sound stream: methods, deliveries, confirms and heartbeats of up to three channels.

    The frames of different channels alternate, those of one channel keep their order.
    """
    lanes: list[list[bytes]] = []
    for channel_id in (1, 2, 300):
        lane: list[bytes] = []
        for _ in range(draw(st.integers(0, 4))):
            kind = draw(st.sampled_from(["deliver", "reply", "confirm", "return", "get"]))
            body = draw(st.binary(max_size=300))
            chunk = draw(st.sampled_from([50, 131064]))
            if kind == "deliver":
                lane += deliver(
                    channel_id,
                    draw(st.integers(0, 2**64 - 1)),
                    body,
                    consumer_tag=draw(short_text),
                    redelivered=draw(st.booleans()),
                    exchange=draw(short_text),
                    routing_key=draw(short_text),
                    properties=draw(properties),
                    chunk=chunk,
                )
            elif kind == "reply":
                lane.append(method(channel_id, (50, 11), "sll", draw(short_text), 7, 2))
            elif kind == "confirm":
                signature = draw(st.sampled_from([(60, 80), (60, 120)]))
                tag = draw(st.integers(0, 2**64 - 1))
                lane.append(method(channel_id, signature, "Lb", tag, draw(st.booleans())))
            elif kind == "return":
                lane.append(method(channel_id, (60, 50), "Bsss", 312, "NO_ROUTE", "ex", "key"))
                lane += content(channel_id, body, draw(properties), chunk)
            else:
                lane.append(method(channel_id, (60, 71), "Lbssl", 5, False, "", "queue", 3))
                lane += content(channel_id, body, draw(properties), chunk)
        if lane:
            lanes.append(lane)
    stream = []
    while lanes:
        index = draw(st.integers(0, len(lanes) - 1))
        stream.append(lanes[index].pop(0))
        if not lanes[index]:
            del lanes[index]
        if draw(st.integers(0, 5)) == 0:
            stream.append(frame(HEARTBEAT, 0, b""))
    return b"".join(stream)
