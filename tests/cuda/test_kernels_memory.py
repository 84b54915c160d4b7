# SPDX-License-Identifier: BSD-3-Clause
"""What the CUDA kernels touch, under the simulator: no row that is dropped, every output element.

Every other access beyond a tensor, to an input for writing or to a misaligned pack ends the process
in the tests of test_cuda_kernels.py as well.
"""

import pytest
import torch
from accuracy import Expected, assert_all_accurate, assert_same_bits
from cases import BY_NAME, FLOATING, REDUCTIONS, Case, make
from cuda_sim import ORDERS, compiler

from tests.elementwise.test_mask_laws import POISONABLE, grad_loss_with, kept, poisoned

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cuda_sim.probing import message_of_abort
from simulated import ARGUMENTS, simulated_operator

NAN, INF = float("nan"), float("inf")
LAYOUTS = {  # of the rows in test_dropped_rows_are_never_touched
    "packs": (64, torch.float32, None),
    "packs_and_tail": (65, torch.bfloat16, None),
    "elements": (3, torch.float16, None),
    "unlike_dtypes": (64, torch.bfloat16, torch.float32),
    "item_borders": (4099, torch.float32, None),
}


@pytest.fixture(scope="module")
def op():
    return simulated_operator()


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


# Dropped rows: no memory there at all


def rows_in_pieces(op, tensor, on, gap=0):
    """Uploaded row by row; what is not `on` has no memory."""
    rows = [row if keep else None for row, keep in zip(tensor, on, strict=True)]
    return op.sim.upload_rows(rows, gap)


def row_inputs(columns, dtype, target_dtype, mask):
    case = Case("rows", "", (9, columns), mask, None, (9, 1), target_dtype=target_dtype)
    inputs = make(case, dtype)
    inputs["edit_mask"] = torch.rand(9)
    on = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0, 0], dtype=torch.bool)
    inputs["mask"] = on if mask == "samples" else on[:, None] & (torch.rand(9, columns) < 0.7)
    return inputs, on


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", ["samples", "elements"])
def test_dropped_rows_are_never_touched(op, layout, mask):
    inputs, on = row_inputs(*LAYOUTS[layout], mask)
    for reduction, order in zip(REDUCTIONS, (*ORDERS, *ORDERS), strict=False):
        expected = Expected(inputs, reduction=reduction)
        pieces = dict(inputs)
        for name in ("prediction", "target"):
            pieces[name] = rows_in_pieces(op, inputs[name], on)
        if mask == "samples":  # the factors of a row that a mask per element empties are read
            for name in ("edit_mask", "weighting"):
                pieces[name] = rows_in_pieces(op, inputs[name], on)
        results, count = op(pieces, order=order, reduction=reduction)
        assert count == kept(inputs).sum()
        assert_all_accurate(results, expected, f"{layout} {mask} {reduction}")


@pytest.mark.parametrize("name", ["prediction", "target", "edit_mask", "weighting"])
def test_reading_one_of_them_ends_the_process(op, name):
    # the same with a mask that keeps them: shows that the test above can fail
    inputs, on = row_inputs(64, torch.float32, None, "samples")
    pieces = {**inputs, name: rows_in_pieces(op, inputs[name], on), "mask": None}
    text = message_of_abort(lambda: op(pieces))
    assert "out of bounds: read" in text and "squared_error_forward_kernel" in text


# Offsets beyond 32 bits


def far_apart(op, tensor, columns=False):
    """Rows, or columns, more than 2^31 elements apart."""
    gap = tensor.element_size() << 31
    pieces = tensor.T.contiguous() if columns else tensor
    try:
        far = rows_in_pieces(op, pieces, [True] * len(pieces), gap)
    except RuntimeError as error:
        pytest.skip(f"{error}: the address space is limited here")
    assert far.stride(0) > 1 << 31
    return far.T if columns else far


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("target_dtype", FLOATING[:2], ids=["unlike", "alike"])
def test_offsets_beyond_32_bits(op, columns, target_dtype):
    case = Case("far", "", (2, 2), "samples", "elements", (2, 2), target_dtype=target_dtype)
    inputs = make(case, torch.bfloat16)
    inputs["edit_mask"] = inputs["edit_mask"].half()
    inputs["mask"] = torch.tensor([[1, 1], [0, 1]], dtype=torch.uint8)
    far = {name: far_apart(op, inputs[name], columns) for name in ARGUMENTS}
    grad_loss = torch.tensor([[1.5, -2.0], [NAN, 0.75]])
    results, _ = op(far, far_apart(op, grad_loss, columns), reduction="none")
    expected = Expected(inputs, grad_loss, reduction="none")
    assert_all_accurate(results, expected, "far apart")


def test_packs_beyond_32_bits(op):
    inputs = make(Case("far", "", (2, 64), mask="everything"), torch.bfloat16)
    far = {**inputs, **{name: far_apart(op, inputs[name]) for name in ARGUMENTS[:2]}}
    for reduction in ("mean", "token", "none"):
        results, _ = op(far, reduction=reduction)
        assert_all_accurate(results, Expected(inputs, reduction=reduction), reduction)
    assert op.readers() == ["Direct BFloat16, 8"] * 6


# Poison: what the mask drops changes nothing


@pytest.mark.parametrize("case", POISONABLE, ids=lambda c: c.name)
def test_poison_changes_no_bit(op, case):
    reductions = REDUCTIONS if case.shape[1:] else ("mean", "none")
    for i, reduction in enumerate(reductions):
        inputs = make(case, FLOATING[i % 4])
        clean, count = op(inputs, grad_loss_with(inputs, reduction, 0.0), reduction=reduction)
        for value in (NAN, -INF):
            grad_loss = grad_loss_with(inputs, reduction, value)
            bad, again = op(poisoned(inputs, value), grad_loss, reduction=reduction)
            assert again == count
            for key, result in clean.items():
                assert_same_bits(bad[key], result, f"{value} in {case.name}, {reduction}: {key}")
            off = ~kept(inputs)
            for name in ("prediction", "target"):
                zeros = bad[f"grad {name}"][off]
                assert_same_bits(zeros, torch.zeros_like(zeros), f"gradient of {name} is not +0")


@pytest.mark.parametrize("name", ["prediction", "target", "edit_mask", "weighting"])
def test_poison_in_what_is_kept_shows(op, name):
    inputs = make(BY_NAME["weight_all"], torch.float32)
    inputs[name] = inputs[name].masked_fill(kept(inputs), NAN)
    for reduction in REDUCTIONS:
        results, _ = op(inputs, reduction=reduction)
        assert results["loss"].isnan().any()
        assert torch.equal(results["grad prediction"].isnan(), kept(inputs))
        assert torch.equal(results["grad weighting"].isnan(), kept(inputs) & (name != "weighting"))


# Outputs are written in full, once, and start from nothing known


@pytest.mark.parametrize(
    "case", ["all_dropped", "all_dropped_elements", "empty_rows", "holes_long"]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_zeros_are_written_where_nothing_is_kept(op, case, reduction):
    holes = Case("holes_long", "zeros at the end of items", (2, 3, 4099), "holes", None, (2, 3, 1))
    inputs = make(BY_NAME.get(case, holes), torch.bfloat16)
    inputs["weighting"] = torch.ones(())
    results, count = op(inputs, reduction=reduction)
    off = ~kept(inputs)
    assert count == (~off).sum() and off.any()
    if count == 0:
        assert_same_bits(results["loss"], torch.zeros_like(results["loss"]), "loss")
        assert_same_bits(results["grad weighting"], torch.zeros(()), "grad weighting")
    for name in ("prediction", "target"):
        zeros = results[f"grad {name}"][off]
        assert_same_bits(zeros, torch.zeros_like(zeros), f"grad {name}")
    assert not any(result.isnan().any() for result in results.values())


def test_launches_of_a_call(op):
    # two launches forward, one backward, none for gradients of nothing
    op(make(BY_NAME["one_vector"], torch.float32))
    kinds = [
        k for launch in op.sim.launches() for k in ("forward", "finish", "backward") if k in launch
    ]
    assert kinds == ["forward", "finish", "backward"]
    op.sim.reset()
    op(make(BY_NAME["no_samples"], torch.float32))
    assert not any("backward" in launch for launch in op.sim.launches())
