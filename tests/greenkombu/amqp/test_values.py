"""Values as bytes: the same as py-amqp where it decodes, a typed error where nothing should."""

from __future__ import annotations

import contextlib
import pickle
from datetime import datetime
from decimal import Decimal
from typing import Any

import amqp
import pytest
from amqp import serialization
from hypothesis import given
from hypothesis import strategies as st

from greenkombu._amqp import errors, methods, values

from . import streams


@given(streams.tables)
def test_tables_have_py_amqps_bytes_and_values(table: dict[str, Any]) -> None:
    ours = values.encode_table(table, "headers")
    assert ours == serialization.dumps("F", [table])
    decoded, offset = values.decode_table(ours, 0, "headers")
    assert offset == len(ours)
    assert [decoded] == serialization.loads("F", ours, 0)[0]


@given(streams.properties)
def test_properties_have_py_amqps_bytes_and_values(properties: dict[str, Any]) -> None:
    ours = values.encode_properties(properties)
    assert ours == amqp.Message(**properties)._serialize_properties()
    theirs = amqp.Message()
    theirs._load_properties(60, ours, 0)
    assert values.decode_properties(ours) == theirs.properties


@given(st.binary(max_size=200))
def test_random_bytes_decode_as_properties_or_raise_the_typed_error(data: bytes) -> None:
    with contextlib.suppress(errors.MalformedValueError):
        assert isinstance(values.decode_properties(data), dict)


@given(st.sampled_from(list(methods.BY_SIGNATURE.values())), st.binary(max_size=200))
def test_random_bytes_decode_as_arguments_or_raise_the_typed_error(
    method: methods.Method, data: bytes
) -> None:
    with contextlib.suppress(errors.MalformedValueError):
        arguments = values.decode_arguments(method, method.prefix + data)
        assert len(arguments) == len(method.fields)


@pytest.mark.parametrize(
    ("name", "given_values"),
    [
        ("Queue.declare", (0, "q", True, False, True, False, True, {"x-expires": 5})),
        ("Exchange.declare", (0, "e", "topic", True, True, False, False, True, None)),
        ("Basic.consume", (0, "q", "tag", False, True, False, True, {})),
        ("Basic.qos", (0, 100, True)),
        ("Connection.tune_ok", (2047, 131072, 60)),
        ("Connection.start_ok", ({"a": 1}, "PLAIN", b"\0u\0p", "en_US")),
    ],
)
def test_arguments_have_py_amqps_bytes(name: str, given_values: tuple[Any, ...]) -> None:
    method = methods.BY_NAME[name]
    encoded = values.encode_arguments(method, given_values)
    assert encoded == method.prefix + serialization.dumps(method.formats, given_values)


def test_bits_beyond_eight_get_another_octet() -> None:
    method = methods.Method((1, 1), "Test.bits", " ".join(f"b{n}:b" for n in range(11)), False)
    bits = (True, False, True, True, False, False, False, True, False, True, True)
    encoded = values.encode_arguments(method, bits)
    assert encoded == method.prefix + serialization.dumps("b" * 11, bits)
    assert values.decode_arguments(method, encoded) == bits


def test_over_long_short_string_names_method_and_field() -> None:
    method = methods.BY_SIGNATURE[50, 10]
    with pytest.raises(errors.ArgumentError, match=r"Queue.declare: queue is 300 octets"):
        values.encode_arguments(method, (0, "q" * 300, False, False, False, False, False, None))
    with pytest.raises(errors.ArgumentError, match="property correlation_id is 256 octets"):
        values.encode_properties({"correlation_id": "c" * 256})
    with pytest.raises(errors.ArgumentError, match="the key is 256 octets"):
        values.encode_properties({"application_headers": {"k" * 256: 1}})


@pytest.mark.parametrize(
    ("properties", "text"),
    [
        ({"application_headers": {"a": object()}}, "property application_headers.*object.*'a'"),
        ({"application_headers": {"a": 2**63}}, "out of range"),
        ({"application_headers": {"a": Decimal("NaN")}}, "out of range"),
        ({"application_headers": {"a": float("inf")}}, "inf at key 'a'"),
        ({"application_headers": {"a": [{"b": float("nan")}]}}, "nan at key 'b'"),
        ({"application_headers": {"a": "x\ud800"}}, r"value at key 'a' cannot be sent as UTF-8"),
        ({"application_headers": {"\ud800": 1}}, "the key cannot be sent as UTF-8"),
        ({"message_id": "\ud800"}, "property message_id cannot be sent as UTF-8"),
        ({"application_headers": {7: 1}}, "must be a string, not int"),
        ({"application_headers": ["a"]}, "must be a dict, not list"),
        ({"priority": 300}, "property priority cannot be 300"),
        ({"priority": "high"}, "property priority cannot be 'high'"),
        ({"reply_to": 5}, "property reply_to must be a string, not int"),
        ({"timestamp": "now"}, "property timestamp cannot be 'now'"),
    ],
)
def test_value_that_amqp_cannot_carry_is_named(properties: dict[str, Any], text: str) -> None:
    with pytest.raises(errors.ArgumentError, match=text) as caught:
        values.encode_properties(properties)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, amqp.exceptions.FrameSyntaxError)


def test_self_containing_table_is_refused_outward() -> None:
    endless: dict[str, Any] = {}
    endless["again"] = [endless]
    with pytest.raises(errors.ArgumentError, match="nests deeper than 100"):
        values.encode_table(endless, "headers")


@pytest.mark.parametrize("letter", [b"F", b"A"])
def test_deeply_nested_table_is_refused_inward(letter: bytes) -> None:
    data = b""
    for _ in range(5000):
        key = b"\x01k" if letter == b"F" else b""
        data = key + letter + len(data).to_bytes(4, "big") + data
    if letter == b"A":
        data = b"\x01k" + data
    with pytest.raises(errors.MalformedValueError, match="nests deeper than 100"):
        values.decode_table(len(data).to_bytes(4, "big") + data, 0, "headers")


def test_allowed_depth_goes_both_ways() -> None:
    nested: dict[str, Any] = {}
    for _ in range(values.MAX_TABLE_DEPTH - 1):
        nested = {"k": nested}
    encoded = values.encode_table({"k": nested}, "headers")
    assert values.decode_table(encoded, 0, "headers")[0] == {"k": nested}


@pytest.mark.parametrize("name", ["q\udcff", "q" + chr(0xD800), b"\xff\xfe"])
def test_names_are_utf8(name: Any) -> None:
    """RabbitMQ ends the connection (501) for any other, except in what belongs to a message."""
    declare, bind = methods.BY_NAME["Queue.declare"], methods.BY_NAME["Queue.bind"]
    with pytest.raises(errors.ArgumentError, match=r"Queue.declare: queue cannot be sent as UTF-8"):
        values.encode_arguments(declare, (0, name, *[False] * 5, None))
    with pytest.raises(errors.ArgumentError, match=r"Queue.bind: routing_key cannot be sent as"):
        values.encode_arguments(bind, (0, "q", "e", name, False, None))


def test_a_password_that_is_no_text_is_not_shown() -> None:
    method = methods.BY_NAME["Connection.start_ok"]
    with pytest.raises(errors.ArgumentError, match="response cannot be sent as UTF-8") as caught:
        values.encode_arguments(method, ({}, "PLAIN", "sesame\ud800", "en_US"))
    assert "sesame" not in f"{caught.value!r} {caught.value.__cause__!r}"


@pytest.mark.parametrize("raw", [b"caf\xe9", b"\xed\xa0\x80"])
def test_foreign_text_survives_the_round_trip(raw: bytes) -> None:
    method = methods.BY_SIGNATURE[60, 60]
    payload = method.prefix + b"\x01t" + bytes(8) + b"\0" + b"\0" + bytes([len(raw)]) + raw
    routing_key = values.decode_arguments(method, payload)[4]
    assert values.encode_short_string(routing_key, "routing_key") == bytes([len(raw)]) + raw


def test_timestamps_come_as_naive_utc() -> None:
    moment = datetime(2020, 2, 3, 4, 5, 6)
    encoded = values.encode_table({"at": moment}, "headers")
    assert values.decode_table(encoded, 0, "headers")[0] == {"at": moment}


def test_timestamp_beyond_the_calendar_is_malformed() -> None:
    data = b"\x01kT" + b"\xff" * 8
    with pytest.raises(errors.MalformedValueError):
        values.decode_table(len(data).to_bytes(4, "big") + data, 0, "headers")


@pytest.mark.parametrize("name", errors.__all__)
def test_errors_pickle(name: str) -> None:
    error = getattr(errors, name)("what happened", (50, 10))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.method_sig == (50, 10)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (errors.BadFrameError, amqp.exceptions.FrameError),
        (errors.MalformedValueError, amqp.exceptions.FrameSyntaxError),
        (errors.UnexpectedFrameError, amqp.exceptions.UnexpectedFrame),
        (errors.LoginRefusedError, amqp.exceptions.AccessRefused),
        (errors.VirtualHostError, amqp.exceptions.NotAllowed),
        (errors.ConnectionLostError, amqp.exceptions.RecoverableConnectionError),
        (errors.MessageTooLarge, amqp.exceptions.ContentTooLarge),
    ],
)
def test_errors_are_caught_as_py_amqps(ours: type[Exception], theirs: type[Exception]) -> None:
    assert issubclass(ours, theirs)
