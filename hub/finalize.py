"""What is done with the resources of objects that were dropped instead of closed.

The garbage collector runs finalizers wherever it happens to be: in a callback of the
hub, in code that holds a lock, in a signal handler, in another native thread, while the
interpreter exits.  So a finalizer here

* gets the resource and never its owner (which would keep the owner alive for ever),
* takes no lock, does no I/O that could switch, and writes no log line (a log handler has a
  lock): what goes wrong is told by a hub, as any error of its callbacks,
* leaves the work to the hub.  A descriptor goes to the hub that has it registered,
  which takes it out of its poller first and closes it in its next cycle; closing it here
  would leave a stale number in the poller, and a new socket with the same number would get
  the events of the old one.

At the end of the process, when no hub runs any more, descriptors are closed at once.
"""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from hub import _fork
from hub import environment as _environment
from hub._exit import run_at_exit
from hub.arguments import check_callable
from hub.errors import HubClosedError

if TYPE_CHECKING:
    import logging

    from hub._drivers import Driver
    from hub.environment import Environment

__all__ = ["Finalizer", "Home", "defer", "drain_reaper", "reap"]


@cache
def _logger() -> logging.Logger:
    # logging imports threading, which a program may want to patch after importing this.
    import logging

    return logging.getLogger(__name__)


class _Reaper(Protocol):
    """The part of a hub that is used here."""

    @property
    def closed(self) -> bool: ...

    @property
    def driver(self) -> Driver: ...

    def reap(self, fd: int) -> None: ...


# Work left by finalizers for which no hub was found: (callback, arguments).
_left_over: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()

# Set when the interpreter runs its exit functions: from then on no hub will be run.
_exiting = False


def reap(fd: int, hub_ref: Callable[[], _Reaper | None] | None = None) -> None:
    """Close a descriptor whose owner is gone; callable from anywhere, never waits.

    Args:
        fd: the descriptor; nobody else may close it (take it with `socket.detach()`), or
            the number may have been given to another file by the time it is closed.
        hub_ref: a weak reference to the hub that has it registered, which then closes
            it.  None if no hub has; then, or if that hub is closed or gone, the
            descriptor is closed at once.
    """
    hub = None if hub_ref is None else hub_ref()
    # At exit a hub that has stopped is not to be started again.
    if hub is not None and not hub.closed and (not _exiting or hub.driver.running):
        hub.reap(fd)
        return
    try:
        # Not os.close: gevent's patch of it leaves the work to a turn of its loop, which may
        # never come.  This module is where os has it from, and nobody patches that.
        sys.modules[os.name].close(fd)
    except OSError:
        pass  # closed already; there is nobody whom it could be told


class Home:
    """Where work for a resource belongs: its environment and native thread.

    Made where the resource is made, because a finalizer runs anywhere.
    """

    __slots__ = ("environment", "thread")

    def __init__(self, environment: Environment | None = None) -> None:
        self.environment = environment or _environment.get_environment()
        self.thread = self.environment.thread_id() if self.environment.green else None

    def call(self, callback: Callable[..., object], *args: Any) -> bool:
        """Queue `callback(*args)` in the hub that runs here; False if there is none.

        For finalizers: takes no lock, never waits, makes no hub.
        """
        shared = sys.modules.get("hub.shared")
        for hub in () if shared is None or _exiting else shared.hubs_of(self.environment):
            if self.thread is None or hub.thread == self.thread:
                try:
                    hub.call_soon_threadsafe(callback, *args)
                    return True
                except HubClosedError:  # pragma: no cover - by another thread, just now
                    continue
        return False


def defer(callback: Callable[..., object], *args: Any, home: Home | None = None) -> None:
    """Call `callback(*args)` later, where it may do more than a finalizer may.

    It runs as a callback of the hub at `home`; if there is none, in the next cycle of any
    hub, at the latest when the process exits.  It may not wait, but it may
    start a task that does.
    """
    if home is None or not home.call(callback, *args):
        _left_over.append((callback, args))


def drain_reaper(report: Callable[[BaseException, object], None] | None = None) -> int:
    """Do what finalizers have left and no hub has taken; return how much it was.

    Called by every hub in each cycle, and at exit.  Never waits.  An error in one callback
    does not concern the others.

    Args:
        report: called with (error, what was called); None logs, for the end of the process.
    """
    if not _left_over:
        return 0
    done = 0
    # As much as there is now: what is added meanwhile is for the next time.
    for _ in range(len(_left_over)):
        try:
            callback, args = _left_over.popleft()
        except IndexError:  # pragma: no cover - another thread does it as well
            break
        done += 1
        try:
            callback(*args)
        except Exception as error:
            (report or _log_now)(error, callback)
    return done


def _log_now(error: BaseException, callback: object) -> None:
    """Log an error at the end of the process: no task would run any more."""
    _logger().error("error in %r", callback, exc_info=error)


class _Failure:
    """The error of a finalizer, raised again where a hub can report it."""

    def __init__(self, callback: Callable[..., object], error: Exception) -> None:
        self._callback = callback
        self._error = error

    def __call__(self) -> None:
        raise self._error

    def __repr__(self) -> str:
        return f"the finalizer {self._callback!r}"


class _Reference(weakref.ref[object]):
    """Weak reference to an owner that knows its finalizer without referring to it."""

    __slots__ = ("key",)

    key: int


class Finalizer:
    """Call `callback(*args)` once, when `owner` has been collected or the process exits.

    In the spirit of `weakref.finalize`.  The callback follows the rules in this module's
    header and must not refer to the owner; hand it the owner's resource.  What it raises
    goes to the hub that has its turn next, as an error of a callback (`Hub.on_error`); at exit
    it is logged.

    In the child of a fork, finalizers made before the fork still run when their owner is
    collected (to close the child's copy of a descriptor), but not when the child exits:
    that would be polite to a peer that belongs to the parent.

    Args:
        owner: any object that can be referred to weakly.
        callback: what to call.
        args: its arguments.

    Raises:
        TypeError: the owner cannot be referred to weakly.
        BadArgumentError: the callback cannot be called.
        ValueError: the callback or an argument is the owner itself, which would thus
            never be collected.
    """

    __slots__ = ("_args", "_callback", "_generation", "_home", "_key", "_owner", "atexit")

    _live: dict[int, Finalizer] = {}  # noqa: RUF012 - one registry, on purpose
    _keys = itertools.count()
    _registered = False

    def __init__(self, owner: object, callback: Callable[..., object], *args: Any) -> None:
        if any(owner is one for one in (callback, getattr(callback, "__self__", None), *args)):
            raise ValueError(
                f"the finalizer of {owner!r} refers to its owner, which could then never be "
                "collected: pass the owner's resource, and a function that is not its method"
            )
        check_callable(callback, "callback")
        self._callback = callback
        self._args = args
        self._generation = _fork.generation()
        self._home = Home()
        self._key = next(self._keys)
        #: False leaves the callback out when the process exits.
        self.atexit = True
        cls = type(self)
        if not cls._registered:
            cls._registered = True
            _fork.join_forks(_forks)  # counts forks from now on
            run_at_exit(_at_exit)
        self._owner = _Reference(owner, _owner_gone)
        self._owner.key = self._key
        self._live[self._key] = self

    @property
    def alive(self) -> bool:
        """Tell whether the callback has neither been called nor detached."""
        return self._key in self._live

    def detach(self) -> bool:
        """Never call the callback; False if it is too late."""
        return self._live.pop(self._key, None) is not None

    def __call__(self) -> Any:
        """Call the callback now and return its result, unless it was called or detached."""
        if self.detach():
            return self._callback(*self._args)
        return None

    def __repr__(self) -> str:
        owner = self._owner()
        of = "a collected object" if owner is None else f"a {type(owner).__name__}"
        return f"<Finalizer of {of}, {'alive' if self.alive else 'dead'}: {self._callback!r}>"


def _owner_gone(reference: weakref.ref[object]) -> None:
    """Run in the garbage collector."""
    assert isinstance(reference, _Reference)
    finalizer = Finalizer._live.get(reference.key)
    if finalizer is None:
        return
    try:
        finalizer()
    except Exception as error:
        defer(_Failure(finalizer._callback, error), home=finalizer._home)


class _Forks:
    """Keeps `_fork` counting; there is nothing to do."""

    __slots__ = ("__weakref__",)

    def before_fork(self) -> None: ...

    def after_fork_in_parent(self) -> None: ...

    def after_fork_in_child(self) -> None: ...


_forks = _Forks()


def _at_exit() -> None:
    """Run what has not run yet, the youngest first, as weakref.finalize does."""
    global _exiting
    _exiting = True
    drain_reaper()
    for key in sorted(Finalizer._live, reverse=True):
        finalizer = Finalizer._live.get(key)
        if finalizer is None or not finalizer.atexit:
            continue
        if finalizer._generation != _fork.generation():
            continue
        try:
            finalizer()
        except Exception as error:
            _log_now(error, _Failure(finalizer._callback, error))
    drain_reaper()
