"""Virtual transports: AMQP emulated on stores that are no AMQP brokers."""

from __future__ import annotations

from greenkombu.exceptions import NotEquivalentError
from greenkombu.transport.virtual.base import (
    AbstractChannel,
    Base64,
    BrokerState,
    Channel,
    Connection,
    Empty,
    Management,
    Message,
    QoS,
    Transport,
    UndeliverableWarning,
    binding_key_t,
    queue_binding_t,
)

__all__ = [
    "AbstractChannel",
    "Base64",
    "BrokerState",
    "Channel",
    "Connection",
    "Empty",
    "Management",
    "Message",
    "NotEquivalentError",
    "QoS",
    "Transport",
    "UndeliverableWarning",
    "binding_key_t",
    "queue_binding_t",
]
