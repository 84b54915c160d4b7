# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks NAME`` measures one loss; ``python -m benchmarks --workload NAME`` shapes
of models, or your own (``--list`` says which, ``workloads --help`` how); ``... tables`` makes
tables and plots of what is committed."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from pathlib import Path

from . import (
    BENCHMARKS,
    CUDA_BENCHMARKS,
    cases_of,
    harness,
    measure,
    plots,
    report,
    tables,
    targets,
    workload_command,
)
from .measure import QUICK_ROUNDS, ROUNDS

LEVELS = ("avx512", "avx2", "default")


def add_switches(one: argparse.ArgumentParser) -> None:
    one.add_argument("--quick", action="store_true", help="few rounds of small shapes, no memory")
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
    about = "shapes of models, or your own; the word may be left away before its flags"
    shapes = commands.add_parser(
        workload_command.COMMAND,
        help=about,
        description=workload_command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    workload_command.add_arguments(shapes)
    add_switches(shapes)
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


def csv_path(wanted: argparse.Namespace) -> Path | None:
    """Only a full run may replace the committed figures without being told so."""
    if wanted.csv or wanted.quick or wanted.cases or wanted.contenders or wanted.rounds:
        return wanted.csv
    level = f"_{wanted.level}" if wanted.level else ""
    return tables.RESULTS / f"{wanted.command}_{wanted.device}{level}.csv"


def run_benchmark(wanted: argparse.Namespace) -> None:
    measure.prepare(wanted)
    measure.print_setting(wanted)
    rows = []
    for table in measure.measure_all(chosen_cases(wanted), wanted):
        rows += table
        measure.print_table(table)
    if (path := csv_path(wanted)) is not None:
        report.write_csv(path, rows)
        print(f"written: {path}")
    measure.end_refused(rows)


def run_gpu(wanted: argparse.Namespace) -> None:
    """All in one process, which starts once; a run that is ended early has written its figures."""
    measure.prepare(wanted)
    measure.print_setting(wanted)
    rows = []
    for name in wanted.only or CUDA_BENCHMARKS:
        one = argparse.Namespace(**{**vars(wanted), "command": name})
        for table in measure.measure_all(chosen_cases(one), one):
            rows += table
            measure.print_table(table)
            report.write_csv(wanted.csv, rows)
    print("\n".join(targets.lines_of(rows)))
    measure.end_refused(rows)


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
    if arguments and arguments[0].startswith("--") and arguments[0] != "--help":
        arguments = [workload_command.COMMAND, *arguments]
    wanted = parser().parse_args(arguments)
    if wanted.command == workload_command.COMMAND:
        return workload_command.run(wanted)
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
