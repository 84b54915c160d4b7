# SPDX-License-Identifier: BSD-3-Clause
"""A policy loss of verl, by the name "masked_loss_ext" in its registry once this is imported:

actor_rollout_ref:
  model:
    external_lib: masked_loss_ext.integrations.verl
  actor:
    policy_loss:
      loss_mode: masked_loss_ext
"""

from typing import Any

import torch

from .._aggregate import aggregate_tokens
from .._checks import refusal
from ._packages import known, needed

_register = known(
    "verl", needed("verl", "verl.trainer.ppo.core_algos", "verl"), "register_policy_loss"
)

_NAME = "policy_loss"
# verl's words for what aggregate_tokens calls
_REDUCTIONS = {
    "token-mean": "mean",
    "token-sum": "sum",
    "seq-mean-token-mean": "sequence_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "sequence_sum",
}
__all__ = ["policy_loss"]


@_register("masked_loss_ext")
def policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    r"""The clipped objective of PPO, where what the response mask excludes reaches no gradient.

    With :math:`r_t = e^{\log p_t - \log p^{old}_t}` (exponent within 20), A the advantages, w the
    rollout weights (1 without), per token

    .. math:: \ell_t = -w_t \min(r_t A_t,\ \mathrm{clip}(r_t, 1 - \epsilon_l, 1 + \epsilon_h) A_t),
        \quad \text{not above } -c\,w_t A_t \text{ where } A_t < 0

    and one number as ``loss_agg_mode`` says, over the tokens and sequences of the global batch. It
    is verl's "vanilla" loss, but NaN beside the mask (of a model whose logits at padding overflow)
    stays there in every mode: verl's own (0.9) is NaN then where it takes means or sums of
    sequences. Equivalent::

        aggregate_tokens(per_token, response_mask, "mean", normalizer=tokens of the batch)

    Args: as verl hands them over, ``[B, S]``; ``config`` its actor's.

    Returns:
        loss, and the metrics of verl's own by the same names.
    """
    if config is None:
        raise refusal(_NAME, "config", "be that of verl's actor", "None")
    on = response_mask != 0
    # Before anything is computed of them: NaN times 0 is NaN.
    ratio_log = torch.where(on, log_prob - old_log_prob, 0).clamp(-20.0, 20.0)
    gain = torch.where(on, advantages, 0)
    ratio = ratio_log.exp()
    low, high = _clip_range(config)
    plain, clipped = -gain * ratio, -gain * ratio.clamp(1 - low, 1 + high)
    worst = torch.maximum(plain, clipped)
    bound = -gain * config.get("clip_ratio_c", 3.0)
    per_token = torch.where(gain < 0, torch.minimum(bound, worst), worst)
    loss = _aggregate(per_token, on, loss_agg_mode, config.global_batch_info, rollout_is_weights)
    with torch.no_grad():
        metrics = {
            "actor/pg_clipfrac": aggregate_tokens((clipped > plain).float(), on),
            "actor/ppo_kl": aggregate_tokens(-ratio_log, on),
            "actor/pg_clipfrac_lower": aggregate_tokens(((worst > bound) & (gain < 0)).float(), on),
        }
    return loss, {name: value.item() for name, value in metrics.items()}


def _clip_range(config):
    """How far below and above 1 the ratio counts."""
    sides = (config.clip_ratio_low, config.clip_ratio_high)
    return [config.clip_ratio if side is None else side for side in sides]


def _aggregate(per_token, on, mode, batch, weights):
    """Over what verl says of the global batch, times the ranks that gradients are averaged over."""
    if mode not in _REDUCTIONS:
        raise refusal(_NAME, "loss_agg_mode", f"be one of {', '.join(_REDUCTIONS)}", mode)
    ranks = batch.get("dp_size", 1)
    count = batch.get("batch_num_tokens" if mode == "token-mean" else "global_batch_size")
    if ranks > 1 and count is None and mode != "token-sum":
        rule = "say how much the global batch holds where there are ranks"
        raise refusal(_NAME, "config.global_batch_info", rule, dict(batch))
    normalizer = None if mode == "token-sum" else count
    if weights is not None:
        weights = torch.where(on, weights, 0)
    loss = aggregate_tokens(
        per_token, on, _REDUCTIONS[mode], token_weight=weights, normalizer=normalizer
    )
    if mode == "seq-mean-token-sum-norm":
        scale = batch.get("loss_scale_factor")
        loss = loss / (on.shape[-1] if scale is None else scale)
    return loss * ranks
