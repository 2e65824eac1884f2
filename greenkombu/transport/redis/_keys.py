"""The names of keys and channels on the server: Kombu's, and a few of our own.

A queue is one list for each priority step; step 0 has the queue's own name.  Kombu pushes on the
left and pops on the right.  Which names a transport option changes is Kombu's rule, so
old and new programs meet in the same keys.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from greenkombu.exceptions import ArgumentError

__all__ = [
    "NAMES",
    "PRIORITY_STEPS",
    "SEPARATOR",
    "Keys",
    "QueueKeys",
    "as_steps",
    "kombu_pattern",
]

#: Kombu's separator, in the names of priority lists and in the members of binding sets.
SEPARATOR = "\x06\x16"

#: Kombu's priority steps. A message goes to the list of the highest step that is not above its
#: priority; the list of step 0 is served first.
PRIORITY_STEPS = (0, 3, 6, 9)

#: What the parts of names are by default; attributes of `Channel`, and most of them transport
#: options.
NAMES: dict[str, str] = {
    "sep": SEPARATOR,
    "unacked_key": "unacked",
    "unacked_index_key": "unacked_index",
    "unacked_mutex_key": "unacked_mutex",
    "keyprefix_queue": "_kombu.binding.%s",
    "keyprefix_binding_permanent": "_kombu.binding_permanent.%s",
    "keyprefix_fanout": "/{db}.",
}

# What Redis does not take literally in a pattern.
_WILDCARD = re.compile(rb"[*?\[\]\\]")

#: Queues whose keys are kept. A program has few; names that hold ids come and go.
_CACHE_SIZE = 4096


class QueueKeys(NamedTuple):
    """Where one queue is kept."""

    queue: str
    lists: tuple[bytes, ...]  #: in the order in which they are served
    unacked: bytes  #: hash: token -> ``[payload, "", "queue"]``
    registered: bytes  #: sorted set: token -> when it was taken or renewed, seconds since 1970
    mutex: bytes  #: held by whoever looks for messages of consumers that are gone
    watchers: bytes  #: sorted set: consumer -> when its lease ends
    parked: bytes  #: sorted set: consumer -> since when it waits to be woken
    tail: bytes  #: what follows the payload in `unacked`


def as_steps(steps: Any) -> tuple[int, ...]:
    """Check the transport option priority_steps and return it in order.

    Raises:
        ArgumentError: it is no list of different whole numbers, or empty.
    """
    try:
        found = tuple(sorted({int(step) for step in steps}))
    except (TypeError, ValueError):
        found = ()
    if not found:
        raise ArgumentError(
            f"the transport option priority_steps is a list of numbers as {list(PRIORITY_STEPS)},"
            f" not {steps!r:.100}"
        )
    return found


def kombu_pattern(key: str) -> str:
    """Return the regular expression that Kombu 5.7 writes for the binding key of a topic exchange.

    The same binding has to be the same member, whoever declares it. Nobody here matches by it: its
    ``#`` never stands for zero words.
    """
    words = {"*": r"[^\.]+", "#": ".*?"}
    escaped = ("".join(map(_escape, word)) for word in key.split("."))
    return "^" + r"\.".join(words.get(word, word) for word in escaped) + "$"


def _escape(character: str) -> str:
    return character if character.isalnum() or character in "*#" else "\\" + character


class Keys:
    """Names, as the transport options of one connection make them.

    Args:
        options: the transport options, and attributes of the channel class (`NAMES`).
        db: number of the database; part of the names of fanout channels, as these are shared by
            all databases of a server.
        tagged: put everything that belongs to one queue into one slot of a Redis Cluster. Kombu
            has no layout there that could be kept.
    """

    def __init__(self, options: Mapping[str, Any], db: int | str = 0, tagged: bool = False) -> None:
        self.prefix: str = options.get("global_keyprefix") or ""
        names = {name: options.get(name) or default for name, default in NAMES.items()}
        self.sep = names["sep"]
        steps = options.get("priority_steps")
        self.steps = as_steps(PRIORITY_STEPS if steps is None else steps)
        #: AMQP's meaning: the highest number is served first, instead of Kombu's lowest.
        self.highest_first = options.get("priority_order") == "amqp"
        self.unacked = names["unacked_key"]
        self.index = names["unacked_index_key"]
        self.mutex = names["unacked_mutex_key"]
        self._binding = names["keyprefix_queue"]
        self._permanent = names["keyprefix_binding_permanent"]
        self.tagged = tagged
        fanout = options.get("fanout_prefix", True)
        if fanout is True:
            fanout = names["keyprefix_fanout"]
        self.fanout_prefix: str = str(fanout or "").replace("{db}", str(db))
        patterns = options.get("fanout_patterns")
        self.fanout_patterns = patterns is None or bool(patterns)
        #: Binding keys without wildcards are patterns too: Kombu's rule, where AMQP ignores them.
        self.fanout_keys = bool(patterns)
        self._queues: dict[str, QueueKeys] = {}
        self._binding_keys: dict[str, bytes] = {}

    def key(self, name: str) -> bytes:
        """Return a name with the global prefix, as it is sent."""
        return (self.prefix + name).encode()

    # -- queues

    def of(self, queue: str) -> QueueKeys:
        """Return the keys of a queue."""
        keys = self._queues.get(queue)
        if keys is None:
            if len(self._queues) >= _CACHE_SIZE:
                self._queues.clear()
            keys = self._queues[queue] = self._make(queue)
        return keys

    def _make(self, queue: str) -> QueueKeys:
        base = self._tag(queue)
        of_queue = f":{base}" if self.tagged else ""
        steps = reversed(self.steps) if self.highest_first else self.steps
        return QueueKeys(
            queue,
            tuple(self.key(self._list(base, step)) for step in steps),
            self.key(self.unacked + of_queue),
            self.key(self.index + of_queue),
            self.key(self.mutex + of_queue),
            self.key(f"_greenkombu.watchers:{base}"),
            self.key(f"_greenkombu.parked:{base}"),
            b', "", ' + json.dumps(queue).encode() + b"]",
        )

    def _tag(self, name: str) -> str:
        """Return a name with the part in braces that decides about its slot, where there are slots.

        Nothing in braces counts as no braces at all.
        """
        if not self.tagged:
            return name
        return "{_}" + name + "." if name[:1] in ("", "}") else "{" + name + "}"

    def _list(self, base: str, step: int) -> str:
        return f"{base}{self.sep}{step}" if step else base

    def step_of(self, priority: Any) -> int:
        """Return the priority step for the priority of a message."""
        steps = self.steps[::-1] if self.highest_first else self.steps
        return steps[self.step(priority)]

    def step(self, priority: Any) -> int:
        """Return the position in `QueueKeys.lists` for the priority of a message."""
        try:
            number = int(priority)
        except (TypeError, ValueError):
            number = 0
        position = max(bisect(self.steps, number) - 1, 0)
        return len(self.steps) - 1 - position if self.highest_first else position

    # -- exchanges

    def binding(self, exchange: str) -> bytes:
        """Return the set of an exchange's bindings."""
        key = self._binding_keys.get(exchange)
        if key is None:
            if len(self._binding_keys) >= _CACHE_SIZE:
                self._binding_keys.clear()
            key = self.key(self._binding % self._tag(exchange))
            self._binding_keys[exchange] = key
        return key

    def permanent_binding(self, exchange: str) -> bytes:
        """Return the set from which Kombu 5.7 restores the other one when it is gone."""
        return self.key(self._permanent % self._tag(exchange))

    def member(self, binding: Sequence[str | None]) -> bytes:
        """Return a binding as a member of these sets."""
        key, pattern, queue = binding
        if pattern and pattern.startswith("^"):
            pattern = kombu_pattern(key or "")
        return self.sep.join([key or "", pattern or "", queue or ""]).encode()

    def parse_member(self, member: bytes) -> tuple[str, str, str]:
        """Return the (binding key, pattern, queue) of a member."""
        key, pattern, queue = ["", "", *member.decode(errors="replace").split(self.sep)][-3:]
        return key, pattern, queue

    # -- channels

    def fanout_channel(self, exchange: str, routing_key: str = "") -> bytes:
        """Return the channel on which a message for a fanout exchange is broadcast."""
        name = self.fanout_prefix + exchange
        if self.fanout_patterns and routing_key:
            name += "/" + routing_key
        return self.key(name)

    def fanout_pattern(self, exchange: str, pattern: str = "") -> bytes:
        """Return what to subscribe to for a fanout exchange.

        Args:
            exchange: its name; that it has wildcards means nothing.
            pattern: of routing keys.
        """
        name = _WILDCARD.sub(rb"\\\g<0>", self.key(self.fanout_prefix + exchange))
        return name + b"/" + pattern.encode() if pattern else name

    def wake_channel(self, client: str) -> bytes:
        """Return the channel on which a client is told to look into a queue."""
        return self.key("_greenkombu.wake.") + client.encode()
