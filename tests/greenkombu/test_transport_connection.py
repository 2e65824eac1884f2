from __future__ import annotations

import time
import traceback

import pytest

from greenkombu.exceptions import ConnectionClosedError
from greenkombu.transport.base import Bell, Inbox, StdChannel, TransportConnection
from hub import get_environment
from tests.support.tasks import run_natively


def test_inbox_is_first_in_first_out() -> None:
    inbox = Inbox()
    assert not inbox
    assert inbox.popleft() is None
    events = [lambda: 1, lambda: 2]
    for event in events:
        inbox.append(event)
    assert (len(inbox), bool(inbox)) == (2, True)
    assert repr(inbox) == "<Inbox: 2 waiting, 0 listening>"
    assert [inbox.popleft(), inbox.popleft()] == events
    inbox.append(events[0])
    assert inbox.clear() == 1
    assert not inbox


def test_listeners_hear_of_every_append() -> None:
    inbox = Inbox()
    heard: list[str] = []

    def once() -> None:
        heard.append("once")
        inbox.unsubscribe(once)  # while it is being called

    def always() -> None:
        heard.append("always")

    inbox.subscribe(once)
    inbox.subscribe(always)
    inbox.subscribe(always)
    inbox.append(int)
    inbox.append(int)
    inbox.notify()
    assert heard == ["once", "always", "always", "always"]
    inbox.unsubscribe(always)
    inbox.unsubscribe(always)
    inbox.append(int)
    assert len(heard) == 4


def test_ring_between_arm_and_wait_is_not_lost() -> None:
    bell = Bell()
    bell.arm()
    bell.ring()
    started = time.monotonic()
    assert bell.wait(10) is True
    bell.arm()
    assert bell.wait(0.01) is False
    bell.arm()
    assert bell.wait(0.01) is False
    assert time.monotonic() - started < 5


def test_native_thread_wakes_a_drain() -> None:
    connection = TransportConnection()
    environment = get_environment()
    seen: list[int] = []

    def drain() -> None:
        for _ in range(100):
            connection.drain_events(timeout=20)

    task = environment.spawn(drain)

    def append() -> None:
        for number in range(100):
            connection.inbox.append(lambda number=number: seen.append(number))

    run_natively(environment, append)
    assert task.join(20)
    assert seen == list(range(100))


def test_first_reason_of_a_failure_stays() -> None:
    connection = TransportConnection()
    assert connection.connected
    first = OSError("reset")
    connection.abort(first)
    connection.abort()
    connection.close()
    assert connection.error is first
    assert not connection.connected
    for _ in range(3):
        with pytest.raises(OSError, match="reset") as caught:
            connection.deliver()
    # Raised again and again, its traceback does not grow.
    assert len(traceback.extract_tb(caught.value.__traceback__)) < 5
    assert "dead: OSError('reset')" in repr(connection)


def test_connection_that_was_closed_says_so() -> None:
    connection = TransportConnection()
    connection.close(timeout=1)
    with pytest.raises(ConnectionClosedError, match="connect again"):
        connection.drain_events()


def test_consumers_of_all_channels_are_cancelled_whatever_happens() -> None:
    class Channel(StdChannel):
        def __init__(self, tags: list[str], fail: bool = False) -> None:
            self._consumers = dict.fromkeys(tags)
            self.fail = fail
            self.unsettled = len(tags)

        def basic_cancel(self, tag: str) -> None:
            if self.fail:
                raise OSError(f"no answer to {tag}")
            del self._consumers[tag]

    connection = TransportConnection()
    good, bad = Channel(["a", "b"]), Channel(["c"], fail=True)
    connection.channels = {1: bad, 2: good, 3: object()}
    assert connection.unsettled() == 3
    with pytest.raises(OSError, match="no answer to c"):
        connection.stop_consumers()
    assert not good._consumers
    connection.channels = [good]
    connection.stop_consumers()
