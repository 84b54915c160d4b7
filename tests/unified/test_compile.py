# SPDX-License-Identifier: BSD-3-Clause
"""Every module of masked_loss_ext.unified is one graph: nothing asks the device for a number."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from unified_cases import CASES, batch, floating

# The tracer alone for most; where buffers are written, the backward
# graph and the rewriting of in-place operations as well. That takes four times as long.
WITH_BACKWARD_GRAPH = {"moe_balancer", "focal_classes"}
# The whole loss is traced in test_unified_loss_compile.py.
ELSEWHERE = {"unified_everything", "unified_model", "unified_shifted", "unified_standard"}
TRACED = [case for case in CASES if case.name not in ELSEWHERE]


@pytest.mark.parametrize("case", TRACED, ids=[case.name for case in TRACED])
def test_one_graph_over_changing_sizes(case):
    torch._dynamo.reset()
    counters.clear()
    module = case.make()
    eager = copy.deepcopy(module)
    backend = "aot_eager" if case.name in WITH_BACKWARD_GRAPH else "eager"
    call = torch.compile(case, fullgraph=True, dynamic=True, backend=backend)
    for rows, length in ((3, 7), (4, 9)):
        entries = batch(rows, length)
        inputs = floating(entries, case.takes.values())
        for x in inputs:
            x.requires_grad_()
        loss, expected = call(module, entries), case(eager, entries)
        torch.testing.assert_close(loss, expected)
        ours = torch.autograd.grad(loss, inputs, allow_unused=True)
        theirs = torch.autograd.grad(expected, inputs, allow_unused=True)
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
