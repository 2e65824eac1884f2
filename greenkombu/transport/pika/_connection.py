"""A connection whose protocol is pika's.

What does not depend on who encodes the bytes is inherited from `greenkombu._amqp`: the inbox and
its back-pressure, waiting for room, the sweep of the confirms, the ways in which a connection
ends.  The handshake, the channels, the heartbeats and the farewell are pika's; see `_services`
and `_link`.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

import pika
from pika.compat import as_bytes
from pika.credentials import ExternalCredentials, PlainCredentials

from greenkombu._amqp.errors import ChannelLimitError
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.handshake import Handshake, State
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.opening import Opening, parse_host
from greenkombu._amqp.protocol import MethodEvent
from greenkombu._amqp.rpc import PendingReply, fresh
from greenkombu.deadline import remaining
from greenkombu.exceptions import UnsupportedOperation
from greenkombu.transport import pyamqp
from greenkombu.transport.pika._channel import Channel
from greenkombu.transport.pika._ear import Delivery
from greenkombu.transport.pika._link import Link
from greenkombu.transport.pika._requests import shortened
from hub.errors import HubError

if TYPE_CHECKING:
    from greenkombu._amqp.methods import Method
    from greenkombu.transport.pika._services import Protocol
    from hub.streams import StreamHandler

__all__ = ["Connection"]

_OPEN_OK = BY_NAME["Connection.open_ok"]

# What pika's states mean for whoever wants to know why the broker has hung up.
_STATES = {
    pika.connection.Connection.CONNECTION_START: State.LOGIN,
    pika.connection.Connection.CONNECTION_TUNE: State.OPENING,
}


class _Channels:
    """The channels of a connection, weakly; those with consumers strongly.

    Attributes:
        open: channels that the broker has, or will have; changed in the hub only.
        room: opened when there may be a number for one more.
    """

    def __init__(self) -> None:
        self.channel_max = 0
        self.open = 0
        self.room = Gate()
        self._refs: dict[int, weakref.ref[Channel]] = {}
        self._anchors: dict[int, Channel] = {}

    def __len__(self) -> int:
        return self.open

    def enter(self, channel: Channel) -> None:
        key = id(channel)
        refs = self._refs
        refs[key] = weakref.ref(channel, lambda _: refs.pop(key, None))

    def leave(self, channel: Channel) -> None:
        self._refs.pop(id(channel), None)
        self._anchors.pop(id(channel), None)

    def anchor(self, channel: Channel, needed: bool) -> None:
        if needed:
            self._anchors[id(channel)] = channel
        else:
            self._anchors.pop(id(channel), None)

    def all(self) -> list[Channel]:
        channels = [reference() for reference in list(self._refs.values())]
        return [channel for channel in channels if channel is not None]

    def in_use(self) -> dict[int, Channel]:
        return {channel.channel_id: channel for channel in self.all() if channel.is_open}

    def die(self, error: BaseException) -> None:
        for channel in self.all():
            channel.die(error)
        self._anchors.clear()
        self.room.open()


class _Opening(Opening):
    """Connecting, with pika's handshake."""

    __slots__ = ("_link", "_parameters")

    def __init__(
        self, connection: Connection, handshake: Handshake, link: Link, parameters: Any
    ) -> None:
        super().__init__(connection, lambda: handshake)
        self._link = link
        self._parameters = parameters

    def run(self, ear: StreamHandler, timeout: float) -> None:  # noqa: ARG002  the link listens
        deadline = monotonic() + timeout
        self.open_stream(self._link, timeout)
        connection = self._connection
        host, port = parse_host(connection.broker, 0)
        self._parameters.host, self._parameters.port = host, port
        link = self._link
        link.stream = connection.stream
        link.post(link.begin, self._parameters, connection.options.max_message_size)
        self.next(deadline, timeout)


class Connection(pyamqp.Connection):
    """A connection to one broker; the arguments are those of `pyamqp.Connection`, by keyword.

    Raises:
        UnsupportedOperation: a login method that pika does not have.
    """

    Channel: ClassVar[Any] = Channel
    Message: ClassVar[Any] = Delivery

    table: Any
    _opening: Any

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        credentials = _credentials(
            arguments.get("login_method"), arguments.get("userid"), arguments.get("password")
        )
        self.table = _Channels()
        self.link = Link(self)
        self._goodbye: list[PendingReply] = []
        opening = self._opening
        assert opening is not None
        wanted = arguments.get("heartbeat") or 0
        properties = {**self.client_properties, "information": f"pika {pika.__version__}"}
        parameters = pika.ConnectionParameters(
            virtual_host=self.virtual_host,
            credentials=credentials,
            heartbeat=lambda _connection, server: _agree(wanted, server),
            locale=arguments.get("locale") or "en_US",
            client_properties=properties,
            **{
                name: arguments[name]
                for name in ("channel_max", "frame_max")
                if arguments.get(name)
            },
        )
        self._opening = _Opening(self, opening.handshake, self.link, parameters)
        # pika's timers refer to its part of the connection, so that does not go by itself.
        weakref.finalize(self, _reap, self.link).atexit = False

    # -- what pika tells, in the hub

    def greeted(self, method: Any) -> None:
        """Note what pika does not keep of Connection.start."""
        if self._opening is not None:
            self._opening.handshake.mechanisms = as_bytes(method.mechanisms).split()
            self._opening.handshake.locales = as_bytes(method.locales).decode().split()

    def handshaken(self, protocol: Protocol) -> None:
        """Take over what was agreed, and wake the task that connects."""
        opening = self._opening
        if opening is None:
            return
        handshake = opening.handshake
        self._note(handshake, protocol)
        handshake.channel_max = protocol.params.channel_max
        handshake.frame_max = protocol.params.frame_max
        handshake.heartbeat = protocol.params.heartbeat
        self.take_over(handshake)
        self.intake.stream = self.link
        handshake.state = State.OPEN  # last: the task goes on as soon as it sees that
        opening.greet(MethodEvent(0, _OPEN_OK, ("",)))

    def _note(self, handshake: Handshake, protocol: Protocol) -> None:
        """Note how far the handshake has come."""
        handshake.state = _STATES.get(protocol.connection_state, State.STARTING)
        handshake.server_properties = protocol.server_properties or {}

    def ended_by_broker(self, code: int, text: str, signature: tuple[int, int]) -> None:
        """The broker has closed the connection, and said why."""
        opening, protocol = self._opening, self.link.protocol
        if opening is not None and protocol is not None:
            self._note(opening.handshake, protocol)
            self.abort(opening.handshake.refused(code, text, signature))
        else:
            super().ended_by_broker(code, text, signature)

    def connection_lost(self, error: BaseException | None) -> None:
        """Take the end of the stream; see the base class."""
        opening, protocol = self._opening, self.link.protocol
        if opening is not None and protocol is not None:
            self._note(opening.handshake, protocol)
        super().connection_lost(error)

    def said_goodbye(self) -> None:
        """The broker has answered our Connection.close."""
        while self._goodbye:
            self._goodbye.pop().answer(MethodEvent(0, BY_NAME["Connection.close_ok"], ()))

    # -- from tasks

    def _opened(self) -> None:
        # pika sees to the heartbeats.
        interval, self.heartbeat = self.heartbeat, 0
        super()._opened()
        self.heartbeat = interval

    def post(self, step: Callable[..., object], *arguments: Any) -> None:
        """Run `step(*arguments)` in the hub soon, unless the connection is dead; never waits.

        Who waits for what comes of it is told by the end of the connection.

        Raises:
            HubError: the interpreter is shutting down.
        """
        if self.error is None:
            try:
                self.link.post(step, *arguments)
            except HubError:
                if sys.is_finalizing():
                    raise
                # Else it has told, or is about to tell, the connection.

    def channel(
        self, channel_id: int | None = None, callback: Callable[[Any], object] | None = None
    ) -> Any:
        """Open a channel; see the base class. Its number is of pika's choice.

        Raises:
            UnsupportedOperation: a number that is not in use was asked for.
        """
        if channel_id is not None and channel_id not in self.channels:
            raise UnsupportedOperation("the pika transport (amqp) chooses channel numbers itself")
        bound = remaining(self.options.channel_timeout)
        deadline = None if bound is None else monotonic() + bound
        while True:
            try:
                return super().channel(channel_id, callback)
            except ChannelLimitError:
                left = None if deadline is None else deadline - monotonic()
                if not self.table.room.wait(self._has_number, left):
                    raise

    def _has_number(self) -> bool:
        return self.error is not None or self.table.open < self.table.channel_max

    def _request(
        self, method: Method, values: tuple[Any, ...], timeout: float | None
    ) -> MethodEvent:
        # The only request of a connection is its farewell.
        pending = PendingReply(method, frozenset(), self.environment.waiter())
        self._goodbye.append(pending)
        self._replies.append(pending)  # who is told if the connection ends otherwise
        if self.error is not None:
            raise fresh(self.error)
        with self.awaiting():
            self.post(self._say_goodbye, values[0] or 200, values[1] or "bye")
            return pending.wait(remaining(timeout), self)

    def _say_goodbye(self, code: int, text: str) -> None:
        protocol = self.link.protocol
        if protocol is not None and protocol.is_open:
            protocol.close(code, shortened(text))

    def send(self, data: Any, flush: bool = False, asks: bool = False) -> None:  # noqa: ARG002
        """Refuse bytes: they are pika's to make."""
        raise UnsupportedOperation("the pika transport (amqp) sends no bytes but pika's")

    def send_heartbeat(self) -> None:
        """Do nothing: pika sends them when they are due."""


def _agree(wanted: float, server: int) -> int:
    """Return the heartbeat interval, as the pyamqp transport: 0, or the smaller wish."""
    if not wanted:
        return 0
    whole = math.ceil(wanted)
    return min(whole, server) if server else whole


def _credentials(method: str | None, user: str | None, password: str | None) -> Any:
    name = (method or ("EXTERNAL" if user is None or password is None else "PLAIN")).upper()
    if name == "EXTERNAL":
        return ExternalCredentials()
    if name == "PLAIN":
        return PlainCredentials(user or "", password or "")
    raise UnsupportedOperation(
        f"the pika transport (amqp) has no login_method {method!r}; it has PLAIN and EXTERNAL"
    )


def _reap(link: Link) -> None:
    """Finalizer of a connection that was dropped without close(): the hub ends its stream."""
    stream = link.stream
    if stream is not None:
        try:
            stream.hub.call_soon_threadsafe(stream.abort, None)
        except HubError:
            pass  # it has ended the stream
