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

import torch

from ..ops.masked_cross_entropy import masked_cross_entropy
from ..padding import mask_labels

try:
    from ._token_loss import TokenLossCallback
except ModuleNotFoundError as error:
    if error.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "masked_loss_ext.integrations.transformers needs transformers and accelerate: "
        "pip install 'masked_loss_ext[hf]'",
        name="transformers",
    ) from None

__all__ = ["MaskLabels", "TokenLossCallback", "causal_lm_loss"]


def causal_lm_loss(outputs, labels, num_items_in_batch=None, **options):
    r"""Cross entropy of each token given those before it, for ``Trainer(compute_loss_func=...)``.

    .. math:: L = \frac1N \sum_{b,\,t:\ y_{b,t+1} \ne -100}
        \Big(\log\sum_c e^{x_{btc}} - x_{bt,\,y_{b,t+1}}\Big)

    with N = ``num_items_in_batch``, the count of the whole accumulation window over all ranks, as
    the loss of the models themselves, but the logits are read once, in place and in their own
    dtype, and those of labels -100 not at all. The gradients of the micro-batches then add up to
    that of the mean over the window. Equivalent::

        masked_cross_entropy(logits, labels, shift=1, normalizer=num_items_in_batch)

    Where no label counts the loss is 0 (the models' own: NaN). Under ``bf16=True`` accelerate makes
    a float32 copy of the logits before any loss sees them; a model loaded in bfloat16 has none.

    Args:
        outputs: the model's: a mapping with "logits", or a tuple that begins with them;
            ``[B, S, V]``.
        labels: ``[B, S]``, as the model takes them: not shifted, -100 at what does not count.
        num_items_in_batch: the denominator, a number or a tensor; None: the labels counted here.
        options: keywords of masked_cross_entropy (label_smoothing, z_loss, softcap, temperature,
            focal_gamma, weight, inplace_backward, ...), given with
            ``functools.partial(causal_lm_loss, z_loss=1e-4)``. The ``label_smoothing_factor`` of
            TrainingArguments does nothing beside a compute_loss_func.

    Returns:
        ``[]`` float32 (float64 for float64 logits).
    """
    logits = _logits(outputs)
    if not isinstance(labels, torch.Tensor):
        raise ValueError(
            f"causal_lm_loss: labels must be a tensor, got {type(labels).__name__}: the collator "
            "has to make them"
        )
    if isinstance(num_items_in_batch, torch.Tensor):
        # Under DataParallel there is one copy of the count per replica, for a model whose replicas'
        # losses are averaged; this loss is of all of them, so all copies divide it.
        num_items_in_batch = num_items_in_batch.to(logits.device).sum()
    return masked_cross_entropy(
        logits, labels.to(logits.device), shift=1, normalizer=num_items_in_batch, **options
    )


def _logits(outputs):
    if isinstance(outputs, (tuple, list)) and outputs:
        return outputs[0]
    logits = outputs.get("logits") if hasattr(outputs, "get") else None
    if logits is None:
        held = list(outputs) if hasattr(outputs, "keys") else type(outputs).__name__
        raise ValueError(f"causal_lm_loss: outputs must hold logits, got {held}")
    return logits


class MaskLabels:
    """A collator whose labels are -100 wherever they are not to count.

    Calls ``collator`` and masks the labels of what it returns: those of padding, and with
    ``mask_sources`` those that a padding position predicts or none does, that is the first token of
    each row. What counts is then what is predicted, so the Trainer's count is exact in every
    version, and left padding is as safe as right padding: a prediction made at a padding position
    depends on what is stored there. ``mask_sources=False`` masks the labels of padding alone.

    Neither the features nor the tensors of the collator are written to. Can be pickled where the
    collator can, so for DataLoaders with workers.

    Args:
        collator: makes a mapping with "labels" and "attention_mask", both ``[B, S]`` tensors, of a
            list of features; any of transformers', or your own.
        mask_sources: whether labels predicted at padding, or nowhere, are masked as well.
    """

    def __init__(self, collator, *, mask_sources=True):
        if not callable(collator):
            raise TypeError(f"MaskLabels: collator must be callable, got {type(collator).__name__}")
        self.collator = collator
        self.mask_sources = mask_sources

    def __repr__(self):
        return f"MaskLabels({self.collator!r}, mask_sources={self.mask_sources})"

    def __call__(self, features, *args, **kwargs):
        """The collator's batch, of its own type, with other labels."""
        batch = copy.copy(self.collator(features, *args, **kwargs))
        labels, mask = self._tensor(batch, "labels"), self._tensor(batch, "attention_mask")
        if labels.dim() != 2 or mask.shape != labels.shape:
            raise ValueError(
                "MaskLabels: attention_mask must be [B, S] like labels, got "
                f"{list(mask.shape)} for labels of {list(labels.shape)}"
            )
        counts = mask != 0
        if self.mask_sources:
            predicted = torch.zeros_like(counts)
            predicted[:, 1:] = counts[:, :-1]
            counts = counts & predicted
        batch["labels"] = mask_labels(
            labels, counts, ignore_index=-100
        )  # what the Trainer counts by
        return batch

    @staticmethod
    def _tensor(batch, name):
        if name not in batch:
            advice = {
                "labels": "labels may be a copy of input_ids: they are shifted by the loss",
                "attention_mask": "without it nothing says what is padding",
            }
            raise ValueError(
                f"MaskLabels: the collator's batch must have {name}, got {sorted(batch.keys())}; "
                f"{advice[name]}"
            )
        value = batch[name]
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"MaskLabels: {name} must be a tensor, got {type(value).__name__}: "
                'let the collator return "pt"'
            )
        return value
