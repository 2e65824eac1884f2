"""The main job: many connections, consumed from one drain loop while many tasks publish.

It is what ``greenkombu demo`` runs, kept apart from the command line so that programs and tests can
run it too::

    from greenkombu.demo import Demo, DemoOptions

    result = Demo(DemoOptions(connections=20, channels=5, messages=1000)).run()
    assert result.ok, result.problems

It needs nothing that is not public: connections, a pool of producers, a `DrainLoop`, and the hub
below them, which is the same in every environment.
"""

from __future__ import annotations

from greenkombu.demo.job import Demo, DemoError, DemoOptions, DemoResult

__all__ = ["Demo", "DemoError", "DemoOptions", "DemoResult"]
