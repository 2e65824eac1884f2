"""What becomes of deliveries that nobody settled, on a store outside of the process's memory."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import textwrap
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest

from greenkombu.connection import Connection
from hub.environment import Environment
from tests.greenkombu.virtual.store import SHARED, SharedTransport
from tests.support.tasks import until

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def empty_store() -> None:
    SHARED.clear()


def open_channel(connection: Connection, *bodies: bytes) -> Any:
    channel = connection.channel()
    for body in bodies:
        channel.basic_publish(channel.prepare_message(body), "", "q")
    return channel


def left(queue: str = "q") -> list[str]:
    return [raw["body"] for raw in SHARED[queue]]


@pytest.fixture
def connection() -> Any:
    with Connection(transport=SharedTransport, transport_options={"body_encoding": None}) as made:
        yield made


def test_b153_closing_restores_in_order_and_once(connection: Connection) -> None:
    channel = open_channel(connection, "1", "2", "3", "4")
    taken = [channel.basic_get("q") for _ in range(3)]
    taken[1].ack()
    qos = channel.qos
    channel.close()
    assert left() == ["1", "3", "4"]
    assert [bool(raw.get("redelivered")) for raw in SHARED["q"]] == [True, True, False]
    qos.restore_unacked_once()
    assert left() == ["1", "3", "4"]
    again = connection.channel().basic_get("q")
    assert again.delivery_info["redelivered"] is True
    assert again.delivery_tag != taken[0].delivery_tag


@pytest.mark.parametrize("switch", ["do_restore", "restore_at_shutdown"])
def test_b153_restoring_can_be_switched_off(connection: Connection, switch: str) -> None:
    channel = open_channel(connection, "1")
    setattr(channel if switch == "do_restore" else channel.qos, switch, False)
    channel.basic_get("q")
    channel.close()
    assert left() == []


def test_b165_reject_and_recover(connection: Connection) -> None:
    channel = open_channel(connection, "1", "2", "3")
    first, second, _third = (channel.basic_get("q") for _ in range(3))
    first.reject()
    second.requeue()
    assert left() == ["2"]
    assert channel.basic_recover(requeue=True) == []
    assert left() == ["3", "2"]


def test_a_message_that_cannot_be_put_back_stays_unsettled(connection: Connection) -> None:
    channel = open_channel(connection, "1", "2")
    for _ in range(2):
        channel.basic_get("q")
    put_back = channel._restore_at_beginning

    def fail_for_one(message: Any) -> None:
        if message.body == b"1":
            raise OSError("the store is full")
        put_back(message)

    channel._restore_at_beginning = fail_for_one
    ((error, raw),) = channel.basic_recover(requeue=True)
    assert str(error) == "the store is full"
    assert raw["body"] == "1"
    assert left() == ["2"]
    (delivery,) = channel.qos._delivered.values()
    assert delivery[1]["body"] == "1"
    channel._restore_at_beginning = put_back


def test_what_cannot_be_put_back_at_the_end_is_written_down(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    channel = open_channel(connection, "1")
    channel.basic_get("q")

    def fail(message: Any) -> None:
        raise OSError("the store is down")

    channel._restore_at_beginning = fail
    stderr = io.StringIO()
    channel.qos.restore_unacked_once(stderr=stderr)
    assert "Restoring 1 unacknowledged message(s)" in stderr.getvalue()
    assert "Unable to restore 1 message(s)" in stderr.getvalue()
    assert "the store is down" in stderr.getvalue()
    (dump,) = tmp_path.iterdir()
    assert dump.stat().st_size


def test_restoring_is_said_in_the_log(
    connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    channel = open_channel(connection, "1")
    channel.basic_get("q")
    with caplog.at_level(logging.INFO, "greenkombu"):
        channel.close()
    assert "Restoring 1 unacknowledged message(s)" in caplog.text


def test_b153_deliveries_of_a_dropped_channel_return(env: Environment) -> None:
    def use() -> weakref.ref[Any]:
        options = {"body_encoding": None}
        connection = Connection(transport=SharedTransport, transport_options=options)
        channel = open_channel(connection, "1", "2", "3")
        channel.basic_get("q")
        channel.basic_get("q")
        return weakref.ref(channel)

    dropped = use()
    until(env, lambda: dropped() is None, collecting=True)
    until(env, lambda: len(left()) >= 3)
    assert left() == ["1", "2", "3"]


def test_b153_deliveries_return_at_exit(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import json, sys
        from greenkombu.connection import Connection
        from tests.greenkombu.virtual import store

        class Channel(store.Channel):
            def _restore_at_beginning(self, message):
                with open(sys.argv[1], "a") as file:
                    file.write(message.body.decode() + "\\n")

        class Transport(store.Transport):
            Channel = Channel

        connection = Connection(transport=Transport)
        channel = connection.channel()
        for body in ("1", "2", "3"):
            channel.basic_publish(channel.prepare_message(body), "", "q")
        channel.basic_get("q")
        channel.basic_get("q").ack()
        channel.basic_get("q")
        """
    )
    target = tmp_path / "restored"
    subprocess.run([sys.executable, "-c", script, str(target)], cwd=ROOT, timeout=60, check=True)
    assert sorted(target.read_text().split()) == ["1", "3"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_s17_a_child_puts_nothing_back(connection: Connection) -> None:
    channel = open_channel(connection, "1")
    channel.basic_get("q")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # eventlet warns at every fork
        pid = os.fork()
    if pid == 0:
        try:
            channel.qos.restore_unacked_once()
            channel.close()
            os.write(writing, b"%d" % len(SHARED["q"]))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    try:
        assert os.read(reading, 10) == b"0"
    finally:
        os.close(reading)
    channel.close()
    assert left() == ["1"]


def test_b152_whatever_is_appended_counts(connection: Connection) -> None:
    channel = connection.channel()
    qos = channel.QoS(channel, prefetch_count=3)
    for number in range(3):
        assert qos.can_consume()
        qos.append(number, f"tag{number}")
    assert not qos.can_consume()
    assert qos.get("tag1") == 1
    qos.ack("tag1")
    qos.ack("tag1")
    assert qos.can_consume()
    assert qos.can_consume_max_estimate() == 1
    qos._delivered.clear()


def test_get_returns_the_message_of_a_delivery(connection: Connection) -> None:
    channel = open_channel(connection, "1")
    message = channel.basic_get("q")
    again = channel.qos.get(message.delivery_tag)
    assert (again.body, again.queue) == (b"1", "q")
    message.ack()
    with pytest.raises(KeyError):
        channel.qos.get(message.delivery_tag)
    assert "0 unsettled" in repr(channel.qos)
