"""Byte streams on the hub: TCP, Unix sockets, and TLS over either.

One owner per socket direction.  Only the hub reads: it takes what is there (at most
256 KiB at a time) and hands it to the stream's handler.  A writer appends one whole
message to the out-buffer in one atomic step and never waits; the buffer is sent by one
flusher at a time, and what the kernel does not take is sent by a WRITE callback.  A kill,
Timeout or signal exception therefore cannot tear a message: it can only land in a wait, and
there is none in here.  If an exception does land between a system call and its bookkeeping
(a signal handler's, in the main thread), the stream is aborted, since nobody could know
how much was sent.

Coalescing.  Under green threads the first 4 writes of a loop turn go out at once; later ones
wait until the turn ends, 64 KiB are waiting, or `flush()`.  So a few messages followed by a
long computation are not delayed, and a burst costs one system call for many messages.  With
native threads each write is sent at once, unless another thread is sending: then that
thread sends it, too.

Large messages.  Whoever sends stops after `SEND_TURN` bytes, even if the kernel takes more (a peer
that reads as fast as we send would never let it fill), and the WRITE callback goes on where
he stopped, by as much at a time.  A message may be written in parts; nothing larger than
`SEND_CHUNK` is copied, joined or encrypted in one go.

Lifetime.  The hub refers to a stream weakly, so keep what `open_stream()` returned: a stream that
its owner dropped is collected, a finalizer has the hub close the socket, and the handler is
told nothing.  While bytes wait for the kernel to take them, the hub holds the stream
strongly: what was written is sent.

`abort()` closes at once, without a farewell, and is what happens after any error, a fork, or
the end of the hub.  `close(timeout)` first sends what is buffered.

This module is long because writing, reading, TLS and the end of a stream share one state; what can
stand alone does: `_connect`, `_parts`, `_tls`.
"""

from __future__ import annotations

import errno
import sys
import weakref
from collections import deque
from collections.abc import Callable
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

from hub._parts import Parts
from hub.arguments import as_bytes, has_time
from hub.environment import check_may_wait
from hub.errors import (
    HubClosedError,
    HubError,
    StreamClosedError,
    StreamError,
    StreamForkedError,
    StreamTimeoutError,
)

if TYPE_CHECKING:
    import socket

    from hub._connect import SocketOptions, open_stream
    from hub._tls import TLSLayer
    from hub.environment import Waiter
    from hub.loop import Hub

__all__ = ["SocketOptions", "Stream", "StreamHandler", "open_stream"]

#: Writes of one loop turn that are sent at once.  With 1, three messages followed by a second
#: of CPU were delayed by that second (measured; it is what task queues do).
EAGER_WRITES = 4
#: Bytes that end the coalescing of a turn; a system call for so much costs no more than its copy.
COALESCE_BYTES = 65_536
#: Bytes joined for one send; more would only be copied in vain when the kernel takes less.
SEND_CHUNK = 262_144
#: Bytes sent in one go before others have their turn: 1 to 4 ms, in the clear and over TLS.
SEND_TURN = 2_097_152
#: Bytes in the out-buffer above which writers should wait, and below which they may go on.
HIGH_WATER = 1_048_576
LOW_WATER = 262_144
#: Bytes that are still read after a failed send, for the peer's last words (a broker says why).
LAST_WORDS = 1_048_576

# Sends for a stream that is closed, so that nobody else does.
_NOBODY = object()

_AGAIN = (errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR)


def __getattr__(name: str) -> Any:
    if name in ("SocketOptions", "open_stream"):
        from hub import _connect

        return getattr(_connect, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class StreamHandler(Protocol):
    """What a stream tells its owner.  All of it is called in the hub: be tiny, never wait."""

    def data_received(self, data: bytes) -> None:
        """Bytes arrived.  An error raised in here aborts this stream and concerns no other."""

    def connection_lost(self, error: BaseException | None) -> None:
        """The stream has ended; called exactly once.  `error` is None after `close()`."""

    def write_resumed(self) -> None:
        """The out-buffer was above the high-water mark and is below the low-water mark now."""


class Stream:
    """A connected socket on a hub; made by `open_stream()`.

    Args:
        hub: the hub that reads it.
        sock: a connected, original (not green) socket; the stream owns it from now on.
        handler: see `StreamHandler`.
        peer: "host:port" or a path, for messages.
        tls: a session that has not begun, or None.
        high_water: bytes; see `above_high_water`.
    """

    # What all streams begin with: set here, once, as there may be thousands of them.
    coalesce = True
    high_water = HIGH_WATER
    low_water = LOW_WATER
    sent_bytes = 0
    received_bytes = 0
    send_calls = 0
    recv_calls = 0
    #: Why the stream has ended; None while it is open, and after a close() of ours.
    error: BaseException | None = None
    #: True from the first abort, failure or end on: nothing can be written any more.
    closed = False
    _tls: TLSLayer | None = None
    # Whether messages may go out: not before TLS is established.
    _ready = True
    # What is left of the bytes that were taken out for a send.
    _rest: memoryview | None = None
    _blocked = False
    _absorbed = 0
    _was_above = False
    _turn_open = False
    _turn_writes = 0
    _turn_bytes = 0
    _asked = -1
    _paused = False
    _established: Waiter | None = None

    def __init__(
        self,
        hub: Hub,
        sock: socket.socket,
        handler: StreamHandler,
        *,
        peer: str = "?",
        tls: TLSLayer | None = None,
        high_water: int = HIGH_WATER,
    ) -> None:
        if sock.gettimeout() != 0:
            sock.setblocking(False)
        self.hub = hub
        self.sock = sock
        self.peer = peer
        if high_water != HIGH_WATER:
            self.high_water = high_water
            self.low_water = min(LOW_WATER, high_water // 4)
        #: Who is told; may be replaced, in the hub.
        self.handler = handler
        self._fd = fd = sock.fileno()
        if tls is not None:
            self._tls = tls
            self._ready = False
        self._green = hub.environment.green
        # Whole messages; the first one may be the rest of one.
        self._out: deque[bytes | memoryview | Parts] = deque()
        # {0: token} while somebody sends, never given back once the socket is closed.  Not a lock:
        # setdefault() takes it in one step, and after an exception one can still tell whose it is.
        self._sender: dict[int, object] = {}
        # One entry each, taken by whoever aborts first, and by whoever closes the socket and tells.
        self._to_abort = [None]
        self._to_finish = [None]
        # Tasks in close() that wait until all is sent.
        self._draining: dict[Waiter, None] = {}
        self._tether = _tie(self, hub, fd, sock)
        hub.attach(self)

    # -- writing -------------------------------------------------------------------------
    def write(self, data: bytes | list[bytes], flush: bool = False, eager: bool = True) -> None:
        """Append one whole message and send it, now or soon; never waits, never switches.

        Args:
            data: the bytes of the message; it is sent whole or the stream is aborted.  Of a
                buffer that may change (bytearray, memoryview) a copy is taken.  Or a list of its
                parts, for a message that is too large to be joined for nothing.
            flush: send at once, whatever the coalescing rule says.
            eager: False: not at once although it is among the first of the turn, as the caller
                goes to wait next, and so do others who write: one send takes all.

        Raises:
            StreamClosedError: the stream has ended, or failed in this call; `data` is not sent.
            BadArgumentError: `data` is no bytes; nothing was appended.
        """
        if self.closed:
            raise self._closed_error()
        message = data if type(data) is bytes else _message(data)
        self._out.append(message)
        failed = False
        if self._blocked:
            self._absorb(len(message))
        elif not self._green or not self.hub.in_hub_thread():
            # Also in green programs: a thread of a native pool runs its loop only while it has
            # work, and what a pool of connections lends to others may have been made by one.
            failed = self._flush()
        elif flush:
            # Not counted among the writes of the turn: nothing is left to send at its end.
            failed = self._flush()
        else:
            if not self._turn_open:
                self.hub.at_turn_end(self._end_turn)
                self._turn_open = True
            self._turn_writes += 1
            self._turn_bytes += len(message)
            if (
                (eager and self._turn_writes <= EAGER_WRITES)
                or self._turn_bytes >= COALESCE_BYTES
                or not self.coalesce
            ):
                failed = self._flush()
        # Not by `closed`: the peer may have had the message, answered and hung up by now.
        if failed:
            raise self._closed_error()

    def is_first(self) -> bool:
        """Tell whether this is asked for the first time since the hub last looked for events.

        A request whose sender waits for the answer is sent at once then, by `flush`: the end of the
        turn, which would cost more than the rest, has nothing to do for it.
        """
        cycles = self.hub.stats.cycles
        first = self._asked != cycles
        self._asked = cycles
        return first

    def _end_turn(self) -> None:
        self._turn_open = False
        self._turn_writes = 0
        if self._turn_bytes:
            self.flush()

    def flush(self) -> None:
        """Send what is buffered as far as the kernel takes it; never waits, never switches."""
        self._flush()

    def _flush(self, most: float = SEND_TURN) -> bool:
        """As `flush()`; tell whether sending failed.

        Args:
            most: bytes after which the rest is left to the hub.
        """
        self._turn_bytes = 0
        if self._tls is not None and not self.hub.in_hub_thread():
            self.hub.call_soon_threadsafe(self.flush)
            return False
        failure = None
        # If somebody else is sending, that one looks again when he has finished.
        while (self._rest or (self._out and self._ready)) and not (self._blocked or self.closed):
            token = object()
            try:
                if self._sender.setdefault(0, token) is not token:
                    return False
                failure = self._send(most)
                del self._sender[0]
            except BaseException as error:
                # Nobody can know how much was sent.
                if self._sender.get(0) is token:
                    del self._sender[0]
                self.abort(error if isinstance(error, Exception) else None)
                raise
            if failure is not None:
                self._fail(failure)
        if (self._was_above or self._draining) and not self._blocked:
            self._on_hub(self._settle)
        return failure is not None

    def _send(self, most: float) -> OSError | None:
        """Send until the buffer is empty, the kernel full or the turn over; the sender's only."""
        while True:
            data: bytes | memoryview | None = self._rest
            if data is None:
                if not (self._out and self._ready):
                    return None
                data = self._take()
            try:
                self.send_calls += 1
                sent = self.sock.send(data)
            except OSError as error:
                if error.errno not in _AGAIN:
                    self._rest = memoryview(data)
                    return error
                sent = 0
            self.sent_bytes += sent
            if sent < len(data):
                self._rest = memoryview(data)[sent:]
                self._block()
                return None
            self._rest = None
            most -= sent
            if most <= 0 and self._out:
                self._block()
                return None

    def _take(self) -> bytes | memoryview:
        """Take messages out of the buffer, as the bytes of one send."""
        out = self._out
        first = out[0]
        data: bytes | memoryview
        if type(first) is not bytes or len(first) > SEND_CHUNK:
            data = self._cut(first)
            size = len(data)
        elif len(out) == 1 and self._tls is None and not self._absorbed:
            out.popleft()
            return first
        else:
            size = 0
            parts = []
            while out and size < SEND_CHUNK:
                part = out[0]
                if type(part) is not bytes or len(part) > SEND_CHUNK:
                    break
                out.popleft()
                size += len(part)
                parts.append(part)
            data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._absorbed = max(self._absorbed - size, 0)
        return data if self._tls is None else self._tls.encrypt(data)

    def _cut(self, message: bytes | memoryview | Parts) -> bytes | memoryview:
        """Take the beginning of the first message in the buffer, and leave the rest there.

        What is left is never missing from `buffered`, which others may look at meanwhile.
        """
        data: bytes | memoryview
        if isinstance(message, Parts):
            data = message.take(SEND_CHUNK)
            left = len(message)
        else:
            view = memoryview(message)
            data = view[:SEND_CHUNK]
            left = len(view) - len(data)
            if left:
                self._out[0] = view[SEND_CHUNK:]
        if not left:
            self._out.popleft()
        return data

    def _block(self) -> None:
        """The kernel takes no more for now, or others have their turn: the hub goes on then."""
        self._blocked = True
        # A copy: another thread, or a signal handler, may write while lengths are asked for.
        self._absorbed = sum(map(len, list(self._out)))
        self._on_hub(self._watch_writable)

    def _absorb(self, size: int) -> None:
        """Note what was appended while the kernel is full."""
        self._absorbed += size
        if self.buffered >= self.high_water:
            self._was_above = True

    def _watch_writable(self) -> None:
        # A strong reference on purpose: what was written is sent, even if its owner is gone.
        if not self.closed:
            self.hub.add_writer(self._fd, self._on_writable)

    def _on_writable(self) -> None:
        self.hub.remove_writer(self._fd)
        self._blocked = False
        self.flush()
        self._settle()

    def _settle(self) -> None:
        """Tell those who wait for the buffer to empty, in the hub.

        Not only after a WRITE callback: with native threads another thread may have sent the rest.
        """
        if self._was_above and self.buffered <= self.low_water and not self.closed:
            self._was_above = False
            self.handler.write_resumed()
        if self.closed or not (self._out or self._rest):
            for waiter in list(self._draining):
                waiter.wake()

    @property
    def buffered(self) -> int:
        """Bytes that were written and that the kernel has not taken yet."""
        rest = self._rest
        waiting = self._absorbed if self._blocked else sum(map(len, list(self._out)))
        return waiting + (len(rest) if rest is not None else 0)

    @property
    def above_high_water(self) -> bool:
        """Whether writers should wait for `write_resumed()` before they write more.

        Enter whatever `write_resumed()` wakes first, and look at this afterwards.
        """
        if not self._blocked or self.buffered < self.high_water:
            return False
        # In this order: either the hub sees the mark, or it is no longer blocked here.
        self._was_above = True
        return self._blocked

    # -- reading -------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to read; called once, from any task."""
        self._on_hub(self._watch_readable)

    def _watch_readable(self) -> None:
        if not self.closed and not self._paused:
            self.hub.add_reader(self._fd, _call_readable, weakref.ref(self))

    def expect(self, count: int) -> None:
        """Read when `count` bytes have come, or the end, and not before; 1 reads whatever comes.

        For who knows how long an answer is that comes in pieces: it spares wake-ups.  A hint, which
        a TLS session, whose pieces are others, and some platforms ignore (socket(7), SO_RCVLOWAT).
        """
        if self._tls is not None or self.closed:
            return
        import socket

        try:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, count)
        except OSError:
            pass

    def pause_reading(self) -> None:
        """Leave further bytes in the kernel; the peer will have to wait."""
        if not self._paused:
            self._paused = True
            self._on_hub(self._apply_pause)

    def resume_reading(self) -> None:
        """Read again."""
        if self._paused:
            self._paused = False
            self._on_hub(self._watch_readable)

    def _apply_pause(self) -> None:
        if self._paused and not self.closed:
            self.hub.remove_reader(self._fd)

    @property
    def reading_paused(self) -> bool:
        """Whether `pause_reading()` is in force."""
        return self._paused

    def _on_readable(self) -> int:
        """Read once; return how many bytes came."""
        buffer = self.hub.scratch()
        self.recv_calls += 1
        try:
            count = self.sock.recv_into(buffer)
        except OSError as error:
            if error.errno not in _AGAIN:
                self.abort(self._wrap(error))
            return 0
        if not count:
            self.abort(
                StreamClosedError(f"{self.peer} closed the connection")
                if self._established is None
                else StreamClosedError(
                    f"{self.peer} closed the connection during the TLS handshake: "
                    "does it speak TLS on this port?"
                )
            )
            return 0
        self.received_bytes += count
        try:
            if self._tls is None:
                self.handler.data_received(bytes(buffer[:count]))
            else:
                self._received_encrypted(bytes(buffer[:count]))
        except BaseException as error:
            # The handler's state may be half changed: nothing more can be read.
            self.abort(error if isinstance(error, Exception) else None)
            if not isinstance(error, Exception):
                raise
        return count

    # -- TLS -----------------------------------------------------------------------------
    def begin_tls(self, established: Waiter) -> None:
        """Start the handshake; `established` is woken when it is complete or has failed."""
        assert self._tls is not None
        self._established = established
        self._on_hub(self._handshake)

    def _handshake(self, data: bytes = b"") -> bool:
        """Go on with the handshake; tell whether it is complete."""
        tls = self._tls
        assert tls is not None
        try:
            reply = tls.handshake(data)
        except HubError as error:
            self.error = error
            self._send_encrypted(tls.to_send())  # the alert tells the peer why
            self.abort(error)
            return False
        self._ready = tls.established
        self._send_encrypted(reply)
        if tls.established and self._established is not None:
            established, self._established = self._established, None
            established.wake()
            self.flush()
        return tls.established and not self.closed

    def _received_encrypted(self, data: bytes) -> None:
        tls = self._tls
        assert tls is not None
        if not tls.established:
            if not self._handshake(data):
                return
            data = b""  # what came behind the handshake is inside the session already
        chunks, ended = tls.decrypt(data)
        self._send_encrypted(tls.to_send())
        for chunk in chunks:
            if not self.closed:
                self.handler.data_received(chunk)
        if ended:
            self.abort(StreamClosedError(f"{self.peer} closed the TLS session"))

    def _send_encrypted(self, data: bytes) -> None:
        """Send bytes of the session itself, before any message that waits."""
        if not data or self.closed:
            return
        rest = self._rest
        self._rest = memoryview(bytes(rest) + data if rest is not None else data)
        self.flush()

    # -- the end -------------------------------------------------------------------------
    def abort(self, error: BaseException | None = None) -> None:
        """Close at once: no farewell, what is buffered is dropped; idempotent.

        Args:
            error: why; passed to `connection_lost` and kept in `error`.
        """
        try:
            self._to_abort.pop()
        except IndexError:
            return
        if self.error is None:
            self.error = error
        self.closed = True
        self._on_hub(self._finish)

    def _fail(self, error: OSError) -> None:
        """Sending failed: read the peer's last words in the hub, then abort."""
        if self.closed:
            return
        self.closed = True
        if self.error is None:
            self.error = self._wrap(error)
        try:
            self.hub.call_soon_threadsafe(self._last_words)
        except HubClosedError:
            pass  # the hub has told the handler, or is about to

    def _last_words(self) -> None:
        limit = self.received_bytes + LAST_WORDS
        while self.sock.fileno() >= 0 and self.received_bytes < limit and self._on_readable():
            pass
        self.abort(self.error)

    def _finish(self) -> None:
        """Close the socket, in the hub; then tell."""
        if 0 in self._sender and not self.hub.closed:
            # Another thread is inside send(2) at this moment: closing now could hand its
            # bytes to a new socket of the same number.
            self.hub.call_soon_threadsafe(self._finish)
            return
        self._sender.setdefault(0, _NOBODY)
        try:
            self._to_finish.pop()
        except IndexError:
            return
        self.hub.detach(self)
        # None: it is being collected, and its owner's __del__ brought it here.  The reaper has the
        # socket already; closed now, its number could be a new socket's when the reaper comes.
        if self._tether.cut():
            try:
                self.hub.remove(self._fd)
            except HubClosedError:
                pass  # it has forgotten the descriptor
            self.sock.close()
        self._out.clear()
        self._rest = None
        self._absorbed = 0
        self._blocked = False
        if self._established is not None:
            self._established.wake()
        for waiter in list(self._draining):
            waiter.wake()
        self.handler.connection_lost(self.error)

    def close(self, timeout: float | None = None) -> None:
        """Send what is buffered, then close; parks the calling task.

        Args:
            timeout: seconds for sending; None, zero and less send only what the kernel takes at
                once.

        Raises:
            BlockingCallError: called with time to wait in a callback of the hub; it stays open.
            StreamTimeoutError: not everything could be sent in time; it is closed all the same.
        """
        if self.closed:
            return
        if timeout is not None and has_time(timeout):
            # Whether or not anything is left to send: that depends on the kernel.
            check_may_wait(self.hub.environment.current())
        if timeout is None or not has_time(timeout):
            # There is no next turn.
            self._blocked = False
            self._flush(inf)
        else:
            self.flush()
        late = False
        if timeout is not None and self.buffered:
            drained = self.hub.environment.waiter()
            self._draining[drained] = None
            try:
                if self.buffered:  # the hub may have sent it before it could see the waiter
                    late = not drained.wait(timeout)
            finally:
                self._draining.pop(drained, None)
                left = self.buffered
                self.abort()
            if late and left:
                raise StreamTimeoutError(
                    f"{left} bytes for {self.peer} could not be sent in {timeout} s and are lost"
                )
        self.abort()

    def hub_gone(self, error: HubError, forked: bool) -> None:
        """The hub has ended, or belongs to the parent process (see `hub.loop.HubMember`)."""
        try:
            self._to_abort.pop()
        except IndexError:
            pass  # aborted already, but the hub has not come to closing it
        else:
            self.error = error
            if forked:
                self.error = StreamForkedError(
                    f"the connection to {self.peer} belongs to the parent process; make a new one"
                )
        self.closed = True
        self._finish()

    def flush_at_exit(self, deadline: float) -> None:
        """Send what is buffered, blocking the process until `deadline` at most."""
        self.coalesce = False  # what is written from now on may see no end of a turn
        try:
            self._blocked = False
            while (self._rest or (self._out and self._ready)) and not self.closed:
                token = object()
                left = deadline - self.hub.time()
                if left <= 0 or self._sender.setdefault(0, token) is not token:
                    return
                try:
                    self.sock.settimeout(left)
                    if self._send(inf) is not None:
                        return
                finally:
                    self._sender.pop(0, None)
                    self.sock.setblocking(False)
        except (OSError, StreamError):
            pass  # the program ends; there is nobody left to tell

    # -- helpers -------------------------------------------------------------------------
    def _on_hub(self, function: Any) -> None:
        """Call `function` in the hub's thread: now if this is it, else soon."""
        hub = self.hub
        if hub.closed:
            function()
        else:
            hub.call_here(function)

    def _wrap(self, error: OSError) -> StreamClosedError:
        wrapped = StreamClosedError(f"the connection to {self.peer} failed: {error}")
        wrapped.__cause__ = error
        return wrapped

    def _closed_error(self) -> StreamClosedError:
        if isinstance(self.error, StreamClosedError):
            return type(self.error)(str(self.error))
        cause = f": {self.error}" if self.error is not None else ""
        return StreamClosedError(f"the connection to {self.peer} is closed{cause}")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "paused" if self._paused else "open"
        return f"<Stream {self.peer} {state}, {self.buffered} bytes buffered>"


def _message(data: object) -> bytes | Parts:
    """Return what the out-buffer keeps of a message that is no bytes."""
    return Parts(data) if type(data) is list else as_bytes(data)


def _call_readable(reference: weakref.ref[Stream]) -> None:
    stream = reference()
    if stream is not None:
        stream._on_readable()


class _Tether(weakref.ref["Stream"]):
    """What closes the socket of a stream that is dropped without close(); see `Hub.reap`.

    As weakref.finalize, at a quarter of the cost, and a third of the memory.
    """

    __slots__ = ("fd", "hub", "sock")

    fd: int
    hub: Hub
    sock: socket.socket

    def cut(self) -> bool:
        """Leave the socket to the caller; False if it is being closed already."""
        return _tethers.pop(id(self), None) is not None


# They outlive their streams.
_tethers: dict[int, _Tether] = {}


def _tie(stream: Stream, hub: Hub, fd: int, sock: socket.socket) -> _Tether:
    tether = _Tether(stream, _reap)
    tether.hub = hub
    tether.fd = fd
    tether.sock = sock
    _tethers[id(tether)] = tether
    return tether


def _reap(tether: Any, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
    """A stream was dropped; called wherever the collector happens to be."""
    # When the interpreter ends, the hub and the modules are gone; the socket goes with the process.
    if not is_finalizing() and tether.cut():
        tether.hub.reap(tether.fd, tether.sock.close)
