"""The small utilities: encoding, objects, text, imports, collections, scheduling, limits, div,
compat, finalize, eventio (behaviours 160, 210, 212, 216-221, 223, 225)."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import subprocess
import sys
import uuid as stdlib_uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import hub
from greenkombu import syn, utils
from greenkombu.utils import (
    collections,
    compat,
    div,
    encoding,
    eventio,
    imports,
    limits,
    scheduling,
    text,
)
from greenkombu.utils.finalize import Finalize
from greenkombu.utils.objects import cached_property
from greenkombu.utils.time import maybe_s_to_ms
from greenkombu.utils.uuid import uuid
from tests.support.tasks import in_child

# -- encoding ----------------------------------------------------------------------------


class Unshowable:
    def __repr__(self) -> str:
        raise ValueError("no repr")

    __str__ = __repr__


class UnshowableError(Exception):
    def __repr__(self) -> str:
        raise ValueError("no repr")


class Hopeless:
    def __repr__(self) -> str:
        raise UnshowableError


@pytest.mark.parametrize(
    "value", [Unshowable(), Hopeless(), b"\xff\xfe", "\ud800", None, [Unshowable()]]
)
def test_b221_safe_functions_never_raise(value: Any) -> None:
    for function in (encoding.safe_str, encoding.safe_repr):
        assert isinstance(function(value), str)


def test_b221_safe_str_and_safe_repr() -> None:
    assert encoding.safe_str("é") == "é"
    assert encoding.safe_str(b"\xff") == "\ufffd"
    assert encoding.safe_str(5) == "5"
    assert encoding.safe_repr("é") == "'é'"
    assert "Unshowable" in encoding.safe_repr(Unshowable())
    assert "no repr" in encoding.safe_repr(Unshowable())


def test_b221_conversions() -> None:
    assert encoding.bytes_to_str(b"\xc3\xa9") == encoding.bytes_to_str("é") == "é"
    assert encoding.bytes_to_str(b"\xff") == "\ufffd"
    assert encoding.str_to_bytes("é") == encoding.str_to_bytes(b"\xc3\xa9") == b"\xc3\xa9"
    assert encoding.ensure_bytes("x") == b"x"
    assert encoding.ensure_bytes(5) == 5
    assert encoding.from_utf8("é", "ignored") == encoding.default_encode("é") == "é"


def test_default_encoding_follows_the_chosen_file() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    encoding.set_default_encoding_file(file)
    try:
        assert encoding.get_default_encoding_file() is file
        assert encoding.default_encoding() == "latin-1"
    finally:
        encoding.set_default_encoding_file(None)
    assert encoding.default_encoding() == sys.getfilesystemencoding()


# -- objects -----------------------------------------------------------------------------


class Documented:
    """The manual's example."""

    def __init__(self) -> None:
        self.made = 0
        self.deleted: list[Any] = []

    @cached_property
    def connection(self) -> Any:
        """The connection."""
        self.made += 1
        return self.made

    @connection.setter
    def connection(self, value: Any) -> Any:
        if value is None:
            raise TypeError("Connection must be a connection")
        return ("prepared", value)

    @connection.deleter
    def connection(self, value: Any) -> None:
        self.deleted.append(value)


def test_b216_cached_property_is_computed_once() -> None:
    obj = Documented()
    assert (obj.connection, obj.connection, obj.made) == (1, 1, 1)
    assert isinstance(Documented.connection, cached_property)
    assert Documented.connection.__doc__ == "The connection."


def test_b216_setter_prepares_and_deleter_sees_the_value() -> None:
    obj = Documented()
    del obj.connection  # never computed: nothing to delete
    obj.connection = 5
    assert obj.connection == ("prepared", 5)
    with pytest.raises(TypeError):
        obj.connection = None
    assert obj.connection == ("prepared", 5)
    del obj.connection
    assert obj.deleted == [("prepared", 5)]
    assert obj.connection == 1


def test_cached_property_gives_two_tasks_the_same_value() -> None:
    env = hub.get_environment()
    gate = env.Event()

    class Slow:
        @cached_property
        def value(self) -> object:
            gate.wait(10)
            return object()

    obj = Slow()
    tasks = [env.spawn(lambda: obj.value) for _ in range(3)]
    env.sleep(0)
    gate.set()
    assert len({id(task.result(10)) for task in tasks}) == 1


def test_cached_property_without_getter() -> None:
    class Odd:
        value: Any = cached_property()

    with pytest.raises(AttributeError, match="value"):
        Odd().value  # noqa: B018


# -- text, time, uuid --------------------------------------------------------------------


def test_b217_uuid_is_a_random_uuid_as_text() -> None:
    assert stdlib_uuid.UUID(uuid()).version == 4
    assert len({uuid() for _ in range(100)}) == 100
    assert uuid(lambda: stdlib_uuid.UUID(int=5)) == "00000000-0000-0000-0000-000000000005"
    assert utils.uuid is uuid


def test_maybe_s_to_ms() -> None:
    given = [None, 1, 1.5, 0, 0.0001, 0.0019]
    assert [maybe_s_to_ms(v) for v in given] == [None, 1000, 1500, 0, 0, 1]


def test_close_matches() -> None:
    assert text.fmatch_best("ampq", ["amqp", "redis", "memory"]) == "amqp"
    assert text.fmatch_best("zzz", ["amqp"]) is None
    assert [word for _, word in text.fmatch_iter("amq", ["amqp", "redis", "amq"])] == [
        "amqp",
        "amq",
    ]


@pytest.mark.parametrize(
    ("version", "parts"),
    [
        ("1", (1, 0, 0, "", "")),
        ("1.2", (1, 2, 0, "", "")),
        ("1.2.3", (1, 2, 3, "", "")),
        ("1.2.3rc1", (1, 2, 3, "rc1", "")),
        ("1.2.3-rc1", (1, 2, 3, "", "rc1")),
        ("1.2.3.beta", (1, 2, 3, "beta", "")),
        ("1.2.3.beta.4", (1, 2, 3, "beta", "4")),
    ],
)
def test_version_string_as_tuple(version: str, parts: tuple[Any, ...]) -> None:
    assert text.version_string_as_tuple(version) == parts


def test_escape_regex() -> None:
    assert text.escape_regex("a.b*[c]") == r"a\.b\*\[c\]"
    assert text.escape_regex("a.b#*", white="#*") == r"a\.b#*"


# -- imports -----------------------------------------------------------------------------


def test_symbol_by_name() -> None:
    get = imports.symbol_by_name
    assert get("os.path.join") is get("os.path:join") is os.path.join
    assert get("short", {"short": "os.path:join"}) is os.path.join
    assert get("short", {"short": os.path.join}) is os.path.join
    assert get(".path:join", package="os") is os.path.join
    assert get("os") is os
    assert get(int) is int


def test_symbol_by_name_with_default() -> None:
    get = imports.symbol_by_name
    assert get("nosuchpackage.thing", default=5) == 5
    assert get("os.nosuchthing", default=6) == 6
    with pytest.raises(ImportError):
        get("nosuchpackage.thing")
    with pytest.raises(AttributeError):
        get("os.nosuchthing")
    with pytest.raises(ValueError, match="''"):
        get("")


# -- collections -------------------------------------------------------------------------


class Key:
    def __init__(self, n: int) -> None:
        self.n = n

    def __eqhash__(self) -> collections.HashedSeq:
        return collections.HashedSeq("Key", self.n)


def test_b218_equality_dict_keys_by_eqhash() -> None:
    d: collections.EqualityDict[Any, Any] = collections.EqualityDict()
    d[Key(1)] = "x"
    assert d[Key(1)] == d.get(Key(1)) == d.setdefault(Key(1), 5) == "x"
    assert Key(1) in d
    assert Key(2) not in d
    assert len(d) == 1
    assert list(d) == [["Key", 1]]
    with pytest.raises(KeyError):
        d[Key(2)]
    assert d.pop(Key(2), None) is None
    del d[Key(1)]
    assert not d
    d["plain"] = 1
    assert d.pop("plain") == 1


def test_equality_dict_hashes_a_key_once() -> None:
    """The keys of pools are tuples of sixteen parameters, looked up for each message."""
    hashed = []

    class Counted(tuple[Any, ...]):
        __slots__ = ()

        def __hash__(self) -> int:
            hashed.append(self)
            return super().__hash__()

    d: collections.EqualityDict[Any, Any] = collections.EqualityDict()
    d[Counted((1, 2))] = "x"
    hashed.clear()
    assert d[Counted((1, 2))] == "x"
    assert len(hashed) == 1


def test_equality_dict_asks_missing() -> None:
    class Making(collections.EqualityDict[Any, Any]):
        def __missing__(self, key: Key) -> Any:
            self[key] = value = object()
            return value

    d = Making()
    assert d[Key(3)] is d[Key(3)]


# -- scheduling --------------------------------------------------------------------------


class Nothing(Exception):
    pass


class Queues:
    def __init__(self, **queues: list[int]) -> None:
        self.queues = queues

    def get(self, name: str, callback: Any = None, **kwargs: Any) -> Any:
        if not self.queues[name]:
            raise Nothing
        return self.queues[name].pop(0)


def test_b160_fair_cycle_gives_each_resource_its_turn() -> None:
    queues = Queues(a=[1, 2, 3, 4], b=[10, 20], c=[])
    cycle = scheduling.FairCycle(queues.get, ["a", "b", "c"], Nothing)
    assert [cycle.get(lambda message: None) for _ in range(6)] == [1, 10, 2, 20, 3, 4]
    with pytest.raises(Nothing):
        cycle.get(lambda message: None)
    cycle.close()


def test_fair_cycle_of_the_manual_returns_the_resource_too() -> None:
    cycle = scheduling.FairCycle(Queues(a=[1], b=[2]).get, ["a", "b"], Nothing)
    assert [cycle.get(), cycle.get()] == [(1, "a"), (2, "b")]


def test_fair_cycle_without_resources() -> None:
    with pytest.raises(Nothing):
        scheduling.FairCycle(print, [], Nothing).get()


def test_fair_cycle_goes_on_when_resources_leave() -> None:
    resources = ["a", "b", "c"]
    cycle = scheduling.FairCycle(lambda name, **kwargs: name, resources, Nothing)
    assert [cycle.get()[1] for _ in range(3)] == ["a", "b", "c"]
    resources.remove("b")
    resources.remove("c")
    assert cycle.get()[1] == "a"


def test_fair_cycle_when_the_last_resource_leaves_during_get() -> None:
    resources = ["a", "b"]

    def fun(name: str, **kwargs: Any) -> None:
        resources.clear()
        raise Nothing

    with pytest.raises(Nothing):
        scheduling.FairCycle(fun, resources, Nothing).get()


def test_round_robin_cycle_rotates() -> None:
    cycle = scheduling.cycle_by_name("round_robin")(["a", "b", "c"])
    assert cycle.consume(2) == ["a", "b"]
    cycle.rotate("a")
    cycle.rotate("unknown")
    assert cycle.consume(5) == ["b", "c", "a"]
    cycle.update(["x"])
    assert cycle.items == ["x"]


def test_priority_and_sorted_cycles_do_not_rotate() -> None:
    by_priority = scheduling.cycle_by_name("priority")(["b", "a", "c"])
    in_order = scheduling.cycle_by_name("sorted")(["b", "a", "c"])
    by_priority.rotate("b")
    in_order.rotate("b")
    assert by_priority.consume(5) == ["b", "a", "c"]
    assert in_order.consume(5) == ["a", "b", "c"]
    assert scheduling.cycle_by_name(scheduling.sorted_cycle) is scheduling.sorted_cycle


# -- limits ------------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    moment = [100.0]
    monkeypatch.setattr(limits, "monotonic", lambda: moment[0])
    return moment


def test_b219_token_bucket(now: list[float]) -> None:
    bucket = limits.TokenBucket(2, capacity=3)
    assert (bucket.fill_rate, bucket.capacity, bucket.timestamp) == (2.0, 3.0, 100.0)
    assert bucket.can_consume()
    assert bucket.can_consume(2)
    assert not bucket.can_consume()
    assert bucket.expected_time() == 0.5
    assert bucket.expected_time(3) == 1.5
    now[0] += 1
    assert bucket.expected_time(2) == 0.0
    assert bucket.can_consume(2)
    assert not bucket.can_consume(1)
    now[0] += 100
    assert not bucket.can_consume(4), "more than its capacity never fits"
    assert bucket.can_consume(3)


def test_token_bucket_keeps_what_waits(now: list[float]) -> None:
    bucket = limits.TokenBucket(1)
    bucket.add("a")
    bucket.add("b")
    assert list(bucket.contents) == ["a", "b"]
    assert bucket.pop() == "a"
    bucket.clear_pending()
    with pytest.raises(IndexError):
        bucket.pop()


# -- div ---------------------------------------------------------------------------------


def test_b218_say_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    div.say("%s messages left", 3)
    div.say("100 %")
    assert capsys.readouterr().err == "3 messages left\n100 %\n"


def test_b218_emergency_dump_state_writes_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    path = div.emergency_dump_state({"a": 1})
    try:
        with open(path, "rb") as file:
            assert pickle.load(file) == {"a": 1}
        assert os.stat(path).st_mode & 0o077 == 0
        assert path in capsys.readouterr().err
    finally:
        os.unlink(path)


def test_b218_emergency_dump_state_falls_back_to_text() -> None:
    said = io.StringIO()
    path = div.emergency_dump_state({"a": lambda: None}, stderr=said)
    try:
        with open(path, encoding="utf-8") as file:
            assert file.read().startswith("{'a': <function")
        assert "Cannot pickle state" in said.getvalue()
    finally:
        os.unlink(path)


# -- compat ------------------------------------------------------------------------------


def test_b210_detect_environment_names_what_is_patched() -> None:
    # As the whole run was started: tests/run.py.
    started = os.environ.get("GREENKOMBU_TEST_ENVIRONMENT", "default")
    expected = {"gevent-late": "gevent", "gevent-unpatched": "default"}.get(started, started)
    assert compat.detect_environment() == compat._detect_environment() == expected
    assert syn.detect_environment() == expected


def test_fileno() -> None:
    assert compat.fileno(5) == compat.maybe_fileno(5) == 5
    with open(os.devnull) as file:
        assert compat.fileno(file) == file.fileno()
    assert compat.maybe_fileno(io.StringIO()) is None
    assert compat.maybe_fileno(None) is None
    with pytest.raises(AttributeError):
        compat.fileno("x")


def test_coro_is_started() -> None:
    received = []

    @compat.coro
    def collecting() -> Iterator[None]:
        while True:
            received.append((yield))

    generator: Any = collecting()
    generator.send(4)
    assert received == [4]


def test_b218_nested_context_managers() -> None:
    events: list[Any] = []

    @contextlib.contextmanager
    def manager(n: int) -> Iterator[int]:
        events.append(n)
        try:
            yield n
        finally:
            events.append(-n)

    with compat.nested(manager(1), manager(2)) as values:
        assert values == [1, 2]
    assert events == [1, 2, -2, -1]
    events.clear()
    with pytest.raises(KeyError), compat.nested(manager(1), manager(2)):
        raise KeyError
    assert events == [1, 2, -2, -1]


def test_entrypoints_are_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "something-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: something\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[some.group]\njoin = os.path:join\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    [(entry, loaded)] = compat.entrypoints("some.group")
    assert (entry.name, loaded) == ("join", os.path.join)
    assert list(compat.entrypoints("no such group")) == []


def test_b220_compat_ordered_dict() -> None:
    d = compat.CompatOrderedDict([("b", 1)])
    d.update({"a": 2}, c=3)
    assert list(d.iterkeys()) == ["b", "a", "c"]
    assert list(d.itervalues()) == [1, 2, 3]
    assert list(d.iteritems()) == list(d.items())
    assert d.popitem() == ("c", 3)
    assert d.setdefault("z") is None
    assert d.pop("b") == 1
    assert d.pop("b", 7) == 7
    with pytest.raises(KeyError):
        d.pop("b")
    assert list(compat.CompatOrderedDict.fromkeys("ab")) == ["a", "b"]


def test_b225_lifo_queue_waits_without_blocking_others() -> None:
    env = hub.get_environment()
    queue = compat.LifoQueue()
    task = env.spawn(queue.get, timeout=10)
    env.sleep(0)
    queue.put("x")
    assert task.result(10) == "x"
    queue.put(1)
    queue.put(2)
    assert [queue.get(), queue.get()] == [2, 1]


class Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []


def test_register_after_fork_runs_in_children_while_the_object_lives() -> None:
    kept, dropped = Recorder(), Recorder()
    order: list[str] = []
    utils.register_after_fork(kept, lambda obj: order.append("first"))
    utils.register_after_fork(dropped, lambda obj: order.append("dropped"))
    utils.register_after_fork(kept, lambda obj: obj.seen.append(1 / 0))
    utils.register_after_fork(kept, lambda obj: order.append("last"))
    del dropped
    gc.collect()

    def check() -> None:
        assert order == ["first", "last"]

    in_child(check)
    assert order == []


# -- finalize ----------------------------------------------------------------------------


def test_b223_finalize_runs_once_when_the_object_dies() -> None:
    calls: list[Any] = []
    obj = Recorder()
    finalize = Finalize(obj, lambda *args, **kw: calls.append((args, kw)), (1,), {"a": 2})
    assert finalize.still_active()
    del obj
    gc.collect()
    finalize()
    assert calls == [((1,), {"a": 2})]
    assert not finalize.still_active()


def test_b223_finalize_can_be_called_or_cancelled_before() -> None:
    calls: list[int] = []
    first, second = Recorder(), Recorder()
    by_hand = Finalize(first, lambda: calls.append(1) or "result")
    cancelled = Finalize(second, lambda: calls.append(2))
    assert by_hand() == "result"
    assert by_hand() is None
    cancelled.cancel()
    del first, second
    gc.collect()
    assert calls == [1]


def test_b223_finalize_runs_at_exit_by_priority() -> None:
    script = (
        "from greenkombu.utils.finalize import Finalize\n"
        "class O: pass\n"
        "o = O()\n"
        "Finalize(o, print, ('low',), exitpriority=1)\n"
        "Finalize(None, print, ('high',), exitpriority=10)\n"
        "Finalize(None, lambda: 1 / 0, exitpriority=5)\n"
        "Finalize(o, print, ('never',))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    # The object is still referenced by the module when the exit functions run; what has no
    # priority may run when the module is torn down, or not at all.
    assert done.stdout.split()[:2] == ["high", "low"]
    assert "ZeroDivisionError" in done.stderr


def test_finalize_does_not_run_in_a_forked_child() -> None:
    ran: list[str] = []
    obj = Recorder()
    finalize = Finalize(obj, ran.append, ("ran",))

    def check() -> None:
        finalize()
        assert ran == []

    in_child(check)
    assert finalize.still_active()
    finalize()
    assert ran == ["ran"]


def test_finalize_needs_a_reason_to_run() -> None:
    with pytest.raises(ValueError, match="exitpriority"):
        Finalize(None, print)


# -- eventio -----------------------------------------------------------------------------


def test_eventio_polls_with_kombus_names() -> None:
    reader, writer = os.pipe()
    poller = eventio.poll()
    try:
        poller.register(reader, eventio.READ | eventio.ERR)
        assert poller.poll(0) == []
        os.write(writer, b"x")
        assert poller.poll(5) == [(reader, eventio.READ)]
        poller.unregister(reader)
        poller.unregister(reader)
        assert poller.poll(0) == []
    finally:
        poller.close()
        os.close(reader)
        os.close(writer)
