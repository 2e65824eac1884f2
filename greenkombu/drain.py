"""Serve any number of connections from one task.

`drain_events(*connections)` waits for one event of any of them; it suits a few connections and a
loop that is the program's own.  `DrainLoop` is for many: connections join and leave while it
runs, and an event costs the same with one connection and with ten thousand.

How it works.  The loop stays subscribed to the inbox of each connection.  Whatever appends an
event there, usually a hub callback, puts the connection into the loop's deque of ready ones,
unless it is in it already, and wakes the task that runs the loop.  That task takes the first
connection, runs one event of it, and puts it at the end while it may have more.  So connections
have equal turns, nobody ever looks through all of them, and connections of different transports
mix.

User callbacks run in the task that runs the loop, one after the other, and never inside another
callback: a callback that publishes to its own connection only makes work for a later turn.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic, thread_time
from typing import TYPE_CHECKING, Any

from greenkombu import exceptions
from greenkombu._forks import generation
from greenkombu.deadline import Deadline, remaining
from greenkombu.transport._connection import (
    POLL_GRACE_SECONDS,
    TURN_SECONDS,
    YIELD_SECONDS,
    Bell,
    Failure,
    TransportConnection,
)
from hub.arguments import has_time
from hub.environment import get_environment

if TYPE_CHECKING:
    from greenkombu.connection import Connection
    from hub.environment import Environment

__all__ = ("DrainEvent", "DrainLoop", "DrainLoopClosedError", "drain_events")

logger = logging.getLogger(__name__)

# How often a closing loop looks whether the last messages have been acknowledged: nothing tells it.
_SETTLE_SECONDS = 0.01

# Numbers the events that `drain_events` has run, so that the connection served longest ago is
# first.
_serial = itertools.count(1)


class DrainLoopClosedError(exceptions.KombuError, RuntimeError):
    """The loop was closed, or another task runs it."""


def drain_events(*connections: Connection, timeout: float | None = None) -> Connection:
    """Wait for one event of any of the connections and run it in this task.

    The connection that was served longest ago comes first, so none is starved by another.

    Args:
        *connections: connections of any transports; those that are not open are opened.
        timeout: seconds; None waits for ever, 0 takes what has arrived.

    Returns:
        The connection whose event it was.

    Raises:
        TimeoutError: nothing came in time (`socket.timeout` is this class).
        Exception: what the callback raised; or the error of a connection that has failed.
    """
    if not connections:
        raise ValueError("drain_events() needs at least one connection")
    members = [(_transport_connection(each), each) for each in connections]
    environment = get_environment()
    # Who has been served most recently, whose turn it was, gives the others theirs.
    members[0][0]._breathe(environment)
    served = _drain_one(members)
    if served is not None:
        return served
    wait = timeout = remaining(timeout)
    if timeout is not None and not has_time(timeout):
        wait = max(member.poll_grace for member, _ in members)
        if wait <= 0:
            raise TimeoutError("timed out")
    deadline = None if wait is None else monotonic() + wait
    bell = Bell(environment)
    ring = bell.ring
    try:
        for member, _ in members:
            member.inbox.subscribe(ring)
        while True:
            bell.arm()
            served = _drain_one(members)
            if served is not None:
                return served
            left = None if deadline is None else deadline - monotonic()
            if left is not None and left <= 0:
                raise TimeoutError("timed out")
            bell.wait(left)
            for member, _ in members:
                member._turn_started = monotonic()
    finally:
        for member, _ in members:
            member.inbox.unsubscribe(ring)


def _drain_one(members: list[tuple[TransportConnection, Connection]]) -> Connection | None:
    """Run one event of the member that was served longest ago; None if there is no event."""
    if len(members) > 1:
        members.sort(key=_last_served)
    for member, connection in members:
        # Before its event runs: one whose callback raises, or that is dead, has had its turn, too.
        before, member.served = member.served, next(_serial)
        if member.deliver():
            return connection
        member.served = before
    return None


def _last_served(member: tuple[TransportConnection, Connection]) -> int:
    return member[0].served


def _transport_connection(connection: Any) -> TransportConnection:
    """Return the open connection below `connection`, opening it if need be."""
    # One that has failed is not opened again, as its consumers are gone: its error is raised.
    found = connection._connection_to_drain()
    if not isinstance(found, TransportConnection):
        raise exceptions.UnsupportedOperation(
            f"{connection!r} cannot be drained together with others: its transport has no inbox"
        )
    return found


class DrainEvent:
    """What happened on a connection of a `DrainLoop`.

    Attributes:
        connection: the connection.
        error: None when one of its events was run; else what has gone wrong with it. If it is still
            `connected` the loop goes on serving it, otherwise it has left the loop.
    """

    __slots__ = ("connection", "error")

    def __init__(self, connection: Any, error: BaseException | None = None) -> None:
        self.connection = connection
        self.error = error

    def __repr__(self) -> str:
        what = "served" if self.error is None else repr(self.error)
        return f"<DrainEvent of {self.connection!r}: {what}>"


class _Alarm:
    """Wakes the task that runs a loop, if it is parked."""

    __slots__ = ("bell",)

    def __init__(self) -> None:
        self.bell: Bell | None = None

    def ring(self) -> None:
        bell = self.bell
        if bell is not None:
            bell.ring()


class _Member:
    """A connection in a loop.

    It does not refer to the loop: an inbox refers to it, and must not keep alive a loop that the
    program has dropped.
    """

    __slots__ = (
        "alarm",
        "connection",
        "delivered",
        "left",
        "queued",
        "ready",
        "transport_connection",
    )

    def __init__(
        self,
        connection: Any,
        transport_connection: TransportConnection,
        ready: deque[_Member],
        alarm: _Alarm,
    ) -> None:
        self.connection = connection
        self.transport_connection = transport_connection
        self.ready = ready
        self.alarm = alarm
        # Handed out for each of its events: they are all alike.
        self.delivered = DrainEvent(connection)
        self.queued = False
        self.left = False

    def ring(self) -> None:
        """Put it among the ready ones; called by whoever appends to its inbox."""
        # Two threads that come here at once may both enter it. That costs one vain look.
        if not self.queued:
            self.queued = True
            self.ready.append(self)
            self.alarm.ring()


class DrainLoop:
    """Run the events of many connections in one task.

    Args:
        *connections: join at once; see `join`.
        on_error: called as (connection, error) when a connection has failed, by the task that runs
            the loop. It may open the connection again, start its consumers, and let it join again.

    Use one of::

        for event in loop: ...      # one DrainEvent after the other, until stop()
        loop.run_forever()
        loop.next_event(timeout=1)

    One task at a time may run it. `join`, `leave`, `stop` and `len` may be used by any task or
    native thread, `stop` by a signal handler, too.

    Attributes:
        on_error: see above.
        largest_slice: the longest that `run_forever` ran events without a turn for other tasks, in
            seconds of the thread's CPU time. Under gevent and eventlet a callback that waits adds
            what the others did meanwhile. Set it to 0 to begin anew.
    """

    def __init__(
        self,
        *connections: Connection,
        on_error: Callable[[Any, BaseException], object] | None = None,
    ) -> None:
        self._members: dict[Any, _Member] = {}
        self._ready: deque[_Member] = deque()
        self._alarm = _Alarm()
        self._stopping = False
        self._closed = False
        self._turn_started = 0.0
        self.largest_slice = 0.0
        # By thread_time(); None while the program's own loop runs this one, event by event.
        self._slice_started: float | None = None
        self._generation = generation()
        # Whoever takes the entry out runs the loop.
        self._permit: deque[None] = deque([None])
        self._runner: object = None
        self.on_error = on_error
        for connection in connections:
            self.join(connection)

    # -- members

    def join(self, connection: Connection) -> None:
        """Serve `connection` from now on; opens it if it is not open.

        Joining again does nothing, unless the connection was opened anew since.

        Raises:
            DrainLoopClosedError: the loop was closed.
            UnsupportedOperation: the transport cannot be drained together with others.
            Exception: the connection could not be opened, or has failed.
        """
        if self._closed:
            raise DrainLoopClosedError("a closed DrainLoop takes no connections; make a new one")
        self._forget_after_fork()
        transport_connection = _transport_connection(connection)
        old = self._members.get(connection)
        if old is not None:
            if old.transport_connection is transport_connection:
                return
            self._remove(old)
        member = _Member(connection, transport_connection, self._ready, self._alarm)
        self._members[connection] = member
        transport_connection.inbox.subscribe(member.ring)
        # What came before nobody has told us about.
        member.ring()

    def leave(self, connection: Connection) -> None:
        """Stop serving `connection`, which stays open; one that is not served is ignored."""
        member = self._members.get(connection)
        if member is not None:
            self._remove(member)

    def _remove(self, member: _Member) -> None:
        member.left = True
        member.transport_connection.inbox.unsubscribe(member.ring)
        if self._members.get(member.connection) is member:
            self._members.pop(member.connection, None)

    def _forget_after_fork(self) -> None:
        if self._generation != generation():
            # The connections are the parent's, and so is the task that ran the loop.
            self._generation = generation()
            self._members.clear()
            self._ready.clear()
            self._permit = deque([None])

    @property
    def connections(self) -> list[Any]:
        """The connections that are being served."""
        return list(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, connection: object) -> bool:
        return connection in self._members

    def __bool__(self) -> bool:
        return True

    # -- running

    def next_event(self, timeout: float | None = None) -> DrainEvent | None:
        """Wait for the next event, of any connection, and run it.

        Args:
            timeout: seconds; None waits for ever, also while no connection has joined.

        Returns:
            What happened; None after `stop`.

        Raises:
            TimeoutError: nothing came in time (`socket.timeout` is this class).
            DrainLoopClosedError: another task is running the loop.
            Exception: what the user's callback raised, even if it is an error of this library:
                the callback may have used another connection, or acknowledged on its own when
                that was lost meanwhile.  The message stays unacknowledged, all connections stay
                in the loop, and it can go on.  What is wrong with a connection that the loop
                serves is reported in the event, never raised.
        """
        environment = get_environment()
        self._enter()
        try:
            self._runner = environment.current()
            return self._next(environment, timeout)
        finally:
            self._leave()

    def _enter(self) -> None:
        """Make this task the one that runs the loop."""
        self._forget_after_fork()
        try:
            self._permit.popleft()
        except IndexError:
            raise DrainLoopClosedError("another task is running this DrainLoop") from None

    def _leave(self) -> None:
        self._runner = None
        self._permit.append(None)

    def _next(self, environment: Environment, timeout: float | None) -> DrainEvent | None:
        ready = self._ready
        if timeout is not None:
            timeout = monotonic() + max(timeout if has_time(timeout) else 0, POLL_GRACE_SECONDS)
        while True:
            if self._stopping:
                self._stopping = False
                return None
            if self._closed:
                return None
            if monotonic() - self._turn_started > TURN_SECONDS:
                self._end_slice()
                environment.sleep(YIELD_SECONDS)
                self._begin_turn()
            try:
                member = ready.popleft()
            except IndexError:
                self._park(environment, timeout)
                continue
            member.queued = False
            if member.left:
                continue
            event = self._serve(member)
            if event is not None:
                return event

    def _park(self, environment: Environment, until: float | None) -> None:
        bell = self._alarm.bell = Bell(environment)
        # Again: what came before the bell was there has rung nobody.
        if self._ready or self._stopping or self._closed:
            return
        left = remaining(None if until is None else until - monotonic())
        if left is not None and left <= 0:
            raise TimeoutError("timed out")
        self._end_slice()
        bell.wait(left)
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._turn_started = monotonic()
        if self._slice_started is not None:
            self._slice_started = thread_time()

    def _end_slice(self) -> None:
        started = self._slice_started
        if started is not None:
            self.largest_slice = max(self.largest_slice, thread_time() - started)

    def _serve(self, member: _Member) -> DrainEvent | None:
        """Run one event of a member that may have one; None if it has none."""
        more: bool | Failure = True
        try:
            # What this raises is the callback's own, of whatever type; see `Failure`.
            more = member.transport_connection.deliver(raises=False)
        finally:
            if more and not member.left:
                # At the end of the queue: the others come first.
                member.ring()
        if isinstance(more, Failure):
            return self._failed(member, more.error)
        return member.delivered if more else None

    def _failed(self, member: _Member, error: BaseException) -> DrainEvent:
        """Report an error of one connection; it leaves if it is dead."""
        if member.transport_connection.error is not None:
            self._remove(member)
        event = DrainEvent(member.connection, error)
        if self.on_error is not None:
            self.on_error(member.connection, error)
        else:
            logger.debug("%r", event)
        return event

    def __iter__(self) -> Iterator[DrainEvent]:
        return self

    def __next__(self) -> DrainEvent:
        event = self.next_event()
        if event is None:
            raise StopIteration
        return event

    def run_forever(self) -> None:
        """Run until `stop` or `close`.

        Raises:
            Exception: what the user's callback raised; call it again to go on.
        """
        environment = get_environment()
        self._enter()
        try:
            self._runner = environment.current()
            self._slice_started = thread_time()
            while (event := self._next(environment, None)) is not None:
                if event.error is not None and self.on_error is None:
                    logger.warning("%r has failed: %r", event.connection, event.error)
        finally:
            self._end_slice()
            self._slice_started = None
            self._leave()

    def stop(self) -> None:
        """End the run, or the next one if none is under way; a signal handler may call this.

        An event that is being run is finished. Nothing is lost: the loop can be run again.
        """
        self._stopping = True
        self._alarm.ring()

    # -- closing

    def close(self, deadline: float = 10.0) -> bool:
        """End gracefully: stop the consumers, let work in hand be finished, and serve no more.

        Consumers of all connections are cancelled, so nothing new is delivered; messages that have
        come but were not handed to a callback go back to their queues. Then it waits until those
        that callbacks have taken are acknowledged or rejected. The connections stay open; what is
        not acknowledged goes back to its queue when they are closed. What a callback raises
        meanwhile is logged.

        Args:
            deadline: seconds for everything; 0 does not wait.

        Returns:
            True if no work was left in hand.
        """
        until = monotonic() + deadline
        self._closed = True
        self._alarm.ring()
        environment = get_environment()
        inside = self._runner is not None and self._runner == environment.current()
        while not inside and not self._permit and monotonic() < until:
            environment.sleep(_SETTLE_SECONDS)
        members = list(self._members.values())
        finished = True
        with Deadline(max(until - monotonic(), 0.0)):
            for member in members:
                finished &= self._quietly(member, member.transport_connection.stop_consumers)
        while True:
            for member in members:
                _run_left(member, until)
            working = sum(member.transport_connection.unsettled() for member in members)
            if not working or monotonic() >= until:
                break
            environment.sleep(_SETTLE_SECONDS)
        for member in members:
            self._remove(member)
        self._ready.clear()
        return finished and not working

    def _quietly(self, member: _Member, step: Callable[[], object]) -> bool:
        """Run one step of closing; an error of one connection must not spoil it for the others."""
        try:
            step()
        except Exception as exc:
            logger.debug("closing a drain loop: %r: %r", member.connection, exc)
            return False
        return True

    def __del__(self) -> None:
        # Also called by the garbage collector, anywhere: only entries of dicts are removed here.
        for member in self._members.values():
            member.transport_connection.inbox.unsubscribe(member.ring)

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def __repr__(self) -> str:
        state = "closed" if self._closed else "idle" if self._permit else "running"
        return f"<DrainLoop: {state}, {len(self._members)} connections, {len(self._ready)} ready>"


def _run_left(member: _Member, until: float) -> None:
    """Run the events that are left when the consumers have been cancelled."""
    connection = member.transport_connection
    while monotonic() < until:
        try:
            if not connection.deliver(raises=False) or connection.error is not None:
                return
        except Exception:
            # What waits behind it may exist nowhere else: messages that need no acknowledgement.
            logger.exception("a callback of %r failed while its loop closed", member.connection)
