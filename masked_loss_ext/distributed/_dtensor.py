# SPDX-License-Identifier: BSD-3-Clause
"""The ordinary functions called on DTensors: each rank calls them on what it has.

Rows are local. What a mean divides by is counted first, over all ranks, and given to the local call
as ``normalizer``, so that its results are shares of one sum. Rows whose classes are sharded go by
``vocab_parallel_cross_entropy``. The functions of ops/ come here with their own arguments; nothing
else does, and nothing here is imported before a DTensor is met.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from .. import _aggregate
from .._checks import as_mask, check_tensor, is_dtensor, placements_text, refusal, shape_text
from ..ops import linear_cross_entropy as of_hidden
from ..ops import masked_cross_entropy as of_logits
from ..ops.masked_cross_entropy_checks import classes_last
from ..ops.masked_squared_error import masked_squared_error
from ..reference import RowStatistics
from ..reference.squared_error import select
from ._placed import Placed
from .vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_linear_row_statistics,
    vocab_parallel_row_statistics,
)

_PER_ROW = ("target", "mask", "token_weight", "segment_ids")
_BY_RUNS = ("sequence_mean", "sequence_sum")


# --- cross entropy -------------------------------------------------------------------------------


def cross_entropy(function: str, given: dict[str, Any], class_dim: int) -> Any:
    """masked_cross_entropy; given: its arguments by the operator's names."""
    at = _of_logits(function, given, class_dim)
    if given.pop("inplace_backward"):
        got = "True with a DTensor, whose other users would not be told: call it with to_local()"
        raise refusal(function, "inplace_backward", "be False", got)
    a = _rows(at, given) | {"logits": at.local()}
    a["weight"] = _class_weight(at, "weight", a["weight"], at.tensor.shape[-1])
    a["normalizer"], weights = _divisor(at, given, a)
    a["return_stats"] = a.pop("statistics")
    del a["schedule"]
    call: Any = of_logits.masked_cross_entropy
    if at.columns:
        if a.pop("gradient_in_forward"):
            got = f"True with logits {placements_text(at.tensor)}: the message stands between"
            raise refusal(function, "gradient_in_forward", "be False", got)
        call, a["local_logits"] = vocab_parallel_cross_entropy, a.pop("logits")
        a |= _classes(at, "logits", at.tensor, -1)
    return _placed(at, call(**a), given["reduction"], weights)


def row_statistics(function: str, given: dict[str, Any], class_dim: int) -> RowStatistics:
    """row_statistics; given: its arguments by the operator's names."""
    at = _of_logits(function, given, class_dim)
    a = _statistics_arguments(at, given)
    if at.columns:
        a |= _classes(at, "logits", at.tensor, -1)
        return _placed_statistics(at, vocab_parallel_row_statistics(at.local(), **a))
    return _placed_statistics(at, of_logits.row_statistics(at.local(), **a))


def _of_logits(function, given, class_dim):
    logits = given["logits"]
    if type(class_dim) is not int or class_dim != -1:
        logits = classes_last(function, logits, class_dim)
    if logits.dim() == 0:
        raise refusal(function, "logits", "be [..., V]", shape_text(logits))
    return Placed(function, "logits", logits, logits.dim() - 1)


def linear_cross_entropy(function: str, given: dict[str, Any]) -> Any:
    """masked_linear_cross_entropy; given: the operator's arguments and logits_dtype."""
    at, classes, layer = _layer(function, given)
    a = _rows(at, given) | {"hidden": _local_hidden(at, classes)}
    classes_number = given["linear_weight"].shape[0]
    a["weight"] = _class_weight(at, "class_weight", a["weight"], classes_number)
    a["normalizer"], weights = _divisor(at, given, a)
    a |= {"return_stats": a.pop("statistics"), "class_weight": a.pop("weight")}
    a |= {"bias": layer["bias"], **classes}
    del a["schedule"], a["linear_weight"]
    call: Any = of_hidden.masked_linear_cross_entropy
    if classes:
        call = vocab_parallel_linear_cross_entropy
    return _placed(at, call(a.pop("hidden"), layer["weight"], **a), given["reduction"], weights)


def linear_row_statistics(function: str, given: dict[str, Any]) -> RowStatistics:
    """linear_row_statistics; given: the operator's arguments and logits_dtype."""
    at, classes, layer = _layer(function, given)
    a = _statistics_arguments(at, given)
    a |= {name: given[name] for name in ("chunk_rows", "num_valid", "logits_dtype")}
    call: Any = vocab_parallel_linear_row_statistics if classes else of_hidden.linear_row_statistics
    weight = layer.pop("weight")
    hidden = _local_hidden(at, classes)
    return _placed_statistics(at, call(hidden, weight, **a, **layer, **classes))


def _local_hidden(at, classes):
    # Dynamo takes no view that one autograd.Function has made into another that makes one.
    local = at.local()
    return local.clone() if classes and torch.compiler.is_compiling() else local


def _rows(at, given):
    """The arguments with the part of those that stand per row that is here."""
    reduction, shift = given["reduction"], given["shift"]
    if shift != 0:
        instead = ": a label of the next shard is not here; shift them before (shift_labels)"
        at.check_sequences("shift", "be 0", shift, instead)
    if reduction in _BY_RUNS:
        at.check_sequences("reduction", "not go by sequences", reduction)
    a = {name: at.row_operand(name, given[name]) for name in _PER_ROW}
    return {**given, **a, **_numbers(at, given)}


def _numbers(at, given):
    temperature = given["temperature"]
    if isinstance(temperature, torch.Tensor) and temperature.dim() > 0:
        temperature = at.row_operand("temperature", temperature)
    else:
        temperature = at.number("temperature", temperature)
    return {
        "temperature": temperature,
        "normalizer": at.number("normalizer", given["normalizer"]),
    }


def _statistics_arguments(at, given):
    a = {name: at.row_operand(name, given[name]) for name in ("target", "mask")}
    a |= {name: given[name] for name in ("ignore_index", "softcap")}
    return a | {"temperature": _numbers(at, given)["temperature"]}


def _class_weight(at, name, weight, classes):
    if weight is None:
        return None
    check_tensor(at.function, name, weight)
    if weight.shape != (classes,):
        rule = f"have one entry per class [{classes}]"
        raise refusal(at.function, name, rule, shape_text(weight))
    if not is_dtensor(weight):
        return weight
    at.check_mesh(name, weight)
    if any(not isinstance(placement, Replicate) for placement in weight.placements):
        rule = "be Replicate, one entry per class of the whole vocabulary"
        raise refusal(at.function, name, rule, placements_text(weight))
    return weight.to_local()


def _classes(at, name, tensor, dim):
    """Of a tensor whose dimension ``dim`` are classes: the group that shares them, and which are
    here: those that torch.chunk gives, as DTensor's own rule is, so that nobody has to ask."""
    dim %= tensor.dim()
    cut = [n for n, p in enumerate(tensor.placements) if isinstance(p, Shard) and p.dim == dim]
    if len(cut) != 1:
        rule = "shard its classes over one mesh dimension"
        raise refusal(at.function, name, rule, placements_text(tensor))
    mesh, classes = tensor.device_mesh, tensor.shape[dim]
    each = -(-classes // mesh.size(cut[0]))
    # DTensor cuts by coordinates. Where the mesh lists its ranks otherwise than their group does,
    # all ranks are told that the shards do not follow each other.
    start = min(mesh.get_coordinate()[cut[0]] * each, classes)
    here = tensor.to_local().shape[dim]
    if here != min(each, classes - start):
        rule = f"hold the {min(each, classes - start)} classes that torch.chunk gives this rank"
        raise refusal(at.function, name, rule, f"{here} of {classes}")
    return {"group": mesh.get_group(cut[0]), "vocab_start": start, "vocab_size": classes}


def _layer(function, given):
    """Where hidden states lie, the group of a sharded vocabulary or {}, and weight and bias."""
    hidden, weight, bias = given["hidden"], given["linear_weight"], given["bias"]
    at = Placed(function, "hidden", hidden, hidden.dim() - 1)
    if at.columns:
        rule = "be whole in its last dimension"
        raise refusal(function, "hidden", rule, f"{placements_text(hidden)}: redistribute it")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_tensor(function, name, tensor)
        if not is_dtensor(tensor):
            rule = "be a DTensor beside a hidden that is one (its gradient has to be added up)"
            raise refusal(function, name, rule, "a plain tensor")
        at.check_mesh(name, tensor)
        _check_layer_placements(at, name, tensor, weight)
    sharded = any(isinstance(placement, Shard) for placement in weight.placements)
    classes = _classes(at, "weight", weight, 0) if sharded else {}
    # The gradient of what is whole is each rank's share where the rows are sharded.
    parts = [
        Partial() if isinstance(row, Shard) else p
        for row, p in zip(at.rows, weight.placements, strict=True)
    ]
    layer = {"weight": weight.to_local(grad_placements=parts)}
    layer["bias"] = None if bias is None else bias.to_local(grad_placements=parts)
    return at, classes, layer


def _check_layer_placements(at, name, tensor, weight):
    # The texts are made where they are said: torch.compile cannot trace them.
    if any(isinstance(p, Shard) and p.dim != 0 for p in tensor.placements):
        rule = "be Replicate or Shard(0), its classes"
        raise refusal(at.function, name, rule, placements_text(tensor))
    if tensor.placements != weight.placements:
        rule = f"lie as weight, {placements_text(weight)}"
        raise refusal(at.function, name, rule, placements_text(tensor))
    for row, p in zip(at.rows, tensor.placements, strict=True):
        if isinstance(row, Shard) and isinstance(p, Shard):
            rule = "not be sharded over the mesh dimension that shards the rows of hidden"
            got = f"{placements_text(tensor)} beside hidden {placements_text(at.tensor)}"
            raise refusal(at.function, name, rule, f"{got}: redistribute one of them")


def _divisor(at, given, a):
    """What the local call divides by, None where it knows it (a: what is here), and what its sum is
    still to be divided by."""
    reduction = given["reduction"]
    if not at.shards_rows or a["normalizer"] is not None or reduction in ("sum", "none"):
        return a["normalizer"], None
    if reduction not in _aggregate.REDUCTIONS:
        return None, None  # which the local call refuses
    _aggregate.check_weighted(at.function, reduction, given["token_weight"])

    def count(of):
        on, share = of_logits.shares(at.function, of, reduction, torch.float64)
        return _aggregate.denominator(on, share, reduction, of["segment_ids"])

    rows = {name: given[name] for name in _PER_ROW}
    return _counted(at, rows, a, reduction, count)


def _counted(at, given, a, reduction, count):
    """count(rows) over all rows; where everybody has all of what is counted, without a message.

    A sum of weights has a derivative, which a normalizer has not: the sum is divided by it after.
    """
    everywhere = all(_is_everywhere(tensor) for tensor in given.values() if tensor is not None)
    shape = at.rows_shape if everywhere else at.local().shape[: at.dims]
    on = torch.ones((), dtype=torch.bool, device=at.tensor.device).expand(shape)
    rows = {"on": on}
    for name in given:
        tensor = given[name] if everywhere else a[name]
        tensor = tensor.to_local() if is_dtensor(tensor) else tensor
        rows[name] = None if tensor is None else tensor.expand(shape)
    weighted = reduction == "weighted_mean"
    with contextlib.nullcontext() if weighted else torch.no_grad():
        found = count({**a, **rows})
        found = found if everywhere else at.total(found).to_local()
    return (1.0, found) if weighted else (found, None)


def _placed(at, found, reduction, weights=None):
    """The results of the local call as DTensors."""
    loss, stats = found if isinstance(found, tuple) else (found, None)
    if reduction == "none":
        loss = at.spread(loss)
    else:
        loss = at.total(loss)
    if weights is not None:
        total = loss.to_local()
        loss = at.whole(_aggregate.over(total.double(), weights).to(total.dtype))
    return loss if stats is None else (loss, RowStatistics(*map(at.spread, stats)))


def _placed_statistics(at, found):
    return RowStatistics(*map(at.spread, found))


# --- losses of tokens, squared errors ------------------------------------------------------------


def tokens(
    function: str,
    loss: DTensor,
    given: dict[str, Any],
    reduction: str,
    normalizer: Any,
) -> Any:
    """aggregate_tokens; given: mask, token_weight and segment_ids."""
    at = Placed(function, "loss", loss, loss.dim())
    if reduction in _BY_RUNS:
        at.check_sequences("reduction", "not go by sequences", reduction)
    if reduction == "weighted_mean":
        _aggregate.check_weighted(function, reduction, given["token_weight"])
    a = {name: at.row_operand(name, value) for name, value in given.items()}
    divisor, weights = at.number("normalizer", normalizer), None

    def count(of):
        on = of["on"] if of["mask"] is None else of["mask"] != 0
        share = select(on, of["token_weight"].double()) if reduction == "weighted_mean" else on
        return _aggregate.denominator(on, share, reduction, of["segment_ids"])

    if divisor is None and at.shards_rows and reduction in ("mean", *_aggregate.AGGREGATIONS):
        divisor, weights = _counted(at, given, a, reduction, count)
    found = _aggregate.aggregate_tokens(at.local(), **a, reduction=reduction, normalizer=divisor)
    return _placed(at, found, reduction, weights)


def squared_error(
    function: str, prediction: DTensor, target: Any, tensors: dict[str, Any], how: tuple[Any, ...]
) -> DTensor:
    """masked_squared_error; tensors: mask, edit_mask and weighting; how: its other arguments."""
    foreground, background, reduction, loss, delta = how
    at = Placed(function, "prediction", prediction, prediction.dim())
    if reduction in ("token", "token_sum") and at.shards(at.dims - 1):
        rule = "be whole in its last dimension, of which a token is the mean"
        raise refusal(function, "prediction", rule, placements_text(prediction))
    whole = is_dtensor(target) and all(isinstance(p, Replicate) for p in target.placements)
    if is_dtensor(target) and not whole and target.placements != prediction.placements:
        rule = f"be Replicate or lie as prediction, {placements_text(prediction)}"
        raise refusal(function, "target", rule, placements_text(target))
    mask, edit_mask, weighting = tensors.values()
    first = 0 if weighting is None else at.dims - weighting.dim()
    here = [at.operand("target", target), at.operand("mask", mask)]
    here += [at.operand("edit_mask", edit_mask), at.operand("weighting", weighting, first)]
    mean = reduction in ("mean", "batch_mean")
    call: Any = masked_squared_error
    found = call(
        at.local(), *here, foreground, background, "sum" if mean else reduction, loss,
        at.number("delta", delta),
    )  # fmt: skip
    if reduction == "none":
        return at.spread(found)
    if reduction == "token":
        return at.spread(found, at.dims - 1)
    if mean:
        entries = prediction.shape[0] if reduction == "batch_mean" else _elements(at, mask, here[1])
        count = torch.as_tensor(entries, dtype=torch.float64, device=found.device)
        found = _aggregate.over(found.double(), count).to(found.dtype)
    return at.total(found)


def _elements(at, mask, here):
    """How many elements of the whole the mask selects; here: the part of it that is here."""
    if mask is None:
        return at.tensor.numel()
    everywhere = _is_everywhere(mask)
    like, on = (at.tensor, mask) if everywhere else (at.local(), here)
    on = as_mask(at.function, "mask", on.to_local() if is_dtensor(on) else on)
    count = (on != 0).sum() * (like.numel() // max(on.numel(), 1))
    return count if everywhere else at.total(count).to_local()


def _is_everywhere(tensor):
    return not is_dtensor(tensor) or all(isinstance(p, Replicate) for p in tensor.placements)
