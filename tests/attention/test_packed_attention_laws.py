# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention: what is masked has no say; compiled graphs; what is refused."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from packed_cases import (
    LAYOUTS,
    MODES,
    by_definition,
    compare,
    layout_of,
    operands,
    options_of,
    with_gradients,
)

import masked_loss_ext as mle
from masked_loss_ext.attention.attend import on_compacted

attend = mle.packed_attention


# --- what is masked has no say -------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["slices", "blocks", "sdpa"])
def test_what_is_stored_in_dropped_tokens_reaches_nothing(backend, mode, value):
    layout = layout_of("some_dropped")
    options = options_of(mode, layout) | ({"window": (50, 50)} if backend == "blocks" else {})
    backend = "slices" if backend == "blocks" else backend
    clean = operands(layout.padded_len)
    dead = ~layout.visible.unsqueeze(-1)
    poisoned = [x.masked_fill(dead, value) for x in clean]
    grad = torch.randn(1, 2, layout.padded_len, 6, dtype=torch.float64)

    def function(*x):
        return attend(*x, layout, backend=backend, **options)

    expected = with_gradients(function, clean, grad)
    found = with_gradients(function, poisoned, grad.masked_fill(dead, value))
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
        assert (x.masked_fill(~dead, 0) == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_flex_reads_no_nan(mode):
    layout = layout_of("some_dropped")
    options = options_of(mode, layout)
    clean = operands(layout.padded_len)
    dead = ~layout.visible.unsqueeze(-1)
    poisoned = [x.masked_fill(dead, float("nan")) for x in clean]
    found = attend(*poisoned, layout, backend="flex", **options)
    assert torch.equal(found, attend(*clean, layout, backend="flex", **options))


def test_nan_in_columns_that_no_interval_holds():
    intervals = mle.RowIntervals.from_document_ids(torch.tensor([1] * 5 + [2] * 5)).rows(0, 4)
    q, k, v = operands(4, 10)
    expected = attend(q, k, v, intervals)
    k[:, :, 5:], v[:, :, 5:] = float("nan"), float("nan")
    assert torch.equal(attend(q, k, v, intervals), expected)


@pytest.mark.parametrize("mode", ["full", "causal_last"])
def test_nan_stays_in_its_sample(mode):
    layout = layout_of("nothing_dropped")
    q, k, v = operands(layout.padded_len)
    v[:, :, 2] = float("nan")
    out = attend(q, k, v, layout, mode)
    assert out[:, :, 2].isnan().all() and out[:, :, 12:].isfinite().all()


def test_nothing_visible_is_attached_to_the_graph():
    layout = mle.PackedLayout([[3], [4]], [0, 0], pad_to_multiple=8)
    for backend in ("slices", "sdpa"):
        tensors = [x.fill_(float("nan")).requires_grad_() for x in operands(8)]
        out = attend(*tensors, layout, backend=backend)
        out.sum().backward()
        assert (out == 0).all() and all((x.grad == 0).all() for x in tensors)


# --- keep_k that is not read, compiled graphs, variable length -----------------------------------


def test_slices_without_reading_keep_k(monkeypatch):
    """As where keep_k is on a GPU: blocks of mask per sample."""
    layout = layout_of("some_dropped")
    monkeypatch.setattr(type(layout), "kept_lengths", None)
    for mode in MODES:
        options = options_of(mode, layout)
        allowed = layout.intervals(**options).dense()
        compare(
            lambda *x, options=options: attend(*x, layout, backend="slices", **options),
            operands(layout.padded_len),
            allowed,
        )


def test_compiled_with_its_mask_in_one_graph():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def step(q, k, v, keep_k):
        layout = mle.PackedLayout([[7, 5], [3, 9]], keep_k, pad_to_multiple=8)
        return attend(q, k, v, layout, "causal_last")

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    tensors = operands(24)
    for keep_k in ([2, 0], [5, 9], [0, 3]):
        keep_k = torch.tensor(keep_k)
        grad = torch.randn(1, 2, 24, 6, dtype=torch.float64)
        found = with_gradients(lambda *x: compiled(*x, keep_k), tensors, grad)  # noqa: B023
        expected = with_gradients(lambda *x: step(*x, keep_k), tensors, grad)  # noqa: B023
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_flex_kernel_with_its_mask_in_one_graph():
    """Inductor's own kernel trusts the lists of blocks, which eager mode ignores."""

    def step(q, k, v, keep_k):
        layout = mle.PackedLayout([[200, 100], [100, 50]], keep_k)
        return attend(q, k, v, layout, "causal_last", "flex")

    compiled = torch.compile(step, fullgraph=True)
    tensors = [torch.randn(1, 2, 512, 16) for _ in range(3)]
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for keep_k in ([30, 4], [0, 50], [99, 0]):
        with torch.no_grad():
            found = compiled(*tensors, torch.tensor(keep_k))
        layout = mle.PackedLayout([[200, 100], [100, 50]], keep_k)
        allowed = layout.intervals("causal_last").dense()
        expected = by_definition(*(x.double() for x in tensors), allowed)
        torch.testing.assert_close(found, expected.float(), atol=2e-6, rtol=1e-5)
        assert (found[:, :, ~layout.visible] == 0).all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("mode", ["full", "causal"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_compacted_tokens_of_varlen(name, mode):
    """The kernels are CUDA's; here one written out, over what they are handed."""

    def kernel(q, k, v, cu_seqlens, max_seqlen, causal):
        assert q.is_contiguous() and cu_seqlens.dtype == torch.int32
        assert max(cu_seqlens.diff().tolist()) <= max(max_seqlen, 1)
        pieces = []
        for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
            one = [x[a:b].transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*one, is_causal=causal) if b > a else one[2]
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)

    layout = layout_of(name)
    tensors = operands(layout.padded_len, heads=4, batch=2)
    allowed = layout.intervals(mode).dense()
    causal = mode == "causal"
    compare(lambda *x: on_compacted(*x, layout, causal, 0.5, kernel), tensors, allowed, scale=0.5)


# --- refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change,error,match",
    [
        ({"backend": "fast"}, ValueError, "backend must be auto, flex, slices, varlen or sdpa"),
        ({"layout_or_intervals": [3, 4]}, TypeError, "must be a PackedLayout or RowIntervals"),
        ({"mode": "diagonal"}, ValueError, "mode must be full, causal, causal_last or prefix"),
        ({"mode": "prefix"}, ValueError, "prefix must be given"),
        ({"backend": "varlen"}, ValueError, "backend 'varlen' must be on CUDA, got cpu"),
        ({"q": torch.zeros(2, 16, 8)}, ValueError, r"q must be \[B, H, S, D\], got \[2, 16, 8\]"),
        ({"q": torch.zeros(1, 2, 24, 8)}, ValueError, "q must be as long as the mask, S = 16"),
        ({"k": torch.zeros(1, 2, 16, 4)}, ValueError, "k must have B and D of q"),
        ({"k": torch.zeros(1, 3, 16, 8)}, ValueError, "heads that divides the 2 of q, got 3"),
        ({"k": torch.zeros(1, 2, 16, 8).double()}, ValueError, "k must have dtype and device"),
        ({"k": torch.zeros(1, 2, 16, 8).long()}, ValueError, "k must be a floating tensor"),
        ({"v": torch.zeros(1, 1, 16, 8)}, ValueError, "v must have B, H and S of k"),
        (
            {name: torch.zeros(1, 2, 16, 8, device="meta") for name in ("q", "k", "v")},
            ValueError,
            r"must be on the device of q \(meta\), got cpu",
        ),
        ({"v": None}, TypeError, "v must be a torch.Tensor"),
    ],
)
def test_wrong_arguments(change, error, match):
    given = {name: torch.zeros(1, 2, 16, 8) for name in ("q", "k", "v")}
    given |= {"layout_or_intervals": mle.PackedLayout([[5, 6]], [2], pad_to_multiple=16)}
    with pytest.raises(error, match=match):
        attend(**given | change)


def test_wrong_use_of_intervals_and_flex():
    intervals = mle.RowIntervals.causal(16)
    x = torch.zeros(1, 2, 16, 8)
    with pytest.raises(ValueError, match="mode must be left out with RowIntervals"):
        attend(x, x, x, intervals, "causal")
    with pytest.raises(ValueError, match="'slices' must have a PackedLayout"):
        attend(x, x, x, intervals, backend="slices")
    with pytest.raises(ValueError, match="'flex' must be without gradient on the CPU"):
        attend(x.requires_grad_(), x, x, intervals, backend="flex")
    with torch.no_grad():
        assert (attend(x, x, x, intervals, backend="flex") == 0).all()
    batched = mle.RowIntervals(*torch.zeros(2, 3, 1, 16, dtype=torch.int32), 16)
    with pytest.raises(ValueError, match="must have the B of q, 1, or none, got 3"):
        attend(x, x, x, batched)
