"""A transport as somebody else would write it: a store that is only pulled, with Kombu's hooks."""

from __future__ import annotations

from collections import defaultdict, deque
from queue import Empty
from typing import Any

from greenkombu.transport import virtual

__all__ = ["SHARED", "Channel", "SharedTransport", "Transport"]


class Channel(virtual.Channel):
    """A channel on a dict of deques."""

    queues: dict[str, deque[Any]]
    gets = 0

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self.queues = self.connection.transport.queues

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        type(self).gets += 1
        try:
            return self.queues[queue].popleft()
        except IndexError:
            raise Empty() from None

    def _put(self, queue: str, message: Any, **kwargs: Any) -> None:
        self.queues[queue].append(message)

    def _restore_at_beginning(self, message: virtual.Message) -> None:
        assert message.queue is not None
        self.queues[message.queue].appendleft(message._raw)

    def _size(self, queue: str) -> int:
        return len(self.queues[queue])

    def _purge(self, queue: str) -> int:
        size = self._size(queue)
        self.queues[queue].clear()
        return size


class Transport(virtual.Transport):
    """A transport whose queues belong to the object."""

    Channel = Channel
    driver_type = "store"
    polling_interval = 0.05
    implements = virtual.Transport.implements.extend(shared=False)

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.queues: defaultdict[str, deque[Any]] = defaultdict(deque)


#: What all `SharedTransport` objects of the process see.
SHARED: defaultdict[str, deque[Any]] = defaultdict(deque)


class SharedTransport(Transport):
    """A transport whose objects see one store, and one set of bindings, as those of a server do."""

    global_state = virtual.BrokerState()

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.queues = SHARED
