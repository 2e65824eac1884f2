"""Messages that one task hands over to the transport together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from greenkombu.exceptions import BatchPublishError
from hub.environment import get_environment

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from greenkombu.messaging import Producer

__all__ = ["Batch"]


class Batch:
    """The messages that one task has published inside `Producer.batch`."""

    def __init__(self, producer: Producer, max_size: int) -> None:
        if not isinstance(max_size, int) or isinstance(max_size, bool) or max_size < 1:
            raise ValueError(f"max_size must be a positive integer, not {max_size!r}")
        self.producer = producer
        self.max_size = max_size
        self._pending: list[tuple[Any, dict[str, Any]]] = []
        self._channel: Any = None
        self._task: object = None

    def __enter__(self) -> Self:
        if self.producer.supports_batch_publish:
            task = get_environment().current()
            # A nested batch joins the outer one.
            if task not in self.producer._batches:
                self.producer._batches[task] = self
                self._task = task
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if self._task is not None:
            del self.producer._batches[self._task]
            self._task = None
        if exc_type is None:
            self.flush()
        else:
            self._pending.clear()

    def add(self, channel: Any, message: Any, kwargs: dict[str, Any]) -> None:
        """Keep one message; hand over when the channel changes or the batch is full."""
        if channel is not self._channel:
            self.flush()
            self._channel = channel
        self._pending.append((message, kwargs))
        if len(self._pending) >= self.max_size:
            self.flush()

    def flush(self) -> None:
        """Hand over what has come together: one `channel.basic_publish_batch` call.

        Raises:
            BatchPublishError: it failed; the messages are dropped here, since the broker may
                have taken any of them.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        try:
            self._channel.basic_publish_batch(pending)
        except Exception as exc:
            raise BatchPublishError(
                f"a batch of {len(pending)} messages failed, and the broker may have taken some "
                f"of them: {exc}"
            ) from exc
