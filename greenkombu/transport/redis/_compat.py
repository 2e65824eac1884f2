"""Names that Kombu's Redis module has besides its classes, for programs that import them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from redis import exceptions as redis_py

from greenkombu.exceptions import KombuError
from greenkombu.transport.redis._scripts import UNLOCK
from greenkombu.transport.redis.transport import Transport
from greenkombu.utils.uuid import uuid

__all__ = [
    "DEFAULT_DB",
    "DEFAULT_HEALTH_CHECK_INTERVAL",
    "DEFAULT_PORT",
    "PRIORITY_STEPS",
    "Mutex",
    "MutexHeld",
    "error_classes_t",
    "get_redis_ConnectionError",
    "get_redis_error_classes",
]

DEFAULT_PORT = 6379
DEFAULT_DB = 0
#: Seconds.
DEFAULT_HEALTH_CHECK_INTERVAL = 25
PRIORITY_STEPS = [0, 3, 6, 9]


class error_classes_t(NamedTuple):
    """What a transport raises, by what helps."""

    connection_errors: tuple[type[BaseException], ...]
    channel_errors: tuple[type[BaseException], ...]


def get_redis_error_classes() -> error_classes_t:
    """Return the errors of the Redis transport."""
    return error_classes_t(Transport.connection_errors, Transport.channel_errors)


def get_redis_ConnectionError() -> type[Exception]:
    """Return redis-py's ConnectionError, which ours are as well."""
    return redis_py.ConnectionError


class MutexHeld(KombuError):
    """Somebody else has the mutex."""


@contextlib.contextmanager
def Mutex(client: Any, name: str, expire: float) -> Iterator[None]:
    """Hold a mutex on the server while the block runs.

    Args:
        client: of redis-py, such as `Channel.client`.
        name: of the key.
        expire: seconds after which it is free again, whatever has become of this process.

    Raises:
        MutexHeld: somebody else has it.
    """
    mine = uuid()
    if not client.set(name, mine, px=max(int(expire * 1000), 1), nx=True):
        raise MutexHeld(f"the mutex {name!r} is held by another client; try again later")
    try:
        yield
    finally:
        client.eval(UNLOCK.text, 1, name, mine)
