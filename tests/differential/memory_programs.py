"""Programs for memory:// that run on Kombu and on greenkombu; `test_memory` compares what they see.

Run: ``python memory_programs.py PACKAGE``.  Writes one JSON object: program name -> what it saw.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

Program = Callable[[Any, Any], Any]
PROGRAMS: dict[str, Program] = {}


def program(function: Program) -> Program:
    PROGRAMS[function.__name__] = function
    return function


def show(message: Any) -> Any:
    """Return all that a program can see of a message, delivery tags apart."""
    if message is None:
        return None
    properties = {k: v for k, v in message.properties.items() if k != "delivery_tag"}
    body = message.body
    return {
        "body": body.hex() if isinstance(body, bytes) else ["str", body],
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": message.headers,
        "properties": properties,
        "delivery_info": message.delivery_info,
        "acknowledged": message.acknowledged,
        "tag": type(message.delivery_tag).__name__,
    }


def attempt(connection: Any, function: Callable[[], Any]) -> Any:
    """Return the result of a call, or what an except clause would see of its error."""
    try:
        result = function()
    except Exception as exc:
        return {
            "channel_error": isinstance(exc, connection.channel_errors),
            "connection_error": isinstance(exc, connection.connection_errors),
            "not_implemented": isinstance(exc, NotImplementedError),
            "reply_code": getattr(exc, "reply_code", None),
        }
    return repr(result) if not isinstance(result, (str, int, list, tuple, type(None))) else result


@program
def bodies_and_properties(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    queue = k.Queue("q", k.Exchange("e", "direct"), routing_key="rk")(channel)
    queue.declare()
    producer = k.Producer(channel, queue.exchange, "rk")
    seen = []
    for body, options in (
        ({"a": 1}, {}),
        ("text ❄", {}),
        (b"\x00\xff", {}),
        ([1, None, True, 1.5], {"headers": {"h": {"deep": [1]}}, "priority": 3}),
        ({"a": 1}, {"compression": "zlib"}),
        ({"a": 1}, {"serializer": "pickle"}),
        ({"a": 1}, {"expiration": 60, "delivery_mode": 1, "correlation_id": "c"}),
        ({"a": 1}, {"reply_to": "r", "message_id": "m", "type": "t", "user_id": "u"}),
        ("raw", {"content_type": "application/x-own", "content_encoding": "utf-8"}),
        ({"a": 1}, {"mandatory": False, "immediate": False, "custom_property": 5}),
        ({"a": 1}, {"delivery_mode": "transient"}),
    ):
        producer.publish(body, **options)
        message = queue.get(accept=["json", "pickle", "text/plain", "application/data"])
        payload = attempt(connection, lambda message=message: repr(message.payload))
        seen.append([show(message), payload, message.acknowledged])
        message.ack()
    return seen


@program
def what_the_queue_holds(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    channel.queue_declare("q")
    k.Producer(channel).publish({"a": 1}, routing_key="q", headers={"h": 1}, priority=2)
    raw = channel._get("q")
    del raw["properties"]["delivery_tag"]
    return raw


@program
def prepared_messages(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    return [
        channel.prepare_message("b"),
        channel.prepare_message("b", 3, "ct", "ce", {"h": 1}, {"p": 2}),
        channel.encode_body("abc", "base64"),
        channel.encode_body("abc"),
        channel.decode_body("YWJj", "base64").decode(),
        channel.decode_body("abc"),
        [
            channel._get_message_priority({"properties": {"priority": p}}, reverse=r)
            for p in (0, 3, 99, "x", -1)
            for r in (False, True)
        ],
    ]


@program
def routing(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    seen: dict[str, Any] = {}
    for kind, keys in (
        ("direct", ["a", "a.b", ""]),
        ("topic", ["a.*", "a.#", "*.b", "#", "a.b"]),
        ("fanout", ["x", "y"]),
    ):
        exchange = k.Exchange(f"x.{kind}", kind)
        queues = [k.Queue(f"{kind}.{key}", exchange, routing_key=key)(channel) for key in keys]
        for queue in queues:
            queue.declare()
        for key in ("a.b", "c.b", "a.b.c", "a.x"):
            k.Producer(channel, exchange).publish(key, routing_key=key)
        for queue in queues:
            found = []
            while (message := queue.get(no_ack=True)) is not None:
                found.append([message.payload, message.delivery_info])
            seen[queue.name] = found
    return seen


@program
def declarations(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    queue = k.Queue("q", k.Exchange("e"), "k")(channel)
    seen = [queue.declare(), tuple(channel.queue_declare("q")), tuple(queue.queue_declare())]
    k.Producer(channel).publish("x", routing_key="q")
    seen.append(tuple(channel.queue_declare("q", passive=True)))
    seen.append(queue.purge())
    seen.append(queue.purge())
    seen.append(channel.get_exchanges())
    seen.append(sorted(map(list, channel.list_bindings())))
    seen.append([list(binding) for binding in channel.get_table("e")])
    seen.append(sorted(channel._lookup("e", "k")))
    seen.append(sorted(channel._lookup("e", "none")))
    queue.unbind_from(k.Exchange("e"), "k")
    seen.append(sorted(map(list, channel.list_bindings())))
    return seen


@program
def errors(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    channel.exchange_declare("e", "direct", durable=True)
    channel.queue_declare("q")
    calls = {
        "passive queue": lambda: channel.queue_declare("none", passive=True),
        "passive exchange": lambda: channel.exchange_declare("none", passive=True),
        "cancel unknown": lambda: channel.basic_cancel("none"),
        "ack unknown": lambda: channel.basic_ack("none"),
        "reject unknown": lambda: channel.basic_reject("none"),
        "get from missing": lambda: channel.basic_get("none"),
        "purge missing": lambda: channel.queue_purge("none"),
        "unbind missing": lambda: channel.queue_unbind("q", "e", "none"),
        "flow": lambda: channel.flow(True),
        "recover": lambda: channel.basic_recover(),
        "qos": lambda: channel.basic_qos(0, 5, False),
        "declare again": lambda: channel.exchange_declare("e", "direct", durable=True),
        "unroutable": lambda: k.Producer(channel).publish("x", exchange="e", routing_key="none"),
        "close": channel.close,
        "close again": channel.close,
    }
    return {name: attempt(connection, call) for name, call in calls.items()}


@program
def consuming(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    seen: list[Any] = []
    queues = [k.Queue(name, k.Exchange("e"), name) for name in ("a", "b")]

    def take(body: Any, message: Any) -> None:
        seen.append([body, show(message)])
        message.ack()

    producer = k.Producer(channel)
    with k.Consumer(channel, queues, callbacks=[take], tag_prefix="t") as consumer:
        for name in ("a", "a", "b", "b"):
            producer.publish(name, exchange="e", routing_key=name)
        for _ in range(4):
            connection.drain_events(timeout=2)
        try:
            connection.drain_events(timeout=0.01)
        except Exception as exc:
            seen.append([type(exc).__name__, isinstance(exc, OSError)])
        seen.append([consumer.consuming_from("a"), consumer.consuming_from("none")])
        consumer.cancel_by_queue("a")
        seen.append([consumer.consuming_from("a"), [queue.name for queue in consumer.queues]])
        producer.publish("late", exchange="e", routing_key="a")
        producer.publish("still", exchange="e", routing_key="b")
        connection.drain_events(timeout=2)
    return seen


@program
def prefetch(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    taken: list[Any] = []
    seen: list[Any] = []
    queue = k.Queue("q")
    with k.Consumer(channel, queue, on_message=taken.append, prefetch_count=2) as consumer:
        for number in range(5):
            k.Producer(channel).publish(number, routing_key="q")
        for settle in (None, None, "ack", "reject", "ack"):
            if settle:
                getattr(taken.pop(0), settle)()
            seen.append(channel.qos.can_consume())
            connection.drain_events(timeout=2)
            seen.append([message.payload for message in taken])
        seen.append([channel.qos.prefetch_count, channel.qos.can_consume_max_estimate()])
        consumer.qos(prefetch_count=0)
        seen.append(channel.qos.can_consume_max_estimate())
    return seen


@program
def settled_twice(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    queue = k.Queue("q")(channel)
    queue.declare()
    seen = []
    for first in ("ack", "reject", "requeue"):
        for second in ("ack", "reject", "requeue"):
            queue.purge()
            k.Producer(channel).publish("x", routing_key="q")
            message = queue.get()
            getattr(message, first)()
            try:
                getattr(message, second)()
            except message.MessageStateError:
                seen.append([first, second, message.acknowledged])
    return seen


@program
def requeued(k: Any, connection: Any) -> Any:
    channel = connection.channel()
    queue = k.Queue("q")(channel)
    queue.declare()
    for number in range(3):
        k.Producer(channel).publish(number, routing_key="q")
    queue.get().requeue()
    messages = [queue.get() for _ in range(3)]
    messages[0].ack()
    channel.basic_recover(requeue=True)
    messages += [queue.get() for _ in range(2)]
    return {
        "payloads": sorted({message.payload for message in messages}),
        "order": [message.payload for message in messages],
        "redelivered": [message.delivery_info.get("redelivered") for message in messages],
        "left": show(queue.get()),
    }


@program
def simple_queues(k: Any, connection: Any) -> Any:
    seen: list[Any] = []
    with connection.SimpleQueue("simple") as simple:
        simple.put({"a": 1}, headers={"h": 1}, compression="zlib")
        simple.put("second", serializer="json")
        seen.append([len(simple), simple.qsize()])
        message = simple.get(block=True, timeout=2)
        seen.append([message.payload, message.headers])
        message.ack()
        seen.append(simple.get_nowait().payload)
        try:
            simple.get(timeout=0.01)
        except simple.Empty:
            seen.append("empty")
        simple.put(1)
        seen.append(simple.clear())
    with connection.SimpleBuffer("buffer") as buffer:
        buffer.put([1, 2])
        message = buffer.get(timeout=2)
        seen.append([message.payload, message.properties["delivery_mode"]])
        seen.append([buffer.queue.durable, buffer.queue.auto_delete, buffer.no_ack])
    return seen


@program
def undeliverable(k: Any, connection: Any) -> Any:
    import warnings

    options = {"deadletter_queue": "dl"}
    with k.Connection("memory://", transport_options=options) as other:
        channel = other.channel()
        channel.exchange_declare("e")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            k.Producer(channel).publish("lost", exchange="e", routing_key="none")
        return [
            show(channel.basic_get("dl")),
            [warning.category.__name__ for warning in caught],
        ]


@program
def replies(k: Any, connection: Any) -> Any:
    common = importlib.import_module(f"{k.__name__}.common")
    channel = connection.channel()
    exchange = k.Exchange("replies", "direct")
    reply_queue = k.Queue("reply", exchange, routing_key="reply")(channel)
    reply_queue.declare()
    requests = k.Queue("requests")(channel)
    requests.declare()
    producer = k.Producer(channel)
    producer.publish({"question": 1}, routing_key="requests", reply_to="reply", correlation_id="42")
    request = requests.get()
    common.send_reply(exchange, request, {"answer": 42}, producer)
    request.ack()
    return list(common.collect_replies(connection, channel, reply_queue, limit=1, timeout=2))


@program
def broadcast(k: Any, connection: Any) -> Any:
    common = importlib.import_module(f"{k.__name__}.common")
    channel = connection.channel()
    queues = [common.Broadcast("news")(channel) for _ in range(3)]
    for queue in queues:
        queue.declare()
    k.Producer(channel, k.Exchange("news", "fanout")).publish("hi")
    return [queue.get(no_ack=True).payload for queue in queues]


@program
def two_connections(k: Any, connection: Any) -> Any:
    with k.Connection("memory://") as other:
        queue = k.Queue("shared", k.Exchange("e"), "k")
        queue(connection.channel()).declare()
        k.Producer(other).publish("x", exchange="e", routing_key="k")
        return show(queue(other.channel()).get())


def main(package: str) -> None:
    k = importlib.import_module(package)
    memory = importlib.import_module(f"{package}.transport.memory")
    seen = {}
    for name, function in PROGRAMS.items():
        memory.Channel.queues.clear()
        memory.Transport.global_state.clear()
        with k.Connection("memory://") as connection:
            try:
                seen[name] = function(k, connection)
            except Exception as exc:
                seen[name] = f"ended by {type(exc).__name__}: {exc}"
    json.dump(seen, sys.stdout, default=repr)


if __name__ == "__main__":
    main(sys.argv[1])
