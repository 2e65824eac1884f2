"""How a channel asks its broker for something: the part of `Channel` that everything else uses."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError

from greenkombu._amqp.frames import Encoded, encode_method
from greenkombu._amqp.methods import BY_CODE, BY_SIGNATURE, Method, replies_to
from greenkombu._amqp.protocol import MethodEvent
from greenkombu._amqp.rpc import PendingReply, fresh
from greenkombu.deadline import remaining
from greenkombu.exceptions import ChannelClosedError
from greenkombu.transport._connection import Failure
from hub.errors import StreamError

if TYPE_CHECKING:
    from greenkombu._amqp.connection import Connection
    from greenkombu._amqp.writers import Writers
    from hub.streams import Stream

__all__ = [
    "NOTHING",
    "NO_SLOTS",
    "Call",
    "Raise",
    "Requests",
    "dead_error",
    "end_by_broker",
    "end_requests",
]

#: What an event of the inbox returns when there was nothing in it for the user.
NOTHING = object()

# Replies to requests of `send_method(wait=None)` that are kept for a later `wait()`.
UNCLAIMED = 16


class Raise:
    """An event of the inbox that reports an error to the draining task, once."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self) -> object:
        return Failure(fresh(self.error))


class Call:
    """An event of the inbox that calls a handler of the user."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self.function = function
        self.arguments = arguments

    @property
    def size(self) -> int:
        """Octets of the message that it tells of, if any."""
        return sum(getattr(argument, "size", 0) for argument in self.arguments)

    def __call__(self) -> object:
        return self.function(*self.arguments)


# The parts of a channel add no slots: its class has them all.
NO_SLOTS: tuple[str, ...] = ()


class Requests:
    """The requests of one channel; see `Channel` for the attributes."""

    __slots__ = NO_SLOTS

    channel_id: int
    closed: bool
    connection: Connection
    error: BaseException | None
    is_closing: bool
    _early: list[PendingReply] | None
    _events: defaultdict[str, set[Callable[..., object]]] | None
    _replies: list[PendingReply]
    _stream: Stream
    _writers: Writers | None

    @property
    def where(self) -> str:
        """Channel and broker, for errors."""
        return f"channel {self.channel_id} of broker {self.connection.broker}"

    def send_method(
        self,
        sig: tuple[int, int],
        format: str | None = None,
        args: Iterable[Any] | None = None,
        content: Any = None,
        wait: Any = None,
        callback: Callable[[], object] | None = None,
        returns_tuple: bool = False,
    ) -> Any:
        """Send a method and, if *wait* names its replies, wait for one of them.

        Args:
            sig: the method, as in `amqp.spec`.
            format: ignored; the fields of each method are known.
            args: its arguments, in order.
            content: the message of Basic.publish.
            wait: signature, or list of signatures, of the reply.
            callback: called once the bytes are in the out-buffer.
            returns_tuple: return all arguments of the reply instead of the first.

        Raises:
            ArgumentError: an argument does not fit; nothing was sent.
            RPCTimeoutError: no reply within `rpc_timeout` or the task's deadline.
            ChannelError: the broker closed the channel instead; it is dead now.
        """
        del format
        method = BY_SIGNATURE[sig]
        values = tuple(args or ())
        if content is not None:
            channel: Any = self
            channel.basic_publish(content, *values[1:])
        elif wait:
            reply = self._request(method, values, accepts=_codes(wait))
            if callback is not None:
                callback()
            return _result(reply, returns_tuple)
        else:
            accepts = replies_to(method)
            if accepts and not (
                "nowait" in method.fields and values[method.fields.index("nowait")]
            ):
                self._request_later(method, values, accepts)
            else:
                self._send(encode_method(self.channel_id, method, values))
        if callback is not None:
            callback()
        return None

    def wait(
        self,
        method: Any,
        callback: Callable[..., object] | None = None,
        timeout: float | None = None,
        returns_tuple: bool = False,
    ) -> Any:
        """Wait for the reply to a request that `send_method` sent without waiting.

        Args:
            method: signature, or list of signatures, of the reply.
            callback: called with the reply's signature and arguments.
            timeout: seconds; None takes `rpc_timeout`.
        """
        codes = _codes(method)
        for pending in self._early or ():
            if pending.accepts & codes:
                break
        else:
            names = " or ".join(BY_CODE[code].name for code in sorted(codes))
            raise ChannelError(f"no request on {self.where} waits for {names}")
        assert self._early is not None
        self._early.remove(pending)
        pending.waiter = self.connection.environment.waiter()
        if pending.decided:
            pending.waiter.wake()
        reply = pending.wait(self._bound(timeout), self)
        if callback is not None:
            callback(reply.method.signature, *reply.arguments)
        return _result(reply, returns_tuple)

    @property
    def rpc_timeout(self) -> float | None:
        """Seconds that a request may take, apart from the deadline of the calling task."""
        timeout: float | None = self.connection.options.rpc_timeout
        return timeout

    def _bound(self, timeout: float | None) -> float | None:
        return remaining(self.rpc_timeout if timeout is None else timeout)

    def _request(
        self,
        method: Method,
        values: tuple[Any, ...],
        accepts: frozenset[int] | None = None,
        late: Callable[[MethodEvent], object] | None = None,
        timeout: float | None = None,
        key: str | None = None,
        enter: Callable[[PendingReply, bytes], bytes] | None = None,
    ) -> MethodEvent:
        """Send a request and wait for its reply; *enter* stands in for `_enter_request`."""
        data = encode_method(self.channel_id, method, values)
        waiter = self.connection.environment.waiter()
        pending = PendingReply(method, accepts or replies_to(method), waiter, late, key)
        connection = self.connection
        if self.closed:
            raise self._dead()
        # As `connection.awaiting()`, which costs more.
        intake = connection.intake
        intake.awaited[pending] = None
        try:
            if intake.paused:
                intake.resume()
            connection.exclusive(enter or self._enter_request, pending, data, asks=True)
            return pending.wait(self._bound(timeout), self)
        except BaseException:
            pending.give_up()
            raise
        finally:
            intake.awaited.pop(pending, None)

    def _request_later(
        self, method: Method, values: tuple[Any, ...], accepts: frozenset[int]
    ) -> None:
        """Send a request whose reply nobody waits for, or waits for later."""
        if self.closed:
            raise self._dead()
        data = encode_method(self.channel_id, method, values)
        pending = PendingReply(method, accepts, None)
        early = self._early
        if early is None:
            early = self._early = []
        early.append(pending)
        del early[:-UNCLAIMED]
        self.connection.exclusive(self._enter_request, pending, data)

    def _enter_request(self, pending: PendingReply, data: bytes) -> bytes:
        """Take a place in the queue; run exclusively, the bytes go out next."""
        if self.is_closing:
            # Anything behind Channel.close ends the whole connection (504).
            pending.fail(self._dead())
            return b""
        self._replies.append(pending)
        if self.error is not None:
            pending.fail(self.error)
            return b""
        return data

    def _send(self, data: Encoded) -> None:
        """Append the bytes of whole frames to the out-buffer; never waits.

        Raises:
            ChannelClosedError: the channel is dead; or the error that ended the connection.
        """
        try:
            if not self._write(data):
                raise self._dead()
        except StreamError as exc:
            raise self.connection.lost(exc) from exc

    def _write(self, data: Encoded) -> bool:
        """Append bytes unless the channel is closed, as one step in this; tell which.

        Raises:
            StreamError: the stream is lost.
        """
        writers = self._writers
        if writers is None:  # nobody else runs between the look and the append
            if self.closed or self.is_closing:
                return False
            self._stream.write(data)
            return True
        inside = writers.inside
        write = object()
        try:
            inside[write] = None
            if self.closed or self.is_closing or writers.refused:
                return False
            self._stream.write(data)
            return True
        finally:
            inside.pop(write, None)
            if writers.closing and not inside:
                self.connection.exclusive(writers.close)

    def last_words(self, step: Callable[..., bytes], *arguments: Any) -> bytes:
        """Run a step that closes the channel, now or behind the writes that are under way.

        Called in an exclusive step.
        """
        writers = self._writers
        if writers is None:
            return step(*arguments)
        writers.closing.append((step, arguments))
        writers.refused = True
        return writers.close()

    def end_requests(self, signature: tuple[int, int], error: BaseException) -> bool:
        """Fail what waits for the answer to that method; tell whether there is any.

        Called in the hub, when the broker ends the connection because of one of them.
        """
        return end_requests(self._replies, signature, error)

    def _dead(self) -> BaseException:
        return dead_error(self)


def end_requests(
    replies: Iterable[PendingReply], signature: tuple[int, int], error: BaseException
) -> bool:
    """Fail those of *replies* that wait for the answer to a method; tell whether there are any."""
    ended = [
        pending
        for pending in list(replies)
        if pending.request.signature == signature and not pending.decided
    ]
    for pending in ended:
        pending.fail(error)
    return bool(ended)


def end_by_broker(channel: Any, error: BaseException, listening: bool, unheard: bool) -> None:
    """Let a channel die of what its broker said, and tell that to whom it concerns.

    Args:
        listening: it has consumers: whoever drains gets the error.
        unheard: nobody waits for anything: the channel's next user gets it, once, and the log.
    """
    connection = channel.connection
    unheard = unheard and not listening
    if unheard:
        channel.unheard = error  # first: another native thread may look as soon as it is closed
    channel.die(error)
    if listening:
        connection.inbox.append(Raise(error))
    elif unheard:
        connection.log(
            logging.WARNING,
            "broker %s closed channel %s: %s",
            connection.broker,
            channel.channel_id,
            error,
        )


def dead_error(channel: Any) -> BaseException:
    """Make the error for using a dead channel: the broker's own, if nobody has heard it yet."""
    unheard, channel.unheard = channel.unheard, None
    error: BaseException | None = unheard or channel.error
    if error is None or isinstance(error, ChannelClosedError):
        return ChannelClosedError(f"{channel.where} was closed; open another one")
    if unheard is None and isinstance(error, ChannelError):
        # Whoever used it first got the broker's own error; from now on it is only closed.
        return ChannelClosedError(f"{channel.where} was closed by the broker: {error}")
    return fresh(error)


def _codes(signatures: Any) -> frozenset[int]:
    """Return the codes of one signature or a list of them."""
    if isinstance(signatures, list):
        return frozenset(BY_SIGNATURE[each].code for each in signatures)
    return frozenset((BY_SIGNATURE[signatures].code,))


def _result(reply: MethodEvent, as_tuple: bool) -> Any:
    values = reply.arguments
    if as_tuple:
        return values
    return values[0] if values else None
