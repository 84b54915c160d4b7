# SPDX-License-Identifier: BSD-3-Clause
"""Attention masks that are row intervals by nature; ``RowIntervals`` has them as static methods."""

from itertools import accumulate

import torch

from .._checks import check_length
from . import _host


def intervals_of(lo, hi, kv_len):
    from .intervals import RowIntervals  # which is made of this file

    live = hi > lo
    zero = torch.zeros((), dtype=torch.int32, device=hi.device)
    lo, hi = (torch.where(live, x.to(torch.int32), zero) for x in (lo, hi))
    return RowIntervals(lo, hi, kv_len)


def _query_positions(name, q_len, kv_len, offset, device):
    """Positions of the queries among the keys, ``[1, Sq]`` or ``[B, 1, Sq]``, and kv_len."""
    q_len = _host.length(name, "q_len", q_len)
    offset, device = _host.per_batch(name, "offset", offset, device)
    if not isinstance(offset, torch.Tensor):
        check_length(name, "offset", offset, -_host.LONGEST, _host.LONGEST)
    kv_len = q_len if kv_len is None else _host.length(name, "kv_len", kv_len)
    return torch.arange(q_len, device=device).unsqueeze(0) + offset, kv_len


def full(q_len, kv_len=None, *, device=None):
    """Every query sees every key."""
    t, kv_len = _query_positions("RowIntervals.full", q_len, kv_len, 0, device)
    return intervals_of(torch.zeros_like(t), torch.full_like(t, kv_len), kv_len)


def causal(q_len, kv_len=None, *, offset=0, device=None):
    """Keys up to the query's own position, which is its index + ``offset``.

    Args:
        offset: of queries that continue a cache of so many keys: an int or a 0-d tensor for all, or
            ``[B]``. Queries before the first key (a negative offset) see nothing.
    """
    t, kv_len = _query_positions("RowIntervals.causal", q_len, kv_len, offset, device)
    return intervals_of(torch.zeros_like(t), (t + 1).clamp_max(kv_len), kv_len)


def sliding_window(q_len, window, kv_len=None, *, offset=0, device=None):
    """Keys with ``q - left <= k <= q + right``, q being index + ``offset``.

    Args:
        window: ``(left, right)``, None for no limit; or one int for both. Longer than the sequence
            is all of it.
        offset: as in ``causal``.
    """
    from .intervals import window_pair

    name = "RowIntervals.sliding_window"
    left, right = window_pair(name, window)
    t, kv_len = _query_positions(name, q_len, kv_len, offset, device)
    lo = torch.zeros_like(t) if left is None else (t - left).clamp_min(0)
    hi = torch.full_like(t, kv_len) if right is None else (t + right + 1).clamp_max(kv_len)
    return intervals_of(lo, hi, kv_len)


def prefix_lm(q_len, prefix, *, device=None):
    """The first ``prefix`` keys (int, 0-d tensor, or ``[B]``), and the causal ones.

    A prefix longer than the sequence is all of it.
    """
    name = "RowIntervals.prefix_lm"
    prefix, device = _host.per_batch(name, "prefix", prefix, device)
    if isinstance(prefix, torch.Tensor):
        _host.refuse_negative(name, "prefix", prefix)
    else:
        prefix = _host.reach(name, "prefix", prefix)
    t, kv_len = _query_positions(name, q_len, None, 0, device)
    hi = (t + 1).clamp_min(prefix).clamp_max(kv_len)
    return intervals_of(torch.zeros_like(hi), hi, kv_len)


def sinks(q_len, count, kv_len=None, *, device=None):
    """The first ``count`` keys (more than there are: all): ``causal & (window | sinks)``."""
    name = "RowIntervals.sinks"
    count = _host.reach(name, "count", count)
    t, kv_len = _query_positions(name, q_len, kv_len, 0, device)
    return intervals_of(torch.zeros_like(t), torch.full_like(t, min(count, kv_len)), kv_len)


def cross(q_lengths, kv_lengths, keep_k=None, *, q_len=None, kv_len=None, device=None):
    """Packed cross attention: the queries of a sample see its first ``keep_k`` keys.

    Args:
        q_lengths, kv_lengths: ``[N]`` ints on the host.
        keep_k: ``[N]`` list or tensor (not read on a device); None keeps all keys.
        q_len, kv_len: lengths of both sequences; what is beyond the samples is padding.
    """
    name = "RowIntervals.cross"
    queries = _host.lengths(name, "q_lengths", q_lengths)
    keys = _host.lengths(name, "kv_lengths", kv_lengths)
    if len(queries) != len(keys):
        raise ValueError(
            f"{name}: kv_lengths must have one entry per sample ({len(queries)}), got {len(keys)}"
        )
    q_len = _at_least(name, "q_len", q_len, sum(queries))
    kv_len = _at_least(name, "kv_len", kv_len, sum(keys))
    device = _host.device_of(keep_k, device)
    length = _host.to_device([*keys, 0], device)  # a last sample for the padding
    if keep_k is not None:
        _, tensor = _host.keep_rows(name, keep_k, len(keys), 1)
        kept = _host.per_sample(
            name, "keep_k", keep_k if tensor is None else tensor, len(keys), device
        )
        length[:-1] = torch.minimum(length[:-1], kept.clamp_min(0))
    starts = list(accumulate(keys, initial=0))
    begin = _host.to_device([*starts[:-1], 0], device)
    repeats = _host.to_device([*queries, q_len - sum(queries)], device)
    bounds = torch.stack([begin, begin + length])
    lo, hi = bounds.repeat_interleave(repeats, 1, output_size=q_len).unsqueeze(1)
    return intervals_of(lo, hi, kv_len)


def _at_least(name, argument, value, needed):
    value = _host.length(name, argument, needed if value is None else value)
    if value < needed:
        raise ValueError(f"{name}: {argument} must be at least {needed}, got {value}")
    return value


def shared_prefix(prefix_len, branch_lengths, *, seq_len=None, device=None):
    """One prompt, several continuations: each sees the prompt and itself, causally.

    Args:
        prefix_len: tokens of the prompt, at the front.
        branch_lengths: ``[N]`` ints, the continuations after it.
        seq_len: S; the rest is padding.
    """
    name = "RowIntervals.shared_prefix"
    prefix_len = _host.length(name, "prefix_len", prefix_len)
    branches = _host.lengths(name, "branch_lengths", branch_lengths)
    used = prefix_len + sum(branches)
    seq_len = _at_least(name, "seq_len", seq_len, used)
    device = _host.device_of(None, device)
    t = torch.arange(seq_len, device=device)
    starts = list(accumulate(branches, initial=prefix_len))[:-1]
    # The prompt is a branch that begins at 0, and so is the padding, until it is cut off below.
    begin = _host.to_device([0, *starts, 0], device)
    repeats = _host.to_device([prefix_len, *branches, seq_len - used], device)
    begin = begin.repeat_interleave(repeats, output_size=seq_len)
    end = torch.where(t < used, t + 1, 0)
    prompt = torch.where((t >= prefix_len) & (t < used), prefix_len, 0)
    return intervals_of(
        torch.stack([torch.zeros_like(t), begin]), torch.stack([prompt, end]), seq_len
    )


def block_diffusion(seq_len, block, *, device=None):
    """Block diffusion's training mask over ``[noisy ; clean]``, ``2 * seq_len`` tokens.

    A noisy token sees its own noisy block and the clean blocks before it, a clean one the clean
    blocks up to its own. A block longer than the sequence is all of it.
    """
    name = "RowIntervals.block_diffusion"
    seq_len = _host.length(name, "seq_len", seq_len, most=_host.LONGEST // 2)
    block = min(_host.length(name, "block", block, 1, None), max(seq_len, 1))
    t = torch.arange(2 * seq_len, device=device)
    noisy = t < seq_len
    begin = (t % max(seq_len, 1)) // block * block
    end = (begin + block).clamp_max(seq_len)
    lo = torch.stack([torch.where(noisy, begin, seq_len), torch.full_like(t, seq_len)])
    hi = torch.stack(
        [torch.where(noisy, end, seq_len + end), torch.where(noisy, seq_len + begin, 0)]
    )
    return intervals_of(lo, hi, 2 * seq_len)
