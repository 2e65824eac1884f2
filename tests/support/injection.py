"""Raise an exception at one chosen step of some code, as a signal handler would.

A signal handler may raise between two bytecodes of the main thread. `Injection` traces the
functions of some modules and raises at the k-th step that is executed there, so that a test can
try k = 1, 2, 3, ... until the operation runs through undisturbed. What counts as a step:

=========  =====================================================================================
"line"     each line
"opcode"   each bytecode: harsher than life, since code that survives this survives everywhere
"signal"   the bytecode after each call, function entry and jump back: where CPython looks for
           signals, and so the only places where a handler can raise
=========  =====================================================================================

Finalizers that the interpreter calls (`__del__`, and what that calls) are left out: an exception
of a trace function there leaves CPython 3.11 with a trace state that belongs to nobody, and it
crashes. A test can call a copy of the finalizer instead.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from types import FrameType, ModuleType
from typing import Any, Literal

from hub.environment import get_environment

__all__ = ["STEPS", "Injected", "Injection"]

STEPS: tuple[Literal["line", "opcode", "signal"], ...] = ("line", "opcode", "signal")

_LOOKS = frozenset(
    code
    for name, code in dis.opmap.items()
    if name.startswith(("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE"))
)

# An exception raised by a trace function before one of these would find the interpreter's
# stack of exceptions half changed. CPython never raises there.
_NEVER = frozenset(
    code
    for name, code in dis.opmap.items()
    if name
    in ("PUSH_EXC_INFO", "POP_EXCEPT", "RERAISE", "COPY", "WITH_EXCEPT_START", "CHECK_EXC_MATCH")
)


class Injected(BaseException):
    """Raised by an `Injection`; not an Exception, like most of what signal handlers raise."""


class Injection:
    """Raise `Injected` at the step `at` of the code in `modules`, for the calling task only.

    Args:
        modules: whose functions are counted.
        at: number of the step, from 1.
        step: what is counted, see the module's header.
        skip: names of functions in which nothing is raised.
        action: called at the step instead of raising: what another thread, a signal handler or
            a finalizer does just there.
    """

    def __init__(
        self,
        modules: Iterable[ModuleType],
        at: int,
        *,
        step: Literal["line", "opcode", "signal"] = "opcode",
        skip: Iterable[str] = (),
        action: Callable[[], object] | None = None,
    ) -> None:
        self._files = {module.__file__ for module in modules}
        self._left = at
        self.kind = step
        self._skip = frozenset(skip)
        # The bytecode before, per frame; frames are kept until they return.
        self._action = action
        self._last: dict[FrameType, int] = {}
        self.fired = False
        #: Where it was raised: "function:line".
        self.where = ""
        #: Whether that was the entry of the function (steps "opcode" and "signal").
        self.at_entry = False

    def __enter__(self) -> Injection:
        self._task = get_environment().current()
        self._before = sys.gettrace()
        # CPython 3.12 has opcodes traced only if some frame asked for it before settrace().
        sys._getframe().f_trace_opcodes = self.kind != "line"
        sys.settrace(self._enter_function)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        self._last.clear()

    def _enter_function(
        self, frame: FrameType, event: str, argument: Any
    ) -> Callable[..., Any] | None:
        code = frame.f_code
        if self.fired or code.co_filename not in self._files or code.co_name in self._skip:
            return None
        if get_environment().current() != self._task:
            return None  # greenlets share the trace function of their native thread
        caller: FrameType | None = frame
        while caller is not None:
            if caller.f_code.co_name == "__del__":
                return None
            caller = caller.f_back
        frame.f_trace = self._step  # CPython 3.13 wants it before the next line
        frame.f_trace_opcodes = self.kind != "line"
        frame.f_trace_lines = self.kind == "line"
        return self._step

    def _step(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if self.fired:
            return None
        if event == "return":
            self._last.pop(frame, None)
        if event != ("line" if self.kind == "line" else "opcode"):
            return self._step
        entered = frame not in self._last
        before = self._last.get(frame)
        self._last[frame] = frame.f_code.co_code[frame.f_lasti]
        if self.kind == "opcode" and frame.f_code.co_code[frame.f_lasti] in _NEVER:
            return self._step
        if self.kind == "signal" and not entered and before not in _LOOKS:
            return self._step
        self._left -= 1
        if self._left == 0:
            self.fired = True
            self.where = f"{frame.f_code.co_name}:{frame.f_lineno}"
            self.at_entry = entered
            self._last.clear()
            if self._action is None:
                raise Injected(self.where)
            self._action()  # CPython does not trace what a trace function calls
        return self._step
