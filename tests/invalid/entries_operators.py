# SPDX-License-Identifier: BSD-3-Clause
"""The public operators by torch.ops: what PyTorch's schemas let through they refuse themselves."""

import inspect
from dataclasses import replace

import torch

from tests.common.operator_calls import ops
from tests.invalid.calling import Entry
from tests.invalid.entries import DOCUMENTS, LABELS, LAYER, ON, ROWS, TOKENS, WEIGHT, B, S, drawn
from tests.invalid.kinds import (
    changed,
    choice,
    floats,
    integers,
    labels,
    mask,
    number,
    unnamed,
    whole,
)

OF_PYTORCH = (TypeError, RuntimeError, ValueError, OverflowError)  # of its schemas and dispatcher
NEVER_CALLED = {
    *("a str", "a list", "a dict", "a NumPy array", "bytes", "a date", "complex", "huge"),
    *(
        "a tensor",
        "of 70 bits",
        "nested",
        "nested, jagged",
        "sparse",
        "sparse, CSR",
        "quantized",
        "on meta",
    ),
}
# What PyTorch makes a tensor, a number or nothing of.
TAKEN = {"None", "an int", "a bool", "a NumPy scalar", "with a gradient", "inf", "a 0-d tensor"}
TAKEN |= {"a tensor [2]", "a float"}


REASON = "fakes check devices alone: the functions do, and are compiled with these in their graphs"


def of_operator(kind, is_whole=False):
    def ways(good):
        for way in kind(good):
            if not way.is_wrong or way.name in TAKEN or (is_whole and way.name == "NaN"):
                continue
            if way.name in NEVER_CALLED:
                yield replace(way, verdict=OF_PYTORCH, by_pytorch=True)
            else:
                yield replace(way, is_named=False)

    return ways


def operator(name, arguments, speaks=""):
    schema = getattr(ops, name).default._schema.arguments
    types = {a.name: str(a.type) for a in schema}
    parameters = [
        inspect.Parameter(
            a.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=a.default_value if a.has_default_value() else inspect.Parameter.empty,
        )
        for a in schema
    ]

    def call(**given):
        return getattr(ops, name)(**given)

    call.__signature__ = inspect.Signature(parameters)
    known = {
        n: (good, of_operator(kind, "int" in types[n].lower()))
        for n, (good, kind) in arguments.items()
        if n in types
    }
    return Entry(speaks or name, lambda: call, known, {}, REASON, f"ops.{name}", alone=True)


NUMBERS = {
    "label_smoothing": ROWS["label_smoothing"],
    "softcap": (8.0, number(least=0)),
    "z_loss": ROWS["z_loss"],
    "focal_gamma": ROWS["focal_gamma"],
    "shift": ROWS["shift"],
}
ROWS_OF = NUMBERS | {
    "logits": ROWS["logits"],
    "target": (LABELS, unnamed(labels)),
    "mask": (ON, changed(mask, additive=None, with_NaN=None)),  # the functions look for these
    "weight": (WEIGHT, floats),
    "token_weight": (drawn(B, S).abs(), floats),
    "segment_ids": (DOCUMENTS, integers),
    "reduction": ("mean", choice),
}
LAYER_OF = ROWS_OF | {
    "hidden": LAYER["hidden"],
    "linear_weight": LAYER["weight"],
    "bias": LAYER["bias"],
    "chunk_rows": LAYER["chunk_rows"],
    "num_valid": LAYER["num_valid"],
}
SQUARES = {
    "prediction": TOKENS["model_pred"],
    "target": TOKENS["target"],
    "mask": (ON, changed(ROWS_OF["mask"][1], of_one=None, a_number=None)),
    "loss": ("huber", choice),
    "delta": (torch.tensor(0.5), floats),
    "reduction": ("mean", choice),
}
ALONE = ("longer", "longer_at_the_end", "empty", "of_one", "on_meta")  # nothing to differ from
TERMS = {n: ROWS_OF[n] for n in ("logits", "target", "mask")}
TOKEN_ROWS = {
    "tokens": (LABELS, changed(integers, **dict.fromkeys(ALONE))),
    "valid": ROWS_OF["mask"],
    "ngram_size": (2, whole(least=1)),
}
ENTRIES = [
    operator("masked_squared_error", SQUARES),
    operator("masked_cross_entropy", ROWS_OF),
    operator("linear_cross_entropy", LAYER_OF, "masked_linear_cross_entropy"),
    operator("cross_entropy_terms", TERMS),
    operator("repetition_counts", TOKEN_ROWS),
    operator("repetition_links", TOKEN_ROWS),
]
