"""Bases of the declarations: objects with a list of attributes, and binding to a channel.

A declaration is plain data until it is bound.  Binding gives a *copy* that knows its
channel; the original stays unbound and can be shared, pickled and bound again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from greenkombu.exceptions import ArgumentError, NotBoundError

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["MaybeChannelBound", "Object", "unpickle_dict"]

_ObjectT = TypeVar("_ObjectT", bound="Object")

Attributes = tuple[tuple[str, Callable[[Any], Any] | None], ...]


def _maybe_channel(channel: Any) -> Any:
    # Not `from ... import`, which asks a module with a __getattr__ for its __path__ first.
    import greenkombu.connection as connections

    return connections.maybe_channel(channel)


def unpickle_dict(cls: type[_ObjectT], kwargs: dict[str, Any]) -> _ObjectT:
    """Rebuild an object from its attributes."""
    return cls(**kwargs)


class Object:
    """An object described by `attrs`: (name, conversion or None) pairs.

    Keyword arguments set them, converted; what is not given (or None) keeps the class's
    value, or becomes None.  Unknown keywords are ignored, as Kombu ignores them.

    Raises:
        ArgumentError: (also a ValueError) a value cannot be converted.
    """

    attrs: ClassVar[Attributes] = ()

    # `attrs` as a dict, and what it was made from: it is looked through for each object otherwise,
    # of which a program may make thousands, with two or three of two dozen attributes given.
    _conversions: ClassVar[dict[str, Callable[[Any], Any] | None]] = {}
    _converted: ClassVar[Attributes] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self._converted is not self.attrs:
            self._prepare()
        conversions = self._conversions
        for name, value in kwargs.items():
            if value is None or name not in conversions:
                continue
            convert = conversions[name]
            try:
                setattr(self, name, value if convert is None else convert(value))
            except (TypeError, ValueError) as exc:
                raise ArgumentError(
                    f"{name} of a {type(self).__name__} cannot be {value!r:.100}: {exc}"
                ) from None

    @classmethod
    def _prepare(cls) -> None:
        """Give the class a value, None, for each attribute that has none."""
        for name, _ in cls.attrs:
            if not hasattr(cls, name):
                setattr(cls, name, None)
        cls._conversions = dict(cls.attrs)
        cls._converted = cls.attrs

    def as_dict(self, recurse: bool = False) -> dict[str, Any]:
        """Return the attributes as a new dict.

        Args:
            recurse: also turn the objects in it into dicts, so that it can be dumped.
        """

        def plain(value: Any, convert: Callable[[Any], Any] | None) -> Any:
            if recurse and isinstance(value, Object):
                return value.as_dict(recurse=True)
            if convert is not None and value is not None:
                value = convert(value)
            if recurse and isinstance(value, (list, tuple)):
                return [plain(item, None) for item in value]
            return value

        return {name: plain(getattr(self, name), convert) for name, convert in self.attrs}

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickle_dict, (type(self), self.as_dict())

    def __copy__(self) -> Self:
        # Attribute by attribute rather than through __init__: a subclass may take other arguments.
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied


class MaybeChannelBound(Object):
    """Mixin for declarations that can be bound to a channel."""

    _channel: Any = None
    _is_bound: bool = False

    #: Whether `maybe_declare` may skip a second declaration on the same connection.
    can_cache_declaration: bool = False

    def __call__(self, channel: Any) -> Self:
        """Same as `bind`."""
        return self.bind(channel)

    def bind(self, channel: Any) -> Self:
        """Return a copy bound to *channel* (or to the default channel of a connection)."""
        return self._copy_bound_to(_maybe_channel(channel))

    def maybe_bind(self, channel: Any) -> Self:
        """Bind this object itself, unless it is bound or *channel* is None; return it."""
        if channel is None or self._is_bound:
            return self
        return self._bound_to(_maybe_channel(channel))

    def __copy__(self) -> Self:
        copied = super().__copy__()
        copied.__dict__.pop("_channel", None)
        copied.__dict__.pop("_is_bound", None)
        return copied

    def _copy_bound_to(self, channel: Any) -> Self:
        return self.__copy__()._bound_to(channel)

    def _bound_to(self, channel: Any) -> Self:
        self._channel = channel
        self._is_bound = True
        self.when_bound()
        return self

    def revive(self, channel: Any) -> None:
        """Move to another channel, after a connection was established again."""
        if self._is_bound:
            self._channel = channel
            self.when_bound()

    def when_bound(self) -> None:
        """Called after binding and reviving, for subclasses."""

    @property
    def is_bound(self) -> bool:
        """Whether it is bound to a channel."""
        return self._is_bound and self._channel is not None

    @property
    def channel(self) -> Any:
        """The channel it is bound to.

        Raises:
            NotBoundError: it is not bound.
        """
        return self._channel_for("method")

    def _channel_for(self, operation: str, channel: Any = None) -> Any:
        """Return *channel*, else the one it is bound to, to carry out *operation*."""
        if channel is None:
            channel = self._channel
            if channel is None:
                name = type(self).__name__
                raise NotBoundError(
                    f"Can't call {operation} on {name} not bound to a channel: {self!r}; "
                    f"bind it first: entity(channel).{operation}(...)"
                )
        # A producer on a connection binds lazily: the stand-in becomes a channel when used.
        resolve = getattr(type(channel), "__resolve_channel__", None)
        return channel if resolve is None else resolve(channel)

    def _repr_entity(self, item: str = "") -> str:
        item = item or type(self).__name__
        if self.is_bound:
            channel = self._channel
            number = getattr(channel, "channel_id", None)
            return f"<{item} bound to chan:{number if number is not None else '-'}>"
        return f"<unbound {item}>"
