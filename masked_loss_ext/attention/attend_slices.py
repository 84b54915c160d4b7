# SPDX-License-Identifier: BSD-3-Clause
"""Attention sample by sample on the tokens that are visible: the training path of the CPU.

Each of q, k and v is split once into runs of tokens; runs that are dropped are never touched, so
their gradient is 0 whatever is stored there.
"""

import torch
import torch.nn.functional as F


def sdpa(q, k, v, mask=None, scale=None, is_causal=False):
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )


def attend_slices(q, k, v, layout, options, scale):
    """``[B, H, S, D]``; options are those of ``PackedLayout.intervals``."""
    mode = options["mode"]
    prefix = layout._arguments("intervals", **options)[6]  # checked, and a tensor
    unusual = options["window"] is not None or options["sinks"] or options["dropped"] != "none"
    if unusual or layout.kept_lengths is None:
        return _attend_blocks(q, k, v, layout, options, scale)
    runs, samples = _visible_runs(layout)
    sizes = [size for size, _ in runs]
    q, k, v = (x.split(sizes, dim=2) for x in (q, k, v))
    prefixes = _prefixes(layout, mode, prefix)
    out = [None] * len(runs)
    for i, sample in enumerate(samples):
        if not sample:
            continue
        tokens = [_join([x[j] for j in sample]) for x in (q, k, v)]
        result = _attend_sample(*tokens, mode, prefixes[i], scale)
        parts = result.split([sizes[j] for j in sample], dim=2)
        for j, part in zip(sample, parts, strict=True):
            out[j] = part
    batch, heads, width = q[0].shape[0], q[0].shape[1], v[0].shape[3]
    filled = [
        q[j].new_zeros(batch, heads, sizes[j], width) if x is None else x for j, x in enumerate(out)
    ]
    # + 0 of no elements: attached to the graph where nothing is visible, with gradient 0.
    return torch.cat(filled, dim=2) + sum(x[-1][..., :0].sum() for x in (q, k, v))


def _join(parts):
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _visible_runs(layout):
    """All tokens in their order as (size, visible) runs, and per sample the numbers of its runs."""
    runs, samples, end = [], [], 0

    def add(size, visible):
        nonlocal end
        if size:
            runs.append((size, visible))
            end += size

    for start, lengths, kept in zip(
        layout.sample_starts, layout.segment_lengths, layout.kept_lengths, strict=False
    ):
        add(start - end, False)  # a gap before an aligned sample
        first, visible, hidden = len(runs), 0, 0
        for length, keep in zip(lengths, kept, strict=True):
            if hidden and keep:
                add(visible, True)
                add(hidden, False)
                visible = hidden = 0
            visible += keep
            hidden += length - keep
        add(visible, True)
        add(hidden, False)
        samples.append([j for j in range(first, len(runs)) if runs[j][1]])
    add(layout.padded_len - end, False)
    return runs, samples


def _prefixes(layout, mode, prefix):
    """How many visible tokens at the front of each sample are seen by all of it."""
    if mode == "causal_last":
        return [sum(kept[:-1]) for kept in layout.kept_lengths]
    if mode != "prefix":
        return [0] * layout.num_samples
    counts = []
    for lengths, kept, reach in zip(
        layout.segment_lengths, layout.kept_lengths, prefix.tolist(), strict=True
    ):
        count = start = 0
        for length, keep in zip(lengths, kept, strict=True):
            count += max(0, min(keep, reach - start))
            start += length
        counts.append(count)
    return counts


def _attend_sample(q, k, v, mode, prefix, scale):
    """One sample without its dropped tokens; order is kept, so causal is causal here too."""
    length = q.shape[2]
    if mode == "full" or prefix >= length:
        return sdpa(q, k, v, None, scale)
    if prefix == 0:
        return sdpa(q, k, v, None, scale, is_causal=True)
    # Two calls: the prefix sees itself; the rest sees all up to itself.
    front = sdpa(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], None, scale)
    index = torch.arange(length, device=q.device)
    mask = index <= index[prefix:].unsqueeze(1)
    return torch.cat([front, sdpa(q[:, :, prefix:], k, v, mask, scale)], dim=2)


def _attend_blocks(q, k, v, layout, options, scale):
    """One dense block of mask per sample: any option, and keep_k that stays on its device."""
    intervals = layout.intervals(**options)
    rows, columns = (x(intervals).unsqueeze(-1) for x in (interval_rows, interval_columns))
    q, k, v = torch.where(rows, q, 0), torch.where(columns, k, 0), torch.where(columns, v, 0)
    out, end = [], 0
    sizes, bounds = [], []
    for start, lengths in zip(layout.sample_starts, layout.segment_lengths, strict=False):
        sizes += [start - end, sum(lengths)]
        end = start + sum(lengths)
        bounds.append((start, end))
    sizes.append(layout.padded_len - end)
    q, k, v = (x.split(sizes, dim=2) for x in (q, k, v))
    for j, size in enumerate(sizes):
        if j % 2 == 0 or size == 0:
            out.append(q[j].new_zeros(*q[j].shape[:3], v[j].shape[3]))
            continue
        start, stop = bounds[j // 2]
        kv = torch.arange(start, stop, device=q[j].device)
        lo, hi = (x[:, start:stop].unsqueeze(-1) for x in (intervals.lo, intervals.hi))
        out.append(sdpa(q[j], k[j], v[j], ((kv >= lo) & (kv < hi)).any(0), scale))
    return torch.where(rows, torch.cat(out, dim=2), 0)


def interval_rows(intervals):
    """``[..., Sq]`` True where a row attends to something."""
    return (intervals.hi > intervals.lo).any(-2)


def interval_columns(intervals):
    """``[..., kv_len]`` True where some row attends to it: a difference array over the columns."""
    lo, hi = (x.long().clamp(0, intervals.kv_len).flatten(-2) for x in (intervals.lo, intervals.hi))
    count = (hi > lo).to(torch.int32)
    change = count.new_zeros(*lo.shape[:-1], intervals.kv_len + 1)
    change = change.scatter_add(-1, lo * count, count).scatter_add(-1, hi * count, -count)
    return change.cumsum(-1)[..., :-1] > 0
