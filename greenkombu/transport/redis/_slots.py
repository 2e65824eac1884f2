"""Which server of a Redis Cluster has which key.

A key belongs to one of 16384 slots: the checksum of its name, or of the part in braces.  Servers
have ranges of slots, and tell them (CLUSTER SLOTS).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Any

from redis.crc import key_slot

__all__ = ["Address", "SlotMap", "key_of", "parse_address", "slot_of", "with_asking"]

#: Host and port.
Address = tuple[str, int]

#: Commands that concern no key, or that any server takes for all.
KEYLESS = frozenset({"CLIENT", "CLUSTER", "EXEC", "MULTI", "PING", "PUBLISH", "SCRIPT"})


def slot_of(key: bytes | str) -> int:
    """Return the slot of a key."""
    return key_slot(key.encode() if isinstance(key, str) else key)


def key_of(command: tuple[Any, ...]) -> bytes | str | None:
    """Return the first key of a command; None if it has none."""
    name = command[0]
    if name in KEYLESS:
        return None
    key: bytes | str = command[3] if name in ("EVAL", "EVALSHA") else command[1]
    return key


def parse_address(text: str, asked: str) -> Address:
    """Read the "host:port" of a redirection; without a host it is the one that was asked."""
    host, _, port = text.rpartition(":")
    return host or asked, int(port)


class SlotMap:
    """Who has which slot, as somebody has said."""

    def __init__(self) -> None:
        # Beginnings of the ranges, and who has each; None where nobody does.
        self._starts: list[int] = [0]
        self._owners: list[Address | None] = [None]
        # What was said of single slots since.
        self._moved: dict[int, Address] = {}
        #: All servers, replicas too.
        self.addresses: list[Address] = []

    @classmethod
    def parse(cls, reply: Any, asked: str) -> SlotMap:
        """Read the reply to CLUSTER SLOTS.

        Args:
            reply: ranges: first and last slot, and servers, of which the first is the master.
            asked: the host that was asked; one that does not know its own name leaves it out.
        """
        made = cls()
        made._starts, made._owners = [], []
        addresses: dict[Address, None] = {}
        end = 0
        for first, last, *servers in sorted(reply, key=lambda entry: entry[0]):
            found = [_address(server, asked) for server in servers]
            addresses.update(dict.fromkeys(found))
            if first > end:
                made._add(end, None)
            made._add(first, found[0] if found else None)
            end = last + 1
        made._add(end, None)
        made.addresses = list(addresses)
        return made

    def _add(self, start: int, owner: Address | None) -> None:
        self._starts.append(start)
        self._owners.append(owner)

    def owner(self, slot: int) -> Address | None:
        """Return who has a slot; None if nobody is known to have it."""
        if self._moved:
            found = self._moved.get(slot)
            if found is not None:
                return found
        return self._owners[bisect_right(self._starts, slot) - 1]

    def move(self, slot: int, owner: Address) -> None:
        """Note that a slot has another owner."""
        self._moved[slot] = owner


def _address(server: Iterable[Any], asked: str) -> Address:
    host, port, *_ = server
    name = host.decode() if isinstance(host, bytes) else ""
    return name if name not in ("", "?") else asked, port


def with_asking(data: bytes) -> bytes:
    """Put ASKING before each of some packed commands.

    Args:
        data: whole commands as `pack` makes them.
    """
    parts = []
    position = 0
    while position < len(data):
        start = position
        end = data.index(b"\r\n", position)
        words = int(data[position + 1 : end])
        position = end + 2
        for _ in range(words):
            end = data.index(b"\r\n", position)
            position = end + 2 + int(data[position + 1 : end]) + 2
        parts.append(b"*1\r\n$6\r\nASKING\r\n" + data[start:position])
    return b"".join(parts)
