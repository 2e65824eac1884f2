"""greenkombu.utils.functional (behaviours 42, 44, 48, 49, 218, 222)."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import hub
from greenkombu import utils
from greenkombu.deadline import Deadline
from greenkombu.utils import functional
from greenkombu.utils.functional import (
    ChannelPromise,
    LRUCache,
    accepts_argument,
    dictfilter,
    fxrange,
    fxrangemax,
    is_list,
    kwdict,
    lazy,
    maybe_evaluate,
    maybe_list,
    memoize,
    mpromise,
    promise,
    reprcall,
    reprkwargs,
    retry_over_time,
    shufflecycle,
)


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        self.calls += 1
        return self.calls


def failing(times: int, error: type[Exception] = ValueError) -> Callable[..., Any]:
    attempts = itertools.count(1)

    def fun(*args: Any, **kwargs: Any) -> Any:
        attempt = next(attempts)
        if attempt <= times:
            raise error(attempt)
        return attempt, args, kwargs

    return fun


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The environment's sleep, without the waiting."""
    seconds: list[float] = []
    monkeypatch.setattr(hub.get_environment(), "sleep", seconds.append)
    return seconds


# -- ranges of waits ---------------------------------------------------------------------


def head(values: Iterator[float], n: int) -> list[float]:
    return list(itertools.islice(values, n))


def test_b049_fxrange_includes_its_end() -> None:
    assert list(fxrange(1, 3, 1)) == [1.0, 2.0, 3.0]
    assert list(fxrange(1, 0.5, 1)) == []


def test_b049_fxrange_repeats_the_last() -> None:
    assert head(fxrange(1, 3, 1, repeatlast=True), 5) == [1.0, 2.0, 3.0, 3.0, 3.0]
    assert head(fxrange(5, 3, 1, repeatlast=True), 2) == [3.0, 3.0]


def test_fxrange_without_end_goes_on() -> None:
    assert head(fxrange(1, None, 0.5), 4) == [1.0, 1.5, 2.0, 2.5]


def test_b049_fxrangemax_stops_when_the_sum_reaches_max() -> None:
    assert list(fxrangemax(1, None, 1, max=6)) == [1.0, 2.0, 3.0]
    assert list(fxrangemax(1, 2, 1, max=6)) == [1.0, 2.0, 2]
    assert len(list(fxrangemax())) == 13


# -- retrying ----------------------------------------------------------------------------


def test_b041_intervals_grow_to_the_maximum(slept: list[float]) -> None:
    seen: list[float] = []
    retry_over_time(failing(20), ValueError, errback=lambda exc, interval: seen.append(interval))
    assert seen == [*range(2, 31, 2), 30, 30, 30, 30, 30]
    assert sum(slept) == sum(seen)


def test_b042_zero_retries_is_one_attempt(slept: list[float]) -> None:
    with pytest.raises(ValueError, match="1"):
        retry_over_time(failing(1), ValueError, max_retries=0)
    assert slept == []


def test_b042_max_retries_counts_the_attempts_after_the_first(slept: list[float]) -> None:
    assert retry_over_time(failing(3), ValueError, max_retries=3)[0] == 4
    with pytest.raises(ValueError, match="4"):
        retry_over_time(failing(4), ValueError, max_retries=3)


def test_b048_without_limit_it_goes_on(slept: list[float]) -> None:
    assert retry_over_time(failing(50), ValueError, max_retries=None)[0] == 51


def test_b048_other_errors_pass_through_at_once(slept: list[float]) -> None:
    with pytest.raises(KeyError):
        retry_over_time(failing(1, KeyError), (ValueError, TypeError))
    assert slept == []


def test_b044_callback_is_called_for_each_second(slept: list[float]) -> None:
    calls = Counter()
    retry_over_time(failing(1), ValueError, interval_start=3, callback=calls)
    assert calls.calls == 3
    assert slept == [1.0, 1.0, 1.0]


def test_an_error_in_the_callback_ends_the_retrying(slept: list[float]) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        retry_over_time(failing(5), ValueError, callback=stop)


def test_arguments_are_passed_on(slept: list[float]) -> None:
    assert retry_over_time(failing(1), ValueError, (1,), {"a": 2}) == (2, (1,), {"a": 2})


def test_kombu_5_errback_gets_the_intervals_and_chooses_the_wait(slept: list[float]) -> None:
    seen: list[Any] = []

    def errback(exc: BaseException, intervals: Iterator[float], retries: int) -> float:
        seen.append((str(exc), next(intervals), retries))
        return 0.25

    retry_over_time(failing(2), ValueError, errback=errback, interval_start=1, interval_step=1)
    assert seen == [("1", 1.0, 0), ("2", 2.0, 1)]
    assert slept == [0.25, 0.25]


def test_the_manuals_errback_may_choose_the_wait_too(slept: list[float]) -> None:
    retry_over_time(failing(1), ValueError, errback=lambda exc, interval: interval / 4)
    assert slept == [0.5]


def test_timeout_bounds_everything_and_ends_with_an_attempt() -> None:
    attempts = Counter()

    def fun() -> None:
        attempts()
        raise ValueError("down")

    began = time.monotonic()
    with pytest.raises(ValueError, match="down"):
        retry_over_time(fun, ValueError, timeout=0.2, interval_start=10)
    assert 0.15 <= time.monotonic() - began < 5.0
    assert attempts.calls == 2


def test_the_callers_deadline_bounds_it_as_well() -> None:
    began = time.monotonic()
    with Deadline(0.1), pytest.raises(ValueError, match=r"\d"):
        retry_over_time(failing(1000), ValueError, interval_start=0.02, interval_step=0)
    assert time.monotonic() - began < 5.0


def test_other_tasks_run_between_attempts_without_interval() -> None:
    env = hub.get_environment()
    ended = env.Event()

    def fun() -> str:
        if not ended.is_set():
            raise ValueError
        return "went on"

    env.spawn(ended.set)
    assert (
        retry_over_time(
            fun, ValueError, interval_start=0, interval_step=0, interval_max=0, timeout=30
        )
        == "went on"
    )


# -- caches ------------------------------------------------------------------------------


def test_lru_cache_forgets_what_was_used_longest_ago() -> None:
    cache: LRUCache[str, int] = LRUCache(limit=2)
    cache["a"] = 1
    cache["b"] = 2
    assert cache["a"] == 1
    cache["c"] = 3
    assert list(cache.items()) == [("a", 1), ("c", 3)]
    assert "b" not in cache
    assert cache.get("b") is None
    assert cache.pop("b", 7) == 7


def test_lru_cache_is_a_mapping() -> None:
    cache: LRUCache[Any, Any] = LRUCache(limit=3)
    cache.update({1: 1, 2: 2}, x="y")
    cache.update([(4, 4)])
    assert list(cache) == list(cache.iterkeys()) == cache.keys() == [2, "x", 4]
    assert cache.values() == [2, "y", 4]
    assert cache.popitem() == (4, 4)
    assert cache.popitem(last=False) == (2, 2)
    assert dict(pickle.loads(pickle.dumps(cache))) == dict(cache.copy()) == {"x": "y"}
    del cache["x"]
    assert len(cache) == 0
    with pytest.raises(KeyError):
        cache.popitem()


def test_lru_cache_counters_are_text() -> None:
    cache: LRUCache[str, Any] = LRUCache()
    cache["n"] = 5
    assert cache.incr("n") == 6
    assert cache.incr("n", 4) == 10
    assert cache["n"] == "10"
    with pytest.raises(KeyError):
        cache.incr("other")


def test_lru_cache_may_change_while_it_is_walked() -> None:
    cache: LRUCache[int, int] = LRUCache(limit=10)
    cache.update({n: n for n in range(10)})
    for key in cache:
        cache[key + 100] = key
    assert len(cache) == 10


def test_memoize_counts_hits_and_misses() -> None:
    fun = Counter()
    memo: Any = memoize(maxsize=2)(lambda *args, **kwargs: fun())
    assert [memo(1), memo(1), memo(2), memo(3), memo(1)] == [1, 1, 2, 3, 4]
    assert (memo.hits, memo.misses) == (1, 4)
    memo.clear()
    assert (memo(1), memo.hits, memo.misses) == (5, 0, 1)
    assert memo(1, a=2) == memo(1, a=2) == 6
    assert memo.original_func is memo.__wrapped__


def test_memoize_with_a_key_function() -> None:
    fun = Counter()
    memo = memoize(keyfun=lambda args, kwargs: args[0] % 2)(lambda n: fun())
    assert [memo(1), memo(3), memo(2)] == [1, 1, 2]


# -- late evaluation ---------------------------------------------------------------------


def test_b222_promise_evaluates_at_every_call() -> None:
    p = promise(Counter())
    assert (p(), p.evaluate(), str(p), repr(p), p == 5, p < 7, p != 7) == (
        *(1, 2, "3", "4"),
        *(True, True, False),
    )
    assert promise is lazy


def test_b222_mpromise_evaluates_once() -> None:
    fun = Counter()
    p = mpromise(fun)
    assert (p(), p.evaluate(), str(p), p == 1, p <= 1, p >= 1, p > 0) == (1, 1, "1", *[True] * 4)
    assert fun.calls == 1


def test_lazy_pickles_and_copies() -> None:
    p = lazy(os.path.join, "a", "b")
    assert pickle.loads(pickle.dumps(p))() == copy.deepcopy(p)() == os.path.join("a", "b")
    with pytest.raises(TypeError):
        hash(p)


def test_maybe_evaluate() -> None:
    assert maybe_evaluate(3) == maybe_evaluate(lazy(lambda: 3)) == functional.maybe_promise(3)


def test_channel_promise_is_kept_once() -> None:
    opened = Counter()
    channel = ChannelPromise(opened)
    assert repr(channel).startswith("<promise: 0x")
    assert (channel(), channel(), repr(channel)) == (1, 1, "1")


# -- lists, dicts, calls -----------------------------------------------------------------


def test_b218_maybe_list() -> None:
    assert maybe_list(None) is None
    assert maybe_list("x") == ["x"]
    assert maybe_list(("x",)) == ("x",)
    assert maybe_list({"a": 1}) == [{"a": 1}]
    assert maybe_list(5) == [5]


def test_is_list() -> None:
    yes = [("x",), [1], {1}, range(2), (x for x in "a")]
    assert all(is_list(value) for value in yes)
    assert not any(is_list(value) for value in [None, "x", {"a": 1}, 5])
    assert not is_list((1,), iters=(list,))


def test_dictfilter_drops_none() -> None:
    assert dictfilter({"a": 0, "b": None}, c=None, e=2) == {"a": 0, "e": 2}
    assert dictfilter(a=None) == {}


def test_b218_reprcall() -> None:
    assert reprcall("f", (1,), {"a": 2}) == "f(1, a=2)"
    assert reprcall("f", ("x", 2), {"a": "y"}, sep="; ") == "f('x'; 2; a='y')"
    assert reprcall("f") == "f()"
    assert reprkwargs({"a": 1, "b": "x"}) == "a=1, b='x'"
    assert reprkwargs({"a": 1}, fmt="{0}:{1}") == "a:1"
    assert reprkwargs({"a": 1}, fmt="%s->%s") == "a->1"


def test_b218_kwdict_has_text_keys() -> None:
    assert kwdict({b"a": 1, "b": 2}) == {"a": 1, "b": 2}


def test_accepts_argument() -> None:
    assert accepts_argument(failing, "error")
    assert not accepts_argument(failing, "nothing")
    with pytest.raises(TypeError):
        accepts_argument(3, "a")  # type: ignore[arg-type]


def test_shufflecycle_gives_every_member() -> None:
    assert set(itertools.islice(shufflecycle("abc"), 200)) == set("abc")
    assert list(shufflecycle([])) == []


def test_the_package_has_the_manuals_names() -> None:
    assert utils.fxrange is fxrange
    assert utils.retry_over_time is retry_over_time
    for name in utils.__all__:
        assert getattr(utils, name) is not None, name
