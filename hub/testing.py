"""Test doubles for programs on the hub: time, readiness and streams under control.

    clock = FakeClock()
    loop = scripted_hub(clock)
    loop.call_later(30, ping)
    loop.run_once(60)              # at once; the clock shows 30 s later

Nothing in here waits, opens a socket or starts a thread, so such a test is exact and fast in
every environment.
"""

from __future__ import annotations

from collections import deque

from hub._parts import Parts
from hub.arguments import as_bytes
from hub.errors import StreamClosedError, UnsupportedError
from hub.loop import Hub
from hub.pollers import Poller
from hub.pollers.base import MAX_EVENTS
from hub.streams import HIGH_WATER, StreamHandler

__all__ = ["FakeClock", "MemoryStream", "ScriptedPoller", "scripted_hub"]


class FakeClock:
    """A clock that stands still until it is told to go on; seconds."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass.

        Raises:
            ValueError: time does not go backwards.
        """
        if seconds < 0:
            raise ValueError(f"a monotonic clock cannot go back by {-seconds} s")
        self.now += seconds


class ScriptedPoller(Poller):
    """A poller that reports what the test wrote down, and passes time instead of waiting.

    Args:
        clock: advanced by the timeout of each poll that finds nothing.
    """

    name = "scripted"
    needs = ()

    def __init__(self, clock: FakeClock) -> None:
        self.clock = clock
        #: The timeout of every poll so far.
        self.timeouts: list[float | None] = []
        self._script: deque[list[tuple[int, int]]] = deque()
        super().__init__()

    def report(self, *events: tuple[int, int]) -> None:
        """Let the next poll that has no earlier script report `events`: (fd, READ | WRITE)."""
        self._script.append(list(events))

    def poll(
        self, timeout: float | None = None, max_events: int = MAX_EVENTS
    ) -> list[tuple[int, int]]:
        """Return the next script, or let `timeout` pass.

        Raises:
            UnsupportedError: nothing is scripted and the wait would never end.
        """
        self.timeouts.append(timeout)
        if self._script:
            events = self._script.popleft()
            if len(events) > max_events:
                self._script.appendleft(events[max_events:])
            return [
                (fd, wanted)
                for fd, mask in events[:max_events]
                if (wanted := mask & self.registered.get(fd, 0))
            ]
        if self._woken:
            self._woken = False
            return []
        if timeout is None:
            raise UnsupportedError(
                "the scripted poller would wait for ever: report() events, set a timer, or pass a "
                "timeout"
            )
        self.clock.advance(max(timeout, 0.0))
        return []

    def wakeup(self) -> None:
        """Let the next poll return at once."""
        self._woken = True

    def _open(self) -> None:
        pass

    def _attach(self, fd: int, events: int) -> None:
        pass

    def _detach(self, fd: int) -> None:
        pass

    def _wait(self, timeout: float | None, max_events: int) -> list[tuple[int, int]]:
        return self.poll(timeout, max_events)

    def _release(self) -> None:
        pass


def scripted_hub(clock: FakeClock) -> Hub:
    """Return a hub on `clock` and a `ScriptedPoller` (its `poller`), run by the test itself."""
    from hub import _default

    # Whatever the program runs on: this hub never waits, so it needs nobody's help.
    return Hub(environment=_default.environment, poller=ScriptedPoller(clock), clock=clock)


class MemoryStream:
    """A stream without a socket: what is written is kept, what is fed is received.

    It has the interface of `hub.streams.Stream` and keeps its promises: `connection_lost`
    exactly once, StreamClosedError after the end, `write_resumed` after the high-water mark.

    Args:
        handler: see `StreamHandler`.
        peer: for messages.
        high_water: bytes; with `accept(False)` writes stay in `buffered` up to any size.
    """

    def __init__(
        self, handler: StreamHandler, *, peer: str = "memory", high_water: int = HIGH_WATER
    ) -> None:
        self.peer = peer
        self.coalesce = True
        self.high_water = high_water
        self.low_water = high_water // 4
        self.closed = False
        self.error: BaseException | None = None
        self.reading_paused = False
        self.sent_bytes = 0
        self.received_bytes = 0
        self.send_calls = 0
        self.recv_calls = 0
        self.flushes = 0
        self.handler = handler
        self._accepting = True
        self._sent: list[bytes] = []
        self._out: list[bytes] = []
        self._fed: deque[bytes] = deque()
        self._was_above = False

    # -- the test's side -------------------------------------------------------------
    @property
    def written(self) -> bytes:
        """All bytes that went out so far."""
        return b"".join(self._sent)

    def take_written(self) -> bytes:
        """Return what went out since the last call."""
        data, self._sent = self.written, []
        return data

    def feed(self, data: bytes) -> None:
        """Let `data` arrive; it waits while reading is paused."""
        self._fed.append(data)
        self._deliver()

    def end(self) -> None:
        """Let the peer close the connection."""
        self.abort(StreamClosedError(f"{self.peer} closed the connection"))

    def accept(self, accepting: bool) -> None:
        """Let the kernel take bytes (True), or none for now (False)."""
        self._accepting = accepting
        if accepting:
            self._send()
            if self._was_above:
                self._was_above = False
                self.handler.write_resumed()

    # -- the stream's side -----------------------------------------------------------
    def start(self) -> None:
        """Begin to read; nothing to do."""

    def write(self, data: bytes | list[bytes], flush: bool = False, eager: bool = True) -> None:  # noqa: ARG002
        """Append one message; see `Stream.write`. There are no turns, so all go out at once."""
        if self.closed:
            raise StreamClosedError(f"the connection to {self.peer} is closed")
        if type(data) is list:
            data = bytes(Parts(data))
        elif type(data) is not bytes:
            data = as_bytes(data)
        self.flushes += flush
        self._out.append(data)
        if self._accepting:
            self._send()
        elif self.buffered >= self.high_water:
            self._was_above = True

    def flush(self) -> None:
        """Send what is buffered, if the kernel takes it."""
        self.flushes += 1
        if self._accepting:
            self._send()

    @property
    def buffered(self) -> int:
        """Bytes that the kernel has not taken."""
        return sum(map(len, self._out))

    @property
    def above_high_water(self) -> bool:
        """Whether writers should wait."""
        return self.buffered >= self.high_water

    def expect(self, count: int) -> None:
        """Do nothing: what is fed is delivered, as on a platform that cannot wait for more."""

    def pause_reading(self) -> None:
        """Keep what is fed."""
        self.reading_paused = True

    def resume_reading(self) -> None:
        """Deliver what was kept."""
        self.reading_paused = False
        self._deliver()

    def abort(self, error: BaseException | None = None) -> None:
        """Close at once; idempotent."""
        if not self.closed:
            self.closed = True
            self.error = error
            self._out.clear()
            self.handler.connection_lost(error)

    def close(self, timeout: float | None = None) -> None:  # noqa: ARG002 - nothing to wait for
        """Close; what the kernel did not take is lost."""
        self.abort()

    def _send(self) -> None:
        for data in self._out:
            self.send_calls += 1
            self.sent_bytes += len(data)
            self._sent.append(data)
        self._out.clear()

    def _deliver(self) -> None:
        while self._fed and not self.reading_paused and not self.closed:
            data = self._fed.popleft()
            self.recv_calls += 1
            self.received_bytes += len(data)
            try:
                self.handler.data_received(data)
            except Exception as error:
                self.abort(error)
