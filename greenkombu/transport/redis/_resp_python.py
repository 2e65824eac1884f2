"""The protocol of Redis in Python alone, for where hiredis is not installed; see `_resp`.

What both have in common is here as well.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from greenkombu.transport.redis._errors import ProtocolError, ReplyError

__all__ = [
    "DEFAULT_MAX_REPLY_BYTES",
    "MAX_ELEMENTS",
    "NOT_READY",
    "Bounded",
    "PurePythonReader",
    "Push",
    "hiredis",
    "pack_in_python",
]

#: The module, or None.
hiredis: Any
try:
    hiredis = importlib.import_module("hiredis")
except ImportError:
    hiredis = None


class _NotReady:
    __slots__ = ()

    def __repr__(self) -> str:
        return "NOT_READY"


#: What `Reader.gets` returns when no whole reply is there.
NOT_READY = _NotReady()

#: A string of Redis has 512 MiB at most, and a reply may be a list of some.
DEFAULT_MAX_REPLY_BYTES = 1024 * 1024 * 1024
#: Of one list, set, map or push; it would take 80 MB before the first element has come.
MAX_ELEMENTS = 10_000_000
#: Lists in lists; a command of Redis itself answers with ten at most.
MAX_DEPTH = 128
#: Bytes of the header of a string or a list, or of a number; a simple string may be longer.
_HEADER_BYTES = 4096


class _Push(list[Any]):
    pass


#: Something that a server says without having been asked (RESP3): a list.
Push: type[list[Any]] = _Push if hiredis is None else hiredis.PushNotification


class Bounded:
    """What both readers share: the bound, and the first error."""

    def __init__(self, max_reply_bytes: int) -> None:
        self.error: ProtocolError | None = None
        self._max_reply_bytes = max_reply_bytes
        # Bytes of the reply that is coming in, and perhaps of some in front of it.
        self._coming = 0

    def violated(self, what: str) -> ProtocolError:
        if self.error is None:
            self.error = ProtocolError(f"this is not the protocol of Redis: {what}")
        return self.error

    def check_size(self) -> None:
        if self._coming > self._max_reply_bytes and self.error is None:
            self.error = ProtocolError(
                f"a reply is larger than {self._max_reply_bytes} bytes: ask for less at a time, or"
                " raise the transport option max_reply_bytes"
            )


_INTEGER = re.compile(rb"-?(0|[1-9][0-9]*)").fullmatch
_DOUBLE = re.compile(rb"[+-]?([0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?|inf|nan)", re.ASCII).fullmatch
_BIG_NUMBER = re.compile(rb"[+-]?[0-9]+").fullmatch
_LARGEST = 2**63


class PurePythonReader(Bounded):
    """The same in Python.

    It goes on where it was: an element that is complete is not read again, so that a reply in many
    small pieces takes no longer than one in few.
    """

    def __init__(self, max_reply_bytes: int = DEFAULT_MAX_REPLY_BYTES) -> None:
        super().__init__(max_reply_bytes)
        self._buffer = bytearray()
        self._at = 0
        # Up to where there is no line end.
        self._searched = 0
        # Collections that are coming in: type, elements that are missing, elements.
        self._open: list[tuple[int, int, list[Any]]] = []

    def feed(self, data: bytes) -> None:
        """Take what came."""
        if self.error is None:
            if self._at > 65536 or self._at == len(self._buffer):
                del self._buffer[: self._at]
                self._searched = max(self._searched - self._at, 0)
                self._at = 0
            self._buffer += data
            self._coming += len(data)

    def gets(self) -> Any:
        """Return the next reply, or NOT_READY."""
        if self.error is not None:
            raise self.error
        try:
            reply = self._parse()
        except ValueError as exc:
            raise self.violated(str(exc)) from None
        if reply is not NOT_READY:
            self._coming = len(self._buffer) - self._at
        else:
            self.check_size()
        return reply

    def take(self, data: bytes) -> list[Any]:
        """Take what came and return all whole replies."""
        replies: list[Any] = []
        self.feed(data)
        try:
            while self.error is None and (reply := self.gets()) is not NOT_READY:
                replies.append(reply)
        except ProtocolError:
            pass  # it is in `error`
        return replies

    def _parse(self) -> Any:
        while True:
            value = self._element()
            if value is NOT_READY:
                return NOT_READY
            while True:
                if not self._open:
                    return value
                kind, missing, elements = self._open[-1]
                elements.append(value)
                if missing > 1:
                    self._open[-1] = (kind, missing - 1, elements)
                    break
                self._open.pop()
                value = _collection(kind, elements, bool(self._open))

    def _element(self) -> Any:
        """Return the next value that is no collection, or an empty one; open the others."""
        buffer = self._buffer
        while True:
            start = self._at
            if start == len(buffer):
                return NOT_READY
            kind = buffer[start]
            if kind not in b"+-:$*_#,(=%~>":
                raise ValueError(f"{bytes(buffer[start : start + 8])!r} does not begin a reply")
            end = buffer.find(b"\r\n", max(start + 1, self._searched))
            if end < 0:
                self._searched = max(len(buffer) - 1, 0)
                if kind not in b"+-" and len(buffer) - start > _HEADER_BYTES:
                    raise ValueError(f"{bytes(buffer[start : start + 32])!r} has no line end")
                return NOT_READY
            line = bytes(buffer[start + 1 : end])
            if kind in b"$=":
                return self._string(kind, line, end + 2)
            self._at = self._searched = end + 2
            if kind not in b"*%~>":
                return _simple(kind, line)
            count = _count(line)
            if count < 0:
                return None
            if count >= MAX_ELEMENTS:
                raise ValueError(f"a reply has {MAX_ELEMENTS} elements or more ({count})")
            if len(self._open) >= MAX_DEPTH:
                raise ValueError(f"lists in lists, more than {MAX_DEPTH} deep")
            if count == 0:
                return _collection(kind, [], bool(self._open))
            self._open.append((kind, count * 2 if kind == 0x25 else count, []))

    def _string(self, kind: int, line: bytes, start: int) -> Any:
        size = _count(line)
        if size < 0:
            self._at = self._searched = start
            return None
        if size > self._max_reply_bytes:
            self._coming = max(self._coming, size)
            return NOT_READY
        buffer = self._buffer
        if len(buffer) < start + size + 2:
            # The header is read again when more has come.
            self._searched = start - 2
            return NOT_READY
        if buffer[start + size : start + size + 2] != b"\r\n":
            raise ValueError(f"a string of {size} bytes does not end there")
        text = bytes(memoryview(buffer)[start : start + size])
        self._at = self._searched = start + size + 2
        if kind == 0x3D:
            if text[3:4] != b":":
                raise ValueError(f"a verbatim string begins with {text[:4]!r}")
            return text[4:]
        return text


def _collection(kind: int, elements: list[Any], inside: bool) -> Any:
    if kind == 0x25:
        try:
            return dict(zip(elements[::2], elements[1::2], strict=True))
        except TypeError as exc:
            raise ValueError(f"a key of a map: {exc}") from None
    if kind == 0x3E and not inside:
        return Push(elements)
    return elements


def _count(line: bytes) -> int:
    if _INTEGER(line) is None or len(line) > 20:
        raise ValueError(f"{line[:32]!r} is no length")
    count = int(line)
    if count < -1:
        raise ValueError(f"{count} is no length")
    return count


def _simple(kind: int, line: bytes) -> Any:
    """Return the value of a line."""
    if kind in b"+-":
        if b"\r" in line or b"\n" in line:
            raise ValueError("a simple string has a line end inside")
        return line if kind == 0x2B else ReplyError(line.decode("utf-8", "replace"))
    if kind == 0x3A:
        if _INTEGER(line) is not None and line != b"-0" and len(line) <= 20:
            number = int(line)
            if -_LARGEST <= number < _LARGEST:
                return number
    elif kind == 0x5F:
        if not line:
            return None
    elif kind == 0x23:
        if line.lower() in (b"t", b"f"):
            return line.lower() == b"t"
    elif kind == 0x2C:
        if _DOUBLE(line.lower()) is not None:
            return float(line)
    elif _BIG_NUMBER(line) is not None:
        return line
    raise ValueError(f"{bytes((kind,)) + line[:32]!r} is no value")


def pack_in_python(args: tuple[Any, ...]) -> bytes:
    """Return one command as bytes; TypeError for a word that cannot be sent."""
    parts = [b"*%d\r\n" % len(args)]
    for word in args:
        kind = type(word)
        if kind is str:
            word = word.encode()
        elif kind is int:
            word = b"%d" % word
        elif kind is float:
            word = repr(word).encode()
        elif kind is not bytes:
            raise TypeError
        parts.append(b"$%d\r\n%b\r\n" % (len(word), word))
    return b"".join(parts)
