# SPDX-License-Identifier: BSD-3-Clause
"""Ragged -> padded + mask, and back; masks -> labels; image masks -> token masks."""

from array import array

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
    mask = mle.lengths_to_mask(torch.tensor(lengths, dtype=dtype), max_len, clip=True)
    width = 5 if max_len is None else max_len
    assert mask.dtype == torch.bool and mask.shape == (5, width)
    assert mask.tolist() == [[t < n for t in range(width)] for n in lengths]
    assert torch.equal(mask, mle.lengths_to_mask(lengths, max_len, clip=True))
    if width >= 5:
        assert torch.equal(mask, mle.lengths_to_mask(lengths, max_len))
    assert torch.equal(mask, reference.lengths_to_mask(torch.tensor(lengths), width))


@pytest.mark.parametrize(
    "lengths",
    [
        range(3),
        (0, 1, 2),
        array("q", [0, 1, 2]),
        [0, 1, torch.tensor(2)],
        torch.tensor([0, 1, 2], dtype=torch.uint32),
        torch.tensor([0, 1, 2], dtype=torch.uint64),
    ],
    ids=lambda x: f"{type(x).__name__} {getattr(x, 'dtype', '')}",
)
def test_lengths_of_any_kind(lengths):
    check_lengths(lengths)


def check_lengths(lengths):
    expected = [[False, False], [True, False], [True, True]]
    assert mle.lengths_to_mask(lengths).tolist() == expected
    assert mle.lengths_to_mask(lengths, 2).tolist() == expected
    with pytest.raises(
        ValueError, match="lengths must be at most max_len 1, got 2; clip=True cuts"
    ):
        mle.lengths_to_mask(lengths, 1)
    assert mle.lengths_to_mask(lengths, 1, clip=True).tolist() == [[False], [True], [True]]


def test_lengths_are_not_looked_at_where_that_would_wait_or_break_a_graph():
    meta = mle.lengths_to_mask(torch.tensor([7, -1], device="meta"), 3)
    assert meta.shape == (2, 3) and meta.device.type == "meta"
    compiled = torch.compile(mle.lengths_to_mask, fullgraph=True, dynamic=True, backend="aot_eager")
    for width in (2, 5):
        mask = compiled(torch.tensor([1, 9]), width)
        assert mask.tolist() == [[t < 1 for t in range(width)], [True] * width]
    rows = torch.vmap(lambda x: mle.lengths_to_mask(x, 2))(torch.tensor([[1, 9], [0, 2]]))
    assert rows.tolist() == [[[True, False], [True] * 2], [[False] * 2, [True] * 2]]


def test_lists_in_a_compiled_graph():
    def mask_and_padded(x):
        latents = [x[0, :2], x[1, :3].half()]
        return mle.lengths_to_mask([1, 3], 4), *mle.pad_latents_for_multi_res(latents)

    x = torch.arange(16.0).view(2, 4, 2)
    compiled = torch.compile(mask_and_padded, fullgraph=True, backend="eager")
    for result, expected in zip(compiled(x), mask_and_padded(x), strict=True):
        assert torch.equal(result, expected) and result.dtype == expected.dtype


def test_masks_of_lists_are_on_the_default_device():
    with torch.device("meta"):
        assert mle.lengths_to_mask([1, 2]).device.type == "meta"
        padded, mask = pad([torch.ones(2, 3, device="cpu")], 3)
    assert mask.tolist() == [[True, True, False]] and padded.device.type == "cpu"


def test_no_lengths():
    assert mle.lengths_to_mask([]).shape == (0, 0)
    assert mle.lengths_to_mask(torch.zeros(0, dtype=torch.int64), 4).shape == (0, 4)


JAGGED = torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)
BAD_LENGTHS = [
    (([1.5, 2],), ValueError, "lengths must be integers, got torch.float32"),
    ((torch.tensor([1.0]),), ValueError, "lengths must be integers, got torch.float32"),
    (([True],), ValueError, "lengths must be integers, got torch.bool"),
    (([2, True],), ValueError, "lengths must be integers, got torch.bool"),
    ((torch.ones(2, 2, dtype=torch.int64),), ValueError, "lengths must have 1 dimensions [B]"),
    ((3,), TypeError, "lengths must be a tensor or a list of ints, got int"),
    ((iter([1]),), TypeError, "lengths must be a tensor or a list of ints, got list_iterator"),
    (([1, -2],), ValueError, "lengths must not be negative, got -2"),
    ((torch.tensor([-1, 3]), 4), ValueError, "lengths must not be negative, got -1"),
    ((range(-1, 2),), ValueError, "lengths must not be negative, got -1"),
    (([3, 5], 4), ValueError, "lengths must be at most max_len 4, got 5; clip=True cuts them"),
    (([2**50],), ValueError, f"lengths must be in [0, {2**48}], got {2**50}"),
    (([10**30],), ValueError, "lengths must be ints of at most 64 bits"),
    ((["1"],), ValueError, "lengths must be ints of at most 64 bits"),
    (([None],), ValueError, "lengths must be ints of at most 64 bits"),
    ((torch.empty(2, dtype=torch.int1),), ValueError, "lengths must be integers, got torch.int1"),
    ((torch.tensor([1]).to_sparse(),), ValueError, "lengths must be a dense tensor"),
    ((JAGGED,), ValueError, "lengths must be a plain tensor, got a nested one"),
    ((torch.ones(2, device="meta").long(),), ValueError, "max_len must be given where lengths has"),
    (([1], True), TypeError, "max_len must be an int, got bool"),
    (([1], 2**50), ValueError, f"max_len must be in [0, {2**48}], got {2**50}"),
    (([1], 2**63), ValueError, f"max_len must be in [0, {2**48}], got {2**63}"),
    (("12",), TypeError, "lengths must be a tensor or a list of ints, got str"),
    (([1], -1), ValueError, "max_len must not be negative, got -1"),
    (([1], 2.0), TypeError, "max_len must be an int, got float"),
]


@pytest.mark.parametrize("arguments,kind,text", BAD_LENGTHS)
def test_bad_lengths(arguments, kind, text):
    check_bad_lengths(arguments, kind, text)


def check_bad_lengths(arguments, kind, text):
    with pytest.raises(kind) as caught:
        mle.lengths_to_mask(*arguments)
    assert f"lengths_to_mask: {text}" in str(caught.value)


def test_clip_is_a_bool():
    with pytest.raises(TypeError, match="lengths_to_mask: clip must be a bool, got 'no'"):
        mle.lengths_to_mask([3], 2, clip="no")


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
    (([torch.ones(2, 3)], True), TypeError, "max_seq_len must be an int, got bool"),
    (([torch.ones(2, 3)], 3.0), TypeError, "max_seq_len must be an int, got float"),
    (([torch.ones(2, 3)], 2**63), ValueError, f"max_seq_len must be in [0, {2**48}]"),
    # what the first latent's dtype would cut
    (
        ([torch.ones(2, 3).long(), torch.ones(2, 3)],),
        ValueError,
        "latents[1] must be of a dtype that fits that of the first torch.int64, got torch.float32",
    ),
    (
        ([torch.ones(2, 3), torch.ones(2, 3).to(torch.complex64)],),
        ValueError,
        "latents[1] must be of a dtype that fits that of the first",
    ),
    (
        ([torch.ones(2, 3), torch.ones(2, 3, device="meta")],),
        ValueError,
        "latents[1] must be on the device of latents[0] (cpu), got meta",
    ),
    (([torch.ones(2, 3).to_sparse()],), ValueError, "latents[0] must be a dense tensor"),
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
    one_for_all = mle.unpad(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 0, 1]]))
    assert [x.tolist() for x in one_for_all] == [[1, 3], [4, 6]]


def test_bad_unpad():
    cases = [
        (([[1]], torch.ones(1, 1)), TypeError, "padded must be a torch.Tensor, got list"),
        ((torch.ones(1, 1), [[1]]), TypeError, "mask must be a torch.Tensor, got list"),
        ((torch.ones(2, 3), torch.ones(2)), ValueError, "mask must have 2 dimensions [B, T]"),
        ((torch.ones(2, 3), torch.ones(2, 2)), ValueError, "dimensions of padded, got [2, 2]"),
        ((torch.ones(2), torch.ones(2, 2)), ValueError, "mask shape must be [2]"),
        ((torch.ones(2, 3), torch.tensor([[0, -1e9, 0]] * 2)), ValueError, "an additive mask?"),
        ((torch.ones(2, 3), torch.full((2, 3), torch.nan)), ValueError, "got NaN entries"),
        ((torch.ones(2, 3), torch.ones(2, 3).to(torch.complex64)), ValueError, "must be bool, int"),
        ((torch.ones(2, 3), torch.empty(2, 3, dtype=torch.uint4)), ValueError, "must be bool, int"),
        ((torch.ones(2, 3), torch.ones(2, 3).to("meta")), ValueError, "on the device of padded"),
        ((torch.ones(2, 3).to_sparse(), torch.ones(2, 3)), ValueError, "padded must be a dense"),
    ]
    for arguments, kind, text in cases:
        with pytest.raises(kind) as caught:
            mle.unpad(*arguments)
        assert str(caught.value).startswith("unpad: ") and text in str(caught.value)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
MASKS = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("mask_dtype", MASKS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_mask_labels(dtype, mask_dtype):
    labels = torch.tensor([[5, 6, 99], [8, 9, 1]]).to(dtype)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).to(mask_dtype)
    masked = mle.mask_labels(labels, mask, ignore_index=99)
    assert masked.dtype == dtype and masked.tolist() == [[5, 6, 99], [8, 99, 99]]
    assert labels.tolist() == [[5, 6, 99], [8, 9, 1]], "the caller's labels are not touched"


def test_mask_labels_of_any_rank_and_strides():
    labels = torch.arange(24).reshape(2, 3, 4).transpose(0, 2)
    mask = torch.arange(24).reshape(4, 3, 2) % 3
    expected = torch.where(mask != 0, labels, -100)
    assert torch.equal(mle.mask_labels(labels, mask), expected)
    assert torch.equal(reference.mask_labels(labels, mask), expected)
    assert mle.mask_labels(torch.tensor(3), torch.tensor(0.0)).item() == -100
    assert mle.mask_labels(torch.zeros(0, 4, dtype=torch.int32), torch.zeros(0, 4)).shape == (0, 4)
    # weights are not masks: 0.5 is on
    halves = torch.tensor([0.5, 0.0, 1e-30])
    assert mle.mask_labels(torch.tensor([1, 2, 3]), halves).tolist() == [1, -100, 3]
    rows = mle.mask_labels(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 0]]))
    assert rows.tolist() == [[1, -100], [3, -100]]


def test_labels_that_are_not_masked_do_not_alias():
    labels = torch.tensor([1, 2])
    mle.mask_labels(labels, torch.ones(2)).zero_()
    assert labels.tolist() == [1, 2]


def test_masked_labels_count_what_the_loss_counts():
    labels, mask = torch.tensor([[1, -100, 0, 2], [3, 4, 0, 0]]), mle.lengths_to_mask([3, 2], 4)
    logits, masked = torch.randn(2, 4, 5), mle.mask_labels(labels, mask)
    assert (masked != -100).sum() == 4
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), masked.flatten())
    torch.testing.assert_close(mle.masked_cross_entropy(logits, labels, mask), expected)
    torch.testing.assert_close(mle.masked_cross_entropy(logits, masked), expected)


def test_mask_labels_compiled():
    compiled = torch.compile(mle.mask_labels, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (3, 5):
        labels, mask = torch.arange(size), torch.arange(size) % 2
        assert torch.equal(compiled(labels, mask), mle.mask_labels(labels, mask))


Y = torch.zeros(2, 3, dtype=torch.int64)
BAD_LABELS = [
    (([[1]], Y), TypeError, "labels must be a torch.Tensor, got list"),
    ((Y, [[1]]), TypeError, "mask must be a torch.Tensor, got list"),
    ((Y, None), TypeError, "mask must be a torch.Tensor, got NoneType"),
    ((Y.float(), Y), ValueError, "labels must be integers, got torch.float32"),
    ((Y.bool(), Y), ValueError, "labels must be integers, got torch.bool"),
    ((Y, Y[0]), ValueError, "mask shape must be [2, 3], the first 2 dimensions of labels, got [3]"),
    ((Y, torch.zeros(2, 1, 3, 3)), ValueError, "mask shape must be [2, 3]"),
    ((Y, Y.to("meta")), ValueError, "mask must be on the device of labels (cpu), got meta"),
    ((Y, torch.tensor([[0.0, 0, -1e9]] * 2)), ValueError, "an additive mask?"),
    ((Y, Y.to(torch.complex64)), ValueError, "mask must be bool, integer or floating"),
    (
        (Y, Y[:1, :2]),
        ValueError,
        "mask shape must be [2, 3], the first 2 dimensions of labels, got",
    ),
    ((Y[:1], Y), ValueError, "mask shape must be [1, 3]"),
    (
        (Y, torch.tensor([[0.0, 1, torch.nan]] * 2)),
        ValueError,
        "mask must be on where it is not 0,",
    ),
    (
        (Y, torch.empty(2, 3, dtype=torch.int1)),
        ValueError,
        "mask must be bool, integer or floating",
    ),
    (
        (torch.empty(2, 3, dtype=torch.int1), Y),
        ValueError,
        "labels must be integers, got torch.int",
    ),
    ((Y, Y.to_sparse()), ValueError, "mask must be a dense tensor"),
]
BAD_IGNORE_INDEX = [
    (
        torch.uint8,
        -100,
        ValueError,
        "ignore_index must fit the dtype of labels torch.uint8, 0 to 2",
    ),
    (torch.uint8, 256, ValueError, "0 to 255, got 256"),
    (torch.int8, -129, ValueError, "-128 to 127, got -129"),
    (torch.int64, 2**63, ValueError, "got 9223372036854775808"),
    (torch.int64, -100.0, TypeError, "ignore_index must be an int, got float"),
    (torch.int64, None, TypeError, "ignore_index must be an int, got NoneType"),
    (torch.int64, True, TypeError, "ignore_index must be an int, got bool"),
]


@pytest.mark.parametrize("arguments,kind,text", BAD_LABELS)
def test_bad_labels(arguments, kind, text):
    with pytest.raises(kind) as caught:
        mle.mask_labels(*arguments)
    assert str(caught.value).startswith("mask_labels: ") and text in str(caught.value)


@pytest.mark.parametrize("dtype,value,kind,text", BAD_IGNORE_INDEX)
def test_bad_ignore_index(dtype, value, kind, text):
    with pytest.raises(kind) as caught:
        mle.mask_labels(Y.to(dtype), Y, ignore_index=value)
    assert "mask_labels: ignore_index must " in str(caught.value) and text in str(caught.value)


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
    for dtype in (torch.complex64, torch.uint4):
        with pytest.raises(ValueError, match="image_mask must be bool, integer or floating"):
            mle.map_mask_to_latent(torch.empty(1, 16, 16, dtype=dtype))
    half = torch.zeros(1, 16, 16)
    half[:, :, :8] = 255
    text = r"image_mask must be in \[0, 1\], got averages .* from 255 to 255; divide .* by 255"
    nan = torch.zeros(1, 16, 16)
    nan[0, 3, 3] = torch.nan
    low = torch.full((1, 16, 16), -2.0)
    for image, got in ((half, text), (low, "from -2 to -2"), (nan, "from nan to nan")):
        with pytest.raises(ValueError, match=got):
            mle.map_mask_to_latent(image)
    assert torch.allclose(mle.map_mask_to_latent(half / 255 * 1.1), torch.tensor([[1.1]]))
    for shape in ((1, 24, 32), (1, 32, 8)):
        with pytest.raises(ValueError, match="H // 8 and W // 8 even.*got .1, "):
            mle.map_mask_to_latent(torch.ones(shape))
