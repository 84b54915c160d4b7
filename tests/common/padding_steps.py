# SPDX-License-Identifier: BSD-3-Clause
"""Batches, a model and readers of reports for the tests of check_padding."""

import torch
import torch.nn.functional as F
from torch import nn

B, T, V, D = 3, 6, 11, 8
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
LEFT = RIGHT.flip(1)
RANDOM = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1], [1, 1, 0, 1, 0, 1]])
MASKS = {"right": RIGHT, "left": LEFT, "random": RANDOM}


def language_batch(mask=RIGHT, **extra):
    return {
        "logits": torch.randn(B, T, V),
        "labels": torch.randint(V, (B, T)),
        "attention_mask": mask,
    } | extra


def pair_batch(mask=RIGHT):
    return {"pred": torch.randn(B, T, D), "target": torch.randn(B, T, D), "mask": mask}


def leaking(report):
    """(entry, kind) of each run that leaks."""
    return {(change.entry, change.kind) for change in report.leaks}


def change(report, entry, kind):
    return next(c for c in report.changes if (c.entry, c.kind) == (entry, kind))


class TinyEncoder(nn.Module):
    """Token ids or vectors -> logits; ``how`` the attention gets its mask."""

    def __init__(self, how="bool", dropout=0.0):
        super().__init__()
        self.how = how
        self.embed = nn.Embedding(V, D)
        layer = nn.TransformerEncoderLayer(D, 2, 16, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(D, V)

    def forward(self, batch):
        x = self.embed(batch["ids"]) if "ids" in batch else batch["x"]
        padding = batch["attention_mask"] == 0
        if self.how == "float":
            padding = torch.zeros(padding.shape).masked_fill(padding, -float("inf"))
        x = self.encoder(x, src_key_padding_mask=None if self.how == "none" else padding)
        return self.head(x)


def ignored_cross_entropy(logits, batch):
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return F.cross_entropy(logits.mT, labels)
