# SPDX-License-Identifier: BSD-3-Clause
"""The terms that language-model losses are made of, per row, of softmax at temperature T and at 1.

With z the logits, y the label and p = softmax(z), of a row that counts (exactly 0 of others):

    scaled_log_prob        log softmax(z / T)_y
    scaled_mean_log_prob   1 / V sum_j log softmax(z / T)_j
    log_prob               log p_y
    entropy                -sum_j p_j log p_j
    class_log_prob         log p_c at each class asked for
    unlikelihood           sum_c -log(1 - p_c) over the n-gram candidates c of the row
    candidates             how many they are

A candidate of position t is a class that, predicted there, would repeat an n-gram of the same
sequence. The links lead from t to the earlier positions that have the same n - 1 tokens before
them: u = context_before[t], context_before[u], ... until -1. The label of u is one, unless it is
that of t, or the same n-gram ends once more before t (ngram_after[u] < t; so each class counts
once).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cross_entropy import counted_rows, scaled_logits
from .squared_error import select

# Above it log p is taken for it, which keeps -log(1 - p) finite (at most 24 ln 2), and is constant.
LARGEST_LOG_PROB = -(2.0**-24)


class CrossEntropyTerms(NamedTuple):
    """Per row; None what was not asked for. The formulas stand in ops/cross_entropy_terms.py."""

    scaled_log_prob: Tensor
    scaled_mean_log_prob: Tensor
    log_prob: Tensor | None
    entropy: Tensor | None
    class_log_prob: Tensor | None
    unlikelihood: Tensor | None
    candidates: Tensor | None


def _log_softmax(z):
    return z - torch.logsumexp(z, -1, keepdim=True)


def _entropy(log_p):
    finite = log_p.masked_fill(log_p == -torch.inf, 0)  # 0 * -inf must not come about
    return -(torch.exp(log_p) * finite).sum(-1)


def earlier_in_chain(context_before):
    """Whether u is on the chain of t: bool [..., t, u].

    By doubling: after k rounds all within 2^k links are known. Only links backwards count.
    """
    size = context_before.shape[-1]
    position = torch.arange(size, device=context_before.device)
    backwards = (context_before >= 0) & (context_before < position)
    jump = torch.where(backwards, context_before.long(), size)
    jump = torch.cat([jump, torch.full_like(jump[..., :1], size)], -1)  # `size` leads to itself
    reach = jump.unsqueeze(-1) == position
    for _ in range(size.bit_length()):
        reach = reach | reach.gather(-2, jump.unsqueeze(-1).expand(reach.shape))
        jump = jump.gather(-1, jump)
    return reach[..., :size, :]


def candidate_positions(labels, on, context_before, ngram_after):
    """Whether the label of u is a candidate of t: bool [..., t, u]."""
    t = torch.arange(labels.shape[-1], device=labels.device).unsqueeze(-1)
    taken = earlier_in_chain(context_before) & (ngram_after.unsqueeze(-2) >= t)
    taken = taken & (labels.unsqueeze(-2) != labels.unsqueeze(-1))
    return taken & on.unsqueeze(-2) & on.unsqueeze(-1)


def _unlikelihood(log_p, labels, on, links):
    taken = candidate_positions(labels, on, *links)
    log_p_u = log_p.gather(-1, labels.unsqueeze(-2).expand(taken.shape))
    bounded = torch.where(taken, log_p_u, -1.0).clamp(max=LARGEST_LOG_PROB)
    terms = -torch.log(-torch.expm1(bounded))
    return select(taken, terms).sum(-1), taken.sum(-1).to(log_p.dtype)


def cross_entropy_terms(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor | None = None,
    classes: Tensor | None = None,
    links: tuple[Tensor, Tensor] | None = None,
    ignore_index: int = -100,
    unscaled: bool = True,
) -> CrossEntropyTerms:
    """The terms above; ``classes`` [..., K], negative where none is asked for (0)."""
    labels, on = counted_rows(logits, target, mask, ignore_index)
    z = scaled_logits(logits, on)

    def at_labels(log_p):
        return select(on, log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1))

    scaled = _log_softmax(z if temperature is None else z / temperature)
    scaled_terms = at_labels(scaled), select(on, scaled.mean(-1))
    if not unscaled:
        return CrossEntropyTerms(*scaled_terms, None, None, None, None, None)
    log_p = _log_softmax(z)
    class_log_prob = unlikelihood = candidates = None
    if classes is not None:
        asked = (classes >= 0) & on.unsqueeze(-1)
        class_log_prob = select(asked, log_p.gather(-1, torch.where(asked, classes, 0)))
    if links is not None:
        unlikelihood, candidates = _unlikelihood(log_p, labels, on, links)
    return CrossEntropyTerms(
        *scaled_terms,
        at_labels(log_p),
        select(on, _entropy(log_p)),
        class_log_prob,
        unlikelihood,
        candidates,
    )
