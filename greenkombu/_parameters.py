"""From what a program writes about its broker to the parameters of a connection.

The rules: a URL wins over keyword arguments, which are defaults; a part that a URL leaves out is
None; options of the query part that are no parameter of a connection are transport options. A URL
may come from a stranger, so its scheme names a registered transport and nothing in it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from greenkombu.exceptions import ArgumentError, InvalidURL
from greenkombu.transport import TRANSPORT_ALIASES, check_scheme, parses_urls

__all__ = ("is_url", "parse_broker", "split_brokers", "truth")

#: Parameters that the query part of a URL may set, and how their text is read.
_QUERY_PARAMETERS: dict[str, Any] = {
    "connect_timeout": float,
    "failover_strategy": str,
    "heartbeat": float,
    "insist": lambda text: truth(text),
    "login_method": str,
    "ssl": lambda value: value if isinstance(value, Mapping) else truth(value),
}

# What a URL says in its own place, or must not say: a credential provider is a class path.
_NOT_IN_QUERY = frozenset(
    {
        "alternates",
        "credential_provider",
        "hostname",
        "password",
        "port",
        "transport",
        "transport_options",
        "uri_prefix",
        "userid",
        "virtual_host",
    }
)

_CORE = ("transport", "hostname", "port", "userid", "password", "virtual_host")

_HOST_AND_PORT = re.compile(r"([^:/@\s\[\]]+|\[[0-9A-Fa-f:.%]+\]):([0-9]{1,5})")
_NUMBER = re.compile(r"[+-]?([0-9]+|[0-9]*\.[0-9]+([eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)")
_NOT_A_HOST = re.compile(r"[/@?#\s]")


def is_url(text: str) -> bool:
    """Tell whether a broker is given as a URL rather than as a host name."""
    return "://" in text


def truth(value: Any) -> bool:
    """Read a yes-or-no option of a URL.

    Raises:
        InvalidURL: the text is neither.
    """
    if not isinstance(value, str):
        return bool(value)
    text = value.strip().lower()
    if text in ("1", "true", "yes", "on", "t", "y"):
        return True
    if text in ("0", "false", "no", "off", "f", "n", ""):
        return False
    raise InvalidURL(f"{value!r} is neither true nor false")


def split_brokers(hostname: str | Iterable[str] | None) -> list[str]:
    """Split what names one or several brokers, ``a;b`` or a list of these, into its parts."""
    if hostname is None:
        return []
    if isinstance(hostname, str):
        if ";" not in hostname:
            # From a file or a variable, with the end of its line; no part of a broker.
            return [hostname.strip()]
        return [part.strip() for part in hostname.split(";") if part.strip()]
    several = isinstance(hostname, Iterable) and not isinstance(hostname, (bytes, bytearray))
    brokers: list[Any] = list(hostname) if several else [hostname]
    for broker in brokers:
        if not isinstance(broker, str):
            # Without its value: it may hold a password.
            raise ArgumentError(
                f"a broker is a host name or a URL, a str, not {type(broker).__name__}"
            )
    # Of a text that was taken for one URL the second password would be part of the virtual host.
    return [part for broker in brokers for part in split_brokers(broker)]


def parse_broker(broker: str, transport: Any = None) -> dict[str, Any]:
    """Read one broker: a URL, ``host``, or ``host:port``.

    Args:
        broker: the text.
        transport: the transport that the program has named; None if it has named none.

    Returns:
        Only what the text says: some of hostname, port, userid, password, virtual_host, transport,
        uri_prefix, the parameters of the query, and `transport_options` (a new dictionary).

    Raises:
        InvalidURL: the text makes no sense. The message does not hold the password.
        TransportNotFound: no transport has the scheme's name.
    """
    if not is_url(broker):
        return _parse_host(broker, transport)
    scheme, _, rest = broker.partition("://")
    if scheme not in TRANSPORT_ALIASES:  # RFC 3986, 3.1; some names of transports are not
        scheme = scheme.lower()
    plus = inner = ""
    if scheme not in TRANSPORT_ALIASES:  # as redis+cluster is
        scheme, plus, inner = scheme.partition("+")
    if not scheme:
        raise InvalidURL(f"{_hide(broker)!r} names no transport before its ://")
    if transport is None or transport == scheme:
        check_scheme(scheme)
    if plus and inner:
        # ``sqla+mysql://...``: what follows the plus sign is a URL for the transport's driver.
        return {"transport": scheme, "hostname": f"{inner}://{rest}", "uri_prefix": scheme}
    if parses_urls(transport or scheme):
        return {"transport": scheme, "hostname": broker}
    parsed = dict(_parse_url(broker))
    if "transport_options" in parsed:
        parsed["transport_options"] = dict(parsed["transport_options"])
    return parsed


def _parse_host(text: str, transport: Any) -> dict[str, Any]:
    match = _HOST_AND_PORT.fullmatch(text)
    if match is not None:
        return {"hostname": match.group(1).strip("[]"), "port": _port(match.group(2), text)}
    # With a transport named it may be a path; without one, it is an AMQP broker's host name.
    if transport is None:
        name, colon, rest = text.partition(":")
        known = name.lower() in TRANSPORT_ALIASES
        # With more than one it is an IPv6 address; "host:" is a host.
        no_port = colon and ":" not in rest and (rest or known)
        if _NOT_A_HOST.search(text) or no_port:
            meant = rest.lstrip("/") if known else None
            raise InvalidURL(
                f"{_hide(text)!r} is neither a host name, nor host:port, nor a URL; "
                + (
                    f"did you mean {_hide(f'{name}://{meant}')}?"
                    if meant is not None
                    else "write transport://user:password@host:port/virtual_host"
                )
            )
    return {"hostname": text}


# Programs with thousands of connections have few URLs, and reading one is a sixth of what making a
# Connection costs.  Nobody changes what is kept.
@lru_cache(64)
def _parse_url(url: str) -> Mapping[str, Any]:
    from greenkombu.utils.url import parse_url

    try:
        parts = dict(parse_url(url))
    except InvalidURL:
        raise
    except ValueError as exc:
        raise InvalidURL(f"{_hide(url)!r} is not a broker URL: {exc}") from exc
    parsed: dict[str, Any] = {
        name: value for name in _CORE if (value := parts.pop(name, None)) not in (None, "")
    }
    options: dict[str, Any] = {}
    for name, value in parts.items():
        if name in _NOT_IN_QUERY:
            raise InvalidURL(f"{_hide(url)!r}: {name} cannot be an option of a URL")
        read = _QUERY_PARAMETERS.get(name)
        if read is None:
            options[name] = _literal(value)
            continue
        try:
            parsed[name] = read(value)
        except ValueError as exc:
            raise InvalidURL(f"{_hide(url)!r}: option {name}: {exc}") from exc
    if options:
        parsed["transport_options"] = options
    return parsed


def _port(text: str, broker: str) -> int:
    port = int(text)
    if port > 65535:
        raise InvalidURL(f"{_hide(broker)!r}: port {port} is above 65535")
    return port


def _literal(value: Any) -> Any:
    """Read a transport option: a whole number, a number, true or false, else the text itself."""
    if not isinstance(value, str):
        return value
    if _NUMBER.fullmatch(value):
        return int(value) if value.lstrip("+-").isdigit() else float(value)
    return {"true": True, "false": False}.get(value.lower(), value)


def _hide(text: str) -> str:
    """Return a broker's text without what may be a password."""
    head, at, tail = text.rpartition("@")
    if not at:
        return text.partition("?")[0]
    scheme, sep, _ = head.partition("://")
    tail = tail.partition("?")[0]
    return f"{scheme}://**@{tail}" if sep else f"**@{tail}"
