"""Broker URLs: ``transport://userid:password@hostname:port/virtual_host?option=value``.

Percent escapes are undone in every part.  Only the first slash of the path is the separator, so
``//`` is the virtual host ``/`` and ``/`` alone is no virtual host at all.

A URL may hold a password.  No error of this module shows any part of a URL but its scheme, and
`maybe_sanitize_url` masks the password even in a URL that cannot be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlparse

from greenkombu.exceptions import InvalidURL

if TYPE_CHECKING:
    import ssl

__all__ = [
    "as_url",
    "maybe_sanitize_url",
    "parse_ssl_cert_reqs",
    "parse_url",
    "sanitize_url",
    "url_to_parts",
    "urlparse",
    "urlparts",
]

#: Stands for a password wherever one is hidden.
MASK = "**"

#: What a path may hold as it is: RFC 3986, section 3.3, without ";", which separates brokers, and
#: "@", so that nothing after the authority looks like the end of a password.
_PATH_SAFE = "/!$&'()*+,=:-._~"

_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}

#: Brokers are given as ``a://…;b://…``.
_NEXT_BROKER = re.compile(r";(?=[A-Za-z][A-Za-z0-9+.-]*://)")

_CERT_REQS = {
    "CERT_NONE": "CERT_NONE",
    "none": "CERT_NONE",
    "CERT_OPTIONAL": "CERT_OPTIONAL",
    "optional": "CERT_OPTIONAL",
    "CERT_REQUIRED": "CERT_REQUIRED",
    "required": "CERT_REQUIRED",
}


class urlparts(NamedTuple):
    """A broker URL in parts; None for what is not there."""

    scheme: str
    hostname: str | None
    port: int | None
    username: str | None
    password: str | None
    path: str | None
    query: Mapping[str, str]


def url_to_parts(url: str) -> urlparts:
    """Split a URL.

    Args:
        url: with a scheme.

    Returns:
        The parts with percent escapes undone; empty ones are None.

    Raises:
        InvalidURL: there is no scheme, or the port is not a number from 0 to 65535.
    """
    if not isinstance(url, str):
        raise InvalidURL(f"a broker URL is a str, not {type(url).__name__}")
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise InvalidURL(
            "the broker URL has no scheme; write it as transport://user:password@host:port/vhost"
        )
    try:
        parts = urlparse(url)
        port = parts.port
        hostname = parts.hostname
        if "@" in parts.fragment:
            raise ValueError  # the "#" is one of the user's or the password's
    except ValueError:
        # urlparse's own message shows what it took for the port or the host, which is a piece of
        # the password when that holds a "/", "?" or "#" (also as context of ours: hence from None).
        raise InvalidURL(
            f"cannot understand the {scheme.lower()}:// URL: the port must be a number from 0 to "
            "65535, an IPv6 address stands in brackets, and special characters in user or password "
            "must be escaped with urllib.parse.quote(text, safe='')"
        ) from None
    return urlparts(
        parts.scheme,
        unquote(hostname or "") or None,
        port,
        unquote(parts.username or "") or None,
        unquote(parts.password or "") or None,
        unquote(parts.path[1:]) or None,
        dict(parse_qsl(parts.query)),
    )


#: The name that programs written for Kombu import.
_parse_url = url_to_parts


def parse_url(url: str) -> dict[str, Any]:
    """Return the connection parameters that a URL holds.

    Args:
        url: with a scheme.

    Returns:
        transport, hostname, port, userid, password and virtual_host, None for what is not there,
        and the options of the query as text.  Two kinds of option are understood here:
        ``ssl=1`` (or true, yes, on, and their opposites) becomes a bool, and all
        ``ssl_…`` options become one dict ``ssl``.

    Raises:
        InvalidURL: see `url_to_parts`; or ``ssl_cert_reqs`` has an unknown value.
    """
    scheme, hostname, port, username, password, path, query = url_to_parts(url)
    parameters: dict[str, Any] = {
        "transport": scheme,
        "hostname": hostname,
        "port": port,
        "userid": username,
        "password": password,
        "virtual_host": path,
    }
    tls: dict[str, Any] = {}
    for key, value in query.items():
        if key.startswith("ssl_"):
            tls[key] = value
        elif key == "ssl":
            parameters[key] = _BOOLEANS.get(value.lower(), value)
        elif parameters.get(key) is None:  # what the URL says outright is not overridden
            parameters[key] = value
    if tls and parameters.get("ssl") is not False:
        if "ssl_cert_reqs" in tls:
            try:
                tls["ssl_cert_reqs"] = parse_ssl_cert_reqs(tls["ssl_cert_reqs"])
            except KeyError:
                raise InvalidURL(
                    f"the {scheme}:// URL has ssl_cert_reqs={tls['ssl_cert_reqs']!r}; "
                    "use required, optional or none"
                ) from None
        parameters["ssl"] = tls
    return parameters


def parse_ssl_cert_reqs(query_value: str) -> ssl.VerifyMode:
    """Return the ssl.VerifyMode that required, optional, none or CERT_… stands for.

    Raises:
        KeyError: it is none of them.
    """
    import ssl  # late: it imports socket, which a program may still patch

    return ssl.VerifyMode[_CERT_REQS[query_value]]


def as_url(
    scheme: str,
    host: str | None = None,
    port: int | None = None,
    user: str | None = None,
    password: str | None = None,
    path: str | None = None,
    query: Mapping[str, str] | None = None,
    sanitize: bool = False,
    mask: str | None = MASK,
) -> str:
    """Build a URL; the inverse of `url_to_parts`.

    Args:
        scheme: the transport.
        host: host name or address.
        port: TCP port.
        user: user name.
        password: password.
        path: virtual host, without the slash that separates it.
        query: options; left out when sanitize is set, since they may be secrets as well.
        sanitize: show mask instead of the password.
        mask: what to show.

    Returns:
        The URL, each part escaped.
    """
    parts = [f"{scheme}://"]
    if user or password:
        if user:
            parts.append(quote(user, safe=""))
        if password:
            parts.append(":")
            parts.append((mask or "") if sanitize else quote(password, safe=""))
        parts.append("@")
    if host:
        # A comma separates hosts of one URL (replica sets); a colon must be an IPv6 address.
        parts.append(f"[{host}]" if ":" in host and "[" not in host else quote(host, safe=",[]:"))
    if port:
        parts.append(f":{port}")
    parts.append("/")
    if path:
        parts.append(quote(path, safe=_PATH_SAFE))
    if query and not sanitize:
        parts.append(f"?{urlencode(query)}")
    return "".join(parts)


def sanitize_url(url: str, mask: str | None = MASK) -> str:
    """Return url with mask instead of the password, and without its query.

    Raises:
        InvalidURL: see `url_to_parts`.
    """
    return as_url(*url_to_parts(url), sanitize=True, mask=mask)


def maybe_sanitize_url(url: Any, mask: str | None = MASK) -> Any:
    """Return url with its passwords masked; never raises.

    Args:
        url: one URL or several, separated by ``;``; what holds no URL is returned as it is.
        mask: what to show instead of a password.
    """
    if not (isinstance(url, str) and "://" in url):
        return url
    return ";".join(_sanitize_one(each, mask) for each in _NEXT_BROKER.split(url))


def _sanitize_one(url: str, mask: str | None) -> str:
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    # An unescaped "/", "?", "#" or "@" in a password makes the parser see the authority's end too
    # early, and show the remainder.  Then everything up to the last "@" is hidden.
    if rest.count("@") == authority.count("@") <= 1:
        try:
            return sanitize_url(url, mask)
        except InvalidURL:
            pass
    return f"{scheme}://{mask or ''}@{rest.rpartition('@')[2]}" if "@" in rest else url
