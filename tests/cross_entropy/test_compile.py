# SPDX-License-Identifier: BSD-3-Clause
"""torch.library's checks, one graph over changing sizes and numbers, export, ahead of time."""

import pytest
import torch
from cases_cross_entropy import BY_NAME, EVERYTHING, make, options_of
from torch._dynamo.utils import counters

import masked_loss_ext as mle

op = torch.ops.masked_loss_ext.masked_cross_entropy.default
backward_op = torch.ops.masked_loss_ext._masked_cross_entropy_backward.default
inplace_op = torch.ops.masked_loss_ext._masked_cross_entropy_backward_.default
sweep_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep.default
inplace_sweep_op = torch.ops.masked_loss_ext._masked_cross_entropy_sweep_.default
scale_op = torch.ops.masked_loss_ext._masked_cross_entropy_scale_gradient_.default
CHECKED = [
    "temperatures_shift",
    "v17",
    "both_weights_none",
    "segments_mean",
    "padded",
    "rank_1_none",
    "banned_sum",
]
SIZES = [(3, 5, 11), (4, 9, 30), (7, 11, 1030)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def op_arguments(name, dtype=torch.float32, target=True):
    """The operator's arguments for a case, all of them given."""
    inputs, options = make(BY_NAME[name], dtype), options_of(BY_NAME[name])
    weight = inputs.get("weight")
    tensors = (
        inputs["logits"],
        inputs["target"] if target else None,
        inputs.get("mask"),
        None if weight is None else weight.to(torch.float32),
        inputs.get("token_weight"),
        inputs.get("segment_ids"),
        torch.as_tensor(inputs.get("temperature", options.get("temperature", 1.0))).double(),
        None,
    )
    numbers = (
        options.get("ignore_index", -100),
        options.get("label_smoothing", 0.0),
        options.get("softcap") or 0.0,
        options.get("z_loss", 0.0),
        options.get("focal_gamma", 0.0),
        options.get("shift", 0),
        options.get("reduction", "mean"),
    )
    return tensors, numbers


def backward_arguments(name, statistics):
    tensors, numbers = op_arguments(name)
    results = op(*tensors, *numbers, statistics)
    loss, lse, entropy, log_prob, _, _, distance, totals, row_sums = results
    g = torch.full_like(lse, 0.5)
    grads = (torch.ones_like(loss), g, g, g) if statistics else (torch.ones_like(loss), *[None] * 3)
    saved = (row_sums, entropy, log_prob, distance, totals)
    return (*grads, *saved, *tensors, *numbers, statistics, None)


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck_forward(name, statistics):
    dtype = torch.bfloat16 if name == "padded" else torch.float32
    tensors, numbers = op_arguments(name, dtype)
    for tensor in (tensors[0], tensors[4]):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(op, (*tensors, *numbers, statistics))


def test_opcheck_without_labels():
    tensors, numbers = op_arguments("banned_sum", target=False)
    torch.library.opcheck(op, (tensors[0].requires_grad_(), *tensors[1:], *numbers, True))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck_backward(name, statistics):
    arguments = backward_arguments(name, statistics)
    needs_weight = arguments[13] is not None
    torch.library.opcheck(backward_op, (*arguments, True, needs_weight))
    torch.library.opcheck(inplace_op, (*arguments, needs_weight))


@pytest.mark.parametrize("name", ["v17", "segments_mean", "banned_sum"])
def test_opcheck_sweep(name):
    tensors, numbers = op_arguments(name)
    for operator in (sweep_op, inplace_sweep_op):
        torch.library.opcheck(operator, (*tensors, *numbers))
    torch.library.opcheck(scale_op, (tensors[0], torch.tensor(0.5)))


def batch(rows, tokens, classes, dtype=torch.float32):
    g = torch.Generator().manual_seed(rows * tokens)
    logits = torch.randn(rows, tokens, classes, generator=g).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows, tokens), generator=g)
    target[0, :2] = -100
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    weights = torch.rand(rows, tokens, generator=g).requires_grad_()
    number = torch.tensor(0.5 + rows)
    return logits, target, mask, weights, number


module = mle.MaskedCrossEntropyLoss(label_smoothing=0.1, shift=1)
f = mle.masked_cross_entropy
LOSSES = {
    "plain": lambda x, y, m, t, n: f(x, y, m),
    "none": lambda x, y, m, t, n: f(x, y, reduction="none"),
    "weighted": lambda x, y, m, t, n: f(x, y, m, token_weight=t, label_smoothing=0.1),
    "temperature": lambda x, y, m, t, n: f(x, y, m, temperature=n),
    "temperatures": lambda x, y, m, t, n: f(x, y, m, temperature=t.detach() + 0.5, shift=1),
    "temperature_of_a_sample": lambda x, y, m, t, n: f(x, y, m, temperature=n + m[:, :1]),
    "normalizer": lambda x, y, m, t, n: f(x, y, m, normalizer=n),
    "segments": lambda x, y, m, t, n: f(x, y, m, segment_ids=y % 2, shift=2, reduction="sum"),
    "module": lambda x, y, m, t, n: module(x, y, m, token_weight=t, normalizer=n),
    "in_place": lambda x, y, m, t, n: f(x, y, m, inplace_backward=True),
    "statistics": lambda x, y, m, t, n: sum(
        s.sum() for s in mle.row_statistics(x, y, m, softcap=5.0)
    ),
    "everything": lambda x, y, m, t, n: (
        lambda loss, s: loss + (s.entropy * s.lse).sum() + s.log_prob.mean()
    )(*f(x, y, m, **{**EVERYTHING, "temperature": n}, token_weight=t, return_stats=True)),
}


def assert_same_step(compiled, loss_fn, arguments):
    leaves = [a for a in arguments if a.requires_grad]
    results = []
    for function in (compiled, loss_fn):
        loss = function(*arguments)
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        results.append([loss, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_over_three_sizes(name):
    loss_fn = LOSSES[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        before = batch(*size)[0].detach()
        arguments = batch(*size)
        assert_same_step(compiled, loss_fn, arguments)
        if name == "in_place":  # only the eager one writes, and it came second
            compiled(*(again := batch(*size))).sum().backward()
            assert torch.equal(again[0].detach(), before)
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_whatever_is_ignored():
    """Nothing, some and all of the rows; NaN in them leaks nowhere."""
    compiled = torch.compile(LOSSES["weighted"], fullgraph=True, dynamic=True, backend="aot_eager")
    for share in (0.0, 0.5, 1.0):
        x, y, m, t, n = batch(4, 9, 30)
        off = torch.rand(4, 9) < share
        x = x.detach().masked_fill(off[..., None], float("nan")).requires_grad_()
        y = y.masked_fill(off, -100)
        t = t.detach().masked_fill(off, float("nan")).requires_grad_()
        assert_same_step(compiled, LOSSES["weighted"], (x, y, m, t, n))
        loss = compiled(x, y, m, t, n)
        assert loss.isfinite() and (share < 1 or loss == 0)
        (grad,) = torch.autograd.grad(loss, x)
        assert (grad[off] == 0).all() and grad.isfinite().all()
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_over_changing_numbers():
    """Tensors of temperature and normalizer change from step to step; nothing is compiled again."""

    def loss_fn(x, y, temperature, normalizer):
        return f(x, y, temperature=temperature, normalizer=normalizer, softcap=30.0)

    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    x, y, *_ = batch(4, 9, 30)
    for t, n in ((1.0, 36), (0.5, 20), (2.0, 1), (0.7, 0)):
        assert_same_step(compiled, loss_fn, (x, y, torch.tensor(t), torch.tensor(n)))
    assert counters["stats"]["unique_graphs"] == 1


def test_one_graph_through_inductor():
    layer = torch.nn.Linear(6, 40)

    def step(x, target, mask):
        loss, stats = f(layer(x), target, mask, shift=1, label_smoothing=0.1, return_stats=True)
        return loss - 0.01 * stats.entropy.mean()

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows, tokens in ((3, 5), (4, 9), (7, 11)):
        _, target, mask, *_ = batch(rows, tokens, 40)
        x = torch.randn(rows, tokens, 6, requires_grad=True)
        grads = [
            torch.autograd.grad(g(x, target, mask), [x, *layer.parameters()])
            for g in (compiled, step)
        ]
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 40)
        self.loss = mle.MaskedCrossEntropyLoss(shift=1, temperature=0.8)

    def forward(self, x, target, mask):
        return self.loss(self.layer(x), target, mask)


def model_batch(rows, tokens):
    _, target, mask, *_ = batch(rows, tokens, 40)
    return torch.randn(rows, tokens, 6), target, mask


def exported(model):
    rows, tokens = torch.export.Dim("rows", min=2), torch.export.Dim("tokens", min=2)
    shapes = {0: rows, 1: tokens}
    return torch.export.export(model, model_batch(3, 5), dynamic_shapes=(shapes,) * 3)


def test_export_with_dynamic_shapes():
    model = Model()
    program = exported(model)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(op) == 1
    for size in ((3, 5), (4, 9), (7, 11)):
        arguments = model_batch(*size)
        torch.testing.assert_close(program.module()(*arguments), model(*arguments))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    model = Model().requires_grad_(False)
    path = torch._inductor.aoti_compile_and_package(
        exported(model), package_path=str(tmp_path / "model.pt2")
    )
    runner = torch._inductor.aoti_load_package(path)
    for size in ((3, 5), (4, 9), (7, 11)):
        arguments = model_batch(*size)
        torch.testing.assert_close(runner(*arguments), model(*arguments))


def test_meta_tensors():
    x, y, m, t, _ = (a.to("meta") for a in batch(4, 9, 30))
    args = (x, y, m, None, t, None, None, None, -100, 0.1, 0.0, 0.0, 0.0, 1)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (4, 9))):
        results = op(*args, reduction, True)
        shapes = [shape, *[(4, 9)] * 6, (2,), (4, 9, 2)]
        assert [tuple(r.shape) for r in results] == shapes
        assert all(r.device.type == "meta" for r in results)
        dtypes = [torch.float32] * 4 + [torch.bool, torch.int64]
        dtypes += [torch.float32, torch.float64, torch.float32]
        assert [r.dtype for r in results] == dtypes


def test_fake_and_real_results_have_the_same_shapes():
    """What is not asked for has no elements, in both."""
    for statistics in (False, True):
        for target in (False, True):
            tensors, numbers = op_arguments("both_weights_none", target=target)
            real = op(*tensors, *numbers, statistics)
            fake = op(*(t if t is None else t.to("meta") for t in tensors), *numbers, statistics)
            for a, b in zip(real, fake, strict=True):
                assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
