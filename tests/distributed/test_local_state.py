# SPDX-License-Identifier: BSD-3-Clause
"""State of losses inside of a wrapped model: each rank's own, whatever DDP and FSDP2 do."""

import contextlib
from functools import partial
from unittest import mock

import pytest
import rank_models
import torch
import torch.distributed as dist
from rank_models import make_model, replicas, train, wrapped
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from masked_loss_ext.distributed import keep_state_local, sync_state
from masked_loss_ext.unified import TemperatureScaledCrossEntropy, _state

WAYS = [
    "ddp",
    "ddp static_graph",
    "ddp compile",
    "fsdp2",
    "fsdp2 loss",
    "fsdp2 loss.mtp_loss loss",
    "fsdp2 embed head",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, size", [(way, n) for way in WAYS for n in (2, 4) if (way, n) != ("ddp compile", 4)]
)
def test_weights_and_each_rank_s_state_are_those_of_replicas(ranks, way, size):
    """The heads' projections are parameters of the loss, and read by it, not called."""
    seen = set()
    for (weights, buffers), (expected, own) in zip(
        ranks(size).run(train, way), replicas(size), strict=True
    ):
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
        if way.startswith("ddp"):  # which goes on sending what is not ours
            own["seen"] = buffers["seen"]
        torch.testing.assert_close(buffers, own, rtol=1e-6, atol=1e-6)
        assert buffers["loss.main_loss.temperature"] != 1.0
        seen.add(tuple(buffers["loss.main_loss.loss_history"].tolist()))
    assert len(seen) == size


class Given(torch.nn.Module):
    """Its loss is what it is told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.loss = TemperatureScaledCrossEntropy(label_smoothing=0.0)

    def forward(self, value):
        gap = torch.tensor(value, dtype=torch.float64).expm1().log()
        logits = torch.stack([torch.zeros_like(gap), gap]).view(1, 1, 2) * self.weight
        return self.loss(logits, torch.zeros(1, 1, dtype=torch.int64))["loss"]


GIVEN = [[1.0, 2.0, 3.0], [11.0, 12.0, 13.0]]


def remembered(way):
    """The losses that a rank remembers, and those after sync_state."""
    model = Given()
    options, allowed = {}, contextlib.nullcontext()
    if way == "usual":
        allowed = mock.patch.object(_state, "_sent_by_ddp", return_value=False)
    elif way == "no broadcast":
        options = {"broadcast_buffers": False}
    else:
        assert keep_state_local(model) is model
    ddp = DistributedDataParallel(model, **options)
    with allowed:
        for value in GIVEN[dist.get_rank()]:
            ddp(value).backward()
    found = model.loss.loss_history[:3].tolist()
    sync_state(ddp)
    return found, model.loss.loss_history[:3].tolist()


@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
def test_ddp_s_broadcast_by_hand(ranks):
    """Without a word to DDP a rank's history is that of rank 0 with its own last loss."""
    (first, _), (second, synced) = ranks(2).run(remembered, "usual")
    near = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(first, [1.0, 2.0, 3.0], **near)
    torch.testing.assert_close(second, [1.0, 2.0, 13.0], **near)
    torch.testing.assert_close(synced, [1.0, 2.0, 8.0], **near)
    for way in ("keep_state_local", "no broadcast"):
        for (own, synced), given in zip(ranks(2).run(remembered, way), GIVEN, strict=True):
            torch.testing.assert_close(own, given, **near)
            torch.testing.assert_close(synced, [6.0, 7.0, 8.0], **near)


def refused(adaptive=True, way="eager"):
    model = make_model(adaptive_temperature=adaptive)
    if not adaptive:
        model.loss.moe_balancer.eval()
    torch.compiler.reset()  # what has been traced for another model is not asked again
    compiled = partial(torch.compile, backend="aot_eager")
    inner = compiled(model) if way == "compiled inside" else model
    ddp = DistributedDataParallel(inner)
    if way == "compiled outside":
        ddp = compiled(ddp)
    try:
        ddp(*rank_models.window(0, 0)[0])
    except RuntimeError as error:
        return str(error)
    return None


def test_what_ddp_would_overwrite_is_refused(ranks):
    text = (
        "UnifiedLoss: state must be each rank's own: let DDP wrap "
        "masked_loss_ext.distributed.keep_state_local(model), got DistributedDataParallel that "
        "replaces it by that of rank 0 in each forward"
    )
    for way in ("eager", "compiled inside", "compiled outside"):
        assert ranks(2).run(refused, True, way) == [text] * 2, way
    assert ranks(2).run(refused, False) == [None] * 2  # nothing moves


def other_buffers():
    """A name that the user has excluded stays excluded; what is not ours is sent."""
    model = make_model()
    ignore = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(model, ["gate.bias"])
    ddp = DistributedDataParallel(keep_state_local(model))
    assert "gate.bias" in ddp.parameters_to_ignore
    assert "loss.moe_balancer.expert_counts" in ddp.parameters_to_ignore
    for _ in range(2):
        model.seen.fill_(100.0 * dist.get_rank())
        ddp(*rank_models.window(0, dist.get_rank())[0])
    return model.seen.item() < 100


def test_other_buffers_are_ddp_s(ranks):
    assert ranks(2).run(other_buffers) == [True, True]


def saved_and_loaded(way):
    """A checkpoint of rank 0 gives all ranks its state, which after sync_state is that of all."""
    model = make_model()
    step_model = wrapped(model, way)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for tokens, mask in rank_models.window(0, dist.get_rank()):
        step_model(tokens, mask).backward()
    optimizer.step()
    sync_state(step_model)
    full = StateDictOptions(full_state_dict=True)
    saved = [get_model_state_dict(model, options=full)]
    again = wrapped(make_model(), way)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=way == "fsdp2")
    if way == "ddp":
        dist.broadcast_object_list(saved)
    inner = getattr(again, "module", again)
    set_model_state_dict(inner, saved[0], options=options)
    for (name, new), old in zip(inner.named_buffers(), model.buffers(), strict=True):
        assert "_last_temperature" in name or name == "seen" or torch.equal(new, old), name
    torch.testing.assert_close(rank_models.whole(inner), rank_models.whole(model))
    return sorted(saved[0])


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_state_dict(ranks, way):
    names = sorted(make_model().state_dict())
    assert ranks(2).run(saved_and_loaded, way)[0] == names


def test_keep_state_local_refuses_what_is_no_model_or_wrapped(ranks):
    with pytest.raises(TypeError, match="^keep_state_local: module must be a torch.nn.Module, got"):
        keep_state_local([])
    with pytest.raises(TypeError, match="^sync_state: module must be a torch.nn.Module, got list"):
        sync_state([])
    ranks(2).run(wrapped_already)


def wrapped_already():
    with pytest.raises(TypeError, match="must be what DDP is going to wrap, got Distributed"):
        keep_state_local(DistributedDataParallel(torch.nn.Linear(1, 1)))


def head_alone():
    """Its weight is a shard: nobody calls the head, so nothing gathers it."""
    model = make_model()
    fully_shard(model.loss.mtp_loss.projections[0])
    try:
        fully_shard(model)(*rank_models.window(0, 0)[0])
    except ValueError as error:
        return str(error)
    return None


def test_a_head_that_is_sharded_alone_is_refused(ranks):
    text = (
        "UnifiedLoss: projections[0] must have no forward hooks: it is not called, got some beside "
        "a weight that is sharded Shard(dim=0) over 0: fully_shard the module that calls the loss, "
        "which gathers it, and not the head alone; of a tensor parallel head give the weight"
    )
    assert ranks(2).run(head_alone) == [text] * 2
