# SPDX-License-Identifier: BSD-3-Clause
"""Logit-free losses of others, where PyTorch has them or they are installed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy_problems import IGNORED
from .harness import Contender
from .rivals import Library, loaded, version_of

TRL_CLASSES = 32768  # of a tile, TRL's own choice
TORCH, CCE, CCE_COMPILED = "torch chunked", "cut-cross-entropy", "cut-cross-entropy compiled"
TRL, LIGER, QUACK = "TRL", "liger", "quack"


def torch_chunked() -> Callable:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"PyTorch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()

    def mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, target, options=options)

    return mean


def cut(implementation: str) -> Callable:
    from cut_cross_entropy import linear_cross_entropy

    def mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, target, impl=implementation)

    return mean


def trl_function() -> Callable:
    import trl.trainer.utils  # noqa: F401  its backward needs this one, and what it imports
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply


def trl_mean() -> Callable:
    """Of the rows that count alone, as TRL's own loss takes them where Triton is."""
    function = trl_function()

    def mean(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        kept = (target != IGNORED).nonzero()[:, 0]
        rows, labels = hidden[kept], target[kept]
        return -function(rows, weight, None, labels, 1.0, TRL_CLASSES, None, 1.0, ())[0].mean()

    return mean


def trl_statistics() -> Callable:
    function = trl_function()

    def statistics(hidden, weight, target, log_prob_gradient, entropy_gradient):
        log_prob, entropy, *_ = function(
            hidden, weight, None, target, 1.0, TRL_CLASSES, None, 1.0, ("entropy",)
        )
        value = (log_prob * log_prob_gradient + entropy * entropy_gradient).sum()
        return value, log_prob, entropy

    return statistics


def liger() -> Callable:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    criterion = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: criterion(weight, hidden, target)


def quack() -> Callable:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy


NEEDS_CCE, NEEDS_TRL = ("cut_cross_entropy", "triton"), ("trl", "accelerate", "datasets")
CCE_PACKAGE = "cut-cross-entropy"
MEANS: Mapping[str, Library] = {
    TORCH: Library((), torch_chunked),
    CCE: Library(NEEDS_CCE, lambda: cut("cce"), CCE_PACKAGE, on_gpus_alone=True),
    CCE_COMPILED: Library(NEEDS_CCE, lambda: cut("torch_compile"), CCE_PACKAGE),
    TRL: Library(NEEDS_TRL, trl_mean, "trl"),
    LIGER: Library(("liger_kernel",), liger, "liger-kernel", on_gpus_alone=True),
    QUACK: Library(("quack",), quack, "quack-kernels", on_gpus_alone=True),
}
STATISTICS = {TRL: Library(NEEDS_TRL, trl_statistics, "trl")}


def contenders(
    names: Sequence[str], libraries: Mapping[str, Library], inputs: Sequence[tuple], slack: float
) -> list[Contender]:
    """Those of ``names``; what is not installed, or cannot be imported, is not attempted."""
    found = []
    for name in names:
        call, skip = loaded(libraries[name], inputs[0][0].device)
        more = {
            "skip": skip,
            "slack": slack,
            "version": "" if skip else version_of(libraries[name]),
        }
        found.append(Contender(name, call, inputs if call else [], **more))
    return found
