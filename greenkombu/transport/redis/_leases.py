"""Keeping what this client holds, and putting back what clients left that are gone.

What was taken from a queue counts as lost when nobody has renewed it for the visibility timeout.
While this client lives it renews what it holds: every third of the shortest visibility timeout in
use, which clients tell each other in a sorted set beside the index, and every `RENEW_SECONDS` at
least.  One that holds nothing keeps its entry in that set now and then, and asks what others use as
soon as it takes a message: a thousand consumers that wait cost the server next to nothing.

Kombu's consumers tell nobody, and do not renew what they hold themselves; one whose
visibility timeout is shorter than `RENEW_SECONDS` takes what others work on for lost.

A client with so short a timeout waits, before it looks for lost messages for the first time, until
those with longer ones must have heard of it.

A message that the program has dropped without settling it, because the task that had it was killed
for instance, is renewed for one visibility timeout more, as somebody may know its tag, and then put
back: a process that lives for weeks would keep it for as long.

Looking for lost messages is the work of one client at a time (Kombu's mutex), and bounded: so many
messages for each look, in a task of its own.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.transport.redis._options import read_seconds, read_whole
from greenkombu.transport.redis._restore import restore
from greenkombu.transport.redis._scripts import RENEW, RENEW_WATCH, SWEEP, UNLOCK
from greenkombu.transport.redis._taps import LEASE

if TYPE_CHECKING:
    from greenkombu.transport.redis._keys import QueueKeys
    from greenkombu.transport.redis._taps import Tap
    from greenkombu.transport.redis.connection import Connection
    from hub.timers import Timer

__all__ = ["Leases"]

logger = logging.getLogger(__name__)

#: Seconds between two renewals at most, whatever the visibility timeout is.
RENEW_SECONDS = 10.0
#: The same for a client that holds nothing: a twelfth of its visibility timeout, and this at most.
IDLE_SECONDS = 300.0
#: Seconds between two looks for lost messages: a quarter of the visibility timeout, within these.
#: The upper bound is not for clients whose consumers are all parked: those who watch look, too.
SWEEP_SECONDS = (0.25, 30.0)
#: Seconds for which the mutex holds at most. It saves work, and no more: what is put back is looked
#: at again in the same step.
MUTEX_SECONDS = 10.0
#: Tokens, or watchers, that one command renews: its reply must not keep other clients waiting.
CHUNK = 1000
#: Looks for lost messages in one go, each of `unacked_restore_limit` messages or `LOOK`.
ROUNDS = 10
LOOK = 100


class Leases:
    """What one connection renews, and its looking for lost messages.

    Args:
        connection: whose messages and watchers these are.
        options: its transport options: visibility_timeout (seconds), unacked_mutex_expire
            (seconds), unacked_restore_limit (messages for one look).
    """

    def __init__(self, connection: Connection, options: Any) -> None:
        self._connection = weakref.ref(connection)
        self.visibility_timeout = read_seconds(options, "visibility_timeout", 3600.0)
        self.mutex_seconds = read_seconds(options, "unacked_mutex_expire", 300.0)
        limit = options.get("unacked_restore_limit") or LOOK
        self._most = read_whole(limit, "the transport option unacked_restore_limit", 1)
        self._shortest = self.visibility_timeout
        # The shortest visibility timeout by index; in a cluster each queue has one.
        self._fleets: dict[bytes, float] = {}
        self.watching: dict[Tap, None] = {}
        self._timers: dict[str, Timer] = {}
        self._sweeping = False
        self._settled_in = False
        # It held nothing when it renewed last, and when that was.
        self._idle = False
        self._renewed_at = 0.0
        self._swept_at = 0.0

    # -- timers

    def begin(self) -> None:
        """Start; in the hub, when the first consumer comes."""
        if not self._timers:
            self._renew()
            self._set("watch", LEASE / 2)

    def end(self) -> None:
        """Stop; from anywhere."""
        while self._timers:
            try:
                _, timer = self._timers.popitem()
            except KeyError:
                return
            timer.cancel()

    def _set(self, name: str, delay: float) -> None:
        connection = self._connection()
        if connection is not None and connection.error is None:
            before = self._timers.get(name)
            if before is not None:
                before.cancel()
            self._timers[name] = connection.hub.call_later(delay, _fire, weakref.ref(self), name)

    def fire(self, name: str) -> None:
        """A timer has expired."""
        connection = self._connection()
        if connection is None or connection.error is not None:
            return
        if name == "renew":
            self._renew()
            # Last, and not in `_renew`, which also runs where a reply is read: no thread may be
            # left for it, and what is held is to be renewed all the same.
            self._give_back_forgotten(connection)
        elif name == "watch":
            self._renew_watchers(connection)
            self._set("watch", LEASE / 2)
        else:
            self._sweep(connection)

    # -- what this client holds

    @property
    def interval(self) -> float:
        """Seconds between two renewals."""
        return min(self._shortest / 3, RENEW_SECONDS)

    @property
    def _next(self) -> float:
        """Seconds until the next renewal."""
        if not self._idle:
            return self.interval
        return max(self.interval, min(self.visibility_timeout / 12, IDLE_SECONDS))

    def took(self) -> None:
        """Messages were taken: there is something to renew; from any thread."""
        if self._idle:
            self._idle = False
            connection = self._connection()
            if connection is not None:
                connection.hub.call_here(self._wake_up)

    def _wake_up(self) -> None:
        due = self._renewed_at + self.interval - monotonic()
        if due > 0:
            self._set("renew", due)
        else:
            self._renew()

    def _renew(self) -> None:
        connection = self._connection()
        if connection is None or connection.error is not None:
            return
        held: dict[bytes, list[bytes]] = {}
        routes: dict[bytes, QueueKeys] = {}
        for keys in connection.indexes():
            held.setdefault(keys.registered, [])
            routes[keys.registered] = keys
        # Before the look: what is taken after it says so.
        self._idle = True
        for one in connection.held():
            self._idle = False
            held.setdefault(one.keys.registered, []).append(one.token)
            routes[one.keys.registered] = one.keys
        self._renewed_at = monotonic()
        for index, tokens in held.items():
            for start in range(0, max(len(tokens), 1), CHUNK):
                connection.run(
                    RENEW,
                    (index, index + b":fleet", index + b":fleet:since"),
                    (
                        b"%.3f" % self.visibility_timeout,
                        3 * self._next + 1,
                        *tokens[start : start + CHUNK],
                    ),
                    partial(self._renewed, index),
                    routes[index],
                )
        # Jitter: clients that were started together are not to renew together for ever.
        self._set("renew", self._next * random.uniform(0.8, 1.0))

    def _give_back_forgotten(self, connection: Connection) -> None:
        for channel in list(connection.channels.values()):
            qos: Any = channel._qos
            tags = () if qos is None else qos.forgotten(self.visibility_timeout)
            if tags:
                connection.hub.environment.spawn(_give_back, connection, qos, tags)

    def _renewed(self, index: bytes, reply: Any) -> None:
        if isinstance(reply, BaseException):
            return
        longest, here, known_for = map(float, reply)
        self._fleets[index] = here
        shortest = min(self._fleets.values())
        if shortest < self._shortest:
            self._shortest = shortest
            self._set("renew", self._next)
        self._shortest = shortest
        if not self._settled_in:
            self._settled_in = True
            self._swept_at = monotonic()
            pause = self._pause
            # With a longer one than this, what they do without having heard of it is enough.
            if self.visibility_timeout < min(longest, 1.5 * RENEW_SECONDS):
                pause += max(min(longest / 3, RENEW_SECONDS) + 1 - known_for, 0)
            self._set("sweep", pause)

    @property
    def _pause(self) -> float:
        """Seconds until the next look for lost messages."""
        least, most = SWEEP_SECONDS
        pause = max(self.visibility_timeout / 4, least)
        connection = self._connection()
        if connection is None or not connection.parked:
            pause = min(pause, most)
        return pause * random.uniform(0.8, 1.0)

    def _renew_watchers(self, connection: Connection) -> None:
        taps = list(self.watching)
        for start in range(0, len(taps), CHUNK):
            chunk = taps[start : start + CHUNK]
            for group in connection.group(chunk):
                self._renew_group(connection, group)

    @staticmethod
    def _renew_group(connection: Connection, taps: list[Tap]) -> None:
        def renewed(reply: Any) -> None:
            if isinstance(reply, BaseException):
                return
            for tap, still in zip(taps, reply, strict=True):
                if not still:
                    tap.nudge()

        connection.run(
            RENEW_WATCH,
            [tap.keys.watchers for tap in taps],
            (LEASE, *[tap.member for tap in taps]),
            renewed,
            taps[0].keys,
        )

    # -- what others left

    def _sweep(self, connection: Connection) -> None:
        """Ask whether there is something to put back; a task does it."""
        pause = self._pause
        left = self._swept_at + 0.8 * pause - monotonic()
        if left > 0:  # its consumers have been parked meanwhile
            self._set("sweep", left)
            return
        self._swept_at = monotonic()
        self._set("sweep", pause)
        if self._sweeping:
            return
        for keys in connection.indexes():
            connection.run(
                SWEEP,
                (keys.mutex, keys.registered),
                self._sweep_args(connection),
                self._begin(keys),
                keys,
            )

    def _sweep_args(
        self, connection: Connection, timeout: float | None = None, most: int | None = None
    ) -> tuple[Any, ...]:
        timeout = self.visibility_timeout if timeout is None else timeout
        # Renewed by each round. Who dies meanwhile must not keep the others from looking.
        mutex_ms = max(int(min(self.mutex_seconds, MUTEX_SECONDS) * 1000), 1)
        return connection.client_id, mutex_ms, b"%.3f" % timeout, most or self._most

    def _begin(self, keys: QueueKeys) -> Callable[[Any], None]:
        def found(reply: Any) -> None:
            connection = self._connection()
            if connection is None or isinstance(reply, BaseException) or not reply:
                return
            self._sweeping = True
            connection.hub.environment.spawn(self._restore_all, connection, keys, reply)

        return found

    def _restore_all(self, connection: Connection, keys: QueueKeys, found: list[bytes]) -> None:
        try:
            for _ in range(ROUNDS):
                restore(connection, keys, found[1:], found[0])
                if len(found) <= self._most:
                    break
                found = connection.eval(
                    SWEEP, (keys.mutex, keys.registered), self._sweep_args(connection), keys
                )
                if not found:
                    return
        except Exception as exc:
            if connection.error is None:
                logger.warning("cannot put unacked messages back: %s", exc)
        finally:
            self._sweeping = False
            connection.run(UNLOCK, (keys.mutex,), (connection.client_id,), None, keys)

    def restore_visible(
        self, keys: QueueKeys, timeout: float | None = None, most: int | None = None
    ) -> int:
        """Put messages back that nobody has renewed; in a task, for one look.

        Args:
            keys: of any queue with the same index.
            timeout: seconds since they were renewed; None takes the visibility timeout.
            most: messages; None takes the option unacked_restore_limit.

        Returns:
            How many there were.
        """
        connection = self._connection()
        if connection is None:
            return 0
        found = connection.eval(
            SWEEP, (keys.mutex, keys.registered), self._sweep_args(connection, timeout, most), keys
        )
        if not found:
            return 0
        count = restore(connection, keys, found[1:], found[0])
        connection.eval(UNLOCK, (keys.mutex,), (connection.client_id,), keys)
        return count


def _give_back(connection: Connection, qos: Any, tags: Sequence[Any]) -> None:
    logger.warning(
        "%d messages of Redis server %s were dropped by the program without being settled, and go"
        " back to their queues",
        len(tags),
        connection.settings.peer,
    )
    try:
        qos.give_back(tags)
    except Exception as exc:
        if connection.error is None:
            logger.warning("cannot put messages back that were dropped: %s", exc)


def _fire(reference: weakref.ref[Leases], name: str) -> None:
    leases = reference()
    if leases is not None:
        leases.fire(name)
