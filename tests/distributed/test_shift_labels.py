# SPDX-License-Identifier: BSD-3-Clause
"""shift_labels: labels where they are predicted, as losses and transformers' models take them."""

import pytest
import torch

import masked_loss_ext as mle

LABELS = torch.tensor([[5, 6, 7, 8], [9, -100, 3, 4]])
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1]])
DOCUMENTS = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]])
NO = -100


def test_by_hand():
    shift = mle.shift_labels
    assert shift(LABELS).tolist() == [[6, 7, 8, NO], [NO, 3, 4, NO]]
    assert shift(LABELS, MASK).tolist() == [[6, NO, 8, NO], [NO, 3, 4, NO]]
    assert shift(LABELS, None, DOCUMENTS).tolist() == [[6, 7, 8, NO], [NO, 3, NO, NO]]
    assert shift(LABELS, MASK, DOCUMENTS).tolist() == [[6, NO, 8, NO], [NO, 3, NO, NO]]
    assert shift(LABELS, MASK, shift=2).tolist() == [[NO, 8, NO, NO], [3, 4, NO, NO]]
    assert shift(LABELS, MASK, shift=0).tolist() == mle.mask_labels(LABELS, MASK).tolist()
    assert shift(LABELS, shift=9).tolist() == [[NO] * 4] * 2
    assert shift(LABELS[0], MASK[0]).tolist() == [6, NO, 8, NO]
    assert shift(LABELS, ignore_index=7).tolist() == [[6, 7, 8, 7], [NO, 3, 4, 7]]
    assert shift(LABELS, MASK[:1], DOCUMENTS[1:]).tolist() == [[6, NO, NO, NO], [NO] * 4]
    assert shift(LABELS[:, :0]).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint16, torch.int32])
def test_dtypes_stay(dtype):
    labels = LABELS.clamp(min=0).to(dtype)
    moved = mle.shift_labels(labels, MASK.to(torch.float16), DOCUMENTS.to(dtype), ignore_index=99)
    assert moved.dtype == dtype
    assert moved.tolist() == [[6, 99, 8, 99], [0, 3, 99, 99]]


@pytest.mark.parametrize("shift", range(5))
def test_is_the_reference_and_what_the_losses_shift(shift):
    g = torch.Generator().manual_seed(shift)
    for _ in range(10):
        labels = torch.randint(-1, 7, (2, 3, 9), generator=g)
        mask = torch.rand(2, 3, 9, generator=g) < 0.7
        documents = torch.randint(2, (2, 3, 9), generator=g)
        logits = torch.randn(2, 3, 9, 7, generator=g)
        for rows in [(), (mask,), (None, documents), (mask, documents)]:
            options = dict(shift=shift, ignore_index=-1)
            moved = mle.shift_labels(labels, *rows, **options)
            assert torch.equal(moved, mle.reference.shift_labels(labels, *rows, **options))
            given = dict(zip(("mask", "segment_ids"), rows, strict=False))
            expected = mle.masked_cross_entropy(
                logits, labels, **given, reduction="none", **options
            )
            ours = mle.masked_cross_entropy(logits, moved, reduction="none", ignore_index=-1)
            assert torch.equal(ours, expected)


def test_under_compile():
    compiled = torch.compile(mle.shift_labels, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(LABELS, MASK, DOCUMENTS), mle.shift_labels(LABELS, MASK, DOCUMENTS))


@pytest.mark.parametrize(
    "args,options,error,text",
    [
        ([3], {}, TypeError, "labels must be a torch.Tensor, got int"),
        ([LABELS.float()], {}, ValueError, "labels must be integers, got torch.float32"),
        ([torch.tensor(1)], {}, ValueError, r"labels must be \[..., S\], got \[\]"),
        ([LABELS, MASK[:, 1:]], {}, ValueError, r"mask shape must be \[2, 4\].* got \[2, 3\]"),
        ([LABELS, MASK - 1.0], {}, ValueError, "mask must be on where it is not 0"),
        ([LABELS, MASK.to("meta")], {}, ValueError, r"mask must be on the device of labels"),
        ([LABELS, None, MASK[1]], {}, ValueError, r"segment_ids must have the shape of labels"),
        ([LABELS, None, MASK * 1.0], {}, ValueError, "segment_ids must be integers"),
        ([LABELS], dict(shift=-1), ValueError, "shift must not be negative, got -1"),
        ([LABELS], dict(shift=1.0), TypeError, "shift must be an int, got float"),
        ([LABELS.to(torch.uint8)], {}, ValueError, "ignore_index must fit the dtype of labels"),
    ],
)
def test_refusals(args, options, error, text):
    with pytest.raises(error, match=f"^shift_labels: .*{text}"):
        mle.shift_labels(*args, **options)


def test_in_a_real_model():
    """Its own loss, causal_lm_loss and logit_free of a whole sequence and of two parts."""
    pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")
    from tiny_models import Collator, make_model, make_rows

    from masked_loss_ext.integrations.transformers import causal_lm_loss, logit_free

    batch = Collator()(make_rows([12, 3, 7]))
    labels, mask = batch.pop("labels"), batch["attention_mask"]
    model, count = make_model("llama"), int(mask[:, 1:].sum())
    own = model(**batch, labels=mle.mask_labels(labels, mask), num_items_in_batch=count)
    shifted = mle.shift_labels(labels, mask)
    given = dict(labels=shifted, shift_labels=shifted, num_items_in_batch=count)
    close = dict(rtol=1e-6, atol=0)  # transformers makes float32 of logits
    torch.testing.assert_close(model(**batch, **given).loss, own.loss, **close)
    parts = [
        causal_lm_loss((own.logits[:, part],), None, count, shift_labels=shifted[:, part])
        for part in (slice(6), slice(6, 12))
    ]
    torch.testing.assert_close(sum(parts).float(), own.loss.float(), **close)
    model = logit_free(model)
    torch.testing.assert_close(model(**batch, **given).loss.float(), own.loss.float(), **close)
