"""The AMQP transport under the name that Kombu 2 had for it."""

from __future__ import annotations

from typing import Any, NoReturn

from greenkombu._amqp.methods import method_name
from greenkombu.exceptions import UnsupportedOperation
from greenkombu.transport import pyamqp
from greenkombu.transport.pyamqp import Channel, Message

__all__ = ["Channel", "Connection", "Message", "Transport"]


class Connection(pyamqp.Connection):
    """A connection with amqplib's names."""

    __slots__ = ()

    def read_timeout(self, timeout: float | None = None) -> None:
        """Wait for one event of any channel; same as `drain_events`."""
        self.drain_events(timeout)

    def wait(self, allowed_methods: Any = None) -> None:
        """Wait for one event of any channel."""
        del allowed_methods
        self.drain_events()

    def dispatch_method(self, method_sig: tuple[int, int], args: Any, content: Any) -> NoReturn:
        """Refuse: what arrives is dispatched by the hub."""
        del args, content
        raise UnsupportedOperation(
            f"the amqp transport dispatches {method_name(method_sig)} by itself"
        )


class Transport(pyamqp.Transport):
    """The AMQP transport with the names of Kombu 2."""

    Connection = Connection

    #: A drain loop goes on while events wait.
    nb_keep_draining = True

    def is_alive(self, connection: Any) -> bool:
        """Same as `verify_connection`."""
        return self.verify_connection(connection)

    def eventmap(self, connection: Any) -> dict[int, Any]:
        """Return which function to call when which descriptor is readable: the hub sees to it."""
        del connection
        return {}

    def on_poll_init(self, poller: Any) -> None:
        """Do nothing: the hub polls."""

    def on_poll_start(self) -> dict[int, Any]:
        """Return the descriptors to poll: the hub polls."""
        return {}

    def get_manager(
        self,
        hostname: str | None = None,
        port: int | None = None,
        userid: str | None = None,
        password: str | None = None,
    ) -> Any:
        """Make an object for broker-wide queries.

        Args:
            hostname, port, userid, password: kept for their place; they chose the HTTP server of
                RabbitMQ's management plugin, which nothing here asks.
        """
        del hostname, port, userid, password
        return super().get_manager()
