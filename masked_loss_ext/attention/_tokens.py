# SPDX-License-Identifier: BSD-3-Clause
"""What a PackedLayout says about each token, and tensors in and out of its order."""

import numbers

import torch

from .._checks import check_int, check_tensor, shape_text
from . import _host
from ._cut import before_last


def kept_lengths(rows, keep, droppable):
    """Per sample and segment how many tokens stay, on the host."""
    if keep is None:
        return rows
    kept = []
    for row, k in zip(rows, keep, strict=True):
        if isinstance(k, (list, tuple)):
            kept.append(tuple([min(a, b) for a, b in zip(k, row, strict=True)]))
        else:
            kept.append((*row[:droppable], min(k, row[droppable]), *row[droppable + 1 :]))
    return tuple(kept)


def attributes(layout, name):
    """The named attribute of a layout, with those that come from the same work."""
    device = layout.device
    if name == "cu_seqlens":
        return {name: _host.to_device(list(layout.sample_starts), device, torch.int32)}
    if name == "_before_last":
        return {name: before_last(layout.segment_lengths, device)}
    if name == "kept":
        return {name: _kept(layout)}
    samples, groups = layout.num_samples, layout.num_segments
    # One more piece per sample: the gap before the next one.
    bounds = []
    for row, start in zip(layout.segment_lengths, layout.sample_starts, strict=False):
        for n in (*row, 0):
            bounds.append(start)
            start += n
    bounds.append(layout.sample_starts[-1])
    bounds = _host.to_device(bounds, device)
    token = torch.arange(layout.padded_len, device=device)
    piece = torch.searchsorted(bounds, token, right=True) - 1
    sample, segment = piece // (groups + 1), piece % (groups + 1)
    real = (segment < groups) & (sample < samples)
    sample_at = sample.clamp_max(samples - 1)
    position = token - bounds[sample_at * (groups + 1)]
    kept = layout.kept.flatten()[(sample_at * groups + segment).clamp_max(samples * groups - 1)]
    visible = real & (token - bounds[piece] < kept)
    return {
        "sample_ids": torch.where(real, sample, -1).to(torch.int32),
        "positions": torch.where(real, position, 0).to(torch.int32),
        "segment_ids": torch.where(real, segment, -1).to(torch.int32),
        "visible": visible,
    }


def _kept(layout):
    shape = layout.num_samples, layout.num_segments
    known = layout.kept_lengths
    rows = layout.segment_lengths if known is None else known
    kept = _host.to_device([n for row in rows for n in row], layout.device).view(shape)
    if known is None:
        keep_k = layout._keep_tensor.to(layout.device, torch.int64).clamp_min(0)
        if keep_k.dim() == 2:
            return torch.minimum(kept, keep_k)
        column = torch.minimum(kept[:, layout._droppable], keep_k)
        kept[:, layout._droppable] = column
    return kept


def check_tokens(function, name, x, dim, length):
    check_int(function, "dim", dim)
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != length:
        raise ValueError(
            f"{function}: {name} must have {length} tokens in dimension {dim}, got {shape_text(x)}"
        )


def check_fill(function, fill):
    is_number = isinstance(fill, (numbers.Number, torch.SymInt, torch.SymFloat))
    if not is_number and not (isinstance(fill, torch.Tensor) and fill.dim() == 0):
        raise TypeError(f"{function}: fill must be a number, got {type(fill).__name__}")


def pack(layout, samples, dim, fill):
    name = "PackedLayout.pack"
    samples = _listed(name, "samples", samples)
    if len(samples) != layout.num_samples:
        raise ValueError(
            f"{name}: samples must be a list of {layout.num_samples} samples, got {len(samples)}"
        )
    pieces, like, end = [], None, 0
    starts = layout.sample_starts
    for i, (sample, row) in enumerate(zip(samples, layout.segment_lengths, strict=True)):
        if isinstance(sample, torch.Tensor):
            sample = [sample]
        segments = _listed(name, f"samples[{i}]", sample)
        if len(segments) != len(row):
            raise ValueError(
                f"{name}: sample {i} must have {len(row)} segments, got {len(segments)}"
            )
        for j, (tensor, n) in enumerate(zip(segments, row, strict=True)):
            check_tensor(name, f"samples[{i}][{j}]", tensor)
            like = tensor if like is None else like
            check_tokens(name, f"samples[{i}][{j}]", tensor, dim, n)
            _check_like(name, f"samples[{i}][{j}]", tensor, dim, like)
        if starts[i] > end:
            pieces.append(_zeros(like, dim, starts[i] - end))
        pieces += segments
        end = starts[i] + sum(row)
    if layout.padded_len > end:
        pieces.append(_zeros(like, dim, layout.padded_len - end))
    packed = torch.cat([piece.to(like) for piece in pieces], dim)
    return packed if fill is None else _fill_dropped(name, layout, packed, dim, fill)


def _listed(name, argument, values):
    if isinstance(values, torch.Tensor) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: {argument} must be a list, got {type(values).__name__}")
    return list(values)


def _check_like(name, argument, tensor, dim, like):
    expected = list(like.shape)
    if tensor.dim() == like.dim():
        expected[dim] = tensor.shape[dim]
    if list(tensor.shape) != expected:
        raise ValueError(
            f"{name}: {argument} must have the shape of samples[0][0] {shape_text(like)} but in "
            f"dimension {dim}, got {shape_text(tensor)}"
        )


def unpack(layout, packed, dim, fill):
    name = "PackedLayout.unpack"
    check_tensor(name, "packed", packed)
    check_tokens(name, "packed", packed, dim, layout.padded_len)
    if fill is not None:
        packed = _fill_dropped(name, layout, packed, dim, fill)
    samples = []
    for row, start in zip(layout.segment_lengths, layout.sample_starts, strict=False):
        segments = []
        for n in row:
            segments.append(packed.narrow(dim, start, n))
            start += n
        samples.append(segments)
    return samples


def _zeros(like, dim, count):
    shape = list(like.shape)
    shape[dim] = count
    return like.new_zeros(shape)


def _fill_dropped(name, layout, packed, dim, fill):
    check_fill(name, fill)
    shape = [1] * packed.dim()
    shape[dim] = layout.padded_len
    # Padding too: it holds no token of anybody.
    return torch.where(layout.visible.view(shape), packed, fill)
