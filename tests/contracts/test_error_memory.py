# SPDX-License-Identifier: BSD-3-Clause
"""An error that was caught keeps nothing alive: who retries with a smaller batch has the memory."""

import gc
import weakref

import pytest
import torch

import masked_loss_ext as mle
from masked_loss_ext.ops.cross_entropy_terms import cross_entropy_terms

BAD = torch.tensor([0, 9])  # of 5 classes
CALLS = {
    "cross entropy": lambda x: mle.masked_cross_entropy(x, BAD),
    "a list": lambda x: mle.masked_cross_entropy(x, [1, 2]),
    "in forward": lambda x: mle.masked_cross_entropy(x, BAD, gradient_in_forward=True),
    "in place": lambda x: mle.masked_cross_entropy(x.expand(2, 2, 5), BAD, inplace_backward=True),
    "an option": lambda x: mle.masked_cross_entropy(x, BAD, temperature=-1.0),
    "under vmap": lambda x: torch.vmap(lambda a: mle.masked_cross_entropy(a, BAD[:1]))(x),
    "statistics": lambda x: mle.row_statistics(x, BAD),
    "statistics, a list": lambda x: mle.row_statistics(x, [1, 2]),
    "terms": lambda x: cross_entropy_terms(x, BAD),
    "terms, an int": lambda x: cross_entropy_terms(x, 3),
    "module": lambda x: mle.MaskedCrossEntropyLoss()(x, BAD),
    "elements": lambda x: mle.MaskEditLoss()(x[None], x[None, :1]),
    "mse": lambda x: mle.MseLoss()(x, x[:1]),
    "autoencoder": lambda x: mle.masked_mse(x, x[:1], x),
}


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_are_freed_at_once(name, requires_grad):
    gc.collect()
    gc.disable()  # a cycle would wait for it
    try:
        x = torch.randn(2, 5, requires_grad=requires_grad)
        alive = weakref.ref(x)
        try:
            CALLS[name](x)
        except (IndexError, TypeError, ValueError):
            pass
        else:
            pytest.fail("no error")
        del x
        assert alive() is None
    finally:
        gc.enable()


def test_when_memory_runs_out(monkeypatch):
    """Whatever the operator raises."""

    def fails(*args):
        raise torch.OutOfMemoryError("out of memory")

    for module, call in (
        ("masked_cross_entropy", lambda x: mle.masked_cross_entropy(x, BAD)),
        ("masked_cross_entropy", lambda x: mle.row_statistics(x, BAD)),
        ("cross_entropy_terms.operator", lambda x: cross_entropy_terms(x, BAD)),
    ):
        monkeypatch.setattr(f"masked_loss_ext.ops.{module}.call", fails)
        gc.disable()
        try:
            x = torch.randn(2, 5)
            alive = weakref.ref(x)
            with pytest.raises(torch.OutOfMemoryError):
                call(x)
            del x
            assert alive() is None
        finally:
            gc.enable()
