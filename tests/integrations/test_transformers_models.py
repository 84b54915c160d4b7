# SPDX-License-Identifier: BSD-3-Clause
"""Masked language models and encoder-decoders in the real Trainer: labels stand where they are."""

import functools
from importlib.util import find_spec

import pytest
import torch

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    LEARNING_RATE,
    LENGTHS,
    LOGGED,
    Collator,
    logged,
    make_model,
    make_rows,
    make_trainer,
    weights,
)

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
)

aligned_loss = functools.partial(causal_lm_loss, shift=0)
ARRANGEMENTS = [(8, 1), (4, 2), (1, 8)]
LONGEST = max(LENGTHS)  # all batches as long, so that no model sees another padding
# T5 rounds its attention to float32; weights are near 1, the update about 1e-2.
CLOSE = {"bert": dict(rtol=1e-12, atol=1e-13), "t5": dict(rtol=1e-6, atol=1e-7)}


def padded(rows):
    """ids and mask, ``[B, LONGEST]``."""
    batch = Collator()([*rows, {"input_ids": torch.ones(LONGEST, dtype=torch.int64)}])
    return batch["input_ids"][:-1], batch["attention_mask"][:-1]


def masked_lm_batch(rows):
    """Every third token is a mask token and predicted, as DataCollatorForLanguageModeling does."""
    ids, mask = padded(rows)
    chosen = (torch.arange(LONGEST) % 3 == 0) & (mask != 0)
    labels = torch.where(chosen, ids, -100)
    return {"input_ids": torch.where(chosen, 1, ids), "attention_mask": mask, "labels": labels}


def seq2seq_batch(rows):
    """The input in reverse, and an end, as DataCollatorForSeq2Seq makes it."""
    ids, mask = padded(rows)
    labels = torch.full((len(rows), LONGEST), -100)
    for i, row in enumerate(rows):
        n = min(len(row["input_ids"]), LONGEST - 1)
        labels[i, :n], labels[i, n] = row["input_ids"].flip(0)[:n], 2
    shifted = make_model("t5").prepare_decoder_input_ids_from_labels(labels)
    return {
        "input_ids": ids, "attention_mask": mask, "labels": labels, "decoder_input_ids": shifted,
    }  # fmt: skip


BATCHES = {"bert": masked_lm_batch, "t5": seq2seq_batch}
# Tokens that are predicted: 0, 3, 6, 9 of LENGTHS; all and the end, of 12 the first 11.
TOKENS = {"bert": 4 + 1 + 3 + 1 + 3 + 2 + 4 + 2, "t5": 12 + 4 + 8 + 3 + 10 + 5 + 12 + 6}
MODELS = sorted(BATCHES)


def train(name, directory, *, follow=None, **options):
    model = make_model(name)
    options = dict(data_collator=BATCHES[name], compute_loss_func=aligned_loss) | options
    trainer = make_trainer(model, directory, **options)
    if follow is not None:
        follow.attach(trainer)
    trainer.train()
    return trainer, model


@functools.cache
def by_the_model(name):
    """Loss and weights after a step on the model's own loss of all rows."""
    model = make_model(name)
    loss = model(**BATCHES[name](make_rows())).loss
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LEARNING_RATE * (0 if p.grad is None else p.grad)
    return loss.item(), weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_the_model_itself(name, dtype):
    model, batch = make_model(name, dtype=dtype), BATCHES[name](make_rows())
    outputs = model(**batch)
    assert outputs.logits.dtype == dtype and outputs.loss.dtype == dtype
    tolerance = dict(rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    torch.testing.assert_close(aligned_loss(outputs, batch["labels"]), outputs.loss, **tolerance)
    counted = aligned_loss(outputs, batch["labels"], torch.tensor(100))
    torch.testing.assert_close(counted, outputs.loss * TOKENS[name] / 100, **tolerance)
    assert abs(causal_lm_loss(outputs, batch["labels"]) - outputs.loss) > 1e-4 * outputs.loss


@pytest.mark.parametrize("batch, accumulate", ARRANGEMENTS)
@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(name, batch, accumulate, tmp_path):
    loss, expected = by_the_model(name)
    assert (expected - weights(make_model(name))).abs().max() > 1e-2
    follow = TokenLossCallback()
    trainer, model = train(name, tmp_path, batch=batch, accumulate=accumulate, follow=follow)
    torch.testing.assert_close(weights(model), expected, **CLOSE[name])
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    assert logged(trainer, "tokens") == [TOKENS[name]]
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_padding_of_such_models_is_checked(name, tmp_path):
    """T5's labels are as long as its input here: attention_mask must not be taken for theirs."""
    follow = TokenLossCallback(check_padding=True)
    trainer, _ = train(name, tmp_path, batch=4, accumulate=2, follow=follow)
    assert follow.padding_report and len(follow.padding_report.changes) > 1
    checked = {change.entry for change in follow.padding_report.changes}
    assert "input_ids" in checked and ("labels" in checked) == (name == "bert")


@pytest.mark.parametrize("name", MODELS)
def test_what_they_would_leak_is_found(name, tmp_path):
    class Shown(torch.nn.Module):  # the check sees the right mask, the model the wrong one
        def __init__(self):
            super().__init__()
            self.model = make_model(name)

        def forward(self, attention_mask, **batch):
            return self.model(attention_mask=torch.ones_like(attention_mask), **batch)

    trainer = make_trainer(
        Shown(), tmp_path, data_collator=BATCHES[name], compute_loss_func=aligned_loss
    )
    TokenLossCallback(check_padding=True).attach(trainer)
    with pytest.raises(AssertionError, match=r"(?s)the step reads its padding.*input_ids .*LEAK"):
        trainer.train()


def test_an_evaluation_of_a_seq2seq_model(tmp_path):
    loss, _ = by_the_model("t5")
    trainer = make_trainer(
        make_model("t5"), tmp_path, data_collator=seq2seq_batch, compute_loss_func=aligned_loss,
        eval_dataset=make_rows(),
    )  # fmt: skip
    TokenLossCallback().attach(trainer)
    metrics = trainer.evaluate()
    torch.testing.assert_close(metrics["eval_token_loss"], loss, rtol=1e-6, atol=0)
    assert metrics["eval_tokens"] == TOKENS["t5"]


def test_tokens_of_a_function_that_the_callback_does_not_know(tmp_path):
    loss, _ = by_the_model("bert")

    def own(outputs, labels, num_items_in_batch=None):
        return aligned_loss(outputs, labels, num_items_in_batch)

    trainer, _ = train("bert", tmp_path, compute_loss_func=own, follow=TokenLossCallback(shift=0))
    assert logged(trainer, "tokens") == [TOKENS["bert"]]
    trainer, _ = train("bert", tmp_path, compute_loss_func=own, follow=TokenLossCallback())
    assert logged(trainer, "tokens") == [TOKENS["bert"] - len(LENGTHS)], "first labels of rows"


def test_masks_of_other_names():
    rows = make_rows([3, 2])

    def collator(features):
        batch = seq2seq_batch(features)
        mask = (batch["labels"] != -100).int()
        return batch | {
            "labels": batch["labels"].clamp_min(0), "decoder_attention_mask": mask
        }  # fmt: skip

    masked = MaskLabels(collator, mask_sources=False, mask="decoder_attention_mask")(rows)
    assert torch.equal(masked["labels"], seq2seq_batch(rows)["labels"])
    with pytest.raises(ValueError, match=r"mask must be about the labels, got attention_mask besi"):
        MaskLabels(collator, mask_sources=False)(rows)
