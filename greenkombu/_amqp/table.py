"""The channels of a connection by number: which are in use, and which numbers are free.

A number comes back when the broker has agreed that it is free (Channel.close_ok, or its own
Channel.close), never because a caller has gone: until then frames of the old channel may be on
their way.  What decides between these (was Channel.open sent? who closed first?) is asked in
exclusive steps of the connection only, so that it has the order of the bytes on the wire.

The table refers to channels weakly.  When one is collected that nobody closed (its greenlet died),
its number is left for the hub, which closes it at the broker.  A channel with consumers is
anchored: the deliveries need it, even if nobody else does.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ConnectionError as AMQPConnectionError

from greenkombu._amqp.errors import ChannelLimitError
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.rpc import fresh
from greenkombu.deadline import remaining
from hub.errors import HubError

if TYPE_CHECKING:
    from greenkombu._amqp.channel import Channel
    from greenkombu._amqp.connection import Connection

__all__ = ["ChannelTable"]


class _Entry(weakref.ref):  # type: ignore[type-arg]
    """A channel, or where one was, until its number is free again."""

    __slots__ = ("channel_id", "closing", "opened")

    channel_id: int
    #: True once Channel.open has gone out.
    opened: bool
    #: True once Channel.close has gone out.
    closing: bool


class ChannelTable:
    """Numbers and channels of one connection.

    Attributes:
        channel_max: the highest number, once it has been negotiated.
    """

    __slots__ = (
        "_anchors",
        "_claimed",
        "_connection",
        "_dropped",
        "_entries",
        "_free",
        "_gone",
        "_new",
        "_tickets",
        "channel_max",
    )

    def __init__(self, connection: Connection) -> None:
        self._connection = weakref.ref(connection)
        self.channel_max = 0
        self._entries: dict[int, _Entry] = {}
        self._anchors: dict[int, object] | None = None
        # Numbers that came back; the next one that was never used; those asked for by number.
        self._free: list[int] = []
        self._new = itertools.count(1)
        self._claimed: set[int] | None = None
        # Who waits for a number, in order of arrival, and where to put it.
        self._tickets: dict[Gate, list[int]] = {}
        self._dropped: list[_Entry] = []
        self._gone = _Gone(self._connection)

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, channel_id: int) -> Channel | None:
        """Return the channel with that number; None if nobody has it (any more)."""
        entry = self._entries.get(channel_id)
        return entry() if entry is not None else None

    def in_use(self) -> dict[int, Channel]:
        """Return the channels that can be used, by number."""
        found: dict[int, Channel] = {}
        for channel_id, entry in list(self._entries.items()):
            channel = entry()
            if channel is not None and not channel.closed:
                found[channel_id] = channel
        return found

    # -- numbers

    def enter(self, channel: Channel, channel_id: int | None) -> int:
        """Give *channel* a number, the given one or a free one.

        Raises:
            ChannelLimitError: none is free, and none came back within `channel_timeout`.
            ConnectionError: amqp's; the given one is in use or out of range.
        """
        number = self._claim(channel_id) if channel_id else self._take()
        entry = _Entry(channel, self._gone)
        entry.channel_id = number
        entry.opened = entry.closing = False
        self._entries[number] = entry
        return number

    def _claim(self, channel_id: int) -> int:
        if channel_id in self._entries or not 0 < channel_id <= self.channel_max:
            raise AMQPConnectionError(
                f"channel {channel_id} is in use, or not between 1 and {self.channel_max}"
            )
        try:
            self._free.remove(channel_id)
        except ValueError:
            if self._claimed is None:
                self._claimed = set()
            self._claimed.add(channel_id)
        return channel_id

    def _take(self) -> int:
        number = self._next() if not self._tickets else None
        if number is not None:
            return number
        connection = self._connection()
        assert connection is not None
        bound = remaining(connection.options.channel_timeout)
        # A number that comes back goes to who has waited longest, not to who comes by.
        gate = Gate()
        found = self._tickets[gate] = []
        try:
            number = self._next()
            if number is not None:  # it came back in between
                self._give(number)
            gate.wait(lambda: found or connection.error is not None, bound)
            if found:
                return found.pop()
        finally:
            self._tickets.pop(gate, None)
            if found:
                self._give(found.pop())
        if connection.error is not None:
            raise fresh(connection.error)
        within = "" if bound is None else f" within {bound:g} s"
        raise ChannelLimitError(
            f"all {self.channel_max} channels of the connection to broker {connection.broker} are"
            f" in use, and none was closed{within}: close channels, or use another connection",
            (20, 10),
        )

    def _next(self) -> int | None:
        try:
            return self._free.pop()
        except IndexError:
            pass
        for number in self._new:
            if number > self.channel_max:
                self._new = itertools.count(self.channel_max + 1)
                return None
            if self._claimed is None or number not in self._claimed:
                return number
        return None

    def release(self, channel_id: int) -> None:
        """The broker has agreed that the number is free; called in the hub."""
        if self._entries.pop(channel_id, None) is not None:
            # One that was asked for by number stays in `_claimed`: the counter skips it.
            self._give(channel_id)

    def _give(self, number: int) -> None:
        """Hand a free number to the task that has waited longest for one."""
        for gate in list(self._tickets):
            found = self._tickets.pop(gate, None)
            if found is not None:
                found.append(number)
                gate.open()
                return
        self._free.append(number)

    # -- life, in exclusive steps of the connection

    def opens(self, channel_id: int) -> None:
        """Note that Channel.open goes out for that number."""
        entry = self._entries.get(channel_id)
        if entry is not None:
            entry.opened = True

    def closes(self, channel: Channel) -> bool:
        """Tell whether Channel.close has to go out for *channel*, and note that it does."""
        entry = self._entries.get(channel.channel_id)
        if entry is None or entry() is not channel or entry.closing:
            return False  # closed by the broker, or being closed already
        return self._closes(entry)

    def _closes(self, entry: _Entry) -> bool:
        if not entry.opened:
            self.release(entry.channel_id)
            return False
        entry.closing = True
        return True

    def closed_by_broker(self, channel_id: int, channel: Channel | None) -> bool:
        """Take Channel.close of the broker; tell whether ours is on its way to it.

        Then its answer, and not this, gives the number back.  With native threads it may have done
        so by now, and the number may be another channel's.

        Args:
            channel: whose number it was when Channel.close came; None if nobody had it any more.
        """
        entry = self._entries.get(channel_id)
        if entry is None or entry() is not channel or entry.closing:
            return True
        self.release(channel_id)
        return False

    def take_dropped(self) -> list[_Entry]:
        """Return the entries of the channels that were dropped since the last time."""
        dropped = []
        while self._dropped:
            dropped.append(self._dropped.pop())
        return dropped

    def closes_dropped(self, entry: _Entry) -> bool:
        """Tell whether Channel.close has to go out for a dropped one, and note that it does."""
        current = self._entries.get(entry.channel_id)
        return current is entry and not entry.closing and self._closes(entry)

    # -- life, from anywhere

    def drop(self, channel: Channel) -> None:
        """Have a channel closed in the background."""
        entry = self._entries.get(channel.channel_id)
        if entry is not None and entry() is channel:
            self.gone(entry)

    def gone(self, entry: _Entry) -> None:
        """Leave a channel for the hub to close; callable from a finalizer."""
        connection = self._connection()
        if connection is None or connection.stream is None or connection.error is not None:
            return
        self._dropped.append(entry)
        try:
            connection.stream.hub.call_soon_threadsafe(_close_dropped, self._connection)
        except HubError:
            pass  # then the connection is gone as well

    def anchor(self, channel_id: int, channel: object, needed: bool) -> None:
        """Keep a channel alive while it has consumers."""
        anchors = self._anchors
        if needed:
            if anchors is None:
                anchors = self._anchors = {}
            anchors[channel_id] = channel
        elif anchors is not None and anchors.get(channel_id) is channel:
            anchors.pop(channel_id, None)

    def die(self, error: BaseException) -> None:
        """Tell all channels, and those who wait for a number, that the connection is gone."""
        for entry in list(self._entries.values()):
            channel: Any = entry()
            if channel is not None:
                channel.die(error)
        if self._anchors is not None:
            self._anchors.clear()
        for gate in list(self._tickets):
            gate.open()


class _Gone:
    """Called when a channel was collected; runs anywhere, so it only leaves a note."""

    __slots__ = ("_connection",)

    def __init__(self, connection: weakref.ref[Connection]) -> None:
        self._connection = connection

    def __call__(self, entry: _Entry) -> None:
        connection = self._connection()
        # At the end of the program greenlets cannot be asked any more; the socket ends with it.
        if connection is not None and not entry.closing and not sys.is_finalizing():
            connection.table.gone(entry)


def _close_dropped(reference: weakref.ref[Connection]) -> None:
    connection = reference()
    if connection is not None:
        connection.close_dropped_channels()
