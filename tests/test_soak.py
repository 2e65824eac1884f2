"""The soak (`tests.soak`): its account, and a short run of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.soak.ledger import Ledger, Record
from tests.support.patched import ROOT
from tests.support.rabbitmq import require_rabbitmq
from tests.support.redis import require_redis


def test_the_ledger_finds_what_was_confirmed_and_not_delivered(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    numbers = [ledger.next_number() for _ in range(20_001)]
    for number in (*numbers[:5], numbers[-1]):
        ledger.confirm(number)
    assert ledger.missing() == [0, 1, 2, 3, 4, 20_000]
    records = [Record(tmp_path / f"{name}.record") for name in "ab"]
    for number in (0, 1, 7):  # 7 was not confirmed, which is no fault
        records[0].delivered(number, redelivered=False)
    records[1].delivered(1, redelivered=True)
    ledger.look()
    assert ledger.missing() == [2, 3, 4, 20_000]
    records[1].delivered(20_000, redelivered=False)
    records[1].problem("on\ntwo lines")
    # A process that is being killed leaves no half of a line, but a look may come in between.
    with open(tmp_path / "a.record", "ab") as half:
        half.write(b"2")
        half.flush()
        ledger.look()
        assert ledger.missing() == [2, 3, 4]
        half.write(b" 0\n")
    ledger.look()
    assert ledger.missing() == [3, 4]
    assert (ledger.published, len(ledger.confirmed)) == (20_001, 6)
    assert (ledger.delivered, ledger.redelivered, ledger.twice) == (6, 1, 1)
    assert ledger.problems == ["on two lines"]
    for record in records:
        record.close()


@pytest.mark.slow
@pytest.mark.watchdog(240)
@pytest.mark.parametrize("broker", ["amqp", "redis", "sentinel", "cluster"])
def test_a_short_soak_loses_nothing(broker: str) -> None:
    require_rabbitmq() if broker == "amqp" else require_redis()
    name = os.environ["GREENKOMBU_TEST_ENVIRONMENT"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", name, "--broker", broker, "--seconds", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " lost=0\n" in done.stdout
    assert "confirmed=0 " not in done.stdout
