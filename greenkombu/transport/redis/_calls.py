"""Commands whose task waits for the reply: the part of a `Wire` that parks."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from greenkombu.deadline import remaining
from greenkombu.transport.redis._errors import (
    CommandTimeoutError,
    ReplyError,
    copy_of,
    to_error,
)
from greenkombu.transport.redis._resp import pack, pack_many
from hub.environment import check_may_wait, get_environment

if TYPE_CHECKING:
    from greenkombu._amqp.gate import Gate
    from greenkombu.transport.redis._options import Settings
    from greenkombu.transport.redis._pipeline import Done
    from hub.environment import Waiter
    from hub.streams import Stream

__all__ = ["Answer", "Calls"]


class Answer:
    """What a task waits for."""

    __slots__ = ("result", "waiter")

    def __init__(self, waiter: Waiter) -> None:
        self.waiter = waiter
        self.result: Any = None

    def __call__(self, result: Any) -> None:
        self.result = result
        self.waiter.wake()


class Calls:
    """What `Wire` has for tasks that wait."""

    settings: Settings
    peer: str
    error: BaseException | None
    stream: Stream | None
    gate: Gate

    def send(self, data: bytes, replies: int, done: Done, flush: bool = False) -> None:
        """See `Wire`."""
        raise NotImplementedError

    def silent(self, seconds: float) -> None:
        """See `Wire`."""
        raise NotImplementedError

    def call(self, *words: Any, timeout: float | None = None) -> Any:
        """Send one command and return its reply; parks the calling task.

        Args:
            *words: the command and its arguments.
            timeout: seconds; None takes `settings.socket_timeout`. The deadline of the calling
                task holds as well.

        Raises:
            CommandTimeoutError: no reply in time; the command may still take effect.
            CommandError: the server refused it.
            ServerError: the wire has ended.
            ArgumentError: a word cannot be sent; nothing was.
        """
        [reply] = self._call(pack(*words), 1, words[0], timeout)
        if isinstance(reply, ReplyError):
            raise to_error(reply, server=self.peer, what=_name(words[0]))
        return reply

    def call_many(
        self, commands: list[tuple[Any, ...]], timeout: float | None = None, raises: bool = True
    ) -> list[Any]:
        """Send several commands at once and return their replies; as `call`.

        Args:
            commands: each as the words of `call`.
            raises: raise the first refusal; else refusals are instances of `ReplyError` in the
                list.
        """
        if not commands:
            return []
        replies = self._call(pack_many(commands), len(commands), commands[0][0], timeout)
        if raises:
            for command, reply in zip(commands, replies, strict=True):
                if isinstance(reply, ReplyError):
                    raise to_error(reply, server=self.peer, what=_name(command[0]))
        return replies

    def _call(self, data: bytes, replies: int, name: Any, timeout: float | None) -> list[Any]:
        stream = self.stream
        # The one that its hub wakes tasks of.
        environment = get_environment() if stream is None else stream.hub.environment
        check_may_wait(environment.current())  # before anything is sent
        own = self.settings.socket_timeout if timeout is None else timeout
        bound = remaining(own)
        assert bound is not None
        if stream is not None and stream.above_high_water:
            started = monotonic()
            self.room(bound)
            bound = max(bound - (monotonic() - started), 0.0)
        heard = (0, 0) if stream is None else (stream.received_bytes, stream.sent_bytes)
        answer = Answer(environment.waiter())
        self.send(data, replies, answer)
        answer.waiter.wait(bound)
        # Not what the wait says: the reply may have come between its end and here.
        result = answer.result
        if result is None:
            if bound >= own and stream is not None and _heard_nothing(stream, *heard):
                self.silent(bound)
            raise CommandTimeoutError(
                f"Redis server {self.peer} did not answer {_name(name)} within {bound:g} s; it may"
                " still take effect (see the transport option socket_timeout)"
            )
        if isinstance(result, BaseException):
            raise copy_of(result)
        found: list[Any] = result
        return found

    def room(self, timeout: float | None = None) -> None:
        """Wait until the server has taken enough of what was sent; parks the calling task.

        Args:
            timeout: seconds; None takes `settings.socket_timeout`.

        Raises:
            CommandTimeoutError: it took too little in time.
            ServerError: the wire has ended.
        """
        bound = remaining(self.settings.socket_timeout if timeout is None else timeout)
        if not self.gate.wait(self._has_room, bound):
            raise CommandTimeoutError(
                f"Redis server {self.peer} has taken no data for {bound or 0:g} s"
            )
        if self.error is not None:
            raise copy_of(self.error)

    def _has_room(self) -> bool:
        stream = self.stream
        return self.error is not None or (stream is not None and not stream.above_high_water)


def _heard_nothing(stream: Stream, received: int, sent: int) -> bool:
    """Tell whether the server has neither said nor taken anything since."""
    return stream.received_bytes == received and not (stream.buffered and stream.sent_bytes != sent)


def _name(word: Any) -> str:
    return word.decode("utf-8", "replace") if isinstance(word, bytes) else str(word)
