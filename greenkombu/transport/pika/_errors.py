"""What pika raises and logs, as the rest of the program knows it."""

from __future__ import annotations

import logging

from pika import exceptions

from greenkombu._amqp.errors import (
    ConnectionLostError,
    HeartbeatLostError,
    MalformedValueError,
    MechanismError,
    ProtocolError,
)
from hub.environment import get_environment, running_callbacks

__all__ = ["translated"]


def translated(error: BaseException, broker: str) -> BaseException:
    """Return our error for one of pika's that ended a connection."""
    made: BaseException
    if isinstance(error, ProtocolError):
        made = type(error)(f"broker {broker}: {error.reply_text}", error.method_sig)
    elif isinstance(error, ConnectionLostError):
        return error  # of the inbox
    elif isinstance(error, exceptions.AMQPHeartbeatTimeout):
        made = HeartbeatLostError(f"broker {broker} is silent, the connection is dead: {error}")
    elif isinstance(error, exceptions.AuthenticationError):
        made = MechanismError(f"broker {broker} does not offer the login mechanism {error}")
    elif isinstance(error, exceptions.AMQPConnectionError):
        made = ConnectionLostError(f"lost the connection to broker {broker}: {error!r}")
    else:
        # Whatever was raised in the middle of its parser.
        made = MalformedValueError(f"broker {broker} sent what pika cannot read: {error!r}")
    made.__cause__ = error
    return made


class _NotInTheHub(logging.Filter):
    """Have records that pika makes in a hub written by a task: a log handler may wait."""

    def filter(self, record: logging.LogRecord) -> bool:
        hub = running_callbacks.get(get_environment().current())
        if hub is None:
            return True
        arguments = record.args if isinstance(record.args, tuple) else (record.args,)
        error = record.exc_info[1] if record.exc_info else None
        logger = logging.getLogger(record.name)
        hub.log_later(logger, record.levelno, str(record.msg), *(arguments or ()), error=error)
        return False


# A filter of a logger holds for what is logged by that logger itself, so each gets it.
for _name in (
    "adapters.base_connection",
    "callback",
    "channel",
    "connection",
    "credentials",
    "frame",
    "heartbeat",
):
    logging.getLogger(f"pika.{_name}").addFilter(_NotInTheHub())
