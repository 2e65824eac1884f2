"""Publisher confirms: which publish the broker has taken, which not, and who waits to know.

The broker numbers the publishes of a channel in the order in which they arrive, beginning with
the first after confirm.select, and acknowledges the numbers, one by one or "up to here", in any
order.  `ConfirmTracker` gives each publish its number at the moment when its bytes enter the
out-buffer and keeps a `PublishResult` for it until its number comes back.

A mandatory message without a queue comes back before its number is acknowledged (RabbitMQ,
"Consumer Acknowledgements and Publisher Confirms"), and carries no number.  It is matched to the
oldest unconfirmed mandatory publish with the same exchange, routing key and body, as far as its
first piece tells: messages come back in their order, and comparing all of a large one in the hub
would keep everybody waiting.

The deadlines stand in the order of the numbers, since all publishes that use the default have the
same: one timer looks at the head of the queue, instead of a timer for each publish (1.4 us).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Any

from amqp.exceptions import ChannelError, error_for_code

from greenkombu._amqp.gate import Gate
from greenkombu._amqp.methods import BY_NAME
from greenkombu._amqp.protocol import Confirmation, octets_of
from greenkombu._amqp.rpc import blocking, fresh
from greenkombu._callbacks import call_users
from greenkombu.deadline import remaining
from greenkombu.exceptions import ConfirmTimeoutError, DeliveryError, UnroutableError

if TYPE_CHECKING:
    from greenkombu._amqp.inbox import DeliveryInbox
    from hub.environment import Waiter

__all__ = ["ConfirmTracker", "PublishResult", "await_confirm", "return_error", "tell_return"]

_RETURN = BY_NAME["Basic.return"].signature

# How often a long unconfirmed queue is looked at, as a part of the default deadline.
SWEEPS_PER_TIMEOUT = 10


class PublishResult:
    """What became of one publish.

    Attributes:
        exchange, routing_key: where it went.
        delivery_tag: its number on the channel; 0 until it is in the out-buffer.
        done: True once it was confirmed, or will never be.
        error: why it was not taken; None if it was, or is undecided.
    """

    __slots__ = (
        "_channel",
        "_waiters",
        "body",
        "calls",
        "deadline",
        "delivery_tag",
        "done",
        "error",
        "exchange",
        "mandatory",
        "message_id",
        "routing_key",
    )

    def __init__(
        self,
        channel: Any,
        exchange: str,
        routing_key: str,
        body: bytes | None,
        message_id: str | None = None,
    ) -> None:
        # Keeps the channel open while somebody is interested in the result.
        self._channel = channel
        self.exchange = exchange
        self.routing_key = routing_key
        self.message_id = message_id
        #: The body of a mandatory message, to recognize it when it comes back; else None.
        self.body = body
        self.delivery_tag = 0
        #: What `on_return` is to be told, for the task that waits in its publish to do so; None
        #: where no task does, and the one that drains is told.
        self.calls: list[Callable[[], object]] | None = None
        #: When the tracker's sweep gives it up, monotonic seconds; None: whoever waits does.
        self.deadline: float | None = None
        self.done = False
        self.error: BaseException | None = None
        self._waiters: list[Waiter] | None = None

    def result(self, timeout: float | None = None) -> None:
        """Wait until the broker has taken the message.

        Args:
            timeout: seconds; None waits until the channel's `confirm_timeout` gives it up.

        Raises:
            ConfirmTimeoutError: undecided in time; the broker may or may not have it.
            DeliveryError: the broker refused it.
            UnroutableError: it was mandatory, and no queue is bound for it.
            Exception: channel or connection was lost; the broker may or may not have it.
        """
        channel = self._channel
        if not self.done and channel is not None:
            waiter = channel.connection.environment.waiter()
            # Entered before the look, so that a decision in between is not missed.
            if self._waiters is None:
                self._waiters = []
            self._waiters.append(waiter)
            bound = remaining(timeout)
            if not self.done and not waiter.wait(bound) and not self.done:
                raise self.late(bound)
        if self.error is not None:
            raise fresh(self.error)

    def leave(self, inbox: DeliveryInbox) -> None:
        """The task that published waits no longer: the one that drains calls `on_return`."""
        calls, self.calls = self.calls, None
        if calls:
            inbox.extend(calls)

    def decide(self, error: BaseException | None) -> None:
        """Settle it; called by whoever took it out of the tracker. Never waits."""
        if self.error is None:
            self.error = error
        self.body = None
        self._channel = None
        self.done = True
        waiters = self._waiters
        if waiters is not None:
            for waiter in list(waiters):
                waiter.wake()

    def late(self, timeout: float | None) -> ConfirmTimeoutError:
        """Make the error of a confirm that did not come in time."""
        within = "" if timeout is None else f" within {timeout:g} s"
        why = "" if self._channel is None else blocking(self._channel.connection)
        return ConfirmTimeoutError(
            f"the broker did not confirm {self.name}{within}{why}; it may or may not have the"
            " message"
        )

    @property
    def name(self) -> str:
        """The message, for errors."""
        number = f" number {self.delivery_tag}" if self.delivery_tag else ""
        ident = f" (message_id {self.message_id!r})" if self.message_id else ""
        return (
            f"publish{number} to exchange {self.exchange!r} with routing key"
            f" {self.routing_key!r}{ident}"
        )

    def __repr__(self) -> str:
        state = "undecided" if not self.done else f"failed: {self.error!r}"
        if self.done and self.error is None:
            state = "taken"
        return f"<PublishResult of {self.name}: {state}>"


class ConfirmTracker:
    """The unconfirmed publishes of one channel.

    Args:
        window: how many publishes may be unconfirmed before further ones wait.
    """

    __slots__ = ("_newest", "_returned", "error", "gate", "unconfirmed", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.gate = Gate()
        self.unconfirmed: dict[int, PublishResult] = {}
        # The last publish, and the last that came back.
        self._newest = 0
        self._returned = 0
        #: Why no further confirms will come.
        self.error: BaseException | None = None

    def has_room(self) -> bool:
        """True while another publish may go out (or will fail at once)."""
        return len(self.unconfirmed) < self.window or self.error is not None

    def register(self, result: PublishResult, delivery_tag: int) -> None:
        """Note a publish whose bytes enter the out-buffer now."""
        result.delivery_tag = self._newest = delivery_tag
        self.unconfirmed[delivery_tag] = result
        if self.error is not None:
            self.fail(self.error)

    def confirm(self, event: Confirmation) -> None:
        """Settle what the broker confirmed; numbers it does not know are ignored."""
        tag = event.delivery_tag
        decided = 0
        for number in self._up_to(tag) if event.multiple else (tag,):
            result = self.unconfirmed.pop(number, None)
            if result is not None:
                self._decide(result, event.positive)
                decided += 1
        if decided and len(self.gate):
            self.gate.open(decided)

    def _up_to(self, tag: int) -> list[int]:
        """Return the unconfirmed numbers up to *tag*; zero means all (AMQP 0-9-1, basic.ack)."""
        while True:
            numbers = []
            try:
                for number in self.unconfirmed:  # in the order of the numbers
                    if tag and number > tag:
                        break
                    numbers.append(number)
            except RuntimeError:  # another thread published just now
                continue
            return numbers

    def _decide(self, result: PublishResult, positive: bool) -> None:
        result.decide(
            None
            if positive
            else DeliveryError(f"the broker refused {result.name} (basic.nack)", (60, 120))
        )

    def returned(
        self, exchange: str, routing_key: str, body: bytes | list[bytes] | None
    ) -> PublishResult | None:
        """Find the publish that came back; None if there is none. It stays unconfirmed."""
        size = octets_of(body)
        first = body[0] if isinstance(body, list) else body or b""

        def may_be(result: PublishResult) -> bool:
            return (
                result.body is not None
                and result.error is None
                and not result.calls
                and result.exchange == exchange
                and result.routing_key == routing_key
            )

        def is_it(result: PublishResult) -> bool:
            sent = result.body
            return (
                sent is not None and len(sent) == size and sent.startswith(first) and may_be(result)
            )

        # RabbitMQ routes the publishes of a channel in order. To begin behind the last one that
        # came back is to look at each once; from the oldest on, a window of returns took 0.1 s.
        numbers: Sequence[int] = range(self._returned + 1, self._newest + 1)
        if len(numbers) > 2 * self.window:
            # None came back for long: most have been confirmed since.
            numbers = [each for each in list(self.unconfirmed) if each > self._returned]
        for number in numbers:
            result = self.unconfirmed.get(number)
            if result is not None and is_it(result):
                self._returned = number
                return result
        candidates = [result for result in list(self.unconfirmed.values()) if may_be(result)]
        return next(filter(is_it, candidates), candidates[0] if candidates else None)

    def expire(self, timeout: float) -> list[PublishResult]:
        """Give up the publishes whose deadline is over.

        Args:
            timeout: what the deadline was, for the error.

        Returns:
            Those that were given up.
        """
        now = monotonic()
        expired = []
        for number, result in list(self.unconfirmed.items()):
            if result.deadline is None:
                continue
            if result.deadline > now:
                break
            if self.unconfirmed.pop(number, None) is not None:
                result.decide(result.late(timeout))
                expired.append(result)
        if expired:
            self.gate.open(len(expired))
        return expired

    def fail(self, error: BaseException) -> None:
        """Settle all: no confirm will come any more."""
        self.error = error
        while self.unconfirmed:
            try:
                _, result = self.unconfirmed.popitem()
            except KeyError:  # emptied by another thread since the look
                break
            result.decide(error)
        self.gate.open()


def await_confirm(
    connection: Any, result: PublishResult, timeout: float | None, confirm_timeout: float | None
) -> None:
    """Wait for the confirm of a publish in the task that published, and call its `on_return`.

    Args:
        connection: of the channel; its `confirm_timeout` is the bound where no other is shorter.
        result: the publish.
        timeout: seconds; see `Channel.basic_publish`.
        confirm_timeout: seconds; goes before `timeout`.

    Raises:
        Exception: see `PublishResult.result`; or what an `on_return` has raised.
    """
    default = connection.options.confirm_timeout
    bound = remaining(timeout if confirm_timeout is None else confirm_timeout)
    if bound is not None and default is not None and bound >= default:
        bound = None  # the tracker's sweep comes first
    try:
        if result.done:
            result.result()
        else:
            # No flush: but for the first, one send takes what all publish in this turn.
            with connection.awaiting():
                result.result(bound)
    except BaseException:
        result.leave(connection.inbox)
        raise
    call_users(result.calls or ())


def return_error(code: int, text: str, exchange: str, routing_key: str) -> BaseException:
    """Make the error of a message that the broker has returned."""
    described = f"{text}: exchange {exchange!r}, routing key {routing_key!r}"
    if code == 312:
        return UnroutableError(described)
    error: BaseException = error_for_code(code, described, _RETURN, ChannelError)
    return error


def tell_return(
    connection: Any,
    result: PublishResult | None,
    error: BaseException,
    calls: list[Callable[[], object]],
) -> None:
    """Tell of a message that came back whom it concerns; called in the hub.

    Args:
        connection: of the channel.
        result: the publish that it is; None if there is none to match.
        error: see `return_error`.
        calls: of the `on_return` callbacks; without any it is the publish that fails.
    """
    if calls:
        if result is not None and result.calls is not None:
            result.calls += calls
        else:
            connection.inbox.extend(calls)
    elif result is not None:
        result.error = error
    else:
        connection.log(
            logging.WARNING,
            "broker %s returned a message and nobody has set on_return: %s",
            connection.broker,
            error,
        )
