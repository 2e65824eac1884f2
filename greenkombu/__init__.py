"""Kombu's messaging API for programs that run on green threads.

    from greenkombu import Connection

    with Connection("amqp://guest:guest@localhost//") as connection:
        queue = connection.SimpleQueue("greetings")
        queue.put({"hello": "world"})
        message = queue.get(timeout=1)
        message.ack()

Names are imported when they are first used: `import greenkombu` brings in no socket, ssl, select or
threading, so that a program may patch after it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import hub as _hub  # noqa: F401  now: see hub._exit

__version__ = "0.1.0"


class version_info_t(NamedTuple):
    """The parts of a version, as `VERSION` has them."""

    major: int
    minor: int
    micro: int
    releaselevel: str
    serial: str


VERSION = version_info_t(0, 1, 0, "", "")

_HOMES = {
    "greenkombu.common": ("eventloop",),
    "greenkombu.connection": ("BrokerConnection", "Connection"),
    "greenkombu.drain": ("DrainLoop", "drain_events"),
    "greenkombu.entity": ("Exchange", "Queue", "binding"),
    "greenkombu.message": ("Message",),
    "greenkombu.messaging": ("Consumer", "Producer"),
    "greenkombu.pools": ("connections", "producers"),
    "greenkombu.serialization": ("disable_insecure_serializers", "enable_insecure_serializers"),
    "greenkombu.simple": ("SimpleBuffer", "SimpleQueue"),
    "greenkombu.utils.url": ("parse_url",),
    "greenkombu.utils.uuid": ("uuid",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from greenkombu.common import eventloop
    from greenkombu.connection import BrokerConnection, Connection
    from greenkombu.drain import DrainLoop, drain_events
    from greenkombu.entity import Exchange, Queue, binding
    from greenkombu.message import Message
    from greenkombu.messaging import Consumer, Producer
    from greenkombu.pools import connections, producers
    from greenkombu.serialization import (
        disable_insecure_serializers,
        enable_insecure_serializers,
    )
    from greenkombu.simple import SimpleBuffer, SimpleQueue
    from greenkombu.utils.url import parse_url
    from greenkombu.utils.uuid import uuid

__all__ = [
    "VERSION",
    "BrokerConnection",
    "Connection",
    "Consumer",
    "DrainLoop",
    "Exchange",
    "Message",
    "Producer",
    "Queue",
    "SimpleBuffer",
    "SimpleQueue",
    "__version__",
    "binding",
    "connections",
    "disable_insecure_serializers",
    "drain_events",
    "enable_insecure_serializers",
    "eventloop",
    "parse_url",
    "producers",
    "uuid",
    "version_info_t",
]


def __getattr__(name: str) -> Any:
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'greenkombu' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
