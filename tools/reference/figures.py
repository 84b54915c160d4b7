# SPDX-License-Identifier: BSD-3-Clause
"""What was counted and measured, from the committed files: benchmarks/results and docs/trust."""

from __future__ import annotations

import csv
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.tables import by_case, case_cells

ROOT = Path(__file__).resolve().parents[2]
RESULTS, TRUST = ROOT / "benchmarks" / "results", ROOT / "docs" / "trust"
SHOWN = ("case", "shape", "time", "times faster than", "times as long as", "peak memory")
GPU = "nvidia_h200/figures"
Rows = Sequence[Mapping[str, str]]


@functools.cache
def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cases(source: str, patterns: Iterable[str]) -> dict[str, Rows]:
    """The cases of a benchmark's file whose names match, in the file's order."""
    found = by_case(rows_of(RESULTS / f"{source}.csv"))
    return {
        name: rows for name, rows in found.items() if any(fnmatch(name, one) for one in patterns)
    }


def speed_table(source: str, patterns: Iterable[str]) -> list[list[str]]:
    """Head and lines; columns that say nothing are left out."""
    lines = [case_cells(rows) for rows in cases(source, patterns).values()]
    heads = [head for head in SHOWN if any(line[head] for line in lines)]
    return [heads, *([line[head].strip("`") for head in heads] for line in lines)]


def origin(source: str, patterns: Iterable[str]) -> str:
    """The machine of a file's figures, and the command that makes them anew."""
    first = next(iter(cases(source, patterns).values()))[0]
    command = "make gpu" if source == GPU else f"python -m benchmarks {first['benchmark']}"
    return (
        f"Medians on {first['processor']} ({first['capability']}), {first['threads']} threads, "
        f"PyTorch {first['torch']}, {first['date']}. Again: ``{command}``"
    )


def errors(source: str, patterns: Iterable[str]) -> str:
    """How far ours was from float64 in a benchmark's cases, by dtype."""
    by_dtype: dict[str, list[tuple[float, float]]] = {}
    for rows in cases(source, patterns).values():
        ours = next(row for row in rows if row["role"] == "ours")
        pair = float(ours["loss_error"]), float(ours["gradient_error"] or "nan")
        by_dtype.setdefault(ours["dtype"], []).append(pair)
    texts = []
    for dtype, pairs in by_dtype.items():
        loss = max(one for one, _ in pairs)
        gradients = [one for _, one in pairs if not math.isnan(one)]
        gradient = f", a gradient's entry by at most {max(gradients):.1e}" if gradients else ""
        texts.append(f"{dtype}: a result by at most {loss:.1e}{gradient}")
    return "; ".join(texts)


def fuzzed(names: Iterable[str]) -> list[str]:
    """What random calls counted of these properties."""
    lines = {row["name"]: row for row in rows_of(TRUST / "fuzz.csv") if row["kind"] == "property"}
    return [
        f"``{name}``: {int(lines[name]['problems']):,} problems, "
        f"{int(lines[name]['cases']):,} cases, {lines[name]['mismatches']} mismatches"
        for name in names
        if name in lines
    ]


def never_read(operators: Iterable[str]) -> list[list[str]]:
    """Head and lines of what is counted of these operators' excluded memory."""
    heads = ["operator", "calls", "bytes closed", "bytes counted", "differing bits", "wrong"]
    lines = {row["operator"]: row for row in rows_of(TRUST / "never_read.csv")}
    return [heads, *([lines[one][head] for head in heads] for one in operators if one in lines)]


@functools.cache
def _words_of_tests() -> dict[str, set[str]]:
    paths = sorted((ROOT / "tests").glob("**/test_*.py"))
    words = re.compile(r"\w+")
    return {p.relative_to(ROOT).as_posix(): set(words.findall(p.read_text())) for p in paths}


def tests_naming(name: str) -> list[str]:
    """The test files that have the name as a word."""
    return [path for path, words in _words_of_tests().items() if name in words]
