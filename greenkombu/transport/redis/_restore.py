"""Putting unacked messages back: those of clients that are gone, and of connections that were lost.

The work is done by tasks: it waits for the server, and payloads have to be read, because they say
where a message belongs and are to say that it was delivered before.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from greenkombu import exceptions
from greenkombu._forks import generation
from greenkombu.transport.redis._errors import ReplyError, to_error
from greenkombu.transport.redis._held import asked_tokens
from greenkombu.transport.redis._payload import dumps
from greenkombu.transport.redis._replies import PART_BYTES, fetch_now
from greenkombu.transport.redis._scripts import RETURN
from greenkombu.utils import json
from hub.environment import get_environment
from hub.finalize import Finalizer, Home, defer

if TYPE_CHECKING:
    from greenkombu.transport.redis._held import Held
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis.connection import Connection

__all__ = ["BROKEN", "Orphans", "guard", "parse_unacked", "redelivered", "restore"]

logger = logging.getLogger(__name__)

#: The queue for what was found in `unacked` and is no message at all.
BROKEN = "_greenkombu.broken"
#: Messages that are read and put back in one go: a bound for memory, and for the server's time.
CHUNK = 100

# The generation of the process, and the parameters of a connection.
_Key = tuple[int, Hashable]


def restore(
    connection: Connection,
    keys: QueueKeys,
    tokens: Sequence[bytes],
    before: bytes = b"",
    last: bool = False,
) -> int:
    """Put messages back, wherever they came from; parks the task.

    Args:
        connection: to send by.
        keys: of any queue with the same index.
        tokens: of the messages; the one that is put back last is served first.
        before: the time before which they must have been taken or renewed; empty is whenever.
        last: at the end of the line, instead of the next to be served.

    Returns:
        How many there were.
    """
    restored = 0
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        sizes = connection.call_many([("HSTRLEN", keys.unacked, one) for one in chunk], keys)
        for part in _parts(chunk, sizes):
            restored += _restore(connection, keys, part, before, last)
    return restored


def _parts(tokens: Sequence[bytes], sizes: Sequence[int]) -> Iterator[dict[bytes, int]]:
    """Divide messages into parts whose payloads may be in one reply; a larger one is alone."""
    part: dict[bytes, int] = {}
    for token, size in zip(tokens, sizes, strict=True):
        if part and sum(part.values()) + size > PART_BYTES:
            yield part
            part = {}
        part[token] = size
    if part:
        yield part


def _read(connection: Connection, keys: QueueKeys, sizes: Mapping[bytes, int]) -> list[Any]:
    """Return what `unacked` keeps of some messages; parks the task."""
    if sum(sizes.values()) > PART_BYTES:
        [(token, size)] = sizes.items()
        return [fetch_now(connection, keys, token, size) or None]
    found: list[Any] = connection.call("HMGET", keys.unacked, *sizes, route=keys)
    return found


def _restore(
    connection: Connection,
    keys: QueueKeys,
    tokens: Mapping[bytes, int],
    before: bytes,
    last: bool,
) -> int:
    kept = _read(connection, keys, tokens)
    # Acknowledged by a client that died before it came to the index, or just now; or never taken.
    gone = [token for token, value in zip(tokens, kept, strict=True) if value is None]
    commands: list[tuple[Any, ...]] = [("SCRIPT", "LOAD", RETURN.text)]
    if gone:
        commands.append(("ZREM", keys.registered, *gone))
    first = len(commands)
    for token, value in zip(tokens, kept, strict=True):
        if value is not None:
            raw, lists = _destination(connection, value, keys)
            where = (keys.unacked, keys.registered, *lists)
            push = "LPUSH" if last else "RPUSH"
            # Without `raw` the script would take what it finds, but for so many bytes at its end.
            none = max(len(value) - 1, 0)
            commands.append(
                ("EVALSHA", RETURN.digest, len(where), *where, token, before, none, raw, push)
            )
    if len(commands) == first and not gone:
        return 0
    replies = connection.call_many(commands, keys, raises=False)
    for reply in replies:
        if isinstance(reply, ReplyError):
            raise to_error(reply, server=connection.wire.peer, what="putting messages back")
    return sum(replies[first:])


def _acknowledge(connection: Connection, keys: QueueKeys, tokens: Sequence[bytes]) -> None:
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        connection.call_many(
            [("HDEL", keys.unacked, *chunk), ("ZREM", keys.registered, *chunk)], keys
        )


def _destination(
    connection: Connection, value: bytes, found_in: QueueKeys
) -> tuple[bytes, list[bytes]]:
    """Tell what to push where, to put an unacked message back; parks the task."""
    message, raw, exchange, routing_key = parse_unacked(value)
    keys, priority = connection.keys, None
    if message is not None:
        message = redelivered(message)
        properties = message.get("properties")
        priority = properties.get("priority") if isinstance(properties, dict) else None
        raw = dumps(message)
    queues = [routing_key]
    if keys.tagged:
        # There each queue has a hash of its own, and scripts do not reach another one's.
        queues = [found_in.queue]
    elif exchange:
        # Without a binding left it goes where its routing key says: nothing is thrown away.
        queues = connection.bindings.route(exchange, routing_key) or queues
    return raw, [keys.of(queue).lists[keys.step(priority)] for queue in queues]


def redelivered(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message with Kombu's marks of one that was delivered before."""
    marked, headers = dict(message), message.get("headers") or {}
    if isinstance(headers, dict):  # else a stranger has written it
        marked["headers"] = {**headers, "redelivered": True}
    properties = message.get("properties")
    if isinstance(properties, dict):
        info = properties.get("delivery_info")
        info = {**(info if isinstance(info, dict) else {}), "redelivered": True}
        marked["properties"] = {**properties, "delivery_info": info}
    return marked


def parse_unacked(value: bytes) -> tuple[dict[str, Any] | None, bytes, str, str]:
    """Read what `unacked` keeps of a message.

    Returns:
        The message, None if it is no dictionary; its bytes, in that case; and the exchange and the
        routing key to which it goes back. An entry that is broken itself goes to the queue
        `BROKEN`: nothing is thrown away.
    """
    try:
        message, exchange, routing_key = json.loads(value)
        if isinstance(routing_key, str) and isinstance(exchange, str | None):
            if isinstance(message, dict):
                return message, b"", exchange or "", routing_key
            return None, dumps(message), exchange or "", routing_key
    except (ValueError, TypeError, RecursionError):
        pass
    # Perhaps a stranger has put into a queue what is not JSON. The end is ours then.
    start = value.rfind(b', "", "')
    if start > 0:
        try:
            exchange, routing_key = json.loads(b"[" + value[start + 2 :])
            return None, value[1:start], exchange, routing_key
        except (ValueError, TypeError):
            pass
    return None, value, "", BROKEN


class Orphans:
    """Messages that connections held which were lost; for the next one to put back.

    The next one of this process with the same parameters: it may be another `Connection` object.
    What the program has acknowledged, and nobody knows whether the server has heard it, is
    acknowledged again.
    """

    def __init__(self) -> None:
        self._tokens: dict[bytes, tuple[QueueKeys, dict[bytes, None]]] = {}
        self._acked: dict[bytes, tuple[QueueKeys, dict[bytes, None]]] = {}

    @staticmethod
    def key(client: Any) -> _Key:
        """Return what the connections of this process have in common that inherit each other."""
        # A child of a fork has not received what its parent had.
        return generation(), client.__eqhash__()

    @staticmethod
    def leave(
        key: _Key, messages: Sequence[tuple[QueueKeys, list[bytes]]], acked: bool = False
    ) -> None:
        """Note what a lost connection held; never waits.

        Args:
            key: of `key`.
            messages: keys of a queue, and tokens of its messages.
            acked: they were acknowledged.
        """
        # Not in a child of a fork.
        if key[0] == generation() and any(tokens for _, tokens in messages):
            orphans = _orphans.setdefault(key, Orphans())
            for keys, tokens in messages:
                orphans.add(keys, tokens, acked)

    @staticmethod
    def restore_all(connection: Connection) -> None:
        """Put back what connections with the parameters of this one have left; parks the task."""
        found = _orphans.get(connection.heirs)
        if found is not None:
            found.restore(connection)
            if not found._tokens and not found._acked:
                _orphans.pop(connection.heirs, None)

    def add(self, keys: QueueKeys, tokens: Sequence[bytes], acked: bool = False) -> None:
        """Note tokens of messages of a queue; some may never have been taken."""
        if tokens:
            table = self._acked if acked else self._tokens
            noted = table.setdefault(keys.registered, (keys, {}))[1]
            for token in tokens:  # one that is noted twice keeps its place
                noted[token] = None

    def restore(self, connection: Connection) -> None:
        """Put back what was noted; parks the task. What fails is left to the next connection."""
        while self._acked or self._tokens:
            acked = bool(self._acked)
            try:
                _, (keys, noted) = (self._acked if acked else self._tokens).popitem()
            except KeyError:
                continue  # another connection has come first
            tokens = list(noted)
            try:
                if acked:
                    _acknowledge(connection, keys, tokens)
                else:
                    restore(connection, keys, tokens[::-1])
            except BaseException as exc:
                self.add(keys, tokens, acked)
                if not isinstance(exc, exceptions.KombuError | OSError):
                    raise
                logger.warning("cannot put back yet what a lost connection held: %s", exc)
                return


_orphans: dict[_Key, Orphans] = {}


def guard(
    connection: Connection,
    tables: list[dict[bytes, Held]],
    asked: Mapping[int, tuple[QueueKeys, int]],
) -> Finalizer | None:
    """See to it that messages go back when a connection is dropped without being closed.

    Args:
        connection: that holds them.
        tables: of the messages; the list may grow.
        asked: of messages that may be on their way, as `asked_tokens` takes it.
    """
    client = connection.client
    if client is None:
        return None
    params = client.clone()
    prefix = connection.token_prefix
    home = Home()
    made_in = generation()

    def dropped() -> None:
        # Runs in the garbage collector: nothing may wait here.
        if (any(tables) or asked) and generation() == made_in:
            defer(_spawn_restore, params, tables, prefix, asked, home=home)

    finalizer = Finalizer(connection, dropped)
    # At exit the connection still lives, and is closed.
    finalizer.atexit = False
    return finalizer


def _spawn_restore(params: Any, *held: Any) -> None:
    get_environment().spawn(_restore_through, params, *held)


def _restore_through(
    params: Any,
    tables: list[dict[bytes, Held]],
    prefix: bytes,
    asked: Mapping[int, tuple[QueueKeys, int]],
) -> None:
    orphans = Orphans()
    for table in tables:
        for held in table.values():
            orphans.add(held.keys, [held.token])
    for keys, tokens in asked_tokens(prefix, asked):
        orphans.add(keys, tokens)
    with params, contextlib.closing(params.channel()) as channel:
        orphans.restore(channel.redis)
