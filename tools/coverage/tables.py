# SPDX-License-Identifier: BSD-3-Clause
"""Lines by room and language."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..instrument import ROOT
from .native import Lines

PACKAGE = ROOT / "masked_loss_ext"


def room_and_language(path: Path) -> tuple[str, str]:
    """csrc/elementwise/cuda/ops.cu: elementwise, CUDA; masked_loss_ext/ops/x.py: ops, Python."""
    inside = path.relative_to(ROOT).parts
    room = inside[1] if len(inside) > 2 else "top"
    if inside[0] != "csrc":
        return room, "Python"
    return room, "CUDA" if "cuda" in inside else "C++"


def rows(lines: Lines) -> list[dict[str, object]]:
    counts: dict[tuple[str, str], list[int]] = {}
    for path, found in lines.items():
        room, language = room_and_language(path)
        for key in ((room, language), ("all", language)):
            count = counts.setdefault(key, [0, 0])
            count[0] += len(found)
            count[1] += sum(found.values())
    ordered = sorted(counts, key=lambda key: (key[1], key[0] == "all", key[0]))
    return [
        {
            "room": room,
            "language": language,
            "lines": counts[room, language][0],
            "covered": counts[room, language][1],
            "share": f"{100 * counts[room, language][1] / max(counts[room, language][0], 1):.1f} %",
        }
        for room, language in ordered
    ]


def text(table: list[dict[str, object]]) -> str:
    lines = [f"{'room':24}{'language':10}{'lines':>8}{'covered':>9}{'share':>9}"]
    lines += [
        "{room:24}{language:10}{lines:>8}{covered:>9}{share:>9}".format(**row) for row in table
    ]
    return "\n".join(lines)


def runs(numbers: Iterable[int]) -> str:
    """[3, 4, 5, 9] as 3-5, 9."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in found)


def missing(lines: Lines) -> str:
    """The lines that were not run, file by file."""
    left = {path: [n for n, ran in found.items() if not ran] for path, found in lines.items()}
    return "\n".join(
        f"{path.relative_to(ROOT)}: {runs(numbers)}"
        for path, numbers in sorted(left.items())
        if numbers
    )
