# SPDX-License-Identifier: BSD-3-Clause
"""The logit-free loss and row statistics beside those of whole logits, and of other libraries.

train_*       forward and backward of hidden states and head: the mean over the rows that count,
              of which ``_ignored_90`` leaves a tenth.
statistics    log p and entropy of every row with what a policy's objective sends back: nothing
              into three quarters of the rows.
memory_*      what a call needs beyond the gradients, by the number of classes.

Peak memory is beyond the gradients, which everybody makes. "products" are the matrix products alone
of the rows that count, into memory that is there already.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from . import linear_problems as problems
from .harness import Case, View
from .linear_problems import PRODUCTS, Shape
from .linear_rivals import CCE_COMPILED, TORCH, TRL

FP32, BF16 = torch.float32, torch.bfloat16
LARGE, MEDIUM, QUICK = (2048, 768, 50257), (1024, 768, 50257), (64, 32, 500)
MEMORY_CLASSES = {"32k": 32768, "128k": 131072, "256k": 262144}
CHUNK_BYTES = 128 << 20  # of logits that lie at a time
MORE_BYTES = 24 << 20  # for copies of hidden states, row results, packed operands of a product
ALL_OTHERS, FEW_OTHERS = (TORCH, CCE_COMPILED, TRL), (CCE_COMPILED,)


@dataclass(frozen=True)
class Plan:
    """A case before device and size are known. Its aims hold for a CPU with 2 threads."""

    problem: Callable
    shape: Shape
    view: View
    share: float  # of rows that are ignored, or into which nothing flows
    dtype: torch.dtype = FP32
    weigh: bool = True
    rounds: int = 3  # PyTorch takes up to ten seconds for a call


def train_plan(
    name: str, summary: str, aims: Mapping[str, float], rivals: Sequence[str] = FEW_OTHERS, **more
) -> Plan:
    view = View(name, summary, targets=aims, limits={PRODUCTS: None})
    return Plan(partial(problems.train_problem, rivals=rivals), LARGE, view, **more)


def first_plan() -> Plan:
    aims = {"eager": 2.2, "compile": 2.0, TORCH: 4.0}
    plan = train_plan("train", "40 % ignored", aims, ALL_OTHERS, share=0.4)
    view = replace(plan.view, limits={PRODUCTS: 1.12}, peak_shares={"eager": 1 / 8})
    return replace(plan, view=view)


def statistics_plan() -> Plan:
    view = View(
        "statistics",
        "log p and entropy, nothing flows into 75 %",
        targets={"full logits": 2.0},
        limits={PRODUCTS: None},
        peak_limit_bytes=CHUNK_BYTES + MORE_BYTES,
    )
    make = partial(problems.statistics_problem, calls=problems.STATISTICS_CALLS, rivals=(TRL,))
    return Plan(make, MEDIUM, view, 0.75)


def memory_plan(name: str) -> Plan:
    view = View(
        f"memory_{name}",
        "40 % ignored",
        limits={PRODUCTS: None},
        peak_limit_bytes=CHUNK_BYTES + MORE_BYTES,
    )
    return Plan(problems.memory_problem, (512, 64, MEMORY_CLASSES[name]), view, 0.4)


PLANS = (
    first_plan(),
    train_plan("train_ignored_90", "90 % ignored", {"eager": 12.0}, share=0.9, weigh=False),
    train_plan("train_bf16", "40 % ignored", {"eager": 2.0}, share=0.4, dtype=BF16),
    statistics_plan(),
    *map(memory_plan, MEMORY_CLASSES),
)


def case_of(plan: Plan, device: str, quick: bool, promised: bool) -> Case:
    view = plan.view
    if not promised:
        limits = dict.fromkeys(view.limits)
        view = replace(view, targets={}, limits=limits, peak_limit_bytes=None, peak_shares={})
    shape = QUICK if quick else plan.shape
    return Case(
        view.name,
        view.summary,
        shape,
        plan.dtype,
        lambda: plan.problem(shape, plan.dtype, plan.share, device),
        views=(view,),
        rounds=plan.rounds,
        weigh=plan.weigh,
    )


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    """The aims are promises for a CPU and for the full shapes."""
    promised = torch.device(device).type == "cpu" and not quick
    return [case_of(plan, device, quick, promised) for plan in PLANS]
