# SPDX-License-Identifier: BSD-3-Clause
"""The data of the unified loss's cases and their contenders.

Tokens are drawn as words of a text are, a few frequent and most rare, with passages that come
twice and runs of one token, so that every repetition term has something to find.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import masked_loss_ext as mle

from .contenders import compiled, placed, plain_copy
from .cross_entropy_problems import SPREAD, read_bytes
from .harness import Contender, Problem
from .repetition_plain import looped_counts, sorted_counts
from .unified_plain import IGNORED, PlainUnifiedLoss, Settings

SEED = 5
EXPERTS, CHOSEN, WIDTH = 8, 2, 256
LENGTHS = (1.0, 0.875, 0.625, 0.5)  # of the rows, in turn: a quarter of the batch is padding
ALONE = "F.cross_entropy alone"
NGRAM = 4
# PyTorch's gradients with smoothing are up to 5e-5 off at 50257 classes, whole rows of an unlikely
# label at a time (ours 2e-6): a sum in fp32, it seems.
TOLERANCE = 1e-4
COMPONENTS = (
    "total_loss", "main_loss", "main_temperature", "ngram_penalty", "immediate_repetition_penalty",
    "moe_balancing_term", "moe_expert_balance_ratio", "moe_cv", "focal_loss", "diversity_loss",
    "aux_load_balancing", "aux_router_z", "aux_expert_diversity",
)  # fmt: skip


def text_data(rows: int, length: int, classes: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both [B, S]; token 0 ends a text, in some before its 20th token."""
    generator = torch.Generator().manual_seed(SEED)
    frequency = 1 / (torch.arange(1, classes, dtype=torch.float64) + 2.7)
    drawn = torch.multinomial(frequency, rows * length, replacement=True, generator=generator)
    tokens = drawn.view(rows, length) + 1
    eighth = length // 8
    tokens[:, 2 * eighth : 3 * eighth] = tokens[:, :eighth]
    tokens[:, eighth + 1 : eighth + 4] = tokens[:, eighth, None]
    tokens[:, 5] = torch.arange(rows) % 2 * tokens[:, 5]
    lengths = torch.tensor([round(LENGTHS[row % 4] * length) for row in range(rows)])
    tokens[torch.arange(rows), lengths - 1] = 0
    return tokens, torch.arange(length) < lengths[:, None]


def loss_data(shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Logits, targets, mask, gate logits [N, E], chosen experts [N, k], their outputs [N, H]."""
    tokens, mask = text_data(*shape)
    generator = torch.Generator().manual_seed(SEED + 1)
    logits = torch.randn(shape, generator=generator).mul_(SPREAD)
    gates = torch.randn(mask.numel(), EXPERTS, generator=generator)
    outputs = torch.randn(EXPERTS, mask.numel(), WIDTH, generator=generator)
    chosen = gates.topk(CHOSEN).indices
    return logits, tokens.masked_fill(~mask, IGNORED), mask, gates, chosen, *outputs.unbind()


def settings_of(classes: int, penalty_on: str) -> Settings:
    return Settings(classes, penalty_on, ngram_size=NGRAM, num_experts=EXPERTS)


def our_module(settings: Settings) -> nn.Module:
    """Everything that the plain one does; focal beside the main loss, so that both have to be
    differentiated."""
    return mle.UnifiedLoss(
        **vars(settings),
        primary_loss_type="deepseek",
        use_moe_balancing=True,
        use_focal_loss=True,
        use_diversity_loss=True,
        use_auxiliary_loss=True,
        focal_mode="add",
    )


def filled_history(history: Tensor) -> None:
    """Losses that vary so much that the temperature changes with the next one."""
    history.copy_(torch.linspace(8, 14, len(history)))


def as_call(module: nn.Module) -> tuple[Callable, Callable]:
    """The call that gives total and components, and what puts the module's state back before it."""
    state = copy.deepcopy(module.state_dict())

    def restore(*_: object) -> None:
        module.load_state_dict(state)

    def call(
        logits: Tensor, targets: Tensor, mask: Tensor, gates: Tensor, chosen: Tensor, *experts
    ):
        found = module(
            logits,
            targets,
            mask,
            gate_logits=gates,
            expert_indices=chosen,
            expert_outputs=list(experts),
            return_detailed=True,
        )
        parts = found["ngram_penalty_breakdown"]
        return (*(found[name] for name in COMPONENTS), parts["ngram"], parts["diversity"])

    return call, restore


def our_call(settings: Settings) -> tuple[Callable, Callable]:
    module = our_module(settings)
    filled_history(module.main_loss.loss_history)
    module.main_loss.history_size.fill_(100)
    return as_call(module)


def plain_module(settings: Settings, **how: bool) -> PlainUnifiedLoss:
    module = PlainUnifiedLoss(settings, **how)
    filled_history(module.temperature.losses)
    module.temperature.count.fill_(100)
    return module


def alone(logits: Tensor, targets: Tensor, *_: object) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def loss_problem(shape: tuple[int, int, int], penalty_on: str, device: str) -> Problem:
    settings = settings_of(shape[-1], penalty_on)
    sets = placed(loss_data(shape), device)
    for _, _, _, gates, _, *outputs in sets:
        for leaf in (gates, *outputs):
            leaf.requires_grad_(True)
    logits, _, mask, *_ = sets[0]
    plain = [as_call(plain_module(settings, **how).to(device)) for how in ({}, {"shared": True})]
    one_graph = plain_module(settings, shared=True, select=False).to(device)
    one_graph.components = compiled(one_graph.components)
    calls = {
        "ours": our_call(settings),
        "eager": plain[0],
        "eager, one softmax": plain[1],
        "compile": as_call(one_graph),
    }
    contenders = [
        Contender(name, call, sets, prepare=restore) for name, (call, restore) in calls.items()
    ]
    moved = 2 * read_bytes(logits, mask) + logits.nbytes
    information = Contender(ALONE, alone, sets, role="information")
    return Problem(
        contenders,
        as_call(plain_module(settings).double().to(device))[0],
        bytes_moved=moved,
        gradient_bytes=logits.nbytes,
        beside=[information, plain_copy(moved, device)],
        gradient_tolerance=TOLERANCE,
        gradient_unit=1 / (int(mask.sum()) * shape[-1]),
    )


def our_counts(tokens: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    return mle.ops.repetition.repetition_counts(tokens, valid, NGRAM)


def with_ngrams_of(formula: Callable) -> Callable:
    return lambda tokens, valid: formula(tokens, valid, NGRAM)


def counts_problem(shape: tuple[int, int], device: str) -> Problem:
    """Whole numbers: the tolerance of agreement.py is equality up to 100000."""
    data = placed(text_data(*shape, classes=5000), device, gradient=False)
    calls = {
        "ours": our_counts,
        "Python loop": with_ngrams_of(looped_counts),
        "eager, sorted": with_ngrams_of(sorted_counts),
        "compile, sorted": compiled(with_ngrams_of(sorted_counts)),
    }
    contenders = [Contender(name, call, data) for name, call in calls.items()]
    return Problem(contenders, with_ngrams_of(looped_counts), bytes_moved=0, gradient_bytes=0)
