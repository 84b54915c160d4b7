# SPDX-License-Identifier: BSD-3-Clause
"""AuxiliaryLoss: load, router z and diversity losses of a mixture of experts."""

import torch

from .._checks import check_flags
from ._arguments import as_part, check_weights
from ._routing import check_experts, load_balance, routed
from ._rows import check_floating, cleaned, masked_mean, row_mask
from .diversity import DiversityLoss


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

    What the mask excludes is selected away: its NaN reaches neither value nor gradient, and its
    gradient is 0. It is read, though: "never read" is what the row operators promise.

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
        weights = {
            "load_balancing_weight": load_balancing_weight,
            "router_z_weight": router_z_weight,
            "expert_diversity_weight": expert_diversity_weight,
        }
        check_weights("AuxiliaryLoss", weights)
        flags = {"normalize_topk": normalize_topk, "clamp_router_z": clamp_router_z}
        check_flags("AuxiliaryLoss", flags)
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
            similarity = as_part(name, self.diversity.similarity, expert_outputs, attention_mask)
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
