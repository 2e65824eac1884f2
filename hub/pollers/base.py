"""What every poller promises, and the part of it that is the same for all of them.

A poller answers one question, which of many descriptors can be read or written now, for
one owner: one green thread or one native thread.  Only `wakeup()` may be called by
anyone else.  It knows nothing of callbacks, timers or green threads, never switches, and
blocks nowhere but in `poll(timeout)`.

Theory of operation
-------------------
*Level-triggered.*  A descriptor is reported for as long as it is ready.  An owner that
takes only part of the bytes, or is interrupted between the report and the read, loses
nothing: the next poll says so again.  Edge-triggered operation would save a system call
here and there, and turn every such interruption into a connection that hangs.

*Errors are readiness.*  Hang-up and error conditions carry no direction that an owner
could act on, so they are reported as the whole registered interest: reading or writing
then returns the error itself.

*Bound late.*  Monkey patching removes `epoll` from the select module and replaces some
functions of os by ones that switch.  All of them are therefore looked up when a poller
is made, through the function `original`, and no module here imports select.  A native
epoll or kqueue serves green threads well: its own descriptor can be polled, so a green
loop waits on that one descriptor (`fileno()`) whatever number stands behind it.

*Closed behind our back.*  An owner should unregister first and close afterwards.  When it
does not, poll(2) and select(2) complain at once, while epoll and kqueue forget the
descriptor without a word and its owner would wait for ever.  So those two are audited: a
few registered descriptors are verified at a time (`AUDIT_BATCH` per `AUDIT_INTERVAL`),
and a waiting poll comes back that often until all of them were seen once.  In every
poller a closed descriptor is dropped and its whole interest is reported once.  A number
that was closed and opened again for another file is noticed by epoll and kqueue only;
to poll(2) and select(2) it is simply the new file.

*Forks.*  The kernel objects behind inherited descriptors belong to the parent: an
EPOLL_CTL_DEL in the child makes the parent deaf, and draining the wake-up descriptor
swallows the parent's wake-ups.  A fork hook therefore marks every inherited poller as
closed before any other code of the child runs; what is left to do is to close this
process's copies of the descriptors (`abandon()`, or `close()`, or garbage collection).
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping
from math import inf
from time import monotonic
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

from hub import _fork
from hub.environment import get_environment
from hub.errors import BadDescriptorError, PollerClosedError, UnsupportedError
from hub.pollers._wakeup import Wakeup

__all__ = ["MAX_EVENTS", "READ", "WRITE", "Original", "Poller", "is_open", "unpatched"]

# The values of EPOLLIN/POLLIN and EPOLLOUT/POLLOUT, so that masks need no translation.
READ = 1
WRITE = 4
_BOTH = READ | WRITE

#: Events per poll.  Enough to spread the system call over many callbacks; few enough that
#: timers and wake-ups get their turn while ten thousand descriptors are ready.
MAX_EVENTS = 256

#: Verifying a descriptor costs one system call, with its bookkeeping 3.5 microseconds (measured):
#: 16 of them per 0.1 s are a twentieth of a percent of one processor; 64, as it was once, were an
#: eighth of what a thousand idle connections cost.  A thousand are all seen within seven seconds.
AUDIT_BATCH = 16
AUDIT_INTERVAL = 0.1

# Milliseconds in a C int end after 24 days; a longer wait is made of several.
_LONGEST_WAIT = 86_400.0

# Numbers beyond a C int are no descriptors; the system calls would raise OverflowError.
_LARGEST_DESCRIPTOR = 2**31 - 1

# The descriptor is open, but waiting for it is refused: a regular file or directory
# (EPERM; EINVAL and ENODEV on the BSDs), or a loop of epoll descriptors (EINVAL, ELOOP).
_UNWAITABLE = frozenset({errno.EPERM, errno.EINVAL, errno.ENODEV, errno.ELOOP})

Original = Callable[[str, str], Any]
_P = TypeVar("_P", bound="Poller")


def unpatched(module: str, name: str) -> Any:
    """Return `module.name` as it was before the environment that holds now patched it."""
    return get_environment().original(module, name)


def is_open(fd: int) -> bool:
    """Return whether the descriptor is open in this process."""
    try:
        os.get_inheritable(fd)  # the cheapest call there is: fcntl(F_GETFD)
    except OSError:
        return False
    return True


class Poller(ABC):
    """Waits for any number of descriptors on behalf of one owner.

    Args:
        original: returns the unpatched object of a module, as in `original("select",
            "epoll")`; by default that of the environment that holds now.

    Raises:
        UnsupportedError: this platform has no such poller.
        OSError: no descriptor is left for the poller itself.
    """

    name: ClassVar[str]

    #: The names in the select module that this poller cannot do without.
    needs: ClassVar[tuple[str, ...]]

    #: Whether a hub has it: it then waits on behalf of that one, for good.
    owned = False

    # Whether the kernel says so when a registered descriptor is closed; if it does not,
    # `_verify` is called for each of them in turn.
    _hears_of_closing: ClassVar[bool] = True

    def __init__(self, original: Original = unpatched) -> None:
        if not self.available(original):
            raise UnsupportedError(
                f"the poller {self.name!r} needs select.{self.needs[0]}, which this platform does "
                "not have; name none, and the best one available is taken"
            )
        self._original = original
        self._closed = False
        self._inherited = False
        self._interest: dict[int, int] = {}
        self._registered = MappingProxyType(self._interest)
        # Set by _wait() when the wake-up descriptor or the timer was among the ready.
        self._woken = False
        # The next batch begins after this one when more is ready than max_events.
        self._last_reported = -1
        self._unverified: list[int] = []
        self._verify_at = 0.0
        self._wakeup = Wakeup(original)
        try:
            self._open()
        except BaseException:
            self._closed = True
            self._wakeup.close()
            raise
        _fork.join_forks(self)

    @classmethod
    def available(cls, original: Original = unpatched) -> bool:
        """Return whether this platform has what the poller needs."""
        try:
            for name in cls.needs:
                original("select", name)
        except (AttributeError, ImportError):
            return False
        return True

    # -- interest ----------------------------------------------------------------------
    @property
    def registered(self) -> Mapping[int, int]:
        """The live, read-only view of what is registered: descriptor -> events."""
        return self._registered

    def register(self, fd: int, events: int) -> None:
        """Wait for `events` on `fd` from now on, in place of what was asked for before.

        Args:
            fd: an open descriptor that can block: a socket, pipe, terminal or the like.
            events: READ, WRITE or both.

        Raises:
            BadDescriptorError: `fd` is closed, negative, no integer, the poller's own, or
                always ready like a regular file.  It is not registered afterwards.
            ValueError: `events` is not READ, WRITE or READ | WRITE.  Nothing changed.
            PollerClosedError: the poller was closed, or belongs to the parent process.
            OSError: the kernel has no memory, or no watch is left for this user.
        """
        if self._closed:
            raise self._refusal()
        # A bool is an int, and True would be standard output.
        if not isinstance(fd, int) or isinstance(fd, bool):
            raise BadDescriptorError(
                f"cannot register {fd!r}: a descriptor is a non-negative int; "
                "pass the fileno() of the file or socket"
            )
        if events not in (READ, WRITE, _BOTH):
            raise ValueError(
                f"cannot register descriptor {fd} for events {events!r}: "
                "use READ, WRITE or READ | WRITE, and unregister() to end the interest"
            )
        if not 0 <= fd <= _LARGEST_DESCRIPTOR:
            raise BadDescriptorError(
                f"cannot register descriptor {fd}: there is no such number; -1 is the fileno() "
                "of a socket that is already closed, so register it before that"
            )
        if self._owns(fd):
            raise BadDescriptorError(
                f"cannot register descriptor {fd}: it belongs to {self!r} itself; "
                "the descriptor that was meant is closed, and its number was given away"
            )
        try:
            self._attach(fd, events)
        except OSError as error:
            self._interest.pop(fd, None)
            if error.errno == errno.EBADF:
                if is_open(fd):
                    self._end(error)
                raise BadDescriptorError(
                    f"cannot register descriptor {fd} with the {self.name} poller: it is closed; "
                    "register a descriptor while it is open, and unregister it before closing it"
                ) from error
            if error.errno in _UNWAITABLE:
                raise BadDescriptorError(
                    f"cannot register descriptor {fd} with the {self.name} poller: it cannot be "
                    f"waited for ({error.strerror}); regular files, directories and some devices "
                    "are always ready, so read or write them directly"
                ) from error
            raise
        self._interest[fd] = events

    def unregister(self, fd: int) -> None:
        """End the interest in `fd`; does nothing when there is none.

        Call it before the descriptor is closed.  Afterwards is safe too, but the kernel
        may then keep a dead entry as long as a duplicate of the descriptor exists.
        """
        # Registered keys are plain integers; anything else cannot be among them.
        if isinstance(fd, int) and self._interest.pop(fd, None) is not None and not self._closed:
            self._detach(fd)

    # -- waiting -----------------------------------------------------------------------
    def poll(
        self, timeout: float | None = None, max_events: int = MAX_EVENTS
    ) -> list[tuple[int, int]]:
        """Wait until descriptors are ready, `wakeup()` is called, or the time is over.

        A system call that a signal interrupts is continued with the time that is left
        (PEP 475); what a signal handler raises comes out of here, and nothing is lost.

        Args:
            timeout: seconds; None waits for ever, 0 and less only look.  The kernel
                may round it up to the next millisecond.
            max_events: the most descriptors to report; others get their turn next time.

        Returns:
            (fd, events) once per ready descriptor, events being READ, WRITE or both,
            never more than was registered.  Empty when the time was over, or when
            a wake-up or the timer ended the wait.  A descriptor that was closed without
            being unregistered is reported once with its whole interest and dropped.

        Raises:
            PollerClosedError: the poller was closed, belongs to the parent process, or
                lost its own descriptors to someone who closed them all.
            ValueError: timeout is not a number of seconds, or max_events is less than 1.
        """
        if self._closed:
            raise self._refusal()
        if max_events < 1:
            raise ValueError(f"max_events is {max_events}: ask for one event or more")
        now = monotonic()
        if timeout == 0:
            # What a green loop does in every turn: no more than this one look.
            if now >= self._verify_at and not self._hears_of_closing:
                lost = self._audit(now)
                if lost:
                    return lost
            return self._wait(0, max_events)
        if timeout is None:
            deadline = inf
        elif timeout > 0:
            deadline = now + timeout
        elif timeout <= 0:
            deadline = now
        else:
            raise ValueError(f"timeout is {timeout}: give a number of seconds, or None")
        # How many verifications it takes until each descriptor was seen once.
        unseen = 0
        if not self._hears_of_closing:
            unseen = len(self._interest) + len(self._unverified)
        while True:
            until = deadline
            if unseen > 0:
                if now >= self._verify_at:
                    unseen -= AUDIT_BATCH
                    lost = self._audit(now)
                    if lost:
                        return lost
                if unseen > 0:
                    until = min(deadline, self._verify_at)
            self._woken = False
            left = None if until == inf else min(until - now, _LONGEST_WAIT)
            ready = self._wait(left, max_events)
            if ready or self._woken or self._closed:
                return ready
            now = monotonic()
            if now >= deadline:
                return ready

    def wakeup(self) -> None:
        """Make the running or the next `poll()` return early.

        Safe from any thread and from signal handlers; never blocks, switches or raises,
        also on a closed poller.  Any number of calls before a poll count as one.
        """
        if not self._inherited:
            self._wakeup.wake()

    def wake_fileno(self) -> int:
        """Return the descriptor that a wake-up makes readable until the next `poll()`.

        For a loop that has to watch the members of a poller without `fileno()` one by one.

        Raises:
            PollerClosedError: the poller was closed.
        """
        if self._closed:
            raise self._refusal()
        return self._wakeup.fd

    def fileno(self) -> int:
        """Return a descriptor that is readable while `poll(0)` has something to say.

        That is: while a registered descriptor is ready, a wake-up is pending, or the time
        given to `set_timer()` is over.  The number stays the same until `close()`.
        Descriptors that were closed while registered do not show up in it.

        Raises:
            UnsupportedError: poll(2) and select(2) have no kernel object to look at.
            PollerClosedError: the poller was closed.
        """
        raise UnsupportedError(
            f"the {self.name} poller has no descriptor of its own that another loop could watch; "
            "use epoll or kqueue for that"
        )

    def set_timer(self, delay: float | None) -> None:
        """Make `fileno()` readable after `delay`, and end a `poll()` that is waiting then.

        One timer exists; each call replaces the one before.  It fires once, and the
        `poll()` that sees it clears it.

        Args:
            delay: seconds; 0 and less fire at once, None disarms the timer.

        Raises:
            UnsupportedError: the poller has no `fileno()`, or the platform no timerfd.
            PollerClosedError: the poller was closed.
        """
        raise UnsupportedError(
            f"cannot set a timer of {delay} s: the {self.name} poller has no fileno() that could "
            "become readable; use epoll or kqueue, or pass the delay to poll()"
        )

    # -- end ---------------------------------------------------------------------------
    @property
    def closed(self) -> bool:
        """Whether the poller was closed, or was inherited from the parent process."""
        return self._closed

    def close(self) -> None:
        """Forget all interest and close the poller's own descriptors; idempotent.

        The registered descriptors stay open.  To be called by the owner: a poll that
        waits in another thread has to be woken and to return first.
        """
        self._closed = True
        self._interest.clear()
        self._unverified.clear()
        self._release()
        if self._inherited:
            self._wakeup.abandon()
        else:
            self._wakeup.close()

    def abandon(self) -> None:
        """Close, in a forked child, this process's copies of the poller's descriptors.

        No call reaches the kernel objects themselves, which are the parent's: it goes on
        undisturbed.  The poller is closed afterwards; idempotent.
        """
        self._inherited = True
        self.close()

    def before_fork(self) -> None:  # noqa: B027 - there is nothing to override either
        """Do nothing: a poller holds no lock that a fork could copy."""

    def after_fork_in_parent(self) -> None:  # noqa: B027 - as above
        """Do nothing: the parent goes on."""

    def after_fork_in_child(self) -> None:
        """Refuse all further use in the child; see "Forks" above."""
        self._closed = self._inherited = True

    def __enter__(self: _P) -> _P:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._closed:
            state = "inherited" if self._inherited else "closed"
        else:
            events = list(self._interest.values())
            reading = sum(1 for event in events if event & READ)
            writing = sum(1 for event in events if event & WRITE)
            state = f"{len(events)} registered, {reading} reading, {writing} writing"
            state += self._details()
        return f"<{type(self).__name__} {state}>"

    # -- for the implementations -------------------------------------------------------
    @abstractmethod
    def _open(self) -> None:
        """Make the kernel object, watch `self._wakeup.fd`; leave nothing open on failure."""

    @abstractmethod
    def _attach(self, fd: int, events: int) -> None:
        """Add or replace the interest; raise OSError when the kernel refuses.

        `self._interest` still holds the interest of before.
        """

    @abstractmethod
    def _detach(self, fd: int) -> None:
        """Drop the interest; `fd` may be closed, or another file by now.  Never raise."""

    @abstractmethod
    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        """Wait at most `timeout` seconds; set `self._woken` for a wake-up or the timer.

        May return empty before the time is over; the caller continues.
        """

    @abstractmethod
    def _release(self) -> None:
        """Close the kernel object; idempotent, never raises."""

    def _verify(self, fd: int, events: int) -> bool:  # noqa: ARG002 - for those that need it
        """Return whether the kernel still watches `fd`; False when it was closed.

        True as well when the poller itself is what was closed: the wait will say so.
        """
        return True

    def _owns(self, fd: int) -> bool:
        """Return whether the number is one of the poller's own descriptors."""
        return self._wakeup.owns(fd)

    def _details(self) -> str:
        """Return what `repr()` adds for this kind of poller."""
        return ""

    def _audit(self, now: float) -> list[tuple[int, int]]:
        """Verify the next few descriptors; drop and return those that are gone."""
        if not self._unverified:
            self._unverified = list(self._interest)
        batch = self._unverified[-AUDIT_BATCH:]
        del self._unverified[-AUDIT_BATCH:]
        lost = []
        for fd in batch:
            events = self._interest.get(fd)
            if events is not None and not self._verify(fd, events):
                del self._interest[fd]
                lost.append((fd, events))
        self._verify_at = now + AUDIT_INTERVAL
        return lost

    def _fair(self, ready: list[tuple[int, int]], max_events: int) -> list[tuple[int, int]]:
        """Return `max_events` of `ready`, going round by number from one call to the next.

        For kernels that report everything at once, in an order of theirs: without this,
        those at the end could starve behind the others.
        """
        if len(ready) <= max_events:
            return ready
        ready.sort()
        start = bisect_right(ready, (self._last_reported, _BOTH))
        chosen = (ready[start:] + ready[:start])[:max_events]
        self._last_reported = chosen[-1][0]
        return chosen

    def _refusal(self) -> PollerClosedError:
        """Return the error that says why the poller can no longer be used."""
        if self._inherited:
            return PollerClosedError(
                f"this {self.name} poller belongs to the parent process: using it here would "
                "disturb the parent; abandon() it and create a poller after the fork"
            )
        return PollerClosedError(f"this {self.name} poller is closed; create a new one")

    def _end(self, error: Exception) -> list[tuple[int, int]]:
        """Handle the kernel's refusal of the poller's own descriptor in a wait.

        Returns nothing when a signal handler closed the poller meanwhile; else the number
        was closed behind the poller's back, which closes it for good and is raised.
        """
        if self._closed:
            return []
        self.close()
        raise PollerClosedError(
            f"the {self.name} poller lost its own descriptor ({error}): something closed it, as "
            "daemonizing code does that closes all descriptors; create pollers after that"
        ) from error
