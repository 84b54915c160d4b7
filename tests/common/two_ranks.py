# SPDX-License-Identifier: BSD-3-Clause
"""One of two processes that train together, each on other rows; arguments: RANK PORT DIRECTORY."""

import os
import sys

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
)


def main(rank, port, directory):
    torch.set_num_threads(1)
    group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    os.environ.update(group, RANK=rank, LOCAL_RANK=rank)
    model, held_out = make_model("llama"), make_rows([12, 2, 3, 9])
    loss, trained = trained_by_hand("llama", make_rows())
    trainer = make_trainer(
        model, directory, batch=2, accumulate=2, eval_dataset=held_out, ddp_backend="gloo",
        data_collator=MaskLabels(Collator()), compute_loss_func=causal_lm_loss,
    )  # fmt: skip
    TokenLossCallback().attach(trainer)
    assert trainer.args.world_size == 2
    trainer.train()
    metrics = trainer.evaluate()
    torch.distributed.destroy_process_group()

    torch.testing.assert_close(weights(model), trained, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    assert logged(trainer, "tokens") == [PREDICTED]
    evaluated = token_losses(model, held_out).mean().item()
    torch.testing.assert_close(metrics["eval_token_loss"], evaluated, **EXACT)
    print("as one process")


if __name__ == "__main__":
    main(*sys.argv[1:])
