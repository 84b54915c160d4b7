# SPDX-License-Identifier: BSD-3-Clause
"""The sentences below the table."""

import torch

from ._batch import INF, NAN, OTHER, is_floating, shape_of
from ._report import BY_LABEL, LEAK, SAME

UPDATES = (
    "the step updates its parameters. They were put back after each run; an optimiser's own state "
    "was not: leave its step out."
)


def of_entries(entries, kinds):
    notes = []
    if entries.masks:
        notes.append(f"taken for the mask and left alone: {', '.join(entries.masks)}.")
    if entries.others:
        shapes = [f"{name} {shape_of(entries.tensors[name])}" for name in entries.others]
        keep = list(entries.keep.shape)
        notes.append(f"not checked, shape does not begin with {keep}: {', '.join(shapes)}.")
    constant = [name for name, found in kinds.items() if not found]
    if constant:
        notes.append(f"not checked, there is no other value to put in: {', '.join(constant)}.")
    return notes


def loss_only(runner):
    if not runner.leaves and not runner.parameters:
        return "no gradient was compared: the batch has no floating entry; give parameters=model."
    return (
        "no gradient was compared: the step returned a loss that is detached or whose graph is "
        "used up, and left no gradients behind."
    )


def not_reproducible(noise):
    name = max(noise, key=noise.get)
    return (
        "runs of the unchanged batch differ (random numbers from elsewhere, state, or "
        f"nondeterministic kernels), most in {name}: {noise[name]:.1e}. Only what exceeds three "
        "times that counts."
    )


def not_leaves(names):
    return (
        f"no gradient of {', '.join(sorted(names))}: the step raises an error when it is to be "
        "differentiated by."
    )


def not_trimmed(reason):
    return f"whether the amount of padding matters was not checked: {reason}."


def first_line(error):
    text = (str(error).strip().splitlines() or [""])[0]
    text = text if len(text) <= 70 else text[:67] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def of_findings(changes, entries, drop):
    """What the pattern of leaks suggests."""
    leaks = [change for change in changes if change.verdict == LEAK]
    notes = []
    kept_still = all(c.loss and c.loss.verdict == SAME and not c.gradients for c in leaks)
    if leaks and all(change.kind in (NAN, INF) for change in leaks):
        notes.append(_only_nonfinite(kept_still))
    elif leaks and kept_still:
        notes.append("nothing kept has moved, but the step sends gradient into the padding.")
    if any(change.kind.startswith("none") for change in leaks):
        notes.append(
            "the loss depends on how much padding there is: a mean over B * T, or positions that "
            "count the padding?"
        )
    by_label = [change.entry for change in changes if change.verdict == BY_LABEL]
    if by_label:
        notes.append(
            f"{', '.join(by_label)}: here the labels themselves exclude the padding, not the mask. "
            "That is no leak."
        )
    if any(c.kind.startswith("none") and c.loss.relative < 1e-5 for c in changes):
        notes += _own_padding_values(leaks, entries, drop)
    return notes


def _only_nonfinite(kept_still):
    if kept_still:
        return (
            "nothing kept has moved, but NaN or inf in the padding comes back as NaN in its "
            "gradient, and goes on to whatever computed the padding: a backward multiplies by 0 "
            "(torch.where on a result, F.cross_entropy with ignore_index). If such values cannot "
            "occur there: nonfinite=False."
        )
    return (
        "only NaN and inf leak: the padding is multiplied by 0 (0 * NaN = NaN), not left out. "
        "If a loss or a pooling does that, torch.where on its inputs mends it. Every weight's "
        "gradient and PyTorch's attention do it too: for a model of floating inputs, "
        "nonfinite=False."
    )


def _own_padding_values(leaks, entries, drop):
    """For steps that find their padding by value, whose loss then does not know how much there is.

    Only for them: whoever forgets the mask must not be told how to silence this.
    """
    for name in dict.fromkeys(c.entry for c in leaks if c.kind == OTHER):
        tensor = entries.tensors.get(name)
        if tensor is None or is_floating(tensor) or tensor.dtype == torch.bool:
            continue
        where = drop.to(tensor.device)
        inside = tensor[where].unique()
        if inside.numel() == 1 and not (tensor[~where] == inside).any():
            value = int(inside)
            yield (
                f"{name} holds {value} in the padding and nowhere else: if the step itself leaves "
                f"out what holds {value}, this is no leak: ignore_index={value}."
            )
