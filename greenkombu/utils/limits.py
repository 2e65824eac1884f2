"""Rate limits."""

from __future__ import annotations

from collections import deque
from time import monotonic
from typing import Any

__all__ = ["TokenBucket"]


class TokenBucket:
    """A bucket that fills with tokens at a steady rate and holds so many at most.

    It takes no lock; a bucket that several native threads use may let a token through twice.

    Args:
        fill_rate: tokens per second.
        capacity: how many tokens fit, which is also the longest burst.
    """

    #: Tokens per second.
    fill_rate: float = None  # type: ignore[assignment]
    #: The most tokens that the bucket holds.
    capacity: float = 1
    #: Monotonic time, in seconds, at which the tokens were last counted.
    timestamp: float = None  # type: ignore[assignment]

    def __init__(self, fill_rate: float, capacity: float = 1) -> None:
        self.capacity = float(capacity)
        self.fill_rate = float(fill_rate)
        self.timestamp = monotonic()
        self._tokens = self.capacity
        #: What waits for tokens; kept here for the owner.
        self.contents: deque[Any] = deque()

    def add(self, item: Any) -> None:
        """Append item to what waits."""
        self.contents.append(item)

    def pop(self) -> Any:
        """Remove and return what has waited longest.

        Raises:
            IndexError: nothing waits.
        """
        return self.contents.popleft()

    def clear_pending(self) -> None:
        """Forget what waits."""
        self.contents.clear()

    def can_consume(self, tokens: float = 1) -> bool:
        """Take that many tokens if they are there.

        Returns:
            Whether they were taken.
        """
        if tokens > self._get_tokens():
            return False
        self._tokens -= tokens
        return True

    def expected_time(self, tokens: float = 1) -> float:
        """Return the seconds until that many tokens will be there; takes none."""
        return max(tokens - self._get_tokens(), 0.0) / self.fill_rate

    def _get_tokens(self) -> float:
        now = monotonic()
        if self._tokens < self.capacity:
            gained = self.fill_rate * (now - self.timestamp)
            self._tokens = min(self.capacity, self._tokens + gained)
        self.timestamp = now
        return self._tokens
