"""The default environment: native threads.

Tasks are daemon threads and the hub is run by one daemon thread per process.  User
threads only append to queues and park on a `Waiter`; none of them polls.  (A scheme in
which the waiting thread itself polls was measured and dropped: an exception from a signal
handler could then land inside the protocol, and heartbeats stop when nobody waits.)
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hub._drivers import Driver
from hub.arguments import has_time
from hub.environment import (
    Environment,
    GreenEnvironmentWarning,
    Task,
    Waiter,
    check_may_wait,
    running_callbacks,
)

if TYPE_CHECKING:
    from hub.loop import Hub

__all__ = [
    "DefaultEnvironment",
    "ThreadDriver",
    "ThreadWaiter",
    "environment",
    "start_native_thread",
]

# A native lock refuses timeouts above roughly 292 years; a day short of that is for ever.
_LONGEST_WAIT = 4_000_000.0


class ThreadWaiter(Waiter):
    """Parks a native thread on a raw lock that starts out taken."""

    __slots__ = ("_current", "_lock")

    def __init__(self, lock: Any, current: Callable[[], object]) -> None:
        lock.acquire()
        self._lock = lock
        self._current = current
        self.given = self.thread = None
        self.woken = False

    def wait(self, timeout: float | None = None) -> bool:
        if self.woken:
            return True
        # The first half spares the usual bound a call.
        if (
            timeout is not None
            and not (timeout.__class__ is float and timeout > 0.0)
            and not has_time(timeout)
        ):
            return False
        if running_callbacks:
            check_may_wait(self._current())
        _warn_if_green()
        if self._lock.acquire(True, -1 if timeout is None else min(timeout, _LONGEST_WAIT)):
            self.woken = True
        return self.woken

    def wake(self) -> None:
        if not self.woken:
            # In this order: a signal handler that raises in between has not undone the wake-up.
            try:
                self._lock.release()
            except RuntimeError:
                pass  # two wakers at once: the other one has released it
            self.woken = True


class DefaultEnvironment(Environment):
    """Native threads."""

    name = "default"
    green = False

    def __init__(self) -> None:
        self._allocate: Callable[[], Any] | None = None
        self._get_ident: Callable[[], int] | None = None

    def waiter(self) -> Waiter:
        if self._allocate is None:
            self._get_ident = self.original("_thread", "get_ident")
            self._allocate = self.original("_thread", "allocate_lock")
        assert self._get_ident is not None
        return ThreadWaiter(self._allocate(), self._get_ident)

    def sleep(self, seconds: float = 0) -> None:
        if running_callbacks:
            check_may_wait(self.current())
        _warn_if_green()
        self.original("time", "sleep")(seconds if has_time(seconds) else 0)

    def current(self) -> object:
        if self._get_ident is None:
            self._get_ident = self.original("_thread", "get_ident")
        return self._get_ident()

    thread_id = current  # type: ignore[assignment]  # a thread is its own task here

    # A native thread cannot be killed, so what starts it need not know the task.
    def _start(
        self,
        task: Task,  # noqa: ARG002
        body: Callable[[], None],
    ) -> Callable[[], None] | None:
        start_native_thread(self, body)
        return None

    @property
    def socket_module(self) -> Any:
        return importlib.import_module("socket")

    def make_driver(self, hub: Hub) -> Driver:
        return ThreadDriver(hub)


def start_native_thread(env: Environment, body: Callable[[], None]) -> None:
    """Start a daemon thread, a native one even in a program that is patched.

    Not through `threading.Thread`: its start() takes locks and waits, and this may be
    called by a finalizer or signal handler that interrupted a holder of those locks.
    """

    def run() -> None:
        threading = sys.modules.get("threading")
        if threading is not None:
            # What threading.Thread would do for debuggers, profilers and coverage.
            if threading.gettrace() is not None:
                sys.settrace(threading.gettrace())
            if threading.getprofile() is not None:
                sys.setprofile(threading.getprofile())
        body()

    env.original("_thread", "start_new_thread")(run, ())


_warned = False


def _warn_if_green() -> None:
    """Warn once if this native wait stops greenlets that run in the same thread."""
    global _warned
    if _warned or ("gevent" not in sys.modules and "eventlet" not in sys.modules):
        return
    library = _running_green_library()
    if library is not None:
        _warned = True
        warnings.warn(
            f"{library} runs in this thread, but the program is not monkey-patched: waiting here "
            f"blocks all its greenlets. Call hub.use({library!r}) or patch before connecting",
            GreenEnvironmentWarning,
            stacklevel=4,
        )


def _running_green_library() -> str | None:
    """Return the green library whose loop has been started in this thread, if any."""
    module = sys.modules.get("gevent._hub_local")
    if module is not None and module.get_hub_if_exists() is not None:
        return "gevent"
    module = sys.modules.get("eventlet.hubs")
    hub = getattr(getattr(module, "_threadlocal", None), "hub", None)
    if hub is not None and getattr(hub, "running", False):
        return "eventlet"
    return None


class ThreadDriver(Driver):
    """One daemon thread that blocks in the poller.

    Whoever has the lock `_owned` owns the hub: the thread, from before it is started until it has
    ended, or the one who called `stop()`, until `unpark()`.  So nobody else's `revive()` can start
    a second thread while a task runs the hub or the process forks.
    """

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._owned = hub.environment.original("_thread", "allocate_lock")()
        #: Told to stand down; the thread looks at it in each cycle.
        self._parked = False
        #: Whether stop() has got the lock.
        self._stopped = False

    @property
    def running(self) -> bool:
        owned: bool = self._owned.locked()
        return owned and not self._parked

    def start(self) -> None:
        # The lock is free, or the thread that still has it looks at the flag after giving it back.
        if self._parked or self.hub.closed or not self._owned.acquire(False):
            return
        try:
            start_native_thread(self.hub.environment, self._run)
        except BaseException:
            self._owned.release()
            raise

    def revive(self) -> None:
        if not self._owned.locked():
            try:
                self.start()
            except RuntimeError:
                pass  # the interpreter shuts down: no thread can be started any more

    def stop(self, timeout: float) -> bool:
        self._parked = True
        if not self._stopped:
            self.hub.poller.wakeup()
            if self.hub.environment.current() == self.hub.thread:
                return False  # asked in a callback: it ends when that one has returned
            self._stopped = self._owned.acquire(True, timeout)
        return self._stopped

    def unpark(self) -> None:
        self._parked = False
        if self._stopped:
            self._stopped = False
            self._owned.release()

    def _run(self) -> None:
        hub, owned = self.hub, self._owned
        hub.thread = hub.environment.current()
        try:
            while not self._parked and not hub.closed:
                hub.run_background_cycle(None)
        finally:
            if self._owned is owned:  # else it has forked in a callback, and this is the child
                hub.thread = hub.NOBODY
                owned.release()
                if hub.closed:
                    hub.release()
                else:
                    # After an exit in a callback, or an unpark() that came before the release.
                    self.start()

    def poke(self) -> None:
        self.hub.poller.wakeup()

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        return self.hub.poller.poll(timeout)

    def close(self) -> None:
        """Nothing is held: the thread ends because the hub is closed."""

    def abandon(self) -> None:
        self._parked = True
        self._stopped = False
        self._owned = self.hub.environment.original("_thread", "allocate_lock")()


environment = DefaultEnvironment()
