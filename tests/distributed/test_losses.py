# SPDX-License-Identifier: BSD-3-Clause
"""Every loss that takes a normalizer trains several ranks as one process with all of their tokens.

One process has the union of all micro-batches as one batch, and the loss's own mean.
"""

from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from rank_models import whole
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import global_token_count
from masked_loss_ext.integrations._causal_lm import causal_lm_loss

V, H, ROWS, LENGTH, MICRO_BATCHES, STEPS, RATE = 7, 4, 3, 6, 2, 2, 0.5


class Batch(NamedTuple):
    tokens: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor  # [ROWS, LENGTH, H]

    @property
    def labels(self):
        return self.tokens.masked_fill(~self.mask, -100)


def window(step, rank):
    """The micro-batches of a rank; rank 1 has no token at all in the first step."""
    rng = torch.Generator().manual_seed(100 * step + rank)
    batches = []
    for _ in range(MICRO_BATCHES):
        lengths = torch.randint(0, LENGTH + 1, (ROWS, 1), generator=rng)
        lengths *= (step, rank) != (0, 1)
        batches.append(
            Batch(
                torch.randint(V, (ROWS, LENGTH), generator=rng),
                torch.arange(LENGTH) < lengths,
                (1 + 3 * rank) * torch.randn(ROWS, LENGTH, H, generator=rng).double(),
            )
        )
    return batches


def union(batches):
    return Batch(*map(torch.cat, zip(*batches, strict=True)))


# --- the losses, each of a model and a batch, and what they count --------------------------------


def causal(model, batch, normalizer):
    logits = model.heads[0](model.hidden(batch))
    return causal_lm_loss({"logits": logits}, batch.labels, normalizer)


def mtp_of_logits(model, batch, normalizer):
    hidden = model.hidden(batch)
    logits = [head(hidden) for head in model.heads]
    return model.mtp(logits, batch.tokens, batch.mask, normalizer=normalizer)[0]


def mtp_of_hidden(model, batch, normalizer):
    given = model.hidden(batch), batch.tokens, batch.mask
    return model.mtp(*given, heads=model.heads, normalizer=normalizer)[0]


def hidden_state_mtp(model, batch, normalizer, inplace_backward=False):
    model.hidden_mtp.inplace_backward = inplace_backward
    given = model.hidden(batch), batch.tokens, batch.mask
    return model.hidden_mtp(*given, normalizer=normalizer)["mtp_loss"]


def unified(model, batch, normalizer):
    """Takes none: a total of means is weighed by its share of the tokens."""
    logits = model.heads[0](model.hidden(batch))
    loss = model.unified(logits, batch.tokens, batch.mask)
    return loss if normalizer is None else loss * (batch.mask.sum() / normalizer)


def autoencoder(model, batch, normalizer, function, **options):
    predicted = model.hidden(batch)
    return function(predicted, batch.target, batch.mask, normalizer=normalizer, **options)


def tokens_mse(model, batch, normalizer, function):
    """With every third element heavier, by mask and by weighting."""
    given = model.hidden(batch), batch.target
    edits, weighting = (batch.tokens % 3 == 0), 1.0 + batch.target.abs()
    masks = {"attention_mask": batch.mask, "edit_mask": edits, "weighting": weighting}
    return function(*given, **masks, normalizer=normalizer)


def tokens(batches, shift=0):
    return global_token_count([batch.mask for batch in batches], shift=shift)


def targets(batches):
    return tokens(batches, 1)


def heads(batches):
    return torch.stack([tokens(batches, 1), tokens(batches, 2)])


def elements(batches):
    return H * tokens(batches)


def samples(batches):
    return global_token_count([batch.mask[:, :1] for batch in batches])  # that keep a token


def rows(batches):
    return global_token_count([torch.ones(ROWS) for _ in batches])


mask_edit = mle.MaskEditLoss(2.0, 0.5)
CASES = {
    "causal_lm_loss": (causal, targets),
    "multi-token, logits": (mtp_of_logits, heads),
    "multi-token, heads": (mtp_of_hidden, heads),
    "hidden states": (hidden_state_mtp, heads),
    "hidden states, inplace": (partial(hidden_state_mtp, inplace_backward=True), heads),
    "unified": (unified, tokens),
    "masked_mse": (partial(autoencoder, function=mle.masked_mse), elements),
    "masked_sse": (partial(autoencoder, function=mle.masked_sse), rows),
    "MaskEditLoss": (partial(tokens_mse, function=mask_edit), elements),
    "MaskEditLoss, sequences": (
        partial(tokens_mse, function=partial(mask_edit, reduction="sequence_mean")),
        samples,
    ),
    "MseLoss": (partial(tokens_mse, function=mle.MseLoss()), elements),
    "AttentionMaskMseLoss": (partial(tokens_mse, function=mle.AttentionMaskMseLoss()), tokens),
    "multi resolution": (partial(tokens_mse, function=mle.compute_loss_multi_resolution), tokens),
}


class Model(torch.nn.Module):
    """Makes its loss in its forward, where FSDP2's weights are whole."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(V, H)
        self.mix = torch.nn.Linear(H, H)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(H, V) for _ in range(2)])
        self.mtp = mle.MultiTokenPredictionLoss(2, (2.0, 1.0))
        self.hidden_mtp = mle.HiddenStateMTPLoss(V, H, 2)
        options = {"use_ngram_penalty": False, "use_immediate_repetition_penalty": False}
        self.unified = mle.UnifiedLoss(
            V, primary_loss_type="standard", use_focal_loss=True, focal_mode="add", **options
        )

    def hidden(self, batch):
        return self.mix(self.embed(batch.tokens))

    def forward(self, name, batch, normalizer=None):
        loss = CASES[name][0](self, batch, normalizer)
        return loss + 0 * sum(p.sum() for p in self.parameters())  # DDP expects all of them


def make_model():
    torch.manual_seed(0)
    return Model().double()


def train(name, way):
    """On one rank: the loss of each step, and the weights."""
    model = make_model()
    step_model = DistributedDataParallel(model) if way == "ddp" else fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses = []
    for step in range(STEPS):
        batches = window(step, dist.get_rank())
        normalizer = CASES[name][1](batches)
        loss = torch.zeros(()).double()
        for batch in batches:  # each reduces its gradients, and they add up
            part = step_model(name, batch, normalizer)
            part.backward()
            loss += part.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses, whole(model)


def one_process(name, ranks):
    """(losses, the mean of rank means, weights)."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    losses, rank_means = [], []
    for step in range(STEPS):
        batches = [batch for rank in range(ranks) for batch in window(step, rank)]
        with torch.no_grad():
            rank_means.append(sum(model(name, b).item() for b in batches) / len(batches))
        loss = model(name, union(batches))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, rank_means, whole(model)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
@pytest.mark.parametrize("size", [2, 4])
def test_as_one_process(ranks, size, way, name):
    expected, rank_means, weights = one_process(name, size)
    for losses, trained in ranks(size).run(train, name, way):
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(trained, weights, rtol=1e-11, atol=1e-12)
    if name != "masked_sse":  # all ranks have as many rows
        off = [abs(usual / right - 1) for usual, right in zip(rank_means, expected, strict=True)]
        assert max(off) > 1e-3


class Mixed(torch.nn.Module):
    """Takes the count as an argument or as an attribute."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(H, V)

    def forward(self, hidden, labels, normalizer=None):
        normalizer = self.normalizer if normalizer is None else normalizer
        loss = mle.masked_cross_entropy(self.head(hidden), labels, normalizer=normalizer)
        return loss, normalizer


def mixed_precision():
    """(what became of the count, and of the loss) of each way to give it."""
    model = Mixed()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    given = torch.randn(3, H), torch.zeros(3, dtype=torch.int64)
    model.normalizer = torch.tensor(2317.5).double()
    kept = model(*given)[1].item()
    cast = model.normalizer.bfloat16().item()
    try:
        model(*given, model.normalizer)
    except TypeError as error:
        return kept, cast, str(error)
    return kept, cast, None


def test_a_count_that_mixed_precision_has_rounded_is_refused(ranks):
    """Every loss and gradient would be a thousandth too small: 2317.5 is 2320 in bfloat16."""
    text = (
        "masked_cross_entropy: normalizer must not be of half precision, which rounds counts above "
        "256 or 2048, got torch.bfloat16 (cast with the inputs of a model? Keep it out of them, "
        "in an attribute, say)"
    )
    assert ranks(2).run(mixed_precision) == [(2317.5, 2320.0, text)] * 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_loss_takes_a_rounded_count(dtype):
    model, batch = make_model(), window(1, 0)[0]
    for name, (loss_fn, _) in CASES.items():
        if name == "unified":  # multiplies by it
            continue
        for count in (torch.ones((), dtype=dtype), torch.ones(2, dtype=dtype)):
            if count.dim() == 0 or "multi-token" in name or "hidden states" in name:
                with pytest.raises(TypeError, match="must not be of half precision"):
                    loss_fn(model, batch, count)
