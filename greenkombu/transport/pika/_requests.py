"""How a channel asks pika for something, and how it ends: the part that everything else uses.

Two parties touch a channel:

* any number of tasks, which call its methods.  A request is a *step*: a function that is called
  in the hub with pika's channel and a callback for the reply.  The task parks on a
  `PendingReply`, which is failed when the channel dies.  One that gave up leaves its callback with
  pika: a late reply finds nobody there, and what it has done (a consumer, a message) is undone.
* the hub, where pika calls the `Ear`.  Nothing there waits or calls user code: what is for the
  user becomes an event of the connection's inbox.

AMQP answers the requests of a channel in their order, and pika sends one at a time.  The others
wait here and not with pika, which would find out only then that one cannot be encoded, in the
middle of reading.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from struct import error as StructError
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError
from pika import exceptions

from greenkombu._amqp.channel import _channel_error
from greenkombu._amqp.errors import ArgumentError, ChannelLimitError, RPCTimeoutError
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.requests import dead_error, end_by_broker, end_requests
from greenkombu._amqp.rpc import PendingReply
from greenkombu._amqp.values import encode_table
from greenkombu.deadline import remaining
from greenkombu.exceptions import ChannelClosedError
from greenkombu.transport import base
from greenkombu.transport.pika._ear import Ear
from hub.errors import HubError

if TYPE_CHECKING:
    from greenkombu._amqp.confirms import ConfirmTracker
    from greenkombu.transport.pika._connection import Connection
    from greenkombu.transport.pika._link import Link

__all__ = ["Requests", "Step", "check_table", "no_step", "shortened"]

logger = logging.getLogger(__name__)

#: (pika's channel, what to call with the reply)
Step = Callable[[Any, Callable[[Any], None]], object]

# What pika raises when it is given what it cannot send.
_REFUSALS = (
    AssertionError,
    AttributeError,
    StructError,
    TypeError,
    ValueError,
    exceptions.AMQPError,
)


class Requests(base.StdChannel):
    """The requests and the life of one channel.

    Args:
        connection: an open connection.
        channel_id: kept for the other AMQP channel's signature; pika chooses the number.
        on_open: called with the channel once it is open.
    """

    no_ack_consumers: set[str]

    def __init__(
        self,
        connection: Connection,
        channel_id: int | None = None,
        on_open: Callable[[Any], object] | None = None,
    ) -> None:
        del channel_id
        self.connection = connection
        self.channel_id = 0
        self.is_open = False
        self.is_closing = False
        self.closed = False
        self.error: BaseException | None = None
        #: As that of `_amqp.channel.Channel`.
        self.unheard: BaseException | None = None
        self.callbacks: dict[str, Callable[[Any], object]] = {}
        self.cancel_callbacks: dict[str, Callable[[str], object]] = {}
        self.no_ack_consumers = set()
        self.events: defaultdict[str, set[Callable[..., object]]] = defaultdict(set)
        self._pika: Any = None
        self._ear = Ear(self)
        self._on_open = on_open
        # Requests that wait, to be told when the channel dies.
        self._waiting: dict[PendingReply, None] = {}
        self._confirms: ConfirmTracker | None = None
        # The request that pika has sent, and those after it; changed in the hub only.
        self._asked: PendingReply | None = None
        self._queue: deque[tuple[PendingReply, Step]] = deque()
        self._finalizer: Any = None

    # -- asking and waiting

    @property
    def where(self) -> str:
        """Channel and broker, for errors."""
        return f"channel {self.channel_id} of broker {self.connection.broker}"

    @property
    def rpc_timeout(self) -> float | None:
        """Seconds that a request may take, apart from the deadline of the calling task."""
        return self.connection.options.rpc_timeout

    def _ask(
        self,
        name: str,
        step: Step,
        *,
        nowait: bool = False,
        late: Callable[[Any], object] | None = None,
        timeout: float | None = None,
        begin: Callable[[PendingReply, Step], object] | None = None,
    ) -> Any:
        """Run a step in the hub and wait for the reply that it is called back with.

        Args:
            name: of the method, for errors.
            nowait: do not wait; errors are only logged.
            late: called with a reply that nobody waits for any more.
            timeout: seconds; None takes `rpc_timeout`.
            begin: instead of `_begin`.

        Raises:
            ArgumentError: pika cannot send the arguments; nothing was sent.
            RPCTimeoutError: no reply in time.
            ChannelError: the channel is dead, or was closed instead.
        """
        connection = self.connection
        waiter = None if nowait else connection.environment.waiter()
        pending = PendingReply(BY_NAME[name], frozenset(), waiter, late)
        self._waiting[pending] = None
        try:
            # Looked at after it was entered, so that `die` cannot miss it.
            if self.closed or (self.is_closing and begin is None):
                raise self._dead()
            if nowait:
                connection.post(begin or self._begin, pending, step)
                return None
            bound = remaining(self.rpc_timeout if timeout is None else timeout)
            with connection.awaiting():
                connection.post(begin or self._begin, pending, step)
                return pending.wait(bound, self)
        except BaseException:
            pending.give_up()
            raise
        finally:
            if not nowait:
                self._waiting.pop(pending, None)

    def _begin(self, pending: PendingReply, step: Step) -> None:
        """Run the step of a request when its turn comes; in the hub."""
        self._queue.append((pending, step))
        self._next()

    def _begin_next(self, pending: PendingReply, step: Step) -> None:
        """As `_begin`, before all that wait for their turn; in the hub."""
        self._queue.appendleft((pending, step))
        self._next()

    def _next(self) -> None:
        while self._queue and self._asked is None:
            pending, step = self._queue.popleft()
            self._asked = pending
            if not self._run(pending, step, self._answered):
                self._asked = None

    def _answered(self, pending: PendingReply) -> None:
        if self._asked is pending:
            self._asked = None
            if self._queue:
                # Not now: pika is yet to note that it may send the next one.
                self.connection.post(self._next)

    def _run(
        self,
        pending: PendingReply,
        step: Step,
        answered: Callable[[PendingReply], object] | None = None,
    ) -> bool:
        """Run a step in the hub; tell whether pika has taken it.

        Args:
            answered: called when the reply has come.
        """
        if pending.decided and pending.waiter is not None:
            return False  # given up before anything was sent
        # By pika's word: what was asked for before `close` was called comes before it.
        if self.closed or not self._pika.is_open:
            pending.fail(self._dead())
            return False
        waiting = self._waiting

        def done(reply: Any) -> None:
            waiting.pop(pending, None)
            pending.answer(reply)
            if answered is not None:
                answered(pending)

        try:
            step(self._pika, done)
        except _REFUSALS as exc:
            error = _refusal(exc, pending)
            if pending.waiter is None:
                self.connection.log(logging.WARNING, "%s: %s", self.where, error)
            waiting.pop(pending, None)
            pending.fail(error)
            return False
        return True

    def _tell(self, step: Callable[[Any], object]) -> None:
        """Run a step that has no reply; in the hub."""
        if not self.closed and self._pika.is_open:
            step(self._pika)

    def end_requests(self, signature: tuple[int, int], error: BaseException) -> bool:
        """As that of `_amqp.channel.Channel`."""
        return end_requests(self._waiting, signature, error)

    def _dead(self) -> BaseException:
        return dead_error(self)

    # -- life

    def open(self) -> None:
        """Open the channel at the broker; `Connection.channel()` has done that.

        Raises:
            ChannelLimitError: all numbers are in use.
        """
        if self.is_open:
            return
        self._ask("Channel.open", no_step, begin=self._begin_open)
        self.is_open = True
        if self._on_open is not None:
            on_open, self._on_open = self._on_open, None
            on_open(self)

    def _begin_open(self, pending: PendingReply, step: Step) -> None:
        del step
        connection = self.connection
        protocol = connection.link.protocol
        if pending.decided or self.closed or protocol is None:
            pending.fail(self._dead())
            return
        try:
            made = protocol.channel(on_open_callback=pending.answer)
        except exceptions.NoFreeChannels:
            pending.fail(
                ChannelLimitError(
                    f"all {connection.channel_max} channels of the connection to broker"
                    f" {connection.broker} are in use: close channels, or use another connection",
                    (20, 10),
                )
            )
            return
        connection.table.open += 1
        self._pika = made
        self.channel_id = made.channel_number
        self._ear.attach(made)
        self._finalizer = weakref.finalize(self, _reap, connection.link, made)
        self._finalizer.atexit = False
        if self.error is not None:  # given up since the look, by another thread
            self._finalizer()

    def close(
        self,
        reply_code: int = 0,
        reply_text: str = "",
        method_sig: tuple[int, int] = (0, 0),
        argsig: str = "BsBB",
    ) -> None:
        """Close the channel: say so, and wait for the answer up to `close_timeout`.

        Closing a dead channel does nothing, and neither does a broker that no longer answers: then
        the channel is dead without its consent.
        """
        del method_sig, argsig
        if self.closed or self.is_closing:
            return
        self.is_closing = True
        try:
            if self.is_open:
                self._ask(
                    "Channel.close",
                    lambda channel, _done: channel.close(reply_code, shortened(reply_text)),
                    timeout=self.connection.options.close_timeout,
                    begin=self._begin_close,
                )
        except (HubError, RPCTimeoutError, ChannelError, *self.connection.connection_errors):
            logger.debug("%s did not close well", self.where, exc_info=True)
        finally:
            self.collect()
            self.is_closing = False

    def _begin_close(self, pending: PendingReply, step: Step) -> None:
        # Also when `close` has given up waiting since: the broker has to hear of it.
        if self._pika.is_open:
            step(self._pika, pending.answer)  # answered by the death of the channel
        else:
            pending.fail(self._dead())

    def collect(self) -> None:
        """Give the channel up at once; it is closed at the broker in the background."""
        self.die(ChannelClosedError(f"{self.where} was closed; open another one"))
        if self._finalizer is not None:
            self._finalizer()

    def ended(self) -> None:
        """pika's channel is closed, by us or with its connection; called in the hub."""
        error = self.connection.error
        self.die(error or ChannelClosedError(f"{self.where} was closed; open another one"))

    def ended_by_broker(self, code: int, text: str, signature: tuple[int, int]) -> None:
        """The broker has closed the channel; called in the hub."""
        connection = self.connection
        error = _channel_error(code, text, signature, connection.broker)
        if self.closed:
            return
        # Consumers that were running; one that is being started hears of its own failure.
        starting = sum(each.request.name == "Basic.consume" for each in self._waiting)
        listening = len(self.callbacks) > starting
        unheard = not self._waiting and not (self._confirms and self._confirms.unconfirmed)
        end_by_broker(self, error, listening, unheard)

    def die(self, error: BaseException) -> None:
        """Make the channel unusable and tell everybody who waits on it; idempotent."""
        if self.error is not None:
            return
        self.error = error
        self.closed = True
        self.is_open = False
        # What a no_ack consumer has received is nowhere else any more: it is still delivered.
        for tag in list(self.callbacks):
            if tag not in self.no_ack_consumers:
                self.callbacks.pop(tag, None)
        self.cancel_callbacks.clear()
        self.connection.table.leave(self)
        while self._waiting:
            try:
                pending, _ = self._waiting.popitem()
            except KeyError:
                break  # emptied by another thread since the look
            pending.fail(error)

    def __repr__(self) -> str:
        state = f"dead: {self.error!r}" if self.closed else "open" if self.is_open else "new"
        return (
            f"<{type(self).__name__} {self.channel_id} of {self.connection.broker}: {state}, "
            f"{len(self.callbacks)} consumers, {len(self._waiting)} requests waiting>"
        )


def no_step(channel: Any, done: Callable[[Any], None]) -> None:
    """Stand in where `begin` does all."""


def check_table(table: Any, where: str) -> None:
    """Refuse what pika would send although brokers end the connection for it.

    Raises:
        ArgumentError: a number that is not finite, for instance; see `encode_table`.
    """
    if table:
        encode_table(table, where)


def shortened(text: str) -> str:
    """Return as much of a text as AMQP can send; pika might find out too late, see above."""
    return text.encode()[:255].decode(errors="ignore")


def _refusal(error: BaseException, pending: PendingReply) -> BaseException:
    """Return our error for what pika raised instead of sending a request."""
    if isinstance(error, (exceptions.ChannelWrongStateError, exceptions.ConnectionWrongStateError)):
        return ChannelClosedError(f"{pending.request.name}: {error}")
    made = ArgumentError(
        f"pika cannot send {pending.request.name}: {error!r}", pending.request.signature
    )
    made.__cause__ = error
    return made


def _reap(link: Link, channel: Any) -> None:
    """Have a channel of pika's closed that nobody has any more; callable from a finalizer."""
    try:
        link.post(_close_quietly, channel)
    except HubError:
        pass  # it went with its connection


def _close_quietly(channel: Any) -> None:
    if channel.is_open or channel.is_opening:
        channel.close()
