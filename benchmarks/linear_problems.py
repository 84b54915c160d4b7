# SPDX-License-Identifier: BSD-3-Clause
"""The data of the logit-free cases, their contenders, their floors and their truth.

A floor is the products alone that nobody can do without, of the rows that count, into memory that
is there already. The truth is the reference in float64, some rows at a time, or its logits would be
the largest thing of the whole run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import masked_loss_ext as mle

from . import linear_rivals
from .contenders import compiled
from .cross_entropy_problems import GRADIENT_TOLERANCE, IGNORED, SEED, SPREAD
from .harness import Contender, Problem

Shape = tuple[int, int, int]  # rows N, hidden numbers D, classes V
TRUE_ROWS = 256
# bfloat16 logits are rounded, and so is their gradient: asked is that they compute the same.
HALF_SLACK = 2.0**-5
# Of others in float32, who may add up a large head in another order.
ORDER_SLACK = 1e-4
ENTROPY_SHARE = 0.01  # of the entropy in the objective of a policy
PRODUCTS = "products"


# --- calls ---------------------------------------------------------------------------------------


def ours(hidden, weight, target):
    return mle.masked_linear_cross_entropy(hidden, weight, target)


def ours_in_chunks(rows: int) -> Callable:
    def of_so_many(hidden, weight, target):
        return mle.masked_linear_cross_entropy(hidden, weight, target, chunk_rows=rows)

    return of_so_many


def ours_counted(count: int) -> Callable:
    """The loader knows how many rows count, so that nobody waits for the device to say so."""

    def of_known_count(hidden, weight, target):
        return mle.masked_linear_cross_entropy(hidden, weight, target, num_valid=count)

    return of_known_count


def eager(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight), target)


def widened(hidden, weight, target):
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def objective(log_prob, entropy, log_prob_gradient, entropy_gradient):
    """A policy's: what flows into each row is given."""
    return (log_prob * log_prob_gradient + entropy * entropy_gradient).sum(), log_prob, entropy


def our_statistics(hidden, weight, target, *upstream):
    found = mle.linear_row_statistics(hidden, weight, target)
    return objective(found.log_prob, found.entropy, *upstream)


def counted_statistics(count: int) -> Callable:
    def of_known_count(hidden, weight, target, *upstream):
        found = mle.linear_row_statistics(hidden, weight, target, num_valid=count)
        return objective(found.log_prob, found.entropy, *upstream)

    return of_known_count


def full_statistics(hidden, weight, target, *upstream):
    found = mle.row_statistics(F.linear(hidden, weight), target)
    return objective(found.log_prob, found.entropy, *upstream)


def eager_statistics(hidden, weight, target, *upstream):
    log_p = torch.log_softmax(F.linear(hidden, weight).float(), -1)
    log_prob = log_p.gather(-1, target[:, None])[:, 0]
    return objective(log_prob, -(log_p.exp() * log_p).sum(-1), *upstream)


# --- truth ---------------------------------------------------------------------------------------


def true_mean(hidden, weight, target):
    def part(rows, weight, labels):
        return mle.reference.masked_linear_cross_entropy(rows, weight, labels, reduction="sum")

    kept = (target != IGNORED).nonzero()[:, 0]
    sums = [
        checkpoint(part, hidden[rows], weight, target[rows], use_reentrant=False)
        for rows in kept.split(TRUE_ROWS)
    ]
    return torch.stack(sums).sum() / len(kept)


def true_statistics(hidden, weight, target, *upstream):
    def part(rows, weight, labels):
        found = mle.reference.linear_row_statistics(rows, weight, labels)
        return found.log_prob, found.entropy

    pairs = [
        checkpoint(part, rows, weight, labels, use_reentrant=False)
        for rows, labels in zip(hidden.split(TRUE_ROWS), target.split(TRUE_ROWS), strict=True)
    ]
    return objective(*map(torch.cat, zip(*pairs, strict=True)), *upstream)


# --- data ----------------------------------------------------------------------------------------


def layer_data(shape: Shape, dtype: torch.dtype, ignored: float, device: str = "cpu") -> tuple:
    """Hidden states [N, D], a head [V, D], labels [N], exactly the share ``ignored`` IGNORED."""
    rows, width, classes = shape
    made = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
    hidden = torch.randn(rows, width, **made).to(dtype).requires_grad_(True)
    weight = torch.randn(classes, width, **made).mul_(SPREAD / math.sqrt(width)).to(dtype)
    target = torch.randint(classes, (rows,), **made)
    target[torch.randperm(rows, **made)[: round(ignored * rows)]] = IGNORED
    return hidden, weight.requires_grad_(True), target


def upstream_data(rows: int, without: float, device: str) -> tuple[Tensor, Tensor]:
    """[N] what flows into log p and into the entropy; nothing into the share ``without``."""
    made = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
    log_prob_gradient = torch.rand(rows, **made) + 0.5
    log_prob_gradient[torch.randperm(rows, **made)[: round(without * rows)]] = 0
    return log_prob_gradient, ENTROPY_SHARE * log_prob_gradient


def gradient_bytes(hidden: Tensor, weight: Tensor) -> int:
    return hidden.nbytes + weight.nbytes


def products_floor(hidden: Tensor, weight: Tensor, forward: int, backward: int) -> Contender:
    """Logits of ``forward`` rows and, where those are not all, of ``backward`` of them again; the
    two products of the gradients of ``backward``."""
    rows, head = hidden.detach()[:forward].clone(), weight.detach()
    logits = hidden.new_empty(forward, len(weight))
    out_rows, out_head = torch.empty_like(rows[:backward]), torch.empty_like(head)

    def products(rows: Tensor, head: Tensor) -> Tensor:
        torch.mm(rows, head.t(), out=logits)
        some = logits[:backward]
        if backward < forward:
            torch.mm(rows[:backward], head.t(), out=some)
        torch.mm(some, head, out=out_rows)
        return torch.mm(some.t(), rows[:backward], out=out_head)

    return Contender(PRODUCTS, products, [(rows, head)], role="floor", weigh=False)


# --- problems ------------------------------------------------------------------------------------


def slack_of(dtype: torch.dtype, in_float32: float = 0.0) -> float:
    return in_float32 if dtype == torch.float32 else HALF_SLACK


def made_problem(
    data: tuple,
    calls: Mapping[str, Callable],
    rivals: Sequence[Contender],
    reference: Callable,
    floor: Contender,
    unit: float,
) -> Problem:
    hidden, weight = data[:2]
    slack = slack_of(hidden.dtype)
    contenders = [Contender(name, call, [data], slack=slack) for name, call in calls.items()]
    return Problem(
        [*contenders, *rivals],
        reference,
        bytes_moved=0,  # it is products that take the time
        gradient_bytes=0,
        beside=[floor],
        gradient_tolerance=GRADIENT_TOLERANCE,
        gradient_unit=unit,
        left_bytes=gradient_bytes(hidden, weight),
    )


def mean_problem(
    shape: Shape,
    dtype: torch.dtype,
    ignored: float,
    device: str,
    calls: Mapping[str, Callable],
    rivals: Sequence[str] = (),
) -> Problem:
    """Forward and backward of the mean over the rows that count."""
    data = hidden, weight, target = layer_data(shape, dtype, ignored, device)
    counted = int((target != IGNORED).sum())
    others = linear_rivals.contenders(
        rivals, linear_rivals.MEANS, [data], slack_of(dtype, ORDER_SLACK)
    )
    floor = products_floor(hidden, weight, counted, counted)
    # A number of the hidden state's gradient is about one of the head over the count.
    unit = SPREAD / math.sqrt(shape[1]) / counted
    return made_problem(data, calls, others, true_mean, floor, unit)


def train_problem(
    shape: Shape, dtype: torch.dtype, ignored: float, device: str, rivals: Sequence[str]
) -> Problem:
    calls = {"ours": ours, "eager": eager}
    if dtype != torch.float32:
        calls[".float()"] = widened
    calls["compile"] = compiled(eager)
    return mean_problem(shape, dtype, ignored, device, calls, rivals)


def memory_problem(shape: Shape, dtype: torch.dtype, ignored: float, device: str) -> Problem:
    calls = {"ours": ours, "128 rows at a time": ours_in_chunks(128), "eager": eager}
    return mean_problem(shape, dtype, ignored, device, calls)


def statistics_problem(
    shape: Shape,
    dtype: torch.dtype,
    without: float,
    device: str,
    calls: Mapping[str, Callable],
    rivals: Sequence[str] = (),
) -> Problem:
    """Log p and entropy of every row; nothing flows into the share ``without`` of them."""
    layer = hidden, weight, _ = layer_data(shape, dtype, 0.0, device)
    rows = shape[0]
    data = (*layer, *upstream_data(rows, without, device))
    others = linear_rivals.contenders(
        rivals, linear_rivals.STATISTICS, [data], slack_of(dtype, ORDER_SLACK)
    )
    floor = products_floor(hidden, weight, rows, rows - round(without * rows))
    unit = SPREAD / math.sqrt(shape[1])
    return made_problem(data, calls, others, true_statistics, floor, unit)


STATISTICS_CALLS = {
    "ours": our_statistics,
    "full logits": full_statistics,
    "eager": eager_statistics,
}
