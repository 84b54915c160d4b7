# SPDX-License-Identifier: BSD-3-Clause
"""How many cases of what, and docs/trust/fuzz.csv, to which a run adds its own.

A problem is what hypothesis has drawn: values, keywords, and what counts. Its truth is computed
once; a case is one call of an operator that was compared with it, or with another call to the bit:
the same values in other strides and dtypes, with other garbage in what is excluded, a shard, in
place.
"""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tools import records

NAME = "fuzz"
SUMS = ("problems", "cases", "mismatches", "seconds")
COLUMNS = ("kind", "name", *SUMS, "seeds")


def done(prop, outcome) -> int:
    """How many cases of the operator that had fewest; of a property without one, its problems."""
    return min((outcome.calls[name] for name in prop.operators), default=outcome.cases)


class Counts:
    """Of one run, whose seeds begin at ``first``."""

    def __init__(self, first: int, properties: Sequence) -> None:
        self.first = first
        self.cases: Counter = Counter({prop.name: 0 for prop in properties})
        self.done: Counter = Counter()
        self.seconds: Counter = Counter()
        self.calls: Counter = Counter()
        self.problems: Counter = Counter()
        self.wrong: Counter = Counter()  # by property and by operator

    def add(self, prop, outcome) -> None:
        self.cases[prop.name] += outcome.cases
        self.done[prop.name] += done(prop, outcome)
        self.calls.update(outcome.calls)
        self.problems.update(outcome.problems)
        for kind, name in (
            ("property", prop.name),
            *(("operator", name) for name in outcome.calls),
        ):
            self.seconds[kind, name] += outcome.seconds  # an operator's: of all who compared it
        if outcome.failure:
            self.wrong.update([("property", prop.name)])
            self.wrong.update([("operator", name) for name in prop.operators])

    def rows(self) -> list[dict]:
        """Of each operator and each property that had a case."""
        found = []
        every = (("operator", self.problems, self.calls), ("property", self.cases, self.cases))
        for kind, problems, cases in every:
            for name in sorted(cases):
                seconds = round(self.seconds[kind, name])
                row = (
                    kind,
                    name,
                    problems[name],
                    cases[name],
                    self.wrong[kind, name],
                    seconds,
                    self.first,
                )
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
            for column in SUMS:
                new[column] = int(before[column]) + int(new[column])
            seeds = str(before["seeds"]).split()
            new["seeds"] = " ".join(dict.fromkeys([*seeds, str(new["seeds"])]))
        rows[new["kind"], new["name"]] = new
    return records.write(NAME, [rows[key] for key in sorted(rows)], folder)
