"""Objects by name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["symbol_by_name"]


def symbol_by_name(
    name: Any,
    aliases: Mapping[str, Any] | None = None,
    imp: Callable[..., Any] | None = None,
    package: str | None = None,
    sep: str = ".",
    default: Any = None,
    **kwargs: Any,
) -> Any:
    """Import the object with the given name.

    Importing runs code: never pass a name that came from a message or from a broker URL.

    Args:
        name: ``"package.module.attribute"`` or ``"package.module:attribute"``; a name without a
            module part is a module; an object that is not a string is returned as it is.
        aliases: short names and what they stand for.
        imp: imports a module by name; importlib.import_module if None.
        package: what relative names (``".module"``) are relative to.
        sep: what stands between module and attribute when there is no colon.
        default: returned when the object cannot be imported, unless None.
        **kwargs: passed to imp.

    Returns:
        The object.

    Raises:
        ValueError: the name cannot be a module's.
        ImportError: there is no such module, and no default.
        AttributeError: the module has no such attribute, and no default.
    """
    if not isinstance(name, str):
        return name
    target = (aliases or {}).get(name) or name
    if not isinstance(target, str):
        return target
    module_name, _, attribute = target.rpartition(":" if ":" in target else sep)
    if not module_name:
        # A bare word: a module, or an attribute of package.
        module_name, attribute = (package, attribute) if package else (attribute, "")
    try:
        try:
            module = (imp or importlib.import_module)(module_name, package=package, **kwargs)
        except ValueError as exc:
            raise ValueError(f"cannot import {name!r}: {exc}").with_traceback(
                sys.exc_info()[2]
            ) from exc
        return getattr(module, attribute) if attribute else module
    except (ImportError, AttributeError):
        if default is None:
            raise
    return default
