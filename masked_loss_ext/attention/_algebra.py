# SPDX-License-Identifier: BSD-3-Clause
"""Intersection and union of row intervals, and their canonical form."""

import torch

from ._host import is_readable

NOWHERE = 2**31 - 1


def combine(a, b, rule, sign):
    if not isinstance(b, type(a)):
        return NotImplemented
    if (a.q_len, a.kv_len) != (b.q_len, b.kv_len):
        raise ValueError(
            f"RowIntervals: both sides of {sign} must have as many queries and keys, got "
            f"{a.q_len} x {a.kv_len} and {b.q_len} x {b.kv_len}"
        )
    if a.device != b.device:
        raise ValueError(
            f"RowIntervals: both sides of {sign} must be on one device, got {a.device} and "
            f"{b.device}"
        )
    batches = [x.lo.shape[0] for x in (a, b) if x.lo.dim() == 3 and x.lo.shape[0] != 1]
    if len(batches) == 2 and batches[0] != batches[1]:
        raise ValueError(
            f"RowIntervals: both sides of {sign} must have one batch size, got {batches[0]} and "
            f"{batches[1]}"
        )
    lo, hi = rule(a, b)
    if lo.shape[-2] > a.MAX_INTERVALS:  # rare: only then are the intervals looked at
        lo, hi = merge(lo, hi, 0)
    return type(a)(lo, hi, a.kv_len)


def intersection(a, b):
    lo = torch.maximum(a.lo.unsqueeze(-2), b.lo.unsqueeze(-3)).flatten(-3, -2)
    hi = torch.minimum(a.hi.unsqueeze(-2), b.hi.unsqueeze(-3)).flatten(-3, -2)
    if lo.shape[-2] == 1:
        empty = hi <= lo
        return lo.masked_fill(empty, 0), hi.masked_fill(empty, 0)
    # m and n maximal intervals meet in at most m + n - 1.
    return merge(lo, hi, a.lo.shape[-2] + b.lo.shape[-2] - 1)


def union(a, b):
    parts = [(x.lo, x.hi) for x in (a, b)]
    if a.lo.shape[:-2] != b.lo.shape[:-2]:
        batch = torch.broadcast_shapes(a.lo.shape[:-2], b.lo.shape[:-2])
        parts = [(lo.expand(*batch, -1, -1), hi.expand(*batch, -1, -1)) for lo, hi in parts]
    return merge(torch.cat([p[0] for p in parts], -2), torch.cat([p[1] for p in parts], -2), None)


def merge_into(lo, hi, slots):
    """As ``merge``, but ``slots`` as they are asked for: empty ones added, none cut off."""
    merged_lo, merged_hi = merge(lo, hi, slots)
    if not slots:
        return merged_lo, merged_hi
    if slots > lo.shape[-2]:
        added = (0, 0, 0, slots - lo.shape[-2])
        return tuple(torch.nn.functional.pad(x, added) for x in (merged_lo, merged_hi))
    if is_readable(lo) and slots < lo.shape[-2]:
        needed = merge(lo, hi, 0)[0].shape[-2]
        if needed > slots:
            raise ValueError(
                f"RowIntervals.merged: slots must be at least {needed}, which some row needs, got "
                f"{slots}"
            )
    return merged_lo, merged_hi


def merge(lo, hi, slots):
    """Maximal intervals, ascending, then (0, 0); ``slots`` per row (None: as before, 0: needed)."""
    lo = lo.clamp_min(0)
    empty = hi <= lo
    lo, order = lo.masked_fill(empty, NOWHERE).sort(dim=-2)
    hi = hi.masked_fill(empty, 0).gather(-2, order)
    # Not an assignment to a slice of bools: what inductor makes of one does not compile.
    reached = torch.nn.functional.pad(hi.cummax(-2).values[..., :-1, :], (0, 0, 1, 0), value=-1)
    starts = (lo > reached) & (lo != NOWHERE)
    group = (starts.cumsum(-2) - 1).clamp_min(0)
    merged_lo = torch.full_like(lo, NOWHERE).scatter_reduce(-2, group, lo, "amin")
    merged_hi = torch.zeros_like(hi).scatter_reduce(-2, group, hi, "amax")
    merged_lo = merged_lo.masked_fill(merged_hi == 0, 0)
    if slots == 0:
        slots = max(1, int(starts.sum(-2).max())) if starts.numel() else 1
    return merged_lo[..., :slots, :], merged_hi[..., :slots, :]
