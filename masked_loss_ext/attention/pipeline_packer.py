# SPDX-License-Identifier: BSD-3-Clause
"""Samples of several sub-sequences -> one packed sequence with its attention mask."""

import torch

from .._checks import ArgumentError, check_flags, check_rank, check_tensor, shape_text
from ._entries import names, read_entry
from ._host import LONGEST, length, to_device
from .layout import PackedLayout
from .pipeline_dropout import check_keep_k, check_samples

MASK_MODES = ("full", "causal", "causal_last")
BLOCK = 128  # rows and columns of FlexAttention's blocks

_PACKER = "NestedDropoutSequencePacker"


class NestedDropoutSequencePacker(torch.nn.Module):
    r"""Packs the sub-sequences of all samples into one sequence, with the mask of who sees whom.

    >>> packer = NestedDropoutSequencePacker(
    ...     ["patches", "registers"], "packed", "mask", "inner", "outer", pad_to_multiple=128)
    >>> data_dict = packer({
    ...     "patches": [torch.randn(1, 8, 8, 16), torch.randn(1, 4, 6, 16)],
    ...     "registers": [torch.randn(1, 32, 16), torch.randn(1, 32, 16)],
    ...     "nested_dropout_keep_k": [4, 32],
    ... })
    >>> data_dict["packed"].shape, data_dict["outer"]  # 64 + 32, 24 + 32, padded to 256
    (torch.Size([1, 256, 16]), [torch.Size([96]), torch.Size([56])])
    >>> out = flex_attention(q, k, v, block_mask=data_dict["mask"])  # q, k, v [1, H, 256, D]

    A sample sees itself alone. Its last sub-sequence (the registers) is visible up to keep_k; what
    is not visible, padding included, has no row and no column in the mask, and is 0 in the packed
    sequence. Among visible tokens of a sample ``mask_mode`` decides:

    - "full": all see all;
    - "causal": a token sees itself and what comes before it;
    - "causal_last": the last sub-sequence is causal and sees all of the others; those see each
      other, in both directions, and nothing of the last.

    The mask is made from lengths and keep_k, in time and memory of the sequence and its blocks.
    Nothing waits for the device where keep_k is on it.

    Args:
        input_list_read_keys: the sub-sequences in their order, the last one droppable. Each key has
            a list of ``[1, ..., D]`` tensors, one per sample.
        packed_seq_write_key: ``[1, N, D]``, zero-padded on the right.
        block_mask_write_key: a BlockMask, or a bool mask ``[1, 1, N, N]``.
        inner_packed_shapes_write_key: per sample the spatial shapes of its sub-sequences.
        outer_packed_shapes_write_key: per sample ``torch.Size([tokens])``.
        keep_k_read_key: keep_k as ``AttentionMaskedNestedDropout`` writes it; where it is missing
            or None every token is visible. Larger than the registers keeps all.
        mask_mode: "full", "causal" or "causal_last".
        max_seq_len: N; the total may not be longer.
        pad_to_multiple: N is the next multiple of this number. Not both; with neither, N is the
            total. N must be a multiple of 128, see ``allow_ragged``.
        emb_packing_fn_write_key: where to write a function that spreads embeddings: from one per
            sample ``[samples, D]`` to one per token ``[1, total, D]``.
        per_subseq_embs: that function takes ``[samples, m * D]``, the i-th of m chunks for the
            i-th sub-sequence.
        compile_block_mask: accepted for configurations that name it; there is nothing to compile.
        return_materialized_mask: write the bool mask instead of the BlockMask.
        zero_masked: dropped registers are 0 in the packed sequence, so that a NaN in one cannot
            reach a live row (0 * NaN is NaN). The tensors in the dict are left alone.
        drop_masked: dropped registers are not packed at all, which saves their cost in every layer.
            N then depends on keep_k, which is read on the host. ``SequenceUnpacker`` puts zeros
            where they were.
        allow_ragged: N need not be a multiple of 128.
    """

    def __init__(
        self,
        input_list_read_keys,
        packed_seq_write_key,
        block_mask_write_key,
        inner_packed_shapes_write_key,
        outer_packed_shapes_write_key,
        keep_k_read_key="nested_dropout_keep_k",
        mask_mode="full",
        max_seq_len=None,
        pad_to_multiple=None,
        emb_packing_fn_write_key=None,
        per_subseq_embs=False,
        compile_block_mask=True,
        return_materialized_mask=False,
        *,
        zero_masked=True,
        drop_masked=False,
        allow_ragged=False,
    ):
        super().__init__()
        if mask_mode not in MASK_MODES:
            raise ValueError(
                f"{_PACKER}: Invalid mask mode: mask_mode must be {', '.join(MASK_MODES)}, got "
                f"{mask_mode!r}"
            )
        if max_seq_len is not None and pad_to_multiple is not None:
            raise ValueError(
                f"{_PACKER}: Only one of max_seq_len and pad_to_multiple may be given, got "
                f"{max_seq_len} and {pad_to_multiple}"
            )
        if max_seq_len is not None:
            max_seq_len = length(_PACKER, "max_seq_len", max_seq_len)
        if pad_to_multiple is not None:
            pad_to_multiple = length(_PACKER, "pad_to_multiple", pad_to_multiple, 1)
        check_flags(
            _PACKER,
            {
                "per_subseq_embs": per_subseq_embs,
                "return_materialized_mask": return_materialized_mask,
                "zero_masked": zero_masked,
                "drop_masked": drop_masked,
                "allow_ragged": allow_ragged,
            },
        )
        self.input_list_read_keys = names(_PACKER, "input_list_read_keys", input_list_read_keys)
        self.packed_seq_write_key = packed_seq_write_key
        self.block_mask_write_key = block_mask_write_key
        self.inner_packed_shapes_write_key = inner_packed_shapes_write_key
        self.outer_packed_shapes_write_key = outer_packed_shapes_write_key
        self.keep_k_read_key = keep_k_read_key
        self.mask_mode = mask_mode
        self.max_seq_len = max_seq_len
        self.pad_to_multiple = pad_to_multiple
        self.emb_packing_fn_write_key = emb_packing_fn_write_key
        self.per_subseq_embs = per_subseq_embs
        self.compile_block_mask = compile_block_mask
        self.return_materialized_mask = return_materialized_mask
        self.zero_masked = zero_masked
        self.drop_masked = drop_masked
        self.allow_ragged = allow_ragged

    def forward(self, data_dict):
        """``data_dict`` itself, with the packed sequence ``[1, N, D]``, its mask and shapes."""
        samples = self._samples(data_dict)
        keep_k = data_dict.get(self.keep_k_read_key)
        keep_k = check_keep_k(_PACKER, keep_k, len(samples), self.keep_k_read_key)
        inner = [[x.shape[1:-1] for x in parts] for parts in samples]
        samples = [[x.flatten(1, -2) for x in parts] for parts in samples]
        if self.drop_masked and keep_k is not None:
            for parts, k in zip(samples, keep_k, strict=False):
                parts[-1] = parts[-1][:, : int(k)]
            keep_k = None
        lengths = [[x.shape[1] for x in parts] for parts in samples]
        size = self._padded_length(sum(map(sum, lengths)))
        packed = torch.cat([x for parts in samples for x in parts], dim=1)
        layout = PackedLayout(
            lengths,
            keep_k=_complete(keep_k, lengths),
            pad_to_multiple=None,
            max_seq_len=size,
            device=packed.device,
        )
        packed = torch.nn.functional.pad(packed, (0, 0, 0, size - packed.shape[1]))
        if self.zero_masked and keep_k is not None:
            packed = torch.where(layout.visible.unsqueeze(-1), packed, 0)
        intervals = layout.intervals(mode=self.mask_mode)
        if self.return_materialized_mask:
            data_dict[self.block_mask_write_key] = intervals.dense().reshape(1, 1, size, size)
        else:
            data_dict[self.block_mask_write_key] = intervals.block_mask(block_size=BLOCK)
        data_dict[self.packed_seq_write_key] = packed
        data_dict[self.inner_packed_shapes_write_key] = inner
        data_dict[self.outer_packed_shapes_write_key] = [torch.Size([sum(n)]) for n in lengths]
        if self.emb_packing_fn_write_key is not None:
            data_dict[self.emb_packing_fn_write_key] = _EmbeddingPacking(
                lengths, self.per_subseq_embs
            )
        return data_dict

    def _samples(self, data_dict):
        """[samples] lists of the sub-sequences of one sample."""
        lists = [
            read_entry(_PACKER, "input_list_read_keys", data_dict, key)
            for key in self.input_list_read_keys
        ]
        for key, tensors in zip(self.input_list_read_keys, lists, strict=True):
            check_samples(_PACKER, key, tensors)
        counts = [len(tensors) for tensors in lists]
        if len(set(counts)) != 1:
            raise ValueError(
                f"{_PACKER}: all lists must have the same length, one entry per sample, got "
                f"{dict(zip(self.input_list_read_keys, counts, strict=True))}"
            )
        if not counts[0]:
            raise ValueError(f"{_PACKER}: the lists must hold at least one sample, got none")
        width = lists[0][0].shape[-1]
        for key, tensors in zip(self.input_list_read_keys, lists, strict=True):
            for i, tensor in enumerate(tensors):
                if tensor.shape[-1] != width:
                    raise ValueError(
                        f"{_PACKER}: {key}[{i}] must have D = {width} as the first tensor has, got "
                        f"{shape_text(tensor)}"
                    )
        return [list(parts) for parts in zip(*lists, strict=True)]

    def _padded_length(self, total):
        size = total
        if self.max_seq_len is not None:
            size = self.max_seq_len
        elif self.pad_to_multiple is not None:
            size = -(-total // self.pad_to_multiple) * self.pad_to_multiple
        if size < total:
            raise ArgumentError(f"{_PACKER}: max_seq_len must hold all {total} tokens, got {size}")
        if size > LONGEST:
            raise ArgumentError(
                f"{_PACKER}: the packed length must be at most {LONGEST}, got {size}"
            )
        if size % BLOCK and not self.allow_ragged:
            raise ArgumentError(
                f"{_PACKER}: the packed length must be a multiple of {BLOCK}, got {size} (give "
                f"pad_to_multiple={BLOCK}, or allow_ragged=True for kernels that take any length)"
            )
        return size

    def extra_repr(self):
        text = f"{self.input_list_read_keys}, mask_mode={self.mask_mode!r}"
        for name in ("max_seq_len", "pad_to_multiple"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text


def _complete(keep_k, lengths):
    """Samples beyond the end of keep_k keep all their tokens."""
    if keep_k is None or len(keep_k) == len(lengths):
        return keep_k
    rest = [parts[-1] for parts in lengths[len(keep_k) :]]
    if isinstance(keep_k, torch.Tensor):
        return torch.cat([keep_k.to(torch.int64), to_device(rest, keep_k.device)])
    return keep_k + rest


class _EmbeddingPacking:
    """Embeddings per sample -> per packed token; a class, so that a dict with it can be pickled."""

    def __init__(self, lengths, per_subsequence):
        self.lengths = lengths
        self.per_subsequence = per_subsequence

    def __call__(self, emb):
        check_tensor(_PACKER, "emb", emb)
        check_rank(_PACKER, "emb", emb, 2, "[samples, D]")
        if emb.shape[0] != len(self.lengths):
            raise ValueError(
                f"{_PACKER}: emb must have one row per sample, {len(self.lengths)}, got "
                f"{shape_text(emb)}"
            )
        rows, counts = emb, [sum(parts) for parts in self.lengths]
        if self.per_subsequence:
            m = len(self.lengths[0])
            if emb.shape[1] % m:
                raise ValueError(
                    f"{_PACKER}: emb must have {m} chunks of equal width, one per sub-sequence, "
                    f"got {shape_text(emb)}"
                )
            rows = emb.reshape(len(counts) * m, -1)
            counts = [n for parts in self.lengths for n in parts]
        rows = [row.expand(n, -1) for row, n in zip(rows, counts, strict=True)]
        return torch.cat(rows).unsqueeze(0)
