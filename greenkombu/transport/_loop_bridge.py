"""Let a loop of the program's own (Celery's) run the events of a connection.

The hub goes on reading, writing and sending heartbeats by itself; what the program's loop gets is
a descriptor that becomes readable when an event waits in the connection's inbox.  So a callback of
that loop may wait for an answer of the broker, which it could not if the loop were the one to
read it.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hub.environment import get_environment

if TYPE_CHECKING:
    from greenkombu.transport._connection import TransportConnection

__all__ = ["LoopBridge", "LoopDriven"]


class LoopBridge:
    """Ring in a foreign loop when something waits for a connection's user.

    Args:
        connection: whose inbox it is.
        loop: has `add_reader(fd, callback)`, and `remove_reader(fd)` or `remove(fd)`.
        run: called by the loop when events wait; what it raises goes to the loop, and ends the
            bridge if the connection is dead.
    """

    __slots__ = (
        "__weakref__",
        "_connection",
        "_finalizer",
        "_read",
        "_reader",
        "_run",
        "_rung",
        "_write",
        "_writer",
        "loop",
    )

    def __init__(
        self, connection: TransportConnection, loop: Any, run: Callable[[], object]
    ) -> None:
        self.loop = loop
        self._connection = connection
        self._run = run
        self._rung = False
        self._reader, self._writer = os.pipe()
        self._finalizer = weakref.finalize(self, _close, self._reader, self._writer)
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        # A patched os would wait where these two never do.
        original = get_environment().original
        self._read: Callable[[int, int], bytes] = original("os", "read")
        self._write: Callable[[int, bytes], int] = original("os", "write")
        connection.inbox.subscribe(self._ring)
        loop.add_reader(self._reader, self._on_readable)
        if connection.inbox or connection.error is not None:
            self._ring()

    def _ring(self) -> None:
        """Make the descriptor readable; called by whoever appends, never waits."""
        if not self._rung and self._finalizer.alive:
            self._rung = True
            try:
                self._write(self._writer, b"\0")
            except OSError:
                pass  # full, so it is readable; or closed just now

    def _on_readable(self, *_: object) -> None:
        try:
            self._read(self._reader, 4096)
        except BlockingIOError:
            pass
        # Before the events are run: what comes from now on rings again.
        self._rung = False
        try:
            self._run()
        finally:
            if self._connection.error is not None:
                self.close()
            elif self._connection.inbox:
                self._ring()  # the run ended early: a callback raised, or the slice was over

    def close(self) -> None:
        """Take the descriptor out of the loop and close it; idempotent."""
        if not self._finalizer.alive:
            return
        self._connection.inbox.unsubscribe(self._ring)
        remove = getattr(self.loop, "remove_reader", None) or self.loop.remove
        try:
            remove(self._reader)
        except (KeyError, ValueError, OSError):
            pass  # the loop has forgotten it, or is closed
        self._finalizer()


class LoopDriven:
    """What transports have whose connections a loop of the program's own can drive.

    Their connections have an attribute `bridge`, which is None at first.
    """

    def on_readable(self, connection: Any, loop: Any) -> None:
        """Run the events that wait; a transport has it."""
        raise NotImplementedError

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        """Have `loop` run the events of `connection`; idempotent. See `LoopBridge`."""
        bridge = connection.bridge
        if bridge is not None:
            if bridge.loop is loop:
                return
            bridge.close()
        reference = weakref.ref(connection)

        def run() -> None:
            alive = reference()
            if alive is not None:
                self.on_readable(alive, loop)

        connection.bridge = LoopBridge(connection, loop, run)

    def unregister_from_event_loop(self, connection: Any, loop: Any) -> None:
        """Undo `register_with_event_loop`."""
        bridge = connection.bridge
        if bridge is not None and bridge.loop is loop:
            self.end_bridge(connection)

    @staticmethod
    def end_bridge(connection: Any) -> None:
        """Take a connection out of whatever loop it is registered with."""
        bridge, connection.bridge = connection.bridge, None
        if bridge is not None:
            bridge.close()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
