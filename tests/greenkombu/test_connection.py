from __future__ import annotations

import copy
import gc
import itertools
import logging
import os
import pickle
import time
import weakref
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest

from greenkombu import connection as connection_module
from greenkombu import exceptions
from greenkombu.connection import (
    BrokerConnection,
    Connection,
    is_connection,
    maybe_channel,
)
from greenkombu.deadline import Deadline
from greenkombu.entity import Exchange
from greenkombu.exceptions import (
    ArgumentError,
    ConnectionBlocked,
    ConnectionClosedError,
    InvalidURL,
    OperationalError,
)
from greenkombu.transport.base import Transport
from greenkombu.utils.url import parse_url
from hub import Event, get_environment
from tests.support.loopback import LoopbackTransport, make_transport
from tests.support.patched import run_patched
from tests.support.tasks import LONG, until, waiting_for

from .amqp.broker import scripted

PARAMETERS = ("hostname", "userid", "password", "virtual_host", "port", "transport_cls")


def parameters(connection: Connection) -> dict[str, Any]:
    return {name: getattr(connection, name) for name in PARAMETERS}


def connect_to(**attributes: Any) -> tuple[Connection, Any]:
    cls = make_transport(**attributes)
    return Connection("loop", transport=cls), cls


# -- URLs and parameters


def test_one_class_under_two_names() -> None:
    assert BrokerConnection is Connection
    assert is_connection(Connection())
    assert not is_connection(object())
    assert connection_module.ConnectionPool.__name__ == "ConnectionPool"
    with pytest.raises(AttributeError):
        connection_module.nothing  # noqa: B018


def test_b001_url_sets_all_six_parameters() -> None:
    assert parameters(Connection("memory://u:p@h:1/2")) == {
        "transport_cls": "memory",
        "hostname": "h",
        "userid": "u",
        "password": "p",
        "virtual_host": "2",
        "port": 1,
    }


def test_b002_empty_url_leaves_the_keywords() -> None:
    connection = Connection("amqp://", userid="x", password="y", virtual_host="v", port="7")
    assert (connection.userid, connection.password) == ("x", "y")
    assert (connection.virtual_host, connection.port) == ("v", 7)


@pytest.mark.parametrize(
    ("url", "virtual_host"),
    [
        ("amqp://localhost//foo", "/foo"),
        ("amqp://localhost/foo", "foo"),
        ("amqp://localhost//", "/"),
        ("amqp://localhost/", "/"),
        ("amqp://localhost", "/"),
        ("amqp://h///x", "//x"),
        ("amqp://h/%2F", "/"),
    ],
)
def test_b003_b005_virtual_host(url: str, virtual_host: str) -> None:
    assert Connection(url).virtual_host == virtual_host


def test_b004_no_virtual_host_in_the_url_is_not_slash() -> None:
    assert parse_url("amqp://h:5672//")["virtual_host"] == "/"
    assert not parse_url("amqp://h:5672/")["virtual_host"]
    # So a keyword is used instead.
    assert Connection("amqp://h:5672/", virtual_host="kw").virtual_host == "kw"
    assert Connection("amqp://h:5672//", virtual_host="kw").virtual_host == "/"


def test_b006_percent_encoded_parts_are_decoded() -> None:
    connection = Connection("memory://u%40d:p%2Fw@h/v%2Fh")
    assert (connection.userid, connection.password) == ("u@d", "p/w")
    assert connection.virtual_host == "v/h"


@pytest.mark.parametrize("password", ["a/b@c", "plain", "p:q", "%2F", "ü"])
@pytest.mark.parametrize("host", ["h", "10.0.0.1", "::1"])
@pytest.mark.parametrize("virtual_host", ["/", "v", "/v/w", "a b"])
def test_b007_uri_round_trips(password: str, host: str, virtual_host: str) -> None:
    cls = make_transport()
    original = Connection(
        host, userid="u@x", password=password, virtual_host=virtual_host, port=12, transport=cls
    )
    again = Connection(original.as_uri(include_password=True), transport=cls)
    assert parameters(again) == parameters(original)


def test_b008_password_is_masked() -> None:
    connection = Connection("loop://u:secret@h//", transport=make_transport())
    connection.connect()
    for text in (connection.as_uri(), repr(connection), str(connection.Pool(2))):
        assert "secret" not in text
        assert "**" in text
    assert "secret" in connection.as_uri(include_password=True)
    assert ":xx@" in connection.as_uri(mask="xx")
    connection.close()


def test_no_mask_where_there_is_no_password() -> None:
    assert ":@" not in Connection("memory://h").__repr__()
    assert "**" not in repr(Connection("memory://u@h"))


def test_b009_query_sets_options() -> None:
    connection = Connection(
        "amqp://h/v?ssl=1&heartbeat=3&connect_timeout=2.5&login_method=PLAIN"
        "&visibility_timeout=5&ratio=0.5&confirm_publish=true&tag=abc&version=1.2.3"
    )
    assert connection.ssl is True
    assert connection.heartbeat == 3.0
    assert connection.connect_timeout == 2.5
    assert connection.login_method == "PLAIN"
    assert connection.transport_options == {
        "visibility_timeout": 5,
        "ratio": 0.5,
        "confirm_publish": True,
        "tag": "abc",
        "version": "1.2.3",
    }
    assert Connection("amqp://h/v?ssl=0").ssl is False
    assert Connection("amqp://h?ssl_ca_certs=/a").ssl == {"ssl_ca_certs": "/a"}


def test_transport_options_of_url_and_keyword_are_merged() -> None:
    given = {"a": 1, "b": 2}
    connection = Connection("amqp://h?b=3", transport_options=given)
    assert connection.transport_options == {"a": 1, "b": 3}
    assert given == {"a": 1, "b": 2}


def test_b010_b011_b012_b013_b014_transport_defaults() -> None:
    connection, _ = connect_to()
    connection.hostname = None
    assert connection.userid is None
    info = connection.info()
    assert (info["userid"], info["port"], info["hostname"]) == ("me", 4242, "localhost")
    assert connection.host == "localhost:4242"
    portless = Connection("h", transport=make_transport(default_port=None))
    assert portless.host == "h"


def test_info_has_kombus_keys_in_kombus_order() -> None:
    connection, _ = connect_to()
    assert list(connection.info()) == [
        "hostname",
        "userid",
        "password",
        "virtual_host",
        "port",
        "insist",
        "ssl",
        "transport",
        "connect_timeout",
        "transport_options",
        "login_method",
        "uri_prefix",
        "heartbeat",
        "failover_strategy",
        "alternates",
        "credential_provider",
    ]
    assert Connection("pyamqp://")._info(resolve=False)[7] == ("transport", "pyamqp")
    assert connection.info()["failover_strategy"] == "round-robin"


def test_b017_url_wins_over_keywords() -> None:
    connection = Connection("amqp://a@h//", userid="b", password="pw")
    assert (connection.userid, connection.password) == ("a", "pw")


def test_explicit_transport_wins_over_the_scheme() -> None:
    cls = make_transport()
    assert Connection("amqp://h", transport=cls).get_transport_cls() is cls
    assert Connection("amqp://h", transport="memory").transport_cls == "memory"


def test_b019_prefix_keeps_the_rest_for_the_driver() -> None:
    connection = Connection("memory+foo://x/y?z=1")
    assert connection.hostname == "foo://x/y?z=1"
    assert connection.uri_prefix == connection.transport_cls == "memory"
    clone = connection.clone()
    assert parameters(clone) == parameters(connection)
    assert repr(clone).startswith("<Connection: memory+foo://x/y")


def test_b020_transport_that_parses_urls_gets_them_whole() -> None:
    cls = make_transport(
        can_parse_url=True, as_uri=lambda self, uri, include_password=False, mask="**": uri
    )
    connection = Connection("loop://h1,h2/db?replicaSet=x", transport=cls)
    assert connection.hostname == "loop://h1,h2/db?replicaSet=x"
    assert connection.as_uri() == "loop://h1,h2/db?replicaSet=x"


def test_host_and_port_without_a_scheme() -> None:
    assert (Connection("h:1234").hostname, Connection("h:1234").port) == ("h", 1234)
    assert Connection("[::1]:1234").hostname == "::1"
    assert Connection("/run/broker.sock", transport=make_transport()).hostname == "/run/broker.sock"


@pytest.mark.parametrize(
    "url",
    [
        "h:1234/vh",
        "//h",
        "user:s3cret@host/x",
        "amqp://user:s3/cret@h:1/",
        "amqp://h:99999",
        "amqp://h:port",
        "h:99999",
        "amqp://user:s3cret@h?heartbeat=often",
        "amqp://user:s3cret@h?ssl=maybe",
        "amqp://h?credential_provider=os.system",
        "amqp://h?transport_options=1",
        "ok;//bad",
    ],
)
def test_wrong_url_is_a_typed_error_without_the_password(url: str) -> None:
    def use() -> None:
        connection = Connection(url)
        for _ in connection.alt:
            connection.maybe_switch_next()

    with pytest.raises(InvalidURL) as caught:
        use()
    assert isinstance(caught.value, ValueError)
    assert "s3" not in str(caught.value)


def test_broker_that_is_no_text_is_refused() -> None:
    for given, kind in ((123, "int"), ([None], "NoneType"), (b"memory://", "bytes")):
        with pytest.raises(ArgumentError, match=f"a broker is .* not {kind}"):
            Connection(given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"connect_timeout": "a"}, "connect_timeout must be a number of seconds.*not 'a'"),
        ({"connect_timeout": -1}, "connect_timeout .* 0 or more, not -1"),
        ({"connect_timeout": float("nan")}, "connect_timeout .* not nan"),
        ({"heartbeat": "x"}, "heartbeat must be a number of seconds.*not 'x'"),
        ({"heartbeat": -1}, "heartbeat .* not -1"),
        ({"port": "x"}, "port must be a number, not 'x'"),
        ({"transport_options": [1]}, r"transport_options must be a dictionary, not \[1\]"),
    ],
)
def test_wrong_parameters_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        Connection("h", **given)


def test_numbers_may_be_text() -> None:
    connection = Connection("h", connect_timeout="3.5", heartbeat="5", port="7")  # type: ignore[arg-type]
    assert connection.connect_timeout == 3.5
    assert (connection.heartbeat, connection.port) == (5.0, 7)


def test_unknown_arguments_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Connection("memory://", backend_cls="x")
    assert "backend_cls" in caplog.text


def test_b023_options_survive_cloning_and_pickling() -> None:
    original = Connection("amqp://u:p@h:1/v", transport_options={"o": [1]}, heartbeat=4, ssl=True)
    for twin in (original.clone(), copy.copy(original), pickle.loads(pickle.dumps(original))):
        assert twin is not original
        assert parameters(twin) == parameters(original)
        assert twin.transport_options == {"o": [1]}
        assert (twin.heartbeat, twin.ssl) == (4.0, True)
    assert original.clone(hostname="other").hostname == "other"


def test_clone_is_of_the_subclass() -> None:
    class Mine(Connection):
        pass

    assert type(Mine("memory://").clone()) is Mine


def test_b024_equal_parameters_have_equal_hashes() -> None:
    def same() -> Connection:
        return Connection("amqp://u:p@h:1/v", transport_options={"b": {"x": [1]}, "a": 1})

    assert same().__eqhash__() == same().__eqhash__()
    hash(same().__eqhash__())
    swapped = Connection("amqp://u:p@h:1/v", transport_options={"a": 1, "b": {"x": [1]}})
    assert swapped.__eqhash__() == same().__eqhash__()
    for change in (
        {"userid": "x"},
        {"heartbeat": 3},
        {"ssl": True},
        {"transport_options": {"a": 2}},
        {"login_method": "PLAIN"},
        {"alternates": ["amqp://b"]},
    ):
        assert same().clone(**change).__eqhash__() != same().__eqhash__()
    odd = Connection("amqp://h", transport_options={"o": {1, 2}})
    hash(odd.__eqhash__())
    assert "s3cret" not in repr(Connection("amqp://u:s3cret@h:1/v").__eqhash__())


# -- life cycle


def test_b025_constructor_opens_nothing() -> None:
    connection, cls = connect_to()
    assert connection.connected is False
    assert connection.connection_errors
    assert connection.as_uri()
    assert cls.log == []


def test_b026_connect_and_close() -> None:
    connection, cls = connect_to()
    transport_connection = connection.connect()
    assert connection.connected is True
    assert connection.connection is transport_connection
    assert transport_connection.client is connection
    connection.close()
    connection.close()
    assert connection.connected is False
    assert connection.connection is None
    assert cls.log == ["establish", "close_connection"]
    connection.connect()
    assert connection.connected is True
    connection.release()
    assert cls.log.count("close_connection") == 2


def test_b028_context_manager_releases_also_on_an_exception() -> None:
    connection, _ = connect_to()
    with connection as same:
        same.connect()
        assert same is connection
    assert not connection.connected
    with pytest.raises(KeyError), connection:  # noqa: PT012
        connection.connect()
        raise KeyError
    assert not connection.connected


def test_b029_nothing_survives_close_in_cycles() -> None:
    connection, _ = connect_to()
    connection.connect()
    transport_connection = connection.default_channel.connection
    gone = weakref.ref(connection)
    gc.disable()
    try:
        connection.close()
        transport_connection.client = None
        del connection
        assert gone() is None
    finally:
        gc.enable()


def test_operations_on_a_closed_connection_raise_a_typed_error() -> None:
    connection, _ = connect_to()
    connection.connect()
    connection.close()
    for use in (connection.channel, connection.drain_events):
        with pytest.raises(ConnectionClosedError, match=r"loop.*connect\(\)"):
            use()
    assert issubclass(ConnectionClosedError, connection.connection_errors)
    # These two open it again.
    assert connection.default_channel is not None
    connection.close()
    assert connection.ensure_connection() is connection
    assert connection.connected
    connection.close()


def test_b030_drain_events_times_out() -> None:
    connection, _ = connect_to()
    with pytest.raises(TimeoutError, match="timed out"):
        connection.drain_events(timeout=0.01)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    connection.close()


def test_b030_drain_events_runs_one_event_in_this_task() -> None:
    connection, cls = connect_to()
    connection.connect()
    seen: list[Any] = []
    environment = get_environment()

    def event(name: str) -> None:
        seen.append((name, environment.current()))

    inbox = cls.connections[0].inbox
    for name in "ab":
        inbox.append(lambda name=name: event(name))
    connection.drain_events(timeout=5)
    assert seen == [("a", environment.current())]
    connection.drain_events(timeout=0)
    assert [name for name, _ in seen] == ["a", "b"]
    connection.close()


def test_drain_events_wakes_at_once_for_a_late_event() -> None:
    connection, cls = connect_to()
    connection.connect()
    seen: list[str] = []
    environment = get_environment()
    task = environment.spawn(connection.drain_events, timeout=30)
    inbox = cls.connections[0].inbox
    until(environment, lambda: "1 listening" in repr(inbox))
    inbox.append(lambda: seen.append("x"))
    assert task.join(10)
    assert seen == ["x"]
    connection.close()


def test_every_event_runs_once_among_several_drainers() -> None:
    connection, cls = connect_to()
    connection.connect()
    seen: list[int] = []
    environment = get_environment()

    def drain() -> None:
        for _ in range(10):
            connection.drain_events(timeout=30)

    tasks = [environment.spawn(drain) for _ in range(5)]
    for number in range(50):
        cls.connections[0].inbox.append(lambda number=number: seen.append(number))
        if not number % 7:
            environment.sleep(0.001)
    assert all(task.join(10) for task in tasks)
    assert sorted(seen) == list(range(50))
    connection.close()


def test_s14_close_ends_a_drain_of_another_task() -> None:
    connection, cls = connect_to()
    connection.connect()
    environment = get_environment()

    def drain() -> str:
        try:
            connection.drain_events()
        except connection.connection_errors as exc:
            return type(exc).__name__
        return "no error"

    task = environment.spawn(drain)
    until(environment, lambda: "1 listening" in repr(cls.connections[0].inbox))
    connection.close()
    assert task.result(LONG) == "ConnectionClosedError"


def test_failed_connection_is_not_opened_again_by_a_drain() -> None:
    connection, cls = connect_to()
    connection.connect()
    seen: list[int] = []
    cls.connections[0].inbox.append(lambda: seen.append(1))
    cls.connections[0].abort(OSError("reset"))
    connection.drain_events(timeout=10)  # what had come before is still delivered
    for _ in range(2):
        with pytest.raises(OSError, match="reset"):
            connection.drain_events(timeout=10)
    assert seen == [1]
    assert not connection.connected
    assert cls.log.count("establish") == 1


def test_events_of_a_callback_error_are_used_up() -> None:
    connection, cls = connect_to()
    connection.connect()

    def bad() -> None:
        raise KeyError("of the user")

    cls.connections[0].inbox.append(bad)
    with pytest.raises(KeyError, match="of the user"):
        connection.drain_events(timeout=10)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    connection.close()


def test_s13_endless_events_let_other_tasks_run() -> None:
    connection, cls = connect_to()
    connection.connect()
    inbox = cls.connections[0].inbox
    environment = get_environment()
    ran = Event()

    def event() -> None:
        inbox.append(event)

    inbox.append(event)
    environment.spawn(ran.set)
    deadline = time.monotonic() + 10
    while not ran.is_set() and time.monotonic() < deadline:
        connection.drain_events(timeout=10)
    assert ran.is_set()
    connection.close()


def test_b032_default_channel_is_made_once_and_replaced() -> None:
    connection, cls = connect_to()
    channel = connection.default_channel
    assert connection.default_channel is channel
    assert maybe_channel(connection) is channel
    assert maybe_channel(channel) is channel
    channel.close()
    second = connection.default_channel
    assert second is not channel
    cls.connections[0].abort(OSError("reset"))
    third = connection.default_channel
    assert third is not second
    assert second.closed
    assert cls.log.count("establish") == 2
    # A revive with another channel closes the old default one.
    fresh = connection.channel()
    connection.revive(fresh)
    assert third.closed
    connection.revive(connection.default_channel)
    assert not connection.default_channel.closed
    connection.close()


def test_b033_error_tuples_are_usable_before_connecting() -> None:
    connection, _ = connect_to()
    for errors in (
        connection.connection_errors,
        connection.channel_errors,
        connection.recoverable_connection_errors,
        connection.recoverable_channel_errors,
    ):
        assert isinstance(errors, tuple)
    # A transport that does not tell them apart retries on all.
    assert connection.recoverable_connection_errors == (
        *connection.connection_errors,
        *connection.channel_errors,
    )
    assert connection.recoverable_channel_errors == ()
    telling = Connection(
        transport=make_transport(
            recoverable_connection_errors=(OSError,), recoverable_channel_errors=(ValueError,)
        )
    )
    assert telling.recoverable_connection_errors == (OSError,)
    assert telling.recoverable_channel_errors == (ValueError,)


def test_b038_b039_channels_know_their_connection() -> None:
    connection, _ = connect_to()
    ids = {connection.channel().channel_id for _ in range(3)}
    assert len(ids) == 3
    assert connection.default_channel.connection.client is connection
    connection.close()


def test_maybe_close_channel_ignores_library_errors_only() -> None:
    connection, _ = connect_to()

    class Channel:
        def __init__(self, error: Exception) -> None:
            self.error = error

        def close(self) -> None:
            raise self.error

    connection.maybe_close_channel(Channel(OSError()))
    connection.maybe_close_channel(Channel(ValueError()))
    with pytest.raises(KeyError):
        connection.maybe_close_channel(Channel(KeyError()))


def test_collect_drops_without_a_goodbye() -> None:
    connection, cls = connect_to()
    channel = connection.default_channel
    connection.collect(socket_timeout=0.1)
    assert not connection.connected
    assert channel.closed
    assert "close_connection" not in cls.log
    assert connection.default_channel is not channel
    connection.close()


def test_errors_while_closing_are_swallowed_and_the_connection_is_dead() -> None:
    def close_connection(self: Any, connection: Any) -> None:
        raise OSError("no answer")

    connection, cls = connect_to(close_connection=close_connection)
    connection.connect()
    connection.close()
    assert cls.connections[0].connected is False


def test_exactly_one_task_connects_and_all_get_it() -> None:
    connection, cls = connect_to(delay=0.05)
    environment = get_environment()
    tasks = [environment.spawn(lambda: connection.default_channel) for _ in range(50)]
    channels = {id(task.result(10)) for task in tasks}
    assert len(channels) == 1
    assert cls.log == ["establish", "create_channel"]
    connection.close()


def test_all_waiting_tasks_get_the_error_of_the_attempt() -> None:
    connection, cls = connect_to(failures=1)
    environment = get_environment()
    go = Event()
    cls.on_connect = staticmethod(lambda: go.wait(2 * LONG))

    def connect() -> str:
        try:
            connection.connect()
        except OSError as exc:
            return str(exc)
        return "connected"

    tasks = [environment.spawn(connect) for _ in range(20)]
    until(environment, lambda: waiting_for(connection) == 19)
    go.set()
    assert {task.result(10) for task in tasks} == {"no answer from loop"}
    assert cls.log == ["establish"]


def test_waiting_for_another_tasks_attempt_is_bounded() -> None:
    connection, cls = connect_to()
    begun, go = Event(), Event()
    cls.on_connect = staticmethod(lambda: (begun.set(), go.wait(2 * LONG)))
    task = get_environment().spawn(connection.connect)
    assert begun.wait(LONG)
    started = time.monotonic()
    with pytest.raises(OperationalError, match="another task"):
        connection.ensure_connection(timeout=0.1, max_retries=0)
    assert time.monotonic() - started < LONG
    go.set()
    task.result(LONG)
    connection.close()


def test_killed_attempt_is_taken_over() -> None:
    connection, cls = connect_to()
    environment = get_environment()

    class Killed(BaseException):
        """What a kill or a Timeout is: not an Exception."""

    def die_once() -> None:
        cls.on_connect = None
        environment.sleep(0.05)
        raise Killed

    cls.on_connect = staticmethod(die_once)

    def connect() -> str:
        try:
            connection.connect()
        except Killed:
            return "killed"
        return "connected"

    tasks = [environment.spawn(connect) for _ in range(10)]
    results = sorted(task.result(10) for task in tasks)
    assert results == ["connected"] * 9 + ["killed"]
    assert cls.log.count("establish") == 2
    connection.close()


def test_attempt_that_asks_for_itself_is_refused() -> None:
    connection, cls = connect_to()
    cls.on_connect = staticmethod(lambda: connection.connection)
    with pytest.raises(RuntimeError, match="the very code"):
        connection.connect()
    cls.on_connect = None
    connection.connect()
    connection.close()


def test_close_wins_over_a_connect_that_is_under_way() -> None:
    connection, cls = connect_to()
    begun, go = Event(), Event()
    cls.on_connect = staticmethod(lambda: (begun.set(), go.wait(2 * LONG)))

    def connect() -> str:
        try:
            connection.ensure_connection(interval_start=0, interval_step=0)
        except OperationalError as exc:
            return type(exc.__cause__).__name__
        return "connected"

    task = get_environment().spawn(connect)
    assert begun.wait(LONG)
    connection.close()
    go.set()
    assert task.result(LONG) == "ConnectionClosedError"
    assert not connection.connected
    assert cls.connections[0].connected is False
    assert cls.log.count("establish") == 1


FORK = """
import os
from greenkombu.connection import Connection
from hub import get_environment
from tests.support.loopback import make_transport

fork = get_environment().original("os", "fork")
waitpid = get_environment().original("os", "waitpid")
cls = make_transport()
connection = Connection("loop", transport=cls)
channel = connection.default_channel
mine = cls.connections[0]
pid = fork()
if pid == 0:
    status = 1
    try:
        assert not connection.connected
        assert mine.connected  # untouched
        assert connection.default_channel is not channel
        assert len(cls.connections) == 2
        connection.close()
        assert mine.connected
        assert not channel.closed
        status = 0
    finally:
        os._exit(status)
assert waitpid(pid, 0)[1] == 0
assert connection.connected
assert connection.default_channel is channel
connection.close()
print("end")
"""


def test_close_wins_over_a_wait_between_two_attempts() -> None:
    connection, cls = connect_to(failures=100)
    environment = get_environment()

    def connect() -> str:
        try:
            connection.ensure_connection(interval_start=0.1, interval_step=0, timeout=20)
        except OperationalError as exc:
            return type(exc.__cause__).__name__
        return "connected"

    task = environment.spawn(connect)
    until(environment, lambda: "establish" in cls.log)
    connection.close()
    cls.failures = 0
    assert task.result(LONG) == "ConnectionClosedError"
    assert not connection.connected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_s17_child_forgets_the_parents_connection() -> None:
    done = run_patched(["-c", FORK])
    assert (done.returncode, done.stdout) == (0, "end\n"), done.stderr


# -- failover


def test_several_brokers_go_round() -> None:
    connection = Connection("amqp://u:p@a//v;memory://b;c:99", heartbeat=3)
    assert connection.alt == ["amqp://u:p@a//v", "memory://b", "c:99"]
    seen = []
    for _ in range(4):
        seen.append((connection.hostname, connection.transport_cls, connection.userid))
        connection.maybe_switch_next()
    assert seen == [
        ("a", "amqp", "u"),
        ("b", "memory", None),
        ("c", "amqp", "u"),
        ("a", "amqp", "u"),
    ]
    assert connection.virtual_host == "/v"
    assert connection.heartbeat == 3.0


def test_what_a_broker_does_not_say_it_has_from_the_first() -> None:
    """As Kombu 5.7, but always from the first, and a port only where it is the transport's."""
    first = "amqp://u:s@a:1/v?heartbeat=5&ssl=1&login_method=EXTERNAL&confirm_publish=1"
    connection = Connection(
        f"{first};amqp://b;c;amqp://w:t@d:2//?heartbeat=0&ssl=0&confirm_publish=0;"
        "amqp://e;amqps://f;memory://",
        connect_timeout=7,
    )
    names = ("hostname", "userid", "password", "port", "virtual_host", "heartbeat", "ssl")
    seen = []
    for _ in connection.alt:
        seen.append([getattr(connection, name) for name in names])
        seen[-1].append(connection.transport_options["confirm_publish"])
        assert (connection.login_method, connection.connect_timeout) == ("EXTERNAL", 7)
        connection.maybe_switch_next()
    assert seen == [
        ["a", "u", "s", 1, "v", 5.0, True, 1],
        ["b", None, None, 1, "v", 5.0, True, 1],
        ["c", "u", "s", 1, "v", 5.0, True, 1],
        ["d", "w", "t", 2, "/", 0.0, False, 0],
        ["e", None, None, 1, "v", 5.0, True, 1],
        ["f", None, None, None, "v", 5.0, True, 1],
        [None, None, None, None, "v", 5.0, True, 1],
    ]
    assert connection.hostname == "a"
    connection.switch("amqp://b")
    assert (connection.userid, connection.port, connection.ssl) == (None, 1, True)


def test_keywords_hold_for_every_broker() -> None:
    keywords = {"userid": "u", "password": "s", "port": 9, "virtual_host": "v", "ssl": True}
    connection = Connection("amqp://a;amqp://b;amqp://w@c", heartbeat=3, **keywords)
    connection.maybe_switch_next()
    assert {name: getattr(connection, name) for name in keywords} == keywords
    connection.maybe_switch_next()
    assert (connection.userid, connection.password, connection.ssl) == ("w", "s", True)


def _first_bytes(broker: str) -> bytes:
    """Fail over from a broker that is not there; return what the one at %s gets first."""
    got: list[bytes] = []
    with scripted(lambda peer: got.append(peer.read(3))) as host:
        connection = Connection(broker % host, connect_timeout=20)
        with pytest.raises(connection.connection_errors):
            connection.connect()
        connection.close()
    return got[0]


@pytest.mark.parametrize(
    "brokers",
    [
        "amqp://127.0.0.1:1//;amqps://u:s@%s//",
        "amqps://127.0.0.1:1//;amqps://u:s@%s//",
        "amqps://127.0.0.1:1//;%s",
        "amqp://127.0.0.1:1//?ssl=1;amqp://u:s@%s//",
    ],
)
def test_failover_to_tls_sends_no_login_in_clear(brokers: str) -> None:
    # A TLS record of the type handshake.
    assert _first_bytes(brokers) == b"\x16\x03\x01"


def test_failover_from_tls_to_a_plain_broker() -> None:
    assert _first_bytes("amqps://127.0.0.1:1//;amqp://%s//") == b"AMQ"


@pytest.mark.parametrize("way", ["connect", "ensure_connection", "default_channel"])
def test_failover_to_another_transport(way: str) -> None:
    with Connection("amqp://127.0.0.1:1//;memory://") as connection:
        before = connection.transport
        found = getattr(connection, way)
        if callable(found):
            found()
        assert connection.connected
        assert (connection.transport.driver_type, before.client) == ("memory", None)
        with connection.SimpleBuffer("failover") as queue:
            queue.put(1)
            assert queue.get(timeout=10).payload == 1


def test_connection_of_a_broker_that_another_task_has_left_is_dropped() -> None:
    """One task goes over to the next broker while another one is still connecting to this one."""
    cls = make_transport()
    connection = Connection("loop-a;loop-b", transport=cls)
    made: list[Any] = []

    class Leaving(cls):  # type: ignore[misc,valid-type]
        def establish_connection(self) -> Any:
            made.append((self.client.hostname, super().establish_connection()))
            if len(made) == 1:
                connection.maybe_switch_next()
            return made[-1][1]

    connection.transport_cls = connection._given_transport = Leaving
    connection.connect()
    assert [host for host, _ in made] == ["loop-a", "loop-b"]
    assert connection.connection is made[1][1]
    assert not made[0][1].connected
    connection.close()


def test_list_and_alternates() -> None:
    assert Connection(["amqp://a", "amqp://b"]).alt == ["amqp://a", "amqp://b"]
    listed = Connection(["amqp://u:first@a;amqp://u:second@b", "amqp://c"])
    assert listed.alt == ["amqp://u:first@a", "amqp://u:second@b", "amqp://c"]
    assert listed.virtual_host == "/"
    assert "second" not in repr(listed)
    extra = Connection("amqp://a", alternates=["amqp://b", "amqp://c"])
    assert extra.alt == ["amqp://b", "amqp://c"]
    extra.maybe_switch_next()
    assert extra.hostname == "b"
    single = Connection("amqp://a")
    single.maybe_switch_next()
    assert (single.hostname, single.cycle) == ("a", None)


def test_clone_goes_on_from_where_the_original_is() -> None:
    connection = Connection("amqp://a;amqp://b;memory://c")
    connection.maybe_switch_next()
    for twin in (connection.clone(), pickle.loads(pickle.dumps(connection))):
        assert twin.hostname == "b"
        twin.maybe_switch_next()
        assert (twin.hostname, twin.transport_cls) == ("c", "memory")


def test_failover_strategies() -> None:
    def backwards(brokers: Any) -> Any:
        return iter(list(reversed(brokers)))

    connection = Connection("amqp://a;amqp://b;amqp://c", failover_strategy=backwards)
    order = []
    for _ in range(3):
        connection.maybe_switch_next()
        order.append(connection.hostname)
    assert order == ["b", "a", "c"]
    shuffled = Connection(
        "amqp://a;amqp://b;amqp://c?failover_strategy=x", failover_strategy="shuffle"
    )
    seen = set()
    for _ in range(9):
        shuffled.maybe_switch_next()
        seen.add(shuffled.hostname)
    assert seen == {"a", "b", "c"}
    assert Connection.failover_strategies["round-robin"] is itertools.cycle
    with pytest.raises(ValueError, match=r"nonsense.*round-robin, shuffle"):
        Connection("amqp://a", failover_strategy="nonsense")


def test_completes_cycle() -> None:
    three = Connection("a;b;c")
    assert [three.completes_cycle(n) for n in range(6)] == [False, False, True] * 2
    assert all(Connection("a").completes_cycle(n) for n in range(3))


def test_switch_closes_and_does_not_connect() -> None:
    connection, cls = connect_to()
    connection.connect()
    connection.switch("loop://v:w@other:9/x")
    assert not connection.connected
    assert (connection.hostname, connection.userid, connection.port) == ("other", "v", 9)
    assert cls.log == ["establish", "close_connection"]
    connection.connect()
    connection.close()


def test_connect_tries_each_broker_once() -> None:
    cls = make_transport(failures=2)
    connection = Connection("a;b;c", transport=cls)
    connection.connect()
    assert connection.hostname == "c"
    connection.close()
    cls.failures = 9
    with pytest.raises(OSError, match="no answer"):
        connection.connect()
    assert cls.failures == 6


def test_failover_waits_only_after_a_whole_round() -> None:
    cls = make_transport(failures=3)
    connection = Connection("a;b", transport=cls)
    told: list[tuple[str, float, str | None]] = []
    connection.ensure_connection(
        lambda exc, interval: told.append((str(exc), interval, connection.hostname)),
        interval_start=0.01,
        interval_step=0.01,
    )
    assert told == [
        ("no answer from a", 0, "a"),
        ("no answer from b", 0.01, "b"),
        ("no answer from a", 0, "a"),
    ]
    assert connection.hostname == "b"
    connection.close()


def test_tasks_that_share_a_failure_go_over_to_the_next_broker_once() -> None:
    cls = make_transport(failures=1, delay=0.02)
    connection = Connection("a;b;c", transport=cls)
    environment = get_environment()
    tasks = [environment.spawn(connection.connect) for _ in range(10)]
    for task in tasks:
        task.result(10)
    assert connection.hostname == "b"
    assert cls.log.count("establish") == 2
    connection.close()


def test_broker_that_refuses_says_nothing_about_the_next() -> None:
    class Refused(OSError):
        pass

    class Picky(LoopbackTransport):
        log: list[Any] = []  # noqa: RUF012
        connections: list[Any] = []  # noqa: RUF012
        recoverable_connection_errors = (TimeoutError,)

        def establish_connection(self) -> Any:
            if self.client.hostname == "a":
                raise Refused("wrong password")
            return super().establish_connection()

    connection = Connection("a;b", transport=Picky)
    connection.ensure_connection(max_retries=3)
    assert connection.hostname == "b"
    connection.close()
    # Alone, it is final, and keeps its type.
    with pytest.raises(Refused):
        Connection("a", transport=Picky).ensure_connection(max_retries=3, interval_start=0)


# -- ensure_connection


def test_b041_intervals_grow_up_to_the_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, _ = connect_to(failures=20)
    slept: list[float] = []
    monkeypatch.setattr(type(get_environment()), "sleep", lambda self, s: slept.append(s))
    told: list[float] = []
    connection.ensure_connection(errback=lambda exc, interval: told.append(interval))
    assert told == slept == [*range(2, 31, 2), 30, 30, 30, 30, 30]


def test_b042_max_retries() -> None:
    for retries, attempts in ((0, 1), (1, 2), (3, 4)):
        connection, cls = connect_to(failures=100)
        with pytest.raises(OperationalError, match="no answer") as caught:
            connection.ensure_connection(max_retries=retries, interval_start=0, interval_step=0)
        assert isinstance(caught.value.__cause__, OSError)
        assert cls.log.count("establish") == attempts
    connection, cls = connect_to(failures=50)
    connection.ensure_connection(max_retries=None, interval_start=0, interval_step=0)
    assert cls.log.count("establish") == 51
    connection.close()


def test_b043_error_itself_is_available() -> None:
    connection, _ = connect_to(failures=100)
    with pytest.raises(OSError, match="no answer") as caught:
        connection.ensure_connection(max_retries=0, reraise_as_library_errors=False)
    assert type(caught.value) is OSError
    with pytest.raises(OSError, match="no answer"):
        connection.connect()


def test_b044_callback_is_called_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    connection, _ = connect_to(failures=1)
    slept: list[float] = []
    monkeypatch.setattr(type(get_environment()), "sleep", lambda self, s: slept.append(s))
    called: list[int] = []
    connection.ensure_connection(interval_start=3, callback=lambda: called.append(1))
    assert len(called) == 3
    assert slept == [1, 1, 1]


def test_callback_that_raises_ends_the_wait() -> None:
    connection, _ = connect_to(failures=1)

    def stop() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        connection.ensure_connection(interval_start=300, callback=stop)


@pytest.mark.parametrize("retries", [None, 3, 1000])
def test_s22_deadline_spans_all_attempts(retries: int | None) -> None:
    connection, _ = connect_to(failures=10**6)
    started = time.monotonic()
    with pytest.raises(OperationalError):
        connection.ensure_connection(max_retries=retries, timeout=0.3)
    # Three retries would wait for twelve seconds and more.
    assert time.monotonic() - started < 8


def test_s22_deadline_of_the_task_shortens_connect_timeout() -> None:
    connection, cls = connect_to()
    seen: list[float | None] = []
    cls.on_connect = staticmethod(lambda: seen.append(connection.connect_timeout))
    connection.ensure_connection(timeout=2)
    connection.collect()
    with Deadline(1):
        connection.connect()
    connection.collect()
    connection.connect()
    assert 1 < (seen[0] or 0) <= 2
    assert 0 < (seen[1] or 0) <= 1
    assert seen[2] == 5
    assert dict(connection._info())["connect_timeout"] == 5
    connection.close()


def test_transport_options_say_how_often_the_default_channel_tries() -> None:
    cls = make_transport(failures=100)
    options = {"max_retries": 2, "interval_start": 0, "interval_step": 0}
    with pytest.raises(OperationalError):
        _ = Connection("h", transport=cls, transport_options=options).default_channel
    assert cls.log.count("establish") == 3
    with pytest.raises(OperationalError):
        _ = Connection("h", transport=cls).default_channel
    assert cls.log.count("establish") == 4
    started = time.monotonic()
    timed = Connection("h", transport=cls, transport_options={"connect_retries_timeout": 0.2})
    with pytest.raises(OperationalError):
        _ = timed.default_channel
    assert time.monotonic() - started < LONG


# -- ensure and autoretry


class Worker:
    """Something that is revived, and records it."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.channel: Any = None

    def revive(self, channel: Any) -> None:
        self.channel = channel
        self.log.append(("revive", channel.channel_id))


def failing(worker: Worker, *errors: BaseException) -> Any:
    left = list(errors)

    def fun(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Fail first."""
        worker.log.append("fun")
        if left:
            raise left.pop(0)
        return args, kwargs

    return fun


def test_b045_ensure_reconnects_revives_and_applies_again() -> None:
    connection, cls = connect_to()
    connection.connect()
    worker = Worker()
    ensured = connection.ensure(
        worker,
        failing(worker, OSError("lost")),
        errback=lambda exc, interval: worker.log.append((str(exc), interval)),
        on_revive=lambda channel: worker.log.append(("on_revive", channel.channel_id)),
    )
    assert ensured.__name__ == "fun(ensured)"
    assert ensured.__doc__ == "Fail first."
    assert ensured(1, a=2) == ((1,), {"a": 2})
    assert worker.log == ["fun", ("lost", 0), ("revive", 1), ("on_revive", 1), "fun"]
    assert cls.log == ["establish", "establish", "create_channel"]
    assert worker.channel is connection.default_channel
    connection.close()


def test_b046_ensure_retries_channel_errors() -> None:
    connection, cls = connect_to(
        recoverable_connection_errors=(OSError,), recoverable_channel_errors=(ValueError,)
    )
    worker = Worker()
    worker.channel = connection.channel()
    ensured = connection.ensure(worker, failing(worker, ValueError("refused")))
    assert ensured() == ((), {})
    # The channel is still good, so nothing was opened.
    assert worker.log == ["fun", "fun"]
    worker.channel.close()
    worker.log.clear()
    ensured = connection.ensure(worker, failing(worker, ValueError("refused")))
    assert ensured() == ((), {})
    assert worker.log[:1] + worker.log[2:] == ["fun", "fun"]
    assert worker.channel is connection.default_channel
    assert cls.log.count("establish") == 1
    connection.close()


def test_b042_ensure_max_retries() -> None:
    for retries in (0, 1, 3):
        connection, _ = connect_to()
        worker = Worker()
        ensured = connection.ensure(
            worker, failing(worker, *[OSError("x")] * 9), max_retries=retries
        )
        with pytest.raises(OperationalError, match="x") as caught:
            ensured()
        assert isinstance(caught.value.__cause__, OSError)
        assert worker.log.count("fun") == retries + 1
        connection.close()


@pytest.mark.parametrize(
    "call",
    [
        lambda c, wrong: c.Producer().publish("x", retry=True, retry_policy=wrong),
        lambda c, wrong: c.SimpleQueue("misspelt").put("x", retry=True, retry_policy=wrong),
        lambda c, wrong: c.Producer().maybe_declare(Exchange("misspelt"), retry=True, **wrong),
        lambda c, wrong: c.ensure(c, print, **wrong),
        lambda c, wrong: c.autoretry(print, **wrong),
    ],
    ids=["publish", "put", "maybe_declare", "ensure", "autoretry"],
)
def test_a_misspelt_option_of_a_retry_policy_is_named_with_the_right_ones(
    call: Callable[[Connection, dict[str, Any]], Any],
) -> None:
    with Connection("memory://") as connection, pytest.raises(TypeError) as caught:
        call(connection, {"max_retires": 1})
    text = str(caught.value)
    assert "'max_retires' (did you mean 'max_retries'?)" in text
    assert "Retrying" not in text
    known = signature(Connection.ensure).parameters
    named = set(text.partition("there are ")[2].split(", "))
    assert named == set(known) - {"self", "obj", "fun", "unknown"}


@pytest.mark.parametrize("policy", [[1], "max_retries", {"max_retries": "3"}], ids=repr)
def test_a_retry_policy_that_is_none_is_refused(policy: Any) -> None:
    with (
        Connection("memory://") as connection,
        pytest.raises(exceptions.ArgumentError, match=r"retry_policy|max_retries"),
    ):
        connection.Producer().publish("x", retry=True, retry_policy=policy)


@pytest.mark.parametrize(
    "url", ["MEMORY://h/v", "Memory://h/v", " memory://h/v", "memory://h/v \n"]
)
def test_neither_the_case_of_a_scheme_nor_white_space_around_a_url_means_anything(url: str) -> None:
    connection = Connection(url)
    assert (connection.transport_cls, connection.virtual_host) == ("memory", "v")
    assert connection.as_uri() == "memory://h/v"


def test_ensure_lets_other_errors_through() -> None:
    connection, _ = connect_to()
    worker = Worker()
    with pytest.raises(KeyError):
        connection.ensure(worker, failing(worker, KeyError()), max_retries=3)()
    with pytest.raises(ConnectionBlocked):
        connection.ensure(worker, failing(worker, ConnectionBlocked("alarm")), max_retries=3)()
    assert worker.log == ["fun", "fun"]


def test_ensure_retries_errors_that_were_named() -> None:
    connection, cls = connect_to()
    worker = Worker()
    named = connection.ensure(
        worker, failing(worker, KeyError(), KeyError()), retry_errors=[KeyError], max_retries=3
    )
    assert named() == ((), {})
    assert worker.log == ["fun"] * 3
    assert cls.log == []
    with pytest.raises(KeyError):
        connection.ensure(
            worker, failing(worker, *[KeyError()] * 5), retry_errors=[KeyError], max_retries=1
        )()


def test_ensure_covers_the_connect_inside_the_operation() -> None:
    connection, cls = connect_to(failures=2)
    worker = Worker()

    def publish() -> str:
        _ = connection.default_channel
        return "published"

    ensured = connection.ensure(
        worker, publish, max_retries=3, interval_start=0.01, interval_step=0
    )
    assert ensured() == "published"
    assert cls.log.count("establish") == 3
    connection.close()


def test_ensure_fails_when_the_reconnect_does() -> None:
    connection, cls = connect_to()
    connection.connect()
    cls.failures = 100
    worker = Worker()
    with pytest.raises(OperationalError, match="no answer"):
        connection.ensure(
            worker,
            failing(worker, OSError("lost")),
            max_retries=3,
            interval_start=0,
            interval_step=0,
        )()
    assert worker.log == ["fun"]
    assert cls.log.count("establish") == 5


def test_channel_that_fails_to_open_counts_as_a_failed_attempt() -> None:
    opened = itertools.count(1)

    def create_channel(self: Any, connection: Any) -> Any:
        if next(opened) < 3:
            connection.abort(OSError("lost again"))
            raise OSError("lost again")
        return LoopbackTransport.create_channel(self, connection)

    connection, _ = connect_to(create_channel=create_channel)
    worker = Worker()
    assert connection.ensure(worker, failing(worker, OSError("lost")), max_retries=5)() == ((), {})
    assert worker.log == ["fun", ("revive", 1), "fun"]
    connection.close()


def test_s22_ensure_ends_at_its_deadline() -> None:
    connection, cls = connect_to()
    worker = Worker()
    cls.failures = 10**6
    started = time.monotonic()
    with pytest.raises(OperationalError):
        connection.ensure(worker, failing(worker, OSError("lost")), timeout=0.3)()
    assert time.monotonic() - started < LONG  # and not for ever


def test_ensure_without_limit_does_not_spin() -> None:
    connection, _ = connect_to()
    worker = Worker()
    started = time.monotonic()
    with pytest.raises(OperationalError):
        connection.ensure(
            worker, failing(worker, *[OSError("always")] * 10**4), interval_start=0.1, timeout=0.4
        )()
    assert time.monotonic() - started < LONG
    assert worker.log.count("fun") < 12


def test_b047_autoretry_gives_result_and_channel() -> None:
    connection, _ = connect_to()
    seen: list[Any] = []

    def fun(number: int, channel: Any = None) -> int:
        seen.append(channel)
        if len(seen) == 1:
            raise OSError("lost")
        return number * 2

    first = connection.channel()
    assert connection.autoretry(fun, first, max_retries=3)(4) == (8, connection.default_channel)
    assert seen[0] is first
    assert seen[1] is connection.default_channel
    seen.clear()
    result, channel = connection.autoretry(fun)(5)
    assert result == 10
    assert channel is seen[1] is connection.default_channel
    connection.close()


def test_library_errors() -> None:
    connection, _ = connect_to()
    for error, kind in (
        (OSError("o"), OperationalError),
        (ValueError("v"), OperationalError),
        (KeyError("k"), KeyError),
        (OperationalError("p"), OperationalError),
    ):
        with pytest.raises(kind) as caught, connection._reraise_as_library_errors():
            raise error
        if kind is OperationalError and error is not caught.value:
            assert caught.value.__cause__ is error


# -- what the transport says


def test_heartbeats_are_left_to_the_hub_under_green_threads() -> None:
    asked: list[float] = []
    cls = make_transport(
        implements=Transport.implements.extend(heartbeats=True),
        get_heartbeat_interval=lambda self, connection: 7,
        heartbeat_check=lambda self, connection, rate=2: asked.append(rate),
    )
    connection = Connection("h", transport=cls, heartbeat=7)
    assert connection.supports_heartbeats is not get_environment().green
    assert connection.get_heartbeat_interval() == 7
    connection.heartbeat_check(rate=3)
    connection.heartbeat_check()
    assert asked == [3, 2]
    connection.close()
    connection.heartbeat_check()
    assert asked == [3, 2]


def test_questions_to_the_transport() -> None:
    connection, _ = connect_to()
    assert connection.is_evented is connection.requires_hub is False
    assert connection.supports_exchange_type("fanout")
    assert not connection.supports_exchange_type("carrier-pigeon")
    assert connection.qos_semantics_matches_spec is True
    assert connection.manager is connection.transport.manager
    assert connection.get_manager() is not connection.manager
    connection.register_with_event_loop(object())
    connection.close()


def test_channel_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("KOMBU_LOG_CHANNEL", "1")
    connection, _ = connect_to()
    with caplog.at_level(logging.DEBUG):
        channel = connection.channel()
        channel.close()
    assert "close" in caplog.text
    assert "connected to" in caplog.text
    connection.close()
