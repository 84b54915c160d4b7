# SPDX-License-Identifier: BSD-3-Clause
"""Logits, and a classifier's rows, that are spread over ranks: what masked_cross_entropy of whole
rows gives in one process, with the messages that the docstring promises.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from accuracy_cross_entropy import evaluate, upstream_for
from cases_cross_entropy import EMPTY, MASKS, OPTIONS, RANKS, TEMPERATURES, make, options_of

import masked_loss_ext as mle
from masked_loss_ext.distributed import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
    vocab_parallel_row_statistics,
)
from masked_loss_ext.reference.cross_entropy import counted_rows

CASES = {case.name: case for case in OPTIONS + TEMPERATURES + MASKS + EMPTY + RANKS}
EXACT = {"rtol": 1e-12, "atol": 1e-13}
NAN = float("nan")
# Shares of the classes, of each rank.
CUTS = {2: ([1, 1], [0, 3]), 4: ([1, 1, 1, 1], [2, 0, 5, 1])}


def bounds(cuts, classes):
    """[start, end) of this rank's classes."""
    ends = [round(classes * c / sum(cuts)) for c in itertools.accumulate(cuts, initial=0)]
    return ends[dist.get_rank()], ends[dist.get_rank() + 1]


def assert_same(found, expected, start, end, last="grad logits"):
    for name, value in expected.items():
        if name == last:
            value = value[..., start:end]
        torch.testing.assert_close(found[name], value, **EXACT, msg=lambda m, n=name: f"{n}: {m}")


# --- values --------------------------------------------------------------------------------------


def ours(logits, target, mask=None, **options):
    return vocab_parallel_cross_entropy(logits, target, mask, **options)


def agrees(names, cuts, asks):
    for name in names:
        case = CASES[name]
        inputs, options = make(case, torch.float64), options_of(case)
        upstream = upstream_for(inputs, options)
        expected = evaluate(mle.masked_cross_entropy, inputs, upstream, **options)
        start, end = bounds(cuts, case.shape[-1])
        shard = {} if asks else {"vocab_start": start, "vocab_size": case.shape[-1]}
        own = inputs | {"logits": inputs["logits"][..., start:end].contiguous()}
        found = evaluate(ours, own, upstream, **options, **shard)
        assert_same(found, expected, start, end)


@pytest.mark.parametrize("size, cuts", [(n, cuts) for n in CUTS for cuts in CUTS[n]], ids=str)
def test_values(ranks, size, cuts):
    ranks(size).run(agrees, list(CASES), cuts, 0 in cuts)


def same_bits_everywhere(shape):
    torch.manual_seed(1)
    whole = torch.randn(shape)
    target = torch.randint(0, shape[-1], shape[:-1])
    start, end = bounds([1, 2], shape[-1])
    loss, stats = vocab_parallel_cross_entropy(
        whole[..., start:end], target, label_smoothing=0.1, return_stats=True
    )
    return loss, *stats


def test_all_ranks_have_the_same_bits(ranks):
    one, two = ranks(2).run(same_bits_everywhere, (5, 40007))
    assert all(map(torch.equal, one, two))


def agrees_from_hidden_states(cuts, options):
    torch.manual_seed(2)
    hidden = torch.randn(3, 5, 7, dtype=torch.float64)
    weight = torch.randn(23, 7, dtype=torch.float64)
    bias = torch.randn(23, dtype=torch.float64)
    target = torch.randint(0, 23, (3, 5))
    target[0, 1] = -100
    mask = torch.rand(3, 5) < 0.7
    _, on = counted_rows(hidden, target, mask, -100, options.get("shift", 0))
    hidden[~on] = NAN
    token_weight = torch.rand(3, 5, dtype=torch.float64)
    start, end = bounds(cuts, 23)

    def run(function, weight, bias, **more):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias, token_weight)]
        h, w, b, t = leaves
        result = function(
            h, w, target, mask, bias=b, token_weight=t, return_stats=True, **options, **more
        )
        loss, stats = result
        (loss.sum() * 1.7 + (stats.entropy * 0.3 + stats.lse).sum()).backward()
        return loss, *stats, *[x.grad for x in leaves]

    expected = run(mle.masked_linear_cross_entropy, weight, bias)
    found = run(vocab_parallel_linear_cross_entropy, weight[start:end], bias[start:end])
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        whole = b[start:end] if i in (7, 8) else b  # of the weight and the bias
        torch.testing.assert_close(a, whole, **EXACT, msg=lambda m, i=i: f"{i}: {m}")
    assert found[6].isfinite().all()


@pytest.mark.parametrize("size, cuts", [(n, cuts) for n in CUTS for cuts in CUTS[n]], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none", "chunk_rows": 2},
        {"reduction": "sequence_mean", "shift": 1},
        {"label_smoothing": 0.1, "z_loss": 0.1, "focal_gamma": 2.0, "softcap": 5.0},
        {"temperature": 0.7, "normalizer": 11, "class_weight": torch.rand(23).double()},
    ],
    ids=lambda o: "_".join(o) or "plain",
)
def test_values_from_hidden_states(ranks, size, cuts, options):
    ranks(size).run(agrees_from_hidden_states, cuts, options)


def statistics(cuts):
    torch.manual_seed(3)
    hidden, weight = torch.randn(4, 6).double(), torch.randn(19, 6).double()
    logits, labels = hidden @ weight.T, torch.randint(0, 19, (4,))
    start, end = bounds(cuts, 19)
    for target in (labels, None):
        expected = mle.row_statistics(logits, target, temperature=0.5)
        shard = vocab_parallel_row_statistics(logits[:, start:end], target, temperature=0.5)
        linear = vocab_parallel_linear_row_statistics(
            hidden, weight[start:end], target, temperature=0.5
        )
        for found in (shard, linear):
            for a, b in zip(found, expected, strict=True):
                assert (a is None) == (b is None)
                assert a is None or torch.allclose(a.double(), b.double(), **EXACT)


def test_statistics(ranks):
    ranks(2).run(statistics, [4, 1])
    ranks(4).run(statistics, [1, 0, 2, 2])


def other_ways():
    """Classes in another dimension, in place, halves, weighted and by sequence."""
    torch.manual_seed(4)
    rank = dist.get_rank()
    whole = torch.randn(3, 10, 6).double()
    target = torch.randint(0, 10, (3, 6))
    weight = torch.rand(3, 6).double()
    start, end = bounds([2, 3], 10)
    for options in (
        {"reduction": "sequence_mean", "normalizer": 4.0},
        {"reduction": "weighted_mean", "token_weight": weight},
        {"inplace_backward": True},
    ):
        seen = []
        logits = whole.clone().requires_grad_()
        expected = mle.masked_cross_entropy(logits * 1, target, class_dim=1, **options)
        expected.backward()
        own = whole[:, start:end].clone().requires_grad_()
        moved = (own * 1).movedim(1, -1).contiguous()
        address = moved.data_ptr()
        moved.register_hook(lambda g, a=address, s=seen: s.append(g.data_ptr() == a))
        loss = vocab_parallel_cross_entropy(moved, target, **options)
        loss.backward()
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(own.grad, logits.grad[:, start:end], **EXACT)
        assert seen == [options.get("inplace_backward", False)]
        one = vocab_parallel_cross_entropy(own, target, class_dim=1, **options)
        torch.testing.assert_close(one, expected, **EXACT)
    half = whole.bfloat16().movedim(1, -1)
    loss = vocab_parallel_cross_entropy(half[..., start:end], target)
    torch.testing.assert_close(loss, mle.masked_cross_entropy(half, target))
    return rank


def test_other_ways(ranks):
    assert ranks(2).run(other_ways) == [0, 1]


def no_row():
    logits = torch.full((3, 2), NAN, requires_grad=True)
    nothing = torch.zeros(3, dtype=torch.bool)
    loss = vocab_parallel_cross_entropy(logits, torch.zeros(3, dtype=torch.int64), nothing)
    loss.backward()
    return loss.item(), logits.grad.tolist()


def test_no_row_counts(ranks):
    assert ranks(4).run(no_row) == [(0.0, [[0.0, 0.0]] * 3)] * 4


def two_dimensions():
    """Two groups of tensor-parallel ranks, which have other rows each: a mesh [2, 2]."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(5)
    whole = torch.randn(2, 6, 9).double()
    target = torch.randint(0, 9, (2, 6))
    mask = torch.rand(2, 6) < torch.tensor([[0.9], [0.3]])
    count = mask.sum().item()
    expected = mle.masked_cross_entropy(whole, target, mask)
    data, tensor = mesh["data"].get_local_rank(), mesh["tensor"].get_local_rank()
    own = whole[data, :, [slice(0, 4), slice(4, 9)][tensor]]
    for group in (mesh["tensor"], mesh["tensor"].get_group()):
        loss = vocab_parallel_cross_entropy(
            own, target[data], mask[data], group=group, normalizer=count
        )
        dist.all_reduce(loss, group=mesh["data"].get_group())
        torch.testing.assert_close(loss, expected, **EXACT)
    with pytest.raises(ValueError, match="group must be a DeviceMesh of 1 dimension"):
        vocab_parallel_cross_entropy(own, target[data], group=mesh)


def test_ranks_with_other_rows_beside(ranks):
    ranks(4).run(two_dimensions)


# --- compiled ------------------------------------------------------------------------------------


def compiled():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    start, end = bounds([2, 3], 15)

    def step(logits, target, mask, normalizer):
        loss, stats = vocab_parallel_cross_entropy(
            logits, target, mask, label_smoothing=0.1, normalizer=normalizer, return_stats=True,
            vocab_start=start, vocab_size=15,
        )  # fmt: skip
        return loss + stats.entropy.sum()

    def step_from_hidden_states(hidden, weight, target, mask):
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, target, mask, vocab_start=start, vocab_size=15
        )

    def run(function, *leaves_and_rest):
        *leaves, rest = leaves_and_rest
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        loss = function(*leaves, *rest)
        loss.backward()
        return loss, *[x.grad for x in leaves]

    how = {"fullgraph": True, "dynamic": True, "backend": "aot_eager"}
    fast, linear = torch.compile(step, **how), torch.compile(step_from_hidden_states, **how)
    for rows in (3, 5, 9):
        torch.manual_seed(rows)
        whole, target = torch.randn(rows, 15), torch.randint(0, 15, (rows,))
        rest = (target, torch.rand(rows) < 0.7, torch.tensor(float(rows)))
        own = whole[:, start:end]
        for a, b in zip(run(fast, own, rest), run(step, own, rest), strict=True):
            torch.testing.assert_close(a, b)
        hidden, weight = torch.randn(rows, 4), torch.randn(15, 4)[start:end]
        for a, b in zip(
            run(linear, hidden, weight, rest[:2]),
            run(step_from_hidden_states, hidden, weight, rest[:2]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_is_one_graph_over_changing_sizes(ranks):
    assert ranks(2).run(compiled) == [2, 2]


def compiled_without_a_start():
    function = torch.compile(vocab_parallel_cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="vocab_start must be given under torch.compile"):
        function(torch.randn(2, 3), torch.tensor([0, 1]))


def test_compiled_needs_to_know_its_classes(ranks):
    ranks(2).run(compiled_without_a_start)
