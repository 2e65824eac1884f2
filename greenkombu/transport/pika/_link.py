"""Between a stream of the hub and pika's protocol core.

All of pika's code runs in the hub: what tasks want of it is queued (`Link.post`), what the stream
brings is fed to it.  pika has no locks and needs none then; no exception of a signal handler or
Timeout can land in it.

pika copies the rest of its buffer for each frame, and spends some 20 us on a message.  So it is fed
in small pieces, for a few milliseconds at a time; meanwhile the socket is not read.
"""

from __future__ import annotations

import sys
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pika import exceptions
from pika.adapters.utils import nbio_interface

from greenkombu._amqp.errors import BadFrameError
from greenkombu._amqp.protocol import LARGE_BODY
from greenkombu.transport.pika._errors import translated
from greenkombu.transport.pika._services import Protocol
from hub.errors import HubClosedError, HubError

if TYPE_CHECKING:
    from greenkombu.transport.pika._connection import Connection
    from hub.loop import Hub
    from hub.streams import Stream

__all__ = ["Link"]

#: Octets that pika gets at once: with 64 times as much, the copies cost more than the messages.
FEED_SIZE = 8192
#: Seconds of pika's work after which the hub has its turn.
FEED_SECONDS = 0.005
#: Octets of a frame around its payload (AMQP 0-9-1, 4.2.3).
FRAME_OVERHEAD = 8


class Link(nbio_interface.AbstractStreamTransport):  # type: ignore[misc]
    """Between a stream of the hub and pika: handler of the one, transport of the other.

    It refers to the connection weakly, so that one that was dropped without `close()` can be
    collected.

    Args:
        connection: whose stream it is; `begin` is called once that is connected.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = weakref.ref(connection)
        self.stream: Stream | None = None
        self.protocol: Protocol | None = None
        self._backlog: deque[bytes] = deque()
        self._pieces: list[bytes] = []
        self._fed = 0
        # Why the socket is not read: pika is behind; the inbox is full.
        self._behind = False
        self._full = False
        # The end of the stream, which waits until pika has got what came before it.
        self._end: list[BaseException | None] = []
        # How often pika's code is on the stack.
        self._inside = 0

    @property
    def hub(self) -> Hub:
        """The hub in which pika runs."""
        assert self.stream is not None
        return self.stream.hub

    # -- from tasks

    def post(self, step: Callable[..., object], *arguments: Any) -> None:
        """Run `step(*arguments)` in the hub soon; never waits.

        Raises:
            HubError: the hub has ended, or the interpreter is about to.
        """
        try:
            self.hub.call_soon_threadsafe(self.enter, step, *arguments)
        except (ImportError, RuntimeError) as exc:
            if not sys.is_finalizing():
                raise
            # A finalizer of the program's; there are no threads any more that could run the hub.
            raise HubClosedError("the interpreter is shutting down") from exc

    def enter(self, function: Callable[..., object], *arguments: Any) -> None:
        """Run something of pika's, in the hub; an error in it ends this connection only."""
        self._inside += 1
        try:
            function(*arguments)
        except Exception as exc:
            self._abort(exc)
        finally:
            self._inside -= 1
        self.flush()

    def begin(self, parameters: Any, max_message_size: int) -> None:
        """Start the handshake; called in the hub."""
        self.protocol = Protocol(parameters, self, max_message_size)
        self.protocol.connected()
        self._feed()

    # -- the stream's handler, in the hub

    def data_received(self, data: bytes) -> None:
        """Take bytes from the stream."""
        self._backlog.extend(data[at : at + FEED_SIZE] for at in range(0, len(data), FEED_SIZE))
        if not self._behind and self.protocol is not None:
            self._feed()

    def _feed(self) -> None:
        self.enter(self._feed_for_a_while)
        stream, connection = self.stream, self._connection()
        if stream is None or connection is None:
            return
        if self._backlog and self.protocol is not None:
            if not self._behind:
                self._behind = True
                stream.pause_reading()
            self.hub.call_soon(self._feed)
            return
        if self._behind:
            self._behind = False
            if not self._full:
                stream.resume_reading()
        if self._end:
            self.connection_lost(self._end.pop())

    def _feed_for_a_while(self) -> None:
        connection = self._connection()
        until = self.hub.time() + FEED_SECONDS
        octets = 0
        if connection is not None:
            connection.intake.starts()
        while self._backlog and self.protocol is not None:
            data = self._backlog.popleft()
            octets += len(data)
            self._fed += len(data)
            protocol = self.protocol
            protocol.received(data)
            # A frame that claims to be larger than was agreed would be waited for, and kept.
            begun = self._fed - protocol.bytes_received
            if begun > protocol.params.frame_max + FRAME_OVERHEAD and self.protocol is protocol:
                raise BadFrameError(f"a frame of more than {protocol.params.frame_max} octets")
            if self.hub.time() > until:
                break
        if connection is not None and octets and connection.error is None:
            connection.intake.took(octets, connection.broker)

    def connection_lost(self, error: BaseException | None) -> None:
        """Take the end of the stream."""
        connection = self._connection()
        alive = connection is not None and connection.error is None
        hub_closed = self.stream is not None and self.hub.closed
        if alive and not hub_closed and (self.stream is None or self._backlog):
            self._end.append(error)
            return
        if connection is not None:
            connection.connection_lost(error)
        protocol, self.protocol = self.protocol, None
        self._backlog.clear()
        # After a fork, or without its hub, pika has nothing to tidy up: its timers are gone.
        if protocol is not None and not hub_closed:
            if self._inside:  # pika does not expect it in the middle of its work
                self.hub.call_soon(self.enter, protocol.lost, error)
            else:
                self.enter(protocol.lost, error)

    def write_resumed(self) -> None:
        """The out-buffer has room again."""
        connection = self._connection()
        if connection is not None:
            connection.gate.open()

    # -- the transport of pika, in the hub

    def write(self, data: bytes) -> None:
        """Take a frame; the frames of a message go to the stream as one piece."""
        self._pieces.append(data)

    def flush(self) -> None:
        """Hand over what pika has written; never waits."""
        pieces, self._pieces = self._pieces, []
        if pieces and self.stream is not None and not self.stream.closed:
            try:
                size = sum(map(len, pieces))
                self.stream.write(pieces if size > LARGE_BODY else b"".join(pieces))
            except HubError:
                pass  # its end is told by itself

    def abort(self) -> None:
        """End the stream, because pika wants to; it hears of that later, as it expects."""
        self.flush()
        self.hub.call_soon(self._aborted)

    def _aborted(self) -> None:
        protocol, self.protocol = self.protocol, None
        if protocol is not None:
            self.enter(protocol.lost, None)

    def get_protocol(self) -> Any:
        return self.protocol

    def get_write_buffer_size(self) -> int:
        return self.stream.buffered if self.stream is not None else 0

    # -- as the inbox sees the stream

    def pause_reading(self) -> None:
        """Leave further bytes in the kernel, because of the inbox."""
        self._full = True
        if self.stream is not None:
            self.stream.pause_reading()

    def resume_reading(self) -> None:
        """The inbox has room; from any thread."""
        self._full = False
        if self.stream is not None and not self._behind:
            self.stream.resume_reading()

    @property
    def reading_paused(self) -> bool:
        """Whether the socket is not read, for whatever reason."""
        return self._full or self._behind

    # -- what pika tells, in the hub

    def greeted(self, method_frame: Any) -> None:
        """The broker has said what it can do."""
        connection = self._connection()
        if connection is not None:
            connection.greeted(method_frame.method)

    def opened(self, protocol: Protocol) -> None:
        """The handshake is complete."""
        connection = self._connection()
        if connection is not None:
            connection.handshaken(protocol)

    def ended(self, protocol: Protocol, error: BaseException) -> None:  # noqa: ARG002  pika's
        """The connection has failed, or was closed as we wanted it."""
        connection = self._connection()
        if connection is None:
            if self.stream is not None:
                self.stream.abort()
        elif isinstance(error, exceptions.ConnectionClosedByClient):
            connection.said_goodbye()
        else:
            self._abort(error)

    def refused(self, method_frame: Any) -> None:
        """The broker has sent Connection.close."""
        connection = self._connection()
        if connection is not None:
            method = method_frame.method
            connection.ended_by_broker(
                method.reply_code, method.reply_text, (method.class_id, method.method_id)
            )

    def blocked(self, protocol: Protocol, method_frame: Any) -> None:  # noqa: ARG002  pika's
        """The broker takes no publishes for now."""
        connection = self._connection()
        if connection is not None:
            connection._on_blocked(method_frame.method.reason)

    def unblocked(self, protocol: Protocol, method_frame: Any) -> None:  # noqa: ARG002  pika's
        """The broker takes publishes again."""
        connection = self._connection()
        if connection is not None:
            connection._on_unblocked()

    def _abort(self, error: BaseException) -> None:
        connection = self._connection()
        if connection is not None:
            connection.abort(translated(error, connection.broker))
        elif self.stream is not None:
            self.stream.abort(error if isinstance(error, Exception) else None)
