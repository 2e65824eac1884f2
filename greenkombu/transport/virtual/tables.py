"""Which queues a message goes to: the rules of the exchange types, and an index for each.

A binding is a tuple (binding key, pattern, queue), the form in which stores keep it and which
`ExchangeType.prepare_bind` makes.  A `BindingTable` indexes the bindings of one exchange, so that
routing costs what matches and not what is bound.

Topic keys are compared word by word, never by a regular expression: a pattern with many ``#``
would cost exponential time on a long key, and keys come from strangers.

Tables are read by publishers while other threads and tasks bind: every change is one operation on
a dict, and a reader takes a snapshot (`list(dict)`) that is atomic too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from greenkombu.exceptions import UnsupportedOperation

__all__ = [
    "NAME_MARK",
    "Binding",
    "BindingTable",
    "DirectTable",
    "FanoutTable",
    "HeadersTable",
    "TopicTable",
    "headers_match",
    "topic_match",
]

Binding = tuple[str, "str | None", str]

#: Divides the binding key from what else tells a binding apart; no key of AMQP holds it.
NAME_MARK = "\0"

#: Results that a topic table keeps. Routing keys are few where they are configured and endless
#: where they hold ids; a full cache is emptied, which costs one search for each key still in use.
TOPIC_CACHE_SIZE = 1024


def topic_match(binding_key: str, routing_key: str) -> bool:
    """Tell whether a topic binding takes a routing key.

    Words are separated by dots; ``*`` is exactly one word and ``#`` zero or more (AMQP 0-9-1,
    section 3.1.3.3).
    """
    if not _is_wild(binding_key):
        return binding_key == routing_key
    # The positions of the pattern that the words read so far can have led to.
    pattern = binding_key.split(".")
    end = len(pattern)

    def skip(positions: set[int]) -> set[int]:
        # A "#" may stand for no word at all.
        for position in tuple(positions):
            while position < end and pattern[position] == "#":
                position += 1
                positions.add(position)
        return positions

    positions = skip({0})
    for word in _words(routing_key):
        following = set()
        for position in positions:
            if position < end:
                expected = pattern[position]
                if expected == "#":
                    following.add(position)
                elif expected == "*" or expected == word:
                    following.add(position + 1)
        positions = skip(following)
        if not positions:
            return False
    return end in positions


def _is_wild(binding_key: str) -> bool:
    return "*" in binding_key or "#" in binding_key


def _words(routing_key: str) -> list[str]:
    # The empty key has no word, so "#" takes it and "*" does not, as in RabbitMQ.
    return routing_key.split(".") if routing_key else []


def headers_match(arguments: Mapping[str, Any], headers: Mapping[str, Any]) -> bool:
    """Tell whether the arguments of a headers binding take a message.

    Args:
        arguments: of the binding. ``x-match`` is ``all`` (the default), ``any``, ``all-with-x`` or
            ``any-with-x``; the last two also compare arguments whose name starts with ``x-``. An
            argument without a value (None) asks only that the header is there.
        headers: of the message.
    """
    mode = arguments.get("x-match", "all")
    every = not str(mode).startswith("any")
    with_x = str(mode).endswith("-with-x")
    for name, wanted in arguments.items():
        if name == "x-match" or (name.startswith("x-") and not with_x):
            continue
        found = name in headers and (wanted is None or headers[name] == wanted)
        if found != every:
            return found
    return every


class BindingTable:
    """The bindings of one exchange, in the order in which they were made."""

    __slots__ = ("_bindings",)

    def __init__(self, bindings: Iterable[Binding] = ()) -> None:
        self._bindings: dict[Binding, None] = {}
        for binding in bindings:
            self.add(binding)

    def add(self, binding: Binding) -> None:
        """Add a binding; the same one twice is one."""
        self._bindings[binding] = None

    def discard(self, binding: Binding) -> None:
        """Remove a binding; nothing happens when there is none."""
        self._bindings.pop(binding, None)

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        """Return the queues, each once, that a message goes to."""
        raise UnsupportedOperation(f"{type(self).__name__} has no rule for routing")

    def __contains__(self, binding: object) -> bool:
        return binding in self._bindings

    def __iter__(self) -> Iterator[Binding]:
        return iter(list(self._bindings))

    def __len__(self) -> int:
        return len(self._bindings)

    def __bool__(self) -> bool:
        # An exchange that nothing is bound to has a table all the same.
        return True

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self)} bindings>"


class _Index:
    """Names to ordered sets of queues; safe to read while it changes."""

    __slots__ = ("_queues",)

    def __init__(self) -> None:
        self._queues: dict[str, dict[str, None]] = {}

    def add(self, name: str, queue: str) -> None:
        queues = self._queues.setdefault(name, {})
        queues[queue] = None
        # A task that removed the last queue may have dropped the set meanwhile.
        while (current := self._queues.setdefault(name, queues)) is not queues:
            queues = current
            queues[queue] = None

    def discard(self, name: str, queue: str) -> None:
        queues = self._queues.get(name)
        if queues is None:
            return
        queues.pop(queue, None)
        if not queues:
            self._queues.pop(name, None)
            for left in list(queues):  # added since it was found empty
                self.add(name, left)

    def get(self, name: str) -> list[str]:
        queues = self._queues.get(name)
        return list(queues) if queues is not None else []

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._queues))


class DirectTable(BindingTable):
    __slots__ = ("_by_key",)

    def __init__(self, bindings: Iterable[Binding] = ()) -> None:
        self._by_key = _Index()
        super().__init__(bindings)

    def add(self, binding: Binding) -> None:
        super().add(binding)
        self._by_key.add(binding[0], binding[2])

    def discard(self, binding: Binding) -> None:
        super().discard(binding)
        self._by_key.discard(binding[0], binding[2])

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        return self._by_key.get(routing_key)


class FanoutTable(BindingTable):
    # A queue may be bound under several keys, and stays until the last of them goes.
    __slots__ = ("_by_queue",)

    def __init__(self, bindings: Iterable[Binding] = ()) -> None:
        self._by_queue = _Index()
        super().__init__(bindings)

    def add(self, binding: Binding) -> None:
        super().add(binding)
        self._by_queue.add(binding[2], binding[0])

    def discard(self, binding: Binding) -> None:
        super().discard(binding)
        self._by_queue.discard(binding[2], binding[0])

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        return list(self._by_queue)


class _Node:
    """One word of the topic patterns, and what may follow it."""

    __slots__ = ("any_words", "children", "queues")

    def __init__(self, any_words: bool) -> None:
        self.any_words = any_words
        self.children: dict[str, _Node] = {}
        self.queues: dict[str, None] = {}


class TopicTable(BindingTable):
    """A tree of words: a key is looked up along all branches that can still match."""

    __slots__ = ("_cache", "_exact", "_root")

    def __init__(self, bindings: Iterable[Binding] = ()) -> None:
        self._exact = _Index()
        self._root = _Node(any_words=False)
        self._cache: dict[str, list[str]] = {}
        super().__init__(bindings)

    def add(self, binding: Binding) -> None:
        super().add(binding)
        key, _, queue = binding
        if _is_wild(key):
            self._insert(key.split("."), queue)
        else:
            self._exact.add(key, queue)
        # A search that is under way writes its result into the cache that it started with.
        self._cache = {}

    def discard(self, binding: Binding) -> None:
        super().discard(binding)
        key, _, queue = binding
        if _is_wild(key):
            self._prune(key.split("."), queue)
        else:
            self._exact.discard(key, queue)
        self._cache = {}

    def _insert(self, words: list[str], queue: str) -> None:
        while True:
            node = self._root
            for word in words:
                node = node.children.setdefault(word, _Node(word == "#"))
            node.queues[queue] = None
            # Another task may have pruned the branch while it was being walked.
            if self._path(words)[-1] is node:
                return

    def _path(self, words: list[str]) -> list[_Node | None]:
        path: list[_Node | None] = [self._root]
        for word in words:
            node = path[-1]
            path.append(None if node is None else node.children.get(word))
        return path

    def _prune(self, words: list[str], queue: str) -> None:
        path = self._path(words)
        if path[-1] is not None:
            path[-1].queues.pop(queue, None)
        while len(path) > 1 and words:
            node, parent, word = path.pop(), path[-1], words.pop()
            if node is None or parent is None:
                continue
            if node.queues or node.children:
                return
            parent.children.pop(word, None)
            if node.queues or node.children:
                # Somebody bound to the branch since it was found empty: bring back what was cut.
                for key, _, bound in self:
                    if _is_wild(key):
                        self._insert(key.split("."), bound)
                return

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        cache = self._cache
        found = cache.get(routing_key)
        if found is None:
            found = self._search(routing_key)
            if len(cache) >= TOPIC_CACHE_SIZE:
                cache.clear()
            cache[routing_key] = found
        return found

    def _search(self, routing_key: str) -> list[str]:
        queues = dict.fromkeys(self._exact.get(routing_key))
        nodes: dict[_Node, None] = {}
        self._enter(self._root, nodes)
        for word in _words(routing_key):
            following: dict[_Node, None] = {}
            for node in nodes:
                if node.any_words:
                    self._enter(node, following)
                for name in (word, "*"):
                    child = node.children.get(name)
                    if child is not None and not child.any_words:
                        self._enter(child, following)
            nodes = following
        for node in nodes:
            queues.update(dict.fromkeys(list(node.queues)))
        return list(queues)

    @staticmethod
    def _enter(node: _Node, nodes: dict[_Node, None]) -> None:
        nodes[node] = None
        following = node.children.get("#")  # it may stand for no word at all
        while following is not None:
            nodes[following] = None
            following = following.children.get("#")


class HeadersTable(BindingTable):
    __slots__ = ("_rules",)

    def __init__(self, bindings: Iterable[Binding] = ()) -> None:
        self._rules: dict[Binding, Mapping[str, Any]] = {}
        super().__init__(bindings)

    def add(self, binding: Binding) -> None:
        super().add(binding)
        self._rules[binding] = _load_arguments(binding[1])

    def discard(self, binding: Binding) -> None:
        super().discard(binding)
        self._rules.pop(binding, None)

    def match(self, routing_key: str, headers: Mapping[str, Any] | None = None) -> list[str]:  # noqa: ARG002
        headers = headers or {}
        found: dict[str, None] = {}
        for binding, arguments in list(self._rules.items()):
            if binding[2] not in found and headers_match(arguments, headers):
                found[binding[2]] = None
        return list(found)


def _load_arguments(pattern: str | None) -> dict[str, Any]:
    arguments = json.loads(pattern) if pattern else {}
    return arguments if isinstance(arguments, dict) else {}
