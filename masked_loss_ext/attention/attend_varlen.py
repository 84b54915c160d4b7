# SPDX-License-Identifier: BSD-3-Clause
"""Attention by PyTorch's variable-length kernels, on the tokens that are visible and no others."""

import inspect
import math

import torch

from ._host import to_device

_NAME = "packed_attention"


def attend_varlen(q, k, v, layout, options, scale):
    """``[B, H, S, D]``; options are those of ``PackedLayout.intervals``, full or causal alone."""
    if q.device.type != "cuda":
        raise ValueError(f"{_NAME}: backend 'varlen' must be on CUDA, got {q.device}")
    plain = dict(mode=options["mode"], window=None, prefix=None, sinks=0, dropped="none")
    if options["mode"] not in ("full", "causal") or options != plain:
        raise ValueError(
            f"{_NAME}: backend 'varlen' must have mode 'full' or 'causal' and no window, sinks or "
            f"dropped queries, which its kernels do not know, got {options}"
        )
    return on_compacted(q, k, v, layout, options["mode"] == "causal", scale, _kernel)


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
    out = kernel(q, k, v, to_device(bounds, q.device, torch.int32), plan.max_seqlen, causal)
    return plan.scatter(out.unflatten(0, (batch, size)).transpose(1, 2), dim=2)


def _kernel(q, k, v, cu_seqlens, max_seqlen, causal):
    from torch.nn.attention.varlen import varlen_attn  # its import asks for a GPU's kernels

    # PyTorch 2.10 says is_causal, later ones a window.
    if "window_size" in inspect.signature(varlen_attn).parameters:
        how = {"window_size": (-1, 0 if causal else -1)}
    else:
        how = {"is_causal": causal}
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **how)
