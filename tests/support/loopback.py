"""A transport without a broker, for tests of what stands above transports.

It counts and records what is asked of it, and fails when told to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from greenkombu.transport.base import StdChannel, Transport, TransportConnection
from hub import get_environment

__all__ = ["LoopbackChannel", "LoopbackConnection", "LoopbackTransport", "make_transport"]


class LoopbackChannel(StdChannel):
    def __init__(self, connection: LoopbackConnection) -> None:
        self.connection: LoopbackConnection | None = connection
        self.channel_id = next(connection.channel_ids)
        self.closed = False
        connection.channels.append(self)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            assert self.connection is not None
            self.connection.channels.remove(self)
            self.connection.transport.log.append("close_channel")
            self.connection = None


class LoopbackConnection(TransportConnection):
    def __init__(self, transport: LoopbackTransport) -> None:
        super().__init__(transport.client)
        self.transport = transport
        self.channel_ids = itertools.count(1)

    def abort(self, error: BaseException | None = None) -> None:
        for channel in self.channels:
            channel.closed = True
        del self.channels[:]
        super().abort(error)


class LoopbackTransport(Transport):
    """Each test makes its own subclass with `make_transport`, so nothing is shared."""

    default_port = 4242
    driver_type = "loopback"
    connection_errors: tuple[type[BaseException], ...] = (OSError, *Transport.connection_errors)
    channel_errors: tuple[type[BaseException], ...] = (ValueError, *Transport.channel_errors)

    log: list[Any]
    connections: list[LoopbackConnection]
    # How many attempts to connect are to fail from now on.
    failures = 0
    # Seconds that an attempt takes.
    delay = 0.0
    on_connect: Callable[[], object] | None = None

    def establish_connection(self) -> LoopbackConnection:
        cls = type(self)
        cls.log.append("establish")
        if cls.on_connect is not None:
            cls.on_connect()
        if cls.delay:
            get_environment().sleep(cls.delay)
        if cls.failures > 0:
            cls.failures -= 1
            raise OSError(f"no answer from {self.client.hostname}")
        connection = LoopbackConnection(self)
        cls.connections.append(connection)
        return connection

    def close_connection(self, connection: Any) -> None:
        self.log.append("close_connection")
        connection.close()

    def create_channel(self, connection: Any) -> LoopbackChannel:
        self.log.append("create_channel")
        return LoopbackChannel(connection)

    @property
    def default_connection_params(self) -> dict[str, Any]:
        return {"userid": "me", "hostname": "localhost", "port": self.default_port}


def make_transport(**attributes: Any) -> type[LoopbackTransport]:
    """Return a transport class with counters of its own."""
    return type("Loopback", (LoopbackTransport,), {"log": [], "connections": [], **attributes})
