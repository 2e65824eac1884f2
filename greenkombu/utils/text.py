"""Text: close matches, version strings, regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

__all__ = [
    "escape_regex",
    "fmatch_best",
    "fmatch_iter",
    "version_info_t",
    "version_string_as_tuple",
]


class version_info_t(NamedTuple):
    """A version in parts."""

    major: int
    minor: int
    micro: int
    releaselevel: str
    serial: str


def escape_regex(p: str, white: str = "") -> str:
    """Return p with every character escaped that is not alphanumeric and not in white."""
    return "".join(c if c.isalnum() or c in white else f"\\{c}" for c in p)


def fmatch_iter(
    needle: str, haystack: Iterable[str], min_ratio: float = 0.6
) -> Iterator[tuple[float, str]]:
    """Yield (ratio, word) for the words of haystack that resemble needle.

    Args:
        needle: what was asked for.
        haystack: what there is.
        min_ratio: how much a word must resemble it, from 0 to 1 (equal).

    Yields:
        Pairs in the order of haystack.
    """
    from difflib import SequenceMatcher  # only an error path needs it

    for word in haystack:
        ratio = SequenceMatcher(None, needle, word).ratio()
        if ratio >= min_ratio:
            yield ratio, word


def fmatch_best(needle: str, haystack: Iterable[str], min_ratio: float = 0.6) -> str | None:
    """Return the word of haystack that resembles needle most, or None."""
    best = max(fmatch_iter(needle, haystack, min_ratio), key=lambda pair: pair[0], default=None)
    return None if best is None else best[1]


# The digits of the third part may be followed by a level ("3rc1") or a serial ("3-rc1").
_MICRO = re.compile(r"(\d*)(?:-(?P<serial>.*)|(?P<level>.*))", re.DOTALL)


def version_string_as_tuple(s: str) -> version_info_t:
    """Split a version string into its parts.

    Args:
        s: ``major[.minor[.micro[.releaselevel[.serial]]]]``; micro may carry a level (``3rc1``) or
            a serial (``3-rc1``).

    Returns:
        The parts; 0 and empty text for those that are missing.
    """
    major, minor, micro, level, serial = (*s.split(".", 4), "", "", "", "")[:5]
    match = _MICRO.fullmatch(micro)
    if match is not None:
        micro = match[1]
        level = match["level"] or level
        serial = match["serial"] or serial
    return version_info_t(int(major), int(minor or 0), int(micro or 0), level, serial)
