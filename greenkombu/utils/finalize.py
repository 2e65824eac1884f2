"""Cleaning up after objects, as the manual's `Finalize` does.

New code takes `hub.finalize.Finalizer`; this is for programs that know the manual's class.
"""

from __future__ import annotations

import atexit
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Finalize"]

# Membership means "still to be called": dict.pop is one step, so a callback runs at most once,
# whoever is first of the object's death, a call by hand and the exit of the process.
_registry: dict[int, Finalize] = {}
_order = itertools.count()
_at_exit_installed = False


class Finalize:
    """Call a function once, when an object dies or when the process ends.

    Args:
        obj: the object, which must support weak references; or None.
        callback: the function; must not refer to obj, which would then live for ever.
        args: its arguments.
        kwargs: its keyword arguments.
        exitpriority: at exit, functions with a higher priority are called first; None is not
            called at exit.

    Raises:
        ValueError: there is neither an object nor an exitpriority.
    """

    def __init__(
        self,
        obj: Any,
        callback: Callable[..., Any],
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        exitpriority: int | None = None,
    ) -> None:
        global _at_exit_installed
        if obj is None and exitpriority is None:
            raise ValueError("Finalize() needs an object or an exitpriority, else it never runs")
        self._callback = callback
        self._args = tuple(args)
        self._kwargs = dict(kwargs or {})
        self._pid = os.getpid()
        self._key = next(_order)
        self.exitpriority = exitpriority
        self._weakref = None if obj is None else weakref.ref(obj, self)
        _registry[self._key] = self
        if not _at_exit_installed:
            _at_exit_installed = True
            atexit.register(_run_at_exit)

    def __call__(self, wr: object = None) -> Any:
        """Call the function now, unless it was called or cancelled, or this is a forked child.

        Returns:
            What it returned, or None.
        """
        del wr
        if _registry.pop(self._key, None) is None or self._pid != os.getpid():
            return None
        result = self._callback(*self._args, **self._kwargs)
        self._forget()
        return result

    def cancel(self) -> None:
        """Do not call the function any more."""
        _registry.pop(self._key, None)
        self._forget()

    def still_active(self) -> bool:
        """Tell whether the function is still to be called."""
        return self._key in _registry

    def _forget(self) -> None:
        self._weakref = None
        self._args, self._kwargs = (), {}
        self._callback = _nothing

    def __repr__(self) -> str:
        state = "active" if self.still_active() else "dead"
        return f"<Finalize: {state}, exitpriority={self.exitpriority}>"


def _nothing() -> None:
    pass


def _run_at_exit() -> None:
    at_exit = [each for each in list(_registry.values()) if each.exitpriority is not None]
    # Equal priorities: the one registered last is called first, as atexit does.
    at_exit.sort(key=lambda each: (each.exitpriority, each._key), reverse=True)
    for each in at_exit:
        try:
            each()
        except Exception:
            import logging

            logging.getLogger(__name__).exception("%r failed at exit", each)
