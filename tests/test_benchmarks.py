"""The benchmarks run, with little to do, and what they share works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from greenkombu.utils.private_redis import PrivateRedis
from tests.support.patched import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import _common
import bench_amqp
import bench_redis

sys.path.pop(0)


def run_benchmark(name: str, *arguments: str, timeout: float = 100.0) -> str:
    done = subprocess.run(
        [sys.executable, f"benchmarks/{name}.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.watchdog(240)
def test_amqp_rows_run_without_the_others() -> None:
    few = ("--kombu-python", "", "--rounds", "1", "--count", "400")
    told = run_benchmark("bench_amqp", *few, "--only", "prefetch 100")
    assert "greenkombu" in told
    assert "kombu 5.7" not in told


@pytest.mark.slow
@pytest.mark.watchdog(240)
def test_redis_rows_run_without_the_others() -> None:
    few = ("--kombu-python", "", "--rounds", "1", "--count", "400")
    told = run_benchmark("bench_redis", *few, "--only", "prefetch 100")
    assert "greenkombu" in told
    assert "kombu 5.7" not in told


@pytest.mark.slow
@pytest.mark.watchdog(240)
@pytest.mark.usefixtures("redis")  # for its skip where there is none
def test_crowds_of_redis_consumers_are_measured() -> None:
    crowds = bench_redis.make_crowds()
    bench_redis.wait_in_crowds(crowds, 6, 1, PrivateRedis, {100.0: 0.2})
    for crowd in crowds:
        assert len(crowd.latencies[100.0]) >= 20
        assert crowd.busy[100.0][0] > 0


def test_redis_consumers_are_compared_with_those_that_do_as_much() -> None:
    row = bench_redis.Row("publish", {}, 3.5)
    for cpu in (1.0, 2.0, 30.0):
        row.taken.setdefault(bench_redis.OURS, []).append(_common.Sample(cpu, 0.0, 1))
        row.taken.setdefault(bench_redis.KOMBU, []).append(_common.Sample(cpu * 3, 0.0, 1))
    crowds = bench_redis.make_crowds()
    for crowd, busy in zip(crowds, (0.4, 0.1, 0.2), strict=True):
        crowd.busy[1.0] = [busy]
    report = bench_redis.Report([row], crowds, 3, 1000)
    report.judge()
    assert report.missed == [
        "publish: 3.0 of 3.5",
        "1 messages/s: 2.00 times the server CPU of BRPOP",
    ]


def test_import_is_measured() -> None:
    told = run_benchmark("bench_import", "--kombu-python", "", "--rounds", "2")
    assert "import, greenkombu" in told


def test_amqp_ratios_are_those_of_medians() -> None:
    row = bench_amqp.Row("confirmed by many", {}, 6.0, against="one by one")
    reference = bench_amqp.Row("one by one", {})
    for cpu in (1.0, 2.0, 30.0):
        row.taken.setdefault(bench_amqp.OURS, []).append(_common.Sample(cpu, 0.0, 1))
        row.taken.setdefault(bench_amqp.PIKA, []).append(_common.Sample(cpu * 3, 0.0, 1))
        reference.taken.setdefault(bench_amqp.KOMBU, []).append(_common.Sample(cpu * 5, 0.0, 1))
    found = bench_amqp.ratios([row, reference])
    assert found == {"confirmed by many": {bench_amqp.KOMBU: 5.0, bench_amqp.PIKA: 3.0}}
    report = bench_amqp.Report([row, reference], {bench_amqp.OURS: []}, rounds=3)
    report.judge()
    assert report.missed == ["confirmed by many: 5.0 of 6"]


def test_system_calls_are_read_from_strace() -> None:
    table = """\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 60.00    0.012087           8      1470           epoll_wait
 40.00    0.010505           4      2376      1448 openat
------ ----------- ----------- --------- --------- ----------------
100.00    0.110047          14      3846      1448 total
"""
    assert bench_amqp.read_strace(table) == {"epoll_wait": 1470, "openat": 2376}


@pytest.mark.slow
@pytest.mark.watchdog(400)
def test_a_wake_up_costs_the_same_with_ten_and_with_ten_thousand_descriptors() -> None:
    # The benchmark itself exits with 1 if it does not.
    quick = ("--rounds", "3", "--seconds", "0.04", "--sizes", "10,10000")
    told = run_benchmark("bench_hub", *quick, timeout=350)  # half a minute of CPU time
    assert "flat within 1.3: yes" in told
    for name in ("gevent", "eventlet", "selectors", "round trip, ours", "timer cancelled, ours"):
        assert name in told


@pytest.mark.parametrize("environment", _common.ENVIRONMENTS)
def test_one_measurement_of_the_hub(environment: str) -> None:
    options = {"contender": "epoll", "sizes": [2, 20], "rounds": 2, "seconds": 0.01}
    told = run_benchmark("_hub_work", environment, "wake_up", json.dumps(options))
    answer = json.loads(told)
    assert answer["refused"] == {}
    assert [len(answer["sizes"][size]) for size in ("2", "20")] == [2, 2]
    assert all(sample["cpu_us"] > 0 for sample in answer["sizes"]["20"])


class TestShared:
    def test_cases_take_turns(self) -> None:
        order: list[str] = []

        def case(name: str) -> _common.Sample:
            order.append(name)
            return _common.Sample(len(order), 1.0, 1)

        taken = _common.take_turns({"a": lambda: case("a"), "b": lambda: case("b")}, 3)
        assert "".join(order) == "abbaab"
        assert _common.summarize(taken["a"]).cpu_us == 4.0

    def test_a_summary_has_median_and_spread(self) -> None:
        samples = [_common.Sample(cpu, cpu * 2, 1) for cpu in (5.0, 1.0, 3.0)]
        made = _common.summarize(samples)
        assert (made.cpu_us, made.cpu_low_us, made.cpu_high_us, made.wall_us) == (3, 1, 5, 6)

    def test_work_is_done_often_enough(self) -> None:
        counts: list[int] = []
        sample = _common.measure(counts.append, 0.001, least=5, most=70)
        assert counts == [5, 70]
        assert sample.count == 70

    def test_tables_line_up(self) -> None:
        rows = [["epoll", 16.04, None], ["select", 4005.7, "refused"]]
        assert _common.text_table(["", "N=10", "more"], rows).splitlines() == [
            "        N=10     more",
            "epoll   16.0        -",
            "select  4006  refused",
        ]
        assert _common.markdown_table(["", "N=10", "more"], rows).splitlines() == [
            "|  | N=10 | more |",
            "| --- | ---: | ---: |",
            "| epoll | 16.0 | - |",
            "| select | 4006 | refused |",
        ]

    def test_a_section_is_replaced_and_the_rest_stays(self, tmp_path: Path) -> None:
        document = tmp_path / "performance.md"
        _common.update_section(document, "one", "first")
        _common.update_section(document, "two", "other")
        before = document.read_text()
        assert before.startswith("# Performance\n")
        _common.update_section(document, "one", "changed")
        assert document.read_text() == before.replace("first", "changed")
