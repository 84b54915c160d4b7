# SPDX-License-Identifier: BSD-3-Clause
"""Each way of tools/scale/messages.py as a training step takes it, with what it sends counted."""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from messages import Messages
from placed import placed
from public_calls import CALLS, entries
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from unified_cases import CASES, batch, floating

from masked_loss_ext import masked_cross_entropy
from masked_loss_ext.distributed import (
    global_token_count,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_row_statistics,
)
from masked_loss_ext.unified import TemperatureScaledCrossEntropy
from tools.scale import messages as formulas
from tools.scale.tables import COUNTED

N, V, D = (COUNTED[size] for size in "NVD")


def counted(call, *args):
    """[(kind, bytes)] of a call, and of the backward where it gives a loss."""
    with Messages() as sent:
        loss = call(*args)
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            loss.backward()
    return [tuple(message) for message in sent.all]


# --- the same on all ranks, cut by classes -------------------------------------------------------


def make_rows():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g)
    target = torch.randint(V, (N,), generator=g)
    target[::3] = -100  # rows that do not count are sent all the same
    return hidden, weight, target


def own(tensor, dim=0):
    """This rank's classes."""
    part = tensor.chunk(dist.get_world_size(), dim)[dist.get_rank()]
    return part.detach().clone().requires_grad_()


def place():
    """Which they are."""
    return {"vocab_start": V // dist.get_world_size() * dist.get_rank(), "vocab_size": V}


def own_logits():
    hidden, weight, target = make_rows()
    return own(hidden @ weight.T, -1), target


def mesh():
    return dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))


def of_logits(**options):
    logits, target = own_logits()
    result = vocab_parallel_cross_entropy(logits, target, **place(), **options)
    return result[0] if isinstance(result, tuple) else result


def of_hidden(dtype=torch.float32, needs=True, **options):
    hidden, weight, target = make_rows()
    hidden, weight = hidden.to(dtype).requires_grad_(needs), own(weight.to(dtype))
    result = vocab_parallel_linear_cross_entropy(hidden, weight, target, **place(), **options)
    return result[0] if isinstance(result, tuple) else result


def statistics():
    vocab_parallel_row_statistics(*own_logits(), **place())


def sizes_alone():
    """What a call sends more that is not told its classes."""
    logits, target = own_logits()
    asked = counted(vocab_parallel_cross_entropy, logits, target)
    told = counted(of_logits)
    assert asked[1:] == told
    return asked[:1]


def state():
    TemperatureScaledCrossEntropy(label_smoothing=0.0).sync_state()


def of_dtensor(dim):
    """masked_cross_entropy of rows, or of columns, of which each rank has a part."""
    logits, target = whole_logits()
    logits = placed(logits, mesh(), [Shard(dim)]).requires_grad_()
    if dim == 0:
        target = placed(target, mesh(), [Shard(0)])
    return masked_cross_entropy(logits, target)


# --- other ways ----------------------------------------------------------------------------------


def gathered_vocabulary():
    """What F.cross_entropy is given where it shall see whole rows."""
    logits, target = own_logits()
    return F.cross_entropy(DTensor.from_local(logits, mesh(), [Shard(1)]).full_tensor(), target)


def three_reduces():
    """PyTorch's own way."""
    logits, target = own_logits()
    with loss_parallel():
        loss = F.cross_entropy(DTensor.from_local(logits, mesh(), [Shard(1)]), target)
        loss.backward()


def three_floats():
    logits, target = own_logits()
    at = target - place()["vocab_start"]
    here = (at >= 0) & (at < logits.shape[1])
    label = logits.gather(1, at.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    high = logits.max(1).values
    sums = (logits - high.unsqueeze(1)).exp().sum(1)
    message = torch.stack([high, sums, label.where(here, 0.0)]).detach()
    every = [torch.empty_like(message) for _ in range(dist.get_world_size())]
    dist.all_gather(every, message)
    high, sums, label = torch.stack(every, 1)
    losses = (high + sums.log()).logsumexp(0) - label.sum(0)
    torch.testing.assert_close(losses[target >= 0].mean(), F.cross_entropy(*whole_logits()))


def whole_logits():
    hidden, weight, target = make_rows()
    return hidden @ weight.T, target


# --- what the model sends ------------------------------------------------------------------------


def make_pair():
    return nn.Sequential(nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False))


def of_ddp():
    model = DistributedDataParallel(make_pair())
    return counted(lambda: model(torch.randn(3, D)).sum())


def of_fsdp():
    model = fully_shard(make_pair(), reshard_after_forward=True)
    return counted(lambda: model(torch.randn(3, D)).sum())


def of_layers():
    """Attention and the feed-forward part are both a matrix by columns and then one by rows."""
    pairs = nn.Sequential(make_pair(), make_pair())
    plan = {f"{i}.{j}": kind() for i in "01" for j, kind in enumerate(_BY_CLASSES)}
    model = parallelize_module(pairs, mesh(), plan)
    x = torch.randn(N, D, requires_grad=True)
    return counted(lambda: model(x).sum())


_BY_CLASSES = (ColwiseParallel, RowwiseParallel)


def head_and_loss():
    """A head that is cut by classes, and the logits form behind it."""
    hidden, _, target = make_rows()
    head = nn.Linear(D, V, bias=False)
    head = parallelize_module(head, mesh(), ColwiseParallel())
    x = hidden.requires_grad_()
    return counted(lambda: vocab_parallel_cross_entropy(head(x), target, **place()))


def of_head():
    """What is left of these without the loss's."""
    loss, sent = counted(of_logits), head_and_loss()
    assert sent[: len(loss)] == loss
    return sent[len(loss) :]


# --- each way, counted ---------------------------------------------------------------------------


def with_gradients(inputs, names):
    for x in floating(inputs, names):
        x.requires_grad_()
    return inputs


def one(result):
    """A number of it, to begin a backward with."""
    results = result if isinstance(result, tuple) else (result,)
    return next((x.sum() for x in results if isinstance(x, torch.Tensor) and x.requires_grad), None)


# The second is no loss, and FlexAttention has no room for a counter.
ELSEWHERE = ("distributed", "packed_attention")
LEAVES = ("pred", "logits", "hidden", "head")


def of_one_process():
    """Every public function and module that is not of several processes, forward and backward."""
    found = []
    for name, calls in CALLS.items():
        if name in ELSEWHERE:
            continue
        for call in calls:
            found += counted(lambda call=call: one(call(with_gradients(entries(), LEAVES))))
    for case in CASES:
        found += counted(
            lambda case=case: one(case(case.make(), with_gradients(batch(), case.takes.values())))
        )
    return found


COUNTERS = {
    formulas.LOCAL: of_one_process,
    formulas.COUNT: lambda: counted(global_token_count, torch.ones(3, 5)),
    formulas.LOGITS: lambda: counted(of_logits),
    formulas.LINEAR: lambda: counted(of_hidden),
    formulas.STATISTICS: lambda: counted(statistics),
    formulas.SHARDS: sizes_alone,
    formulas.CUT_ROWS: lambda: counted(of_dtensor, 0),
    formulas.CUT_CLASSES: lambda: counted(of_dtensor, 1),
    formulas.STATE: lambda: counted(state),
    formulas.VOCABULARY: lambda: counted(gathered_vocabulary),
    formulas.REDUCES: lambda: counted(three_reduces),
    formulas.FLOATS: lambda: counted(three_floats),
    formulas.DDP: of_ddp,
    formulas.FSDP: of_fsdp,
    formulas.LAYERS: of_layers,
    formulas.HEAD: of_head,
}


def run(way):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch's, about itself
        return COUNTERS[way]()
