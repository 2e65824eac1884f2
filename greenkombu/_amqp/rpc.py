"""Who waits for which reply.

AMQP has no request numbers: on one channel the broker answers in the order of the requests.  So
each channel has one queue of `PendingReply`, entered in the order in which the requests go out,
and a reply belongs to its head.  Two replies are exceptions: in RabbitMQ it is the queue, not the
channel, that sends basic.consume_ok and basic.cancel_ok, and answers to later requests overtake
them (seen on 3.10).  They carry their consumer tag, which is the `key` of their request.  Whoever
gives up (a timeout, a kill) leaves its entry in the
queue as a tombstone: the reply still comes, belongs to nobody, and must not go to the next in
line.  Where a late reply has consequences (a consumer was started, a message was taken) the
tombstone's `late` function undoes them.

Exactly one of answer, failure and abandonment takes place, whoever comes first; the race between
the hub, which answers, and the waiting task, which may give up at any moment, is decided by one
atomic operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from greenkombu._amqp.errors import RPCTimeoutError, UnexpectedFrameError
from greenkombu._amqp.methods import BY_CODE, BY_NAME, Method
from greenkombu._amqp.protocol import MethodEvent

if TYPE_CHECKING:
    from hub.environment import Waiter

__all__ = ["PendingReply", "blocking", "fail_all", "fresh", "take_reply"]

Late = Callable[[MethodEvent], object]

# Replies that may be overtaken by those to later requests.
_BY_KEY = frozenset(BY_NAME[name].code for name in ("Basic.consume_ok", "Basic.cancel_ok"))


def fresh(error: BaseException) -> BaseException:
    """Return a copy of *error* to raise in one more task.

    Raising one object in many tasks would join their tracebacks, and keep their frames alive.
    """
    copy: BaseException = type(error).__new__(type(error), *error.args)
    copy.args = error.args
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy


def blocking(connection: Any) -> str:
    """Say, for an error, that the broker has blocked a connection; empty if it has not."""
    reason = connection.blocked
    return "" if reason is None else f", it has blocked publishers ({reason})"


class PendingReply:
    """One request that waits for its reply.

    Args:
        request: the method that was, or will be, sent.
        accepts: codes of the methods that answer it.
        waiter: what the requesting task parks on; None if nobody waits (yet).
        late: called with the reply if it comes after its task gave up.  It may run in the hub:
            it must not wait.
        key: the first argument of the reply, if that and not the order tells whose it is.
    """

    __slots__ = ("_late", "_undecided", "accepts", "error", "key", "reply", "request", "waiter")

    #: See `inbox.Intake.awaited`.
    for_answer = True

    def __init__(
        self,
        request: Method,
        accepts: frozenset[int],
        waiter: Waiter | None,
        late: Late | None = None,
        key: str | None = None,
    ) -> None:
        self.request = request
        self.key = key
        self.accepts = accepts
        self.waiter = waiter
        # One entry as well: what a late reply has done is undone once.
        self._late = None if late is None else [late]
        self.reply: MethodEvent | None = None
        self.error: BaseException | None = None
        # One entry; who pops it decides how this ends.
        self._undecided = [True]

    def _decide(self) -> bool:
        try:
            self._undecided.pop()
        except IndexError:
            return False
        return True

    @property
    def decided(self) -> bool:
        """True once it was answered, has failed, or was abandoned."""
        return not self._undecided

    def answer(self, reply: MethodEvent) -> None:
        """Hand over the reply, or deal with its being late."""
        # Set first: the waiting task reads it as soon as it finds the decision made.
        self.reply = reply
        if self._decide():
            if self.waiter is not None:
                self.waiter.wake()
        elif self._late is not None:
            self._undo(reply)

    def fail(self, error: BaseException) -> None:
        """There will be no reply: the channel or connection is gone."""
        if self._undecided:
            self.error = error
            if self._decide() and self.waiter is not None:
                self.waiter.wake()

    def abandon(self) -> bool:
        """Give up; False if the reply (or a failure) has come in the meantime."""
        return self._decide()

    def give_up(self) -> None:
        """Abandon it; a reply that has come already is treated as a late one. Idempotent."""
        if not self._decide() and self.reply is not None and self._late is not None:
            self._undo(self.reply)

    def _undo(self, reply: MethodEvent) -> None:
        assert self._late is not None
        try:
            late = self._late.pop()
        except IndexError:
            return
        late(reply)

    def wait(self, timeout: float | None, owner: Any) -> MethodEvent:
        """Park until the reply comes.

        Args:
            timeout: seconds; None waits for ever.
            owner: the channel or connection; its `where` goes into the error.

        Raises:
            RPCTimeoutError: no reply in time.
            BaseException: why there will be none; or what was thrown into the task, which has to
                call `give_up`.
        """
        assert self.waiter is not None
        if not self.waiter.wait(timeout) and self.abandon():
            why = blocking(getattr(owner, "connection", owner))
            raise RPCTimeoutError(
                f"no answer to {self.request.name} within {timeout:g} s on {owner.where}{why}; the"
                " request may still take effect",
                self.request.signature,
            )
        if self.reply is not None:
            return self.reply
        assert self.error is not None
        raise fresh(self.error)


def take_reply(pending: list[PendingReply], event: MethodEvent) -> None:
    """Give a reply to the request that it answers.

    Raises:
        UnexpectedFrameError: nobody asked for it.
    """
    code = event.method.code
    if pending:
        # Mostly it is the first one.
        head = pending[0]
        if code in head.accepts and (head.key is None or event.arguments[0] == head.key):
            del pending[0]
            head.answer(event)
            return
    due: PendingReply | None = None
    for each in pending:
        if each.key is not None:
            if code in each.accepts and event.arguments[0] == each.key:
                due = each
                break
        else:
            due = due or each
            # The order is broken, unless by one of the two that may come late.
            if code not in _BY_KEY or code in each.accepts:
                break
    if due is None or code not in due.accepts:
        expected = (
            "which nobody asked for"
            if due is None
            else f"where {' or '.join(sorted(BY_CODE[each].name for each in due.accepts))} was due"
        )
        raise UnexpectedFrameError(
            f"{event.method.name} on channel {event.channel_id}, {expected}",
            event.method.signature,
        )
    pending.remove(due)
    due.answer(event)


def fail_all(pending: list[PendingReply], error: BaseException) -> None:
    """Empty the queue: nobody in it will get a reply."""
    while pending:
        try:
            head: Any = pending.pop(0)
        except IndexError:  # emptied by another thread since the look
            return
        head.fail(error)
