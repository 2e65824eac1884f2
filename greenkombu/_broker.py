"""Which broker a connection speaks to: parameters, transport, and how they are written down.

Nothing here opens anything.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from greenkombu._arguments import duration
from greenkombu._failover import FailoverStrategy, failover_strategies, resolve_strategy
from greenkombu._parameters import is_url, parse_broker, split_brokers
from greenkombu.deadline import remaining
from greenkombu.exceptions import ArgumentError
from greenkombu.transport import (
    DEFAULT_TRANSPORT,
    TRANSPORT_ALIASES,
    get_transport_cls,
    parses_urls,
)

if TYPE_CHECKING:
    from typing_extensions import Self

    ErrorTypes = tuple[type[BaseException], ...]

__all__ = ("Broker", "resolve_aliases")

logger = logging.getLogger(__name__)

#: Names of one transport that mean another one's in URIs and `info()`.
resolve_aliases = {"pyamqp": "amqp", "librabbitmq": "amqp"}

#: What makes a clone try the same brokers as the original, whichever it is at.
_BROKER_STATE = ("_given", "_given_transport", "_like_first")


#: What another broker's URL does not have from the first one.
_OWN_IN_URLS = frozenset({"hostname", "password", "transport", "uri_prefix", "userid"})

#: The defaults of the arguments.
_DEFAULTS: dict[str, Any] = {
    "userid": None,
    "password": None,
    "virtual_host": None,
    "port": None,
    "insist": False,
    "ssl": False,
    "connect_timeout": 5,
    "transport_options": {},
    "login_method": None,
    "uri_prefix": None,
    "heartbeat": 0,
}


#: What `info` shows, in this order.
_PARAMETERS = (
    "hostname",
    "userid",
    "password",
    "virtual_host",
    "port",
    "insist",
    "ssl",
    "transport",
    "connect_timeout",
    "transport_options",
    "login_method",
    "uri_prefix",
    "heartbeat",
    "failover_strategy",
    "alternates",
    "credential_provider",
)

#: Of these, what the transport has a default for.
_FROM_TRANSPORT = ("hostname", "userid", "password", "virtual_host", "port", "login_method")


class Broker:
    """The parameters of a connection, for one broker or several.

    The arguments are those of `Connection`.
    """

    port: int | None = None
    virtual_host: str | None = "/"
    hostname: str | None = None
    userid: str | None = None
    password: str | None = None
    ssl: Any = None
    heartbeat: float | None = None
    uri_prefix: str | None = None
    insist: bool = False
    credential_provider: Any = None
    transport_options: dict[str, Any]
    transport_cls: Any

    #: The iterator over the brokers; None with only one.
    cycle: Iterator[str] | None = None
    #: The function that gives `cycle`.
    failover_strategy: Any = "round-robin"
    failover_strategies = failover_strategies
    resolve_aliases = resolve_aliases
    _transport: Any = None
    _connection: Any = None
    # What was asked for: None leaves it to the broker.
    _login_method: str | None = None
    # How often it went over to another broker.
    _switches = 0

    def __init__(
        self,
        hostname: str | Iterable[str] | None = "localhost",
        userid: str | None = None,
        password: str | None = None,
        virtual_host: str | None = None,
        port: int | str | None = None,
        insist: bool = False,
        ssl: Any = False,
        transport: Any = None,
        connect_timeout: float | None = 5,
        transport_options: dict[str, Any] | None = None,
        login_method: str | None = None,
        uri_prefix: str | None = None,
        heartbeat: float | str | None = 0,
        failover_strategy: str | FailoverStrategy = "round-robin",
        alternates: Iterable[str] | None = None,
        credential_provider: Any = None,
        **kwargs: Any,
    ) -> None:
        if kwargs:
            logger.warning(
                "unknown arguments of a connection ignored: %s (options of a transport belong into"
                " transport_options)",
                ", ".join(kwargs),
            )
        if not isinstance(transport_options or {}, Mapping):
            raise ArgumentError(
                f"transport_options must be a dictionary, not {transport_options!r:.100}"
            )
        brokers = split_brokers(hostname)
        self.alt: list[str] = split_brokers(alternates)
        if len(brokers) > 1:
            self.alt = brokers + self.alt
        # Most programs say all in the URL, and there may be thousands of connections: what has its
        # default is left out.
        given: dict[str, Any] = {}
        if userid is not None:
            given["userid"] = userid
        if password is not None:
            given["password"] = password
        if virtual_host is not None:
            given["virtual_host"] = virtual_host
        if port is not None:
            given["port"] = port
        if insist:
            given["insist"] = insist
        if ssl != _DEFAULTS["ssl"]:
            given["ssl"] = ssl
        if connect_timeout != _DEFAULTS["connect_timeout"]:
            given["connect_timeout"] = connect_timeout
        if transport_options:
            given["transport_options"] = dict(transport_options)
        if login_method is not None:
            given["login_method"] = login_method
        if uri_prefix is not None:
            given["uri_prefix"] = uri_prefix
        if heartbeat != 0:
            given["heartbeat"] = heartbeat
        self._given = given
        self._given_transport = transport
        self.credential_provider = credential_provider
        first = brokers[0] if brokers else None
        parsed: dict[str, Any] = {}
        if first is not None:
            # With the prefix taken off already, the rest is for the transport's driver to read.
            parsed = {"hostname": first} if uri_prefix else parse_broker(first, transport)
        # A broker given by its name alone is like the first one in everything else.
        self._like_first = dict(parsed)
        self._apply(parsed)
        strategy = parsed.get("failover_strategy", failover_strategy)
        self._strategy = strategy
        self.failover_strategy = resolve_strategy(strategy)
        if self.alt:
            self._start_cycle()

    def _apply(self, parsed: dict[str, Any]) -> None:
        """Take the parameters of one broker; what it does not say comes from the arguments."""
        values = {**_DEFAULTS, **self._given, **parsed}
        self.hostname = parsed.get("hostname")
        self.userid = values["userid"]
        self.password = values["password"]
        self.virtual_host = values["virtual_host"] or "/"
        port = values["port"]
        try:
            self.port = None if port is None or port == "" else int(port)
        except (TypeError, ValueError):
            raise ArgumentError(f"port must be a number, not {port!r:.100}") from None
        self.insist = values["insist"]
        self.ssl = values["ssl"]
        self.connect_timeout = values["connect_timeout"]
        self.transport_options = {
            **self._given.get("transport_options", {}),
            **parsed.get("transport_options", {}),
        }
        self.login_method = values["login_method"]
        self.uri_prefix = values["uri_prefix"]
        heartbeat = values["heartbeat"]
        seconds = duration("heartbeat", heartbeat)
        self.heartbeat = float(seconds) if seconds else seconds
        transport = self._given_transport
        self.transport_cls = transport or parsed.get("transport") or DEFAULT_TRANSPORT

    @property
    def connect_timeout(self) -> float | None:
        """Seconds that an attempt to connect may take, shortened by the caller's deadline."""
        return remaining(self._connect_timeout)

    @connect_timeout.setter
    def connect_timeout(self, seconds: float | None) -> None:
        self._connect_timeout = duration("connect_timeout", seconds)

    @property
    def login_method(self) -> str | None:
        """The SASL mechanism that was asked for; once connected, the transport's own for none."""
        if self._login_method is None and self._connection is not None:
            method: str | None = self.transport.default_connection_params.get("login_method")
            return method
        return self._login_method

    @login_method.setter
    def login_method(self, method: str | None) -> None:
        self._login_method = method

    def _go_over_to(self, broker: str) -> None:
        """Take the parameters of *broker*; the transport of the one before has to be gone.

        What it leaves out it has from the first broker, as in Kombu. Always from the first: Kombu
        has some from the one before, and may come back to the first with another's port.
        """
        parsed = parse_broker(broker, self._given_transport)
        first = self._like_first
        if is_url(broker):
            # A login is for whom it was written.
            first = {name: value for name, value in first.items() if name not in _OWN_IN_URLS}
            if not self._same_transport(parsed):
                first.pop("port", None)
        options = {**first.get("transport_options", {}), **parsed.get("transport_options", {})}
        parsed = {**first, **parsed}
        if options:
            parsed["transport_options"] = options
        self._apply(parsed)
        self._switches += 1

    def _same_transport(self, parsed: dict[str, Any]) -> bool:
        ours, theirs = self._like_first.get("transport"), parsed.get("transport")
        return bool(
            self._given_transport
            or TRANSPORT_ALIASES.get(ours or DEFAULT_TRANSPORT, ours)
            == TRANSPORT_ALIASES.get(theirs or DEFAULT_TRANSPORT, theirs)
        )

    def _start_cycle(self) -> None:
        self.cycle = iter(self.failover_strategy(list(self.alt)))
        # The strategy's first broker is the one that the connection starts with, unless that one is
        # no alternate at all. A clone goes round from where its original is.
        current = [self._is_current(broker) for broker in self.alt]
        if any(current):
            in_turn = self.failover_strategy is failover_strategies["round-robin"]
            for _ in range(current.index(True) + 1 if in_turn else 1):
                next(self.cycle, None)

    def _is_current(self, broker: str) -> bool:
        parsed = parse_broker(broker, self._given_transport)
        return parsed.get("hostname") == self.hostname and parsed.get("port") in (None, self.port)

    def _next_broker(self) -> str:
        assert self.cycle is not None
        try:
            return next(self.cycle)
        except StopIteration:
            # A strategy may end; then it begins again.
            self.cycle = iter(self.failover_strategy(list(self.alt)))
            return next(self.cycle, self.alt[0])

    @property
    def _in_turn(self) -> int:
        """How many brokers there are to be tried one after the other."""
        if len(self.alt) < 2 or getattr(self.transport, "reaches_all_brokers", False):
            return 1
        return len(self.alt)

    def completes_cycle(self, retries: int) -> bool:
        """Tell whether every broker has been tried after `retries` failures more than one."""
        return not (retries + 1) % self._in_turn

    # -- transport

    @property
    def transport(self) -> Any:
        """The transport, made at first use."""
        transport = self._transport
        if transport is None:
            # Finding its class may take an import, in which other tasks run: the first one counts.
            made = self.create_transport()
            transport = self._transport
            if transport is None:
                transport = self._transport = made
        return transport

    def create_transport(self) -> Any:
        """Make a new transport for this connection; opens nothing."""
        return self.get_transport_cls()(client=self)

    def get_transport_cls(self) -> type[Any]:
        """Return the class of the transport."""
        return get_transport_cls(self.transport_cls or None)

    @property
    def connection_errors(self) -> ErrorTypes:
        """The errors to catch when the connection fails; usable before it is open."""
        errors: ErrorTypes = self.transport.connection_errors
        return errors

    @property
    def channel_errors(self) -> ErrorTypes:
        """The errors to catch when an operation of a channel fails."""
        errors: ErrorTypes = self.transport.channel_errors
        return errors

    @property
    def recoverable_connection_errors(self) -> ErrorTypes:
        """The errors that a new connection may mend."""
        transport = self.transport
        errors: ErrorTypes | None = getattr(transport, "recoverable_connection_errors", None)
        # A transport that does not tell them apart: a new connection may mend them all.
        return (
            (*transport.connection_errors, *transport.channel_errors) if errors is None else errors
        )

    @property
    def recoverable_channel_errors(self) -> ErrorTypes:
        """The errors after which the channel, or a new one, can be used again."""
        errors: ErrorTypes = getattr(self.transport, "recoverable_channel_errors", ())
        return errors

    def supports_exchange_type(self, exchange_type: str) -> bool:
        """Tell whether the transport has exchanges of that type."""
        return exchange_type in self.transport.implements.exchange_type

    @property
    def manager(self) -> Any:
        """The transport's object for broker-wide queries."""
        return self.transport.manager

    def get_manager(self, *args: Any, **kwargs: Any) -> Any:
        """Make a new object for broker-wide queries."""
        return self.transport.get_manager(*args, **kwargs)

    # -- what it is

    def clone(self, **kwargs: Any) -> Self:
        """Make an unconnected connection with the same parameters, changed by `kwargs`."""
        state = {name: getattr(self, name) for name in _BROKER_STATE}
        clone: Self = _rebuild(type(self), dict(self._info(resolve=False)), state, kwargs)
        return clone

    def __copy__(self) -> Self:
        return self.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        # The strategy goes by its name where it has one; a function has to pickle itself.
        state = {name: getattr(self, name) for name in _BROKER_STATE}
        return _rebuild, (type(self), dict(self._info(resolve=False)), state, {})

    def __eqhash__(self) -> tuple[Any, ...]:
        """Return what two connections have in common that may share a pool."""
        # Programs look their pools up for each message: only what may be no text or number has
        # to be looked at.
        return _Key(
            (
                *self._parameters()[:6],
                self.ssl if self.ssl is False else _frozen(self.ssl),
                self.transport_cls,
                self._connect_timeout,
                _frozen(self.transport_options) if self.transport_options else (),
                self._login_method or None,
                self.uri_prefix,
                self.heartbeat,
                self._strategy,
                tuple(self.alt),
                self.credential_provider and _frozen(self.credential_provider),
            )
        )

    def info(self) -> dict[str, Any]:
        """Return the parameters in use, the transport's own for those that were not given."""
        return dict(self._info())

    def _info(self, resolve: bool = True) -> tuple[tuple[str, Any], ...]:
        # First: making the transport of amqps:// sets `ssl`.
        defaults = self._defaults() if resolve else {}
        info = dict(zip(_PARAMETERS, self._parameters(), strict=True))
        if resolve:
            for name in _FROM_TRANSPORT:
                info[name] = info[name] or defaults.get(name)
            info["hostname"] = info["hostname"] or "localhost"
            if isinstance(self.transport_cls, str):
                info["transport"] = resolve_aliases.get(self.transport_cls, self.transport_cls)
        return tuple(info.items())

    def _parameters(self) -> tuple[Any, ...]:
        """Return the values of _PARAMETERS as they were given; None for what was not."""
        return (
            self.hostname or None,
            self.userid or None,
            self.password or None,
            self.virtual_host or None,
            self.port or None,
            self.insist,
            self.ssl,
            self.transport_cls,
            self._connect_timeout,
            self.transport_options,
            self._login_method or None,
            self.uri_prefix,
            self.heartbeat,
            self._strategy,
            self.alt,
            self.credential_provider,
        )

    def _defaults(self) -> dict[str, Any]:
        defaults = dict(self.transport.default_connection_params)
        if defaults.get("port") is None:
            defaults["port"] = self.transport.default_port
        return defaults

    @property
    def host(self) -> str:
        """The broker as ``host:port``; the port is missing where the transport has none."""
        defaults = self._defaults()
        hostname = self.hostname or defaults.get("hostname") or "localhost"
        port = self.port or defaults.get("port")
        return hostname if port is None else f"{hostname}:{port}"

    def as_uri(self, include_password: bool = False, mask: str = "**") -> str:
        """Write the parameters as a URL.

        Args:
            include_password: show the password.
            mask: shown in its place.
        """
        return self._as_uri(self._defaults(), include_password, mask)

    def _as_uri(self, defaults: dict[str, Any], include_password: bool, mask: str) -> str:
        from greenkombu.utils.url import as_url, maybe_sanitize_url

        hostname = self.hostname or defaults.get("hostname") or "localhost"
        if self.uri_prefix or (is_url(hostname) and parses_urls(self.transport_cls)):
            if parses_urls(self.transport_cls):
                uri: str = self.transport.as_uri(hostname, include_password, mask)
            else:
                uri = hostname if include_password else maybe_sanitize_url(hostname, mask=mask)
            return f"{self.uri_prefix}+{uri}" if self.uri_prefix else uri
        password = self.password or defaults.get("password")
        return as_url(
            self._scheme(),
            hostname,
            self.port or defaults.get("port"),
            self.userid or defaults.get("userid"),
            password,
            self.virtual_host or defaults.get("virtual_host"),
            sanitize=not include_password and password is not None,
            mask=mask,
        )

    def _scheme(self) -> str:
        """Return what stands before ``://``: an alias, or for a class without one its kind."""
        transport = self.transport_cls
        path = transport
        if not isinstance(transport, str):
            path = f"{transport.__module__}:{transport.__qualname__}"
        elif transport in TRANSPORT_ALIASES:
            return resolve_aliases.get(transport, transport)
        for alias, known in TRANSPORT_ALIASES.items():
            if known == path:
                return alias
        kind: str = getattr(transport, "driver_type", "N/A")
        return re.split("[.:]", path)[-1].lower() if kind == "N/A" else kind

    def __repr__(self) -> str:
        # Showing a connection must neither import its transport nor fail because it has none.
        transport = self._transport
        defaults = {} if transport is None else self._defaults()
        return f"<Connection: {self._as_uri(defaults, False, '**')} at {id(self):#x}>"


class _Key(tuple[Any, ...]):
    """The parameters of a connection as the key of a dict; shows no password."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<parameters of {self[7]} at {self[0] or 'localhost'}:{self[4] or ''}{self[3]}>"


def _rebuild(
    cls: type[Any], parameters: dict[str, Any], state: dict[str, Any], changes: dict[str, Any]
) -> Any:
    """Make the clone, or the unpickled copy, of a connection."""
    connection = cls(**{**parameters, **changes})
    if "transport" not in changes:
        # What stands there is where it is, not what the program asked for: other brokers may
        # have other transports.
        connection._given_transport = state["_given_transport"]
    unchanged = {name: value for name, value in state["_given"].items() if name not in changes}
    changed = {name: value for name, value in connection._given.items() if name in changes}
    connection._given = {**unchanged, **changed}
    if "hostname" not in changes:
        connection._like_first = state["_like_first"]
    return connection


def _frozen(value: Any) -> Any:
    """Make a hashable stand-in for a parameter, equal for equal values."""
    if isinstance(value, dict):
        return tuple(sorted(((str(key), _frozen(each)) for key, each in value.items()), key=_first))
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _first(pair: tuple[str, Any]) -> str:
    return pair[0]
