# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.bits`` runs the tables of test_never_read.py and test_determinism.py at length
and writes what it found to docs/trust/never_read.csv and docs/trust/determinism.csv (~ 5 min)."""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import tempfile
from pathlib import Path

from tools import records

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/common")]

import bit_conditions  # noqa: E402
import torch  # noqa: E402
from bit_calls import has_products, table  # noqa: E402
from tqdm import tqdm  # noqa: E402

REPEATS = 100
GROUPS = ("operators", "functions", "unified modules", "calls with products of ATen")


def never_read():
    """One row per operator: a call of it is a forward or a backward pass."""
    from excluded_cases import FAMILIES

    from tests.contracts.test_never_read import counted, run_closed

    found = collections.defaultdict(collections.Counter)
    arguments = collections.defaultdict(set)
    cases = [case for family in FAMILIES for case in family()]
    for case, at_end in tqdm(list(itertools.product(cases, (False, True))), "closed pages"):
        results, size = run_closed(case, at_end)
        pairs = zip(results, case.results(), strict=False)
        found[case.operator]["differing bits"] += sum(
            bit_conditions.differing_bits([a], [b]) for a, b in pairs
        )
        found[case.operator]["bytes closed"] += size
        arguments[case.operator] |= set(case.excluded)
    for row in counted()["rows"]:
        of = found[row["operator"]]
        of["calls"] += 1
        of["bytes counted"] += row["unread"]
        of["zeros written once"] += row["zeroed"]
        of["wrong"] += len(row["wrong"])
    names = (
        "calls",
        "bytes closed",
        "differing bits",
        "bytes counted",
        "zeros written once",
        "wrong",
    )
    return [
        {
            "operator": name,
            "excluded": " ".join(sorted(arguments[name])),
            **{n: c[n] for n in names},
        }
        for name, c in sorted(found.items())
    ]


def group_of(name):
    if has_products(name):
        return GROUPS[3]
    return GROUPS[{"operator": 0, "unified": 2}.get(name.split()[0], 1)]


def compared(condition, found, expected):
    """A row per group of calls: of how many the bits differed in some run, and by how much."""
    rows = {}
    for name, runs in found.items():
        row = rows.setdefault(group_of(name), {
            "condition": condition, "calls": 0, "runs": 0, "calls that differ": 0,
            "differing bits": 0, "largest difference": 0.0,
        })  # fmt: skip
        right = expected[name]
        if runs[0] and runs[0][0].dtype != right[0].dtype or "process" in condition:
            right = bit_conditions.as_integers(right)
        bits = [bit_conditions.differing_bits(right, run) for run in runs]
        far = max((bit_conditions.largest_difference(right, run) for run in runs), default=0.0)
        row["calls"] += 1
        row["runs"] += len(runs)
        row["calls that differ"] += any(bits)
        row["differing bits"] += sum(bits)
        row["largest difference"] = max(row["largest difference"], far)
    return [
        {"calls of": group, **row, "largest difference": f"{row['largest difference']:.1e}"}
        for group, row in sorted(rows.items(), key=lambda pair: GROUPS.index(pair[0]))
    ]


def repeated(calls):
    """A hundred runs of each, one call at a time: all results of all runs would be too many."""
    rows, condition = [], f"{REPEATS} repeats with 2 threads"
    for name, call in tqdm(calls.items(), f"{REPEATS} repeats"):
        first, *runs = (call() for _ in range(REPEATS))
        rows += compared(condition, {name: runs}, {name: first})
    together = {}
    for row in rows:
        into = together.setdefault(row["calls of"], {**row, "calls": 0, "runs": 0,
                                   "calls that differ": 0, "differing bits": 0})  # fmt: skip
        for key in ("calls", "runs", "calls that differ", "differing bits"):
            into[key] += row[key]
        into["largest difference"] = max(
            into["largest difference"], row["largest difference"], key=float
        )
    return [together[group] for group in GROUPS if group in together]


def determinism():
    small, every = table(), table(("small", "wide", "many"))
    torch.set_num_threads(1)
    expected = {name: call() for name, call in tqdm(every.items(), "one thread")}
    fixed = {name: call for name, call in small.items() if not call.is_random()}
    rows = compared("1, 2, 3 and 8 threads", bit_conditions.threads(every), expected)
    torch.set_num_threads(2)
    rows += repeated(table(("many",)))
    torch.set_num_threads(1)
    ways = {
        "child process by fork": lambda: bit_conditions.forked(small),
        "worker process of a DataLoader": lambda: bit_conditions.loader_workers(small),
        "4 Python threads, other inputs": lambda: bit_conditions.python_threads(fixed, False),
        "4 Python threads, same inputs": lambda: bit_conditions.python_threads(fixed, True),
        "deterministic algorithms": lambda: bit_conditions.deterministic(small, False),
        "deterministic algorithms, warn_only": lambda: bit_conditions.deterministic(small, True),
    }
    for condition, run in tqdm(ways.items(), "conditions"):
        rows += compared(condition, run(), expected)
    with tempfile.TemporaryDirectory() as folder:
        for level in bit_conditions.LEVELS[:2]:
            found = bit_conditions.at_level(level, Path(folder) / level, "")
            found.pop("level")
            best = torch.ops.masked_loss_ext.cpu_capability()
            runs = {name: [result] for name, result in found.items()}
            rows += compared(f"level {level} beside {best}", runs, expected)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser("python -m tools.bits", description=__doc__)
    parser.add_argument("only", nargs="?", choices=["never_read", "determinism"])
    only = parser.parse_args().only
    for name, count in (("never_read", never_read), ("determinism", determinism)):
        if only in (None, name):
            print(records.write(name, count()))


if __name__ == "__main__":
    main()
