"""Environment, descriptors and small things that programs written for Kombu import from here."""

from __future__ import annotations

import io
import itertools
import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar

from greenkombu.exceptions import reraise
from hub.environment import detect_environment
from hub.primitives import LifoQueue

__all__ = [
    "FILENO_ERRORS",
    "CompatOrderedDict",
    "LifoQueue",
    "coro",
    "detect_environment",
    "entrypoints",
    "fileno",
    "maybe_fileno",
    "nested",
    "register_after_fork",
    "reraise",
]

_T = TypeVar("_T")
_MISSING: Any = object()

#: What `fileno` raises for an object without descriptor.
FILENO_ERRORS = (AttributeError, ValueError, io.UnsupportedOperation)

#: The name that Celery imports; the answer is never cached, since patching may come later.
_detect_environment = detect_environment


class CompatOrderedDict(OrderedDict[Any, Any]):
    """An OrderedDict that still has the iterators of Python 2."""

    def iterkeys(self) -> Iterator[Any]:
        """Iterate over the keys."""
        return iter(self.keys())

    def itervalues(self) -> Iterator[Any]:
        """Iterate over the values."""
        return iter(self.values())

    def iteritems(self) -> Iterator[tuple[Any, Any]]:
        """Iterate over (key, value)."""
        return iter(self.items())

    def pop(self, key: Any, default: Any = _MISSING) -> Any:
        """Remove key and return its value, else default.

        Raises:
            KeyError: there is no such key, and no default.
        """
        return super().pop(key) if default is _MISSING else super().pop(key, default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the value for key after setting it to default if there was none."""
        return super().setdefault(key, default)

    def update(self, other: Any = (), **kwds: Any) -> None:  # type: ignore[override]
        """Take over the entries of other and of the keywords."""
        super().update(other, **kwds)


def coro(gen: Callable[..., Generator[Any, Any, Any]]) -> Callable[..., Generator[Any, Any, Any]]:
    """Decorate a generator function so that its generators are started already."""

    @wraps(gen)
    def start(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        generator = gen(*args, **kwargs)
        next(generator)
        return generator

    return start


def entrypoints(namespace: str) -> Iterator[tuple[Any, Any]]:
    """Yield (entry point, object) for the installed entry points of a group.

    Args:
        namespace: name of the group.

    Raises:
        Exception: whatever importing the object raises.
    """
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    for entry in entry_points(group=namespace):
        yield entry, entry.load()


def fileno(f: Any) -> int:
    """Return the descriptor of f: f itself if it is a number, else f.fileno().

    Raises:
        AttributeError, ValueError, io.UnsupportedOperation: it has none.
    """
    return f if isinstance(f, int) else int(f.fileno())


def maybe_fileno(f: Any) -> int | None:
    """Return the descriptor of f, or None if it has none."""
    try:
        return fileno(f)
    except FILENO_ERRORS:
        return None


@contextmanager
def nested(*managers: AbstractContextManager[Any]) -> Iterator[list[Any]]:
    """Enter several context managers; leave them in reverse order.

    Yields:
        What they returned, in order.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(manager) for manager in managers]


# The objects are held weakly, so that registering keeps nothing alive; the counter keeps the order.
_after_fork: weakref.WeakValueDictionary[tuple[int, Callable[[Any], object]], Any]
_after_fork = weakref.WeakValueDictionary()
_order = itertools.count()
_hook_installed = False


def register_after_fork(obj: _T, func: Callable[[_T], object]) -> None:
    """Call func(obj) in each child process, while obj lives.

    Unlike multiprocessing's function of this name it also works for a plain os.fork() (gunicorn,
    billiard).  It runs in the child before anything else; it must not wait.

    Args:
        obj: what func gets; must support weak references.
        func: must not refer to obj, which would then live for ever.
    """
    global _hook_installed
    _after_fork[next(_order), func] = obj
    if not _hook_installed:
        _hook_installed = True
        os.register_at_fork(after_in_child=_run_after_fork)


def _run_after_fork() -> None:
    for (_, func), obj in sorted(_after_fork.items(), key=lambda entry: entry[0][0]):
        try:
            func(obj)
        except Exception:
            # One failing hook must not keep the others from running.
            import logging

            logging.getLogger(__name__).exception("after-fork hook %r failed for %r", func, obj)
