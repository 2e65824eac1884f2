"""Run pytest in one environment: ``python -m tests.run ENV [--] [pytest arguments]``.

Green threads must be patched before anything else is imported, pytest included; a plugin or a
conftest comes too late for that. So each environment has its own process, and this module, which
imports nothing that matters, patches first and imports pytest afterwards.

=================  ===============================================================================
default            plain threads
gevent             ``gevent.monkey.patch_all()`` before everything else
eventlet           ``eventlet.monkey_patch()`` before everything else
gevent-unpatched   gevent is imported, nothing is patched, ``hub.use("gevent")`` selects it
gevent-late        ``hub`` and ``greenkombu`` are imported first, then gevent patches
=================  ===============================================================================

The patched environments set nothing: that ``hub`` detects them is part of what is tested. The exit
status is pytest's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

__all__ = ["ENVIRONMENTS", "main"]

#: Tells conftest and subprocess tests which environment this process was started for.
VARIABLE = "GREENKOMBU_TEST_ENVIRONMENT"


def _default() -> str:
    return "nothing patched"


def _gevent() -> str:
    from gevent import monkey

    monkey.patch_all()
    return _describe_gevent()


def _eventlet() -> str:
    import warnings

    with warnings.catch_warnings():
        # Only eventlet's announcement that it is no longer developed; its category is its own.
        warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
        import eventlet

        eventlet.monkey_patch()
        hub = type(eventlet.hubs.get_hub()).__module__.rpartition(".")[2]
    return f"eventlet {eventlet.__version__} on {hub}"


def _gevent_unpatched() -> str:
    import gevent  # noqa: F401 - being imported is what makes the program a gevent program

    import hub

    hub.use("gevent")
    return f"{_describe_gevent()}, nothing patched"


def _gevent_late() -> str:
    import greenkombu  # noqa: F401 - imported before patching, on purpose
    import hub  # noqa: F401

    return f"{_gevent()}, patched after our import"


def _describe_gevent() -> str:
    import gevent

    return f"gevent {gevent.__version__} on {type(gevent.get_hub().loop).__module__}"


ENVIRONMENTS: dict[str, Callable[[], str]] = {
    "default": _default,
    "gevent": _gevent,
    "eventlet": _eventlet,
    "gevent-unpatched": _gevent_unpatched,
    "gevent-late": _gevent_late,
}


def main(arguments: Sequence[str]) -> int:
    """Prepare the named environment and run pytest in this process.

    Args:
        arguments: the environment's name, an optional ``--``, then pytest's own arguments.

    Returns:
        pytest's exit status, or 2 when the environment is unknown.
    """
    if not arguments or arguments[0] not in ENVIRONMENTS:
        names = "|".join(ENVIRONMENTS)
        print(f"usage: python -m tests.run {names} [--] [pytest arguments]", file=sys.stderr)
        return 2
    name, *rest = arguments
    if rest[:1] == ["--"]:
        del rest[0]
    os.environ[VARIABLE] = name
    detail = ENVIRONMENTS[name]()
    version = ".".join(map(str, sys.version_info[:3]))
    print(f"environment {name}: {detail}, Python {version}", flush=True)

    import pytest

    return int(pytest.main(rest))


def _leave(status: int) -> None:
    """Exit with status, by force when a forgotten thread would keep the process for ever."""
    import threading

    left = [
        thread
        for thread in threading.enumerate()
        if thread is not threading.current_thread()
        and thread.is_alive()
        and not thread.daemon
        # gevent and eventlet list a green thread that asked for its name as a dummy thread.
        and not isinstance(thread, threading._DummyThread)  # type: ignore[attr-defined]
    ]
    if not left:
        sys.exit(status)
    import atexit

    names = ", ".join(thread.name for thread in left)
    print(f"these threads still run and are abandoned: {names}", file=sys.stderr)
    atexit._run_exitfuncs()  # os._exit() skips them, and coverage saves its data in one
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 1)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
