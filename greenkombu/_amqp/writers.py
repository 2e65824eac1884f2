"""The writes of one channel that are under way, so that nothing follows its Channel.close.

RabbitMQ ends the whole connection (504) when anything of a channel comes behind the Channel.close,
or the Channel.close_ok, of that channel.  Requests and numbered publishes look whether the channel
is being closed in an exclusive step of the connection, and so does what closes it.  Plain
publishes and acks do not: that would cost them a queue and a lock.  They look, then append their
bytes.  Green threads do not switch in between, and their channels have none of this.  Native
threads do, and there each such write is noted here from before its look to after its append.
Whoever closes a channel has later writes refused, and then looks who is inside.  If some write is
under way, the last of these runs the closing steps.

All closing steps of a channel run in one exclusive step, in order.  Were a Channel.close_ok of
ours to come later than our Channel.close, the number could be free and in use again by then.

No lock: a signal handler may interrupt a write and close the channel, in the same thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["Writers"]


class Writers:
    """The writes of one channel that are under way.

    Attributes:
        inside: one entry for each; added before the look at the channel, removed after the append.
        closing: steps that close the channel and wait for the last of these writes.
        refused: True for writes that begin now: the channel is being closed.
    """

    __slots__ = ("_sealed", "closing", "inside", "refused")

    def __init__(self) -> None:
        self.inside: dict[object, None] = {}
        self.closing: list[tuple[Callable[..., bytes], tuple[Any, ...]]] = []
        self.refused = False
        # True once nothing was inside: who came later was refused.
        self._sealed = False

    def close(self) -> bytes:
        """Run the closing steps unless a write is under way; an exclusive step.

        Whoever ends the last write comes back here: it leaves before it looks for closing steps,
        and these are there before the look at who is inside.
        """
        if self.inside and not self._sealed:
            return b""
        self._sealed = True
        data = b""
        while self.closing:
            step, arguments = self.closing.pop(0)
            data += step(*arguments)
        return data
