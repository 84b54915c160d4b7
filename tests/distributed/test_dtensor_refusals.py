# SPDX-License-Identifier: BSD-3-Clause
"""What is not supported is refused in a sentence that names the placement, on every rank alike."""

import subprocess
import sys

import pytest
import torch
from placed import data, mesh_of, placed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import masked_loss_ext as m
from masked_loss_ext.distributed import vocab_parallel_cross_entropy

R = Replicate()
PLACED = "got a DTensor placed Shard(dim=0) over 'tp'"


def said(call):
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return "taken"


def refused():
    """{what: what is said of it}; f is a function of the message."""
    d, mesh = data(), mesh_of([R])
    x, y, mask = d["logits"], d["target"], d["mask"]
    h, w = d["hidden"], d["head"]
    p, t = d["prediction"], d["truth"]
    ce, linear = m.masked_cross_entropy, m.masked_linear_cross_entropy

    def at(tensor, *placements):
        return placed(tensor, mesh, list(placements))

    batch, sequence, classes = at(x, Shard(0)), at(x, Shard(1)), at(x, Shard(2))
    partial = DTensor.from_local(x, mesh, [Partial()], run_check=False)
    rows = at(y, Shard(0))
    other = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pp", "tp"))
    uneven = [1, 8] if torch.distributed.get_rank() == 0 else [8, 1]
    uneven = DTensor.from_local(
        torch.zeros(3, 5, uneven[0]), mesh, [Shard(2)], shape=x.shape, stride=x.stride()
    )
    calls = {
        "Partial": lambda: ce(partial, y),
        "plain logits": lambda: ce(x, rows),
        "plain statistics": lambda: m.row_statistics(x, None, at(mask, Shard(0))),
        "shift": lambda: ce(sequence, y, shift=1),
        "runs": lambda: ce(sequence, y, reduction="sequence_mean"),
        "token runs": lambda: m.aggregate_tokens(at(h[..., 0], Shard(1)), None, "sequence_sum"),
        "in place": lambda: ce(batch, y, inplace_backward=True),
        "sweep": lambda: ce(classes, y, gradient_in_forward=True),
        "class weights": lambda: ce(classes, y, weight=at(d["weight"], Shard(0))),
        "local labels": lambda: ce(batch, y[:2]),
        "another mesh": lambda: ce(batch, placed(y, other, [R, Shard(0)])),
        "own columns": lambda: ce(uneven, y),
        "vocabulary": lambda: vocab_parallel_cross_entropy(classes, y),
        "plain hidden": lambda: linear(h, at(w, Shard(0)), y),
        "plain weight": lambda: linear(at(h, Shard(0)), w, y),
        "hidden columns": lambda: linear(at(h, Shard(2)), at(w, R), y),
        "weight columns": lambda: linear(at(h, R), at(w, Shard(1)), y),
        "both cut": lambda: linear(at(h, Shard(0)), at(w, Shard(0)), y),
        "bias": lambda: linear(at(h, R), at(w, Shard(0)), y, bias=at(d["bias"], R)),
        "target cut": lambda: m.masked_mse(at(p, Shard(0)), at(t, Shard(1)), mask),
        "plain prediction": lambda: m.MseLoss()(p, at(t, Shard(0))),
        "channels": lambda: m.AttentionMaskMseLoss(reduction="none")(at(p, Shard(2)), t),
        "unified": lambda: m.UnifiedLoss(9)(classes, y),
        "heads": lambda: m.MultiTokenPredictionLoss(2, (1, 1))([x, x], rows),
    }
    return {what: said(call) for what, call in calls.items()}


WORDS = {
    "Partial": "masked_cross_entropy: logits must be Shard or Replicate over each mesh dimension, "
    "got Partial(sum) over 'tp': redistribute it before",
    "plain logits": f"masked_cross_entropy: target must be a plain tensor, {PLACED}: logits is",
    "plain statistics": f"row_statistics: mask must be a plain tensor, {PLACED}: logits is none",
    "shift": "masked_cross_entropy: shift must be 0 where the sequence is sharded, got 1 with "
    "logits Shard(dim=1) over 'tp': a label of the next shard is not here; shift them before",
    "runs": "masked_cross_entropy: reduction must not go by sequences where the sequence is "
    "sharded, got sequence_mean with logits Shard(dim=1) over 'tp'",
    "token runs": "aggregate_tokens: reduction must not go by sequences where the sequence is "
    "sharded, got sequence_sum with loss Shard(dim=1) over 'tp'",
    "in place": "masked_cross_entropy: inplace_backward must be False, got True with a DTensor",
    "sweep": "masked_cross_entropy: gradient_in_forward must be False, got True with logits "
    "Shard(dim=2) over 'tp'",
    "class weights": "masked_cross_entropy: weight must be Replicate, one entry per class of the "
    "whole vocabulary, got Shard(dim=0) over 'tp'",
    "local labels": "masked_cross_entropy: target must have the shape of logits [3, 5, 9] without "
    "the last dimension, got [2, 5] (of the whole, as that of a DTensor is)",
    "another mesh": "masked_cross_entropy: target must be on the mesh of logits DeviceMesh(",
    "own columns": "masked_cross_entropy: logits must hold the ",
    "vocabulary": "vocab_parallel_cross_entropy: logits must be a plain tensor, got a DTensor",
    "plain hidden": f"masked_linear_cross_entropy: weight must be a plain tensor, {PLACED}: hidden "
    "is none, so it is not known whether this is FSDP's shard",
    "plain weight": "masked_linear_cross_entropy: weight must be a DTensor beside a hidden that",
    "hidden columns": "masked_linear_cross_entropy: hidden must be whole in its last dimension, "
    "got Shard(dim=2) over 'tp'",
    "weight columns": "masked_linear_cross_entropy: weight must be Replicate or Shard(0), its "
    "classes, got Shard(dim=1) over 'tp'",
    "both cut": "masked_linear_cross_entropy: weight must not be sharded over the mesh dimension "
    "that shards the rows of hidden, got Shard(dim=0) over 'tp' beside hidden Shard(dim=0)",
    "bias": "masked_linear_cross_entropy: bias must lie as weight, Shard(dim=0) over 'tp', got "
    "Replicate() over 'tp'",
    "target cut": "masked_mse: target must be Replicate or lie as prediction, Shard(dim="
    "0) over 'tp', got Shard(dim=1) over 'tp'",
    "plain prediction": f"MseLoss: target must be a plain tensor, {PLACED}: model_pred is none",
    "channels": "AttentionMaskMseLoss: prediction must be whole in its last dimension, of which a "
    "token is the mean, got Shard(dim=2) over 'tp'",
    "unified": "UnifiedLoss: logits must be a plain tensor, got a DTensor placed Shard(dim=2)",
    "heads": f"MultiTokenPredictionLoss: labels must be a plain tensor, {PLACED}",
}


def test_sentences(ranks):
    for found in ranks(2).run(refused):
        assert found.keys() == WORDS.keys()
        for what, words in WORDS.items():
            assert found[what].startswith(words), f"{what}: {found[what]}"


def twice():
    """Two mesh dimensions that cut the vocabulary."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    d = data()
    logits = placed(d["logits"], mesh, [Shard(2), Shard(2)])
    return said(lambda: m.masked_cross_entropy(logits, d["target"]))


def test_a_vocabulary_cut_twice(ranks):
    for found in ranks(4).run(twice):
        assert found == (
            "masked_cross_entropy: logits must shard its classes over one mesh dimension, got "
            "Shard(dim=2) over 'a', Shard(dim=2) over 'b'"
        )


def test_nothing_is_imported_for_those_who_have_no_dtensor():
    code = "import sys, torch, masked_loss_ext as m; m.masked_cross_entropy(torch.zeros(2, 3), "
    code += "torch.zeros(2).long()); print('torch.distributed.tensor' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def raw():
    """The operator itself: PyTorch refuses it, whatever the placement, so nothing is silent."""
    d, mesh = data(torch.float32), mesh_of([R])
    operator = torch.ops.masked_loss_ext.masked_cross_entropy
    found = []
    for placement in (Shard(0), Shard(2), R):
        logits = placed(d["logits"], mesh, [placement])
        for target in (d["target"], placed(d["target"], mesh, [R])):
            with pytest.raises((RuntimeError, NotImplementedError)) as error:
                operator(logits, target)
            found.append(str(error.value))
    return found


def test_the_operator_itself_is_refused_by_pytorch(ranks):
    for found in ranks(2).run(raw):
        assert all("mixed torch.Tensor and DTensor" in text for text in found[::2])
        assert all("does not have a sharding strategy" in text for text in found[1::2])
