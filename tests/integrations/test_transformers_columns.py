# SPDX-License-Identifier: BSD-3-Clause
"""Columns of the batch that the Trainer's loss gets: weights, shifted labels, documents."""

import functools
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F

if find_spec("transformers") is None:  # a broken one is an error
    pytest.skip("transformers is not installed: pip install .[hf]", allow_module_level=True)

from tiny_models import (  # noqa: E402
    EXACT,
    LEARNING_RATE,
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

from masked_loss_ext.integrations.transformers import (  # noqa: E402
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
    pass_columns,
)

ROUNDING = dict(rtol=1e-6, atol=1e-7)  # the weights of the tokens are float32


def weigh(row):
    """A weight per token of a row, from 0 to 2."""
    return (row["input_ids"] % 5).float() / 2


class Weighted(Collator):
    """With a weight per label; garbage where there is no token."""

    def __call__(self, rows):
        batch = super().__call__(rows)
        batch["token_weight"] = torch.full(batch["labels"].shape, 1e6)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            place = slice(n) if self.side == "right" else slice(-n, None)
            batch["token_weight"][i, place] = weigh(row)
        return batch


def weighted_trainer(model, directory, *, side="right", **options):
    options = dict(
        data_collator=MaskLabels(Weighted(side)), compute_loss_func=causal_lm_loss
    ) | options  # fmt: skip
    return make_trainer(model, directory, **options)


@functools.cache
def weighted_by_hand():
    """Loss and weights after one step on sum of weight times loss over the number of tokens."""
    model, total = make_model("llama"), 0
    for row in make_rows():
        total = total + (token_losses(model, [row]) * weigh(row)[1:]).sum()
    loss = total / PREDICTED
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LEARNING_RATE * p.grad
    return loss.item(), weights(model)


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch, accumulate", [(8, 1), (4, 2), (1, 8)])
def test_a_weight_per_token(batch, accumulate, side, attach_first, tmp_path):
    loss, expected = weighted_by_hand()
    model = make_model("llama")
    trainer = weighted_trainer(model, tmp_path, batch=batch, accumulate=accumulate, side=side)
    follow = TokenLossCallback(check_padding=batch > 1)
    if attach_first:
        follow.attach(trainer)
    assert pass_columns(trainer, "token_weight") is trainer
    if not attach_first:
        follow.attach(trainer)
    trainer.train()
    torch.testing.assert_close(weights(model), expected, **ROUNDING)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]
    if batch > 1:
        assert follow.padding_report
        assert "token_weight" in {change.entry for change in follow.padding_report.changes}


def test_an_evaluation_and_a_keyword_of_another_name(tmp_path):
    model, held_out = make_model("llama"), make_rows([12, 2, 3, 9, 9])

    def renamed(rows):
        batch = MaskLabels(Weighted())(rows)
        return {("importance" if k == "token_weight" else k): v for k, v in batch.items()}

    trainer = weighted_trainer(model, tmp_path, data_collator=renamed, eval_dataset=held_out)
    TokenLossCallback().attach(pass_columns(trainer, token_weight="importance"))
    metrics = trainer.evaluate()
    losses = [token_losses(model, [row]) * weigh(row)[1:] for row in held_out]
    expected = torch.cat(losses).mean().item()
    torch.testing.assert_close(metrics["eval_token_loss"], expected, **EXACT)
    assert metrics["eval_tokens"] == 12 + 2 + 3 + 9 + 9 - 5


def test_shift_labels_through_the_trainer(tmp_path):
    """Labels as they are would train something else: they are zeros where that is not counted."""
    loss, expected = unweighted_by_hand()
    model = make_model("llama")

    def shifted(rows):
        batch = MaskLabels(Collator())(rows)
        shift_labels = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        return batch | {"shift_labels": shift_labels, "labels": torch.zeros_like(shift_labels)}

    trainer = make_trainer(
        model, tmp_path, data_collator=shifted, compute_loss_func=causal_lm_loss, batch=4,
        accumulate=2,
    )  # fmt: skip
    TokenLossCallback().attach(pass_columns(trainer, "shift_labels"))
    trainer.train()
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]
    torch.testing.assert_close(weights(model), expected, rtol=1e-12, atol=1e-13)


def unweighted_by_hand():
    model = make_model("llama")
    loss = token_losses(model, make_rows()).mean()
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= LEARNING_RATE * p.grad
    return loss.item(), weights(model)


def test_a_column_that_the_model_takes_too_stays_with_it(tmp_path):
    """attention_mask as the loss's mask: the labels' padding is left as it is."""
    seen = []
    model = make_model("llama")
    model.register_forward_pre_hook(lambda m, a, k: seen.append(set(k)), with_kwargs=True)
    trainer = make_trainer(
        model, tmp_path, data_collator=Collator(), compute_loss_func=causal_lm_loss
    )
    TokenLossCallback().attach(pass_columns(trainer, mask="attention_mask"))
    trainer.train()
    assert seen == [{"input_ids", "attention_mask"} | (seen[0] & {"num_items_in_batch"})]
    loss, _ = unweighted_by_hand()
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]


def test_documents_of_a_packed_row(tmp_path):
    rows = make_rows([5, 7])
    packed = torch.cat([row["input_ids"] for row in rows])[None]
    batch = {"input_ids": packed, "labels": packed, "seq_idx": torch.tensor([[4] * 5 + [9] * 7])}
    model = make_model("llama")
    trainer = make_trainer(
        model, tmp_path, rows=[{}], data_collator=lambda rows: dict(batch),
        compute_loss_func=causal_lm_loss, learning_rate=0.0,
    )  # fmt: skip
    TokenLossCallback().attach(pass_columns(trainer, segment_ids="seq_idx"))
    trainer.train()
    losses = F.cross_entropy(model(packed).logits[0, :-1], packed[0, 1:], reduction="none")
    expected = torch.cat([losses[:4], losses[5:]])  # but the first token of the second
    torch.testing.assert_close(logged(trainer, "token_loss"), [expected.mean().item()], **EXACT)
    assert logged(trainer, "tokens") == [4 + 6]


def test_the_models_below_a_wrapper_are_asked(tmp_path):
    """As PEFT wraps: any keyword may be passed, and only the model below says what it takes."""

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = make_model("llama")

        def get_base_model(self):
            return self.model

        def forward(self, *args, **kwargs):
            assert "token_weight" not in kwargs and "attention_mask" in kwargs
            return self.model(*args, **kwargs)

    trainer = weighted_trainer(Wrapper(), tmp_path)
    pass_columns(trainer, "token_weight", mask="attention_mask").train()
    torch.testing.assert_close(logged(trainer, "loss"), [weighted_by_hand()[0]], **LOGGED)


def test_a_compiled_model_says_what_it_takes(tmp_path):
    model = torch.compile(make_model("llama"), backend="eager")
    trainer = weighted_trainer(model, tmp_path)
    pass_columns(trainer, "token_weight", mask="attention_mask").train()
    torch.testing.assert_close(logged(trainer, "loss"), [weighted_by_hand()[0]], **LOGGED)


def test_a_forward_that_takes_anything(tmp_path):
    class Anything(torch.nn.Module):
        def forward(self, *args, **kwargs): ...

    with pytest.raises(ValueError, match="the forward of Anything must name its parameters, got "):
        pass_columns(weighted_trainer(Anything(), tmp_path), "token_weight")


def test_columns_that_cannot_be_passed(tmp_path):
    def make(**options):
        return weighted_trainer(make_model("llama"), tmp_path, **options)

    trainer = pass_columns(make(), "token_weigth")
    with pytest.raises(
        ValueError, match=r"pass_columns: the batch must have token_weigth, got \['input_ids', "
    ):
        trainer.train()
    assert trainer.compute_loss_func is causal_lm_loss, "put back"
    with pytest.raises(TypeError, match="causal_lm_loss: unexpected keyword argument weights; did"):
        pass_columns(make(), weights="token_weight").train()
    with pytest.raises(
        TypeError, match="pass_columns: trainer must be a transformers Trainer, got"
    ):
        pass_columns(make_model("llama"), "token_weight")
    with pytest.raises(ValueError, match="pass_columns: the trainer must have a compute_loss_func"):
        pass_columns(make(compute_loss_func=None), "token_weight")
    with pytest.raises(ValueError, match="pass_columns: columns must name at least one, got none"):
        pass_columns(make())
    with pytest.raises(TypeError, match="pass_columns: columns must be strings, got int"):
        pass_columns(make(), token_weight=3)
    with pytest.raises(ValueError, match="must be others than outputs, labels, num_items_in_batch"):
        pass_columns(make(), "labels")
    for again in (dict(token_weight="other"), {}):
        with pytest.raises(ValueError, match="must be passed once, got token_weight twice"):
            pass_columns(pass_columns(make(), "token_weight"), *[] if again else ["token_weight"],
                         **again)  # fmt: skip
