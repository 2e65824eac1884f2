"""The protocol of Redis without I/O: commands to bytes, bytes to replies.

RESP2 and RESP3 are read alike (https://redis.io/docs/latest/develop/reference/protocol-spec/).
hiredis does the work where it is installed; the parser in `_resp_python` gives the same results,
some ten times slower.  Strings are bytes (big numbers too, which Redis itself never sends), sets
are lists, maps are dictionaries, and an error is an instance of `ReplyError` in its place among
the replies.  What RESP3 calls a push is a `Push`.

What a server may send is bounded, as everything that comes from outside: a reply by
`max_reply_bytes`, a collection by `MAX_ELEMENTS`.  hiredis makes room for a whole collection when
it reads its header, so headers of that size are looked for before it gets to see them; a string
that contains such a header, with its line ends, is taken for one.  The looking costs half of what
the parsing does.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from greenkombu.transport.redis._errors import ArgumentError, ProtocolError, ReplyError
from greenkombu.transport.redis._resp_python import (
    DEFAULT_MAX_REPLY_BYTES,
    MAX_ELEMENTS,
    NOT_READY,
    Bounded,
    PurePythonReader,
    Push,
    hiredis,
    pack_in_python,
)

__all__ = [
    "DEFAULT_MAX_REPLY_BYTES",
    "NOT_READY",
    "PurePythonReader",
    "Push",
    "Reader",
    "make_reader",
    "pack",
    "pack_many",
]


class Reader(Protocol):
    """Makes replies of bytes.

    Attributes:
        error: set when the server broke the protocol; nothing more can be read then.
    """

    error: ProtocolError | None

    def feed(self, data: bytes) -> None:
        """Take what came."""

    def gets(self) -> Any:
        """Return the next reply, or NOT_READY.

        Raises:
            ProtocolError: the server broke the protocol; from then on always.
        """

    def take(self, data: bytes) -> list[Any]:
        """Take what came and return all whole replies.

        Replies in front of a violation are returned, and `error` is set.
        """


def make_reader(max_reply_bytes: int = DEFAULT_MAX_REPLY_BYTES) -> Reader:
    """Return the fastest reader that there is.

    Args:
        max_reply_bytes: of one reply; it is looked at whenever bytes come, so what comes at once
            may be more.
    """
    if hiredis is not None:
        return _HiredisReader(max_reply_bytes)
    return PurePythonReader(max_reply_bytes)


# -- hiredis

_TOO_MANY = re.compile(rb"\r\n[*%~>]0*[0-9]{8,}\r\n").search
# Bytes of such a header that may lie on either side of a border between two reads.
_BORDER = 16


class _HiredisReader(Bounded):
    def __init__(self, max_reply_bytes: int) -> None:
        super().__init__(max_reply_bytes)
        self._parser = hiredis.Reader(
            replyError=ReplyError, notEnoughData=NOT_READY, errors="replace"
        )
        self._next = self._parser.gets
        self._border = b"\r\n"

    def feed(self, data: bytes) -> None:
        if self.error is not None:
            return
        border = self._border + data[:_BORDER]
        found = _TOO_MANY(data) or _TOO_MANY(border)
        if found is not None:
            self.error = ProtocolError(
                f"a reply has {MAX_ELEMENTS} elements or more ({found.group().strip()!r})"
            )
            in_front = found.start() + 2 if found.string is data else 0
            self._parser.feed(data[:in_front])
            return
        self._border = (data if len(data) > _BORDER else border)[-_BORDER:]
        self._coming += len(data)
        self._parser.feed(data)

    def gets(self) -> Any:
        if self.error is not None:
            raise self.error
        try:
            reply = self._next()
        except Exception as exc:
            # Also TypeError (a list as the key of a map) and MemoryError.
            raise self.violated(str(exc) or repr(exc)) from None
        if reply is not NOT_READY or not self._parser.has_data():
            self._coming = 0
        else:
            self.check_size()
        return reply

    def take(self, data: bytes) -> list[Any]:
        replies: list[Any] = []
        if self.error is not None:
            return replies
        self.feed(data)
        following = self._next
        append = replies.append
        try:
            while (reply := following()) is not NOT_READY:
                append(reply)
        except Exception as exc:
            self.violated(str(exc) or repr(exc))
            return replies
        if not self._parser.has_data():
            self._coming = 0
        elif replies:
            self._coming = len(data)
        else:
            self.check_size()
        return replies


# -- commands


def pack(*args: Any) -> bytes:
    """Return one command as bytes.

    Args:
        *args: its words: str (sent as UTF-8), bytes, int or float.

    Raises:
        ArgumentError: a word is something else.
    """
    try:
        packed: bytes = _pack(args)
    except (TypeError, UnicodeEncodeError):
        raise _refused(args) from None
    return packed


def pack_many(commands: list[tuple[Any, ...]]) -> bytes:
    """Return several commands as bytes; see `pack`."""
    try:
        return b"".join([_pack(each) for each in commands])
    except (TypeError, UnicodeEncodeError):
        for each in commands:
            pack(*each)
        raise


def _refused(args: tuple[Any, ...]) -> ArgumentError:
    for word in args:
        if isinstance(word, str):
            try:
                word.encode()
            except UnicodeEncodeError as exc:
                return ArgumentError(
                    f"{args[0]}: a str that cannot be sent as UTF-8 ({exc.reason})"
                )
        elif type(word) not in (int, float, bytes):
            # Without its value, which may be a secret.
            return ArgumentError(
                f"{args[0]}: cannot send {type(word).__name__} to Redis: give str, bytes, int or"
                " float"
            )
    return ArgumentError("a command cannot be sent")


_pack = hiredis.pack_command if hiredis is not None else pack_in_python
