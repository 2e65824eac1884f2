"""Fanout exchanges: PUBLISH and PSUBSCRIBE.

A queue that is bound to a fanout exchange is nothing on the server.  Whoever consumes it is
subscribed and gets what is published from then on; so the messages wait here, each consumer's
own, and who is not connected misses them, as with Kombu.

As AMQP says, a binding gets everything that is published to the exchange.  One whose key has
wildcards (``*``, ``?``, ``[``: the patterns of Redis) gets what fits it.  With the transport option
fanout_patterns=True every key is such a pattern, and a binding without a key gets everything; with
False, keys mean nothing, also not for who publishes.  (In Kombu a binding without a key gets only
what was published without one.)
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any

from greenkombu.transport.redis._errors import ReplyError, to_error
from greenkombu.transport.redis._resp import pack

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import Keys
    from greenkombu.transport.redis.channel import Channel
    from greenkombu.transport.redis.connection import Connection

__all__ = ["Fanout", "FanoutQueue"]

logger = logging.getLogger(__name__)

# What makes a pattern of a text for Redis.
_WILD = frozenset("*?[")

#: Messages, and bytes of them, that wait for a consumer which is slower than its exchange. The
#: server cannot keep them: further ones are dropped, as it drops a subscriber that does not read.
MOST_MESSAGES = 100_000
MOST_BYTES = 64 * 1024 * 1024


class FanoutQueue:
    """What a channel has got for a queue that is bound to fanout exchanges.

    Attributes:
        buffer: the messages, in order.
    """

    __slots__ = ("_bytes", "_gone", "_last", "buffer", "channel", "dropped", "patterns", "queue")

    def __init__(self, channel: Channel, queue: str) -> None:
        self.channel = channel
        self.queue = queue
        self.buffer: deque[tuple[bytes, None]] = deque()
        self.patterns: dict[bytes, None] = {}
        self.dropped = 0
        self._bytes = 0
        # What has left the buffer, bytes; tasks tell, and the hub counts.
        self._gone: deque[int] = deque()
        self._last: tuple[bytes, bytes] = (b"", b"")

    def received(self, pattern: bytes, data: bytes) -> None:
        """Keep a message; in the hub."""
        before, message = self._last
        self._last = (pattern, data)
        if data == message and pattern != before:
            return  # it fits two bindings of the queue, and the server sends it for each
        gone = self._gone
        while gone:
            self._bytes -= gone.popleft()
        if len(self.buffer) >= MOST_MESSAGES or self._bytes + len(data) > MOST_BYTES:
            if not self.dropped:
                self.channel.redis.hub.log_later(
                    logger,
                    logging.WARNING,
                    "queue %r of a fanout exchange is full: its consumer is too slow, messages are"
                    " dropped",
                    self.queue,
                )
            self.dropped += 1
            return
        if not self.buffer:
            self.dropped = 0  # it has kept up again: the next time is told again
        self._bytes += len(data)
        self.buffer.append((data, None))
        self.channel.tell(self.queue, 1)

    def take(self) -> bytes:
        """Return the next message.

        Raises:
            IndexError: there is none.
        """
        data, _ = self.buffer.popleft()
        self._gone.append(len(data))
        return data

    def put_back(self, data: bytes) -> None:
        """Make a message the next one."""
        self._gone.append(-len(data))
        self.buffer.appendleft((data, None))

    def purge(self) -> int:
        """Drop what there is, and return how many messages that were."""
        count = 0
        try:
            while True:
                self.take()
                count += 1
        except IndexError:
            return count


class Fanout:
    """The subscriptions of one connection.

    Args:
        connection: whose socket hears the messages.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = weakref.proxy(connection)
        self._queues: dict[bytes, dict[FanoutQueue, None]] = {}

    def patterns(self, exchange: str, routing_key: str, keys: Keys | None = None) -> list[bytes]:
        """Return what a binding is subscribed to, under other names than usual if *keys* say so."""
        keys = keys or self._connection.keys
        if not keys.fanout_patterns:
            return [keys.fanout_pattern(exchange)]
        if routing_key and (keys.fanout_keys or not _WILD.isdisjoint(routing_key)):
            return [keys.fanout_pattern(exchange, routing_key)]
        return [keys.fanout_pattern(exchange), keys.fanout_pattern(exchange, "*")]

    def subscribe(self, queue: FanoutQueue, bindings: list[tuple[str, str]]) -> None:
        """Subscribe a queue; waits until the server has done so, and so parks the task.

        Args:
            queue: gets the messages.
            bindings: its (exchange, routing key).

        Raises:
            NoPermissionError: the user may not listen there; the queue is not subscribed.
        """
        connection = self._connection
        connection.open_subscriber()
        fresh = []
        for binding in bindings:
            for pattern in self.patterns(*binding):
                queue.patterns[pattern] = None
                if pattern not in self._queues:
                    fresh.append(pattern)
                self._queues.setdefault(pattern, {})[queue] = None
        subscriber = connection.subscriber
        refusals: list[ReplyError] = []

        def subscribed(replies: Any) -> None:
            if not isinstance(replies, BaseException):
                refusals.extend(replies)

        if fresh:
            subscriber.send(pack("PSUBSCRIBE", *fresh), 0, subscribed)
        # Answered after the subscription, also after one that another task has just sent.
        subscriber.call("PING")
        if refusals:
            self.unsubscribe(queue)
            raise to_error(refusals[0], server=subscriber.peer, what="PSUBSCRIBE")

    def unsubscribe(self, queue: FanoutQueue) -> None:
        """Undo that; waits for nothing."""
        gone = []
        for pattern in queue.patterns:
            queues = self._queues.get(pattern)
            if queues is not None:
                queues.pop(queue, None)
                if not queues:
                    self._queues.pop(pattern, None)
                    gone.append(pattern)
        if gone and self._connection.error is None:
            self._connection.subscriber.send(pack("PUNSUBSCRIBE", *gone), 0, _ignore)

    def received(self, pattern: bytes, data: bytes) -> None:
        """Give a message to the queues that have subscribed to its pattern; in the hub."""
        for queue in list(self._queues.get(pattern, ())):
            queue.received(pattern, data)


def _ignore(replies: object) -> None:
    del replies
