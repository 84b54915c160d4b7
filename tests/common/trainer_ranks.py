# SPDX-License-Identifier: BSD-3-Clause
"""What each of several ranks does with a Trainer, on other rows than the others."""

import torch
from tiny_models import (
    EXACT,
    LOGGED,
    PREDICTED,
    Collator,
    logged,
    make_model,
    make_rows,
    make_trainer,
    token_losses,
    trained_by_hand,
    weights,
)

from masked_loss_ext.integrations.transformers import (
    MaskLabels,
    TokenLossCallback,
    causal_lm_loss,
    logit_free,
)


def train_together(way, directory):
    """way: "causal_lm_loss", with the exact loss in the logs, or "logit_free"."""
    model, held_out = make_model("llama"), make_rows([12, 2, 3, 9])
    loss, trained = trained_by_hand("llama", make_rows())
    logits = way == "causal_lm_loss"
    trainer = make_trainer(
        model if logits else logit_free(model), directory, batch=2, accumulate=2,
        eval_dataset=held_out, ddp_backend="gloo", data_collator=MaskLabels(Collator()),
        compute_loss_func=causal_lm_loss if logits else None,
    )  # fmt: skip
    if logits:
        TokenLossCallback().attach(trainer)
    assert trainer.args.world_size == 2
    trainer.train()
    metrics = trainer.evaluate()

    torch.testing.assert_close(weights(model), trained, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    if not logits:
        return
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]
    evaluated = token_losses(model, held_out).mean().item()
    torch.testing.assert_close(metrics["eval_token_loss"], evaluated, **EXACT)
