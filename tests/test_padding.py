# SPDX-License-Identifier: BSD-3-Clause
"""Ragged -> padded + mask, and back; image masks -> token masks."""

import pytest
import torch
from torch.autograd import gradcheck

import masked_loss_ext as mle
from masked_loss_ext import reference

pad = mle.pad_latents_for_multi_res


@pytest.mark.parametrize("max_len", [None, 0, 2, 5, 9])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int8])
def test_lengths_to_mask(max_len, dtype):
    lengths = [5, 0, 3, 5, 1]
    mask = mle.lengths_to_mask(torch.tensor(lengths, dtype=dtype), max_len)
    width = 5 if max_len is None else max_len
    assert mask.dtype == torch.bool and mask.shape == (5, width)
    assert mask.tolist() == [[t < n for t in range(width)] for n in lengths]
    assert torch.equal(mask, mle.lengths_to_mask(lengths, max_len))
    assert torch.equal(mask, reference.lengths_to_mask(torch.tensor(lengths), width))


def test_no_lengths():
    assert mle.lengths_to_mask([]).shape == (0, 0)
    assert mle.lengths_to_mask(torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4)


BAD_LENGTHS = [
    (([1.5, 2],), ValueError, "lengths must be integers, got torch.float32"),
    ((torch.tensor([1.0]),), ValueError, "lengths must be integers, got torch.float32"),
    (([True],), ValueError, "lengths must be integers, got torch.bool"),
    ((torch.ones(2, 2, dtype=torch.int64),), ValueError, "lengths must have 1 dimensions [B]"),
    ((3,), TypeError, "lengths must be a tensor or a list of ints, got int"),
    (("12",), TypeError, "lengths must be a tensor or a list of ints, got str"),
    (([1], -1), ValueError, "max_len must not be negative, got -1"),
    (([1], 2.0), TypeError, "max_len must be an int, got float"),
]


@pytest.mark.parametrize("arguments,kind,text", BAD_LENGTHS)
def test_bad_lengths(arguments, kind, text):
    with pytest.raises(kind) as caught:
        mle.lengths_to_mask(*arguments)
    assert f"lengths_to_mask: {text}" in str(caught.value)


@pytest.mark.parametrize("max_seq_len", [None, 7, 12])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pad_and_unpad_are_inverse(max_seq_len, dtype):
    latents = [torch.randn(n, 6).to(dtype) for n in (3, 7, 0, 1)]
    padded, mask = pad(latents, max_seq_len)
    assert padded.shape == (4, max_seq_len or 7, 6) and padded.dtype == dtype
    assert mask.sum(1).tolist() == [3, 7, 0, 1]
    assert (padded[~mask] == 0).all()
    for row, latent in zip(mle.unpad(padded, mask), latents, strict=True):
        assert torch.equal(row, latent)
    theirs = reference.pad_latents_for_multi_res(latents, max_seq_len)
    assert torch.equal(padded, theirs[0]) and torch.equal(mask, theirs[1])
    for row, other in zip(mle.unpad(padded, mask), reference.unpad(padded, mask), strict=True):
        assert torch.equal(row, other)


def test_dtype_of_the_first_latent_wins():
    latents = [torch.ones(1, 2, dtype=torch.bfloat16), torch.ones(2, 2), torch.ones(1, 2).double()]
    for order in (latents, latents[::-1]):
        assert pad(order)[0].dtype == order[0].dtype


def test_any_iterable_and_any_strides():
    latents = [torch.randn(6, 3).T, torch.randn(8, 6)[::2]]
    padded, _ = pad(x for x in latents)
    assert torch.equal(padded[0, :3], latents[0]) and torch.equal(padded[1], latents[1])


def test_latents_are_not_aliased():
    latent = torch.ones(2, 3)
    pad([latent])[0].zero_()
    assert (latent == 1).all()


def test_gradients_through_the_padding():
    latents = [torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (2, 1, 3)]
    assert gradcheck(lambda *x: pad(x, 4)[0], latents)
    padded = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert gradcheck(lambda x: tuple(mle.unpad(x, mask)), [padded])


def test_gradients_are_in_the_dtype_of_each_latent():
    latents = [torch.randn(2, 3, requires_grad=True), torch.randn(1, 3).double().requires_grad_()]
    padded, mask = pad(latents)
    mle.masked_sse(padded, torch.zeros_like(padded), mask, reduction="sum").backward()
    for latent in latents:
        assert latent.grad.dtype == latent.dtype
        torch.testing.assert_close(latent.grad, 2 * latent.detach())


BAD_LATENTS = [
    (([],), ValueError, "Cannot pad empty latent list"),
    (((),), ValueError, "Cannot pad empty latent list"),
    ((torch.ones(2, 3),), TypeError, "latents must be a list of tensors, got Tensor"),
    ((None,), TypeError, "latents must be a list of tensors, got NoneType"),
    (([torch.ones(2, 3), [[1.0]]],), TypeError, "latents[1] must be a torch.Tensor, got list"),
    (([torch.ones(3)],), ValueError, "Expected 2D latent tensor [n, C] at index 0, got [3]"),
    # validated before the longest is looked for
    (([torch.ones(2, 3), torch.ones(())],), ValueError, "Expected 2D latent tensor"),
    (
        ([torch.ones(2, 3), torch.ones(2, 4)],),
        ValueError,
        "Channel mismatch: latents[1] must have 3 channels like the first, got 4",
    ),
    (([torch.ones(2, 3)], 1), ValueError, "latents[0] of length 2 exceeds max_seq_len 1"),
    (([torch.ones(2, 3)], "3"), TypeError, "max_seq_len must be an int, got str"),
    (([torch.ones(2, 3)], -1), ValueError, "max_seq_len must not be negative, got -1"),
]


@pytest.mark.parametrize("arguments,kind,text", BAD_LATENTS)
def test_bad_latents(arguments, kind, text):
    with pytest.raises(kind) as caught:
        pad(*arguments)
    assert f"pad_latents_for_multi_res: {text}" in str(caught.value)


def test_unpad_any_mask_and_any_rank():
    padded = torch.arange(24.0).reshape(2, 3, 2, 2)
    for dtype in (torch.bool, torch.int64, torch.float32):
        first, second = mle.unpad(padded, torch.tensor([[0, 1, 1], [0, 0, 0]]).to(dtype))
        assert torch.equal(first, padded[0, 1:]) and second.shape == (0, 2, 2)
    assert [x.tolist() for x in mle.unpad(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]))] == [[6]]
    assert mle.unpad(torch.zeros(0, 3, 2), torch.zeros(0, 3)) == []


def test_bad_unpad():
    cases = [
        (([[1]], torch.ones(1, 1)), TypeError, "padded must be a torch.Tensor, got list"),
        ((torch.ones(1, 1), [[1]]), TypeError, "mask must be a torch.Tensor, got list"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, "mask must have 2 dimensions [B, T]"),
        ((torch.ones(2, 3), torch.ones(2, 2)), ValueError, "padded [2, 3], got [2, 2]"),
    ]
    for arguments, kind, text in cases:
        with pytest.raises(kind) as caught:
            mle.unpad(*arguments)
        assert str(caught.value).startswith("unpad: ") and text in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 32, 48), (1, 16, 16), (3, 70, 37), (0, 32, 32), (2, 7, 32)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64])
def test_map_mask_to_latent(shape, dtype):
    mask = (torch.rand(shape) * 3).to(dtype) if dtype.is_floating_point else torch.rand(shape) < 0.3
    tokens = mle.map_mask_to_latent(mask.to(dtype))
    assert tokens.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert tokens.shape == (shape[0], (shape[1] // 16) * (shape[2] // 16))
    torch.testing.assert_close(tokens, reference.map_mask_to_latent(mask.to(dtype)))


def test_map_mask_to_latent_is_an_edit_mask():
    tokens = mle.map_mask_to_latent(torch.rand(2, 32, 48))
    assert ((tokens >= 0) & (tokens <= 1)).all()
    x = torch.randn(2, 6, 4)
    assert mle.AttentionMaskMseLoss()(x, torch.zeros_like(x), edit_mask=tokens) > 0


def test_bad_image_masks():
    with pytest.raises(TypeError, match="image_mask must be a torch.Tensor, got list"):
        mle.map_mask_to_latent([[0]])
    with pytest.raises(ValueError, match=r"image_mask must have 3 dimensions \[B, H, W\]"):
        mle.map_mask_to_latent(torch.ones(16, 16))
    for shape in ((1, 24, 32), (1, 32, 8)):
        with pytest.raises(ValueError, match="H // 8 and W // 8 even.*got .1, "):
            mle.map_mask_to_latent(torch.ones(shape))
