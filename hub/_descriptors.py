"""Tasks that wait for one descriptor: `Environment.wait_readable` and `wait_writable`.

A task that waits relies on being told.  So a wait ends with an error when its descriptor is
taken away from it: by `Hub.remove`, by a stream that closes, by another callback in its
place.  What is closed behind the hub's back is told by nobody: epoll forgets it, poll(2) and
select(2) keep the file open in the kernel until something else ends their wait, and in an
idle hub nothing does.  Hence the audit: while tasks wait, their descriptors are looked at, a few
per second, and compared with the files that they were when the wait began.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from hub.errors import BadDescriptorError, HubClosedError, HubError
from hub.timers import Handle, Timer

if TYPE_CHECKING:
    from hub.environment import Environment
    from hub.loop import Hub

__all__ = ["Audit", "wait_descriptor"]

#: Seconds between two looks, and descriptors per look (a microsecond each): too little to be seen
#: in what an idle process costs.  Up to 64 waits are all seen each second.
AUDIT_INTERVAL = 1.0
AUDIT_BATCH = 64

_READ = 1  # hub.pollers.READ; imported late, the pollers need select


def wait_descriptor(environment: Environment, fd: int, events: int, timeout: float | None) -> bool:
    """Park the calling task until `fd` is ready; False after `timeout` seconds.

    Raises:
        BadDescriptorError: the descriptor cannot be waited for, was closed or taken away
            meanwhile, or somebody waits for this direction of it already (a socket
            direction has one owner).
        HubClosedError: the hub was closed meanwhile.
    """
    from hub.shared import get_hub

    waiting = _DescriptorWait(get_hub(environment), fd, events == _READ)
    waiting.hub.attach(waiting)  # first: the hub may end before it comes to start()
    waiting.hub.call_soon_threadsafe(waiting.start)
    try:
        ready = waiting.waiter.wait(timeout)
    finally:
        try:
            waiting.hub.call_soon_threadsafe(waiting.end)
        except HubClosedError:
            pass  # it has forgotten the descriptor
    if waiting.error is not None:
        raise waiting.error
    return ready


class _DescriptorWait(Handle):
    """One task that waits for one direction of a descriptor; a member of the hub."""

    __slots__ = ("_fd", "_file", "_over", "_reads", "error", "hub", "waiter")

    def __init__(self, hub: Hub, fd: int, reads: bool) -> None:
        self.hub = hub
        self.waiter = hub.environment.waiter()
        self.error: BaseException | None = None
        self._fd = fd
        self._reads = reads
        self._file: tuple[int, int] | None = None
        self._over = False
        super().__init__(self.waiter.wake, ())

    def start(self) -> None:
        hub, fd = self.hub, self._fd
        try:
            if not self.mine and self._handle() is not None and fd in hub.poller.registered:
                raise BadDescriptorError(
                    f"descriptor {fd} is waited for already: one owner per direction"
                )
            hub.set_handle(fd, self, reads=self._reads)
            self._file = _file_of(fd)
            if hub.audit is None:
                hub.audit = Audit(hub)
            hub.audit.add(self)
        except Exception as error:
            self._fail(error)

    def end(self) -> None:
        self._over = True
        self.hub.detach(self)
        if self.hub.audit is not None:
            self.hub.audit.drop(self)
        if self.mine:
            self.remove()

    @property
    def mine(self) -> bool:
        """Whether the hub still waits for the descriptor on behalf of this task."""
        return self._handle() is self

    def _handle(self) -> Handle | None:
        hub = self.hub
        try:
            return (hub.readers if self._reads else hub.writers).get(self._fd)
        except TypeError:
            return None  # no number: the poller refuses it

    def remove(self) -> None:
        """Let the hub drop this direction of the descriptor, and with it this wait."""
        (self.hub.remove_reader if self._reads else self.hub.remove_writer)(self._fd)

    def is_closed(self) -> bool:
        """Tell whether the number is closed, or belongs to another file by now."""
        return _file_of(self._fd) != self._file

    def cancel(self) -> None:
        """The hub has dropped the descriptor."""
        super().cancel()
        if self._over:
            return
        if self._handle() is None:
            what = "was closed, or removed from the hub,"
            remedy = "end the wait first, for instance by shutdown() of the socket"
        else:
            what = "was given to another callback by add_reader() or add_writer()"
            remedy = "a direction of a descriptor has one owner"
        self._fail(
            BadDescriptorError(f"descriptor {self._fd} {what} while a task waited for it: {remedy}")
        )

    def hub_gone(self, error: HubError, forked: bool) -> None:  # noqa: ARG002
        self._fail(error)

    def flush_at_exit(self, deadline: float) -> None:
        """Nothing is buffered here."""

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.waiter.wake()


class Audit:
    """Looks in turn whether the descriptors of those who wait are still what they were."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._waits: dict[_DescriptorWait, None] = {}
        self._timer: Timer | None = None

    def add(self, wait: _DescriptorWait) -> None:
        """Look after `wait`, which has just begun."""
        self._waits[wait] = None
        if self._timer is None:
            self._timer = self._hub.call_repeatedly(AUDIT_INTERVAL, self._look)

    def drop(self, wait: _DescriptorWait) -> None:
        """No longer look after `wait`.

        The timer stays until it finds nobody: a program that waits often has one all the time.
        """
        self._waits.pop(wait, None)

    def _look(self) -> None:
        waits = self._waits
        if not waits and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for _ in range(min(len(waits), AUDIT_BATCH)):
            wait = next(iter(waits))
            del waits[wait]
            if not wait.mine:
                continue
            if wait.is_closed():
                wait.remove()
            else:
                waits[wait] = None  # behind the others


def _file_of(fd: int) -> tuple[int, int] | None:
    """Return what tells the open file `fd` from others; None if it is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino
