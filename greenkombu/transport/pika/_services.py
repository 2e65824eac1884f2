"""pika's protocol core on a stream of the hub.

pika asks its surroundings for timers, for calls in the thread of its loop and for a byte stream
(`pika.adapters.utils.nbio_interface`).  Here all three are the hub's, in every environment, so
neither `GeventConnection` nor a loop of pika's own is needed.  Resolving, connecting and TLS are
`hub.streams.open_stream`, in the task that connects; pika takes over from there.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any, NoReturn

from pika import exceptions, frame, heartbeat, spec
from pika.adapters.base_connection import BaseConnection
from pika.adapters.utils import nbio_interface

from greenkombu._amqp.errors import MessageTooLarge, UnexpectedFrameError
from greenkombu._amqp.protocol import FRAME_BODY, LARGE_BODY

if TYPE_CHECKING:
    from greenkombu.transport.pika._link import Link
    from hub.loop import Hub
    from hub.timers import Handle

__all__ = ["HubServices", "Protocol"]

_FRAME = Struct(">BHI").pack
_END = b"\xce"


class _Timer(nbio_interface.AbstractTimerReference):  # type: ignore[misc]
    """A timer of pika's that can be cancelled."""

    def __init__(self, link: Link, delay: float, callback: Callable[[], object]) -> None:
        self._link = link
        self._callback = callback
        self._handle: Handle = link.hub.call_later(delay, self._due)

    def _due(self) -> None:
        # Not before this cycle has read what has come: after a long computation the timer that
        # looks for the broker's heartbeats would else overtake them.
        self._handle = self._link.hub.call_soon(self._link.enter, self._callback)

    def cancel(self) -> None:
        self._handle.cancel()


class HubServices(nbio_interface.AbstractIOServices):  # type: ignore[misc]
    """What a connection of pika asks for, of a hub that has an owner already.

    Args:
        link: of the connection.
    """

    def __init__(self, link: Link) -> None:
        self._link = link

    def get_native_ioloop(self) -> Hub:
        return self._link.hub

    def add_callback_threadsafe(self, callback: Callable[[], object]) -> None:
        self._link.hub.call_soon_threadsafe(self._link.enter, callback)

    def call_later(self, delay: float, callback: Callable[[], object]) -> _Timer:
        return _Timer(self._link, delay, callback)

    def _not_here(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("the hub runs by itself, and hub.streams.open_stream connects")

    close = run = stop = getaddrinfo = connect_socket = create_streaming_connection = _not_here


class _HeartbeatChecker(heartbeat.HeartbeatChecker):  # type: ignore[misc]
    """pika's, for a connection that may have stopped reading on purpose."""

    def __init__(self, link: Link, protocol: Protocol, interval: int) -> None:
        self._link = link
        super().__init__(protocol, interval)

    @property
    def bytes_received_on_connection(self) -> int:
        """A number that has changed, as long as nothing is read: silence means nothing then."""
        received: int = super().bytes_received_on_connection
        return -1 if self._link.reading_paused else received


class Protocol(BaseConnection):  # type: ignore[misc]
    """pika's connection, linked with a stream.

    Args:
        parameters: of the connection.
        link: to the stream.
        max_message_size: octets; of larger messages only the header is kept.
    """

    def __init__(self, parameters: Any, link: Link, max_message_size: int) -> None:
        self._link = link
        self._max_message_size = max_message_size
        # Octets of bodies that are still to come and to be dropped, by channel.
        self._dropping: dict[int, int] = {}
        # Headers of large messages whose bodies are coming in, by channel.
        self._collecting: dict[int, Any] = {}
        super().__init__(
            parameters,
            link.opened,
            link.ended,
            link.ended,
            HubServices(link),
            internal_connection_workflow=False,
        )
        self.add_on_connection_blocked_callback(link.blocked)
        self.add_on_connection_unblocked_callback(link.unblocked)
        # Called behind pika's own, with the frame: only that names the login mechanisms, and the
        # method at fault.
        self.callbacks.add(0, spec.Connection.Start, link.greeted)
        self.callbacks.add(0, spec.Connection.Close, link.refused)

    @classmethod
    def create_connection(cls, *arguments: Any, **options: Any) -> NoReturn:
        raise NotImplementedError("the transport connects")

    # What pika's stream shim calls, under public names.

    def connected(self) -> None:
        """Begin the handshake."""
        self._proto_connection_made(self._link)

    def received(self, data: bytes) -> None:
        """Take bytes of the broker."""
        self._proto_data_received(data)

    def lost(self, error: BaseException | None) -> None:
        """Take the end of the stream."""
        self._proto_connection_lost(error)

    # What pika lets adapters replace.

    def _create_heartbeat_checker(self) -> _HeartbeatChecker | None:
        interval = self.params.heartbeat
        return _HeartbeatChecker(self._link, self, interval) if interval else None

    def _process_frame(self, frame_value: Any) -> None:
        """Keep large bodies from pika, which would join them here, in the hub.

        The message comes with an empty body, and the pieces of its own are in its properties.  The
        body of one that is too large is dropped.
        """
        if isinstance(frame_value, frame.Header) and frame_value.body_size > self._max_message_size:
            self._dropping[frame_value.channel_number] = frame_value.body_size
            frame_value.properties.fault = MessageTooLarge(
                f"a message on channel {frame_value.channel_number} has a body of"
                f" {frame_value.body_size} octets; the limit is {self._max_message_size}"
                " (transport option max_message_size)"
            )
            frame_value.body_size = 0
        elif self._dropping and isinstance(frame_value, frame.Body):
            number = frame_value.channel_number
            if number in self._dropping:
                self._dropping[number] -= len(frame_value.fragment)
                if self._dropping[number] <= 0:
                    del self._dropping[number]
                return
        elif isinstance(frame_value, frame.Header) and frame_value.body_size > LARGE_BODY:
            frame_value.properties.pieces = []
            self._collecting[frame_value.channel_number] = frame_value
            return
        elif self._collecting and frame_value.channel_number in self._collecting:
            whole = self._collect(frame_value)
            if whole is None:
                return
            frame_value = whole
        super()._process_frame(frame_value)

    def _collect(self, frame_value: Any) -> Any:
        """Add a frame to a large body; return what pika is to have: the header of a whole one."""
        header = self._collecting[frame_value.channel_number]
        if not isinstance(frame_value, frame.Body):
            raise UnexpectedFrameError(
                f"{frame_value.NAME} on channel {frame_value.channel_number} inside of a body"
            )
        pieces = header.properties.pieces
        pieces.append(frame_value.fragment)
        header.body_size -= len(frame_value.fragment)
        if header.body_size > 0:
            return None
        del self._collecting[frame_value.channel_number]
        if header.body_size < 0:
            size = sum(map(len, pieces))
            raise exceptions.BodyTooLongError(size, size + header.body_size)
        return header

    def _send_message(self, channel_number: int, method_frame: Any, content: Any) -> None:
        """Publish a message; a large one in parts that are not copied."""
        properties, body = content
        if len(body) <= LARGE_BODY:
            super()._send_message(channel_number, method_frame, content)
            return
        parts = [
            frame.Method(channel_number, method_frame).marshal(),
            frame.Header(channel_number, len(body), properties).marshal(),
        ]
        view = memoryview(body)
        for start in range(0, len(body), self._body_max_length):
            fragment = view[start : start + self._body_max_length]
            parts += (_FRAME(FRAME_BODY, channel_number, len(fragment)), fragment, _END)
        self._output_marshaled_frames(parts)
