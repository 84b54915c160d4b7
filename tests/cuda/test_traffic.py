# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels move, counted under the simulator: every access to every element.

squared error  forward reads each selected element of prediction and target once; backward once
               more, and writes each element of a gradient once
cross entropy  forward reads the logits of a row that counts once, and that of its label twice: a
               thread per row looks it up; backward the same, and writes each of the gradient once
               both in one sweep: the logits once in all, twice where no shared memory holds a row
Where the mask of squared error is one per element, a pack of 16 bytes is read if one of its
elements is selected. Nothing of a row that does not count is read, and no input is written.
"""

import pytest
import torch
from cuda_sim import compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from simulated import counting_simulator, simulated_operator
from simulated_cross_entropy import simulated_cross_entropy, simulated_sweep

OPTIONS = (2.0, 1.0)
# rows and columns, and what each stands for
SQUARED_ERROR = {
    "one_pack": (40, 4), "packs": (9, 64), "packs_and_tail": (9, 67), "items": (3, 4100),
}  # fmt: skip
CROSS_ENTROPY = {
    "lanes": (70, 5), "warp": (9, 300), "tail": (9, 1001), "block": (5, 2500), "parts": (3, 9001),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(scope="module")
def sim():
    return counting_simulator()


@pytest.fixture(autouse=True)
def fresh_device(sim):
    yield
    sim.reset()


def half_of(rows):
    mask = torch.rand(rows) < 0.5
    mask[0], mask[-1] = True, False
    return mask


def assert_counts(actual, expected, what):
    assert torch.equal(actual, expected.to(actual.dtype).expand_as(actual)), (
        f"{what}: accesses {actual.unique().tolist()}, {(actual != expected).sum()} are wrong"
    )


def assert_accessed(sim, tensor, reads, writes, what):
    actual = sim.accesses(tensor)
    assert_counts(actual[0], torch.as_tensor(reads), f"{what} read")
    assert_counts(actual[1], torch.as_tensor(writes), f"{what} written")


def squared_error_inputs(sim, shape, dtype):
    mask = half_of(shape[0])
    tensors = [torch.randn(shape).to(DTYPES[dtype]) for _ in range(2)]
    weighting = torch.rand(shape[0], 1)
    edit_mask = torch.rand(shape[0])
    return mask, [sim.upload(one) for one in (*tensors, mask, edit_mask, weighting)]


@pytest.mark.parametrize("shape", SQUARED_ERROR)
@pytest.mark.parametrize("reduction", ["mean", "token", "none"])
@every_dtype
def test_squared_error(sim, shape, dtype, reduction):
    op = simulated_operator(sim)
    mask, arguments = squared_error_inputs(sim, SQUARED_ERROR[shape], dtype)
    once = mask[:, None].int()
    with sim.counting():
        loss, count = op.forward(*arguments, *OPTIONS, reduction)
        for tensor, name in zip(arguments, ("prediction", "target"), strict=False):
            assert_accessed(sim, tensor, once, 0, name)
        if reduction != "mean":
            assert_accessed(sim, loss, 0, 1, "loss")
    grad_loss = sim.upload(torch.rand(loss.shape))
    needs = (True, True, False)
    with sim.counting():
        grads = op.backward(grad_loss, *arguments, *OPTIONS, reduction, "mse", None, count, *needs)
        for tensor, name in zip(arguments, ("prediction", "target"), strict=False):
            assert_accessed(sim, tensor, once, 0, name)
        for grad in grads[:2]:
            assert_accessed(sim, grad, 0, 1, "gradient")


@every_dtype
def test_squared_error_with_a_mask_per_element(sim, dtype):
    op = simulated_operator(sim)
    columns = 197
    mask = torch.rand(columns) < 0.2
    data = [sim.upload(torch.randn(columns).to(DTYPES[dtype])) for _ in range(2)]
    pack = 16 // data[0].element_size()
    whole = columns // pack * pack
    packs = mask[:whole].view(-1, pack).any(1).repeat_interleave(pack)
    expected = torch.cat([packs, mask[whole:]]).int()
    assert 0 < expected.sum() < columns
    arguments = [*data, sim.upload(mask), None, None]
    with sim.counting():
        op.forward(*arguments, *OPTIONS, "mean")
        for tensor, name in zip(data, ("prediction", "target"), strict=True):
            assert_accessed(sim, tensor, expected, 0, name)


@pytest.mark.parametrize("shape", CROSS_ENTROPY)
@pytest.mark.parametrize("by", ["mask", "ignore_index"])
@every_dtype
def test_cross_entropy(sim, shape, dtype, by):
    op = simulated_cross_entropy(sim)
    rows, classes = CROSS_ENTROPY[shape]
    counts = half_of(rows)
    logits = sim.upload(torch.randn(rows, classes).to(DTYPES[dtype]))
    target = torch.randint(0, classes, (rows,))
    label = torch.nn.functional.one_hot(target, classes)
    expected = counts[:, None] * (1 + label)
    if by == "ignore_index":
        target, mask = target.masked_fill(~counts, -100), None
    else:
        mask = counts
    with sim.counting():
        call = op(logits, target, mask, statistics=by == "mask")
        assert_accessed(sim, logits, expected, 0, "logits")
    arguments = backward_arguments(call)
    with sim.counting():
        grad = op.backward_op(*arguments, True, False)[0]
        once = counts[:, None].int().expand(rows, classes)  # its log-probability is saved
        assert_accessed(sim, logits, once, 0, "logits")
        assert_accessed(sim, grad, 0, 1, "gradient")


def backward_arguments(call):
    """All but which gradients are needed; the loss is what has one."""
    grads = [call.op.upload(torch.ones(())), None, None, None]
    saved = [call.device[name] for name in ("row_sums", "entropy", "log_prob")]
    saved += [call.device["smooth_distance"], call.device["totals"]]
    return [*grads, *saved, *call.inputs, None, *call.numbers(), False, None]


@pytest.mark.parametrize("shape", CROSS_ENTROPY)
def test_cross_entropy_in_place(sim, shape):
    op = simulated_cross_entropy(sim)
    rows, classes = CROSS_ENTROPY[shape]
    counts = half_of(rows)
    logits = sim.upload(torch.randn(rows, classes), writable=True)
    target = torch.randint(0, classes, (rows,))
    expected = counts[:, None].int().expand(rows, classes)
    call = op(logits, target, counts)
    arguments = backward_arguments(call)
    with sim.counting():
        op.overwriting_op(*arguments, False)
        assert_accessed(sim, logits, expected, 1, "logits")


SWEEPS = {**CROSS_ENTROPY, "large_block": (3, 13001), "twice": (3, 25001)}


@pytest.mark.parametrize("shape", SWEEPS)
@pytest.mark.parametrize("clusters", [1, 8])
def test_cross_entropy_with_its_gradient(sim, shape, clusters):
    sweep = simulated_sweep(sim)
    rows, classes = SWEEPS[shape]
    counts = half_of(rows)
    target = torch.randint(0, classes, (rows,))
    label = torch.nn.functional.one_hot(target, classes)
    reads = 2 if shape == "twice" and clusters == 1 else 1
    for in_place in (False, True):
        logits = sim.upload(torch.randn(rows, classes), writable=in_place)
        arguments = (logits, sim.upload(target), sim.upload(counts))
        with sim.counting(), sim.clusters(clusters):
            if in_place:
                sweep.overwriting_op(*arguments)
            else:
                _, gradient = sweep.fresh_op(*arguments)
                assert_accessed(sim, gradient, 0, 1, "gradient")
            # in whole blocks each reads the label's logit
            parts = sim.launches()[-2].partition(" cluster ")[2] or 1
            expected = counts[:, None] * (reads + int(parts) * label)
            assert_accessed(sim, logits, expected, int(in_place), "logits")


def test_scaling_a_gradient(sim):
    sweep = simulated_sweep(sim)
    gradient = sim.upload(torch.randn(9, 1001), writable=True)
    for factor in (1.0, 2.0):
        number = sim.upload(torch.tensor(factor))
        with sim.counting():
            sweep.scale_op(gradient, number)
            assert_accessed(sim, gradient, int(factor != 1), int(factor != 1), "gradient")


def test_a_second_read_shows(sim):
    # the same with the formula off by one: shows that the tests above can fail
    op = simulated_operator(sim)
    mask, arguments = squared_error_inputs(sim, (9, 64), "fp32")
    with sim.counting():
        op.forward(*arguments, *OPTIONS, "mean")
        with pytest.raises(AssertionError, match="prediction read"):
            assert_accessed(sim, arguments[0], 2 * mask[:, None].int(), 0, "prediction")
        with pytest.raises(AssertionError, match="prediction written"):
            assert_accessed(sim, arguments[0], mask[:, None].int(), 1, "prediction")
    reads, writes = sim.accesses(arguments[0])
    assert reads.sum() == writes.sum() == 0
