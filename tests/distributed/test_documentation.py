# SPDX-License-Identifier: BSD-3-Clause
"""Docstrings of masked_loss_ext.distributed: examples run, and every argument is described."""

import doctest
import inspect
import re
import subprocess
import sys

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext import distributed

FUNCTIONS = [name for name in distributed.__all__ if inspect.isfunction(getattr(distributed, name))]
OF_MODULES = ["keep_state_local", "sync_state"]  # which have no shape
EXECUTED = ["global_token_count", *OF_MODULES]  # examples say what comes out, in a world of one


def samples():
    """The tensors that examples speak of."""
    g = torch.Generator().manual_seed(0)
    names = {name: getattr(mle, name) for name in mle.__all__}
    names |= {name: getattr(distributed, name) for name in distributed.__all__}
    return names | {
        "torch": torch,
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]),
        "logits": torch.randn(2, 5, 7, generator=g),
        "labels": torch.randint(7, (2, 5), generator=g),
    }


@pytest.mark.parametrize("name", EXECUTED)
def test_examples(name):
    function = getattr(distributed, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=samples())
    assert test.examples, f"{name} has no example"
    report = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def documentation(name):
    """The docstring, and those that it says its arguments are as in."""
    text = inspect.getdoc(getattr(distributed, name, None) or getattr(mle, name))
    for other in re.findall(r"as\s+in\s+``(\w+)``", text):
        text += documentation(other)
    return text


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_described(name):
    text = documentation(name)
    parameters = inspect.signature(getattr(distributed, name)).parameters
    assert not [p for p in parameters if not re.search(rf"\b{p}\b", text)]
    assert name in OF_MODULES or re.search(r"``\[[\w., *()/+]*\]``", text), "no shape"


def test_import_is_cheap():
    """Neither the package nor this room imports torch.distributed.tensor, which takes a second."""
    code = """if True:
        import sys, masked_loss_ext, masked_loss_ext.distributed
        print([name for name in sys.modules if name.startswith("torch.distributed.tensor")])
    """
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr
