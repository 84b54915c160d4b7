# SPDX-License-Identifier: BSD-3-Clause
"""AuxiliaryFreeMoEBalancer: balancing of a mixture of experts from running counts."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_flags
from ._options import Number, Share
from ._routing import Experts, choice_counts, load_balance, routed
from ._rows import attached_zero, cleaned, masked_mean
from ._state import KeepsState, advances, borrow, give_back, snapshot

_STATISTICS = ("expert_counts", "expert_scores", "total_tokens")
_ACCUMULATED = ("_accumulated_counts", "_accumulated_scores", "_accumulated_tokens")
_STATE = (*_STATISTICS, *_ACCUMULATED, "_accumulation_steps")


@dataclass(eq=False, repr=False)
class AuxiliaryFreeMoEBalancer(KeepsState):
    r"""Pushes the gate away from experts that running counts say are overused.

    With running counts :math:`c_e` of choices, :math:`T` of tokens, k experts per token and a fair
    share of :math:`kT/E`,

    .. math:: a_e = -w\, \frac{c_e - kT/E}{T}, \qquad \text{balancing\_term} = w\,
        \frac{1}{NE} \sum_{n,e} \big(g_{ne} - \mathrm{detach}(g_{ne} + a_e)\big)^2

    whose value is :math:`w \cdot \mathrm{mean}(a^2)` and whose gradient in every logit of expert e
    is :math:`-2 w a_e / (NE)`: a logit of an overused expert goes down.

    >>> balancer = AuxiliaryFreeMoEBalancer(num_experts=2, momentum=0.0)
    >>> gate_logits = torch.zeros(4, 2, requires_grad=True)
    >>> out = balancer(gate_logits, torch.tensor([[0], [0], [0], [1]]))
    >>> out["expert_counts"].tolist()
    [3.0, 1.0]
    >>> shift = torch.tensor([-0.025, 0.025])  # -w (c - 2) / 4
    >>> torch.testing.assert_close(out["balancing_term"], 0.1 * (shift**2).mean())
    >>> out["balancing_term"].backward()
    >>> torch.testing.assert_close(gate_logits.grad, (-2 * 0.1 * shift / 8).expand(4, 2))

    The counts are exponential averages, updated in training alone: the module's state, so they are
    saved, copied and resumed with it. Several micro-batches of one optimiser step: give all but
    the last ``is_optimizer_step=False``, and their average counts once; or give a call that must
    not count at all ``update_state=False``. The second forward of activation checkpointing does
    not count, but sees the counts as they are by then. They stay where the module is.

    What the mask excludes is selected away: its NaN reaches neither value nor gradient, and its
    gradient is 0. It is read, though: "never read" is what the row operators promise.

    **On several ranks** each balances by the counts of its own tokens until ``sync_state``. Counts
    and tokens are then the means over ranks, those of an average rank: the ratios that the
    balancing uses are as of one process with all tokens, and times the number of ranks the counts
    are, too. Means, so that syncing twice changes nothing and a rank's later steps weigh as before.
    Scores are averaged by tokens: exact where a rank has as many tokens in each of its steps.

    Args:
        num_experts: E, at most 2^24.
        balance_loss_weight: factor of ``balance_loss`` (see ``forward``).
        gradient_balance_weight: w.
        target_balance_ratio: kept for callers that pass it; the fair share is the same for all.
        momentum: share of the old average in the new one, in [0, 1].
    """

    num_experts: Experts
    balance_loss_weight: Number = 0.0
    gradient_balance_weight: Number = 0.1
    target_balance_ratio: Number = 1.0
    momentum: Share = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        experts = (self.num_experts,)
        for name, shape in zip(_STATE, 2 * [experts, experts, ()], strict=False):
            self.add_state(name, shape)
        self.add_state("_accumulation_steps", (), 0, dtype=torch.int64)

    @torch.no_grad()
    def update_statistics(
        self,
        expert_indices: Tensor,
        expert_scores: Tensor,
        is_optimizer_step: bool = True,
        *,
        attention_mask: Tensor | None = None,
    ) -> None:
        """Count one micro-batch: ``expert_indices`` ``[N, k]``, ``expert_scores`` ``[N, E]``
        (probabilities). On an optimiser step the average over micro-batches joins the running
        ones."""
        name = f"{self.function}.update_statistics"
        scores, indices, valid = routed(
            name, "expert_scores", expert_scores, expert_indices, self.num_experts, attention_mask
        )
        self._update(borrow(self, _STATE, scores), indices, scores, valid, is_optimizer_step)

    @torch.no_grad()
    def _update(self, state, indices, scores, valid, is_optimizer_step):
        tokens = valid.sum()
        scores = torch.where(scores.isfinite(), scores, 0)  # one NaN would stay for good
        counts, means = choice_counts(indices, valid, self.num_experts), scores.sum(0)
        new = (counts, means / tokens.clamp(min=1), tokens, 1)
        for name, added in zip((*_ACCUMULATED, "_accumulation_steps"), new, strict=True):
            state[name].add_(added)
        if is_optimizer_step:
            steps = state["_accumulation_steps"]
            for name, sum_name in zip(_STATISTICS, _ACCUMULATED, strict=True):
                average = state[sum_name] / steps
                state[name].mul_(self.momentum).add_(average, alpha=1 - self.momentum)
                state[sum_name].zero_()
            steps.zero_()
        give_back(self, state)

    def forward(
        self,
        gate_logits: Tensor,
        expert_indices: Tensor,
        expert_outputs: Any = None,
        compute_loss: bool = False,
        *,
        attention_mask: Tensor | None = None,
        update_state: bool = True,
        is_optimizer_step: bool = True,
    ) -> dict[str, Any]:
        r"""Update the counts (in training) and compare them.

        Args:
            gate_logits: ``[N, E]`` (or ``[..., E]``) floating.
            expert_indices: ``[N, k]`` (or ``[..., k]``) integers, the experts that were chosen.
            expert_outputs: not used.
            compute_loss: also compute ``balance_loss``, the load loss of ``AuxiliaryLoss`` without
                its cap, times balance_loss_weight; else it is 0.
            attention_mask: ``[N]``, or as many entries: a token counts where it is not 0.
            update_state: False leaves all counts as they are.
            is_optimizer_step: False adds this call to those of the step that is under way.

        Returns:
            dict: ``balance_loss`` and ``balancing_term`` ``[]`` (the latter 0 in evaluation and for
            logits without a gradient), and detached: ``expert_counts`` ``[E]``,
            ``expert_balance_ratio`` ``[E]`` (counts over the fair share),
            ``coefficient_of_variation`` ``[]`` of the counts (0 for one expert) and the number
            ``gradient_weight``.
        """
        name, experts = self.function, self.num_experts
        gate, indices, valid = routed(
            name, "gate_logits", gate_logits, expert_indices, experts, attention_mask
        )
        flags = {"compute_loss": compute_loss, "is_optimizer_step": is_optimizer_step}
        check_flags(name, flags)
        state = borrow(self, _STATE, gate)
        if advances(self, update_state):
            scores = cleaned(gate.detach().softmax(-1), valid)
            self._update(state, indices, scores, valid, is_optimizer_step)
        counts, tokens = state["expert_counts"], state["total_tokens"]
        fair = tokens * (indices.shape[-1] / experts)
        term = loss = attached_zero(gate)
        if self.training and gate_logits.requires_grad:
            imbalance = (counts - fair) / torch.where(tokens > 0, tokens, 1)
            term = self._balancing_term(gate, imbalance, valid)
        if compute_loss:
            loss = self.balance_loss_weight * load_balance(gate, indices, valid, experts)
        return {"balance_loss": loss, "balancing_term": term, **self._report(counts, fair)}

    def _balancing_term(self, gate, imbalance, valid):
        adjustment = snapshot(-self.gradient_balance_weight * imbalance)
        gate = torch.where(gate.isfinite(), gate, 0)  # a banned expert: inf - inf is NaN
        shift = gate - gate.detach()  # 0, with the gradient of the logits
        return self.gradient_balance_weight * masked_mean(
            (shift - adjustment) ** 2, valid.unsqueeze(-1)
        )

    def _report(self, counts, fair):
        spread = counts.std() if self.num_experts > 1 else torch.zeros_like(counts[0])
        return {
            "expert_counts": counts.clone(),
            "expert_balance_ratio": counts / (fair + 1e-6),
            "coefficient_of_variation": spread / (counts.mean() + 1e-6),
            "gradient_weight": self.gradient_balance_weight,
        }

    def get_statistics(self) -> dict[str, Any]:
        """``expert_counts`` and ``expert_scores`` as lists, ``total_tokens`` as a number; waits for
        the device."""
        return {name: getattr(self, name).tolist() for name in _STATISTICS}

    @torch.no_grad()
    def reset_statistics(self) -> None:
        """Forget all counts, those of a step that is under way among them."""
        for name in _STATE:
            getattr(self, name).zero_()

    def _shares(self):
        counts, scores, tokens = (getattr(self, name) for name in _STATISTICS)
        pending = [getattr(self, name) for name in (*_ACCUMULATED, "_accumulation_steps")]
        return [counts, scores.double() * tokens, tokens, *pending]

    def _take(self, sums, ranks):
        counts, scores, tokens, *pending, steps = sums
        scores = scores / torch.where(tokens > 0, tokens, 1)
        means = (counts / ranks, scores, tokens / ranks, *(sum_ / ranks for sum_ in pending))
        for name, mean in zip((*_STATISTICS, *_ACCUMULATED), means, strict=True):
            getattr(self, name).copy_(mean)
        self._accumulation_steps.copy_((steps / ranks).ceil())
