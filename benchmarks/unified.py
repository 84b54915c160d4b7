# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss with everything on but the MTP heads, beside its components in plain PyTorch.

targets, model     forward and backward of deepseek at T = 1.3 with smoothing, focal added to it,
                   n-gram and diversity penalty, immediate repetition, EOS, MoE balancing, expert
                   diversity and the auxiliary losses; penalties on the targets, or on the model.
repetition_counts  n-gram and run counts of rows of tokens, beside a Python loop.

A quarter of each batch is padding. A contender is timed if total, every component and the gradients
of logits, gate logits and expert outputs agree with the components in float64.
"""

from __future__ import annotations

import torch

from .harness import Case, View
from .unified_problems import ALONE, counts_problem, loss_problem

SHAPE, QUICK_SHAPE = (4, 512, 50257), (4, 64, 1000)
COUNTS, QUICK_COUNTS = (8, 512), (8, 128)
HALF = {ALONE: 0.5}  # of its peak memory


def loss_case(penalty_on: str, device: str, quick: bool, promised: bool) -> Case:
    shape = QUICK_SHAPE if quick else SHAPE
    view = View(
        penalty_on,
        f"every component, penalties on the {penalty_on}, 25 % padded",
        targets={"eager": 8} if promised else {},
        peak_shares=HALF if promised else {},
    )
    return Case(
        view.name,
        view.summary,
        shape,
        torch.float32,
        lambda: loss_problem(shape, penalty_on, device),
        views=(view,),
        rounds=7,  # PyTorch takes seconds for a call
    )


def counts_case(device: str, quick: bool, promised: bool) -> Case:
    shape = QUICK_COUNTS if quick else COUNTS
    return Case(
        "repetition_counts",
        "4-grams and runs, 25 % padded",
        shape,
        torch.int64,
        lambda: counts_problem(shape, device),
        targets={"Python loop": 50} if promised else {},
        weigh=False,
    )


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    """The aims are promises for a CPU and for the full shapes."""
    promised = torch.device(device).type == "cpu" and not quick
    losses = [loss_case(on, device, quick, promised) for on in ("targets", "model")]
    return [*losses, counts_case(device, quick, promised)]
