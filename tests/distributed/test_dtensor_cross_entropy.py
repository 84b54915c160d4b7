# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy and row_statistics called on DTensors: what one process has of the whole is
what all ranks have, values and gradients, however rows and classes are cut."""

import math

import pytest
import torch
from placed import S, check, data, mesh_of, placed, rows_of
from torch.distributed.tensor import Replicate, Shard

from masked_loss_ext import masked_cross_entropy, row_statistics

R = Replicate()
TWO = {"batch": [Shard(0)], "sequence": [Shard(1)], "classes": [Shard(2)], "whole": [R]}
FOUR = {
    "batch": [Shard(0)],  # one rank has no row
    "classes": [Shard(2)],
    "batch, classes": [Shard(0), Shard(2)],
    "batch, sequence": [Shard(0), Shard(1)],
    "batch twice": [Shard(0), Shard(0)],
    "sequence, classes": [Shard(1), Shard(2)],
    "whole, classes": [R, Shard(2)],
    "batch, whole": [Shard(0), R],
}
# True: of data().
CASES = [
    {},
    {"reduction": "sum", "mask": True},
    {"reduction": "none", "mask": True, "temperature": True},
    {"mask": True, "weight": True, "label_smoothing": 0.1, "z_loss": 0.01},
    {"token_weight": True, "focal_gamma": 1.5, "softcap": 5.0},
    {"normalizer": 11.0, "temperature": 0.7},
    {"mask": True, "token_weight": True, "reduction": "weighted_mean"},
    {"mask": True, "return_stats": True},
]
OF_SEQUENCES = [  # which are not cut
    {"shift": 1, "segment_ids": True, "mask": True},
    {"reduction": "sequence_mean", "segment_ids": True, "mask": True},
    {"reduction": "sequence_sum", "weight": True},
]


def hand_worked():
    """Four rows of two equal logits, of which three count: ln 2, ln 2, ln 2 over 3."""
    mesh = mesh_of([R])
    logits = placed(torch.zeros(4, 2), mesh, [Shard(0)]).requires_grad_()
    target = torch.tensor([0, 1, 1, -100])
    loss = masked_cross_entropy(logits, target)
    loss.backward()
    classes = placed(torch.zeros(4, 2), mesh, [Shard(1)])
    return (
        loss.item(),
        logits.grad.full_tensor().tolist(),
        masked_cross_entropy(classes, target).item(),
    )


def test_hand_worked(ranks):
    for loss, gradient, of_classes in ranks(2).run(hand_worked):
        assert loss == of_classes == pytest.approx(math.log(2))
        a = 0.5 / 3
        assert gradient == [pytest.approx(row) for row in ([-a, a], [a, -a], [a, -a], [0, 0])]


def every_case(placements, rows):
    d = data()
    rows = rows_of(placements) if rows == "DTensor" else None
    for case in CASES if Shard(1) in placements else CASES + OF_SEQUENCES:
        keywords = {name: d[name] if value is True and name in d else value
                    for name, value in case.items()}  # fmt: skip
        tensors = {"logits": d["logits"], "target": d["target"], **keywords}
        try:
            check(masked_cross_entropy, tensors, {"logits": placements}, rows)
        except Exception as error:
            raise AssertionError(f"case {case}") from error


@pytest.mark.parametrize("rows", ["plain", "DTensor"])
@pytest.mark.parametrize("placements", TWO.values(), ids=TWO)
def test_two_ranks(ranks, placements, rows):
    ranks(2).run(every_case, placements, rows)


@pytest.mark.parametrize("rows", ["plain", "DTensor"])
@pytest.mark.parametrize("placements", FOUR.values(), ids=FOUR)
def test_four_ranks(ranks, placements, rows):
    ranks(4).run(every_case, placements, rows)


def statistics(placements):
    d = data()
    for keywords in (
        {"target": d["target"], "mask": d["mask"]},
        {"target": d["target"], "temperature": d["temperature"], "softcap": 3.0},
        {"target": None, "mask": d["mask"]},
    ):
        tensors = {"logits": d["logits"], **keywords}
        for rows in (None, rows_of(placements)):
            check(lambda **a: ((), row_statistics(**a)), tensors, {"logits": placements}, rows)


@pytest.mark.parametrize("placements", TWO.values(), ids=TWO)
def test_row_statistics(ranks, placements):
    ranks(2).run(statistics, placements)


def other_forms():
    """Classes in the middle, sizes of 1 that stand for all, one sample, half precision."""
    d = data()
    images = d["logits"].movedim(2, 1)
    for cut in ([Shard(0)], [Shard(1)], [Shard(2)]):
        tensors = {"logits": images, "target": d["target"], "class_dim": 1}
        check(masked_cross_entropy, tensors, {"logits": cut}, None)
    for cut in ([Shard(0)], [Shard(2)]):
        tensors = {"logits": d["logits"], "target": d["target"], "mask": d["mask"][:1]}
        tensors |= {
            "token_weight": d["token_weight"][:, :1],
            "temperature": d["temperature"][:, :1],
        }
        check(masked_cross_entropy, tensors, {"logits": cut}, None)
        tensors = {"logits": d["logits"][:1], "target": d["target"][:1], "shift": 1}
        check(masked_cross_entropy, tensors, {"logits": cut}, None)
        tensors = {"logits": d["logits"].bfloat16(), "target": d["target"].to(torch.int32)}
        check(masked_cross_entropy, tensors, {"logits": cut}, None)
        tensors = {"logits": d["logits"], "target": torch.full((3, S), -100)}
        check(masked_cross_entropy, tensors, {"logits": cut}, None)
    tensors = {"logits": d["logits"], "target": d["target"], "gradient_in_forward": True}
    check(masked_cross_entropy, tensors, {"logits": [Shard(0)]}, None)
    count = placed(d["target"] != -100, mesh_of([R]), [Shard(0)]).sum()  # still to be added up
    for cut in ([Shard(0)], [Shard(2)]):
        logits = placed(d["logits"], mesh_of([R]), cut)
        found = masked_cross_entropy(logits, d["target"], normalizer=count)
        torch.testing.assert_close(found.to_local(), masked_cross_entropy(d["logits"], d["target"]))


def test_other_forms(ranks):
    ranks(2).run(other_forms)
