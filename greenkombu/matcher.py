"""Ways to choose names by a pattern: 'glob' and 'pcre', and those that a program registers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from greenkombu.exceptions import KombuError

__all__ = ["MatcherNotInstalled", "MatcherRegistry", "match", "register", "registry", "unregister"]

Matcher = Callable[..., Any]


class MatcherNotInstalled(KombuError):
    """No matcher of that name is registered."""


class MatcherRegistry:
    """Matchers by name."""

    MatcherNotInstalled: ClassVar[type[Exception]] = MatcherNotInstalled

    #: Matchers that take the pattern as their first argument, as `re.match` does.
    matcher_pattern_first: ClassVar[list[str]] = ["pcre"]

    def __init__(self) -> None:
        self._matchers: dict[str, Matcher] = {}
        self._default_matcher: Matcher | None = None

    def register(self, name: str, matcher: Matcher) -> None:
        """Add a matcher, called as matcher(data, pattern, **matcher_kwargs)."""
        self._matchers[name] = matcher

    def _set_default_matcher(self, name: str) -> None:
        self._default_matcher = self._get(name)

    def unregister(self, name: str) -> None:
        """Remove a matcher.

        Raises:
            MatcherNotInstalled: there is none of that name.
        """
        self._get(name)
        del self._matchers[name]

    def _get(self, name: str) -> Matcher:
        try:
            return self._matchers[name]
        except KeyError:
            known = ", ".join(sorted(self._matchers)) or "none"
            raise self.MatcherNotInstalled(
                f"No matcher installed for {name}; installed: {known}"
            ) from None

    def match(
        self,
        data: str,
        pattern: str,
        matcher: str | None = None,
        matcher_kwargs: Mapping[str, Any] | None = None,
    ) -> bool:
        """Whether *data* matches *pattern*.

        Args:
            matcher: its name; None is the default ('glob').
            matcher_kwargs: more arguments for it.

        Raises:
            MatcherNotInstalled: there is none of that name.
        """
        function = self._default_matcher if matcher is None else self._get(matcher)
        assert function is not None
        arguments = (pattern, data) if matcher in self.matcher_pattern_first else (data, pattern)
        return bool(function(*arguments, **(matcher_kwargs or {})))


#: The registry of the process.
registry = MatcherRegistry()
registry.register("glob", fnmatchcase)
registry.register("pcre", re.match)
registry._set_default_matcher("glob")

match = registry.match
register = registry.register
unregister = registry.unregister
