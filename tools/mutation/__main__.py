# SPDX-License-Identifier: BSD-3-Clause
"""Put wrong lines into a copy of the tree, one at a time, and see which test of their room says so.

The copy is build/mutation/tree; the working tree is not touched. What docs/trust/mutation.csv has
as caught is not run again (--fresh: it is), so a run that was stopped goes on where it was. At the
end the tests that failed run once more, on the lines as they are: all have to pass.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .. import records
from .mutant import Mutant
from .rooms import ROOMS
from .table import MUTANTS
from .tree import Tree

ROOT = Path(__file__).resolve().parents[2]
NAME = "mutation"
CAUGHT, SURVIVED, NOT_BUILT, OUT_OF_TIME = "caught", "survived", "did not build", "timed out"
BUILD_S = 1800
RAN = ("outcome", "caught_by", "seconds")  # the cells that running a mutant fills

Row = dict[str, str]


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m tools.mutation", description=__doc__)
    top.add_argument("--only", nargs="+", type=int, metavar="N", help="those of these numbers")
    top.add_argument("--room", nargs="+", choices=ROOMS, metavar="ROOM", help=", ".join(ROOMS))
    top.add_argument("--fresh", action="store_true", help="those that were caught before, too")
    top.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    top.add_argument("--seconds", type=float, default=900, help="for the tests of one (900)")
    return top


def key_of(row: Row) -> tuple[str, str]:
    return row["place"], row["what"]


def row_of(number: int, mutant: Mutant) -> Row:
    row = {"number": str(number), "part": mutant.part, "place": mutant.place, "what": mutant.what}
    return row | {"room": mutant.room, **dict.fromkeys(RAN, ""), "why": mutant.why}


def line_of(row: Row) -> str:
    return f"{row['number']:>3}  {row['outcome']:13}  {row['place']}: {row['what']}"


def outcome_of(tree: Tree, mutant: Mutant, seconds: float) -> Row:
    """The cells of RAN."""
    started = time.monotonic()
    with tree.applied(mutant):
        built = tree.build(BUILD_S)
        if built.code != 0:
            print(built.said, file=sys.stderr)
            outcome, test = NOT_BUILT, ""
        else:
            ended, test = tree.test(ROOMS[mutant.room], seconds)
            outcome = {None: OUT_OF_TIME, 0: SURVIVED}.get(ended.code, CAUGHT)
    taken = f"{time.monotonic() - started:.0f}"
    return {"outcome": outcome, "caught_by": test, "seconds": taken}


def chosen(arguments: argparse.Namespace, rows: Sequence[Row]) -> list[int]:
    return [
        i
        for i, row in enumerate(rows)
        if (arguments.only is None or i + 1 in arguments.only)
        and (arguments.room is None or row["room"] in arguments.room)
        and (arguments.fresh or arguments.only is not None or row["outcome"] != CAUGHT)
    ]


def known_rows() -> list[Row]:
    """A row for each mutant, with what the table of the last run has of it."""
    try:
        known = {key_of(row): row for row in records.read(NAME)}
    except FileNotFoundError:
        known = {}
    rows = [row_of(i, mutant) for i, mutant in enumerate(MUTANTS, 1)]
    for row in rows:
        old = known.get(key_of(row), {})
        row.update({name: old.get(name, "") for name in RAN})
    return rows


def false_alarms(tree: Tree, rows: Sequence[Row], seconds: float) -> str:
    """Of the tests that are said to have caught something the first that fails anyway, or ""."""
    tests = sorted({row["caught_by"] for row in rows if row["outcome"] == CAUGHT})
    if not tests:
        return ""
    built = tree.build(BUILD_S)
    if built.code != 0:
        raise RuntimeError(built.said)
    ended, test = tree.test(tests, seconds)
    return "one of the tests" if ended.code is None else test


def summary(rows: Sequence[Row]) -> str:
    counts = {}
    for row in rows:
        counts[row["outcome"] or "not run"] = counts.get(row["outcome"] or "not run", 0) + 1
    return f"{len(rows)} mutants: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))


def main(given: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(given)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end what it has started
    rows = known_rows()
    if arguments.list:
        for row in rows:
            print(line_of(row))
        return 0
    wanted = chosen(arguments, rows)
    tree = Tree(ROOT, ROOT / "build" / "mutation" / "tree")
    built = tree.build(BUILD_S)
    if built.code != 0:
        raise RuntimeError(built.said)
    progress = tqdm(wanted, unit="mutant", file=sys.stderr)
    for i in progress:
        progress.set_description(f"{i + 1} {MUTANTS[i].place}")
        rows[i].update(outcome_of(tree, MUTANTS[i], arguments.seconds))
        progress.write(line_of(rows[i]))
        records.write(NAME, rows)
    print("once more, without any: the tests that failed", file=sys.stderr)
    test = false_alarms(tree, [rows[i] for i in wanted], 4 * arguments.seconds)
    print(summary(rows))
    if test:
        print(f"{test} fails without any mutant, so that it catches none")
        for row in rows:
            if row["caught_by"] == test:
                row["outcome"] = ""
        records.write(NAME, rows)
    unexplained = [row for row in rows if row["outcome"] != CAUGHT and not row["why"]]
    return 1 if unexplained or test else 0


if __name__ == "__main__":
    sys.exit(main())
