# SPDX-License-Identifier: BSD-3-Clause
"""masked_linear_cross_entropy and linear_row_statistics: losses from hidden states.

The schema is in csrc/schemas.cpp, the loop over chunks in csrc/linear_cross_entropy/call.h, the
cross entropy of a chunk that of masked_cross_entropy.
"""

from collections.abc import Callable
from typing import Any

import torch

from .._aggregate import AGGREGATIONS, check_normalizer, check_weighted
from .._checks import (
    as_integers,
    as_mask,
    check_constant,
    check_device,
    check_flags,
    check_length,
    check_tensor,
    check_whole,
    has_no_data,
    is_dtensor,
    refusal,
    shape_text,
)
from .._heads import check_layer
from ..reference import RowStatistics
from . import masked_cross_entropy_checks as checks
from ._autograd import _functorch_is_active, is_autocast
from .linear_cross_entropy_derivatives import DEFAULTS, NAME, call
from .masked_cross_entropy import SHOWN, Number, aggregate, number_tensor, temperature_tensor

Run = Callable[[dict[str, Any], int], tuple[torch.Tensor, ...]]  # arguments, results to show
_BESIDE_PLAIN_HIDDEN = (
    "hidden is none, so it is not known whether this is FSDP's shard (call it inside of that "
    "module's forward) or a part of the classes (make hidden a DTensor of the same mesh)"
)
_ROW_TENSORS = ("target", "mask", "token_weight", "segment_ids")


def masked_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    class_weight: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    temperature: Number = 1.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    focal_gamma: float = 0.0,
    shift: int = 0,
    segment_ids: torch.Tensor | None = None,
    reduction: str = "mean",
    normalizer: Number | None = None,
    return_stats: bool = False,
    num_valid: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Any:  # a union would have every caller ask which of the two it is
    r"""``masked_cross_entropy`` of hidden states and a classifier's weight, without its logits.

    The loss of :math:`x = h W^\top + b`, of which a chunk of rows at a time is made. Rows that do
    not count (see ``masked_cross_entropy``, whose keywords and formulas these are) take part in no
    product: they cost nothing, nothing of them is read, and their gradient is exactly 0.

    >>> torch.testing.assert_close(
    ...     masked_linear_cross_entropy(hidden, weight, labels, attention_mask),
    ...     masked_cross_entropy(F.linear(hidden, weight), labels, attention_mask))

    Of a mean or a sum the gradients are made together with the loss: three products of the rows
    that count, :math:`6 K D V` operations for K of them, and memory for the logits of a chunk. With
    "none" or return_stats the backward makes the logits a second time, :math:`8 K D V`, and leaves
    out rows into which no gradient flows. What needs no gradient (a frozen head, a frozen trunk)
    takes no product for it. The gradient of weight and bias is added up in float32. Gradients made
    with the loss are multiplied afterwards by what comes in, unless that is 1: divide by
    ``normalizer``; for float16 under a loss scaler take "none", as small ones are rounded before.

    Args:
        hidden: ``[..., D]`` float16, bfloat16, float32 or float64; any strides.
        weight: ``[V, D]``, as of ``torch.nn.Linear``. Where its dtype, or that of bias, is another
            all are converted to the wider one; under autocast, as by ``F.linear``, to autocast's.
            (A conversion reads what is stored in excluded rows, too; it reaches no result.)
        target, mask, ignore_index, token_weight, label_smoothing, temperature, softcap, z_loss,
            focal_gamma, shift, segment_ids, reduction, normalizer, return_stats: as in
            ``masked_cross_entropy``.
        bias: ``[V]``; -inf bans a class.
        class_weight: ``[V]``, ``weight`` of ``masked_cross_entropy``.
        num_valid: at least the number of rows that count, where the caller knows it. On CUDA the
            size of the products is needed on the host: without this one number is waited for in
            each pass; while a graph is captured all rows are multiplied. Fewer than there are is an
            error on CPU, and makes the loss NaN on CUDA. More rows than count are multiplied as 0,
            in the backward those too into which nothing flows, as it does not wait for a number.
        chunk_rows: rows whose logits are made at a time, at least 1. None: on CPU as many as 128
            MiB hold, on CUDA as fit into 512 MiB, or all where that takes less memory.
        logits_dtype: torch.float32 for float32 logits of half inputs. None: what ``F.linear`` gives
            (float32 as well on processors that do not multiply halves).

        Of DTensors, hidden may be Replicate or Shard over rows, weight and bias Replicate or
        Shard(0) where hidden is Replicate; the rest is as in ``masked_cross_entropy``.

    Returns:
        the loss, float32 (float64 for float64 inputs), or (loss, RowStatistics).

    Raises:
        IndexError: a label outside [0, V) that is not ignore_index (CPU; on CUDA that row is NaN).
        ValueError: a shape, dtype, device or option that does not fit.
        RuntimeError: a second backward of a mean or sum.

    A second derivative (create_graph), torch.func.vmap and forward mode go by plain PyTorch and
    make the logits as a whole. The bits of a row's result depend on the rows beside it as far as
    those of the products do.
    """
    if target is None:
        raise TypeError(f"{NAME}: target must be a torch.Tensor, got NoneType")
    given = {
        "hidden": hidden,
        "linear_weight": weight,
        "bias": bias,
        "target": target,
        "mask": mask,
        "weight": class_weight,
        "token_weight": token_weight,
        "segment_ids": segment_ids,
        "temperature": temperature,
        "normalizer": normalizer,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "softcap": softcap,
        "z_loss": z_loss,
        "focal_gamma": focal_gamma,
        "shift": shift,
        "reduction": reduction,
        "statistics": return_stats,
        "schedule": None,
        "chunk_rows": chunk_rows,
        "num_valid": num_valid,
    }
    check_flags(NAME, {"return_stats": return_stats})
    if is_dtensor(hidden):
        from ..distributed import _dtensor

        return _dtensor.linear_cross_entropy(NAME, given | {"logits_dtype": logits_dtype})
    return loss_of_hidden(NAME, given, logits_dtype, call)


def loss_of_hidden(
    name: str, given: dict[str, Any], logits_dtype: torch.dtype | None, run: Run
) -> Any:
    """The loss, with its statistics where those are asked for; given: the operator's arguments by
    name, as the caller has them, and reductions that it does not know."""
    reduction, normalizer, return_stats = (
        given["reduction"],
        given["normalizer"],
        given["statistics"],
    )
    if normalizer is not None:
        check_normalizer(name, normalizer, reduction)
    aggregation = reduction in AGGREGATIONS
    if aggregation:
        check_weighted(name, reduction, given["token_weight"])
        given |= {"reduction": "none", "normalizer": None}
    checks.check_every_option(name, given)
    a = _prepared(name, given, logits_dtype)
    loss, *stats = run(a, SHOWN if return_stats else 1)
    if aggregation:
        loss = aggregate(name, loss, a, reduction, normalizer)
    return (loss, RowStatistics(*stats)) if return_stats else loss


def linear_row_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    temperature: Number = 1.0,
    softcap: float | None = None,
    num_valid: int | None = None,
    chunk_rows: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> RowStatistics:
    r"""``row_statistics`` of hidden states and a classifier's weight, without its logits.

    Of :math:`z = \mathrm{softcap}(h W^\top + b) / T` per row that counts: lse, entropy, log_prob of
    the target, hit and argmax; gradients through lse, entropy, log_prob for any incoming ones. The
    backward makes the logits of those rows again into which a gradient flows, chunk by chunk:
    tokens that a policy-gradient loss clips or a filter leaves out cost it nothing.

    >>> stats = linear_row_statistics(hidden, weight, labels, attention_mask, temperature=0.7)
    >>> expected = row_statistics(F.linear(hidden, weight), labels, attention_mask, temperature=0.7)
    >>> torch.testing.assert_close(stats.log_prob, expected.log_prob)
    >>> torch.testing.assert_close(stats.entropy, expected.entropy)

    Arguments are as in ``masked_linear_cross_entropy``, results and errors as in
    ``row_statistics``.
    """
    given = {"hidden": hidden, "linear_weight": weight, **DEFAULTS, "bias": bias}
    given |= {"target": target, "mask": mask, "ignore_index": ignore_index}
    given |= {"temperature": temperature, "softcap": softcap}
    given |= {"chunk_rows": chunk_rows, "num_valid": num_valid}
    if is_dtensor(hidden):
        from ..distributed import _dtensor

        given |= {"logits_dtype": logits_dtype}
        return _dtensor.linear_row_statistics("linear_row_statistics", given)
    return statistics_of_hidden("linear_row_statistics", given, logits_dtype, call)


def statistics_of_hidden(
    name: str, given: dict[str, Any], logits_dtype: torch.dtype | None, run: Run
) -> RowStatistics:
    given |= {"statistics": True, "reduction": "sum"}
    checks.check_options(name, given)
    checks.check_int64(name, "ignore_index", given["ignore_index"])
    a = _prepared(name, given, logits_dtype)
    try:
        _, *found = run(a, SHOWN)
    except (ValueError, IndexError) as error:  # the operator's, which has one name for both
        text = str(error)
        raise type(error)(name + text[text.index(": ") :] if ": " in text else text) from None
    stats = RowStatistics(*found)
    return stats if given["target"] is not None else stats._replace(log_prob=None, hit=None)


# --- arguments -----------------------------------------------------------------------------------


def _prepared(name, given, logits_dtype):
    """The arguments as the operator takes them."""
    hidden, weight, bias = given["hidden"], given["linear_weight"], given["bias"]
    # A shard of the vocabulary may have no class.
    sharded = "vocab_size" in given
    names = ("hidden", "local_weight" if sharded else "weight", "bias")
    for argument, tensor in zip(names[1:], (weight, bias), strict=True):
        if is_dtensor(tensor):
            check_whole(name, argument, tensor, _BESIDE_PLAIN_HIDDEN)
    check_layer(name, hidden, weight, bias, names, least=0 if sharded else 1)
    for argument in _ROW_TENSORS:
        if given[argument] is not None:
            check_tensor(name, argument, given[argument])
            check_device(name, argument, given[argument], "hidden", hidden)
    a = {**given, "softcap": checks.softcap_number(name, given["softcap"])}
    a |= _layer(name, hidden, weight, bias, logits_dtype)
    a = checks.expanded(a, "hidden") or a
    a["target"] = as_integers(a["target"])
    a["segment_ids"] = as_integers(a["segment_ids"])
    if a["mask"] is not None:
        a["mask"] = as_mask(name, "mask", a["mask"])
    if a["weight"] is not None:
        check_tensor(name, "class_weight", a["weight"])
        check_device(name, "class_weight", a["weight"], "hidden", hidden)
        check_constant(name, "class_weight", a["weight"])
        a["weight"] = checks.class_weight(name, a["weight"], a["hidden"], "class_weight")
    _check_rows(name, a)
    a["temperature"] = temperature_tensor(name, a["temperature"], hidden)
    if a["normalizer"] is not None:
        a["normalizer"] = number_tensor(name, "normalizer", a["normalizer"], hidden)
    for argument, least in (("chunk_rows", 1), ("num_valid", 0)):
        if a[argument] is not None:
            check_length(name, argument, a[argument], least)
    return a


def _layer(name, hidden, weight, bias, logits_dtype):
    """hidden, weight and bias in one dtype, and whether the logits are wider than that."""
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]
    kind = hidden.device.type
    if is_autocast(hidden.device) and not any(t.dtype == torch.float64 for t in tensors):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = hidden.dtype
        for tensor in tensors[1:]:
            dtype = torch.promote_types(dtype, tensor.dtype)
    if logits_dtype not in (None, dtype) and not (
        logits_dtype == torch.float32 and dtype in (torch.float16, torch.bfloat16)
    ):
        rule = f"be None, {dtype} or, for half types, torch.float32"
        raise refusal(name, "logits_dtype", rule, logits_dtype)
    return {
        "hidden": hidden.to(dtype),
        "linear_weight": weight.to(dtype),
        "bias": None if bias is None else bias.to(dtype),
        "fp32_logits": logits_dtype == torch.float32 and dtype != torch.float32,
    }


def _check_rows(name, a):
    """What fakes and plain PyTorch, which may stand in for the operator, would not look at."""
    if has_no_data(a["hidden"]):
        checks.check_dtypes(name, a | {"weight": None})  # of classes: checked with its conversion
    elif not (_functorch_is_active() or torch.compiler.is_compiling()):
        return
    rows = a["hidden"].shape[:-1]
    for argument in _ROW_TENSORS:
        tensor = a[argument]
        if tensor is not None and tensor.shape != rows:
            rule = f"have the shape of hidden {shape_text(a['hidden'])} without the last dimension"
            raise refusal(name, argument, rule, shape_text(tensor))
    checks.check_one_number(name, "normalizer", a["normalizer"])
    checks.check_number_or_rows(name, "temperature", a["temperature"], a["hidden"], "hidden")
    weight, classes = a["weight"], a.get("vocab_size") or a["linear_weight"].shape[0]
    if weight is not None and weight.shape != (classes,):
        rule = f"have one entry per class [{classes}]"
        raise refusal(name, "class_weight", rule, shape_text(weight))
