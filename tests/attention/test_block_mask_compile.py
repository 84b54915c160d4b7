# SPDX-License-Identifier: BSD-3-Clause
"""The block-mask operators and torch.compile: torch.library's checks, one graph over sizes."""

import pytest
import torch
from block_masks import assert_lists, offsets_of
from torch._dynamo.utils import counters

from masked_loss_ext.ops import block_mask as layer

lists_op = torch.ops.masked_loss_ext.interval_block_lists.default
rows_op = torch.ops.masked_loss_ext.packed_rows.default
plan_op = torch.ops.masked_loss_ext.nested_dropout_plan.default


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def example(samples=2, registers=40):
    offsets = offsets_of([[60, registers]] * samples)
    kept = torch.stack([torch.full((samples,), 60), torch.arange(samples) * 5 + 3], 1)
    return offsets, kept


@pytest.mark.parametrize("transposes", [True, False])
def test_opcheck_lists(transposes):
    lo = torch.arange(70, dtype=torch.int32).expand(2, 3, 70)
    torch.library.opcheck(lists_op, (lo, lo + 9, 65, 32, 16, transposes))


@pytest.mark.parametrize("window,sinks", [((None, None), 2), ((7, None), 0), ((7, 3), 2)])
def test_opcheck_rows_and_plan(window, sinks):
    arguments = (*example(), 210, "causal", *window, None, sinks, "self")
    torch.library.opcheck(rows_op, arguments)
    torch.library.opcheck(plan_op, (*arguments, 64, 32))
    prefix = (*example(), 210, "prefix", *window, torch.tensor([3, 90]), sinks, "none")
    torch.library.opcheck(plan_op, prefix)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_over_sizes(backend):
    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def build(offsets, kept, rows):
        lo, hi, *lists = layer.nested_dropout_plan(offsets, kept, rows, "causal_last")
        more = layer.interval_block_lists(lo[None], hi[None], rows, 64, 32)
        return lo, hi, *lists, *more, *layer.packed_rows(offsets, kept, rows)

    # never 2 samples: equal to the number of segments, which PyTorch would take for a rule
    for samples, registers, rows in ((4, 40, 410), (3, 7, 300), (5, 100, 1001)):
        offsets, kept = example(samples, registers)
        lo, hi, *lists = layer.nested_dropout_plan(offsets, kept, rows, "causal_last")
        more = layer.interval_block_lists(lo[None], hi[None], rows, 64, 32)
        expected = [lo, hi, *lists, *more, *layer.packed_rows(offsets, kept, rows)]
        assert_lists(build(offsets, kept, rows), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_fakes_have_the_shapes_of_the_results():
    offsets, kept = example()
    meta = offsets.to("meta"), kept.to("meta")
    for mode in ("full", "causal", "causal_last"):
        for window in ((None, None), (3, None), (None, 3)):
            for sinks in (0, 4):
                arguments = (210, mode, *window, None, sinks)
                real = plan_op(offsets, kept, *arguments)
                fake = plan_op(*meta, *arguments)
                assert [t.shape for t in real] == [t.shape for t in fake]
                assert {t.dtype for t in (*real, *fake)} == {torch.int32}
