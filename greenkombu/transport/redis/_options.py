"""What a connection to Redis is made with: from a `greenkombu.Connection` and its options.

Names of options are those of Kombu's Redis transport; the options that concern keys and messages
are the channel's.  A URL comes from anybody, so what it says is checked here, before anything is
opened, and errors never show the password.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from greenkombu._parameters import truth
from greenkombu.exceptions import ArgumentError, KombuError
from greenkombu.transport.redis._resp import DEFAULT_MAX_REPLY_BYTES
from greenkombu.utils.url import url_to_parts
from hub.streams import SocketOptions

if TYPE_CHECKING:
    import ssl

__all__ = ["HEALTH_CHECK_INTERVAL", "PORT", "Settings", "read_seconds", "read_whole"]

PORT = 6379

#: Seconds for connecting and logging in, where the program set no bound.
CONNECT_TIMEOUT = 10.0
#: Seconds for one command: nothing waits without a bound.
SOCKET_TIMEOUT = 30.0
#: Seconds of silence after which the server is asked whether it is there, as Kombu does.
HEALTH_CHECK_INTERVAL = 25.0
#: Seconds for which the peer's TCP may leave sent data unacknowledged; finds a dead link.
USER_TIMEOUT = 60.0

# What a URL may not set: a class path from a stranger is not imported.
_NOT_IN_URL = frozenset({"credential_provider"})


# Thousands of connections share one object.
@lru_cache(16)
def _socket_options(
    keepalive: bool | None,
    user_timeout: float | None,
    further: tuple[tuple[Any, Any], ...] = (),
) -> SocketOptions:
    from greenkombu._amqp.opening import socket_options

    extra = socket_options(dict(further), None).extra if further else {}
    return SocketOptions(keepalive=keepalive is not False, user_timeout=user_timeout, extra=extra)


@dataclass(frozen=True)
class Settings:
    """One server and how to talk to it; all times are seconds.

    Attributes:
        address: (host, port), or the path of a Unix socket.
        ssl: what `greenkombu._amqp.tls.make_context` takes; False for none.
        credential_provider: has `get_credentials()`, which returns (username, password) or
            (password,), as redis-py's do; asked at each connecting.
        protocol: of RESP: 3, or 2 for servers and proxies that cannot do it.
        socket_timeout: of one command.
        connect_timeout: for connecting and logging in together.
        health_check_interval: a silent server is asked for a sign of life so often; 0 never.
    """

    address: tuple[str, int] | str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    db: int = 0
    ssl: Any = field(default=False, repr=False)
    client_name: str | None = None
    credential_provider: Any = field(default=None, repr=False)
    protocol: int = 3
    socket_timeout: float = SOCKET_TIMEOUT
    connect_timeout: float = CONNECT_TIMEOUT
    health_check_interval: float = HEALTH_CHECK_INTERVAL
    retry_on_timeout: bool = False
    max_reply_bytes: int = DEFAULT_MAX_REPLY_BYTES
    socket_options: SocketOptions = field(
        default_factory=lambda: _socket_options(None, USER_TIMEOUT)
    )

    @classmethod
    def from_connection(
        cls, connection: Any, tls: bool | None = None, options: Mapping[str, Any] | None = None
    ) -> Settings:
        """Read them from a `greenkombu.Connection`.

        Args:
            connection: hostname, port, userid, password, virtual_host (the number of the
                database), ssl, connect_timeout and transport_options are read.
            tls: whether the transport's own name asks for it (rediss).
            options: instead of transport_options.

        Raises:
            ArgumentError: something in it cannot be used; it says what, and what to write.
        """
        options = dict((connection.transport_options if options is None else options) or {})
        host: str = connection.hostname or "localhost"
        virtual_host: Any = connection.virtual_host
        userid, password = connection.userid or None, connection.password or None
        address: tuple[str, int] | str
        if host.startswith("socket://"):
            path, query, user_of_url, password_of_url = _unix_socket(host)
            address = path
            virtual_host = query.pop("virtual_host", None) or query.pop("db", None) or virtual_host
            userid, password = userid or user_of_url, password or password_of_url
            given = connection.transport_options or {}
            options = {**options, **query, **given}
        elif host.startswith("/"):
            address = host
        elif "://" in host:
            # Without the rest, which may hold a password.
            scheme = host.partition("://")[0]
            raise ArgumentError(
                f"there is no redis+{scheme}://: use redis://, rediss://, redis+socket://,"
                " sentinel:// or redis+cluster://"
            )
        else:
            address = (host, read_whole(connection.port or PORT, "the port", 1, 65535))
        ssl_options: Any = connection.ssl
        if tls and not ssl_options:
            ssl_options = True
        timeout = options.get("socket_connect_timeout")
        if timeout is None:
            timeout = connection.connect_timeout or CONNECT_TIMEOUT
        interval = options.get("health_check_interval", HEALTH_CHECK_INTERVAL)
        return cls(
            address=address,
            username=userid,
            password=password,
            db=_database(virtual_host),
            ssl=_ssl_options(ssl_options),
            client_name=_client_name(options.get("client_name")),
            credential_provider=_provider(
                options.get("credential_provider")
                or getattr(connection, "credential_provider", None)
            ),
            protocol=read_whole(
                options.get("protocol") or 3, "the transport option protocol", 2, 3
            ),
            socket_timeout=read_seconds(options, "socket_timeout", SOCKET_TIMEOUT),
            connect_timeout=_number(timeout, "socket_connect_timeout"),
            health_check_interval=_number(interval or 0, "health_check_interval", zero=True),
            retry_on_timeout=truth(options.get("retry_on_timeout") or False),
            max_reply_bytes=read_whole(
                options.get("max_reply_bytes") or DEFAULT_MAX_REPLY_BYTES,
                "the transport option max_reply_bytes",
                1024,
            ),
            socket_options=_chosen_socket_options(options),
        )

    @property
    def peer(self) -> str:
        """The server, for errors and logs."""
        if isinstance(self.address, str):
            return self.address
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def credentials(self) -> tuple[str | None, str | None]:
        """Return user name and password; asks the provider, which may wait.

        Raises:
            ArgumentError: the provider returned something else.
        """
        if self.credential_provider is None:
            return self.username, self.password
        given = self.credential_provider.get_credentials()
        if isinstance(given, (tuple, list)) and all(
            isinstance(each, (str, type(None))) for each in given
        ):
            if len(given) == 1:
                return None, given[0]
            if len(given) == 2:
                return given[0], given[1]
        # Without what it returned, which may be a password.
        raise ArgumentError(
            "get_credentials() of the credential_provider must return (username, password) or"
            f" (password,), and returned another {type(given).__name__}"
        )

    def tls(self) -> tuple[ssl.SSLContext | None, str | None]:
        """Return a context, made now so that renewed files are read, and the server's name.

        Raises:
            ArgumentError: an option is not known, or a file cannot be used.
        """
        if not self.ssl and not isinstance(self.ssl, Mapping):
            return None, None
        from greenkombu._amqp.tls import make_context

        host = self.address if isinstance(self.address, str) else self.address[0]
        return make_context(self.ssl, host)


def _unix_socket(url: str) -> tuple[str, dict[str, Any], str | None, str | None]:
    """Split ``socket://user:password@/path?option=value``, what is behind ``redis+``."""
    parts = url_to_parts(url)
    refused = sorted(_NOT_IN_URL & parts.query.keys())
    if refused:
        raise ArgumentError(f"{refused[0]} cannot be an option of a redis+socket:// URL")
    path = "/" + (parts.path or "")
    if parts.hostname or path == "/":
        raise ArgumentError(
            "a redis+socket:// URL has a path and no host: redis+socket:///path/to/redis.sock"
        )
    return path, dict(parts.query), parts.username, parts.password


def _database(virtual_host: Any) -> int:
    if isinstance(virtual_host, str):
        virtual_host = virtual_host.strip("/")
    if virtual_host in (None, ""):
        return 0
    return read_whole(virtual_host, "the virtual host of Redis, the number of the database,", 0)


def _client_name(name: Any) -> str | None:
    if not name:
        return None
    if not isinstance(name, str) or not all("!" <= letter <= "~" for letter in name):
        raise ArgumentError(
            f"the transport option client_name={name!r}: Redis takes letters, digits and"
            " punctuation, without spaces"
        )
    return name


def _provider(given: Any) -> Any:
    if isinstance(given, str):
        from greenkombu.utils.imports import symbol_by_name

        try:
            given = symbol_by_name(given)
        except (ImportError, AttributeError, ValueError) as exc:
            raise ArgumentError(
                f"the transport option credential_provider={given!r} cannot be imported ({exc}):"
                " give an object, a class, or its path as package.module:Class"
            ) from exc
    if isinstance(given, type):
        given = given()
    if given is not None and not callable(getattr(given, "get_credentials", None)):
        raise ArgumentError(
            f"the credential_provider, a {type(given).__name__}, has no get_credentials()"
        )
    return given


def _ssl_options(given: Any) -> Any:
    """Translate redis-py's names, which begin with ``ssl_``, into those of the ssl module."""
    if not isinstance(given, Mapping):
        return given or False
    renamed = {"ca_path": "capath", "ca_data": "cadata"}
    options = {}
    for name, value in given.items():
        short = name.removeprefix("ssl_")
        # As a URL or redis-py have it: none, optional, required.
        if short == "cert_reqs" and isinstance(value, str) and not value.startswith("CERT_"):
            value = f"CERT_{value.upper()}"
        if short == "check_hostname":
            value = truth(value)
        options[renamed.get(short, short)] = value
    return options


def _chosen_socket_options(options: Mapping[str, Any]) -> SocketOptions:
    keepalive = options.get("socket_keepalive")
    further = options.get("socket_keepalive_options")
    if further is not None and not isinstance(further, Mapping):
        raise ArgumentError(
            "the transport option socket_keepalive_options is a dict of number (socket.TCP_...)"
            f" and value, not {type(further).__name__}"
        )
    user_timeout = options.get("user_timeout", USER_TIMEOUT)
    try:
        return _socket_options(
            None if keepalive is None else truth(keepalive),
            None if user_timeout is None else _number(user_timeout, "user_timeout"),
            tuple(further.items()) if further else (),
        )
    except KombuError:
        raise
    except ValueError as exc:
        raise ArgumentError(
            f"the transport option socket_keepalive_options={further!r:.100} cannot be used"
            f" ({exc}): give numbers or names of socket.TCP_..., and values"
        ) from exc


def read_seconds(options: Mapping[str, Any], name: str, default: float) -> float:
    """Return a transport option that is a time.

    Raises:
        ArgumentError: it is no number above 0.
    """
    value = options.get(name)
    return default if value is None else _number(value, name)


def _number(value: Any, name: str, zero: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not (0 <= number < 1e9) or (number == 0 and not zero):
        raise ArgumentError(
            f"the transport option {name}={value!r}: give seconds, a number"
            f" {'from' if zero else 'above'} 0 and below a billion"
        )
    return number


def read_whole(value: Any, name: str, least: int, most: int | None = None) -> int:
    """Read a whole number, also as text.

    Args:
        value: what was given.
        name: of it, for the error.
        least, most: its bounds.

    Raises:
        ArgumentError: it is none, or beyond the bounds.
    """
    number: int | None
    try:
        number = None if isinstance(value, (bool, float)) else int(value)
    except (TypeError, ValueError):
        number = None
    if number is None or number < least or (most is not None and number > most):
        upper = "" if most is None else f" to {most}"
        raise ArgumentError(
            f"{name} is a whole number from {least}{upper}, not {str(value)[:40]!r}"
        )
    return number
