# SPDX-License-Identifier: BSD-3-Clause
"""Losses of logits whose classes are spread over ranks: each has a shard of the vocabulary.

Every rank of the group calls with the same rows, labels and keywords and with its own columns (its
own rows of the classifier's weight), and gets the results of whole rows. One message goes round,
an all-gather of what each shard's rows come to, 32 bytes a row (16 more with statistics, and with
label smoothing); shards are merged in the order of the ranks, by the rule by which the pieces of a
long row are. The gradient of a shard follows from the results, without a message.
"""

from typing import Any

import torch

from .._checks import check_flags, check_floating, check_length, check_tensor, refusal
from ..ops import linear_cross_entropy as linear
from ..ops import vocab_parallel as ops
from ..ops.linear_cross_entropy_derivatives import DEFAULTS as LINEAR_DEFAULTS
from ..ops.masked_cross_entropy import SHOWN, Number, loss_of_rows, statistics_of_rows
from ..ops.masked_cross_entropy_checks import check_overwritable
from ..ops.masked_cross_entropy_derivatives import DEFAULTS
from ..reference import RowStatistics
from ._group import (
    check_in_order,
    gathered,
    group_rank,
    group_size,
    process_group,
    with_gradient_sum,
)


def vocab_parallel_cross_entropy(
    local_logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: Number = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    shift: int = 0,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: Number | None = None,
    class_dim: int = -1,
    inplace_backward: bool = False,
    return_stats: bool = False,
) -> Any:  # a union would have every caller ask which of the two it is
    r"""``masked_cross_entropy`` of logits whose classes are spread over the ranks of a group.

    Every rank calls with the same rows, labels and keywords, and with its own classes: columns
    ``[vocab_start, vocab_start + v)`` of ``vocab_size``. The results are those of whole rows, on
    every rank, with the same bits. With shards :math:`s` of columns :math:`C_s`,

    .. math::
        \mathrm{lse} = \max_s m_s + \ln \sum_s e^{m_s - \max m} S_s, \quad
        m_s = \max_{c \in C_s} z_c, \quad S_s = \sum_{c \in C_s} e^{z_c - m_s}

    and so on for all that the formulas of ``masked_cross_entropy`` need. With the shards side by
    side it is

    >>> everything = torch.cat(shards_of_all_ranks, -1)            # never made
    >>> masked_cross_entropy(everything, labels, attention_mask)   # the same number

    Messages: one all-gather in the forward, of 32 bytes a row (16 more with return_stats, 16 more
    with label_smoothing) and 48; none in the backward. Where ``vocab_start`` or ``vocab_size`` is
    None one more goes before it, the sizes of the shards, and a GPU is waited for: give both in
    training.

    Args:
        local_logits: ``[..., v]`` this rank's columns, in the order of the ranks of the group; v
            may differ from rank to rank, and be 0.
        target, mask: ``[...]``, the same on all ranks; labels are those of the whole vocabulary.
        group: a process group or a 1-D DeviceMesh whose ranks ascend; None: all ranks. Without
            torch.distributed, a world of one.
        vocab_start: the first class of this rank. None: asked of the others.
        vocab_size: V, the number of all classes. None: asked of the others.
        weight: ``[V]`` of all classes, on every rank.
        ignore_index, token_weight, label_smoothing, temperature, softcap, z_loss, focal_gamma,
            shift, segment_ids, reduction, normalizer, class_dim, inplace_backward, return_stats: as
            in ``masked_cross_entropy``. (gradient_in_forward is not there: what it saves is the
            second read of the logits, which the message stands before.)

    Returns:
        the loss, float32 (float64 for float64 logits), or (loss, RowStatistics), the same on every
        rank. Each rank's backward gives the gradient of its own columns; token_weight's is whole on
        every rank, not a share.

    Raises:
        IndexError, ValueError: as ``masked_cross_entropy``, on all ranks; besides, where shards do
            not follow each other or do not add up to vocab_size, or ranks call with other keywords,
            numbers of rows or presence of tensors (where messages have another length it is
            torch.distributed's error). On CUDA, where nothing is waited for, the loss is NaN then.
            What labels and masks hold is not compared, nor which reduction over sequences it is.
        NotImplementedError: vmap, forward mode or a second derivative.
    """
    name = ops.NAME
    if target is None:
        raise TypeError(f"{name}: target must be a torch.Tensor, got NoneType")
    check_flags(name, {"inplace_backward": inplace_backward, "return_stats": return_stats})
    _check_logits(name, local_logits)
    given = {
        "logits": local_logits,
        "target": target,
        "mask": mask,
        "weight": weight,
        "token_weight": token_weight,
        "segment_ids": segment_ids,
        "temperature": temperature,
        "normalizer": normalizer,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "z_loss": z_loss,
        "focal_gamma": focal_gamma,
        "shift": shift,
        "reduction": reduction,
        "statistics": return_stats,
        "schedule": None,
        "vocab_size": vocab_size,
    }
    shard = _Shard(name, group, vocab_start, vocab_size)
    overwrites = inplace_backward and not torch.compiler.is_compiling()

    def run(a):
        if overwrites:
            check_overwritable(name, a["logits"])
        shown = SHOWN if return_stats else 1
        return _merged(ops.rows_of_logits, a, shard, shown, ops.overwrite if overwrites else None)

    return loss_of_rows(name, given, class_dim, run)


def _check_logits(name, local_logits):
    """By the name that they have here."""
    check_tensor(name, "local_logits", local_logits)
    check_floating(name, "local_logits", local_logits)


def vocab_parallel_row_statistics(
    local_logits: torch.Tensor,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    temperature: Number = 1.0,
    softcap: float | None = None,
    class_dim: int = -1,
) -> RowStatistics:
    """``row_statistics`` of logits whose classes are spread over the ranks of a group.

    Log-sum-exp, entropy, log-probability of the label, hit and argmax (a class of all) of whole
    rows, on every rank, from one all-gather of 48 bytes a row.

    >>> stats = vocab_parallel_row_statistics(local_logits, labels, group=tensor_parallel_group)

    Arguments and errors are as in ``vocab_parallel_cross_entropy``, results as in
    ``row_statistics``.
    """
    name = "vocab_parallel_row_statistics"
    _check_logits(name, local_logits)
    given = {"logits": local_logits, "target": target, **DEFAULTS, "mask": mask}
    given |= {"ignore_index": ignore_index, "temperature": temperature, "softcap": softcap}
    shard = _Shard(name, group, vocab_start, vocab_size)

    def run(a):
        return _merged(ops.rows_of_logits, a, shard, SHOWN)

    return statistics_of_rows(name, given, class_dim, run)


def vocab_parallel_linear_cross_entropy(
    hidden: torch.Tensor,
    local_weight: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: Number = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    shift: int = 0,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: Number | None = None,
    return_stats: bool = False,
    num_valid: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Any:
    r"""``masked_linear_cross_entropy`` of a classifier whose classes are spread over ranks.

    Every rank has the same hidden states and its own rows of the weight, and makes the logits of
    those a chunk of rows at a time. They are made a second time in the backward, as the message
    stands between: :math:`8 K D v` operations on each rank for K rows that count and v classes.

    >>> everything = torch.cat(weights_of_all_ranks)                    # never made
    >>> masked_linear_cross_entropy(hidden, everything, labels, mask)   # the same number

    Messages: one all-gather in the forward, as of ``vocab_parallel_cross_entropy``; in the backward
    one all-reduce of the gradient of hidden, none where that needs none. (A model whose layers
    already add that up, by their own all-reduce, must not do so again.)

    Args:
        hidden: ``[..., D]``, the same on all ranks.
        local_weight: ``[v, D]`` this rank's classes; v may differ from rank to rank, and be 0.
        bias: ``[v]``, of the same classes.
        class_weight: ``[V]`` of all classes, on every rank.
        group, vocab_start, vocab_size: as in ``vocab_parallel_cross_entropy``.
        target, mask and the others: as in ``masked_linear_cross_entropy``, the same on all ranks.

    Returns and raises what ``vocab_parallel_cross_entropy`` does; gradients of hidden (summed over
    the ranks) and token_weight are whole on every rank, those of weight and bias of its classes.
    """
    name = "vocab_parallel_linear_cross_entropy"
    if target is None:
        raise TypeError(f"{name}: target must be a torch.Tensor, got NoneType")
    check_flags(name, {"return_stats": return_stats})
    given = {
        "hidden": hidden,
        "linear_weight": local_weight,
        "bias": bias,
        "target": target,
        "mask": mask,
        "weight": class_weight,
        "token_weight": token_weight,
        "segment_ids": segment_ids,
        "temperature": temperature,
        "normalizer": normalizer,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "z_loss": z_loss,
        "focal_gamma": focal_gamma,
        "shift": shift,
        "reduction": reduction,
        "statistics": return_stats,
        "schedule": None,
        "chunk_rows": chunk_rows,
        "num_valid": num_valid,
        "vocab_size": vocab_size,
    }
    run = _linear_run(name, group, vocab_start, vocab_size)
    return linear.loss_of_hidden(name, given, logits_dtype, run)


def vocab_parallel_linear_row_statistics(
    hidden: torch.Tensor,
    local_weight: torch.Tensor,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    group: Any = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    temperature: Number = 1.0,
    softcap: float | None = None,
    num_valid: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> RowStatistics:
    """``linear_row_statistics`` of a classifier whose classes are spread over ranks.

    >>> stats = vocab_parallel_linear_row_statistics(hidden, head.weight, labels, group=group)

    Arguments and errors are as in ``vocab_parallel_linear_cross_entropy``, results as in
    ``row_statistics``.
    """
    name = "vocab_parallel_linear_row_statistics"
    given = {"hidden": hidden, "linear_weight": local_weight, **LINEAR_DEFAULTS, "bias": bias}
    given |= {"target": target, "mask": mask, "ignore_index": ignore_index}
    given |= {"temperature": temperature, "softcap": softcap}
    given |= {"chunk_rows": chunk_rows, "num_valid": num_valid, "vocab_size": vocab_size}
    run = _linear_run(name, group, vocab_start, vocab_size)
    return linear.statistics_of_hidden(name, given, logits_dtype, run)


def _linear_run(name, group, vocab_start, vocab_size):
    shard = _Shard(name, group, vocab_start, vocab_size)

    def run(a, shown):
        ops.refuse_transforms(name)
        a = {**a, "hidden": with_gradient_sum(shard.group, a["hidden"])}
        return _merged(ops.rows_of_hidden, a, shard, shown)

    return run


# --- the message ---------------------------------------------------------------------------------


class _Shard:
    """Which classes are this rank's, as the caller says, or else all ranks together."""

    def __init__(self, name, group, vocab_start, vocab_size):
        self.name, self.group = name, process_group(name, group)
        check_in_order(name, group, self.group)
        for argument, value, least in (
            ("vocab_start", vocab_start, 0),
            ("vocab_size", vocab_size, 1),
        ):
            if value is not None:
                check_length(name, argument, value, least)
        self.given = {"vocab_start": vocab_start, "vocab_size": vocab_size}

    def of(self, columns, device):
        """The operator's arguments for a shard of so many columns."""
        if None not in self.given.values():
            self._check(columns)
            return self.given
        found = {"vocab_start": 0, "vocab_size": columns}
        if group_size(self.group) > 1:
            found = self._asked(columns, device)
        known = {name: value for name, value in self.given.items() if value is not None}
        # Kept, as the call may be made anew with expanded views.
        self.given = found | known
        return self.given

    def _check(self, columns):
        """What the operators refuse, where there are some that run."""
        first, classes = self.given["vocab_start"], self.given["vocab_size"]
        if not torch.compiler.is_compiling() and first + columns > classes:
            rule = "be at least vocab_start and the shard's own classes"
            raise refusal(self.name, "vocab_size", f"{rule}, {first} + {columns}", classes)

    def _asked(self, columns, device):
        if torch.compiler.is_compiling():
            missing = next(name for name, value in self.given.items() if value is None)
            raise refusal(self.name, missing, "be given under torch.compile", None)
        sizes = gathered(self.group, torch.tensor([columns], device=device)).flatten().tolist()
        return {"vocab_start": sum(sizes[: group_rank(self.group)]), "vocab_size": sum(sizes)}


def _merged(form, a, shard, shown, once=None):
    """The first results of whole rows; a: the operator's arguments by name."""
    ops.refuse_transforms(shard.name)
    if form.rows == "logits" and a["logits"].dim() == 0:
        raise refusal(shard.name, "logits", "be [..., V]", "[]")
    columns = a["logits"].shape[-1] if form.rows == "logits" else a["linear_weight"].shape[0]
    a = ops.prepared({**a, **shard.of(columns, a[form.rows].device)})
    messages = gathered(shard.group, ops.message_of(form, a))
    return ops.results_of(form, a, messages, shown, once)
