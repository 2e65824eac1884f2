"""Pools of connections, and of channels of one connection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from greenkombu import exceptions
from greenkombu.connection import Connection
from greenkombu.resource import Resource

__all__ = ("ChannelPool", "ConnectionPool")


class ConnectionPool(Resource[Connection]):
    """A pool of connections with equal parameters.

    Acquiring one does not open it; the first use does. One that has died in the meantime is opened
    again in the same way.

    Args:
        connection: the model; it is cloned and not used itself.
        limit: how many may exist at a time; None or 0 switches pooling off.
        preload: how many to open at once.
    """

    LimitExceeded = exceptions.ConnectionLimitExceeded

    close_after_fork = True

    def __init__(
        self,
        connection: Connection,
        limit: int | None = None,
        preload: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.connection = connection
        super().__init__(limit, preload, **kwargs)
        self._prepares = type(self).prepare is not ConnectionPool.prepare

    def new(self) -> Connection:
        """Make a connection with the parameters of the model."""
        return self.connection.clone()

    def establish_resource(self, resource: Connection) -> None:
        """Connect."""
        resource.connect()

    def prepare(self, resource: Connection) -> Connection:
        """Drop what is left of a connection that has died; its parameters stay good."""
        if resource._connection is not None:
            if resource.connected:
                return resource
            resource.collect()
        resource._closed = None
        return resource

    def close_resource(self, resource: Connection) -> None:
        """Close politely, within a bound."""
        resource._close()

    def collect_resource(self, resource: Connection, socket_timeout: float = 0.1) -> None:
        """Close at once, so that whoever waits on the connection is told."""
        resource.collect(socket_timeout)

    @contextmanager
    def acquire_channel(self, block: bool = False) -> Iterator[tuple[Connection, Any]]:
        """Acquire a connection for its default channel.

        Args:
            block: as for `acquire`.

        Yields:
            (connection, channel); the connection is released at the end, and the channel stays.
        """
        with self.acquire(block=block) as connection:
            yield connection, connection.default_channel

    def _name(self) -> str:
        return f"{type(self).__name__} of {self.connection!r}"


class ChannelPool(Resource[Any]):
    """A pool of channels of one connection.

    Args:
        connection: the connection; it is opened by the first channel.
        limit: how many may exist at a time; None or 0 switches pooling off.
        preload: how many to open at once.
    """

    LimitExceeded = exceptions.ChannelLimitExceeded

    def __init__(
        self,
        connection: Connection,
        limit: int | None = None,
        preload: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.connection = connection
        super().__init__(limit, preload, **kwargs)

    def new(self) -> Any:
        """Open a channel."""
        return self.connection.channel()

    def check_resource(self, resource: Any) -> bool:
        """Tell whether the channel, and the connection below it, still live."""
        return self.connection.connected and not getattr(resource, "closed", False)

    def close_resource(self, resource: Any) -> None:
        """Close the channel; errors of a dead connection are ignored."""
        self.connection.maybe_close_channel(resource)

    def _name(self) -> str:
        return f"{type(self).__name__} of {self.connection!r}"
