# SPDX-License-Identifier: BSD-3-Clause
"""The denominator of a step: what all ranks and micro-batches of it count together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import (
    as_integers,
    as_mask,
    check_any_floating,
    check_device,
    check_flags,
    check_int,
    check_integers,
    check_length,
    check_like,
    check_whole,
    refusal,
)
from ..reference.cross_entropy import counted_rows, shifted
from ..reference.squared_error import select
from ._group import group_size, process_group

_NAME = "global_token_count"
_DEFAULT_IGNORED = -100
Tensors = Tensor | Sequence[Tensor]


class PendingCount:
    """A count that is under way: ``wait()`` gives it. Made by ``global_token_count``."""

    def __init__(self, total: Tensor, work: Any, ranks: int) -> None:
        self._total, self._work, self._ranks = total, work, ranks

    def wait(self) -> Tensor:
        """The count, ``[]`` float64; waits as the ``wait`` of torch.distributed does."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._total / self._ranks


def global_token_count(
    masks: Tensors | None = None,
    *,
    labels: Tensors | None = None,
    ignore_index: int = _DEFAULT_IGNORED,
    shift: int = 0,
    segment_ids: Tensors | None = None,
    token_weight: Tensors | None = None,
    group: Any = None,
    average: bool = True,
    async_op: bool = False,
) -> Any:
    r"""How many tokens count in a step: over all micro-batches, and all ranks of ``group``.

    .. math:: N = \frac1R \sum_{r=1}^{R} \sum_{\text{micro-batches } i}
        \#\{t : \text{token } t \text{ of } i \text{ on rank } r \text{ counts}\}

    with R the ranks of ``group`` (1 with ``average=False``). It is the ``normalizer`` of every loss
    that takes one. Each micro-batch is then divided by the tokens of the whole step, so that
    gradients add up to that of the mean over all of them, wherever tokens and padding happen to
    lie. The mean of rank means or of micro-batch means is another number, unless each has as many.

    >>> count = global_token_count([attention_mask, attention_mask[:1]])  # of two micro-batches
    >>> expected = (attention_mask != 0).sum() + (attention_mask[:1] != 0).sum()
    >>> assert count == expected  # on one rank; divided by the ranks on several
    >>> loss = masked_cross_entropy(logits, labels, attention_mask, normalizer=count)

    A token counts as in ``masked_cross_entropy``: mask on and label not ignore_index at t + shift,
    in the same segment as t. Give what the loss is given: with ``shift=1`` the first token of a row
    is no target, and counting the mask alone is off by one per row.

    How to use it, by who adds the gradients up:

    - DDP, FSDP and FSDP2 (``fully_shard``) average over their ranks: the default. Several
      micro-batches: their masks in one list, before the first forward; ``no_sync()`` and
      ``set_requires_gradient_sync(False)`` change nothing. Nothing else is divided by.
    - accelerate: ``backward`` divides by gradient_accumulation_steps once more. Give the losses
      ``count / accelerator.gradient_accumulation_steps``.
    - The transformers Trainer counts by itself, over all ranks unless average_tokens_across_devices
      is False (it has to be True, the default), hands num_items_in_batch over and multiplies the
      loss by the number of ranks: use ``causal_lm_loss`` and nothing of this.
    - Gradients that are summed (FSDP2's ``set_gradient_divide_factor(1)``, an all-reduce of your
      own): ``average=False``; or reduction "sum", and divide the gradients by that count.
    - Sequence shards (context parallel): ``group`` is all ranks over which gradients are averaged,
      data and sequence parallel ones together. A count of the own shard alone makes one token at 2
      shards half as heavy. Labels come from ``shift_labels``, before the sequence is cut.
    - Ranks that hold the same tokens (tensor parallel) are not in one ``group``: they would be
      counted several times.

    One message of 8 bytes, none of one rank. ``async_op=True`` returns at once: start it when the
    micro-batches are there and ``wait()`` when the first loss is due. Under torch.compile the
    message is a part of the graph, and waited for where the compiler puts that.

    Args:
        masks: ``[..., S]`` any dtype, a token counts where it is not 0; or a list or tuple of them,
            one per micro-batch, of any shapes. None: ``labels`` alone say what counts.
        labels: ``[..., S]`` integers, as many as masks.
        ignore_index: labels that do not count.
        shift: by how much the loss shifts mask and labels.
        segment_ids: ``[..., S]`` integers, as many as masks.
        token_weight: ``[..., S]`` floating: the sum of these instead of the number, for reduction
            "weighted_mean". With class weights w the denominator is the sum of the labels' own:
            ``token_weight=w[labels.clamp(min=0)]``. Added up in float64, without a gradient. A
            rank that gives none counts 1 for each token.
        group: a process group or a 1-D DeviceMesh; None is all ranks, or one without
            torch.distributed. Every rank has to call, one without micro-batches with empty tensors.
        average: divide by the number of ranks.
        async_op: return a handle whose ``wait()`` gives the tensor.

        Dimensions of size 1 of masks, segment_ids and token_weight stand for any where labels are
        given. All tensors are on one device, which the group's backend serves (NCCL: a GPU).

    Returns:
        ``[]`` float64 on that device; 0 where nothing counts, by which losses divide to 0.

    Raises:
        ValueError, TypeError: what does not fit together, before any message. The other ranks, and
            those that call while one does not or has died, get the error of torch.distributed,
            after the timeout of the group at the latest.
    """
    check_flags(_NAME, {"average": average, "async_op": async_op})
    check_length(_NAME, "shift", shift)
    check_int(_NAME, "ignore_index", ignore_index)
    if labels is None and ignore_index != _DEFAULT_IGNORED:
        raise refusal(_NAME, "labels", "be given beside ignore_index", "None")
    given = {"masks": masks, "labels": labels}
    given |= {"segment_ids": segment_ids, "token_weight": token_weight}
    batches = _micro_batches(given)
    group = process_group(_NAME, group)
    # Of one type before the message: the bits of a rank with integers would be read as a float.
    total = torch.stack([_counted(batch, ignore_index, shift) for batch in batches]).sum().double()
    ranks, work = group_size(group), None
    if ranks > 1:
        # A graph has no handles: in it the message is a node, which the compiler waits for.
        if async_op and not torch.compiler.is_compiling():
            work = dist.all_reduce(total, group=group, async_op=True)
        else:
            dist.all_reduce(total, group=group)
    pending = PendingCount(total, work, ranks if average else 1)
    return pending if async_op else pending.wait()


def _micro_batches(given):
    """[(mask, labels, segment_ids, token_weight) of each], what is not given None."""
    several = {name: _as_list(name, value) for name, value in given.items() if value is not None}
    if not several.keys() & {"masks", "labels"}:
        raise refusal(_NAME, "masks", "be given, or labels", "None for both")
    first, tensors = next(iter(several.items()))
    for name, others in several.items():
        if len(others) != len(tensors):
            rule = f"have one tensor for each of {first}, {len(tensors)}"
            raise refusal(_NAME, name, rule, len(others))
    of_all = [several.get(name, [None] * len(tensors)) for name in given]
    batches = list(zip(*of_all, strict=True))
    for i, batch in enumerate(batches):
        index = f"[{i}]" if isinstance(given[first], (list, tuple)) else ""
        _check(dict(zip(given, batch, strict=True)), index)
        check_device(_NAME, f"{first}{index}", tensors[i], f"{first}[0]", tensors[0])
    return batches


def _as_list(name, value):
    tensors = list(value) if isinstance(value, (list, tuple)) else [value]
    if not tensors:
        got = "an empty list; a rank without micro-batches gives an empty tensor"
        raise refusal(_NAME, name, "hold a tensor", got)
    for i, tensor in enumerate(tensors):
        one = f"{name}[{i}]" if isinstance(value, (list, tuple)) else name
        check_whole(_NAME, one, tensor, "give the part of this rank, to_local()")
        if tensor.dim() == 0:
            raise refusal(_NAME, one, "be [..., S]", "[]")
    return tensors


def _check(batch, index):
    """dtypes; shapes and devices beside the labels, or beside the mask where there are none."""
    like_name = "masks" if batch["labels"] is None else "labels"
    like = batch[like_name]
    for name, tensor in batch.items():
        if tensor is None:
            continue
        one = name + index
        if name == "token_weight":
            check_any_floating(_NAME, one, tensor)
        elif name == "masks":
            as_mask(_NAME, one, tensor)  # refuses what is none
        else:
            check_integers(_NAME, one, tensor)
        if name != like_name:
            check_like(_NAME, one, tensor, like_name + index, like, broadcast=True)


def _counted(batch, ignore_index, shift):
    """Of one micro-batch: ``[]`` int64, or float64 with weights."""
    mask, labels, segment_ids, token_weight = batch
    like = mask if labels is None else labels
    labels, mask = as_integers(labels), as_mask(_NAME, "masks", mask)
    if segment_ids is not None:
        segment_ids = as_integers(segment_ids).expand(like.shape)
    _, on = counted_rows(like.unsqueeze(-1), labels, mask, ignore_index, shift, segment_ids)
    if token_weight is None:
        return on.sum()
    weight = token_weight.detach().double().expand(like.shape)
    return select(on, shifted(weight, shift, 0)).sum()
