"""Locks, semaphores, events, conditions and queues, in every environment."""

from __future__ import annotations

import gc
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub import primitives
from hub.environment import Environment, Task
from hub.errors import BlockingCallError
from tests.support.tasks import LONG, in_child, run_natively, until

pytestmark = pytest.mark.green_matrix


def waiting(thing: object, count: int) -> Callable[[], bool]:
    """Tell by its repr that `count` tasks wait for `thing`."""
    return lambda: f"{count} waiting" in repr(thing)


def park(env: Environment, thing: Any, count: int, function: Callable[..., Any]) -> list[Task]:
    """Start `count` tasks that wait for `thing`, one after the other."""
    before = int(repr(thing).split(" waiting")[0].rsplit(" ", 1)[1])
    tasks = []
    for index in range(count):
        tasks.append(env.spawn(function, index))
        until(env, waiting(thing, before + index + 1))
    return tasks


@pytest.fixture
def green(env: Environment) -> Environment:
    if not env.green:
        pytest.skip("native threads cannot be killed")
    return env


@pytest.fixture
def threads(env: Environment) -> Environment:
    if env.green:
        pytest.skip("concerns native threads only")
    return env


@pytest.fixture
def alarm(threads: Environment) -> Iterator[Callable[[float, Callable[[], object]], None]]:
    """Run something in a signal handler of this thread after some seconds."""
    before = signal.getsignal(signal.SIGALRM)

    def arm(seconds: float, action: Callable[[], object]) -> None:
        signal.signal(signal.SIGALRM, lambda *_: action())
        signal.setitimer(signal.ITIMER_REAL, seconds)

    yield arm
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


EXCLUSIVE = [primitives.Lock, primitives.RLock, primitives.Semaphore, primitives.BoundedSemaphore]


@pytest.fixture(params=EXCLUSIVE, ids=lambda kind: kind.__name__)
def lock(request: pytest.FixtureRequest) -> Any:
    """Anything that lets one task in at a time."""
    return request.param()


class Raised(Exception):
    """Raised by a signal handler."""


def raise_it() -> None:
    raise Raised


# -- what all locks promise ------------------------------------------------------------------
def test_only_one_task_at_a_time_is_inside(env: Environment, lock: Any) -> None:
    inside = 0
    most = 0
    counter = 0

    def work() -> None:
        nonlocal inside, most, counter
        for _ in range(20):
            with lock:
                inside += 1
                most = max(most, inside)
                seen = counter
                env.sleep(0)
                counter = seen + 1
                inside -= 1

    tasks = [env.spawn(work) for _ in range(8)]
    for task in tasks:
        task.result(LONG)
    assert most == 1
    assert counter == 160


def test_the_lock_goes_to_who_has_waited_longest(env: Environment, lock: Any) -> None:
    order: list[int] = []

    def work(index: int) -> None:
        with lock:
            order.append(index)

    lock.acquire()
    tasks = park(env, lock, 6, work)
    lock.release()
    for task in tasks:
        task.result(LONG)
    assert order == [0, 1, 2, 3, 4, 5]


def test_a_loop_that_takes_the_lock_again_does_not_pass_the_queue(
    env: Environment, lock: Any
) -> None:
    served: list[str] = []

    def wait(index: int) -> None:
        with lock:
            served.append("waiter")

    lock.acquire()
    tasks = park(env, lock, 2, wait)
    for _ in range(4):
        lock.release()
        assert lock.acquire(timeout=LONG)
        served.append("loop")
    lock.release()
    for task in tasks:
        task.result(LONG)
    # Both were in the queue before the loop came back for the first time.
    assert served == ["waiter", "waiter", "loop", "loop", "loop", "loop"]


def test_a_free_lock_is_not_taken_past_a_waiter_that_has_been_chosen(
    env: Environment, lock: Any
) -> None:
    taken: list[int] = []

    def take(index: int) -> None:
        with lock:
            taken.append(index)

    lock.acquire()
    (task,) = park(env, lock, 1, take)
    lock.release()
    # Under green threads the waiter has not run yet: the lock is its own all the same.
    if env.green:
        assert not lock.acquire(blocking=False)
    task.result(LONG)
    assert taken == [0]
    assert lock.acquire(blocking=False)
    lock.release()


@pytest.mark.parametrize("arguments", [{"blocking": False}, {"timeout": 0}, {"timeout": 0.02}])
def test_acquire_gives_up(env: Environment, lock: Any, arguments: dict[str, Any]) -> None:
    lock.acquire()
    assert env.spawn(lock.acquire, **arguments).result(LONG) is False
    lock.release()
    assert lock.acquire(blocking=False) is True
    lock.release()


def test_a_timeout_that_has_passed_leaves_the_lock_to_the_others(
    env: Environment, lock: Any
) -> None:
    lock.acquire()
    (patient,) = park(env, lock, 1, lambda _: lock.acquire(timeout=LONG) and lock.release())
    assert env.spawn(lock.acquire, timeout=0.02).result(LONG) is False
    lock.release()
    patient.result(LONG)
    assert lock.acquire(timeout=0)


def test_none_waits_for_ever_like_minus_one(env: Environment) -> None:
    lock = primitives.Lock()
    assert lock.acquire(timeout=None)
    tasks = park(env, lock, 1, lambda _: lock.acquire(timeout=None))
    lock.release()
    assert tasks[0].result(LONG) is True


def test_a_wait_in_a_hub_callback_is_refused_and_changes_nothing(
    env: Environment, lock: Any
) -> None:
    with lock:
        with pytest.raises(BlockingCallError):
            hub.get_hub().run_threadsafe(lock.acquire, timeout=LONG)
        assert waiting(lock, 0)()
    assert hub.get_hub().run_threadsafe(lock.acquire, False, timeout=LONG) is True


@pytest.mark.parametrize("kind", [primitives.Lock, primitives.Semaphore])
def test_release_may_come_from_a_hub_callback_a_thread_or_a_finalizer(
    env: Environment, kind: type[Any]
) -> None:
    lock = kind()

    class Dropped:
        def __del__(self) -> None:
            lock.release()

    def drop() -> None:
        cycle: list[Any] = [Dropped()]
        cycle.append(cycle)
        del cycle
        gc.collect()

    releases: list[Callable[[], object]] = [
        lambda: hub.get_hub().call_soon_threadsafe(lock.release),
        lambda: run_natively(env, lock.release),
        drop,
    ]
    for release in releases:
        lock.acquire()
        (task,) = park(env, lock, 1, lambda _: lock.acquire(timeout=LONG))
        release()
        assert task.result(LONG) is True
        lock.release()


def test_release_in_a_signal_handler_wakes_the_interrupted_task(
    threads: Environment, alarm: Any
) -> None:
    lock = primitives.Lock()
    lock.acquire()
    alarm(0.05, lock.release)
    assert lock.acquire(timeout=LONG)


def test_an_exception_of_a_signal_handler_leaves_the_lock_in_order(
    threads: Environment, alarm: Any, lock: Any
) -> None:
    lock.acquire()
    taker = primitives.Event()
    holder = threads.spawn(lambda: (lock.acquire(timeout=LONG), taker.wait(LONG), lock.release()))
    until(threads, waiting(lock, 1))
    lock.release()
    until(threads, waiting(lock, 0))
    alarm(0.05, raise_it)
    with pytest.raises(Raised):
        lock.acquire(timeout=LONG)
    assert waiting(lock, 0)()
    taker.set()
    holder.result(LONG)
    assert lock.acquire(timeout=LONG)


# -- kills and Timeouts ------------------------------------------------------------------------
def test_a_killed_waiter_leaves_the_queue(green: Environment, lock: Any) -> None:
    lock.acquire()
    first, second = park(green, lock, 2, lambda _: lock.acquire(timeout=LONG))
    first.kill()
    first.join(LONG)
    assert waiting(lock, 1)()
    lock.release()
    assert second.result(LONG) is True
    assert not lock.acquire(blocking=False)


def test_a_kill_after_the_lock_was_handed_over_passes_it_on(green: Environment, lock: Any) -> None:
    lock.acquire()
    first, second = park(green, lock, 2, lambda _: lock.acquire(timeout=LONG))
    first.kill()  # arrives when this task waits, and that is after the release
    lock.release()
    assert second.result(LONG) is True
    with pytest.raises(green.timeout_types):
        first.result(LONG)
    assert not lock.acquire(blocking=False)


def test_a_kill_after_the_lock_was_handed_over_makes_it_free(green: Environment, lock: Any) -> None:
    lock.acquire()
    (only,) = park(green, lock, 1, lambda _: lock.acquire(timeout=LONG))
    only.kill()
    lock.release()
    only.join(LONG)
    assert lock.acquire(blocking=False)


def test_the_timeout_of_the_environment_interrupts_a_wait(green: Environment, lock: Any) -> None:
    lock.acquire()

    def wait() -> None:
        with green.timeout(0.02):
            lock.acquire()

    with pytest.raises(green.timeout_types):
        green.spawn(wait).result(LONG)
    assert waiting(lock, 0)()
    lock.release()
    assert lock.acquire(blocking=False)


def test_random_kills_conserve_the_permits(green: Environment) -> None:
    semaphore = primitives.Semaphore(3)
    tasks: list[Task] = []

    def work(index: int) -> None:
        with semaphore:
            green.sleep(0.0005 * (index % 3))

    for round_ in range(10):
        tasks += [green.spawn(work, index) for index in range(30)]
        for victim in tasks[round_::4]:
            victim.kill()
        green.sleep(0)
    for task in tasks:
        assert task.join(LONG)
    assert semaphore.value == 3
    assert waiting(semaphore, 0)()


# -- Lock --------------------------------------------------------------------------------------
def test_lock_refuses_what_threading_refuses() -> None:
    lock = primitives.Lock()
    with pytest.raises(RuntimeError, match="release unlocked lock"):
        lock.release()
    with pytest.raises(ValueError, match="non-blocking"):
        lock.acquire(False, 1)
    with pytest.raises(ValueError, match="non-negative"):
        lock.acquire(True, -2)
    assert not lock.locked()


def test_lock_is_released_when_the_block_raises() -> None:
    lock = primitives.Lock()
    with pytest.raises(Raised), lock:
        raise_it()
    assert not lock.locked()
    assert repr(lock).startswith("<Lock unlocked, 0 waiting")


def test_two_releases_at_once_unlock_once(threads: Environment) -> None:
    lock = primitives.Lock()
    for _ in range(50):
        lock.acquire()
        outcomes: list[bool] = []

        def release(outcomes: list[bool] = outcomes) -> None:
            try:
                lock.release()
            except RuntimeError:
                outcomes.append(False)
            else:
                outcomes.append(True)

        for task in [threads.spawn(release) for _ in range(2)]:
            task.result(LONG)
        assert sorted(outcomes) == [False, True]


# -- RLock -------------------------------------------------------------------------------------
def test_rlock_belongs_to_a_task_and_counts(env: Environment) -> None:
    lock = primitives.RLock()
    assert lock.acquire()
    assert lock.acquire(False)
    assert lock.acquire(timeout=1)
    assert env.spawn(lock.acquire, False).result(LONG) is False
    with pytest.raises(RuntimeError, match="un-acquired"):
        env.spawn(lock.release).result(LONG)
    for _ in range(3):
        assert lock.locked()
        lock.release()
    assert not lock.locked()
    with pytest.raises(RuntimeError, match="un-acquired"):
        lock.release()
    with pytest.raises(ValueError, match="non-blocking"):
        lock.acquire(False, 1)
    assert env.spawn(lock.acquire, False).result(LONG) is True
    assert "locked" in repr(lock)


def test_rlock_refuses_a_bad_timeout_also_when_it_is_held() -> None:
    lock = primitives.RLock()
    with lock, pytest.raises(ValueError, match="non-negative"):
        lock.acquire(timeout=-3)


def test_rlock_is_handed_over_by_the_last_release_only(env: Environment) -> None:
    lock = primitives.RLock()
    lock.acquire()
    lock.acquire()
    (task,) = park(env, lock, 1, lambda _: lock.acquire(timeout=LONG))
    lock.release()
    env.sleep(0.01)
    assert not task.done
    lock.release()
    assert task.result(LONG) is True


# -- Semaphore ---------------------------------------------------------------------------------
def test_semaphore_has_as_many_permits_as_it_was_given() -> None:
    semaphore = primitives.Semaphore(3)
    assert [semaphore.acquire(blocking=False) for _ in range(4)] == [True, True, True, False]
    semaphore.release(2)
    assert semaphore.value == 2
    assert semaphore.acquire(timeout=0)
    semaphore.release()
    assert semaphore.value == 2
    assert "2 free, 0 waiting" in repr(semaphore)


def test_a_huge_semaphore_costs_nothing() -> None:
    semaphore = primitives.Semaphore(10**15)
    assert semaphore.acquire()
    assert semaphore.value == 10**15 - 1


def test_semaphore_refuses_what_threading_refuses() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        primitives.Semaphore(-1)
    semaphore = primitives.Semaphore(0)
    with pytest.raises(ValueError, match="one or more"):
        semaphore.release(0)
    with pytest.raises(ValueError, match="non-blocking"):
        semaphore.acquire(False, 1)
    assert semaphore.acquire(timeout=-1) is False


def test_one_release_of_several_permits_serves_as_many(env: Environment) -> None:
    semaphore = primitives.Semaphore(0)
    tasks = park(env, semaphore, 4, lambda _: semaphore.acquire(timeout=LONG))
    semaphore.release(3)
    for task in tasks[:3]:
        assert task.result(LONG) is True
    assert not tasks[3].done
    semaphore.release()
    assert tasks[3].result(LONG) is True


def test_bounded_semaphore_refuses_too_many_releases() -> None:
    semaphore = primitives.BoundedSemaphore(2)
    semaphore.acquire()
    with pytest.raises(ValueError, match="too many"):
        semaphore.release(2)
    assert semaphore.value == 1
    semaphore.release()
    with pytest.raises(ValueError, match="too many"):
        semaphore.release()
    with pytest.raises(ValueError, match="one or more"):
        semaphore.release(0)
    assert semaphore.value == 2


def test_threads_conserve_permits(threads: Environment) -> None:
    semaphore = primitives.Semaphore(3)
    inside: set[int] = set()
    most: list[int] = []

    def work(index: int) -> None:
        for _ in range(300):
            if semaphore.acquire(timeout=0.001 if index % 2 else LONG):
                inside.add(index)
                most.append(len(inside))
                inside.discard(index)
                semaphore.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for task in [threads.spawn(work, index) for index in range(8)]:
            task.result(LONG)
    finally:
        sys.setswitchinterval(interval)
    assert max(most) <= 3
    assert semaphore.value == 3
    assert waiting(semaphore, 0)()


# -- Event -------------------------------------------------------------------------------------
def test_event_wakes_everybody_and_stays_set(env: Environment) -> None:
    event = primitives.Event()
    assert not event.is_set()
    assert event.wait(0) is False
    assert event.wait(-1) is False
    assert event.wait(0.01) is False
    tasks = park(env, event, 5, lambda _: event.wait(LONG))
    event.set()
    assert [task.result(LONG) for task in tasks] == [True] * 5
    assert event.is_set()
    assert event.wait() is True
    event.clear()
    assert event.wait(0) is False
    assert repr(event).startswith("<Event unset, 0 waiting")


def test_event_that_is_cleared_at_once_has_woken_who_waited(env: Environment) -> None:
    event = primitives.Event()
    tasks = park(env, event, 3, lambda _: event.wait(LONG))
    event.set()
    event.clear()
    assert [task.result(LONG) for task in tasks] == [True] * 3
    assert event.wait(0.01) is False


def test_event_may_be_set_from_a_native_thread_and_from_the_hub(env: Environment) -> None:
    for setter in (
        lambda event: run_natively(env, event.set),
        lambda event: hub.get_hub().call_soon_threadsafe(event.set),
    ):
        event = primitives.Event()
        (task,) = park(env, event, 1, lambda _, event=event: event.wait(LONG))
        setter(event)
        assert task.result(LONG) is True


def test_event_forgets_a_killed_waiter(green: Environment) -> None:
    event = primitives.Event()
    first, second = park(green, event, 2, lambda _: event.wait(LONG))
    first.kill()
    first.join(LONG)
    assert waiting(event, 1)()
    event.set()
    assert second.result(LONG) is True


def test_event_wait_in_a_hub_callback_is_refused(env: Environment) -> None:
    event = primitives.Event()
    with pytest.raises(BlockingCallError):
        hub.get_hub().run_threadsafe(event.wait, 1.0, timeout=LONG)
    assert waiting(event, 0)()


# -- Condition ---------------------------------------------------------------------------------
LOCKS: list[Callable[[], Any]] = [lambda: None, primitives.Lock, primitives.RLock, threading.Lock]


@pytest.fixture(params=LOCKS, ids=["own", "Lock", "RLock", "threading.Lock"])
def condition(request: pytest.FixtureRequest, env: Environment) -> primitives.Condition:
    lock = request.param()
    if lock is not None and not isinstance(lock, (primitives.Lock, primitives.RLock)):
        from hub.environment import detect_environment

        if detect_environment() != env.name:
            pytest.skip("a native lock would stop the greenlets of an unpatched program")
    return primitives.Condition(lock)


def await_notice(condition: primitives.Condition, timeout: float = LONG) -> bool:
    with condition:
        return condition.wait(timeout)


def test_condition_notifies_in_order(env: Environment, condition: primitives.Condition) -> None:
    order: list[int] = []

    def wait(index: int) -> None:
        with condition:
            assert condition.wait(LONG)
            order.append(index)

    tasks = park(env, condition, 5, wait)
    with condition:
        condition.notify(2)
        condition.notify()
    for task in tasks[:3]:
        task.result(LONG)
    assert sorted(order) == [0, 1, 2]  # each then had to take the lock, in any order
    with condition:
        condition.notify_all()
        condition.notify_all()
    for task in tasks:
        task.result(LONG)
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_condition_times_out_with_the_lock_held(
    env: Environment, condition: primitives.Condition
) -> None:
    with condition:
        assert condition.wait(0.01) is False
        assert condition.wait(0) is False
        assert env.spawn(condition.acquire, False).result(LONG) is False
    assert waiting(condition, 0)()


def test_condition_needs_its_lock(condition: primitives.Condition) -> None:
    with pytest.raises(RuntimeError, match="cannot wait"):
        condition.wait(0.01)
    with pytest.raises(RuntimeError, match="cannot notify"):
        condition.notify()
    with pytest.raises(RuntimeError, match="cannot notify"):
        condition.notify_all()
    assert condition.acquire()
    condition.release()


def test_wait_for_returns_the_predicate(env: Environment, condition: primitives.Condition) -> None:
    state = {"value": 0}

    def wait(_: int) -> int:
        with condition:
            return condition.wait_for(lambda: state["value"] > 1 and state["value"], LONG)

    (task,) = park(env, condition, 1, wait)
    for value in (1, 2):
        with condition:
            state["value"] = value
            condition.notify_all()
        until(env, lambda: task.done or waiting(condition, 1)())
    assert task.result(LONG) == 2
    with condition:
        assert condition.wait_for(lambda: False, timeout=0.02) is False
        assert condition.wait_for(lambda: "x") == "x"


def test_condition_restores_the_depth_of_its_rlock(env: Environment) -> None:
    condition = primitives.Condition()

    def wait(_: int) -> None:
        with condition, condition:
            assert condition.wait(LONG)
        assert condition._lock.locked() is False

    (task,) = park(env, condition, 1, wait)
    with condition:
        condition.notify()
    task.result(LONG)


def test_rlock_serves_the_condition_of_threading(threads: Environment) -> None:
    condition = threading.Condition(primitives.RLock())  # type: ignore[arg-type]
    entered = primitives.Event()

    def wait() -> bool:
        with condition, condition:
            entered.set()
            return condition.wait(LONG)

    task = threads.spawn(wait)
    assert entered.wait(LONG)
    with condition:
        condition.notify()
    assert task.result(LONG) is True
    with pytest.raises(RuntimeError, match="un-acquired"):
        condition._release_save()  # type: ignore[attr-defined]


def test_a_notification_for_a_dying_task_goes_to_the_next(green: Environment) -> None:
    condition = primitives.Condition()
    first, second = park(green, condition, 2, lambda _: await_notice(condition))
    first.kill()  # arrives when this task waits, and that is after the notification
    with condition:
        condition.notify()
    assert second.result(LONG) is True
    with pytest.raises(green.timeout_types):
        first.result(LONG)
    assert not condition._lock.locked()


def test_a_killed_waiter_of_a_condition_leaves_with_the_lock_in_order(green: Environment) -> None:
    condition = primitives.Condition()
    first, second = park(green, condition, 2, lambda _: await_notice(condition))
    first.kill()
    first.join(LONG)
    assert waiting(condition, 1)()
    with condition:
        condition.notify()
    assert second.result(LONG) is True


def test_a_kill_while_the_lock_is_taken_again_is_postponed(green: Environment) -> None:
    condition = primitives.Condition()
    held_at_the_end: list[bool] = []

    def wait(_: int) -> None:
        with condition:
            try:
                condition.wait(LONG)
            finally:
                held_at_the_end.append(condition._lock._is_owned())

    (task,) = park(green, condition, 1, wait)
    with condition:
        condition.notify()
        until(green, lambda: waiting(condition._lock, 1)())
        for _ in range(3):
            task.kill()
            green.sleep(0.002)
        assert not task.done
    with pytest.raises(green.timeout_types):
        task.result(LONG)
    assert held_at_the_end == [True]
    assert not condition._lock.locked()


def test_a_lock_that_always_raises_makes_no_endless_loop() -> None:
    class Broken:
        taken = True

        def acquire(self, blocking: bool = True) -> bool:
            if blocking:
                raise Raised
            return False

        def release(self) -> None:
            self.taken = False

    condition = primitives.Condition(Broken())
    with pytest.raises(Raised):
        condition.wait(0.01)


def test_condition_in_a_hub_callback_is_refused_with_the_lock_held(env: Environment) -> None:
    condition = primitives.Condition()

    def misuse() -> bool:
        with condition:
            with pytest.raises(BlockingCallError):
                condition.wait(1.0)
            return condition._is_owned()

    assert hub.get_hub().run_threadsafe(misuse, timeout=LONG) is True
    assert not condition._lock.locked()


# -- queues ------------------------------------------------------------------------------------
QUEUES = [primitives.Queue, primitives.LifoQueue]


@pytest.mark.parametrize(
    ("kind", "order"), [(primitives.Queue, [1, 2, 3]), (primitives.LifoQueue, [3, 2, 1])]
)
def test_queues_keep_their_order(kind: type[Any], order: list[int]) -> None:
    items = kind()
    assert items.empty()
    for item in (1, 2, 3):
        items.put(item)
    assert items.qsize() == 3
    assert not items.full()
    assert [items.get() for _ in range(3)] == order
    assert "0 items" in repr(items)


@pytest.mark.parametrize("kind", QUEUES)
def test_queue_errors_are_those_of_the_standard_library(kind: type[Any]) -> None:
    items = kind(1)
    for get in (items.get_nowait, lambda: items.get(timeout=0.01), lambda: items.get(False)):
        with pytest.raises(queue.Empty):
            get()
    items.put(1)
    assert items.full()
    for put in (items.put_nowait, lambda x: items.put(x, timeout=0.01)):
        with pytest.raises(queue.Full):
            put(2)
    with pytest.raises(ValueError, match="non-negative"):
        items.put(2, timeout=-1)
    with pytest.raises(ValueError, match="non-negative"):
        items.get(timeout=-1)
    assert items.get() == 1


def test_a_full_queue_lets_putters_in_by_turns(env: Environment) -> None:
    items: primitives.Queue[int] = primitives.Queue(1)
    items.put(-1)
    tasks = []
    for index in range(4):
        tasks.append(env.spawn(items.put, index))
        until(env, lambda index=index: f"{index + 1} to put" in repr(items))
    assert [items.get(timeout=LONG) for _ in range(5)] == [-1, 0, 1, 2, 3]
    for task in tasks:
        task.result(LONG)


def test_getters_are_served_by_turns(env: Environment) -> None:
    items: primitives.LifoQueue[int] = primitives.LifoQueue()
    got: list[tuple[int, int]] = []
    tasks = []
    for index in range(4):
        tasks.append(env.spawn(lambda i: got.append((i, items.get(timeout=LONG))), index))
        until(env, lambda index=index: f"{index + 1} waiting to get" in repr(items))
    for item in range(4):
        items.put(item)
        tasks[item].result(LONG)
    assert got == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_an_item_given_to_a_dying_getter_is_not_lost(green: Environment) -> None:
    items: primitives.Queue[str] = primitives.Queue()
    task = green.spawn(items.get)
    until(green, lambda: "1 waiting to get" in repr(items))
    task.kill()
    items.put("precious")
    task.join(LONG)
    assert items.get_nowait() == "precious"


def test_room_given_to_a_dying_putter_is_not_lost(green: Environment) -> None:
    items: primitives.Queue[int] = primitives.Queue(1)
    items.put(1)
    task = green.spawn(items.put, 2)
    until(green, lambda: "1 to put" in repr(items))
    task.kill()
    assert items.get() == 1
    task.join(LONG)
    items.put_nowait(3)
    assert items.get_nowait() == 3


def test_join_waits_until_everything_is_dealt_with(env: Environment) -> None:
    items: primitives.Queue[int] = primitives.Queue()
    assert items.join(timeout=0) is True
    items.put(1)
    items.put(2)
    assert items.join(timeout=0) is False
    assert items.join(timeout=0.01) is False
    task = env.spawn(items.join)
    items.get()
    items.task_done()
    env.sleep(0.005)
    assert not task.done
    items.get()
    items.task_done()
    assert task.result(LONG) is True
    with pytest.raises(ValueError, match="too many times"):
        items.task_done()


def test_threads_lose_no_item(threads: Environment) -> None:
    items: primitives.LifoQueue[int] = primitives.LifoQueue(3)
    got: list[int] = []
    producers = [
        threads.spawn(lambda base: [items.put(base + i) for i in range(200)], 1000 * n)
        for n in range(4)
    ]
    consumers = [
        threads.spawn(lambda: got.extend([items.get(timeout=LONG) for _ in range(200)]))
        for _ in range(4)
    ]
    for task in producers + consumers:
        task.result(LONG)
    assert sorted(got) == sorted(1000 * n + i for n in range(4) for i in range(200))


# -- forks and imports --------------------------------------------------------------------------
def test_waiting_threads_of_the_parent_are_passed_over_in_the_child(threads: Environment) -> None:
    lock = primitives.Lock()
    event = primitives.Event()
    lock.acquire()
    (task,) = park(threads, lock, 1, lambda _: lock.acquire(timeout=LONG))
    (other,) = park(threads, event, 1, lambda _: event.wait(LONG))

    def child() -> None:
        lock.release()
        # The first in the queue is a thread that does not exist here.
        assert lock.acquire(timeout=1)
        assert not lock.acquire(blocking=False)
        event.set()

    in_child(child)
    lock.release()
    event.set()
    assert task.result(LONG) is True
    assert other.result(LONG) is True


def test_a_try_without_waiting_is_not_barred_by_threads_of_the_parent(
    threads: Environment,
) -> None:
    lock = primitives.Semaphore(0)
    (task,) = park(threads, lock, 1, lambda _: lock.acquire(timeout=LONG))

    def child() -> None:
        lock._returned.append(True)  # as if released in the moment of the fork
        assert lock.acquire(blocking=False)

    in_child(child)
    lock.release()
    assert task.result(LONG) is True


def test_waiting_greenlets_go_on_in_the_child(green: Environment) -> None:
    lock = primitives.Lock()
    end = primitives.Event()
    served: list[int] = []

    def work(index: int) -> None:
        with lock:
            served.append(index)
        end.wait(LONG)  # in eventlet's child, a greenlet that ends lands in the parent's loop

    lock.acquire()
    tasks = park(green, lock, 2, work)

    def child() -> None:
        lock.release()
        until(green, lambda: served == [0, 1], 5.0)
        assert lock.acquire(timeout=1)

    in_child(child)
    lock.release()
    end.set()
    for task in tasks:
        task.result(LONG)


@pytest.mark.parametrize("kind", [primitives.Lock, primitives.RLock])
def test_a_held_lock_stays_locked_in_the_child_until_it_is_reset(
    env: Environment, kind: type[Any]
) -> None:
    lock = kind()
    assert env.spawn(lock.acquire).result(LONG)

    def child() -> None:
        assert not lock.acquire(timeout=0.05)
        lock._at_fork_reinit()
        assert lock.acquire(timeout=0)

    in_child(child)


def test_the_primitives_import_nothing_that_may_be_patched_later() -> None:
    script = (
        "import sys, hub.primitives as p; p.Lock().acquire(); p.Event(); p.Queue(); "
        "print([m for m in ('socket', 'ssl', 'select', 'threading', 'queue') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert out.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    assert sorted(primitives.__all__) == primitives.__all__
    for name in primitives.__all__:
        assert getattr(primitives, name).__doc__
