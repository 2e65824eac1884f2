"""What a store has to do for a virtual channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenkombu import exceptions

if TYPE_CHECKING:
    from greenkombu.transport.virtual.base import Connection

__all__ = ["AbstractChannel"]


class AbstractChannel:
    """What a store has to do for a virtual channel.

    Derive from `Channel` and not from this class. `_get`, `_put` and `_purge` are required.

    Attributes:
        connection: what the transport's `establish_connection` returned.
        channel_id: its number, unique on the connection.
        closed: it cannot be used any more.
    """

    connection: Connection
    channel_id: int
    closed: bool

    def _get(self, queue: str, timeout: float | None = None) -> Any:  # noqa: ARG002
        """Take the next message off a queue.

        Returns:
            The dict that `_put` was given.

        Raises:
            queue.Empty: there is none.
        """
        raise self._missing("_get")

    def _put(self, queue: str, message: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Put a message on a queue."""
        raise self._missing("_put")

    def _purge(self, queue: str) -> int:  # noqa: ARG002
        """Remove all messages of a queue; return how many there were."""
        raise self._missing("_purge")

    def _size(self, queue: str) -> int:  # noqa: ARG002
        """Return the number of messages in a queue."""
        return 0

    def _delete(self, queue: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        """Delete a queue.

        Called for each binding with (queue, exchange, binding key, pattern, queue), or once with
        the queue alone when it has no bindings.
        """
        self._purge(queue)

    def _new_queue(self, queue: str, **kwargs: Any) -> Any:
        """Make a queue; kwargs are those of queue_declare. An existing one stays as it is."""

    def _has_queue(self, queue: str, **kwargs: Any) -> bool:  # noqa: ARG002
        """Tell whether a queue exists; a store that cannot know says yes."""
        return True

    def _missing(self, method: str) -> Exception:
        return exceptions.UnsupportedOperation(
            f"the virtual channel {type(self).__module__}.{type(self).__qualname__} has no {method}"
        )

    # -- open or closed

    def _check_open(self, what: str) -> None:
        """Raise if the channel or its connection is closed."""
        if self.closed:
            raise self._closed_error(what)

    def _closed_error(self, what: str) -> BaseException:
        if not self.connection.connected:
            return exceptions.ConnectionClosedError(
                f"cannot {what}: the connection of channel {self.channel_id} is closed; connect "
                "again and open a new channel"
            )
        return exceptions.ChannelClosedError(
            f"cannot {what}: channel {self.channel_id} is closed; open a new one"
        )
