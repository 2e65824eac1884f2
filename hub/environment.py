"""Which kind of concurrency this program runs on, and what that kind offers.

There are three environments: `default` (native threads), `gevent` and `eventlet`.
Everything that differs between them is behind one abstract class, `Environment`; no
other module of the hub, and none of the messaging library, asks which one it is.

The choice is made late.  `get_environment()` looks at what is patched *now*, each
time it is called, because a program may import this package first and patch
afterwards.  `use()` and the variable `HUB_ENVIRONMENT` override the detector.  Neither
gevent nor eventlet is imported unless the program already did or asks for it here.

The one primitive on which everything else stands is the `Waiter`: one task parks on
it, anything else (another task, native thread, signal handler, hub callback,
finalizer) wakes it.  See `hub.primitives` for locks and events built on it.
"""

from __future__ import annotations

import contextvars
import difflib
import importlib
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hub.errors import BlockingCallError, UnknownEnvironmentError, UnsupportedError

if TYPE_CHECKING:
    from socket import socket as Socket

    from hub import primitives
    from hub._cycle import Cycle
    from hub._drivers import Driver
    from hub.loop import Hub

__all__ = [
    "ENVIRONMENTS",
    "Environment",
    "GreenEnvironmentWarning",
    "Task",
    "Waiter",
    "blocking_call",
    "check_may_wait",
    "detect_environment",
    "get_environment",
    "running_callbacks",
    "use",
]

ENVIRONMENTS = ("default", "gevent", "eventlet")

# Modules whose patching makes a program green: with any of them replaced, a native
# wait would stop the other greenlets.
_TELLING_MODULES = frozenset({"socket", "_thread", "thread", "select", "time"})

# Task (greenlet or thread id) -> the hub whose callbacks it is running right now.  A
# wait found in here would stop that hub, so it is refused (BlockingCallError).
running_callbacks: dict[object, Cycle] = {}


class GreenEnvironmentWarning(RuntimeWarning):
    """The program runs on green threads in a way that lets this library block them."""


class Waiter(ABC):
    """Park one task until somebody wakes it; usable once.

    A wake that comes before the wait is remembered.  After an exception was thrown
    into the waiting task (a kill, a Timeout, a signal handler's) `woken` still tells
    whether the wake had come as well.
    """

    __slots__ = ("given", "thread", "woken")

    woken: bool
    #: The native thread that made it, if the tasks of that one outlive a fork in it; else None.
    thread: int | None
    #: What the one who wakes hands over; None unless it does.
    given: Any

    @abstractmethod
    def wait(self, timeout: float | None = None) -> bool:
        """Park the calling task until `wake()` or until the time is over.

        Args:
            timeout: seconds; None waits for ever; zero or less does not switch.

        Returns:
            True if it was woken, False if the time was over first.

        Raises:
            BlockingCallError: called from a hub callback.
        """

    @abstractmethod
    def wake(self) -> None:
        """Let the waiting task go on; never blocks, switches or raises; idempotent."""


class Task:
    """A running function: a greenlet or a daemon thread, by environment."""

    __slots__ = ("__weakref__", "_environment", "_error", "_kill", "_value", "_watching", "name")

    def __init__(self, environment: Environment, name: str) -> None:
        self._environment = environment
        self._watching: OrderedDict[Waiter, None] | None = OrderedDict()
        self._kill: Callable[[], None] | None = None
        self._value: Any = None
        self._error: BaseException | None = None
        self.name = name

    @property
    def done(self) -> bool:
        """Tell whether the function has returned, raised, or was killed."""
        return self._watching is None

    def join(self, timeout: float | None = None) -> bool:
        """Wait up to `timeout` seconds (None: for ever) for the end; True if it came."""
        watching = self._watching
        if watching is None:
            return True
        waiter = self._environment.waiter()
        watching[waiter] = None
        if self._watching is None:  # ended between the look and the entry
            return True
        try:
            waiter.wait(timeout)
        finally:
            watching.pop(waiter, None)
        return self._watching is None

    def result(self, timeout: float | None = None) -> Any:
        """Return what the function returned, or raise what it raised.

        Raises:
            TimeoutError: it has not ended within `timeout` seconds.
        """
        if not self.join(timeout):
            raise TimeoutError(f"{self.name} has not ended within {timeout} s")
        if self._error is not None:
            raise self._error
        return self._value

    def kill(self) -> None:
        """Throw the environment's exit exception into the task; does not wait.

        Raises:
            UnsupportedError: native threads cannot be killed.
        """
        if self._kill is None:
            raise UnsupportedError(
                f"{self.name} is a native thread and cannot be killed: "
                "let its function end, for instance through an Event"
            )
        if self._watching is not None:
            self._kill()

    def __repr__(self) -> str:
        return f"<Task {self.name} {'done' if self.done else 'running'}>"

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Body of the greenlet or thread."""
        try:
            self._value = function(*args, **kwargs)
        except BaseException as error:
            self._error = error
            if not isinstance(error, (*self._environment.timeout_types, Exception)):
                raise  # SystemExit, KeyboardInterrupt: the environment's own business
        finally:
            self._finish()

    def give_up(self, error: BaseException) -> None:
        """End with `error` a task whose function nobody will call any more."""
        if self._watching is not None:
            self._error = error
            self._finish()

    def _ended(self, _: object) -> None:
        """The greenlet has ended, perhaps before it ever ran: then nothing else says so."""
        if self._watching is not None:
            self._finish()

    def _finish(self) -> None:
        watching, self._watching = self._watching, None
        for waiter in list(watching or ()):
            waiter.wake()


class Environment(ABC):
    """What a kind of concurrency has to offer to the hub and to the library above it."""

    #: "default", "gevent" or "eventlet".
    name: str
    #: True where tasks are greenlets and a native wait stops them all.
    green: bool

    # -- tasks ----------------------------------------------------------------
    def spawn(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Task:
        """Run `function` in a new task that sees a copy of the caller's context variables.

        An exception is kept for `Task.result()`.  gevent and eventlet start greenlets
        with an empty context; the copy keeps trace ids and the like.
        """
        task = Task(self, getattr(function, "__qualname__", None) or repr(function))
        context = contextvars.copy_context()
        task._kill = self._start(task, lambda: context.run(task._run, function, args, kwargs))
        return task

    @abstractmethod
    def _start(self, task: Task, body: Callable[[], None]) -> Callable[[], None] | None:
        """Start `body`; return what kills it, or None where nothing can."""

    @abstractmethod
    def sleep(self, seconds: float = 0) -> None:
        """Let the other tasks run for at least `seconds`; 0 yields once."""

    @abstractmethod
    def current(self) -> object:
        """Return what identifies the calling task: its greenlet, or its thread id."""

    @abstractmethod
    def waiter(self) -> Waiter:
        """Return a new `Waiter`."""

    def thread_id(self) -> int:
        """Return the native thread's id, also where thread functions are patched."""
        ident: Callable[[], int] = self.original("_thread", "get_ident")
        return ident()

    #: What a kill or the environment's own Timeout raises inside a task.
    timeout_types: tuple[type[BaseException], ...] = ()

    def timeout(self, seconds: float) -> AbstractContextManager[Any]:  # noqa: ARG002
        """Return the environment's own Timeout: it raises in the task that entered it.

        Raises:
            UnsupportedError: native threads have none.
        """
        raise UnsupportedError(
            f"the {self.name} environment has no Timeout that could interrupt a task: "
            "pass timeout= to the call that waits"
        )

    # -- primitives -----------------------------------------------------------
    def Lock(self) -> primitives.Lock:
        """Return a new mutual exclusion lock with FIFO hand-over."""
        from hub import primitives

        return primitives.Lock()

    def RLock(self) -> primitives.RLock:
        """Return a new re-entrant lock, owned by a task."""
        from hub import primitives

        return primitives.RLock()

    def Semaphore(self, value: int = 1) -> primitives.Semaphore:
        """Return a new semaphore of `value` permits with FIFO hand-over."""
        from hub import primitives

        return primitives.Semaphore(value)

    def Event(self) -> primitives.Event:
        """Return a new event, not set."""
        from hub import primitives

        return primitives.Event()

    def Condition(self, lock: Any = None) -> primitives.Condition:
        """Return a new condition variable on `lock`, or on an RLock of its own."""
        from hub import primitives

        return primitives.Condition(lock)

    def LifoQueue(self, maxsize: int = 0) -> primitives.LifoQueue[Any]:
        """Return a new last-in first-out queue of at most `maxsize` items (0: no bound)."""
        from hub import primitives

        return primitives.LifoQueue(maxsize)

    # -- sockets --------------------------------------------------------------
    @property
    @abstractmethod
    def socket_module(self) -> Any:
        """The module with this environment's socket functions, patched or green."""

    def socket(self, *args: Any, **kwargs: Any) -> Socket:
        """Return a socket whose blocking calls block the calling task only."""
        made: Socket = self.socket_module.socket(*args, **kwargs)
        return made

    def socketpair(self) -> tuple[Socket, Socket]:
        """Return two connected sockets whose blocking calls block the caller only."""
        pair: tuple[Socket, Socket] = self.socket_module.socketpair()
        return pair

    def create_connection(self, address: tuple[str, int], timeout: float | None = None) -> Socket:
        """Connect to `address` within `timeout` seconds, blocking the caller only."""
        made: Socket = self.socket_module.create_connection(address, timeout)
        return made

    def getaddrinfo(
        self, host: str, port: int, timeout: float | None = None, **kwargs: Any
    ) -> list[Any]:
        """Resolve a name within `timeout` seconds, in a task of its own.

        The C library's resolver cannot be interrupted: after a timeout the task is
        left behind and ends when the resolver does.

        Raises:
            socket.gaierror: the name cannot be resolved.
            TimeoutError: no answer in time.
        """
        task = self.spawn(self.socket_module.getaddrinfo, host, port, **kwargs)
        answer: list[Any] = task.result(timeout)
        return answer

    def wait_readable(self, fd: int, timeout: float | None = None) -> bool:
        """Park until `fd` is readable, has reached its end or failed.

        Returns:
            False if `timeout` seconds (None: for ever) pass first.

        Raises:
            BadDescriptorError: the descriptor is closed, or is closed meanwhile (noticed within
                seconds), cannot be waited for, or another task waits for it.
            HubClosedError: the hub was closed meanwhile.
        """
        from hub._descriptors import wait_descriptor
        from hub.pollers import READ

        return wait_descriptor(self, fd, READ, timeout)

    def wait_writable(self, fd: int, timeout: float | None = None) -> bool:
        """Park until `fd` is writable or failed; as `wait_readable`."""
        from hub._descriptors import wait_descriptor
        from hub.pollers import WRITE

        return wait_descriptor(self, fd, WRITE, timeout)

    # -- what was there before patching ------------------------------------------
    def original(self, module: str, name: str) -> Any:
        """Return `module.name` as it was before anything was patched."""
        if _gevent_patched():
            return sys.modules["gevent.monkey"].get_original(module, name)
        if _eventlet_patched():
            return getattr(sys.modules["eventlet.patcher"].original(module), name)
        return getattr(importlib.import_module(module), name)

    # -- for the hub --------------------------------------------------------------
    def refused_to_wait(self, error: BaseException) -> bool:  # noqa: ARG002
        """Tell whether `error` is the green library's refusal of a wait in its own loop."""
        return False

    def forbid_waits(self, task: object) -> None:  # noqa: B027
        """Have the green library refuse the waits of `task`, which runs hub callbacks now."""

    def allow_waits(self, task: object) -> None:  # noqa: B027
        """Undo `forbid_waits`."""

    def before_fork(self) -> None:  # noqa: B027 - most have nothing to do
        """Get ready for a fork that follows at once; never waits."""

    @abstractmethod
    def make_driver(self, hub: Hub) -> Driver:
        """Return what runs `hub` in the background and parks it in the foreground."""

    def __repr__(self) -> str:
        return f"<Environment {self.name}>"


def check_may_wait(task: object) -> None:
    """Raise BlockingCallError if `task` is running a hub callback."""
    hub = running_callbacks.get(task)
    if hub is not None:
        raise blocking_call(hub)


def blocking_call(hub: Cycle) -> BlockingCallError:
    """Return the error of a callback of `hub` that wants to wait."""
    return BlockingCallError(
        f"a callback of {hub!r} tried to wait: it would stop every descriptor of that hub. "
        "Start a task with get_environment().spawn() and wait there"
    )


# -- detection ------------------------------------------------------------------------
_chosen: Environment | None = None
_objects: dict[str, Environment] = {}
_last_used: Environment | None = None
_variable: str | None = None


def _gevent_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    if monkey is None:
        return False
    return not _TELLING_MODULES.isdisjoint(getattr(monkey, "saved", ()))


def _eventlet_patched() -> bool:
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is None:
        return False
    return not _TELLING_MODULES.isdisjoint(getattr(patcher, "already_patched", ()))


def detect_environment() -> str:
    """Return "default", "gevent" or "eventlet" by what is monkey-patched now."""
    if _gevent_patched():
        return "gevent"
    if _eventlet_patched():
        return "eventlet"
    return "default"


def _load(name: str) -> Environment:
    """Return the one object of the environment `name`."""
    environment = _objects.get(name) if isinstance(name, str) else None
    if environment is None:
        if name not in ENVIRONMENTS:
            close = difflib.get_close_matches(str(name).lower(), ENVIRONMENTS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ":"
            raise UnknownEnvironmentError(
                f"unknown environment {name!r}{hint} give one of {', '.join(ENVIRONMENTS)} "
                "to hub.use(), or in the variable HUB_ENVIRONMENT"
            )
        try:
            module = importlib.import_module(f"hub._{name}")
        except ImportError as error:
            raise UnsupportedError(
                f"the environment {name!r} needs the package {name}: "
                f"install greenkombu[{name}] ({error})"
            ) from error
        environment = _objects.setdefault(name, module.environment)
    return environment


def use(name: str | None) -> Environment:
    """Choose the environment for this process, or go back to detection with None.

    Call it before the first connection is made: what exists already keeps the
    environment that it was made under.

    Raises:
        UnknownEnvironmentError: no environment has this name.
        UnsupportedError: its package is not installed.
    """
    global _chosen, _variable
    _chosen = None if name is None else _load(name)
    _variable = None
    environment = get_environment()
    for other in list(_objects.values()):
        if other is not environment:
            _warn_of_change(other, environment, f"hub.use({name!r}) was called")
    return environment


def get_environment() -> Environment:
    """Return the environment that holds now.

    Order: what `use()` chose, else the variable HUB_ENVIRONMENT (read once, and again after
    `use()`), else what `detect_environment()` finds.  Cheap enough to be called whenever it
    is needed, and meant to be: keep no result from import time.
    """
    global _last_used, _variable
    if _chosen is not None:
        return _chosen
    if _variable is None:
        # Once: this is called in hot paths, and looking it up costs more than all the rest.
        _variable = os.environ.get("HUB_ENVIRONMENT", "")
    name = _variable or detect_environment()
    environment = _objects.get(name) or _load(name)
    if environment is not _last_used:
        previous, _last_used = _last_used, environment
        if previous is not None:
            what = f"the program was patched for {environment.name}"
            _warn_of_change(previous, environment, what)
    return environment


def _warn_of_change(previous: Environment, environment: Environment, what: str) -> None:
    """Say that hubs that exist go on under the environment that they were made under."""
    shared = sys.modules.get("hub.shared")
    if shared is not None and shared.hubs_of(previous):
        warnings.warn(
            f"{what} after connections had been made under the {previous.name} environment: a "
            f"wait for those blocks what runs under {environment.name}. Patch or choose before "
            "the first connection, or close them first",
            GreenEnvironmentWarning,
            stacklevel=4,
        )
