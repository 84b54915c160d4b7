# SPDX-License-Identifier: BSD-3-Clause
"""Pieces of reStructuredText."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence


def title(text: str, line: str = "=") -> str:
    return f"{text}\n{line * len(text)}"


def indent(text: str, by: str = "   ") -> str:
    return textwrap.indent(text, by)


def body(text: str) -> str:
    """Below a term; a first word such as "V." would be the number of a list."""
    return indent(re.sub(r"^(?=\w\.(\s|$))", r"\\", text))


def bullets(texts: Iterable[str]) -> str:
    return "\n".join("- " + indent(text, "  ").lstrip() for text in texts)


def files(paths: Iterable[str]) -> str:
    return bullets(f"``{path}``" for path in paths)


def definitions(entries: Iterable[tuple[Sequence[str], str]]) -> str:
    """A list of names, each with what is said of it; text without a name stands between."""
    found = []
    for names, text in entries:
        if names:
            found.append(", ".join(f"``{name}``" for name in names) + "\n" + body(text))
        else:
            found.append(text)
    return "\n\n".join(found)


def escaped(text: str) -> str:
    return re.sub(r"([*`|\\]|_(?!\w))", r"\\\1", text)


def table(rows: Sequence[Sequence[str]], code: int = 0) -> str:
    """The first row is the head; column ``code`` is set as code."""
    lines = [".. list-table::", "   :header-rows: 1", "   :class: figures", ""]
    for row_number, row in enumerate(rows):
        for column, cell in enumerate(row):
            text = f"``{cell}``" if column == code and row_number else escaped(cell)
            lines.append(("   * - " if column == 0 else "     - ") + text)
    return "\n".join(line.rstrip() for line in lines)
