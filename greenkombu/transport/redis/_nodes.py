"""The servers of a cluster, as one connection uses them: a wire to each, and redirections.

What goes to one server in one go is a `Unit`.  It is sent to the owner of its slot, by a wire that
is opened when it is first needed.  A refusal says that nothing was done, and what to do:

* MOVED: another server has the slot.  It is noted, the map is asked for again, and the unit goes
  there.
* ASK: the slot is being moved, and this key has been already: the unit goes there, once.
* TRYAGAIN: it is being moved, and some of the keys have been.  The unit is sent again, until its
  time is over.
* CLUSTERDOWN: nobody has the slot, as in a failover.  The unit is sent again for `PATIENCE`.

All but `submit`, `sync` and `abort` runs in the hub.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from greenkombu.exceptions import KombuError
from greenkombu.transport.redis._errors import (
    CommandTimeoutError,
    ConnectionLostError,
    ReplyError,
    copy_of,
)
from greenkombu.transport.redis._resp import pack
from greenkombu.transport.redis._slots import Address, SlotMap, parse_address, with_asking
from greenkombu.transport.redis._wire import Wire
from hub.errors import HubError

if TYPE_CHECKING:
    from greenkombu.transport.redis.cluster import ClusterConnection
    from hub.environment import Waiter

__all__ = ["Node", "Nodes", "Unit"]

#: Seconds for which commands wait for a slot that nobody has; then whoever connects again waits.
PATIENCE = 5.0
#: Redirections of one unit: more, and the servers do not agree with each other.
MOST_HOPS = 16
#: Seconds before the first further attempt, and the most; they double.
AGAIN = (0.02, 0.5)
#: Seconds between two questions for the map.
REFRESH_PAUSE = 0.5

_REDIRECTIONS = frozenset({"ASK", "CLUSTERDOWN", "MOVED", "TRYAGAIN"})


class Unit:
    """Commands for one server, which are sent again together if one of them has to be.

    Args:
        data: packed commands, which may be repeated if one of them was refused.
        replies: how many there will be.
        done: called once, in the hub or by whoever submits, with the replies or an error.
        slot: of its keys; None goes to any server.
        address: of the server that has to answer, whoever has the slot.
        seconds: after which it is not sent again.
    """

    __slots__ = (
        "address",
        "asks",
        "data",
        "delay",
        "done",
        "hops",
        "peer",
        "replies",
        "slot",
        "started",
        "until",
    )

    def __init__(
        self,
        data: bytes,
        replies: int,
        done: Callable[[Any], object],
        slot: int | None,
        address: Address | None = None,
        *,
        seconds: float,
    ) -> None:
        self.data = data
        self.replies = replies
        self.done = done
        self.slot = slot
        self.address = address
        self.asks = False
        self.peer = ""
        self.hops = 0
        self.delay = AGAIN[0]
        self.started = monotonic()
        self.until = self.started + seconds


class Node:
    """A server, and what waits until there is a wire to it."""

    __slots__ = ("address", "ready", "waiting", "wire")

    def __init__(self, address: Address) -> None:
        self.address = address
        self.wire: Wire | None = None
        self.ready = False
        self.waiting: deque[Unit] = deque()

    def is_ready(self) -> bool:
        """Tell whether what is sent now may go before what waits: nothing does."""
        return self.ready


class Nodes:
    """The servers that one connection has to do with.

    Args:
        connection: to the cluster; its own wire takes what concerns no key.

    Attributes:
        slots: who has which slot.
        options: for the wires: on_push and on_lost.
    """

    def __init__(self, connection: ClusterConnection) -> None:
        self._connection = weakref.ref(connection)
        self._hub = connection.hub
        self.slots = SlotMap()
        self.options: dict[str, Any] = {}
        self._nodes: dict[Address, Node] = {}
        # Not answered yet.
        self._units: dict[Unit, None] = {}
        self._syncs: dict[Waiter, None] = {}
        self._refreshing = False
        # What is sent to each server once: the subscription to this client's wakes.
        self._greeting = b""

    # -- sending

    def submit(self, unit: Unit) -> None:
        """Send a unit; never waits or raises; from any thread."""
        self._units[unit] = None
        self._dispatch(unit)

    def _dispatch(self, unit: Unit) -> None:
        connection = self._connection()
        if connection is None or not connection.connected:
            self._end(unit, self._error())
            return
        address = unit.address
        if address is None:
            if unit.slot is None:
                self._send(connection.wire, unit)
                return
            address = self.slots.owner(unit.slot)
        if address is None:
            self.refresh()
            self._again(unit, [ReplyError("CLUSTERDOWN Hash slot not served")], PATIENCE)
            return
        node = self._nodes.get(address)
        if node is None:
            mine = Node(address)
            node = self._nodes.setdefault(address, mine)
            if node is mine:
                self._hub.environment.spawn(_open, weakref.ref(self), node)
        if node.is_ready():
            assert node.wire is not None
            self._send(node.wire, unit)
            return
        node.waiting.append(unit)
        if node.is_ready():  # since then
            connection.in_hub(partial(self._flush, node))
        elif connection.error is not None:  # since then
            self._end(unit, self._error())

    def _send(self, wire: Wire, unit: Unit) -> None:
        unit.peer = wire.peer
        data, replies = unit.data, unit.replies
        if unit.asks:
            data, replies = with_asking(data), 2 * replies
        try:
            wire.send(data, replies, partial(self._came, unit))
        except (KombuError, OSError) as exc:
            self._end(unit, exc)

    def _came(self, unit: Unit, replies: Any) -> None:
        if isinstance(replies, BaseException):
            self._end(unit, replies)
            return
        if unit.asks:
            unit.asks, unit.address = False, None
            replies = replies[1::2]
        for reply in replies:
            if isinstance(reply, ReplyError) and reply.code in _REDIRECTIONS:
                self._redirect(unit, reply, replies)
                return
        self._end(unit, replies)

    def _redirect(self, unit: Unit, reply: ReplyError, replies: list[Any]) -> None:
        code = reply.code
        if code == "CLUSTERDOWN":
            self.refresh()
            self._again(unit, replies, PATIENCE)
            return
        if code == "TRYAGAIN":
            self._again(unit, replies)
            return
        unit.hops += 1
        _, slot, where = reply.message.split()[:3]
        address = parse_address(where, unit.peer.rpartition(":")[0].strip("[]"))
        if code == "MOVED":
            self._moved(int(slot), address)
        elif unit.data.startswith(b"*1\r\n$5\r\nMULTI"):
            # ASKING would be a part of the transaction.
            self._again(unit, replies)
            return
        else:
            unit.asks, unit.address = True, address
        if unit.hops > MOST_HOPS:
            self._end(unit, replies)
        elif unit.hops > 2:
            self._again(unit, replies)
        else:
            self._dispatch(unit)

    def _again(self, unit: Unit, replies: list[Any], patience: float = float("inf")) -> None:
        """Send a unit once more, later; or give it what it got, if its time is over."""
        delay, unit.delay = unit.delay, min(2 * unit.delay, AGAIN[1])
        if monotonic() + delay >= min(unit.until, unit.started + patience):
            self._end(unit, replies)
            return
        try:
            self._hub.call_soon_threadsafe(
                self._hub.call_later, delay, _dispatch_weakly, weakref.ref(self), unit
            )
        except HubError:
            self._end(unit, self._error())

    def _end(self, unit: Unit, result: Any) -> None:
        try:
            del self._units[unit]
        except KeyError:
            return
        unit.done(result)
        for waiter in list(self._syncs):
            waiter.wake()

    def _error(self) -> BaseException:
        connection = self._connection()
        error = None if connection is None else connection.error
        return ConnectionLostError("the connection is gone") if error is None else copy_of(error)

    # -- the map

    def _moved(self, slot: int, address: Address) -> None:
        if self.slots.owner(slot) != address:
            self.slots.move(slot, address)
            self._tell(lambda each: each == slot)
            # Of the new owner, who knows.
            self.refresh(address)

    def _tell(self, moved: Callable[[int], bool]) -> None:
        connection = self._connection()
        if connection is not None:
            connection.slots_moved(moved)

    def refresh(self, address: Address | None = None) -> None:
        """Ask for the map, unless that was done just now.

        Args:
            address: whom to ask; None takes the connection's own server.
        """
        if self._refreshing:
            return
        self._refreshing = True
        unit = Unit(
            pack("CLUSTER", "SLOTS"),
            1,
            lambda replies: self._mapped(unit, replies),
            None,
            address,
            seconds=0,
        )
        self.submit(unit)

    def _mapped(self, unit: Unit, replies: Any) -> None:
        if isinstance(replies, list) and isinstance(replies[0], list):
            before = self.slots
            now = self.slots = SlotMap.parse(replies[0], unit.peer.rpartition(":")[0].strip("[]"))
            self._tell(lambda slot: before.owner(slot) != now.owner(slot))
        try:
            self._hub.call_soon_threadsafe(
                self._hub.call_later, REFRESH_PAUSE, _refresh_may_be, weakref.ref(self)
            )
        except HubError:
            pass

    def may_refresh(self) -> None:
        """Let the map be asked for again."""
        self._refreshing = False

    # -- wires

    def adopt(self, address: Address, wire: Wire) -> None:
        """Use a wire that is open already."""
        node = Node(address)
        node.wire, node.ready = wire, True
        self._nodes[address] = node

    def open(self, node: Node) -> None:
        """Open the wire to a server; parks the task."""
        connection = self._connection()
        if connection is None:
            return
        try:
            node.wire = wire = Wire.connect(
                replace(connection.settings, address=node.address),
                timeout=connection.settings.connect_timeout,
                **self.options,
            )
        except Exception as exc:
            connection.abort(copy_of(exc))
            return
        except BaseException:
            connection.abort()
            raise
        if connection.error is not None:
            wire.abort()
            return
        if connection.tracks:
            try:
                wire.send(pack("CLIENT", "TRACKING", "ON", "OPTIN"), 1, self._tracked)
            except (KombuError, OSError):
                return  # it tells of its end by itself
        connection.in_hub(partial(self._flush, node))

    def _tracked(self, replies: Any) -> None:
        connection = self._connection()
        refused = isinstance(replies, list) and isinstance(replies[0], ReplyError)
        if connection is not None and refused:
            connection.no_tracking(replies[0].message)

    def _flush(self, node: Node) -> None:
        """Send what has waited for a wire."""
        wire = node.wire
        assert wire is not None
        if not node.ready and self._greeting:
            self._greet(wire)
        while True:
            try:
                self._send(wire, node.waiting.popleft())
            except IndexError:
                if node.ready:
                    return
                node.ready = True

    def greet_with(self, data: bytes) -> None:
        """Send commands without replies to each server, now or when there is a wire to it."""
        self._greeting = data
        for node in list(self._nodes.values()):
            if node.ready and node.wire is not None:
                self._greet(node.wire)

    def _greet(self, wire: Wire) -> None:
        connection = self._connection()
        if connection is not None:
            try:
                wire.send(self._greeting, 0, connection._subscribed)
            except (KombuError, OSError):
                pass  # the connection is about to end

    def wires(self) -> list[Wire]:
        """Return those that are open."""
        return [node.wire for node in list(self._nodes.values()) if node.wire is not None]

    def wire_to(self, slot: int | None) -> Wire | None:
        """Return the wire to the owner of a slot, if it is open."""
        owner = None if slot is None else self.slots.owner(slot)
        node = None if owner is None else self._nodes.get(owner)
        return None if node is None else node.wire

    # -- waiting, and the end

    def sync(self, seconds: float) -> None:
        """Wait until all that was sent up to now was answered; parks the task.

        Raises:
            CommandTimeoutError: it was not, in that time.
        """
        until = monotonic() + (remaining(seconds) or 0.0)
        left = set(self._units)
        while True:
            waiter = self._hub.environment.waiter()
            self._syncs[waiter] = None
            try:
                left.intersection_update(list(self._units))
                if not left:
                    return
                if not waiter.wait(max(until - monotonic(), 0.0)):
                    raise CommandTimeoutError(
                        f"the Redis Cluster did not answer {len(left)} commands within"
                        f" {seconds:.3g} s"
                    )
            finally:
                del self._syncs[waiter]

    def abort(self, error: BaseException | None) -> None:
        """End all wires, and what waits; from any thread or finalizer."""
        for wire in self.wires():
            wire.abort(error)
        try:
            self._hub.call_soon_threadsafe(self._fail)
        except HubError:
            self._fail()

    def _fail(self) -> None:
        for unit in list(self._units):
            self._end(unit, self._error())

    def __repr__(self) -> str:
        return f"<Nodes {list(self._nodes)}: {len(self._units)} unanswered>"


def _open(reference: weakref.ref[Nodes], node: Node) -> None:
    nodes = reference()
    if nodes is not None:
        nodes.open(node)


def _dispatch_weakly(reference: weakref.ref[Nodes], unit: Unit) -> None:
    nodes = reference()
    if nodes is not None:
        nodes._dispatch(unit)


def _refresh_may_be(reference: weakref.ref[Nodes]) -> None:
    nodes = reference()
    if nodes is not None:
        nodes.may_refresh()
