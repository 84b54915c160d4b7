# SPDX-License-Identifier: BSD-3-Clause
"""One case from its data to its tables: contenders checked, timed in turn, then weighed."""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from . import agreement, harness, machine, memory, report, tables, targets

ROUNDS, QUICK_ROUNDS = 40, 3


def entrants_of(problem: harness.Problem, names: list[str] | None) -> list[harness.Contender]:
    """Ours, plain and with options, and the chosen of the others."""
    return [
        one
        for one in problem.contenders
        if not names or one.name.startswith("ours") or one.name in names
    ]


def measure_case(case: harness.Case, wanted: argparse.Namespace) -> list[list[dict]]:
    """Check, time, then weigh one case: its rows, table by table."""
    problem = case.make()
    entrants = entrants_of(problem, wanted.contenders)
    problem = replace(problem, contenders=entrants)  # nobody else is named either
    truth = agreement.truth_of(problem)
    attempted = [one for one in entrants if not one.skip]
    agreements = {one.name: agreement.check(one, truth, problem) for one in attempted}
    del truth  # as large as the data, and no contender needs it
    timed = [one for one in attempted if not agreements[one.name].refusal]
    rounds = wanted.rounds or (QUICK_ROUNDS if wanted.quick else case.rounds or ROUNDS)
    with machine.NeighbourMeter() as neighbours:
        samples = harness.interleave([*timed, *problem.beside], wanted.device, rounds)
    if neighbours.crowded(wanted.threads):
        others = f"{neighbours.other_cores:.2f} cores busy with other programs"
        print(f"! {others} while {case.name} was timed: the figures are not sound", file=sys.stderr)
    information = [one for one in problem.beside if one.role == "information"]
    weighed = [one for one in [*timed, *information] if one.weigh]
    peaks = {} if wanted.quick else peaks_of(case, problem, weighed, wanted)
    setting = {"other_cores": neighbours.other_cores}
    setting |= machine.environment(wanted.device, wanted.threads)
    found = []
    for view in case.tables():
        rows = report.case_rows(wanted.command, case, view, problem, agreements, samples, peaks)
        found.append([{**row, **setting} for row in rows])
    return found


def peaks_of(
    case: harness.Case,
    problem: harness.Problem,
    contenders: list[harness.Contender],
    wanted: argparse.Namespace,
) -> dict[str, int]:
    found: dict[str, int] = {}
    if not case.weigh or 0 < problem.gradient_bytes < memory.SMALLEST_GRADIENT:
        return found
    for one in contenders:
        if wanted.device == "cuda":  # PyTorch's allocator knows, and a process takes seconds
            peak, trouble = memory.peak_of(one, wanted.device), ""
        else:
            about = (wanted.command, case.name, one.name, wanted.device, wanted.threads)
            peak, trouble = memory.measure_apart(*about, case.made_of)
        if peak is None:
            print(f"peak memory of {one.name} not measured: {trouble}", file=sys.stderr)
        else:
            found[one.name] = peak - problem.left_bytes
    return found


def measure_at_level(case: harness.Case, wanted: argparse.Namespace) -> list[list[dict]]:
    """The same in a process of its own: the library takes its level once, when it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        line = [sys.executable, "-m", "benchmarks", wanted.command, "--level", case.level]
        line += ["--cases", case.name, "--csv", str(path), "--threads", str(wanted.threads)]
        line += ["--quick"] * wanted.quick
        line += ["--rounds", str(wanted.rounds)] if wanted.rounds else []
        line += ["--contenders", *wanted.contenders] if wanted.contenders else []
        done = subprocess.run(line, cwd=tables.ROOT, stdout=subprocess.DEVNULL)
        if not path.exists():
            sys.exit(f"{case.name} could not be measured (exit status {done.returncode})")
        rows = report.read_csv(path)
    return list(tables.by_case(rows).values())


def print_table(table: list[dict]) -> None:
    print(report.case_table(table))
    for line in targets.lines_of(table) if table[0]["device"] != "cpu" else ():
        print(f"  {line}")
    print(flush=True)


def measure_all(cases: Iterable[harness.Case], wanted: argparse.Namespace) -> Iterator[list[dict]]:
    """Every case: its tables, as soon as it is measured."""
    level = machine.environment(wanted.device, wanted.threads)["capability"]
    for case in cases:
        elsewhere = case.level not in ("", level)
        yield from (measure_at_level if elsewhere else measure_case)(case, wanted)
        gc.collect()  # the data of a case may be in a cycle with what was compiled for it


def prepare(wanted: argparse.Namespace) -> None:
    if wanted.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device here")
    # Before anything is compiled: the compiler writes the number of threads into its code.
    torch.set_num_threads(wanted.threads)
    if wanted.level:
        try:
            machine.take_level(wanted.level)
        except ValueError as error:
            sys.exit(f"--level: {error}")


def print_setting(wanted: argparse.Namespace) -> None:
    setting = machine.environment(wanted.device, wanted.threads)
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")


def is_refused(row: dict) -> bool:
    return row["status"].startswith("refused")


def end_refused(rows: list[dict]) -> None:
    if refused := [f"{row['contender']} in {row['case']}" for row in rows if is_refused(row)]:
        sys.exit(f"refused, so not timed: {', '.join(refused)}")
