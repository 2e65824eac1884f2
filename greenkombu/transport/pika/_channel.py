"""The channel of the pika transport: what the messaging layer calls, as steps of pika."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from amqp.protocol import queue_declare_ok_t

from greenkombu._amqp.refusals import check_kind, note_kind
from greenkombu.transport import base, pyamqp
from greenkombu.transport.pika._consuming import Consuming
from greenkombu.transport.pika._publishing import Publishing
from greenkombu.transport.pika._requests import check_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from greenkombu.transport.pika._connection import Connection

__all__ = ["Channel"]


class Channel(Publishing, Consuming, pyamqp.KombuMethods, base.StdChannel):
    """One channel of a `Connection`; it has the methods of `greenkombu._amqp.channel.Channel`.

    Args:
        connection: an open connection.
        channel_id: kept for that one's signature; pika chooses the number.
        on_open: called with the channel once it is open.
    """

    def __init__(
        self,
        connection: Connection,
        channel_id: int | None = None,
        on_open: Callable[[Any], object] | None = None,
    ) -> None:
        super().__init__(connection, channel_id, on_open)
        connection.table.enter(self)
        if connection.error is not None:
            self.die(connection.error)

    # -- exchanges and queues

    def exchange_declare(
        self,
        exchange: str,
        type: str,
        passive: bool = False,
        durable: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BssbbbbbF",
    ) -> None:
        """Declare an exchange.

        Raises:
            NotEquivalentError: it exists with other settings.
            NotFoundError: `passive`, and it does not exist.
        """
        del argsig
        check_table(arguments, "Exchange.declare: arguments")
        self._ask(
            "Exchange.declare",
            lambda channel, done: channel.exchange_declare(
                exchange, type, passive, durable, auto_delete, False, arguments, done
            ),
            nowait=nowait,
        )

    def exchange_delete(
        self, exchange: str, if_unused: bool = False, nowait: bool = False, argsig: str = "Bsbb"
    ) -> None:
        """Delete an exchange."""
        del argsig
        self._ask(
            "Exchange.delete",
            lambda channel, done: channel.exchange_delete(exchange, if_unused, done),
            nowait=nowait,
        )

    def exchange_bind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BsssbF",
    ) -> None:
        """Bind an exchange to another one (RabbitMQ)."""
        del argsig
        check_table(arguments, "Exchange.bind: arguments")
        self._ask(
            "Exchange.bind",
            lambda channel, done: channel.exchange_bind(
                destination, source, routing_key, arguments, done
            ),
            nowait=nowait,
        )

    def exchange_unbind(
        self,
        destination: str,
        source: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BsssbF",
    ) -> None:
        """Undo `exchange_bind`."""
        del argsig
        self._ask(
            "Exchange.unbind",
            lambda channel, done: channel.exchange_unbind(
                destination, source, routing_key, arguments or {}, done
            ),
            nowait=nowait,
        )

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BsbbbbbF",
    ) -> Any:
        """Declare a queue.

        Returns:
            (queue, message_count, consumer_count); None with `nowait`.

        Raises:
            NotEquivalentError: it exists with other settings.
            NotFoundError: `passive`, and it does not exist.
        """
        del argsig
        check_table(arguments, "Queue.declare: arguments")
        kinds = self.connection.kinds
        reply = self._ask(
            "Queue.declare",
            lambda channel, done: channel.queue_declare(
                queue, passive, durable, exclusive, auto_delete, arguments, done
            ),
            nowait=nowait,
        )
        if not passive:
            note_kind(kinds, queue if reply is None else reply.method.queue, arguments)
        if reply is None:
            return None
        found = reply.method
        return queue_declare_ok_t(found.queue, found.message_count, found.consumer_count)

    def queue_bind(
        self,
        queue: str,
        exchange: str = "",
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BsssbF",
    ) -> None:
        """Bind a queue to an exchange."""
        del argsig
        check_table(arguments, "Queue.bind: arguments")
        self._ask(
            "Queue.bind",
            lambda channel, done: channel.queue_bind(queue, exchange, routing_key, arguments, done),
            nowait=nowait,
        )

    def queue_unbind(
        self,
        queue: str,
        exchange: str,
        routing_key: str = "",
        nowait: bool = False,
        arguments: Mapping[str, Any] | None = None,
        argsig: str = "BsssF",
    ) -> None:
        """Undo `queue_bind`."""
        del argsig
        self._ask(
            "Queue.unbind",
            lambda channel, done: channel.queue_unbind(
                queue, exchange, routing_key, arguments, done
            ),
            nowait=nowait,
        )

    def queue_purge(self, queue: str = "", nowait: bool = False, argsig: str = "Bsb") -> int | None:
        """Drop the messages that wait in a queue.

        Returns:
            How many; None with `nowait`.
        """
        del argsig
        check_kind(self.connection, queue, "queue_purge")
        reply = self._ask(
            "Queue.purge", lambda channel, done: channel.queue_purge(queue, done), nowait=nowait
        )
        return None if reply is None else int(reply.method.message_count)

    def queue_delete(
        self,
        queue: str = "",
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        argsig: str = "Bsbbb",
    ) -> int | None:
        """Delete a queue.

        Returns:
            How many messages it held; None with `nowait`.
        """
        del argsig
        reply = self._ask(
            "Queue.delete",
            lambda channel, done: channel.queue_delete(queue, if_unused, if_empty, done),
            nowait=nowait,
        )
        note_kind(self.connection.kinds, queue, None)
        return None if reply is None else int(reply.method.message_count)

    # -- transactions

    def tx_select(self) -> None:
        """Make publishes and acks of this channel part of a transaction."""
        self._ask("Tx.select", lambda channel, done: channel.tx_select(done))

    def tx_commit(self) -> None:
        """Commit, and begin the next transaction."""
        self._ask("Tx.commit", lambda channel, done: channel.tx_commit(done))

    def tx_rollback(self) -> None:
        """Drop the publishes and acks since the last commit."""
        self._ask("Tx.rollback", lambda channel, done: channel.tx_rollback(done))
