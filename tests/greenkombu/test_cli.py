"""The command line: what it prints, its exit status, and the job that the demo does."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest

from greenkombu.demo import Demo, DemoError, DemoOptions
from greenkombu.demo.ledger import HEADER_SIZE, Ledger
from greenkombu.demo.machine import allow_descriptors
from greenkombu.utils.private_rabbitmq import find_rabbitmq
from greenkombu.utils.private_redis import find_redis
from tests.support.patched import ROOT, complaints
from tests.support.ports import free_port
from tests.support.rabbitmq import require_rabbitmq
from tests.support.redis import require_redis

if TYPE_CHECKING:
    from greenkombu.utils.private_rabbitmq import PrivateRabbitMQ
    from greenkombu.utils.private_redis import PrivateRedis
    from hub.environment import Environment

ENVIRONMENT = os.environ.get("GREENKOMBU_TEST_ENVIRONMENT", "default").partition("-")[0]

SMALL = ("--connections", "5", "--channels", "2", "--messages", "200", "--publishers", "8")

# What a program that reads the JSON relies on.
KEYS = {
    "body_size",
    "broker",
    "channels",
    "connections",
    "duplicates",
    "environment",
    "interrupted",
    "largest_hub_slice_ms",
    "largest_slice_ms",
    "largest_tick_gap_ms",
    "latency_p50_ms",
    "latency_p99_ms",
    "memory_per_connection_kib",
    "messages",
    "messages_per_second",
    "ok",
    "poller",
    "problems",
    "publishers",
    "received",
    "seconds",
    "sent",
    "setup_seconds",
    "ticks",
}


def run_command(
    *arguments: str,
    python: Sequence[str] = ("-m", "greenkombu"),
    timeout: float = 60.0,
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *python, *arguments],
        cwd=ROOT,
        env=os.environ | variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_demo(*arguments: str, timeout: float = 60.0) -> dict[str, Any]:
    """Run the demo in the environment of this run; return its JSON."""
    done = run_command("demo", "--json", "--environment", ENVIRONMENT, *arguments, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    # Nothing but the object, and no warning of having been patched too late.
    assert complaints(done.stderr) == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def read_terminal(reader: int) -> bytes:
    """Read what was written to a pseudo-terminal; nothing when the last writer has closed it."""
    try:
        return os.read(reader, 65536)
    except OSError:  # Linux: EIO
        return b""


def check(answer: dict[str, Any], messages: int) -> None:
    assert answer.keys() == KEYS
    assert answer["sent"] == answer["received"] == answer["messages"] == messages
    assert answer["duplicates"] == 0
    assert answer["problems"] == []
    assert answer["ok"] is True
    assert answer["interrupted"] is False
    assert answer["environment"] == ENVIRONMENT
    assert answer["messages_per_second"] > 0
    assert 0 < answer["latency_p50_ms"] <= answer["latency_p99_ms"]
    # CPU time of the drain loop, which a busy machine does not lengthen.
    assert 0 < answer["largest_slice_ms"] < 20


class TestDemo:
    def test_every_message_comes_once(self) -> None:
        answer = run_demo(*SMALL, "--body-size", "1000")
        check(answer, 200)
        assert (answer["connections"], answer["channels"]) == (5, 2)
        assert answer["body_size"] == 1000
        assert answer["poller"] in ("epoll", "kqueue", "poll", "select")

    def test_fewer_messages_than_publishers_and_queues(self) -> None:
        check(run_demo(*SMALL[:4], "--messages", "3"), 3)

    def test_it_prints_what_it_chose_and_a_table(self) -> None:
        done = run_command("demo", "--environment", ENVIRONMENT, *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"environment {ENVIRONMENT} (chosen), poller ")
        for text in ("messages sent", "messages received", "latency p50 / p99", "per connection"):
            assert text in done.stdout

    def test_without_a_choice_the_detector_answers(self) -> None:
        done = run_command("demo", *SMALL, HUB_ENVIRONMENT=ENVIRONMENT)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.startswith(f"environment {ENVIRONMENT} (detected), poller ")

    def test_without_rich_the_table_is_plain(self) -> None:
        source = "import sys; sys.modules['rich'] = None; from greenkombu.cli import main; main()"
        done = run_command("demo", *SMALL, python=("-c", source))
        assert re.search(r"^messages received +200$", done.stdout, re.MULTILINE)
        assert "┌" not in done.stdout

    def test_rich_is_not_imported_for_json(self) -> None:
        source = (
            "import sys; from greenkombu.cli import main; assert main() == 0; "
            "assert not any(name.partition('.')[0] == 'rich' for name in sys.modules)"
        )
        done = run_command("demo", "--json", *SMALL, python=("-c", source))
        assert done.returncode == 0, done.stderr

    def test_a_terminal_gets_a_progress_bar(self) -> None:
        reader, terminal = pty.openpty()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "greenkombu", "demo", *SMALL],
                cwd=ROOT,
                env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
                stdout=subprocess.PIPE,
                stderr=terminal,
                timeout=60,
                check=False,
            )
            drawn = os.read(reader, 65536).decode()
        finally:
            os.close(reader)
            os.close(terminal)
        assert done.returncode == 0
        assert "connections" in drawn
        assert "200/200" in drawn

    def test_on_rabbitmq(self, rabbitmq_vhost: str) -> None:
        answer = run_demo(
            *("--broker", rabbitmq_vhost, "--connections", "20", "--messages", "2000"),
            timeout=100,
        )
        check(answer, 2000)
        assert answer["channels"] == 5
        assert "guest:**@" in answer["broker"]
        assert answer["ticks"] > 0

    def test_a_thousand_connections(self, rabbitmq_vhost: str) -> None:
        """About 3 s of CPU time here and 6 s in the broker."""
        if allow_descriptors(2000) < 2000:
            pytest.skip("the limit of descriptors is below 2000")
        answer = run_demo(
            *("--broker", rabbitmq_vhost, "--connections", "1000", "--channels", "1"),
            *("--messages", "3000", "--timeout", "90"),
            timeout=110,
        )
        check(answer, 3000)
        assert answer["connections"] == 1000
        # It ticks every 5 ms: the others were never locked out for long. The machine may have been.
        assert answer["ticks"] > 20
        assert answer["largest_tick_gap_ms"] < 3000

    def test_on_redis(self, redis: PrivateRedis) -> None:
        answer = run_demo(
            *("--broker", redis.database_url(9), "--connections", "20", "--messages", "2000"),
            timeout=100,
        )
        check(answer, 2000)
        assert answer["broker"] == redis.database_url(9)
        # What stays goes by itself: how long clients take a message for being worked on.
        left = redis.command("KEYS", "*", database=9)
        assert all(redis.command("TTL", key, database=9) > 0 for key in left), left

    def test_on_a_private_redis(self) -> None:
        require_redis()
        answer = run_demo(
            *("--broker", "redis", "--connections", "5", "--messages", "100"),
            timeout=100,
        )
        check(answer, 100)
        assert answer["broker"].startswith("redis://127.0.0.1:")

    @pytest.mark.slow
    @pytest.mark.watchdog(400)
    def test_a_thousand_connections_on_a_private_rabbitmq(self) -> None:
        require_rabbitmq()
        if allow_descriptors(2000) < 2000:
            pytest.skip("the limit of descriptors is below 2000")
        answer = run_demo(
            *("--broker", "rabbitmq", "--connections", "1000", "--timeout", "250"),
            timeout=350,
        )
        check(answer, 20_000)
        assert answer["connections"] == 1000
        # It ticks every 5 ms: the others were never locked out for long. The machine may have been.
        assert answer["ticks"] > 20
        assert answer["largest_tick_gap_ms"] < 3000


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "variables", "told"),
        [
            (["--connections", "0"], {}, "give 1 or more"),
            (["--channels", "many"], {}, "not a whole number"),
            (["--messages", "-1"], {}, "give 1 or more"),
            (["--body-size", "15"], {}, "give 16 or more"),
            (["--body-size", "1000000000000"], {}, "give 134217728 or less"),
            (["--timeout", "nan"], {}, "not a number of seconds above 0"),
            (["--environment", "tornado"], {}, "invalid choice: 'tornado'"),
            (["--broker", "ampq://"], {}, "amqp"),
            (["--broker", "rabitmq"], {}, "neither a URL"),
            (["--broker", "memory://a:b/c:d"], {}, "port"),
            ([], {"HUB_POLLER": "epol"}, "did you mean 'epoll'"),
            ([], {"HUB_ENVIRONMENT": "gevnt"}, "did you mean 'gevent'"),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, list) else "",
    )
    def test_what_makes_no_sense_is_refused(
        self, arguments: list[str], variables: dict[str, str], told: str
    ) -> None:
        done = run_command("demo", *arguments, **variables)
        assert done.returncode == 2, done.stdout + done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr

    def test_a_command_is_needed(self) -> None:
        done = run_command()
        assert done.returncode == 2
        assert "COMMAND" in done.stderr

    @pytest.mark.parametrize("package", ["gevent", "eventlet"])
    def test_an_environment_that_is_not_installed(self, package: str) -> None:
        source = (
            f"import sys; sys.modules[{package!r}] = sys.modules['{package}.monkey'] = None; "
            "from greenkombu.cli import main; sys.exit(main())"
        )
        done = run_command("demo", "--environment", package, python=("-c", source))
        assert done.returncode == 2
        assert f"pip install 'greenkombu[{package}]'" in done.stderr

    def test_a_broker_that_does_not_answer(self) -> None:
        port = free_port()
        done = run_command(
            "demo", "--broker", f"amqp://guest:sesame@127.0.0.1:{port}//", "--timeout", "20"
        )
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr
        assert "sesame" not in done.stderr + done.stdout
        assert "Traceback" not in done.stderr

    def test_the_package_hub_of_another_project_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "__init__.py").write_text("name = 'of another project'\n")
        source = (
            f"import sys; sys.path.insert(0, {str(tmp_path)!r}); "
            "from greenkombu.cli import main; sys.exit(main())"
        )
        done = run_command("doctor", python=("-c", source))
        assert done.returncode == 2
        assert "is not greenkombu's" in done.stderr


class TestEnds:
    def test_a_deadline_ends_the_run_and_says_what_is_missing(self) -> None:
        done = run_command("demo", "--json", *SMALL[:4], "--messages", "10000000", "--timeout", "1")
        assert done.returncode == 1
        answer = json.loads(done.stdout)
        assert answer["ok"] is False
        assert answer["sent"] < answer["messages"]
        told = " ".join(answer["problems"])
        assert "the run had 1 s" in told
        assert "of 10000000 messages were not published" in told

    def test_ctrl_c_ends_the_run_in_good_order(self, env: Environment) -> None:
        # gevent's closes the descriptor when its loop turns, which is not before the last read.
        close = env.original("os", "close")
        reader, terminal = pty.openpty()
        with subprocess.Popen(
            [sys.executable, "-m", "greenkombu", "demo", "--messages", "10000000"],
            cwd=ROOT,
            env=os.environ | {"HUB_ENVIRONMENT": ENVIRONMENT, "TERM": "xterm", "COLUMNS": "100"},
            stdout=subprocess.PIPE,
            stderr=terminal,
        ) as process:
            close(terminal)
            drawn = b""
            try:
                while not re.search(rb"messages .* [1-9][0-9]*/10000000", drawn):
                    drawn += os.read(reader, 65536)
                process.send_signal(signal.SIGINT)
                while block := read_terminal(reader):
                    drawn += block
                assert process.stdout is not None
                told = process.stdout.read().decode()
            finally:
                process.kill()
                close(reader)
        assert process.returncode == 130
        assert "messages received" in told
        assert b"Traceback" not in drawn

    def test_an_interrupted_run_takes_stock(self) -> None:
        def interrupt(phase: str, done: int, total: int) -> None:
            if phase == "messages" and done:
                demo.interrupt()

        demo = Demo(DemoOptions(connections=4, channels=2, messages=5_000_000), interrupt)
        result = demo.run()
        assert result.interrupted
        assert not result.ok
        assert 0 < result.received <= result.sent < result.messages

    @pytest.mark.faults
    @pytest.mark.parametrize("fault", ["kill", "freeze"])
    def test_a_broker_that_goes_away_ends_the_run(
        self, make_private_rabbitmq: Callable[..., PrivateRabbitMQ], fault: str
    ) -> None:
        server = make_private_rabbitmq()
        struck: list[float] = []

        def strike(phase: str, done: int, total: int) -> None:
            if phase == "messages" and done > 500 and not struck:
                struck.append(monotonic())
                getattr(server, fault)()
                if fault == "freeze":
                    # Silence is no fault before a heartbeat or the deadline says so.
                    demo.interrupt()

        options = DemoOptions(broker=server.url, connections=20, messages=5_000_000, timeout=60)
        demo = Demo(options, strike)
        result = demo.run()
        assert monotonic() - struck[0] < 30
        assert not result.ok
        assert 500 < result.received <= result.sent
        if fault == "kill":
            assert f"127.0.0.1:{server.port}" in result.problems[0]

    @pytest.mark.green_matrix
    def test_a_run_leaves_nothing_behind(self) -> None:
        # What it would leave behind, the fixture `no_leaks` finds.
        result = Demo(DemoOptions(connections=10, channels=3, messages=500)).run()
        assert result.ok, result.problems
        assert result.largest_slice_ms > 0

    def test_options_that_make_no_sense(self) -> None:
        for wrong in ({"channels": 0}, {"body_size": 3}, {"timeout": 0.0}):
            with pytest.raises(DemoError, match=next(iter(wrong))):
                DemoOptions(**wrong)  # type: ignore[arg-type]


class TestLedger:
    @pytest.fixture
    def ledger(self) -> Ledger:
        return Ledger(messages=6, queues=3, body_size=40)

    def test_all_is_well_when_each_came_once(self, ledger: Ledger) -> None:
        for number in range(6):
            assert ledger.receive(number % 3, ledger.make_body(number)) == number
        assert ledger.complete
        assert ledger.problems([range(6)]) == []
        assert ledger.percentile_ms(0.5) is not None

    def test_bodies_have_their_size(self, ledger: Ledger) -> None:
        assert len(ledger.make_body(1)) == 40
        assert len(Ledger(1, 1, HEADER_SIZE).make_body(0)) == HEADER_SIZE

    def test_the_lost_are_named(self, ledger: Ledger) -> None:
        for number in (0, 1, 2, 3):
            ledger.receive(number % 3, ledger.make_body(number))
        assert not ledger.complete
        (problem,) = ledger.problems([range(1, 6, 2), range(0, 6, 2)])
        assert problem == "2 published messages did not arrive: 4 (queue 1), 5 (queue 2)"

    def test_what_was_not_published_is_not_lost(self, ledger: Ledger) -> None:
        ledger.receive(0, ledger.make_body(0))
        assert ledger.problems([range(0, 2, 2)]) == ["5 of 6 messages were not published"]

    def test_the_repeated_are_named_and_counted_once(self, ledger: Ledger) -> None:
        bodies = [ledger.make_body(number) for number in range(6)]
        for number, body in enumerate(bodies):
            ledger.receive(number % 3, body)
        assert ledger.receive(1, bodies[4]) is None
        assert ledger.received == 6
        assert ledger.duplicates == 1
        (problem,) = ledger.problems([range(6)])
        assert "4 (queue 1)" in problem

    def test_what_came_through_the_wrong_queue_is_strange(self, ledger: Ledger) -> None:
        assert ledger.receive(2, ledger.make_body(0)) is None
        assert ledger.receive(0, b"short") is None
        assert ledger.receive(0, Ledger(100, 3, 40).make_body(99)) is None
        assert ledger.strange == 3
        assert any("3 messages came that were not" in text for text in ledger.problems([]))

    def test_many_problems_are_cut_short(self) -> None:
        (problem,) = Ledger(messages=100, queues=1, body_size=16).problems([range(100)])
        assert problem.endswith("and 95 more")

    def test_no_latency_without_messages(self, ledger: Ledger) -> None:
        assert ledger.percentile_ms(0.99) is None


class TestDoctor:
    def test_it_says_what_it_found(self) -> None:
        done = run_command("doctor", "--json", "--environment", ENVIRONMENT)
        found = json.loads(done.stdout)["findings"]
        assert found["environment"] == ENVIRONMENT
        assert found["patched for"] == ("nothing" if ENVIRONMENT == "default" else ENVIRONMENT)
        assert Path(found["package hub"]) == ROOT / "hub"
        assert found["greenkombu"] == "0.1.0"
        for name, path in (("rabbitmq-server", find_rabbitmq()), ("redis-server", find_redis())):
            assert found[name].startswith("not installed" if path is None else str(path))

    def test_a_slow_poller_is_a_problem(self) -> None:
        done = run_command("doctor", HUB_POLLER="select")
        assert done.returncode == 1
        assert "grows with the number of connections" in done.stderr

    def test_a_choice_against_the_patching_is_a_problem(self) -> None:
        source = (
            "from gevent import monkey; monkey.patch_all(); import sys; "
            "from greenkombu.cli import main; sys.exit(main())"
        )
        done = run_command("doctor", python=("-c", source), HUB_ENVIRONMENT="default")
        assert done.returncode == 1
        assert "patched for gevent and default was chosen" in done.stderr


def test_the_command_line_imports_nothing_that_patching_would_miss() -> None:
    source = (
        "import sys, greenkombu.cli; "
        "print(*{'socket', 'ssl', 'select', 'threading', 'rich'} & set(sys.modules))"
    )
    done = run_command(python=("-S", "-c", source))
    assert done.stdout.split() == [], done.stderr


def test_the_limit_of_descriptors_is_raised_up_to_the_hard_one() -> None:
    source = (
        "import resource as r; from greenkombu.demo.machine import allow_descriptors as allow; "
        "r.setrlimit(r.RLIMIT_NOFILE, (64, 500)); "
        "assert allow(50) == 64 and allow(200) == 200 and allow(100) == 200; "
        "assert r.getrlimit(r.RLIMIT_NOFILE) == (200, 500); "
        # root may raise the hard limit, too
        "assert allow(1000) in (500, 1000)"
    )
    done = run_command(python=("-c", source))
    assert done.returncode == 0, done.stderr
