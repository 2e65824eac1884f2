"""The user's functions that a publish calls, and whose error it is when one of them raises.

What an `on_return` raises may well be a lost connection: that of another broker, for example. Told
by its type it would be this broker's, whose connection would be thrown away, and the message
published again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

__all__ = ["call_users", "is_users"]

_MARK = "_greenkombu_raised_by_user"


def call_users(calls: Iterable[Callable[[], object]]) -> None:
    """Call the user's functions in the task that publishes; what one raises is not retried."""
    for call in calls:
        try:
            call()
        except Exception as exc:
            vars(exc)[_MARK] = True  # not setattr(), which a class may have forbidden
            raise


def is_users(error: BaseException) -> bool:
    """Tell whether an error comes out of `call_users`."""
    return getattr(error, _MARK, False)
