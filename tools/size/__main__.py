# SPDX-License-Identifier: BSD-3-Clause
"""Time and peak memory of calls at the far ends of their sizes, and by which power they grow.

``python -m tools.size`` prints them, ``--record`` writes docs/trust/size.csv too; names pick some.
Each size is measured in a process of its own, with one thread: the least of three processor times,
and the rise of the resident memory above what the inputs take.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.memory import peak_extra_bytes

from .. import records
from .cases import BY_NAME, CASES, Case

ROUNDS = 3
SMALLEST_MEBIBYTES = 1  # below this the pages that any call touches are most of it


def measured(case: Case, n: int) -> dict[str, float]:
    """In this process."""
    torch.set_num_threads(1)
    step = case.make(n)
    peak = peak_extra_bytes(step)
    times = []
    for _ in range(ROUNDS):
        started = time.process_time()
        step()
        times.append(time.process_time() - started)
    return {"n": n, "seconds": min(times), "mebibytes": peak / 2**20}


def measured_apart(case: Case, n: int) -> dict[str, float]:
    """In one where every large block is mapped afresh, as benchmarks.memory has it."""
    block = str(1 << 16)
    done = subprocess.run(
        [sys.executable, "-m", __package__, "--one", case.name, str(n)],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": block, "MALLOC_TRIM_THRESHOLD_": block},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{case.name}, n = {n}: exit code {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def power(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The p of values ~ sizes^p: the slope of a straight line through the logarithms."""
    x = [math.log(size) for size in sizes]
    y = [math.log(max(value, 1e-9)) for value in values]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - middle_x) ** 2 for a in x
    )


def row(case: Case, found: Sequence[dict[str, float]]) -> dict[str, object]:
    """What is recorded of a case."""
    sizes = [one["n"] for one in found]
    last = found[-1]
    large = last["mebibytes"] >= SMALLEST_MEBIBYTES
    return {
        "case": case.name,
        "grows": case.grows,
        "smallest": sizes[0],
        "largest": sizes[-1],
        "seconds": f"{last['seconds']:.3g}",
        "mebibytes": f"{last['mebibytes']:.3g}",
        "time_power": f"{power(sizes, [one['seconds'] for one in found]):.2f}",
        "memory_power": f"{power(sizes, [one['mebibytes'] for one in found]):.2f}" * large,
    }


def show(found: dict[str, object]) -> None:
    text = "{case:32} {largest:>9} {grows:10} {seconds:>7} s ~ n^{time_power}"
    text += "  {mebibytes:>7} MiB" + " ~ n^{memory_power}" * bool(found["memory_power"])
    tqdm.write(text.format(**found))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.size", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="some of them; without: all")
    parser.add_argument("--record", action="store_true", help="write docs/trust/size.csv as well")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, n = options.cases
        print(json.dumps(measured(BY_NAME[name], int(n))))
        return
    unknown = sorted(set(options.cases) - set(BY_NAME))
    if unknown:
        parser.error(f"no case is called {', '.join(unknown)}; there are {', '.join(BY_NAME)}")
    if options.record and options.cases:
        parser.error("--record is of all cases")
    rows = []
    for case in tqdm([c for c in CASES if not options.cases or c.name in options.cases]):
        rows.append(row(case, [measured_apart(case, n) for n in case.sizes]))
        show(rows[-1])
    if options.record:
        print(f"written: {records.write('size', rows)}")


if __name__ == "__main__":
    main()
