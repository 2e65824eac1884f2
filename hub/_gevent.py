"""The gevent environment.

gevent is used through its own objects (hub, loop, watchers), never through patched
modules, so a program that uses gevent without monkey-patching is green here as well.
Works on gevent's libev and libuv loops.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import gevent
import gevent.monkey  # importing it patches nothing
from gevent.exceptions import BlockingSwitchOutError
from gevent.hub import Hub as GeventHub
from gevent.hub import get_hub
from greenlet import getcurrent

from hub._drivers import LONGEST_TIMER, Driver, GreenDriver
from hub.arguments import has_time
from hub.environment import Environment, Task, Waiter, check_may_wait, running_callbacks

if TYPE_CHECKING:
    from hub.loop import Hub

__all__ = ["GeventDriver", "GeventEnvironment", "GeventWaiter", "environment"]

_get_ident: Callable[[], int] = gevent.monkey.get_original("_thread", "get_ident")

_READ, _WRITE = 1, 2  # libev's and libuv's numbers for io watchers


class _Loop:
    """What the hubs and waiters on one gevent loop have to know of each other.

    A task that waits without a timer can be woken by our hubs only.  A loop without referenced
    watchers ends (LoopExit), and the reply on its way would be lost; a watcher that is
    always referenced would keep a finished program alive.  So ours are referenced exactly while
    somebody waits like that.

    It is an attribute of gevent's hub: found without a call, and gone with it, so that its
    native thread may end.
    """

    __slots__ = ("drivers", "held")

    def __init__(self) -> None:
        #: Drivers whose watcher is armed.
        self.drivers: list[GeventDriver] = []
        #: How many tasks wait without a timer.
        self.held = 0

    def set_ref(self, held: bool) -> None:
        for driver in self.drivers:
            driver.set_ref(held)


def _loop_of(hub: Any) -> _Loop:
    try:
        loop: _Loop = hub._loop_of_hub
    except AttributeError:
        loop = hub._loop_of_hub = _Loop()
    return loop


def _seconds(loop: Any, delay: float) -> float:
    """Return `delay` within what the loop's timers can do; libuv's count milliseconds."""
    resolution: float = loop.approx_timer_resolution
    return min(max(delay, resolution), LONGEST_TIMER)


class GeventWaiter(Waiter):
    """Parks a greenlet in gevent's hub."""

    __slots__ = ("_callback", "_greenlet", "_hub")

    def __init__(self) -> None:
        self.given = None
        # What a wake has queued in the loop.
        self._callback: Any = None
        self._greenlet: Any = None
        # The hub of the waiting thread; a wake from elsewhere has to go through it.
        self._hub: Any = None
        self.thread = _get_ident()
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
        current = getcurrent()
        if running_callbacks:
            check_may_wait(current)
        # Most tasks were started under it, and asking gevent for it costs more.
        hub = current.parent
        if hub.__class__ is not GeventHub:
            hub = get_hub()
        timer = None
        if timeout is None:
            try:
                loop: _Loop = hub._loop_of_hub
            except AttributeError:
                loop = _loop_of(hub)
            loop.held += 1
            if loop.held == 1:
                loop.set_ref(True)
        else:
            clock = hub.loop
            # The usual bound of a wait: any timer can do it, so the loop is not asked.
            usual = 1.0 <= timeout <= LONGEST_TIMER
            timer = clock.timer(timeout if usual else _seconds(clock, timeout))
            # update: the loop's own clock may lag behind by a long callback
            timer.start(current.switch, update=True)
        self._greenlet = current
        self._hub = hub
        by = None
        try:
            # Woken by another native thread after the first look: that wake found no hub.
            if not self.woken:
                by = hub.switch()
        finally:
            self._greenlet = None
            if by is not self and self._callback is not None:
                # Woken, but something else came first: it must not be resumed somewhere else.
                self._callback.stop()
            if timer is None:
                loop.held -= 1
                if loop.held == 0:
                    loop.set_ref(False)
            else:
                timer.close()  # which stops it
        return self.woken

    def wake(self) -> None:
        if self.woken:
            return
        self.woken = True
        hub = self._hub
        if hub is None:
            return
        loop = hub.loop
        if loop is None:
            return  # the native thread of the waiting greenlet has ended
        current = getcurrent()
        # The first half is for most, and spares them a call.
        if current.parent is not hub and hub.thread_ident != _get_ident():
            loop.run_callback_threadsafe(self._resume)
            return
        if current is hub and hub not in running_callbacks:
            # A signal handler inside the loop's wait: make a descriptor ready, too.
            for driver in _loop_of(hub).drivers[:1]:
                driver.hub.poller.wakeup()
        greenlet = self._greenlet
        if greenlet is not None:
            # Without a function in between; wait() takes it back if it is too late.
            self._callback = loop.run_callback(greenlet.switch, self)

    def _resume(self) -> None:
        """Switch to the parked greenlet; runs in gevent's hub."""
        greenlet = self._greenlet
        if greenlet is not None:
            greenlet.switch()


class GeventEnvironment(Environment):
    """Greenlets scheduled by gevent."""

    name = "gevent"
    green = True
    timeout_types = (gevent.GreenletExit, gevent.Timeout)

    # Without a function in between: most of what waiting costs is calls.
    waiter = GeventWaiter
    current = staticmethod(getcurrent)
    thread_id = staticmethod(_get_ident)

    def sleep(self, seconds: float = 0) -> None:
        if running_callbacks:
            check_may_wait(getcurrent())
        # gevent's own sleep(0) goes on in the same turn of the loop: a task that yields by it,
        # again and again, keeps every timer and descriptor waiting.  A timer of 0 is a whole turn.
        hub = get_hub()
        with hub.loop.timer(_seconds(hub.loop, seconds) if has_time(seconds) else 0) as timer:
            hub.loop.update_now()
            hub.wait(timer)

    def timeout(self, seconds: float) -> Any:
        return gevent.Timeout(seconds)

    def _start(self, task: Task, body: Callable[[], None]) -> Callable[[], None] | None:
        greenlet = gevent.Greenlet(body)
        # A greenlet that is killed before it ever ran does not reach its own `finally`.
        greenlet.rawlink(task._ended)
        greenlet.start()
        return lambda: greenlet.kill(block=False)

    @property
    def socket_module(self) -> Any:
        return importlib.import_module("gevent.socket")

    def original(self, module: str, name: str) -> Any:
        # What get_original() does first, which is asked for by every new connection.
        saved = gevent.monkey.saved.get(module)
        if saved is not None and name in saved:
            return saved[name]
        return gevent.monkey.get_original(module, name)

    def before_fork(self) -> None:
        # gevent's fork() has the loop listen for SIGCHLD only when it has returned: a child that is
        # gone by then, on a busy machine, is never noticed, and waitpid() never returns.  Not where
        # the original fork() was called: a loop that listens reaps every child there is, also those
        # that the program itself waits for.
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__") == "gevent.os":
                get_hub().loop.install_sigchld()
                return
            frame = frame.f_back

    def refused_to_wait(self, error: BaseException) -> bool:
        return isinstance(error, BlockingSwitchOutError)

    # gevent calls `switch_out()` of a greenlet that is about to switch to the loop.
    def forbid_waits(self, task: Any) -> None:
        task.__dict__["switch_out"] = _refuse_to_wait

    def allow_waits(self, task: Any) -> None:
        task.__dict__.pop("switch_out", None)

    def make_driver(self, hub: Hub) -> Driver:
        return GeventDriver(hub)


def _refuse_to_wait() -> None:
    check_may_wait(getcurrent())


class GeventDriver(GreenDriver):
    """Runs a hub in callbacks of the gevent loop of the thread that made it."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._gevent = get_hub()

    @property
    def belongs_here(self) -> bool:
        """Tell whether the calling thread still runs the gevent hub of this driver."""
        return get_hub() is self._gevent and self._gevent.loop is not None

    def _start_watch(self, fd: int, write: bool, callback: Callable[[], None]) -> Any:
        watcher = self._gevent.loop.io(fd, _WRITE if write else _READ, ref=False)
        watcher.start(callback)
        return watcher

    def _stop_watch(self, token: Any) -> None:
        if self._gevent.loop is not None:  # the native thread may have ended its loop
            token.stop()
            token.close()

    def _start_timer(self, delay: float, callback: Callable[[], None]) -> Any:
        loop = self._gevent.loop
        timer = loop.timer(_seconds(loop, delay) if delay else 0, ref=False)
        timer.start(callback, update=True)
        return timer

    def _stop_timer(self, token: Any) -> None:
        if self._gevent.loop is not None:
            token.stop()
            token.close()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._gevent.loop.run_callback(callback)

    def _outside(self) -> bool:
        return getcurrent() is self._gevent and self._gevent not in running_callbacks

    def _armed(self, armed: bool) -> None:
        loop = _loop_of(self._gevent)
        if armed:
            loop.drivers.append(self)
            if loop.held:
                self.set_ref(True)
        else:
            loop.drivers.remove(self)

    def set_ref(self, held: bool) -> None:
        """Let the watcher keep gevent's loop alive, or no longer."""
        self._watch.ref = held

    def abandon(self) -> None:
        # Stopping a watcher edits the loop's memory only; the loop itself is renewed by gevent
        # before it runs again in the child.  Left alone, it would watch a closed descriptor.
        self._disarm()
        super().abandon()


environment = GeventEnvironment()
