# SPDX-License-Identifier: BSD-3-Clause
"""Squared errors of tensors that come with strides nobody would choose: too many dimensions to
merge, saved tensors that a hook gave back in another shape of memory, sizes at the end of int64.

The truth is plain PyTorch in float64.
"""

import pytest
import torch
from accuracy import Expected, assert_all_accurate, assert_same_bits, evaluate
from cases import BY_NAME, REDUCTIONS, make
from cuda_sim import compiler
from gpu_device import DEVICES, PLACES, at, need_gpu
from simulated import simulator

import masked_loss_ext as mle
from masked_loss_ext.ops.masked_squared_error import masked_squared_error
from tests.elementwise.test_values import grad_loss_for, loss_shape

forward_op = torch.ops.masked_loss_ext.masked_squared_error
backward_op = torch.ops.masked_loss_ext._masked_squared_error_backward
DIMS = 12  # a layout holds 9


def scattered(shape, seed, dtype=torch.float32):
    """Values whose memory runs through the dimensions backwards, so that no two merge."""
    g = torch.Generator().manual_seed(seed)
    order = list(range(len(shape)))[::-1]
    values = torch.randn([shape[i] for i in order], generator=g, dtype=torch.float64)
    return values.permute(order).to(dtype, memory_format=torch.preserve_format)


def twelve_dimensions(mask, edit, weighting):
    shape = (2,) * DIMS
    target = scattered(shape, 2).contiguous()
    return {
        "prediction": scattered(shape, 1),
        "target": target,
        "mask": None if mask is None else scattered(mask, 3) > -0.5,
        "edit_mask": None if edit is None else scattered(edit, 4).abs().clamp(max=1),
        "weighting": None if weighting is None else scattered(weighting, 5).abs(),
    }


CHECKERED = (2, 1) * (DIMS // 2)
MANY = {
    "plain": (None, None, None),
    "tokens": (CHECKERED[:-1], (2,) * 4, None),
    "elements": ((2,) * DIMS, None, CHECKERED),
    "everything": (CHECKERED, (2,) * DIMS, (1, *CHECKERED[:-1])),
    "channel": ((2,) * 3, None, (2,)),
    "number": (None, (1, 2, 1), ()),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", MANY)
def test_more_dimensions_than_merge(name, reduction, place):
    inputs = twelve_dimensions(*MANY[name])
    shape = {"none": (2,) * DIMS, "token": (2,) * (DIMS - 1)}.get(reduction, ())
    grad_loss = scattered(shape, 6)
    function = at(place, masked_squared_error)
    actual = evaluate(function, inputs, grad_loss, reduction=reduction)
    assert_all_accurate(actual, Expected(inputs, grad_loss, reduction=reduction), name)


def test_as_many_dimensions_as_torch_has():
    prediction = scattered((2,) * 14 + (1,) * 50, 1).requires_grad_()
    loss = mle.MseLoss()(prediction, torch.zeros_like(prediction))
    loss.backward()
    torch.testing.assert_close(loss.double(), prediction.detach().double().square().mean())
    torch.testing.assert_close(prediction.grad, 2 * prediction.detach() / 2**14)


# What a hook gives back in the place of a saved tensor.


def transposed(tensor):
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def apart(tensor):
    """Every element in a place of its own, others between."""
    storage = torch.empty((*tensor.shape, 2), dtype=tensor.dtype)
    return storage[..., 1].copy_(tensor)


def expanded(tensor):
    """A constant tensor as one number, expanded."""
    first = tensor.flatten()[:1]
    constant = tensor.numel() > 0 and bool((tensor == first).all())
    return first.reshape((1,) * tensor.dim()).expand(tensor.shape) if constant else tensor


@pytest.mark.parametrize("unpack", [transposed, apart, expanded], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "name", ["weight_all", "weight_sample", "rank_4", "samples", "pixels_long"]
)
@pytest.mark.parametrize("reduction", ["mean", "token", "none"])
def test_saved_tensors_in_other_memory(unpack, name, reduction):
    inputs = make(BY_NAME[name], torch.float32)
    if unpack is expanded:
        inputs = {
            key: None if value is None else torch.full_like(value, key != "target")
            for key, value in inputs.items()
        }
        inputs["mask"] = torch.ones_like(inputs["mask"], dtype=torch.bool)
    grad_loss = grad_loss_for(loss_shape(BY_NAME[name], reduction), torch.float32)
    expected = Expected(inputs, grad_loss, reduction=reduction)
    unpacked = []

    def give_back(tensor):
        unpacked.append(unpack(tensor))
        return unpacked[-1]

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, give_back):
        actual = evaluate(masked_squared_error, inputs, grad_loss, reduction=reduction)
    assert len(unpacked) >= 3 and any(not x.is_contiguous() for x in unpacked)
    assert_all_accurate(actual, expected, f"{name} {reduction}")


@pytest.mark.parametrize("reduction", ["token", "none"])
def test_zero_gradients_that_autograd_makes_up(reduction):
    # expanded zeros, where a function asks for gradients that nobody sends
    inputs = make(BY_NAME["weight_all"], torch.float32)
    grad_loss = torch.zeros(()).expand(loss_shape(BY_NAME["weight_all"], reduction))
    grads = evaluate(masked_squared_error, inputs, grad_loss, reduction=reduction)
    assert all((grad == 0).all() for key, grad in grads.items() if key != "loss")


def test_backward_operator_with_the_strides_of_nobody():
    inputs = make(BY_NAME["weight_all"], torch.float32)
    tensors = [*inputs.values()]
    options = (2.0, 1.0, "none", "mse", None)
    loss, count = forward_op(*tensors, *options)
    grad_loss = torch.linspace(-1, 1, loss.numel()).reshape(loss.shape)
    expected = backward_op(grad_loss, *tensors, *options, count, True, True, True)
    strange = [apart(x) for x in tensors]
    other_count = torch.stack([count, count + 1])[0]  # into a larger storage
    grads = (True, True, True)
    actual = backward_op(transposed(grad_loss), *strange, *options, other_count, *grads)
    for one, other in zip(actual, expected, strict=True):
        assert_same_bits(one.contiguous(), other, "gradient")


# Sizes.


@pytest.fixture(params=["cpu", *DEVICES])
def ops(request):
    """The operators as the device has them, while every tensor is made there; what they refuse they
    refuse before they see data, so to the simulator host memory is as good."""
    if request.param == "gpu":
        need_gpu()
    if request.param == "simulator" and compiler() is None:
        pytest.skip("the CUDA simulator needs g++, and there is none")
    simulated = request.param == "simulator"
    with torch.device("cuda" if request.param == "gpu" else "cpu"):
        yield simulator().ops if simulated else torch.ops.masked_loss_ext


HUGE = [(2**25, 2**24), (2**49,), (3, 2**48), (2**31, 2**31, 1)]


@pytest.mark.parametrize("shape", HUGE, ids=str)
def test_more_elements_than_an_offset_counts(ops, shape):
    x, number = torch.zeros(1).expand(shape), torch.tensor(1)
    text = f"prediction must have at most {2**48} elements, got "
    with pytest.raises(ValueError, match=f"^masked_squared_error: {text}"):
        ops.masked_squared_error(x, x)
    with pytest.raises(ValueError, match=f"^_masked_squared_error_backward: {text}"):
        ops._masked_squared_error_backward(
            *(torch.ones(()), x, x, None, None, None, 1.0, 1.0, "sum", "mse", None, number),
            *[False] * 3,
        )


@pytest.mark.parametrize("strides", [(2**62, 2**62, 1), (7, 2**62, 2**62)])
def test_strides_of_nothing(strides):
    x = torch.empty(0).as_strided((0, 3, 4), strides).requires_grad_()
    loss = mle.AttentionMaskMseLoss()(x, torch.zeros(0, 3, 4), torch.ones(0, 3))
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 3, 4)


def test_both_devices_refuse_the_same(ops):
    x = torch.zeros(2, 3, 4)
    bad = {
        "foreground_weight must be finite, got nan": (None, None, None, float("nan")),
        "background_weight must be finite, got inf": (None, None, None, 1.0, float("inf")),
        "mask must have the leading dimensions": (torch.ones(2, 2),),
        "edit_mask must have the leading dimensions": (None, torch.ones(1, 2)),
        "weighting must be broadcastable": (None, None, torch.ones(2, 3)),
        "mask must be of a dtype that PyTorch computes with": (
            torch.empty(2, 3, dtype=torch.int1),
        ),
        "loss must be one of mse, l1, smooth_l1, huber, pseudo_huber, got l2": (
            *(None, None, None, 1.0, 1.0, "mean", "l2"),
        ),
        r"delta must be one number \[\], got \[1\]": (
            *(None, None, None, 1.0, 1.0, "mean", "huber", torch.ones(1)),
        ),
        "delta must be float16, bfloat16, float32 or float64, got Long": (
            *(None, None, None, 1.0, 1.0, "mean", "huber", torch.tensor(1)),
        ),
        "weighting must be of a dtype": (None, None, torch.empty(4, dtype=torch.float8_e8m0fnu)),
    }
    for text, arguments in bad.items():
        with pytest.raises(ValueError, match=text):
            ops.masked_squared_error(x, x, *arguments)
    one = torch.ones(())
    for count in (torch.tensor(24, dtype=torch.int32), torch.tensor([24]), torch.tensor(24.0)):
        inputs = (one, x, x, None, None, None, 1.0, 1.0, "mean", "mse", None, count)
        with pytest.raises(ValueError, match=r"count must be an int64 number \[\], got "):
            ops._masked_squared_error_backward(*inputs, True, True, False)
