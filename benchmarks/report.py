# SPDX-License-Identifier: BSD-3-Clause
"""Rows of a benchmark: from samples to a table on the screen and a CSV that can be read back."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .agreement import Agreement
from .contenders import COPY, FILL
from .harness import Case, Contender, Problem, Samples, View, summarize

COLUMNS = (
    "benchmark", "case", "summary", "shape", "dtype", "contender", "role", "status",
    "median_us", "min_us", "iqr_us", "forward_median_us", "rounds", "calls_per_sample",
    "ratio_of_medians", "ratio_of_minima", "distance", "target", "met",
    "bytes_moved", "gb_per_s", "of_copy",
    "loss_error", "gradient_error",
    "gradient_bytes", "peak_extra_bytes", "peak_over_gradient", "peak_limit", "peak_limit_bytes",
    "peak_share", "peak_share_limit", "peak_met", "time_limit_us", "time_met",
    "other_cores", "device", "processor", "capability", "threads",
    "torch", "masked_loss_ext", "date", "commit", "version", "scale", "at",
)  # fmt: skip


def verdict(met: bool) -> str:
    return "yes" if met else "no"


def contender_row(
    name: str,
    samples: Samples | None,
    base: Samples | None,
    target: float | None = None,
    floor: bool = False,
) -> dict[str, object]:
    """Times of a contender and how many times faster the base is; no figures if it was not timed.

    To a floor the base is asked to stay near: ``distance`` is how many times slower it is, and
    ``target`` the most that this may be. For the others it is the least that the ratio may be.
    """
    row: dict[str, object] = {"contender": name, "status": "timed", "target": target}
    if samples is None:
        return row
    total = summarize(samples.total_us)
    row |= {
        "median_us": total.median,
        "min_us": total.minimum,
        "iqr_us": total.iqr,
        "forward_median_us": summarize(samples.forward_us).median,
        "rounds": len(samples.total_us),
        "calls_per_sample": samples.calls_per_sample,
    }
    if base is None or samples is base:
        return row
    ours = summarize(base.total_us)
    row["ratio_of_medians"] = ratio = total.median / ours.median
    row["ratio_of_minima"] = total.minimum / ours.minimum
    if floor:
        row["distance"] = 1 / ratio
    if target is not None:
        row["met"] = verdict(1 / ratio <= target if floor else ratio >= target)
    return row


def shown(problem: Problem, view: View) -> list[Contender]:
    """The base of the view, then those it is set beside."""
    every = [*problem.contenders, *problem.beside]
    wanted = [one.name for one in every] if view.beside is None else view.beside
    base = [one for one in every if one.name == view.base]
    return base + [one for one in every if one.name in wanted and one.name != view.base]


def role_of(contender: Contender, view: View) -> str:
    if contender.name == view.base:
        return "ours"
    return "floor" if contender.name in view.limits else contender.role


def rate_bytes(one: Contender, view: View, problem: Problem) -> int:
    """What it reads and writes, where that is known; else 0."""
    if one.bytes_moved:
        return one.bytes_moved
    if one.name == FILL:
        return problem.gradient_bytes
    return (view.bytes_moved or problem.bytes_moved) if one.name in (view.base, COPY) else 0


def timed_parts(problem: Problem, view: View, timed: Mapping[str, Samples]) -> dict[str, Samples]:
    """What the view is about; what cannot be cut in parts, a floor or a copy, stays whole."""
    whole = {one.name for one in problem.beside}
    return {
        name: samples if name in whole else samples.part(view.part)
        for name, samples in timed.items()
    }


def rate_of(one: Contender, view: View, problem: Problem, timed: Mapping[str, Samples]) -> dict:
    """GB/s of ours, of the copy and of the fill; of ours also what share that is of the copy's."""
    moved = rate_bytes(one, view, problem)
    if one.name not in timed or not moved:
        return {}
    median = summarize(timed[one.name].total_us).median
    rate = {"bytes_moved": moved, "gb_per_s": moved / median / 1e3}
    if one.name == view.base and COPY in timed:
        rate["of_copy"] = summarize(timed[COPY].total_us).median / median
    return rate


def peak_of(one: Contender, view: View, problem: Problem, peaks: Mapping[str, int]) -> dict:
    if (peak := peaks.get(one.name)) is None:
        return {}
    found: dict[str, object] = {"peak_extra_bytes": peak}
    if problem.gradient_bytes:
        found["peak_over_gradient"] = over = peak / problem.gradient_bytes
        if one.name == view.base and view.peak_limit is not None:
            found |= {"peak_limit": view.peak_limit, "peak_met": verdict(over <= view.peak_limit)}
    if one.name == view.base and (limit := view.peak_limit_bytes) is not None:
        found |= {"peak_limit_bytes": limit, "peak_met": verdict(peak <= limit)}
    if one.name in view.peak_shares and {view.base, view.peak_above or view.base} <= peaks.keys():
        below = peaks[view.peak_above] if view.peak_above else 0
        share, limit = (peaks[view.base] - below) / (peak - below), view.peak_shares[one.name]
        found |= {"peak_share": share, "peak_share_limit": limit}
        found |= {"peak_met": verdict(share <= limit)}
    return found


def time_aim_of(one: Contender, view: View, timed: Mapping[str, Samples]) -> dict:
    if one.name != view.base or one.name not in timed or view.time_limit_us is None:
        return {}
    median = summarize(timed[one.name].total_us).median
    return {"time_limit_us": view.time_limit_us, "time_met": verdict(median <= view.time_limit_us)}


def case_rows(
    benchmark: str,
    case: Case,
    view: View,
    problem: Problem,
    agreements: Mapping[str, Agreement],
    timed: Mapping[str, Samples],
    peaks: Mapping[str, int],
) -> list[dict[str, object]]:
    """A row for each contender of the view that was checked or timed, refused ones too."""
    rows = []
    timed = timed_parts(problem, view, timed)
    for one in shown(problem, view):
        if one.name not in agreements and one.name not in timed and not one.skip:
            continue
        role, samples = role_of(one, view), timed.get(one.name)
        target = (view.limits if role == "floor" else view.targets).get(one.name)
        row = contender_row(
            view.names.get(one.name, one.name),
            samples,
            timed.get(view.base),
            target,
            role == "floor",
        )
        if (agreement := agreements.get(one.name)) is not None:
            row |= {"loss_error": agreement.loss_error, "gradient_error": agreement.gradient_error}
            row["status"] = f"refused: {agreement.refusal}" if agreement.refusal else "timed"
        if one.skip:
            row["status"] = f"not attempted: {one.skip}"
        row |= rate_of(one, view, problem, timed) | peak_of(one, view, problem, peaks)
        row |= time_aim_of(one, view, timed)
        row |= {
            "benchmark": benchmark,
            "case": view.name,
            "summary": view.summary,
            "shape": "x".join(map(str, case.shape)),
            "dtype": str(case.dtype).removeprefix("torch."),
            "role": role,
            "version": one.version,
            "gradient_bytes": problem.gradient_bytes,
        }
        rows.append(row)
    return rows


def as_text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({column: as_text(row.get(column)) for column in COLUMNS})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def time_text(time_us: object) -> str:
    if time_us in (None, ""):
        return "-"
    time_us = float(time_us)
    return f"{time_us / 1e3:.2f} ms" if time_us >= 1e3 else f"{time_us:.1f} us"


def size_text(size: object) -> str:
    return number_text(None if size in (None, "") else float(size) / (1 << 20), "{:.1f} MiB")


def number_text(value: object, form: str) -> str:
    if value in (None, "") or math.isnan(float(value)):
        return ""
    return form.format(float(value))


HEAD = ("contender", "median", "(aim)", "min", "iqr", "forward", "x ours", "(minima)", "ours x it",
        "target", "met", "GB/s", "of copy", "peak/grad", "peak", "(limit)",
        "ours / peak", "grad error")  # fmt: skip


def aim_text(limit: str, met: object) -> str:
    return f"<= {limit} {met}" if met else ""


def table_line(row: Mapping[str, object]) -> tuple[str, ...]:
    return (
        str(row["contender"]),
        time_text(row.get("median_us")),
        aim_text(time_text(row.get("time_limit_us")), row.get("time_met")),
        time_text(row.get("min_us")),
        time_text(row.get("iqr_us")),
        time_text(row.get("forward_median_us")),
        number_text(row.get("ratio_of_medians"), "{:.2f}"),
        number_text(row.get("ratio_of_minima"), "{:.2f}"),
        number_text(row.get("distance"), "{:.2f}"),
        number_text(row.get("target"), "<= {:g}" if row["role"] == "floor" else ">= {:g}"),
        str(row.get("met") or ""),
        number_text(row.get("gb_per_s"), "{:.1f}"),
        number_text(row.get("of_copy"), "{:.0%}"),
        number_text(row.get("peak_over_gradient"), "{:.3f}"),
        "" if row.get("peak_over_gradient") else size_text(row.get("peak_extra_bytes")),
        aim_text(
            number_text(row.get("peak_limit"), "{:g}") or size_text(row.get("peak_limit_bytes")),
            "" if row.get("peak_share") else row.get("peak_met"),
        ),
        number_text(row.get("peak_share"), "{:.2f}")
        + number_text(row.get("peak_share_limit"), " <= {:g} ")
        + str((row.get("peak_share") and row.get("peak_met")) or ""),
        number_text(row.get("gradient_error"), "{:.1e}"),
    )


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def without_empty_columns(lines: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """``lines`` without the columns that hold nothing but their head."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return list(zip(*columns, strict=True))


def case_table(rows: Sequence[Mapping[str, object]]) -> str:
    """One case: a title, a line a contender, and a sentence for each that was not timed."""
    first = rows[0]
    title = f"{first['case']}  [{first['shape']}] {first['dtype']}, {first['summary']}"
    title += number_text(first.get("rounds"), ", {:.0f} rounds")
    lines = aligned(without_empty_columns([HEAD, *(table_line(row) for row in rows)]))
    notes = [f"{row['contender']} {row['status']}" for row in rows if row["status"] != "timed"]
    return "\n".join([title, *("  " + line for line in lines), *("  ! " + note for note in notes)])
