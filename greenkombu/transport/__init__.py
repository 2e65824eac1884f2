"""The registry of transports: from a name to a class.

A transport is found by its alias (`TRANSPORT_ALIASES`, which a program may add to), by an entry
point of the group ``greenkombu.transports``, by a class path (``"package.module:Class"``), or it
is the class itself.

Names come from two places.  The ``transport=`` argument is the program's own, so it may be a class
path.  The scheme of a URL may come from a stranger (a configuration service, a message), so it is
looked up among the aliases and entry points only and never reaches an import: see `check_scheme`.

No transport, and no driver, is imported before it is asked for.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

from greenkombu.exceptions import InvalidURL, TransportNotFound

__all__ = (
    "C_LIBRARY_ALIASES",
    "DEFAULT_TRANSPORT",
    "ENTRY_POINT_GROUP",
    "TRANSPORT_ALIASES",
    "URL_PARSING_ALIASES",
    "InvalidScheme",
    "check_scheme",
    "get_transport_cls",
    "parses_urls",
    "resolve_transport",
)

#: The transport of a connection that names none.
DEFAULT_TRANSPORT = "amqp"

#: Where other distributions announce their transports.
ENTRY_POINT_GROUP = "greenkombu.transports"

_AMQP = "greenkombu.transport.pyamqp:Transport"

#: Alias -> class path. For the names of the C library see `C_LIBRARY_ALIASES`.
TRANSPORT_ALIASES: dict[str, str] = {
    "amqp": _AMQP,
    "amqps": "greenkombu.transport.pyamqp:SSLTransport",
    "pyamqp": _AMQP,
    "amqplib": _AMQP,
    "librabbitmq": _AMQP,
    "pylibrabbitmq": _AMQP,
    "pika": "greenkombu.transport.pika:Transport",
    "oldpika": "greenkombu.transport.pika:Transport",
    "memory": "greenkombu.transport.memory:Transport",
    "redis": "greenkombu.transport.redis:Transport",
    "rediss": "greenkombu.transport.redis:SSLTransport",
    # The package from which Kombu's virtual transports came.
    "ghettoq.taproot.Redis": "greenkombu.transport.redis:Transport",
    "redis+cluster": "greenkombu.transport.redis.cluster:ClusterTransport",
    "rediss+cluster": "greenkombu.transport.redis.cluster:ClusterSSLTransport",
    "rediscluster": "greenkombu.transport.redis.cluster:ClusterTransport",
    "sentinel": "greenkombu.transport.redis.sentinel:SentinelTransport",
}

#: Names of the C library. They mean a transport on it where a distribution announces one under that
#: name. Else they mean our own, with a notice in the log: the API is the same. The package
#: ``librabbitmq`` itself is no transport, blocks every green thread, and does not build on Python
#: 3.11 and later (its setup.py opens files in mode "U").
C_LIBRARY_ALIASES = frozenset({"librabbitmq", "pylibrabbitmq"})

#: The aliases above whose class has `can_parse_url`. They stand here as data so that making a
#: Connection imports neither the transport nor its driver.
URL_PARSING_ALIASES: frozenset[str] = frozenset()

_OWN_PREFIX = "greenkombu.transport."

# Class path -> class. Keyed by path, not by alias, so that a program may point an alias elsewhere.
_classes: dict[str, type[Any]] = {}

# Names of the C library for which we stand in, as the log says.
_standing_in: set[str] = set()


class InvalidScheme(TransportNotFound, InvalidURL):
    """The scheme of a URL is a class path, which only the transport argument may be."""


def resolve_transport(transport: str | Callable[..., Any] | None = None) -> type[Any]:
    """Find a transport class.

    Args:
        transport: an alias, the name of an entry point, a class path ("package.module:Class" or
            "package.module.Class"), a class; None means `DEFAULT_TRANSPORT`.

    Raises:
        TransportNotFound: nothing has that name (the message names the nearest), it is no
            transport, or its module or driver cannot be imported. It is a KeyError and an
            ImportError as well.
    """
    if transport is None:
        transport = DEFAULT_TRANSPORT
    if not isinstance(transport, str):
        if not callable(transport):
            raise TransportNotFound(
                f"a transport is a name, a class path or a class, not {transport!r:.100}"
            )
        return transport  # type: ignore[return-value]  # a class, or a function that makes one
    path = _path(transport)
    if path is None:
        if "." not in transport and ":" not in transport:
            raise TransportNotFound(_unknown(transport))
        path = transport
    return _load(path, transport)


def get_transport_cls(transport: str | Callable[..., Any] | None = None) -> type[Any]:
    """Find a transport class; see `resolve_transport`. Classes are imported once."""
    return resolve_transport(transport)


def check_scheme(scheme: str) -> str:
    """Make sure that the scheme of a URL names a registered transport; import nothing.

    Args:
        scheme: what stands before ``://``, without a ``+`` part.

    Returns:
        The scheme.

    Raises:
        InvalidScheme: it looks like a class path.
        TransportNotFound: no alias and no entry point has that name.
    """
    if scheme in TRANSPORT_ALIASES or _entry_point(scheme) is not None:
        return scheme
    if "." in scheme or ":" in scheme:
        raise InvalidScheme(
            f"Invalid transport scheme: {scheme!r}. A URL names a registered transport; "
            "give a class path with the transport argument"
        )
    raise TransportNotFound(_unknown(scheme))


def parses_urls(transport: str | Callable[..., Any]) -> bool:
    """Tell whether a transport takes the whole URL as its host name (`can_parse_url`)."""
    if isinstance(transport, str) and TRANSPORT_ALIASES.get(transport, "").startswith(_OWN_PREFIX):
        return transport in URL_PARSING_ALIASES
    return bool(getattr(resolve_transport(transport), "can_parse_url", False))


def _path(name: str) -> str | None:
    """Return the class path that is registered under `name`."""
    path = TRANSPORT_ALIASES.get(name)
    if name in C_LIBRARY_ALIASES and path == _AMQP and name not in _standing_in:
        announced = _entry_point(name)
        if announced is not None:
            return announced
        _standing_in.add(name)
        _tell_who_stands_in(name)
    return path or _entry_point(name)


def _tell_who_stands_in(name: str) -> None:
    # Imported late: logging imports threading.
    import logging
    from importlib.util import find_spec

    logger = logging.getLogger(__name__)
    # The packages that have the binding; both have its names.
    binding = next((each for each in sorted(C_LIBRARY_ALIASES) if find_spec(each)), None)
    if binding is None:
        logger.info(
            "transport %s: no transport on the C library is installed; greenkombu's own AMQP"
            " transport is used instead",
            name,
        )
    else:
        logger.warning(
            "transport %s: greenkombu's own AMQP transport is used. The package %s is installed,"
            " but it is no transport, and its calls would block every green thread. A transport on"
            " it goes first where a distribution announces one (entry point %s of %s)",
            name,
            binding,
            name,
            ENTRY_POINT_GROUP,
        )


def _entry_point(name: str) -> str | None:
    """Return the class path that another distribution has registered under `name`."""
    # Imported late: importlib.metadata imports email, and email imports socket.
    from importlib.metadata import entry_points

    for point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return point.value
    return None


def _unknown(name: str) -> str:
    from importlib.metadata import entry_points

    known = sorted(
        {*TRANSPORT_ALIASES, "redis+socket", *entry_points(group=ENTRY_POINT_GROUP).names}
    )
    near = difflib.get_close_matches(name, known, 2)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known)}"
    return f"No such transport: {name}.  {hint}"


def _load(path: str, name: str) -> type[Any]:
    try:
        return _classes[path]
    except KeyError:
        pass
    module_name, _, attribute = path.rpartition(":" if ":" in path else ".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as exc:
        raise TransportNotFound(_missing(name, module_name, exc)) from exc
    try:
        cls: type[Any] = getattr(module, attribute)
    except AttributeError as exc:
        raise TransportNotFound(
            f"No such transport: {name}. The module {module_name} has no {attribute}"
        ) from exc
    if not hasattr(cls, "establish_connection"):
        raise TransportNotFound(
            f"No such transport: {name}. {path} is not a transport class: it has no "
            "establish_connection"
        )
    _classes[path] = cls
    return cls


def _missing(name: str, module_name: str, error: ImportError) -> str:
    """Say which module is missing and how to get it."""
    missing = error.name or module_name
    if module_name.startswith(_OWN_PREFIX) and missing.partition(".")[0] not in (
        "greenkombu",
        "hub",
    ):
        extra = module_name.removeprefix(_OWN_PREFIX).partition(".")[0].lower()
        return (
            f"The transport {name} needs the package {missing.partition('.')[0]}, which cannot be "
            f"imported: {error}. Install greenkombu[{extra}]"
        )
    return f"The transport {name} cannot be imported: {error}"
