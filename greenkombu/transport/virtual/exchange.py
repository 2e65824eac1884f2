"""The exchange types of AMQP.

Where the bindings of an exchange are in its `BindingTable`, the table is asked; bindings that come
from a store as a plain list are searched one by one, by the same rules (`tables`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu.exceptions import EncodeError, UnsupportedOperation
from greenkombu.transport.virtual.tables import (
    NAME_MARK,
    Binding,
    BindingTable,
    DirectTable,
    FanoutTable,
    HeadersTable,
    TopicTable,
    headers_match,
    topic_match,
)

if TYPE_CHECKING:
    from greenkombu.transport.virtual.channel import Channel

__all__ = [
    "STANDARD_EXCHANGE_TYPES",
    "BindingTable",
    "DirectExchange",
    "ExchangeType",
    "FanoutExchange",
    "HeadersExchange",
    "TopicExchange",
    "headers_match",
    "topic_match",
]


class _AskingTable(BindingTable):
    """The bindings of an exchange whose type has a `lookup` of its own."""

    __slots__ = ("_type",)

    def __init__(self, exchange_type: ExchangeType) -> None:
        self._type = exchange_type
        super().__init__()

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        return _unique(self._type.lookup(list(self), "", routing_key, None) or ())


# Inside the class its attribute `type` hides the builtin.
_TableClass = type[BindingTable]


class ExchangeType:
    """What one type of exchange does.

    Args:
        channel: the channel that publishes; None only for looking keys up.

    A type of one's own overrides `lookup`, and is added to `Channel.exchange_types`.
    """

    type: str | None = None
    #: The index that the exchanges of this type keep their bindings in.
    Table: ClassVar[_TableClass] = BindingTable

    def __init__(self, channel: Channel | None) -> None:
        self.channel: Any = channel

    def deliver(self, message: Any, exchange: str, routing_key: str, **kwargs: Any) -> int | None:
        """Put a message into every queue that it goes to.

        Returns:
            How many there were; 0 is unroutable, None is not known.
        """
        channel = self.channel
        count: int = channel._put_each(channel._lookup(exchange, routing_key), message, **kwargs)
        return count

    def lookup(
        self, table: Iterable[Binding], exchange: str, routing_key: str, default: Any
    ) -> Any:
        """Find the queues for a routing key.

        Args:
            table: the bindings of the exchange.
            exchange: its name.
            routing_key: of the message.
            default: returned when no queue matches.
        """
        del table, exchange, routing_key, default
        raise UnsupportedOperation(f"the exchange type {self.type!r} has no lookup")

    def prepare_bind(
        self, queue: str, exchange: str, routing_key: str, arguments: Mapping[str, Any] | None
    ) -> Binding:
        """Make the (binding key, pattern, queue) that the table of the exchange keeps."""
        del exchange, arguments
        return routing_key, None, queue

    @classmethod
    def make_table(cls) -> BindingTable:
        """Make the empty table of a new exchange."""
        # The index answers by the rule of its own type: a type that brings a rule of its own
        # (`lookup`) is asked instead, with the list of bindings.
        if any(cls.lookup is standard.lookup for standard in STANDARD_EXCHANGE_TYPES.values()):
            return cls.Table()
        return _AskingTable(cls(None))

    def binding_name(self, binding: Binding) -> str:
        """Return what tells this binding from the others between its queue and exchange."""
        return binding[0]

    def equivalent(
        self,
        prev: Mapping[str, Any],
        exchange: str,
        type: str,
        durable: bool,
        auto_delete: bool,
        arguments: Mapping[str, Any] | None,
    ) -> bool:
        """Tell whether a declared exchange has these settings."""
        del exchange
        return bool(
            type == prev["type"]
            and bool(durable) == bool(prev["durable"])
            and bool(auto_delete) == bool(prev["auto_delete"])
            and (arguments or {}) == (prev["arguments"] or {})
        )


class DirectExchange(ExchangeType):
    """A message goes to the queues that are bound with its very routing key."""

    type = "direct"
    Table = DirectTable

    def lookup(
        self, table: Iterable[Binding], exchange: str, routing_key: str, default: Any
    ) -> Any:
        """Find the queues for a routing key; see `ExchangeType.lookup`."""
        del exchange
        if isinstance(table, BindingTable):
            return table.match(routing_key) or default
        return _unique(queue for key, _, queue in table if key == routing_key) or default


class TopicExchange(ExchangeType):
    """A message goes to the queues whose pattern its routing key fits, word by word.

    ``*`` is exactly one word, ``#`` zero or more: ``*.stock.#`` takes ``usd.stock`` and
    ``eur.stock.db``, not ``stock.nasdaq``.
    """

    type = "topic"
    Table = TopicTable

    #: What the wildcards are in `key_to_pattern`, apart from the dots around them.
    wildcards: ClassVar[dict[str, str]] = {"*": r"[^.]+", "#": r"[^.]+(?:\.[^.]+)*"}

    def lookup(
        self, table: Iterable[Binding], exchange: str, routing_key: str, default: Any
    ) -> Any:
        """Find the queues for a routing key; see `ExchangeType.lookup`.

        Compares binding keys. Patterns that Kombu left in a store are wrong: their ``#`` never
        stands for zero words.
        """
        del exchange
        if isinstance(table, BindingTable):
            return table.match(routing_key) or default
        return _unique(queue for key, _, queue in table if topic_match(key, routing_key)) or default

    def prepare_bind(
        self, queue: str, exchange: str, routing_key: str, arguments: Mapping[str, Any] | None
    ) -> Binding:
        """Make the (binding key, pattern, queue) of a binding."""
        del exchange, arguments
        return routing_key, self.key_to_pattern(routing_key), queue

    def key_to_pattern(self, rkey: str) -> str:
        """Return the regular expression for a binding key, for programs that read bindings.

        Routing does not use it (see the head of this module).
        """
        # "#.#" is "#".
        words = [
            word
            for word, following in itertools.pairwise([*rkey.split("."), ""])
            if not word == following == "#"
        ]
        if words == ["#"]:
            return "^.*$"
        some = self.wildcards["#"]
        pattern = ""
        for index, word in enumerate(words):
            # No word for "#" means that one of the dots beside it is not there either.
            if word == "#":
                pattern += rf"(?:\.{some})?" if index else rf"(?:{some}\.)?"
            else:
                dot = r"\." if index > 1 or (index == 1 and words[0] != "#") else ""
                pattern += dot + (self.wildcards["*"] if word == "*" else re.escape(word))
        return f"^{pattern}$"


class FanoutExchange(ExchangeType):
    """Every queue that is bound gets a copy.

    Where the store itself broadcasts (`Channel.supports_fanout` and a `Channel._put_fanout` of its
    own), it gets the message once.
    """

    type = "fanout"
    Table = FanoutTable

    def lookup(
        self, table: Iterable[Binding], exchange: str, routing_key: str, default: Any
    ) -> Any:
        """Find the queues for a routing key; see `ExchangeType.lookup`."""
        del exchange
        if isinstance(table, BindingTable):
            return table.match(routing_key) or default
        return _unique(queue for _, _, queue in table) or default

    def deliver(self, message: Any, exchange: str, routing_key: str, **kwargs: Any) -> int | None:
        """Broadcast a message.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) the transport has no fanout.
        """
        channel = self.channel
        if not channel.supports_fanout:
            raise channel._no_exchange_type("fanout")
        count: int | None = channel._put_fanout(exchange, message, routing_key, **kwargs)
        return count


class HeadersExchange(ExchangeType):
    """A message goes to the queues whose binding arguments its headers fit; see `headers_match`."""

    type = "headers"
    Table = HeadersTable

    def deliver(self, message: Any, exchange: str, routing_key: str, **kwargs: Any) -> int | None:
        """Put a message into every queue that it goes to; see `ExchangeType.deliver`."""
        channel = self.channel
        queues = channel._lookup(exchange, routing_key, headers=message.get("headers") or {})
        count: int = channel._put_each(queues, message, **kwargs)
        return count

    def lookup(
        self,
        table: Iterable[Binding],
        exchange: str,
        routing_key: str,
        default: Any,
        headers: Mapping[str, Any] | None = None,
    ) -> Any:
        """Find the queues for the headers of a message; see `ExchangeType.lookup`."""
        del exchange
        if not isinstance(table, BindingTable):
            table = self.Table(table)
        return table.match(routing_key, headers) or default

    def prepare_bind(
        self, queue: str, exchange: str, routing_key: str, arguments: Mapping[str, Any] | None
    ) -> Binding:
        """Make the (binding key, pattern, queue) of a binding; the pattern is its arguments.

        Raises:
            EncodeError: an argument cannot be written as JSON, so no store could keep it.
        """
        del exchange
        try:
            pattern = json.dumps(dict(arguments or {}), sort_keys=True)
        except (TypeError, ValueError, RecursionError) as exc:
            raise EncodeError(
                f"the arguments of the headers binding of queue {queue!r} are not JSON: {exc}"
            ) from exc
        return routing_key, pattern, queue

    def binding_name(self, binding: Binding) -> str:
        """Return what tells this binding from the others between its queue and exchange."""
        # Bindings with different arguments are different bindings.
        return f"{binding[0]}{NAME_MARK}{binding[1]}"


def _unique(queues: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(queues))


#: The types that AMQP 0-9-1 defines, by name.
STANDARD_EXCHANGE_TYPES: dict[str, type[ExchangeType]] = {
    "direct": DirectExchange,
    "topic": TopicExchange,
    "fanout": FanoutExchange,
    "headers": HeadersExchange,
}
