"""Text and bytes, and text for the log that never fails."""

from __future__ import annotations

import sys
from typing import Any, TextIO, TypeVar, overload

__all__ = [
    "bytes_to_str",
    "default_encode",
    "default_encoding",
    "ensure_bytes",
    "from_utf8",
    "get_default_encoding_file",
    "safe_repr",
    "safe_str",
    "set_default_encoding_file",
    "str_to_bytes",
]

_T = TypeVar("_T")

_default_encoding_file: TextIO | None = None


@overload
def str_to_bytes(s: str) -> bytes: ...
@overload
def str_to_bytes(s: _T) -> _T: ...
def str_to_bytes(s: Any) -> Any:
    """Return a str as UTF-8 bytes; anything else as it is.

    Raises:
        UnicodeEncodeError: the text holds lone surrogates.
    """
    return s.encode() if isinstance(s, str) else s


def ensure_bytes(s: Any) -> Any:
    """Return a str as UTF-8 bytes; anything else as it is."""
    return str_to_bytes(s)


@overload
def bytes_to_str(s: bytes) -> str: ...
@overload
def bytes_to_str(s: _T) -> _T: ...
def bytes_to_str(s: Any) -> Any:
    """Return bytes as text, with U+FFFD for what is not UTF-8; anything else as it is."""
    return s.decode("utf-8", "replace") if isinstance(s, bytes) else s


def from_utf8(s: _T, *args: Any, **kwargs: Any) -> _T:
    """Return s: text needs no decoding on Python 3."""
    del args, kwargs
    return s


def default_encode(obj: _T) -> _T:
    """Return obj: text needs no encoding on Python 3."""
    return obj


def set_default_encoding_file(file: TextIO | None) -> None:
    """Let `default_encoding` answer for this stream, a log file for instance."""
    global _default_encoding_file
    _default_encoding_file = file


def get_default_encoding_file() -> TextIO | None:
    """Return the stream set by `set_default_encoding_file`, or None."""
    return _default_encoding_file


def default_encoding(file: TextIO | None = None) -> str:
    """Return the encoding of file, of the default encoding file, or of the file system."""
    stream = file if file is not None else _default_encoding_file
    return getattr(stream, "encoding", None) or sys.getfilesystemencoding()


def safe_str(s: Any, errors: str = "replace") -> str:
    """Return text for s, whatever s is.

    Args:
        s: text is returned as it is, bytes are decoded as UTF-8, of anything else its repr.
        errors: what to do with bytes that are not UTF-8: an error handler of codecs.

    Returns:
        Text; a note about the failure when s has a repr that raises.
    """
    if isinstance(s, str):
        return s
    if isinstance(s, bytes):
        return s.decode("utf-8", errors)
    return safe_repr(s, errors)


def safe_repr(o: Any, errors: str = "replace") -> str:
    """Return repr(o), or a note about the failure when that raises."""
    del errors  # kept for Kombu's signature; repr is text already
    try:
        return repr(o)
    except Exception as exc:
        # The error's own text may be what failed: only its type is shown then.
        try:
            why = repr(exc)
        except Exception:
            why = type(exc).__name__
        return f"<Unrepresentable {type(o)!r}: {why}>"
