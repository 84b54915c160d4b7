# SPDX-License-Identifier: BSD-3-Clause
"""How many cases of what, and docs/trust/fuzz.csv, to which a run adds its own."""

from __future__ import annotations

import fcntl
import os
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
        self.reached.update(outcome.reached)
        for name in (prop.name, *outcome.reached):  # an operator's: of the cases that compared it
            self.seconds[name] += outcome.seconds
        if outcome.failure:
            self.wrong.update([prop.name, *prop.operators])

    def rows(self) -> list[dict]:
        """Of each operator and each property that had a case."""
        found = []
        for kind, cases in (("operator", self.reached), ("property", self.cases)):
            for name in sorted(cases):
                seconds = round(self.seconds[name])
                row = (kind, name, cases[name], self.wrong[name], seconds, self.first)
                found.append(dict(zip(COLUMNS, row, strict=True)))
        return [row for row in found if row["cases"] or row["mismatches"]]

    def show(self) -> None:
        for row in self.rows():
            line = f"{row['kind']:10}{row['name']:48}{row['cases']:>10} cases"
            print(line + f"{row['mismatches']:>4} mismatches")


def add(found: Counts, folder: Path = records.FOLDER) -> Path:
    """To what other runs have counted, some of which may do so at the same time."""
    if not found.rows():
        return folder / f"{NAME}.csv"
    folder.mkdir(parents=True, exist_ok=True)
    holder = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        return _added(found, folder)
    finally:
        os.close(holder)


def _added(found, folder):
    old = records.read(NAME, folder) if (folder / f"{NAME}.csv").exists() else []
    rows = {(row["kind"], row["name"]): dict(row) for row in old}
    for new in found.rows():
        before = rows.get((new["kind"], new["name"]))
        if before is not None:
            for column in ("cases", "mismatches", "seconds"):
                new[column] = int(before[column]) + int(new[column])
            seeds = str(before["seeds"]).split()
            new["seeds"] = " ".join(dict.fromkeys([*seeds, str(new["seeds"])]))
        rows[new["kind"], new["name"]] = new
    return records.write(NAME, [rows[key] for key in sorted(rows)], folder)
