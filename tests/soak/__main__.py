"""Read the arguments, patch, and run; see the package's docstring."""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from pathlib import Path

from tests.run import ENVIRONMENTS


def main() -> int:
    """Run a soak; return the exit status: 0 if nothing was lost and nothing is left behind."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("environment", choices=sorted(ENVIRONMENTS))
    parser.add_argument("--broker", default="amqp")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=None, help="that of an earlier run")
    parser.add_argument("--publishers", type=int, default=20)
    parser.add_argument("--consumers", type=int, default=3)
    arguments = parser.parse_args()
    detail = ENVIRONMENTS[arguments.environment]()

    # Nothing that matters before patching.
    from tests.soak.brokers import BROKERS
    from tests.soak.job import Soak

    if arguments.broker not in BROKERS:
        parser.error(f"--broker: one of {', '.join(BROKERS)}")
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    _say(f"soak of {arguments.broker}, {detail}, {arguments.seconds:g} s, seed={seed}")
    folder = Path(tempfile.mkdtemp(prefix="greenkombu-soak-"))
    soak = Soak(
        arguments.environment,
        BROKERS[arguments.broker](random.Random(f"{seed} broker")),
        folder,
        seconds=arguments.seconds,
        publishers=arguments.publishers,
        consumers=arguments.consumers,
        seed=seed,
        say=_say,
    )
    well = soak.run()
    _say(soak.report())
    for problem in soak.problems:
        _say(f"PROBLEM: {problem}")
    if well:
        import shutil

        shutil.rmtree(folder)
        _say("all is well")
        return 0
    _say(f"failed; seed={seed}; the records are in {folder}")
    return 1


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # A thread that hangs was reported; it must not keep the process.
    os._exit(status)
