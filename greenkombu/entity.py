"""Declarations of exchanges, queues and bindings.

They are plain data (picklable, comparable, shareable) until they are bound to a channel;
then `declare`, `delete`, `bind_to`, `purge`, ... act on the broker through that channel.
The original stays unbound: binding gives a copy.

One module although it is long: `Exchange`, `binding` and `Queue` refer to each other, and most of
the lines are the signatures that Kombu's programs call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar

from greenkombu._arguments import plain_text
from greenkombu.abstract import Attributes, MaybeChannelBound, Object
from greenkombu.exceptions import ArgumentError, ContentDisallowed, KombuError
from greenkombu.serialization import dumps, prepare_accept_content

__all__ = ["Exchange", "Queue", "UnknownDeliveryModeError", "binding", "maybe_delivery_mode"]

TRANSIENT_DELIVERY_MODE = 1
PERSISTENT_DELIVERY_MODE = 2
DELIVERY_MODES = {
    "transient": TRANSIENT_DELIVERY_MODE,
    "persistent": PERSISTENT_DELIVERY_MODE,
}

# Names that start so belong to the broker and can be declared passively only (AMQP 0-9-1,
# exchange.declare, "reserved").  The nameless exchange exists always and cannot be declared.
RESERVED_EXCHANGE_PREFIX = "amq."

# Queue options that a channel turns into broker arguments (`prepare_queue_arguments`).
QUEUE_OPTIONS = ("expires", "message_ttl", "max_length", "max_length_bytes", "max_priority")


class UnknownDeliveryModeError(KombuError, KeyError):
    """The delivery mode is neither a number nor 'transient' nor 'persistent'."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; this one is a sentence.
        return str(self.args[0]) if self.args else ""


def maybe_delivery_mode(
    v: int | str | None,
    modes: Mapping[str, int] | None = None,
    default: int | None = PERSISTENT_DELIVERY_MODE,
) -> int | None:
    """Return the delivery mode as a number.

    Args:
        v: a number, an alias ("transient", "persistent"), or None for *default*.
        modes: the aliases.
        default: what None and 0 mean.

    Raises:
        UnknownDeliveryModeError: (also a KeyError) neither an alias nor a number of *modes*; a
            broker closes the channel of a message with another number.
    """
    if not v:
        return default
    aliases = DELIVERY_MODES if modes is None else modes
    if v in aliases.values():
        return v  # type: ignore[return-value]
    try:
        return aliases[v]  # type: ignore[index]
    except (KeyError, TypeError):
        raise UnknownDeliveryModeError(
            f"unknown delivery mode {v!r:.100}; use 1, 2 or one of {', '.join(sorted(aliases))}"
        ) from None


def _keep_delivery_mode(v: int | str | None) -> int | None:
    # An exchange without a mode of its own says None: each message is then persistent.
    return maybe_delivery_mode(v, default=None)


def _exchange_name(exchange: Exchange | str | None) -> str:
    return exchange.name if isinstance(exchange, Exchange) else exchange or ""


class Exchange(MaybeChannelBound):
    """An exchange.

    Args:
        name: '' is the broker's default exchange, which routes to the queue of the same name.
        type: 'direct', 'topic', 'fanout', 'headers', or a type that the broker adds.
        channel: bind this instance to it at once.
        durable: survives a restart of the broker; default True.
        auto_delete: deleted when the last queue is unbound; default False.
        delivery_mode: for messages that name none: 1 or 'transient', 2 or 'persistent'; None
            means persistent.
        arguments: more arguments of exchange.declare.
        passive: declare only checks that it exists.
        no_declare: never declare it (someone else does).

    Raises:
        UnknownDeliveryModeError: `delivery_mode` is not one of the above.
    """

    TRANSIENT_DELIVERY_MODE: ClassVar[int] = TRANSIENT_DELIVERY_MODE
    PERSISTENT_DELIVERY_MODE: ClassVar[int] = PERSISTENT_DELIVERY_MODE

    name: str = ""
    type: str = "direct"
    arguments: dict[str, Any] | None
    durable: bool = True
    auto_delete: bool = False
    passive: bool = False
    delivery_mode: int | None = None
    no_declare: bool = False

    attrs: ClassVar[Attributes] = (
        ("name", None),
        ("type", None),
        ("arguments", None),
        ("durable", bool),
        ("passive", bool),
        ("auto_delete", bool),
        ("delivery_mode", _keep_delivery_mode),
        ("no_declare", bool),
    )

    def __init__(self, name: str = "", type: str = "", channel: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name = plain_text("the name of an exchange", name or self.name)
        self.type = type or self.type
        self.maybe_bind(channel)

    def __hash__(self) -> int:
        return hash(("exchange", self.name))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Exchange):
            return (
                self.name == other.name
                and self.type == other.type
                and self.arguments == other.arguments
                and self.durable == other.durable
                and self.auto_delete == other.auto_delete
                and self.delivery_mode == other.delivery_mode
            )
        return NotImplemented

    @property
    def can_cache_declaration(self) -> bool:  # type: ignore[override]
        """One that deletes itself must be declared every time."""
        return not self.auto_delete

    def _can_declare(self) -> bool:
        return not self.no_declare and bool(
            self.name and not self.name.startswith(RESERVED_EXCHANGE_PREFIX)
        )

    def declare(
        self, nowait: bool = False, passive: bool | None = None, channel: Any = None
    ) -> Any:
        """Create the exchange on the broker.

        Args:
            nowait: do not wait for the broker's answer.
            passive: only check that it exists; None takes the attribute.
            channel: use this channel rather than the one it is bound to.

        Raises:
            NotBoundError: no channel.
            A channel error: it exists with other settings, or (passive) does not exist; the
                channel is then closed by an AMQP broker.

        Does nothing for the default exchange, `amq.*` and `no_declare`.
        """
        channel = self._channel_for("declare", channel)
        if not self._can_declare():
            return None
        return channel.exchange_declare(
            exchange=self.name,
            type=self.type,
            durable=self.durable,
            auto_delete=self.auto_delete,
            arguments=self.arguments,
            nowait=nowait,
            passive=self.passive if passive is None else passive,
        )

    def bind_to(
        self,
        exchange: Exchange | str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        channel: Any = None,
        **kwargs: Any,  # noqa: ARG002  Kombu's signature
    ) -> Any:
        """Route messages of *exchange* that match *routing_key* to this exchange as well."""
        return _change_binding(self, "bind_to", exchange, routing_key, arguments, nowait, channel)

    def unbind_from(
        self,
        source: Exchange | str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        channel: Any = None,
    ) -> Any:
        """Remove a binding made by `bind_to`."""
        return _change_binding(self, "unbind_from", source, routing_key, arguments, nowait, channel)

    def Message(
        self,
        body: Any,
        delivery_mode: int | str | None = None,
        properties: dict[str, Any] | None = None,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Make a message that `publish` takes.

        Args:
            body: with a *content_type*, bytes or text to be sent as it is; without, anything
                that the default serializer takes (text and bytes are not serialized).
            delivery_mode: None takes the exchange's.
            properties: more AMQP properties.
            priority: 0 to 9.
            content_encoding: None is 'utf-8' for text and 'binary' for bytes.
            headers: application headers.

        Raises:
            NotBoundError: no channel.
            EncodeError: the body cannot be serialized.
        """
        channel = self._channel_for("Message")
        if content_type is None:
            content_type, encoding, body = dumps(body)
            content_encoding = content_encoding or encoding
        elif not content_encoding:
            content_encoding = "utf-8" if isinstance(body, str) else "binary"
        merged = dict(properties or {})
        merged["delivery_mode"] = maybe_delivery_mode(
            delivery_mode or self.delivery_mode or merged.get("delivery_mode")
        )
        return channel.prepare_message(
            body,
            priority=priority,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=headers,
            properties=merged,
            **kwargs,
        )

    def publish(
        self,
        message: Any,
        routing_key: str | None = None,
        mandatory: bool = False,
        immediate: bool = False,
        exchange: Exchange | str | None = None,
    ) -> Any:
        """Publish a message made by `Message` (text and bytes are made into one).

        Args:
            exchange: publish to this one instead.

        Raises:
            NotBoundError: no channel.
            A connection or channel error of the transport.
        """
        channel = self._channel_for("publish")
        if isinstance(message, (str, bytes)):
            message = self.Message(message)
        return channel.basic_publish(
            message,
            exchange=_exchange_name(exchange) or self.name,
            routing_key=routing_key,
            mandatory=mandatory,
            immediate=immediate,
        )

    def delete(self, if_unused: bool = False, nowait: bool = False) -> Any:
        """Delete the exchange on the broker.

        Args:
            if_unused: only when no queue is bound to it; else the broker raises a channel error.
            nowait: do not wait for the broker's answer.
        """
        return self._channel_for("delete").exchange_delete(
            exchange=self.name, if_unused=if_unused, nowait=nowait
        )

    def binding(
        self,
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        unbind_arguments: dict[str, Any] | None = None,
    ) -> binding:
        """Return a `binding` from this exchange."""
        return binding(self, routing_key, arguments, unbind_arguments)

    def __repr__(self) -> str:
        return self._repr_entity(str(self))

    def __str__(self) -> str:
        return f"Exchange {self.name or repr('')}({self.type})"


class binding(Object):  # Kombu's name
    """What leads from an exchange to a queue or to another exchange.

    Args:
        exchange: an Exchange, a name, or the `as_dict()` of an exchange.
        routing_key: the binding key.
        arguments: for the headers exchange: the headers to match.
        unbind_arguments: what `unbind` sends; the broker wants those of the bind.
    """

    exchange: Exchange | str | None
    routing_key: str
    arguments: dict[str, Any] | None
    unbind_arguments: dict[str, Any] | None

    attrs: ClassVar[Attributes] = (
        ("exchange", None),
        ("routing_key", None),
        ("arguments", None),
        ("unbind_arguments", None),
    )

    def __init__(
        self,
        exchange: Exchange | str | Mapping[str, Any] | None = None,
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        unbind_arguments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.exchange = _from_mapping(exchange)
        self.routing_key = routing_key
        self.arguments = arguments
        self.unbind_arguments = unbind_arguments

    def declare(self, channel: Any, nowait: bool = False) -> None:
        """Declare the exchange, when it is known by more than its name."""
        exchange = self.exchange
        if isinstance(exchange, Exchange) and exchange.name:
            exchange.declare(channel=channel, nowait=nowait)

    def bind(self, entity: Exchange | Queue, nowait: bool = False, channel: Any = None) -> None:
        """Bind *entity*."""
        entity.bind_to(
            exchange=self.exchange or "",
            routing_key=self.routing_key,
            arguments=self.arguments,
            nowait=nowait,
            channel=channel,
        )

    def unbind(self, entity: Exchange | Queue, nowait: bool = False, channel: Any = None) -> None:
        """Undo `bind`."""
        arguments = self.arguments if self.unbind_arguments is None else self.unbind_arguments
        entity.unbind_from(
            self.exchange or "",
            routing_key=self.routing_key,
            arguments=arguments,
            nowait=nowait,
            channel=channel,
        )

    def __repr__(self) -> str:
        return f"<binding: {self}>"

    def __str__(self) -> str:
        return f"{_exchange_name(self.exchange) or repr('')}->{self.routing_key}"


def _from_mapping(
    exchange: Exchange | str | Mapping[str, Any] | None,
) -> Exchange | str | None:
    return Exchange(**exchange) if isinstance(exchange, Mapping) else exchange


class Queue(MaybeChannelBound):
    """A queue, and what binds it to its exchange.

    Args:
        name: '' lets the broker choose one, known after `declare`.
        exchange: an Exchange, a name, or the `as_dict()` of an exchange; a list, tuple or set of
            `binding` objects in its place is the same as `bindings`.
        routing_key: the binding key.
        channel: bind this instance to it at once.
        bindings: several `binding` objects (or their dicts), in place of exchange and routing_key.
        on_declared: called with (name, message_count, consumer_count) after queue_declare.
        key: an older name of routing_key.
        durable: survives a restart of the broker; default True.
        exclusive: for this connection only; implies auto_delete.
        auto_delete: deleted when its last consumer goes.
        no_ack: its consumers get messages that need no acknowledgement.
        queue_arguments, binding_arguments, consumer_arguments: more arguments for the broker.
        expires: seconds after which the unused queue is deleted.
        message_ttl: seconds a message may wait in it.
        max_length, max_length_bytes: what it holds at most; the oldest messages go first.
        max_priority: the highest priority that it tells apart.
        alias: not used here; applications may.
        no_declare: never declare it (someone else does).
    """

    ContentDisallowed: ClassVar[type[Exception]] = ContentDisallowed

    name: str = ""
    exchange: Exchange | None = Exchange("")
    routing_key: str = ""
    queue_arguments: dict[str, Any] | None
    binding_arguments: dict[str, Any] | None
    consumer_arguments: dict[str, Any] | None
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    no_ack: bool = False
    alias: Any
    bindings: set[binding]
    no_declare: bool | None
    expires: float | None
    message_ttl: float | None
    max_length: int | None
    max_length_bytes: int | None
    max_priority: int | None
    on_declared: Callable[..., Any] | None

    attrs: ClassVar[Attributes] = (
        ("name", None),
        ("exchange", None),
        ("routing_key", None),
        ("queue_arguments", None),
        ("binding_arguments", None),
        ("consumer_arguments", None),
        ("durable", bool),
        ("exclusive", bool),
        ("auto_delete", bool),
        ("no_ack", None),
        ("alias", None),
        ("bindings", list),
        ("no_declare", bool),
        ("expires", float),
        ("message_ttl", float),
        ("max_length", int),
        ("max_length_bytes", int),
        ("max_priority", int),
    )

    def __init__(
        self,
        name: str = "",
        exchange: Exchange | str | Mapping[str, Any] | Collection[binding] | None = None,
        routing_key: str = "",
        channel: Any = None,
        bindings: Iterable[binding | Mapping[str, Any]] | None = None,
        on_declared: Callable[..., Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.name = plain_text("the name of a queue", name or self.name)
        self.routing_key = routing_key or kwargs.get("key") or self.routing_key
        if exchange is not None and not isinstance(exchange, (Exchange, str, Mapping)):
            # Bindings in its place, as Celery's manual has them.
            if not isinstance(exchange, Collection):
                raise ArgumentError(
                    f"exchange must be an Exchange, a name or bindings, not {exchange!r:.100}"
                )
            bindings = [*exchange, *(bindings or ())]
            exchange = None
        self.bindings = {
            binding(**item) if isinstance(item, Mapping) else item for item in bindings or ()
        }
        self.on_declared = on_declared
        exchange = _from_mapping(exchange)
        if self.bindings:
            self.exchange = None
        elif isinstance(exchange, str):
            self.exchange = Exchange(exchange)
        elif exchange is not None:
            self.exchange = exchange
        if self.exclusive:
            self.auto_delete = True
        self.maybe_bind(channel)

    def __hash__(self) -> int:
        return hash(("queue", self.name))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Queue):
            return (
                self.name == other.name
                and self.exchange == other.exchange
                and self.routing_key == other.routing_key
                and self.queue_arguments == other.queue_arguments
                and self.binding_arguments == other.binding_arguments
                and self.consumer_arguments == other.consumer_arguments
                and self.durable == other.durable
                and self.exclusive == other.exclusive
                and self.auto_delete == other.auto_delete
            )
        return NotImplemented

    def when_bound(self) -> None:
        """Bind the exchange to the same channel."""
        if self.exchange is not None:
            self.exchange = self.exchange._copy_bound_to(self._channel)

    @property
    def can_cache_declaration(self) -> bool:  # type: ignore[override]
        """One that deletes itself, or expires, must be declared every time."""
        if self.auto_delete or self.expires is not None:
            return False
        return not self.queue_arguments or "x-expires" not in self.queue_arguments

    # -- declaring

    def declare(self, nowait: bool = False, channel: Any = None) -> str:
        """Declare the exchange, the queue, and the bindings between them.

        Args:
            nowait: do not wait for the broker's answers.
            channel: use this channel rather than the one it is bound to.

        Returns:
            The queue's name, which the broker may have chosen.

        Raises:
            NotBoundError: no channel.
            A channel error: it exists with other settings; an AMQP broker then closes the channel.
        """
        channel = self._channel_for("declare", channel)
        if not self.no_declare:
            if self.exchange is not None:
                self.exchange.declare(nowait=nowait, channel=channel)
            self._create_queue(nowait=nowait, channel=channel)
            for bound in self.bindings:
                bound.declare(channel)
                bound.bind(self, nowait=nowait, channel=channel)
        return self.name

    def _create_queue(self, nowait: bool = False, channel: Any = None) -> None:
        self.queue_declare(nowait=nowait, passive=False, channel=channel)
        if self.exchange is not None and self.exchange.name:
            self.queue_bind(nowait=nowait, channel=channel)

    def queue_declare(
        self, nowait: bool = False, passive: bool = False, channel: Any = None
    ) -> Any:
        """Declare the queue alone.

        Args:
            passive: create nothing; raise a channel error (404) when it does not exist.

        Returns:
            (name, message_count, consumer_count), from the broker.
        """
        channel = self._channel_for("queue_declare", channel)
        arguments = self.queue_arguments
        options = {
            name: value for name in QUEUE_OPTIONS if (value := getattr(self, name)) is not None
        }
        if options:
            arguments = channel.prepare_queue_arguments(dict(arguments or {}), **options)
        declared = channel.queue_declare(
            queue=self.name,
            passive=passive,
            durable=self.durable,
            exclusive=self.exclusive,
            auto_delete=self.auto_delete,
            arguments=arguments,
            nowait=nowait,
        )
        if declared:
            if not self.name:
                self.name = declared[0]
            if self.on_declared is not None:
                self.on_declared(*declared)
        return declared

    def queue_bind(self, nowait: bool = False, channel: Any = None) -> Any:
        """Bind the queue to its exchange."""
        return self.bind_to(
            self.exchange or "", self.routing_key, self.binding_arguments, nowait, channel
        )

    def bind_to(
        self,
        exchange: Exchange | str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        channel: Any = None,
    ) -> Any:
        """Bind the queue to *exchange*."""
        return _change_binding(self, "bind_to", exchange, routing_key, arguments, nowait, channel)

    def queue_unbind(
        self, arguments: dict[str, Any] | None = None, nowait: bool = False, channel: Any = None
    ) -> Any:
        """Remove the binding to its exchange.

        Args:
            arguments: None takes those of the binding, which the broker compares.
        """
        return self.unbind_from(
            self.exchange or "",
            self.routing_key,
            self.binding_arguments if arguments is None else arguments,
            nowait,
            channel,
        )

    def unbind_from(
        self,
        exchange: Exchange | str = "",
        routing_key: str = "",
        arguments: dict[str, Any] | None = None,
        nowait: bool = False,
        channel: Any = None,
    ) -> Any:
        """Remove a binding to *exchange*."""
        return _change_binding(
            self, "unbind_from", exchange, routing_key, arguments, nowait, channel
        )

    def unbind(self) -> None:
        """Remove every binding that `declare` made."""
        channel = self._channel_for("unbind")
        if self.exchange is not None and self.exchange.name:
            self.queue_unbind(channel=channel)
        for bound in self.bindings:
            bound.unbind(self, channel=channel)

    # -- messages

    def get(self, no_ack: bool | None = None, accept: Iterable[str] | None = None) -> Any:
        """Take one message, if there is one.

        Args:
            no_ack: it needs no acknowledgement; None takes the queue's own setting.
            accept: names or content types that may be decoded; None leaves it to the registry.

        Returns:
            A message, or None.  One that cannot be decoded is returned as well: its `payload`
            raises, and it can still be rejected.
        """
        channel = self._channel_for("get")
        message = channel.basic_get(
            queue=self.name, no_ack=self.no_ack if no_ack is None else no_ack
        )
        if message is not None:
            to_python = getattr(channel, "message_to_python", None)
            if to_python is not None:
                message = to_python(message)
            message.accept = prepare_accept_content(accept)
        return message

    def purge(self, nowait: bool = False) -> int:
        """Delete all messages that are ready; return how many."""
        count: int | None = self._channel_for("purge").queue_purge(queue=self.name, nowait=nowait)
        return count or 0

    def consume(
        self,
        consumer_tag: str | None = "",
        callback: Callable[[Any], Any] | None = None,
        no_ack: bool | None = None,
        nowait: bool = False,
        on_cancel: Callable[[str], Any] | None = None,
    ) -> Any:
        """Start a consumer; it lasts until it is cancelled or the channel closes.

        Args:
            consumer_tag: its name on the channel; empty or None lets the broker choose.
            callback: called with each message, in the task that drains.
            no_ack: messages need no acknowledgement; None takes the queue's own setting.
            nowait: do not wait for the broker's answer.
            on_cancel: called with the tag when the broker cancels the consumer.
        """
        return self._channel_for("consume").basic_consume(
            queue=self.name,
            no_ack=self.no_ack if no_ack is None else no_ack,
            consumer_tag=consumer_tag or "",
            callback=callback,
            nowait=nowait,
            arguments=self.consumer_arguments,
            on_cancel=on_cancel,
        )

    def cancel(self, consumer_tag: str) -> Any:
        """Stop a consumer by its tag; an unknown tag is not an error."""
        return self._channel_for("cancel").basic_cancel(consumer_tag)

    def delete(self, if_unused: bool = False, if_empty: bool = False, nowait: bool = False) -> Any:
        """Delete the queue on the broker.

        Args:
            if_unused: only without consumers; else the broker raises a channel error.
            if_empty: only without messages; else the broker raises a channel error.
            nowait: do not wait for the broker's answer.
        """
        return self._channel_for("delete").queue_delete(
            queue=self.name, if_unused=if_unused, if_empty=if_empty, nowait=nowait
        )

    # -- plain data

    @classmethod
    def from_dict(cls, queue: str, **options: Any) -> Queue:
        """Make a queue from flat options, as carrot and configuration files name them.

        Args:
            queue: the queue's name.
            **options: the attributes of the queue; binding_key (or routing_key); exchange (a
                name, an Exchange or its dict) with exchange_type, exchange_durable,
                exchange_auto_delete, exchange_arguments, delivery_mode; queue_durable,
                queue_auto_delete.  `durable` and `auto_delete` serve both.
        """
        exchange = options.get("exchange")
        durable = options.get("durable")
        auto_delete = options.get("auto_delete")
        if isinstance(exchange, Mapping):
            exchange = Exchange(**exchange)
        elif not isinstance(exchange, Exchange):
            exchange = Exchange(
                exchange or "",
                type=options.get("exchange_type") or "",
                delivery_mode=options.get("delivery_mode"),
                auto_delete=_first(options.get("exchange_auto_delete"), auto_delete),
                durable=_first(options.get("exchange_durable"), durable),
                arguments=options.get("exchange_arguments"),
            )
        own = {
            name: options[name]
            for name, _ in cls.attrs
            if name in options and name not in ("name", "exchange", "routing_key")
        }
        own["durable"] = _first(options.get("queue_durable"), durable)
        own["auto_delete"] = _first(options.get("queue_auto_delete"), auto_delete)
        return cls(
            queue,
            exchange=exchange,
            routing_key=options.get("binding_key") or options.get("routing_key") or "",
            **own,
        )

    def __repr__(self) -> str:
        if self.bindings:
            shown = "[" + ", ".join(sorted(map(str, self.bindings))) + "]"
            return self._repr_entity(f"Queue {self.name} -> {shown}")
        return self._repr_entity(f"Queue {self.name} -> {self.exchange!r} -> {self.routing_key}")


def _change_binding(
    entity: Exchange | Queue,
    operation: str,
    exchange: Exchange | str,
    routing_key: str,
    arguments: dict[str, Any] | None,
    nowait: bool,
    channel: Any,
) -> Any:
    """Carry out `bind_to` or `unbind_from` of *entity*, to which *exchange* routes."""
    channel = entity._channel_for(operation, channel)
    source = _exchange_name(exchange)
    options = {"routing_key": routing_key, "arguments": arguments, "nowait": nowait}
    binds = operation == "bind_to"
    if isinstance(entity, Queue):
        change = channel.queue_bind if binds else channel.queue_unbind
        return change(queue=entity.name, exchange=source, **options)
    change = channel.exchange_bind if binds else channel.exchange_unbind
    return change(destination=entity.name, source=source, **options)


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
