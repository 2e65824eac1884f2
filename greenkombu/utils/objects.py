"""Object helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

__all__ = ["cached_property"]

_T = TypeVar("_T")
_MISSING: Any = object()


class cached_property(Generic[_T]):
    """Compute a property once per object and keep the value in its ``__dict__``.

    Unlike functools.cached_property it has hooks: the setter prepares (or refuses) a value that is
    assigned, the deleter is given the value that is dropped.  Deleting a property that was never
    computed does nothing.

    It takes no lock, since a lock held over the getter would let one green thread that waits in
    there stop the others for ever.  When two tasks compute at once, the first value stays and both
    get it.

    Args:
        fget: computes the value, given the object.
        fset: given the object and the assigned value, returns the value to keep.
        fdel: given the object and the value that was dropped.
    """

    def __init__(
        self,
        fget: Callable[[Any], _T] | None = None,
        fset: Callable[[Any, Any], _T] | None = None,
        fdel: Callable[[Any, _T], object] | None = None,
    ) -> None:
        self.fget = fget
        self.fset = fset
        self.fdel = fdel
        self.__doc__ = getattr(fget, "__doc__", None)
        self.__module__ = getattr(fget, "__module__", __name__)
        self.__name__: str = getattr(fget, "__name__", "")

    def __set_name__(self, owner: type, name: str) -> None:
        self.__name__ = name

    @overload
    def __get__(self, obj: None, owner: type | None = None) -> cached_property[_T]: ...
    @overload
    def __get__(self, obj: Any, owner: type | None = None) -> _T: ...
    def __get__(self, obj: Any, owner: type | None = None) -> Any:
        if obj is None:
            return self
        try:
            return obj.__dict__[self.__name__]
        except KeyError:
            if self.fget is None:
                raise AttributeError(f"property {self.__name__!r} has no getter") from None
        return obj.__dict__.setdefault(self.__name__, self.fget(obj))

    def __set__(self, obj: Any, value: Any) -> None:
        if self.fset is not None:
            value = self.fset(obj, value)
        obj.__dict__[self.__name__] = value

    def __delete__(self, obj: Any) -> None:
        value = obj.__dict__.pop(self.__name__, _MISSING)
        if value is not _MISSING and self.fdel is not None:
            self.fdel(obj, value)

    def setter(self, fset: Callable[[Any, Any], _T]) -> cached_property[_T]:
        """Return a copy that passes assigned values through fset."""
        return type(self)(self.fget, fset, self.fdel)

    def deleter(self, fdel: Callable[[Any, _T], object]) -> cached_property[_T]:
        """Return a copy that gives dropped values to fdel."""
        return type(self)(self.fget, self.fset, fdel)
