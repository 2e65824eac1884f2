"""Private Redis servers for tests: see `greenkombu.utils.private_redis`, which starts them."""

from __future__ import annotations

import os
from typing import Any

import pytest

import hub
from greenkombu.utils.private_redis import PrivateRedis, RedisCommandError, find_redis
from greenkombu.utils.private_redis_cluster import PrivateRedisCluster
from greenkombu.utils.private_redis_sentinel import PrivateSentinel

__all__ = [
    "end_loading",
    "make_cluster",
    "make_redis",
    "make_sentinel",
    "require_redis",
    "start_loading",
]


def require_redis() -> None:
    """Skip the test where no Redis is installed; fail it where one has to be (CI is set)."""
    if find_redis() is not None:
        return
    reason = "redis-server is not installed; `make deps` installs it"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def make_redis(**options: Any) -> PrivateRedis:
    """Return a private server, not started, whose waits let the other tasks run.

    Args:
        options: those of `PrivateRedis`, without `sleep`.
    """
    require_redis()
    return PrivateRedis(sleep=_sleep, **options)


def make_sentinel(**options: Any) -> PrivateSentinel:
    """Return a master, a replica and three sentinels, not started; starting takes 0.5 s.

    Args:
        options: those of `PrivateSentinel`, without `sleep`.
    """
    require_redis()
    return PrivateSentinel(sleep=_sleep, **options)


def make_cluster(**options: Any) -> PrivateRedisCluster:
    """Return three masters with a replica each, not started; starting takes 3 s.

    Args:
        options: those of `PrivateRedisCluster`, without `sleep`.
    """
    require_redis()
    return PrivateRedisCluster(sleep=_sleep, **options)


def start_loading(server: PrivateRedis) -> None:
    """Restart a server, made without `append_only`, so that it answers LOADING for half a minute.

    Args:
        server: a running one; it gets some keys.
    """
    server.commands([("SET", f"to be loaded {number}", "x" * 1100) for number in range(150)])
    server.commands([("CONFIG", "SET", "rdbcompression", "no"), ("SAVE",)])
    with (server.folder / "redis.conf").open("a") as lines:
        # Microseconds for each key; and it listens after so many bytes.
        lines.write("key-load-delay 200000\nloading-process-events-interval-bytes 1024\n")
    server.kill()
    server.launch()

    def loads() -> bool:
        try:
            server.command("GET", "x")
        except RedisCommandError as error:
            return str(error).startswith("LOADING")
        return False

    server.until("it loads", loads)


def end_loading(server: PrivateRedis) -> None:
    """Let what `start_loading` began end at once."""
    server.command("CONFIG", "SET", "key-load-delay", "0")
    server.wait_ready()


def _sleep(seconds: float) -> None:
    # Looked up at each wait: a test may choose another environment in between.
    hub.get_environment().sleep(seconds)
