"""A client of redis-py for the program's own commands on the same server or cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenkombu.transport.redis._options import Settings

__all__ = ["make_client", "make_cluster_client"]


def make_client(settings: Settings, prefix: str = "") -> Any:
    """Return a `redis.Redis`, which connects when it is first used, by sockets of its own.

    Args:
        settings: of the server.
        prefix: to put before names of keys.
    """
    import redis

    options = _options(settings)
    if isinstance(settings.address, str):
        options["unix_socket_path"] = settings.address
    if prefix:
        from greenkombu.transport.redis._prefixed import PrefixedStrictRedis

        return PrefixedStrictRedis(global_keyprefix=prefix, **options)
    return redis.Redis(**options)


def make_cluster_client(settings: Settings) -> Any:
    """Return a `redis.RedisCluster`, which looks at the cluster at once; parks the task.

    Args:
        settings: of one of its servers.
    """
    import redis

    options = _options(settings)
    del options["db"]
    return redis.RedisCluster(**options)


def _options(settings: Settings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "db": settings.db,
        "username": settings.username,
        "password": settings.password,
        "client_name": settings.client_name,
        "socket_timeout": settings.socket_timeout,
        "socket_connect_timeout": settings.connect_timeout,
        "health_check_interval": settings.health_check_interval,
    }
    if settings.credential_provider is not None:
        options["credential_provider"] = settings.credential_provider
        del options["username"], options["password"]
    if not isinstance(settings.address, str):
        options["host"], options["port"] = settings.address
    if settings.ssl or isinstance(settings.ssl, dict):
        options["ssl"] = True
        given = settings.ssl if isinstance(settings.ssl, dict) else {}
        options.update({f"ssl_{name}": value for name, value in given.items()})
    return options
