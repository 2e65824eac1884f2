"""A timer that is a descriptor (timerfd_create(2), Linux): readable when the time is over.

Python has it since 3.13; before that it is reached through ctypes, which is imported only
when a timer is asked for.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import Any

from hub.errors import UnsupportedError
from hub.pollers._wakeup import close_quietly

__all__ = ["TimerFd"]

# TFD_NONBLOCK and TFD_CLOEXEC are defined as these (sys/timerfd.h).
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

# A zero would disarm the timer.
_SOONEST = 1e-9

# Some thirty years: beyond any delay that is meant, within any time_t.
_LATEST = 1e9

_Settime = Callable[[int, float], None]


def _from_os(original: Callable[[str, str], Any]) -> tuple[int, _Settime]:
    """Return a descriptor and its setter by os.timerfd_create; AttributeError without it."""
    create = original("os", "timerfd_create")
    settime = original("os", "timerfd_settime")

    def set_seconds(fd: int, seconds: float) -> None:
        settime(fd, initial=seconds)

    return create(time.CLOCK_MONOTONIC, flags=_FLAGS), set_seconds


def _from_libc() -> tuple[int, _Settime]:
    """Return a descriptor and its setter by the C library; UnsupportedError without it."""
    try:
        import ctypes

        libc = ctypes.CDLL(None, use_errno=True)
        create, settime = libc.timerfd_create, libc.timerfd_settime
    except (ImportError, AttributeError) as error:
        raise UnsupportedError(
            f"this platform has no timerfd that Python can reach ({error}); "
            "use Python 3.13 or newer, or pass the delay to poll()"
        ) from error

    class Specification(ctypes.Structure):
        """struct itimerspec: interval, then first expiry, in seconds and nanoseconds."""

        _fields_ = tuple(
            (name, ctypes.c_long)
            for name in ("interval_s", "interval_ns", "initial_s", "initial_ns")
        )

    def fail(what: str) -> OSError:
        number = ctypes.get_errno()
        return OSError(number, f"{what}: {os.strerror(number)}")

    def set_seconds(fd: int, seconds: float) -> None:
        whole = int(seconds)
        nanoseconds = min(int((seconds - whole) * 1e9 + 0.5), 999_999_999)
        specification = Specification(0, 0, whole, nanoseconds)
        if settime(fd, 0, ctypes.byref(specification), None) != 0:
            raise fail("timerfd_settime")

    fd = create(time.CLOCK_MONOTONIC, _FLAGS)
    if fd < 0:
        raise fail("timerfd_create")
    return fd, set_seconds


class TimerFd:
    """One timer on the monotonic clock.

    Args:
        original: returns the unpatched functions of the os module.

    Raises:
        UnsupportedError: neither Python nor the C library offers timerfd.
        OSError: no descriptor is left.
    """

    def __init__(self, original: Callable[[str, str], Any]) -> None:
        self._read = original("os", "read")
        close = original("os", "close")
        try:
            self.fd, self._settime = _from_os(original)
        except AttributeError:
            self.fd, self._settime = _from_libc()
        self.armed = False
        self._finalizer = weakref.finalize(self, close_quietly, close, (self.fd,))
        self._finalizer.atexit = False

    def set(self, delay: float | None) -> None:
        """Become readable after `delay` seconds, at once for 0 and less, never for None."""
        if delay is not None:
            self._settime(self.fd, min(max(delay, _SOONEST), _LATEST))
            self.armed = True
        elif self.armed:
            self._settime(self.fd, 0.0)
            self.armed = False

    def clear(self) -> None:
        """Become unreadable after the time was over."""
        try:
            self._read(self.fd, 8)
        except BlockingIOError:
            return  # it was set again in the meantime, and that time is not over
        self.armed = False

    def close(self) -> None:
        """Close the descriptor; idempotent."""
        self._finalizer()
