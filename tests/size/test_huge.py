# SPDX-License-Identifier: BSD-3-Clause
"""More than 2^31 elements in bfloat16 of which every one counts: ``make test ARGS='-m huge'``, some
minutes and up to 14 GB. Values and gradients are those of the reference, a slice at a time."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from untouched import untouched

import masked_loss_ext as mle

pytestmark = pytest.mark.huge
COLUMNS = 65_536
ROWS = 2**31 // COLUMNS + 65  # 2^31 + 2^22 elements, 4.3 GB
SLICE = 1024
PLACES = [slice(0, 3), slice(2**31 // COLUMNS - 2, 2**31 // COLUMNS + 2), slice(ROWS - 3, ROWS)]


def need(gigabytes):
    """Of memory that is free now: others may be running."""
    text = Path("/proc/meminfo").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("MemAvailable:")]
    available = int(line.split()[1]) / 10**6
    if available < gigabytes:
        pytest.skip(f"{gigabytes} GB of memory are needed, {available:.1f} are available")


def dense():
    """Four slices of numbers again and again: no two neighbours are alike."""
    base = torch.randn(4 * SLICE + 1, COLUMNS, generator=torch.Generator().manual_seed(0))
    base = base.bfloat16()
    filled = torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
    for start in range(0, ROWS, len(base)):
        part = filled[start : start + len(base)]
        part.copy_(base[: len(part)])
    return filled


def by_slices(function, *tensors):
    """The sum of a float64 number of each slice of rows."""
    starts = range(0, ROWS, SLICE)
    return math.fsum(
        function(*(x[start : start + SLICE] for x in tensors)).double().item() for start in starts
    )


def check_gradients(function, x, gradient, *others):
    """At both ends, and on both sides of 2^31."""
    for place in PLACES:
        rows = x.detach()[place].float().requires_grad_()
        function(rows, *(other[place] for other in others)).backward()
        expected = rows.grad / ROWS
        eps = torch.finfo(torch.bfloat16).eps
        largest = expected.abs().max().item()
        torch.testing.assert_close(gradient[place].float(), expected, rtol=eps, atol=1e-6 * largest)


def total_cross_entropy(x, target):
    return F.cross_entropy(x.float(), target, reduction="sum")


@pytest.mark.parametrize("way", ["ordinary", "inplace_backward", "both"])
def test_cross_entropy(way):
    need(10 if way == "ordinary" else 15)
    target = torch.arange(ROWS) * 7919 % COLUMNS
    x = dense().requires_grad_()
    if way == "ordinary":
        loss = mle.masked_cross_entropy(x, target)
    else:
        given = {"inplace_backward": True, "gradient_in_forward": way == "both"}
        loss = mle.masked_cross_entropy(x * 1, target, **given)
    loss.backward()
    with torch.no_grad():
        expected = by_slices(total_cross_entropy, x, target) / ROWS
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    check_gradients(total_cross_entropy, x, x.grad, target)


def test_squared_error_with_an_element_mask():
    need(14)
    x, target = dense().requires_grad_(), torch.randn(1, COLUMNS).bfloat16()
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    mask[::2, ::3] = False
    loss = mle.masked_mse(x, target.expand_as(x), mask)
    loss.backward()
    selected = by_slices(lambda m: m.sum(), mask)

    def total(x, m):
        return torch.where(m, x.float() - target.float(), 0).square().sum()

    with torch.no_grad():
        expected = by_slices(total, x, mask) / selected
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    check_gradients(lambda x, m: total(x, m) * (ROWS / selected), x, x.grad, mask)


def test_the_terms_of_a_language_model():
    """UnifiedLoss in one call: the mean is that of slices, as nothing looks across rows."""
    need(10)
    x = dense().requires_grad_()
    target = (torch.arange(ROWS) * 7919 % COLUMNS).unsqueeze(1)
    loss_fn = mle.UnifiedLoss(COLUMNS, use_ngram_penalty=False)
    loss = loss_fn(x.unsqueeze(1), target, update_state=False)
    loss.backward()

    def total(x, target):
        return loss_fn(x.unsqueeze(1), target, update_state=False) * len(x)

    with torch.no_grad():
        assert loss.item() == pytest.approx(by_slices(total, x, target) / ROWS, rel=1e-6)
    check_gradients(total, x, x.grad, target)


def test_hidden_states_of_a_head():
    """All 2^31 of them are gathered, multiplied and differentiated."""
    need(15)
    x = dense().requires_grad_()
    head = (torch.randn(16, COLUMNS, generator=torch.Generator().manual_seed(1)) / 256).bfloat16()
    target = torch.arange(ROWS) % 16
    loss = mle.masked_linear_cross_entropy(x, head, target, logits_dtype=torch.float32)
    loss.backward()

    def total(x, target):
        return F.cross_entropy(x.float() @ head.float().T, target, reduction="sum")

    with torch.no_grad():
        assert loss.item() == pytest.approx(by_slices(total, x, target) / ROWS, rel=1e-4)
    for place in PLACES:
        rows = x.detach()[place].float().requires_grad_()
        total(rows, target[place]).backward()
        expected = rows.grad / ROWS
        allowed = 0.02 * expected.abs().max().item()
        torch.testing.assert_close(x.grad[place].float(), expected, rtol=0.02, atol=allowed)


def test_a_mask_of_more_than_2_to_31_entries():
    """One true entry at the far end; nobody has touched the rows before it."""
    need(5)
    n = 2**31 + 5
    mask = torch.zeros(n, dtype=torch.bool)
    mask[-1] = True
    x = untouched(n, 2)
    x[-1] = torch.tensor([1.0, 3.0])
    loss = mle.masked_mse(x.requires_grad_(), torch.zeros(1, 2).bfloat16().expand(n, 2), mask)
    loss.backward()
    assert loss == 5 and x.grad[-1].tolist() == [1, 3] and not x.grad[:10].any()
