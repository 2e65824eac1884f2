"""Who waits for which queue, and how a message finds one of them.

Theory of operation.  Nobody scans.  A `Consumer` is in exactly one of three places:

* *waiting*, in the `Watch` of its queue, because it found the queue empty;
* *ready*, in the deque of its connection, because there may be a message for it;
* *blocked*, in its channel, because the prefetch limit is reached.

Whoever takes it out of a place has claimed it and must put it into another one; taking out is one
atomic operation on a dict or deque, so tasks, native threads, hub callbacks and finalizers need
no lock.  A consumer that is about to wait enters the watch first and looks at the queue again
afterwards, so that a message cannot slip in between.

A put wakes one consumer that somebody drains (`Watch.wake`).  Consumers whose connection nobody
drains at that moment are made ready on the way, once each, and the next one is asked: the message
stays in the queue until a connection really fetches it, so it never waits for a sleeper while
another could have it.  A consumer that was woken and cannot take the message (cancelled, blocked)
wakes the next.

The registry is the broker's (memory) and holds its consumers weakly: a connection that is dropped
without being closed is collected, and is then gone for the broker too, as a server loses a client.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from greenkombu.transport.virtual.consuming import ConsumingChannel

__all__ = ["Consumer", "Registry", "Source", "Watch"]

_MISSING: Any = object()


class Source(Protocol):
    """The messages that are ready in a queue of this process; true while there are any."""

    def __bool__(self) -> bool: ...


class Consumer:
    """One basic_consume.

    Attributes:
        tag, queue, no_ack, callback: as given to basic_consume.
        channel: where it consumes.
        watch: of its queue.
        cancelled: it gets nothing any more.
    """

    __slots__ = (
        "__weakref__",
        "callback",
        "cancelled",
        "channel",
        "no_ack",
        "queue",
        "ref",
        "tag",
        "watch",
    )

    def __init__(
        self,
        channel: ConsumingChannel,
        queue: str,
        no_ack: bool,
        callback: Callable[[Any], object],
        tag: str,
        watch: Watch,
    ) -> None:
        self.channel: Any = channel
        self.queue = queue
        self.no_ack = no_ack
        self.callback = callback
        self.tag = tag
        self.watch = watch
        self.cancelled = False
        self.ref: weakref.ref[Consumer] = weakref.ref(self, watch.forget)

    def __repr__(self) -> str:
        state = "cancelled" if self.cancelled else "active"
        return f"<{type(self).__name__} {self.tag} of queue {self.queue!r}: {state}>"


class Watch:
    """The consumers of one queue name, whether the queue exists or not.

    Attributes:
        source: the queue's ready messages, where this process holds them; None if they are in a
            store that has to be asked.
        on_unused: called without arguments, by whoever removed the last consumer, a finalizer
            included.
    """

    __slots__ = (
        "__weakref__",
        "_drop_permit",
        "_members",
        "_waiting",
        "dropped",
        "name",
        "on_unused",
        "source",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.source: Source | None = None
        self.on_unused: Callable[[], object] | None = None
        # The registry is forgetting this watch: take another one.
        self.dropped = False
        self._drop_permit = [None]
        self._members: dict[weakref.ref[Consumer], None] = {}
        self._waiting: OrderedDict[weakref.ref[Consumer], None] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of consumers."""
        return len(self._members)

    def __bool__(self) -> bool:
        return True

    def add(self, consumer: Consumer) -> bool:
        """Count a new consumer.

        Returns:
            False if the watch was dropped meanwhile: it was not counted.
        """
        self._members[consumer.ref] = None
        if self.dropped:
            self._members.pop(consumer.ref, None)
            return False
        return True

    def attach(self, source: Source) -> bool:
        """Give the watch the queue of this process that it is for.

        Returns:
            False if the watch was dropped meanwhile: nothing has changed.
        """
        self.source = source
        if self.dropped:
            self.source = None
            return False
        self.hand_over()
        return True

    def remove(self, consumer: Consumer) -> None:
        """Stop counting a consumer, and wake another if it was woken for a message."""
        self.forget(consumer.ref)

    def forget(self, ref: weakref.ref[Consumer]) -> None:
        """Remove a consumer, or one that was collected; also a weakref callback."""
        if self._members.pop(ref, _MISSING) is _MISSING:
            return
        if self._waiting.pop(ref, _MISSING) is _MISSING:
            self.hand_over()
        if not self._members and self.on_unused is not None:
            self.on_unused()

    def park(self, consumer: Consumer) -> bool:
        """Let a consumer that found the queue empty wait.

        Returns:
            False if there is a message again: the consumer does not wait, the caller still has it.
        """
        ref = consumer.ref
        self._waiting[ref] = None
        if self.source or consumer.cancelled:
            return self._waiting.pop(ref, _MISSING) is _MISSING
        return True

    def hand_over(self) -> None:
        """Wake another consumer if there is a message that this one will not take."""
        if self.source:
            self.wake()

    def wake(self) -> None:
        """Tell one consumer that there may be a message; see the head of this module."""
        waiting = self._waiting
        while waiting:
            try:
                ref, _ = waiting.popitem(last=False)
            except KeyError:
                return
            consumer = ref()
            if consumer is not None and consumer.channel.connection._make_ready(consumer):
                return

    def wake_all(self) -> None:
        """Tell every consumer that there may be a message."""
        for ref in list(self._waiting):
            if self._waiting.pop(ref, _MISSING) is not _MISSING:
                consumer = ref()
                if consumer is not None:
                    consumer.channel.connection._make_ready(consumer)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.name!r}: {len(self._members)} consumers, "
            f"{len(self._waiting)} waiting>"
        )


class Registry:
    """The watches of a broker, by queue name."""

    __slots__ = ("_watches",)

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}

    def get(self, queue: str) -> Watch | None:
        """Return the watch of a queue, if anybody made one."""
        return self._watches.get(queue)

    def watch(self, queue: str) -> Watch:
        """Return the watch of a queue, a new one if need be."""
        watch = self._watches.get(queue)
        if watch is None:
            watch = self._watches.setdefault(queue, Watch(queue))
        return watch

    def drop_unused(self, queue: str) -> None:
        """Forget a watch without consumers, and without a queue of this process.

        Who takes a watch into use enters it and looks at `dropped` afterwards; who drops it sets
        `dropped` and looks afterwards whether it is in use. So one of the two sees the other.
        """
        watch = self._watches.get(queue)
        if watch is None or len(watch) or watch.source is not None:
            return
        try:
            watch._drop_permit.pop()
        except IndexError:
            return  # another thread drops it
        watch.dropped = True
        if len(watch) or watch.source is not None:
            watch.dropped = False
            watch._drop_permit.append(None)
        else:
            self._watches.pop(queue, None)

    def clear(self) -> None:
        """Forget every consumer."""
        for watch in self:
            watch._members.clear()
            watch._waiting.clear()

    def wake_all(self) -> None:
        """Tell every waiting consumer that there may be a message."""
        for watch in self:
            watch.wake_all()

    def __iter__(self) -> Iterator[Watch]:
        return iter(list(self._watches.values()))

    def __len__(self) -> int:
        return len(self._watches)
