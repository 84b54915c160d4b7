# SPDX-License-Identifier: BSD-3-Clause
"""Mask ids of a packed sequence under nested dropout, and the attention rule that reads them."""

import torch

from .._checks import ArgumentError, check_flags, check_int
from . import _host
from ._entries import token_count
from ._host import to_device
from .intervals import opaque
from .pipeline_dropout import check_keep_k

PADDING_ID = -1


def _check(function, ps, keep_k_list, max_seq_len, masked_id, num_sequences_per_sample):
    group = _host.length(function, "num_sequences_per_sample", num_sequences_per_sample, 1)
    check_int(function, "masked_id", masked_id)
    if not -(2**63) <= masked_id < 0:
        raise ValueError(
            f"{function}: masked_id must be negative, as ids from 0 on are sub-sequences, and fit "
            f"int64, got {masked_id}"
        )
    ps = _host.listed(function, "ps", ps, "a list of shapes")
    lengths = [token_count(function, f"ps[{i}]", shape) for i, shape in enumerate(ps)]
    if len(lengths) % group:
        raise ValueError(
            f"{function}: ps must hold num_sequences_per_sample={group} shapes per sample, got "
            f"{len(lengths)}"
        )
    total = sum(lengths)
    _host.check_total(function, "ps", total)
    if max_seq_len is None:
        max_seq_len = total
    max_seq_len = _host.length(function, "max_seq_len", max_seq_len)
    if max_seq_len < total:
        raise ArgumentError(
            f"{function}: max_seq_len must hold all {total} tokens, got {max_seq_len}"
        )
    keep_k = check_keep_k(function, keep_k_list, len(lengths) // group, "keep_k_list")
    return lengths, max_seq_len, keep_k


def _kept_lengths(lengths, keep_k, group, device):
    """[sub-sequences] how many tokens of each are kept; only the last of a group is cut."""
    kept = to_device(lengths, device)
    if keep_k is None or not len(keep_k):
        return kept
    if isinstance(keep_k, torch.Tensor):
        k = keep_k.to(device, torch.int64, non_blocking=True).clamp_min(0)
    else:
        k = to_device(keep_k, device)
    last = slice(group - 1, group * len(k), group)
    return kept.slice_scatter(torch.minimum(kept[last], k), 0, last.start, last.stop, group)


def _device(device, keep_k):
    if device is not None:
        return torch.device(device)
    return keep_k.device if isinstance(keep_k, torch.Tensor) else torch.device("cpu")


def _spread(values, lengths, device):
    """One row per sub-sequence -> one per token; sizes are known, so no wait for the device."""
    repeats = to_device(lengths, device)
    return torch.repeat_interleave(values, repeats, dim=0, output_size=sum(lengths))


def _ids(lengths, size, keep_k, device, masked_id, group):
    kept = _kept_lengths(lengths, keep_k, group, device)
    count = torch.arange(len(lengths), device=device)
    starts = to_device([0, *lengths], device).cumsum(0)[:-1]
    ids = _spread(count, lengths, device)
    end = _spread(starts + kept, lengths, device)
    ids = torch.where(torch.arange(sum(lengths), device=device) < end, ids, masked_id)
    return torch.nn.functional.pad(ids, (0, size - sum(lengths)), value=PADDING_ID)


def generate_nested_dropout_mask_ids(
    ps,
    keep_k_list=None,
    max_seq_len=None,
    device=None,
    masked_id=-2,
    num_sequences_per_sample=2,
):
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
    name = "generate_nested_dropout_mask_ids"
    lengths, size, keep_k = _check(
        name, ps, keep_k_list, max_seq_len, masked_id, num_sequences_per_sample
    )
    device = _device(device, keep_k)
    return _ids(lengths, size, keep_k, device, masked_id, num_sequences_per_sample)


def generate_nested_dropout_attention_mask(
    ps,
    keep_k_list=None,
    max_seq_len=None,
    device=None,
    masked_id=-2,
    num_sequences_per_sample=2,
    *,
    isolate_subsequences=False,
):
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
    lengths, size, keep_k = _check(
        name, ps, keep_k_list, max_seq_len, masked_id, num_sequences_per_sample
    )
    device, group = _device(device, keep_k), num_sequences_per_sample
    ids = _ids(lengths, size, keep_k, device, masked_id, group)
    # What a row sees is one interval, so the rule needs no look-up by key (faster on GPUs): from
    # the start of its sample (sub-sequence) to the end of what is kept of it.
    first = 1 if isolate_subsequences else group
    ends = to_device([0, *lengths], device).cumsum(0)[:-1]
    starts = ends[::first]
    ends = (ends + _kept_lengths(lengths, keep_k, group, device))[first - 1 :: first]
    spans = [sum(lengths[i : i + first]) for i in range(0, len(lengths), first)]
    rows = torch.stack([starts, ends], dim=1) if spans else starts.new_zeros(0, 2)
    rows = torch.nn.functional.pad(_spread(rows, spans, device), (0, 0, 0, size - sum(spans)))
    rows = torch.where((ids >= 0).unsqueeze(1), rows, 0).to(torch.int32)
    lo, hi = opaque(rows[:, 0].contiguous()), opaque(rows[:, 1].contiguous())

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx >= lo[q_idx]) & (kv_idx < hi[q_idx])

    return mask_mod, ids
