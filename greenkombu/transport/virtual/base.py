"""Virtual transports: AMQP on stores that know nothing of it.

Theory of operation.  A `Connection` keeps a deque of consumers for which there may be a message.
The task that drains takes one off, fetches one message from the store, and runs the consumer's
callback; the consumer goes to the end of the deque if there may be more, so all queues of a
connection have equal turns, and a message costs the same however many consumers there are.

A store that can notify calls `Channel.notify(queue)`.  One that cannot is polled: when all
consumers of a connection have found their queues empty, a timer of the hub makes them ready again
after `Transport.polling_interval`.  It is set only while somebody drains, and no task sleeps.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Mapping
from queue import Empty
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

from greenkombu import exceptions
from greenkombu.transport import base
from greenkombu.transport.virtual.abstract import AbstractChannel
from greenkombu.transport.virtual.channel import Channel
from greenkombu.transport.virtual.consumers import Registry
from greenkombu.transport.virtual.declaring import UndeliverableWarning
from greenkombu.transport.virtual.message import Base64, Message
from greenkombu.transport.virtual.qos import QoS
from greenkombu.transport.virtual.scheduling import FairCycle
from greenkombu.transport.virtual.state import BrokerState, binding_key_t, queue_binding_t

if TYPE_CHECKING:
    from greenkombu.transport.virtual.consumers import Consumer

__all__ = [
    "AbstractChannel",
    "Base64",
    "BrokerState",
    "Channel",
    "Connection",
    "Empty",
    "Management",
    "Message",
    "QoS",
    "Transport",
    "UndeliverableWarning",
    "binding_key_t",
    "queue_binding_t",
]

# Inside `Transport` its attributes hide these names from annotations.
_Channel = Channel

#: Seconds for which consumers may find nothing before the other tasks get a turn; a turn of 5 ms
#: leaves room below the 20 ms that tickers and heartbeats can bear.
LOOK_SECONDS = 0.005

#: The shortest sleep. Under gevent a sleep of 0 seconds lets other greenlets run and no timer.
YIELD_SECONDS = 1e-6


class _Inbox(base.Inbox):
    __slots__ = ()

    @property
    def watched(self) -> bool:
        """Whether a task waits for this inbox, or a drain loop serves it."""
        return bool(self._listeners)


class Connection(base.TransportConnection):
    """The connection of a virtual transport: its channels, and which of its consumers are ready.

    Args:
        transport: the virtual transport.

    Attributes:
        channels: the open channels by number.
        registry: the consumers of the broker by queue, as far as this process knows them.
    """

    # Nothing of it is in a kernel's buffer: what `deliver` does not find is not there.
    poll_grace = 0.0

    #: Whether the store has to be asked again and again; if not, somebody tells of each message.
    polls = True

    inbox: _Inbox

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport.client)
        self.transport = transport
        self.inbox = _Inbox()
        self.registry = self._make_registry()
        self.channels: dict[int, Channel] = {}
        self._ready: deque[Consumer] = deque()
        self._free_ids: list[int] = []
        self._last_id = 0
        self._poll_set = False
        # An entry for each of this connection's callbacks that runs now.
        self._running: list[None] = []

    def _make_registry(self) -> Registry:
        return Registry()

    @property
    def state(self) -> BrokerState:
        """Exchanges and bindings."""
        return self.transport.state

    @property
    def transport_options(self) -> Mapping[str, Any]:
        """The options of the client."""
        return self.transport.transport_options

    # -- channel numbers

    def _claim_channel_id(self) -> int:
        if self.error is not None:
            raise self.error.with_traceback(None)
        try:
            return self._free_ids.pop()
        except IndexError:
            pass
        limit = self.transport.channel_max
        if self._last_id >= limit:
            raise exceptions.ResourceError(
                f"No free channel ids, current={len(self.channels)}, channel_max={limit}; close "
                "channels that are not needed",
                (20, 10),
                "Channel.open",
                "506",
            )
        self._last_id += 1
        return self._last_id

    def _forget_channel(self, channel: Channel) -> None:
        if self.channels.pop(channel.channel_id, None) is not None:
            self._free_ids.append(channel.channel_id)

    # -- readiness

    def _make_ready(self, consumer: Consumer) -> bool:
        """Put a consumer that somebody claimed among the ready ones.

        Returns:
            Whether a task is about to look: one waits or loops, and is not in a callback of this
            connection.
        """
        self._ready.append(consumer)
        inbox = self.inbox
        if not inbox.watched:
            return False
        inbox.notify()
        return not self._running

    def _forget_ready(self, consumer: Consumer) -> None:
        try:
            self._ready.remove(consumer)
        except ValueError:
            pass  # it waits somewhere else

    def _parked(self) -> None:
        """Note that a consumer found its queue empty: where nobody tells, look again later."""
        interval = self.transport.polling_interval if self.polls else None
        if interval is not None and not self._poll_set and self.error is None:
            self._poll_set = True
            _call_later(interval, weakref.WeakMethod(self._poll_again))

    def _poll_again(self) -> None:
        self._poll_set = False
        self.registry.wake_all()

    def deliver(self, raises: bool = True) -> bool | base.Failure:
        """Run one event, or fetch and deliver one message, in the calling task.

        What the store raises in the fetch is a failure; otherwise see the base class.
        """
        ready, running, inbox = self._ready, self._running, self.inbox
        started = 0.0
        # Where the store is polled, each that is ready now has one look, and no second one: polling
        # makes consumers ready while others still look, and the caller has a deadline to keep.
        looks = len(ready) if self.polls else -1
        while looks and not inbox:
            looks -= 1
            try:
                consumer = ready.popleft()
            except IndexError:
                break
            running.append(None)
            try:
                served = consumer.channel._serve(consumer)
                if served:
                    return served.reported(raises) if isinstance(served, base.Failure) else True
            finally:
                running.pop()
            now = monotonic()
            if not started:
                started = now
            elif now - started > LOOK_SECONDS:
                self._let_others_run()
                started = monotonic()
        ran = super().deliver(raises)
        if ran:
            return ran
        if ready:
            inbox.notify()  # the caller is to come again
        return False

    @staticmethod
    def _let_others_run() -> None:
        from hub.environment import get_environment

        get_environment().sleep(YIELD_SECONDS)

    # -- closing

    def close(self, timeout: float | None = None) -> None:
        """Close the channels, which gives unsettled deliveries back, and then the connection."""
        failure: BaseException | None = None
        self._ready.clear()
        for channel in list(self.channels.values()):
            try:
                channel.close()
            except Exception as exc:
                failure = failure or exc
        super().close(timeout)
        if failure is not None:
            raise failure

    def abort(self, error: BaseException | None = None) -> None:
        """Declare the connection dead at once, without asking the store; see the base class.

        Its consumers get nothing any more. Unsettled deliveries of a store go back by the store's
        own means, if it has any.
        """
        super().abort(error)
        for channel in list(self.channels.values()):
            channel._abandon()
        self.channels.clear()
        self._ready.clear()


class Management(base.Management):
    """Broker-wide queries of a virtual transport."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.channel = transport.client.channel()

    def get_bindings(self) -> list[dict[str, str]]:
        """List all bindings of the broker: destination, source, routing_key."""
        bindings: list[dict[str, str]] = self.channel.get_bindings()
        return bindings

    def close(self) -> None:
        """Close the channel that the queries use."""
        self.channel.close()


_Connection = Connection


class Transport(base.Transport):
    """A virtual transport.

    Args:
        client: the `greenkombu.Connection` that owns it.

    Attributes:
        state: exchanges and bindings.
        cycle: the channels, fairly in turn.
    """

    Channel: type[_Channel] = Channel
    Cycle: type[FairCycle[Any]] = FairCycle
    Connection: type[_Connection] = Connection
    Management: type[base.Management] = Management

    driver_type = "virtual"
    default_port: int | None = None
    #: Seconds between two looks into a store that cannot notify; the transport option of this
    #: name sets it. None never looks again by itself.
    polling_interval: float | None = 1.0
    #: How many channels a connection can have; AMQP numbers them with 16 bits.
    channel_max = 65535
    #: Exchanges and bindings; None makes each transport its own.
    global_state: ClassVar[BrokerState | None] = None

    implements = base.Transport.implements.extend(
        asynchronous=False,
        exchange_type=frozenset({"direct", "topic", "headers"}),
        heartbeats=False,
        dead_letter=True,
        returns=True,
    )

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self.state = BrokerState() if self.global_state is None else self.global_state
        self._connections: weakref.WeakSet[_Connection] = weakref.WeakSet()
        interval = self.transport_options.get("polling_interval")
        if interval is not None:
            self.polling_interval = interval
        self._cycle: FairCycle[_Channel] | None = None

    @property
    def transport_options(self) -> Mapping[str, Any]:
        """The options of the client."""
        return getattr(self.client, "transport_options", None) or {}

    @property
    def channels(self) -> list[_Channel]:
        """The open channels of all connections of this transport."""
        return [each for connection in self._connections for each in connection.channels.values()]

    @property
    def cycle(self) -> FairCycle[_Channel]:
        """The channels, fairly in turn: `cycle.get(callback)` fetches one message."""
        cycle = self._cycle
        channels = self.channels
        if cycle is None or cycle.resources != channels:
            cycle = self._cycle = self.Cycle(self._drain_channel, channels, Empty)
        return cycle

    def _drain_channel(
        self, channel: _Channel, callback: Any = None, timeout: float | None = None
    ) -> Any:
        return channel.drain_events(callback=callback, timeout=timeout)

    def establish_connection(self) -> _Connection:
        """Make a connection; a store is asked when it is first used, unless a transport differs."""
        connection = self.Connection(self)
        self._connections.add(connection)
        return connection

    def close_connection(self, connection: _Connection) -> None:
        """Close a connection and its channels; unsettled deliveries are given back."""
        self._cycle = None
        self._connections.discard(connection)
        connection.close()

    def create_channel(self, connection: _Connection) -> _Channel:
        """Open a channel.

        Raises:
            ResourceError: the connection has `channel_max` channels.
        """
        channel = self.Channel(connection)
        connection.channels[channel.channel_id] = channel
        return channel

    def close_channel(self, channel: _Channel) -> None:
        """Close a channel."""
        channel.close()

    @property
    def default_connection_params(self) -> dict[str, Any]:
        """What stands in for parameters that were not given."""
        return {"port": self.default_port, "hostname": "localhost"}


def _call_later(delay: float, callback: weakref.WeakMethod[Any]) -> None:
    """Call a method after `delay` seconds, unless its object is gone; from any thread."""
    from hub.shared import get_hub

    hub = get_hub()
    hub.call_soon_threadsafe(hub.call_later, delay, _call_weak, callback)


def _call_weak(callback: weakref.WeakMethod[Any]) -> None:
    method = callback()
    if method is not None:
        method()
