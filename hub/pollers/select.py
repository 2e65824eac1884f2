"""select(2), which exists everywhere: descriptors below FD_SETSIZE, cost grows with their number.

The kernel takes descriptors below FD_SETSIZE only (1024 nearly everywhere), whatever limit
the process has; a higher one is refused when it is registered, with the remedy.  One
closed descriptor makes the whole call fail (EBADF) without a word about which one it is, so
all of them are looked at then.  No `fileno()`, no timer: see `hub.pollers.poll`.
"""

from __future__ import annotations

import errno
from typing import Any

from hub.errors import BadDescriptorError, UnsupportedError
from hub.pollers.base import READ, WRITE, Poller, is_open
from hub.pollers.poll import refuse_files

__all__ = ["SelectPoller"]


class SelectPoller(Poller):
    """A poller on select(2)."""

    name = "select"
    needs = ("select",)

    def _open(self) -> None:
        self._select: Any = self._original("select", "select")
        # Dictionaries and not sets: select() reports in the order in which it is asked.
        self._readers: dict[int, None] = {}
        self._writers: dict[int, None] = {}
        if self._is_too_high(self._wakeup.fd):
            raise UnsupportedError(
                f"the select poller needs a descriptor below FD_SETSIZE for itself and was given "
                f"{self._wakeup.fd}; use another poller (HUB_POLLER), or create it before the "
                "process opens so many"
            )
        self._readers[self._wakeup.fd] = None

    def _release(self) -> None:
        self._readers.clear()
        self._writers.clear()

    def _is_too_high(self, fd: int) -> bool:
        try:
            self._select((fd,), (), (), 0)
        except ValueError:
            return True
        return False

    def _attach(self, fd: int, events: int) -> None:
        try:
            refuse_files(fd)
        except OSError:
            self._detach(fd)
            raise
        if fd not in self._interest and self._is_too_high(fd):
            raise BadDescriptorError(
                f"cannot register descriptor {fd} with the select poller: select(2) takes only "
                "descriptors below FD_SETSIZE (1024 nearly everywhere); use the epoll, kqueue or "
                "poll poller (HUB_POLLER)"
            )
        self._detach(fd)
        if events & READ:
            self._readers[fd] = None
        if events & WRITE:
            self._writers[fd] = None

    def _detach(self, fd: int) -> None:
        self._readers.pop(fd, None)
        self._writers.pop(fd, None)

    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        try:
            readable, writable, _ = self._select(
                list(self._readers), list(self._writers), (), timeout
            )
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            return self._closed_ones(error)
        events = dict.fromkeys(readable, READ)
        for fd in writable:
            events[fd] = events.get(fd, 0) | WRITE
        if events.pop(self._wakeup.fd, 0):
            self._wakeup.drain()
            self._woken = True
        # What a signal handler unregistered during the wait is not reported.
        interest = self._interest
        ready = [(fd, mask) for fd, mask in events.items() if mask & interest.get(fd, 0)]
        return self._fair(ready, max_events)

    def _closed_ones(self, error: OSError) -> list[tuple[int, int]]:
        """Drop the descriptors that are closed and return them with their interest."""
        if not is_open(self._wakeup.fd):
            return self._end(error)
        lost = []
        for fd, events in list(self._interest.items()):
            if not is_open(fd):
                self._detach(fd)
                del self._interest[fd]
                lost.append((fd, events))
        return lost
