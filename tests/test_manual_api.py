"""The API that Kombu's manual documents, counted.

``data/manual_api.json`` lists every module, name, parameter and default of the manual.  One point
is counted for each of them, as the manual says it or, for the few defaults of
``data/manual_api_modern.json``, as Kombu 5.7 has it.  What a module lacks is printed by name.

`DELIVERED` modules have to be complete.  `LATER` names the rest, with the work that brings it; a
module there that is complete makes the test fail, until it is moved.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import greenkombu
from greenkombu import Connection

DATA = Path(__file__).parent / "data"
INVENTORY: dict[str, Any] = json.loads((DATA / "manual_api.json").read_text())["modules"]
TOTAL: int = json.loads((DATA / "manual_api.json").read_text())["counts"]["total"]
MODERN: dict[str, str] = json.loads((DATA / "manual_api_modern.json").read_text())

DELIVERED = [
    "kombu",
    "kombu.abstract",
    "kombu.clocks",
    "kombu.common",
    "kombu.compat",
    "kombu.compression",
    "kombu.connection",
    "kombu.entity",
    "kombu.exceptions",
    "kombu.log",
    "kombu.messaging",
    "kombu.mixins",
    "kombu.pidbox",
    "kombu.pools",
    "kombu.serialization",
    "kombu.simple",
    "kombu.syn",
    "kombu.transport",
    "kombu.transport.amqplib",
    "kombu.transport.base",
    "kombu.transport.memory",
    "kombu.transport.pika",
    "kombu.transport.pyamqplib",
    "kombu.transport.redis",
    "kombu.transport.virtual",
    "kombu.transport.virtual.exchange",
    "kombu.transport.virtual.scheduling",
    "kombu.utils",
    "kombu.utils.compat",
    "kombu.utils.debug",
    "kombu.utils.encoding",
    "kombu.utils.eventio",
    "kombu.utils.finalize",
    "kombu.utils.functional",
    "kombu.utils.limits",
    "kombu.utils.url",
    "env",
]

STORES = "after issue 6: the other stores"

#: Modules that do not exist yet.
LATER = {
    "kombu.transport.SQS": STORES,
    "kombu.transport.beanstalk": STORES,
    "kombu.transport.couchdb": STORES,
    "kombu.transport.django": STORES,
    "kombu.transport.django.managers": STORES,
    "kombu.transport.django.management.commands.clean_kombu_messages": STORES,
    "kombu.transport.django.migrations": STORES,
    "kombu.transport.django.models": STORES,
    "kombu.transport.mongodb": STORES,
    "kombu.transport.sqlalchemy": STORES,
}

#: What delivered modules say of transports that do not exist yet.
LATER_NAMES = {
    **{
        ("kombu.transport", name): STORES
        for name in (
            *("mongodb", "beanstalk", "SQS", "sqs", "couchdb", "django", "sqlalchemy", "sqla"),
            *(
                f"ghettoq.taproot.{name}"
                for name in ("Database", "MongoDB", "Beanstalk", "CouchDB")
            ),
        )
    },
    ("env", "AWS_ACCESS_KEY_ID"): STORES,
    ("env", "AWS_SECRET_ACCESS_KEY"): STORES,
    ("env", "KOMBU_POLLING_INTERVAL"): STORES,
    ("env", "queue_name_prefix"): STORES,
    ("env", "region"): STORES,
}

#: Parameters that Kombu 5 renamed in their place.
RENAMED = {
    ("kombu.utils:maybe_list", "v"): "obj",
    ("kombu.transport.virtual:Channel.prepare_message", "message_data"): "body",
}

#: Options that the manual documents as keywords of **kwargs: (callable, keyword) -> the call.
THROUGH_KWARGS: dict[str, Callable[[str, Any], Any]] = {
    "Exchange": lambda name, value: getattr(greenkombu.Exchange("e", **{name: value}), name),
    "Queue": lambda name, value: getattr(greenkombu.Queue("q", **{name: value}), name),
}

ABSENT = object()


def ours(module: str) -> str:
    return f"greenkombu{module.removeprefix('kombu')}"


def make(module: str, name: str, connection: Connection) -> Any:
    """Make an instance of a class some of whose attributes only instances have."""
    cls = getattr(importlib.import_module(ours(module)), name)
    channel = connection.default_channel
    raw = {"body": "", "headers": {}, "properties": {"delivery_tag": "1", "delivery_info": {}}}
    made: dict[tuple[str, str], Callable[[], Any]] = {
        ("kombu.connection", "BrokerConnection"): lambda: connection,
        ("kombu.connection", "Connection"): lambda: connection,
        ("kombu.connection", "ConnectionPool"): lambda: cls(connection, 2),
        ("kombu.connection", "ChannelPool"): lambda: cls(connection, 2),
        ("kombu.simple", "SimpleQueue"): lambda: cls(connection, "manual-queue"),
        ("kombu.simple", "SimpleBuffer"): lambda: cls(connection, "manual-buffer"),
        ("kombu.messaging", "Consumer"): lambda: cls(channel, []),
        ("kombu.messaging", "Producer"): lambda: cls(channel),
        ("kombu.entity", "Exchange"): lambda: cls("manual"),
        ("kombu.entity", "Queue"): lambda: cls("manual"),
        ("kombu.mixins", "ConsumerMixin"): lambda: type("C", (cls,), {"connection": connection})(),
        ("kombu.compat", "Publisher"): lambda: cls(connection, exchange="manual"),
        ("kombu.compat", "Consumer"): lambda: cls(connection, queue="manual", exchange="manual"),
        ("kombu.compat", "ConsumerSet"): lambda: cls(connection),
        ("kombu.pidbox", "Mailbox"): lambda: cls("manual")(connection),
        ("kombu.pidbox", "Node"): lambda: (
            importlib.import_module("greenkombu.pidbox")
            .Mailbox("manual")(connection)
            .Node("host", channel=channel)
        ),
        ("kombu.transport.virtual", "Channel"): connection.channel,
        ("kombu.transport.memory", "Channel"): connection.channel,
        ("kombu.transport.virtual", "Transport"): lambda: connection.transport,
        ("kombu.transport.memory", "Transport"): lambda: connection.transport,
        ("kombu.transport.base", "Message"): lambda: cls(body="x", channel=channel),
        ("kombu.transport.virtual", "Message"): lambda: cls(raw, channel),
        ("kombu.transport.virtual", "QoS"): lambda: connection.channel().qos,
        ("kombu.pools", "ProducerPool"): lambda: cls(
            greenkombu.pools.Connections(limit=1)[connection], limit=1
        ),
        ("kombu.utils.limits", "TokenBucket"): lambda: cls(10),
    }
    if (module, name) in made:
        return made[module, name]()
    if module == "kombu.pools":
        return cls(limit=2)
    return cls(connection) if name == "Transport" else cls()


def static(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        return ABSENT
    except Exception:
        # A property that needs a broker, or an open channel: it exists.
        return inspect.getattr_static(owner, name, ABSENT)


def find(module: str, name: str, connection: Connection) -> Any:
    """Return what a dotted name of a module stands for; of an instance where the class lacks it."""
    found: Any = importlib.import_module(ours(module))
    for depth, part in enumerate(name.split(".")):
        value = static(found, part)
        if value is ABSENT and depth == 1 and inspect.isclass(found):
            value = static(make(module, name.split(".")[0], connection), part)
        if value is ABSENT:
            return ABSENT
        found = value
    return found


def value_of(module: str, name: str, found: Any, connection: Connection) -> Any:
    """Return an attribute's value: that of an instance where the class has a descriptor."""
    if inspect.isdatadescriptor(found) or type(found).__name__ == "cached_property":
        owner, _, attribute = name.partition(".")
        return getattr(make(module, owner, connection), attribute)
    return found


def same(documented: Any, value: Any) -> bool:
    # A mutable default is a mistake of the manual's: () or None means the same.
    if documented in (None, (), [], {}) and not isinstance(documented, (bool, int)):
        return value is None or value in ((), [], {})
    if isinstance(documented, (list, tuple)) and isinstance(value, (list, tuple)):
        return list(documented) == list(value)
    return bool(documented == value) and isinstance(documented, bool) == isinstance(value, bool)


def check_value(key: str, source: str, value: Any) -> Iterator[str | None]:
    try:
        documented = ast.literal_eval(source)
    except (ValueError, SyntaxError):
        yield None  # an object's repr, which says nothing
        return
    modern = MODERN.get(key)
    if same(documented, value) or (modern and same(ast.literal_eval(modern), value)):
        yield None
    else:
        yield f"{key} is {'absent' if value is ABSENT else repr(value)}, documented {source}"


def check_parameters(key: str, found: Any, item: dict[str, Any]) -> Iterator[str | None]:
    """Yield None for each parameter, default and keyword that is there, else what is wrong."""
    wanted = [each for each in item.get("params", ()) if each["kind"] == "arg"]
    keywords = item.get("keywords", ())
    if not wanted and not keywords:
        return
    parameters = inspect.signature(found).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    for each in wanted:
        name = each["name"]
        have = parameters.get(name) or parameters.get(RENAMED.get((key, name), ""))
        yield None if have else f"{key} has no parameter {name}"
        if "default" in each:
            default = ABSENT if have is None or have.default is have.empty else have.default
            yield from check_value(f"{key}({name}=)", each["default"], default)
    for name in keywords:
        taken = name in parameters or (takes_any and takes(item["name"], name))
        yield None if taken else f"{key} does not take the keyword {name}"


def takes(callable_name: str, keyword: str) -> bool:
    """Tell whether a keyword that goes through **kwargs has an effect."""
    call = THROUGH_KWARGS.get(callable_name)
    if call is not None:
        special = {"durable": False, "delivery_mode": 1, "alias": "a"}
        flags = ("auto_delete", "exclusive", "no_ack")
        value = special.get(keyword, True if keyword in flags else {"x": 1})
        return bool(call(keyword, value) == value)
    if callable_name == "Exchange.Message":
        with Connection("memory://") as connection:
            bound: Any = greenkombu.Exchange("e")(connection.default_channel)
            value = {"priority": 7, "headers": {"probe": 77}}.get(keyword, "probe77")
            return str(value) in repr(bound.Message("b", **{keyword: value}))
    return False


def check_item(module: str, item: dict[str, Any], connection: Connection) -> Iterator[str | None]:
    """Yield None for each point of an item that is there, else what is wrong."""
    name, kind = item["name"], item["kind"]
    key = f"{module}:{name}"
    if kind == "alias":
        transport = importlib.import_module("greenkombu.transport")
        if name not in transport.TRANSPORT_ALIASES:
            yield f"{key}: no such alias"
        else:
            yield None if inspect.isclass(transport.get_transport_cls(name)) else f"{key}: no class"
        return
    if kind == "env":
        root = Path(str(greenkombu.__file__)).parent
        known = any(name in path.read_text() for path in root.rglob("*.py"))
        yield None if known else f"{key} is not known to the source"
        return
    if kind == "submodule":
        importlib.import_module(f"{ours(module)}.{name}")
        yield None
        return
    found = find(module, name, connection)
    if found is ABSENT:
        yield f"{key} is missing"
        return
    if kind == "exception" and not (inspect.isclass(found) and issubclass(found, BaseException)):
        yield f"{key} is no exception"
        return
    if kind in ("function", "method", "class") and not callable(found):
        yield f"{key} cannot be called"
        return
    yield None
    yield from check_parameters(key, found, item)
    if "value" in item:
        yield from check_value(key, item["value"], value_of(module, name, found, connection))
    if "contains" in item:
        value = value_of(module, name, found, connection)
        absent = [each for each in ast.literal_eval(item["contains"]) if each not in value]
        yield f"{key} does not contain {absent}" if absent else None


def check_module(module: str, connection: Connection) -> tuple[int, list[str]]:
    """Return how many points of a module are there, and what is wrong with the others."""
    points: list[str | None] = []
    if module != "env":
        try:
            importlib.import_module(ours(module))
        except ImportError as exc:
            return 0, [str(exc)]
        points.append(None)
    for item in INVENTORY[module]["items"]:
        if (module, item["name"]) in LATER_NAMES:
            continue
        points += check_item(module, item, connection)
    wrong = [each for each in points if each is not None]
    return len(points) - len(wrong), wrong


def documented_points(module: str) -> int:
    """Return how many points the manual has for a module."""
    points = 0 if module == "env" else 1
    for item in INVENTORY[module]["items"]:
        arguments = [each for each in item.get("params", ()) if each["kind"] == "arg"]
        points += 1 + len(arguments) + sum("default" in each for each in arguments)
        points += len(item.get("keywords", ())) + ("value" in item) + ("contains" in item)
    return points


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection("memory://") as made:
        yield made


def test_the_lists_cover_the_manual() -> None:
    assert sorted([*DELIVERED, *LATER]) == sorted(INVENTORY)
    assert sum(map(documented_points, INVENTORY)) == TOTAL
    for module, name in LATER_NAMES:
        assert name in [item["name"] for item in INVENTORY[module]["items"]]


@pytest.mark.parametrize("module", DELIVERED)
def test_a_delivered_module_is_complete(module: str, connection: Connection) -> None:
    there, wrong = check_module(module, connection)
    assert not wrong, "\n".join(wrong)
    later = sum(1 for owner, _ in LATER_NAMES if owner == module)
    assert there == documented_points(module) - later


@pytest.mark.parametrize("module", LATER)
def test_a_module_of_later_work_is_not_there_yet(module: str, connection: Connection) -> None:
    _, wrong = check_module(module, connection)
    assert wrong, f"{module} is complete: move it from LATER to DELIVERED"


@pytest.mark.parametrize(("module", "name"), LATER_NAMES)
def test_a_name_of_later_work_is_not_there_yet(
    module: str, name: str, connection: Connection
) -> None:
    [item] = [each for each in INVENTORY[module]["items"] if each["name"] == name]
    assert any(check_item(module, item, connection)), f"{name} is there: take it off LATER_NAMES"
