# SPDX-License-Identifier: BSD-3-Clause
"""torch.library's checks, one graph over changing sizes and numbers, export, ahead of time."""

import pytest
import torch
from cases_cross_entropy import BY_NAME, EVERYTHING, options_of
from cases_linear import make_linear
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import masked_loss_ext as mle

op = torch.ops.masked_loss_ext.linear_cross_entropy.default
backward_op = torch.ops.masked_loss_ext._linear_cross_entropy_backward.default
sweep_op = torch.ops.masked_loss_ext._linear_cross_entropy_sweep.default
CHECKED = ["v17", "both_weights_none", "segments_mean", "padded", "rank_1_none", "banned_sum"]
SIZES = [(3, 5, 7, 11), (4, 9, 6, 30), (7, 11, 13, 1030)]  # rows, tokens, width, classes
f = mle.masked_linear_cross_entropy


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


# --- the operators themselves --------------------------------------------------------------------


def op_arguments(name, statistics=False, dtype=torch.float32, target=True, **more):
    """The operator's arguments by name."""
    inputs, options = make_linear(BY_NAME[name], dtype), options_of(BY_NAME[name])
    inputs["linear_weight"] = inputs.pop("head")
    weight = inputs.get("weight")
    if weight is not None:
        inputs["weight"] = weight.float()
    if not target:
        inputs["target"] = None
    options["temperature"] = torch.tensor(options.get("temperature", 1.0), dtype=torch.float64)
    options["softcap"] = options.get("softcap") or 0.0
    options.pop("normalizer", None)
    names = [a.name for a in op._schema.arguments]
    given = {"bias": None, "target": None, **inputs, **options, "statistics": statistics, **more}
    return {n: given[n] for n in names if n in given}


def with_gradients(arguments):
    for name in ("hidden", "linear_weight", "bias", "token_weight"):
        if arguments.get(name) is not None:
            arguments[name].requires_grad_()
    return arguments


def backward_arguments(name, statistics):
    a = op_arguments(name, statistics, chunk_rows=2)
    results = dict(zip([r.name for r in op._schema.returns], op(**a), strict=True))
    g = torch.full_like(results["lse"], 0.5)
    given = {**results, **a, "grad_loss": torch.ones_like(results["loss"])}
    given |= dict.fromkeys(("grad_lse", "grad_entropy", "grad_log_prob"), g if statistics else None)
    wanted = {x.name: x for x in backward_op._schema.arguments}
    absent = {n: None for n, x in wanted.items() if n not in given and not x.has_default_value()}
    given["needs_token_weight"] = a.get("token_weight") is not None
    return {n: v for n, v in {**absent, **given}.items() if n in wanted}


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck_forward(name, statistics):
    dtype = torch.bfloat16 if name == "padded" else torch.float32
    arguments = op_arguments(name, statistics, dtype, chunk_rows=3)
    torch.library.opcheck(op, (), with_gradients(arguments))


def test_opcheck_without_labels():
    torch.library.opcheck(op, (), with_gradients(op_arguments("banned_sum", True, target=False)))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("statistics", [False, True])
def test_opcheck_backward(name, statistics):
    torch.library.opcheck(backward_op, (), backward_arguments(name, statistics))


@pytest.mark.parametrize("name", ["v17", "segments_mean", "both_weights_mean", "banned_sum"])
def test_opcheck_sweep(name):
    arguments = op_arguments(name, num_valid=1000)
    torch.library.opcheck(sweep_op, (), arguments)
    torch.library.opcheck(sweep_op, (), {**arguments, "needs_linear_weight": False})
    torch.library.opcheck(sweep_op, (), with_gradients(arguments))


def test_fake_and_real_results_have_the_same_shapes():
    """What is not asked for has no elements, in both."""

    def alike(function, arguments):
        fake = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        for a, b in zip(function(**arguments), function(**fake), strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())

    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for statistics in (False, True):
            for target in (False, True):
                more = {"label_smoothing": 0.0} if not target else {}
                arguments = op_arguments("rank_4_shift", statistics, dtype, target, **more)
                alike(op, arguments)
        arguments = op_arguments("rank_4_shift", False, dtype)
        for needs in ("hidden", "linear_weight", "bias", "token_weight"):
            alike(sweep_op, {**arguments, f"needs_{needs}": False})


def test_meta_tensors():
    h, w = torch.randn(4, 9, 3, device="meta"), torch.randn(5, 3, device="meta")
    y = torch.zeros(4, 9, dtype=torch.long, device="meta")
    assert f(h, w, y).shape == () and f(h, w, y, reduction="none").shape == (4, 9)
    loss = f(h.requires_grad_(), w.requires_grad_(), y)
    grads = torch.autograd.grad(loss, (h, w))
    assert [g.shape for g in grads] == [h.shape, w.shape] and grads[0].device.type == "meta"
    assert mle.linear_row_statistics(h, w, y).hit.dtype == torch.bool


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        h, w = torch.randn(4, 9, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
        y, m = torch.zeros(4, 9, dtype=torch.long), torch.rand(4, 9)
        for options in ({}, {"reduction": "none"}, {"return_stats": True}):
            found = f(h, w, y, m, **options)
            loss = found[0] if isinstance(found, tuple) else found
            grads = torch.autograd.grad(loss.sum(), (h, w))
            assert [g.shape for g in grads] == [h.shape, w.shape]


# --- one graph -----------------------------------------------------------------------------------


def batch(rows, tokens, width, classes, dtype=torch.float32):
    """hidden, head, bias, target, mask, token_weight, a number"""
    g = torch.Generator().manual_seed(rows * tokens)
    h, w = torch.randn(rows, tokens, width, generator=g), torch.randn(classes, width, generator=g)
    b = torch.randn(classes, generator=g)
    target = torch.randint(0, classes, (rows, tokens), generator=g)
    target[0, :2] = -100
    mask = torch.rand(rows, tokens, generator=g) < 0.6
    t = torch.rand(rows, tokens, generator=g)
    leaves = [x.to(dtype).requires_grad_() for x in (h, w, b)]
    return *leaves, target, mask, t.requires_grad_(), torch.tensor(0.5 + rows)


LOSSES = {
    "plain": lambda h, w, b, y, m, t, n: f(h, w, y, m, bias=b),
    "none": lambda h, w, b, y, m, t, n: f(h, w, y, bias=b, reduction="none"),
    "weighted": lambda h, w, b, y, m, t, n: f(h, w, y, m, token_weight=t, label_smoothing=0.1),
    "temperature": lambda h, w, b, y, m, t, n: f(h, w, y, m, temperature=n),
    "temperatures": lambda h, w, b, y, m, t, n: f(h, w, y, m, temperature=t.detach() + 0.5),
    "normalizer": lambda h, w, b, y, m, t, n: f(h, w, y, m, normalizer=n),
    "segments": lambda h, w, b, y, m, t, n: f(
        h, w, y, m, segment_ids=y % 2, shift=2, reduction="sum"
    ),
    "weighted_mean": lambda h, w, b, y, m, t, n: f(
        h, w, y, m, bias=b, token_weight=t, reduction="weighted_mean"
    ),
    "sequence_mean": lambda h, w, b, y, m, t, n: f(
        h, w, y, m, segment_ids=y % 2, reduction="sequence_mean"
    ),
    "frozen head": lambda h, w, b, y, m, t, n: f(h, w.detach(), y, m, bias=b),
    "frozen trunk": lambda h, w, b, y, m, t, n: f(h.detach(), w, y, m, bias=b),
    "chunks": lambda h, w, b, y, m, t, n: f(h, w, y, m, bias=b, chunk_rows=4),
    "fewer rows": lambda h, w, b, y, m, t, n: f(h, w, y, m, bias=b, num_valid=h.shape[0] * 20),
    "two heads": lambda h, w, b, y, m, t, n: f(h, w, y, m, shift=1) + f(h, w * 2, y, m, shift=2),
    "statistics": lambda h, w, b, y, m, t, n: sum(
        s.sum() for s in mle.linear_row_statistics(h, w, y, m, bias=b, softcap=5.0)
    ),
    "everything": lambda h, w, b, y, m, t, n: (
        lambda loss, s: loss + (s.entropy * s.lse).sum() + s.log_prob.mean()
    )(
        *f(
            h,
            w,
            y,
            m,
            bias=b,
            token_weight=t,
            return_stats=True,
            **{**EVERYTHING, "temperature": n},
        )
    ),
}


def assert_same_step(compiled, loss_fn, arguments):
    leaves = [a for a in arguments if a.requires_grad]
    results = []
    for function in (compiled, loss_fn):
        loss = function(*arguments)
        grads = torch.autograd.grad(2 * loss.sum(), leaves, allow_unused=True)
        results.append([loss, *(g for g in grads if g is not None)])
    assert len(results[0]) == len(results[1])
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_over_three_sizes(name):
    loss_fn = LOSSES[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        assert_same_step(compiled, loss_fn, batch(*size))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["plain", "everything", "none"])
def test_one_graph_of_halves(name):
    loss_fn = LOSSES[name]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in SIZES:
        assert_same_step(compiled, loss_fn, batch(*size, dtype=torch.bfloat16))
    assert counters["stats"]["unique_graphs"] == 1


def test_mixed_dtypes_and_autocast():
    def step(h, w, b, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return f(h, w, y, bias=b)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    mixed = torch.compile(
        lambda h, w, b, y: f(h.bfloat16(), w, y, bias=b), fullgraph=True, backend="aot_eager"
    )
    h, w, b, y, *_ = batch(*SIZES[1])
    assert_same_step(compiled, step, (h, w, b, y))
    assert_same_step(mixed, lambda h, w, b, y: f(h.bfloat16(), w, y, bias=b), (h, w, b, y))


def test_one_graph_whatever_is_ignored():
    """Nothing, some and all of the rows; NaN in them leaks nowhere."""
    loss_fn = LOSSES["weighted"]
    compiled = torch.compile(loss_fn, fullgraph=True, dynamic=True, backend="aot_eager")
    for share in (0.0, 0.5, 1.0):
        h, w, b, y, m, t, n = batch(*SIZES[1])
        off = torch.rand(y.shape) < share
        h = h.detach().masked_fill(off[..., None], float("nan")).requires_grad_()
        y = y.masked_fill(off, -100)
        t = t.detach().masked_fill(off, float("nan")).requires_grad_()
        assert_same_step(compiled, loss_fn, (h, w, b, y, m, t, n))
        loss = compiled(h, w, b, y, m, t, n)
        assert loss.isfinite() and (share < 1 or loss == 0)
        grads = torch.autograd.grad(loss, (h, w))
        assert (grads[0][off] == 0).all() and all(g.isfinite().all() for g in grads)
    assert counters["stats"]["unique_graphs"] == 1


NUMBERS = {
    "temperature": lambda h, w, y, t: f(h, w, y, temperature=t),
    "normalizer": lambda h, w, y, t: f(h, w, y, normalizer=t),
    "label_smoothing": lambda h, w, y, t: f(h, w, y, label_smoothing=t / 4),
    "softcap": lambda h, w, y, t: f(h, w, y, softcap=t),
    "z_loss": lambda h, w, y, t: f(h, w, y, z_loss=t, reduction="none").sum(),
    "focal_gamma": lambda h, w, y, t: f(h, w, y, focal_gamma=t),
    "softcap of statistics": lambda h, w, y, t: mle.linear_row_statistics(
        h, w, y, softcap=t
    ).entropy.sum(),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes(name, dynamic):
    """One graph, or two, for all values, through the sweep as through the operator."""
    function = NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    h, w, _, y, *_ = batch(*SIZES[0])
    for t in (0.5, 0.75, 1.25, 2.0, 3.0, 0.1):
        found = [torch.autograd.grad(g(h, w, y, t), (h, w)) for g in (compiled, function)]
        torch.testing.assert_close(*found)
    assert counters["stats"]["unique_graphs"] <= (1 if dynamic else 2)


def test_a_number_of_rows_that_changes():
    compiled = torch.compile(
        lambda h, w, y, n: f(h, w, y, num_valid=n), fullgraph=True, dynamic=True,
        backend="aot_eager",
    )  # fmt: skip
    h, w, _, y, *_ = batch(*SIZES[1])
    for n in (36, 40, 50, 77):
        torch.testing.assert_close(compiled(h, w, y, n), f(h, w, y))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_sweep_is_what_is_compiled():
    """In training, of one number; the backward multiplies what there is, no more."""
    graphs = []

    def keep(graph, _):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    h, w, _, y, *_ = batch(*SIZES[0])
    torch.compile(lambda h, w: f(h, w, y), backend=keep, fullgraph=True)(h, w)
    assert graphs[0].count(sweep_op) == 1 and op not in graphs[0]
    torch._dynamo.reset()
    torch.compile(lambda h, w: f(h, w, y), backend=keep, fullgraph=True)(h.detach(), w.detach())
    assert graphs[1].count(op) == 1 and sweep_op not in graphs[1]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = torch.nn.Linear(6, 8), torch.nn.Linear(8, 40)

    def forward(self, x, target, mask):
        hidden, head = self.trunk(x), self.head
        return f(hidden, head.weight, target, mask, bias=head.bias, shift=1, temperature=0.8)


def model_batch(rows, tokens):
    *_, target, mask, _, _ = batch(rows, tokens, 1, 40)
    return torch.randn(rows, tokens, 6), target, mask


def test_one_graph_through_inductor():
    model = Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for size in ((3, 5), (4, 9), (7, 11)):
        arguments = model_batch(*size)
        grads = [
            torch.autograd.grad(g(*arguments), list(model.parameters())) for g in (compiled, model)
        ]
        for ours, expected in zip(*grads, strict=True):
            torch.testing.assert_close(ours, expected)
    assert counters["stats"]["unique_graphs"] == 1


def exported(model):
    rows, tokens = torch.export.Dim("rows", min=2), torch.export.Dim("tokens", min=2)
    shapes = {0: rows, 1: tokens}
    return torch.export.export(model, model_batch(3, 5), dynamic_shapes=(shapes,) * 3)


@pytest.mark.parametrize("frozen", [False, True])
def test_export_with_dynamic_shapes(frozen):
    model = Model().requires_grad_(not frozen)
    program = exported(model)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert called.count(op) + called.count(sweep_op) == 1
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


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("name", ["plain", "none", "statistics", "weighted_mean"])
def test_make_fx(name, tracing_mode):
    """Loss and gradients of a step, traced through autograd."""
    loss_fn = LOSSES[name]

    def step(h, w, b, y, m, t, n):
        leaves = [x.detach().requires_grad_() for x in (h, w, b)]
        loss = loss_fn(*leaves, y, m, t.detach(), n)
        return loss, torch.autograd.grad(2 * loss.sum(), leaves)

    arguments = [x.detach() for x in batch(*SIZES[0])]
    graph = make_fx(step, tracing_mode=tracing_mode)(*arguments)
    for size in SIZES[: 3 if tracing_mode == "symbolic" else 1]:
        arguments = [x.detach() for x in batch(*size)]
        torch.testing.assert_close(graph(*arguments), step(*arguments))
