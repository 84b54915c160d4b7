# SPDX-License-Identifier: BSD-3-Clause
"""Every public function and module on tensors that hold no data: fake ones and those of meta.

Whoever traces, exports, counts operations or makes a dry run calls with such tensors; what reads
one of them raises here, and on a GPU it would wait. Shapes and dtypes are those of a real call.
"""

import contextlib
import itertools

import pytest
import torch
from public_calls import CALLS, READS, entries
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_map_only
from unified_cases import CASES, batch

import masked_loss_ext as mle
from masked_loss_ext import unified

KINDS = ["fake", "meta"]
FAILS = {("packed_attention_2", "meta"): "FlexAttention has no kernel for meta tensors"}


def test_every_public_name_is_called_here():
    without_tensors = {"show_config"}
    assert set(CALLS) | set(READS) == set(mle.__all__) - without_tensors
    assert not set(CALLS) & set(READS)
    called = {type(case.make()) for case in CASES} | {unified.create_unified_loss}
    assert called == {getattr(unified, name) for name in unified.__all__}


def without_data(kind, tree):
    """The same tensors as a compiler's tracer has them, or on meta, as a dry run makes them."""
    if kind == "meta":
        return contextlib.nullcontext(), tree_map_only(torch.Tensor, lambda t: t.to("meta"), tree)
    mode = FakeTensorMode()
    return mode, tree_map_only(torch.Tensor, mode.from_tensor, tree)


def shapes(result):
    tensors = [x for x in tree_flatten(result)[0] if isinstance(x, torch.Tensor)]
    return [(tuple(x.shape), x.dtype) for x in tensors], {x.device.type for x in tensors}


def run(call, tree):
    """Results, and the gradients of those that have them by all floating inputs."""
    leaves = [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]
    leaves = [x.requires_grad_() for x in leaves if x.is_floating_point() and x.dim() > 0]
    results = call(tree)
    outputs = [x for x in tree_flatten(results)[0] if isinstance(x, torch.Tensor)]
    outputs = [x.sum() for x in outputs if x.requires_grad]
    if not outputs:
        return results, []
    return results, torch.autograd.grad(sum(outputs), leaves, allow_unused=True)


def expect_the_shapes_of(call, tree, kind):
    expected, _ = shapes(run(call, tree()))
    mode, data = without_data(kind, tree())
    with mode:
        found, devices = shapes(run(call, data))
    assert found == expected
    assert devices == {"cpu" if kind == "fake" else "meta"}


def parameters(names):
    found = []
    for name, kind in itertools.product(names, KINDS):
        reason = FAILS.get((name, kind))
        mark = pytest.mark.xfail(strict=True, reason=reason) if reason else ()
        found.append(pytest.param(name, kind, marks=mark))
    return found


FLAT = {f"{name}_{i}": call for name, calls in CALLS.items() for i, call in enumerate(calls)}


@pytest.mark.parametrize("name, kind", parameters(FLAT))
def test_public_functions_and_modules(name, kind):
    expect_the_shapes_of(FLAT[name], entries, kind)


@pytest.mark.parametrize("name, kind", parameters([case.name for case in CASES]))
def test_the_unified_family(name, kind):
    (case,) = [case for case in CASES if case.name == name]

    def called(entries):
        with torch.device(entries["logits"].device):
            module = case.make()
        return module(**case.inputs(entries))

    expect_the_shapes_of(called, batch, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_data_cannot_pass(kind):
    """Else the tests above would say nothing."""
    mode, data = without_data(kind, entries())
    with mode, pytest.raises(Exception, match="item|local_scalar|nonzero|unbacked|meta"):
        mle.unpad(data["pred"], data["mask"])
