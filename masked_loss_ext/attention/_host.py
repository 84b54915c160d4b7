# SPDX-License-Identifier: BSD-3-Clause
"""Lengths and keep_k as Python numbers where they are on the host; nothing is read off a device."""

import torch

from .._checks import check_integers, shape_text

UNLIMITED = 2**31 - 1  # longer than any segment: positions are int32


def _is_number(value):
    return isinstance(value, int) or hasattr(value, "__index__")


def length_rows(function, name, lengths):
    """``[[n, m], ...]`` (or ``[n, ...]``) on the host -> tuple of tuples of one length."""
    if isinstance(lengths, torch.Tensor):
        check_integers(function, name, lengths)
        if lengths.device.type != "cpu":
            raise ValueError(
                f"{function}: {name} must be on the host, got {lengths.device}: the size of the "
                "result depends on them, and reading them would wait for the device"
            )
        lengths = lengths.tolist()
    if not isinstance(lengths, (list, tuple)):
        raise TypeError(
            f"{function}: {name} must be a list of lists of ints, got {type(lengths).__name__}"
        )
    if len(lengths) == 0:
        raise ValueError(f"{function}: {name} must hold at least one sample, got none")
    rows = tuple([(row,) if _is_number(row) else tuple(row) for row in lengths])
    groups = len(rows[0])
    for i, row in enumerate(rows):
        if len(row) != groups or groups == 0:
            raise ValueError(
                f"{function}: {name} must have as many segments (at least one) in each sample, got "
                f"{groups} in sample 0 and {len(row)} in sample {i}"
            )
        for n in row:
            if not _is_number(n):
                raise TypeError(f"{function}: {name} must hold ints, got {type(n).__name__}")
            if n < 0:
                raise ValueError(f"{function}: {name} must not be negative, got {n} in sample {i}")
    return rows


def is_readable(tensor):
    """Whether the values may be looked at: on the host, and not while tracing."""
    return (
        tensor.device.type == "cpu"
        and type(tensor) is torch.Tensor
        and not torch.compiler.is_compiling()
    )


def keep_rows(function, keep_k, samples, groups):
    """keep_k -> (host values or None, tensor or None), of shape ``[N]`` or ``[N, G]``, checked.

    Host values are a list (of lists); the tensor is given back where it must not be read.
    """
    if isinstance(keep_k, torch.Tensor):
        check_integers(function, "keep_k", keep_k)
        if keep_k.dim() not in (1, 2):
            raise ValueError(f"{function}: keep_k must be [N] or [N, G], got {shape_text(keep_k)}")
        _check_keep_shape(function, keep_k.shape, samples, groups)
        if not is_readable(keep_k):
            return None, keep_k
        keep_k = keep_k.tolist()
    elif not isinstance(keep_k, (list, tuple)):
        raise TypeError(
            f"{function}: keep_k must be a list of ints or a tensor, got {type(keep_k).__name__}"
        )
    _check_keep_shape(function, (len(keep_k),), samples, groups)
    for i, row in enumerate(keep_k):
        if isinstance(row, (list, tuple)):
            _check_keep_shape(function, (len(keep_k), len(row)), samples, groups)
        for k in row if isinstance(row, (list, tuple)) else (row,):
            if not _is_number(k):
                raise TypeError(f"{function}: keep_k must hold ints, got {type(k).__name__}")
            if k < 0:
                raise ValueError(f"{function}: keep_k must not be negative, got {k} for sample {i}")
    if len({isinstance(row, (list, tuple)) for row in keep_k}) > 1:
        raise ValueError(f"{function}: keep_k must be [N] or [N, G], got a mixture of both")
    return keep_k, None


def _check_keep_shape(function, shape, samples, groups):
    if shape[0] != samples:
        raise ValueError(
            f"{function}: keep_k must have one entry per sample ({samples}), got {shape[0]}"
        )
    if len(shape) == 2 and shape[1] != groups:
        raise ValueError(
            f"{function}: keep_k [N, G] must have one column per segment ({groups}), got {shape[1]}"
        )


def to_device(numbers, device, dtype=torch.int64):
    """A list of ints as a tensor, without waiting for a GPU: from pinned memory where it is one."""
    if device.type == "cuda" and not torch.compiler.is_compiling():
        return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(numbers, dtype=dtype, device=device)


def per_sample(function, name, values, samples, device):
    """One integer per sample, ``[N]`` int64 on device."""
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        if tuple(values.shape) != (samples,):
            raise ValueError(f"{function}: {name} must be [{samples}], got {shape_text(values)}")
        return values.to(device, torch.int64, non_blocking=True)
    values = [values] * samples if _is_number(values) else list(values)
    if len(values) != samples:
        raise ValueError(
            f"{function}: {name} must have one entry per sample ({samples}), got {len(values)}"
        )
    for value in values:
        if not _is_number(value) or value < 0:
            raise ValueError(f"{function}: {name} must hold ints of at least 0, got {value!r}")
    return to_device([int(v) for v in values], device)
