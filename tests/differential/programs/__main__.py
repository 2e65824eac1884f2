"""Run all programs in one process: see the package's docstring."""

from __future__ import annotations

import sys
import traceback


def main(package: str, environment: str, *urls: str) -> None:
    if environment == "gevent":
        from gevent import monkey

        monkey.patch_all()
    elif environment == "eventlet":
        import eventlet

        eventlet.monkey_patch()

    import json
    import logging
    import warnings

    from tests.differential.programs import connections, consume, entities, helpers, publish
    from tests.differential.programs.lab import PROGRAMS, Lab

    # No line of Kombu's source in a failing test's output.
    sys.excepthook = lambda kind, exc, _: sys.stderr.write(f"{kind.__name__}: {exc}\n") and None
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    assert all((connections, consume, entities, helpers, publish))
    transcripts: dict[str, dict[str, object]] = {}
    for url in urls:
        transport = url.partition(":")[0]
        seen = transcripts[transport] = {}
        for name, (function, transports) in PROGRAMS.items():
            if transport not in transports:
                continue
            # The last of these names the program that hangs.
            sys.stderr.write(f"{package} {transport} {name}\n")
            lab = Lab(package, url, name)
            try:
                function(lab)
            except Exception as exc:
                lab.seen.append({"ended by": lab.error(exc)})
                # No line of Kombu's: only where in the program it happened.
                where = [
                    frame.lineno
                    for frame in traceback.extract_tb(exc.__traceback__)
                    if "differential" in frame.filename
                ]
                sys.stderr.write(f"  ended at {where} by {exc!r}\n")
            finally:
                lab.connection.release()
            seen[name] = lab.seen
    json.dump(transcripts, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
