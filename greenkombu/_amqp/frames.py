"""The outbound half of AMQP 0-9-1, without I/O: methods and messages in, bytes out.

Everything returns the bytes of whole frames; a message is method, header and body in one piece,
so that whoever appends it to an out-buffer appends it whole (frames of another method of the same
channel must not come between, AMQP 0-9-1, 4.2.6).

The parts that repeat from one publish to the next are kept: `Publisher` holds the method frames
of one channel by exchange and routing key, and the bytes of property sets without headers are
kept for the whole process.  Both caches are bounded, and emptied when they are full.
"""

from __future__ import annotations

from struct import Struct
from typing import Any, TypeAlias

from greenkombu._amqp.errors import ArgumentError
from greenkombu._amqp.methods import BY_SIGNATURE, Method
from greenkombu._amqp.protocol import (
    FRAME_BODY,
    FRAME_END,
    FRAME_HEADER,
    FRAME_METHOD,
    HEARTBEAT,
    LARGE_BODY,
    PROTOCOL_HEADER,
)
from greenkombu._amqp.values import encode_arguments, encode_properties

__all__ = [
    "HEARTBEAT",
    "PROTOCOL_HEADER",
    "Encoded",
    "Publisher",
    "body_bytes",
    "encode_ack",
    "encode_content",
    "encode_method",
    "encode_nack",
    "encode_reject",
    "property_bytes",
    "property_sets",
    "remember_properties",
]

# Entries of a cache of encoded parts.  Programs publish to few exchanges and routing keys;
# replies to many queues miss, which costs what encoding costs.
CACHE_ENTRIES = 256

# Longest encoding that is kept; longer ones are unlikely to come again.
CACHED_SIZE = 512

#: Bytes of whole frames, or a list of their parts where they would be too many to join.
Encoded: TypeAlias = bytes | list[bytes]

_END = b"\xce"
_FRAME = Struct(">BHI").pack
# the end octet of the header frame goes with the head of the body frame
_HEADER_FRAME = Struct(">BHIHHQ").pack
_END_BODY_FRAME = Struct(">BBHI").pack
# frame, method number, delivery tag, one octet of bits, end: basic.ack, basic.reject, basic.nack
_SETTLE = Struct(">BHIIQBB").pack

_ACK = 60 << 16 | 80
_REJECT = 60 << 16 | 90
_NACK = 60 << 16 | 120
_CLASS_BASIC = 60

_PUBLISH = BY_SIGNATURE[60, 40]

#: Encoded property sets by whatever tells them apart; look up here, add by `remember_properties`.
property_sets: dict[tuple[Any, ...], bytes] = {}


def encode_method(channel_id: int, method: Method, values: tuple[Any, ...] = ()) -> bytes:
    """Return a method frame.

    Raises:
        ArgumentError: a value does not fit its field.
    """
    payload = encode_arguments(method, values) if method.fields else method.prefix
    return _FRAME(FRAME_METHOD, channel_id, len(payload)) + payload + _END


def encode_ack(channel_id: int, delivery_tag: int, multiple: bool = False) -> bytes:
    """Return the frame of basic.ack."""
    return _SETTLE(FRAME_METHOD, channel_id, 13, _ACK, delivery_tag, multiple, FRAME_END)


def encode_reject(channel_id: int, delivery_tag: int, requeue: bool) -> bytes:
    """Return the frame of basic.reject."""
    return _SETTLE(FRAME_METHOD, channel_id, 13, _REJECT, delivery_tag, requeue, FRAME_END)


def encode_nack(channel_id: int, delivery_tag: int, multiple: bool, requeue: bool) -> bytes:
    """Return the frame of basic.nack (RabbitMQ)."""
    bits = (1 if multiple else 0) | (2 if requeue else 0)
    return _SETTLE(FRAME_METHOD, channel_id, 13, _NACK, delivery_tag, bits, FRAME_END)


def body_bytes(body: Any, properties: dict[str, Any]) -> bytes:
    """Return a message body as bytes.

    Args:
        body: bytes, or str, which is encoded by the property `content_encoding`; that is set to
            utf-8 where it is missing.

    Raises:
        ArgumentError: neither, or not encodable.
    """
    if isinstance(body, bytes):
        return body
    if isinstance(body, str):
        encoding = properties.get("content_encoding")
        if encoding is None:
            encoding = properties["content_encoding"] = "utf-8"
        try:
            return body.encode(encoding)
        except (LookupError, UnicodeError, TypeError) as exc:
            raise ArgumentError(
                f"the body cannot be encoded by content_encoding {encoding!r}: {exc}"
            ) from exc
    if isinstance(body, (bytearray, memoryview)):
        return bytes(body)
    if body is None:
        return b""
    raise ArgumentError(f"the body must be bytes or str, not {type(body).__name__}")


def property_bytes(properties: dict[str, Any]) -> bytes:
    """Return the flags and values of a content header, from the cache where they are known.

    Raises:
        ArgumentError: a value does not fit; the text names the property.
    """
    key = tuple(properties.items())
    try:
        known = property_sets.get(key)
    except TypeError:  # headers, which are a dict
        return encode_properties(properties)
    return known if known is not None else remember_properties(key, properties)


def remember_properties(key: tuple[Any, ...], properties: dict[str, Any]) -> bytes:
    """Encode *properties* and keep the result under *key*."""
    encoded = encode_properties(properties)
    if len(encoded) <= CACHED_SIZE:
        if len(property_sets) >= CACHE_ENTRIES:
            property_sets.clear()
        property_sets[key] = encoded
    return encoded


def encode_content(channel_id: int, properties: bytes, body: bytes, frame_max: int) -> list[bytes]:
    """Return header and body frames, in pieces for a join.

    Args:
        properties: flags and values, encoded.
        frame_max: largest frame, in octets with the overhead of 8.
    """
    size = len(body)
    header = _HEADER_FRAME(FRAME_HEADER, channel_id, 12 + len(properties), _CLASS_BASIC, 0, size)
    if not size:
        return [header, properties, _END]
    room = frame_max - 8
    if size <= room:
        return [
            header,
            properties,
            _END_BODY_FRAME(FRAME_END, FRAME_BODY, channel_id, size),
            body,
            _END,
        ]
    parts = [header, properties]
    view = memoryview(body)
    for start in range(0, size, room):
        chunk = view[start : start + room]
        parts.append(_END_BODY_FRAME(FRAME_END, FRAME_BODY, channel_id, len(chunk)))
        parts.append(chunk)  # type: ignore[arg-type]
    parts.append(_END)
    return parts


class Publisher:
    """Encode the publishes of one channel.

    Args:
        channel_id: the channel.
        frame_max: what was negotiated.
    """

    __slots__ = ("_methods", "channel_id", "frame_max")

    def __init__(self, channel_id: int, frame_max: int) -> None:
        self.channel_id = channel_id
        self.frame_max = frame_max
        self._methods: dict[tuple[str, str, bool, bool], bytes] = {}

    def encode(
        self,
        encoded: bytes,
        body: bytes,
        exchange: str,
        routing_key: str,
        mandatory: bool = False,
        immediate: bool = False,
    ) -> Encoded:
        """Return the frames of one message as one piece, or a large one as its parts.

        Args:
            encoded: the content properties (see `property_bytes`).
            body: the body (see `body_bytes`).

        Raises:
            ArgumentError: exchange or routing key does not fit.
        """
        try:
            method = self._methods[exchange, routing_key, mandatory, immediate]
        except (KeyError, TypeError):
            method = self._method(exchange, routing_key, mandatory, immediate)
        size = len(body)
        channel_id = self.channel_id
        if 0 < size <= self.frame_max - 8:
            return b"".join(
                (
                    method,
                    _HEADER_FRAME(
                        FRAME_HEADER, channel_id, 12 + len(encoded), _CLASS_BASIC, 0, size
                    ),
                    encoded,
                    _END_BODY_FRAME(FRAME_END, FRAME_BODY, channel_id, size),
                    body,
                    _END,
                )
            )
        parts = [method, *encode_content(channel_id, encoded, body, self.frame_max)]
        return parts if size > LARGE_BODY else b"".join(parts)

    def _method(self, exchange: Any, routing_key: Any, mandatory: bool, immediate: bool) -> bytes:
        values = (0, exchange, routing_key, mandatory, immediate)
        frame = encode_method(self.channel_id, _PUBLISH, values)
        if isinstance(exchange, str) and isinstance(routing_key, str):
            if len(self._methods) >= CACHE_ENTRIES:
                self._methods.clear()
            self._methods[exchange, routing_key, bool(mandatory), bool(immediate)] = frame
        return frame
