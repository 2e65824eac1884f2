"""Whose a reply is, where the end comes in the middle."""

from __future__ import annotations

from typing import Any

import pytest

from greenkombu.transport.redis._errors import ConnectionLostError, ProtocolError, ServerError
from greenkombu.transport.redis._options import Settings
from greenkombu.transport.redis._pipeline import Pipeline

LOST = ConnectionLostError("lost")


class Case:
    """A pipeline and what it told."""

    def __init__(self, pubsub: bool = False) -> None:
        self.told: list[Any] = []
        self.ends_at: Any = None
        self.pipeline = Pipeline(Settings(("h", 1)), self.tell, pubsub)

    def tell(self, what: Any) -> None:
        self.told.append(what)
        if what == self.ends_at:
            self.pipeline.fail(LOST)

    def await_replies(self, number: int | bytes) -> None:
        self.pipeline.enter((number, self.tell))


def test_replies_go_to_their_commands_in_order() -> None:
    case = Case()
    for number in (1, 2, 1):
        case.await_replies(number)
    assert case.pipeline.awaited == 3
    case.pipeline.take(b":1\r\n:2\r\n>1\r\n+push\r\n")
    assert case.pipeline.awaited == 2
    case.pipeline.take(b":3\r\n:4\r\n")
    assert case.told == [[1], [b"push"], [2, 3], [4]]
    assert case.pipeline.awaited == 0


def test_refusals_before_a_marker_belong_to_its_command() -> None:
    case = Case()
    case.await_replies(b"mark")
    case.await_replies(1)
    case.pipeline.take(b"-NOPERM no\r\n$4\r\nmark\r\n:1\r\n")
    [[refused], answer] = case.told
    assert refused.code == "NOPERM"
    assert answer == [1]


def test_one_who_has_some_of_his_replies_is_told_of_the_end_once() -> None:
    case = Case()
    case.ends_at = [b"push"]
    case.await_replies(2)
    case.await_replies(1)
    case.pipeline.take(b":1\r\n")
    case.pipeline.take(b">1\r\n+push\r\n:2\r\n:3\r\n")
    assert case.told == [[b"push"], LOST, LOST]
    assert case.pipeline.awaited == 0


def test_what_is_read_after_the_end_goes_to_nobody() -> None:
    case = Case()
    case.await_replies(1)
    later: list[Any] = []

    def end_and_enter(reply: Any) -> None:
        case.pipeline.fail(LOST)
        case.pipeline.enter((1, later.append))

    case.pipeline.enter((1, end_and_enter))
    case.pipeline.take(b":1\r\n:2\r\n:3\r\n")
    assert later == []
    case.pipeline.fail_waiting()
    assert later == [LOST]
    assert case.told == [[1]]


def test_an_answer_that_nobody_awaits_breaks_the_protocol() -> None:
    case = Case()
    with pytest.raises(ProtocolError, match="nobody had asked"):
        case.pipeline.take(b"+OK\r\n")
    with pytest.raises(ServerError, match="maxclients"):
        case.pipeline.take(b"-ERR max number of clients reached\r\n")


def test_lists_for_subscribers_are_pushes_with_the_old_protocol_only() -> None:
    message = b"*3\r\n$7\r\nmessage\r\n+a\r\n+b\r\n"
    for pubsub in (True, False):
        case = Case(pubsub)
        case.await_replies(1)
        case.pipeline.take(message)
        assert case.told == ([[b"message", b"a", b"b"]] if pubsub else [[[b"message", b"a", b"b"]]])
        assert case.pipeline.awaited == pubsub
