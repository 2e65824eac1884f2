"""Native sockets, also in a patched process: what a hub waits for is never a green socket."""

from __future__ import annotations

import _socket
import contextlib
import os
import socket
from collections.abc import Iterator

from hub.environment import Environment
from tests.support.tasks import until

__all__ = ["native_pair", "numbers_used_again"]


def native_pair(env: Environment) -> tuple[socket.socket, socket.socket]:
    """Return two connected native sockets that do not block.

    The original `socketpair()` would do under plain threads only: it builds on the global name
    `socket`, which patching has replaced.
    """
    native = env.original("socket", "socket")
    ours, theirs = (native(fileno=end.detach()) for end in _socket.socketpair())
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


@contextlib.contextmanager
def numbers_used_again(env: Environment, numbers: set[int]) -> Iterator[None]:
    """Wait until descriptors have been closed, and give their numbers to others meanwhile.

    AssertionError at the end of the block if one of the others was touched.
    """
    borrowed: list[int] = []

    def borrow() -> bool:
        borrowed.append(os.open(os.devnull, os.O_RDONLY))  # the lowest number that is free
        return numbers <= set(borrowed)

    close = env.original("os", "close")
    try:
        until(env, borrow)
        yield
    finally:
        closed = []
        for fd in borrowed:
            try:
                close(fd)
            except OSError:
                closed.append(fd)
    assert not closed, f"somebody else has closed {closed}"
