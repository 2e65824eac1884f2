"""greenkombu.entity and greenkombu.abstract: behaviours 122-137."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from greenkombu import exceptions
from greenkombu.abstract import MaybeChannelBound, Object
from greenkombu.entity import Exchange, Queue, binding, maybe_delivery_mode
from tests.support.recording import RecordingChannel

# -- declarations and binding


def operations(entity: Any, names: str) -> list[tuple[str, Callable[[], Any]]]:
    arguments: dict[str, tuple[Any, ...]] = {
        "Message": ("body",),
        "publish": ("body",),
        "cancel": ("tag",),
    }
    return [
        (name, lambda name=name: getattr(entity, name)(*arguments.get(name, ())))
        for name in names.split()
    ]


UNBOUND = [
    *(
        ("Exchange", *pair)
        for pair in operations(Exchange("e"), "declare delete publish Message bind_to unbind_from")
    ),
    *(
        ("Queue", *pair)
        for pair in operations(
            Queue("q"),
            "declare delete purge get consume cancel queue_declare queue_bind queue_unbind bind_to "
            "unbind_from unbind",
        )
    ),
]


@pytest.mark.parametrize(("kind", "name", "call"), UNBOUND, ids=[f"{k}.{n}" for k, n, _ in UNBOUND])
def test_b122_operations_need_a_channel(kind: str, name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(exceptions.NotBoundError) as caught:
        call()
    assert f"on {kind} not bound to a channel" in str(caught.value)
    if name not in ("queue_bind", "queue_unbind"):  # these two call the general ones
        assert f"Can't call {name} on {kind} not bound to a channel" in str(caught.value)
    assert "unbound" in str(caught.value)


def test_b122_declarations_pickle_unbound() -> None:
    exchange = Exchange("e", "topic", delivery_mode="transient", arguments={"alternate": "x"})
    queue = Queue(
        "q",
        exchange,
        "rk",
        expires=3,
        queue_arguments={"x-a": 1},
        binding_arguments={"b": 1},
        no_ack=True,
        alias="al",
    )
    bound = queue(RecordingChannel())
    for original in (exchange, queue, bound):
        again = pickle.loads(pickle.dumps(original))
        assert again == original
        assert not again.is_bound
        assert again.as_dict(recurse=True) == original.as_dict(recurse=True)
    several = Queue("s", bindings=[binding(exchange, "k1"), binding(exchange, "k2")])
    again = pickle.loads(pickle.dumps(several))
    assert {str(each) for each in again.bindings} == {"e->k1", "e->k2"}
    assert again.exchange is None


def test_b123_binding_gives_a_copy() -> None:
    channel = RecordingChannel()
    queue = Queue("q", Exchange("e"), "rk")
    bound = queue(channel)
    assert bound is not queue
    assert bound == queue
    assert hash(bound) == hash(queue)
    assert bound.is_bound
    assert bound.channel is channel
    assert bound.exchange is not None
    assert bound.exchange.is_bound
    assert not queue.is_bound
    assert queue.exchange is not None
    assert not queue.exchange.is_bound
    with pytest.raises(exceptions.NotBoundError):
        _ = queue.channel
    assert not copy.copy(bound).is_bound


def test_b123_maybe_bind_binds_once_and_in_place() -> None:
    first, second = RecordingChannel(), RecordingChannel()
    exchange = Exchange("e")
    assert exchange.maybe_bind(None) is exchange
    assert not exchange.is_bound
    assert exchange.maybe_bind(first) is exchange
    assert exchange.maybe_bind(second).channel is first
    assert Exchange("e", channel=second).channel is second


def test_b124_defaults() -> None:
    exchange, queue = Exchange("e"), Queue("q")
    assert (exchange.type, exchange.durable, exchange.auto_delete) == ("direct", True, False)
    assert (queue.durable, queue.exclusive, queue.auto_delete, queue.no_ack) == (
        True,
        False,
        False,
        False,
    )
    message = Exchange("e")(RecordingChannel()).Message("body")
    assert message["properties"] == {"delivery_mode": 2}
    assert Exchange("e", type="").type == "direct"


def test_b080_delivery_mode_aliases_become_numbers() -> None:
    assert Exchange("e", delivery_mode="transient").delivery_mode == 1
    assert Exchange("e", delivery_mode="persistent").delivery_mode == 2
    assert Exchange("e").delivery_mode is None
    assert maybe_delivery_mode(None) == 2
    assert maybe_delivery_mode(1) == 1
    with pytest.raises(KeyError, match=r"'bogus'.*persistent, transient") as caught:
        Exchange("e", delivery_mode="bogus")
    assert isinstance(caught.value, exceptions.KombuError)


def test_b127_exclusive_implies_auto_delete() -> None:
    assert Queue("q", exclusive=True).auto_delete


# -- what is sent


def test_b128_declare_declares_exchange_queue_and_binding() -> None:
    channel = RecordingChannel()
    queue = Queue("q", Exchange("e", "topic", durable=False), "rk", binding_arguments={"b": 1})
    assert queue(channel).declare() == "q"
    assert channel.calls == [
        (
            "exchange_declare",
            {
                "exchange": "e",
                "type": "topic",
                "durable": False,
                "auto_delete": False,
                "arguments": None,
                "nowait": False,
                "passive": False,
            },
        ),
        (
            "queue_declare",
            {
                "queue": "q",
                "passive": False,
                "durable": True,
                "exclusive": False,
                "auto_delete": False,
                "arguments": None,
                "nowait": False,
            },
        ),
        (
            "queue_bind",
            {
                "queue": "q",
                "exchange": "e",
                "routing_key": "rk",
                "arguments": {"b": 1},
                "nowait": False,
            },
        ),
    ]


def test_an_unbound_declaration_can_be_declared_on_a_given_channel() -> None:
    channel = RecordingChannel()
    queue = Queue("q", Exchange("e"), "rk")
    queue.declare(channel=channel)
    assert channel.names() == ["exchange_declare", "queue_declare", "queue_bind"]
    assert not queue.is_bound


def test_a_queue_without_exchange_is_declared_alone() -> None:
    channel = RecordingChannel()
    Queue("q", routing_key="rk")(channel).declare()
    assert channel.names() == ["queue_declare"]


@pytest.mark.parametrize(
    "exchange", [Exchange(""), Exchange("amq.direct"), Exchange("e", no_declare=True)]
)
def test_exchanges_of_the_broker_are_not_declared(exchange: Exchange) -> None:
    channel = RecordingChannel()
    exchange(channel).declare()
    assert channel.calls == []


def test_no_declare_leaves_the_queue_alone() -> None:
    channel = RecordingChannel()
    assert Queue("q", Exchange("e"), no_declare=True)(channel).declare() == "q"
    assert channel.calls == []


def test_passive_declaration() -> None:
    channel = RecordingChannel()
    Exchange("e", passive=True)(channel).declare()
    Exchange("e", passive=True)(channel).declare(passive=False)
    Queue("q")(channel).queue_declare(passive=True, nowait=True)
    assert [call["passive"] for _, call in channel.calls] == [True, False, True]
    assert channel.calls[-1][1]["nowait"] is True


def test_b131_delete_passes_its_conditions() -> None:
    channel = RecordingChannel()
    Queue("q")(channel).delete(if_unused=True, if_empty=True, nowait=True)
    Exchange("e")(channel).delete(if_unused=True)
    assert channel.calls == [
        ("queue_delete", {"queue": "q", "if_unused": True, "if_empty": True, "nowait": True}),
        ("exchange_delete", {"exchange": "e", "if_unused": True, "nowait": False}),
    ]


def test_options_become_arguments_of_the_broker() -> None:
    channel = RecordingChannel()
    queue = Queue(
        "q",
        queue_arguments={"mine": 1},
        expires=1.5,
        message_ttl=2,
        max_length=3,
        max_length_bytes=4,
        max_priority=5,
    )
    queue(channel).queue_declare()
    assert channel.called("prepare_queue_arguments") == [
        {
            0: {"mine": 1},
            "expires": 1.5,
            "message_ttl": 2.0,
            "max_length": 3,
            "max_length_bytes": 4,
            "max_priority": 5,
        }
    ]
    (declared,) = channel.called("queue_declare")
    assert declared["arguments"]["mine"] == 1
    assert declared["arguments"]["x-max_priority"] == 5
    assert queue.queue_arguments == {"mine": 1}, "the declaration is unchanged"


def test_quorum_queues_get_exactly_their_arguments() -> None:
    # A quorum queue refuses arguments that it does not know, even with a null value.
    channel = RecordingChannel()
    Queue("q", queue_arguments={"x-queue-type": "quorum"})(channel).queue_declare()
    (declared,) = channel.called("queue_declare")
    assert declared["arguments"] == {"x-queue-type": "quorum"}
    assert "prepare_queue_arguments" not in channel.names()


def test_b133_an_anonymous_queue_gets_the_name_of_the_broker() -> None:
    channel = RecordingChannel()
    queue = Queue("", Exchange("e"), "rk")(channel)
    assert queue.declare() == "amq.gen-1"
    assert queue.name == "amq.gen-1"
    assert channel.called("queue_bind")[0]["queue"] == "amq.gen-1"


def test_on_declared_gets_the_counts() -> None:
    seen: list[tuple[Any, ...]] = []
    queue = Queue("q", on_declared=lambda *args: seen.append(args))
    queue(RecordingChannel()).declare()
    assert seen == [("q", 3, 0)]


def test_b134_key_is_the_routing_key() -> None:
    assert Queue("video", exchange=Exchange("media"), key="video").routing_key == "video"
    assert Queue("video", routing_key="rk", key="video").routing_key == "rk"


def test_b130_unbind_removes_every_binding() -> None:
    channel = RecordingChannel()
    Queue("q", Exchange("e"), "rk", binding_arguments={"b": 1})(channel).unbind()
    assert channel.calls == [
        (
            "queue_unbind",
            {
                "queue": "q",
                "exchange": "e",
                "routing_key": "rk",
                "arguments": {"b": 1},
                "nowait": False,
            },
        )
    ]
    channel = RecordingChannel()
    several = [binding(Exchange("a"), "ka"), binding("b", "kb", {"x": 1}, {"u": 1})]
    Queue("q", bindings=several)(channel).unbind()
    unbound = {
        call["exchange"]: (call["routing_key"], call["arguments"])
        for call in channel.called("queue_unbind")
    }
    assert unbound == {"a": ("ka", None), "b": ("kb", {"u": 1})}


def test_bindings_to_several_exchanges() -> None:
    channel = RecordingChannel()
    queue = Queue("q", bindings=[binding(Exchange("a"), "ka"), binding(Exchange("b"), "kb")])
    queue(channel).declare()
    assert sorted(call["exchange"] for call in channel.called("exchange_declare")) == ["a", "b"]
    assert sorted(call["routing_key"] for call in channel.called("queue_bind")) == ["ka", "kb"]


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_bindings_in_the_place_of_the_exchange(kind: Callable[..., Any]) -> None:
    first, second = binding(Exchange("a"), "ka"), binding(Exchange("b"), "kb")
    queue = Queue("q", kind([first]), bindings=[second])
    assert queue.exchange is None
    assert queue.bindings == {first, second}
    assert Queue("q", kind()).exchange == Exchange("")


def test_bind_and_unbind_by_exchange_or_name() -> None:
    channel = RecordingChannel()
    queue, exchange = Queue("q")(channel), Exchange("to")(channel)
    for source in (Exchange("from"), "from"):
        queue.bind_to(source, "rk")
        queue.unbind_from(source, "rk")
        exchange.bind_to(source, "rk", {"a": 1})
        exchange.unbind_from(source, "rk")
    assert channel.names() == 2 * [
        "queue_bind",
        "queue_unbind",
        "exchange_bind",
        "exchange_unbind",
    ]
    assert channel.called("exchange_bind")[0] == {
        "destination": "to",
        "source": "from",
        "routing_key": "rk",
        "nowait": False,
        "arguments": {"a": 1},
    }
    assert {call["exchange"] for call in channel.called("queue_unbind")} == {"from"}


def test_b129_get_returns_a_message_or_none() -> None:
    from greenkombu.message import Message

    channel = RecordingChannel()
    queue = Queue("q", no_ack=True)(channel)
    assert queue.get() is None
    channel.ready.append(Message(b'{"a": 1}', 1, "application/json", "utf-8", channel=channel))
    message = queue.get(no_ack=False, accept=["json"])
    assert message.payload == {"a": 1}
    assert [call["no_ack"] for call in channel.called("basic_get")] == [True, False]


def test_s27_get_returns_a_message_that_cannot_be_decoded() -> None:
    from greenkombu.message import Message

    channel = RecordingChannel()
    broken = Message(
        b"x", 1, "application/json", "utf-8", headers={"compression": "zlib"}, channel=channel
    )
    channel.ready.append(broken)
    message = Queue("q")(channel).get()
    assert message.errors
    message.reject()
    assert channel.names() == ["basic_get", "basic_reject"]


def test_b103_no_tag_lets_the_broker_choose() -> None:
    channel = RecordingChannel()
    queue = Queue("q", consumer_arguments={"x-priority": 3})(channel)
    queue.consume(None, print)
    queue.consume("tag", print, no_ack=True, nowait=True, on_cancel=print)
    assert channel.calls == [
        (
            "basic_consume",
            {
                "queue": "q",
                "no_ack": False,
                "consumer_tag": "",
                "callback": print,
                "nowait": False,
                "arguments": {"x-priority": 3},
                "on_cancel": None,
            },
        ),
        (
            "basic_consume",
            {
                "queue": "q",
                "no_ack": True,
                "consumer_tag": "tag",
                "callback": print,
                "nowait": True,
                "arguments": {"x-priority": 3},
                "on_cancel": print,
            },
        ),
    ]
    queue.cancel("tag")
    assert channel.calls[-1] == ("basic_cancel", {0: "tag"})
    assert queue.purge() == 2


def test_b135_message_and_publish_of_a_bound_exchange() -> None:
    channel = RecordingChannel()
    exchange = Exchange("news", delivery_mode=1)(channel)
    made = exchange.Message({"a": 1}, priority=3, headers={"h": 1}, properties={"p": 1})
    assert made["content_type"] == "application/json"
    assert made["properties"] == {"p": 1, "delivery_mode": 1}
    assert (made["priority"], made["headers"]) == (3, {"h": 1})
    raw = exchange.Message("a,b", content_type="text/csv", delivery_mode="persistent")
    assert (raw["body"], raw["content_type"], raw["content_encoding"]) == (
        "a,b",
        "text/csv",
        "utf-8",
    )
    assert raw["properties"]["delivery_mode"] == 2
    exchange.publish(made, routing_key="rk", mandatory=True)
    exchange.publish("text", routing_key="rk", exchange=Exchange("other"))
    first, second = channel.called("basic_publish")
    assert first == {
        0: made,
        "exchange": "news",
        "routing_key": "rk",
        "mandatory": True,
        "immediate": False,
    }
    assert second["exchange"] == "other"
    assert second[0]["content_type"] == "text/plain"


# -- plain data


def test_b132_as_dict_round_trips() -> None:
    queue = Queue(
        "q",
        Exchange("e", "topic", auto_delete=True, delivery_mode=1),
        "rk",
        durable=False,
        queue_arguments={"a": 1},
        max_length=9,
    )
    described = queue.as_dict(recurse=True)
    assert described["exchange"]["type"] == "topic"
    assert Queue(**described) == queue
    assert Queue(**described).max_length == 9
    described.pop("name")
    assert Queue.from_dict("q", **described) == queue
    assert Exchange(**queue.as_dict(recurse=True)["exchange"]) == queue.exchange
    assert isinstance(queue.as_dict()["exchange"], Exchange)
    several = Queue("q", bindings=[binding(Exchange("a"), "ka", {"x": 1})])
    again = Queue(**several.as_dict(recurse=True))
    assert [each.as_dict(recurse=True) for each in again.bindings] == [
        each.as_dict(recurse=True) for each in several.bindings
    ]


def test_b143_from_dict_takes_carrots_options() -> None:
    queue = Queue.from_dict(
        "q",
        exchange="e",
        exchange_type="topic",
        binding_key="bk",
        routing_key="rk",
        durable=False,
        queue_durable=True,
        exchange_durable=False,
        auto_delete=True,
        delivery_mode=1,
        queue_arguments={"a": 1},
        no_ack=True,
        expires=3,
        unknown="ignored",
    )
    exchange = queue.exchange
    assert exchange is not None
    assert (exchange.name, exchange.type) == ("e", "topic")
    assert (exchange.durable, exchange.auto_delete) == (False, True)
    assert exchange.delivery_mode == 1
    assert (queue.name, queue.routing_key, queue.durable, queue.auto_delete) == (
        "q",
        "bk",
        True,
        True,
    )
    assert (queue.queue_arguments, queue.no_ack, queue.expires) == ({"a": 1}, True, 3.0)
    plain = Queue.from_dict("q")
    assert plain == Queue("q")


def test_b136_declarations_that_can_vanish_are_not_cached() -> None:
    cacheable = [Exchange("e"), Exchange("e", durable=False), Queue("q"), Queue("q", durable=False)]
    fleeting = [
        Exchange("e", auto_delete=True),
        Queue("q", auto_delete=True),
        Queue("q", exclusive=True),
        Queue("q", expires=3),
        Queue("q", queue_arguments={"x-expires": 3000}),
    ]
    assert all(entity.can_cache_declaration for entity in cacheable)
    assert not any(entity.can_cache_declaration for entity in fleeting)


def test_b136_when_bound_and_revive() -> None:
    class Thing(MaybeChannelBound):
        attrs = (("name", None), ("size", int))
        name: str
        size: int

        def when_bound(self) -> None:
            self.__dict__.setdefault("seen", []).append(self.channel)

    thing: Any = Thing(name="t", size="3")
    assert thing.size == 3
    assert not thing.can_cache_declaration
    first, second = RecordingChannel(), RecordingChannel()
    bound = thing(first)
    bound.revive(second)
    assert bound.seen == [first, second]
    assert bound.channel is second
    thing.revive(second)
    assert not thing.is_bound, "an unbound declaration stays unbound"


def test_b136_reviving_a_queue_revives_its_exchange() -> None:
    first, second = RecordingChannel(), RecordingChannel()
    queue = Queue("q", Exchange("e"))(first)
    queue.revive(second)
    assert queue.exchange is not None
    assert queue.exchange.channel is second


def test_a_subclass_with_its_own_constructor_can_be_bound() -> None:
    class Named(Queue):
        def __init__(self, tenant: str) -> None:
            super().__init__(f"{tenant}.tasks", Exchange("tasks"), tenant)
            self.tenant = tenant

    bound = Named("acme")(RecordingChannel())
    assert isinstance(bound, Named)
    assert (bound.tenant, bound.name) == ("acme", "acme.tasks")


def test_object_as_dict_and_copy() -> None:
    class Point(Object):
        attrs = (("x", int), ("y", None))
        x: int
        y: Any

    point: Any = Point(x="1", unknown=3)
    assert point.as_dict() == {"x": 1, "y": None}
    assert copy.copy(point).as_dict() == point.as_dict()
    assert pickle.loads(pickle.dumps(Exchange("e"))).name == "e"


def test_equality_compares_what_the_broker_compares() -> None:
    assert Queue("q", Exchange("e"), "rk") == Queue("q", Exchange("e"), "rk")
    assert Queue("q") != Queue("q", durable=False)
    assert Queue("q", Exchange("e")) != Queue("q", Exchange("e", "topic"))
    assert Exchange("e") != Exchange("e", arguments={"a": 1})
    assert Exchange("e") != "e"
    assert Queue("q") != Exchange("q")


def test_reprs_name_the_entity_and_its_state() -> None:
    channel = RecordingChannel()
    exchange = Exchange("e", "topic")
    assert repr(exchange) == "<unbound Exchange e(topic)>"
    assert str(exchange) == "Exchange e(topic)"
    assert repr(Exchange()) == "<unbound Exchange ''(direct)>"
    queue = Queue("q", exchange, "rk")
    assert repr(queue) == "<unbound Queue q -> <unbound Exchange e(topic)> -> rk>"
    assert repr(exchange(channel)) == "<Exchange e(topic) bound to chan:7>"
    assert repr(queue(channel)).endswith("-> rk bound to chan:7>")
    assert repr(Queue("q", bindings=[binding(exchange, "k")])) == "<unbound Queue q -> [e->k]>"
    assert repr(exchange.binding("k")) == "<binding: e->k>"
