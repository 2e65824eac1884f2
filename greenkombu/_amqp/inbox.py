"""The inbox of an AMQP connection, and when the socket is not read because of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenkombu._amqp.errors import InboxOverflowError
from greenkombu.transport._connection import Inbox

if TYPE_CHECKING:
    from types import TracebackType

    from greenkombu._amqp.options import AMQPOptions
    from greenkombu._amqp.rpc import PendingReply
    from hub.streams import Stream

__all__ = ["Awaiting", "DeliveryInbox", "Intake"]


class DeliveryInbox(Inbox):
    """An inbox that takes a batch with one notification."""

    __slots__ = ()

    def extend(self, events: list[Any]) -> None:
        """Add *events*, in order, and tell the listeners once."""
        self._events.extend(events)
        if self._listeners:
            self.notify()

    def octets(self) -> int:
        """Return the size of all bodies that wait."""
        while True:
            try:
                return sum(map(_size, self._events))
            except RuntimeError:  # another thread took one off meanwhile
                continue


def _size(event: Any) -> int:
    size: int = getattr(event, "size", 0)
    return size


class Intake:
    """Decide whether to read on: not while too much waits, unless an answer is awaited.

    An answer may be behind everything that waits in the socket.  So while a task waits for one the
    socket is read in any case, up to a hard bound, at which the connection ends.  A publisher that
    waits for room (for Connection.unblocked, which may be behind it, too) has it read up to the
    same bound, and no further: the task that should drain may be the one that waits.

    Args:
        inbox: where deliveries wait.
        options: the marks.
    """

    __slots__ = (
        "_count_at",
        "_held",
        "_held_octets",
        "_inbox",
        "_octets",
        "_options",
        "awaited",
        "paused",
        "resume_below",
        "stream",
    )

    def __init__(self, inbox: DeliveryInbox, options: AMQPOptions) -> None:
        self._inbox = inbox
        self._options = options
        self.stream: Stream | None = None
        #: True while the socket is not read because of the inbox.
        self.paused = False
        #: Reading goes on when no more than this many events wait.
        self.resume_below = 0
        # No fewer than what waits: the octets found by the last count, and all that came since.
        self._octets = 0
        # When to count again. That takes a look at each event, so not with every block.
        self._count_at = options.inbox_bytes
        # Deliveries that channels hold back (flow).
        self._held = 0
        self._held_octets = 0
        #: Whoever waits for an answer, or for room.
        self.awaited: dict[Awaiting | PendingReply, None] = {}

    def starts(self) -> None:
        """A block is about to be handled; called in the hub."""
        if not self._inbox:
            self._octets = self._held_octets
            self._count_at = self._options.inbox_bytes

    def took(self, octets: int, broker: str) -> None:
        """A block with deliveries went into the inbox; called in the hub.

        Raises:
            InboxOverflowError: beyond the hard bound; the connection is to be aborted.
        """
        self._octets += octets
        options = self._options
        inbox = self._inbox
        count = len(inbox) + self._held
        if self._octets > self._count_at:
            self._count()
        if count <= options.inbox_messages and self._octets <= options.inbox_bytes:
            return
        factor = options.inbox_hard_factor
        full = count > options.inbox_messages * factor or (
            self._octets > options.inbox_bytes * factor
            and self._count() > options.inbox_bytes * factor
        )
        if full and self._must_read(full):
            raise InboxOverflowError(
                f"broker {broker}: {count} messages with {self._octets} octets wait to be drained"
                " while a request waits for its answer; set a prefetch (basic_qos), or drain"
                " in a task of its own"
            )
        if self.stream is not None and not self.paused and not self._must_read(full):
            # Draining does not make what is held less.
            mostly_held = (
                self._held > options.inbox_messages // 2
                or self._held_octets > options.inbox_bytes // 2
            )
            self.resume_below = -1 if mostly_held else count // 2
            self.paused = True
            self.stream.pause_reading()
            if self._must_read(full) or len(inbox) <= self.resume_below:  # since the look
                self.resume()

    def _count(self) -> int:
        options = self._options
        self._octets = self._inbox.octets() + self._held_octets
        self._count_at = max(options.inbox_bytes, self._octets + options.inbox_bytes // 8)
        return self._octets

    def _must_read(self, full: bool) -> bool:
        """Tell whether somebody waits for whom the socket is read, however much is in the inbox.

        Args:
            full: there is as much as the hard bound allows.
        """
        return any(wait.for_answer or not full for wait in list(self.awaited))

    def hold(self, delivery: Any) -> None:
        """A channel holds a delivery back; called in the hub."""
        self._held += 1
        self._held_octets += _size(delivery)

    def release(self, deliveries: list[Any]) -> None:
        """A channel hands over what it held; called in the hub, after they are in the inbox."""
        self._held -= len(deliveries)
        self._held_octets -= sum(map(_size, deliveries))
        if self.paused:
            self.resume()

    def drained(self) -> None:
        """Half of what the socket is not read for was taken out."""
        self._count()
        self.resume()

    def resume(self) -> None:
        """Read again, if only one block more."""
        self.paused = False
        if self.stream is not None:
            self.stream.resume_reading()


class Awaiting:
    """A context in which a task waits, and has the socket read for it; see `Intake`.

    Args:
        for_answer: it waits for an answer, and not only for room.
    """

    __slots__ = ("_intake", "for_answer")

    def __init__(self, intake: Intake, for_answer: bool = True) -> None:
        self._intake = intake
        self.for_answer = for_answer

    def __enter__(self) -> None:
        intake = self._intake
        intake.awaited[self] = None
        if intake.paused:
            intake.resume()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self._intake.awaited.pop(self, None)
