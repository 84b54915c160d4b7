# SPDX-License-Identifier: BSD-3-Clause
"""What the demo prints at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.cost import Cost, print_doubts
from ..common.tables import print_table
from .measure import FormOnBatch

if TYPE_CHECKING:
    from .act import History
    from .data import Batch
    from .quality import Quality


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
    print_doubts(cost)


def comparison_row(name: str, form: FormOnBatch, cost: Cost) -> tuple[str, ...]:
    return (
        name,
        f"{form.value:.4f}",
        f"{round(form.off_by, 4) + 0.0:+.1%}",  # + 0.0: no "-0.0%"
        cost.milliseconds(name),
        cost.times_ours(name),
        cost.peak(name),
        "finite" if form.nan_loss_finite else "NaN",
        "finite" if form.nan_gradient_finite else "NaN",
    )
