# SPDX-License-Identifier: BSD-3-Clause
"""Calls of every operator, small enough for any tool and in every launch regime, as functions of
tensors alone: what a GPU does with them is compared, captured and repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import masked_loss_ext as mle
from masked_loss_ext.ops import block_mask as layer
from masked_loss_ext.ops import repetition
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms


@dataclass(frozen=True)
class DeviceCall:
    """``run(*make(size))`` is a tuple of tensors; ``make`` gives CPU tensors, anew each time."""

    name: str
    operators: tuple  # native ones, without the namespace
    make: Callable[[str], list]
    run: Callable[..., tuple]


SIZES = ("small", "wide", "many")
FP32, BF16 = torch.float32, torch.bfloat16


def with_gradient(function):
    """The loss and its gradient in the first tensor."""

    def run(first, *others):
        leaf = first.detach().requires_grad_(True)
        loss = function(leaf, *others)
        return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]

    return run


# --- squared error -------------------------------------------------------------------------------

TOKENS = {"small": (2, 9, 5), "wide": (2, 3, 4099), "many": (3, 700, 64)}


def tokens(dtype):
    def make(size):
        shape = TOKENS[size]
        mask = torch.rand(shape[:2]) < 0.6
        mask[0, 0] = True
        data = [torch.randn(shape).to(dtype) for _ in range(2)]
        return [*data, mask, torch.rand(shape[:2]), torch.rand(*shape[:2], 1) + 0.5]

    return make


def elements(size):
    prediction, target, *_ = tokens(FP32)(size)
    return [prediction, target, torch.rand(prediction.shape) < 0.5]


# --- cross entropy -------------------------------------------------------------------------------

# lanes of a warp, a row in parts, several blocks of rows
ROWS = {"small": (2, 4, 37), "wide": (1, 3, 20011), "many": (3, 231, 300)}


def rows(dtype):
    def make(size):
        shape = ROWS[size]
        target = torch.randint(0, shape[-1], shape[:-1])
        target[..., -1] = -100
        mask = torch.rand(shape[:-1]) < 0.7
        mask[0, :2] = True
        return [(3 * torch.randn(shape)).to(dtype), target, mask]

    return make


def weighted_rows(size):
    logits, target, mask = rows(FP32)(size)
    weight, token_weight = torch.rand(logits.shape[-1]) + 0.1, torch.rand(target.shape)
    return [logits, target, mask, weight, token_weight, torch.tensor(1.3)]


def everything(logits, target, mask, weight, token_weight, temperature):
    return mle.masked_cross_entropy(
        logits, target, mask, weight=weight, token_weight=token_weight, temperature=temperature,
        label_smoothing=0.1, softcap=8.0, z_loss=0.01, focal_gamma=1.5, shift=1, reduction="sum",
    )  # fmt: skip


def in_place(logits, target, mask):
    # Of a copy: a captured call has to find its logits as they were.
    leaf = logits.detach().clone().requires_grad_(True)
    loss = mle.masked_cross_entropy(leaf * 1, target, mask, inplace_backward=True)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def swept(logits, target, mask):
    """Fresh and in place, the second multiplied afterwards."""
    results = []
    for inplace, scale in ((False, 1.0), (True, 0.5)):
        leaf = logits.detach().clone().requires_grad_(True)
        loss = mle.masked_cross_entropy(
            leaf * 1, target, mask, gradient_in_forward=True, inplace_backward=inplace
        )
        results += [loss.detach(), torch.autograd.grad(loss * scale, leaf)[0]]
    return tuple(results)


def statistics(logits, target, mask):
    temperature = torch.linspace(0.5, 2, target.numel(), device=target.device).reshape(target.shape)
    loss, found = mle.masked_cross_entropy(
        logits, target, mask, temperature=temperature, return_stats=True
    )
    return loss, *found


def statistics_alone(logits, target, mask):
    leaf = logits.detach().requires_grad_(True)
    found = mle.row_statistics(leaf, mask=mask)
    total = found.lse.sum() + found.entropy.sum()
    return found.lse.detach(), found.entropy.detach(), torch.autograd.grad(total, leaf)[0]


def repeating_rows(dtype):
    """Labels of four letters, with the links to what would repeat an n-gram of them."""

    def make(size):
        logits, target, mask = rows(dtype)(size)
        target = torch.where(target < 0, target, target % 4)
        links = repetition.repetition_links(target, mask & (target >= 0), 2)
        classes = torch.stack([target.roll(1, -1), torch.full_like(target, 3)], -1)
        return [logits, target, mask, torch.tensor(0.8), classes, *links]

    return make


def terms(logits, target, mask, temperature, classes, *links):
    leaf = logits.detach().requires_grad_(True)
    found = cross_entropy_terms(
        leaf, target, mask, temperature=temperature, classes=classes, links=links
    )
    total = sum((i + 1) * term.sum() for i, term in enumerate(found))
    return *(term.detach() for term in found), torch.autograd.grad(total, leaf)[0]


def terms_at_1(logits, target, mask, temperature, *_):
    leaf = logits.detach().requires_grad_(True)
    found = [
        *cross_entropy_terms(leaf, target, mask)[:4],
        *cross_entropy_terms(leaf, target, mask, temperature=temperature, unscaled=False)[:2],
    ]
    total = sum((i + 1) * term.sum() for i, term in enumerate(found))
    return *(term.detach() for term in found), torch.autograd.grad(total, leaf)[0]


# --- from hidden states, without logits ----------------------------------------------------------

# rows, D, V: odd ones, a row of logits in parts, several blocks of rows
HIDDEN = {"small": (2, 4, 7, 37), "wide": (1, 3, 16, 20011), "many": (3, 700, 8, 61)}


def most_kept(rows):
    return rows // 2 + 1


def hidden_rows(size):
    """hidden, weight, bias, target, mask; as many rows count as most_kept() says."""
    *shape, width, classes = HIDDEN[size]
    rows = shape[0] * shape[1]
    mask = (torch.randperm(rows) < most_kept(rows)).view(shape)
    target = torch.randint(0, classes, shape)
    weight, bias = torch.randn(classes, width) / width**0.5, torch.randn(classes)
    return [3 * torch.randn(*shape, width), weight, bias, target, mask]


def linear(reduction, **options):
    """The loss and the gradients of hidden, weight and bias. Nothing waits: num_valid is given."""

    def run(hidden, weight, bias, target, mask):
        leaves = [x.detach().requires_grad_(True) for x in (hidden, weight, bias)]
        loss = mle.masked_linear_cross_entropy(
            *leaves[:2], target, mask, bias=leaves[2], reduction=reduction,
            num_valid=most_kept(target.numel()), **options,
        )  # fmt: skip
        return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

    return run


# --- block masks ---------------------------------------------------------------------------------

SEGMENTS = {
    "small": (2, [20, 12], 80),
    "wide": (3, [1024, 256], 4096),
    "many": (40, [90, 32], 5000),
}


def packed(size):
    samples, parts, _ = SEGMENTS[size]
    offsets = torch.tensor([0, *parts * samples]).cumsum(0)
    kept = torch.tensor([parts] * samples)
    kept[:, 1] = torch.randint(1, parts[1] + 1, (samples,))
    length = torch.full((), SEGMENTS[size][2])
    return [offsets, kept, torch.empty(0).expand(int(length), 0)]  # its length is not read


def plan(offsets, kept, rows):
    return layer.nested_dropout_plan(offsets, kept, len(rows), "causal_last")


def packed_rows(offsets, kept, rows):
    return layer.packed_rows(offsets, kept, len(rows), "causal", window_left=30)


def lists(offsets, kept, rows):
    lo, hi = layer.packed_rows(offsets, kept, len(rows), "full")
    return layer.interval_block_lists(lo[None], hi[None], len(rows), 16, 8)


# --- repetition ----------------------------------------------------------------------------------

# wide: the table is not in shared memory; many: a block works on more than one row
ROWS_OF_TOKENS = {"small": (3, 40), "wide": (2, 3000), "many": (1100, 24)}


def token_rows(size):
    return [torch.randint(4, ROWS_OF_TOKENS[size]), torch.rand(ROWS_OF_TOKENS[size]) < 0.95]


def counts(tokens, valid):
    return tuple(repetition.repetition_counts(tokens, valid, 3))


def links(tokens, valid):
    return repetition.repetition_links(tokens, valid, 3)


SQUARED = ("masked_squared_error", "_masked_squared_error_backward")
CROSS = ("masked_cross_entropy", "_masked_cross_entropy_backward")
TERMS = ("cross_entropy_terms", "_cross_entropy_terms_backward")
LINEAR = ("linear_cross_entropy", "_linear_cross_entropy_backward")
IN_PLACE = ("masked_cross_entropy", "_masked_cross_entropy_backward_")
SWEPT = (
    "_masked_cross_entropy_sweep",
    "_masked_cross_entropy_sweep_",
    "_masked_cross_entropy_scale_gradient_",
)
TOKEN_LOSS = mle.AttentionMaskMseLoss(2.0, 1.0)

CALLS = [
    DeviceCall("token loss", SQUARED, tokens(FP32), with_gradient(TOKEN_LOSS)),
    DeviceCall("token loss bf16", SQUARED, tokens(BF16), with_gradient(TOKEN_LOSS)),
    DeviceCall("masked mse", SQUARED, elements, with_gradient(mle.masked_mse)),
    DeviceCall("cross entropy", CROSS, rows(FP32), with_gradient(mle.masked_cross_entropy)),
    DeviceCall("cross entropy bf16", CROSS, rows(BF16), with_gradient(mle.masked_cross_entropy)),
    DeviceCall("cross entropy, everything", CROSS, weighted_rows, with_gradient(everything)),
    DeviceCall("cross entropy in place", IN_PLACE, rows(FP32), in_place),
    DeviceCall("cross entropy, gradient in forward", SWEPT, rows(FP32), swept),
    DeviceCall("cross entropy, gradient in forward bf16", SWEPT, rows(BF16), swept),
    DeviceCall("cross entropy statistics", CROSS[:1], rows(FP32), statistics),
    DeviceCall("row statistics", CROSS, rows(BF16), statistics_alone),
    DeviceCall("cross entropy terms", TERMS, repeating_rows(FP32), terms),
    DeviceCall("cross entropy terms bf16", TERMS, repeating_rows(BF16), terms),
    DeviceCall("cross entropy terms at 1", TERMS, repeating_rows(FP32), terms_at_1),
    DeviceCall("linear", ("_linear_cross_entropy_sweep",), hidden_rows, linear("mean")),
    DeviceCall("linear, none", LINEAR, hidden_rows, linear("none", chunk_rows=100)),
    DeviceCall("nested dropout plan", ("nested_dropout_plan",), packed, plan),
    DeviceCall("packed rows", ("packed_rows",), packed, packed_rows),
    DeviceCall("block lists", ("packed_rows", "interval_block_lists"), packed, lists),
    DeviceCall("repetition counts", ("repetition_counts",), token_rows, counts),
    DeviceCall("repetition links", ("repetition_links",), token_rows, links),
]


def on_device(tensors, device):
    return [tensor.to(device) for tensor in tensors]
