"""How much the server may have to answer at a time, and messages that are larger than that.

A connection that hears wakes is a subscriber to the server, which drops a subscriber for whom more
than 32 MiB wait (client-output-buffer-limit pubsub); and it would do so each time that the same
messages are taken.  So what taps ask for is bounded for all taps of a connection together, and a
message that is larger than a tap may ask for is fetched in parts, once it is taken.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from greenkombu.exceptions import OperationalError
from greenkombu.transport.redis._errors import ReplyError
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._scripts import COPY

if TYPE_CHECKING:
    from greenkombu.transport.redis._held import Held
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.connection import Connection

__all__ = ["GET_BYTES", "PART_BYTES", "Replies", "fetch", "fetch_now"]

#: Bytes that the taps of a connection may have asked for at a time; well below the limit of a
#: server, and also below what it bears for a minute only (8 MiB).
BUDGET = 8 * 1024 * 1024
#: Bytes of payload that one reply has at most, and at least where there are many taps.
MOST, LEAST = 1024 * 1024, 64 * 1024
#: Bytes of a part of a message.
PART_BYTES = 4 * 1024 * 1024
#: Seconds for which the copy is kept that parts are read of, if nobody removes it.
COPY_SECONDS = 300
#: The same as `MOST` for one message that a task waits for; there may be hundreds of such tasks,
#: and they do not wait for each other.
GET_BYTES = 256 * 1024


class Replies:
    """The bytes that a connection may ask for, dealt out in turn; used in the hub only."""

    def __init__(self) -> None:
        self._free = BUDGET
        self._waiting: deque[tuple[int, Callable[[], object]]] = deque()
        self._starting = False

    @staticmethod
    def share(taps: int) -> int:
        """Return how many bytes one of so many taps may ask for."""
        return max(min(BUDGET // max(taps, 1), MOST), LEAST)

    def reserve(self, size: int, start: Callable[[], object]) -> None:
        """Call *start* when *size* bytes may be asked for: now, or in the hub.

        Args:
            size: at most `BUDGET`.
            start: has to see to it that `release` is called when they have come.
        """
        self._waiting.append((size, start))
        self._start()

    def release(self, size: int) -> None:
        """What *size* bytes were reserved for has come, or never will."""
        self._free += size
        self._start()

    def _start(self) -> None:
        if self._starting:
            return  # further down the stack, which would grow otherwise
        self._starting = True
        try:
            while self._waiting and self._waiting[0][0] <= self._free:
                size, start = self._waiting.popleft()
                self._free -= size
                start()
        finally:
            self._starting = False


def fetch(connection: Connection, held: Held, size: int, done: Callable[[Any], object]) -> None:
    """Fetch the payload of a message that was taken, in parts; never waits; in the hub.

    Args:
        connection: that holds it.
        held: the message.
        size: its bytes.
        done: called with them; empty if it is no longer held; or with an error.
    """
    keys = held.keys
    copy = _copy_of(keys, held.token)
    parts: list[bytes] = []
    # The payload is kept behind a bracket.
    ranges = _ranges(1, size + 1)

    def begin() -> None:
        connection.run(COPY, (keys.unacked, copy), (held.token, COPY_SECONDS), copied, keys)

    def copied(reply: Any) -> None:
        if isinstance(reply, BaseException) or not reply:
            finish(reply or b"")
        else:
            ask()

    def ask() -> None:
        part = next(ranges, None)
        if part is None:
            connection.send(pack("DEL", copy), 1, None, keys)
            finish(b"".join(parts))
        else:
            connection.send(pack("GETRANGE", copy, *part), 1, answered, keys)

    def answered(replies: Any) -> None:
        reply = replies if isinstance(replies, BaseException) else replies[0]
        if isinstance(reply, ReplyError):
            reply = connection.refused(reply, "GETRANGE")
        if isinstance(reply, BaseException) or not reply:
            finish(reply)
        else:
            parts.append(reply)
            ask()

    def finish(result: Any) -> None:
        connection.replies.release(PART_BYTES)
        done(result)

    connection.replies.reserve(PART_BYTES, begin)


def fetch_now(connection: Connection, keys: QueueKeys, token: bytes, size: int) -> bytes:
    """Return all that `unacked` keeps of a large message; parks the task.

    Args:
        connection: to ask by.
        keys: of a queue with the same hash.
        token: of the message.
        size: of what is kept.

    Returns:
        Nothing if it is no longer kept.

    Raises:
        OperationalError: somebody else has removed the copy; the message is where it was.
    """
    copy = _copy_of(keys, token)
    if not connection.eval(COPY, (keys.unacked, copy), (token, COPY_SECONDS), keys):
        return b""
    parts = [connection.call("GETRANGE", copy, *part, route=keys) for part in _ranges(0, size)]
    connection.call("DEL", copy, route=keys)
    whole = b"".join(parts)
    if len(whole) != size:
        raise OperationalError(
            f"the copy {copy.decode('utf-8', 'replace')!r} of a large message has vanished from"
            " the server while it was read; the message is still there"
        )
    return whole


def _copy_of(keys: QueueKeys, token: bytes) -> bytes:
    return keys.unacked + b":copy:" + token


def _ranges(start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where parts begin and end, as GETRANGE counts."""
    while start < end:
        yield start, min(start + PART_BYTES, end) - 1
        start += PART_BYTES
