"""Which test shows which of the documented behaviours (``spec/behaviours.md``), by number.

A test that shows behaviour 42 has ``_b042_`` in its name.  ``python -m tests.behaviours`` prints
the table; `tests.test_behaviours` checks that it has no gap.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

__all__ = ["LATER", "NUMBERS", "find_tests", "table"]

ROOT = Path(__file__).parents[1]

#: All behaviours that the list has.
NUMBERS = range(1, 226)

_STORES = "after issue 6: the other stores"

#: Behaviours of brokers and clients that are not there yet -> the work that brings them.
LATER: dict[int, str] = {
    **dict.fromkeys(range(179, 190), _STORES),
    193: _STORES,
}


def find_tests(root: Path = ROOT) -> dict[int, list[str]]:
    """Return behaviour -> tests (``file::[Class::]function``) that name it."""
    found: dict[int, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        for name, function in _functions(ast.parse(path.read_text()), ()):
            for part in function.split("_"):
                if part[:1] == "b" and part[1:].isdigit():
                    found.setdefault(int(part[1:]), []).append(f"{file}::{name}")
    return found


def _functions(tree: ast.AST, owners: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return (dotted name, name) of the test functions of a module or class."""
    functions: list[tuple[str, str]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            functions += _functions(node, (*owners, node.name))
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            functions.append(("::".join((*owners, node.name)), node.name))
    return functions


def table() -> str:
    """Return the table as Markdown."""
    tests = find_tests()
    lines = ["| behaviour | shown by |", "|---|---|"]
    for number in NUMBERS:
        shown = ", ".join(f"`{name}`" for name in tests.get(number, ())) or LATER.get(number, "-")
        lines.append(f"| {number} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
