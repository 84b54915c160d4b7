# SPDX-License-Identifier: BSD-3-Clause
"""masked_squared_error: fake, derivative, and the one function that the losses call.

The schema is in csrc/schemas.cpp, the formula in csrc/elementwise/formula.h. Four ways lead to the
native operator, because no single one serves all of PyTorch, and a fifth around it:

- torch.compile and torch.export see ``torch.ops`` with ``register_fake`` and ``register_autograd``;
- torch.func needs an ``autograd.Function`` with ``setup_context`` (_Differentiable);
- forward-mode AD gets plain PyTorch: a jvp of our own would be right once, and 0 in silence within
  another;
- eager training takes the classic ``autograd.Function`` (_Eager), a third of that per call;
- without gradients the operator is called directly.
"""

import torch
from torch.autograd import forward_ad

from .. import reference
from .._checks import as_edit_mask, as_mask, as_number, check_constant, is_symbolic
from . import masked_squared_error_higher as higher

_forward_op = torch.ops.masked_loss_ext.masked_squared_error.default
_backward_op = torch.ops.masked_loss_ext._masked_squared_error_backward.default

# Private names, both in every torch that the library supports; without the first, the Python
# autograd kernel would run a second time in each call.
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_is_active = torch._C._are_functorch_transforms_active


def is_transformed():
    """Whether torch.func or forward-mode AD may stand around the call."""
    return _functorch_is_active() or forward_ad._current_level >= 0


def needs_plain():
    """Whether plain PyTorch alone has all derivatives: in forward mode, and where torch.compile
    traces a transform, under which a registered operator loses tangents in silence."""
    if forward_ad._current_level >= 0:
        return True
    return _functorch_is_active() and torch.compiler.is_compiling()


def is_batch(grad):
    """Whether a gradient is a batch of them (is_grads_batched): that is an older vmap, which
    torch.func does not know of."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


def masked_squared_error(
    prediction,
    target,
    mask=None,
    edit_mask=None,
    weighting=None,
    foreground_weight=2.0,
    background_weight=1.0,
    reduction="mean",
):
    """The loss alone; arguments as in the schema. Checks only what the kernels need to be safe."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = as_mask("masked_squared_error", "mask", mask)
    if edit_mask is not None:
        check_constant("masked_squared_error", "edit_mask", edit_mask)
        edit_mask = as_edit_mask("masked_squared_error", "edit_mask", edit_mask)
    weights = (foreground_weight, background_weight)
    compiling = torch.compiler.is_compiling()
    if compiling and any(map(is_symbolic, weights)):
        edit_mask, *weights = _as_edit_mask(prediction, edit_mask, *weights)
    args = (
        prediction,
        target,
        mask,
        edit_mask,
        weighting,
        *weights,
        reduction,
    )
    if compiling or forward_ad._current_level >= 0 or _functorch_is_active():
        if needs_plain():
            return higher.loss_and_count(*args)[0]
        return (_forward_op if compiling else _Differentiable.apply)(*args)[0]
    if torch.is_grad_enabled() and (
        prediction.requires_grad
        or target.requires_grad
        or (weighting is not None and weighting.requires_grad)
    ):
        return _Eager.apply(*args)
    with _below_autograd():
        return _forward_op(*args)[0]


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


def _loss_shape(prediction, reduction):
    if reduction == "none":
        return prediction.shape
    return prediction.shape[:-1] if reduction == "token" else ()


def refuse_two_devices(function, prediction, *others):
    # One meta tensor among real ones brings the call here, and the result would be real memory that
    # nobody has written.
    for other in others:
        if other is not None and other.device != prediction.device:
            raise ValueError(
                f"{function}: all tensors must be on one device, got {prediction.device} "
                f"and {other.device}"
            )


@torch.library.register_fake("masked_loss_ext::masked_squared_error")
def _forward_fake(
    prediction,
    target,
    mask=None,
    edit_mask=None,
    weighting=None,
    foreground_weight=2.0,
    background_weight=1.0,
    reduction="mean",
):
    refuse_two_devices("masked_squared_error", prediction, target, mask, edit_mask, weighting)
    dtype = reference.accumulate_dtype(prediction, target)
    loss = prediction.new_empty(_loss_shape(prediction, reduction), dtype=dtype)
    return loss, prediction.new_empty((), dtype=torch.int64)


@torch.library.register_fake("masked_loss_ext::_masked_squared_error_backward")
def _backward_fake(
    grad_loss,
    prediction,
    target,
    mask,
    edit_mask,
    weighting,
    count,
    foreground_weight,
    background_weight,
    reduction,
    needs_prediction,
    needs_target,
    needs_weighting,
):
    refuse_two_devices(
        "masked_squared_error", prediction, target, mask, edit_mask, weighting, grad_loss, count
    )
    shape, nothing = prediction.shape, (0,)
    weighting_shape = nothing
    if needs_weighting and weighting is not None:
        weighting_shape = higher.weighting_gradient_shape(prediction, weighting)
    return (
        prediction.new_empty(shape if needs_prediction else nothing),
        prediction.new_empty(shape if needs_target else nothing, dtype=target.dtype),
        prediction.new_empty(weighting_shape, dtype=reference.accumulate_dtype(prediction, target)),
    )


def _gradients(backward, grad_loss, inputs, count, options, needs):
    """Gradients of the operator's eight arguments, in the inputs' own shapes and dtypes."""
    prediction, target, mask, edit_mask, weighting = inputs
    # The dispatcher leaves out trailing arguments that have their default, weighting perhaps too.
    needs = (needs[0], needs[1], len(needs) > 4 and needs[4])
    grads = backward(
        grad_loss, prediction, target, mask, edit_mask, weighting, count, *options, *needs
    )
    grad_weighting = None
    if needs[2]:
        grad_weighting = grads[2].sum_to_size(weighting.shape).to(weighting.dtype)
    return (
        grads[0] if needs[0] else None,
        grads[1] if needs[1] else None,
        None,
        None,
        grad_weighting,
        None,
        None,
        None,
    )


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with _below_autograd():
            loss, count = _forward_op(*args)
        ctx.save_for_backward(*args[:5], count)
        ctx.options = args[5:]
        ctx.set_materialize_grads(False)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 8
        *inputs, count = ctx.saved_tensors
        args = (grad_loss, inputs, count, ctx.options, ctx.needs_input_grad)
        if is_transformed():  # a gradient with a tangent, say
            return _gradients(_transformed_backward, *args)
        if torch.is_grad_enabled() or torch.compiler.is_dynamo_compiling():
            # create_graph=True, or compiled autograd
            return _gradients(_backward_op, *args)
        with _below_autograd():
            return _gradients(_backward_op, *args)


def _setup_forward(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:5], output[1])
    ctx.options = tuple(inputs[5:])


def _backward_registered(ctx, grad_loss, _grad_count):
    *inputs, count = ctx.saved_tensors
    if grad_loss is None:
        return (None,) * 8
    return _gradients(_backward_op, grad_loss, inputs, count, ctx.options, ctx.needs_input_grad)


torch.library.register_autograd(
    "masked_loss_ext::masked_squared_error",
    _backward_registered,
    setup_context=_setup_forward,
)


class _Differentiable(torch.autograd.Function):
    """The operator for torch.func; slower per call."""

    @staticmethod
    def forward(*args):
        return _forward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_forward(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_loss, _grad_count):
        if grad_loss is None:
            return (None,) * 8
        *inputs, count = ctx.saved_tensors
        return _gradients(
            _transformed_backward,
            grad_loss,
            inputs,
            count,
            ctx.options,
            ctx.needs_input_grad,
        )

    @staticmethod
    def vmap(info, in_dims, *args):
        def one(*inputs):
            return higher.loss_and_count(*inputs, *args[5:])

        return torch.vmap(one, in_dims=in_dims[:5])(*args[:5]), (0, 0)


def _setup_backward(ctx, inputs, output):
    grad_loss, prediction, target, mask, edit_mask, weighting = inputs[:6]
    ctx.save_for_backward(grad_loss, prediction, target, mask, edit_mask, weighting)
    ctx.options = tuple(inputs[7:10])
    ctx.needs = tuple(inputs[10:13])


def _second_derivative(ctx, grad_grad_prediction, grad_grad_target, grad_grad_weighting):
    """Derivative of the backward operator, through the written-out gradients of reference/."""
    saved = ctx.saved_tensors
    upstream = (grad_grad_prediction, grad_grad_target, grad_grad_weighting)
    upstream = [u if need else None for u, need in zip(upstream, ctx.needs, strict=True)]
    grads = higher.second_derivative(saved, ctx.options, upstream, ctx.needs_input_grad)
    # grad_loss, prediction, target, mask, edit_mask, weighting, then count, options and needs
    return (*grads[:3], None, None, grads[3], *(None,) * 7)


torch.library.register_autograd(
    "masked_loss_ext::_masked_squared_error_backward",
    _second_derivative,
    setup_context=_setup_backward,
)


def _transformed_backward(*args):
    if needs_plain():
        return higher.gradients(*args)
    return _DifferentiableBackward.apply(*args)


class _DifferentiableBackward(torch.autograd.Function):
    """The backward operator for torch.func, differentiable again."""

    @staticmethod
    def forward(*args):
        return _backward_op(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_backward(ctx, inputs, output)
        ctx.set_materialize_grads(False)

    backward = staticmethod(_second_derivative)

    @staticmethod
    def vmap(info, in_dims, *args):
        def one(*tensors):
            return higher.gradients(*tensors, *args[7:])

        return torch.vmap(one, in_dims=in_dims[:7])(*args[:7]), (0, 0, 0)
