# SPDX-License-Identifier: BSD-3-Clause
"""Arguments of masked_cross_entropy: what is checked in Python, and the views that they become.

The operator checks shapes, dtypes and its options in C++. Here stands what it cannot see, what it
would answer in words that are not the caller's, and what torch.func keeps from it. No data is read.
"""

import math

import torch

from .._aggregate import AGGREGATIONS, REDUCTIONS
from .._checks import (
    _FLOATING,
    _INTEGERS,
    _LARGEST,
    CONVERTED_INTEGERS,
    CONVERTED_MASKS,
    check_beside,
    check_choice,
    check_flags,
    check_int,
    check_length,
    check_number,
    check_tensor,
    check_whole,
    refusal,
    shape_text,
)

_SMALLEST = torch.finfo(torch.float32).tiny  # its reciprocal is still a float32
_NO_CAP = 1e30  # changes no float32 logit, and x / c would lose digits where it is subnormal
_LABELS, _NUMBERS = _INTEGERS + CONVERTED_INTEGERS, (torch.bool, *_INTEGERS, *_FLOATING)
# Of the tensors, in the order of the schema; the operator answers for the mask.
_DTYPES = {
    "logits": _FLOATING,
    "target": _LABELS,
    "mask": None,
    "weight": _NUMBERS + CONVERTED_MASKS,
    "token_weight": _FLOATING,
    "segment_ids": _LABELS,
    "temperature": _NUMBERS,
    "normalizer": _NUMBERS,
}
_MAY_BE_NUMBERS = ("temperature", "normalizer")
# One entry per row, and whether one of the last dimension stands for all of it: one label for all
# positions of a sequence is a mistake, one mask entry or weight per sample is not.
_PER_ROW = {"target": False, "mask": True, "token_weight": True, "segment_ids": False}
_MAY_BE_PER_ROW = {"temperature": True}  # or one number


# --- views ---------------------------------------------------------------------------------------


def classes_last(name, logits, class_dim):
    """A view of the logits whose last dimension are the classes."""
    check_tensor(name, "logits", logits)
    check_int64(name, "class_dim", class_dim)
    dims = logits.dim()
    if not -dims <= class_dim < dims:
        rule = f"be in [{-dims}, {dims - 1}] for logits {shape_text(logits)}"
        raise refusal(name, "class_dim", rule, class_dim)
    return logits.movedim(class_dim, -1)


def class_weight(name, weight, logits, argument="weight"):
    """In the dtype of the loss."""
    if weight.dtype not in _DTYPES["weight"]:
        raise refusal(name, argument, "be floating or integer", weight.dtype)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return weight.to(dtype).contiguous()


def expanded(given, rows_of="logits"):
    """What is given with the tensors that stand per row expanded from dimensions of size 1, [1, S]
    for [B, S], as views; None where that makes no difference."""
    rows = given[rows_of].shape[:-1]
    # While tracing sizes that depend on data may not be compared.
    expand = _expand_traced if torch.compiler.is_compiling() else _expand
    result = None
    for argument, last in (_PER_ROW | _MAY_BE_PER_ROW).items():
        tensor = given[argument]
        is_tensor = isinstance(tensor, torch.Tensor)
        fitted = expand(tensor, rows, last) if is_tensor else tensor
        if fitted is not tensor:
            result = {**(result or given), argument: fitted}
    return result


def _expand(tensor, rows, last):
    shape = tensor.shape
    if shape == rows or len(shape) != len(rows):
        return tensor
    for d, (size, n) in enumerate(zip(shape, rows, strict=True)):
        if size != n and (size != 1 or (d + 1 == len(rows) and not last)):
            return tensor
    return tensor.expand(rows)


def _expand_traced(tensor, rows, last):
    """The same; what is not known to be 1 is left alone."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    sizes = list(tensor.shape)
    if len(sizes) != len(rows):
        return tensor
    ones = [
        d for d in range(len(sizes) if last else len(sizes) - 1) if guard_or_false(sizes[d] == 1)
    ]
    if not ones:
        return tensor
    return tensor.expand([rows[d] if d in ones else -1 for d in range(len(sizes))])


# --- numbers -------------------------------------------------------------------------------------


def check_options(name, given):
    """Numbers of training pass by their types and ranges; the others are looked at one by one."""
    # Constants of the code: torch.compile guards those of the module.
    for argument, most in (("label_smoothing", 1), ("z_loss", None), ("focal_gamma", None)):
        value = given[argument]
        # A tensor is none: it would lose its derivative, and be waited for.
        if type(value) is not float or not 0 <= value <= (most or _LARGEST):
            check_number(name, argument, value, least=0, most=most)
    if type(given["ignore_index"]) is not int:
        check_int64(name, "ignore_index", given["ignore_index"])
    if type(given["shift"]) is not int:
        check_shift(name, given["shift"])


def check_every_option(name, given):
    """The rest of them, too, which the operator checks."""
    check_choice(name, "reduction", given["reduction"], REDUCTIONS)
    check_options(name, given)
    check_shift(name, given["shift"])
    check_int64(name, "ignore_index", given["ignore_index"])


def check_int64(name, argument, value):
    check_int(name, argument, value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: {argument} must fit in 64 bits, got {value}")


def check_shift(name, shift):
    check_int64(name, "shift", shift)
    check_length(name, "shift", shift)


def check_scale(name, argument, value):
    """A Python number that float32 logits may be divided by."""
    check_number(name, argument, value, above=0)
    if value < _SMALLEST:
        rule = f"be at least {_SMALLEST:.4g}, the smallest float32 of full precision"
        raise refusal(name, argument, rule, value)


def softcap_number(name, softcap):
    """What the operator takes: 0 for none."""
    if softcap is None or (isinstance(softcap, (int, float)) and softcap == math.inf):
        return 0.0
    if not (type(softcap) is float and _SMALLEST <= softcap < _NO_CAP):
        check_scale(name, "softcap", softcap)
    return softcap if softcap < _NO_CAP else 0.0


# --- what the operator refused, or will not see --------------------------------------------------


def check_sweep(name, reduction, return_stats):
    if reduction == "none" or reduction in AGGREGATIONS:
        got = reduction if reduction == "none" else f"{reduction}: what it divides by comes later"
        raise refusal(name, "reduction", "be mean or sum for gradient_in_forward", got)
    if return_stats:
        raise ValueError(
            f"{name}: return_stats must be False for gradient_in_forward: gradients of the "
            "statistics would come too late"
        )


def check_tensors(name, given):
    """As the caller gave them: temperature and normalizer may be numbers."""
    for argument in _DTYPES:
        value = given[argument]
        is_number = argument in _MAY_BE_NUMBERS and not isinstance(value, torch.Tensor)
        if argument == "logits" or (value is not None and not is_number):
            check_tensor(name, argument, value)
            if argument == "logits":  # others than masked_cross_entropy take no DTensor
                check_whole(name, argument, value)
            check_beside(name, argument, value, "logits", given["logits"])


def explain(name, failure, given):
    """Raise what the caller can act on, where ``failure`` is not that."""
    check_every_option(name, given)
    check_flags(name, {"return_stats": given["statistics"]})
    # Of some dtypes the operator has no name, and of others PyTorch's schemas know nothing.
    said = isinstance(failure, (ValueError, IndexError, TypeError))
    if not said or str(failure).endswith("got another"):
        check_dtypes(name, given)
    _hint(name, given["logits"], given["target"], given["mask"])


def _hint(name, logits, target, mask):
    """For callers of F.cross_entropy: other places for the classes and for class weights."""
    rows, shape = logits.shape[:-1], logits.shape
    if (
        mask is not None
        and mask.is_floating_point()
        and mask.shape == shape[-1:]
        and mask.shape != rows
    ):
        rule = f"have the shape of logits {shape_text(logits)} without the last dimension"
        got = f"{shape_text(mask)}, one entry per class: class weights go by weight="
        raise refusal(name, "mask", rule, got)
    if target is not None and len(shape) > 2 and target.shape != rows:
        if target.shape == shape[:1] + shape[2:]:
            rule = f"have the shape of logits {shape_text(logits)} without the last dimension"
            got = f"{shape_text(target)}: for logits [N, C, ...] give class_dim=1"
            raise refusal(name, "target", rule, got)


def check_dtypes(name, given):
    """Those that do not even reach the operator's own checks."""
    for argument, dtypes in _DTYPES.items():
        tensor = given.get(argument)
        if dtypes is None or not isinstance(tensor, torch.Tensor) or tensor.dtype in dtypes:
            continue
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise refusal(name, argument, f"be {', '.join(most)} or {last}", tensor.dtype)


def check_rows(name, logits, per_row):
    """What plain PyTorch, which may stand in for the operator under torch.func, would broadcast."""
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"{name}: logits must be floating [..., V], got {logits.dtype}")
    for argument, tensor in per_row.items():
        if tensor is not None and tensor.shape != logits.shape[:-1]:
            rule = f"have the shape of logits {shape_text(logits)} without the last dimension"
            raise refusal(name, argument, rule, shape_text(tensor))


def check_number_or_rows(name, argument, value, like, like_name="logits"):
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return
    if value.shape != like.shape[:-1]:
        rule = f"be a number, a 0-d tensor or have the shape of {like_name} {shape_text(like)}"
        raise refusal(name, argument, f"{rule} without the last dimension", shape_text(value))


def check_one_number(name, argument, value):
    if isinstance(value, torch.Tensor) and value.dim():
        raise refusal(name, argument, "be a number []", shape_text(value))


def check_all(name, given, a):
    """What an operator refuses that no one runs; a: what is given as the operator takes it."""
    check_tensors(name, given)
    check_dtypes(name, given)
    check_traced(name, a)


def check_traced(name, given):
    """Under torch.func: all that the operator would check."""
    target, weight = given["target"], given["weight"]
    if target is not None and (target.is_floating_point() or target.dtype == torch.bool):
        rule = "be integers (soft labels are not what this function takes)"
        raise refusal(name, "target", rule, target.dtype)
    check_rows(name, given["logits"], {argument: given[argument] for argument in _PER_ROW})
    for argument in _MAY_BE_PER_ROW:
        check_number_or_rows(name, argument, given[argument], given["logits"])
    check_one_number(name, "normalizer", given["normalizer"])
    classes = given.get("vocab_size", given["logits"].shape[-1])  # None: not known yet
    if weight is not None and classes is not None and weight.shape != (classes,):
        raise refusal(name, "weight", f"have one entry per class [{classes}]", shape_text(weight))
    check_shift(name, given["shift"])
    check_choice(name, "reduction", given["reduction"], REDUCTIONS)


def check_overwritable(name, logits):
    """Two rows that share memory would each overwrite what the other must still read."""
    if logits.is_contiguous():
        return
    extent = 1
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1 and stride < extent:
            got = f"strides {list(logits.stride())} for {list(logits.shape)}"
            raise refusal(name, "logits", "not be expanded or overlap for inplace_backward", got)
        extent += stride * (size - 1)
