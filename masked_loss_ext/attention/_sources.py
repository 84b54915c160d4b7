# SPDX-License-Identifier: BSD-3-Clause
"""Attention masks that are row intervals by nature; ``RowIntervals`` has them as static methods."""

import torch

from .._checks import check_choice, check_integers, check_length, check_rank
from . import _host
from ._ops import packed_rows


def _intervals(lo, hi, kv_len):
    from .intervals import RowIntervals  # which is made of this file

    live = hi > lo
    zero = torch.zeros((), dtype=torch.int32, device=hi.device)
    lo, hi = (torch.where(live, x.to(torch.int32), zero) for x in (lo, hi))
    return RowIntervals(lo, hi, kv_len)


def _query_positions(name, q_len, kv_len, offset, device):
    """Positions of the queries among the keys, ``[1, Sq]`` or ``[B, 1, Sq]``, and kv_len."""
    check_length(name, "q_len", q_len)
    if isinstance(offset, torch.Tensor):
        check_rank(name, "offset", offset, 1, "[B]")
        device = offset.device if device is None else device
        offset = offset.to(device).view(-1, 1, 1)
    if kv_len is None:
        kv_len = q_len
    check_length(name, "kv_len", kv_len)
    return torch.arange(q_len, device=device).unsqueeze(0) + offset, kv_len


def full(q_len, kv_len=None, *, device=None):
    """Every query sees every key."""
    t, kv_len = _query_positions("RowIntervals.full", q_len, kv_len, 0, device)
    return _intervals(torch.zeros_like(t), torch.full_like(t, kv_len), kv_len)


def causal(q_len, kv_len=None, *, offset=0, device=None):
    """Keys up to the query's own position, which is its index + ``offset``.

    Args:
        offset: int, or ``[B]`` tensor: of queries that continue a cache of so many keys.
    """
    t, kv_len = _query_positions("RowIntervals.causal", q_len, kv_len, offset, device)
    return _intervals(torch.zeros_like(t), (t + 1).clamp_max(kv_len), kv_len)


def sliding_window(q_len, window, kv_len=None, *, offset=0, device=None):
    """Keys with ``q - left <= k <= q + right``, q being index + ``offset``.

    Args:
        window: ``(left, right)``, None for no limit; or one int for both.
    """
    from .intervals import window_pair

    name = "RowIntervals.sliding_window"
    left, right = window_pair(name, window)
    t, kv_len = _query_positions(name, q_len, kv_len, offset, device)
    lo = torch.zeros_like(t) if left is None else (t - left).clamp_min(0)
    hi = torch.full_like(t, kv_len) if right is None else (t + right + 1).clamp_max(kv_len)
    return _intervals(lo, hi, kv_len)


def prefix_lm(q_len, prefix, *, device=None):
    """The first ``prefix`` keys (int, or ``[B]`` tensor), and the causal ones."""
    name = "RowIntervals.prefix_lm"
    if isinstance(prefix, torch.Tensor):
        check_integers(name, "prefix", prefix)
        check_rank(name, "prefix", prefix, 1, "[B]")
        device = prefix.device if device is None else device
        prefix = prefix.to(device).view(-1, 1, 1)
    else:
        check_length(name, "prefix", prefix)
    t, kv_len = _query_positions(name, q_len, None, 0, device)
    hi = (t + 1).clamp_min(prefix).clamp_max(kv_len)
    return _intervals(torch.zeros_like(hi), hi, kv_len)


def sinks(q_len, count, kv_len=None, *, device=None):
    """The first ``count`` keys: ``causal & (window | sinks)``."""
    name = "RowIntervals.sinks"
    check_length(name, "count", count)
    t, kv_len = _query_positions(name, q_len, kv_len, 0, device)
    return _intervals(torch.zeros_like(t), torch.full_like(t, min(count, kv_len)), kv_len)


def from_document_ids(ids, pad_id=None, *, check=None):
    """Queries see the keys of their own document. Equal ids must be contiguous.

    Args:
        ids: ``[S]`` or ``[B, S]`` integers.
        pad_id: id of padding, which sees nothing and is not seen.
        check: whether to look for ids that come again after another, and raise ValueError. None:
            on the CPU alone, as it waits for a device. Unchecked, such runs are documents apart.
    """
    name = "RowIntervals.from_document_ids"
    check_integers(name, "ids", ids)
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise ValueError(f"{name}: ids must be [S] or [B, S], got {list(ids.shape)}")
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[..., 1:] = ids[..., 1:] != ids[..., :-1]
    if check or (check is None and _host.is_readable(ids)):
        _refuse_returning_ids(name, ids, begins, pad_id)
    return _runs(begins, None if pad_id is None else ids == pad_id)


def _refuse_returning_ids(name, ids, begins, pad_id):
    rows = ids if ids.dim() == 2 else ids.unsqueeze(0)
    row, at = begins.view(rows.shape).nonzero(as_tuple=True)
    value = rows[row, at]
    if pad_id is not None:
        counts = value != pad_id
        row, at, value = row[counts], at[counts], value[counts]
    _, which = torch.unique(torch.stack([row, value.to(row.dtype)]), dim=1, return_inverse=True)
    order = which.sort(stable=True).indices
    again = torch.zeros_like(which, dtype=torch.bool)
    again[order[1:]] = which[order[1:]] == which[order[:-1]]
    if again.any():
        first = int(again.nonzero()[0])
        place = f"index {int(at[first])}"
        if ids.dim() == 2:
            place += f" of row {int(row[first])}"
        raise ValueError(
            f"{name}: ids must be contiguous, but id {int(value[first])} comes again at {place}; "
            "for such masks use torch.nn.attention.flex_attention.create_block_mask"
        )


def from_position_ids(position_ids):
    """Documents by their positions, ``[S]`` or ``[B, S]``: one goes on while they rise by one.

    For packed batches without an attention mask. Padding whose positions do not rise is a document
    per token: it sees itself alone.
    """
    name = "RowIntervals.from_position_ids"
    check_integers(name, "position_ids", position_ids)
    if position_ids.dim() not in (1, 2) or position_ids.shape[-1] == 0:
        raise ValueError(
            f"{name}: position_ids must be [S] or [B, S], got {list(position_ids.shape)}"
        )
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[..., 1:] = position_ids[..., 1:] != position_ids[..., :-1] + 1
    return _runs(begins, None)


def _runs(begins, padding):
    """Intervals of the runs that start where ``begins`` is on."""
    length = begins.shape[-1]
    t = torch.arange(length, device=begins.device).expand(begins.shape)
    lo = torch.where(begins, t, 0).cummax(-1).values
    following = torch.full_like(t, length)
    following[..., :-1] = torch.where(begins, t, length)[..., 1:]
    hi = following.flip(-1).cummin(-1).values.flip(-1)
    if padding is not None:
        lo, hi = lo.masked_fill(padding, 0), hi.masked_fill(padding, 0)
    return _intervals(lo.unsqueeze(-2), hi.unsqueeze(-2), length)


def from_cu_seqlens(cu_seqlens, total_len=None):
    """Documents by cumulative lengths ``[N + 1]``, as kernels for variable lengths take them.

    Args:
        cu_seqlens: integer tensor or list, from 0 upwards. On a GPU it is not read.
        total_len: S; tokens beyond the last entry are padding. None: the last entry, which must be
            on the host for that.
    """
    from .intervals import RowIntervals

    name = "RowIntervals.from_cu_seqlens"
    if not isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = torch.as_tensor(cu_seqlens)
    check_integers(name, "cu_seqlens", cu_seqlens)
    check_rank(name, "cu_seqlens", cu_seqlens, 1, "[N + 1]")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: cu_seqlens must have N + 1 entries, got {cu_seqlens.shape[0]}")
    if _host.is_readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or sorted(values) != values:
            raise ValueError(f"{name}: cu_seqlens must rise from 0, got {values[:8]}")
        if total_len is None:
            total_len = values[-1]
        elif values[-1] > total_len:
            raise ValueError(f"{name}: total_len must be at least {values[-1]}, got {total_len}")
    elif total_len is None:
        raise ValueError(f"{name}: total_len must be given where cu_seqlens cannot be read")
    check_length(name, "total_len", total_len)
    kept = torch.full(
        (cu_seqlens.shape[0] - 1, 1), _host.UNLIMITED, dtype=torch.int64, device=cu_seqlens.device
    )
    offsets = cu_seqlens.to(torch.int64)
    lo, hi = packed_rows(offsets, kept, total_len, "full", None, None, None, 0, "none")
    return RowIntervals(lo, hi, total_len)


def from_padding(valid, seq_len=None, *, side="right"):
    """Rows of a padded batch: padding sees nothing and is not seen.

    Args:
        valid: ``[B]`` lengths (list or tensor), or the mask ``[B, S]`` of a tokenizer, on where it
            is not 0, padding on either side or both.
        seq_len: S, for lengths.
        side: on which side the padding is, for lengths: "right" or "left".
    """
    name = "RowIntervals.from_padding"
    check_choice(name, "side", side, ("right", "left"))
    valid = valid if isinstance(valid, torch.Tensor) else torch.as_tensor(valid)
    if valid.dim() == 2:
        return _from_mask(name, valid != 0)
    check_integers(name, "valid", valid)
    check_rank(name, "valid", valid, 1, "[B]")
    if seq_len is None:
        raise ValueError(f"{name}: seq_len must be given with lengths")
    check_length(name, "seq_len", seq_len)
    length = valid.to(torch.int64).clamp(0, seq_len).view(-1, 1, 1)
    t = torch.arange(seq_len, device=valid.device)
    begin = seq_len - length if side == "left" else torch.zeros_like(length)
    return _within(t, begin, begin + length, seq_len)


def _within(t, begin, end, kv_len):
    live = (t >= begin) & (t < end)
    return _intervals(torch.where(live, begin, 0), torch.where(live, end, 0), kv_len)


def _from_mask(name, on):
    length = on.shape[1]
    t = torch.arange(length, device=on.device)
    begin = torch.where(on, t, length).amin(1) if length else t.sum().expand(on.shape[0])
    end = torch.where(on, t + 1, 0).amax(1) if length else begin
    if _host.is_readable(on) and not torch.equal(on.sum(1), (end - begin).clamp_min(0)):
        row = int((on.sum(1) != (end - begin).clamp_min(0)).nonzero()[0])
        raise ValueError(
            f"{name}: valid must be one run in each row, got a hole in row {row}; for such masks "
            "use torch.nn.attention.flex_attention.create_block_mask"
        )
    return _within(t, begin.view(-1, 1, 1), end.view(-1, 1, 1), length)


def cross(q_lengths, kv_lengths, keep_k=None, *, q_len=None, kv_len=None, device=None):
    """Packed cross attention: the queries of a sample see its first ``keep_k`` keys.

    Args:
        q_lengths, kv_lengths: ``[N]`` ints on the host.
        keep_k: ``[N]`` list or tensor (not read on a device); None keeps all keys.
        q_len, kv_len: lengths of both sequences; what is beyond the samples is padding.
    """
    name = "RowIntervals.cross"
    queries = [row[0] for row in _host.length_rows(name, "q_lengths", q_lengths)]
    keys = [row[0] for row in _host.length_rows(name, "kv_lengths", kv_lengths)]
    if len(queries) != len(keys):
        raise ValueError(
            f"{name}: kv_lengths must have one entry per sample ({len(queries)}), got {len(keys)}"
        )
    q_len = _at_least(name, "q_len", q_len, sum(queries))
    kv_len = _at_least(name, "kv_len", kv_len, sum(keys))
    if device is None:
        device = keep_k.device if isinstance(keep_k, torch.Tensor) else "cpu"
    device = torch.device(device)
    length = _host.to_device([*keys, 0], device)  # a last sample for the padding
    if keep_k is not None:
        _, tensor = _host.keep_rows(name, keep_k, len(keys), 1)
        kept = _host.per_sample(
            name, "keep_k", keep_k if tensor is None else tensor, len(keys), device
        )
        length[:-1] = torch.minimum(length[:-1], kept.clamp_min(0))
    starts = [sum(keys[:i]) for i in range(len(keys))]
    begin = _host.to_device([*starts, 0], device)
    repeats = _host.to_device([*queries, q_len - sum(queries)], device)
    bounds = torch.stack([begin, begin + length])
    lo, hi = bounds.repeat_interleave(repeats, 1, output_size=q_len).unsqueeze(1)
    return _intervals(lo, hi, kv_len)


def _at_least(name, argument, value, needed):
    if value is None:
        return needed
    check_length(name, argument, value)
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
    check_length(name, "prefix_len", prefix_len)
    branches = [row[0] for row in _host.length_rows(name, "branch_lengths", branch_lengths)]
    used = prefix_len + sum(branches)
    seq_len = _at_least(name, "seq_len", seq_len, used)
    device = torch.device("cpu" if device is None else device)
    t = torch.arange(seq_len, device=device)
    starts = [prefix_len + sum(branches[:i]) for i in range(len(branches))]
    # The prompt is a branch that begins at 0, and so is the padding, until it is cut off below.
    begin = _host.to_device([0, *starts, 0], device)
    repeats = _host.to_device([prefix_len, *branches, seq_len - used], device)
    begin = begin.repeat_interleave(repeats, output_size=seq_len)
    end = torch.where(t < used, t + 1, 0)
    prompt = torch.where((t >= prefix_len) & (t < used), prefix_len, 0)
    return _intervals(
        torch.stack([torch.zeros_like(t), begin]), torch.stack([prompt, end]), seq_len
    )


def block_diffusion(seq_len, block, *, device=None):
    """Block diffusion's training mask over ``[noisy ; clean]``, ``2 * seq_len`` tokens.

    A noisy token sees its own noisy block and the clean blocks before it, a clean one the clean
    blocks up to its own.
    """
    name = "RowIntervals.block_diffusion"
    check_length(name, "seq_len", seq_len)
    check_length(name, "block", block)
    if block == 0:
        raise ValueError(f"{name}: block must be at least 1, got 0")
    t = torch.arange(2 * seq_len, device=device)
    noisy = t < seq_len
    begin = (t % max(seq_len, 1)) // block * block
    end = (begin + block).clamp_max(seq_len)
    lo = torch.stack([torch.where(noisy, begin, seq_len), torch.full_like(t, seq_len)])
    hi = torch.stack(
        [torch.where(noisy, end, seq_len + end), torch.where(noisy, seq_len + begin, 0)]
    )
    return _intervals(lo, hi, 2 * seq_len)
