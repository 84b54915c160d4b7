# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention: one call, the same numbers from FlexAttention, SDPA and varlen kernels.

What no row attends to, and rows that attend to nothing, are selected away before and after the
kernel: inside one, a weight of 0 times a stored NaN would be NaN.
"""

import inspect
import math
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from .._checks import check_choice, check_number, check_tensor, refusal, shape_text
from . import ints
from .intervals import RowIntervals
from .layout import PackedLayout

BACKENDS = ("auto", "flex", "slices", "varlen", "sdpa")
_NAME = "packed_attention"
_PLAIN = dict(window=None, prefix=None, sinks=0, dropped="none")
_compiled_flex = None


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout_or_intervals: PackedLayout | RowIntervals,
    mode: str = "full",
    backend: str = "auto",
    *,
    window: ints.Window | None = None,
    prefix: int | ints.Lengths | None = None,
    sinks: int = 0,
    dropped: str = "none",
    scale: float | None = None,
) -> torch.Tensor:
    r"""Attention inside a packed sequence: every token sees what its sample and the mode allow.

    .. math:: o_q = \sum_{k \in A(q)} \mathrm{softmax}_{k \in A(q)}(s\, q \cdot k)\, v_k, \qquad
        o_q = 0 \text{ if } A(q) \text{ is empty}

    >>> layout = PackedLayout([[4, 3], [2, 3]], keep_k=[1, 2], pad_to_multiple=16)
    >>> q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    >>> out = packed_attention(q, k, v, layout, mode="causal_last")
    >>> allowed = layout.intervals(mode="causal_last").dense()
    >>> torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, allowed))
    >>> assert (out[:, :, 5:7] == 0).all() and (out[:, :, 12:] == 0).all()  # dropped, padding

    Rows that attend to nothing are exactly 0 and so are their gradients; whatever is stored in q, k
    and v of dropped tokens and padding, NaN too, reaches no other row and no gradient. A NaN in a
    visible token is that of its sample; only "slices" and "varlen" promise that it stays there.

    ====== ============================================================== =====================
    flex   FlexAttention on the layout's BlockMask                        auto on CUDA; on the
                                                                          CPU without gradient
    slices one scaled_dot_product_attention per sample on what is visible auto on CPU (layouts)
    varlen PyTorch's varlen_attn on the compacted tokens, with one wait   CUDA, full and causal,
           where keep_k is on the device                                  half precision
    sdpa   one scaled_dot_product_attention with the mask ``[S, S]``      anywhere: last resort
    ====== ============================================================== =====================

    On CUDA auto takes "sdpa" where FlexAttention does not run: float64, heads narrower than 16. On
    the CPU auto takes it for RowIntervals, and while torch.compile traces (slices would compile
    anew for every keep_k).

    Args:
        q: ``[B, H, S, D]`` floating.
        k: ``[B, H, S, D]``, or fewer heads that divide H: each serves H / heads of q.
        v: ``[B, H, S, D]`` as k; its D may differ.
        layout_or_intervals: a PackedLayout (the same for all B) or RowIntervals, whose rows are
            those of q and whose kv_len is that of k; without a batch dimension, or with one of 1,
            for all B.
        mode: "full", "causal", "causal_last" or "prefix", for a layout.
        backend: "auto", or one of the above.
        window: for a layout, as in ``PackedLayout.intervals``; with prefix, sinks and dropped.
        scale: s, a finite number; 1 / sqrt(D) unless given.

    Returns:
        ``[B, H, S, D]`` of v, in the dtype of q. Differentiable in q, k and v.
    """
    check_choice(_NAME, "backend", backend, BACKENDS)
    if scale is not None:
        check_number(_NAME, "scale", scale)
    source: Any = layout_or_intervals
    is_layout = isinstance(source, PackedLayout)
    options = dict(mode=mode, window=window, prefix=prefix, sinks=sinks, dropped=dropped)
    _check_source(source, is_layout, options)
    _check_operands(q, k, v)
    _check_fit(q, k, source, is_layout)
    if backend == "auto":
        backend = _choose(q, v, is_layout)
    if backend in ("slices", "varlen"):
        if not is_layout:
            rule = "have a PackedLayout, whose samples it takes one by one"
            raise refusal(
                _NAME, f"backend {backend!r}", rule, "RowIntervals (use 'flex' or 'sdpa')"
            )
        attend = _attend_slices if backend == "slices" else _attend_varlen
        return attend(q, k, v, source, options, scale)
    return _attend_masked(q, k, v, source, options if is_layout else {}, scale, backend == "flex")


def _attend_masked(q, k, v, source, options, scale, flex):
    """FlexAttention or SDPA with one mask for all."""
    is_layout = bool(options)
    # With these options a row is live exactly where its token is visible: it sees itself.
    plain = is_layout and options["dropped"] == "none" and options["window"] is None
    if not (plain and flex):
        intervals = source.intervals(**options) if is_layout else source
    if plain:
        rows = columns = source.visible
    else:
        rows, columns = _live_rows(intervals), _live_columns(intervals)
    # Against [B, H, S, D].
    rows, columns = ((x.unsqueeze(1) if x.dim() == 2 else x).unsqueeze(-1) for x in (rows, columns))
    # Rows of q as well: in the backward pass the dS = 0 of such a row meets its q, 0 * NaN again.
    q = torch.where(rows, q, 0)
    k, v = torch.where(columns, k, 0), torch.where(columns, v, 0)
    if flex:
        out = _flex(q, k, v, source.block_mask(**options), scale)
        if q.device.type == "cpu":
            return out  # 0 already; inductor's kernel for the CPU takes no selection after it
    else:
        out = _sdpa(q, k, v, intervals.dense(), scale)
    return torch.where(rows, out, 0)


def _choose(q, v, is_layout):
    if q.device.type == "cuda":
        narrow = min(q.shape[-1], v.shape[-1]) < 16
        return "sdpa" if q.dtype == torch.float64 or narrow else "flex"
    return "slices" if is_layout and not torch.compiler.is_compiling() else "sdpa"


def _live_rows(intervals):
    """``[..., Sq]`` True where a row attends to something."""
    return (intervals.hi > intervals.lo).any(-2)


def _live_columns(intervals):
    """``[..., kv_len]`` True where some row attends to it: a difference array over the columns."""
    lo, hi = (x.long().clamp(0, intervals.kv_len).flatten(-2) for x in (intervals.lo, intervals.hi))
    count = (hi > lo).to(torch.int32)
    change = count.new_zeros(*lo.shape[:-1], intervals.kv_len + 1)
    change = change.scatter_add(-1, lo * count, count).scatter_add(-1, hi * count, -count)
    return change.cumsum(-1)[..., :-1] > 0


# --- arguments -----------------------------------------------------------------------------------


def _check_source(source, is_layout, options):
    if is_layout:
        return
    if not isinstance(source, RowIntervals):
        rule = "be a PackedLayout or RowIntervals"
        raise refusal(_NAME, "layout_or_intervals", rule, type(source).__name__, TypeError)
    usual = {"mode": "full", **_PLAIN}
    given = [
        name
        for name, value in options.items()
        if type(value) is not type(usual[name]) or value != usual[name]
    ]
    if given:
        raise ValueError(
            f"{_NAME}: {', '.join(given)} must be left out with RowIntervals, which say themselves "
            "what each row attends to"
        )


def _check_operands(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(_NAME, name, x)
        if x.dim() != 4:
            raise refusal(_NAME, name, "be [B, H, S, D]", shape_text(x))
        if not x.is_floating_point():
            raise refusal(_NAME, name, "be a floating tensor", x.dtype)
        if x.dtype != q.dtype or x.device != q.device:
            rule = f"have dtype and device of q ({q.dtype}, {q.device})"
            raise refusal(_NAME, name, rule, f"{x.dtype}, {x.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise refusal(_NAME, "k", f"have B and D of q {shape_text(q)}", shape_text(k))
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise refusal(
            _NAME, "k", f"have a number of heads that divides the {q.shape[1]} of q", k.shape[1]
        )
    if v.shape[:3] != k.shape[:3]:
        raise refusal(_NAME, "v", f"have B, H and S of k {shape_text(k)}", shape_text(v))


def _check_fit(q, k, source, is_layout):
    """Device, lengths and batch of the mask against the operands."""
    if source.device.type != q.device.type:
        raise refusal(
            _NAME, "layout_or_intervals", f"be on the device of q ({q.device})", source.device
        )
    rows, columns = (source.padded_len,) * 2 if is_layout else (source.q_len, source.kv_len)
    for name, x, length in (("q", q, rows), ("k", k, columns)):
        if x.shape[2] != length:
            raise refusal(_NAME, name, f"be as long as the mask, S = {length}", shape_text(x))
    if not is_layout and source.lo.dim() == 3 and source.lo.shape[0] not in (1, q.shape[0]):
        rule = f"have the B of q, {q.shape[0]}, or none"
        raise refusal(_NAME, "layout_or_intervals", rule, source.lo.shape[0])


# --- one kernel for all samples ------------------------------------------------------------------


def _sdpa(q, k, v, mask=None, scale=None, is_causal=False):
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=gqa
    )


def _flex(q, k, v, block_mask, scale):
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        rule = "be without gradient on the CPU, where FlexAttention has no backward"
        got = "inputs that require one (use 'auto', 'slices' or 'sdpa')"
        raise refusal(_NAME, "backend 'flex'", rule, got)
    attend = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        # Outside a compiled region FlexAttention would make all S * S scores.
        global _compiled_flex
        if _compiled_flex is None:
            _compiled_flex = torch.compile(flex_attention)
        attend = _compiled_flex
    gqa = q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=gqa)


# --- variable-length kernels, on the tokens that are visible and no others -----------------------


def _attend_varlen(q, k, v, layout, options, scale):
    if q.device.type != "cuda":
        raise refusal(_NAME, "backend 'varlen'", "be on CUDA", q.device)
    mode = options["mode"]
    if mode not in ("full", "causal") or options != {"mode": mode, **_PLAIN}:
        raise ValueError(
            f"{_NAME}: backend 'varlen' must have mode 'full' or 'causal' and no window, sinks or "
            f"dropped queries, which its kernels do not know, got {options}"
        )
    return on_compacted(q, k, v, layout, mode == "causal", scale, _varlen_kernel)


def on_compacted(q, k, v, layout, causal, scale, kernel):
    """``kernel(q, k, v, cu_seqlens, max_seqlen, causal)`` on ``[tokens, H, D]``, put back."""
    plan = layout.compact()
    batch, size = q.shape[0], plan.layout.padded_len
    starts = plan.layout.sample_starts[:-1]
    # Every batch row is packed alike; rows follow each other as more samples.
    bounds = [b * size + start for b in range(batch) for start in starts] + [batch * size]
    if scale is not None:
        q = q * (scale * math.sqrt(q.shape[-1]))
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    q, k, v = (plan.gather(x, dim=2).transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = kernel(q, k, v, ints.to_device(bounds, q.device, torch.int32), plan.max_seqlen, causal)
    return plan.scatter(out.unflatten(0, (batch, size)).transpose(1, 2), dim=2)


def _varlen_kernel(q, k, v, cu_seqlens, max_seqlen, causal):
    from torch.nn.attention.varlen import varlen_attn  # its import asks for a GPU's kernels

    # PyTorch 2.10 says is_causal, later ones a window.
    if "window_size" in inspect.signature(varlen_attn).parameters:
        how = {"window_size": (-1, 0 if causal else -1)}
    else:
        how = {"is_causal": causal}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **how)


# --- sample by sample on the tokens that are visible: the training path of the CPU ---------------


def _attend_slices(q, k, v, layout, options, scale):
    """Each of q, k and v is split once into runs of tokens; runs that are dropped are never
    touched, so their gradient is 0 whatever is stored there."""
    mode = options["mode"]
    prefix = layout._relation("intervals", **options)[3]  # checked, and a tensor
    unusual = options["window"] is not None or options["sinks"] or options["dropped"] != "none"
    if unusual or layout.kept_lengths is None:
        return _attend_blocks(q, k, v, layout, options, scale)
    owners, sizes = _visible_runs(layout)
    q, k, v = (x.split(sizes, dim=2) for x in (q, k, v))
    batch, heads, width = q[0].shape[0], q[0].shape[1], v[0].shape[3]
    runs = [[] for _ in range(layout.num_samples)]
    for j, owner in enumerate(owners):
        if owner is not None:
            runs[owner].append(j)
    out = [None] * len(sizes)
    for run, count in zip(runs, _prefixes(layout, mode, prefix), strict=True):
        if not run:
            continue
        whole = len(run) == 1
        tokens = (x[run[0]] if whole else torch.cat([x[j] for j in run], 2) for x in (q, k, v))
        result = _attend_sample(*tokens, mode, count, scale)
        for j, part in zip(run, result.split([sizes[j] for j in run], dim=2), strict=True):
            out[j] = part
    filled = [
        q[j].new_zeros(batch, heads, sizes[j], width) if x is None else x for j, x in enumerate(out)
    ]
    # + 0 of no elements: attached to the graph where nothing is visible, with gradient 0.
    return torch.cat(filled, dim=2) + sum(x[-1][..., :0].sum() for x in (q, k, v))


def _visible_runs(layout):
    """All tokens in their order as runs: whose sample's they are, None where they are dropped or
    padding, and how many."""
    pieces, end = [], 0
    for i, (start, lengths, kept) in enumerate(
        zip(layout.sample_starts, layout.segment_lengths, layout.kept_lengths, strict=False)
    ):
        pieces.append((None, start - end))  # a gap before an aligned sample
        for length, keep in zip(lengths, kept, strict=True):
            pieces += [(i, keep), (None, length - keep)]
        end = start + sum(lengths)
    pieces.append((None, layout.padded_len - end))
    runs = groupby(filter(itemgetter(1), pieces), itemgetter(0))
    runs = [(owner, sum(size for _, size in pieces)) for owner, pieces in runs]
    return zip(*runs, strict=True)


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
        return _sdpa(q, k, v, None, scale)
    if prefix == 0:
        return _sdpa(q, k, v, None, scale, is_causal=True)
    # Two calls: the prefix sees itself; the rest sees all up to itself.
    front = _sdpa(q[:, :, :prefix], k[:, :, :prefix], v[:, :, :prefix], None, scale)
    index = torch.arange(length, device=q.device)
    mask = index <= index[prefix:].unsqueeze(1)
    return torch.cat([front, _sdpa(q[:, :, prefix:], k, v, mask, scale)], dim=2)


def _attend_blocks(q, k, v, layout, options, scale):
    """One dense block of mask per sample: any option, and keep_k that stays on its device."""
    intervals = layout.intervals(**options)
    rows, columns = (live(intervals).unsqueeze(-1) for live in (_live_rows, _live_columns))
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
        out.append(_sdpa(q[j], k[j], v[j], ((kv >= lo) & (kv < hi)).any(0), scale))
    return torch.where(rows, torch.cat(out, dim=2), 0)
