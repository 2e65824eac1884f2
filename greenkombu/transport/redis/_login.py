"""Opening a connection to Redis: the socket, TLS, who we are, which database.

With RESP3 it is one round trip: HELLO says protocol, user and name, SELECT the database, and PING
finds out whether the server is loading, which HELLO does not tell.  Servers before 6.0 and some
proxies do not know HELLO: then, and where the program asked for RESP2, AUTH, CLIENT SETNAME and
SELECT say the same one by one.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.exceptions import KombuError
from greenkombu.transport.redis._errors import (
    CommandTimeoutError,
    ConnectionLostError,
    ConnectTimeoutError,
    LoginRefusedError,
    ProtocolError,
    ReplyError,
    copy_of,
    to_error,
)
from hub.errors import StreamError, StreamTimeoutError, TLSError
from hub.streams import open_stream

if TYPE_CHECKING:
    from greenkombu.transport.redis._wire import Wire
    from hub.streams import StreamHandler

__all__ = ["open_wire"]

# What came instead of a reply, and what that means.
_FOREIGN = (
    (b"\x15\x03", "it speaks TLS on this port: use rediss://"),
    (b"\x16\x03", "it speaks TLS on this port: use rediss://"),
    (b"AMQP", "it is an AMQP broker: use amqp://, or the port of Redis, usually 6379"),
    (b"HTTP/", "it is an HTTP server: use the port of Redis, usually 6379"),
    (b"SSH-", "it is an SSH server: use the port of Redis, usually 6379"),
)

# Beginnings of a refusal of HELLO by a server or proxy that does not speak RESP3.
_NO_HELLO = ("ERR unknown command", "NOPROTO", "ERR unsupported command", "NOPERM")


def open_wire(wire: Wire, ear: StreamHandler, timeout: float) -> None:
    """Give *wire* its stream and log in, within *timeout* seconds.

    Raises:
        KombuError: see `Wire.connect`; the wire has to be aborted.
    """
    deadline = monotonic() + timeout
    username, password = wire.settings.credentials()
    _open_stream(wire, ear, deadline - monotonic())
    try:
        _log_in(wire, username, password, deadline)
    except CommandTimeoutError:
        raise ConnectTimeoutError(
            f"Redis server {wire.peer} accepted the connection but did not answer within"
            f" {timeout:g} s: is this the port of Redis, and is the server well?"
        ) from None
    except (ProtocolError, ConnectionLostError) as exc:
        raise _explained(wire, exc) from exc


def _explained(wire: Wire, error: KombuError) -> KombuError:
    """Return a better error for a login that broke off, by what the peer has said."""
    said = wire.first_bytes
    for start, meaning in _FOREIGN:
        if said.startswith(start):
            return ProtocolError(f"{wire.peer} does not speak the protocol of Redis: {meaning}")
    line, ended, _ = said.partition(b"\r\n")
    if line.startswith(b"-") and ended and not isinstance(error, ProtocolError):
        # It refused us and hung up.
        return to_error(ReplyError(line[1:].decode("utf-8", "replace")), server=wire.peer)
    if not said:
        return ConnectionLostError(f"{error} (does it speak TLS on this port? Then use rediss://)")
    return copy_of(error)


def _open_stream(wire: Wire, ear: StreamHandler, left: float) -> None:
    settings = wire.settings
    context, server_hostname = settings.tls()
    try:
        stream = open_stream(
            settings.address,
            ear,
            timeout=round(max(left, 0.0), 3),
            tls=context,
            server_hostname=server_hostname,
            options=settings.socket_options,
        )
    except TLSError as exc:
        raise ConnectionLostError(
            f"{exc} (Redis server {wire.peer}: is this its TLS port, and its certificate the right"
            " one?)"
        ) from exc
    except StreamTimeoutError as exc:
        raise ConnectTimeoutError(f"{exc} (Redis server {wire.peer})") from exc
    except StreamError as exc:
        if wire.error is not None:
            # It spoke before it was spoken to.
            raise copy_of(wire.error) from exc
        place = "with that unixsocket" if isinstance(settings.address, str) else "on that port"
        raise ConnectionLostError(f"{exc} (is the Redis server running there, {place}?)") from exc
    wire.stream = stream
    if wire.error is not None:
        stream.abort(wire.error)
        raise copy_of(wire.error)


def _log_in(wire: Wire, username: str | None, password: str | None, deadline: float) -> None:
    settings = wire.settings
    rest: list[tuple[Any, ...]] = [("SELECT", settings.db)] if settings.db else []
    rest.append(("PING",))
    if settings.protocol == 3:
        hello: tuple[Any, ...] = ("HELLO", 3)
        if password is not None or username is not None:
            hello += ("AUTH", username or "default", password or "")
        if settings.client_name:
            hello += ("SETNAME", settings.client_name)
        replies = wire.call_many([hello, *rest], deadline - monotonic(), raises=False)
        said = replies[0]
        if not isinstance(said, ReplyError):
            wire.protocol = 3
            wire.server = _texts(said)
            _check(wire, rest, replies[1:])
            return
        if not said.message.startswith(_NO_HELLO):
            raise to_error(said, server=wire.peer, what="the login")
    _log_in_by_steps(wire, username, password, rest, deadline)


def _log_in_by_steps(
    wire: Wire,
    username: str | None,
    password: str | None,
    rest: list[tuple[Any, ...]],
    deadline: float,
) -> None:
    commands: list[tuple[Any, ...]] = []
    if username is not None:
        commands.append(("AUTH", username, password or ""))
    elif password is not None:
        commands.append(("AUTH", password))
    if wire.settings.client_name:
        commands.append(("CLIENT", "SETNAME", wire.settings.client_name))
    commands += rest
    commands += [("INFO", "server"), ("INFO", "replication")]
    replies = wire.call_many(commands, deadline - monotonic(), raises=False)
    *answers, server, replication = replies
    _check(wire, commands[:-2], answers)
    about = {**_fields(server), **_fields(replication)}
    wire.server = {
        "server": "redis",
        "version": about.get("redis_version", ""),
        "mode": about.get("redis_mode", "standalone"),
        "role": about.get("role", "master"),
        "proto": 2,
    }


def _check(wire: Wire, commands: list[tuple[Any, ...]], replies: list[Any]) -> None:
    for command, reply in zip(commands, replies, strict=True):
        if not isinstance(reply, ReplyError):
            continue
        name = command[0]
        if reply.code == "NOPERM" and name in ("PING", "CLIENT"):
            continue  # neither is needed
        if name == "AUTH" and reply.code == "ERR":
            raise LoginRefusedError(
                str(to_error(reply, server=wire.peer, what="AUTH"))
                + " (before Redis 6, leave the user name out)"
            )
        raise to_error(reply, server=wire.peer, what="the login" if name == "PING" else name)


def _fields(reply: Any) -> dict[str, str]:
    """Read a section of INFO."""
    if not isinstance(reply, bytes):
        return {}
    lines = reply.decode("utf-8", "replace").splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _texts(reply: Any) -> dict[str, Any]:
    """Return what HELLO answered, with text for bytes."""
    if not isinstance(reply, dict):
        return {}
    return {_text(key): _text(value) for key, value in reply.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
