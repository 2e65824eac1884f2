"""Errors of the AMQP protocol layer.

Two families, after the question whose fault it is:

* `ProtocolError`: the peer broke AMQP 0-9-1.  The stream cannot be followed any further, so the
  connection is aborted with it.  Each leaf is also the class of the ``amqp`` package that has the
  same reply code, so that programs which catch that one go on working.
* `ArgumentError`: the caller passed a value that AMQP cannot carry.  Nothing was sent; channel
  and connection are as they were.

Between them stands `MessageTooLarge`: the peer kept the protocol, but the message is beyond the
receiver's bound.  It concerns that message only.

All are built like ``amqp``'s, ``(reply_text, method_sig, method_name, reply_code)``, and pickle.
"""

from __future__ import annotations

from amqp.exceptions import (
    AccessRefused,
    AMQPNotImplementedError,
    ConnectionForced,
    ContentTooLarge,
    FrameError,
    FrameSyntaxError,
    IrrecoverableConnectionError,
    NotAllowed,
    RecoverableConnectionError,
    ResourceError,
    UnexpectedFrame,
)

from greenkombu import exceptions
from greenkombu.exceptions import BodyTooLarge, KombuError, OperationalError

__all__ = [
    "ArgumentError",
    "BadFrameError",
    "ChannelLimitError",
    "ConnectionLostError",
    "ForeignProtocolError",
    "HandshakeError",
    "HeartbeatLostError",
    "InboxOverflowError",
    "LoginRefusedError",
    "MalformedValueError",
    "MechanismError",
    "MessageTooLarge",
    "ProtocolError",
    "RPCTimeoutError",
    "UnexpectedFrameError",
    "UnknownMethodError",
    "VirtualHostError",
    "WriteTimeoutError",
]


class ProtocolError(KombuError, IrrecoverableConnectionError):  # type: ignore[misc]
    """The peer sent what AMQP 0-9-1 does not allow; the connection is aborted."""


class BadFrameError(ProtocolError, FrameError):  # type: ignore[misc]
    """A frame has an unknown type, a wrong end octet, or is larger than was agreed (501)."""


class MalformedValueError(ProtocolError, FrameSyntaxError):  # type: ignore[misc]
    """A value inside a frame cannot be decoded (502)."""


class UnexpectedFrameError(ProtocolError, UnexpectedFrame):  # type: ignore[misc]
    """A frame came where another kind was due (505)."""


class UnknownMethodError(ProtocolError, AMQPNotImplementedError):  # type: ignore[misc]
    """The peer sent a method that AMQP 0-9-1 with RabbitMQ's extensions does not have (540)."""


class ForeignProtocolError(ProtocolError, FrameError):  # type: ignore[misc]
    """The peer does not speak AMQP 0-9-1 here: TLS, HTTP, or another version of AMQP."""


class ArgumentError(FrameSyntaxError, exceptions.ArgumentError):  # type: ignore[misc]
    """A value cannot be sent by AMQP; nothing was sent."""


class MessageTooLarge(BodyTooLarge, ContentTooLarge):  # type: ignore[misc]
    """A received body is larger than `max_message_size`; it was dropped while it came in."""


class HandshakeError(KombuError, IrrecoverableConnectionError):  # type: ignore[misc]
    """The broker ended the handshake."""


class MechanismError(HandshakeError):
    """The broker offers no login mechanism that may be used."""


class LoginRefusedError(HandshakeError, AccessRefused):  # type: ignore[misc]
    """The broker refused user name and password (403)."""


class VirtualHostError(HandshakeError, NotAllowed):  # type: ignore[misc]
    """The virtual host does not exist, or the user may not use it (530)."""


class ConnectionLostError(KombuError, RecoverableConnectionError):  # type: ignore[misc]
    """The connection to the broker broke; a new one may work."""


class HeartbeatLostError(ConnectionLostError, ConnectionForced):  # type: ignore[misc]
    """Nothing was heard of the broker for two heartbeat intervals."""


class InboxOverflowError(ConnectionLostError):
    """Deliveries came faster than they were drained while reading could not be paused."""


class ChannelLimitError(KombuError, ResourceError):  # type: ignore[misc]
    """All channel ids of the connection are in use, and none came back in time (506)."""


class RPCTimeoutError(OperationalError, RecoverableConnectionError, TimeoutError):  # type: ignore[misc]
    """The broker did not answer a request in time; its late answer will be dropped."""

    # OSError.__str__, from TimeoutError, would format the arguments as errno and text.
    __str__ = RecoverableConnectionError.__str__


class WriteTimeoutError(OperationalError, RecoverableConnectionError, TimeoutError):  # type: ignore[misc]
    """The broker takes no data; the message was not appended to the out-buffer."""

    __str__ = RecoverableConnectionError.__str__
