"""The rows of _amqp_work.py that other Python clients can run: pika and AMQPStorm, under gevent.

Usage: python _amqp_peers.py pika|amqpstorm URL.  pika runs on its own gevent adapter, with
callbacks; AMQPStorm's reader thread is a greenlet once threading is patched.
"""

from __future__ import annotations

import sys

import _common

_common.patch("gevent")

import gc
import os
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from _contenders import answer_orders

NOWHERE = "bench-nowhere"


class Clock:
    """CPU and wall time since it was made."""

    def __init__(self, count: int) -> None:
        gc.collect()
        self.count = count
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def answer(self) -> dict[str, Any]:
        scale = 1e6 / self.count
        return {
            "cpu_us": (time.process_time() - self.cpu) * scale,
            "wall_us": (time.perf_counter() - self.wall) * scale,
            "count": self.count,
        }


class Pika:
    """pika's GeventConnection: everything happens in callbacks of its loop."""

    def __init__(self, url: str) -> None:
        import pika
        from pika.adapters.gevent_connection import GeventConnection

        parameters = pika.URLParameters(url)
        parameters.heartbeat = 0
        if url.startswith("amqps:"):
            context = ssl.create_default_context(cafile=os.environ["GREENKOMBU_BENCH_CA"])
            parameters.ssl_options = pika.SSLOptions(context, "localhost")
        self.pika = pika
        self.channel: Any = None
        self.confirming: Any = None
        self.connection = GeventConnection(parameters, on_open_callback=self._connected)
        self.loop = self.connection.ioloop
        self.loop.start()

    def _connected(self, connection: Any) -> None:
        def first(channel: Any) -> None:
            self.channel = channel
            connection.channel(on_open_callback=second)

        def second(channel: Any) -> None:
            self.confirming = channel
            channel.confirm_delivery(
                self._confirmed, callback=lambda frame: self.connection.ioloop.stop()
            )

        connection.channel(on_open_callback=first)

    def _run(self, begin: Callable[[], None]) -> None:
        """Run the loop until something stops it."""
        self.loop.add_callback(begin)
        self.loop.start()

    def _properties(self) -> Any:
        return self.pika.BasicProperties(
            content_type="application/data",
            content_encoding="binary",
            headers={},
            delivery_mode=2,
            priority=0,
        )

    def publish_raw(self, count: int, size: int = 100, burst: int = 64, each: bool = False) -> Any:
        body = b"x" * size
        left = count
        channel = self.channel

        def some() -> None:
            nonlocal left
            for _ in range(min(burst, left)):
                channel.basic_publish(NOWHERE, "bench", body, self._properties())
            left -= burst
            if left > 0:
                self.loop.add_callback(some)
            else:
                channel.basic_qos(prefetch_count=100, callback=lambda frame: self.loop.stop())

        clock = Clock(count)
        self._run(some)
        return clock.answer()

    def _confirmed(self, frame: Any) -> None:
        tag = frame.method.delivery_tag
        self.unconfirmed -= tag - self.last if frame.method.multiple else 1
        self.last = max(self.last, tag)
        self.more()

    last = 0
    unconfirmed = 0
    more: Callable[[], None]

    def publish_confirmed(self, count: int, tasks: int = 1) -> Any:
        body = b"x" * 100
        left = count

        def some() -> None:
            nonlocal left
            while left and self.unconfirmed < tasks:
                left -= 1
                self.unconfirmed += 1
                self.confirming.basic_publish(NOWHERE, "bench", body, self._properties())
            if not left and not self.unconfirmed:
                self.loop.stop()

        self.more = some
        clock = Clock(count)
        self._run(some)
        return clock.answer()

    def consume(self, queue: str, count: int, prefetch: int = 0) -> Any:
        seen = 0
        channel = self.channel

        def take(channel: Any, method: Any, properties: Any, body: bytes) -> None:
            nonlocal seen
            seen += 1
            if prefetch:
                channel.basic_ack(method.delivery_tag)
            if seen == count:
                self.loop.stop()

        def begin() -> None:
            channel.basic_consume(queue, take, auto_ack=not prefetch, consumer_tag="bench")

        if prefetch:
            self._run(
                lambda: channel.basic_qos(
                    prefetch_count=prefetch, callback=lambda frame: self.loop.stop()
                )
            )
        clock = Clock(count)
        self._run(begin)
        answer = clock.answer()
        self._run(lambda: channel.basic_cancel("bench", callback=lambda frame: self.loop.stop()))
        return answer


class AMQPStorm:
    """AMQPStorm as its documentation uses it."""

    def __init__(self, url: str) -> None:
        import amqpstorm

        place = urlsplit(url)
        self.connection = amqpstorm.Connection(
            place.hostname, place.username, place.password, port=place.port
        )
        self.channel = self.connection.channel()
        self.confirming = self.connection.channel()
        self.confirming.confirm_deliveries()

    def _properties(self) -> dict[str, Any]:
        return {
            "content_type": "application/data",
            "content_encoding": "binary",
            "headers": {},
            "delivery_mode": 2,
            "priority": 0,
        }

    def publish_raw(self, count: int, size: int = 100, burst: int = 64, each: bool = False) -> Any:
        body = b"x" * size
        clock = Clock(count)
        publish = self.channel.basic.publish
        for number in range(count):
            publish(body, "bench", NOWHERE, properties=self._properties())
            if number % burst == 0:
                time.sleep(0)
        self.channel.basic.qos(100)
        return clock.answer()

    def publish_confirmed(self, count: int, tasks: int = 1) -> Any:
        body = b"x" * 100
        clock = Clock(count)
        publish = self.confirming.basic.publish
        for _ in range(count):
            publish(body, "bench", NOWHERE, properties=self._properties())
        return clock.answer()

    def consume(self, queue: str, count: int, prefetch: int = 0) -> Any:
        channel = self.connection.channel()
        if prefetch:
            channel.basic.qos(prefetch)
        seen = 0

        def take(message: Any) -> None:
            nonlocal seen
            seen += 1
            if prefetch:
                message.ack()

        clock = Clock(count)
        channel.basic.consume(take, queue, no_ack=not prefetch)
        while seen < count:
            channel.process_data_events()
        answer = clock.answer()
        channel.close()
        return answer


if __name__ == "__main__":
    answer_orders({"pika": Pika, "amqpstorm": AMQPStorm}[sys.argv[1]](sys.argv[2]))
