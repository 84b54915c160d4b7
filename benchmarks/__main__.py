# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks NAME`` measures; ``... tables`` makes tables and plots of it."""

from __future__ import annotations

import argparse
import gc
import importlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from . import (
    BENCHMARKS,
    CUDA_BENCHMARKS,
    agreement,
    cases_of,
    harness,
    machine,
    memory,
    plots,
    report,
    tables,
    targets,
)

ROUNDS, QUICK_ROUNDS = 40, 3
LEVELS = ("avx512", "avx2", "default")


def add_switches(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="small shapes, few rounds, no memory")
    one.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    one.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    one.add_argument("--level", choices=LEVELS, help="instruction-set level of ours (the best)")
    one.add_argument("--rounds", type=int, help=f"{ROUNDS} at most, with --quick {QUICK_ROUNDS}")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    for name in BENCHMARKS:
        one = commands.add_parser(name, help=f"time {name} beside PyTorch: a table and a CSV")
        where = f"default: benchmarks/results/{name}_DEVICE.csv, and that only for a full run"
        one.add_argument("--csv", type=Path, help=where)
        one.add_argument("--cases", nargs="+", metavar="NAME", help="only these")
        one.add_argument("--contenders", nargs="+", metavar="NAME", help="ours and these")
        add_switches(one)
    add_switches(commands.add_parser("all", help="every benchmark in turn, with these switches"))
    gpu = commands.add_parser("gpu", help="each figure that has a target on a GPU, in one process")
    gpu.add_argument("--csv", type=Path, required=True, help="written anew after every case")
    gpu.add_argument("--only", nargs="+", choices=CUDA_BENCHMARKS, metavar="NAME", help="of them")
    add_switches(gpu)
    gpu.set_defaults(device="cuda", cases=None, contenders=None)
    counts = commands.add_parser("compaction", help="what masking saves and what compaction does")
    counts.add_argument("--csv", type=Path, help="default: benchmarks/results/compaction.csv")
    pages = commands.add_parser(
        "tables", help="the pages' tables and plots anew from the CSV files"
    )
    pages.add_argument("--check", action="store_true", help="change nothing, fail if they differ")
    return top


def chosen_cases(wanted: argparse.Namespace) -> list[harness.Case]:
    every = cases_of(wanted.command, wanted.device, wanted.quick)
    names = [case.name for case in every]
    unknown = sorted(set(wanted.cases or ()) - set(names))
    if unknown:
        sys.exit(f"--cases must be among {', '.join(names)}, got {', '.join(unknown)}")
    return [case for case in every if not wanted.cases or case.name in wanted.cases]


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
    tables = []
    for view in case.tables():
        rows = report.case_rows(wanted.command, case, view, problem, agreements, samples, peaks)
        tables.append([{**row, **setting} for row in rows])
    return tables


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
            peak, trouble = memory.measure_apart(
                wanted.command, case.name, one.name, wanted.device, wanted.threads
            )
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


def is_refused(row: dict) -> bool:
    return row["status"].startswith("refused")


def csv_path(wanted: argparse.Namespace) -> Path | None:
    """Only a full run may replace the committed figures without being told so."""
    if wanted.csv or wanted.quick or wanted.cases or wanted.contenders or wanted.rounds:
        return wanted.csv
    level = f"_{wanted.level}" if wanted.level else ""
    return tables.RESULTS / f"{wanted.command}_{wanted.device}{level}.csv"


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


def print_table(table: list[dict]) -> None:
    print(report.case_table(table))
    for line in targets.lines_of(table) if table[0]["device"] != "cpu" else ():
        print(f"  {line}")
    print(flush=True)


def measure_all(wanted: argparse.Namespace) -> Iterator[list[dict]]:
    """Every case of one benchmark: its tables, as soon as it is measured."""
    level = machine.environment(wanted.device, wanted.threads)["capability"]
    for case in chosen_cases(wanted):
        elsewhere = case.level not in ("", level)
        yield from (measure_at_level if elsewhere else measure_case)(case, wanted)
        gc.collect()  # the data of a case may be in a cycle with what was compiled for it


def print_setting(wanted: argparse.Namespace) -> None:
    setting = machine.environment(wanted.device, wanted.threads)
    print(", ".join(f"{key} {value}" for key, value in setting.items()), end="\n\n")


def run_benchmark(wanted: argparse.Namespace) -> None:
    prepare(wanted)
    print_setting(wanted)
    rows = []
    for table in measure_all(wanted):
        rows += table
        print_table(table)
    if (path := csv_path(wanted)) is not None:
        report.write_csv(path, rows)
        print(f"written: {path}")
    end_refused(rows)


def run_gpu(wanted: argparse.Namespace) -> None:
    """All in one process, which starts once; a run that is ended early has written its figures."""
    prepare(wanted)
    print_setting(wanted)
    rows = []
    for name in wanted.only or CUDA_BENCHMARKS:
        for table in measure_all(argparse.Namespace(**{**vars(wanted), "command": name})):
            rows += table
            print_table(table)
            report.write_csv(wanted.csv, rows)
    print("\n".join(targets.lines_of(rows)))
    end_refused(rows)


def end_refused(rows: list[dict]) -> None:
    if refused := [f"{row['contender']} in {row['case']}" for row in rows if is_refused(row)]:
        sys.exit(f"refused, so not timed: {', '.join(refused)}")


def run_all(arguments: list[str]) -> None:
    """Each in a process of its own, so that none inherits another's memory or compiled code."""
    failed = []
    for name in BENCHMARKS:
        line = [sys.executable, "-m", "benchmarks", name, *arguments]
        if subprocess.run(line, cwd=tables.ROOT).returncode:
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    wanted = parser().parse_args(arguments)
    if wanted.command == "all":
        return run_all(arguments[1:])
    if wanted.command == "compaction":
        counts = importlib.import_module("benchmarks.compaction")
        return counts.run(wanted.csv or counts.PATH)
    if wanted.command == "gpu":
        return run_gpu(wanted)
    if wanted.command != "tables":
        return run_benchmark(wanted)
    try:
        trouble = tables.update(check=wanted.check) or plots.update(check=wanted.check)
    except (OSError, ValueError) as error:
        trouble = str(error)
    if trouble:
        sys.exit(trouble)


if __name__ == "__main__":
    main()
