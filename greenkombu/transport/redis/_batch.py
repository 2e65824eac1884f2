"""Messages that go to the server together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.channel import Channel
    from greenkombu.transport.virtual.tables import BindingTable

__all__ = ["Batch"]

#: Commands, and bytes of them, after which a batch is sent, and its answers are awaited: so much
#: waits in memory on both sides.
MOST_COMMANDS = 1000
MOST_BYTES = 4 * 1024 * 1024


class Batch:
    """Messages that a channel publishes together, in order.

    Args:
        channel: a Redis channel.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._commands: list[tuple[Any, ...]] = []
        self._routes: list[QueueKeys | None] = []
        self._bytes = 0
        # What went by a table that may have changed until the server has the message.
        self._by_table: list[tuple[Any, str, str, BindingTable, set[str]]] = []

    def add(self, stored: Any, exchange: str, routing_key: str, mandatory: bool) -> None:
        """Add a message; sends what is there if that is much.

        Args:
            stored: as the store keeps it.
            exchange, routing_key: where it goes.
            mandatory: it comes back if no queue takes it.
        """
        channel = self._channel
        kind = None if not exchange else channel.typeof(exchange)
        if kind is None:
            self._push([routing_key], stored)
        elif kind.type == "fanout":
            for command in channel._broadcasts(exchange, stored, routing_key):
                self._enter(command, None)
        elif channel._routes_by_table(kind):
            table = channel.redis.bindings.table(exchange, kind.make_table)
            queues = table.match(routing_key, stored["headers"])
            if queues:
                self._push(queues, stored)
                self._by_table.append((stored, exchange, routing_key, table, set(queues)))
            elif not channel._send_by_table(stored, exchange, routing_key, set()) and mandatory:
                channel._return(stored, exchange, routing_key)
        else:
            # A type of the program's own, which delivers itself.
            self.send()
            channel._send(stored, exchange, routing_key)
        if len(self._commands) >= MOST_COMMANDS or self._bytes >= MOST_BYTES:
            self.send()

    def _push(self, queues: list[str], stored: Any) -> None:
        for command, route in zip(*self._channel._pushes(queues, stored), strict=True):
            self._enter(command, route)

    def _enter(self, command: tuple[Any, ...], route: QueueKeys | None) -> None:
        self._commands.append(command)
        self._routes.append(route)
        self._bytes += len(command[-1])

    def send(self) -> None:
        """Send what is there, and wait until the server has answered; parks the task."""
        channel = self._channel
        commands, self._commands = self._commands, []
        routes, self._routes = self._routes, []
        by_table, self._by_table = self._by_table, []
        self._bytes = 0
        if commands:
            channel.redis.call_each(commands, routes)
        for stored, exchange, routing_key, table, done in by_table:
            if not channel.redis.bindings.holds(exchange, table):
                channel._send_by_table(stored, exchange, routing_key, done)
