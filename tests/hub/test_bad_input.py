"""Bad input: a typed error that says what and how to mend it; the hub and all others go on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from hub import environment
from hub.environment import Environment
from hub.pollers import available_pollers
from tests.support.sockets import native_pair
from tests.support.tasks import LONG, run_natively

pytestmark = pytest.mark.green_matrix

Call = Callable[[hub.Hub], object]


@pytest.fixture(params=available_pollers(hub.get_environment().original))
def loop(request: pytest.FixtureRequest, env: Environment) -> Iterator[hub.Hub]:
    """A hub of each poller; afterwards it still serves a descriptor, a timer and a call."""
    ours, theirs = native_pair(env)
    seen: list[object] = []
    with ours, theirs, hub.Hub(poller=request.param) as made:
        made.add_reader(ours.fileno(), lambda: seen.append(ours.recv(1)))
        yield made
        theirs.send(b"x")
        made.call_soon(seen.append, "call")
        made.call_later(0, seen.append, "timer")
        while len(seen) < 3:
            assert made.run_once(LONG)
        assert set(seen) == {b"x", "call", "timer"}


def closed_descriptor() -> int:
    ours, theirs = native_pair(hub.get_environment())
    with ours, theirs:
        return int(ours.fileno())


DESCRIPTORS: dict[str, Callable[[], Any]] = {
    "negative": lambda: -1,
    "closed": closed_descriptor,
    "huge": lambda: 2**40,
    "string": lambda: "x",
    "none": lambda: None,
    "float": lambda: 1.5,
    "bool": lambda: True,
    "unhashable": lambda: [1],
}


@pytest.mark.parametrize("kind", DESCRIPTORS)
@pytest.mark.parametrize("method", ["add_reader", "add_writer"])
def test_descriptors_that_are_none(loop: hub.Hub, method: str, kind: str) -> None:
    before = len(loop.poller.registered)
    with pytest.raises(hub.BadDescriptorError, match="cannot register") as caught:
        getattr(loop, method)(DESCRIPTORS[kind](), int)
    assert isinstance(caught.value, ValueError)
    assert len(loop.poller.registered) == before
    assert not loop.has_work()


def test_a_regular_file_is_refused(loop: hub.Hub) -> None:
    with open(__file__) as file, pytest.raises(hub.BadDescriptorError, match="always ready"):
        loop.add_reader(file.fileno(), int)


@pytest.mark.parametrize("kind", DESCRIPTORS)
def test_unregistered_descriptors_are_not_removed(loop: hub.Hub, kind: str) -> None:
    fd = DESCRIPTORS[kind]()
    assert loop.remove_reader(fd) is loop.remove_writer(fd) is loop.remove(fd) is False


ARGUMENTS: dict[str, Call] = {
    "call_soon": lambda loop: loop.call_soon(None),  # type: ignore[arg-type]
    "call_soon_threadsafe": lambda loop: loop.call_soon_threadsafe(5),  # type: ignore[arg-type]
    "at_turn_end": lambda loop: loop.at_turn_end(None),  # type: ignore[arg-type]
    "call_later": lambda loop: loop.call_later(1, None),  # type: ignore[arg-type]
    "call_at": lambda loop: loop.call_at(1, "x"),  # type: ignore[arg-type]
    "call_repeatedly": lambda loop: loop.call_repeatedly(1, None),  # type: ignore[arg-type]
    "run_threadsafe": lambda loop: loop.run_threadsafe(None),  # type: ignore[arg-type]
    "add_reader": lambda loop: loop.add_reader(0, None),  # type: ignore[arg-type]
    "add_writer": lambda loop: loop.add_writer(0, "x"),  # type: ignore[arg-type]
    "delay string": lambda loop: loop.call_later("1", int),  # type: ignore[arg-type]
    "delay none": lambda loop: loop.call_later(None, int),  # type: ignore[arg-type]
    "delay nan": lambda loop: loop.call_later(float("nan"), int),
    "when string": lambda loop: loop.call_at("x", int),  # type: ignore[arg-type]
    "when nan": lambda loop: loop.call_at(float("nan"), int),
    "interval string": lambda loop: loop.call_repeatedly("x", int),  # type: ignore[arg-type]
    "interval 0": lambda loop: loop.call_repeatedly(0, int),
    "delay huge": lambda loop: loop.call_later(10**400, int),
    "when huge": lambda loop: loop.call_at(-(10**400), int),
    "run_once huge": lambda loop: loop.run_once(10**400),
    "interval tiny": lambda loop: loop.call_repeatedly(1e-320, int),
    "tolerance tiny": lambda loop: loop.call_repeatedly(1, int, tolerance=1e-320),
    "tolerance inf": lambda loop: loop.call_repeatedly(1, int, tolerance=float("inf")),
    "tolerance": lambda loop: loop.call_repeatedly(1, int, tolerance="x"),  # type: ignore[arg-type]
    "run_once": lambda loop: loop.run_once("x"),  # type: ignore[arg-type]
    "run_threadsafe timeout": lambda loop: loop.run_threadsafe(int, timeout="x"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_make_no_sense(loop: hub.Hub, case: str) -> None:
    with pytest.raises(hub.BadArgumentError, match=r"give a function|seconds") as caught:
        ARGUMENTS[case](loop)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, ValueError)
    assert not loop.has_work()
    assert not loop._timers


MAKING: dict[str, tuple[dict[str, Any], type[hub.HubError], str]] = {
    "poller number": ({"poller": 5}, hub.UnknownPollerError, "available here"),
    "poller name": ({"poller": "epol"}, hub.UnknownPollerError, "did you mean 'epoll'"),
    "poller list": ({"poller": ["epoll"]}, hub.UnknownPollerError, "available here"),
    "environment": ({"environment": "gevent"}, hub.UnknownEnvironmentError, "get_environment"),
    "clock": ({"clock": 5}, hub.BadArgumentError, "clock=5"),
    "on_error": ({"on_error": "log"}, hub.BadArgumentError, "on_error='log'"),
    "max_slice": ({"max_slice": "x"}, hub.BadArgumentError, "max_slice"),
}


@pytest.mark.parametrize("case", MAKING)
def test_hubs_that_cannot_be_made(case: str) -> None:
    arguments, kind, text = MAKING[case]
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(kind, match=text):
        hub.Hub(**arguments)
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("name", [5, ["gevent"], "", "gevnt", "GEVENT"])
def test_environments_that_do_not_exist(env: Environment, name: Any) -> None:
    with pytest.raises(hub.UnknownEnvironmentError, match="default, gevent, eventlet"):
        hub.use(name)
    assert hub.get_environment() is env


def test_a_name_in_hub_environment_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_ENVIRONMENT", "gevnt")
    monkeypatch.setattr(environment, "_chosen", None)
    monkeypatch.setattr(environment, "_variable", None)  # it has not been read yet
    with pytest.raises(hub.UnknownEnvironmentError, match=r"'gevent'.* HUB_ENVIRONMENT"):
        hub.get_environment()


def test_a_name_in_hub_poller_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HUB_POLLER", "pol")
    with pytest.raises(hub.UnknownPollerError, match="HUB_POLLER; did you mean 'poll'"):
        hub.Hub()


class Handler:
    def data_received(self, data: bytes) -> None: ...
    def connection_lost(self, error: BaseException | None) -> None: ...
    def write_resumed(self) -> None: ...


STREAMS: dict[str, tuple[Any, ...]] = {
    "number": (5,),
    "none": (None,),
    "bytes": (b"/tmp/socket",),
    "host only": (("localhost",),),
    "host number": ((5, 5672),),
    "host none": ((None, 5672),),
    "port none": (("localhost", None),),
    "port string": (("localhost", "x"),),
    "port bool": (("localhost", True),),
    "port 0": (("localhost", 0),),
    "port negative": (("localhost", -1),),
    "port too high": (("localhost", 70_000),),
    "handler": (("localhost", 1), object()),
    "timeout none": (("localhost", 1), Handler(), None),
    "timeout string": (("localhost", 1), Handler(), "5"),
    "tls": (("localhost", 1), Handler(), 5, True),
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_that_cannot_be_opened(case: str) -> None:
    address, handler, timeout, tls = (
        *STREAMS[case],
        *(None, Handler(), 5, None)[len(STREAMS[case]) :],
    )
    with pytest.raises(hub.BadArgumentError):
        hub.open_stream(address, handler, timeout=timeout, tls=tls)


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "string": ({"keepalive_idle": "60"}, "keepalive_idle is a whole number, not '60'"),
    "float": ({"send_buffer_bytes": 1.5}, "send_buffer_bytes is a whole number, not 1.5"),
    "huge": ({"receive_buffer_bytes": 2**40}, "receive_buffer_bytes"),
    "no bool": ({"nodelay": "no"}, "nodelay is a whole number, not 'no'"),
    "timeout string": ({"user_timeout": "5"}, "user_timeout needs a number of seconds"),
    "timeout nan": ({"user_timeout": float("nan")}, "user_timeout needs a number of seconds"),
    "timeout inf": ({"user_timeout": float("inf")}, "user_timeout ends at"),
    "extra": ({"extra": {(socket.IPPROTO_TCP, socket.TCP_NODELAY): "1"}}, "TCP_NODELAY is a"),
    "extra of all": ({"extra": {(socket.SOL_SOCKET, socket.SO_SNDBUF): None}}, "SO_SNDBUF is a"),
    "extra unknown": ({"extra": {(77, 78): "1"}}, r"option \(77, 78\) is a"),
    "extra key": ({"extra": {"TCP_NODELAY": 1}}, "'TCP_NODELAY' of further"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_socket_options_that_are_none(case: str) -> None:
    given, text = OPTIONS[case]
    with pytest.raises(hub.BadArgumentError, match=text):
        hub.SocketOptions(**given)


def test_a_poller_has_one_hub(env: Environment) -> None:
    poller = hub.create_poller()
    with hub.Hub(poller=poller) as first:
        for shared in (poller, hub.get_hub().poller):
            with pytest.raises(hub.BadArgumentError, match=f"give its name, '{shared.name}'"):
                hub.Hub(poller=shared)
        first.call_soon(int)
        assert first.run_once(0) == 1


def test_pollers_are_those_from_before_the_patching(env: Environment) -> None:
    assert hub.available_pollers() == available_pollers(env.original)
    for name in (None, *hub.available_pollers()):
        with hub.create_poller(name) as poller:
            assert poller.name == (name or hub.get_hub().poller.name)


def a_stream(env: Environment) -> tuple[hub.Stream, Any]:
    ours, theirs = native_pair(env)
    loop = hub.get_hub()
    theirs.setblocking(False)
    stream = hub.Stream(loop, ours, Handler())
    return stream, theirs


@pytest.mark.parametrize("data", ["text", None, 5, ["x"], [1]])
def test_what_is_no_bytes_is_not_written(env: Environment, data: Any) -> None:
    stream, theirs = a_stream(env)
    for message in (b"one;", data, b"two;", data):
        if message is data:
            with pytest.raises(hub.BadArgumentError, match=r"sends bytes, not .*encode"):
                stream.write(message)
        else:
            stream.write(message)
    stream.close(timeout=LONG)
    assert theirs.recv(100) == b"one;two;"
    theirs.close()


def test_a_buffer_that_changes_is_copied(env: Environment) -> None:
    stream, theirs = a_stream(env)
    stream.coalesce = True
    given = bytearray(b"0000")
    for number in range(9):  # more than are sent at once
        given[3] = 48 + number
        stream.write(memoryview(given) if number % 2 else given)
    given[:] = b"gone"
    stream.close(timeout=LONG)
    assert theirs.recv(100) == b"".join(b"%04d" % number for number in range(9))
    theirs.close()


def test_a_close_that_may_wait_is_refused_in_a_callback(env: Environment) -> None:
    stream, theirs = a_stream(env)
    data = b"x" * 4_000_000  # more than the kernel takes
    stream.write(data)
    stream.write(b"the end")
    with pytest.raises(hub.BlockingCallError):
        stream.hub.run_threadsafe(stream.close, 1, timeout=LONG)
    assert not stream.closed
    got = bytearray()
    theirs.setblocking(True)
    closing = env.spawn(stream.close, LONG)
    while not got.endswith(b"the end"):
        assert env.wait_readable(theirs.fileno(), LONG)
        got += theirs.recv(1_000_000)
    closing.result(LONG)
    assert len(got) == len(data) + len(b"the end")
    theirs.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_streams_are_not_opened_in_a_callback(env: Environment, host: str) -> None:
    with env.original("socket", "socket")() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(5)
        address = host, listener.getsockname()[1]
        with pytest.raises(hub.BlockingCallError):
            hub.get_hub().run_threadsafe(
                lambda: hub.open_stream(address, Handler(), timeout=LONG), timeout=LONG
            )


@pytest.mark.parametrize("host", ["a\0b", "a" * 300, ".", "no such host.invalid"])
def test_hosts_that_are_no_names(host: str) -> None:
    with pytest.raises(hub.StreamError):
        hub.open_stream((host, 1), Handler(), timeout=LONG)


USES: dict[str, Call] = {
    "call_soon": lambda loop: loop.call_soon(int),
    "call_later": lambda loop: loop.call_later(1, int),
    "add_reader": lambda loop: loop.add_reader(0, int),
    "remove": lambda loop: loop.remove(0),
    "run_once": lambda loop: loop.run_once(0),
    "run_forever": lambda loop: loop.run_forever(),
    "fileno": lambda loop: loop.fileno(),
    "close": lambda loop: loop.close(),
}


@pytest.mark.parametrize("case", USES)
def test_use_from_a_foreign_native_thread(env: Environment, case: str) -> None:
    if not env.green and case in ("run_once", "run_forever", "fileno", "close"):
        pytest.skip("under default any thread may run the hub, and close it")
    loop = hub.get_hub()
    loop.run_threadsafe(int, timeout=LONG)
    failed: list[BaseException] = []

    def use() -> None:
        try:
            USES[case](loop)
        except hub.ForeignThreadError as error:
            failed.append(error)

    run_natively(env, use)
    [error] = failed
    assert "call_soon_threadsafe()" in str(error)
    assert loop.run_threadsafe(lambda: 42, timeout=LONG) == 42


def test_a_callback_that_raises_concerns_nobody_else(loop: hub.Hub, env: Environment) -> None:
    errors: list[BaseException] = []
    loop.on_error = lambda error, _: errors.append(error)
    ours, theirs = native_pair(env)
    with ours, theirs:

        def failing() -> None:
            ours.recv(1)
            raise ValueError("of the program")

        loop.add_reader(ours.fileno(), failing)
        for _ in range(3):
            theirs.send(b"x")
            loop.run_once(LONG)
        loop.remove(ours.fileno())
    assert [str(error) for error in errors] == ["of the program"] * 3


def test_an_interval_that_never_comes(loop: hub.Hub) -> None:
    timer = loop.call_repeatedly(float("inf"), int, tolerance=1)
    loop.run_once(0)
    assert timer.due == float("inf")
    timer.cancel()


def test_a_call_that_no_hub_comes_to_says_why(env: Environment) -> None:
    with hub.Hub() as nobodys, hub.Hub() as driven:
        if driven.poller.name in ("epoll", "kqueue"):
            driven.fileno()
            with pytest.raises(hub.HubTimeoutError, match=r"call run_once\(0\) whenever"):
                driven.run_threadsafe(int, timeout=0.001)
        with pytest.raises(hub.HubTimeoutError, match=r"^int has .* is run by nobody") as caught:
            nobodys.run_threadsafe(int, timeout=0.001)
        assert isinstance(caught.value, TimeoutError)
        assert nobodys.run_once(0) == 0, "it was taken back"
        running = env.spawn(nobodys.run_forever)
        with pytest.raises(TimeoutError, match=r"^of the function$"):
            nobodys.run_threadsafe(fail_late, timeout=LONG)
        nobodys.stop()
        running.result(LONG)


def fail_late() -> None:
    raise TimeoutError("of the function")


POOLS: dict[str, Callable[[], object]] = {
    "limit nan": lambda: hub.LifoPool(id, limit=float("nan")),  # type: ignore[arg-type]
    "limit 1.5": lambda: hub.LifoPool(id, limit=1.5),  # type: ignore[arg-type]
    "limit string": lambda: hub.LifoPool(id, limit="3"),  # type: ignore[arg-type]
    "limit 0": lambda: hub.LifoPool(id, limit=0),
    "resize nan": lambda: full_pool().resize(float("nan")),  # type: ignore[arg-type]
    "resize string": lambda: full_pool().resize("3"),  # type: ignore[arg-type]
    "max_idle string": lambda: hub.LifoPool(id, limit=1, max_idle="3"),  # type: ignore[arg-type]
    "max_idle nan": lambda: hub.LifoPool(id, limit=1, max_idle=float("nan")),
    "max_idle negative": lambda: hub.LifoPool(id, limit=1, max_idle=-1),
    "create": lambda: hub.LifoPool(None, limit=1),  # type: ignore[arg-type]
    "check": lambda: hub.LifoPool(id, limit=1, check=5),  # type: ignore[arg-type]
    "close": lambda: hub.LifoPool(id, limit=1, close=5),  # type: ignore[arg-type]
    "abandon": lambda: hub.LifoPool(id, limit=1, abandon=5),  # type: ignore[arg-type]
    "clock": lambda: hub.LifoPool(id, limit=1, clock=5),  # type: ignore[arg-type]
    "finalizer": lambda: hub.Finalizer(Handler(), None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", POOLS)
def test_pools_and_finalizers_that_cannot_be_made(case: str) -> None:
    with pytest.raises(hub.BadArgumentError, match=r"limit of at least|seconds|give a function"):
        POOLS[case]()


def test_a_pool_that_could_not_be_resized_is_what_it_was() -> None:
    pool: hub.LifoPool[int] = hub.LifoPool(lambda _: 1, limit=1)
    with pytest.raises(hub.BadArgumentError):
        pool.resize("3")  # type: ignore[arg-type]
    with pool.acquire(timeout=0), pytest.raises(hub.PoolTimeoutError, match="limit 1,"):
        pool.acquire(timeout=0)


WAITS: dict[str, Callable[[Environment, Any], object]] = {
    "event": lambda _, timeout: hub.Event().wait(timeout),
    "lock": lambda _, timeout: taken(hub.Lock()).acquire(timeout=timeout),
    "semaphore": lambda _, timeout: hub.Semaphore(0).acquire(timeout=timeout),
    "condition": lambda _, timeout: taken(hub.Condition()).wait(timeout),
    "condition for": lambda _, timeout: taken(hub.Condition()).wait_for(int, timeout),
    "queue": lambda _, timeout: hub.LifoQueue().get(timeout=timeout),
    "queue join": lambda _, timeout: unfinished().join(timeout),
    "pool": lambda _, timeout: full_pool().acquire(timeout=timeout),
    "pool that connects": lambda _, timeout: hub.LifoPool(id, limit=1).acquire(timeout=timeout),
    "sleep": lambda env, timeout: env.sleep(timeout),
    "task": lambda env, timeout: result_of_a_task_that_waits(env, timeout),
    "descriptor": lambda env, timeout: wait_for_a_silent_one(env, timeout),
}


def taken(lock: Any) -> Any:
    lock.acquire()
    return lock


def unfinished() -> hub.LifoQueue[int]:
    queue: hub.LifoQueue[int] = hub.LifoQueue()
    queue.put(1)
    return queue


def full_pool() -> hub.LifoPool[int]:
    pool: hub.LifoPool[int] = hub.LifoPool(lambda _: 1, limit=1)
    leases.append(pool.acquire())
    return pool


leases: list[object] = []  # a dropped one would give its place back


def result_of_a_task_that_waits(env: Environment, timeout: Any) -> Any:
    go_on = env.waiter()
    task = env.spawn(go_on.wait, LONG)
    try:
        return task.result(timeout)
    finally:
        go_on.wake()
        assert task.join(LONG)


def wait_for_a_silent_one(env: Environment, timeout: Any) -> bool:
    ours, theirs = native_pair(env)
    with ours, theirs:
        return env.wait_readable(ours.fileno(), timeout)


@pytest.mark.parametrize("timeout", [float("nan"), "1", [1]])
@pytest.mark.parametrize("case", WAITS)
def test_waits_for_no_number_of_seconds(env: Environment, case: str, timeout: Any) -> None:
    # In a process of its own nan would freeze gevent: here the other tasks go on meanwhile.
    with pytest.raises(hub.BadArgumentError, match="number of seconds, not"):
        WAITS[case](env, timeout)
    assert not hub.Event().wait(0)
    assert not hub.Event().wait(-float("inf"))
    assert env.spawn(lambda: 42).result(LONG) == 42
