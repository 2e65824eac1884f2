"""AMQP values: strings, field tables, method arguments and content properties.

Pure functions, bytes in, values out and back; no state.  Decoding gives what the ``amqp`` package
gives for every well-formed input (a test compares them), and differs in what it does with the
rest: nothing but `MalformedValueError` is ever raised, tables nest `MAX_TABLE_DEPTH` deep at most,
and no length is believed beyond the bytes that are there.  Encoding raises `ArgumentError`, which
names the field.

Text that is not UTF-8 (a routing key written by a stranger) is kept as Python keeps such file
names, by surrogate escapes, and encodes to the same bytes again in what belongs to a message: one
odd message must not end a connection. Everywhere else such text is refused, since RabbitMQ ends the
connection for it (501); so are surrogates that escape nothing, and numbers that are not finite.

This module is long because each type stands here twice, read and written, side by side.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from decimal import Decimal
from itertools import product
from math import isfinite
from struct import Struct
from struct import error as StructError
from typing import Any

from greenkombu._amqp.errors import ArgumentError, MalformedValueError
from greenkombu._amqp.methods import Method

__all__ = [
    "MAX_TABLE_DEPTH",
    "PROPERTY_FIELDS",
    "EncodedTable",
    "decode_arguments",
    "decode_properties",
    "decode_table",
    "decode_text",
    "encode_arguments",
    "encode_properties",
    "encode_short_string",
    "encode_table",
    "encode_text",
]

#: How deep tables and arrays may nest, in both directions.  RabbitMQ's own (x-death, federation)
#: nest three deep; a hundred is far beyond any program and far below Python's recursion limit.
MAX_TABLE_DEPTH = 100

#: Longest short string (AMQP 0-9-1, 4.2.5.3: one octet of length).
MAX_SHORT_STRING = 255

_NO_TABLE = b"\0\0\0\0"
_NO_SHORT = b"\0\0"

_OCTET = Struct(">B")
_SHORT = Struct(">H")
_LONG = Struct(">I")
_LONG_LONG = Struct(">Q")
_PACK = {"o": _OCTET.pack, "B": _SHORT.pack, "l": _LONG.pack, "L": _LONG_LONG.pack}
_TAGGED_BOOL = Struct(">cB")
_TAGGED_LONG = Struct(">ci")
_TAGGED_LONG_LONG = Struct(">cq")
_TAGGED_DOUBLE = Struct(">cd")
_TAGGED_SIZE = Struct(">cI")
_TAGGED_DECIMAL = Struct(">cBi")
_TAGGED_TIMESTAMP = Struct(">cQ")
_DECIMAL = Struct(">Bi")


def _pack_bits(flags: Sequence[Any]) -> bytes:
    """Return up to eight bits as an octet, the first one the lowest."""
    return _OCTET.pack(sum(1 << place for place, flag in enumerate(flags) if flag))


# As many in a row as the methods of AMQP have.
_BITS: dict[tuple[bool, ...], bytes] = {
    flags: _pack_bits(flags)
    for count in range(1, 6)
    for flags in product((False, True), repeat=count)
}

# Field types with a value of fixed size.  The letters follow the ``amqp`` package and RabbitMQ,
# which differ from the specification's table in 's', 'l' and 'L'.
_FIXED: dict[int, Callable[[Any, int], tuple[Any, ...]]] = {}
_FIXED_SIZE: dict[int, int] = {}
for _letter, _format in (
    ("s", ">h"),
    ("b", ">b"),
    ("B", ">B"),
    ("U", ">h"),
    ("u", ">H"),
    ("I", ">i"),
    ("i", ">I"),
    ("L", ">q"),
    ("l", ">q"),
    ("f", ">f"),
    ("d", ">d"),
):
    _struct = Struct(_format)
    _FIXED[ord(_letter)] = _struct.unpack_from
    _FIXED_SIZE[ord(_letter)] = _struct.size
del _letter, _format, _struct


# -- text


def decode_text(data: bytes) -> str:
    """Decode UTF-8; keep foreign bytes so that they encode back."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


def encode_text(text: str) -> bytes:
    """Undo `decode_text`.

    Raises:
        UnicodeEncodeError: a surrogate that does not come from there.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogateescape")


def encode_short_string(value: Any, where: str, utf8: bool = False) -> bytes:
    """Return *value* (str, bytes, or None for empty) with its octet of length.

    Args:
        where: what the value is, for the error: "Basic.publish: routing_key".
        utf8: no foreign bytes.

    Raises:
        ArgumentError: not a string, not UTF-8, or longer than 255 octets.
    """
    if isinstance(value, str):
        try:
            data = value.encode() if utf8 else encode_text(value)
        except UnicodeEncodeError as exc:
            raise _no_text(where, value, exc) from exc
    elif value is None:
        data = b""
    elif isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
        if utf8:
            try:
                data.decode()
            except UnicodeDecodeError as exc:
                raise _no_text(where, data, exc) from exc
    else:
        raise ArgumentError(f"{where} must be a string, not {type(value).__name__}")
    size = len(data)
    if size > MAX_SHORT_STRING:
        shown = decode_text(data[:40])
        raise ArgumentError(
            f"{where} is {size} octets long, AMQP allows {MAX_SHORT_STRING}: {shown!r}..."
        )
    return b"%c%b" % (size, data)


def _no_text(where: str, value: str | bytes, exc: UnicodeError) -> ArgumentError:
    return ArgumentError(f"{where} cannot be sent as UTF-8: {value!r:.100} ({exc})")


def _encode_long_string(value: Any, where: str) -> bytes:
    if isinstance(value, str):
        try:
            value = encode_text(value)
        except UnicodeEncodeError:
            # It may be a password: neither it nor the error that holds it is shown.
            raise ArgumentError(f"{where} cannot be sent as UTF-8") from None
    elif value is None:
        value = b""
    elif not isinstance(value, (bytes, bytearray, memoryview)):
        raise ArgumentError(f"{where} must be a string, not {type(value).__name__}")
    data: bytes = _LONG.pack(len(value)) + value
    return data


# -- tables, outward


class EncodedTable(bytes):
    """What `encode_table` has returned; it takes the place of the table."""


def encode_table(table: Mapping[Any, Any] | EncodedTable | None, where: str) -> bytes:
    """Return a field table with its length in front (AMQP 0-9-1, 4.2.5.5).

    Args:
        table: an `EncodedTable` is returned as it is.
        where: what the table is, for the error.

    Raises:
        ArgumentError: a key or value cannot be carried, or it nests too deep.
    """
    if not table:
        return _NO_TABLE
    if isinstance(table, EncodedTable):
        return table
    parts: list[bytes] = []
    _append_pairs(parts, table, where, 0)
    body = b"".join(parts)
    return _LONG.pack(len(body)) + body


def _append_pairs(parts: list[bytes], table: Mapping[Any, Any], where: str, depth: int) -> None:
    if depth > MAX_TABLE_DEPTH:
        raise ArgumentError(f"{where} nests deeper than {MAX_TABLE_DEPTH} tables")
    if not isinstance(table, Mapping):
        raise ArgumentError(f"{where} must be a dict, not {type(table).__name__}")
    for key, value in table.items():
        parts.append(encode_short_string(key, f"{where}: the key"))
        _append_value(parts, value, where, key, depth)


def _append_value(parts: list[bytes], value: Any, where: str, key: Any, depth: int) -> None:
    """Append the type letter and the value; the order of the tests matters (bool is an int)."""
    try:
        if isinstance(value, str):
            data = encode_text(value)
            parts.append(_TAGGED_SIZE.pack(b"S", len(data)) + data)
        elif isinstance(value, bool):
            parts.append(_TAGGED_BOOL.pack(b"t", value))
        elif isinstance(value, int):
            if -0x7FFFFFFF <= value <= 0x7FFFFFFF:
                parts.append(_TAGGED_LONG.pack(b"I", value))
            else:
                parts.append(_TAGGED_LONG_LONG.pack(b"L", value))
        elif isinstance(value, float):
            if not isfinite(value):
                raise ArgumentError(
                    f"{where}: {value!r} at key {key!r}: AMQP brokers end the connection for a"
                    " number that is not finite; send text or None"
                )
            parts.append(_TAGGED_DOUBLE.pack(b"d", value))
        elif value is None:
            parts.append(b"V")
        elif isinstance(value, (bytes, bytearray, memoryview)):
            parts.append(_TAGGED_SIZE.pack(b"S", len(value)) + value)
        elif isinstance(value, Mapping):
            nested: list[bytes] = []
            _append_pairs(nested, value, where, depth + 1)
            data = b"".join(nested)
            parts.append(_TAGGED_SIZE.pack(b"F", len(data)) + data)
        elif isinstance(value, (list, tuple)):
            if depth >= MAX_TABLE_DEPTH:
                raise ArgumentError(f"{where} nests deeper than {MAX_TABLE_DEPTH} tables")
            nested = []
            for item in value:
                _append_value(nested, item, where, key, depth + 1)
            data = b"".join(nested)
            parts.append(_TAGGED_SIZE.pack(b"A", len(data)) + data)
        elif isinstance(value, Decimal):
            parts.append(_encode_decimal(value))
        elif isinstance(value, datetime):
            seconds = calendar.timegm(value.utctimetuple())
            parts.append(_TAGGED_TIMESTAMP.pack(b"T", seconds))
        else:
            raise ArgumentError(
                f"{where}: AMQP cannot carry the {type(value).__name__} at key {key!r}"
            )
    except (StructError, OverflowError) as exc:
        raise ArgumentError(f"{where}: {value!r} at key {key!r} is out of range ({exc})") from exc
    except UnicodeEncodeError as exc:
        raise _no_text(f"{where}: the value at key {key!r}", value, exc) from exc


def _encode_decimal(value: Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise OverflowError("not a finite number")
    number = int("".join(map(str, digits)) or "0")
    if exponent > 0:
        number, exponent = number * 10**exponent, 0
    return _TAGGED_DECIMAL.pack(b"D", -exponent, -number if sign else number)


# -- tables, inward


def decode_table(data: bytes, offset: int, where: str) -> tuple[dict[Any, Any], int]:
    """Decode the field table that starts (with its length) at *offset*.

    Returns:
        The table, and the offset behind it.

    Raises:
        MalformedValueError: it is not a table, or nests deeper than `MAX_TABLE_DEPTH`.
    """
    try:
        return _table(data, offset, len(data), 0)
    except (StructError, IndexError, ValueError, OverflowError, OSError, ArithmeticError) as exc:
        raise _malformed(where, exc) from exc


def _malformed(where: str, exc: Exception) -> MalformedValueError:
    if isinstance(exc, MalformedValueError):
        return MalformedValueError(f"{where}: {exc.reply_text}")
    if isinstance(exc, _Malformed):
        return MalformedValueError(f"{where}: {exc}")
    return MalformedValueError(f"{where} cannot be decoded: {exc}")


class _Malformed(ValueError):
    """Internal: what is wrong, before anyone knows in which field."""


def _extent(data: bytes, offset: int, end: int) -> tuple[int, int]:
    """Read a length at *offset*; return where its bytes begin and end."""
    start = offset + 4
    stop = start + _LONG.unpack_from(data, offset)[0]
    if stop > end:
        raise _Malformed(f"a length of {stop - start} octets where {max(end - start, 0)} are left")
    return start, stop


def _table(data: bytes, offset: int, end: int, depth: int) -> tuple[dict[Any, Any], int]:
    if depth > MAX_TABLE_DEPTH:
        raise _Malformed(f"a table that nests deeper than {MAX_TABLE_DEPTH}")
    offset, stop = _extent(data, offset, end)
    table: dict[Any, Any] = {}
    while offset < stop:
        start = offset + 1
        offset = start + data[offset]
        if offset >= stop:
            raise _Malformed("a table key without a value")
        raw = data[start:offset]
        try:
            key: Any = raw.decode()
        except UnicodeDecodeError:
            key = raw
        table[key], offset = _value(data, offset, stop, depth)
    return table, offset


def _value(data: bytes, offset: int, end: int, depth: int) -> tuple[Any, int]:
    if offset >= end:
        raise _Malformed("a value is missing")
    letter = data[offset]
    offset += 1
    if letter == 0x53:  # S, a long string
        start, stop = _extent(data, offset, end)
        raw = data[start:stop]
        try:
            return raw.decode(), stop
        except UnicodeDecodeError:
            return raw, stop
    unpack_from = _FIXED.get(letter)
    if unpack_from is not None:
        stop = offset + _FIXED_SIZE[letter]
        if stop > end:
            raise _Malformed("a number is cut off")
        return unpack_from(data, offset)[0], stop
    if letter == 0x74:  # t, a boolean
        if offset >= end:
            raise _Malformed("a boolean is cut off")
        return data[offset] != 0, offset + 1
    if letter == 0x46:  # F, a table
        return _table(data, offset, end, depth + 1)
    if letter == 0x41:  # A, an array
        return _array(data, offset, end, depth + 1)
    if letter == 0x56:  # V, void
        return None, offset
    if letter == 0x78:  # x, a byte array
        start, stop = _extent(data, offset, end)
        return data[start:stop], stop
    if letter == 0x54:  # T, a timestamp in seconds; naive UTC, as the amqp package gives it
        if offset + 8 > end:
            raise _Malformed("a timestamp is cut off")
        seconds = _LONG_LONG.unpack_from(data, offset)[0]
        moment = datetime.fromtimestamp(seconds, tz=timezone.utc)
        return moment.replace(tzinfo=None), offset + 8
    if letter == 0x44:  # D, a decimal: digits behind the point, then the number
        if offset + 5 > end:
            raise _Malformed("a decimal is cut off")
        places, number = _DECIMAL.unpack_from(data, offset)
        return Decimal(number) / Decimal(10**places), offset + 5
    raise _Malformed(f"the unknown type {chr(letter)!r}")


def _array(data: bytes, offset: int, end: int, depth: int) -> tuple[list[Any], int]:
    if depth > MAX_TABLE_DEPTH:
        raise _Malformed(f"an array that nests deeper than {MAX_TABLE_DEPTH}")
    offset, stop = _extent(data, offset, end)
    items: list[Any] = []
    while offset < stop:
        item, offset = _value(data, offset, stop, depth)
        items.append(item)
    return items, offset


# -- method arguments


def encode_arguments(method: Method, values: Sequence[Any]) -> bytes:
    """Return the payload of a method frame: the method's number and its arguments.

    Args:
        values: one for each of `method.fields`.

    Raises:
        ArgumentError: a value does not fit; the text names the method and the field.
    """
    if len(values) != len(method.fields):
        raise ArgumentError(
            f"{method.name} takes {len(method.fields)} arguments, {len(values)} were given"
        )
    parts = [method.prefix]
    for kind, name, index, stop in method.runs:
        if kind == "b":
            flags: Any = values[index:stop]
            try:
                parts.append(_BITS[flags])
            except (KeyError, TypeError):  # more, or not only True and False
                parts.append(_pack_bits(flags))
            continue
        value = values[index]
        # The usual kinds without a call; all else, and every fault, in the functions.
        if (
            kind == "s"
            and type(value) is str
            and len(value) <= MAX_SHORT_STRING
            and value.isascii()
        ):
            parts.append(b"%c%b" % (len(value), value.encode()))
            continue
        if not value:
            # No table, and the reserved fields.
            if kind == "F":
                parts.append(_NO_TABLE)
                continue
            if kind == "B" and value == 0:
                parts.append(_NO_SHORT)
                continue
        where = f"{method.name}: {name}"
        try:
            if kind == "s":
                # What names a message's way may be a stranger's: it is forwarded as it came.
                parts.append(encode_short_string(value, where, utf8=not method.has_content))
            elif kind == "F":
                parts.append(encode_table(value, where))
            elif kind == "S":
                parts.append(_encode_long_string(value, where))
            else:
                parts.append(_PACK[kind](int(value)))
        except (StructError, TypeError, ValueError, OverflowError) as exc:
            if isinstance(exc, ArgumentError):
                raise
            raise ArgumentError(f"{where} cannot be {value!r} ({exc})") from exc
    return b"".join(parts)


def decode_arguments(method: Method, data: bytes, offset: int = 4) -> tuple[Any, ...]:
    """Decode the arguments in the payload of a method frame.

    Args:
        data: the payload; what follows the last argument is ignored, as the ``amqp`` package does.
        offset: where the arguments begin.

    Raises:
        MalformedValueError: an argument is cut off or malformed; the text names it.
    """
    values: list[Any] = []
    end = len(data)
    name = ""
    try:
        for kind, name, index, stop in method.runs:  # noqa: B007  the name is the error's
            if kind == "b":
                bits = data[offset]
                offset += 1
                for _ in range(index, stop):
                    values.append(bits & 1 == 1)
                    bits >>= 1
                continue
            if kind == "s":
                start = offset + 1
                offset = start + data[offset]
                if offset > end:
                    raise _Malformed("a short string is cut off")
                values.append(decode_text(data[start:offset]))
            elif kind == "L":
                values.append(_LONG_LONG.unpack_from(data, offset)[0])
                offset += 8
            elif kind == "l":
                values.append(_LONG.unpack_from(data, offset)[0])
                offset += 4
            elif kind == "B":
                values.append(_SHORT.unpack_from(data, offset)[0])
                offset += 2
            elif kind == "o":
                values.append(data[offset])
                offset += 1
            elif kind == "S":
                start, offset = _extent(data, offset, end)
                values.append(decode_text(data[start:offset]))
            else:
                table, offset = _table(data, offset, end, 0)
                values.append(table)
    except (StructError, IndexError, ValueError, OverflowError, OSError, ArithmeticError) as exc:
        raise _malformed(f"{method.name}: {name}", exc) from exc
    return tuple(values)


# -- content properties (AMQP 0-9-1, 4.2.6.1: flags, then the values in the order of the flags)

#: (name, type) of the properties of class basic, from the highest flag downward.
PROPERTY_FIELDS: tuple[tuple[str, str], ...] = (
    ("content_type", "s"),
    ("content_encoding", "s"),
    ("application_headers", "F"),
    ("delivery_mode", "o"),
    ("priority", "o"),
    ("correlation_id", "s"),
    ("reply_to", "s"),
    ("expiration", "s"),
    ("message_id", "s"),
    ("timestamp", "L"),
    ("type", "s"),
    ("user_id", "s"),
    ("app_id", "s"),
    ("cluster_id", "s"),
)

_FLAGGED = tuple(
    (name, kind, 1 << (15 - index)) for index, (name, kind) in enumerate(PROPERTY_FIELDS)
)


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """Return the flags and values of a content header.

    Names that AMQP does not know are left out, and so are values of None.

    Raises:
        ArgumentError: a value does not fit; the text names the property.
    """
    flags = 0
    parts: list[bytes] = [b""]
    get = properties.get
    for name, kind, flag in _FLAGGED:
        value = get(name)
        if value is None:
            continue
        flags |= flag
        try:
            if kind == "s":
                # The usual kind in two calls; all else, and every fault, in the function.
                if type(value) is str and len(value) <= MAX_SHORT_STRING and value.isascii():
                    parts.append(b"%c%b" % (len(value), value.encode()))
                else:
                    parts.append(encode_short_string(value, f"property {name}"))
            elif kind == "o":
                parts.append(_OCTET.pack(int(value)))
            elif kind == "F":
                parts.append(encode_table(value, f"property {name}"))
            else:
                parts.append(_LONG_LONG.pack(_seconds(value)))
        except (StructError, TypeError, ValueError, OverflowError) as exc:
            if isinstance(exc, ArgumentError):
                raise
            raise ArgumentError(f"property {name} cannot be {value!r} ({exc})") from exc
    parts[0] = _SHORT.pack(flags)
    return b"".join(parts)


def _seconds(value: Any) -> int:
    if isinstance(value, datetime):
        return calendar.timegm(value.utctimetuple())
    return int(value)


def decode_properties(data: bytes, offset: int = 0) -> dict[str, Any]:
    """Decode the flags and values of a content header.

    Raises:
        MalformedValueError: a value is cut off or malformed; the text names it.
    """
    properties: dict[str, Any] = {}
    name = "flags"
    end = len(data)
    try:
        flags = _SHORT.unpack_from(data, offset)[0]
        offset += 2
        if flags & 1:
            raise _Malformed("more flags than class basic has")
        for name, kind, flag in _FLAGGED:
            if not flags & flag:
                continue
            if kind == "s":
                start = offset + 1
                offset = start + data[offset]
                if offset > end:
                    raise _Malformed("a short string is cut off")
                properties[name] = decode_text(data[start:offset])
            elif kind == "o":
                properties[name] = data[offset]
                offset += 1
            elif kind == "F":
                properties[name], offset = _table(data, offset, end, 0)
            else:
                properties[name] = _LONG_LONG.unpack_from(data, offset)[0]
                offset += 8
    except (StructError, IndexError, ValueError, OverflowError, OSError, ArithmeticError) as exc:
        raise _malformed(f"property {name}", exc) from exc
    return properties
