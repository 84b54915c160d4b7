# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks NAME`` measures; ``... readme`` puts what was measured in README.md."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch

from . import BENCHMARKS, harness, machine, memory, readme, report

ROUNDS, QUICK_ROUNDS = 40, 3


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in BENCHMARKS:
        one = commands.add_parser(name, help=f"time {name} beside PyTorch: a table and a CSV")
        where = f"default: benchmarks/results/{name}_DEVICE.csv, and that only for a full run"
        one.add_argument("--csv", type=Path, help=where)
        one.add_argument("--quick", action="store_true", help="small shapes, few rounds, no memory")
        one.add_argument("--cases", nargs="+", metavar="NAME", help="only these")
        one.add_argument("--contenders", nargs="+", metavar="NAME", help="ours and these")
        one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        one.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
        one.add_argument("--rounds", type=int, help=f"default {ROUNDS}, quick {QUICK_ROUNDS}")
    tables = commands.add_parser("readme", help="make README.md's tables anew from the CSV files")
    tables.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    return top


def chosen_cases(module: ModuleType, wanted: argparse.Namespace) -> list[harness.Case]:
    every = module.cases(wanted.device, wanted.quick)
    names = [case.name for case in every]
    unknown = sorted(set(wanted.cases or ()) - set(names))
    if unknown:
        sys.exit(f"--cases must be among {', '.join(names)}, got {', '.join(unknown)}")
    return [case for case in every if not wanted.cases or case.name in wanted.cases]


def measure_case(case: harness.Case, wanted: argparse.Namespace) -> list[dict]:
    """Check, time, then weigh one case."""
    problem = case.make()
    entrants = [
        one
        for one in problem.contenders
        if not wanted.contenders or one.name == "ours" or one.name in wanted.contenders
    ]
    truth = harness.truth_of(problem)
    agreements = {one.name: harness.check(one, truth) for one in entrants}
    del truth  # as large as the data, and no contender needs it
    timed = [one for one in entrants if not agreements[one.name].refusal]
    timed.append(harness.plain_copy(problem.bytes_moved, wanted.device))
    timed.append(harness.fresh_fill(problem.gradient_bytes, wanted.device))
    rounds = wanted.rounds or (QUICK_ROUNDS if wanted.quick else ROUNDS)
    with machine.NeighbourMeter() as neighbours:
        samples = harness.interleave(timed, wanted.device, rounds)
    if neighbours.crowded(wanted.threads):
        others = f"{neighbours.other_cores:.2f} cores busy with other programs"
        print(f"! {others} while {case.name} was timed: the figures are not sound", file=sys.stderr)
    rows = report.case_rows(wanted.command, case, problem, agreements, samples)
    rows = [row for row in rows if row["contender"] in agreements or row["contender"] in samples]
    for row in rows:
        row["other_cores"] = neighbours.other_cores
    if not wanted.quick and problem.gradient_bytes >= memory.SMALLEST_GRADIENT:
        add_peaks(rows, {one.name for one in timed if one.weigh}, wanted)
    return rows


def add_peaks(rows: list[dict], weighed: set[str], wanted: argparse.Namespace) -> None:
    for row in rows:
        if row["contender"] not in weighed:
            continue
        peak, trouble = memory.measure_apart(
            row["benchmark"], row["case"], row["contender"], wanted.device, wanted.threads
        )
        if peak is None:
            print(f"peak memory of {row['contender']} not measured: {trouble}", file=sys.stderr)
            continue
        row["peak_extra_bytes"] = peak
        row["peak_over_gradient"] = peak / row["gradient_bytes"]


def is_refused(row: dict) -> bool:
    return row["status"] != "timed"


def csv_path(wanted: argparse.Namespace) -> Path | None:
    """Only a full run may replace the committed figures without being told so."""
    if wanted.csv or wanted.quick or wanted.cases or wanted.contenders or wanted.rounds:
        return wanted.csv
    return readme.RESULTS / f"{wanted.command}_{wanted.device}.csv"


def run_benchmark(wanted: argparse.Namespace) -> None:
    if wanted.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here")
    # Before anything is compiled: the compiler writes the number of threads into its code.
    torch.set_num_threads(wanted.threads)
    module = importlib.import_module(f"benchmarks.{wanted.command}")
    setting = machine.environment(wanted.device, wanted.threads)
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")
    rows = []
    for case in chosen_cases(module, wanted):
        measured = measure_case(case, wanted)
        rows += [{**row, **setting} for row in measured]
        print(report.case_table(measured), end="\n\n", flush=True)
    if (path := csv_path(wanted)) is not None:
        report.write_csv(path, rows)
        print(f"written: {path}")
    if refused := [f"{row['contender']} in {row['case']}" for row in rows if is_refused(row)]:
        sys.exit(f"refused, so not timed: {', '.join(refused)}")


def main(arguments: list[str] | None = None) -> None:
    wanted = parser().parse_args(arguments)
    if wanted.command != "readme":
        run_benchmark(wanted)
        return
    try:
        trouble = readme.update(check=wanted.check)
    except (OSError, ValueError) as error:
        trouble = f"README.md: {error}"
    if trouble:
        sys.exit(trouble)


if __name__ == "__main__":
    main()
