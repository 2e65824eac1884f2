"""The account of a soak: which messages were confirmed, and which were delivered.

A consuming process appends one line for each delivery to a file of its own, and acks afterwards:
what the kernel has taken survives the process's SIGKILL.
"""

from __future__ import annotations

import itertools
import os
from array import array
from pathlib import Path

__all__ = ["Ledger", "Record"]


class Record:
    """The file into which one consuming process writes what it gets.

    Args:
        path: the file, made if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def delivered(self, number: int, redelivered: bool) -> None:
        """Write a delivery down; call it before the ack."""
        os.write(self._descriptor, b"%d %d\n" % (number, redelivered))

    def problem(self, text: str) -> None:
        """Write down what is wrong in the consuming process."""
        os.write(self._descriptor, b"! " + " ".join(text.split()).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Ledger:
    """What was published, confirmed and delivered.

    Args:
        folder: where the consuming processes have their files.

    Attributes:
        published: publishes that were begun; their messages are numbered from 0.
        confirmed: the numbers of those that returned.
        delivered: deliveries, `redelivered` of which were marked so by the broker.
        problems: what the consuming processes complain of.
    """

    def __init__(self, folder: Path) -> None:
        self.published = 0
        self.confirmed = array("Q")
        self.delivered = 0
        self.redelivered = 0
        self.problems: list[str] = []
        self._folder = folder
        self._numbers = itertools.count()
        self._seen = bytearray()
        self._different = 0
        self._read: dict[Path, int] = {}

    def next_number(self) -> int:
        """Return the number of a message that is about to be published."""
        number = next(self._numbers)
        self.published = max(self.published, number + 1)
        return number

    def confirm(self, number: int) -> None:
        """Write down that a publish has returned."""
        self.confirmed.append(number)

    def look(self) -> None:
        """Read what the consuming processes have written since the last look."""
        for path in self._folder.glob("*.record"):
            with open(path, "rb") as file:
                file.seek(self._read.get(path, 0))
                # A line is written whole, but may be cut off by the end of this read.
                text, _, rest = file.read().rpartition(b"\n")
                self._read[path] = file.tell() - len(rest)
            for line in text.splitlines():
                self._take(line)

    def _take(self, line: bytes) -> None:
        first, _, second = line.partition(b" ")
        if first == b"!":
            self.problems.append(second.decode())
            return
        number = int(first)
        if number >= len(self._seen):
            self._seen.extend(bytes(number + 10_000 - len(self._seen)))
        self.delivered += 1
        self.redelivered += second == b"1"
        self._different += not self._seen[number]
        self._seen[number] = 1

    @property
    def backlog(self) -> int:
        """How many confirmed messages, at least, were not delivered at the last look.

        Quick, not exact: messages whose publish failed may be delivered as well, and count.
        """
        return len(self.confirmed) - self._different

    @property
    def twice(self) -> int:
        """How many deliveries were of a message that had been delivered before."""
        return self.delivered - self._different

    def missing(self) -> list[int]:
        """Return the confirmed messages that were not delivered up to the last look."""
        seen = self._seen
        return [number for number in self.confirmed if number >= len(seen) or not seen[number]]
