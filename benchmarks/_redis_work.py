"""What bench_redis measures, written once against the API that greenkombu and Kombu share.

Usage: python _redis_work.py PACKAGE URL [ENVIRONMENT]; see `_contenders` for what it reads and
writes.  PACKAGE is greenkombu, kombu, or redis: redis-py alone, which moves the same bytes with
LPUSH and BRPOP and nothing else.  Patches first.
"""

from __future__ import annotations

import sys

import _common

PACKAGE, URL = sys.argv[1], sys.argv[2]
ENVIRONMENT = sys.argv[3] if len(sys.argv) > 3 else "gevent"
_common.patch(ENVIRONMENT)

import gc
import importlib
import json
import os
import selectors
import socket
import threading
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from typing import Any

from _contenders import answer_orders

OURS, BARE = PACKAGE == "greenkombu", PACKAGE == "redis"
BODY = {"id": "0d9b5b6e-7a0d-4a55-9e5c", "task": "resize", "args": [1, 2, 3], "path": "/media/cat"}
#: The lists of a queue with Kombu's priorities, in the order in which it asks for them.
STEPS = ("", "\x06\x163", "\x06\x166", "\x06\x169")
#: What Kombu 5.7 stores for a body of 100 bytes.
ENVELOPE = json.dumps(
    {
        "body": "eHh4eHh4" * 17,
        "content-encoding": "binary",
        "content-type": "application/data",
        "headers": {},
        "properties": {
            "delivery_mode": 2,
            "delivery_info": {"exchange": "bench", "routing_key": "bench"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": "9f4c2b5e-58f7-4a3e-9d3c-0d9b5b6e7a0d",
        },
    }
).encode()

module = importlib.import_module(PACKAGE)


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


def pack(*words: Any) -> bytes:
    """Return a command as it is sent."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n%b" % (
        len(parts),
        b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts),
    )


class Crowd:
    """Consumers that wait in BRPOP for ever, in one thread, with as little of a client as can be.

    Args:
        count: how many, each with a socket of its own.
        registers: note each message as unacked, and acknowledge it, by transactions as Kombu's.
        arrived: called with the body of each message.
    """

    def __init__(self, count: int, registers: bool, arrived: Callable[[bytes], object]) -> None:
        self.registers = registers
        self.arrived = arrived
        self.selector = selectors.DefaultSelector()
        self.brpop = pack("BRPOP", *[f"idle{step}" for step in STEPS], 0)
        host, _, port = URL.partition("://")[2].partition("/")[0].rpartition(":")
        for number in range(count):
            link = socket.create_connection((host, int(port)))
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.selector.register(link, selectors.EVENT_READ, self._serve(link, number))

    def run(self) -> None:
        for key in list(self.selector.get_map().values()):
            next(key.data)
        while True:
            for key, _ in self.selector.select():
                next(key.data)

    def _serve(self, link: socket.socket, number: int) -> Iterator[None]:
        """Serve one consumer; each step is taken when there is something to read."""
        turn = 0
        while True:
            raw = b""
            yield from self._ask(link, self.brpop)
            while not (raw := raw + link.recv(65536)).endswith(b"}\r\n"):
                yield
            raw = raw[raw.index(b"{") : -2]
            if self.registers:
                turn += 1
                tag = f"{number}-{turn}"
                yield from self._transact(
                    link,
                    pack("ZADD", "unacked_index", time.time(), tag),
                    pack("HSET", "unacked", tag, raw),
                )
            self.arrived(b64decode(json.loads(raw)["body"]))
            if self.registers:
                yield from self._transact(
                    link, pack("ZREM", "unacked_index", tag), pack("HDEL", "unacked", tag)
                )

    @staticmethod
    def _ask(link: socket.socket, data: bytes) -> Iterator[None]:
        link.sendall(data)
        yield

    def _transact(self, link: socket.socket, *commands: bytes) -> Iterator[None]:
        yield from self._ask(link, pack("MULTI") + b"".join(commands) + pack("EXEC"))
        lines = 0
        while (lines := lines + link.recv(4096).count(b"\r\n")) < 2 + 2 * len(commands):
            yield


class Rows:
    """Each method is a row of the benchmark."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = {}
        if BARE:
            self.redis = module.Redis.from_url(URL)
            self.redis.ping()
        else:
            self.connection = self.connect()
            self.channel = self.connection.channel()

    def connect(self) -> Any:
        connection = module.Connection(URL)
        connection.connect()
        return connection

    # -- publishing

    def publish(self, count: int, tasks: int = 1, producer: bool = False) -> Any:
        """Publish through a direct exchange to a queue; each call returns when the server has it.

        Args:
            count: messages.
            tasks: how many publish at a time. Ours and redis-py's share one connection (redis-py
                by a pipeline of as many commands); Kombu's cannot be shared, so each task has its
                own.
            producer: a JSON body through `Producer`; else bytes through the channel.
        """
        if BARE:
            return self._publish_bare(count, tasks)
        own = tasks > 1 and not OURS
        senders = [self._sender(number if own else 0, producer) for number in range(tasks)]

        def work(number: int) -> None:
            send = senders[number]
            for _ in range(count // tasks):
                send()

        before = self._calls()
        with Clock(count // tasks * tasks) as clock:
            if tasks == 1:
                work(0)
            else:
                in_tasks(tasks, work)
        return clock.answer(**self._calls_since(before, count))

    def _calls(self) -> tuple[int, int]:
        """Return our counters of send and recv calls."""
        if not OURS:
            return 0, 0
        stream = self.connection.connection.wire.stream
        return stream.send_calls, stream.recv_calls

    def _calls_since(self, before: tuple[int, int], count: int) -> dict[str, float]:
        if not OURS:
            return {}
        sent, received = self._calls()
        return {"sends": (sent - before[0]) / count, "receives": (received - before[1]) / count}

    def _sender(self, number: int, producer: bool) -> Callable[[], object]:
        kept = self.open.get(f"publisher {number}")
        if kept is None:
            connection = self.connection if not number else self.connect()
            channel = connection.channel()
            exchange = module.Exchange("bench", "direct")
            module.Queue("bench", exchange, routing_key="bench")(channel).declare()
            kept = self.open[f"publisher {number}"] = (connection, channel, exchange)
        _, channel, exchange = kept
        if producer:
            publish = module.Producer(channel, exchange, "bench").publish
            return lambda: publish(BODY)
        body, options = b"x" * 100, {"delivery_mode": 2}

        def send() -> None:
            message = channel.prepare_message(body, 0, "application/data", "binary", {}, options)
            channel.basic_publish(message, exchange="bench", routing_key="bench")

        return send

    def _publish_bare(self, count: int, tasks: int) -> Any:
        redis = self.redis
        with Clock(count // tasks * tasks) as clock:
            if tasks == 1:
                for _ in range(count):
                    redis.lpush("bench", ENVELOPE)
            else:
                for _ in range(count // tasks):
                    pipeline = redis.pipeline(transaction=False)
                    for _ in range(tasks):
                        pipeline.lpush("bench", ENVELOPE)
                    pipeline.execute()
        return clock.answer()

    # -- consuming

    def consume(self, count: int, prefetch: int = 0) -> Any:
        """Take messages through Consumer and drain_events; with prefetch, ack each in its callback.

        redis-py: BRPOP of one message after the other.
        """
        if BARE:
            names = [f"bench{step}" for step in STEPS]
            with Clock(count) as clock:
                for _ in range(count):
                    assert self.redis.brpop(names, 10)
            return clock.answer()
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
            module.Queue("bench"),
            no_ack=not prefetch,
            callbacks=[take],
            auto_declare=False,
            accept=["json", "application/data"],
        )
        drain = self.connection.drain_events
        before = self._calls()
        with Clock(count) as clock:
            consumer.consume()
            while seen < count:
                drain(timeout=10)
            if OURS:
                self.connection.connection.finish()  # the acknowledgements are on the server
        counted = self._calls_since(before, count)
        consumer.cancel()
        channel.close()
        return clock.answer(**counted)

    # -- many idle consumers

    def wait(self, consumers: int, registers: bool = False) -> Any:
        """Have consumers wait, each with a connection of its own; they go on waiting.

        Ours are served by one task; PACKAGE redis has a `Crowd`, in the default environment.

        Args:
            consumers: how many.
            registers: of `Crowd`.
        """
        # Of each message: seconds until it was here. And POPs that brought nothing.
        self.latencies: list[float] = []
        self.pops = self.empty = 0
        if BARE:
            self._wait_bare(consumers, registers)
        else:
            self._wait_ours(consumers)
        return {"consumers": consumers}

    def _arrived(self, body: bytes) -> None:
        self.latencies.append(time.time() - float(body))

    def _wait_ours(self, consumers: int) -> None:
        self._count_pops()

        def take(body: Any, message: Any) -> None:
            self._arrived(body)
            message.ack()

        loop = module.DrainLoop()
        for _ in range(consumers):
            connection = self.connect()
            channel = connection.channel()
            channel.basic_qos(0, 10, False)
            consumer = module.Consumer(
                channel,
                module.Queue("idle"),
                callbacks=[take],
                auto_declare=False,
                accept=["application/data"],
            )
            consumer.consume()
            loop.join(connection)
            self.open[f"waiting {len(self.open)}"] = (connection, channel, consumer)
        threading.Thread(target=loop.run_forever, daemon=True).start()

    def _count_pops(self) -> None:
        """Count scripts that look for messages, and those that found none."""
        from greenkombu.transport.redis._scripts import POP
        from greenkombu.transport.redis.connection import Connection

        run = Connection.run

        def counted(
            connection: Any, script: Any, keys: Any, args: Any, done: Any = None, *more: Any
        ) -> None:
            def answered(reply: Any, *others: Any) -> None:
                lists = len(keys) - 4
                if not isinstance(reply, BaseException) and not any(reply[2 : 2 + lists]):
                    self.empty += 1
                done(reply, *others)

            if script is POP:
                self.pops += 1
            run(connection, script, keys, args, answered if script is POP else done, *more)

        Connection.run = counted  # type: ignore[method-assign]

    def _wait_bare(self, consumers: int, registers: bool) -> None:
        crowd = Crowd(consumers, registers, self._arrived)
        threading.Thread(target=crowd.run, daemon=True).start()

    def waited(self) -> Any:
        """Return what came since the last time."""
        taken, self.latencies = self.latencies, []
        pops, empty, self.pops, self.empty = self.pops, self.empty, 0, 0
        return {"latencies": taken, "pops": pops, "empty": empty}

    def produce(self, rate: float, seconds: float) -> Any:
        """Push messages that say when: redis-py, one LPUSH each, at most every millisecond."""
        head, _, tail = ENVELOPE.partition(b"eHh4eHh4" * 17)
        started = time.monotonic()
        sent = 0
        while (passed := time.monotonic() - started) < seconds:
            due = int(passed * rate) + 1 - sent
            if due > 0:
                pipeline = self.redis.pipeline(transaction=False)
                for _ in range(due):
                    body = b64encode(b"%.6f" % time.time())
                    pipeline.lpush("idle", head + body + tail)
                pipeline.execute()
                sent += due
            time.sleep(max(0.001, min((sent / rate) - (time.monotonic() - started), 0.1)))
        return {"count": sent}


def let_tasks_run() -> None:
    """Have reading of orders park the main greenlet only: patching leaves stdin alone."""
    if ENVIRONMENT == "gevent":
        from gevent.fileobject import FileObject

        sys.stdin = FileObject(sys.stdin.fileno(), "r", close=False)


if __name__ == "__main__":
    let_tasks_run()
    answer_orders(Rows())
    # Without a farewell of a thousand connections.
    os._exit(0)
