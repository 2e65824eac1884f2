"""What a user's function raises while it is called by a publish."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from greenkombu._callbacks import call_users, is_users


class Plain(Exception):
    """An error that takes attributes."""


@dataclass(frozen=True)
class Frozen(Exception):
    """An error that takes none."""

    text: str = ""


@pytest.mark.parametrize("kind", [Plain, Frozen, ConnectionError])
def test_what_a_callback_raises_is_known_for_the_users(kind: type[Exception]) -> None:
    error = kind("no")
    called: list[int] = []

    def fail() -> None:
        raise error

    assert not is_users(error)
    with pytest.raises(kind) as caught:
        call_users([lambda: called.append(1), fail, lambda: called.append(2)])
    assert caught.value is error
    assert is_users(error)
    assert called == [1]
