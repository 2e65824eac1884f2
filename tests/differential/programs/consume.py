"""Consuming: callbacks, settling, accept lists, prefetch, getting one message."""

from __future__ import annotations

import time
from typing import Any

from tests.differential.programs.lab import Lab, fetch, program, show


def publish(lab: Lab, queue: Any, *bodies: object, **options: Any) -> None:
    with lab.connection.Producer() as producer:
        for body in bodies:
            producer.publish(
                body, exchange=queue.exchange, routing_key=queue.routing_key, **options
            )


@program()
def callbacks_in_order(lab: Lab) -> None:
    queue = lab.queue()
    order: list[Any] = []

    def first(body: Any, message: Any) -> None:
        order.append(["first", body, show(message)])

    def second(body: Any, message: Any) -> None:
        order.append(["second", body, message.acknowledged])
        message.ack()
        order.append(message.acknowledged)

    with lab.consuming(queue, callbacks=[first]) as consumer:
        consumer.register_callback(second)
        publish(lab, queue, {"a": 1}, headers={"h": 1})
        lab.drain()
    lab.note(order)


@program()
def on_message_instead_of_callbacks(lab: Lab) -> None:
    queue = lab.queue()
    taken: list[Any] = []
    with lab.consuming(queue, on_message=taken.append, callbacks=[lambda *_: taken.append("no")]):
        publish(lab, queue, "x", [1])
        lab.drain_until(taken, 2)
    lab.note([show(message) for message in taken])


@program()
def a_consumer_without_callbacks(lab: Lab) -> None:
    queue = lab.queue()
    with lab.consuming(queue) as consumer:
        lab.attempt("receive", lambda: consumer.receive("body", None))
        publish(lab, queue, "x")
        lab.attempt("drain", lab.drain)


@program()
def what_is_not_accepted(lab: Lab) -> None:
    queue = lab.queue()
    taken: list[Any] = []
    with lab.consuming(queue, callbacks=[lambda body, m: taken.append(body)], accept=["json"]):
        publish(lab, queue, {"a": 1}, serializer="pickle")
        lab.attempt("pickle", lab.drain)
        publish(lab, queue, {"a": 1})
        lab.attempt("json", lab.drain)
    lab.note(taken)
    queue.purge()
    with lab.consuming(
        queue, callbacks=[lambda body, m: taken.append(body)], no_ack=True, accept=["pickle"]
    ) as consumer:
        lab.note(sorted(consumer.accept))
        publish(lab, queue, {"b": 1}, serializer="pickle")
        lab.attempt("accepted", lab.drain)
    lab.note(taken)


@program()
def decode_errors(lab: Lab) -> None:
    queue = lab.queue()
    failed: list[Any] = []

    def on_decode_error(message: Any, exc: Exception) -> None:
        failed.append([[base.__name__ for base in type(exc).__mro__], show(message)])
        message.reject()

    with lab.consuming(
        queue, callbacks=[lambda *_: failed.append("called")], on_decode_error=on_decode_error
    ):
        for body, kind, encoding in (
            ("{", "application/json", "utf-8"),
            (b"x", "application/x-python-serialize", "binary"),
            (b"\xff\xfe", "application/json", "utf-8"),
            ("", "application/json", "utf-8"),
        ):
            publish(lab, queue, body, content_type=kind, content_encoding=encoding)
            lab.attempt(kind, lab.drain)
    lab.note(failed)


@program()
def decode_errors_that_nobody_takes(lab: Lab) -> None:
    queue = lab.queue()
    with lab.consuming(queue, callbacks=[lambda *_: None], no_ack=True):
        publish(lab, queue, "{", content_type="application/json", content_encoding="utf-8")
        lab.attempt("drain", lab.drain)


@program()
def unknown_content_types(lab: Lab) -> None:
    queue = lab.queue()
    taken: list[Any] = []
    for accept in (None, [], ["json"], ["application/x-own"]):
        lab.attempt(
            ["consumer", accept],
            lambda accept=accept: lab.k.Consumer(lab.connection, queue, accept=accept).accept,
        )
    with lab.consuming(queue, callbacks=[lambda body, m: taken.append(body)], no_ack=True):
        publish(lab, queue, b"x", content_type="application/x-own", content_encoding="binary")
        lab.attempt("own", lab.drain)
        publish(lab, queue, "x", content_type="application/x-own", content_encoding="utf-8")
        lab.attempt("own text", lab.drain)
    lab.note(taken)


@program()
def queues_without_acknowledgement(lab: Lab) -> None:
    for queue_says in (None, True, False):
        for consumer_says in (None, True, False):
            queue = lab.queue(f"-{queue_says}-{consumer_says}", no_ack=queue_says)
            seen: list[Any] = []
            with lab.consuming(queue, on_message=seen.append, no_ack=consumer_says) as consumer:
                publish(lab, queue, "x")
                lab.drain()
                lab.note(queue_says, consumer_says, consumer.no_ack, seen[0].acknowledged)
            for pause in (0.1, 0.3):  # RabbitMQ puts back what the channel had in its own time
                time.sleep(pause)
                left = queue.get(no_ack=True)
                if left is not None:
                    break
            lab.note(left is not None)


@program()
def adding_and_cancelling_queues(lab: Lab) -> None:
    one, two = lab.queue("-1"), lab.queue("-2")
    seen: list[Any] = []
    with lab.consuming(one, callbacks=[lambda body, m: seen.append(body)], no_ack=True) as consumer:
        lab.note([queue.name for queue in consumer.queues])
        lab.note(consumer.consuming_from(one), consumer.consuming_from(two.name))
        consumer.add_queue(two)
        lab.note(consumer.consuming_from(two))
        consumer.consume()
        lab.note(consumer.consuming_from(two.name), consumer.consuming_from("none"))
        publish(lab, one, 1)
        lab.drain()
        publish(lab, two, 2)
        lab.drain()
        consumer.cancel_by_queue(one.name)
        lab.note([queue.name for queue in consumer.queues], consumer.consuming_from(one))
        publish(lab, one, 3)
        publish(lab, two, 4)
        lab.drain()
        consumer.cancel()
        consumer.cancel()
        lab.note(consumer.consuming_from(two))
        lab.attempt("unknown queue", lambda: consumer.cancel_by_queue("none"))
    lab.note(seen)


@program()
def consumer_tags(lab: Lab) -> None:
    queue = lab.queue()
    tags: list[str] = []

    def take(message: Any) -> None:
        tags.append(message.delivery_info.get("consumer_tag", "worker-?"))

    with lab.consuming(queue, on_message=take, no_ack=True, tag_prefix="worker-"):
        publish(lab, queue, "x")
        lab.drain()
    with lab.connection.channel() as channel:
        queue(channel).consume("my-tag", callback=lambda message: tags.append("own"), no_ack=True)
        publish(lab, queue, "x")
        lab.drain()
        channel.basic_cancel("my-tag")
    lab.note(tags[0].startswith("worker-"), tags[1:])


@program()
def cancelling_an_unknown_tag(lab: Lab) -> None:
    lab.attempt("cancel", lambda: lab.connection.default_channel.basic_cancel("none"))


@program()
def prefetch(lab: Lab) -> None:
    queue = lab.queue()
    taken: list[Any] = []
    publish(lab, queue, 0, 1, 2, 3)
    with lab.consuming(queue, on_message=taken.append, prefetch_count=2) as consumer:
        lab.drain_until(taken, 2)
        try:
            lab.connection.drain_events(timeout=0.05)
        except OSError as exc:
            lab.note(type(exc).__name__)
        lab.note([message.payload for message in taken])
        taken[0].ack()
        lab.drain()
        taken[1].reject()
        lab.drain()
        lab.note([message.payload for message in taken], consumer.prefetch_count)
        for message in taken[2:]:
            message.ack()
        lab.attempt("qos", lambda: consumer.qos(prefetch_count=0))
        lab.attempt("global qos", lambda: consumer.qos(0, 5, True))


@program()
def purging(lab: Lab) -> None:
    one, two = lab.queue("-1"), lab.queue("-2")
    publish(lab, one, 1, 2, 3)
    publish(lab, two, 4)
    lab.note(fetch(two, no_ack=True).payload)
    consumer = lab.k.Consumer(lab.connection, [one, two])
    lab.note(consumer.purge(), consumer.purge())


@program()
def recovering(lab: Lab) -> None:
    queue = lab.queue()
    taken: list[Any] = []
    with lab.consuming(queue, on_message=taken.append) as consumer:
        publish(lab, queue, "x")
        lab.drain()
        lab.attempt("recover", lambda: consumer.recover(requeue=True) and None)
        lab.drain_until(taken, 2)
        taken[-1].ack()
    lab.note([message.payload for message in taken])


@program()
def flow(lab: Lab) -> None:
    consumer = lab.k.Consumer(lab.connection, lab.queue())
    lab.attempt("flow on", lambda: consumer.flow(True))


@program()
def draining_nothing(lab: Lab) -> None:
    queue = lab.queue()
    with lab.consuming(queue, callbacks=[lambda *_: None]):
        for timeout in (0.01, 0.05):
            lab.attempt(
                timeout, lambda timeout=timeout: lab.connection.drain_events(timeout=timeout)
            )


@program()
def several_channels(lab: Lab) -> None:
    one, two = lab.queue("-1"), lab.queue("-2")
    seen: list[Any] = []
    with (
        lab.consuming(one, callbacks=[lambda body, m: seen.append(["one", body])], no_ack=True),
        lab.consuming(two, callbacks=[lambda body, m: seen.append(["two", body])], no_ack=True),
    ):
        publish(lab, one, 1)
        publish(lab, two, 2)
        lab.drain_until(seen, 2)
    lab.note(sorted(seen))


@program()
def an_error_in_a_callback(lab: Lab) -> None:
    queue = lab.queue()

    def fail(body: Any, message: Any) -> None:
        raise ZeroDivisionError(body)

    with lab.consuming(queue, callbacks=[fail]):
        publish(lab, queue, "x")
        lab.attempt("drain", lab.drain)
        lab.note(lab.connection.connected)


@program()
def getting_one(lab: Lab) -> None:
    queue = lab.queue()
    lab.note(queue.get(), queue.get(no_ack=True))
    publish(lab, queue, {"a": 1}, {"b": 2})
    message = fetch(queue)
    lab.note(show(message))
    message.ack()
    lab.note(message.acknowledged)
    lab.note(show(fetch(queue, no_ack=True, accept=["json"])))
    lab.note(queue.get())
    publish(lab, queue, {"c": 3}, serializer="pickle")
    refused = fetch(queue, no_ack=True, accept=["json"])
    lab.attempt("refused", lambda: refused.payload)


@program()
def settling_twice(lab: Lab) -> None:
    queue = lab.queue()
    for first in ("ack", "reject", "requeue"):
        for second in ("ack", "reject", "requeue"):
            queue.purge()
            publish(lab, queue, "x")
            message = fetch(queue)
            getattr(message, first)()
            lab.note(first, message.acknowledged, message._state if first == "ack" else None)
            lab.attempt(second, getattr(message, second))
            if first == "requeue":
                fetch(queue, no_ack=True)


@program()
def requeued_messages(lab: Lab) -> None:
    queue = lab.queue()
    publish(lab, queue, "x")
    message = fetch(queue)
    lab.note(message.delivery_info.get("redelivered"))
    message.requeue()
    again = fetch(queue)
    lab.note(again.payload, bool(again.delivery_info.get("redelivered")))
    again.reject(requeue=True)
    again = fetch(queue)
    lab.note(again.payload)
    again.reject()
    lab.note(queue.get())


@program()
def unsettled_messages_of_a_closed_channel(lab: Lab) -> None:
    queue = lab.queue()
    publish(lab, queue, 1, 2)
    with lab.connection.channel() as channel:
        other = queue(channel)
        lab.note(fetch(other).payload, fetch(other).payload)
    lab.note(*(show(fetch(queue, no_ack=True)) for _ in range(2)))


@program()
def settling_with_a_log(lab: Lab) -> None:
    import logging

    queue = lab.queue()
    logger = logging.getLogger("quiet")
    for method in ("ack_log_error", "reject_log_error"):
        publish(lab, queue, "x")
        message = fetch(queue)
        lab.attempt(method, lambda m=message, n=method: getattr(m, n)(logger, (KeyError,)))
        lab.note(message.acknowledged)
        lab.attempt("twice", lambda m=message, n=method: getattr(m, n)(logger, (KeyError,)))


@program()
def decoding_and_its_cache(lab: Lab) -> None:
    message = lab.trip({"a": [1]})
    lab.note(message.payload is message.payload, message.decode() == message.payload)
    lab.note(message.errors, type(message.delivery_info).__name__, type(message.headers).__name__)
    message.headers["mine"] = 1
    message.properties["mine"] = 2
    message.delivery_info["mine"] = 3
    lab.note(message.headers["mine"], message.properties["mine"], message.delivery_info["mine"])
    lab.note(message.channel is not None, message.body)


@program()
def public_names_of_a_message(lab: Lab) -> None:
    message = lab.trip("x")
    for name in (
        *("ack", "ack_log_error", "acknowledged", "body", "channel", "content_encoding"),
        *("content_type", "decode", "delivery_info", "delivery_tag", "errors", "headers"),
        *("MessageStateError", "payload", "properties", "reject", "reject_log_error", "requeue"),
        "accept",
    ):
        lab.note(name, hasattr(message, name))


@program()
def a_consumer_of_a_revived_channel(lab: Lab) -> None:
    queue = lab.queue()
    seen: list[Any] = []
    channel = lab.connection.channel()
    consumer = lab.k.Consumer(
        channel, queue, callbacks=[lambda body, m: seen.append(body)], no_ack=True
    )
    consumer.consume()
    channel.close()
    with lab.connection.channel() as other:
        consumer.revive(other)
        lab.note(consumer.channel is other, [each.channel is other for each in consumer.queues])
        consumer.consume()
        publish(lab, queue, "x")
        lab.drain()
        consumer.cancel()
    lab.note(seen)


@program()
def a_consumer_declares(lab: Lab) -> None:
    queue = lab.k.Queue(f"{lab.name}-auto", lab.k.Exchange(f"{lab.name}-auto"), routing_key="k")
    channel = lab.connection.channel()
    lab.k.Consumer(channel, queue)
    lab.note(queue(channel).queue_declare(passive=True)[0])
    other = lab.k.Queue(f"{lab.name}-manual")
    consumer = lab.k.Consumer(channel, other, auto_declare=False)
    lab.note(consumer.auto_declare)
    lab.attempt("not declared", lambda: other(channel).queue_declare(passive=True))


@program()
def two_consumers_share_a_queue(lab: Lab) -> None:
    queue = lab.queue()
    seen: list[Any] = []
    with (
        lab.consuming(queue, callbacks=[lambda body, m: seen.append(body)], no_ack=True),
        lab.consuming(queue, callbacks=[lambda body, m: seen.append(body)], no_ack=True),
    ):
        publish(lab, queue, *range(10))
        lab.drain_until(seen, 10)
    lab.note(sorted(seen))


@program()
def a_consumer_in_words(lab: Lab) -> None:
    consumer = lab.k.Consumer(lab.connection, lab.queue())
    lab.note(repr(consumer).replace(lab.package, "kombu").split(":")[0])
    lab.note(consumer.connection is lab.connection, consumer.callbacks, consumer.no_ack)
    lab.note(consumer.on_message, consumer.on_decode_error, consumer.accept, consumer.tag_prefix)
