# SPDX-License-Identifier: BSD-3-Clause
"""What the models write after the beginnings of held-out functions, and how much of it repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masked_loss_ext.ops.repetition import repetition_counts

from ..language.data import END


@dataclass(frozen=True)
class Texts:
    """Beginnings and what follows them."""

    tokens: Tensor  # [B, S] int64, bytes
    prompt: int  # bytes of each that were given
    ended: Tensor  # [B, S] bool, from the mark that ends a text on

    def repeated(self, size: int) -> float:
        """Of the windows of ``size`` bytes behind the prompts, those that stood there before."""
        counts = self.counts(size)
        windows = int(counts.windows.sum())
        return 1 - int(counts.distinct.sum()) / windows if windows else 0.0

    def longest_run(self) -> float:
        """Of one byte behind the prompt; mean over the texts."""
        return self.counts(1).longest_run.float().mean().item()

    def finished(self) -> float:
        """Share of the texts that came to an end."""
        return self.ended[:, -1].float().mean().item()

    def counts(self, size: int):
        return repetition_counts(self.tokens[:, self.prompt :], ~self.ended[:, self.prompt :], size)

    def text(self, row: int) -> str:
        """As it would be printed, the prompt included."""
        return bytes(self.tokens[row][~self.ended[row]].tolist()).decode(errors="replace")


def held_out_texts(texts: Sequence[bytes], number: int, prompt: int, length: int) -> Texts:
    """Beginnings of real functions, evenly spread, that go on for at least ``length`` bytes."""
    size = prompt + length
    enough = [text[:size] for text in texts if len(text) >= size]
    chosen = enough[:: max(1, len(enough) // number)][:number]
    tokens = torch.tensor([list(text) for text in chosen])
    return Texts(tokens, prompt, torch.zeros_like(tokens, dtype=torch.bool))


@torch.no_grad()
def continuations(model: nn.Module, like: Texts, temperature: float, seed: int) -> Texts:
    """The model's own, after the prompts of ``like`` and up to its length, all texts at once."""
    device = model.embed.weight.device
    rng = torch.Generator().manual_seed(seed)
    tokens, size = like.tokens[:, : like.prompt], like.tokens.shape[1]
    while tokens.shape[1] < size:
        logits = model(tokens.to(device))[0][:, -1].float().cpu()
        if temperature == 0:
            following = logits.argmax(-1, keepdim=True)
        else:
            following = torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)
        tokens = torch.cat([tokens, following], dim=1)
    return Texts(tokens, like.prompt, (tokens == END).cummax(dim=1).values)
