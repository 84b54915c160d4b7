# SPDX-License-Identifier: BSD-3-Clause
"""packed_attention: every backend against attention over the dense mask, in float64."""

import pytest
import torch
from packed_cases import (
    LAYOUTS,
    MODES,
    by_definition,
    compare,
    layout_of,
    operands,
    options_of,
)

import masked_loss_ext as mle

attend = mle.packed_attention


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
