"""A kqueue(2) for Linux, so that the logic of the kqueue poller runs where the tests run.

Faithful in what the poller relies on (BSD manual, kqueue(2)): one entry per (ident, filter);
EV_ADD updates an entry; EV_DELETE and EV_ENABLE answer ENOENT without one and EBADF on a
closed descriptor; closing a descriptor removes its entries silently, even when duplicates
exist; entries are level-triggered; EV_EOF; EVFILT_TIMER in milliseconds; the kqueue itself
is readable while an event is pending.

Waiting is done by poll(2) on the members.  An epoll that holds the same members serves only
as the pollable descriptor behind `fileno()`; it is inside another one, which keeps its number
when the inner one is renewed because a duplicate kept a dead entry in it.
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, NamedTuple

from hub.pollers._timerfd import TimerFd

__all__ = ["CONSTANTS", "FakeKevent", "FakeKqueue", "with_kqueue"]

CONSTANTS = {
    "KQ_FILTER_READ": -1,
    "KQ_FILTER_WRITE": -2,
    "KQ_FILTER_TIMER": -7,
    "KQ_EV_ADD": 0x1,
    "KQ_EV_DELETE": 0x2,
    "KQ_EV_ENABLE": 0x4,
    "KQ_EV_ONESHOT": 0x10,
    "KQ_EV_EOF": 0x8000,
}
_READ, _WRITE, _TIMER = -1, -2, -7
_ADD, _DELETE, _ENABLE, _ONESHOT, _EOF = 0x1, 0x2, 0x4, 0x10, 0x8000
_IN, _OUT, _ERR, _HUP, _NVAL = 0x1, 0x4, 0x8, 0x10, 0x20
_BITS = {_READ: _IN, _WRITE: _OUT}

Original = Callable[[str, str], Any]


class FakeKevent(NamedTuple):
    """What select.kevent is: same names, same order, same defaults."""

    ident: int
    filter: int = _READ
    flags: int = _ADD
    fflags: int = 0
    data: int = 0
    udata: int = 0


class _Timer(NamedTuple):
    fd: TimerFd
    flags: int


class FakeKqueue:
    """What select.kqueue() returns."""

    def __init__(self, original: Original) -> None:
        self._original = original
        self._poll = original("select", "poll")()
        self._make_epoll = original("select", "epoll")
        self._shadow = self._make_epoll()
        self._mirrored: dict[int, int] = {}
        self._outer = self._make_epoll()
        self._outer.register(self._shadow.fileno(), _IN)
        # (descriptor, filter) -> the open file that the entry belongs to.
        self._entries: dict[tuple[int, int], tuple[int, int]] = {}
        self._timers: dict[int, _Timer] = {}
        self.closed = False

    def close(self) -> None:
        self.closed = True
        self._shadow.close()
        self._outer.close()
        for timer in self._timers.values():
            timer.fd.close()
        self._timers.clear()
        self._entries.clear()

    def fileno(self) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")
        number: int = self._outer.fileno()
        return number

    def control(
        self,
        changes: Iterable[FakeKevent] | None,
        max_events: int,
        timeout: float | None = None,
    ) -> list[FakeKevent]:
        if self.closed:
            raise ValueError("I/O operation on closed kqueue object")
        os.get_inheritable(self._outer.fileno())  # EBADF when something closed it
        for change in changes or ():
            if change.filter == _TIMER:
                self._change_timer(change)
            else:
                self._change(change)
        if max_events == 0:
            return []
        deadline = None if timeout is None else monotonic() + timeout
        while True:
            left = None if deadline is None else max(deadline - monotonic(), 0)
            events = self._wait(left)
            if events is not None:
                return events[:max_events]

    # -- entries -----------------------------------------------------------------------
    def _change(self, change: FakeKevent) -> None:
        key = (change.ident, change.filter)
        status = os.fstat(change.ident)  # EBADF, whatever is asked for
        file = (status.st_dev, status.st_ino)
        if self._entries.get(key) not in (None, file):
            self._forget(change.ident)
        if change.flags & _ADD:
            self._entries[key] = file
        elif key not in self._entries:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        elif change.flags & _DELETE:
            del self._entries[key]
        else:
            assert change.flags & _ENABLE, f"unexpected flags {change.flags:#x}"
            return
        self._mirror(change.ident)

    def _change_timer(self, change: FakeKevent) -> None:
        timer = self._timers.get(change.ident)
        if change.flags & _DELETE:
            if timer is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._drop_timer(change.ident)
            return
        assert change.flags & _ADD, f"unexpected flags {change.flags:#x}"
        assert timer is None, "adding a timer that exists does not restart it everywhere"
        if change.data <= 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        timer = self._timers[change.ident] = _Timer(TimerFd(self._original), change.flags)
        timer.fd.set(change.data / 1000)
        self._shadow.register(timer.fd.fd, _IN)
        self._poll.register(timer.fd.fd, _IN)

    def _drop_timer(self, ident: int) -> None:
        timer = self._timers.pop(ident)
        self._poll.unregister(timer.fd.fd)
        timer.fd.close()

    def _is_current(self, ident: int) -> bool:
        status = os.fstat(ident)
        file = (status.st_dev, status.st_ino)
        return any(self._entries.get((ident, number)) == file for number in _BITS)

    def _forget(self, ident: int) -> None:
        for number in _BITS:
            self._entries.pop((ident, number), None)
        self._mirror(ident)

    def _mirror(self, ident: int) -> None:
        if self._mirrored.pop(ident, 0):
            self._poll.unregister(ident)
            try:
                self._shadow.unregister(ident)
            except OSError:
                self._renew_shadow()
        mask = self._mask(ident)
        if mask:
            self._mirrored[ident] = mask
            self._poll.register(ident, mask)
            self._shadow.register(ident, mask)

    def _renew_shadow(self) -> None:
        self._outer.unregister(self._shadow.fileno())
        self._shadow.close()
        self._shadow = self._make_epoll()
        for fd, mask in self._mirrored.items():
            try:
                self._shadow.register(fd, mask)
            except OSError:
                pass  # closed as well; noticed in the next wait
        for timer in self._timers.values():
            self._shadow.register(timer.fd.fd, _IN)
        self._outer.register(self._shadow.fileno(), _IN)

    def _mask(self, ident: int) -> int:
        return sum(bit for number, bit in _BITS.items() if (ident, number) in self._entries)

    # -- events ------------------------------------------------------------------------
    def _wait(self, timeout: float | None) -> list[FakeKevent] | None:
        """Return events, empty when the time is over, or None to wait on."""
        ready = self._poll.poll(None if timeout is None else timeout * 1000)
        timers = {timer.fd.fd: (ident, timer) for ident, timer in self._timers.items()}
        events = []
        for fd, mask in ready:
            if fd in timers:
                ident, timer = timers[fd]
                timer.fd.clear()
                if timer.flags & _ONESHOT:
                    self._drop_timer(ident)
                events.append(FakeKevent(ident, _TIMER, timer.flags, 0, 1))
                continue
            # An entry of a closed file that is not ready cannot be told from one that is gone.
            if mask & _NVAL or not self._is_current(fd):
                self._forget(fd)
                continue
            flags = _ADD | (_EOF if mask & (_HUP | _ERR) else 0)
            for number, bit in _BITS.items():
                if (fd, number) in self._entries and mask & (bit | _HUP | _ERR):
                    events.append(FakeKevent(fd, number, flags))
        return events if events or not ready else None


def with_kqueue(original: Original) -> Original:
    """Return `original` of a platform that has kqueue and no epoll.

    The real kqueue is used where there is one.
    """
    if hasattr(select, "kqueue"):
        return original

    def of_a_bsd(module: str, name: str) -> Any:
        if module == "select":
            if name == "kqueue":
                return lambda: FakeKqueue(original)
            if name == "kevent":
                return FakeKevent
            if name in CONSTANTS:
                return CONSTANTS[name]
            if name == "epoll":
                raise AttributeError("module 'select' has no attribute 'epoll'")
        if module == "os" and "fd" in name:
            raise AttributeError(f"module 'os' has no attribute {name!r}")
        return original(module, name)

    return of_a_bsd
