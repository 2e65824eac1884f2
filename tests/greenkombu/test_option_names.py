"""Transport options whose names are nearly right."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from greenkombu import Connection
from greenkombu._amqp.options import AMQPOptions
from greenkombu.transport import _option_names
from greenkombu.transport.pyamqp import _ARGUMENTS
from greenkombu.transport.redis import Channel
from greenkombu.transport.virtual import base as virtual


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_option_names, "_told", set())


@pytest.mark.parametrize("url", ["redis://localhost", "amqp://localhost", "memory://"])
def test_a_misspelt_option_is_told_once(caplog: pytest.LogCaptureFixture, url: str) -> None:
    for _ in range(2):
        _ = Connection(url, transport_options={"visibilty_timeout": 5}).transport
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    assert "'visibilty_timeout'" in told[0]
    assert "'visibility_timeout'" in told[0]


def test_options_of_others_and_of_the_program_are_nobodys_business(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Mine(virtual.Channel):
        from_transport_options = (*virtual.Channel.from_transport_options, "priority_stepz")

    class Transport(virtual.Transport):
        Channel = Mine

    options = {"region": "eu-1", "predefined_queues": {}, "max_retries": 3, "priority_stepz": 1}
    _ = Connection(transport=Transport, transport_options=options).transport
    assert not caplog.records


def test_every_option_of_our_transports_is_known() -> None:
    names = {field.name for field in dataclasses.fields(AMQPOptions)} | _ARGUMENTS
    parameters = {"password", "userid", "virtual_host"}  # of a connection, not misspelt by chance
    assert (names | set(Channel.from_transport_options)) - parameters <= _option_names.KNOWN
