# SPDX-License-Identifier: BSD-3-Clause
"""Calls with what is no tensor, or none of the right kind: one sentence that names the module and
its own argument."""

import math

import pytest
import torch
from unified_cases import BY_NAME, CASES, batch

from tests.unified.test_hostile import refuses

INF = math.inf


def bad_tensors(tensor):
    """What stands in the place of a tensor and is never right, by name."""
    shape = tensor.shape
    yield from {
        "a str": "x",
        "a list of numbers": [1, 2],
        "an int": 3,
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
        "sparse": torch.ones(shape).to_sparse(),
        "complex": torch.ones(shape, dtype=torch.complex64),
    }.items()
    yield "on another device", torch.ones(shape, dtype=tensor.dtype, device="meta")
    if tensor.is_floating_point():
        yield "integers", torch.ones(shape, dtype=torch.int64)
        yield "uint64", torch.ones(shape, dtype=torch.uint64)
        yield "float8", torch.ones(shape).to(torch.float8_e8m0fnu)
    elif tensor.dtype == torch.int64:
        yield "floating", torch.ones(shape)
        yield "bool", torch.ones(shape, dtype=torch.bool)
        yield "too large", torch.full(shape, 2**40)
        yield "float8", torch.ones(shape).to(torch.float8_e8m0fnu)
    else:
        yield "an additive mask", torch.full(shape, -INF)


def replaced(value, bad):
    return [value[0], bad, *value[2:]] if isinstance(value, list) else bad


# Nothing of these is a class or an index of something.
ANY_NUMBER = {("ContrastiveLoss", "labels", "too large")}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_calls(case):
    module = case.make()
    name, inputs = type(module).__name__, case.inputs(batch())
    for key, value in inputs.items():
        tensor = value[0] if isinstance(value, list) else value
        if not isinstance(tensor, torch.Tensor):
            continue
        for what, bad in bad_tensors(tensor):
            if (name, key, what) in ANY_NUMBER:
                continue
            given = inputs | {key: replaced(value, bad)}
            if name == "CompositeLoss":  # its parts speak, by the same names
                with pytest.raises((ValueError, TypeError, IndexError), match="Loss: |Balancer: "):
                    module(**given)
                continue
            if what == "on another device":  # either of two may be called the one that is not
                with pytest.raises(ValueError, match=f"^{name}: .* must be on the device of"):
                    module(**given)
                continue
            refuses(lambda given=given: module(**given), name, key)


FLAGS = [
    ("moe_balancer", "update_state"),
    ("moe_balancer", "is_optimizer_step"),
    ("moe_balancer", "compute_loss"),
    ("temperature_targets", "update_state"),
    ("adaptive_mtp", "update_state"),
    ("adaptive_mtp", "mtp_active"),
    ("deepseek", "update_state"),
    ("unified_defaults", "update_state"),
    ("unified_defaults", "return_detailed"),
    ("unified_heads", "mtp_active"),
    ("anti_repetition", "return_components"),
]


@pytest.mark.parametrize("name,flag", FLAGS)
@pytest.mark.parametrize("value", ["no", None, [], 2])
def test_flags_of_calls(name, flag, value):
    """Of "no" one would not think that it is on."""
    case = BY_NAME[name]
    module = case.make()
    given = case.inputs(batch()) | {flag: value}
    refuses(lambda: module(**given), type(module).__name__, flag)
