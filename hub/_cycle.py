"""What one iteration of a hub does; who runs it is the business of `hub.loop`.

One iteration ("cycle") does, in this order:

1. run what is ready, oldest first, at most as many calls as were queued when it began;
2. run the timers that are due (heartbeats are timers: they run in each cycle, however much
   else there is to do); what they set themselves waits for the next cycle;
3. poll: without waiting if anything is left to do, else until the next timer is due;
4. run the READ and WRITE callbacks of what the poller reported.

Steps 1, 2 and 4 each end after `max_slice` seconds; the rest is kept for the next cycle and
the hub yields in between, so a flood on one descriptor delays everybody
else by no more than that.  What was reported but not yet served keeps its place at the
front of the next cycle.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hub._log import RecordQueue
from hub.environment import Environment, blocking_call, check_may_wait, running_callbacks
from hub.errors import BadDescriptorError, HubClosedError
from hub.finalize import drain_reaper
from hub.timers import Handle, Timer, TimerHeap

if TYPE_CHECKING:
    from hub._drivers import Driver
    from hub.pollers import Poller

__all__ = ["MAX_SLICE", "Cycle", "HubStats"]

logger = logging.getLogger("hub.loop")  # what users know it by

#: Seconds of callbacks after which a cycle yields.  Law 8 allows 20 ms of the loop at a time; a
#: cycle has two slices and its last callback may overrun.
MAX_SLICE = 0.005
#: Seconds after which a single callback is reported as too slow for a hub.
SLOW_CALLBACK = 0.1
#: Descriptors taken from the poller at once; more would only wait in our own deque.
MAX_EVENTS = 512
_READ, _WRITE = 1, 4  # hub.pollers.READ and WRITE; imported late, the pollers need select


def _is_descriptor(fd: object) -> bool:
    """Tell whether `fd` can be registered at all: a list, say, cannot even be looked up."""
    return isinstance(fd, int)


class HubStats:
    """Counters of one hub; times in seconds."""

    __slots__ = ("callbacks", "cycles", "errors", "largest_slice", "slow_callbacks")

    def __init__(self) -> None:
        self.cycles = 0
        self.callbacks = 0
        self.errors = 0
        self.slow_callbacks = 0
        self.largest_slice = 0.0

    def __repr__(self) -> str:
        return (
            f"<HubStats cycles={self.cycles} callbacks={self.callbacks} errors={self.errors} "
            f"slow_callbacks={self.slow_callbacks} largest_slice={self.largest_slice:.4f}s>"
        )


class Cycle(ABC):
    """The queues of a hub, its interest in descriptors, and the cycle that serves them.

    Args:
        environment, poller, clock, max_slice, on_error: see `hub.loop.Hub`.
    """

    #: What waits for the poller on behalf of whoever runs the hub.
    driver: Driver

    def __init__(
        self,
        environment: Environment,
        poller: Poller,
        clock: Callable[[], float],
        max_slice: float,
        on_error: Callable[[BaseException, object], None] | None,
    ) -> None:
        self.environment = environment
        self.poller = poller
        self._clock = clock
        self.max_slice = max_slice
        self.on_error = on_error
        self.stats = HubStats()
        #: True while a cycle runs; the hub is not entered twice.
        self.cycling = False
        self.closed = False
        self.readers: dict[int, Handle] = {}
        self.writers: dict[int, Handle] = {}
        self._ready: deque[Handle] = deque()
        self._turn_ends: deque[Callable[[], object]] = deque()
        self._turn_end_due = False
        self._reported: deque[tuple[int, int]] = deque()
        self._timers = TimerHeap()
        # Timers that are entered after those that are due have run: what a timer's callback sets
        # has its turn in the next cycle, however soon it is due.
        self._entering: list[Timer] | None = None
        self._reaped: deque[tuple[int, Callable[[], object] | None]] = deque()
        # Set by the first poke after a cycle began; spares the others the system call.
        self._poked = False
        # The task that runs the hub in the foreground, if any.
        self._runner: object = None
        self._stop = False
        # Whether the cycle that has just run has let other tasks run.
        self._waited = False
        self._records = RecordQueue(environment)

    @abstractmethod
    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> Handle:
        """See `hub.loop.Hub`."""

    @abstractmethod
    def in_hub_thread(self) -> bool:
        """See `hub.loop.Hub`."""

    @abstractmethod
    def _check(self) -> None:
        """Raise unless the caller may use the hub."""

    @abstractmethod
    def _start_background(self) -> None:
        """Let the background owner run the hub, if it has one and nobody else does."""

    @abstractmethod
    def _run_turn_ends(self) -> None:
        """Call what waits for the end of this turn."""

    @abstractmethod
    def _close_reaped(self) -> None:
        """Close the descriptors that finalizers have left."""

    # -- descriptors -------------------------------------------------------------------
    def add_reader(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback(*args)` whenever `fd` is readable, has reached its end, or failed.

        One reader per descriptor: a second call replaces the first.

        Raises:
            BadDescriptorError: `fd` is closed, negative, or cannot be waited for.
        """
        self.set_handle(fd, Handle(callback, args), reads=True)

    def add_writer(self, fd: int, callback: Callable[..., object], *args: Any) -> None:
        """Call `callback(*args)` whenever `fd` is writable or failed; as `add_reader`."""
        self.set_handle(fd, Handle(callback, args), reads=False)

    def set_handle(self, fd: int, handle: Handle, *, reads: bool) -> None:
        """As `add_reader` or `add_writer`, for a handle of one's own.

        It is cancelled when the hub lets go of it, for whatever reason.
        """
        self._check()
        mine, other = (self.readers, self.writers) if reads else (self.writers, self.readers)
        bit = _READ if reads else _WRITE
        try:
            paired, known = fd in other, fd in mine
        except TypeError:
            paired = known = False  # not even hashable: the poller says what is wrong
        events = _READ | _WRITE if paired else bit
        try:
            # Also when it is registered for the same events already: the number may have been
            # closed and re-used, and only the kernel knows.
            self.poller.register(fd, events)
        except BadDescriptorError:
            if paired or known:
                self._reported.append((fd, _READ | _WRITE))  # see _drop_interest
            raise
        self.driver.interest(fd, events)
        replaced = mine.get(fd)
        mine[fd] = handle
        if replaced is not None:
            replaced.cancel()
        if not self.cycling:
            self._start_background()

    def remove_reader(self, fd: int) -> bool:
        """Stop calling the reader of `fd`; tell whether there was one. Never raises for an fd."""
        self._check()
        return self._drop_interest(fd, self.readers, self.writers, _WRITE)

    def remove_writer(self, fd: int) -> bool:
        """Stop calling the writer of `fd`; tell whether there was one. Never raises for an fd."""
        self._check()
        return self._drop_interest(fd, self.writers, self.readers, _READ)

    def remove(self, fd: int) -> bool:
        """Stop waiting for `fd` in both directions; call it before closing the descriptor."""
        self._check()
        if not _is_descriptor(fd):
            return False
        found = [mine.pop(fd) for mine in (self.readers, self.writers) if fd in mine]
        self._unregister(fd)
        for handle in found:
            handle.cancel()
        return bool(found)

    def _drop_interest(
        self, fd: int, mine: dict[int, Handle], other: dict[int, Handle], rest: int
    ) -> bool:
        if not _is_descriptor(fd):
            return False
        handle = mine.pop(fd, None)
        if fd not in other:
            self._unregister(fd)
        elif handle is not None:
            try:
                self.poller.register(fd, rest)
            except BadDescriptorError:
                # Closed behind our back, and dropped: the poller will not tell the other callback.
                self._reported.append((fd, rest))
            else:
                self.driver.interest(fd, rest)
        if handle is not None:
            handle.cancel()
        return handle is not None

    def _unregister(self, fd: int) -> None:
        if fd in self.poller.registered:
            self.driver.interest(fd, 0)
            self.poller.unregister(fd)

    # -- the cycle -----------------------------------------------------------------------
    def _cycle(self, timeout: float | None, poll: bool = True, once: bool = False) -> int:
        task = self.environment.current()
        outer = running_callbacks.get(task)
        if outer is not None and not (timeout is not None and timeout <= 0):
            check_may_wait(task)  # a callback of another hub that wants to wait here
        ready, reported = self._ready, self._reported
        before = self.stats.callbacks
        self._poked = False
        self.cycling = True
        running_callbacks[task] = self
        # In the background the green library refuses by itself: it runs the callbacks in its loop.
        foreground = outer is None and self._runner is not None
        if foreground:
            self.environment.forbid_waits(task)
        try:
            self._run_due()
            if self._is_closed():  # by a callback
                return self.stats.callbacks - before
            if (
                reported
                or ready
                or self._stop
                or (timeout is not None and timeout <= 0)
                or (once and self.stats.callbacks != before)
            ):
                timeout = 0
            else:
                delay = self._delay()
                if delay is not None and (timeout is None or delay < timeout):
                    timeout = delay
            if poll and not reported:
                if timeout == 0:
                    events = self.poller.poll(0, MAX_EVENTS)
                    # It has swallowed the wake-ups of those who poked; who comes now has to
                    # wake it again.  What they queued is looked at after this.
                    self._poked = False
                else:
                    # Between here and the return other tasks run: they may queue and
                    # register (and must wake the poller), and no callback is running.
                    self._waited = True
                    self.cycling = False
                    running_callbacks.pop(task, None)
                    if foreground:
                        self.environment.allow_waits(task)
                    try:
                        # A signal handler that queued something between the look at the queue and
                        # `cycling = False` has woken nobody.
                        events = self.driver.poll(0 if self.has_work() else timeout)
                    finally:
                        self._poked = False
                        self.cycling = True
                        running_callbacks[task] = self
                        if foreground:
                            self.environment.forbid_waits(task)
                    if self._is_closed():
                        return self.stats.callbacks - before
                    if self._timers:
                        self._run_timers()
                reported.extend(events)
            if reported:
                self._run_reported()
        finally:
            self.cycling = False
            if foreground:
                self.environment.allow_waits(task)
            if outer is None:
                running_callbacks.pop(task, None)
            else:
                running_callbacks[task] = outer
        stats = self.stats
        stats.cycles += 1
        return stats.callbacks - before

    def _turn(self, poll: bool) -> None:
        """One iteration that looks and never waits, in the background of a green hub.

        What is left of `_cycle(0, poll)` there, which has to be ready for a task that runs the hub,
        and for waits, at twice the cost; it runs for each answer of a broker.
        """
        task = self.environment.current()
        outer = running_callbacks.get(task)
        self._poked = False
        self.cycling = True
        running_callbacks[task] = self
        try:
            self._run_due()
            if self._is_closed():  # by a callback
                return
            if poll and not self._reported:
                self._reported.extend(self.poller.poll(0, MAX_EVENTS))
                # See `_cycle`.
                self._poked = False
            if self._reported:
                self._run_reported()
        finally:
            self.cycling = False
            if outer is None:
                running_callbacks.pop(task, None)
            else:
                running_callbacks[task] = outer
        self.stats.cycles += 1

    def _run_due(self) -> None:
        """Do what needs no look at the descriptors."""
        if self._reaped:
            self._close_reaped()
        drain_reaper(self._report)
        if self._turn_end_due:
            self._run_turn_ends()
        if self._ready:
            self._run_ready()
        if self._timers:
            self._run_timers()

    def _is_closed(self) -> bool:
        """Return `closed`, which callbacks and other threads change under the cycle's hands."""
        return self.closed

    def _run_ready(self) -> None:
        ready = self._ready
        started = self._clock()
        for _ in range(len(ready)):
            # A callback that closes the hub empties the queue.
            if not ready or self._call(ready.popleft(), started):
                break

    def _run_timers(self) -> None:
        now = self._clock()
        due = self._timers.next_due()
        if due is None or due > now:
            return
        entering = self._entering = []
        try:
            while True:
                timer = self._timers.pop_due(now)
                if timer is None:
                    break
                if timer.interval is not None:
                    entering.append(timer)
                if self._call(timer, now):
                    break
        finally:
            # Also when an interrupt passes through: a heartbeat must not end with it.
            self._entering = None
            for timer in entering:
                if self.closed:
                    timer.cancel()
                elif not timer.cancelled:
                    if timer.interval is not None and timer.due <= now:
                        missed = (self._clock() - timer.due) // timer.interval
                        timer.due += timer.interval * (missed + 1)
                    self._timers.push(timer)

    def _run_reported(self) -> None:
        reported, readers, writers = self._reported, self.readers, self.writers
        started = self._clock()
        while reported:
            fd, events = reported.popleft()
            over = False
            if events & _READ:
                handle = readers.get(fd)
                if handle is not None:
                    over = self._call(handle, started)
            if events & _WRITE:
                handle = writers.get(fd)
                if handle is not None:
                    over = self._call(handle, started) or over
            if fd not in readers and fd not in writers:
                self._unregister(fd)  # nobody's any more; it must not be reported again
            elif fd not in self.poller.registered and not any(fd == one for one, _ in reported):
                # The poller has dropped it: it was closed behind our back.  If one of the two
                # callbacks has found that out, the other one is reported behind this.
                self.remove(fd)
            if over:
                return

    def _call(self, handle: Handle, started: float) -> bool:
        """Run one callback; True when the slice that began at `started` is used up."""
        # In this order: cancel(), in another thread, marks it first and then lets go of these.
        callback, args = handle.callback, handle.args
        if handle.cancelled:
            return False
        stats = self.stats
        stats.callbacks += 1
        begun = self._clock()
        try:
            callback(*args)
        except BaseException as error:
            if self._passes(error):
                raise
            self._report(error, callback)
        now = self._clock()
        if now - begun > SLOW_CALLBACK:
            stats.slow_callbacks += 1
            self.log_later(
                logger,
                logging.WARNING,
                "%r ran for %.3f s in the hub and held up every other descriptor",
                callback,
                now - begun,
            )
        spent = now - started
        if spent > stats.largest_slice:
            stats.largest_slice = spent
        return spent > self.max_slice

    def _passes(self, error: BaseException) -> bool:
        """Tell whether `error` goes on to the program: an exit, where that can be reached.

        The daemon thread of `default` has no program behind it: an exit there would end that
        thread and be told to nobody, so it is an error like any other.  So are the Timeouts and
        kills of the green libraries: none is meant for whoever happens to run the hub.
        """
        if not isinstance(error, (KeyboardInterrupt, SystemExit)):
            return False
        return self.environment.green or self._runner is not None

    def _report(self, error: BaseException, callback: object) -> None:
        self.stats.errors += 1
        if self.environment.refused_to_wait(error):
            refusal = blocking_call(self)
            refusal.__cause__ = error
            error = refusal
        if self.on_error is not None:
            try:
                self.on_error(error, callback)
                return
            except Exception as second:
                self.log_later(
                    logger, logging.ERROR, "the hub's on_error hook failed", error=second
                )
        self.log_later(logger, logging.ERROR, "error in %r; the hub goes on", callback, error=error)

    def log_later(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        *args: Any,
        error: BaseException | None = None,
    ) -> None:
        """Write a log record soon, in a task; from callbacks and any thread, never waiting.

        A log handler takes locks and does I/O, which a callback must not.  At most a
        thousand records wait; the next one tells how many were left out.
        """
        if self._records.add(logger, level, message, args, error) and not self._start_logging():
            try:
                self.call_soon_threadsafe(self._start_logging)
            except HubClosedError:
                pass  # it is told at the end of the process

    def _start_logging(self) -> bool:
        """Start the task that emits records; False in a thread in which no greenlet would run."""
        if self.environment.green and not self.in_hub_thread():
            return False
        self._records.start()
        return True

    def _delay(self) -> float | None:
        due = self._timers.next_due()
        return None if due is None else max(due - self._clock(), 0.0)

    def has_work(self) -> bool:
        """Tell whether calls or reported descriptors wait for the next cycle."""
        return bool(self._ready or self._reported or self._reaped)
