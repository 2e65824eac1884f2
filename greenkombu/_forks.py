"""Which process made a handle, for the price of a comparison.

A forked child inherits objects whose sockets belong to the parent. A handle that remembers the
`generation()` it was made under can tell without a system call that it was inherited, and is then
forgotten instead of closed: the child must not send a byte on the parent's connection.
"""

from __future__ import annotations

import os

__all__ = ("generation",)

_generation = 0


def generation() -> int:
    """Return how many forks lie between the process that imported this module and this one."""
    return _generation


def _count() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count)
