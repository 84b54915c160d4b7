# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention: one call, the same numbers from FlexAttention, SDPA and varlen kernels.

What no row attends to, and rows that attend to nothing, are selected away before and after the
kernel: inside one, a weight of 0 times a stored NaN would be NaN.
"""

import torch
from torch.nn.attention.flex_attention import flex_attention

from .._checks import check_choice, check_number, check_tensor, shape_text
from .attend_slices import attend_slices, interval_columns, interval_rows, sdpa
from .attend_varlen import attend_varlen
from .intervals import RowIntervals
from .layout import PackedLayout

BACKENDS = ("auto", "flex", "slices", "varlen", "sdpa")
_NAME = "packed_attention"
_compiled_flex = None


def packed_attention(
    q,
    k,
    v,
    layout_or_intervals,
    mode="full",
    backend="auto",
    *,
    window=None,
    prefix=None,
    sinks=0,
    dropped="none",
    scale=None,
):
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
    is_layout = isinstance(layout_or_intervals, PackedLayout)
    options = dict(mode=mode, window=window, prefix=prefix, sinks=sinks, dropped=dropped)
    _check_source(layout_or_intervals, is_layout, options)
    _check_operands(q, k, v)
    if layout_or_intervals.device.type != q.device.type:
        raise ValueError(
            f"{_NAME}: layout_or_intervals must be on the device of q ({q.device}), got "
            f"{layout_or_intervals.device}"
        )
    if is_layout:
        length = layout_or_intervals.padded_len
        _check_lengths(q, k, length, length)
    else:
        _check_lengths(q, k, layout_or_intervals.lo.shape[-1], layout_or_intervals.kv_len)
        _check_batch(q, layout_or_intervals)
    if backend == "auto":
        backend = _choose(q, v, is_layout)
    if backend in ("slices", "varlen"):
        if not is_layout:
            raise ValueError(
                f"{_NAME}: backend {backend!r} must have a PackedLayout, whose samples it takes "
                "one by one, got RowIntervals (use 'flex' or 'sdpa')"
            )
        attend = attend_slices if backend == "slices" else attend_varlen
        return attend(q, k, v, layout_or_intervals, options, scale)
    source = layout_or_intervals
    # With these options a row is live exactly where its token is visible: it sees itself.
    plain = is_layout and dropped == "none" and window is None
    intervals = None
    if not (plain and backend == "flex"):
        intervals = source.intervals(**options) if is_layout else source
    rows = columns = source.visible if plain else None
    if not plain:
        rows, columns = interval_rows(intervals), interval_columns(intervals)
    rows, columns = _broadcast(rows), _broadcast(columns)
    # Rows of q as well: in the backward pass the dS = 0 of such a row meets its q, 0 * NaN again.
    q = torch.where(rows, q, 0)
    k, v = torch.where(columns, k, 0), torch.where(columns, v, 0)
    if backend == "flex":
        block_mask = source.block_mask(**options) if is_layout else source.block_mask()
        out = _flex(q, k, v, block_mask, scale)
        if q.device.type == "cpu":
            return out  # 0 already; inductor's kernel for the CPU takes no selection after it
    else:
        out = sdpa(q, k, v, intervals.dense(), scale)
    return torch.where(rows, out, 0)


def _choose(q, v, is_layout):
    if q.device.type == "cuda":
        narrow = min(q.shape[-1], v.shape[-1]) < 16
        return "sdpa" if q.dtype == torch.float64 or narrow else "flex"
    return "slices" if is_layout and not torch.compiler.is_compiling() else "sdpa"


def _broadcast(live):
    """``[S]`` or ``[B, S]`` -> against ``[B, H, S, D]``."""
    return (live.unsqueeze(1) if live.dim() == 2 else live).unsqueeze(-1)


def _flex(q, k, v, block_mask, scale):
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"{_NAME}: backend 'flex' must be without gradient on the CPU, where FlexAttention has "
            "no backward, got inputs that require one (use 'auto', 'slices' or 'sdpa')"
        )
    attend = flex_attention
    if q.device.type == "cuda" and not torch.compiler.is_compiling():
        # Outside a compiled region FlexAttention would make all S * S scores.
        global _compiled_flex
        if _compiled_flex is None:
            _compiled_flex = torch.compile(flex_attention)
        attend = _compiled_flex
    gqa = q.shape[1] != k.shape[1]
    return attend(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=gqa)


def _check_source(source, is_layout, options):
    if is_layout:
        return
    if not isinstance(source, RowIntervals):
        raise TypeError(
            f"{_NAME}: layout_or_intervals must be a PackedLayout or RowIntervals, got "
            f"{type(source).__name__}"
        )
    defaults = dict(mode="full", window=None, prefix=None, sinks=0, dropped="none")
    given = [
        name
        for name, value in options.items()
        if type(value) is not type(defaults[name]) or value != defaults[name]
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
            raise ValueError(f"{_NAME}: {name} must be [B, H, S, D], got {shape_text(x)}")
        if not x.is_floating_point():
            raise ValueError(f"{_NAME}: {name} must be a floating tensor, got {x.dtype}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{_NAME}: {name} must have dtype and device of q ({q.dtype}, {q.device}), got "
                f"{x.dtype}, {x.device}"
            )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{_NAME}: k must have B and D of q {shape_text(q)}, got {shape_text(k)}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{_NAME}: k must have a number of heads that divides the {q.shape[1]} of q, got "
            f"{k.shape[1]}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"{_NAME}: v must have B, H and S of k {shape_text(k)}, got {shape_text(v)}"
        )


def _check_lengths(q, k, rows, columns):
    for name, x, length in (("q", q, rows), ("k", k, columns)):
        if x.shape[2] != length:
            raise ValueError(
                f"{_NAME}: {name} must be as long as the mask, S = {length}, got {shape_text(x)}"
            )


def _check_batch(q, intervals):
    if intervals.lo.dim() == 3 and intervals.lo.shape[0] not in (1, q.shape[0]):
        raise ValueError(
            f"{_NAME}: layout_or_intervals must have the B of q, {q.shape[0]}, or none, got "
            f"{intervals.lo.shape[0]}"
        )
