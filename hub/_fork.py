"""What must happen around `os.fork()`, in one place.

`os.register_at_fork` has no unregister, so the hub registers itself once per process
and keeps its own list here.  Participants are held weakly: a closed hub or a dropped
pool must not stay alive because it once asked to hear about forks.

The child hooks run synchronously inside fork, before any user code of the child.
They never switch, take no lock and send no byte (DESIGN: law 9): the kernel objects
behind inherited descriptors are the parent's.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol

__all__ = ["ForkAware", "generation", "join_forks"]


class ForkAware(Protocol):
    """Something that has to act around a fork; each hook must return at once."""

    def before_fork(self) -> None: ...

    def after_fork_in_parent(self) -> None: ...

    def after_fork_in_child(self) -> None: ...


_generation = 0
_participants: weakref.WeakValueDictionary[int, ForkAware] = weakref.WeakValueDictionary()
_installed = False


def generation() -> int:
    """Return how many forks lie between the first process and this one.

    A handle that remembers the number it was made under can tell for the price of a
    comparison, without a system call, whether it was inherited.
    """
    return _generation


def join_forks(participant: ForkAware) -> None:
    """Call the hooks of `participant` around every later fork, as long as it lives."""
    global _installed
    if not _installed:
        _installed = True
        os.register_at_fork(
            before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
        )
    _participants[id(participant)] = participant


def _before() -> None:
    _each("before_fork")


def _after_in_parent() -> None:
    _each("after_fork_in_parent")


def _after_in_child() -> None:
    global _generation
    _generation += 1
    _each("after_fork_in_child")


def _each(hook: str) -> None:
    """Call a hook of every participant; one that fails keeps no other from its own."""
    failed: BaseException | None = None
    # A copy made in one step: other native threads may join at this moment.
    for reference in _participants.valuerefs():
        participant = reference()
        if participant is not None:
            try:
                getattr(participant, hook)()
            except BaseException as error:
                failed = error
    if failed is not None:
        raise failed  # the interpreter reports it and goes on
