# SPDX-License-Identifier: BSD-3-Clause
"""Named workloads: shapes that people train with, where each comes from, and how much of it is run.

On a GPU a shape is run as it is. On a CPU the first number of its kind that the table calls scaled
(rows, or tokens of a completion with its prompt) is halved until

- the products of one forward and backward are at most ``FLOP_A_THREAD`` for each thread, which
  keeps a call to seconds, and
- the logits of all rows, in float32, fit ``LOGITS_SHARE`` of the memory that is built in,

because times and memory grow with the number of rows, and what is not scaled (classes, hidden
numbers) is what tells one model's loss from another's. A workload whose head does not fit is left
out by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from . import machine
from . import workload_problems as problems
from .harness import Case, Problem, View
from .linear_problems import PRODUCTS

FLOP_A_THREAD = 125e9
LOGITS_SHARE = 1 / 32
HEADS_AT_A_TIME = 5.5  # float32 heads: weight, gradients of two contenders, truth, floor, blocks
LOGITS_AT_A_TIME = {"head": 4, "policy": 4, "logits": 12}  # the reference's are float64
MEMORY_SHARE = 0.75  # of what is built in
FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = {"float32": FP32, "bfloat16": BF16}


@dataclass(frozen=True)
class Kind:
    """What workloads of a kind have in common. ``axes`` name the numbers of a shape."""

    about: str
    axes: tuple[str, ...]
    make: Callable[..., Problem]  # of shape, then dtype and the share ignored where it has those
    quick: tuple[int, ...]
    scaled: tuple[str, ...] = ()  # halved together where a shape is too large
    has_dtype: bool = True
    has_ignored: bool = True
    floor: str = ""
    rounds: int = 11


KINDS: Mapping[str, Kind] = {
    "head": Kind(
        "mean cross entropy of hidden states and a head, forward and backward",
        ("rows", "hidden", "classes"),
        problems.head_problem,
        (64, 32, 500),
        scaled=("rows",),
        floor=PRODUCTS,
        rounds=3,
    ),
    "logits": Kind(
        "mean cross entropy of logits, forward and backward",
        ("rows", "classes"),
        problems.logits_problem,
        (64, 500),
        scaled=("rows",),
        floor="floor",
        rounds=7,
    ),
    "policy": Kind(
        "log p and entropy of drawn tokens from hidden states, forward and backward",
        ("batch", "prompt", "completion", "hidden", "classes"),
        problems.policy_problem,
        (4, 6, 10, 32, 500),
        scaled=("prompt", "completion"),
        has_ignored=False,
        floor=PRODUCTS,
        rounds=3,
    ),
    "tokens": Kind(
        "weighted squared error of padded latents, forward and backward",
        ("batch", "tokens", "channels"),
        problems.tokens_problem,
        (2, 100, 64),
        has_ignored=False,
    ),
    "patches": Kind(
        "squared error of hidden patches, forward and backward",
        ("batch", "patches", "numbers"),
        problems.patches_problem,
        (2, 16, 48),
    ),
    "block_mask": Kind(
        "block mask of samples with nested dropout, for FlexAttention",
        ("samples", "patches", "registers"),
        problems.mask_problem,
        (2, 64, 64),
        has_dtype=False,
        has_ignored=False,
        rounds=3,
    ),
}


@dataclass(frozen=True)
class Workload:
    name: str
    kind: str
    shape: tuple[int, ...]
    origin: str  # where the shape comes from
    ignored: float = 0.0
    dtype: str = ""  # empty: float32 on a CPU, bfloat16 on a GPU

    def axis(self, name: str) -> int:
        return self.shape[KINDS[self.kind].axes.index(name)]

    def with_axes(self, **values: int) -> Workload:
        axes = zip(KINDS[self.kind].axes, self.shape, strict=True)
        return replace(self, shape=tuple(values.get(name, value) for name, value in axes))

    def flop(self) -> float:
        """Of the three products of a head; 0 where there is none."""
        if "hidden" not in KINDS[self.kind].axes:
            return 0.0
        return 6.0 * self.logit_rows() * self.axis("hidden") * self.axis("classes")

    def logit_rows(self) -> int:
        if self.kind == "policy":
            return self.axis("batch") * self.axis("completion")
        return self.axis("rows") if "rows" in KINDS[self.kind].axes else 0

    def logit_bytes(self) -> int:
        return 4 * self.logit_rows() * self.axis("classes") if self.logit_rows() else 0

    def head_bytes(self) -> int:
        return 4 * self.axis("hidden") * self.axis("classes") if self.flop() else 0


LM_ROWS = "8192 tokens, as in cut-cross-entropy's table"
WORKLOADS = (
    Workload(
        "gemma2_2b",
        "head",
        (8192, 2304, 256000),
        f"Gemma 2 2B's vocabulary and hidden size; {LM_ROWS}, which has this head",
        0.4,
    ),
    Workload(
        "llama3_8b",
        "head",
        (8192, 4096, 128256),
        "Llama 3 8B's vocabulary and hidden size; 8192 tokens, its context",
        0.4,
    ),
    Workload(
        "qwen2.5_0.5b",
        "head",
        (8192, 896, 151936),
        f"Qwen2.5-0.5B's vocabulary and hidden size; {LM_ROWS}",
        0.4,
    ),
    Workload(
        "gpt2",
        "head",
        (8192, 768, 50257),
        "GPT-2's vocabulary and hidden size; 8 rows of its context of 1024",
        0.4,
    ),
    Workload(
        "llama3_logits",
        "logits",
        (8192, 128256),
        "Llama 3's vocabulary, logits already made; 8192 tokens, its context",
        0.4,
    ),
    Workload(
        "gpt2_logits",
        "logits",
        (8192, 50257),
        "GPT-2's vocabulary, logits already made; 8 rows of its context of 1024",
        0.4,
    ),
    Workload(
        "rl_qwen2.5_0.5b",
        "policy",
        (8, 256, 512, 896, 151936),
        "8 completions of up to 512 tokens, GRPOConfig's defaults, lengths 20 % to 100 %, behind "
        "prompts of 256 (our choice) that the mask excludes; Qwen2.5-0.5B's head",
    ),
    Workload(
        "flux",
        "tokens",
        (8, 4096, 64),
        "FLUX.1 latents: 1024 x 1024 pixels are 64 x 64 tokens of 2 x 2 x 16 numbers; 8 images of "
        "several resolutions padded to the largest, 60 % of the tokens valid, edit mask, weighting",
    ),
    Workload(
        "mae",
        "patches",
        (64, 196, 768),
        "ViT of masked autoencoders: 224 x 224 pixels are 196 patches of 16 x 16 x 3 numbers, 75 % "
        "of them hidden, which count; 64 images a GPU",
        0.25,
    ),
    Workload(
        "flextok",
        "block_mask",
        (32, 256, 256),
        "FlexTok's decoder: 256 x 256 pixels are 256 latent patches, behind up to 256 registers "
        "that nested dropout cuts to keep_k; 32 images packed in one row",
    ),
)
NAMES = tuple(one.name for one in WORKLOADS)


def by_name(name: str) -> Workload:
    return WORKLOADS[NAMES.index(name)]


def scaled(workload: Workload, device: str, threads: int, memory: int) -> Workload:
    """What is run of it, as this module's text says."""
    if torch.device(device).type == "cuda":
        return workload
    axes = KINDS[workload.kind].scaled

    def too_large() -> bool:
        much = workload.flop() > FLOP_A_THREAD * threads
        return much or workload.logit_bytes() > LOGITS_SHARE * memory

    while axes and too_large() and all(workload.axis(name) > 1 for name in axes):
        halves = {name: math.ceil(workload.axis(name) / 2) for name in axes}
        workload = workload.with_axes(**halves)
    return workload


def too_large_text(workload: Workload, memory: int) -> str:
    """Why it cannot be run at all; empty: it can."""
    logits = LOGITS_AT_A_TIME.get(workload.kind, 0) * workload.logit_bytes()
    needed = HEADS_AT_A_TIME * workload.head_bytes() + logits
    if needed <= MEMORY_SHARE * memory:
        return ""
    return f"needs about {needed / 2**30:.0f} GiB of memory, {memory / 2**30:.0f} are there"


def quick_form(workload: Workload) -> Workload:
    return replace(workload, shape=KINDS[workload.kind].quick)


def here(workload: Workload, device: str, threads: int) -> Workload:
    return scaled(workload, device, threads, machine.memory_bytes(device))


def dtype_of(workload: Workload, device: str) -> torch.dtype:
    if not KINDS[workload.kind].has_dtype:
        return torch.bool
    usual = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    return DTYPES[workload.dtype or usual]


def summary_of(workload: Workload) -> str:
    kind = KINDS[workload.kind]
    share = f", {100 * workload.ignored:g} % ignored" if kind.has_ignored else ""
    return kind.about.partition(",")[0] + share


def case_of(workload: Workload, device: str) -> Case:
    kind, dtype = KINDS[workload.kind], dtype_of(workload, device)
    arguments = [workload.shape]
    arguments += [dtype] * kind.has_dtype + [workload.ignored] * kind.has_ignored
    limits = {kind.floor: None} if kind.floor else {}
    view = View(workload.name, summary_of(workload), limits=limits)
    return Case(
        view.name,
        view.summary,
        workload.shape,
        dtype,
        partial(kind.make, *arguments, device),
        views=(view,),
        rounds=kind.rounds,
        made_of=json.dumps(asdict(workload)),
    )


def made_again(made_of: str, device: str) -> Case:
    """The same case in another process."""
    fields = json.loads(made_of)
    return case_of(Workload(**{**fields, "shape": tuple(fields["shape"])}), device)
