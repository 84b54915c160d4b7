# SPDX-License-Identifier: BSD-3-Clause
"""A docstring in its parts, by what they are and not by where they stand.

A docstring here is a sentence, then text with formulas and sessions of ``>>>``, then Args, Returns
and Raises in Google's form, the text of each reStructuredText.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

HEADER = re.compile(r"^(Args|Returns|Raises|Example):$", re.MULTILINE)
ENTRY = re.compile(r"^((?:\*{0,2}\w+,\s+)*\*{0,2}\w+):\s+(.*)$", re.DOTALL)


class Block(NamedTuple):
    kind: str  # "math", "session" or "text"
    text: str


class Docstring(NamedTuple):
    summary: str
    formula: list[str]
    equivalent: list[str]
    text: list[str]  # what is neither of these
    sections: dict[str, str]


def blocks_of(text: str) -> list[Block]:
    """Paragraphs, of which lists and indented blocks stay with what introduces them."""
    found: list[Block] = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        part = part.strip("\n")
        if part.startswith(".. math::"):
            found.append(Block("math", part))
        elif part.startswith(">>>"):
            found.append(Block("session", part))
        elif part and found and (part[0] == " " or _goes_on(found[-1], part)):
            found[-1] = Block(found[-1].kind, f"{found[-1].text}\n\n{part}")
        elif part:
            found.append(Block("text", part))
    return found


def _goes_on(before: Block, part: str) -> bool:
    return before.kind == "text" and part.startswith("- ")


def parse(documented: object) -> Docstring:
    text = inspect.getdoc(documented) or ""
    head, *rest = HEADER.split(text)
    sections = {}
    for name, body in zip(rest[::2], rest[1::2], strict=True):
        inside, after = _indented(body)
        sections[name] = inside
        head += f"\n\n{after}"
    first, *blocks = blocks_of(head) or [Block("text", "")]
    if example := sections.pop("Example", None):
        blocks.append(Block("session", example))
    return Docstring(" ".join(first.text.split()), *_sorted_out(blocks), sections)


def _indented(body: str) -> tuple[str, str]:
    """What stands inside of a section, and what follows it."""
    match = re.search(r"^\S", body.lstrip("\n"), re.MULTILINE)
    end = match.start() if match else len(body)
    body = body.lstrip("\n")
    return inspect.cleandoc("\n" + body[:end]), body[end:]


def _sorted_out(blocks: list[Block]) -> tuple[list[str], list[str], list[str]]:
    """(formula, equivalent, other text). The formula is all up to the last display of one, or up
    to the first formula in a line where none is displayed; "Equivalent::" and the sentence that
    leads to a session, which ends in a colon, go with the session."""
    last = _last_formula(blocks)
    formula, equivalent, other = [], [], []
    for i, (kind, text) in enumerate(blocks):
        leads = text.endswith(":") and i + 1 < len(blocks) and blocks[i + 1].kind == "session"
        literal = re.search(r"::\n\n +\S", text)
        if kind == "session" or (kind == "text" and (literal or (leads and ":math:" not in text))):
            equivalent.append(text)
        elif i <= last or (formula and i == last + 1 and text[0].islower()):
            formula.append(text)
        else:
            other.append(text)
    return formula, equivalent, other


def _last_formula(blocks: list[Block]) -> int:
    """Of none that is displayed: the first in a line, and the table that this may lead to."""
    shown = [i for i, block in enumerate(blocks) if block.kind == "math"]
    in_line = [i for i, b in enumerate(blocks) if b.kind == "text" and ":math:" in b.text]
    if shown or not in_line:
        return shown[-1] if shown else -1
    first = in_line[0]
    leads = blocks[first].text.endswith(":") and first + 1 in in_line
    return first + 1 if leads else first


def entries_of(section: str) -> list[tuple[list[str], str]]:
    """(names, text) of each entry of Args or Raises; no names for text between them."""
    parts: list[list[str]] = []
    for line in section.splitlines():
        if line and line[0] != " " and (not parts or not _open(parts[-1])):
            parts.append([line])
        elif parts:
            parts[-1].append(line)
    found = []
    for part in parts:
        text = inspect.cleandoc("\n".join(part))
        match = ENTRY.match(text)
        names = re.split(r",\s+", match[1]) if match else []
        found.append((names, inspect.cleandoc(match[2]) if match else text))
    return found


def _open(part: list[str]) -> bool:
    """Whether text between entries goes on in the next line."""
    return part[-1] != "" and not ENTRY.match("\n".join(part))
