"""The memory transport: a broker inside the process.

All connections of a process meet on the same broker, whatever their host and virtual host say
(Kombu's rule: its state is global).  It has exchanges of all four types, bindings between
exchanges, alternate exchanges, priorities (the higher the sooner), time limits of messages and
queues, length limits, dead-letter exchanges, exclusive and auto_delete queues, prefetch, and the
return of mandatory messages.  A forked child has a copy of it and shares nothing with its parent.

Nothing here waits or does I/O, and a message costs the same however many queues, consumers and
connections there are.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from queue import Empty
from typing import Any, ClassVar

from greenkombu import exceptions
from greenkombu._forks import generation
from greenkombu.transport import base
from greenkombu.transport._memory_queue import Entry, MemoryBroker, MemoryQueue
from greenkombu.transport.virtual import base as virtual
from greenkombu.transport.virtual.consumers import Registry
from greenkombu.transport.virtual.deadletter import MAXLEN, REJECTED
from greenkombu.transport.virtual.declaring import queue_declare_ok_t
from greenkombu.transport.virtual.policy import QueuePolicy
from greenkombu.transport.virtual.state import exchange_destination
from hub.finalize import Finalizer

__all__ = ["Channel", "Connection", "Transport", "broker"]

#: The broker of this process; `broker.clear()` empties it.
broker = MemoryBroker()

# Settings of queue.declare that must be the same each time, where they are given.
_SETTINGS = ("durable", "exclusive", "auto_delete", "arguments")


# The parent's consumers do not exist in a child; left in place, they would be told of messages.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=broker.registry.clear)


class Connection(virtual.Connection):
    """A connection to the broker of this process."""

    polls = False
    # Weak: the broker keeps them, until somebody deletes them before this connection goes.
    _exclusive: weakref.WeakValueDictionary[str, MemoryQueue] | None = None

    def _make_registry(self) -> Registry:
        return broker.registry

    def _own(self, queue: MemoryQueue) -> None:
        """Note an exclusive queue, which goes when this connection goes."""
        if self._exclusive is None:
            self._exclusive = weakref.WeakValueDictionary()
            Finalizer(self, _delete_all, self._exclusive)
        self._exclusive[queue.name] = queue

    def abort(self, error: BaseException | None = None) -> None:
        """Declare the connection dead: unsettled deliveries go back, exclusive queues go."""
        super().abort(error)
        if self._exclusive:
            _delete_all(self._exclusive)


class Channel(virtual.Channel):
    """A channel to the broker of this process."""

    #: The queues of the broker by name.
    queues: ClassVar[dict[str, MemoryQueue]] = broker.queues
    # Kombu's value, for programs that read it. Deliveries go back all the same, as those of a
    # broker would whose client has gone; `QoS.restore_at_shutdown` prevents it.
    do_restore = False
    supports_fanout = True

    # -- queues

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:  # noqa: ARG002
        return queue in self.queues

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        found = self.queues.get(queue)
        if found is None:
            settings = {name: kwargs[name] for name in _SETTINGS if name in kwargs}
            owner = self.connection if kwargs.get("exclusive") else None
            policy = QueuePolicy.parse(queue, kwargs.get("arguments"))
            found = broker.declare(queue, settings, policy, owner)
            if owner is not None:
                self._memory_connection._own(found)
        self._check_access(found)
        for name in _SETTINGS:
            if name in kwargs and name in found.settings:
                given, had = kwargs[name], found.settings[name]
                if (given or None) != (had or None):
                    given = {
                        each: kwargs[each]
                        for each in _SETTINGS
                        if each in found.settings and each in kwargs
                    }
                    raise self._not_equivalent("queue", queue, found.settings, given, (50, 10))
        found.touch()

    @property
    def _memory_connection(self) -> Connection:
        connection = self.connection
        assert isinstance(connection, Connection)
        return connection

    def _check_access(self, queue: MemoryQueue | None) -> None:
        """Raise if an exclusive queue belongs to another connection."""
        if queue is None or queue.owner is None or queue.owner() is self.connection:
            return
        from amqp.exceptions import ResourceLocked

        raise ResourceLocked(
            f"RESOURCE_LOCKED - queue {queue.name!r} in vhost {self._vhost!r} is exclusive to "
            "another connection",
            (50, 10),
            "Channel.queue_declare",
            "405",
        )

    def _existing(self, queue: str, method_sig: tuple[int, int], method: str) -> MemoryQueue:
        found = self.queues.get(queue)
        if found is None:
            raise self._not_found("queue", queue, method_sig, method)
        self._check_access(found)
        return found

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, **kwargs: Any
    ) -> queue_declare_ok_t:
        """Declare a queue; see `virtual.Channel.queue_declare`.

        Raises:
            NotEquivalentError: (406) it exists with other settings; it is unchanged.
            ResourceLocked: (amqp's, 405) it is exclusive to another connection.
        """
        if passive and queue:
            self._check_access(self.queues.get(queue))
        return super().queue_declare(queue, passive, **kwargs)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Bind a queue to an exchange; the same binding twice is one.

        Raises:
            NotFoundError: (404) the queue or the exchange does not exist.
            ResourceLocked: (amqp's, 405) the queue is exclusive to another connection.
        """
        self._check_open(f"bind queue {queue!r}")
        self._existing(queue, (50, 20), "queue_bind")
        super().queue_bind(queue, exchange, routing_key, arguments, **kwargs)

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any
    ) -> int:
        """Delete a queue; see `virtual.Channel.queue_delete`."""
        self._check_access(self.queues.get(queue))
        return super().queue_delete(queue, if_unused, if_empty, **kwargs)

    def queue_purge(self, queue: str, **kwargs: Any) -> int:
        """Remove the messages of a queue that are ready; return how many there were."""
        self._check_access(self.queues.get(queue))
        return super().queue_purge(queue, **kwargs)

    def prepare_queue_arguments(
        self, arguments: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Translate Kombu's queue options into RabbitMQ's arguments, which this broker knows."""
        return base.to_rabbitmq_queue_arguments(arguments, **kwargs)

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,  # noqa: ARG002
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Bind an exchange to another one: what `source` takes goes to `destination` too.

        Raises:
            NotFoundError: (404) one of them does not exist.
        """
        self._check_open(f"bind exchange {destination!r}")
        if destination not in self.state.exchanges:
            raise self._not_found("exchange", destination, (40, 30), "exchange_bind")
        self._bind(
            exchange_destination(destination), source, routing_key, arguments, "exchange_bind"
        )

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,  # noqa: ARG002
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Remove a binding between exchanges; a missing one is ignored."""
        self._check_open(f"unbind exchange {destination!r}")
        self._unbind(exchange_destination(destination), source, routing_key, arguments)

    # -- messages

    def _take(self, queue: str) -> tuple[dict[str, Any], Entry]:
        found = self.queues.get(queue)
        if found is None:
            raise Empty()
        entry = found.take()
        return entry[2], entry

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:  # noqa: ARG002
        return self._take(queue)[0]

    def _put(self, queue: str, message: dict[str, Any], **kwargs: Any) -> None:  # noqa: ARG002
        found = self.queues.get(queue)
        if found is None:  # deleted since it was looked up
            return
        overflow = found.policy.overflow
        if overflow != "drop-head" and found.full:
            if overflow == "reject-publish-dlx":
                broker.bury(found, [message], MAXLEN)
            if self.confirm_publish:
                raise exceptions.DeliveryError(
                    f"queue {queue!r} is full ({len(found)} messages) and rejects what is "
                    "published (x-overflow)"
                )
            return
        dropped = found.put(message)
        if dropped:
            broker.bury(found, dropped, MAXLEN)

    def _size(self, queue: str) -> int:
        found = self.queues.get(queue)
        return 0 if found is None else len(found)

    def _purge(self, queue: str) -> int:
        found = self.queues.get(queue)
        return 0 if found is None else found.purge()

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        found = self.queues.get(queue)
        if found is not None:
            broker.delete(found)

    def basic_consume(
        self,
        queue: str,
        no_ack: bool = False,
        callback: Callable[[Any], object] | None = None,
        consumer_tag: str | None = None,
        **kwargs: Any,
    ) -> str:
        """Start a consumer; see `virtual.Channel.basic_consume`.

        Raises:
            NotFoundError: (404) the queue does not exist.
            ResourceLocked: (amqp's, 405) it is exclusive to another connection.
        """
        self._check_open(f"consume from queue {queue!r}")
        self._existing(queue, (60, 20), "basic_consume").touch()
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def basic_get(self, queue: str, no_ack: bool = False, **kwargs: Any) -> Any:
        """Take one message off a queue; None if there is none, or no such queue."""
        found = self.queues.get(queue)
        if found is not None:
            self._check_access(found)
            found.touch()
        return super().basic_get(queue, no_ack, **kwargs)

    # -- putting back

    @property
    def _restores_unacked(self) -> bool:
        return True

    def _requeue(self, queue: str | None, raw: Any, token: Entry | None) -> None:
        if token is not None:
            token[3].put_back(token)
        else:
            super()._requeue(queue, raw, token)

    def _discard(self, queue: str | None, raw: Any, token: Entry | None) -> None:
        if token is None:
            super()._discard(queue, raw, token)
        elif token[3].policy.dead_letter_exchange is not None:
            broker.bury(token[3], [raw], REJECTED)

    def _make_restorer(self) -> Callable[[dict[Any, Any]], object]:
        return functools.partial(_put_all_back, generation())

    def _abandon(self) -> None:
        if self._qos is not None:
            self._qos.restore_unacked_once()
        super()._abandon()

    def after_reply_message_received(self, queue: str) -> None:
        """Do nothing: an auto_delete reply queue goes with its consumer."""


class Transport(virtual.Transport):
    """The memory transport; its state is global to the process."""

    Channel = Channel
    Connection = Connection

    driver_type = "memory"
    driver_name = "memory"
    # Kombu's default, for programs that read it: nothing is polled here.
    global_state = broker.state

    implements = virtual.Transport.implements.extend(
        exchange_type=frozenset({"direct", "topic", "fanout", "headers"}),
        confirms=True,
        exchange_bindings=True,
        max_length=True,
        priorities=True,
        queue_expiry=True,
        shared=False,
        ttl=True,
    )

    def driver_version(self) -> str:
        """Return 'N/A': there is no client library."""
        return "N/A"


def _delete_all(queues: weakref.WeakValueDictionary[str, MemoryQueue]) -> None:
    while queues:
        try:
            _, queue = queues.popitem()
        except KeyError:
            return
        broker.delete(queue)


def _put_all_back(made_in: int, delivered: dict[Any, Any]) -> None:
    """Return the deliveries of a channel that was dropped; runs in the garbage collector."""
    # A child of a fork that inherited the deliveries has not received them.
    while delivered and made_in == generation():
        try:
            _, (_, _, entry) = delivered.popitem()
        except KeyError:
            return
        if entry is not None:
            entry[3].put_back(entry)
