# SPDX-License-Identifier: BSD-3-Clause
"""Segments and keep_k as the operators take them: runs of tokens that are kept from their front.

A run is some tokens that always stay, then tokens of which keep_k stay. Segments that are never cut
join the run of their neighbour, so patches + registers are one run, and their mask one interval per
row. All of it is on the critical path of a small mask, hence the comprehensions.
"""

import torch

from . import _host


class Cut:
    """offsets ``[N * runs + 1]``, kept ``[N, runs]``: int64 on device."""

    def __init__(self, rows, sample_starts, droppable, keep, tensor, device):
        samples, per_segment = len(rows), _is_per_segment(keep, tensor)
        if keep is None and tensor is None:
            always, limits = list(map(sum, rows)), [0] * samples
        elif per_segment:
            limits = [n for row in rows for n in row]
            always = [0] * len(limits)
        else:
            always, limits = _one_cut(rows, droppable)
        runs = len(always) // samples
        offsets = sample_starts
        if runs > 1:
            offsets = _offsets(sample_starts, always, limits, runs)
        self.offsets = _host.to_device(offsets, device)
        if tensor is None:
            kept = always if keep is None else _kept(always, limits, keep, per_segment)
            self.kept = _host.to_device(kept, device).view(samples, runs)
            return
        both = _host.to_device(always + limits, device).view(2, samples, runs)
        keep_k = tensor.to(device, torch.int64, non_blocking=True)
        keep_k = keep_k if per_segment else keep_k.unsqueeze(1)
        self.kept = both[0] + torch.minimum(keep_k.clamp_min(0), both[1])


def before_last(rows, device):
    """``[N]``: tokens of each sample before its last segment."""
    return _host.to_device([sum(row) - row[-1] for row in rows], device)


def _is_per_segment(keep, tensor):
    if tensor is not None:
        return tensor.dim() == 2
    return keep is not None and isinstance(keep[0], (list, tuple))


def _one_cut(rows, droppable):
    """Per run how many tokens always stay, and how many may go."""
    if droppable + 1 == len(rows[0]):
        limits = [row[-1] for row in rows]
        return [sum(row) - n for row, n in zip(rows, limits, strict=True)], limits
    always, limits = [], []
    for row in rows:
        always += (sum(row[:droppable]), sum(row[droppable + 1 :]))
        limits += (row[droppable], 0)
    return always, limits


def _offsets(sample_starts, always, limits, runs):
    # A gap before the next sample makes the last run longer; kept never reaches it.
    offsets, end = [], 0
    for i, (a, n) in enumerate(zip(always, limits, strict=True)):
        end = end if i % runs else sample_starts[i // runs]
        offsets.append(end)
        end += a + n
    offsets.append(end)
    return offsets


def _kept(always, limits, keep, per_segment):
    if per_segment:
        keep = [k for row in keep for k in row]
    elif len(keep) != len(always):  # two runs, of which the second has nothing to cut
        keep = [k for k in keep for _ in range(2)]
    return [a + (k if k < n else n) for a, k, n in zip(always, keep, limits, strict=True)]
