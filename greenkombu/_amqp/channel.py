"""A channel: the ``amqp`` package's API over one shared stream.

Theory of operation.  The thin methods of `amqp.Channel` (queue_bind, exchange_declare, tx_commit,
...) all go through `send_method` and `wait`, which are ours; everything with state is ours, too.
Two parties touch a channel:

* any number of tasks, which call its methods.  A request enters its `PendingReply` into the
  channel's queue and its bytes into the out-buffer in one exclusive step of the connection, then
  parks; plain publishes and acks only append their bytes.
* the hub, which calls `handle`, `confirmed` and `deliverable`.  None of these waits or calls user
  code: replies wake their task, and what is for the user goes to the connection's inbox.

Life of a channel: open, then dead for good (`closed`), by `close()`, by Channel.close of the
broker, or with its connection; `error` says why.  A dead channel is not opened again: its
consumers, prefetch and delivery tags are gone, and an ack on a successor would hit somebody
else's message.  The broker's Channel.close is answered in the hub, and its error goes to
everybody who waits on the channel; to the draining task if the channel had consumers.

The parts: `requests` (asking and waiting), `consuming`, `publishing`; here is the rest.

A channel that was dropped without `close()` is closed by the connection, which refers to it
weakly while it has no consumers.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import amqp
from amqp.exceptions import ChannelError, error_for_code
from amqp.protocol import queue_declare_ok_t

from greenkombu._amqp.confirms import ConfirmTracker
from greenkombu._amqp.consuming import Consuming
from greenkombu._amqp.errors import RPCTimeoutError
from greenkombu._amqp.frames import (
    Publisher,
    encode_method,
)
from greenkombu._amqp.gate import Gate
from greenkombu._amqp.handshake import known
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.protocol import MethodEvent
from greenkombu._amqp.publishing import Publishing
from greenkombu._amqp.refusals import check_kind, is_other_declaration, note_kind, remedy_for
from greenkombu._amqp.requests import end_by_broker
from greenkombu._amqp.rpc import PendingReply, fail_all, take_reply
from greenkombu._amqp.writers import Writers
from greenkombu.exceptions import (
    ChannelClosedError,
    NotEquivalentError,
    NotFoundError,
)
from hub.errors import StreamError

if TYPE_CHECKING:
    from greenkombu._amqp.connection import Connection
    from hub.streams import Stream

__all__ = ["Channel"]

logger = logging.getLogger(__name__)

_OPEN = BY_NAME["Channel.open"]
_CLOSE = BY_NAME["Channel.close"]
_CLOSE_OK = BY_NAME["Channel.close_ok"]
_CONSUME = BY_NAME["Basic.consume"]
_FLOW_OK = BY_NAME["Channel.flow_ok"]
_QUEUE_DECLARE = BY_NAME["Queue.declare"]

_NONE: frozenset[str] = frozenset()

# Besides the base's: connection, channel_id, is_closing, auto_decode.
_SLOTS = (
    "_confirms",
    "_early",
    "_events",
    "_held",
    "_in_hand",
    "_on_open",
    "_published",
    "_publisher",
    "_qos_set",
    "_replies",
    "_retired",
    "_selected",
    "_stream",
    "_taken",
    "_writers",
    "active",
    "callbacks",
    "cancel_callbacks",
    "closed",
    "error",
    "is_open",
    "no_ack_consumers",
    "unheard",
)


class Channel(Publishing, Consuming, amqp.Channel):  # type: ignore[misc]
    """One AMQP channel of a `Connection`.

    Args:
        connection: an open connection.
        channel_id: the number to use; None takes a free one.
        auto_decode: kept for the ``amqp`` package's signature; messages decode themselves.
        on_open: called with the channel once it is open.

    Attributes:
        closed: True once the channel is dead; `error` says why.
        callbacks: consumer tag -> what is called with each message.
        no_ack_consumers: tags of the consumers whose messages need no ack.
        rpc_timeout: seconds that a request may take; from the connection's options.
    """

    __slots__ = _SLOTS

    # Not the base's __init__: it makes a dozen containers and bound methods for each channel.
    def __init__(
        self,
        connection: Connection,
        channel_id: int | None = None,
        auto_decode: bool = True,
        on_open: Callable[[Any], object] | None = None,
    ) -> None:
        self.connection = connection
        self.auto_decode = auto_decode
        self.is_open = False
        self.is_closing = False
        self.closed = False
        self.error: BaseException | None = None
        self.active = True
        self.callbacks: dict[str, Callable[[Any], object]] = {}
        self.cancel_callbacks: dict[str, Callable[[str], object]] = {}
        # A set of its own from the first such consumer on.
        self.no_ack_consumers: set[str] | frozenset[str] = _NONE
        # Requests that wait for their reply, in the order in which they went out.
        self._replies: list[PendingReply] = []
        # Replies that a later wait() may ask for.
        self._early: list[PendingReply] | None = None
        self._events: defaultdict[str, set[Callable[..., object]]] | None = None
        self._on_open = on_open
        # Deliveries between flow(False) and flow(True).
        self._held: list[Any] | None = None
        self._in_hand: dict[int, None] | None = None
        self._retired = None
        self._qos_set = False
        #: Why the broker closed the channel, when nobody was there to be told: for its next user.
        self.unheard: BaseException | None = None
        self._taken: dict[str, Gate] | None = None
        self._confirms: ConfirmTracker | None = None
        self._published = 0
        self._selected = False
        self._publisher: Publisher | None = None
        self._stream: Stream = connection.open_stream()
        self._writers = None if connection.environment.green else Writers()
        self.channel_id: int = connection.table.enter(self, channel_id)
        if connection.error is not None:
            self.die(connection.error)

    # -- small things of the amqp API

    @property
    def events(self) -> defaultdict[str, set[Callable[..., object]]]:
        """Handlers by name: basic_return, basic_ack, basic_nack; run by the draining task."""
        events = self._events
        if events is None:
            events = self._events = defaultdict(set)
        return events

    def then(self, on_success: Callable[[Any], object], on_error: Any = None) -> Channel:
        """Call *on_success* with the channel, now if it is open, else once it is."""
        del on_error
        if self.is_open:
            on_success(self)
        else:
            self._on_open = on_success
        return self

    def __repr__(self) -> str:
        state = f"dead: {self.error!r}" if self.closed else "open" if self.is_open else "new"
        return (
            f"<{type(self).__name__} {self.channel_id} of {self.connection.broker}: {state}, "
            f"{len(self.callbacks)} consumers, {len(self._replies)} requests waiting, "
            f"{len(self._confirms.unconfirmed) if self._confirms else 0} unconfirmed>"
        )

    # -- life

    def open(self) -> Any:
        """Open the channel at the broker; `Connection.channel()` has done that."""
        if self.is_open:
            return
        self._request(_OPEN, ("",), enter=self._enter_open)
        self.is_open = True
        if self._on_open is not None:
            on_open, self._on_open = self._on_open, None
            on_open(self)

    def _enter_open(self, pending: PendingReply, data: bytes) -> bytes:
        data = self._enter_request(pending, data)
        if data:
            self.connection.table.opens(self.channel_id)
        return data

    def close(
        self,
        reply_code: int = 0,
        reply_text: str = "",
        method_sig: tuple[int, int] = (0, 0),
        argsig: str = "BsBB",
    ) -> None:
        """Close the channel: say so, and wait for the answer up to `close_timeout`.

        The broker puts unacknowledged deliveries back on their queues.  Closing a dead channel
        does nothing, and neither does a broker that no longer answers: then the channel is dead
        without its consent, and its number is not used again before the broker has agreed.
        """
        del argsig
        if self.closed or self.is_closing or sys.is_finalizing():
            return
        self.is_closing = True
        try:
            if self.is_open:
                self._request(
                    _CLOSE,
                    (reply_code, reply_text, *method_sig),
                    timeout=self.connection.options.close_timeout,
                    enter=self._enter_close,
                )
            else:
                self.connection.table.drop(self)
        except (StreamError, RPCTimeoutError, ChannelError, *self.connection.connection_errors):
            logger.debug("%s did not close well", self.where, exc_info=True)
        finally:
            self.die(ChannelClosedError(f"{self.where} was closed; open another one"))
            self.is_closing = False

    def _enter_close(self, pending: PendingReply, data: bytes) -> bytes:
        return self.last_words(self._close, pending, data)

    def _close(self, pending: PendingReply, data: bytes) -> bytes:
        # Also when `close` has given up waiting since: the broker has to hear of it.
        if not self.connection.table.closes(self):
            pending.fail(self._dead())
            return b""
        self._replies.append(pending)
        return data

    def collect(self) -> None:
        """Give the channel up at once; it is closed at the broker in the background."""
        self.die(ChannelClosedError(f"{self.where} was dropped; open another one"))
        self.connection.table.drop(self)

    def die(self, error: BaseException) -> None:
        """Make the channel unusable and tell everybody who waits on it; idempotent.

        Never waits; called by the hub, by `close`, and by the connection when it is lost.
        """
        if self.error is not None:
            return
        self.error = error
        self.closed = True
        self.is_open = False
        self._in_hand = None
        # What a no_ack consumer has received is nowhere else any more: it is still delivered.
        for tag in list(self.callbacks):
            if tag not in self.no_ack_consumers:
                self.callbacks.pop(tag, None)
        self.cancel_callbacks.clear()
        self.connection.table.anchor(self.channel_id, self, False)
        fail_all(self._replies, error)
        for gate in list((self._taken or {}).values()):
            gate.open()
        if self._confirms is not None:
            self._confirms.fail(error)

    # -- what the hub hands in

    def handle(self, event: MethodEvent) -> None:
        """Take a method that is neither a delivery nor a confirm; called in the hub.

        Raises:
            UnexpectedFrameError: nobody asked for it; the connection is aborted with that.
        """
        if self.closed and event.method.name != "Channel.close":
            return  # it was given up; the broker does not know that yet
        handler = _HANDLERS.get(event.method.name)
        if handler is not None:
            handler(self, event)
        else:
            take_reply(self._replies, event)

    def _on_close(self, event: MethodEvent) -> None:
        code, text, class_id, method_id = event.arguments
        error = _channel_error(code, text, (class_id, method_id), self.connection.broker)
        self.connection.exclusive(self.last_words, self._closed_by_broker, error)

    def _closed_by_broker(self, error: BaseException) -> bytes:
        """Answer Channel.close; an exclusive step."""
        connection = self.connection
        if connection.table.closed_by_broker(self.channel_id, self):
            # Both closed at once: the answer to ours is on its way, other answers are not.
            for pending in list(self._replies):
                if pending.request is not _CLOSE:
                    pending.fail(error)
        elif not self.closed:
            # Consumers that were running; one that is being started hears of its own failure.
            starting = [each for each in self._replies if each.request is _CONSUME]
            listening = len(self.callbacks) > sum(not each.decided for each in starting)
            unheard = not self._replies and not (self._confirms and self._confirms.unconfirmed)
            end_by_broker(self, error, listening, unheard)
        return encode_method(self.channel_id, _CLOSE_OK)

    def _on_close_ok(self, event: MethodEvent) -> None:
        # Requests that were sent before Channel.close and not answered never will be.
        while self._replies and event.method.code not in self._replies[0].accepts:
            self._replies.pop(0).fail(ChannelClosedError(f"{self.where} was closed"))
        if self._replies:
            take_reply(self._replies, event)

    def _on_flow(self, event: MethodEvent) -> None:
        self.active = event.arguments[0]
        try:
            self._send(encode_method(self.channel_id, _FLOW_OK, (self.active,)))
        except (ChannelError, *self.connection.connection_errors):
            pass  # then the broker waits for no answer any more

    # -- declarations with a result of their own

    def queue_declare(
        self,
        queue: str = "",
        passive: bool = False,
        durable: bool = False,
        exclusive: bool = False,
        auto_delete: bool = True,
        nowait: bool = False,
        arguments: dict[str, Any] | None = None,
        argsig: str = "BsbbbbbF",
    ) -> Any:
        """Declare a queue.

        Returns:
            (queue, message_count, consumer_count); None with `nowait`.

        Raises:
            NotEquivalentError: it exists with other settings.
            NotFoundError: `passive`, and it does not exist.
        """
        del argsig
        values = (0, queue, passive, durable, exclusive, auto_delete, nowait, arguments)
        kinds = self.connection.kinds
        if nowait:
            self._send(encode_method(self.channel_id, _QUEUE_DECLARE, values))
            if not passive:
                note_kind(kinds, queue, arguments)
            return None
        declared = queue_declare_ok_t(*self._request(_QUEUE_DECLARE, values).arguments)
        if not passive:
            note_kind(kinds, declared.queue, arguments)
        return declared

    def queue_delete(
        self,
        queue: str = "",
        if_unused: bool = False,
        if_empty: bool = False,
        nowait: bool = False,
        argsig: str = "Bsbbb",
    ) -> int | None:
        """Delete a queue; return how many messages it held, None with `nowait`."""
        del argsig
        count: int | None = super().queue_delete(queue, if_unused, if_empty, nowait)
        note_kind(self.connection.kinds, queue, None)
        return count

    def queue_purge(self, queue: str = "", nowait: bool = False, argsig: str = "Bsb") -> int | None:
        """Drop the messages that wait in a queue; return how many, None with `nowait`.

        Raises:
            UnsupportedOperation: it is a stream; nothing was sent.
        """
        del argsig
        check_kind(self.connection, queue, "queue_purge")
        count: int | None = super().queue_purge(queue, nowait)
        return count


_HANDLERS: dict[str, Callable[[Channel, MethodEvent], None]] = {
    "Channel.close": Channel._on_close,
    "Channel.close_ok": Channel._on_close_ok,
    "Channel.flow": Channel._on_flow,
    "Basic.cancel": Channel._on_cancel,
    "Basic.return": Channel._on_return,
}


def _channel_error(code: int, text: str, signature: tuple[int, int], broker: str) -> BaseException:
    """Make the error for Channel.close of the broker."""
    remedy = remedy_for(code, text, signature, of_channel=True)
    declared = is_other_declaration(code, text, signature)
    text = f"{text} (broker {broker}{remedy})"
    if code == 404:
        return NotFoundError(text, known(signature), None, code)
    if declared:
        return NotEquivalentError(text, signature, None, code)
    error: BaseException = error_for_code(code, text, known(signature), ChannelError)
    return error
