"""What is left of the interface of `amqp.Connection`: names for what a connection has anyway."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from greenkombu._amqp.frames import HEARTBEAT
from greenkombu._amqp.opening import PORT, TLS_PORT, Opening, parse_host
from greenkombu._amqp.requests import NO_SLOTS
from greenkombu._amqp.rpc import fresh
from greenkombu._amqp.sockview import SocketView

if TYPE_CHECKING:
    from typing_extensions import Self

    from hub.streams import Stream

__all__ = ["AMQPInterface"]


class AMQPInterface:
    """The part of a `Connection` that only renames; see there for the attributes."""

    __slots__ = NO_SLOTS

    broker: str
    error: BaseException | None
    host: str
    on_open: Callable[[Any], object] | None
    ssl: Any
    stream: Stream | None
    _opening: Opening | None

    if TYPE_CHECKING:

        def abort(self, error: BaseException | None = None) -> None: ...
        def close(self) -> None: ...
        def connect(self) -> Any: ...
        def drain_events(self, timeout: float | None = None) -> None: ...
        def send(self, data: bytes, flush: bool = False) -> None: ...

    @property
    def connected(self) -> bool:
        """True from a successful `connect` until the connection has ended."""
        return self.error is None and self.stream is not None and self._opening is None

    @property
    def where(self) -> str:
        """The broker, for errors."""
        return f"the connection to broker {self.broker}"

    @property
    def transport(self) -> Self:
        """Itself: it has the `sock`, `host` and `connected` that amqp's transport has."""
        return self

    @property
    def sock(self) -> Any:
        """The socket, to look at; reading and writing it is the hub's business."""
        return SocketView(self.stream) if self.stream is not None else None

    @property
    def port(self) -> int:
        """The port that it connects to."""
        return parse_host(self.host, TLS_PORT if self.ssl else PORT)[1]

    @property
    def bytes_sent(self) -> int:
        """Octets that the kernel has taken."""
        return self.stream.sent_bytes if self.stream is not None else 0

    @property
    def bytes_recv(self) -> int:
        """Octets that came."""
        return self.stream.received_bytes if self.stream is not None else 0

    def is_alive(self) -> bool:
        """Same as `connected`."""
        return self.connected

    def collect(self) -> None:
        """Same as `abort()`."""
        self.abort()

    def blocking_read(self, timeout: float | None = None) -> None:
        """Same as `drain_events`."""
        self.drain_events(timeout)

    def send_heartbeat(self) -> None:
        """Send a heartbeat now; the hub does that when it is due."""
        self.send(HEARTBEAT, flush=True)

    def heartbeat_tick(self, rate: int = 2) -> None:
        """Raise the error of a dead connection; the hub sees to heartbeats."""
        del rate
        if self.error is not None:
            raise fresh(self.error)

    def then(self, on_success: Callable[[Any], object], on_error: Any = None) -> Self:
        """Call *on_success* with the connection, now if it is open, else once it is."""
        del on_error
        if self.connected:
            on_success(self)
        else:
            self.on_open = on_success
        return self

    def __enter__(self) -> Self:
        self.connect()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        self.close()
