# SPDX-License-Identifier: BSD-3-Clause
"""Argument errors: "<function>: <argument> must <rule>, got <what>".

Shapes, dtypes and devices are looked at, and data on the CPU alone: no synchronisation with a GPU.
"""

import difflib
import math
import numbers
from typing import Any

import torch

_functorch_is_active = torch._C._are_functorch_transforms_active  # private, see ops/

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_LARGEST = math.nextafter(math.inf, 0)  # an int may be larger
# Converted before a kernel sees them: not worth kernels of their own.
CONVERTED_INTEGERS = (torch.uint16, torch.uint32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
CONVERTED_MASKS = (*CONVERTED_INTEGERS, torch.uint64, *_FLOAT8)
_WEIGHTS = (torch.bool, *_INTEGERS, *CONVERTED_INTEGERS, torch.uint64)
_MASKS = frozenset((torch.bool, *_INTEGERS, *_FLOATING, *CONVERTED_MASKS))
# What arguments of a wrong kind run into, and what operators refuse with. Others pass: PyTorch's
# checkpoint ends a recomputation by an exception, which none may answer with another call.
REFUSALS = (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError)
# kLargestLength of csrc/common/checks.h: sums of a few lengths stay far from the end of int64.
LARGEST_LENGTH = 2**48
_ANY = " (a size of 1 stands for any)"


class ArgumentError(ValueError, AssertionError):
    """For arguments that callers of older code expect to be refused by an assertion."""


def refusal(function, name, rule, got, error=ValueError):
    """The error to raise, in the words that all of them share."""
    return error(f"{function}: {name} must {rule}, got {got}")


def shape_text(tensor):
    return sizes_text(tensor.shape)


def sizes_text(sizes):
    # Not str(list(...)): torch.compile cannot trace that for sizes that change.
    return "[" + ", ".join([f"{n}" for n in sizes]) + "]"


def check_tensor(function, name, value):
    if not isinstance(value, torch.Tensor):
        raise refusal(function, name, "be a torch.Tensor", type(value).__name__, TypeError)
    if value.is_nested:
        got = "a nested one: pad it and give a mask"
        raise refusal(function, name, "be a plain tensor", got)
    if value.layout != torch.strided:
        raise refusal(function, name, "be a dense tensor", f"layout {value.layout}")
    if value.is_quantized:
        raise refusal(function, name, "be a plain tensor", "a quantized one: dequantize it")


def is_dtensor(value):
    """A DTensor, known without its module: to import that takes half a second."""
    cls = type(value)
    if cls is torch.Tensor or cls is torch.nn.Parameter:
        return False
    return isinstance(value, torch.Tensor) and hasattr(cls, "redistribute")


def check_whole(function, name, value, instead="call it with to_local() or full_tensor()"):
    """A tensor that is no DTensor."""
    check_tensor(function, name, value)
    if is_dtensor(value):
        got = f"a DTensor placed {placements_text(value)}: {instead}"
        raise refusal(function, name, "be a plain tensor", got)


def check_same_device(function, name, tensor, like_name, like):
    if tensor.device != like.device:
        rule = f"be on the device of {like_name} ({like.device})"
        raise refusal(function, name, rule, tensor.device)


def check_beside(function, name, tensor, like_name, like):
    """No DTensor beside a plain tensor: nobody knows which part of it belongs to that."""
    if is_dtensor(tensor) and not is_dtensor(like):
        instead = f"{like_name} is none, so what belongs to it is not known; make both DTensors"
        check_whole(function, name, tensor, instead)


def placements_text(tensor):
    """Of a DTensor: "Shard(dim=1) over 'tp'" for each dimension of its mesh."""
    names = tensor.device_mesh.mesh_dim_names or range(tensor.device_mesh.ndim)
    return ", ".join([f"{p!r} over {n!r}" for p, n in zip(tensor.placements, names, strict=True)])


def check_rank(function, name, tensor, rank, layout):
    if tensor.dim() != rank:
        raise refusal(function, name, f"have {rank} dimensions {layout}", shape_text(tensor))


def check_int(function, name, value):
    # isinstance first: torch.compile knows no hasattr of a number that it keeps symbolic.
    is_int = isinstance(value, int) or _is_index(value)
    if not is_int or isinstance(value, bool):
        raise refusal(function, name, "be an int", type(value).__name__, TypeError)


def _is_index(value):
    """Tensors and arrays have __index__ whatever they hold."""
    if isinstance(value, torch.Tensor):
        return value.dim() == 0 and value.dtype in (*_INTEGERS, *CONVERTED_INTEGERS)
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def check_length(function, name, value, least=0, most=LARGEST_LENGTH):
    """An int in [least, most]; ``most`` None: any."""
    check_int(function, name, value)
    if value < least:
        rule = f"be at least {least}" if least else "not be negative"
        raise refusal(function, name, rule, value)
    # A bound on a size that is kept symbolic would be one more guard; the operators check it.
    if most is not None and not torch.compiler.is_dynamo_compiling() and value > most:
        raise refusal(function, name, f"be in [{least}, {most}]", value)


def check_number(function, name, value, *, least=None, above=None, most=None):
    """A finite Python number; ``least`` and ``most`` are allowed, ``above`` is not.

    A tensor is not looked at (that may wait for a GPU) and is none.
    """
    if type(value) not in (int, float):
        if isinstance(value, (torch.SymInt, torch.SymFloat)):  # has no value yet
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise refusal(function, name, "be a number", type(value).__name__, TypeError)
        if not isinstance(value, (int, float)):  # float32 of NumPy, say, in which _LARGEST is inf
            value = float(value)
    fits = (
        -_LARGEST <= value <= _LARGEST  # comparisons alone: torch.compile keeps a number symbolic
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not fits:
        bounds = {"at least": least, "above": above, "at most": most}
        ranges = [f"{words} {bound}" for words, bound in bounds.items() if bound is not None]
        rule = f"be a finite number {' and '.join(ranges)}".rstrip()
        raise refusal(function, name, rule, value)


def check_constant(function, name, value):
    """For an argument without a derivative: a gradient would be missing in silence."""
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {name} must not require a gradient: it would get none; detach it"
        )


def as_number(value, device):
    """A number as a 0-d float64 tensor.

    torch.compile takes a factor that changes from call to call as an input of its graph, but
    compiles a fill value in.
    """
    if torch.compiler.is_dynamo_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * value
    if not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):  # a Fraction, say
        value = float(value)
    return torch.full((), value, dtype=torch.float64, device=device)


def is_symbolic(value):
    """While torch.compile traces: whether a number is an input of the graph, not a part of it."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(value)


def check_flags(function, flags):
    """Options that are on or off: of "no" one would not think that it is on."""
    for argument, value in flags.items():
        if value is True or value is False:
            continue
        if isinstance(value, torch.Tensor) or value not in (0, 1):
            raise refusal(function, argument, "be a bool", repr(value), TypeError)


def refuse_unknown(function, unknown, known):
    """For a signature that ends in ``**unknown``: an argument that is taken must be used."""
    for name in unknown:
        near = " or ".join(difflib.get_close_matches(name, known, 2, 0.4))
        hint = f"; did you mean {near}?" if near else f"; it takes {', '.join(known)}"
        raise TypeError(f"{function}: unexpected keyword argument {name}{hint}")


def check_integers(function, name, tensor):
    """A tensor of integers; bool is not one."""
    check_tensor(function, name, tensor)
    if tensor.dtype not in (*_INTEGERS, *CONVERTED_INTEGERS, torch.uint64):
        raise refusal(function, name, "be integers", tensor.dtype)


def check_choice(function, name, value, choices, label=""):
    if isinstance(value, torch.Tensor) or value not in choices:  # a tensor compares itself
        *most, last = map(str, choices)
        raise refusal(function, label + name, f"be {', '.join(most)} or {last}", repr(value))


def check_prediction(function, name, prediction, target_name, target):
    """Two floating tensors of one shape on one device."""
    check_tensor(function, name, prediction)
    check_tensor(function, target_name, target)
    check_floating(function, name, prediction)
    check_floating(function, target_name, target)
    check_like(function, target_name, target, name, prediction, label="Shape mismatch: ")


def check_any_floating(function, name, tensor):
    if not tensor.is_floating_point():
        raise refusal(function, name, "be a floating tensor", tensor.dtype)


def check_floating(function, name, tensor):
    """Of a dtype that the kernels compute with."""
    if tensor.dtype not in _FLOATING:
        check_any_floating(function, name, tensor)
        raise refusal(function, name, "be float16, bfloat16, float32 or float64", tensor.dtype)


def check_device(function, name, tensor, like_name, like):
    check_beside(function, name, tensor, like_name, like)
    # Moving it here would cost a synchronisation on every step, in silence.
    check_same_device(function, name, tensor, like_name, like)


def check_like(function, name, tensor, like_name, like, *, broadcast=False, label=""):
    """Of the shape (``broadcast``: a size of 1 stands for any) and on the device of ``like``."""
    if tensor.shape != like.shape and not (broadcast and broadcasts(tensor.shape, like.shape)):
        rule = f"have the shape of {like_name} {shape_text(like)}"
        raise refusal(function, label + name, rule, shape_text(tensor) + _ANY * broadcast)
    check_device(function, name, tensor, like_name, like)


def check_mask(
    function, name, mask, like_name, like, dims, label=None, broadcast=False, selects=True
):
    """A mask of the first ``dims`` dimensions of ``like``; None passes.

    broadcast: a size of 1 stands for any. selects: by not being 0; an edit mask's values weigh,
    and those of what another mask excludes are not looked at.
    """
    if mask is None:
        return
    check_tensor(function, name, mask)
    sizes = like.shape[:dims]
    if mask.shape != sizes and not (broadcast and broadcasts(mask.shape, sizes)):
        rule = f"be {sizes_text(sizes)}, the first {dims} dimensions of {like_name}"
        got = shape_text(mask) + _ANY * broadcast
        raise refusal(function, label or f"{name} shape", rule, got)
    check_mask_dtype(function, name, mask)
    check_device(function, name, mask, like_name, like)
    if selects:
        check_not_additive(function, name, mask)


def check_label_rows(function, name, labels, mask, segment_ids, *, broadcast=False):
    """Labels ``[B, S]``, and an attention_mask and segment_ids of that shape or None."""
    check_integers(function, name, labels)
    check_rank(function, name, labels, 2, "[B, S]")
    if mask is not None:
        check_tensor(function, "attention_mask", mask)
        if mask.dim() != 2:
            scores = "a 4-D mask [B, 1, S, S] that attention adds to its scores"
            got = f"{shape_text(mask)} ({scores} says nothing about targets)"
            rule = "have 2 dimensions [B, S], the tokenizer's"
            raise refusal(function, "attention_mask", rule, got)
        check_mask(function, "attention_mask", mask, name, labels, 2, broadcast=broadcast)
    if segment_ids is not None:
        check_integers(function, "segment_ids", segment_ids)
        check_like(function, "segment_ids", segment_ids, name, labels, broadcast=broadcast)


def check_leading_mask(function, name, mask, like_name, like, selects=True):
    """A mask of any of the leading dimensions of ``like``; a size of 1 stands for any."""
    check_tensor(function, name, mask)
    dims = mask.dim() if 1 <= mask.dim() <= like.dim() else like.dim()
    check_mask(function, name, mask, like_name, like, dims, broadcast=True, selects=selects)


def broadcasts(shape, sizes):
    """Whether ``shape`` is ``sizes`` but for sizes of 1."""
    return len(shape) == len(sizes) and all(
        n in (1, size) for n, size in zip(shape, sizes, strict=True)
    )


def as_mask(function, name, mask):
    """A mask that the kernels read: on where it is not 0."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    check_not_additive(function, name, mask)
    if mask.dtype in _FLOATING or mask.dtype in _INTEGERS:
        return mask
    check_mask_dtype(function, name, mask)
    return mask != 0


def as_edit_mask(function, name, mask):
    """An edit mask that the kernels read: integers are 1 where not 0, floats what they are."""
    if mask is None or mask.dtype in _FLOATING:
        return mask
    if mask.dtype in _FLOAT8:
        return mask.to(torch.float32)
    return as_mask(function, name, mask)


def check_mask_dtype(function, name, mask):
    """Some dtypes can hold a mask and not even be compared with 0."""
    if mask.dtype not in _MASKS:
        rule = "be bool, integer or floating, of a dtype that PyTorch computes with"
        raise refusal(function, name, rule, f"{mask.dtype}: convert it, to bool say")


def as_integers(tensor):
    """Integers that the kernels read: labels, ids, lengths."""
    if tensor is not None and tensor.dtype in CONVERTED_INTEGERS:
        return tensor.to(torch.int64)
    return tensor


def check_not_additive(function, name, mask):
    """A mask of 0 and -inf, as attention layers add it, would select the padding, and so would NaN.

    Looks at data, so only at that of floating masks on the CPU, and not while tracing.
    """
    if mask.dtype not in _FLOATING or not is_readable(mask):
        return
    if mask.numel() and not mask.min() >= 0:
        got = "negative entries: an additive mask? Give mask == 0 instead"
        got = "NaN entries" if mask.isnan().any() else got
        raise refusal(function, name, "be on where it is not 0", got)


def is_readable(tensor):
    """Whether data can be looked at for nothing: on the CPU, and not while tracing."""
    if tensor.device.type != "cpu" or is_traced():
        return False
    # A fake tensor, say, has no data; and a mode (make_fx, linearize) may trace this very look.
    return type(tensor) is torch.Tensor and torch._C._len_torch_dispatch_stack() == 0


def check_weighting(function, weighting, like_name, like):
    """A floating tensor that broadcasts to ``like``; None passes."""
    if weighting is None:
        return
    check_tensor(function, "weighting", weighting)
    check_floating(function, "weighting", weighting)
    pairs = zip(reversed(weighting.shape), reversed(like.shape), strict=False)
    if weighting.dim() > like.dim() or any(w != 1 and w != n for w, n in pairs):
        rule = f"be broadcastable to {like_name} {shape_text(like)}"
        raise refusal(function, "weighting", rule, shape_text(weighting))
    check_device(function, "weighting", weighting, like_name, like)


def as_weighting(function, weighting, like) -> Any:
    """Numbers and integer tensors as floating tensors; anything else as it is."""
    if weighting is None or (isinstance(weighting, torch.Tensor) and weighting.is_floating_point()):
        return weighting
    if isinstance(weighting, (int, float, numbers.Real)) and not isinstance(weighting, bool):
        check_number(function, "weighting", weighting)
        return as_number(weighting, like.device)
    if isinstance(weighting, torch.Tensor) and weighting.dtype in _WEIGHTS:
        return weighting.to(torch.float32)
    return weighting


def has_no_data(tensor):
    """Of meta, or fake: what stands in for an operator there checks no shape and no dtype."""
    return type(tensor) is not torch.Tensor or tensor.is_meta


def is_traced():
    """Under torch.compile or torch.func: another path than the operator's own checks may be taken,
    vmap's broadcasts, and checking costs nothing where it is done while tracing."""
    return torch.compiler.is_compiling() or _functorch_is_active()
