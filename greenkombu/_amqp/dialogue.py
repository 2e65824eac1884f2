"""The opening dialogue in one piece, for a broker whose part in it is known.

A handshake is three round trips, in which RabbitMQ tells all connections with the same parameters
the same.  So the first connection of a process holds it step by step and keeps it, and the next
ones say their whole part at once (header, start_ok, tune_ok, open) and compare what they hear with
what the first one heard.  TCP has no borders between the steps, and RabbitMQ takes what has come as
it comes to it; so nothing is decoded, and the task and the hub are woken once instead of three
times.

A broker that says anything else, or hangs up, is left, and the dialogue is held step by step on
another socket: what is wrong is always told by that one.  Nobody who has not accepted the very
same login before is told it ahead of his turn.
"""

from __future__ import annotations

from collections.abc import Hashable
from struct import Struct
from typing import TYPE_CHECKING, Any

from greenkombu._amqp.handshake import State
from greenkombu._amqp.methods import BY_NAME

if TYPE_CHECKING:
    from greenkombu._amqp.handshake import Handshake

__all__ = ["Dialogue", "Key", "failed", "keep", "known", "succeeded"]

#: Who is known to read one frame after the other, however many have come.
PRODUCT = "RabbitMQ"

#: Dialogues that are kept: a program has few brokers, virtual hosts and users.
ENTRIES = 64

#: How often in a row a broker may differ from what it said the last time, before it is never again
#: spoken to ahead of its turn: there may be several different ones behind one address.
FAILURES = 3

# type, channel, size, and the number of the method
_FRAME = Struct(">BHII").unpack_from
_METHOD_FRAME = 1

_HEARD = tuple(
    BY_NAME[name].code for name in ("Connection.start", "Connection.tune", "Connection.open_ok")
)

# What a dialogue depends on besides the broker: who we are, and what we want.
_dialogues: dict[Hashable | None, Dialogue] = {}
_failures: dict[Hashable, int] = {}


class Key(tuple[Any, ...]):
    """The parameters that a dialogue depends on, host and user first; shows no password."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<login of {self[1]!r} to {self[0]}>"


class Dialogue:
    """What was said in a handshake that succeeded.

    Attributes:
        said: our part, behind the protocol header.
        heard: the broker's part.
        agreed: the handshake, complete, with what both agreed on.
    """

    __slots__ = ("_ends", "agreed", "heard", "said")

    def __init__(self, said: bytes, heard: bytes, ends: list[int], agreed: Handshake) -> None:
        self.said = said
        self.heard = heard
        self.agreed = agreed
        self._ends = ends

    def state(self, heard: int) -> State:
        """Tell how far a handshake has come in which so many octets were heard."""
        return list(State)[sum(heard >= end for end in self._ends)]


def known(key: Hashable | None) -> Dialogue | None:
    """Return the dialogue that was kept under *key*; None if there is none to rely on."""
    return _dialogues.get(key)


def keep(key: Hashable, said: bytes, heard: bytes, handshake: Handshake) -> None:
    """Keep a dialogue that is complete, if the next one can be expected to be the same.

    Args:
        key: whatever our part of it, and the broker, depend on.
    """
    if handshake.server_properties.get("product") != PRODUCT:
        return
    if _failures.get(key, 0) >= FAILURES:
        return
    ends = _ends(heard)
    if ends:
        if len(_dialogues) >= ENTRIES:
            _dialogues.clear()
        _dialogues[key] = Dialogue(said, heard[: ends[-1]], ends, handshake)


def succeeded(key: Hashable) -> None:
    """The broker held its part of a dialogue that was kept."""
    if _failures:
        _failures.pop(key, None)


def failed(key: Hashable, for_good: bool = False) -> None:
    """Forget a dialogue: the broker did not hold its part of it.

    Args:
        for_good: never keep it again.
    """
    _dialogues.pop(key, None)
    if len(_failures) >= ENTRIES:
        _failures.clear()
    _failures[key] = FAILURES if for_good else _failures.get(key, 0) + 1


def _ends(heard: bytes) -> list[int]:
    """Return where the frames of a usual dialogue end; nothing if it was another one."""
    ends: list[int] = []
    position = 0
    for expected in _HEARD:
        kind, channel_id, size, code = _FRAME(heard, position)
        if kind != _METHOD_FRAME or channel_id or code != expected:
            return []  # a heartbeat, or a further question: not the same each time
        position += size + 8
        ends.append(position)
    return ends
