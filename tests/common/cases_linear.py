# SPDX-License-Identifier: BSD-3-Clause
"""The cases of cases_cross_entropy.py for the losses from hidden states: the same rows, labels,
masks and weights; hidden states, a head and a bias in the place of the logits.

Names: "head" is the classifier's weight, "weight" the class weights, as in the other tables.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from cases_cross_entropy import make

WIDTHS = (1, 2, 3, 5, 7, 8, 17, 33)
DIFFERENTIABLE = ("hidden", "token_weight", "head", "bias")


def linear(module):
    """module.masked_linear_cross_entropy under these names."""

    def loss(hidden, head, target, mask=None, *, weight=None, **keywords):
        return module.masked_linear_cross_entropy(
            hidden, head, target, mask, class_weight=weight, **keywords
        )

    return loss


def width_of(case):
    """A width of the hidden states per case, any, the same in each run."""
    return WIDTHS[sum(map(ord, case.name)) % len(WIDTHS)]


def make_linear(case, dtype, seed=0, bias=None, width=None):
    """The tensor arguments of a case. bias: whether there is one; None: in every second case, and
    where classes are banned."""
    *rows, classes = case.shape
    width = width or width_of(case)
    bias = bias if bias is not None else bool(case.banned) or len(case.name) % 2 == 0
    hidden = make(replace(case, shape=(*rows, width), spread=1.0, banned=0.0), dtype, seed)
    inputs = make(replace(case, banned=0.0), dtype, seed)
    del inputs["logits"]
    g = torch.Generator().manual_seed(seed + 1)
    head = torch.randn(classes, width, generator=g, dtype=torch.float64)
    inputs["hidden"] = hidden["logits"]
    inputs["head"] = (head * (case.spread / width**0.5)).to(dtype)
    if bias:
        inputs["bias"] = torch.randn(classes, generator=g, dtype=torch.float64).to(dtype)
    if case.banned:
        banned = torch.rand(classes, generator=g) < case.banned
        banned[0] = False
        inputs["bias"] = inputs["bias"].masked_fill(banned, -torch.inf)
        labels = inputs["target"]
        is_label = (labels >= 0) & (labels < classes)
        inputs["target"] = labels.masked_fill(is_label & banned[labels * is_label], 0)
    return inputs


def logits_of(inputs):
    return F.linear(inputs["hidden"], inputs["head"], inputs.get("bias"))
