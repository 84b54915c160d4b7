# SPDX-License-Identifier: BSD-3-Clause
"""Losses built from torchtitan's configurations, beside its own and float64 by hand."""

import pytest
import torch
from places import place

pytestmark = pytest.mark.slow
place("torchtitan", "tyro")

from torchtitan.components.loss import (  # noqa: E402
    ChunkedLossWrapper,
    CrossEntropyLoss,
)
from torchtitan.config import CompileConfig  # noqa: E402

import masked_loss_ext as mle  # noqa: E402
from masked_loss_ext.integrations.torchtitan import (  # noqa: E402
    LinearCrossEntropyLoss,
    MaskedCrossEntropyLoss,
)

OFF = CompileConfig(enable=False)
STEPS, MICRO, B, S, D, V = 3, 2, 2, 8, 16, 53


class Decoder(torch.nn.Module):
    """As torchtitan's: the head is left out where the loss has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, D))
        self.lm_head = torch.nn.Linear(D, V, bias=False)
        self._skip_lm_head = False
        self.double()

    def forward(self, tokens):
        hidden = self.trunk(tokens)
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def batches():
    """Of each step its micro-batches: tokens and shifted labels, -100 at padding."""
    g = torch.Generator().manual_seed(5)
    found = []
    for _ in range(STEPS):
        step = []
        for longest in (S, S // 2):  # of unequal weight
            tokens = torch.randint(V, (B, S), generator=g)
            labels = torch.randint(V, (B, S), generator=g)
            labels[:, longest:] = -100
            labels[0, 1] = -100
            step.append((tokens, labels))
        found.append(step)
    return found


def train(config):
    """As torchtitan's trainer: the loss built from the configuration, the count of the step."""
    model = Decoder()
    loss_fn = config.build(compile_config=OFF)
    if isinstance(loss_fn, ChunkedLossWrapper):
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    losses = []
    for step in batches():
        count = torch.tensor(sum(int((labels != -100).sum()) for _, labels in step)).float()
        total = 0.0
        for tokens, labels in step:
            loss, metrics = loss_fn(model(tokens), labels, count, positions=None)
            loss.backward()
            total += loss.item()
            assert metrics == {}
        update(model)
        losses.append(total)
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


def update(model):
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.5 * p.grad
            p.grad = None


def train_by_hand(z_loss=0.0):
    """The mean over all tokens of a step that have a label."""
    model, losses = Decoder(), []
    for step in batches():
        rows = []
        for tokens, labels in step:
            on = labels != -100
            logits = model(tokens)[on]
            lse = logits.logsumexp(-1)
            rows.append(lse - logits.gather(1, labels[on][:, None])[:, 0] + z_loss * lse.square())
        loss = torch.cat(rows).mean()
        loss.backward()
        update(model)
        losses.append(loss.item())
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("kind", [MaskedCrossEntropyLoss, LinearCrossEntropyLoss])
def test_several_steps(kind, z_loss):
    losses, weights = train(kind.Config(z_loss=z_loss))
    expected = train_by_hand(z_loss)
    torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(weights, expected[1], rtol=1e-12, atol=1e-13)


def test_in_the_place_of_torchtitans_own():
    """Which are float32."""
    for own, ours in (
        (CrossEntropyLoss, MaskedCrossEntropyLoss),
        (ChunkedLossWrapper, LinearCrossEntropyLoss),
    ):
        assert issubclass(ours, (own, type(own).__mro__[0])) or issubclass(ours, own.__mro__[1])
        for x, y in zip(train(own.Config()), train(ours.Config()), strict=True):
            x, y = (torch.as_tensor(v, dtype=torch.float64) for v in (x, y))
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)


def test_without_a_count_and_without_gradients():
    """As its validator and its tests call them."""
    (tokens, labels), _ = batches()[0]
    model = Decoder()
    expected = mle.reference.masked_cross_entropy(model(tokens), labels, reduction="sum")
    plain = MaskedCrossEntropyLoss.Config().build(compile_config=OFF)
    torch.testing.assert_close(plain(model(tokens), labels)[0], expected)
    linear = LinearCrossEntropyLoss.Config(chunk_rows=3).build(compile_config=OFF)
    linear.set_lm_head(model.lm_head)
    with torch.no_grad():
        loss, _ = linear(model.trunk(tokens), labels)
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


def test_nan_where_the_label_is_off():
    """torchtitan's own has NaN gradients of the head then."""
    (tokens, labels), _ = batches()[0]
    finite = []
    for kind in (ChunkedLossWrapper, LinearCrossEntropyLoss):
        model = Decoder()
        loss_fn = kind.Config().build(compile_config=OFF)
        loss_fn.set_lm_head(model.lm_head)
        hidden = model.trunk(tokens).detach()
        hidden[labels == -100] = torch.nan
        loss_fn(hidden.requires_grad_(), labels, torch.tensor(9.0))[0].backward()
        finite.append(bool(model.lm_head.weight.grad.isfinite().all()))
    assert finite == [False, True]


def test_compiled():
    config = MaskedCrossEntropyLoss.Config()
    compiled = config.build(
        compile_config=CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    )
    (tokens, labels), _ = batches()[0]
    logits = Decoder()(tokens)
    torch.testing.assert_close(
        compiled(logits, labels)[0], config.build(compile_config=OFF)(logits, labels)[0]
    )


def test_refusals():
    loss_fn = LinearCrossEntropyLoss.Config().build(compile_config=OFF)
    with pytest.raises(ValueError, match="set_lm_head must be called first, got no head"):
        loss_fn(torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="compile.components must leave out the loss"):
        LinearCrossEntropyLoss.Config().build(
            compile_config=CompileConfig(enable=True, components=["loss"])
        )
    with pytest.raises(TypeError):
        MaskedCrossEntropyLoss.Config(z_los=1.0)
