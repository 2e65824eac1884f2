"""Log from inside a hub without ever waiting there.

A log handler takes locks and does I/O; in a patched program both can switch, and in a
hub callback both would hold up every descriptor.  So each hub queues the records that are
made in it (`Hub.log_later`), and a task emits them.  The task is only ever started in the
hub's own thread: a task needs a loop that runs, and a native thread that happens to log
may have none.  The queue is bounded: a flood of errors must not become a flood of memory;
what was left out is counted in the next record.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from hub import _fork
from hub._exit import run_at_exit
from hub.environment import Environment, Task

__all__ = ["LIMIT", "RecordQueue", "emit_all"]

#: Records of one hub that wait to be emitted.
LIMIT = 1000

#: The queues that are not empty, for the end of the process: a hub may be gone by then.
_waiting: dict[RecordQueue, None] = {}


class RecordQueue:
    """What one hub has to tell, and the task that is telling it."""

    __slots__ = (
        "__weakref__",
        "_dropped",
        "_emitter",
        "_environment",
        "_generation",
        "_idle",
        "_records",
    )

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._records: deque[
            tuple[logging.Logger, int, str, tuple[Any, ...], BaseException | None]
        ] = deque()
        # One entry while no task is emitting: deque.pop() is the atomic test-and-set.
        self._idle: deque[None] = deque([None], maxlen=1)
        self._emitter: Task | None = None
        self._dropped = 0
        self._generation = _fork.generation()

    def add(
        self,
        logger: logging.Logger,
        level: int,
        message: str,
        args: tuple[Any, ...],
        error: BaseException | None,
    ) -> bool:
        """Queue a record, from any thread; False if there is no room.  Never waits."""
        if self._generation != _fork.generation():
            self._forget()
        if len(self._records) >= LIMIT:
            self._dropped += 1
            return False
        self._records.append((logger, level, message, args, error))
        _waiting[self] = None
        run_at_exit(emit_all)
        return True

    def _forget(self) -> None:
        """In the child of a fork: these are the parent's to tell, and so was the task."""
        self._generation = _fork.generation()
        self._records.clear()
        self._dropped = 0
        self._idle = deque([None], maxlen=1)

    def start(self) -> None:
        """Start a task that emits what is queued, unless one is at it.

        Where tasks are greenlets: in the hub's own thread.
        """
        if not self._records:
            return
        try:
            self._idle.pop()
        except IndexError:
            if self._emitter is None or not self._emitter.done:
                return
            # It was killed before it could begin, and has given nothing back.
        try:
            self._emitter = self._environment.spawn(self._run)
        except RuntimeError:  # interpreter shutdown: no thread can be started any more
            self._idle.append(None)

    def _run(self) -> None:
        idle = self._idle
        while True:
            try:
                self.emit()
            finally:
                idle.append(None)
            # Queued after the last look, while this task still counted as busy.
            if not self._records:
                return
            try:
                idle.pop()
            except IndexError:
                return

    def emit(self) -> None:
        """Emit what is queued, in the calling task."""
        generation = _fork.generation()
        if self._generation != generation:
            self._forget()
        while self._records and generation == _fork.generation():
            try:
                logger, level, message, args, error = self._records.popleft()
            except IndexError:  # pragma: no cover - another thread's since the look
                break
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                message += " (%d earlier records were left out)"
                args = (*args, dropped)
            try:
                logger.log(level, message, *args, exc_info=error)
            except Exception:
                pass  # of a filter; telling of it would go through it again
        _waiting.pop(self, None)
        if self._records:
            _waiting[self] = None  # queued since the look


def emit_all() -> None:
    """Emit what is left in all queues; at the end of the process no task would."""
    for queue in list(_waiting):
        queue.emit()
