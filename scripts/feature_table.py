"""Write the table of what each transport can do into the documents that have it.

    python scripts/feature_table.py            # rewrite what is out of date
    python scripts/feature_table.py --check    # only tell; exit status 1 if anything is

The table is made from `Transport.implements` of each transport; the documents hold it between two
comments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from greenkombu.transport import TRANSPORT_ALIASES, get_transport_cls

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "transports.md")

BEGIN = "<!-- feature table: begin, written by scripts/feature_table.py -->"
END = "<!-- feature table: end -->"

#: Features of `implements` in the order of the rows, with what they mean to a user.
ROWS = {
    "direct": "direct exchanges",
    "topic": "topic exchanges",
    "fanout": "fanout exchanges",
    "headers": "headers exchanges",
    "exchange_bindings": "exchanges bound to exchanges",
    "persistence": "messages outlive the broker's process",
    "shared": "several processes meet on one broker",
    "confirms": "publisher confirms",
    "returns": "unroutable mandatory messages come back",
    "transactions": "transactions of a channel",
    "prefetch": "prefetch",
    "priorities": "priorities",
    "ttl": "messages expire",
    "queue_expiry": "unused queues expire",
    "max_length": "queues of bounded length",
    "dead_letter": "dead-letter exchanges",
    "heartbeats": "heartbeats",
    "batch_publish": "batches in one operation",
    "asynchronous": "a loop of the program's own can drive it",
}


def transports() -> dict[Any, list[str]]:
    """Return the transports, each with the aliases that mean it or only add TLS to it."""
    found: dict[Any, list[str]] = {}
    for alias in TRANSPORT_ALIASES:
        cls = get_transport_cls(alias)
        kin = (each for each in found if issubclass(cls, each))
        same = next((each for each in kin if each.driver_name == cls.driver_name), cls)
        found.setdefault(same, []).append(alias)
    return found


def table() -> str:
    """Return the table in Markdown."""
    columns = transports()
    unnamed = {name for cls in columns for name in cls.implements} - {*ROWS, "exchange_type"}
    if unnamed:
        raise SystemExit(f"scripts/feature_table.py names no row for {', '.join(sorted(unnamed))}")
    heads = [f"`{aliases[0]}://`" for aliases in columns.values()]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{':-:|' * len(heads)}"]
    for feature, meaning in ROWS.items():
        cells = ["yes" if getattr(cls.implements, feature) else "-" for cls in columns]
        lines.append(f"| {meaning} | {' | '.join(cells)} |")
    return "\n".join(lines)


def updated(text: str, name: str) -> str:
    """Return the text of a document with the table of now."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name} lacks the two comments that the table goes between")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main(arguments: list[str]) -> int:
    """Update or check the documents; return the exit status."""
    status = 0
    for path in DOCUMENTS:
        text = path.read_text()
        new = updated(text, path.name)
        if new == text:
            continue
        if "--check" in arguments:
            print(f"{path.name}: the feature table is out of date; run scripts/feature_table.py")
            status = 1
        else:
            path.write_text(new)
            print(f"{path.name}: written")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
