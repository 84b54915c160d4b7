# SPDX-License-Identifier: BSD-3-Clause
"""What a training step sends, as formulas: each collective, its bytes and how often it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Sent(NamedTuple):
    """A collective: what each rank hands over, in bytes, and how often.

    Formulas are text so that the document shows what is computed. R: ranks of the group; N: rows of
    a call, the tokens of a rank; V: classes; D: width of hidden states; K: width of the keys; P:
    parameters; L: layers; S: numbers of state; b: bytes of an element; s, e: 1 with statistics,
    with label smoothing, else 0.
    """

    kind: str
    bytes: str
    times: str = "1"


class Message(NamedTuple):
    kind: str
    bytes: int


LOCAL, COUNT, LOGITS, LINEAR, STATISTICS = "local", "count", "logits", "linear", "statistics"
SHARDS, STATE = "shards", "state"
CUT_ROWS, CUT_CLASSES = "cut_rows", "cut_classes"
VOCABULARY, REDUCES, FLOATS = "vocabulary", "reduces", "floats"
DDP, FSDP, LAYERS, HEAD, RING = "ddp", "fsdp", "layers", "head", "ring"

_ROWS = Sent("all_gather", "N * 8 * (4 + 2 * s + 2 * e) + 48")
_HIDDEN = Sent("all_reduce", "N * D * b")

OURS: dict[str, tuple[Sent, ...]] = {
    LOCAL: (),
    COUNT: (Sent("all_reduce", "8"),),
    LOGITS: (_ROWS,),
    LINEAR: (_ROWS, _HIDDEN),
    STATISTICS: (Sent("all_gather", "N * 48 + 48"),),
    SHARDS: (Sent("all_gather", "8"),),
    CUT_ROWS: (Sent("all_reduce", "8"), Sent("all_reduce", "4")),
    CUT_CLASSES: (_ROWS,),
    STATE: (Sent("all_reduce", "8 * S"),),
}
OTHERS: dict[str, tuple[Sent, ...]] = {
    VOCABULARY: (Sent("all_gather", "N * V // R * b"),),
    REDUCES: (Sent("all_reduce", "N * 4", "3"),),
    FLOATS: (Sent("all_gather", "N * 12"),),
}
MODEL: dict[str, tuple[Sent, ...]] = {
    DDP: (Sent("all_reduce", "P * b"),),
    FSDP: (Sent("all_gather", "P // R * b", "2"), Sent("reduce_scatter", "P * b")),
    LAYERS: (Sent("all_reduce", "N * D * b", "4 * L"),),
    HEAD: (_HIDDEN,),
    RING: (Sent("send", "2 * N * K * b", "(3 * R - 2) * L"),),
}
WAYS = OURS | OTHERS | MODEL
NAMES = {
    LOCAL: "`masked_*`, `UnifiedLoss`, `causal_lm_loss` and the others, of plain tensors",
    COUNT: "`global_token_count`, of a window of micro-batches",
    LOGITS: "`vocab_parallel_cross_entropy`",
    LINEAR: "`vocab_parallel_linear_cross_entropy`",
    STATISTICS: "`vocab_parallel_row_statistics`, and of the linear form",
    SHARDS: "each of these without `vocab_start` or `vocab_size`, besides",
    CUT_ROWS: "a loss of a DTensor that is cut by rows, labels too: the count, the result",
    CUT_CLASSES: "a loss of a DTensor that is cut by classes",
    STATE: "`sync_state()`, where it is called",
    VOCABULARY: "whole rows of logits gathered",
    REDUCES: "maximum, label and sum, an all-reduce each",
    FLOATS: "three floats a row gathered",
    DDP: "gradients, DDP",
    FSDP: "weights and gradients, FSDP2",
    LAYERS: "layers, tensor parallel",
    HEAD: "gradient of the head's input, tensor parallel",
    RING: "keys and values in a ring, sequence parallel",
}


def messages(way: str, **sizes: int) -> list[Message]:
    """Of one call, or of one step of the model; in order, forward before backward."""
    if sizes["R"] == 1:
        return []
    return [
        Message(sent.kind, value(sent.bytes, sizes))
        for sent in WAYS[way]
        for _ in range(value(sent.times, sizes))
    ]


def value(formula: str, sizes: Mapping[str, int]) -> int:
    """Of a formula of this file; s and e are 0 where they are not given."""
    return eval(formula, {"__builtins__": {}}, {"s": 0, "e": 0, **sizes})
