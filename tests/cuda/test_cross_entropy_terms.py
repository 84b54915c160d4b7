# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms' CUDA kernels under the simulator: every case of the table, launch regime and
dtype. Inputs are read-only there; outputs start as NaN patterns."""

import pytest
import torch
from accuracy import assert_same_bits
from cuda_sim import ORDERS, compiler

if compiler() is None:
    pytest.skip("the CUDA simulator needs g++, and there is none", allow_module_level=True)

from cases_terms import BY_NAME, CASES, FLOATING, Case, assert_agrees, make
from simulated_terms import SimulatedTerms

NAN = float("nan")
# Copies of what is not contiguous are PyTorch's, which knows no simulated device.
SMALL = [
    case
    for case in CASES
    if case.shape[-1] < 5000 and case.name != "many_rows" and case.row_layout == "contiguous"
]
# packs of 16 bytes, and elements more or less than that: lanes, both blocks, parts
LENGTHS = [(1, 0), (2, 3), (31, 1), (32, 1), (128, -1), (256, 1), (512, 1), (1024, 1), (3000, 1)]
every_dtype = pytest.mark.parametrize("dtype", FLOATING, ids=lambda d: str(d)[6:])


@pytest.fixture(scope="module")
def op():
    return SimulatedTerms()


@pytest.fixture(autouse=True)
def fresh_device(op):
    yield
    op.sim.reset()


@every_dtype
@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_agrees_with_reference(op, case, dtype):
    if case.layout == "expanded" and dtype != torch.float32:
        dtype = torch.float32  # nothing depends on both
    arguments = make(case, dtype)
    assert_agrees(op(arguments), arguments, case.name)


@every_dtype
@pytest.mark.parametrize("packs,more", LENGTHS)
def test_every_launch_regime(op, packs, more, dtype):
    """One row: beyond 1024 packs several blocks share it."""
    classes = packs * 16 // dtype.itemsize + more
    for temperature in (None, 0.8):
        case = Case("length", "", (1, 2, classes), temperature, mask=None, linked=False)
        arguments = make(case, dtype)
        assert_agrees(op(arguments), arguments, f"{classes} classes")


@pytest.mark.parametrize("name", ["all", "t1", "scaled_only", "v2049"])
def test_bits_do_not_depend_on_the_order_of_threads(op, name):
    arguments = make(BY_NAME[name], torch.float32)
    expected = op(arguments)
    for order in ORDERS[1:]:
        for key, result in op(arguments, order=order).items():
            assert_same_bits(result, expected[key], f"{key}, {order}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_do_not_count_are_not_read(op, dtype):
    arguments = make(BY_NAME["all"], dtype)
    expected = op(arguments)
    off = ~arguments["mask"]
    bad = {
        **arguments,
        "logits": arguments["logits"].masked_fill(off[..., None], NAN),
        "target": arguments["target"].masked_fill(off, 2**40),
        "classes": arguments["classes"].masked_fill(off[..., None], 2**40),
    }
    for key, result in op(bad).items():
        assert_same_bits(result, expected[key], key)


def test_a_bad_label_is_nan(op):
    """Of its row alone; nothing is read for it. So is the log-probability of a bad class."""
    arguments = make(BY_NAME["no_mask"], torch.float32)
    expected = op(arguments)
    arguments["target"][1, 11] = 37  # no other row has it for a candidate
    arguments["classes"][0, 2] = torch.tensor([2**40, 3])
    results = op(arguments)
    for name, result in results.items():
        assert result[1, 11].isnan().all(), name
        if name not in ("class_log_prob", "grad logits"):
            assert_same_bits(result[0], expected[name][0], name)
            assert_same_bits(result[1, :11], expected[name][1, :11], name)
    assert results["class_log_prob"][0, 2].isnan().tolist() == [True, False]
    assert results["grad logits"][0].isfinite().all()


def test_a_temperature_of_1_on_the_device(op):
    """The host does not look at it: both sums are taken."""
    arguments = make(BY_NAME["t1"], torch.float32)
    results = op({**arguments, "temperature": torch.tensor(1.0)})
    assert_agrees(results, arguments, "T = 1")
