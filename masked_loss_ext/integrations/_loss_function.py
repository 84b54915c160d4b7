# SPDX-License-Identifier: BSD-3-Clause
"""The loss of a transformers model itself by the operators: whoever calls the model has it."""

import functools
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .._checks import refusal, refuse_unknown
from ._causal_lm import causal_lm_loss

_NAME = "use_causal_lm_loss"
Model = TypeVar("Model")
# Of masked_cross_entropy, but for what says which tokens count: here the labels do.
_OPTIONS = [
    "focal_gamma", "gradient_in_forward", "inplace_backward", "label_smoothing", "softcap",
    "temperature", "weight", "z_loss",
]  # fmt: skip


def use_causal_lm_loss(model: Model, **options: Any) -> Model:
    r"""Have a causal language model take its own loss from its logits by ``causal_lm_loss``.

    Returns ``model`` itself. ``model(input_ids=..., labels=labels).loss`` is then, in training and
    evaluation alike,

    .. math:: L = \frac1N \sum_{b,\,t:\ y_{b,t+1} \ne -100}
        \Big(\log\sum_c e^{x_{btc}} - x_{bt,\,y_{b,t+1}}\Big)

    with N = ``num_items_in_batch`` or, without it, the labels that count: what ``ForCausalLMLoss``
    computes, but without its copies of the logits, which are read once and in their own dtype, and
    not at all where the label is -100. For everything that lets the model compute its loss: a
    Trainer without compute_loss_func, axolotl, a loop of your own. Equivalent::

        outputs.loss = causal_lm_loss(outputs, labels, num_items_in_batch)

    ``model.loss_function = ForCausalLMLoss`` undoes it. Where no label counts the loss is 0 (the
    model's own: NaN). See ``logit_free`` for a loss that makes no logits at all.

    This is the place of ``ForCausalLMLoss`` that transformers has for everyone: its KernelConfig
    (``use_kernels=True``) knows a layer of that name, but up to 5.23 no model has it, and none of
    its devices is the CPU.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=50, num_attention_heads=2, **tiny))
    >>> ids = torch.randint(50, (2, 8))
    >>> expected = model(input_ids=ids, labels=ids).loss
    >>> loss = use_causal_lm_loss(model)(input_ids=ids, labels=ids).loss
    >>> torch.testing.assert_close(loss, expected)

    Args:
        model: a PreTrainedModel whose loss is ``ForCausalLMLoss``; before anything wraps it.
        options: of ``masked_cross_entropy``, but for those that say what counts, which the labels
            do: label_smoothing, z_loss, softcap, temperature, focal_gamma, weight,
            inplace_backward, gradient_in_forward.

    Called again it takes the new options.

    Raises:
        TypeError: model is no PreTrainedModel; an unknown option.
        ValueError: the loss of the model is of another function.
    """
    if not isinstance(model, PreTrainedModel):
        got = type(model).__name__
        raise refusal(_NAME, "model", "be a PreTrainedModel, not wrapped", got, TypeError)
    known: Any = model
    own = known.loss_function
    if own is not ForCausalLMLoss and getattr(own, "func", None) is not _loss_function:
        got = getattr(own, "__name__", type(own).__name__)
        name = f"the loss_function of {type(model).__name__}"
        raise refusal(_NAME, name, "be ForCausalLMLoss", got)
    refuse_unknown(_NAME, [name for name in options if name not in _OPTIONS], _OPTIONS)
    known.loss_function = functools.partial(_loss_function, options)
    return model


def _loss_function(
    options: dict,
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int | None = None,
    num_items_in_batch: Any = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """By the names of ForCausalLMLoss, which ignores further ones as well."""
    return causal_lm_loss(
        {"logits": logits}, labels, num_items_in_batch,
        shift_labels=shift_labels, ignore_index=ignore_index, **options,
    )  # fmt: skip
