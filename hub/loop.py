"""The hub: one cooperative loop for descriptors, timers and queued calls.

What one iteration does stands in `hub._cycle`; here is the rest: who runs it, how it is woken,
threads, forks and the end.

Who runs it.  `hub.shared.get_hub()` returns the hub of the calling native thread (under
`default`: of the process).  Its background owner is started by the first call that gives it
something to do (see `hub._drivers`).  Instead, a program may run it itself: `run_forever()` and
`run_once()` in a task of its own, or any foreign loop that watches `fileno()` and calls
`run_once(0)` when it is readable.  The background owner stands down for as long.
A `Hub()` of one's own has no background owner at all.

Callbacks must be tiny and cannot wait (BlockingCallError).  An error in one goes to
`on_error` and nowhere else; the loop and all other descriptors go on.

Threads.  A hub is used from the thread that runs it; any other call raises
ForeignThreadError.  `call_soon_threadsafe()` and `run_threadsafe()` may be called from
anywhere; the former also in signal handlers and finalizers: it appends to a deque and
makes a descriptor readable, and takes no lock.  Under gevent and eventlet a hub can be closed
by its own thread only; under `default` by any.

Forks.  The child's copy of every hub is dead (HubClosedError).  Its epoll object is
shared with the parent, so it is closed without a single epoll_ctl call; `get_hub()` makes a new
one.  In the parent the daemon thread of `default` ends before the fork and goes on
after it.

The module is long because running, waking, forks and the end are one state machine: each part
reads and writes what the others rely on.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from hub import _fork
from hub._cycle import MAX_SLICE, Cycle
from hub.arguments import check_callable, check_seconds
from hub.environment import (
    Environment,
    Task,
    get_environment,
)
from hub.errors import (
    BadArgumentError,
    ForeignThreadError,
    HubClosedError,
    HubError,
    HubRunningError,
    HubTimeoutError,
    UnknownEnvironmentError,
)
from hub.timers import Handle, Timer

if TYPE_CHECKING:
    from hub._descriptors import Audit
    from hub._drivers import Driver
    from hub.pollers import Poller

__all__ = ["Hub", "HubMember"]

logger = logging.getLogger(__name__)

#: Bytes that a stream reads at once.  A socket's default receive buffer is about that size, so one
#: call empties it; parsing that much takes a fraction of MAX_SLICE.
SCRATCH_SIZE = 262_144
#: Bytes that are allocated and freed once, before the first read.  glibc gives what is free at the
#: end of its heap back to the kernel beyond twice the largest mapped block that was ever freed
#: (mallopt(3), M_MMAP_THRESHOLD).  With blocks of SCRATCH_SIZE that is at every large message,
#: whose pages then have to be faulted in anew: 47 000 faults for 80 bodies of 1 MiB, 1.6 ms of CPU
#: each instead of 0.35 (Kombu: 1.3).  No page of it is touched, so it costs two system calls; its
#: price is that up to twice as much free heap stays with the process.  It does nothing elsewhere.
KEPT_HEAP = 8 << 20
#: Seconds that whoever runs a hub may take to let go of it: before a fork, when a task wants to
#: run it, and when it is closed.  It is woken for that, so it needs microseconds, unless a callback
#: blocks.
STOP_TIMEOUT = 1.0
#: Seconds; clocks count nothing finer, and how often it was missed would be no number.
SHORTEST_INTERVAL = 1e-9


class HubMember(Protocol):
    """What lives on a hub and must hear of its end (streams)."""

    def hub_gone(self, error: HubError, forked: bool) -> None:
        """The hub was closed, or belongs to the parent process (`forked`)."""

    def flush_at_exit(self, deadline: float) -> None:
        """Send what is buffered until `deadline` (hub time), blocking the process."""


class Hub(Cycle):
    """A loop for descriptors, timers and calls; see the module's header.

    Args:
        environment: an `Environment`; None takes the one that holds now.
        poller: a name, or a `Poller` that no other hub has; None takes HUB_POLLER or the
            platform's best.
        clock: returns monotonic seconds.
        max_slice: seconds of callbacks after which a cycle yields.
        on_error: called with (exception, what was called) for each error in a callback;
            None logs it.
    """

    #: `thread` of a hub that its background thread will own but does not run yet.
    NOBODY = -1

    def __init__(
        self,
        *,
        environment: Environment | None = None,
        poller: Poller | str | None = None,
        clock: Callable[[], float] | None = None,
        max_slice: float = MAX_SLICE,
        on_error: Callable[[BaseException, object], None] | None = None,
    ) -> None:
        from hub.pollers import Poller, create_poller

        environment = get_environment() if environment is None else environment
        if not isinstance(environment, Environment):
            raise UnknownEnvironmentError(
                f"{environment!r} is no Environment: give what get_environment() or use() returns"
            )
        for name, function in (("clock", clock), ("on_error", on_error)):
            check_callable(function, name, optional=True)
        check_seconds(max_slice, "max_slice")
        original = environment.original
        if not isinstance(poller, Poller):
            poller = create_poller(poller, original)
        elif poller.owned:
            raise BadArgumentError(
                f"{poller!r} serves another hub, and a poller has one owner: give its name, "
                f"{poller.name!r}, and this hub makes one of its own"
            )
        poller.owned = True
        super().__init__(
            environment, poller, clock or original("time", "monotonic"), max_slice, on_error
        )
        self._ident: Callable[[], int] = original("_thread", "get_ident")
        #: Native thread that may use the hub: None any, NOBODY none yet.
        self.thread: object = None
        #: Called with the hub when it ends.
        self.on_end: list[Callable[[Hub], None]] = []
        self._members: weakref.WeakValueDictionary[int, HubMember] = weakref.WeakValueDictionary()
        self._run_permit = original("_thread", "allocate_lock")()
        self._close_permit = original("_thread", "allocate_lock")()
        self._release_permit = original("_thread", "allocate_lock")()
        # Set when everybody has been told of the end: the last one out closes the poller.
        self._ended = False
        #: Whether a background owner runs the hub when nobody else does (set by get_hub()).
        self.background = False
        self._external = False
        self._cause = "it was closed"
        self._scratch: memoryview | None = None
        #: Looks after the tasks that wait for one descriptor each, once there are some.
        self.audit: Audit | None = None
        self.driver: Driver = self.environment.make_driver(self)
        _fork.join_forks(self)

    # -- queueing calls --------------------------------------------------------------
    def call_soon(self, callback: Callable[..., object], *args: Any) -> Handle:
        """Call `callback(*args)` in the next cycle; calls run in the order of queueing."""
        self._check()
        handle = Handle(callback, args)
        self._ready.append(handle)
        if not self.cycling:
            self._poke()
        return handle

    def at_turn_end(self, callback: Callable[[], object]) -> None:
        """Call `callback()` when the other tasks that are ready now have had their turn.

        In the hub's own thread, and under green threads; for what every turn of a busy program
        does, as it costs a fifth of a `call_soon`.  It cannot be cancelled, and must not raise.
        """
        if not callable(callback):
            raise BadArgumentError(f"cannot call {callback!r}: give a function without arguments")
        self._turn_ends.append(callback)
        if not self._turn_end_due:
            self._turn_end_due = True
            try:
                if self._external or not self.driver.call_after_turn(self._run_turn_ends):
                    self.call_soon(self._run_turn_ends)
            except BaseException:  # of a signal handler: the next one has to try again
                self._turn_end_due = False
                raise

    def _run_turn_ends(self) -> None:
        self._turn_end_due = False
        ends = self._turn_ends
        for _ in range(len(ends)):
            if not ends:
                return  # a callback closed the hub
            callback = ends.popleft()
            try:
                callback()
            except BaseException as error:
                if not self._passes(error):
                    self._report(error, callback)
                    continue
                # KeyboardInterrupt, on its way to the main program: the others have their turn yet.
                if ends:
                    self._turn_end_due = True
                    self.call_soon(self._run_turn_ends)
                raise

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> Handle:
        """Call `callback(*args)` in the hub soon; from any thread or signal handler.

        Lock-free: it never waits and never switches.
        """
        if self.closed:
            raise self._closed_error()
        handle = Handle(callback, args)
        self._ready.append(handle)
        if self.closed:  # by another thread, since the look above: nobody will call it
            raise self._closed_error()
        if self.thread != self._ident():
            self.wakeup()
        elif not self.cycling:
            self._poke()
        return handle

    def call_here(self, callback: Callable[[], object]) -> None:
        """Call `callback()` now if this is the hub's thread, else soon; from any thread.

        What it raises comes out of here in the first case, and goes to `on_error` in the second.
        """
        if self.thread == self._ident():
            callback()
        else:
            self.call_soon_threadsafe(callback)

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call `callback(*args)` once, `delay` seconds from now."""
        check_seconds(delay, "call_later")
        return self._add_timer(Timer(self._clock() + delay, callback, args))

    def call_at(self, when: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call `callback(*args)` once at `when`, on the clock of `time()`."""
        check_seconds(when, "call_at")
        return self._add_timer(Timer(when, callback, args))

    def call_repeatedly(
        self,
        interval: float,
        callback: Callable[..., object],
        *args: Any,
        tolerance: float = 0.0,
    ) -> Timer:
        """Call `callback(*args)` every `interval` seconds until the timer is cancelled.

        The times do not drift; those that a busy hub missed are left out.

        Args:
            interval: seconds, a nanosecond at least.
            tolerance: seconds by which all calls may be later, so that thousands of timers with
                one interval are due together, at a few times, and wake the hub as rarely.
        """
        check_seconds(interval, "call_repeatedly")
        check_seconds(tolerance, "the tolerance of call_repeatedly")
        if interval < SHORTEST_INTERVAL:
            raise BadArgumentError(
                f"call_repeatedly needs an interval above 0 seconds, not {interval!r}"
            )
        if not (tolerance <= 0 or SHORTEST_INTERVAL <= tolerance < math.inf):
            raise BadArgumentError(
                f"call_repeatedly needs a tolerance of 0 seconds or some, not {tolerance!r}"
            )
        due = self._clock() + interval
        if tolerance > 0 and due < math.inf:
            due = math.ceil(due / tolerance) * tolerance
        return self._add_timer(Timer(due, callback, args, interval))

    def _add_timer(self, timer: Timer) -> Timer:
        self._check()
        if self._entering is not None:
            self._entering.append(timer)
            return timer
        earliest = self._timers.next_due()
        self._timers.push(timer)
        if not self.cycling and (earliest is None or timer.due < earliest):
            if self._external:
                self.poller.set_timer(self._delay())
            elif self._runner is not None:
                self.driver.poke()
            else:
                self._start_background()
                self.driver.set_deadline(timer.due)
        return timer

    def run_threadsafe(
        self, function: Callable[..., Any], *args: Any, timeout: float | None = None
    ) -> Any:
        """Call `function(*args)` in the hub and wait for its result; from any task or thread.

        Raises:
            HubTimeoutError: it has not returned within `timeout` seconds; the call is taken back
                if it has not begun.
            HubClosedError: the hub was closed before it came to it.
            BlockingCallError: called from a hub callback.
        """
        if not callable(function):
            raise BadArgumentError(
                f"cannot call {function!r}: give a function, and its arguments behind it"
            )
        if timeout is not None:
            check_seconds(timeout, "the timeout of run_threadsafe")
        task = Task(self.environment, getattr(function, "__qualname__", repr(function)))
        handle = self.call_soon_threadsafe(task._run, function, args, {})
        try:
            if not task.join(timeout):
                raise HubTimeoutError(
                    f"{task.name} has not returned within {timeout} s: {self!r} {self._delays()}"
                )
            return task.result()
        finally:
            handle.cancel()

    def _delays(self) -> str:
        """Tell why the hub may not come to a call, and what to do about it."""
        if self._runner is not None or self.driver.running:
            return "is busy. Does a callback take long? Callbacks must be tiny and cannot wait"
        if self._external:
            return "is driven from outside: call run_once(0) whenever its fileno() is readable"
        return (
            "is run by nobody: call run_forever() in a task, or use get_hub(), whose hub is run in "
            "the background"
        )

    # -- running -----------------------------------------------------------------------
    def run_once(self, timeout: float | None = None) -> int:
        """Run one cycle, waiting at most `timeout` seconds (None: until something happens).

        It does not wait when it had something to call before.

        Returns:
            how many callbacks ran.

        Raises:
            HubRunningError: somebody runs the hub already.
        """
        if timeout is not None:
            check_seconds(timeout, "the timeout of run_once")
        self._enter()
        try:
            return self._cycle(timeout, once=True)
        finally:
            self._leave()

    def run_forever(self) -> None:
        """Run cycles in the calling task until `stop()`; other green tasks run in between.

        Raises:
            HubRunningError: somebody runs the hub already.
        """
        self._enter()
        try:
            while not self._stop and not self.closed:
                self._waited = False
                self._cycle(None)
                # Also when nothing is left but a timer that is always due.
                if not (self._stop or self.closed) and (self.has_work() or not self._waited):
                    self.driver.yield_turn()
        finally:
            self._stop = False
            self._leave()

    def stop(self) -> None:
        """Let `run_forever()` return after the cycle it is in; from any thread or signal.

        Called before, it lets the next `run_forever()` return at once.  It is not for the
        background owner: that one stops when the hub is closed.
        """
        if self.background and self._runner is None:
            return
        self._stop = True
        self.poller.wakeup()

    def fileno(self) -> int:
        """Return a descriptor that is readable when `run_once(0)` has something to do.

        From now on the hub is driven from outside: the background owner stands down for
        good.  Timers are included.

        Raises:
            UnsupportedError: the poller has no descriptor (poll, select).
        """
        if self.closed:
            raise self._closed_error()
        if self.environment.green:
            self._check()
        fd = self.poller.fileno()
        if not self._external:
            self._external = True
            if self.background:
                self.driver.stop(STOP_TIMEOUT)
            if not self.cycling:
                self.thread = None
            self.poller.set_timer(self._delay())
            if self.has_work():
                self.poller.wakeup()
        return fd

    def _enter(self) -> None:
        """Make the calling task the one that runs the hub."""
        if self.closed:
            raise self._closed_error()
        if self.environment.green:
            self._check()
        if self.cycling and self.thread == self._ident():
            raise self._running_error()
        if not self._run_permit.acquire(False):
            raise self._running_error()
        try:
            self._runner = self.environment.current()
            if self.background and not self.driver.stop(STOP_TIMEOUT):
                raise self._running_error()
            if self.closed:
                raise self._closed_error()
            self.thread = self._ident()
        except BaseException:
            self._let_go()
            raise

    def _leave(self) -> None:
        """The calling task no longer runs the hub."""
        if not self.environment.green:
            # Before the background owner may start, which enters its own name here.
            self.thread = self.NOBODY if self.background and not self._external else None
        if self._external and not self.closed:
            self.poller.set_timer(self._delay())
        self._let_go()

    def _let_go(self) -> None:
        self._runner = None
        self._run_permit.release()
        if self.closed:
            self.release()
        elif self._external:
            if self.has_work():
                self.poller.wakeup()
        elif self.background:
            self._give_to_background()

    def _give_to_background(self) -> None:
        """Let the background owner go on, if there is something to do."""
        self.driver.unpark()
        if self.environment.green:
            # In any case: other native threads can wake it, but they cannot start it.
            self._start_background()
            self.driver.set_deadline(self._timers.next_due())
        elif self.readers or self.writers or self._timers or self.has_work():
            self._start_background()

    def _running_error(self) -> HubRunningError:
        return HubRunningError(
            f"{self!r} is being run already and cannot be entered a second time. "
            "Queue work with call_soon() or call_soon_threadsafe() instead"
        )

    def _start_background(self) -> None:
        if self.background and not self._external and self._runner is None:
            self.driver.start()

    def ensure_running(self) -> None:
        """Start the background owner of a shared hub if nobody runs it."""
        if self._runner is None and not self.cycling:
            self._start_background()

    def run_background_cycle(self, timeout: float | None = 0, poll: bool = True) -> bool:
        """Run one cycle on behalf of the background owner; True if work is left."""
        if timeout == 0 and self._runner is None:
            self._turn(poll)
        else:
            self._cycle(timeout, poll)
        if self.closed:
            return False
        self.driver.set_deadline(self._timers.next_due())
        return self.has_work()

    # -- waking --------------------------------------------------------------------------
    def wakeup(self) -> None:
        """Make the hub run a cycle soon; from any thread, signal handler or finalizer."""
        if self._poked:
            return
        self._poked = True
        try:
            if self.background and not self._external and self._runner is None:
                self.driver.revive()
            self.poller.wakeup()
        except BaseException:
            # A signal handler raised in here: the next one must not rely on this wake-up.
            self._poked = False
            raise

    def _poke(self) -> None:
        """As wakeup(), from the hub's own thread."""
        if self._external:
            self.wakeup()
        else:
            self._start_background()
            self.driver.poke()

    # -- members and the end ---------------------------------------------------------------
    @property
    def members(self) -> list[HubMember]:
        """The streams and other members that live on this hub now."""
        found = [reference() for reference in self._members.valuerefs()]
        return [member for member in found if member is not None]

    def attach(self, member: HubMember) -> None:
        """Tell `member` (held weakly) when this hub ends."""
        self._members[id(member)] = member

    def detach(self, member: HubMember) -> None:
        """Undo `attach`."""
        self._members.pop(id(member), None)

    def reap(self, fd: int, close: Callable[[], object] | None = None) -> None:
        """Take `fd` out of the poller in the next cycle and close it.

        For finalizers: it appends to a deque and wakes the hub; no lock, no switch.

        Args:
            fd: the descriptor.
            close: what closes it, such as a socket's close(); None closes the number.
        """
        self._reaped.append((fd, close))
        if self.closed:
            self._close_reaped()
        else:
            self.wakeup()

    def _close_reaped(self) -> None:
        while self._reaped:
            fd, close = self._reaped.popleft()
            if not self.closed:
                self.remove(fd)
            try:
                if close is not None:
                    close()
                else:
                    self.environment.original("os", "close")(fd)
            except OSError:
                pass  # closed already, by whoever dropped it

    def close(self) -> None:
        """Stop, and give back the poller's descriptors; idempotent.

        Queued calls and timers are dropped; streams on this hub are aborted; a task that runs the
        hub, or waits for it, goes on.  Descriptors of callers stay open: they are theirs.

        Raises:
            ForeignThreadError: under gevent and eventlet, called in another native thread.
        """
        if self.closed:
            return
        if self.environment.green:
            self._check()
        self.shut_down()

    def shut_down(self) -> None:
        """As `close()`, for a hub whose native thread has ended."""
        if not self._close_permit.acquire(False):
            return
        self.closed = True
        # Else another native thread may be running it, which has to let go first.
        alone = self.environment.green or self.thread == self._ident()
        permit = False
        for timeout in (STOP_TIMEOUT, 0.0):
            if not alone:
                self.poller.wakeup()
                permit = permit or self._run_permit.acquire(True, timeout)
                alone = permit and (not self.background or self.driver.stop(timeout))
            if not self._ended:
                self._end("it was closed", forked=False)
                self._ended = True
        # If a callback blocks that thread, it releases what is left when it comes to it.
        if alone:
            self.release()

    def release(self) -> None:
        """Give back the descriptors of a hub that has ended; called by the last one to use it."""
        if self._ended and self._release_permit.acquire(False):
            self.driver.close()
            self._close_reaped()
            self.poller.close()

    def _end(self, cause: str, *, forked: bool) -> None:
        self.closed = True
        self._cause = cause
        for forget in self.on_end:
            forget(self)
        error = self._closed_error()
        for handle in list(self._ready):
            task = getattr(handle.callback, "__self__", None)
            if isinstance(task, Task):
                task.give_up(error)  # somebody waits for it in run_threadsafe()
        for member in self.members:
            try:
                member.hub_gone(error, forked)
            except Exception as failure:
                self._report(failure, member)
        self._members.clear()
        self.readers.clear()
        self.writers.clear()
        self._ready.clear()
        self._turn_ends.clear()
        self._reported.clear()
        self._timers.clear()
        if not forked:
            self._start_logging()

    def _closed_error(self) -> HubClosedError:
        return HubClosedError(
            f"this hub cannot be used: {self._cause}. get_hub() returns a working one"
        )

    # -- forks (hub._fork) -------------------------------------------------------------------
    def before_fork(self) -> None:
        """Park the background thread, so that no lock is copied in a held state."""
        self.environment.before_fork()
        if self._runs_in_background_thread():
            self.driver.stop(STOP_TIMEOUT)

    def after_fork_in_parent(self) -> None:
        """Go on as before."""
        if self._runs_in_background_thread():
            self._give_to_background()

    def _runs_in_background_thread(self) -> bool:
        return (
            self.background
            and not (self.closed or self._external or self.environment.green)
            and self._runner is None
        )

    def after_fork_in_child(self) -> None:
        """Let go of everything without touching the parent's kernel objects."""
        if self.closed:
            return
        self.driver.abandon()
        self.poller.abandon()
        self._end("it was made before os.fork(), in the parent process", forked=True)
        self._close_reaped()
        self.cycling = False
        self._runner = None

    # -- checks ------------------------------------------------------------------------------
    def _check(self) -> None:
        """Raise unless the caller may use the hub."""
        if self.closed:
            raise self._closed_error()
        thread = self.thread
        if thread is not None and thread != self._ident():
            raise ForeignThreadError(
                f"{self!r} belongs to another native thread: use call_soon_threadsafe() "
                "or run_threadsafe(), which may be called from anywhere"
            )

    def time(self) -> float:
        """Return the hub's monotonic time in seconds."""
        return self._clock()

    def in_hub_thread(self) -> bool:
        """Tell whether the caller may use this hub directly, without call_soon_threadsafe()."""
        return self.thread == self._ident()

    def scratch(self) -> memoryview:
        """Return the buffer that all streams of this hub read into, one at a time.

        One per hub: a buffer per connection is what makes thousands of idle ones expensive.
        """
        if self._scratch is None:
            bytes(KEPT_HEAP)
            self._scratch = memoryview(bytearray(SCRATCH_SIZE))
        return self._scratch

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            state = "closed"
        elif self._runner is not None:
            state = "run by a task"
        elif self._external:
            state = "driven from outside"
        elif self.driver.running:
            state = "running"
        else:
            state = "idle"
        return (
            f"<Hub {self.environment.name}/{self.poller.name} {state}: "
            f"{len(self.readers)} readers, {len(self.writers)} writers, "
            f"{len(self._timers)} timers, {len(self._ready)} ready>"
        )
