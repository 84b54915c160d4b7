# SPDX-License-Identifier: BSD-3-Clause
"""Calls at the far ends of their sizes, each as a function of one number n: what users have a
million of (rows, classes, documents, tokens), everything else being small.

``make(n)`` makes the inputs and returns the step that is measured, forward and backward where there
is one; what it returns tells a test whether it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import masked_loss_ext as mle
from masked_loss_ext.ops.repetition import repetition_counts, repetition_links

Step = Callable[[], Any]
S = 131_072  # positions of a long row
MILLION = 1_000_000
TILE = 500


@dataclass(frozen=True)
class Case:
    """``grows`` says what n counts; ``largest`` is the n that the issue of size asks for."""

    name: str
    grows: str
    make: Callable[[int], Step]
    largest: int = MILLION

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Four times as large each, up to the largest."""
        return self.largest // 16, self.largest // 4, self.largest


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def tiled(n: int, classes: int) -> torch.Tensor:
    """``[n, classes]``: the same TILE rows again and again, so that a mean is that of TILE rows."""
    return random(TILE, classes).repeat(n // TILE, 1)


def labels(classes: int, *shape: int) -> torch.Tensor:
    return torch.arange(int(torch.Size(shape).numel())).remainder(classes).reshape(shape)


def gradient_of(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Step:
    """The step that returns the loss and its gradients."""
    leaves = [x.requires_grad_() for x in inputs]

    def step():
        loss = call(*leaves)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step


# --- rows and classes ----------------------------------------------------------------------------


def rows_of_two_classes(n: int) -> Step:
    target = labels(2, n)
    return gradient_of(lambda x: mle.masked_cross_entropy(x, target), tiled(n, 2))


def one_class(n: int) -> Step:
    """Whose loss is 0, whatever the logits are."""
    target = labels(1, n)
    return gradient_of(
        lambda x: mle.masked_cross_entropy(x, target, label_smoothing=0.1), random(n, 1)
    )


def classes(n: int) -> Step:
    target = torch.tensor([0, n - 1, n // 2, -100])
    return gradient_of(lambda x: mle.masked_cross_entropy(x, target), random(4, n))


def classes_of_a_head(n: int) -> Step:
    target = torch.tensor([0, n - 1, n // 2, -100])
    return gradient_of(
        lambda h, w: mle.masked_linear_cross_entropy(h, w, target), random(4, 4), random(n, 4)
    )


def one_row_of_a_head(n: int) -> Step:
    """The last of n: no other takes part in a product."""
    target, mask = labels(16, n), torch.arange(n) == n - 1
    return gradient_of(
        lambda h, w: mle.masked_linear_cross_entropy(h, w, target, mask),
        random(n, 8),
        random(16, 8),
    )


def last_element(n: int) -> Step:
    """One true element at the far end of an element mask."""
    mask = torch.zeros(1, n // 64, 64, dtype=torch.bool)
    mask[0, -1, -1] = True
    target = torch.zeros_like(mask, dtype=torch.float32)
    return gradient_of(lambda x: mle.masked_mse(x, target, mask), target + 3)


def last_token(n: int) -> Step:
    mask, target = torch.arange(n).reshape(1, n) == n - 1, labels(2, 1, n)
    return gradient_of(lambda x: mle.masked_cross_entropy(x, target, mask), random(1, n, 2))


# --- documents of one token ----------------------------------------------------------------------


def segments_of_cross_entropy(n: int) -> Step:
    """The mean over documents of their means, each document a token."""
    target, ids = labels(2, 1, n), torch.arange(n).reshape(1, n)

    def loss(x):
        return mle.masked_cross_entropy(x, target, reduction="sequence_mean", segment_ids=ids)

    return gradient_of(loss, tiled(n, 2).unsqueeze(0))


def unified() -> torch.nn.Module:
    return mle.UnifiedLoss(5, penalty_on="model", eos_token_id=4)


def unified_rows(n: int) -> Step:
    """Rows of one token, and all that UnifiedLoss looks for in a row."""
    loss_fn, target = unified(), labels(4, n, 1)
    return gradient_of(lambda x: loss_fn(x, target), tiled(n, 5).unsqueeze(1))


def unified_segments(n: int) -> Step:
    loss_fn, target, ids = unified(), labels(4, 1, n), torch.arange(n).reshape(1, n)
    return gradient_of(lambda x: loss_fn(x, target, segment_ids=ids), tiled(n, 5).unsqueeze(0))


def unified_tokens(n: int) -> Step:
    """One document of n tokens that repeat."""
    loss_fn, target = unified(), labels(4, 1, n)
    return gradient_of(lambda x: loss_fn(x, target), tiled(n, 5).unsqueeze(0))


def repetition_of(tokens: torch.Tensor) -> Step:
    return lambda: (repetition_counts(tokens, None, 4), repetition_links(tokens, None, 4))


def lengths(n: int) -> Step:
    ones = torch.ones(n, dtype=torch.int64)
    return lambda: mle.lengths_to_mask(ones, 1)


def labels_of_documents(n: int) -> Step:
    given, ids = labels(2, 1, n), torch.arange(n).reshape(1, n)
    return lambda: mle.shift_labels(given, segment_ids=ids)


# --- masks of attention --------------------------------------------------------------------------


def layout_of_samples(n: int) -> Step:
    given = [[1]] * n

    def step():
        layout = mle.PackedLayout(given)
        return layout, layout.compact()

    return step


def intervals_of_ids(n: int) -> Step:
    ids = torch.arange(n)
    return lambda: mle.RowIntervals.from_document_ids(ids)


def intervals_of_cu_seqlens(n: int) -> Step:
    bounds = torch.arange(n + 1)
    return lambda: mle.RowIntervals.from_cu_seqlens(bounds, n)


def block_mask_of_rows(n: int) -> Step:
    """n documents of one token, in rows of S positions."""
    ids = torch.arange(n).reshape(-1, S)
    return lambda: mle.RowIntervals.from_document_ids(ids).block_mask()


def block_mask_of_empty_documents(n: int) -> Step:
    """n documents in one row of S positions: most of them are empty."""
    bounds = (torch.arange(n + 1) - (n - S)).clamp(min=0)
    return lambda: mle.RowIntervals.from_cu_seqlens(bounds, S).block_mask()


def block_mask_of_samples(n: int) -> Step:
    """n samples of one patch and no register, of S positions in all, the rest without a token."""
    given = [[1, 0]] * min(n, S) + [[0, 0]] * max(n - S, 0)
    keep = [0] * n
    return lambda: mle.nested_dropout_block_mask(given, keep)


def block_mask_of_the_last(n: int) -> Step:
    """The last query sees the last key, and no other anything."""
    mask = torch.arange(n).reshape(1, n) == n - 1
    return lambda: (mle.RowIntervals.from_padding(mask) & mle.RowIntervals.causal(n)).block_mask()


def attention_of_samples(n: int) -> Step:
    """n samples of four tokens, one after the other."""
    layout = mle.PackedLayout([[4]] * n)
    q = random(1, 1, 4, 8).repeat(1, 1, n, 1)
    q = torch.nn.functional.pad(q, (0, 0, 0, layout.padded_len - 4 * n))

    def loss(x):
        return mle.packed_attention(x, x, x, layout, "causal").square().sum() / n

    return gradient_of(loss, q)


def pipeline_of_samples(n: int) -> Step:
    """Packed and unpacked again."""
    keys = ("packed", "mask", "inner", "outer")
    modules = torch.nn.Sequential(
        mle.NestedDropoutSequencePacker(["tokens"], *keys, pad_to_multiple=128),
        mle.SequenceUnpacker("packed", ["again"], "inner", "outer"),
    )
    samples = [torch.full((1, 1, 2), float(i)) for i in range(n)]
    return lambda: modules({"tokens": samples})["again"]


CASES = [
    Case("rows_of_two_classes", "rows", rows_of_two_classes),
    Case("one_class", "rows", one_class),
    Case("classes", "classes", classes),
    Case("classes_of_a_head", "classes", classes_of_a_head),
    Case("one_row_of_a_head", "rows", one_row_of_a_head),
    Case("last_element", "elements", last_element, 1 << 26),
    Case("last_token", "tokens", last_token),
    Case("segments_of_cross_entropy", "documents", segments_of_cross_entropy),
    Case("unified_rows", "rows", unified_rows),
    Case("unified_segments", "documents", unified_segments),
    Case("unified_tokens", "tokens", unified_tokens),
    Case("repetition_of_rows", "rows", lambda n: repetition_of(labels(7, n, 1))),
    Case("repetition_of_equal", "tokens", lambda n: repetition_of(labels(1, 1, n))),
    Case("repetition_of_different", "tokens", lambda n: repetition_of(labels(n, 1, n))),
    Case("lengths", "rows", lengths),
    Case("labels_of_documents", "documents", labels_of_documents),
    Case("layout_of_samples", "samples", layout_of_samples),
    Case("intervals_of_ids", "documents", intervals_of_ids),
    Case("intervals_of_cu_seqlens", "documents", intervals_of_cu_seqlens),
    Case("block_mask_of_rows", "documents", block_mask_of_rows, 16 * S),
    Case("block_mask_of_empty_documents", "documents", block_mask_of_empty_documents, 32 * S),
    Case("block_mask_of_samples", "samples", block_mask_of_samples, 16 * S),
    Case("attention_of_samples", "samples", attention_of_samples, 8_000),
    Case("pipeline_of_samples", "samples", pipeline_of_samples, 32_000),
    Case("block_mask_of_the_last", "positions", block_mask_of_the_last, S),
]
BY_NAME = {case.name: case for case in CASES}
