# SPDX-License-Identifier: BSD-3-Clause
"""What is measured of the logit-free functions on a GPU, bf16, forward and backward.

linear_152k*        V = 151936, H = 4096, 8192 tokens, the case that trainers quote: at most 60 ms
                    and 2 GiB beyond the gradients, beside the bare products, F.linear with
                    F.cross_entropy, and the chunked forms of others; ``_ignored_40`` with 40 % of
                    the rows ignored. "ours" is told how many rows count, "count asked" waits for
                    the device to say so.
linear_statistics_* log p and entropy, nothing flows into three quarters of the rows.
linear_128k         V = 128256, H = 2048, 4096 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import linear_problems as problems
from . import linear_rivals as rivals
from .harness import Case, Problem, View
from .linear_problems import PRODUCTS, Shape

BF16 = torch.bfloat16
LARGE, SMALL, QUICK = (8192, 4096, 151936), (4096, 2048, 128256), (64, 32, 500)
TIME_US, PEAK_BYTES = 60_000.0, 2 << 30
IGNORED, WITHOUT = 0.4, 0.75
ASKED, MATERIALISED = "count asked", "F.linear, F.cross_entropy"
OTHERS = (rivals.TORCH, rivals.LIGER, rivals.QUACK, rivals.CCE)
ROUNDS = 4


def counted(rows: int, ignored: float) -> int:
    return rows - round(ignored * rows)


def mean_problem(shape: Shape, ignored: float, device: str) -> Problem:
    calls = {
        "ours": problems.ours_counted(counted(shape[0], ignored)),
        ASKED: problems.ours,
        MATERIALISED: problems.eager,
    }
    return problems.mean_problem(shape, BF16, ignored, device, calls, OTHERS)


def statistics_problem(shape: Shape, without: float, device: str) -> Problem:
    calls = {
        "ours": problems.counted_statistics(shape[0]),
        ASKED: problems.our_statistics,
        "full logits": problems.full_statistics,
    }
    return problems.statistics_problem(shape, BF16, without, device, calls, (rivals.TRL,))


def case_of(
    view: View,
    make: Callable[[Shape, float, str], Problem],
    shape: Shape,
    share: float,
    device: str,
) -> Case:
    return Case(
        view.name,
        view.summary,
        shape,
        BF16,
        lambda: make(shape, share, device),
        views=[view],
        rounds=ROUNDS,
    )


def mean_view(name: str, ignored: float, aims: dict[str, float]) -> View:
    summary = f"{100 * ignored:.0f} % ignored"
    return View(name, summary, limits={PRODUCTS: None, ASKED: None}, **aims)


def cases(device: str, quick: bool) -> list[Case]:
    """The most telling first: a run that is cut short has measured those."""
    large, small = (QUICK, QUICK) if quick else (LARGE, SMALL)
    aims = {"time_limit_us": TIME_US, "peak_limit_bytes": PEAK_BYTES}
    statistics = View(
        "linear_statistics_152k",
        f"log p and entropy, nothing flows into {100 * WITHOUT:.0f} %",
        targets={"full logits": 2.0},
        limits={PRODUCTS: None, ASKED: None},
        peak_limit_bytes=PEAK_BYTES,
    )
    whole, ignored = (
        mean_view(name, share, aims)
        for name, share in (("linear_152k", 0.0), ("linear_152k_ignored_40", IGNORED))
    )
    return [
        case_of(whole, mean_problem, large, 0.0, device),
        case_of(ignored, mean_problem, large, IGNORED, device),
        case_of(statistics, statistics_problem, large, WITHOUT, device),
        case_of(mean_view("linear_128k", 0.0, {}), mean_problem, small, 0.0, device),
    ]
