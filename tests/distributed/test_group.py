# SPDX-License-Identifier: BSD-3-Clause
"""What a group argument may be."""

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from masked_loss_ext.distributed._group import group_rank, group_size, process_group


def kinds():
    """(size, rank) of every kind of group, on one of four ranks."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    groups = [None, dist.group.WORLD, pairs[rank // 2], mesh["dp"], mesh["tp"]]
    found = [process_group("f", group) for group in groups]
    refused = []
    for group in (pairs[1 - rank // 2], init_device_mesh("cpu", (1,)), mesh, 3, "dp"):
        try:
            process_group("f", group)
        except (ValueError, TypeError) as error:
            refused.append(f"{type(error).__name__} {error}")
        else:
            refused.append("taken")
    return [(group_size(group), group_rank(group)) for group in found], refused


def test_of_four_ranks(ranks):
    for rank, (found, refused) in enumerate(ranks(4).run(kinds)):
        of_two = (2, rank % 2)
        assert found == [(4, rank), (4, rank), of_two, (2, rank // 2), of_two]
        no_member = f"f: group must contain the rank that calls, got a group that rank {rank} is"
        assert refused[0].startswith(f"ValueError {no_member}")
        if rank:  # a mesh of rank 0 alone
            assert refused[1].startswith(f"ValueError {no_member}")
        else:
            assert refused[1] == "taken"
        assert refused[2] == (
            "ValueError f: group must be a DeviceMesh of 1 dimension, got 2 dimensions "
            "('dp', 'tp'); one of them is mesh[\"name\"]"
        )
        rule = "TypeError f: group must be None, a process group or a DeviceMesh, got"
        assert refused[3:] == [f"{rule} int", f"{rule} str"]


def test_a_world_of_one_needs_no_initialisation():
    assert not dist.is_initialized()
    group = process_group("f")
    assert group is None and group_size(group) == 1 and group_rank(group) == 0
    with pytest.raises(ValueError, match="be None where torch.distributed is not initialized"):
        process_group("f", "dp")
