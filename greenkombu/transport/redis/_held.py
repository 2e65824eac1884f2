"""Messages that this client holds, and taking one of them for a task that waits for it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from greenkombu.transport.redis._errors import CommandTimeoutError, copy_of
from greenkombu.transport.redis._replies import GET_BYTES, fetch
from greenkombu.transport.redis._scripts import POP, RETURN

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis._taps import Taps
    from greenkombu.transport.redis.connection import Connection

__all__ = ["Held", "asked_tokens", "put_back", "take"]


class Held:
    """An unacked message of this client, as its settling needs it.

    Args:
        token: under which the server keeps it.
        keys: of its queue.
        place: of its list in `keys.lists`.

    Attributes:
        message: what the program has got; None while it waits in a buffer.
        forgotten_at: the moment at which it was found that the program has dropped that, by the
            monotonic clock; 0 if it was not.
    """

    __slots__ = ("forgotten_at", "keys", "message", "place", "token")

    message: weakref.ref[Any] | None

    def __init__(self, token: bytes, keys: QueueKeys, place: int) -> None:
        self.token = token
        self.keys = keys
        self.place = place
        self.message = None
        self.forgotten_at = 0.0

    def forgotten_for(self, now: float) -> float:
        """Return for how many seconds, as far as this was asked, nobody has had the message."""
        if self.message is None or self.message() is not None:
            return 0.0
        if not self.forgotten_at:
            self.forgotten_at = now
        return now - self.forgotten_at


def asked_tokens(
    prefix: bytes, asked: Mapping[int, tuple[QueueKeys, int]]
) -> list[tuple[QueueKeys, list[bytes]]]:
    """Return the tokens of messages that may have been taken for replies which did not come.

    Args:
        prefix: of the client's tokens.
        asked: by the number of the first token: keys of the queue, and how many were asked for.
    """
    return [
        (keys, [b"%s%d" % (prefix, number) for number in range(first, first + count)])
        for first, (keys, count) in list(asked.items())
    ]


def put_back(connection: Connection, held: Held, raw: bytes = b"") -> None:
    """Put an unacked message of this client at the head of its list.

    Args:
        connection: that holds it; if it is lost now, the next one does it.
        held: the message.
        raw: what to put there instead of the message as it was taken.
    """
    keys = held.keys

    def answered(reply: Any) -> None:
        if isinstance(reply, BaseException):
            connection.leave([(keys, [held.token])])

    connection.run(
        RETURN,
        (keys.unacked, keys.registered, keys.lists[held.place]),
        (held.token, b"", len(keys.tail), raw),
        answered,
        keys,
    )


class _Taking:
    """One message that a task waits for."""

    __slots__ = ("_keys", "_result", "_taps", "_unwanted", "_waiter", "number")

    def __init__(self, taps: Taps, keys: QueueKeys, number: int) -> None:
        self.number = number
        self._taps = taps
        self._keys = keys
        self._waiter = taps.connection.hub.environment.waiter()
        self._result: Any = None
        # Taken by who is to put the message back: the task, or the hub.
        self._unwanted: list[None] = []

    def answered(self, reply: Any) -> None:
        """Take the reply; in the hub."""
        self._taps.connection.answered(self.number, reply)
        if not isinstance(reply, BaseException):
            reply = self._read(reply)
            if reply and reply[0].__class__ is int:
                size, held = reply
                fetch(self._taps.connection, held, size, lambda whole: self._fetched(whole, held))
                return
        self._settle(reply)

    def _fetched(self, whole: Any, held: Held) -> None:
        """Take a message that is so large that it came in parts; in the hub."""
        if whole and not isinstance(whole, BaseException):
            self._settle((whole, held))
            return
        if self._taps.tokens.pop(held.token, None) is not None:
            put_back(self._taps.connection, held)
        self._settle(whole or ())

    def _settle(self, result: Any) -> None:
        self._result = result
        self._waiter.wake()
        self._put_back_unwanted()

    def _read(self, reply: Any) -> tuple[bytes | int, Held] | tuple[()]:
        keys = self._keys
        for place in range(len(keys.lists)):
            if reply[2 + place]:
                token = b"%s%d" % (self._taps.connection.token_prefix, self.number)
                held = Held(token, keys, place)
                self._taps.tokens[token] = held
                self._taps.connection.leases.took()
                return reply[-1], held
        return ()

    def _put_back_unwanted(self) -> None:
        result = self._result
        if result and not isinstance(result, BaseException) and self._unwanted:
            try:
                self._unwanted.pop()
            except IndexError:
                return
            held = result[1]
            if self._taps.tokens.pop(held.token, None) is not None:
                put_back(self._taps.connection, held)

    def wait(self) -> tuple[bytes, Held] | None:
        """Wait for the reply; in the task."""
        try:
            bound = remaining(self._taps.connection.settings.socket_timeout)
            self._waiter.wait(bound)
            result = self._result
            if result is None:
                raise CommandTimeoutError(
                    f"Redis server {self._taps.connection.settings.peer} did not give a message of"
                    f" queue {self._keys.queue!r} within {bound or 0:g} s; if it still does, the"
                    " message goes back"
                )
        except BaseException:
            self._unwanted.append(None)
            self._put_back_unwanted()
            raise
        if isinstance(result, BaseException):
            raise copy_of(result)
        return result or None


def take(taps: Taps, keys: QueueKeys) -> tuple[bytes, Held] | None:
    """Take one message of a queue now; parks the task.

    If the task is killed, or has no more time, the message goes back when it comes.

    Returns:
        The message as the server kept it, and what settles it; None if there is none.
    """
    connection = taps.connection
    connection.wire_of(keys)  # raises if it has ended
    taking = _Taking(taps, keys, connection.ask(keys, 1))
    connection.run(
        POP,
        (keys.unacked, keys.registered, keys.watchers, keys.parked, *keys.lists),
        (1, GET_BYTES, connection.token_prefix, taking.number, keys.tail, b"", 0, 0, b""),
        taking.answered,
        keys,
    )
    return taking.wait()
