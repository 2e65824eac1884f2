"""greenkombu.log and greenkombu.utils.debug (behaviours 213-215)."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from greenkombu.log import (
    LOG_LEVELS,
    Log,
    LogMixin,
    get_logger,
    get_loglevel,
    setup_logging,
)
from greenkombu.utils import debug
from greenkombu.utils.debug import Logwrapped
from greenkombu.utils.functional import lazy


class Robot(LogMixin):
    pass


@contextlib.contextmanager
def bare_root() -> Iterator[logging.Logger]:
    """The root logger without handlers (pytest's own too), as in a fresh program."""
    logger = logging.getLogger()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers.clear()
    try:
        yield logger
    finally:
        for handler in logger.handlers:
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.DEBUG)
    return lambda: [(r.name, r.levelname, r.getMessage()) for r in caplog.records]


def test_b214_log_mixin_logs_under_the_class_name(lines: Any) -> None:
    robot = Robot()
    robot.debug("plain")
    robot.info("hello %s %r", "a", "b")
    robot.warn("100 %")
    robot.error(5)
    robot.critical("lazy %s", lazy(lambda: "value"))
    robot.log("INFO", "by name")
    robot.log(25, "%s", "by number")
    assert lines() == [
        ("Robot", "DEBUG", "Robot - plain"),
        ("Robot", "INFO", "Robot - hello a 'b'"),
        ("Robot", "WARNING", "Robot - 100 %"),
        ("Robot", "ERROR", "Robot - 5"),
        ("Robot", "CRITICAL", "Robot - lazy value"),
        ("Robot", "INFO", "Robot - by name"),
        ("Robot", "Level 25", "Robot - by number"),
    ]


def test_b214_annotate_logger_and_levels() -> None:
    robot = Robot()
    assert robot.annotate("x") == "Robot - x"
    assert robot.logger_name == "Robot"
    assert robot.logger is robot.get_logger() is logging.getLogger("Robot")
    robot.logger.setLevel(logging.INFO)
    assert robot.is_enabled_for("INFO")
    assert not robot.is_enabled_for(logging.DEBUG)
    assert robot.get_loglevel("INFO") == 20


def test_what_is_not_logged_is_not_evaluated() -> None:
    robot = Robot()
    robot.logger.setLevel(logging.INFO)

    def fail() -> None:
        raise AssertionError("evaluated")

    robot.debug("%s", lazy(fail))


def test_errors_carry_the_exception_that_is_handled(caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        Robot().error("failed")
    Robot().error("without")
    with_exception, without = caplog.records
    assert with_exception.exc_info is not None
    assert with_exception.exc_info[0] is ValueError
    assert not without.exc_info


def test_log_has_a_name_of_its_own(lines: Any) -> None:
    Log("zz").info("x")
    other = logging.getLogger("other")
    Log("zz", other).info("y")
    assert lines() == [("zz", "INFO", "zz - x"), ("other", "INFO", "zz - y")]


def test_b214_get_loglevel() -> None:
    assert get_loglevel("INFO") == get_loglevel("info") == get_loglevel(20) == 20
    assert LOG_LEVELS["WARN"] == LOG_LEVELS["WARNING"] == 30
    assert LOG_LEVELS[40] == "ERROR"
    with pytest.raises(KeyError):
        get_loglevel("loud")


def test_get_logger_is_silent_unless_configured() -> None:
    logger = get_logger("greenkombu.test.silent")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert get_logger(logger) is get_logger("greenkombu.test.silent") is logger
    assert len(logger.handlers) == 1


def test_b214_setup_logging_does_nothing_twice() -> None:
    stream = io.StringIO()
    with bare_root() as root:
        assert setup_logging("INFO", stream) is root
        first = root.handlers[:]
        setup_logging("DEBUG")
        assert root.handlers == first
        assert root.level == logging.INFO
        root.info("written")
    assert stream.getvalue() == "written\n"


def test_b214_setup_logging_to_a_file(tmp_path: Path) -> None:
    with bare_root() as root:
        setup_logging(logfile=str(tmp_path / "log"))
        assert root.level == logging.ERROR
        root.error("written")
    assert (tmp_path / "log").read_text() == "written\n"


# -- utils.debug -------------------------------------------------------------------------


class Channel:
    channel_id = 3
    prefetch = 5

    def __init__(self) -> None:
        self.entered = 0

    def basic_ack(self, tag: Any, multiple: bool = False) -> Any:
        """Acknowledge."""
        return ("acked", tag, multiple)

    def __enter__(self) -> Channel:
        self.entered += 1
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.entered += 10


def test_b215_logwrapped_logs_calls_with_ident(lines: Any) -> None:
    channel = Logwrapped(Channel(), "greenkombu.test", "[channel:{0.channel_id}] ")
    assert channel.basic_ack(1, multiple=True) == ("acked", 1, True)
    assert lines() == [("greenkombu.test", "DEBUG", "[channel:3] basic_ack(1, multiple=True)")]


def test_b215_logwrapped_forwards_everything() -> None:
    inner = Channel()
    wrapped: Any = Logwrapped(inner)
    assert wrapped.prefetch == 5
    wrapped.prefetch = 7
    assert inner.prefetch == 7
    del wrapped.prefetch
    assert wrapped.prefetch == 5
    assert isinstance(wrapped, Channel)
    assert isinstance(wrapped, Logwrapped)
    assert wrapped.basic_ack.__doc__ == "Acknowledge."
    assert repr(wrapped) == repr(inner)
    assert dir(wrapped) == dir(inner)
    with wrapped as entered:
        assert entered is wrapped
    assert inner.entered == 11
    with pytest.raises(AttributeError):
        wrapped.nothing  # noqa: B018


def test_debug_setup_logging_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    name = "greenkombu.test.setup"
    debug.setup_logging("INFO", [name])
    debug.setup_logging("INFO", [name])
    logger = logging.getLogger(name)
    try:
        logger.info("once")
        assert capsys.readouterr().err == "once\n"
    finally:
        logger.handlers.clear()


SCRIPT = """
import logging, sys
from greenkombu.utils import debug
if "configured" in sys.argv:
    logging.basicConfig(level=1, stream=sys.stderr, format="%(name)s: %(message)s")
class Channel:
    channel_id = 1
    def close(self): pass
logger = debug.connection_logger()
if logger: logger.debug("connecting")
channel = debug.log_channel_calls(Channel())
channel.close()
logging.getLogger("somebody.else").debug("not asked for")
"""


def run(*arguments: str, **environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KOMBU_LOG")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        env={**clean, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done.stderr


def test_b213_nothing_is_logged_by_default() -> None:
    assert run() == ""


def test_b213_kombu_log_channel_logs_channel_calls() -> None:
    assert run("configured", KOMBU_LOG_CHANNEL="1") == (
        "greenkombu.channel: [Kombu channel:1] close()\nsomebody.else: not asked for\n"
    )


def test_b213_kombu_log_connection_logs_connection_actions() -> None:
    assert run("configured", KOMBU_LOG_CONNECTION="1") == (
        "greenkombu.connection: connecting\nsomebody.else: not asked for\n"
    )


def test_b213_kombu_log_debug_does_both_and_writes_to_standard_error() -> None:
    assert run(KOMBU_LOG_DEBUG="1") == "connecting\n[Kombu channel:1] close()\n"
