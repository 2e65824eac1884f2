"""Ends a wait from outside: one descriptor that any thread or signal handler makes readable.

On Linux it is an eventfd, whose counter merges any number of wake-ups into one; elsewhere
a non-blocking pipe, which merges them when it is full.  There is no "already signalled"
flag in front of the system call: between setting such a flag and writing, a signal handler
may raise, and every later wake-up would be lost.

Closing is the delicate part.  A writer in another thread has read the descriptor number
but not yet entered write(2); were the number closed now and given to a new socket, eight
stray bytes would go to a peer.  So writers announce themselves, and whoever comes last,
`close()` or a writer, closes the descriptors, once.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Wakeup", "close_quietly"]

_ONE = (1).to_bytes(8, sys.byteorder)

# The capacity of a pipe on Linux; one read empties it.
_PIPE_SIZE = 65536


def close_quietly(close: Callable[[int], None], descriptors: tuple[int, ...]) -> None:
    """Close descriptors that something may have closed already; meant for finalizers."""
    for fd in descriptors:
        try:
            close(fd)
        except OSError:
            pass  # something closed all descriptors of the process


class Wakeup:
    """A descriptor that is readable from `wake()` until `drain()`.

    Args:
        original: returns the unpatched functions of the os module; the patched ones
            would switch.

    Raises:
        OSError: no descriptor is left.
    """

    def __init__(self, original: Callable[[str, str], Any]) -> None:
        self.fd: int
        self._read = original("os", "read")
        self._write = original("os", "write")
        try:
            eventfd = original("os", "eventfd")
        except AttributeError:
            self.fd, self._write_fd = original("os", "pipe")()
            self._payload, self._size = b"\0", _PIPE_SIZE
            descriptors: tuple[int, ...] = (self.fd, self._write_fd)
            os.set_blocking(self.fd, False)
            os.set_blocking(self._write_fd, False)
        else:
            flags = original("os", "EFD_NONBLOCK") | original("os", "EFD_CLOEXEC")
            self.fd = self._write_fd = eventfd(0, flags)
            self._payload, self._size = _ONE, len(_ONE)
            descriptors = (self.fd,)
        self._descriptors = descriptors
        self._is_open = True
        # One entry per writer; append and pop are atomic, += on a counter is not.
        self._writers: list[None] = []
        # Also closes what was never closed; calling it again does nothing.
        self._finalizer = weakref.finalize(
            self, close_quietly, original("os", "close"), descriptors
        )
        self._finalizer.atexit = False

    def owns(self, fd: int) -> bool:
        """Return whether `fd` is one of its descriptors."""
        return fd in self._descriptors

    def wake(self) -> None:
        """Make the descriptor readable; never blocks, never raises."""
        self._writers.append(None)
        try:
            if self._is_open:
                self._write(self._write_fd, self._payload)
        except OSError:
            # Full means that a wake-up is pending already.  Anything else means that the
            # descriptor was closed behind our back, which the poll itself will report.
            pass
        finally:
            self._writers.pop()
            if not self._is_open:
                self._close_after_writers()

    def drain(self) -> None:
        """Make the descriptor unreadable again.

        What was appended somewhere before the wake-up is visible to the caller now.
        """
        try:
            self._read(self.fd, self._size)
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close the descriptors as soon as no writer uses them; idempotent."""
        self._is_open = False
        self._close_after_writers()

    def abandon(self) -> None:
        """Close a forked child's copies; writers of that moment exist only in the parent."""
        self._is_open = False
        self._finalizer()

    def _close_after_writers(self) -> None:
        if not self._writers:
            self._finalizer()
