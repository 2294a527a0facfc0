#!/usr/bin/env python
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writes the generated parts of the documentation: the table of options and the reference of the Python interface.

    python scripts/write_docs.py          # write them
    python scripts/write_docs.py check    # change nothing; name the pages that are out of date, and exit with 1

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`. So the pages read the same on a
forge and on the site, and need no plugin.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yolo_cwd
from yolo_cwd.config import OPTIONS

DOCS = Path(__file__).parent.parent / "docs"
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Examples):\n", flags=re.MULTILINE)


def main() -> None:
    """Write every page, or check it."""
    words = sys.argv[1:]
    if words not in ([], ["check"]):
        sys.exit(f"{words[0]}: unknown; give 'check', or nothing")
    stale = [page for page in PARTS if _written(page) != (DOCS / page).read_text(encoding="utf-8")]
    if words and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run scripts/write_docs.py")
    for page in stale:
        (DOCS / page).write_text(_written(page), encoding="utf-8")
        print(f"written: docs/{page}")


def _written(page: str) -> str:
    """Return a page with its generated part as it should be."""
    name, make = PARTS[page]
    begin, end = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
    before, _, rest = (DOCS / page).read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"docs/{page}: lacks the lines '{begin}' and '{end}'")
    return f"{before}{begin}\n\n{make()}\n\n{end}{after}"


def options() -> str:
    """Return the table of options, from `cfg/default.yaml`."""
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for name, option in OPTIONS.items():
        default = "" if option.default is None else f" `{option.default}`".lower().replace(".0`", "`")
        meaning = option.meaning.replace("|", "\\|")
        rows.append(f"| `{name}` |{default} | {meaning} |")
    return "\n".join(rows)


def reference() -> str:
    """Return the reference of what the package exports, from the docstrings."""
    names = sorted((name for name in yolo_cwd.__all__ if not name.startswith("_")), key=str.lower)
    return "\n\n".join(_entry(name, getattr(yolo_cwd, name)) for name in names)


def _entry(name: str, thing: Any) -> str:
    """Return heading, signature and description of a function or a class."""
    texts = [inspect.getdoc(thing) or ""]
    if inspect.isclass(thing):
        texts += [_sections_alone(inspect.getdoc(thing.__init__) or "")]
    described = "\n\n".join(_markdown(text) for text in texts if text)
    return f"### `{name}`\n\n```text\n{name}{_signature(thing)}\n```\n\n{described}"


def _signature(thing: Any) -> str:
    """Return the names of the arguments with their defaults; types are in the description."""
    called = thing.__init__ if inspect.isclass(thing) else thing
    shown = [p for p in inspect.signature(called).parameters.values() if p.name != "self" and p.name[0] != "_"]
    words = [
        f"{parameter.name}={parameter.default!r}"
        if isinstance(parameter.default, (int, float, str, type(None)))
        else parameter.name
        for parameter in shown
    ]
    return f"({', '.join(words)})"


def _sections_alone(text: str) -> str:
    """Return a constructor's docstring from its first section on: its summary says no more than the class's."""
    found = SECTION.search(text)
    return text[found.start() :] if found else ""


def _markdown(text: str) -> str:
    """Return a Google docstring as Markdown."""
    parts = SECTION.split(text)
    blocks = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        if title == "Attributes":  # of use to those who read the code
            continue
        lines = inspect.cleandoc(body)
        if title == "Examples":
            blocks.append(f"```pycon\n{lines}\n```")
            continue
        items = re.split(r"\n(?=\S)", lines)
        if title in {"Args", "Raises"}:
            items = [item for item in items if not item.startswith("_")]
            items = [re.sub(r"^(\S+):\s+", r"`\1`: ", item) for item in items]
        blocks.append(f"{title}:\n\n" + "\n".join("- " + " ".join(item.split()) for item in items))
    return "\n\n".join(block for block in blocks if block)


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "options.md": ("options", options),
    "python.md": ("reference", reference),
}

if __name__ == "__main__":
    main()
