"""The transports that the contract suite (`test_transports`) runs over: one entry each.

To add a transport, add a `TransportCase` to `CASES`.  What the transport cannot do stands in its
`Transport.implements`, and the suite then asserts that it refuses; nothing is left out here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import pytest

from greenkombu import Connection
from greenkombu.transport.base import Implements
from hub.environment import get_environment
from tests.greenkombu.virtual.store import SharedTransport

__all__ = ["CASES", "Broker", "Server", "TransportCase", "find_url"]


class Server(Protocol):
    """A server of a test's own, that the test may break."""

    @property
    def url(self) -> str: ...

    def restart(self, *, pause: float = 0.0) -> None:
        """Stop it and start it again; what it persists survives."""


@dataclass(frozen=True)
class TransportCase:
    """One transport under test.

    Args:
        name: of the case.
        url: of the broker; None takes `url_fixture`.
        url_fixture: a fixture for the whole run that gives the URL, or a server that has a `url`.
            Tests leave the broker as they found it.
        scheme: instead of the fixture's.
        query: of the URL, or of each of several: options that every process has to know.
        transport: instead of the URL's scheme: a class or its path.
        options: transport_options.
        server_fixture: a fixture that is called without arguments for a started `Server`; None
            where there is no server to restart.
        wrong_credentials: makes a URL with a wrong password of a good URL; None where there are
            none to check.
        marks: for pytest.
        server_marks: the same, for the test that restarts the server.
    """

    name: str
    url: str | None = None
    url_fixture: str | None = None
    scheme: str | None = None
    query: str = ""
    transport: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    server_fixture: str | None = None
    wrong_credentials: Callable[[str], str] | None = None
    marks: tuple[pytest.MarkDecorator, ...] = ()
    server_marks: tuple[pytest.MarkDecorator, ...] = ()

    def address(self, url: str) -> str:
        """Return the URL of a server for this transport."""
        if self.query:
            return ";".join(f"{each}?{self.query}" for each in url.split(";"))
        if self.scheme is None:
            return url
        return urlunsplit(urlsplit(url)._replace(scheme=self.scheme))


def _wrong_passwords(urls: str) -> str:
    return ";".join(map(_wrong_password, urls.split(";")))


def _wrong_password(url: str) -> str:
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=f"{parts.username or 'guest'}:wrong@{host}"))


def find_url(case: TransportCase, request: pytest.FixtureRequest) -> str | None:
    """Return the URL of the broker of a case, which may have to be started."""
    if case.url_fixture is None:
        return case.url
    found = request.getfixturevalue(case.url_fixture)
    return case.address(getattr(found, "url", found))


# What differs from one server is above the environments: elsewhere with the slow tests.
SEVERAL_SERVERS = () if get_environment().name == "gevent" else (pytest.mark.slow,)

CASES = (
    TransportCase("memory", url="memory://", marks=(pytest.mark.green_matrix,)),
    TransportCase(
        "pulled-store",
        transport=SharedTransport,
        options={"polling_interval": 0.02},
    ),
    TransportCase(
        "rabbitmq",
        url_fixture="rabbitmq",
        server_fixture="make_private_rabbitmq",
        wrong_credentials=_wrong_password,
    ),
    TransportCase(
        "pika",
        url_fixture="rabbitmq",
        scheme="pika",
        server_fixture="make_private_rabbitmq",
        wrong_credentials=_wrong_password,
        # The seconds of another RabbitMQ; test_pika loses and renews connections to the shared one.
        server_marks=(pytest.mark.slow,),
    ),
    TransportCase(
        "redis",
        url_fixture="redis",
        options={"priority_order": "amqp", "visibility_timeout": 2},
        server_fixture="make_private_redis",
        wrong_credentials=_wrong_password,
    ),
    # What a loss of servers means to these two: scenarios/test_redis_sentinel and _cluster.
    TransportCase(
        "redis-sentinel",
        url_fixture="shared_redis_sentinel",
        query="master_name=main",
        options={"priority_order": "amqp", "visibility_timeout": 2},
        wrong_credentials=_wrong_passwords,
        marks=SEVERAL_SERVERS,
    ),
    TransportCase(
        "redis-cluster",
        url_fixture="shared_redis_cluster",
        # In a cluster, consumers of one queue tell each other; nobody else waits for the shortest.
        query="visibility_timeout=2",
        options={"priority_order": "amqp"},
        wrong_credentials=_wrong_passwords,
        marks=SEVERAL_SERVERS,
    ),
)


class Broker:
    """What a test has of the transport under test.

    Args:
        case: the transport.
        url: of the broker.
    """

    def __init__(self, case: TransportCase, url: str | None) -> None:
        self.case = case
        self.url = url
        self._opened: list[Connection] = []

    @property
    def transport_path(self) -> str:
        """The transport as another process can name it; empty if the URL does."""
        cls = self.case.transport
        return "" if cls is None else f"{cls.__module__}:{cls.__qualname__}"

    def connection(self, url: str | None = None, **options: Any) -> Connection:
        """Make a connection that is closed after the test."""
        made = Connection(
            url or self.url,
            transport=self.case.transport,
            transport_options={**self.case.options, **options},
        )
        self._opened.append(made)
        return made

    @property
    def implements(self) -> Implements:
        """What the transport says of itself."""
        found: Implements = Connection(self.url, transport=self.case.transport).transport.implements
        return found

    @staticmethod
    def name(prefix: str = "contract") -> str:
        """Return a name that nothing else on the broker has."""
        return f"{prefix}-{uuid.uuid4().hex[:12]}"

    def close(self) -> None:
        """Close the connections."""
        for connection in self._opened:
            connection.close()
