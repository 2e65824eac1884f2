"""What programs may do with the socket of a connection that the hub reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from greenkombu.exceptions import UnsupportedOperation

if TYPE_CHECKING:
    from hub.streams import Stream

__all__ = ["SocketView"]


class SocketView:
    """The socket behind a stream: look at it, set its options, close it.

    Timeouts are taken and have no effect: a timeout on the socket itself would make the hub wait
    in it.  Reading and writing are refused.
    """

    __slots__ = ("_stream", "_timeout")

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._timeout: float | None = None

    def fileno(self) -> int:
        """Return the descriptor; -1 once it is closed."""
        number: int = self._stream.sock.fileno()
        return number

    def getsockopt(self, *arguments: Any) -> Any:
        """Same as socket.getsockopt."""
        return self._stream.sock.getsockopt(*arguments)

    def setsockopt(self, *arguments: Any) -> None:
        """Same as socket.setsockopt."""
        self._stream.sock.setsockopt(*arguments)

    def getpeername(self) -> Any:
        """Return the broker's address."""
        return self._stream.sock.getpeername()

    def getsockname(self) -> Any:
        """Return our address."""
        return self._stream.sock.getsockname()

    @property
    def family(self) -> Any:
        """The address family."""
        return self._stream.sock.family

    def settimeout(self, timeout: float | None) -> None:
        """Remember *timeout* for `gettimeout`, no more."""
        self._timeout = timeout

    def gettimeout(self) -> float | None:
        """Return what `settimeout` was given."""
        return self._timeout

    def setblocking(self, flag: bool) -> None:
        """Do nothing: the socket stays non-blocking."""

    def close(self) -> None:
        """Abort the connection."""
        self._stream.abort()

    def shutdown(self, how: int) -> None:
        """Abort the connection."""
        del how
        self._stream.abort()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith(("recv", "send")):
            raise UnsupportedOperation(
                f"the hub reads and writes this socket: {name}() would tear its stream"
            )
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"<SocketView of {self._stream!r}>"
