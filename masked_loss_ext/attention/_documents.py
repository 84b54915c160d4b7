# SPDX-License-Identifier: BSD-3-Clause
"""Row intervals from what batches carry: document ids, positions, cumulative lengths, padding."""

import torch

from .._checks import check_choice, check_integers, check_length, check_rank
from ..ops.block_mask import packed_rows
from . import _host
from ._sources import intervals_of


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
    return intervals_of(lo.unsqueeze(-2), hi.unsqueeze(-2), length)


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
    return intervals_of(torch.where(live, begin, 0), torch.where(live, end, 0), kv_len)


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
