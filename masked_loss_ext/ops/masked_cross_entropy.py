# SPDX-License-Identifier: BSD-3-Clause
"""masked_cross_entropy and row_statistics: the public functions.

The schema is in csrc/schemas.cpp, the formula in csrc/cross_entropy/formula.h, what leads to the
operator in masked_cross_entropy_derivatives.py. The operator checks shapes, dtypes and labels; what
Python adds stands in masked_cross_entropy_checks.py.
"""

import numbers
from collections.abc import Callable
from typing import Any

import torch

from .._aggregate import (
    AGGREGATIONS,
    as_divisor,
    check_normalizer,
    check_weighted,
    reduce_tokens,
)
from .._checks import (
    REFUSALS,
    as_integers,
    as_mask,
    as_number,
    check_constant,
    check_flags,
    has_no_data,
    is_dtensor,
    is_symbolic,
    refusal,
    shape_text,
)
from ..reference import RowStatistics
from ..reference.cross_entropy import at_labels, counted_rows, shifted
from ..reference.squared_error import select
from . import masked_cross_entropy_checks as checks
from ._autograd import _functorch_is_active
from .masked_cross_entropy_derivatives import DEFAULTS, call, call_sweep

Number = float | torch.Tensor
Run = Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]  # of the operator's arguments
# In whose names the operators refuse.
_OPERATORS = ("masked_cross_entropy", "vocab_parallel_cross_entropy")
SHOWN = 1 + len(RowStatistics._fields)  # results, the loss among them


def masked_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,
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
    class_dim: int = -1,
    inplace_backward: bool = False,
    gradient_in_forward: bool = False,
    return_stats: bool = False,
) -> Any:  # a union would have every caller ask which of the two it is
    r"""Cross entropy of the rows that count, from one read of their logits.

    A row counts where ``mask`` is on and its label is not ``ignore_index``; the others are not
    read, whatever is stored there, and their gradient is exactly 0. With
    :math:`z = \mathrm{softcap}(\mathrm{logits}) / T`,
    :math:`\mathrm{softcap}(x) = c \tanh(x / c)`, per row

    .. math::
        \mathrm{lse} = \ln \sum_c e^{z_c}, \quad \mathrm{ce} = \mathrm{lse} - z_y, \quad
        p = e^{-\mathrm{ce}}, \quad \varepsilon = \mathrm{label\ smoothing}

    .. math::
        \ell = \omega \Big( \big( (1 - \varepsilon)\, w_y\, \mathrm{ce}
        + \tfrac{\varepsilon}{V} \sum_c w_c\, (\mathrm{lse} - z_c) \big) (1 - p)^\gamma
        + \lambda\, \mathrm{lse}^2 \Big)

    with class weights :math:`w` and token weight :math:`\omega`. "mean" is their sum over the
    number of rows that count (over the sum of their :math:`w_y` with class weights, as in PyTorch),
    or over ``normalizer``.

    >>> torch.testing.assert_close(
    ...     masked_cross_entropy(logits, labels, label_smoothing=0.1),
    ...     F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=0.1))

    With no row left the loss is 0, attached to the graph (PyTorch gives NaN). A logit of -inf (a
    banned class) has probability and gradient exactly 0; one of +inf makes lse inf, as
    ``torch.logsumexp``, and all else of its row NaN, the gradient too, as ``F.cross_entropy``.

    Args:
        logits: ``[..., V]`` float16, bfloat16, float32 or float64; any strides, but where the last
            dimension is not contiguous they are copied.
        target: ``[...]`` integers, a class or ignore_index.
        mask: ``[...]`` any dtype, on where not 0. None keeps all. (Third by position, where
            ``F.cross_entropy`` has class weights: one entry per class is refused, unless there are
            as many rows; then it is a mask.)
        ignore_index: label of rows that do not count.
        weight: ``[V]`` class weights; must not require a gradient.
        token_weight: ``[...]`` floating, may be fractional; no part of the denominator, but of that
            of "weighted_mean". Differentiable.
        label_smoothing: in [0, 1].
        temperature: T > 0, a number or a 0-d tensor, which may change without recompilation; or
            ``[...]``, one for each row of logits: with a shift that of t, not of the label's t + k.
            Those of rows that do not count are not looked at; no gradient. A CPU tensor is checked,
            as that of normalizer; on CUDA neither is read before it is used, and what is NaN, or a
            temperature that is not positive and finite, makes the rows that it belongs to NaN.
        softcap: c > 0; None or infinity for none.
        z_loss: :math:`\lambda`, weight of lse squared, at least 0 and finite.
        focal_gamma: :math:`\gamma`, at least 0; p is the target's own probability, without
            smoothing or weight.
        shift: k scores position t of ``[..., S, V]`` against the label at t + k, without a copy;
            mask, ignore_index, class and token weight are those of t + k. Results stand at t and
            are 0 in the last k; S or more scores nothing. Of a sequence that is cut over ranks the
            label after each part is not here: ``shift_labels`` before the cut, then shift 0.
        segment_ids: ``[..., S]`` integers; t counts only if t and t + k have the same (packed
            documents). Each run of one id is a sequence of "sequence_mean" and "sequence_sum".
        reduction: "mean", "sum" or "none" (``[...]``, 0 at rows that do not count); or, of the row
            losses and with a sequence along the last row dimension, "sequence_mean" (mean over
            sequences of the mean of each), "sequence_sum" (mean over sequences of the sum of each),
            "weighted_mean" (over the sum of the token weights instead of the number of rows):
            formulas, and who wants which, at ``aggregate_tokens``. Sequences without a row that
            counts do not count; class weights take part in the denominators as in "mean".
        normalizer: denominator of "mean" (the tokens of the whole accumulation window over all
            ranks, ``distributed.global_token_count``), of "weighted_mean" (the sum of weights) and
            of "sequence_mean" and "sequence_sum" (the number of sequences, or any constant): a
            number or a 0-d tensor, not in half precision. Where it is 0 the loss is 0.
        class_dim: the dimension of the classes in logits: 1 for the ``[N, C, d1, ...]`` of
            ``F.cross_entropy``. Rows are the other dimensions in their order, ``[N, d1, ...]``.
            Logits whose classes are adjacent in memory (channels_last) are not copied, others are.
        inplace_backward: write the gradient over the logits. Saves memory of their size; whoever
            else needs them afterwards gets PyTorch's error about modified variables. One backward;
            ignored under torch.compile, compiled autograd, torch.func, is_grads_batched and
            create_graph.
        gradient_in_forward: make the gradient in the sweep that makes the loss: one read of the
            logits less. For "mean" and "sum" without return_stats. The gradient's memory is taken
            from the forward on; one backward, without create_graph, which multiplies by what comes
            in unless that is 1 (so divide by ``normalizer``; not for float16 under a loss scaler).
            With inplace_backward the forward already overwrites the logits: gone also for metrics.
            Ignored without gradients, with one of token_weight, under torch.compile, torch.func.
        return_stats: also return RowStatistics(lse, entropy, log_prob, hit, argmax), each
            ``[...]``, differentiable (but hit and argmax), from the same read.

        Dimensions of size 1 are expanded, as views: ``[1, S]`` of target, mask, token_weight and
        segment_ids for a batch of several, ``[B, 1]`` of mask, token_weight and temperature.
        Integers are int64, int32, int16, int8, uint8, uint16 or uint32.

        A DTensor of logits may be Shard over rows (with a shift or sequences not over these), Shard
        over the classes (see ``vocab_parallel_cross_entropy``) or Replicate, per dimension of its
        mesh; other tensors are DTensors of that mesh or plain, whole and the same on all its ranks.
        The result is a DTensor, a mean that over all rows; "none" and statistics lie as the rows.
        Every rank has to call, as some calls send a number or two.

    Returns:
        the loss, float32 (float64 for float64 logits), or (loss, RowStatistics).

    Raises:
        IndexError: a label outside [0, V) that is not ignore_index (CPU; on CUDA that row is NaN).
        ValueError: a shape, dtype, device or option that does not fit.
    """
    name = "masked_cross_entropy"
    if target is None:
        raise TypeError(f"{name}: target must be a torch.Tensor, got NoneType")
    given = {
        "logits": logits,
        "target": target,
        "mask": mask,
        "weight": weight,
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
    }
    how = {"inplace_backward": inplace_backward, "gradient_in_forward": gradient_in_forward}
    if not inplace_backward is gradient_in_forward is return_stats is False:
        check_flags(name, how | {"return_stats": return_stats})
    if gradient_in_forward:
        checks.check_sweep(name, reduction, return_stats)
    if is_dtensor(logits):
        from ..distributed import _dtensor

        return _dtensor.cross_entropy(name, given | how, class_dim)

    def run(a):
        if inplace_backward and not torch.compiler.is_compiling():
            checks.check_overwritable(name, a["logits"])
        if gradient_in_forward:
            return call_sweep(a, inplace_backward)
        return call(a, SHOWN if return_stats else 1, inplace_backward)

    return loss_of_rows(name, given, class_dim, run)


def loss_of_rows(name: str, given: dict[str, Any], class_dim: int, run: Run) -> Any:
    """The loss, with its statistics where those are asked for; given: the operator's arguments by
    name, as the caller has them, and reductions that it does not know."""
    reduction, normalizer = given["reduction"], given["normalizer"]
    checks.check_options(name, given)
    if normalizer is not None:
        check_normalizer(name, normalizer, reduction)
    if type(class_dim) is not int or class_dim != -1:
        given["logits"] = checks.classes_last(name, given["logits"], class_dim)
    given["softcap"] = checks.softcap_number(name, given["softcap"])
    aggregation = reduction in AGGREGATIONS
    if aggregation:
        check_weighted(name, reduction, given["token_weight"])
        given |= {"reduction": "none", "normalizer": None}
    loss, *stats = _call(name, given, run)
    if aggregation:
        rows = checks.expanded(given) or given
        loss = aggregate(name, loss, rows, reduction, normalizer)
    return (loss, RowStatistics(*stats)) if given["statistics"] else loss


def aggregate(
    name: str,
    loss: torch.Tensor,
    a: dict[str, Any],
    reduction: str,
    normalizer: Number | None,
) -> torch.Tensor:
    """loss: of reduction "none"; a: what the operator has accepted, logits or, with a head's
    linear_weight, hidden.

    Class weights take the part in the denominators that they have in "mean".
    """
    on, share = shares(name, a, reduction, loss.dtype)
    divisor = as_divisor(name, normalizer, loss)
    return reduce_tokens(loss, on, share, reduction, as_integers(a["segment_ids"]), divisor)


def shares(
    name: str, a: dict[str, Any], reduction: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows count, and what each adds to the denominators that go by rows."""
    rows = "logits" if "logits" in a else "hidden"
    logits, weight, shift = a[rows], a["weight"], a["shift"]
    if logits.dim() < 2 and reduction.startswith("sequence"):
        last = "V" if rows == "logits" else "D"
        got = shape_text(logits)
        raise refusal(name, rows, f"be [..., S, {last}] for reduction {reduction}", got)
    mask = as_mask(name, "mask", a["mask"])
    target, segment_ids = as_integers(a["target"]), as_integers(a["segment_ids"])
    labels, on = counted_rows(logits, target, mask, a["ignore_index"], shift, segment_ids)
    share = on
    if weight is not None:
        # On a GPU a label may be out of range; its loss is NaN already.
        weight = weight.to(dtype)  # not detached: in forward mode it may have a tangent
        share = select(on, at_labels(weight, labels.clamp(0, weight.shape[0] - 1)))
    if reduction == "weighted_mean":
        share = share * select(on, shifted(a["token_weight"], shift, 0).to(dtype))
    return on, share


def row_statistics(
    logits: torch.Tensor,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    temperature: Number = 1.0,
    softcap: float | None = None,
    class_dim: int = -1,
) -> RowStatistics:
    r"""Statistics of softmax rows from one read of their logits, nothing of their size made.

    Of :math:`z = \mathrm{softcap}(\mathrm{logits}) / T` per row that counts: lse
    :math:`\ln \sum_c e^{z_c}`, entropy :math:`-\sum_c p_c \ln p_c` in nats, log_prob
    :math:`\ln p_y`, hit, whether the label is the argmax, and argmax itself, the first of the
    largest (of NaN, which counts as largest, too; where softcap makes logits equal, of these). At
    other rows 0 and False; without a target log_prob and hit are None. All but hit and argmax are
    differentiable.

    >>> stats = row_statistics(logits, labels)
    >>> torch.testing.assert_close(stats.lse, torch.logsumexp(logits, -1))
    >>> assert torch.equal(stats.argmax, logits.argmax(-1))
    >>> log_p = logits.log_softmax(-1)
    >>> torch.testing.assert_close(stats.entropy, -(log_p.exp() * log_p).sum(-1))
    >>> torch.testing.assert_close(
    ...     stats.log_prob, log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1))

    Arguments are as in ``masked_cross_entropy``.

    Returns:
        RowStatistics of tensors ``[...]``, float32 (float64 for float64 logits), hit bool, argmax
        int64.
    """
    given = {"logits": logits, "target": target, **DEFAULTS, "mask": mask}
    given |= {"ignore_index": ignore_index, "temperature": temperature, "softcap": softcap}
    if is_dtensor(logits):
        from ..distributed import _dtensor

        return _dtensor.row_statistics("row_statistics", given, class_dim)
    return statistics_of_rows("row_statistics", given, class_dim, lambda a: call(a, SHOWN, False))


def statistics_of_rows(name: str, given: dict[str, Any], class_dim: int, run: Run) -> RowStatistics:
    checks.check_options(name, given)
    if type(class_dim) is not int or class_dim != -1:
        given["logits"] = checks.classes_last(name, given["logits"], class_dim)
    softcap = checks.softcap_number(name, given["softcap"])
    given |= {"softcap": softcap, "statistics": True, "reduction": "sum"}
    _, *found = _call(name, given, run)
    stats = RowStatistics(*found)
    return stats if given["target"] is not None else stats._replace(log_prob=None, hit=None)


def _call(name, given, run):
    """given: the operator's arguments by name, as the caller has them; run: as it takes them."""
    transformed = _functorch_is_active()
    # Fakes of the operator check no shape.
    early = transformed or torch.compiler.is_dynamo_compiling()
    early = early or type(given["logits"]) is not torch.Tensor
    try:
        if torch.compiler.is_dynamo_compiling():
            # What Dynamo would say of these in its own words.
            checks.check_tensors(name, given)
            checks.check_every_option(name, given)
        if early:
            given = checks.expanded(given) or given
        a = _prepared(name, given)
        if transformed:
            checks.check_traced(name, a)
        elif has_no_data(given["logits"]):
            checks.check_all(name, given, a)
        return run(a)
    except REFUSALS as error:  # a list has no .stride(), and what else there is
        failure = error
    try:
        checks.check_tensors(name, given)
        fitting = None if early else checks.expanded(given)
        if fitting is not None:  # the operator has refused the shapes, and not begun
            return _call(name, fitting, run)
        checks.explain(name, failure, given)
        of, _, said = str(failure).partition(": ")
        if of in _OPERATORS and of != name and type(failure) in (ValueError, IndexError):
            raise type(failure)(f"{name}: {said}")
        raise failure
    finally:
        del failure  # its traceback holds this frame: a cycle that would keep the logits


def _prepared(name, given):
    """The arguments as the operator takes them."""
    a = given.copy()
    logits, mask, weight, segment_ids = a["logits"], a["mask"], a["weight"], a["segment_ids"]
    if logits.dim() > 0 and logits.stride(-1) != 1:
        a["logits"] = logits = with_adjacent_classes(logits)
    a["target"] = as_integers(a["target"])
    if mask is not None:
        a["mask"] = as_mask(name, "mask", mask)
    if segment_ids is not None:
        a["segment_ids"] = as_integers(segment_ids)
    if weight is not None:
        check_constant(name, "weight", weight)
        a["weight"] = checks.class_weight(name, weight, logits)
    a["temperature"] = temperature_tensor(name, a["temperature"], logits)
    if a["normalizer"] is not None:
        a["normalizer"] = number_tensor(name, "normalizer", a["normalizer"], logits)
    return a


def with_adjacent_classes(logits):
    # Not contiguous(), which takes a tensor without elements as it is, whatever its strides.
    if logits.shape[-1] > 1:
        return logits.clone(memory_format=torch.contiguous_format)
    return logits


def temperature_tensor(name, temperature, logits):
    """None for 1."""
    if not isinstance(temperature, torch.Tensor):
        if type(temperature) in (float, int):
            # Of one that changes the comparison would be a guard: a graph below 1, at 1, above.
            changes = torch.compiler.is_dynamo_compiling() and is_symbolic(temperature)
            if not changes and temperature == 1:
                return None
        _check_number(name, "temperature", temperature)
        checks.check_scale(name, "temperature", temperature)
    return number_tensor(name, "temperature", temperature, logits)


def _check_number(name, argument, value):
    kinds = (numbers.Real, torch.SymInt, torch.SymFloat)
    if isinstance(value, bool) or not isinstance(value, kinds):
        got = type(value).__name__
        raise refusal(name, argument, "be a number or a 0-d tensor", got, TypeError)


def number_tensor(name: str, argument: str, value: Number, logits: torch.Tensor) -> torch.Tensor:
    """A number as a 0-d tensor: as a Python number it would be compiled in."""
    if isinstance(value, torch.Tensor):
        check_constant(name, argument, value)
        return value
    _check_number(name, argument, value)
    return as_number(value, logits.device)
