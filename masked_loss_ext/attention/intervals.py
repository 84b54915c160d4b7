# SPDX-License-Identifier: BSD-3-Clause
"""RowIntervals: an attention mask as a few intervals of keys per query, O(S) memory.

Here are the masks that are intervals by nature, and what batches carry: document ids, positions,
cumulative lengths, padding. What can be asked of a mask: ``IntervalMask``.
"""

from itertools import accumulate

import torch

from .._checks import as_mask, check_choice, check_flags, check_int, check_rank, refusal, shape_text
from ..ops.block_mask import packed_rows
from . import ints
from .interval_mask import IntervalMask


class RowIntervals(IntervalMask):
    r"""An attention mask: query q may see key k where ``lo[r][q] <= k < hi[r][q]`` for any r.

    >>> documents = RowIntervals.from_document_ids(torch.tensor([7, 7, 7, 2, 2, 2, 2, 2]))
    >>> mask = documents & RowIntervals.causal(8)
    >>> print(mask.ascii())
    #.......
    ##......
    ###.....
    ...#....
    ...##...
    ...###..
    ...####.
    ...#####
    >>> block_mask = mask.block_mask()  # for flex_attention; mask.dense() for any other

    Masks that are intervals: documents, padding, causal, windows, prefixes, sinks, cross attention,
    nested dropout, shared prefixes, block diffusion; and what ``&`` and ``|`` make of them. For the
    rest (a pattern with holes in each row, equal ids that are not contiguous) take
    ``create_block_mask``.

    The sources ``from_...``, ``full``, ``causal``, ``sliding_window``, ``prefix_lm``, ``sinks``,
    ``cross``, ``shared_prefix`` and ``block_diffusion`` say what they take;
    ``PackedLayout.intervals`` is the one for packed samples with nested dropout.

    Args:
        lo, hi: ``[R, Sq]``, ``[B, R, Sq]`` or ``[Sq]`` int32, R <= 8; empty where ``hi <= lo``.
            Without B, or with B = 1, it is the mask of every batch row, of however many.
        kv_len: number of keys; intervals are cut to ``[0, kv_len)``.
    """

    @staticmethod
    def full(
        q_len: int, kv_len: int | None = None, *, device: ints.Device = None
    ) -> "RowIntervals":
        """Every query sees every key."""
        t, kv_len = _query_positions("RowIntervals.full", q_len, kv_len, 0, device)
        return RowIntervals._where_any(torch.zeros_like(t), torch.full_like(t, kv_len), kv_len)

    @staticmethod
    def causal(
        q_len: int,
        kv_len: int | None = None,
        *,
        offset: int | ints.Lengths = 0,
        device: ints.Device = None,
    ) -> "RowIntervals":
        """Keys up to the query's own position, which is its index + ``offset``.

        Args:
            offset: of queries that continue a cache of so many keys: an int or a 0-d tensor for
                all, or ``[B]``. Queries before the first key (a negative offset) see nothing.
        """
        t, kv_len = _query_positions("RowIntervals.causal", q_len, kv_len, offset, device)
        return RowIntervals._where_any(torch.zeros_like(t), (t + 1).clamp_max(kv_len), kv_len)

    @staticmethod
    def sliding_window(
        q_len: int,
        window: ints.Window | None,
        kv_len: int | None = None,
        *,
        offset: int | ints.Lengths = 0,
        device: ints.Device = None,
    ) -> "RowIntervals":
        """Keys with ``q - left <= k <= q + right``, q being index + ``offset``.

        Args:
            window: ``(left, right)``, None for no limit; or one int for both. Longer than the
                sequence is all of it.
            offset: as in ``causal``.
        """
        name = "RowIntervals.sliding_window"
        left, right = ints.window_pair(name, window)
        t, kv_len = _query_positions(name, q_len, kv_len, offset, device)
        lo = torch.zeros_like(t) if left is None else (t - left).clamp_min(0)
        hi = torch.full_like(t, kv_len) if right is None else (t + right + 1).clamp_max(kv_len)
        return RowIntervals._where_any(lo, hi, kv_len)

    @staticmethod
    def prefix_lm(
        q_len: int, prefix: int | ints.Lengths, *, device: ints.Device = None
    ) -> "RowIntervals":
        """The first ``prefix`` keys (int, 0-d tensor, or ``[B]``), and the causal ones.

        A prefix longer than the sequence is all of it.
        """
        name = "RowIntervals.prefix_lm"
        prefix, device = ints.per_batch(name, "prefix", prefix, device)
        if isinstance(prefix, torch.Tensor):
            ints.refuse_negative(name, "prefix", prefix)
        else:
            prefix = ints.reach(name, "prefix", prefix)
        t, kv_len = _query_positions(name, q_len, None, 0, device)
        hi = (t + 1).clamp_min(prefix).clamp_max(kv_len)
        return RowIntervals._where_any(torch.zeros_like(hi), hi, kv_len)

    @staticmethod
    def sinks(
        q_len: int, count: int, kv_len: int | None = None, *, device: ints.Device = None
    ) -> "RowIntervals":
        """The first ``count`` keys (more than there are: all): ``causal & (window | sinks)``."""
        name = "RowIntervals.sinks"
        count = ints.reach(name, "count", count)
        t, kv_len = _query_positions(name, q_len, kv_len, 0, device)
        hi = torch.full_like(t, min(count, kv_len))
        return RowIntervals._where_any(torch.zeros_like(t), hi, kv_len)

    @staticmethod
    def from_document_ids(
        ids: ints.Lengths, pad_id: int | None = None, *, check: bool | None = None
    ) -> "RowIntervals":
        """Queries see the keys of their own document. Equal ids must be contiguous.

        Args:
            ids: ``[S]``, or ``[B, S]`` (B = 1: for any batch), integers.
            pad_id: id of padding, which sees nothing and is not seen.
            check: whether to look for ids that come again after another, and raise ValueError.
                None: on the CPU alone, as it waits for a device. Unchecked, such runs are documents
                apart.
        """
        name = "RowIntervals.from_document_ids"
        device, one = ints.device_of(ids), _checked_ids(name, "ids", ids)
        begins = torch.ones_like(one, dtype=torch.bool)
        begins[..., 1:] = one[..., 1:] != one[..., :-1]
        padding = None
        if pad_id is not None:
            check_int(name, "pad_id", pad_id)
            # Compared with uint8, say, -1 would be 255.
            limits = torch.iinfo(one.dtype)
            fits = limits.min <= pad_id <= limits.max
            padding = one == pad_id if fits else torch.zeros_like(begins)
        if check is not None:
            check_flags(name, {"check": check})
        if check or (check is None and ints.is_readable(one)):
            _refuse_returning_ids(name, one, begins, padding)
        return _runs(begins, padding).to(device)

    @staticmethod
    def from_position_ids(position_ids: ints.Lengths) -> "RowIntervals":
        """Documents by their positions, ``[S]`` or ``[B, S]`` (B = 1: for any batch).

        For packed batches without an attention mask. A document begins at each position 0 and
        wherever positions do not rise by one, so a sequence may begin in the middle of a document,
        and a jump (0, 1, 7, 8) parts two. Padding whose positions do not rise is a document per
        token: it sees itself alone.
        """
        device = ints.device_of(position_ids)
        at = _checked_ids("RowIntervals.from_position_ids", "position_ids", position_ids)
        at = at.to(torch.int64)  # the 127 of an int8 is followed by 128, not by -128
        rises = torch.zeros_like(at, dtype=torch.bool)
        rises[..., 1:] = at[..., 1:] == at[..., :-1] + 1
        return _runs(~rises | (at == 0), None).to(device)

    @staticmethod
    def from_cu_seqlens(cu_seqlens: ints.Lengths, total_len: int | None = None) -> "RowIntervals":
        """Documents by cumulative lengths ``[N + 1]``, as kernels for variable lengths take them.

        Args:
            cu_seqlens: integer tensor, list or array, from 0 upwards. On a GPU it is not read.
            total_len: S; tokens beyond the last entry are padding. None: the last entry, which must
                be on the host for that.
        """
        name = "RowIntervals.from_cu_seqlens"
        device = ints.device_of(cu_seqlens)
        bounds = ints.integers(name, "cu_seqlens", cu_seqlens)
        check_rank(name, "cu_seqlens", bounds, 1, "[N + 1]")
        entries = bounds.shape[0]
        if entries < 2:
            raise refusal(name, "cu_seqlens", "have N + 1 entries", entries)
        if total_len is not None:
            total_len = ints.length(name, "total_len", total_len)
        if ints.is_readable(bounds):
            values = bounds.tolist()
            if values[0] != 0 or sorted(values) != values:
                raise refusal(name, "cu_seqlens", "rise from 0", values[:8])
            ints.check_total(name, "cu_seqlens", 0 if total_len is not None else values[-1])
            total_len = ints.length_from(name, "total_len", total_len, values[-1])
        elif total_len is None:
            raise ValueError(f"{name}: total_len must be given where cu_seqlens cannot be read")
        kept = bounds.new_full((entries - 1, 1), ints.LONGEST, dtype=torch.int64)
        lo, hi = packed_rows(bounds.to(torch.int64), kept, total_len)
        return RowIntervals._of(lo, hi, total_len).to(device)

    @staticmethod
    def from_padding(
        valid: ints.Lengths, seq_len: int | None = None, *, side: str = "right"
    ) -> "RowIntervals":
        """Rows of a padded batch: padding sees nothing and is not seen.

        Args:
            valid: ``[B]`` lengths (list, range, array or tensor; on a GPU one that is out of range
                counts as 0 or seq_len), or the mask ``[B, S]`` of a tokenizer (B = 1: for any
                batch), on where it is not 0, padding on either side or both.
            seq_len: S, for lengths.
            side: on which side the padding is, for lengths: "right" or "left". A mask says itself.
        """
        name = "RowIntervals.from_padding"
        check_choice(name, "side", side, ("right", "left"))
        device, given = ints.device_of(valid), valid
        if not isinstance(valid, torch.Tensor):
            given = ints.listed(name, "valid", valid, "a tensor, a list of lengths or a mask")
            if len(given) > 0 and hasattr(given[0], "__len__"):
                given = torch.as_tensor(given, device="cpu")
        if isinstance(given, torch.Tensor) and given.dim() == 2:
            if seq_len is not None and seq_len != given.shape[1]:
                raise refusal(
                    name, "seq_len", f"be S of the mask {shape_text(given)} or None", seq_len
                )
            return _from_mask(name, as_mask(name, "valid", given) != 0).to(device)
        used = ints.integers(name, "valid", given)
        check_rank(name, "valid", used, 1, "[B]")
        if seq_len is None:
            raise ValueError(f"{name}: seq_len must be given with lengths")
        seq_len = ints.length(name, "seq_len", seq_len)
        if ints.is_readable(used) and used.numel():
            least, most = int(used.min()), int(used.max())
            if least < 0 or most > seq_len:
                rule = f"be lengths from 0 to seq_len ({seq_len})"
                raise refusal(name, "valid", rule, least if least < 0 else most)
        used = used.to(torch.int64).clamp(0, seq_len).view(-1, 1, 1)
        t = torch.arange(seq_len, device=used.device)
        begin = seq_len - used if side == "left" else torch.zeros_like(used)
        return _within(t, begin, begin + used, seq_len).to(device)

    @staticmethod
    def cross(
        q_lengths: ints.Lengths,
        kv_lengths: ints.Lengths,
        keep_k: ints.Lengths | None = None,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        device: ints.Device = None,
    ) -> "RowIntervals":
        """Packed cross attention: the queries of a sample see its first ``keep_k`` keys.

        Args:
            q_lengths, kv_lengths: ``[N]`` ints on the host.
            keep_k: ``[N]`` list or tensor (not read on a device); None keeps all keys.
            q_len, kv_len: lengths of both sequences; what is beyond the samples is padding.
        """
        name = "RowIntervals.cross"
        queries = ints.lengths(name, "q_lengths", q_lengths)
        keys = ints.lengths(name, "kv_lengths", kv_lengths)
        if len(queries) != len(keys):
            raise refusal(
                name, "kv_lengths", f"have one entry per sample ({len(queries)})", len(keys)
            )
        q_len = ints.length_from(name, "q_len", q_len, sum(queries))
        kv_len = ints.length_from(name, "kv_len", kv_len, sum(keys))
        device = ints.device_of(keep_k, device)
        kept = ints.to_device([*keys, 0], device)  # a last sample for the padding
        if keep_k is not None:
            host, tensor = ints.keep_rows(name, keep_k, len(keys), 1)
            most = host if tensor is None else tensor
            most = ints.per_sample(name, "keep_k", most, len(keys), device)
            kept[:-1] = torch.minimum(kept[:-1], most.clamp_min(0))
        begin = ints.to_device([*accumulate(keys[:-1], initial=0), 0], device)
        repeats = ints.to_device([*queries, q_len - sum(queries)], device)
        bounds = torch.stack([begin, begin + kept])
        lo, hi = bounds.repeat_interleave(repeats, 1, output_size=q_len).unsqueeze(1)
        return RowIntervals._where_any(lo, hi, kv_len)

    @staticmethod
    def shared_prefix(
        prefix_len: int,
        branch_lengths: ints.Lengths,
        *,
        seq_len: int | None = None,
        device: ints.Device = None,
    ) -> "RowIntervals":
        """One prompt, several continuations: each sees the prompt and itself, causally.

        Args:
            prefix_len: tokens of the prompt, at the front.
            branch_lengths: ``[N]`` ints, the continuations after it.
            seq_len: S; the rest is padding.
        """
        name = "RowIntervals.shared_prefix"
        prefix_len = ints.length(name, "prefix_len", prefix_len)
        branches = ints.lengths(name, "branch_lengths", branch_lengths)
        used = prefix_len + sum(branches)
        seq_len = ints.length_from(name, "seq_len", seq_len, used)
        device = ints.device_of(None, device)
        t = torch.arange(seq_len, device=device)
        # The prompt is a branch that begins at 0, and so is the padding, until it is cut off below.
        begin = ints.to_device([0, *accumulate(branches[:-1], initial=prefix_len), 0], device)
        repeats = ints.to_device([prefix_len, *branches, seq_len - used], device)
        begin = begin.repeat_interleave(repeats, output_size=seq_len)
        end = torch.where(t < used, t + 1, 0)
        prompt = torch.where((t >= prefix_len) & (t < used), prefix_len, 0)
        lo, hi = torch.stack([torch.zeros_like(t), begin]), torch.stack([prompt, end])
        return RowIntervals._where_any(lo, hi, seq_len)

    @staticmethod
    def block_diffusion(seq_len: int, block: int, *, device: ints.Device = None) -> "RowIntervals":
        """Block diffusion's training mask over ``[noisy ; clean]``, ``2 * seq_len`` tokens.

        A noisy token sees its own noisy block and the clean blocks before it, a clean one the clean
        blocks up to its own. A block longer than the sequence is all of it.
        """
        name = "RowIntervals.block_diffusion"
        seq_len = ints.length(name, "seq_len", seq_len, most=ints.LONGEST // 2)
        block = min(ints.length(name, "block", block, 1, None), max(seq_len, 1))
        t = torch.arange(2 * seq_len, device=device)
        noisy = t < seq_len
        begin = (t % max(seq_len, 1)) // block * block
        end = (begin + block).clamp_max(seq_len)
        lo = torch.stack([torch.where(noisy, begin, seq_len), torch.full_like(t, seq_len)])
        clean = torch.where(noisy, seq_len + begin, 0)
        hi = torch.stack([torch.where(noisy, end, seq_len + end), clean])
        return RowIntervals._where_any(lo, hi, 2 * seq_len)


def _query_positions(name, q_len, kv_len, offset, device):
    """Positions of the queries among the keys, ``[1, Sq]`` or ``[B, 1, Sq]``, and kv_len."""
    q_len = ints.length(name, "q_len", q_len)
    offset, device = ints.per_batch(name, "offset", offset, device)
    if not isinstance(offset, torch.Tensor):
        offset = ints.length(name, "offset", offset, -ints.LONGEST)
    kv_len = q_len if kv_len is None else ints.length(name, "kv_len", kv_len)
    return torch.arange(q_len, device=device).unsqueeze(0) + offset, kv_len


def _checked_ids(name, argument, ids):
    ids = ints.integers(name, argument, ids)
    if ids.dim() not in (1, 2) or ids.shape[-1] == 0:
        raise refusal(name, argument, "be [S] or [B, S] with S of at least 1", shape_text(ids))
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


def _runs(begins, padding):
    """Intervals of the runs that start where ``begins`` is on."""
    size = begins.shape[-1]
    # int32: half the memory, of which long sequences take much.
    t = torch.arange(size, device=begins.device, dtype=torch.int32).expand(begins.shape)
    lo = torch.where(begins, t, 0).cummax(-1).values
    following = torch.full_like(t, size)
    following[..., :-1] = torch.where(begins, t, size)[..., 1:]
    hi = following.flip(-1).cummin(-1).values.flip(-1)
    if padding is not None:
        lo, hi = lo.masked_fill(padding, 0), hi.masked_fill(padding, 0)
    return RowIntervals._of(lo.unsqueeze(-2), hi.unsqueeze(-2), size)


def _within(t, begin, end, kv_len):
    live = (t >= begin) & (t < end)
    lo, hi = torch.where(live, begin, 0), torch.where(live, end, 0)
    return RowIntervals._of(lo.to(torch.int32), hi.to(torch.int32), kv_len)


def _from_mask(name, on):
    size = on.shape[1]
    t = torch.arange(size, device=on.device)
    begin = torch.where(on, t, size).amin(1) if size else t.sum().expand(on.shape[0])
    end = torch.where(on, t + 1, 0).amax(1) if size else begin
    if ints.is_readable(on) and not torch.equal(on.sum(1), (end - begin).clamp_min(0)):
        row = int((on.sum(1) != (end - begin).clamp_min(0)).nonzero()[0])
        raise ValueError(
            f"{name}: valid must be one run in each row, got a hole in row {row}; for such masks "
            "use torch.nn.attention.flex_attention.create_block_mask"
        )
    return _within(t, begin.view(-1, 1, 1), end.view(-1, 1, 1), size)
