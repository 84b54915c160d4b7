# SPDX-License-Identifier: BSD-3-Clause
"""Threads: what is ours has the same bits for any number of them, where ATen's products do."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_same_bits

import masked_loss_ext as mle

THREADS = (1, 2, 3)
SHAPES = [(37, 8, 50), (200, 64, 1003), (3, 16, 20001), (130, 96, 4099)]  # rows, width, classes


def layer(shape, dtype):
    g = torch.Generator().manual_seed(2)
    rows, width, classes = shape
    h, w = torch.randn(rows, width, generator=g), torch.randn(classes, width, generator=g)
    y, mask = torch.randint(0, classes, (rows,), generator=g), torch.rand(rows, generator=g) < 0.7
    mask[0] = True
    return h.to(dtype), w.to(dtype), torch.randn(classes, generator=g).to(dtype), y, mask


def products(h, w, b, y, mask):
    """Those that a call of one chunk makes, of its own sizes."""
    kept = h[mask]
    logits = F.linear(kept, w, b)
    g = torch.softmax(logits.float(), -1).to(h.dtype)
    return logits, g @ w, g.T @ kept, g.sum(0)


def results(h, w, b, y, mask, reduction, statistics):
    leaves = [x.detach().requires_grad_() for x in (h, w, b)]
    found = mle.masked_linear_cross_entropy(
        *leaves[:2], y, mask, bias=leaves[2], reduction=reduction, return_stats=statistics
    )
    loss, outputs = found, [found]
    if statistics:
        loss, stats = found
        outputs = [loss, stats.lse, stats.entropy, stats.log_prob]
        loss = sum(x.sum() for x in outputs)
    return [x.detach() for x in outputs] + list(torch.autograd.grad(loss.sum(), leaves))


def with_threads(function, *args):
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(function(*args))
    return found


def all_equal(runs):
    return all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_bits_where_the_products_have_them(shape, dtype, statistics, reduction):
    """Elsewhere the same to rounding: MKL may cut a product differently for other threads. So may
    oneDNN one of bfloat16, which rounding mostly hides: equal bits of theirs say nothing there."""
    arguments = layer(shape, dtype)
    theirs = with_threads(products, *arguments)
    ours = with_threads(results, *arguments, reduction, statistics)
    for run in ours[1:]:
        for a, b in zip(run, ours[0], strict=True):
            if all_equal(theirs) and dtype != torch.bfloat16:
                assert_same_bits(a, b)
            else:
                loose = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}
                torch.testing.assert_close(a, b, **loose)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_around_the_products_is_the_same(dtype):
    """Of a head of width 1 no product has a sum to cut: all is ours but the sums over rows."""
    h, w, b, y, mask = layer((300, 1, 17000), dtype)
    for statistics in (False, True):
        runs = with_threads(results, h, w, b, y, mask, "none", statistics)
        for run in runs[1:]:
            for a, b_ in zip(run[:-3], runs[0][:-3], strict=True):
                assert_same_bits(a, b_)


def test_twice_the_same_bits():
    arguments = layer(SHAPES[1], torch.float32)
    for reduction in ("mean", "none"):
        first, second = (results(*arguments, reduction, False) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
