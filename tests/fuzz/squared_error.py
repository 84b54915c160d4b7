# SPDX-License-Identifier: BSD-3-Clause
"""Properties of the squared errors and their kin: the operator, and the losses made of it."""

import torch
from accuracy import Expected, assert_all_accurate, evaluate, widened
from cases import FLOATING, REDUCTIONS

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.masked_squared_error import masked_squared_error
from masked_loss_ext.reference.squared_error import ELEMENT_LOSSES, align_leading
from tests.fuzz.agreement import assert_bits, is_close
from tests.fuzz.choices import laid, mask_values, poisoned, used_by

OPERATORS = ("masked_squared_error", "_masked_squared_error_backward")
SIZES = (2, 3, 1, 5, 4, 7, 1, 2, 3, 16, 17, 0)
WEIGHTS = (2.0, 1.0, 0.0, 0.5, -1.5, 3)
DELTAS = (None, 1.0, 0.5, 2.0, 0.05, 1e-4, 100.0)


def some_shape(c, rank=None):
    rank = c.pick((3, 2, 1, 3, 4, 3, 0, 5)) if rank is None else rank
    sizes = [c.pick(SIZES if rank < 4 else SIZES[:4]) for _ in range(rank)]
    if rank and c.chance(0.03):  # more than a block of columns
        sizes = [min(n, 2) for n in sizes[:-1]] + [c.pick((65, 1024, 1025, 1500))]
    return tuple(sizes)


def leading(c, shape, least=1, most=None):
    """A shape of the first dimensions, some of them 1."""
    rank = min(least + c.below(8), len(shape) if most is None else most)
    ones = c.byte()
    return tuple(1 if ones >> d & 1 and ones > 127 else n for d, n in enumerate(shape[:rank]))


def trailing(c, shape):
    """A shape that broadcasts to it."""
    dropped, ones = c.below(len(shape) + 1), c.byte()
    return tuple(1 if ones >> d & 1 else n for d, n in enumerate(shape[dropped:]))


def tensors(c, g, shape, rank=None, mask_shape=None, edit_shape=None):
    """prediction, target, mask, edit_mask and weighting, and which elements the mask keeps."""

    def normal(*sizes):
        return torch.randn(sizes, generator=g, dtype=torch.float64)

    scale = c.pick((1.0, 1.0, 1e-3, 30.0))
    dtype, layout = c.dtype(), c.layout()
    others = dtype, dtype, dtype, *FLOATING
    target_dtype, weight_dtype = c.pick(others), c.pick(others)
    inputs = {
        "prediction": laid((scale * normal(*shape)).to(dtype), layout),
        "target": laid((scale * normal(*shape)).to(target_dtype), c.layout()),
        **dict.fromkeys(("mask", "edit_mask", "weighting")),
    }
    on = torch.ones(shape, dtype=torch.bool)
    has, share, kind = c.below(4), c.pick((0.6, 0.9, 0.3, 0.0, 1.0)), c.mask_dtype()
    row_layout, of_mask = c.layout(), mask_shape or leading(c, shape)
    if has and len(shape):
        mask = torch.rand(of_mask, generator=g) < share
        on = align_leading(mask, inputs["prediction"]).expand(shape)
        inputs["mask"] = laid(mask_values(mask, kind), row_layout)
    has, kind, of_edit = c.below(2), c.mask_dtype(), edit_shape or leading(c, shape)
    if has and len(shape):
        inputs["edit_mask"] = laid(_edit_values(of_edit, kind, g), row_layout)
    has, of_weights, signed = c.below(2), trailing(c, shape), c.below(2)
    if has:
        weights = normal(*of_weights)
        weights = weights if signed else weights.abs()
        inputs["weighting"] = laid(weights.to(weight_dtype), row_layout)
    return inputs, on


def _edit_values(shape, dtype, g):
    values = torch.rand(shape, generator=g, dtype=torch.float64)
    if dtype.is_floating_point:
        return values.to(torch.float32).to(dtype)
    return mask_values(values < 0.5, dtype)


def element_loss(c, number=True):
    loss = c.pick(("mse", *ELEMENT_LOSSES))
    delta, as_tensor, dtype = c.pick(DELTAS), c.below(2), c.pick((torch.float32, torch.float64))
    if loss == "smooth_l1" and c.below(4) == 1:
        delta = 0.0
    if loss == "mse" or delta is None:
        return {"loss": loss}
    if as_tensor:
        delta = torch.tensor(delta, dtype=dtype)
    return {"loss": loss, "delta": delta}


def upstream(c, g, shape):
    """Of both signs, not contiguous."""
    if c.below(4) == 1:
        return None
    return torch.randn((*shape, 2), generator=g)[..., 1]


def with_poison(inputs, on, kind):
    """The same with garbage in all that belongs to no element that is on."""
    bad = dict(inputs)
    for name in ("prediction", "target"):
        bad[name] = poisoned(inputs[name], ~on, kind)
    if inputs["weighting"] is not None:
        shape = inputs["weighting"].shape
        padded = (1,) * (on.dim() - len(shape)) + tuple(shape)
        bad["weighting"] = poisoned(inputs["weighting"], ~used_by(on, padded).reshape(shape), kind)
    if inputs["edit_mask"] is not None:
        edit = inputs["edit_mask"]
        padded = tuple(edit.shape) + (1,) * (on.dim() - edit.dim())
        bad["edit_mask"] = poisoned(edit, ~used_by(on, padded).reshape(edit.shape), kind)
    return bad


def check_all(c, function, inputs, on, grad, options, reference_options=None):
    """function against the reference, and against garbage. What both call by another name is
    translated by whoever calls this."""
    expected = reference_options or options
    actual = evaluate(function, inputs, grad, **options)
    truth = evaluate(reference.masked_squared_error, widened(inputs), grad, **expected)
    if not is_close(actual, truth):
        given = {**inputs, **{k: expected[k] for k in ("loss", "delta") if k in expected}}
        rest = {k: v for k, v in expected.items() if k not in ("loss", "delta")}
        assert_all_accurate(actual, Expected(given, grad, **rest), function.__name__)
    bad = with_poison(inputs, on, c.poison())
    assert_bits(evaluate(function, bad, grad, **options), actual, "garbage")
    c.saw(*OPERATORS, calls=2)
    return actual


def say(c, inputs, options, grad=None):
    for name, value in {**inputs, **options}.items():
        if isinstance(value, torch.Tensor) and value.dim():
            value = f"{str(value.dtype)[6:]}{list(value.shape)}/{value.stride()}"
        c.said[name] = value
    c.said["grad"] = None if grad is None else list(grad.shape)


def operator(c):
    """What the losses call, with every argument."""
    shape, g = some_shape(c), c.generator()
    inputs, on = tensors(c, g, shape)
    options = element_loss(c)
    options |= {"foreground_weight": c.pick(WEIGHTS), "background_weight": c.pick(WEIGHTS[::-1])}
    options["reduction"] = c.pick(REDUCTIONS)
    if not shape and options["reduction"] in ("token", "token_sum"):
        options["reduction"] = "none"
    results = {"none": shape, "token": shape[:-1]}
    grad = upstream(c, g, results.get(options["reduction"], ()))
    say(c, inputs, options, grad)
    check_all(c, masked_squared_error, inputs, on, grad, options)


# --- the losses ----------------------------------------------------------------------------------


def _token_shapes(c):
    """[B, T, C], and what its masks may be."""
    shape = some_shape(c, 3)
    ones = c.below(8)
    broadcast = (1 if ones == 1 else shape[0], 1 if ones == 2 else shape[1])
    return shape, broadcast


def _normalizer(c):
    value, as_tensor = c.pick((None, None, None, 7, 0.25, 3.5, 0.0)), c.below(2)
    return torch.tensor(value) if value is not None and as_tensor else value


def _translated(inputs, pred="model_pred", mask="attention_mask"):
    names = {"prediction": pred, "mask": mask}
    return {names.get(name, name): value for name, value in inputs.items()}


def _over(loss, normalizer):
    """The reference of a sum, divided by a normalizer; 0 where that is 0."""
    number = float(normalizer)
    return loss / number if number else loss * 0


def token_losses(c):
    """masked_edit_token_mean_loss, its module and compute_loss_multi_resolution."""
    shape, masks = _token_shapes(c)
    g = c.generator()
    inputs, on = tensors(c, g, shape, mask_shape=masks, edit_shape=masks)
    how = element_loss(c)
    fg, bg = c.pick(WEIGHTS), c.pick(WEIGHTS[::-1])
    reduction, default = c.pick(("mean", "sum", "none")), c.pick(("unit", "foreground"))
    which, normalizer = c.below(3), _normalizer(c) if reduction == "mean" else None
    if which == 2:
        fg, bg, reduction, default = 2.0, 1.0, "mean", "unit"
    say(c, inputs, {**how, "fg": fg, "bg": bg, "reduction": reduction, "which": which})
    c.said["normalizer"] = normalizer
    grad = upstream(c, g, shape[:2] if reduction == "none" else ())
    module = mle.AttentionMaskMseLoss(fg, bg, reduction=reduction, edit_mask_default=default, **how)
    if which == 0:
        keywords = {"reduction": reduction, "edit_mask_default": default, **how}

        def call(**tensors):
            given = _translated(tensors)
            return mle.masked_edit_token_mean_loss(
                **given, foreground_weight=fg, background_weight=bg, normalizer=normalizer,
                **keywords,
            )  # fmt: skip
    elif which == 1:

        def call(**tensors):
            return module(**_translated(tensors), normalizer=normalizer)
    else:

        def call(**tensors):
            given = _translated(tensors)
            return mle.compute_loss_multi_resolution(**given, normalizer=normalizer, **how)

    _check_loss(c, call, inputs, on, grad, how, normalizer, "token_sum", reduction, fg, bg, default)


def element_losses(c):
    """MaskEditLoss, MseLoss, masked_mse and masked_sse."""
    which = c.below(4)
    shape, masks = _token_shapes(c) if which == 0 else (some_shape(c), None)
    g = c.generator()
    inputs, on = tensors(c, g, shape, mask_shape=masks, edit_shape=masks)
    how, reduction = element_loss(c), c.pick(("mean", "sum", "none"))
    fg, bg, default = c.pick(WEIGHTS), c.pick(WEIGHTS[::-1]), "foreground"
    if which:
        fg = bg = 1.0
        inputs["edit_mask"] = None
    if which > 1:
        inputs["weighting"] = None
        reduction = c.pick(("mean", "batch_mean", "sum"))
        if inputs["mask"] is None:
            inputs["mask"], which = on, which if len(shape) else 1
            reduction = reduction if len(shape) else "sum"
    normalizer = _normalizer(c) if reduction in ("mean", "batch_mean") else None
    say(c, inputs, {**how, "fg": fg, "bg": bg, "reduction": reduction, "which": which})
    c.said["normalizer"] = normalizer
    grad = upstream(c, g, shape if reduction == "none" else ())

    def call(prediction, target, mask, edit_mask, weighting):
        pair, selects = (prediction, target), {"attention_mask": mask, "normalizer": normalizer}
        if which == 0:
            module = mle.MaskEditLoss(fg, bg, **how)
            return module(*pair, weighting, edit_mask, reduction, **selects)
        if which == 1:
            return mle.MseLoss(reduction, **how)(*pair, weighting, edit_mask=mask, **selects)
        function = mle.masked_mse if which == 2 else mle.masked_sse
        return function(*pair, mask, reduction=reduction, normalizer=normalizer, **how)

    _check_loss(c, call, inputs, on, grad, how, normalizer, "sum", reduction, fg, bg, default)


def _check_loss(c, call, inputs, on, grad, how, normalizer, total, reduction, fg, bg, default):
    """total: the operator's reduction that a normalizer divides."""
    if inputs["edit_mask"] is None:
        bg = 1.0 if default == "unit" else fg
    names = {"sum": "token_sum", "none": "token"} if total == "token_sum" else {}
    expected = {"reduction": names.get(reduction, reduction), **how}
    expected |= {"foreground_weight": fg, "background_weight": bg}
    if normalizer is None:
        call.__name__ = "loss"
        check_all(c, call, inputs, on, grad, {}, expected)
        return
    # A loss over a normalizer is a sum whose incoming gradient is divided.
    grad = torch.ones((), dtype=torch.float64) if grad is None else grad.double()
    expected["reduction"] = total
    scaled = _over(grad, normalizer)

    actual = evaluate(call, inputs, grad)
    actual["loss"] = actual["loss"].double() * float(normalizer)
    actual["loss"] = actual["loss"].to(reference.accumulate_dtype(*list(inputs.values())[:2]))
    truth = evaluate(reference.masked_squared_error, widened(inputs), scaled, **expected)
    if not float(normalizer):
        truth["loss"] = truth["loss"] * 0
    if not is_close(actual, truth):
        given = {**inputs, **how}
        rest = {k: v for k, v in expected.items() if k not in how}
        rule = Expected(given, scaled, **rest)
        if not float(normalizer):
            rule.truth["loss"] = truth["loss"]
        # One rounding more, of the quotient.
        rule.relative_error["loss"] += 2 * torch.finfo(actual["loss"].dtype).eps
        assert_all_accurate(actual, rule, "with a normalizer")
    bad = evaluate(call, with_poison(inputs, on, c.poison()), grad)
    bad["loss"] = (bad["loss"].double() * float(normalizer)).to(actual["loss"].dtype)
    assert_bits(bad, actual, "garbage")
    c.saw(*OPERATORS, calls=2)
