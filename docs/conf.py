"""Sphinx configuration; `make docs` builds with warnings as errors."""

from __future__ import annotations

import re
from importlib.metadata import version as installed_version
from typing import Any

project = "greenkombu"
author = "greenkombu contributors"
copyright = f"2026, {author}"
release = version = installed_version("greenkombu")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build"]

# Docstrings are plain text with `names` in single backquotes; Google-style sections.
default_role = "literal"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
myst_heading_anchors = 3

# Annotations are short names, and several modules have a Connection, a Queue and a Consumer.
suppress_warnings = ["ref.python"]

html_theme = "alabaster"
html_theme_options = {"description": "Messaging for green threads", "page_width": "1040px"}

# The asterisks of *args and **kwargs, which are no markup; *emphasis* stays.
_STARS = re.compile(r"(?<![\w*`\\])(\*{1,2})(?=\w+(?![\w*]))")


def _escape_stars(
    _app: Any, _what: str, _name: str, _obj: Any, _opts: Any, lines: list[str]
) -> None:
    lines[:] = [_STARS.sub(lambda match: match[0].replace("*", r"\*"), line) for line in lines]


def setup(app: Any) -> None:
    # Before napoleon, which has the default priority of 500.
    app.connect("autodoc-process-docstring", _escape_stars, priority=400)
