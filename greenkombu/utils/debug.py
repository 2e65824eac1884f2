"""Seeing what a program does with its broker.

Three environment variables switch logging on without a change to the program:

======================  ==========================================================================
``KOMBU_LOG_CONNECTION``  connection actions go to the logger ``greenkombu.connection``, at DEBUG
``KOMBU_LOG_CHANNEL``     every channel method call goes to ``greenkombu.channel``, at DEBUG
``KOMBU_LOG_DEBUG``       both, and the root logger writes to standard error
======================  ==========================================================================

They are read when a connection or channel is made, not at import.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from greenkombu.log import get_logger
from greenkombu.utils.functional import reprcall

__all__ = [
    "CHANNEL_LOGGER",
    "CONNECTION_LOGGER",
    "Logwrapped",
    "connection_logger",
    "log_channel_calls",
    "setup_logging",
]

CONNECTION_LOGGER = "greenkombu.connection"
CHANNEL_LOGGER = "greenkombu.channel"

_configured = False


def setup_logging(loglevel: int | str | None = logging.DEBUG, loggers: Any = None) -> None:
    """Let loggers write to standard error.

    Args:
        loglevel: their level, a number or a name; None leaves it.
        loggers: names of loggers; by default those of connections and channels.
    """
    names: Iterable[str] = loggers or (CONNECTION_LOGGER, CHANNEL_LOGGER)
    for name in names:
        logger = get_logger(name)
        if not any(type(handler) is logging.StreamHandler for handler in logger.handlers):
            logger.addHandler(logging.StreamHandler())
        if loglevel is not None:
            logger.setLevel(loglevel)


def _wanted(variable: str) -> bool:
    if os.environ.get("KOMBU_LOG_DEBUG"):
        _configure_root()
        return True
    return bool(os.environ.get(variable))


def _configure_root() -> None:
    global _configured
    if _configured:
        return
    _configured = True
    if not logging.root.handlers:
        logging.root.addHandler(logging.StreamHandler())
    # Only our loggers are turned up: the program's other libraries were not asked about.
    for name in (CONNECTION_LOGGER, CHANNEL_LOGGER):
        get_logger(name).setLevel(logging.DEBUG)


def connection_logger() -> logging.Logger | None:
    """Return the logger for connection actions if they are to be logged, else None."""
    if _wanted("KOMBU_LOG_CONNECTION"):
        return get_logger(CONNECTION_LOGGER)
    return None


def log_channel_calls(channel: Any) -> Any:
    """Return channel, inside a `Logwrapped` if channel calls are to be logged."""
    if _wanted("KOMBU_LOG_CHANNEL"):
        ident = "[Kombu channel:{0.channel_id}] "
        return Logwrapped(channel, get_logger(CHANNEL_LOGGER), ident)
    return channel


class Logwrapped:
    """Stand for an object and log every call of its methods, at DEBUG.

    Everything else is the object's: attributes read, set and deleted, isinstance(), ``with``.

    Args:
        instance: the object.
        logger: where to log: a logger or its name; by default that of channels.
        ident: how a log line begins; formatted with the object as ``{0}``.
    """

    def __init__(
        self,
        instance: Any,
        logger: logging.Logger | str | None = None,
        ident: str | None = None,
    ) -> None:
        own = self.__dict__
        own["instance"] = instance
        own["logger"] = get_logger(logger or CHANNEL_LOGGER)
        own["ident"] = ident

    def __getattr__(self, key: str) -> Any:
        value = getattr(self.instance, key)
        if not callable(value) or isinstance(value, type):
            return value
        return self._logged(key, value)

    def _logged(self, key: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method, updated=())
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.logger.isEnabledFor(logging.DEBUG):
                ident = self.ident.format(self.instance) if self.ident else ""
                self.logger.debug("%s%s", ident, reprcall(key, args, kwargs))
            return method(*args, **kwargs)

        return call

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self.instance, key, value)

    def __delattr__(self, key: str) -> None:
        delattr(self.instance, key)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.instance)

    def __enter__(self) -> Any:
        self.instance.__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> Any:
        return self.instance.__exit__(*exc_info)

    def __dir__(self) -> list[str]:
        return dir(self.instance)

    def __repr__(self) -> str:
        return repr(self.instance)
