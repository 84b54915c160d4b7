# SPDX-License-Identifier: BSD-3-Clause
"""Two processes that train together, each on other rows; arguments: WAY RANK PORT DIRECTORY."""

import os
import socket
import subprocess
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
    logit_free,
)

AS_ONE = "as one process"


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
    torch.distributed.destroy_process_group()

    torch.testing.assert_close(weights(model), trained, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(logged(trainer, "loss"), [loss], **LOGGED)
    if not logits:
        return
    torch.testing.assert_close(logged(trainer, "token_loss"), [loss], **EXACT)
    assert logged(trainer, "tokens") == [PREDICTED]
    evaluated = token_losses(model, held_out).mean().item()
    torch.testing.assert_close(metrics["eval_token_loss"], evaluated, **EXACT)


def run_two_ranks(way, directory):
    """Both, from one test."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, way, str(rank), str(port), directory],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        texts = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # nothing, if it has ended
    assert all(AS_ONE in text for text in texts), "\n---\n".join(texts)


def main(way, rank, port, directory):
    """One of the two."""
    torch.set_num_threads(1)
    group = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2")
    os.environ.update(group, RANK=rank, LOCAL_RANK=rank)
    train_together(way, directory)
    print(AS_ONE)


if __name__ == "__main__":
    main(*sys.argv[1:])
