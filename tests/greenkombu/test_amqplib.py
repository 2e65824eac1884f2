"""greenkombu.transport.amqplib: the AMQP transport under Kombu 2's names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import amqp
import pytest

from greenkombu import Connection, Queue
from greenkombu.exceptions import UnsupportedOperation
from greenkombu.transport import amqplib, pyamqplib

PATH = "greenkombu.transport.pyamqplib.Transport"


@pytest.fixture
def bare(rabbitmq_vhost: str) -> Iterator[Connection]:
    parts = Connection(rabbitmq_vhost)
    made = Connection(
        hostname=parts.hostname,
        port=parts.port,
        userid=parts.userid,
        password=parts.password,
        virtual_host=parts.virtual_host,
        transport=PATH,
    )
    with made:
        yield made


def test_the_class_path_makes_the_old_transport(bare: Connection) -> None:
    bare.connect()
    assert pyamqplib.Transport is amqplib.Transport
    assert isinstance(bare.transport, amqplib.Transport)
    assert isinstance(bare.connection, amqplib.Connection)
    assert isinstance(bare.connection, amqp.Connection)
    assert bare.transport.is_alive(bare.connection)
    assert bare.transport.nb_keep_draining
    assert bare.transport.get_manager("h", 1, "u", "p") is not None


def test_the_hub_leaves_nothing_to_a_loop_of_the_programs_own(bare: Connection) -> None:
    bare.connect()
    assert bare.transport.eventmap(bare.connection) == {}
    bare.transport.on_poll_init(None)
    assert bare.transport.on_poll_start() == {}
    with pytest.raises(UnsupportedOperation, match=r"Connection\.blocked"):
        bare.connection.dispatch_method((10, 60), ("low on memory",), None)


def test_waiting_for_one_event_under_the_old_names(bare: Connection) -> None:
    seen: list[Any] = []
    with bare.Consumer(Queue("q"), callbacks=[lambda body, _: seen.append(body)], no_ack=True):
        bare.Producer().publish("a", routing_key="q")
        bare.connection.wait()
        bare.Producer().publish("b", routing_key="q")
        bare.connection.read_timeout(10)
        with pytest.raises(TimeoutError):
            bare.connection.read_timeout(0.01)
    assert seen == ["a", "b"]


def test_channels_by_number(bare: Connection) -> None:
    bare.connect()
    channel = bare.connection.channel(7)
    assert isinstance(channel, amqplib.Channel)
    assert channel.channel_id == 7
    assert bare.connection.channel(7) is channel
