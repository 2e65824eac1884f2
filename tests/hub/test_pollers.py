"""What the pollers do beside their contract: choice, late binding, and failing resources."""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic
from typing import Any

import pytest

import hub.environment
from hub import pollers
from hub.errors import BadDescriptorError, PollerClosedError, UnknownPollerError, UnsupportedError
from hub.pollers import (
    READ,
    WRITE,
    EpollPoller,
    KqueuePoller,
    Poller,
    PollPoller,
    SelectPoller,
    available_pollers,
    create_poller,
)
from hub.pollers._timerfd import TimerFd
from hub.pollers._wakeup import Wakeup
from tests.support.fake_kqueue import FakeKevent, FakeKqueue, with_kqueue

Original = Callable[[str, str], Any]

LONG = 20.0

needs_epoll = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="epoll and timerfd exist on Linux only"
)


@pytest.fixture
def original() -> Original:
    return hub.environment.get_environment().original


@pytest.fixture(params=pollers.DEFAULT_POLLERS)
def lookup(request: pytest.FixtureRequest, original: Original) -> Original:
    """What `original` is on a platform that has one poller only."""
    name: str = request.param
    base = with_kqueue(original) if name == "kqueue" else original
    if not pollers.POLLERS[name].available(base):
        pytest.skip(f"this platform has no {name}")
    others = {other for other in pollers.DEFAULT_POLLERS if other != name}
    return hiding(base, *(("select", other) for other in others))


def hiding(original: Original, *hidden: tuple[str, str]) -> Original:
    """Return `original` of a platform that lacks some names."""

    def lookup(module: str, name: str) -> Any:
        if (module, name) in hidden:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return original(module, name)

    return lookup


def replacing(original: Original, **replaced: Any) -> Original:
    """Return `original` with some functions replaced, by their name."""

    def lookup(module: str, name: str) -> Any:
        return replaced[name] if name in replaced else original(module, name)

    return lookup


def open_descriptors() -> set[int]:
    """Return the descriptors of this process."""
    numbers = {int(name) for name in os.listdir("/dev/fd")}
    return {fd for fd in numbers if _is_open(fd)}


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def close(*fds: int) -> None:
    """Close at once; the patched function of gevent closes in its next turn."""
    for fd in fds:
        hub.environment.get_environment().original("os", "close")(fd)


@pytest.fixture
def pair(original: Original) -> Iterator[tuple[Any, Any]]:
    left, right = original("socket", "socketpair")()
    left.setblocking(False)
    right.setblocking(False)
    with left, right:
        yield left, right


# -- choice ----------------------------------------------------------------------------
def test_the_best_available_poller_is_taken(
    monkeypatch: pytest.MonkeyPatch, original: Original, lookup: Original
) -> None:
    monkeypatch.delenv("HUB_POLLER", raising=False)
    with create_poller(original=lookup) as poller:
        assert [poller.name] == available_pollers(lookup)
    with create_poller(original=original) as poller:
        assert poller.name == available_pollers(original)[0]


def test_available_pollers_come_best_first(original: Original) -> None:
    names = available_pollers(original)
    assert names == [name for name in pollers.DEFAULT_POLLERS if name in names]
    assert names[-1] == "select"


def test_a_poller_is_chosen_by_name(original: Original) -> None:
    for name in available_pollers(original):
        with create_poller(name, original) as poller:
            assert type(poller) is pollers.POLLERS[name]


def test_the_variable_chooses_and_the_argument_wins(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    monkeypatch.setenv("HUB_POLLER", "select")
    with create_poller(original=original) as poller:
        assert type(poller) is SelectPoller
    with create_poller("poll", original) as poller:
        assert type(poller) is PollPoller
    monkeypatch.setenv("HUB_POLLER", "")
    with create_poller(original=original) as poller:
        assert poller.name == available_pollers(original)[0]


@pytest.mark.parametrize(
    ("name", "guess"), [("epol", "epoll"), ("EPOLL", "epoll"), ("kqeue", "kqueue")]
)
def test_an_unknown_name_is_refused_with_a_guess_and_the_choice(
    original: Original, name: str, guess: str
) -> None:
    with pytest.raises(UnknownPollerError) as caught:
        create_poller(name, original)
    message = str(caught.value)
    assert repr(name) in message
    assert f"did you mean {guess!r}?" in message
    assert ", ".join(available_pollers(original)) in message


@pytest.mark.parametrize("name", ["", "zzz", 7, [], object()], ids=lambda name: repr(name)[:9])
def test_an_absurd_name_is_refused_without_a_guess(original: Original, name: Any) -> None:
    with pytest.raises(UnknownPollerError, match=r"available here: .*select") as caught:
        create_poller(name, original)
    assert "did you mean" not in str(caught.value)


def test_an_unknown_name_in_the_variable_is_traced_to_it(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    monkeypatch.setenv("HUB_POLLER", "iocp")
    with pytest.raises(UnknownPollerError, match="'iocp' in the variable HUB_POLLER"):
        create_poller(original=original)


def test_a_poller_of_another_platform_is_refused_as_such(lookup: Original) -> None:
    missing = set(pollers.DEFAULT_POLLERS) - set(available_pollers(lookup))
    assert len(missing) == 3
    for name in missing:
        with pytest.raises(UnsupportedError, match=f"{name}.*platform does not have"):
            create_poller(name, lookup)


def test_a_platform_without_any_poller_is_refused(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    monkeypatch.delenv("HUB_POLLER", raising=False)
    nothing = hiding(original, *(("select", name) for name in pollers.DEFAULT_POLLERS))
    assert available_pollers(nothing) == []
    with pytest.raises(UnsupportedError, match="original"):
        create_poller(original=nothing)


def test_a_poller_can_be_added_to_the_registry(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    class Mine(PollPoller):
        name = "mine"

    monkeypatch.setitem(pollers.POLLERS, "mine", Mine)
    assert available_pollers(original)[-1] == "mine"
    with create_poller("mine", original) as poller:
        assert type(poller) is Mine


@needs_epoll
def test_what_patching_hides_after_our_import_is_not_found_any_more(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    def there_now(module: str, name: str) -> Any:
        return getattr(sys.modules[module], name)

    monkeypatch.setattr(select, "epoll", original("select", "epoll"), raising=False)
    assert EpollPoller.available(there_now)
    monkeypatch.delattr(select, "epoll")
    assert not EpollPoller.available(there_now)


def test_masks_are_those_of_the_kernel(original: Original) -> None:
    assert original("select", "POLLIN") == READ
    assert original("select", "POLLOUT") == WRITE


def test_importing_the_pollers_imports_nothing_that_patching_replaces() -> None:
    program = (
        "import sys; before = set(sys.modules); import hub.pollers; "
        "bad = {'select', 'socket', 'ssl', 'threading', 'ctypes', 'gevent', 'eventlet'}; "
        "sys.exit(', '.join(bad & (set(sys.modules) - before)) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr


# -- wake-up ---------------------------------------------------------------------------
@pytest.fixture
def pipe_wakeup(original: Original) -> Iterator[Wakeup]:
    wakeup = Wakeup(hiding(original, ("os", "eventfd")))
    yield wakeup
    wakeup.close()


def readable(original: Original, fd: int) -> bool:
    poll = original("select", "poll")()
    poll.register(fd, READ)
    return bool(poll.poll(0))


def test_without_eventfd_a_pipe_wakes(original: Original, pipe_wakeup: Wakeup) -> None:
    assert not readable(original, pipe_wakeup.fd)
    pipe_wakeup.wake()
    assert readable(original, pipe_wakeup.fd)
    pipe_wakeup.drain()
    assert not readable(original, pipe_wakeup.fd)
    pipe_wakeup.drain()


def test_a_full_pipe_neither_blocks_nor_raises(original: Original, pipe_wakeup: Wakeup) -> None:
    for _ in range(70_000):
        pipe_wakeup.wake()
    pipe_wakeup.drain()
    assert not readable(original, pipe_wakeup.fd)
    pipe_wakeup.wake()
    assert readable(original, pipe_wakeup.fd)


def test_both_ends_of_the_pipe_are_closed(original: Original) -> None:
    before = open_descriptors()
    wakeup = Wakeup(hiding(original, ("os", "eventfd")))
    own = open_descriptors() - before
    assert len(own) == 2
    assert all(wakeup.owns(fd) for fd in own)
    wakeup.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("end", ["close", "abandon"])
def test_a_writer_that_is_about_to_write_keeps_the_descriptor_open(
    original: Original, end: str
) -> None:
    """Else the number could be given to a new socket, whose peer would get stray bytes."""
    write = original("os", "write")
    still_open: list[bool] = []

    def interrupted_write(fd: int, data: bytes) -> int:
        getattr(wakeup, end)()  # another thread runs here
        still_open.append(_is_open(fd))
        return int(write(fd, data))

    wakeup = Wakeup(replacing(original, write=interrupted_write))
    wakeup.wake()
    # After a fork, nobody else can be writing: an abandoned copy is closed at once.
    assert still_open == [end == "close"]
    assert not _is_open(wakeup.fd)
    wakeup.wake()
    assert len(still_open) == 1


def test_wakeups_during_close_reach_no_other_descriptor(lookup: Original) -> None:
    start = lookup("_thread", "start_new_thread")
    running = lookup("_thread", "allocate_lock")()
    socketpair = lookup("socket", "socketpair")
    current: list[Poller] = [create_poller(original=lookup)]
    stop: list[None] = []

    def hammer() -> None:
        try:
            while not stop:
                current[0].wakeup()
        finally:
            running.release()

    running.acquire()
    start(hammer, ())
    try:
        for _ in range(150):
            current[0].close()
            with ExitStack() as opened:
                ends = [opened.enter_context(end) for _ in range(2) for end in socketpair()]
                for end in ends:
                    end.setblocking(False)
                current[0].wakeup()
                for end in ends:
                    with pytest.raises(BlockingIOError):
                        end.recv(9)
            current[0] = create_poller(original=lookup)
    finally:
        stop.append(None)
        assert running.acquire(True, LONG)
        current[0].close()


def test_a_wakeup_whose_descriptor_somebody_closed_does_not_raise(original: Original) -> None:
    wakeup = Wakeup(original)
    close(wakeup.fd)
    wakeup.wake()
    wakeup.close()


# -- timers ----------------------------------------------------------------------------
@needs_epoll
def test_timers_use_the_functions_of_python_where_they_exist(original: Original) -> None:
    calls: list[Any] = []
    inner = TimerFd(original)

    def create(clock: int, *, flags: int) -> int:
        calls.append((clock, flags))
        return os.dup(inner.fd)

    def settime(fd: int, *, initial: float) -> None:
        calls.append(initial)
        inner.set(initial or None)

    lookup = replacing(original, timerfd_create=create, timerfd_settime=settime)
    with EpollPoller(lookup) as poller:
        poller.set_timer(0.01)
        assert poller.poll(LONG) == []
        poller.set_timer(LONG)
        poller.set_timer(None)
        assert poller.poll(0) == []
    inner.close()
    assert calls[0][1] & os.O_NONBLOCK
    assert calls[1:] == [0.01, LONG, 0.0]


@needs_epoll
def test_a_timer_that_cannot_be_made_is_reported(
    monkeypatch: pytest.MonkeyPatch, original: Original
) -> None:
    import ctypes  # noqa: F401 - loading it needs a descriptor, too

    without_python = hiding(original, ("os", "timerfd_create"))
    before = open_descriptors()
    with EpollPoller(without_python) as poller:
        with limited(0), pytest.raises(OSError, match="timerfd_create") as caught:
            poller.set_timer(1.0)
        assert caught.value.errno == errno.EMFILE
        monkeypatch.setitem(sys.modules, "ctypes", None)
        with pytest.raises(UnsupportedError, match="timerfd"):
            poller.set_timer(1.0)
        assert poller.poll(0) == []
    assert open_descriptors() == before


@needs_epoll
def test_setting_a_timer_whose_descriptor_somebody_closed_is_an_error(original: Original) -> None:
    timer = TimerFd(hiding(original, ("os", "timerfd_create")))
    close(timer.fd)
    with pytest.raises(OSError, match="timerfd_settime"):
        timer.set(1.0)
    timer.close()


@needs_epoll
def test_clearing_a_timer_that_was_set_again_leaves_it_set(original: Original) -> None:
    timer = TimerFd(original)
    timer.set(LONG)
    timer.clear()
    assert timer.armed
    timer.close()
    timer.close()


@needs_epoll
def test_a_timer_that_cannot_be_watched_is_closed(original: Original) -> None:
    before = open_descriptors()
    full = [False]
    with EpollPoller(replacing(original, epoll=refusing_epoll(original, full))) as poller:
        full[0] = True
        with pytest.raises(OSError, match="No space"):
            poller.set_timer(1.0)
        full[0] = False
        poller.set_timer(0.01)
        assert poller.poll(LONG) == []
    assert open_descriptors() == before


# -- failing resources -----------------------------------------------------------------
@contextmanager
def limited(spare: int) -> Iterator[None]:
    """Leave this process `spare` more descriptors than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(open_descriptors())
    with ExitStack() as plugs:
        # Fill the holes below the limit; what is left is above the highest number.
        fd = -1
        while fd < highest:
            fd = os.dup(0)
            plugs.callback(close, fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (fd + 1 + spare, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def refusing_epoll(original: Original, full: list[bool]) -> Callable[[], Any]:
    """Return an epoll class that has no watch left (max_user_watches) while full[0] is set."""
    real = original("select", "epoll")

    class Epoll:
        def __init__(self) -> None:
            self._epoll = real()

        def register(self, fd: int, events: int) -> None:
            if full[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._epoll.register(fd, events)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    return Epoll


def test_a_poller_that_cannot_be_made_leaves_nothing_open(lookup: Original) -> None:
    create_poller(original=lookup).close()
    before = open_descriptors()
    for spare in range(4):
        with limited(spare):
            try:
                create_poller(original=lookup).close()
            except OSError:
                pass
        assert open_descriptors() == before


@needs_epoll
def test_a_kernel_without_memory_is_not_blamed_on_the_descriptor(
    original: Original, pair: tuple[Any, Any]
) -> None:
    full = [False]
    with EpollPoller(replacing(original, epoll=refusing_epoll(original, full))) as poller:
        full[0] = True
        with pytest.raises(OSError, match="No space"):
            poller.register(pair[0].fileno(), READ)
        assert dict(poller.registered) == {}
        full[0] = False
        poller.register(pair[0].fileno(), READ)
        pair[1].send(b"x")
        assert poller.poll(LONG) == [(pair[0].fileno(), READ)]


def leave_a_dead_entry(poller: Poller, original: Original, pair: tuple[Any, Any]) -> int:
    """Register the left end, close it while a duplicate lives; return the duplicate."""
    left, right = pair
    poller.register(left.fileno(), READ)
    duplicate = os.dup(left.fileno())
    number = left.detach()
    close(number)
    poller.unregister(number)
    right.send(b"x")
    return duplicate


@needs_epoll
def test_a_dead_entry_is_removed_although_no_descriptor_is_left(
    original: Original, pair: tuple[Any, Any]
) -> None:
    with EpollPoller(original) as poller:
        poller.fileno()
        poller.set_timer(LONG)
        poller.register(pair[1].fileno(), READ)
        duplicate = leave_a_dead_entry(poller, original, pair)
        with limited(0):
            assert poller.poll(0) == []
        assert "rebuilt 1 times" in repr(poller)
        assert poller.poll(0) == []
        assert "rebuilt 1 times" in repr(poller)
        os.write(duplicate, b"x")
        assert poller.poll(LONG) == [(pair[1].fileno(), READ)]
        close(duplicate)


@needs_epoll
def test_a_dead_entry_that_cannot_be_removed_closes_the_poller(
    original: Original, pair: tuple[Any, Any]
) -> None:
    real = original("select", "epoll")
    allowed = [1]

    def make() -> Any:
        if not allowed:
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        allowed.pop()
        return real()

    with EpollPoller(replacing(original, epoll=make)) as poller:
        duplicate = leave_a_dead_entry(poller, original, pair)
        try:
            with pytest.raises(PollerClosedError, match=os.strerror(errno.ENFILE)):
                poller.poll(0)
            assert poller.closed
        finally:
            close(duplicate)


@needs_epoll
def test_removing_a_dead_entry_finds_what_else_was_closed(
    original: Original, pair: tuple[Any, Any]
) -> None:
    with EpollPoller(original) as poller:
        assert poller.poll(0) == []
        other, writer = os.pipe()
        poller.register(other, READ)
        duplicate = leave_a_dead_entry(poller, original, pair)
        close(other)
        close(writer)
        assert poller.poll(0) == [(other, READ)]
        assert dict(poller.registered) == {}
        assert poller.poll(0) == []
        close(duplicate)


@needs_epoll
def test_many_late_unregistrations_cost_one_renewal(
    original: Original, pair: tuple[Any, Any]
) -> None:
    """Each leaves a number that has to be checked on every event, until all are cleared."""
    with EpollPoller(original) as poller:
        poller.register(pair[0].fileno(), READ)
        opened = [os.pipe() for _ in range(70)]
        for reader, writer in opened:
            poller.register(reader, READ)
            close(reader)
            close(writer)
            poller.unregister(reader)
        pair[1].send(b"x")
        for _ in range(3):
            assert poller.poll(LONG) == [(pair[0].fileno(), READ)]
        assert "rebuilt 1 times" in repr(poller)


@needs_epoll
def test_a_renewal_reports_what_it_finds_closed(original: Original, pair: tuple[Any, Any]) -> None:
    with EpollPoller(original) as poller:
        poller.register(pair[0].fileno(), READ)
        assert poller.poll(0) == []
        for reader, writer in [os.pipe() for _ in range(70)]:
            poller.register(reader, READ)
            close(reader)
            close(writer)
            poller.unregister(reader)
        number = pair[0].detach()
        close(number)
        assert poller.poll(0) == [(number, READ)]
        assert poller.poll(0) == []


@needs_epoll
def test_a_renewal_may_find_nothing_to_report(original: Original) -> None:
    with EpollPoller(original) as poller:
        for reader, writer in [os.pipe() for _ in range(70)]:
            poller.register(reader, READ)
            close(reader)
            close(writer)
            poller.unregister(reader)
        assert poller.poll(0.01) == []
        assert "rebuilt 1 times" in repr(poller)


def test_a_poller_whose_own_descriptors_were_closed_says_so(
    lookup: Original, pair: tuple[Any, Any]
) -> None:
    before = open_descriptors()
    poller = create_poller(original=lookup)
    poller.register(pair[0].fileno(), READ)
    try:
        poller.fileno()
        poller.set_timer(LONG)
    except UnsupportedError:
        pass
    for fd in open_descriptors() - before:
        close(fd)
    if poller.name in ("epoll", "kqueue"):
        # The descriptor that is refused is not the one to blame.
        with pytest.raises(PollerClosedError, match="lost its own descriptor"):
            poller.register(pair[1].fileno(), READ)
    else:
        with pytest.raises(PollerClosedError, match="lost its own descriptor"):
            poller.poll(1.0)
    assert poller.closed
    poller.wakeup()
    poller.close()


@needs_epoll
def test_a_wait_on_a_poller_whose_own_descriptors_were_closed_blames_no_other(
    original: Original, pair: tuple[Any, Any]
) -> None:
    for lookup, kind in ((original, EpollPoller), (with_kqueue(original), KqueuePoller)):
        before = open_descriptors()
        poller: Poller = kind(lookup)
        poller.register(pair[0].fileno(), READ)
        close(*open_descriptors() - before)
        with pytest.raises(PollerClosedError, match="lost its own descriptor"):
            poller.poll(0)
        assert poller.closed


def test_kqueue_drops_what_the_kernel_reports_unasked(
    original: Original, pair: tuple[Any, Any]
) -> None:
    made: list[FakeKqueue] = []

    def make() -> FakeKqueue:
        made.append(FakeKqueue(original))
        return made[-1]

    lookup = replacing(with_kqueue(original), kqueue=make, kevent=FakeKevent)
    with KqueuePoller(lookup) as poller:
        made[0].control([FakeKevent(pair[0].fileno())], 0, 0)
        pair[1].send(b"x")
        assert not poller.poll(0.01)
        assert not readable(original, poller.fileno())


@needs_epoll
def test_a_suspect_is_settled_although_no_descriptor_is_left(
    original: Original, pair: tuple[Any, Any]
) -> None:
    with EpollPoller(original) as poller:
        number = pair[0].fileno()
        duplicate = leave_a_dead_entry(poller, original, pair)
        os.dup2(pair[1].fileno(), number)
        poller.register(number, READ)
        try:
            with limited(0):
                assert poller.poll(0) == []
            assert "rebuilt 1 times" in repr(poller)
            assert dict(poller.registered) == {number: READ}
        finally:
            close(duplicate, number)


def test_select_says_when_its_own_descriptor_is_too_high(original: Original) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < 1200:
        pytest.skip(f"RLIMIT_NOFILE is {soft}; this needs 1200")
    with ExitStack() as plugs:
        fd = -1
        while fd < 1024:
            fd = os.dup(0)
            plugs.callback(close, fd)
        before = open_descriptors()
        with pytest.raises(UnsupportedError, match=r"FD_SETSIZE.*HUB_POLLER"):
            SelectPoller(original)
        assert open_descriptors() == before


def test_select_passes_on_what_it_does_not_understand(original: Original) -> None:
    fail = [False]
    real = original("select", "select")

    def failing(*arguments: Any) -> Any:
        if fail[0]:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return real(*arguments)

    with SelectPoller(replacing(original, select=failing)) as poller:
        fail[0] = True
        with pytest.raises(OSError, match=os.strerror(errno.ENOMEM)):
            poller.poll(0)


def test_a_direction_that_kqueue_refuses_leaves_nothing_behind(
    original: Original, pair: tuple[Any, Any]
) -> None:
    class OneWay(FakeKqueue):
        """The read end of a pipe takes no EVFILT_WRITE (FreeBSD)."""

        def control(self, changes: Any, *arguments: Any) -> list[FakeKevent]:
            for change in changes or ():
                if change.filter == -2 and change.flags & 1:
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().control(changes, *arguments)

    lookup = replacing(with_kqueue(original), kqueue=lambda: OneWay(original), kevent=FakeKevent)
    fd = pair[0].fileno()
    with KqueuePoller(lookup) as poller:
        with pytest.raises(BadDescriptorError, match=f"{fd}.*cannot be waited for"):
            poller.register(fd, READ | WRITE)
        pair[1].send(b"x")
        assert poller.poll(0) == []
        poller.register(fd, READ)
        assert poller.poll(LONG) == [(fd, READ)]


@needs_epoll
def test_a_signal_between_report_and_return_does_not_reopen_a_closed_poller(
    original: Original, pair: tuple[Any, Any]
) -> None:
    """The handler runs as soon as the kernel's answer is there."""
    real = original("select", "epoll")

    class Epoll:
        def __init__(self) -> None:
            self._epoll = real()

        def poll(self, *arguments: Any) -> Any:
            ready = self._epoll.poll(*arguments)
            signal.raise_signal(signal.SIGALRM)
            return ready

        def __getattr__(self, name: str) -> Any:
            return getattr(self._epoll, name)

    poller = EpollPoller(replacing(original, epoll=Epoll))
    before = signal.signal(signal.SIGALRM, lambda *_: poller.close())
    try:
        poller.register(pair[0].fileno(), READ)
        pair[1].send(b"x")
        begin = monotonic()
        assert poller.poll(LONG) == []
        assert monotonic() - begin < LONG / 2
    finally:
        signal.signal(signal.SIGALRM, before)
        poller.close()
    assert poller.closed
