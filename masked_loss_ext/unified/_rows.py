# SPDX-License-Identifier: BSD-3-Clause
"""A batch of tokens: its arguments checked, what counts in it and sums over that, its documents,
and the one read of the logits.

``starts`` ``[B, S]`` int64 is for each position the column in which its document begins; None where
a row is one document. A change of the segment id begins one.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import (
    REFUSALS,
    broadcasts,
    check_device,
    check_flags,
    check_floating,
    check_integers,
    check_mask,
    check_rank,
    check_tensor,
    check_whole,
    refusal,
    shape_text,
)
from ..ops.cross_entropy_terms import cross_entropy_terms
from ..ops.linear_cross_entropy import masked_linear_cross_entropy
from ..ops.masked_cross_entropy import masked_cross_entropy
from ..ops.repetition import RepetitionCounts, repetition_counts, repetition_links
from ..reference import CrossEntropyTerms


def valid_rows(target, attention_mask=None, ignore_index=-100):
    """Where a row counts: mask on and target not ignored; bool of target's shape."""
    on = target.long() != ignore_index  # -100 and uint8 156 would be equal
    return on if attention_mask is None else on & (attention_mask != 0)


def widened(values):
    """Half precision as float32, in which everything is summed; float64 as it is."""
    return values if values.dtype == torch.float64 else values.float()


def attached_zero(like):
    """0 with a gradient of zeros for ``like``, whatever is stored there."""
    return widened(like.reshape(-1)[:0]).sum()


def masked_sum(values, valid):
    """Sum of the values at valid positions, whatever is stored at the others.

    Selects the values, not what they were computed from: their gradient is 0 where valid is off,
    but 0 * NaN is NaN further back. Clean the operands of a computation that may meet NaN.
    """
    return torch.where(valid, widened(values), 0).sum()


def masked_mean(values, valid):
    """Mean of the values at valid positions; 0, attached to the graph, if there are none."""
    return masked_sum(values, valid) / valid.expand_as(values).sum().clamp(min=1)


def reduced(rows, valid, reduction):
    """Mean or sum over valid rows, or each of them and 0 at the others ("none")."""
    if reduction == "mean":
        return masked_mean(rows, valid)
    if reduction == "sum":
        return masked_sum(rows, valid)
    return torch.where(valid, widened(rows), 0)


def smoothed_loss(terms: CrossEntropyTerms, smoothing: float, classes: int) -> Tensor:
    r"""Cross entropy of a target that has 1 - smoothing, each other class smoothing / (V - 1).

    :math:`-(1 - \varepsilon - e) \log p_y - e V \cdot \tfrac1V \sum_j \log p_j` with
    :math:`e = \varepsilon / (V - 1)`. One class leaves nobody to share with: smoothing 0.
    """
    log_prob, mean_log_prob = terms.scaled_log_prob, terms.scaled_mean_log_prob
    if classes == 1 or smoothing == 0:  # not 0 * mean: that is -inf with a banned class
        return -log_prob
    share = smoothing / (classes - 1)
    return -(1 - smoothing - share) * log_prob - share * classes * mean_log_prob


def torch_smoothing(smoothing, classes):
    """The label_smoothing of masked_cross_entropy and of PyTorch, whose share of every class the
    target gets too, for a smoothing that goes to the others alone."""
    return min(smoothing * classes / (classes - 1), 1.0) if classes > 1 else 0.0


def cleaned(values, valid):
    """The rows ``[..., D]`` that count, 0 in place of the others, as float32 or float64."""
    return torch.where(valid.unsqueeze(-1), widened(values), 0)


def distances(x, y):
    # Not by way of a matrix product: its rounding makes the distance of equal rows large.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def without_autocast(device):
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def per_token(valid: Tensor, rows: Any) -> Tensor | None:
    """Which rows of [N, D] count; all of them where they are not one per token."""
    return valid.reshape(-1) if rows.shape[:-1].numel() == valid.numel() else None


def row_mask(function, mask, like_name, like, name="attention_mask"):
    """The mask of the rows of ``like`` [..., D] as one dimension [N] of bool; None: all count."""
    rows = like.shape[:-1]
    if mask is None:
        return torch.ones(rows, dtype=torch.bool, device=like.device).flatten()
    check_tensor(function, name, mask)
    if mask.numel() != rows.numel() and broadcasts(mask.shape, rows):
        mask = mask.expand(rows)
    if mask.numel() != rows.numel():
        rule = f"have one entry per row of {like_name} {shape_text(like)}"
        raise refusal(function, name, rule, shape_text(mask))
    mask = mask.reshape(rows)
    check_mask(function, name, mask, like_name, like, len(rows))
    return (mask != 0).flatten()


def check_features(function, name, tensor, last=None, last_name=""):
    """A floating tensor, and what its last dimension must be."""
    check_whole(function, name, tensor)
    check_floating(function, name, tensor)
    if last is not None and (tensor.dim() == 0 or tensor.shape[-1] != last):
        got = shape_text(tensor)
        raise refusal(function, name, f"have {last_name} {last} as its last dimension", got)


class Rows(NamedTuple):
    """Tensors ``[B, S]``, and the logits ``[B, S, V]`` where they are read."""

    targets: Tensor  # int64, aligned with the logits
    valid: Tensor  # count in losses
    said: Tensor  # count in repetition statistics: not padding either
    starts: Tensor | None
    logits: Any = None


class Needs(NamedTuple):
    """What a term needs of the one read of the logits, and of the data."""

    scaled: bool = False  # log-probabilities at ``temperature``
    unscaled: bool = False  # entropy and log-probabilities at T = 1
    temperature: Tensor | None = None
    classes: Tensor | None = None  # [B, S], to have the log-probability of; -1 for none
    links: tuple[Tensor, Tensor] | None = None  # of repetition_links
    counts: int | None = None  # n: RepetitionCounts of n-grams of the data


class Read(NamedTuple):
    """What one of those who need something gets."""

    terms: Any  # CrossEntropyTerms
    classes: Tensor | None  # as they were asked for
    class_log_prob: Tensor | None
    counts: Any  # RepetitionCounts


# --- arguments -----------------------------------------------------------------------------------


def rows_of(module, targets, attention_mask, segment_ids=None, argument="targets") -> Rows:
    """Of ``targets`` ``[B, S]``, a mask like them and segment ids ``[B, S]`` or ``[1, S]``, for a
    module with an ignore_index."""
    function = module.function
    check_whole(function, argument, targets)
    check_integers(function, argument, targets)
    check_rank(function, argument, targets, 2, "[B, S]")
    if attention_mask is not None:
        check_tensor(function, "attention_mask", attention_mask)
        if attention_mask.dim() != 2:
            raise ValueError(
                f"{function}: attention_mask must have 2 dimensions [B, S], the tokenizer's, got "
                f"{shape_text(attention_mask)} (a mask [B, 1, S, S] that attention adds to its "
                "scores says nothing about targets)"
            )
    check_mask(function, "attention_mask", attention_mask, argument, targets, 2, broadcast=True)
    starts = _document_starts(function, segment_ids, argument, targets)
    targets = targets.long()
    valid = valid_rows(targets, attention_mask, module.ignore_index)
    return Rows(targets, valid, valid, starts)


def check_logits(function, logits, targets, vocab_size=None, argument="logits", like="targets"):
    """``[B, S, V]`` of the targets' B and S, and of the vocabulary that was promised."""
    check_features(function, argument, logits)
    check_rank(function, argument, logits, 3, "[B, S, V]")
    check_device(function, like, targets, argument, logits)
    if logits.shape[:2] != targets.shape:
        got = shape_text(logits)
        raise refusal(function, argument, f"have the B and S of {like} {shape_text(targets)}", got)
    check_vocabulary(function, logits, vocab_size, argument)


def check_vocabulary(function, logits, vocab_size, argument="logits"):
    if vocab_size is None or (logits.dim() and logits.shape[-1] == vocab_size):
        return
    raise ValueError(
        f"{function}: {argument} must have vocab_size = {vocab_size} classes in the last "
        f"dimension, got {shape_text(logits)}: pass "
        f"vocab_size={logits.shape[-1] if logits.dim() else 1} (padded vocabularies count in full)"
    )


def check_list(function, argument, value):
    if not isinstance(value, (list, tuple)):
        raise refusal(function, argument, "be a list of tensors", type(value).__name__, TypeError)


def check_tokens(function, arguments, logits, targets, attention_mask):
    """Logits ``[..., V]``, targets ``[...]`` and a mask like them; ``arguments`` are the names of
    the first two."""
    check_features(function, arguments[0], logits)
    check_integers(function, arguments[1], targets)
    if logits.dim() == 0 or targets.shape != logits.shape[:-1]:
        rule = f"have the shape of {arguments[0]} {shape_text(logits)} without the last dimension"
        raise refusal(function, arguments[1], rule, shape_text(targets))
    check_device(function, arguments[1], targets, arguments[0], logits)
    dims = targets.dim()
    check_mask(
        function, "attention_mask", attention_mask, arguments[1], targets, dims, broadcast=True
    )


def may_be_on(function, mtp_active):
    """Whether heads are active, or only the device knows."""
    if isinstance(mtp_active, Tensor):
        return True
    check_flags(function, {"mtp_active": mtp_active})
    return bool(mtp_active)


# --- documents -----------------------------------------------------------------------------------


def _document_starts(function, segment_ids, argument, targets):
    if segment_ids is None:
        return None
    check_integers(function, "segment_ids", segment_ids)
    if segment_ids.shape not in (targets.shape, (1, *targets.shape[1:])):
        rule = f"have the shape of {argument} {shape_text(targets)} (or one row for all)"
        raise refusal(function, "segment_ids", rule, shape_text(segment_ids))
    check_device(function, "segment_ids", segment_ids, argument, targets)
    ids = segment_ids.long().expand(targets.shape)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins = torch.cat([begins[:, :1], ids[:, 1:] != ids[:, :-1]], 1)
    return torch.where(begins, columns(ids), 0).cummax(-1).values


def columns(like):
    return torch.arange(like.shape[-1], device=like.device)


def of_one_document(starts, distance):
    """``[B, S - distance]``: whether a position and the one ``distance`` >= 1 on share one."""
    return starts[:, distance:] == starts[:, :-distance]


def document_links(rows: Rows, ngram_size):
    """``repetition_links`` of which none leaves its document."""
    before, after = repetition_links(rows.targets, rows.said, ngram_size)
    if rows.starts is None:
        return before, after
    # A window of the same document ends n - 1 behind its beginning, at the least. One that ends
    # in the document but begins before it finds none that does: a later document is later.
    return torch.where(before >= rows.starts + (ngram_size - 1), before, -1), after


def document_counts(rows: Rows, ngram_size):
    """``repetition_counts`` of documents: ``pairs`` and ``windows`` ``[B]``, summed over those of a
    row, ``longest_run`` ``[B, S]``, in the column in which a document begins and 0 elsewhere."""
    targets, valid, starts = rows.targets, rows.said, rows.starts
    if starts is None:
        return repetition_counts(targets, valid, ngram_size)
    # A token of another document is another token. Windows that cross a border are then equal to
    # none, so that only their number has to be corrected.
    named = (starts << 32) + targets
    pairs = repetition_counts(named, valid, ngram_size).pairs
    column = columns(targets)
    off = torch.where(valid, -1, column).cummax(-1).values
    windows = column - (ngram_size - 1) > torch.maximum(off, starts - 1)
    same = valid[:, 1:] & valid[:, :-1] & (named[:, 1:] == named[:, :-1])
    goes_on = torch.cat([torch.zeros_like(valid[:, :1]), same], 1)
    run = column - torch.where(goes_on, 0, column).cummax(-1).values + 1
    run = torch.where(valid, run, 0)
    longest = torch.zeros_like(run).scatter_reduce(1, starts, run, "amax")
    return RepetitionCounts(pairs, windows.sum(-1), None, longest)


# --- the operators -------------------------------------------------------------------------------


def read(module, rows: Rows, needs: Sequence[Needs], argument="targets") -> list[Read]:
    """The terms of the logits that any of ``needs`` asks for, in one read of them, and the counts
    of the data; to each what it needs. Of a module with an ignore_index."""
    classes = [need.classes for need in needs if need.classes is not None]
    unscaled = bool(classes) or any(need.unscaled for need in needs)
    terms: Any = None
    if unscaled or any(need.scaled for need in needs):
        try:
            terms = cross_entropy_terms(
                rows.logits,
                rows.targets,
                rows.valid,
                temperature=_only([need.temperature for need in needs]),
                classes=torch.stack(classes, -1) if classes else None,
                links=_only([need.links for need in needs]),
                ignore_index=module.ignore_index,
                unscaled=unscaled,
            )
        except (ValueError, TypeError, IndexError) as error:
            raise _renamed(error, "cross_entropy_terms", module.function, argument) from None
    ngrams = [need.counts for need in needs if need.counts is not None]
    counts = document_counts(rows, max(ngrams)) if ngrams else None
    found = iter(terms.class_log_prob.unbind(-1)) if classes else iter(())
    return [
        Read(terms, n.classes, None if n.classes is None else next(found), counts) for n in needs
    ]


def _only(asked):
    return next(iter([one for one in asked if one is not None]), None)


def cross_entropy(function, arguments, logits, targets, attention_mask=None, **options: Any):
    """``masked_cross_entropy`` for the module ``function``, which calls logits and targets by the
    names in ``arguments``."""
    try:
        return masked_cross_entropy(logits, targets, attention_mask, **options)
    except REFUSALS as error:
        check_tokens(function, arguments, logits, targets, attention_mask)
        if not isinstance(error, (ValueError, TypeError, IndexError)):
            raise
        raise _renamed(error, "masked_cross_entropy", function, arguments[1]) from None


def linear_cross_entropy(function, argument, hidden, layer, targets, on, **options: Any):
    """``masked_linear_cross_entropy`` of a weight and a bias for the module ``function``, which
    calls the targets ``argument`` and has checked shapes and dtypes."""
    weight, bias = layer
    try:
        return masked_linear_cross_entropy(hidden, weight, targets, on, bias=bias, **options)
    except (ValueError, TypeError, IndexError) as error:
        raise _renamed(error, "masked_linear_cross_entropy", function, argument) from None


def _renamed(error, operator, function, argument):
    text = str(error).replace(f"{operator}: target ", f"{function}: {argument} ")
    text = text.replace(f"{operator}: mask ", f"{function}: attention_mask ")
    return type(error)(text.replace(f"{operator}: ", f"{function}: "))
