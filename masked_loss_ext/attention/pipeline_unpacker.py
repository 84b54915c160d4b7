# SPDX-License-Identifier: BSD-3-Clause
"""A packed sequence back into the sub-sequences of its samples."""

import math

import torch

from .._checks import ArgumentError, check_rank, check_tensor, shape_text
from ._entries import names, read_entry, shape_of, token_count
from .pipeline_dropout import check_keep_k

_UNPACKER = "SequenceUnpacker"


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
        packed_seq_read_key,
        inner_seq_write_keys,
        inner_packed_shapes_read_key,
        outer_packed_shapes_read_key,
        *,
        keep_k_read_key=None,
    ):
        super().__init__()
        self.packed_seq_read_key = packed_seq_read_key
        self.inner_seq_write_keys = names(_UNPACKER, "inner_seq_write_keys", inner_seq_write_keys)
        self.inner_packed_shapes_read_key = inner_packed_shapes_read_key
        self.outer_packed_shapes_read_key = outer_packed_shapes_read_key
        self.keep_k_read_key = keep_k_read_key

    def forward(self, data_dict):
        """``data_dict`` itself, with one list of ``[1, ..., D]`` tensors per sub-sequence."""
        packed, inner, outer = (
            read_entry(_UNPACKER, argument, data_dict, getattr(self, argument))
            for argument in (
                "packed_seq_read_key",
                "inner_packed_shapes_read_key",
                "outer_packed_shapes_read_key",
            )
        )
        inner = self._inner_shapes(inner)
        key = self.outer_packed_shapes_read_key
        outer = [
            token_count(_UNPACKER, f"{key}[{i}]", shape)
            for i, shape in enumerate(self._listed(key, outer))
        ]
        keep_k = check_keep_k(
            _UNPACKER, data_dict.get(self.keep_k_read_key), len(outer), self.keep_k_read_key
        )
        self._check(packed, inner, outer)
        lists = [[] for _ in self.inner_seq_write_keys]
        rows = packed.split([*outer, packed.shape[1] - sum(outer)], dim=1)[: len(outer)]
        for i, (sample, shapes) in enumerate(zip(rows, inner, strict=True)):
            k = keep_k[i] if keep_k is not None and i < len(keep_k) else None
            for parts, part in zip(lists, self._split(i, sample, shapes, k), strict=True):
                parts.append(part)
        for key, parts in zip(self.inner_seq_write_keys, lists, strict=True):
            data_dict[key] = parts
        return data_dict

    @staticmethod
    def _listed(key, shapes):
        if not isinstance(shapes, (list, tuple)):
            raise TypeError(
                f"{_UNPACKER}: {key} must be a list with an entry per sample, got "
                f"{type(shapes).__name__}"
            )
        return shapes

    def _inner_shapes(self, inner):
        key = self.inner_packed_shapes_read_key
        return [
            [
                shape_of(_UNPACKER, f"{key}[{i}][{j}]", shape)
                for j, shape in enumerate(self._listed(f"{key}[{i}]", shapes))
            ]
            for i, shapes in enumerate(self._listed(key, inner))
        ]

    def _split(self, i, sample, shapes, keep_k):
        counts = [math.prod(shape) for shape in shapes]
        missing = sum(counts) - sample.shape[1]
        if missing < 0 or missing > counts[-1]:
            raise ValueError(
                f"{_UNPACKER}: the inner shapes of sample {i} must hold its {sample.shape[1]} "
                f"tokens, got {counts}"
            )
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
            raise ArgumentError(
                f"{_UNPACKER}: {self.packed_seq_read_key} must have a batch dimension of 1, got "
                f"{shape_text(packed)}"
            )
        if sum(outer) > packed.shape[1]:
            raise ValueError(
                f"{_UNPACKER}: the packed sequence must hold all {sum(outer)} tokens of the outer "
                f"shapes, got {shape_text(packed)}"
            )
        if len(inner) != len(outer):
            raise ValueError(
                f"{_UNPACKER}: inner and outer shapes must have the same length, got {len(inner)} "
                f"and {len(outer)}"
            )
        for i, shapes in enumerate(inner):
            if len(shapes) != len(self.inner_seq_write_keys):
                raise ValueError(
                    f"{_UNPACKER}: sample {i} must have one shape per key, "
                    f"{len(self.inner_seq_write_keys)}, got {len(shapes)}"
                )

    def extra_repr(self):
        return f"{self.packed_seq_read_key!r} -> {self.inner_seq_write_keys}"
