# SPDX-License-Identifier: BSD-3-Clause
"""Training with the real transformers Trainer: what is a step of eight must be eight of one."""

import functools
import math
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.slow

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    LOGGED,
    PREDICTED,
    Collator,
    logged,
    make_model,
    make_rows,
    make_trainer,
    token_losses,
    train,
    trained_by_hand,
    weights,
)

import masked_loss_ext as mle  # noqa: E402
from masked_loss_ext.integrations.transformers import MaskLabels, causal_lm_loss  # noqa: E402

ARRANGEMENTS = [(8, 1), (4, 2), (1, 8)]  # rows in a micro-batch, micro-batches in a step
MODELS = ["gpt2", "llama"]  # the Trainer counts the labels of the two differently
# Models in float64, so that what differs is the order of sums alone: some 1e3 roundings of 1e-16.
ROUNDING = dict(rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(name, tmp_path):
    loss, expected = trained_by_hand(name, make_rows())
    start = weights(make_model(name))
    assert (expected - start).abs().max() > 1e-2, "the step is too small to show anything"
    for batch, accumulate in ARRANGEMENTS:
        model = make_model(name)
        trainer = train(model, tmp_path, batch=batch, accumulate=accumulate)
        torch.testing.assert_close(weights(model), expected, **ROUNDING)
        torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)


@pytest.mark.parametrize("name", MODELS)
def test_several_steps_and_half_a_window_at_the_end(name, tmp_path):
    """Three micro-batches of two and one of two: the last window is shorter, its count too."""
    model, by_hand = make_model(name), make_model(name)
    train(model, tmp_path, batch=2, accumulate=3, steps=2)
    rows = make_rows()
    for window in (rows[:6], rows[6:]):
        grads = torch.autograd.grad(
            token_losses(by_hand, window).mean(), list(by_hand.parameters()), allow_unused=True
        )
        with torch.no_grad():
            for p, grad in zip(by_hand.parameters(), grads, strict=True):
                p -= 0 if grad is None else 0.5 * grad
    torch.testing.assert_close(weights(model), weights(by_hand), **ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_labels_left_unmasked_make_the_models_own_loss_wrong(name, tmp_path):
    right, expected = trained_by_hand(name, make_rows())
    model = make_model(name)
    trainer = train(model, tmp_path, data_collator=Collator(), compute_loss_func=None)
    (wrong,) = logged(trainer, "loss")
    print(f"{name}: loss {right:.4f} per token, {wrong:.4f} with the padding counted")
    assert abs(wrong - right) > 1e-3 * right
    assert (weights(model) - expected).abs().max() > 1e-2

    model = make_model(name)  # the collator alone repairs it
    trainer = train(model, tmp_path, compute_loss_func=None)
    torch.testing.assert_close(logged(trainer, "loss"), [right], **LOGGED)
    # Its own loss rounds the logits to float32.
    torch.testing.assert_close(weights(model), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_of_the_model_itself_on_rows_of_one_length(name):
    model = make_model(name, dtype=torch.float32)
    ids = torch.stack([row["input_ids"] for row in make_rows([9, 9, 9])])
    outputs = model(input_ids=ids, labels=ids)
    ours = causal_lm_loss(outputs, ids)
    torch.testing.assert_close(ours, outputs.loss, rtol=1e-6, atol=0)
    for count in (27, torch.tensor(27.0), torch.tensor(100)):
        own = model(input_ids=ids, labels=ids, num_items_in_batch=count).loss
        torch.testing.assert_close(causal_lm_loss(outputs, ids, count), own, rtol=1e-6, atol=0)
        tuples = causal_lm_loss(outputs.to_tuple()[1:], ids, num_items_in_batch=count)
        assert torch.equal(tuples, causal_lm_loss(dict(outputs), ids, num_items_in_batch=count))


def poison_padding(model):
    """NaN in the logits of all positions that the attention mask excludes."""

    def hook(module, args, kwargs, outputs):
        mask = kwargs["attention_mask"][..., None] != 0
        outputs["logits"] = torch.where(mask, outputs["logits"], float("nan"))
        return outputs

    model.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_garbage_in_the_padding_changes_no_bit(name, side, tmp_path):
    results = []
    for garbage in (False, True):
        model = make_model(name, dtype=torch.float32)
        if garbage:
            poison_padding(model)
        collator = MaskLabels(Collator(side, garbage))
        trainer = train(model, tmp_path, data_collator=collator, batch=4, accumulate=2)
        results.append((logged(trainer, "loss"), weights(model)))
    clean, dirty = results
    assert clean[0] == dirty[0]
    assert torch.equal(clean[1], dirty[1]) and dirty[1].isfinite().all()


def test_garbage_in_the_padding_ruins_what_is_not_masked(tmp_path):
    """What the test before would say if it tested nothing."""
    model = make_model("llama", dtype=torch.float32)
    poison_padding(model)
    collator = Collator(garbage=True)
    trainer = train(model, tmp_path, data_collator=collator, logging_nan_inf_filter=False)
    (loss,) = logged(trainer, "loss")
    assert math.isnan(loss)


@pytest.mark.parametrize("name", MODELS)
def test_the_trainer_counts_what_is_predicted(name, tmp_path):
    seen = []

    def loss_func(outputs, labels, num_items_in_batch=None):
        seen.append(float(num_items_in_batch))
        return causal_lm_loss(outputs, labels, num_items_in_batch)

    for side in ("right", "left"):
        collator = MaskLabels(Collator(side))
        train(make_model(name), tmp_path, data_collator=collator, compute_loss_func=loss_func)
    assert seen == [PREDICTED, PREDICTED]


@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would use the GPUs here")
def test_replicas_of_data_parallel_share_one_count(tmp_path):
    """Two replicas in the Trainer's arithmetic; without GPUs DataParallel runs the model itself."""
    loss, expected = trained_by_hand("llama", make_rows())
    model = make_model("llama")
    trainer = make_trainer(
        model, tmp_path, data_collator=MaskLabels(Collator()), compute_loss_func=causal_lm_loss
    )  # fmt: skip
    trainer.args._n_gpu = 2
    trainer.train()
    torch.testing.assert_close(weights(model), expected, **ROUNDING)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)


def test_keywords_of_masked_cross_entropy():
    g = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(2, 6, 11, generator=g), torch.randint(11, (2, 6), generator=g)
    labels[0, 4:] = -100
    target = labels[:, 1:].flatten()
    smoothed = functools.partial(causal_lm_loss, label_smoothing=0.1)
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), target, label_smoothing=0.1, reduction="sum"
    )
    torch.testing.assert_close(smoothed({"logits": logits}, labels, 7), expected / 7)
    options = dict(z_loss=1e-2, softcap=5.0, temperature=0.7, focal_gamma=2.0)
    torch.testing.assert_close(
        causal_lm_loss((logits,), labels, 7, **options),
        mle.reference.masked_cross_entropy(logits, labels, shift=1, normalizer=7, **options),
    )
    assert pickle.loads(pickle.dumps(smoothed)).keywords == {"label_smoothing": 0.1}


def test_gradient_over_the_logits_trains_the_same_weights(tmp_path):
    """With inplace_backward, and the loss scaled in place by the Trainer."""
    trained = []
    for inplace_backward in (False, True):
        model = make_model("llama", dtype=torch.float32)
        loss_func = functools.partial(causal_lm_loss, inplace_backward=inplace_backward)
        train(model, tmp_path, batch=4, accumulate=2, compute_loss_func=loss_func)
        trained.append(weights(model))
    assert torch.equal(*trained)


def test_bfloat16_autocast(tmp_path):
    model = make_model("llama", dtype=torch.float32)
    loss, _ = trained_by_hand("llama", make_rows())
    trainer = train(model, tmp_path, bf16=True, batch=4, accumulate=2)
    # Logits of size 0.1 rounded to 8 bits, averaged over 45 tokens.
    torch.testing.assert_close(logged(trainer, "loss"), [loss], rtol=1e-3, atol=0)


def test_a_window_in_which_nothing_counts(tmp_path):
    """Rows of one token predict nothing; the models' own loss is NaN."""
    model = make_model("llama")
    start = weights(model)
    trainer = train(model, tmp_path, rows=make_rows([1, 1, 1, 1]), batch=2, accumulate=2)
    assert logged(trainer, "loss") == [0.0] and torch.equal(weights(model), start)


def test_mask_labels_by_hand():
    rows = [{"input_ids": torch.tensor(ids)} for ids in ([5, 6, 7, 8], [5, 6])]
    batch = MaskLabels(Collator("right"))(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7, 8], [-100, 6, -100, -100]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [5, 6, 0, 0]]
    batch = MaskLabels(Collator("left"))(rows)
    assert batch["labels"].tolist() == [[-100, 6, 7, 8], [-100, -100, -100, 6]]
    batch = MaskLabels(Collator("left"), mask_sources=False)(rows)
    assert batch["labels"].tolist() == [[5, 6, 7, 8], [-100, -100, 5, 6]]


def test_mask_labels_leaves_what_the_collator_keeps():
    from transformers import BatchEncoding

    kept = Collator()([{"input_ids": torch.tensor([5, 6])}, {"input_ids": torch.tensor([7])}])
    kept["labels"] = kept["input_ids"]  # one tensor under two names, as many write it
    for batch in (kept, BatchEncoding(kept)):
        masked = MaskLabels(lambda rows, batch=batch: batch)([])
        assert type(masked) is type(batch) and masked["labels"].tolist() == [
            [-100, 6],
            [-100, -100],
        ]
        assert batch["labels"].tolist() == [[5, 6], [7, 0]]
        assert masked["input_ids"] is batch["input_ids"]
    again = pickle.loads(pickle.dumps(MaskLabels(Collator("left"))))
    assert again.collator.side == "left" and again.mask_sources


MASK = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"attention_mask": MASK}, r"batch must have labels, got \['attention_mask'\]; labels may"),
        ({"labels": MASK}, r"must have attention_mask, got \['labels'\]; without it nothing says"),
        ({"labels": MASK, "attention_mask": [[1]]}, "attention_mask must be a tensor, got list"),
        (
            {"labels": MASK, "attention_mask": MASK[:, None, None]},
            r"must be \[B, S\] like labels, got \[2, 1, 1, 3\] for labels of \[2, 3\]",
        ),
    ],
)
def test_batches_that_cannot_be_masked(batch, text):
    with pytest.raises(ValueError, match="MaskLabels: .*" + text):
        MaskLabels(lambda rows: batch)([])


def test_errors():
    with pytest.raises(TypeError, match="MaskLabels: collator must be callable, got NoneType"):
        MaskLabels(None)
    logits = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="causal_lm_loss: labels must be a tensor, got NoneType"):
        causal_lm_loss({"logits": logits}, None)
    with pytest.raises(ValueError, match=r"outputs must hold logits, got \['loss'\]"):
        causal_lm_loss({"loss": logits}, torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="outputs must hold logits, got Tensor"):
        causal_lm_loss(logits, torch.zeros(1, 2, dtype=torch.int64))


def test_without_transformers():
    """The package does not import it; the integration says what is missing."""
    code = """
import sys
import masked_loss_ext
assert not [name for name in sys.modules if name.split(".")[0] in ("transformers", "accelerate")]
sys.modules["transformers"] = None  # as if it were not installed
try:
    import masked_loss_ext.integrations.transformers
except ModuleNotFoundError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "masked_loss_ext.integrations.transformers needs transformers and accelerate: "
        "pip install 'masked_loss_ext[hf]'\n"
    )
