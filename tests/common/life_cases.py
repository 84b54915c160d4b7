# SPDX-License-Identifier: BSD-3-Clause
"""Every loss as a thing that lives: a module that is made, moved, copied, saved and trained, and
inputs whose gradients it makes. Public functions are modules of one call.

To have another module tested, add it to PLAIN, or to the table of the unified family; another
function, to that of public calls.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from public_calls import CALLS, C, V, entries
from torch.utils._pytree import tree_leaves
from unified_cases import CASES, batch, floating

import masked_loss_ext as mle


@dataclass(frozen=True)
class Life:
    """make() -> module, inputs() -> what it is called with, the same every time but for a seed."""

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[..., dict[str, Any]]
    result: Callable[[torch.nn.Module, dict[str, Any]], Any]
    reads: tuple[str, ...]  # the inputs that are differentiated

    def leaves(self, inputs):
        return floating(inputs, self.reads)

    def with_gradients(self, seed=0):
        inputs = self.inputs(seed)
        for x in self.leaves(inputs):
            x.requires_grad_()
        return inputs

    def loss(self, module, inputs):
        """One number of all that has a gradient."""
        return total(self.result(module, inputs))

    def gradients(self, module, inputs, loss=None):
        """Of the inputs, then of the parameters; None where nothing flows."""
        loss = self.loss(module, inputs) if loss is None else loss
        wanted = [*self.leaves(inputs), *module.parameters()]
        return torch.autograd.grad(loss, wanted, allow_unused=True)


def total(result):
    """Each result with a factor of its own, so that none can stand for another."""
    parts = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    return sum((i + 1) * x.sum() for i, x in enumerate(parts))


class Call(torch.nn.Module):
    """A public function as a module, so that what is done to modules can be done to it."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, inputs):
        return self.function(inputs)


FLOATING = (
    *("pred", "target", "grey", "weighting", "logits", "image", "hidden", "head", "q"),
    *("registers", "patches"),
)


def of_public_calls(seed=0):
    """The inputs of public_calls.CALLS, others for another seed."""
    inputs = entries()
    g = torch.Generator().manual_seed(seed)

    def other(x):
        return torch.rand(x.shape, generator=g)

    for name in FLOATING if seed else ():
        value = inputs[name]
        inputs[name] = [other(x) for x in value] if isinstance(value, list) else other(value)
    return inputs


def of_unified(case):
    def inputs(seed=0):
        return batch(seed=seed)

    def result(module, inputs):
        return case(module, inputs)

    return Life(case.name, case.make, inputs, result, tuple(case.takes.values()))


# --- modules that stand outside of the unified family ---------------------------------------------


def plain(name, make, result):
    return Life(name, make, of_public_calls, result, FLOATING)


def class_weight():
    return torch.linspace(0.5, 2, V)


def of_registers(registers):
    """For each sample's registers, which MaskedNestedDropout overwrites."""
    return {"r": [x * 1 for x in registers], "eval_keep_k": [2, 3]}


def pipeline():
    return torch.nn.Sequential(
        mle.AttentionMaskedNestedDropout("r"),
        mle.NestedDropoutSequencePacker(
            ["p", "r"], "packed", "mask", "inner", "outer", pad_to_multiple=128
        ),
        mle.SequenceUnpacker("packed", ["p2", "r2"], "inner", "outer"),
    ).eval()  # which draws nothing


def through(modules, e):
    out = modules({"p": e["patches"], "r": e["registers"], "eval_keep_k": [2, 3]})
    return out["packed"], out["p2"], out["r2"]


PLAIN = [
    plain(
        "cross_entropy",
        lambda: mle.MaskedCrossEntropyLoss(
            weight=class_weight(), label_smoothing=0.1, shift=1, temperature=torch.tensor(1.5)
        ),
        lambda m, e: m(e["logits"], e["labels"], e["mask"], normalizer=e["count"]),
    ),
    plain(
        "cross_entropy_statistics",
        lambda: mle.MaskedCrossEntropyLoss(return_stats=True, reduction="none", z_loss=0.1),
        lambda m, e: m(e["logits"], e["labels"], e["mask"], token_weight=e["grey"]),
    ),
    plain(
        "linear_cross_entropy",
        lambda: mle.MaskedLinearCrossEntropyLoss(class_weight=class_weight(), shift=1),
        lambda m, e: m(e["hidden"], e["head"], e["labels"], e["mask"]),
    ),
    plain(
        "multi_token",
        lambda: mle.MultiTokenPredictionLoss(2, (1.0, 0.5)),
        lambda m, e: m([e["logits"], e["logits"] * 2], e["labels"], e["mask"]),
    ),
    plain(
        "multi_token_of_hidden",
        lambda: mle.MultiTokenPredictionLoss(2, (1.0, 0.5)),
        lambda m, e: m(e["hidden"], e["labels"], e["mask"], heads=[e["head"], e["head"] * 2]),
    ),
    plain(
        "attention_mask_mse",
        mle.AttentionMaskMseLoss,
        lambda m, e: m(e["pred"], e["target"], e["mask"], e["grey"].detach(), e["weighting"]),
    ),
    plain("mask_edit", mle.MaskEditLoss, lambda m, e: m(e["pred"], e["target"], e["weighting"])),
    plain("mse", mle.MseLoss, lambda m, e: m(e["pred"], e["target"], e["weighting"])),
    plain(
        "masked_nested_dropout",
        lambda: mle.MaskedNestedDropout("r", C).eval(),
        lambda m, e: m(of_registers(e["registers"]))["r"],
    ),
    plain("pipeline", pipeline, through),
]
MODULES = [*PLAIN, *map(of_unified, CASES)]

# --- public functions ----------------------------------------------------------------------------

# Of CALLS those through which no gradient flows, and those of modules.
WITHOUT_GRADIENT = {
    *("lengths_to_mask_0", "shift_labels_0", "shift_labels_1", "mask_labels_0", "mask_labels_1"),
    *("sample_keep_k_0", "sample_keep_k_1", "nested_dropout_block_mask_0", "RowIntervals_0"),
    *("distributed_2", "packed_attention_2"),
    *("generate_nested_dropout_mask_ids_0", "generate_nested_dropout_attention_mask_0"),
}


def is_module(name):
    public = getattr(mle, name)
    return isinstance(public, type) and issubclass(public, torch.nn.Module)


FUNCTIONS = [
    Life(
        f"{name}_{i}",
        partial(Call, call),
        of_public_calls,
        lambda module, inputs: module(inputs),
        FLOATING,
    )
    for name, calls in CALLS.items()
    for i, call in enumerate(calls)
    if not is_module(name) and f"{name}_{i}" not in WITHOUT_GRADIENT
]
GRAPHS = [*FUNCTIONS, *MODULES]
# Two steps of these are not one step twice.
WITH_STATE = [life for life in MODULES if list(life.make().buffers())]


def named(lives):
    """For pytest.mark.parametrize."""
    return {"argnames": "life", "argvalues": lives, "ids": [life.name for life in lives]}


# --- what tests do with it -----------------------------------------------------------------------


def started(life):
    """A module that has made two steps, so that its state is no longer that of a new one."""
    torch.manual_seed(0)
    module = life.make()
    for seed in (5, 6):
        life.result(module, life.inputs(seed))
    return module


def check_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def tensors(result):
    return [x.detach() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]


def steps(life, module, seeds=(3, 4)):
    """Results of as many steps, and the state after them."""
    found = [x for seed in seeds for x in tensors(life.result(module, life.inputs(seed)))]
    return [*found, *(buffer.clone() for buffer in module.buffers())]
