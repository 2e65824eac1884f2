"""The inbound half of AMQP 0-9-1, without I/O: bytes in, events out.

Theory of operation.  `Parser.feed` takes the blocks as they come from the socket, cut anywhere,
and returns the list of events that became complete:

* a *delivery* (basic.deliver with its content), an object made by the `message` factory;
* a `Confirmation` (basic.ack or basic.nack of a publish);
* a `MethodEvent` for every other method, with its `Content` if it carries any.

Heartbeats make no event; that bytes came is all they say.

Cost.  A message usually lies whole in the block, as three frames one behind the other.  That case
is parsed in one pass with three unpacks and no intermediate object; properties and headers stay
bytes until somebody asks for them.  Everything else goes frame by frame through `_frame`, which
assembles content per channel, since frames of several channels may alternate.  A block that ends
inside a frame is kept until all of that frame is there, in a list that is joined once, so the work
is linear in the bytes, however they are cut.

A body of many megabytes is not joined here, for that would keep everybody else waiting: it is
passed on as the list of its pieces, and `joined` by the task that looks at it.

Bounds.  A frame may be `frame_max` octets long, a body `max_message_size`, and all unfinished
messages together `MAX_PENDING` times that; text that repeats (consumer tags, exchange and routing
key) is kept in caches of fixed size.  A body that is too large is dropped as it comes in, and its
message is passed on with a `MessageTooLarge`, because a message that nobody can reject would be
redelivered for ever.

Faults.  After the first fault the parser is dead: `feed` returns the events before it and sets
`error`, and every later `feed` returns nothing.  So a fault costs no message that came before it,
wherever the blocks are cut.

This module is long because the fast path and the general one have to agree in every fault.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from struct import Struct
from typing import Any

from greenkombu._amqp.errors import (
    BadFrameError,
    ForeignProtocolError,
    MalformedValueError,
    MessageTooLarge,
    ProtocolError,
    UnexpectedFrameError,
    UnknownMethodError,
)
from greenkombu._amqp.methods import BY_CODE, Method
from greenkombu._amqp.values import decode_arguments, decode_properties, decode_text

__all__ = [
    "DEFAULT_FRAME_MAX",
    "DEFAULT_MAX_MESSAGE_SIZE",
    "PROTOCOL_HEADER",
    "Confirmation",
    "Content",
    "Delivery",
    "MethodEvent",
    "Parser",
    "joined",
    "octets_of",
]

#: What clients and RabbitMQ agree on by default.
DEFAULT_FRAME_MAX = 131072

#: The largest body that is taken in.  RabbitMQ 3.8 to 3.13 accept 128 MiB, 4.0 only 16 MiB.
DEFAULT_MAX_MESSAGE_SIZE = 128 * 1024 * 1024

# Octets of a body from which on it stays in pieces; to join so much takes half a millisecond.
LARGE_BODY = 1024 * 1024

# Unfinished messages of all channels together, in units of the largest one.
MAX_PENDING = 4

# Entries of a text cache.  A consumer has one tag and few routing keys; a cache that overflows is
# emptied, which costs a miss for each entry that is still in use.
CACHE_ENTRIES = 2048

# Longest Connection.start that is kept decoded (RabbitMQ's has 500 octets); it is the same for all
# connections to a broker, and the largest table that most connections ever see.
LONGEST_GREETING = 4096

# Longest block, in octets, that is looked at for being a single method.
SHORT = 256

#: What a client says first, and a broker that wants another version (AMQP 0-9-1, 4.2.2).
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

#: The heartbeat frame (AMQP 0-9-1, 4.2.7).
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"

FRAME_METHOD = 1
FRAME_HEADER = 2
FRAME_BODY = 3
FRAME_HEARTBEAT = 8
FRAME_END = 0xCE

# Octets of a frame besides its payload: type, channel and size in front, the end octet behind.
FRAME_OVERHEAD = 8

_CONNECTION_START = 10 << 16 | 10
_BASIC_DELIVER = 60 << 16 | 60
_BASIC_ACK = 60 << 16 | 80
_BASIC_NACK = 60 << 16 | 120
_CONFIRMATIONS = frozenset((_BASIC_ACK, _BASIC_NACK))
_CLASS_BASIC = 60
_CONTENT_OR_CONFIRM = _CONFIRMATIONS | {
    method.code for method in BY_CODE.values() if method.has_content
}

# type, channel, size, and the first four octets of the payload
_FRAME = Struct(">BHII").unpack_from
_FRAME_SHORT = Struct(">BHI").unpack_from
# delivery tag and the octet of bits behind it
_TAG = Struct(">QB").unpack_from
# type, channel, size, class with weight, body size
_CONTENT = Struct(">BHIIQ").unpack_from
_HEADER = Struct(">HHQ").unpack_from


@lru_cache(16)
def _decode_greeting(payload: bytes) -> tuple[Any, ...]:
    return decode_arguments(BY_CODE[_CONNECTION_START], payload)


def joined(body: bytes | list[bytes] | None) -> bytes | None:
    """Return a body, which may have come in pieces, as one."""
    return b"".join(body) if isinstance(body, list) else body


def octets_of(body: bytes | list[bytes] | None) -> int:
    """Return the size of a body; 0 if it was dropped."""
    if isinstance(body, list):
        return sum(map(len, body))
    return len(body) if body is not None else 0


_consumer_tags: dict[bytes, str] = {}
_routes: dict[bytes, tuple[str, str]] = {}


class MethodEvent:
    """A method that arrived on a channel, decoded; `content` is None unless it carries some."""

    __slots__ = ("arguments", "channel_id", "content", "method")

    def __init__(
        self,
        channel_id: int,
        method: Method,
        arguments: tuple[Any, ...],
        content: Content | None = None,
    ) -> None:
        self.channel_id = channel_id
        self.method = method
        self.arguments = arguments
        self.content = content

    def __repr__(self) -> str:
        return f"<{self.method.name} on channel {self.channel_id}: {self.arguments}>"


class Confirmation:
    """The broker took (`positive`) or refused publish number `delivery_tag`, or all up to it."""

    __slots__ = ("channel_id", "delivery_tag", "multiple", "positive")

    def __init__(self, channel_id: int, delivery_tag: int, multiple: bool, positive: bool) -> None:
        self.channel_id = channel_id
        self.delivery_tag = delivery_tag
        self.multiple = multiple
        self.positive = positive

    def __repr__(self) -> str:
        kind = "ack" if self.positive else "nack"
        reach = "up to " if self.multiple else ""
        return f"<{kind} {reach}{self.delivery_tag} on channel {self.channel_id}>"


class Content:
    """Header and body behind a method; `fault` says why the body is None."""

    __slots__ = ("body", "fault", "header")

    def __init__(
        self, header: bytes, body: bytes | list[bytes] | None, fault: MessageTooLarge | None
    ) -> None:
        #: Property flags and values, not decoded.
        self.header = header
        self.body = body
        self.fault = fault


class Delivery:
    """A delivery as the parser sees it; transports put their message class in its place.

    Args:
        channel_id, consumer_tag, delivery_tag, redelivered, exchange, routing_key: as they came.
        header: property flags and values, not decoded.
        body: all of it, or its pieces (see `joined`); None if it was too large.
        fault: why the body is None.
    """

    __slots__ = (
        "_body",
        "channel_id",
        "consumer_tag",
        "delivery_tag",
        "exchange",
        "fault",
        "header",
        "redelivered",
        "routing_key",
    )

    def __init__(
        self,
        channel_id: int,
        consumer_tag: str,
        delivery_tag: int,
        redelivered: bool,
        exchange: str,
        routing_key: str,
        header: bytes,
        body: bytes | list[bytes] | None,
        fault: MessageTooLarge | None = None,
    ) -> None:
        self.channel_id = channel_id
        self.consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.exchange = exchange
        self.routing_key = routing_key
        self.header = header
        self._body = body
        self.fault = fault

    @property
    def body(self) -> bytes | None:
        """The body; None if it was too large.  May be written to, as that of amqp's messages."""
        body = self._body = joined(self._body)
        return body

    @body.setter
    def body(self, value: bytes | None) -> None:
        self._body = value

    @property
    def size(self) -> int:
        """Octets of the body."""
        return octets_of(self._body)

    @property
    def properties(self) -> dict[str, Any]:
        """The decoded properties, anew at each call.

        Raises:
            MalformedValueError: the header is not what AMQP says; only this message is affected.
        """
        return decode_properties(self.header)


class _Assembly:
    """A method that waits for its content, and what has come of it."""

    __slots__ = (
        "arguments",
        "body_size",
        "chunks",
        "fault",
        "header",
        "held",
        "method",
        "received",
    )

    def __init__(self, method: Method, arguments: tuple[Any, ...], held: int) -> None:
        self.method = method
        self.arguments = arguments
        self.header: bytes | None = None
        self.body_size = 0
        self.received = 0
        self.chunks: list[bytes] = []
        self.fault: MessageTooLarge | None = None
        #: Octets that are kept for it.
        self.held = held


class Parser:
    """Turn the bytes of one connection into events.

    Args:
        frame_max: largest frame that the peer may send, in octets with the overhead of 8.
        max_message_size: largest body, in octets.
        message: makes the object for a delivery; takes the arguments of `Delivery`.

    Attributes:
        error: the fault that ended the stream; None while it is sound.
        frame_max, max_message_size: may be set between two calls of `feed`.
    """

    __slots__ = (
        "_chunks",
        "_have",
        "_held",
        "_message",
        "_need",
        "_partial",
        "_virgin",
        "error",
        "frame_max",
        "max_message_size",
    )

    def __init__(
        self,
        frame_max: int = DEFAULT_FRAME_MAX,
        max_message_size: int = DEFAULT_MAX_MESSAGE_SIZE,
        message: Callable[..., Any] = Delivery,
    ) -> None:
        self.frame_max = frame_max
        self.max_message_size = max_message_size
        self.error: ProtocolError | None = None
        self._message = message
        # The bytes of an unfinished frame: as they came, how many, and how many it takes.
        # The list is made when it is needed; most connections are idle.
        self._chunks: list[bytes] | None = None
        self._have = 0
        self._need = 0
        self._partial: dict[int, _Assembly] | None = None
        self._held = 0
        self._virgin = True

    def greeted(self) -> None:
        """Note that the peer's first words were looked at, and were AMQP 0-9-1."""
        self._virgin = False

    def feed(self, data: bytes) -> list[Any]:
        """Parse the next block.

        Args:
            data: any number of bytes.

        Returns:
            The events that became complete, in order.  `error` is set if the stream broke after
            them.
        """
        chunks = self._chunks
        if data == HEARTBEAT and chunks is None and not self._virgin and self.error is None:
            return []  # most of what idle connections hear
        events: list[Any] = []
        if self.error is not None:
            return events
        if chunks is None and 12 <= len(data) <= SHORT and not self._virgin:
            # The answer to a request, by itself: most of what a channel without consumers hears.
            kind, channel_id, size, code = _FRAME(data, 0)
            if (
                size + FRAME_OVERHEAD == len(data)
                and kind == FRAME_METHOD
                and data[-1] == FRAME_END
                and code not in _CONTENT_OR_CONFIRM
                and not self._partial
            ):
                try:
                    return [self._method(channel_id, data[7:-1])]
                except ProtocolError as exc:
                    self.error = exc
                    return events
        frame = b""
        position = 0
        if chunks is not None:
            missing = self._need - self._have
            if missing > len(data):
                chunks.append(data)
                self._have += len(data)
                return events
            self._chunks = None
            if self._need > FRAME_OVERHEAD:
                # Only the frame is put together: with the block, one copy more of all octets.
                chunks.append(data[:missing])
                frame = b"".join(chunks)
                position = missing
            else:
                chunks.append(data)
                data = b"".join(chunks)
        if self._virgin:
            # Who is speaking is asked once, and not before the first words are whole: the answer
            # must not depend on where they were cut.
            need = len(PROTOCOL_HEADER) if data.startswith(b"A") else 7
            if len(data) < need:
                self._chunks = [data] if data else None
                self._have = len(data)
                self._need = need
                return events
        try:
            if self._virgin:
                self._check_first_bytes(data)
            if frame:
                self._parse(frame, events, 0)
            position = self._parse(data, events, position)
        except ProtocolError as exc:
            self.error = exc
            self._partial = None
            return events
        left = len(data) - position
        if left:
            self._chunks = [data[position:] if position else data]
            self._have = left
            # Seven octets tell the size; `_parse` has checked it against the limit.
            self._need = (
                FRAME_OVERHEAD + _FRAME_SHORT(data, position)[2] if left >= 7 else FRAME_OVERHEAD
            )
        return events

    def _parse(self, data: bytes, events: list[Any], position: int) -> int:
        """Append the events in *data* from *position* on; return where the rest begins."""
        end = len(data)
        limit = self.frame_max - FRAME_OVERHEAD
        largest = self.max_message_size
        message = self._message
        # Locals, because this loop is the cost of consuming (benchmarks/bench_amqp_codec.py:
        # 1.3 us for each delivery so, 1.5 us through globals and attributes).
        append = events.append
        unpack_frame = _FRAME
        unpack_tag = _TAG
        unpack_content = _CONTENT
        unpack_short = _FRAME_SHORT
        consumer_tags = _consumer_tags
        routes = _routes
        while True:
            left = end - position
            if left >= 11:
                kind, channel_id, size, code = unpack_frame(data, position)
            elif left >= 7:
                kind, channel_id, size = unpack_short(data, position)
                code = 0
            else:
                return position
            stop = position + 7 + size
            if stop >= end or size > limit:
                self._check_header(kind, channel_id, size, limit)
                return position
            if data[stop] != FRAME_END:
                # First what would have been found out without the end.
                self._check_header(kind, channel_id, size, limit)
                raise BadFrameError(
                    f"a frame on channel {channel_id} ends with octet {data[stop]:#04x} instead of"
                    f" {FRAME_END:#04x}"
                )

            if code == _BASIC_DELIVER and kind == FRAME_METHOD and not self._partial:
                # The whole message in one go, if it is here and nothing about it is unusual;
                # else one frame at a time, below, where each oddity has its error.
                tag_start = position + 12
                tag_stop = tag_start + data[tag_start - 1]
                header_at = stop + 1
                if tag_stop + 9 <= stop and header_at + 22 <= end:
                    hkind, hchannel, hsize, hclass, body_size = unpack_content(data, header_at)
                    header_stop = header_at + 7 + hsize
                    body_at = header_stop + 1
                    body_stop = body_at + 7 + body_size if body_size else header_stop
                    if (
                        hkind == FRAME_HEADER
                        and hchannel == channel_id
                        and hclass == 0x3C0000
                        and 14 <= hsize <= limit
                        and body_stop < end
                        and data[header_stop] == FRAME_END
                        and body_size <= largest
                        and (
                            not body_size
                            or (
                                data[body_stop] == FRAME_END
                                and unpack_short(data, body_at)
                                == (FRAME_BODY, channel_id, body_size)
                                and body_size <= limit
                            )
                        )
                    ):
                        raw = data[tag_stop + 9 : stop]
                        route = routes.get(raw)
                        if route is None:
                            route = _remember_route(raw)
                        if route is not None:
                            raw = data[tag_start:tag_stop]
                            consumer_tag = consumer_tags.get(raw)
                            if consumer_tag is None:
                                consumer_tag = _remember_tag(raw)
                            delivery_tag, bits = unpack_tag(data, tag_stop)
                            append(
                                message(
                                    channel_id,
                                    consumer_tag,
                                    delivery_tag,
                                    bits & 1 == 1,
                                    route[0],
                                    route[1],
                                    data[header_at + 19 : header_stop],
                                    data[body_at + 7 : body_stop] if body_size else b"",
                                )
                            )
                            position = body_stop + 1
                            continue

            elif (
                kind == FRAME_METHOD and size == 13 and code in _CONFIRMATIONS and not self._partial
            ):
                delivery_tag, bits = unpack_tag(data, position + 11)
                append(Confirmation(channel_id, delivery_tag, bits & 1 == 1, code == _BASIC_ACK))
                position = stop + 1
                continue

            event = self._frame(kind, channel_id, data[position + 7 : stop])
            if event is not None:
                append(event)
            position = stop + 1

    # -- one frame at a time

    def _frame(self, kind: int, channel_id: int, payload: bytes) -> Any:
        """Take one whole frame; return the event that it completes, or None."""
        if kind == FRAME_BODY:
            return self._body(channel_id, payload)
        if kind == FRAME_METHOD:
            return self._method(channel_id, payload)
        if kind == FRAME_HEADER:
            return self._header(channel_id, payload)
        if kind == FRAME_HEARTBEAT:
            return None
        raise _unknown_kind(kind, channel_id)

    def _method(self, channel_id: int, payload: bytes) -> Any:
        if len(payload) < 4:
            raise BadFrameError(
                f"a method frame on channel {channel_id} has only {len(payload)} octets"
            )
        code = int.from_bytes(payload[:4], "big")
        method = BY_CODE.get(code)
        if method is None:
            raise UnknownMethodError(
                f"unknown method {code >> 16}.{code & 0xFFFF} on channel {channel_id}",
                (code >> 16, code & 0xFFFF),
            )
        partial = self._partial
        if partial and channel_id in partial:
            raise UnexpectedFrameError(
                f"{method.name} on channel {channel_id} in the middle of the content of"
                f" {partial[channel_id].method.name}"
            )
        if code == _CONNECTION_START and len(payload) <= LONGEST_GREETING:
            arguments = _decode_greeting(payload)
        else:
            arguments = decode_arguments(method, payload)
        if method.has_content:
            size = len(payload)
            if partial is None:
                partial = self._partial = {}
            partial[channel_id] = _Assembly(method, arguments, size)
            self._hold(size)
            return None
        if code in _CONFIRMATIONS:
            return Confirmation(channel_id, arguments[0], arguments[1], code == _BASIC_ACK)
        return MethodEvent(channel_id, method, arguments)

    def _header(self, channel_id: int, payload: bytes) -> Any:
        assembly = self._partial.get(channel_id) if self._partial else None
        if assembly is None:
            raise UnexpectedFrameError(
                f"a content header on channel {channel_id} without a method before it"
            )
        if assembly.header is not None:
            raise UnexpectedFrameError(
                f"a second content header on channel {channel_id} for {assembly.method.name}"
            )
        if len(payload) < 14:
            raise MalformedValueError(
                f"a content header on channel {channel_id} has only {len(payload)} octets"
            )
        class_id, _weight, body_size = _HEADER(payload)
        if class_id != _CLASS_BASIC:
            raise UnexpectedFrameError(
                f"a content header of class {class_id} on channel {channel_id} for"
                f" {assembly.method.name}"
            )
        assembly.header = payload[12:]
        assembly.body_size = body_size
        if body_size > self.max_message_size:
            assembly.fault = MessageTooLarge(
                f"a message on channel {channel_id} has a body of {body_size} octets; the limit is"
                f" {self.max_message_size} (transport option max_message_size)",
                assembly.method.signature,
            )
        if not body_size:
            return self._complete(channel_id, assembly)
        assembly.held += len(payload)
        self._hold(len(payload))
        return None

    def _body(self, channel_id: int, payload: bytes) -> Any:
        assembly = self._partial.get(channel_id) if self._partial else None
        if assembly is None or assembly.header is None:
            raise UnexpectedFrameError(
                f"a content body on channel {channel_id} without a content header before it"
            )
        size = len(payload)
        assembly.received += size
        if assembly.received > assembly.body_size:
            raise BadFrameError(
                f"the body of a message on channel {channel_id} is longer than the"
                f" {assembly.body_size} octets that its header says"
            )
        if size and assembly.fault is None:
            assembly.chunks.append(payload)
            assembly.held += size
            self._hold(size)
        if assembly.received == assembly.body_size:
            return self._complete(channel_id, assembly)
        return None

    def _hold(self, size: int) -> None:
        self._held += size
        if self._held > MAX_PENDING * self.max_message_size + self.frame_max:
            raise ProtocolError(
                f"{self._held} octets of unfinished messages; the limit is {MAX_PENDING} times the"
                f" largest message ({self.max_message_size})"
            )

    def _complete(self, channel_id: int, assembly: _Assembly) -> Any:
        assert self._partial is not None
        assert assembly.header is not None
        del self._partial[channel_id]
        if not self._partial:
            self._partial = None
        self._held -= assembly.held
        body: bytes | list[bytes] | None = None
        if assembly.fault is None:
            body = assembly.chunks if assembly.body_size > LARGE_BODY else joined(assembly.chunks)
        method = assembly.method
        if method.code == _BASIC_DELIVER:
            if assembly.fault is not None:
                return self._message(
                    channel_id, *assembly.arguments, assembly.header, body, assembly.fault
                )
            return self._message(channel_id, *assembly.arguments, assembly.header, body)
        content = Content(assembly.header, body, assembly.fault)
        return MethodEvent(channel_id, method, assembly.arguments, content)

    # -- what is wrong with it

    def _check_header(self, kind: int, channel_id: int, size: int, limit: int) -> None:
        """Raise unless a frame with this beginning may still become a good one."""
        if kind not in (FRAME_METHOD, FRAME_HEADER, FRAME_BODY, FRAME_HEARTBEAT):
            raise _unknown_kind(kind, channel_id)
        if size > limit:
            raise BadFrameError(
                f"a frame on channel {channel_id} has {size + FRAME_OVERHEAD} octets; the limit is"
                f" {limit + FRAME_OVERHEAD}"
            )

    def _check_first_bytes(self, data: bytes) -> None:
        """Recognize a peer that does not speak AMQP 0-9-1, by what it says first."""
        self._virgin = False
        first = data[0]
        if first == FRAME_METHOD:
            return
        if data.startswith(b"AMQP"):
            version = ".".join(str(octet) for octet in data[5:8])
            raise ForeignProtocolError(
                f"the peer refused AMQP 0-9-1 and offers AMQP version {version}"
            )
        # TLS 1.x records: 0x15 is an alert, 0x16 a handshake message; then the version, 3.x.
        if first in (0x15, 0x16) and data[1] == 3:
            raise ForeignProtocolError(
                "the peer speaks TLS on this port; use amqps:// or ssl=True, or the plain port"
            )
        if data.startswith(b"HTTP/"):
            raise ForeignProtocolError("the peer speaks HTTP on this port; check the port number")


def _unknown_kind(kind: int, channel_id: int) -> BadFrameError:
    return BadFrameError(f"a frame of the unknown type {kind} on channel {channel_id}")


def _remember_tag(raw: bytes) -> str:
    if len(_consumer_tags) >= CACHE_ENTRIES:
        _consumer_tags.clear()
    tag = _consumer_tags[raw] = decode_text(raw)
    return tag


def _remember_route(raw: bytes) -> tuple[str, str] | None:
    """Decode exchange and routing key, the last two arguments of basic.deliver.

    Returns:
        None if they are malformed; `decode_arguments` says how.
    """
    size = len(raw)
    middle = 1 + raw[0] if size else 1
    if middle >= size or middle + 1 + raw[middle] > size:
        return None
    route = (
        decode_text(raw[1:middle]),
        decode_text(raw[middle + 1 : middle + 1 + raw[middle]]),
    )
    if len(_routes) >= CACHE_ENTRIES:
        _routes.clear()
    _routes[raw] = route
    return route
