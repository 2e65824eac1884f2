"""The Redis transport: compatible with Kombu's data, and without its losses.

`_scripts` tells what happens on the server and why no message is lost, `_taps` who takes messages
when, `connection` how one socket serves all channels.
"""

from __future__ import annotations

from greenkombu.exceptions import BatchPublishError, InconsistencyError
from greenkombu.transport.redis._compat import (
    DEFAULT_DB,
    DEFAULT_HEALTH_CHECK_INTERVAL,
    DEFAULT_PORT,
    PRIORITY_STEPS,
    Mutex,
    MutexHeld,
    error_classes_t,
    get_redis_ConnectionError,
    get_redis_error_classes,
)
from greenkombu.transport.redis._prefixed import (
    GlobalKeyPrefixMixin,
    PrefixedRedisPipeline,
    PrefixedRedisPubSub,
    PrefixedStrictRedis,
)
from greenkombu.transport.redis._unacked import QoS
from greenkombu.transport.redis.channel import Channel
from greenkombu.transport.redis.connection import Connection
from greenkombu.transport.redis.sentinel import SentinelChannel, SentinelTransport
from greenkombu.transport.redis.transport import SSLTransport, Transport

__all__ = [
    "DEFAULT_DB",
    "DEFAULT_HEALTH_CHECK_INTERVAL",
    "DEFAULT_PORT",
    "PRIORITY_STEPS",
    "BatchPublishError",
    "Channel",
    "Connection",
    "GlobalKeyPrefixMixin",
    "InconsistencyError",
    "Mutex",
    "MutexHeld",
    "PrefixedRedisPipeline",
    "PrefixedRedisPubSub",
    "PrefixedStrictRedis",
    "QoS",
    "SSLTransport",
    "SentinelChannel",
    "SentinelTransport",
    "Transport",
    "error_classes_t",
    "get_redis_ConnectionError",
    "get_redis_error_classes",
]
