# SPDX-License-Identifier: BSD-3-Clause
"""Every operator by name, private ones included, and a good call of each as a dict of arguments."""

import torch

import masked_loss_ext  # noqa: F401 (makes the operators)

ops = torch.ops.masked_loss_ext
RETURNING_STRINGS = {"_half_products", "_version", "cpu_capability"}  # and taking nothing

X, Y = torch.randn(2, 4), torch.tensor([1, 3])
WEIGHT, BIAS = torch.randn(5, 4), torch.randn(5)
LAYER = {"hidden": X, "linear_weight": WEIGHT, "bias": BIAS, "target": Y}
LOGITS, LABELS = torch.randn(1, 2, 4), torch.tensor([[1, 3]])
LINKS = (torch.full((1, 2), -1, dtype=torch.int32), torch.full((1, 2), 2, dtype=torch.int32))
OFFSETS, KEPT = torch.tensor([0, 2, 4]), torch.tensor([[1], [2]])
PUBLIC = {
    "masked_squared_error": {"prediction": X, "target": X + 1, "reduction": "token"},
    "masked_cross_entropy": {"logits": X, "target": Y, "reduction": "sum"},
    "cross_entropy_terms": {
        "logits": LOGITS,
        "target": LABELS,
        "context_before": LINKS[0],
        "ngram_after": LINKS[1],
    },
    "interval_block_lists": {
        "lo": torch.zeros(1, 1, 4, dtype=torch.int32),
        "hi": torch.full((1, 1, 4), 4, dtype=torch.int32),
        "kv_len": 4,
    },
    "packed_rows": {"segment_offsets": OFFSETS, "kept": KEPT, "rows": 4, "mode": "causal"},
    "nested_dropout_plan": {
        "segment_offsets": OFFSETS,
        "kept": KEPT,
        "rows": 4,
        "dropped": "self",
    },
    "repetition_counts": {"tokens": LABELS},
    "repetition_links": {"tokens": LABELS},
    "_snapshot": {"tensor": X},
    "linear_cross_entropy": {**LAYER, "reduction": "none", "chunk_rows": 1},
    "_linear_cross_entropy_sweep": {**LAYER, "chunk_rows": 1},
    "_vocab_parallel_cross_entropy_sums": {"logits": X, "target": Y, "vocab_size": 4},
    "_vocab_parallel_linear_cross_entropy_sums": {**LAYER, "vocab_size": 5},
    "_masked_cross_entropy_sweep": {"logits": X, "target": Y, "reduction": "sum"},
    "_masked_cross_entropy_sweep_": {"logits": X.clone(), "target": Y, "reduction": "sum"},
    "_masked_cross_entropy_scale_gradient_": {
        "grad_logits": X.clone(),
        "grad_loss": torch.tensor(1.0),
    },
}
# The arguments of a backward are those of its forward, its results, gradients and yes.
BACKWARD = {
    "_masked_squared_error_backward": "masked_squared_error",
    "_masked_cross_entropy_backward": "masked_cross_entropy",
    "_masked_cross_entropy_backward_": "masked_cross_entropy",
    "_cross_entropy_terms_backward": "cross_entropy_terms",
    "_linear_cross_entropy_backward": "linear_cross_entropy",
    "_vocab_parallel_cross_entropy_backward": "vocab_parallel_cross_entropy",
    "_vocab_parallel_cross_entropy_backward_": "vocab_parallel_cross_entropy",
    "_vocab_parallel_linear_cross_entropy_backward": "vocab_parallel_linear_cross_entropy",
}
for _name in ("vocab_parallel_cross_entropy", "vocab_parallel_linear_cross_entropy"):
    _given = PUBLIC[f"_{_name}_sums"]
    _message = getattr(ops, f"_{_name}_sums")(**_given)
    PUBLIC[_name] = {**_given, "messages": _message.unsqueeze(0)}


def arguments_of(name, calls=PUBLIC):
    """calls: the arguments of each operator that is no backward, by its name."""
    if name in calls:
        return calls[name]
    forward = getattr(ops, BACKWARD[name]).default
    given = {a.name: a.default_value for a in forward._schema.arguments if a.has_default_value()}
    given |= calls[BACKWARD[name]]
    given |= {name: x.clone() for name, x in given.items() if name == "logits"}
    results = forward(**given)
    results = dict(zip([r.name for r in forward._schema.returns], results, strict=True))
    given = {**results, **given}
    first = next(iter(results))
    given |= {f"grad_{first}": torch.ones_like(results[first])}
    wanted = [a.name for a in getattr(ops, name).default._schema.arguments]
    return {a: given.get(a, True if a.startswith("needs_") else None) for a in wanted}


def operators():
    """Of the dispatcher, so that none is left out."""
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names()
             if name.startswith("masked_loss_ext::")}  # fmt: skip
    return sorted({name.partition(".")[0] for name in names})
