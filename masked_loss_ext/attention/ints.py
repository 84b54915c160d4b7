# SPDX-License-Identifier: BSD-3-Clause
"""Lengths, positions and keep_k in the forms that users have them; nothing is read off a device.

Lists, tuples, ranges, arrays of other libraries and tensors on the CPU are all lists of ints here.
"""

from array import array
from collections.abc import Iterable
from itertools import chain
from math import prod
from operator import index

import torch

from .._checks import check_int, check_integers, check_length, refusal, shape_text

Device = torch.device | str | None
Window = int | tuple[int | None, int | None]
Lengths = Iterable[int] | Iterable[Iterable[int]] | torch.Tensor

_modes = torch._C._len_torch_dispatch_stack  # private; how many are active
_is_tracing = torch.compiler.is_dynamo_compiling
_CPU = torch.device("cpu")
_CODES = {torch.int32: "i", torch.int64: "q"}
LONGEST = 2**31 - 1  # positions are int32; kMaxLength of csrc/block_mask/call.h


# --- one number ----------------------------------------------------------------------------------


def is_number(value):
    return isinstance(value, int) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def length(function, name, value, least=0, most=LONGEST):
    """A length, size or number of tokens, as an int."""
    if type(value) is int and most is LONGEST and not _is_tracing() and least <= value <= most:
        return value
    check_length(function, name, value, least, most)
    return value if isinstance(value, int) else index(value)


def length_from(function, name, value, needed):
    """As ``length``, of what has to hold ``needed`` tokens; None: just those."""
    value = length(function, name, needed if value is None else value)
    if value < needed:
        raise refusal(function, name, f"be at least {needed}", value)
    return value


def reach(function, name, value):
    """A number of tokens of which more than there are means all: windows, sinks, prefixes."""
    if type(value) is int and value == 0:
        return 0
    value = length(function, name, value, most=None)
    return value if _is_tracing() else min(value, LONGEST)


def check_total(function, name, total):
    """Positions are int32 in all results."""
    if not _is_tracing() and total > LONGEST:
        raise refusal(function, name, f"hold at most {LONGEST} tokens", total)


# --- a number or two -----------------------------------------------------------------------------


def block_pair(function, block_size):
    """block_size -> (query block, key block)."""
    if type(block_size) is int:
        return (length(function, "block_size", block_size, 1),) * 2
    pair = _pair(function, "block_size", block_size, "an int or a pair")
    return tuple([length(function, "block_size", size, 1) for size in pair])


def window_pair(function, window):
    """window -> (left, right), None for no limit."""
    if window is None:
        return None, None
    pair = _pair(function, "window", window, "an int or (left, right)")
    return tuple([side if side is None else reach(function, "window", side) for side in pair])


def _pair(function, name, value, what):
    if is_number(value) or not hasattr(value, "__iter__") or isinstance(value, str):
        return value, value
    pair = listed(function, name, value, "an int or a pair of ints")
    if len(pair) != 2:
        raise refusal(function, name, f"be {what}", f"{value!r}")
    return pair


# --- many ----------------------------------------------------------------------------------------


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
    if hasattr(values, "tolist"):
        values = values.tolist()
    elif hasattr(values, "__iter__") and not isinstance(values, (str, bytes, dict, set)):
        values = list(values)
    if not isinstance(values, (list, tuple)):
        raise refusal(function, name, f"be {what}", type(values).__name__, TypeError)
    return values


def _refuse_kinds(function, name, kinds):
    for kind in kinds:
        if kind is bool or not hasattr(kind, "__index__"):
            raise refusal(function, name, "hold ints", kind.__name__, TypeError)


def lengths(function, name, values):
    """``[N]`` lengths on the host as a list."""
    rows = length_rows(function, name, values)
    if len(rows[0]) != 1:
        raise refusal(function, name, "be [N], one length per sample", f"{len(rows[0])} each")
    return [row[0] for row in rows]


def length_rows(function, name, lengths, signed=False):
    """``[[n, m], ...]`` (or ``[n, ...]``) on the host -> tuple of tuples of one length."""
    lengths = listed(function, name, lengths, "a list of lists of ints")
    if len(lengths) == 0:
        raise refusal(function, name, "hold at least one sample", "none")
    if set(map(type, lengths)) <= {list, tuple}:
        rows = tuple(map(tuple, lengths))
    else:
        what = f"a sample of {name}"
        rows = [(n,) if is_number(n) else tuple(listed(function, what, n)) for n in lengths]
        rows = tuple(rows)
    # Each test runs in C for all rows; only a refusal is looked at one by one.
    if set(map(len, rows)) != {len(rows[0])} or not rows[0]:
        sizes = [len(row) for row in rows]
        raise refusal(
            function, name, "have as many segments (at least one) in each sample", sizes[:16]
        )
    kinds = set(map(type, chain.from_iterable(rows)))
    if kinds != {int}:
        _refuse_kinds(function, name, kinds)
        rows = tuple([tuple(map(index, row)) for row in rows])
    if not signed and min(map(min, rows)) < 0:
        i = [min(row) < 0 for row in rows].index(True)
        raise refusal(function, name, "not be negative", f"{min(rows[i])} in sample {i}")
    return rows


def token_count(function, name, shape):
    return prod(shape_of(function, name, shape))


def shape_of(function, name, shape):
    """torch.Size, tuple, list, array or int -> tuple of ints, none of them negative."""
    sizes = (shape,) if is_number(shape) else shape
    sizes = tuple(listed(function, name, sizes, "an int or a list of ints"))
    for size in sizes:
        if isinstance(size, bool) or not is_number(size):
            raise refusal(function, name, "hold ints", type(size).__name__, TypeError)
        if size < 0:
            raise refusal(function, name, "not be negative", size)
    return tuple([index(size) for size in sizes])


# --- tensors -------------------------------------------------------------------------------------


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
        raise refusal(function, name, "not be negative", int(tensor.min()))


def device_of(values, given=None):
    """``given``, else that of a tensor, else PyTorch's default."""
    if given is not None:
        return torch.device(given)
    # get_default_device takes eight times as long.
    return (values if isinstance(values, torch.Tensor) else torch.empty(0)).device


def to_device(numbers, device, dtype=torch.int64):
    """A list of ints as a tensor, without waiting for a GPU: from pinned memory where it is one."""
    compiling = torch.compiler.is_compiling()
    if device == _CPU and numbers and not compiling and not _modes():
        # A third of the time of torch.tensor, which looks at each number; but no mode (fake
        # tensors, say) sees it.
        return torch.frombuffer(array(_CODES[dtype], numbers), dtype=dtype)
    if device.type == "cuda" and not compiling:
        return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(numbers, dtype=dtype, device=device)


def integers(function, name, values):
    """Integers of any form as a tensor: one is given back, the rest is made on the CPU to be read;
    what comes of it belongs on ``device_of`` the argument."""
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        return values
    values = listed(function, name, values, "a tensor or a list of ints")
    if values and isinstance(values[0], (list, tuple)):
        values = length_rows(function, name, values, signed=True)
    elif set(map(type, values)) - {int}:
        _refuse_kinds(function, name, set(map(type, values)))
        values = list(map(index, values))
    if values and isinstance(values[0], int) and not _is_tracing():
        for value in (min(values), max(values)):
            if not -(2**63) <= value < 2**63:
                raise refusal(function, name, "fit int64", value)
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def per_sample(function, name, values, samples, device):
    """One integer per sample, ``[N]`` int64 on device; one number is that of all."""
    if isinstance(values, torch.Tensor):
        check_integers(function, name, values)
        if values.dim() == 0:
            values = values.expand(samples)
        if tuple(values.shape) != (samples,):
            raise refusal(function, name, f"be [{samples}]", shape_text(values))
        refuse_negative(function, name, values)
        return values.to(device, torch.int64, non_blocking=True)
    if is_number(values):
        values = [values] * samples
    values = listed(function, name, values, "an int, a list of ints or a tensor")
    if len(values) != samples:
        raise refusal(function, name, f"have one entry per sample ({samples})", len(values))
    for value in values:
        if not is_number(value) or isinstance(value, bool) or value < 0:
            raise refusal(function, name, "hold ints of at least 0", f"{value!r}")
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
        raise refusal(function, name, "be an int or [B]", shape_text(value))
    # Beyond what positions may be, so that no sum with one can overflow.
    value = value.to(device, torch.int64).clamp(-LONGEST, LONGEST)
    return value if value.dim() == 0 else value.view(-1, 1, 1), device


# --- keep_k --------------------------------------------------------------------------------------


def keep_rows(function, keep_k, samples, groups):
    """keep_k -> (host values or None, tensor or None), of shape ``[N]`` or ``[N, G]``, checked.

    Host values are a list (of lists); the tensor is given back where it must not be read.
    """
    if isinstance(keep_k, torch.Tensor):
        check_integers(function, "keep_k", keep_k)
        if keep_k.dim() not in (1, 2):
            raise refusal(function, "keep_k", "be [N] or [N, G]", shape_text(keep_k))
        _check_keep_shape(function, keep_k.shape, samples, groups)
        if not is_readable(keep_k):
            return None, keep_k
        keep_k = keep_k.tolist()
    keep_k = listed(function, "keep_k", keep_k, "a list of ints or a tensor")
    _check_keep_shape(function, (len(keep_k),), samples, groups)
    kinds = set(map(type, keep_k))
    nested = not kinds.isdisjoint((list, tuple))
    if nested:
        if kinds - {list, tuple}:
            raise refusal(function, "keep_k", "be [N] or [N, G]", "a mixture of both")
        for row in keep_k:
            _check_keep_shape(function, (samples, len(row)), samples, groups)
        kinds = set(map(type, chain.from_iterable(keep_k)))
    if kinds != {int}:
        _refuse_kinds(function, "keep_k", kinds)
        keep_k = [tuple(map(index, k)) if nested else index(k) for k in keep_k]
    least = min(map(min, keep_k)) if nested else min(keep_k)
    if least < 0:
        i = [(min(k) if nested else k) < 0 for k in keep_k].index(True)
        raise refusal(function, "keep_k", "not be negative", f"{least} for sample {i}")
    return keep_k, None


def _check_keep_shape(function, shape, samples, groups):
    if shape[0] != samples:
        raise refusal(function, "keep_k", f"have one entry per sample ({samples})", shape[0])
    if len(shape) == 2 and shape[1] != groups:
        raise refusal(
            function, "keep_k [N, G]", f"have one column per segment ({groups})", shape[1]
        )


def keep_of_all(function, name, keep_k, samples):
    """As ``keep_of_some``, with an entry for each sample."""
    keep_k = keep_of_some(function, name, keep_k, samples)
    if keep_k is None or len(keep_k) == samples:
        return keep_k
    rest = samples - len(keep_k)
    if isinstance(keep_k, torch.Tensor):
        return torch.nn.functional.pad(keep_k.to(torch.int64), (0, rest), value=LONGEST)
    return keep_k + [LONGEST] * rest


def keep_of_some(function, name, keep_k, samples):
    """keep_k of pipelines, a list of ints or a 1-D tensor: one number is that of all samples, and
    the samples beyond the end of a shorter one keep all. None stays None."""
    if keep_k is None:
        return None
    if isinstance(keep_k, (list, tuple)) and any(isinstance(k, torch.Tensor) for k in keep_k):
        keep_k = torch.stack([torch.as_tensor(k).reshape(()) for k in keep_k])
    if isinstance(keep_k, torch.Tensor):
        check_integers(function, name, keep_k)
        if keep_k.dim() > 1:
            raise refusal(function, name, "have one entry per sample", shape_text(keep_k))
        keep_k = keep_k.expand(samples) if keep_k.dim() == 0 else keep_k
        refuse_negative(function, name, keep_k)
    else:
        is_one = is_number(keep_k) or not hasattr(keep_k, "__iter__") or isinstance(keep_k, str)
        keep_k = [keep_k] * samples if is_one else list(listed(function, name, keep_k))
        if not all(is_number(k) and not isinstance(k, bool) for k in keep_k):
            rule = "be an int, a list of ints or an integer tensor"
            raise refusal(function, name, rule, f"{keep_k!r}", TypeError)
        if any(k < 0 for k in keep_k):
            raise refusal(function, name, "not be negative", keep_k)
    if len(keep_k) > samples:
        raise refusal(function, name, f"have at most one entry per sample, {samples}", len(keep_k))
    if isinstance(keep_k, torch.Tensor):
        return keep_k
    return [reach(function, name, k) for k in keep_k]
