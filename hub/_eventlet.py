"""The eventlet environment.

eventlet is used through its own hub, so a program that uses it without monkey-patching
is green here as well.  eventlet's loop has no thread-safe way in: a wake from another
native thread goes through our hub of the waiting thread, whose wake-up descriptor the
eventlet loop watches.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import eventlet
import greenlet
from eventlet import hubs, patcher
from greenlet import getcurrent

from hub._drivers import LONGEST_TIMER, Driver, GreenDriver
from hub.arguments import has_time
from hub.environment import (
    Environment,
    Task,
    Waiter,
    blocking_call,
    check_may_wait,
    running_callbacks,
)
from hub.errors import HubClosedError
from hub.shared import get_hub, hubs_of

if TYPE_CHECKING:
    from hub.loop import Hub

__all__ = ["EventletDriver", "EventletEnvironment", "EventletWaiter", "environment"]

_get_ident: Callable[[], int] = patcher.original("_thread").get_ident


class EventletWaiter(Waiter):
    """Parks a greenlet in eventlet's hub."""

    __slots__ = ("_greenlet", "_home", "_loop", "_thread")

    def __init__(self) -> None:
        self._greenlet: Any = None
        self._home: Hub | None = None
        self._loop: Any = None
        self._thread = 0
        self.given = None
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
        loop = self._loop = hubs.get_hub()
        try:
            home: Hub = loop._home_of_hub  # kept there: looking it up costs more
        except AttributeError:
            home = loop._home_of_hub = get_hub(environment)
        if home.closed:
            home = loop._home_of_hub = get_hub(environment)
        home.ensure_running()
        self._thread = _get_ident()
        self._home = home
        timer = None
        if timeout is not None:
            timer = loop.schedule_call_global(min(timeout, LONGEST_TIMER), self._resume)
        self._greenlet = current
        try:
            # Woken by another native thread after the first look: that wake found no home.
            if not self.woken:
                loop.switch()
        finally:
            self._greenlet = None
            if timer is not None:
                timer.cancel()
        return self.woken

    def wake(self) -> None:
        if self.woken:
            return
        self.woken = True
        home = self._home
        if home is None:
            return
        if self._thread != _get_ident():
            try:
                home.call_soon_threadsafe(self._schedule)
            except HubClosedError:
                # Our hub was closed while the greenlet waited; the thread may have another by now.
                for hub in hubs_of(environment):
                    if hub.thread == self._thread:
                        hub.call_soon_threadsafe(self._schedule)
            return
        loop = hubs.get_hub()
        current = getcurrent()
        if current is loop.greenlet and current not in running_callbacks:
            # A signal handler inside the loop's wait: make a descriptor ready, too.
            home.poller.wakeup()
        loop.schedule_call_global(0, self._resume)

    def _schedule(self) -> None:
        hubs.get_hub().schedule_call_global(0, self._resume)

    def _resume(self) -> None:
        """Switch to the parked greenlet; runs in eventlet's hub."""
        target = self._greenlet
        if target is not None:
            old = self._loop.greenlet
            if getcurrent() is not old and target.parent is old:
                # In a child, or after another use_hub(): it must not fall back into the old loop.
                target.parent = hubs.get_hub().greenlet
            target.switch()


class EventletEnvironment(Environment):
    """Greenlets scheduled by eventlet."""

    name = "eventlet"
    green = True
    timeout_types = (greenlet.GreenletExit, eventlet.Timeout)

    # Without a function in between: most of what waiting costs is calls.
    waiter = EventletWaiter
    current = staticmethod(getcurrent)
    thread_id = staticmethod(_get_ident)

    def sleep(self, seconds: float = 0) -> None:
        if running_callbacks:
            check_may_wait(getcurrent())
        eventlet.sleep(min(seconds, LONGEST_TIMER) if has_time(seconds) else 0)

    def timeout(self, seconds: float) -> Any:
        return eventlet.Timeout(seconds)

    def _start(self, task: Task, body: Callable[[], None]) -> Callable[[], None] | None:
        thread = eventlet.spawn(body)
        # A greenlet that is killed before it ever ran does not reach its own `finally`.
        thread.link(task._ended)
        # From the hub, so that the killer does not switch into its victim.
        return lambda: hubs.get_hub().schedule_call_global(0, thread.kill)

    @property
    def socket_module(self) -> Any:
        return importlib.import_module("eventlet.green.socket")

    def original(self, module: str, name: str) -> Any:
        return getattr(patcher.original(module), name)

    def refused_to_wait(self, error: BaseException) -> bool:
        return type(error) in _REFUSALS and str(error).lower().endswith("mainloop")

    # eventlet calls `switch_out()` of a greenlet that is about to switch to the loop.
    def forbid_waits(self, task: Any) -> None:
        task.__dict__["switch_out"] = _refuse_to_wait

    def allow_waits(self, task: Any) -> None:
        task.__dict__.pop("switch_out", None)

    def make_driver(self, hub: Hub) -> Driver:
        return EventletDriver(hub)


#: What eventlet raises ("do not call blocking functions from the mainloop", "Cannot switch to
#: MAINLOOP from MAINLOOP"); it has no types of its own for it.
_REFUSALS = (AssertionError, RuntimeError)


def _refuse_to_wait() -> None:
    """End the wait in the next turn of the loop: eventlet ignores what is raised in here."""
    task = getcurrent()

    def refuse() -> None:
        hub = running_callbacks.get(task)
        if hub is not None:  # else it was a sleep(0), and the callback has returned
            task.throw(blocking_call(hub))

    hubs.get_hub().schedule_call_global(0, refuse)


class EventletDriver(GreenDriver):
    """Runs a hub in callbacks of the eventlet hub of the thread that made it."""

    def __init__(self, hub: Hub) -> None:
        super().__init__(hub)
        self._loop = hubs.get_hub()

    @property
    def belongs_here(self) -> bool:
        """Tell whether the calling thread still runs the eventlet hub of this driver."""
        return hubs.get_hub() is self._loop

    def _start_watch(self, fd: int, write: bool, callback: Callable[[], None]) -> Any:
        event = self._loop.WRITE if write else self._loop.READ
        return self._loop.add(event, fd, lambda _: callback(), _ignore, _ignore)

    def _stop_watch(self, token: Any) -> None:
        self._loop.remove(token)

    def _start_timer(self, delay: float, callback: Callable[[], None]) -> Any:
        return self._loop.schedule_call_global(delay, callback)

    def _stop_timer(self, token: Any) -> None:
        token.cancel()

    def _call_soon(self, callback: Callable[[], None]) -> None:
        self._loop.schedule_call_global(0, callback)

    def _outside(self) -> bool:
        current = getcurrent()
        return current is self._loop.greenlet and current not in running_callbacks

    def abandon(self) -> None:
        # Nothing may be taken out of the inherited loop's epoll object: it is the parent's.
        # (eventlet's hub on asyncio cannot be left: eventlet has the child go on in it.)
        if self.belongs_here and not hasattr(self._loop, "loop"):
            _leave(self._loop)
        super().abandon()


def _leave(old: Any) -> None:
    """Give the child of a fork a new loop.

    What waited in the old one, the parent's, stays there: resumed in the child, it would take
    bytes from descriptors that are the parent's.  The task that forked goes on.
    """
    module = sys.modules[type(old).__module__]
    hubs.use_hub(module if getattr(module, "Hub", None) is type(old) else None)
    old.abort()
    new = hubs.get_hub().greenlet
    new.parent = old.greenlet.parent
    current = getcurrent()
    if current.parent is old.greenlet:
        current.parent = new  # where it falls back to when it ends: not into the old loop


def _ignore(*_: Any) -> None:
    """eventlet tells when it closes a descriptor; ours are closed by us."""


environment = EventletEnvironment()
