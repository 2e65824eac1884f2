"""Exchanges, queues and bindings: what they are, how they are declared."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from tests.differential.programs.lab import Lab, fetch, program, show

OPTIONS: list[dict[str, Any]] = [
    {},
    {"exchange": "e", "exchange_type": "topic", "binding_key": "b"},
    {"exchange": "e", "routing_key": "b", "durable": False},
    {"exchange": "e", "auto_delete": True},
    {"exchange": "e", "queue_durable": False, "queue_auto_delete": True},
    {"exchange": "e", "exchange_durable": False, "exchange_auto_delete": True},
    {"queue_arguments": {"a": 1}, "binding_arguments": {"b": 1}, "consumer_arguments": {"c": 1}},
    {"no_ack": True, "alias": "al", "expires": 2, "message_ttl": 3, "max_length": 4},
    {"max_priority": 5, "max_length_bytes": 6, "exchange": "e"},
    {"exclusive": True},
    {"delivery_mode": "transient", "exchange": "e"},
    {"exchange_arguments": {"x": 1}, "exchange": "e"},
    {"no_declare": True},
]


@program("memory")
def exchanges_as_dictionaries(lab: Lab) -> None:
    for options in (
        {},
        {"type": "topic", "durable": False, "auto_delete": True, "delivery_mode": 1},
        {"type": "fanout", "arguments": {"a": 1}, "passive": True},
        {"delivery_mode": "persistent", "no_declare": True},
    ):
        exchange = lab.k.Exchange("e", **options)
        lab.note(exchange.as_dict(), exchange.as_dict(recurse=True))
        lab.note(lab.k.Exchange(**exchange.as_dict()) == exchange)
    lab.note(lab.k.Exchange().as_dict(), lab.k.Exchange("").name)


@program("memory")
def queues_as_dictionaries(lab: Lab) -> None:
    k = lab.k
    for queue in (
        k.Queue(),
        k.Queue("q"),
        k.Queue("q", k.Exchange("e"), "k"),
        k.Queue("q", exchange="e", routing_key="k"),
        k.Queue("q", exclusive=True),
        k.Queue("q", durable=False, auto_delete=True, no_ack=True, alias="a"),
        k.Queue("q", expires=1.5, message_ttl=2, max_length=3, max_length_bytes=4, max_priority=5),
        k.Queue("q", queue_arguments={"x": 1}, binding_arguments={"y": 2}),
        k.Queue("q", bindings=[k.binding(k.Exchange("e"), "k1"), k.binding(k.Exchange("f"), "k2")]),
    ):
        described = queue.as_dict(recurse=True)
        if described["bindings"]:  # a set, in Kombu
            described["bindings"].sort(key=lambda each: str(each["routing_key"]))
        lab.note(described)
        lab.note(queue.name, queue.routing_key, queue.exclusive, queue.auto_delete, queue.durable)
    lab.note(k.binding(k.Exchange("e"), "k", {"a": 1}).as_dict(recurse=True))


@program("memory")
def queues_from_dictionaries(lab: Lab) -> None:
    for options in OPTIONS:
        lab.attempt(
            options, lambda o=options: lab.k.Queue.from_dict("n", **o).as_dict(recurse=True)
        )
    queue = lab.k.Queue("q", lab.k.Exchange("e", "topic"), "k")
    lab.attempt("round trip", lambda: lab.k.Queue.from_dict("q", **queue.as_dict()).as_dict())


@program("memory")
def entities_in_words(lab: Lab) -> None:
    k, channel = lab.k, lab.connection.default_channel
    for entity in (
        k.Exchange("e"),
        k.Exchange("e", "topic"),
        k.Exchange(""),
        k.Queue("q"),
        k.Queue("q", k.Exchange("e"), "k"),
        k.binding(k.Exchange("e"), "k"),
    ):
        lab.note(repr(entity), str(entity))
    lab.note(str(k.Exchange("e")(channel)).partition(" bound")[0])
    lab.note(str(k.Queue("q", k.Exchange("e"), "k")(channel)).partition(" bound")[0])


@program("memory")
def equality_and_hashing(lab: Lab) -> None:
    k = lab.k
    pairs = [
        (k.Exchange("e"), k.Exchange("e")),
        (k.Exchange("e"), k.Exchange("f")),
        (k.Exchange("e"), k.Exchange("e", "topic")),
        (k.Exchange("e"), k.Exchange("e", durable=False)),
        (k.Exchange("e", delivery_mode=1), k.Exchange("e", delivery_mode=2)),
        (k.Queue("q"), k.Queue("q")),
        (k.Queue("q"), k.Queue("r")),
        (k.Queue("q", k.Exchange("e")), k.Queue("q", k.Exchange("f"))),
        (k.Queue("q", routing_key="a"), k.Queue("q", routing_key="b")),
        (k.Queue("q", queue_arguments={"a": 1}), k.Queue("q")),
        (k.Queue("q", durable=False), k.Queue("q")),
        (k.Queue("q", no_ack=True), k.Queue("q")),
        (k.Exchange("e"), "e"),
        (k.Queue("e"), k.Exchange("e")),
    ]
    for left, right in pairs:
        lab.note(left == right, left != right)
    lab.note(len({k.Exchange("e"), k.Exchange("e"), k.Exchange("f")}))
    lab.attempt("hash of a queue", lambda: len({k.Queue("q"), k.Queue("q")}))


@program("memory")
def pickles_and_copies(lab: Lab) -> None:
    k, channel = lab.k, lab.connection.default_channel
    for entity in (
        k.Exchange("e", "topic", durable=False, arguments={"a": 1}),
        k.Queue("q", k.Exchange("e"), "k", queue_arguments={"a": 1}, alias="x"),
        k.Queue("q", bindings=[k.binding(k.Exchange("e"), "k")]),
    ):
        for again in (pickle.loads(pickle.dumps(entity)), copy.copy(entity), copy.deepcopy(entity)):
            lab.note(type(again).__name__, again == entity, again.as_dict(), again.is_bound)
    bound = k.Queue("q", k.Exchange("e"), "k")(channel)
    lab.note(pickle.loads(pickle.dumps(bound)).is_bound, copy.copy(bound).is_bound)


@program()
def binding_to_a_channel(lab: Lab) -> None:
    channel = lab.connection.default_channel
    for entity in (lab.k.Exchange("e"), lab.k.Queue("q", lab.k.Exchange("e"), "k")):
        bound = entity(channel)
        lab.note(entity.is_bound, bound.is_bound, bound is entity, bound == entity)
        lab.note(bound.channel is channel, bound.maybe_bind(channel) is bound)
        lab.note(entity.maybe_bind(None) is entity, entity.can_cache_declaration)
        lab.attempt("unbound channel", lambda e=entity: e.channel)
        lab.attempt("unbound delete", entity.delete)
        lab.attempt("unbound declare", entity.declare)
        lab.attempt("revive", lambda b=bound: b.revive(channel))
    queue = lab.k.Queue("q", lab.k.Exchange("e"))(lab.connection)
    lab.note(queue.is_bound, queue.exchange.is_bound)


@program()
def declaring(lab: Lab) -> None:
    channel = lab.connection.default_channel
    exchange = lab.k.Exchange(f"{lab.name}-exchange", "topic")
    queue = lab.k.Queue(lab.name, exchange, routing_key="k")(channel)
    lab.note(queue.declare(), exchange(channel).declare(), tuple(queue.queue_declare()))
    lab.note(tuple(queue.queue_declare(passive=True)), queue.queue_bind(), queue.purge())
    lab.note(queue.exchange.declare(passive=True))
    lab.note(queue.delete(), exchange(channel).delete())
    lab.note(lab.k.Queue(f"{lab.name}-alone").declare(channel=channel))


@program()
def declaring_what_is_missing(lab: Lab) -> None:
    for label, function in (
        ("queue", lambda channel: lab.k.Queue("missing")(channel).queue_declare(passive=True)),
        ("exchange", lambda channel: lab.k.Exchange("missing")(channel).declare(passive=True)),
        ("get", lambda channel: lab.k.Queue("missing")(channel).get()),
        ("purge", lambda channel: lab.k.Queue("missing")(channel).purge()),
        ("consume", lambda channel: lab.k.Queue("missing")(channel).consume("tag", callback=print)),
    ):
        channel = lab.connection.channel()
        lab.attempt(label, lambda f=function, c=channel: f(c))


@program()
def declaring_otherwise(lab: Lab) -> None:
    lab.k.Exchange(lab.name, "direct")(lab.connection.channel()).declare()
    lab.attempt(
        "type", lambda: lab.k.Exchange(lab.name, "topic")(lab.connection.channel()).declare()
    )
    lab.attempt(
        "durable",
        lambda: lab.k.Exchange(lab.name, durable=False)(lab.connection.channel()).declare(),
    )
    lab.attempt("same", lambda: lab.k.Exchange(lab.name)(lab.connection.channel()).declare())
    lab.attempt(
        "unknown type", lambda: lab.k.Exchange("n", "no-such")(lab.connection.channel()).declare()
    )


@program()
def passive_exchanges(lab: Lab) -> None:
    channel = lab.connection.channel()
    lab.k.Exchange(lab.name)(channel).declare()
    lab.attempt("there", lambda: lab.k.Exchange(lab.name, passive=True)(channel).declare())


@program()
def unbinding_and_deleting(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.Producer(exchange=queue.exchange) as producer:
        lab.note(queue.unbind_from(queue.exchange, queue.routing_key))
        producer.publish("lost", routing_key=queue.routing_key)
        lab.note(queue.get())
        lab.note(queue.bind_to(queue.exchange, "other"))
        producer.publish("found", routing_key="other")
        lab.note(fetch(queue, no_ack=True).payload)
        lab.note(queue.delete())
        producer.publish("gone", routing_key="other")
    lab.note(lab.connection.connected)


@program()
def several_bindings(lab: Lab) -> None:
    k = lab.k
    one, two = k.Exchange(f"{lab.name}-1"), k.Exchange(f"{lab.name}-2", "fanout")
    queue = k.Queue(lab.name, bindings=[k.binding(one, "a"), k.binding(one, "b"), k.binding(two)])(
        lab.connection.default_channel
    )
    queue.declare()
    with lab.connection.Producer() as producer:
        for exchange, key in ((one, "a"), (one, "b"), (one, "c"), (two, "any")):
            producer.publish(key, exchange=exchange.name, routing_key=key)
    lab.note([fetch(queue, no_ack=True).payload for _ in range(3)], queue.get())


@program()
def routing(lab: Lab) -> None:
    for kind, keys in (
        ("direct", ["a", "a.b", "b"]),
        ("topic", ["a.*", "*.b", "a.b", "a.b.c", "#", "*"]),
        ("fanout", ["x", "y"]),
    ):
        exchange = lab.k.Exchange(f"{lab.name}-{kind}", kind)
        queues = [
            lab.k.Queue(f"{lab.name}-{kind}-{key}", exchange, routing_key=key)(
                lab.connection.default_channel
            )
            for key in keys
        ]
        for queue in queues:
            queue.declare()
        with lab.connection.Producer(exchange=exchange) as producer:
            for key in ("a", "a.b", "c.b", "a.b.c", "a.x", ""):
                producer.publish(key, routing_key=key)
        for queue in queues:
            found = []
            while (message := queue.get(no_ack=True)) is not None:
                found.append(message.payload)
            lab.note(kind, queue.routing_key, found)


@program()
def topics_with_no_word_for_the_hash(lab: Lab) -> None:
    queue = lab.k.Queue(lab.name, lab.k.Exchange(lab.name, "topic"), routing_key="*.stock.#")(
        lab.connection.default_channel
    )
    queue.declare()
    with lab.connection.Producer(exchange=queue.exchange) as producer:
        for key in ("usd.stock", "eur.stock.db", "stock.nasdaq", "a.b.stock"):
            producer.publish(key, routing_key=key)
    found = []
    while (message := queue.get(no_ack=True)) is not None:
        found.append(message.payload)
    lab.note(found)


@program("amqp")
def headers_exchanges(lab: Lab) -> None:
    exchange = lab.k.Exchange(lab.name, "headers")
    queues = [
        lab.k.Queue(
            f"{lab.name}-{how}", exchange, binding_arguments={"x-match": how, "a": 1, "b": "2"}
        )(lab.connection.default_channel)
        for how in ("all", "any")
    ]
    for queue in queues:
        queue.declare()
    with lab.connection.Producer(exchange=exchange) as producer:
        for headers in ({"a": 1, "b": "2"}, {"a": 1}, {"b": "3"}):
            producer.publish(headers, headers=headers)
    for queue in queues:
        found = []
        while (message := queue.get(no_ack=True)) is not None:
            found.append(message.payload)
        lab.note(queue.name, found)


@program("amqp")
def deleting_under_conditions(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.Producer(exchange=queue.exchange) as producer:
        producer.publish("x", routing_key=queue.routing_key)
    lab.attempt("not empty", lambda: queue(lab.connection.channel()).delete(if_empty=True))
    lab.attempt("in use", lambda: queue.exchange(lab.connection.channel()).delete(if_unused=True))
    lab.attempt("both", lambda: queue(lab.connection.channel()).delete())


@program("amqp")
def queue_arguments_reach_the_broker(lab: Lab) -> None:
    options = {"expires": 60, "message_ttl": 5, "max_length": 10, "max_priority": 3}
    lab.k.Queue(lab.name, **options)(lab.connection.channel()).declare()
    lab.attempt(
        "the same by name",
        lambda: lab.k.Queue(
            lab.name,
            queue_arguments={
                "x-expires": 60000,
                "x-message-ttl": 5000,
                "x-max-length": 10,
                "x-max-priority": 3,
            },
        )(lab.connection.channel()).queue_declare()[0],
    )
    lab.attempt("none", lambda: lab.k.Queue(lab.name)(lab.connection.channel()).declare())


@program("amqp")
def exclusive_queues(lab: Lab) -> None:
    queue = lab.k.Queue(lab.name, exclusive=True)(lab.connection.channel())
    lab.note(queue.exclusive, queue.auto_delete, queue.declare())
    with lab.k.Connection(lab.url) as other:
        lab.attempt("other connection", lambda: queue(other.channel()).queue_declare())


@program()
def anonymous_queues(lab: Lab) -> None:
    queue = lab.k.Queue("", exclusive=True)(lab.connection.channel())
    queue.declare()
    lab.note(bool(queue.name), queue.name.startswith("amq.gen") or len(queue.name) > 20)


@program("amqp")
def exchanges_bound_to_exchanges(lab: Lab) -> None:
    channel = lab.connection.default_channel
    source = lab.k.Exchange(f"{lab.name}-source")(channel)
    target = lab.k.Exchange(f"{lab.name}-target")(channel)
    source.declare()
    target.declare()
    lab.note(target.bind_to(source, "k"))
    queue = lab.k.Queue(lab.name, target, routing_key="k")(channel)
    queue.declare()
    with lab.connection.Producer(exchange=source) as producer:
        producer.publish("x", routing_key="k")
        lab.note(show(fetch(queue, no_ack=True)))
        lab.note(target.unbind_from(source, "k"))


@program()
def declaring_once(lab: Lab) -> None:
    maybe_declare = lab.module("common").maybe_declare
    channel = lab.connection.default_channel
    exchange = lab.k.Exchange(f"{lab.name}-e")
    queue = lab.k.Queue(lab.name, exchange, "k")
    lab.note(maybe_declare(exchange, channel), maybe_declare(exchange, channel))
    lab.note(maybe_declare(queue, channel), maybe_declare(queue, channel))
    lab.note(maybe_declare(queue(channel)), maybe_declare(exchange, channel, retry=True))
    lab.note(maybe_declare(lab.k.Queue(lab.name, exchange, "other"), channel))
    lab.note(maybe_declare(exchange, lab.connection))
    lab.attempt("unbound", lambda: maybe_declare(exchange))
    hidden = lab.k.Queue(f"{lab.name}-auto", exchange, "k", auto_delete=True)
    lab.note(maybe_declare(hidden, channel), maybe_declare(hidden, channel))


@program("memory")
def constants(lab: Lab) -> None:
    exchange = lab.k.Exchange
    lab.note(exchange.TRANSIENT_DELIVERY_MODE, exchange.PERSISTENT_DELIVERY_MODE)
    lab.note(exchange.attrs, lab.k.Queue.attrs)
    lab.note(exchange.durable, exchange.auto_delete, exchange.type, exchange.passive)
    entity = lab.module("entity")
    lab.note(entity.TRANSIENT_DELIVERY_MODE, entity.PERSISTENT_DELIVERY_MODE)
    lab.note(entity.DELIVERY_MODES)
    for mode in ("transient", "persistent", 1, 2):
        lab.attempt(mode, lambda m=mode: entity.maybe_delivery_mode(m))
    lab.attempt("bad mode", lambda: entity.maybe_delivery_mode("bad"))


@program("memory")
def positional_arguments(lab: Lab) -> None:
    k = lab.k
    exchange = k.Exchange("e", "topic", None)
    queue = k.Queue("q", exchange, "k", None)
    lab.note(exchange.as_dict(), queue.as_dict(recurse=True))
    lab.attempt("unknown keyword of an exchange", lambda: k.Exchange("e", no_such=1).name)
    lab.attempt("unknown keyword of a queue", lambda: k.Queue("q", no_such=1).name)
