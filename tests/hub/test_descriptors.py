"""Tasks that wait for one descriptor hear of its end, whoever brings it about."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub import _descriptors
from hub._descriptors import AUDIT_BATCH, _DescriptorWait
from hub.environment import Environment
from hub.testing import FakeClock, scripted_hub
from tests.support.sockets import native_pair
from tests.support.tasks import LONG, until

pytestmark = pytest.mark.green_matrix


@pytest.fixture
def pair(env: Environment) -> Iterator[tuple[Any, Any]]:
    ours, theirs = native_pair(env)
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_descriptors, "AUDIT_INTERVAL", 0.02)


def waiting(env: Environment, wait: Callable[..., bool], fd: int) -> Any:
    """Start a task that waits for `fd`, and return it when the hub knows."""
    loop = hub.get_hub()
    handles = loop.readers if wait == env.wait_readable else loop.writers
    before = handles.get(fd)
    task = env.spawn(wait, fd, LONG)
    until(env, lambda: handles.get(fd) is not before)
    return task


def fill(sock: Any) -> None:
    try:
        while True:
            sock.send(bytes(65536))
    except BlockingIOError:
        pass


@pytest.mark.parametrize("direction", ["readable", "writable"])
def test_a_descriptor_that_is_closed_while_all_is_idle(
    env: Environment, pair: Any, direction: str
) -> None:
    fill(pair[0])
    wait = env.wait_readable if direction == "readable" else env.wait_writable
    task = waiting(env, wait, pair[0].fileno())
    pair[0].close()
    with pytest.raises(hub.BadDescriptorError, match="closed"):
        task.result(5)


def test_a_number_that_belongs_to_another_file_by_now(env: Environment, pair: Any) -> None:
    ours, theirs = native_pair(env)
    fd = ours.fileno()
    task = waiting(env, env.wait_readable, fd)
    os.dup2(pair[0].fileno(), fd)
    try:
        with pytest.raises(hub.BadDescriptorError, match="closed"):
            task.result(5)
    finally:
        ours.close()
        theirs.close()


@pytest.mark.parametrize("how", ["remove", "remove_reader", "add_reader", "reap"])
def test_a_descriptor_that_the_hub_is_told_to_drop(env: Environment, pair: Any, how: str) -> None:
    loop = hub.get_hub()
    fd = pair[0].fileno()
    task = waiting(env, env.wait_readable, fd)
    arguments = {"add_reader": (fd, int), "reap": (fd, pair[0].close)}.get(how, (fd,))
    loop.run_threadsafe(getattr(loop, how), *arguments, timeout=LONG)
    told = "another callback by add_reader" if how == "add_reader" else "removed from the hub"
    with pytest.raises(hub.BadDescriptorError, match=told):
        task.result(LONG)
    # The end of the wait takes nothing away from whoever has it now.
    assert loop.run_threadsafe(loop.remove, fd, timeout=LONG) is (how == "add_reader")


def test_a_stream_that_closes_ends_the_waits_for_its_socket(env: Environment, pair: Any) -> None:
    class Handler:
        def data_received(self, data: bytes) -> None: ...
        def connection_lost(self, error: BaseException | None) -> None: ...
        def write_resumed(self) -> None: ...

    fill(pair[0])
    stream = hub.Stream(hub.get_hub(), pair[0], Handler())
    stream.start()
    task = waiting(env, env.wait_writable, pair[0].fileno())
    stream.abort()
    with pytest.raises(hub.BadDescriptorError, match="closed"):
        task.result(LONG)


def test_looks_end_with_the_waits(env: Environment, pair: Any) -> None:
    loop = hub.get_hub()
    assert not env.wait_readable(pair[0].fileno(), 0.001)
    audit = loop.audit
    assert audit is not None
    until(env, lambda: audit._timer is None)  # one that another test has left takes a second
    pair[1].send(b"x")
    assert env.wait_readable(pair[0].fileno(), LONG)
    assert not loop.run_threadsafe(loop.remove, pair[0].fileno(), timeout=LONG)


def test_a_look_takes_a_few_and_comes_to_all(env: Environment) -> None:
    clock = FakeClock()
    close = env.original("os", "close")  # gevent's own leaves it to a turn of its loop
    pipes = [os.pipe() for _ in range(AUDIT_BATCH + 36)]
    with scripted_hub(clock) as loop:
        waits = [_DescriptorWait(loop, reader, True) for reader, _ in pipes]
        for wait in waits:
            loop.call_soon(wait.start)
        loop.run_once(0)
        assert not any(wait.error for wait in waits)
        for index in (0, AUDIT_BATCH, -1):
            close(pipes[index][0])
        clock.advance(0.021)
        loop.run_once(0)
        assert [index for index, wait in enumerate(waits) if wait.error] == [0]
        clock.advance(0.021)
        loop.run_once(0)
        assert [wait.error is None for wait in waits].count(False) == 3
        for index in (0, AUDIT_BATCH, -1):
            assert isinstance(waits[index].error, hub.BadDescriptorError)
            assert waits[index].waiter.woken
        assert len(loop.readers) == len(waits) - 3
    for index, (reader, writer) in enumerate(pipes):
        close(writer)
        if index not in (0, AUDIT_BATCH, len(pipes) - 1):
            close(reader)


@pytest.mark.parametrize("fd", [-1, 2**40, "x", None, [1], 1.5, True])
def test_what_is_no_descriptor_is_refused(env: Environment, fd: Any) -> None:
    for wait in (env.wait_readable, env.wait_writable):
        with pytest.raises(hub.BadDescriptorError):
            wait(fd, 1)
