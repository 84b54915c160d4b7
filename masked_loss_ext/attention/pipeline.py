# SPDX-License-Identifier: BSD-3-Clause
"""Modules for pipelines that hand a dict from one to the next: draw keep_k, pack, attend, unpack.

keep_k is a list with one int per sample, or a 1-D integer tensor that may stay on its device.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .._checks import (
    ArgumentError,
    check_choice,
    check_flags,
    check_rank,
    check_tensor,
    refusal,
    shape_text,
)
from . import ints
from .layout import PackedLayout
from .mask_ids import generate_nested_dropout_attention_mask, generate_nested_dropout_mask_ids
from .nested_dropout import SAMPLING, draw_keep_k

__all__ = [
    "AttentionMaskedNestedDropout",
    "MaskedNestedDropout",
    "NestedDropoutSequencePacker",
    "SequenceUnpacker",
    "generate_nested_dropout_attention_mask",
    "generate_nested_dropout_mask_ids",
]

MASK_MODES = ("full", "causal", "causal_last")
BLOCK = 128  # rows and columns of FlexAttention's blocks
_PACKER, _UNPACKER = "NestedDropoutSequencePacker", "SequenceUnpacker"
Entries = dict[Any, Any]


# --- draw ----------------------------------------------------------------------------------------


class _NestedDropout(torch.nn.Module):
    """What both modules share: keys, draws, and keep_k given for evaluation."""

    def __init__(self, read_key, eval_key, train_key, mode, generator):
        super().__init__()
        name = type(self).__name__
        check_choice(name, "size_sampling_mode", mode, SAMPLING)
        kinds = generator is None or isinstance(generator, torch.Generator) or generator == "numpy"
        if not kinds and not hasattr(generator, "integers") and not hasattr(generator, "randint"):
            rule = "be a torch.Generator, a numpy generator or 'numpy'"
            raise refusal(name, "generator", rule, f"{generator!r}", TypeError)
        self.read_key = self.read_write_key = read_key
        self.eval_keep_k_read_key = eval_key
        self.train_keep_k_write_key = train_key
        self.size_sampling_mode = mode
        self.generator = generator

    def sample_keep_k(self, n: int) -> int:
        """How many of ``n`` registers one sample keeps: an int in 1 ... n (0 of 0)."""
        n = ints.length(f"{type(self).__name__}.sample_keep_k", "n", n)
        mode = self.size_sampling_mode
        if n == 0:
            return 0
        if mode == "pow2" and n & (n - 1):
            raise ArgumentError(
                f"size_sampling_mode 'pow2': the number of tokens must be a power of two, got {n}"
            )
        return draw_keep_k(n, mode, self._below, lambda m: (m - 1).bit_length(), min)

    def _below(self, n):
        """One int, uniform on 0 ... n - 1."""
        generator = self.generator
        if generator is None:
            return int(torch.randint(n, (), device="cpu"))  # whatever the default device
        if isinstance(generator, torch.Generator):
            return int(torch.randint(n, (), generator=generator, device=generator.device))
        if isinstance(generator, str):  # "numpy": its global state, which older training runs seed
            from numpy import random as generator
        draw = getattr(generator, "integers", None) or generator.randint
        return int(draw(n))

    def _keep_k(self, data_dict):
        """Drawn in training, read in evaluation; None where evaluation drops nothing."""
        name, key = type(self).__name__, self.eval_keep_k_read_key
        _check_dict(name, data_dict)
        if not self.training and (key is None or data_dict.get(key) is None):
            return None
        registers = _read_entry(name, "read_key", data_dict, self.read_key)
        _check_samples(name, self.read_key, registers)
        if not self.training:
            return ints.keep_of_some(name, key, data_dict[key], len(registers))
        keep_k = [self.sample_keep_k(tokens.shape[1]) for tokens in registers]
        if self.train_keep_k_write_key is not None:
            data_dict[self.train_keep_k_write_key] = keep_k
        return keep_k

    def extra_repr(self) -> str:
        return f"{self.read_key!r}, size_sampling_mode={self.size_sampling_mode!r}"


class AttentionMaskedNestedDropout(_NestedDropout):
    r"""Draws how many registers each sample keeps, and leaves the tokens alone.

    ``NestedDropoutSequencePacker`` makes the attention mask of it: registers from keep_k on
    neither attend nor are attended to. No parameters.

    >>> dropout = AttentionMaskedNestedDropout("registers", size_sampling_mode="uniform_pow2")
    >>> data_dict = dropout({"registers": [torch.randn(1, 256, 8), torch.randn(1, 100, 8)]})
    >>> first, second = data_dict["nested_dropout_keep_k"]
    >>> assert first in (1, 2, 4, 8, 16, 32, 64, 128, 256) and 1 <= second <= 100
    >>> _ = dropout.eval()(data_dict | {"eval_keep_k": [16, 4]})

    With N registers keep_k is drawn once per sample: "uniform" on 1 ... N, so that register j
    survives with probability (N - j) / N; "pow2" uniform on 1, 2, 4 ... N, for N a power of two;
    "uniform_pow2" uniform on 1 ... N and rounded up to a power of two, at most N. 0 is never drawn.

    In evaluation keep_k is what stands under ``eval_keep_k_read_key``: an int for all samples, a
    list or a 1-D tensor with one entry per sample. Where that key is None or missing, nothing is
    dropped, and a keep_k that training left in a dict used again is removed.

    Args:
        read_key: a list of register tokens ``[1, n_i, D]``, one tensor per sample.
        keep_k_write_key: where keep_k is written.
        eval_keep_k_read_key: where evaluation reads it; None drops nothing in evaluation.
        train_keep_k_write_key: where training writes the same list once more; None does not.
        size_sampling_mode: "uniform", "pow2" or "uniform_pow2".
        block_mask_write_key: accepted and stored for configurations that name it; the mask needs
            the whole sequence, so the packer writes it.
        generator: what draws. None is PyTorch's CPU generator; or a torch.Generator, a numpy
            Generator or RandomState, or "numpy" for numpy's global state.
        read_write_key: another name for ``read_key``.
    """

    def __init__(
        self,
        read_key: str | None = None,
        keep_k_write_key: str = "nested_dropout_keep_k",
        eval_keep_k_read_key: str | None = "eval_keep_k",
        train_keep_k_write_key: str | None = "train_keep_k",
        size_sampling_mode: str = "uniform",
        block_mask_write_key: str = "nested_dropout_block_mask",
        *,
        generator: Any = None,
        read_write_key: str | None = None,
    ) -> None:
        if (read_key is None) == (read_write_key is None):
            rule = "be given, or read_write_key in its place"
            got = f"read_key={read_key!r}, read_write_key={read_write_key!r}"
            raise refusal("AttentionMaskedNestedDropout", "read_key", rule, got, TypeError)
        keys = read_write_key if read_key is None else read_key, eval_keep_k_read_key
        super().__init__(*keys, train_keep_k_write_key, size_sampling_mode, generator)
        self.keep_k_write_key = keep_k_write_key
        self.block_mask_write_key = block_mask_write_key

    def forward(self, data_dict: Entries) -> Entries:
        """``data_dict`` itself, with keep_k in it: ``[samples]`` ints."""
        keep_k = self._keep_k(data_dict)
        if keep_k is None:
            data_dict.pop(self.keep_k_write_key, None)
        else:
            data_dict[self.keep_k_write_key] = keep_k
        return data_dict


class MaskedNestedDropout(_NestedDropout):
    r"""Overwrites the registers from keep_k on with one learned token; for comparison.

    Every token still takes part in attention, at its full cost. In place: the tensors in the dict
    must not be leaves that require a gradient.

    >>> dropout = MaskedNestedDropout("registers", 8).eval()
    >>> data_dict = dropout({"registers": [torch.zeros(1, 4, 8)], "eval_keep_k": [3]})
    >>> assert torch.equal(data_dict["registers"][0][0, 3], dropout.dropout_mask_token)

    Draws, and keep_k in evaluation, as in ``AttentionMaskedNestedDropout``.

    Args:
        read_write_key: a list of register tokens ``[1, n_i, D]``, one tensor per sample.
        dim: D.
        eval_keep_k_read_key: as ``AttentionMaskedNestedDropout`` has it, with
            train_keep_k_write_key, size_sampling_mode and generator.
    """

    def __init__(
        self,
        read_write_key: str,
        dim: int,
        eval_keep_k_read_key: str | None = "eval_keep_k",
        train_keep_k_write_key: str | None = "train_keep_k",
        size_sampling_mode: str = "uniform",
        *,
        generator: Any = None,
    ) -> None:
        keys = read_write_key, eval_keep_k_read_key, train_keep_k_write_key
        super().__init__(*keys, size_sampling_mode, generator)
        self.dim = dim = ints.length("MaskedNestedDropout", "dim", dim, 1)
        self.dropout_mask_token = torch.nn.Parameter(torch.empty(dim))
        torch.nn.init.trunc_normal_(self.dropout_mask_token, std=0.02)

    def forward(self, data_dict: Entries) -> Entries:
        """``data_dict`` itself; its tokens ``[1, n_i, D]`` are overwritten from keep_k on."""
        keep_k = self._keep_k(data_dict)
        if keep_k is None:
            return data_dict
        # Fewer entries than samples: the rest keeps all.
        for i, (tokens, k) in enumerate(zip(data_dict[self.read_key], keep_k, strict=False)):
            if tokens.shape[-1] != self.dim or not tokens.is_floating_point():
                rule = f"be a floating tensor [1, n, {self.dim}]"
                got = f"{tokens.dtype} {shape_text(tokens)}"
                raise refusal("MaskedNestedDropout", f"{self.read_key}[{i}]", rule, got)
            tokens[:, int(k) :] = self.dropout_mask_token.to(tokens.dtype)
        return data_dict


# --- pack ----------------------------------------------------------------------------------------


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
        input_list_read_keys: Sequence[str],
        packed_seq_write_key: str,
        block_mask_write_key: str,
        inner_packed_shapes_write_key: str,
        outer_packed_shapes_write_key: str,
        keep_k_read_key: str = "nested_dropout_keep_k",
        mask_mode: str = "full",
        max_seq_len: int | None = None,
        pad_to_multiple: int | None = None,
        emb_packing_fn_write_key: str | None = None,
        per_subseq_embs: bool = False,
        compile_block_mask: bool = True,
        return_materialized_mask: bool = False,
        *,
        zero_masked: bool = True,
        drop_masked: bool = False,
        allow_ragged: bool = False,
    ) -> None:
        super().__init__()
        if mask_mode not in MASK_MODES:
            rule = f"be {', '.join(MASK_MODES)}"
            raise refusal(_PACKER, "Invalid mask mode: mask_mode", rule, repr(mask_mode))
        if max_seq_len is not None and pad_to_multiple is not None:
            raise ValueError(
                f"{_PACKER}: Only one of max_seq_len and pad_to_multiple may be given, got "
                f"{max_seq_len} and {pad_to_multiple}"
            )
        if max_seq_len is not None:
            max_seq_len = ints.length(_PACKER, "max_seq_len", max_seq_len)
        if pad_to_multiple is not None:
            pad_to_multiple = ints.length(_PACKER, "pad_to_multiple", pad_to_multiple, 1)
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
        self.input_list_read_keys = _keys(_PACKER, "input_list_read_keys", input_list_read_keys)
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

    def forward(self, data_dict: Entries) -> Entries:
        """``data_dict`` itself, with the packed sequence ``[1, N, D]``, its mask and shapes."""
        samples = self._samples(data_dict)
        key = self.keep_k_read_key
        keep_k = ints.keep_of_all(_PACKER, key, data_dict.get(key), len(samples))
        inner = [[x.shape[1:-1] for x in parts] for parts in samples]
        samples = [[x.flatten(1, -2) for x in parts] for parts in samples]
        if self.drop_masked and keep_k is not None:
            for parts, k in zip(samples, keep_k, strict=True):
                parts[-1] = parts[-1][:, : int(k)]
            keep_k = None
        lengths = [[x.shape[1] for x in parts] for parts in samples]
        size = self._padded_length(sum(map(sum, lengths)))
        packed = torch.cat([x for parts in samples for x in parts], dim=1)
        layout = PackedLayout(lengths, keep_k, max_seq_len=size, device=packed.device)
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
            _read_entry(_PACKER, "input_list_read_keys", data_dict, key)
            for key in self.input_list_read_keys
        ]
        for key, tensors in zip(self.input_list_read_keys, lists, strict=True):
            _check_samples(_PACKER, key, tensors)
        counts = [len(tensors) for tensors in lists]
        if len(set(counts)) != 1:
            got = dict(zip(self.input_list_read_keys, counts, strict=True))
            raise refusal(_PACKER, "all lists", "have the same length, one entry per sample", got)
        if not counts[0]:
            raise refusal(_PACKER, "the lists", "hold at least one sample", "none")
        width = lists[0][0].shape[-1]
        for key, tensors in zip(self.input_list_read_keys, lists, strict=True):
            for i, tensor in enumerate(tensors):
                if tensor.shape[-1] != width:
                    rule = f"have D = {width} as the first tensor has"
                    raise refusal(_PACKER, f"{key}[{i}]", rule, shape_text(tensor))
        return [list(parts) for parts in zip(*lists, strict=True)]

    def _padded_length(self, total):
        size = total
        if self.max_seq_len is not None:
            size = self.max_seq_len
        elif self.pad_to_multiple is not None:
            size = -(-total // self.pad_to_multiple) * self.pad_to_multiple
        if size < total:
            raise refusal(_PACKER, "max_seq_len", f"hold all {total} tokens", size, ArgumentError)
        if size > ints.LONGEST:
            raise refusal(
                _PACKER, "the packed length", f"be at most {ints.LONGEST}", size, ArgumentError
            )
        if size % BLOCK and not self.allow_ragged:
            raise ArgumentError(
                f"{_PACKER}: the packed length must be a multiple of {BLOCK}, got {size} (give "
                f"pad_to_multiple={BLOCK}, or allow_ragged=True for kernels that take any length)"
            )
        return size

    def extra_repr(self) -> str:
        text = f"{self.input_list_read_keys}, mask_mode={self.mask_mode!r}"
        for name in ("max_seq_len", "pad_to_multiple"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)}"
        return text


class _EmbeddingPacking:
    """Embeddings per sample -> per packed token; a class, so that a dict with it can be pickled."""

    def __init__(self, lengths, per_subsequence):
        self.lengths = lengths
        self.per_subsequence = per_subsequence

    def __call__(self, emb):
        check_tensor(_PACKER, "emb", emb)
        check_rank(_PACKER, "emb", emb, 2, "[samples, D]")
        if emb.shape[0] != len(self.lengths):
            raise refusal(
                _PACKER, "emb", f"have one row per sample, {len(self.lengths)}", shape_text(emb)
            )
        rows, counts = emb, [sum(parts) for parts in self.lengths]
        if self.per_subsequence:
            m = len(self.lengths[0])
            if emb.shape[1] % m:
                rule = f"have {m} chunks of equal width, one per sub-sequence"
                raise refusal(_PACKER, "emb", rule, shape_text(emb))
            rows = emb.reshape(len(counts) * m, -1)
            counts = [n for parts in self.lengths for n in parts]
        rows = [row.expand(n, -1) for row, n in zip(rows, counts, strict=True)]
        return torch.cat(rows).unsqueeze(0)


# --- unpack --------------------------------------------------------------------------------------


class SequenceUnpacker(torch.nn.Module):
    r"""A packed sequence back into the sub-sequences of its samples, in their spatial shapes.

    >>> unpacker = SequenceUnpacker("packed", ["patches", "registers"], "inner", "outer")
    >>> data_dict = unpacker({
    ...     "packed": torch.randn(1, 128, 16),
    ...     "inner": [[torch.Size([8, 8]), torch.Size([32])]],
    ...     "outer": [torch.Size([96])],
    ... })
    >>> data_dict["patches"][0].shape, data_dict["registers"][0].shape
    (torch.Size([1, 8, 8, 16]), torch.Size([1, 32, 16]))

    Padding on the right is dropped. A sample with fewer tokens than its inner shapes was packed
    with ``drop_masked``: the end of its last sub-sequence is filled with zeros.

    Attention gives 0 to dropped registers, but residual connections and MLPs still put something
    there: name ``keep_k_read_key`` to have zeros there as well, with gradient 0.

    Args:
        packed_seq_read_key: ``[1, N, D]``.
        inner_seq_write_keys: one key per sub-sequence, for lists of ``[1, ..., D]`` tensors.
        inner_packed_shapes_read_key: per sample the spatial shapes of its sub-sequences.
        outer_packed_shapes_read_key: per sample ``torch.Size([tokens])``.
        keep_k_read_key: keep_k, for the last sub-sequence. None, or no such entry: all is kept.
    """

    def __init__(
        self,
        packed_seq_read_key: str,
        inner_seq_write_keys: Sequence[str],
        inner_packed_shapes_read_key: str,
        outer_packed_shapes_read_key: str,
        *,
        keep_k_read_key: str | None = None,
    ) -> None:
        super().__init__()
        self.packed_seq_read_key = packed_seq_read_key
        self.inner_seq_write_keys = _keys(_UNPACKER, "inner_seq_write_keys", inner_seq_write_keys)
        self.inner_packed_shapes_read_key = inner_packed_shapes_read_key
        self.outer_packed_shapes_read_key = outer_packed_shapes_read_key
        self.keep_k_read_key = keep_k_read_key

    def forward(self, data_dict: Entries) -> Entries:
        """``data_dict`` itself, with one list of ``[1, ..., D]`` tensors per sub-sequence."""
        packed, inner, outer = (
            _read_entry(_UNPACKER, argument, data_dict, getattr(self, argument))
            for argument in (
                "packed_seq_read_key",
                "inner_packed_shapes_read_key",
                "outer_packed_shapes_read_key",
            )
        )
        inner = self._inner_shapes(inner)
        outer_key = self.outer_packed_shapes_read_key
        outer = [
            ints.token_count(_UNPACKER, f"{outer_key}[{i}]", shape)
            for i, shape in enumerate(self._listed(outer_key, outer))
        ]
        key = self.keep_k_read_key
        keep_k = ints.keep_of_all(_UNPACKER, key, data_dict.get(key), len(outer))
        self._check(packed, inner, outer)
        lists: list[list[torch.Tensor]] = [[] for _ in self.inner_seq_write_keys]
        rows = packed.split([*outer, packed.shape[1] - sum(outer)], dim=1)[: len(outer)]
        for i, (sample, shapes) in enumerate(zip(rows, inner, strict=True)):
            k = None if keep_k is None else keep_k[i]
            for parts, part in zip(lists, self._split(i, sample, shapes, k), strict=True):
                parts.append(part)
        for key, parts in zip(self.inner_seq_write_keys, lists, strict=True):
            data_dict[key] = parts
        return data_dict

    @staticmethod
    def _listed(key, shapes):
        if not isinstance(shapes, (list, tuple)):
            rule = "be a list with an entry per sample"
            raise refusal(_UNPACKER, key, rule, type(shapes).__name__, TypeError)
        return shapes

    def _inner_shapes(self, inner):
        key = self.inner_packed_shapes_read_key
        return [
            [
                ints.shape_of(_UNPACKER, f"{key}[{i}][{j}]", shape)
                for j, shape in enumerate(self._listed(f"{key}[{i}]", shapes))
            ]
            for i, shapes in enumerate(self._listed(key, inner))
        ]

    def _split(self, i, sample, shapes, keep_k):
        counts = [math.prod(shape) for shape in shapes]
        missing = sum(counts) - sample.shape[1]
        if missing < 0 or missing > counts[-1]:
            rule = f"hold its {sample.shape[1]} tokens"
            raise refusal(_UNPACKER, f"the inner shapes of sample {i}", rule, counts)
        parts = list(sample.split([*counts[:-1], counts[-1] - missing], dim=1))
        parts[-1] = torch.nn.functional.pad(parts[-1], (0, 0, 0, missing))
        if keep_k is not None:
            kept = torch.arange(counts[-1], device=sample.device) < keep_k
            parts[-1] = torch.where(kept.unsqueeze(-1), parts[-1], 0)
        return [x.unflatten(1, shape) for x, shape in zip(parts, shapes, strict=True)]

    def _check(self, packed, inner, outer):
        check_tensor(_UNPACKER, self.packed_seq_read_key, packed)
        check_rank(_UNPACKER, self.packed_seq_read_key, packed, 3, "[1, N, D]")
        if packed.shape[0] != 1:
            rule = "have a batch dimension of 1"
            raise refusal(
                _UNPACKER, self.packed_seq_read_key, rule, shape_text(packed), ArgumentError
            )
        if sum(outer) > packed.shape[1]:
            rule = f"hold all {sum(outer)} tokens of the outer shapes"
            raise refusal(_UNPACKER, "the packed sequence", rule, shape_text(packed))
        if len(inner) != len(outer):
            rule = "have the same length"
            raise refusal(
                _UNPACKER, "inner and outer shapes", rule, f"{len(inner)} and {len(outer)}"
            )
        for i, shapes in enumerate(inner):
            if len(shapes) != len(self.inner_seq_write_keys):
                rule = f"have one shape per key, {len(self.inner_seq_write_keys)}"
                raise refusal(_UNPACKER, f"sample {i}", rule, len(shapes))

    def extra_repr(self) -> str:
        return f"{self.packed_seq_read_key!r} -> {self.inner_seq_write_keys}"


# --- what the dict holds -------------------------------------------------------------------------


class MissingEntry(KeyError):
    """A KeyError whose text is a sentence: KeyError itself would show it in quotes."""

    def __str__(self):
        return self.args[0]


def _check_dict(function, data_dict):
    if not hasattr(data_dict, "keys") or not hasattr(data_dict, "__setitem__"):
        raise refusal(function, "data_dict", "be a dict", type(data_dict).__name__, TypeError)


def _read_entry(function, argument, data_dict, key):
    """``data_dict[key]``; ``argument`` is what the module calls the key."""
    _check_dict(function, data_dict)
    if key not in data_dict:
        held = ", ".join([repr(k) for k in data_dict.keys()]) or "nothing"
        raise MissingEntry(
            f"{function}: data_dict must hold {key!r} ({argument}), but it holds {held}"
        )
    return data_dict[key]


def _keys(function, argument, values):
    """A list of keys; a str would be one key per letter."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise refusal(function, argument, "be a list of keys", type(values).__name__, TypeError)
    values = list(values)
    if not values:
        raise ValueError(f"{function}: {argument} must hold at least one key")
    return values


def _check_samples(function, name, tensors):
    """A list of [1, ..., D] tensors, one per sample."""
    if not isinstance(tensors, (list, tuple)):
        rule = "be a list of tensors, one per sample"
        raise refusal(function, name, rule, type(tensors).__name__, TypeError)
    for i, tensor in enumerate(tensors):
        check_tensor(function, f"{name}[{i}]", tensor)
        if tensor.dim() < 3 or tensor.shape[0] != 1:
            rule = "be [1, ..., D] with a batch dimension of 1"
            raise refusal(function, f"{name}[{i}]", rule, shape_text(tensor), ArgumentError)
