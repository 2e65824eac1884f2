"""poll(2), for platforms without epoll and kqueue: any descriptor, cost grows with their number.

Each wait hands the whole set to the kernel, and there is no kernel object that another
loop could watch, hence no `fileno()` and no timer.  Below a hundred descriptors it is as
fast as any other.  A closed descriptor is reported by the kernel itself (POLLNVAL).
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from hub.pollers.base import READ, WRITE, Poller

__all__ = ["PollPoller", "refuse_files"]

_BOTH = READ | WRITE
_POLLNVAL = 0x20


def refuse_files(fd: int) -> None:
    """Raise OSError for a closed descriptor (EBADF), a regular file or a directory (EPERM).

    epoll refuses these itself; poll(2) and select(2) take a file and call it ready for
    ever.  A program must not find that out by changing the poller.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


class PollPoller(Poller):
    """A poller on poll(2)."""

    name = "poll"
    needs = ("poll",)

    def _open(self) -> None:
        self._poll: Any = self._original("select", "poll")()
        self._poll.register(self._wakeup.fd, READ)

    def _release(self) -> None:
        """There is nothing to close."""

    def _attach(self, fd: int, events: int) -> None:
        try:
            refuse_files(fd)
        except OSError:
            if fd in self._interest:
                self._detach(fd)
            raise
        self._poll.register(fd, events)

    def _detach(self, fd: int) -> None:
        self._poll.unregister(fd)

    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        ready = self._poll.poll(None if timeout is None else timeout * 1000)
        interest = self._interest
        events = []
        for fd, mask in ready:
            wanted = interest.get(fd, 0)
            if mask & ~wanted:
                if fd == self._wakeup.fd:
                    if mask & _POLLNVAL:
                        return self._end(OSError(errno.EBADF, os.strerror(errno.EBADF)))
                    self._wakeup.drain()
                    self._woken = True
                    continue
                if not wanted:
                    continue  # unregistered by a signal handler during the wait
                if mask & _POLLNVAL:
                    self._poll.unregister(fd)
                    del interest[fd]
                mask = wanted if mask & ~_BOTH else mask & wanted
            events.append((fd, mask))
        return self._fair(events, max_events)
