# SPDX-License-Identifier: BSD-3-Clause
"""Argument errors: "<function>: <argument> must <rule>, got <what>".

Only shapes, dtypes and devices are looked at, never data: no synchronisation with a GPU.
"""

import torch

_functorch_is_active = torch._C._are_functorch_transforms_active  # private, see ops/

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ArgumentError(ValueError, AssertionError):
    """For arguments that callers of older code expect to be refused by an assertion."""


def shape_text(tensor):
    return sizes_text(tensor.shape)


def sizes_text(sizes):
    # Not str(list(...)): torch.compile cannot trace that for sizes that change.
    return "[" + ", ".join([f"{n}" for n in sizes]) + "]"


def check_tensor(function, name, value):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{function}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_rank(function, name, tensor, rank, layout):
    if tensor.dim() != rank:
        raise ValueError(
            f"{function}: {name} must have {rank} dimensions {layout}, got {shape_text(tensor)}"
        )


def check_int(function, name, value):
    # isinstance first: torch.compile knows no hasattr of a number that it keeps symbolic.
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{function}: {name} must be an int, got {type(value).__name__}")


def check_length(function, name, value):
    check_int(function, name, value)
    if value < 0:
        raise ValueError(f"{function}: {name} must not be negative, got {value}")


def check_integers(function, name, tensor):
    """A tensor of integers; bool is not one."""
    check_tensor(function, name, tensor)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{function}: {name} must be integers, got {tensor.dtype}")


def check_choice(function, name, value, choices, label=""):
    if value not in choices:
        *most, last = choices
        raise ValueError(
            f"{function}: {label}{name} must be {', '.join(most)} or {last}, got {value!r}"
        )


def check_prediction(function, name, prediction, target_name, target):
    """Two floating tensors of one shape on one device."""
    check_tensor(function, name, prediction)
    check_tensor(function, target_name, target)
    for argument, tensor in ((name, prediction), (target_name, target)):
        if not tensor.is_floating_point():
            raise ValueError(
                f"{function}: {argument} must be a floating tensor, got {tensor.dtype}"
            )
    if target.shape != prediction.shape:
        raise ValueError(
            f"{function}: Shape mismatch: {target_name} must have the shape of {name} "
            f"{shape_text(prediction)}, got {shape_text(target)}"
        )
    check_device(function, target_name, target, name, prediction)


def check_device(function, name, tensor, like_name, like):
    # Moving it here would cost a synchronisation on every step, in silence.
    if tensor.device != like.device:
        raise ValueError(
            f"{function}: {name} must be on the device of {like_name} ({like.device}), "
            f"got {tensor.device}"
        )


def check_mask(function, name, mask, like_name, like, dims, label=None):
    """A mask of the first ``dims`` dimensions of ``like``; None passes."""
    if mask is None:
        return
    check_tensor(function, name, mask)
    if mask.shape != like.shape[:dims]:
        raise ValueError(
            f"{function}: {label or name + ' shape'} must be {sizes_text(like.shape[:dims])}, the "
            f"first {dims} dimensions of {like_name}, got {shape_text(mask)}"
        )
    if mask.is_complex():
        raise ValueError(f"{function}: {name} must be bool, integer or floating, got {mask.dtype}")
    check_device(function, name, mask, like_name, like)
    check_not_additive(function, name, mask)


def check_not_additive(function, name, mask):
    """A mask of 0 and -inf, as attention layers add it, would select the padding.

    Looks at data, so only at that of floating masks on the CPU, and not while tracing.
    """
    if mask.dtype not in _FLOATING or mask.device.type != "cpu" or is_traced():
        return
    if type(mask) is not torch.Tensor:  # a fake tensor, say, has no data
        return
    if mask.numel() and mask.min() < 0:
        raise ValueError(
            f"{function}: {name} must be on where it is not 0, got negative entries: an additive "
            "mask? Give mask == 0 instead"
        )


def check_weighting(function, weighting, like_name, like):
    """A floating tensor that broadcasts to ``like``; None passes."""
    if weighting is None:
        return
    check_tensor(function, "weighting", weighting)
    if not weighting.is_floating_point():
        raise ValueError(f"{function}: weighting must be a floating tensor, got {weighting.dtype}")
    pairs = zip(reversed(weighting.shape), reversed(like.shape), strict=False)
    if weighting.dim() > like.dim() or any(w != 1 and w != n for w, n in pairs):
        raise ValueError(
            f"{function}: weighting must be broadcastable to {like_name} {shape_text(like)}, "
            f"got {shape_text(weighting)}"
        )
    check_device(function, "weighting", weighting, like_name, like)


def as_weighting(weighting, like):
    """Numbers and integer tensors as floating tensors; anything else as it is."""
    if weighting is None or (isinstance(weighting, torch.Tensor) and weighting.is_floating_point()):
        return weighting
    if isinstance(weighting, (int, float)) and not isinstance(weighting, bool):
        return torch.full((), weighting, dtype=torch.float64, device=like.device)
    if isinstance(weighting, torch.Tensor) and not weighting.is_complex():
        return weighting.to(torch.float32)
    return weighting


def is_traced():
    """Under torch.compile or torch.func: another path than the operator's own checks may be taken,
    vmap's broadcasts, and checking costs nothing where it is done while tracing."""
    return torch.compiler.is_compiling() or _functorch_is_active()
