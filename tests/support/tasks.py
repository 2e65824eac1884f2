"""Small tools for tests with several tasks or processes."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import reprlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub.environment import Environment

__all__ = [
    "LONG",
    "in_child",
    "no_collections",
    "run_natively",
    "save_coverage",
    "until",
    "waiting_for",
]

#: Seconds; far more than anything here takes. A wait that reaches it has failed.
LONG = 20.0


def until(
    env: Environment,
    predicate: Callable[[], object],
    timeout: float = LONG,
    *,
    collecting: bool = False,
) -> None:
    """Let other tasks run until `predicate()` holds; AssertionError after `timeout` seconds.

    Args:
        env: whose tasks run.
        predicate: is asked about once a millisecond.
        timeout: seconds.
        collecting: collect garbage before each look. One collection is not enough for what the
            hub's thread may have in its hands just then.
    """
    deadline = time.monotonic() + timeout
    while True:
        if collecting:
            gc.collect()
        if predicate():
            return
        assert time.monotonic() < deadline, (
            f"{predicate} did not come true in {timeout} s; it looks at {_known_to(predicate)}"
        )
        env.sleep(0.001)


def _known_to(predicate: Any) -> dict[str, str]:
    """Return the variables that a function has from the one around it, for an error."""
    names = inspect.getclosurevars(predicate).nonlocals if inspect.isfunction(predicate) else {}
    return {name: reprlib.repr(value) for name, value in names.items()}


def in_child(function: Callable[[], object], timeout: float = LONG) -> None:
    """Fork, run `function` in the child and end it; AssertionError with what the child raised."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # eventlet's hook for forks warns that forking is a bad idea. It is what is tested.
        warnings.filterwarnings("ignore", message=r"Using fork\(\)", category=DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            function()
            status = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode())
        finally:
            save_coverage()
            os._exit(status)
    os.close(writer)
    try:
        deadline = time.monotonic() + timeout
        while True:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise AssertionError(f"the child has not ended within {timeout} s")
            time.sleep(0.002)
        assert status == 0, f"the child failed:\n{os.read(reader, 100_000).decode()}"
    finally:
        os.close(reader)


def waiting_for(owner: object) -> int:
    """Return how many tasks wait for the one that connects or starts something for `owner`."""
    from greenkombu._flight import flights

    return sum(
        int(repr(event).rpartition(" waiting")[0].rpartition(" ")[2])
        for (_, identity, _), flight in list(flights._flights.items())
        for event in list(flight._finished.values())
        if identity == id(owner)
    )


@contextlib.contextmanager
def no_collections() -> Iterator[None]:
    """Collect no garbage in a block that is measured: it is nobody's slice and nobody's cost."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def save_coverage() -> None:
    """Keep what coverage has measured in a child that leaves by os._exit()."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if current is not None:
        current.stop()
        current.save()


def run_natively(env: Environment, function: Callable[[], object]) -> None:
    """Run `function` in a native thread, also where threads are patched, and wait for its end."""
    ended: list[BaseException | None] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            ended.append(error)
        else:
            ended.append(None)

    env.original("_thread", "start_new_thread")(body, ())
    until(env, lambda: ended)
    if ended[0] is not None:
        raise ended[0]
