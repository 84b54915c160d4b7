# SPDX-License-Identifier: BSD-3-Clause
"""Lightning's Trainer with sums of losses and TokenMean: weights against float64 by hand."""

import logging
import os
import warnings

import pytest
import torch
from example_runs import last_figures, run_example
from places import place

pytestmark = pytest.mark.slow
place("transformers", "lightning")

import lightning.pytorch as pl  # noqa: E402
from tiny_models import (  # noqa: E402
    LEARNING_RATE,
    Collator,
    make_model,
    make_rows,
    token_losses,
    trained_by_hand,
    weights,
)

import masked_loss_ext as mle  # noqa: E402
from masked_loss_ext.integrations.lightning import TokenMean  # noqa: E402

ROUNDING = dict(rtol=1e-12, atol=1e-13)  # of GPT-2: norms of Llama are float32, whatever it is
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def count(batch):
    return batch["attention_mask"][:, 1:].sum()


class Module(pl.LightningModule):
    def __init__(self, reduction="sum", automatic=True):
        super().__init__()
        self.model = make_model("gpt2")
        self.reduction = reduction
        self.automatic_optimization = automatic

    def training_step(self, batch, index):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return mle.masked_cross_entropy(logits, ids, mask, shift=1, reduction=self.reduction)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


def fit(module, rows, batch, accumulate, callbacks, **options):
    data = torch.utils.data.DataLoader(rows, batch_size=batch, collate_fn=Collator())
    arguments = dict(
        max_epochs=1, accumulate_grad_batches=accumulate, callbacks=callbacks, accelerator="cpu",
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about workers and logging intervals
        pl.Trainer(**arguments | options).fit(module, data)


@pytest.mark.parametrize(("batch", "accumulate"), [(8, 1), (4, 2), (1, 8)])
def test_one_step_of_eight_is_two_of_four_is_eight_of_one(batch, accumulate):
    _, expected = trained_by_hand("gpt2", make_rows())
    module, mean = Module(), TokenMean(count)
    fit(module, make_rows(), batch, accumulate, [mean])
    assert mean.tokens == sum(len(row["input_ids"]) - 1 for row in make_rows())
    torch.testing.assert_close(weights(module.model), expected, **ROUNDING)


def test_half_a_window_at_the_end():
    module, by_hand = Module(), make_model("gpt2")
    fit(module, make_rows(), 2, 3, [TokenMean(count)])
    for window in (make_rows()[:6], make_rows()[6:]):
        by_hand.zero_grad()
        token_losses(by_hand, window).mean().backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= LEARNING_RATE * p.grad
    torch.testing.assert_close(weights(module.model), weights(by_hand), **ROUNDING)


def test_means_of_means_are_another_step():
    """What the tests before would see without the callback."""
    _, expected = trained_by_hand("gpt2", make_rows())
    module = Module("mean")
    fit(module, make_rows(), 4, 2, [])
    assert (weights(module.model) - expected).abs().max() > 1e-3


def test_gradients_are_clipped_after_they_are_divided():
    _, expected = trained_by_hand("gpt2", make_rows())
    start = weights(make_model("gpt2"))
    norm = (expected - start).norm() / LEARNING_RATE
    for share, limit in ((1.0, 1.01), (0.5, 0.5)):
        module = Module()
        fit(
            module, make_rows(), 4, 2, [TokenMean(count)], gradient_clip_val=float(norm * limit),
        )  # fmt: skip
        step = weights(module.model) - start
        torch.testing.assert_close(step, share * (expected - start), rtol=1e-5, atol=1e-9)


def test_a_window_without_tokens():
    module = Module()
    start = weights(module.model)
    fit(module, make_rows([1, 1]), 1, 2, [TokenMean(count)])
    assert torch.equal(weights(module.model), start)


def on_two_ranks():
    """Both take every second row; the step is that of all."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    os.environ |= {"LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "NODE_RANK": "0"}
    _, expected = trained_by_hand("gpt2", make_rows())
    module = Module()
    sampler = torch.utils.data.DistributedSampler(range(8), size, rank, shuffle=False)
    rows = [make_rows()[i] for i in sampler]
    fit(
        module, rows, 2, 2, [TokenMean(count)], devices=size, strategy="ddp",
        use_distributed_sampler=False,
    )  # fmt: skip
    torch.testing.assert_close(weights(module.model), expected, **ROUNDING)


def test_two_ranks(ranks):
    ranks(2).run(on_two_ranks, timeout=200)


def test_refusals():
    with pytest.raises(TypeError, match="TokenMean: count must be callable, got int"):
        TokenMean(3)
    with pytest.raises(ValueError, match="module must optimize by itself"):
        fit(Module(automatic=False), make_rows(), 8, 1, [TokenMean(count)])
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16: .* got 16-true"):
        fit(Module(), make_rows(), 4, 2, [TokenMean(count)], precision="16-true")


def test_example():
    text = run_example("lightning_module.py", "--quick")
    exact, means, before = last_figures(text, "bits per byte, held out: ")
    assert exact < before - 0.2 and exact != means
