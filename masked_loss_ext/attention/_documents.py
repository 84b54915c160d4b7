# SPDX-License-Identifier: BSD-3-Clause
"""Row intervals from what batches carry: document ids, positions, cumulative lengths, padding."""

import torch

from .._checks import as_mask, check_choice, check_flags, check_int, check_rank, shape_text
from ..ops.block_mask import packed_rows
from . import _host
from ._sources import intervals_of


def from_document_ids(ids, pad_id=None, *, check=None):
    """Queries see the keys of their own document. Equal ids must be contiguous.

    Args:
        ids: ``[S]``, or ``[B, S]`` (B = 1: for any batch), integers.
        pad_id: id of padding, which sees nothing and is not seen.
        check: whether to look for ids that come again after another, and raise ValueError. None:
            on the CPU alone, as it waits for a device. Unchecked, such runs are documents apart.
    """
    name = "RowIntervals.from_document_ids"
    device, ids = _host.device_of(ids), _checked_ids(name, "ids", ids)
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[..., 1:] = ids[..., 1:] != ids[..., :-1]
    padding = None
    if pad_id is not None:
        check_int(name, "pad_id", pad_id)
        # Compared with uint8, say, -1 would be 255.
        limits = torch.iinfo(ids.dtype)
        fits = limits.min <= pad_id <= limits.max
        padding = ids == pad_id if fits else torch.zeros_like(begins)
    if check is not None:
        check_flags(name, {"check": check})
    if check or (check is None and _host.is_readable(ids)):
        _refuse_returning_ids(name, ids, begins, padding)
    return _runs(begins, padding).to(device)


def _checked_ids(name, argument, ids):
    ids = _host.integers(name, argument, ids)
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise ValueError(
            f"{name}: {argument} must be [S] or [B, S] with S of at least 1, got {shape_text(ids)}"
        )
    return ids


def _refuse_returning_ids(name, ids, begins, padding):
    """Looks at the first token of each run alone, and sorts them only where they do not rise."""
    if padding is not None:
        begins = begins & ~padding
    where = begins.nonzero(as_tuple=True)
    value, at, row = ids[begins].to(torch.int64), where[-1], None
    rises = value[1:] > value[:-1]
    if ids.dim() == 2:
        row = where[0]
        rises |= row[1:] != row[:-1]
    if rises.all():
        return
    order = value.sort(stable=True).indices
    if row is not None:  # by row, then by value, then by place
        order = order[row[order].sort(stable=True).indices]
    again = value[order[1:]] == value[order[:-1]]
    if row is not None:
        again &= row[order[1:]] == row[order[:-1]]
    if again.any():
        first = int(order[1:][again].min())
        place = f"index {int(at[first])}"
        if row is not None:
            place += f" of row {int(row[first])}"
        raise ValueError(
            f"{name}: ids must be contiguous, but id {int(value[first])} comes again at {place}; "
            "for such masks use torch.nn.attention.flex_attention.create_block_mask"
        )


def from_position_ids(position_ids):
    """Documents by their positions, ``[S]`` or ``[B, S]`` (B = 1: for any batch).

    For packed batches without an attention mask. A document begins at each position 0 and wherever
    positions do not rise by one, so a sequence may begin in the middle of a document, and a jump
    (0, 1, 7, 8) parts two. Padding whose positions do not rise is a document per token: it sees
    itself alone.
    """
    device = _host.device_of(position_ids)
    position_ids = _checked_ids("RowIntervals.from_position_ids", "position_ids", position_ids)
    # In int64: the 127 of an int8 is followed by 128, not by -128.
    position_ids = position_ids.to(torch.int64)
    rises = torch.zeros_like(position_ids, dtype=torch.bool)
    rises[..., 1:] = position_ids[..., 1:] == position_ids[..., :-1] + 1
    return _runs(~rises | (position_ids == 0), None).to(device)


def _runs(begins, padding):
    """Intervals of the runs that start where ``begins`` is on."""
    length = begins.shape[-1]
    # int32: half the memory, of which long sequences take much.
    t = torch.arange(length, device=begins.device, dtype=torch.int32).expand(begins.shape)
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
        cu_seqlens: integer tensor, list or array, from 0 upwards. On a GPU it is not read.
        total_len: S; tokens beyond the last entry are padding. None: the last entry, which must be
            on the host for that.
    """
    from .intervals import RowIntervals

    name = "RowIntervals.from_cu_seqlens"
    device = _host.device_of(cu_seqlens)
    cu_seqlens = _host.integers(name, "cu_seqlens", cu_seqlens)
    check_rank(name, "cu_seqlens", cu_seqlens, 1, "[N + 1]")
    if cu_seqlens.shape[0] < 2:
        raise ValueError(f"{name}: cu_seqlens must have N + 1 entries, got {cu_seqlens.shape[0]}")
    if total_len is not None:
        total_len = _host.length(name, "total_len", total_len)
    if _host.is_readable(cu_seqlens):
        values = cu_seqlens.tolist()
        if values[0] != 0 or sorted(values) != values:
            raise ValueError(f"{name}: cu_seqlens must rise from 0, got {values[:8]}")
        if total_len is None:
            _host.check_total(name, "cu_seqlens", values[-1])
            total_len = values[-1]
        elif values[-1] > total_len:
            raise ValueError(f"{name}: total_len must be at least {values[-1]}, got {total_len}")
    elif total_len is None:
        raise ValueError(f"{name}: total_len must be given where cu_seqlens cannot be read")
    kept = torch.full(
        (cu_seqlens.shape[0] - 1, 1), _host.LONGEST, dtype=torch.int64, device=cu_seqlens.device
    )
    offsets = cu_seqlens.to(torch.int64)
    lo, hi = packed_rows(offsets, kept, total_len, "full", None, None, None, 0, "none")
    return RowIntervals(lo, hi, total_len).to(device)


def from_padding(valid, seq_len=None, *, side="right"):
    """Rows of a padded batch: padding sees nothing and is not seen.

    Args:
        valid: ``[B]`` lengths (list, range, array or tensor; on a GPU one that is out of range
            counts as 0 or seq_len), or the mask ``[B, S]`` of a tokenizer (B = 1: for any batch),
            on where it is not 0, padding on either side or both.
        seq_len: S, for lengths.
        side: on which side the padding is, for lengths: "right" or "left". A mask says itself.
    """
    name = "RowIntervals.from_padding"
    check_choice(name, "side", side, ("right", "left"))
    device = _host.device_of(valid)
    if not isinstance(valid, torch.Tensor):
        what = "a tensor, a list of lengths or a mask"
        valid = _host.listed(name, "valid", valid, what)
        if len(valid) > 0 and hasattr(valid[0], "__len__"):
            valid = torch.as_tensor(valid, device="cpu")
        else:
            valid = _host.integers(name, "valid", valid)
    if valid.dim() == 2:
        if seq_len is not None and seq_len != valid.shape[1]:
            raise ValueError(
                f"{name}: seq_len must be S of the mask {shape_text(valid)} or None, got {seq_len}"
            )
        return _from_mask(name, as_mask(name, "valid", valid) != 0).to(device)
    valid = _host.integers(name, "valid", valid)
    check_rank(name, "valid", valid, 1, "[B]")
    if seq_len is None:
        raise ValueError(f"{name}: seq_len must be given with lengths")
    seq_len = _host.length(name, "seq_len", seq_len)
    if _host.is_readable(valid) and valid.numel():
        least, most = int(valid.min()), int(valid.max())
        if least < 0 or most > seq_len:
            raise ValueError(
                f"{name}: valid must be lengths from 0 to seq_len ({seq_len}), got "
                f"{least if least < 0 else most}"
            )
    length = valid.to(torch.int64).clamp(0, seq_len).view(-1, 1, 1)
    t = torch.arange(seq_len, device=valid.device)
    begin = seq_len - length if side == "left" else torch.zeros_like(length)
    return _within(t, begin, begin + length, seq_len).to(device)


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
