"""Polling of descriptors under the names of Kombu's module, done by `hub.pollers`.

New code takes `hub.pollers.create_poller`, or rather `hub.get_hub()`.
"""

from __future__ import annotations

import errno
from typing import Any

from greenkombu.utils.compat import fileno

__all__ = [
    "ERR",
    "POLL_ERR",
    "POLL_READ",
    "POLL_WRITE",
    "READ",
    "SELECT_BAD_FD",
    "WRITE",
    "poll",
]

#: The values of poll(2): POLLIN, POLLOUT, POLLERR | POLLHUP.
READ = POLL_READ = 0x001
WRITE = POLL_WRITE = 0x004
ERR = POLL_ERR = 0x008 | 0x010

#: What select(2) says about a descriptor that is closed (on Windows: that is no socket).
SELECT_BAD_FD = {errno.EBADF} | {
    code for code in [getattr(errno, "WSAENOTSOCK", None)] if code is not None
}


class _Poller:
    """A poller of the hub that takes file objects and the ERR flag too."""

    def __init__(self, poller: Any) -> None:
        self._poller = poller

    def register(self, fd: Any, events: int) -> None:
        """Wait for events of fd from now on; replaces what was registered for it.

        Errors of the descriptor are reported as the registered direction, always.
        """
        self._poller.register(fileno(fd), events & (READ | WRITE) or READ)

    def unregister(self, fd: Any) -> None:
        """Do not wait for fd any more; one that is not registered is no error."""
        self._poller.unregister(fileno(fd))

    def poll(self, timeout: float | None) -> list[tuple[int, int]]:
        """Return (descriptor, events) of those that are ready.

        Args:
            timeout: seconds; None waits for ever, 0 does not wait.  Signals do not end the wait.
        """
        ready: list[tuple[int, int]] = self._poller.poll(timeout)
        return ready

    def close(self) -> None:
        """Release the poller's own descriptors."""
        self._poller.close()


def poll(name: str | None = None) -> _Poller:
    """Return a new poller: the best one that the platform has, under green threads as well.

    Args:
        name: which poller to take, else the variable ``HUB_POLLER`` may say.
    """
    from hub.environment import get_environment
    from hub.pollers import create_poller

    return _Poller(create_poller(name, get_environment().original))
