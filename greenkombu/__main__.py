"""`python -m greenkombu` is the command `greenkombu`."""

from __future__ import annotations

import sys

from greenkombu.cli import main

if __name__ == "__main__":
    sys.exit(main())
