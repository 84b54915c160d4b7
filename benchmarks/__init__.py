# SPDX-License-Identifier: BSD-3-Clause
"""Measurements of masked_loss_ext beside the same formulas in PyTorch: ``python -m benchmarks``."""

from __future__ import annotations

import importlib

BENCHMARKS = (
    "squared_error",
    "cross_entropy",
    "linear_cross_entropy",
    "block_mask",
    "unified",
    "logit_free",
)
"""Every module of this package that offers ``cases(device, quick)``; each is a subcommand."""

CUDA_BENCHMARKS = ("squared_error", "block_mask", "cross_entropy", "linear_cross_entropy")
"""Those that cuda_cases.py has other cases for, in the order in which they are measured."""


def cases_of(benchmark: str, device: str, quick: bool = False) -> list:
    """On a GPU other shapes are measured, beside other targets."""
    if device.startswith("cuda") and benchmark in CUDA_BENCHMARKS:
        return importlib.import_module("benchmarks.cuda_cases").cases(benchmark, device, quick)
    return importlib.import_module(f"benchmarks.{benchmark}").cases(device, quick)
