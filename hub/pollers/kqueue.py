"""kqueue(2), the poller of macOS and the BSDs: the cost does not depend on how many wait.

The two directions of a descriptor are two entries (filters), which report separately and are
merged here.  Closing a descriptor removes its entries even if a duplicate exists, silently;
see the audit in `hub.pollers.base`.  `fileno()` is the kqueue itself, and the timer is one
of its entries.  A kqueue is not inherited by a forked child at all.
"""

from __future__ import annotations

import errno
from math import ceil
from typing import Any

from hub.pollers.base import READ, WRITE, Poller, is_open
from hub.pollers.poll import refuse_files

__all__ = ["KqueuePoller"]

# Identifiers count per filter, so this one cannot collide with a descriptor.
_TIMER_IDENT = 1

# Some thirty years.
_LATEST_MS = 10**12


class KqueuePoller(Poller):
    """A poller on kqueue(2)."""

    name = "kqueue"
    needs = ("kqueue", "kevent")
    _hears_of_closing = False

    _kqueue: Any = None

    def _open(self) -> None:
        def constant(name: str) -> int:
            value: int = self._original("select", name)
            return value

        self._kevent = self._original("select", "kevent")
        self._filters = (
            (READ, constant("KQ_FILTER_READ")),
            (WRITE, constant("KQ_FILTER_WRITE")),
        )
        self._directions = {number: event for event, number in self._filters}
        self._timer_filter = constant("KQ_FILTER_TIMER")
        self._add = constant("KQ_EV_ADD")
        self._delete = constant("KQ_EV_DELETE")
        self._enable = constant("KQ_EV_ENABLE")
        self._once = constant("KQ_EV_ONESHOT")
        self._timer_set = False
        self._kqueue = self._original("select", "kqueue")()
        self._change(self._wakeup.fd, self._filters[0][1], self._add)

    def _release(self) -> None:
        if self._kqueue is not None:
            try:
                self._kqueue.close()
            except OSError:
                pass  # in a forked child there is none, or something closed everything

    def _change(self, ident: int, number: int, flags: int, data: int = 0) -> None:
        self._kqueue.control([self._kevent(ident, number, flags, 0, data)], 0, 0)

    def _discard(self, ident: int, number: int) -> None:
        try:
            self._change(ident, number, self._delete)
        except OSError:
            pass  # closing the descriptor removed it, or it was never there

    # -- interest ----------------------------------------------------------------------
    def _attach(self, fd: int, events: int) -> None:
        refuse_files(fd)
        try:
            for event, number in self._filters:
                if events & event:
                    self._change(fd, number, self._add)
                else:
                    self._discard(fd, number)
        except OSError:
            # A descriptor that takes one direction only, say: leave nothing of it behind.
            self._detach(fd)
            raise

    def _detach(self, fd: int) -> None:
        for _, number in self._filters:
            self._discard(fd, number)

    def _verify(self, fd: int, events: int) -> bool:
        try:
            for event, number in self._filters:
                if events & event:
                    # Enabled it is already; ENOENT tells that the entry is gone.
                    self._change(fd, number, self._enable)
        except OSError as error:
            return error.errno == errno.EBADF and is_open(fd)
        return True

    # -- waiting -----------------------------------------------------------------------
    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        # Everything that can be ready, so that no descriptor reports half of its events.
        room = 2 * len(self._interest) + 2
        try:
            ready = self._kqueue.control(None, room, timeout)
        except (OSError, ValueError) as error:
            return self._end(error)
        interest = self._interest
        events: dict[int, int] = {}
        for entry in ready:
            fd, number = entry.ident, entry.filter
            if number == self._timer_filter:
                self._timer_set = False
                self._woken = True
                continue
            event = self._directions[number] & interest.get(fd, 0)
            if event:
                events[fd] = events.get(fd, 0) | event
            elif fd == self._wakeup.fd:
                self._wakeup.drain()
                self._woken = True
            else:
                self._discard(fd, number)
        return self._fair(list(events.items()), max_events)

    # -- for other loops ---------------------------------------------------------------
    def fileno(self) -> int:
        """Return a descriptor that is readable while `poll(0)` has something to say."""
        if self._closed:
            raise self._refusal()
        number: int = self._kqueue.fileno()
        return number

    def set_timer(self, delay: float | None) -> None:
        """Make `fileno()` readable after `delay` seconds; None disarms the timer."""
        if self._closed:
            raise self._refusal()
        # Adding a timer that exists leaves it as it is on some systems.
        self._discard(_TIMER_IDENT, self._timer_filter)
        self._timer_set = False
        if delay is not None:
            # Milliseconds; FreeBSD refuses 0.
            data = ceil(min(max(delay * 1000, 1), _LATEST_MS))
            self._change(_TIMER_IDENT, self._timer_filter, self._add | self._once, data)
            self._timer_set = True

    def _owns(self, fd: int) -> bool:
        return super()._owns(fd) or fd == self._kqueue.fileno()

    def _details(self) -> str:
        return ", timer set" if self._timer_set else ""
