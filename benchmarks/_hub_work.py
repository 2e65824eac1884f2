"""What `bench_hub.py` measures, in a process of its own for each environment.

Usage: python benchmarks/_hub_work.py ENVIRONMENT wake_up|calls|memory OPTIONS-AS-JSON
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import _common
from _common import Sample, measure, take_turns

# -- wake-ups ---------------------------------------------------------------------------------


class Descriptors:
    """Many descriptors of which one becomes readable.

    Attributes:
        active: the descriptor that `write` makes readable.
        idle: the others.
    """

    def __init__(self, environment: Any, count: int) -> None:
        import socket

        original = environment.original
        # Below the others: select() takes only numbers below 1024.
        self._pair = original("socket", "socketpair")()
        for end in self._pair:
            end.setblocking(False)
        make = original("socket", "socket")
        # Not connected, so never readable; one descriptor each, where a pair takes two.
        self._idle = [make(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(count - 1)]
        self.active = self._pair[0].fileno()
        self.idle = [each.fileno() for each in self._idle]
        self.write: Callable[[bytes], int] = self._pair[1].send
        self.read: Callable[[int], bytes] = self._pair[0].recv


class HubContender:
    """Our hub, run by its background owner."""

    def __init__(self, environment: Any, descriptors: Descriptors) -> None:
        import hub

        self._environment = environment
        self._descriptors = descriptors
        self._hub = hub.get_hub()
        self._waiter: Any = None
        self._registered = 1
        self._hub.run_threadsafe(self._hub.add_reader, descriptors.active, self._on_readable)

    def _on_readable(self) -> None:
        self._descriptors.read(1)
        self._waiter.wake()

    def resize(self, count: int) -> None:
        """Wait for `count` descriptors from now on."""
        while self._registered != count:
            # In steps: a callback of the hub is to be short.
            step = max(min(count - self._registered, 200), -200)
            self._hub.run_threadsafe(self._resize, self._registered + step)

    def _resize(self, count: int) -> None:
        idle = self._descriptors.idle
        for fd in idle[self._registered - 1 : count - 1]:
            self._hub.add_reader(fd, self._on_readable)
        for fd in idle[count - 1 : self._registered - 1]:
            self._hub.remove_reader(fd)
        self._registered = count

    def run(self, count: int) -> None:
        """Wake up `count` times."""
        make, write = self._environment.waiter, self._descriptors.write
        for _ in range(count):
            waiter = self._waiter = make()
            write(b"x")
            waiter.wait()

    def close(self) -> None:
        """Leave nothing running."""
        self._hub.close()


class LoopContender:
    """A task in a loop around what the library offers.

    Args:
        wait: of the kind; made by `prepare(descriptors)`, waits until something is readable.
    """

    def __init__(
        self,
        environment: Any,
        descriptors: Descriptors,
        prepare: Callable[[list[int]], Callable[[], object]],
    ) -> None:
        self._environment = environment
        self._descriptors = descriptors
        self._prepare = prepare
        self._wait: Callable[[], object] = lambda: None
        self._waiter: Any = None

    def resize(self, count: int) -> None:
        """Wait for `count` descriptors from now on."""
        members = [self._descriptors.active, *self._descriptors.idle[: count - 1]]
        self._wait = self._prepare(members)

    def run(self, count: int) -> None:
        """Wake up `count` times."""
        make, write = self._environment.waiter, self._descriptors.write
        self._waiter = make()
        task = self._environment.spawn(self._loop, count)
        self._environment.sleep(0.001)  # it waits when the first byte comes
        for _ in range(count):
            waiter = self._waiter
            write(b"x")
            waiter.wait()
            if task.done:
                break
        try:
            task.result()
        except Exception:
            self._descriptors.read(1)
            raise

    def _loop(self, count: int) -> None:
        make, read = self._environment.waiter, self._descriptors.read
        try:
            for _ in range(count):
                self._wait()
                read(1)
                waiter, self._waiter = self._waiter, make()
                waiter.wake()
        finally:
            # Also when it was refused: nobody is to wait for ever.
            self._waiter.wake()

    def close(self) -> None:
        """Nothing of it is left running."""


def prepare_select(members: list[int]) -> Callable[[], object]:
    import select

    return lambda: select.select(members, [], [])


def prepare_poll(members: list[int]) -> Callable[[], object]:
    import select

    poller = select.poll()
    for fd in members:
        poller.register(fd, select.POLLIN)
    return poller.poll


def prepare_selector(members: list[int]) -> Callable[[], object]:
    import selectors

    selector = selectors.DefaultSelector()
    for fd in members:
        selector.register(fd, selectors.EVENT_READ)
    return selector.select


LOOPS = {
    "select.select": prepare_select,
    "select.poll": prepare_poll,
    "selectors": prepare_selector,
}


def child_wake_up(contender: str, sizes: list[int], rounds: int, seconds: float) -> dict[str, Any]:
    import hub

    environment = hub.get_environment()
    hub.get_hub()  # first, because select() takes only low numbers, its own included
    descriptors = Descriptors(environment, max(sizes))
    made: Any
    if contender in LOOPS:
        made = LoopContender(environment, descriptors, LOOPS[contender])
    else:
        made = HubContender(environment, descriptors)
    refused: dict[str, str] = {}

    def case(size: int) -> Callable[[], Sample]:
        def sample() -> Sample:
            made.resize(size)
            made.run(5)
            gc.collect()
            return measure(made.run, seconds, least=3)

        return sample

    cases = {}
    for size in sizes:
        try:
            made.resize(size)
            made.run(1)
        except (ValueError, OSError, hub.HubError) as error:
            refused[str(size)] = str(error)
            made.resize(min(sizes))
        else:
            cases[size] = case(size)
    taken = take_turns(cases, rounds)
    made.close()
    return {
        "sizes": {str(size): [vars(sample) for sample in taken[size]] for size in cases},
        "refused": refused,
    }


# -- calls, timers, round trips ----------------------------------------------------------------


def queued_calls(environment: Any, put: Callable[[Callable[[], None]], object]) -> Any:
    """Return work that queues calls with `put` and waits until the last one ran."""

    def work(count: int) -> None:
        done = environment.waiter()
        left = count

        def call() -> None:
            nonlocal left
            left -= 1
            if not left:
                done.wake()

        for _ in range(count):
            put(call)
        done.wait()

    return work


def fired_timers(environment: Any, put: Callable[[float, Callable[[], None]], object]) -> Any:
    """Return work that starts timers of 0 to 2 ms with `put` and waits for the last one."""

    def work(count: int) -> None:
        done = environment.waiter()
        left = count

        def call() -> None:
            nonlocal left
            left -= 1
            if not left:
                done.wake()

        for index in range(count):
            put((index * 7919 % 1000) * 2e-6, call)
        done.wait()

    return work


def cancelled_timers(put: Callable[[float, Callable[[], None]], Any]) -> Any:
    """Return work that starts timers of a minute and cancels them."""

    def work(count: int) -> None:
        timers = [put(60.0, int) for _ in range(count)]
        for timer in timers:
            timer.cancel()

    return work


def round_trips(environment: Any) -> Callable[[int], None]:
    """Return work in which two tasks wake each other with our waiters."""

    def work(count: int) -> None:
        make = environment.waiter
        pings = [make() for _ in range(count)]
        pongs = [make() for _ in range(count)]

        def answer() -> None:
            for ping, pong in zip(pings, pongs, strict=True):
                ping.wait()
                pong.wake()

        task = environment.spawn(answer)
        environment.sleep(0.001)
        for ping, pong in zip(pings, pongs, strict=True):
            ping.wake()
            pong.wait()
        task.join()

    return work


def event_round_trips(environment: Any, make: Callable[[], Any], fire: str) -> Any:
    """As `round_trips`, with the library's own events; `fire` names the method that sets one."""

    def work(count: int) -> None:
        pings = [make() for _ in range(count)]
        pongs = [make() for _ in range(count)]

        def answer() -> None:
            for ping, pong in zip(pings, pongs, strict=True):
                ping.wait()
                getattr(pong, fire)()

        task = environment.spawn(answer)
        environment.sleep(0.001)
        for ping, pong in zip(pings, pongs, strict=True):
            getattr(ping, fire)()
            pong.wait()
        task.join()

    return work


def child_calls(rounds: int, seconds: float) -> dict[str, Any]:
    import hub

    environment = hub.get_environment()
    loop = hub.get_hub()

    def in_hub(work: Callable[[int], None]) -> Callable[[int], None]:
        return lambda count: loop.run_threadsafe(work, count)

    # Timers are started in the hub, as a heartbeat is: only its own thread may.
    def put_timers(start: Callable[[float, Callable[[], None]], Any], environment: Any) -> Any:
        def work(count: int) -> None:
            done = environment.waiter()
            left = count

            def call() -> None:
                nonlocal left
                left -= 1
                if not left:
                    done.wake()

            def begin() -> None:
                for index in range(count):
                    start((index * 7919 % 1000) * 2e-6, call)

            loop.call_soon_threadsafe(begin)
            done.wait()

        return work

    works: dict[str, Callable[[int], None]] = {
        "call, ours": queued_calls(environment, loop.call_soon_threadsafe),
        "timer that fires, ours": put_timers(loop.call_later, environment),
        "timer cancelled, ours": in_hub(cancelled_timers(loop.call_later)),
        "round trip, ours": round_trips(environment),
    }
    works.update(library_works(environment))
    taken = take_turns(
        {
            name: lambda work=work: measure(work, seconds, least=50, most=5000)
            for name, work in works.items()
        },
        rounds,
    )
    loop.close()
    return {name: [vars(sample) for sample in samples] for name, samples in taken.items()}


def library_works(environment: Any) -> dict[str, Callable[[int], None]]:
    """Return the same work on the environment's own event loop, where it has one."""
    if environment.name == "gevent":
        import gevent
        import gevent.event

        own = gevent.get_hub().loop

        def start(delay: float, call: Callable[[], None]) -> Any:
            timer = own.timer(delay)
            timer.start(call)
            return timer

        def start_and_stop(count: int) -> None:
            timers = [start(60.0, int) for _ in range(count)]
            for timer in timers:
                timer.stop()
                timer.close()

        return {
            "call, the library's loop": queued_calls(environment, own.run_callback),
            "timer that fires, the library's loop": fired_timers(environment, start),
            "timer cancelled, the library's loop": start_and_stop,
            "round trip, the library's events": event_round_trips(
                environment, gevent.event.Event, "set"
            ),
        }
    if environment.name == "eventlet":
        import eventlet.event
        import eventlet.hubs

        hub = eventlet.hubs.get_hub()

        def soon(call: Callable[[], None]) -> Any:
            return hub.schedule_call_global(0, call)

        return {
            "call, the library's loop": queued_calls(environment, soon),
            "timer that fires, the library's loop": fired_timers(
                environment, hub.schedule_call_global
            ),
            "timer cancelled, the library's loop": cancelled_timers(hub.schedule_call_global),
            "round trip, the library's events": event_round_trips(
                environment, eventlet.event.Event, "send"
            ),
        }
    import threading

    return {
        "round trip, the library's events": event_round_trips(environment, threading.Event, "set")
    }


# -- memory ---------------------------------------------------------------------------------------


def child_memory(count: int) -> dict[str, Any]:
    import hub

    environment = hub.get_environment()
    loop = hub.get_hub()
    descriptors = Descriptors(environment, count)

    def never() -> None:
        """The descriptors are never readable."""

    def fill(fds: Iterable[int]) -> None:
        for fd in fds:
            loop.add_reader(fd, never)

    loop.run_threadsafe(fill, descriptors.idle[:100])
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for start in range(100, count, 500):
        loop.run_threadsafe(fill, descriptors.idle[start : start + 500])
    grown = tracemalloc.get_traced_memory()[0] - before
    poller = loop.poller.name
    loop.close()
    return {"poller": poller, "bytes": grown / (count - 101)}


def main(arguments: list[str]) -> None:
    import resource

    environment, kind, options = arguments[0], arguments[1], json.loads(arguments[2])
    _common.patch(environment)
    if hasattr(os, "sched_setaffinity"):
        # On one core: whether two threads run on the same one doubles the cost of waking each
        # other, and on a busy machine that changes from one sample to the next.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = options.pop("descriptors", 0) + 100
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, hard)))
        except ValueError:
            raise SystemExit(f"needs {wanted} descriptors, may have {hard}: ulimit -n") from None
    work = {"wake_up": child_wake_up, "calls": child_calls, "memory": child_memory}[kind]
    print(json.dumps(work(**options)))


if __name__ == "__main__":
    main(sys.argv[1:])
