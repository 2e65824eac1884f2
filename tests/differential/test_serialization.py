"""Bodies on the wire between greenkombu and Kombu 5.7, in both directions."""

from __future__ import annotations

import pickle
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest

from greenkombu import compression, serialization
from greenkombu.utils import json
from tests.differential.reference import Raised, call_kombu, outcome

DUMPS = "kombu.serialization:dumps"
LOADS = "kombu.serialization:loads"

PLAIN: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63 - 1,
    1.5,
    "",
    "text é\u2028 \U0001f600",
    [],
    {},
    [1, [2, [3]]],
    {"a": {"b": [1, 2.5, None, False, "x"]}},
    {"": "", "é": "ü"},
]

# What JSON carries beyond its own types.
TYPED: list[Any] = [
    b"",
    b"bytes",
    b"\xff\x00\xfe",
    datetime(2020, 1, 2, 3, 4, 5, 6),
    datetime(2020, 1, 2, tzinfo=timezone.utc),
    datetime(2020, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=-5, minutes=-30))),
    date(2020, 2, 29),
    time(1, 2, 3, 4),
    time(23, 59, tzinfo=timezone.utc),
    Decimal("1.20"),
    Decimal("-1E+10"),
    UUID(int=0),
    UUID("12345678-1234-5678-1234-567812345678"),
    {
        "nested": [{"when": date(2020, 1, 1), "what": [b"\x80", Decimal(3)]}],
    },
]

PER_SERIALIZER: dict[str, list[Any]] = {
    "json": PLAIN + TYPED,
    "pickle": PLAIN + TYPED + [(1, 2), {1, 2}, {1: 2}],
    "yaml": [*PLAIN, b"\xff", date(2020, 1, 1), datetime(2020, 1, 1), {1, 2}, {1: 2}],
    "msgpack": [*PLAIN, b"\xff\x00", {b"k": 1}],
}


@pytest.mark.parametrize("name", PER_SERIALIZER)
def test_both_write_the_same_and_read_each_other(name: str) -> None:
    values = PER_SERIALIZER[name]
    ours = [serialization.dumps(value, serializer=name) for value in values]
    theirs = call_kombu([(DUMPS, (value,), {"serializer": name}) for value in values])
    assert ours == theirs
    as_sent = [
        (body.encode() if isinstance(body, str) else body, kind, encoding)
        for kind, encoding, body in ours
    ]
    assert call_kombu([(LOADS, sent, {"force": True}) for sent in as_sent]) == values
    read = [serialization.loads(*sent, force=True) for sent in as_sent]
    assert read == values
    assert [type(value) for value in read] == [type(value) for value in values]


def test_the_default_serializer_makes_the_same_choice() -> None:
    values = [*PLAIN, *TYPED]
    assert [serialization.dumps(value) for value in values] == call_kombu(
        [(DUMPS, (value,), {}) for value in values]
    )


CANNOT = [
    ({1, 2}, "json"),
    (timedelta(1), "json"),
    ({(1, 2): 3}, "json"),
    ({b"a": 1}, "json"),
    (2**64, "msgpack"),
    (datetime(2020, 1, 1), "msgpack"),
    (Decimal(1), "yaml"),
    ({"a": 1}, "nosuch"),
    ("a", "application/json"),
]


def test_both_refuse_to_write_the_same() -> None:
    theirs = call_kombu([(DUMPS, (data,), {"serializer": name}) for data, name in CANNOT])
    for (data, name), kombus in zip(CANNOT, theirs, strict=True):
        mine = outcome(serialization.dumps, data, serializer=name)
        assert isinstance(kombus, Raised), (data, name)
        # Whoever catches Kombu's error catches ours.
        assert kombus.kinds[0] in mine.kinds, (data, name)


PICKLED = pickle.dumps({"a": 1}, 4)
JSON = "application/json"
READ: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((b'{"a":1}', JSON, "utf-8"), {}),
    (('{"a":1}', JSON, "utf-8"), {}),
    ((b'{"a":1}', JSON, "binary"), {}),
    ((bytearray(b'{"a":1}'), JSON, "utf-8"), {}),
    ((b'{"a":1}', "json", "utf-8"), {}),
    ((b'{"a":1}', None, None), {}),
    ((b"\xe9", "text/plain", "latin-1"), {}),
    ((b"\xff", "text/plain", "utf-8"), {}),
    ((b"ab", "text/plain", "nosuchcodec"), {}),
    ((b"ab", "text/plain", "BINARY"), {}),
    ((b"ab", "unknown/type", "utf-8"), {}),
    ((b"ab", "unknown/type", "binary"), {}),
    ((None, JSON, "utf-8"), {}),
    ((b"{", JSON, "utf-8"), {}),
    ((b"\xff", JSON, "utf-8"), {}),
    ((b"NaN", JSON, "utf-8"), {"accept": []}),
    ((b"1", JSON, "utf-8"), {"accept": [JSON]}),
    ((b"1", JSON, "utf-8"), {"accept": ["json"]}),
    ((b"1", "text/plain", "utf-8"), {"accept": [JSON]}),
    ((b"1", "application/data", "binary"), {"accept": []}),
    ((b"1", "application/text", "utf-8"), {"accept": []}),
    ((PICKLED, "application/x-python-serialize", "binary"), {}),
    ((PICKLED, "application/x-python-serialize", "binary"), {"force": True}),
    (
        (PICKLED, "application/x-python-serialize", "binary"),
        {"accept": ["application/x-python-serialize"]},
    ),
    ((PICKLED, "application/x-python-serialize", "binary"), {"accept": [JSON], "force": True}),
    ((b"garbage", "application/x-python-serialize", "binary"), {"force": True}),
    ((b"a: 1", "application/x-yaml", "utf-8"), {}),
    ((b"a: [1, x]", "application/x-yaml", "utf-8"), {"force": True}),
    ((b"!!python/name:os.system", "application/x-yaml", "utf-8"), {"force": True}),
    ((b"\x81\x01\x02", "application/x-msgpack", "binary"), {"force": True}),
    ((b"\xc1", "application/x-msgpack", "binary"), {"force": True}),
    ((b"[" * 100_000, JSON, "utf-8"), {}),
    *(
        ((f'{{"__type__": {marker}, "__value__": {value}}}'.encode(), JSON, "utf-8"), {})
        for marker, value in [
            ('"datetime"', '"2020-01-01T00:00:00Z"'),
            ('"datetime"', '"never"'),
            ('"date"', '"2020-01-01T00:00:00"'),
            ('"decimal"', "1.5"),
            ('"bytes"', '"YWI="'),
            ('"base64"', '"YWI="'),
            ('"uuid"', '{"hex": "00000000000000000000000000000005", "version": 4}'),
            ('"nosuch"', "1"),
            ("null", "1"),
            ("[1]", "1"),
        ]
    ),
]


def test_both_read_and_refuse_the_same() -> None:
    theirs = call_kombu([(LOADS, args, kwargs) for args, kwargs in READ])
    for (args, kwargs), kombus in zip(READ, theirs, strict=True):
        mine = outcome(serialization.loads, *args, **kwargs)
        if isinstance(kombus, Raised):
            assert isinstance(mine, Raised), (args, kwargs)
            assert kombus.kinds[0] in mine.kinds, (args, kwargs)
        else:
            assert mine == kombus, (args, kwargs)


def test_accept_lists_mean_the_same() -> None:
    lists: list[Any] = [None, [], ["json"], {"pickle", "application/json"}, ("x/y",), ["nosuch"]]
    theirs = call_kombu([("kombu.serialization:prepare_accept_content", (x,), {}) for x in lists])
    ours = [outcome(serialization.prepare_accept_content, x) for x in lists]
    assert ours[:-1] == theirs[:-1]
    assert theirs[-1].kinds[0] in ours[-1].kinds


def test_names_and_content_types_are_the_same() -> None:
    [kombus] = call_kombu([("kombu.serialization:registry.name_to_type.copy", (), {})])
    assert kombus == serialization.registry.name_to_type
    [kombus] = call_kombu([("kombu.serialization:registry._disabled_content_types.copy", (), {})])
    assert kombus == serialization.registry._disabled_content_types


def test_json_helpers_do_the_same() -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("dumps", ({"b": 1, "a": date(2020, 1, 1)},), {"sort_keys": True, "indent": 1}),
        ("loads", (b'{"a": {"__type__": "bytes", "__value__": "x"}}',), {}),
        ("loads", (memoryview(b"[1]").tobytes(),), {"decode_bytes": False}),
        ("object_hook", ({"__type__": "decimal", "__value__": "1"},), {}),
        ("object_hook", ({"a": 1},), {}),
    ]
    theirs = call_kombu([(f"kombu.utils.json:{name}", a, k) for name, a, k in calls])
    assert [getattr(json, name)(*a, **k) for name, a, k in calls] == theirs


BODIES = [b"", b"x", b"hello " * 1000, bytes(range(256)) * 100]


@pytest.mark.parametrize(
    "alias", ["gzip", "zlib", "bzip2", "bzip", "lzma", "xz", "brotli", "zstd", "zstandard"]
)
def test_both_expand_what_the_other_compressed(alias: str) -> None:
    theirs = call_kombu([("kombu.compression:compress", (body, alias), {}) for body in BODIES])
    if isinstance(theirs[0], Raised):
        pytest.skip(f"Kombu has no {alias} there: {theirs[0].text}")
    ours = [compression.compress(body, alias) for body in BODIES]
    assert {kind for _, kind in ours} == {kind for _, kind in theirs}
    assert [compression.decompress(*packed) for packed in theirs] == BODIES
    assert call_kombu([("kombu.compression:decompress", p, {}) for p in ours]) == BODIES
