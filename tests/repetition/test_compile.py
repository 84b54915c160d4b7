# SPDX-License-Identifier: BSD-3-Clause
"""The repetition operators and torch.compile: torch.library's checks, one graph over sizes."""

import pytest
import torch
from repetition_cases import both, same
from torch._dynamo.utils import counters

counts_op = torch.ops.masked_loss_ext.repetition_counts.default
links_op = torch.ops.masked_loss_ext.repetition_links.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("op", [counts_op, links_op])
def test_opcheck(op):
    tokens = torch.randint(3, (3, 20))
    torch.library.opcheck(op, (tokens,))
    torch.library.opcheck(op, (tokens.int().T.contiguous().T, torch.rand(3, 20) - 0.3, 2))
    torch.library.opcheck(op, (tokens[:0], None, 30))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_over_sizes(backend):
    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend=backend)
    for rows, size in ((4, 30), (3, 50), (7, 3)):
        tokens, valid = torch.randint(2, (rows, size)), torch.rand(rows, size) < 0.9
        same(compiled(tokens, valid, 3), both(tokens, valid, 3))
    assert counters["stats"]["unique_graphs"] == 1


def test_fakes_have_the_shapes_of_the_results():
    for shape in ((2, 9), (0, 4), (3, 0)):
        tokens = torch.zeros(shape, dtype=torch.int32)
        for op in (counts_op, links_op):
            real, fake = op(tokens), op(tokens.to("meta"))
            assert [t.shape for t in real] == [t.shape for t in fake]
            assert [t.dtype for t in real] == [t.dtype for t in fake]


def test_a_gradient_passes_by():
    # Nothing here is differentiable, and nothing complains of inputs that are.
    valid = torch.ones(1, 5, requires_grad=True)
    results = both(torch.zeros(1, 5, dtype=torch.int64), valid, 2)
    assert not any(result.requires_grad for result in results)
