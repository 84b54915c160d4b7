# SPDX-License-Identifier: BSD-3-Clause
"""Attention masks by definition: one bool per pair of tokens, from sample ids and positions."""

import torch

PADDING = -1  # sample id of what belongs to no sample


def packed_tokens(segment_lengths, kept, padded_len, align_samples=1):
    """What each packed token is: sample id, position in its sample, visible, and the sample's
    length without its last segment (all ``[S]``). Padding has sample id -1."""
    rows = []
    for sample, (lengths, keep) in enumerate(zip(segment_lengths, kept, strict=True)):
        while len(rows) % align_samples:
            rows.append((PADDING, 0, False, 0))
        position = 0
        for length, k in zip(lengths, keep, strict=True):
            for i in range(length):
                rows.append((sample, position, i < k, sum(lengths[:-1])))
                position += 1
    rows += [(PADDING, 0, False, 0)] * (padded_len - len(rows))
    sample, position, visible, before_last = zip(*rows, strict=True)
    return (
        torch.tensor(sample),
        torch.tensor(position),
        torch.tensor(visible),
        torch.tensor(before_last),
    )


def packed_attention_mask(tokens, mode="full", window=None, prefix=None, sinks=0, dropped="none"):
    """``[S, S]`` bool: may query q (row) see key k (column)? ``tokens`` is of ``packed_tokens``.

    Both in one sample, both visible, and k in the first ``prefix`` positions, or in order (k <= q
    for the causal modes) and either inside the window or among the first ``sinks`` positions.
    """
    sample, position, visible, before_last = tokens
    q, k = position[:, None], position[None, :]
    real = sample != PADDING
    same = (sample[:, None] == sample[None, :]) & real[:, None] & real[None, :]
    in_order = torch.ones_like(same) if mode == "full" else k <= q
    near = torch.ones_like(same)
    if window is not None:
        left, right = window
        if left is not None:
            near &= q - k <= left
        if right is not None:
            near &= k - q <= right
    relation = in_order & (near | (k < sinks))
    if mode == "causal_last":
        relation |= k < before_last[:, None]
    elif mode == "prefix":
        relation |= k < torch.as_tensor(prefix)[sample.clamp_min(0)][:, None]
    mask = same & relation & visible[None, :]
    if dropped == "attend":
        return mask
    mask &= visible[:, None]
    if dropped == "self":
        mask |= torch.diag(real & ~visible)
    return mask


def mask_to_intervals(mask, slots):
    """Maximal runs of each row of ``[Sq, Skv]`` -> lo, hi ``[slots, Sq]`` int32, unused ones 0."""
    before = torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    after = torch.nn.functional.pad(mask, (0, 1))[:, 1:]
    bounds = []
    for ends, shift in ((mask & ~before, 0), (mask & ~after, 1)):
        row, column = ends.nonzero(as_tuple=True)
        slot = (ends.cumsum(1) - 1)[row, column]
        bound = torch.zeros(slots, mask.shape[0], dtype=torch.int32)
        bound[slot, row] = (column + shift).to(torch.int32)
        bounds.append(bound)
    return tuple(bounds)


def interval_mask(lo, hi, kv_len):
    """``[..., R, Sq]`` intervals -> ``[..., Sq, kv_len]`` bool."""
    kv = torch.arange(kv_len, device=lo.device)
    inside = (kv >= lo.unsqueeze(-1)) & (kv < hi.unsqueeze(-1))
    return inside.any(-3)


def block_lists(mask, q_block, kv_block, transposes=True):
    """The eight index tensors of a BlockMask, from ``[B, Sq, Skv]`` bool, by counting."""
    batch, q_len, kv_len = mask.shape
    nq, nk = -(-q_len // q_block), -(-kv_len // kv_block)
    padded = torch.nn.functional.pad(mask, (0, nk * kv_block - kv_len, 0, nq * q_block - q_len))
    count = padded.view(batch, 1, nq, q_block, nk, kv_block).sum((3, 5))
    full = count == q_block * kv_block
    partial = (count > 0) & ~full
    lists = [*_ordered(partial), *_ordered(full)]
    if transposes:
        lists += [*_ordered(partial.mT), *_ordered(full.mT)]
    else:
        lists += [torch.empty(0, dtype=torch.int32)] * 4
    return tuple(lists)


def _ordered(blocks):
    # Present columns ascending, then absent ones ascending: what a stable descending sort gives.
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)
