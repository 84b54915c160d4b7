# SPDX-License-Identifier: BSD-3-Clause
"""DDP, FSDP2, accelerate and sums of one's own train what one process trains, to rounding.

Without the one denominator they do not: each usual way with its number beside ours.
"""

import contextlib
import importlib.util

import pytest
import torch
import torch.distributed as dist
from rank_training import (
    ROUNDING,
    STEPS,
    WINDOWS,
    as_one_process,
    average_over_ranks,
    gradient,
    make_model,
    make_window,
    token_losses,
    update,
    weights,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import masked_loss_ext as mle
from masked_loss_ext.distributed import global_token_count

needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None,
    reason="accelerate is not installed: pip install .[hf]",
)


def count_of(window, **options):
    return global_token_count([mask for _, mask in window], shift=1, **options)


class DDP:
    """Gradients are averaged, once in a window."""

    average, every_time = True, False

    def __init__(self, model):
        self.model = DistributedDataParallel(model)

    def step(self, window):
        """Gradients of a window; what this rank has of its loss, if ranks are averaged."""
        pending = count_of(window, average=self.average, async_op=True)
        total = 0.0
        for i, (tokens, mask) in enumerate(window):
            with self.syncing(self.every_time or i + 1 == len(window)):
                logits = self.model(tokens)  # the count is under way
                count = self.divisor(pending.wait())
                loss = mle.masked_cross_entropy(logits, tokens, mask, shift=1, normalizer=count)
                self.backward(loss)
            total = total + loss.detach()
        return total

    def syncing(self, wanted):
        return contextlib.nullcontext() if wanted else self.model.no_sync()

    def divisor(self, count):
        return count

    def backward(self, loss):
        loss.backward()


class DDPEveryTime(DDP):
    every_time = True


class FSDP2(DDP):
    def __init__(self, model):
        for layer in model:
            if list(layer.parameters()):
                fully_shard(layer)
        self.model = fully_shard(model)

    def syncing(self, wanted):
        self.model.set_requires_gradient_sync(wanted)
        return contextlib.nullcontext()


class FSDP2Summing(FSDP2):
    """Told not to divide gradients, and so by the count of all."""

    average = False

    def __init__(self, model):
        super().__init__(model)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)

    def step(self, window):
        return super().step(window) * dist.get_world_size()


class Accelerate(DDP):
    """Its backward divides by the steps of the window."""

    steps = 2

    def __init__(self, model):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model = self.accelerator.prepare(model)
        assert isinstance(self.model, DistributedDataParallel)

    def syncing(self, wanted):
        return self.accelerator.accumulate(self.model)

    def divisor(self, count):
        return count / self.steps

    def backward(self, loss):
        self.accelerator.backward(loss)

    def step(self, window):
        return super().step(window) / self.steps


class AccelerateTwice(Accelerate):
    """The count alone, as if nothing else divided."""

    steps = 1


class Sums:
    """No wrapper: reduction "sum", gradients added up by hand and divided by the count."""

    def __init__(self, model):
        self.model = model

    def step(self, window):
        total = 0.0
        for tokens, mask in window:
            logits = self.model(tokens)
            loss = mle.masked_cross_entropy(logits, tokens, mask, shift=1, reduction="sum")
            loss.backward()
            total = total + loss.detach()
        count = count_of(window, average=False).clamp(min=1)
        for p in self.model.parameters():
            dist.all_reduce(p.grad)
            p.grad /= count
        return total / count * dist.get_world_size()


def train(way, name, steps=STEPS):
    """(loss of each step, weights) on this rank."""
    wrapped, losses = way(make_model()), []
    window = make_window(name, dist.get_rank())
    for _ in range(steps):
        losses.append(average_over_ranks(wrapped.step(window)).item())
        update(wrapped.model.parameters())
    return losses, weights(wrapped.model)


WAYS = [
    DDP,
    DDPEveryTime,
    FSDP2,
    FSDP2Summing,
    Sums,
    pytest.param(Accelerate, marks=needs_accelerate),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("way", WAYS)
def test_trains_as_one_process(ranks, way, size, name):
    losses, trained = as_one_process(name, size)
    assert (losses[0] == 0) == (name == "all_without")
    for found, of_rank in ranks(size).run(train, way, name):
        torch.testing.assert_close(found, losses, **ROUNDING)
        torch.testing.assert_close(of_rank, trained, **ROUNDING)


# --- the usual ways, and their numbers -----------------------------------------------------------


def averaged(model, loss):
    """(loss, gradient) after averaging over ranks."""
    return average_over_ranks(loss).item(), average_over_ranks(gradient(model, loss))


def usual_ways(name):
    """way of dividing -> (loss, gradient), and with the one denominator."""
    model, window = make_model(), make_window(name, dist.get_rank())
    count, n = count_of(window), len(window)

    def ours(divisor=count):
        parts = [
            mle.masked_cross_entropy(model(tokens), tokens, mask, shift=1, normalizer=divisor)
            for tokens, mask in window
        ]
        return sum(parts)

    means = [losses.mean() for losses in token_losses(model, window)]
    return {
        "ours": averaged(model, ours()),
        "mean of means": averaged(model, sum(means) / n),
        "own window": averaged(model, ours(count_of(window, average=False, group=alone()))),
        "not divided by the steps": averaged(model, sum(means)),
        "divided twice": averaged(model, ours() / n),
        "not averaged": averaged(model, ours(count_of(window, average=False))),
    }


def alone():
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def test_usual_ways_and_their_numbers(ranks):
    """Two ranks with 9 + 4 and 2 + 2 targets: 3.458 is right, the means say 3.613 and 3.620, and
    their gradients are off by a third of its length."""
    model = make_model()
    parts = [token_losses(model, make_window("unequal", rank)) for rank in range(2)]
    assert [[len(losses) for losses in window] for window in parts] == [[9, 4], [2, 2]]
    every = torch.cat([losses for window in parts for losses in window])
    right = every.mean()
    expected = {
        "ours": right,
        "mean of means": sum(losses.mean() for window in parts for losses in window) / 4,
        "own window": (torch.cat(parts[0]).mean() + torch.cat(parts[1]).mean()) / 2,
        "not divided by the steps": sum(losses.mean() for w in parts for losses in w) / 2,
        "divided twice": right / 2,
        "not averaged": right / 2,
    }
    right_gradient = gradient(model, every.mean())
    off = {}
    for found in ranks(2).run(usual_ways, "unequal"):
        for way, (loss, of_way) in found.items():
            torch.testing.assert_close(loss, expected[way].item(), **ROUNDING)
            off[way] = ((of_way - right_gradient).norm() / right_gradient.norm()).item()
    assert off["ours"] < 1e-14
    assert off["mean of means"] > 0.3 and off["own window"] > 0.3
    assert abs(off["divided twice"] - 0.5) < 1e-12 and abs(off["not averaged"] - 0.5) < 1e-12
    assert off["not divided by the steps"] > 0.9
    for way, loss in expected.items():
        assert way == "ours" or abs(loss / right - 1) > 0.01, way


@needs_accelerate
def test_the_accumulation_factor_applied_twice(ranks):
    """accelerate divides each loss by the steps: the count alone trains with half the gradient."""
    (right, once), (wrong, twice) = (
        ranks(2).run(train, way, "unequal", 1)[0] for way in (Accelerate, AccelerateTwice)
    )
    assert wrong == pytest.approx(right, rel=1e-12)  # what is logged does not tell
    start = weights(make_model())
    torch.testing.assert_close(twice - start, (once - start) / 2, rtol=1e-12, atol=1e-15)
