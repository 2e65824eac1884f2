"""Quality of service: the prefetch limit, and the deliveries that are not acknowledged yet."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, TextIO

from greenkombu._forks import generation
from hub._exit import run_at_exit

if TYPE_CHECKING:
    from greenkombu.transport.virtual.channel import Channel
    from greenkombu.transport.virtual.message import Message

__all__ = ["Delivery", "QoS"]

logger = logging.getLogger(__name__)

#: A delivery that is not settled: the queue it came from, the dict that the store kept, and
#: what the store needs to find it again. It holds no channel, so that it can outlive one.
Delivery = tuple["str | None", Any, Any]

# What must give its deliveries back at exit. Weak: a channel may be dropped before.
_holding: weakref.WeakSet[QoS] = weakref.WeakSet()


class QoS:
    """The prefetch limit of a channel, and its unsettled deliveries.

    Args:
        channel: a virtual channel.
        prefetch_count: how many deliveries may be unsettled; 0 is no limit.

    Stores that keep unacknowledged messages themselves override `append`, `ack`, `reject` and
    `restore_visible`, and call these.
    """

    #: How many deliveries may be unsettled; 0 is no limit.
    prefetch_count = 0

    #: False: unsettled deliveries are not put back when the channel closes, is collected, or the
    #: process exits.
    restore_at_shutdown = True

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        self.channel: Any = channel
        self.prefetch_count = prefetch_count or 0
        self._delivered: dict[Any, Delivery] = {}
        self._restored = False
        self._guarded = False
        self._generation = generation()

    # -- the limit

    def can_consume(self) -> bool:
        """Tell whether another message may be delivered."""
        limit = self.prefetch_count
        return not limit or len(self._delivered) < limit

    def can_consume_max_estimate(self) -> int | None:
        """Return how many more messages may be delivered; None is no limit."""
        limit = self.prefetch_count
        return max(limit - len(self._delivered), 0) if limit else None

    def exceeded(self) -> bool:
        """Tell whether more is unsettled than the limit allows: two tasks looked at a time."""
        limit = self.prefetch_count
        return bool(limit) and len(self._delivered) > limit

    # -- deliveries

    def append(self, message: Message, delivery_tag: Any) -> None:
        """Note a delivery that waits to be settled."""
        try:
            delivery = (message.queue, message._raw, message._token)
        except AttributeError:  # not one of ours; Kombu keeps whatever it is given
            delivery = (None, message, None)
        self._delivered[delivery_tag] = delivery
        if not self._guarded:
            self._guard()

    def get(self, delivery_tag: Any) -> Message:
        """Return the message of an unsettled delivery.

        Raises:
            KeyError: there is none with this tag.
        """
        queue, raw, token = self._delivered[delivery_tag]
        if not isinstance(raw, dict):
            return raw  # type: ignore[no-any-return]
        message: Message = self.channel._make_message(raw, queue, token)
        return message

    def ack(self, delivery_tag: Any) -> None:
        """Settle a delivery; an unknown tag is ignored."""
        self._delivered.pop(delivery_tag, None)
        if self.channel._blocked:
            self.channel._unblock()

    def ack_up_to(self, delivery_tag: Any) -> None:
        """Settle a delivery and all before it; an unknown tag is ignored."""
        if delivery_tag in self._delivered:
            for tag in list(self._delivered):
                self.ack(tag)
                if tag == delivery_tag:
                    return

    def reject(self, delivery_tag: Any, requeue: bool = False) -> None:
        """Settle a delivery; put the message back, or let the queue dead-letter or drop it."""
        delivery = self._delivered.pop(delivery_tag, None)
        if delivery is not None:
            if requeue:
                self.channel._requeue(*delivery)
            else:
                self.channel._discard(*delivery)
        if self.channel._blocked:
            self.channel._unblock()

    # -- putting back

    def restore_unacked(self) -> list[tuple[BaseException, dict[str, Any]]]:
        """Put every unsettled message back on its queue, in order.

        Returns:
            The messages that could not be put back, each with the reason. They stay unsettled.
        """
        failed: list[tuple[BaseException, dict[str, Any]]] = []
        # Each goes to the head of its queue: the last one first.
        for tag in reversed(list(self._delivered)):
            delivery = self._delivered.get(tag)
            if delivery is None:
                continue
            try:
                self.channel._requeue(*delivery)
            except Exception as exc:
                failed.append((exc, delivery[1]))
            else:
                self._delivered.pop(tag, None)
        failed.reverse()
        if self.channel._blocked:
            self.channel._unblock()
        return failed

    def restore_unacked_once(self, stderr: TextIO | None = None) -> None:
        """Put every unsettled message back, if that is wanted, the first time this is called.

        Args:
            stderr: where to say so; None says it in the log.

        Messages that cannot be put back are written to a file (`emergency_dump_state`).
        """
        channel = self.channel
        if (
            self._restored
            or not self.restore_at_shutdown
            or not channel._restores_unacked
            # A child that inherited the deliveries has not received them.
            or self._generation != generation()
        ):
            return
        self._restored = True
        _holding.discard(self)
        if not self._delivered:
            return
        text = f"Restoring {len(self._delivered)} unacknowledged message(s)"
        _say(stderr, logging.INFO, text)
        failed = self.restore_unacked()
        if failed:
            _say(
                stderr,
                logging.ERROR,
                f"Unable to restore {len(failed)} message(s), the first because of "
                f"{failed[0][0]!r}",
            )
            from greenkombu.utils.div import emergency_dump_state

            emergency_dump_state([raw for _, raw in failed], stderr=stderr)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Put back what others held too long; only stores with a visibility timeout do."""

    def _guard(self) -> None:
        """See to it that nothing is lost when nobody closes the channel."""
        self._guarded = True
        channel = self.channel
        if self.restore_at_shutdown and channel._restores_unacked:
            run_at_exit(_restore_at_exit)
            _holding.add(self)
            channel._guard_deliveries(self._delivered)

    def __repr__(self) -> str:
        limit = self.prefetch_count or "no limit"
        return f"<{type(self).__name__}: {len(self._delivered)} unsettled, {limit}>"


def _say(stderr: TextIO | None, level: int, text: str) -> None:
    if stderr is None:
        logger.log(level, "%s", text)
    else:
        stderr.write(text + "\n")


def _restore_at_exit() -> None:
    for qos in list(_holding):
        try:
            qos.restore_unacked_once()
        except Exception as exc:
            logger.warning("cannot restore unacknowledged messages at exit: %r", exc)
