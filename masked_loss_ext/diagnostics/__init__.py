# SPDX-License-Identifier: BSD-3-Clause
"""Does a loss, or a whole training step, read what its mask excludes?"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch

from .._checks import as_mask, check_choice, check_int, check_number, check_tensor, refusal
from ._batch import shape_of, sort_entries
from ._check import Check
from ._report import Change, PaddingLeak, PaddingReport, Shift, Tolerance
from ._step import NAME, Runner

Parameters: TypeAlias = (
    torch.nn.Module | Mapping[str, torch.Tensor] | Iterable[torch.Tensor | tuple[str, torch.Tensor]]
)
__all__ = ["Change", "PaddingLeak", "PaddingReport", "Shift", "check_padding"]


def check_padding(
    step: Callable[[Any], Any],
    batch: Any,
    mask: torch.Tensor,
    *,
    parameters: Parameters = (),
    rtol: float | None = None,
    atol: float = 0.0,
    nonfinite: bool = True,
    trim: bool = True,
    ignore_index: int | None = None,
) -> PaddingReport:
    """Whether a loss or training step reads its padding: runs it with other content there.

    Only what the mask excludes is changed, one entry of the batch after the other and all at once;
    nothing that the step computes from the rest may move. Works with any PyTorch loss or model:

    >>> mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    >>> logits, labels = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    >>> batch = {"logits": logits, "labels": labels, "mask": mask}
    >>> def step(batch):  # forgets the mask
    ...     return torch.nn.functional.cross_entropy(batch["logits"].mT, batch["labels"])
    >>> report = check_padding(step, batch, mask)
    >>> report  # print(report) shows by how much each run moved the loss and every gradient
    <PaddingReport: LEAK through batch, logits, labels, all at once, row 1; print it for the table>
    >>> def step(batch):
    ...     ignored = batch["labels"].masked_fill(batch["mask"] == 0, -100)
    ...     return torch.nn.functional.cross_entropy(batch["logits"].mT, ignored)
    >>> check_padding(step, batch, mask, nonfinite=False)
    <PaddingReport: no leak in 5 runs>

    In a test: ``check_padding(step, batch, mask).raise_if_leaking()``, which fails with the table,
    or ``assert check_padding(step, batch, mask)``. A leak is any of

    - the loss, or a gradient at a kept position or of a parameter, moved or became NaN;
    - a gradient inside the padding is not 0, also with the batch as it is;
    - the step raised an error for what stands in the padding;
    - one row of the batch has another loss when its padding is cut off (a mean over ``B * T``).

    So is what a shifted loss does with padding on the left, whose last position predicts the first
    token that counts.

    What is changed: entries whose first dimensions are the mask's. Floating ones get random
    numbers ten times as large as theirs, NaN, and infinities; integers (ids, labels) other values
    that occur in the entry, so that they stay valid indices; bool is flipped. Left alone are the
    mask itself (same memory, or ``mask.numel()`` entries that are 1 and 0 like it, 0 and 1, or 0
    and at most -1e4) and entries of other shapes; the report lists both. Labels of the one negative
    value of their entry (-100) say by themselves that they do not count: they stay, and what
    happens when they are replaced is reported as "by label", which is no leak.

    The step must be a function of the batch's content. The random state is the same for each run,
    so dropout is. Random state, gradients, parameters and buffers of the modules that ``step`` can
    be seen to use (itself, closure, globals, ``self``) are put back afterwards; an optimiser's own
    state is not, so leave its step out. If two runs of the unchanged batch differ, the report says
    so, and only what exceeds three times that counts as a leak.

    Args:
        step: function of a batch that returns the loss, a scalar tensor attached to the graph, or
            one that has called ``backward`` itself; of a detached loss or a number without a
            backward only the value is compared.
        batch: tensor, or (nested) list, tuple, dict or dataclass of tensors and other objects. It
            is not modified: the step gets copies, floating ones as leaves that require grad.
        mask: ``[B, T]`` or any other shape and dtype; 0 = excluded.
        parameters: module, tensors, or (name, tensor) pairs whose gradients are compared too.
        rtol, atol: what moved by at most ``atol + rtol * largest entry before`` (of a gradient: or
            a thousandth of the largest of all) is listed as "rounding" and passes. Shapes do not
            change, so most steps agree in every bit and ``rtol=0`` asks for that; but the order of
            some sums depends on content, such as the gradient of an embedding on a GPU or tokens
            grouped by expert. None: 1e-6, or the dtype's machine epsilon if that is larger.
            Cutting padding off does change shapes; there a loss that differs by up to 1 % (less
            where little is cut) is "close".
        nonfinite: False leaves NaN and infinities out. A multiplication by 0 does not stop them,
            and PyTorch has many: a weight's gradient is a product with its input, attention
            multiplies what it masks, and ``F.cross_entropy`` gives ignored logits the gradient NaN
            if they hold one. So they are for losses, and for models whose inputs are ids.
        trim: False leaves out the comparison with a row without its padding.
        ignore_index: a further integer value by which the step itself tells that a position does
            not count, such as a label of 255 or a padding id; treated like -100 above.

    Returns:
        PaddingReport, true if nothing leaks. Its ``changes`` and ``leaks`` hold the numbers.

    Raises:
        ValueError: the mask excludes nothing, or no entry begins with its shape: there would be
            nothing to check. What the step raises on the unchanged batch passes through.
    """
    if not callable(step):
        raise refusal(NAME, "step", "be callable", type(step).__name__, TypeError)
    if rtol is not None:
        check_number(NAME, "rtol", rtol, least=0)
    check_number(NAME, "atol", atol, least=0)
    check_choice(NAME, "nonfinite", nonfinite, (True, False))
    check_choice(NAME, "trim", trim, (True, False))
    if ignore_index is not None:
        ignore_index = _checked_ignore_index(ignore_index)
    entries = _entries(batch, mask)
    runner = Runner(step, batch, parameters)
    tolerance = Tolerance(rtol, atol)
    check = Check(entries, runner, tolerance, nonfinite=nonfinite, ignore_index=ignore_index)
    try:
        check.run_unchanged()
        check.run_changed()
        if trim:
            check.run_trimmed()
    finally:
        runner.restore()
    return check.report()


def _checked_ignore_index(value):
    if isinstance(value, bool):
        raise refusal(NAME, "ignore_index", "be an int or None", "bool", TypeError)
    check_int(NAME, "ignore_index", value)
    if not -(2**63) <= int(value) < 2**63:
        raise refusal(NAME, "ignore_index", "fit int64", value)
    return int(value)


def _entries(batch, mask):
    _check_mask(mask)
    if (mask != 0).all():
        got = f"{list(mask.shape)} with every position on: there is nothing to check"
        raise refusal(NAME, "mask", "exclude something", got)
    entries = sort_entries(batch, mask)
    if not entries.checked:
        rule = "have the first dimensions of an entry of batch that is not a mask itself"
        shapes = {entry: shape_of(tensor) for entry, tensor in entries.tensors.items()}
        got = f"{list(mask.shape)} and {shapes}; taken for the mask: {entries.masks}"
        raise refusal(NAME, "mask", rule, got)
    return entries


def _check_mask(mask):
    check_tensor(NAME, "mask", mask)
    if mask.is_meta:
        raise refusal(NAME, "mask", "hold data", "a tensor on the device meta")
    if mask.dim() == 0 or mask.is_complex():
        rule = "have the first dimensions of the batch's entries"
        raise refusal(NAME, "mask", rule, f"{list(mask.shape)} {mask.dtype}")
    # On the CPU, for here one may wait for the device.
    as_mask(NAME, "mask", mask.detach().cpu())
