"""Broker URLs (behaviours 1-9) and their masking."""

from __future__ import annotations

import ssl
import traceback
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greenkombu.exceptions import InvalidURL
from greenkombu.utils.url import (
    _parse_url,
    as_url,
    maybe_sanitize_url,
    parse_ssl_cert_reqs,
    parse_url,
    sanitize_url,
    url_to_parts,
    urlparse,
)

NOTHING = dict.fromkeys(["hostname", "port", "userid", "password", "virtual_host"])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param(
            "redis://u:p@h:1/2",
            {
                "transport": "redis",
                "userid": "u",
                "password": "p",
                "hostname": "h",
                "port": 1,
                "virtual_host": "2",
            },
            id="b001-all-six",
        ),
        pytest.param("amqp://", {"transport": "amqp"}, id="b002-transport-alone"),
        pytest.param(
            "amqp://localhost//foo",
            {"transport": "amqp", "hostname": "localhost", "virtual_host": "/foo"},
            id="b003-slash-foo",
        ),
        pytest.param(
            "amqp://localhost/foo",
            {"transport": "amqp", "hostname": "localhost", "virtual_host": "foo"},
            id="b003-foo",
        ),
        pytest.param(
            "amqp://h:5672//",
            {"transport": "amqp", "hostname": "h", "port": 5672, "virtual_host": "/"},
            id="b004-slash",
        ),
        pytest.param(
            "amqp://h:5672/", {"transport": "amqp", "hostname": "h", "port": 5672}, id="b004-none"
        ),
        pytest.param(
            "amqp://h///x",
            {"transport": "amqp", "hostname": "h", "virtual_host": "//x"},
            id="b005-only-the-first-slash",
        ),
        pytest.param(
            "amqp://u%40d:p%2Fw@h/v%2Fh",
            {
                "transport": "amqp",
                "userid": "u@d",
                "password": "p/w",
                "hostname": "h",
                "virtual_host": "v/h",
            },
            id="b006-escapes",
        ),
        pytest.param(
            "amqp://h/v?ssl=1&visibility_timeout=5",
            {
                "transport": "amqp",
                "hostname": "h",
                "virtual_host": "v",
                "ssl": True,
                "visibility_timeout": "5",
            },
            id="b009-options",
        ),
        pytest.param("amqp://?ssl=no", {"transport": "amqp", "ssl": False}, id="b009-no-tls"),
        pytest.param(
            "rediss://h/0?ssl_cert_reqs=required&ssl_ca_certs=/a",
            {
                "transport": "rediss",
                "hostname": "h",
                "virtual_host": "0",
                "ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": "/a"},
            },
            id="tls-options",
        ),
        pytest.param(
            "amqp://[::1]:5672//v",
            {"transport": "amqp", "hostname": "::1", "port": 5672, "virtual_host": "/v"},
            id="ipv6",
        ),
        pytest.param(
            "sqla+mysql://u:p@localhost/db",
            {
                "transport": "sqla+mysql",
                "userid": "u",
                "password": "p",
                "hostname": "localhost",
                "virtual_host": "db",
            },
            id="plus-in-the-scheme",
        ),
        pytest.param(
            "mongodb://h1,h2/db?replicaSet=x",
            {
                "transport": "mongodb",
                "hostname": "h1,h2",
                "virtual_host": "db",
                "replicaSet": "x",
            },
            id="several-hosts",
        ),
        pytest.param(
            "redis://:p@h",
            {"transport": "redis", "password": "p", "hostname": "h"},
            id="password-alone",
        ),
        pytest.param(
            "redis://h?virtual_host=3&password=no&hostname=evil",
            {"transport": "redis", "hostname": "h", "virtual_host": "3", "password": "no"},
            id="options-fill-gaps-only",
        ),
    ],
)
def test_parse_url(url: str, expected: dict[str, Any]) -> None:
    assert parse_url(url) == {**NOTHING, **expected}


def test_b004_the_two_virtual_hosts_differ() -> None:
    slash, none = parse_url("amqp://h:5672//"), parse_url("amqp://h:5672/")
    assert slash["virtual_host"] == "/"
    assert not none["virtual_host"]


def test_url_to_parts_is_a_named_tuple_in_kombus_order() -> None:
    scheme, hostname, port, username, password, path, query = url_to_parts("a://u:p@h:1/v?x=y+z")
    assert (scheme, hostname, port, username, password, path) == ("a", "h", 1, "u", "p", "v")
    assert query == {"x": "y z"}
    assert url_to_parts("a://h").hostname == "h"
    assert _parse_url is url_to_parts
    assert urlparse("a://h").scheme == "a"


text = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12)


@given(
    user=st.none() | text,
    password=st.none() | text,
    path=st.none() | text,
    port=st.none() | st.integers(1, 65535),
    host=st.sampled_from(["h", "h.example", "127.0.0.1", "::1", "fe80::1"]),
    query=st.dictionaries(text, text, max_size=2),
)
def test_b007_any_url_that_is_built_can_be_parsed_again(
    user: str | None,
    password: str | None,
    path: str | None,
    port: int | None,
    host: str,
    query: dict[str, str],
) -> None:
    url = as_url("amqp", host, port, user, password, path, query)
    assert ";" not in url  # else it would look like two brokers
    assert url_to_parts(url) == ("amqp", host, port, user, password, path, query)


@pytest.mark.parametrize(
    ("arguments", "url"),
    [
        (("amqp",), "amqp:///"),
        (("amqp", "h"), "amqp://h/"),
        (("amqp", "h", 5672, "u@", "p/w", "/v"), "amqp://u%40:p%2Fw@h:5672//v"),
        (("amqp", "h", 5672, None, "p", "v"), "amqp://:p@h:5672/v"),
        (("amqp", "::1", 5672, None, None, "v"), "amqp://[::1]:5672/v"),
        (("amqp", "h", 0, "", "", ""), "amqp://h/"),
        (("amqp", None, None, "u", "p"), "amqp://u:p@/"),
    ],
)
def test_as_url(arguments: tuple[Any, ...], url: str) -> None:
    assert as_url(*arguments) == url


def test_b008_the_password_is_masked() -> None:
    assert as_url("amqp", "h", 1, "u", "secret", "v", sanitize=True) == "amqp://u:**@h:1/v"
    assert as_url("amqp", "h", 1, "u", "p", "v", sanitize=True, mask="##") == "amqp://u:##@h:1/v"
    assert as_url("amqp", "h", 1, "u", None, "v", sanitize=True) == "amqp://u@h:1/v"
    assert as_url("amqp", "h", query={"token": "secret"}, sanitize=True) == "amqp://h/"
    assert sanitize_url("redis://:secret@h/1?password=secret") == "redis://:**@h/1"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://u:secret@h", "amqp://u:**@h/"),
        ("amqp://u:secret@h;amqp://v:secret@i//", "amqp://u:**@h/;amqp://v:**@i//"),
        ("amqp://h;redis://:secret@i", "amqp://h/;redis://:**@i/"),
        ("amqp://u:se?cret@h/v", "amqp://**@h/v"),
        ("amqp://u:se#cret@h/v", "amqp://**@h/v"),
        ("amqp://u:12/secret@h/v", "amqp://**@h/v"),
        ("amqp://u:s@cret/secret@h/v", "amqp://**@h/v"),
        ("amqp://u:secret@h:port/v", "amqp://**@h:port/v"),
        ("amqp://h:port/", "amqp://h:port/"),
        ("u:p@h", "u:p@h"),
        ("no url at all", "no url at all"),
        (None, None),
        (5, 5),
    ],
)
def test_maybe_sanitize_url_masks_what_it_can_and_never_raises(url: Any, shown: Any) -> None:
    assert maybe_sanitize_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "localhost",
        "",
        "amqp://u:secret@h:notaport/",
        "amqp://u:secret@h:99999/",
        "amqp://u:secret?x@h/v",
        "amqp://u:secret@[::1/v",
        "rediss://u:secret@h?ssl_cert_reqs=maybe",
        None,
        "amqp://us#er:secret@host",
        "amqp://user:12#secret@host//",
    ],
)
def test_a_wrong_url_is_a_typed_error_without_the_password(url: Any) -> None:
    with pytest.raises(InvalidURL) as caught:
        parse_url(url)
    assert isinstance(caught.value, ValueError)
    # Neither in the text nor in an error that it came from.
    report = "".join(traceback.format_exception_only(caught.type, caught.value))
    assert "secret" not in report
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("CERT_NONE", ssl.CERT_NONE),
        ("none", ssl.CERT_NONE),
        ("optional", ssl.CERT_OPTIONAL),
        ("CERT_OPTIONAL", ssl.CERT_OPTIONAL),
        ("required", ssl.CERT_REQUIRED),
        ("CERT_REQUIRED", ssl.CERT_REQUIRED),
    ],
)
def test_parse_ssl_cert_reqs(word: str, mode: ssl.VerifyMode) -> None:
    assert parse_ssl_cert_reqs(word) is mode


def test_parse_ssl_cert_reqs_refuses_other_words() -> None:
    with pytest.raises(KeyError):
        parse_ssl_cert_reqs("maybe")
