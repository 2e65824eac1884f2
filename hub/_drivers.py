"""Who runs a hub, and how it waits.

A driver connects one `Hub` to its environment.  It has two duties:

* in the *background* it owns the hub: it runs one cycle whenever the poller has
  something to report, a timer is due, or work was queued (`poke`);
* in the *foreground*, when a task called `run_once`/`run_forever`, it waits for the
  poller on behalf of that task (`poll`) and stays out of the way otherwise.

Under gevent and eventlet the background owner is not a greenlet of our own: the
cycles run in the green library's own hub greenlet, as the callback of a watcher on the
poller's descriptor.  There is thus no greenlet that a program could kill or
that a Timeout could hit, a callback that tries to block is refused by the green
library itself ("cannot switch to the main loop from the main loop") instead of stopping
every descriptor, and a wake-up costs one greenlet switch less.

The watcher stays armed between cycles: adding an epoll descriptor to another epoll
walks all its members in the kernel (man 7 epoll; measured in benchmarks/).  If it fires
while nobody is there to empty the poller, it is disarmed at once, since a
level-triggered loop would otherwise spin.

A poller without a descriptor of its own (poll, select: the fallback of platforms that
have neither epoll nor kqueue) is watched by a native thread, see `hub._sentry`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hub.errors import UnsupportedError

if TYPE_CHECKING:
    from hub._sentry import Sentry
    from hub.environment import Waiter
    from hub.loop import Hub

__all__ = ["Driver", "GreenDriver"]

#: Seconds, 23 days.  Green loops hand their timers to epoll_wait(2), which counts milliseconds in a
#: C int.  A timer of the hub may be longer; a task's wait for longer ends after this.
LONGEST_TIMER = 2_000_000.0


class Driver(ABC):
    """Run one hub in the background, and wait for its poller in the foreground."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    @property
    @abstractmethod
    def running(self) -> bool:
        """Tell whether the background owner is active."""

    @abstractmethod
    def start(self) -> None:
        """Let the background owner run the hub; idempotent."""

    @abstractmethod
    def stop(self, timeout: float) -> bool:
        """Make the background owner stand down until `unpark()` or `start()`; idempotent.

        Args:
            timeout: seconds to wait for a native thread.

        Returns:
            True if nobody runs the hub now; False if it is still in a callback.
        """

    @abstractmethod
    def poke(self) -> None:
        """Say that work was queued; never blocks; safe in signal handlers and finalizers."""

    @abstractmethod
    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """Wait in the foreground for the poller's events, blocking the calling task only."""

    # The hooks that are not abstract do nothing where an environment has no use for them.

    def unpark(self) -> None:  # noqa: B027
        """Undo `stop()` without starting anything."""

    def yield_turn(self) -> None:  # noqa: B027
        """Let the other tasks run, in the foreground, although there is more to do."""

    def call_after_turn(self, callback: Callable[[], None]) -> bool:  # noqa: ARG002
        """Call `callback` behind the tasks that are ready now; False if this cannot do that."""
        return False

    def revive(self) -> None:  # noqa: B027
        """Start the background owner, if it can be, from any thread or finalizer."""

    def set_deadline(self, due: float | None) -> None:  # noqa: B027
        """Say that the next timer is due at `due`, in hub time (None: there is none)."""

    @property
    def belongs_here(self) -> bool:
        """Tell whether the calling native thread is the one that this driver serves."""
        return True

    def interest(self, fd: int, events: int) -> None:  # noqa: B027
        """Say that the hub now waits for `events` of `fd` (0: for nothing)."""

    @abstractmethod
    def close(self) -> None:
        """Stop and give back what the driver holds; idempotent."""

    @abstractmethod
    def abandon(self) -> None:
        """Forget everything, in the child of a fork, without touching kernel objects."""


class GreenDriver(Driver):
    """What gevent and eventlet have in common; the green library's calls are abstract."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._background = False
        self._scheduled = False
        self._next_turn: Any = None
        self._foreground: Waiter | None = None
        self._watch: Any = None
        self._sentry: Sentry | None = None
        self._timer: Any = None
        self._timer_due: float | None = None

    # -- the green library -------------------------------------------------------
    @abstractmethod
    def _start_watch(self, fd: int, write: bool, callback: Callable[[], None]) -> Any:
        """Call `callback` in the green hub whenever `fd` is ready; return a token."""

    @abstractmethod
    def _stop_watch(self, token: Any) -> None:
        """Undo `_start_watch`."""

    @abstractmethod
    def _start_timer(self, delay: float, callback: Callable[[], None]) -> Any:
        """Call `callback` once in the green hub after `delay` seconds; return a token."""

    @abstractmethod
    def _stop_timer(self, token: Any) -> None:
        """Undo `_start_timer`."""

    @abstractmethod
    def _call_soon(self, callback: Callable[[], None]) -> None:
        """Call `callback` in the green hub in its next turn."""

    def _call_next_turn(self, callback: Callable[[], None]) -> Any:
        """Call `callback` after the green loop has looked at its descriptors and timers."""
        return self._start_timer(0, callback)

    @abstractmethod
    def _outside(self) -> bool:
        """Tell whether the caller is a signal handler that interrupted the green hub's wait.

        What is queued there is not seen before the wait ends, so a descriptor has to
        be made ready.
        """

    def _armed(self, armed: bool) -> None:
        """Note that the watcher on the poller was started, or stopped."""

    # -- background ----------------------------------------------------------------
    @property
    def running(self) -> bool:
        return self._background

    def start(self) -> None:
        if not self._background:
            self._arm()
            self._background = True
            self.poke()

    def stop(self, timeout: float) -> bool:  # noqa: ARG002 - it never waits
        self._background = False
        self.set_deadline(None)
        if self._foreground is None:
            self._disarm()
        return True

    def poke(self) -> None:
        if self._foreground is not None:
            self._foreground.wake()
        elif self._background and not self._scheduled:
            self._scheduled = True
            try:
                if self._outside():
                    self.hub.poller.wakeup()
                else:
                    self._call_soon(self._run)
            except BaseException:  # of a signal handler: the next one has to try again
                self._scheduled = False
                raise

    def call_after_turn(self, callback: Callable[[], None]) -> bool:
        if self._foreground is not None or not self._background or self._outside():
            return False
        self._call_soon(callback)
        return True

    def _run(self, poll: bool = False) -> None:
        """Run one cycle; the body of every callback in the background.

        It polls only if the watcher said that there is something (so at most once per turn of
        the green loop), and what is left over waits for the next turn: the callbacks
        of one turn run back to back, and a chain of them would keep everybody else waiting.
        """
        self._scheduled = False
        if not self._background or self.hub.cycling:
            return
        more = True
        try:
            more = self.hub.run_background_cycle(0, poll)
        finally:
            # Also when KeyboardInterrupt or SystemExit passes through, on its way to the
            # program's main greenlet: the hub itself goes on.
            if more and self._background and not self._scheduled:
                self._scheduled = True
                self._next_turn = self._call_next_turn(self._on_turn)

    def _on_turn(self) -> None:
        token, self._next_turn = self._next_turn, None
        if token is not None:
            self._stop_timer(token)
        self._run(False)

    def set_deadline(self, due: float | None) -> None:
        if due == self._timer_due:
            return
        timer, self._timer = self._timer, None
        self._timer_due = None
        if timer is not None:
            self._stop_timer(timer)
        if due is not None and self._background:
            self._timer_due = due
            delay = min(max(due - self.hub.time(), 0.0), LONGEST_TIMER)
            self._timer = self._start_timer(delay, self._on_timer)

    def _on_timer(self) -> None:
        token, self._timer = self._timer, None
        self._timer_due = None
        if token is not None:
            self._stop_timer(token)
        self._run()

    def _on_ready(self) -> None:
        """The poller has something to report (or is being looked at for nothing)."""
        try:
            if self._background:
                self._run(True)
                if self._sentry is not None:
                    self._sentry.watch()
            elif self._foreground is not None and not self._foreground.woken:
                self._foreground.wake()
            else:
                self._disarm()
        except BaseException:
            # KeyboardInterrupt, or SystemExit of a signal handler.  The green loop stops a watcher
            # whose callback raises, when that has returned: the next one has to come later.
            self._disarm()
            self._call_soon(self._rearm)
            raise

    def _rearm(self) -> None:
        if self._background or self._foreground is not None:
            self._arm()

    # -- foreground ----------------------------------------------------------------
    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        # No look at the poller first: where there is always something to read, the other
        # tasks must get their turn all the same.
        self._arm()
        waiter = self._foreground = self.hub.environment.waiter()
        try:
            # A callback queued from a signal handler between the look at the ready
            # queue and this line has seen no foreground to wake.
            if not self.hub.has_work():
                waiter.wait(timeout)
        finally:
            self._foreground = None
        return [] if self.hub.closed else self.hub.poller.poll(0)

    def yield_turn(self) -> None:
        self._arm()  # it keeps the green loop alive, which our timer alone does not
        waiter = self.hub.environment.waiter()
        token = self._call_next_turn(waiter.wake)
        try:
            waiter.wait()
        finally:
            self._stop_timer(token)

    # -- the watcher -----------------------------------------------------------------
    def _arm(self) -> None:
        if self._watch is None:
            try:
                fd = self.hub.poller.fileno()
            except UnsupportedError:
                if self._sentry is None:
                    from hub._sentry import Sentry

                    self._sentry = Sentry(self.hub.environment, self.hub.poller)
                fd = self._sentry.fd
            self._watch = self._start_watch(fd, False, self._on_ready)
            self._armed(True)
        if self._sentry is not None:
            self._sentry.watch()

    def _disarm(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            self._armed(False)
            self._stop_watch(watch)

    def interest(self, fd: int, events: int) -> None:  # noqa: ARG002 - any change will do
        if self._sentry is not None:
            self.hub.poller.wakeup()

    # -- the end ---------------------------------------------------------------------
    def close(self) -> None:
        if self._foreground is not None:
            self._foreground.wake()  # a task that runs the hub: it finds it closed and returns
        self.stop(0)
        self._disarm()
        if self._sentry is not None:
            self._sentry.close()

    def abandon(self) -> None:
        self._background = False
        self._timer = self._next_turn = None
        self._timer_due = None
        self._foreground = self._watch = None
        if self._sentry is not None:
            self._sentry.abandon()
