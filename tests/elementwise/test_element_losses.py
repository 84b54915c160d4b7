# SPDX-License-Identifier: BSD-3-Clause
"""The losses that may stand in the place of the square, in every function that takes ``loss=``.

Worked by hand at delta 2, for d = p - t:

    d         l1    smooth_l1          huber              pseudo_huber: 4 (sqrt(1 + d^2 / 4) - 1)
    0         0     0                  0                  0
    1         1     1 / 4 = 0.25       1 / 2 = 0.5        4 (sqrt(1.25) - 1) = 0.472135955
    -2        2     2 - 1 = 1          2 (2 - 1) = 2      4 (sqrt(2) - 1) = 1.656854249
    3         3     3 - 1 = 2          2 (3 - 1) = 4      4 (sqrt(3.25) - 1) = 3.211102551

    slopes
    0         0     0                  0                  0
    1         1     1 / 2              1                  1 / sqrt(1.25) = 0.894427191
    -2        -1    -1                 -2                 -2 / sqrt(2) = -1.414213562
    3         1     1                  2                  3 / sqrt(3.25) = 1.664100589
"""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits
from torch._dynamo.utils import counters
from torch.autograd import forward_ad

import masked_loss_ext as mle
from masked_loss_ext import reference
from masked_loss_ext.ops.masked_squared_error import masked_squared_error

NAN = float("nan")
D = [0.0, 1.0, -2.0, 3.0]
VALUES = {
    "mse": [0, 1, 4, 9],
    "l1": [0, 1, 2, 3],
    "smooth_l1": [0, 0.25, 1, 2],
    "huber": [0, 0.5, 2, 4],
    "pseudo_huber": [0, 0.472135955, 1.656854249, 3.211102551],
}
SLOPES = {
    "mse": [0, 2, -4, 6],
    "l1": [0, 1, -1, 1],
    "smooth_l1": [0, 0.5, -1, 1],
    "huber": [0, 1, -2, 2],
    "pseudo_huber": [0, 0.894427191, -1.414213562, 1.664100589],
}
BENT = ("smooth_l1", "huber", "pseudo_huber")
PYTORCH = {
    "mse": lambda p, t, delta: F.mse_loss(p, t),
    "l1": lambda p, t, delta: F.l1_loss(p, t),
    "smooth_l1": lambda p, t, delta: F.smooth_l1_loss(p, t, beta=delta),
    "huber": lambda p, t, delta: F.huber_loss(p, t, delta=delta),
    "pseudo_huber": lambda p, t, c: (((p - t) ** 2 + c**2).sqrt() - c).mul(2 * c).mean() / 2,
}
every_loss = pytest.mark.parametrize("loss", VALUES)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def batch(rows=4, tokens=9, channels=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    prediction, target = (torch.randn(rows, tokens, channels, generator=g) for _ in range(2))
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    edit = torch.rand(rows, tokens, generator=g)
    return prediction.to(dtype).requires_grad_(), target.to(dtype), mask, edit


# The family, as functions of (prediction, target, mask, edit, loss=, delta=).
def _token_module(p, t, a, e, reduction="mean", **how):
    return mle.AttentionMaskMseLoss(reduction=reduction, **how)(p, t, a, e)


def _mask_edit(p, t, a, e, **how):
    return mle.MaskEditLoss(**how)(p, t, None, e, attention_mask=a)


FAMILY = {
    "function": mle.masked_edit_token_mean_loss,
    "module": _token_module,
    "sequence_mean": lambda *a, **how: _token_module(*a, reduction="sequence_mean", **how),
    "multi_resolution": mle.compute_loss_multi_resolution,
    "mask_edit": _mask_edit,
    "mse_module": lambda p, t, a, e, **how: mle.MseLoss(**how)(p, t, attention_mask=a),
    "sse": lambda p, t, a, e, **how: mle.masked_sse(p, t, a, **how),
    "masked_mse": lambda p, t, a, e, **how: mle.masked_mse(p, t, a, **how),
}
every_function = pytest.mark.parametrize("name", FAMILY)


@every_loss
@pytest.mark.parametrize("module", [masked_squared_error, reference.masked_squared_error])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_by_hand(loss, module, dtype):
    target = torch.tensor([10.0, 20, 30, 40], dtype=dtype)
    prediction = (target + torch.tensor(D, dtype=dtype)).requires_grad_()
    how = {"reduction": "none", "loss": loss, "delta": torch.tensor(2.0)}
    value = module(prediction, target, **how)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    torch.testing.assert_close(value.detach(), torch.tensor(VALUES[loss], dtype=wide))
    value.sum().backward()
    torch.testing.assert_close(prediction.grad, torch.tensor(SLOPES[loss], dtype=dtype))
    total = module(prediction, target, **{**how, "reduction": "sum"})
    torch.testing.assert_close(total.detach(), torch.tensor(float(sum(VALUES[loss])), dtype=wide))


@every_loss
@pytest.mark.parametrize("delta", [0.3, 1.0, 2.5])
def test_equals_pytorch(loss, delta):
    prediction, target, mask, _ = batch()
    ours = mle.masked_mse(prediction, target, mask, loss=loss, delta=delta)
    theirs = PYTORCH[loss](prediction[mask], target[mask], delta)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, prediction), torch.autograd.grad(theirs, prediction)
    )
    how = {"loss": loss, "delta": delta}
    plain = mle.AttentionMaskMseLoss(**how)(prediction, target, mask)
    torch.testing.assert_close(plain, theirs)


def test_smooth_l1_at_beta_0_is_l1():
    prediction, target, mask, _ = batch()
    with torch.no_grad():
        prediction[0, 0] = target[0, 0]  # slope 0 at 0
    results = []
    for how in ({"loss": "smooth_l1", "delta": 0}, {"loss": "l1"}):
        loss = mle.masked_mse(prediction, target, mask, **how)
        results.append((loss, *torch.autograd.grad(loss, prediction)))
    for one, other in zip(*results, strict=True):
        assert_same_bits(one, other)


@every_loss
@every_function
def test_every_function_takes_it(name, loss):
    arguments = batch()
    f = FAMILY[name]
    how = {"loss": loss, "delta": 0.5}
    value = f(*arguments, **how)
    grads = torch.autograd.grad(value, arguments[0])
    # the same by the weights of the squares: the ratio of this loss to a square
    d = (arguments[0] - arguments[1]).detach()
    ratio = reference.masked_squared_error(d, 0 * d, reduction="none", **how) / d.square()
    prediction = (arguments[1] + d * ratio.sqrt()).requires_grad_()
    torch.testing.assert_close(value, f(prediction, *arguments[1:]))
    in_tensor = f(*arguments, loss=loss, delta=torch.tensor(0.5))
    torch.testing.assert_close(in_tensor, value)
    torch.testing.assert_close(torch.autograd.grad(in_tensor, arguments[0]), grads)


@every_loss
@every_function
def test_poison(name, loss):
    prediction, target, mask, edit = batch()
    how = {"loss": loss, "delta": 0.5}
    value = FAMILY[name](prediction, target, mask, edit, **how)
    (clean,) = torch.autograd.grad(value, prediction)
    for poison in (NAN, float("inf")):
        bad = prediction.detach().masked_fill(~mask[..., None], poison).requires_grad_()
        spoiled = target.masked_fill(~mask[..., None], poison)
        if name != "mask_edit":  # which refuses such edit masks
            edit = edit.masked_fill(~mask, poison)
        again = FAMILY[name](bad, spoiled, mask, edit, **how)
        assert_same_bits(again, value, name)
        assert_same_bits(torch.autograd.grad(again, bad)[0], clean, name)
    assert (clean[~mask] == 0).all()


@every_loss
def test_a_nan_that_counts_is_seen(loss):
    prediction = torch.tensor([NAN, 1.0], requires_grad=True)
    value = mle.masked_mse(prediction, torch.zeros(2), torch.ones(2), loss=loss)
    (grad,) = torch.autograd.grad(value, prediction)
    assert value.isnan() and grad[0].isnan() and grad[1].isfinite()


@every_loss
def test_errors_that_overflow_as_squares(loss):
    prediction = torch.tensor([1e30, -1e30, 1e-3], requires_grad=True)
    value = masked_squared_error(prediction, torch.zeros(3), reduction="none", loss=loss)
    if loss in ("l1", "smooth_l1", "huber"):
        assert value.isfinite().all()
        slopes = torch.autograd.grad(value.sum(), prediction)[0]
        assert slopes[:2].tolist() == [1, -1]


@every_loss
def test_derivatives_of_all_orders(loss):
    g = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 2, 3, 4, generator=g, dtype=torch.float64)
    prediction.requires_grad_()
    weighting = torch.rand(2, 3, 1, generator=g, dtype=torch.float64).requires_grad_()
    target = target[:2]
    mask = torch.rand(2, 3, generator=g) < 0.7

    def f(p, w):
        return masked_squared_error(p, target, mask, None, w, loss=loss, delta=0.5)

    inputs = (prediction, weighting)
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs)
    rows = torch.vmap(torch.func.grad(lambda p, t, a: mle.masked_sse(p, t, a, loss=loss)))
    each = rows(prediction.detach(), target, mask)
    for i in range(2):
        one = prediction[i].detach().requires_grad_()
        mle.masked_sse(one, target[i], mask[i], loss=loss).backward()
        # batch_mean divides by the rows of a sample
        torch.testing.assert_close(each[i], one.grad)


@pytest.mark.parametrize("loss", BENT)
def test_delta_gets_no_gradient(loss):
    prediction, target, mask, _ = batch(dtype=torch.float64)
    delta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    for name, f in FAMILY.items():
        with pytest.raises(ValueError, match="delta must not require a gradient"):
            f(prediction, target, mask, None, loss=loss, delta=delta)
        with torch.no_grad():
            assert f(prediction, target, mask, None, loss=loss, delta=delta).isfinite(), name
    # in forward mode it has a tangent
    step = 1e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(delta.detach(), torch.ones_like(delta))
        value = mle.masked_mse(prediction.detach(), target, mask, loss=loss, delta=dual)
        tangent = forward_ad.unpack_dual(value).tangent
    sides = [
        mle.masked_mse(prediction.detach(), target, mask, loss=loss, delta=0.5 + s)
        for s in (step, -step)
    ]
    torch.testing.assert_close(tangent, (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "loss,backend", [*[(loss, "aot_eager") for loss in BENT], ("huber", "inductor")]
)
def test_one_graph_for_a_delta_that_changes(loss, backend):
    torch._dynamo.reset()
    counters.clear()
    layer = torch.nn.Linear(6, 6)

    def step(x, target, mask, edit, delta):
        prediction = layer(x)
        return mle.masked_edit_token_mean_loss(
            prediction, target, mask, edit, loss=loss, delta=delta
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows, delta in ((3, 0.5), (4, 1.0), (7, 2.0)):
        arguments = (*batch(rows), torch.tensor(delta))
        results = [f(*arguments) for f in (compiled, step)]
        torch.testing.assert_close(*results)
        grads = [torch.autograd.grad(r, [arguments[0], *layer.parameters()]) for r in results]
        torch.testing.assert_close(*grads)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("delta", [0.5, 1.0])
def test_numbers_under_compile(delta):
    torch._dynamo.reset()
    arguments = batch()
    f = mle.AttentionMaskMseLoss(loss="huber", delta=delta)
    torch.testing.assert_close(torch.compile(f, fullgraph=True)(*arguments), f(*arguments))


REFUSED = [
    ({"loss": "l2"}, ValueError, "loss must be"),
    ({"loss": "huber", "delta": 0}, ValueError, "delta must be"),
    ({"loss": "huber", "delta": NAN}, ValueError, "delta must be"),
    ({"loss": "smooth_l1", "delta": -1.0}, ValueError, "delta must be"),
    ({"loss": "pseudo_huber", "delta": "1"}, TypeError, "delta must be a number, got str"),
]
TENSORS = [
    ("huber", torch.tensor(0.0), "delta must be finite and positive, got 0"),
    ("pseudo_huber", torch.tensor(NAN), "delta must be finite and positive, got nan"),
    ("smooth_l1", torch.tensor(-1.0), "delta must be finite and not negative, got -1"),
    ("huber", torch.tensor(float("inf")), "delta must be finite and positive, got inf"),
    ("huber", torch.tensor([1.0]), r"delta must be one number \[\], got \[1\]"),
    ("huber", torch.tensor(1), "delta must be a floating tensor, got torch.int64"),
]
NAMED = {
    "function": "masked_edit_token_mean_loss",
    "module": "AttentionMaskMseLoss",
    "multi_resolution": "compute_loss_multi_resolution",
    "mask_edit": "MaskEditLoss",
    "mse_module": "MseLoss",
    "sse": "masked_sse",
    "masked_mse": "masked_mse",
}


@pytest.mark.parametrize("name", NAMED)
def test_refusals(name):
    prediction, target, mask, edit = batch()
    for how, kind, text in REFUSED:
        with pytest.raises(kind, match=f"^{NAMED[name]}: .*{text}"):
            FAMILY[name](prediction, target, mask, edit, **how)
    for loss, delta, text in TENSORS:
        with pytest.raises(ValueError, match=f"^{NAMED[name]}: {text}"):
            FAMILY[name](prediction, target, mask, edit, loss=loss, delta=delta)


def test_attributes_may_be_set_anew():
    prediction, target, mask, _ = batch()
    for module in (mle.AttentionMaskMseLoss, mle.MaskEditLoss, mle.MseLoss):
        f = module(loss="huber", delta=2.0)
        assert "loss='huber', delta=2.0" in repr(f) and "huber" not in repr(module())
        expected = module(loss="smooth_l1", delta=0.25)(prediction, target, attention_mask=mask)
        f.loss, f.delta = "smooth_l1", torch.tensor(0.25)
        torch.testing.assert_close(f(prediction, target, attention_mask=mask), expected)
