"""The utilities do what those of Kombu 5.7 do."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest

from tests.differential.reference import Raised, call_kombu, outcome

URLS = [
    "amqp://",
    "amqp://localhost//foo",
    "amqp://localhost/foo",
    "amqp://h:5672//",
    "amqp://h:5672/",
    "amqp://h///x",
    "amqp://u%40d:p%2Fw@h/v%2Fh",
    "redis://u:p@h:1/2",
    "redis://:p@h",
    "redis://?x=1",
    "amqp://h/v?visibility_timeout=5&a=b&a=c&empty=",
    "memory://",
    "sqla+sqlite:///f.db",
    "sqla+mysql://u:p@localhost/db",
    "amqp://[::1]:5672//v",
    "rediss://h/0?ssl_cert_reqs=CERT_NONE",
    "rediss://h/0?ssl_ca_certs=/a&ssl_keyfile=k&ssl_cert_reqs=optional",
    "mongodb://h1,h2/db?replicaSet=x",
    "AMQP://UPPER.Host/V",
    "sqs://AK:SE%2FC@",
    "amqp://u:p@h/v#frag",
    "amqp://a:b:c@h",
    "amqp://a@b@h/",
    "amqp://u+x:p+y@h/a+b?q=a+b%20c",
    "amqp://h:notaport/",
    "amqp://h:99999/",
]

Call = tuple[str, tuple[Any, ...], dict[str, Any]]

CALLS: list[Call] = [
    *(("utils.url:parse_url", (url,), {}) for url in URLS),
    *(("utils.url:url_to_parts", (url,), {}) for url in URLS),
    *(("utils.url:maybe_sanitize_url", (x,), {}) for x in ["redis://:p@h", "u:p@h", None, 5]),
    *(
        ("utils.url:as_url", args, kwargs)
        for args, kwargs in [
            (("amqp",), {}),
            (("amqp", "h"), {}),
            (("amqp", "h", 5672, "u@", "p/w", "/v"), {}),
            (("amqp", "h", 5672, "u", "p", "v"), {"sanitize": True}),
            (("amqp", "h", 5672, "u", "p", "v"), {"sanitize": True, "mask": "xx"}),
            (("amqp", "h", 5672, "u", None, "v"), {"sanitize": True}),
            (("amqp", "h", 5672, None, "p", "v"), {}),
            (("amqp", "h", 0, "", "", ""), {}),
            (("amqp", "h", 1, "é", "ü", "v"), {}),
        ]
    ),
    *(
        ("utils.functional:fxrange", args, {})
        for args in [(1, 3, 1), (1, 3, 1, True), (1, None, 0.5), (1, 0.5, 1), (0, 1, 0.3)]
    ),
    *(
        ("utils.functional:fxrangemax", args, {"max": top})
        for args, top in itertools.product([(1, None, 1), (1, 2, 1), (10, None, 1)], [5, 6, 7])
    ),
    ("utils.functional:fxrangemax", (), {}),
    *(("utils.functional:maybe_list", (x,), {}) for x in [None, "x", ("x",), [1], {"a": 1}, 5]),
    *(("utils.functional:is_list", (x,), {}) for x in [None, "x", ("x",), {1}, {"a": 1}, 5]),
    ("utils.functional:dictfilter", ({"a": 0, "b": None},), {"c": None, "e": 1}),
    ("utils.functional:reprcall", ("f", (1, "x"), {"a": 2}), {}),
    ("utils.functional:reprcall", ("f",), {}),
    ("utils.functional:reprkwargs", ({"a": 1, "b": "x"},), {"fmt": "{0}:{1}"}),
    ("utils.functional:accepts_argument", (len, "x"), {}),
    *(
        ("utils.text:version_string_as_tuple", (v,), {})
        for v in ["1", "1.2", "1.2.3", "1.2.3rc1", "1.2.3-rc1", "1.2.3.beta", "1.2.3.beta.4"]
    ),
    ("utils.text:escape_regex", ("a.b*[c]",), {}),
    ("utils.text:escape_regex", ("a.b#*",), {"white": "#*"}),
    ("utils.text:fmatch_best", ("ampq", ["amqp", "redis"]), {}),
    ("utils.text:fmatch_iter", ("amq", ["amqp", "redis", "amq"]), {"min_ratio": 0.1}),
    *(("utils.time:maybe_s_to_ms", (x,), {}) for x in [None, 1, 1.5, 0, 0.0019, -1]),
    *(
        (f"utils.encoding:{name}", (x,), {})
        for name, x in itertools.product(
            ["safe_str", "safe_repr", "bytes_to_str", "str_to_bytes", "ensure_bytes", "from_utf8"],
            ["é", b"\xff\xfe", 5, None],
        )
    ),
    *(
        ("utils.imports:symbol_by_name", args, kwargs)
        for args, kwargs in [
            (("os.path.join",), {}),
            (("os.path:join",), {}),
            (("al", {"al": "os.path:join"}), {}),
            (("os.nope",), {"default": 5}),
            (("nopkg.x",), {"default": 6}),
            (("os.nope",), {}),
            (("nopkg.x",), {}),
            (("",), {}),
            ((".path:join",), {"package": "os"}),
            ((int,), {}),
            ((None,), {}),
        ]
    ),
    ("utils.compat:maybe_fileno", (5,), {}),
    ("utils.compat:maybe_fileno", ("x",), {}),
    ("log:get_loglevel", ("INFO",), {}),
    ("log:get_loglevel", ("nope",), {}),
]


@pytest.fixture(scope="module")
def kombus() -> list[Any]:
    return call_kombu([(f"kombu.{path}", args, kwargs) for path, args, kwargs in CALLS])


def ids(call: Call) -> str:
    return f"{call[0].partition(':')[2]}{call[1]!r:.40}"


@pytest.mark.parametrize("index", range(len(CALLS)), ids=[ids(call) for call in CALLS])
def test_same_result_as_kombu(index: int, kombus: list[Any]) -> None:
    path, args, kwargs = CALLS[index]
    module, _, name = path.partition(":")
    mine = outcome(getattr(importlib.import_module(f"greenkombu.{module}"), name), *args, **kwargs)
    if hasattr(mine, "__next__"):
        mine = list(itertools.islice(mine, 50))
    theirs = kombus[index]
    if isinstance(theirs, Raised):
        assert theirs.kinds[0] in mine.kinds
    else:
        assert mine == theirs
