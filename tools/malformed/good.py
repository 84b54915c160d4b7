# SPDX-License-Identifier: BSD-3-Clause
"""A good call of an operator, drawn: its shapes, dtypes and which of its options are given."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch

from tests.common.operator_calls import BACKWARD, PUBLIC, RETURNING_STRINGS, arguments_of, ops

Given = dict[str, Any]
FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int64, torch.int32, torch.uint8, torch.int8)
MASKS = (torch.bool, torch.uint8, torch.int64, torch.float32, torch.bfloat16)
# One class, a few, a vector and some, several blocks.
CLASSES = (1, 5, 37, 2100)
SHAPES = ((), (3,), (1, 1), (2, 5), (2, 1, 3), (0, 4))
MEANS = ("mean", "sum")
SHARE_OF_OPTIONS = 0.25


class Draw(random.Random):
    """Choices and tensors, all of one seed."""

    def __init__(self, seed: str):
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(self.getrandbits(60))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (3 * torch.randn(shape, generator=self.torch)).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(shape, generator=self.torch).add(0.1).to(dtype)

    def integers(self, most: int, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randint(most, shape, generator=self.torch)
        return values.to(dtype or self.choice(INTEGERS))

    def mask(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self.torch) < 0.7).to(self.choice(MASKS))

    def some(self, options: Given) -> Given:
        """Each of them now and then; made only then, where it is a function."""
        given = {name: x for name, x in options.items() if self.random() < SHARE_OF_OPTIONS}
        return {name: x() if callable(x) else x for name, x in given.items()}


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_options(draw: Draw, shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> Given:
    """What operators of rows of logits take beside these and the labels."""
    options: Given = {
        "mask": lambda: draw.mask(*shape),
        "weight": lambda: draw.uniform(classes, dtype=loss_dtype(dtype)),
        "token_weight": lambda: draw.uniform(*shape, dtype=draw.choice(FLOATS)),
        "temperature": lambda: draw.uniform(*draw.choice([(), shape])),
        "label_smoothing": 0.1,
        "softcap": 9.0,
        "z_loss": 1e-3,
        "focal_gamma": 1.5,
        "schedule": lambda: torch.tensor([0.1, 9.0, 0.0, 1.5], dtype=torch.float64),
        "reduction": lambda: draw.choice(MEANS),
    }
    if shape:
        options["shift"] = lambda: draw.choice([1, 2])
        options["segment_ids"] = lambda: draw.integers(2, *shape)
    given = draw.some(options)
    if given.get("reduction") == "mean":
        given |= draw.some({"normalizer": torch.tensor(3.0)})
    return given


def rows(draw: Draw) -> tuple[tuple[int, ...], int, torch.dtype, torch.Tensor]:
    """Shape, classes and dtype of logits, and labels for them."""
    shape, classes, dtype = draw.choice(SHAPES), draw.choice(CLASSES), draw.choice(FLOATS)
    labels = draw.integers(min(classes, 100), *shape)
    if labels.dtype.is_signed:
        labels = torch.where(draw.mask(*shape) != 0, labels, -100)
    return shape, classes, dtype, labels


def logits_and_more(draw: Draw) -> Given:
    shape, classes, dtype, labels = rows(draw)
    logits = draw.normal(*shape, classes, dtype=dtype)
    return {"logits": logits, "target": labels, **row_options(draw, shape, classes, dtype)}


def hidden_and_more(draw: Draw) -> Given:
    shape, classes, dtype, labels = rows(draw)
    width = draw.choice([1, 7, 16])
    given = {
        "hidden": draw.normal(*shape, width, dtype=dtype),
        "linear_weight": draw.normal(classes, width, dtype=dtype),
        "bias": draw.choice([None, draw.normal(classes, dtype=dtype)]),
        "target": labels,
    }
    options: Given = {"chunk_rows": 1, "num_valid": labels.numel(), "fp32_logits": True}
    return given | row_options(draw, shape, classes, dtype) | draw.some(options)


def squared_error(draw: Draw) -> Given:
    shape, dtype = (
        draw.choice([(3,), (2, 3), (2, 3, 37), (1, 4, 300), (2, 0, 3)]),
        draw.choice(FLOATS),
    )
    leading = shape[: draw.randint(1, len(shape))]
    given = {
        "prediction": draw.normal(*shape, dtype=dtype),
        "target": draw.normal(*shape, dtype=dtype),
        "reduction": draw.choice(["mean", "sum", "batch_mean", "token_sum", "token", "none"]),
        "loss": draw.choice(["mse", "l1", "smooth_l1", "huber", "pseudo_huber"]),
    }
    options: Given = {
        "mask": lambda: draw.mask(*leading),
        "edit_mask": lambda: draw.mask(*leading),
        "weighting": lambda: draw.uniform(*draw.choice([shape, shape[-1:], (1,)])),
        "delta": torch.tensor(0.7),
    }
    return given | draw.some(options)


def terms(draw: Draw) -> Given:
    shape = draw.choice([(1, 2), (2, 9), (3, 1)])
    classes, dtype = draw.choice(CLASSES[1:]), draw.choice(FLOATS)
    labels = draw.integers(4, *shape)
    options: Given = {
        "mask": lambda: draw.mask(*shape),
        "temperature": torch.tensor(0.8),
        "classes": lambda: draw.integers(5, *shape, draw.choice([1, 3]), dtype=torch.int64),
        "unscaled": False,
    }
    given = {"logits": draw.normal(*shape, classes, dtype=dtype), "target": labels}
    if draw.random() < 0.5:
        links = ops.repetition_links(labels.long(), None, 2)
        given |= dict(zip(("context_before", "ngram_after"), links, strict=True))
    return given | draw.some(options)


def block_lists(draw: Draw) -> Given:
    batch, slots, q_len, kv_len = draw.choice([(1, 1, 4, 4), (2, 3, 130, 300), (1, 2, 17, 5)])
    ends = [draw.integers(kv_len + 1, batch, slots, q_len, dtype=torch.int32) for _ in range(2)]
    options: Given = {"q_block": 16, "kv_block": 8, "transposes": False}
    return {"lo": ends[0], "hi": ends[1], "kv_len": kv_len, **draw.some(options)}


def packed(draw: Draw) -> Given:
    samples, segments = draw.choice([(1, 1), (2, 1), (3, 2)])
    lengths = draw.integers(9, samples * segments, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    options: Given = {
        "mode": lambda: draw.choice(["full", "causal", "causal_last"]),
        "window_left": 2,
        "window_right": 3,
        "sinks": 1,
        "dropped": lambda: draw.choice(["none", "self", "attend"]),
    }
    given = {"segment_offsets": offsets, "rows": int(offsets[-1]) + draw.choice([0, 5])}
    given["kept"] = draw.integers(9, samples, segments, dtype=torch.int64)
    if draw.random() < 0.2:
        prefix = draw.integers(9, samples, dtype=torch.int64)
        return given | {"mode": "prefix", "prefix": prefix}
    return given | draw.some(options)


def plan(draw: Draw) -> Given:
    return packed(draw) | draw.some({"q_block": 16, "kv_block": 8})


def tokens(draw: Draw) -> Given:
    shape = draw.choice([(1, 2), (3, 40), (2, 0), (0, 3)])
    options: Given = {"valid": lambda: draw.mask(*shape), "ngram_size": lambda: draw.randint(1, 5)}
    return {"tokens": draw.integers(4, *shape), **draw.some(options)}


def scaled(draw: Draw) -> Given:
    dtype = draw.choice(FLOATS)
    factor = torch.tensor(draw.choice([1.0, 0.5]), dtype=loss_dtype(dtype))
    return {"grad_logits": draw.normal(2, 5, 37, dtype=dtype), "grad_loss": factor}


def shard_of_logits(draw: Draw) -> Given:
    given = logits_and_more(draw)
    return given | {"vocab_size": given["logits"].size(-1)}


def shard_of_layer(draw: Draw) -> Given:
    given = hidden_and_more(draw)
    return given | {"vocab_size": given["linear_weight"].size(0)}


def gathered(shard: str, make: Callable[[Draw], Given]) -> Callable[[Draw], Given]:
    """With what the shards tell each other."""

    def made(draw: Draw) -> Given:
        given = make(draw)
        sums = getattr(ops, f"_{shard}_sums")
        return given | {"messages": sums(**given).unsqueeze(0)}

    return made


FORWARD = {
    "masked_squared_error": squared_error,
    "masked_cross_entropy": logits_and_more,
    "_masked_cross_entropy_sweep": logits_and_more,
    "_masked_cross_entropy_sweep_": logits_and_more,
    "_masked_cross_entropy_scale_gradient_": scaled,
    "linear_cross_entropy": hidden_and_more,
    "_linear_cross_entropy_sweep": hidden_and_more,
    "_vocab_parallel_cross_entropy_sums": shard_of_logits,
    "vocab_parallel_cross_entropy": gathered("vocab_parallel_cross_entropy", shard_of_logits),
    "_vocab_parallel_linear_cross_entropy_sums": shard_of_layer,
    "vocab_parallel_linear_cross_entropy": gathered(
        "vocab_parallel_linear_cross_entropy", shard_of_layer
    ),
    "cross_entropy_terms": terms,
    "interval_block_lists": block_lists,
    "packed_rows": packed,
    "nested_dropout_plan": plan,
    "repetition_counts": tokens,
    "repetition_links": tokens,
    "_snapshot": lambda draw: {"tensor": draw.normal(2, 3, dtype=draw.choice(FLOATS))},
    "_half_products": lambda draw: {},
    "_version": lambda draw: {},
    "cpu_capability": lambda draw: {},
}


def good_call(name: str, draw: Draw) -> Given:
    """Options that do not go together are drawn again, at last a call of the table."""
    forward = BACKWARD.get(name, name)
    for _ in range(5):
        try:
            return dict(arguments_of(name, {forward: FORWARD[forward](draw)}))
        except (ValueError, RuntimeError):
            continue
    return dict(arguments_of(name, PUBLIC | dict.fromkeys(RETURNING_STRINGS, {})))
