"""Run an operation until it succeeds, over lost connections and channels.

One deadline spans everything that a call of the wrapper does: the operation, each attempt to
connect, each wait in between.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from greenkombu import exceptions
from greenkombu._broker import Broker
from greenkombu._callbacks import is_users
from greenkombu._retry import Intervals, bounded_wait, pause
from greenkombu.deadline import Deadline

if TYPE_CHECKING:
    ErrorTypes = tuple[type[BaseException], ...]
    Errback = Callable[[BaseException, float], object]

__all__ = ("Retrying",)

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What `ensure` takes besides what it is to run, for the error of one that it does not.
_OPTIONS = (
    "max_retries",
    "interval_start",
    "interval_step",
    "interval_max",
    "timeout",
    "errback",
    "on_revive",
    "retry_errors",
)


class Retrying(Broker):
    """The part of a connection that tries again."""

    if TYPE_CHECKING:
        default_channel: Any
        _connection: Any
        _default_channel: Any

        def _usable(self) -> Any: ...

        def collect(self, socket_timeout: float | None = None) -> None: ...

        def ensure_connection(
            self,
            errback: Errback | None = None,
            max_retries: int | None = None,
            interval_start: float = 2,
            interval_step: float = 2,
            interval_max: float = 30,
        ) -> Any: ...

    def ensure(
        self,
        obj: Any,
        fun: Callable[..., T],
        errback: Errback | None = None,
        max_retries: int | None = None,
        interval_start: float = 1,
        interval_step: float = 1,
        interval_max: float = 1,
        on_revive: Callable[[Any], object] | None = None,
        retry_errors: Iterable[type[BaseException]] | None = None,
        timeout: float | None = None,
        **unknown: Any,
    ) -> Callable[..., T]:
        """Wrap `fun` so that it survives the loss of the connection or of the channel.

        Args:
            obj: what `fun` works with; `obj.revive(channel)` gets the new channel.
            fun: may run more than once; what an `on_return` raises in a publish of it is not
                retried, whatever its type.
            errback: called with the error and the seconds until the next attempt.
            max_retries: attempts after the first; 0 means no other one, None sets no limit.
            interval_start: seconds of the first wait between attempts to connect.
            interval_step: seconds by which each wait is longer than the one before.
            interval_max: seconds of the longest wait.
            on_revive: called with the new channel, after `obj.revive`.
            retry_errors: more errors after which `fun` is run again, on the same channel.
            timeout: seconds for one call of the wrapper with all it does; None sets no limit.
            **unknown: nothing; what is misspelt, here or in a `retry_policy`, is named.

        Returns:
            A function with the arguments of `fun`. It raises `exceptions.OperationalError` from the
            last error when no retry is left or the time is over, and other errors as they are.

        Raises:
            TypeError: an option is unknown.
            ArgumentError: `max_retries` is not a number.
        """
        if unknown:
            raise _unknown_options(unknown)
        if max_retries is not None and not isinstance(max_retries, (int, float)):
            raise exceptions.ArgumentError(
                f"max_retries must be a number, or None for no limit, not {max_retries!r:.100}"
            )
        again = tuple(retry_errors or ())
        intervals = (interval_start, interval_step, interval_max)

        def ensured(*args: Any, **kwargs: Any) -> T:
            def call() -> T:
                return fun(*args, **kwargs)

            if timeout is None:
                return self._retry(obj, call, errback, max_retries, intervals, on_revive, again)
            with Deadline(timeout):
                return self._retry(obj, call, errback, max_retries, intervals, on_revive, again)

        name = getattr(fun, "__name__", type(fun).__name__)
        ensured.__name__ = ensured.__qualname__ = f"{name}(ensured)"
        ensured.__doc__ = fun.__doc__
        ensured.__module__ = fun.__module__
        return ensured

    def _retry(
        self,
        obj: Any,
        call: Callable[[], T],
        errback: Errback | None,
        max_retries: int | None,
        intervals: tuple[float, float, float],
        on_revive: Callable[[Any], object] | None,
        again: ErrorTypes,
    ) -> T:
        waits = Intervals(*intervals)
        retries = 0
        lost = failed = False
        channel = refusing = None
        while True:
            used = self._connection
            try:
                # A channel is opened, and `obj` set up on it, as part of the attempt: it may fail
                # like the operation itself.
                channel = getattr(obj, "channel", None)
                if lost or (failed and (_is_closed(channel) or channel is refusing)):
                    if self._default_channel is refusing:
                        self._default_channel = None
                    channel = self.default_channel
                    obj.revive(channel)
                    if on_revive is not None:
                        on_revive(channel)
                    lost = failed = False
                return call()
            except exceptions.ConnectionBlocked:
                raise  # the connection is good, and another one would be blocked as well
            except Exception as exc:
                if is_users(exc):
                    raise
                # The broker's word on one message. Kombu counts it as the loss of the connection,
                # which would take that away from all who share it. A new channel has to be: one
                # that was opened while a quorum queue had no leader can refuse for ever.
                refused = isinstance(exc, exceptions.DeliveryError)
                refusing = channel if refused else None
                # OperationalError: no connection was found by way of `default_channel`.
                lost = not refused and isinstance(
                    exc, (*self.recoverable_connection_errors, exceptions.OperationalError)
                )
                failed = refused or (not lost and isinstance(exc, self.recoverable_channel_errors))
                if not (lost or failed or isinstance(exc, again)):
                    raise
                wait = _next_wait(retries, max_retries, waits, refused)
                if wait is None:
                    if (lost or failed) and not isinstance(exc, exceptions.OperationalError):
                        raise exceptions.OperationalError(str(exc)) from exc
                    raise
                logger.debug("%r: %r, attempt %s follows in %.3g s", self, exc, retries + 2, wait)
                if errback is not None and (lost or failed):
                    errback(exc, wait)
            pause(wait)
            if lost:
                # Its peer answers no goodbye. One that somebody else has opened since is good.
                if self._connection is used or self._usable() is None:
                    self.collect()
                left = None if max_retries is None else max(max_retries - retries, 1)
                # Has all the retries that are left; its failure is final.
                self.ensure_connection(errback, left, *intervals)
            retries += 1

    def autoretry(
        self, fun: Callable[..., T], channel: Any = None, **ensure_options: Any
    ) -> Callable[..., tuple[T, Any]]:
        """Wrap `fun` so that it gets a working channel as keyword argument `channel`.

        Args:
            fun: may run more than once.
            channel: the channel of the first attempt; None means the default channel.
            **ensure_options: see `ensure`.

        Returns:
            A function with the other arguments of `fun`, returning (result, channel).
        """
        state = _Revived(channel)

        def with_channel(*args: Any, **kwargs: Any) -> tuple[T, Any]:
            if state.channel is None:
                state.channel = self.default_channel
            return fun(*args, channel=state.channel, **kwargs), state.channel

        with_channel.__name__ = getattr(fun, "__name__", type(fun).__name__)
        with_channel.__doc__ = fun.__doc__
        return self.ensure(state, with_channel, **ensure_options)

    @contextmanager
    def _reraise_as_library_errors(
        self,
        ConnectionError: type[Exception] = exceptions.OperationalError,
        ChannelError: type[Exception] = exceptions.OperationalError,
    ) -> Iterator[None]:
        """Turn the recoverable errors of the transport into `exceptions.OperationalError`."""
        try:
            yield
        except (ConnectionError, ChannelError):
            raise
        except self.recoverable_connection_errors as exc:
            raise ConnectionError(str(exc)) from exc
        except self.recoverable_channel_errors as exc:
            raise ChannelError(str(exc)) from exc


def _unknown_options(names: Iterable[str]) -> TypeError:
    from difflib import get_close_matches

    parts = []
    for name in names:
        near = get_close_matches(str(name), _OPTIONS, n=1)
        parts.append(f"{name!r} (did you mean {near[0]!r}?)" if near else f"{name!r}")
    return TypeError(
        f"unknown option of a retry_policy, or of Connection.ensure: {', '.join(parts)};"
        f" there are {', '.join(_OPTIONS)}"
    )


class _Revived:
    """Hold the channel of an `autoretry`."""

    __slots__ = ("channel",)

    def __init__(self, channel: Any) -> None:
        self.channel = channel

    def revive(self, channel: Any) -> None:
        self.channel = channel


def _next_wait(
    retries: int, max_retries: int | None, waits: Intervals, refused: bool
) -> float | None:
    """Return the seconds before the operation runs again; None if it does not."""
    if max_retries is not None and retries >= max_retries:
        return None
    # Connecting has its own waits. Without a limit, an operation that fails each time although the
    # connection is good must not spin; and a broker that refuses needs time to change its mind,
    # such as to choose another leader for a quorum queue.
    at_once = not refused and (retries == 0 or max_retries is not None)
    return bounded_wait(0.0 if at_once else next(waits))


def _is_closed(channel: Any) -> bool:
    return bool(getattr(channel, "closed", False))
