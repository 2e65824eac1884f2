"""Open a stream: resolve, connect to the first address that answers, shake hands.

Several addresses are tried in the manner of RFC 8305 ("Happy Eyeballs"): in the resolver's
order but alternating between IPv6 and IPv4, the next one as soon as one fails, or after
a quarter of a second, while earlier ones go on.  One deadline covers all of it.  The
calling task parks on a waiter; the attempts are callbacks of the hub.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from hub._tls import TLSLayer
from hub.arguments import check_seconds
from hub.environment import check_may_wait, get_environment
from hub.errors import (
    BadArgumentError,
    HubClosedError,
    StreamError,
    StreamRefusedError,
    StreamTimeoutError,
)
from hub.loop import Hub
from hub.shared import get_hub
from hub.streams import HIGH_WATER, Stream, StreamHandler

if TYPE_CHECKING:
    import ssl

__all__ = ["SocketOptions", "open_stream"]

#: Seconds between attempts (RFC 8305, section 5: "Connection Attempt Delay").
ATTEMPT_DELAY = 0.25
#: Seconds until a Unix socket whose backlog is full is tried again: the kernel does not queue us.
BACKLOG_DELAY = 0.01


@dataclass(frozen=True)
class SocketOptions:
    """What is set on a socket before it connects; times in seconds, None leaves the default."""

    nodelay: bool = True
    keepalive: bool = True
    keepalive_idle: int | None = 60
    keepalive_interval: int | None = 10
    keepalive_count: int | None = 9
    #: How long sent bytes may stay unacknowledged before the connection is given up
    #: (TCP_USER_TIMEOUT): it finds a black hole also where nobody reads.
    user_timeout: float | None = None
    send_buffer_bytes: int | None = None
    receive_buffer_bytes: int | None = None
    #: Further (level, option) -> value, set last.
    extra: Mapping[tuple[int, int], int | bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse here what the platform would refuse in the hub, without the option's name.

        Raises:
            BadArgumentError: a value of a type, or a size, that no option has.
        """
        for name in (
            "nodelay",
            "keepalive",
            "keepalive_idle",
            "keepalive_interval",
            "keepalive_count",
            "send_buffer_bytes",
            "receive_buffer_bytes",
        ):
            value = getattr(self, name)
            if value is not None:
                _check_value(name, value)
        if self.user_timeout is not None:
            check_seconds(self.user_timeout, "the socket option user_timeout")
            if self.user_timeout * 1000 > _LARGEST_VALUE:
                raise BadArgumentError(
                    f"the socket option user_timeout ends at {_LARGEST_VALUE // 1000} seconds, "
                    f"{self.user_timeout!r} is more: None leaves the system's own"
                )
        for key, value in self.extra.items():
            if not (isinstance(key, tuple) and list(map(type, key)) == [int, int]):
                raise BadArgumentError(
                    f"the key {key!r} of further socket options is no (level, option): give two "
                    "numbers of the socket module"
                )
            if not isinstance(value, (bytes, bytearray, memoryview)):
                _check_value(_name_of(*key), value)

    def apply(self, sock: Any, tcp: bool) -> None:
        """Set them on `sock`; what the platform does not know is left out."""
        if tcp:
            for setting in self._of_tcp:
                sock.setsockopt(*setting)
        for setting in self._of_all:
            sock.setsockopt(*setting)

    # Kept, as thousands of connections share one object.
    @cached_property
    def _of_tcp(self) -> list[_Setting]:
        chosen: list[tuple[str, str, int | None]] = [
            ("SOL_SOCKET", "SO_KEEPALIVE", int(self.keepalive)),
            ("IPPROTO_TCP", "TCP_NODELAY", int(self.nodelay)),
        ]
        if self.keepalive:
            chosen += [
                ("IPPROTO_TCP", "TCP_KEEPIDLE", self.keepalive_idle),
                ("IPPROTO_TCP", "TCP_KEEPINTVL", self.keepalive_interval),
                ("IPPROTO_TCP", "TCP_KEEPCNT", self.keepalive_count),
            ]
        if self.user_timeout is not None:
            milliseconds = max(int(self.user_timeout * 1000), 1)
            chosen.append(("IPPROTO_TCP", "TCP_USER_TIMEOUT", milliseconds))
        return _known(chosen)

    @cached_property
    def _of_all(self) -> list[_Setting]:
        chosen = [
            ("SOL_SOCKET", "SO_SNDBUF", self.send_buffer_bytes),
            ("SOL_SOCKET", "SO_RCVBUF", self.receive_buffer_bytes),
        ]
        return _known(chosen) + [(*key, value) for key, value in self.extra.items()]


#: What a C int holds, which the system takes an option as.
_LARGEST_VALUE = 2**31 - 1


def _check_value(name: str, value: object) -> None:
    if not isinstance(value, int) or not -_LARGEST_VALUE <= value <= _LARGEST_VALUE:
        raise BadArgumentError(
            f"the socket option {name} is a whole number, not {value!r}: give one without quotes "
            "or fraction, or leave the option out"
        )


def _name_of(level: int, option: int) -> str:
    """Return what the socket module calls an option."""
    module = importlib.import_module("socket")
    prefix = {module.IPPROTO_TCP: "TCP_", module.SOL_SOCKET: "SO_"}.get(level, " ")
    found = (name for name in vars(module) if name.startswith(prefix))
    return next((name for name in found if getattr(module, name) == option), f"{level, option}")


# Level, option, value.
_Setting = tuple[int, int, Any]


def _known(chosen: list[tuple[str, str, int | None]]) -> list[_Setting]:
    """Return the numbers of the options that have a value and that the platform knows."""
    module = importlib.import_module("socket")
    return [
        (getattr(module, level), getattr(module, option), value)
        for level, option, value in chosen
        if value is not None and hasattr(module, option)
    ]


def open_stream(
    address: tuple[str, int] | str,
    handler: StreamHandler,
    *,
    timeout: float,
    tls: ssl.SSLContext | None = None,
    server_hostname: str | None = None,
    hub: Hub | None = None,
    options: SocketOptions | None = None,
    high_water: int = HIGH_WATER,
) -> Stream:
    """Connect to `address` and return a stream that reads into `handler`.

    Parks the calling task; a kill or Timeout that lands in it closes every attempt.

    Args:
        address: (host, port), or the path of a Unix socket.
        handler: see `hub.streams.StreamHandler`; it may be called before this returns.
        timeout: seconds for resolving, connecting and the TLS handshake together.
        tls: a context to speak TLS with; None speaks plain.
        server_hostname: the name in the peer's certificate; None takes the host.
        hub: None takes `get_hub()`.
        options: socket options; None takes the defaults of `SocketOptions`.
        high_water: bytes of the out-buffer; see `Stream.above_high_water`.

    Raises:
        BlockingCallError: called in a callback of a hub.
        BadArgumentError: the address, port, handler, timeout or context cannot be one.
        StreamTimeoutError: no connection within `timeout` seconds.
        TLSError: the handshake failed.
        StreamError: the name cannot be resolved, or no address can be reached.
    """
    check_seconds(timeout, "the timeout of open_stream")
    _check_objects(handler, tls)
    loop = hub or get_hub()
    # Always, and not only when a name or a distant peer makes it wait.
    check_may_wait(loop.environment.current())
    deadline = loop.time() + timeout
    options = options or SocketOptions()
    if isinstance(address, str):
        peer, host = address, None
        targets: list[tuple[Any, Any]] = [(_family("AF_UNIX"), address)]
    else:
        host, port = _host_and_port(address)
        peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        targets = _resolve(loop, host, port, peer, timeout)
    race = _Race(loop, targets, peer, options)
    sock = race.run(deadline, timeout)
    layer = TLSLayer(tls, server_hostname or host, peer) if tls is not None else None
    stream = Stream(loop, sock, handler, peer=peer, tls=layer, high_water=high_water)
    try:
        if layer is None:
            stream.start()
            return stream
        established = loop.environment.waiter()
        stream.begin_tls(established)
        stream.start()
        if not established.wait(max(deadline - loop.time(), 0)):
            raise StreamTimeoutError(
                f"{peer} accepted the connection but did not complete the TLS handshake within "
                f"{timeout} s: does it speak TLS on this port?"
            )
        if stream.closed:
            raise stream.error or StreamError(f"the TLS handshake with {peer} was given up")
    except BaseException as error:
        stream.abort(error if isinstance(error, Exception) else None)
        raise
    return stream


def _host_and_port(address: Any) -> tuple[str, int]:
    if not (isinstance(address, tuple) and len(address) == 2 and isinstance(address[0], str)):
        raise BadArgumentError(
            f"cannot connect to {address!r}: give (host, port), or the path of a Unix socket as str"
        )
    host, port = address
    if not isinstance(port, int) or isinstance(port, bool) or not 0 < port < 65536:
        raise BadArgumentError(
            f"cannot connect to {host}: the port is a number from 1 to 65535, not {port!r}"
        )
    return host, port


def _check_objects(handler: object, tls: object) -> None:
    """Refuse at once what would fail in the hub, when nobody waits for it any more."""
    for name in ("data_received", "connection_lost", "write_resumed"):
        if not callable(getattr(handler, name, None)):
            raise BadArgumentError(
                f"{handler!r} cannot handle a stream, it has no {name}(): see StreamHandler"
            )
    if tls is not None and not hasattr(tls, "wrap_bio"):
        raise BadArgumentError(f"tls={tls!r} is no ssl.SSLContext: give one, or None")


def _family(name: str) -> Any:
    module = importlib.import_module("socket")
    try:
        return getattr(module, name)
    except AttributeError:
        raise StreamError(f"this platform has no {name} sockets") from None


def _resolve(hub: Hub, host: str, port: int, peer: str, timeout: float) -> list[tuple[Any, Any]]:
    """Return (family, address) pairs, alternating between the families."""
    # A numeric address needs no resolver, and no task to wait for one.
    found: Any = _numeric(host, port) if "%" not in host else _numeric.__wrapped__(host, port)
    if not found:
        import socket

        try:
            found = hub.environment.getaddrinfo(host, port, timeout, type=socket.SOCK_STREAM)
        except TimeoutError as error:
            raise StreamTimeoutError(
                f"the name of {peer} could not be resolved within {timeout} s"
            ) from error
        except (OSError, UnicodeError) as error:
            raise StreamError(f"the name of {peer} cannot be resolved: {error}") from error
    if len(found) == 1:
        return [(found[0][0], found[0][4])]
    by_family: dict[Any, list[tuple[Any, Any]]] = {}
    for family, _, _, _, sockaddr in found:
        by_family.setdefault(family, []).append((family, sockaddr))
    targets: list[tuple[Any, Any]] = []
    while any(by_family.values()):
        targets += [queue.pop(0) for queue in by_family.values() if queue]
    return targets


# What a number means does not change, unless it names an interface behind a percent sign.
@lru_cache(64)
def _numeric(host: str, port: int) -> list[Any] | None:
    """Return what getaddrinfo says of a numeric address; None if it is a name."""
    import socket

    getaddrinfo = get_environment().original("socket", "getaddrinfo")
    try:
        # As bytes, or Python would run its codec for international names, which costs more than
        # all the rest.
        found: list[Any] = getaddrinfo(
            host.encode("ascii"), port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except (socket.gaierror, UnicodeError):
        return None
    return found


class _Race:
    """The attempts to connect to one peer; everything but `run` happens in the hub."""

    def __init__(
        self, hub: Hub, targets: list[tuple[Any, Any]], peer: str, options: SocketOptions
    ) -> None:
        self._hub = hub
        self._targets = targets
        self._peer = peer
        self._options = options
        self._make = hub.environment.original("socket", "socket")
        self._attempts: dict[int, Any] = {}
        self._errors: list[str] = []
        self._codes: set[int | None] = set()
        self._timer: Any = None
        self._winner: Any = None
        self._fault: Exception | None = None
        self._over = False
        self._waiter = hub.environment.waiter()

    def run(self, deadline: float, timeout: float) -> Any:
        """Return the first socket that connects; closes all others, whatever happens."""
        hub = self._hub
        won = None
        alone = False
        try:
            hub.call_here(self._next)
            # A peer on this machine has answered at once, and nothing else was begun.
            alone = self._winner is not None and hub.in_hub_thread() and not self._attempts
            if not alone:
                self._waiter.wait(max(deadline - hub.time(), 0))
            won = self._winner
        finally:
            # Exactly one of the two takes the winner: this task, or the cleaning up.
            if won is not None:
                self._winner = None
            if won is None or not alone or self._timer is not None:
                try:
                    hub.call_here(self._end)
                except HubClosedError:
                    self._end()
        if won is not None:
            return won
        if self._fault is not None:
            raise self._fault
        if self._hub.closed:
            raise HubClosedError(f"the hub was closed while connecting to {self._peer}")
        if self._waiter.woken:
            raise self._failure("; ".join(dict.fromkeys(self._errors)))
        tried = f" ({'; '.join(dict.fromkeys(self._errors))})" if self._errors else ""
        raise StreamTimeoutError(
            f"{self._peer} did not answer within {timeout} s{tried}: is the address right, and "
            "does a firewall drop the packets?"
        )

    def _note(self, code: int | None, text: str) -> None:
        self._codes.add(code)
        self._errors.append(text)

    def _failure(self, tried: str) -> StreamError:
        """Return the error of a race that nobody won; errno is set if all failed alike."""
        import errno

        refused = self._codes == {errno.ECONNREFUSED}
        kind = StreamRefusedError if refused else StreamError
        error = kind(f"cannot connect to {self._peer}: {tried}")
        if len(self._codes) == 1:
            [error.errno] = self._codes
        return error

    def _next(self) -> None:
        """Start the next attempt."""
        if self._over or self._winner is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._targets:
            family, sockaddr = self._targets.pop(0)
            if self._attempt(family, sockaddr):
                break
        if self._winner is None and not self._attempts and self._timer is None:
            self._waiter.wake()
        elif self._targets and self._winner is None and self._timer is None:
            self._timer = self._hub.call_later(ATTEMPT_DELAY, self._next)

    def _attempt(self, family: Any, sockaddr: Any) -> bool:
        """Begin to connect; False if it failed at once."""
        import errno
        import socket

        try:
            # Linux can leave out the call that makes it non-blocking.
            kind = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
            sock = self._make(family, kind)
        except OSError as error:
            self._note(error.errno, str(error))
            return False
        try:
            if sock.gettimeout() != 0:
                sock.setblocking(False)
            unix = family == getattr(socket, "AF_UNIX", None)
            self._options.apply(sock, not unix)
            code = sock.connect_ex(sockaddr)
            if code == errno.EINPROGRESS:
                # A peer on this machine has answered by now: looking again costs a hundredth of
                # what the hub needs to find out.
                code = sock.connect_ex(sockaddr)
            if code in (0, errno.EISCONN):
                self._winner = sock
                self._waiter.wake()
                return True
            if code == errno.EAGAIN and unix:
                # Not under way: the backlog is full (unix(7)), and the socket is as it was.
                sock.close()
                self._targets.append((family, sockaddr))
                self._timer = self._hub.call_later(BACKLOG_DELAY, self._next)
                return True
            if code not in (errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK):
                raise OSError(code, os.strerror(code))
            self._attempts[sock.fileno()] = sock
            self._hub.add_writer(sock.fileno(), self._connected, sock)
        except OSError as error:
            self._attempts.pop(sock.fileno(), None)
            sock.close()
            self._note(error.errno, error.strerror or str(error))
            return False
        except BaseException as error:
            self._attempts.pop(sock.fileno(), None)
            sock.close()
            if not isinstance(error, Exception):
                raise
            # An option of a wrong type: who gave it hears of it, and not the hub's log.
            self._fault = error
            self._waiter.wake()
        return True

    def _connected(self, sock: Any) -> None:
        """One attempt has come to its end, good or bad."""
        import socket

        fd = sock.fileno()
        self._hub.remove(fd)
        self._attempts.pop(fd, None)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            sock.close()
            self._note(code, os.strerror(code))
            self._next()
        elif self._over or self._winner is not None:
            sock.close()
        else:
            self._winner = sock
            self._waiter.wake()

    def _end(self) -> None:
        """Close whatever was not taken."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        for fd, sock in self._attempts.items():
            if not self._hub.closed:
                self._hub.remove(fd)
            sock.close()
        self._attempts.clear()
        if self._winner is not None:
            self._winner.close()
            self._winner = None
