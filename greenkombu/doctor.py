"""Say what greenkombu finds on this machine, and what would get in its way."""

from __future__ import annotations

import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

__all__ = ["Finding", "examine", "foreign_hub"]

#: Descriptors below which a program with many connections will run into the limit.
FEW_DESCRIPTORS = 4096
#: Packages whose versions matter to a report of a fault.
PACKAGES = (
    "greenkombu",
    "amqp",
    "gevent",
    "eventlet",
    "greenlet",
    "pika",
    "redis",
    "hiredis",
    "rich",
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        name: what it is.
        value: what was found.
        problem: what is wrong with it and how to mend it; None if nothing is.
    """

    name: str
    value: str
    problem: str | None = None


def examine() -> list[Finding]:
    """Look at everything; opens no connection."""
    return [
        Finding("Python", f"{platform.python_version()} on {platform.system()}"),
        *_environment(),
        *_pollers(),
        _hub_package(),
        _descriptors(),
        *_versions(),
        *_servers(),
    ]


def _environment() -> Iterator[Finding]:
    import hub

    environment = hub.get_environment()
    patched = hub.detect_environment()
    variable = os.environ.get("HUB_ENVIRONMENT")
    yield Finding("environment", environment.name)
    yield Finding("patched for", "nothing" if patched == "default" else patched)
    problem = None
    if patched not in ("default", environment.name):
        problem = (
            f"the process is patched for {patched} and {environment.name} was chosen: waiting will "
            "block the green threads; unset HUB_ENVIRONMENT or call hub.use(None)"
        )
    yield Finding("HUB_ENVIRONMENT", variable or "not set", problem)


def _pollers() -> Iterator[Finding]:
    import hub

    original = hub.get_environment().original
    available = hub.available_pollers(original)
    name = hub.get_hub().poller.name
    problem = None
    if name not in ("epoll", "kqueue"):
        problem = (
            f"the cost of a wake-up by {name} grows with the number of connections; "
            f"available here: {', '.join(available)} (HUB_POLLER chooses)"
        )
    yield Finding("poller", f"{name} (available: {', '.join(available)})", problem)


def foreign_hub() -> str | None:
    """Say what is wrong if the package `hub` that is imported is not greenkombu's.

    Another project on PyPI installs a package of that name, too: over ours, or in a folder that
    comes first.
    """
    ours = Path(__file__).resolve().parents[1] / "hub"
    spec = importlib.util.find_spec("hub")
    found = Path(spec.origin).resolve().parent if spec and spec.origin else None
    if found == ours and (ours / "environment.py").exists() and hasattr(_import_hub(), "get_hub"):
        return None
    return (
        f"the package `hub` in {found or 'no folder'} is not greenkombu's: it belongs to another "
        "project; uninstall that one, or move it behind greenkombu on sys.path, then install "
        "greenkombu again"
    )


def _import_hub() -> object:
    import hub

    return hub


def _hub_package() -> Finding:
    import hub

    others = set(metadata.packages_distributions().get("hub", ())) - {"greenkombu"}
    problem = None
    if others:
        problem = (
            f"{', '.join(sorted(others))} has installed a package `hub` as well, and the one that "
            "was installed last has won: uninstall it, then install greenkombu again"
        )
    return Finding("package hub", str(Path(hub.__file__ or "").parent), problem)


def _descriptors() -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("descriptor limit", "unknown on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    infinity = resource.RLIM_INFINITY
    text = " of ".join("unlimited" if limit == infinity else str(limit) for limit in (soft, hard))
    problem = None
    if soft != infinity and soft < FEW_DESCRIPTORS:
        problem = (
            f"{soft} descriptors are few for many connections, which take one each: "
            "raise the limit with ulimit -n"
        )
    return Finding("descriptor limit", text, problem)


def _versions() -> Iterator[Finding]:
    for package in PACKAGES:
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        yield Finding(package, version)


def _servers() -> Iterator[Finding]:
    """Look for what the demo, and the tests, start for themselves."""
    from greenkombu.utils.private_rabbitmq import find_rabbitmq
    from greenkombu.utils.private_redis import find_redis

    scripts = find_rabbitmq()
    rabbitmq = None if scripts is None else scripts / "rabbitmq-server"
    yield Finding("rabbitmq-server", str(rabbitmq or "not installed"))
    yield Finding("redis-server", find_redis() or "not installed")
