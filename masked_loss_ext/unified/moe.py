# SPDX-License-Identifier: BSD-3-Clause
"""Losses of a mixture of experts: balancing from running counts, load, router z, diversity."""

import torch

from ._routing import check_experts, choice_counts, load_balance, routed
from ._rows import attached_zero, check_floating, cleaned, masked_mean, row_mask
from ._state import KeepsState, advances, snapshot
from .diversity import DiversityLoss

_STATISTICS = ("expert_counts", "expert_scores", "total_tokens")
_ACCUMULATED = ("_accumulated_counts", "_accumulated_scores", "_accumulated_tokens")


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
    not count, but sees the counts as they are by then.

    Args:
        num_experts: E.
        balance_loss_weight: factor of ``balance_loss`` (see ``forward``).
        gradient_balance_weight: w.
        target_balance_ratio: kept for callers that pass it; the fair share is the same for all.
        momentum: share of the old average in the new one.
    """

    def __init__(
        self,
        num_experts,
        balance_loss_weight=0.0,
        gradient_balance_weight=0.1,
        target_balance_ratio=1.0,
        momentum=0.9,
    ):
        super().__init__()
        check_experts("AuxiliaryFreeMoEBalancer", num_experts)
        self.num_experts = num_experts
        self.balance_loss_weight = balance_loss_weight
        self.gradient_balance_weight = gradient_balance_weight
        self.target_balance_ratio = target_balance_ratio
        self.momentum = momentum
        for name, shape in zip(
            (*_STATISTICS, *_ACCUMULATED), 2 * [(num_experts,), (num_experts,), ()], strict=True
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("_accumulation_steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update_statistics(
        self, expert_indices, expert_scores, is_optimizer_step=True, *, attention_mask=None
    ):
        """Count one micro-batch: ``expert_indices`` ``[N, k]``, ``expert_scores`` ``[N, E]``
        (probabilities). On an optimiser step the average over micro-batches joins the running
        ones."""
        name = "AuxiliaryFreeMoEBalancer.update_statistics"
        scores, indices, valid = routed(
            name, "expert_scores", expert_scores, expert_indices, self.num_experts, attention_mask
        )
        self._update(indices, scores, valid, is_optimizer_step)

    @torch.no_grad()
    def _update(self, indices, scores, valid, is_optimizer_step):
        tokens = valid.sum()
        self._accumulated_counts += choice_counts(indices, valid, self.num_experts)
        scores = torch.where(scores.isfinite(), scores, 0)  # one NaN would stay for good
        self._accumulated_scores += scores.sum(0) / tokens.clamp(min=1)
        self._accumulated_tokens += tokens
        self._accumulation_steps += 1
        if not is_optimizer_step:
            return
        for name, sum_name in zip(_STATISTICS, _ACCUMULATED, strict=True):
            sums = getattr(self, sum_name)
            average = sums / self._accumulation_steps
            getattr(self, name).mul_(self.momentum).add_(average, alpha=1 - self.momentum)
            sums.zero_()
        self._accumulation_steps.zero_()

    def forward(
        self,
        gate_logits,
        expert_indices,
        expert_outputs=None,
        compute_loss=False,
        *,
        attention_mask=None,
        update_state=True,
        is_optimizer_step=True,
    ):
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
        gate, indices, valid = routed(
            "AuxiliaryFreeMoEBalancer",
            "gate_logits",
            gate_logits,
            expert_indices,
            self.num_experts,
            attention_mask,
        )
        if advances(self, update_state):
            scores = cleaned(gate.detach().softmax(-1), valid)
            self._update(indices, scores, valid, is_optimizer_step)
        term = loss = attached_zero(gate)
        if self.training and gate_logits.requires_grad:
            term = self._balancing_term(gate, indices.shape[-1], valid)
        if compute_loss:
            loss = self.balance_loss_weight * load_balance(gate, indices, valid, self.num_experts)
        return {"balance_loss": loss, "balancing_term": term, **self._report(indices.shape[-1])}

    def _fair_share(self, k):
        return self.total_tokens.float() * (k / self.num_experts)

    def _balancing_term(self, gate, k, valid):
        imbalance = self.expert_counts.float() - self._fair_share(k)
        imbalance = imbalance / torch.where(self.total_tokens > 0, self.total_tokens.float(), 1)
        adjustment = snapshot(-self.gradient_balance_weight * imbalance)
        gate = torch.where(gate.isfinite(), gate, 0)  # a banned expert: inf - inf is NaN
        shift = gate - gate.detach()  # 0, with the gradient of the logits
        return self.gradient_balance_weight * masked_mean(
            (shift - adjustment) ** 2, valid.unsqueeze(-1)
        )

    def _report(self, k):
        counts = self.expert_counts.float()
        spread = counts.std() if self.num_experts > 1 else torch.zeros_like(counts[0])
        return {
            "expert_counts": counts.clone(),
            "expert_balance_ratio": counts / (self._fair_share(k) + 1e-6),
            "coefficient_of_variation": spread / (counts.mean() + 1e-6),
            "gradient_weight": self.gradient_balance_weight,
        }

    def get_statistics(self):
        """``expert_counts`` and ``expert_scores`` as lists, ``total_tokens`` as a number; waits for
        the device."""
        return {name: getattr(self, name).tolist() for name in _STATISTICS}

    @torch.no_grad()
    def reset_statistics(self):
        """Forget all counts, those of a step that is under way among them."""
        for name in (*_STATISTICS, *_ACCUMULATED, "_accumulation_steps"):
            getattr(self, name).zero_()

    def extra_repr(self):
        return (
            f"num_experts={self.num_experts}, balance_loss_weight={self.balance_loss_weight}, "
            f"gradient_balance_weight={self.gradient_balance_weight}, momentum={self.momentum}"
        )


class AuxiliaryLoss(torch.nn.Module):
    r"""Load balancing, router z and diversity losses of a mixture of experts.

    With gate probabilities :math:`p`, k choices per token,

    .. math:: \text{load} = E \sum_e \frac{\sum_n p_{ne}}{Nk} \cdot
        \frac{\#\{(n, j) : \text{choice}_{nj} = e\}}{Nk} \le 10, \qquad
        \text{router\_z} = \frac1N \sum_n \Big(\ln \sum_e e^{g_{ne}}\Big)^2

    >>> gate = torch.zeros(4, 2)
    >>> out = AuxiliaryLoss(1.0, 1.0)(gate, torch.tensor([[0], [1], [0], [1]]), num_experts=2)
    >>> torch.testing.assert_close(out["load_balancing"], torch.tensor(1.0))
    >>> torch.testing.assert_close(out["router_z"], torch.logsumexp(gate, -1).square().mean())

    Evenly used experts have load 1 / k, the smallest there is with even probabilities.

    Args:
        load_balancing_weight, router_z_weight, expert_diversity_weight: factors of the three.
        normalize_topk: multiply the load by k, so that even use is 1 for every k.
        clamp_router_z: clamp the logits to [-10, 10] and router_z to 100 before its weight; its
            gradient is then 0 where it is needed most.
    """

    def __init__(
        self,
        load_balancing_weight=1e-4,
        router_z_weight=1e-3,
        expert_diversity_weight=1e-4,
        *,
        normalize_topk=False,
        clamp_router_z=False,
    ):
        super().__init__()
        self.load_balancing_weight = load_balancing_weight
        self.router_z_weight = router_z_weight
        self.expert_diversity_weight = expert_diversity_weight
        self.normalize_topk = normalize_topk
        self.clamp_router_z = clamp_router_z
        self.diversity = DiversityLoss()

    def forward(
        self,
        gate_logits=None,
        expert_indices=None,
        expert_outputs=None,
        num_experts=None,
        *,
        attention_mask=None,
    ):
        """Each loss whose inputs are given, times its weight.

        Args:
            gate_logits: ``[N, E]`` (or ``[..., E]``) floating.
            expert_indices: ``[N, k]`` (or ``[..., k]``) integers.
            expert_outputs: a list of tensors ``[N, H]``.
            num_experts: E.
            attention_mask: ``[N]``, or as many entries: a token counts where it is not 0.

        Returns:
            dict: ``load_balancing`` (of gate_logits, expert_indices and num_experts), ``router_z``
            (of gate_logits) and ``expert_diversity`` (of expert_outputs, mean cosine), ``[]`` each.
        """
        name, losses = "AuxiliaryLoss", {}
        routing = gate_logits, expert_indices, num_experts
        if all(given is not None for given in routing):
            check_experts(name, num_experts)
            gate, indices, valid = routed(
                name, "gate_logits", gate_logits, expert_indices, num_experts, attention_mask
            )
            load = load_balance(gate, indices, valid, num_experts)
            if self.normalize_topk:
                load = load * indices.shape[-1]
            losses["load_balancing"] = self.load_balancing_weight * load.clamp(max=10)
        if gate_logits is not None:
            check_floating(name, "gate_logits", gate_logits)
            valid = row_mask(name, attention_mask, "gate_logits", gate_logits)
            losses["router_z"] = self.router_z_weight * self._router_z(gate_logits, valid)
        if expert_outputs is not None:
            similarity = self.diversity(expert_outputs, attention_mask=attention_mask)
            losses["expert_diversity"] = self.expert_diversity_weight * similarity
        return losses

    def _router_z(self, gate_logits, valid):
        gate = cleaned(gate_logits.reshape(-1, gate_logits.shape[-1]), valid)
        if self.clamp_router_z:
            gate = gate.clamp(-10, 10)
        z = masked_mean(gate.logsumexp(-1) ** 2, valid)
        return z.clamp(max=100) if self.clamp_router_z else z

    def extra_repr(self):
        return (
            f"load_balancing_weight={self.load_balancing_weight}, "
            f"router_z_weight={self.router_z_weight}, "
            f"expert_diversity_weight={self.expert_diversity_weight}"
        )
