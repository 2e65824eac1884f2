"""A test that failed may run again (`.ci/run`), and is to find what it found the first time.

What is made for one test goes with its fixtures, also after a failure. What they cannot see to: the
traceback keeps all that the attempt had, whose finalizers would run in the middle of the next one;
its tasks may be at work, and the shared hub may watch its descriptors; and what it put into a
broker that the run shares, under names that the next one uses as well, is still there.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import hub
from tests.support.leaks import Census, settle, warm_up

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
    from greenkombu.utils.private_redis import PrivateRedis

__all__ = ["empty_rabbitmq", "empty_redis", "forget_failure", "unheard"]


def forget_failure(before: Census | None, sleep: Callable[[float], object]) -> None:
    """Let go of what a failed attempt has left in this process, and let its tasks end.

    The shared hub is closed, and with it all streams; the next one that asks gets another. The
    broker of the memory transport is empty.

    Args:
        before: the census that was taken before the attempt; None if it did not come so far.
        sleep: lets the other tasks run for some seconds.
    """
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        if hasattr(sys, name):
            delattr(sys, name)  # pytest keeps the last failure there, for debuggers
    hub.get_hub().close()
    warm_up()  # as there was one in the census: else its thread would stand for another that works
    gc.collect()  # settle() does not, where nothing that it counts has grown
    if before is not None:
        settle(before, sleep)
    from greenkombu.transport import memory

    memory.broker.clear()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Keep from pytest what finalizers and threads raise: the next attempt would fail for it."""
    heard = sys.unraisablehook, threading.excepthook
    sys.unraisablehook = threading.excepthook = lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook, threading.excepthook = heard


def empty_rabbitmq(server: PrivateRabbitMQ) -> None:
    """Make the virtual hosts of a server anew, which closes all connections.

    Args:
        server: a running one with the management plugin.
    """
    for host in server.manage("GET", "/api/vhosts"):
        server.delete_vhost(host["name"])
        server.add_vhost(host["name"])


def empty_redis(*servers: PrivateRedis) -> None:
    """Close the connections to servers, masters all, and remove their keys."""
    for server in servers:
        server.kick()
        server.flush()
