"""Errors of the hub.

One base, `HubError`; every leaf also derives from the builtin that a caller would
naturally catch (ValueError, RuntimeError, TimeoutError, OSError).  All of them are
built from one message string, so they pickle.  A message says what failed, on which
descriptor, pool or peer, and what to do about it.
"""

from __future__ import annotations

__all__ = [
    "BadArgumentError",
    "BadDescriptorError",
    "BlockingCallError",
    "BufferFullError",
    "ForeignThreadError",
    "HubClosedError",
    "HubError",
    "HubRunningError",
    "HubTimeoutError",
    "PollerClosedError",
    "PoolClosedError",
    "PoolError",
    "PoolInUseError",
    "PoolReleaseError",
    "PoolTimeoutError",
    "StreamClosedError",
    "StreamError",
    "StreamForkedError",
    "StreamRefusedError",
    "StreamTimeoutError",
    "TLSError",
    "UnknownEnvironmentError",
    "UnknownPollerError",
    "UnsupportedError",
]


class HubError(Exception):
    """Base of every error that the hub raises on purpose."""


class BadArgumentError(HubError, TypeError, ValueError):
    """An argument of a type, or a value, with which the call makes no sense."""


class UnknownEnvironmentError(HubError, ValueError):
    """The named environment is not default, gevent or eventlet."""


class UnknownPollerError(HubError, ValueError):
    """The named poller is not epoll, kqueue, poll or select."""


class BadDescriptorError(HubError, ValueError):
    """A descriptor is closed, negative, not an integer, or cannot be waited for."""


class UnsupportedError(HubError, RuntimeError):
    """The platform, poller or environment cannot do what was asked."""


class PollerClosedError(HubError, RuntimeError):
    """The poller was closed, or was inherited through a fork."""


class HubClosedError(HubError, RuntimeError):
    """The hub was closed, or belongs to the process before a fork."""


class HubRunningError(HubError, RuntimeError):
    """The hub is already being run; it cannot be entered a second time."""


class HubTimeoutError(HubError, TimeoutError):
    """The hub has not come to a call in time."""


class ForeignThreadError(HubError, RuntimeError):
    """The call belongs in the thread that owns the hub."""


class BlockingCallError(HubError, RuntimeError):
    """A hub callback tried to wait; it would stop every descriptor of the hub."""


class PoolError(HubError):
    """Base of the pool's errors."""


class PoolTimeoutError(PoolError, TimeoutError):
    """No resource became free within the deadline."""


class PoolClosedError(PoolError, RuntimeError):
    """The pool was closed."""


class PoolInUseError(PoolError, RuntimeError):
    """The pool was closed while resources of it were in use; it tells how many, and since when."""


class PoolReleaseError(PoolError, RuntimeError):
    """A lease was given back twice, or does not belong to this pool."""


class StreamError(HubError, OSError):
    """Base of the errors of one stream; it never concerns another one."""


class StreamClosedError(StreamError, ConnectionError):
    """The stream was closed, by us or by the peer."""


class StreamForkedError(StreamClosedError):
    """The stream belongs to the process before a fork."""


class StreamRefusedError(StreamError, ConnectionRefusedError):
    """Nobody listens at any of the addresses."""


class StreamTimeoutError(StreamError, TimeoutError):
    """Connecting, flushing or closing took longer than its deadline."""


class TLSError(StreamError):
    """The TLS handshake or record layer failed."""


class BufferFullError(StreamError):
    """The out-buffer reached its hard limit; the message was not appended."""
