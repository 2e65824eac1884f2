"""S23: what a living Redis consumer holds stays its own, and what a dead one held comes back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from greenkombu.connection import Connection
from greenkombu.entity import Queue
from greenkombu.messaging import Consumer
from greenkombu.transport.redis import _leases, _taps
from hub.environment import Environment
from tests.scenarios.store import Store, WorkerProcess, text_of
from tests.support.fault_proxy import FaultProxy
from tests.support.tasks import LONG, until


class Waiter:
    """A consumer that waits in a task of its own, and perhaps holds what it gets.

    Attributes:
        got: what has come.
    """

    def __init__(self, env: Environment, url: str, queue: str, holds: bool, **options: Any) -> None:
        self.got: list[str] = []
        self._holds = holds
        self.connection = Connection(url, transport_options=options)
        self.channel = self.connection.channel()
        consumer = Consumer(self.channel, [Queue(queue, no_declare=True)], on_message=self._take)
        consumer.consume()
        self._task = env.spawn(self._drain)

    def _take(self, message: Any) -> None:
        self.got.append(text_of(message))
        if not self._holds:
            message.ack()

    def _drain(self) -> None:
        # Of the transport: a Connection that was closed would connect again.
        drain_events = self.connection.connection.drain_events
        with contextlib.suppress(*self.connection.connection_errors):
            while True:
                drain_events()

    @property
    def client(self) -> str:
        """What the server knows it as."""
        return str(self.connection.connection.client_id.decode())

    def die(self) -> None:
        """End without a word to the server."""
        self.connection.collect()
        assert self._task.join(LONG)

    def close(self) -> None:
        self.connection.close()
        assert self._task.join(LONG)


@pytest.fixture
def wait_for(env: Environment, store: Store) -> Iterator[Callable[..., Waiter]]:
    """Start waiters, which are closed at the end."""
    made: list[Waiter] = []

    def start(queue: str, url: str = store.url, holds: bool = False, **options: Any) -> Waiter:
        made.append(Waiter(env, url, queue, holds, **options))
        return made[-1]

    yield start
    for waiter in made:
        waiter.close()


@pytest.mark.parametrize(
    # Renewed at half the timeout; a machine may stand still for a second.
    ("timeout", "seconds"),
    [(2.5, 3.3), pytest.param(3, 7, marks=pytest.mark.slow)],
)
def test_s23_a_long_task_runs_once_and_that_of_a_killed_worker_again(
    env: Environment,
    store: Store,
    work_apart: Callable[..., WorkerProcess],
    timeout: float,
    seconds: float,
) -> None:
    queue = store.queue()
    options = {
        "transport": {"visibility_timeout": timeout},
        "prefetch": 1,
        "seconds": seconds,
    }
    workers = [work_apart(store.url, queue, **options) for _ in range(2)]
    for worker in workers:
        worker.wait("ready")
    store.put(queue, ["once"])
    until(env, lambda: any(worker.noted("done") for worker in workers), 2 * LONG)
    began = [line for worker in workers for line in worker.lines if line[0] != "ready"]
    assert sorted(began) == [["done", "once"], ["got", "once"]]
    until(env, lambda: store.registered() == (0, 0))
    store.put(queue, ["again"])
    until(env, lambda: any("again" in worker.noted("got") for worker in workers))
    workers.sort(key=lambda worker: "again" in worker.noted("got"))
    other, holder = workers
    holder.kill()
    killed = time.monotonic()
    until(env, lambda: other.noted("again") == ["again"])
    # The visibility timeout, the time until the next look, and what a busy machine takes.
    assert time.monotonic() - killed < timeout + 0.5 + 8


def test_what_is_held_is_not_taken_by_a_client_with_a_shorter_visibility_timeout(
    env: Environment,
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_leases, "RENEW_SECONDS", 0.4)
    queue, taken = store.queue(), []
    store.put(queue, ["held"])
    timeouts = (3600, 1.5, 1.5)
    patient, *hasty = (
        Connection(store.url, transport_options={"visibility_timeout": timeout})
        for timeout in timeouts
    )
    with patient, hasty[0], hasty[1]:
        for connection in (patient, *hasty):
            consumer = Consumer(
                connection.channel(), [Queue(queue, no_declare=True)], on_message=taken.append
            )
            consumer.consume()
            with contextlib.suppress(TimeoutError):
                connection.drain_events(timeout=LONG if connection is patient else 0.1)
        assert [text_of(message) for message in taken] == ["held"]
        looks = store.calls("zrevrangebyscore")
        with pytest.raises(TimeoutError):
            hasty[0].drain_events(timeout=2.1)
        assert store.calls("zrevrangebyscore") > looks, "nobody has looked for lost messages"
        assert store.unacked() == ["held"]
        taken[0].ack()
    assert store.registered() == (0, 0)


def test_nobody_looks_for_lost_messages_before_everybody_can_have_heard_of_the_timeout(
    env: Environment, store: Store, wait_for: Callable[..., Waiter]
) -> None:
    for timeouts in (3600,), (1, 1):
        for timeout in timeouts:
            wait_for(store.queue(), visibility_timeout=timeout)
        fleet = f"{timeouts[0]:.3f}"
        until(env, lambda fleet=fleet: store.server.command("ZSCORE", "unacked_index:fleet", fleet))  # type: ignore[misc]
    env.sleep(0.8)
    assert store.calls("zrevrangebyscore") == 0


def test_watchers_that_were_killed_do_not_keep_the_next_consumer_waiting(
    env: Environment, store: Store, wait_for: Callable[..., Waiter]
) -> None:
    queue = store.queue()
    killed = [wait_for(queue), wait_for(queue)]
    until(env, lambda: len(store.watchers(queue)) == 2)
    killed += [wait_for(queue), wait_for(queue)]
    until(env, lambda: store.parked(queue) == 2)
    for waiter in killed:
        waiter.die()
    heir = wait_for(queue)
    until(env, lambda: store.watchers(queue) == [heir.client])
    assert store.parked(queue) in (0, 2)
    store.put(queue, ["at once"])
    until(env, lambda: heir.got == ["at once"], _taps.LEASE / 2)


def test_a_busy_consumer_leaves_watching_to_nobody_who_is_gone(
    env: Environment, store: Store, wait_for: Callable[..., Waiter]
) -> None:
    queue = store.queue()
    busy = wait_for(queue, holds=True)
    store.put(queue, ["one"])
    until(env, lambda: busy.got == ["one"])
    killed = [wait_for(queue)]
    until(env, lambda: len(store.watchers(queue)) == 2)
    killed.append(wait_for(queue))
    until(env, lambda: store.parked(queue) == 1)
    for waiter in killed:
        waiter.die()
    for body in ("two", "three"):
        store.put(queue, [body])
        until(env, lambda body=body: body in busy.got, _taps.LEASE / 2)  # type: ignore[misc]
    assert busy.client in store.watchers(queue)


@pytest.mark.parametrize("killed", [1, 2])
def test_the_next_message_finds_a_parked_consumer_when_watchers_are_killed(
    env: Environment,
    store: Store,
    wait_for: Callable[..., Waiter],
    short_leases: None,
    killed: int,
) -> None:
    queue = store.queue()
    watchers = [wait_for(queue), wait_for(queue)]
    until(env, lambda: len(store.watchers(queue)) == 2)
    parked = [wait_for(queue), wait_for(queue)]
    until(env, lambda: store.parked(queue) == 2)
    for waiter in watchers[:killed]:
        waiter.die()
    store.put(queue, ["next"])
    living = [*watchers[killed:], *parked]
    until(env, lambda: any(waiter.got == ["next"] for waiter in living), 8.0)
    until(env, lambda: store.registered() == (0, 0))
    assert [waiter.got for waiter in living].count(["next"]) == 1


def test_a_frozen_pair_of_watchers_delays_the_next_message_by_a_lease_at_most(
    env: Environment,
    store: Store,
    store_proxy: FaultProxy,
    wait_for: Callable[..., Waiter],
    short_leases: None,
) -> None:
    queue = store.queue()
    frozen = [wait_for(queue, url=store_proxy.url(store.url)) for _ in range(2)]
    until(env, lambda: len(store.watchers(queue)) == 2)
    # For the server they are there, and hear it: only their leases tell.
    store_proxy.black_hole()
    heir = wait_for(queue)
    until(env, lambda: store.parked(queue) == 1 or heir.client in store.watchers(queue))
    store.put(queue, ["next"])
    until(env, lambda: heir.got == ["next"], 8.0)
    for waiter in frozen:
        waiter.die()
