# SPDX-License-Identifier: BSD-3-Clause
"""What the examples of several processes share: a model, real texts, and one process beside them.

Every rank draws the same texts and takes its own; rank 0 also trains a copy of the model on all of
them as one batch, with the plain mean over its tokens. What several processes do is compared with
that, step by step.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

# Before PyTorch loads its OpenMP runtime: see demo.py.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from acts.common.language_model import LanguageModel  # noqa: E402
from acts.language.data import Batch, collate, functions, source_files  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import masked_loss_ext as mle  # noqa: E402

LEARNING_RATE = 3e-3
ALLOWED = 1e-4  # relative: float32 sums in another order, carried through the steps


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step")
    parser.add_argument("--rows", type=int, default=2, help="texts of a rank's micro-batch")
    parser.add_argument("--longest", type=int, default=384, help="bytes of a text that are kept")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is")
    parser.add_argument("--seed", type=int, default=0)
    wanted = parser.parse_args()
    for name in ("steps", "accumulate", "rows", "longest"):
        least = 2 if name == "longest" else 1
        if getattr(wanted, name) < least:
            parser.error(
                f"argument --{name}: must be at least {least}, got {getattr(wanted, name)}"
            )
    if "RANK" not in os.environ:
        parser.error(f"start it with: torchrun --nproc-per-node 2 {sys.argv[0]}")
    return wanted


def start(device: str | None) -> World:
    """Joins the others: by NCCL on GPUs, a rank each, else by gloo."""
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    here = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=here if on_gpu else None)
    return World(dist.get_rank(), dist.get_world_size(), here)


def make_model(wanted: argparse.Namespace, world: World) -> LanguageModel:
    """The same on every rank."""
    torch.manual_seed(wanted.seed)
    return LanguageModel(wanted.longest).to(world.device)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), LEARNING_RATE)


@dataclass
class Window:
    """The texts of one optimizer step, of all ranks."""

    texts: Sequence[Sequence[Sequence[bytes]]]  # of each rank, of each of its micro-batches
    longest: int
    device: torch.device

    def of_rank(self, rank: int) -> list[Batch]:
        """Micro-batches, each padded to the longest of its own texts."""
        return [collate(texts, self.longest).to(self.device) for texts in self.texts[rank]]

    def whole(self) -> Batch:
        """All of them as one batch."""
        every = [text for of_rank in self.texts for texts in of_rank for text in texts]
        return collate(every, self.longest).to(self.device)


def windows(wanted: argparse.Namespace, world: World, ranks: int | None = None) -> Iterator[Window]:
    """The steps' texts: functions of Python's standard library, of very different length.

    ranks: how many have texts of their own; None: all.
    """
    texts = functions(source_files()[:24])
    rng = torch.Generator().manual_seed(wanted.seed)
    sizes = (ranks or world.size, wanted.accumulate, wanted.rows)
    for _ in range(wanted.steps):
        chosen = torch.randint(len(texts), sizes, generator=rng).tolist()
        drawn = [[[texts[i] for i in row] for row in of_rank] for of_rank in chosen]
        yield Window(drawn, wanted.longest, world.device)


class OneProcess:
    """What the processes are compared with: the same model, which sees all texts at once."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = make_optimizer(self.model)

    def step(self, batch: Batch) -> float:
        logits = self.model(batch.tokens)
        loss = mle.masked_cross_entropy(logits, batch.tokens, batch.attention_mask, shift=1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def mean_over_ranks(value: Tensor, world: World) -> float:
    """For what is printed."""
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / world.size


@dataclass
class Report:
    """Prints each step beside that of one process, and in the end whether they are the same.

    The way of rank 0; the others say nothing and find nothing wrong.
    """

    world: World
    one: OneProcess | None
    losses: list[tuple[float, float]] = field(default_factory=list)  # of a step, of one process's
    off: list[float] = field(default_factory=list)  # the mean of rank means, from one process's

    @classmethod
    def of(cls, model: LanguageModel, world: World, title: str, rank_means: bool = True) -> Report:
        """Before the model is wrapped, sharded or trained. rank_means: steps will tell them."""
        if world.rank != 0:
            return cls(world, None)
        print(f"{title}: {world.size} processes on {world.device.type}")
        heads = "step", "tokens", "loss", "one process", "difference"
        line = "{:>4} {:>7} {:>10} {:>12} {:>11}".format(*heads)
        print(line + "  mean of rank means" * rank_means, flush=True)
        return cls(world, OneProcess(model))

    def step(self, window: Window, loss: float, rank_means: float | None = None) -> None:
        """rank_means: what the average of the means of ranks and micro-batches would have been."""
        if self.one is None:
            return
        batch = window.whole()
        alone = self.one.step(batch)
        self.losses.append((loss, alone))
        tokens = int(batch.attention_mask[:, 1:].sum())
        line = f"{len(self.losses):4} {tokens:7} {loss:10.6f} {alone:12.6f} {loss - alone:11.1e}"
        if rank_means is not None:
            self.off.append(rank_means - alone)
            line += f" {rank_means:10.6f} ({self.off[-1]:+.0e})"
        print(line, flush=True)

    def finish(self, weights: Mapping[str, Tensor]) -> int:
        """The exit code. weights: whole, by the names of the model's parameters."""
        if self.one is None:
            return 0
        loss = max(abs(ours - alone) / abs(alone) for ours, alone in self.losses)
        # Their norm, not the largest: the loss does not depend on the keys' biases, whose gradients
        # are rounding, and Adam makes steps of any gradient.
        of_one = dict(self.one.model.named_parameters())
        if weights.keys() != of_one.keys():
            raise SystemExit(f"weights of other names: {sorted(weights.keys() ^ of_one.keys())}")
        apart = [weights[name].detach() - one.detach() for name, one in of_one.items()]
        norm = torch.nn.utils.get_total_norm(apart) / torch.nn.utils.get_total_norm(of_one.values())
        same = loss <= ALLOWED and norm <= ALLOWED
        print(
            f"largest difference of a loss {loss:.1e}, of the weights in the end {norm:.1e}", end=""
        )
        print(f" (relative): {'as one process' if same else f'NOT as one process ({ALLOWED:g})'}")
        if self.off:
            print(f"the mean of rank means is off by up to {max(map(abs, self.off)):.1e}")
        return 0 if same else 1
