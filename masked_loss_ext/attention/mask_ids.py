# SPDX-License-Identifier: BSD-3-Clause
"""Mask ids of a packed sequence under nested dropout, and the attention rule that reads them."""

from collections.abc import Callable, Iterable
from itertools import accumulate

import torch

from .._checks import ArgumentError, check_flags, check_int, refusal
from . import ints
from .interval_mask import one_interval, opaque
from .intervals import RowIntervals
from .layout import PackedLayout

PADDING_ID = -1


def generate_nested_dropout_mask_ids(
    ps: ints.Lengths | Iterable[torch.Size],
    keep_k_list: int | ints.Lengths | None = None,
    max_seq_len: int | None = None,
    device: ints.Device = None,
    masked_id: int = -2,
    num_sequences_per_sample: int = 2,
) -> torch.Tensor:
    """One id per token of a packed sequence: its sub-sequence, or why it is not visible.

    >>> generate_nested_dropout_mask_ids([(2,), (3,), (1,), (2,)], [1, 2], max_seq_len=10).tolist()
    [0, 0, 1, -2, -2, 2, 3, 3, -1, -1]

    Patches of sample s have id 2 s, its registers 2 s + 1; registers from keep_k on have
    ``masked_id``, padding has -1. Only the last sub-sequence of a sample is cut.

    Args:
        ps: shapes of the sub-sequences in their order, patches and registers of sample 0, then
            of sample 1 ...: torch.Size, tuples, ints; or an array or CPU tensor of lengths.
        keep_k_list: how many registers each sample keeps: a list of ints, an int for all or an
            integer tensor ``[samples]``. More than there are keeps all. Samples beyond the end of
            the list, and all where it is None, are not cut.
        max_seq_len: length of the result. None: the number of tokens.
        device: None takes that of a keep_k tensor, else the CPU.
        masked_id: a negative number.
        num_sequences_per_sample: sub-sequences per sample.

    Returns:
        ``[max_seq_len]`` int64.
    """
    given = ps, keep_k_list, max_seq_len, device, masked_id, num_sequences_per_sample
    layout, size = _layout("generate_nested_dropout_mask_ids", *given)
    return _ids(layout, size, masked_id)


def generate_nested_dropout_attention_mask(
    ps: ints.Lengths | Iterable[torch.Size],
    keep_k_list: int | ints.Lengths | None = None,
    max_seq_len: int | None = None,
    device: ints.Device = None,
    masked_id: int = -2,
    num_sequences_per_sample: int = 2,
    *,
    isolate_subsequences: bool = False,
) -> tuple[Callable[..., torch.Tensor], torch.Tensor]:
    """The rule of attention under nested dropout, for FlexAttention, and the ids behind it.

    Two tokens attend to each other where both are visible and of one sample. Patches see the kept
    registers and are seen by them; dropped registers and padding have no row and no column.

    >>> mask_mod, mask_ids = generate_nested_dropout_attention_mask([(1024,), (256,)], [64])
    >>> q, kv = torch.arange(1280).unsqueeze(1), torch.arange(1280)
    >>> mask_mod(None, None, q, kv).sum().item() == (1024 + 64) ** 2 == 1_183_744
    True

    ``create_block_mask(mask_mod, None, None, S, S)`` evaluates all S * S pairs;
    ``nested_dropout_block_mask`` makes the same BlockMask in microseconds.

    Args:
        ps: as in ``generate_nested_dropout_mask_ids``, with keep_k_list, max_seq_len, device,
            masked_id and num_sequences_per_sample.
        isolate_subsequences: sub-sequences of one sample do not see each other: only equal ids
            attend.

    Returns:
        ``mask_mod(b, h, q_idx, kv_idx)`` and the ids ``[max_seq_len]`` int64.
    """
    name = "generate_nested_dropout_attention_mask"
    check_flags(name, {"isolate_subsequences": isolate_subsequences})
    given = ps, keep_k_list, max_seq_len, device, masked_id, num_sequences_per_sample
    layout, size = _layout(name, *given)
    # What a row sees is one interval, so the rule needs no look-up by key (faster on GPUs).
    intervals = layout.intervals()
    if isolate_subsequences:
        lengths = [n for row in layout.segment_lengths for n in row]
        ends = ints.to_device([*accumulate(lengths, initial=0)], layout.device)
        intervals &= RowIntervals.from_cu_seqlens(ends, layout.padded_len)
    lo, hi = (opaque(x[0, :size]) for x in (intervals.lo, intervals.hi))
    return one_interval(lo, hi), _ids(layout, size, masked_id)


def _layout(function, ps, keep_k_list, max_seq_len, device, masked_id, group):
    """The layout of sub-sequences in groups, at least a token long, and the length asked for."""
    group = ints.length(function, "num_sequences_per_sample", group, 1)
    check_int(function, "masked_id", masked_id)
    if not -(2**63) <= masked_id < 0:
        rule = "be negative, as ids from 0 on are sub-sequences, and fit int64"
        raise refusal(function, "masked_id", rule, masked_id)
    ps = ints.listed(function, "ps", ps, "a list of shapes")
    lengths = [ints.token_count(function, f"ps[{i}]", shape) for i, shape in enumerate(ps)]
    if len(lengths) % group:
        raise refusal(
            function, "ps", f"hold num_sequences_per_sample={group} shapes per sample", len(lengths)
        )
    total = sum(lengths)
    ints.check_total(function, "ps", total)
    size = ints.length(function, "max_seq_len", total if max_seq_len is None else max_seq_len)
    if size < total:
        raise refusal(function, "max_seq_len", f"hold all {total} tokens", size, ArgumentError)
    keep_k = ints.keep_of_all(function, "keep_k_list", keep_k_list, len(lengths) // group)
    if device is None:
        device = keep_k.device if isinstance(keep_k, torch.Tensor) else "cpu"
    rows = [lengths[i : i + group] for i in range(0, len(lengths), group)]
    if not rows:  # no samples: one without tokens
        rows, keep_k = [[0] * group], None
    return PackedLayout(rows, keep_k, max_seq_len=max(size, 1), device=device), size


def _ids(layout, size, masked_id):
    sample, segment = layout.sample_ids.to(torch.int64), layout.segment_ids
    ids = torch.where(layout.visible, sample * layout.num_segments + segment, masked_id)
    return torch.where(sample < 0, PADDING_ID, ids)[:size]
