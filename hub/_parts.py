"""A message in parts, which are joined as they are sent.

Joining a message of many megabytes takes tens of milliseconds, most of it for memory that the
kernel has yet to find; parts of the size of one send cost next to nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from hub.arguments import as_bytes

__all__ = ["Parts"]


class Parts:
    """Bytes that stand one behind the other, and are taken off at the front.

    Args:
        parts: bytes, of which no copy is taken; of buffers that may change one is.

    Raises:
        BadArgumentError: one of them is no bytes.
    """

    __slots__ = ("_parts", "_size")

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._parts = deque(memoryview(part) for part in map(_fixed, parts) if len(part))
        self._size = sum(map(len, self._parts))

    def __len__(self) -> int:
        return self._size

    def __bytes__(self) -> bytes:
        return b"".join(self._parts)

    def take(self, size: int) -> bytes:
        """Take off the first `size` bytes, or what there is."""
        taken = []
        parts = self._parts
        left = min(size, self._size)
        self._size -= left
        while left:
            part = parts[0]
            if len(part) > left:
                parts[0] = part[left:]
                part = part[:left]
            else:
                parts.popleft()
            left -= len(part)
            taken.append(part)
        return b"".join(taken)


def _fixed(part: object) -> bytes | memoryview:
    # A view of bytes shows what cannot change; large bodies are cut by such views.
    if isinstance(part, memoryview) and type(part.obj) is bytes and _counts_octets(part):
        return part
    return part if type(part) is bytes else as_bytes(part)


def _counts_octets(view: memoryview) -> bool:
    return view.contiguous and view.itemsize == 1 and view.ndim == 1
