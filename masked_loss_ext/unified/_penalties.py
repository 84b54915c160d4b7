# SPDX-License-Identifier: BSD-3-Clause
"""Penalties on what a model should not say next: classes asked for, and -log(1 - p) of them.

Per row a class that is not asked for is -1, as cross_entropy_terms takes it.
"""

import math

import torch

from .._checks import check_choice
from ..reference.cross_entropy_terms import LARGEST_LOG_PROB
from ._documents import columns, of_one_document
from ._rows import masked_mean, reduced

PENALTY_ON = ("targets", "model")
_HALF = -math.log(2)


def check_penalty_on(name, penalty_on):
    check_choice(name, "penalty_on", penalty_on, PENALTY_ON)


def unlikelihood(log_prob, asked):
    """-log(1 - p) where asked for, 0 elsewhere; finite for p = 1."""
    bounded = torch.where(asked, log_prob, -1.0).clamp(max=LARGEST_LOG_PROB)
    # Near p = 1 the difference 1 - exp loses what expm1 keeps; below, the derivative of expm1,
    # computed as (p - 1) + 1, loses a small p.
    likely = torch.log(-torch.expm1(bounded))
    unlikely = torch.log1p(-bounded.exp())
    return torch.where(asked, -torch.where(bounded > _HALF, likely, unlikely), 0)


def mean_unlikelihood(log_prob, asked):
    return masked_mean(unlikelihood(log_prob, asked), asked)


def _early_rows(rule, valid, starts):
    column = columns(valid) if starts is None else columns(valid) - starts
    return valid & (column < rule.min_sequence_length)


def penalises_eos(rule):
    return rule.eos_token_id is not None and rule.eos_penalty_weight > 0


def eos_classes(rule, targets, valid, starts=None):
    """EOS at early rows at which the data goes on, ``[B, S]``; None where the data is penalised.

    ``rule`` is the module with eos_token_id, eos_penalty_weight, min_sequence_length, penalty_on.
    """
    if rule.penalty_on == "targets" or not penalises_eos(rule):
        return None
    goes_on = _early_rows(rule, valid, starts) & (targets != rule.eos_token_id)
    return torch.where(goes_on, rule.eos_token_id, -1)


def eos_penalty(rule, targets, valid, starts, asked, dtype, reduction="mean"):
    """Weighted and reduced; ``asked`` are ``eos_classes`` and their log-probabilities."""
    classes, class_log_prob = asked
    if not penalises_eos(rule):
        return 0.0
    if classes is None:
        ends = _early_rows(rule, valid, starts) & (targets == rule.eos_token_id)
        return rule.eos_penalty_weight * reduced(ends.to(dtype), valid, reduction)
    wanted = classes >= 0
    rows = unlikelihood(class_log_prob, wanted)
    return rule.eos_penalty_weight * reduced(rows, wanted, reduction)


def previous_classes(targets, valid, starts=None):
    """The target before, where both count and differ, ``[B, S]``."""
    before = torch.cat([torch.full_like(targets[:, :1], -1), targets[:, :-1]], 1)
    counts = valid[:, :-1] if starts is None else valid[:, :-1] & of_one_document(starts, 1)
    both = valid & torch.cat([torch.zeros_like(valid[:, :1]), counts], 1)
    return torch.where(both & (before != targets), before, -1)
