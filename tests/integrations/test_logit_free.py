# SPDX-License-Identifier: BSD-3-Clause
"""logit_free in the real Trainer: the weights and losses that the same model has with logits."""

from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.slow

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    DECODERS,
    LOGGED,
    PREDICTED,
    Collator,
    logged,
    make_model,
    make_rows,
    train,
    trained_by_hand,
    weights,
)
from trainer_ranks import train_together  # noqa: E402
from transformers import Qwen2ForCausalLM  # noqa: E402

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    logit_free,
    with_logits,
)

MODELS = ["gpt2", *DECODERS]
MODELS.remove("mixtral")  # PyTorch multiplies its experts in float32 alone; see test_auxiliary_loss
ARRANGEMENTS = [(8, 1), (4, 2), (1, 8)]  # rows in a micro-batch, micro-batches in a step
# Against rows one by one, each without padding. In float64 what differs is the order of sums, 1e3
# roundings of 1e-16; norms of Gemma and Cohere compute in float32, here of 1e-2 as the weights.
CLOSE = dict.fromkeys(MODELS, dict(rtol=1e-12, atol=1e-13))
CLOSE |= dict.fromkeys(["gemma2", "cohere"], dict(rtol=0, atol=1e-8))


def train_without_logits(model, directory, **options):
    """Its outputs in training are looked at too."""
    seen = []

    def look(module, args, outputs):
        seen.append((module.training, outputs.get("logits") is None))

    hook = logit_free(model).register_forward_hook(look)
    trainer = train(model, directory, compute_loss_func=None, **options)
    hook.remove()
    assert seen and all(training == without for training, without in seen)
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(name, tmp_path):
    loss, expected = trained_by_hand(name, make_rows())
    assert (expected - weights(make_model(name))).abs().max() > 1e-2
    for batch, accumulate in ARRANGEMENTS:
        model = make_model(name)
        trainer = train_without_logits(model, tmp_path, batch=batch, accumulate=accumulate)
        torch.testing.assert_close(weights(model), expected, **CLOSE[name])
        torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_left(name, tmp_path):
    """Against causal_lm_loss of the logits: GPT-2 counts positions from the padding on.

    Gemma 2 is NaN in float64 with or without logits: a row of its mask that is float64's least
    number everywhere is -inf in the float32 of its softmax.
    """
    dtype, close = torch.float64, CLOSE[name]
    if name == "gemma2":
        dtype, close = torch.float32, dict(rtol=1e-5, atol=1e-6)
    for batch, accumulate in ARRANGEMENTS:
        trained = []
        for way in (train, train_without_logits):
            model = make_model(name, dtype=dtype)
            options = dict(data_collator=MaskLabels(Collator("left")), batch=batch)
            trainer = way(model, tmp_path, accumulate=accumulate, **options)
            trained.append((weights(model), logged(trainer, "loss")))
        torch.testing.assert_close(trained[1][0], trained[0][0], **close)
        torch.testing.assert_close(trained[1][1], trained[0][1], **LOGGED)


@pytest.mark.parametrize("name", MODELS)
def test_as_the_model_itself_over_several_steps(name, tmp_path):
    """With its own loss and logits, half a window at the end, and an evaluation after each."""
    results = []
    for way in (train, train_without_logits):
        model = make_model(name, dtype=torch.float32)
        options = dict(batch=2, accumulate=3, steps=4, eval_dataset=make_rows([5, 9, 2]))
        options |= dict(eval_strategy="steps", eval_steps=1, learning_rate=0.1)
        if way is train:
            options |= dict(compute_loss_func=None)
        trainer = way(model, tmp_path, **options)
        losses = logged(trainer, "loss") + logged(trainer, "eval_loss")
        results.append((losses, weights(model)))
        assert len(losses) == 8
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


def test_padding_that_labels_count_is_counted(tmp_path):
    """Labels alone decide, as for the model's own loss: what the tests before would not tell."""
    right, _ = trained_by_hand("llama", make_rows())
    losses = []
    for compute in (train, train_without_logits):
        options = dict(compute_loss_func=None) if compute is train else {}
        trainer = compute(make_model("llama"), tmp_path, data_collator=Collator(), **options)
        losses += logged(trainer, "loss")
    torch.testing.assert_close(*losses, **LOGGED)
    assert abs(losses[0] - right) > 1e-3 * right


def test_bfloat16_autocast(tmp_path):
    """accelerate wraps the forward; its loss is not widened from bfloat16."""
    loss, _ = trained_by_hand("llama", make_rows())
    model = make_model("llama", dtype=torch.float32)
    trainer = train_without_logits(model, tmp_path, bf16=True, batch=4, accumulate=2)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], rtol=1e-3, atol=0)
    restored = with_logits(model)  # accelerate's wrapper still calls what it was made of
    batch = MaskLabels(Collator())(make_rows())
    assert restored.train()(**batch).logits is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, tmp_path):
    _, expected = trained_by_hand("llama", make_rows())
    model = make_model("llama")
    train_without_logits(
        model, tmp_path, batch=4, accumulate=2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    torch.testing.assert_close(weights(model), expected, **CLOSE["llama"])


def test_torch_compile_in_the_trainer(tmp_path):
    loss, expected = trained_by_hand("llama", make_rows())
    model = make_model("llama")
    torch._dynamo.reset()
    trainer = train_without_logits(
        model, tmp_path, batch=8, torch_compile=True, torch_compile_backend="aot_eager"
    )
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    torch.testing.assert_close(weights(model), expected, **CLOSE["llama"])


def test_count_of_data_parallel():
    """Of one number, not of none: as a replica gets it."""
    _, expected = trained_by_hand("llama", make_rows())
    model = logit_free(make_model("llama"))
    batch = MaskLabels(Collator())(make_rows())
    loss = model(**batch, num_items_in_batch=torch.tensor([PREDICTED])).loss
    assert loss.shape == ()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad
    torch.testing.assert_close(weights(model), expected, **CLOSE["llama"])


def test_columns_of_the_dataset_that_the_trainer_drops(tmp_path):
    """By the signature of forward, whose parameters and **kwargs are still the model's."""
    rows = [{**row, "origin": "somewhere"} for row in make_rows()]
    model = make_model("llama")
    trainer = train_without_logits(model, tmp_path, rows=rows, remove_unused_columns=True)
    assert trainer.model_accepts_loss_kwargs and trainer.label_names == ["labels"]
    assert {"input_ids", "labels", "logits_to_keep"} < set(trainer._signature_columns)
    torch.testing.assert_close(
        weights(model), trained_by_hand("llama", make_rows())[1], **CLOSE["llama"]
    )


def test_checkpoints_and_what_is_saved(tmp_path):
    model = make_model("qwen2")  # tied weights
    trainer = train_without_logits(model, tmp_path, save_strategy="steps", save_steps=1)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float64)
    assert type(loaded) is Qwen2ForCausalLM, "what is loaded is nobody's logit-free model"
    assert loaded.config.architectures == ["Qwen2ForCausalLM"]
    assert torch.equal(weights(loaded), weights(model))
    assert trainer.model is model


def test_two_ranks(ranks, tmp_path):
    """Both train the weights that one would, and log its loss."""
    ranks(2).run(train_together, "logit_free", tmp_path, timeout=300)
