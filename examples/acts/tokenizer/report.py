# SPDX-License-Identifier: BSD-3-Clause
"""What the act prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..common.tables import print_table
from .data import CELL, REGISTERS, Batch
from .measure import BLOCK, Blocks, FlatErrors, Quality, StepCost

if TYPE_CHECKING:
    from .act import History


def share(blocks: Blocks) -> str:
    return f"{blocks.computed} of {blocks.all}"


def print_errors(
    batch: Batch,
    history: History,
    before: dict[int, Quality],
    by_keep_k: dict[int, Quality],
    code: int,
) -> None:
    steps = len(history.train)
    lengths = batch.lengths()
    milliseconds = 1000 * history.seconds / steps
    print(
        f"\n{steps} steps in {history.seconds:.1f} s, {milliseconds:.0f} ms each. {len(lengths)} "
        f"crops of regions never trained on,\n{min(lengths)} to {max(lengths)} patches of {CELL} x "
        f"{CELL} pixels each, through at most {REGISTERS} registers of {code} numbers.\nError: "
        f"squared, of pixels in [-1, 1]. Before training: registers hold averages of the\npatches "
        "near their place, the strongest coefficients, and patches average registers near them.\n"
        f"Blocks: {BLOCK} x {BLOCK}, those that FlexAttention would compute, of all in the packed "
        "batch.\n"
    )
    rows = [
        (str(k), str(k * code), f"{before[k].mse:.4f}", f"{q.mse:.4f}", f"{q.psnr:.2f}")
        + (f"{q.blocks.pairs:.1%}", share(q.blocks))
        for k, q in by_keep_k.items()
    ]
    print_table(("keep_k", "numbers", "before", "error", "PSNR in dB", "pairs", "blocks"), rows)


def print_summary(by_keep_k: dict[int, Quality], flat: FlatErrors) -> None:
    errors = [q.mse for q in by_keep_k.values()]
    falls = sum(b < a for a, b in zip(errors, errors[1:], strict=False))
    least, most = min(by_keep_k), max(by_keep_k)
    print(
        f"\nThe error falls at {falls} of {len(errors) - 1} doublings of keep_k. A grey image has "
        f"{flat.grey:.4f},\n{flat.grey / errors[0]:.1f} times that of keep_k = {least} and "
        f"{flat.grey / errors[-1]:.1f} times that of keep_k = {most}; each crop\n"
        f"in its own mean colour, 3 exact numbers, has {flat.mean_colour:.4f}."
    )


def print_nan(same: bool) -> None:
    found = "the same" if same else "other"
    print(f"With NaN in every dropped register the decoder's loss has {found} bits.")


def print_costs(costs: dict[str, StepCost], batch: Batch, keep_k: Tensor, rounds: int) -> None:
    print(
        f"\nForward and backward of {len(batch.shapes)} crops that keep {sum(keep_k.tolist())} of "
        f"{REGISTERS * len(batch.shapes)} registers, median of {rounds} rounds.\n"
    )
    rows = [
        (name, f"{c.milliseconds:.1f} ms", str(c.tokens), share(c.blocks), f"{c.loss:.5f}")
        for name, c in costs.items()
    ]
    print_table(("registers", "step", "tokens", "blocks", "loss"), rows)
