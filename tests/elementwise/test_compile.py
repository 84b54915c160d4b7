# SPDX-License-Identifier: BSD-3-Clause
"""torch.library's own checks, one graph over changing sizes, export, ahead-of-time compilation."""

import pytest
import torch
from cases import BY_NAME, make
from torch._dynamo.utils import counters

import masked_loss_ext as mle

op = torch.ops.masked_loss_ext.masked_squared_error.default
backward_op = torch.ops.masked_loss_ext._masked_squared_error_backward.default
CHECKED = ["three_channels", "weight_all", "weight_sample", "transposed", "no_mask", "rank_1"]
REDUCTIONS = ("mean", "token", "none")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CHECKED)
def test_opcheck_forward(name):
    inputs = make(BY_NAME[name], torch.bfloat16 if name == "no_mask" else torch.float32)
    for key in ("prediction", "target", "weighting"):
        if inputs[key] is not None:
            inputs[key].requires_grad_()
    for reduction in REDUCTIONS:
        torch.library.opcheck(op, (*inputs.values(), 2.0, 1.0, reduction))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)])
def test_opcheck_backward(name, needs):
    inputs = make(BY_NAME[name], torch.float32)
    values = list(inputs.values())
    for reduction in REDUCTIONS:
        loss, count = op(*values, 2.0, 1.0, reduction)
        # No input may require a gradient here: opcheck would differentiate the outputs again, those
        # that are empty because they were not asked for among them.
        options = (2.0, 1.0, reduction, "mse", None)
        arguments = (torch.ones_like(loss), *values, *options, count, *needs)
        torch.library.opcheck(backward_op, arguments)


def batch(rows, tokens, channels=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * tokens)
    prediction = torch.randn(rows, tokens, channels, generator=g).to(dtype).requires_grad_()
    target = torch.randn(rows, tokens, channels, generator=g).to(dtype)
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    return prediction, target, mask, torch.rand(rows, tokens, generator=g)


SIZES = [(3, 5), (4, 9), (7, 11)]
token_loss = mle.AttentionMaskMseLoss()
LOSSES = {
    "token_mean": token_loss,
    "token_none": mle.AttentionMaskMseLoss(reduction="none"),
    "function": mle.masked_edit_token_mean_loss,
    "multi_resolution": mle.compute_loss_multi_resolution,
    "mask_edit": lambda p, t, a, e: mle.MaskEditLoss()(p, t, None, e, attention_mask=a),
    "mse": lambda p, t, a, e: mle.MseLoss()(p, t, e.unsqueeze(-1)),
    "sse": lambda p, t, a, e: mle.masked_sse(p, t, a),
    "masked_mse": lambda p, t, a, e: mle.masked_mse(p, t, a),
    "number": lambda p, t, a, e: token_loss(p, t, a, e, 0.5),
    "weighting": lambda p, t, a, e: token_loss(p, t, a, e, e.unsqueeze(-1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_over_three_sizes(name):
    loss_fn = LOSSES[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        arguments = batch(*size)
        loss = compiled(*arguments)
        (grad,) = torch.autograd.grad(loss.sum(), arguments[0])
        expected = loss_fn(*arguments)
        torch.testing.assert_close(loss, expected)
        (expected_grad,) = torch.autograd.grad(expected.sum(), arguments[0])
        torch.testing.assert_close(grad, expected_grad)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_through_inductor():
    layer = torch.nn.Linear(6, 6)

    def step(x, target, mask, edit):
        return token_loss(layer(x), target, mask, edit)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for size in SIZES:
        x, *rest = batch(*size)
        grads = []
        for f in (compiled, step):
            grads.append(torch.autograd.grad(f(x, *rest), [x, *layer.parameters()]))
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_poison_under_compile():
    prediction, target, mask, edit = batch(4, 9)
    compiled = torch.compile(token_loss, fullgraph=True, backend="aot_eager")
    clean = torch.autograd.grad(compiled(prediction, target, mask, edit), prediction)[0]
    nan = float("nan")
    bad = prediction.detach().masked_fill(~mask[..., None], nan).requires_grad_()
    loss = compiled(bad, target, mask, edit.masked_fill(~mask, nan))
    assert torch.equal(torch.autograd.grad(loss, bad)[0], clean)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_transforms_under_compile(transform):
    prediction, target, mask, _ = batch(4, 9)

    def loss(p, t, a):
        return mle.masked_mse(p, t, a)

    def transformed(p, t, a):
        if transform == "jvp":
            return torch.func.jvp(lambda q: loss(q, t, a), (p,), (torch.ones_like(p),))
        return getattr(torch.func, transform)(loss)(p, t, a)

    arguments = prediction.detach(), target, mask
    compiled = torch.compile(transformed, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), transformed(*arguments))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 6)
        self.loss = mle.AttentionMaskMseLoss()

    def forward(self, x, target, mask, edit):
        return self.loss(self.layer(x), target, mask, edit)


def exported(model):
    rows, tokens = torch.export.Dim("rows", min=2), torch.export.Dim("tokens", min=2)
    shapes = {0: rows, 1: tokens}
    arguments = tuple(a.detach() for a in batch(3, 5))
    return torch.export.export(model, arguments, dynamic_shapes=(shapes,) * 4)


def test_export_with_dynamic_shapes():
    model = Model()
    program = exported(model)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(op) == 1
    for size in SIZES:
        arguments = [a.detach() for a in batch(*size)]
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = Model().requires_grad_(False)
    path = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "model.pt2")
    )
    runner = torch._inductor.aoti_load_package(path)
    for size in SIZES:
        arguments = [a.detach() for a in batch(*size)]
        torch.testing.assert_close(runner(*arguments), model(*arguments))


BAD = {  # every form of a rule, once with sizes that the compiler sees and once with symbols
    "attention_mask shape must be": lambda p, t, a, e: token_loss(p, t, a[:, :-1], e),
    "Shape mismatch": lambda p, t, a, e: token_loss(p, t[:, :-1], a, e),
    "must have 3 dimensions": lambda p, t, a, e: token_loss(p[0], t[0], a, e),
    "must be broadcastable to model_pred": lambda p, t, a, e: token_loss(p, t, a, e, t[:, :-1]),
    "must be a floating tensor": lambda p, t, a, e: token_loss(p.long(), t, a, e),
    "edit_mask must be a torch.Tensor": lambda p, t, a, e: token_loss(p, t, a, [e]),
    "unknown reduction": lambda p, t, a, e: mle.masked_sse(p, t, a, reduction="none"),
}


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("dynamic", [False, True])
def test_error_text_survives_compile(text, dynamic):
    compiled = torch.compile(BAD[text], fullgraph=True, dynamic=dynamic, backend="eager")
    with pytest.raises(Exception, match=text):
        compiled(*batch(4, 9))


def test_meta_tensors():
    p, t, m, e = (a.to("meta") for a in batch(4, 9))
    for reduction, shape in (("mean", ()), ("token", (4, 9)), ("none", (4, 9, 6))):
        loss, count = op(p, t, m, e, None, 2.0, 1.0, reduction)
        assert loss.shape == shape and loss.dtype == torch.float32 and loss.device.type == "meta"
        assert count.shape == () and count.dtype == torch.int64
