"""Who is next: cycles over queues and channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, TypeVar

from greenkombu.utils.imports import symbol_by_name

__all__ = [
    "CYCLE_ALIASES",
    "FairCycle",
    "cycle_by_name",
    "priority_cycle",
    "round_robin_cycle",
    "sorted_cycle",
]

_T = TypeVar("_T")

CYCLE_ALIASES = {
    "priority": "greenkombu.utils.scheduling:priority_cycle",
    "round_robin": "greenkombu.utils.scheduling:round_robin_cycle",
    "sorted": "greenkombu.utils.scheduling:sorted_cycle",
}


class FairCycle(Generic[_T]):
    """Get from a set of resources, each of which has an equal chance.

    Args:
        fun: gets from one resource: ``fun(resource, callback, **kwargs)``.
        resources: the resources; may change meanwhile.
        predicate: what fun raises when a resource has nothing.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        resources: Iterable[_T],
        predicate: type[BaseException] = Exception,
    ) -> None:
        self.fun = fun
        self.resources = resources if isinstance(resources, list) else list(resources)
        self.predicate = predicate
        self.pos = 0

    def get(self, callback: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        """Return what fun returns for the next resource that has something.

        Args:
            callback: passed to fun.  Without it, as in Kombu 2, fun is called as
                ``fun(resource, **kwargs)`` and the result is ``(what it returns, resource)``.
            **kwargs: passed to fun.

        Raises:
            BaseException: predicate, as fun raised it, when all resources have nothing.
        """
        resources, fun = self.resources, self.fun
        for tries_left in range(len(resources), 0, -1):
            if not resources:  # emptied by fun
                break
            if self.pos >= len(resources):
                self.pos = 0
            resource = resources[self.pos]
            self.pos += 1
            try:
                if callback is None:
                    return fun(resource, **kwargs), resource
                return fun(resource, callback, **kwargs)
            except self.predicate:
                if tries_left == 1:
                    raise
        raise self.predicate

    def close(self) -> None:
        """Do nothing: the resources are their owner's to close."""

    def __repr__(self) -> str:
        return f"<FairCycle: {self.pos}/{len(self.resources)} {self.resources}>"


class round_robin_cycle:
    """Let each item be first in turn.

    Args:
        it: the items.
    """

    name: ClassVar[str] = "round_robin"

    def __init__(self, it: Iterable[Any] | None = None) -> None:
        self.items: list[Any] = list(it or ())

    def update(self, it: Iterable[Any]) -> None:
        """Replace the items."""
        self.items[:] = it

    def consume(self, n: int) -> list[Any]:
        """Return the first n items."""
        return self.items[:n]

    def rotate(self, last_used: Any) -> Any:
        """Put the item that was used last at the end; an unknown one changes nothing."""
        try:
            self.items.append(self.items.pop(self.items.index(last_used)))
        except ValueError:
            pass
        return last_used


class priority_cycle(round_robin_cycle):
    """Ask the items always in the given order."""

    name = "priority"

    def rotate(self, last_used: Any) -> Any:
        """Change nothing."""
        del last_used


class sorted_cycle(priority_cycle):
    """Ask the items always in sorted order."""

    name = "sorted"

    def consume(self, n: int) -> list[Any]:
        """Return the first n items in sorted order."""
        return sorted(self.items[:n])


def cycle_by_name(name: str | type[round_robin_cycle]) -> type[round_robin_cycle]:
    """Return the cycle class that an alias, a class path or the class itself stands for."""
    cycle: type[round_robin_cycle] = symbol_by_name(name, CYCLE_ALIASES)
    return cycle
