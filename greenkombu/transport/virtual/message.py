"""Messages of virtual transports: the dict that a store keeps, and what a consumer gets.

A store keeps Kombu's dict: ``body``, ``content-type``, ``content-encoding``, ``headers`` and
``properties``; the properties hold ``body_encoding``, ``delivery_tag`` and ``delivery_info``
(exchange and routing key). Bodies are base64 unless the channel says otherwise, so that a store of
text can keep any bytes.
"""

from __future__ import annotations

import binascii
import itertools
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from greenkombu import message as base
from greenkombu._arguments import check_text
from greenkombu.exceptions import DecodeError, EncodeError, NestingTooDeep

if TYPE_CHECKING:
    from greenkombu.transport.virtual.channel import Channel

__all__ = [
    "Base64",
    "Codec",
    "DeliveryInfo",
    "Message",
    "copy_message",
    "copy_table",
    "new_delivery_tag",
]

#: How deep headers may be nested. Deeper ones are an attack or a mistake, and would overflow the
#: stack of whoever walks them next.
MAX_HEADER_DEPTH = 100

# Values that need no copy and no check, found without a look at their base classes.
_ATOMS = frozenset({int, float, bool, bytes, type(None)})


class Codec(Protocol):
    """A body encoding: an entry of `Channel.codecs`."""

    def encode(self, s: Any) -> Any:
        """Return the body as the store is to keep it."""

    def decode(self, s: Any) -> Any:
        """Return the body that was encoded."""


class Base64:
    """The body encoding ``base64``."""

    def encode(self, s: str | bytes) -> str:
        """Return bytes, or text as UTF-8, in base64.

        Raises:
            EncodeError: it is neither.
        """
        data = s.encode() if isinstance(s, str) else s
        try:
            return binascii.b2a_base64(data, newline=False).decode("ascii")
        except TypeError:
            raise EncodeError(
                f"a message body must be bytes or str, not {type(s).__name__}; serialize it first"
            ) from None

    def decode(self, s: str | bytes) -> bytes:
        """Return the bytes.

        Raises:
            DecodeError: it is not base64.
        """
        try:
            return binascii.a2b_base64(s)
        except (ValueError, TypeError) as exc:
            raise DecodeError(f"the message body is not base64: {exc}") from exc


# A delivery tag has the form of a random UUID, which is what Kombu's are: 74 random bits for the
# process, and a counter of twelve digits in the last group. A call of uuid4 costs ten times as
# much.
_tag_format = ""
_tag_numbers = itertools.count(0x100000000001)


def _new_tag_format() -> None:
    global _tag_format
    digits = os.urandom(10).hex()
    variant = "89ab"[int(digits[15], 16) & 3]
    _tag_format = f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{variant}{digits[16:19]}-%x"


_new_tag_format()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_tag_format)


def new_delivery_tag() -> str:
    """Return a tag that no other delivery has, of any connection or process."""
    return _tag_format % next(_tag_numbers)


def copy_table(table: Mapping[str, Any], _depth: int = 0) -> dict[str, Any]:
    """Copy headers so deep that neither owner sees what the other changes.

    Raises:
        NestingTooDeep: they are nested more than `MAX_HEADER_DEPTH` deep.
        ArgumentError: a name or value cannot be sent as UTF-8.
    """
    copy = {}
    for name, value in table.items():
        if type(name) is str and not name.isascii():
            check_text("the name of a header", name)
        kind = type(value)
        if kind not in _ATOMS and not (kind is str and value.isascii()):
            value = _copy_value(value, _depth + 1, name)
        copy[name] = value
    return copy


def _copy_value(value: Any, depth: int, name: object) -> Any:
    if isinstance(value, str):
        check_text(f"header {name!r}", value)
        return value
    if isinstance(value, Mapping | list | tuple):
        if depth > MAX_HEADER_DEPTH:
            raise NestingTooDeep(
                f"the headers of a message are nested more than {MAX_HEADER_DEPTH} deep; put such "
                "data into the body"
            )
        if isinstance(value, Mapping):
            return copy_table(value, depth)
        return [_copy_value(item, depth + 1, name) for item in value]
    return value


def copy_message(raw: Mapping[str, Any], delivery_tag: str) -> dict[str, Any]:
    """Copy the dict of a message, for another queue.

    Args:
        raw: the message.
        delivery_tag: of the copy; two deliveries never share one.
    """
    properties = dict(raw["properties"])
    properties["delivery_info"] = dict(properties["delivery_info"])
    properties["delivery_tag"] = delivery_tag
    return {**raw, "headers": copy_table(raw["headers"]), "properties": properties}


class DeliveryInfo(dict[str, Any]):
    """Where a message came from; `redelivered` is False where nobody has said anything else.

    So a program written for AMQP finds it, and what is stored, copied and compared is Kombu's dict,
    in which it is missing then.
    """

    __slots__ = ()

    def __missing__(self, name: str) -> bool:
        if name == "redelivered":
            return False
        raise KeyError(name)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class Message(base.Message):
    """A message taken from a virtual queue.

    Args:
        payload: the dict that the store keeps. `headers`, `properties` and `delivery_info` are
            its own dicts.
        channel: the channel that it came by.

    Attributes:
        queue: the queue that it was taken from; None if that is not known.

    One that is broken does not raise here: see `greenkombu.message.Message.errors`.
    """

    __slots__ = ("_raw", "_token", "queue")

    def __init__(self, payload: Any, channel: Channel | None = None, **kwargs: Any) -> None:
        self._raw: Any = payload
        self.queue: str | None = None
        # What the store needs to find it again.
        self._token: Any = None
        try:
            properties = payload["properties"]
            encoding = properties.get("body_encoding")
            body = payload.get("body")
            headers = payload.get("headers")
            delivery_info = properties.get("delivery_info")
            delivery_tag = properties["delivery_tag"]
        except (KeyError, TypeError, AttributeError) as exc:
            self._malformed(payload, channel, exc)
            return
        broken = None
        if encoding and body:
            try:
                if channel is not None:
                    body = channel.decode_body(body, encoding)
                else:
                    body = _decode(body, encoding)
            except Exception as exc:
                broken = exc
        if delivery_info is None or type(delivery_info) is dict:
            delivery_info = properties["delivery_info"] = DeliveryInfo(delivery_info or {})
        if "redelivered" in payload:
            delivery_info["redelivered"] = bool(payload["redelivered"])
        super().__init__(
            body,
            delivery_tag,
            payload.get("content-type"),
            payload.get("content-encoding"),
            delivery_info,
            properties,
            # There is nothing to decompress in a broken body.
            headers if broken is None else None,
            "utf-8",
            kwargs.get("accept"),
            channel,
        )
        if broken is not None:
            self.headers = headers or {}
            self._note_error(broken)

    def _malformed(self, payload: Any, channel: Channel | None, cause: Exception) -> None:
        body = payload if isinstance(payload, bytes | str) else repr(payload)
        super().__init__(
            body,
            new_delivery_tag(),
            "application/data",
            "binary",
            postencode="utf-8",
            channel=channel,
        )
        error = DecodeError(
            "what came out of the queue is not a message of a virtual transport "
            f"({type(cause).__name__}: {cause}); who else writes to this queue?"
        )
        error.__cause__ = cause.with_traceback(None)
        self._note_error(error)

    def serializable(self) -> dict[str, Any]:
        """Return the message as a dict that can be stored, or written as JSON, and rebuilt."""
        properties = dict(self.properties)
        headers = dict(self.headers)
        # The body was decompressed when it arrived.
        headers.pop("compression", None)
        encoding = properties.get("body_encoding")
        channel = self.channel
        body = self.body
        if encoding and channel is not None:
            body, properties["body_encoding"] = channel.encode_body(body, encoding)
        elif isinstance(body, bytes):
            try:
                body = body.decode()
            except UnicodeDecodeError:
                body, properties["body_encoding"] = Base64().encode(body), "base64"
        return {
            "body": body,
            "properties": properties,
            "content-type": self.content_type,
            "content-encoding": self.content_encoding,
            "headers": headers,
        }


def _decode(body: Any, encoding: str) -> Any:
    if encoding == "base64":
        return Base64().decode(body)
    raise DecodeError(f"the body encoding {encoding!r} needs the channel that the message came by")
