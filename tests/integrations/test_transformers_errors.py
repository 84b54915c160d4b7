# SPDX-License-Identifier: BSD-3-Clause
"""What the Trainer's parts refuse, in the words of whoever calls them."""

import functools
from importlib.util import find_spec

import pytest
import torch

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import Collator, make_model, make_trainer  # noqa: E402

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
)

LOGITS = torch.zeros(2, 6, 11)
LABELS = torch.arange(12).reshape(2, 6) % 11
NESTED = torch.nested.nested_tensor([torch.zeros(6, 11), torch.zeros(3, 11)], layout=torch.jagged)
GRAD = torch.tensor(3.0, requires_grad=True)

CALLS = [  # outputs, labels, further arguments, error, text after "causal_lm_loss: "
    ({"loss": 1}, LABELS, {}, ValueError, r"outputs must hold logits, got \['loss'\]"),
    ({"logits": [1]}, LABELS, {}, TypeError, r"outputs.logits must be a torch.Tensor, got list"),
    ((), LABELS, {}, ValueError, "outputs must hold logits, got tuple"),
    (None, LABELS, {}, ValueError, "outputs must hold logits, got NoneType"),
    ({"logits": LOGITS.long()}, LABELS, {}, ValueError, "outputs.logits must be float16, .* Long"),
    ((LOGITS.long(),), LABELS, {}, ValueError, r"outputs\[0\] must be float16, bfloat16"),
    ((LOGITS.to_sparse(),), LABELS, {}, ValueError, r"outputs\[0\] must be a dense tensor"),
    ({"logits": NESTED}, LABELS, {}, ValueError, "outputs.logits must be a plain tensor, got a ne"),
    ((LOGITS[0, 0],), LABELS[0, 0], {}, ValueError, r"outputs\[0\] must be \[..., S, V\] whe"),
    ((LOGITS,), None, {}, ValueError, "labels must be a tensor, got NoneType: the collator"),
    ((LOGITS,), {"labels": LABELS}, {}, ValueError, "labels must be a tensor, got dict"),
    ((LOGITS,), LABELS.float(), {}, ValueError, "labels must be uint8, .* got Float"),
    ((LOGITS,), LABELS.to_sparse(), {}, ValueError, "labels must be a dense tensor"),
    ((LOGITS,), NESTED, {}, ValueError, "labels must be a plain tensor, got a nested one"),
    ((LOGITS,), LABELS.to("meta"), {}, ValueError, "labels must be on the device of outputs"),
    ((LOGITS,), LABELS[0], {}, ValueError, r"labels must have the shape of outputs\[0\] \[2, 6, 1"),
    ((LOGITS,), LABELS + 1, {}, IndexError, r"labels at row \[1, 4\] must be in \[0, 11\)"),
    ((LOGITS,), LABELS, dict(z_los=1), TypeError, "unexpected keyword .* did you mean z_loss"),
    ((LOGITS,), LABELS, dict(normalizer=1), TypeError, "normalizer; here it is num_items_in_batch"),
    ((LOGITS,), LABELS, dict(target=1), TypeError, "argument target; here it is labels"),
    ((LOGITS,), LABELS, dict(reduction="avg"), ValueError, "reduction must be mean, sum, none,"),
    ((LOGITS,), LABELS, dict(label_smoothing=2), ValueError, "label_smoothing must be a finite"),
    ((LOGITS,), LABELS, dict(token_weight=torch.ones(2, 5)), ValueError,
     r"token_weight must have the shape of outputs\[0\] \[2, 6, 11\]"),
    ((LOGITS,), LABELS, dict(weight=torch.ones(3)), ValueError, "weight must .* got "),
    ((LOGITS,), None, dict(shift_labels=LABELS[:, 1:]), ValueError,
     r"shift_labels must have the shape of outputs\[0\] .* got \[2, 5\]"),
    ((LOGITS,), None, dict(shift_labels=LABELS + 1), IndexError, r"shift_labels at row \[1, 4\]"),
    ((LOGITS,), LABELS, dict(shift_labels=3), ValueError, "shift_labels must be a tensor, got int"),
    ((LOGITS,), LABELS, dict(shift_labels=LABELS, shift=1), ValueError,
     "shift must be 0 or None beside shift_labels, which are shifted, got 1"),
    ((LOGITS,), LABELS, dict(virtual_tokens=1), ValueError,
     r"virtual_tokens must be how many positions outputs\[0\] \[2, 6, 11\] has more than labels "
     r"\[2, 6\], got 1"),
    ((LOGITS,), LABELS[:, 1:], dict(virtual_tokens="1"), TypeError, "virtual_tokens must be an"),
    ((LOGITS,), LABELS[:, 1:], dict(virtual_tokens=-1), ValueError, "virtual_tokens must not be"),
    ((LOGITS,), LABELS[:, 1:], {}, ValueError, "got .2, 5.; are there 1 virtual tokens in front"),
    ((LOGITS,), LABELS[:, 1:], dict(virtual_tokens=1, mask=LABELS), ValueError,
     r"mask must be of the positions of labels, without virtual tokens, got \[2, 6\]"),
    ((LOGITS,), LABELS[:, 1:].float(), dict(virtual_tokens=1), ValueError, "labels must be int"),
    *(
        ((LOGITS,), LABELS, dict(num_items_in_batch=value), error, "num_items_in_batch " + text)
        for value, error, text in [
            ("7", TypeError, "must be a number, got str"),
            (True, TypeError, "must be a number, got bool"),
            ([7], TypeError, "must be a number, got list"),
            (float("nan"), ValueError, "must be a finite number at least 0, got nan"),
            (float("-inf"), ValueError, "must be a finite number at least 0, got -inf"),
            (-1, ValueError, "must be a finite number at least 0, got -1"),
            (torch.tensor([]), ValueError, "must hold a number, got an empty tensor"),
            (torch.tensor(7, device="meta"), ValueError, "must be on the device of outputs"),
            (torch.tensor(7j), ValueError, "must be bool, integer or floating, got ComplexFloat"),
            (GRAD, ValueError, "must not require a gradient"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize("outputs, labels, options, error, text", CALLS)
def test_causal_lm_loss(outputs, labels, options, error, text):
    with pytest.raises(error, match="^causal_lm_loss: .*" + text) as caught:
        causal_lm_loss(outputs, labels, **options)
    assert "masked_cross_entropy" not in str(caught.value)
    assert "target" not in str(caught.value).replace("argument target", "")


def collated(**changes):
    batch = {"labels": LABELS, "attention_mask": torch.ones(2, 6)} | changes
    return {k: v for k, v in batch.items() if v is not None}


BATCHES = [
    (None, TypeError, "the collator must return a mapping, got NoneType"),
    ([LABELS], TypeError, "the collator must return a mapping, got list"),
    (LABELS, TypeError, "the collator must return a mapping, got Tensor"),
    ({1: LABELS, "labels": LABELS}, ValueError, r"must have attention_mask, got \[1, 'labels'\]; "),
    (collated(labels=LABELS.float()), ValueError, "labels must be integers, got torch.float32"),
    (collated(labels=LABELS.bool()), ValueError, "labels must be integers, got torch.bool"),
    (collated(labels=LABELS.byte()), ValueError, "labels must be of a signed dtype, .*uint8"),
    (collated(labels=LABELS.to_sparse()), ValueError, "labels must be a dense tensor"),
    (collated(attention_mask=LABELS.to_sparse()), ValueError, "attention_mask must be a dense ten"),
    (collated(attention_mask=NESTED), ValueError, "attention_mask must be a plain tensor, got a n"),
    (collated(attention_mask=torch.ones(2, 6) * 1j), ValueError, "attention_mask must be bool, "),
    (collated(attention_mask=-LABELS.float()), ValueError, "attention_mask .* additive"),
    (collated(attention_mask=torch.full((2, 6), torch.nan)), ValueError, "be numbers, got NaN"),
    (collated(decoder_input_ids=LABELS), ValueError, "mask must be about the labels, got "),
]  # fmt: skip


@pytest.mark.parametrize("batch, error, text", BATCHES)
def test_mask_labels(batch, error, text):
    with pytest.raises(error, match="^MaskLabels: .*" + text):
        MaskLabels(lambda rows: batch)([])


def test_mask_labels_options():
    with pytest.raises(
        ValueError, match="MaskLabels: mask_sources must be True or False, got 'no'"
    ):
        MaskLabels(Collator(), mask_sources="no")
    with pytest.raises(TypeError, match="MaskLabels: mask must be a name, got Tensor"):
        MaskLabels(Collator(), mask=LABELS)


@pytest.mark.parametrize("value", [1, 0, None, "yes", [], torch.tensor(1), torch.ones(2), 2.0])
def test_callback_options(value):
    with pytest.raises(ValueError, match="TokenLossCallback: check_padding must be True, False"):
        TokenLossCallback(check_padding=value)


def test_callback_shift():
    with pytest.raises(TypeError, match="TokenLossCallback: shift must be an int, got str"):
        TokenLossCallback(shift="0")
    with pytest.raises(ValueError, match="TokenLossCallback: shift must not be negative, got -1"):
        TokenLossCallback(shift=-1)


@pytest.mark.parametrize("trainer", [None, "trainer", torch.nn.Linear(1, 1)])
def test_what_is_no_trainer(trainer):
    name = type(trainer).__name__
    with pytest.raises(TypeError, match=f"trainer must be a transformers Trainer, got {name}"):
        TokenLossCallback().attach(trainer)


@pytest.mark.parametrize(
    "loss_func, text",
    [
        (lambda o, y, num_items_in_batch=None: 1.5, "one number in a tensor, got float"),
        (lambda o, y, num_items_in_batch=None: (o.logits.sum(), o), "in a tensor, got tuple"),
        (lambda o, y, num_items_in_batch=None: o.logits[0, 0, :2], r"in a tensor, got \[2\]"),
        (
            functools.partial(causal_lm_loss, reduction="none"),
            "num_items_in_batch must be None for",
        ),
    ],
)
def test_losses_that_cannot_be_followed(loss_func, text, tmp_path):
    trainer = make_trainer(
        make_model("llama"), tmp_path, data_collator=Collator(), compute_loss_func=loss_func
    )
    TokenLossCallback().attach(trainer)
    with pytest.raises((TypeError, ValueError), match=text):
        trainer.train()


def test_labels_that_cannot_be_counted(tmp_path):
    class Labels(dict):  # as some pass several things
        def to(self, device):
            return self

    def loss_func(outputs, labels, num_items_in_batch=None):
        return causal_lm_loss(outputs, labels["labels"])

    def collator(rows):
        batch = Collator()(rows)
        return batch | {"labels": Labels(labels=batch["labels"])}

    trainer = make_trainer(
        make_model("bert"), tmp_path, data_collator=collator, compute_loss_func=loss_func
    )
    TokenLossCallback().attach(trainer)
    with pytest.raises(TypeError, match="TokenLossCallback: labels must be a tensor, got Labels"):
        trainer.train()
