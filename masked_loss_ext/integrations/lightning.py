# SPDX-License-Identifier: BSD-3-Clause
"""Lightning: one denominator for an accumulation window, over all its micro-batches and ranks.

Lightning divides each micro-batch's loss by ``accumulate_grad_batches``, and DDP averages over
ranks: means of means, in which a token of a batch that is mostly padding weighs more than another.
Return sums instead, and let the callback divide by the tokens of the whole window:

    class Model(lightning.LightningModule):
        def training_step(self, batch, index):
            logits = self.net(batch["input_ids"])
            return masked_cross_entropy(
                logits, batch["input_ids"], batch["attention_mask"], shift=1, reduction="sum"
            )

    count = lambda batch: batch["attention_mask"][:, 1:].sum()
    trainer = lightning.Trainer(accumulate_grad_batches=4, callbacks=[TokenMean(count)])
"""

from collections.abc import Callable
from typing import Any

import torch

from .._checks import refusal
from ._packages import known, needed

Callback: Any = known(
    "lightning", needed("lightning", "lightning.pytorch.callbacks", "lightning"), "Callback"
)

_NAME = "TokenMean"
_HALF = ("16", "16-mixed", "16-true", "transformer-engine-float16")
__all__ = ["TokenMean"]


class TokenMean(Callback):
    r"""Makes a step on sums of token losses that of the mean over the window's tokens.

    With :math:`L_i` the sum that ``training_step`` returns for micro-batch i of K in the window, of
    all R ranks, and :math:`n_i` its tokens, Lightning and DDP make the gradient of
    :math:`\frac1{KR} \sum_i L_i`. Before the optimizer's step, and before gradients are clipped,
    this multiplies it by :math:`KR / \sum_i n_i`. One step of eight rows, two accumulated steps of
    four and eight of one, on one rank or several, then train the same weights; also where the last
    window of an epoch has fewer batches. A window without tokens has a gradient of 0.

    Equivalent, where all rows fit into one batch::

        loss = masked_cross_entropy(logits, labels, mask, shift=1)

    One all-reduce of 8 bytes per step where there are ranks, one wait for the device per step.

    Args:
        count: the tokens of a batch that the loss counts, a number or a tensor: of the same mask
            and shift as the loss, ``lambda batch: batch["attention_mask"][:, 1:].sum()``.

    ``tokens`` is the count of the last step, over all ranks.

    Raises:
        ValueError: manual optimization; float16, whose gradients of sums overflow.
    """

    def __init__(self, count: Callable[[Any], Any]) -> None:
        if not callable(count):
            raise refusal(_NAME, "count", "be callable", type(count).__name__, TypeError)
        self.count = count
        self.tokens = 0
        self._window: Any = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuses what would not come out right."""
        if not pl_module.automatic_optimization:
            rule = "optimize by itself: in a loop of your own, give the loss a normalizer"
            raise refusal(_NAME, "the module", rule, "automatic_optimization=False")
        if str(trainer.precision) in _HALF:
            rule = "be float32 or bfloat16: sums of losses have large gradients"
            raise refusal(_NAME, "precision", rule, trainer.precision)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count what the loss is about to count."""
        self._window = self._window + self.count(batch)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """The gradient of means of sums becomes that of the mean over tokens."""
        window = torch.as_tensor(self._window, dtype=torch.float64, device=pl_module.device)
        self._window = 0
        self.tokens = int(trainer.strategy.reduce(window, reduce_op="sum"))
        factor = trainer.accumulate_grad_batches * trainer.world_size / max(self.tokens, 1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
