# SPDX-License-Identifier: BSD-3-Clause
"""The data and contenders of the kinds of workloads (workloads.py has their shapes).

What the benchmarks of single functions have is taken from there; here are batches for
reinforcement learning, patches of masked autoencoders, and TRL's functions of logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import masked_loss_ext as mle

from . import block_mask, cross_entropy_problems, linear_rivals, rivals, squared_error
from . import linear_problems as linear
from .contenders import compiled
from .cross_entropy_problems import IGNORED, SEED
from .harness import Contender, Problem
from .linear_truth import head_truth
from .rivals import Library

FEWEST_CHUNK_ROWS = 8
TRL_LOGITS = "TRL selective_log_softmax"
OWN_LOGITS, ONE_SWEEP = "ours of logits", "ours in one sweep"

# --- the head of a language model ----------------------------------------------------------------


def ours_of_logits(hidden, weight, target):
    return mle.masked_cross_entropy(F.linear(hidden, weight), target)


def few_rows_text(shape: tuple) -> str:
    """PyTorch's chunked form cuts any number of rows into about V / D chunks: a workload scaled to
    few rows has it multiply them one by one, which says nothing about the model's shape."""
    rows, width, classes = shape
    chunk = math.ceil(rows / math.ceil(classes / width))
    return "" if chunk >= FEWEST_CHUNK_ROWS else f"it would take {chunk} of these rows at a time"


def head_problem(shape: tuple, dtype: torch.dtype, ignored: float, device: str) -> Problem:
    calls = {"ours": linear.ours, OWN_LOGITS: ours_of_logits, "eager": linear.eager}
    if dtype != torch.float32:
        calls[".float()"] = linear.widened
    calls["compile"] = compiled(linear.eager)
    names = tuple(linear_rivals.MEANS)
    problem = linear.mean_problem(shape, dtype, ignored, device, calls, names)
    why = few_rows_text(shape)
    contenders = [
        replace(one, skip=why) if why and one.name == linear_rivals.TORCH and not one.skip else one
        for one in problem.contenders
    ]
    return replace(problem, contenders=contenders, truth=head_truth)


# --- logits --------------------------------------------------------------------------------------


def trl_of_logits() -> Callable:
    from trl.trainer.utils import selective_log_softmax

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        counted = target != IGNORED
        log_prob = selective_log_softmax(logits, target.clamp_min(0), row_mask=counted)
        return -log_prob.sum() / counted.sum()

    return mean


LOGITS = {TRL_LOGITS: Library(linear_rivals.NEEDS_TRL, trl_of_logits, "trl")}


def logits_problem(shape: tuple, dtype: torch.dtype, ignored: float, device: str) -> Problem:
    problem = cross_entropy_problems.train_problem(shape, dtype, ignored, device)
    ours, *others = problem.contenders
    sweep = Contender(ONE_SWEEP, cross_entropy_problems.ours_in_forward, ours.inputs)
    slack = linear.slack_of(dtype, linear.ORDER_SLACK)
    trl = linear_rivals.contenders(tuple(LOGITS), LOGITS, ours.inputs, slack)
    kernels = rivals.contenders(*ours.inputs[0])
    return replace(problem, contenders=[ours, sweep, *others, *trl, *kernels])


# --- reinforcement learning ----------------------------------------------------------------------


def policy_data(shape: tuple, dtype: torch.dtype, device: str) -> tuple:
    """Hidden states of prompts and completions [N, D], a head, the tokens drawn, which of them are
    a completion's [N], and the advantage of each completion at its tokens [N]."""
    batch, prompt, completion, width, classes = shape
    rows = batch * (prompt + completion)
    hidden, weight, target = linear.layer_data((rows, width, classes), dtype, 0.0, device)
    generator = torch.Generator().manual_seed(SEED)
    lengths = squared_error.unequal_lengths(batch, completion, generator)
    position = torch.arange(prompt + completion) - prompt
    mask = (position >= 0) & (position < lengths[:, None])
    advantages = torch.randn(batch, 1, generator=generator).expand_as(mask)
    return hidden, weight, target, mask.reshape(-1).to(device), advantages.reshape(-1).to(device)


def policy_objective(log_prob, entropy, advantages, counted) -> Tensor:
    return (log_prob * advantages + linear.ENTROPY_SHARE * entropy).sum() / counted


def our_policy(hidden, weight, target, mask, advantages):
    found = mle.linear_row_statistics(hidden, weight, target, mask)
    return policy_objective(found.log_prob, found.entropy, advantages, mask.sum())


def of_completions(shape: tuple, statistics: Callable) -> Callable:
    """As trainers do it who have no kernel for a mask: prompts are cut off, the padding behind the
    completions is computed and masked."""
    batch, prompt, completion = shape[:3]

    def cut(tensor: Tensor) -> Tensor:
        whole = tensor.view(batch, prompt + completion, *tensor.shape[1:])
        return whole[:, prompt:].reshape(batch * completion, *tensor.shape[1:])

    def policy(hidden, weight, target, mask, advantages):
        rows, labels, on, factors = map(cut, (hidden, target, mask, advantages))
        log_prob, entropy = statistics(rows, weight, labels, on)
        log_prob, entropy = torch.where(on, log_prob, 0), torch.where(on, entropy, 0)
        return policy_objective(log_prob, entropy, factors, on.sum())

    return policy


def own_logits(rows, weight, labels, on):
    found = mle.row_statistics(F.linear(rows, weight), labels, on)
    return found.log_prob, found.entropy


def plain_statistics(rows, weight, labels, on):
    log_p = torch.log_softmax(F.linear(rows, weight).float(), -1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def trl_statistics_of_logits() -> Callable:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def statistics(rows, weight, labels, on):
        return selective_log_softmax_and_entropy(F.linear(rows, weight), labels, row_mask=on)

    return statistics


def trl_statistics_of_hidden() -> Callable:
    function = linear_rivals.trl_function()

    def statistics(rows, weight, labels, on):
        tile = linear_rivals.TRL_CLASSES
        return function(rows, weight, None, labels, 1.0, tile, None, 1.0, ("entropy",))[:2]

    return statistics


POLICIES = {
    TRL_LOGITS: Library(linear_rivals.NEEDS_TRL, trl_statistics_of_logits, "trl"),
    linear_rivals.TRL: Library(linear_rivals.NEEDS_TRL, trl_statistics_of_hidden, "trl"),
}


def true_policy(hidden, weight, target, mask, advantages):
    kept = mask.nonzero()[:, 0]
    flow = advantages[kept].double() / len(kept)
    entropy_flow = torch.full_like(flow, linear.ENTROPY_SHARE / len(kept))
    return linear.true_statistics(hidden[kept], weight, target[kept], flow, entropy_flow)[0]


def policy_problem(shape: tuple, dtype: torch.dtype, device: str) -> Problem:
    data = hidden, weight, _, mask, _ = policy_data(shape, dtype, device)
    counted = int(mask.sum())
    calls = {"ours": our_policy}
    forms = {OWN_LOGITS: own_logits, "eager": plain_statistics}
    calls |= {name: of_completions(shape, form) for name, form in forms.items()}
    calls["compile"] = compiled(calls["eager"])
    slack = linear.slack_of(dtype, linear.ORDER_SLACK)
    others = [
        replace(one, call=of_completions(shape, one.call)) if not one.skip else one
        for one in linear_rivals.contenders(tuple(POLICIES), POLICIES, [data], slack)
    ]
    floor = linear.products_floor(hidden, weight, counted, counted)
    unit = linear.SPREAD / math.sqrt(shape[3]) / counted
    return linear.made_problem(data, calls, others, true_policy, floor, unit)


# --- images --------------------------------------------------------------------------------------


def patch_error(prediction, target, hidden):
    """The reconstruction error of masked autoencoders as it is usually written."""
    error = ((prediction.float() - target.float()) ** 2).mean(-1)
    return (error * hidden).sum() / hidden.sum()


def patch_bytes(prediction, target, hidden) -> int:
    return squared_error.half_selected_bytes(
        prediction, target, hidden[..., None].expand_as(target)
    )


def patches_problem(shape: tuple, dtype: torch.dtype, ignored: float, device: str) -> Problem:
    generator = torch.Generator().manual_seed(SEED)
    prediction, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    order = torch.rand(shape[:2], generator=generator).argsort(-1)
    hidden = order >= round(ignored * shape[1])  # as many of every image
    forms = [
        ("boolean indexing", squared_error.boolean_indexing),
        ("eager", patch_error),
        ("compile", compiled(patch_error)),
    ]
    reference = mle.reference.masked_mse
    data = (prediction, target, hidden)
    return squared_error.problem_of(data, device, mle.masked_mse, reference, forms, patch_bytes)


def tokens_problem(shape: tuple, dtype: torch.dtype, device: str) -> Problem:
    return squared_error.token_problem(shape, "right", dtype, device)


def mask_problem(shape: tuple, device: str) -> Problem:
    samples, patches, registers = shape
    length = samples * (patches + registers)
    return block_mask.problem_of(length, "full", True, device, patches, registers)
