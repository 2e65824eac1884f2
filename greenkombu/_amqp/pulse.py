"""Timers that connections share.

What has to be done at regular times, for each of a thousand idle connections, is a look at two
counters; a timer's way through the hub costs several times that.  So the connections on one hub
that want the same at the same interval do it in one callback, some dozens of them at a time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub.loop import Hub
    from hub.timers import Timer

__all__ = ["MEMBERS", "Pulse", "join"]

#: Connections of one callback: if all of them send, it takes about a millisecond.
MEMBERS = 50

#: Seconds by which a beat may be late, so that many fall together; a tenth of a short interval.
TOLERANCE = 0.25

_Method = Callable[[Any], object]

# The one of each kind that took the last member; the others live by their timers.
_latest: weakref.WeakKeyDictionary[Hub, dict[tuple[float, _Method], Pulse]] = (
    weakref.WeakKeyDictionary()
)


class Pulse:
    """Call *method* every *interval* seconds for each member that lives.

    Members are objects with `error`, which is not None once they are dead; they are referred to
    weakly.  The timer ends with the last one.
    """

    __slots__ = ("_method", "members", "timer")

    def __init__(self, hub: Hub, interval: float, method: _Method) -> None:
        self._method = method
        self.members: dict[weakref.ref[Any], None] = {}
        tolerance = min(TOLERANCE, interval / 10)
        self.timer: Timer = hub.call_repeatedly(interval, self.beat, tolerance=tolerance)

    def beat(self) -> None:
        """Do it; called in the hub."""
        failure: Exception | None = None
        for reference in list(self.members):
            member = reference()
            if member is None or member.error is not None:
                del self.members[reference]
                continue
            try:
                self._method(member)
            except Exception as exc:
                failure = exc  # the hub tells it; the others have their turn first
        if not self.members:
            self.timer.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                failure = None  # its traceback holds this frame


def join(hub: Hub, interval: float, method: _Method, member: Any) -> None:
    """Have `method(member)` called every *interval* seconds, at first within one; in the hub."""
    kinds = _latest.setdefault(hub, {})
    pulse = kinds.get((interval, method))
    if pulse is None or pulse.timer.cancelled or len(pulse.members) >= MEMBERS:
        pulse = kinds[interval, method] = Pulse(hub, interval, method)
    pulse.members[weakref.ref(member)] = None
