"""The base classes, used as a transport of somebody else uses them: on a store that is pulled."""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Iterator
from queue import Empty
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.exceptions import (
    BodyTooLarge,
    ChannelClosedError,
    ChannelError,
    ConnectionClosedError,
    EncodeError,
    NestingTooDeep,
    NotEquivalentError,
    NotFoundError,
    ResourceError,
    StaleDeliveryError,
    UnroutableError,
    UnsupportedOperation,
)
from greenkombu.transport import virtual
from greenkombu.transport.virtual.channel import MAX_MESSAGE_SIZE
from hub.environment import Environment
from tests.greenkombu.virtual.store import Channel, Transport


@pytest.fixture
def connection() -> Iterator[Connection]:
    with Connection(transport=Transport) as made:
        yield made


@pytest.fixture
def channel(connection: Connection) -> Any:
    channel = connection.channel()
    channel.queue_declare("q")
    return channel


def put(channel: Any, body: Any = b"body", queue: str = "q", **kwargs: Any) -> None:
    channel.basic_publish(channel.prepare_message(body, **kwargs), "", queue)


# -- bodies


def test_b156_bodies_are_base64_in_the_store(channel: Any) -> None:
    put(channel, b"\xff\x00")
    raw = channel._get("q")
    assert raw["body"] == "/wA="
    assert raw["properties"]["body_encoding"] == "base64"
    assert channel.message_to_python(raw).body == b"\xff\x00"


def test_b156_a_message_without_the_property_decodes(channel: Any) -> None:
    put(channel, "text")
    raw = channel._get("q")
    raw["body"] = "plain"
    del raw["properties"]["body_encoding"]
    assert channel.message_to_python(raw).body == b"plain"


@pytest.mark.parametrize("off", [None, False])
def test_b156_the_option_body_encoding_switches_it_off(off: object) -> None:
    with Connection(transport=Transport, transport_options={"body_encoding": off}) as connection:
        channel = connection.channel()
        put(channel, "text")
        raw = channel._get("q")
        assert raw["body"] == "text"
        assert channel.message_to_python(raw).body == b"text"


def test_b156_codecs_can_be_added(connection: Connection) -> None:
    class Reversed:
        def encode(self, s: Any) -> Any:
            return s[::-1]

        decode = encode

    class Own(Channel):
        codecs = {**Channel.codecs, "reversed": Reversed()}  # noqa: RUF012
        body_encoding = "reversed"

    class OwnTransport(Transport):
        Channel = Own

    with Connection(transport=OwnTransport) as own:
        channel = own.channel()
        put(channel, "abc")
        raw = channel._get("q")
        assert raw["body"] == "cba"
        assert channel.message_to_python(raw).body == b"abc"
        raw["properties"]["body_encoding"] = "rot13"
        message = channel.message_to_python(raw)
        assert message.delivery_tag
        with pytest.raises(Exception, match="no body encoding 'rot13'; known are base64, reversed"):
            message.decode()
        channel.body_encoding = "rot13"
        with pytest.raises(EncodeError, match="rot13"):
            put(channel, "abc")


def test_b120_serializable_can_be_stored_and_rebuilt(channel: Any) -> None:
    import json

    for body in ("text", b"\xff\x00"):
        for encoding in ("base64", None):
            channel.body_encoding = encoding
            put(channel, body, headers={"h": 1}, properties={"correlation_id": "c"})
            message = channel.basic_get("q")
            stored = json.loads(json.dumps(message.serializable()))
            again = channel.message_to_python(stored)
            assert again.body == message.body
            assert again.delivery_tag == message.delivery_tag
            assert again.headers == {"h": 1}
            assert again.properties["correlation_id"] == "c"
            assert again.delivery_info == message.delivery_info
            message.ack()
    assert message.MessageStateError is virtual.Message.MessageStateError


@pytest.mark.parametrize("garbage", [b"\x00garbage", "text", 5, None, [], {}, {"properties": 1}])
def test_s27_what_is_no_message_is_an_error_of_that_message_alone(
    channel: Any, garbage: Any
) -> None:
    channel.queues["q"].append(garbage)
    put(channel)
    message = channel.basic_get("q")
    with pytest.raises(Exception, match="not a message of a virtual transport"):
        message.decode()
    message.reject()
    assert channel.basic_get("q").body == b"body"


def test_s27_a_broken_body_is_an_error_of_that_message_alone(channel: Any) -> None:
    put(channel, headers={"compression": "application/x-gzip"})
    channel.queues["q"][0]["body"] = "A"  # incorrect padding
    message = channel.basic_get("q")
    with pytest.raises(Exception, match="not base64"):
        message.decode()
    assert message.headers == {"compression": "application/x-gzip"}
    message.requeue()
    assert channel._size("q") == 1


# -- limits


def test_s31_a_body_above_the_limit_is_refused(channel: Any) -> None:
    assert channel.max_message_size == MAX_MESSAGE_SIZE
    channel.max_message_size = 10
    with pytest.raises(BodyTooLarge, match=r"routing key 'q' has 11 bytes, more than the 10"):
        put(channel, b"x" * 11)
    put(channel, b"x" * 10)
    assert channel._size("q") == 1


def test_s31_headers_nested_too_deep_are_refused(channel: Any) -> None:
    headers: Any = {}
    for _ in range(100_000):
        headers = {"h": [headers]}
    with pytest.raises(NestingTooDeep):
        put(channel, headers=headers)
    assert channel._size("q") == 0
    while headers:  # taking it apart by garbage collection would recurse
        headers = headers["h"].pop()


def test_a_body_that_is_not_serialized_is_refused(channel: Any) -> None:
    with pytest.raises(EncodeError, match="bytes or str, not list"):
        put(channel, [1, 2])


def test_publishing_leaves_the_message_as_it_is(channel: Any) -> None:
    message = channel.prepare_message(b"body", headers={"h": [1]}, properties={"p": 1})
    channel.basic_publish(message, "", "q")
    channel.basic_publish(message, "", "q")
    first, second = channel.basic_get("q"), channel.basic_get("q")
    assert first.body == second.body == b"body"
    assert first.delivery_tag != second.delivery_tag
    first.headers["h"].append(2)
    assert second.headers == message["headers"] == {"h": [1]}


# -- exchanges


def test_b158_declaring_again_with_other_settings_is_refused(channel: Any) -> None:
    channel.exchange_declare("e", "direct", durable=True)
    channel.exchange_declare("e", "direct", durable=True)
    with pytest.raises(NotEquivalentError) as caught:
        channel.exchange_declare("e", "topic", durable=True)
    assert "'e'" in str(caught.value)
    assert "type is 'direct' and not 'topic'" in str(caught.value)
    assert caught.value.reply_code == "406"
    assert isinstance(caught.value, ChannelError)
    assert channel.state.exchanges["e"]["type"] == "direct"
    assert not channel.closed


def test_a_type_that_does_not_exist_is_named(channel: Any) -> None:
    with pytest.raises(UnsupportedOperation, match=r"store transport has no exchange type 'x-no'"):
        channel.exchange_declare("e", "x-no")


def test_b128_passive_declarations_create_nothing(channel: Any) -> None:
    with pytest.raises(NotFoundError, match="no exchange 'none'") as caught:
        channel.exchange_declare("none", passive=True)
    assert caught.value.reply_code == "404"
    channel.exchange_declare("e")
    channel.exchange_declare("e", passive=True)
    assert channel.get_exchanges() == ["e"]


def test_b159_deleting_drops_bindings(channel: Any) -> None:
    channel.exchange_declare("e")
    channel.queue_bind("q", "e", "k")
    channel.queue_declare("r")
    channel.queue_bind("r", "e", "k")
    assert set(channel.list_bindings()) == {("q", "e", "k"), ("r", "e", "k")}
    channel.queue_delete("q")
    channel.basic_publish(channel.prepare_message(b""), "e", "k")
    assert (channel._size("q"), channel._size("r")) == (0, 1)
    channel.exchange_delete("e")
    channel.exchange_delete("e")
    assert list(channel.list_bindings()) == []
    assert not channel.state.bindings
    channel.basic_publish(channel.prepare_message(b""), "e", "k")
    assert channel._size("r") == 1


def test_b130_unbind(channel: Any) -> None:
    channel.exchange_declare("e", "topic")
    channel.queue_bind("q", "e", "a.#")
    channel.queue_bind("q", "e", "a.#")
    assert len(list(channel.get_table("e"))) == 1
    channel.queue_unbind("q", "e", "a.#")
    channel.queue_unbind("q", "e", "never")
    channel.basic_publish(channel.prepare_message(b""), "e", "a.b")
    assert channel._size("q") == 0


def test_binding_to_a_missing_exchange_is_refused(channel: Any) -> None:
    with pytest.raises(NotFoundError, match="no exchange 'none' in vhost '/'"):
        channel.queue_bind("q", "none", "k")


def test_b131_deleting_what_is_in_use_or_not_empty_is_refused(channel: Any) -> None:
    put(channel)
    with pytest.raises(ChannelError, match=r"queue 'q'.*not empty: it has 1 messages") as caught:
        channel.queue_delete("q", if_empty=True)
    assert caught.value.reply_code == "406"
    channel.basic_consume("q", callback=print)
    with pytest.raises(ChannelError, match=r"queue 'q'.*in use: it has 1 consumers"):
        channel.queue_delete("q", if_unusued=True)
    channel.exchange_declare("e")
    channel.queue_bind("q", "e", "k")
    with pytest.raises(ChannelError, match=r"exchange 'e'.*1 bindings"):
        channel.exchange_delete("e", if_unused=True)
    assert channel.queue_delete("q") == 1


def test_b161_fanout_without_support_is_refused_when_published(channel: Any) -> None:
    channel.exchange_declare("f", "fanout")
    channel.queue_bind("q", "f")
    with pytest.raises(NotImplementedError, match="store transport has no exchange type 'fanout'"):
        channel.basic_publish(channel.prepare_message(b""), "f", "")
    assert "fanout" not in Transport.implements.exchange_type


def test_b126_headers_exchange(channel: Any) -> None:
    channel.exchange_declare("h", "headers")
    channel.queue_bind("q", "h", "", {"x-match": "all", "a": 1})
    channel.queue_declare("r")
    channel.queue_bind("r", "h", "", {"x-match": "any", "a": 1, "b": 2})
    channel.queue_bind("r", "h", "", {"c": 3})
    for headers, expected in (
        ({"a": 1}, (1, 1)),
        ({"b": 2}, (0, 1)),
        ({"c": 3}, (0, 1)),
        ({"d": 4}, (0, 0)),
    ):
        channel.basic_publish(channel.prepare_message(b"", headers=headers), "h", "")
        assert (channel.queue_purge("q"), channel.queue_purge("r")) == expected
    channel.queue_unbind("r", "h", "", {"c": 3})
    channel.basic_publish(channel.prepare_message(b"", headers={"c": 3}), "h", "")
    assert channel._size("r") == 0


def test_an_exchange_type_of_ones_own(connection: Connection) -> None:
    class FirstLetter(virtual.exchange.ExchangeType):
        type = "first-letter"

        def lookup(self, table: Any, exchange: str, routing_key: str, default: Any) -> Any:
            return [queue for key, _, queue in table if key[0] == routing_key[0]] or default

    class Own(Channel):
        exchange_types = {**Channel.exchange_types, "first-letter": FirstLetter}  # noqa: RUF012

    class OwnTransport(Transport):
        Channel = Own

    with Connection(transport=OwnTransport) as own:
        channel = own.channel()
        channel.exchange_declare("e", "first-letter")
        channel.queue_bind("q", "e", "apple")
        channel.basic_publish(channel.prepare_message(b""), "e", "anything")
        channel.basic_publish(channel.prepare_message(b""), "e", "other")
        assert channel._size("q") == 1


# -- what cannot be delivered


def test_b155_undeliverable_messages_are_dropped_by_default(channel: Any) -> None:
    channel.exchange_declare("e")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        channel.basic_publish(channel.prepare_message(b""), "e", "k")
        channel.basic_publish(channel.prepare_message(b""), "never declared", "k")
    assert not any(channel.queues.values())


def test_b155_the_deadletter_queue_takes_them_with_a_warning() -> None:
    with Connection(
        transport=Transport, transport_options={"deadletter_queue": "ae.undeliver"}
    ) as connection:
        channel = connection.channel()
        channel.exchange_declare("e")
        with pytest.warns(virtual.UndeliverableWarning, match="exchange 'e' using binding key 'k'"):
            channel.basic_publish(channel.prepare_message(b"lost"), "e", "k")
        assert channel.basic_get("ae.undeliver").body == b"lost"


def test_b082_mandatory_messages_come_back_in_the_task_that_drains(
    connection: Connection, channel: Any
) -> None:
    came_back: list[Any] = []
    channel.exchange_declare("e")
    channel.events["basic_return"].add(lambda *args: came_back.append(args))
    channel.basic_publish(channel.prepare_message(b"body"), "e", "k", mandatory=True)
    assert not came_back
    connection.drain_events(timeout=10)
    ((error, exchange, routing_key, message),) = came_back
    assert isinstance(error, UnroutableError)
    assert error.reply_code == 312
    assert (exchange, routing_key, message.body) == ("e", "k", b"body")


def test_with_confirms_a_mandatory_message_without_a_queue_raises() -> None:
    with Connection(transport=Transport, transport_options={"confirm_publish": True}) as connection:
        channel = connection.channel()
        channel.exchange_declare("e")
        with pytest.raises(UnroutableError, match=r"NO_ROUTE.*exchange 'e' with routing key 'k'"):
            channel.basic_publish(channel.prepare_message(b""), "e", "k", mandatory=True)


# -- polling


def test_b157_the_polling_interval_is_the_time_between_two_looks(env: Environment) -> None:
    assert virtual.Transport.polling_interval == 1.0
    options = {"polling_interval": 0.1}
    with Connection(transport=Transport, transport_options=options) as connection:
        assert connection.transport.polling_interval == 0.1
        channel = connection.channel()
        got: list[Any] = []
        channel.basic_consume("q", True, got.append)

        def looks() -> int:
            before = Channel.gets
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.55)
            return Channel.gets - before

        assert any(3 <= looks() <= 7 for _ in range(5))  # not where the machine stands still
        put(channel)  # the store tells nobody
        connection.drain_events(timeout=20)
        assert len(got) == 1


def test_a_store_that_notifies_needs_no_polling(env: Environment) -> None:
    with Connection(transport=Transport, transport_options={"polling_interval": 60}) as connection:
        channel, got = connection.channel(), []
        channel.basic_consume("q", True, got.append)

        def notify() -> None:
            env.sleep(0.05)
            put(channel)
            channel.notify("q")
            channel.notify("a queue that nobody knows")

        task = env.spawn(notify)
        connection.drain_events(timeout=10)
        assert len(got) == 1
        task.join(5)


def test_nobody_polls_while_nobody_drains(env: Environment) -> None:
    with Connection(transport=Transport) as connection:
        channel = connection.channel()
        channel.basic_consume("q", True, print)
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.01)
        env.sleep(0.1)
        before = Channel.gets
        env.sleep(0.3)
        assert Channel.gets == before


def test_other_tasks_run_while_one_waits(ticker: Any, connection: Connection) -> None:
    channel = connection.channel()
    channel.basic_consume("q", True, print)
    ticker.reset()
    for _ in range(5):  # one is enough for sixty ticks, unless the machine stands still
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.3)
        if ticker.ticks > 20:
            break
    assert ticker.ticks > 20


def test_an_error_of_the_store_reaches_the_drain_and_the_consumer_stays(
    connection: Connection, channel: Any
) -> None:
    got: list[Any] = []
    channel.basic_consume("q", True, got.append)
    real, failing = channel._get, [OSError("the store is down")]

    def get(queue: str, timeout: float | None = None) -> Any:
        if failing:
            raise failing.pop()
        return real(queue)

    channel._get = get
    put(channel)
    with pytest.raises(OSError, match="the store is down"):
        connection.drain_events(timeout=10)
    connection.drain_events(timeout=10)
    assert len(got) == 1


# -- fairness and channels


def test_b160_queues_have_equal_chances(connection: Connection, channel: Any) -> None:
    order: list[str] = []
    for name in "abc":
        for _ in range(3):
            put(channel, queue=name)
        channel.basic_consume(name, True, lambda message: order.append(message.queue))
    for _ in range(9):
        connection.drain_events(timeout=10)
    assert order == list("abcabcabc")


def test_one_channel_alone_can_be_drained(connection: Connection, channel: Any) -> None:
    other, got = connection.channel(), []
    channel.basic_consume("q", True, got.append)
    other.basic_consume("r", True, got.append)
    put(channel)
    put(channel, queue="r")
    channel.drain_events()
    assert [message.queue for message in got] == ["q"]
    with pytest.raises(Empty):
        channel.drain_events()
    seen: list[Any] = []
    connection.transport.cycle.get(lambda raw, queue: seen.append(queue))
    assert seen == ["r"]


def test_b038_channel_ids_are_unique_and_used_again(connection: Connection) -> None:
    channels = [connection.channel() for _ in range(5)]
    assert len({channel.channel_id for channel in channels}) == 5
    freed = channels[2].channel_id
    channels[2].close()
    assert connection.channel().channel_id == freed
    assert len(connection.transport.channels) == 5


def test_too_many_channels_are_refused() -> None:
    class Small(Transport):
        channel_max = 3

    with Connection(transport=Small) as connection:
        channels = [connection.channel() for _ in range(3)]
        with pytest.raises(ResourceError, match="No free channel ids, current=3, channel_max=3"):
            connection.channel()
        channels[0].close()
        connection.channel()


def test_b039_the_channel_knows_its_connection(connection: Connection, channel: Any) -> None:
    assert channel.connection.client is connection
    assert channel.connection.transport is connection.transport
    assert channel.connection.channels[channel.channel_id] is channel


def test_b040_a_channel_may_be_closed_several_times(channel: Any) -> None:
    channel.close()
    channel.close()
    assert channel.closed


@pytest.mark.parametrize(
    "operation",
    [
        lambda channel: channel.exchange_declare("e"),
        lambda channel: channel.queue_declare("q"),
        lambda channel: channel.queue_bind("q", "e", "k"),
        lambda channel: channel.queue_delete("q"),
        lambda channel: channel.queue_purge("q"),
        lambda channel: put(channel),
        lambda channel: channel.basic_get("q"),
        lambda channel: channel.basic_consume("q", callback=print),
        lambda channel: channel.basic_qos(0, 1),
        lambda channel: channel.basic_ack("tag"),
        lambda channel: channel.basic_reject("tag"),
        lambda channel: channel.basic_recover(requeue=True),
        lambda channel: channel.drain_events(),
    ],
)
def test_a_closed_channel_says_so(connection: Connection, channel: Any, operation: Any) -> None:
    channel.close()
    with pytest.raises(ChannelClosedError, match=rf"channel {channel.channel_id} is closed"):
        operation(channel)
    channel = connection.channel()
    connection.close()
    with pytest.raises(ConnectionClosedError):
        operation(channel)


def test_b163_channels_leave_no_cycles(connection: Connection) -> None:
    def use() -> Any:
        channel = connection.channel()
        channel.exchange_declare("e", "topic")
        channel.queue_bind("q", "e", "#")
        channel.basic_consume("q", callback=lambda message: None)
        channel.basic_qos(0, 1)
        put(channel)
        connection.drain_events(timeout=10)
        channel.close()
        return weakref.ref(channel)

    gc.collect()
    gc.disable()
    try:
        assert use()() is None
    finally:
        gc.enable()


def test_b163_a_thousand_channels_leave_nothing(connection: Connection) -> None:
    def use() -> None:
        channel = connection.channel()
        channel.basic_consume("q", callback=print)
        channel.basic_get("q")
        channel.close()

    use()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(1000):
        use()
    gc.collect()
    assert len(gc.get_objects()) - before < 100


# -- stores that know more, or less


class Broadcasting(Channel):
    """Keeps bindings in the store, and broadcasts by itself, as Kombu's redis does."""

    supports_fanout = True
    tables: dict[str, list[Any]]
    heard: list[Any]

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str | None, queue: str) -> None:
        type(self).tables.setdefault(exchange, []).append((routing_key, pattern, queue))

    def get_table(self, exchange: str) -> Any:
        return list(type(self).tables[exchange])

    def _put_fanout(
        self, exchange: str, message: Any, routing_key: str | None = None, **kwargs: Any
    ) -> None:
        type(self).heard.append((exchange, message["body"]))


class BroadcastingTransport(Transport):
    Channel = Broadcasting


@pytest.fixture
def broadcasting() -> Iterator[Any]:
    Broadcasting.tables = {}
    Broadcasting.heard = []
    with Connection(transport=BroadcastingTransport) as connection:
        yield connection.channel()


@pytest.mark.parametrize(
    ("kind", "key", "sent", "headers"),
    [
        ("direct", "a", {"a": True, "a.b": False}, {}),
        ("topic", "a.#", {"a": True, "a.b": True, "b": False}, {}),
        ("headers", "", {"a": True}, {"h": 1}),
        ("headers", "", {"a": False}, {"h": 2}),
    ],
)
def test_bindings_may_be_kept_in_the_store(
    broadcasting: Any, kind: str, key: str, sent: dict[str, bool], headers: dict[str, Any]
) -> None:
    broadcasting.exchange_declare("e", kind)
    broadcasting.queue_bind("q", "e", key, {"h": 1} if kind == "headers" else None)
    for routing_key, arrives in sent.items():
        message = broadcasting.prepare_message(b"", headers=headers)
        broadcasting.basic_publish(message, "e", routing_key)
        assert broadcasting.queue_purge("q") == int(arrives)
    broadcasting.basic_publish(broadcasting.prepare_message(b""), "missing", "a")
    assert broadcasting.queue_purge("q") == 0
    broadcasting.exchange_delete("e")
    broadcasting.exchange_delete("missing")


def test_b161_a_store_that_broadcasts_gets_the_message_once(broadcasting: Any) -> None:
    broadcasting.exchange_declare("f", "fanout")
    for name in "qr":
        broadcasting.queue_bind(name, "f")
    message = broadcasting.prepare_message("text")
    broadcasting.basic_publish(message, "f", "", mandatory=True)
    assert Broadcasting.heard == [("f", "dGV4dA==")]
    assert not any(broadcasting.queues.values())


def test_rejected_messages_are_dead_lettered(channel: Any) -> None:
    channel.exchange_declare("dlx", "fanout" if channel.supports_fanout else "topic")
    channel.queue_declare("dead")
    channel.queue_bind("dead", "dlx", "#")
    channel.queue_declare("q", arguments={"x-dead-letter-exchange": "dlx"})
    put(channel)
    channel.basic_get("q").reject()
    message = channel.basic_get("dead")
    assert message.body == b"body"
    assert message.headers["x-death"][0]["queue"] == "q"
    message.reject()
    assert not any(channel.queues.values())


@pytest.mark.parametrize(
    "argument", ["x-message-ttl", "x-expires", "x-max-length", "x-max-length-bytes"]
)
def test_a_queue_cannot_have_rules_that_nobody_follows(channel: Any, argument: str) -> None:
    with pytest.raises(UnsupportedOperation, match=rf"store transport has no .*'r'.*{argument}"):
        channel.queue_declare("r", arguments={argument: 10})
    channel.queue_declare("r", arguments={"x-unknown": 10})
    # Kombu's options are dropped where they mean nothing, as in Kombu.
    assert channel.prepare_queue_arguments({"a": 1}, expires=5) == {"a": 1}


def test_without_a_place_at_the_head_messages_return_by_their_routing() -> None:
    class Plain(Channel):
        _restore_at_beginning = virtual.Channel._restore_at_beginning

    class PlainTransport(Transport):
        Channel = Plain

    with Connection(transport=PlainTransport) as connection:
        channel = connection.channel()
        channel.exchange_declare("e")
        for name in "qr":
            channel.queue_bind(name, "e", "k")
        channel.basic_publish(channel.prepare_message(b"1"), "e", "k")
        channel.basic_get("q").requeue()
        assert (channel._size("q"), channel._size("r")) == (1, 1)
        # Where it is not known which queue it came from, it goes to all of its routing.
        raw = channel._get("q")
        channel._requeue(None, raw, None)
        assert (channel._size("q"), channel._size("r")) == (1, 2)


def test_a_message_that_cannot_be_made_goes_back(connection: Connection, channel: Any) -> None:
    got: list[Any] = []
    channel.basic_consume("q", callback=got.append)
    put(channel)
    make, failing = channel._make_message, [RuntimeError("out of memory, say")]

    def fail_once(*args: Any) -> Any:
        if failing:
            raise failing.pop()
        return make(*args)

    channel._make_message = fail_once
    with pytest.raises(RuntimeError, match="out of memory"):
        connection.drain_events(timeout=10)
    connection.drain_events(timeout=10)
    assert len(got) == 1
    failing.append(RuntimeError("again"))
    put(channel)
    with pytest.raises(RuntimeError, match="again"):
        channel.basic_get("q")
    assert channel._size("q") == 1


def test_a_reply_queue_goes_with_its_reply(channel: Any) -> None:
    put(channel)
    channel.after_reply_message_received("q")
    assert channel._size("q") == 0


@pytest.mark.parametrize(
    ("priority", "expected", "reverse"),
    [(0, 0, 9), (3, 3, 6), (99, 9, 0), (-5, 0, 9), ("x", 0, 9), (None, 0, 9), ("7", 7, 2)],
)
def test_the_priority_of_a_stored_message(
    channel: Any, priority: Any, expected: int, reverse: int
) -> None:
    message = {"properties": {"priority": priority}}
    assert channel._get_message_priority(message) == expected
    assert channel._get_message_priority(message, reverse=True) == reverse
    assert channel._get_message_priority({"properties": {}}) == 0


def test_a_channel_that_cannot_close_does_not_keep_the_others_open() -> None:
    connection = Connection(transport=Transport)
    first, second = connection.channel(), connection.channel()
    inner = connection.connection
    put(second)
    second.basic_get("q")

    def fail() -> None:
        raise OSError("the store is down")

    first._close_consuming = fail
    with pytest.raises(OSError, match="the store is down"):
        inner.close()
    assert first.closed
    assert second.closed
    assert second._size("q") == 1
    assert not inner.connected
    inner.close()
    connection.close()


def test_an_aborted_connection_does_not_ask_the_store(channel: Any) -> None:
    put(channel)
    channel.basic_consume("q", callback=print)
    channel.connection.deliver()
    inner = channel.connection
    before = Channel.gets
    inner.abort(OSError("the network is down"))
    assert channel.closed
    assert Channel.gets == before
    assert channel._size("q") == 0
    with pytest.raises(OSError, match="the network is down"):
        inner.deliver()
    with pytest.raises(OSError, match="the network is down"):
        inner._claim_channel_id()


def test_many_empty_queues_do_not_stop_other_tasks(
    ticker: Any, connection: Connection, channel: Any, env: Environment
) -> None:
    for number in range(2000):
        channel.basic_consume(f"empty{number}", True, print)
    slow = channel._get

    def get(queue: str, timeout: float | None = None) -> Any:
        until = time.perf_counter() + 0.0001
        while time.perf_counter() < until:
            pass
        return slow(queue)

    channel._get = get
    env.sleep(0.02)
    ticker.reset()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0)
    assert ticker.ticks >= 3
    # A poll takes longer than the time between two polls, and the drain ends all the same.
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.1)
    assert time.monotonic() - started < 10


def test_the_state_answers_as_kombus_does() -> None:
    state = virtual.BrokerState()
    state.binding_declare("q", "e", "k", {"a": 1})
    state.binding_declare("q", "e", "k", {"a": 2})
    state.binding_declare("q", "e", "l", None)
    assert state.has_binding("q", "e", "k")
    assert list(state.queue_bindings("q")) == [("e", "k", {"a": 1}), ("e", "l", None)]
    assert virtual.binding_key_t("q", "e", "k") in state.bindings
    assert "q" in state.queue_index
    state.binding_delete("q", "e", "k")
    state.binding_delete("none", "e", "k")
    assert not state.has_binding("q", "e", "k")
    state.queue_bindings_delete("q")
    state.queue_bindings_delete("q")
    assert not state.bindings
    state.exchanges["e"] = {}
    state.clear()
    assert not state.exchanges
    assert "0 exchanges" in repr(state)


# -- what base classes leave to transports


def test_what_a_store_does_not_have_is_named() -> None:
    class Nothing(virtual.Channel):
        pass

    class NothingTransport(virtual.Transport):
        Channel = Nothing

    with Connection(transport=NothingTransport) as connection:
        channel = connection.channel()
        with pytest.raises(NotImplementedError, match="Nothing has no _put"):
            put(channel)
        with pytest.raises(NotImplementedError, match="Nothing has no _get"):
            channel.basic_get("q")
        with pytest.raises(NotImplementedError, match="Nothing has no _purge"):
            channel.queue_purge("q")


def test_b100_flow_is_not_supported(channel: Any) -> None:
    with pytest.raises(NotImplementedError, match="do not support flow"):
        channel.flow(False)


def test_exchange_bindings_are_not_supported(channel: Any) -> None:
    with pytest.raises(NotImplementedError, match="store transport does not support exchange_bind"):
        channel.exchange_bind("a", "b")
    with pytest.raises(NotImplementedError, match="exchange_unbind"):
        channel.exchange_unbind("a", "b")


def test_a_consumer_tag_is_used_once(channel: Any) -> None:
    assert channel.basic_consume("q", callback=print, consumer_tag="t") == "t"
    with pytest.raises(ChannelError, match="tag 't' is in use on channel 1") as caught:
        channel.basic_consume("r", callback=print, consumer_tag="t")
    assert caught.value.reply_code == "530"
    channel.basic_cancel("t")
    channel.basic_consume("r", callback=print, consumer_tag="t")


def test_b103_without_a_tag_one_is_made(channel: Any) -> None:
    tags = {channel.basic_consume("q", True, print, tag) for tag in (None, "")}
    assert len(tags) == 2
    assert tags <= set(channel.no_ack_consumers)


def test_b107_cancelling_an_unknown_tag_is_no_error(channel: Any) -> None:
    channel.basic_cancel("unknown")


def test_b133_a_queue_without_a_name_gets_one(channel: Any) -> None:
    name, messages, consumers = channel.queue_declare("")
    assert name.startswith("amq.gen-")
    assert (messages, consumers) == (0, 0)
    assert channel.queue_declare(None).queue != name


def test_management_lists_bindings(connection: Connection, channel: Any) -> None:
    channel.exchange_declare("e")
    channel.queue_bind("q", "e", "k")
    manager = connection.transport.get_manager()
    assert manager.get_bindings() == [{"destination": "q", "source": "e", "routing_key": "k"}]
    manager.close()


def test_s26_a_delivery_of_a_closed_connection_is_stale(connection: Connection) -> None:
    channel = connection.channel()
    put(channel)
    message = channel.basic_get("q")
    connection.close()
    with pytest.raises(StaleDeliveryError, match=message.delivery_tag):
        message.ack()
    assert not message.acknowledged
