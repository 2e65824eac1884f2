"""The test doubles keep the promises of what they stand for."""

from __future__ import annotations

import inspect

import pytest

import hub
from hub.pollers import READ, WRITE
from hub.streams import Stream
from hub.testing import FakeClock, MemoryStream, ScriptedPoller, scripted_hub


class Handler:
    def __init__(self) -> None:
        self.data = b""
        self.lost: list[BaseException | None] = []
        self.resumed = 0

    def data_received(self, data: bytes) -> None:
        if data == b"bad":
            raise ValueError("bad")
        self.data += data

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)

    def write_resumed(self) -> None:
        self.resumed += 1


def test_scripted_readiness_reaches_the_callbacks() -> None:
    loop = scripted_hub(FakeClock())
    seen: list[str] = []
    loop.add_reader(5, seen.append, "read 5")
    loop.add_writer(5, seen.append, "write 5")
    loop.add_reader(6, seen.append, "read 6")
    poller = loop.poller
    assert isinstance(poller, ScriptedPoller)
    poller.report((5, READ | WRITE), (6, READ | WRITE), (7, READ))
    loop.run_once(1)
    assert seen == ["read 5", "write 5", "read 6"]
    loop.close()


def test_scripted_poller_refuses_to_wait_for_ever() -> None:
    loop = scripted_hub(FakeClock())
    with pytest.raises(hub.UnsupportedError, match="for ever"):
        loop.run_once(None)
    loop.wakeup()
    assert loop.run_once(None) == 0
    loop.close()


def test_slices_end_and_nothing_reported_is_lost() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    seen: list[int] = []

    def slow(fd: int) -> None:
        seen.append(fd)
        clock.advance(0.004)

    for fd in range(10):
        loop.add_reader(fd, slow, fd)
    poller = loop.poller
    assert isinstance(poller, ScriptedPoller)
    poller.report(*((fd, READ) for fd in range(10)))
    assert loop.run_once(0) == 2
    while len(seen) < 10:
        assert loop.run_once(0) <= 2
    assert seen == list(range(10))
    assert loop.stats.largest_slice < 0.01
    loop.close()


def test_slow_callback_is_counted() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    loop.call_soon(clock.advance, 1.0)
    loop.run_once(0)
    assert loop.stats.slow_callbacks == 1
    assert "slow_callbacks=1" in repr(loop.stats)
    loop.close()


def test_error_hook_that_fails_is_survived() -> None:
    loop = scripted_hub(FakeClock())

    def hook(error: BaseException, callback: object) -> None:
        raise RuntimeError("the hook itself")

    loop.on_error = hook
    seen: list[int] = []
    loop.call_soon(lambda: 1 / 0)
    loop.call_soon(seen.append, 1)
    loop.run_once(0)
    assert seen == [1]
    assert loop.stats.errors == 1
    loop.close()


def test_memory_stream_behaves_like_a_stream() -> None:
    handler = Handler()
    stream = MemoryStream(handler, high_water=10)
    stream.start()
    stream.write(b"one")
    stream.accept(False)
    stream.write(b"twotwotwotwo", flush=True)
    stream.flush()
    assert stream.written == b"one"
    assert stream.above_high_water
    assert stream.buffered == 12
    stream.accept(True)
    assert handler.resumed == 1
    assert stream.take_written() == b"onetwotwotwotwo"
    assert stream.take_written() == b""
    stream.pause_reading()
    stream.feed(b"hel")
    assert handler.data == b""
    stream.resume_reading()
    stream.feed(b"lo")
    assert handler.data == b"hello"
    stream.end()
    stream.close()
    assert [type(error) for error in handler.lost] == [hub.StreamClosedError]
    with pytest.raises(hub.StreamClosedError, match="closed"):
        stream.write(b"x")


def test_memory_stream_ends_with_its_handler_s_error() -> None:
    handler = Handler()
    stream = MemoryStream(handler)
    stream.feed(b"bad")
    assert [type(error) for error in handler.lost] == [ValueError]
    assert stream.closed


@pytest.mark.parametrize(
    "name", ["write", "flush", "expect", "pause_reading", "resume_reading", "abort", "close"]
)
def test_memory_stream_is_called_as_a_stream_is(name: str) -> None:
    ours, theirs = getattr(MemoryStream, name), getattr(Stream, name)
    assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters


def test_memory_stream_takes_another_handler_and_writes_of_both_kinds() -> None:
    first, second = Handler(), Handler()
    stream = MemoryStream(first)
    stream.expect(10)
    stream.feed(b"a")
    stream.handler = second
    stream.feed(b"b")
    assert (first.data, second.data) == (b"a", b"b")
    stream.write(b"x", eager=False)
    stream.write([b"y", b"z"])
    assert stream.written == b"xyz"
    stream.abort()
    assert (len(first.lost), len(second.lost)) == (0, 1)
