# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.trust`` prints what was counted; ``--write`` puts it into docs/trust.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from . import documents, records

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "trust.md"
NOT_COUNTED = "Not counted yet.\n"
Rows = Sequence[dict[str, str]]
Table = Iterable[Sequence[str]]


def columns(*left_out: str) -> Callable[[Rows], Table]:
    """Every line, every column but these."""

    def shown(rows: Rows) -> Table:
        kept = [name for name in rows[0] if name not in left_out]
        yield kept
        yield from ([row[name] for name in kept] for row in rows)

    return shown


def summed(rows: Rows, kind: str, group_of: Callable[[dict[str, str]], str]) -> Table:
    """The numbers of each group's lines added up; columns of words are left out."""
    numbers = [name for name in rows[0] if all(row[name].isdigit() for row in rows)]
    yield [kind, *numbers]
    for group in dict.fromkeys(map(group_of, rows)):
        of = [row for row in rows if group_of(row) == group]
        yield [group, *(str(sum(int(row[name]) for row in of)) for name in numbers)]


def kind_of_function(row: dict[str, str]) -> str:
    name = row["function"]
    if name.startswith("ops."):
        return "operators, through torch.ops"
    return "constructors" if name.endswith("()") else "functions, and calls of modules"


def invalid(rows: Rows) -> Table:
    return summed(rows, "arguments of", kind_of_function)


PRODUCTS = "calls with products of ATen"


def determinism(rows: Rows) -> Table:
    """Two lines for each condition: what is ours alone, and what multiplies by ATen."""
    yield ["condition", "calls", "runs", "that differ", "by", "with products", "that differ", "by"]
    for condition in dict.fromkeys(row["condition"] for row in rows):
        cells = [condition]
        for ours in (True, False):
            of = [r for r in rows if r["condition"] == condition]
            of = [r for r in of if (r["calls of"] != PRODUCTS) == ours]
            most = max((float(r["largest difference"]) for r in of), default=0.0)
            names = (
                ("calls", "runs", "calls that differ") if ours else ("calls", "calls that differ")
            )
            cells += [str(sum(int(r[name]) for r in of)) for name in names]
            cells.append(f"{most:.1e}" if most else "0")
        yield cells


def compilers(rows: Rows) -> Table:
    yield ["compiler", "version", "packed products by level", "tests passed at each", "failed"]
    for name in dict.fromkeys(row["compiler"] for row in rows):
        of = [row for row in rows if row["compiler"] == name]
        packed = ", ".join(f"{row['level']} {row['packed_products']}" for row in of)
        passed = ", ".join(dict.fromkeys(row["passed"] for row in of))
        yield [name, of[0]["version"], packed, passed, str(sum(int(r["failed"]) for r in of))]


def mutation(rows: Rows) -> Table:
    outcomes = list(dict.fromkeys(row["outcome"] or "not run" for row in rows))
    yield ["part", "wrong lines", *outcomes]
    for part in [*dict.fromkeys(row["part"] for row in rows), "all"]:
        of = [row["outcome"] or "not run" for row in rows if part in (row["part"], "all")]
        yield [part, str(len(of)), *(str(of.count(outcome)) for outcome in outcomes)]


# name of a CSV -> what of it is shown
SHOWN: dict[str, Callable[[Rows], Table]] = {
    "fuzz": columns("seconds", "seeds"),
    "invalid": invalid,
    "malformed": columns(),
    "never_read": columns("excluded"),
    "determinism": determinism,
    "sanitize": columns(),
    "memory": columns(),
    "size": columns(),
    "matrix": columns("environment"),
    "compilers": compilers,
    "aarch64": columns(),
    "mutation": mutation,
    "coverage": columns(),
}


def table(name: str) -> str:
    if not (records.FOLDER / f"{name}.csv").exists():
        return NOT_COUNTED
    return documents.markdown(SHOWN[name](records.read(name)))


def main(arguments: Sequence[str] | None = None) -> None:
    made = {name: partial(table, name) for name in SHOWN}
    documents.run("python -m tools.trust", DOCUMENT, made, arguments, __doc__)


if __name__ == "__main__":
    main()
