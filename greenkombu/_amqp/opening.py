"""Connecting: the socket, TLS and the handshake.

The task that called `connect` opens the socket, says hello and parks.  What the broker says is
answered in the hub, which spares the task three wake-ups, if every login mechanism that may be
chosen only makes bytes.  One that may be the user's code, or waits, must not run there: then the
hub queues what the broker says (`greet`), and the task answers.

Where the whole dialogue is known beforehand (see `dialogue`) it is held in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu._amqp import dialogue as dialogues
from greenkombu._amqp.errors import RPCTimeoutError
from greenkombu._amqp.frames import PROTOCOL_HEADER, encode_method
from greenkombu._amqp.handshake import Handshake, State
from greenkombu._amqp.protocol import MethodEvent
from greenkombu._amqp.rpc import fresh
from greenkombu._amqp.tls import make_context
from greenkombu.exceptions import InvalidURL
from hub.errors import HubClosedError, StreamError, StreamForkedError, StreamTimeoutError, TLSError
from hub.streams import SocketOptions, open_stream

if TYPE_CHECKING:
    from greenkombu._amqp.connection import Connection
    from greenkombu._amqp.dialogue import Dialogue
    from hub.environment import Waiter
    from hub.streams import Stream, StreamHandler

__all__ = ["PORT", "TLS_PORT", "Opening", "parse_host", "socket_options"]

#: Ports of AMQP (IANA).
PORT, TLS_PORT = 5672, 5671

# Options that amqp's users set and that not every platform has.
_OPTIONAL_PREFIX = "TCP_"

#: Seconds for which only the broker's whole part of a known dialogue wakes the hub.  A broker
#: nearby needs a few milliseconds; one that says less than expected is heard after this.
PATIENCE = 0.05

#: Octets of the longest handshake that is kept; RabbitMQ's are of 500.  Somebody else may send
#: without end until the time to connect is over.
LONGEST = 16_384


class Opening:
    """One attempt to connect.

    Args:
        connection: whose `stream` and negotiated values are set on the way.
        begin: makes the dialogue, when it is needed: not for one that is known.
        key: what is said in it depends on this alone, and on the broker; None if on more.
    """

    __slots__ = (
        "_begin",
        "_connection",
        "_greetings",
        "_handshake",
        "_in_hub",
        "_key",
        "_said",
        "_waiter",
    )

    def __init__(
        self,
        connection: Connection,
        begin: Callable[[], Handshake],
        key: Hashable | None = None,
    ) -> None:
        self._connection = connection
        self._begin = begin
        # Wrong arguments are told now, and not when it connects.
        self._handshake: Handshake | None = begin() if dialogues.known(key) is None else None
        self._key = key
        self._said = b""
        # What the task has to answer.
        self._greetings: list[MethodEvent] = []
        self._in_hub = False
        self._waiter: Waiter | None = None

    @property
    def handshake(self) -> Handshake:
        """The dialogue."""
        handshake = self._handshake
        if handshake is None:
            handshake = self._handshake = self._begin()
        return handshake

    def run(self, ear: StreamHandler, timeout: float) -> None:
        """Connect and log in within *timeout* seconds.

        Raises:
            StreamError, HandshakeError, ProtocolError, RPCTimeoutError: see `Connection.connect`;
                the connection has to be aborted.
        """
        deadline = monotonic() + timeout
        known = dialogues.known(self._key)
        if known is not None:
            if self._hold(known, ear, deadline, timeout):
                return
            timeout = max(deadline - monotonic(), 0.0)
        handshake = self.handshake
        self._in_hub = handshake.only_makes_bytes
        kept = self._key is not None and self._in_hub
        self.open_stream(_Recorder(self, ear) if kept else ear, timeout)
        self._write(PROTOCOL_HEADER)
        while handshake.state is not State.OPEN:
            event = self.next(deadline, timeout)
            if event is not None:
                self._answer(event)

    def _answer(self, event: MethodEvent) -> None:
        handshake = self.handshake
        steps = handshake.receive(event)
        if handshake.state is State.OPENING:
            self._connection.take_over(handshake)
        if steps:
            answer = b"".join([encode_method(0, *step) for step in steps])
            self._said += answer
            self._write(answer)

    def _hold(self, known: Dialogue, ear: StreamHandler, deadline: float, timeout: float) -> bool:
        """Connect and hold a known dialogue in one piece.

        Returns:
            False if the broker does not do its part in it.

        Raises:
            StreamError, RPCTimeoutError: see `run`.
        """
        connection = self._connection
        replay = _Replay(self, known, ear)
        self.open_stream(replay, timeout)
        stream = connection.stream
        assert stream is not None
        waiter = self._waiter = connection.environment.waiter()
        stream.expect(len(known.heard))
        self._write(PROTOCOL_HEADER + known.said)
        if not waiter.wait(min(deadline - monotonic(), PATIENCE)):
            stream.expect(1)
            waiter = self._waiter = connection.environment.waiter()
            # What has come is looked at now, which not every kernel does by itself.
            stream.pause_reading()
            stream.resume_reading()
            if replay.verdict is None and not waiter.wait(deadline - monotonic()):
                # Who answers one step and drops what came with it is not waited for again; who says
                # nothing at all may only be busy.
                dialogues.failed(self._key, for_good=bool(replay.heard))
                raise self._silence(known.state(len(replay.heard)), timeout)
        if connection.error is not None:
            raise fresh(connection.error)
        if replay.verdict:
            dialogues.succeeded(self._key)
            return True
        dialogues.failed(self._key)
        connection.stream = None
        stream.abort()
        return False

    def _silence(self, state: State, timeout: float) -> RPCTimeoutError:
        return RPCTimeoutError(
            f"broker {self._connection.broker} accepted the connection but kept silent"
            f" {state.value} for {timeout:g} s: is this an AMQP port, and is the broker well?"
        )

    def agreed(self, handshake: Handshake) -> None:
        """Take over what a known dialogue has agreed on; called in the hub."""
        self._handshake = handshake
        self._connection.take_over(handshake)

    def keep(self, heard: bytes) -> None:
        """Keep the dialogue, which is complete, for the next connections; called in the hub."""
        self.handshake.forget_connection()
        dialogues.keep(self._key, self._said, heard, self.handshake)

    def open_stream(self, ear: StreamHandler, timeout: float) -> None:
        """Connect `connection.stream`, and shake hands where it is to be TLS; see `run`."""
        connection = self._connection
        host, port = parse_host(connection.host, TLS_PORT if connection.ssl else PORT)
        context, server_hostname = make_context(connection.ssl, host)
        broker = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        connection.broker = broker
        if self._handshake is not None:
            self._handshake.broker = broker
        try:
            stream = open_stream(
                (host, port),
                ear,
                timeout=timeout,
                tls=context,
                server_hostname=server_hostname,
                options=socket_options(connection.socket_settings, connection.options.user_timeout),
            )
        except TLSError as exc:
            raise type(exc)(
                f"{exc} (broker {broker}: is this its TLS port, usually {TLS_PORT}, and its"
                " certificate the right one?)"
            ) from exc
        except StreamTimeoutError:
            raise  # its text says what to look at
        except StreamError as exc:
            error = type(exc)(f"{exc} (is the broker running there, on that port?)")
            error.errno = exc.errno
            raise error from exc
        connection.stream = stream
        if connection.error is not None:  # it spoke before it was spoken to
            stream.abort(connection.error)
            raise fresh(connection.error)
        stream.coalesce = connection.options.coalesce

    @property
    def connected(self) -> bool:
        """Whether there is a stream yet."""
        return self._connection.stream is not None

    @property
    def stream(self) -> Stream:
        """The stream, once it is connected."""
        stream = self._connection.stream
        assert stream is not None
        return stream

    def _write(self, data: bytes) -> None:
        try:
            self.stream.write(data, True)
        except StreamError:
            # The broker has hung up; what it said before, or that it did, is told by `next`.
            pass

    def next(self, deadline: float, timeout: float) -> MethodEvent | None:
        """Wait for what the broker says next, or until the handshake is complete without it.

        Raises:
            RPCTimeoutError: nothing until *deadline*, *timeout* seconds after the beginning.
        """
        connection = self._connection
        while True:
            waiter = self._waiter = connection.environment.waiter()
            if self._greetings:
                return self._greetings.pop(0)
            if self.handshake.state is State.OPEN:
                return None
            if connection.error is not None:
                raise fresh(connection.error)
            if not waiter.wait(deadline - monotonic()):
                raise self._silence(self.handshake.state, timeout)

    def greet(self, event: MethodEvent) -> None:
        """Take what the broker said; called in the hub."""
        if not self._in_hub:
            self._greetings.append(event)
        elif self._connection.error is None:
            try:
                self._answer(event)
            except Exception as exc:
                # A copy: the traceback of this one refers to the connection.
                self._connection.abort(fresh(exc))
            if self.handshake.state is not State.OPEN:
                return
        self.wake()

    def wake(self) -> None:
        """Let the connecting task look again: something came, or the connection has ended."""
        waiter = self._waiter
        if waiter is not None:
            waiter.wake()


class _Recorder:
    """Hear with the connection until its handshake is complete, and keep what was heard."""

    __slots__ = ("_ear", "_heard", "_opening")

    def __init__(self, opening: Opening, ear: StreamHandler) -> None:
        self._opening = opening
        self._ear = ear
        self._heard = b""

    def data_received(self, data: bytes) -> None:
        opening = self._opening
        if len(self._heard) <= LONGEST:
            self._heard += data
        self._ear.data_received(data)
        if opening.handshake.state is State.OPEN:
            if len(self._heard) <= LONGEST:
                opening.keep(self._heard)
            opening.stream.handler = self._ear

    def connection_lost(self, error: BaseException | None) -> None:
        self._ear.connection_lost(error)

    def write_resumed(self) -> None:
        self._ear.write_resumed()


class _Replay:
    """Compare what the broker says with its part of a known dialogue.

    Attributes:
        heard: what it has said so far.
        verdict: whether it is the same; None as long as that is open.
    """

    __slots__ = ("_ear", "_known", "_opening", "heard", "verdict")

    def __init__(self, opening: Opening, known: Dialogue, ear: StreamHandler) -> None:
        self._opening = opening
        self._known = known
        self._ear = ear
        self.heard = b""
        self.verdict: bool | None = None

    def data_received(self, data: bytes) -> None:
        if self.verdict is not None:
            return  # it is being left
        self.heard += data
        expected = self._known.heard
        opening = self._opening
        if self.heard.startswith(expected) and opening.connected:
            opening.agreed(self._known.agreed)
            stream = opening.stream
            stream.expect(1)
            stream.handler = self._ear
            self.verdict = True
            rest = self.heard[len(expected) :]
            if rest:
                self._ear.data_received(rest)
            opening.wake()
        elif not (expected.startswith(self.heard) and opening.connected):
            # Who speaks before he is spoken to is no broker, whatever he says.
            self._fail()

    def connection_lost(self, error: BaseException | None) -> None:
        if isinstance(error, (HubClosedError, StreamForkedError)):
            # Not the broker's doing: there is nobody to ask again, or it is the parent's business.
            self._ear.connection_lost(error)
        self._fail()

    def _fail(self) -> None:
        if self.verdict is None:
            self.verdict = False
        self._opening.wake()

    def write_resumed(self) -> None:
        """Nobody waits for that yet."""


# Thousands of connections share one object.
_usual_options = lru_cache(16)(SocketOptions)


def socket_options(settings: Mapping[Any, Any] | None, user_timeout: float | None) -> SocketOptions:
    """Translate amqp's socket_settings: names or numbers of options at level IPPROTO_TCP.

    Raises:
        ValueError: a name that is none, or (BadArgumentError) a value that no option has.
    """
    if not settings:
        return _usual_options(user_timeout=user_timeout)
    import socket

    extra: dict[tuple[int, int], int | bytes] = {}
    for name, value in settings.items():
        number = name if isinstance(name, int) else getattr(socket, str(name), None)
        if number is not None:
            extra[socket.IPPROTO_TCP, number] = value
        elif not str(name).startswith(_OPTIONAL_PREFIX):
            raise ValueError(f"unknown socket option {name!r} in socket_settings")
    return SocketOptions(user_timeout=user_timeout, extra=extra)


@lru_cache(64)
def parse_host(host: str, default_port: int) -> tuple[str, int]:
    """Split "host", "host:port" or "[ipv6]:port".

    Raises:
        InvalidURL: the port is no number.
    """
    if host.startswith("["):
        name, _, rest = host[1:].partition("]")
        port = rest.lstrip(":")
    elif host.count(":") == 1:
        name, _, port = host.partition(":")
    else:
        name, port = host, ""
    if not port:
        return name or "localhost", default_port
    if not port.isdigit():
        # Without what may be a password.
        _, at, shown = host.rpartition("@")
        raise InvalidURL(
            f"{'**@' if at else ''}{shown} is no host:port; a broker is host, host:port, or"
            " transport://user:password@host:port/virtual_host"
        )
    return name or "localhost", int(port)
