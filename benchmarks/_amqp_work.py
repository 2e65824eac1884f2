"""What bench_amqp measures, written once against the API that greenkombu and Kombu share.

Usage: python _amqp_work.py PACKAGE URL [ENVIRONMENT]; see `_contenders` for what it reads and
writes.  Patches first.  Where the two packages need different programs, it says so.
"""

from __future__ import annotations

import sys

import _common

PACKAGE, URL = sys.argv[1], sys.argv[2]
ENVIRONMENT = sys.argv[3] if len(sys.argv) > 3 else "gevent"
_common.patch(ENVIRONMENT)

import gc
import importlib
import os
import random
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

from _contenders import answer_orders

OURS = PACKAGE == "greenkombu"
BODY = {"id": "0d9b5b6e-7a0d-4a55-9e5c", "task": "resize", "args": [1, 2, 3], "path": "/media/cat"}
#: An exchange that nothing is bound to: the broker drops what comes.
NOWHERE = "bench-nowhere"

module = importlib.import_module(PACKAGE)

# Said in full: what Kombu makes of ssl=True depends on its version.
TLS: Any = False
if URL.startswith("amqps:"):
    TLS = {
        "ca_certs": os.environ["GREENKOMBU_BENCH_CA"],
        "cert_reqs": ssl.CERT_REQUIRED,
        "server_hostname": "localhost",
    }


class Clock:
    """CPU (user and system, all threads) and wall time of a block, per operation."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> Clock:
        gc.collect()
        self.cpu, self.wall = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.cpu = time.process_time() - self.cpu
        self.wall = time.perf_counter() - self.wall

    def answer(self, **more: Any) -> dict[str, Any]:
        scale = 1e6 / self.count
        return {
            "cpu_us": self.cpu * scale,
            "wall_us": self.wall * scale,
            "count": self.count,
            **more,
        }


def in_tasks(count: int, work: Callable[[int], None]) -> None:
    """Run work(number) in `count` tasks: threads, which are green where they are patched."""
    tasks = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(count)]
    for task in tasks:
        task.start()
    for task in tasks:
        task.join()


class Rows:
    """Each method is a row of the benchmark."""

    def __init__(self) -> None:
        self.connection = self.connect()
        self.channel = self.connection.channel()
        self.open: dict[str, Any] = {}

    def connect(self, heartbeat: float = 0, **options: Any) -> Any:
        connection = module.Connection(URL, heartbeat=heartbeat, ssl=TLS, transport_options=options)
        connection.connect()
        return connection

    def kept(self, name: str, **options: Any) -> Any:
        """Return a channel of a connection of its own with these transport options."""
        if name not in self.open:
            connection = self.connect(**options)
            self.open[name] = (connection, connection.channel())
        return self.open[name][1]

    # -- publishing

    def publish_raw(self, count: int, size: int = 100, burst: int = 64, each: bool = False) -> Any:
        """Channel.basic_publish; after each burst the other tasks run.

        `each`: every message goes out before the call returns; Kombu always does that.
        """
        channel = self.kept("each", coalesce=False) if each and OURS else self.channel
        body = b"x" * size
        options: dict[str, Any] = {"delivery_mode": 2}
        with Clock(count) as clock:
            for number in range(count):
                message = channel.prepare_message(
                    body, 0, "application/data", "binary", {}, options
                )
                channel.basic_publish(message, exchange=NOWHERE, routing_key="bench")
                if number % burst == 0:
                    time.sleep(0)
            self.sent(channel)
        return clock.answer()

    def publish_producer(
        self, count: int, json: bool = True, size: int = 100, burst: int = 64, each: bool = False
    ) -> Any:
        """Producer.publish of a JSON body or of bytes."""
        channel = self.kept("each", coalesce=False) if each and OURS else self.channel
        exchange = module.Exchange(NOWHERE, "fanout", durable=False, delivery_mode=2)
        producer = module.Producer(channel, exchange, "bench", auto_declare=False)
        body: Any = BODY if json else b"x" * size
        publish = producer.publish
        with Clock(count) as clock:
            for number in range(count):
                publish(body)
                if number % burst == 0:
                    time.sleep(0)
            self.sent(channel)
        return clock.answer()

    def sent(self, channel: Any) -> None:
        """An answer of the broker: everything before it has been sent and taken."""
        channel.basic_qos(0, 100, False)

    def publish_confirmed(self, count: int, tasks: int = 1) -> Any:
        """Each publish waits for the broker's confirm; tasks share one connection and channel."""
        channel = self.kept("confirm", confirm_publish=True)
        exchange = module.Exchange(NOWHERE, "fanout", durable=False, delivery_mode=2)
        producer = module.Producer(channel, exchange, "bench", auto_declare=False)
        body = b"x" * 100

        def work(number: int) -> None:
            for _ in range(count // tasks):
                producer.publish(body)

        with Clock(count // tasks * tasks) as clock:
            if tasks == 1:
                work(0)
            else:
                in_tasks(tasks, work)
        return clock.answer()

    def fill(self, queue: str, count: int, json: bool = False) -> Any:
        """Put messages into a queue; not measured."""
        channel = self.kept("confirm", confirm_publish=True)
        channel.queue_declare(queue, durable=False, auto_delete=False)
        channel.queue_purge(queue)
        producer = module.Producer(channel, "", queue, auto_declare=False)
        body: Any = BODY if json else b"x" * 100

        def work(number: int) -> None:
            for _ in range(count // 100):
                producer.publish(body, delivery_mode=1)

        in_tasks(100, work)
        return {"count": count}

    # -- consuming

    def consume(self, queue: str, count: int, prefetch: int = 0) -> Any:
        """Consumer with a callback and drain_events; prefetch 0 is no_ack."""
        channel = self.connection.channel()
        if prefetch:
            channel.basic_qos(0, prefetch, False)
        seen = 0

        def take(body: Any, message: Any) -> None:
            nonlocal seen
            seen += 1
            if prefetch:
                message.ack()

        consumer = module.Consumer(
            channel,
            module.Queue(queue, durable=False),
            no_ack=not prefetch,
            callbacks=[take],
            auto_declare=False,
            accept=["json", "application/data"],
        )
        drain = self.connection.drain_events
        before = self.calls()
        with Clock(count) as clock:
            consumer.consume()
            while seen < count:
                drain(timeout=10)
        calls = self.calls()
        consumer.cancel()
        channel.close()
        received = None if calls is None or before is None else (calls[0] - before[0]) / count
        return clock.answer(recv_per_message=received)

    def calls(self) -> tuple[int, int] | None:
        """Return our counters of recv and send calls."""
        if not OURS:
            return None
        stream = self.connection.connection.stream
        return stream.recv_calls, stream.send_calls

    # -- requests and replies

    def rpc(self, count: int, tasks: int = 100, shared: bool = True) -> Any:
        """Tasks ask a server (queue "bench-rpc") and wait for the reply, one by one."""
        return self._rpc_shared(count, tasks) if shared else self._rpc_own(count, tasks)

    def _rpc_own(self, count: int, tasks: int) -> Any:
        """Every task has a connection of its own."""
        callers = self.open.get("callers")
        if callers is None:
            callers = self.open["callers"] = [self._caller(self.connect()) for _ in range(tasks)]

        def work(number: int) -> None:
            connection, producer, reply_to, replies = callers[number]
            for turn in range(count // tasks):
                producer.publish(
                    b"ask",
                    exchange="",
                    routing_key="bench-rpc",
                    reply_to=reply_to,
                    correlation_id=str(turn),
                    delivery_mode=1,
                )
                while str(turn) not in replies:
                    connection.drain_events(timeout=10)
                replies.clear()

        with Clock(count // tasks * tasks) as clock:
            in_tasks(tasks, work)
        return clock.answer()

    def _caller(self, connection: Any) -> Any:
        channel = connection.channel()
        reply_to = channel.queue_declare("", exclusive=True)[0]
        replies: dict[str, Any] = {}

        def take(body: Any, message: Any) -> None:
            replies[message.properties["correlation_id"]] = body

        consumer = module.Consumer(
            channel,
            module.Queue(reply_to, exclusive=True, durable=False),
            no_ack=True,
            callbacks=[take],
            auto_declare=False,
            accept=["application/data"],
        )
        consumer.consume()
        producer = module.Producer(channel, auto_declare=False)
        # The consumer too: it lives as long as the caller.
        return connection, producer, reply_to, _Replies(replies, consumer)

    def _rpc_shared(self, count: int, tasks: int) -> Any:
        """One connection takes the replies for all; a task drains it.

        Ours also publishes on it.  Kombu's cannot be written by one greenlet while another reads
        it: it publishes on a second one, under a lock.
        """
        from gevent.event import AsyncResult
        from gevent.lock import Semaphore

        if "shared" not in self.open:
            self.open["shared"] = self._shared()
        producer, reply_to, waiting = self.open["shared"]
        lock = None if OURS else Semaphore()

        def ask(body: bytes, ident: str) -> Any:
            result = waiting[ident] = AsyncResult()
            options = {"exchange": "", "routing_key": "bench-rpc", "delivery_mode": 1}
            if lock is None:
                producer.publish(body, reply_to=reply_to, correlation_id=ident, **options)
            else:
                with lock:
                    producer.publish(body, reply_to=reply_to, correlation_id=ident, **options)
            return result.get()

        def work(number: int) -> None:
            for turn in range(count // tasks):
                ask(b"ask", f"{number}-{turn}")

        with Clock(count // tasks * tasks) as clock:
            in_tasks(tasks, work)
        return clock.answer()

    def _shared(self) -> Any:
        connection = self.connect()
        channel = connection.channel()
        reply_to = channel.queue_declare("", exclusive=True)[0]
        waiting: dict[str, Any] = {}

        def take(body: Any, message: Any) -> None:
            waiting.pop(message.properties["correlation_id"]).set(body)

        consumer = module.Consumer(
            channel,
            module.Queue(reply_to, exclusive=True, durable=False),
            no_ack=True,
            callbacks=[take],
            auto_declare=False,
            accept=["application/data"],
        )
        consumer.consume()

        def drain() -> None:
            while consumer:
                try:
                    connection.drain_events(timeout=60)
                except TimeoutError:
                    pass

        threading.Thread(target=drain, daemon=True).start()
        publishing = channel if OURS else self.connect().channel()
        return module.Producer(publishing, auto_declare=False), reply_to, waiting

    def serve(self) -> Any:
        """Answer requests for ever: the other side of `rpc`."""
        channel = self.channel
        channel.queue_declare("bench-rpc", durable=False, auto_delete=False)
        producer = module.Producer(channel, auto_declare=False)

        def take(body: Any, message: Any) -> None:
            asked = message.properties
            producer.publish(
                body,
                exchange="",
                routing_key=asked["reply_to"],
                correlation_id=asked["correlation_id"],
                delivery_mode=1,
            )

        consumer = module.Consumer(
            channel,
            module.Queue("bench-rpc", durable=False),
            no_ack=True,
            callbacks=[take],
            auto_declare=False,
            accept=["application/data"],
        )
        consumer.consume()

        def drain() -> None:
            while True:
                try:
                    self.connection.drain_events(timeout=60)
                except TimeoutError:
                    pass

        print('{"serving": true}', flush=True)
        drain()

    # -- many connections

    def connections(self, count: int, idle: float = 5.0, messages: int = 600) -> Any:
        """Open connections with a consumer each; measure them idle, then the time of messages.

        Ours are served by one task, Kombu's by one each, as it has no other way.
        """
        before = _common.resident_bytes()
        arrived: list[float] = []

        def take(body: Any, message: Any) -> None:
            arrived.append(time.monotonic() - body["sent"])

        opened: list[Any] = []
        # The broker may still be closing those of the last round.
        prefix = f"bench-{time.time_ns()}"
        with Clock(count) as setup:
            loop = module.DrainLoop() if OURS else None
            for number in range(count):
                connection = self.connect(heartbeat=10)
                channel = connection.channel()
                consumer = module.Consumer(
                    channel,
                    module.Queue(f"{prefix}-{number}", exclusive=True, durable=False),
                    no_ack=True,
                    callbacks=[take],
                )
                consumer.consume()
                opened.append((connection, consumer))
                if loop is not None:
                    loop.join(connection)
                else:
                    threading.Thread(target=_serve_one, args=(connection,), daemon=True).start()
            if loop is not None:
                threading.Thread(target=loop.run_forever, daemon=True).start()
        time.sleep(1.0)
        resident = (_common.resident_bytes() - before) / count / 1024
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(idle)
        idle_us = (time.process_time() - cpu) / (time.perf_counter() - wall) / count * 1e6
        producer = module.Producer(self.channel, auto_declare=False)
        for _ in range(messages):
            name = f"{prefix}-{random.randrange(count)}"
            producer.publish({"sent": time.monotonic()}, exchange="", routing_key=name)
            time.sleep(0.003)
        until = time.monotonic() + 10
        while len(arrived) < messages and time.monotonic() < until:
            time.sleep(0.01)
        arrived.sort()
        return setup.answer(
            setup_cpu_s=setup.cpu,
            resident_kib=resident,
            idle_us=idle_us,
            p50_ms=arrived[len(arrived) // 2] * 1e3,
            p99_ms=arrived[int(len(arrived) * 0.99)] * 1e3,
            lost=messages - len(arrived),
        )


class _Replies(dict[str, Any]):
    """Replies by correlation id, and the consumer that brings them."""

    def __init__(self, replies: dict[str, Any], consumer: Any) -> None:
        self.replies = replies
        self.consumer = consumer

    def __contains__(self, key: object) -> bool:
        return key in self.replies

    def clear(self) -> None:
        self.replies.clear()


def _serve_one(connection: Any) -> None:
    while True:
        try:
            connection.drain_events(timeout=4)
        except TimeoutError:
            connection.heartbeat_check()


if __name__ == "__main__":
    answer_orders(Rows())
