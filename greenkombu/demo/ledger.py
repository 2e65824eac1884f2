"""Keep the books of numbered messages: which were sent, which came, how often, and how late.

A body carries the message's number and the time at which it was published, so nothing has to be
looked up when it arrives, and a message is counted once, lost, repeated or misdelivered by what
it says itself.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable
from struct import Struct
from time import perf_counter_ns

__all__ = ["HEADER_SIZE", "Ledger"]

# The number of the message, and perf_counter_ns() when it was published.
_HEADER = Struct("!QQ")
#: Bytes of the smallest body.
HEADER_SIZE = _HEADER.size

#: How many numbers a complaint about lost or repeated messages gives.
_NAMED = 5


class Ledger:
    """Count the messages 0 to `messages` - 1, of which number n belongs to queue n % `queues`.

    Args:
        messages: how many there will be.
        queues: how many queues they are spread over, in turn.
        body_size: bytes of each body, `HEADER_SIZE` at least.
    """

    def __init__(self, messages: int, queues: int, body_size: int) -> None:
        self.messages = messages
        self.queues = queues
        self.body_size = body_size
        #: Messages that came for the first time.
        self.received = 0
        #: When the last of them came, by perf_counter_ns().
        self.last_ns = 0
        #: Messages that were not ours, had the wrong size or came through the wrong queue.
        self.strange = 0
        self._padding = b"." * (body_size - HEADER_SIZE)
        self._seen = bytearray(messages)
        self._repeated: Counter[int] = Counter()
        self._latencies_ns = array("Q")

    def make_body(self, number: int) -> bytes:
        """Return the body of message `number`, published now."""
        return _HEADER.pack(number, perf_counter_ns()) + self._padding

    def receive(self, queue: int, body: bytes) -> int | None:
        """Enter a message that came through `queue`; return its number, None if it is strange.

        Also None when the message came before.
        """
        now = perf_counter_ns()
        if len(body) != self.body_size:
            self.strange += 1
            return None
        number, published = _HEADER.unpack_from(body)
        if number >= self.messages or number % self.queues != queue:
            self.strange += 1
            return None
        if self._seen[number]:
            self._repeated[number] += 1
            return None
        self._seen[number] = 1
        self.received += 1
        self.last_ns = now
        self._latencies_ns.append(max(now - published, 0))
        return int(number)

    @property
    def complete(self) -> bool:
        """Whether every message has come."""
        return self.received == self.messages

    @property
    def duplicates(self) -> int:
        """How often a message came again."""
        return self._repeated.total()

    def percentile_ms(self, share: float) -> float | None:
        """Return the latency that `share` (0 to 1) of the messages did not exceed, in ms."""
        ordered = sorted(self._latencies_ns)
        if not ordered:
            return None
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] / 1e6

    def problems(self, published: Iterable[range]) -> list[str]:
        """Say what is wrong when the messages of these numbers were published, naming some."""
        found = []
        sent, lost = 0, []
        for numbers in published:
            sent += len(numbers)
            lost += [number for number in numbers if not self._seen[number]]
        if sent != self.messages:
            found.append(f"{self.messages - sent} of {self.messages} messages were not published")
        if lost:
            lost.sort()
            found.append(f"{len(lost)} published messages did not arrive: {self._name(lost)}")
        if self._repeated:
            names = self._name(sorted(self._repeated))
            found.append(f"{self.duplicates} messages came more than once: {names}")
        if self.strange:
            found.append(f"{self.strange} messages came that were not for that queue")
        return found

    def _name(self, numbers: list[int]) -> str:
        named = ", ".join(f"{number} (queue {number % self.queues})" for number in numbers[:_NAMED])
        more = len(numbers) - _NAMED
        return f"{named} and {more} more" if more > 0 else named
