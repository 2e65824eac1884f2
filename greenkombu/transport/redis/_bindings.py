"""Which queues an exchange has, as the server knows it.

The bindings of an exchange are a set on the server.  It is read once and kept: the server tells
when it changes (CLIENT TRACKING).  It tells so before it answers any command that it got after
the change; so a publisher looks at the table when its message was accepted, and if that has
changed meanwhile, it sends the message to the queues that are new.  That is as exact as to ask
each time, and costs nothing.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from greenkombu.transport.virtual.tables import BindingTable, DirectTable, TopicTable

if TYPE_CHECKING:
    from greenkombu.transport.redis.connection import Connection

__all__ = ["Bindings"]


class Bindings:
    """The tables of exchanges that a connection has read.

    Args:
        connection: to read them by.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = weakref.proxy(connection)
        self._tables: dict[bytes, BindingTable] = {}
        # An entry for each set that was asked for, until it changes: who finds another one when it
        # has read has read what is no longer true. Tasks that read at a time share it, and the
        # first one's table, or none of them would find its own table in force.
        self._unchanged: dict[bytes, object] = {}

    def forget(self, key: bytes) -> None:
        """The set of an exchange has changed."""
        self._unchanged.pop(key, None)
        self._tables.pop(key, None)

    def forget_all(self) -> None:
        """Everything may have changed."""
        self._unchanged.clear()
        self._tables.clear()

    def holds(self, exchange: str, table: BindingTable) -> bool:
        """Tell whether a table is still that of its exchange, as far as the server tells."""
        connection = self._connection
        return not connection.tracks or self._tables.get(connection.keys.binding(exchange)) is table

    def still_holds(self, exchange: str, table: BindingTable) -> bool:
        """Tell the same when nothing was sent: the server may be about to tell; parks the task."""
        if self._connection.tracks:
            self._connection.call("PING")
        return self.holds(exchange, table)

    def table(self, exchange: str, make: Any) -> BindingTable:
        """Return the table of an exchange; parks the task if it has to be read.

        Args:
            exchange: its name.
            make: makes an empty table of its type.
        """
        key = self._connection.keys.binding(exchange)
        found = self._tables.get(key)
        if found is None:
            found = self._read(key, make)
        return found

    def _read(self, key: bytes, make: Any) -> BindingTable:
        connection = self._connection
        if not connection.tracks:
            return self._fill(make(), connection.call("SMEMBERS", key))
        table: BindingTable = make()
        entry = self._unchanged.setdefault(key, object())
        _, members = connection.call_many([("CLIENT", "CACHING", "YES"), ("SMEMBERS", key)])
        self._fill(table, members)
        if self._unchanged.get(key) is entry:
            table = self._tables.setdefault(key, table)
            if self._unchanged.get(key) is not entry:  # it changed between the two
                self._tables.pop(key, None)
        return table

    def _fill(self, table: BindingTable, members: list[bytes]) -> BindingTable:
        parse = self._connection.keys.parse_member
        for member in sorted(members):
            key, pattern, queue = parse(member)
            table.add((key, pattern or None, queue))
        return table

    def route(self, exchange: str, routing_key: str) -> list[str]:
        """Return the queues of a message that goes back to all of its exchange's.

        The type of the exchange may not be known here: a binding with a pattern is a topic's.
        """
        members = self._connection.call("SMEMBERS", self._connection.keys.binding(exchange))
        bindings = [self._connection.keys.parse_member(member) for member in members]
        wild = any(pattern for _, pattern, _ in bindings)
        table: BindingTable = TopicTable() if wild else DirectTable()
        for key, pattern, queue in bindings:
            table.add((key, pattern or None, queue))
        return table.match(routing_key)

    def write(self, bindings: list[tuple[str, str, str | None, str]]) -> None:
        """Add bindings on the server; parks the task.

        Args:
            bindings: (exchange, binding key, pattern, queue).
        """
        keys = self._connection.keys
        commands: list[tuple[Any, ...]] = []
        for exchange, *binding in bindings:
            member = keys.member(binding)
            commands.append(("SADD", keys.binding(exchange), member))
            commands.append(("SADD", keys.permanent_binding(exchange), member))
        if commands:
            self._connection.call_many(commands)

    def remove(self, exchange: str, binding: tuple[str, str | None, str]) -> None:
        """Remove a binding on the server; parks the task."""
        keys = self._connection.keys
        member = keys.member(binding)
        self._connection.call_many(
            [
                ("SREM", keys.binding(exchange), member),
                ("SREM", keys.permanent_binding(exchange), member),
            ]
        )

    def delete(self, exchange: str) -> None:
        """Remove all bindings of an exchange on the server; parks the task."""
        keys = self._connection.keys
        self._connection.call("DEL", keys.binding(exchange), keys.permanent_binding(exchange))
