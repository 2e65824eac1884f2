"""One connection to a Redis server, on the hub, for any number of tasks.

Redis answers commands in their order, so a queue of entries tells whose a reply is: each has how
many replies it awaits, and what to call with them.  The hub reads; whoever sends appends an entry
and the bytes.  Nobody waits in here but `connect`, `call`, `room` and `close`.

*Order.*  Entry and bytes have to be in the same order, also with native threads.  So what is
to be sent goes through one queue (`_steps`), and whoever finds nobody at it takes what is
there, for the others as well: entries first, then all the bytes as one.  It is not a lock, nobody
waits for it.  If a signal handler raises in the middle of that, the wire is aborted, because nobody
could tell what was sent.

*Giving up.*  A caller whose time is over, or that is killed, leaves its entry: the reply still
comes, and must not be taken for the next one's.  If the server has been silent for the whole of
`socket_timeout` while an answer was due, the wire is aborted: nothing is known of what it does.
With nothing due, it is asked for a sign of life (PING) after `health_check_interval`.

*Subscribing.*  With RESP3, what the server says of subscriptions are pushes, but a refusal is a
reply.  So commands that expect no reply are followed by a PING with a text of its own: what is
answered before that, nothing or a refusal, belongs to them.

*The end.*  A wire ends once, with one `error`: everybody who waits is told in the hub, and then
`on_lost` is called.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu._amqp.gate import Gate
from greenkombu._amqp.pulse import join
from greenkombu.deadline import remaining
from greenkombu.exceptions import KombuError
from greenkombu.transport.redis import _login
from greenkombu.transport.redis._calls import Answer, Calls
from greenkombu.transport.redis._errors import (
    ConnectionForkedError,
    ConnectionLostError,
    copy_of,
)
from greenkombu.transport.redis._pipeline import Done, Pipeline
from greenkombu.transport.redis._resp import pack
from hub.environment import get_environment
from hub.errors import HubError, StreamError, StreamForkedError

if TYPE_CHECKING:
    from greenkombu.transport.redis._options import Settings
    from hub.streams import Stream

__all__ = ["Done", "Wire"]

#: Bytes that are kept until the login is complete, to tell what is wrong if it never is.
FIRST_BYTES = 256

# How often per bound a silent server is looked at.
_LOOKS = 4


class _Ear:
    """What the stream talks to: it must not keep a wire alive that its owner dropped."""

    __slots__ = ("_wire",)

    def __init__(self, wire: Wire) -> None:
        self._wire = weakref.ref(wire)

    def data_received(self, data: bytes) -> None:
        wire = self._wire()
        if wire is not None:
            wire.data_received(data)

    def connection_lost(self, error: BaseException | None) -> None:
        wire = self._wire()
        if wire is not None:
            wire.connection_lost(error)

    def write_resumed(self) -> None:
        wire = self._wire()
        if wire is not None:
            wire.gate.open()


class Wire(Calls):
    """A connection, made by `Wire.connect`.

    Attributes:
        protocol: of RESP, 2 or 3, as agreed.
        server: what it says of itself: version, mode (standalone, sentinel, cluster), role, ...
        peer: "host:port" or a path.
        error: why the wire ended; None while it lives.
        stream: the bytes.
        gate: where those wait for whom the out-buffer is too full.
    """

    def __init__(
        self,
        settings: Settings,
        on_push: Callable[[list[Any]], object],
        on_lost: Callable[[BaseException], object],
        pubsub: bool = False,
    ) -> None:
        self.settings = settings
        self.peer = settings.peer
        self.protocol = 2
        self.server: dict[str, Any] = {}
        self.error: BaseException | None = None
        self.stream: Stream | None = None
        self.gate = Gate()
        #: True until the login is complete, and the beginning of what came until then.
        self.opening = True
        self.first_bytes = b""
        self._on_lost = on_lost
        self._pipeline = Pipeline(settings, on_push, pubsub)
        self._steps: deque[tuple[bytes, int | bytes, Done, bool]] = deque()
        # {0: token} while somebody sends.
        self._sending: dict[int, object] = {}
        self._ending: dict[int, BaseException] = {}
        # One entry: `connect` takes it when it succeeds, the end of the stream if that comes first.
        self._unopened = [True]
        self._numbers = count(1)
        # Of the hub's looks: what had come and gone by when, and since when an answer is due.
        self._heard = (0, 0)
        self._heard_at = 0.0
        self._due_since: float | None = None

    @classmethod
    def connect(
        cls,
        settings: Settings,
        *,
        on_push: Callable[[list[Any]], object],
        on_lost: Callable[[BaseException], object],
        timeout: float | None = None,
        pubsub: bool = False,
    ) -> Wire:
        """Connect and log in; parks the calling task.

        Args:
            settings: whereto, and how.
            on_push: called in the hub with each push.
            on_lost: called once in the hub, with the reason, when a wire that `connect` returned
                has ended.
            timeout: seconds for all of it; None takes `settings.connect_timeout`. The deadline of
                the calling task holds as well.
            pubsub: where only RESP2 is spoken, what the server sends to subscribers goes to
                `on_push`; commands that answer with such lists must not be called.

        Raises:
            ConnectTimeoutError: no connection, or no login, in time.
            LoginRefusedError: user name and password are wrong, or missing.
            ServerError: the server cannot be reached, or is loading, or is no Redis.
            NoSuchDatabaseError: it has no database of that number.
            ArgumentError: an option cannot be used.
        """
        wire = cls(settings, on_push, on_lost, pubsub)
        bound = remaining(settings.connect_timeout if timeout is None else timeout)
        assert bound is not None
        try:
            _login.open_wire(wire, _Ear(wire), bound)
            try:
                wire._unopened.pop()
            except IndexError:
                assert wire.error is not None
                raise copy_of(wire.error) from None
            wire.opening = False
            wire._watch()
        except BaseException as exc:
            # A copy: the traceback of this one refers to the wire.
            wire.abort(copy_of(exc) if isinstance(exc, Exception) else None)
            raise
        return wire

    @property
    def closed(self) -> bool:
        """True once nothing can be sent any more."""
        return self.error is not None

    # -- what the hub hands in

    def data_received(self, data: bytes) -> None:
        """Take a block from the stream; called in the hub."""
        if self.opening and len(self.first_bytes) < FIRST_BYTES:
            self.first_bytes += data[:FIRST_BYTES]
        self._pipeline.take(data)

    def connection_lost(self, error: BaseException | None) -> None:
        """Take the end of the stream; called once, in the hub or by who aborts."""
        if isinstance(error, StreamForkedError):
            reason: BaseException = ConnectionForkedError(
                f"the connection to Redis server {self.peer} belongs to the parent process; make a"
                " new one"
            )
        elif error is None:
            reason = self._closed_error()
        elif isinstance(error, KombuError):
            # A copy: the traceback of this one refers to the wire.
            reason = copy_of(error)
        else:
            said = str(error) if isinstance(error, HubError) else repr(error)
            reason = ConnectionLostError(f"lost the connection to Redis server {self.peer}: {said}")
            reason.__cause__ = error
        self.abort(reason)
        assert self.error is not None
        self._pipeline.fail(self.error)
        self.gate.open()
        try:
            self._unopened.pop()
        except IndexError:
            self._on_lost(self.error)

    # -- sending

    def send(self, data: bytes, replies: int, done: Done, flush: bool = False) -> None:
        """Send packed commands; never waits, never switches; from any thread.

        Args:
            data: whole commands, as `pack` makes them.
            replies: how many they have. 0 for SUBSCRIBE and its kin: `done` gets a list of what
                was refused, usually empty, when all of it was dealt with.
            done: called once, in the hub, with the list of replies (refusals are instances of
                `ReplyError` in it), or with the error that ended the wire. It must be quick and
                must not raise.
            flush: send at once, even if more is likely to come soon.

        Raises:
            ServerError: the wire has ended; nothing was sent, and `done` is not called.
        """
        if self.error is not None:
            raise copy_of(self.error)
        awaited: int | bytes = replies
        if not replies:
            awaited = b"greenkombu-%d" % next(self._numbers)
            data += pack("PING", awaited)
        steps = self._steps
        sending = self._sending
        mine = (data, awaited, done, flush)
        token = object()
        try:
            steps.append(mine)
            while steps and sending.setdefault(0, token) is token:
                self._send_steps()
                del sending[0]
        except BaseException as exc:
            # A signal handler's exception.
            if sending.get(0) is token:
                # Perhaps between entry and bytes.
                self.abort(
                    ConnectionLostError(
                        f"connection to Redis server {self.peer}: interrupted while sending"
                        f" ({exc!r})"
                    )
                )
                del sending[0]
            try:
                steps.remove(mine)  # not to be done later, for nobody
            except ValueError:
                pass  # somebody has begun it
            self._finish_steps()
            raise

    def _send_steps(self) -> None:
        """Send what waits for that: entries first, then the bytes."""
        steps, enter = self._steps, self._pipeline.enter
        data, awaited, done, flush = steps.popleft()
        enter((awaited, done))
        if steps:
            parts = [data]
            while steps:
                data, awaited, done, more = steps.popleft()
                enter((awaited, done))
                parts.append(data)
                flush = flush or more
            data = b"".join(parts)
        stream = self.stream
        assert stream is not None
        try:
            stream.write(data, flush)
        except StreamError:
            pass  # the stream tells of its end by itself
        if self._pipeline.failed is not None:
            self._fail_later(stream)

    def _finish_steps(self) -> None:
        """Deal with what other threads have left to one that was interrupted."""
        token = object()
        while self._steps and self._sending.setdefault(0, token) is token:
            self._send_steps()
            del self._sending[0]

    def _fail_later(self, stream: Stream) -> None:
        """Tell those who came after the end, in the hub."""
        try:
            stream.hub.call_soon_threadsafe(self._pipeline.fail_waiting)
        except HubError:
            self._pipeline.fail_waiting()

    # -- signs of life

    def _watch(self) -> None:
        """Have the hub look at this wire now and then."""
        settings = self.settings
        bound = min(settings.socket_timeout, settings.health_check_interval or float("inf"))
        stream = self.stream
        assert stream is not None
        hub, reference = stream.hub, weakref.ref(self)
        self._heard_at = monotonic()

        def start() -> None:
            wire = reference()
            if wire is not None and wire.error is None:
                join(hub, bound / _LOOKS, Wire._look, wire)

        try:
            hub.call_here(start)
        except HubError:
            pass  # the stream has ended with its hub

    def _look(self) -> None:
        """Give a silent server up, or ask it for a sign of life; called in the hub."""
        stream = self.stream
        if stream is None or self.error is not None:
            return
        now = monotonic()
        # What is waiting to be sent and gets less is a sign of life, too.
        heard = stream.received_bytes, stream.sent_bytes if stream.buffered else self._heard[1]
        if heard != self._heard:
            self._heard = heard
            self._heard_at = now
            self._due_since = None
        if self._pipeline.awaited:
            if self._due_since is None:
                self._due_since = now
            elif now - self._due_since >= self.settings.socket_timeout:
                self.silent(now - self._due_since)
            return
        self._due_since = None
        interval = self.settings.health_check_interval
        if interval and now - self._heard_at >= interval:
            self.send(pack("PING"), 1, lambda _: None, True)

    def silent(self, seconds: float) -> None:
        """Give the server up that has been silent for so long."""
        self.abort(
            ConnectionLostError(
                f"Redis server {self.peer} has answered nothing for {seconds:.3g} s: it hangs, or"
                " the network does"
            )
        )

    # -- the end

    def abort(self, error: BaseException | None = None) -> None:
        """End the wire at once, without a word; never waits; from any thread or finalizer.

        Args:
            error: why; the first reason stays.
        """
        reason = error if error is not None else self._closed_error()
        self.error = self._ending.setdefault(0, reason)
        if self.stream is not None:
            self.stream.abort(self.error)

    def close(self, timeout: float = 1.0) -> None:
        """Let the server deal with all that was sent, then close; parks the calling task.

        Closing before the answers have been read would make the kernel tell the server to forget
        commands that it has not read yet.

        Args:
            timeout: seconds, after which the wire is aborted.
        """
        if self.error is not None:
            return
        try:
            bound = remaining(timeout)
            if (self._pipeline.awaited or self._steps) and bound:
                answer = Answer(get_environment().waiter())
                self.send(pack("PING"), 1, answer, True)
                answer.waiter.wait(bound)
        except ConnectionLostError:
            pass  # in this moment
        finally:
            self.abort()

    def _closed_error(self) -> ConnectionLostError:
        return ConnectionLostError(f"the connection to Redis server {self.peer} was closed")

    def __repr__(self) -> str:
        state = "open" if self.error is None else f"dead: {self.error!r}"
        buffered = 0 if self.stream is None else self.stream.buffered
        return (
            f"<Wire to Redis server {self.peer}: {state}, RESP{self.protocol},"
            f" {self._pipeline.awaited} awaited, {buffered} bytes buffered>"
        )
