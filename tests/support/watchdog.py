"""End a hung test run, and say where every thread and every greenlet stood.

`faulthandler` alone knows threads only, and in a hung green program the one thread always stands
in its event loop. A native thread, made with the functions from before patching, looks at the
clock and writes the greenlets' stacks too. `faulthandler` stays armed behind it, for a process in
which no Python code runs any more.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import time
import traceback

from hub.environment import get_environment

__all__ = ["Watchdog"]

#: Seconds between two looks of the watching thread.
INTERVAL = 1.0

#: Seconds after which faulthandler ends a process that the watching thread could not end.
GRACE = 10.0


class Watchdog:
    """Watch one test at a time.

    Args:
        descriptor: where to write, the terminal or a file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._deadline: float | None = None
        self._name = ""
        self._pid = 0

    def watch(self, name: str, seconds: float) -> None:
        """Give the test `name` so many seconds from now."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            original = get_environment().original
            running = original("_thread", "allocate_lock")()
            running.acquire()
            arguments = (original("time", "sleep"), running.release)
            original("_thread", "start_new_thread")(self._run, arguments)
            running.acquire()  # it counts as a thread from now on, not in the middle of the test
        self._name = name
        self._deadline = time.monotonic() + seconds
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=self._descriptor)

    def relax(self) -> None:
        """Forget the test: it has ended."""
        self._deadline = None
        faulthandler.cancel_dump_traceback_later()

    def _run(self, sleep: object, started: object) -> None:
        assert callable(sleep)
        assert callable(started)
        started()
        while True:
            sleep(INTERVAL)
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._bark()

    def _bark(self) -> None:
        lines = [f"\n{self._name} takes too long; the run ends here\n"]
        if "greenlet" in sys.modules:
            import greenlet

            gc.unfreeze()
            for item in gc.get_objects():
                if issubclass(type(item), greenlet.greenlet) and item.gr_frame is not None:
                    lines.append(f"\n{item!r}\n")
                    lines += traceback.format_stack(item.gr_frame)
        os.write(self._descriptor, "".join(lines).encode())
        faulthandler.dump_traceback(file=self._descriptor, all_threads=True)
        os._exit(1)
