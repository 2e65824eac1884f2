"""What a drain loop sees of a transport's connection.

Theory of operation.  Whatever arrives for the user of a connection (a delivery, a returned
message, a consumer that the broker cancelled) is an *event*: a function without arguments that
calls the user back.  Whoever receives it, a hub callback, another task, another native thread,
appends it to the connection's `Inbox` and goes on; it never runs it.  The task that drains takes
events off and runs them, one for each `deliver()`, so a user's callback runs only where the user
asked for it, and a callback that publishes on its own connection cannot recurse into the drain.

What an event *raises* is the user's, whatever its type: a callback may let out an error of another
connection.  What goes wrong with the connection itself is a `Failure`, which the event, or the
transport's fetch, *returns*.  `deliver()` raises its error for a drain of this one connection, and
gives the failure to a loop of many, which so knows for certain whom an error concerns.

Nobody polls.  A drain that finds nothing subscribes a listener to the inbox and parks; `append`
and `notify` call the listeners, which only set flags and wake waiters.  A
`greenkombu.drain.DrainLoop` stays subscribed to each of its connections, so that its work for an
event does not depend on how many connections there are.

Stores that are pulled (`transport.virtual`) override `deliver` to fetch one message, and call
`inbox.notify()` when there may be one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from hub.arguments import has_time
from hub.environment import get_environment

if TYPE_CHECKING:
    from hub.environment import Environment, Waiter

__all__ = ("Bell", "Failure", "Inbox", "TransportConnection")

Event = Callable[[], object]
Listener = Callable[[], object]

# A task that always finds a message waiting would never let another one run. 5 ms leaves room for
# one long callback below the 20 ms that a slice of the loop may take, and costs one switch for
# some thousand messages.
TURN_SECONDS = 0.005

# How to give them their turn. A sleep of nothing lets run what is ready, again and again, before
# the green loop looks at its descriptors and timers; one that is over at once waits for that look.
YIELD_SECONDS = 1e-9

# `drain_events(timeout=0)` asks for what has arrived. What has arrived may still be in the
# kernel, and only the hub reads it: one millisecond lets the hub make one turn, in every
# environment.
POLL_GRACE_SECONDS = 0.001


class Inbox:
    """Hold the events of one connection until a drain runs them.

    Every state change is one atomic operation on a deque or a dict, so hub callbacks, other
    native threads, signal handlers and finalizers may append while a task takes off.
    """

    __slots__ = ("__weakref__", "_events", "_listeners")

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._listeners: dict[Listener, None] = {}

    def append(self, event: Event) -> None:
        """Add `event` at the end and tell the listeners.

        Args:
            event: called without arguments by the task that drains; what it returns is dropped,
                unless that is a `Failure`.
        """
        self._events.append(event)
        if self._listeners:
            self.notify()

    def popleft(self) -> Event | None:
        """Take the oldest event off; None if there is none."""
        try:
            return self._events.popleft()
        except IndexError:
            return None

    def clear(self) -> int:
        """Drop every waiting event.

        Returns:
            How many were dropped.
        """
        dropped = 0
        while self.popleft() is not None:
            dropped += 1
        return dropped

    def notify(self) -> None:
        """Call every listener: something may have come, or the connection has failed."""
        for listener in list(self._listeners):
            listener()

    def subscribe(self, listener: Listener) -> None:
        """Have `listener()` called whenever something is appended, or on `notify()`.

        Args:
            listener: must not block, switch or raise; it is called by whoever appends.
                Subscribing twice is the same as once.
        """
        self._listeners[listener] = None

    def unsubscribe(self, listener: Listener) -> None:
        """Stop calling `listener`; does nothing if it is not subscribed."""
        self._listeners.pop(listener, None)

    def __len__(self) -> int:
        return len(self._events)

    def __bool__(self) -> bool:
        """An inbox is true when an event waits."""
        return bool(self._events)

    def __repr__(self) -> str:
        return f"<Inbox: {len(self._events)} waiting, {len(self._listeners)} listening>"


class Failure:
    """What an event returns when something is wrong with its connection or channel.

    Args:
        error: the error; its type says nothing about whose it is, that it is in here does.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def reported(self, raises: bool) -> Failure:
        """Return it, or raise its error."""
        if raises:
            raise self.error
        return self

    def __repr__(self) -> str:
        return f"<Failure: {self.error!r}>"


class Bell:
    """Park one task until any of several inboxes rings.

    Use: `arm()`, look whether there is work, `wait()`. A ring between the two is not lost.
    """

    __slots__ = ("_environment", "_waiter")

    def __init__(self, environment: Environment | None = None) -> None:
        self._environment = environment or get_environment()
        self._waiter: Waiter = self._environment.waiter()

    def arm(self) -> None:
        """Get ready for the next wait; rings from now on end it."""
        if self._waiter.woken:
            self._waiter = self._environment.waiter()

    def ring(self) -> None:
        """End the wait, or the next one. Callable from anywhere; never blocks."""
        self._waiter.wake()

    def wait(self, timeout: float | None = None) -> bool:
        """Park until a ring.

        Args:
            timeout: seconds; None waits for ever.

        Returns:
            False if the time ran out.
        """
        if timeout is None:
            # gevent ends a wait that no watcher could end (LoopExit); a ring may come from a signal
            # handler or another native thread, and with the hub there is always a watcher.
            from hub.shared import get_hub

            get_hub(self._environment)
        waiter = self._waiter
        rung = waiter.wait(timeout)
        if not rung:
            # A waiter serves one wait; its time ran out, so the next wait needs another one. A
            # ring that comes in between goes to the old one, therefore `arm` is followed by a
            # look for work.
            self._waiter = self._environment.waiter()
        return rung


class TransportConnection:
    """The connection object of a transport: what `Transport.establish_connection` returns.

    Attributes:
        client: the `greenkombu.Connection` that owns it, None when it was closed.
        inbox: events that wait for a drain.
        channels: the open channels, in whatever container the transport keeps them.
        error: why the connection is dead; None while it lives.
        served: a number that grows; `greenkombu.drain_events` notes here whose turn it was.
    """

    # Memory has nothing in a kernel; it sets 0.
    poll_grace: float = POLL_GRACE_SECONDS

    client: Any
    inbox: Inbox
    channels: Any
    error: BaseException | None
    # Set by few: an AMQP connection saves itself a place for it.
    served: int = 0

    def __init__(self, client: Any = None) -> None:
        self.client = client
        self.inbox = Inbox()
        self.channels = []
        self.error = None
        self._turn_started = 0.0

    @property
    def connected(self) -> bool:
        """True until the connection was closed or has failed."""
        return self.error is None

    def deliver(self, raises: bool = True) -> bool | Failure:
        """Run at most one waiting event in the calling task.

        Args:
            raises: raise the error of a failure; else return the failure.

        Returns:
            True if one ran, False if none waited; or a failure.

        Raises:
            BaseException: what the user's callback raised; the event is used up. If `raises`, also
                the error of a failure, as `error` when the connection is dead and nothing waits.
        """
        event = self.inbox.popleft()
        if event is None:
            if self.error is None:
                return False
            # One error may be raised many times; its traceback must not grow with each.
            result: object = Failure(self.error.with_traceback(None))
        else:
            result = event()
        if isinstance(result, Failure):
            return result.reported(raises)
        return True

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for one event and run it in the calling task.

        Any number of tasks may drain one connection; each event runs once.

        Args:
            timeout: seconds; None waits for ever, 0 takes what has arrived.

        Raises:
            TimeoutError: nothing came in time (`socket.timeout` is this class).
            BaseException: the connection's `error` when it is dead, or what the user's callback
                raised.
        """
        environment = get_environment()
        self._breathe(environment)
        if not self.deliver():
            self._await_event(environment, timeout)

    def _await_event(self, environment: Environment, timeout: float | None) -> None:
        """Park until an event has come and run it; see `drain_events`."""
        wait = timeout = remaining(timeout)
        if timeout is not None and not has_time(timeout):
            wait = self.poll_grace
            if wait <= 0:
                raise TimeoutError("timed out")
        deadline = None if wait is None else monotonic() + wait
        bell = Bell(environment)
        ring = bell.ring
        self.inbox.subscribe(ring)
        try:
            while True:
                bell.arm()
                if self.deliver():
                    return
                left = None if deadline is None else deadline - monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError("timed out")
                bell.wait(left)
                self._turn_started = monotonic()
        finally:
            self.inbox.unsubscribe(ring)

    def _breathe(self, environment: Environment) -> None:
        """Let the other tasks run when this one has drained for a whole turn without a wait."""
        now = monotonic()
        if now - self._turn_started > TURN_SECONDS:
            environment.sleep(YIELD_SECONDS)
            self._turn_started = monotonic()

    def stop_consumers(self) -> None:
        """Cancel the consumers of all channels: nothing new is fetched or asked for.

        The deadline of the calling task (`greenkombu.deadline`) bounds it.

        Raises:
            BaseException: a cancel failed; the other consumers were cancelled all the same.
        """
        failure: Exception | None = None
        for channel in self._open_channels():
            # Kombu's virtual channels keep their tags in `_consumers`, amqp's in `callbacks`.
            tags: Any = getattr(channel, "_consumers", None) or getattr(channel, "callbacks", ())
            for tag in list(tags):
                try:
                    channel.basic_cancel(tag)
                except Exception as exc:
                    failure = failure or exc
        if failure is not None:
            raise failure

    def unsettled(self) -> int:
        """Count the deliveries that callbacks have taken and neither acknowledged nor rejected.

        A channel that does not count them is taken to have none.
        """
        return sum(map(_unsettled, self._open_channels()))

    def _open_channels(self) -> list[Any]:
        channels = self.channels
        return list(channels.values() if isinstance(channels, dict) else channels or ())

    def abort(self, error: BaseException | None = None) -> None:
        """Declare the connection dead at once; sends nothing, waits for nothing, never raises.

        Args:
            error: the reason, raised from then on by `deliver`; None says that we closed it. The
                first reason stays.
        """
        if self.error is None:
            self.error = error if error is not None else self.closed_error()
            self.inbox.notify()

    def close(self, timeout: float | None = None) -> None:  # noqa: ARG002
        """Close within `timeout` seconds; a transport that has a peer says goodbye first."""
        self.abort()

    def closed_error(self) -> BaseException:
        """Make the error that a task gets which uses this connection after it was closed by us."""
        from greenkombu import exceptions

        return exceptions.ConnectionClosedError(
            "the connection was closed; connect again before using it"
        )

    def __repr__(self) -> str:
        state = "connected" if self.connected else f"dead: {self.error!r}"
        counts = f"{len(self.channels or ())} channels, {len(self.inbox)} waiting"
        return f"<{type(self).__name__}: {state}, {counts}>"


def _unsettled(channel: Any) -> int:
    count: int | None = getattr(channel, "unsettled", None)
    if count is None:
        # What channels have that are written as Kombu's virtual ones.
        count = len(getattr(getattr(channel, "_qos", None), "_delivered", ()))
    return count
