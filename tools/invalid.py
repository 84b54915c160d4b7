# SPDX-License-Identifier: BSD-3-Clause
"""``python -m tools.invalid`` makes every wrong call of the table in tests/invalid/, of which the
tests make a share: eagerly, as fake tensors and under torch.compile, of functions, modules and
operators. It prints what is not refused as promised; ``--write`` counts in docs/trust/invalid.csv.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import warnings
from collections import Counter
from collections.abc import Sequence

from tests.invalid import calling, table

from . import records


def counted(
    entry: calling.Entry, modes: Sequence[str], compiled: int | None
) -> tuple[Counter[str], list[str]]:
    """How many arguments, ways and calls there are, and what is wrong with them. compiled: so many
    ways of each argument are compiled, None: all."""
    count: Counter[str] = Counter()
    problems = []
    for argument in [name for name in entry.parameters() if name in entry.arguments]:
        count["arguments"] += 1
        ways = entry.ways(argument)
        few = range(len(ways))
        if compiled is not None:
            few = random.Random(f"{entry.id} {argument}").sample(few, min(len(few), compiled))
        for i, way in enumerate(ways):
            count["wrong ways" if way.is_wrong else "right ways"] += 1
            for mode in [mode for mode in modes if mode in entry.modes]:
                if mode == "compile" and i not in few:
                    continue
                found = calling.problem(entry, argument, way, mode)
                if found is None:  # no such call
                    continue
                count["ops" if entry.alone else mode] += 1
                if found:
                    problems.append(f"{entry.id} {mode}: {argument} {way.name}: {found}")
    return count, problems


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m tools.invalid", description=__doc__)
    parser.add_argument("--mode", action="append", choices=list(calling.MODES), help="not all")
    parser.add_argument("--entry", default="", help="those whose name begins so")
    parser.add_argument("--compiled", type=int, help="ways of each argument to compile, not all")
    parser.add_argument("--write", action="store_true", help="into docs/trust/invalid.csv")
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)  # PyTorch's, of what no fake can be made of
    rows, wrong = [], []
    columns = ("arguments", "wrong ways", "right ways", "eager", "ops", "fake", "compile")
    for entry in table.ENTRIES:
        if not entry.id.startswith(asked.entry):
            continue
        count, problems = counted(entry, asked.mode or list(calling.MODES), asked.compiled)
        row = {"function": entry.id, **{name: count[name] for name in columns}}
        rows.append(row | {"problems": len(problems)})
        wrong += problems
        print(*rows[-1].values(), flush=True)
        print(*problems, sep="\n", end="\n" if problems else "", flush=True)
    total = {name: sum(row[name] for row in rows) for name in columns}
    print(*(f"{name}: {number}" for name, number in total.items()), f"problems: {len(wrong)}")
    if asked.write:
        print(records.write("invalid", rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
