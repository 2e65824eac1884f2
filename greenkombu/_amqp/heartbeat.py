"""When to send a heartbeat, and when the peer has been silent for too long.

Only the decision: who has the timer and the socket asks at each tick.  There are two ticks in an
interval.  Any byte counts as a sign of life, in both directions (AMQP 0-9-1, 4.2.7), so a busy
connection sends no heartbeat at all.

Ticks are counted, not seconds: a process that was stopped, or held up by one long computation,
finds one late tick and not a peer that seems to have been silent for a minute.
"""

from __future__ import annotations

from enum import Enum

__all__ = ["TICKS_PER_INTERVAL", "Action", "Heartbeat"]

#: Looks at the counters in one heartbeat interval.
TICKS_PER_INTERVAL = 2

# Intervals shorter than this get a heartbeat at every tick: a pause of the program of a second is
# nothing unusual, and the broker gives up after two intervals.  With longer ones every other tick
# does, which is the rate that the specification asks for, at half the cost.
SHORT_INTERVAL = 5.0

# Silent ticks after which the peer is given up: two intervals, as the specification says, found
# out at most half an interval later.
SILENT_TICKS = 2 * TICKS_PER_INTERVAL


class Action(Enum):
    """What the owner has to do."""

    NOTHING = 0
    SEND = 1
    GIVE_UP = 2


class Heartbeat:
    """The state between two ticks.

    Args:
        interval: seconds that were negotiated, above 0.
    """

    __slots__ = ("_received", "_sent", "interval", "silent_ticks")

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.silent_ticks = 0
        self._received = -1
        self._sent = -1

    @property
    def tick_interval(self) -> float:
        """Seconds between two ticks."""
        return self.interval / TICKS_PER_INTERVAL

    def tick(self, sent_bytes: int, received_bytes: int, reading_paused: bool) -> Action:
        """Decide what is due.

        Args:
            sent_bytes, received_bytes: the connection's counters.
            reading_paused: True if we do not read on purpose: then silence means nothing.
        """
        if received_bytes != self._received or reading_paused:
            self._received = received_bytes
            self.silent_ticks = 0
        else:
            self.silent_ticks += 1
            if self.silent_ticks >= SILENT_TICKS:
                return Action.GIVE_UP
        if sent_bytes != self._sent:
            self._sent = sent_bytes
            return Action.NOTHING
        return Action.SEND

    def sent(self, sent_bytes: int) -> None:
        """Note the counter behind the heartbeat that was just sent."""
        if self.interval < SHORT_INTERVAL:
            # So that the heartbeat itself is not taken for traffic at the next tick.
            self._sent = sent_bytes
