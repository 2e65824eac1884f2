"""greenkombu.serialization (behaviours 73, 85, 199-204; scenarios S27, S28, S31)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu import serialization
from greenkombu.exceptions import (
    BodyTooLarge,
    ContentDisallowed,
    DecodeError,
    EncodeError,
    NestingTooDeep,
    SerializerNotInstalled,
)
from greenkombu.serialization import (
    SerializerRegistry,
    disable_insecure_serializers,
    dumps,
    enable_insecure_serializers,
    loads,
    prepare_accept_content,
    raw_encode,
    register,
    registry,
    unregister,
)

PICKLE = "application/x-python-serialize"
YAML = "application/x-yaml"
MSGPACK = "application/x-msgpack"
JSON = "application/json"

DATA = {"a": [1, 2.5, "é", None, True], "b": {"c": "d"}}


@pytest.fixture(autouse=True)
def _keep_registry() -> Iterator[None]:
    saved = {
        name: value.copy() if hasattr(value, "copy") else value
        for name, value in vars(registry).items()
    }
    yield
    vars(registry).update(saved)


# -- encoding ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"a": 1}, (JSON, "utf-8", '{"a": 1}')),
        (None, (JSON, "utf-8", "null")),
        ([1], (JSON, "utf-8", "[1]")),
        (1.5, (JSON, "utf-8", "1.5")),
        ("é", ("text/plain", "utf-8", b"\xc3\xa9")),
        ("", ("text/plain", "utf-8", b"")),
        (b"\xff", ("application/data", "binary", b"\xff")),
    ],
)
def test_b199_b085_encode_defaults(data: Any, expected: tuple[str, str, Any]) -> None:
    assert dumps(data) == serialization.encode(data) == expected


def test_b199_a_named_serializer_takes_text_too() -> None:
    assert dumps("abc", serializer="json") == (JSON, "utf-8", '"abc"')
    assert dumps("abc", serializer="msgpack") == (MSGPACK, "binary", b"\xa3abc")
    assert dumps("abc", serializer="yaml") == (YAML, "utf-8", "abc\n...\n")
    kind, encoding, body = dumps("abc", serializer="pickle")
    assert (kind, encoding, pickle.loads(body)) == (PICKLE, "binary", "abc")


def test_raw_sends_text_and_bytes_as_they_are() -> None:
    assert dumps("é", "raw") == raw_encode("é") == ("application/data", "utf-8", b"\xc3\xa9")
    assert raw_encode(b"\xff") == ("application/data", "binary", b"\xff")
    assert raw_encode(bytearray(b"x")) == raw_encode(memoryview(b"x")) == raw_encode(b"x")
    with pytest.raises(EncodeError, match="not dict"):
        raw_encode({"a": 1})


@pytest.mark.parametrize("name", ["nosuch", JSON, "text", b"json"])
def test_b200_unknown_serializer(name: Any) -> None:
    with pytest.raises(SerializerNotInstalled, match="json, pickle, yaml, msgpack"):
        dumps({"a": 1}, serializer=name)


class Unserializable:
    def __reduce__(self) -> Any:
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize("name", ["json", "pickle", "yaml", "msgpack", None])
def test_a_body_that_cannot_be_encoded_is_a_typed_error(name: str | None) -> None:
    with pytest.raises(EncodeError, match=name or "json") as caught:
        dumps({"a": Unserializable()}, serializer=name)
    assert caught.value.__cause__ is not None


def test_text_that_is_no_unicode_is_a_typed_error() -> None:
    for name in (None, "raw"):
        with pytest.raises(EncodeError, match="UTF-8"):
            dumps("\ud800", serializer=name)


def test_set_default_serializer() -> None:
    registry._set_default_serializer("msgpack")
    assert dumps({"a": 1}) == (MSGPACK, "binary", b"\x81\xa1a\x01")
    assert dumps("a")[0] == "text/plain"
    with pytest.raises(SerializerNotInstalled):
        registry._set_default_serializer("nosuch")
    assert registry._encoders["json"].content_type == JSON


def test_an_empty_registry_says_what_is_missing() -> None:
    with pytest.raises(SerializerNotInstalled, match="_set_default_serializer"):
        SerializerRegistry().dumps({"a": 1})
    assert SerializerRegistry().dumps("a") == ("text/plain", "utf-8", b"a")


def test_errors_that_are_no_exceptions_pass_through() -> None:
    class Killed(BaseException):
        """As a green thread's kill and Timeout are."""

    def encoder(data: Any) -> str:
        raise Killed

    register("killed", encoder, None, "application/x-killed")
    with pytest.raises(Killed):
        dumps(1, serializer="killed")


# -- decoding ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["json", "pickle", "yaml", "msgpack"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_was_encoded_comes_back(name: str, kind: Callable[[bytes], Any]) -> None:
    content_type, encoding, body = dumps(DATA, serializer=name)
    body = body.encode() if isinstance(body, str) else body
    assert loads(kind(body), content_type, encoding, accept={content_type}) == DATA


@pytest.mark.parametrize(
    ("data", "content_type", "encoding", "expected"),
    [
        (b'{"a":1}', JSON, "utf-8", {"a": 1}),
        ('{"a":1}', JSON, "utf-8", {"a": 1}),
        (b'{"a":1}', JSON, "binary", {"a": 1}),
        (b'{"a":1}', JSON.encode(), "utf-8", {"a": 1}),
        (b"\xe9", "text/plain", "latin-1", "é"),
        (b"ab", "text/plain", "BINARY", b"ab"),
        (b"", "text/plain", "utf-8", ""),
        (memoryview(b"ab"), "text/plain", "us-ascii", "ab"),
        (b"\xff", "application/data", "binary", b"\xff"),
        (b"ab", None, None, "ab"),
        (b"ab", "unknown/type", "utf-8", "ab"),
        (b"ab", "unknown/type", "binary", b"ab"),
        (None, JSON, "utf-8", None),
        ("already text", "text/plain", "utf-8", "already text"),
        (0, "text/plain", "utf-8", 0),
    ],
)
def test_loads(data: Any, content_type: Any, encoding: Any, expected: Any) -> None:
    assert loads(data, content_type, encoding) == expected


@pytest.mark.parametrize(
    ("data", "content_type", "encoding"),
    [
        (b"{", JSON, "utf-8"),
        (b'{"a": 1', JSON, "utf-8"),
        (b"", JSON, "utf-8"),
        ("", JSON, "utf-8"),
        (b"\xff", JSON, "utf-8"),
        (5, JSON, "utf-8"),
        (b'{"__type__": "nosuch", "__value__": 1}', JSON, "utf-8"),
        (b'{"__type__": "datetime", "__value__": 5}', JSON, "utf-8"),
        (b"garbage", PICKLE, "binary"),
        (b"", PICKLE, "binary"),
        (b"\xc1", MSGPACK, "binary"),
        (b"", MSGPACK, "binary"),
        (b"\xdd\xff\xff\xff\xff", MSGPACK, "binary"),
        (b"a: [", YAML, "utf-8"),
        (b"!!python/object/apply:os.getcwd []", YAML, "utf-8"),
        (b"\xff", "text/plain", "utf-8"),
        (b"ab", "text/plain", "no-such-codec"),
    ],
)
def test_b096_s27_a_body_that_is_not_what_it_says_is_a_typed_error(
    data: Any, content_type: str, encoding: str
) -> None:
    with pytest.raises(DecodeError, match=content_type) as caught:
        loads(data, content_type, encoding, force=True)
    assert caught.value.__cause__ is not None


def test_s31_a_body_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serialization, "max_body_bytes", 10)
    assert loads(b"[1, 2, 33]", JSON, "utf-8") == [1, 2, 33]
    for body in (b"[1, 2, 333]", "[1, 2, 333]", memoryview(b"[1, 2, 333]")):
        with pytest.raises(BodyTooLarge, match="11 bytes is above the limit of 10") as caught:
            loads(body, JSON, "utf-8")
        assert isinstance(caught.value, DecodeError)
    monkeypatch.setattr(serialization, "max_body_bytes", None)
    assert loads(b"[1, 2, 333]", JSON, "utf-8") == [1, 2, 333]


def nested_list(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


DEEP = 100_000


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        (JSON, b"[" * DEEP + b"]" * DEEP),
        (JSON, b'{"a":' * DEEP + b"1" + b"}" * DEEP),
        (MSGPACK, b"\x91" * DEEP + b"\x01"),
        (YAML, b"[" * DEEP),
    ],
)
def test_s31_deep_nesting_is_a_typed_error_when_decoding(content_type: str, body: bytes) -> None:
    with pytest.raises(NestingTooDeep, match=content_type) as caught:
        loads(body, content_type, "utf-8", force=True)
    assert isinstance(caught.value, DecodeError)


@pytest.mark.parametrize("name", ["json", "pickle", "yaml", "msgpack"])
def test_s31_deep_nesting_is_a_typed_error_when_encoding(name: str) -> None:
    with pytest.raises(NestingTooDeep, match=name) as caught:
        dumps(nested_list(DEEP), serializer=name)
    assert isinstance(caught.value, EncodeError)


def test_data_that_contains_itself_is_a_typed_error() -> None:
    circle: dict[str, Any] = {}
    circle["self"] = circle
    with pytest.raises(NestingTooDeep, match="contains itself"):
        dumps(circle)


# -- what is accepted (S28) --------------------------------------------------------------


@pytest.mark.parametrize("content_type", [PICKLE, YAML, MSGPACK])
def test_s28_insecure_content_is_refused_by_default(content_type: str) -> None:
    with pytest.raises(ContentDisallowed, match=f"{content_type}.*disabled"):
        loads(b"never looked at", content_type, "binary")


class Bomb:
    """Its pickle calls print() when it is loaded."""

    def __reduce__(self) -> Any:
        return print, ("loaded!",)


def test_s28_a_pickle_from_a_stranger_is_never_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    body = pickle.dumps(Bomb())
    for accept in (None, [], [JSON], {"application/text"}):
        with pytest.raises(ContentDisallowed):
            loads(body, PICKLE, "binary", accept=accept)
    assert loads(body, "application/x-python-serialize; x", "binary") == body
    assert "loaded" not in capsys.readouterr().out


def test_an_accepted_type_is_decoded_although_disabled() -> None:
    assert loads(pickle.dumps(5), PICKLE, "binary", accept=[PICKLE]) == 5


@pytest.mark.parametrize("content_type", [JSON, "text/plain", "unknown/type"])
def test_what_is_not_on_the_list_is_refused(content_type: str) -> None:
    with pytest.raises(ContentDisallowed, match="not on the list"):
        loads(b"1", content_type, "utf-8", accept=[YAML])
    with pytest.raises(ContentDisallowed):
        loads(b"1", content_type, "utf-8", accept=[YAML], force=True)


def test_the_refusal_tells_what_is_accepted_and_how_to_accept_more() -> None:
    with pytest.raises(ContentDisallowed) as caught:
        loads(b"1", YAML, "utf-8", accept={JSON})
    assert f"Accepted are application/data, {JSON}, application/text." in str(caught.value)
    assert "accept=['yaml', ...]" in str(caught.value)
    with pytest.raises(ContentDisallowed) as caught:
        loads(b"1", PICKLE, "binary")
    assert JSON in str(caught.value)
    assert YAML not in str(caught.value)


@pytest.mark.parametrize("content_type", ["application/data", "application/text", None])
def test_plain_bytes_and_text_are_always_accepted(content_type: str | None) -> None:
    assert loads(b"x", content_type, "binary", accept=[]) == b"x"
    with pytest.raises(ContentDisallowed):
        loads(b"x", content_type, "binary", accept=[], _trusted_content=frozenset())


@pytest.mark.parametrize("name", ["json", JSON])
def test_b202_disable_and_enable(name: str) -> None:
    registry.disable(name)
    with pytest.raises(ContentDisallowed):
        loads(b"1", JSON, "utf-8")
    assert loads(b"1", JSON, "utf-8", force=True) == 1
    assert serialization.decode(b"1", JSON, "utf-8", True) == 1
    assert loads(b"1", JSON, "utf-8", accept=[JSON]) == 1
    registry.enable(name)
    assert loads(b"1", JSON, "utf-8") == 1


@pytest.mark.parametrize("call", [registry.disable, registry.enable])
def test_b202_an_unknown_name_is_an_error_in_both_families(call: Callable[[str], None]) -> None:
    with pytest.raises(KeyError):
        call("nosuch")
    with pytest.raises(SerializerNotInstalled, match="'nosuch'"):
        call("nosuch")
    call("unknown/type")


def test_enable_insecure_serializers() -> None:
    disabled = registry._disabled_content_types
    enable_insecure_serializers(["pickle", "nosuch"])
    assert disabled == {YAML, MSGPACK}
    enable_insecure_serializers(None)
    assert disabled == {YAML, MSGPACK}
    enable_insecure_serializers()
    assert disabled == set()


def test_disable_insecure_serializers() -> None:
    disabled = registry._disabled_content_types
    enable_insecure_serializers()
    disable_insecure_serializers()
    assert disabled == {PICKLE, YAML, MSGPACK}
    disable_insecure_serializers(["pickle"])
    assert disabled == {JSON, YAML, MSGPACK}
    disable_insecure_serializers(None)
    assert disabled == {JSON, YAML, MSGPACK, PICKLE}


def test_prepare_accept_content() -> None:
    assert prepare_accept_content(None) is None
    assert prepare_accept_content([]) == set()
    assert prepare_accept_content(("json", PICKLE, "unknown/type")) == {
        *(JSON, PICKLE, "unknown/type")
    }
    assert prepare_accept_content("json") == {JSON}
    assert prepare_accept_content(["x"], {"x": "y/z"}) == {"y/z"}
    with pytest.raises(SerializerNotInstalled, match="'nosuch'"):
        prepare_accept_content(["json", "nosuch"])


# -- the registry ------------------------------------------------------------------------


def test_b201_encoder_only() -> None:
    register("up", lambda data: data.upper(), None, "application/x-up")
    assert dumps("abc", "up") == ("application/x-up", "utf-8", "ABC")
    assert loads(b"ABC", "application/x-up", "utf-8") == "ABC"


def test_b201_decoder_only() -> None:
    register("low", None, lambda data: data.lower(), "application/x-low", "binary")
    assert loads(b"ABC", "application/x-low", "binary") == b"abc"
    with pytest.raises(SerializerNotInstalled):
        dumps("abc", "low")


def test_b203_type_to_name_and_name_to_type() -> None:
    assert registry.type_to_name[JSON] == "json"
    assert registry.name_to_type["pickle"] == PICKLE
    register("up", str.upper, str.lower, "application/x-up")
    assert registry.type_to_name["application/x-up"] == "up"
    assert registry.name_to_type["up"] == "application/x-up"


def test_b201_unregister_removes_both() -> None:
    register("up", str.upper, lambda data: "decoded", "application/x-up")
    unregister("up")
    with pytest.raises(SerializerNotInstalled):
        dumps("abc", "up")
    assert loads(b"abc", "application/x-up", "utf-8") == "abc"
    assert "application/x-up" not in registry.type_to_name
    with pytest.raises(SerializerNotInstalled):
        unregister("up")


def test_unregistered_content_stays_disabled() -> None:
    unregister("yaml")
    with pytest.raises(ContentDisallowed):
        loads(b"a: 1", YAML, "utf-8")


def test_pickle_helpers() -> None:
    body = pickle.dumps({"a": 1})
    assert serialization.pickle_loads(memoryview(body)) == {"a": 1}
    assert serialization.unpickle(body) == {"a": 1}
    assert serialization.pickle is pickle


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env={**__import__("os").environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_pickle_protocol_from_the_environment() -> None:
    script = (
        "from greenkombu.serialization import dumps, pickle_protocol\n"
        "print(pickle_protocol, dumps(1, 'pickle')[2][:2])"
    )
    assert run(script, PICKLE_PROTOCOL="2") == "2 b'\\x80\\x02'\n"


def test_b200_optional_packages_are_named_when_missing() -> None:
    script = (
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: (\n"
        "    None if name in ('yaml', 'msgpack') else find(name, *a))\n"
        "from greenkombu import serialization as s\n"
        "for name in ('yaml', 'msgpack'):\n"
        "    try: s.dumps(1, name)\n"
        "    except s.SerializerNotInstalled as exc: print(exc)\n"
        "    try: s.loads(b'1', 'application/x-' + name, 'utf-8', force=True)\n"
        "    except s.SerializerNotInstalled as exc: print(exc)\n"
    )
    output = run(script)
    assert output.count("greenkombu[yaml]") == output.count("greenkombu[msgpack]") == 2


def test_importing_imports_no_optional_package() -> None:
    script = (
        "import sys, greenkombu.serialization, greenkombu.compression\n"
        "print({'yaml', 'msgpack', 'brotli', 'zstandard', 'socket', 'ssl', 'threading',\n"
        "       'importlib.metadata'} & set(sys.modules))"
    )
    assert run(script) == "set()\n"


@pytest.fixture
def entry_points(tmp_path: Path) -> str:
    """A folder with an installed distribution that brings serializers."""
    info = tmp_path / "shouting-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kombu.serializers]\nshout = shouting:args\nbroken = shouting:missing\n"
        "[greenkombu.serializers]\nwhisper = shouting:quiet\njson = shouting:quiet\n"
    )
    (tmp_path / "shouting.py").write_text(
        "args = (str.upper, lambda b: bytes(b).decode().lower(), 'application/x-shout', 'utf-8')\n"
        "quiet = (str.lower, None, 'application/x-whisper')\n"
    )
    return str(tmp_path)


def test_serializers_of_other_packages_are_found(entry_points: str) -> None:
    script = (
        "from greenkombu import serialization as s\n"
        "s.loads(b'[1]', 'application/json', 'utf-8')\n"
        "assert not s._entry_points_loaded\n"
        "print(s.dumps('abc', 'shout'), s.dumps('ABC', 'whisper'))\n"
        "print(s.loads(b'ABC', 'application/x-shout', 'utf-8'), s.dumps([1], 'json'))\n"
    )
    output = run(script, PYTHONPATH=entry_points)
    assert "('application/x-shout', 'utf-8', 'ABC') ('application/x-whisper', 'utf-8', 'abc')" in (
        output
    )
    assert "abc ('application/json', 'utf-8', '[1]')" in output
    assert "cannot load the serializer 'broken'" in output


@pytest.mark.parametrize(
    "call",
    [
        "print(s.loads(b'ABC', 'application/x-shout', 'utf-8'))",
        "print(s.loads(b'ABC', *[*s.prepare_accept_content(['shout'])], 'utf-8'))",
    ],
)
def test_they_are_found_by_content_type_and_by_accept_lists(entry_points: str, call: str) -> None:
    script = f"from greenkombu import serialization as s\n{call}\n"
    assert run(script, PYTHONPATH=entry_points).startswith("abc\n")


def test_disabling_reaches_serializers_that_were_not_loaded_yet(entry_points: str) -> None:
    script = (
        "from greenkombu import serialization as s\n"
        "s.disable_insecure_serializers()\n"
        "try: s.loads(b'ABC', 'application/x-shout', 'utf-8')\n"
        "except s.ContentDisallowed: print('refused')\n"
    )
    assert run(script, PYTHONPATH=entry_points).startswith("refused\n")
