"""What a test leaves behind: descriptors, native threads and greenlets.

A `Census` counts them by kind. Counting, and not comparing numbers or identities, lets the hub
replace what is its own (a poller's descriptor after a fork, a killed owner) without being taken
for a leak, while one more of anything is still noticed.
"""

from __future__ import annotations

import gc
import os
import re
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import hub

__all__ = ["Census", "settle", "warm_up"]

#: Seconds that a finished test's tasks have to end.
SETTLING = 3.0


class Census:
    """The descriptors, threads and greenlets of this process at one moment."""

    def __init__(self) -> None:
        self.descriptors = _descriptors()
        self.threads: dict[int, FrameType] = sys._current_frames()
        self.thread_count = _thread_count()
        self.greenlets = _greenlets()

    def grown_since(self, before: Census) -> list[str]:
        """Return one line for every kind of thing of which there is more than before."""
        grown = []
        kinds = Counter(map(_kind, self.descriptors.values()))
        kinds.subtract(Counter(map(_kind, before.descriptors.values())))
        for kind, count in kinds.items():
            if count > 0:
                new = [
                    f"{descriptor} -> {target}"
                    for descriptor, target in self.descriptors.items()
                    if _kind(target) == kind and before.descriptors.get(descriptor) != target
                ]
                grown.append(f"{count} more {kind}; new: {', '.join(new)}")
        if self.thread_count > before.thread_count:
            grown.append(f"{self.thread_count - before.thread_count} more native threads; new:")
            grown += [
                _where(f"thread {ident}", frame)
                for ident, frame in self.threads.items()
                if ident not in before.threads
            ]
        if len(self.greenlets) > len(before.greenlets):
            known = {id(greenlet) for greenlet in before.greenlets}
            grown.append(f"{len(self.greenlets) - len(before.greenlets)} more greenlets; new:")
            grown += [
                _where(repr(greenlet), greenlet.gr_frame)
                for greenlet in self.greenlets
                if id(greenlet) not in known
            ]
        return grown


def settle(before: Census, sleep: Callable[[float], object]) -> list[str]:
    """Wait, within bounds, until nothing has grown since `before`.

    Args:
        before: the census to compare with.
        sleep: lets the other tasks run for some seconds.

    Returns:
        What has still grown at the end, one line each; empty if nothing has.
    """
    grown = Census().grown_since(before)
    deadline = time.monotonic() + SETTLING
    pause = 0.0
    while grown and time.monotonic() < deadline:
        gc.collect()
        sleep(pause)
        pause = min(0.1, pause + 0.005)
        grown = Census().grown_since(before)
    return grown


def warm_up() -> bool:
    """Make the shared hub turn once, so that its owner and descriptors exist from now on."""
    environment = hub.get_environment()
    turned = environment.waiter()
    hub.get_hub().call_soon_threadsafe(turned.wake)
    return turned.wait(10.0)


def _descriptors() -> dict[int, str]:
    found = {}
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:  # not Linux: only threads and greenlets are counted
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the listing's own descriptor
            continue
    return found


def _kind(target: str) -> str:
    return re.sub(r"^(socket|pipe):\[\d+\]$", r"\1", target)


def _thread_count() -> int:
    """Return how many threads run Python code, pools of the green libraries excepted."""
    count = hub.get_environment().original("_thread", "_count")()
    if "gevent" in sys.modules:
        import gevent

        pool = gevent.get_hub()._threadpool  # the resolver's; made at first use and then kept
        count -= 0 if pool is None else pool.size
    if "eventlet.tpool" in sys.modules:
        count -= len(sys.modules["eventlet.tpool"]._threads)
    return int(count)


def _greenlets() -> list[Any]:
    """Return the greenlets that were started and have not ended."""
    if "greenlet" not in sys.modules:
        return []
    import greenlet

    # type() and not isinstance(): that asks proxies for their class, and dead ones raise.
    return [
        item
        for item in gc.get_objects()
        if issubclass(type(item), greenlet.greenlet)
        and item
        # A thread's main greenlet, and the one that a worker of gevent's thread pool (name
        # resolution; kept for later use) runs in, belong to a thread and are counted as that.
        and item.parent is not None
        and type(item).__module__ != "gevent.threadpool"
    ]


def _where(name: str, frame: FrameType | None) -> str:
    if frame is None:
        return f"  {name}, running"
    last = "".join(traceback.format_stack(frame)[-3:]).rstrip()
    return f"  {name} at\n{last}"
