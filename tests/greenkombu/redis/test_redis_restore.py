"""What is done with unacknowledged messages, those of strangers and broken ones among them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from greenkombu import Consumer, Exchange, Queue
from greenkombu.transport.redis._held import take
from greenkombu.transport.redis._restore import BROKEN, parse_unacked
from hub.environment import Environment
from tests.greenkombu.redis.support import Database, publish
from tests.support.tasks import until

MESSAGE: dict[str, Any] = {
    "body": "eA==",
    "content-type": "text/plain",
    "content-encoding": "utf-8",
    "headers": {"kept": [], "large": 2**70},
    "properties": {
        "body_encoding": "base64",
        "delivery_tag": "tag",
        "delivery_info": {"exchange": "e", "routing_key": "key"},
        "priority": 6,
    },
}


def leave(database: Database, tag: str, value: Any, age: float = 7200) -> None:
    """Leave an entry as a client does that was killed."""
    kept = value if isinstance(value, bytes) else json.dumps(value).encode()
    database.command("HSET", "unacked", tag, kept)
    database.command("ZADD", "unacked_index", time.time() - age, tag)


def restore(database: Database) -> None:
    database.connect().channel().qos.restore_visible(num=None)


# -- reading an entry


@settings(deadline=None)
@given(st.binary(max_size=60), st.text(max_size=20))
def test_what_is_no_json_is_found_again_byte_by_byte(payload: bytes, queue: str) -> None:
    """Whatever a stranger pushes is wrapped by the server, and comes out as it was."""
    value = b"[" + payload + b', "", ' + json.dumps(queue).encode() + b"]"
    message, raw, exchange, routing_key = parse_unacked(value)
    assert (exchange, routing_key) == ("", queue)
    if message is None:
        try:
            assert json.loads(raw) == json.loads(payload)
        except ValueError:
            assert raw == payload
    else:
        assert message == json.loads(payload)


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_nothing_that_is_no_entry_is_thrown_away(value: bytes) -> None:
    message, raw, _, routing_key = parse_unacked(value)
    if routing_key == BROKEN:
        assert (message, raw) == (None, value)


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"not json",
        b"5",
        b"null",
        b"[]",
        b'[{}, "e"]',
        b'[{}, "e", "k", 1]',
        b'[{}, "", null]',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_broken_entry_goes_to_a_queue_of_its_own(database: Database, value: bytes) -> None:
    # And blocks no older or younger one, as it does in Kombu.
    leave(database, "older", [MESSAGE, "", "q"], age=7300)
    leave(database, "broken", value)
    leave(database, "younger", [MESSAGE, "", "q"], age=7100)
    restore(database)
    assert database.command("LRANGE", BROKEN, 0, -1) == [value]
    assert database.keys() == ["q\x06\x166"]
    assert database.command("LLEN", "q\x06\x166") == 2


@pytest.mark.parametrize("payload", [b"", b"not json", b'", ""', b"\xff", b"[1, 2]", b'"text"'])
def test_what_a_stranger_has_pushed_comes_back_as_it_was(
    database: Database, payload: bytes
) -> None:
    database.command("LPUSH", "q", payload)
    connection = database.connect()
    channel = connection.channel()
    keys = connection.connection.keys.of("q")
    assert take(channel.taps, keys) is not None
    assert database.command("LLEN", "q") == 0
    for token in database.command("HKEYS", "unacked"):
        channel.qos.restore_by_tag(token.decode())
    assert database.command("LRANGE", "q", 0, -1) == [payload]
    channel.taps.tokens.clear()


# -- where it goes


def test_what_kombu_took_goes_to_every_queue_that_is_bound(database: Database) -> None:
    channel = database.connect().channel()
    exchange = Exchange("e", "topic")
    for name, key in {"q1": "a.#", "q2": "*.b", "other": "b.*"}.items():
        Queue(name, exchange, routing_key=key)(channel).declare()
    leave(database, "tag", [MESSAGE, "e", "a.b"])
    database.connect().channel().qos.restore_visible()
    assert database.keys("q*") == ["q1\x06\x166", "q2\x06\x166"]
    [raw] = database.command("LRANGE", "q1\x06\x166", 0, -1)
    message = json.loads(raw)
    assert message["headers"] == {**MESSAGE["headers"], "redelivered": True}
    assert message["properties"]["delivery_info"]["redelivered"] is True
    assert message["body"] == MESSAGE["body"]


@pytest.mark.parametrize("exchange", ["", None, "without-bindings"])
def test_without_bindings_it_goes_to_the_queue_of_its_key(
    database: Database, exchange: str | None
) -> None:
    leave(database, "tag", [MESSAGE, exchange, "q"])
    restore(database)
    assert database.keys() == ["q\x06\x166"]


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"headers": None, "properties": None},
        {"properties": {"delivery_info": None, "priority": "6"}},
        {"properties": {"priority": [1]}},
        {"headers": 5, "properties": 5},
        [],
        "text",
        None,
        5,
    ],
    ids=repr,
)
def test_a_strange_message_is_not_dropped(database: Database, message: Any) -> None:
    leave(database, "tag", [message, "", "q"])
    restore(database)
    [key] = database.keys()
    assert key in ("q", "q\x06\x166")
    assert database.command("LLEN", key) == 1


def test_an_entry_of_the_index_alone_is_removed(database: Database) -> None:
    database.command("ZADD", "unacked_index", 1, "acknowledged by somebody who died then")
    restore(database)
    assert database.keys() == []


def test_what_is_renewed_meanwhile_stays(database: Database) -> None:
    leave(database, "tag", [MESSAGE, "", "q"], age=0)
    restore(database)
    assert database.keys() == ["unacked", "unacked_index"]


def test_a_mutex_that_somebody_holds_is_respected(database: Database) -> None:
    leave(database, "tag", [MESSAGE, "", "q"])
    database.command("SET", "unacked_mutex", "somebody of Kombu", "PX", 60_000)
    restore(database)
    assert database.command("HLEN", "unacked") == 1
    database.command("DEL", "unacked_mutex")
    restore(database)
    assert database.keys() == ["q\x06\x166"]


def test_the_oldest_is_served_first(database: Database) -> None:
    for number in range(150):
        leave(database, f"tag{number}", [{**MESSAGE, "body": number}, "", "q"], 9000 - number)
    restore(database)
    restore(database)  # so many are looked at in one go
    raw = database.command("LRANGE", "q\x06\x166", 0, -1)
    assert [json.loads(each)["body"] for each in reversed(raw)] == list(range(150))


# -- by its tag


@pytest.mark.parametrize(("leftmost", "order"), [(False, "1023"), (True, "0231")])
def test_a_delivery_goes_back_by_its_tag(database: Database, leftmost: bool, order: str) -> None:
    connection = database.connect()
    publish(connection, "q", "1", "0", "2", "3")
    channel = connection.channel()
    first = Queue("q")(channel).get()
    channel.qos.restore_by_tag(first.delivery_tag, leftmost=leftmost)
    assert channel.unsettled == 0
    found = [Queue("q")(channel).get() for _ in order]
    assert "".join(message.payload for message in found) == order
    assert [message.payload for message in found if message.headers.get("redelivered")] == ["1"]
    first.ack()  # of no effect
    assert database.command("HLEN", "unacked") == 4


def test_what_somebody_else_took_goes_back_by_its_tag(database: Database) -> None:
    leave(database, "kombu's tag", [MESSAGE, "", "q"], age=0)
    qos = database.connect().channel().qos
    qos.restore_by_tag("unknown")
    qos.restore_by_tag("kombu's tag")
    assert database.keys() == ["q\x06\x166"]


def test_a_message_that_is_no_message_goes_to_who_asks_for_it(
    env: Environment, database: Database
) -> None:
    """What strangers push, and so what came back from being unacknowledged, is delivered."""
    for text in ("not json", "[]", "5"):
        database.command("LPUSH", "q", text)
    connection = database.connect()
    broken: list[Any] = []

    def on_decode_error(message: Any, error: Exception) -> None:
        broken.append(message.body)
        message.reject()
        del error

    channel = connection.channel()
    Consumer(channel, [Queue("q")], callbacks=[print], on_decode_error=on_decode_error).consume()

    def all_came() -> bool:
        try:
            connection.drain_events(timeout=0.05)
        except TimeoutError:
            pass
        return len(broken) == 3

    until(env, all_came)
    connection.close()
    assert database.keys() == []
