"""What the demo asks of the machine: descriptors and memory."""

from __future__ import annotations

import os

__all__ = ["allow_descriptors", "resident_bytes"]


def allow_descriptors(wanted: int) -> int:
    """Raise this process's limit of open descriptors to `wanted` if it may be.

    Processes that are started afterwards, a private broker for instance, have it too.

    Returns:
        The limit that holds now; `wanted` where there is none.
    """
    try:
        import resource
    except ImportError:  # not a POSIX system
        return wanted
    infinity = resource.RLIM_INFINITY
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == infinity or soft >= wanted:
        return wanted if soft == infinity else soft
    # First with the hard limit, which only root may raise, then without.
    attempts = [(wanted, hard if hard == infinity else max(hard, wanted))]
    if hard != infinity:
        attempts.append((min(wanted, hard), hard))
    for attempt in attempts:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, attempt)
        except (ValueError, OSError):
            continue
        return attempt[0]
    return soft


def resident_bytes() -> int | None:
    """Return the resident memory of this process, None where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as statm:
            pages = int(statm.read().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
