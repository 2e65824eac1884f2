"""One deadline over a call that waits in several places.

A publish may connect, open a channel, declare, wait for room in the out-buffer and wait for
the broker's confirm.  Each of these has a bound of its own; a caller who says `timeout=2`
means all of them together.  `Deadline` marks the running task with that moment, and whatever
waits asks `remaining(own_bound)` how long it may::

    with Deadline(2.0):
        channel.queue_declare(...)      # its wait: waiter.wait(remaining(rpc_timeout))

The mark belongs to one task, so tasks that share a connection do not shorten each other's waits.
It lies in a context variable, together with the task that set it: a task that is spawned inside the
block inherits the context, but may live longer than the block.
"""

from __future__ import annotations

from contextvars import ContextVar, Token
from time import monotonic

from hub.arguments import has_time
from hub.environment import get_environment

__all__ = ["Deadline", "remaining"]

# (task, moment on the monotonic clock)
_Mark = tuple[object, float]
_mark: ContextVar[_Mark | None] = ContextVar("greenkombu_deadline", default=None)


def _until() -> float | None:
    mark = _mark.get()
    if mark is None or mark[0] != get_environment().current():
        return None
    return mark[1]


def remaining(timeout: float | None = None) -> float | None:
    """Return how long the running task may wait now.

    Args:
        timeout: the bound of this wait alone, in seconds; None when it has none.

    Returns:
        Seconds, never below 0; None when neither bound exists.
    """
    if _mark.get() is None:
        return timeout  # nearly always
    until = _until()
    if until is None:
        return timeout
    left = until - monotonic()
    if left <= 0.0:
        return 0.0
    return left if timeout is None or left < timeout else timeout


class Deadline:
    """Bound every wait of the running task inside a `with` block.

    Args:
        timeout: seconds from the entry of the block; None changes nothing.  An outer deadline
            that comes earlier stays in force.
    """

    __slots__ = ("_token", "_until", "timeout")

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout
        self._token: Token[_Mark | None] | None = None
        self._until: float | None = None

    def __enter__(self) -> Deadline:
        if self.timeout is not None:
            until = monotonic() + (self.timeout if has_time(self.timeout) else 0.0)
            outer = _until()
            if outer is not None and outer < until:
                until = outer
            self._until = until
            self._token = _mark.set((get_environment().current(), until))
        return self

    def __exit__(self, *exc_info: object) -> None:
        token, self._token = self._token, None
        if token is not None:
            _mark.reset(token)

    def left(self) -> float | None:
        """Same as `remaining()`, for the task that is inside the block."""
        return remaining() if self._until is None else max(self._until - monotonic(), 0.0)

    @property
    def expired(self) -> bool:
        """Whether nothing is left of the deadline in force."""
        return remaining() == 0.0
