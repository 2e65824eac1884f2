"""Helpers that programs written for Kombu import from here; each lives in a submodule.

Names are resolved at first use (PEP 562), so importing this package imports hardly anything.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# The one name that cannot wait: it is a function and, as in Kombu, the submodule's name too, and
# importing a submodule binds it to the package.  Importing it here first lets the function stay.
from greenkombu.utils.uuid import uuid

if TYPE_CHECKING:
    from greenkombu.utils.collections import EqualityDict
    from greenkombu.utils.compat import fileno, maybe_fileno, nested, register_after_fork
    from greenkombu.utils.div import emergency_dump_state, say
    from greenkombu.utils.functional import (
        fxrange,
        fxrangemax,
        kwdict,
        maybe_list,
        reprcall,
        reprkwargs,
        retry_over_time,
    )
    from greenkombu.utils.imports import symbol_by_name
    from greenkombu.utils.objects import cached_property

__all__ = [
    "EqualityDict",
    "cached_property",
    "emergency_dump_state",
    "fileno",
    "fxrange",
    "fxrangemax",
    "kwdict",
    "maybe_fileno",
    "maybe_list",
    "nested",
    "register_after_fork",
    "reprcall",
    "reprkwargs",
    "retry_over_time",
    "say",
    "symbol_by_name",
    "uuid",
]

_HOMES = {
    "EqualityDict": "collections",
    "cached_property": "objects",
    "emergency_dump_state": "div",
    "fileno": "compat",
    "fxrange": "functional",
    "fxrangemax": "functional",
    "kwdict": "functional",
    "maybe_fileno": "compat",
    "maybe_list": "functional",
    "nested": "compat",
    "register_after_fork": "compat",
    "reprcall": "functional",
    "reprkwargs": "functional",
    "retry_over_time": "functional",
    "say": "div",
    "symbol_by_name": "imports",
}

#: Submodules that programs reach as attributes of the package (``from kombu.utils import json``).
_SUBMODULES = frozenset(
    {
        "collections",
        "compat",
        "debug",
        "div",
        "encoding",
        "eventio",
        "finalize",
        "functional",
        "imports",
        "json",
        "limits",
        "objects",
        "scheduling",
        "text",
        "time",
        "url",
    }
)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_SUBMODULES})
