"""What a hub does when callbacks misbehave, threads race, and things end at a bad moment.

The contract suite (tests/contract/test_hubs.py) covers what a hub is for; here are the corners.
"""

from __future__ import annotations

import gc
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub._default import start_native_thread
from hub.environment import Environment
from hub.pollers import READ
from hub.testing import FakeClock, ScriptedPoller, scripted_hub
from tests.support.sockets import native_pair

pytestmark = pytest.mark.green_matrix


@pytest.fixture
def shared() -> Iterator[hub.Hub]:
    """The shared hub, known to turn."""
    loop = hub.get_hub()
    loop.run_threadsafe(int, timeout=10)
    yield loop
    if not loop.closed:
        loop.run_threadsafe(int, timeout=10)


@pytest.fixture
def own() -> Iterator[hub.Hub]:
    """A hub that nobody runs yet."""
    loop = hub.Hub()
    yield loop
    if not loop.closed:
        loop.close()


@pytest.fixture
def pair(env: Environment) -> Iterator[tuple[Any, Any]]:
    ours, theirs = native_pair(env)
    yield ours, theirs
    ours.close()
    theirs.close()


def native(env: Environment, function: Callable[..., object], *args: Any) -> None:
    """Run `function` in a native thread, one that debuggers and coverage see."""
    start_native_thread(env, lambda: function(*args))


def settled(env: Environment, condition: Callable[[], object], seconds: float = 10) -> bool:
    """Wait until `condition()`; False if it does not come."""
    for _ in range(int(seconds * 200)):
        if condition():
            return True
        env.sleep(0.005)
    return bool(condition())


# -- wake-ups -----------------------------------------------------------------------------


def test_wake_up_that_arrives_during_a_cycle_does_not_hide_the_next_one(
    shared: hub.Hub, env: Environment
) -> None:
    """A call queued while callbacks run must not make later calls from threads unheard."""
    for _ in range(20):
        inside = env.original("_thread", "allocate_lock")()
        inside.acquire()
        queued = env.original("_thread", "allocate_lock")()
        queued.acquire()
        both = env.waiter()
        late = env.waiter()

        def hold(inside: Any = inside, queued: Any = queued) -> None:
            inside.release()
            queued.acquire()

        def first(inside: Any = inside, queued: Any = queued, both: Any = both) -> None:
            inside.acquire()
            shared.call_soon_threadsafe(both.wake)
            queued.release()

        native(env, first)
        shared.call_soon_threadsafe(hold)
        assert both.wait(10)
        env.sleep(0.01)  # everything has been served: the hub waits
        native(env, shared.call_soon_threadsafe, late.wake)
        assert late.wait(5)


def test_wake_up_after_an_exception_in_a_wake_up(shared: hub.Hub, env: Environment) -> None:
    """A signal handler may raise anywhere, also inside of wakeup()."""
    wakeup = shared.poller.wakeup

    def interrupted() -> None:
        shared.poller.wakeup = wakeup  # type: ignore[method-assign]
        raise KeyboardInterrupt

    waiter = env.waiter()
    failed: list[BaseException] = []
    done = env.waiter()

    def elsewhere() -> None:
        shared.poller.wakeup = interrupted  # type: ignore[method-assign]
        try:
            shared.call_soon_threadsafe(int)
        except KeyboardInterrupt as error:
            failed.append(error)
        shared.call_soon_threadsafe(waiter.wake)
        done.wake()

    try:
        native(env, elsewhere)
        assert waiter.wait(5)
        assert done.wait(5)
    finally:
        shared.poller.wakeup = wakeup  # type: ignore[method-assign]
    assert len(failed) == 1


def test_stop_of_a_hub_that_nobody_runs_does_not_make_it_spin(
    shared: hub.Hub, env: Environment
) -> None:
    shared.stop()
    env.sleep(0.05)
    before = shared.stats.cycles
    env.sleep(0.2)
    assert shared.stats.cycles - before < 20
    assert shared.run_threadsafe(lambda: 7, timeout=10) == 7


def test_no_call_is_lost_while_the_owner_changes(shared: hub.Hub, env: Environment) -> None:
    """The background owner is taken away again and again while threads call in."""
    seen: list[int] = []
    done = env.waiter()
    total = 4 * 300

    def append(number: int) -> None:
        seen.append(number)
        if len(seen) == total:
            done.wake()

    pause = env.original("time", "sleep")

    def calls(first: int) -> None:
        for number in range(first, first + 300):
            shared.call_soon_threadsafe(append, number)
            pause(0.0002)

    for first in range(0, total, 300):
        native(env, calls, first)
    for _ in range(30):
        shared.before_fork()
        shared.after_fork_in_parent()
        shared.run_once(0)
        env.sleep(0.001)
    assert done.wait(20), len(seen)
    assert len(set(seen)) == total


def test_running_a_shared_hub_for_a_moment_gives_it_back(
    shared: hub.Hub, env: Environment, pair: Any
) -> None:
    inbox = env.waiter()
    shared.run_threadsafe(
        shared.add_reader, pair[0].fileno(), lambda: (pair[0].recv(9), inbox.wake()), timeout=10
    )
    for _ in range(50):
        shared.run_once(0)
    pair[1].send(b"x")
    assert inbox.wait(10)
    shared.run_threadsafe(shared.remove, pair[0].fileno(), timeout=10)


# -- callbacks ----------------------------------------------------------------------------


def test_callback_may_close_its_own_hub(own: hub.Hub, env: Environment, pair: Any) -> None:
    seen: list[int] = []
    own.call_soon(own.close)
    own.call_soon(seen.append, 1)
    own.call_later(0, seen.append, 2)
    own.add_reader(pair[0].fileno(), seen.append, 3)
    pair[1].send(b"x")
    own.run_once(0)
    assert own.closed
    assert seen == []


def test_reader_may_close_its_own_hub(own: hub.Hub, pair: Any) -> None:
    own.add_reader(pair[0].fileno(), own.close)
    own.call_later(0.001, int)
    pair[1].send(b"x")
    own.run_once(5)
    own.closed or own.run_once(5)
    assert own.closed


def test_timer_may_close_its_own_hub(own: hub.Hub) -> None:
    timer = own.call_repeatedly(0.001, own.close)
    own.run_forever()
    assert own.closed
    assert timer.cancelled


def test_callback_may_run_another_hub_for_a_moment(own: hub.Hub, env: Environment) -> None:
    with hub.Hub() as other:
        seen: list[str] = []
        other.call_soon(seen.append, "other")
        errors: list[BaseException] = []
        own.on_error = lambda error, _: errors.append(error)

        def nest() -> None:
            other.run_once(0)
            try:
                env.waiter().wait(1)
            except hub.BlockingCallError:
                seen.append("refused")
            try:
                other.run_once(1)
            except hub.BlockingCallError:
                seen.append("refused")

        own.call_soon(nest)
        own.call_later(0.001, seen.append, "own")
        own.run_once(1)
        own.run_once(1)
        assert seen == ["other", "refused", "refused", "own"]
        assert errors == []
        assert env.waiter().wait(0.001) is False, "this task may wait again"


def test_interrupted_timer_callback_loses_no_repeated_timer() -> None:
    """KeyboardInterrupt leaves through the loop; heartbeats go on when it is run again."""
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[str] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    loop.call_repeatedly(1.0, seen.append, "heartbeat")
    loop.call_later(1.0, interrupt)
    loop.call_later(1.0, seen.append, "other")
    with pytest.raises(KeyboardInterrupt):
        loop.run_once(10)
    for _ in range(3):
        loop.run_once(10)
    assert seen.count("heartbeat") >= 3
    assert seen.count("other") == 1
    loop.close()


def test_timer_that_sets_itself_again_at_once_holds_up_nobody() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[str] = []
    runs = [0]

    def again() -> None:
        runs[0] += 1
        if runs[0] < 100:
            loop.call_at(clock() - 1, again)

    loop.call_later(0, again)
    loop.call_later(0, seen.append, "timer")
    loop.call_soon(seen.append, "call")
    loop.run_once(0)
    assert seen == ["call", "timer"]
    assert runs[0] == 1
    loop.close()


def test_due_timers_end_with_the_slice() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[int] = []

    def slow(number: int) -> None:
        seen.append(number)
        clock.advance(0.002)

    for number in range(20):
        loop.call_later(0, slow, number)
    loop.run_once(0)
    assert 1 < len(seen) < 20
    while len(seen) < 20:
        loop.run_once(0)
    assert seen == list(range(20))
    assert loop.stats.largest_slice < 0.01
    loop.close()


def test_timers_that_are_always_due_leave_the_other_tasks_their_turn(
    own: hub.Hub, env: Environment, ticker: Any
) -> None:
    def busy() -> None:
        end = own.time() + 0.0005
        while own.time() < end:
            pass
        if ticker.ticks > 10:
            own.stop()

    ticker.reset()
    own.call_repeatedly(1e-6, busy)
    own.call_later(10, own.stop)
    task = env.spawn(own.run_forever)
    assert task.join(20)
    assert ticker.ticks > 10


def test_cancelled_timer_lets_go_of_its_arguments(own: hub.Hub) -> None:
    class Owner:
        pass

    owner = Owner()
    gone = weakref.ref(owner)
    timer = own.call_later(3600, print, owner)
    handle = own.call_soon(print, owner)
    timer.cancel()
    handle.cancel()
    del owner
    gc.collect()
    assert gone() is None
    own.run_once(0)


@pytest.mark.parametrize("delay", [float("nan")])
def test_a_time_that_is_no_number_is_refused(own: hub.Hub, delay: float) -> None:
    with pytest.raises(ValueError, match="seconds"):
        own.call_later(delay, int)
    with pytest.raises(ValueError, match="seconds"):
        own.call_at(delay, int)
    with pytest.raises(ValueError, match="seconds"):
        own.call_repeatedly(delay, int)


def test_timer_in_the_far_future_is_no_error(shared: hub.Hub) -> None:
    for delay in (1e6, 1e12, float("inf")):
        timer = shared.run_threadsafe(shared.call_later, delay, int, timeout=10)
        shared.run_threadsafe(int, timeout=10)
        timer.cancel()


# -- ends ---------------------------------------------------------------------------------


def test_close_ends_run_forever_of_another_task(own: hub.Hub, env: Environment) -> None:
    task = env.spawn(own.run_forever)
    assert settled(env, lambda: own.stats.cycles or "run by" in repr(own))
    env.sleep(0.01)
    own.close()
    assert task.join(5)
    task.result()
    assert own.closed


def test_close_ends_run_once_of_another_task(own: hub.Hub, env: Environment) -> None:
    task = env.spawn(own.run_once, 30)
    assert settled(env, lambda: "run by" in repr(own))
    env.sleep(0.01)
    own.close()
    assert task.join(5)
    assert task.result() == 0


def test_close_while_a_task_waits_for_a_result(own: hub.Hub, env: Environment) -> None:
    task = env.spawn(own.run_threadsafe, int)
    env.sleep(0.02)
    own.close()
    assert task.join(5)
    with pytest.raises(hub.HubClosedError, match="closed"):
        task.result()


def test_close_while_a_task_waits_for_a_descriptor(env: Environment, pair: Any) -> None:
    loop = hub.get_hub()
    task = env.spawn(env.wait_readable, pair[0].fileno())
    assert settled(env, lambda: pair[0].fileno() in loop.readers)
    loop.close()
    assert task.join(5)
    with pytest.raises(hub.HubClosedError):
        task.result()
    assert hub.get_hub() is not loop
    assert hub.get_hub().run_threadsafe(lambda: 7, timeout=10) == 7


def test_green_hub_is_not_closed_by_another_thread(own: hub.Hub, env: Environment) -> None:
    own.run_once(0)
    outcome: list[BaseException | None] = []
    done = env.waiter()

    def elsewhere() -> None:
        try:
            own.close()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)
        done.wake()

    native(env, elsewhere)
    assert done.wait(10)
    if env.green:
        assert isinstance(outcome[0], hub.ForeignThreadError)
        assert not own.closed
    else:
        assert outcome == [None]
        assert own.closed


def test_member_that_fails_does_not_keep_a_hub_from_closing(own: hub.Hub) -> None:
    told: list[int] = []

    class Member:
        def __init__(self, number: int) -> None:
            self.number = number

        def hub_gone(self, error: hub.HubError, forked: bool) -> None:
            told.append(self.number)
            raise RuntimeError(f"member {self.number}")

        def flush_at_exit(self, deadline: float) -> None: ...

    members = [Member(0), Member(1)]
    for member in members:
        own.attach(member)
    errors: list[BaseException] = []
    own.on_error = lambda error, _: errors.append(error)
    own.close()
    assert sorted(told) == [0, 1]
    assert len(errors) == 2
    assert own.poller.closed


def test_hub_of_a_stuck_callback_goes_on_after_a_refused_run(
    shared: hub.Hub, env: Environment, pair: Any
) -> None:
    """run_once() gives up when a callback blocks the owner; the owner must not be lost then."""
    if env.green:
        pytest.skip("a callback that blocks its native thread blocks this one as well")
    free = env.original("_thread", "allocate_lock")()
    free.acquire()
    inbox = env.waiter()
    shared.run_threadsafe(
        shared.add_reader, pair[0].fileno(), lambda: (pair[0].recv(9), inbox.wake()), timeout=10
    )
    began = env.waiter()
    shared.call_soon_threadsafe(lambda: (began.wake(), free.acquire()))
    assert began.wait(10)
    with pytest.raises(hub.HubRunningError, match="being run already"):
        shared.run_once(0)
    free.release()
    env.sleep(0.05)
    pair[1].send(b"x")
    assert inbox.wait(5)
    shared.run_threadsafe(shared.remove, pair[0].fileno(), timeout=10)


def test_descriptor_that_cannot_be_armed_is_an_error_that_passes(
    own: hub.Hub, env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No descriptor may be left when the owner starts; the next use has to try again."""
    if not env.green:
        pytest.skip("a native thread waits in the poller itself")
    own.background = True

    def fail() -> int:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(own.poller, "fileno", fail)
        with pytest.raises(OSError, match="Too many"):
            own.call_soon(int)
    waiter = env.waiter()
    own.call_soon(waiter.wake)
    assert waiter.wait(5)


def test_left_over_work_of_finalizers_is_done_by_the_hub(shared: hub.Hub, env: Environment) -> None:
    from hub import finalize

    waiter = env.waiter()
    finalize._left_over.append((waiter.wake, ()))
    shared.run_threadsafe(int, timeout=10)
    shared.run_threadsafe(int, timeout=10)
    assert waiter.woken


def test_background_goes_on_after_a_callback_that_exits(shared: hub.Hub, env: Environment) -> None:
    """SystemExit is not the hub's to keep: it passes, and the hub is there afterwards."""
    if env.green:
        pytest.skip("the green library throws it into the main greenlet, which is this test")

    def leave() -> None:
        raise SystemExit

    shared.call_soon_threadsafe(leave)
    assert shared.run_threadsafe(lambda: 7, timeout=10) == 7


def test_scripted_wakeup_and_reports_are_limited_by_interest() -> None:
    loop = scripted_hub(FakeClock())
    poller = loop.poller
    assert isinstance(poller, ScriptedPoller)
    seen: list[int] = []
    for fd in range(3):
        loop.add_reader(fd, seen.append, fd)
    poller.report(*((fd, READ) for fd in range(5)))
    assert poller.poll(0, 2) == [(0, READ), (1, READ)]
    assert poller.poll(0, 2) == [(2, READ)]
    loop.close()


def test_signal_handler_that_stops_the_hub(own: hub.Hub, env: Environment) -> None:
    if not env.green:
        pytest.skip("run_forever() in the main thread is interrupted by the poller's wake-up alone")
    old = signal.signal(signal.SIGUSR1, lambda *_: own.stop())
    try:
        timer = env.original("_thread", "start_new_thread")
        import os

        pause = env.original("time", "sleep")
        timer(lambda: (pause(0.1), os.kill(os.getpid(), signal.SIGUSR1)), ())
        task = env.spawn(own.run_forever)
        assert task.join(10)
    finally:
        signal.signal(signal.SIGUSR1, old)


def test_interrupted_end_of_a_turn_keeps_the_others(own: hub.Hub) -> None:
    seen: list[int] = []

    def interrupt() -> None:
        raise KeyboardInterrupt

    own.call_soon(own.at_turn_end, interrupt)
    own.call_soon(own.at_turn_end, lambda: seen.append(1))
    own.call_soon(own.at_turn_end, lambda: 1 / 0)
    own.call_soon(own.at_turn_end, own.close)
    own.call_soon(own.at_turn_end, lambda: seen.append(2))
    errors: list[BaseException] = []
    own.on_error = lambda error, _: errors.append(error)
    own.run_once(0)
    with pytest.raises(KeyboardInterrupt):
        own.run_once(0)
    own.run_once(0)
    assert own.closed
    assert seen == [1]
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_end_of_a_turn_comes_behind_the_tasks_that_are_ready(
    shared: hub.Hub, env: Environment
) -> None:
    if not env.green:
        pytest.skip("native threads have no turns")
    seen: list[str] = []
    env.spawn(seen.append, "first task")
    shared.at_turn_end(lambda: seen.append("end"))
    assert seen == []
    assert settled(env, lambda: "end" in seen)
    assert seen == ["first task", "end"]


def test_timers_with_a_tolerance_fall_together_and_are_never_early() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[float] = []
    begun = clock.now
    for _ in range(5):
        clock.advance(0.02)
        loop.call_repeatedly(1.0, lambda: seen.append(clock.now), tolerance=0.25)
    while len(seen) < 10:
        loop.run_once(10)
    first, second = seen[:5], seen[5:]
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] >= begun + 5 * 0.02 + 1.0
    assert first[0] <= begun + 0.02 + 1.0 + 0.25
    assert second[0] == pytest.approx(first[0] + 1.0)
    loop.close()
