"""The interface between the messaging layer and a broker.

A transport derives from `Transport`, returns `TransportConnection` objects, and gives channels
that have the AMQP methods of `StdChannel`'s duck type. What it can do stands in
`Transport.implements`; what it cannot raises `exceptions.UnsupportedOperation`, which says so.
"""

# ruff: noqa: ARG002  the methods are hooks with Kombu's signatures

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from greenkombu import exceptions
from greenkombu.transport._connection import Bell, Failure, Inbox, TransportConnection
from greenkombu.transport._option_names import tell_misspelt
from hub.environment import get_environment

if TYPE_CHECKING:
    from types import TracebackType

    from greenkombu.connection import Connection
    from greenkombu.message import Message
    from greenkombu.messaging import Consumer, Producer

__all__ = (
    "RABBITMQ_QUEUE_ARGUMENTS",
    "Bell",
    "Failure",
    "Implements",
    "Inbox",
    "Management",
    "Message",
    "StdChannel",
    "Transport",
    "TransportConnection",
    "default_transport_capabilities",
    "to_rabbitmq_queue_arguments",
)


def __getattr__(name: str) -> Any:
    # The message class needs the serializers, which a program that only looks at a transport does
    # not.
    if name == "Message":
        from greenkombu.message import Message

        return Message
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _unsupported(owner: object, method: str) -> NoReturn:
    """Raise the error of an operation that a transport does not have."""
    cls = type(owner)
    raise exceptions.UnsupportedOperation(
        f"Transport {cls.__module__}.{cls.__qualname__} does not implement {method}"
    )


def _seconds_to_ms(seconds: float | str) -> int:
    return int(float(seconds) * 1000.0)


#: Kombu's queue options, RabbitMQ's names for them, and the conversion
#: (https://www.rabbitmq.com/docs/queues).
RABBITMQ_QUEUE_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "expires": ("x-expires", _seconds_to_ms),
    "message_ttl": ("x-message-ttl", _seconds_to_ms),
    "max_length": ("x-max-length", int),
    "max_length_bytes": ("x-max-length-bytes", int),
    "max_priority": ("x-max-priority", int),
}


def to_rabbitmq_queue_arguments(
    arguments: Mapping[str, Any] | None, **options: Any
) -> dict[str, Any]:
    """Merge Kombu's queue options into the arguments of queue.declare.

    Args:
        arguments: queue arguments that the user gave; they lose against an option of the same
            meaning.
        **options: expires, message_ttl (seconds), max_length, max_length_bytes, max_priority.
            None means not given.

    Returns:
        A new dictionary.

    Raises:
        KeyError: an option that is none of these.
        ArgumentError: a value is not a number.
    """
    prepared = dict(arguments or {})
    for option, value in options.items():
        name, convert = RABBITMQ_QUEUE_ARGUMENTS[option]
        if value is not None:
            try:
                prepared[name] = convert(value)
            except (TypeError, ValueError, OverflowError):
                raise exceptions.ArgumentError(
                    f"the queue option {option} must be a number, not {value!r:.100}"
                ) from None
    return prepared


class Implements(dict[str, Any]):
    """What a transport can do, by item or by attribute.

    Kombu's names are `asynchronous`, `batch_publish`, `exchange_type` and `heartbeats`; the names
    of `default_transport_capabilities` below them are ours. `direct`, `topic`, `fanout` and
    `headers` as attributes say whether `exchange_type` holds them.
    """

    _EXCHANGE_TYPES: ClassVar[frozenset[str]] = frozenset({"direct", "topic", "fanout", "headers"})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name in self._EXCHANGE_TYPES:
                return name in self.get("exchange_type", ())
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def extend(self, **features: Any) -> Implements:
        """Return a copy with `features` changed."""
        return type(self)(self, **features)

    def require(self, feature: str, transport: str) -> None:
        """Raise UnsupportedOperation, naming `transport`, unless it has `feature`."""
        if not getattr(self, feature):
            raise exceptions.UnsupportedOperation(
                f"the {transport} transport has no {feature.replace('_', ' ')}"
            )


#: What a transport has that says nothing else.
default_transport_capabilities = Implements(
    asynchronous=False,
    batch_publish=False,
    exchange_type=frozenset({"direct", "topic", "fanout", "headers"}),
    heartbeats=False,
    # -- ours
    confirms=False,  # publish can wait until the broker has taken the message
    dead_letter=False,  # rejected and expired messages can go to another exchange
    exchange_bindings=False,  # exchanges can be bound to exchanges
    max_length=False,  # queues can be bounded
    persistence=False,  # messages outlive the broker's process
    prefetch=True,  # basic_qos bounds the unacknowledged deliveries
    priorities=False,  # a message with a higher priority comes first
    queue_expiry=False,  # unused queues can vanish
    returns=False,  # mandatory messages without a queue come back
    shared=True,  # several processes meet on one broker
    transactions=False,  # tx_select, tx_commit, tx_rollback
    ttl=False,  # messages can expire
)


class Management:
    """Broker-wide queries; a transport that has them overrides `Transport.Management`."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    def get_bindings(self) -> Any:
        """List all bindings of the broker."""
        _unsupported(self, "get_bindings")


class StdChannel:
    """Base of the channels of every transport."""

    #: Tags of the consumers that need no acknowledgement; each channel has its own set.
    no_ack_consumers: set[str] | None = None

    def Consumer(self, *args: Any, **kwargs: Any) -> Consumer:
        """Make a `greenkombu.Consumer` on this channel."""
        from greenkombu.messaging import Consumer

        return Consumer(self, *args, **kwargs)

    def Producer(self, *args: Any, **kwargs: Any) -> Producer:
        """Make a `greenkombu.Producer` on this channel."""
        from greenkombu.messaging import Producer

        return Producer(self, *args, **kwargs)

    def get_bindings(self) -> Any:
        """List all bindings that the channel can see."""
        _unsupported(self, "get_bindings")

    def after_reply_message_received(self, queue: str) -> None:
        """Run after a reply was taken from `queue`; a transport may drop the queue then."""

    def prepare_queue_arguments(
        self, arguments: Mapping[str, Any] | None, **kwargs: Any
    ) -> Mapping[str, Any] | None:
        """Translate Kombu's queue options into queue arguments; here they are dropped."""
        return arguments

    def close(self) -> None:
        """Close the channel."""
        _unsupported(self, "close")

    def __enter__(self) -> StdChannel:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        # A pool gives its channels a method of this name.
        release = getattr(self, "release", None)
        if release is None:
            self.close()
        else:
            release()


class Transport:
    """Base of all transports.

    Args:
        client: the `greenkombu.Connection` that owns this instance; all parameters (host,
            credentials, options, ...) are read from it when a connection is made.
        **kwargs: kept for Kombu's sake, not used.
    """

    Management: type[Management] = Management

    #: The Connection that owns this instance.
    client: Any = None
    #: True if the transport takes the whole URL as the host name.
    can_parse_url: bool = False
    #: Port used when none was given.
    default_port: int | None = None
    #: What `except` has to catch when the connection fails.
    connection_errors: tuple[type[BaseException], ...] = (exceptions.ConnectionError, OSError)
    #: What `except` has to catch when an operation of a channel fails.
    channel_errors: tuple[type[BaseException], ...] = (
        exceptions.StdChannelError,
        exceptions.ChannelError,
    )
    # A transport that can tell which errors a reconnect, or a new channel, may mend also has the
    # tuples recoverable_connection_errors and recoverable_channel_errors. Without them every
    # error is taken for one.
    #: The broker's kind, as in 'amqp', 'redis'.
    driver_type: str = "N/A"
    #: The client library below.
    driver_name: str = "N/A"
    #: Seconds between two looks into a store that cannot notify; None if it never polls.
    polling_interval: float | None = None
    #: A connection of it reaches all the brokers that its client names, such as the sentinels of
    #: one master or the nodes of a cluster: if it fails, the client goes over to no other one.
    reaches_all_brokers: bool = False
    #: What it can do.
    implements: Implements = default_transport_capabilities

    def __init__(self, client: Connection | None, **kwargs: Any) -> None:
        self.client = client
        options = getattr(client, "transport_options", None)
        if options:
            channel = getattr(self, "Channel", None)
            tell_misspelt(options, getattr(channel, "from_transport_options", ()))

    # -- connections and channels

    def establish_connection(self) -> Any:
        """Connect with the parameters of `client` within its connect_timeout.

        Returns:
            A `TransportConnection`.
        """
        _unsupported(self, "establish_connection")

    def close_connection(self, connection: Any) -> None:
        """Close what `establish_connection` returned; bounded also when the peer is dead."""
        _unsupported(self, "close_connection")

    def create_channel(self, connection: Any) -> Any:
        """Open a channel on `connection`."""
        _unsupported(self, "create_channel")

    def close_channel(self, connection: Any) -> None:
        """Close a channel."""
        _unsupported(self, "close_channel")

    def drain_events(self, connection: Any, timeout: float | None = None, **kwargs: Any) -> None:
        """Wait for one event of any channel of `connection` and run it in the calling task.

        Args:
            connection: what `establish_connection` returned.
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: nothing came in time (`socket.timeout` is this class).
        """
        if not isinstance(connection, TransportConnection):
            _unsupported(self, "drain_events")
        connection.drain_events(timeout)

    def verify_connection(self, connection: Any) -> bool:
        """Tell without blocking whether `connection` can be used."""
        return bool(connection.connected)

    # -- heartbeats and loops

    def get_heartbeat_interval(self, connection: Any) -> float:
        """Return the seconds between heartbeats; 0 when there are none."""
        return 0

    def heartbeat_check(self, connection: Any, rate: float = 2) -> None:
        """Send a heartbeat if one is due and raise if the peer is late.

        Does nothing where the hub sees to heartbeats.

        Args:
            rate: how often this is called within one heartbeat interval.
        """

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Register with a loop of the program's own; idempotent."""

    def unregister_from_event_loop(self, connection: Any, loop: Any) -> None:
        """Undo `register_with_event_loop`."""

    def on_readable(self, connection: Any, loop: Any) -> None:
        """Run the events that wait, because a loop of the program's own saw something to read."""
        for _ in range(len(connection.inbox) or 1):
            if not connection.deliver():
                return

    # -- what it is

    def driver_version(self) -> str:
        """Return the version of the client library."""
        return "N/A"

    def as_uri(self, uri: str, include_password: bool = False, mask: str = "**") -> str:
        """Write a URI that only this transport understands; needed with `can_parse_url`."""
        _unsupported(self, "as_uri")

    def qos_semantics_matches_spec(self, connection: Any) -> bool:
        """True if a global basic_qos is shared by all channels, as AMQP 0-9-1 says."""
        return True

    @property
    def default_connection_params(self) -> dict[str, Any]:
        """What stands in for parameters that were not given (userid, port, virtual_host, ...)."""
        return {}

    @property
    def supports_ev(self) -> bool:
        """True if a loop of the program's own can drive the connection."""
        return bool(self.implements.asynchronous)

    @property
    def supports_heartbeats(self) -> bool:
        """True if a program may call `heartbeat_check` to see to heartbeats itself.

        False under green threads, whatever `implements.heartbeats` says. The hub does it there, and
        programs slow down to ask for it when they are told that it is up to them.
        """
        return bool(self.implements.heartbeats) and not get_environment().green

    def get_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Make a new object for broker-wide queries."""
        return self.Management(self)

    @property
    def manager(self) -> Any:
        """The object for broker-wide queries, made once."""
        manager = self.__dict__.get("_manager")
        if manager is None:
            manager = self.__dict__["_manager"] = self.get_manager()
        return manager
