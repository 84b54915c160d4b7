# SPDX-License-Identifier: BSD-3-Clause
"""masked_linear_cross_entropy and linear_row_statistics of DTensors: rows of hidden states cut, the
classes of the weight cut, or both over different dimensions of the mesh."""

import pytest
from placed import check, data, rows_of
from torch.distributed.tensor import Replicate, Shard

from masked_loss_ext import linear_row_statistics, masked_linear_cross_entropy

R = Replicate()
# Placements of hidden [B, S, D] and of weight [V, D].
TWO = {
    "batch": ([Shard(0)], [R]),
    "sequence": ([Shard(1)], [R]),
    "classes": ([R], [Shard(0)]),
    "whole": ([R], [R]),
}
FOUR = {
    "batch": ([Shard(0)], [R]),  # one rank has no row
    "classes": ([R], [Shard(0)]),  # one has no class
    "batch, classes": ([Shard(0), R], [R, Shard(0)]),
    "sequence, classes": ([Shard(1), R], [R, Shard(0)]),
    "batch, sequence": ([Shard(0), Shard(1)], [R, R]),
}
CASES = [
    {},
    {"reduction": "sum", "mask": True, "bias": True, "chunk_rows": 2},
    {"reduction": "none", "mask": True, "temperature": True},
    {"mask": True, "class_weight": True, "label_smoothing": 0.1, "z_loss": 0.01, "bias": True},
    {"token_weight": True, "focal_gamma": 1.5, "softcap": 5.0, "normalizer": 11.0},
    {"mask": True, "token_weight": True, "reduction": "weighted_mean"},
    {"mask": True, "return_stats": True, "num_valid": 15},
]
OF_SEQUENCES = [
    {"shift": 1, "segment_ids": True, "mask": True},
    {"reduction": "sequence_mean", "segment_ids": True, "mask": True},
]


def every_case(hidden, weight):
    d = data()
    d["class_weight"] = d["weight"]
    lie = {"hidden": hidden, "weight": weight}
    for case in CASES if Shard(1) in hidden else CASES + OF_SEQUENCES:
        tensors = {"hidden": d["hidden"], "weight": d["head"], "target": d["target"]}
        tensors |= {k: d[k] if v is True and k in d else v for k, v in case.items()}
        for rows in (None, rows_of(hidden)):
            try:
                check(masked_linear_cross_entropy, tensors, {**lie, "bias": weight}, rows)
            except Exception as error:
                raise AssertionError(f"case {case}, rows {rows}") from error


def statistics(hidden, weight):
    d = data()
    lie = {"hidden": hidden, "weight": weight, "bias": weight}
    for more in (
        {"target": d["target"], "mask": d["mask"]},
        {"target": d["target"], "bias": d["bias"], "temperature": 0.7},
        {"mask": d["mask"], "softcap": 3.0},
    ):
        tensors = {"hidden": d["hidden"], "weight": d["head"], **more}
        check(lambda **a: ((), linear_row_statistics(**a)), tensors, lie, None)


@pytest.mark.parametrize("placements", TWO.values(), ids=TWO)
def test_two_ranks(ranks, placements):
    ranks(2).run(every_case, *placements)
    ranks(2).run(statistics, *placements)


@pytest.mark.parametrize("placements", FOUR.values(), ids=FOUR)
def test_four_ranks(ranks, placements):
    ranks(4).run(every_case, *placements)
    ranks(4).run(statistics, *placements)
