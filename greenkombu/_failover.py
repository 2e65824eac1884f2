"""The order in which the brokers of a connection are tried."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ("FailoverStrategy", "failover_strategies", "resolve_strategy", "shufflecycle")

#: From the brokers' URLs to the endless order in which they are tried. The first one that it
#: gives is taken for the broker that the connection starts with.
FailoverStrategy = Callable[[Sequence[str]], Iterable[str]]


def shufflecycle(brokers: Iterable[str]) -> Iterator[str]:
    """Give the brokers for ever, every round in a new order."""
    order = list(brokers)
    while order:
        random.shuffle(order)
        yield from list(order)


failover_strategies: dict[str, FailoverStrategy] = {
    "round-robin": itertools.cycle,
    "shuffle": shufflecycle,
}


def resolve_strategy(strategy: str | FailoverStrategy | None) -> FailoverStrategy:
    """Find a strategy by its name; a function is its own strategy.

    Raises:
        ValueError: there is no strategy of that name.
    """
    if callable(strategy):
        return strategy
    try:
        return failover_strategies[strategy or "round-robin"]
    except KeyError:
        known = ", ".join(sorted(failover_strategies))
        raise ValueError(
            f"no failover strategy is called {strategy!r}; give a function or one of: {known}"
        ) from None
