"""One package's side of `test_interop_redis`: Kombu's or ours, in this process or in one to kill.

Run: ``python -m tests.differential.interop_redis PACKAGE URL PATH`` in the root of the project. It
listens on the Unix socket of that path, and forks for each that connects. The new process says its
number, reads calls, a line of Python each: ``(method, arguments, keyword arguments)``, and answers
each with a line of JSON: ``[worked, result]``.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from tests.differential.interop import ACCEPT, CASES
from tests.differential.programs.lab import plain, show

__all__ = ["BOUND", "Side"]

#: Seconds that anything may take, on a machine that has much else to do.
BOUND = 60.0


class Side:
    """A connection of one package, and what a test does with it; all results are JSON.

    Args:
        package: ``"kombu"`` or ``"greenkombu"``.
        url: of the server.
    """

    def __init__(self, package: str, url: str) -> None:
        self.k: Any = importlib.import_module(package)
        self.url = url
        self.connection: Any = None
        self.channel: Any = None
        self.arrived: list[Any] = []
        self._consumers: list[Any] = []

    def open(self, **options: Any) -> None:
        """Begin anew: a connection that knows nothing of what the one before has declared."""
        self.close()
        self.connection = self.k.Connection(self.url, transport_options=options)
        self.channel = self.connection.channel()

    def close(self) -> None:
        """End the connection; what it had not settled goes back."""
        self.arrived, self._consumers = [], []
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    # -- declaring

    def declare(self, queue: str, exchange: str, kind: str, key: str = "", **options: Any) -> Any:
        """Declare a queue, its exchange and the binding."""
        made = self.k.Queue(queue, self.k.Exchange(exchange, kind), routing_key=key, **options)
        return made(self.channel).declare()

    def delete(self, queue: str) -> None:
        """Delete a queue."""
        self.channel.queue_delete(queue)

    def purge(self, queue: str) -> Any:
        """Empty a queue."""
        return self.channel.queue_purge(queue)

    def count(self, queue: str) -> Any:
        """Count the messages of a queue."""
        return self.channel.queue_declare(queue).message_count

    def table(self, exchange: str) -> Any:
        """Return the bindings of an exchange."""
        return sorted([part or "" for part in row] for row in self.channel.get_table(exchange))

    # -- publishing

    def publish(
        self, exchange: str, kind: str, key: str, bodies: list[Any], **options: Any
    ) -> None:
        """Publish to an exchange that this connection declares; no queue is."""
        target = self.k.Exchange(exchange, kind)(self.channel)
        if exchange:
            target.declare()
        producer = self.k.Producer(self.channel)
        for body in bodies:
            producer.publish(body, exchange=target, routing_key=key, **options)

    def publish_cases(self, names: list[str]) -> dict[str, str]:
        """Publish some of `CASES`, each with a header that names it; return how that went."""
        done = {}
        producer = self.k.Producer(self.channel)
        for name in names:
            body, options = CASES[name]
            headers = {**options.get("headers", {}), "case": name}
            try:
                producer.publish(
                    body,
                    exchange=self.k.Exchange("interop", "direct"),
                    routing_key="key",
                    **{**options, "headers": headers},
                )
                done[name] = "published"
            except Exception as exc:
                done[name] = type(exc).__name__
        return done

    # -- consuming

    def consume(self, queue: str, prefetch: int = 0, no_ack: bool = False) -> None:
        """Consume a queue by its name; what arrives is kept for `collect`."""
        self._consume(self.k.Queue(queue), prefetch, no_ack)

    def subscribe(self, queue: str, exchange: str, key: str = "") -> None:
        """Consume a queue of a fanout exchange, from now on."""
        self._consume(self.k.Queue(queue, self.k.Exchange(exchange, "fanout"), routing_key=key))
        self._drain(0.01)  # Kombu subscribes when it drains

    def _consume(self, queue: Any, prefetch: int = 0, no_ack: bool = False) -> None:
        consumer = self.k.Consumer(
            self.channel,
            queue,
            on_message=self.arrived.append,
            accept=ACCEPT,
            prefetch_count=prefetch or None,
            no_ack=no_ack,
        )
        consumer.consume()
        self._consumers.append(consumer)

    def collect(self, count: int, settle: str = "ack") -> Any:
        """Wait for so many messages, settle each as it comes, and return them.

        Args:
            count: of messages.
            settle: ``"ack"``, ``"reject"``, ``"requeue"``; ``"keep"`` leaves them unsettled.
        """
        seen: list[Any] = []
        deadline = time.monotonic() + BOUND
        while len(seen) < count:
            while self.arrived and len(seen) < count:
                seen.append(self._settle(self.arrived.pop(0), settle))
            if len(seen) < count:
                assert time.monotonic() < deadline, f"{len(seen)} of {count} came"
                self._drain(0.2)
        return seen

    def stop(self) -> None:
        """Cancel all consumers."""
        while self._consumers:
            self._consumers.pop().cancel()

    def take(self, queue: str, count: int, settle: str = "ack", prefetch: int = 1) -> Any:
        """Consume so many messages and stop."""
        self.consume(queue, prefetch)
        seen = self.collect(count, settle)
        self.stop()
        return seen

    def get(self, queue: str, settle: str = "ack") -> Any:
        """Get one message."""
        message = self.k.Queue(queue)(self.channel).get(accept=ACCEPT)
        return None if message is None else self._settle(message, settle)

    def restore(self) -> None:
        """Look once for messages whose consumers are gone."""
        self.channel.qos.restore_visible(interval=1)  # Kombu's default is to look at each 10th

    def sweep_bindings(self) -> None:
        """Forget bindings of queues that expired long ago."""
        self.channel.sweep_bindings()

    def _settle(self, message: Any, settle: str) -> Any:
        shown = show(message)
        if len(shown["payload"][1]) > 1000:
            shown["payload"][1] = len(shown["payload"][1])
            shown["body"] = len(message.body)
        # A consumer's tag is its own, and Kombu does not show it.
        shown["delivery_info"].pop("consumer_tag", None)
        if settle != "keep":
            getattr(message, settle)()
        return shown

    def _drain(self, timeout: float) -> None:
        try:
            self.connection.drain_events(timeout=timeout)
        except TimeoutError:
            pass


def serve(calls: socket.socket, package: str, url: str) -> None:
    """Carry out calls until the other end of the socket is closed."""
    side = Side(package, url)
    for line in calls.makefile("rb"):
        name, arguments, keywords = ast.literal_eval(line.decode())
        try:
            answer = [True, plain(getattr(side, name)(*arguments, **keywords))]
        except Exception as exc:
            answer = [False, f"{type(exc).__name__}: {exc}"]
        calls.sendall(json.dumps(answer).encode() + b"\n")


def main(package: str, url: str, path: str) -> None:
    """Fork a process for each that connects, until the standard input is closed."""
    importlib.import_module(package)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        sys.stdout.write("listens\n")
        sys.stdout.flush()
        while listening in select.select([listening, sys.stdin], [], [])[0]:
            calls, _ = listening.accept()
            if os.fork():
                calls.close()
                continue
            try:
                calls.sendall(b"%d\n" % os.getpid())
                serve(calls, package, url)
            finally:
                os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
