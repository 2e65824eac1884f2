"""An AMQP connection on the hub: one stream, any number of channels, any number of tasks.

Theory of operation.  The hub reads blocks of bytes; the parser makes events of them, and
`_dispatch` hands each to whom it concerns: deliveries to the inbox, replies and confirms to the
channel's waiting tasks, the broker's own news (blocked, close) to the connection.  None of that
waits or calls user code.  Tasks write: a message is appended to the stream's out-buffer as one
piece, by whatever task, and never torn.

*Order.*  Where the order of the bytes decides who gets which answer (requests, numbered
publishes), entering the queue and appending the bytes is one step of `exclusive`: a deque of
steps, run by whoever gets a lock that nobody ever waits for.  Under green threads it is always
free; with native threads, whoever has it also runs the steps of the others.  If an exception
(a signal handler's) lands between the two halves of a step, the connection is aborted, because
nobody could tell which answer belongs to whom.

*Life.*  `connect` holds the handshake (`opening`); then the connection lives until
`close` (polite, bounded), `abort` (at once, without a word), Connection.close of the broker, an
error of the stream, a lost heartbeat, or a fork.  It ends once, with one `error`, that every task
gets which waits on it or uses it afterwards; it is not opened again.  Only the task whose request
the broker ended it for gets another one, which says so (`ended_by_broker`).

*Back-pressure.*  Outward, a publish waits while the stream is above its high-water mark or the
broker has sent Connection.blocked.  Inward, the socket is not read while too much waits in the
inbox, unless a task waits for an answer, which could be behind it; then the inbox may grow to a
hard bound.

*Channel numbers* come back by Channel.close_ok only, or after the broker's own Channel.close:
never because a caller has gone.  The table refers to channels weakly; one that was dropped
without close() is closed from here.

This module is long because what it holds shares one state; what can stand alone does: `opening`,
`table`, `inbox`, `heartbeat`, `interface`.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Hashable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar

import amqp
from amqp.exceptions import ChannelError
from amqp.exceptions import ConnectionError as AMQPConnectionError

from greenkombu import __version__
from greenkombu._amqp.channel import Channel as AnyChannel
from greenkombu._amqp.dialogue import Key
from greenkombu._amqp.errors import (
    ConnectionLostError,
    HeartbeatLostError,
    ProtocolError,
    WriteTimeoutError,
)
from greenkombu._amqp.frames import HEARTBEAT, Encoded, encode_method
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.handshake import Handshake, closed_by_broker, make_authentication
from greenkombu._amqp.heartbeat import Action, Heartbeat
from greenkombu._amqp.inbox import Awaiting, DeliveryInbox, Intake
from greenkombu._amqp.interface import AMQPInterface
from greenkombu._amqp.message import Received
from greenkombu._amqp.methods import BY_NAME, Method, replies_to
from greenkombu._amqp.opening import Opening
from greenkombu._amqp.options import AMQPOptions
from greenkombu._amqp.protocol import Confirmation, MethodEvent, Parser
from greenkombu._amqp.pulse import join
from greenkombu._amqp.requests import NOTHING
from greenkombu._amqp.rpc import PendingReply, fail_all, fresh, take_reply
from greenkombu._amqp.table import ChannelTable
from greenkombu.deadline import remaining
from greenkombu.exceptions import ConfirmTimeoutError, ConnectionBlocked, ConnectionClosedError
from greenkombu.transport._connection import TURN_SECONDS, Failure, TransportConnection
from hub.environment import get_environment
from hub.errors import HubError, StreamError, StreamForkedError

if TYPE_CHECKING:
    from greenkombu._amqp.confirms import ConfirmTracker
    from hub.streams import Stream

__all__ = ["Connection"]

logger = logging.getLogger(__name__)

#: Seconds for connecting and logging in, where the caller set no bound.
CONNECT_TIMEOUT = 10.0

#: Seconds that a polite close may take while the broker reads nothing (connection.blocked).
BLOCKED_CLOSE_TIMEOUT = 0.3

# How often per confirm_timeout the unconfirmed publishes are looked at.
SWEEPS = 10

_CLOSE = BY_NAME["Connection.close"]
_CLOSE_OK = BY_NAME["Connection.close_ok"]
_CHANNEL_CLOSE = BY_NAME["Channel.close"]
_CHANNEL_CLOSE_OK = BY_NAME["Channel.close_ok"]

# What the broker says during the handshake only.
_GREETINGS = frozenset(
    {"Connection.start", "Connection.secure", "Connection.tune", "Connection.open_ok"}
)


class _Ear:
    """What the stream talks to: it must not keep a connection alive that its user dropped."""

    __slots__ = ("_connection",)

    def __init__(self, connection: Connection) -> None:
        self._connection = weakref.ref(connection)

    def data_received(self, data: bytes) -> None:
        connection = self._connection()
        if connection is not None:
            connection.data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        connection = self._connection()
        if connection is not None:
            connection.connection_lost(error)

    def write_resumed(self) -> None:
        connection = self._connection()
        if connection is not None:
            connection.gate.open()


# Slots: a dict of that many entries is what an idle connection would mostly consist of.
_SLOTS = (
    "_ended",
    "_ending",
    "_heartbeat",
    "_opening",
    "_parser",
    "_replies",
    "_stepping",
    "_steps",
    "_sweeping",
    "_turn_started",
    "blocked",
    "broker",
    "channel_max",
    "client",
    "client_heartbeat",
    "client_properties",
    "confirm_publish",
    "connect_timeout",
    "environment",
    "error",
    "frame_max",
    "gate",
    "heartbeat",
    "host",
    "inbox",
    "intake",
    "kinds",
    "locales",
    "mechanisms",
    "on_blocked",
    "on_open",
    "on_tune_ok",
    "on_unblocked",
    "options",
    "server_heartbeat",
    "server_properties",
    "socket_settings",
    "ssl",
    "stream",
    "suspect",
    "table",
    "version_major",
    "version_minor",
    "virtual_host",
    "write_timeout",
)


class Connection(AMQPInterface, TransportConnection, amqp.Connection):  # type: ignore[misc]
    """A connection to one broker.

    The arguments up to `on_tune_ok` are those of `amqp.Connection`.

    Args:
        host: "host", "host:port", "[ipv6]:port".
        ssl: see `greenkombu._amqp.tls.make_context`.
        connect_timeout: seconds for resolving, connecting, TLS and login together.
        heartbeat: seconds; 0 switches heartbeats off.
        on_blocked, on_unblocked: called with the reason, and with nothing, by the draining task.
        confirm_publish: every publish waits for its confirm.
        read_timeout: kept for amqp's sake, not used.
        socket_settings: option (name or number at level IPPROTO_TCP) -> value.
        client: the `greenkombu.Connection` that owns it.
        options: bounds and habits; None takes the defaults, or what **kwargs say of them.
        **kwargs: fields of `AMQPOptions`; others are ignored, as amqp does.

    Attributes:
        broker: "host:port", for errors and logs.
        blocked: why the broker blocks publishers; None if it does not.
        suspect: True once a confirm did not come in time, although the broker did not block
            publishers: pools do not hand it out again.
    """

    __slots__ = _SLOTS

    Channel: ClassVar[Any] = AnyChannel
    #: Makes the objects for messages; see `protocol.Delivery` for the arguments.
    Message: ClassVar[Callable[..., Any]] = Received

    library_properties: ClassVar[dict[str, Any]] = {
        "product": "greenkombu",
        "version": __version__,
        "product_version": __version__,
        "platform": "Python",
    }

    # Not the base's __init__: state is ours (see the module's header).
    def __init__(
        self,
        host: str = "localhost:5672",
        userid: str | None = "guest",
        password: str | None = "guest",
        login_method: str | None = None,
        login_response: Any = None,
        authentication: Any = (),
        virtual_host: str | None = "/",
        locale: str = "en_US",
        client_properties: Mapping[str, Any] | None = None,
        ssl: Any = False,
        connect_timeout: float | None = None,
        channel_max: int | None = None,
        frame_max: int | None = None,
        heartbeat: float | None = 0,
        on_open: Callable[[Any], object] | None = None,
        on_blocked: Callable[[str], object] | None = None,
        on_unblocked: Callable[[], object] | None = None,
        confirm_publish: bool = False,
        on_tune_ok: Callable[[Any], object] | None = None,
        read_timeout: float | None = None,
        write_timeout: float | None = None,
        socket_settings: Mapping[Any, Any] | None = None,
        *,
        client: Any = None,
        options: AMQPOptions | None = None,
        **kwargs: Any,
    ) -> None:
        self.client = client
        self.inbox: DeliveryInbox = DeliveryInbox()
        self.error: BaseException | None = None
        self._turn_started = 0.0
        self.host = host
        self.broker = host
        self.virtual_host = virtual_host or "/"
        if options is None:
            if write_timeout is not None:
                kwargs.setdefault("write_timeout", write_timeout)
            options = AMQPOptions.from_mapping(kwargs)
        self.options = options
        self.ssl = ssl
        self.connect_timeout = connect_timeout
        del read_timeout  # nothing here reads on its own
        self.write_timeout = write_timeout
        self.socket_settings = socket_settings
        self.confirm_publish = confirm_publish
        self.on_blocked = on_blocked
        self.on_unblocked = on_unblocked
        self.on_open = on_open
        self.on_tune_ok = on_tune_ok
        self.client_properties = {**self.library_properties, **(client_properties or {})}
        key: Hashable | None = None
        if options.quick_handshake and not authentication and login_response is None:
            # Numbers that are equal may be of several types on the wire.
            given = client_properties
            if not given or all(type(value) is str for value in given.values()):
                key = Key((
                    host, userid, password, login_method, bool(ssl), self.virtual_host, locale,
                    heartbeat, channel_max, frame_max, tuple(self.client_properties.items()),
                ))  # fmt: skip

        def begin() -> Handshake:
            if not authentication:
                chosen = make_authentication(login_method, userid, password, login_response)
            elif isinstance(authentication, (list, tuple)):
                chosen = tuple(authentication)
            else:
                chosen = (authentication,)
            return Handshake(
                chosen,
                virtual_host=self.virtual_host,
                locale=locale,
                client_properties=self.client_properties,
                heartbeat=heartbeat or 0,
                channel_max=channel_max,
                frame_max=frame_max,
                broker=self.broker,
                user=userid,
                connection=self,
            )

        # Until it is open.
        self._opening: Opening | None = Opening(self, begin, key)
        self.client_heartbeat = heartbeat or 0
        self.heartbeat: float = 0
        self.server_heartbeat = 0
        self.channel_max = channel_max or 0
        self.frame_max = frame_max or 0
        self.version_major, self.version_minor = 0, 0
        self.server_properties: dict[str, Any] = {}
        self.mechanisms: list[bytes] = []
        self.locales: list[str] = []
        self.blocked: str | None = None
        self.suspect = False
        self.is_closing = False
        self.gate = Gate()
        self.stream: Stream | None = None
        self._parser = Parser(max_message_size=options.max_message_size, message=type(self).Message)
        self.environment = get_environment()
        # Why it ends: the first reason stays.
        self._ending: dict[int, BaseException] = {}
        self._ended = False
        self._steps: list[tuple[Callable[..., Encoded], tuple[Any, ...]]] = []
        # Whoever is in it runs the steps, his own and those of others.
        self._stepping: dict[int, object] = {}
        self._replies: list[PendingReply] = []
        self.intake = Intake(self.inbox, options)
        self.table = ChannelTable(self)
        self._heartbeat: Heartbeat | None = None
        self._sweeping = False
        #: Queue -> "quorum" or "stream", of those that were declared here.
        self.kinds: dict[str, str] = {}

    # -- connecting

    def connect(self, callback: Callable[[], object] | None = None) -> Any:
        """Connect and log in, within `connect_timeout` and the deadline of the calling task.

        Raises:
            StreamError: the broker cannot be reached (an OSError).
            LoginRefusedError, VirtualHostError, MechanismError: it does not let us in.
            RPCTimeoutError: it accepted the connection and then kept silent.
            ProtocolError: it does not speak AMQP 0-9-1.

        After an error the connection is dead; make another one.
        """
        opening = self._opening
        if opening is not None and self.stream is None and self.error is None:
            timeout = remaining(self.connect_timeout)
            try:
                opening.run(_Ear(self), CONNECT_TIMEOUT if timeout is None else timeout)
                self._opened()
            except BaseException as exc:
                # A copy: the traceback of this one refers to the connection.
                self.abort(fresh(exc) if isinstance(exc, Exception) else None)
                raise
        if self.error is not None:
            raise fresh(self.error)
        return callback() if callback is not None else None

    def _opened(self) -> None:
        self._opening = None
        logger.debug("connected to broker %s, virtual host %s", self.broker, self.virtual_host)
        if self.heartbeat:
            self._heartbeat = Heartbeat(self.heartbeat)
            self._repeat(self._heartbeat.tick_interval, Connection._tick)
        for callback in (self.on_tune_ok, self.on_open):
            if callback is not None:
                callback(self)

    def take_over(self, handshake: Handshake) -> None:
        """Apply what was agreed, before the broker can make use of it."""
        self.intake.stream = self.stream
        self.version_major, self.version_minor = handshake.version
        self.client_properties = handshake.client_properties
        self.server_properties = handshake.server_properties
        self.mechanisms = handshake.mechanisms
        self.locales = handshake.locales
        self.channel_max = self.table.channel_max = handshake.channel_max
        self.frame_max = handshake.frame_max
        self._parser.frame_max = handshake.frame_max
        self._parser.greeted()
        self.heartbeat = handshake.heartbeat
        self.server_heartbeat = handshake.server_heartbeat

    # -- what the hub hands in

    def data_received(self, data: bytes) -> None:
        """Take a block from the stream; called in the hub."""
        parser = self._parser
        events = parser.feed(data)
        try:
            if len(events) == 1 and type(events[0]) is MethodEvent:
                self._take_method(events[0])
                if self.inbox:
                    self.intake.took(len(data), self.broker)
            elif events:
                self._dispatch(events, len(data))
            if parser.error is not None:
                raise parser.error
        except ProtocolError as fault:
            # Where it was found, nobody knows the broker.
            named = type(fault)(f"broker {self.broker}: {fault.reply_text}", fault.method_sig)
            raise named from fault.__cause__

    def _dispatch(self, events: list[Any], size: int) -> None:
        inbox = self.inbox
        self.intake.starts()
        ready: list[Any] = []
        channel: AnyChannel | None = None
        last_id = -1
        callbacks: dict[str, Any] = {}
        no_ack: set[str] | frozenset[str] = frozenset()
        plain = False
        find_channel = self.table.find
        for event in events:
            # By attribute and not by type: the message class is the transport's.
            channel_id = event.channel_id
            if channel_id != last_id:
                channel = find_channel(channel_id)
                last_id = channel_id
                if channel is not None:
                    callbacks = channel.callbacks
                    no_ack = channel.no_ack_consumers
                    plain = channel._held is None
            kind = type(event)
            if kind is not MethodEvent and kind is not Confirmation:
                if channel is None:
                    continue  # it was closed; the broker requeues
                if plain and event.consumer_tag in callbacks:
                    event.channel = channel
                    if no_ack and event.consumer_tag in no_ack:
                        event.no_ack = True
                    ready.append(event)
                elif channel.deliverable(event):
                    ready.append(event)
                continue
            if ready:
                # What comes behind a delivery must not overtake it.
                inbox.extend(ready)
                ready = []
            if kind is not Confirmation:
                self._take_method(event)
            elif channel is not None:
                channel.confirmed(event)
            last_id = -1  # the table may have changed
        if ready:
            inbox.extend(ready)
        self.intake.took(size, self.broker)

    def _take_method(self, event: MethodEvent) -> None:
        """Take a method that is neither a delivery nor a confirm."""
        channel_id = event.channel_id
        channel = self.table.find(channel_id)
        if channel is not None:
            channel.handle(event)
            if event.method is _CHANNEL_CLOSE_OK:
                self.table.release(channel_id)
        elif channel_id == 0:
            self._on_method(event)
        else:
            self._on_orphan(event)

    def _on_method(self, event: MethodEvent) -> None:
        """Take a method of the connection itself."""
        name = event.method.name
        opening = self._opening
        if opening is not None and (name in _GREETINGS or name == "Connection.close"):
            opening.greet(event)
        elif name == "Connection.close":
            code, text, class_id, method_id = event.arguments
            self.send(encode_method(0, _CLOSE_OK), flush=True)
            self.ended_by_broker(code, text, (class_id, method_id))
        elif name == "Connection.blocked":
            self._on_blocked(event.arguments[0])
        elif name == "Connection.unblocked":
            self._on_unblocked()
        else:
            take_reply(self._replies, event)

    def ended_by_broker(self, code: int, text: str, signature: tuple[int, int]) -> None:
        """The broker has closed the connection, and said why; called in the hub."""
        error = closed_by_broker(code, text, signature, self.broker)
        guilty = [
            each for each in list(self.channels.values()) if each.end_requests(signature, error)
        ]
        if guilty:
            # It is their error.  The others have done nothing wrong, and may try again.
            error = ConnectionLostError(
                f"broker {self.broker} ended the connection, because of what another task asked"
                f" for: {text}"
            )
        self.abort(error)

    def _on_orphan(self, event: MethodEvent) -> None:
        """Take a method of a channel that nobody has any more."""
        if event.method is _CHANNEL_CLOSE_OK:
            self.table.release(event.channel_id)
        elif event.method is _CHANNEL_CLOSE:
            self.exclusive(self._answer_orphan, event.channel_id)

    def _answer_orphan(self, channel_id: int) -> bytes:
        self.table.closed_by_broker(channel_id, None)
        return encode_method(channel_id, _CHANNEL_CLOSE_OK)

    def _on_blocked(self, reason: str) -> None:
        self.blocked = reason
        self.log(logging.WARNING, "broker %s blocks publishers: %s", self.broker, reason)
        self.gate.open()  # who waits there has another bound now
        callback = self.on_blocked
        if callback is not None:
            self.inbox.append(lambda: callback(reason))

    def _on_unblocked(self) -> None:
        self.blocked = None
        self.log(logging.INFO, "broker %s takes publishes again", self.broker)
        self.gate.open()
        if self.on_unblocked is not None:
            self.inbox.append(self.on_unblocked)

    def connection_lost(self, error: BaseException | None) -> None:
        """Take the end of the stream; called once, in the hub or by who aborts."""
        reported: BaseException
        if isinstance(error, (StreamForkedError, HubError)) and not isinstance(error, StreamError):
            reported = ConnectionClosedError(f"connection to broker {self.broker}: {error}")
        elif isinstance(error, StreamForkedError):
            reported = ConnectionClosedError(
                f"the connection to broker {self.broker} belongs to the parent process; make a new"
                " one"
            )
        elif error is None or self.is_closing:
            # The broker may hang up before the task that closes has seen its answer.
            reported = self.closed_error()
        elif isinstance(error, StreamError):
            opening = self._opening
            reported = (
                opening.handshake.cut_off(error)
                if opening is not None
                else ConnectionLostError(f"lost the connection to broker {self.broker}: {error}")
            )
            reported.__cause__ = error
        else:
            # A copy: the traceback of this one refers to the connection.
            reported = fresh(error)
        self.abort(reported)

    def log(self, level: int, message: str, *arguments: Any) -> None:
        """Write a log record from the hub, where a log handler's lock must not be waited for."""
        if self.stream is not None:
            self.stream.hub.log_later(logger, level, message, *arguments)

    # -- writing

    def exclusive(self, step: Callable[..., Encoded], *arguments: Any, asks: bool = False) -> None:
        """Run `step(*arguments)` and append the bytes that it returns, as one step of its order.

        Never waits.  With native threads another one may run the step, before or after this
        returns; what it finds out it has to tell by itself.

        Args:
            asks: the caller waits for an answer next.
        """
        steps = self._steps
        mine = (step, arguments)
        # Not a lock: a signal handler may raise as soon as the call that takes it returns, and then
        # nobody would know who has to give it back.
        token = object()
        try:
            if self._stepping.setdefault(0, token) is token:
                while steps:
                    self._next_step()  # perhaps an earlier one of this thread
                data = step(*arguments)
                if data:
                    self.send(data, asks=asks)
                while steps:
                    self._next_step()
                del self._stepping[0]
            else:
                steps.append(mine)
            # Who came while somebody was in it has left his step to that one.
            while steps:
                token = object()
                if self._stepping.setdefault(0, token) is not token:
                    return  # who has it looks again when done
                while steps:
                    self._next_step()
                del self._stepping[0]
        except BaseException as exc:
            # A signal handler's exception.
            if self._stepping.get(0) is token:
                # Perhaps between the queue and the bytes.
                self.abort(
                    ConnectionLostError(
                        f"connection to broker {self.broker}: interrupted while writing ({exc!r})"
                    )
                )
                del self._stepping[0]
                if steps:
                    self.exclusive(bytes)  # the others find the connection dead
            elif mine in steps:
                try:
                    steps.remove(mine)  # not to be done later, for nobody
                except ValueError:
                    pass  # another thread has begun it
            raise

    def _next_step(self) -> None:
        try:
            step, arguments = self._steps.pop(0)
        except IndexError:
            return
        data = step(*arguments)
        if data:
            self.send(data)

    def send(self, data: Encoded, flush: bool = False, asks: bool = False) -> None:
        """Append the bytes of whole frames; does nothing when the connection is lost.

        Who waits for what comes of it is told by the end of the connection.

        Args:
            flush: send them at once.
            asks: the caller waits for an answer next.
        """
        stream = self.stream
        if stream is not None:
            try:
                stream.write(data, flush or (asks and stream.is_first()), not asks)
            except StreamError:
                pass

    def flush(self) -> None:
        """Send what is in the out-buffer as far as the kernel takes it; never waits."""
        if self.stream is not None:
            self.stream.flush()

    def lost(self, exc: StreamError) -> BaseException:
        """Return the error to raise when a write found the stream closed.

        The stream tells the connection of its end by itself, after it has read the broker's last
        words.
        """
        if self.error is not None:
            return fresh(self.error)
        return ConnectionLostError(f"lost the connection to broker {self.broker}: {exc}")

    def awaiting(self) -> Awaiting:
        """Return a context in which the socket is read, whatever the inbox holds."""
        return Awaiting(self.intake)

    def wait_for_room(self, timeout: float | None) -> None:
        """Wait until a publish may go out.

        Args:
            timeout: seconds; None takes `blocked_timeout` or `write_timeout`.

        Raises:
            ConnectionBlocked: the broker blocked publishers all that time.
            WriteTimeoutError: it took no data all that time.
        """
        # What ends the wait may be behind deliveries for which the inbox has no place.
        with Awaiting(self.intake, for_answer=False):
            self._wait_for_room(timeout)

    def _wait_for_room(self, timeout: float | None) -> None:
        started = monotonic()
        while self.error is None:
            blocked = self.blocked
            own = self.options.write_timeout if blocked is None else self.options.blocked_timeout
            bound = remaining(own if timeout is None else timeout)
            left = None if bound is None else bound - (monotonic() - started)
            if self.gate.wait(lambda: self._has_room() or self.blocked != blocked, left):  # noqa: B023
                if self._has_room():
                    return
                continue
            within = "" if bound is None else f" for {bound:g} s"
            if blocked is not None:
                raise ConnectionBlocked(
                    f"broker {self.broker} has blocked publishers{within} ({blocked}): it is short"
                    " of memory or disk space"
                )
            raise WriteTimeoutError(f"broker {self.broker} took no data{within}")
        raise fresh(self.error)

    def _has_room(self) -> bool:
        stream = self.stream
        return self.error is not None or (
            self.blocked is None and stream is not None and not stream.above_high_water
        )

    def wait_for_window(self, tracker: ConfirmTracker, timeout: float | None) -> None:
        """Wait for a place among the unconfirmed publishes of a channel.

        Raises:
            ConfirmTimeoutError: no publish was confirmed in all that time.
        """
        bound = remaining(self.options.confirm_timeout if timeout is None else timeout)
        with self.awaiting():
            if not tracker.gate.wait(tracker.has_room, bound):
                self._suspect()
                within = "" if bound is None else f" within {bound:g} s"
                raise ConfirmTimeoutError(
                    f"{tracker.window} publishes wait for a confirm of broker {self.broker} and"
                    f" none came{within}; the message was not sent"
                )

    # -- inbox

    def drain_events(self, timeout: float | None = None) -> None:
        """Wait for one event and run it in the calling task; see the base class."""
        # The base class begins with finding out about its environment and its turn, for 1.5 us;
        # when a message waits, and the turn is not over, it would only run it.
        if monotonic() - self._turn_started > TURN_SECONDS:
            super().drain_events(timeout)
        elif not self.deliver():
            self._await_event(self.environment, timeout)

    def deliver(self, raises: bool = True) -> bool | Failure:
        """Run at most one waiting event in the calling task; see the base class."""
        inbox = self.inbox
        intake = self.intake
        while True:
            event = inbox.popleft()
            if intake.paused and len(inbox) <= intake.resume_below:
                intake.drained()
            if event is None:
                if self.error is None:
                    return False
                result: object = Failure(fresh(self.error))
            else:
                result = event()
            if isinstance(result, Failure):
                return result.reported(raises)
            if result is not NOTHING:
                return True

    # -- timers

    def _repeat(self, interval: float, method: Callable[[Connection], None]) -> None:
        """Call *method* every *interval* seconds in the hub while the connection lives."""
        if self.stream is None:
            return
        reference = weakref.ref(self)

        def start() -> None:
            connection = reference()
            if connection is not None and connection.error is None:
                join(hub, interval, method, connection)

        hub = self.stream.hub
        try:
            hub.call_here(start)
        except HubError:
            pass  # the stream has ended with its hub

    def _tick(self) -> None:
        """Send a heartbeat if it is due; give the broker up if it is silent."""
        stream, heartbeat = self.stream, self._heartbeat
        if stream is None or heartbeat is None or self.error is not None:
            return
        action = heartbeat.tick(stream.sent_bytes, stream.received_bytes, self.intake.paused)
        if action is Action.SEND:
            self.send(HEARTBEAT, flush=True)
            heartbeat.sent(stream.sent_bytes)
        elif action is Action.GIVE_UP:
            self.abort(
                HeartbeatLostError(
                    f"broker {self.broker} has sent nothing for two heartbeat intervals of"
                    f" {heartbeat.interval:g} s: the connection is dead"
                )
            )

    def confirm_deadline(self) -> float | None:
        """Return when a publish of now is given up, monotonic seconds."""
        timeout = self.options.confirm_timeout
        return None if timeout is None else monotonic() + timeout

    def sweep_confirms(self) -> None:
        """Start the timer that gives up publishes without a confirm; once."""
        timeout = self.options.confirm_timeout
        if not self._sweeping and timeout is not None:
            # Afterwards: two timers do no harm, none would.
            self._repeat(max(timeout / SWEEPS, 0.01), Connection._sweep)
            self._sweeping = True

    def _sweep(self) -> None:
        timeout = self.options.confirm_timeout
        for channel in self.channels.values():
            tracker = channel._confirms
            if tracker is not None and tracker.unconfirmed and tracker.expire(timeout or 0):
                self._suspect()

    def _suspect(self) -> None:
        """Note that confirms did not come in time, unless the broker has said why."""
        # A new connection would have to find out anew, by one publish that waits for its confirm.
        if self.blocked is None:
            self.suspect = True

    # -- channels

    @property
    def channels(self) -> dict[int, AnyChannel]:
        """The channels that are in use, by number."""
        return self.table.in_use()

    def channel(
        self, channel_id: int | None = None, callback: Callable[[Any], object] | None = None
    ) -> Any:
        """Open a channel; the one with that number, if it is open already.

        Raises:
            ChannelLimitError: all numbers are in use, and none came back within
                `channel_timeout`.
        """
        if self.error is not None:
            raise fresh(self.error)
        if channel_id is not None:
            known = self.channels.get(channel_id)
            if known is not None:
                return known
        channel = self.Channel(self, channel_id, on_open=callback)
        try:
            channel.open()
        except BaseException:
            # Nobody else has it; a traceback that is kept must not keep its number.
            channel.collect()
            raise
        return channel

    def open_stream(self) -> Stream:
        """Return the stream.

        Raises:
            ConnectionClosedError: there is none yet; or the error that ended the connection.
        """
        if self.error is not None:
            raise fresh(self.error)
        if self.stream is None:
            raise ConnectionClosedError(
                f"the connection to broker {self.broker} was not opened: call connect()"
            )
        return self.stream

    def close_dropped_channels(self) -> None:
        """Close at the broker the channels that nobody uses any more; called in the hub."""
        self.exclusive(self._close_dropped)

    def _close_dropped(self) -> bytes:
        data = b""
        for entry in self.table.take_dropped():
            channel = entry()  # not collected yet, if its opening was given up
            if channel is None:
                data += self._close_entry(entry)
            else:
                data += channel.last_words(self._close_entry, entry)
        return data

    def _close_entry(self, entry: Any) -> bytes:
        if not self.table.closes_dropped(entry):
            return b""
        return encode_method(entry.channel_id, _CHANNEL_CLOSE, (0, "", 0, 0))

    # -- the end

    def close(  # type: ignore[override]  # amqp's arguments; the transport's by keyword
        self,
        reply_code: int = 0,
        reply_text: str = "",
        method_sig: tuple[int, int] = (0, 0),
        argsig: str = "BsBB",
        *,
        timeout: float | None = None,
    ) -> None:
        """Close politely: send what is buffered and Connection.close, wait for the answer.

        Args:
            timeout: seconds, after which the connection is aborted; None takes `close_timeout`.

        Does nothing when the connection is dead, and raises no error of a broker that is.
        """
        del argsig
        if self.error is not None or self.is_closing or sys.is_finalizing():
            return
        self.is_closing = True
        try:
            if self._opening is None and self.stream is not None:
                bound = self.options.close_timeout if timeout is None else timeout
                if self.blocked is not None:
                    bound = min(bound, BLOCKED_CLOSE_TIMEOUT)
                self._request(_CLOSE, (reply_code, reply_text, *method_sig), bound)
        except (StreamError, HubError, AMQPConnectionError, ChannelError):
            logger.debug("broker %s did not close well", self.broker, exc_info=True)
            unsent = 0 if self.stream is None else self.stream.buffered
            if unsent:
                logger.warning(
                    "broker %s did not take the last %d octets before the connection was closed;"
                    " what was published in them is lost. Wait for confirms (confirm_publish), or"
                    " give close_timeout more than %g s",
                    self.broker,
                    unsent,
                    self.options.close_timeout,
                )
        finally:
            self.abort()

    def _request(
        self, method: Method, values: tuple[Any, ...], timeout: float | None
    ) -> MethodEvent:
        """Send a request of the connection itself and wait for its reply."""
        data = encode_method(0, method, values)
        pending = PendingReply(method, replies_to(method), self.environment.waiter())
        with self.awaiting():
            self.exclusive(self._enter_request, pending, data)
            self.flush()
            return pending.wait(remaining(timeout), self)

    def _enter_request(self, pending: PendingReply, data: bytes) -> bytes:
        self._replies.append(pending)
        if self.error is not None:
            pending.fail(self.error)
            return b""
        return data

    def abort(self, error: BaseException | None = None) -> None:
        """End the connection at once: no farewell, everybody who waits is told; idempotent.

        Never waits and never raises; callable from anywhere.

        Args:
            error: why; None says that we closed it. The first reason stays.
        """
        # Each step may be done twice: a signal handler may have interrupted an earlier abort, and
        # the end of the stream comes back here.
        # When the interpreter ends (a user's __del__) threads, greenlets and modules are gone, and
        # the socket goes with the process.
        if self._ended or sys.is_finalizing():
            return
        reason = self._ending.setdefault(0, error if error is not None else self.closed_error())
        self.error = reason
        fail_all(self._replies, reason)
        self.table.die(reason)
        if self._opening is not None:
            self._opening.wake()
        self.gate.open()
        if self.stream is not None:
            self.stream.abort(reason)
        self.inbox.notify()
        self._ended = True

    def closed_error(self) -> BaseException:
        """Make the error of using the connection after it was closed by us."""
        return ConnectionClosedError(
            f"the connection to broker {self.broker} was closed; connect again before using it"
        )

    def __repr__(self) -> str:
        if self.error is not None:
            state = f"dead: {self.error!r}"
        elif not self.connected:
            state = "not connected"
        else:
            state = f"blocked: {self.blocked}" if self.blocked is not None else "open"
        buffered = self.stream.buffered if self.stream is not None else 0
        return (
            f"<{type(self).__name__} to {self.broker}{self.virtual_host}: {state},"
            f" {len(self.table)} channels, {len(self.inbox)} waiting, {buffered} octets buffered>"
        )
