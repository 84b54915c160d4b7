# SPDX-License-Identifier: BSD-3-Clause
"""Every operator, public function and module with its gradients, for tests of what its bits depend
on: the tables of device_calls.py, public_calls.py and unified_cases.py as one.
"""

import copy
import ctypes
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import device_calls
import public_calls
import torch
import unified_cases

# ATen decides how their sums are cut; DESIGN.md says what that means.
PRODUCTS = (
    "linear", "MultiTokenPredictionLoss", "HiddenStateMTPLoss", "distributed", "packed_attention",
    "vocab", "mtp", "deepseek", "unified_everything", "unified_model", "unified_shifted",
    "contrastive", "diversity", "auxiliary", "masked_linear_cross_entropy",
)  # fmt: skip

CONSTANT = ("number",)  # entries that get no gradient: temperatures


def has_products(name):
    return any(word.lower() in name.lower() for word in PRODUCTS)


def leaves_of(value):
    """The same, its floating tensors able to take a gradient, and a list of these."""
    if isinstance(value, torch.Tensor):
        if not value.is_floating_point():
            return value, []
        leaf = value.detach().clone().requires_grad_(True)
        return leaf, [leaf]
    if isinstance(value, list | tuple):
        pairs = [leaves_of(x) for x in value]
        return [one for one, _ in pairs], [leaf for _, found in pairs for leaf in found]
    if isinstance(value, dict):
        pairs = {n: (x, []) if n in CONSTANT else leaves_of(x) for n, x in value.items()}
        return {n: one for n, (one, _) in pairs.items()}, [x for _, f in pairs.values() for x in f]
    return value, []


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for one in value for x in tensors_in(one)] if isinstance(value, list | tuple) else []


def with_gradients(function, given):
    """What function(given) returns, and the gradients of the sum of it."""
    given, leaves = leaves_of(given)
    results = tensors_in(function(given))
    moving = [x for x in results if x.requires_grad]
    grads = []
    if moving:
        total = sum(x.float().sum() for x in moving)
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [x.detach() for x in (*results, *grads) if x is not None]


@dataclass(frozen=True)
class BitCall:
    """``run(made)`` is a list of tensors, of what ``make()`` made; run leaves that as it was."""

    make: Callable[[], Any]
    run: Callable[[Any], list]

    def __call__(self):
        torch.manual_seed(0)
        return self.run(self.make())

    def is_random(self):
        """Whether run draws numbers, which threads would take from each other."""
        torch.manual_seed(0)
        made = self.make()
        before = torch.get_rng_state()
        self.run(made)
        return not torch.equal(before, torch.get_rng_state())


def of_device(call, size, wide=False):
    def make():
        made = call.make(size)
        return [x.double() if wide and x.is_floating_point() else x for x in made]

    return BitCall(make, lambda made: list(call.run(*made)))


def of_public(call):
    return BitCall(public_calls.entries, lambda made: with_gradients(call, made))


def of_unified(case):
    def run(made):
        module = copy.deepcopy(made[0])
        return with_gradients(lambda entries: module(**case.inputs(entries)), made[1])

    return BitCall(lambda: (case.make(), unified_cases.batch()), run)


def table(sizes=("small",)):
    found = {}
    for size in sizes:
        for call in device_calls.CALLS:
            name = f"operator {call.name} {size}"
            found[name] = of_device(call, size)
            # sums are made in double: what their order does is seen where they are not rounded
            if size != "small" and "bf16" not in name:
                found[f"{name} float64"] = of_device(call, size, wide=True)
    for name, calls in public_calls.CALLS.items():
        found |= {f"{name} {i}": of_public(call) for i, call in enumerate(calls)}
    return found | {f"unified {case.name}": of_unified(case) for case in unified_cases.CASES}


def digest(tensors):
    """Of the bits."""
    found = hashlib.sha256()
    for x in tensors:
        found.update(repr((x.dtype, tuple(x.shape))).encode())
        x = x.contiguous()
        found.update(ctypes.string_at(x.data_ptr(), x.nbytes) if x.numel() else b"")
    return found.hexdigest()
