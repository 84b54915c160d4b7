# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention: every backend against attention over the dense mask, in float64."""

import pytest
import torch
import torch.nn.functional as F

import masked_loss_ext as mle
from masked_loss_ext.attention.attend_varlen import on_compacted

attend = mle.packed_attention
MODES = ["full", "causal", "causal_last", "prefix"]

# name: segment lengths, keep_k, further arguments of the layout
LAYOUTS = {
    "nothing_dropped": ([[7, 5], [3, 9]], None, {}),
    "some_dropped": ([[7, 5], [3, 9], [6, 4]], [2, 0, 9], {}),
    "middle_segment": ([[4, 6, 3], [2, 5, 4]], [2, 0], {"droppable": 1}),
    "every_segment": ([[4, 6], [5, 5]], [[2, 3], [0, 4]], {}),
    "nothing_kept": ([[4, 6], [5, 5]], [[0, 0], [3, 2]], {}),
    "aligned": ([[7, 4], [5, 3]], [1, 2], {"align_samples": 16}),
    "empty_segments": ([[0, 5], [4, 0], [0, 0]], [3, 2, 1], {}),
    "one_segment": ([[9], [6]], [4, 6], {}),
}


def layout_of(name):
    lengths, keep_k, options = LAYOUTS[name]
    return mle.PackedLayout(lengths, keep_k, pad_to_multiple=8, **options)


def options_of(mode, layout):
    prefix = [3, 99, 0][: layout.num_samples]
    return {"mode": mode} | ({"prefix": prefix} if mode == "prefix" else {})


def operands(rows, columns=None, heads=2, kv_heads=2, batch=1, dtype=torch.float64):
    g = torch.Generator().manual_seed(rows)
    columns = rows if columns is None else columns
    shapes = (batch, heads, rows, 8), (batch, kv_heads, columns, 8), (batch, kv_heads, columns, 6)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def by_definition(q, k, v, allowed, scale=None):
    """Softmax over what is allowed; 0 where nothing is."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    live = allowed.any(-1, keepdim=True)
    weights = scores.masked_fill(~allowed & live, -torch.inf).softmax(-1)
    return torch.where(live, weights, 0) @ v


def with_gradients(function, tensors, grad):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out.backward(grad)
    return [out.detach(), *(x.grad for x in leaves)]


def compare(function, tensors, allowed, **options):
    grad = torch.randn(*tensors[0].shape[:3], tensors[2].shape[3], dtype=torch.float64)
    expected = with_gradients(lambda *x: by_definition(*x, allowed, **options), tensors, grad)
    found = with_gradients(function, tensors, grad)
    for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, y, msg=lambda text, name=name: f"{name}: {text}")
    rows = allowed.any(-1)
    for x in found[:2]:
        assert (x.masked_fill(rows.unsqueeze(-1), 0) == 0).all(), "not exactly 0"
    return found


# --- against the definition ----------------------------------------------------------------------


def test_by_hand():
    """Two tokens and a dropped one; scores 0 and ln 3."""
    layout = mle.PackedLayout([[1, 2]], [1], pad_to_multiple=4)
    q = torch.tensor([1.0, 1, 1, 1]).reshape(1, 1, 4, 1).log1p() / torch.tensor(2.0).log()
    k = torch.tensor([0.0, 3.0, 5, 7]).reshape(1, 1, 4, 1)
    k[0, 0, 1] = torch.tensor(3.0).log()
    v = torch.tensor([4.0, 8.0, 100, 100]).reshape(1, 1, 4, 1)
    for backend in ("slices", "sdpa", "flex"):
        full = attend(q, k, v, layout, backend=backend).flatten()
        torch.testing.assert_close(full, torch.tensor([7.0, 7.0, 0, 0]))  # 4/4 + 3 * 8/4
        causal = attend(q, k, v, layout, "causal", backend).flatten()
        torch.testing.assert_close(causal, torch.tensor([4.0, 7.0, 0, 0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("backend", ["auto", "slices", "sdpa"])
def test_forward_and_backward(backend, name, mode):
    layout = layout_of(name)
    options = options_of(mode, layout)
    tensors = operands(layout.padded_len)
    allowed = layout.intervals(**options).dense()
    compare(lambda *x: attend(*x, layout, backend=backend, **options), tensors, allowed)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["some_dropped", "middle_segment", "nothing_kept"])
def test_flex_forward(name, mode):
    layout = layout_of(name)
    options = options_of(mode, layout)
    q, k, v = operands(layout.padded_len)
    found = attend(q, k, v, layout, backend="flex", **options)
    allowed = layout.intervals(**options).dense()
    torch.testing.assert_close(found, by_definition(q, k, v, allowed))
    assert (found[:, :, ~allowed.any(-1)] == 0).all()


@pytest.mark.parametrize("backend", ["slices", "sdpa"])
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "causal", "window": (3, 0)},
        {"mode": "full", "window": 2},
        {"mode": "causal", "window": (2, 0), "sinks": 2},
        {"mode": "causal_last", "window": (2, 0)},
        {"mode": "causal", "dropped": "self"},
        {"mode": "full", "dropped": "attend"},
    ],
    ids=str,
)
def test_windows_sinks_and_dropped_queries(options, backend):
    for name in ("some_dropped", "aligned", "every_segment"):
        layout = layout_of(name)
        allowed = layout.intervals(**options).dense()
        tensors = operands(layout.padded_len)
        compare(lambda *x: attend(*x, layout, backend=backend, **options), tensors, allowed)  # noqa: B023


@pytest.mark.parametrize("backend", ["slices", "sdpa", "flex"])
def test_grouped_heads_batch_and_scale(backend):
    layout = layout_of("some_dropped")
    tensors = operands(layout.padded_len, heads=6, kv_heads=2, batch=3)
    allowed = layout.intervals("causal_last").dense()
    if backend == "flex":
        found = attend(*tensors, layout, "causal_last", backend, scale=0.3)
        torch.testing.assert_close(found, by_definition(*tensors, allowed, 0.3))
        return
    compare(
        lambda *x: attend(*x, layout, "causal_last", backend, scale=0.3),
        tensors,
        allowed,
        scale=0.3,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    layout = layout_of("some_dropped")
    tensors = operands(layout.padded_len, dtype=dtype)
    expected = by_definition(*(x.double() for x in tensors), layout.intervals().dense())
    for backend in ("slices", "sdpa", "flex"):
        found = attend(*tensors, layout, backend=backend)
        assert found.dtype == dtype
        error = (found.double() - expected).abs().max()
        assert error < 20 * torch.finfo(dtype).eps


# --- intervals -----------------------------------------------------------------------------------


def interval_cases():
    R = mle.RowIntervals
    causal = R.causal(24)
    return {
        "documents": R.from_document_ids(torch.tensor([4] * 10 + [2] * 14)) & causal,
        "two_intervals": (causal & R.sliding_window(24, (3, 0))) | (causal & R.sinks(24, 2)),
        "padding": R.from_padding(torch.arange(24) < torch.tensor([[9], [24]])),
        "rows": causal.rows(5, 12),
        "empty": R(*torch.zeros(2, 1, 24, dtype=torch.int32), 24),
    }


@pytest.mark.parametrize("name", ["documents", "two_intervals", "padding", "rows", "empty"])
def test_intervals(name):
    intervals = interval_cases()[name]
    tensors = operands(intervals.lo.shape[-1], intervals.kv_len, batch=2)
    for backend in ("auto", "sdpa"):
        compare(
            lambda *x, backend=backend: attend(*x, intervals, backend=backend),
            tensors,
            intervals.dense(),
        )
    found = attend(*tensors, intervals, backend="flex")
    torch.testing.assert_close(found, by_definition(*tensors, intervals.dense()))


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
