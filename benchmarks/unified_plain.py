# SPDX-License-Identifier: BSD-3-Clause
"""The unified loss as it is written with PyTorch alone: each component from its own log_softmax.

What a careful user writes: the rows that count are selected once, no loop goes over tokens and no
value is brought to the host. ``shared`` computes the log-probabilities at temperature 1 once, for
all components that need them. ``select=False`` masks the values instead of selecting the rows, so
that no shape depends on data and the whole compiles into one graph.

Letters: B texts, S tokens, V classes, K rows of logits; N tokens of a router, E experts, k of them
for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .repetition_plain import repeated_ngram_candidates, sorted_counts

IGNORED = -100
LEAST = 2.0**-24  # of -log p where log(1 - p) is taken: p = 1 would give infinity


@dataclass(frozen=True)
class Settings:
    """Every component that needs no further head is on."""

    vocab_size: int
    penalty_on: str = "targets"
    initial_temperature: float = 1.3
    label_smoothing: float = 0.1
    ngram_size: int = 4
    ngram_penalty_weight: float = 0.1
    immediate_repetition_weight: float = 0.5
    eos_token_id: int = 0
    min_sequence_length: int = 20
    eos_penalty_weight: float = 0.05
    num_experts: int = 8
    gradient_balance_weight: float = 0.1
    focal_alpha: float = 1.0
    focal_gamma: float = 2.0
    diversity_weight: float = 0.01
    load_balancing_weight: float = 1e-4
    router_z_weight: float = 1e-3


AUXILIARY_DIVERSITY_WEIGHT = 1e-4
REPORTED = ("ngram_penalty_breakdown", "moe_expert_balance_ratio", "moe_cv")  # not in the total


@dataclass(frozen=True)
class Rows:
    """The rows of a batch: [K, V] logits, their [K] labels, and how a mean over them is taken."""

    logits: Tensor
    labels: Tensor
    take: Callable[[Tensor], Tensor]  # [B, S, ...] or [N, ...] -> [K, ...]
    keep: Callable[[Tensor], Tensor]  # of [K, ...], 0 at rows that do not count
    count: Tensor
    log_prob: Callable[[], Tensor]  # [K, V] at temperature 1

    def mean(self, values: Tensor) -> Tensor:
        return self.keep(values).sum() / self.count


def rows_of(logits: Tensor, targets: Tensor, valid: Tensor, *, select: bool, shared: bool) -> Rows:
    count, flat = valid.sum().clamp(min=1), valid.flatten()

    def take(values: Tensor) -> Tensor:
        values = values.flatten(0, 1) if values.shape[:2] == valid.shape else values
        return values[flat] if select else values

    def keep(values: Tensor) -> Tensor:
        if select:
            return values
        return torch.where(flat.view(-1, *[1] * (values.dim() - 1)), values, 0)

    rows = take(logits)
    labels = take(targets).clamp(min=0)
    if shared:
        log_p = F.log_softmax(rows, -1)
        return Rows(rows, labels, take, keep, count, lambda: log_p)
    return Rows(rows, labels, take, keep, count, lambda: F.log_softmax(rows, -1))


class Temperature(nn.Module):
    """Rises while the loss varies and falls while it does not, between 0.5 and 2."""

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.register_buffer("value", torch.tensor(initial))
        self.register_buffer("losses", torch.zeros(100))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def update(self, loss: Tensor) -> None:
        slots = torch.arange(100, device=loss.device)
        self.losses.copy_(torch.where(slots == self.count % 100, loss.detach(), self.losses))
        self.count.add_(1)
        size = self.count.clamp(max=100)
        filled = slots < size
        mean = self.losses.sum() / size
        square = torch.where(filled, (self.losses - mean) ** 2, 0).sum() / (size - 1)
        variation = square.sqrt() / mean
        step = 0.01 * ((variation > 0.1).float() - (variation < 0.05).float())
        ready = (size >= 10) & (mean > 0)
        self.value.copy_((self.value + torch.where(ready, step, 0.0)).clamp(0.5, 2.0))


class Balancer(nn.Module):
    """Expert counts as moving averages, and the term that moves the router towards equal ones."""

    def __init__(self, experts: int, weight: float) -> None:
        super().__init__()
        self.experts, self.weight = experts, weight
        self.register_buffer("counts", torch.zeros(experts))
        self.register_buffer("tokens", torch.zeros(()))

    def forward(self, rows: Rows, gates: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """gates [K, E], indices [K, k]."""
        with torch.no_grad():
            counts = rows.keep(F.one_hot(indices, self.experts)).sum((0, 1))
            self.counts.lerp_(counts.to(self.counts), 0.1)
            self.tokens.lerp_(rows.count.to(self.tokens), 0.1)
            share = indices.shape[1] * self.tokens / self.experts
            adjustment = -self.weight * (self.counts - share) / self.tokens
            variation = self.counts.std() / (self.counts.mean() + 1e-6)
        term = rows.keep((gates - gates.detach() - adjustment) ** 2).sum()
        return {
            "moe_balancing_term": self.weight * term / (rows.count * self.experts),
            "moe_expert_balance_ratio": self.counts / (share + 1e-6),
            "moe_cv": variation,
        }


def unlikelihood(log_p: Tensor) -> Tensor:
    """-log(1 - p)."""
    return -torch.log1p(-torch.exp(log_p.clamp(max=-LEAST)))


def mean_unlikelihood(rows: Rows, log_p: Tensor, candidates: Tensor) -> Tensor:
    """Mean over the pairs of a row and a candidate; ``candidates`` [K] or [K, S] bool."""
    values = torch.where(candidates, unlikelihood(log_p), 0)
    return rows.keep(values).sum() / rows.keep(candidates).sum().clamp(min=1)


def expert_similarity(rows: Rows, outputs: Sequence[Tensor]) -> Tensor:
    """Mean cosine over pairs of experts and tokens; outputs E times [K, H]."""
    experts = len(outputs)
    directions = [rows.keep(F.normalize(output, dim=-1)).flatten() for output in outputs]
    together = torch.stack(directions)
    cosines = together @ together.T / rows.count
    return cosines.triu(1).sum() / (experts * (experts - 1) / 2)


class PlainUnifiedLoss(nn.Module):
    def __init__(self, settings: Settings, *, shared: bool = False, select: bool = True) -> None:
        super().__init__()
        self.settings, self.shared, self.select = settings, shared, select
        self.temperature = Temperature(settings.initial_temperature)
        self.balancer = Balancer(settings.num_experts, settings.gradient_balance_weight)

    def forward(self, *inputs: object, return_detailed: bool = False, **more: object):
        """The total, or a dict of it and all components, of what ``components`` takes."""
        # Outside of what may be compiled: the backward pass of a graph that changes a buffer reads
        # it once more, and would divide by the new temperature.
        temperature = self.temperature.value.clone()
        found = self.components(temperature, *inputs, **more)
        self.temperature.update(found["main_loss"])
        found["total_loss"] = sum(value for name, value in found.items() if name not in REPORTED)
        found["main_temperature"] = self.temperature.value.clone()
        return found if return_detailed else found["total_loss"]

    def components(
        self,
        temperature: Tensor,
        logits: Tensor,
        targets: Tensor,
        attention_mask: Tensor,
        gate_logits: Tensor,
        expert_indices: Tensor,
        expert_outputs: Sequence[Tensor],
    ) -> dict[str, object]:
        """logits [B, S, V], targets and mask [B, S], gate_logits [N, E], expert_indices [N, k],
        expert_outputs E times [N, H], all of N = B * S tokens."""
        valid = attention_mask & (targets != IGNORED)
        rows = rows_of(logits, targets, valid, select=self.select, shared=self.shared)
        gates, indices = rows.take(gate_logits), rows.take(expert_indices)
        outputs = [rows.take(output) for output in expert_outputs]
        return {
            "main_loss": self.main_loss(rows, targets, temperature),
            **self.repetition(rows, targets, valid),
            **self.balancer(rows, gates, indices),
            "focal_loss": self.focal(rows),
            "diversity_loss": self.settings.diversity_weight * expert_similarity(rows, outputs),
            **self.auxiliary(rows, gates, indices, outputs),
        }

    def main_loss(self, rows: Rows, targets: Tensor, temperature: Tensor) -> Tensor:
        """Smoothed cross entropy at the temperature, and what an early end costs."""
        s = self.settings
        smoothing = s.label_smoothing * s.vocab_size / (s.vocab_size - 1)
        scaled = rows.logits / temperature
        loss = F.cross_entropy(scaled, rows.labels, reduction="none", label_smoothing=smoothing)
        position = torch.arange(targets.shape[1], device=targets.device)
        early = rows.take((position < s.min_sequence_length).expand_as(targets))
        at_end = rows.labels == s.eos_token_id
        if s.penalty_on == "targets":
            return rows.mean(loss + s.eos_penalty_weight * (at_end & early))
        end = mean_unlikelihood(rows, rows.log_prob()[:, s.eos_token_id], early & ~at_end)
        return rows.mean(loss) + s.eos_penalty_weight * end

    def repetition(self, rows: Rows, targets: Tensor, valid: Tensor) -> dict[str, Tensor]:
        on = self.on_targets if self.settings.penalty_on == "targets" else self.on_model
        log_p = rows.log_prob()
        entropy = -(log_p.exp() * log_p).sum(-1)
        evenness = rows.mean(1 - entropy / torch.tensor(float(self.settings.vocab_size)).log())
        diversity = self.settings.ngram_penalty_weight * evenness
        ngram, immediate = on(rows, log_p, targets, valid)
        return {
            "ngram_penalty": ngram + diversity,
            "ngram_penalty_breakdown": {"ngram": ngram, "diversity": diversity},
            "immediate_repetition_penalty": immediate,
        }

    def on_targets(self, rows: Rows, log_p: Tensor, targets: Tensor, valid: Tensor) -> tuple:
        """Statistics of the data, without a gradient."""
        s = self.settings
        pairs, windows, _, longest = sorted_counts(targets, valid, s.ngram_size)
        ngram = pairs.sum() / windows.sum().clamp(min=1)
        immediate = ((longest - 1).clamp(min=0) ** 2).float().mean()
        return s.ngram_penalty_weight * ngram, s.immediate_repetition_weight * immediate

    def on_model(self, rows: Rows, log_p: Tensor, targets: Tensor, valid: Tensor) -> tuple:
        """What the model thinks of the tokens that would repeat something."""
        s = self.settings
        candidates = rows.take(repeated_ngram_candidates(targets, valid, s.ngram_size))
        classes = rows.take(targets.clamp(min=0)[:, None, :].expand(-1, targets.shape[1], -1))
        ngram = mean_unlikelihood(rows, log_p.gather(-1, classes), candidates)
        before = targets.roll(1, dims=1)
        repeats = valid & valid.roll(1, dims=1) & (before != targets)
        repeats[:, 0] = False
        last = rows.take(before.clamp(min=0))[:, None]
        own = rows.log_prob().gather(-1, last)[:, 0]
        immediate = mean_unlikelihood(rows, own, rows.take(repeats))
        return s.ngram_penalty_weight * ngram, s.immediate_repetition_weight * immediate

    def focal(self, rows: Rows) -> Tensor:
        loss = F.nll_loss(rows.log_prob(), rows.labels, reduction="none")
        weight = self.settings.focal_alpha * (1 - torch.exp(-loss)) ** self.settings.focal_gamma
        return rows.mean(weight * loss)

    def auxiliary(
        self, rows: Rows, gates: Tensor, indices: Tensor, outputs: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        s = self.settings
        probabilities = rows.keep(F.softmax(gates, -1)).sum(0)
        counts = rows.keep(F.one_hot(indices, s.num_experts)).sum((0, 1))
        choices = rows.count * indices.shape[1]
        load = s.num_experts * (probabilities * counts).sum() / choices**2
        similarity = expert_similarity(rows, outputs)
        return {
            "aux_load_balancing": s.load_balancing_weight * load.clamp(max=10),
            "aux_router_z": s.router_z_weight * rows.mean(torch.logsumexp(gates, -1) ** 2),
            "aux_expert_diversity": AUXILIARY_DIVERSITY_WEIGHT * similarity,
        }
