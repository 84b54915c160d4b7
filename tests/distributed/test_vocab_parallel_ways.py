# SPDX-License-Identifier: BSD-3-Clause
"""Shards of a vocabulary by all the ways that lead to a gradient, and what ranks are told where a
way does not exist or their calls do not fit each other.
"""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

import masked_loss_ext as mle
from masked_loss_ext.distributed import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_row_statistics,
)

ROWS, WIDTH, CLASSES = 6, 4, 16
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def layer():
    """hidden, weight of all classes, labels, and which classes are this rank's."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(n, WIDTH, dtype=torch.float64, generator=generator) for n in (ROWS, CLASSES)
    )
    target = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    rank, size = dist.get_rank(), dist.get_world_size()
    return hidden, weight, target, slice(CLASSES * rank // size, CLASSES * (rank + 1) // size)


# --- gradients -----------------------------------------------------------------------------------


def functional():
    hidden, weight, target, own = layer()
    logits = hidden @ weight.T
    found = torch.func.grad(lambda x: vocab_parallel_cross_entropy(x, target))(logits[:, own])
    expected = torch.func.grad(lambda x: mle.masked_cross_entropy(x, target))(logits)
    torch.testing.assert_close(found, expected[:, own], **EXACT)

    def gradients(function, weight):
        return torch.func.grad(lambda h, w: function(h, w, target), argnums=(0, 1))(hidden, weight)

    of_hidden, of_weight = gradients(vocab_parallel_linear_cross_entropy, weight[own])
    expected = gradients(mle.masked_linear_cross_entropy, weight)
    torch.testing.assert_close(of_hidden, expected[0], **EXACT)
    torch.testing.assert_close(of_weight, expected[1][own], **EXACT)


def test_torch_func_grad(ranks):
    ranks(2).run(functional)


def head(hidden, weight, target, **options):
    """Both forms of the loss, of one layer."""
    logits = vocab_parallel_cross_entropy(hidden @ weight.T, target, **options)
    return logits + vocab_parallel_linear_cross_entropy(hidden, weight, target)


def around(reentrant):
    """Recomputed in the backward, with messages, and with tensors that hooks have moved."""
    hidden, weight, target, own = layer()

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight[own])]
        function(*leaves).backward()
        return [x.grad for x in leaves]

    def again(h, w):
        return checkpoint(
            lambda h, w: head(h * 1, w, target, inplace_backward=True), h, w,
            use_reentrant=reentrant,
        )  # fmt: skip

    def offloaded(h, w):
        with torch.autograd.graph.save_on_cpu():
            return head(h, w, target, inplace_backward=True)

    expected = gradients(lambda h, w: head(h, w, target))
    for function in (again, offloaded):
        for a, b in zip(gradients(function), expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_and_hooks(ranks, reentrant):
    ranks(2).run(around, reentrant)


def frozen_on_one_rank():
    hidden, weight, target, own = layer()
    found, expected = (hidden.clone().requires_grad_() for _ in range(2))
    shard = weight[own].clone().requires_grad_(dist.get_rank() == 0)
    vocab_parallel_linear_cross_entropy(found, shard, target).backward()
    mle.masked_linear_cross_entropy(expected, weight, target).backward()
    torch.testing.assert_close(found.grad, expected.grad, **EXACT)
    assert (shard.grad is None) == (dist.get_rank() == 1)


def test_a_shard_of_the_head_that_is_frozen(ranks):
    ranks(2).run(frozen_on_one_rank)


def kept_for_the_backward():
    hidden, weight, target, own = layer()
    saved = []

    def note(tensor):
        saved.append((*tensor.shape, tensor.dtype))
        return tensor

    logits = (hidden @ weight.T)[:, own].float().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        vocab_parallel_cross_entropy(logits, target)
    return saved


def test_messages_are_not_kept(ranks):
    """All ranks' would be, beside the logits of one."""
    saved = ranks(2).run(kept_for_the_backward)[0]
    assert (ROWS, CLASSES // 2, torch.float32) in saved
    assert [entry for entry in saved if entry[-1] == torch.float64] == [(2, torch.float64)]


def compiled_over_a_schedule():
    """Numbers that change from step to step, in one graph of Inductor's."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    hidden, weight, target, own = layer()

    def step(hidden, weight, target, smoothing, temperature, normalizer):
        return vocab_parallel_linear_cross_entropy(
            hidden, weight, target, label_smoothing=smoothing, temperature=temperature,
            normalizer=normalizer, vocab_start=own.start, vocab_size=CLASSES,
        )  # fmt: skip

    fast = torch.compile(step, fullgraph=True, dynamic=True)
    for rows, *numbers in ((3, 0.1, 0.5), (5, 0.2, 0.75), (6, 0.0, 1.0), (4, 0.05, 1.5)):
        rest = (target[:rows], *numbers, torch.tensor(float(rows)))
        found, expected = [], []
        for function, grads in ((fast, found), (step, expected)):
            leaves = [x.clone().requires_grad_() for x in (hidden[:rows], weight[own])]
            loss = function(*leaves, *rest)
            loss.backward()
            grads += [loss.detach(), *[x.grad for x in leaves]]
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, **EXACT)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiled_over_a_schedule(ranks):
    assert ranks(2).run(compiled_over_a_schedule) == [1, 1]


# --- ways that do not exist ----------------------------------------------------------------------


def refused_transforms():
    hidden, weight, target, own = layer()
    both = (
        lambda h: vocab_parallel_cross_entropy(h @ weight[own].T, target),
        lambda h: vocab_parallel_linear_cross_entropy(h, weight[own], target),
    )
    for function in both:
        with pytest.raises(NotImplementedError, match="vmap and second derivatives would need"):
            torch.vmap(function)(hidden.expand(2, ROWS, WIDTH))
        with pytest.raises(NotImplementedError, match="vmap and second derivatives would need"):
            torch.vmap(torch.func.grad(function))(hidden.expand(2, ROWS, WIDTH))
        with pytest.raises(NotImplementedError, match="forward-mode derivatives would need"):
            torch.func.jvp(function, (hidden,), (hidden,))
        leaf = hidden.clone().requires_grad_()
        (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivatives would need"):
            grad.sum().backward()
    leaf = hidden.clone().requires_grad_()
    loss = vocab_parallel_linear_cross_entropy(leaf, weight[own], target, reduction="none")
    with pytest.raises(NotImplementedError, match="is_grads_batched: ranks have no message"):
        torch.autograd.grad(loss, leaf, torch.eye(ROWS).double(), is_grads_batched=True)


def test_transforms_are_refused_before_a_message(ranks):
    ranks(2).run(refused_transforms)


# --- what does not fit ---------------------------------------------------------------------------


def listed_the_other_way():
    """A mesh of ranks 1, 0: who cuts by its coordinates has the second half on rank 0."""
    mesh = DeviceMesh("cpu", [1, 0])
    hidden, weight, target, _ = layer()
    logits = hidden @ weight.T
    own = logits.chunk(2, -1)[mesh.get_coordinate()[0]]
    right = mle.masked_cross_entropy(logits, target)
    # What the order of the group makes of it.
    wrong = vocab_parallel_cross_entropy(own, target, group=mesh.get_group())
    with pytest.raises(ValueError, match=r"group must be a DeviceMesh whose ranks ascend, got \[1"):
        vocab_parallel_cross_entropy(own, target, group=mesh)
    at = {"vocab_start": CLASSES // 2 * mesh.get_coordinate()[0], "vocab_size": CLASSES}
    with pytest.raises(ValueError, match="vocab_start must be where the shards of the ranks"):
        vocab_parallel_cross_entropy(own, target, group=mesh.get_group(), **at)
    with pytest.raises(ValueError, match="vocab_start must be where the shards of the ranks"):
        mle.masked_cross_entropy(DTensor.from_local(own, mesh, [Shard(1)]), target)
    return right.item(), wrong.item()


def test_a_mesh_that_lists_its_ranks_otherwise(ranks):
    for right, wrong in ranks(2).run(listed_the_other_way):
        assert abs(right - wrong) > 0.1


def other_temperatures():
    """One number, and one per row."""
    hidden, weight, target, own = layer()
    temperature = torch.ones(ROWS) if dist.get_rank() else torch.tensor(1.0)
    with pytest.raises(ValueError, match="all keywords must be the same on all ranks"):
        vocab_parallel_cross_entropy((hidden @ weight.T)[:, own], target, temperature=temperature)
    rows = [(2, 3), (3, 2)][dist.get_rank()]  # with a shift they end elsewhere
    logits = (hidden @ weight.T)[:, own].view(*rows, -1)
    with pytest.raises(ValueError, match="all keywords must be the same on all ranks"):
        vocab_parallel_cross_entropy(logits, target.view(rows), shift=1)


def test_ranks_with_other_rows_or_temperatures(ranks):
    ranks(2).run(other_temperatures)


def in_its_own_name():
    hidden, weight, target, own = layer()
    logits, name = (hidden @ weight.T)[:, own], "^vocab_parallel_row_statistics: "
    with pytest.raises(IndexError, match=name + "target at row"):
        vocab_parallel_row_statistics(logits, target + CLASSES)
    with pytest.raises(ValueError, match=name + "temperature must be positive"):
        vocab_parallel_row_statistics(logits, target, temperature=torch.tensor(-1.0))
    with pytest.raises(ValueError, match=name + "vocab_start must be where"):
        vocab_parallel_row_statistics(logits, vocab_start=3, vocab_size=CLASSES)
    with pytest.raises(ValueError, match="logits must be .*, got "):
        vocab_parallel_cross_entropy(torch.tensor(1.0), torch.tensor(0))


def test_errors_are_in_the_name_of_the_function(ranks):
    ranks(2).run(in_its_own_name)


def messages_of_a_view():
    """[1, S] labels and a mask for several rows: the call is made anew, the sizes are known."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    target = torch.tensor([[0, 5, 7]])
    with torch.profiler.profile() as profile:
        loss = vocab_parallel_cross_entropy(logits, target)
    calls = [e.count for e in profile.key_averages() if e.key == "c10d::_allgather_base_"]
    same = vocab_parallel_cross_entropy(logits, target.expand(2, 3))
    return sum(calls), torch.equal(loss, same)


def test_sizes_are_asked_for_once(ranks):
    assert ranks(2).run(messages_of_a_view) == [(2, True)] * 2
