# SPDX-License-Identifier: BSD-3-Clause
"""Losses of a torchtitan configuration, with logits and without.

    def my_config() -> Trainer.Config:
        config = llama3_8b()
        config.loss = LinearCrossEntropyLoss.Config(z_loss=1e-4)  # or MaskedCrossEntropyLoss.Config
        return config

Labels are torchtitan's: shifted by its data loader, -100 at what does not count.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .._checks import is_dtensor, refusal
from ..ops.linear_cross_entropy import masked_linear_cross_entropy
from ..ops.masked_cross_entropy import masked_cross_entropy
from ._packages import known, needed

BaseLoss: Any
ChunkedLossWrapper: Any
_loss: Any = needed("torchtitan", "torchtitan.components.loss", "torchtitan")
BaseLoss, ChunkedLossWrapper = known("torchtitan", _loss, "BaseLoss", "ChunkedLossWrapper")

__all__ = ["LinearCrossEntropyLoss", "MaskedCrossEntropyLoss"]
_ADVICE = "be plain tensors: without tensor parallelism of the head, or with torchtitan's own loss"


def _check_plain(function, **tensors):
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise refusal(function, name, _ADVICE, "a DTensor")


class MaskedCrossEntropyLoss(BaseLoss):
    """``masked_cross_entropy`` in the place of ``CrossEntropyLoss``: sum over the labels that are
    not -100, over the tokens of the step. The logits are read once, in their own dtype.

    Under FSDP2 and context parallelism; logits that tensor parallelism shards are refused.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Keywords of ``masked_cross_entropy``."""

        label_smoothing: float = 0.0
        z_loss: float = 0.0
        softcap: float | None = None
        inplace_backward: bool = False

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        self.options = {
            name: getattr(config, name)
            for name in ("label_smoothing", "z_loss", "softcap", "inplace_backward")
        }
        self.fn = self._sum
        self._maybe_compile(compile_config)

    def _sum(self, pred, labels):
        _check_plain("MaskedCrossEntropyLoss", pred=pred, labels=labels)
        return masked_cross_entropy(pred, labels, reduction="sum", **self.options)


class LinearCrossEntropyLoss(ChunkedLossWrapper):
    """``masked_linear_cross_entropy`` in the place of ``ChunkedLossWrapper``: the model leaves its
    head to the loss, which makes no logits as a whole and multiplies no row whose label is -100.

    The weight of the head has to be whole, on one device or on ranks that all have it: the shard
    that FSDP2 or tensor parallelism leaves of it is refused.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        """Keywords of ``masked_linear_cross_entropy``."""

        label_smoothing: float = 0.0
        z_loss: float = 0.0
        softcap: float | None = None
        chunk_rows: int | None = None

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        if compile_config is not None and compile_config.enable:
            if "loss" in compile_config.components:
                rule = "leave out the loss, which is one operator"
                raise refusal("LinearCrossEntropyLoss", "compile.components", rule, "loss")
        self.options = {
            name: getattr(config, name)
            for name in ("label_smoothing", "z_loss", "softcap", "chunk_rows")
        }
        self.lm_head = None

    def __call__(
        self,
        pred: torch.Tensor,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """pred: hidden states. Further inputs (positions) belong to no loss of tokens."""
        head: Any = self.lm_head
        if head is None:
            raise refusal("LinearCrossEntropyLoss", "set_lm_head", "be called first", "no head")
        _check_plain("LinearCrossEntropyLoss", pred=pred, labels=labels, weight=head.weight)
        loss = masked_linear_cross_entropy(
            pred, head.weight, labels, bias=getattr(head, "bias", None), reduction="sum",
            **self.options,
        )  # fmt: skip
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}
