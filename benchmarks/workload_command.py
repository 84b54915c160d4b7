# SPDX-License-Identifier: BSD-3-Clause
"""``python -m benchmarks --workload NAME``: shapes of models, or your own, beside what is there.

python -m benchmarks --list                        workloads, contenders, what is left out and why
python -m benchmarks --workload gpt2 mae           these; "all" for all
python -m benchmarks --rows 512 --classes 32000 --hidden 1024 --ignored 0.25    your own shape
python -m benchmarks --scale N V --plot curves.svg --csv curves.csv             times by size
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from . import curves, linear_rivals, machine, measure, report, rivals, sweep, tables, workloads
from . import workload_problems as problems
from .workloads import Workload

COMMAND = "workloads"
OWN_AXES = ("rows", "hidden", "classes")
ALL = "all"
# Of PyTorch alone: always there.
PLAIN = ("eager", "compile", ".float()", "compiled .float()", "boolean indexing")
LIBRARIES: Mapping[str, rivals.Library] = {
    **linear_rivals.MEANS,
    **problems.LOGITS,
    **problems.POLICIES,
}


def add_arguments(one: argparse.ArgumentParser) -> None:
    one.add_argument("--list", action="store_true", help="say what there is, measure nothing")
    names = (*workloads.NAMES, ALL)
    one.add_argument("--workload", nargs="+", choices=names, metavar="NAME", help="see --list")
    for axis in OWN_AXES:
        about = f"{axis} of a shape of your own, or in place of the workload's"
        one.add_argument(f"--{axis}", type=int, metavar="COUNT", help=about)
    one.add_argument("--dtype", choices=workloads.DTYPES, help="float32, on a GPU bfloat16")
    one.add_argument("--ignored", type=float, metavar="SHARE", help="of the rows, 0 to 1 (0)")
    about = f"one workload at several sizes ({sweep.BASE} where none is named)"
    one.add_argument("--scale", nargs="+", choices=sweep.AXES, help=about)
    one.add_argument("--plot", type=Path, metavar="FILE", help="with --scale: the curves, as SVG")
    default = f"default: benchmarks/results/{COMMAND}_DEVICE.csv, with `--workload all` alone"
    one.add_argument("--csv", type=Path, help=default)
    one.add_argument("--contenders", nargs="+", metavar="NAME", help="ours and these")


def refuse(words: str) -> None:
    sys.exit(f"python -m benchmarks: {words}")


# --- what is wanted ------------------------------------------------------------------------------


def own_values(wanted: argparse.Namespace) -> dict[str, int]:
    found = {axis: getattr(wanted, axis) for axis in OWN_AXES}
    return {axis: value for axis, value in found.items() if value is not None}


def check(wanted: argparse.Namespace) -> None:
    for axis, value in own_values(wanted).items():
        if value < 1:
            refuse(f"--{axis} must be at least 1, got {value}")
    if wanted.ignored is not None and not 0 <= wanted.ignored < 1:
        refuse(f"--ignored must be at least 0 and below 1, got {wanted.ignored}")
    if wanted.plot and not wanted.scale:
        refuse("--plot must come with --scale")
    if wanted.scale and len(wanted.workload or ()) > 1:
        refuse(f"--scale must have one workload, got {' '.join(wanted.workload)}")
    known = {"ours", *PLAIN, *LIBRARIES, *rivals.LIBRARIES}
    if unknown := sorted(set(wanted.contenders or ()) - known):
        refuse(f"--contenders must be among {', '.join(sorted(known))}, got {', '.join(unknown)}")


def own_workload(values: dict[str, int]) -> Workload:
    """Without hidden numbers the logits are given."""
    kind = "head" if "hidden" in values else "logits"
    if missing := [f"--{axis}" for axis in ("rows", "classes") if axis not in values]:
        refuse(f"a shape of your own must have {' and '.join(missing)} too")
    shape = tuple(values[axis] for axis in workloads.KINDS[kind].axes)
    return Workload("own", kind, shape, "given by flags")


def with_flags(one: Workload, wanted: argparse.Namespace) -> Workload:
    """The workload with what the flags say of it; what it has no place for is refused."""
    kind, values = workloads.KINDS[one.kind], own_values(wanted)
    takes = {**dict.fromkeys(kind.axes, True), "dtype": kind.has_dtype}
    takes["ignored"] = kind.has_ignored
    given = [*values, *(name for name in ("dtype", "ignored") if getattr(wanted, name) is not None)]
    if unused := [f"--{name}" for name in given if not takes.get(name)]:
        refuse(f"{one.name} has no place for {', '.join(unused)}")
    if wanted.ignored is not None:
        one = replace(one, ignored=wanted.ignored)
    return replace(one.with_axes(**values), dtype=wanted.dtype or "")


def chosen(wanted: argparse.Namespace) -> list[Workload]:
    """As they are run: rows that a flag names are not scaled."""
    values, names = own_values(wanted), list(wanted.workload or ())
    if not names and not wanted.scale and not values:
        refuse("name a --workload, give a shape, or ask for the --list")
    if ALL in names:
        names = list(workloads.NAMES)
    every = [workloads.by_name(name) for name in names]
    if not every:
        every = [own_workload(values) if values else sweep.BASE_WORKLOAD]
    found = [with_flags(one, wanted) for one in every]
    if wanted.quick and not values:
        return [workloads.quick_form(one) for one in found]
    if "rows" in values:
        return found
    return [workloads.here(one, wanted.device, wanted.threads) for one in found]


def that_fit(every: list[Workload], device: str) -> list[Workload]:
    memory, found = machine.memory_bytes(device), []
    for one in every:
        if why := workloads.too_large_text(one, memory):
            print(f"! {one.name} left out: {why}", file=sys.stderr)
        else:
            found.append(one)
    return found


# --- --list --------------------------------------------------------------------------------------


def shape_text(one: Workload, whole: Workload) -> str:
    axes = workloads.KINDS[one.kind].axes
    words = [f"{value} {name}" for name, value in zip(axes, one.shape, strict=True)]
    for place, value in enumerate(whole.shape):
        if one.shape[place] != value:
            words[place] += f" (of {value})"
    return ", ".join(words)


def list_lines(device: str, threads: int) -> Iterator[str]:
    yield f"Workloads, as they are run on this {device} with {threads} threads:"
    for whole in workloads.WORKLOADS:
        one = workloads.here(whole, device, threads)
        yield f"\n  {one.name}: {workloads.KINDS[one.kind].about}"
        share = f"; {100 * one.ignored:g} % ignored" if one.ignored else ""
        yield f"    {shape_text(one, whole)}{share}"
        yield f"    {one.origin}"
        if why := workloads.too_large_text(one, machine.memory_bytes(device)):
            yield f"    left out: {why}"
    yield "\nContenders (optional ones: pip install --no-deps -r benchmarks/requirements.txt):"
    yield "  ours, eager, compile: here"
    for name, library in {**LIBRARIES, **rivals.LIBRARIES}.items():
        _, why = rivals.loaded(library, device)
        yield f"  {name}: {f'left out: {why}' if why else 'here'}"


# --- running -------------------------------------------------------------------------------------


def csv_path(wanted: argparse.Namespace) -> Path | None:
    """Only a full run may replace the committed figures without being told so."""
    partial = wanted.quick or wanted.rounds or wanted.contenders or wanted.scale or wanted.dtype
    partial = partial or own_values(wanted) or wanted.ignored is not None or wanted.level
    if wanted.csv or partial or wanted.workload != [ALL]:
        return wanted.csv
    return tables.RESULTS / f"{COMMAND}_{wanted.device}.csv"


def measured(every: list[Workload], wanted: argparse.Namespace) -> Iterator[list[dict]]:
    if wanted.scale:
        return sweep.measured(every[0], wanted)
    cases = [workloads.case_of(one, wanted.device) for one in every]
    return measure.measure_all(cases, wanted)


def run(wanted: argparse.Namespace) -> None:
    check(wanted)
    measure.prepare(wanted)
    if wanted.list:
        print("\n".join(list_lines(wanted.device, wanted.threads)))
        return
    every = chosen(wanted)
    measure.print_setting(wanted)
    rows: list[dict] = []
    path = csv_path(wanted)
    for table in measured(that_fit(every, wanted.device), wanted):
        rows += table
        measure.print_table(table)
        if path is not None:  # a run that is ended early has written its figures
            report.write_csv(path, rows)
    if not rows:
        refuse("nothing was measured")
    if path is not None:
        print(f"written: {path}")
    if wanted.plot:
        curves.draw(rows, wanted.plot)
        print(f"written: {wanted.plot}")
    measure.end_refused(rows)
