"""One contract for every poller, in every environment.

kqueue runs through `tests.support.fake_kqueue` where the platform has none.  The file is
long because it is one contract: whatever is promised is asked of each poller in the same words.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

import pytest

import hub.environment
from hub.errors import BadDescriptorError, HubError, PollerClosedError, UnsupportedError
from hub.pollers import DEFAULT_POLLERS, POLLERS, READ, WRITE, Poller
from tests.support.fake_kqueue import with_kqueue

BOTH = READ | WRITE

#: Far more than anything here takes; a test that reaches it has failed.
LONG = 20.0


@pytest.fixture
def original() -> Callable[[str, str], Any]:
    return hub.environment.get_environment().original


@pytest.fixture(params=DEFAULT_POLLERS)
def make_poller(
    request: pytest.FixtureRequest, original: Callable[[str, str], Any]
) -> Iterator[Callable[[], Poller]]:
    kind = POLLERS[request.param]
    lookup = with_kqueue(original) if kind.name == "kqueue" else original
    if not kind.available(lookup):
        pytest.skip(f"this platform has no {kind.name}")
    made: list[Poller] = []

    def make() -> Poller:
        poller = kind(lookup)
        made.append(poller)
        return poller

    yield make
    for poller in made:
        poller.close()


@pytest.fixture
def poller(make_poller: Callable[[], Poller]) -> Poller:
    return make_poller()


#: The pollers that another loop can watch, and those that it cannot.
watchable = pytest.mark.parametrize("make_poller", ["epoll", "kqueue"], indirect=True)
unwatchable = pytest.mark.parametrize("make_poller", ["poll", "select"], indirect=True)


class Descriptors:
    """Opens descriptors with unpatched functions and closes what is left."""

    def __init__(self, original: Callable[[str, str], Any]) -> None:
        self.original = original
        self.read = original("os", "read")
        self.write = original("os", "write")
        self._close = original("os", "close")
        self._socketpair = original("socket", "socketpair")
        self.open: set[int] = set()

    def add(self, fd: int) -> int:
        self.open.add(fd)
        return fd

    def pair(self) -> tuple[int, int]:
        """Return both ends of a connected pair of non-blocking sockets."""
        left, right = self._socketpair()
        left.setblocking(False)
        right.setblocking(False)
        return self.add(left.detach()), self.add(right.detach())

    def pairs(self, count: int) -> list[tuple[int, int]]:
        return [self.pair() for _ in range(count)]

    def pipe(self) -> tuple[int, int]:
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        return self.add(reader), self.add(writer)

    def dup(self, fd: int) -> int:
        return self.add(os.dup(fd))

    def move(self, fd: int, number: int) -> int:
        """Give the file of `fd` the number `number`, and close `fd`."""
        os.dup2(fd, number)
        self.close(fd)
        return self.add(number)

    def close(self, *fds: int) -> None:
        for fd in fds:
            self.open.remove(fd)
            self._close(fd)

    def fill(self, fd: int) -> None:
        """Write until no more goes in."""
        try:
            while True:
                self.write(fd, bytes(65536))
        except BlockingIOError:
            pass


@pytest.fixture
def fds(original: Callable[[str, str], Any]) -> Iterator[Descriptors]:
    descriptors = Descriptors(original)
    yield descriptors
    descriptors.close(*descriptors.open)


class Native:
    """Native threads and processes, also in a patched program."""

    def __init__(self, original: Callable[[str, str], Any]) -> None:
        self._start = original("_thread", "start_new_thread")
        self._lock = original("_thread", "allocate_lock")
        self._fork = original("os", "fork")
        self._waitpid = original("os", "waitpid")
        self.sleep = original("time", "sleep")

    @contextmanager
    def thread(self, function: Callable[[], object]) -> Iterator[None]:
        """Run `function` in a native thread meanwhile."""
        running = self._lock()
        running.acquire()

        def run() -> None:
            try:
                function()
            finally:
                running.release()

        self._start(run, ())
        yield
        assert running.acquire(True, LONG), "the native thread does not end"

    def child(self, function: Callable[[], object]) -> int:
        """Run `function` in a forked child; what it returns is true when all went well."""
        with warnings.catch_warnings():
            # eventlet warns of every fork, and Python 3.12 of those with a second thread.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid: int = self._fork()
        if pid:
            return pid
        status = 1
        try:
            status = 0 if function() else 2
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
        finally:
            os._exit(status)

    def wait(self, pid: int) -> None:
        _, status = self._waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0


@pytest.fixture
def native(original: Callable[[str, str], Any]) -> Native:
    return Native(original)


@contextmanager
def alarm(handler: Callable[..., object], first: float, interval: float = 0.0) -> Iterator[None]:
    """Call `handler` by SIGALRM after `first` seconds and then every `interval`."""
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, first, interval)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def poll_until(poller: Poller, condition: Callable[[dict[int, int]], bool]) -> dict[int, int]:
    """Poll and gather until `condition` holds; return fd -> events."""
    seen: dict[int, int] = {}
    deadline = monotonic() + LONG
    while not condition(seen):
        assert monotonic() < deadline, f"not reported; so far {seen}"
        for fd, events in poller.poll(0.05):
            seen[fd] = seen.get(fd, 0) | events
    return seen


def assert_calm(poller: Poller) -> None:
    """Fail if polls return before their time without anything to report."""
    end = monotonic() + 0.12
    polls = 0
    while monotonic() < end:
        assert poller.poll(0.04) == []
        polls += 1
    assert polls <= 4


def needs_descriptors(count: int) -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count + 200:
        pytest.skip(f"RLIMIT_NOFILE is {soft}; this needs {count + 200}")


def pollable(original: Callable[[str, str], Any], fd: int, timeout: float) -> bool:
    """Ask a foreign, native poll whether `fd` is readable."""
    foreign = original("select", "poll")()
    foreign.register(fd, READ)
    return bool(foreign.poll(timeout * 1000))


def own_descriptors() -> int:
    return len(os.listdir("/dev/fd"))


# -- interest --------------------------------------------------------------------------
def test_poll_without_anything_registered_returns_an_empty_list(poller: Poller) -> None:
    assert poller.poll(0) == []
    assert dict(poller.registered) == {}


def test_read_interest_is_reported_when_data_arrives(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    assert poller.poll(0) == []
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]


def test_write_interest_is_reported_when_there_is_room(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    fds.fill(a)
    poller.register(a, WRITE)
    assert poller.poll(0) == []
    while True:
        try:
            fds.read(b, 1 << 20)
        except BlockingIOError:
            break
    assert poller.poll(LONG) == [(a, WRITE)]


def test_both_directions_ready_are_one_event(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    fds.write(b, b"x")
    poller.register(a, BOTH)
    assert poller.poll(LONG) == [(a, BOTH)]


def test_only_the_ready_direction_of_two_is_reported(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, BOTH)
    assert poller.poll(LONG) == [(a, WRITE)]
    fds.fill(a)
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]


def test_a_direction_that_was_not_asked_for_is_never_reported(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    fds.write(b, b"x")
    poller.register(a, WRITE)
    assert poller.poll(LONG) == [(a, WRITE)]
    poller.register(b, READ)
    assert poller.poll(LONG) == [(a, WRITE)]


def test_register_again_replaces_the_interest(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    fds.write(b, b"x")
    for events in (READ, WRITE, BOTH, READ, READ):
        poller.register(a, events)
        assert poller.poll(LONG) == [(a, events)]
        assert dict(poller.registered) == {a: events}


def test_both_ends_of_a_pair_are_reported(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, WRITE)
    poller.register(b, WRITE)
    assert sorted(poller.poll(LONG)) == sorted([(a, WRITE), (b, WRITE)])


def test_readiness_is_reported_until_it_is_taken(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    fds.write(b, b"xy")
    for _ in range(3):
        assert poller.poll(LONG) == [(a, READ)]
    fds.read(a, 1)
    assert poller.poll(LONG) == [(a, READ)]
    fds.read(a, 1)
    assert poller.poll(0) == []


@pytest.mark.parametrize("events", [READ, WRITE, BOTH])
def test_hang_up_is_reported_as_the_whole_interest(
    poller: Poller, fds: Descriptors, events: int
) -> None:
    a, b = fds.pair()
    fds.fill(a)
    poller.register(a, events)
    fds.close(b)
    assert poller.poll(LONG) == [(a, events)]


def test_end_of_a_pipe_is_readable(poller: Poller, fds: Descriptors) -> None:
    reader, writer = fds.pipe()
    poller.register(reader, READ)
    fds.close(writer)
    assert poller.poll(LONG) == [(reader, READ)]
    assert fds.read(reader, 1) == b""


def test_a_full_pipe_without_reader_is_writable(poller: Poller, fds: Descriptors) -> None:
    reader, writer = fds.pipe()
    fds.fill(writer)
    poller.register(writer, WRITE)
    assert poller.poll(0) == []
    fds.close(reader)
    assert poller.poll(LONG) == [(writer, WRITE)]
    with pytest.raises(BrokenPipeError):
        fds.write(writer, b"x")


def test_a_refused_connection_is_reported(poller: Poller, original: Callable[..., Any]) -> None:
    make = original("socket", "socket")
    with make(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("127.0.0.1", 0))
        address = listener.getsockname()
    with make(socket.AF_INET, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        assert client.connect_ex(address) in (errno.EINPROGRESS, errno.ECONNREFUSED)
        poller.register(client.fileno(), BOTH)
        assert poller.poll(LONG) == [(client.fileno(), BOTH)]
        poller.unregister(client.fileno())


def test_unregistered_descriptors_are_not_reported(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    fds.write(b, b"x")
    poller.register(a, BOTH)
    poller.unregister(a)
    assert poller.poll(0) == []
    assert a not in poller.registered


@pytest.mark.parametrize("fd", [0, 99999, -1, 2**70, None, "7", 1.0, object(), []], ids=str)
def test_unregister_ignores_what_was_never_registered(poller: Poller, fd: Any) -> None:
    poller.unregister(fd)
    poller.unregister(fd)


def test_unregister_is_idempotent_also_for_closed_descriptors(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    poller.register(b, BOTH)
    fds.close(a)
    for _ in range(2):
        poller.unregister(a)
        poller.unregister(b)
    assert dict(poller.registered) == {}
    assert_calm(poller)


def test_registered_is_a_live_read_only_view(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    view = poller.registered
    poller.register(a, READ)
    poller.register(b, BOTH)
    assert dict(view) == {a: READ, b: BOTH}
    with pytest.raises(TypeError):
        view[a] = WRITE  # type: ignore[index]
    poller.unregister(a)
    assert len(view) == 1


# -- misuse ----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "fd", [-1, -7, 2**31, 2**70, None, "7", 1.0, True, object()], ids=lambda fd: repr(fd)[:12]
)
def test_what_is_no_descriptor_is_refused_by_name(poller: Poller, fd: Any) -> None:
    with pytest.raises(BadDescriptorError) as caught:
        poller.register(fd, READ)
    assert repr(fd) in str(caught.value)
    assert isinstance(caught.value, HubError)
    assert isinstance(caught.value, ValueError)
    assert dict(poller.registered) == {}


def test_a_closed_descriptor_is_refused_by_name(poller: Poller, fds: Descriptors) -> None:
    a, _ = fds.pair()
    fds.close(a)
    with pytest.raises(BadDescriptorError, match=f"{a}.*closed.*unregister it before"):
        poller.register(a, READ)
    assert dict(poller.registered) == {}


def test_a_closed_descriptor_that_was_registered_is_refused_and_forgotten(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    fds.close(a)
    with pytest.raises(BadDescriptorError, match="closed"):
        poller.register(a, WRITE)
    assert dict(poller.registered) == {}
    assert_calm(poller)


def test_regular_files_and_directories_are_refused(poller: Poller) -> None:
    with tempfile.TemporaryFile() as file:
        refused = pytest.raises(BadDescriptorError, match=f"{file.fileno()}.*read or write")
        with refused:
            poller.register(file.fileno(), READ)
    directory = os.open(".", os.O_RDONLY)
    try:
        with pytest.raises(BadDescriptorError, match="always ready"):
            poller.register(directory, READ)
    finally:
        os.close(directory)
    assert dict(poller.registered) == {}


def test_a_number_that_became_a_regular_file_is_refused_and_forgotten(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), a)
    with pytest.raises(BadDescriptorError, match=str(a)):
        poller.register(a, READ)
    assert dict(poller.registered) == {}
    assert_calm(poller)


@pytest.mark.parametrize("events", [0, 2, 8, 16, -1, READ | 8, None, "r"])
def test_unknown_events_are_refused_and_change_nothing(
    poller: Poller, fds: Descriptors, events: Any
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    for fd in (a, b):
        with pytest.raises(ValueError, match=f"{fd}.*READ \\| WRITE"):
            poller.register(fd, events)
    assert dict(poller.registered) == {a: READ}


def test_a_refusal_leaves_all_others_in_place(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    for fd in (-1, 99999):
        with pytest.raises(BadDescriptorError):
            poller.register(fd, READ)
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]


def test_the_descriptors_of_the_poller_itself_are_refused(poller: Poller) -> None:
    own = [poller.wake_fileno()]
    try:
        own.append(poller.fileno())
        poller.set_timer(LONG)
    except UnsupportedError:
        pass
    for fd in own:
        with pytest.raises(BadDescriptorError, match="belongs to"):
            poller.register(fd, READ)
    poller.wakeup()
    assert poller.poll(LONG) == []


# -- closed and re-used descriptors ----------------------------------------------------
@pytest.mark.parametrize("events", [READ, WRITE, BOTH])
def test_a_descriptor_closed_behind_our_back_is_reported_once_and_dropped(
    poller: Poller, fds: Descriptors, events: int
) -> None:
    a, _ = fds.pair()
    fds.fill(a)
    c, d = fds.pair()
    poller.register(a, events)
    poller.register(c, READ)
    fds.close(a)
    assert poll_until(poller, lambda seen: a in seen) == {a: events}
    assert dict(poller.registered) == {c: READ}
    assert_calm(poller)
    fds.write(d, b"x")
    assert poller.poll(LONG) == [(c, READ)]


def test_a_poll_without_timeout_reports_what_was_closed_before(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    assert poller.poll(0) == []
    fds.close(a)
    assert poller.poll(None) == [(a, READ)]
    assert poller.poll(0) == []


def test_polls_that_only_look_report_what_was_closed(poller: Poller, fds: Descriptors) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    assert poller.poll(0) == []
    fds.close(a)
    deadline = monotonic() + LONG
    while not (events := poller.poll(0)):
        assert monotonic() < deadline, "never reported"
    assert events == [(a, READ)]
    assert dict(poller.registered) == {}


def test_each_of_many_closed_descriptors_is_reported(poller: Poller, fds: Descriptors) -> None:
    needs_descriptors(700)
    members = [fd for pair in fds.pairs(300) for fd in pair]
    for fd in members:
        poller.register(fd, READ)
    assert poller.poll(0) == []
    gone = set(members[::60])
    for fd in members[::60]:
        poller.register(fd, READ)
    fds.close(*gone)
    seen = poll_until(poller, lambda seen: gone <= set(seen))
    # The peers of the closed ones see the end of their stream.
    assert {fd for fd in seen if fd in gone} == gone
    assert gone.isdisjoint(poller.registered)
    assert len(poller.registered) == len(members) - len(gone)


def test_a_number_that_was_closed_and_opened_again_can_be_registered(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    fds.close(a)
    c, d = fds.pair()
    if d == a:
        c, d = d, c
    c = fds.move(c, a) if c != a else c
    poller.register(c, BOTH)
    assert poller.poll(LONG) == [(c, WRITE)]
    fds.write(d, b"x")
    assert poller.poll(LONG) == [(c, BOTH)]


def test_a_number_re_used_after_a_late_unregister_can_be_registered(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    fds.close(a, b)
    poller.unregister(a)
    c, d = fds.pair()
    for fd, peer in ((c, d), (d, c)):
        poller.register(fd, READ)
        fds.write(peer, b"x")
        assert poller.poll(LONG) == [(fd, READ)]
        poller.unregister(fd)


def test_unregister_of_a_number_that_is_another_file_by_now(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    c, d = fds.pair()
    fds.close(a)
    c = fds.move(c, a)
    fds.write(d, b"x")
    poller.unregister(c)
    assert_calm(poller)


def test_a_re_used_number_nobody_registered_is_reported_once_where_the_kernel_tells(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    c, d = fds.pair()
    fds.close(a)
    c = fds.move(c, a)
    if poller.name in ("epoll", "kqueue"):
        assert poll_until(poller, bool) == {a: READ}
        assert dict(poller.registered) == {}
        fds.write(d, b"x")
        assert_calm(poller)
    else:
        # These look at the number anew in each call: it is simply the new file.
        assert_calm(poller)
        fds.write(d, b"x")
        assert poller.poll(LONG) == [(c, READ)]


def test_a_duplicate_does_not_keep_a_closed_descriptor_alive(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    c, d = fds.pair()
    poller.register(a, READ)
    poller.register(c, READ)
    fds.dup(a)
    fds.close(a)
    poller.unregister(a)
    fds.write(b, b"x")
    assert_calm(poller)
    fds.write(d, b"x")
    assert poller.poll(LONG) == [(c, READ)]


def test_a_descriptor_closed_behind_our_back_with_a_duplicate_is_reported_and_dropped(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    fds.dup(a)
    fds.close(a)
    assert poll_until(poller, bool) == {a: READ}
    fds.write(b, b"x")
    assert_calm(poller)


def test_a_duplicate_is_not_mistaken_for_the_new_file_of_its_old_number(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    c, d = fds.pair()
    poller.register(a, READ)
    duplicate = fds.dup(a)
    fds.close(a)
    poller.unregister(a)
    c = fds.move(c, a)
    poller.register(c, READ)
    fds.write(b, b"old")
    assert_calm(poller)
    fds.write(d, b"new")
    assert poller.poll(LONG) == [(c, READ)]
    assert fds.read(c, 9) == b"new"
    assert fds.read(duplicate, 9) == b"old"
    assert_calm(poller)


def test_old_and_new_file_of_one_number_are_one_event(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    c, d = fds.pair()
    poller.register(a, BOTH)
    fds.dup(a)
    fds.close(a)
    c = fds.move(c, a)
    poller.register(c, READ)
    fds.write(b, b"old")
    fds.write(d, b"new")
    assert poller.poll(LONG) == [(c, READ)]
    fds.read(c, 9)
    assert_calm(poller)


def test_a_number_with_a_dead_entry_may_be_closed_again(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    c, _ = fds.pair()
    poller.register(a, READ)
    fds.dup(a)
    fds.close(a)
    poller.unregister(a)
    c = fds.move(c, a)
    poller.register(c, READ)
    fds.write(b, b"old")
    fds.close(c)
    assert poll_until(poller, bool) == {c: READ}
    assert dict(poller.registered) == {}
    assert_calm(poller)


def test_a_file_that_returns_to_its_old_number_can_be_registered(
    poller: Poller, fds: Descriptors
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    duplicate = fds.dup(a)
    fds.close(a)
    poller.unregister(a)
    fds.move(duplicate, a)
    poller.register(a, READ)
    assert_calm(poller)
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]


def test_a_copy_in_a_forked_child_does_not_make_it_spin(
    poller: Poller, fds: Descriptors, native: Native
) -> None:
    a, b = fds.pair()
    c, d = fds.pair()
    end, hold = fds.pipe()
    os.set_blocking(end, True)
    poller.register(a, READ)
    poller.register(c, READ)

    def child() -> bool:
        fds.close(hold)
        return bool(fds.read(end, 1) == b"")

    pid = native.child(child)
    try:
        fds.close(a)
        fds.write(b, b"x")
        seen: dict[int, int] = poll_until(poller, bool)
        assert seen == {a: READ}
        poller.unregister(a)
        assert_calm(poller)
        fds.write(d, b"x")
        assert poller.poll(LONG) == [(c, READ)]
    finally:
        fds.close(hold)
        native.wait(pid)


def test_descriptors_that_come_and_go_leave_nothing_behind(
    poller: Poller, fds: Descriptors
) -> None:
    for turn in range(300):
        a, b = fds.pair()
        poller.register(a, READ)
        fds.write(b, b"x")
        assert poller.poll(LONG) == [(a, READ)]
        if turn % 2:
            poller.unregister(a)
            fds.close(a, b)
        else:
            fds.close(a, b)
            poller.unregister(a)
    assert len(poller.registered) == 0
    assert_calm(poller)


# -- time ------------------------------------------------------------------------------
@pytest.mark.parametrize("timeout", [0, 0.0, -0.0, -1, -1e9, float("-inf")])
def test_zero_and_negative_timeouts_only_look(
    poller: Poller, fds: Descriptors, timeout: float
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    begin = monotonic()
    for _ in range(10):
        assert poller.poll(timeout) == []
    assert monotonic() - begin < LONG / 10


@pytest.mark.parametrize("timeout", [0.0004, 0.02, 0.15, 0.31])
def test_a_timeout_is_never_cut_short(poller: Poller, fds: Descriptors, timeout: float) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    begin = monotonic()
    assert poller.poll(timeout) == []
    assert timeout <= monotonic() - begin < timeout + LONG


@pytest.mark.parametrize("timeout", [None, float("inf"), 1e30, 2.0**40, 10**7, LONG])
def test_long_waits_end_with_the_first_event(
    poller: Poller, fds: Descriptors, native: Native, timeout: float | None
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)

    def later() -> None:
        native.sleep(0.05)
        fds.write(b, b"x")

    with native.thread(later):
        assert poller.poll(timeout) == [(a, READ)]


def test_a_timeout_that_is_no_number_is_refused(poller: Poller) -> None:
    with pytest.raises(ValueError, match="nan"):
        poller.poll(float("nan"))


@pytest.mark.parametrize("max_events", [0, -1])
def test_a_poll_for_no_events_is_refused(poller: Poller, max_events: int) -> None:
    with pytest.raises(ValueError, match="one event or more"):
        poller.poll(0, max_events)


@pytest.mark.parametrize("max_events", [1, 3, 7])
def test_a_small_max_events_starves_nobody(
    poller: Poller, fds: Descriptors, max_events: int
) -> None:
    members = {a for a, _ in fds.pairs(10)}
    for fd in members:
        poller.register(fd, WRITE)
    seen: dict[int, int] = dict.fromkeys(members, 0)
    for _ in range(60):
        events = poller.poll(LONG, max_events)
        assert 1 <= len(events) <= max_events
        for fd, _ in events:
            seen[fd] += 1
    assert min(seen.values()) >= 0.5 * max(seen.values())


# -- wake-up ---------------------------------------------------------------------------
def test_a_wakeup_before_the_poll_is_not_lost(poller: Poller) -> None:
    poller.wakeup()
    assert poller.poll(None) == []


def test_wakeups_are_merged_into_one(poller: Poller) -> None:
    for _ in range(1000):
        poller.wakeup()
    assert poller.poll(None) == []
    assert_calm(poller)


def test_a_wakeup_ends_a_wait_from_another_thread(poller: Poller, native: Native) -> None:
    def later() -> None:
        native.sleep(0.05)
        poller.wakeup()

    with native.thread(later):
        assert poller.poll(None) == []
    assert poller.poll(0) == []


def test_wakeups_from_many_threads_are_all_seen(poller: Poller, native: Native) -> None:
    """Each thread queues first and wakes then: whatever is queued is seen by a poll."""
    queue: list[int] = []

    def produce() -> None:
        for number in range(200):
            queue.append(number)
            poller.wakeup()

    taken = 0
    with native.thread(produce), native.thread(produce), native.thread(produce):
        deadline = monotonic() + LONG
        while taken < 600:
            assert poller.poll(LONG) == []
            assert monotonic() < deadline
            while queue:
                queue.pop()
                taken += 1


def test_a_wakeup_in_a_signal_handler_ends_the_wait(poller: Poller) -> None:
    # Again and again: a signal that comes just before the system call does not interrupt it.
    with alarm(lambda *_: poller.wakeup(), 0.05, 0.05):
        assert poller.poll(None) == []


def test_a_wakeup_hides_no_event_and_is_none(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    fds.write(b, b"x")
    poller.wakeup()
    assert poll_until(poller, bool) == {a: READ}
    fds.read(a, 1)
    poller.poll(0)
    assert_calm(poller)


def test_a_wakeup_is_seen_while_everything_is_ready(poller: Poller, fds: Descriptors) -> None:
    for a, _ in fds.pairs(5):
        poller.register(a, WRITE)
    poller.wakeup()
    for _ in range(20):
        poller.poll(0, 2)
    for fd in list(poller.registered):
        poller.unregister(fd)
    assert_calm(poller)


# -- signals ---------------------------------------------------------------------------
def test_an_interrupted_wait_goes_on_with_the_time_that_is_left(
    poller: Poller, fds: Descriptors
) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)
    calls: list[int] = []
    with alarm(lambda *_: calls.append(1), 0.02, 0.02):
        for _ in range(5):  # fourteen in each, unless the machine stands still
            begin = monotonic()
            assert poller.poll(0.3) == []
            assert 0.3 <= monotonic() - begin < LONG
            if len(calls) >= 3:
                break
    assert len(calls) >= 3


def test_what_a_handler_raises_comes_out_and_nothing_is_lost(
    poller: Poller, fds: Descriptors
) -> None:
    class Stop(Exception):
        pass

    raised: list[bool] = []

    def handler(*_: object) -> None:
        if not raised:
            raised.append(True)
            raise Stop

    a, b = fds.pair()
    poller.register(a, READ)
    with alarm(handler, 0.05, 0.05), pytest.raises(Stop):
        poller.poll(None)
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]
    assert dict(poller.registered) == {a: READ}


def test_a_handler_may_unregister_what_is_waited_for(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)

    def handler(*_: object) -> None:
        poller.unregister(a)
        fds.write(b, b"x")
        poller.wakeup()

    with alarm(handler, 0.05, 0.05):
        assert poller.poll(LONG) == []
    poller.poll(0)  # the handler may have run once more
    assert_calm(poller)


def test_a_handler_may_close_the_poller(poller: Poller, fds: Descriptors) -> None:
    a, _ = fds.pair()
    poller.register(a, READ)

    def handler(*_: object) -> None:
        poller.wakeup()
        poller.close()

    with alarm(handler, 0.05):
        assert poller.poll(LONG) == []
    assert poller.closed


# -- many ------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2_000, 10_000])
def test_many_descriptors(poller: Poller, fds: Descriptors, count: int) -> None:
    needs_descriptors(count)
    if poller.name == "kqueue" and count > 2_000 and not hasattr(select, "kqueue"):
        pytest.skip("the stand-in looks at each ready descriptor in each poll")
    pairs = fds.pairs(count // 2)
    members = [fd for pair in pairs for fd in pair]
    if poller.name == "select":
        with pytest.raises(BadDescriptorError, match=r"FD_SETSIZE.*HUB_POLLER"):
            poller.register(max(members), READ)
        assert dict(poller.registered) == {}
        return
    for fd in members:
        poller.register(fd, READ)
    assert len(poller.registered) == count
    for a, b in (pairs[0], pairs[len(pairs) // 2], pairs[-1]):
        fds.write(b, b"x")
        assert poller.poll(LONG) == [(a, READ)]
        fds.read(a, 1)
    for fd in members:
        poller.register(fd, WRITE)
    seen: set[int] = set()
    polls = 0
    while seen != set(members):
        events = poller.poll(LONG)
        assert 0 < len(events) <= 256
        seen.update(fd for fd, _ in events)
        polls += 1
        assert polls <= 2 * count / 256, "some are never reported"
    for fd in members:
        poller.unregister(fd)
    assert len(poller.registered) == 0
    assert poller.poll(0) == []


# -- forks -----------------------------------------------------------------------------
def test_a_forked_child_leaves_the_interest_of_the_parent_alone(
    poller: Poller, fds: Descriptors, native: Native
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)

    def child() -> bool:
        poller.unregister(a)
        poller.abandon()
        poller.unregister(a)
        poller.abandon()
        poller.close()
        return poller.closed and len(poller.registered) == 0

    for _ in range(20):
        pid = native.child(child)
        fds.write(b, b"x")
        assert poller.poll(LONG) == [(a, READ)]
        fds.read(a, 1)
        native.wait(pid)
        fds.write(b, b"x")
        assert poller.poll(LONG) == [(a, READ)]
        fds.read(a, 1)
    poller.wakeup()
    assert poller.poll(LONG) == []
    assert_calm(poller)


def test_an_inherited_poller_refuses_to_work_and_says_why(
    poller: Poller, fds: Descriptors, native: Native
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    poller.wakeup()

    def child() -> bool:
        assert poller.closed
        assert "inherited" in repr(poller)
        for use in (
            lambda: poller.poll(0),
            lambda: poller.register(b, READ),
            lambda: poller.wake_fileno(),
        ):
            with pytest.raises(PollerClosedError, match="parent process"):
                use()
        poller.unregister(a)
        poller.wakeup()
        poller.close()
        return True

    native.wait(native.child(child))
    # The wake-up of before the fork is still there, and only that one.
    assert poller.poll(None) == []
    assert_calm(poller)
    fds.write(b, b"x")
    assert poller.poll(LONG) == [(a, READ)]


def test_a_child_makes_a_poller_of_its_own(
    make_poller: Callable[[], Poller], fds: Descriptors, native: Native
) -> None:
    a, b = fds.pair()
    mine = make_poller()
    mine.register(a, READ)

    def child() -> bool:
        before = own_descriptors()
        mine.abandon()
        assert own_descriptors() < before
        other = make_poller()
        c, d = fds.pair()
        other.register(c, READ)
        fds.write(d, b"x")
        return other.poll(LONG) == [(c, READ)]

    native.wait(native.child(child))
    assert mine.poll(0) == []
    fds.write(b, b"x")
    assert mine.poll(LONG) == [(a, READ)]


# -- for other loops -------------------------------------------------------------------
@unwatchable
def test_pollers_without_a_kernel_object_say_so(poller: Poller) -> None:
    with pytest.raises(UnsupportedError, match=r"epoll or kqueue"):
        poller.fileno()
    with pytest.raises(UnsupportedError, match=r"epoll or kqueue"):
        poller.set_timer(1.0)


@watchable
def test_fileno_is_readable_exactly_while_something_is_ready(
    poller: Poller, fds: Descriptors, original: Callable[..., Any]
) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    number = poller.fileno()
    assert not pollable(original, number, 0)
    fds.write(b, b"x")
    assert pollable(original, number, LONG)
    assert poller.poll(0) == [(a, READ)]
    assert pollable(original, number, 0)
    fds.read(a, 1)
    assert poller.poll(0) == []
    assert not pollable(original, number, 0)
    poller.unregister(a)
    fds.write(b, b"x")
    assert not pollable(original, number, 0)
    assert poller.fileno() == number


@watchable
def test_fileno_is_readable_while_a_wakeup_is_pending(
    poller: Poller, original: Callable[..., Any]
) -> None:
    poller.wakeup()
    assert pollable(original, poller.fileno(), LONG)
    assert poller.poll(0) == []
    assert not pollable(original, poller.fileno(), 0)


@watchable
def test_a_foreign_loop_hears_of_what_is_registered_later(
    poller: Poller, make_poller: Callable[[], Poller], fds: Descriptors
) -> None:
    outer = make_poller()
    outer.register(poller.fileno(), READ)
    assert outer.poll(0) == []
    a, b = fds.pair()
    poller.register(a, READ)
    fds.write(b, b"x")
    assert outer.poll(LONG) == [(poller.fileno(), READ)]
    fds.read(a, 1)
    assert poller.poll(0) == []
    assert outer.poll(0) == []
    outer.unregister(poller.fileno())


@watchable
def test_a_foreign_loop_goes_on_hearing_after_a_dead_entry_was_removed(
    poller: Poller, make_poller: Callable[[], Poller], fds: Descriptors
) -> None:
    outer = make_poller()
    number = poller.fileno()
    outer.register(number, READ)
    a, b = fds.pair()
    c, d = fds.pair()
    poller.register(a, READ)
    poller.register(c, READ)
    poller.set_timer(0.05)
    fds.dup(a)
    fds.close(a)
    poller.unregister(a)
    fds.write(b, b"x")
    assert poller.poll(0) == []
    assert outer.poll(LONG) == [(number, READ)]  # the timer
    assert poller.poll(0) == []
    assert_calm(outer)
    fds.write(d, b"x")
    assert outer.poll(LONG) == [(number, READ)]
    assert poller.poll(0) == [(c, READ)]
    poller.wakeup()
    fds.read(c, 1)
    assert outer.poll(LONG) == [(number, READ)]
    assert poller.poll(0) == []
    assert_calm(outer)
    assert poller.fileno() == number
    outer.unregister(number)


@watchable
def test_the_timer_makes_fileno_readable_once(poller: Poller, original: Callable[..., Any]) -> None:
    number = poller.fileno()
    begin = monotonic()
    poller.set_timer(0.06)
    assert not pollable(original, number, 0)
    assert pollable(original, number, LONG)
    assert monotonic() - begin >= 0.06
    assert poller.poll(0) == []
    assert not pollable(original, number, 0)
    assert_calm(poller)


@watchable
def test_the_timer_ends_a_wait(poller: Poller) -> None:
    begin = monotonic()
    poller.set_timer(0.06)
    assert poller.poll(LONG) == []
    assert 0.05 <= monotonic() - begin < LONG / 2


@pytest.mark.parametrize("delay", [0, -0.0, -5, 1e-12])
@watchable
def test_a_timer_that_is_due_fires_at_once(
    poller: Poller, original: Callable[..., Any], delay: float
) -> None:
    poller.set_timer(delay)
    assert pollable(original, poller.fileno(), LONG)
    assert poller.poll(None) == []
    assert_calm(poller)


@watchable
def test_setting_the_timer_again_replaces_it(poller: Poller, original: Callable[..., Any]) -> None:
    poller.set_timer(0)
    poller.set_timer(LONG)
    assert not pollable(original, poller.fileno(), 0.05)
    poller.set_timer(0.02)
    assert pollable(original, poller.fileno(), LONG / 2)
    poller.set_timer(1e30)
    assert poller.poll(0.05) == []
    assert not pollable(original, poller.fileno(), 0)


@watchable
def test_the_timer_can_be_disarmed(poller: Poller, original: Callable[..., Any]) -> None:
    poller.set_timer(None)
    poller.set_timer(0.02)
    poller.set_timer(None)
    poller.set_timer(None)
    assert not pollable(original, poller.fileno(), 0.1)
    poller.set_timer(0)
    assert pollable(original, poller.fileno(), LONG)
    poller.set_timer(None)
    assert_calm(poller)


# -- the end ---------------------------------------------------------------------------
def test_close_is_idempotent_and_final(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    poller.register(a, READ)
    assert not poller.closed
    for _ in range(2):
        poller.close()
        assert poller.closed
    poller.wakeup()
    poller.unregister(a)
    assert len(poller.registered) == 0
    for use in (
        lambda: poller.register(b, READ),
        lambda: poller.poll(0),
        lambda: poller.poll(None),
        lambda: poller.wake_fileno(),
    ):
        with pytest.raises(PollerClosedError, match="closed; create a new one"):
            use()
    poller.abandon()
    os.fstat(a)


@watchable
def test_a_closed_poller_has_no_fileno_and_no_timer(poller: Poller) -> None:
    poller.close()
    with pytest.raises(PollerClosedError):
        poller.fileno()
    with pytest.raises(PollerClosedError):
        poller.set_timer(1.0)


@pytest.mark.parametrize("end", ["close", "abandon", "with", "garbage"])
def test_the_end_gives_back_every_descriptor(
    request: pytest.FixtureRequest,
    original: Callable[..., Any],
    make_poller: Callable[[], Poller],
    fds: Descriptors,
    end: str,
) -> None:
    make_poller().close()  # what the first use loads and keeps
    kind = type(make_poller())
    lookup = with_kqueue(original) if kind.name == "kqueue" else original
    a, _ = fds.pair()
    before = own_descriptors()
    poller = kind(lookup)
    poller.register(a, READ)
    try:
        poller.set_timer(LONG)
        poller.fileno()
    except UnsupportedError:
        pass
    assert own_descriptors() > before
    if end == "close":
        poller.close()
    elif end == "abandon":
        poller.abandon()
    elif end == "with":
        with poller as same:
            assert same is poller
    else:
        del poller
    assert own_descriptors() == before


def test_repr_shows_live_counts(poller: Poller, fds: Descriptors) -> None:
    a, b = fds.pair()
    assert "0 registered" in repr(poller)
    poller.register(a, BOTH)
    poller.register(b, READ)
    assert "2 registered, 2 reading, 1 writing" in repr(poller)
    poller.unregister(b)
    assert type(poller).__name__ in repr(poller)
    assert "1 registered, 1 reading, 1 writing" in repr(poller)
    poller.close()
    assert "closed" in repr(poller)


@watchable
def test_repr_shows_a_timer_that_is_set(poller: Poller) -> None:
    assert "timer" not in repr(poller)
    poller.set_timer(0.01)
    assert "timer set" in repr(poller)
    assert poller.poll(LONG) == []
    assert "timer" not in repr(poller)
