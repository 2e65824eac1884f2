"""What every test runs under: a watchdog, a search for leaks, brokers of its own."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest

import hub
from tests.support.leaks import Census, settle, warm_up
from tests.support.reruns import empty_rabbitmq, empty_redis, forget_failure, unheard
from tests.support.ticker import Ticker
from tests.support.watchdog import Watchdog

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
    from greenkombu.utils.private_redis import PrivateRedis
    from greenkombu.utils.private_redis_cluster import PrivateRedisCluster
    from greenkombu.utils.private_redis_sentinel import PrivateSentinel
    from hub.environment import Environment

# Set by tests/run.py; a plain `pytest` is the default environment.
os.environ.setdefault("GREENKOMBU_TEST_ENVIRONMENT", "default")

#: Seconds until a hung test ends the process: a hub that waits for ever must not hang CI.
WATCHDOG = 120.0

#: Of the shared broker, and so how many clients at once a test may have.
DESCRIPTORS = 4000

#: Nothing in these files waits, switches or reads a socket of ours, or each case chooses its own
#: environment: one run, in the default environment, shows all there is to see.
ANY_ENVIRONMENT = (
    "differential/test_delayed_delivery.py",
    "differential/test_interop_redis.py",
    "differential/test_serialization.py",
    "greenkombu/amqp/test_parser.py",
    "greenkombu/amqp/test_values.py",
    "greenkombu/redis/test_pipeline.py",
    "greenkombu/redis/test_redis_options.py",
    "greenkombu/redis/test_resp.py",
    "greenkombu/test_compression.py",
    "greenkombu/test_exceptions.py",
    "greenkombu/test_private_redis.py",
    "greenkombu/test_serialization.py",
    "greenkombu/test_utils_json.py",
    "greenkombu/test_utils_url.py",
    "hub/test_timers.py",
    "test_behaviours.py",
    "test_benchmarks.py",
    "test_fault_proxy.py",
    "test_manual_api.py",
)

_watchdog = pytest.StashKey[Watchdog]()
_failed = pytest.StashKey[bool]()

# For the next attempt at a test that failed: what there was before this one, what ends the silence
# between the two, and what empties the brokers that the run shares.
_before = pytest.StashKey[Census]()
_silence = pytest.StashKey[contextlib.ExitStack]()
_emptiers = pytest.StashKey[list[Callable[[], object]]]()


# A machine that is busy with other things says nothing about the code, or the tests.
hypothesis.settings.register_profile(
    "greenkombu", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("greenkombu")


def pytest_configure(config: pytest.Config) -> None:
    # Output is not captured at this moment, so this is where a traceback will be seen.
    config.stash[_watchdog] = Watchdog(os.dup(2))
    config.stash[_emptiers] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ["GREENKOMBU_TEST_ENVIRONMENT"] != "default":
        here = str(config.rootpath / "tests")
        chosen = [os.path.join(here, name) for name in ANY_ENVIRONMENT]
        alike = [item for item in items if str(item.path) in chosen]
        # Asked for by name, or by its marker, a file runs anywhere.
        if len(alike) < len(items):
            config.hook.pytest_deselected(items=alike)
            items[:] = [item for item in items if item not in set(alike)]
    for item in items:
        marker = item.get_closest_marker("allow_leaks")
        if marker is not None and not (marker.args or marker.kwargs.get("reason")):
            raise pytest.UsageError(f"{item.nodeid}: allow_leaks needs a reason")


def pytest_collection_finish() -> None:
    # What was imported up to here stays: collections and counts in the tests can skip it.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End the process with all tracebacks when one test, its fixtures included, takes too long."""
    _watch(item)
    item.stash[_silence] = contextlib.ExitStack()
    try:
        return (yield)
    finally:
        item.stash[_silence].close()
        if _before in item.stash:
            del item.stash[_before]
        item.config.stash[_watchdog].relax()


def _watch(item: pytest.Item) -> None:
    marker = item.get_closest_marker("watchdog")
    seconds = WATCHDOG if marker is None else float(marker.args[0])
    item.config.stash[_watchdog].watch(item.nodeid, seconds)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let another attempt at a test that failed find what the first one found."""
    if not item.stash.get(_failed, False):
        return
    item.stash[_failed] = False  # what this attempt leaves behind counts
    _watch(item)
    forget_failure(item.stash.get(_before, None), hub.get_environment().sleep)
    for empty in item.config.stash[_emptiers]:
        empty()
    item.stash[_silence].close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        item.stash[_failed] = True
    if report.when == "teardown" and item.stash.get(_failed, False):
        item.stash[_silence].enter_context(unheard())
    return report


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a native thread or a greenlet behind.

    `@pytest.mark.allow_leaks("reason")` switches this off for one test.
    """
    assert warm_up(), "the shared hub does not turn"
    before = Census()
    yield
    stash = request.node.stash
    if stash.get(_failed, False):
        stash[_before] = before
    elif not request.node.get_closest_marker("allow_leaks"):
        grown = settle(before, hub.get_environment().sleep)
        if grown:
            stash[_before] = before
            pytest.fail("the test left behind:\n" + "\n".join(grown), pytrace=False)


@pytest.fixture
def env() -> Environment:
    """The environment that this run is for."""
    return hub.get_environment()


@pytest.fixture
def ticker(env: Environment) -> Iterator[Ticker]:
    """A task that ticks every 5 ms; `ticker.largest_gap` is the longest pause, in seconds."""
    made = Ticker(env)
    made.start()
    yield made
    made.stop()


@contextlib.contextmanager
def _emptied(config: pytest.Config, empty: Callable[[], object]) -> Iterator[None]:
    """Have a broker that the run shares emptied before another attempt at a test that failed."""
    config.stash[_emptiers].append(empty)
    try:
        yield
    finally:
        config.stash[_emptiers].remove(empty)


@pytest.fixture(scope="session")
def rabbitmq(pytestconfig: pytest.Config) -> Iterator[PrivateRabbitMQ]:
    """A private RabbitMQ, shared by the whole run: leave it as it was found.

    Tests share it through queue names of their own or `rabbitmq_vhost`; what stops, freezes or
    blocks a broker takes `make_private_rabbitmq`.
    """
    from greenkombu.demo.machine import allow_descriptors
    from tests.support.rabbitmq import make_rabbitmq

    allow_descriptors(DESCRIPTORS)  # the server inherits it
    with (
        make_rabbitmq(plugins=("rabbitmq_management",)) as server,
        _emptied(pytestconfig, lambda: empty_rabbitmq(server)),
    ):
        yield server


@pytest.fixture
def rabbitmq_vhost(rabbitmq: PrivateRabbitMQ) -> Iterator[str]:
    """The URL of an empty virtual host that is removed after the test."""
    name = f"test-{os.urandom(6).hex()}"
    url = rabbitmq.add_vhost(name)
    yield url
    rabbitmq.delete_vhost(name)


@pytest.fixture
def make_private_rabbitmq() -> Iterator[Callable[..., PrivateRabbitMQ]]:
    """Start RabbitMQ servers for this test alone; arguments are those of `make_rabbitmq`."""
    from tests.support.rabbitmq import make_rabbitmq

    started: list[PrivateRabbitMQ] = []

    def make(**options: object) -> PrivateRabbitMQ:
        server = make_rabbitmq(**options)  # type: ignore[arg-type]
        started.append(server)
        return server.start()

    yield make
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def redis(pytestconfig: pytest.Config) -> Iterator[PrivateRedis]:
    """A private Redis, shared by the whole run: leave it as it was found.

    Tests share it through keys of their own names; what stops, freezes or fills a server takes
    `make_private_redis`, which is cheap.
    """
    from greenkombu.demo.machine import allow_descriptors
    from tests.support.redis import make_redis

    allow_descriptors(DESCRIPTORS)  # the server inherits it
    with make_redis() as server, _emptied(pytestconfig, lambda: empty_redis(server)):
        yield server


@pytest.fixture
def make_private_redis() -> Iterator[Callable[..., PrivateRedis]]:
    """Start Redis servers for this test alone; arguments are those of `make_redis`."""
    from tests.support.redis import make_redis

    started: list[PrivateRedis] = []

    def make(**options: object) -> PrivateRedis:
        server = make_redis(**options)
        started.append(server)
        return server.start()

    yield make
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def shared_redis_sentinel(pytestconfig: pytest.Config) -> Iterator[PrivateSentinel]:
    from tests.support.redis import make_sentinel

    with (
        make_sentinel() as servers,
        _emptied(pytestconfig, lambda: empty_redis(servers.master)),
    ):
        yield servers


@pytest.fixture
def redis_sentinel(shared_redis_sentinel: PrivateSentinel) -> Iterator[PrivateSentinel]:
    """A Redis master with a replica and three sentinels, which are put in order after the test.

    So a test may kill, stop and freeze them. The run shares them, through keys of own names.
    """
    yield shared_redis_sentinel
    shared_redis_sentinel.restore()


@pytest.fixture(scope="session")
def shared_redis_cluster(pytestconfig: pytest.Config) -> Iterator[PrivateRedisCluster]:
    from tests.support.redis import make_cluster

    with make_cluster() as nodes, _emptied(pytestconfig, lambda: empty_redis(*nodes.masters)):
        yield nodes


@pytest.fixture
def redis_cluster(shared_redis_cluster: PrivateRedisCluster) -> Iterator[PrivateRedisCluster]:
    """A Redis Cluster of three masters with a replica each, put in order after the test.

    So a test may kill, stop and freeze nodes; slots stay where a test has moved them. The run
    shares it, through keys of own names.
    """
    yield shared_redis_cluster
    shared_redis_cluster.restore()
