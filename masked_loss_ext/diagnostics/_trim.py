# SPDX-License-Identifier: BSD-3-Clause
"""A batch of copies of one padded row, and the same without the padding."""

from typing import NamedTuple

import torch

from ._batch import is_floating, split_labels


class Cut(NamedTuple):
    row: str  # which one, in words
    length: str  # "3 of 5"
    share: float  # of the row that is cut off
    padded: dict  # name -> tensor
    alone: dict


def cut_padding(entries, ignore_index):
    """(Cut, "") or (None, why not).

    The batch is cut, never lengthened: positions beyond those it has may not exist in the model,
    and on a GPU an index out of range ends the process. Every row becomes the same one, so that
    entries of one number per row (lengths) stay true of what is left.
    """
    keep = entries.keep
    if keep.dim() > 2:
        return None, f"the mask has {keep.dim()} dimensions, rows are known of one or two"
    if not entries.masks and not _labels_are_masked(entries, ignore_index):
        return None, "the mask is not an entry of the batch, so it cannot be cut along"
    rows = keep if keep.dim() == 2 else keep[None]
    found = _row_with_padding(rows)
    if found is None:
        return None, "no row has padding at one of its ends"
    row, start, stop = found
    padded, alone = dict(entries.tensors), {}
    if keep.dim() == 2:
        for name, tensor in padded.items():
            if tensor.layout == torch.strided and not tensor.is_nested:
                if tensor.dim() and tensor.shape[0] == len(rows):
                    padded[name] = tensor.detach()[row : row + 1].expand_as(tensor)
    for name in entries.checked + entries.masks:
        tensor = padded[name]
        alone[name] = tensor.narrow(keep.dim() - 1, start, stop - start)
    total = rows.shape[1]
    return Cut(
        row=f"row {row}" if keep.dim() == 2 else "the row",
        length=f"{stop - start} of {total}",
        share=1 - (stop - start) / total,
        padded=padded,
        alone=padded | alone,
    ), ""


def _row_with_padding(rows):
    """(row, start, stop): the one nearest to half padding, at the right if any is padded there."""
    found = {"right": [], "left": []}
    total = rows.shape[1]
    for row, kept in enumerate(rows.cpu()):
        places = kept.nonzero().flatten()
        if not places.numel():
            continue
        first, last = int(places[0]), int(places[-1])
        if last + 1 < total:
            found["right"].append((row, 0, last + 1))
        elif first:
            found["left"].append((row, first, total))
    found = found["right"] or found["left"]
    return min(found, key=lambda f: abs(2 * (f[2] - f[1]) - total), default=None)


def _labels_are_masked(entries, ignore_index):
    """Whether an integer entry holds ignored labels throughout the padding, as a mask would."""
    drop = ~entries.keep
    for name in entries.checked:
        tensor = entries.tensors[name]
        if is_floating(tensor) or tensor.dtype == torch.bool:
            continue
        if split_labels(tensor, ignore_index)[0][drop.to(tensor.device)].all():
            return True
    return False
