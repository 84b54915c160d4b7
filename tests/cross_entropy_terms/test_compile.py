# SPDX-License-Identifier: BSD-3-Clause
"""cross_entropy_terms: torch.library's checks, one graph over changing sizes and temperatures."""

import pytest
import torch
from cases_terms import BY_NAME, make
from torch._dynamo.utils import counters

from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

op = torch.ops.masked_loss_ext.cross_entropy_terms.default
backward_op = torch.ops.masked_loss_ext._cross_entropy_terms_backward.default
CHECKED = ["rank_2", "scaled_only_t1"]
SIZES = [(3, 5, 11), (4, 9, 30), (7, 11, 1030)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def op_arguments(name):
    a = make(BY_NAME[name], torch.float32)
    temperature = None if a["temperature"] is None else torch.tensor(a["temperature"])
    links = a.get("links", (None, None))
    tensors = (a["logits"], a["target"], a.get("mask"), temperature, a.get("classes"), *links)
    return tensors, a["ignore_index"], a["unscaled"]


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck(name):
    tensors, ignore_index, unscaled = op_arguments(name)
    tensors[0].requires_grad_()
    torch.library.opcheck(op, (*tensors, ignore_index, unscaled))
    results = op(*tensors, ignore_index, unscaled)
    grads = [torch.ones_like(r) if r.numel() else None for r in results[:6]]
    torch.library.opcheck(backward_op, (*grads, *tensors, results[-1].detach(), ignore_index))


def test_trailing_defaults():
    (x, target, *_), *_ = op_arguments("all")
    x.requires_grad_()
    full = op(x, target, None, None, None, None, None, -100, True)
    for short in (op(x, target), op(x, target, None), op(x, target, unscaled=True)):
        for ours, theirs in zip(short, full, strict=True):
            assert torch.equal(ours, theirs)
        ours, theirs = (
            torch.autograd.grad(r[2].sum(), x, retain_graph=True) for r in (short, full)
        )
        assert torch.equal(*ours, *theirs)


def batch(rows, tokens, classes):
    g = torch.Generator().manual_seed(rows * tokens)
    logits = torch.randn(rows, tokens, classes, generator=g).requires_grad_()
    target = torch.randint(0, 3, (rows, tokens), generator=g)
    target[0, :2] = -100
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    before = torch.arange(-1, tokens - 1, dtype=torch.int32).expand(rows, -1)
    after = torch.full((rows, tokens), tokens, dtype=torch.int32)
    return logits, target, mask, torch.tensor(0.5 + rows), (before, after)


def everything(x, y, m, t, links):
    asked = torch.stack([torch.where(m, y, -1), torch.zeros_like(y)], -1)
    terms = cross_entropy_terms(x, y, m, temperature=t, classes=asked, links=links)
    return sum((i + 1) * term.sum() for i, term in enumerate(terms))


LOSSES = {
    "everything": everything,
    "plain": lambda x, y, m, t, links: cross_entropy_terms(x, y, m).log_prob.sum(),
    "scaled": lambda x, y, m, t, links: sum(
        term.sum() for term in cross_entropy_terms(x, y, temperature=t, unscaled=False)[:2]
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_over_three_sizes(name):
    compiled = torch.compile(LOSSES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        arguments = batch(*size)
        results = []
        for function in (compiled, LOSSES[name]):
            loss = function(*arguments)
            results.append([loss, *torch.autograd.grad(loss, arguments[:1])])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1
