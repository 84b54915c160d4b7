# SPDX-License-Identifier: BSD-3-Clause
"""AuxiliaryLoss: load, router z and diversity losses of a mixture of experts."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ._options import Flag, LossModule, Number, check_size, part_of
from ._routing import MOST_EXPERTS, load_balance, routed
from ._rows import check_features, cleaned, masked_mean, row_mask
from .diversity import DiversityLoss


@dataclass(eq=False, repr=False)
class AuxiliaryLoss(LossModule):
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

    load_balancing_weight: Number = 1e-4
    router_z_weight: Number = 1e-3
    expert_diversity_weight: Number = 1e-4
    _: KW_ONLY
    normalize_topk: Flag = False
    clamp_router_z: Flag = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.diversity = part_of(self.function, DiversityLoss)

    def forward(
        self,
        gate_logits: Tensor | None = None,
        expert_indices: Tensor | None = None,
        expert_outputs: Sequence[Tensor] | Tensor | None = None,
        num_experts: int | None = None,
        *,
        attention_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
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
        name, losses = self.function, {}
        if not (gate_logits is None or expert_indices is None or num_experts is None):
            check_size(name, "num_experts", num_experts, 1, MOST_EXPERTS)
            gate, indices, valid = routed(
                name, "gate_logits", gate_logits, expert_indices, num_experts, attention_mask
            )
            load = load_balance(gate, indices, valid, num_experts)
            if self.normalize_topk:
                load = load * indices.shape[-1]
            losses["load_balancing"] = self.load_balancing_weight * load.clamp(max=10)
        if gate_logits is not None:
            check_features(name, "gate_logits", gate_logits)
            valid = row_mask(name, attention_mask, "gate_logits", gate_logits)
            losses["router_z"] = self.router_z_weight * self._router_z(gate_logits, valid)
        if expert_outputs is not None:
            similarity = self.diversity.similarity(expert_outputs, attention_mask)
            losses["expert_diversity"] = self.expert_diversity_weight * similarity
        return losses

    def _router_z(self, gate_logits, valid):
        gate = cleaned(gate_logits.reshape(-1, gate_logits.shape[-1]), valid)
        if self.clamp_router_z:
            gate = gate.clamp(-10, 10)
        z = masked_mean(gate.logsumexp(-1) ** 2, valid)
        return z.clamp(max=100) if self.clamp_router_z else z
