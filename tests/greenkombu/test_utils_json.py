"""greenkombu.utils.json: Kombu 5's types in JSON (behaviour 204; scenario S31)."""

from __future__ import annotations

import json as stdlib_json
import platform
import subprocess
import sys
import types
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenkombu.utils import json
from greenkombu.utils.json import JSONEncoder, dumps, loads, object_hook, register_type

MOMENT = datetime(2020, 1, 2, 3, 4, 5, 6)
UUID5 = UUID("00000000-0000-0000-0000-000000000005")

# As Kombu 5.7 writes them.
WIRE: list[tuple[Any, str]] = [
    (MOMENT, '{"__type__": "datetime", "__value__": "2020-01-02T03:04:05.000006"}'),
    (
        datetime(2020, 1, 2, tzinfo=timezone.utc),
        '{"__type__": "datetime", "__value__": "2020-01-02T00:00:00+00:00"}',
    ),
    (date(2020, 1, 2), '{"__type__": "date", "__value__": "2020-01-02"}'),
    (time(1, 2, 3, 4), '{"__type__": "time", "__value__": "01:02:03.000004"}'),
    (Decimal("1.20"), '{"__type__": "decimal", "__value__": "1.20"}'),
    (UUID5, '{"__type__": "uuid", "__value__": {"hex": "00000000000000000000000000000005"}}'),
    (b"ab", '{"__type__": "bytes", "__value__": "ab"}'),
    (b"\xff\x00", '{"__type__": "base64", "__value__": "/wA="}'),
    ({"a": [1, 2.5, "é", None, True]}, '{"a": [1, 2.5, "\\u00e9", null, true]}'),
    ("text", '"text"'),
]


@pytest.fixture(autouse=True)
def _keep_types(monkeypatch: pytest.MonkeyPatch) -> None:
    encoders, decoders = dict(json._encoders), dict(json._decoders)
    yield  # type: ignore[misc]
    for table, saved in ((json._encoders, encoders), (json._decoders, decoders)):
        table.clear()
        table.update(saved)


@pytest.mark.parametrize(("value", "wire"), WIRE, ids=lambda v: type(v).__name__)
def test_b204_types_of_kombu_5_on_the_wire(value: Any, wire: str) -> None:
    assert dumps(value) == wire
    assert dumps({"x": [value]}) == f'{{"x": [{wire}]}}'
    decoded = loads(wire)
    assert decoded == value
    assert type(decoded) is type(value)
    assert loads(f'{{"x": [{wire}]}}') == {"x": [value]}


@pytest.mark.parametrize(("value", "wire"), WIRE, ids=lambda v: type(v).__name__)
def test_all_ways_to_encode_give_the_same_text(value: Any, wire: str) -> None:
    assert stdlib_json.dumps(value, cls=JSONEncoder) == wire
    assert dumps(value, sort_keys=False) == wire
    assert stdlib_json.loads(wire, object_hook=object_hook) == value
    assert loads(wire, object_hook=lambda o: object_hook(o)) == value


@pytest.mark.skipif(
    platform.python_implementation() != "CPython", reason="other interpreters have no C encoder"
)
def test_the_kept_encoder_is_in_use() -> None:
    assert json._fast_encode is not None


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(timezone.utc))
    | st.times(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values)
def test_b204_everything_comes_back(value: Any) -> None:
    text = dumps(value)
    assert text == stdlib_json.dumps(value, cls=JSONEncoder)
    assert loads(text) == loads(text.encode()) == loads(f"\n {text} \r\n") == value


@given(st.text(max_size=30) | st.binary(max_size=30))
def test_any_text_is_refused_as_the_json_module_refuses_it(text: str | bytes) -> None:
    try:
        expected = stdlib_json.loads(text.decode() if isinstance(text, bytes) else text)
    except ValueError:
        with pytest.raises(ValueError):  # noqa: PT011 - whatever the json module says
            loads(text)
    else:
        assert loads(text) == expected or expected != expected


@pytest.mark.parametrize("text", ["", "{", "[1,2", '{"a": }', "1 2", "[1]]", "nul", "\ufeff1", " "])
def test_what_is_not_json_is_a_value_error(text: str) -> None:
    with pytest.raises(stdlib_json.JSONDecodeError):
        loads(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"__type__":"datetime","__value__":"2020-01-01T00:00:00Z"}', "utc"),
        ('{"__type__":"date","__value__":"2020-01-01T00:00:00"}', date(2020, 1, 1)),
        ('{"__type__":"decimal","__value__":1.5}', Decimal("1.5")),
        ('{"\\u005f_type__":"bytes","__value__":"ab"}', b"ab"),
        ('{"__type__":"uuid","__value__":{"hex":"5","version":4}}', None),
        (
            '{"__type__":"uuid","__value__":'
            '{"hex":"00000000000000000000000000000005","version":4}}',
            UUID("00000000-0000-4000-8000-000000000005"),
        ),
        ('{"__type__":"datetime"}', {"__type__": "datetime"}),
        ('{"__type__":"x","__value__":1,"y":2}', {"__type__": "x", "__value__": 1, "y": 2}),
    ],
)
def test_spellings_of_other_senders(text: str, value: Any) -> None:
    if value == "utc":
        value = datetime(2020, 1, 1, tzinfo=timezone.utc)
    if value is None:
        with pytest.raises(ValueError, match="UUID"):
            loads(text)
    else:
        assert loads(text) == value


@pytest.mark.parametrize("marker", ['"nosuch"', "null", "[1]", '{"a": 1}'])
def test_unknown_types_are_an_error_that_names_them(marker: str) -> None:
    with pytest.raises(ValueError, match=r"unknown JSON type .*register_type"):
        loads(f'{{"__type__": {marker}, "__value__": 1}}')


@pytest.mark.parametrize("data", [b'{"a": 1}', bytearray(b'{"a": 1}'), memoryview(b'{"a": 1}')])
def test_bytes_of_all_kinds_are_utf8(data: Any) -> None:
    assert loads(data) == {"a": 1}


def test_other_bytes_are_refused() -> None:
    with pytest.raises(UnicodeDecodeError):
        loads(b"\xff")
    assert loads('{"a":1}'.encode("utf-16"), decode_bytes=False) == {"a": 1}
    with pytest.raises(TypeError):
        loads(5)  # type: ignore[arg-type]


class Point:
    def __init__(self, x: int) -> None:
        self.x = x


class SubPoint(Point):
    pass


class WithMethod:
    def __json__(self) -> Any:
        return {"method": MOMENT}


def test_register_type() -> None:
    register_type(Point, "point", lambda o: o.x, Point)
    assert dumps(Point(4)) == dumps(SubPoint(4)) == '{"__type__": "point", "__value__": 4}'
    assert loads(dumps([Point(4)]))[0].x == 4


def test_register_type_without_marker_sends_the_bare_value() -> None:
    register_type(Point, None, lambda o: o.x)
    assert dumps([Point(4)]) == "[4]"


def test_json_method_of_an_object() -> None:
    assert dumps(WithMethod()) == '{"method": ' + dumps(MOMENT) + "}"


def test_subclasses_go_as_their_nearest_type() -> None:
    class Moment(datetime):
        pass

    assert loads(dumps(Moment(2020, 1, 1))) == datetime(2020, 1, 1)


def test_djangos_translated_text_is_text(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("django.utils.functional")

    class Promise:
        def __str__(self) -> str:
            return "übersetzt"

    module.Promise = Promise  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "django.utils.functional", module)
    assert loads(dumps([Promise()])) == ["übersetzt"]


@pytest.mark.parametrize("value", [object(), {1, 2}, timedelta(1), 1j, bytearray(b"x"), Point])
def test_other_types_are_a_type_error_that_names_them(value: Any) -> None:
    name = type(value).__name__
    with pytest.raises(TypeError, match=f"Object of type {name} is not JSON serializable"):
        dumps({"a": [value]})
    # A failure leaves nothing behind in the kept encoder.
    assert dumps({"a": [1]}) == '{"a": [1]}'


def test_options_of_the_json_module() -> None:
    assert dumps({"b": 1, "a": "é"}, sort_keys=True, ensure_ascii=False) == '{"a": "é", "b": 1}'
    assert dumps({"a": 1}, default_kwargs={"indent": 1}) == '{\n "a": 1\n}'
    assert dumps({"a": 1}, default_kwargs={"indent": 1}, indent=None) == '{"a": 1}'


def nested_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def test_s31_deep_nesting_is_a_recursion_error() -> None:
    with pytest.raises(RecursionError):
        loads("[" * 100_000 + "]" * 100_000)
    with pytest.raises(RecursionError):
        loads('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(RecursionError):
        dumps(nested_list(100_000))
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(RecursionError):
        dumps(circle)


def test_s31_deep_nesting_does_not_crash_without_recursion_limit() -> None:
    # In a process of its own: what is tested for is a stack overflow.
    script = (
        "import sys\n"
        "from greenkombu.utils.json import dumps, loads, MAX_DEPTH\n"
        "sys.setrecursionlimit(10_000_000)\n"
        "for n in (100_000, 3_000_000):\n"
        "    for begin, end in (('[', ']'), ('{\"a[\\\\\"]\":', '}')):\n"
        "        try: loads(begin * n + '1' + end * n)\n"
        "        except RecursionError as exc: print(exc)\n"
        "wide = '[' + ','.join(['{\"a[[[\": []}'] * 20_000) + ']'\n"
        "assert len(loads(wide)) == 20_000\n"
        "circle = []; circle.append(circle)\n"
        "try: dumps(circle)\n"
        "except ValueError as exc: print(exc)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nested deeper than 10000") == 4
    assert "Circular" in done.stdout
