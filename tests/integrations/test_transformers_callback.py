# SPDX-License-Identifier: BSD-3-Clause
"""TokenLossCallback: the exact loss in the logs, and the padding checked on the first step."""

from importlib.util import find_spec

import pytest
import torch

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    EXACT,
    LOGGED,
    PREDICTED,
    Collator,
    logged,
    make_model,
    make_rows,
    make_trainer,
    token_losses,
    weights,
)
from trainer_ranks import train_together  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
)


def make_followed(model, directory, *, check_padding=False, **options):
    options = dict(data_collator=MaskLabels(Collator()), compute_loss_func=causal_lm_loss) | options
    trainer = make_trainer(model, directory, **options)
    return trainer, TokenLossCallback(check_padding=check_padding).attach(trainer)


@pytest.mark.parametrize("batch, accumulate", [(8, 1), (4, 2), (1, 8)])
def test_loss_of_a_window(batch, accumulate, tmp_path):
    model = make_model("gpt2")
    expected = token_losses(model, make_rows()).mean().item()
    trainer, _ = make_followed(model, tmp_path, batch=batch, accumulate=accumulate)
    trainer.train()
    torch.testing.assert_close(logged(trainer, "token_loss"), [expected], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]


def test_loss_of_several_steps_weighs_tokens_not_steps(tmp_path):
    """Without an update, so that the steps can be checked together."""
    model = make_model("llama")
    rows = make_rows([12, 12, 12, 12, 2, 2, 3, 3])
    parts = [token_losses(model, rows[:4]), token_losses(model, rows[4:])]
    exact = torch.cat(parts).mean().item()
    mean_of_steps = (parts[0].mean() + parts[1].mean()).item() / 2
    assert abs(exact - mean_of_steps) > 1e-4 * exact
    trainer, _ = make_followed(
        model, tmp_path, rows=rows, batch=2, accumulate=2, steps=2, logging_steps=2,
        learning_rate=0.0,
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(logged(trainer, "token_loss"), [exact], **EXACT)
    torch.testing.assert_close(logged(trainer, "loss"), [mean_of_steps], **LOGGED)
    assert logged(trainer, "tokens") == [44 + 6]


def test_without_mask_labels_the_divisor_does_not_matter(tmp_path):
    """GPT-2's count includes first tokens: its loss is too small, token_loss is not."""
    model = make_model("gpt2")
    rows = make_rows([6, 6, 6, 6])
    expected = token_losses(model, rows).mean().item()
    trainer, _ = make_followed(model, tmp_path, rows=rows, batch=2, accumulate=2,
                               data_collator=Collator())  # fmt: skip
    trainer.train()
    torch.testing.assert_close(logged(trainer, "token_loss"), [expected], **EXACT)
    torch.testing.assert_close(logged(trainer, "loss"), [expected * 5 / 6], **LOGGED)


def test_loss_of_an_evaluation(tmp_path):
    model = make_model("llama")
    held_out = make_rows([12, 12, 12, 12, 12, 2])  # batches of 4 and 2
    expected = token_losses(model, held_out).mean().item()
    trainer, _ = make_followed(
        model, tmp_path, eval_dataset=held_out, learning_rate=0.0, eval_strategy="steps",
        eval_steps=1,
    )  # fmt: skip
    trainer.train()
    torch.testing.assert_close(logged(trainer, "eval_token_loss"), [expected], **EXACT)
    metrics = trainer.evaluate()  # what metric_for_best_model is looked up in
    torch.testing.assert_close(metrics["eval_token_loss"], expected, **EXACT)
    assert metrics["eval_tokens"] == 56
    metrics = trainer.predict(held_out).metrics
    torch.testing.assert_close(metrics["test_token_loss"], expected, **EXACT)
    assert len(logged(trainer, "tokens")) == 1, "an evaluation is no training"


def test_other_callbacks_are_shown_the_loss(tmp_path):
    class Dashboard(TrainerCallback):
        seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    trainer, _ = make_followed(make_model("llama"), tmp_path, callbacks=[Dashboard()])
    trainer.train()
    assert Dashboard.seen[0]["token_loss"] == logged(trainer, "token_loss")[0]


def test_check_finds_the_labels_that_are_not_masked(tmp_path):
    model = make_model("gpt2")
    start = weights(model)
    trainer, callback = make_followed(
        model, tmp_path, check_padding=True, data_collator=Collator(), batch=4, accumulate=2
    )
    with pytest.raises(AssertionError, match=r"(?s)the step reads its padding.*labels .*LEAK"):
        trainer.train()
    assert torch.equal(weights(model), start), "stopped before the first update"
    assert not callback.padding_report
    assert "labels" in {change.entry for change in callback.padding_report.leaks}


def test_check_warns_if_told_to(tmp_path):
    trainer, callback = make_followed(
        make_model("llama"), tmp_path, check_padding="warn", data_collator=Collator(), steps=2
    )
    with pytest.warns(UserWarning, match="TokenLossCallback: check_padding: the step reads"):
        trainer.train()
    assert trainer.state.global_step == 2 and not callback.padding_report


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_check_passes_and_changes_nothing(name, side, tmp_path):
    """Dropout too: the random numbers of the training are those that it would have had."""
    trained = []
    for check_padding in (False, True):
        model = make_model(name, dropout=0.1, dtype=torch.float32)
        trainer, callback = make_followed(
            model, tmp_path, check_padding=check_padding, batch=4, accumulate=2, steps=2,
            data_collator=MaskLabels(Collator(side)),
        )  # fmt: skip
        trainer.train()
        trained.append((weights(model), logged(trainer, "token_loss")))
    assert callback.padding_report and callback.padding_report.changes
    assert torch.equal(trained[0][0], trained[1][0]) and trained[0][1] == trained[1][1]


def test_left_padding_leaks_through_its_last_position(tmp_path):
    """The first token of a row is predicted at padding; mask_sources is what leaves it out."""
    collator = MaskLabels(Collator("left"), mask_sources=False)
    trainer, _ = make_followed(
        make_model("llama"), tmp_path, check_padding="raise", data_collator=collator
    )
    with pytest.raises(AssertionError, match=r"(?s)the step reads its padding.*input_ids .*LEAK"):
        trainer.train()


def test_check_waits_for_padding(tmp_path):
    rows = make_rows([5, 5, 5, 5, 4, 2])
    trainer, callback = make_followed(
        make_model("llama"), tmp_path, rows=rows, check_padding=True, batch=2, steps=3
    )
    trainer.train()
    assert callback.padding_report.total - callback.padding_report.kept == 2


def test_check_says_where_there_was_nothing_to_check(tmp_path):
    trainer, callback = make_followed(
        make_model("llama"), tmp_path, rows=make_rows([5, 5]), check_padding=True
    )
    with pytest.warns(UserWarning, match="padding was not checked: no batch had padding"):
        trainer.train()
    assert callback.padding_report is None

    def without_mask(rows):
        return {k: v for k, v in Collator()(rows).items() if k != "attention_mask"}

    trainer, _ = make_followed(
        make_model("llama"), tmp_path, check_padding=True, data_collator=without_mask
    )
    with pytest.warns(UserWarning, match="not checked: the model got no attention_mask"):
        trainer.train()


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="check_padding must be True, False, 'raise' or 'warn'"):
        TokenLossCallback(check_padding="yes")
    trainer = make_trainer(make_model("llama"), tmp_path, data_collator=Collator())
    with pytest.raises(ValueError, match="the trainer must have a compute_loss_func"):
        TokenLossCallback().attach(trainer)
    trainer, callback = make_followed(
        make_model("llama"), tmp_path, callbacks=[TokenLossCallback()]
    )
    with pytest.raises(ValueError, match="attached already"):
        callback.attach(trainer)
    with pytest.raises(ValueError, match=r"call TokenLossCallback\(\).attach\(trainer\)"):
        trainer.train()


@pytest.mark.slow
def test_two_ranks(ranks, tmp_path):
    """Both log the loss over the tokens of both, and train the weights that one would."""
    ranks(2).run(train_together, "causal_lm_loss", tmp_path, timeout=300)
