"""Simple queues, common helpers, mixins, mailboxes, carrot's interface, the small utilities."""

from __future__ import annotations

import time
from typing import Any

from tests.differential.programs.lab import Lab, fetch, program, show


@program()
def simple_queues(lab: Lab) -> None:
    with lab.connection.SimpleQueue(lab.name) as simple:
        lab.note(simple.queue.as_dict(recurse=True), simple.no_ack)
        simple.put({"a": 1}, headers={"h": 1}, compression="zlib", serializer="json")
        message = simple.get(timeout=5)
        lab.note(show(message))
        message.ack()
        lab.attempt("empty", lambda: simple.get(timeout=0.02))
        lab.attempt("empty at once", simple.get_nowait)
        lab.attempt("not blocking", lambda: simple.get(block=False))
        simple.put("x")
        simple.put("y")
        lab.note(simple.get(timeout=5).payload, simple.get(block=True, timeout=5).payload)
        lab.note(simple.Empty.__name__, len(simple) >= 0, bool(simple))
    with lab.connection.SimpleQueue(lab.name) as simple:
        lab.note(simple.clear() >= 0, simple.qsize())


@program()
def simple_buffers(lab: Lab) -> None:
    with lab.connection.SimpleBuffer(lab.name) as buffer:
        lab.note(buffer.queue.as_dict(recurse=True), buffer.no_ack)
        lab.note(buffer.producer.exchange.as_dict())
        buffer.put([1, 2])
        message = buffer.get(timeout=5)
        lab.note(show(message))


@program()
def simple_queues_with_options(lab: Lab) -> None:
    options: list[dict[str, Any]] = [
        {"queue_opts": {"durable": False}, "exchange_opts": {"type": "fanout", "durable": False}},
        {"no_ack": True},
        {"serializer": "pickle", "accept": ["pickle"]},
        {"compression": "bzip2"},
    ]
    for number, each in enumerate(options):
        with lab.connection.SimpleQueue(f"{lab.name}-{number}", **each) as simple:
            lab.note(simple.queue.as_dict(recurse=True), simple.no_ack)
            simple.put({"a": 1})
            lab.note(show(simple.get(timeout=5)))
    given = lab.k.Queue(f"{lab.name}-given", lab.k.Exchange(f"{lab.name}-e"), "k")
    with lab.connection.SimpleQueue(given) as simple:
        simple.put("x")
        lab.note(simple.get(timeout=5).payload, simple.queue.name)
    with lab.connection.channel() as channel:
        simple = lab.connection.SimpleQueue(f"{lab.name}-channel", channel=channel)
        lab.note(simple.channel is channel)
        simple.close()


@program()
def broadcasts(lab: Lab) -> None:
    broadcast = lab.module("common").Broadcast
    first = broadcast(lab.name, queue=f"{lab.name}-own", unique=False)
    described = first.as_dict(recurse=True)
    lab.note(described, broadcast("n").name.startswith("bcast."))
    unnamed = broadcast(queue=f"{lab.name}-own")
    lab.note(unnamed.name, unnamed.exchange.name, unnamed.alias, unnamed.auto_delete)
    channel = lab.connection.default_channel
    queues = [broadcast(lab.name)(channel) for _ in range(2)]
    for queue in queues:
        queue.declare()
    with lab.connection.Producer(exchange=queues[0].exchange) as producer:
        producer.publish("x")
    lab.note([fetch(queue, no_ack=True).payload for queue in queues])


@program()
def iterating_messages(lab: Lab) -> None:
    common = lab.module("common")
    queue = lab.queue()
    with lab.connection.Producer(
        exchange=queue.exchange, routing_key=queue.routing_key
    ) as producer:
        for number in range(3):
            producer.publish(number)
    seen = []
    unbound = lab.k.Queue(queue.name, lab.k.Exchange(queue.exchange.name), queue.routing_key)
    with lab.connection.channel() as channel:
        for body, message in common.itermessages(
            lab.connection, channel, unbound, limit=2, timeout=5
        ):
            message.ack()
            seen.append(body)
        lab.note(seen)
        for body, message in common.itermessages(
            lab.connection, channel, unbound, limit=2, timeout=1
        ):
            message.ack()
            seen.append(body)
    lab.note(seen)


@program()
def the_event_loop(lab: Lab) -> None:
    common = lab.module("common")
    queue = lab.queue()
    seen: list[Any] = []
    options = {"exchange": queue.exchange, "routing_key": queue.routing_key}
    with (
        lab.consuming(queue, callbacks=[lambda body, m: seen.append(body)], no_ack=True),
        lab.connection.Producer(**options) as producer,
    ):
        # One by one: Kombu may run several events in one turn, which counts as one.
        for number in range(3):
            producer.publish(number)
            lab.note(list(common.eventloop(lab.connection, limit=1, timeout=5)))
        lab.attempt(
            "timeout", lambda: list(common.eventloop(lab.connection, limit=1, timeout=0.01))
        )
        lab.note(
            list(common.eventloop(lab.connection, limit=2, timeout=0.01, ignore_timeouts=True))
        )
    lab.note(seen)


@program()
def replies(lab: Lab) -> None:
    common = lab.module("common")
    channel = lab.connection.default_channel
    requests, answers = lab.queue("-requests"), lab.queue("-answers")
    with lab.connection.Producer() as producer:
        producer.publish(
            {"q": 1},
            exchange=requests.exchange,
            routing_key=requests.routing_key,
            reply_to=answers.routing_key,
            correlation_id="c",
        )
        request = fetch(requests)
        common.send_reply(answers.exchange, request, {"a": 42}, producer, serializer="json")
        request.ack()
    queue = lab.k.Queue(answers.name, lab.k.Exchange(answers.exchange.name), answers.routing_key)
    lab.note(list(common.collect_replies(lab.connection, channel, queue, limit=1, timeout=5)))


@program("memory")
def small_common_things(lab: Lab) -> None:
    common = lab.module("common")
    lab.note(len(common.uuid()), common.uuid() == common.uuid())
    lab.note(common.oid_from(lab) == common.oid_from(lab), len(common.oid_from(lab)))
    lab.note(common.generate_oid(1, 2, 3, lab.k) == common.generate_oid(1, 2, 3, lab.k))
    calls: list[Any] = []
    qos = common.QoS(lambda prefetch_count, **k: calls.append([prefetch_count, sorted(k)]), 2)
    qos.update()
    lab.note(qos.increment_eventually(3), qos.value, qos.prev)
    qos.update()
    lab.note(qos.decrement_eventually(), qos.decrement_eventually(10), qos.value)
    qos.update()
    lab.attempt("set", lambda: qos.set(3))
    lab.attempt("too large", lambda: qos.set(2**17))
    lab.note(calls, qos.value, qos.prev)
    lab.note(
        {
            "Broadcast",
            "collect_replies",
            "drain_consumer",
            "eventloop",
            "insured",
            "itermessages",
            "maybe_declare",
            "send_reply",
            "uuid",
        }
        <= set(common.__all__)
    )


@program()
def insured_calls(lab: Lab) -> None:
    common = lab.module("common")
    queue = lab.queue()
    pool = lab.connection.Pool(1)
    state = {"left": 1}
    seen: list[Any] = []

    def work(value: Any, connection: Any = None, channel: Any = None, **kwargs: Any) -> Any:
        if state["left"]:
            state["left"] -= 1
            raise OSError("made up")
        return [value, channel is not None, queue.name]

    lab.attempt(
        "insured",
        lambda: common.insured(
            pool,
            work,
            ("x",),
            {},
            errback=lambda exc, interval: seen.append(type(exc).__name__),
            on_revive=lambda channel: seen.append("revived"),
        ),
    )
    lab.note(seen)
    pool.force_close_all()


def make_worker(lab: Lab, queue: Any, seen: list[Any], stop_after: int) -> Any:
    mixins = lab.module("mixins")

    class Worker(mixins.ConsumerMixin):  # type: ignore[misc, name-defined]
        connection = lab.connection

        def get_consumers(self, Consumer: Any, channel: Any) -> list[Any]:
            seen.append("get_consumers")
            return [Consumer(queue, callbacks=[self.on_task], accept=["json", "text/plain"])]

        def on_task(self, body: Any, message: Any) -> None:
            seen.append(["task", body])
            message.ack()
            self.should_stop = sum(isinstance(each, list) for each in seen) >= stop_after

        def on_connection_revived(self) -> None:
            seen.append("on_connection_revived")

        def on_consume_ready(
            self, connection: Any, channel: Any, consumers: Any, **kw: Any
        ) -> None:
            seen.append(f"on_consume_ready {len(consumers)} {sorted(kw)}")

        def on_consume_end(self, connection: Any, channel: Any) -> None:
            seen.append("on_consume_end")

        def on_iteration(self) -> None:
            if seen[-1] != "on_iteration":
                seen.append("on_iteration")

    return Worker()


@program()
def a_mixin_runs(lab: Lab) -> None:
    queue = lab.queue()
    seen: list[Any] = []
    with lab.connection.Producer(
        exchange=queue.exchange, routing_key=queue.routing_key
    ) as producer:
        producer.publish("a")
        producer.publish("b")
    worker = make_worker(
        lab,
        lab.k.Queue(queue.name, lab.k.Exchange(queue.exchange.name), queue.routing_key),
        seen,
        2,
    )
    worker.run(option=1)
    lab.note([each for each in seen if each != "on_iteration"], "on_iteration" in seen)


@program()
def a_mixin_consumes(lab: Lab) -> None:
    queue = lab.queue()
    seen: list[Any] = []
    with lab.connection.Producer(
        exchange=queue.exchange, routing_key=queue.routing_key
    ) as producer:
        producer.publish(7)
    worker = make_worker(
        lab,
        lab.k.Queue(queue.name, lab.k.Exchange(queue.exchange.name), queue.routing_key),
        seen,
        99,
    )
    lab.note(len(list(worker.consume(limit=1, timeout=5))))
    lab.note([each for each in seen if isinstance(each, list)])
    lab.attempt("timeout", lambda: list(worker.consume(limit=1, timeout=0.05)))
    lab.note(worker.connect_max_retries, worker.should_stop, worker.create_connection() is not None)


@program()
def a_mixin_that_cannot_decode(lab: Lab) -> None:
    queue = lab.queue()
    seen: list[Any] = []
    with lab.connection.Producer(
        exchange=queue.exchange, routing_key=queue.routing_key
    ) as producer:
        producer.publish("{", content_type="application/json", content_encoding="utf-8")
        producer.publish("good")
    worker = make_worker(
        lab,
        lab.k.Queue(queue.name, lab.k.Exchange(queue.exchange.name), queue.routing_key),
        seen,
        1,
    )
    worker.run()
    lab.note([each for each in seen if isinstance(each, list)])
    lab.note(queue.get())


@program()
def mailboxes(lab: Lab) -> None:
    pidbox = lab.module("pidbox")
    mailbox = pidbox.Mailbox(lab.name, type="fanout")
    lab.note(mailbox.namespace, mailbox.type, mailbox.exchange.as_dict(), mailbox.connection)
    bound = mailbox(lab.connection)
    lab.note(bound.connection is lab.connection, mailbox.reply_exchange.as_dict())
    queue = mailbox.get_queue("host")
    lab.note(queue.as_dict(recurse=True))
    reply = bound.get_reply_queue()
    lab.note(reply.exchange.name, reply.auto_delete, reply.durable, len(reply.routing_key))
    with lab.connection.channel() as channel:
        node = bound.Node("host", state={"who": "me"}, channel=channel)
        seen: list[Any] = []

        @node.handler
        def ping(state: Any, **kwargs: Any) -> Any:
            seen.append([state, kwargs])
            return {"pong": kwargs}

        @node.handler
        def fail(state: Any, **kwargs: Any) -> None:
            raise KeyError("made up")

        lab.note(sorted(node.handlers), node.hostname)
        consumer = node.listen()
        bound.cast(["host"], "ping", {"a": 1})
        lab.drain()
        bound.abcast("ping", {"b": 2})
        lab.drain()
        bound.cast(["other"], "ping", {"c": 3})
        lab.attempt("for another", lambda: lab.connection.drain_events(timeout=0.05))
        lab.note(seen)
        lab.attempt("by hand", lambda: node.dispatch("ping", {"d": 4}))
        lab.attempt("unknown", lambda: node.dispatch("no_such", {}))
        lab.attempt("failing", lambda: node.dispatch("fail", {}))
        lab.attempt("failing call", lambda: node.handle_call("fail", {}))
        consumer.cancel()


@program()
def a_mailbox_answers(lab: Lab) -> None:
    import threading

    pidbox = lab.module("pidbox")
    serving = lab.connection.clone()
    asking = lab.connection
    ready = threading.Event()
    done = threading.Event()

    def serve() -> None:
        channel = serving.channel()
        node = pidbox.Mailbox(lab.name, type="fanout")(serving).Node("host", channel=channel)
        node.handlers["ping"] = lambda state, **kwargs: {"pong": kwargs}
        node.handlers["fail"] = lambda state, **kwargs: {}[1]
        consumer = node.listen()
        ready.set()
        while not done.is_set():
            try:
                serving.drain_events(timeout=0.05)
            except OSError:
                pass
        consumer.cancel()
        channel.close()

    task = threading.Thread(target=serve, daemon=True)
    task.start()
    ready.wait(10)
    mailbox = pidbox.Mailbox(lab.name, type="fanout")(asking)
    try:
        lab.attempt("call", lambda: mailbox.call(["host"], "ping", {"a": 1}, timeout=5))
        lab.attempt("multi", lambda: mailbox.multi_call("ping", {"b": 1}, timeout=5, limit=1))
        lab.attempt(
            "fail", lambda: [sorted(e) for e in mailbox.multi_call("fail", {}, timeout=5, limit=1)]
        )
        lab.attempt("nobody", lambda: mailbox.call(["other"], "ping", {}, timeout=0.1))
        got: list[Any] = []
        lab.attempt(
            "callback",
            lambda: mailbox.multi_call("ping", {}, timeout=5, limit=1, callback=got.append),
        )
        lab.note(got)
    finally:
        done.set()
        task.join(10)
        serving.release()


def wait_for_messages(lab: Lab, queue: str, count: int) -> None:
    """Wait until a queue has `count` messages: what was published just now may be on its way."""
    for _ in range(400):
        found = lab.connection.default_channel.queue_declare(queue, passive=True)
        if found.message_count >= count:
            return
        time.sleep(0.005)
    raise AssertionError(f"{queue} does not get {count} messages")


@program()
def carrots_publisher_and_consumer(lab: Lab) -> None:
    compat = lab.module("compat")
    names = {"exchange": f"{lab.name}-e", "routing_key": "k"}
    consumer = compat.Consumer(lab.connection, queue=lab.name, exchange_type="direct", **names)
    publisher = compat.Publisher(lab.connection, exchange_type="direct", **names)
    lab.note(publisher.exchange.as_dict(), consumer.queue)
    publisher.send({"a": 1})
    publisher.send("two", delivery_mode=1)
    publisher.publish([3])

    def one() -> Any:
        for _ in range(200):
            message = consumer.fetch()
            if message is not None:
                return message
            time.sleep(0.005)
        return None

    for _ in range(3):
        message = one()
        lab.note(show(message))
        message.ack()
    lab.note(consumer.fetch(), consumer.discard_all())
    lab.attempt("filter", lambda: consumer.discard_all(filterfunc=lambda m: True))
    publisher.close()
    consumer.close()


@program()
def carrots_consumer_iterates(lab: Lab) -> None:
    compat = lab.module("compat")
    names = {"exchange": f"{lab.name}-e", "routing_key": "k"}
    seen: list[Any] = []
    with compat.Consumer(lab.connection, queue=lab.name, **names) as consumer:
        consumer.register_callback(lambda body, message: [seen.append(body), message.ack()])
        with compat.Publisher(lab.connection, **names) as publisher:
            publisher.send(0)
            lab.note(len(list(consumer.iterconsume(limit=1))))
            lab.note(seen)
    with compat.Publisher(lab.connection, **names) as publisher:
        publisher.send(1)
    wait_for_messages(lab, lab.name, 1)
    with compat.Consumer(lab.connection, queue=lab.name, **names) as consumer:
        left = consumer.iterqueue(limit=1)
        lab.attempt("iterqueue", lambda: len(list(left)))


@program()
def carrots_consumer_set(lab: Lab) -> None:
    compat = lab.module("compat")
    described = {
        f"{lab.name}-{name}": {
            "exchange": f"{lab.name}-e",
            "exchange_type": "topic",
            "binding_key": f"{name}.*",
        }
        for name in "ab"
    }
    seen: list[Any] = []
    consumers = compat.ConsumerSet(lab.connection, from_dict=described)
    lab.note(sorted(queue.name for queue in consumers.queues))
    consumers.register_callback(lambda body, message: [seen.append(body), message.ack()])
    consumers.consume()
    with lab.connection.Producer(exchange=lab.k.Exchange(f"{lab.name}-e", "topic")) as producer:
        producer.publish("to a", routing_key="a.x")
        producer.publish("to b", routing_key="b.x")
    lab.drain_until(seen, 2)
    lab.note(sorted(seen), consumers.discard_all())
    consumers.close()


@program("memory")
def clocks(lab: Lab) -> None:
    module = lab.module("clocks")
    clock = module.LamportClock(5)
    lab.note(clock.value, clock.forward(), clock.adjust(3), clock.adjust(10), str(clock))
    events = [
        module.timetuple(clock, stamp, who, obj)
        for clock, stamp, who, obj in (
            (1, 2.0, "a", "x"),
            (1, 1.0, "b", "y"),
            (None, 3.0, "c", "z"),
            (0, 9.0, "d", "w"),
        )
    ]
    lab.note([list(event) for event in events])
    lab.note(
        events[0] < events[1], events[3] < events[0], events[0].id, events[0].obj, events[0].clock
    )
    lab.note(clock.sort_heap([(1, "a"), (2, "b")]), clock.sort_heap([(3, "a"), (3, "b"), (4, "c")]))


@program("memory")
def matching(lab: Lab) -> None:
    matcher = lab.module("matcher")
    for data, pattern, kind in (
        ("celery.task", "celery.*", "glob"),
        ("celery", "task", "glob"),
        ("a1", r"a\d", "pcre"),
        ("b1", r"a\d", "pcre"),
    ):
        lab.note(bool(matcher.match(data, pattern, kind)))
    lab.attempt("unknown", lambda: matcher.match("a", "b", "nosuch"))
    matcher.register("starts", lambda data, pattern: data.startswith(pattern))
    lab.note(matcher.match("abc", "ab", "starts"))
    matcher.unregister("starts")
    lab.attempt("unregistered", lambda: matcher.match("abc", "ab", "starts"))


@program("memory")
def exceptions(lab: Lab) -> None:
    module = lab.module("exceptions")
    for name in (
        *("KombuError", "OperationalError", "SerializationError", "EncodeError", "DecodeError"),
        *("NotBoundError", "MessageStateError", "LimitExceeded", "ConnectionLimitExceeded"),
        *("ChannelLimitExceeded", "ConnectionError", "ChannelError", "VersionMismatch"),
        *("SerializerNotInstalled", "ContentDisallowed", "InconsistencyError", "HttpError"),
    ):
        cls = getattr(module, name, None)
        lab.note(
            name,
            [base.__name__ for base in cls.__mro__ if base.__module__ == "builtins"]
            if cls
            else None,
        )
        if cls and name != "HttpError":
            lab.note(issubclass(cls, module.KombuError), str(cls("text")))
    lab.note(module.TimeoutError is TimeoutError)


@program("memory")
def serialization_registry(lab: Lab) -> None:
    module = lab.module("serialization")
    lab.note(sorted(module.registry.type_to_name), sorted(module.registry.name_to_type))
    module.register("own", repr, eval, content_type="application/x-own", content_encoding="utf-8")
    lab.note(module.dumps([1], serializer="own"))
    lab.attempt("loads", lambda: module.loads("[1]", "application/x-own", "utf-8", accept=["own"]))
    lab.attempt(
        "not accepted", lambda: module.loads("[1]", "application/x-own", "utf-8", accept=["json"])
    )
    module.unregister("own")
    lab.attempt("gone", lambda: module.dumps([1], serializer="own"))
    lab.attempt("unknown", lambda: module.unregister("own"))
    module.disable_insecure_serializers()
    lab.note(sorted(module.registry._disabled_content_types))
    lab.attempt("pickle", lambda: module.loads(b"", "application/x-python-serialize", "binary"))
    module.enable_insecure_serializers(["pickle", "yaml"])
    lab.note(sorted(module.registry._disabled_content_types))
    module.disable_insecure_serializers()
    compression = lab.module("compression")
    lab.note(
        sorted(
            {"application/x-gzip", "application/x-bz2", "application/x-lzma"}
            & set(compression.encoders())
        )
    )
    for name in ("zlib", "gzip", "bzip2", "lzma"):
        lab.note(name, compression.get_encoder(name)[1])
    lab.attempt("unknown compression", lambda: compression.get_encoder("nosuch"))


@program("memory")
def pickling_messages(lab: Lab) -> None:
    message = lab.trip({"a": 1}, headers={"h": 1}, correlation_id="c")
    described = message.serializable()
    lab.note({key: type(value).__name__ for key, value in described.items()}, described["headers"])
    lab.note({k: v for k, v in described["properties"].items() if k != "delivery_tag"})


@program("memory")
def lazily_imported_names(lab: Lab) -> None:
    for name in (
        "Connection",
        "Consumer",
        "Exchange",
        "Producer",
        "Queue",
        "binding",
        "pools",
        "BrokerConnection",
        "parse_url",
        "eventloop",
        "uuid",
        "enable_insecure_serializers",
        "disable_insecure_serializers",
        "VERSION",
        "version_info_t",
        "__version__",
    ):
        lab.note(name, hasattr(lab.k, name))
    lab.note("Queue" in dir(lab.k))
