# SPDX-License-Identifier: BSD-3-Clause
"""Bad input: an error that names function, argument, rule and what was got."""

import contextlib
import gc
import math
import weakref

import numpy as np
import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext.ops import masked_squared_error as layer

P, A = torch.zeros(2, 3, 4), torch.ones(2, 3)
X, M = torch.zeros(2, 3), torch.ones(2, 3)
META = torch.zeros(2, 3, 4, device="meta")
op = torch.ops.masked_loss_ext.masked_squared_error
backward = torch.ops.masked_loss_ext._masked_squared_error_backward

token_losses = {
    "AttentionMaskMseLoss": mle.AttentionMaskMseLoss(),
    "masked_edit_token_mean_loss": mle.masked_edit_token_mean_loss,
    "compute_loss_multi_resolution": mle.compute_loss_multi_resolution,
    "MaskEditLoss": lambda p, t, a, edit_mask=None, weighting=None: mle.MaskEditLoss()(
        p, t, weighting, edit_mask, attention_mask=a
    ),
}

# what is passed, the error, the argument, what the text must hold besides
TOKEN_ARGUMENTS = [
    (([[1.0]], P, A), TypeError, "model_pred", "torch.Tensor", "got list"),
    ((P, [[1.0]], A), TypeError, "target", "torch.Tensor", "got list"),
    ((P, P.numpy(), A), TypeError, "target", "torch.Tensor", "got ndarray"),
    ((P, P, [[1, 0]]), TypeError, "attention_mask", "torch.Tensor", "got list"),
    ((P, P, A, [[1, 0]]), TypeError, "edit_mask", "torch.Tensor", "got list"),
    ((P, P, A, A, "2"), TypeError, "weighting", "torch.Tensor", "got str"),
    ((P, P, A, A, True), TypeError, "weighting", "torch.Tensor", "got bool"),
    ((P.long(), P, A), ValueError, "model_pred", "floating", "got torch.int64"),
    ((P, P.long(), A), ValueError, "target", "floating", "got torch.int64"),
    ((P.bool(), P, A), ValueError, "model_pred", "floating", "got torch.bool"),
    ((P.to(torch.complex64), P, A), ValueError, "model_pred", "floating", "got torch.complex64"),
    ((P, P[:, :2], A), ValueError, "target", "Shape mismatch", "[2, 3, 4], got [2, 2, 4]"),
    ((P, P[..., :1], A), ValueError, "target", "Shape mismatch", "[2, 3, 4], got [2, 3, 1]"),
    ((P[0], P[0], A[0]), ValueError, "model_pred", "3 dimensions [B, T, C]", "got [3, 4]"),
    ((P[None], P[None], A), ValueError, "model_pred", "3 dimensions", "got [1, 2, 3, 4]"),
    ((P, P, A[:1, :2]), ValueError, "ttention", "mask shape must be [2, 3]", "got [1, 2]"),
    ((P, P, P), ValueError, "ttention", "mask shape must be [2, 3]", "got [2, 3, 4]"),
    ((P, P, A[:, :2]), ValueError, "ttention", "mask shape must be [2, 3]", "got [2, 2]"),
    ((P, P, A.to(torch.complex64)), ValueError, "attention_mask", "bool, integer", "complex64"),
    ((P, P, A, A[:, :2]), ValueError, "edit_mask shape", "must be [2, 3]", "got [2, 2]"),
    ((P, P, A, A.to(torch.complex64)), ValueError, "edit_mask", "bool, integer", "complex64"),
    ((P, P, A, A, A), ValueError, "weighting", "broadcastable to model_pred [2, 3, 4]", "[2, 3]"),
    ((P, P, A, A, P[None]), ValueError, "weighting", "broadcastable", "got [1, 2, 3, 4]"),
    ((P, P, A, A, P.to(torch.complex64)), ValueError, "weighting", "floating", "complex64"),
    ((P, META, A), ValueError, "target", "device of model_pred (cpu)", "got meta"),
    ((P, P, META[..., 0]), ValueError, "attention_mask", "device of model_pred", "got meta"),
    ((P, P, A, META[..., 0]), ValueError, "edit_mask", "device of model_pred", "got meta"),
    ((P, P, A, A, META), ValueError, "weighting", "device of model_pred", "got meta"),
]


def check(call, kind, *texts):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert type(caught.value) is kind, f"{type(caught.value).__name__}: {caught.value}"
    for text in texts:
        assert text in str(caught.value), f"{text!r} not in {str(caught.value)!r}"


@pytest.mark.parametrize("function", token_losses)
@pytest.mark.parametrize("arguments,kind,name,rule,got", TOKEN_ARGUMENTS)
def test_token_losses(function, arguments, kind, name, rule, got):
    check(lambda: token_losses[function](*arguments), kind, f"{function}: ", name, rule, got)


def test_wording_that_callers_of_older_code_match():
    check(lambda: mle.AttentionMaskMseLoss(reduction="max"), ValueError, "Invalid reduction")
    check(lambda: mle.MseLoss("max"), ValueError, "Invalid reduction")
    check(lambda: mle.MaskEditLoss()(P, P, reduction="max"), ValueError, "Invalid reduction mode")
    check(lambda: mle.MseLoss()(P, P[:1]), ValueError, "Shape mismatch")
    check(lambda: token_losses["AttentionMaskMseLoss"](P, P, P), ValueError, "attention_mask shape")
    check(lambda: mle.compute_loss_multi_resolution(P, P, P), ValueError, "Attention mask shape")
    check(lambda: mle.masked_sse(X, X, M, reduction="none"), ValueError, "unknown reduction")
    pad = mle.pad_latents_for_multi_res
    check(lambda: pad([]), ValueError, "Cannot pad empty latent list")
    check(lambda: pad([P]), ValueError, "Expected 2D latent tensor")
    check(lambda: pad([X, X[:, :2]]), ValueError, "Channel mismatch")
    check(lambda: pad([X], 1), ValueError, "exceeds max_seq_len")


OF_TOKENS = "mean, sum, none, sequence_mean, sequence_sum or weighted_mean"
REDUCTIONS = [
    (lambda r: mle.AttentionMaskMseLoss(reduction=r), "AttentionMaskMseLoss", OF_TOKENS),
    (
        lambda r: mle.masked_edit_token_mean_loss(P, P, A, reduction=r),
        "masked_edit_token_mean_loss",
        OF_TOKENS,
    ),
    (lambda r: mle.MaskEditLoss()(P, P, reduction=r), "MaskEditLoss", OF_TOKENS),
    (lambda r: mle.MseLoss(r), "MseLoss", "mean, sum or none"),
    (lambda r: mle.masked_sse(X, X, M, reduction=r), "masked_sse", "sum, mean or batch_mean"),
    (lambda r: mle.masked_mse(X, X, M, reduction=r), "masked_mse", "sum, mean or batch_mean"),
]


@pytest.mark.parametrize("value", ["max", "", "Mean", None, 1, True, ["mean"]])
@pytest.mark.parametrize("call,function,choices", REDUCTIONS, ids=[r[1] for r in REDUCTIONS])
def test_unknown_reduction(call, function, choices, value):
    text = f"reduction must be {choices}, got {value!r}"
    check(lambda: call(value), ValueError, f"{function}: ", text)


def test_unknown_edit_mask_default():
    text = "edit_mask_default must be unit or foreground, got 'ones'"
    check(lambda: mle.AttentionMaskMseLoss(edit_mask_default="ones"), ValueError, text)
    check(
        lambda: mle.masked_edit_token_mean_loss(P, P, A, edit_mask_default="ones"),
        ValueError,
        "masked_edit_token_mean_loss: ",
        text,
    )


AUTOENCODER_ARGUMENTS = [
    (([1.0], X, M), TypeError, "x_recon must be a torch.Tensor, got list"),
    ((X, [1.0], M), TypeError, "x must be a torch.Tensor, got list"),
    ((X, X, [True]), TypeError, "mask must be a torch.Tensor, got list"),
    ((X, X, None), TypeError, "mask must be a torch.Tensor, got NoneType"),
    ((X.int(), X, M), ValueError, "x_recon must be a floating tensor, got torch.int32"),
    ((X, X.int(), M), ValueError, "x must be a floating tensor, got torch.int32"),
    ((X, X[:1], M), ValueError, "x must have the shape of x_recon [2, 3], got [1, 3]"),
    ((X, X, M[:, :2]), ValueError, "mask shape must be [2, 3]"),
    ((X, X, M.expand(2, 2, 3)[:, :1]), ValueError, "got [2, 1, 3]"),
    ((X, X, P), ValueError, "mask shape must be [2, 3]"),
    ((P, P, torch.ones(2, 4)), ValueError, "first 2 dimensions of x_recon, got [2, 4]"),
    ((X, X.to("meta"), M), ValueError, "x must be on the device of x_recon (cpu), got meta"),
    ((X, X, M.to("meta")), ValueError, "mask must be on the device of x_recon (cpu), got meta"),
]


@pytest.mark.parametrize("function", [mle.masked_sse, mle.masked_mse])
@pytest.mark.parametrize("arguments,kind,text", AUTOENCODER_ARGUMENTS)
def test_autoencoder_losses(function, arguments, kind, text):
    check(lambda: function(*arguments), kind, f"{function.__name__}: ", text)


def test_mse_loss():
    loss = mle.MseLoss()
    check(lambda: loss([1.0], X), TypeError, "MseLoss: model_pred must be a torch.Tensor, got list")
    check(lambda: loss(X.int(), X), ValueError, "MseLoss: model_pred must be a floating tensor")
    check(lambda: loss(X, X, M[:, :2]), ValueError, "MseLoss: weighting must be broadcastable")


# The operators themselves: whatever Python let through must not reach a kernel.
def call_op(prediction=P, target=P, mask=None, edit=None, weighting=None, reduction="mean"):
    return op(prediction, target, mask, edit, weighting, 2.0, 1.0, reduction)


def call_backward(grad=None, reduction="mean", count=None, **inputs):
    values = {"prediction": P, "target": P, "mask": None, "edit": None, "weighting": None, **inputs}
    count = torch.tensor(24) if count is None else count
    grad = torch.ones(()) if grad is None else grad
    options = (2.0, 1.0, reduction, "mse", None)
    return backward(grad, *values.values(), *options, count, True, True, False)


OP_ARGUMENTS = [
    (
        {"prediction": P.long()},
        "prediction must be float16, bfloat16, float32 or float64, got Long",
    ),
    ({"target": P.bool()}, "target must be float16, bfloat16, float32 or float64, got Bool"),
    ({"target": P[:1]}, "target must have the shape of prediction [2, 3, 4], got [1, 3, 4]"),
    (
        {"mask": A[:, :2]},
        "mask must have the leading dimensions of prediction [2, 3, 4], got [2, 2]",
    ),
    ({"mask": P[None]}, "mask must have the leading dimensions of prediction"),
    ({"mask": A.to(torch.complex64)}, "mask must be bool, integer or floating, got ComplexFloat"),
    ({"edit": A[:1, :2]}, "edit_mask must have the leading dimensions of prediction"),
    ({"edit": A.to(torch.complex64)}, "edit_mask must be bool, integer or floating"),
    ({"weighting": A}, "weighting must be broadcastable to prediction [2, 3, 4], got [2, 3]"),
    ({"weighting": P.long()}, "weighting must be float16, bfloat16, float32 or float64, got Long"),
    (
        {"reduction": "max"},
        "reduction must be mean, sum, batch_mean, token_sum, token or none, got",
    ),
]
TWO_DEVICES = [{"target": META}, {"mask": META}, {"edit": META}, {"weighting": META}]
MANY = torch.zeros([1] * 65)


@pytest.mark.parametrize("arguments,text", OP_ARGUMENTS)
def test_operators_called_directly(arguments, text):
    check(lambda: call_op(**arguments), ValueError, "masked_squared_error: " + text)
    check(lambda: call_backward(**arguments), ValueError, "_masked_squared_error_backward: " + text)


@pytest.mark.parametrize("arguments", TWO_DEVICES)
def test_operators_refuse_a_meta_tensor_among_others(arguments):
    for call in (call_op, call_backward):
        check(
            lambda c=call: c(**arguments),
            ValueError,
            "one device, got cpu and meta",
        )


def test_ranks_the_operator_refuses():
    check(lambda: call_op(MANY, MANY), ValueError, "at most 64 dimensions, got 65")
    number = torch.zeros(())
    check(
        lambda: call_op(number, number, reduction="token"),
        ValueError,
        "prediction must have a dimension for reduction token, got []",
    )


@pytest.mark.parametrize(
    "arguments,text",
    [
        (
            {"grad": torch.ones(2)},
            "grad_loss must have the dtype and shape of the loss, got Float [2]",
        ),
        ({"grad": torch.ones((), dtype=torch.float64)}, "grad_loss must have the dtype"),
        ({"grad": torch.ones(2, 4), "reduction": "token"}, "grad_loss must have the leading"),
        (
            {"count": torch.zeros(0, dtype=torch.int64)},
            "count must be an int64 number [], got Long [0]",
        ),
        ({"count": torch.zeros(())}, "count must be an int64 number [], got Float []"),
    ],
)
def test_backward_operator_called_directly(arguments, text):
    check(lambda: call_backward(**arguments), ValueError, "_masked_squared_error_backward: " + text)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"])
def test_masks_of_rare_dtypes_work(dtype):
    mask = torch.tensor([[1, 0, 1], [0, 0, 1.0]])
    target = torch.arange(24.0).reshape(2, 3, 4)
    rare = mask.to(getattr(torch, dtype))
    for reduction in ("mean", "none"):
        loss = layer.masked_squared_error(P, target, rare, rare, reduction=reduction)
        expected = layer.masked_squared_error(P, target, mask, mask, reduction=reduction)
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_zero_sized_batches_work(shape):
    x = torch.ones(shape, requires_grad=True)
    mask = torch.ones(shape[:2])
    for loss_fn in token_losses.values():
        loss = loss_fn(x, x.detach(), mask, mask, 2.0)
        loss.backward()
        assert loss.item() == 0 and x.grad.shape == shape
    none = mle.AttentionMaskMseLoss(reduction="none")(x, x.detach() + 1, mask)
    assert none.shape == shape[:2] and (none == 0).all()
    assert mle.masked_sse(x, x.detach(), mask).item() == 0
    assert mle.MseLoss()(x, x.detach()).item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, "1", None, torch.tensor(1.0)])
def test_a_background_weight_is_looked_at_without_an_edit_mask(value):
    """Which then takes no part."""
    loss = mle.AttentionMaskMseLoss()
    loss.background_weight = value
    for call, name in (
        (lambda: loss(P, P), "AttentionMaskMseLoss"),
        (
            lambda: mle.masked_edit_token_mean_loss(P, P, background_weight=value),
            "masked_edit_token_mean_loss",
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{name}: background_weight must be"):
            call()


def test_additive_masks_are_refused():
    mask = torch.zeros(2, 3)
    mask[0, 1:] = -torch.inf
    loss = mle.AttentionMaskMseLoss()
    with pytest.raises(ValueError, match=r"AttentionMaskMseLoss: attention_mask .* additive"):
        loss(torch.ones(2, 3, 4), torch.zeros(2, 3, 4), mask)
    with pytest.raises(ValueError, match=r"masked_mse: mask .* additive"):
        mle.masked_mse(torch.ones(2, 3), torch.zeros(2, 3), mask)


@pytest.mark.parametrize("loss", [mle.AttentionMaskMseLoss(), mle.MaskEditLoss(), mle.MseLoss()])
def test_edit_masks_are_not_looked_at_where_nothing_counts(loss):
    """An edit mask weighs: what of it belongs to padding may be anything, NaN or negative too."""
    prediction, target = torch.rand(2, 3, 4), torch.rand(2, 3, 4)
    mask = torch.tensor([[True, True, False]] * 2)
    clean = torch.tensor([[0.25, 1.0, 0.0]] * 2)
    expected = loss(prediction, target, attention_mask=mask, edit_mask=clean)
    for value in (torch.nan, -torch.inf, -1.0):
        edit_mask = clean.masked_fill(~mask, value)
        found = loss(prediction, target, attention_mask=mask, edit_mask=edit_mask)
        assert torch.equal(found, expected)


def test_a_reduction_that_was_changed_to_a_wrong_word():
    loss = mle.AttentionMaskMseLoss()
    loss.reduction = "average"
    with pytest.raises(ValueError, match="AttentionMaskMseLoss: Invalid reduction.*'average'"):
        loss(torch.ones(2, 3, 4), torch.zeros(2, 3, 4))


# Keywords: what is taken is used.
UNKNOWN = {
    "mask": "did you mean edit_mask or attention_mask?",
    "attn_mask": "did you mean attention_mask",
    "attention_masks": "did you mean attention_mask",
    "weight": "did you mean weighting",
    "sample_ids": "",
    "q": "it takes model_pred, target, ",
}


@pytest.mark.parametrize("keyword", UNKNOWN)
@pytest.mark.parametrize("cls", [mle.AttentionMaskMseLoss, mle.MaskEditLoss, mle.MseLoss])
def test_unknown_keywords(cls, keyword):
    text = f"{cls.__name__}: unexpected keyword argument {keyword}; "
    check(lambda: cls()(P, P, **{keyword: A}), TypeError, text, UNKNOWN[keyword])


NUMBERS = {
    "foreground_weight": [
        lambda v: mle.AttentionMaskMseLoss(v),
        lambda v: with_attribute(mle.AttentionMaskMseLoss(), "foreground_weight", v)(P, P, A, A),
        lambda v: mle.masked_edit_token_mean_loss(P, P, A, A, foreground_weight=v),
        lambda v: mle.MaskEditLoss(v),
        lambda v: mle.MaskEditLoss(forground_weight=v),
        lambda v: with_attribute(mle.MaskEditLoss(), "foreground_weight", v)(P, P),
    ],
    "background_weight": [
        lambda v: mle.AttentionMaskMseLoss(2.0, v),
        lambda v: with_attribute(mle.AttentionMaskMseLoss(), "background_weight", v)(P, P, A, A),
        lambda v: mle.masked_edit_token_mean_loss(P, P, A, A, background_weight=v),
        lambda v: mle.MaskEditLoss(2.0, v),
        lambda v: with_attribute(mle.MaskEditLoss(), "background_weight", v)(P, P, None, A),
    ],
    "eps": [
        lambda v: mle.AttentionMaskMseLoss(eps=v),
        lambda v: mle.masked_edit_token_mean_loss(P, P, eps=v),
    ],
    "weighting": [
        lambda v: mle.AttentionMaskMseLoss()(P, P, weighting=v),
        lambda v: mle.compute_loss_multi_resolution(P, P, A, None, v),
        lambda v: mle.MaskEditLoss()(P, P, v),
        lambda v: mle.MseLoss()(P, P, v),
    ],
}
NO_NUMBERS = ["2", [2.0], 2j, True, torch.tensor(2.0, requires_grad=True), None]


def with_attribute(module, name, value):
    setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    "name,i", [(name, i) for name, ways in NUMBERS.items() for i in range(len(ways))]
)
def test_numbers(name, i):
    call = NUMBERS[name][i]
    for value in (float("nan"), float("inf"), -float("inf"), 10**400):
        check(lambda v=value: call(v), ValueError, f": {name} must be a finite number", "got ")
    for value in NO_NUMBERS:
        if name == "weighting" and (value is None or isinstance(value, torch.Tensor)):
            continue  # a tensor is what it may be
        if value is None and name == "foreground_weight" and i == 4:
            continue  # forground_weight=None leaves it to the other spelling
        kind = type(value).__name__
        check(lambda v=value: call(v), TypeError, f": {name} must be a ", f"got {kind}")
    call(1)  # an int is a number
    call(np.float32(0.5))


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_numbers_under_torch_func(transform):
    def loss(x, fg):
        return mle.masked_edit_token_mean_loss(x, torch.zeros_like(x), A, A, foreground_weight=fg)

    call = {"grad": torch.func.grad(loss), "vmap": torch.vmap(loss, in_dims=(0, None))}[transform]
    x = P if transform == "grad" else torch.zeros(5, 2, 3, 4)
    check(
        lambda: call(x, float("nan")), ValueError, "foreground_weight must be", "finite", "got nan"
    )
    check(lambda: call(x, "2"), TypeError, "foreground_weight must be a number, got str")


def dtype_of(name, shape):
    return torch.empty(shape, dtype=getattr(torch, name))


RARE = ["int1", "uint4", "float8_e8m0fnu", "float4_e2m1fn_x2"]
NESTED = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)])
STRANGE = {
    **{name: lambda shape, name=name: dtype_of(name, shape) for name in RARE},
    "sparse": lambda shape: torch.ones(shape).to_sparse(),
    "nested": lambda shape: NESTED,
}
PLACES_FOR_TENSORS = {
    "model_pred": lambda f, x: f(x, P, A),
    "target": lambda f, x: f(P, x, A),
    "attention_mask": lambda f, x: f(P, P, x),
    "edit_mask": lambda f, x: f(P, P, A, x),
    "weighting": lambda f, x: f(P, P, A, A, x),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", PLACES_FOR_TENSORS)
@pytest.mark.parametrize("function", token_losses)
def test_strange_tensors(function, name, kind):
    shape = (2, 3) if name.endswith("mask") else (2, 3, 4)
    rule = {"sparse": "must be a dense tensor", "nested": "must be a plain tensor"}.get(
        kind, "got t"
    )
    call = PLACES_FOR_TENSORS[name]
    text = f"{function}: {name} must be "
    check(lambda: call(token_losses[function], STRANGE[kind](shape)), ValueError, text, rule)


@pytest.mark.parametrize("kind", STRANGE)
def test_strange_tensors_elsewhere(kind):
    x, mask = STRANGE[kind]((2, 3, 4)), STRANGE[kind]((2, 3))
    for f in (mle.masked_sse, mle.masked_mse):
        name = f.__name__
        check(lambda f=f: f(x, P, A), ValueError, f"{name}: x_recon must be ")
        check(lambda f=f: f(P, x, A), ValueError, f"{name}: x must be ")
        check(lambda f=f: f(P, P, mask), ValueError, f"{name}: mask must be ")
    check(lambda: mle.MseLoss()(x, P), ValueError, "MseLoss: model_pred must be ")
    check(lambda: mle.MseLoss()(P, P, x), ValueError, "MseLoss: weighting must be ")
    check(lambda: mle.MseLoss()(P, P, attention_mask=mask), ValueError, "attention_mask must be ")
    check(lambda: mle.MseLoss()(P, P, edit_mask=mask), ValueError, "MseLoss: edit_mask must be ")


def test_nan_in_a_mask():
    mask = torch.ones(2, 3)
    mask[1, 2] = torch.nan
    text = "attention_mask must be on where it is not 0, got NaN entries"
    for function in token_losses:
        check(lambda f=function: token_losses[f](P, P, mask), ValueError, f"{function}: {text}")
    check(lambda: mle.masked_mse(P, P, mask), ValueError, "masked_mse: mask must be on where")


def test_an_error_lets_its_tensors_go():
    def failing():
        prediction = torch.zeros(2, 3, 4)
        seen.append(weakref.ref(prediction))
        mle.AttentionMaskMseLoss()(prediction, P, torch.ones(7, 7))

    seen = []
    gc.disable()  # what only the cyclic collector frees is not free after an out-of-memory error
    try:
        with contextlib.suppress(ValueError):
            failing()
        assert seen[0]() is None
    finally:
        gc.enable()
