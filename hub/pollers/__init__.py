"""Pollers: which of many descriptors can be read or written now.

`create_poller()` makes the best one that the platform has, or the one that is named by its
argument or by the variable `HUB_POLLER`.  All keep one contract, `hub.pollers.base.Poller`.
"""

from __future__ import annotations

import difflib
import os

from hub.errors import UnknownPollerError, UnsupportedError
from hub.pollers.base import MAX_EVENTS, READ, WRITE, Original, Poller, unpatched
from hub.pollers.epoll import EpollPoller
from hub.pollers.kqueue import KqueuePoller
from hub.pollers.poll import PollPoller
from hub.pollers.select import SelectPoller

__all__ = [
    "DEFAULT_POLLERS",
    "MAX_EVENTS",
    "POLLERS",
    "READ",
    "WRITE",
    "EpollPoller",
    "KqueuePoller",
    "PollPoller",
    "Poller",
    "SelectPoller",
    "available_pollers",
    "create_poller",
]

#: The registry: name -> class.  Another poller is added by an entry here.
POLLERS: dict[str, type[Poller]] = {
    poller.name: poller for poller in (EpollPoller, KqueuePoller, PollPoller, SelectPoller)
}

#: Best first: those whose cost is flat, then the one without a limit of descriptors.
DEFAULT_POLLERS: tuple[str, ...] = ("epoll", "kqueue", "poll", "select")


def available_pollers(original: Original = unpatched) -> list[str]:
    """Return the names of the pollers that this platform has, best first.

    Args:
        original: returns the unpatched object of a module; see `Poller`.
    """
    names = [*DEFAULT_POLLERS, *(name for name in POLLERS if name not in DEFAULT_POLLERS)]
    return [name for name in names if POLLERS[name].available(original)]


def create_poller(name: str | None = None, original: Original = unpatched) -> Poller:
    """Make a poller.

    Args:
        name: "epoll", "kqueue", "poll" or "select"; None takes the variable HUB_POLLER,
            and the best one available if that is not set or empty.
        original: returns the unpatched object of a module; see `Poller`.

    Raises:
        UnknownPollerError: there is no poller of that name.
        UnsupportedError: there is, but not on this platform.
    """
    source = ""
    if name is None:
        name = os.environ.get("HUB_POLLER") or None
        source = " in the variable HUB_POLLER"
    if name is None:
        names = available_pollers(original)
        if not names:
            raise UnsupportedError(
                "this platform has no poller at all: neither epoll, kqueue, poll nor select is "
                "in the select module, or patching hid them; pass the environment's original"
            )
        name = names[0]
    try:
        kind = POLLERS[name]
    except (KeyError, TypeError):
        close = difflib.get_close_matches(str(name).lower(), POLLERS, n=1)
        guess = f"; did you mean {close[0]!r}?" if close else ";"
        raise UnknownPollerError(
            f"unknown poller {name!r}{source}{guess} "
            f"available here: {', '.join(available_pollers(original))}"
        ) from None
    return kind(original)
