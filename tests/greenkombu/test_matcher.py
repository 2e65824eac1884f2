"""greenkombu.matcher."""

from __future__ import annotations

import pytest

from greenkombu import matcher
from greenkombu.matcher import MatcherNotInstalled, match


def test_glob_is_the_default_and_minds_case() -> None:
    assert match("worker1.example.com", "worker*")
    assert match("worker1", "worker?", "glob")
    assert not match("Worker1", "worker*")


def test_pcre() -> None:
    assert match("worker1", r"^worker\d$", "pcre") is True
    assert not match("worker1", r"\d", "pcre")
    assert match("WORKER", "worker", "pcre", {"flags": 2})


def test_own_matchers() -> None:
    matcher.register("equal", lambda data, pattern: data == pattern)
    assert match("a", "a", "equal")
    assert not match("a", "*", "equal")
    matcher.unregister("equal")
    with pytest.raises(MatcherNotInstalled, match="equal"):
        match("a", "a", "equal")
    with pytest.raises(MatcherNotInstalled, match="equal"):
        matcher.unregister("equal")
