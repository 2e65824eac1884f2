"""Acknowledgements: sent together at the end of a turn of the loop, and never waited for."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from greenkombu.transport.redis._errors import ReplyError
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._restore import Orphans

if TYPE_CHECKING:
    from greenkombu.transport.redis._held import Held
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.connection import Connection

__all__ = ["Acks"]

#: Acknowledgements that are sent in one command.
MOST = 256


class Acks:
    """The acknowledgements of one connection that were not sent yet.

    Args:
        connection: to send by. If it is lost before the server has answered, the next connection
            of this process acknowledges again.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: deque[Held] = deque()
        # The end of this turn will send them.
        self._set = False

    def add(self, held: Held) -> None:
        """Have the server forget a message, soon; from any thread."""
        self._waiting.append(held)
        if len(self._waiting) >= MOST:
            self.flush()
        elif not self._set:
            self._set = True
            self._connection.in_hub(self._flush_later)

    def _flush_later(self) -> None:
        self._connection.hub.at_turn_end(self._flush_at_end)

    def _flush_at_end(self) -> None:
        # In this order: who adds one now sends it, or it is sent here.
        self._set = False
        self.flush()

    def flush(self) -> None:
        """Send what waits; from any thread."""
        waiting = self._waiting
        while waiting:
            held: dict[bytes, tuple[QueueKeys, list[bytes]]] = {}
            try:
                for _ in range(MOST):
                    one = waiting.popleft()
                    held.setdefault(one.keys.unacked, (one.keys, []))[1].append(one.token)
            except IndexError:
                pass
            for keys, tokens in held.values():
                # In this order: what a crash leaves in between is an entry of the index alone,
                # which whoever finds it removes.
                self._connection.send(
                    pack("HDEL", keys.unacked, *tokens) + pack("ZREM", keys.registered, *tokens),
                    2,
                    partial(self._answered, keys, tokens),
                    keys,
                )

    def _answered(self, keys: QueueKeys, tokens: list[bytes], replies: Any) -> None:
        if isinstance(replies, BaseException):
            Orphans.leave(self._connection.heirs, [(keys, tokens)], acked=True)
            return
        for reply in replies:
            if isinstance(reply, ReplyError):
                self._connection.refused(reply, "an acknowledgement")
