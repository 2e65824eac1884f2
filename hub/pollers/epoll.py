"""epoll(7), the poller of Linux: the cost of a wait does not depend on how many wait.

Why it stays epoll under green threads: gevent and eventlet hide `select.epoll` because its
`poll` would block all green threads, and programs then fall back to select(2) or poll(2),
whose cost grows with the number of descriptors (milliseconds at a few thousand), or which
fail above descriptor 1023.  But an epoll descriptor is itself pollable.  A green loop keeps
one watcher on `fileno()` and calls `poll(0)` when it fires: about 10 microseconds per wake-up
under gevent, with ten descriptors or ten thousand.

Entries and descriptors
-----------------------
The kernel keys an entry by (number, open file), not by number; epoll_ctl takes the
number and looks the file up again.  Three consequences:

* A number that was closed and opened again has no entry: MOD answers ENOENT, and ADD is
  right.  The reverse, EEXIST, is answered by MOD.
* An entry lives until the *open file* is closed, which a duplicate (dup, or the copy in a
  forked child) delays.  Such a dead entry goes on to report events under its old number and
  cannot be removed: DEL looks up a number that is closed (EBADF), or some other file
  (ENOENT).  Level-triggered, it would spin.  The remedy is a new epoll object into which
  everything that is registered, and nothing else, is entered again.
* A number with a dead entry may be registered anew for another file; events then tell the
  two apart by nothing.  Numbers whose DEL or MOD failed are remembered as suspects, and an
  event on a suspect is checked with a fresh epoll object that has seen no other file.

Two levels
----------
A foreign epoll would go deaf when the object behind the descriptor it watches is replaced.
So `fileno()` is a second epoll object, the gate, that holds only the first.  It is made
when it is asked for; the native path never goes through it.  Measured, the additional
level costs nothing that can be seen (9.8 to 10.1 microseconds with it, as without).
Armed watchers matter more: the kernel walks all members when a foreign epoll *adds* an
epoll descriptor.

Forks
-----
The object is shared with a forked child.  There it may be closed, but no epoll_ctl may be
called: it would act on the parent's entries.  See `hub.pollers.base`.
"""

from __future__ import annotations

import errno
from typing import Any

from hub.pollers._timerfd import TimerFd
from hub.pollers.base import READ, WRITE, Poller, is_open

__all__ = ["EpollPoller"]

_BOTH = READ | WRITE

# Checking suspects costs four system calls per event; with more of them than this, and than
# descriptors that are registered, a new epoll object is cheaper.
_MAX_SUSPECTS = 64


class EpollPoller(Poller):
    """A poller on epoll(7)."""

    name = "epoll"
    needs = ("epoll",)
    _hears_of_closing = False

    _epoll: Any = None
    _gate: Any = None
    _timer: TimerFd | None = None

    def _open(self) -> None:
        self._make = self._original("select", "epoll")
        self._suspects: set[int] = set()
        self._stale = False
        self._rebuilt = 0
        self._epoll = self._make()
        self._epoll.register(self._wakeup.fd, READ)

    def _release(self) -> None:
        for epoll in (self._gate, self._epoll):
            if epoll is not None:
                try:
                    epoll.close()
                except OSError:
                    pass  # something closed all descriptors of the process
        if self._timer is not None:
            self._timer.close()

    # -- interest ----------------------------------------------------------------------
    def _attach(self, fd: int, events: int) -> None:
        if fd not in self._interest:
            try:
                self._epoll.register(fd, events)
            except FileExistsError:
                # A duplicate brought the file of an old entry back to its old number.
                self._epoll.modify(fd, events)
            return
        try:
            self._epoll.modify(fd, events)
        except FileNotFoundError:
            self._suspect(fd)
            self._epoll.register(fd, events)
        except OSError:
            self._suspect(fd)
            raise

    def _detach(self, fd: int) -> None:
        try:
            self._epoll.unregister(fd)
        except OSError:
            self._suspect(fd)

    def _verify(self, fd: int, events: int) -> bool:
        try:
            self._epoll.modify(fd, events)  # as it is; changes nothing
        except OSError as error:
            if error.errno == errno.EBADF and is_open(fd):
                return True
            self._suspect(fd)
            return False
        return True

    def _suspect(self, fd: int) -> None:
        """Remember that an entry of this number may be left in the kernel."""
        self._suspects.add(fd)
        if len(self._suspects) > max(_MAX_SUSPECTS, len(self._interest)):
            self._stale = True

    # -- waiting -----------------------------------------------------------------------
    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        if self._stale:
            lost = self._rebuild()
            if lost:
                return lost
        try:
            ready = self._epoll.poll(timeout, max_events)
        except (OSError, ValueError) as error:
            return self._end(error)
        wanted = self._interest.get
        for fd, mask in ready:
            if mask & ~wanted(fd, 0):
                break
        else:
            # Nearly always: what the kernel reports is just what was asked for.
            if not self._suspects:
                events: list[tuple[int, int]] = ready
                return events
        return self._sort_out(ready)

    def _sort_out(self, ready: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return what to report when not everything is plainly what was asked for."""
        # A dictionary, because a suspect may have reported for two files.
        events: dict[int, int] = {}
        for fd, mask in ready:
            wanted = self._interest.get(fd, 0)
            if mask & ~wanted or fd in self._suspects:
                mask = self._sift(fd, mask, wanted)
            if mask:
                events[fd] = mask
        if self._stale and not self._closed:
            events.update(self._rebuild())
        return list(events.items())

    def _sift(self, fd: int, mask: int, wanted: int) -> int:
        """Return what to report of one such event; note a dead entry in `_stale`."""
        if fd == self._wakeup.fd:
            self._wakeup.drain()
            self._woken = True
            return 0
        if self._timer is not None and fd == self._timer.fd:
            self._timer.clear()
            self._woken = True
            return 0
        if fd in self._suspects and wanted:
            mask = self._ask(fd, wanted)
        if mask & ~_BOTH:
            mask = _BOTH
        mask &= wanted
        if not mask:
            self._stale = True
        return mask

    def _ask(self, fd: int, wanted: int) -> int:
        """Return the events of the file that is open under this number now."""
        try:
            probe = self._make()
        except OSError:
            return 0  # no descriptor is left: renew the object, which frees one first
        try:
            probe.register(fd, wanted)
            return sum(mask for _, mask in probe.poll(0))
        except OSError:
            return 0  # closed again
        finally:
            probe.close()

    def _rebuild(self) -> list[tuple[int, int]]:
        """Enter what is registered into a new epoll object; return what turns out closed."""
        old = self._epoll
        if self._gate is not None:
            # Not left to the closing of `old`: a forked child may hold a copy of it.
            self._gate.unregister(old.fileno())
        try:
            new = self._make()
        except OSError:
            # No descriptor is left; closing the old object frees one.
            old.close()
            try:
                new = self._make()
            except OSError as error:
                return self._end(error)
        new.register(self._wakeup.fd, READ)
        if self._timer is not None:
            new.register(self._timer.fd, READ)
        lost = []
        for fd, events in list(self._interest.items()):
            try:
                new.register(fd, events)
            except OSError:
                del self._interest[fd]
                lost.append((fd, events))
        if self._gate is not None:
            self._gate.register(new.fileno(), READ)
        self._epoll = new
        old.close()
        self._suspects.clear()
        self._stale = False
        self._rebuilt += 1
        return lost

    # -- for other loops ---------------------------------------------------------------
    def fileno(self) -> int:
        """Return a descriptor that is readable while `poll(0)` has something to say."""
        if self._closed:
            raise self._refusal()
        if self._gate is None:
            gate = self._make()
            gate.register(self._epoll.fileno(), READ)
            self._gate = gate
        number: int = self._gate.fileno()
        return number

    def set_timer(self, delay: float | None) -> None:
        """Make `fileno()` readable after `delay` seconds; None disarms the timer."""
        if self._closed:
            raise self._refusal()
        if self._timer is None:
            if delay is None:
                return
            timer = TimerFd(self._original)
            try:
                self._epoll.register(timer.fd, READ)
            except OSError:
                timer.close()
                raise
            self._timer = timer
        self._timer.set(delay)

    def _owns(self, fd: int) -> bool:
        return (
            super()._owns(fd)
            or fd == self._epoll.fileno()
            or (self._gate is not None and fd == self._gate.fileno())
            or (self._timer is not None and fd == self._timer.fd)
        )

    def _details(self) -> str:
        timer = ", timer set" if self._timer is not None and self._timer.armed else ""
        rebuilt = f", rebuilt {self._rebuilt} times" if self._rebuilt else ""
        return timer + rebuilt
