# SPDX-License-Identifier: BSD-3-Clause
"""Segments and keep_k as the operators take them: runs of tokens that are kept from their front.

A run is ``(always, droppable)``: tokens that always stay, then tokens of which keep_k stay.
Segments that are never cut join the run of their neighbour, so patches + registers are one run, and
their mask one interval per row.
"""

import torch

from . import _host


def runs_of(row, droppable, keep):
    """[(always, droppable), ...] of one sample; as many for each sample."""
    if keep is None:
        return ((sum(row), 0),)
    if keep == "per segment":
        return tuple([(0, n) for n in row])
    first = (sum(row[:droppable]), row[droppable])
    if droppable + 1 == len(row):
        return (first,)
    return (first, (sum(row[droppable + 1 :]), 0))


class Cut:
    """offsets ``[N * runs + 1]``, kept ``[N, runs]``, before_last ``[N]``: int64 on device."""

    def __init__(self, rows, sample_starts, droppable, keep, tensor, device):
        self.per_segment = _is_per_segment(keep, tensor)
        kind = "per segment" if self.per_segment else "one"
        if keep is None and tensor is None:
            kind = None
        offsets, always, limits = [], [], []
        for row, start in zip(rows, sample_starts, strict=False):
            for fixed, limit in runs_of(row, droppable, kind):
                offsets.append(start)
                always.append(fixed)
                limits.append(limit)
                start += fixed + limit
        # A gap before the next sample makes the last run longer; kept never reaches it.
        offsets.append(sample_starts[-1])
        before_last = [sum(row[:-1]) for row in rows]
        samples, runs = len(rows), len(always) // len(rows)
        lists = [offsets, before_last, always, limits]
        if tensor is None:
            lists = [offsets, before_last, _kept(always, limits, keep, samples)]
        parts = _upload(lists, device)
        self.offsets, self.before_last = parts[:2]
        if tensor is None:
            self.kept = parts[2].view(samples, runs)
        else:
            always, limits = parts[2].view(samples, runs), parts[3].view(samples, runs)
            keep_k = tensor.to(device, torch.int64, non_blocking=True)
            keep_k = keep_k if self.per_segment else keep_k.unsqueeze(1)
            self.kept = always + torch.minimum(keep_k.clamp_min(0), limits)


def _is_per_segment(keep, tensor):
    if tensor is not None:
        return tensor.dim() == 2
    return keep is not None and isinstance(keep[0], (list, tuple))


def _kept(always, limits, keep, samples):
    if keep is None:
        return always
    if isinstance(keep[0], (list, tuple)):
        keep = [k for row in keep for k in row]
    else:
        runs = len(always) // samples
        keep = keep if runs == 1 else [k for k in keep for _ in range(runs)]
    return [a + min(k, n) for a, k, n in zip(always, keep, limits, strict=True)]


def _upload(lists, device):
    """Several lists in one copy to the device."""
    flat = [x for part in lists for x in part]
    return _host.to_device(flat, device).split([len(part) for part in lists])
