# SPDX-License-Identifier: BSD-3-Clause
"""A call on DTensors beside the same call of one process, values and gradients."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

_CONSTANT = ("temperature", "weight", "class_weight", "edit_mask", "attention_mask")
_PER_ROW = ("target", "mask", "token_weight", "segment_ids", "temperature")
B, S, V, D = 3, 5, 9, 4  # of 2 ranks uneven parts, of 4 empty ones of samples and classes


def data(dtype=torch.float64):
    """The same on every rank; the last sample has no label."""
    g = torch.Generator().manual_seed(7)
    target = torch.randint(V, (B, S), generator=g)
    target[0, 2:] = -100
    target[2] = -100
    made = {
        "target": target,
        "mask": torch.rand(B, S, generator=g) < 0.8,
        "segment_ids": torch.tensor([[0, 0, 1, 1, 1]] * B),
        "token_weight": torch.rand(B, S, generator=g, dtype=dtype),
        "temperature": 0.5 + torch.rand(B, S, generator=g, dtype=dtype),
        "weight": torch.rand(V, generator=g, dtype=dtype),
    }
    sizes = {"logits": (B, S, V), "hidden": (B, S, D), "head": (V, D), "bias": (V,)}
    sizes |= {"prediction": (B, S, D), "truth": (B, S, D), "weighting": (B, S, D)}
    return made | {
        name: torch.randn(size, generator=g, dtype=dtype) for name, size in sizes.items()
    }


def mesh_of(placements):
    """Of all ranks, with a dimension for each placement."""
    world = torch.distributed.get_world_size()
    if len(placements) == 1:
        return init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    return init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))


def placed(tensor, mesh, placements):
    """A DTensor, without a message: every rank has the whole."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def rows_of(placements, dims=2):
    """How what has one entry per row lies beside a tensor with these."""
    return [p if p.is_shard() and p.dim < dims else Replicate() for p in placements]


def results(found):
    """(loss, *statistics) of all that a call may return, without what is None."""
    loss, stats = found if type(found) is tuple else (found, ())
    loss = tuple(loss) if isinstance(loss, tuple) else (loss,)
    return [x for x in (*loss, *stats) if x is not None]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def backward(found):
    """Of a sum in which every result that has a gradient weighs something else."""
    parts = [(i + 1) * x.sum() for i, x in enumerate(results(found)) if x.requires_grad]
    sum(parts[1:], parts[0]).backward()


def check(call, tensors, placements, rows_dtensor):
    """call(**tensors) of plain tensors, and with those that are named in ``placements`` as
    DTensors of the mesh that these need. rows_dtensor: how others are cut, which else stay plain.
    """
    mesh = mesh_of(next(iter(placements.values())))
    plain, sharded = {}, {}
    for name, value in tensors.items():
        plain[name] = sharded[name] = value
        if not isinstance(value, torch.Tensor):
            continue
        floating = value.is_floating_point() and name not in _CONSTANT
        plain[name] = value.clone().requires_grad_(floating)
        cut = placements.get(name, rows_dtensor if name in _PER_ROW else None)
        there = value.clone() if cut is None else placed(value, mesh, cut)
        sharded[name] = there.requires_grad_(floating)
    expected, found = call(**plain), call(**sharded)
    pairs = list(zip(results(found), results(expected), strict=True))
    for x, y in pairs:
        assert isinstance(x, DTensor)
        torch.testing.assert_close(x.full_tensor(), y)
        if y.dim() == 0:  # and nobody has a share of it alone
            torch.testing.assert_close(x.to_local(), y)
    backward(expected)
    backward(found)
    for name, tensor in plain.items():
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            torch.testing.assert_close(whole(sharded[name].grad), tensor.grad)
            if name in placements:
                check_placements(sharded[name].grad, placements[name], mesh)


# Of an uneven shard older to_local() gives back a gradient that all ranks have whole: seen in 2.11.
WHOLE_WHERE_UNEVEN = torch.__version__ < (2, 12)


def check_placements(gradient, expected, mesh):
    """Where it is cut; what is whole may come as shares that are still to be added up."""
    uneven = any(
        p.is_shard() and gradient.shape[p.dim] % mesh.size(i) for i, p in enumerate(expected)
    )
    for found, wanted in zip(gradient.placements, expected, strict=True):
        shares = found.is_partial() and wanted.is_replicate()
        whole = WHOLE_WHERE_UNEVEN and uneven and found.is_replicate()
        assert found == wanted or shares or whole, (gradient.placements, expected)
