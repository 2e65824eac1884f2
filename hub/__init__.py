"""A cooperative hub for file descriptors: the same under native threads, gevent and eventlet.

    import hub

    loop = hub.get_hub()            # this thread's hub, run in the background
    loop.call_soon_threadsafe(loop.add_reader, sock.fileno(), on_readable)

Names are imported when they are first used: `import hub` brings in no socket, select,
ssl or threading, so that a program may patch after it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hub import _exit as _exit  # now: what it does at exit is for after the program's own functions

_HOMES = {
    "hub.environment": (
        "Environment",
        "GreenEnvironmentWarning",
        "Task",
        "Waiter",
        "detect_environment",
        "get_environment",
        "use",
    ),
    "hub.errors": (
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
    ),
    "hub.finalize": ("Finalizer",),
    "hub._cycle": ("HubStats",),
    "hub.loop": ("Hub",),
    "hub.pollers": ("Poller", "available_pollers", "create_poller"),
    "hub.pool": ("Lease", "LifoPool", "PoolStats"),
    "hub.primitives": ("Condition", "Event", "LifoQueue", "Lock", "RLock", "Semaphore"),
    "hub.shared": ("get_hub",),
    "hub.streams": ("SocketOptions", "Stream", "StreamHandler", "open_stream"),
    "hub.timers": ("Handle", "Timer"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from hub._cycle import HubStats
    from hub.environment import (
        Environment,
        GreenEnvironmentWarning,
        Task,
        Waiter,
        detect_environment,
        get_environment,
        use,
    )
    from hub.errors import (
        BadArgumentError,
        BadDescriptorError,
        BlockingCallError,
        BufferFullError,
        ForeignThreadError,
        HubClosedError,
        HubError,
        HubRunningError,
        HubTimeoutError,
        PollerClosedError,
        PoolClosedError,
        PoolError,
        PoolInUseError,
        PoolReleaseError,
        PoolTimeoutError,
        StreamClosedError,
        StreamError,
        StreamForkedError,
        StreamRefusedError,
        StreamTimeoutError,
        TLSError,
        UnknownEnvironmentError,
        UnknownPollerError,
        UnsupportedError,
    )
    from hub.finalize import Finalizer
    from hub.loop import Hub
    from hub.pollers import Poller, available_pollers, create_poller
    from hub.pool import Lease, LifoPool, PoolStats
    from hub.primitives import Condition, Event, LifoQueue, Lock, RLock, Semaphore
    from hub.shared import get_hub
    from hub.streams import SocketOptions, Stream, StreamHandler, open_stream
    from hub.timers import Handle, Timer

__all__ = [
    "BadArgumentError",
    "BadDescriptorError",
    "BlockingCallError",
    "BufferFullError",
    "Condition",
    "Environment",
    "Event",
    "Finalizer",
    "ForeignThreadError",
    "GreenEnvironmentWarning",
    "Handle",
    "Hub",
    "HubClosedError",
    "HubError",
    "HubRunningError",
    "HubStats",
    "HubTimeoutError",
    "Lease",
    "LifoPool",
    "LifoQueue",
    "Lock",
    "Poller",
    "PollerClosedError",
    "PoolClosedError",
    "PoolError",
    "PoolInUseError",
    "PoolReleaseError",
    "PoolStats",
    "PoolTimeoutError",
    "RLock",
    "Semaphore",
    "SocketOptions",
    "Stream",
    "StreamClosedError",
    "StreamError",
    "StreamForkedError",
    "StreamHandler",
    "StreamRefusedError",
    "StreamTimeoutError",
    "TLSError",
    "Task",
    "Timer",
    "UnknownEnvironmentError",
    "UnknownPollerError",
    "UnsupportedError",
    "Waiter",
    "available_pollers",
    "create_poller",
    "detect_environment",
    "get_environment",
    "get_hub",
    "open_stream",
    "use",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'hub' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
