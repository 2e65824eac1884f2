"""Publishing: bodies, properties, serializers, compression, defaults, errors."""

from __future__ import annotations

import datetime
import decimal
import time
import uuid
from typing import Any

from tests.differential.programs.lab import Lab, fetch, program, show

EVERYTHING = ["json", "pickle", "yaml", "msgpack", "text/plain", "application/data"]


@program()
def bodies(lab: Lab) -> None:
    for body in (
        {},
        {"a": [1, 2.5, None, True, "é"]},
        [],
        [1, [2]],
        "text",
        "tëxt ❄ \U0001f600",
        "",
        b"\x00\xff",
        b"",
        bytearray(b"ab"),
        3,
        2**40,
        1.5,
        None,
        True,
        (1, 2),
    ):
        lab.attempt(type(body).__name__, lambda body=body: show(lab.trip(body)))


@program()
def bodies_of_extended_json(lab: Lab) -> None:
    for body in (
        {"at": datetime.datetime(2020, 1, 2, 3, 4, 5, 6)},
        {"at": datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone.utc)},
        {"on": datetime.date(2020, 2, 29), "when": datetime.time(1, 2, 3)},
        {"amount": decimal.Decimal("1.10"), "id": uuid.UUID(int=7)},
        {"raw": b"\xff\x00"},
    ):
        lab.note(show(lab.trip(body)))


@program()
def a_large_body(lab: Lab) -> None:
    message = lab.trip("x" * 1_000_000)
    lab.note(len(message.body), message.payload == "x" * 1_000_000)
    message = lab.trip(b"\xfe" * 300_000)
    lab.note(len(message.body), message.payload == b"\xfe" * 300_000)


@program()
def headers(lab: Lab) -> None:
    for each in (
        {"x": 1},
        {"text": "é", "flag": True, "none": None, "deep": {"list": [1, "two", {"three": 3}]}},
        {},
        None,
        {"float": 1.5, "big": 2**40, "negative": -5},
    ):
        lab.note(show(lab.trip("x", headers=each)))


@program()
def all_properties(lab: Lab) -> None:
    lab.note(
        show(
            lab.trip(
                {"a": 1},
                correlation_id="c",
                reply_to="r",
                message_id="m",
                timestamp=1234567890,
                type="t",
                app_id="app",
                priority=4,
                expiration=60,
                headers={"h": "v"},
            )
        )
    )


@program()
def unknown_properties(lab: Lab) -> None:
    lab.note(show(lab.trip("x", made_up="y")))


@program()
def priorities(lab: Lab) -> None:
    for priority in (None, 0, 5, 9):
        lab.note(priority, show(lab.trip("x", priority=priority)))


@program()
def delivery_modes(lab: Lab) -> None:
    for mode in (None, 1, 2, "transient", "persistent"):
        lab.note(mode, show(lab.trip("x", delivery_mode=mode)))
    exchange = lab.k.Exchange(f"{lab.name}-own", "direct", delivery_mode="transient")
    lab.note(exchange.delivery_mode)
    queue = lab.k.Queue(f"{lab.name}-own", exchange, routing_key="k")(
        lab.connection.default_channel
    )
    queue.declare()
    with lab.connection.Producer(exchange=exchange) as producer:
        producer.publish("x", routing_key="k")
        lab.note(show(fetch(queue, no_ack=True)))
        producer.publish("x", routing_key="k", delivery_mode=2)
        lab.note(show(fetch(queue, no_ack=True)))
        producer.publish("x", routing_key="k", exchange=exchange.name)
        lab.note(show(fetch(queue, no_ack=True)))
    lab.attempt("bad", lambda: lab.trip("x", delivery_mode="nosuch"))


@program()
def expirations(lab: Lab) -> None:
    for expiration in (None, 10, 1.2345, 3600, 60.0):
        lab.note(expiration, show(lab.trip("x", expiration=expiration)))


@program()
def content_types(lab: Lab) -> None:
    for body, options in (
        ("x", {"content_type": "text/x", "content_encoding": "utf-8"}),
        ("é", {"content_type": "text/x", "content_encoding": "latin-1"}),
        ("x", {"content_type": "text/x"}),
        (b"\xff", {"content_type": "image/png", "content_encoding": "binary"}),
        (b"x", {"content_type": "image/png"}),
        ('{"a": 1}', {"content_type": "application/json", "content_encoding": "utf-8"}),
        ("x", {"content_encoding": "utf-8"}),
    ):
        lab.note(show(lab.trip(body, **options)))


@program()
def serializers(lab: Lab) -> None:
    for name in ("json", "pickle", "yaml", "msgpack", "application/json"):
        lab.attempt(
            name, lambda name=name: show(lab.trip({"a": [1, "é"]}, EVERYTHING, serializer=name))
        )
    for body in ("text", b"bytes"):
        for name in ("raw", "json", "pickle"):
            lab.attempt(
                [name, body],
                lambda body=body, name=name: show(lab.trip(body, EVERYTHING, serializer=name)),
            )


@program()
def compressions(lab: Lab) -> None:
    for name in ("zlib", "gzip", "bzip2", "bzip", "lzma", "xz", "application/x-gzip"):
        for body in ({"a": "x" * 100}, "x" * 100, b"\xff" * 100):
            message = lab.trip(body, compression=name)
            lab.note(name, message.headers, message.content_type, message.content_encoding)
            lab.note(message.payload, type(message.body).__name__)
    message = lab.trip("x", compression="zlib", headers={"own": 1})
    lab.note(message.headers, message.payload)
    # It was compressed by the sender already.
    lab.note(show(lab.trip("x", headers={"compression": None})))


@program()
def a_producers_defaults(lab: Lab) -> None:
    queue = lab.queue()
    producer = lab.k.Producer(
        lab.connection,
        exchange=queue.exchange,
        routing_key=queue.routing_key,
        serializer="pickle",
        compression="bzip2",
    )
    lab.note(producer.serializer, producer.compression, producer.routing_key)
    lab.note(
        producer.auto_declare, producer.exchange.is_bound, producer.connection is lab.connection
    )
    producer.publish({"a": (1, 2)})
    message = fetch(queue, no_ack=True, accept=["pickle"])
    lab.note(message.content_type, message.headers, repr(message.payload))
    producer.publish({"a": [1]}, serializer="json", compression=None)
    message = fetch(queue, no_ack=True)
    lab.note(message.content_type, message.headers, message.payload)
    producer.close()


@program()
def a_producer_without_anything(lab: Lab) -> None:
    producer = lab.k.Producer(lab.connection)
    lab.note(producer.exchange.name, producer.exchange.type, producer.routing_key)
    lab.note(producer.serializer, producer.compression, producer.auto_declare, producer.on_return)
    lab.note(producer.channel, producer.is_bound if hasattr(producer, "is_bound") else None)
    queue = lab.queue()
    producer.publish("to the default exchange", routing_key=queue.name)
    lab.note(show(fetch(queue, no_ack=True)))
    lab.attempt("release", producer.release)


@program()
def the_exchange_by_name_and_by_object(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.Producer() as producer:
        for exchange in (queue.exchange.name, lab.k.Exchange(queue.exchange.name), queue.exchange):
            producer.publish("x", exchange=exchange, routing_key=queue.routing_key)
            lab.note(show(fetch(queue, no_ack=True)))


@program()
def declaring_before_the_publish(lab: Lab) -> None:
    exchange = lab.k.Exchange(f"{lab.name}-exchange", "topic")
    queue = lab.k.Queue(lab.name, exchange, routing_key="a.*")
    with lab.connection.Producer() as producer:
        for _ in range(2):
            producer.publish("x", exchange=exchange, routing_key="a.b", declare=[exchange, queue])
        bound = queue(lab.connection.default_channel)
        lab.note(show(fetch(bound, no_ack=True)), show(fetch(bound, no_ack=True)))
        lab.note(producer.maybe_declare(queue), producer.maybe_declare(queue, retry=True))


@program()
def publishing_with_retry(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.Producer() as producer:
        for policy in (None, {"max_retries": 1}, {"interval_start": 0, "interval_max": 1}):
            producer.publish(
                "x",
                exchange=queue.exchange,
                routing_key=queue.routing_key,
                retry=True,
                retry_policy=policy,
            )
            lab.note(show(fetch(queue, no_ack=True)))


@program()
def publishing_what_cannot_be(lab: Lab) -> None:
    lab.attempt("object", lambda: lab.trip(object()))
    lab.attempt("nested object", lambda: lab.trip({"a": object()}))
    lab.attempt("serializer", lambda: lab.trip({"a": 1}, serializer="nosuch"))
    lab.attempt("compression", lambda: lab.trip({"a": 1}, compression="nosuch"))
    lab.attempt("keys", lambda: lab.trip({(1, 2): 3}))
    lab.attempt("set", lambda: lab.trip({1, 2}))
    lab.note(show(lab.trip("still works")))


@program()
def a_message_to_nowhere(lab: Lab) -> None:
    exchange = lab.k.Exchange(f"{lab.name}-exchange")(lab.connection.default_channel)
    exchange.declare()
    with lab.connection.Producer(exchange=exchange) as producer:
        producer.publish("x", routing_key="nobody")
    lab.note(lab.connection.connected)


@program("amqp")
def returned_messages(lab: Lab) -> None:
    returned: list[Any] = []
    exchange = lab.k.Exchange(f"{lab.name}-exchange")(lab.connection.default_channel)
    exchange.declare()

    def on_return(exc: Any, exchange: Any, routing_key: Any, message: Any) -> None:
        returned.append([lab.error(exc), exchange, routing_key, message.body])

    producer = lab.k.Producer(lab.connection, exchange=exchange, on_return=on_return)
    producer.publish("x", routing_key="nobody", mandatory=True)
    lab.connection.drain_events(timeout=5)
    lab.note(returned)


@program("amqp")
def confirmed_publishes(lab: Lab) -> None:
    options = {"confirm_publish": True}
    with lab.k.Connection(lab.url, transport_options=options) as connection:
        channel = connection.default_channel
        queue = lab.k.Queue(lab.name)(channel)
        queue.declare()
        with connection.Producer() as producer:
            for number in range(3):
                producer.publish(number, routing_key=lab.name, timeout=5)
        lab.note([queue.get(no_ack=True).payload for _ in range(3)])


@program("amqp")
def an_exchange_that_is_missing(lab: Lab) -> None:
    options = {"confirm_publish": True}
    with lab.k.Connection(lab.url, transport_options=options) as connection:
        channel = connection.channel()
        producer = lab.k.Producer(channel, auto_declare=False)
        lab.attempt("publish", lambda: producer.publish("x", exchange="no-such", routing_key="k"))
        lab.note(connection.connected)


@program()
def publish_to_unicode_names(lab: Lab) -> None:
    name = f"{lab.name}-é-❄"
    queue = lab.k.Queue(name, lab.k.Exchange(name), routing_key=name)(
        lab.connection.default_channel
    )
    queue.declare()
    with lab.connection.Producer() as producer:
        producer.publish("x", exchange=name, routing_key=name)
    lab.note(show(fetch(queue, no_ack=True)))


@program()
def prepared_by_hand(lab: Lab) -> None:
    channel = lab.connection.default_channel
    queue = lab.queue()
    message = channel.prepare_message(
        '{"a": 1}', 3, "application/json", "utf-8", {"h": 1}, {"correlation_id": "c"}
    )
    channel.basic_publish(message, exchange=queue.exchange.name, routing_key=queue.routing_key)
    lab.note(show(fetch(queue, no_ack=True)))


@program()
def an_exchange_publishes(lab: Lab) -> None:
    queue = lab.queue()
    message = queue.exchange.Message(
        "body",
        delivery_mode=1,
        priority=2,
        content_type="text/x",
        content_encoding="utf-8",
        properties={"type": "t"},
        headers={"h": 1},
    )
    queue.exchange.publish(message, routing_key=queue.routing_key)
    lab.note(show(fetch(queue, no_ack=True)))
    queue.exchange.publish(queue.exchange.Message("plain"), routing_key=queue.routing_key)
    lab.note(show(fetch(queue, no_ack=True), payload=False))


@program()
def a_revived_producer(lab: Lab) -> None:
    queue = lab.queue()
    channel = lab.connection.channel()
    producer = lab.k.Producer(channel, exchange=queue.exchange, routing_key=queue.routing_key)
    other = lab.connection.channel()
    channel.close()
    lab.attempt("closed channel", lambda: producer.publish("x"))
    producer.revive(other)
    lab.note(producer.channel is other, producer.exchange.channel is other)
    producer.publish("y")
    lab.note(show(fetch(queue, no_ack=True)))


@program()
def a_producer_as_a_context(lab: Lab) -> None:
    queue = lab.queue()
    try:
        with lab.connection.Producer(exchange=queue.exchange) as producer:
            lab.note(producer.exchange.name)
            raise KeyError("user's")
    except KeyError:
        lab.note("passed through")
    lab.note(type(lab.connection.Producer()).__name__, lab.connection.connected)


@program()
def messages_by_priority(lab: Lab) -> None:
    queue = lab.queue(max_priority=10)
    with lab.connection.Producer(exchange=queue.exchange) as producer:
        for priority in (0, 9, 5, None, 9, 3):
            producer.publish(priority, routing_key=queue.routing_key, priority=priority)
    lab.note([fetch(queue, no_ack=True).payload for _ in range(6)])


@program()
def messages_that_expire(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.Producer(exchange=queue.exchange) as producer:
        producer.publish("short", routing_key=queue.routing_key, expiration=0.02)
        time.sleep(0.3)
        producer.publish("long", routing_key=queue.routing_key, expiration=60)
    lab.note(fetch(queue, no_ack=True).payload)


@program("amqp")
def messages_of_a_dead_letter_exchange(lab: Lab) -> None:
    channel = lab.connection.default_channel
    dead = lab.k.Queue(f"{lab.name}-dead", lab.k.Exchange(f"{lab.name}-dead"), "k")(channel)
    dead.declare()
    queue = lab.k.Queue(
        lab.name,
        queue_arguments={
            "x-dead-letter-exchange": dead.exchange.name,
            "x-dead-letter-routing-key": "k",
        },
    )(channel)
    queue.declare()
    with lab.connection.Producer() as producer:
        producer.publish({"a": 1}, routing_key=lab.name, headers={"h": 1})
    fetch(queue).reject()
    message = fetch(dead, no_ack=True)
    death = message.headers["x-death"][0]
    lab.note(message.payload, message.headers["h"], {**death, "time": type(death["time"]).__name__})


@program("amqp")
def transactions(lab: Lab) -> None:
    queue = lab.queue()
    with lab.connection.channel() as channel:
        channel.tx_select()
        producer = lab.k.Producer(channel, exchange=queue.exchange, auto_declare=False)
        producer.publish("rolled back", routing_key=queue.routing_key)
        channel.tx_rollback()
        producer.publish("committed", routing_key=queue.routing_key)
        lab.note(queue.get())
        channel.tx_commit()
    lab.note(fetch(queue, no_ack=True).payload, queue.get())
