# SPDX-License-Identifier: BSD-3-Clause
"""PackedLayout: where each sample and segment lies in one packed sequence, and what is dropped.

Sizes are known on the host, keep_k may live on the device: nothing here waits for it but
``compact``, whose result has the size of what is kept.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from .._checks import check_choice, check_int, refusal, shape_text
from ..ops.block_mask import DROPPED, MODES, nested_dropout_plan, packed_rows
from . import ints
from .compaction import CompactPlan, check_fill, check_tokens
from .interval_mask import block_mask_of, interval_mask_mod
from .intervals import RowIntervals


class PackedLayout:
    """Samples of several segments, packed into one sequence, with segments cut to ``keep_k``.

    >>> layout = PackedLayout([[4, 3], [2, 3]], keep_k=[1, 2], pad_to_multiple=4)
    >>> layout.sample_ids.tolist()  # 12 tokens of two samples
    [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    >>> print("".join("x" if v else "." for v in layout.visible))
    xxxxx..xxxx.
    >>> block_mask = layout.block_mask("causal_last")  # for flex_attention

    ``allowed(q, k)`` = same sample, both visible, and the relation of a mode (see ``intervals``). A
    token is visible if it is not padding and lies before ``keep_k`` in its segment.

    Attributes of each token, ``[S]`` on ``device``: ``sample_ids``, ``positions`` (in its sample)
    and ``segment_ids``, int32, with -1, 0 and -1 in padding; ``visible``, bool. ``cu_seqlens``
    ``[N + 1]`` int32 is where samples begin, ``kept`` ``[N, G]`` int64 how much of each segment
    stays. On the host: ``segment_lengths``, ``sample_starts``, ``max_seqlen``, ``num_samples``,
    ``num_segments``, ``total_len``, ``padded_len`` (S), and ``kept_lengths``, None where keep_k is
    on a device. The S-sized ones are made when they are first asked for.

    Args:
        segment_lengths: ``[N, G]`` ints on the host, G segments (patches, registers) per sample;
            or ``[N]`` for samples of one segment. Lists, ranges, arrays or CPU tensors; at most
            2^31 - 1 tokens in all, padding included.
        keep_k: ``[N]`` how many tokens of the droppable segment stay, or ``[N, G]`` of each; a list
            or an integer tensor. More than the segment holds keeps all of it. Negative ones are
            refused, but on a device, where keep_k is never read, they count as 0. None keeps all.
        droppable: which segment an ``[N]`` keep_k cuts; the last, unless told.
        pad_to_multiple: S is a multiple of this (1: no padding). None: 128, or ``max_seq_len``.
        max_seq_len: S itself. ValueError where the samples do not fit.
        align_samples: each sample begins at a multiple of this; the gaps are padding. Samples that
            begin with a block have fewer partial blocks.
        device: of the tensors. None: that of a keep_k tensor, else PyTorch's default.
    """

    def __init__(
        self,
        segment_lengths: ints.Lengths,
        keep_k: ints.Lengths | None = None,
        *,
        droppable: int = -1,
        pad_to_multiple: int | None = None,
        max_seq_len: int | None = None,
        align_samples: int | None = None,
        device: ints.Device = None,
    ) -> None:
        name = "PackedLayout"
        rows = ints.length_rows(name, "segment_lengths", segment_lengths)
        samples, segments = len(rows), len(rows[0])
        if max_seq_len is not None and pad_to_multiple is not None:
            raise ValueError(f"{name}: Only one of max_seq_len and pad_to_multiple may be given")
        check_int(name, "droppable", droppable)
        if not -segments <= droppable < segments:
            raise refusal(name, "droppable", f"be one of {segments} segments", droppable)
        keep, tensor = None, None
        if keep_k is not None:
            keep, tensor = ints.keep_rows(name, keep_k, samples, segments)
        totals = list(map(sum, rows))
        self.segment_lengths, self.num_samples, self.num_segments = rows, samples, segments
        self.device = ints.device_of(keep_k, device)
        self.align_samples = _positive(name, "align_samples", align_samples, 1)
        self.sample_starts = starts = _starts(totals, self.align_samples)
        ints.check_total(name, "segment_lengths", starts[-1])
        self.total_len = starts[-1] if self.align_samples == 1 else sum(totals)
        self.padded_len = _padded_len(name, starts[-1], pad_to_multiple, max_seq_len)
        self._droppable, self._keep, self._keep_tensor = droppable % segments, keep, tensor
        self._offsets, self._kept_of_runs = self._runs(totals)
        self._cache: dict[str, Any] = {}

    def _runs(self, totals):
        """Segments and keep_k as the operators take them, runs of tokens kept from their front:
        offsets ``[N * runs + 1]`` and kept ``[N, runs]``, int64.

        A run is some tokens that always stay, then tokens of which keep_k stay. Segments that are
        never cut join the run of their neighbour, so patches + registers are one run, and their
        mask one interval per row. All of it is on the critical path of a small mask, hence the
        comprehensions.
        """
        rows, keep, tensor, d = self.segment_lengths, self._keep, self._keep_tensor, self._droppable
        if tensor is not None:
            per_segment = tensor.dim() == 2
        else:
            per_segment = keep is not None and isinstance(keep[0], (list, tuple))
        if keep is None and tensor is None:
            always, limits = totals, None
        elif per_segment:
            limits = [n for row in rows for n in row]
            always = [0] * len(limits)
            keep = None if keep is None else [k for row in keep for k in row]
        elif d + 1 == self.num_segments:
            limits = [row[-1] for row in rows]
            always = [total - n for total, n in zip(totals, limits, strict=True)]
        else:  # two runs, of which the second has nothing to cut
            always = [n for row in rows for n in (sum(row[:d]), sum(row[d + 1 :]))]
            limits = [n for row in rows for n in (row[d], 0)]
            keep = None if keep is None else [k for k in keep for _ in range(2)]
        runs = len(always) // self.num_samples
        offsets = self.sample_starts
        if runs > 1:
            # A gap before the next sample makes the last run longer; kept never reaches it.
            offsets, end = [], 0
            for i, (a, n) in enumerate(zip(always, limits, strict=True)):
                end = end if i % runs else self.sample_starts[i // runs]
                offsets.append(end)
                end += a + n
            offsets.append(end)
        offsets = ints.to_device(offsets, self.device)
        if tensor is not None:
            shape = 2, self.num_samples, runs
            always, limits = ints.to_device(always + limits, self.device).view(shape)
            keep_k = tensor.to(self.device, torch.int64, non_blocking=True)
            keep_k = keep_k if per_segment else keep_k.unsqueeze(1)
            return offsets, always + torch.minimum(keep_k.clamp_min(0), limits)
        if keep is not None:
            numbers = zip(always, keep, limits, strict=True)
            always = [a + (k if k < n else n) for a, k, n in numbers]
        return offsets, ints.to_device(always, self.device).view(self.num_samples, runs)

    def __repr__(self):
        kept = "on the device" if self.kept_lengths is None else sum(map(sum, self.kept_lengths))
        return (
            f"PackedLayout({self.num_samples} samples of {self.num_segments} segments, "
            f"{self.total_len} tokens in {self.padded_len}, kept: {kept})"
        )

    # --- masks -----------------------------------------------------------------------------------

    def intervals(
        self,
        mode: str = "full",
        window: ints.Window | None = None,
        prefix: int | ints.Lengths | None = None,
        sinks: int = 0,
        dropped: str = "none",
    ) -> RowIntervals:
        """The mask as ``RowIntervals``, to combine, look at, slice or make dense.

        With p the position in the sample, of visible q and k of one sample:

        - "full": every pair; "causal": ``p(k) <= p(q)``;
        - "prefix": ``p(k) < prefix`` or causal (a bidirectional prefix, then causal);
        - "causal_last": the same with all but the last segment as the prefix.

        Args:
            mode: as above.
            window: ``(left, right)``: only keys with ``p(q) - left <= p(k) <= p(q) + right``, and
                the prefix. An int n is ``(n, n)``; None in it is no limit.
            prefix: int, 0-d tensor or ``[N]``, of each sample; for mode "prefix" alone.
            sinks: the first so many positions of a sample are seen from outside the window too.
                Window, prefix and sinks may be longer than a sample: all of it.
            dropped: what a query that is dropped attends to: "none" (its output is exactly 0),
                "self" (itself alone), or "attend" (what it would see if it were visible).
        """
        relation = self._relation("intervals", mode, window, prefix, sinks, dropped)
        lo, hi = packed_rows(self._offsets, self._kept_of_runs, self.padded_len, *relation)
        if self._gap_rows_attend(dropped):
            real = self.sample_ids >= 0
            lo, hi = torch.where(real, lo, 0), torch.where(real, hi, 0)
        return RowIntervals._of(lo, hi, self.padded_len)

    def block_mask(
        self,
        mode: str = "full",
        window: ints.Window | None = None,
        prefix: int | ints.Lengths | None = None,
        sinks: int = 0,
        dropped: str = "none",
        *,
        block_size: int | tuple[int, int] = 128,
    ) -> BlockMask:
        """A BlockMask for ``flex_attention``, in O(S + blocks): arguments as in ``intervals``.

        Equal in every index to ``create_block_mask`` of the same mask. ``block_size`` is an int or
        (query block, key block). Rows and blocks come from one operator, so it can be built inside
        ``torch.compile(fullgraph=True)``.
        """
        block = ints.block_pair("PackedLayout.block_mask", block_size)
        if self._gap_rows_attend(dropped):
            return self.intervals(mode, window, prefix, sinks, dropped).block_mask(block_size)
        relation = self._relation("block_mask", mode, window, prefix, sinks, dropped)
        size = self.padded_len
        given = self._offsets, self._kept_of_runs, size, *relation, *block
        lo, hi, *lists = nested_dropout_plan(*given)
        return block_mask_of((size, size), lists, block, interval_mask_mod(lo, hi))

    def _relation(self, function, mode, window, prefix, sinks, dropped):
        """What the operators take from mode on."""
        name = f"PackedLayout.{function}"
        check_choice(name, "mode", mode, MODES)
        check_choice(name, "dropped", dropped, DROPPED)
        sinks = ints.reach(name, "sinks", sinks)
        if (prefix is not None) != (mode == "prefix"):
            wrong = "must be given for" if prefix is None else "is for"
            raise ValueError(f"{name}: prefix {wrong} mode 'prefix', got mode {mode!r}")
        left, right = ints.window_pair(name, window)
        if mode == "prefix":
            prefix = ints.per_sample(name, "prefix", prefix, self.num_samples, self.device)
        elif mode == "causal_last":  # the operator sees joined segments
            mode, prefix = "prefix", self._cached("before last", self._before_last)
        return mode, left, right, prefix, sinks, dropped

    def _before_last(self):
        """``[N]``: tokens of each sample before its last segment."""
        return ints.to_device([sum(row) - row[-1] for row in self.segment_lengths], self.device)

    def _gap_rows_attend(self, dropped):
        # To the operator a gap is a dropped end of the last segment.
        return dropped != "none" and self.sample_starts[-1] != self.total_len

    # --- tensors in and out of this order --------------------------------------------------------

    def compact(self, align: int | None = None, bucket: int | None = None) -> CompactPlan:
        """A plan that drops the tokens for good: see ``CompactPlan``. What it saves beside masking:
        ``python -m benchmarks compaction``.

        Args:
            align: each sample begins at a multiple of this.
            bucket: the length becomes a multiple of this, so that fewer lengths occur.
        """
        align = _positive("PackedLayout.compact", "align", align, None)
        bucket = _positive("PackedLayout.compact", "bucket", bucket, None)
        return CompactPlan(self, align, bucket)

    def pack(
        self,
        samples: Sequence[torch.Tensor | Sequence[torch.Tensor]],
        *,
        dim: int = -2,
        fill: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``[[patches, registers], ...]`` -> one sequence, zeros in the padding. Differentiable.

        Args:
            samples: per sample a list of G tensors ``[..., n, D]`` (or one tensor, for G = 1) whose
                lengths along ``dim`` are ``segment_lengths``.
            dim: that of the tokens.
            fill: number to put where tokens are dropped; None leaves them. NaN that is stored in a
                dropped key reaches every query (0 * NaN), so take 0 where NaN may be.

        Returns:
            ``[..., S, D]``, dtype and device of the first.
        """
        name = "PackedLayout.pack"
        samples = _tensors(name, "samples", samples)
        if len(samples) != self.num_samples:
            raise refusal(name, "samples", f"be a list of {self.num_samples} samples", len(samples))
        pieces, like, end = [], None, 0
        for i, (sample, row) in enumerate(zip(samples, self.segment_lengths, strict=True)):
            if isinstance(sample, torch.Tensor):
                sample = [sample]
            segments = _tensors(name, f"samples[{i}]", sample)
            if len(segments) != len(row):
                raise refusal(name, f"sample {i}", f"have {len(row)} segments", len(segments))
            for j, (tensor, n) in enumerate(zip(segments, row, strict=True)):
                check_tokens(name, f"samples[{i}][{j}]", tensor, dim, n)
                like = tensor if like is None else like
                _check_like(name, f"samples[{i}][{j}]", tensor, dim, like)
            pieces += [*_zeros(like, dim, self.sample_starts[i] - end), *segments]
            end = self.sample_starts[i] + sum(row)
        pieces += _zeros(like, dim, self.padded_len - end)
        packed = torch.cat([piece.to(like) for piece in pieces], dim)
        return packed if fill is None else self._fill_dropped(name, packed, dim, fill)

    def unpack(
        self, packed: torch.Tensor, *, dim: int = -2, fill: float | torch.Tensor | None = 0
    ) -> list[list[torch.Tensor]]:
        """One sequence ``[..., S, D]`` -> per sample a list of G tensors ``[..., n, D]``.

        Dropped tokens become ``fill`` (None leaves them): attention gives 0 there, but what follows
        it in a network does not.
        """
        name = "PackedLayout.unpack"
        check_tokens(name, "packed", packed, dim, self.padded_len)
        if fill is not None:
            packed = self._fill_dropped(name, packed, dim, fill)
        samples = []
        for row, start in zip(self.segment_lengths, self.sample_starts, strict=False):
            begins = accumulate(row[:-1], initial=start)
            samples.append([packed.narrow(dim, s, n) for s, n in zip(begins, row, strict=True)])
        return samples

    def _fill_dropped(self, name, packed, dim, fill):
        check_fill(name, fill)
        shape = [1] * packed.dim()
        shape[dim] = self.padded_len
        # Padding too: it holds no token of anybody.
        return torch.where(self.visible.view(shape), packed, fill)

    # --- what is known of samples and tokens -----------------------------------------------------

    @property
    def max_seqlen(self) -> int:
        return max(map(sum, self.segment_lengths))

    @property
    def kept_lengths(self) -> tuple[tuple[int, ...], ...] | None:
        if self._keep_tensor is not None:
            return None
        if self._keep is None:
            return self.segment_lengths
        kept, d = [], self._droppable
        for row, k in zip(self.segment_lengths, self._keep, strict=True):
            k = k if isinstance(k, (list, tuple)) else (*row[:d], k, *row[d + 1 :])
            kept.append(tuple(map(min, k, row)))
        return tuple(kept)

    @property
    def kept(self) -> torch.Tensor:
        return self._cached("kept", self._kept)

    @property
    def cu_seqlens(self) -> torch.Tensor:
        starts = self.sample_starts
        return self._cached("starts", lambda: ints.to_device(starts, self.device, torch.int32))

    @property
    def sample_ids(self) -> torch.Tensor:
        return self._cached("tokens", self._tokens)[0]

    @property
    def positions(self) -> torch.Tensor:
        return self._cached("tokens", self._tokens)[1]

    @property
    def segment_ids(self) -> torch.Tensor:
        return self._cached("tokens", self._tokens)[2]

    @property
    def visible(self) -> torch.Tensor:
        return self._cached("tokens", self._tokens)[3]

    def _cached(self, name, make):
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def _kept(self):
        known = self.kept_lengths
        rows = self.segment_lengths if known is None else known
        kept = ints.to_device([n for row in rows for n in row], self.device)
        kept = kept.view(self.num_samples, self.num_segments)
        if known is None:
            keep_k = self._keep_tensor.to(self.device, torch.int64).clamp_min(0)
            if keep_k.dim() == 2:
                return torch.minimum(kept, keep_k)
            kept[:, self._droppable] = torch.minimum(kept[:, self._droppable], keep_k)
        return kept

    def _tokens(self):
        """sample_ids, positions, segment_ids and visible, which come from the same work."""
        # Segments, and the gap after each sample: sample, segment, where both begin; and lengths.
        pieces, counts = [], []
        bounds = zip(self.sample_starts, (*self.sample_starts[1:-1], self.padded_len), strict=False)
        for i, (row, (start, stop)) in enumerate(zip(self.segment_lengths, bounds, strict=True)):
            *begins, end = accumulate(row, initial=start)
            for j, begin in enumerate(begins):
                pieces += (i, j, start, begin)
            pieces += (-1, -1, 0, end)
            counts += (*row, stop - end)
        pieces = ints.to_device(pieces, self.device, torch.int32).view(-1, 4)
        kept = torch.nn.functional.pad(self.kept.to(torch.int32), (0, 1)).flatten()
        sample, segment, start, begin = pieces.unbind(1)
        columns = sample, segment, start, begin + kept
        counts = ints.to_device(counts, self.device)
        piece = torch.arange(len(counts), device=self.device)
        piece = piece.repeat_interleave(counts, output_size=self.padded_len)
        sample, segment, start, end = (column.index_select(0, piece) for column in columns)
        token = torch.arange(self.padded_len, dtype=torch.int32, device=self.device)
        return sample, torch.where(segment < 0, 0, token - start), segment, token < end


def _positive(name, argument, value, default):
    return default if value is None else ints.length(name, argument, value, 1)


def _starts(totals, align):
    """Where each sample begins, and where the last one ends."""
    if align == 1:
        return tuple(accumulate(totals, initial=0))
    starts, end = [], 0
    for total in totals:
        start = -(-end // align) * align
        starts.append(start)
        end = start + total
    return (*starts, end)


def _padded_len(name, end, pad_to_multiple, max_seq_len):
    if max_seq_len is None:
        multiple = _positive(name, "pad_to_multiple", pad_to_multiple, 128)
        size = max(1, -(-end // multiple)) * multiple
        ints.check_total(name, "segment_lengths, padded,", size)
        return size
    max_seq_len = ints.length(name, "max_seq_len", max_seq_len)
    if max_seq_len < max(1, end):
        raise refusal(name, "max_seq_len", f"hold all {end} tokens", max_seq_len)
    return max_seq_len


def _tensors(name, argument, values):
    if isinstance(values, torch.Tensor) or not hasattr(values, "__iter__"):
        raise refusal(name, argument, "be a list", type(values).__name__, TypeError)
    return list(values)


def _check_like(name, argument, tensor, dim, like):
    expected = list(like.shape)
    if tensor.dim() == like.dim():
        expected[dim] = tensor.shape[dim]
    if list(tensor.shape) != expected:
        rule = f"have the shape of samples[0][0] {shape_text(like)} but in dimension {dim}"
        raise refusal(name, argument, rule, shape_text(tensor))


def _zeros(like, dim, count):
    """A list of ``count`` tokens of zeros in one tensor; of none where there are none."""
    shape = list(like.shape)
    shape[dim] = count
    return [like.new_zeros(shape)] if count > 0 else []
