"""What the scenarios share: queues on a broker, proxies in front of it, processes."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.scenarios.broker import Broker
from tests.scenarios.store import Store, WorkerProcess
from tests.support.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
    from greenkombu.utils.private_redis import PrivateRedis
    from hub.environment import Environment


@pytest.fixture
def broker(rabbitmq: PrivateRabbitMQ) -> Iterator[Broker]:
    """The RabbitMQ that the whole run shares; its queues of this test are removed."""
    made = Broker(rabbitmq)
    yield made
    made.clean()


@pytest.fixture
def make_proxy(rabbitmq: PrivateRabbitMQ) -> Iterator[Callable[[], FaultProxy]]:
    """Start proxies in front of the shared RabbitMQ."""
    made: list[FaultProxy] = []

    def make(target: tuple[str, int] | None = None) -> FaultProxy:
        made.append(FaultProxy(target or ("127.0.0.1", rabbitmq.port)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def proxy(make_proxy: Callable[[], FaultProxy]) -> FaultProxy:
    """A proxy in front of the shared RabbitMQ."""
    return make_proxy()


@pytest.fixture(scope="module")
def own_rabbitmq() -> Iterator[PrivateRabbitMQ]:
    """A RabbitMQ of this module alone, to be stopped, frozen and blocked."""
    from tests.support.rabbitmq import make_rabbitmq

    with make_rabbitmq() as server:
        yield server


@pytest.fixture
def own_broker(own_rabbitmq: PrivateRabbitMQ) -> Iterator[Broker]:
    """The module's own RabbitMQ, running and in good health before and after the test."""
    own_rabbitmq.start()
    made = Broker(own_rabbitmq)
    yield made
    own_rabbitmq.thaw()
    own_rabbitmq.start()
    made.clean()


@pytest.fixture
def many_descriptors(env: Environment) -> Iterator[Callable[[int], list[int]]]:
    """Open so many descriptors that are never ready; they are closed at the end."""
    made: list[int] = []
    close = env.original("os", "close")

    def many(count: int) -> list[int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < count + 200:
            if hard != resource.RLIM_INFINITY and hard < count + 200:
                pytest.skip(f"only {hard} descriptors are allowed here (ulimit -n)")
            resource.setrlimit(resource.RLIMIT_NOFILE, (count + 200, hard))
        made.extend(os.eventfd(0) for _ in range(count))
        return made

    if not hasattr(os, "eventfd"):
        pytest.skip("needs eventfd(2)")
    yield many
    for fd in made:
        close(fd)


# -- Redis: a server starts in 0.05 s, so that each test has its own


@pytest.fixture
def store(make_private_redis: Callable[..., PrivateRedis]) -> Store:
    """A Redis server of this test alone, which keeps nothing when it ends."""
    return Store(make_private_redis())


@pytest.fixture
def durable_store(make_private_redis: Callable[..., PrivateRedis]) -> Store:
    """The same, and whatever it has answered is on the disk."""
    return Store(make_private_redis(append_only=True))


@pytest.fixture
def store_proxy(store: Store) -> Iterator[FaultProxy]:
    """A proxy in front of the `store`."""
    with FaultProxy(("127.0.0.1", store.server.port)) as proxy:
        yield proxy


@pytest.fixture
def work_apart(tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start consumers in processes of their own, which are killed at the end.

    Arguments are those of `WorkerProcess` without the log; they start side by side: wait for
    their "ready".
    """
    made: list[WorkerProcess] = []

    def work(url: str, queue: str, **options: Any) -> WorkerProcess:
        made.append(WorkerProcess(url, queue, tmp_path / f"worker-{len(made)}.log", **options))
        return made[-1]

    yield work
    for worker in made:
        worker.kill()


@pytest.fixture
def short_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those whose consumers were killed hold up the next message for half a second, not for ten."""
    from greenkombu.transport.redis import _leases, _taps

    monkeypatch.setattr(_taps, "LEASE", 0.5)
    monkeypatch.setattr(_leases, "LEASE", 0.5)
