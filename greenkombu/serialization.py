"""Turning message bodies into bytes and back.

A serializer has a name (``json``), a content type (``application/json``) that travels with the
message, and a content encoding.  `registry` holds all of them; the functions of this module are its
methods.  There are json (with the types of `greenkombu.utils.json`), pickle, yaml and msgpack, the
last two if PyYAML and msgpack are installed, and ``raw`` for bytes and text.

Which content a receiver decodes
    With a list of accepted content types, exactly those (and bytes and text that call themselves
    ``application/data`` and ``application/text``).  Without a list, everything that is not
    disabled: pickle, yaml and msgpack are disabled until the program enables them, because a pickle
    from a stranger runs the stranger's code.  Refused content is not looked at.

Errors
    Whatever an encoder raises becomes EncodeError, whatever a decoder raises DecodeError, with the
    original as its cause; nesting that is too deep is NestingTooDeep, which is both.  A body longer
    than `max_body_bytes` is BodyTooLarge.  The message, and the registry, are unchanged by errors.

Serializers of other packages
    An entry point in the group ``greenkombu.serializers`` or ``kombu.serializers`` names a tuple of
    the arguments of `register` after the name.  They are loaded when a name or content type is
    asked for that is not known, since looking for them takes longer than importing this module.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Collection, Iterable
from importlib.util import find_spec
from typing import Any, NamedTuple, NoReturn

from greenkombu.exceptions import (
    ArgumentError,
    BodyTooLarge,
    ContentDisallowed,
    DecodeError,
    EncodeError,
    NestingTooDeep,
    SerializerNotInstalled,
    UnknownSerializer,
)
from greenkombu.utils.encoding import bytes_to_str, str_to_bytes
from greenkombu.utils.json import dumps as _json_dumps
from greenkombu.utils.json import loads as _json_loads

__all__ = [
    "SKIP_DECODE",
    "TRUSTED_CONTENT",
    "SerializerNotInstalled",
    "SerializerRegistry",
    "codec",
    "decode",
    "disable_insecure_serializers",
    "dumps",
    "enable_insecure_serializers",
    "encode",
    "loads",
    "max_body_bytes",
    "pickle",
    "pickle_load",
    "pickle_loads",
    "pickle_protocol",
    "prepare_accept_content",
    "raw_encode",
    "register",
    "register_json",
    "register_msgpack",
    "register_pickle",
    "register_yaml",
    "registry",
    "unpickle",
    "unregister",
]

#: Content encodings that are no character sets.
SKIP_DECODE = frozenset({"binary", "ascii-8bit"})

#: Content types that are accepted always: nothing is decoded but characters.
TRUSTED_CONTENT = frozenset({"application/data", "application/text"})

#: The longest body that is decoded, in bytes; None is without limit.  128 MiB is the default of
#: RabbitMQ's `max_message_size` before version 4, which allows less: a longer body is more likely
#: an accident or an attack than a message.
max_body_bytes: int | None = 128 * 1024 * 1024

#: Protocol 4 is what every Python 3 reads.  The variable is Kombu's.
pickle_protocol = int(os.environ.get("PICKLE_PROTOCOL", "4"))
pickle_load = pickle.load

_UNSET: Any = object()
_INSECURE = ("pickle", "yaml", "msgpack")
_ENTRY_POINT_GROUPS = ("greenkombu.serializers", "kombu.serializers")


class codec(NamedTuple):
    """How a serializer encodes."""

    content_type: str
    content_encoding: str
    encoder: Callable[[Any], Any]


class SerializerRegistry:
    """The known serializers, by name and by content type.

    A new one is empty; `registry` of this module is the one that messages use.
    """

    def __init__(self) -> None:
        self._encoders: dict[str, codec] = {}
        self._decoders: dict[str, Callable[[Any], Any]] = {}
        self._default_encode: Callable[[Any], Any] | None = None
        self._default_content_type: str | None = None
        self._default_content_encoding: str | None = None
        self._default_name: str | None = None
        self._disabled_content_types: set[str] = set()
        #: Name of the serializer by content type.
        self.type_to_name: dict[str, str] = {}
        #: Content type by name of the serializer.
        self.name_to_type: dict[str, str] = {}

    # -- what there is

    def register(
        self,
        name: str,
        encoder: Callable[[Any], Any] | None,
        decoder: Callable[[Any], Any] | None,
        content_type: str,
        content_encoding: str = "utf-8",
    ) -> None:
        """Add a serializer, or replace the one of that name.

        Args:
            name: what programs call it.
            encoder: makes text or bytes from data; None if it only decodes.
            decoder: makes data from text or bytes; None if it only encodes.
            content_type: what messages call it.
            content_encoding: character set of what encoder makes, or ``binary``.
        """
        if encoder is not None:
            self._encoders[name] = codec(content_type, content_encoding, encoder)
        if decoder is not None:
            self._decoders[content_type] = decoder
        self.type_to_name[content_type] = name
        self.name_to_type[name] = content_type

    def unregister(self, name: str) -> None:
        """Remove a serializer; its content type stays disabled if it was.

        Raises:
            SerializerNotInstalled: there is none of that name.
        """
        try:
            content_type = self.name_to_type.pop(name)
        except KeyError:
            raise self._unknown(name) from None
        self.type_to_name.pop(content_type, None)
        self._decoders.pop(content_type, None)
        self._encoders.pop(name, None)

    def enable(self, name: str) -> None:
        """Decode content of this kind again.

        Args:
            name: a serializer's name or a content type.

        Raises:
            SerializerNotInstalled: (also a KeyError) there is no serializer of that name.
        """
        self._disabled_content_types.discard(self._content_type_of(name))

    def disable(self, name: str) -> None:
        """Refuse to decode content of this kind, unless a receiver accepts it explicitly.

        Args:
            name: a serializer's name or a content type.

        Raises:
            SerializerNotInstalled: (also a KeyError) there is no serializer of that name.
        """
        self._disabled_content_types.add(self._content_type_of(name))

    def _content_type_of(self, name: str) -> str:
        if "/" in name:
            return name
        try:
            return self.name_to_type[name]
        except KeyError:
            raise self._unknown(name) from None

    def _unknown(self, name: object) -> SerializerNotInstalled:
        text = f"no serializer {name!r} is installed; there are {', '.join(self.name_to_type)}"
        package = _OPTIONAL.get(name) if isinstance(name, str) else None
        if package is not None:
            text += f". Install it with: pip install 'greenkombu[{name}]' ({package})"
        return UnknownSerializer(text)

    def _set_default_serializer(self, name: str) -> None:
        """Choose the serializer for data that is neither text nor bytes.

        Raises:
            SerializerNotInstalled: there is none of that name, or it only decodes.
        """
        entry = self._encoder(name)
        self._default_name = name
        self._default_content_type, self._default_content_encoding, self._default_encode = entry

    def _encoder(self, name: str) -> codec:
        entry = self._encoders.get(name)
        if entry is None and _load_entry_points():
            entry = self._encoders.get(name)
        if entry is None:
            raise self._unknown(name)
        return entry

    # -- encoding

    def dumps(self, data: Any, serializer: str | None = None) -> tuple[str, str, Any]:
        """Encode a message body.

        Args:
            data: what to send.
            serializer: name of a serializer; None sends text and bytes as they are and encodes
                anything else with the default serializer.

        Returns:
            (content type, content encoding, body).

        Raises:
            SerializerNotInstalled: there is no such serializer.
            EncodeError: data cannot be encoded.
        """
        if serializer is None or not serializer:
            if isinstance(data, str):
                return "text/plain", "utf-8", _encode_text(data)
            if isinstance(data, bytes):
                return "application/data", "binary", data
            encode = self._default_encode
            if encode is None:
                raise SerializerNotInstalled(
                    "no default serializer is set; name one, or call _set_default_serializer()"
                )
            content_type: Any = self._default_content_type
            content_encoding: Any = self._default_content_encoding
            serializer = self._default_name
        elif serializer == "raw":
            return raw_encode(data)
        else:
            content_type, content_encoding, encode = self._encoders.get(
                serializer
            ) or self._encoder(serializer)
        try:
            return content_type, content_encoding, encode(data)
        except Exception as exc:
            _raise_encode_error(serializer, exc)

    def encode(self, data: Any, serializer: str | None = None) -> tuple[str, str, Any]:
        """Encode a message body: the manual's name for `dumps`."""
        return self.dumps(data, serializer)

    # -- decoding

    def loads(
        self,
        data: Any,
        content_type: str | bytes | None,
        content_encoding: str | None,
        accept: Collection[str] | None = None,
        force: bool = False,
        _trusted_content: Collection[str] = TRUSTED_CONTENT,
    ) -> Any:
        """Decode a message body.

        Args:
            data: the body; None stays None.
            content_type: what the message says it is; without a known one it is text, or bytes if
                the content encoding is binary.
            content_encoding: its character set; UTF-8 if None.
            accept: content types to decode; None decodes what is not disabled.
            force: decode disabled content too.

        Returns:
            The data.

        Raises:
            ContentDisallowed: the content type is refused; the body was not looked at.
            DecodeError: the body is not what the content type says.
        """
        content_type = bytes_to_str(content_type) if content_type else "application/data"
        if not isinstance(content_type, str):
            raise DecodeError(f"the content type of a message is text, not {content_type!r:.100}")
        if accept is not None:
            if content_type not in accept and content_type not in _trusted_content:
                self._refuse(content_type, "not on the list of accepted content types", accept)
        elif not force and content_type in self._disabled_content_types:
            self._refuse(content_type, "disabled")
        if data is None:
            return None
        if max_body_bytes is not None and _size(data) > max_body_bytes:
            raise BodyTooLarge(
                f"a body of {_size(data)} bytes is above the limit of {max_body_bytes}; "
                "raise greenkombu.serialization.max_body_bytes if that is meant"
            )
        decoder = self._decoders.get(content_type)
        try:
            if decoder is not None:
                return decoder(data)
            if content_type not in _PLAIN and _load_entry_points():
                decoder = self._decoders.get(content_type)
                if decoder is not None:
                    return decoder(data)
            if isinstance(data, (bytes, bytearray, memoryview)):
                encoding = (content_encoding or "utf-8").lower()
                if encoding not in SKIP_DECODE:
                    return str(data, encoding)
            return data
        except Exception as exc:
            _raise_decode_error(content_type, data, exc)

    def decode(
        self,
        data: Any,
        content_type: str | bytes | None,
        content_encoding: str | None,
        force: bool = False,
        accept: Collection[str] | None = None,
    ) -> Any:
        """Decode a message body: the manual's `loads`, with force as the fourth argument."""
        return self.loads(data, content_type, content_encoding, accept=accept, force=force)

    def _refuse(
        self, content_type: str, why: str, accept: Collection[str] | None = None
    ) -> NoReturn:
        name = self.type_to_name.get(content_type, content_type)
        if accept is None:
            accept = self._decoders.keys() - self._disabled_content_types
        accepted = sorted({*map(str, accept), *TRUSTED_CONTENT})
        raise ContentDisallowed(
            f"Refusing to deserialize content of type {name} ({content_type}): it is {why}."
            f" Accepted are {', '.join(accepted)}. Accept it, by accept=[{name!r}, ...] of the"
            " consumer, only if every sender is trusted."
        )


#: The serializers that messages use.
registry = SerializerRegistry()

#: Content types that never belong to an entry point.
_PLAIN = frozenset({"text/plain", "application/data", "application/text"})

#: What must be installed for a serializer.
_OPTIONAL = {"yaml": "PyYAML", "msgpack": "msgpack"}


def _size(data: Any) -> int:
    if isinstance(data, memoryview):
        return data.nbytes
    try:
        return len(data)
    except TypeError:
        return 0  # not text and not bytes: the decoder will say so


def _encode_text(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as exc:
        raise EncodeError(f"cannot encode the text as UTF-8: {exc}") from exc


def _too_deep(exc: Exception) -> bool:
    if isinstance(exc, RecursionError):
        return True
    # msgpack has no class of its own for this when it packs; when it unpacks, it is StackError.
    return isinstance(exc, ValueError) and (
        type(exc).__name__ == "StackError" or str(exc).startswith("recursion limit exceeded")
    )


def _raise_encode_error(serializer: str | None, exc: Exception) -> NoReturn:
    if isinstance(exc, (EncodeError, SerializerNotInstalled, MemoryError)):
        raise exc
    if _too_deep(exc):
        raise NestingTooDeep(
            f"cannot encode the body with {serializer}: it is nested too deep, or contains itself"
        ) from exc
    raise EncodeError(f"cannot encode the body with {serializer}: {exc}") from exc


def _raise_decode_error(content_type: str, data: Any, exc: Exception) -> NoReturn:
    if isinstance(exc, (DecodeError, SerializerNotInstalled, MemoryError)):
        raise exc
    what = f"cannot decode a body of {_size(data)} bytes as {content_type}"
    if _too_deep(exc):
        raise NestingTooDeep(f"{what}: it is nested too deep") from exc
    raise DecodeError(f"{what}: {str(exc) or type(exc).__name__}") from exc


def raw_encode(data: Any) -> tuple[str, str, bytes]:
    """Return (content type, content encoding, body) for text or bytes, as they are.

    Raises:
        EncodeError: data is neither.
    """
    if isinstance(data, str):
        return "application/data", "utf-8", _encode_text(data)
    if isinstance(data, (bytes, bytearray, memoryview)):
        return "application/data", "binary", data if isinstance(data, bytes) else bytes(data)
    raise EncodeError(
        f"the raw serializer takes text or bytes, not {type(data).__name__}; "
        "choose json or another serializer"
    )


# -- the serializers


def register_json() -> None:
    """Register json."""
    registry.register("json", _json_dumps, _json_loads, "application/json", "utf-8")


def unpickle(s: str | bytes) -> Any:
    """Load a pickle; only ever one that a trusted sender made."""
    return pickle_loads(str_to_bytes(s))


def pickle_loads(s: Any, load: Callable[[Any], Any] = pickle_load) -> Any:
    """Load a pickle from any bytes-like object; only ever one that a trusted sender made."""
    return load(io.BytesIO(s))


def _pickle_dumps(data: Any) -> bytes:
    return pickle.dumps(data, protocol=pickle_protocol)


def register_pickle() -> None:
    """Register pickle; it stays disabled unless the program enabled it."""
    registry.register("pickle", _pickle_dumps, unpickle, "application/x-python-serialize", "binary")


# PyYAML and msgpack are imported when they are first used: a program that only uses JSON does not
# wait for them.  PyYAML's C loader is not used: at 100 000 brackets it overflows the C stack
# (measured, PyYAML 6.0.3), where the Python loader raises RecursionError.
def _yaml_dumps(data: Any) -> Any:
    import yaml

    return yaml.safe_dump(data)


def _yaml_loads(data: Any) -> Any:
    import yaml

    return yaml.safe_load(bytes(data) if isinstance(data, (bytearray, memoryview)) else data)


def register_yaml() -> None:
    """Register yaml, restricted to its safe types; without PyYAML, content is refused."""
    if find_spec("yaml") is not None:
        registry.register("yaml", _yaml_dumps, _yaml_loads, "application/x-yaml", "utf-8")
    else:
        registry.register("yaml", None, _not_available("yaml"), "application/x-yaml", "utf-8")


def _msgpack_dumps(data: Any) -> Any:
    import msgpack

    return msgpack.packb(data, use_bin_type=True)


def _msgpack_loads(data: Any) -> Any:
    import msgpack

    # Lengths that the data claims are bounded by its own length, and depth by 1024.
    return msgpack.unpackb(data, raw=False)


def register_msgpack() -> None:
    """Register msgpack; without the msgpack package, content is refused."""
    kind = "application/x-msgpack"
    if find_spec("msgpack") is not None:
        registry.register("msgpack", _msgpack_dumps, _msgpack_loads, kind, "binary")
    else:
        registry.register("msgpack", None, _not_available("msgpack"), kind, "binary")


def _not_available(name: str) -> Callable[[Any], Any]:
    def refuse(_: Any) -> Any:
        raise SerializerNotInstalled(
            f"content of type {name} needs {_OPTIONAL[name]}: pip install 'greenkombu[{name}]'"
        )

    return refuse


_entry_points_loaded = False


def _load_entry_points() -> bool:
    """Register the serializers of other packages, once; True the first time."""
    global _entry_points_loaded
    if _entry_points_loaded:
        return False
    _entry_points_loaded = True
    import logging
    from importlib.metadata import entry_points

    for group in _ENTRY_POINT_GROUPS:
        for entry in entry_points(group=group):
            # What the program registered itself comes first.
            if entry.name in registry.name_to_type:
                continue
            try:
                registry.register(entry.name, *entry.load())
            except Exception:
                logging.getLogger(__name__).warning(
                    "cannot load the serializer %r of %s", entry.name, entry.value, exc_info=True
                )
    return True


def enable_insecure_serializers(choices: Iterable[str] | None = _UNSET) -> None:
    """Decode content of these kinds, although a stranger's could do harm.

    Args:
        choices: names; pickle, yaml and msgpack by default, None for none.  One that is not
            installed is left out.
    """
    for name in _INSECURE if choices is _UNSET else choices or ():
        try:
            registry.enable(name)
        except SerializerNotInstalled:
            pass


def disable_insecure_serializers(allowed: Iterable[str] | None = _UNSET) -> None:
    """Refuse to decode anything but content of these kinds.

    Args:
        allowed: names or content types; only json by default, None for none.

    Raises:
        SerializerNotInstalled: an allowed serializer is not installed.
    """
    _load_entry_points()  # else the ones that are still to come would not be disabled
    registry._disabled_content_types.update(registry._decoders)
    for name in ("json",) if allowed is _UNSET else allowed or ():
        registry.enable(name)


def prepare_accept_content(
    content_types: Iterable[str] | None, name_to_type: dict[str, str] | None = None
) -> Any:
    """Return a list of accepted content in the form that `loads` takes.

    Args:
        content_types: names of serializers and content types, mixed; None stays None.
        name_to_type: content types by name; those of the registry by default.

    Returns:
        A set of content types, or None.

    Raises:
        SerializerNotInstalled: there is no serializer of one of the names.
        ArgumentError: it is no list of texts.
    """
    if content_types is None:
        return None
    if isinstance(content_types, str):
        content_types = (content_types,)
    given: Any = content_types
    content_types = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(each, str) for each in content_types):
        raise ArgumentError(
            f"accept must be a list of content types and names of serializers, not {given!r:.100}"
        )
    names = registry.name_to_type if name_to_type is None else name_to_type
    accepted = set()
    for each in content_types:
        if "/" in each:
            accepted.add(each)
        elif each in names or (_load_entry_points() and each in names):
            accepted.add(names[each])
        else:
            raise registry._unknown(each)
    return accepted


register_json()
register_pickle()
register_yaml()
register_msgpack()
registry._set_default_serializer("json")
registry._disabled_content_types.update(registry.name_to_type[name] for name in _INSECURE)

dumps = registry.dumps
loads = registry.loads
encode = registry.encode
decode = registry.decode
register = registry.register
unregister = registry.unregister
