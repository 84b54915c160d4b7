# SPDX-License-Identifier: BSD-3-Clause
"""The trainers of TRL on ``linear_row_statistics``: SFTTrainer, GRPOTrainer, RLOOTrainer.

Each of them gives its model a head that makes log-probabilities and entropies without logits, and
builds its loss of these. ``use_masked_head`` puts another such head in its place:

    trainer = GRPOTrainer(model=model, args=args, reward_funcs=reward, train_dataset=dataset)
    use_masked_head(trainer)
    trainer.train()

``SFTTrainer(compute_loss_func=...)`` is deprecated by TRL and runs the model twice; this does not.
"""

import functools
import inspect
import types
from typing import Any, TypeVar

import torch

from .._checks import check_length, is_dtensor, refusal
from ..ops.linear_cross_entropy import linear_row_statistics
from ._packages import known as _known
from ._packages import needed

_utils = needed("trl", "trl.trainer.utils", "trl")
_Output = _known("trl", _utils, "FusedCausalLMOutput")
_KINDS = ("SFTTrainer", "GRPOTrainer", "RLOOTrainer")  # DPO and KTO read means of logits as well
_trainers = _known("trl", needed("trl", "trl", "trl"), *_KINDS)

_NAME = "use_masked_head"
Trainer = TypeVar("Trainer")
__all__ = ["use_masked_head"]


def use_masked_head(
    trainer: Trainer,
    *,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Trainer:
    r"""Have a TRL trainer take log-probabilities and entropies from ``linear_row_statistics``.

    Returns ``trainer`` itself, whose losses, metrics and options stay its own. Per position t whose
    next label y is not -100, h the hidden state, f the model's final softcap or scale and T the
    trainer's temperature,

    .. math:: \log p_t = z_{ty} - \log\sum_c e^{z_{tc}}, \quad
        H_t = -\sum_c p_{tc} \log p_{tc}, \qquad z = f(h W^\top + b) / T

    and 0 elsewhere. Positions of padding and prompt take part in no product of the head, on any
    device; in the backward only those do into which a gradient flows, so that tokens which GRPO
    clips, or whose group has no advantage, cost it nothing. Equivalent::

        stats = linear_row_statistics(hidden, head.weight, labels, shift, temperature=T)

    Args:
        trainer: an SFTTrainer, GRPOTrainer or RLOOTrainer, before ``train``. Its reference model
            gets the head, too. DPO and KTO log means of logits, which it does not make.
        chunk_rows, logits_dtype: as in ``masked_linear_cross_entropy``.

    Raises:
        TypeError: the trainer is another, or its model has no fused head of TRL.
        ValueError: what this head would leave out: the auxiliary loss of experts,
            ``cast_lm_head_to_fp32``, a weight that is sharded.
    """
    if not isinstance(trainer, tuple(_trainers)):
        rule = f"be one of {', '.join(_KINDS)}"
        raise refusal(_NAME, "trainer", rule, type(trainer).__name__, TypeError)
    known: Any = trainer
    if chunk_rows is not None:
        check_length(_NAME, "chunk_rows", chunk_rows, least=1)
    if getattr(known.args, "cast_lm_head_to_fp32", False):
        rule = "leave the head in the model's dtype; give logits_dtype=torch.float32 instead"
        raise refusal(_NAME, "trainer", rule, "cast_lm_head_to_fp32=True")
    models = [known.model, getattr(known, "ref_model", None)]
    # Below PEFT, where TRL has put its own.
    models = [getattr(m, "get_base_model", lambda m=m: m)() for m in models if m is not None]
    for model in models:
        _check(model)
    temperature = float(getattr(known, "temperature", 1.0))
    for model in models:
        options = {"chunk_rows": chunk_rows, "logits_dtype": logits_dtype}
        _install(model, options | _edit(model, temperature))
    return trainer


def _check(model):
    own = getattr(model.__dict__.get("forward"), "__func__", lambda: None)
    if "fused_lm_head" not in inspect.signature(own, follow_wrapped=False).parameters:
        got = f"{type(model).__name__} without one"
        raise refusal(_NAME, "the trainer's model", "have TRL's fused head", got, TypeError)
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        rule = "have no auxiliary loss of experts (router_aux_loss_coef=0.0)"
        got = f"{type(model).__name__} with output_router_logits"
        raise refusal(_NAME, "the trainer's model", rule, got)


def _edit(model, temperature):
    """Keywords of the statistics for what is done to the logits: scale, softcap, temperature."""
    config = model.config.get_text_config()
    cap, scale = getattr(config, "final_logit_softcapping", None), 1.0
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    values = [value for name in names if (value := getattr(config, name, None)) is not None]
    divisor = getattr(config, "logits_scaling", None)
    if values:
        scale = values[0]
    elif divisor is not None:
        scale = divisor if config.model_type == "hyperclovax" else 1 / divisor
    if not scale > 0:
        rule = "have a scale of its logits above 0"
        raise refusal(_NAME, "the trainer's model", rule, scale)
    # c tanh(s x / c) / T = (c / s) tanh(x / (c / s)) / (T / s)
    return {"softcap": None if cap is None else cap / scale, "temperature": temperature / scale}


def _install(model, options):
    theirs = getattr(model.forward, "_trl_forward", model.forward)

    @functools.wraps(type(model).forward)
    def forward(
        self, *args, fused_lm_head=False, labels=None, shift_labels=None, num_items_in_batch=None,
        **kwargs,
    ):  # fmt: skip
        if not fused_lm_head:
            given = {
                "labels": labels, "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }  # fmt: skip
            return theirs(*args, **kwargs, **{k: v for k, v in given.items() if v is not None})
        if kwargs.get("output_router_logits"):
            rule = "ask for no auxiliary loss of experts"
            raise refusal(_NAME, "the trainer", rule, "output_router_logits=True")
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        return _output(self, hidden, shift_labels, num_items_in_batch, options)

    forward._trl_forward = theirs
    model.forward = types.MethodType(forward, model)


def _output(model, hidden, labels, count, options):
    head = model.get_output_embeddings()
    if is_dtensor(head.weight):
        rule = "be a whole tensor: leave the head in the unit of the model that FSDP shards"
        raise refusal(_NAME, "the head's weight", rule, "a DTensor")
    hidden, labels = hidden.to(head.weight.device), labels.to(head.weight.device)
    stats = linear_row_statistics(hidden, head.weight, labels, bias=head.bias, **options)
    mask = labels != -100
    loss = -stats.log_prob.sum() / (mask.sum().clamp(min=1) if count is None else count)
    return _Output(
        loss=loss, log_probs=stats.log_prob, entropy=stats.entropy, is_top1=stats.hit,
        label_mask=mask,
    )  # fmt: skip
