"""The tests' own watch: what it notices, and what it lets pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.environment import Environment
from tests.support.leaks import Census, settle
from tests.support.patched import ROOT, complaints, run_patched
from tests.support.redis import require_redis
from tests.support.ticker import Ticker

PREAMBLE = "import os, pytest, socket, time\n"

STANDS_STILL = """
import sys, time, hub

def stand_still():
    until = time.perf_counter() + 0.15
    while time.perf_counter() < until:
        pass

hub.get_hub().run_threadsafe(stand_still)
print("a complaint", file=sys.stderr)
"""


def run_pytest(tmp_path: Path, source: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a test file under this project's conftest in the environment of this run."""
    path = tmp_path / "test_inner.py"
    path.write_text(PREAMBLE + source)
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    fixed = ["-p", "tests.conftest", "-c", str(ROOT / "pyproject.toml"), "-q", str(path)]
    return subprocess.run(
        [sys.executable, "-m", "tests.run", name, "--", *fixed, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,  # the run ends itself after 120
        check=False,
    )


def test_a_leaked_descriptor_fails_the_test(tmp_path: Path) -> None:
    source = "kept = []\ndef test_leaky(): kept.extend(socket.socketpair())\n"
    done = run_pytest(tmp_path, source)
    assert done.returncode == 1, done.stdout
    assert "2 more socket" in done.stdout


@pytest.mark.green_matrix
def test_a_leaked_task_fails_the_test(tmp_path: Path) -> None:
    source = "def test_leaky(env): env.spawn(env.sleep, 100); env.sleep(0.1)\n"
    done = run_pytest(tmp_path, source)
    assert done.returncode == 1, done.stdout
    assert "1 more greenlets" in done.stdout or "1 more native threads" in done.stdout


def test_a_leak_with_a_reason_passes_and_one_without_is_refused(tmp_path: Path) -> None:
    source = """
kept = []
@pytest.mark.allow_leaks({})
def test_leaky(): kept.append(socket.socket())
"""
    assert run_pytest(tmp_path, source.format("'to show it'")).returncode == 0
    refused = run_pytest(tmp_path, source.format(""))
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "allow_leaks needs a reason" in refused.stderr


@pytest.mark.green_matrix
def test_a_hung_test_ends_the_run_and_shows_where_it_stood(tmp_path: Path) -> None:
    source = """
@pytest.mark.watchdog(1)
def test_hung(env): stand_here(env)
def stand_here(env): env.waiter().wait()
"""
    done = run_pytest(tmp_path, source)
    assert done.returncode == 1
    assert "test_hung takes too long" in done.stderr
    assert "stand_here" in done.stderr


def test_another_attempt_finds_what_the_first_one_found(tmp_path: Path) -> None:
    require_redis()
    source = """
from greenkombu import Connection
from tests.support import leaks
from tests.support.tasks import until
@pytest.fixture
def fail_once(request):
    def fail(): assert request.node.execution_count > 1
    return fail
@pytest.mark.parametrize("server", ["memory", "redis"])
def test_a_queue_is_empty(server, fail_once, request):
    url = "memory://" if server == "memory" else request.getfixturevalue("redis").url
    with Connection(url) as connection:
        queue = connection.SimpleQueue("always the same")
        queue.put("left behind")
        assert queue.qsize() == 1
        fail_once()
def test_a_finalizer_complains(fail_once):
    left = socket.socket()
    fail_once()
    left.close()
working = []
def test_a_task_works_on(env, fail_once):
    assert not working
    def work():
        working.append(1)
        env.sleep(0.1)
        working.clear()
    task = env.spawn(work)
    until(env, lambda: working)
    fail_once()
    task.join()
kept = []
def test_both_attempts_leak():
    leaks.SETTLING = 0.1
    kept.append(socket.socket())
"""
    done = run_pytest(tmp_path, source, "--reruns=1")
    assert "\n6 passed, 1 error, 5 rerun" in done.stdout, done.stdout
    assert "ERROR at teardown of test_both_attempts_leak" in done.stdout


def test_what_ends_in_time_is_no_leak(env: Environment) -> None:
    before = Census()
    release = env.waiter()
    task = env.spawn(release.wait)
    ends = env.socketpair()
    env.sleep(0.01)
    grown = Census().grown_since(before)
    assert any("socket" in line for line in grown)
    assert any("greenlets" in line or "native threads" in line for line in grown)
    release.wake()
    for end in ends:
        end.close()
    assert task.join(10)
    assert settle(before, env.sleep) == []


@pytest.mark.green_matrix
def test_a_warning_of_a_slow_callback_is_no_complaint() -> None:
    done = run_patched(["-c", STANDS_STILL])
    assert "held up every other descriptor" in done.stderr
    assert complaints(done.stderr) == "a complaint\n"


def test_the_ticker_ticks_while_others_wait(env: Environment, ticker: Ticker) -> None:
    ticker.reset()
    for _ in range(10):  # one is enough for sixty, unless the machine stands still
        env.sleep(0.3)
        if ticker.ticks > 10:
            break
    assert ticker.ticks > 10
    assert ticker.largest_gap >= 0.005


def test_the_ticker_notices_a_blocked_environment(env: Environment, ticker: Ticker) -> None:
    if not env.green:
        pytest.skip("native threads do not block each other")
    ticker.reset()
    env.original("time", "sleep")(0.2)
    assert ticker.largest_gap >= 0.19
