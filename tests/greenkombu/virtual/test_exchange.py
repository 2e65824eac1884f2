"""Which queues a message goes to: the four exchange types and their tables."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenkombu.exceptions import EncodeError
from greenkombu.transport.virtual.exchange import (
    DirectExchange,
    ExchangeType,
    FanoutExchange,
    HeadersExchange,
    TopicExchange,
    headers_match,
    topic_match,
)
from greenkombu.transport.virtual.tables import TOPIC_CACHE_SIZE

words = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5).map(".".join)
patterns = st.lists(st.sampled_from(["a", "b", "*", "#"]), min_size=1, max_size=5).map(".".join)


@pytest.mark.parametrize(
    ("binding_key", "routing_key", "matches"),
    [
        ("*.stock.#", "usd.stock", True),
        ("*.stock.#", "eur.stock.db", True),
        ("*.stock.#", "stock.nasdaq", False),
        ("*.stock.#", "a.b.stock", False),
        ("#", "", True),
        ("#", "a.b.c", True),
        ("*", "a", True),
        ("*", "", False),  # the empty key has no word
        ("*", "a.b", False),
        ("a.#", "a", True),
        ("a.#", "ab", False),
        ("#.a", "a", True),
        ("#.a.#", "b.a.c", True),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.b.c", False),
        ("a.#.#.c", "a.c", True),
        ("a+b.*", "a+b.x", True),
        ("a.b", "a.b", True),
        ("a.b", "axb", False),
    ],
)
def test_b125_topic_compares_word_by_word(
    binding_key: str, routing_key: str, matches: bool
) -> None:
    exchange = TopicExchange(None)
    binding = exchange.prepare_bind("q", "e", binding_key, None)
    assert topic_match(binding_key, routing_key) is matches
    assert exchange.lookup([binding], "e", routing_key, []) == (["q"] if matches else [])
    table = exchange.make_table()
    table.add(binding)
    assert table.match(routing_key) == (["q"] if matches else [])
    assert bool(re.match(exchange.key_to_pattern(binding_key), routing_key)) is matches


@given(pattern=patterns, key=words)
def test_b125_the_pattern_for_other_programs_agrees_with_the_rule(pattern: str, key: str) -> None:
    regex = TopicExchange(None).key_to_pattern(pattern)
    assert bool(re.match(regex, key)) is topic_match(pattern, key)


@given(
    bound=st.lists(patterns | words, max_size=12),
    unbound=st.lists(st.integers(0, 11), max_size=6),
    keys=st.lists(words, min_size=1, max_size=6),
)
def test_the_topic_table_finds_what_a_search_of_the_list_finds(
    bound: list[str], unbound: list[int], keys: list[str]
) -> None:
    exchange = TopicExchange(None)
    table = exchange.make_table()
    bindings = dict.fromkeys(
        exchange.prepare_bind(f"q{number % 3}", "e", key, None) for number, key in enumerate(bound)
    )
    for binding in bindings:
        table.add(binding)
        table.match(keys[0])  # fills the cache that later changes must empty
    for number in unbound:
        if number < len(bindings):
            gone = list(bindings)[number]
            del bindings[gone]
            table.discard(gone)
    for key in keys:
        assert sorted(table.match(key)) == sorted(
            exchange.lookup(list(bindings), "e", key, []) or []
        )


def test_s31_a_topic_pattern_of_many_wildcards_costs_no_exponential_time() -> None:
    key = ".".join(["b"] * 60)
    pattern = ".".join(["#", "*"] * 15 + ["a"])
    table = TopicExchange.make_table()
    table.add((pattern, None, "q"))
    started = time.thread_time()
    assert not topic_match(pattern, key)
    assert table.match(key) == []
    assert time.thread_time() - started < 1.0


def test_a_topic_table_keeps_no_more_results_than_its_bound() -> None:
    table = TopicExchange.make_table()
    table.add(("a.#", None, "q"))
    for number in range(3 * TOPIC_CACHE_SIZE):
        assert table.match(f"a.{number}") == ["q"]
    assert len(table._cache) <= TOPIC_CACHE_SIZE  # type: ignore[attr-defined]


def test_a_topic_table_forgets_the_words_of_removed_patterns() -> None:
    table = TopicExchange.make_table()
    for number in range(50):
        table.add((f"{number}.*.#", None, "q"))
    table.add(("1.*", None, "r"))
    for number in range(50):
        table.discard((f"{number}.*.#", None, "q"))
    assert table.match("1.x") == ["r"]
    assert list(table._root.children) == ["1"]  # type: ignore[attr-defined]
    assert len(table) == 1


def test_b125_direct_goes_by_the_very_key() -> None:
    table = DirectExchange.make_table()
    table.add(("k", None, "q1"))
    table.add(("k", None, "q2"))
    table.add(("k", None, "q1"))
    table.add(("k.x", None, "q3"))
    assert table.match("k") == ["q1", "q2"]
    assert table.match("nothing") == []
    table.discard(("k", None, "q1"))
    table.discard(("k", None, "never bound"))
    assert table.match("k") == ["q2"]
    assert DirectExchange(None).lookup(list(table), "e", "nothing", ["default"]) == ["default"]


def test_b125_fanout_goes_to_every_queue_once_and_until_its_last_binding() -> None:
    table = FanoutExchange.make_table()
    table.add(("x", None, "q"))
    table.add(("y", None, "q"))
    table.add(("x", None, "r"))
    assert table.match("whatever") == ["q", "r"]
    table.discard(("x", None, "q"))
    assert table.match("whatever") == ["q", "r"]
    table.discard(("y", None, "q"))
    assert table.match("whatever") == ["r"]


@pytest.mark.parametrize(
    ("arguments", "headers", "matches"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}, True),
        ({"a": 1, "b": 2}, {"a": 1}, False),
        ({"x-match": "all", "a": None}, {"a": "anything"}, True),
        ({"x-match": "any", "a": 1, "b": 2}, {"b": 2}, True),
        ({"x-match": "any", "a": 1, "b": 2}, {"b": 3}, False),
        ({"x-match": "any"}, {"b": 3}, False),
        ({}, {"b": 3}, True),
        ({"a": 1, "x-id": 7}, {"a": 1}, True),
        ({"x-match": "all-with-x", "a": 1, "x-id": 7}, {"a": 1}, False),
        ({"x-match": "any-with-x", "a": 1, "x-id": 7}, {"x-id": 7}, True),
    ],
)
def test_b126_headers_compare_arguments(
    arguments: dict[str, object], headers: dict[str, object], matches: bool
) -> None:
    assert headers_match(arguments, headers) is matches
    exchange = HeadersExchange(None)
    binding = exchange.prepare_bind("q", "e", "ignored", arguments)
    assert exchange.lookup([binding], "e", "", [], headers) == (["q"] if matches else [])


def test_headers_arguments_that_no_store_can_keep_are_refused() -> None:
    with pytest.raises(EncodeError, match="queue 'q' are not JSON"):
        HeadersExchange(None).prepare_bind("q", "e", "", {"a": object()})


def test_a_type_of_ones_own_is_asked_and_not_the_index_it_inherits() -> None:
    class Longest(DirectExchange):
        type = "longest"

        def lookup(self, table, exchange, routing_key, default):  # type: ignore[no-untyped-def]
            return [max(queue for _, _, queue in table)]

    table = Longest.make_table()
    table.add(("k", None, "q1"))
    table.add(("k", None, "q2"))
    assert table.match("anything") == ["q2"]


def test_b158_equivalent_compares_all_settings() -> None:
    declared = {"type": "direct", "durable": True, "auto_delete": False, "arguments": {}}
    same = ExchangeType(None).equivalent
    assert same(declared, "e", "direct", True, False, None)
    assert not same(declared, "e", "topic", True, False, None)
    assert not same(declared, "e", "direct", False, False, None)
    assert not same(declared, "e", "direct", True, True, None)
    assert not same(declared, "e", "direct", True, False, {"alternate-exchange": "x"})
