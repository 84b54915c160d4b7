# SPDX-License-Identifier: BSD-3-Clause
"""Losses of a mixture of experts: balancing, auxiliary losses, and how alike its outputs are."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from .._checks import check_device, check_flags, check_integers, is_readable, refusal, shape_text
from ._options import Flag, LossModule, Number, Rule, Share, check_size, one_of, part_of
from ._rows import attached_zero, check_features, cleaned, distances, masked_mean, row_mask
from ._state import KeepsState, advances, borrow, clear, give_back, snapshot, store

MOST_EXPERTS = 2**24  # 64 MB for each of a balancer's counts
Experts = Annotated[int, Rule("1 to 2^24", check_size, most=MOST_EXPERTS)]


def load_balance(gate, indices, valid, num_experts):
    choices = (valid.sum() * indices.shape[-1]).clamp(min=1)
    probability = cleaned(gate.softmax(-1), valid).sum(0) / choices
    # Not counts / choices, of integers: that is of the default dtype.
    counts = choice_counts(indices, valid, num_experts).to(probability.dtype)
    return num_experts * (probability * (counts / choices)).sum()


def choice_counts(indices, valid, num_experts):
    """How often each expert was chosen, [E] int64: exact, and the device is not asked how many."""
    counts = torch.zeros(num_experts, dtype=torch.int64, device=indices.device)
    inside = (indices >= 0) & (indices < num_experts)  # on a device nobody has looked
    on = (valid.unsqueeze(-1) & inside).long()
    return counts.index_add(0, indices.clamp(0, num_experts - 1).flatten(), on.flatten())


def routed(function, name, gate, expert_indices, num_experts, attention_mask):
    """[N, E] gate and [N, k] indices, 0 in rows that do not count, and which do [N]."""
    check_features(function, name, gate, num_experts, "num_experts")
    check_integers(function, "expert_indices", expert_indices)
    check_device(function, "expert_indices", expert_indices, name, gate)
    if expert_indices.shape == gate.shape[:-1]:  # one choice per token
        expert_indices = expert_indices.unsqueeze(-1)
    if expert_indices.shape[:-1] != gate.shape[:-1]:
        got = shape_text(expert_indices)
        raise refusal(function, "expert_indices", f"be [N, k] for {name} {shape_text(gate)}", got)
    valid = row_mask(function, attention_mask, name, gate)
    indices = expert_indices.reshape(-1, expert_indices.shape[-1]).long()
    refuse_indices(function, "expert_indices", indices, num_experts, "", valid)
    gate = cleaned(gate.reshape(-1, num_experts), valid)
    return gate, torch.where(valid.unsqueeze(-1), indices, 0), valid


def refuse_indices(function, name, indices, size, of="", valid=None):
    """Rows ``[N, k]`` that count and are not in [0, size), where that can be looked at."""
    if not is_readable(indices):
        return
    outside = ((indices < 0) | (indices >= size)).any(-1)
    outside = outside if valid is None else outside & valid
    if outside.any():
        row = int(outside.nonzero()[0])
        got = indices[row].tolist()
        raise refusal(function, f"{name} at row {row}", f"be in [0, {size}){of}", got, IndexError)


@dataclass(eq=False, repr=False)
class DiversityLoss(LossModule):
    r"""Similarity of the outputs of experts, averaged over pairs of experts and over rows.

    .. math:: L = w\, \frac{2}{E(E-1)} \sum_{i<j} s_{ij}, \qquad
        s_{ij} = \frac1N \sum_n \cos(x_{in}, x_{jn}),\quad
        \Big(1 + \frac1N \sum_n \lVert x_{in} - x_{jn} \rVert\Big)^{-1}
        \ \text{or}\ \frac1N \sum_n x_{in} \cdot x_{jn}

    >>> expected = (F.cosine_similarity(x, y).mean() + F.cosine_similarity(x, z).mean()
    ...             + F.cosine_similarity(y, z).mean()) / 3
    >>> torch.testing.assert_close(DiversityLoss()([x, y, z]), expected)

    With fewer than two experts, or no row that counts, it is 0. Its minimum is reached by outputs
    that point away from each other (the cosine of two is then -1), not by orthogonal ones.

    What the mask excludes is selected away, with a gradient of 0; it is read, though.

    Args:
        similarity_metric: "cosine", "l2" or "dot".
        diversity_weight: w.
    """

    similarity_metric: Annotated[str, one_of("cosine", "l2", "dot")] = "cosine"
    diversity_weight: Number = 1.0

    def forward(
        self, expert_outputs: Sequence[Tensor] | Tensor, *, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The loss ``[]``, float32 (float64 for float64 outputs).

        Args:
            expert_outputs: a list of E tensors ``[N, H]`` (or ``[..., H]``), floating, or one
                tensor ``[E, N, H]``.
            attention_mask: ``[N]``, or as many entries; rows count where it is not 0. None: all.

        Raises:
            ValueError: no expert at all, or outputs that differ in shape.
        """
        return self.diversity_weight * self.similarity(expert_outputs, attention_mask)

    def similarity(
        self, expert_outputs: Sequence[Tensor] | Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """The loss without its weight."""
        _check_experts(self.function, expert_outputs)
        first = expert_outputs[0]
        if len(expert_outputs) < 2:
            return attached_zero(first)
        valid = row_mask(self.function, attention_mask, "expert_outputs[0]", first)
        stacked = expert_outputs
        if not isinstance(stacked, Tensor):
            stacked = torch.stack([x.reshape(-1, first.shape[-1]) for x in expert_outputs])
        stacked = cleaned(stacked.reshape(len(expert_outputs), -1, first.shape[-1]), valid)
        if self.similarity_metric == "l2":
            return _closeness(stacked, valid)
        if self.similarity_metric == "cosine":
            stacked = torch.nn.functional.normalize(stacked, dim=-1, eps=1e-8)  # as PyTorch's
        return _mean_product(stacked, valid)


def _mean_product(stacked, valid):
    """Mean over pairs and rows of the products of ``[E, N, H]``, rows that do not count being 0.

    Each expert meets the sum of those before it: E products instead of E (E - 1) / 2, and none of
    the cancellation of (|sum|^2 - sum of |x|^2) / 2. No matrix product: autocast would round it.
    """
    experts = stacked.shape[0]
    before = stacked.cumsum(0)[:-1]
    pairs = experts * (experts - 1) // 2
    return (stacked[1:] * before).sum() / (pairs * valid.sum().clamp(min=1))


def _closeness(stacked, valid):
    """Mean over pairs of 1 / (1 + mean distance)."""
    experts = stacked.shape[0]
    rows = stacked.transpose(0, 1)
    count = valid.sum()
    distance = distances(rows, rows).sum(0) / count.clamp(min=1)
    upper = torch.ones_like(distance, dtype=torch.bool).triu(1)
    total = torch.where(upper, 1 / (1 + distance), 0).sum() / (experts * (experts - 1) // 2)
    return torch.where(count > 0, total, 0)


def _check_experts(function, expert_outputs):
    if not isinstance(expert_outputs, (list, tuple, Tensor)):
        got = type(expert_outputs).__name__
        raise refusal(function, "expert_outputs", "be a list of tensors", got, TypeError)
    if isinstance(expert_outputs, Tensor):
        check_features(function, "expert_outputs", expert_outputs)
        if expert_outputs.dim() < 3:
            raise refusal(function, "expert_outputs", "be [E, N, H]", shape_text(expert_outputs))
    if len(expert_outputs) == 0:
        raise ValueError(f"{function}: expert_outputs must have at least one expert, got none")
    for i, output in enumerate(expert_outputs):
        name = f"expert_outputs[{i}]"
        check_features(function, name, output)
        if output.dim() < 2 or output.shape != expert_outputs[0].shape:
            rule = f"be [N, H] like the others, {shape_text(expert_outputs[0])}"
            raise refusal(function, name, rule, shape_text(output))
        check_device(function, name, output, "expert_outputs[0]", expert_outputs[0])


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

    What the mask excludes is selected away, with a gradient of 0; it is read, though.

    **On several ranks** each balances by the counts of its own tokens until ``sync_state``. Counts
    and tokens are then those of an average rank, so that the ratios that the balancing uses are as
    of one process with all tokens. Scores are averaged by tokens: exact where a rank has as many
    tokens in each of its steps.

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
            state[name] = (state[name] + added).to(state[name].dtype)
        if is_optimizer_step:
            steps = state["_accumulation_steps"]
            for name, sum_name in zip(_STATISTICS, _ACCUMULATED, strict=True):
                average = state[sum_name] / steps
                kept = state[name] * self.momentum
                state[name] = kept.add(average, alpha=1 - self.momentum)
                state[sum_name] = torch.zeros_like(average)
            state["_accumulation_steps"] = torch.zeros_like(steps)
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
        clear(self, _STATE)

    def _shares(self):
        counts, scores, tokens = (getattr(self, name) for name in _STATISTICS)
        pending = [getattr(self, name) for name in (*_ACCUMULATED, "_accumulation_steps")]
        return [counts, scores.double() * tokens, tokens, *pending]

    def _take(self, sums, ranks):
        counts, scores, tokens, *pending, steps = sums
        scores = scores / torch.where(tokens > 0, tokens, 1)
        means = (counts / ranks, scores, tokens / ranks, *(sum_ / ranks for sum_ in pending))
        store(self, dict(zip(_STATE, (*means, (steps / ranks).ceil()), strict=True)))


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

    What the mask excludes is selected away, with a gradient of 0; it is read, though.

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
            gate_logits, expert_indices, attention_mask: as in ``AuxiliaryFreeMoEBalancer``.
            expert_outputs: a list of tensors ``[N, H]``.
            num_experts: E.

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
