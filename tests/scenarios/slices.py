"""How long a consumer of many messages keeps the other tasks waiting."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer
from hub.environment import Environment
from tests.support.tasks import LONG, until

__all__ = ["leave_others_their_turn", "longest_slice"]

_CONTROL = """
import sys, time, threading
largest = 0.0
stop = []
threading.Thread(target=lambda: (sys.stdin.read(), stop.append(1)), daemon=True).start()
print("ready", flush=True)
last = time.monotonic()
while not stop:
    time.sleep(0.005)
    now = time.monotonic()
    largest = max(largest, now - last)
    last = now
print(largest)
"""


class _Ticker:
    """Ticks every 5 ms and notes the largest gap, on the wall and in CPU time of its thread."""

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._stopped = False
        self.wall = self.cpu = 0.0
        self.ticks = 0
        self._task = env.spawn(self._run)

    def _run(self) -> None:
        wall, cpu = time.monotonic(), time.thread_time()
        while not self._stopped:
            self._env.sleep(0.005)
            now, used = time.monotonic(), time.thread_time()
            self.wall = max(self.wall, now - wall)
            self.cpu = max(self.cpu, used - cpu)
            wall, cpu = now, used
            self.ticks += 1

    def stop(self) -> None:
        self._stopped = True
        assert self._task.join(LONG)


@contextlib.contextmanager
def longest_slice(env: Environment) -> Iterator[list[float]]:
    """Measure a block that waits a lot.

    Yields:
        A list that has, afterwards, the seconds of thread time between two ticks of another task.
    """
    measured: list[float] = []
    gc.collect()
    gc.freeze()
    gc.disable()
    ticker = _Ticker(env)
    try:
        until(env, lambda: ticker.ticks > 3)
        ticker.cpu = 0.0
        yield measured
    finally:
        gc.enable()
        ticker.stop()
        measured.append(ticker.cpu)


def leave_others_their_turn(
    env: Environment, fill: Callable[[], tuple[str, str]], no_ack: bool, **options: Any
) -> None:
    """Assert that a drain of 5 000 messages keeps nobody waiting for 20 ms.

    Args:
        fill: makes a queue that has the numbers from 0; returns the URL and the queue.
        no_ack: of the consumer.
        **options: of the transport.
    """
    for _ in range(6):
        cpu, wall, allowed = _drain(env, *fill(), no_ack, options)
        if env.green:
            # All tasks share one thread: what it used between two ticks is one slice, or several
            # short ones of tasks that had their turn before the ticker.
            assert cpu < 0.020, f"a slice of {cpu * 1000:.1f} ms of thread time"
        if wall < allowed + 0.020:
            return
        # Other processes make a gap wider, never smaller, and may have spared the control.
    pytest.fail(f"six times; the last: {wall:.4f} s; control {allowed:.4f} s")


def _drain(
    env: Environment, url: str, queue: str, no_ack: bool, options: dict[str, Any]
) -> tuple[float, float, float]:
    """Consume 5 000 messages that are ready while another task ticks.

    Returns:
        Seconds between two ticks at most: thread time, wall time, wall time of a control process.
    """
    got: list[Any] = []
    with Connection(url, transport_options=options) as connection:
        channel = connection.channel()
        consumer = Consumer(
            channel,
            [Queue(queue, no_declare=True)],
            no_ack=no_ack,
            on_message=lambda message: (got.append(message.body), no_ack or message.ack()),
        )
        gc.collect()
        gc.freeze()
        gc.disable()
        control = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CONTROL],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        ticker = None
        try:
            assert control.stdout is not None
            control.stdout.readline()
            ticker = _Ticker(env)
            until(env, lambda: ticker.ticks > 3)
            ticker.wall = ticker.cpu = 0.0
            consumer.consume()
            # In our buffers before the first callback runs, as much of it as they take.
            env.sleep(0.3)
            while len(got) < 5000:
                connection.drain_events(timeout=LONG)
            env.sleep(0.02)
        finally:
            if ticker is not None:
                ticker.stop()
            output, _ = control.communicate(timeout=LONG)
            gc.enable()
        consumer.cancel()
        channel.close()
    assert got == [
        str(number) if isinstance(got[0], str) else b"%d" % number for number in range(5000)
    ]
    return ticker.cpu, ticker.wall, float(output)
