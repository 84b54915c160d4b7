# SPDX-License-Identifier: BSD-3-Clause
"""Training causal language models with the transformers Trainer, padding neither read nor counted.

The Trainer gives a loss function no mask, and counts the labels that are not -100 over the whole
accumulation window before the first of its batches is run. So the mask has to be in the labels when
they leave the collator:

    trainer = Trainer(
        model=model, args=args, train_dataset=dataset,
        data_collator=MaskLabels(collator),  # the mask goes into the labels
        compute_loss_func=causal_lm_loss,  # sum over the batch / count of the window
    )
    TokenLossCallback(check_padding=True).attach(trainer)  # the exact loss, in every log

What the Trainer counts depends on its version and on the model: every label that is not -100, the
first of each row too, which no position predicts (transformers 4 for all models, 5 for those whose
class name does not end in ForCausalLM, GPT-2 for one), or only those that are predicted. MaskLabels
masks the label of a token that is not predicted, and both are the same.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._checks import as_mask, check_choice, check_integers, check_tensor, refusal
from ._causal_lm import causal_lm_loss
from ._columns import pass_columns

try:
    from ._logit_free import logit_free, with_logits
    from ._loss_function import use_causal_lm_loss
    from ._token_loss import TokenLossCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "masked_loss_ext.integrations.transformers needs transformers and accelerate: "
        "pip install 'masked_loss_ext[hf]'",
        name="transformers",
    ) from None

_NAME = "MaskLabels"
__all__ = [
    "MaskLabels",
    "TokenLossCallback",
    "causal_lm_loss",
    "logit_free",
    "pass_columns",
    "use_causal_lm_loss",
    "with_logits",
]


class MaskLabels:
    """A collator whose labels are -100 wherever they are not to count.

    Calls ``collator`` and masks the labels of what it returns: those of padding, and with
    ``mask_sources`` those that a padding position predicts or none does, that is the first token of
    each row. What counts is then what is predicted, so the Trainer's count is exact in every
    version, and left padding is as safe as right padding: a prediction made at a padding position
    depends on what is stored there. ``mask_sources=False`` masks the labels of padding alone.

    For models whose labels stand where they are predicted: ``MaskLabels(collator,
    mask_sources=False)`` for a masked language model, if its collator has not masked them already
    (``DataCollatorForLanguageModeling`` has); for an encoder-decoder ``mask_sources=False,
    mask="decoder_attention_mask"``, as attention_mask is the encoder's.

    Neither the features nor the tensors of the collator are written to. Can be pickled where the
    collator can, so for DataLoaders with workers.

    Args:
        collator: makes a mapping with "labels" and ``mask``, both ``[B, S]`` tensors, of a list of
            features; any of transformers', or your own.
        mask_sources: whether labels predicted at padding, or nowhere, are masked as well.
        mask: name of the mask in the batch.
    """

    def __init__(
        self,
        collator: Callable[..., Any],
        *,
        mask_sources: bool = True,
        mask: str = "attention_mask",
    ) -> None:
        if not callable(collator):
            raise refusal(_NAME, "collator", "be callable", type(collator).__name__, TypeError)
        check_choice(_NAME, "mask_sources", mask_sources, (True, False))
        if not isinstance(mask, str):
            raise refusal(_NAME, "mask", "be a name", type(mask).__name__, TypeError)
        self.collator = collator
        self.mask_sources = mask_sources
        self.mask = mask

    def __repr__(self) -> str:
        return f"{_NAME}({self.collator!r}, mask_sources={self.mask_sources}, mask={self.mask!r})"

    def __call__(self, features: list, *args: Any, **kwargs: Any) -> Any:
        """The collator's batch, of its own type, with other labels."""
        batch = self.collator(features, *args, **kwargs)
        if not isinstance(batch, Mapping):
            got = type(batch).__name__
            raise refusal(_NAME, "the collator", "return a mapping", got, TypeError)
        labels, mask = self._tensor(batch, "labels"), self._tensor(batch, self.mask)
        self._check(batch, labels, mask)
        counts = as_mask(_NAME, self.mask, mask) != 0
        if self.mask_sources:
            predicted = torch.zeros_like(counts)
            predicted[:, 1:] = counts[:, :-1]
            counts = counts & predicted
        result: Any = copy.copy(batch)
        result["labels"] = torch.where(counts, labels, -100)  # what the Trainer counts by
        return result

    @staticmethod
    def _tensor(batch, name):
        if name not in batch:
            advice = "without it nothing says what is padding"
            if name == "labels":
                advice = "labels may be a copy of input_ids: they are shifted by the loss"
            got = f"{list(batch)}; {advice}"
            raise refusal(_NAME, "the collator's batch", f"have {name}", got)
        value = batch[name]
        if not isinstance(value, torch.Tensor):
            got = f'{type(value).__name__}: let the collator return "pt"'
            raise refusal(_NAME, name, "be a tensor", got)
        check_tensor(_NAME, name, value)
        return value

    def _check(self, batch, labels, mask):
        decoder = [name for name in batch if str(name).startswith("decoder_")]
        if decoder and not self.mask.startswith("decoder_"):
            got = (
                f"{self.mask} beside {decoder}, which is the encoder's: "
                'mask="decoder_attention_mask", mask_sources=False; or let the collator pad '
                "labels with -100, as DataCollatorForSeq2Seq does"
            )
            raise refusal(_NAME, "mask", "be about the labels", got)
        if labels.dim() != 2 or mask.shape != labels.shape:
            got = f"{list(mask.shape)} for labels of {list(labels.shape)}"
            raise refusal(_NAME, self.mask, "be [B, S] like labels", got)
        check_integers(_NAME, "labels", labels)
        if not labels.dtype.is_signed:
            raise refusal(_NAME, "labels", "be of a signed dtype, which -100 fits", labels.dtype)
        if mask.is_floating_point() and mask.isnan().any():
            raise refusal(_NAME, self.mask, "be numbers", "NaN")
