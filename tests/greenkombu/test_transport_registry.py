from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from greenkombu import transport
from greenkombu.connection import Connection
from greenkombu.exceptions import InvalidURL, KombuError, TransportNotFound, UnsupportedOperation
from greenkombu.transport.base import (
    Implements,
    Management,
    StdChannel,
    Transport,
    default_transport_capabilities,
    to_rabbitmq_queue_arguments,
)
from tests.support.loopback import LoopbackTransport
from tests.support.patched import ROOT

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ

LOOPBACK = "tests.support.loopback"


@pytest.mark.parametrize("path", [f"{LOOPBACK}:LoopbackTransport", f"{LOOPBACK}.LoopbackTransport"])
def test_b016_class_path_finds_class(path: str) -> None:
    assert transport.get_transport_cls(path) is LoopbackTransport
    assert transport.resolve_transport(path) is LoopbackTransport
    assert Connection(transport=path).get_transport_cls() is LoopbackTransport


def test_b016_class_is_its_own_transport() -> None:
    assert transport.get_transport_cls(LoopbackTransport) is LoopbackTransport
    assert isinstance(Connection(transport=LoopbackTransport).transport, LoopbackTransport)


def test_b016_alias_of_the_program_finds_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transport.TRANSPORT_ALIASES, "loopback", f"{LOOPBACK}:LoopbackTransport")
    assert Connection("loopback://").get_transport_cls() is LoopbackTransport
    assert Connection(transport="loopback").get_transport_cls() is LoopbackTransport


def test_b224_none_means_default_and_classes_are_cached() -> None:
    assert transport.DEFAULT_TRANSPORT == "amqp"
    first = transport.get_transport_cls()
    assert first is transport.get_transport_cls("amqp")
    assert issubclass(first, Transport)


def test_b016_unknown_alias_names_the_nearest() -> None:
    with pytest.raises(TransportNotFound) as caught:
        transport.get_transport_cls("memmory")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, KombuError)
    assert str(caught.value) == "No such transport: memmory.  Did you mean memory?"


def test_unknown_alias_without_a_near_one_lists_all() -> None:
    with pytest.raises(TransportNotFound, match=r"Known: amqp, .*memory"):
        transport.get_transport_cls("qqqqqqqq")


def test_path_to_nothing_is_a_typed_error() -> None:
    with pytest.raises(TransportNotFound, match=r"no\.such\.module"):
        transport.get_transport_cls("no.such.module:Class")
    with pytest.raises(TransportNotFound, match="has no Missing"):
        transport.get_transport_cls(f"{LOOPBACK}:Missing")


def test_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A transport of ours whose driver is not installed.
    (tmp_path / "needy.py").write_text("import a_driver_that_is_not_installed\n")
    import greenkombu.transport

    monkeypatch.setattr(
        greenkombu.transport, "__path__", [*greenkombu.transport.__path__, str(tmp_path)]
    )
    monkeypatch.setitem(
        transport.TRANSPORT_ALIASES, "needy", "greenkombu.transport.needy:Transport"
    )
    with pytest.raises(TransportNotFound, match=r"Install greenkombu\[needy\]") as caught:
        transport.get_transport_cls("needy")
    assert "a_driver_that_is_not_installed" in str(caught.value)


@pytest.mark.parametrize("given", ["os.path:join", "tests.support.loopback:LoopbackChannel", 5])
def test_what_is_no_transport_class_is_refused(given: Any) -> None:
    with pytest.raises(TransportNotFound, match=f"{given}.* is not a transport class|not {given}"):
        Connection(transport=given).connect()


SCHEMES = ["os.path:join", "tests.support.loopback:LoopbackTransport", "antigravity.x"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_s31_scheme_that_is_a_path_is_refused(scheme: str) -> None:
    sys.modules.pop("antigravity", None)
    with pytest.raises(transport.InvalidScheme, match="Invalid transport scheme") as caught:
        Connection(f"{scheme}://host")
    assert isinstance(caught.value, TransportNotFound)
    assert isinstance(caught.value, InvalidURL)
    assert isinstance(caught.value, ValueError)
    assert "antigravity" not in sys.modules


def test_s31_alternate_that_is_a_path_is_refused() -> None:
    with pytest.raises(TransportNotFound):
        Connection("amqp://a;antigravity.x://b")
    with pytest.raises(TransportNotFound):
        Connection("amqp://a").switch("antigravity.x://b")
    assert "antigravity" not in sys.modules


def test_unknown_scheme_is_found_when_the_connection_is_made() -> None:
    with pytest.raises(TransportNotFound, match="Did you mean amqp"):
        Connection("ampq://host")


def announce(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Install a distribution that announces a transport."""
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[greenkombu.transports]\n{name} = {LOOPBACK}:LoopbackTransport\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()


def test_entry_point_of_another_distribution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    announce(monkeypatch, tmp_path, "elsewhere")
    assert transport.get_transport_cls("elsewhere") is LoopbackTransport
    assert Connection("elsewhere://h").get_transport_cls() is LoopbackTransport
    with pytest.raises(TransportNotFound, match="Did you mean elsewhere"):
        transport.get_transport_cls("elsewhare")


@pytest.fixture
def c_library_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which nobody has asked for the C library yet."""
    monkeypatch.setattr(transport, "_standing_in", set())


@pytest.mark.usefixtures("c_library_names")
@pytest.mark.parametrize("alias", sorted(transport.C_LIBRARY_ALIASES))
def test_b192_our_own_transport_stands_in_for_the_c_library(
    rabbitmq: PrivateRabbitMQ, caplog: pytest.LogCaptureFixture, alias: str
) -> None:
    with (
        caplog.at_level("INFO", "greenkombu.transport"),
        Connection(rabbitmq.url.replace("amqp://", f"{alias}://", 1)) as connection,
    ):
        queue = connection.SimpleBuffer("")
        queue.put("x")
        assert queue.get(timeout=10).payload == "x"
        assert connection.channel().basic_get(queue.queue.name) is None
        assert type(connection.transport) is transport.get_transport_cls("amqp")
    told = [record for record in caplog.records if alias in record.getMessage()]
    assert [record.levelname for record in told] == ["INFO"]


@pytest.mark.usefixtures("c_library_names")
@pytest.mark.parametrize("binding", ["librabbitmq", "pylibrabbitmq"])
@pytest.mark.parametrize("alias", sorted(transport.C_LIBRARY_ALIASES))
def test_the_bare_binding_of_the_c_library_is_no_transport(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    binding: str,
    alias: str,
) -> None:
    (tmp_path / binding).mkdir()
    (tmp_path / binding / "__init__.py").write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for _ in range(2):
        found = transport.get_transport_cls(alias)
        assert found is transport.get_transport_cls("amqp")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"package {binding} is installed" in caplog.text
    assert "block every green thread" in caplog.text
    assert f"entry point {alias} of greenkombu.transports" in caplog.text


@pytest.mark.parametrize("announced", [False, True])
def test_kombus_class_path_of_the_c_library_means_what_its_name_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    if announced:
        announce(monkeypatch, tmp_path, "librabbitmq")
    script = (
        "import logging, sys\n"
        "logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from greenkombu.connection import Connection\n"
        "path = 'greenkombu.transport.librabbitmq:Transport'\n"
        "print(Connection('h', transport=path).get_transport_cls().__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    *told, name = done.stdout.splitlines()
    assert name == ("LoopbackTransport" if announced else "Transport")
    assert len(told) == (0 if announced else 1), told


@pytest.mark.usefixtures("c_library_names")
def test_a_transport_on_the_c_library_goes_before_our_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    announce(monkeypatch, tmp_path, "librabbitmq")
    assert transport.get_transport_cls("librabbitmq") is LoopbackTransport
    assert Connection("librabbitmq://h").get_transport_cls() is LoopbackTransport
    # What the program itself says goes first.
    own = "greenkombu.transport.memory:Transport"
    monkeypatch.setitem(transport.TRANSPORT_ALIASES, "librabbitmq", own)
    assert transport.get_transport_cls("librabbitmq") is transport.get_transport_cls("memory")


@pytest.mark.parametrize("alias", sorted(transport.TRANSPORT_ALIASES))
def test_b033_every_transport_says_what_it_is(alias: str) -> None:
    from greenkombu.exceptions import StdChannelError

    cls = transport.get_transport_cls(alias)
    instance = cls(Connection(transport=alias))
    assert issubclass(StdChannelError, instance.channel_errors)
    assert all(issubclass(each, BaseException) for each in instance.connection_errors)
    assert cls.can_parse_url is (alias in transport.URL_PARSING_ALIASES)
    assert transport.parses_urls(alias) is cls.can_parse_url
    assert set(default_transport_capabilities) <= set(instance.implements)
    assert instance.driver_type != "N/A"


def test_import_brings_in_nothing_that_a_program_may_still_patch() -> None:
    script = (
        "import sys, greenkombu, hub\n"
        "names = {'socket', 'ssl', 'select', 'threading'} & set(sys.modules)\n"
        "assert not names, names\n"
        "from greenkombu.connection import Connection\n"
        "Connection('amqp://a;memory://b')\n"
        "names = {'socket', 'ssl', 'select', 'amqp', 'gevent', 'eventlet'} & set(sys.modules)\n"
        "assert not names, names\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names_are_exact() -> None:
    import greenkombu

    for name in greenkombu.__all__:
        assert getattr(greenkombu, name) is not None
    assert set(greenkombu.__all__) <= set(dir(greenkombu))
    assert greenkombu.BrokerConnection is greenkombu.Connection
    with pytest.raises(AttributeError):
        greenkombu.no_such_name  # noqa: B018


# -- transport.base


def test_features_by_item_and_attribute() -> None:
    features = Implements(default_transport_capabilities, exchange_type=frozenset({"direct"}))
    assert features.direct is True
    assert features.fanout is False
    assert features.heartbeats is features["heartbeats"] is False
    more = features.extend(ttl=True)
    assert (more.ttl, features.ttl) == (True, False)
    with pytest.raises(AttributeError, match="nonsense"):
        features.nonsense  # noqa: B018
    with pytest.raises(UnsupportedOperation, match="memory transport has no dead letter"):
        features.require("dead_letter", "memory")
    more.require("ttl", "memory")


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("establish_connection", ()),
        ("close_connection", (None,)),
        ("create_channel", (None,)),
        ("close_channel", (None,)),
        ("drain_events", (None,)),
        ("as_uri", ("x",)),
    ],
)
def test_what_a_transport_does_not_implement_raises_a_typed_error(
    method: str, args: tuple[Any, ...]
) -> None:
    with pytest.raises(UnsupportedOperation, match=f"does not implement {method}") as caught:
        getattr(Transport(None), method)(*args)
    assert isinstance(caught.value, NotImplementedError)


def test_defaults_of_a_transport() -> None:
    base = Transport(None)
    assert base.driver_version() == "N/A"
    assert base.default_connection_params == {}
    assert base.get_heartbeat_interval(None) == 0
    assert base.supports_heartbeats is base.supports_ev is False
    assert base.qos_semantics_matches_spec(None) is True
    assert isinstance(base.manager, Management)
    assert base.manager is base.manager
    with pytest.raises(UnsupportedOperation):
        base.manager.get_bindings()
    with pytest.raises(UnsupportedOperation):
        StdChannel().get_bindings()
    assert StdChannel().prepare_queue_arguments({"a": 1}, expires=2) == {"a": 1}


def test_queue_options_become_rabbitmq_arguments() -> None:
    assert to_rabbitmq_queue_arguments(
        {"a": 1},
        expires=2.5,
        message_ttl=3,
        max_length=4,
        max_length_bytes="5",
        max_priority=6,
    ) == {
        "a": 1,
        "x-expires": 2500,
        "x-message-ttl": 3000,
        "x-max-length": 4,
        "x-max-length-bytes": 5,
        "x-max-priority": 6,
    }
    assert to_rabbitmq_queue_arguments(None, expires=None) == {}
    with pytest.raises(KeyError):
        to_rabbitmq_queue_arguments({}, unknown=1)
