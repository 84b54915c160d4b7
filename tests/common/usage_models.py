# SPDX-License-Identifier: BSD-3-Clause
"""What the examples of the usage guide call: a model, a tokenizer, a batch."""

from types import SimpleNamespace

import torch

VOCABULARY, HIDDEN, EXPERTS = 50257, 768, 8
B, S = 2, 6


class Model(torch.nn.Module):
    """Whatever an example asks a model for; one leaf behind all logits."""

    def __init__(self, vocabulary=VOCABULARY):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.vocabulary = vocabulary
        self.weight = torch.nn.Parameter(torch.randn(B, S, 16, generator=g))
        self.register_buffer("head", torch.randn(16, vocabulary, generator=g))

    def forward(self, input_ids, attention_mask=None, **wanted):
        logits = self.weight @ self.head
        if not wanted:
            return logits
        hidden = self.weight.repeat(1, 1, HIDDEN // 16)
        gate = self.weight.reshape(B * S, 16)[:, :EXPERTS]
        return SimpleNamespace(
            logits=logits,
            hidden_states=(hidden * 0.5, hidden),
            primary_logits=logits,
            additional_logits=[logits.flip(0), logits.flip(1)],
            confidence_scores=torch.sigmoid(self.weight.mean((1, 2)))[:, None],
            mtp_active=True,
            gate_logits=gate,
            expert_indices=gate.topk(2).indices,
            expert_outputs=[gate * k for k in range(1, 4)],
        )


def example_names():
    """The names that the examples use without making them."""
    model = Model()
    g = torch.Generator().manual_seed(1)
    targets = torch.randint(VOCABULARY, (B, S), generator=g)
    return SimpleNamespace(
        model=model,
        input_ids=targets.roll(1, 1),
        targets=targets,
        attention_mask=torch.tensor([[1] * S, [1] * 4 + [0] * (S - 4)]),
        tokenizer=SimpleNamespace(eos_token_id=50256, pad_token_id=50256),
        model_config=SimpleNamespace(hidden_size=HIDDEN),
    )


def check_trains(loss, model):
    """It is one finite number, and its gradient is finite and not 0."""
    assert loss.shape == () and loss.isfinite() and loss > 0
    assert model.weight.grad.isfinite().all() and (model.weight.grad[0] != 0).any()
    assert (model.weight.grad[1, 4:] == 0).all(), "the mask is honoured"
