"""The memory transport: one broker for the process, its exchanges and its queues."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Exchange, Queue
from greenkombu.exceptions import (
    ChannelError,
    NotEquivalentError,
    NotFoundError,
    UnroutableError,
)
from greenkombu.messaging import Producer
from greenkombu.transport import memory
from tests.greenkombu.memory.support import bodies, declare, put

# -- one broker for the process


def test_b162_connections_meet_on_one_broker(connection: Connection) -> None:
    with Connection("memory://") as other:
        queue = Queue("q", Exchange("e"), routing_key="k")
        queue(other.channel()).declare()
        Producer(connection).publish({"a": 1}, exchange="e", routing_key="k")
        message = queue(other.channel()).get()
        assert message.payload == {"a": 1}
        message.ack()
    assert memory.Transport.global_state is memory.broker.state
    assert memory.Channel.do_restore is False


def test_b156_the_queue_holds_base64(channel: Any) -> None:
    declare(channel)
    put(channel, b"\xff\x00")
    (raw,) = channel.queues["q"].queue
    assert raw["body"] == "/wA="
    assert raw["properties"]["body_encoding"] == "base64"
    assert channel.queues["q"].qsize() == 1
    assert not channel.queues["q"].empty()


def test_what_the_consumer_changes_is_its_own(channel: Any) -> None:
    channel.exchange_declare("f", "fanout")
    for name in "ab":
        declare(channel, name)
        channel.queue_bind(name, "f")
    headers = {"list": [1], "table": {"x": 1}}
    put(channel, exchange="f", headers=headers)
    a, b = channel.basic_get("a"), channel.basic_get("b")
    a.headers["list"].append(2)
    a.headers["table"]["x"] = 2
    a.properties["new"] = 1
    a.delivery_info["routing_key"] = "changed"
    assert b.headers == headers == {"list": [1], "table": {"x": 1}}
    assert "new" not in b.properties
    assert b.delivery_info == {"exchange": "f", "routing_key": "q"}
    assert a.delivery_tag != b.delivery_tag


def test_publishing_to_a_queue_that_is_not_there_is_dropped(channel: Any) -> None:
    put(channel, queue="never declared")
    assert "never declared" not in channel.queues
    assert channel.basic_get("never declared") is None
    assert channel.queue_purge("never declared") == 0
    assert channel.queue_delete("never declared") == 0


def test_consuming_from_a_queue_that_is_not_there_is_refused(channel: Any) -> None:
    with pytest.raises(NotFoundError, match="no queue 'none' in vhost '/'") as caught:
        channel.basic_consume("none", callback=print)
    assert caught.value.reply_code == "404"
    with pytest.raises(NotFoundError, match="no queue 'none'"):
        channel.queue_bind("none", "e", "k")


def test_b128_passive_declarations_create_nothing(channel: Any) -> None:
    with pytest.raises(NotFoundError, match="no queue 'none'"):
        channel.queue_declare("none", passive=True)
    assert "none" not in channel.queues
    declare(channel)
    put(channel)
    channel.basic_consume("q", callback=print)
    assert channel.queue_declare("q", passive=True) == ("q", 1, 1)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("durable", True),
        ("auto_delete", True),
        ("arguments", {"x-message-ttl": 5}),
    ],
)
def test_declaring_a_queue_again_with_other_settings_is_refused(
    channel: Any, setting: str, value: Any
) -> None:
    settings = {"durable": False, "auto_delete": False, "arguments": None}
    channel.queue_declare("q", **settings)
    channel.queue_declare("q", **settings)
    channel.queue_declare("q")  # whatever it is
    with pytest.raises(NotEquivalentError, match=rf"queue 'q'.*{setting} is") as caught:
        channel.queue_declare("q", **{**settings, setting: value})
    assert isinstance(caught.value, ChannelError)
    channel.queue_declare("q", **settings)


@pytest.mark.parametrize(
    ("argument", "value", "reason"),
    [
        ("x-message-ttl", "soon", "must be an integer"),
        ("x-message-ttl", -1, "must be 0 or more"),
        ("x-expires", 0, "must be 1 or more"),
        ("x-max-length", True, "must be an integer"),
        ("x-max-priority", 256, "up to 255"),
        ("x-overflow", "explode", "use one of drop-head"),
        ("x-dead-letter-exchange", 5, "must be a string"),
        ("x-dead-letter-routing-key", "k", "needs x-dead-letter-exchange"),
    ],
)
def test_impossible_queue_arguments_are_refused(
    channel: Any, argument: str, value: Any, reason: str
) -> None:
    with pytest.raises(ChannelError, match=rf"{argument}' of queue 'q'.*{reason}") as caught:
        channel.queue_declare("q", arguments={argument: value})
    assert caught.value.reply_code == "406"
    assert "q" not in channel.queues


def test_kombu_queue_options_become_arguments(channel: Any) -> None:
    queue = Queue("q", expires=30, message_ttl=2, max_length=3, max_priority=4)(channel)
    queue.declare()
    policy = channel.queues["q"].policy
    assert (policy.expires_ms, policy.ttl_ms) == (30_000, 2_000)
    assert (policy.max_length, policy.max_priority) == (3, 4)


# -- exchanges


def test_b161_fanout_gives_each_queue_a_copy(channel: Any) -> None:
    channel.exchange_declare("f", "fanout")
    for name in "abc":
        declare(channel, name)
        channel.queue_bind(name, "f", name)
    put(channel, exchange="f", queue="whatever")
    assert [bodies(channel, name) for name in "abc"] == [[b"body"]] * 3


def test_b125_the_manuals_topic_example(channel: Any) -> None:
    channel.exchange_declare("t", "topic")
    declare(channel)
    channel.queue_bind("q", "t", "*.stock.#")
    for key in ("usd.stock", "eur.stock.db", "stock.nasdaq", "a.b.stock"):
        put(channel, key, exchange="t", queue=key)
    assert bodies(channel) == [b"usd.stock", b"eur.stock.db"]


def test_exchanges_can_be_bound_to_exchanges(channel: Any) -> None:
    for name in ("a", "b", "c"):
        channel.exchange_declare(name, "topic")
        declare(channel, f"q{name}")
        channel.queue_bind(f"q{name}", name, "#")
    channel.exchange_bind("b", "a", "x.#")
    channel.exchange_bind("c", "b", "#")
    channel.exchange_bind("a", "c", "#")  # a circle
    put(channel, b"1", "x.y", "a")
    put(channel, b"2", "other", "a")
    assert bodies(channel, "qa") == [b"1", b"2"]
    assert bodies(channel, "qb") == bodies(channel, "qc") == [b"1"]
    channel.exchange_unbind("b", "a", "x.#")
    put(channel, b"3", "x.y", "a")
    assert bodies(channel, "qb") == []
    with pytest.raises(NotFoundError, match="no exchange 'none'"):
        channel.exchange_bind("none", "a")
    with pytest.raises(NotFoundError, match="no exchange 'none'"):
        channel.exchange_bind("a", "none")


def test_the_alternate_exchange_takes_what_matches_nothing(channel: Any) -> None:
    channel.exchange_declare("alt", "fanout")
    channel.exchange_declare("e", "direct", arguments={"alternate-exchange": "alt"})
    declare(channel)
    declare(channel, "rest")
    channel.queue_bind("q", "e", "k")
    channel.queue_bind("rest", "alt")
    put(channel, b"1", "k", "e")
    put(channel, b"2", "other", "e")
    assert (bodies(channel, "q"), bodies(channel, "rest")) == ([b"1"], [b"2"])


def test_an_auto_delete_exchange_goes_with_its_last_binding(channel: Any) -> None:
    channel.exchange_declare("e", auto_delete=True)
    declare(channel)
    channel.queue_bind("q", "e", "a")
    channel.queue_bind("q", "e", "b")
    channel.queue_unbind("q", "e", "a")
    assert channel.get_exchanges() == ["e"]
    channel.queue_delete("q")
    assert channel.get_exchanges() == []


def test_b082_confirmed_mandatory_messages_raise() -> None:
    with Connection("memory://", transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        with pytest.raises(UnroutableError, match="NO_ROUTE"):
            channel.basic_publish(channel.prepare_message(b""), "", "none", mandatory=True)
        assert memory.Transport.implements.confirms


# -- exclusive and auto_delete queues


def test_an_exclusive_queue_is_its_connections_own(connection: Connection, channel: Any) -> None:
    with Connection("memory://") as other:
        theirs = other.channel()
        theirs.queue_declare("q", exclusive=True)
        put(channel)  # anybody may publish
        assert other.channel().basic_get("q").body == b"body"
        for operation in (
            lambda: channel.queue_declare("q"),
            lambda: channel.queue_declare("q", passive=True),
            lambda: channel.basic_get("q"),
            lambda: channel.basic_consume("q", callback=print),
            lambda: channel.queue_bind("q", "e"),
            lambda: channel.queue_purge("q"),
            lambda: channel.queue_delete("q"),
        ):
            with pytest.raises(ChannelError, match=r"queue 'q'.*exclusive") as caught:
                operation()
            assert caught.value.reply_code == "405"
        theirs.close()
        assert "q" in channel.queues
        other.close()
    assert "q" not in channel.queues


def test_s19_the_exclusive_queue_of_a_dropped_connection_goes(channel: Any) -> None:
    def use() -> None:
        Connection("memory://").channel().queue_declare("q", exclusive=True)

    use()
    gc.collect()
    assert "q" not in channel.queues


def test_a_connection_does_not_keep_exclusive_queues_that_were_deleted(channel: Any) -> None:
    """A client of an RPC makes one for each call, over a connection that stays."""
    name = channel.queue_declare("", exclusive=True).queue
    deleted = weakref.ref(channel.queues[name])
    channel.queue_delete(name)
    gc.collect()
    assert deleted() is None


def test_an_auto_delete_queue_goes_with_its_last_consumer(
    connection: Connection, channel: Any
) -> None:
    channel.queue_declare("q", auto_delete=True)
    channel.queue_declare("q", auto_delete=True)
    other = connection.channel()
    channel.basic_consume("q", callback=print, consumer_tag="a")
    other.basic_consume("q", callback=print, consumer_tag="a")
    channel.basic_cancel("a")
    assert "q" in channel.queues
    other.close()
    assert "q" not in channel.queues


def test_a_deleted_queue_takes_no_message_back(channel: Any) -> None:
    declare(channel)
    put(channel)
    message = channel.basic_get("q")
    channel.queue_delete("q")
    declare(channel)
    message.requeue()
    assert bodies(channel) == []


def test_a_consumer_goes_on_when_its_queue_is_made_again(
    connection: Connection, channel: Any
) -> None:
    declare(channel)
    got: list[Any] = []
    channel.basic_consume("q", True, got.append)
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    channel.queue_delete("q")
    declare(channel)
    put(channel)
    connection.drain_events(timeout=10)
    assert len(got) == 1
