"""The demo's job, without any output: set up, publish and consume, take stock, tear down.

The tasks of a run, all of them green where the environment is:

* openers, a few at a time, open the connections with their channels, queues and consumers;
* one drain task runs the `DrainLoop` that all connections have joined; every callback of every
  consumer runs in it;
* publishers take a producer out of a pool, publish a burst, give it back, and wait until the burst
  has come.  So the latency is that of a loaded system and not the age of an ever longer queue;
* a ticker shows that other tasks of the program keep running;
* the task that called `run()` watches the progress and the deadline.

Whatever goes wrong is written down (`DemoResult.problems`) and ends the run; it never hangs.
"""

from __future__ import annotations

import functools
import gc
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from time import monotonic, perf_counter_ns
from typing import TYPE_CHECKING, Any

from greenkombu import exceptions
from greenkombu.deadline import Deadline
from greenkombu.demo.ledger import HEADER_SIZE, Ledger
from greenkombu.demo.machine import allow_descriptors, resident_bytes
from greenkombu.utils.url import maybe_sanitize_url
from hub.environment import get_environment
from hub.shared import get_hub

if TYPE_CHECKING:
    from greenkombu.connection import Connection
    from greenkombu.drain import DrainLoop
    from greenkombu.messaging import Consumer
    from greenkombu.pools import ProducerPool
    from hub.environment import Environment, Task

__all__ = ["Demo", "DemoError", "DemoOptions", "DemoResult"]

#: Connections that are opened, or closed, at the same time: a broker's listener has a backlog.
OPENERS = 32
#: Messages that a publisher sends before it waits for them. Four are sent at once where writes
#: are coalesced.
BURST = 4
#: Connections that the publishers share.
PUBLISHING_CONNECTIONS = 8
#: Descriptors besides one for each connection: the hub's, files, the interpreter's.
SPARE_DESCRIPTORS = 120
#: Seconds between two ticks of the task that shows whether the others keep running.
TICK = 0.005
#: Seconds between two reports of progress.
REPORT_INTERVAL = 0.1
#: Seconds that the consumers stay after the last message, to see whether one comes twice.
LINGER = 0.1
#: Seconds that tasks have to end after the run is over.
GRACE = 5.0
#: Seconds for the farewell from all connections, after the deadline of the run if need be, and
#: what each of them adds: a busy broker needs some milliseconds to drop its queues.
CLOSE_TIMEOUT = 15.0
CLOSE_TIMEOUT_EACH = 0.05
#: Bytes; RabbitMQ refuses more by default, as `greenkombu.serialization.max_body_bytes` does.
LARGEST_BODY = 134_217_728
#: How many problems of one kind are kept.
KEPT_PROBLEMS = 5


class DemoError(exceptions.KombuError):
    """The demo cannot run like this; the text says what to change."""


@dataclass(frozen=True)
class DemoOptions:
    """What to run.

    Args:
        broker: a URL.
        connections: consuming connections.
        channels: channels of each, with one queue and one consumer each.
        messages: how many are published, over all queues in turn.
        body_size: bytes of each body.
        publishers: tasks that publish at the same time.
        timeout: seconds for everything but the farewell.

    Raises:
        DemoError: a value makes no sense.
    """

    broker: str = "memory://"
    connections: int = 200
    channels: int = 5
    messages: int = 20_000
    body_size: int = 100
    publishers: int = 50
    timeout: float = 120.0

    def __post_init__(self) -> None:
        for name in ("connections", "channels", "messages", "publishers"):
            if getattr(self, name) < 1:
                raise DemoError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.body_size < HEADER_SIZE:
            raise DemoError(
                f"body_size is {self.body_size}: give {HEADER_SIZE} or more, the bytes that the "
                "message's number and time take"
            )
        if self.body_size > LARGEST_BODY:
            raise DemoError(
                f"body_size is {self.body_size}: give {LARGEST_BODY} or less, which is what a "
                "receiver accepts"
            )
        if not self.timeout > 0:
            raise DemoError(f"timeout is {self.timeout}: give seconds above 0")


@dataclass(frozen=True)
class DemoResult:
    """What happened; the units are in the names.  None: not known, or it did not come to that."""

    environment: str
    poller: str
    broker: str
    connections: int
    channels: int
    publishers: int
    messages: int
    body_size: int
    sent: int
    received: int
    duplicates: int
    setup_seconds: float
    seconds: float
    messages_per_second: float | None
    latency_p50_ms: float | None
    latency_p99_ms: float | None
    largest_slice_ms: float
    largest_hub_slice_ms: float
    memory_per_connection_kib: float | None
    ticks: int
    largest_tick_gap_ms: float
    interrupted: bool = False
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every message was sent and came exactly once, and nothing else went wrong."""
        return self.sent == self.received == self.messages and not self.problems

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, and `ok`, as plain data for JSON."""
        return {**asdict(self), "ok": self.ok}


def _join_all(tasks: list[Task], timeout: float) -> bool:
    """Wait up to `timeout` seconds until all tasks have ended; False if some have not."""
    until = monotonic() + timeout
    for task in tasks:
        task.join(max(until - monotonic(), 0.0))
    return all(task.done for task in tasks)


class _Ticker:
    """A task of the program that has nothing to do with messages."""

    def __init__(self, environment: Environment) -> None:
        self.ticks = 0
        self.largest_gap = 0.0
        self.stopped = False
        self._environment = environment
        self._task = environment.spawn(self._run)

    def _run(self) -> None:
        last = monotonic()
        while not self.stopped:
            self._environment.sleep(TICK)
            now = monotonic()
            self.largest_gap = max(self.largest_gap, now - last)
            last = now
            self.ticks += 1

    def stop(self) -> None:
        """End the task."""
        self.stopped = True
        self._task.join(1.0)


class _Publisher:
    """A task that publishes its share in bursts; the drain task tells it what has come.

    Each side writes its own counter only, so the two need no lock in any environment.
    """

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        #: Messages that `publish` took.
        self.sent = 0
        #: Messages that came.
        self.received = 0
        self._target = 0
        self._waiter: Any = None

    @property
    def published(self) -> range:
        """The numbers of the messages that were sent."""
        return self.numbers[: self.sent]

    def expect(self, count: int, environment: Environment) -> None:
        """Get ready to wait for `count` messages more; to be called before they are published."""
        self._waiter = environment.waiter()
        self._target = self.sent + count

    def wait(self, timeout: float) -> bool:
        """Wait until all that was expected has come; False after `timeout` seconds."""
        return bool(self._waiter.wait(timeout))

    def arrived(self) -> None:
        """Count a message; called in the drain task."""
        self.received += 1
        if self.received == self._target:
            self._waiter.wake()

    def release(self) -> None:
        """End the wait, because the run is over."""
        if self._waiter is not None:
            self._waiter.wake()


class Demo:
    """One run.

    Args:
        options: what to run.
        progress: called as (phase, done, total) by the task that called `run`, about ten times a
            second; the phases are "connections" and "messages".
    """

    def __init__(
        self,
        options: DemoOptions,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> None:
        self.options = options
        self.interrupted = False
        self._progress = progress or (lambda _phase, _done, _total: None)
        self._environment = get_environment()
        #: Set when there is no reason to wait any longer.
        self._over = self._environment.Event()
        self._problems: list[str] = []
        self._opened: list[Connection] = []
        self._consumers: list[Consumer] = []
        self._ledger = Ledger(
            options.messages, options.connections * options.channels, options.body_size
        )
        publishers = min(options.publishers, options.messages)
        self._publishers = [
            _Publisher(range(first, options.messages, publishers)) for first in range(publishers)
        ]
        self._deadline = 0.0
        self._name = f"greenkombu-demo-{uuid.uuid4().hex[:12]}"

    def interrupt(self) -> None:
        """End the run soon and take stock of what there is; signal handlers may call this."""
        self.interrupted = True
        self._over.set()

    # -- the run

    def run(self) -> DemoResult:
        """Do everything; returns also when something failed.

        Raises:
            DemoError: the machine does not allow it; nothing was opened.
            InvalidURL, TransportNotFound: the broker's URL makes no sense.
        """
        from greenkombu.connection import Connection
        from greenkombu.drain import DrainLoop

        started = monotonic()
        self._deadline = started + self.options.timeout
        model = Connection(self.options.broker, connect_timeout=self.options.timeout)
        self._check_descriptors(model)
        setup = seconds = 0.0
        memory: float | None = None
        ticker: _Ticker | None = None
        hub_slice = 0.0
        loop = DrainLoop(on_error=self._on_connection_error)
        drain: Task | None = None
        # A program that has frozen something itself knows why; unfreezing would undo it.
        frozen = gc.get_freeze_count() > 0
        try:
            if self._open_one(model):
                memory = self._open_all(model, loop)
                setup = monotonic() - started
            # What was set up stays: looking through thousands of connections for garbage would
            # take longer than any slice of the loop, again and again.
            if not frozen:
                gc.collect()
                gc.freeze()
            if not self._over.is_set():
                stats = get_hub().stats
                stats.largest_slice = 0.0
                ticker = _Ticker(self._environment)
                drain = self._environment.spawn(self._drain, loop)
                seconds = self._exchange(model)
                hub_slice = stats.largest_slice
                ticker.stop()
        finally:
            if not frozen:
                gc.unfreeze()
            loop.stop()
            if drain is not None:
                drain.join(GRACE)
            self._close_all()
        return self._result(setup, seconds, memory, loop.largest_slice, hub_slice, ticker)

    def _check_descriptors(self, model: Connection) -> None:
        if not model.transport.implements.shared:
            return  # nothing leaves the process
        wanted = self.options.connections + PUBLISHING_CONNECTIONS + SPARE_DESCRIPTORS
        allowed = allow_descriptors(wanted)
        if allowed < wanted:
            raise DemoError(
                f"{self.options.connections} connections need {wanted} descriptors and this "
                f"process may have {allowed}: raise the limit (ulimit -n {wanted}), or ask for "
                "fewer connections"
            )

    # -- setting up

    def _open_one(self, model: Connection) -> bool:
        """Connect once: is there a broker?  What is imported and cached on the way is not counted
        as memory of the connections."""
        connection = model.clone()
        try:
            with Deadline(self._left()):
                connection.connect()
                self._start_consumers(connection, 0, count=1, name=f"{self._name}-first")
                self._consumers.pop().queues[0].delete()
        except Exception as error:
            self._fail("connecting", error)
        finally:
            self._close(connection)
        return not self._over.is_set()

    def _open_all(self, model: Connection, loop: DrainLoop) -> float | None:
        """Open all connections; return the KiB that each of them takes, if it is known."""
        total = self.options.connections
        gc.collect()
        before = resident_bytes()
        waiting = deque(range(total))
        joined: list[int] = []

        def open_some() -> None:
            while waiting and not self._over.is_set():
                try:
                    index = waiting.popleft()
                except IndexError:  # another native thread was faster
                    return
                connection = model.clone()
                self._opened.append(connection)
                try:
                    with Deadline(self._left()):
                        connection.connect()
                        self._start_consumers(connection, index * self.options.channels)
                        loop.join(connection)
                except Exception as error:
                    self._fail(f"opening connection {index + 1} of {total}", error)
                    return
                joined.append(index)

        tasks = [self._environment.spawn(open_some) for _ in range(min(OPENERS, total))]
        self._watch(tasks, "connections", lambda: len(joined), total)
        # One that is still connecting finds its connection closed by _close_all().
        _join_all(tasks, GRACE)
        if len(joined) < total and not self._over.is_set():
            self._fail_late(f"{total - len(joined)} of {total} connections were not open in time")
        gc.collect()
        after = resident_bytes()
        return None if before is None or after is None else (after - before) / 1024 / total

    def _start_consumers(
        self, connection: Connection, first: int, *, count: int | None = None, name: str = ""
    ) -> None:
        """Open the channels of `connection`; their queues have the numbers from `first` on."""
        from greenkombu.entity import Exchange, Queue
        from greenkombu.messaging import Consumer

        name = name or self._name
        # Everything vanishes with the connections, however the program ends.
        exchange = Exchange(name, type="direct", durable=False, auto_delete=True)
        for number in range(first, first + (count or self.options.channels)):
            queue = Queue(
                f"{name}-{number}",
                exchange,
                routing_key=str(number),
                durable=False,
                exclusive=True,
                auto_delete=True,
            )
            consumer = Consumer(
                connection.channel(),
                queue,
                on_message=functools.partial(self._on_message, number),
            )
            consumer.consume()
            self._consumers.append(consumer)

    # -- publishing and consuming

    def _exchange(self, model: Connection) -> float:
        """Publish and wait until everything came; return the seconds from first to last."""
        from greenkombu.pools import ProducerPool

        limit = min(PUBLISHING_CONNECTIONS, len(self._publishers))
        pool = ProducerPool(model.Pool(limit=limit), limit=limit)
        started = perf_counter_ns()
        spawn = self._environment.spawn
        tasks = [spawn(self._publish, pool, publisher) for publisher in self._publishers]
        self._watch(tasks, "messages", lambda: self._ledger.received, self.options.messages)
        if self._ledger.complete:
            self._environment.sleep(LINGER)
        elif not self._over.is_set():
            self._fail_late("not all messages came in time")
        self._over.set()
        for publisher in self._publishers:
            publisher.release()
        _join_all(tasks, GRACE)
        try:
            with Deadline(GRACE):
                pool.force_close_all()
                pool.connections.force_close_all()
        except Exception as error:
            self._note("closing the producers", error)
        return max(self._ledger.last_ns - started, 0) / 1e9

    def _publish(self, pool: ProducerPool, publisher: _Publisher) -> None:
        """Publish one publisher's share; the body of its task."""
        numbers = publisher.numbers
        try:
            for start in range(0, len(numbers), BURST):
                burst = numbers[start : start + BURST]
                publisher.expect(len(burst), self._environment)
                with (
                    Deadline(self._left()),
                    pool.acquire(block=True, timeout=self._left()) as producer,
                ):
                    for number in burst:
                        if self._over.is_set():
                            return
                        producer.publish(
                            self._ledger.make_body(number),
                            exchange=self._name,
                            routing_key=str(number % self._ledger.queues),
                            content_type="application/data",
                            content_encoding="binary",
                            delivery_mode=1,
                        )
                        publisher.sent += 1
                if not publisher.wait(self._left()):
                    return  # the watching task says what is missing
        except Exception as error:
            self._fail("publishing", error)

    def _on_message(self, queue: int, message: Any) -> None:
        """Take one message; runs in the drain task."""
        number = self._ledger.receive(queue, message.body)
        message.ack()
        if number is not None:
            self._publishers[number % len(self._publishers)].arrived()

    def _drain(self, loop: DrainLoop) -> None:
        try:
            loop.run_forever()
        except Exception as error:
            self._fail("consuming", error)

    def _on_connection_error(self, connection: Connection, error: BaseException) -> None:
        self._fail(f"a connection to {connection.as_uri()}", error)

    # -- tearing down

    def _close_all(self) -> None:
        """Delete the queues and close the connections, several at a time, within a bound."""
        waiting = deque(self._opened)
        by_connection: dict[int, list[Consumer]] = {}
        for consumer in self._consumers:
            by_connection.setdefault(id(consumer.connection), []).append(consumer)

        def close_some() -> None:
            while waiting:
                try:
                    connection = waiting.popleft()
                except IndexError:  # another native thread was faster
                    return
                self._close(connection, by_connection.get(id(connection), ()))

        tasks = [
            self._environment.spawn(close_some) for _ in range(min(OPENERS, len(self._opened)))
        ]
        limit = CLOSE_TIMEOUT + CLOSE_TIMEOUT_EACH * len(self._opened)
        if not _join_all(tasks, limit):
            self._problems.append(f"not all connections were closed within {limit:g} s")

    def _close(self, connection: Connection, consumers: Any = ()) -> None:
        try:
            with Deadline(CLOSE_TIMEOUT):
                if connection.connected:
                    for consumer in consumers:
                        # For brokers that know no exclusive queues; nobody waits for the answer.
                        for queue in consumer.queues:
                            queue.delete(nowait=True)
                connection.release()
        except Exception as error:
            self._note("closing a connection", error)

    # -- keeping watch

    def _left(self) -> float:
        """Return the seconds until the run has to be over."""
        return max(self._deadline - monotonic(), 0.0)

    def _watch(self, tasks: list[Task], phase: str, done: Callable[[], int], total: int) -> None:
        """Report progress until all is done, the run is over, or the deadline has passed."""
        last = self._environment.waiter()

        def wait_for_tasks() -> None:
            for task in tasks:
                task.join(self._left())
            last.wake()

        self._environment.spawn(wait_for_tasks)
        while not self._over.is_set():
            count = done()
            self._progress(phase, count, total)
            if count >= total or last.woken or self._left() <= 0:
                break
            self._over.wait(min(REPORT_INTERVAL, self._left()))
        self._progress(phase, done(), total)

    def _fail(self, doing: str, error: BaseException) -> None:
        """Write down an error and end the run."""
        self._note(doing, error)
        self._over.set()

    def _fail_late(self, what: str) -> None:
        self._problems.append(f"{what}: the run had {self.options.timeout:g} s")
        self._over.set()

    def _note(self, doing: str, error: BaseException) -> None:
        text = f"{doing}: {type(error).__name__}: {error}"
        if text not in self._problems and len(self._problems) < KEPT_PROBLEMS:
            self._problems.append(text)

    # -- taking stock

    def _result(
        self,
        setup: float,
        seconds: float,
        memory: float | None,
        largest_slice: float,
        hub_slice: float,
        ticker: _Ticker | None,
    ) -> DemoResult:
        ledger, options = self._ledger, self.options
        published = [publisher.published for publisher in self._publishers]
        return DemoResult(
            environment=self._environment.name,
            poller=get_hub().poller.name,
            broker=maybe_sanitize_url(options.broker),
            connections=options.connections,
            channels=options.channels,
            publishers=len(self._publishers),
            messages=options.messages,
            body_size=options.body_size,
            sent=sum(map(len, published)),
            received=ledger.received,
            duplicates=ledger.duplicates,
            setup_seconds=setup,
            seconds=seconds,
            messages_per_second=ledger.received / seconds if seconds > 0 else None,
            latency_p50_ms=ledger.percentile_ms(0.5),
            latency_p99_ms=ledger.percentile_ms(0.99),
            largest_slice_ms=largest_slice * 1000,
            largest_hub_slice_ms=hub_slice * 1000,
            memory_per_connection_kib=memory,
            ticks=ticker.ticks if ticker else 0,
            largest_tick_gap_ms=ticker.largest_gap * 1000 if ticker else 0.0,
            interrupted=self.interrupted,
            problems=[*self._problems, *(ledger.problems(published) if ticker else ())],
        )
