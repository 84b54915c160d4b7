# SPDX-License-Identifier: BSD-3-Clause
"""Masked squared errors, forward and backward, beside the same formulas in PyTorch.

token_*       AttentionMaskMseLoss on [B, T, C], about 60 % of the tokens valid, with an edit mask
              [B, T] and a weighting [B, T, 1]; the gradient goes to the prediction.
masked_mse_*  masked_mse on [B, L], a random half selected.

The contenders are written as a user would write them who wants the same value: half inputs are
widened first, because the contract is fp32 arithmetic and an fp32 result.
"""

from __future__ import annotations

import torch
from torch import Tensor

import masked_loss_ext as mle

from .contenders import compiled, fresh_fill, placed, plain_copy
from .harness import Case, Contender, Problem

FOREGROUND, BACKGROUND = 2.0, 1.0
SEED = 2


def token_loss_formula(prediction, target, mask, edit_mask, weighting):
    """The formula as it is read: every factor in turn, padding multiplied by 0."""
    edit_weight = FOREGROUND * edit_mask + BACKGROUND * (1 - edit_mask)
    error = (prediction.float() - target.float()) ** 2 * weighting * edit_weight[..., None]
    on = mask.float()
    return (error.mean(-1) * on).sum() / on.sum()


def boolean_indexing(prediction, target, mask):
    return ((prediction[mask].float() - target[mask].float()) ** 2).mean()


def where_form(prediction, target, mask):
    error = (prediction.float() - target.float()) ** 2
    return torch.where(mask, error, 0).sum() / mask.sum()


def unequal_lengths(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """[B], evenly spread over 20 % ... 100 % of ``tokens``, shuffled: 60 % valid, rows unequal."""
    lengths = torch.linspace(0.2 * tokens, tokens, batch).round().long()
    return lengths[torch.randperm(batch, generator=generator)]


def token_data(shape, padding: str, dtype) -> tuple:
    batch, tokens, _ = shape
    generator = torch.Generator().manual_seed(SEED)
    prediction, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if padding == "right":
        lengths = unequal_lengths(batch, tokens, generator)
        mask = torch.arange(tokens) < lengths[:, None]
    else:
        mask = torch.rand(batch, tokens, generator=generator) < 0.6
    edit_mask = (torch.rand(batch, tokens, generator=generator) < 0.3).float()
    weighting = torch.rand(batch, tokens, 1, generator=generator) + 0.5
    return prediction, target, mask, edit_mask, weighting


def half_selected_data(shape, dtype) -> tuple:
    generator = torch.Generator().manual_seed(SEED)
    prediction, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return prediction, target, torch.rand(shape, generator=generator) < 0.5


def token_bytes(prediction, target, mask, edit_mask, weighting) -> int:
    """Forward and backward each read the mask and, of valid tokens, both rows and both weights; the
    backward writes the whole gradient."""
    channels, valid = prediction.shape[-1], int(mask.sum())
    row = channels * (prediction.itemsize + target.itemsize)
    one_read = mask.nbytes + valid * (row + edit_mask.itemsize + weighting.itemsize)
    return 2 * one_read + prediction.nbytes


def half_selected_bytes(prediction, target, mask) -> int:
    """As above. Memory comes in whole lines, so a random half really costs the reads of all."""
    one_read = mask.nbytes + int(mask.sum()) * (prediction.itemsize + target.itemsize)
    return 2 * one_read + prediction.nbytes


def problem_of(data, device, ours, reference, rivals, bytes_moved) -> Problem:
    sets = placed(data, device)
    contenders = [Contender("ours", ours, sets)]
    contenders += [Contender(name, call, sets) for name, call in rivals]
    prediction = data[0]
    if prediction.dtype != torch.float32:
        # Equal values in fp32, in the same rounds: the narrow dtype must not be the slower one.
        wide = tuple(x.float() if x.dtype == prediction.dtype else x for x in data)
        contenders.append(Contender("ours in fp32", ours, placed(wide, device), weigh=False))
    moved = bytes_moved(*data)
    beside = [plain_copy(moved, device), fresh_fill(prediction.nbytes, device)]
    return Problem(contenders, reference, moved, prediction.nbytes, beside)


def token_problem(shape, padding: str, dtype, device: str) -> Problem:
    rivals = [("eager", token_loss_formula), ("compile", compiled(token_loss_formula))]
    return problem_of(
        token_data(shape, padding, dtype),
        device,
        mle.AttentionMaskMseLoss(FOREGROUND, BACKGROUND),
        mle.reference.masked_edit_token_mean_loss,
        rivals,
        token_bytes,
    )


def half_selected_problem(shape, dtype, device: str) -> Problem:
    rivals = [
        ("boolean indexing", boolean_indexing),
        ("where", where_form),
        ("compiled where", compiled(where_form)),
    ]
    return problem_of(
        half_selected_data(shape, dtype),
        device,
        mle.masked_mse,
        mle.reference.masked_mse,
        rivals,
        half_selected_bytes,
    )


LARGE, LARGE_QUICK = (32, 4096, 64), (4, 300, 64)
FP32, BF16 = torch.float32, torch.bfloat16
# name, shape, shape under --quick, padding, dtype, wanted ratios on a CPU with 2 threads
TOKEN_CASES = (
    ("token_large", LARGE, LARGE_QUICK, "right", FP32, {"eager": 10, "compile": 1.8}),
    ("token_large_random", LARGE, LARGE_QUICK, "random", FP32, {"eager": 7, "compile": 1.3}),
    ("token_medium", (16, 1024, 64), (4, 200, 64), "right", FP32, {"eager": 6, "compile": 1.2}),
    ("token_small", (2, 100, 64), (2, 100, 64), "right", FP32, {"eager": 2, "compile": 1.8}),
    ("token_large_bf16", LARGE, LARGE_QUICK, "right", BF16, {"ours in fp32": 1}),
)
USUAL_FORMS = {"boolean indexing": 4, "where": 4}
HALF_SELECTED_CASES = (
    ("masked_mse", (64, 16384), (8, 1024), FP32, USUAL_FORMS),
    ("masked_mse_bf16", (64, 16384), (8, 1024), BF16, {**USUAL_FORMS, "ours in fp32": 1}),
)
PADDING = {"right": "60 % valid, right-padded", "random": "60 % valid, random mask"}


def cases(device: str = "cpu", quick: bool = False) -> list[Case]:
    """The wanted ratios are promises for a CPU and for the full shapes."""
    promised = torch.device(device).type == "cpu" and not quick
    found = []
    for name, full, small, padding, dtype, targets in TOKEN_CASES:
        shape = small if quick else full

        def make(shape=shape, padding=padding, dtype=dtype):
            return token_problem(shape, padding, dtype, device)

        aims = targets if promised else {}
        found.append(Case(name, PADDING[padding], shape, dtype, make, aims))
    for name, full, small, dtype, targets in HALF_SELECTED_CASES:
        shape = small if quick else full

        def make(shape=shape, dtype=dtype):
            return half_selected_problem(shape, dtype, device)

        found.append(Case(name, "a random half", shape, dtype, make, targets if promised else {}))
    return found
