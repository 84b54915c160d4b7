# SPDX-License-Identifier: BSD-3-Clause
"""Lengths and keep_k as Python numbers where they are on the host; nothing is read off a device."""

from array import array
from itertools import chain
from operator import index

import torch

from .._checks import check_integers, shape_text

_modes = torch._C._len_torch_dispatch_stack  # private; how many are active
_CODES = {torch.int32: "i", torch.int64: "q"}
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
    if type(lengths[0]) is int:
        rows = tuple([(row,) if _is_number(row) else tuple(row) for row in lengths])
    else:
        rows = tuple(map(tuple, lengths))
    # Each test runs in C for all rows; only a refusal is looked at one by one.
    if set(map(len, rows)) != {len(rows[0])} or not rows[0]:
        sizes = [len(row) for row in rows]
        raise ValueError(
            f"{function}: {name} must have as many segments (at least one) in each sample, got "
            f"{sizes[:16]}"
        )
    kinds = set(map(type, chain.from_iterable(rows)))
    if kinds != {int}:
        _refuse_kinds(function, name, kinds)
        rows = tuple([tuple(map(index, row)) for row in rows])
    if min(map(min, rows)) < 0:
        i = [min(row) < 0 for row in rows].index(True)
        raise ValueError(
            f"{function}: {name} must not be negative, got {min(rows[i])} in sample {i}"
        )
    return rows


def _refuse_kinds(function, name, kinds):
    for kind in kinds:
        if kind is bool or not hasattr(kind, "__index__"):
            raise TypeError(f"{function}: {name} must hold ints, got {kind.__name__}")


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
    return _checked_keep(function, keep_k, groups), None


def _checked_keep(function, keep_k, groups):
    kinds = set(map(type, keep_k))
    nested = bool(kinds & {list, tuple})
    if nested:
        if kinds - {list, tuple}:
            raise ValueError(f"{function}: keep_k must be [N] or [N, G], got a mixture of both")
        for row in keep_k:
            _check_keep_shape(function, (len(keep_k), len(row)), len(keep_k), groups)
        kinds = set(map(type, chain.from_iterable(keep_k)))
    if kinds != {int}:
        _refuse_kinds(function, "keep_k", kinds)
        keep_k = [tuple(map(index, k)) if nested else index(k) for k in keep_k]
    least = min(map(min, keep_k)) if nested else min(keep_k)
    if least < 0:
        i = [(min(k) if nested else k) < 0 for k in keep_k].index(True)
        raise ValueError(f"{function}: keep_k must not be negative, got {least} for sample {i}")
    return keep_k


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
    if device.type == "cpu" and numbers and not torch.compiler.is_compiling() and not _modes():
        # A third of the time of torch.tensor, which looks at each number; but no mode (fake
        # tensors, say) sees it.
        return torch.frombuffer(array(_CODES[dtype], numbers), dtype=dtype)
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
