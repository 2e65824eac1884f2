"""Clients of redis-py that put a prefix before the names of keys, as global_keyprefix asks for.

A command has its keys where most have them, as its first argument, unless a table here says
otherwise.  Commands that are not in a table and have several keys, or none, should be sent by a
plain client.
"""

from __future__ import annotations

from typing import Any

import redis
from redis.client import Pipeline, PubSub

__all__ = [
    "GlobalKeyPrefixMixin",
    "PrefixedRedisPipeline",
    "PrefixedRedisPubSub",
    "PrefixedStrictRedis",
]

#: Every argument is a key, or a channel.
_ALL = frozenset(
    (
        *("DEL", "UNLINK", "EXISTS", "TOUCH", "MGET", "WATCH", "RENAME", "RENAMENX", "RPOPLPUSH"),
        *("SUNION", "SINTER", "SDIFF", "SUNIONSTORE", "SINTERSTORE", "SDIFFSTORE"),
        *("PFCOUNT", "PFMERGE"),
        *("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "UNSUBSCRIBE", "PUNSUBSCRIBE", "SUNSUBSCRIBE"),
    )
)
#: Every argument but the last one, which is a time.
_BUT_LAST = frozenset({"BRPOP", "BLPOP", "BRPOPLPUSH", "BZPOPMIN", "BZPOPMAX"})
#: The first two.
_TWO = frozenset({"LMOVE", "BLMOVE", "SMOVE", "COPY", "ZRANGESTORE", "LCS"})
#: Every second one.
_PAIRS = frozenset({"MSET", "MSETNX"})
#: The number of keys is the second argument of the first ones, and the first of the others.
_SCRIPTS = frozenset({"EVAL", "EVALSHA", "EVAL_RO", "EVALSHA_RO", "FCALL", "FCALL_RO"})
_COUNTED = frozenset({"ZUNION", "ZINTER", "ZDIFF", "SINTERCARD", "ZINTERCARD", "LMPOP", "ZMPOP"})
#: The key is the second argument.
_SECOND = frozenset({"OBJECT", "XGROUP", "XINFO", "BITOP"})
#: None.
_NONE = frozenset(
    (
        *("ACL", "AUTH", "BGREWRITEAOF", "BGSAVE", "CLIENT", "CLUSTER", "COMMAND", "CONFIG"),
        *("DBSIZE", "DEBUG", "DISCARD", "ECHO", "EXEC", "FLUSHALL", "FLUSHDB", "FUNCTION", "HELLO"),
        *("INFO", "KEYS", "LASTSAVE", "LATENCY", "MODULE", "MONITOR", "MULTI", "PING", "PUBSUB"),
        *("QUIT", "RANDOMKEY", "REPLICAOF", "RESET", "ROLE", "SAVE", "SCAN", "SCRIPT", "SELECT"),
        *("SHUTDOWN", "SLAVEOF", "SLOWLOG", "SWAPDB", "TIME", "UNWATCH", "WAIT", "WAITAOF"),
    )
)


class GlobalKeyPrefixMixin:
    """Puts `global_keyprefix` before the keys of each command."""

    global_keyprefix: str = ""

    def _prefixed(self, args: Any) -> list[Any]:
        name, *rest = args
        # redis-py writes some commands as two words: CLIENT LIST.
        word = str(name).upper().partition(" ")[0]
        for place in _places(word, rest):
            rest[place] = self._with_prefix(rest[place])
        return [name, *rest]

    def _with_prefix(self, key: Any) -> Any:
        if isinstance(key, (bytes, bytearray, memoryview)):
            return self.global_keyprefix.encode() + bytes(key)
        return f"{self.global_keyprefix}{key}"

    def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        """Send a command with the names of its keys in full."""
        return super().execute_command(*self._prefixed(args), **kwargs)  # type: ignore[misc]

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        """Read a reply; the key in that of BRPOP and BLPOP is the program's own again."""
        found = super().parse_response(connection, command_name, **options)  # type: ignore[misc]
        if found and command_name in ("BRPOP", "BLPOP"):
            key, value = found
            return key[len(self._with_prefix(key[:0])) :], value
        return found


def _places(word: str, rest: list[Any]) -> range:
    """Return where the keys are among the arguments of a command."""
    count = len(rest)
    if word in _NONE:
        return range(0)
    if word in _ALL:
        return range(count)
    if word in _BUT_LAST:
        return range(max(count - 1, 0))
    if word in _TWO:
        return range(min(count, 2))
    if word in _PAIRS:
        return range(0, count, 2)
    if word in _SCRIPTS:
        return range(2, 2 + int(rest[1]))
    if word in _COUNTED:
        return range(1, 1 + int(rest[0]))
    if word in _SECOND:
        return range(1, min(count, 2))
    return range(min(count, 1))


class PrefixedStrictRedis(GlobalKeyPrefixMixin, redis.Redis):
    """A client whose keys and channels have a prefix.

    Args:
        global_keyprefix: the prefix.
        **kwargs: those of `redis.Redis`.
    """

    def __init__(self, *args: Any, global_keyprefix: str = "", **kwargs: Any) -> None:
        self.global_keyprefix = global_keyprefix
        super().__init__(*args, **kwargs)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> Any:
        """Return a pipeline with the same prefix."""
        return PrefixedRedisPipeline(
            self.connection_pool,
            self.response_callbacks,
            transaction,
            shard_hint,
            global_keyprefix=self.global_keyprefix,
        )

    def pubsub(self, **kwargs: Any) -> Any:
        """Return a subscriber with the same prefix."""
        return PrefixedRedisPubSub(
            self.connection_pool, global_keyprefix=self.global_keyprefix, **kwargs
        )


class PrefixedRedisPipeline(GlobalKeyPrefixMixin, Pipeline):
    """A pipeline whose keys have a prefix.

    Args:
        global_keyprefix: the prefix.
    """

    def __init__(self, *args: Any, global_keyprefix: str = "", **kwargs: Any) -> None:
        self.global_keyprefix = global_keyprefix
        super().__init__(*args, **kwargs)


class PrefixedRedisPubSub(GlobalKeyPrefixMixin, PubSub):
    """A subscriber whose channels have a prefix, which messages do not show.

    Args:
        global_keyprefix: the prefix.
    """

    def __init__(self, *args: Any, global_keyprefix: str = "", **kwargs: Any) -> None:
        self.global_keyprefix = global_keyprefix
        super().__init__(*args, **kwargs)

    def parse_response(self, *args: Any, **kwargs: Any) -> Any:
        """Read what the server says; names of channels are the program's own again."""
        found: Any = PubSub.parse_response(self, *args, **kwargs)  # type: ignore[no-untyped-call]
        if not isinstance(found, (list, tuple)):
            return found
        kind, *rest = found
        # What follows the kind: [pattern,] channel, data or count.
        rest[:-1] = [self._without_prefix(name) for name in rest[:-1]]
        return [kind, *rest]

    def _without_prefix(self, name: Any) -> Any:
        prefix = self._with_prefix(name[:0]) if isinstance(name, (str, bytes)) else ""
        return name[len(prefix) :] if prefix and name.startswith(prefix) else name
