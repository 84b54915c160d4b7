# SPDX-License-Identifier: BSD-3-Clause
"""The examples in the docstrings of masked_loss_ext.unified run, and say what a reader needs."""

import doctest
import inspect
import re

import pytest
import torch

from masked_loss_ext import unified

NAMES = unified.__all__


def samples():
    g = torch.Generator().manual_seed(0)
    names = {name: getattr(unified, name) for name in NAMES}
    return names | {
        "torch": torch,
        "F": torch.nn.functional,
        "HiddenStateMTPLoss": unified.MultiTokenPredictionLoss,
        "logits": torch.randn(2, 5, 7, generator=g),
        "labels": torch.randint(7, (2, 5), generator=g),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        "model_pred": torch.randn(2, 5, 4, generator=g),
        **{name: torch.randn(4, 3, generator=g) for name in "xyz"},
    }


@pytest.mark.parametrize("name", NAMES)
def test_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(unified, name), name, globs=samples())
    assert [x for test in tests for x in test.examples], f"{name} has no example"
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    for test in tests:
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", [n for n in NAMES if n[0].isupper()])
def test_every_argument_is_described(name):
    cls = getattr(unified, name)
    text = inspect.getdoc(cls) + inspect.getdoc(cls.forward)
    refers = re.search(r"as in\s+``(\w+)``", text)
    if refers:
        text += inspect.getdoc(getattr(unified, refers.group(1)))
    for function in (cls, cls.forward):
        parameters = set(inspect.signature(function).parameters) - {"self"}
        missing = [p for p in parameters if not re.search(rf"\b{p}\b", text)]
        assert not missing, f"arguments of {name} that are not described"
