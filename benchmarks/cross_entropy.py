# SPDX-License-Identifier: BSD-3-Clause
"""Masked cross entropy and its row statistics beside what PyTorch users write.

train_*       forward and backward, mean over the rows that count; the gradient goes to the logits.
              ``_inplace`` is the same rounds' inplace_backward=True, which writes it over them.
forward_*     the loss alone, no gradient asked for; ``_stats`` with return_stats=True.
statistics_*  row_statistics: log-sum-exp and entropy of the rows that the mask keeps.

Where nothing else is said 40 % of the rows, drawn at random, are ignored. ``_avx2`` is ours at that
instruction-set level beside PyTorch at its best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .cross_entropy_problems import (
    RIVALS,
    forward_problem,
    small_problem,
    statistics_problem,
    train_problem,
)
from .harness import Case, View

FP32, BF16 = torch.float32, torch.bfloat16
LARGE, MEDIUM = (512, 128256), (512, 32000)
QUICK = {LARGE: (32, 2048), MEDIUM: (32, 500)}
ROUNDS = {LARGE: 11, MEDIUM: 21}  # PyTorch takes up to seconds for a call
ONE_GRADIENT, NEXT_TO_NOTHING = 1.05, 0.01  # peak memory over the gradient's


@dataclass(frozen=True)
class Plan:
    """A case before device and size are known. Its aims hold for a CPU with 2 threads."""

    problem: Callable
    shape: tuple[int, int]
    views: Sequence[View]
    dtype: torch.dtype = FP32
    ignored: float = 0.4
    weigh: bool = False
    needs: str = ""  # level that the aims were set for; empty: any
    level: str = ""


def train_plan(
    name: str,
    shape: tuple[int, int],
    aims: Mapping[str, float],
    in_place_aims: Mapping[str, float],
    about: str = "",
    **more,
) -> Plan:
    """Two tables of the same rounds: a fresh gradient, and one written over the logits."""
    plan = Plan(train_problem, shape, (), **more)
    rivals = RIVALS[plan.dtype]
    summary = f"{plan.ignored:.0%} ignored{about}".replace("%", " %")
    views = (
        View(
            name,
            summary,
            beside=(*rivals, "floor"),
            targets=aims,
            peak_limit=ONE_GRADIENT,
        ),
        View(
            f"{name}_inplace",
            f"{summary}, inplace_backward",
            base="ours in place",
            beside=(*rivals, "floor in place"),
            targets=in_place_aims,
            peak_limit=NEXT_TO_NOTHING,
        ),
    )
    return replace(plan, views=views)


def forward_plan(name: str, shape: tuple[int, int], aims: Mapping[str, float], **more) -> Plan:
    """Two tables of the same rounds: the loss alone, and with the statistics."""
    summary = "forward alone, 40 % ignored" + (", AVX2" if more.get("level") else "")
    views = (
        View(
            name,
            summary,
            beside=("eager", "compile", "one read"),
            targets=aims,
            limits={"one read": 2.2},
        ),
        View(
            f"{name}_stats",
            f"{summary}, return_stats",
            base="ours with statistics",
            beside=("ours", "one read"),
            limits={"ours": 1.25},
            names={"ours": "without statistics"},
        ),
    )
    return Plan(forward_problem, shape, views, needs="avx512", **more)


def statistics_plan(name: str, shape: tuple[int, int], aims: Mapping[str, float]) -> Plan:
    views = (View(name, "log-sum-exp and entropy, 40 % ignored", targets=aims),)
    return Plan(statistics_problem, shape, views, weigh=shape == MEDIUM)


def small_plan(name: str, shape: tuple[int, int]) -> Plan:
    """Here host time is all there is: ours may take 2.5 times as long as eager."""
    return Plan(small_problem, shape, (View(name, "40 % ignored", targets={"eager": 1 / 2.5}),))


IN_PLACE_AIMS = {"eager": 12, "compile": 6}
HUGGING_FACE_AIMS = {".float()": 10}
PLANS = (
    train_plan("train_128k", LARGE, {"eager": 6, "compile": 3}, IN_PLACE_AIMS, weigh=True),
    train_plan("train_32k", MEDIUM, {"eager": 5, "compile": 2.5}, IN_PLACE_AIMS),
    train_plan("train_128k_bf16", LARGE, HUGGING_FACE_AIMS, {}, dtype=BF16),
    train_plan("train_32k_bf16", MEDIUM, HUGGING_FACE_AIMS, {}, dtype=BF16, weigh=True),
    train_plan("train_32k_ignored_0", MEDIUM, {}, {}, ignored=0.0),
    train_plan("train_32k_ignored_50", MEDIUM, {}, {}, ignored=0.5),
    train_plan("train_32k_ignored_90", MEDIUM, {}, {}, ignored=0.9),
    train_plan("train_32k_avx2", MEDIUM, {}, {}, ", AVX2", level="avx2"),
    small_plan("train_1k", (64, 1000)),
    small_plan("train_16", (8, 16)),
    forward_plan("forward_128k", LARGE, {"eager": 10}),
    forward_plan("forward_32k", MEDIUM, {"eager": 8}, weigh=True),
    forward_plan("forward_32k_avx2", MEDIUM, {}, level="avx2"),
    statistics_plan("statistics_128k", LARGE, {"eager": 20}),
    statistics_plan("statistics_32k", MEDIUM, {"eager": 20}),
)


def case_of(plan: Plan, device: str, quick: bool, promised: bool) -> Case:
    views = plan.views
    if not promised:
        views = [
            replace(view, targets={}, limits=dict.fromkeys(view.limits), peak_limit=None)
            for view in views
        ]
    shape = QUICK.get(plan.shape, plan.shape) if quick else plan.shape
    return Case(
        views[0].name,
        views[0].summary,
        shape,
        plan.dtype,
        lambda: plan.problem(shape, plan.dtype, plan.ignored, device),
        views=views,
        rounds=ROUNDS.get(plan.shape),
        weigh=plan.weigh,
        level=plan.level,
    )


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    """The aims are promises for a CPU and for the full shapes, some for one level alone."""
    on_cpu = torch.device(device).type == "cpu"
    level = torch.ops.masked_loss_ext.cpu_capability()
    return [
        case_of(
            plan,
            device,
            quick,
            on_cpu and not quick and not plan.level and plan.needs in ("", level),
        )
        for plan in PLANS
        if not plan.level or (on_cpu and level in ("avx512", plan.level))
    ]
