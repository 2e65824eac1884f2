"""The timers that connections share."""

from __future__ import annotations

import pytest

from greenkombu._amqp.pulse import MEMBERS, join
from hub.errors import HubClosedError
from hub.testing import FakeClock, scripted_hub


class Member:
    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.beats = 0

    def beat(self) -> None:
        self.beats += 1
        if self.beats == 13:
            raise ValueError("the thirteenth beat")


def test_members_share_timers_until_the_last_has_gone() -> None:
    clock = FakeClock()
    loop = scripted_hub(clock)
    errors: list[BaseException] = []
    loop.on_error = lambda error, _: errors.append(error)
    members = [Member() for _ in range(2 * MEMBERS + 1)]
    for member in members:
        join(loop, 5.0, Member.beat, member)
    join(loop, 7.0, Member.beat, members[0])
    assert len(loop._timers) == 4, "two full ones, one more, and one of another interval"

    def beat() -> None:
        before = members[-1].beats
        while members[-1].beats == before:
            clock.advance(1.0)
            loop.run_once(0)

    beat()
    assert {member.beats for member in members[1:]} == {1}
    members[-2].error = ConnectionError()  # it is dead
    del members[0]  # and that one dropped
    members[5].beats = 12  # its method will raise: the others do not suffer
    beat()
    assert members[-2].beats == 1
    assert {member.beats for member in members[6:-2]} == {2}
    assert [str(error) for error in errors] == ["the thirteenth beat"]
    last = member = members.pop()
    members.clear()
    errors.clear()  # a traceback refers to a member
    for _ in range(20):
        clock.advance(1.0)
        loop.run_once(0)
    assert len(loop._timers) == 1
    last.error = ConnectionError()
    for _ in range(10):
        clock.advance(1.0)
        loop.run_once(0)
    assert len(loop._timers) == 0
    another = Member()
    join(loop, 5.0, Member.beat, another)
    for _ in range(6):
        clock.advance(1.0)
        loop.run_once(0)
    assert another.beats == 1, "a timer that has ended takes no new member"
    loop.close()
    with pytest.raises(HubClosedError):
        join(loop, 5.0, Member.beat, another)
