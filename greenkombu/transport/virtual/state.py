"""What a virtual broker knows: its exchanges, its bindings, and the rules of its queues.

Kombu's `BrokerState`: one for each transport object, and one for the whole process in the memory
transport. Every change is a single operation on a dict, so tasks, native threads and hub callbacks
share a state without a lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from greenkombu.transport.virtual.policy import QueuePolicy
from greenkombu.transport.virtual.tables import NAME_MARK, Binding, BindingTable

__all__ = [
    "BrokerState",
    "binding_key_t",
    "exchange_destination",
    "queue_binding_t",
]

#: An exchange as the destination of a binding, in the place where a queue's name stands. No
#: AMQP client can name a queue so: the byte 0 is not allowed in a short string.
_EXCHANGE_MARK = "\0exchange\0"


def exchange_destination(exchange: str) -> str:
    """Return what stands for `exchange` where a binding names its queue."""
    return _EXCHANGE_MARK + exchange


class binding_key_t(NamedTuple):
    """What tells bindings apart; `routing_key` is `ExchangeType.binding_name`."""

    queue: str
    exchange: str
    routing_key: str


class queue_binding_t(NamedTuple):
    """One binding of a queue."""

    exchange: str
    routing_key: str
    arguments: Mapping[str, Any] | None


class BrokerState:
    """The exchanges and bindings of a virtual broker.

    Args:
        exchanges: declarations to start with, by name.
        bindings: the bindings to start with.

    Attributes:
        exchanges: name to a dict with `type`, `durable`, `auto_delete`, `arguments`, and `table`,
            a `BindingTable`.
        bindings: `binding_key_t` to the arguments of the binding.
        queue_index: queue to its bindings: their keys, and what their exchanges' tables hold.
        policies: queue to the rules that its arguments gave it; plain queues are not in it.
    """

    def __init__(
        self,
        exchanges: dict[str, dict[str, Any]] | None = None,
        bindings: dict[binding_key_t, Mapping[str, Any] | None] | None = None,
    ) -> None:
        self.exchanges: dict[str, dict[str, Any]] = {} if exchanges is None else exchanges
        self.bindings: dict[binding_key_t, Mapping[str, Any] | None] = (
            {} if bindings is None else bindings
        )
        self.queue_index: dict[str, dict[binding_key_t, Binding | None]] = {}
        self.policies: dict[str, QueuePolicy] = {}
        # Without any of these two a message goes straight to what its exchange's table says.
        self._has_alternates = False
        self._has_exchange_bindings = False

    def clear(self) -> None:
        """Forget everything."""
        self.exchanges.clear()
        self.bindings.clear()
        self.queue_index.clear()
        self.policies.clear()
        self._has_alternates = self._has_exchange_bindings = False

    # -- bindings

    def has_binding(self, queue: str, exchange: str, routing_key: str) -> bool:
        """Tell whether there is such a binding."""
        return (queue, exchange, routing_key) in self.bindings

    def binding_declare(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        arguments: Mapping[str, Any] | None,
        binding: Binding | None = None,
    ) -> None:
        """Note a binding; an existing one keeps its arguments.

        Args:
            queue, exchange, routing_key: what tells it from others.
            arguments: of the binding.
            binding: what the table of the exchange holds for it.
        """
        key = binding_key_t(queue, exchange, routing_key)
        self.bindings.setdefault(key, arguments)
        self.queue_index.setdefault(queue, {})[key] = binding
        if queue.startswith(_EXCHANGE_MARK):
            self._has_exchange_bindings = True

    def binding_delete(self, queue: str, exchange: str, routing_key: str) -> None:
        """Forget a binding; nothing happens when there is none."""
        key = binding_key_t(queue, exchange, routing_key)
        self.bindings.pop(key, None)
        keys = self.queue_index.get(queue)
        if keys is not None:
            keys.pop(key, None)

    def queue_bindings(self, queue: str) -> Iterator[queue_binding_t]:
        """Yield the bindings of a queue."""
        for key in list(self.queue_index.get(queue) or ()):
            routing_key = key.routing_key.partition(NAME_MARK)[0]
            yield queue_binding_t(key.exchange, routing_key, self.bindings.get(key))

    def queue_bindings_delete(self, queue: str) -> None:
        """Forget the bindings of a queue."""
        for key in self.queue_index.pop(queue, None) or ():
            self.bindings.pop(key, None)

    def bindings_of(self, queue: str) -> list[tuple[str, Binding]]:
        """Return the exchange of each binding of a queue, and what its table holds."""
        index = self.queue_index.get(queue) or {}
        return [(key.exchange, binding) for key, binding in list(index.items()) if binding]

    def unbind(self, exchange: str, binding: Binding) -> None:
        """Take a binding out of its exchange's table; an auto_delete exchange goes with its last.

        AMQP 0-9-1, exchange.declare, auto-delete.
        """
        declared = self.exchanges.get(exchange)
        if declared is None:
            return
        table = declared["table"]
        if binding in table:
            table.discard(binding)
            if declared["auto_delete"] and not len(table):
                self.drop_exchange(exchange)

    def drop_exchange(self, exchange: str) -> None:
        """Forget an exchange, the bindings to it, and its own bindings to other exchanges."""
        declared = self.exchanges.pop(exchange, None)
        if declared is None:
            return
        for queue in {binding[2] for binding in declared["table"]}:
            for key in list(self.queue_index.get(queue) or ()):
                if key.exchange == exchange:
                    self.binding_delete(*key)
        if self._has_exchange_bindings:
            self.drop_queue(exchange_destination(exchange))

    def drop_queue(self, queue: str) -> None:
        """Forget a queue: its bindings and its rules."""
        bindings = self.bindings_of(queue)
        self.queue_bindings_delete(queue)
        self.policies.pop(queue, None)
        for exchange, binding in bindings:
            self.unbind(exchange, binding)

    # -- routing

    def note_exchange(self, arguments: Mapping[str, Any] | None) -> None:
        """Look at the arguments of an exchange that was declared."""
        if arguments and arguments.get("alternate-exchange"):
            self._has_alternates = True

    def route(
        self, exchange: str, routing_key: str, headers: Mapping[str, Any] | None = None
    ) -> list[str]:
        """Return the queues, each once, that a message goes to.

        Follows bindings between exchanges, and the argument ``alternate-exchange`` where nothing
        matches; each exchange is asked once, whatever circles they form.

        Args:
            exchange: its name; the nameless one is not known here.
            routing_key: of the message.
            headers: of the message.
        """
        declared = self.exchanges.get(exchange)
        if declared is None:
            return []
        found = _match(declared, routing_key, headers)
        if not (self._has_alternates or self._has_exchange_bindings):
            return found
        return self._follow(exchange, declared, found, routing_key, headers)

    def _follow(
        self,
        exchange: str,
        declared: dict[str, Any],
        found: list[str],
        routing_key: str,
        headers: Mapping[str, Any] | None,
    ) -> list[str]:
        seen = {exchange}
        queues: dict[str, None] = {}
        waiting: list[str] = []

        def take(declared: dict[str, Any], found: list[str]) -> None:
            for name in found:
                if name.startswith(_EXCHANGE_MARK):
                    waiting.append(name.removeprefix(_EXCHANGE_MARK))
                else:
                    queues[name] = None
            alternate = None if found else (declared["arguments"] or {}).get("alternate-exchange")
            if alternate:
                waiting.append(alternate)

        take(declared, found)
        while waiting:
            name = waiting.pop(0)
            following = self.exchanges.get(name)
            if following is not None and name not in seen:
                seen.add(name)
                take(following, _match(following, routing_key, headers))
        return list(queues)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__}: {len(self.exchanges)} exchanges, "
            f"{len(self.bindings)} bindings>"
        )


def _match(
    declared: Mapping[str, Any], routing_key: str, headers: Mapping[str, Any] | None
) -> list[str]:
    table: BindingTable = declared["table"]
    return table.match(routing_key, headers)
