# SPDX-License-Identifier: BSD-3-Clause
"""The bits of every operator, public function and module depend on its arguments alone.

Sums that ATen's products make may be cut otherwise for another number of threads: calls that have
such products are held to a bound there, and to their bits everywhere else.
"""

import functools
import threading

import bit_conditions
import pytest
import torch
from accuracy import assert_same_bits
from bit_calls import has_products, table
from bit_conditions import differing_bits, largest_difference

import masked_loss_ext as mle

pytestmark = pytest.mark.slow

SIZES = ("small", "wide", "many")
PRODUCTS_DIFFER = 1e-5  # of the largest number of a tensor
LEVELS_DIFFER = 2e-6  # twice what DESIGN.md says of one: float32 beside the truth
HALF = 2**-7  # a rounding of bfloat16, for what is rounded to it


@functools.cache
def calls(sizes=("small",)):
    return table(sizes)


@functools.cache
def expected(sizes=("small",)):
    torch.set_num_threads(1)
    return {name: call() for name, call in calls(sizes).items()}


def without_random():
    return {name: call for name, call in calls().items() if not call.is_random()}


def assert_all_same(found, sizes=("small",), integers=False):
    assert found
    for name, runs in found.items():
        right = expected(sizes)[name]
        if integers:
            right = bit_conditions.as_integers(right)
        different = [differing_bits(right, run) for run in runs]
        assert not any(different), f"{name}: {different} bits differ"


def test_any_number_of_threads():
    found = bit_conditions.threads(calls(SIZES))
    ours = {name: runs for name, runs in found.items() if not has_products(name)}
    assert len(ours) > 100
    assert_all_same(ours, SIZES)
    for name in found.keys() - ours.keys():
        for run in found[name]:
            difference = largest_difference(expected(SIZES)[name], run)
            assert difference < PRODUCTS_DIFFER, f"{name}: {difference:.1e}"


def test_a_hundred_repeats():
    torch.set_num_threads(2)
    names = [name for name in calls() if name.startswith("operator")]
    for name in names:
        first, *others = (calls()[name]() for _ in range(100))
        assert not any(differing_bits(first, run) for run in others), name


def test_every_call_twice():
    assert_all_same(bit_conditions.repeats(calls(), 2))


@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms(warn_only):
    """Fresh memory is NaN there: every element of every result is written."""
    torch.set_num_threads(1)
    assert_all_same(bit_conditions.deterministic(calls(), warn_only))


def test_large_gradients_in_memory_that_is_not_zero():
    """Elsewhere rows that do not count are left as untouched pages."""
    x = torch.randn(300, 20_000)
    off = torch.arange(300) % 3 > 0
    mle_calls = {
        "mse": lambda p: mle.masked_mse(p, torch.zeros_like(p), ~off),
        "cross entropy": lambda p: mle.masked_cross_entropy(p, off.long(), ~off),
    }

    def gradients():
        leaf = x.clone().requires_grad_()
        return {n: [torch.autograd.grad(f(leaf), leaf)[0]] for n, f in mle_calls.items()}

    plain = gradients()
    filled = bit_conditions.deterministic(
        {"all": lambda: [g[0] for g in gradients().values()]}, False
    )
    for right, found in zip(plain.values(), filled["all"][0], strict=True):
        assert_same_bits(found, right[0])
        assert not found[off].any() and found[~off].any()


def test_after_a_fork():
    assert_all_same(bit_conditions.forked(calls()), integers=True)


def test_in_loader_workers():
    assert_all_same(bit_conditions.loader_workers(calls()), integers=True)


@pytest.mark.parametrize("same", [False, True], ids=["other_inputs", "same_inputs"])
def test_several_python_threads(same):
    torch.set_num_threads(1)
    assert_all_same(bit_conditions.python_threads(without_random(), same))


def test_backward_in_another_thread():
    torch.set_num_threads(1)
    x, y = torch.randn(64, 300), torch.randint(300, (64,))
    weight = torch.randn(300, 300) / 17

    def graph():
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = mle.MseLoss()(leaves[0], leaves[1][:64]) + mle.masked_cross_entropy(leaves[0], y)
        return loss + mle.masked_linear_cross_entropy(*leaves, y), leaves

    right = torch.autograd.grad(*graph())
    graphs, found = [graph() for _ in range(20)], []
    worker = threading.Thread(target=lambda: found.extend(torch.autograd.grad(*g) for g in graphs))
    worker.start()
    losses = [graph()[0] for _ in range(20)]
    worker.join()
    assert len(found) == 20
    for grads in found:
        assert not differing_bits(right, grads)
    assert not any(differing_bits([losses[0].detach()], [loss.detach()]) for loss in losses)


def test_instruction_set_levels(tmp_path):
    """Not the same bits: vectors add in another order, and fuse products. How far apart they are is
    bounded by what each may be off. Of the operators: all else is made of them."""
    results = [bit_conditions.at_level(level, tmp_path / level) for level in bit_conditions.LEVELS]
    if len({found.pop("level") for found in results}) == 1:
        pytest.skip("this machine has one level")
    for name in results[0]:
        for found in results[1:]:
            for one, other in zip(results[0][name], found[name], strict=True):
                bound = HALF if one.element_size() == 2 else LEVELS_DIFFER
                difference = largest_difference([one], [other])
                assert difference <= bound, f"{name}: {difference:.1e}"
                if not one.is_floating_point():
                    assert torch.equal(one, other), name


def test_one_bit_shows():
    """Shows that the tests above can fail."""
    a = torch.ones(3)
    b = torch.nextafter(a, torch.tensor([1.0, 2.0, 1.0]))
    assert differing_bits([a], [b]) == 1 and largest_difference([a], [b]) == 2**-23
    assert differing_bits([a], [a.clone()]) == 0
    with pytest.raises(AssertionError, match="bits differ"):
        name = next(iter(calls()))
        assert_all_same({name: [[x * 1.5 for x in expected()[name]]]})
