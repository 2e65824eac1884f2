"""What Redis answers and what becomes of a connection to it, as errors.

An error reply is first a `ReplyError`: a value among the other replies of a pipeline, which is not
raised.  `to_error` makes of it what a caller gets.  Everything that a caller gets is an error of
redis-py, for programs that catch those, and one of `greenkombu.exceptions` as well.

There are two families, after what helps:

* `ServerError`: this connection is of no further use, another one may be.  It was lost, or the
  server is loading, has become a replica, or does not let us in.
* `CommandError`: the command was refused, and the connection goes on.
"""

from __future__ import annotations

import builtins
from typing import Any, TypeVar

from redis import exceptions as redis_py

from greenkombu import exceptions
from greenkombu.exceptions import KombuError, OperationalError, StdChannelError

__all__ = [
    "CHANNEL_ERRORS",
    "CONNECTION_ERRORS",
    "ArgumentError",
    "BusyLoadingError",
    "ClusterDownError",
    "CommandError",
    "CommandTimeoutError",
    "ConnectTimeoutError",
    "ConnectionForkedError",
    "ConnectionLostError",
    "CrossSlotError",
    "ExecAbortError",
    "LoginRefusedError",
    "MasterDownError",
    "NoPermissionError",
    "NoScriptError",
    "NoSuchDatabaseError",
    "OutOfMemoryError",
    "ProtocolError",
    "ReadOnlyError",
    "ReplyError",
    "ServerError",
    "TryAgainError",
    "WrongTypeError",
    "copy_of",
    "to_error",
]


_E = TypeVar("_E", bound=BaseException)


class ReplyError(KombuError):
    """An error reply, as the server wrote it; see `to_error`."""

    @property
    def message(self) -> str:
        """The text of the server."""
        return str(self.args[0]) if self.args else ""

    @property
    def code(self) -> str:
        """The first word, in capitals by convention: ERR, WRONGTYPE, READONLY, ..."""
        return self.message.partition(" ")[0]


class _Readable(KombuError):
    # redis-py's own repr() shows no text, and OSError's str() takes two arguments for a number and
    # a text.
    __repr__ = Exception.__repr__
    __str__ = Exception.__str__


class ArgumentError(_Readable, exceptions.ArgumentError, redis_py.DataError):
    """A value cannot be sent to Redis; nothing was sent."""


# -- the connection is of no further use


class ServerError(_Readable, OperationalError, redis_py.ConnectionError):
    """This connection to Redis cannot be used, and another one perhaps can."""


class ConnectionLostError(ServerError):
    """The connection could not be made, or broke, or was closed."""


class ConnectionForkedError(ConnectionLostError):
    """The connection belongs to the process before a fork."""


class LoginRefusedError(ServerError, redis_py.AuthenticationError):
    """The server refused user name and password, or wants some."""


class BusyLoadingError(ServerError, redis_py.BusyLoadingError):
    """The server is still reading its data set (LOADING)."""


class ReadOnlyError(ServerError, redis_py.ReadOnlyError):
    """The server is a replica (READONLY): another one is the master now."""


class ClusterDownError(ServerError, redis_py.ClusterDownError):
    """A part of the cluster has no server that serves it (CLUSTERDOWN)."""


class MasterDownError(ServerError, redis_py.MasterDownError):
    """The server is a replica that has lost its master (MASTERDOWN)."""


class CommandTimeoutError(
    _Readable, OperationalError, redis_py.TimeoutError, builtins.TimeoutError
):
    """The server did not answer a command in time; the command may still take effect."""


class ConnectTimeoutError(ServerError, redis_py.TimeoutError, builtins.TimeoutError):
    """There was no connection, or no login, within the time for that."""


class ProtocolError(ServerError, redis_py.InvalidResponse):
    """The server sent what the protocol of Redis does not allow, or more than may be received."""


# -- the command was refused


class CommandError(_Readable, StdChannelError, redis_py.ResponseError):
    """Redis refused a command; the connection goes on.

    `code` is the server's word for the reason.
    """

    code = "ERR"


class WrongTypeError(CommandError):
    """A key holds something else than the command works on (WRONGTYPE)."""


class OutOfMemoryError(CommandError, redis_py.OutOfMemoryError):
    """The server has reached its maxmemory, and takes nothing more (OOM)."""


class NoPermissionError(CommandError, redis_py.NoPermissionError):
    """The user may not do that (NOPERM)."""


class NoScriptError(CommandError, redis_py.NoScriptError):
    """The server does not have the script (NOSCRIPT)."""


class ExecAbortError(CommandError, redis_py.ExecAbortError):
    """A transaction was given up, as one of its commands was refused (EXECABORT)."""


class TryAgainError(CommandError, redis_py.TryAgainError):
    """The keys of the command are just moving to another server (TRYAGAIN)."""


class CrossSlotError(CommandError, redis_py.ClusterCrossSlotError):
    """The keys of the command lie on several servers of a cluster (CROSSSLOT)."""


class NoSuchDatabaseError(CommandError):
    """The server has no database of that number."""


#: What `Transport.connection_errors` has of this transport's own.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (
    redis_py.ConnectionError,
    redis_py.BusyLoadingError,
    redis_py.AuthenticationError,
    redis_py.TimeoutError,
    OperationalError,
    OSError,
)
#: What `Transport.channel_errors` has of this transport's own.
CHANNEL_ERRORS: tuple[type[BaseException], ...] = (
    redis_py.DataError,
    redis_py.InvalidResponse,
    redis_py.ResponseError,
    StdChannelError,
)

_BY_CODE: dict[str, tuple[type[KombuError], str]] = {
    "BUSY": (CommandError, "a script of somebody runs for too long: SCRIPT KILL ends it"),
    "CLUSTERDOWN": (ClusterDownError, "look at CLUSTER INFO"),
    "CROSSSLOT": (CrossSlotError, ""),
    "DENIED": (LoginRefusedError, ""),
    "EXECABORT": (ExecAbortError, ""),
    "LOADING": (BusyLoadingError, "try again when it has read its data set"),
    "MASTERDOWN": (MasterDownError, "connect to the master, or wait for it"),
    "MISCONF": (CommandError, "the server cannot save its data: look at its log and its disk"),
    "NOAUTH": (LoginRefusedError, "give user name and password in the URL"),
    "NOPERM": (NoPermissionError, "give the user that right (ACL SETUSER), or use another user"),
    "NOSCRIPT": (NoScriptError, ""),
    "OOM": (OutOfMemoryError, "consume or purge queues, or raise maxmemory"),
    "READONLY": (ReadOnlyError, "connect to the master"),
    "TRYAGAIN": (TryAgainError, ""),
    "WRONGPASS": (LoginRefusedError, "check user name and password"),
    "WRONGTYPE": (WrongTypeError, "use another name, or another database for other programs"),
}

# Beginnings of texts whose first word is only ERR.
_BY_TEXT: tuple[tuple[str, type[KombuError], str], ...] = (
    ("max number of clients reached", ServerError, "close some, or raise maxclients"),
    ("DB index is out of range", NoSuchDatabaseError, "use a smaller number, or raise databases"),
    ("SELECT is not allowed in cluster mode", NoSuchDatabaseError, "a cluster has database 0 only"),
    (
        "The user executing the script can't run this command",
        NoPermissionError,
        "give the user the commands of scripts as well, TIME among them (ACL SETUSER ... +time)",
    ),
    ("invalid password", LoginRefusedError, "check the password"),
    ("unknown command 'SENTINEL'", CommandError, "this is no sentinel; its port is mostly 26379"),
    ("unknown command", CommandError, "is this Redis 5 or newer, and no sentinel?"),
    ("Client sent AUTH, but no password is set", LoginRefusedError, "leave the password out"),
    ("AUTH <password> called without any password", LoginRefusedError, "leave the password out"),
)


def to_error(reply: ReplyError, *, server: str, what: str = "") -> KombuError:
    """Return the error that a caller gets for an error reply.

    Args:
        reply: what the server said.
        server: "host:port" or a path.
        what: the command, or what it was for; without its arguments, which may be secrets.
    """
    code = reply.code
    # A server that does not know a command repeats its arguments, which may hold a password.
    text = reply.message.partition(", with args beginning with")[0]
    kind, hint = _BY_CODE.get(code, (CommandError, ""))
    if code == "ERR":
        said = text[4:]
        for start, kind_of_text, hint_of_text in _BY_TEXT:
            if said.startswith(start):
                kind, hint = kind_of_text, hint_of_text
                break
    did = f" to {what}" if what else ""
    # Many of its texts end with a full stop.
    remedy = f" ({hint})" if hint and text.endswith(".") else f": {hint}" if hint else ""
    error = kind(f"Redis server {server} answered{did}: {text}{remedy}")
    if isinstance(error, CommandError):
        error.code = code
    return error


def copy_of(error: _E) -> _E:
    """Return a copy of *error* to raise in one more task.

    One object raised in many tasks would join their tracebacks and keep their frames alive.
    """
    made = type(error).__new__(type(error), *error.args)
    made.args = error.args
    attributes: dict[str, Any] = error.__dict__
    made.__dict__.update(attributes)
    made.__cause__ = error.__cause__
    return made
