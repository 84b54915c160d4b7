# SPDX-License-Identifier: BSD-3-Clause
"""What the demo prints at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .measure import OURS, Cost, FormOnBatch

if TYPE_CHECKING:
    from .data import Batch
    from .denoise import History
    from .quality import Quality


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """First column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for number, row in enumerate([header, *rows]):
        cells = [f"{row[0]:<{widths[0]}}"]
        cells += [f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))
        if number == 0:
            print("  ".join("-" * w for w in widths))


def print_quality(batch: Batch, history: History, found: dict[str, Quality]) -> None:
    padding = 1.0 - batch.attention_mask.float().mean().item()
    print(
        f"\n{len(history.train)} steps in {history.seconds:.1f} s; held-out loss "
        f"{history.held_out[0][1]:.4f} -> {history.held_out[-1][1]:.4f}\n"
        f"PSNR in dB, mean of {len(batch.shapes)} crops of regions never trained on "
        f"({padding:.0%} of the batch is padding);\n"
        "before training the model is a Wiener filter with the average spectrum of the photos\n"
    )
    rows = [(name, f"{q.whole:.2f}", f"{q.edit:.2f}", f"{q.rest:.2f}") for name, q in found.items()]
    print_table(("", "whole crop", "edit region", "the rest"), rows)


def print_comparison(on_batch: dict[str, FormOnBatch], cost: Cost) -> None:
    shape = ", ".join(map(str, cost.shape))
    print(
        "\nThe same loss in other forms. Value and NaN: on the held-out batch; off by: from the\n"
        f"reference in float64. Step: forward + backward of the loss alone, [{shape}] float32,\n"
        f"60 % valid, median of {cost.rounds} interleaved rounds. Memory: what that adds at its\n"
        "peak, the gradient included, in a process of its own.\n"
    )
    header = (
        "loss",
        "value",
        "off by",
        "step",
        "x ours",
        "peak memory",
        "NaN in padding: loss",
        "grad",
    )
    print_table(header, [comparison_row(name, f, cost) for name, f in on_batch.items()])
    if cost.peak_bytes is None:
        print(f"peak memory is not known: {cost.why_no_peak}")
    if cost.crowded_cores is not None:
        print(f"other programs kept {cost.crowded_cores:.1f} cores busy: step times are disturbed")


def comparison_row(name: str, form: FormOnBatch, cost: Cost) -> tuple[str, ...]:
    step_us = cost.step_us[name]
    peak = "?" if cost.peak_bytes is None else f"{cost.peak_bytes[name] / 2**20:.1f} MiB"
    return (
        name,
        f"{form.value:.4f}",
        f"{round(form.off_by, 4) + 0.0:+.1%}",  # + 0.0: no "-0.0%"
        f"{step_us / 1000:.2f} ms",
        f"{step_us / cost.step_us[OURS]:.1f}",
        peak,
        "finite" if form.nan_loss_finite else "NaN",
        "finite" if form.nan_gradient_finite else "NaN",
    )
