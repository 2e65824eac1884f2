"""Replies from bytes: hiredis and our own parser, any split, and what is no reply at all."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenkombu.transport.redis import _resp, _resp_python
from greenkombu.transport.redis._errors import ArgumentError, ProtocolError, ReplyError
from greenkombu.transport.redis._resp import (
    NOT_READY,
    PurePythonReader,
    Push,
    make_reader,
    pack,
    pack_many,
)

READERS = [make_reader, PurePythonReader]


@pytest.fixture(params=READERS, ids=["fastest", "python"])
def make(request: pytest.FixtureRequest) -> Any:
    return request.param


def plain(value: Any) -> Any:
    """Errors by their text, so that results can be compared."""
    if isinstance(value, ReplyError):
        return ("error", value.message)
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


VALUES = [
    (b"+OK\r\n", b"OK"),
    (b"+\r\n", b""),
    (b":12\r\n", 12),
    (b":-9223372036854775808\r\n", -(2**63)),
    (b"$3\r\nabc\r\n", b"abc"),
    (b"$0\r\n\r\n", b""),
    (b"$4\r\n\r\n\r\n\r\n", b"\r\n\r\n"),
    (b"$-1\r\n", None),
    (b"*-1\r\n", None),
    (b"_\r\n", None),
    (b"*0\r\n", []),
    (b"*3\r\n:1\r\n*1\r\n+a\r\n$-1\r\n", [1, [b"a"], None]),
    (b"%1\r\n+a\r\n*1\r\n:1\r\n", {b"a": [1]}),
    (b"%0\r\n", {}),
    (b"~2\r\n:1\r\n:1\r\n", [1, 1]),
    (b"#t\r\n", True),
    (b"#f\r\n", False),
    (b",1.5\r\n", 1.5),
    (b",1e5\r\n", 100000.0),
    (b",-inf\r\n", -math.inf),
    (b"=7\r\ntxt:abc\r\n", b"abc"),
    (b"(123456789012345678901234567890\r\n", b"123456789012345678901234567890"),
]


@pytest.mark.parametrize(("data", "value"), VALUES, ids=[repr(data) for data, _ in VALUES])
def test_each_type_of_reply(make: Any, data: bytes, value: Any) -> None:
    reader = make()
    reader.feed(data)
    got = reader.gets()
    assert got == value
    assert type(got) is type(value)
    assert reader.gets() is NOT_READY


def test_an_error_is_a_value_with_its_code(make: Any) -> None:
    [reply, several] = make().take(b"-WRONGTYPE \xff no\r\n*2\r\n:1\r\n-OOM full\r\n")
    assert isinstance(reply, ReplyError)
    assert (reply.code, reply.message) == ("WRONGTYPE", "WRONGTYPE \ufffd no")
    assert several[0] == 1
    assert several[1].code == "OOM"


def test_a_push_is_told_from_a_list(make: Any) -> None:
    [push, reply] = make().take(b">2\r\n+invalidate\r\n*1\r\n+q\r\n*1\r\n+a\r\n")
    assert isinstance(push, Push)
    assert push == [b"invalidate", [b"q"]]
    assert not isinstance(reply, Push)


BROKEN = [
    b"HTTP/1.1 400 Bad Request\r\n",
    b"\x16\x03\x01\x02\x00",
    b"\x15\x03\x01\x00\x02\x02\x46",
    b"AMQP\x00\x00\x09\x01",
    b":\r\n",
    b":+12\r\n",
    b":1a\r\n",
    b":9223372036854775808\r\n",
    b"$-2\r\n",
    b"$?\r\n",
    b"*x\r\n",
    b"*99999999999\r\n",
    b"*3000000000\r\n",
    b"*1\r\n%10000000\r\n",
    b"#x\r\n",
    b"_x\r\n",
    b",x\r\n",
    b"(x\r\n",
    b"=3\r\nabc\r\n",
    b"+a\rb\r\n",
    b"%1\r\n*0\r\n:1\r\n",
]


@pytest.mark.parametrize("data", BROKEN, ids=repr)
def test_what_is_no_reply_is_a_typed_error_that_stays(make: Any, data: bytes) -> None:
    reader = make()
    assert reader.take(b"+before\r\n" + data) == [b"before"]
    assert isinstance(reader.error, ProtocolError)
    with pytest.raises(ProtocolError):
        reader.gets()
    assert reader.take(b"+after\r\n") == []


def test_a_header_of_a_huge_list_is_found_across_two_reads(make: Any) -> None:
    data = b"+a\r\n*3000000000\r\n"
    for cut in range(4, len(data)):
        reader = make()
        reader.take(data[:cut])
        reader.take(data[cut:])
        assert reader.error is not None, cut
        assert "3000000000" in str(reader.error) or "elements" in str(reader.error)


def test_a_reply_beyond_the_bound_is_refused_with_the_remedy(make: Any) -> None:
    reader = make(1000)
    reader.take(b"$100000\r\n")
    for _ in range(4):
        reader.take(b"x" * 300)
    assert "max_reply_bytes" in str(reader.error)


def test_many_replies_below_the_bound_are_taken(make: Any) -> None:
    reader = make(1000)
    one = b"$900\r\n" + b"x" * 900 + b"\r\n"
    data = one * 50
    got = []
    for start in range(0, len(data), 70):
        got += reader.take(data[start : start + 70])
    assert reader.error is None
    assert got == [b"x" * 900] * 50


def test_lists_in_lists_are_bounded_in_python() -> None:
    reader = PurePythonReader()
    reader.take(b"*1\r\n" * 1000)
    assert "deep" in str(reader.error)


def test_a_header_without_end_is_refused_in_python() -> None:
    reader = PurePythonReader()
    reader.take(b"$" + b"1" * 10_000)
    assert reader.error is not None


def _encode(value: Any) -> bytes:
    if value is None:
        return b"_\r\n"
    if isinstance(value, bool):
        return b"#t\r\n" if value else b"#f\r\n"
    if isinstance(value, int):
        return b":%d\r\n" % value
    if isinstance(value, float):
        return f",{value!r}\r\n".encode()
    if isinstance(value, bytes):
        return b"$%d\r\n%b\r\n" % (len(value), value)
    if isinstance(value, tuple):
        return b"-%b\r\n" % value[1].encode()
    if isinstance(value, dict):
        items = [each for pair in value.items() for each in pair]
        return b"%%%d\r\n" % len(value) + b"".join(map(_encode, items))
    return b"*%d\r\n" % len(value) + b"".join(map(_encode, value))


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.binary(max_size=40),
    st.tuples(st.just("error"), st.text(alphabet="ABC xyz", max_size=10)),
)
REPLIES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.binary(max_size=5), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(st.lists(REPLIES, max_size=6), st.lists(st.integers(0, 400), max_size=12))
def test_any_split_gives_the_same_replies(replies: list[Any], cuts: list[int]) -> None:
    data = b"".join(map(_encode, replies))
    borders = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    for maker in READERS:
        reader = maker()
        got: list[Any] = []
        for start, end in pairwise(borders):
            got += reader.take(data[start:end])
        assert reader.error is None
        assert [plain(each) for each in got] == replies


@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes_raise_nothing_but_the_typed_error(data: bytes, cut: int) -> None:
    for maker in READERS:
        reader = maker()
        reader.take(data[:cut])
        reader.take(data[cut:])
        assert reader.error is None or isinstance(reader.error, ProtocolError)


@given(
    st.lists(
        st.one_of(
            st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
            st.binary(max_size=20),
            st.integers(),
            st.floats(allow_nan=False),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_command_is_a_list_of_strings(words: list[Any]) -> None:
    [read] = make_reader().take(pack(*words))
    expected = [
        word.encode()
        if isinstance(word, str)
        else word
        if isinstance(word, bytes)
        else repr(word).encode()
        for word in words
    ]
    assert read == expected
    assert _resp_python.pack_in_python(tuple(words)) == pack(*words)


def test_several_commands_are_one_after_the_other() -> None:
    assert pack_many([("GET", "a"), ("PING",)]) == pack("GET", "a") + pack("PING")


@pytest.mark.parametrize("word", [None, True, [1], object(), "\udc80"], ids=repr)
def test_a_word_that_cannot_be_sent_is_refused_without_its_value(word: Any) -> None:
    for call in (lambda: pack("AUTH", word), lambda: pack_many([("PING",), ("AUTH", word)])):
        with pytest.raises(ArgumentError) as caught:
            call()
        assert "AUTH" in str(caught.value)


def test_both_readers_are_tested() -> None:
    assert _resp.hiredis is not None, "the extra redis has hiredis"
    assert not isinstance(make_reader(), PurePythonReader)
