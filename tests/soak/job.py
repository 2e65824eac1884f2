"""The run of a soak."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from greenkombu import Connection, Producer, Queue
from greenkombu.deadline import Deadline
from greenkombu.exceptions import KombuError
from greenkombu.pools import ProducerPool
from hub.environment import Environment, Task, get_environment
from tests.soak.brokers import SoakBroker
from tests.soak.ledger import Ledger
from tests.support.leaks import Census, settle, warm_up
from tests.support.patched import ROOT

__all__ = ["Soak"]

#: Bound of one publish with all its retries, in seconds, and what a loaded machine may add.
BOUND, SLACK = 15.0, 5.0
#: Publishers wait while so many confirmed messages are not delivered.
BACKLOG = 5_000
#: Seconds in which some of what is left has to be delivered, at the end.
PATIENCE = 60.0
#: Seconds between two looks at the record.
LOOK = 0.1
#: Resident bytes by which this process may grow after the first quarter of a run.
GROWTH = 48 * 1024 * 1024


class Soak:
    """One run.

    Args:
        name: of the environment, for the consuming processes.
        broker: not started.
        folder: for the records; empty.
        seconds: how long faults happen.
        publishers: tasks that publish.
        consumers: processes that consume.
        seed: of every choice; each kind of misfortune has a sequence of its own, so that a seed
            repeats it whatever the others do.
        say: takes a line of text.

    Attributes:
        ledger: the account.
        faults: how often each happened.
        failures: publishes that raised, by the name of the error.
        problems: what must not have happened; none is a success.
    """

    def __init__(
        self,
        name: str,
        broker: SoakBroker,
        folder: Path,
        *,
        seconds: float,
        publishers: int,
        consumers: int,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.ledger = Ledger(folder)
        self.faults: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()
        self.problems: list[str] = []
        self.longest = 0.0
        self._name = name
        self._broker = broker
        self._folder = folder
        self._seconds = seconds
        self._count = publishers
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._process_count = consumers
        self._started_processes = 0
        self._seed = seed
        self._say = say
        self._env: Environment = get_environment()
        self._publishers: list[Task] = []
        # No new faults, no new publishes.
        self._ending = False

    def run(self) -> bool:
        """Carry it out; return whether all is well."""
        warm_up()
        self._broker.start()
        try:
            with Connection(self._broker.url, **self._broker.options) as connection:
                for queue, arguments in self._broker.queues.items():
                    Queue(queue, queue_arguments=arguments)(connection.default_channel).declare()
            before = Census()
            self._under_load()
            self._broker.recover()
            self._await_deliveries()
            if self.ledger.missing():
                self._say(f"where the missing may be: {self._broker.holdings()}")
            self._stop_processes()
            if self.ledger.missing():
                self._say(f"the same without consumers: {self._broker.holdings()}")
            self.problems += [f"left behind: {line}" for line in settle(before, self._env.sleep)]
            self.problems += self._broker.left_behind()
        finally:
            for process in self._processes.values():
                process.kill()
            self._broker.close()
        self.problems += self.ledger.problems
        lost = self.ledger.missing()
        if lost:
            self.problems.append(f"{len(lost)} confirmed messages were lost: {lost[:20]}")
        return not self.problems

    def report(self) -> str:
        """Return the counts."""
        ledger = self.ledger
        faults = " ".join(f"{name}={count}" for name, count in sorted(self.faults.items()))
        failures = " ".join(f"{name}={count}" for name, count in self.failures.most_common())
        return (
            f"published={ledger.published} confirmed={len(ledger.confirmed)} "
            f"delivered={ledger.delivered} redelivered={ledger.redelivered} twice={ledger.twice} "
            f"lost={len(ledger.missing())}\n"
            f"faults: {faults}\n"
            f"publishes that raised: {failures or 'none'}\n"
            f"longest publish: {self.longest:.1f} s of {BOUND:g} s"
        )

    # -- load

    def _under_load(self) -> None:
        url, options = self._broker.publisher_url, self._broker.options
        shared, model = Connection(url, **options), Connection(url, **options)
        connections = model.Pool(4)
        pool = ProducerPool(connections, 4)
        producer = Producer(shared)
        for _ in range(self._process_count):
            self._start_process()
        helpers = [
            self._env.spawn(work) for work in (self._torment_broker, self._torment_processes)
        ]
        if self._env.timeout_types:
            helpers.append(self._env.spawn(self._torment_tasks))
        started = last = time.monotonic()
        resident = 0
        try:
            while (now := time.monotonic()) - started < self._seconds:
                while sum(not task.done for task in self._publishers) < self._count:
                    self._publishers.append(self._env.spawn(self._publish, producer, pool))
                self._publishers = [task for task in self._publishers if not task.done]
                self.ledger.look()
                self._watch_processes()
                if not resident and now - started > self._seconds / 4:
                    resident = psutil.Process().memory_info().rss
                if now - last > 10:
                    last = now
                    self._say(
                        f"{now - started:.0f} s: confirmed={len(self.ledger.confirmed)} "
                        f"delivered={self.ledger.delivered} not yet={len(self.ledger.missing())}"
                    )
                self._env.sleep(LOOK)
        finally:
            self._ending = True
            for task in (*helpers, *self._publishers):
                if not task.join(BOUND + SLACK + PATIENCE):
                    self.problems.append(f"{task!r} does not end")
        for task in helpers:
            task.result()
        grown = psutil.Process().memory_info().rss - resident
        if resident and grown > GROWTH:
            self.problems.append(f"this process grew by {grown >> 20} MB")
        pool.force_close_all()
        connections.force_close_all()
        shared.close()

    def _publish(self, producer: Producer, pool: ProducerPool) -> None:
        """Publish until the end, over the shared connection or one of the pool's."""
        errors = (
            *producer.__connection__.connection_errors,
            *producer.__connection__.channel_errors,
        )
        chance = random.Random(f"{self._seed} {self.ledger.published}")
        while not self._ending:
            if self.ledger.backlog > BACKLOG:
                self._env.sleep(LOOK)
                continue
            number = self.ledger.next_number()
            bound, interrupted = BOUND, None
            if chance.random() < 0.02:
                if self._env.timeout_types:
                    interrupted = self._env.timeout(chance.uniform(0, 0.05))
                else:
                    bound = chance.uniform(0.001, 0.05)
            began = time.monotonic()
            try:
                if interrupted is None:
                    self._publish_one(producer, pool, chance, number, bound)
                else:
                    with interrupted:
                        self._publish_one(producer, pool, chance, number, bound)
            except (KombuError, OSError, *errors) as error:
                self.failures[type(error).__name__] += 1
            except self._env.timeout_types as error:
                self.failures[type(error).__name__] += 1
                if not isinstance(error, type(interrupted)):
                    raise  # it was killed
            except Exception as error:
                self.problems.append(f"a publish raised {error!r}")
                raise
            took = time.monotonic() - began
            self.longest = max(self.longest, took)
            if took > bound + SLACK:
                self.problems.append(f"a publish bounded by {bound:.3f} s took {took:.1f} s")
            self._env.sleep(chance.uniform(0, 0.03))

    def _publish_one(
        self,
        producer: Producer,
        pool: ProducerPool,
        chance: random.Random,
        number: int,
        bound: float,
    ) -> None:
        queue = chance.choice(list(self._broker.queues))
        options: dict[str, Any] = {"routing_key": queue, "mandatory": True}
        options |= {"retry": True, "retry_policy": {"max_retries": None}}
        body = {"number": number, "filling": "x" * chance.randrange(2000)}
        if number % 2:
            producer.publish(body, timeout=bound, **options)
        else:
            with Deadline(bound), pool.acquire(block=True) as one:
                one.publish(body, **options)
        self.ledger.confirm(number)

    # -- misfortunes

    def _torment_broker(self) -> None:
        chance = random.Random(f"{self._seed} faults")
        weights = [weight for weight, _ in self._broker.faults]
        while not self._ending:
            self._env.sleep(chance.uniform(0.2, 2))
            ((_, fault),) = chance.choices(self._broker.faults, weights)
            self.faults[getattr(fault, "__name__", str(fault))] += 1
            fault()

    def _torment_tasks(self) -> None:
        chance = random.Random(f"{self._seed} tasks")
        while not self._ending:
            self._env.sleep(chance.uniform(0.05, 0.5))
            if self._publishers:
                self.faults["task killed"] += 1
                chance.choice(self._publishers).kill()

    def _torment_processes(self) -> None:
        chance = random.Random(f"{self._seed} processes")
        while not self._ending:
            self._env.sleep(chance.uniform(*self._broker.process_pause))
            name = chance.choice(list(self._processes))
            process = self._processes[name]
            if chance.random() < self._broker.process_freezes:
                self.faults["consumer frozen"] += 1
                frozen = psutil.Process(process.pid)
                frozen.suspend()
                self._env.sleep(chance.uniform(0.5, 6))
                frozen.resume()
            else:
                self.faults["consumer killed"] += 1
                del self._processes[name]
                process.kill()
                self._reap(process)
                self._start_process()

    # -- consuming processes

    def _start_process(self) -> None:
        self._started_processes += 1
        name = f"consumer-{self._started_processes}"
        settings = {
            "url": self._broker.consumer_url,
            "options": self._broker.options,
            "queues": self._broker.queues,
        }
        command = [sys.executable, "-m", "tests.soak.consumer"]
        with open(self._folder / f"{name}.log", "wb") as log:
            self._processes[name] = subprocess.Popen(
                [*command, self._name, str(self._folder), name, json.dumps(settings)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _watch_processes(self) -> None:
        """Start again those that have ended by themselves, which is a problem."""
        for name, process in list(self._processes.items()):
            if process.poll() is not None and self._processes.get(name) is process:
                del self._processes[name]
                log = (self._folder / f"{name}.log").read_text(errors="replace").strip()
                self.problems.append(f"{name} ended by itself: {log[-500:]}")
                self._start_process()

    def _stop_processes(self) -> None:
        (self._folder / "stop").touch()
        for name, process in self._processes.items():
            if not self._reap(process):
                self.problems.append(f"{name} does not stop")
        self._processes.clear()
        self.ledger.look()

    def _reap(self, process: subprocess.Popen[bytes]) -> bool:
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None:
            if time.monotonic() > deadline:
                process.kill()
                return False
            self._env.sleep(0.02)
        return True

    def _await_deliveries(self) -> None:
        """Wait while confirmed messages are missing and some of them still come."""
        left, deadline = -1, 0.0
        while True:
            self.ledger.look()
            missing = len(self.ledger.missing())
            if not missing:
                return
            if missing != left:
                left, deadline = missing, time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                return
            self._watch_processes()
            self._env.sleep(LOOK)
