# SPDX-License-Identifier: BSD-3-Clause
"""shift and segment_ids are slicing and masking, without a copy of the logits; memory used."""

import pytest
import torch
from accuracy import assert_same_bits
from accuracy_cross_entropy import evaluate
from allocations import allocated_bytes
from cases_cross_entropy import BY_NAME, make, options_of

import masked_loss_ext as mle
from tests.cross_entropy.test_laws import counted


def test_allocations_are_seen():
    x = torch.zeros(1 << 18)
    assert 1 << 20 <= allocated_bytes(x.clone) < 1 << 21


@pytest.mark.parametrize("name", ["shift_none", "segments_mean", "segments_none", "rank_4_shift"])
def test_a_shift_is_slicing(name):
    inputs, options = make(BY_NAME[name], torch.float64), options_of(BY_NAME[name])
    shift = options.pop("shift")
    on = counted(inputs, {**options, "shift": shift})
    whole = evaluate(mle.masked_cross_entropy, inputs, shift=shift, **options)
    sliced = {k: v[..., shift:] for k, v in inputs.items() if k in ("target", "token_weight")}
    sliced["logits"] = inputs["logits"][..., :-shift, :]
    sliced["mask"] = on[..., :-shift]
    if "weight" in inputs:
        sliced["weight"] = inputs["weight"]
    part = evaluate(mle.masked_cross_entropy, sliced, **options)
    for key, value in part.items():
        if key == "loss" and value.dim() == 0:
            torch.testing.assert_close(whole[key], value)
            continue
        start = {"grad token_weight": slice(shift, None)}.get(key, slice(None, -shift))
        place = (..., start, slice(None)) if key == "grad logits" else (..., start)
        torch.testing.assert_close(whole[key][place], value)
        rest = whole[key].clone()
        rest[place] = 0
        assert (rest == 0).all(), key


@pytest.mark.parametrize("shift", [3, 4, 100, 2**40])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_shift_beyond_the_row(shift, reduction):
    x = torch.randn(2, 3, 5, requires_grad=True)
    loss = mle.masked_cross_entropy(
        x, torch.zeros(2, 3, dtype=torch.long), shift=shift, reduction=reduction
    )
    assert loss.requires_grad and (loss == 0).all()
    loss.sum().backward()
    assert (x.grad == 0).all()


def test_labels_before_the_shift_are_not_read():
    """The first k labels belong to no row: no number there is wrong."""
    x = torch.randn(2, 4, 5)
    target = torch.tensor([[77, -5, 1, 2], [99, 5, 0, 4]])
    loss = mle.masked_cross_entropy(x, target, shift=2)
    expected = torch.nn.functional.cross_entropy(x[:, :2].reshape(4, 5), target[:, 2:].reshape(4))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_segment_ids_of_any_integer_dtype(dtype):
    """Documents of 3, 1 and 4 tokens, one id used twice: only the pair itself is compared."""
    x, target = torch.randn(1, 8, 6), torch.randint(0, 6, (1, 8))
    ids = torch.tensor([[5, 5, 5, 9, 5, 5, 5, 5]])
    for shift, on in ((1, [1, 1, 0, 0, 1, 1, 1, 0]), (2, [1, 0, 1, 0, 1, 1, 0, 0])):
        loss = mle.masked_cross_entropy(
            x, target, shift=shift, segment_ids=ids.to(dtype), reduction="none"
        )
        assert (loss != 0).int().tolist() == [on]
    # Two that differ in their high bytes only are two.
    if dtype in (torch.int64, torch.int32):
        far = torch.tensor([[1, 1 + (1 << 16 if dtype == torch.int32 else 1 << 32)]]).to(dtype)
        loss = mle.masked_cross_entropy(
            x[:, :2], target[:, :2], shift=1, segment_ids=far, reduction="none"
        )
        assert (loss == 0).all()


def test_segment_ids_without_a_shift_change_nothing():
    x, target = torch.randn(2, 4, 5), torch.randint(0, 5, (2, 4))
    ids = torch.arange(8).reshape(2, 4)
    plain = mle.masked_cross_entropy(x, target)
    assert_same_bits(mle.masked_cross_entropy(x, target, segment_ids=ids), plain)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 1])
def test_the_logits_are_never_copied(shift):
    """64 samples that are one: 8 GiB of logits where 128 MiB are stored."""
    x = torch.zeros(1, 64, 512 * 1024).expand(64, 64, 512 * 1024)
    target = torch.zeros(64, 64, dtype=torch.long)
    mask = torch.zeros(64, 64)
    mask[:, 1:3] = 1

    def step():
        return mle.masked_cross_entropy(x, target, mask, shift=shift, return_stats=True)

    used = allocated_bytes(step)
    assert used < 1 << 20, f"{used} bytes"


@pytest.mark.parametrize("view", ["whole", "shifted", "row_slice", "columns"])
def test_forward_and_backward_take_one_gradient(view):
    whole = torch.randn(4, 33, 5000)
    x = {"row_slice": whole[:, :-1], "columns": whole[..., 8:]}.get(view, whole).detach()
    x.requires_grad_()
    target = torch.randint(0, 4000, x.shape[:-1])
    shift = 1 if view == "shifted" else 0
    mask = torch.rand(target.shape) < 0.6
    one = x.numel() * x.element_size()

    def step():
        loss = mle.masked_cross_entropy(x, target, mask, shift=shift, label_smoothing=0.1)
        torch.autograd.grad(loss, x)

    step()
    used = allocated_bytes(step)
    assert one <= used < 1.01 * one, f"{used / one:.3f} gradients"


def test_rows_that_do_not_count_are_not_even_read():
    """Their memory may not be there: 2 TiB of address space, one page of numbers."""
    rows, classes = 1 << 20, 1 << 19
    x = torch.randn(1, classes).expand(rows, classes)
    mask = torch.zeros(rows, dtype=torch.bool)
    mask[123] = True
    target = torch.full((rows,), 7)
    loss, stats = mle.masked_cross_entropy(x, target, mask, return_stats=True)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(x[:1], target[:1]))
    assert (stats.lse != 0).sum() == 1
