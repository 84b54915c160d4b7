# SPDX-License-Identifier: BSD-3-Clause
"""How many cases of what, and docs/trust/fuzz.csv, to which a run adds its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tools import records

NAME = "fuzz"
COLUMNS = ("kind", "name", "cases", "mismatches", "seconds", "seeds")


class Counts:
    """Of one run, whose seeds begin at ``first``."""

    def __init__(self, first: int, properties: Sequence) -> None:
        self.first = first
        self.cases: Counter = Counter({prop.name: 0 for prop in properties})
        self.seconds: Counter = Counter()
        self.reached: Counter = Counter()
        self.wrong: Counter = Counter()  # by property and by operator

    def add(self, prop, outcome) -> None:
        self.cases[prop.name] += outcome.cases
        self.seconds[prop.name] += outcome.seconds
        self.reached.update(outcome.reached)
        if outcome.failure:
            self.wrong.update([prop.name, *prop.operators])

    def rows(self) -> list[dict]:
        """Of each operator and each property that had a case."""
        found = []
        for kind, cases in (("operator", self.reached), ("property", self.cases)):
            for name in sorted(cases):
                seconds = round(self.seconds[name]) if kind == "property" else ""
                row = (kind, name, cases[name], self.wrong[name], seconds, self.first)
                found.append(dict(zip(COLUMNS, row, strict=True)))
        return [row for row in found if row["cases"] or row["mismatches"]]

    def show(self) -> None:
        for row in self.rows():
            line = f"{row['kind']:10}{row['name']:48}{row['cases']:>10} cases"
            print(line + f"{row['mismatches']:>4} mismatches")


def read(folder: Path = records.FOLDER) -> list[dict]:
    """What other runs have counted."""
    return records.read(NAME, folder) if (folder / f"{NAME}.csv").exists() else []


def write(old: list[dict], found: Counts, folder: Path = records.FOLDER) -> Path:
    """What is there, and this run."""
    rows = {(row["kind"], row["name"]): dict(row) for row in old}
    for new in found.rows():
        key = new["kind"], new["name"]
        before = rows.get(key)
        if before is not None:
            for column in ("cases", "mismatches", "seconds"):
                new[column] = _sum(before[column], new[column])
            new["seeds"] = f"{before['seeds']} {new['seeds']}"
        rows[key] = new
    return records.write(NAME, [rows[key] for key in sorted(rows)], folder)


def _sum(before, more):
    return "" if more == "" else int(before or 0) + int(more)
