# SPDX-License-Identifier: BSD-3-Clause
"""Pages whose tables are made by a program: each stands between ``<!-- KIND NAME -->`` and
``<!-- /KIND -->``; what is around them is written by hand."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A table, of which the first row is the head."""
    head, *lines = ([_cell(text) for text in row] for row in rows)
    cells = [head, ["---"] * len(head), *lines]
    text = ["| " + " | ".join(row) + " |" for row in cells]
    text[1] = text[1].replace(" ", "")
    return "\n".join(text) + "\n"


def _cell(text: str) -> str:
    """A name between underscores would be set slanted, without them."""
    return f"`{text}`" if re.fullmatch(r"_\w*_", text) else text


def _spans(kind: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {kind} (\w+) -->\n).*?(<!-- /{kind} -->)", re.S)


def names(text: str, kind: str) -> list[str]:
    """Of the tables of a page, in their order."""
    return [span[2] for span in _spans(kind).finditer(text)]


def regenerate(text: str, kind: str, made: Callable[[str], str]) -> str:
    """``text`` with every table made anew by its name."""
    if not names(text, kind):
        raise ValueError(f"no '<!-- {kind} NAME -->' ... '<!-- /{kind} -->' found")
    return _spans(kind).sub(lambda span: span[1] + made(span[2]) + span[3], text)


def update(page: Path, fresh: str, command: str, check: bool = False) -> str:
    """Write the page, or with ``check`` only compare. Returns what is wrong, or nothing."""
    if fresh == page.read_text():
        return ""
    if check:
        return f"{page.name} is not what its tables are made from; run `{command}`"
    page.write_text(fresh)
    return ""


def run(
    command: str,
    page: Path,
    tables: Mapping[str, Callable[[], str]],
    arguments: Sequence[str] | None,
    description: str | None,
) -> None:
    """The command of a page: prints its tables, ``--write``s or ``--check``s them."""
    parser = argparse.ArgumentParser(prog=command, description=description)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--write", action="store_true", help=f"put the tables into {page.name}")
    what.add_argument("--check", action="store_true", help=f"compare them with {page.name}")
    options = parser.parse_args(arguments)
    if not (options.write or options.check):
        print("\n".join(f"{name}\n{made()}" for name, made in tables.items()))
        return
    fresh = regenerate(page.read_text(), "table", lambda name: tables[name]())
    wrong = update(page, fresh, f"{command} --write", options.check)
    if wrong:
        sys.exit(wrong)
