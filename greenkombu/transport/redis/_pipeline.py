"""Whose a reply is: the queue of those who await replies, and what the hub reads, dealt out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenkombu.transport.redis._errors import ProtocolError, ReplyError, to_error
from greenkombu.transport.redis._resp import Push, make_reader

if TYPE_CHECKING:
    from greenkombu.transport.redis._options import Settings

__all__ = ["Done", "Pipeline"]

#: Called with the replies of a command, or with why there will be none.
Done = Callable[[Any], object]

# How many replies are awaited, or the text of a PING behind them; and whom to tell.
_Entry = tuple["int | bytes", Done]

# What a server says to a subscriber that speaks RESP2, as lists among the replies.
_PUBSUB = frozenset(
    {
        *(b"message", b"pmessage", b"smessage", b"subscribe", b"psubscribe", b"ssubscribe"),
        *(b"unsubscribe", b"punsubscribe", b"sunsubscribe"),
    }
)


class Pipeline:
    """The commands that wait for their replies, in the order in which they were sent.

    Args:
        settings: of the wire.
        on_push: called with what the server says unasked.
        pubsub: with RESP2, take lists that look like it for pushes.

    Attributes:
        enter: appends an entry; from any thread.
        failed: the error that ended it; None while it lives.
    """

    def __init__(
        self, settings: Settings, on_push: Callable[[list[Any]], object], pubsub: bool
    ) -> None:
        self.failed: BaseException | None = None
        self._peer = settings.peer
        self._on_push = on_push
        self._pubsub = pubsub
        self._reader = make_reader(settings.max_reply_bytes)
        self._entries: deque[_Entry] = deque()
        self.enter = self._entries.append
        # The one whose replies are coming in, and those that have come.
        self._due: _Entry | None = None
        self._got: list[Any] = []

    @property
    def awaited(self) -> int:
        """How many commands, or groups of them, are not answered."""
        return len(self._entries) + (self._due is not None)

    def take(self, data: bytes) -> None:
        """Deal out what has come; in the hub.

        Raises:
            ProtocolError: it is not what Redis would send.
            KombuError: what the server said unasked, as it does before it hangs up.
        """
        reader = self._reader
        replies = reader.take(data)
        entries = self._entries
        pubsub = self._pubsub
        # Taken over, as a callback may end the wire, and come to `fail` from in here.
        due, got = self._due, self._got
        self._due = None
        try:
            for reply in replies:
                kind = type(reply)
                if kind is Push or (pubsub and kind is list and reply and _is_pubsub(reply[0])):
                    self._on_push(reply)
                    if self.failed is not None:
                        return
                    continue
                if due is None:
                    if not entries:
                        self._unasked(reply)
                    due = entries.popleft()
                    got = []
                awaited, done = due
                if awaited.__class__ is int:
                    got.append(reply)
                    if len(got) < awaited:
                        continue
                elif not _is_marker(reply, awaited):
                    got.append(reply)
                    continue
                due = None
                done(got)
                if self.failed is not None:
                    return
        finally:
            if due is not None and self.failed is not None:
                due[1](self.failed)
            else:
                self._due, self._got = due, got
        if reader.error is not None:
            raise ProtocolError(f"Redis server {self._peer}: {reader.error}")

    def _unasked(self, reply: Any) -> None:
        """Take a reply that nobody awaits: what a server says that hangs up."""
        if isinstance(reply, ReplyError):
            raise to_error(reply, server=self._peer)
        raise ProtocolError(f"Redis server {self._peer} answered what nobody had asked")

    def fail(self, error: BaseException) -> None:
        """There will be no further reply: tell those who await one."""
        self.failed = error
        due, self._due = self._due, None
        if due is not None:
            due[1](error)
        self.fail_waiting()

    def fail_waiting(self) -> None:
        """Tell those who were entered after the end."""
        error = self.failed
        while True:
            try:
                _, done = self._entries.popleft()
            except IndexError:
                return
            done(error)


def _is_pubsub(word: Any) -> bool:
    return type(word) is bytes and word in _PUBSUB


def _is_marker(reply: Any, text: Any) -> bool:
    """Tell whether a reply is that to the PING behind commands without replies."""
    if isinstance(reply, ReplyError):
        # Somebody who may not even PING.
        return reply.code == "NOPERM" and "'ping'" in reply.message
    # The second is what a subscriber gets that speaks RESP2.
    return bool(reply == text or reply == [b"pong", text])
