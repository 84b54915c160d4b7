# SPDX-License-Identifier: BSD-3-Clause
"""Rows of logits and of hidden states that do not count: families of excluded_cases.py."""

import torch
from closed_pages import PAGE
from excluded_case import (
    BF16,
    DOUBLE,
    FLOAT,
    HALF,
    Case,
    case,
    forward_results,
    full,
    generator,
    many_rows,
    on_pages,
    randn,
)  # fmt: skip
from operator_calls import ops

from masked_loss_ext.reference.cross_entropy import counted_rows

# --- cross entropy -------------------------------------------------------------------------------

EVERYTHING = {
    "label_smoothing": 0.1, "softcap": 8.0, "z_loss": 0.01, "focal_gamma": 1.5,
    "statistics": True, "weight": True, "token_weight": True, "temperature": True,
}  # fmt: skip
ROW_OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "statistics alone": {"statistics": True, "target": None},
    "label_smoothing": {"label_smoothing": 0.1, "weight": True},
    "softcap": {"softcap": 8.0},
    "z_loss": {"z_loss": 0.01},
    "focal_gamma": {"focal_gamma": 2.0},
    "token_weight": {"token_weight": True},
    "temperature": {"temperature": True},
    "normalizer": {"normalizer": torch.tensor(3.0)},
    "schedule": {"schedule": torch.tensor([0.1, 8.0, 0.01, 1.5], dtype=DOUBLE)},
    "shift": {"shift": 1},
    "segment_ids": {"shift": 2, "segment_ids": True, "reduction": "none"},
    "everything": EVERYTHING,
    "everything shifted": {**EVERYTHING, "shift": 1, "reduction": "sum"},
    "ignore_index": {"ignore_index": 3, "by_label": True},
}
SWEPT = ("plain", "sum", "label_smoothing", "softcap", "focal_gamma", "token_weight", "shift",
         "ignore_index")  # fmt: skip
BATCH, LENGTH = 2, 6
# which rows' labels the mask excludes, the last row's and neighbours among them
OFF_LABELS = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 0, 1, 0, 1]]).bool()


def row_arguments(options, classes, dtype):
    """What operators take of rows besides their logits; which rows do not count; what of all of
    it is excluded."""
    o = dict(options)
    g, wide = generator(), DOUBLE if dtype == DOUBLE else FLOAT
    target = torch.randint(classes, OFF_LABELS.shape, generator=g)
    given = {"target": target, "mask": ~OFF_LABELS}
    if o.pop("by_label", False):
        given = {"target": target.masked_fill(target == 3, 4).masked_fill(OFF_LABELS, 3)}
    excluded = {} if "mask" not in given else {"target": OFF_LABELS}
    if "target" in o:
        excluded.pop("target")
    if o.pop("weight", False):
        o["weight"] = torch.rand(classes, generator=g).to(wide)
    if o.pop("token_weight", False):
        o["token_weight"] = torch.rand(OFF_LABELS.shape, generator=g)
        excluded["token_weight"] = OFF_LABELS if "mask" in given else torch.zeros(()).bool()
    if o.pop("segment_ids", False):
        o["segment_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
    given |= o
    rows = torch.zeros(*OFF_LABELS.shape, 1)
    labels, off = given["target"], OFF_LABELS if "mask" in given else None
    more = (o.get("ignore_index", -100), o.get("shift", 0), o.get("segment_ids"))
    off = ~counted_rows(rows, labels, None if off is None else ~off, *more)[1]
    if o.pop("temperature", False):
        given["temperature"] = (torch.rand(OFF_LABELS.shape, generator=g) + 0.5).to(wide)
        excluded["temperature"] = off
    return given, off, excluded


def upstream(forward, given, off):
    """Gradients of the results; nothing of those of rows that do not count may be read."""
    found, excluded = {}, {}
    names = ("loss", "lse", "entropy", "log_prob") if given.get("statistics") else ("loss",)
    for name in names:
        if name in forward and forward[name].shape != (0,):
            grad = torch.rand(forward[name].shape, generator=generator())
            found[f"grad_{name}"] = grad.to(forward[name].dtype)
            if grad.shape == off.shape:
                excluded[f"grad_{name}"] = off
    return found, excluded


def results_of_rows(forward):
    return {n: x for n, x in forward.items() if n not in ("loss", "lse", "hit", "argmax")}


def cross_entropies():
    for name, options in ROW_OPTIONS.items():
        few = name not in ("plain", "everything", "shift")
        for dtype in (FLOAT,) if few else (FLOAT, BF16, HALF, DOUBLE):
            columns = 2 * PAGE // dtype.itemsize - (0 if dtype == FLOAT else 3)
            yield from cross_entropy(f"{name} {dtype}", options, columns, dtype, name in SWEPT)
    # in pieces; with several columns an entry
    yield from cross_entropy("pieces", EVERYTHING, 4 * (1 << 13) + 1024, FLOAT, False)
    yield from cross_entropy("swept pieces", {}, 4 * (1 << 13) + 1024, FLOAT, True)


def cross_entropy(name, options, columns, dtype, swept):
    given, off, excluded = row_arguments(options, columns, dtype)
    given["logits"] = on_pages(3 * randn(BATCH, LENGTH, columns, dtype=dtype))
    wide = off[..., None].expand(BATCH, LENGTH, columns)
    excluded["logits"] = wide
    yield case(name, "masked_cross_entropy", given, excluded)
    forward = forward_results("masked_cross_entropy", given)
    grads, closed = upstream(forward, given, off)
    back = {**results_of_rows(forward), **given, **grads}
    back["needs_token_weight"] = given.get("token_weight") is not None
    closed = excluded | closed
    yield case(name, "_masked_cross_entropy_backward", back, closed, {"grad_logits": wide})
    in_place = {**back, "logits": back["logits"].clone(memory_format=torch.contiguous_format)}
    yield case(name, "_masked_cross_entropy_backward_", in_place, closed, {"logits": wide})
    if swept:
        yield case(name, "_masked_cross_entropy_sweep", given, excluded, {"grad_logits": wide})
        in_place = {**given, "logits": in_place["logits"]}
        yield case(name, "_masked_cross_entropy_sweep_", in_place, excluded, {"logits": wide})


def cross_entropy_of_rows():
    """Labels, weights, temperatures of rows that a mask excludes, whole pages of them."""
    off = many_rows()
    n = len(off)
    given = {"logits": randn(n, 4), "target": torch.randint(4, (n,), generator=generator())}
    given |= {"mask": ~off, "token_weight": torch.rand(n), "temperature": torch.rand(n) + 0.5}
    excluded = dict.fromkeys(("target", "token_weight", "temperature"), off)
    excluded["logits"] = off[:, None].expand(n, 4)
    given["reduction"] = "none"
    yield case("numbers of rows", "masked_cross_entropy", given, excluded)
    forward = forward_results("masked_cross_entropy", given)
    grads, closed = upstream(forward, given, off)
    given = {**results_of_rows(forward), **given, **grads}
    closed |= excluded
    yield case("numbers of rows", "_masked_cross_entropy_backward", given, closed,
               {"grad_logits": excluded["logits"]})  # fmt: skip


def scaling_by_1():
    gradient = randn(3, PAGE // 4)
    given = {"grad_logits": gradient, "grad_loss": torch.tensor(1.0)}
    off = torch.ones_like(gradient, dtype=torch.bool)
    yield Case("by 1", "_masked_cross_entropy_scale_gradient_", given, {"grad_logits": off})


# --- a shard of the vocabulary -------------------------------------------------------------------


def shards():
    for name in ("plain", "none", "label_smoothing", "everything", "segment_ids"):
        for form, columns in (("cross_entropy", 2 * PAGE // 4 - 3), ("linear_cross_entropy", 7)):
            given, off, excluded = row_arguments(ROW_OPTIONS[name], columns, FLOAT)
            given |= {"vocab_start": 0, "vocab_size": columns}
            if form == "cross_entropy":
                layer = {"logits": on_pages(3 * randn(BATCH, LENGTH, columns))}
                rows = {"logits": off[..., None].expand(BATCH, LENGTH, columns)}
            else:
                layer, wide = linear_layer(columns, FLOAT, off)
                rows = {"hidden": wide}
            given |= layer
            yield from shard_passes(name, form, given, off, excluded, rows)


def shard_passes(name, form, given, off, excluded, rows):
    sums, forward = f"_vocab_parallel_{form}_sums", f"vocab_parallel_{form}"
    excluded = excluded | rows
    yield case(name, sums, given, excluded)
    given = {**given, "messages": forward_results(sums, given)[
        getattr(ops, sums).default._schema.returns[0].name
    ].unsqueeze(0)}  # fmt: skip
    # the results follow from the messages: no logit, no hidden state is read
    (rows_name,) = rows
    whole = {rows_name: torch.ones_like(rows[rows_name])}
    yield case(name, forward, given, excluded | whole)
    found = forward_results(forward, given)
    grads, closed = upstream(found, given, off)
    back = {**results_of_rows(found), **given, **grads}
    back["needs_token_weight"] = given.get("token_weight") is not None
    closed = excluded | closed
    zeros = {f"grad_{rows_name}": rows[rows_name]}
    yield case(name, f"_{forward}_backward", back, closed, zeros)
    if form == "cross_entropy":
        back["logits"] = back["logits"].clone(memory_format=torch.contiguous_format)
        yield case(name, f"_{forward}_backward_", back, closed, rows)


# --- from hidden states --------------------------------------------------------------------------


def linear_layer(classes, dtype, off):
    width = 2 * PAGE // dtype.itemsize - (0 if dtype == FLOAT else 3)
    hidden = on_pages(randn(BATCH, LENGTH, width, dtype=dtype))
    weight = (randn(classes, width) / width**0.5).to(dtype)
    layer = {"hidden": hidden, "linear_weight": weight, "bias": randn(classes, dtype=dtype)}
    return layer, off[..., None].expand(hidden.shape)


def linear_cross_entropies():
    for name in ("plain", "none", "everything", "everything shifted", "segment_ids", "ignore_index",
                 "token_weight"):  # fmt: skip
        for dtype, chunk_rows in ((FLOAT, None), (FLOAT, 2), (BF16, 2), (DOUBLE, None)):
            if dtype != FLOAT and name not in ("plain", "everything"):
                continue
            given, off, excluded = row_arguments(ROW_OPTIONS[name], 7, dtype)
            layer, wide = linear_layer(7, dtype, off)
            given |= {**layer, "chunk_rows": chunk_rows}
            swept = name in SWEPT
            yield from linear(
                f"{name} {dtype} chunk {chunk_rows}", given, off, excluded, wide, swept
            )


def linear(name, given, off, excluded, wide, swept):
    excluded = {**excluded, "hidden": wide}
    yield case(name, "linear_cross_entropy", given, excluded)
    forward = forward_results("linear_cross_entropy", given)
    grads, closed = upstream(forward, given, off)
    back = {**results_of_rows(forward), **given, **grads}
    zeros = {"grad_hidden": wide}
    yield case(name, "_linear_cross_entropy_backward", back, excluded | closed, zeros)
    if swept:
        yield case(name, "_linear_cross_entropy_sweep", given, excluded, zeros)


# --- the terms of language models ----------------------------------------------------------------


def all_terms():
    for dtype in (FLOAT, BF16, DOUBLE):
        columns = 2 * PAGE // dtype.itemsize - (0 if dtype == FLOAT else 3)
        given, off, excluded = row_arguments({}, columns, dtype)
        classes = torch.stack(
            [given["target"].roll(1, -1), torch.full_like(given["target"], 3)], -1
        )
        before, after = ops.repetition_links.default(given["target"] % 2, ~off, 2)
        given["logits"] = on_pages(3 * randn(BATCH, LENGTH, columns, dtype=dtype))
        wide = off[..., None].expand(BATCH, LENGTH, columns)
        excluded = {**excluded, "logits": wide}
        options = {"temperature": torch.tensor(0.8, dtype=DOUBLE), "classes": classes}
        options |= {"context_before": before, "ngram_after": after}
        scaled = {"temperature": options["temperature"], "unscaled": False}
        for name, more in (("all", options), ("at 1", {}), ("scaled", scaled)):
            yield from terms(f"{name} {dtype}", given | more, off, excluded, wide)


def terms(name, given, off, excluded, wide):
    given = full("cross_entropy_terms", given)
    closed = dict(excluded)
    if given.get("classes") is not None:
        closed["classes"] = off[..., None].expand(given["classes"].shape)
    yield case(name, "cross_entropy_terms", given, closed)
    found = forward_results("cross_entropy_terms", given)
    grads = {f"grad_{n}": torch.rand_like(x) for n, x in found.items()
             if n not in ("sums", "candidates") and x.shape != (0,)}  # fmt: skip
    closed |= {n: off[..., None].expand(x.shape) if x.dim() > off.dim() else off
               for n, x in grads.items()}  # fmt: skip
    given = {**given, **grads, "sums": found["sums"]}
    yield case(name, "_cross_entropy_terms_backward", given, closed, {"grad_logits": wide})
