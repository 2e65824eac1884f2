"""The AMQP 0-9-1 transport: RabbitMQ and its relatives.

What is Kombu's about it stands here: the transport's names and parameters, and the messages.
The protocol is in `greenkombu._amqp`, whose `Channel` and `Connection` derive from those of the
``amqp`` package and keep its interface.

A received message is one object from the parser to the user's callback: `Delivery` is made from
the bytes of the frames and decodes properties, headers and body when they are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import amqp
from amqp.exceptions import MessageNacked

from greenkombu import message as _message
from greenkombu._amqp import channel as _channel
from greenkombu._amqp import connection as _connection
from greenkombu._amqp.errors import MessageTooLarge
from greenkombu._amqp.message import Outgoing
from greenkombu._amqp.opening import PORT, TLS_PORT
from greenkombu._amqp.options import AMQPOptions, as_bool
from greenkombu._amqp.protocol import joined, octets_of
from greenkombu._amqp.refusals import is_stream_delivery
from greenkombu._amqp.values import decode_properties
from greenkombu.compression import decompress
from greenkombu.exceptions import OperationalError, StdChannelError, UnsupportedOperation
from greenkombu.serialization import loads
from greenkombu.transport import base
from greenkombu.transport._loop_bridge import LoopBridge, LoopDriven
from hub.environment import get_environment

__all__ = [
    "Channel",
    "Connection",
    "Delivery",
    "KombuMethods",
    "Message",
    "SSLTransport",
    "Transport",
]

DEFAULT_PORT = PORT
DEFAULT_SSL_PORT = TLS_PORT

# Encodings by which a body becomes text; any other name from a message's header is left alone,
# because looking up a codec means importing a module of that name.
_TEXT_ENCODINGS = frozenset(
    {
        "ascii",
        "cp1252",
        "iso-8859-1",
        "iso-8859-15",
        "latin-1",
        "latin1",
        "us-ascii",
        "utf-16",
        "utf-16-be",
        "utf-16-le",
        "utf-32",
        "utf-8",
        "utf8",
        "windows-1252",
    }
)

# Property sets without headers, by their bytes: the messages of a queue mostly have the same.
# Bounded, and emptied when it is full.
_KNOWN_PROPERTIES: dict[bytes, dict[str, Any]] = {}
_KNOWN_MAX = 512
_KNOWN_SIZE = 96


def _properties_of(header: bytes) -> dict[str, Any]:
    """Decode a content header; the result may be shared and must not be changed."""
    known = _KNOWN_PROPERTIES.get(header)
    if known is None:
        known = decode_properties(header)
        if len(header) <= _KNOWN_SIZE and not known.get("application_headers"):
            if len(_KNOWN_PROPERTIES) >= _KNOWN_MAX:
                _KNOWN_PROPERTIES.clear()
            _KNOWN_PROPERTIES[header] = known
    return known


class Message(_message.Message):
    """A received message.

    Args:
        msg: an `amqp.Message`.
        channel: where it came from.
        **kwargs: for the base class.
    """

    def __init__(self, msg: Any, channel: Any = None, **kwargs: Any) -> None:
        properties = msg.properties
        super().__init__(
            body=msg.body,
            channel=channel,
            delivery_tag=msg.delivery_tag,
            content_type=properties.get("content_type"),
            content_encoding=properties.get("content_encoding"),
            delivery_info=msg.delivery_info,
            properties=properties,
            headers=properties.get("application_headers") or {},
            **kwargs,
        )

    def _reject(self, action: str, state: str, requeue: bool) -> None:
        if is_stream_delivery(self):
            # RabbitMQ would end the connection (540), for all who share it.
            raise UnsupportedOperation(
                f"cannot {action} delivery {self.delivery_tag}: a stream keeps its messages; ack"
                " it, and publish elsewhere what was not processed"
            )
        super()._reject(action, state, requeue)


class Delivery(Message):
    """A message as the parser makes it; see `greenkombu._amqp.protocol.Delivery`.

    It is also the event that waits in the inbox: calling it calls the consumer.
    """

    __slots__ = (
        "_body",
        "_header",
        "_properties",
        "_resolved",
        "channel_id",
        "consumer_tag",
        "exchange",
        "no_ack",
        "redelivered",
        "routing_key",
    )

    # Few messages need these; they are in the instance's dict then.
    _delivery_info: dict[str, Any] | None = None
    _headers: dict[str, Any] | None = None
    message_count: int | None = None

    # Not the base's __init__: nothing is decoded here.  It runs in the hub, for each message.
    def __init__(
        self,
        channel_id: int,
        consumer_tag: str | None,
        delivery_tag: int,
        redelivered: bool,
        exchange: str,
        routing_key: str,
        header: bytes,
        body: bytes | list[bytes] | None,
        fault: MessageTooLarge | None = None,
    ) -> None:
        self.channel_id = channel_id
        self.consumer_tag = consumer_tag
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.exchange = exchange
        self.routing_key = routing_key
        self._header = header
        self._body: Any = body
        self._resolved = False
        self._properties: dict[str, Any] | None = None
        self._state = _message.RECEIVED
        self._decoded_cache = _message._UNDECODED
        self.no_ack = False
        self.accept = None
        if fault is not None:
            self._note_error(fault)

    def __call__(self) -> object:
        return self.channel.run_delivery(self)

    @property
    def size(self) -> int:
        """Octets of the body (characters, once it was looked at)."""
        return octets_of(self._body)

    @property
    def properties(self) -> dict[str, Any]:
        """All properties, `content_type` and `application_headers` included; may be written to.

        Raises:
            MalformedValueError: the sender's header cannot be decoded.
        """
        properties = self._properties
        if properties is None:
            properties = self._properties = _properties_of(self._header).copy()
            if "application_headers" in properties and not properties["application_headers"]:
                properties["application_headers"] = {}
        return properties

    @properties.setter
    def properties(self, value: dict[str, Any]) -> None:
        self._properties = value

    @property
    def headers(self) -> dict[str, Any]:
        """The application headers; may be written to."""
        headers = self._headers
        if headers is None:
            headers = self.properties.get("application_headers")
            if headers is None:
                headers = {}
            self._headers = headers
        return headers

    @headers.setter
    def headers(self, value: dict[str, Any]) -> None:
        self._headers = value

    def _property(self, name: str) -> Any:
        properties = self._properties
        return (_properties_of(self._header) if properties is None else properties).get(name)

    @property
    def content_type(self) -> str | None:
        """How the body was serialized."""
        kind: str | None = self._property("content_type")
        return kind

    @content_type.setter
    def content_type(self, value: str | None) -> None:
        self.properties["content_type"] = value

    @property
    def content_encoding(self) -> str | None:
        """How the serialized text was encoded."""
        encoding: str | None = self._property("content_encoding")
        return encoding

    @content_encoding.setter
    def content_encoding(self, value: str | None) -> None:
        self.properties["content_encoding"] = value

    @property
    def delivery_info(self) -> dict[str, Any]:
        """Where it came from; may be written to."""
        info = self._delivery_info
        if info is None:
            info = {
                "delivery_tag": self.delivery_tag,
                "redelivered": self.redelivered,
                "exchange": self.exchange,
                "routing_key": self.routing_key,
            }
            if self.consumer_tag is not None:
                info["consumer_tag"] = self.consumer_tag
            else:
                info["message_count"] = self.message_count
            self._delivery_info = info
        return info

    @delivery_info.setter
    def delivery_info(self, value: dict[str, Any]) -> None:
        self._delivery_info = value

    @property
    def body(self) -> Any:
        """The body, decompressed; as text where `content_encoding` says how, as amqp has it.

        None if it was too large; then, and if it cannot be decompressed, `errors` says why.
        """
        if not self._resolved:
            self._resolve()
        return self._body

    @body.setter
    def body(self, value: Any) -> None:
        self._body = value
        self._resolved = True

    def _resolve(self) -> None:
        """Make of the octets that came what the sender gave to its transport."""
        self._resolved = True
        body = self._body
        if body is None:
            return
        if type(body) is list:
            body = self._body = joined(body)
        properties = self._properties
        if properties is None:
            properties = _properties_of(self._header)
        headers = properties.get("application_headers")
        if headers and headers.get("compression"):
            try:
                self._body = decompress(body, headers["compression"])
            except Exception as exc:
                self._note_error(exc)
            return
        encoding = properties.get("content_encoding")
        if encoding is not None and encoding.lower() in _TEXT_ENCODINGS:
            try:
                self._body = body.decode(encoding)
            except UnicodeError:
                pass  # not what it says: the octets tell more

    def _decode(self) -> Any:
        # What is wrong with the body is found out by looking at it.
        if not self._resolved:
            self._resolve()
        if self.errors:
            self._reraise_error()
        # Not through the properties of this class: they would look the header up three times, for
        # an eighth of what consuming a message costs (benchmarks/bench_amqp.py, no_ack).
        properties = self._properties
        if properties is None:
            properties = _properties_of(self._header)
        return loads(
            self._body,
            properties.get("content_type"),
            properties.get("content_encoding"),
            accept=self.accept,
        )

    def ack(self, multiple: bool = False) -> None:
        """Tell the broker that this message was processed; see the base class."""
        if self.no_ack:
            return
        channel = self.channel
        if self._state is not _message.RECEIVED or channel is None:
            super().ack(multiple)
            return
        self._state = _message.ACK
        try:
            channel.basic_ack(self.delivery_tag, multiple)
        except BaseException:
            self._state = _message.RECEIVED
            raise


class KombuMethods:
    """What Kombu adds to an AMQP channel; to stand before it, and `StdChannel` behind it."""

    __slots__ = ()

    Message: ClassVar[Any] = Message

    def prepare_message(
        self,
        body: Any,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: dict[str, Any] | None = None,
        properties: dict[str, Any] | None = None,
        _Message: Any = None,
    ) -> Outgoing | Any:
        """Make a message for `basic_publish`.

        Args:
            _Message: makes it in the place of our own class; called as `amqp.Message`.
        """
        if _Message is None:
            return Outgoing(body, priority, content_type, content_encoding, headers, properties)
        return _Message(
            body,
            priority=priority,
            content_type=content_type,
            content_encoding=content_encoding,
            application_headers=headers,
            **(properties or {}),
        )

    def prepare_queue_arguments(
        self, arguments: Mapping[str, Any] | None, **kwargs: Any
    ) -> dict[str, Any]:
        """Translate Kombu's queue options into RabbitMQ's queue arguments."""
        return base.to_rabbitmq_queue_arguments(arguments, **kwargs)

    def message_to_python(self, raw_message: Any) -> Any:
        """Return the `Message` for what a consumer or basic_get got."""
        if isinstance(raw_message, _message.Message):
            return raw_message
        return self.Message(raw_message, channel=self)


class Channel(KombuMethods, _channel.Channel, base.StdChannel):  # type: ignore[misc]
    """An AMQP channel with what Kombu adds to it."""

    __slots__ = ()


class Connection(_connection.Connection):
    """An AMQP connection whose channels and messages are this module's.

    Attributes:
        bridge: to a loop of the program's own, if it is registered with one.
    """

    __slots__ = ()

    Channel: ClassVar[Any] = Channel
    Message: ClassVar[Any] = Delivery

    bridge: LoopBridge | None = None


class Transport(LoopDriven, base.Transport):
    """AMQP 0-9-1 on the hub."""

    Connection: type[Connection] = Connection

    default_port = DEFAULT_PORT
    default_ssl_port = DEFAULT_SSL_PORT

    # amqp's own tuples, and ours where they do not derive from amqp's.
    connection_errors = (*amqp.Connection.connection_errors, OperationalError)
    channel_errors = (*amqp.Connection.channel_errors, StdChannelError)
    recoverable_connection_errors = (
        *amqp.Connection.recoverable_connection_errors,
        OperationalError,
        MessageNacked,
    )
    recoverable_channel_errors = amqp.Connection.recoverable_channel_errors

    driver_name = "py-amqp"
    driver_type = "amqp"

    implements = base.Transport.implements.extend(
        asynchronous=True,
        heartbeats=True,
        confirms=True,
        dead_letter=True,
        exchange_bindings=True,
        max_length=True,
        persistence=True,
        prefetch=True,
        priorities=True,
        queue_expiry=True,
        returns=True,
        transactions=True,
        ttl=True,
    )

    def __init__(
        self,
        client: Any,
        default_port: int | None = None,
        default_ssl_port: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(client, **kwargs)
        self.default_port = default_port or self.default_port
        self.default_ssl_port = default_ssl_port or self.default_ssl_port

    def driver_version(self) -> str:
        """Return the version of the amqp package."""
        version: str = amqp.__version__
        return version

    @property
    def default_connection_params(self) -> dict[str, Any]:
        """What stands in for parameters that were not given."""
        return {
            "userid": "guest",
            "password": "guest",
            "port": (self.default_ssl_port if self._ssl else self.default_port),
            "hostname": "localhost",
            "login_method": "PLAIN",
        }

    @property
    def _ssl(self) -> Any:
        return getattr(self.client, "ssl", False)

    # -- connections

    def establish_connection(self) -> Any:
        """Connect with the parameters of `client`, within its connect_timeout.

        Raises:
            See `greenkombu._amqp.connection.Connection.connect`.
        """
        client = self.client
        defaults = self.default_connection_params
        arguments: dict[str, Any] = {
            "host": _host(client, defaults),
            "userid": client.userid or defaults["userid"],
            "password": client.password if client.password is not None else defaults["password"],
            # What the user did not choose is for the broker to choose.
            "login_method": client.login_method,
            "virtual_host": client.virtual_host or "/",
            "ssl": client.ssl,
            "connect_timeout": client.connect_timeout,
            "heartbeat": client.heartbeat,
        }
        options = client.transport_options or {}
        if options:
            arguments.update(_arguments(options))
        connection = self.Connection(
            client=client, options=AMQPOptions.from_mapping(options), **arguments
        )
        connection.connect()
        return connection

    def close_connection(self, connection: Any) -> None:
        """Close politely within `close_timeout`, then at once."""
        connection.client = None
        self.end_bridge(connection)
        connection.close()

    def create_channel(self, connection: Any) -> Any:
        """Open a channel."""
        return connection.channel()

    def close_channel(self, connection: Any) -> None:
        """Close a channel."""
        connection.close()

    def _collect(self, connection: Any) -> None:
        if connection is not None:
            connection.abort()

    def verify_connection(self, connection: Any) -> bool:
        """Tell without blocking whether `connection` can be used again.

        One on which a confirm did not come in time cannot, even if it lives.
        """
        return bool(connection.connected) and not connection.suspect

    # -- heartbeats

    @property
    def supports_heartbeats(self) -> bool:
        """True if heartbeats are left to the caller of `heartbeat_check`.

        The hub sees to them in every environment.  Under native threads this is still True,
        for programs that ask for it before they let heartbeats be on at all; their checks do
        no harm.  Under green threads Celery would slow down to 10 messages per second.
        """
        return not get_environment().green

    def get_heartbeat_interval(self, connection: Any) -> float:
        """Return the negotiated interval in seconds; 0 when there are no heartbeats."""
        interval: float = connection.heartbeat
        return interval

    def heartbeat_check(self, connection: Any, rate: float = 2) -> None:
        """Raise if the connection is dead; the hub sends heartbeats and watches for them."""
        connection.heartbeat_tick(rate=rate)

    # -- what it is

    def qos_semantics_matches_spec(self, connection: Any) -> bool:
        """False on RabbitMQ from 3.3 on, whose global flag means the channel."""
        properties = connection.server_properties
        if properties.get("product") != "RabbitMQ":
            return True
        return _version(properties.get("version", "")) < (3, 3)


class SSLTransport(Transport):
    """The same over TLS; the broker's certificate is verified."""

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        # The scheme asked for it.
        if client is not None and not client.ssl:
            client.ssl = True


# Transport options, and parameters, that go to the connection as they are.
_ARGUMENTS = frozenset(
    {
        "authentication",
        "channel_max",
        "client_properties",
        "confirm_publish",
        "connect_timeout",
        "frame_max",
        "heartbeat",
        "host",
        "locale",
        "login_method",
        "login_response",
        "on_blocked",
        "on_open",
        "on_tune_ok",
        "on_unblocked",
        "password",
        "read_timeout",
        "socket_settings",
        "ssl",
        "userid",
        "virtual_host",
        "write_timeout",
    }
)


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the transport options that are arguments of a connection."""
    arguments = {name: value for name, value in options.items() if name in _ARGUMENTS}
    name = options.get("connection_name")
    if name is not None:
        properties = dict(arguments.get("client_properties") or {})
        properties.setdefault("connection_name", name)
        arguments["client_properties"] = properties
    if isinstance(arguments.get("confirm_publish"), str):  # from a URL
        arguments["confirm_publish"] = as_bool(arguments["confirm_publish"])
    return arguments


def _host(client: Any, defaults: Mapping[str, Any]) -> str:
    hostname = client.hostname or defaults["hostname"]
    port = client.port or defaults["port"]
    if ":" in hostname:
        # A literal IPv6 address; or Kombu's "host:port" in one.
        if hostname.startswith("[") or hostname.count(":") == 1:
            return hostname if not hostname.endswith("]") else f"{hostname}:{port}"
        return f"[{hostname}]:{port}"
    return f"{hostname}:{port}"


def _version(text: str) -> tuple[int, ...]:
    numbers = []
    for part in str(text).split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
