"""The AMQP transport under the name that carrot and Kombu 1 had for it."""

from __future__ import annotations

from greenkombu.transport.amqplib import Channel, Connection, Message, Transport

__all__ = ["Channel", "Connection", "Message", "Transport"]
