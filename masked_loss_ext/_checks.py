# SPDX-License-Identifier: BSD-3-Clause
"""Argument errors: "<function>: <argument> must <rule>, got <what>".

Shapes, dtypes and devices are looked at, and data on the CPU alone: no synchronisation with a GPU.
"""

import difflib
import math
import numbers
from typing import NoReturn

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
# kLargestLength of csrc/common/checks.h: sums of a few lengths stay far from the end of int64.
LARGEST_LENGTH = 2**48


class ArgumentError(ValueError, AssertionError):
    """For arguments that callers of older code expect to be refused by an assertion."""


def refuse(
    function: str, name: str, rule: str, got: object, kind: type[Exception] = ValueError
) -> NoReturn:
    raise kind(f"{function}: {name} must {rule}, got {got}")


def shape_text(tensor):
    return sizes_text(tensor.shape)


def sizes_text(sizes):
    # Not str(list(...)): torch.compile cannot trace that for sizes that change.
    return "[" + ", ".join([f"{n}" for n in sizes]) + "]"


def check_tensor(function, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(
            f"{function}: {name} must be a plain tensor, got a nested one: pad it and give a mask"
        )
    if value.layout != torch.strided:
        raise ValueError(f"{function}: {name} must be a dense tensor, got layout {value.layout}")


def check_rank(function, name, tensor, rank, layout):
    if tensor.dim() != rank:
        raise ValueError(
            f"{function}: {name} must have {rank} dimensions {layout}, got {shape_text(tensor)}"
        )


def check_int(function, name, value):
    # isinstance first: torch.compile knows no hasattr of a number that it keeps symbolic.
    is_int = isinstance(value, int) or hasattr(value, "__index__")
    if not is_int or isinstance(value, bool):
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}")


def check_length(function, name, value, least=0, most=LARGEST_LENGTH):
    """An int in [least, most]; ``most`` None: any."""
    check_int(function, name, value)
    if value < least:
        rule = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{function}: {name} must {rule}, got {value}")
    # A bound on a size that is kept symbolic would be one more guard; the operators check it.
    if most is not None and not torch.compiler.is_dynamo_compiling() and value > most:
        raise ValueError(f"{function}: {name} must be in [{least}, {most}], got {value}")


def check_number(function, name, value, *, least=None, above=None, most=None):
    """A finite Python number; ``least`` and ``most`` are allowed, ``above`` is not.

    A tensor is not looked at (that may wait for a GPU) and is none.
    """
    if isinstance(value, (torch.SymInt, torch.SymFloat)):  # has no value yet
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{function}: {name} must be a number, got {type(value).__name__}")
    if not isinstance(value, (int, float)):  # float32 of NumPy, say, in which _LARGEST is inf
        value = float(value)
    fits = (
        -_LARGEST <= value <= _LARGEST  # comparisons alone: torch.compile keeps a number symbolic
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    )
    if not fits:
        ranges = [f"at least {least}" if least is not None else ""]
        ranges += [f"above {above}" if above is not None else ""]
        ranges += [f"at most {most}" if most is not None else ""]
        rule = " and ".join(filter(None, ranges))
        raise ValueError(
            f"{function}: {name} must be a finite number{' ' + rule if rule else ''}, got {value}"
        )


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
            raise TypeError(f"{function}: {argument} must be a bool, got {value!r}")


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
        raise ValueError(f"{function}: {name} must be integers, got {tensor.dtype}")


def check_choice(function, name, value, choices, label=""):
    if isinstance(value, torch.Tensor) or value not in choices:  # a tensor compares itself
        *most, last = map(str, choices)
        raise ValueError(
            f"{function}: {label}{name} must be {', '.join(most)} or {last}, got {value!r}"
        )


def check_prediction(function, name, prediction, target_name, target):
    """Two floating tensors of one shape on one device."""
    check_tensor(function, name, prediction)
    check_tensor(function, target_name, target)
    check_floating(function, name, prediction)
    check_floating(function, target_name, target)
    if target.shape != prediction.shape:
        raise ValueError(
            f"{function}: Shape mismatch: {target_name} must have the shape of {name} "
            f"{shape_text(prediction)}, got {shape_text(target)}"
        )
    check_device(function, target_name, target, name, prediction)


def check_floating(function, name, tensor):
    """Of a dtype that the kernels compute with."""
    if not tensor.is_floating_point():
        raise ValueError(f"{function}: {name} must be a floating tensor, got {tensor.dtype}")
    if tensor.dtype not in _FLOATING:
        raise ValueError(
            f"{function}: {name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}"
        )


def check_device(function, name, tensor, like_name, like):
    # Moving it here would cost a synchronisation on every step, in silence.
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {name} must be on the device of {like_name} ({like.device}), "
            f"got {tensor.device}"
        )


def check_mask(function, name, mask, like_name, like, dims, label=None, broadcast=False):
    """A mask of the first ``dims`` dimensions of ``like``; None passes.

    broadcast: a size of 1 stands for any.
    """
    if mask is None:
        return
    check_tensor(function, name, mask)
    sizes = like.shape[:dims]
    if mask.shape != sizes and not (broadcast and broadcasts(mask.shape, sizes)):
        rule = " (a size of 1 stands for any)" if broadcast else ""
        raise ValueError(
            f"{function}: {label or name + ' shape'} must be {sizes_text(sizes)}, the "
            f"first {dims} dimensions of {like_name}, got {shape_text(mask)}{rule}"
        )
    check_mask_dtype(function, name, mask)
    check_device(function, name, mask, like_name, like)
    check_not_additive(function, name, mask)


def check_leading_mask(function, name, mask, like_name, like):
    """A mask of any of the leading dimensions of ``like``; a size of 1 stands for any."""
    check_tensor(function, name, mask)
    dims = mask.dim() if 1 <= mask.dim() <= like.dim() else like.dim()
    check_mask(function, name, mask, like_name, like, dims, broadcast=True)


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
        raise ValueError(
            f"{function}: {name} must be bool, integer or floating, of a dtype that PyTorch "
            f"computes with, got {mask.dtype}: convert it, to bool say"
        )


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
        if mask.isnan().any():
            raise ValueError(f"{function}: {name} must be on where it is not 0, got NaN entries")
        raise ValueError(
            f"{function}: {name} must be on where it is not 0, got negative entries: an additive "
            "mask? Give mask == 0 instead"
        )


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
        raise ValueError(
            f"{function}: weighting must be broadcastable to {like_name} {shape_text(like)}, "
            f"got {shape_text(weighting)}"
        )
    check_device(function, "weighting", weighting, like_name, like)


def as_weighting(function, weighting, like):
    """Numbers and integer tensors as floating tensors; anything else as it is."""
    if weighting is None or (isinstance(weighting, torch.Tensor) and weighting.is_floating_point()):
        return weighting
    if isinstance(weighting, (int, float, numbers.Real)) and not isinstance(weighting, bool):
        check_number(function, "weighting", weighting)
        return as_number(weighting, like.device)
    if isinstance(weighting, torch.Tensor) and weighting.dtype in _WEIGHTS:
        return weighting.to(torch.float32)
    return weighting


def is_traced():
    """Under torch.compile or torch.func: another path than the operator's own checks may be taken,
    vmap's broadcasts, and checking costs nothing where it is done while tracing."""
    return torch.compiler.is_compiling() or _functorch_is_active()
