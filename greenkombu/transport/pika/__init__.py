"""AMQP 0-9-1 by pika's protocol core, on the hub; needs the extra ``greenkombu[pika]``.

Same API, bounds and errors as the pyamqp transport.  pika encodes, decodes, shakes hands, sends
heartbeats and keeps the state of its channels; sockets, TLS, timers, waiting, the inbox and its
back-pressure are the hub's and `greenkombu._amqp`'s, so it is green in every environment.
"""

from __future__ import annotations

from typing import Any

import pika

from greenkombu.transport import pyamqp
from greenkombu.transport.pika._channel import Channel
from greenkombu.transport.pika._connection import Connection

__all__ = ["Channel", "Connection", "Transport"]


class Transport(pyamqp.Transport):
    """AMQP 0-9-1 by pika."""

    Connection: type[Any] = Connection

    driver_name = "pika"

    def driver_version(self) -> str:
        """Return the version of pika."""
        version: str = pika.__version__
        return version
