"""Quality of service of a Redis channel: settling is sent, and never waited for."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.transport.redis._held import Held
from greenkombu.transport.redis._restore import restore
from greenkombu.transport.virtual import qos as virtual

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.channel import Channel
    from greenkombu.transport.virtual.message import Message

__all__ = ["QoS"]


class QoS(virtual.QoS):
    """The prefetch limit of a channel, and its unsettled deliveries, which the server knows too.

    Args:
        channel: a Redis channel.
        prefetch_count: how many messages may be unsettled; 0 is no limit.
    """

    channel: Channel

    def append(self, message: Message, delivery_tag: Any) -> None:
        """Note a delivery that waits to be settled, and who can do that."""
        super().append(message, delivery_tag)
        held: Held | None = getattr(message, "_token", None)
        if held is not None and self.channel.ack_emulation:  # without it this is settled
            held.message = weakref.ref(message)

    def ack(self, delivery_tag: Any) -> None:
        """Settle a delivery; an unknown tag is ignored."""
        delivery = self._delivered.pop(delivery_tag, None)
        if delivery is not None:
            channel = self.channel
            held: Held | None = delivery[2]
            if held is not None:
                channel.forget(held)
            if channel._blocked:
                channel._unblock()

    def restore_unacked(self) -> list[tuple[BaseException, dict[str, Any]]]:
        """Put every unsettled message back on its queue, in order, and wait until that is done.

        Returns:
            The messages that could not be put back, each with the reason. They stay unsettled.
        """
        taps = self.channel.taps
        taps.paused = True  # or the first one that is back would be taken before the others are
        try:
            failed = super().restore_unacked()
        finally:
            taps.paused = False
            taps.connection.in_hub(taps.look)
        if self.channel.redis.error is None:
            self.channel.redis.sync()
        return failed

    def forgotten(self, seconds: float) -> list[Any]:
        """Return the tags of deliveries whose message the program dropped some time ago.

        Args:
            seconds: since this was seen first; a program that settles by the tag has so long.
        """
        now = monotonic()
        return [
            tag
            for tag, (_, _, held) in list(self._delivered.items())
            if held is not None and held.forgotten_for(now) >= seconds
        ]

    def give_back(self, tags: Sequence[Any]) -> None:
        """Put unsettled deliveries back on their queues, in order; parks the task.

        What cannot be put back is renewed no more, so that somebody else will do it.
        """
        channel = self.channel
        found: dict[bytes, tuple[QueueKeys, list[bytes]]] = {}
        for tag in reversed(tags):  # the last one that is put back is served first
            delivery = self._delivered.pop(tag, None)
            if delivery is not None:
                held: Held = delivery[2]
                channel.taps.tokens.pop(held.token, None)
                found.setdefault(held.keys.registered, (held.keys, []))[1].append(held.token)
        try:
            for keys, tokens in found.values():
                restore(channel.redis, keys, tokens)
        finally:
            channel.taps.settled()
            if channel._blocked:
                channel._unblock()

    def restore_by_tag(self, tag: str, client: Any = None, leftmost: bool = False) -> None:
        """Put an unacknowledged message back, whoever has it; an unknown tag is ignored.

        Args:
            tag: the delivery tag, under which the server keeps the message.
            client: Kombu's; not needed.
            leftmost: at the end of the line, instead of the next to be served.
        """
        del client
        channel = self.channel
        if self._delivered.pop(tag, None) is not None:
            channel.taps.tokens.pop(tag.encode(), None)
        redis = channel.redis
        for keys in redis.indexes() or [redis.keys.of("")]:
            restore(redis, keys, [tag.encode()], last=leftmost)
        channel.taps.settled()
        if channel._blocked:
            channel._unblock()

    def restore_visible(
        self, start: float = 0, num: int | None = 10, interval: float = 10, **kwargs: Any
    ) -> None:
        """Put back what clients left that are gone; it is done by itself now and then.

        Args:
            start: Kombu's; the oldest are always the first.
            num: at most so many; None takes the transport option unacked_restore_limit.
            interval: Kombu's; how often it is done follows from the visibility timeout.
            **kwargs: the same.
        """
        del start, interval, kwargs
        self.channel.restore_visible(num)

    # -- Kombu's names of what holds for the channel

    @property
    def visibility_timeout(self) -> float:
        """Seconds after which a message counts as lost that nobody has renewed."""
        return self.channel.redis.leases.visibility_timeout

    @property
    def unacked_key(self) -> str:
        """The hash of unacknowledged messages."""
        return self.channel.redis.keys.unacked

    @property
    def unacked_index_key(self) -> str:
        """The sorted set that tells when they were taken or renewed."""
        return self.channel.redis.keys.index

    @property
    def unacked_mutex_key(self) -> str:
        """What a client holds that looks for lost messages."""
        return self.channel.redis.keys.mutex

    @property
    def unacked_mutex_expire(self) -> float:
        """Seconds for which it may hold that."""
        return self.channel.redis.leases.mutex_seconds

    @property
    def client(self) -> Any:
        """The channel's client of redis-py."""
        return self.channel.client

    @contextlib.contextmanager
    def pipe_or_acquire(self, pipe: Any = None, client: Any = None) -> Iterator[Any]:
        """Give the block a pipeline of redis-py.

        Args:
            pipe: to use; None makes one.
            client: to make it of; None takes the channel's.
        """
        if pipe is not None:
            yield pipe
        else:
            with self.channel.conn_or_acquire(client) as found:
                yield found.pipeline()
