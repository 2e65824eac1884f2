"""Loggers, their levels, and a mixin that logs under the class's name."""

from __future__ import annotations

import logging
import sys
from logging.handlers import WatchedFileHandler
from typing import Any, TextIO

from greenkombu.utils.encoding import safe_str
from greenkombu.utils.functional import maybe_evaluate
from greenkombu.utils.objects import cached_property

__all__ = ["LOG_LEVELS", "Log", "LogMixin", "get_logger", "get_loglevel", "setup_logging"]

#: Numbers by name, and names by number.
LOG_LEVELS: dict[Any, Any] = {
    "CRITICAL": logging.CRITICAL,
    "FATAL": logging.FATAL,
    "ERROR": logging.ERROR,
    "WARN": logging.WARNING,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "DEBUG": logging.DEBUG,
    "NOTSET": logging.NOTSET,
    logging.CRITICAL: "CRITICAL",
    logging.ERROR: "ERROR",
    logging.WARNING: "WARNING",
    logging.INFO: "INFO",
    logging.DEBUG: "DEBUG",
    logging.NOTSET: "NOTSET",
}


def get_logger(logger: str | logging.Logger) -> logging.Logger:
    """Return the logger of that name; it is silent unless the program configures logging.

    Args:
        logger: a name, or a logger, which is returned.
    """
    if isinstance(logger, str):
        logger = logging.getLogger(logger)
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger


def get_loglevel(level: int | str) -> int:
    """Return the number of a level.

    Args:
        level: the number, or the name in any case.

    Raises:
        KeyError: there is no level of that name.
    """
    if isinstance(level, str):
        number: int = LOG_LEVELS[level.upper()]
        return number
    return level


def setup_logging(
    loglevel: int | str | None = None, logfile: str | TextIO | None = None
) -> logging.Logger:
    """Let the root logger write somewhere, unless it does so already.

    Args:
        loglevel: its level; ERROR if None.
        logfile: path of a file, or a stream; standard error if None.

    Returns:
        The root logger; untouched if it had a handler.
    """
    root = logging.getLogger()
    if not root.handlers:
        root.setLevel(get_loglevel(loglevel or "ERROR"))
        if isinstance(logfile, str):
            root.addHandler(WatchedFileHandler(logfile))
        else:
            root.addHandler(logging.StreamHandler(logfile or sys.stderr))
    return root


class LogMixin:
    """Methods to log with, under the name of the class."""

    def debug(self, *args: Any, **kwargs: Any) -> None:
        """Log at DEBUG."""
        self.log(logging.DEBUG, *args, **kwargs)

    def info(self, *args: Any, **kwargs: Any) -> None:
        """Log at INFO."""
        self.log(logging.INFO, *args, **kwargs)

    def warn(self, *args: Any, **kwargs: Any) -> None:
        """Log at WARNING."""
        self.log(logging.WARNING, *args, **kwargs)

    def error(self, *args: Any, **kwargs: Any) -> None:
        """Log at ERROR, with the traceback of the exception that is being handled."""
        self._log_with_traceback(logging.ERROR, *args, **kwargs)

    def critical(self, *args: Any, **kwargs: Any) -> None:
        """Log at CRITICAL, with the traceback of the exception that is being handled."""
        self._log_with_traceback(logging.CRITICAL, *args, **kwargs)

    def _log_with_traceback(self, severity: int, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("exc_info", sys.exc_info()[0] is not None)
        self.log(severity, *args, **kwargs)

    def log(self, severity: int | str, *args: Any, **kwargs: Any) -> None:
        """Log a message.

        Args:
            severity: its level, a number or a name.
            *args: a text with %-formats and what they stand for; or one value to be shown.  A
                `lazy` is evaluated, only if the message is really logged.
            **kwargs: those of logging.Logger.log.
        """
        level = get_loglevel(severity)
        if not self.logger.isEnabledFor(level):
            return
        message, *values = args or ("",)
        if values and isinstance(message, str):
            evaluated = [maybe_evaluate(value) for value in values]
            self.logger.log(level, self.annotate(message), *evaluated, **kwargs)
        else:
            # "%s": the text is a value here, its own percent signs mean nothing.
            text = " ".join(safe_str(maybe_evaluate(value)) for value in args)
            self.logger.log(level, "%s", self.annotate(text), **kwargs)

    def get_logger(self) -> logging.Logger:
        """Return the logger to use."""
        return get_logger(self.logger_name)

    def get_loglevel(self, level: int | str) -> int:
        """Return the number of a level."""
        return get_loglevel(level)

    def is_enabled_for(self, level: int | str) -> bool:
        """Tell whether messages of that level are logged."""
        return self.logger.isEnabledFor(self.get_loglevel(level))

    def annotate(self, text: Any) -> str:
        """Return text with the name of the logger before it."""
        return f"{self.logger_name} - {text}"

    @cached_property
    def logger(self) -> logging.Logger:
        """The logger to use."""
        return self.get_logger()

    @property
    def logger_name(self) -> str:
        """The name of the logger: that of the class."""
        return type(self).__name__


class Log(LogMixin):
    """A `LogMixin` of its own.

    Args:
        name: name of the logger.
        logger: the logger to use; by default the one of that name.
    """

    def __init__(self, name: str, logger: str | logging.Logger | None = None) -> None:
        self._logger_name = name
        self._logger = logger

    def get_logger(self) -> logging.Logger:
        """Return the logger to use."""
        return get_logger(self._logger or self.logger_name)

    @property
    def logger_name(self) -> str:
        """The name of the logger."""
        return self._logger_name
