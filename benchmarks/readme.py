# SPDX-License-Identifier: BSD-3-Clause
"""The measured tables of README.md, made from the CSV files in benchmarks/results.

A table stands between ``<!-- benchmark NAME -->`` and ``<!-- /benchmark -->``, NAME.csv its source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from .harness import COPY, FILL
from .report import number_text, read_csv, time_text

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SPAN = re.compile(
    r"(?P<open><!-- benchmark (?P<name>\w+) -->\n)(?P<body>.*?)(?P<close><!-- /benchmark -->)", re.S
)
Rows = Sequence[Mapping[str, str]]


def by_case(rows: Rows) -> dict[str, Rows]:
    found: dict[str, list] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(row)
    return found


def against_text(row: Mapping[str, str]) -> str:
    """How many times faster ours is than this contender; one that was not timed says so."""
    ratio = number_text(row["ratio_of_medians"], "{:.1f}x") or "not timed"
    wanted = number_text(row["target"], " (aim {:g}x)")
    return f"{row['contender']} {ratio}{wanted}"


def case_line(rows: Rows) -> str:
    ours = next(row for row in rows if row["contender"] == "ours")
    shape = ours["shape"].replace("x", ", ")
    rivals = [row for row in rows if row["contender"] not in ("ours", COPY, FILL)]
    cells = [
        f"`{ours['case']}`",
        f"[{shape}] {ours['dtype']}, {ours['summary']}",
        time_text(ours["median_us"]),
        ", ".join(map(against_text, rivals)),
        number_text(ours["gb_per_s"], "{:.1f}")
        + number_text(ours["of_copy"], " ({:.0%} of a copy)"),
        number_text(ours["peak_over_gradient"], "{:.2f}"),
    ]
    return "| " + " | ".join(cells) + " |"


def markdown_table(rows: Rows) -> str:
    first = rows[0]
    lines = [
        "| case | shape | forward + backward | times faster than | GB/s | peak memory / gradient |",
        "|---|---|---|---|---|---|",
        *(case_line(group) for group in by_case(rows).values()),
        "",
        f"Median of {first['rounds']} rounds on {first['processor']} ({first['capability']}), "
        f"{first['threads']} threads, PyTorch {first['torch']}, {first['date']}. "
        f"Reprint with `python -m benchmarks {first['benchmark']}`.",
    ]
    return "\n".join(lines) + "\n"


def regenerate(text: str, results: Path = RESULTS) -> str:
    """``text`` with every table made anew from its CSV."""
    if SPAN.search(text) is None:
        raise ValueError("no '<!-- benchmark NAME -->' ... '<!-- /benchmark -->' found")

    def fresh(span: re.Match) -> str:
        rows = read_csv(results / f"{span['name']}.csv")
        return span["open"] + markdown_table(rows) + span["close"]

    return SPAN.sub(fresh, text)


def update(readme: Path = README, results: Path = RESULTS, check: bool = False) -> str:
    """Write the tables, or with ``check`` only compare. Returns what is wrong, or nothing."""
    text = readme.read_text()
    fresh = regenerate(text, results)
    if fresh == text:
        return ""
    if check:
        return f"{readme.name} differs from the CSV files; run `python -m benchmarks readme`"
    readme.write_text(fresh)
    return ""
