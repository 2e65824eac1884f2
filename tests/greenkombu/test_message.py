"""greenkombu.message: behaviours 116-120 and what happens to bodies that cannot be read."""

from __future__ import annotations

import gc
import itertools
import logging
import pickle
import weakref
import zlib
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.message import Message
from tests.support.recording import RecordingChannel

ACTIONS = ("ack", "reject", "requeue")


def make(channel: Any = None, body: Any = b'{"a": 1}', **kwargs: Any) -> Message:
    kwargs.setdefault("content_type", "application/json")
    kwargs.setdefault("content_encoding", "utf-8")
    return Message(body, delivery_tag=5, channel=channel, **kwargs)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(ACTIONS, ACTIONS)))
def test_b116_a_message_is_settled_once(first: str, second: str) -> None:
    channel = RecordingChannel()
    message = make(channel)
    assert not message.acknowledged
    getattr(message, first)()
    assert message.acknowledged
    with pytest.raises(
        Message.MessageStateError, match="already acknowledged with state"
    ) as caught:
        getattr(message, second)()
    assert isinstance(caught.value, exceptions.MessageStateError)
    assert "5" in str(caught.value)
    assert len(channel.calls) == 1


def test_b117_reject_discards_and_requeue_puts_back() -> None:
    channel = RecordingChannel()
    make(channel).reject()
    make(channel).requeue()
    make(channel).reject(requeue=True)
    make(channel).ack(multiple=True)
    assert channel.calls == [
        ("basic_reject", {0: 5, "requeue": False}),
        ("basic_reject", {0: 5, "requeue": True}),
        ("basic_reject", {0: 5, "requeue": True}),
        ("basic_ack", {0: 5, "multiple": True}),
    ]


@pytest.mark.parametrize("action", ACTIONS)
def test_a_failed_settling_can_be_repeated(action: str) -> None:
    method = "basic_ack" if action == "ack" else "basic_reject"
    channel = RecordingChannel(**{method: ConnectionResetError("gone")})
    message = make(channel)
    with pytest.raises(ConnectionResetError):
        getattr(message, action)()
    assert not message.acknowledged
    channel.failures.clear()
    getattr(message, action)()
    assert message.acknowledged


@pytest.mark.parametrize("action", ACTIONS)
def test_a_message_without_channel_cannot_be_settled(action: str) -> None:
    with pytest.raises(exceptions.MessageStateError, match="does not have a receiving channel"):
        getattr(make(), action)()


def test_ack_of_a_no_ack_consumer_says_nothing_to_the_broker() -> None:
    channel = RecordingChannel()
    channel.no_ack_consumers = {"tag"}
    message = make(channel, delivery_info={"consumer_tag": "tag"})
    message.ack()
    assert channel.calls == []
    make(channel, delivery_info={"consumer_tag": "other"}).ack()
    assert channel.names() == ["basic_ack"]


def test_b118_payload_decodes_once() -> None:
    message = make()
    assert message.decode() == {"a": 1}
    assert message.payload is message.payload
    assert message.payload is message.decode()


@pytest.mark.parametrize("body", [b"{}", b"[]", b"0", b"null", b'""'])
def test_b118_empty_payloads_are_cached_as_well(body: bytes) -> None:
    message = make(body=body)
    value = message.payload
    message.body = b'"something else"'
    assert message.payload is value


def test_b119_log_error_logs_and_does_not_raise(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("a.program")
    channel = RecordingChannel(
        basic_ack=ConnectionResetError("gone"), basic_reject=ConnectionResetError("gone")
    )
    message = make(channel)
    message.ack_log_error(logger, (OSError,))
    message.reject_log_error(logger, (OSError,), requeue=True)
    assert [(r.levelname, r.getMessage()[:14]) for r in caplog.records] == [
        ("CRITICAL", "Couldn't ack 5"),
        ("CRITICAL", "Couldn't rejec"),
    ]
    assert not message.acknowledged
    with pytest.raises(ConnectionResetError):
        message.ack_log_error(logger, (KeyError,))


def test_a_body_that_cannot_be_decompressed_is_kept_as_an_error() -> None:
    message = make(RecordingChannel(), body=b"not zlib", headers={"compression": "zlib"})
    assert message.body == b"not zlib"
    assert message.errors is not None
    ((kind, error, _),) = message.errors
    assert isinstance(error, kind)
    with pytest.raises(kind):
        _ = message.payload
    message.reject()
    assert message.acknowledged


def test_an_error_does_not_keep_its_message_alive() -> None:
    gc.disable()
    try:
        message = make(body=b"not zlib", headers={"compression": "zlib"})
        seen = weakref.ref(message)
        del message
        assert seen() is None
    finally:
        gc.enable()


def test_b083_compressed_bodies_are_expanded() -> None:
    message = make(
        body=zlib.compress(b'{"big": true}'), headers={"compression": "application/x-gzip"}
    )
    assert message.payload == {"big": True}


def test_s28_a_content_type_that_is_not_accepted_is_refused() -> None:
    message = make(
        body=pickle.dumps({"a": 1}),
        content_type="application/x-python-serialize",
        content_encoding="binary",
        accept={"application/json"},
    )
    with pytest.raises(exceptions.ContentDisallowed):
        message.decode()
    assert not message.acknowledged


def test_a_truncated_body_is_a_decode_error() -> None:
    with pytest.raises(exceptions.DecodeError):
        make(body=b'{"a": ').decode()


def test_text_bodies_are_encoded_on_arrival() -> None:
    assert make(body="\xe9", postencode="latin-1").body == b"\xe9"
    broken = make(body="\u20ac", postencode="latin-1")
    assert broken.body == "\u20ac"
    assert broken.errors


def test_the_mappings_belong_to_the_receiver() -> None:
    message = make()
    message.headers["retries"] = 3
    message.properties["seen"] = True
    message.delivery_info["redelivered"] = True
    assert make().headers == {}
    assert make().properties == {}
    assert make().delivery_info == {}


def test_repr_shows_state_and_size_and_no_body() -> None:
    message = make(RecordingChannel(), body=b'"secret"', delivery_info={"routing_key": "rk"})
    message.ack()
    shown = repr(message)
    assert "ACK" in shown
    assert "'body_length': 8" in shown
    assert "rk" in shown
    assert "secret" not in shown
