# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy under torch.compile with numbers that a schedule moves.

A float of an operator is a part of the compiled graph: each new value would compile another one. So
where label_smoothing, softcap, z_loss or focal_gamma are inputs of the graph they cross the border
in a tensor on the CPU, which is read when the graph runs. Two operators around the native ones,
with their schemas but for that.
"""

import re

import torch

from .._checks import as_number, is_symbolic
from . import masked_cross_entropy_autograd as native

NUMBERS = slice(native.TENSORS + 1, native.TENSORS + 5)  # label_smoothing to focal_gamma
_SMOOTHING = (0.5, 0.0, 0.0, 0.0)  # numbers for a fake: with smoothing there are all results
_GRADIENTS, _DISTANCE = 16, 14  # tensors of the backward operator, smooth_distance among them


def is_scheduled(args):
    return torch.compiler.is_dynamo_compiling() and any(map(is_symbolic, args[NUMBERS]))


def call_scheduled(*args):
    """As the native operator."""
    numbers = torch.stack([as_number(value, "cpu") for value in args[NUMBERS]])
    return _forward_op(numbers, *args[: NUMBERS.start], *args[NUMBERS.stop :])


def _define(operator):
    """The native operator with a tensor in front, without floats and defaults."""
    space, _, name = operator._schema.name.partition("::")
    name = f"{space}::_{name.removeprefix('_')}_scheduled"
    text = str(operator._schema).removeprefix(operator._schema.name + "(")
    text = re.sub(r"=[^,)]*", "", re.sub(r"float \w+(=[^,]*)?, ", "", text))
    torch.library.define(name, "(Tensor numbers, " + text)
    return getattr(torch.ops.masked_loss_ext, name.partition("::")[2]).default


_forward_op = _define(native._forward_op)
_backward_op = _define(native._backward_op)


def _full(args, numbers, before):
    """Arguments of the native operator."""
    return (*args[: before + 1], *numbers, *args[before + 1 :])


@torch.library.impl(_forward_op._schema.name, "CompositeExplicitAutograd")
def _forward(numbers, *args):
    results = list(native._forward_op(*_full(args, numbers.tolist(), native.TENSORS)))
    if args[1] is not None and numbers[0] == 0:  # the graph has a place for it
        results[native.SMOOTH_DISTANCE] = torch.zeros_like(results[1])
    return tuple(results)


@torch.library.impl(_backward_op._schema.name, "CompositeExplicitAutograd")
def _backward(numbers, *args):
    values = numbers.tolist()
    if values[0] == 0:
        args = (*args[:_DISTANCE], args[_DISTANCE].new_empty(0), *args[_DISTANCE + 1 :])
    return native._backward_op(*_full(args, values, _GRADIENTS))


@torch.library.register_fake(_forward_op._schema.name)
def _forward_fake(numbers, *args):
    return native._forward_fake(*_full(args, _SMOOTHING, native.TENSORS))


@torch.library.register_fake(_backward_op._schema.name)
def _backward_fake(numbers, *args):
    return native._backward_fake(*_full(args, _SMOOTHING, _GRADIENTS))


def _setup_forward(ctx, inputs, output):
    numbers, *args = inputs
    native._setup_forward(ctx, _full(args, _SMOOTHING, native.TENSORS), output)
    ctx.numbers = numbers


def _backward_registered(ctx, *grads):
    if all(grad is None for grad in grads[:4]):
        return (None,) * (native.ARGUMENTS - 3)
    needs = native._needs(ctx, 1)
    saved = ctx.saved_tensors
    args = native._backward_arguments(grads[:4], saved, ctx.options)
    args = (*args[: _GRADIENTS + 1], *args[_GRADIENTS + 5 :])
    results = _backward_op(ctx.numbers, *args, *needs)
    found = native._input_gradients(*results, saved[native.TOKEN_WEIGHT], needs)
    return None, *found[: native.TENSORS], *(None,) * 4


torch.library.register_autograd(
    _forward_op._schema.name, _backward_registered, setup_context=_setup_forward
)
native.refuse_derivative(_backward_op, "masked_cross_entropy")
