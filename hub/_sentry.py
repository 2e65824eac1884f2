"""Watch a poller that has no descriptor of its own, on behalf of a green loop.

poll(2) and select(2) are what is left on platforms without epoll and kqueue.  Nothing can
be watched from outside there, and handing every single descriptor to the green library
is no way out: gevent's libev ends the whole process when one of them is closed behind its
back.  So a native thread waits in a poller of its own over the same descriptors, and makes one
descriptor readable when there is something to report; the green loop watches that.

The thread looks only when it is asked to (`watch()`), and then once: whoever was told has to
look for himself and to ask again.  Each look costs O(descriptors), as these system calls do.

The thread has what it needs (`_Watch`), and neither the `Sentry` nor the poller that it serves,
except while it reads what is registered there: so a hub that is dropped without `close()` is
collected, and its sentry's finalizer has the thread end.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from hub._default import start_native_thread
from hub.errors import BadDescriptorError
from hub.pollers import READ
from hub.pollers._wakeup import Wakeup

if TYPE_CHECKING:
    from hub.environment import Environment
    from hub.pollers import Poller

__all__ = ["Sentry"]

#: Seconds that the thread may take to end; it is woken, so it needs microseconds.
_END = 1.0


class Sentry:
    """A native thread that says when `poller.poll(0)` has something to report.

    Args:
        environment: for the original thread functions.
        poller: what to watch; its own `poll` is never called from the thread.
    """

    def __init__(self, environment: Environment, poller: Poller) -> None:
        self._watch = watch = _Watch(environment, poller)
        self._finalizer = weakref.finalize(self, watch.end)
        self._finalizer.atexit = False
        start_native_thread(environment, watch.run)

    @property
    def fd(self) -> int:
        """The descriptor that becomes readable when there is something to report."""
        return self._watch.bell.fd

    def watch(self) -> None:
        """Ask for the next report; idempotent."""
        self._watch.bell.drain()
        self._watch.ask()

    def close(self) -> None:
        """End the thread and close its descriptors."""
        if self._finalizer.detach() is not None:
            self._watch.end()
            self._watch.running.acquire(True, _END)

    def abandon(self) -> None:
        """Close the child's copies after a fork; the thread exists in the parent only."""
        self._finalizer.detach()
        self._watch.mine.abandon()
        self._watch.bell.abandon()


class _Watch:
    """What the thread works with."""

    def __init__(self, environment: Environment, poller: Poller) -> None:
        self._poller = weakref.ref(poller)
        self.mine = type(poller)(environment.original)
        self.bell = Wakeup(environment.original)
        allocate: Any = environment.original("_thread", "allocate_lock")
        # Free while a look is wanted; raw, because the thread is native.
        self._asked = allocate()
        self._asked.acquire()
        #: Taken until the thread has ended.
        self.running = allocate()
        self.running.acquire()
        self._ended = False

    def ask(self) -> None:
        """Let the thread look once; from anywhere, takes no lock."""
        if self._asked.locked():
            try:
                self._asked.release()
            except RuntimeError:
                pass  # a signal handler was faster

    def end(self) -> None:
        """Let the thread close its descriptors and end; from anywhere, a finalizer, too."""
        self._ended = True
        self.ask()
        self.mine.wakeup()

    def run(self) -> None:
        """Body of the thread."""
        try:
            while True:
                self._asked.acquire()
                if self._ended:
                    return
                self._look()
                self.bell.wake()
        finally:
            self.mine.close()
            self.bell.close()
            self.running.release()

    def _look(self) -> None:
        mine, poller = self.mine, self._poller()
        if poller is None:
            return  # dropped: end() is about to be called
        wanted = dict(poller.registered)  # in one step: its owner goes on meanwhile
        wanted[poller.wake_fileno()] = READ
        del poller
        for fd in [fd for fd in mine.registered if fd not in wanted]:
            mine.unregister(fd)
        for fd, events in wanted.items():
            if mine.registered.get(fd) != events:
                try:
                    mine.register(fd, events)
                except BadDescriptorError:
                    return  # closed behind our back: the poller itself reports it
        mine.poll(None)
