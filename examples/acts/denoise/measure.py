# SPDX-License-Identifier: BSD-3-Clause
"""The loss of the package beside other ways of writing it in PyTorch: value, NaN, time, memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import masked_loss_ext as mle
from benchmarks.harness import Contender
from benchmarks.squared_error import token_data

from ..common.cost import OURS, Cost, measure_cost

FOREGROUND, BACKGROUND = 2.0, 1.0
SHAPE, SHAPE_QUICK = (32, 4096, 64), (4, 200, 64)
ROUNDS, ROUNDS_QUICK = 9, 3


def weighted_error(model_pred, target, edit_mask, weighting) -> Tensor:
    """[B, T]: mean over channels of the weighted squared error."""
    edit_weight = FOREGROUND * edit_mask + BACKGROUND * (1 - edit_mask)
    return ((model_pred - target) ** 2 * weighting * edit_weight[..., None]).mean(-1)


def times_mask(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return (error * attention_mask).sum() / attention_mask.sum()


def where_on_error(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return torch.where(attention_mask, error, 0.0).sum() / attention_mask.sum()


def where_on_operands(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    on = attention_mask[..., None]
    model_pred, target = torch.where(on, model_pred, 0.0), torch.where(on, target, 0.0)
    error = weighted_error(model_pred, target, edit_mask, weighting)
    return error.sum() / attention_mask.sum()


def padding_blind(model_pred, target, attention_mask, edit_mask, weighting) -> Tensor:
    return weighted_error(model_pred, target, edit_mask, weighting).mean()


FORMS: dict[str, Callable[..., Tensor]] = {
    OURS: mle.AttentionMaskMseLoss(FOREGROUND, BACKGROUND),
    "PyTorch, error times mask": times_mask,
    "PyTorch, where on the error": where_on_error,
    "PyTorch, where on both inputs": where_on_operands,
    "PyTorch, mean over padding too": padding_blind,
}


@dataclass(frozen=True)
class FormOnBatch:
    """What one form makes of a batch, and of the same batch with one NaN in the padding."""

    value: float
    off_by: float  # relative to the reference in float64
    nan_loss_finite: bool
    nan_gradient_finite: bool


def loss_forms_on(prediction: Tensor, arguments: dict[str, Tensor]) -> dict[str, FormOnBatch]:
    wide = {k: v.double() if v.is_floating_point() else v for k, v in arguments.items()}
    truth = mle.reference.masked_edit_token_mean_loss(prediction.double(), **wide).item()
    poisoned = prediction.clone()
    row, token = (~arguments["attention_mask"]).nonzero()[0].tolist()
    poisoned[row, token, 0] = torch.nan
    found = {}
    for name, form in FORMS.items():
        value = form(prediction, **arguments).item()
        leaf = poisoned.clone().requires_grad_(True)
        loss = form(leaf, **arguments)
        loss.backward()
        finite = (loss.isfinite().item(), leaf.grad.isfinite().all().item())
        found[name] = FormOnBatch(value, value / truth - 1.0, *finite)
    return found


def contenders(shape: tuple[int, ...], device: torch.device) -> list[Contender]:
    data = tuple(x.to(device) for x in token_data(shape, "right", torch.float32))
    data[0].requires_grad_(True)
    return [Contender(name, form, [data]) for name, form in FORMS.items()]


def time_and_memory(device: torch.device, quick: bool) -> Cost:
    shape, rounds = (SHAPE_QUICK, ROUNDS_QUICK) if quick else (SHAPE, ROUNDS)
    return measure_cost(__name__, shape, device, rounds)
