"""What is done at the end of the process, behind the program's own exit functions.

Exit functions run in the reverse order of their registration, so this module registers its one
when `hub` is imported, and not when a hub is first used: a program that publishes in an exit
function of its own finds everything as it was, and what it left in buffers is sent afterwards.

A child that multiprocessing has forked, itself or by a server, runs no exit functions (before
Python 3.14, where it forgets those of its parent): it ends by os._exit() behind its finalizers, so
there it is one of those.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable

__all__ = ["run_at_exit"]

# In the order of their registration; all of them may be called more than once.
_functions: list[Callable[[], object]] = []
# The process that will call them, and whether it was known by then to be a child: what a child of
# a fork server imports with its function is imported before multiprocessing says so.
_registered_in: tuple[int, bool] | None = None


def run_at_exit(function: Callable[[], object]) -> None:
    """Call `function()` at the end of this process, before those that were given earlier.

    The same function again is one, but makes sure that a child of a fork calls it as well.
    """
    if function not in _functions:
        _functions.append(function)
    _register()


def _register() -> None:
    global _registered_in
    util = sys.modules.get("multiprocessing.util")
    child = util is not None and _ends_by_exit()
    if _registered_in == (os.getpid(), child):
        return
    _registered_in = os.getpid(), child
    atexit.register(_run)
    if util is not None and child:
        util.Finalize(None, _run, exitpriority=0)


def _ends_by_exit() -> bool:
    """Tell whether this is multiprocessing's child that ends by os._exit(): not a spawned one."""
    package = sys.modules["multiprocessing"]
    return package.parent_process() is not None and package.get_start_method() != "spawn"


def _run() -> None:
    for function in reversed(_functions):
        try:
            function()
        except BaseException:  # a Timeout of the program's, too, must not keep the others from it
            sys.excepthook(*sys.exc_info())  # as atexit does


_register()
