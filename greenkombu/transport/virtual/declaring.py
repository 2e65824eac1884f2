"""The declaring half of a virtual channel: exchanges, queues, bindings, and where messages go.

Exchanges and bindings are in the `BrokerState` of the transport, unless `get_table` and
`_queue_bind` keep them in the store.  As in Kombu, an error does not close the channel: it is as
usable as before.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from greenkombu import exceptions
from greenkombu._arguments import plain_name
from greenkombu.transport.virtual.abstract import AbstractChannel
from greenkombu.transport.virtual.exchange import (
    STANDARD_EXCHANGE_TYPES,
    ExchangeType,
    HeadersExchange,
)
from greenkombu.transport.virtual.policy import PLAIN, QueuePolicy, precondition_failed
from greenkombu.transport.virtual.tables import BindingTable
from greenkombu.utils.uuid import uuid

if TYPE_CHECKING:
    from greenkombu.transport.virtual.consumers import Registry
    from greenkombu.transport.virtual.state import BrokerState

__all__ = ["DeclaringChannel", "UndeliverableWarning", "queue_declare_ok_t"]


class UndeliverableWarning(UserWarning):
    """A message went to the dead-letter queue of the transport, because no queue takes it."""


class queue_declare_ok_t(NamedTuple):
    """The answer to queue.declare."""

    queue: str
    message_count: int
    consumer_count: int


class DeclaringChannel(AbstractChannel):
    """Exchanges, queues and bindings."""

    #: The store itself broadcasts (`_put_fanout`).
    supports_fanout = False
    #: Exchange types by name.
    exchange_types: Mapping[str, type[ExchangeType]] = STANDARD_EXCHANGE_TYPES
    #: The queue for messages that no queue takes; None drops them.
    deadletter_queue: str | None = None

    def _init_declaring(self) -> None:
        self._types: dict[str, ExchangeType] = {}

    _registry: Registry

    @property
    def state(self) -> BrokerState:
        """Exchanges and bindings."""
        return self.connection.state

    # -- exchanges

    def typeof(self, exchange: str, default: str = "direct") -> ExchangeType:
        """Return the object that routes for an exchange.

        Args:
            exchange: its name.
            default: the type of an exchange that is not declared.
        """
        declared = self.state.exchanges.get(exchange)
        name = default if declared is None else declared["type"]
        found = self._types.get(name)
        if found is None:
            found = self._types[name] = self._exchange_class(name)(self)  # type: ignore[arg-type]
        return found

    def _exchange_class(self, name: str) -> type[ExchangeType]:
        try:
            return self.exchange_types[name]
        except KeyError:
            raise self._no_exchange_type(name) from None

    def _no_exchange_type(self, name: str) -> exceptions.UnsupportedOperation:
        transport = self.connection.transport
        can = ", ".join(sorted(transport.implements.exchange_type))
        return exceptions.UnsupportedOperation(
            f"the {transport.driver_type} transport has no exchange type {name!r}; it has {can}"
        )

    def exchange_declare(
        self,
        exchange: str | None = None,
        type: str | None = "direct",
        durable: bool = False,
        auto_delete: bool = False,
        arguments: Mapping[str, Any] | None = None,
        nowait: bool = False,  # noqa: ARG002
        passive: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Declare an exchange.

        Args:
            exchange: its name; None is ``amq.<type>``.
            type: direct, topic, fanout, headers, or one of `exchange_types`.
            durable, auto_delete, arguments: its settings.
            passive: create nothing.

        Raises:
            NotFoundError: (404) passive, and it does not exist.
            NotEquivalentError: (406) it exists with other settings; it is unchanged.
            UnsupportedOperation: the transport does not have this type.
            ArgumentError: the name is no text.
        """
        type = type or "direct"
        exchange = plain_name("exchange", exchange) or f"amq.{type}"
        self._check_open(f"declare exchange {exchange!r}")
        exchanges = self.state.exchanges
        declared = exchanges.get(exchange)
        if declared is None:
            if passive:
                raise self._not_found("exchange", exchange, (40, 10), "exchange_declare")
            declared = {
                "type": type,
                "durable": durable,
                "auto_delete": auto_delete,
                "arguments": dict(arguments or {}),
                "table": self._exchange_class(type).make_table(),
            }
            # Another task may have been faster; then its declaration is compared.
            declared = exchanges.setdefault(exchange, declared)
            self.state.note_exchange(arguments)
        if not passive and not self.typeof(exchange).equivalent(
            declared, exchange, type, durable, auto_delete, arguments
        ):
            given = {
                "type": type,
                "durable": durable,
                "auto_delete": auto_delete,
                "arguments": arguments,
            }
            raise self._not_equivalent("exchange", exchange, declared, given, (40, 10))

    def exchange_delete(
        self,
        exchange: str,
        if_unused: bool = False,
        nowait: bool = False,  # noqa: ARG002
    ) -> None:
        """Delete an exchange and its bindings; a missing one is ignored.

        Raises:
            PreconditionFailed: (amqp's, 406) if_unused, and it has bindings.
        """
        self._check_open(f"delete exchange {exchange!r}")
        try:
            table = self.get_table(exchange)
        except KeyError:
            return
        bindings = list(table)
        if if_unused and bindings:
            raise precondition_failed(
                f"exchange {exchange!r} in vhost '{self._vhost}' is in use: it has "
                f"{len(bindings)} bindings",
                (40, 20),
                "Channel.exchange_delete",
            )
        self.state.drop_exchange(exchange)

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Bind an exchange to another one.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) the transport cannot do this.
        """
        del destination, source, routing_key, nowait, arguments
        raise self._unsupported("exchange_bind")

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Remove a binding between exchanges.

        Raises:
            UnsupportedOperation: (also a NotImplementedError) the transport cannot do this.
        """
        del destination, source, routing_key, nowait, arguments
        raise self._unsupported("exchange_unbind")

    # -- queues

    def queue_declare(
        self, queue: str | None = None, passive: bool = False, **kwargs: Any
    ) -> queue_declare_ok_t:
        """Declare a queue.

        Args:
            queue: its name; None or '' makes one.
            passive: create nothing.
            **kwargs: durable, exclusive, auto_delete, arguments, nowait.

        Returns:
            Its name, and how many messages and consumers it has.

        Raises:
            NotFoundError: (404) passive, and it does not exist.
            PreconditionFailed: (amqp's, 406) an argument has an impossible value.
            UnsupportedOperation: an argument asks for what the transport does not have.
            ArgumentError: the name is no text.
        """
        queue = plain_name("queue", queue) or f"amq.gen-{uuid()}"
        self._check_open(f"declare queue {queue!r}")
        if passive:
            if not self._has_queue(queue, **kwargs):
                raise self._not_found("queue", queue, (50, 10), "queue_declare")
        else:
            policy = QueuePolicy.parse(queue, kwargs.get("arguments"))
            if policy is not PLAIN:
                self._check_policy(queue, policy)
            self._new_queue(queue, **kwargs)
            if policy is not PLAIN:
                self.state.policies[queue] = policy
        watch = self._registry.get(queue)
        return queue_declare_ok_t(queue, self._size(queue), 0 if watch is None else len(watch))

    def _check_policy(self, queue: str, policy: QueuePolicy) -> None:
        """Raise if a queue is to have rules that this transport would not follow."""
        implements = self.connection.transport.implements
        for feature, argument in policy.needs():
            if not getattr(implements, feature):
                raise exceptions.UnsupportedOperation(
                    f"the {self.connection.transport.driver_type} transport has no "
                    f"{feature.replace('_', ' ')}: it cannot declare queue {queue!r} with the "
                    f"argument {argument!r}"
                )

    def queue_delete(
        self, queue: str, if_unused: bool = False, if_empty: bool = False, **kwargs: Any
    ) -> int:
        """Delete a queue, its messages and its bindings; a missing one is ignored.

        Returns:
            How many messages it had.

        Raises:
            PreconditionFailed: (amqp's, 406) if_unused and it has consumers, or if_empty and it
                has messages.
        """
        # Kombu's manual prints if_unusued.
        if_unused = if_unused or kwargs.pop("if_unusued", False)
        kwargs.pop("nowait", None)
        self._check_open(f"delete queue {queue!r}")
        watch = self._registry.get(queue)
        if if_unused and watch is not None and len(watch):
            raise self._in_use(queue, f"in use: it has {len(watch)} consumers")
        size = self._size(queue)
        if if_empty and size:
            raise self._in_use(queue, f"not empty: it has {size} messages")
        bindings = self.state.bindings_of(queue)
        for exchange, binding in bindings:
            self._delete(queue, exchange, *binding, **kwargs)
        if not bindings:
            self._delete(queue, **kwargs)
        self.state.drop_queue(queue)
        return size

    def queue_purge(self, queue: str, **kwargs: Any) -> int:  # noqa: ARG002
        """Remove the messages of a queue that are ready; return how many there were."""
        self._check_open(f"purge queue {queue!r}")
        return self._purge(queue)

    def queue_bind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Bind a queue to an exchange; the same binding twice is one.

        Raises:
            NotFoundError: (404) the exchange does not exist.
        """
        self._check_open(f"bind queue {queue!r}")
        routing_key = plain_name("routing_key", routing_key)
        self._bind(queue, exchange or "amq.direct", routing_key, arguments, "queue_bind")

    def _bind(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        arguments: Mapping[str, Any] | None,
        method: str,
    ) -> None:
        state = self.state
        declared = state.exchanges.get(exchange)
        if declared is None:
            raise self._not_found("exchange", exchange, (50, 20), method)
        exchange_type = self.typeof(exchange)
        binding = exchange_type.prepare_bind(queue, exchange, routing_key, arguments)
        name = exchange_type.binding_name(binding)
        if state.has_binding(queue, exchange, name):
            return
        declared["table"].add(binding)
        state.binding_declare(queue, exchange, name, arguments, binding)
        if self.supports_fanout:
            self._queue_bind(exchange, *binding)

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        """Keep a new binding in the store; called where `supports_fanout` is true."""

    def queue_unbind(
        self,
        queue: str,
        exchange: str | None = None,
        routing_key: str = "",
        arguments: Mapping[str, Any] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Remove a binding; a missing one is ignored."""
        self._check_open(f"unbind queue {queue!r}")
        self._unbind(queue, exchange or "amq.direct", routing_key, arguments)

    def _unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str,
        arguments: Mapping[str, Any] | None,
    ) -> None:
        exchange_type = self.typeof(exchange)
        binding = exchange_type.prepare_bind(queue, exchange, routing_key, arguments)
        self.state.binding_delete(queue, exchange, exchange_type.binding_name(binding))
        self.state.unbind(exchange, binding)

    # -- bindings

    def get_table(self, exchange: str) -> Iterable[tuple[str, str | None, str]]:
        """Return the bindings of an exchange: (binding key, pattern, queue).

        Raises:
            KeyError: there is no such exchange.
        """
        table: Iterable[tuple[str, str | None, str]] = self.state.exchanges[exchange]["table"]
        return table

    def get_exchanges(self) -> list[str]:
        """Return the names of the exchanges."""
        return list(self.state.exchanges)

    def list_bindings(self) -> Iterator[tuple[str, str, str]]:
        """Yield (queue, exchange, binding key) for every binding."""
        for exchange in self.get_exchanges():
            for key, _, queue in self.get_table(exchange):
                yield queue, exchange, key

    def get_bindings(self) -> list[dict[str, str]]:
        """Return every binding: its destination, source and routing_key."""
        return [
            {"destination": queue, "source": exchange, "routing_key": key}
            for queue, exchange, key in self.list_bindings()
        ]

    def _lookup(
        self,
        exchange: str,
        routing_key: str,
        default: str | None = None,
        *,
        headers: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """Return the queues that a message goes to.

        Args:
            exchange: '' is the nameless one, which knows every queue by its name.
            routing_key: of the message.
            default: the queue when no other takes it; None is `deadletter_queue`.
            headers: of the message, where the exchange looks at them.
        """
        if exchange:
            queues = self._route(exchange, routing_key, headers)
        else:
            queues = [routing_key] if self._has_queue(routing_key) else []
        return queues or self._undeliverable(exchange, routing_key, default)

    def _undeliverable(
        self, exchange: str, routing_key: str, default: str | None = None
    ) -> list[str]:
        """Return the queue for a message that no queue takes, if there is one."""
        default = self.deadletter_queue if default is None else default
        if default is None:
            return []
        warnings.warn(
            UndeliverableWarning(
                "Message could not be delivered: No queues bound to exchange "
                f"{exchange!r} using binding key {routing_key!r}; it goes to the queue "
                f"{default!r}"
            ),
            stacklevel=3,
        )
        self._new_queue(default)
        return [default]

    def _route(
        self, exchange: str, routing_key: str, headers: Mapping[str, Any] | None
    ) -> list[str]:
        try:
            table = self.get_table(exchange)
        except KeyError:
            return []
        if isinstance(table, BindingTable):
            return self.state.route(exchange, routing_key, headers)
        exchange_type = self.typeof(exchange)
        if isinstance(exchange_type, HeadersExchange):
            return list(exchange_type.lookup(table, exchange, routing_key, (), headers))
        return list(exchange_type.lookup(table, exchange, routing_key, ()))

    # -- errors

    @property
    def _vhost(self) -> str:
        return getattr(self.connection.client, "virtual_host", None) or "/"

    def _not_found(
        self, kind: str, name: str, method_sig: tuple[int, int], method: str
    ) -> BaseException:
        return exceptions.NotFoundError(
            f"NOT_FOUND - no {kind} {name!r} in vhost {self._vhost!r}",
            method_sig,
            f"Channel.{method}",
            "404",
        )

    def _not_equivalent(
        self,
        kind: str,
        name: str,
        declared: Mapping[str, Any],
        given: Mapping[str, Any],
        method_sig: tuple[int, int],
    ) -> BaseException:
        differing = ", ".join(
            f"{setting} is {declared[setting]!r} and not {value!r}"
            for setting, value in given.items()
            if (declared[setting] or None) != (value or None)
        )
        return exceptions.NotEquivalentError(
            f"PRECONDITION_FAILED - cannot redeclare {kind} {name!r} in vhost {self._vhost!r} with "
            f"other settings: {differing}; delete it first, or use another name",
            method_sig,
            f"Channel.{kind}_declare",
            "406",
        )

    def _in_use(self, queue: str, reason: str) -> BaseException:
        return precondition_failed(
            f"queue {queue!r} in vhost {self._vhost!r} is {reason}",
            (50, 40),
            "Channel.queue_delete",
        )

    def _unsupported(self, method: str) -> exceptions.UnsupportedOperation:
        return exceptions.UnsupportedOperation(
            f"the {self.connection.transport.driver_type} transport does not support {method}"
        )
