# SPDX-License-Identifier: BSD-3-Clause
"""Every operator has a property, and every property reaches the operators that it names."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fuzz.choices import LENGTH
from tests.fuzz.engine import run_code
from tests.fuzz.properties import PROPERTIES

NAMESPACE = "masked_loss_ext::"
WITHOUT = {
    "_snapshot": "a copy, in graphs of torch.compile alone: tests/unified/test_loss_compile.py",
    "_half_products": "a string",
    "_version": "a string",
    "cpu_capability": "a string",
}
TOLD = [prop for prop in PROPERTIES if prop.operators]
CASES = 12


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return {name.removeprefix(NAMESPACE) for name in names if name.startswith(NAMESPACE)}


def test_every_operator_has_a_property():
    compared = {operator for prop in PROPERTIES for operator in prop.operators}
    print(*(f"{p.name}: {' '.join(p.operators)}" for p in TOLD), sep="\n")
    missing = registered() - compared - set(WITHOUT)
    assert not missing, f"without a property in tests/fuzz: {sorted(missing)}"
    assert compared | set(WITHOUT) == registered()


class Called(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == NAMESPACE[:-2]:
            self.names.add(function._schema.name.removeprefix(NAMESPACE))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("prop", TOLD, ids=lambda prop: prop.name)
def test_a_property_reaches_its_operators(prop):
    """What a case says that it compared was called, and all that the property names is compared."""
    draw, called, said = random.Random(0), Called(), set()
    codes = [bytes(LENGTH), *(draw.randbytes(LENGTH) for _ in range(CASES))]
    for code in codes:
        with called:
            said.update(run_code(prop, code).reached)
    assert set(prop.operators) == said <= called.names
