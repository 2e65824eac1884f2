"""JSON with the types of Kombu 5 on top.

What JSON has no notation for travels as ``{"__type__": name, "__value__": value}``:

========  ==================================  ======================================
name      Python type                         value
========  ==================================  ======================================
datetime  datetime.datetime                   ISO 8601
date      datetime.date                       ISO 8601
time      datetime.time                       ISO 8601
decimal   decimal.Decimal                     text
uuid      uuid.UUID                           ``{"hex": 32 digits}``
bytes     bytes that are UTF-8                text
base64    bytes that are not                  base64
========  ==================================  ======================================

More are added by `register_type`.  An object may also have a method ``__json__`` that returns
something encodable in its place.

The encoder and the scanners are made once and kept; making them for each message costs as much as a
small message itself.  A scanner that calls back for each object is used only for a text in which
the word ``__type__`` can be (also with its underscores escaped).

Depth: the C code of the json module recurses, guarded by the interpreter's recursion limit.  A
program that raised that limit has switched the guard off (with 100 000 brackets Python 3.11 then
dies of a stack overflow), so above `MAX_DEPTH` the depth of a text is measured before it is parsed.
"""

from __future__ import annotations

import json
import re
import sys
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import date, datetime, time
from decimal import Decimal
from json import encoder as _json_encoder
from typing import Any, TypeVar
from uuid import UUID

__all__ = ["MAX_DEPTH", "JSONEncoder", "dumps", "loads", "object_hook", "register_type"]

_T = TypeVar("_T")
_E = TypeVar("_E")

#: Nesting that is always safe to recurse into: about 2 MB of C stack at 160 bytes (measured), of
#: the 8 MB that a thread has on Linux.  The recursion limit, usually 1000, is normally lower.
MAX_DEPTH = 10_000

#: What JSON counts as space (RFC 8259, section 2).
_SPACE = " \t\n\r"

# type -> makes something that the json module can encode.
_encoders: dict[type, Callable[[Any], Any]] = {}
# marker -> makes the object from what stands under "__value__".
_decoders: dict[str, Callable[[Any], Any]] = {}


def register_type(
    t: type[_T],
    marker: str | None,
    encoder: Callable[[_T], _E],
    decoder: Callable[[_E], Any] = lambda value: value,
) -> None:
    """Let JSON carry objects of another type.

    Args:
        t: the type; its subclasses are encoded in the same way unless registered themselves.
        marker: its name on the wire; None writes what encoder returns without a name, and then
            that is what the receiver gets.
        encoder: makes something encodable from the object.
        decoder: makes the object from that.
    """
    if marker is None:
        _encoders[t] = encoder
    else:
        _encoders[t] = lambda o: {"__type__": marker, "__value__": encoder(o)}
        _decoders[marker] = decoder


def _encode_bytes(o: bytes) -> dict[str, str]:
    try:
        return {"__type__": "bytes", "__value__": o.decode()}
    except UnicodeDecodeError:
        return {"__type__": "base64", "__value__": b64encode(o).decode()}


def _default(o: Any) -> Any:
    """Return something that the json module can encode in place of o."""
    kind = type(o)
    method = getattr(kind, "__json__", None)
    if method is not None:
        return method(o)
    for base in kind.__mro__:
        encode = _encoders.get(base)
        if encode is not None:
            return encode(o)
    # Django's translated texts are text once somebody needs it.  A program that has them has the
    # module imported.
    django = sys.modules.get("django.utils.functional")
    if django is not None and isinstance(o, django.Promise):
        return str(o)
    raise TypeError(f"Object of type {kind.__name__} is not JSON serializable")


class JSONEncoder(json.JSONEncoder):
    """The json module's encoder with the types of this module."""

    def default(self, o: Any) -> Any:
        """Return something encodable in place of o.

        Raises:
            TypeError: nothing is known for its type.
        """
        return _default(o)


def object_hook(o: dict[str, Any]) -> Any:
    """Return what a decoded JSON object stands for.

    Args:
        o: the object; returned as it is unless it has exactly a type and a value.

    Raises:
        ValueError: the type is unknown, or the value is not one of that type.
    """
    if len(o) == 2 and "__type__" in o and "__value__" in o:
        marker = o["__type__"]
        decode = _decoders.get(marker) if isinstance(marker, str) else None
        if decode is None:
            raise ValueError(
                f"unknown JSON type {marker!r}; the receiver must register it with "
                "greenkombu.utils.json.register_type"
            )
        return decode(o["__value__"])
    return o


def _make_fast_encoder() -> Callable[[Any], str] | None:
    # The arguments that JSONEncoder.iterencode() passes, since Python 3.4: markers (None: do not
    # look for circles, which end at the recursion limit as well), default, encoder, indent,
    # separators, sort_keys, skipkeys, allow_nan.
    make = getattr(_json_encoder, "c_make_encoder", None)
    escape = getattr(_json_encoder, "c_encode_basestring_ascii", None)
    if make is None or escape is None:
        return None
    encode = make(None, _default, escape, None, ": ", ", ", False, False, True)
    join = "".join

    def fast_encode(o: Any) -> str:
        return join(encode(o, 0))

    try:
        # It is not a public interface: if it ever changes, the public one is used.
        probe = {"a": [1, 2.5, None, True, "é"]}
        same = fast_encode(probe) == json.dumps(probe)
    except Exception:
        same = False
    return fast_encode if same else None


def dumps(
    s: Any,
    _dumps: Callable[..., str] = json.dumps,
    cls: type[json.JSONEncoder] = JSONEncoder,
    default_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> str:
    """Return the JSON text for s.

    Args:
        s: what to encode.
        _dumps: the function of the json module, or one like it.
        cls: the encoder to use with it.
        default_kwargs: arguments for it, which kwargs override.
        **kwargs: arguments for it, such as ``indent`` or ``sort_keys``.

    Raises:
        TypeError: something in s has no JSON form.
        ValueError: s contains itself.
        RecursionError: s is nested too deep, or contains itself.
    """
    if (
        not kwargs
        and not default_kwargs
        and cls is JSONEncoder
        and _dumps is json.dumps
        and _fast_encode is not None
        # Without the interpreter's guard, circles must be looked for.
        and sys.getrecursionlimit() <= MAX_DEPTH
    ):
        return _fast_encode(s)
    return _dumps(s, cls=cls, **{**(default_kwargs or {}), **kwargs})


_tagged_decoder = json.JSONDecoder(object_hook=object_hook)
_plain_decoder = json.JSONDecoder()


def loads(
    s: str | bytes | bytearray | memoryview,
    _loads: Callable[..., Any] = json.loads,
    decode_bytes: bool = True,
    object_hook: Callable[[dict[str, Any]], Any] = object_hook,
) -> Any:
    """Return what a JSON text stands for.

    Args:
        s: the text, or the text as UTF-8.
        _loads: the function of the json module, or one like it.
        decode_bytes: decode bytes here; else that is left to _loads.
        object_hook: called for each JSON object.

    Raises:
        ValueError: s is not JSON, or not UTF-8, or has an unknown ``__type__``.
        RecursionError: s is nested too deep.
    """
    if decode_bytes and isinstance(s, (bytes, bytearray, memoryview)):
        s = str(s, "utf-8")
    if not isinstance(s, str) or _loads is not json.loads or object_hook is not _object_hook:
        return _loads(s, object_hook=object_hook)
    if len(s) > MAX_DEPTH and sys.getrecursionlimit() > MAX_DEPTH:
        _check_depth(s)
    # "\u005f" is an underscore too.
    decoder = _tagged_decoder if "__type__" in s or "\\u005" in s else _plain_decoder
    try:
        value, end = decoder.scan_once(s, 0)  # type: ignore[attr-defined]
    except StopIteration:
        return decoder.decode(s)  # space in front of it, or an error: either way not the usual case
    if end != len(s) and s[end:].strip(_SPACE):
        raise json.JSONDecodeError("Extra data", s, end)
    return value


_object_hook = object_hook

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)


def _check_depth(s: str) -> None:
    if s.count("[") + s.count("{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKENS.finditer(s):
        character = s[token.start()]
        if character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise RecursionError(f"JSON nested deeper than {MAX_DEPTH}")
        elif character in "]}":
            depth -= 1


def _parse_datetime(text: str) -> datetime:
    # Python 3.10 does not know the letter.
    return datetime.fromisoformat(f"{text[:-1]}+00:00" if text.endswith("Z") else text)


def _register_default_types() -> None:
    _encoders[bytes] = _encode_bytes
    _decoders["bytes"] = lambda text: text.encode()
    _decoders["base64"] = lambda text: b64decode(text.encode())
    register_type(datetime, "datetime", datetime.isoformat, _parse_datetime)
    register_type(date, "date", date.isoformat, lambda text: _parse_datetime(text).date())
    register_type(time, "time", time.isoformat, time.fromisoformat)
    register_type(Decimal, "decimal", str, Decimal)
    # Only these two keywords: what a stranger sends is not passed on to a constructor.
    register_type(
        UUID,
        "uuid",
        lambda o: {"hex": o.hex},
        lambda value: UUID(hex=value["hex"], version=value.get("version")),
    )


_register_default_types()
_fast_encode = _make_fast_encoder()
