#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""Lightning with accumulated gradients and one denominator for the window: TokenMean.

A byte-level language model on functions of unequal length, by sums of token losses that the
callback divides by the tokens of the window, and by Lightning's own mean of means.
Lightning is not installed by `make demo`: pip install lightning, or `make places`.

python examples/lightning_module.py          about 40 seconds on two cores
python examples/lightning_module.py --quick
"""

from __future__ import annotations

import logging
import warnings

import examples_common as common
import torch
from torch.utils.data import DataLoader

import masked_loss_ext as mle

try:
    import lightning.pytorch as pl

    from masked_loss_ext.integrations.lightning import TokenMean
except ModuleNotFoundError as error:
    raise SystemExit(f"lightning_module: {error}; pip install lightning") from None

MICRO_BATCHES, ROWS, LEARNING_RATE = 4, 2, 3e-3


class Module(pl.LightningModule):
    """Sums where TokenMean divides them, means where it does not."""

    def __init__(self, seed: int, reduction: str) -> None:
        super().__init__()
        self.model = common.make_language_model(seed)
        self.reduction = reduction

    def training_step(self, batch: common.Batch, index: int) -> torch.Tensor:
        return mle.masked_cross_entropy(
            self.model(batch.tokens), batch.tokens, batch.attention_mask, shift=1,
            reduction=self.reduction,
        )  # fmt: skip

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), LEARNING_RATE)


def predicted(batch: common.Batch) -> torch.Tensor:
    """How many bytes the loss counts."""
    return batch.attention_mask[:, 1:].sum()


def train(wanted, learn: list[bytes], by_token: bool) -> tuple[Module, TokenMean]:
    module, mean = Module(wanted.seed, "sum" if by_token else "mean"), TokenMean(predicted)
    sampler = common.sampler(learn, wanted.seed + 1, ROWS)
    batches = [sampler.batch() for _ in range(MICRO_BATCHES * wanted.steps)]
    loader = DataLoader(batches, batch_size=None)
    trainer = pl.Trainer(
        max_epochs=1, accumulate_grad_batches=MICRO_BATCHES, callbacks=[mean] if by_token else [],
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, loader)
    return module, mean


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=250, quick=3)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps|isinstance).*")
    learn, held_out = common.texts(wanted.quick)
    batches = common.held_out_batches(held_out, wanted.quick)
    before = common.bits_per_byte(common.make_language_model(wanted.seed), batches)
    exact, mean = train(wanted, learn, by_token=True)
    means, _ = train(wanted, learn, by_token=False)
    print(f"tokens of the last window: {mean.tokens}")
    print(
        f"bits per byte, held out: {common.bits_per_byte(exact.model, batches):.3f} divided by the "
        f"window's tokens, {common.bits_per_byte(means.model, batches):.3f} by means of means, "
        f"{before:.3f} before training"
    )


if __name__ == "__main__":
    main()
