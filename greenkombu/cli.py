"""The command line: ``greenkombu demo``, ``greenkombu doctor``, also as ``python -m greenkombu``.

Arguments are read first and the environment is patched next, before anything else is imported that
patching would miss; then the command runs.  Without ``--environment`` nothing is patched: the
detector of `hub.environment` answers, which is ``default`` in a fresh process unless the variable
HUB_ENVIRONMENT names another one (which is then green without being patched).

Exit status: 0 all well; 1 the command ran and something is wrong; 2 the command cannot run like
this; 130 interrupted.

The bar and the table are drawn by rich, which only this module imports and only when there is
something to draw.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenkombu.demo import Demo, DemoResult
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
    from greenkombu.utils.private_redis import PrivateRedis

__all__ = ["main"]

OK, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130

#: Environment -> the module and function that patch, and the extra that installs it.
_PATCHES = {
    "default": None,
    "gevent": ("gevent.monkey", "patch_all"),
    "eventlet": ("eventlet", "monkey_patch"),
}
#: As --broker: a private server of this kind is started for the run.
_PRIVATE_BROKERS = {"rabbitmq": "RabbitMQ", "redis": "Redis"}


class _UsageError(Exception):
    """The command cannot run like this."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: argparse has answered --help, or refused an argument (status 2).
    """
    given = _parser().parse_args(arguments)
    try:
        _choose_environment(given.environment)
        run: Callable[[argparse.Namespace], int] = given.run
        return run(given)
    except _UsageError as error:
        print(f"greenkombu {given.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        print(f"greenkombu {given.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


# -- arguments -----------------------------------------------------------------------------------


def _at_least(smallest: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < smallest:
            raise argparse.ArgumentTypeError(f"{number} is too small: give {smallest} or more")
        return number

    return convert


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def _parser() -> argparse.ArgumentParser:
    from greenkombu import __version__

    parser = argparse.ArgumentParser(
        prog="greenkombu", description="Kombu's messaging API for programs on green threads."
    )
    parser.add_argument("--version", action="version", version=f"greenkombu {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--environment",
        choices=tuple(_PATCHES),
        help="patch for it first, and use it (default: nothing is patched, and the detector or "
        "HUB_ENVIRONMENT decides)",
    )
    common.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="publish and consume on many connections with one drain loop",
        description="Open many connections with several channels each, consume on all of them from "
        "one drain loop while many green tasks publish, and count every message.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.set_defaults(run=_run_demo)
    demo.add_argument(
        "--broker",
        type=_broker_name,
        default="memory://",
        help=f"a URL, or {_private_names()} to start a private server in a temporary folder",
    )
    demo.add_argument("--connections", type=_at_least(1), default=200, help="that consume")
    demo.add_argument("--channels", type=_at_least(1), default=5, help="of each connection")
    demo.add_argument("--messages", type=_at_least(1), default=20_000, help="in all")
    demo.add_argument("--body-size", type=_at_least(16), default=100, help="bytes of each message")
    demo.add_argument("--publishers", type=_at_least(1), default=50, help="tasks that publish")
    demo.add_argument("--timeout", type=_seconds, default=120.0, help="seconds for the whole run")

    doctor = commands.add_parser(
        "doctor",
        parents=[common],
        help="look at the environment, the poller, the packages and the limits",
        description="Say what greenkombu finds here, and what would get in its way.",
    )
    doctor.set_defaults(run=_run_doctor)
    return parser


def _private_names() -> str:
    return " or ".join(repr(name) for name in _PRIVATE_BROKERS)


def _broker_name(text: str) -> str:
    # A connection takes a bare host name too; here it is a misspelt rabbitmq far more often.
    if text not in _PRIVATE_BROKERS and "://" not in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a URL, such as amqp://guest:guest@localhost//, nor "
            f"{_private_names()}, which starts a private one"
        )
    return text


def _choose_environment(name: str | None) -> None:
    """Patch for the environment and choose it, or let the detector decide."""
    patch = None if name is None else _PATCHES[name]
    if patch is not None:
        import warnings

        module, function = patch
        try:
            with warnings.catch_warnings():
                # eventlet announces its own retirement whenever it is imported.
                warnings.filterwarnings("ignore", message=r"\s*Eventlet is deprecated")
                getattr(importlib.import_module(module), function)()
        except ImportError as error:
            raise _UsageError(
                f"--environment {name} needs the package {name}: "
                f"pip install 'greenkombu[{name}]' ({error})"
            ) from error
    from greenkombu.doctor import foreign_hub

    problem = foreign_hub()
    if problem is not None:
        raise _UsageError(problem)
    import hub

    try:
        if name is None:
            hub.get_environment()
        else:
            hub.use(name)
        hub.get_hub()
    except (hub.UnknownEnvironmentError, hub.UnknownPollerError, hub.UnsupportedError) as error:
        raise _UsageError(str(error)) from error


# -- demo ----------------------------------------------------------------------------------------


def _run_demo(given: argparse.Namespace) -> int:
    import hub
    from greenkombu.demo import Demo, DemoError, DemoOptions
    from greenkombu.exceptions import InvalidURL, TransportNotFound
    from greenkombu.utils.private_rabbitmq import PrivateBrokerError, RabbitMQNotInstalledError
    from greenkombu.utils.private_redis import RedisNotInstalledError
    from greenkombu.utils.url import maybe_sanitize_url

    if not given.json:
        how = "chosen" if given.environment else "detected"
        loop = hub.get_hub()
        broker = maybe_sanitize_url(given.broker)
        print(
            f"environment {loop.environment.name} ({how}), poller {loop.poller.name}, "
            f"broker {broker}, {given.connections} connections with {given.channels} channels each",
            flush=True,
        )
    try:
        with _broker(given) as url:
            options = DemoOptions(
                broker=url,
                connections=given.connections,
                channels=given.channels,
                messages=given.messages,
                body_size=given.body_size,
                publishers=given.publishers,
                timeout=given.timeout,
            )
            with _progress(given.json) as progress:
                demo = Demo(options, progress)
                with _interrupting(demo):
                    result = demo.run()
    except (
        DemoError,
        InvalidURL,
        TransportNotFound,
        RabbitMQNotInstalledError,
        RedisNotInstalledError,
    ) as error:
        raise _UsageError(_text_of(error)) from error
    except PrivateBrokerError as error:
        print(f"greenkombu demo: {error}", file=sys.stderr)
        return WRONG
    if given.json:
        _print_json(result.as_dict())
    elif result.ticks:  # else it did not come to anything that could be told
        _print_table(_demo_rows(result))
    for problem in result.problems:
        print(f"greenkombu demo: {problem}", file=sys.stderr)
    if result.interrupted:
        return INTERRUPTED
    return OK if result.ok else WRONG


def _text_of(error: BaseException) -> str:
    # str() of a KeyError, which some of ours are, would be a repr.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


@contextmanager
def _broker(given: argparse.Namespace) -> Iterator[str]:
    """Give the broker's URL; a private broker lives as long as the block."""
    if given.broker not in _PRIVATE_BROKERS:
        yield given.broker
        return
    from greenkombu.demo.machine import allow_descriptors

    # The server inherits the limit: a descriptor for each connection, some for files and itself.
    allow_descriptors(given.connections + 1000)
    if not given.json:
        kind = _PRIVATE_BROKERS[given.broker]
        print(f"starting a private {kind} in a temporary folder ...", flush=True)
    with _private_server(given) as server:
        yield server.url


def _private_server(given: argparse.Namespace) -> PrivateRabbitMQ | PrivateRedis:
    import hub

    sleep = hub.get_environment().sleep
    if given.broker == "redis":
        from greenkombu.utils.private_redis import PrivateRedis

        # Redis takes 10,000 by default; some are for the publishers and for itself.
        return PrivateRedis(sleep=sleep, settings={"maxclients": str(given.connections + 900)})
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ

    # A connection takes the broker about 100 KiB and a channel with its queue about 60 KiB; above
    # its limit it stops all publishers.
    megabytes = 512 + given.connections * (100 + 60 * given.channels) // 1024
    return PrivateRabbitMQ(sleep=sleep, memory_limit=f"{megabytes}MB")


@contextmanager
def _interrupting(demo: Demo) -> Iterator[None]:
    """Let the first Ctrl-C end the run in good order; the second one is Python's."""
    import signal

    # None: not set by Python, and so not to be restored by it.
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler

    def interrupt(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        demo.interrupt()

    try:
        signal.signal(signal.SIGINT, interrupt)
    except ValueError:  # not in the main thread: somebody else handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _demo_rows(result: DemoResult) -> list[tuple[str, str]]:
    def some(value: float | None, text: str) -> str:
        return "unknown" if value is None else text.format(value)

    p50, p99 = some(result.latency_p50_ms, "{:.1f} ms"), some(result.latency_p99_ms, "{:.1f} ms")
    return [
        ("environment, poller", f"{result.environment}, {result.poller}"),
        ("broker", result.broker),
        ("connections x channels", f"{result.connections} x {result.channels}"),
        ("set up in", f"{result.setup_seconds:.2f} s"),
        ("messages sent", f"{result.sent:,}"),
        ("messages received", f"{result.received:,}"),
        ("rate", some(result.messages_per_second, "{:,.0f} messages/s")),
        ("latency p50 / p99", f"{p50} / {p99}"),
        ("largest slice of the drain loop", f"{result.largest_slice_ms:.1f} ms of CPU time"),
        ("largest slice of the hub", f"{result.largest_hub_slice_ms:.1f} ms"),
        ("memory per connection", some(result.memory_per_connection_kib, "{:.1f} KiB")),
        (
            "another task meanwhile",
            f"ticked {result.ticks:,} times, largest gap {result.largest_tick_gap_ms:.0f} ms",
        ),
        ("result", "every message came once" if result.ok else "NOT all is well, see below"),
    ]


# -- doctor ----------------------------------------------------------------------------------------


def _run_doctor(given: argparse.Namespace) -> int:
    from greenkombu.doctor import examine

    findings = examine()
    if given.json:
        _print_json(
            {
                "findings": {finding.name: finding.value for finding in findings},
                "problems": [finding.problem for finding in findings if finding.problem],
            }
        )
    else:
        _print_table([(finding.name, finding.value) for finding in findings])
        for finding in findings:
            if finding.problem:
                print(f"greenkombu doctor: {finding.problem}", file=sys.stderr)
    return WRONG if any(finding.problem for finding in findings) else OK


# -- output ----------------------------------------------------------------------------------------


def _print_json(data: dict[str, Any]) -> None:
    import json

    print(json.dumps(data))


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            print(f"{name.ljust(width)}  {value}")
        return
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in rows:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)


@contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """Give what draws the progress on stderr; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )
    except ImportError:
        print("pip install 'greenkombu[cli]' for a progress bar", file=sys.stderr)
        yield None
        return
    columns = (
        TextColumn("{task.description:12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # Drawn by the task that watches the run: a thread of rich's own would be one more task.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        tasks: dict[str, Any] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bar.add_task(phase, total=total)
            bar.update(tasks[phase], completed=done, refresh=True)

        yield show
