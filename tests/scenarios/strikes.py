"""Throw an exception into a green task at one chosen of its switch points."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import greenlet

from hub.environment import Environment, Task

__all__ = ["Strike", "kinds"]


def kinds(env: Environment) -> list[type[BaseException]]:
    """Return what users throw in this environment: its Timeout, and what a kill throws."""
    return [kind for kind in env.timeout_types if issubclass(kind, BaseException)]


class Strike:
    """Run a function in a task and throw into it when it switches away for the k-th time.

    Args:
        env: a green environment.
        operation: what to run.
        at: k, from 1.
        kind: what to throw.
        lag: seconds between the switch and the throw; 0 throws before any I/O is looked at.

    Attributes:
        struck: whether it was thrown; False once k is beyond the switches of the operation.
        outcome: what the operation returned or raised.
    """

    def __init__(
        self,
        env: Environment,
        operation: Callable[[], Any],
        at: int,
        kind: type[BaseException],
        lag: float = 0.0,
    ) -> None:
        self.struck = False
        self.outcome: Any = None
        self._env = env
        self._operation = operation
        self._left = at
        self._kind = kind
        self._lag = lag
        self._target: Any = None
        self._done = False

    def run(self, timeout: float) -> Strike:
        """Carry it out, waiting for the end of the task up to so many seconds."""
        before = greenlet.gettrace()
        greenlet.settrace(self._on_switch)
        try:
            task: Task = self._env.spawn(self._body)
            assert task.join(timeout), f"the operation hangs after a strike: {self._operation}"
        finally:
            greenlet.settrace(before)
        return self

    def _body(self) -> None:
        self._target = greenlet.getcurrent()
        try:
            self.outcome = self._operation()
        except BaseException as error:
            self.outcome = error
        finally:
            self._done = True
            self._target = None

    def _on_switch(self, event: str, switch: tuple[Any, Any]) -> None:
        if self._target is None or switch[0] is not self._target or self._left <= 0:
            return
        self._left -= 1
        if self._left == 0:
            self._schedule()

    def _schedule(self) -> None:
        # As gevent.kill() and eventlet.kill() do, but at this very moment.
        if self._env.name == "gevent":
            loop = sys.modules["gevent"].get_hub().loop
            if self._lag:
                timer = loop.timer(self._lag)
                timer.start(self._strike, timer)
            else:
                loop.run_callback(self._strike)
        else:
            hub = sys.modules["eventlet"].hubs.get_hub()
            hub.schedule_call_global(self._lag, self._strike)

    def _strike(self, timer: Any = None) -> None:
        if timer is not None:
            timer.close()
        target = self._target
        if self._done or target is None:
            return
        self.struck = True
        exits = issubclass(self._kind, greenlet.GreenletExit)
        target.throw(self._kind() if exits else self._kind(None))
