"""Native sockets, also in a patched process: what a hub waits for is never a green socket."""

from __future__ import annotations

import _socket
import socket

from hub.environment import Environment

__all__ = ["native_pair"]


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
