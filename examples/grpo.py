#!/usr/bin/env python
# SPDX-License-Identifier: BSD-3-Clause
"""GRPO on `linear_row_statistics`: a model that writes names learns to write names of 8 letters.

A byte-level model first reads the names of Python's standard library. Then it samples groups of
names, and those whose length is nearer to 8 than the group's mean become likelier. The
log-probabilities of sampled bytes come from hidden states, without logits; what follows a name's
end is masked, and a divergence from the model that only read keeps the names names.

python examples/grpo.py          about 40 seconds on two cores
python examples/grpo.py --quick
"""

from __future__ import annotations

import copy
import re

import examples_common as common
import torch
from acts.language.data import END
from torch import Tensor, nn

import masked_loss_ext as mle

WANTED, LONGEST, PROMPTS, GROUP = 8, 20, 16, 8  # letters; bytes; groups of a step, names in one
LEARNING_RATE, DIVERGENCE, CLIP, EPOCHS = 1e-3, 0.3, 0.2, 2

OFF = f"letters that 512 names are off {WANTED}, mean"


def learn_names(wanted, model: nn.Module) -> list[bytes]:
    learn, _ = common.texts(wanted.quick)
    names = sorted({name for text in learn for name in re.findall(rb"[A-Za-z_]{2,19}", text)})
    sampler = common.sampler(names, wanted.seed, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in common.progress(2 * wanted.steps, "reading names"):
        batch = sampler.batch()
        target = (batch.tokens, batch.attention_mask)
        optimizer.zero_grad()
        mle.masked_cross_entropy(model(batch.tokens), *target, shift=1).backward()
        optimizer.step()
    return names


@torch.no_grad()
def sample(model: nn.Module, first: Tensor) -> tuple[Tensor, Tensor]:
    """[N] first bytes -> [N, LONGEST] names, their ends and padding; which bytes were drawn."""
    tokens = first[:, None]
    for _ in range(LONGEST - 1):
        drawn = torch.multinomial(model(tokens)[:, -1].softmax(-1), 1)
        ended = (tokens[:, -1:] == END) & (tokens.shape[1] > 1)
        tokens = torch.cat([tokens, drawn.masked_fill(ended, END)], 1)
    ends = (tokens == END).int().cumsum(1)
    return tokens, (ends - (tokens == END).int()) == 0  # up to the first end, and that itself


def rewards(mask: Tensor) -> Tensor:
    """[N] 0 for a name of so many letters as wanted, -1 / 8 for each that is missing or too much"""
    return -((mask.sum(1) - 1 - WANTED).abs() / WANTED)


def policy_loss(log_prob: Tensor, old: Tensor, start: Tensor, advantages: Tensor) -> Tensor:
    """Of each token: GRPO's clipped gain, and the divergence by what was sampled ("k3")."""
    ratio = (log_prob - old).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    gap = start - log_prob
    return DIVERGENCE * (gap.exp() - gap - 1) - gain


def log_probs_of(model, tokens: Tensor, counts: Tensor) -> Tensor:
    """Position t of the hidden states says how likely byte t + 1 was."""
    hidden = model.hidden(tokens[:, :-1])
    labels = tokens[:, 1:]
    return mle.linear_row_statistics(hidden, model.head.weight, labels, counts).log_prob


def train(wanted, start: nn.Module, firsts: Tensor) -> nn.Module:
    model = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    torch.manual_seed(wanted.seed + 1)
    for _ in common.progress(wanted.steps, "GRPO"):
        prompts = firsts[torch.randint(len(firsts), (PROMPTS,))]
        tokens, mask = sample(model, prompts.repeat_interleave(GROUP))
        reward = rewards(mask).view(PROMPTS, GROUP)
        centred = reward - reward.mean(1, keepdim=True)
        advantages = (centred / (reward.std(1, keepdim=True) + 1e-4)).view(-1, 1)
        counts = mask[:, 1:]
        with torch.no_grad():
            old, before = (log_probs_of(m, tokens, counts) for m in (model, start))
        for _ in range(EPOCHS):  # the second meets clipped tokens, which cost its backward nothing
            optimizer.zero_grad()
            log_prob = log_probs_of(model, tokens, counts)
            per_token = policy_loss(log_prob, old, before, advantages)
            mle.aggregate_tokens(per_token, counts, "sequence_mean").backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return model


def main() -> None:
    wanted = common.parse_arguments(__doc__, steps=80, quick=2)
    start = common.make_language_model(wanted.seed)
    names = learn_names(wanted, start)
    firsts = torch.tensor([name[0] for name in names])
    models = {"before": start, "after": train(wanted, start, firsts)}
    found, likely = {}, {}
    for name, model in models.items():
        torch.manual_seed(wanted.seed + 2)
        tokens, mask = sample(model, firsts[torch.randint(len(firsts), (512,))])
        found[name] = (mask.sum(1) - 1 - WANTED).abs().float().mean().item()
        with torch.no_grad():
            log_probs = log_probs_of(start, tokens, mask[:, 1:])
            likely[name] = -mle.aggregate_tokens(log_probs, mask[:, 1:]).item()
        rows = zip(tokens[:6].tolist(), mask[:6].sum(1).tolist(), strict=True)
        words = [bytes(row[:n]).rstrip(b"\0").decode("latin1") for row, n in rows]
        print(f"{name}: {' '.join(map(repr, words))}")
    for what, values in (("nats per byte, by the model that only read", likely), (OFF, found)):
        print(f"{what}: {', '.join(f'{value:.2f} {name}' for name, value in values.items())}")


if __name__ == "__main__":
    main()
