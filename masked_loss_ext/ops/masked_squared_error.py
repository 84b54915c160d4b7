# SPDX-License-Identifier: BSD-3-Clause
"""masked_squared_error: the one function that the losses call.

The schema is in csrc/schemas.cpp, the formula in csrc/elementwise/formula.h; what leads to the
operator, and its derivatives, in _autograd.py.
"""

from collections.abc import Iterator

import torch

from .. import reference
from .._aggregate import as_divisor, check_normalizer, over
from .._checks import (
    as_edit_mask,
    as_mask,
    as_number,
    check_choice,
    check_constant,
    check_floating,
    check_number,
    check_tensor,
    is_dtensor,
    is_symbolic,
    refusal,
    shape_text,
)
from ..reference.squared_error import ELEMENT_LOSSES, align_leading
from ._autograd import Differentiable, Like


def masked_squared_error(
    prediction: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    edit_mask: torch.Tensor | None = None,
    weighting: torch.Tensor | None = None,
    foreground_weight: float = 2.0,
    background_weight: float = 1.0,
    reduction: str = "mean",
    loss: str = "mse",
    delta: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss alone; arguments as in the schema. Checks only what the kernels need to be safe."""
    if is_dtensor(prediction):
        from ..distributed import _dtensor

        tensors = {"mask": mask, "edit_mask": edit_mask, "weighting": weighting}
        how = (foreground_weight, background_weight, reduction, loss, delta)
        return _dtensor.squared_error("masked_squared_error", prediction, target, tensors, how)
    if mask is not None and mask.dtype is not torch.bool:
        mask = as_mask("masked_squared_error", "mask", mask)
    if edit_mask is not None:
        check_constant("masked_squared_error", "edit_mask", edit_mask)
        edit_mask = as_edit_mask("masked_squared_error", "edit_mask", edit_mask)
    weights = (foreground_weight, background_weight)
    if torch.compiler.is_compiling() and any(map(is_symbolic, weights)):
        edit_mask, *weights = _as_edit_mask(prediction, edit_mask, *weights)
    if loss != "mse":
        delta = _as_delta(loss, delta, prediction)
    elif delta is not None:
        check_constant("masked_squared_error", "delta", delta)
        delta = None
    args = (prediction, target, mask, edit_mask, weighting, *weights, reduction, loss, delta)
    return operator.call(args, 1)[0]


def squared_error_over(function, normalizer, *tensors, reduction, **how):
    """``masked_squared_error``, whose means are divided by ``normalizer`` where there is one."""
    if normalizer is not None:
        check_normalizer(function, normalizer, reduction)
        reduction = "sum"
    try:
        total = masked_squared_error(*tensors, reduction=reduction, **how)
    except ValueError as error:
        raise in_the_name_of(function, error) from None
    if normalizer is None:
        return total
    return over(total.double(), as_divisor(function, normalizer, total)).to(total.dtype)


def in_the_name_of(function: str, error: Exception) -> Exception:
    """What the operator refuses, a delta that it alone reads, of the function that was called."""
    text = str(error)
    own = "masked_squared_error: "
    if type(error) is not ValueError or not text.startswith(own):
        return error
    return ValueError(f"{function}: {text.removeprefix(own)}")


def check_element_loss(function: str, loss: str, delta: float | torch.Tensor | None) -> None:
    """A tensor's value is not looked at: that may wait for a GPU."""
    if loss == "mse" and type(delta) is float:  # nobody reads it
        return
    check_choice(function, "loss", loss, tuple(ELEMENT_LOSSES))
    check_constant(function, "delta", delta)
    if isinstance(delta, torch.Tensor):
        check_tensor(function, "delta", delta)
        check_floating(function, "delta", delta)
        if delta.dim():
            raise refusal(function, "delta", "be one number []", shape_text(delta))
    elif delta is not None:
        allowed = {"least": 0} if loss == "smooth_l1" else {"above": 0}
        check_number(function, "delta", delta, **allowed)


def _as_delta(loss, delta, prediction):
    """In a tensor: as a number of the operator it would be compiled in. None for 1."""
    check_element_loss("masked_squared_error", loss, delta)
    if isinstance(delta, torch.Tensor):
        return delta if delta.device == prediction.device else delta.to(prediction.device)
    # Of one that changes the comparison would be a guard: a graph below 1, at 1, above.
    changes = torch.compiler.is_dynamo_compiling() and is_symbolic(delta)
    if delta is None or (not changes and delta == 1):
        return None
    return as_number(delta, prediction.device)


def _as_edit_mask(prediction, edit_mask, foreground_weight, background_weight):
    """Weights that change from call to call, in a tensor: as numbers of the operator they would be
    compiled in."""
    device = prediction.device
    fg, bg = as_number(foreground_weight, device), as_number(background_weight, device)
    if edit_mask is None:
        return bg.expand(prediction.shape[:1]), 1.0, 0.0
    m = edit_mask if edit_mask.is_floating_point() else edit_mask != 0
    m = m.to(reference.accumulate_dtype(prediction, prediction))
    return fg * m + bg * (1 - m), 1.0, 0.0


def _likes(a) -> Iterator[Like]:
    shape = {"none": a.prediction.shape, "token": a.prediction.shape[:-1]}.get(a.reduction, ())
    yield shape, reference.accumulate_dtype(a.prediction, a.target)
    yield (), torch.int64


def _weighting_gradient_like(b) -> Like:
    """The kernel sums over the last dimension where weighting has one entry for all of it."""
    dtype = reference.accumulate_dtype(b.prediction, b.target)
    if b.weighting is None:
        return None, dtype
    if b.weighting.dim() == 0 or b.weighting.shape[-1] == 1:
        return (*b.prediction.shape[:-1], 1)[: b.prediction.dim()], dtype
    return b.prediction.shape, dtype


def _plain(a) -> tuple[torch.Tensor, torch.Tensor]:
    if a.mask is None:
        count = torch.full((), a.prediction.numel(), device=a.prediction.device)
    else:
        on = align_leading(a.mask, a.prediction) != 0
        count = on.expand(a.prediction.shape).sum()
    return reference.masked_squared_error(*a), count


operator = Differentiable(
    "masked_squared_error", _likes, _plain, {"weighting": _weighting_gradient_like}
)
