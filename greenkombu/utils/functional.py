"""Functions about functions: retrying, caching, late evaluation, ranges of waits, lists."""

from __future__ import annotations

import inspect
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from functools import wraps
from time import monotonic
from typing import Any, Generic, TypeVar

from greenkombu.deadline import remaining
from greenkombu.utils.encoding import safe_repr

__all__ = [
    "ChannelPromise",
    "LRUCache",
    "accepts_argument",
    "dictfilter",
    "fxrange",
    "fxrangemax",
    "is_list",
    "kwdict",
    "lazy",
    "maybe_evaluate",
    "maybe_list",
    "maybe_promise",
    "memoize",
    "mpromise",
    "promise",
    "reprcall",
    "reprkwargs",
    "retry_over_time",
    "shufflecycle",
]

_K = TypeVar("_K")
_V = TypeVar("_V")
_T = TypeVar("_T")

#: Stands between positional and keyword arguments in the keys of `memoize`.
_KEYWORDS = object()


class LRUCache(MutableMapping[_K, _V], Generic[_K, _V]):
    """A mapping that forgets what was used longest ago.

    It takes no lock: every change of state is one operation of OrderedDict that the interpreter
    does not interrupt, so green threads, native threads and finalizers may share a cache.  Views
    and iteration work on a copy of what was there.

    Args:
        limit: how many entries to keep; None (or 0) keeps all.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.data: OrderedDict[_K, _V] = OrderedDict()

    def __getitem__(self, key: _K) -> _V:
        value = self.data[key]
        try:
            self.data.move_to_end(key)
        except KeyError:
            pass  # dropped meanwhile by another thread; the value is good all the same
        return value

    def __setitem__(self, key: _K, value: _V) -> None:
        data = self.data
        data[key] = value
        try:
            data.move_to_end(key)
            while self.limit and len(data) > self.limit:
                data.popitem(last=False)
        except KeyError:
            pass  # dropped meanwhile by another thread

    def __delitem__(self, key: _K) -> None:
        del self.data[key]

    def __contains__(self, key: object) -> bool:
        return key in self.data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[_K]:
        return iter(list(self.data))

    def keys(self) -> Any:
        """Return a list of the keys, the longest unused first."""
        return list(self.data)

    def values(self) -> Any:
        """Return a list of the values, the longest unused first."""
        return list(self.data.values())

    def items(self) -> Any:
        """Return a list of (key, value), the longest unused first."""
        return list(self.data.items())

    iterkeys = keys
    itervalues = values
    iteritems = items

    def popitem(self, last: bool = True) -> tuple[_K, _V]:
        """Remove and return a (key, value) pair.

        Args:
            last: take the one used last, else the one unused for longest.

        Raises:
            KeyError: the cache is empty.
        """
        return self.data.popitem(last)

    def clear(self) -> None:
        """Forget everything."""
        self.data.clear()

    def incr(self, key: _K, delta: int = 1) -> int:
        """Add delta to a counter that is kept as text, as memcached does.

        Returns:
            The new value, as a number.

        Raises:
            KeyError: there is no such counter.
        """
        value = int(self.data[key]) + delta  # type: ignore[call-overload]
        self[key] = str(value)  # type: ignore[assignment]
        return int(value)

    def copy(self) -> LRUCache[_K, _V]:
        """Return a cache with the same limit and entries."""
        other: LRUCache[_K, _V] = type(self)(self.limit)
        other.data = self.data.copy()
        return other

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {len(self.data)} of {self.limit or 'any number'}>"


def memoize(
    maxsize: int | None = None,
    keyfun: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None,
    Cache: Callable[..., MutableMapping[Any, Any]] = LRUCache,
) -> Callable[[Callable[..., _T]], Callable[..., _T]]:
    """Return a decorator that remembers results by arguments.

    The decorated function has `hits`, `misses`, `clear()` and `original_func`.  Two tasks that ask
    at once for what is not known yet both compute it.

    Args:
        maxsize: how many results to keep; None keeps all.
        keyfun: makes the key from (args, kwargs); by default all arguments, which must be hashable.
        Cache: makes the mapping; called with ``limit=maxsize``.
    """

    def decorate(fun: Callable[..., _T]) -> Callable[..., _T]:
        cache = Cache(limit=maxsize)

        @wraps(fun)
        def remembering(*args: Any, **kwargs: Any) -> _T:
            if keyfun is not None:
                key = keyfun(args, kwargs)
            elif kwargs:
                key = (*args, _KEYWORDS, *sorted(kwargs.items()))
            else:
                key = args
            try:
                value: _T = cache[key]
            except KeyError:
                value = fun(*args, **kwargs)
                remembering.misses += 1  # type: ignore[attr-defined]
                cache[key] = value
            else:
                remembering.hits += 1  # type: ignore[attr-defined]
            return value

        def clear() -> None:
            cache.clear()
            remembering.hits = remembering.misses = 0  # type: ignore[attr-defined]

        remembering.hits = remembering.misses = 0  # type: ignore[attr-defined]
        remembering.clear = clear  # type: ignore[attr-defined]
        remembering.original_func = fun  # type: ignore[attr-defined]
        return remembering

    return decorate


class lazy:
    """A call that is made when its value is needed, each time anew.

    ``lazy(f, 1)()`` and ``.evaluate()`` call ``f(1)``, and so do str(), repr() and comparisons.
    See `mpromise` for one that calls only once.

    Args:
        fun: the function.
        *args: its arguments.
        **kwargs: its keyword arguments.
    """

    def __init__(self, fun: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self._fun = fun
        self._args = args
        self._kwargs = kwargs

    def __call__(self) -> Any:
        return self.evaluate()

    def evaluate(self) -> Any:
        """Call the function and return what it returns."""
        return self._fun(*self._args, **self._kwargs)

    def __str__(self) -> str:
        return str(self())

    def __repr__(self) -> str:
        return repr(self())

    def __eq__(self, other: object) -> bool:
        return bool(self() == maybe_evaluate(other))

    def __ne__(self, other: object) -> bool:
        return bool(self() != maybe_evaluate(other))

    def __lt__(self, other: object) -> bool:
        return bool(self() < maybe_evaluate(other))

    def __le__(self, other: object) -> bool:
        return bool(self() <= maybe_evaluate(other))

    def __gt__(self, other: object) -> bool:
        return bool(self() > maybe_evaluate(other))

    def __ge__(self, other: object) -> bool:
        return bool(self() >= maybe_evaluate(other))

    # Its value may change between two calls, so it cannot be a key.
    __hash__ = None  # type: ignore[assignment]


#: The manual's name.
promise = lazy


class mpromise(lazy):
    """A `lazy` that calls its function once and remembers the value."""

    evaluated = False
    _value: Any = None

    def evaluate(self) -> Any:
        """Return the value, calling the function the first time."""
        if not self.evaluated:
            self._value = super().evaluate()
            self.evaluated = True
        return self._value


def maybe_evaluate(value: Any) -> Any:
    """Return the value of a `lazy`; anything else as it is."""
    return value.evaluate() if isinstance(value, lazy) else value


#: The manual's name.
maybe_promise = maybe_evaluate


class ChannelPromise:
    """A channel that is opened when it is first needed.

    Args:
        contract: opens it; called once, without arguments.
    """

    __value__: Any

    def __init__(self, contract: Callable[[], Any]) -> None:
        self.__contract__ = contract

    def __call__(self) -> Any:
        try:
            return self.__value__
        except AttributeError:
            value = self.__value__ = self.__contract__()
            return value

    def __repr__(self) -> str:
        try:
            return repr(self.__value__)
        except AttributeError:
            return f"<promise: 0x{id(self.__contract__):x}>"


def is_list(
    obj: Any,
    scalars: tuple[type, ...] = (Mapping, str),
    iters: tuple[type, ...] = (Iterable,),
) -> bool:
    """Tell whether obj is something to loop over: of iters, but not of scalars."""
    return isinstance(obj, iters) and not isinstance(obj, scalars or ())


def maybe_list(obj: Any, scalars: tuple[type, ...] = (Mapping, str)) -> Any:
    """Return obj if it is None or something to loop over, else a list with obj in it."""
    return obj if obj is None or is_list(obj, scalars) else [obj]


def dictfilter(d: Mapping[str, Any] | None = None, **kw: Any) -> dict[str, Any]:
    """Return d and the keywords as one dict, without what is None."""
    merged = kw if d is None else {**d, **kw}
    return {key: value for key, value in merged.items() if value is not None}


def kwdict(kwargs: Mapping[Any, Any]) -> dict[str, Any]:
    """Return kwargs with str keys, whatever a decoder made of them."""
    return {key.decode() if isinstance(key, bytes) else str(key): v for key, v in kwargs.items()}


def fxrange(
    start: float = 1.0,
    stop: float | None = None,
    step: float = 1.0,
    repeatlast: bool = False,
) -> Iterator[float]:
    """Yield start, start + step, and so on up to stop, which is included.

    Args:
        start: the first value.
        stop: the largest value; None goes on for ever.
        step: what is added each time.
        repeatlast: go on with the last value for ever, instead of ending.  If start is beyond
            stop, that is stop.
    """
    current = start * 1.0
    last = None
    while stop is None or current <= stop:
        yield current
        last = current
        current += step
    if repeatlast:
        assert stop is not None
        while True:
            yield stop * 1.0 if last is None else last


def fxrangemax(
    start: float = 1.0,
    stop: float | None = None,
    step: float = 1.0,
    max: float = 100.0,
) -> Iterator[float]:
    """Yield start, start + step, and so on until their sum reaches max.

    As in Kombu, the first value is not part of the sum, but the value that would come next is.

    Args:
        start: the first value.
        stop: the largest value, which is then repeated; None lets them grow.
        step: what is added each time.
        max: where the sum ends.
    """
    total, current = 0.0, start * 1.0
    while total < max:
        yield current
        current = current + step if stop is None else min(current + step, stop)
        total += current


def _sleep(seconds: float) -> None:
    from hub.environment import get_environment  # looked up late: patching may come after us

    get_environment().sleep(seconds)


def _errback_caller(
    errback: Callable[..., Any], interval_max: float
) -> Callable[[BaseException, Iterator[float], int], float]:
    """Return a call of errback that gives the seconds to sleep.

    The manual's errback takes (exc, interval), Kombu 5's (exc, intervals, retries), where intervals
    is the iterator of waits and the returned number is the wait.
    """
    try:
        parameters = inspect.signature(errback).parameters.values()
        positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
        takes_retries = positional > 2 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    except (TypeError, ValueError):
        takes_retries = True

    def call(exc: BaseException, intervals: Iterator[float], retries: int) -> float:
        if takes_retries:
            chosen = errback(exc, intervals, retries)
            return min(next(intervals), interval_max) if chosen is None else float(chosen)
        interval = min(next(intervals), interval_max)
        chosen = errback(exc, interval)
        return interval if chosen is None else float(chosen)

    return call


def retry_over_time(
    fun: Callable[..., _T],
    catch: type[BaseException] | tuple[type[BaseException], ...],
    args: Iterable[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    errback: Callable[..., Any] | None = None,
    max_retries: int | None = None,
    interval_start: float = 2,
    interval_step: float = 2,
    interval_max: float = 30,
    callback: Callable[[], object] | None = None,
    timeout: float | None = None,
) -> _T:
    """Call fun again and again until it does not fail.

    Between two attempts the calling task sleeps, longer each time; other green threads run
    meanwhile, also when the interval is 0.

    Args:
        fun: what to try.
        catch: the errors after which to try again; any other passes through at once.
        args: positional arguments of fun.
        kwargs: keyword arguments of fun.
        errback: called with (exc, interval) before each sleep; if it takes three arguments, with
            (exc, intervals, retries) as in Kombu 5.  Returns the seconds to sleep, or None for
            the usual interval.
        max_retries: attempts after the first one; 0 tries only once, None for ever.
        interval_start: seconds of the first sleep.
        interval_step: seconds by which each next sleep is longer.
        interval_max: the longest sleep, in seconds.
        callback: called before each second of a sleep; an error in it ends the retrying.
        timeout: seconds for everything together; the last sleep is cut short for one more
            attempt at that moment.  None is without bound, except for the deadline that the
            calling task is under (`greenkombu.deadline`).

    Returns:
        What fun returned.

    Raises:
        BaseException: the last error of fun, when retries or time are used up.
    """
    arguments = tuple(args or ())
    keywords = dict(kwargs or {})
    intervals = fxrange(interval_start, interval_max + interval_start, interval_step, True)
    choose = None if errback is None else _errback_caller(errback, interval_max)
    timeout = remaining(timeout)
    until = None if timeout is None else monotonic() + timeout
    retries = 0
    while True:
        try:
            return fun(*arguments, **keywords)
        except catch as exc:
            if max_retries is not None and retries >= max_retries:
                raise
            if until is not None and monotonic() >= until:
                raise
            if choose is None:
                interval = min(next(intervals), interval_max)
            else:
                interval = choose(exc, intervals, retries)
        retries += 1
        if until is not None:
            interval = min(interval, until - monotonic())
        if interval <= 0.0:
            _sleep(0)  # a failing fun that never waits must not keep the others from running
        while interval > 0.0:
            if callback is not None:
                callback()
            step = min(interval, 1.0)
            _sleep(step)
            interval -= step


def accepts_argument(func: Callable[..., Any], argument_name: str) -> bool:
    """Tell whether func has a parameter of that name.

    Raises:
        TypeError: func is not callable.
    """
    return argument_name in inspect.signature(func).parameters


def shufflecycle(it: Iterable[_T]) -> Iterator[_T]:
    """Yield members of it in random order, for ever; a member may come twice in a row."""
    members = list(it)
    while members:
        yield random.choice(members)


def reprkwargs(kwargs: Mapping[str, Any], sep: str = ", ", fmt: str = "{0}={1}") -> str:
    """Return keyword arguments as they are written in a call.

    Args:
        kwargs: the keyword arguments.
        sep: what stands between two.
        fmt: how one is written, with ``{0}`` and ``{1}`` or the manual's two ``%s``.
    """
    form = fmt.replace("%s", "{}") if "%s" in fmt else fmt
    return sep.join(form.format(key, safe_repr(value)) for key, value in kwargs.items())


def reprcall(
    name: str,
    args: Iterable[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    sep: str = ", ",
) -> str:
    """Return a call as it is written: ``reprcall("f", (1,), {"a": 2})`` is ``f(1, a=2)``."""
    parts = [safe_repr(arg) for arg in args or ()]
    if kwargs:
        parts.append(reprkwargs(kwargs, sep))
    return f"{name}({sep.join(parts)})"
