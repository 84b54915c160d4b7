# SPDX-License-Identifier: BSD-3-Clause
"""The squared errors, aggregate_tokens and the losses of several heads called on DTensors."""

import pytest
import torch
from placed import check, data, rows_of
from torch.distributed.tensor import Replicate, Shard

import masked_loss_ext as m

R = Replicate()
TWO = {"batch": [Shard(0)], "sequence": [Shard(1)], "channels": [Shard(2)], "whole": [R]}
FOUR = {"batch": [Shard(0)], "batch, channels": [Shard(0), Shard(2)], "both": [Shard(0), Shard(1)]}


def token_losses(placements, rows_dtensor):
    """Of losses [B, T, C] with masks [B, T]."""
    d = data()
    rows = rows_of(placements) if rows_dtensor else None
    mask, edit = d["mask"], d["token_weight"]
    target_as = [placements] if rows_dtensor else [None, [R] * len(placements)]
    calls = [
        (m.MseLoss(), {}),
        (m.MseLoss("none"), {"weighting": d["weighting"]}),
        (m.MseLoss(), {"weighting": d["weighting"][0], "attention_mask": mask}),
        (m.MseLoss("sum"), {"weighting": d["weighting"][0, 0], "attention_mask": mask[:1]}),
        (m.MaskEditLoss(), {"attention_mask": mask, "edit_mask": edit}),
    ]
    if Shard(2) not in placements:
        calls.append((m.MaskEditLoss(), {"edit_mask": edit, "reduction": "weighted_mean"}))
        calls.append((m.AttentionMaskMseLoss(), {"attention_mask": mask, "edit_mask": edit}))
        for reduction in ("sum", "none", "weighted_mean"):
            loss_fn = m.AttentionMaskMseLoss(reduction=reduction, loss="huber")
            calls.append((loss_fn, {"attention_mask": mask.double() / 2}))
        calls.append((m.AttentionMaskMseLoss(), {"attention_mask": mask, "normalizer": 7.0}))
        if Shard(1) not in placements:
            for reduction in ("sequence_mean", "sequence_sum"):
                loss_fn = m.AttentionMaskMseLoss(reduction=reduction)
                calls.append((loss_fn, {"attention_mask": mask}))
    for loss_fn, more in calls:
        for target in target_as:
            tensors = {"model_pred": d["prediction"], "target": d["truth"], **more}
            lie = {"model_pred": placements}
            if target is not None:
                lie["target"] = target
            if rows is not None:
                lie |= {k: rows for k in ("attention_mask", "edit_mask") if k in more}
                lie = {k: v for k, v in lie.items() if k not in more or more[k].shape[0] == 3}
            try:
                check(loss_fn, tensors, lie, None)
            except Exception as error:
                raise AssertionError(f"{loss_fn} {list(more)} {target}") from error


def reconstruction(placements):
    d = data()
    for mask in (d["mask"], d["mask"][:, :1], d["prediction"] > 0):
        for call, reduction in (
            (m.masked_sse, "batch_mean"),
            (m.masked_sse, "sum"),
            (m.masked_mse, "mean"),
        ):
            tensors = {"x_recon": d["prediction"], "x": d["truth"], "mask": mask}
            tensors["reduction"] = reduction
            check(call, tensors, {"x_recon": placements}, None)
    tensors["normalizer"] = 13.0
    check(call, tensors, {"x_recon": placements}, None)


@pytest.mark.parametrize("rows", [False, True], ids=["plain", "DTensor"])
@pytest.mark.parametrize("placements", TWO.values(), ids=TWO)
def test_two_ranks(ranks, placements, rows):
    ranks(2).run(token_losses, placements, rows)


@pytest.mark.parametrize("placements", FOUR.values(), ids=FOUR)
def test_four_ranks(ranks, placements):
    ranks(4).run(token_losses, placements, True)
    ranks(4).run(reconstruction, placements)


@pytest.mark.parametrize("placements", TWO.values(), ids=TWO)
def test_reconstruction(ranks, placements):
    ranks(2).run(reconstruction, placements)


def aggregated(placements):
    d = data()
    cut = Shard(1) in placements
    reductions = ["mean", "sum", "none", "weighted_mean"]
    for reduction in reductions if cut else [*reductions, "sequence_mean", "sequence_sum"]:
        tensors = {"loss": d["token_weight"] ** 2, "mask": d["mask"], "reduction": reduction}
        tensors["token_weight"] = d["temperature"]
        if not cut:
            tensors["segment_ids"] = d["segment_ids"]
        for rows in (None, rows_of(placements)):
            check(m.aggregate_tokens, tensors, {"loss": placements}, rows)


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)], [R]], ids=str)
def test_aggregate_tokens(ranks, placements):
    ranks(2).run(aggregated, placements)


def heads(placements):
    d = data()
    for options in ({}, {"mask_sources": True}, {"renormalize_empty_heads": True}):
        loss_fn = m.MultiTokenPredictionLoss(2, (3.0, 1.0), **options)

        def call(logits, second, target, mask, loss_fn=loss_fn):
            return loss_fn([logits, second], target, mask)[0]

        tensors = {"logits": d["logits"], "second": d["logits"].flip(0)}
        tensors |= {"target": d["target"], "mask": d["mask"]}
        check(call, tensors, {"logits": placements, "second": placements}, None)


def causal(placements):
    from masked_loss_ext.integrations.transformers import causal_lm_loss

    d = data()

    def call(logits, target, **options):
        return causal_lm_loss({"logits": logits}, target, **options)

    for options in ({}, {"num_items_in_batch": torch.tensor(7)}, {"z_loss": 1e-3}):
        tensors = {"logits": d["logits"], "target": d["target"], **options}
        check(call, tensors, {"logits": placements}, None)


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(2)], [R]], ids=str)
def test_losses_of_language_models(ranks, placements):
    ranks(2).run(heads, placements)


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(2)], [R]], ids=str)
def test_the_loss_of_the_trainer(ranks, placements):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install .[hf]")
    ranks(2).run(causal, placements)
