# SPDX-License-Identifier: BSD-3-Clause
"""Our block masks in compiled flex_attention, which trusts them: outputs, recompilations, tracing.

Eager flex_attention looks at the mask_mod alone, so only compiled calls show a wrong list.
"""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import masked_loss_ext as mle

pytestmark = pytest.mark.slow

LENGTHS = [[100, 60], [70, 60], [0, 60]]  # S = 350, in a padded 384


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def compiled():
    """One compiled flex_attention for the file; each new shape or number of intervals costs seconds
    of C++ compiler, so the cases share them."""
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def qkv(length, dtype=torch.float32, batch=1, kv_len=None):
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, 2, n, 16) for n in (length, kv_len or length, kv_len or length)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def truth(query, key, value, dense):
    """Dense attention in float64; rows that see nothing are 0."""
    query, key, value = (x.double() for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, dense)


def agrees(out, expected, dense):
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)
    seen = dense.any(-1).expand(out.shape[:-1])
    assert (out[~seen] == 0).all(), "exactly 0 where a query sees nothing"


def test_outputs_are_those_of_dense_attention(compiled):
    layout = mle.PackedLayout(LENGTHS, [13, 60, 0])
    inputs = qkv(layout.padded_len)
    assert not layout.visible.all()
    for mode in ("full", "causal", "causal_last"):
        for options in ({}, dict(window=(40, 9)), dict(dropped="self")):
            intervals = layout.intervals(mode, **options)
            dense = intervals.dense()
            expected = truth(*inputs, dense)
            for block_mask in (intervals.block_mask(), layout.block_mask(mode, **options)):
                agrees(compiled(*inputs, block_mask=block_mask), expected, dense)
    assert compiled(*inputs, block_mask=layout.block_mask())[:, :, ~layout.visible].abs().max() == 0
    shared = mle.RowIntervals.shared_prefix(90, [150, 61], seq_len=384)
    expected = truth(*inputs, shared.dense())
    agrees(compiled(*inputs, block_mask=shared.block_mask()), expected, shared.dense())


def test_batches_ragged_lengths_and_slices(compiled):
    """Three rows of a batch, the last 71 queries of 201, two intervals each."""
    inputs = qkv(201, batch=3)
    valid = mle.RowIntervals.from_padding([201, 20, 150], 201, side="left")
    mask = mle.RowIntervals.shared_prefix(90, [50, 61]) & valid
    expected = truth(*inputs, mask.dense())
    part = mask.rows(130, 201)
    out = compiled(inputs[0][:, :, 130:], *inputs[1:], block_mask=part.block_mask(64))
    agrees(out, expected[:, :, 130:], part.dense())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eager_flex_attention_and_the_dense_mask(dtype):
    """The mask_mod alone, also where compiled flex_attention has no kernel: float64."""
    layout = mle.PackedLayout(LENGTHS, torch.tensor([13, 60, 0]), pad_to_multiple=1)
    inputs = qkv(layout.padded_len, dtype)
    for mode in ("full", "causal", "causal_last"):
        dense = layout.intervals(mode).dense()
        out = flex_attention(*inputs, block_mask=layout.block_mask(mode))
        atol = 1e-14 if dtype == torch.float64 else 3e-6
        torch.testing.assert_close(out.double(), truth(*inputs, dense), rtol=0, atol=atol)
        assert (out[:, :, ~layout.visible] == 0).all()


def test_one_compilation_for_all_keep_k_and_modes(fresh_dynamo):
    """12 random keep_k, all modes, closures made anew each time."""
    counter = CompileCounterWithBackend("eager")
    attend = torch.compile(flex_attention, backend=counter, dynamic=False)
    inputs = qkv(384)
    generator = torch.Generator().manual_seed(2)
    masks = set()
    for step in range(12):
        keep_k = mle.sample_keep_k(60, 3, generator=generator)
        keep_k = keep_k if step % 2 else keep_k.tolist()
        mode = ("full", "causal", "causal_last")[step % 3]
        block_mask = mle.nested_dropout_block_mask(LENGTHS, keep_k, mode)
        attend(*inputs, block_mask=block_mask)
        masks.add(tuple(block_mask.kv_num_blocks.flatten().tolist()))
    assert counter.frame_count == 1
    assert len(masks) > 1, "the masks did differ"


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_mask_built_inside_a_compiled_function(backend, fresh_dynamo):
    def step(query, key, value, keep_k):
        block_mask = mle.nested_dropout_block_mask(LENGTHS, keep_k, "causal_last")
        return flex_attention(query * 1.0, key, value, block_mask=block_mask)

    counter = CompileCounterWithBackend(backend)
    compiled_step = torch.compile(step, backend=counter, fullgraph=True)
    inputs = qkv(384)
    for keep_k in ([13, 60, 0], [60, 60, 60], [0, 1, 2]):
        layout = mle.PackedLayout(LENGTHS, keep_k)
        dense = layout.intervals("causal_last").dense()
        out = compiled_step(*inputs, torch.tensor(keep_k))
        agrees(out, truth(*inputs, dense), dense)
    assert counter.frame_count == 1


def test_a_mask_of_other_sources_inside_a_compiled_function(fresh_dynamo):
    def step(query, key, value, ids):
        mask = mle.RowIntervals.from_document_ids(ids) & mle.RowIntervals.causal(ids.shape[-1])
        return flex_attention(query, key, value, block_mask=mask.block_mask())

    inputs = qkv(200)
    compiled_step = torch.compile(step, backend="aot_eager", fullgraph=True)
    for cut in (50, 131):
        ids = (torch.arange(200) >= cut).long()
        t = torch.arange(200)
        dense = (ids == ids[:, None]) & (t <= t[:, None])
        agrees(compiled_step(*inputs, ids), truth(*inputs, dense), dense)


def test_gradients_through_the_dense_mask_are_finite_and_zero_where_dropped():
    layout = mle.PackedLayout([[9, 7], [3, 6]], [2, 5], pad_to_multiple=32)
    inputs = [x.requires_grad_() for x in qkv(layout.padded_len, torch.float64)]
    out = F.scaled_dot_product_attention(*inputs, layout.intervals("causal_last").dense())
    assert (out[:, :, ~layout.visible] == 0).all()
    out.sin().sum().backward()
    for tensor in inputs:
        assert (tensor.grad[:, :, ~layout.visible] == 0).all() and tensor.grad.isfinite().all()


def test_one_graph_for_all_lengths(fresh_dynamo):
    """dynamic=True: layouts and intervals inside the graph, sizes that change from call to call."""

    def from_ids(ids):
        mask = mle.RowIntervals.from_document_ids(ids) & mle.RowIntervals.causal(ids.shape[-1])
        return mask.lo, mask.hi, mask.block_mask().kv_indices

    def from_cu_seqlens(cu, ids):
        mask = mle.RowIntervals.from_cu_seqlens(cu, ids.shape[-1])
        return mask.lo, mask.hi, mask.block_mask().kv_indices

    def from_keep_k(keep_k):
        layout = mle.PackedLayout(LENGTHS, keep_k)
        return layout.visible, layout.positions, layout.block_mask("causal").kv_indices

    lengths = (300, 401, 517)
    ids = [(torch.arange(n) >= n // 3).long() for n in lengths]
    cu = [torch.tensor([0, 5, n - 3]) for n in lengths]
    keep = [torch.tensor([k, 60, 0]) for k in (1, 50, 7)]
    for function, calls in (
        (from_ids, [(i,) for i in ids]),
        (from_cu_seqlens, list(zip(cu, ids, strict=True))),
        (from_keep_k, [(k,) for k in keep]),
    ):
        counter = CompileCounterWithBackend("aot_eager")
        compiled_function = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
        for call in calls:
            for ours, theirs in zip(compiled_function(*call), function(*call), strict=True):
                assert torch.equal(ours, theirs)
        assert counter.frame_count == 1, function.__name__
