# SPDX-License-Identifier: BSD-3-Clause
"""Rows of a benchmark: from samples to a table on the screen and a CSV that can be read back."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .harness import COPY, FILL, Agreement, Case, Problem, Samples, summarize

COLUMNS = (
    "benchmark", "case", "summary", "shape", "dtype", "contender", "status",
    "median_us", "min_us", "iqr_us", "forward_median_us", "rounds", "calls_per_sample",
    "ratio_of_medians", "ratio_of_minima", "target", "met",
    "bytes_moved", "gb_per_s", "of_copy",
    "loss_error", "gradient_error",
    "gradient_bytes", "peak_extra_bytes", "peak_over_gradient",
    "other_cores", "device", "processor", "capability", "threads",
    "torch", "masked_loss_ext", "date",
)  # fmt: skip


def contender_row(
    name: str, samples: Samples | None, ours: Samples | None, target: float | None
) -> dict[str, object]:
    """Times of a contender and how many times faster ours is; no figures if it was not timed."""
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
    if ours is not None and samples is not ours:
        base = summarize(ours.total_us)
        row["ratio_of_medians"] = total.median / base.median
        row["ratio_of_minima"] = total.minimum / base.minimum
        if target is not None:
            row["met"] = "yes" if row["ratio_of_medians"] >= target else "no"
    return row


def case_rows(
    benchmark: str,
    case: Case,
    problem: Problem,
    agreements: Mapping[str, Agreement],
    timed: Mapping[str, Samples],
) -> list[dict[str, object]]:
    """A row for each contender, the refused ones too, then the copy and the fill."""
    ours, copy = timed.get("ours"), timed.get(COPY)
    rows = []
    for name in [one.name for one in problem.contenders] + [COPY, FILL]:
        row = contender_row(name, timed.get(name), ours, case.targets.get(name))
        if (agreement := agreements.get(name)) is not None:
            row |= {"loss_error": agreement.loss_error, "gradient_error": agreement.gradient_error}
            row["status"] = f"refused: {agreement.refusal}" if agreement.refusal else "timed"
        if name in timed and name in ("ours", COPY, FILL):
            moved = problem.gradient_bytes if name == FILL else problem.bytes_moved
            row |= {"bytes_moved": moved, "gb_per_s": moved / row["median_us"] / 1e3}
        if name == "ours" and copy and ours:
            row["of_copy"] = summarize(copy.total_us).median / row["median_us"]
        row |= {
            "benchmark": benchmark,
            "case": case.name,
            "summary": case.summary,
            "shape": "x".join(map(str, case.shape)),
            "dtype": str(case.dtype).removeprefix("torch."),
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


def number_text(value: object, form: str) -> str:
    return "" if value in (None, "") else form.format(float(value))


HEAD = ("contender", "median", "min", "iqr", "forward", "x ours", "(minima)", "target", "met",
        "GB/s", "of copy", "peak/grad", "grad error")  # fmt: skip


def table_line(row: Mapping[str, object]) -> tuple[str, ...]:
    return (
        str(row["contender"]),
        time_text(row.get("median_us")),
        time_text(row.get("min_us")),
        time_text(row.get("iqr_us")),
        time_text(row.get("forward_median_us")),
        number_text(row.get("ratio_of_medians"), "{:.2f}"),
        number_text(row.get("ratio_of_minima"), "{:.2f}"),
        number_text(row.get("target"), ">= {:g}"),
        str(row.get("met") or ""),
        number_text(row.get("gb_per_s"), "{:.1f}"),
        number_text(row.get("of_copy"), "{:.0%}"),
        number_text(row.get("peak_over_gradient"), "{:.2f}"),
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


def case_table(rows: Sequence[Mapping[str, object]]) -> str:
    """One case: a title, a line a contender, and a sentence for each that was not timed."""
    first = rows[0]
    title = f"{first['case']}  [{first['shape']}] {first['dtype']}, {first['summary']}"
    lines = aligned([HEAD, *(table_line(row) for row in rows)])
    notes = [f"{row['contender']} {row['status']}" for row in rows if row["status"] != "timed"]
    return "\n".join([title, *("  " + line for line in lines), *("  ! " + note for note in notes)])
