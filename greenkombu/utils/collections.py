"""Collections."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

__all__ = ["EqualityDict", "HashedSeq", "eqhash"]

_K = TypeVar("_K")
_V = TypeVar("_V")


_MISSING: Any = object()


class HashedSeq(list[Any]):
    """A list that knows its hash, computed once when it was made.

    Args:
        *seq: the hashable members.
    """

    __slots__ = ("hashvalue",)

    def __init__(self, *seq: Hashable) -> None:
        super().__init__(seq)
        self.hashvalue = hash(seq)

    def __hash__(self) -> int:  # type: ignore[override]
        return self.hashvalue


def eqhash(o: Any) -> Any:
    """Return o.__eqhash__() if o has that method, else o itself."""
    method = getattr(o, "__eqhash__", None)
    return o if method is None else method()


class EqualityDict(dict[_K, _V], Generic[_K, _V]):
    """A dict keyed by what the keys' ``__eqhash__`` methods return.

    So two connections with equal parameters are one key, whatever their ``__hash__`` says.
    """

    def __getitem__(self, key: Any) -> _V:
        # With get(): the key is hashed once, and __missing__ not called with a hash.
        found = dict.get(self, eqhash(key), _MISSING)
        if found is not _MISSING:
            return found  # type: ignore[no-any-return]
        missing = getattr(self, "__missing__", None)
        if missing is None:
            raise KeyError(key)
        value: _V = missing(key)
        return value

    def __setitem__(self, key: Any, value: _V) -> None:
        dict.__setitem__(self, eqhash(key), value)

    def __delitem__(self, key: Any) -> None:
        dict.__delitem__(self, eqhash(key))

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, eqhash(key))

    def get(self, key: Any, default: Any = None) -> Any:
        """Return the value for key, else default; `__missing__` is not called."""
        return dict.get(self, eqhash(key), default)

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the value for key after setting it to default if there was none."""
        return dict.setdefault(self, eqhash(key), default)

    def pop(self, key: Any, *default: Any) -> Any:
        """Remove key and return its value, else default.

        Raises:
            KeyError: there is no such key, and no default.
        """
        return dict.pop(self, eqhash(key), *default)

    def __iter__(self) -> Iterator[Any]:
        return dict.__iter__(self)
