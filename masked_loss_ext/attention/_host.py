# SPDX-License-Identifier: BSD-3-Clause
"""Lengths and keep_k as Python numbers where they are on the host; nothing is read off a device.

Lists, tuples, ranges, arrays of other libraries and tensors on the CPU are all lists of ints here.
"""

from array import array
from itertools import chain
from operator import index

import torch

from .._checks import check_int, check_integers, check_length, shape_text

_modes = torch._C._len_torch_dispatch_stack  # private; how many are active
_CODES = {torch.int32: "i", torch.int64: "q"}
LONGEST = 2**31 - 1  # positions are int32; kMaxLength of csrc/block_mask/call.h


def is_number(value):
    return isinstance(value, int) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def length(function, name, value, least=0, most=LONGEST):
    """A length, size or number of tokens, as an int."""
    check_length(function, name, value, least, most)
    return value if isinstance(value, int) else index(value)


def reach(function, name, value):
    """A number of tokens of which more than there are means all: windows, sinks, prefixes."""
    if type(value) is int and value == 0:
        return 0
    value = length(function, name, value, most=None)
    return value if torch.compiler.is_dynamo_compiling() else min(value, LONGEST)


def listed(function, name, values, what="a list of ints"):
    """A list or tuple of what is on the host in any form; not a str or a dict."""
    if isinstance(values, (list, tuple)):
        return values
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        if values.device.type != "cpu":
            raise ValueError(
                f"{function}: {name} must be on the host, got {values.device}: the size of the "
                "result depends on them, and reading them would wait for the device"
            )
        values = values.tolist()
    elif hasattr(values, "tolist"):
        values = values.tolist()
    elif hasattr(values, "__iter__") and not isinstance(values, (str, bytes, dict, set)):
        values = list(values)
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{function}: {name} must be {what}, got {type(values).__name__}")
    return values


def integers(function, name, values):
    """Integers of any form as a tensor: one is given back, the rest is made on the CPU to be read;
    what comes of it belongs on ``device_of`` the argument."""
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        return values
    values = listed(function, name, values, "a tensor or a list of ints")
    if values and isinstance(values[0], (list, tuple)):
        rows = length_rows(function, name, values, signed=True)
        return torch.tensor(rows, dtype=torch.int64, device="cpu")
    return torch.tensor(_ints(function, name, values), dtype=torch.int64, device="cpu")


def device_of(values, given=None):
    """``given``, else that of a tensor, else PyTorch's default."""
    if given is not None:
        return torch.device(given)
    # get_default_device takes eight times as long.
    return (values if isinstance(values, torch.Tensor) else torch.empty(0)).device


def _ints(function, name, values):
    kinds = set(map(type, values))
    if not kinds <= {int}:
        _refuse_kinds(function, name, kinds)
        values = list(map(index, values))
    _refuse_large(function, name, values)
    return values


def _refuse_large(function, name, values):
    if not values or torch.compiler.is_dynamo_compiling():
        return
    for value in (min(values), max(values)):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"{function}: {name} must fit int64, got {value}")


def lengths(function, name, values):
    """``[N]`` lengths on the host as a list."""
    rows = length_rows(function, name, values)
    if len(rows[0]) != 1:
        raise ValueError(
            f"{function}: {name} must be [N], one length per sample, got {len(rows[0])} each"
        )
    return [row[0] for row in rows]


def length_rows(function, name, lengths, signed=False):
    """``[[n, m], ...]`` (or ``[n, ...]``) on the host -> tuple of tuples of one length."""
    lengths = listed(function, name, lengths, "a list of lists of ints")
    if len(lengths) == 0:
        raise ValueError(f"{function}: {name} must hold at least one sample, got none")
    if type(lengths[0]) is int:
        rows = tuple([(n,) if type(n) is int else _row(function, name, n) for n in lengths])
    elif type(lengths[0]) in (list, tuple) and set(map(type, lengths)) <= {list, tuple}:
        rows = tuple(map(tuple, lengths))
    else:
        rows = tuple([_row(function, name, row) for row in lengths])
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
    if not signed and min(map(min, rows)) < 0:
        i = [min(row) < 0 for row in rows].index(True)
        raise ValueError(
            f"{function}: {name} must not be negative, got {min(rows[i])} in sample {i}"
        )
    return rows


def _row(function, name, row):
    return (row,) if is_number(row) else tuple(listed(function, f"a sample of {name}", row))


def check_total(function, name, total):
    """Positions are int32 in all results."""
    if not torch.compiler.is_dynamo_compiling() and total > LONGEST:
        raise ValueError(f"{function}: {name} must hold at most {LONGEST} tokens, got {total}")


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


def refuse_negative(function, name, tensor):
    """For tensors that are on the CPU; on a device negative entries count as 0."""
    if is_readable(tensor) and tensor.numel() and tensor.min() < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {int(tensor.min())}")


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
    keep_k = listed(function, "keep_k", keep_k, "a list of ints or a tensor")
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
    """One integer per sample, ``[N]`` int64 on device; one number is that of all."""
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        if values.dim() == 0:
            values = values.expand(samples)
        if tuple(values.shape) != (samples,):
            raise ValueError(f"{function}: {name} must be [{samples}], got {shape_text(values)}")
        refuse_negative(function, name, values)
        return values.to(device, torch.int64, non_blocking=True)
    if is_number(values):
        values = [values] * samples
    values = listed(function, name, values, "an int, a list of ints or a tensor")
    if len(values) != samples:
        raise ValueError(
            f"{function}: {name} must have one entry per sample ({samples}), got {len(values)}"
        )
    for value in values:
        if not is_number(value) or isinstance(value, bool) or value < 0:
            raise ValueError(f"{function}: {name} must hold ints of at least 0, got {value!r}")
    return to_device([min(index(v), LONGEST) for v in values], device)


def per_batch(function, name, value, device):
    """One integer for all, an int or a 0-d tensor; or one per batch row, ``[B, 1, 1]`` int64.

    The second result is the device: that of a tensor, unless told.
    """
    if is_number(value) and not isinstance(value, torch.Tensor):
        check_int(function, name, value)
        return (value if isinstance(value, int) else index(value)), device
    device = device_of(value, device)
    value = integers(function, name, value)
    if value.dim() > 1:
        raise ValueError(f"{function}: {name} must be an int or [B], got {shape_text(value)}")
    # Beyond what positions may be, so that no sum with one can overflow.
    value = value.to(device, torch.int64).clamp(-LONGEST, LONGEST)
    return value if value.dim() == 0 else value.view(-1, 1, 1), device
