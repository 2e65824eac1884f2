"""Who is told of a message: the three places of a consumer, and what moves it between them."""

from __future__ import annotations

import gc
import time

import pytest

from greenkombu.transport.virtual.consumers import Consumer, Registry, Watch
from hub.environment import Environment


class Connection:
    """Stands in for a connection: remembers who was made ready."""

    def __init__(self, watched: bool = True) -> None:
        self.watched = watched
        self.ready: list[Consumer] = []

    def _make_ready(self, consumer: Consumer) -> bool:
        self.ready.append(consumer)
        return self.watched


class Channel:
    def __init__(self, connection: Connection) -> None:
        self.connection = connection


def consumer(watch: Watch, connection: Connection, tag: str = "t") -> Consumer:
    made = Consumer(Channel(connection), watch.name, True, print, tag, watch)  # type: ignore[arg-type]
    watch.add(made)
    return made


@pytest.fixture
def watch() -> Watch:
    return Registry().watch("q")


def test_a_message_wakes_the_one_that_waits_longest(watch: Watch) -> None:
    connection = Connection()
    first, second = (consumer(watch, connection, tag) for tag in "ab")
    assert watch.park(first)
    assert watch.park(second)
    watch.wake()
    assert connection.ready == [first]
    watch.wake()
    watch.wake()
    assert connection.ready == [first, second]


def test_those_that_nobody_drains_are_told_on_the_way_and_once(watch: Watch) -> None:
    asleep, awake = Connection(watched=False), Connection()
    sleeping, waiting, third = (
        consumer(watch, asleep),
        consumer(watch, awake),
        consumer(watch, awake),
    )
    for each in (sleeping, waiting, third):
        watch.park(each)
    watch.wake()
    assert asleep.ready == [sleeping]
    assert awake.ready == [waiting]
    watch.wake()
    assert asleep.ready == [sleeping]
    assert awake.ready == [waiting, third]


def test_a_message_that_comes_while_one_is_about_to_wait_is_not_missed(watch: Watch) -> None:
    connection = Connection()
    waiting = consumer(watch, connection)
    watch.source = ["a message"]
    assert not watch.park(waiting), "it must look again"
    assert connection.ready == []


def test_one_that_was_told_and_goes_tells_the_next(watch: Watch) -> None:
    connection = Connection()
    first, second = (consumer(watch, connection, tag) for tag in "ab")
    watch.park(first)
    watch.park(second)
    watch.source = ["a message"]
    watch.wake()
    watch.remove(first)
    assert connection.ready == [first, second]
    watch.remove(first)
    assert connection.ready == [first, second]


def test_one_that_waits_and_goes_tells_nobody(watch: Watch) -> None:
    connection = Connection()
    first, second = (consumer(watch, connection, tag) for tag in "ab")
    watch.park(first)
    watch.park(second)
    watch.source = ["a message"]
    watch.remove(first)
    assert connection.ready == []
    assert len(watch) == 1


def test_s19_a_consumer_that_was_collected_is_forgotten(watch: Watch) -> None:
    connection = Connection()
    unused: list[int] = []
    watch.on_unused = lambda: unused.append(1)
    gone = consumer(watch, connection)
    watch.park(gone)
    del gone
    gc.collect()
    assert len(watch) == 0
    assert unused == [1]
    watch.wake()
    assert connection.ready == []


def test_unused_is_told_with_the_last_consumer(watch: Watch) -> None:
    unused: list[int] = []
    watch.on_unused = lambda: unused.append(1)
    first, second = (consumer(watch, Connection()) for _ in range(2))
    watch.remove(first)
    assert unused == []
    watch.remove(second)
    assert unused == [1]


def test_wake_all_tells_everybody(watch: Watch) -> None:
    connection = Connection()
    members = [consumer(watch, connection, str(number)) for number in range(5)]
    for each in members:
        watch.park(each)
    watch.wake_all()
    assert connection.ready == members


def test_the_registry_forgets_what_is_not_used() -> None:
    registry = Registry()
    watch = registry.watch("q")
    assert registry.watch("q") is watch
    member = consumer(watch, Connection())
    registry.drop_unused("q")
    registry.drop_unused("another")
    assert registry.get("q") is watch
    watch.remove(member)
    watch.source = ["a queue of this process"]
    registry.drop_unused("q")
    assert registry.get("q") is watch
    watch.source = None
    registry.drop_unused("q")
    assert len(registry) == 0
    late = Consumer(Channel(Connection()), "q", True, print, "t", watch)  # type: ignore[arg-type]
    assert not watch.add(late), "it was dropped"
    assert not watch.attach(["a queue"])
    assert len(watch) == 0
    assert watch.source is None
    assert registry.watch("q") is not watch


def test_a_watch_that_is_taken_into_use_while_it_is_dropped_stays() -> None:
    registry = Registry()
    watch = registry.watch("q")
    member = Consumer(Channel(Connection()), "q", True, print, "t", watch)  # type: ignore[arg-type]

    class Interrupting(list):  # type: ignore[type-arg]
        def pop(self, *args: object) -> object:
            assert watch.add(member)  # another thread, just then
            return super().pop()

    watch._drop_permit = Interrupting([None])
    registry.drop_unused("q")
    assert registry.get("q") is watch
    assert not watch.dropped
    assert len(watch) == 1


def test_every_message_finds_its_consumer_among_threads(watch: Watch, env: Environment) -> None:
    """Consumers park while others put: whenever all have stopped, none waits beside a message."""
    total = 3000
    messages: list[int] = []
    taken: list[int] = []
    ready: list[Consumer] = []
    ended: list[int] = []

    class Pump(Connection):
        def _make_ready(self, consumer: Consumer) -> bool:
            ready.append(consumer)
            return True

    watch.source = messages
    members = [consumer(watch, Pump(), str(number)) for number in range(3)]
    ready.extend(members)
    deadline = time.monotonic() + 60

    def put() -> None:
        for number in range(total):
            messages.append(number)
            watch.wake()
        ended.append(1)

    def serve() -> None:
        while len(taken) < total and time.monotonic() < deadline:
            try:
                member = ready.pop()
            except IndexError:
                continue
            try:
                taken.append(messages.pop())
            except IndexError:
                if not watch.park(member):
                    ready.append(member)
            else:
                ready.append(member)
        ended.append(1)

    # Native threads in every environment: they interrupt each other anywhere.
    start = env.original("_thread", "start_new_thread")
    for function in (serve, serve, put):
        start(function, ())
    while len(ended) < 3:
        env.sleep(0.01)
    assert sorted(taken) == list(range(total)), (len(messages), watch)
